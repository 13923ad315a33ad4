//! RabbitMQ is hurt while orders are published and consumed.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, Channel, Exchange, Publish, QueueDeleteOptions};
use chassis::Env;
use chassis::testing::{eventually, management_api, test_var};
use serde_json::Value;

use crate::database::LOCKED as DATABASE_LOCKED;
use crate::load::{Load, RECOVERY, What};
use crate::outage::{Fault, case, outage};
use crate::platform::{Platform, Program, wait_until};
use crate::{Case, Finds, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    case(&KILLED, |run| outage(run, &KILLED)),
    case(&RESTARTED, |run| outage(run, &RESTARTED)),
    case(&STOPPED, |run| outage(run, &STOPPED)),
    case(&MEMORY_ALARM, |run| outage(run, &MEMORY_ALARM)),
    case(&DISK_ALARM, |run| outage(run, &DISK_ALARM)),
    case(&PASSWORDS_CHANGED, |run| outage(run, &PASSWORDS_CHANGED)),
    case(&NEVER_ANSWERS, |run| outage(run, &NEVER_ANSWERS)),
    Case {
        name: "broker-queue-purged",
        control: "the broker's count of what was purged",
        finds: Finds::Loss,
        short: true,
        run: queue_purged,
    },
    Case {
        name: "broker-queue-deleted",
        control: "the broker's count of what was deleted",
        finds: Finds::Loss,
        short: true,
        run: queue_deleted,
    },
    Case {
        name: "broker-without-policy",
        control: "billing's own way to the dead letters: a consumer that rejects",
        finds: Finds::Fault("bad ones are in the dead letters"),
        short: true,
        run: without_policy,
    },
    Case {
        name: "billing-crash-loops",
        control: "the acknowledgement after the commit: a consumer that has acknowledged before",
        finds: Finds::Loss,
        short: true,
        run: crash_loop,
    },
];

/// Those that lose nothing which was acknowledged.
pub(crate) const FAULTS: &[&Fault] = &[
    &KILLED,
    &RESTARTED,
    &STOPPED,
    &MEMORY_ALARM,
    &DISK_ALARM,
    &PASSWORDS_CHANGED,
    &NEVER_ANSWERS,
];

const BOTH: &[&str] = &["gateway", "billing"];

const KILLED: Fault = Fault {
    name: "broker-killed",
    hold_ms: (500, 3_000),
    unhurt: What::Movies,
    noticed_by: BOTH,
    logged: "",
    inject: |platform| {
        platform.servers("kill", &["rabbitmq"]);
        Box::new(|platform| drop(platform.servers("start", &[])))
    },
};

const RESTARTED: Fault = Fault {
    name: "broker-restarted",
    hold_ms: (0, 3_000),
    unhurt: What::Movies,
    noticed_by: BOTH,
    logged: "",
    inject: |platform| {
        platform.servers("stop", &["rabbitmq"]);
        Box::new(|platform| drop(platform.servers("start", &[])))
    },
};

const STOPPED: Fault = Fault {
    name: "broker-stopped",
    hold_ms: (3_000, 20_000),
    unhurt: What::Movies,
    noticed_by: BOTH,
    logged: "",
    inject: |platform| {
        platform.servers("kill", &["rabbitmq", "STOP"]);
        Box::new(|platform| drop(platform.servers("kill", &["rabbitmq", "CONT"])))
    },
};

const MEMORY_ALARM: Fault = Fault {
    name: "broker-memory-alarm",
    hold_ms: (500, 20_000),
    unhurt: What::Movies,
    noticed_by: &["gateway"],
    logged: "",
    inject: |platform| {
        control(platform, &["set_vm_memory_high_watermark", "0"]);
        Box::new(|platform| control(platform, &["set_vm_memory_high_watermark", "0.4"]))
    },
};

const DISK_ALARM: Fault = Fault {
    name: "broker-disk-alarm",
    hold_ms: (500, 20_000),
    unhurt: What::Movies,
    noticed_by: &["gateway"],
    logged: "",
    inject: |platform| {
        control(platform, &["set_disk_free_limit", "1000000GB"]);
        Box::new(|platform| control(platform, &["set_disk_free_limit", "50MB"]))
    },
};

/// Both logins are refused, and who is in is thrown out.
const PASSWORDS_CHANGED: Fault = Fault {
    name: "broker-passwords-changed",
    hold_ms: (1_000, 10_000),
    unhurt: What::Movies,
    noticed_by: BOTH,
    // Nobody could guess it from a service that only says "not available".
    logged: "invalid credentials",
    inject: |platform| {
        for service in ["GATEWAY", "BILLING"] {
            let user = test_var(&format!("{service}_RABBITMQ_USER"));
            control(platform, &["change_password", &user, "another"]);
        }
        control(platform, &["close_all_connections", "passwords were changed"]);
        Box::new(|platform| {
            for service in ["GATEWAY", "BILLING"] {
                let user = test_var(&format!("{service}_RABBITMQ_USER"));
                let password = test_var(&format!("{service}_RABBITMQ_PASSWORD"));
                control(platform, &["change_password", &user, &password]);
            }
        })
    },
};

/// It accepts connections and says nothing, from before the services start.
const NEVER_ANSWERS: Fault = Fault {
    name: "broker-never-answers",
    hold_ms: (1_000, 20_000),
    unhurt: What::Movies,
    noticed_by: BOTH,
    logged: "",
    inject: |platform| {
        platform.servers("kill", &["rabbitmq", "STOP"]);
        for (_, service) in platform.services() {
            service.kill();
        }
        Box::new(|platform| drop(platform.servers("kill", &["rabbitmq", "CONT"])))
    },
};

/// Every 150 ms it dies, with thousands of orders before it, which for the first deaths somebody
/// keeps from being booked.
fn crash_loop(run: &mut Run<'_>) -> Outcome {
    let (backlog, deaths) = run.either((8_000, 15), (80_000, 100));
    let mut outcome = Outcome { faults: deaths, ..Outcome::default() };
    if run.control {
        run.platform.billing.replace(Program::Careless);
    } else {
        small_batches(run.platform, 2);
    }
    let platform = &*run.platform;
    platform.purge_dead_letters();
    platform.billing.signal("STOP");
    let orders = Load::start_limited(platform, What::Orders, &run.tag, 16, backlog);
    orders.await_end(300);
    let memory = platform.watch_memory();
    let begin = platform.orders(&run.tag).len();
    let mut lock = Some((DATABASE_LOCKED.inject)(platform));
    for death in 0..deaths {
        if death == deaths / 3
            && let Some(unlock) = lock.take()
        {
            unlock(platform);
        }
        let before = platform.billing.pid();
        platform.billing.kill();
        if !run.control {
            eventually("billing consumes", RECOVERY, || {
                let log = platform.billing.log();
                (platform.billing.pid() != before && log.contains("consuming")).then_some(())
            });
        }
        wait_until(Instant::now() + Duration::from_millis(150));
    }
    let progress = platform.orders(&run.tag).len() - begin;
    outcome.load = format!("{backlog} orders, {progress} meanwhile");
    orders.settle(platform, &mut outcome);
    outcome.peak_memory = memory.peak();
    if !run.control && !(1..backlog).contains(&progress) {
        outcome.wrong.push(format!("it booked {progress} of {backlog} while it died"));
    }
    let dead = platform.purge_dead_letters();
    if dead > 0 {
        outcome.wrong.push(format!("{dead} good orders went to the dead letters"));
    }
    outcome
}

/// What an operator purges is gone, and every bit of it shows: in the ledger and in the metrics.
fn queue_purged(run: &mut Run<'_>) -> Outcome {
    let backlog = run.either(500, 20_000);
    let mut outcome = Outcome { faults: 1, ..Outcome::default() };
    small_batches(run.platform, 10);
    let platform = &*run.platform;
    let missing = || {
        let confirmed = platform.metric("gateway", "broker_publishes_total{outcome=\"confirmed\"}");
        let dealt_with = platform.metric("billing", "billing_messages_consumed_total");
        confirmed as i64 - dealt_with as i64
    };
    let before = missing();
    platform.billing.signal("STOP");
    let orders = Load::start_limited(platform, What::Orders, &run.tag, 8, backlog);
    orders.await_end(120);
    let purged = by_hand(|channel, queue| channel.queue_purge(queue).unwrap());
    platform.billing.signal("CONT");
    outcome.load = format!("{backlog} orders, {purged} purged");
    orders.settle(platform, &mut outcome);
    let seen = missing() - before;
    if seen != i64::from(purged) {
        outcome.wrong.push(format!("{purged} were purged, the metrics miss {seen}"));
    }
    excuse(run, &mut outcome, purged as usize, 0);
    let after = Load::start(platform, What::Orders, &format!("after-{}", run.tag), 2);
    after.flows_again_after("the purge");
    after.settle(platform, &mut outcome);
    outcome
}

/// The queue is made anew by whoever misses it first; what was in it is gone.
fn queue_deleted(run: &mut Run<'_>) -> Outcome {
    const CLIENTS: usize = 8;
    let times = run.either(4, 20);
    let mut outcome = Outcome { faults: times, ..Outcome::default() };
    small_batches(run.platform, 10);
    let platform = &*run.platform;
    let orders = Load::start(platform, What::Orders, &run.tag, CLIENTS);
    let mut deleted = 0;
    for time in 0..times {
        orders.flows_again_after("the queue was deleted");
        // With something in it, and the other times mostly empty.
        let full = time % 4 == 0;
        if full {
            platform.billing.signal("STOP");
            orders.flows_again_after("billing was stopped");
            let before = orders.acknowledged();
            eventually("orders wait in the queue", RECOVERY, || {
                (orders.acknowledged() > before + 100).then_some(())
            });
        }
        deleted += by_hand(|channel, queue| {
            channel.queue_delete(queue, QueueDeleteOptions::default()).unwrap() as usize
        });
        if full {
            platform.billing.signal("CONT");
        }
    }
    orders.flows_again_after("the queue was deleted");
    platform.wait_until_ready();
    orders.settle(platform, &mut outcome);
    // The broker confirms also what reaches a queue in the moment of its deletion, and does
    // not count it: of each client at most the one order on its way.
    let unsure = excuse(run, &mut outcome, deleted, times * CLIENTS);
    outcome.load = format!("{deleted} deleted, {unsure} unsure");
    outcome
}

/// What the broker says the operator took away is not lost by us: that many, or up to `unsure`
/// more; how many more. In the control nobody asks the broker.
fn excuse(run: &Run<'_>, outcome: &mut Outcome, taken: usize, unsure: usize) -> usize {
    if run.control {
        return 0;
    }
    if unsure == 0 && outcome.lost != taken {
        outcome.wrong.push(format!("{} are missing, the broker says {taken}", outcome.lost));
    }
    let more = outcome.lost.saturating_sub(taken).min(unsure);
    outcome.lost = outcome.lost.saturating_sub(taken + more);
    more
}

/// Without the policy nobody but billing itself brings the hopeless ones to the dead letters.
fn without_policy(run: &mut Run<'_>) -> Outcome {
    let bad = run.either(50, 2_000);
    let mut outcome = Outcome { load: format!("4 clients, {bad} bad"), ..Outcome::default() };
    let _taken = TakenPolicy::new();
    if run.control {
        run.platform.billing.replace(Program::Careless);
    }
    let platform = &*run.platform;
    platform.purge_dead_letters();
    let orders = Load::start(platform, What::Orders, &run.tag, 4);
    let sent: HashSet<String> = (0..bad).map(|n| format!("{}/bad-{n}", run.tag)).collect();
    by_hand(|channel, queue| {
        let exchange = Exchange::direct(channel);
        for (number, body) in sent.iter().enumerate() {
            let properties = AmqpProperties::default().with_delivery_mode(2);
            let publish = Publish::with_properties(body.as_bytes(), queue, properties);
            exchange.publish(publish).unwrap();
            if number % (bad / 3 + 1) == 0 {
                platform.billing.kill();
                outcome.faults += 1;
            }
        }
    });
    orders.flows_again_after("bad ones came");
    orders.settle(platform, &mut outcome);
    // A kill between the copy and the acknowledgement leaves two copies.
    let dead: HashSet<String> = by_hand(|channel, queue| {
        let dead = format!("{queue}.dead");
        let next = || channel.basic_get(&*dead, true).unwrap();
        std::iter::from_fn(next)
            .map(|got| String::from_utf8_lossy(&got.delivery.body).into_owned())
            .collect()
    });
    if dead != sent {
        outcome.wrong.push(format!("{} of {bad} bad ones are in the dead letters", dead.len()));
    }
    outcome
}

/// The policy of the dead letters, away until this is dropped, also when the case fails.
struct TakenPolicy {
    path: String,
    policy: Value,
}

impl TakenPolicy {
    fn new() -> TakenPolicy {
        let vhost = test_var("RABBITMQ_VHOST").replace('/', "%2F");
        let path = format!("policies/{vhost}/dead-letters");
        let policy = management_api("GET", &path, None);
        management_api("DELETE", &path, None);
        TakenPolicy { path, policy }
    }
}

impl Drop for TakenPolicy {
    fn drop(&mut self) {
        management_api("PUT", &self.path, Some(self.policy.take()));
    }
}

/// Few messages in billing's hands at once, so that the rest is the broker's.
fn small_batches(platform: &Platform, size: u32) {
    let mut stack = platform.stack.clone();
    stack.set("BILLING_BATCH_SIZE", size);
    platform.billing.restart(&stack, Program::Real);
    platform.wait_until_ready();
}

/// What an operator does to the queue on a connection of their own.
fn by_hand<T>(work: impl FnOnce(&Channel, &str) -> T) -> T {
    let mut env =
        Env::from_fn(|name| Some(test_var(&name.replace("OPERATOR_RABBITMQ", "RABBITMQ_ADMIN"))));
    let config = chassis::broker::Config::from_env(&mut env, "OPERATOR");
    let (mut connection, _leash) = config.connect("operator").unwrap();
    let channel = connection.open_channel(None).unwrap();
    let done = work(&channel, &test_var("RABBITMQ_QUEUE"));
    channel.close().unwrap();
    connection.close().unwrap();
    done
}

fn control(platform: &Platform, arguments: &[&str]) {
    platform.servers("rabbitmqctl", arguments);
}
