//! The gateway and inventory in sequence: no stream of bytes is one request to the gateway and
//! another, or two, to inventory (request smuggling).
//!
//! A recorder between the two keeps the bytes that inventory receives, and both services log the
//! requests that they read. Two rules are checked. Inventory never reads a request that the
//! gateway has not read. And a stream gets the same responses through the gateway as from
//! inventory itself, up to the first that the gateway rejects by itself; that response is the
//! last and has the same status class, except for 431: inventory accepts more header fields,
//! because the gateway adds some.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use chassis::testing::http::raw;
use chassis::testing::{TestDb, eventually, http_corpus as corpus, test_var};
use harness::bodies::movie;
use harness::{Service, Stack, agent, get, post};
use parking_lot::Mutex;

/// The port of the recorder that listens in inventory's place.
const RECORDER_PORT: u16 = 8090;

/// The title of the only movie: no stream may change it, or add another.
const SENTINEL: &str = "the sentinel";

/// Inventory with a database of its own, which has one movie.
struct InventoryFixture {
    stack: Stack,
    inventory: Service,
    _db: TestDb,
}

impl InventoryFixture {
    fn start() -> InventoryFixture {
        let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
        let mut stack = Stack::new();
        stack.set("INVENTORY_DB_NAME", &db.name);
        let inventory = stack.start_and_wait("inventory");
        let fixture = InventoryFixture { stack, inventory, _db: db };
        let (status, _) = post(&agent(), &fixture.movies_url(), &movie(SENTINEL, "")).unwrap();
        assert_eq!(status, 201);
        fixture
    }

    fn inventory_address(&self) -> SocketAddr {
        self.stack.socket_address("inventory")
    }

    fn gateway_address(&self) -> SocketAddr {
        self.stack.socket_address("gateway")
    }

    /// Inventory's own, past the gateway.
    fn movies_url(&self) -> String {
        format!("{}/api/movies", self.stack.service_url("inventory"))
    }

    /// The titles of all movies.
    fn titles(&self) -> Vec<String> {
        let movies = get(&self.movies_url()).unwrap().json();
        let title = |movie: &serde_json::Value| movie["title"].as_str().unwrap().to_owned();
        movies.as_array().unwrap().iter().map(title).collect()
    }

    /// Requests that inventory has counted, by a label.
    fn requests_counted(&self, label: &str) -> u64 {
        let address = self.stack.metrics_address("inventory");
        let text = get(&format!("http://{address}/metrics")).unwrap().body;
        let lines = text.lines().filter(|line| line.starts_with("http_requests_total{"));
        let numbers = lines.filter(|line| line.contains(label));
        numbers.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// A gateway in front of a recorder in front of inventory. It keeps one connection, so that
    /// every request uses the connection of the one before it.
    fn gateway(&self) -> (Service, Recorder) {
        let recorder =
            Recorder::start((self.stack.address, RECORDER_PORT).into(), self.inventory_address());
        let mut stack = self.stack.clone();
        stack.set("INVENTORY_PORT", RECORDER_PORT);
        stack.set("RABBITMQ_HOST", stack.address);
        stack.set("GATEWAY_UPSTREAM_MAX_IN_FLIGHT", 1);
        (stack.start_and_wait("gateway"), recorder)
    }
}

/// Method, target, request id and body.
type Recorded = (String, String, String, Vec<u8>);

/// A relay that keeps the bytes that go to inventory, one entry a connection.
struct Recorder {
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Recorder {
    fn start(listen: SocketAddr, to: SocketAddr) -> Recorder {
        let listener = TcpListener::bind(listen).unwrap();
        let sent = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&sent);
        thread::spawn(move || {
            for from in listener.incoming() {
                let (mut from, mut to) = (from.unwrap(), TcpStream::connect(to).unwrap());
                let (mut back_from, mut back_to) =
                    (to.try_clone().unwrap(), from.try_clone().unwrap());
                let seen = Arc::clone(&seen);
                let number = {
                    let mut seen = seen.lock();
                    seen.push(Vec::new());
                    seen.len() - 1
                };
                thread::spawn(move || {
                    let _ = std::io::copy(&mut back_from, &mut back_to);
                    let _ = back_to.shutdown(Shutdown::Both);
                });
                thread::spawn(move || {
                    let mut piece = vec![0; 64 << 10];
                    while let Ok(read @ 1..) = from.read(&mut piece) {
                        // Recorded before it is passed on: who has the response finds the request.
                        seen.lock()[number].extend(&piece[..read]);
                        if to.write_all(&piece[..read]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(Shutdown::Both);
                });
            }
        });
        Recorder { sent }
    }

    /// Every request of each connection, read as RFC 9112 says for a request with a
    /// Content-Length or without a body; the gateway sends no other.
    fn requests(&self) -> Vec<Vec<Recorded>> {
        let connections = self.sent.lock().clone();
        connections.iter().map(|bytes| requests_of(bytes)).collect()
    }
}

fn requests_of(mut bytes: &[u8]) -> Vec<Recorded> {
    let mut requests = Vec::new();
    while !bytes.is_empty() {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        let head = String::from_utf8_lossy(&bytes[..end]);
        let field = |wanted: &str| -> Vec<&str> {
            let fields = head.lines().skip(1).filter_map(|line| line.split_once(": "));
            let named = fields.filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
            named.map(|(_, value)| value).collect()
        };
        assert!(field("Transfer-Encoding").is_empty() && field("Host").len() == 1, "{head}");
        let (lengths, ids) = (field("Content-Length"), field("X-Request-Id"));
        assert!(lengths.len() <= 1 && ids.len() == 1, "{head}");
        let length: usize = lengths.first().map_or(0, |length| length.parse().unwrap());
        let mut line = head.lines().next().unwrap().split(' ');
        let (method, target) = (line.next().unwrap(), line.next().unwrap());
        assert_eq!((line.next(), line.next()), (Some("HTTP/1.1"), None), "{head}");
        let body = bytes[end..end + length].to_vec();
        requests.push((method.to_owned(), target.to_owned(), ids[0].to_owned(), body));
        bytes = &bytes[end + length..];
    }
    requests
}

/// The status codes of the responses, in order, without 100 Continue.
fn statuses(answers: &str) -> Vec<u16> {
    let after = answers.split("HTTP/1.1 ").skip(1);
    // The text of a problem may contain "HTTP/1.1 ", too.
    let codes = after.filter_map(|answer| answer.get(..3)?.parse().ok());
    codes.filter(|code| *code >= 200).collect()
}

/// A request whose response is recognised by its id.
struct Canary {
    id: String,
    request: String,
}

impl Canary {
    fn new() -> Canary {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let id = format!("canary-{}", NEXT.fetch_add(1, Ordering::SeqCst));
        let request = format!(
            "GET /api/movies?title=sentinel&{id} HTTP/1.1\r\nHost: h\r\nX-Request-Id: {id}\r\n\r\n"
        );
        Canary { id, request }
    }

    /// Whether the last of these responses is the one to this request.
    fn is_answered_by(&self, answers: &str) -> bool {
        let last = answers.rsplit("HTTP/1.1 200 OK\r\n").next().unwrap_or_default();
        let lower = last.to_ascii_lowercase();
        lower.contains(&format!("x-request-id: {}\r\n", self.id))
            && last.contains(SENTINEL)
            && last.matches("\"id\":").count() == 1
    }
}

/// The corpus as requests for movies.
fn streams() -> Vec<(&'static str, Vec<u8>)> {
    let movies = |sent: Vec<u8>| -> Vec<u8> {
        let mut out = Vec::new();
        for (at, byte) in sent.iter().enumerate() {
            if *byte == b'/' && (sent[..at].ends_with(b" ") || sent[..at].ends_with(b":80")) {
                out.extend(b"/api/movies");
            }
            out.push(*byte);
        }
        out
    };
    corpus::streams().into_iter().map(|(name, sent, _)| (name, movies(sent))).collect()
}

/// Requests that carry another request in their bodies, or in bytes that a lenient server
/// would take for a body.
fn attacks() -> Vec<(String, String)> {
    let inner = [
        "DELETE /api/movies HTTP/1.1\r\nHost: h\r\n\r\n".to_owned(),
        "POST /api/movies HTTP/1.1\r\nHost: h\r\nContent-Length: 18\r\n\r\n{\"title\":\"marked\"}"
            .to_owned(),
    ];
    let mut attacks = Vec::new();
    for inner in &inner {
        let length = inner.len();
        let chunk = format!("{length:x}\r\n{inner}\r\n0\r\n\r\n");
        let chunked = "Transfer-Encoding: chunked\r\n";
        let mut add = |name: &str, line: &str, fields: &str, body: &str| {
            let sent = format!("{line} HTTP/1.1\r\nHost: h\r\n{fields}\r\n{body}");
            attacks.push((name.to_owned(), sent));
        };
        // Valid requests whose body is a request: they stay one request.
        let sized = format!("Content-Length: {length}\r\n");
        for line in [
            "POST /api/movies",
            "GET /api/movies",
            "HEAD /api/movies",
            "DELETE /api/movies/9",
            "OPTIONS /api/movies",
            "PUT /api/movies/1",
            "GET http://other/api/movies",
            "ODD /api/movies",
            "get /api/movies",
            "CONNECT /api/movies",
            "TRACE /api/movies",
        ] {
            add(&format!("a body on {line}"), line, &sized, inner);
            add(&format!("chunks on {line}"), line, chunked, &chunk);
        }
        let post = "POST /api/movies";
        for hop in [
            "content-length",
            "transfer-encoding",
            "content-length, transfer-encoding",
            "Content-Length, close",
            "host",
            "x-request-id",
            "x-forwarded-for, content-type",
            "\u{a0}content-length",
            "te, trailer, upgrade",
        ] {
            let fields = format!("Connection: {hop}\r\n");
            add(&format!("Connection: {hop}"), post, &format!("{fields}{sized}"), inner);
            add(&format!("Connection: {hop}, chunks"), post, &format!("{chunked}{fields}"), &chunk);
        }
        for (name, fields) in [
            (
                "Upgrade",
                "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\n",
            ),
            ("Upgrade to a socket", "Upgrade: websocket\r\nConnection: Upgrade\r\n"),
            ("Expect", "Expect: 100-continue\r\n"),
            ("an underscore", "Content_Length: 0\r\nTransfer_Encoding: chunked\r\n"),
            ("a Trailer field", "Trailer: Content-Length\r\nTE: trailers\r\n"),
            ("a method in a header", "X-HTTP-Method-Override: DELETE\r\n"),
            ("a target in a header", "X-Original-URL: /\r\nX-Rewrite-URL: /\r\n"),
        ] {
            add(name, post, &format!("{fields}{sized}"), inner);
            add(&format!("{name}, chunks"), post, &format!("{fields}{chunked}"), &chunk);
        }
        let end = "0\r\n\r\n";
        for coding in [
            "Transfer-Encoding: chunked",
            "Transfer-Encoding:chunked",
            "Transfer-Encoding: xchunked",
            "Transfer-Encoding: chunked, identity",
            "Transfer-Encoding: identity, chunked",
            "Transfer-Encoding: \"chunked\"",
            "Transfer-Encoding: chunked;q=1",
            "Transfer-Encoding: \x0bchunked",
            "Transfer-Encoding: \u{a0}chunked",
            "Transfer-Encoding: ch\u{212a}unked",
            "Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding:\r\n chunked",
            "Transfer-Encoding\r\n : chunked",
            "Transfer-Encoding : chunked",
            " Transfer-Encoding: chunked",
            "X: y\r Transfer-Encoding: chunked",
            "X: y\nTransfer-Encoding: chunked",
            "X: y\rTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r",
            "Transfer-Encoding: chunked\0",
            "Transfer Encoding: chunked",
            "tRANSFER-eNCODING: CHUNKED",
        ] {
            let fields = format!("Content-Length: {}\r\n{coding}\r\n", end.len() + length);
            add(&format!("CL.TE by {coding:?}"), post, &fields, &format!("{end}{inner}"));
            let fields = format!("{coding}\r\nContent-Length: 4\r\n");
            add(&format!("TE.CL by {coding:?}"), post, &fields, &chunk);
        }
        for lengths in [
            format!("Content-Length: 0\r\n{sized}"),
            format!("{sized}Content-Length: 0\r\n"),
            format!("Content-Length: 0, {length}\r\n"),
            format!("Content-Length: +{length}\r\n"),
            format!("Content-Length: {length} 0\r\n"),
            format!("Content-Length: 0x{length:x}\r\n"),
            format!("Content-Length: {length}.0\r\n"),
            format!("Content-Length : {length}\r\n"),
            format!(" Content-Length: {length}\r\n"),
            format!("Content-Length:\r\n {length}\r\n"),
            format!("Content-Length: {length}\nX: y\r\n"),
            format!("Content-Length: -{length}\r\n"),
            format!("Content-Length: \u{661}\r\n{sized}"),
            "Content-Length: 18446744073709551616\r\n".to_owned(),
        ] {
            add(&format!("{lengths:?}"), post, &lengths, inner);
        }
        for size in [
            format!("0x{length:x}"),
            format!("+{length:x}"),
            format!("-{length:x}"),
            format!(" {length:x}"),
            format!("{length:x} "),
            format!("{length:x}\t"),
            format!("{length:x}h"),
            format!("{length:x};\nx"),
            format!("{length:x};a=\r"),
            format!("{length:x}\n"),
            format!("{length:x}_"),
            format!("1{:0>16}", format!("{length:x}")),
            format!("{:0>300}", format!("{length:x}")),
            String::new(),
        ] {
            let body = format!("{size}\r\n{inner}\r\n0\r\n\r\n");
            add(&format!("a chunk of {size:?}"), post, chunked, &body);
        }
        for (name, body) in [
            ("an extension", format!("{length:x};a=\"b;c\"\r\n{inner}\r\n0\r\n\r\n")),
            ("leading zeros", format!("{:0>60}\r\n{inner}\r\n0\r\n\r\n", format!("{length:x}"))),
            ("a chunk without its end", format!("{length:x}\r\n{inner}0\r\n\r\n")),
            ("a chunk with another end", format!("{length:x}\r\n{inner}xx0\r\n\r\n")),
            ("trailers", format!("1\r\n{{\r\n0\r\nContent-Length: {length}\r\nHost: x\r\n\r\n")),
            ("a request as trailer", format!("1\r\n{{\r\n0\r\nX: y\r\n {inner}\r\n")),
            ("a bare end", format!("{length:x}\r\n{inner}\n0\n\n")),
        ] {
            add(name, post, chunked, &body);
        }
        add("two Hosts", post, &format!("Host: g\r\n{sized}"), inner);
        add("no space", "POST\t/api/movies", &sized, inner);
        add("two spaces", "POST  /api/movies", &sized, inner);
        add("a space in the target", "POST /api/movies x", &sized, inner);
        add("a version in the target", "POST /api/movies?HTTP/1.1%0d%0a", &sized, inner);
        let old = format!("POST /api/movies HTTP/1.0\r\nConnection: keep-alive\r\n{sized}\r\n");
        attacks.push(("HTTP/1.0".to_owned(), format!("{old}{inner}")));
        let none = format!("POST /api/movies HTTP/0.9\r\n{sized}\r\n{inner}");
        attacks.push(("HTTP/0.9".to_owned(), none));
    }
    attacks
}

/// Sends every attack to `target`, each followed by a canary in the same stream and by one on a
/// connection of its own; returns what was smuggled or answered wrongly.
fn attack(fixture: &InventoryFixture, target: SocketAddr) -> Vec<String> {
    let mut findings = Vec::new();
    for (name, sent) in attacks() {
        let (first, second) = (Canary::new(), Canary::new());
        let answers = raw(target, format!("{sent}{}", first.request).as_bytes());
        let statuses = statuses(&answers);
        // The response to the attack, and that to the canary unless the attack was rejected.
        let valid = match statuses.as_slice() {
            [rejected] => *rejected >= 400 || sent.contains("close"),
            [_, 200] => first.is_answered_by(&answers),
            _ => false,
        };
        if !valid {
            findings.push(format!("{name}: {answers}"));
        }
        let answer = raw(target, second.request.as_bytes());
        if !second.is_answered_by(&answer) {
            findings.push(format!("{name}: the next client got {answer}"));
        }
        if fixture.titles() != [SENTINEL] {
            findings.push(format!("{name}: the movies are {:?}", fixture.titles()));
            break;
        }
    }
    findings
}

/// `METHOD path status` and id of each line of a service's log about movies.
fn logged(service: &Service) -> BTreeSet<String> {
    let log = service.log();
    let lines = log.lines().filter(|line| line.contains(" /api/movies"));
    lines
        .filter_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let path = words.iter().position(|word| word.starts_with("/api/movies"))?;
            let id = words.iter().find(|word| word.starts_with("id="))?;
            Some(format!("{} {} {} {id}", words[path - 1], words[path], words[path + 1]))
        })
        .collect()
}

/// Checks that inventory has read, of the requests that came from the gateway, exactly those that
/// the gateway has read.
fn assert_same_requests_read(gateway: &Service, fixture: &InventoryFixture, recorder: &Recorder) {
    let connections = recorder.requests();
    let requests: Vec<_> = connections.iter().flatten().collect();
    let recorded: BTreeSet<&str> = requests.iter().map(|(_, _, id, _)| id.as_str()).collect();
    assert_eq!(recorded.len(), requests.len(), "one was sent twice");
    // A service logs a request after its response.
    let log_of = |service: &Service, name: &str| {
        eventually(format!("all that was sent is in {name}'s log"), 20, || {
            let lines = logged(service);
            let ids = lines.iter().filter_map(|line| line.split("id=").nth(1)).collect();
            recorded.is_subset(&ids).then(|| lines.clone())
        })
    };
    let by_gateway = log_of(gateway, "the gateway");
    let by_inventory = log_of(&fixture.inventory, "inventory");
    let through: Vec<&String> = by_inventory
        .iter()
        .filter(|line| line.split("id=").nth(1).is_some_and(|id| recorded.contains(id)))
        .collect();
    assert_eq!(through.len(), requests.len(), "inventory read another number of requests");
    for line in through {
        assert!(by_gateway.contains(line), "inventory read {line}, and the gateway did not");
    }
    // Each connection carried many requests: bytes left over by one would have become a part of
    // the next.
    assert!(connections.len() * 4 < requests.len(), "{} connections", connections.len());
}

#[test]
fn a_stream_gets_the_same_responses_through_the_gateway_as_from_inventory() {
    let fixture = InventoryFixture::start();
    let (gateway, recorder) = fixture.gateway();
    for (name, sent) in streams() {
        for pipelined in [false, true] {
            let (canary, after) = (Canary::new(), Canary::new());
            let tail = if pipelined { canary.request.as_bytes() } else { b"" };
            let sent = [&sent, tail].concat();
            let (direct, through) =
                (raw(fixture.inventory_address(), &sent), raw(fixture.gateway_address(), &sent));
            let (direct, through) = (statuses(&direct), statuses(&through));
            let (last, before) = through.split_last().unwrap();
            let same = through == direct
                || *last >= 400
                    && direct.get(..before.len()) == Some(before)
                    && direct
                        .get(before.len())
                        .is_some_and(|status| *last == 431 || status / 100 == last / 100);
            assert!(same, "{name}: {through:?} through the gateway, {direct:?} from inventory");
            let answer = raw(fixture.gateway_address(), after.request.as_bytes());
            assert!(after.is_answered_by(&answer), "{name}: the next client got {answer}");
        }
    }
    assert_same_requests_read(&gateway, &fixture, &recorder);
    assert_eq!(fixture.titles(), [SENTINEL]);
}

#[test]
fn no_request_is_smuggled_through_the_gateway() {
    let fixture = InventoryFixture::start();
    let (gateway, recorder) = fixture.gateway();
    let before = fixture.requests_counted("");
    let findings = attack(&fixture, fixture.gateway_address());
    assert!(findings.is_empty(), "{}", findings.join("\n"));
    assert_same_requests_read(&gateway, &fixture, &recorder);
    // `attack` itself reads the titles once after each attack.
    let forwarded: usize = recorder.requests().iter().map(Vec::len).sum();
    let expected = before + (forwarded + attacks().len()) as u64;
    // A service counts a request after its response.
    eventually("inventory has counted all requests", 20, || {
        (fixture.requests_counted("") >= expected).then_some(())
    });
    assert_eq!(fixture.requests_counted(""), expected);
    assert_eq!(fixture.requests_counted("method=\"-\""), 0, "inventory got a malformed request");
}

#[test]
fn the_same_attacks_succeed_through_a_proxy_that_trusts_content_length() {
    let fixture = InventoryFixture::start();
    let proxy = lenient_proxy(fixture.gateway_address(), fixture.inventory_address());
    let findings = attack(&fixture, proxy);
    assert!(!findings.is_empty(), "no attack had an effect");
    let smuggled = findings.iter().any(|finding| finding.contains("the movies are"));
    assert!(smuggled, "nothing was smuggled: {findings:?}");
}

/// A proxy that uses Content-Length and no other framing, and drops the fields that `Connection`
/// names. It has one connection to `upstream` for all clients.
fn lenient_proxy(listen: SocketAddr, upstream: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(listen).unwrap();
    thread::spawn(move || {
        let mut pooled = TcpStream::connect(upstream).unwrap();
        for client in listener.incoming() {
            let mut client = client.unwrap();
            while let Some((head, body)) = read_message(&mut client) {
                let dropped = field(&head, "connection").unwrap_or_default().to_ascii_lowercase();
                let kept = head.lines().filter(|line| {
                    let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
                    name.is_empty() || name != "connection" && !dropped.contains(&name)
                });
                let head: String = kept.map(|line| format!("{line}\r\n")).collect();
                let sent = [head.as_bytes(), &body].concat();
                let answer = pooled.write_all(&sent).ok().and_then(|()| read_message(&mut pooled));
                let Some((head, body)) = answer else {
                    pooled = TcpStream::connect(upstream).unwrap();
                    break;
                };
                if head.to_ascii_lowercase().contains("connection: close") {
                    pooled = TcpStream::connect(upstream).unwrap();
                }
                let _ = client.write_all(&[head.as_bytes(), &body].concat());
            }
        }
    });
    listen
}

/// A head, and as many bytes as its Content-Length announces.
fn read_message(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let length = field(&head, "content-length").and_then(|length| length.parse().ok());
    let mut body = vec![0; length.unwrap_or(0).min(1 << 20)];
    stream.read_exact(&mut body).ok()?;
    Some((head, body))
}

fn field(head: &str, wanted: &str) -> Option<String> {
    let fields = head.lines().filter_map(|line| line.split_once(':'));
    let mut named = fields.filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
    named.next().map(|(_, value)| value.trim().to_owned())
}
