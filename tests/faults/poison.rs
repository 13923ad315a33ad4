//! Messages that can never be booked, published to the queue by hand.

use std::collections::HashMap;
use std::process::Command;
use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, AmqpValue, Channel, Confirm, Connection, FieldTable, Get, Publish};
use chassis::broker::{self, SocketDeadline};
use chassis::env::Env;
use chassis::testing::{eventually, management_api, test_var};
use crossbeam_channel::Receiver;

use crate::platform::{Platform, Program, resident};
use crate::{Case, ExpectedFinding, Outcome, Run};
use harness::binaries;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "poison",
        control: "the dead letters: a billing that loses them",
        expects: ExpectedFinding::Text("are no dead letters"),
        short: true,
        run: poison,
    },
    Case {
        name: "poison-large",
        control: "the limit for prefetched messages",
        expects: ExpectedFinding::Text("billing takes"),
        short: false,
        run: large,
    },
];

/// One invalid message among this many valid ones.
const ONE_IN: usize = 100;

/// What an invalid message has in the header that billing writes.
const FORGED_REASON: &str = "no reason";

/// How many messages are published before their confirms are awaited.
const WINDOW: usize = 500;

struct Message {
    body: Vec<u8>,
    properties: AmqpProperties,
}

fn poison(run: &mut Run<'_>) -> Outcome {
    let good = run.short_or_long(3_000, 100_000);
    let mut outcome = Outcome::new(format!("{good} orders, 1% invalid"));
    let platform = &*run.platform;
    let dead = format!("{}.dead", test_var("RABBITMQ_QUEUE"));
    platform.purge_dead_letters();
    let orders = |name: &str| {
        let one = |number| {
            // Some values are at the limits.
            let (items, amount) = match number % 10 {
                0 => ("2147483647", "\"999999999999.99\""),
                1 => ("0", "0"),
                _ => ("\"1\"", "1.25"),
            };
            let id = format!("{}-{name}/{number}", run.tag);
            let body = format!(
                "{{\"user_id\":\"{id}\",\"number_of_items\":{items},\"total_amount\":{amount}}}"
            );
            Message { body: body.into(), properties: properties().with_message_id(id) }
        };
        (0..good).map(one).collect::<Vec<Message>>()
    };
    let memory = platform.sample_memory();
    let alone = drain(platform, &run.tag, orders("alone"), good, Program::Real);

    let mut messages = orders("mixed");
    let known = messages[1].properties.message_id().clone().unwrap_or_default();
    let invalid = invalid_messages(&run.random, good / ONE_IN, &known);
    let mut expected: HashMap<Vec<u8>, usize> = HashMap::new();
    for (number, message) in invalid.into_iter().enumerate() {
        *expected.entry(message.body.clone()).or_default() += 1;
        outcome.faults += 1;
        // After the valid message whose id one of them repeats.
        messages.insert((number * (ONE_IN + 1) + 50).min(messages.len()), message);
    }
    let program = if run.control { Program::Mutant } else { Program::Real };
    let mixed = drain(platform, &run.tag, messages, 2 * good, program);
    outcome.peak_memory = memory.peak();

    // Each invalid message is a dead letter, byte for byte, with its reason.
    let letters = letters(&dead);
    for letter in &letters {
        let no_reason = letter.reason.is_empty() || letter.reason == FORGED_REASON;
        if no_reason || letter.key.is_empty() {
            outcome.findings.push(format!("a dead letter without a reason: {letter:?}"));
        }
        match expected.get_mut(&letter.body) {
            Some(left) if *left > 0 => *left -= 1,
            _ => {
                outcome.findings.push(format!("a dead letter that was a valid message: {letter:?}"))
            }
        }
    }
    for (body, missing) in expected.iter().filter(|(_, missing)| **missing > 0) {
        let begin = String::from_utf8_lossy(&body[..body.len().min(100)]);
        outcome.findings.push(format!("{missing} of this are no dead letters: {begin:?}"));
    }
    let booked = platform.orders(&run.tag);
    outcome.acknowledged = 2 * good;
    outcome.found = booked.len();
    outcome.lost = (2 * good).saturating_sub(booked.len());
    outcome.duplicated = booked.values().filter(|times| **times > 1).count();
    if run.control {
        return outcome;
    }
    let ratio = alone.as_secs_f64() / mixed.as_secs_f64();
    println!(
        "  {good} valid messages alone {alone:.1?}, with invalid ones {mixed:.1?}: {ratio:.2} of the speed"
    );
    // The broker alone makes one run half as fast as another at times. A short run has few messages,
    // so its ratio means less.
    if ratio < run.short_or_long(0.1, 0.5) {
        outcome.findings.push(format!("invalid messages slow the valid ones down to {ratio:.2}"));
    }
    reject_message_of_16_mb(&mut outcome);
    requeue_and_delete(platform, &run.tag, &letters, &mut outcome);
    outcome
}

/// Corrects and requeues a few dead letters and deletes the rest, by the documented command.
fn requeue_and_delete(
    platform: &Platform,
    tag: &str,
    letters: &[DeadLetter],
    outcome: &mut Outcome,
) {
    let command = |arguments: &[&str]| {
        let done = Command::new(binaries::program("billing"))
            .arg("dead-letters")
            .args(arguments)
            .envs(&platform.stack.env)
            .output()
            .unwrap();
        (done.status.success(), String::from_utf8_lossy(&done.stdout).trim().to_owned())
    };
    // Where there is an id, it may be the cause: those get a new one.
    let (named, bare): (Vec<&DeadLetter>, Vec<&DeadLetter>) =
        letters.iter().partition(|letter| letter.message_id.is_some());
    let corrected: Vec<&DeadLetter> =
        bare.into_iter().take(3).chain(named.into_iter().take(3)).collect();
    for (number, letter) in corrected.iter().enumerate() {
        let user = format!("{tag}-corrected/{number}");
        let body =
            format!("{{\"user_id\":\"{user}\",\"number_of_items\":1,\"total_amount\":\"1.25\"}}");
        let mut arguments = vec!["requeue", &letter.key, "--body", &body];
        arguments.extend(letter.message_id.is_some().then_some("--new-id"));
        let said = command(&arguments);
        if said != (true, "1 requeued".to_owned()) {
            outcome.findings.push(format!("requeue: {said:?}"));
        }
        if command(&arguments).0 {
            outcome.findings.push(format!("{} could be requeued twice", letter.key));
        }
    }
    let prefix = format!("{tag}-corrected/");
    eventually("the corrected messages are booked", 20, || {
        (platform.orders(&prefix).len() == corrected.len()).then_some(())
    });
    if platform.orders(&prefix).values().any(|times| *times != 1) {
        outcome.findings.push("a corrected message is booked twice".to_owned());
    }
    let rest = letters.len() - corrected.len();
    let said = command(&["delete", "all"]);
    if said != (true, format!("{rest} deleted")) {
        outcome.findings.push(format!("delete all: {said:?}, {rest} dead letters"));
    }
}

/// The broker has a limit of its own and rejects a larger message.
fn reject_message_of_16_mb(outcome: &mut Outcome) {
    let (connection, _deadline) = connect();
    let mut connection = connection;
    let channel = connection.open_channel(None).unwrap();
    channel.enable_publisher_confirms().unwrap();
    let confirms = channel.listen_for_publisher_confirms().unwrap();
    let message = Message { body: vec![b' '; 16 << 20], properties: properties() };
    let published = publish(&channel, &message)
        .map(|()| confirms.recv_timeout(Duration::from_secs(20)).is_ok());
    if matches!(published, Ok(true)) {
        outcome.findings.push("the broker accepted a message of 16 MB".to_owned());
    }
}

fn large(run: &mut Run<'_>) -> Outcome {
    // Nearly the largest that the broker accepts; two thousand of them are prefetched.
    const SIZE: usize = 60_000;
    const LIMIT: u64 = 160 << 20;
    let half = 2000;
    let mut outcome = Outcome::new(format!("{} of {SIZE} bytes", 2 * half));
    outcome.faults = 2 * half;
    let platform = &*run.platform;
    platform.purge_dead_letters();
    let order = |number: usize| {
        let id = format!("{}/{number}", run.tag);
        let more = "x".repeat(SIZE);
        let body = format!(
            "{{\"user_id\":\"{id}\",\"number_of_items\":1,\"total_amount\":1,\"more\":\"{more}\"}}"
        );
        Message { body: body.into(), properties: properties().with_message_id(id) }
    };
    let mut random = run.random.clone();
    let mut garbage = || {
        let mut body = vec![0; SIZE];
        random.fill(&mut body);
        Message { body, properties: properties() }
    };
    platform.billing().replace(Program::External);
    // Small messages first: the limit must not depend on what came before.
    let small = |number| {
        let id = format!("{}-small/{number}", run.tag);
        let body = format!("{{\"user_id\":\"{id}\",\"number_of_items\":1,\"total_amount\":1}}");
        Message { body: body.into(), properties: properties().with_message_id(id) }
    };
    publish_all((0..3000).map(small));
    publish_all((0..half).map(order));
    publish_all((0..half).map(|_| garbage()));
    let mut stack = platform.stack.clone();
    if run.control {
        stack.set("BILLING_BATCH_SIZE", 4000);
        stack.set("BILLING_PREFETCH_MAX_MB", 1000);
    }
    // Nothing can be booked for a while: all prefetched messages are in memory.
    let mut lock = platform.connect("BILLING_DB_NAME");
    lock.batch_execute("begin; lock table orders in access exclusive mode").unwrap();
    platform.billing().restart(&stack, Program::Real);
    let queue = test_var("RABBITMQ_QUEUE");
    let mut peak = 0;
    let locked_until = Instant::now() + Duration::from_secs(6);
    eventually("the time of the lock is over", 60, || {
        peak = peak.max(resident(platform.billing().pid()));
        (Instant::now() > locked_until).then_some(())
    });
    drop(lock);
    eventually("all large messages are processed", 300, || {
        peak = peak.max(resident(platform.billing().pid()));
        if peak > LIMIT && run.control {
            return Some(());
        }
        let is_processed = platform.orders(&format!("{}/", run.tag)).len() == half;
        (is_processed && platform.queue_depth(&queue) == 0).then_some(())
    });
    outcome.peak_memory = peak;
    if run.control {
        // The rest of the queue is not needed.
        management_api("DELETE", &format!("queues/%2F/{queue}/contents"), None);
        outcome.findings.extend((peak > LIMIT).then(|| format!("billing takes {} MB", peak >> 20)));
        platform.billing().replace(Program::Real);
        return outcome;
    }
    let booked = platform.orders(&run.tag);
    outcome.acknowledged = half + 3000;
    outcome.found = booked.len();
    outcome.lost = (half + 3000).saturating_sub(booked.len());
    outcome.duplicated = booked.values().filter(|times| **times > 1).count();
    let dead = platform.purge_dead_letters();
    if dead != half {
        outcome.findings.push(format!("{dead} dead letters, not {half}"));
    }
    println!("  billing's memory with {} bytes a message: {:.1} MB", SIZE, peak as f64 / 1e6);
    if peak > LIMIT {
        outcome.findings.push(format!("billing takes {} MB", peak >> 20));
    }
    outcome
}

/// Publishes without a consumer, and then measures how long it takes until the queue is empty and
/// `booked` orders of the tag are booked.
fn drain(
    platform: &Platform,
    tag: &str,
    messages: Vec<Message>,
    booked: usize,
    program: Program,
) -> Duration {
    platform.billing().replace(Program::External);
    publish_all(messages.into_iter());
    let started_at = Instant::now();
    platform.billing().replace(program);
    if program == Program::Real {
        let mut db = platform.connect("BILLING_DB_NAME");
        let count = "select count(*) from orders where starts_with(user_id, $1)";
        let mut next_query = started_at;
        eventually("the valid messages are booked", 300, || {
            if Instant::now() < next_query {
                return None;
            }
            next_query = Instant::now() + Duration::from_millis(50);
            let found: i64 = db.query_one(count, &[&tag]).unwrap().get(0);
            (found as usize >= booked).then_some(())
        });
    }
    let took = started_at.elapsed();
    platform.wait_for_empty_queue();
    took
}

/// Each kind of invalid message at least once, and `count` in all if there are fewer kinds; one
/// repeats the id `known`.
fn invalid_messages(random: &fastrand::Rng, count: usize, known: &str) -> Vec<Message> {
    let mut random = random.clone();
    let with = |user: &str, items: &str, amount: &str| {
        format!("{{\"user_id\":{user},\"number_of_items\":{items},\"total_amount\":{amount}}}")
            .into_bytes()
    };
    // In an unknown field such a depth is harmless, and the order is valid.
    let deep = "[".repeat(30_000);
    let closed = format!("{deep}{}", "]".repeat(30_000));
    let long = format!("\"{}\"", "x".repeat(256));
    let bodies: Vec<Vec<u8>> = vec![
        Vec::new(),
        b" ".to_vec(),
        b"null".to_vec(),
        deep.clone().into(),
        format!("{{\"user_id\":{closed},\"number_of_items\":1,\"total_amount\":1}}").into(),
        "{\"a\":".repeat(12_000).into(),
        with("1", "2147483648", "1"),
        with("1", "-1", "1"),
        with("1", "1e400", "1"),
        with("1", "99999999999999999999999999999999", "1"),
        with("1", "1", "1000000000000"),
        with("1", "1", "-0.01"),
        with("1", "1", "0.001"),
        with("1", "1", "1e400"),
        with("1", "1", "NaN"),
        with("1", "1", &"9".repeat(1000)),
        with("[1]", "1", "1"),
        with("{}", "1", "1"),
        with("true", "1", "1"),
        with("1", "null", "1"),
        with("1", "1", "false"),
        with("\"\"", "1", "1"),
        with(&long, "1", "1"),
        with("\"\\u0000\"", "1", "1"),
        with("\"\\ud83c\"", "1", "1"),
        b"{\"user_id\":1,\"user_id\":2,\"number_of_items\":1,\"total_amount\":1}".to_vec(),
        b"{\"user_id\":\"\xff\xfe\",\"number_of_items\":1,\"total_amount\":1}".to_vec(),
        b"{\"user_id\":1,\"number_of_items\":1,\"total_amount\":1}x".to_vec(),
        b"[1,1,1]".to_vec(),
        vec![b'{'; 60_000],
        (0..60_000).map(|_| random.u8(..)).collect(),
    ];
    let mut invalid = vec![Message {
        body: with("\"another user\"", "1", "1"),
        properties: properties().with_message_id(known.to_owned()),
    }];
    for number in 0..(count - 1).max(bodies.len()) {
        let body = bodies.get(number).cloned().unwrap_or_else(|| {
            // Never the begin of a JSON object.
            let random_bytes = (0..random.usize(1..2000)).map(|_| random.u8(128..));
            random_bytes.collect()
        });
        let properties = match number % 4 {
            0 => AmqpProperties::default(),
            1 => unusual_properties(number),
            2 => properties().with_message_id("\0".to_owned()),
            _ => properties(),
        };
        invalid.push(Message { body, properties });
    }
    invalid
}

fn properties() -> AmqpProperties {
    AmqpProperties::default().with_delivery_mode(2).with_content_type("application/json".to_owned())
}

/// Properties that must have no effect; above all they must not send copies elsewhere.
fn unusual_properties(number: usize) -> AmqpProperties {
    let mut table = FieldTable::default();
    for level in 0..20 {
        let mut outer = FieldTable::default();
        outer.insert(format!("level {level}"), AmqpValue::FieldTable(table));
        table = outer;
    }
    table.insert("x-reason".to_owned(), AmqpValue::LongString(FORGED_REASON.to_owned()));
    table.insert("long".to_owned(), AmqpValue::LongString("y".repeat(20_000)));
    table.insert("void".to_owned(), AmqpValue::Void);
    // Not NaN: that crashes the broker's channel.
    table.insert("number".to_owned(), AmqpValue::Double(f64::MAX));
    properties()
        .with_headers(table)
        .with_delivery_mode(1)
        .with_priority(255)
        .with_timestamp(u64::MAX)
        .with_content_encoding("gzip".to_owned())
        .with_expiration("600000".to_owned())
        .with_message_id(format!("'; drop table orders; -- {number} \u{1F3AC}"))
        .with_type_("z".repeat(255))
}

/// A connection of the administrator, who may publish to any queue.
fn connect() -> (Connection, SocketDeadline) {
    let mut env = Env::from_fn(|name| match name.strip_prefix("DRIVER_RABBITMQ_") {
        Some(rest) => Some(test_var(&format!("RABBITMQ_ADMIN_{rest}"))),
        None => std::env::var(name).ok(),
    });
    let config = broker::Config::from_env(&mut env, "DRIVER");
    config.connect("fault campaign").unwrap()
}

/// Publishes all messages and waits until the broker has confirmed every one.
fn publish_all(messages: impl Iterator<Item = Message>) {
    let (mut connection, _deadline) = connect();
    let channel = connection.open_channel(None).unwrap();
    channel.enable_publisher_confirms().unwrap();
    let confirms = channel.listen_for_publisher_confirms().unwrap();
    let (mut sent, mut confirmed, mut bytes) = (0, 0, 0);
    for message in messages {
        bytes += message.body.len();
        publish(&channel, &message).unwrap();
        sent += 1;
        // Bounded in number and bytes: amiquip buffers without a limit.
        if sent - confirmed >= WINDOW as u64 || bytes > 4 << 20 {
            await_confirms(&confirms, sent, &mut confirmed);
            bytes = 0;
        }
    }
    await_confirms(&confirms, sent, &mut confirmed);
}

fn await_confirms(confirms: &Receiver<Confirm>, sent: u64, confirmed: &mut u64) {
    let mut open: Vec<u64> = (*confirmed + 1..=sent).collect();
    while !open.is_empty() {
        let Confirm::Ack(ack) = confirms.recv_timeout(Duration::from_secs(60)).unwrap() else {
            panic!("the broker rejected a message")
        };
        open.retain(
            |tag| if ack.multiple { *tag > ack.delivery_tag } else { *tag != ack.delivery_tag },
        );
    }
    *confirmed = sent;
}

fn publish(channel: &Channel, message: &Message) -> amiquip::Result<()> {
    let publish = Publish::with_properties(
        &message.body,
        test_var("RABBITMQ_QUEUE"),
        message.properties.clone(),
    );
    channel.basic_publish("", publish)
}

#[derive(Debug)]
struct DeadLetter {
    key: String,
    message_id: Option<String>,
    reason: String,
    body: Vec<u8>,
}

/// All dead letters; they stay in their queue.
fn letters(queue: &str) -> Vec<DeadLetter> {
    let (mut connection, _deadline) = connect();
    let channel = connection.open_channel(None).unwrap();
    let mut letters = Vec::new();
    while let Some(Get { delivery, .. }) = channel.basic_get(queue, false).unwrap() {
        let header = |name: &str| {
            let headers = delivery.properties.headers().as_ref();
            match headers.and_then(|headers| headers.get(name)) {
                Some(AmqpValue::LongString(text)) => text.clone(),
                _ => String::new(),
            }
        };
        let (key, reason) = (header("x-dead-letter-id"), header("x-reason"));
        let message_id = delivery.properties.message_id().clone();
        letters.push(DeadLetter { key, message_id, reason, body: delivery.body });
    }
    letters
}
