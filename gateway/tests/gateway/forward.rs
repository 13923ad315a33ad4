//! Forwarding, with a fake inventory that fails on demand, and the routes that need none.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::eventually;
use harness::{Service, Stack, agent, raw};

/// Stands where inventory would: hands every request it reads to `answer`, which
/// writes what it likes; `false` ends the connection.
pub(crate) struct Upstream {
    requests: Arc<Mutex<Vec<String>>>,
}

impl Upstream {
    pub(crate) fn start<F>(stack: &Stack, answer: F) -> Upstream
    where
        F: Fn(&mut TcpStream, &str) -> bool + Send + Sync + 'static,
    {
        let listener = TcpListener::bind((stack.address, 8080)).unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer) = (Arc::clone(&requests), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    while let Some(request) = read_request(&mut stream) {
                        // Readiness is asked too; it is no concern of these tests.
                        if !request.starts_with("GET /health") {
                            seen.lock().unwrap().push(request.clone());
                        }
                        if !answer(&mut stream, &request) {
                            return;
                        }
                    }
                });
            }
        });
        Upstream { requests }
    }

    pub(crate) fn seen(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        bytes.push(byte[0]);
    }
    // One character a byte, so that any header can be compared.
    let head: String = bytes.iter().map(|byte| char::from(*byte)).collect();
    let length = head.to_ascii_lowercase();
    let length = length.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).ok()?;
    Some(head + &String::from_utf8(body).unwrap())
}

/// The text as the fake upstream records it.
fn one_char_a_byte(text: &str) -> String {
    text.bytes().map(char::from).collect()
}

pub(crate) fn ok(stream: &mut TcpStream, _: &str) -> bool {
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").is_ok()
}

/// A gateway that forwards to an address where a test puts what it wants.
pub(crate) fn gateway(adjust: impl Fn(&mut Stack)) -> (Stack, Service) {
    let mut stack = Stack::new();
    // No broker listens there: these tests need none.
    stack.set("RABBITMQ_HOST", stack.address);
    stack.set("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", 500);
    stack.set("GATEWAY_UPSTREAM_READ_TIMEOUT_MS", 500);
    adjust(&mut stack);
    let service = stack.start_and_wait("gateway");
    (stack, service)
}

pub(crate) fn status_of(answer: &str) -> &str {
    answer.get(9..12).unwrap_or(answer)
}

#[test]
fn a_request_is_forwarded_unchanged_without_hop_by_hop_headers() {
    let (stack, _gateway) = gateway(|_| ());
    let upstream = Upstream::start(&stack, ok);
    let sent = "PUT /api/movies/a%2Fb//../ü?q=%41&q=\\ HTTP/1.1\r\nHost: store.example\r\n\
        X-Twice: 1\r\nX-Twice: 2\r\nIf-Match: \"7\"\r\nX-Request-Id: my-id\r\nKeep-Alive: 5\r\n\
        Connection: close, X-Hop\r\nX-Hop: secret\r\nX-Forwarded-For: 10.9.8.7\r\n\
        Content-Length: 5\r\n\r\n{ü}!";
    let answer = raw(stack.address, sent);
    assert_eq!(status_of(&answer), "200", "{answer}");
    let seen = upstream.seen().remove(0);
    let start = one_char_a_byte("PUT /api/movies/a%2Fb//../ü?q=%41&q=\\ HTTP/1.1\r\n");
    assert!(seen.starts_with(&start), "{seen}");
    assert!(seen.ends_with("\r\n\r\n{ü}!"), "{seen}");
    let lower = seen.to_ascii_lowercase();
    for there in [
        "x-twice: 1\r\n",
        "x-twice: 2\r\n",
        "if-match: \"7\"\r\n",
        "x-request-id: my-id\r\n",
        "x-forwarded-for: 127.",
        "x-forwarded-proto: http\r\n",
        "x-forwarded-host: store.example\r\n",
    ] {
        assert!(lower.contains(there), "{there} is not in {lower}");
    }
    for gone in ["x-hop", "keep-alive", "connection", "user-agent", "accept"] {
        assert!(!lower.contains(&format!("\n{gone}:")), "{gone} is in {lower}");
    }
}

#[test]
fn the_largest_head_and_body_are_forwarded() {
    let (stack, _gateway) = gateway(|_| ());
    let upstream = Upstream::start(&stack, ok);
    let (header, body) = ("x".repeat(15 << 10), "y".repeat(256 << 10));
    let sent = format!(
        "POST /api/movies HTTP/1.1\r\nHost: h\r\nX-Long: {header}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = raw(stack.address, &sent);
    assert_eq!(status_of(&answer), "200", "{answer}");
    let seen = upstream.seen().remove(0);
    assert!(seen.contains(&header) && seen.ends_with(&body));
}

#[test]
fn a_response_is_passed_back_unchanged() {
    let (stack, _gateway) = gateway(|_| ());
    Upstream::start(&stack, |stream, _| {
        let answer = "HTTP/1.1 418 Teapot\r\nX-A: 1\r\nX-A: 2\r\nDate: then\r\nX-Request-Id: theirs\r\n\
            Location: /api/movies/1\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        stream.write_all(answer.as_bytes()).is_ok()
    });
    let answer = raw(stack.address, "GET /api/movies HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(status_of(&answer), "418", "{answer}");
    let lower = answer.to_ascii_lowercase();
    for there in
        ["x-a: 1\r\n", "x-a: 2\r\n", "location: /api/movies/1\r\n", "content-length: 3\r\n"]
    {
        assert!(lower.contains(there), "{there} is not in {lower}");
    }
    assert_eq!(lower.matches("\ndate:").count(), 1, "{lower}");
    assert_eq!(lower.matches("\nx-request-id:").count(), 1, "{lower}");
    assert!(answer.ends_with("\r\n\r\nabc"), "{answer}");
}

#[test]
fn head_keeps_the_length_that_a_get_would_have() {
    let (stack, _gateway) = gateway(|_| ());
    Upstream::start(&stack, |stream, _| {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n").is_ok()
    });
    let answer = raw(stack.address, "HEAD /api/movies HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(answer.contains("Content-Length: 1234\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\n"), "{answer}");
}

#[test]
fn bodies_on_get_and_delete_are_passed_on_too() {
    let (stack, _gateway) = gateway(|_| ());
    let upstream = Upstream::start(&stack, ok);
    for method in ["GET", "DELETE"] {
        let sent =
            format!("{method} /api/movies HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{{}}");
        assert_eq!(status_of(&raw(stack.address, &sent)), "200");
        assert!(upstream.seen().last().unwrap().ends_with("\r\n\r\n{}"));
    }
}

#[test]
fn an_unreachable_slow_or_malformed_upstream_is_503_504_or_502() {
    // Each case must reach it, however many have failed before.
    let (stack, _gateway) = gateway(|stack| {
        stack.set("GATEWAY_BREAKER_FAILURE_THRESHOLD", 0);
    });
    let get = |path: &str| raw(stack.address, &format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n"));
    assert_eq!(status_of(&get("/api/movies")), "503", "no inventory listens");

    Upstream::start(&stack, |stream, request| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        let (answer, stalls): (&[u8], bool) = match path {
            "/api/movies/silent" => (b"", true),
            "/api/movies/slow-body" => (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", true),
            "/api/movies/garbage" => (b"%&/()=\r\n\r\n", false),
            "/api/movies/two-lengths" => {
                (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", false)
            }
            "/api/movies/short" => (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", false),
            "/api/movies/torn" => {
                (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc", false)
            }
            _ => (b"", false),
        };
        let _ = stream.write_all(answer);
        if stalls {
            // Until the gateway has had enough.
            let _ = stream.read(&mut [0]);
        }
        false
    });
    for (case, status) in [
        ("silent", "504"),
        ("slow-body", "504"),
        ("garbage", "502"),
        ("short", "502"),
        ("torn", "502"),
        ("hangs-up", "503"),
    ] {
        let begun = Instant::now();
        let answer = get(&format!("/api/movies/{case}"));
        assert_eq!(status_of(&answer), status, "{case}: {answer}");
        assert!(answer.contains("application/problem+json"), "{case}: {answer}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{case} took {:?}", begun.elapsed());
    }
}

#[test]
fn a_get_whose_connection_was_lost_is_sent_once_more_and_a_post_never() {
    let (stack, _gateway) = gateway(|_| ());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let upstream = Upstream::start(&stack, move |stream, request| {
        // Every odd question is read and left without an answer.
        let health = request.starts_with("GET /health");
        (health || count.fetch_add(1, Ordering::SeqCst) % 2 == 1) && ok(stream, request)
    });
    let answer = raw(stack.address, "GET /api/movies HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(status_of(&answer), "200", "{answer}");
    assert_eq!(upstream.seen().len(), 2);
    let post = "POST /api/movies HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}";
    let answer = raw(stack.address, post);
    assert_eq!(status_of(&answer), "503", "{answer}");
    assert_eq!(upstream.seen().len(), 3, "the POST was sent again");
}

#[test]
fn a_slow_inventory_leaves_threads_for_other_routes() {
    let (stack, _gateway) = gateway(|stack| {
        stack.set("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", 30_000);
        stack.set("GATEWAY_UPSTREAM_MAX_IN_FLIGHT", 4);
        stack.set("GATEWAY_HTTP_MAX_CONNECTIONS", 8);
    });
    let upstream = Upstream::start(&stack, |stream, _| {
        let _ = stream.read(&mut [0]);
        false
    });
    let waiting: Vec<TcpStream> = (0..4)
        .map(|_| {
            let mut stream = TcpStream::connect((stack.address, 3000)).unwrap();
            stream.write_all(b"GET /api/movies HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
            stream
        })
        .collect();
    eventually("four wait", 10, || (upstream.seen().len() == 4).then_some(()));
    let begun = Instant::now();
    let refused = raw(stack.address, "GET /api/movies HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(status_of(&refused), "503", "{refused}");
    assert!(refused.contains("Retry-After: 1"), "{refused}");
    let health = raw(stack.address, "GET /health HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(status_of(&health), "200", "{health}");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    drop(waiting);
}

#[test]
fn connections_opened_by_a_burst_are_closed_again() {
    const BURST: usize = 140;
    let (stack, gateway) = gateway(|stack| {
        stack.set("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", 30_000);
    });
    let descriptors =
        || std::fs::read_dir(format!("/proc/{}/fd", gateway.child.id())).unwrap().count();
    let before = descriptors();
    let all = Barrier::new(BURST);
    Upstream::start(&stack, move |stream, request| {
        if !request.starts_with("GET /health") {
            all.wait();
        }
        ok(stream, request)
    });
    thread::scope(|scope| {
        for _ in 0..BURST {
            let ask = || raw(stack.address, "GET /api/movies HTTP/1.0\r\nHost: h\r\n\r\n");
            scope.spawn(move || assert_eq!(status_of(&ask()), "200"));
        }
    });
    eventually("most are closed", 10, || (descriptors() <= before + 64).then_some(()));
}

#[test]
fn a_large_response_is_streamed_and_one_that_breaks_off_is_broken_for_the_client() {
    const SIZE: usize = 40 << 20;
    let (stack, gateway) = gateway(|stack| {
        stack.set("GATEWAY_UPSTREAM_READ_TIMEOUT_MS", 30_000);
    });
    Upstream::start(&stack, |stream, request| {
        let torn = request.contains("torn");
        let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n");
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..if torn { 20 } else { SIZE >> 20 } {
            let _ = stream.write_all(&piece);
        }
        !torn
    });
    let mut answer = agent().get(stack.url("/api/movies")).call().unwrap();
    let mut reader = answer.body_mut().as_reader();
    let (mut total, mut peak) = (0, 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer).unwrap() {
            0 => break,
            read => total += read,
        }
        peak = peak.max(resident_kb(gateway.child.id()));
    }
    assert_eq!(total, SIZE);
    assert!(peak < 40 << 10, "the gateway took {peak} kB for an answer of {SIZE} bytes");

    let mut torn = agent().get(stack.url("/api/movies/torn")).call().unwrap();
    assert!(torn.body_mut().as_reader().read_to_end(&mut Vec::new()).is_err());
}

/// Memory in use, as the kernel counts it.
fn resident_kb(process: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// A response as the client gets it, one character a byte.
fn raw_bytes(stack: &Stack, sent: &[u8]) -> String {
    let mut stream = TcpStream::connect((stack.address, 3000)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(sent).unwrap();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

#[test]
fn header_bytes_above_0x7f_are_passed_on_in_both_directions() {
    let (stack, _gateway) = gateway(|_| ());
    let upstream = Upstream::start(&stack, |stream, _| {
        let answer = b"HTTP/1.1 200 OK\r\nX-Name: caf\xe9 \xc3\xa9\r\nContent-Length: 2\r\n\r\nok";
        stream.write_all(answer).is_ok()
    });
    let sent = b"GET /api/movies HTTP/1.1\r\nHost: h\r\nReferer: /caf\xe9\r\nUser-Agent: \xff \xc3\xa9\r\n\r\n";
    let answer = raw_bytes(&stack, sent);
    assert_eq!(status_of(&answer), "200", "{answer}");
    assert!(
        answer.to_lowercase().contains("x-name: caf\u{e9} \u{e3}\u{a9}")
            || answer.contains("caf\u{e9} \u{c3}\u{a9}"),
        "{answer}"
    );
    let seen = upstream.seen().pop().unwrap();
    assert!(seen.contains("/caf\u{e9}\r\n") && seen.contains("\u{ff} \u{c3}\u{a9}\r\n"), "{seen}");
}

#[test]
fn an_encoded_path_is_routed_decoded_and_forwarded_as_it_was_sent() {
    let (stack, _gateway) = gateway(|_| ());
    let upstream = Upstream::start(&stack, ok);
    for target in ["/api/%6Dovies/%31", "HTTP://h/api/movies", "http://h/%61pi/movies?a=%41"] {
        let answer = raw(stack.address, &format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n"));
        assert_eq!(status_of(&answer), "200", "{target}: {answer}");
        let seen = upstream.seen().pop().unwrap();
        let path = target.split_once("//h").map_or(target, |(_, path)| path);
        assert!(seen.starts_with(&format!("GET {path} HTTP/1.1\r\n")), "{seen}");
    }
}

#[test]
fn a_head_response_without_a_length_gets_none() {
    let (stack, _gateway) = gateway(|_| ());
    Upstream::start(&stack, |stream, _| {
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").is_ok()
    });
    let answer = raw(stack.address, "HEAD /api/movies HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(status_of(&answer), "200", "{answer}");
    assert!(!answer.to_ascii_lowercase().contains("content-length"), "{answer}");
}

#[test]
fn a_second_attempt_gets_only_the_rest_of_the_deadline() {
    const DEADLINE: Duration = Duration::from_millis(4000);
    let (stack, _gateway) = gateway(|stack| {
        stack.set("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", DEADLINE.as_millis());
        stack.set("GATEWAY_UPSTREAM_READ_TIMEOUT_MS", DEADLINE.as_millis());
    });
    // Each connection is closed without a response after three fifths of the deadline.
    let upstream = Upstream::start(&stack, |_, request| {
        if !request.starts_with("GET /health") {
            thread::park_timeout(DEADLINE * 3 / 5);
        }
        false
    });
    let started_at = Instant::now();
    let answer = raw(stack.address, "GET /api/movies HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(status_of(&answer), "504", "{answer}");
    let elapsed = started_at.elapsed();
    assert!(
        elapsed < DEADLINE * 7 / 5,
        "{elapsed:?}: the second attempt had a deadline of its own"
    );
    assert_eq!(upstream.seen().len(), 2);
}

#[test]
fn the_root_is_the_documentation_for_a_browser_and_links_for_a_program() {
    let (stack, _gateway) = gateway(|_| ());
    let get = |accept: &str| {
        raw(stack.address, &format!("GET / HTTP/1.1\r\nHost: h\r\nAccept: {accept}\r\n\r\n"))
    };
    let browser = get("text/html,application/xhtml+xml");
    assert_eq!(status_of(&browser), "302", "{browser}");
    assert!(browser.contains("\r\nLocation: /docs\r\n"), "{browser}");
    let program = get("*/*");
    assert_eq!(status_of(&program), "200", "{program}");
    assert!(program.contains("\"name\":\"matinee\"") && program.contains("/openapi.json"));
}

#[test]
fn every_response_says_how_it_may_be_cached_and_forbids_sniffing() {
    let (stack, _gateway) = gateway(|_| ());
    Upstream::start(&stack, |stream, _| {
        let answer = "HTTP/1.1 200 OK\r\nCache-Control: no-cache\r\nContent-Length: 2\r\n\r\nok";
        stream.write_all(answer.as_bytes()).is_ok()
    });
    for (target, expected) in [
        ("/health", "no-store"),
        ("/health/ready", "no-store"),
        ("/nothing", "no-store"),
        ("/docs", "no-cache"),
        ("/openapi.json", "no-cache"),
        ("/api/movies", "no-cache"),
    ] {
        let answer = raw(stack.address, &format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n"));
        let head = answer.split("\r\n\r\n").next().unwrap().to_ascii_lowercase();
        let fields = head.matches("cache-control: ").count();
        assert!(fields == 1 && head.contains(&format!("cache-control: {expected}")), "{head}");
        assert_eq!(head.matches("x-content-type-options: nosniff").count(), 1, "{head}");
    }
}

#[test]
fn a_page_of_a_listed_origin_may_use_the_api_and_read_errors() {
    let (stack, _gateway) = gateway(|stack| {
        stack.set("GATEWAY_CORS_ORIGINS", "https://shop.example");
    });
    let send = |line: &str, origin: &str| {
        let more =
            "Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: content-type";
        raw(
            stack.address,
            &format!("{line} HTTP/1.1\r\nHost: h\r\nOrigin: {origin}\r\n{more}\r\n\r\n"),
        )
    };
    let allowed = "Access-Control-Allow-Origin: https://shop.example";
    let preflight = send("OPTIONS /api/movies/1", "https://shop.example");
    assert_eq!(status_of(&preflight), "204", "{preflight}");
    assert!(preflight.contains(allowed) && preflight.contains("Access-Control-Allow-Methods"));
    for line in ["GET /nothing", "GET /api/movies", "POST /health"] {
        let answer = send(line, "https://shop.example");
        assert!(answer.contains(allowed), "{line}: {answer}");
        assert!(answer.contains("Access-Control-Expose-Headers: Location, ETag"), "{answer}");
        let other = send(line, "https://other.example");
        assert!(!other.contains("Access-Control"), "{line}: {other}");
        assert!(other.contains("Vary: Origin"), "{line}: {other}");
    }
}
