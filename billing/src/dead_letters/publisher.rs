//! Publishes dead letters for the consumer.

use std::time::{Duration, Instant};

use amiquip::Delivery;
use chassis::backoff::RetryLog;
use chassis::broker::{Config, Message, Publisher};
use uuid::Uuid;

use super::properties::with_reason;

/// A message on its way to the dead letters.
pub struct DeadLetter<'a> {
    /// The message.
    pub delivery: &'a Delivery,
    /// Why it can never be booked.
    pub reason: &'a str,
    /// Its id there. After an attempt that failed there may be two copies with one id.
    pub id: Uuid,
}

/// Publishes dead letters; connects when there is one.
pub struct DeadLetterPublisher {
    config: Config,
    queue: String,
    publisher: Option<Publisher>,
    retry: RetryLog,
    /// After a failure: when the next attempt may be made.
    retry_at: Option<Instant>,
}

impl DeadLetterPublisher {
    /// Not connected yet.
    pub fn new(config: Config, queue: String) -> DeadLetterPublisher {
        let (publisher, retry, retry_at) = (None, RetryLog::default(), None);
        DeadLetterPublisher { config, queue, publisher, retry, retry_at }
    }

    /// How many are published and not confirmed yet.
    pub fn in_flight(&self) -> usize {
        self.publisher.as_ref().map_or(0, Publisher::in_flight)
    }

    /// Publishes them, or none: after a failure there is a growing pause.
    pub fn publish<'a>(&mut self, dead_letters: impl Iterator<Item = DeadLetter<'a>>) {
        if self.retry_at.is_some_and(|retry_at| Instant::now() < retry_at) {
            return;
        }
        let queue = self.queue.clone();
        let messages: Vec<Message> = dead_letters
            .map(|DeadLetter { delivery, reason, id }| {
                let properties = with_reason(&delivery.properties, reason, id);
                Message::to_queue(&queue, &delivery.body, properties)
            })
            .collect();
        if messages.is_empty() {
            return;
        }
        if let Err(err) = self.publisher().and_then(|publisher| publisher.publish(messages)) {
            self.failed(&err);
        }
    }

    /// How many more are confirmed, the oldest first; waits at most `wait` for the first. After a
    /// failure none is in flight any more: all of them must be published again.
    pub fn take_confirmed(&mut self, wait: Duration) -> usize {
        let Some(publisher) = self.publisher.as_mut().filter(|one| one.in_flight() > 0) else {
            return 0;
        };
        match publisher.collect_confirms(wait) {
            Ok(count) => {
                if count > 0 {
                    self.retry.succeeded();
                    self.retry_at = None;
                }
                count
            }
            Err(err) => {
                self.failed(&err);
                0
            }
        }
    }

    fn publisher(&mut self) -> anyhow::Result<&mut Publisher> {
        match &mut self.publisher {
            Some(publisher) => Ok(publisher),
            none => {
                let connected = Publisher::connect(&self.config, "billing publisher", &self.queue)?;
                Ok(none.insert(connected))
            }
        }
    }

    fn failed(&mut self, err: &anyhow::Error) {
        let what = "dead letters wait until they can be written";
        let pause = self.retry.failed(log::Level::Warn, what, &format!("{err:#}"));
        self.publisher = None;
        self.retry_at = Some(Instant::now() + pause);
    }
}
