//! A bare publisher with confirms, as `provision/bench` sets it beside `POST /api/billing`:
//! the messages that the gateway would send, by one thread that does nothing else.
//!
//! Usage: `publish seconds|messages NUMBER OUTSTANDING`; the broker is that of the
//! gateway's settings. Tells rate (messages a second) and latencies (ms) as JSON.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use amiquip::{AmqpProperties, Confirm, ConfirmSmoother, Publish, QueueDeclareOptions};
use anyhow::{Context, ensure};
use chassis::{Env, broker};
use serde_json::json;
use uuid::Uuid;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [unit, number, outstanding] = arguments.as_slice() else {
        anyhow::bail!("usage: publish seconds|messages NUMBER OUTSTANDING");
    };
    let (number, outstanding): (u64, usize) = (number.parse()?, outstanding.parse()?);
    let (limit, messages) = match unit.as_str() {
        "seconds" => (Duration::from_secs(number), u64::MAX),
        _ => (Duration::MAX, number),
    };
    let mut env = Env::load();
    let config = broker::Config::from_env(&mut env, "GATEWAY");
    let queue = env.required("RABBITMQ_QUEUE");
    let config = env.finish(config)?;

    let (mut connection, _leash) = config.connect("bare publisher")?;
    let channel = connection.open_channel(None)?;
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(&queue, durable)?;
    let confirms = channel.listen_for_publisher_confirms()?;
    channel.enable_publisher_confirms()?;

    let begun = Instant::now();
    let mut smoother = ConfirmSmoother::new();
    let mut waiting = BTreeMap::new();
    let mut latencies = Vec::new();
    let mut sent = 0;
    loop {
        while waiting.len() < outstanding && sent < messages && begun.elapsed() < limit {
            sent += 1;
            let body =
                format!(r#"{{"user_id":"{sent}","number_of_items":"5","total_amount":"180"}}"#);
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            let properties = AmqpProperties::default()
                .with_content_type("application/json".to_owned())
                .with_delivery_mode(2)
                .with_message_id(Uuid::now_v7().to_string())
                .with_timestamp(now.as_secs())
                .with_app_id("gateway".to_owned());
            let message = Publish {
                body: body.as_bytes(),
                routing_key: queue.clone(),
                mandatory: true,
                immediate: false,
                properties,
            };
            channel.basic_publish("", message)?;
            waiting.insert(sent, Instant::now());
        }
        if waiting.is_empty() {
            break;
        }
        let first = confirms.recv().context("the broker is gone")?;
        for confirm in std::iter::once(first).chain(confirms.try_iter()) {
            for confirm in smoother.process(confirm) {
                let Confirm::Ack(payload) = confirm else { anyhow::bail!("not taken") };
                latencies.extend(waiting.remove(&payload.delivery_tag).map(|at| at.elapsed()));
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    ensure!(latencies.len() as u64 == sent, "{} of {sent} are confirmed", latencies.len());
    latencies.sort_unstable();
    let at = |share: usize| latencies[(latencies.len() - 1) * share / 100].as_secs_f64() * 1e3;
    let result = json!({
        "requests": sent, "seconds": seconds, "errors": 0, "p50": at(50), "p99": at(99),
    });
    println!("{result}");
    Ok(())
}
