//! Slow clients by the thousand, and services that run out of descriptors.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use chassis::testing::{eventually, test_var};

use crate::clients::{self, Crowd, Seen, Slow, get, good_client};
use crate::load::{Load, RECOVERY, What};
use crate::platform::{Platform, Program, Watch, descriptors, threads};
use crate::{Case, Finds, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "slow-clients",
        control: "the limit on connections: an inventory with a thread for each that comes",
        finds: Finds::Fault("threads, and"),
        short: true,
        run: slow_clients,
    },
    Case {
        name: "descriptors-exhausted",
        control: "the accept that is tried again: an inventory that ends with the first failure",
        finds: Finds::Fault("does not recover"),
        short: true,
        run: descriptors_exhausted,
    },
];

/// DESIGN section 7: all three services under load, in bytes.
const MEMORY: u64 = 64_000_000;

/// What the good client may wait, in the long form.
const PROMPT: Duration = Duration::from_millis(100);

/// Threads of a service beside those of its connections come and go by so many, and so
/// many more serve connections on their way out.
const COMING_AND_GOING: usize = 4;
const SLACK: usize = 16;

/// How many connections the gateway keeps to inventory, and one that looks at it.
const TO_INVENTORY: usize = 65;

/// Of the 2,000 connections of slowhttptest so many must have come to be.
const CONNECTED: usize = 1_000;

/// A service under attack.
pub(crate) struct Target {
    name: &'static str,
    address: SocketAddr,
    /// An answer that is worth taking slowly.
    large: &'static str,
    /// What the good client asks.
    good: &'static str,
    /// Most connections.
    places: usize,
    /// Threads before.
    threads: usize,
}

impl Target {
    pub(crate) fn new(platform: &Platform, name: &'static str) -> Target {
        let stack = &platform.stack;
        let address = |port| SocketAddr::from((stack.address, port));
        let places = |variable| test_var(variable).parse().unwrap();
        let (address, large, places) = match name {
            "gateway" => (
                address(3000),
                "/docs/swagger-ui-bundle.js",
                places("GATEWAY_HTTP_MAX_CONNECTIONS"),
            ),
            "inventory" => (address(8080), "/api/movies", places("INVENTORY_HTTP_MAX_CONNECTIONS")),
            _ => (address(8081), "/health", places("BILLING_HTTP_MAX_CONNECTIONS")),
        };
        let good = if name == "billing" { "/health" } else { "/api/movies?limit=1" };
        let threads = threads(platform.pid(name));
        Target { name, address, large, good, places, threads }
    }

    /// Lets slow clients at it, with a good one beside them.
    fn crowd(&self, kinds: &[Slow], each: usize, large: &str, time: Duration) -> Seen {
        let crowd = Crowd::start(self.address, kinds, each, large);
        let mut seen = good_client(self.address, &get(self.good), Instant::now() + time);
        if crowd.failed() > 0 {
            seen.given_up.push(format!("that {} slow ones could not connect", crowd.failed()));
        }
        seen
    }
}

fn slow_clients(run: &mut Run<'_>) -> Outcome {
    let each = run.either(300, 2000);
    let mut outcome = Outcome { load: format!("{each} of each kind"), ..Outcome::default() };
    let list = LongList::new(run.platform, &run.tag);
    // Anew, so that no thread of an earlier case is counted.
    let program = if run.control { Program::Careless } else { Program::Real };
    run.platform.inventory.replace(program);
    run.platform.gateway.replace(Program::Real);
    run.platform.wait_until_ready();
    let platform = &*run.platform;
    let memory = platform.watch_memory();
    let targets = match run.control {
        true => vec![Target::new(platform, "inventory")],
        false => ["gateway", "inventory"].map(|name| Target::new(platform, name)).into(),
    };
    for target in &targets {
        let mut floods: Vec<(&[Slow], &str)> = vec![(&Slow::ALL, target.large)];
        if run.long && !run.control {
            floods.extend(Slow::ALL.chunks(1).map(|kind| (kind, target.large)));
            floods.push((&[Slow::Reader], "/api/movies"));
        }
        for (kinds, large) in floods {
            let before = outcome.answered;
            let crowd = format!("{kinds:?} at {}{large}", target.name);
            let pid = platform.pid(target.name);
            let watch = Watch::new(move || threads(pid) as u64);
            let time = Duration::from_secs(run.either(2, 15));
            judge(&mut outcome, run.long, &crowd, &target.crowd(kinds, each, large, time));
            let most = watch.peak() as usize;
            let allowed = target.places + SLACK + target.threads + COMING_AND_GOING;
            if most > allowed {
                outcome.wrong.push(format!("{crowd}: {most} threads, and {allowed} are enough"));
            }
            outcome.faults += 1;
            if run.long {
                let (good, sum) = (outcome.answered - before, memory.peak());
                println!("  {crowd}: {good} good, {most} threads, {:.1} MB", sum as f64 / 1e6);
            }
        }
        if run.long && !run.control {
            for attack in ["-H", "-B", "-X"] {
                let seen = slowhttptest(target, attack);
                judge(
                    &mut outcome,
                    true,
                    &format!("slowhttptest {attack} at {}", target.name),
                    &seen,
                );
                outcome.faults += 1;
            }
        }
    }
    outcome.peak_memory = memory.peak();
    if run.long && outcome.peak_memory > MEMORY {
        outcome.wrong.push(format!("{} bytes of memory", outcome.peak_memory));
    }
    if !run.control {
        for target in &targets {
            all_threads_are_back(platform, target);
        }
        outcome.nobody_has_ended(platform);
    }
    drop(list);
    outcome
}

/// Adds what a good client saw to the outcome.
fn judge(outcome: &mut Outcome, strict: bool, crowd: &str, seen: &Seen) {
    outcome.answered += seen.times.len();
    let (p50, p99) = (seen.percentile(50), seen.percentile(99));
    outcome.worst_pause = outcome.worst_pause.max(p99);
    println!(
        "  {crowd}: {} good ones, p50 {p50:.1?}, p99 {p99:.1?}, {} repeated",
        seen.times.len(),
        seen.repeated
    );
    for told in seen.given_up.iter().take(3) {
        outcome.wrong.push(format!("{crowd}: a good client was told {told}"));
    }
    if seen.times.is_empty() {
        outcome.wrong.push(format!("{crowd}: no good client was answered"));
    }
    if strict && p99 > PROMPT {
        outcome.wrong.push(format!("{crowd}: a good client's p99 is {p99:?}"));
    }
}

/// Waits until the threads are those from before and one for each connection that is
/// open: the gateway keeps some to inventory ready.
pub(crate) fn all_threads_are_back(platform: &Platform, target: &Target) {
    eventually(format!("the threads of {} are back", target.name), 90, || {
        let open = platform.metric(target.name, "http_connections_open") as usize;
        let own = if target.name == "inventory" { TO_INVENTORY } else { 1 };
        let now = threads(platform.pid(target.name));
        (open <= own && now <= target.threads + open + COMING_AND_GOING).then_some(())
    });
}

/// The attack of Debian's package, and what a good client sees meanwhile.
fn slowhttptest(target: &Target, attack: &str) -> Seen {
    let path = match attack {
        "-B" => "/api/movies",
        "-X" => target.large,
        _ => "/",
    };
    let url = format!("http://{}{path}", target.address);
    let child = Command::new("slowhttptest")
        .args([attack, "-c", "2000", "-r", "1000", "-l", "15", "-i", "5", "-p", "3"])
        .args(["-w", "512", "-y", "1024", "-n", "5", "-z", "32", "-k", "3", "-u", &url])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let child = child.unwrap_or_else(|err| panic!("slowhttptest (a package of Debian): {err}"));
    let mut seen =
        good_client(target.address, &get(target.good), Instant::now() + Duration::from_secs(15));
    let said = child.wait_with_output().unwrap().stdout;
    let most = most_connected(&String::from_utf8_lossy(&said));
    if most < CONNECTED {
        seen.given_up.push(format!("that slowhttptest had {most} connections"));
    }
    seen
}

/// The most connections of slowhttptest that were there, or had been, by one of its reports.
fn most_connected(said: &str) -> usize {
    let (mut connected, mut most) = (0, 0);
    for line in said.lines() {
        let number = || line.split_whitespace().last()?.parse::<usize>().ok();
        if line.contains("mconnected:") {
            connected = number().unwrap_or(0);
        } else if line.contains("mclosed:") {
            most = most.max(connected + number().unwrap_or(0));
        }
    }
    most
}

/// 20 MB of movies, as long as this lives, some with short texts and some with long ones: a page
/// of either is what a slow reader costs.
struct LongList<'p> {
    admin: postgres::Client,
    tag: &'p str,
}

impl<'p> LongList<'p> {
    fn new(platform: &Platform, tag: &'p str) -> LongList<'p> {
        let mut admin = platform.connect("INVENTORY_DB_NAME");
        let add = "insert into movies (title, description)
                   select $1 || number, repeat('x', $2) from generate_series(1, $3) as number";
        for (length, movies) in [(100, 20_000), (10_000, 2000)] {
            admin.execute(add, &[&tag, &length, &movies]).unwrap();
        }
        LongList { admin, tag }
    }
}

impl Drop for LongList<'_> {
    fn drop(&mut self) {
        let _ = self.admin.execute("delete from movies where starts_with(title, $1)", &[&self.tag]);
    }
}

/// `ulimit -n` of the services in this case.
const DESCRIPTORS: u32 = 64;

fn descriptors_exhausted(run: &mut Run<'_>) -> Outcome {
    let each = run.either(50, 500);
    let mut outcome = Outcome { load: format!("{} clients", 4 * each), ..Outcome::default() };
    let platform = &*run.platform;
    let memory = platform.watch_memory();
    let time = Duration::from_secs(run.either(2, 10));
    if run.control {
        platform.inventory.replace(Program::Careless);
    } else {
        // A limit that the service has known from its start: it lets in no more than fit.
        for (name, service) in platform.services() {
            service.replace(Program::Starved(DESCRIPTORS));
            eventually(format!("{name} says that it lowers a limit"), RECOVERY, || {
                service.log().contains("connections at once instead of").then_some(())
            });
        }
        platform.wait_until_ready();
        for name in ["gateway", "inventory", "billing"] {
            let target = Target::new(platform, name);
            let seen = target.crowd(&Slow::ALL, each, target.large, time);
            judge(&mut outcome, false, &format!("{name}, {DESCRIPTORS} from the start"), &seen);
            let failures = platform.metric(name, "http_accept_errors_total");
            if failures > 0.0 {
                outcome.wrong.push(format!("{name}: {failures} accepts failed"));
            }
            outcome.faults += 1;
        }
        for (_, service) in platform.services() {
            service.replace(Program::Real);
        }
        platform.wait_until_ready();
    }
    // And one that comes as a surprise: somebody is served, and afterwards everybody.
    for name in if run.control { &["inventory"][..] } else { &["gateway", "inventory", "billing"] }
    {
        let target = Target::new(platform, name);
        let pid = platform.pid(name);
        let limit = DESCRIPTORS.max(descriptors(pid) as u32 + 8);
        let limited = Command::new("prlimit")
            .args([format!("--pid={pid}"), format!("--nofile={limit}:20000")])
            .status();
        assert!(limited.is_ok_and(|status| status.success()), "prlimit");
        let seen = target.crowd(&Slow::ALL, each, target.large, time);
        println!(
            "  {name}, {limit} by surprise: {} good ones, {} repeated",
            seen.times.len(),
            seen.repeated
        );
        if seen.times.is_empty() {
            outcome.wrong.push(format!("{name}: nobody was served with {limit} descriptors"));
        }
        outcome.answered += seen.times.len();
        outcome.faults += 1;
        let begun = Instant::now();
        while outcome.wrong.is_empty() && recovers(&target).is_err() {
            if begun.elapsed() > Duration::from_secs(if run.control { 3 } else { RECOVERY }) {
                outcome.wrong.push(format!("{name} does not recover"));
            }
        }
    }
    if !run.control {
        let orders = Load::start(platform, What::Orders, &run.tag, 2);
        orders.flows_again_after("descriptors were short");
        orders.settle(platform, &mut outcome);
        outcome.nobody_has_ended(platform);
        // Back to the limit of everybody.
        for (_, service) in platform.services() {
            service.replace(Program::Real);
        }
    }
    outcome.peak_memory = memory.peak();
    outcome
}

/// Whether ten requests one after the other are answered.
fn recovers(target: &Target) -> std::io::Result<()> {
    for _ in 0..10 {
        let told = clients::ask(target.address, &get(target.good), Duration::from_secs(5))?;
        if told.status != 200 {
            return Err(std::io::ErrorKind::Other.into());
        }
    }
    Ok(())
}
