//! Orders and movies while processes and servers are killed.

use std::thread;
use std::time::Duration;

use crate::load::{Load, What};
use crate::platform::Program;
use crate::{Case, Finds, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "all-killed-in-turn",
        control: "the confirm: a gateway that answers 200 as soon as it has sent",
        finds: Finds::Loss,
        short: true,
        run: all_killed_in_turn,
    },
    Case {
        name: "billing-killed",
        control: "the acknowledgement after the commit: a consumer that has acknowledged before",
        finds: Finds::Loss,
        short: true,
        run: billing_killed,
    },
];

fn all_killed_in_turn(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome { load: "8 clients".into(), ..Outcome::default() };
    if run.control {
        run.platform.gateway.replace(Program::Careless);
    }
    let platform = &*run.platform;
    let orders = Load::start(platform, What::Orders, &run.tag, 4);
    let movies = Load::start(platform, What::Movies, &run.tag, if run.control { 0 } else { 4 });
    let memory = platform.watch_memory();
    let flow = |fault: &str| {
        orders.flows_again_after(fault);
        movies.flows_again_after(fault);
    };
    let crash = |server: &str| {
        platform.servers("kill", &[server]);
        thread::park_timeout(Duration::from_millis(500));
        platform.servers("start", &[]);
    };
    flow("the start");
    if run.control {
        // So that something waits in the queue when the broker dies.
        platform.billing.signal("STOP");
        flow("billing was stopped");
        crash("rabbitmq");
        platform.billing.signal("CONT");
        outcome.faults = 1;
    }
    for _ in 0..if run.control { 0 } else { run.either(1, 5) } {
        for (name, service) in platform.services() {
            service.kill();
            flow(name);
        }
        for server in ["postgres", "rabbitmq"] {
            crash(server);
            flow(server);
        }
        outcome.faults += 5;
    }
    movies.settle(platform, &mut outcome);
    orders.settle(platform, &mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

fn billing_killed(run: &mut Run<'_>) -> Outcome {
    let messages = run.either(10_000, 100_000);
    let kills = run.either(10, 50);
    let mut outcome = Outcome { load: format!("{messages} orders"), ..Outcome::default() };
    if run.control {
        run.platform.billing.replace(Program::Careless);
    }
    let platform = &*run.platform;
    let orders = Load::start_limited(platform, What::Orders, &run.tag, 16, messages);
    let memory = platform.watch_memory();
    for kill in 1..=kills {
        // At a random moment of each part of the stream.
        let part = messages / kills;
        let moment = part * (kill - 1) + run.random.usize(0..part);
        chassis::testing::eventually(format!("{moment} orders are posted"), 300, || {
            (orders.acknowledged() >= moment || orders.is_over()).then_some(())
        });
        platform.billing.kill();
        outcome.faults += 1;
    }
    orders.await_end(300);
    orders.settle(platform, &mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}
