//! An inventory that hangs, is slow, breaks off or sends garbage. Requests for it get the right
//! error in time, and requests that do not need it are not affected.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::eventually;
use harness::FakeUpstream;
use parking_lot::Mutex;

use crate::clients::{
    ClientStats, get_request, order_request, percentile, status_of, well_behaved_client,
};
use crate::platform::Program;
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[Case {
    name: "inventory-faults",
    control: "the deadline for inventory's responses",
    expects: ExpectedFinding::Text("no response in"),
    short: true,
    run: inventory_faults,
}];

/// The port of the fake inventory.
const FAKE_PORT: u16 = 8090;

/// How long the fake inventory waits in [`UpstreamFault::Slow`].
const SLOW: Duration = Duration::from_secs(3);

/// The faults, each with the responses that show it: one of them must be seen. 503 is allowed
/// besides, from the bulkhead and the breaker. 0 stands for a connection that ended before the end
/// of the response, which no client takes for a complete one.
const FAULTS: [(UpstreamFault, &[u16]); 6] = [
    (UpstreamFault::None, &[200]),
    (UpstreamFault::Stopped, &[504]),
    (UpstreamFault::Slow, &[200, 504]),
    (UpstreamFault::BreaksOff, &[502]),
    (UpstreamFault::BreaksOffLate, &[0, 502]),
    (UpstreamFault::Garbage, &[502]),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum UpstreamFault {
    None,
    /// The real inventory, stopped by SIGSTOP.
    Stopped,
    Slow,
    /// The connection ends after the first byte of the body.
    BreaksOff,
    /// The connection ends after 100 KB of the body: the gateway has passed on the head.
    BreaksOffLate,
    Garbage,
}

fn inventory_faults(run: &mut Run<'_>) -> Outcome {
    // Short form: fewer clients than connections, and more than may wait for inventory.
    let (connections, waiting, clients) = run.short_or_long((96, 16, 24), (256, 192, 220));
    let deadline = Duration::from_secs(run.short_or_long(2, 5));
    // So much later than its deadline a response may come: the short form runs on busy machines.
    let margin = Duration::from_secs(run.short_or_long(4, 1));
    let timeout = deadline + margin;
    let mut outcome = Outcome::new(format!("{clients} clients"));
    let address = run.platform.stack.address;
    let fake = FakeInventory::start(SocketAddr::from((address, FAKE_PORT)));
    let mut settings = run.platform.stack.clone();
    let response_timeout = if run.control { 60_000 } else { deadline.as_millis() };
    settings
        .set("GATEWAY_HTTP_MAX_CONNECTIONS", connections)
        .set("GATEWAY_UPSTREAM_MAX_IN_FLIGHT", waiting)
        .set("GATEWAY_PUBLISH_MAX_IN_FLIGHT", waiting)
        .set("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", response_timeout)
        .set("INVENTORY_PORT", FAKE_PORT);
    let platform = &*run.platform;
    let gateway = platform.stack.socket_address("gateway");
    let memory = platform.sample_memory();
    let (mut acknowledged, mut sent) = (0, 0);
    let mut without_fault = None;
    for (fault, shown_by) in FAULTS {
        if run.control && !matches!(fault, UpstreamFault::None | UpstreamFault::Stopped) {
            continue;
        }
        let mut settings = settings.clone();
        if fault == UpstreamFault::Stopped {
            let real = platform.stack.socket_address("inventory");
            settings.set("INVENTORY_PORT", real.port());
        }
        // Restarted each time: the state of its breaker must not be that of the fault before.
        platform.gateway().restart(&settings, Program::Real);
        eventually("the gateway is ready", 30, || {
            let status = status_of(gateway, &get_request("/health/ready"), margin);
            (status.ok()? == 200).then_some(())
        });
        match fault {
            UpstreamFault::Stopped => platform.inventory().signal("STOP"),
            _ => fake.set(fault),
        }
        let time = match (run.control, fault) {
            (true, UpstreamFault::Stopped) => timeout + margin / 2,
            _ => Duration::from_secs(run.short_or_long(2, 10)),
        };
        let until = Instant::now() + time;
        let movies = Mutex::new(Vec::new());
        let (health, orders) = thread::scope(|scope| {
            for _ in 0..clients {
                scope.spawn(|| {
                    while Instant::now() < until {
                        let started_at = Instant::now();
                        let request = get_request("/api/movies?limit=1");
                        let status = status_of(gateway, &request, timeout);
                        movies.lock().push((status, started_at.elapsed()));
                    }
                });
            }
            let (health, order) = (get_request("/health"), order_request(&run.tag, false));
            let health = scope.spawn(move || well_behaved_client(gateway, &health, until));
            let orders = scope.spawn(move || well_behaved_client(gateway, &order, until));
            (health.join().unwrap(), orders.join().unwrap())
        });
        if fault == UpstreamFault::Stopped {
            platform.inventory().signal("CONT");
        }
        fake.set(UpstreamFault::None);
        let movies = movies.into_inner();
        let p99s = report(fault, &movies, &health, &orders);
        check_movies(fault, shown_by, &movies, timeout, &mut outcome);
        for (path, stats) in [("/health", &health), ("/api/billing", &orders)] {
            if !stats.given_up.is_empty() || stats.times.is_empty() {
                outcome.findings.push(format!("{fault:?}: {path} {:?}", stats.given_up.first()));
            }
        }
        outcome.answered += health.times.len();
        acknowledged += orders.times.len();
        sent += orders.times.len() + orders.repeated;
        // A request that needed a permit for inventory would wait until the deadline.
        if health.percentile(50) > deadline / 2 {
            outcome.findings.push(format!("{fault:?}: /health takes {:?}", health.percentile(50)));
        }
        match without_fault {
            None => without_fault = Some(p99s),
            Some((health, orders)) if run.long => {
                for (path, before, now) in
                    [("/health", health, p99s.0), ("/api/billing", orders, p99s.1)]
                {
                    if now > before * 2 + Duration::from_millis(50) {
                        let finding = format!("{fault:?}: {path} p99 {now:?}, before {before:?}");
                        outcome.findings.push(finding);
                    }
                }
            }
            Some(_) => (),
        }
        outcome.faults += 1;
    }
    outcome.peak_memory = memory.peak();
    outcome.reconcile_count(platform, &run.tag, acknowledged, sent);
    outcome.assert_no_unexpected_exit(platform);
    outcome
}

/// A status or the error instead of one, and the time that it took.
type Timed = (io::Result<u16>, Duration);

/// Each request for movies must be answered in time by one of the expected statuses.
fn check_movies(
    fault: UpstreamFault,
    shown_by: &[u16],
    movies: &[Timed],
    timeout: Duration,
    outcome: &mut Outcome,
) {
    let mut shown = false;
    for (status, time) in movies {
        let status = match status {
            Ok(status) => *status,
            Err(_) if *time < timeout => 0,
            Err(err) => {
                outcome.findings.push(format!("{fault:?}: no response in {time:.1?}: {err}"));
                continue;
            }
        };
        if status != 503 && !shown_by.contains(&status) {
            outcome.findings.push(format!("{fault:?}: GET /api/movies got {status}"));
        }
        shown |= shown_by.contains(&status);
    }
    if !shown {
        outcome.findings.push(format!("{fault:?}: no request got one of {shown_by:?}"));
    }
}

/// Prints the responses; returns the 99th percentiles of /health and /api/billing.
fn report(
    fault: UpstreamFault,
    movies: &[Timed],
    health: &ClientStats,
    orders: &ClientStats,
) -> (Duration, Duration) {
    let mut counts = BTreeMap::<u16, usize>::new();
    for (status, _) in movies {
        *counts.entry(*status.as_ref().unwrap_or(&0)).or_default() += 1;
    }
    let times: Vec<Duration> = movies.iter().map(|(_, time)| *time).collect();
    let p99s = (health.percentile(99), orders.percentile(99));
    println!(
        "  {fault:?}: movies {counts:?} p99 {:.1?}; /health {} p99 {:.1?}, \
         /api/billing {} p99 {:.1?}",
        percentile(&times, 99),
        health.times.len(),
        p99s.0,
        orders.times.len(),
        p99s.1,
    );
    p99s
}

/// A fake inventory with a fault that can be changed.
struct FakeInventory {
    fault: Arc<AtomicU8>,
    _upstream: FakeUpstream,
}

impl FakeInventory {
    fn start(address: SocketAddr) -> FakeInventory {
        let fault = Arc::new(AtomicU8::new(UpstreamFault::None as u8));
        let current = Arc::clone(&fault);
        let upstream = FakeUpstream::start(address, move |stream, _| {
            respond(stream, current.load(Ordering::SeqCst)).unwrap_or(false)
        });
        FakeInventory { fault, _upstream: upstream }
    }

    fn set(&self, fault: UpstreamFault) {
        self.fault.store(fault as u8, Ordering::SeqCst);
    }
}

/// Answers a request as a fault says; whether the connection stays open.
fn respond(stream: &mut TcpStream, fault: u8) -> io::Result<bool> {
    let is = |wanted: UpstreamFault| fault == wanted as u8;
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: ";
    if is(UpstreamFault::BreaksOff) {
        stream.write_all(format!("{head}1000\r\n\r\n[").as_bytes())?;
        return Ok(false);
    }
    if is(UpstreamFault::BreaksOffLate) {
        stream.write_all(format!("{head}200000\r\n\r\n").as_bytes())?;
        stream.write_all(&[b' '; 100_000])?;
        return Ok(false);
    }
    if is(UpstreamFault::Garbage) {
        stream.write_all(b"\x00\xffmovies? what movies?\r\n\r\n")?;
        return Ok(false);
    }
    if is(UpstreamFault::Slow) {
        thread::park_timeout(SLOW);
    }
    stream.write_all(format!("{head}2\r\n\r\n[]").as_bytes())?;
    Ok(true)
}
