//! Thousands of slow clients, and services that run out of file descriptors.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use chassis::testing::process::{open_fds, thread_count};
use chassis::testing::{eventually, test_var};
use harness::load::{RECOVERY_S, Workload};
use harness::services::{service, services};
use postgres::Client;

use crate::clients::{ClientStats, Slow, SlowClients, get_request, status_of, well_behaved_client};
use crate::platform::{PeakSampler, Platform, Program};
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "slow-clients",
        control: "the limit on connections: an inventory with a thread for each connection",
        expects: ExpectedFinding::Text("threads, and"),
        short: true,
        run: slow_clients,
    },
    Case {
        name: "descriptors-exhausted",
        control: "accepting after an error: an inventory whose first failed accept is its last",
        expects: ExpectedFinding::Text("does not recover"),
        short: true,
        run: descriptors_exhausted,
    },
];

/// The most resident memory of all services together under load.
const MAX_MEMORY_BYTES: u64 = 64_000_000;

/// The longest 99th percentile of a well-behaved client, in the long form.
const MAX_P99: Duration = Duration::from_millis(100);

/// By how many the threads of a service vary beside those of its connections.
const THREAD_VARIATION: usize = 4;

/// Threads that a service has beyond its limit on connections, for connections that end.
const SPARE_THREADS: usize = 16;

/// Connections that the gateway keeps open to inventory, and one of this campaign.
const CONNECTIONS_TO_INVENTORY: usize = 65;

/// How many of the 2,000 connections of slowhttptest must have been established.
const MIN_CONNECTED: usize = 1_000;

/// A service that slow clients connect to.
pub(crate) struct Target {
    name: &'static str,
    address: SocketAddr,
    /// A path with a large response.
    large: &'static str,
    /// The path that the well-behaved client requests.
    good: &'static str,
    max_connections: usize,
    /// Its threads before the test.
    threads: usize,
}

impl Target {
    pub(crate) fn new(platform: &Platform, name: &'static str) -> Target {
        let (large, good) = match name {
            "gateway" => ("/docs/swagger-ui-bundle.js", "/api/movies?limit=1"),
            "inventory" => ("/api/movies", "/api/movies?limit=1"),
            _ => ("/health", "/health"),
        };
        let variable = format!("{}_HTTP_MAX_CONNECTIONS", service(name).prefix());
        Target {
            name,
            address: platform.stack.socket_address(name),
            large,
            good,
            max_connections: test_var(&variable).parse().unwrap(),
            threads: thread_count(platform.pid(name)),
        }
    }

    /// Starts slow clients, with a well-behaved one beside them; what that one got.
    fn attack(&self, kinds: &[Slow], each: usize, large: &str, time: Duration) -> ClientStats {
        let slow = SlowClients::start(self.address, kinds, each, large);
        let until = Instant::now() + time;
        let mut stats = well_behaved_client(self.address, &get_request(self.good), until);
        if slow.failed() > 0 {
            stats.given_up.push(format!("{} slow clients could not connect", slow.failed()));
        }
        stats
    }
}

fn slow_clients(run: &mut Run<'_>) -> Outcome {
    let each = run.short_or_long(300, 2000);
    let mut outcome = Outcome::new(format!("{each} of each kind"));
    let list = LongList::new(run.platform, &run.tag);
    // Restarted, so that no thread of an earlier case is counted.
    let program = if run.control { Program::Mutant } else { Program::Real };
    run.platform.inventory().replace(program);
    run.platform.gateway().replace(Program::Real);
    run.platform.wait_until_ready();
    let platform = &*run.platform;
    let memory = platform.sample_memory();
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
            let attack = format!("{kinds:?} at {}{large}", target.name);
            let pid = platform.pid(target.name);
            let sampler = PeakSampler::start(move || thread_count(pid) as u64);
            let time = Duration::from_secs(run.short_or_long(2, 15));
            let stats = target.attack(kinds, each, large, time);
            check(&mut outcome, run.long, &attack, &stats);
            let most = sampler.peak() as usize;
            let allowed =
                target.max_connections + SPARE_THREADS + target.threads + THREAD_VARIATION;
            if most > allowed {
                outcome
                    .findings
                    .push(format!("{attack}: {most} threads, and {allowed} are enough"));
            }
            outcome.faults += 1;
            if run.long {
                let (good, sum) = (outcome.answered - before, memory.peak());
                println!("  {attack}: {good} answered, {most} threads, {:.1} MB", sum as f64 / 1e6);
            }
        }
        if run.long && !run.control {
            for attack in ["-H", "-B", "-X"] {
                let stats = slowhttptest(target, attack);
                let attack = format!("slowhttptest {attack} at {}", target.name);
                check(&mut outcome, true, &attack, &stats);
                outcome.faults += 1;
            }
        }
    }
    outcome.peak_memory = memory.peak();
    if run.long && outcome.peak_memory > MAX_MEMORY_BYTES {
        outcome.findings.push(format!("{} bytes of memory", outcome.peak_memory));
    }
    if !run.control {
        for target in &targets {
            wait_until_threads_end(platform, target);
        }
        outcome.assert_no_unexpected_exit(platform);
    }
    drop(list);
    outcome
}

/// Adds what a well-behaved client got to the outcome, and checks it.
fn check(outcome: &mut Outcome, strict: bool, attack: &str, stats: &ClientStats) {
    outcome.answered += stats.times.len();
    let (p50, p99) = (stats.percentile(50), stats.percentile(99));
    outcome.longest_pause = outcome.longest_pause.max(p99);
    println!(
        "  {attack}: {} answered, p50 {p50:.1?}, p99 {p99:.1?}, {} repeated",
        stats.times.len(),
        stats.repeated
    );
    for last in stats.given_up.iter().take(3) {
        outcome.findings.push(format!("{attack}: a well-behaved client gave up: {last}"));
    }
    if stats.times.is_empty() {
        outcome.findings.push(format!("{attack}: no well-behaved client was answered"));
    }
    if strict && p99 > MAX_P99 {
        outcome.findings.push(format!("{attack}: a well-behaved client's p99 is {p99:?}"));
    }
}

/// Waits until a service has the threads that it had before, and one for each open connection: the
/// gateway keeps some to inventory.
pub(crate) fn wait_until_threads_end(platform: &Platform, target: &Target) {
    eventually(format!("{} has the threads of before", target.name), 90, || {
        let open = platform.metric(target.name, "http_connections_open") as usize;
        let own = if target.name == "inventory" { CONNECTIONS_TO_INVENTORY } else { 1 };
        let now = thread_count(platform.pid(target.name));
        (open <= own && now <= target.threads + open + THREAD_VARIATION).then_some(())
    });
}

/// An attack by Debian's slowhttptest; what a well-behaved client got meanwhile.
fn slowhttptest(target: &Target, attack: &str) -> ClientStats {
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
    let until = Instant::now() + Duration::from_secs(15);
    let mut stats = well_behaved_client(target.address, &get_request(target.good), until);
    let report = child.wait_with_output().unwrap().stdout;
    let most = most_connected(&String::from_utf8_lossy(&report));
    if most < MIN_CONNECTED {
        stats.given_up.push(format!("slowhttptest had {most} connections"));
    }
    stats
}

/// The most connections that were open or closed in one of slowhttptest's reports.
fn most_connected(report: &str) -> usize {
    let (mut connected, mut most) = (0, 0);
    for line in report.lines() {
        let number = || line.split_whitespace().last()?.parse::<usize>().ok();
        if line.contains("mconnected:") {
            connected = number().unwrap_or(0);
        } else if line.contains("mclosed:") {
            most = most.max(connected + number().unwrap_or(0));
        }
    }
    most
}

/// 22 MB of movies, deleted when this is dropped: some with short texts and some with long ones,
/// because a slow reader makes a service keep a page of the list.
struct LongList<'p> {
    admin: Client,
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
const MAX_FDS: u32 = 64;

fn descriptors_exhausted(run: &mut Run<'_>) -> Outcome {
    let each = run.short_or_long(50, 500);
    let mut outcome = Outcome::new(format!("{} clients", 4 * each));
    let platform = &*run.platform;
    let memory = platform.sample_memory();
    let time = Duration::from_secs(run.short_or_long(2, 10));
    if run.control {
        platform.inventory().replace(Program::Mutant);
    } else {
        limited_from_the_start(platform, each, time, &mut outcome);
    }
    let names = services().iter().map(|row| row.name.as_str());
    for name in names.filter(|name| !run.control || *name == "inventory") {
        limited_at_run_time(platform, name, each, time, run.control, &mut outcome);
    }
    if !run.control {
        let orders = platform.start_load(Workload::Orders, &run.tag, 2);
        orders.wait_for_progress_after("the lack of descriptors");
        platform.reconcile(orders, &mut outcome);
        outcome.assert_no_unexpected_exit(platform);
        // With the usual limit again.
        for (_, service) in platform.services() {
            service.replace(Program::Real);
        }
    }
    outcome.peak_memory = memory.peak();
    outcome
}

/// A limit that the services read when they start: they accept no more connections than fit, and
/// no accept fails.
fn limited_from_the_start(platform: &Platform, each: usize, time: Duration, outcome: &mut Outcome) {
    for (name, service) in platform.services() {
        service.replace(Program::FdLimited(MAX_FDS));
        eventually(format!("{name} logs that it lowers its limit"), RECOVERY_S, || {
            service.log().contains("connections at once instead of").then_some(())
        });
    }
    platform.wait_until_ready();
    for (name, _) in platform.services() {
        let target = Target::new(platform, name);
        let stats = target.attack(&Slow::ALL, each, target.large, time);
        check(outcome, false, &format!("{name}, {MAX_FDS} descriptors from the start"), &stats);
        let failures = platform.metric(name, "http_accept_errors_total");
        if failures > 0.0 {
            outcome.findings.push(format!("{name}: {failures} accepts failed"));
        }
        outcome.faults += 1;
    }
    for (_, service) in platform.services() {
        service.replace(Program::Real);
    }
    platform.wait_until_ready();
}

/// A limit that is lowered while a service runs: some requests are answered meanwhile, and all
/// afterwards.
fn limited_at_run_time(
    platform: &Platform,
    name: &'static str,
    each: usize,
    time: Duration,
    control: bool,
    outcome: &mut Outcome,
) {
    let target = Target::new(platform, name);
    let pid = platform.pid(name);
    let limit = MAX_FDS.max(open_fds(pid) as u32 + 8);
    let limited = Command::new("prlimit")
        .args([format!("--pid={pid}"), format!("--nofile={limit}:20000")])
        .status();
    assert!(limited.is_ok_and(|status| status.success()), "prlimit");
    let stats = target.attack(&Slow::ALL, each, target.large, time);
    println!(
        "  {name}, {limit} descriptors at run time: {} answered, {} repeated",
        stats.times.len(),
        stats.repeated
    );
    if stats.times.is_empty() {
        outcome.findings.push(format!("{name}: no request was answered with {limit} descriptors"));
    }
    outcome.answered += stats.times.len();
    outcome.faults += 1;
    let started_at = Instant::now();
    while outcome.findings.is_empty() && answers_ten_requests(&target).is_err() {
        if started_at.elapsed() > Duration::from_secs(if control { 3 } else { RECOVERY_S }) {
            outcome.findings.push(format!("{name} does not recover"));
        }
    }
}

/// Whether ten requests one after the other are answered.
fn answers_ten_requests(target: &Target) -> std::io::Result<()> {
    let request = get_request(target.good);
    for _ in 0..10 {
        if status_of(target.address, &request, Duration::from_secs(5))? != 200 {
            return Err(std::io::ErrorKind::Other.into());
        }
    }
    Ok(())
}
