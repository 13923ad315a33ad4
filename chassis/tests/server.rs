//! The server loop from outside, on real sockets.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use chassis::env::Env;
use chassis::http1::HeadLimits;
use chassis::router::RoutedResponse;
use chassis::server::{Config, Limits, bind, serve};
use chassis::stop::Stop;
use chassis::testing::http_corpus as corpus;
use proptest::prelude::*;
use rouille::{Request, Response, ResponseBody};

/// A running server; stopped and waited for when it is dropped.
struct RunningServer {
    address: SocketAddr,
    stop: Stop,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl RunningServer {
    fn start(limits: Limits) -> RunningServer {
        RunningServer::with(limits, echo)
    }

    fn with<H>(limits: Limits, handler: H) -> RunningServer
    where
        H: Fn(&Request) -> RoutedResponse + Send + Sync + 'static,
    {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Stop::default();
        let raised = stop.clone();
        let thread = thread::spawn(move || serve(listener, limits, &raised, handler));
        RunningServer { address, stop, thread: Some(thread) }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// What the server sends until it closes, for `sent` and the end of the stream.
    fn exchange(&self, sent: &[u8]) -> String {
        let mut stream = self.connect();
        // A server that refuses early may close before all is sent.
        let _ = stream.write_all(sent);
        let _ = stream.shutdown(Shutdown::Write);
        read_all(&mut stream)
    }

    fn stopped(mut self) -> anyhow::Result<()> {
        self.stop.request();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        self.stop.request();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn limits() -> Limits {
    Limits {
        max_connections: 16,
        header_timeout: Duration::from_secs(10),
        body_timeout: Duration::from_secs(10),
        write_timeout: Duration::from_secs(10),
        idle_timeout: Duration::from_secs(10),
        head: HeadLimits {
            max_head_bytes: 16 << 10,
            max_header_fields: 100,
            max_body_bytes: 100_000,
        },
        max_buffered_bytes: 1 << 20,
    }
}

/// Tells what it was asked: method, target, and the body.
fn echo(request: &Request) -> RoutedResponse {
    let mut body = String::new();
    request.data().unwrap().read_to_string(&mut body).unwrap();
    let response = match request.raw_url() {
        "/panic" => panic!("on purpose"),
        "/stream" => Response {
            data: ResponseBody::from_reader(io::repeat(b'x').take(100_000)),
            ..Response::text("")
        },
        "/endless" => {
            Response { data: ResponseBody::from_reader(io::repeat(b'x')), ..Response::text("") }
        }
        "/broken" => Response {
            data: ResponseBody::from_reader_and_size(io::repeat(b'x').take(50_000), 60_000),
            ..Response::text("")
        },
        "/injected" => Response::text("").with_additional_header("X-Bad", "a\r\nSet-Cookie: b"),
        target => {
            let host = request.header("Host").unwrap_or("none");
            Response::text(format!("[{} {target} {host} {body}]", request.method()))
        }
    };
    RoutedResponse { route: "/", result: Ok(response) }
}

fn read_all(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => (),
        Err(err) if err.kind() == ErrorKind::ConnectionReset => bytes.extend(b"<reset>"),
        Err(err) => panic!("{err}"),
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads one answer whose length is announced.
fn read_one(stream: &mut TcpStream) -> String {
    try_to_read_one(stream).unwrap()
}

fn try_to_read_one(stream: &mut TcpStream) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        bytes.push(byte[0]);
    }
    let head = String::from_utf8(bytes).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body)?;
    Ok(head + &String::from_utf8(body).unwrap())
}

/// Status codes and echoed requests, in order: what must not depend on packets or clocks.
fn essence(answers: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in answers.match_indices("HTTP/1.1 ") {
        let answer = &answers[at + 9..];
        // Problem texts may speak of HTTP/1.1 too.
        if !answer.as_bytes()[0].is_ascii_digit() {
            continue;
        }
        let echoed = answer.split("HTTP/1.1 ").next().unwrap().split_once('[');
        let echoed = echoed.and_then(|(_, rest)| rest.split_once(']')).map(|(echoed, _)| echoed);
        found.push(format!("{} {}", &answer[..3], echoed.unwrap_or("")).trim().to_owned());
    }
    found
}

#[test]
fn every_stream_of_the_corpus_gets_its_answers() {
    let server = RunningServer::start(limits());
    for (name, sent, expected) in corpus::streams() {
        let answers = server.exchange(&sent);
        let mut found = essence(&answers);
        found.retain(|answer| answer != "100");
        assert_eq!(found, expected, "{name}: {answers}");
        assert!(!answers.contains("<reset>"), "{name}: the answer was lost to a reset");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn the_answers_do_not_depend_on_how_the_stream_is_cut(
        cuts in prop::collection::vec(0usize..400, 0..12)
    ) {
        static SERVER: std::sync::LazyLock<RunningServer> =
            std::sync::LazyLock::new(|| RunningServer::start(limits()));
        let mut cuts = cuts;
        cuts.sort_unstable();
        // The long ones are refused before all of them is sent: nothing to compare.
        for (name, sent, expected) in corpus::streams().into_iter().filter(|(_, sent, _)| sent.len() < 1000) {
            let mut stream = SERVER.connect();
            let mut from = 0;
            for to in cuts.iter().map(|cut| (*cut).min(sent.len())).chain([sent.len()]) {
                if stream.write_all(&sent[from..to]).is_err() {
                    break;
                }
                from = to;
                thread::yield_now();
            }
            let _ = stream.shutdown(Shutdown::Write);
            let mut found = essence(&read_all(&mut stream));
            found.retain(|answer| answer != "100");
            prop_assert_eq!(found, expected, "{} cut at {:?}", name, &cuts);
        }
    }
}

#[test]
fn empty_lines_before_a_request_may_come_in_any_packets() {
    let server = RunningServer::start(limits());
    let sent = b"\r\n\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n";
    for first in 1..6 {
        for second in first + 1..7 {
            let mut client = server.connect();
            for piece in [&sent[..first], &sent[first..second], &sent[second..]] {
                client.write_all(piece).unwrap();
                // Long enough, as a rule, for the server to read each by itself.
                thread::park_timeout(Duration::from_millis(10));
            }
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(essence(&read_all(&mut client)), ["200 GET /a h"], "{first} {second}");
        }
    }
}

#[test]
fn clients_that_send_at_once_are_all_answered_as_long_as_there_is_room() {
    let server = RunningServer::start(Limits { max_connections: 64, ..limits() });
    let address = server.address;
    let clients: Vec<JoinHandle<()>> = (0..60)
        .map(|_| {
            thread::spawn(move || {
                for _ in 0..20 {
                    let mut client = TcpStream::connect(address).unwrap();
                    let ask = b"GET /stream HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
                    client.write_all(ask).unwrap();
                    let answer = read_all(&mut client);
                    assert!(answer.ends_with("\r\n0\r\n\r\n"), "{} bytes", answer.len());
                }
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
}

#[test]
fn a_reader_that_pauses_gets_all_of_a_large_answer() {
    let short = Duration::from_millis(500);
    let server = RunningServer::with(Limits { write_timeout: short, ..limits() }, |_| {
        let data = ResponseBody::from_reader(io::repeat(b'x').take(12 << 20));
        RoutedResponse { route: "/", result: Ok(Response { data, ..Response::text("") }) }
    });
    let mut client = server.connect();
    client.write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    let mut piece = vec![0; 1 << 20];
    let mut total = 0;
    while total < 12 << 20 {
        total += client.read(&mut piece).unwrap();
        thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn a_refusal_is_a_problem_document_with_a_request_id() {
    let server = RunningServer::start(limits());
    let answer = server.exchange(b"GET / HTTP/1.1\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("Content-Type: application/problem+json"), "{head}");
    assert!(head.contains("Connection: close"), "{head}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["status"], 400);
    assert_eq!(body["detail"], "the Host header is missing");
    assert_eq!(body["error"], body["detail"]);
    assert!(head.contains(body["request_id"].as_str().unwrap()), "{head}");
}

#[test]
fn a_sane_request_id_is_kept_and_any_other_replaced() {
    let server = RunningServer::start(limits());
    let ask = |id: &str| {
        let answer = server.exchange(
            format!("GET / HTTP/1.1\r\nHost: h\r\nX-Request-Id: {id}\r\n\r\n").as_bytes(),
        );
        let line = answer.lines().find_map(|line| line.strip_prefix("X-Request-Id: "));
        line.unwrap().to_owned()
    };
    assert_eq!(ask("order-7.a_b"), "order-7.a_b");
    assert_ne!(ask("a b"), "a b");
    assert_ne!(ask(&"x".repeat(129)), "x".repeat(129));
}

#[test]
fn a_client_that_waits_for_100_continue_gets_it_before_it_sends_the_body() {
    let server = RunningServer::start(limits());
    let mut client = server.connect();
    let head = b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n";
    client.write_all(head).unwrap();
    assert_eq!(read_one(&mut client), "HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"ab").unwrap();
    assert_eq!(essence(&read_one(&mut client)), ["200 POST / h ab"]);
}

#[test]
fn a_body_of_unknown_length_is_chunked_and_with_http_1_0_ended_by_closing() {
    let server = RunningServer::start(limits());
    let answer = server.exchange(b"GET /stream HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(answer.contains("Transfer-Encoding: chunked"), "{}", &answer[..300]);
    assert!(answer.ends_with("\r\n0\r\n\r\n"));
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    assert_eq!(body.matches('x').count(), 100_000);

    let answer = server.exchange(b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert!(answer.contains("Connection: close") && !answer.contains("chunked"));
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    assert_eq!(body.matches('x').count(), 100_000);
}

#[test]
fn a_body_that_breaks_off_is_never_ended_as_if_it_were_whole() {
    let server = RunningServer::start(limits());
    let answer = server
        .exchange(b"GET /broken HTTP/1.1\r\nHost: h\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(answer.contains("Content-Length: 60000"), "{}", &answer[..300]);
    assert!(!answer.contains("/b"), "the connection went on");
}

#[test]
fn a_header_that_would_break_the_head_is_left_out() {
    let server = RunningServer::start(limits());
    let answer = server.exchange(b"GET /injected HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("Set-Cookie"), "{answer}");
}

#[test]
fn a_panic_of_the_handler_is_a_500_problem_and_the_server_goes_on() {
    let server = RunningServer::start(limits());
    let answers = server
        .exchange(b"GET /panic HTTP/1.1\r\nHost: h\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(essence(&answers), ["500", "200 GET /b h"]);
    assert!(answers.contains("application/problem+json"), "{answers}");
}

#[test]
fn a_stalled_head_or_body_is_a_408_at_its_deadline() {
    let short = Duration::from_millis(200);
    let server =
        RunningServer::start(Limits { header_timeout: short, body_timeout: short, ..limits() });
    for stalled in [
        "GET / HTTP/1.1\r\nHos",
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nab",
        "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    ] {
        let begun = Instant::now();
        let mut client = server.connect();
        client.write_all(stalled.as_bytes()).unwrap();
        assert_eq!(essence(&read_all(&mut client)), ["408"], "{stalled}");
        assert!(begun.elapsed() >= short && begun.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_client_that_drips_cannot_stretch_the_deadline() {
    let short = Duration::from_millis(300);
    let server = RunningServer::start(Limits { header_timeout: short, ..limits() });
    let begun = Instant::now();
    let client = server.connect();
    let mut reader = client.try_clone().unwrap();
    let answered = thread::spawn(move || read_all(&mut reader));
    let mut drip = &client;
    drip.write_all(b"GET / HTTP/1.1\r\nX: ").unwrap();
    while !answered.is_finished() {
        assert!(begun.elapsed() < Duration::from_secs(10), "never refused");
        let _ = drip.write_all(b"x");
        thread::park_timeout(Duration::from_millis(20));
    }
    assert_eq!(essence(&answered.join().unwrap()), ["408"]);
}

#[test]
fn an_idle_connection_is_closed_without_a_word() {
    let short = Duration::from_millis(100);
    let server = RunningServer::start(Limits { idle_timeout: short, ..limits() });
    let mut client = server.connect();
    client.write_all(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    assert_eq!(essence(&read_all(&mut client)), ["200 GET /a h"]);
}

#[test]
fn a_client_that_does_not_read_is_dropped_at_the_write_deadline() {
    let ended = Arc::new(AtomicUsize::new(0));
    struct Tells(Arc<AtomicUsize>);
    impl Read for Tells {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            buffer.fill(b'x');
            Ok(buffer.len())
        }
    }
    impl Drop for Tells {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let dropped = Arc::clone(&ended);
    let short = Duration::from_millis(300);
    let server = RunningServer::with(Limits { write_timeout: short, ..limits() }, move |_| {
        let data = ResponseBody::from_reader(Tells(Arc::clone(&dropped)));
        RoutedResponse { route: "/", result: Ok(Response { data, ..Response::text("") }) }
    });
    let mut client = server.connect();
    client.write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    eventually("the answer given up", || ended.load(Ordering::SeqCst) == 1);
}

#[test]
fn at_the_connection_limit_the_longest_idle_connection_is_evicted() {
    let server = RunningServer::start(Limits { max_connections: 4, ..limits() });
    let mut clients: Vec<TcpStream> = (0..4).map(|_| server.connect()).collect();
    // The later ones ask more often, so that the first has been idle for a while.
    for (number, client) in clients.iter_mut().enumerate() {
        for _ in 0..1 + 50 * number {
            client.write_all(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
            read_one(client);
        }
    }
    let mut new_client = server.connect();
    new_client.write_all(b"GET /new HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    assert_eq!(essence(&read_one(&mut new_client)), ["200 GET /new h"]);
    // The first one was idle longest. Its next request may be on the way by now.
    clients[0].write_all(b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    let answers = read_all(&mut clients[0]);
    assert!(answers.starts_with("HTTP/1.1 503") && answers.contains("Retry-After: 1"), "{answers}");
    for client in &mut clients[1..] {
        client.write_all(b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
        assert_eq!(essence(&read_one(client)), ["200 GET /b h"]);
    }
}

#[test]
fn busy_keep_alive_clients_do_not_starve_new_connections() {
    let server = RunningServer::start(Limits { max_connections: 4, ..limits() });
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                // A client whose connection was evicted connects again.
                while !done.load(Ordering::SeqCst) {
                    let mut client = server.connect();
                    let mut answer = [0; 4096];
                    while client.write_all(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n").is_ok()
                        && client.read(&mut answer).is_ok_and(|read| read > 0)
                        && answer.starts_with(b"HTTP/1.1 200")
                        && !done.load(Ordering::SeqCst)
                    {}
                }
            });
        }
        eventually("a place for one more", || {
            server.exchange(b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n").contains("[GET /b h ]")
        });
        done.store(true, Ordering::SeqCst);
    });
}

#[test]
fn at_the_connection_limit_slow_clients_are_evicted_with_503() {
    let server = RunningServer::start(Limits { max_connections: 4, ..limits() });
    let mut slow: Vec<TcpStream> = (0..4).map(|_| server.connect()).collect();
    for client in &mut slow {
        client.write_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\na").unwrap();
    }
    eventually("a place for a good client", || {
        server.exchange(b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n").contains("[GET /b h ]")
    });
    // Which of them has waited longest, their workers decide; the others get
    // that their bodies end too early.
    let answers: Vec<String> = slow
        .iter_mut()
        .map(|client| {
            let _ = client.shutdown(Shutdown::Write);
            read_all(client)
        })
        .collect();
    let evicted = answers.iter().filter(|answer| answer.starts_with("HTTP/1.1 503"));
    assert!(evicted.clone().count() > 0, "{answers:?}");
    assert!(evicted.clone().all(|answer| answer.contains("Retry-After: 1")), "{answers:?}");
}

#[test]
fn a_reader_that_takes_nothing_cannot_keep_its_place_by_asking_more() {
    let server = RunningServer::start(Limits {
        max_connections: 4,
        write_timeout: Duration::from_secs(60),
        ..limits()
    });
    let mut slow: Vec<TcpStream> = (0..4).map(|_| server.connect()).collect();
    for client in &mut slow {
        client.write_all(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
        client.read_exact(&mut [0; 100]).unwrap();
        client.write_all(b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    }
    eventually("a place for a good client", || {
        server.exchange(b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n").contains("[GET /b h ]")
    });
}

#[test]
fn a_new_connection_gets_503_when_every_worker_is_busy() {
    let barrier = Arc::new(Barrier::new(5));
    let held = Arc::clone(&barrier);
    let server = RunningServer::with(Limits { max_connections: 4, ..limits() }, move |request| {
        held.wait();
        held.wait();
        echo(request)
    });
    let mut busy: Vec<TcpStream> = (0..4).map(|_| server.connect()).collect();
    for client in &mut busy {
        client.write_all(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    }
    barrier.wait();
    let answer = server.exchange(b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("Retry-After: 1"), "{answer}");
    barrier.wait();
    for client in &mut busy {
        assert_eq!(essence(&read_one(client)), ["200 GET /a h"]);
    }
}

#[test]
fn bodies_share_a_budget_of_memory() {
    let barrier = Arc::new(Barrier::new(2));
    let held = Arc::clone(&barrier);
    let server =
        RunningServer::with(Limits { max_buffered_bytes: 50_000, ..limits() }, move |request| {
            if request.raw_url() == "/held" {
                held.wait();
                held.wait();
            }
            echo(request)
        });
    let post = |path: &str| {
        let mut client = server.connect();
        let body = "x".repeat(40_000);
        let head = format!("POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 40000\r\n\r\n");
        let _ = client.write_all((head + &body).as_bytes());
        client
    };
    let mut first = post("/held");
    barrier.wait();
    assert!(read_one(&mut post("/b")).starts_with("HTTP/1.1 503"));
    barrier.wait();
    assert!(read_one(&mut first).starts_with("HTTP/1.1 200"));
    assert!(read_one(&mut post("/b")).starts_with("HTTP/1.1 200"));
}

#[test]
fn a_stop_finishes_what_has_begun_and_closes_what_is_idle() {
    let barrier = Arc::new(Barrier::new(2));
    let held = Arc::clone(&barrier);
    let server = RunningServer::with(limits(), move |request| {
        if request.raw_url() == "/slow" {
            held.wait();
            held.wait();
        }
        echo(request)
    });
    let (mut idle, mut slow) = (server.connect(), server.connect());
    idle.write_all(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    read_one(&mut idle);
    slow.write_all(b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
    barrier.wait();
    server.stop.request();
    assert_eq!(read_all(&mut idle), "");
    assert!(TcpStream::connect(server.address).is_err(), "still accepting");
    barrier.wait();
    let answer = read_all(&mut slow);
    assert!(answer.contains("[GET /slow h ]") && answer.contains("Connection: close"), "{answer}");
    server.stopped().unwrap();
}

#[test]
fn a_stop_does_not_wait_for_a_connection_that_has_not_asked_anything() {
    let server = RunningServer::start(limits());
    let mut silent = server.connect();
    assert!(server.exchange(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n").contains("200 OK"));
    let begun = Instant::now();
    server.stopped().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!(read_all(&mut silent), "");
}

#[test]
fn under_load_a_stop_leaves_no_request_unanswered() {
    let server = RunningServer::start(limits());
    let address = server.address;
    let clients: Vec<JoinHandle<usize>> = (0..8)
        .map(|_| {
            thread::spawn(move || {
                let mut answered = 0;
                // Until the door is closed: every connection that was made gets its answers.
                let mut before = Instant::now();
                while let Ok(mut client) = TcpStream::connect(address) {
                    loop {
                        let asked = client.write_all(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n");
                        let late = before.elapsed() > Duration::from_millis(100);
                        before = Instant::now();
                        let answer = match asked.and_then(|()| try_to_read_one(&mut client)) {
                            // On a busy machine: too late for a server that stops.
                            Err(_) if late => break,
                            answer => answer.unwrap(),
                        };
                        assert_eq!(essence(&answer), ["200 GET /a h"]);
                        answered += 1;
                        if answer.contains("Connection: close") {
                            break;
                        }
                    }
                }
                answered
            })
        })
        .collect();
    thread::park_timeout(Duration::from_millis(300));
    server.stopped().unwrap();
    for client in clients {
        assert!(client.join().unwrap() > 0);
    }
}

#[test]
fn the_doors_for_requests_and_for_metrics_must_be_two() {
    let mut env = Env::from_fn(|name| match name {
        "A_HOST" => Some("127.0.0.1".to_owned()),
        "A_PORT" => Some("8080".to_owned()),
        "A_METRICS_LISTEN" => Some("127.0.0.1:8080".to_owned()),
        _ => None,
    });
    let config = Config::from_env(&mut env, "A");
    let fault = env.finish(config).unwrap_err().to_string();
    assert!(fault.contains("A_METRICS_LISTEN must have another port than A_PORT"), "{fault}");
}

#[test]
fn two_listeners_share_one_port() {
    let first = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    bind(first.local_addr().unwrap()).unwrap();
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::park_timeout(Duration::from_millis(10));
    }
}
