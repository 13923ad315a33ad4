//! Orders and movies are posted while processes and servers are killed.

use std::thread;
use std::time::Duration;

use chassis::testing::eventually;
use harness::load::Workload;

use crate::platform::Program;
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "all-killed-in-turn",
        control: "the confirm: a gateway that answers 200 as soon as it has sent",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: all_killed_in_turn,
    },
    Case {
        name: "billing-killed",
        control: "the acknowledgement after the commit: a billing that acknowledges on delivery",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: billing_killed,
    },
];

fn all_killed_in_turn(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new("8 clients");
    if run.control {
        run.platform.gateway().replace(Program::Mutant);
    }
    let platform = &*run.platform;
    let orders = platform.start_load(Workload::Orders, &run.tag, 4);
    let movies = platform.start_load(Workload::Movies, &run.tag, if run.control { 0 } else { 4 });
    let memory = platform.sample_memory();
    let wait_for_progress_after = |fault: &str| {
        orders.wait_for_progress_after(fault);
        movies.wait_for_progress_after(fault);
    };
    let crash = |server: &str| {
        platform.servers("kill", &[server]);
        thread::park_timeout(Duration::from_millis(500));
        platform.servers("start", &[]);
    };
    wait_for_progress_after("the start");
    if run.control {
        // So that messages are in the queue when the broker is killed.
        platform.billing().signal("STOP");
        wait_for_progress_after("the stop of billing");
        crash("rabbitmq");
        platform.billing().signal("CONT");
        outcome.faults = 1;
    }
    for _ in 0..if run.control { 0 } else { run.short_or_long(1, 5) } {
        for (name, service) in platform.services() {
            service.kill();
            wait_for_progress_after(&format!("the kill of {name}"));
            outcome.faults += 1;
        }
        for server in ["postgres", "rabbitmq"] {
            crash(server);
            wait_for_progress_after(&format!("the kill of {server}"));
            outcome.faults += 1;
        }
    }
    platform.reconcile(movies, &mut outcome);
    platform.reconcile(orders, &mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

fn billing_killed(run: &mut Run<'_>) -> Outcome {
    let messages = run.short_or_long(10_000, 100_000);
    let kills = run.short_or_long(10, 50);
    let mut outcome = Outcome::new(format!("{messages} orders"));
    if run.control {
        run.platform.billing().replace(Program::Mutant);
    }
    let platform = &*run.platform;
    let orders = platform.start_limited_load(Workload::Orders, &run.tag, 16, messages);
    let memory = platform.sample_memory();
    for kill in 1..=kills {
        // At a random moment of each part of the stream.
        let part = messages / kills;
        let moment = part * (kill - 1) + run.random.usize(0..part);
        eventually(format!("{moment} orders are posted"), 300, || {
            (orders.acknowledged() >= moment || orders.is_finished()).then_some(())
        });
        platform.billing().kill();
        outcome.faults += 1;
    }
    orders.wait_until_finished(300);
    platform.reconcile(orders, &mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}
