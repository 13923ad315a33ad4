//! What keeps a failing inventory, or one client, from hurting the others.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

use chassis::testing::{TestDb, eventually, test_var};
use socket2::{Domain, Socket, Type};

use crate::forward::{Upstream, gateway, ok, status_of};
use harness::{Service, Stack, agent, raw};

const GET: &str = "GET /api/movies HTTP/1.1\r\nHost: h\r\n\r\n";
const POST: &str = "POST /api/movies HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}";
const HEALTH: &str = "GET /health HTTP/1.1\r\nHost: h\r\n\r\n";

/// What comes back to a client at another loopback address.
fn raw_from(source: [u8; 4], stack: &Stack, sent: &str) -> String {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(IpAddr::from(source), 0).into()).unwrap();
    socket.connect(&SocketAddr::new(stack.address.into(), 3000).into()).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(sent.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The value of a field of an answer.
fn field<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    let lines = answer.split("\r\n\r\n").next()?.lines();
    lines.filter_map(|line| line.split_once(": ")).find(|(key, _)| *key == name).map(|(_, v)| v)
}

fn metric(stack: &Stack, series: &str) -> u64 {
    let url = format!("http://{}:9301/metrics", stack.address);
    let text = agent().get(url).call().unwrap().body_mut().read_to_string().unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(series)).unwrap_or_default();
    line.trim().parse().unwrap_or_else(|_| panic!("{series} is not in {text}"))
}

/// How often a service's log says something; a line comes a moment after what it tells of.
fn said(service: &Service, what: &str) -> usize {
    eventually(format!("the log says {what:?}"), 20, || {
        Some(service.log().matches(what).count()).filter(|times| *times > 0)
    })
}

fn circuit_breaker_state(stack: &Stack) -> u64 {
    metric(stack, "circuit_breaker_state{upstream=\"inventory\"}")
}

/// 200 requests of eight clients to an inventory that hangs up on every one, when two may
/// wait for it at once; how many of them it got to see.
fn asked_of_a_broken_inventory(stack: &Stack) -> usize {
    let upstream = Upstream::start(stack, |_, _| false);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..25 {
                    let answer = raw(stack.address, POST);
                    assert_eq!(status_of(&answer), "503", "{answer}");
                    assert!(answer.contains("application/problem+json"), "{answer}");
                    let wait: u64 = field(&answer, "Retry-After").unwrap().parse().unwrap();
                    assert!((1..=600).contains(&wait), "{answer}");
                }
            });
        }
    });
    upstream.seen().len()
}

#[test]
fn an_upstream_that_keeps_failing_is_called_only_until_the_breaker_opens() {
    let (stack, service) = gateway(|stack| {
        stack.set("GATEWAY_UPSTREAM_MAX_IN_FLIGHT", 2);
        stack.set("GATEWAY_BREAKER_OPEN_MS", 600_000);
        stack.set("GATEWAY_BREAKER_MAX_OPEN_MS", 600_000);
    });
    let asked = asked_of_a_broken_inventory(&stack);
    // Four have failed and two more are sent; requests that waited for a permit are rejected.
    assert!((5..=6).contains(&asked), "asked {asked} times");
    assert_eq!(circuit_breaker_state(&stack), 2);
    let state = |name: &str| {
        format!("circuit_breaker_transitions_total{{state=\"{name}\",upstream=\"inventory\"}}")
    };
    assert_eq!(metric(&stack, &state("open")), 1);
    assert_eq!(metric(&stack, &state("half_open")), 0);
    let refused = metric(&stack, "circuit_breaker_rejected_total{upstream=\"inventory\"}");
    assert!(refused >= 150, "only {refused} were refused by the breaker");
    assert_eq!(said(&service, "inventory fails: no requests are sent to it for"), 1);
    // Others do not notice.
    assert_eq!(status_of(&raw(stack.address, HEALTH)), "200");
}

#[test]
fn without_the_breaker_a_failing_upstream_is_called_by_every_request() {
    let (stack, _gateway) = gateway(|stack| {
        stack.set("GATEWAY_UPSTREAM_MAX_IN_FLIGHT", 2);
        stack.set("GATEWAY_BREAKER_FAILURE_THRESHOLD", 0);
    });
    let asked = asked_of_a_broken_inventory(&stack);
    assert!(asked > 100, "asked {asked} times: the test above proves nothing");
    assert_eq!(circuit_breaker_state(&stack), 0);
}

/// How the inventory of a test behaves at the moment.
const FAILS: u8 = 0;
const HOLDS: u8 = 1;
const WORKS: u8 = 2;

/// An upstream that fails until another behaviour is set; [`HOLDS`] keeps the client waiting until
/// the behaviour changes, or the client has gone.
fn moody(stack: &Stack) -> (Upstream, Arc<AtomicU8>) {
    let mood = Arc::new(AtomicU8::new(FAILS));
    let behaviour = Arc::clone(&mood);
    let upstream = Upstream::start(stack, move |stream, request| {
        if request.starts_with("GET /health") {
            return false;
        }
        stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        while behaviour.load(Ordering::SeqCst) == HOLDS {
            if matches!(stream.read(&mut [0]), Ok(0)) {
                return false;
            }
        }
        stream.set_read_timeout(None).unwrap();
        behaviour.load(Ordering::SeqCst) == WORKS && ok(stream, request)
    });
    (upstream, mood)
}

fn open_the_breaker(stack: &Stack) {
    eventually("the breaker opens", 20, || {
        raw(stack.address, POST);
        (circuit_breaker_state(stack) == 2).then_some(())
    });
}

#[test]
fn one_trial_request_closes_the_breaker_when_the_upstream_answers_again() {
    let (stack, service) = gateway(|stack| {
        stack.set("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", 60_000);
        stack.set("GATEWAY_BREAKER_OPEN_MS", 100);
        stack.set("GATEWAY_BREAKER_MAX_OPEN_MS", 200);
    });
    let (upstream, mood) = moody(&stack);
    open_the_breaker(&stack);
    let before = upstream.seen().len();
    mood.store(HOLDS, Ordering::SeqCst);
    thread::scope(|scope| {
        let trial = scope.spawn(|| {
            eventually("a trial is let in", 20, || {
                Some(raw(stack.address, GET)).filter(|answer| status_of(answer) == "200")
            })
        });
        eventually("inventory sees the trial", 20, || {
            (upstream.seen().len() > before).then_some(())
        });
        assert_eq!(circuit_breaker_state(&stack), 1);
        for _ in 0..10 {
            let refused = raw(stack.address, GET);
            assert_eq!(status_of(&refused), "503", "{refused}");
            assert_eq!(field(&refused, "Retry-After"), Some("1"));
        }
        assert_eq!(upstream.seen().len(), before + 1, "more than one try at once");
        mood.store(WORKS, Ordering::SeqCst);
        trial.join().unwrap();
    });
    assert_eq!(circuit_breaker_state(&stack), 0);
    for request in [GET, POST] {
        assert_eq!(status_of(&raw(stack.address, request)), "200");
    }
    assert_eq!(said(&service, "inventory answers again"), 1);
}

#[test]
fn a_trial_whose_client_disconnects_does_not_block_the_next_trial() {
    let (stack, _gateway) = gateway(|stack| {
        stack.set("GATEWAY_BREAKER_OPEN_MS", 100);
        stack.set("GATEWAY_BREAKER_MAX_OPEN_MS", 200);
    });
    let (upstream, mood) = moody(&stack);
    open_the_breaker(&stack);
    let before = upstream.seen().len();
    mood.store(HOLDS, Ordering::SeqCst);
    let client = eventually("inventory sees the trial", 20, || {
        let mut client = TcpStream::connect((stack.address, 3000)).unwrap();
        client.write_all(GET.as_bytes()).unwrap();
        // Either the refusal comes, or the trial has begun.
        client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let _ = client.read(&mut [0]);
        (upstream.seen().len() > before).then_some(client)
    });
    drop(client);
    eventually("the trial has failed", 20, || (circuit_breaker_state(&stack) == 2).then_some(()));
    mood.store(WORKS, Ordering::SeqCst);
    eventually("others are let in", 20, || {
        Some(raw(stack.address, GET)).filter(|answer| status_of(answer) == "200")
    });
}

#[test]
fn http_errors_of_the_upstream_do_not_open_the_breaker() {
    let (stack, _gateway) = gateway(|_| ());
    let upstream = Upstream::start(&stack, |stream, request| {
        let status = request.split(['/', ' ']).nth(4).unwrap_or("200");
        write!(stream, "HTTP/1.1 {status} Whatever\r\nContent-Length: 0\r\n\r\n").is_ok()
    });
    let mut asked = 0;
    for status in ["400", "404", "500", "502", "503", "504"] {
        for _ in 0..6 {
            let get = format!("GET /api/movies/{status} HTTP/1.1\r\nHost: h\r\n\r\n");
            assert_eq!(status_of(&raw(stack.address, &get)), status);
            asked += 1;
        }
    }
    // What cannot be passed on is the client's mistake.
    for _ in 0..6 {
        let answer = raw(stack.address, "GET /api/movies?\" HTTP/1.1\r\nHost: h\r\n\r\n");
        assert_eq!(status_of(&answer), "400", "{answer}");
    }
    assert_eq!(upstream.seen().len(), asked);
    assert_eq!(circuit_breaker_state(&stack), 0);
}

#[test]
fn while_inventory_is_stopped_every_request_is_answered_and_afterwards_it_recovers() {
    let movies = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    let mut stack = Stack::new();
    stack.set("INVENTORY_DB_NAME", &movies.name);
    stack.set("RABBITMQ_HOST", stack.address);
    stack.set("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", 1000);
    let [inventory, _gateway] = ["inventory", "gateway"].map(|name| stack.start_and_wait(name));
    assert_eq!(status_of(&raw(stack.address, GET)), "200");
    let ending = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while !ending.load(Ordering::SeqCst) {
                    // `raw` fails after 20 s.
                    let answer = raw(stack.address, GET);
                    let status = status_of(&answer);
                    assert!(["200", "503", "504"].contains(&status), "{answer}");
                    thread::park_timeout(Duration::from_millis(10));
                }
            });
        }
        // Whatever happens in here, the clients must end.
        let end = End(&ending);
        inventory.signal("STOP");
        eventually("the breaker opens", 20, || (circuit_breaker_state(&stack) == 2).then_some(()));
        assert_eq!(status_of(&raw(stack.address, HEALTH)), "200");
        let order = "POST /api/billing HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(status_of(&raw(stack.address, order)), "422");
        inventory.signal("CONT");
        eventually("the breaker closes", 20, || (circuit_breaker_state(&stack) == 0).then_some(()));
        drop(end);
    });
    eventually("movies are served again", 20, || {
        Some(raw(stack.address, GET)).filter(|answer| status_of(answer) == "200")
    });
}

struct End<'e>(&'e AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn an_address_over_its_quota_gets_429_and_others_are_served() {
    let (stack, _gateway) = gateway(|stack| {
        stack.set("GATEWAY_RATE_LIMIT", "3/3600");
    });
    let upstream = Upstream::start(&stack, ok);
    let policy = Some("\"default\";q=3;w=3600");
    for left in [2, 1, 0] {
        let answer = raw_from([127, 0, 0, 2], &stack, GET);
        assert_eq!(status_of(&answer), "200", "{answer}");
        assert_eq!(field(&answer, "RateLimit-Policy"), policy, "{answer}");
        let limit = field(&answer, "RateLimit").unwrap();
        assert!(limit.starts_with(&format!("\"default\";r={left};t=1")), "{answer}");
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..50 {
                let answer = raw_from([127, 0, 0, 2], &stack, GET);
                assert_eq!(status_of(&answer), "429", "{answer}");
                assert!(answer.contains("application/problem+json"), "{answer}");
                assert_eq!(field(&answer, "RateLimit-Policy"), policy, "{answer}");
                // One comes back after a third of the hour.
                let wait: u64 = field(&answer, "Retry-After").unwrap().parse().unwrap();
                assert!((1000..=1200).contains(&wait), "{answer}");
                let limit = format!("\"default\";r=0;t={wait}");
                assert_eq!(field(&answer, "RateLimit"), Some(limit.as_str()), "{answer}");
            }
        });
        for client in 3..20 {
            let answer = raw_from([127, 0, 0, client], &stack, GET);
            assert_eq!(status_of(&answer), "200", "{answer}");
        }
    });
    assert_eq!(upstream.seen().len(), 3 + 17, "inventory was asked by those who were refused");
    assert_eq!(metric(&stack, "http_requests_rate_limited_total"), 50);
    // Requests that a route rejects count as well.
    let wrong = "GET /nowhere HTTP/1.1\r\nHost: h\r\n\r\n";
    let answer = raw_from([127, 0, 0, 20], &stack, wrong);
    assert_eq!(status_of(&answer), "404", "{answer}");
    assert!(field(&answer, "RateLimit").unwrap().starts_with("\"default\";r=2;"), "{answer}");
    // Monitors are always answered.
    for path in ["/health", "/health/", "/health/ready", "/health/ready?x=1"] {
        let get = format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n");
        let answer = raw_from([127, 0, 0, 2], &stack, &get);
        assert!(["200", "503"].contains(&status_of(&answer)), "{answer}");
        assert_eq!(field(&answer, "RateLimit"), None, "{answer}");
    }
}

#[test]
fn without_a_rate_limit_every_request_is_served() {
    let (stack, _gateway) = gateway(|_| ());
    Upstream::start(&stack, ok);
    for _ in 0..200 {
        let answer = raw_from([127, 0, 0, 2], &stack, GET);
        assert_eq!((status_of(&answer), field(&answer, "RateLimit")), ("200", None));
    }
}

/// A GET with these lines of the way it came.
fn forwarded(lines: &str) -> String {
    format!("GET /api/movies HTTP/1.1\r\nHost: store.example\r\n{lines}\r\n")
}

#[test]
fn behind_a_trusted_proxy_the_quota_is_that_of_the_client_it_names() {
    let (stack, _gateway) = gateway(|stack| {
        stack.set("GATEWAY_RATE_LIMIT", "1/3600");
        stack.set("GATEWAY_TRUSTED_PROXIES", "127.0.0.2, 10.0.0.0/8");
    });
    Upstream::start(&stack, ok);
    for (peer, chain, status) in [
        (2, "192.0.2.1", "200"),
        (2, "192.0.2.1", "429"),
        // The proxy's other clients are not hurt, nor does it help to name one's own chain.
        (2, "192.0.2.2", "200"),
        (2, "192.0.2.3, 192.0.2.1", "429"),
        (2, "192.0.2.3, 192.0.2.1, 10.1.2.3", "429"),
        // Who is not trusted is himself, whatever he says.
        (3, "192.0.2.4", "200"),
        (3, "192.0.2.5", "429"),
    ] {
        let sent = forwarded(&format!("X-Forwarded-For: {chain}\r\n"));
        let answer = raw_from([127, 0, 0, peer], &stack, &sent);
        assert_eq!(status_of(&answer), status, "127.0.0.{peer} says {chain}: {answer}");
    }
}

#[test]
fn forwarded_headers_are_kept_from_a_trusted_proxy_and_replaced_otherwise() {
    let (stack, _gateway) = gateway(|stack| {
        stack.set("GATEWAY_TRUSTED_PROXIES", "127.0.0.2");
    });
    let upstream = Upstream::start(&stack, ok);
    let lines = "X-Forwarded-For: 192.0.2.7\r\nx-forwarded-for: 192.0.2.8\r\n\
        X-Forwarded-Proto: https\r\nX-Forwarded-Host: shop.example\r\nX-Forwarded-Port: 443\r\n\
        X-Real-IP: 192.0.2.9\r\nForwarded: for=192.0.2.9\r\n";
    let way = |peer: u8, lines: &str| {
        let answer = raw_from([127, 0, 0, peer], &stack, &forwarded(lines));
        assert_eq!(status_of(&answer), "200", "{answer}");
        let seen = upstream.seen().pop().unwrap().to_ascii_lowercase();
        let lines = seen.lines().filter(|line| line.contains("forward") || line.contains("real"));
        let mut lines: Vec<String> = lines.map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(
        way(2, lines),
        [
            "forwarded: for=192.0.2.9",
            "x-forwarded-for: 192.0.2.7, 192.0.2.8, 127.0.0.2",
            "x-forwarded-host: shop.example",
            "x-forwarded-port: 443",
            "x-forwarded-proto: https",
            "x-real-ip: 192.0.2.8",
        ]
    );
    for (peer, lines) in [(3, lines), (3, ""), (2, "")] {
        assert_eq!(
            way(peer, lines),
            [
                format!("x-forwarded-for: 127.0.0.{peer}"),
                "x-forwarded-host: store.example".to_owned(),
                "x-forwarded-proto: http".to_owned(),
                format!("x-real-ip: 127.0.0.{peer}"),
            ]
        );
    }
}

#[test]
fn a_malformed_rate_limit_or_proxy_list_is_a_start_error_naming_the_variable() {
    let mut stack = Stack::new();
    stack.set("GATEWAY_RATE_LIMIT", "many").set("GATEWAY_TRUSTED_PROXIES", "10.0.0.1/8");
    let mut started = stack.start("gateway");
    assert!(!started.child.wait().unwrap().success());
    for name in ["GATEWAY_RATE_LIMIT", "GATEWAY_TRUSTED_PROXIES"] {
        assert!(started.log().contains(&format!("{name} must be")), "{}", started.log());
    }
}
