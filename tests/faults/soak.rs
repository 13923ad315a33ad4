//! A load of 60 % for a long time: descriptors, threads and memory do not grow.

use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::process::open_fds;
use harness::services::services;

use crate::clients::order_request;
use crate::overload::Generator;
use crate::platform::{Program, resident};
use crate::slow_clients::{Target, wait_until_threads_end};
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[Case {
    name: "soak",
    control: "the release of memory: an inventory that leaks 4 KB a request, and descriptors",
    expects: ExpectedFinding::Text("grew from"),
    short: false,
    run: soak,
}];

/// The share of the highest rate that can be sustained.
const SHARE: f64 = 0.6;

/// The samples of a run; their second and their last fifth are compared.
const SAMPLES: usize = 50;

/// What is sampled of a service: its name, and by how much the mean of the last fifth may exceed
/// that of the second: by a share, and by a number.
///
/// Not the threads: these are as many as the clients had connections in the worst moment, so
/// they are checked when the clients have stopped.
const SAMPLED: [(&str, f64, f64); 2] = [("descriptors", 0.05, 4.0), ("KiB", 0.05, 1024.0)];

/// Connections of each load. With more of them the limit on connections would be reached at times,
/// which is the subject of `overload`.
const CONNECTIONS: usize = 96;

fn soak(run: &mut Run<'_>) -> Outcome {
    // The mutant leaks fast.
    let seconds = if run.control { 30 } else { run.minutes * 60 };
    let whole = Duration::from_secs(seconds);
    let mut outcome = Outcome::new(format!("60 % for {} s", whole.as_secs()));
    let target = |name| run.platform.stack.socket_address(name);
    let read = "GET /api/movies?limit=20 HTTP/1.1\r\nHost: load\r\n\r\n".as_bytes();
    let order = order_request(&run.tag, true);
    let mut loads = match run.control {
        true => {
            run.platform.inventory().replace(Program::Mutant);
            vec![Generator::new(target("inventory"), read)]
        }
        false => {
            vec![Generator::new(target("gateway"), read), Generator::new(target("gateway"), &order)]
        }
    };
    for load in &mut loads {
        load.connections = CONNECTIONS;
    }
    // Restarted, so that no thread of an earlier case is counted.
    if !run.control {
        run.platform.inventory().replace(Program::Real);
        run.platform.gateway().replace(Program::Real);
        run.platform.wait_until_ready();
    }
    let platform = &*run.platform;
    let targets = ["gateway", "inventory"].map(|name| Target::new(platform, name));
    let memory = platform.sample_memory();
    let warm = Duration::from_secs(3);
    let share = SHARE / loads.len() as f64;
    let rates: Vec<f64> = loads.iter_mut().map(|load| share * load.sustained(warm)).collect();
    let (mut due, mut good) = (0, 0);
    let names: Vec<&str> = match run.control {
        true => vec!["inventory"],
        false => services().iter().map(|row| row.name.as_str()).collect(),
    };
    let mut samples: Vec<Vec<f64>> = Vec::new();
    let started_at = Instant::now();
    for _ in 0..SAMPLES {
        // All at once: together they are the 60 %.
        thread::scope(|scope| {
            let started = loads
                .iter_mut()
                .zip(&rates)
                .map(|(load, rate)| scope.spawn(|| load.open_loop(*rate, whole / SAMPLES as u32)));
            for measured in started.collect::<Vec<_>>() {
                let measured = measured.join().unwrap();
                due += measured.due();
                good += measured.good.len();
            }
        });
        let sample = names.iter().flat_map(|service| {
            let pid = platform.pid(service);
            [open_fds(pid) as f64, resident(pid) as f64 / 1024.0]
        });
        samples.push(sample.collect());
    }
    println!(
        "  {} samples in {:.0?}, rates {rates:.0?}/s, {good} good of {due}",
        samples.len(),
        started_at.elapsed()
    );
    for (column, (service, (what, share, number))) in
        names.iter().flat_map(|service| SAMPLED.map(|sampled| (service, sampled))).enumerate()
    {
        let series: Vec<f64> = samples.iter().map(|sample| sample[column]).collect();
        let (before, after) = second_and_last_fifth(&series);
        println!("  {service}: {what} {before:.0} then {after:.0}");
        if after > before * (1.0 + share) + number {
            outcome.findings.push(format!("{service}: {what} grew from {before:.0} to {after:.0}"));
        }
    }
    outcome.peak_memory = memory.peak();
    if !run.control {
        if good * 100 < due * 99 {
            outcome.findings.push(format!("{good} of {due} requests were served in time"));
        }
        for target in &targets {
            wait_until_threads_end(platform, target);
        }
        let [reads, orders] = &loads[..] else { unreachable!("both loads") };
        outcome.answered = reads.good;
        outcome.reconcile_count(platform, &run.tag, orders.good, orders.sent);
        outcome.assert_no_unexpected_exit(platform);
        // Millions of rows, which would slow down the queries of later cases.
        let truncate = "truncate orders, processed_messages";
        platform.connect("BILLING_DB_NAME").batch_execute(truncate).unwrap();
    }
    outcome
}

/// The means of the second and the last fifth.
fn second_and_last_fifth(series: &[f64]) -> (f64, f64) {
    let fifth = series.len() / 5;
    let mean = |samples: &[f64]| samples.iter().sum::<f64>() / samples.len().max(1) as f64;
    (mean(&series[fifth..2 * fifth]), mean(&series[series.len() - fifth..]))
}
