//! Publishes the outbox: one thread of all instances, in order, with confirms.
//!
//! A message is marked when the broker has confirmed it. After a crash in between it is published
//! again, and a receiver recognises it by its id.

use std::time::SystemTime;

use amiquip::AmqpProperties;
use chassis::Stop;
use chassis::broker::{CALL_TIMEOUT, Message, Publisher};
use log::debug;

use super::store::{self, PendingMessage};
use crate::config::Config;
use crate::exclusive::{self, Lock, Session};
use crate::{App, metrics};

/// The most messages that are published before their confirms are waited for.
const BATCH_ROWS: i64 = 500;

/// AMQP 0-9-1's delivery mode of messages that survive a restart of the broker.
const PERSISTENT: u8 = 2;

/// Runs until `stop`.
pub fn run(app: &App, config: &Config, stop: &Stop) {
    let mut relay = Relay::new(config);
    let what = "messages of orders wait to be published";
    exclusive::run(&config.db, Lock::Relay, &app.outbox, stop, what, |session| {
        Ok(relay.publish_batch(session)? == BATCH_ROWS as usize)
    });
}

/// The connection to the broker, which is made when there is something to publish.
pub struct Relay<'c> {
    config: &'c Config,
    publisher: Option<Publisher>,
}

impl<'c> Relay<'c> {
    /// Not connected yet.
    pub fn new(config: &'c Config) -> Relay<'c> {
        Relay { config, publisher: None }
    }

    /// Publishes the oldest messages; returns how many.
    pub fn publish_batch(&mut self, session: &mut Session<'_>) -> anyhow::Result<usize> {
        let messages = session.statement(|client| store::next(client, 0, BATCH_ROWS))?;
        if messages.is_empty() {
            return Ok(0);
        }
        let mut confirmed = 0;
        let published = self.publish(&messages, &mut confirmed);
        if published.is_err() {
            self.publisher = None;
        }
        // Also after a failure: what is confirmed need not be published again.
        let done = &messages[..confirmed];
        let ids: Vec<i64> = done.iter().map(|message| message.id).collect();
        if !ids.is_empty() {
            session.statement(|client| store::mark_published(client, &ids))?;
        }
        metrics::OUTBOX_PUBLISHED.inc_by(confirmed as u64);
        published?;
        debug!("{confirmed} messages published");
        Ok(confirmed)
    }

    /// Counts the messages that are confirmed, the oldest first.
    fn publish(
        &mut self,
        messages: &[PendingMessage],
        confirmed: &mut usize,
    ) -> anyhow::Result<()> {
        let config = self.config;
        let publisher = match &mut self.publisher {
            Some(publisher) => publisher,
            none => {
                let publisher = Publisher::connect(&config.broker, "orders relay", &config.queue)?;
                publisher.declare_topic_exchange(&config.exchange)?;
                none.insert(publisher)
            }
        };
        publisher.publish(messages.iter().map(|message| to_amqp(config, message)).collect())?;
        while *confirmed < messages.len() {
            let more = publisher.collect_confirms(CALL_TIMEOUT)?;
            let now = SystemTime::now();
            for message in &messages[*confirmed..*confirmed + more] {
                let delay = now.duration_since(message.created_at).unwrap_or_default();
                metrics::OUTBOX_DELAY.observe(delay.as_secs_f64());
            }
            *confirmed += more;
        }
        Ok(())
    }
}

fn to_amqp<'m>(config: &'m Config, message: &'m PendingMessage) -> Message<'m> {
    let since_epoch = message.created_at.duration_since(SystemTime::UNIX_EPOCH);
    let properties = AmqpProperties::default()
        .with_content_type("application/json".to_owned())
        .with_delivery_mode(PERSISTENT)
        .with_message_id(message.message_id.clone())
        .with_timestamp(since_epoch.unwrap_or_default().as_secs())
        .with_app_id("orders".to_owned());
    let body = message.body.as_bytes();
    match message.is_for_queue {
        true => Message::to_queue(&config.queue, body, properties),
        // There need not be a queue.
        false => Message {
            exchange: &config.exchange,
            routing_key: &message.routing_key,
            mandatory: false,
            body,
            properties,
        },
    }
}
