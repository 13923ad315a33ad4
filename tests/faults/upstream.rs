//! An inventory that hangs, is slow, breaks off or talks nonsense: its own requests get an
//! honest answer in time, and those that do not need it notice nothing.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::clients::{Seen, ask, find, get, good_client, order, percentile};
use crate::platform::Program;
use crate::{Case, Finds, Outcome, Run};

pub(crate) const CASES: &[Case] = &[Case {
    name: "inventory-broken",
    control: "the deadline for inventory's answers",
    finds: Finds::Fault("no answer in"),
    short: true,
    run: inventory_broken,
}];

/// The port of the inventory that is put in the real one's place.
const STAND_IN: u16 = 8090;

/// What is wrong with inventory, and the answers that tell: some of them must be seen, and
/// 503 besides, when inventory is spared. 0 stands for a broken connection, which no client
/// takes for an answer.
const TROUBLES: [(Trouble, &[u16]); 6] = [
    (Trouble::None, &[200]),
    (Trouble::Stopped, &[504]),
    (Trouble::Slow, &[200, 504]),
    (Trouble::BreaksOff, &[502]),
    (Trouble::BreaksOffLate, &[0, 502]),
    (Trouble::Garbage, &[502]),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Trouble {
    None,
    Stopped,
    Slow,
    BreaksOff,
    BreaksOffLate,
    Garbage,
}

fn inventory_broken(run: &mut Run<'_>) -> Outcome {
    // Fewer clients than places, more than may wait for inventory.
    let (places, waiting, clients) = run.either((96, 16, 24), (256, 192, 220));
    let deadline = Duration::from_secs(run.either(2, 5));
    // Beyond it an answer may come so late: the short form runs on busy machines.
    let late = Duration::from_secs(run.either(4, 1));
    let mut outcome = Outcome { load: format!("{clients} clients"), ..Outcome::default() };
    let address = run.platform.stack.address;
    let stand_in = StandIn::start(SocketAddr::from((address, STAND_IN)));
    let mut settings = run.platform.stack.clone();
    let timeout = if run.control { 60_000 } else { deadline.as_millis() };
    settings
        .set("GATEWAY_HTTP_MAX_CONNECTIONS", places)
        .set("GATEWAY_UPSTREAM_MAX_IN_FLIGHT", waiting)
        .set("GATEWAY_PUBLISH_MAX_IN_FLIGHT", waiting)
        .set("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", timeout)
        .set("INVENTORY_PORT", STAND_IN);
    let platform = &*run.platform;
    let gateway = SocketAddr::from((address, 3000));
    let memory = platform.watch_memory();
    let (mut acknowledged, mut sent) = (0, 0);
    let mut before = None;
    for (trouble, telling) in TROUBLES {
        if run.control && !matches!(trouble, Trouble::None | Trouble::Stopped) {
            continue;
        }
        let mut settings = settings.clone();
        if trouble == Trouble::Stopped {
            settings.set("INVENTORY_PORT", 8080);
        }
        // Anew each time: what it has learned of one trouble is not for the next.
        platform.gateway.restart(&settings, Program::Real);
        chassis::testing::eventually("the gateway is ready", 30, || {
            let told = ask(gateway, &get("/health/ready"), late).ok();
            told.filter(|told| told.status == 200)
        });
        match trouble {
            Trouble::Stopped => platform.inventory.signal("STOP"),
            _ => stand_in.has(trouble),
        }
        let time = match (run.control, trouble) {
            (true, Trouble::Stopped) => deadline + late + late / 2,
            _ => Duration::from_secs(run.either(2, 10)),
        };
        let ending = Instant::now() + time;
        let movies = Mutex::new(Vec::new());
        let patience = deadline + late;
        let (health, orders) = thread::scope(|scope| {
            for _ in 0..clients {
                scope.spawn(|| {
                    while Instant::now() < ending {
                        let begun = Instant::now();
                        let told = ask(gateway, &get("/api/movies?limit=1"), patience);
                        let status = told.map(|told| told.status);
                        movies.lock().unwrap().push((status, begun.elapsed()));
                    }
                });
            }
            let health = scope.spawn(|| good_client(gateway, &get("/health"), ending));
            let orders = scope.spawn(|| good_client(gateway, &order(&run.tag, false), ending));
            (health.join().unwrap(), orders.join().unwrap())
        });
        if trouble == Trouble::Stopped {
            platform.inventory.signal("CONT");
        }
        stand_in.has(Trouble::None);
        let movies = movies.into_inner().unwrap();
        let others = report(&format!("{trouble:?}"), &movies, &health, &orders);
        let mut told = false;
        for (status, time) in &movies {
            let status = match status {
                Ok(status) => *status,
                Err(_) if *time < patience => 0,
                Err(err) => {
                    outcome.wrong.push(format!("{trouble:?}: no answer in {time:.1?}: {err}"));
                    continue;
                }
            };
            if status != 503 && !telling.contains(&status) {
                outcome.wrong.push(format!("{trouble:?}: GET /api/movies was told {status}"));
            }
            told |= telling.contains(&status);
        }
        if !told {
            outcome.wrong.push(format!("{trouble:?}: nobody was told any of {telling:?}"));
        }
        for (what, seen) in [("/health", &health), ("/api/billing", &orders)] {
            if !seen.given_up.is_empty() || seen.times.is_empty() {
                outcome.wrong.push(format!("{trouble:?}: {what} {:?}", seen.given_up.first()));
            }
        }
        outcome.answered += health.times.len();
        acknowledged += orders.times.len();
        sent += orders.times.len() + orders.repeated;
        // Were a place behind inventory needed, it would come after the deadline.
        if health.percentile(50) > deadline / 2 {
            outcome.wrong.push(format!("{trouble:?}: /health waits {:?}", health.percentile(50)));
        }
        match before {
            None => before = Some(others),
            Some((quick, booked)) if run.long => {
                for (what, before, now) in
                    [("/health", quick, others.0), ("/api/billing", booked, others.1)]
                {
                    if now > before * 2 + Duration::from_millis(50) {
                        let told = format!("{trouble:?}: {what} p99 {now:?}, before {before:?}");
                        outcome.wrong.push(told);
                    }
                }
            }
            Some(_) => (),
        }
        outcome.faults += 1;
    }
    outcome.peak_memory = memory.peak();
    outcome.settle_equal(platform, &run.tag, acknowledged, sent);
    outcome.nobody_has_ended(platform);
    outcome
}

type Answer = (io::Result<u16>, Duration);

/// Prints what was seen; the 99th percentiles of /health and /api/billing.
fn report(trouble: &str, movies: &[Answer], health: &Seen, orders: &Seen) -> (Duration, Duration) {
    let mut counts = std::collections::BTreeMap::<u16, usize>::new();
    for (status, _) in movies {
        *counts.entry(*status.as_ref().unwrap_or(&0)).or_default() += 1;
    }
    let times: Vec<Duration> = movies.iter().map(|(_, time)| *time).collect();
    let (quick, booked) = (health.percentile(99), orders.percentile(99));
    println!(
        "  {trouble}: movies {counts:?} p99 {:.1?}; /health {} p99 {quick:.1?}, \
         /api/billing {} p99 {booked:.1?}",
        percentile(&times, 99),
        health.times.len(),
        orders.times.len(),
    );
    (quick, booked)
}

/// Something on inventory's port that is not inventory.
struct StandIn {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Shared {
    trouble: AtomicU8,
    ending: AtomicBool,
}

impl StandIn {
    fn start(address: SocketAddr) -> StandIn {
        let listener = TcpListener::bind(address).unwrap();
        let shared = Shared { trouble: AtomicU8::new(0), ending: AtomicBool::new(false) };
        let shared = Arc::new(shared);
        let seen = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if seen.ending.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(stream), seen) = (stream, Arc::clone(&seen)) else { continue };
                thread::spawn(move || while seen.answer(&stream).is_ok() {});
            }
        });
        StandIn { address, shared, thread: Some(thread) }
    }

    fn has(&self, trouble: Trouble) {
        self.shared.trouble.store(trouble as u8, Ordering::SeqCst);
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

impl Shared {
    /// Reads one head and answers it; an error ends the connection.
    fn answer(&self, mut stream: &TcpStream) -> io::Result<()> {
        let mut head = Vec::new();
        while find(&head, b"\r\n\r\n").is_none() {
            let mut piece = [0; 4096];
            match stream.read(&mut piece)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => head.extend_from_slice(&piece[..read]),
            }
        }
        let trouble = self.trouble.load(Ordering::SeqCst);
        let is = |wanted: Trouble| trouble == wanted as u8;
        let json = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: ";
        if is(Trouble::BreaksOff) {
            stream.write_all(format!("{json}1000\r\n\r\n[").as_bytes())?;
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if is(Trouble::BreaksOffLate) {
            stream.write_all(format!("{json}200000\r\n\r\n").as_bytes())?;
            stream.write_all(&[b' '; 100_000])?;
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if is(Trouble::Garbage) {
            stream.write_all(b"\x00\xffmovies? what movies?\r\n\r\n")?;
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if is(Trouble::Slow) {
            thread::park_timeout(Duration::from_secs(3));
        }
        stream.write_all(format!("{json}2\r\n\r\n[]").as_bytes())
    }
}
