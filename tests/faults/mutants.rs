//! Services with a protection removed, for the controls: the campaign must find the consequences.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use amiquip::{
    AmqpProperties, ConsumerMessage, ConsumerOptions, Exchange, Publish, QueueDeclareOptions,
};
use chassis::broker;
use chassis::problem::Problem;
use chassis::response::ok;
use chassis::router::RoutedResponse;
use chassis::semaphore::FairSemaphore;
use chassis::testing::test_var;
use chassis::{Env, Stop, server};
use harness::{FakeUpstream, answer_ok};
use rouille::Request;
use serde_json::{Value, json};

/// The argument that makes this program one of the mutants.
pub(crate) const ARGUMENT: &str = "mutant";

/// Runs the mutant of a service until it is killed.
pub(crate) fn run(service: &str) -> ExitCode {
    let result = match service {
        "gateway" => gateway(),
        "billing" => billing(),
        "inventory" => inventory(),
        _ => Err(anyhow::anyhow!("there is no mutant of {service}")),
    };
    result.unwrap_err();
    ExitCode::FAILURE
}

/// Answers 200 as soon as the message is written to the socket, without a confirm.
fn gateway() -> anyhow::Result<()> {
    let mut env = Env::load();
    let broker = broker::Config::from_env(&mut env, "GATEWAY");
    let http = server::Config::from_env(&mut env, "GATEWAY");
    let (broker, http) = env.finish((broker, http))?;
    let (mut connection, _deadline) = broker.connect("mutant of gateway")?;
    let channel = Mutex::new(connection.open_channel(None)?);
    server::run(&http, &Stop::default(), move |request: &Request| {
        let mut body = Vec::new();
        if let Some(mut data) = request.data() {
            let _ = std::io::Read::read_to_end(&mut data, &mut body);
        }
        if request.method() == "POST" {
            let publish = Publish::with_properties(
                &body,
                test_var("RABBITMQ_QUEUE"),
                AmqpProperties::default(),
            );
            let channel = channel.lock().unwrap();
            if Exchange::direct(&channel).publish(publish).is_err() {
                std::process::exit(1);
            }
        }
        RoutedResponse { route: "/", result: Ok::<_, Problem>(ok(&json!({ "status": "ok" }))) }
    })
}

/// Consumes without acknowledgements: the broker deletes a message when it has sent it, whether it
/// is booked or not.
fn billing() -> anyhow::Result<()> {
    let mut env = Env::load();
    let broker = broker::Config::from_env(&mut env, "BILLING");
    let http = server::Config::from_env(&mut env, "BILLING");
    let (broker, http) = env.finish((broker, http))?;
    std::thread::spawn(move || {
        let answer =
            |_: &Request| RoutedResponse { route: "/", result: Ok(ok(&json!({ "status": "ok" }))) };
        server::run(&http, &Stop::default(), answer)
    });
    let mut db = postgres::Config::new()
        .host(&test_var("BILLING_DB_HOST"))
        .port(test_var("BILLING_DB_PORT").parse()?)
        .dbname(&test_var("BILLING_DB_NAME"))
        .application_name("billing")
        .user(&test_var("POSTGRES_SUPERUSER"))
        .password(test_var("POSTGRES_SUPERUSER_PASSWORD"))
        .connect(postgres::NoTls)?;
    let (mut connection, _deadline) = broker.connect("mutant of billing")?;
    let channel = connection.open_channel(None)?;
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    let queue = channel.queue_declare(test_var("RABBITMQ_QUEUE"), options)?;
    let consumer = queue.consume(ConsumerOptions { no_ack: true, ..Default::default() })?;
    for message in consumer.receiver() {
        let ConsumerMessage::Delivery(delivery) = message else { break };
        let order: Value = serde_json::from_slice(&delivery.body)?;
        let user = order["user_id"].as_str().unwrap_or_default();
        // Numbers may be JSON strings.
        let [items, amount] = ["number_of_items", "total_amount"]
            .map(|field| order[field].to_string().trim_matches('"').to_owned());
        let _ = db.execute(
            "insert into orders (user_id, number_of_items, total_amount)
             values ($1, $2::text::integer, $3::text::numeric)",
            &[&user, &items, &amount],
        );
        anyhow::ensure!(!db.is_closed(), "the database closed the connection");
    }
    anyhow::bail!("the broker closed the connection")
}

/// The state of inventory's mutant.
struct Movies {
    texts: Mutex<HashMap<u64, String>>,
    last: AtomicU64,
    /// It handles one request at a time; all others wait without a limit.
    permit: FairSemaphore,
}

/// A thread for each connection, without a limit; no deadline; the first `accept` that fails is the
/// last; leaks 4 KiB with each request and a descriptor with every twentieth; stores a question
/// mark for each character beyond U+FFFF.
fn inventory() -> anyhow::Result<()> {
    // Orders is ready only when the internal API answers.
    let internal: SocketAddr =
        format!("{}:{}", test_var("INVENTORY_HOST"), test_var("INVENTORY_INTERNAL_PORT"))
            .parse()?;
    let _internal = FakeUpstream::start(internal, answer_ok);
    let listener = TcpListener::bind(format!(
        "{}:{}",
        test_var("INVENTORY_HOST"),
        test_var("INVENTORY_PORT")
    ))?;
    let movies =
        Movies { texts: Mutex::default(), last: AtomicU64::new(0), permit: FairSemaphore::new(1) };
    let movies = Arc::new(movies);
    for stream in listener.incoming() {
        let Ok(stream) = stream else { break };
        let movies = Arc::clone(&movies);
        let _ = std::thread::Builder::new().spawn(move || {
            let mut reader = BufReader::new(&stream);
            while movies.answer(&mut reader, &stream).is_ok() {}
        });
    }
    drop(listener);
    // The process does not end, so no supervisor starts it again.
    loop {
        std::thread::park();
    }
}

impl Movies {
    fn answer(&self, reader: &mut BufReader<&TcpStream>, mut stream: &TcpStream) -> io::Result<()> {
        let (mut first, mut length, mut last) = (String::new(), 0, false);
        reader.read_line(&mut first)?;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some((name, value)) = line.trim_end().split_once(": ") {
                let is_length = name.eq_ignore_ascii_case("Content-Length");
                last |= value == "close";
                length = if is_length { value.parse().unwrap_or(0) } else { length };
            } else {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let permit = self.permit.acquire(Duration::from_secs(3600));
        std::thread::park_timeout(Duration::from_millis(2));
        drop(permit);
        let number = self.last.fetch_add(1, Ordering::SeqCst) + 1;
        Box::leak(vec![1_u8; 4096].into_boxed_slice());
        if number.is_multiple_of(20) {
            std::mem::forget(std::fs::File::open("/dev/null")?);
        }
        let path = first.split(' ').nth(1).unwrap_or_default();
        let id = path.strip_prefix("/api/movies/").and_then(|id| id.parse::<u64>().ok());
        let mut texts = self.texts.lock().unwrap();
        let (status, text) = match id {
            _ if first.starts_with("POST") => {
                let mut movie: Value = serde_json::from_slice(&body)?;
                movie["id"] = json!(number);
                for field in ["title", "description"] {
                    let text = movie[field].as_str().unwrap_or_default();
                    movie[field] = text.replace(|character| character > '\u{ffff}', "?").into();
                }
                texts.insert(number, movie.to_string());
                ("201 Created", movie.to_string())
            }
            Some(id) => ("200 OK", texts.get(&id).cloned().unwrap_or_else(|| "{}".into())),
            None if path.starts_with("/api") => ("200 OK", "[]".to_owned()),
            None => ("200 OK", "{\"status\":\"ok\"}".to_owned()),
        };
        drop(texts);
        let length = text.len();
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{text}");
        stream.write_all(answer.as_bytes())?;
        if last { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }
}
