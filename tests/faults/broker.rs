//! Faults of RabbitMQ while orders are published and consumed.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, Channel, Exchange, Publish, QueueDeleteOptions};
use chassis::Env;
use chassis::testing::{eventually, management_api, test_var, vhost_path};
use harness::load::{RECOVERY_S, Workload};
use serde_json::Value;

use crate::database::LOCKED as DATABASE_LOCKED;
use crate::outage::{Fault, case, outage};
use crate::platform::{Platform, Program, wait_until};
use crate::{Case, ExpectedFinding, Outcome, Run};

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
        control: "the broker's count of purged messages",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: queue_purged,
    },
    Case {
        name: "broker-queue-deleted",
        control: "the broker's count of deleted messages",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: queue_deleted,
    },
    Case {
        name: "broker-without-policy",
        control: "billing's own publishing of dead letters: a billing that loses them",
        expects: ExpectedFinding::Text("invalid messages are dead letters"),
        short: true,
        run: without_policy,
    },
    Case {
        name: "billing-crash-loops",
        control: "the acknowledgement after the commit: a billing that acknowledges on delivery",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: crash_loop,
    },
];

/// The faults that lose no acknowledged order.
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
    unaffected: Workload::Movies,
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
    unaffected: Workload::Movies,
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
    unaffected: Workload::Movies,
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
    unaffected: Workload::Movies,
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
    unaffected: Workload::Movies,
    noticed_by: &["gateway"],
    logged: "",
    inject: |platform| {
        control(platform, &["set_disk_free_limit", "1000000GB"]);
        Box::new(|platform| control(platform, &["set_disk_free_limit", "50MB"]))
    },
};

/// Both logins are refused, and the open connections are closed.
const PASSWORDS_CHANGED: Fault = Fault {
    name: "broker-passwords-changed",
    hold_ms: (1_000, 10_000),
    unaffected: Workload::Movies,
    noticed_by: BOTH,
    // "not available" would not say what an operator has to do.
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

/// It accepts connections and sends nothing, also to services that start.
const NEVER_ANSWERS: Fault = Fault {
    name: "broker-never-answers",
    hold_ms: (1_000, 20_000),
    unaffected: Workload::Movies,
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

/// Billing is killed every 150 ms with thousands of orders in the queue. During the first third of
/// the kills a lock on the table keeps all of them from being booked.
fn crash_loop(run: &mut Run<'_>) -> Outcome {
    let (backlog, kills) = run.short_or_long((8_000, 15), (80_000, 100));
    let mut outcome = Outcome { faults: kills, ..Outcome::default() };
    if run.control {
        run.platform.billing().replace(Program::Mutant);
    } else {
        small_batches(run.platform, 2);
    }
    let platform = &*run.platform;
    platform.purge_dead_letters();
    platform.billing().signal("STOP");
    let orders = platform.start_limited_load(Workload::Orders, &run.tag, 16, backlog);
    orders.wait_until_finished(300);
    let memory = platform.sample_memory();
    let booked_before = platform.orders(&run.tag).len();
    let mut lock = Some((DATABASE_LOCKED.inject)(platform));
    for kill in 0..kills {
        if kill == kills / 3
            && let Some(unlock) = lock.take()
        {
            unlock(platform);
        }
        let before = platform.billing().pid();
        platform.billing().kill();
        if !run.control {
            eventually("billing consumes", RECOVERY_S, || {
                let log = platform.billing().log();
                (platform.billing().pid() != before && log.contains("consuming")).then_some(())
            });
        }
        wait_until(Instant::now() + Duration::from_millis(150));
    }
    let progress = platform.orders(&run.tag).len() - booked_before;
    outcome.load = format!("{backlog} orders, {progress} booked meanwhile");
    platform.reconcile(orders, &mut outcome);
    outcome.peak_memory = memory.peak();
    if !run.control && !(1..backlog).contains(&progress) {
        outcome
            .findings
            .push(format!("billing booked {progress} of {backlog} while it was killed"));
    }
    let dead = platform.purge_dead_letters();
    if dead > 0 {
        outcome.findings.push(format!("{dead} valid orders became dead letters"));
    }
    outcome
}

/// Messages that an operator purges are lost, and the ledger and the metrics show exactly as many.
fn queue_purged(run: &mut Run<'_>) -> Outcome {
    let backlog = run.short_or_long(500, 20_000);
    let mut outcome = Outcome { faults: 1, ..Outcome::default() };
    small_batches(run.platform, 10);
    let platform = &*run.platform;
    let missing = || {
        let confirmed = platform.metric("gateway", "broker_publishes_total{outcome=\"confirmed\"}");
        let consumed = platform.metric("billing", "billing_messages_consumed_total");
        confirmed as i64 - consumed as i64
    };
    let before = missing();
    platform.billing().signal("STOP");
    let orders = platform.start_limited_load(Workload::Orders, &run.tag, 8, backlog);
    orders.wait_until_finished(120);
    let purged = as_operator(|channel, queue| channel.queue_purge(queue).unwrap());
    platform.billing().signal("CONT");
    outcome.load = format!("{backlog} orders, {purged} purged");
    platform.reconcile(orders, &mut outcome);
    let counted = missing() - before;
    if counted != i64::from(purged) {
        outcome.findings.push(format!("{purged} messages were purged, the metrics show {counted}"));
    }
    allow_removed(run, &mut outcome, purged as usize, 0);
    let after = platform.start_load(Workload::Orders, &format!("after-{}", run.tag), 2);
    after.wait_for_progress_after("the purge");
    platform.reconcile(after, &mut outcome);
    outcome
}

/// The service that first misses the queue declares it again; the messages in it are lost.
fn queue_deleted(run: &mut Run<'_>) -> Outcome {
    const CLIENTS: usize = 8;
    let times = run.short_or_long(4, 20);
    let mut outcome = Outcome { faults: times, ..Outcome::default() };
    small_batches(run.platform, 10);
    let platform = &*run.platform;
    let orders = platform.start_load(Workload::Orders, &run.tag, CLIENTS);
    let mut deleted = 0;
    for time in 0..times {
        orders.wait_for_progress_after("the queue was deleted");
        // With orders in it once in four times, otherwise mostly empty.
        let full = time % 4 == 0;
        if full {
            platform.billing().signal("STOP");
            orders.wait_for_progress_after("billing was stopped");
            let before = orders.acknowledged();
            eventually("orders wait in the queue", RECOVERY_S, || {
                (orders.acknowledged() > before + 100).then_some(())
            });
        }
        deleted += as_operator(|channel, queue| {
            channel.queue_delete(queue, QueueDeleteOptions::default()).unwrap() as usize
        });
        if full {
            platform.billing().signal("CONT");
        }
    }
    orders.wait_for_progress_after("the queue was deleted");
    platform.wait_until_ready();
    platform.reconcile(orders, &mut outcome);
    // The broker confirms, too, a message that arrives while the queue is being deleted, and does
    // not count it as deleted. That can be the one order in flight of each client.
    let uncounted = allow_removed(run, &mut outcome, deleted, times * CLIENTS);
    outcome.load = format!("{deleted} deleted, {uncounted} uncounted");
    outcome
}

/// Takes from the lost orders those that the operator removed, by the broker's count, and up to
/// `uncounted` more; returns how many more. The control does not.
fn allow_removed(run: &Run<'_>, outcome: &mut Outcome, removed: usize, uncounted: usize) -> usize {
    if run.control {
        return 0;
    }
    if uncounted == 0 && outcome.lost != removed {
        let finding = format!("{} are missing, the broker removed {removed}", outcome.lost);
        outcome.findings.push(finding);
    }
    let more = outcome.lost.saturating_sub(removed).min(uncounted);
    outcome.lost = outcome.lost.saturating_sub(removed + more);
    more
}

/// Without the policy the broker makes no dead letters: billing publishes invalid messages itself.
fn without_policy(run: &mut Run<'_>) -> Outcome {
    let invalid = run.short_or_long(50, 2_000);
    let mut outcome = Outcome::new(format!("4 clients, {invalid} invalid"));
    let _removed = RemovedPolicy::new();
    if run.control {
        run.platform.billing().replace(Program::Mutant);
    }
    let platform = &*run.platform;
    platform.purge_dead_letters();
    let orders = platform.start_load(Workload::Orders, &run.tag, 4);
    let sent: HashSet<String> = (0..invalid).map(|n| format!("{}/invalid-{n}", run.tag)).collect();
    as_operator(|channel, queue| {
        let exchange = Exchange::direct(channel);
        for (number, body) in sent.iter().enumerate() {
            let properties = AmqpProperties::default().with_delivery_mode(2);
            let publish = Publish::with_properties(body.as_bytes(), queue, properties);
            exchange.publish(publish).unwrap();
            if number % (invalid / 3 + 1) == 0 {
                platform.billing().kill();
                outcome.faults += 1;
            }
        }
    });
    orders.wait_for_progress_after("the invalid messages");
    platform.reconcile(orders, &mut outcome);
    // A set: a kill between the publishing of a dead letter and the acknowledgement leaves two.
    let dead: HashSet<String> = as_operator(|channel, queue| {
        let dead = format!("{queue}.dead");
        let next = || channel.basic_get(&*dead, true).unwrap();
        std::iter::from_fn(next)
            .map(|got| String::from_utf8_lossy(&got.delivery.body).into_owned())
            .collect()
    });
    if dead != sent {
        outcome
            .findings
            .push(format!("{} of {invalid} invalid messages are dead letters", dead.len()));
    }
    outcome
}

/// Removes the policy of the dead letters until it is dropped, also by a panic.
struct RemovedPolicy {
    path: String,
    policy: Value,
}

impl RemovedPolicy {
    fn new() -> RemovedPolicy {
        let path = format!("policies/{}/dead-letters", vhost_path());
        let policy = management_api("GET", &path, None);
        management_api("DELETE", &path, None);
        RemovedPolicy { path, policy }
    }
}

impl Drop for RemovedPolicy {
    fn drop(&mut self) {
        management_api("PUT", &self.path, Some(self.policy.take()));
    }
}

/// Small batches, so that few messages are delivered to billing and the rest stay in the queue.
fn small_batches(platform: &Platform, size: u32) {
    let mut stack = platform.stack.clone();
    stack.set("BILLING_BATCH_SIZE", size);
    platform.billing().restart(&stack, Program::Real);
    platform.wait_until_ready();
}

/// What an operator does to the queue, on a connection of the administrator.
fn as_operator<T>(work: impl FnOnce(&Channel, &str) -> T) -> T {
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
