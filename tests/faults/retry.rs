//! Clients that repeat every order until it is acknowledged, through everything.

use std::thread;
use std::time::Duration;

use fastrand::Rng;

use crate::load::{Load, What};
use crate::outage::{set_up, suffer};
use crate::platform::{Platform, Program};
use crate::{Case, Finds, Outcome, Run, broker, database};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "gateway-killed",
        control: "the Idempotency-Key of clients that repeat",
        finds: Finds::Loss,
        short: true,
        run: gateway_killed,
    },
    Case {
        name: "repeated-through-all",
        control: "the Idempotency-Key of clients that repeat",
        finds: Finds::Loss,
        short: false,
        run: repeated_through_all,
    },
];

/// At moments between publish and answer, among others.
fn gateway_killed(run: &mut Run<'_>) -> Outcome {
    let kills = run.either(10, 100);
    let mut outcome = Outcome { load: "16 clients".into(), faults: kills, ..Outcome::default() };
    let mut random = run.random.clone();
    let orders = stubborn(run, 16);
    let memory = run.platform.watch_memory();
    for _ in 0..kills {
        orders.flows_again_after("the gateway was killed");
        kill_gateway(run.platform, &mut random);
    }
    orders.flows_again_after("the gateway was killed");
    orders.settle(run.platform, &mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

/// Every fault of broker and database after the other, and gateway and billing killed in each.
/// Not the deletions of the queue: what was acknowledged is gone with it.
fn repeated_through_all(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome { load: "12 clients".into(), ..Outcome::default() };
    set_up(run, Program::Real);
    let mut random = run.random.clone();
    let platform = &*run.platform;
    let stubborn = stubborn(run, 4);
    let orders = Load::start(platform, What::Orders, &format!("once-{}", run.tag), 4);
    let movies = Load::start(platform, What::Movies, &run.tag, 4);
    let memory = platform.watch_memory();
    let all = broker::FAULTS.iter().chain(database::FAULTS);
    // Without the key the first few are enough.
    for fault in all.take(if run.control { 2 } else { usize::MAX }) {
        for load in [&stubborn, &orders] {
            load.flows_again_after("the start");
        }
        let gateway = platform.gateway.pid();
        kill_gateway(platform, &mut random);
        let meanwhile = Duration::from_millis(random.u64(500..3_000));
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::park_timeout(meanwhile);
                platform.billing.kill();
            });
            // How it is when it lasts long, its own case shows.
            let hold = fault.hold_ms.0;
            suffer(run, fault, hold, &[&stubborn, &orders, &movies], gateway, &mut outcome);
        });
        kill_gateway(platform, &mut random);
        outcome.faults += 4;
    }
    let mut loads = [movies, orders, stubborn];
    // All of them, or the queue is hardly ever empty.
    loads.iter_mut().for_each(Load::end);
    for load in loads {
        load.settle(platform, &mut outcome);
    }
    outcome.peak_memory = memory.peak();
    outcome
}

fn stubborn(run: &Run<'_>, clients: usize) -> Load {
    let what = match run.control {
        false => What::StubbornOrders,
        true => What::StubbornOrdersWithoutKey,
    };
    Load::start(run.platform, what, &run.tag, clients)
}

fn kill_gateway(platform: &Platform, random: &mut Rng) {
    thread::park_timeout(Duration::from_millis(random.u64(0..100)));
    platform.gateway.kill();
}
