//! The fault campaign: everything is killed, cut, starved, flooded and fed garbage under
//! load, and what the clients were told is held against the tables.
//!
//! Each case runs twice: once on the real services, where nothing may be lost or done
//! twice, and once with a protection taken away (its control), where the same check must
//! find what comes of that. A case whose control passes proves nothing, and fails.
//!
//! `provision/local faults --help` runs it on servers of its own.

mod broker;
mod careless;
mod clients;
mod database;
mod delivery;
mod hosts;
mod load;
mod network;
mod operations;
mod outage;
mod overload;
mod platform;
mod poison;
mod retry;
mod slow;
mod soak;
mod texts;
mod upstream;

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{self, ExitCode};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use platform::Platform;

/// Every case, in the order in which they run.
const CASES: &[&[Case]] = &[
    delivery::CASES,
    broker::CASES,
    database::CASES,
    retry::CASES,
    slow::CASES,
    upstream::CASES,
    texts::CASES,
    overload::CASES,
    soak::CASES,
    network::CASES,
    hosts::CASES,
    operations::CASES,
    poison::CASES,
];

const USAGE: &str = "\
provision/local faults [CASE…] [--long] [--seed N] [--no-controls]
                       [--minutes N] [--list]

  CASE           those whose name begins so; all of them otherwise
  --long         more of everything: about an hour, without controls
  --seed N       the same random choices as the run that printed N
  --minutes N    how long the soak is, instead of 30 in the long form and two
  --no-controls  without the runs that must fail";

/// One thing that is done to the platform, and what must hold.
pub(crate) struct Case {
    /// What it is called on the command line and in the table.
    pub(crate) name: &'static str,
    /// What is taken away in its control.
    pub(crate) control: &'static str,
    /// What its check must find then. Another fault would be a bad end of the control itself.
    pub(crate) finds: Finds,
    /// Whether the short form has it.
    pub(crate) short: bool,
    /// Does it.
    pub(crate) run: fn(&mut Run<'_>) -> Outcome,
}

/// What is wrong without a protection.
pub(crate) enum Finds {
    /// Something is lost, or done twice.
    Loss,
    /// A fault with these words in it.
    Fault(&'static str),
}

/// What a case is given.
pub(crate) struct Run<'p> {
    /// Servers and services: running, and those of `.env`, at the begin of each case.
    pub(crate) platform: &'p mut Platform,
    /// Whether there is time.
    pub(crate) long: bool,
    /// How long the soak is to be.
    pub(crate) minutes: u64,
    /// Whether the protection that `Case::control` names is to be taken away.
    pub(crate) control: bool,
    /// For every random choice.
    pub(crate) random: fastrand::Rng,
    /// A name that begins the ids of everything this run sends.
    pub(crate) tag: String,
}

impl Run<'_> {
    /// The first in the short form, the second in the long one.
    pub(crate) fn either<T>(&self, short: T, long: T) -> T {
        if self.long { long } else { short }
    }
}

/// What came of a case; the ledger's part is filled by [`load::Ledger::settle`].
#[derive(Default)]
pub(crate) struct Outcome {
    /// What was sent, for the table: "8 clients".
    pub(crate) load: String,
    /// How many faults were injected.
    pub(crate) faults: usize,
    /// Answers to requests that leave nothing in the tables.
    pub(crate) answered: usize,
    /// What clients were told is done.
    pub(crate) acknowledged: usize,
    /// What of it, and of what was refused, is in the tables.
    pub(crate) found: usize,
    /// Acknowledged and not there.
    pub(crate) lost: usize,
    /// There more than once.
    pub(crate) double: usize,
    /// Longest time in which nobody was told that anything is done.
    pub(crate) worst_pause: Duration,
    /// Most resident memory of the three services together, in bytes.
    pub(crate) peak_memory: u64,
    /// Everything else that must not be.
    pub(crate) wrong: Vec<String>,
    /// The case itself did not come to its end.
    broken: bool,
}

impl Outcome {
    fn has(&self, expected: &Finds) -> bool {
        match expected {
            Finds::Loss => self.lost > 0 || self.double > 0,
            Finds::Fault(words) => self.wrong.iter().any(|fault| fault.contains(words)),
        }
    }

    /// Holds orders that all have this user against the table: those that were acknowledged
    /// must be there, and no more than were sent.
    pub(crate) fn settle_equal(
        &mut self,
        platform: &Platform,
        user: &str,
        acknowledged: usize,
        sent: usize,
    ) {
        platform.await_empty_queue();
        let count = "select count(*) from orders where user_id = $1";
        let row = platform.connect("BILLING_DB_NAME").query_one(count, &[&user]).unwrap();
        let found = row.get::<_, i64>(0) as usize;
        self.acknowledged += acknowledged;
        self.found += found;
        self.lost += acknowledged.saturating_sub(found);
        self.double += found.saturating_sub(sent);
    }

    /// Where nobody is killed, nobody may have ended: it would have been started anew unseen.
    pub(crate) fn nobody_has_ended(&mut self, platform: &Platform) {
        for (name, service) in platform.services() {
            if service.deaths() > 0 {
                self.wrong.push(format!("{name} ended {} times by itself", service.deaths()));
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
            "{name:<28} {load:<40} {:>6} {:>12} {:>8} {:>5} {:>6} {:>10} {:>10}",
            self.faults,
            self.acknowledged,
            self.found,
            self.lost,
            self.double,
            measured(self.worst_pause.as_secs_f64(), "s"),
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

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == careless::ARGUMENT) {
        return careless::run(&arguments.remove(1));
    }
    let options = match read_options(arguments) {
        Ok(options) => options,
        Err(code) => return code,
    };
    let chosen = CASES.iter().copied().flatten().filter(|case| {
        let named = options.cases.iter().any(|name| case.name.starts_with(name.as_str()));
        named || (options.cases.is_empty() && (case.short || options.long))
    });
    println!("seed {}", options.seed);
    let mut platform = Platform::start();
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    for case in chosen {
        let (row, faults) = run_case(case, &options, &mut platform);
        println!("  {row}");
        rows.push(row);
        if !faults.is_empty() {
            failed.push(case.name);
        }
        for fault in faults {
            println!("  FAULT {}: {fault}", case.name);
        }
    }
    println!(
        "\n{:<28} {:<40} {:>6} {:>12} {:>8} {:>5} {:>6} {:>10} {:>10}",
        "case", "load", "faults", "acknowledged", "found", "lost", "double", "pause", "memory"
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
                options.seed = seed.ok_or_else(|| complain("--seed wants a number"))?;
            }
            "--minutes" => {
                let minutes = arguments.next().and_then(|minutes| minutes.parse().ok());
                options.minutes =
                    Some(minutes.ok_or_else(|| complain("--minutes wants a number"))?);
            }
            "--list" => {
                for case in CASES.iter().copied().flatten() {
                    let form = if case.short { "" } else { " (long form)" };
                    println!("{:<28} control: {}{form}", case.name, case.control);
                }
                return Err(ExitCode::SUCCESS);
            }
            "--help" => {
                println!("{USAGE}");
                return Err(ExitCode::SUCCESS);
            }
            case if CASES.iter().copied().flatten().any(|known| known.name.starts_with(case)) => {
                options.cases.push(argument);
            }
            unknown => return Err(complain(&format!("there is no case {unknown}"))),
        }
    }
    Ok(options)
}

fn complain(what: &str) -> ExitCode {
    eprintln!("{what}\n\n{USAGE}");
    ExitCode::from(2)
}

/// Runs a case and its control; the row of the table, and what was not as it must be.
fn run_case(case: &Case, options: &Options, platform: &mut Platform) -> (String, Vec<String>) {
    let mut runs = 0;
    let mut once = |control: bool| {
        runs += 1;
        let mut hasher = DefaultHasher::new();
        (options.seed, case.name).hash(&mut hasher);
        let random = fastrand::Rng::with_seed(hasher.finish());
        // The servers may have been through another run with the same seed.
        let name = format!("{}{}", case.name, if control { "-control" } else { "" });
        let tag = format!("{name}-{}-{runs}", process::id());
        let begun = Instant::now();
        let minutes = options.minutes.unwrap_or(if options.long { 30 } else { 2 });
        let limit = if options.long { 1800 + 60 * minutes } else { 300 };
        let _guard = must_end(name.clone(), Duration::from_secs(limit));
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
        println!("{:.1} s", begun.elapsed().as_secs_f64());
        outcome.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            let wrong = vec![text.unwrap_or("it panicked").to_owned()];
            Outcome { wrong, broken: true, ..Outcome::default() }
        })
    };
    let outcome = once(false);
    let mut faults = outcome.wrong.clone();
    if outcome.lost > 0 || outcome.double > 0 {
        faults.push(format!("{} lost, {} double", outcome.lost, outcome.double));
    }
    faults.truncate(10);
    if options.controls {
        // What it must find may need some luck, such as a kill at the right moment.
        let mut control = once(true);
        for _ in 0..2 {
            if !control.broken && !control.has(&case.finds) {
                control = once(true);
            }
        }
        let Outcome { lost, double, wrong, .. } = &control;
        let told = format!("{lost} lost, {double} double, {:?}", wrong.first());
        if control.broken {
            faults.push(format!("the control did not come to its end: {told}"));
        } else if control.has(&case.finds) {
            println!("  found: {told}");
        } else {
            let taken = case.control;
            faults.push(format!(
                "this was taken away, and the check saw nothing of it: {taken}; {told}"
            ));
        }
    }
    (outcome.row(case.name), faults)
}

/// Ends this process, and what it has started, when a case takes longer; until it is dropped.
fn must_end(name: String, limit: Duration) -> mpsc::Sender<()> {
    let (guard, ended) = mpsc::channel();
    thread::spawn(move || {
        if ended.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{name} does not come to its end: giving up after {limit:?}");
            let me = process::id().to_string();
            let _ = process::Command::new("pkill").args(["-KILL", "--parent", &me]).status();
            process::exit(1);
        }
    });
    guard
}
