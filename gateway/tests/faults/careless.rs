//! Services without their protections, for the controls: what goes wrong with them is
//! what the campaign must be able to see.

use std::process::ExitCode;
use std::sync::Mutex;

use amiquip::{
    AmqpProperties, ConsumerMessage, ConsumerOptions, Exchange, Publish, QueueDeclareOptions,
};
use chassis::broker;
use chassis::http::{Answer, ok};
use chassis::problem::Problem;
use chassis::testing::var;
use chassis::{Env, Stop, server};
use rouille::Request;
use serde_json::{Value, json};

/// Makes this program one of those services.
pub(crate) const ARGUMENT: &str = "careless";

/// Runs the careless form of a service until it is killed.
pub(crate) fn run(service: &str) -> ExitCode {
    let result = match service {
        "gateway" => gateway(),
        "billing" => billing(),
        _ => Err(anyhow::anyhow!("there is no careless {service}")),
    };
    result.unwrap_err();
    ExitCode::FAILURE
}

/// Answers 200 as soon as the message is handed to the socket, without a confirm.
fn gateway() -> anyhow::Result<()> {
    let mut env = Env::load();
    let broker = broker::Config::from_env(&mut env, "GATEWAY");
    let http = server::Config::from_env(&mut env, "GATEWAY");
    let (broker, http) = env.finish((broker, http))?;
    let (mut connection, _leash) = broker.connect("careless gateway")?;
    let channel = Mutex::new(connection.open_channel(None)?);
    server::run(&http, &Stop::default(), move |request: &Request| {
        let mut body = Vec::new();
        if let Some(mut data) = request.data() {
            let _ = std::io::Read::read_to_end(&mut data, &mut body);
        }
        if request.method() == "POST" {
            let publish =
                Publish::with_properties(&body, var("RABBITMQ_QUEUE"), AmqpProperties::default());
            let channel = channel.lock().unwrap();
            if Exchange::direct(&channel).publish(publish).is_err() {
                std::process::exit(1);
            }
        }
        Answer { route: "/", result: Ok::<_, Problem>(ok(&json!({ "status": "ok" }))) }
    })
}

/// Consumes without acknowledgements: the broker forgets what it has sent, booked or not.
fn billing() -> anyhow::Result<()> {
    let mut env = Env::load();
    let broker = broker::Config::from_env(&mut env, "BILLING");
    let http = server::Config::from_env(&mut env, "BILLING");
    let (broker, http) = env.finish((broker, http))?;
    std::thread::spawn(move || {
        let answer =
            |_: &Request| Answer { route: "/", result: Ok(ok(&json!({ "status": "ok" }))) };
        server::run(&http, &Stop::default(), answer)
    });
    let mut db = postgres::Config::new()
        .host(&var("BILLING_DB_HOST"))
        .port(var("BILLING_DB_PORT").parse()?)
        .dbname(&var("BILLING_DB_NAME"))
        .application_name("billing")
        .user(&var("POSTGRES_SUPERUSER"))
        .password(var("POSTGRES_SUPERUSER_PASSWORD"))
        .connect(postgres::NoTls)?;
    let (mut connection, _leash) = broker.connect("careless billing")?;
    let channel = connection.open_channel(None)?;
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    let queue = channel.queue_declare(var("RABBITMQ_QUEUE"), options)?;
    let consumer = queue.consume(ConsumerOptions { no_ack: true, ..Default::default() })?;
    for message in consumer.receiver() {
        let ConsumerMessage::Delivery(delivery) = message else { break };
        let order: Value = serde_json::from_slice(&delivery.body)?;
        let user = order["user_id"].as_str().unwrap_or_default();
        let _ = db.execute(
            "insert into orders (user_id, number_of_items, total_amount) values ($1, 1, 1.25)",
            &[&user],
        );
        anyhow::ensure!(!db.is_closed(), "the database is gone");
    }
    anyhow::bail!("the broker is gone")
}
