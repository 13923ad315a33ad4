//! Clients that repeat every order until it is acknowledged, through every fault.

use std::thread;
use std::time::Duration;

use fastrand::Rng;
use harness::load::{Load, Workload};

use crate::outage::{inject_and_recover, set_up};
use crate::platform::{Platform, Program};
use crate::{Case, ExpectedFinding, Outcome, Run, broker, database};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "gateway-killed",
        control: "the Idempotency-Key of clients that repeat",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: gateway_killed,
    },
    Case {
        name: "retried-through-all-faults",
        control: "the Idempotency-Key of clients that repeat",
        expects: ExpectedFinding::LostOrDuplicated,
        short: false,
        run: retried_through_all_faults,
    },
];

/// Some of the kills fall between the publishing of an order and its response.
fn gateway_killed(run: &mut Run<'_>) -> Outcome {
    let kills = run.short_or_long(10, 100);
    let mut outcome = Outcome { faults: kills, ..Outcome::new("16 clients") };
    let mut random = run.random.clone();
    let orders = retried_orders(run, 16);
    let memory = run.platform.sample_memory();
    for _ in 0..kills {
        orders.wait_for_progress_after("the kill of the gateway");
        kill_gateway(run.platform, &mut random);
    }
    orders.wait_for_progress_after("the kill of the gateway");
    run.platform.reconcile(orders, &mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

/// Every fault of the broker and the databases, one after the other, with gateway and billing
/// killed in each. Not the deletion of the queue, which also deletes acknowledged orders.
fn retried_through_all_faults(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new("12 clients");
    set_up(run, Program::Real);
    let mut random = run.random.clone();
    let platform = &*run.platform;
    let retried = retried_orders(run, 4);
    let orders = platform.start_load(Workload::Orders, &format!("once-{}", run.tag), 4);
    let movies = platform.start_load(Workload::Movies, &run.tag, 4);
    let memory = platform.sample_memory();
    let all = broker::FAULTS.iter().chain(database::FAULTS);
    // For the control two are enough.
    for fault in all.take(if run.control { 2 } else { usize::MAX }) {
        for load in [&retried, &orders] {
            load.wait_for_progress_after("the start");
        }
        let gateway = platform.gateway().pid();
        kill_gateway(platform, &mut random);
        let delay = Duration::from_millis(random.u64(500..3_000));
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::park_timeout(delay);
                platform.billing().kill();
            });
            // As short as in the short form: a case of its own has it long.
            let hold = fault.hold_ms.0;
            let loads = [&retried, &orders, &movies];
            inject_and_recover(run, fault, hold, &loads, gateway, &mut outcome);
        });
        kill_gateway(platform, &mut random);
        outcome.faults += 4;
    }
    let mut loads = [movies, orders, retried];
    // All are stopped before the first is reconciled, or the queue is hardly ever empty.
    loads.iter_mut().for_each(Load::stop);
    for load in loads {
        platform.reconcile(load, &mut outcome);
    }
    outcome.peak_memory = memory.peak();
    outcome
}

fn retried_orders(run: &Run<'_>, clients: usize) -> Load {
    let workload = match run.control {
        false => Workload::RetriedOrders,
        true => Workload::RetriedOrdersWithoutKey,
    };
    run.platform.start_load(workload, &run.tag, clients)
}

fn kill_gateway(platform: &Platform, random: &mut Rng) {
    thread::park_timeout(Duration::from_millis(random.u64(0..100)));
    platform.gateway().kill();
}
