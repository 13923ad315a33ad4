//! The fault campaign: processes and servers are killed, stopped, cut off, starved and sent
//! garbage under load. Then what the clients' ledger says is compared with the tables.
//!
//! Each case runs twice. The first run is on the real services: nothing may be lost or done
//! twice. The second run, its control, has one protection removed: the same check must find the
//! consequence. A case whose control finds nothing proves nothing, and fails.
//!
//! `provision/local faults --help` runs it on servers of its own.

mod broker;
mod clients;
mod crashes;
mod customers;
mod data_integrity;
mod database;
mod mutants;
mod network;
mod operations;
mod orders;
mod outage;
mod overload;
mod partitions;
mod platform;
mod poison;
mod retry;
mod slow_clients;
mod soak;
mod stock;
mod upstream;

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{self, ExitCode};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use chassis::testing::process::signal;
use platform::Platform;

/// Every case, in the order in which they run.
const CASES: &[&[Case]] = &[
    crashes::CASES,
    broker::CASES,
    database::CASES,
    retry::CASES,
    slow_clients::CASES,
    upstream::CASES,
    data_integrity::CASES,
    overload::CASES,
    soak::CASES,
    network::CASES,
    partitions::CASES,
    operations::CASES,
    poison::CASES,
    customers::CASES,
    stock::CASES,
    orders::CASES,
];

const USAGE: &str = "\
provision/local faults [CASE…] [--long] [--seed N] [--no-controls]
                       [--minutes N] [--list]

  CASE           the cases whose names begin so; without it all of this form
  --long         all cases with higher numbers and release binaries: about an
                 hour with --no-controls
  --seed N       the same random choices as in the run that printed N
  --minutes N    length of the soak; else 2, and 30 in the long form
  --no-controls  without the runs on services with a protection removed
  --list         the cases, each with what its control removes";

/// One kind of fault, and what must hold under it.
pub(crate) struct Case {
    /// Its name on the command line and in the table.
    pub(crate) name: &'static str,
    /// Which protection its control removes, or which service it puts in the place of which.
    pub(crate) control: &'static str,
    /// What the check must find in the control. Any other finding is an error of the control.
    pub(crate) expects: ExpectedFinding,
    /// Whether the short form runs it.
    pub(crate) short: bool,
    /// Runs it.
    pub(crate) run: fn(&mut Run<'_>) -> Outcome,
}

/// What a control must find.
pub(crate) enum ExpectedFinding {
    /// An acknowledged thing is lost, or one is done twice.
    LostOrDuplicated,
    /// A finding whose text contains these words.
    Text(&'static str),
}

/// What a case is given.
pub(crate) struct Run<'p> {
    /// Servers and services. At the start of each case all are running, with the settings of
    /// `.env`.
    pub(crate) platform: &'p mut Platform,
    /// Whether this is the long form.
    pub(crate) long: bool,
    /// Length of the soak.
    pub(crate) minutes: u64,
    /// Whether this is the control: the protection in [`Case::control`] is to be removed.
    pub(crate) control: bool,
    /// For every random choice.
    pub(crate) random: fastrand::Rng,
    /// How the ids of everything that this run sends begin.
    pub(crate) tag: String,
}

impl Run<'_> {
    /// The first in the short form, the second in the long one.
    pub(crate) fn short_or_long<T>(&self, short: T, long: T) -> T {
        if self.long { long } else { short }
    }
}

/// What a case has counted and found.
#[derive(Default)]
pub(crate) struct Outcome {
    /// What was sent, for the table: "8 clients".
    pub(crate) load: String,
    /// How many faults were injected.
    pub(crate) faults: usize,
    /// Responses to requests that change no table.
    pub(crate) answered: usize,
    /// Things that were acknowledged to clients.
    pub(crate) acknowledged: usize,
    /// Things of this run that are in the tables.
    pub(crate) found: usize,
    /// Acknowledged and not in the tables.
    pub(crate) lost: usize,
    /// In the tables more than once.
    pub(crate) duplicated: usize,
    /// The longest time without an acknowledgement.
    pub(crate) longest_pause: Duration,
    /// The most resident memory of all services together, in bytes.
    pub(crate) peak_memory: u64,
    /// Everything else that must not happen.
    pub(crate) findings: Vec<String>,
    /// The case panicked.
    panicked: bool,
}

impl Outcome {
    /// The outcome of a case before it begins; `load` is what it sends, for the table.
    pub(crate) fn new(load: impl Into<String>) -> Outcome {
        Outcome { load: load.into(), ..Outcome::default() }
    }

    fn has(&self, expected: &ExpectedFinding) -> bool {
        match expected {
            ExpectedFinding::LostOrDuplicated => self.lost > 0 || self.duplicated > 0,
            ExpectedFinding::Text(words) => self.findings.iter().any(|text| text.contains(words)),
        }
    }

    /// Compares orders that all have this user with the table by their number: at least those
    /// that were acknowledged must be there, and at most those that were sent.
    pub(crate) fn reconcile_count(
        &mut self,
        platform: &Platform,
        user: &str,
        acknowledged: usize,
        sent: usize,
    ) {
        platform.wait_for_empty_queue();
        let count = "select count(*) from orders where user_id = $1";
        let row = platform.connect("BILLING_DB_NAME").query_one(count, &[&user]).unwrap();
        let found = row.get::<_, i64>(0) as usize;
        self.acknowledged += acknowledged;
        self.found += found;
        self.lost += acknowledged.saturating_sub(found);
        self.duplicated += found.saturating_sub(sent);
    }

    /// For cases that kill no service: a service that ended by itself was started again, and
    /// nothing else would show it.
    pub(crate) fn assert_no_unexpected_exit(&mut self, platform: &Platform) {
        for (name, service) in platform.services() {
            if service.unexpected_exits() > 0 {
                let times = service.unexpected_exits();
                self.findings.push(format!("{name} ended {times} times by itself"));
            }
        }
    }

    fn row(&self, name: &str) -> String {
        let load = match self.answered {
            0 => self.load.clone(),
            answered => format!("{}, {answered} answered", self.load),
        };
        let measured = |value: f64, unit| match value {
            0.0 => "-".to_owned(),
            value => format!("{value:.1} {unit}"),
        };
        format!(
            "{name:<28} {load:<40} {:>6} {:>12} {:>8} {:>5} {:>10} {:>10} {:>10}",
            self.faults,
            self.acknowledged,
            self.found,
            self.lost,
            self.duplicated,
            measured(self.longest_pause.as_secs_f64(), "s"),
            measured(self.peak_memory as f64 / 1e6, "MB"),
        )
    }
}

struct Options {
    cases: Vec<String>,
    long: bool,
    seed: u64,
    minutes: Option<u64>,
    controls: bool,
}

fn all_cases() -> impl Iterator<Item = &'static Case> {
    CASES.iter().copied().flatten()
}

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == mutants::ARGUMENT) {
        return mutants::run(&arguments.remove(1));
    }
    let options = match read_options(arguments) {
        Ok(options) => options,
        Err(code) => return code,
    };
    let chosen = all_cases().filter(|case| {
        let named = options.cases.iter().any(|name| case.name.starts_with(name.as_str()));
        named || (options.cases.is_empty() && (case.short || options.long))
    });
    println!("seed {}", options.seed);
    let mut platform = Platform::start();
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    for case in chosen {
        let (row, findings) = run_case(case, &options, &mut platform);
        println!("  {row}");
        rows.push(row);
        if !findings.is_empty() {
            failed.push(case.name);
        }
        for finding in findings {
            println!("  FINDING {}: {finding}", case.name);
        }
    }
    println!(
        "\n{:<28} {:<40} {:>6} {:>12} {:>8} {:>5} {:>10} {:>10} {:>10}",
        "case", "load", "faults", "acknowledged", "found", "lost", "duplicated", "pause", "memory"
    );
    rows.iter().for_each(|row| println!("{row}"));
    println!("{} cases, {} failed {failed:?}, seed {}", rows.len(), failed.len(), options.seed);
    if failed.is_empty() && !rows.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn read_options(arguments: Vec<String>) -> Result<Options, ExitCode> {
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seed = u64::from(clock.subsec_nanos());
    let mut options =
        Options { cases: Vec::new(), long: false, seed, minutes: None, controls: true };
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--long" => options.long = true,
            "--no-controls" => options.controls = false,
            "--seed" => {
                let seed = arguments.next().and_then(|seed| seed.parse().ok());
                options.seed = seed.ok_or_else(|| usage_error("--seed needs a number"))?;
            }
            "--minutes" => {
                let minutes = arguments.next().and_then(|minutes| minutes.parse().ok());
                options.minutes =
                    Some(minutes.ok_or_else(|| usage_error("--minutes needs a number"))?);
            }
            "--list" => {
                for case in all_cases() {
                    let form = if case.short { "" } else { " (long form)" };
                    println!("{:<28} control: {}{form}", case.name, case.control);
                }
                return Err(ExitCode::SUCCESS);
            }
            "--help" => {
                println!("{USAGE}");
                return Err(ExitCode::SUCCESS);
            }
            name if all_cases().any(|case| case.name.starts_with(name)) => {
                options.cases.push(argument);
            }
            unknown => return Err(usage_error(&format!("there is no case {unknown}"))),
        }
    }
    Ok(options)
}

fn usage_error(text: &str) -> ExitCode {
    eprintln!("{text}\n\n{USAGE}");
    ExitCode::from(2)
}

/// Runs a case and its control; the row of the table, and what was found.
fn run_case(case: &Case, options: &Options, platform: &mut Platform) -> (String, Vec<String>) {
    let mut runs = 0;
    let mut once = |control: bool| {
        runs += 1;
        let mut hasher = DefaultHasher::new();
        (options.seed, case.name).hash(&mut hasher);
        let random = fastrand::Rng::with_seed(hasher.finish());
        // The same servers may have had another run with the same seed.
        let name = format!("{}{}", case.name, if control { "-control" } else { "" });
        let tag = format!("{name}-{}-{runs}", process::id());
        let started_at = Instant::now();
        let minutes = options.minutes.unwrap_or(if options.long { 30 } else { 2 });
        let limit = if options.long { 1800 + 60 * minutes } else { 300 };
        let _guard = exit_after(name.clone(), Duration::from_secs(limit));
        print!("{name} … ");
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            platform.restore();
            (case.run)(&mut Run {
                platform: &mut *platform,
                long: options.long,
                minutes,
                control,
                random,
                tag,
            })
        }));
        println!("{:.1} s", started_at.elapsed().as_secs_f64());
        outcome.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            let findings = vec![text.unwrap_or("it panicked").to_owned()];
            Outcome { findings, panicked: true, ..Outcome::default() }
        })
    };
    let outcome = once(false);
    let mut findings = outcome.findings.clone();
    if outcome.lost > 0 || outcome.duplicated > 0 {
        findings.push(format!("{} lost, {} duplicated", outcome.lost, outcome.duplicated));
    }
    findings.truncate(10);
    if options.controls {
        // A control may need more than one run, such as for a kill at the right moment.
        let mut control = once(true);
        for _ in 0..2 {
            if !control.panicked && !control.has(&case.expects) {
                control = once(true);
            }
        }
        let first = control.findings.first();
        let found = format!("{} lost, {} duplicated, {first:?}", control.lost, control.duplicated);
        if control.panicked {
            findings.push(format!("the control panicked: {found}"));
        } else if control.has(&case.expects) {
            println!("  the control found: {found}");
        } else {
            let removed = case.control;
            findings.push(format!("the control found nothing without {removed}: {found}"));
        }
    }
    (outcome.row(case.name), findings)
}

/// Ends this process and its children when a case takes longer than `limit`, unless the guard is
/// dropped before.
fn exit_after(name: String, limit: Duration) -> mpsc::Sender<()> {
    let (guard, ended) = mpsc::channel();
    thread::spawn(move || {
        if ended.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{name} does not end: given up after {limit:?}");
            for child in children() {
                let _ = signal(child, "KILL");
            }
            process::exit(1);
        }
    });
    guard
}

/// The processes that this one has started.
fn children() -> Vec<u32> {
    let list = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("children")).ok();
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists: Vec<String> = tasks.filter_map(list).collect();
    let pids = lists.iter().flat_map(|list| list.split_whitespace());
    pids.filter_map(|pid| pid.parse().ok()).collect()
}
