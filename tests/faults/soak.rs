//! Long at 60 %: descriptors, threads and memory stay where they are.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use crate::clients::order;
use crate::overload::Generator;
use crate::platform::{Program, descriptors, resident};
use crate::slow::{Target, all_threads_are_back};
use crate::{Case, Finds, Outcome, Run};

pub(crate) const CASES: &[Case] = &[Case {
    name: "soak",
    control: "giving back: an inventory that keeps 4 KB a request and a descriptor now and then",
    finds: Finds::Fault("grew from"),
    short: false,
    run: soak,
}];

/// The part of what can be served for long.
const PART: f64 = 0.6;

/// Samples of a run; the second and the last fifth are compared.
const SAMPLES: usize = 50;

/// What is watched of a service: its name, and by how much the mean of the last fifth may
/// be above that of the second: by a part, and by so many.
///
/// Threads are as many as the clients had connections in their worst moment, so these must
/// be as before when the clients have gone.
const WATCHED: [(&str, f64, f64); 2] = [("descriptors", 0.05, 4.0), ("KiB", 0.05, 1024.0)];

/// Connections of each load: with more the house would be full in a bad moment, and that is
/// what `overload` is about.
const CONNECTIONS: usize = 96;

fn soak(run: &mut Run<'_>) -> Outcome {
    // The careless service shows soon what it is.
    let seconds = if run.control { 30 } else { run.minutes * 60 };
    let whole = Duration::from_secs(seconds);
    let mut outcome =
        Outcome { load: format!("60 % for {} s", whole.as_secs()), ..Outcome::default() };
    let address = run.platform.stack.address;
    let target = |port| SocketAddr::from((address, port));
    let read = "GET /api/movies?limit=20 HTTP/1.1\r\nHost: load\r\n\r\n".as_bytes();
    let order = order(&run.tag, true);
    let mut loads = match run.control {
        true => {
            run.platform.inventory.replace(Program::Careless);
            vec![Generator::new(target(8080), read)]
        }
        false => vec![Generator::new(target(3000), read), Generator::new(target(3000), &order)],
    };
    for load in &mut loads {
        load.connections = CONNECTIONS;
    }
    // Anew, so that no thread of an earlier case is counted.
    if !run.control {
        run.platform.inventory.replace(Program::Real);
        run.platform.gateway.replace(Program::Real);
        run.platform.wait_until_ready();
    }
    let platform = &*run.platform;
    let targets = ["gateway", "inventory"].map(|name| Target::new(platform, name));
    let memory = platform.watch_memory();
    let warm = Duration::from_secs(3);
    let part = PART / loads.len() as f64;
    let rates: Vec<f64> = loads.iter_mut().map(|load| part * load.sustained(warm)).collect();
    let (mut due, mut good) = (0, 0);
    let services =
        if run.control { &["inventory"][..] } else { &["gateway", "inventory", "billing"] };
    let mut samples: Vec<Vec<f64>> = Vec::new();
    let begun = Instant::now();
    for _ in 0..SAMPLES {
        // All at once: each takes its part of the 60 %.
        thread::scope(|scope| {
            let started = loads
                .iter_mut()
                .zip(&rates)
                .map(|(load, rate)| scope.spawn(|| load.open_loop(*rate, whole / SAMPLES as u32)));
            for seen in started.collect::<Vec<_>>() {
                let seen = seen.join().unwrap();
                due += seen.due();
                good += seen.good.len();
            }
        });
        let looked = services.iter().flat_map(|service| {
            let pid = platform.pid(service);
            [descriptors(pid) as f64, resident(pid) as f64 / 1024.0]
        });
        samples.push(looked.collect());
    }
    println!(
        "  {} samples in {:.0?}, rates {rates:.0?}/s, {good} good of {due}",
        samples.len(),
        begun.elapsed()
    );
    for (column, (service, (what, part, number))) in
        services.iter().flat_map(|service| WATCHED.map(|watched| (service, watched))).enumerate()
    {
        let series: Vec<f64> = samples.iter().map(|sample| sample[column]).collect();
        let (before, after) = second_and_last_fifth(&series);
        println!("  {service}: {what} {before:.0} then {after:.0}");
        if after > before * (1.0 + part) + number {
            outcome.wrong.push(format!("{service}: {what} grew from {before:.0} to {after:.0}"));
        }
    }
    outcome.peak_memory = memory.peak();
    if !run.control {
        if good * 100 < due * 99 {
            outcome.wrong.push(format!("{good} of {due} were served"));
        }
        for target in &targets {
            all_threads_are_back(platform, target);
        }
        let [reads, orders] = &loads[..] else { unreachable!("both loads") };
        outcome.answered = reads.good;
        outcome.settle_equal(platform, &run.tag, orders.good, orders.sent);
        outcome.nobody_has_ended(platform);
        // Millions, which would slow down whatever looks at these tables after it.
        let forget = "truncate orders, processed_messages";
        platform.connect("BILLING_DB_NAME").batch_execute(forget).unwrap();
    }
    outcome
}

/// The means of these two parts.
fn second_and_last_fifth(series: &[f64]) -> (f64, f64) {
    let fifth = series.len() / 5;
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    (mean(&series[fifth..2 * fifth]), mean(&series[series.len() - fifth..]))
}
