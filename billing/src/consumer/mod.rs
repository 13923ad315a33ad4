//! The consumer: takes orders from the queue in batches, books each batch in one transaction, and
//! only then acknowledges.
//!
//! A message has one of three outcomes, see [`Session::process_batch`]: it is acknowledged (booked
//! now or before), it goes to the dead letters (it can never be booked), or it is tried again later
//! (the database is waited for; without the broker the message is delivered again).
//!
//! No message is booked twice, because its id is written in the transaction that books it. A message
//! *without* an id differs from an equal one only by being unacknowledged. So its order is recorded
//! as in doubt until the broker has received the acknowledgement, see [`booking`].

mod acks;
mod booking;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use amiquip::{Channel, ConsumerMessage, ConsumerOptions, Delivery};
use anyhow::bail;
use chassis::Stop;
use chassis::backoff::RetryLog;
use chassis::broker::{CALL_TIMEOUT, SocketDeadline, declare_queue, permanent_reason};
use chassis::db::ReconnectingStore;
use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::config::Config;
use crate::dead_letters::{DeadLetter, DeadLetterPublisher};
use crate::metrics;
use crate::store::Store;

use acks::{AckChannel, PendingAcks, RejectedMessage};
pub use booking::parse_message;
use booking::{BatchResult, Disposition};

/// How long an idle consumer waits for a message before it checks for a stop, and while dead letters
/// are being published.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
const POLL_WHILE_PUBLISHING: Duration = Duration::from_millis(5);

/// How many batches the broker may send ahead. While one batch is booked the next must arrive; with
/// fewer in hand the broker sends in small pieces, which cost it twice the CPU.
const PREFETCH_BATCHES: usize = 4;

/// The largest message that the broker accepts (max_message_size), in bytes.
const MAX_MESSAGE_BYTES: usize = 64 << 10;

/// How many dead letters are published before the first is confirmed. A slow broker then makes
/// progress; with more it would time out and get copies.
const DEAD_LETTER_WINDOW: usize = 100;

/// Whether this process consumes the queue, and if not why, where an operator must act.
#[derive(Default)]
pub struct Status {
    consuming: AtomicBool,
    reason: Mutex<Option<&'static str>>,
}

impl Status {
    /// Fails with the reason that readiness shows.
    pub fn check(&self) -> Result<(), String> {
        match self.consuming.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err(self.reason.lock().unwrap_or("not consuming").to_owned()),
        }
    }
}

/// Consumes until `stop`, and connects again as often as needed.
pub fn run(config: &Config, stop: &Stop, status: &Status) {
    let mut consumer = Consumer {
        config,
        stop,
        store: ReconnectingStore::new(config.db.clone(), stop.clone(), Store::open),
        dead_letters: DeadLetterPublisher::new(config.broker.clone(), config.dead_letter_queue()),
        retry: RetryLog::default(),
    };
    let failure = format!("not consuming {}, trying until it works", config.queue);
    while !stop.is_requested() {
        let ended = consumer.connect(status);
        if status.consuming.swap(false, Ordering::SeqCst) {
            consumer.retry = RetryLog::default();
        }
        metrics::CONNECTED.set(0);
        if let Err(err) = ended
            && !stop.is_requested()
        {
            *status.reason.lock() = permanent_reason(&err);
            let pause = consumer.retry.failed(log::Level::Warn, &failure, &format!("{err:#}"));
            stop.sleep(pause);
        }
    }
}

/// How many messages the broker may send ahead: a few batches, but not more than fit in `max_mb` MiB if
/// each has the largest size. AMQP has 16 bits for the number.
fn prefetch(batch_size: usize, max_mb: usize) -> u16 {
    let most = (max_mb << 20) / MAX_MESSAGE_BYTES;
    u16::try_from((batch_size * PREFETCH_BATCHES).min(most)).unwrap_or(u16::MAX)
}

/// What outlives a connection.
struct Consumer<'a> {
    config: &'a Config,
    stop: &'a Stop,
    store: ReconnectingStore<Store>,
    dead_letters: DeadLetterPublisher,
    retry: RetryLog,
}

impl Consumer<'_> {
    /// Consumes on one connection. `Ok` when a stop was requested.
    fn connect(&mut self, status: &Status) -> anyhow::Result<()> {
        let (mut connection, deadline) = self.config.broker.connect("billing consumer")?;
        let dead_letter_queue = self.config.dead_letter_queue();
        let ended = declare_queue(&mut connection, &deadline, &dead_letter_queue)
            .and_then(|_| declare_queue(&mut connection, &deadline, &self.config.queue))
            .and_then(|(channel, _)| {
                let ended = self.consume(&channel, &deadline, status);
                deadline.with_deadline(CALL_TIMEOUT, || drop(channel));
                ended
            });
        // Every call into the library may hang, also those that a drop makes.
        deadline.with_deadline(CALL_TIMEOUT, || {
            let _ = connection.close();
        });
        ended
    }

    fn consume(
        &mut self,
        channel: &Channel,
        deadline: &SocketDeadline,
        status: &Status,
    ) -> anyhow::Result<()> {
        let queue = self.config.queue.as_str();
        let prefetch = prefetch(self.config.batch_size, self.config.prefetch_max_mb);
        let consumer = deadline.with_deadline(CALL_TIMEOUT, || {
            channel.qos(0, prefetch, false)?;
            channel.basic_consume(queue, ConsumerOptions::default())
        })?;
        log::info!("consuming {queue}");
        metrics::CONNECTED.set(1);
        status.consuming.store(true, Ordering::SeqCst);
        let ended = Session {
            consumer: self,
            channel: AckChannel { channel, deadline, prefetch },
            deliveries: consumer.receiver(),
            lookahead: None,
            end_error: None,
            redelivery_limit: 1,
            rejected: Vec::new(),
            settled: PendingAcks::default(),
        }
        .run();
        deadline.with_deadline(CALL_TIMEOUT, || drop(consumer));
        ended
    }
}

/// The messages of one connection.
struct Session<'a, 'c> {
    consumer: &'a mut Consumer<'c>,
    channel: AckChannel<'a>,
    deliveries: &'a Receiver<ConsumerMessage>,
    /// A message that was received already and belongs to the next batch.
    lookahead: Option<Delivery>,
    /// Why no more messages will come; returned once the received ones are processed.
    end_error: Option<anyhow::Error>,
    /// How many redelivered messages the next batch may have.
    redelivery_limit: usize,
    /// Messages on their way to the dead letters, in the order in which they came.
    rejected: Vec<RejectedMessage>,
    /// Messages that are not acknowledged yet.
    settled: PendingAcks,
}

impl Session<'_, '_> {
    fn run(&mut self) -> anyhow::Result<()> {
        let ended = self.run_loop();
        self.flush_dead_letters();
        ended.and_then(|()| self.acknowledge())
    }

    fn run_loop(&mut self) -> anyhow::Result<()> {
        while !self.consumer.stop.is_requested() {
            let mut wait = Duration::ZERO;
            if self.rejected.len() < self.consumer.config.batch_size {
                let batch = self.next_batch()?;
                if !batch.is_empty() {
                    // A message that has ended the process must not be delivered again a moment
                    // after it was rejected: its dead letter is waited for.
                    if batch[0].redelivered {
                        wait = CALL_TIMEOUT;
                    }
                    self.process_batch(batch)?;
                    self.consumer.retry.backoff.reset();
                }
            } else {
                // The dead letters cannot be written. No more may be collected in memory.
                self.consumer.stop.sleep(POLL_INTERVAL);
            }
            self.publish_dead_letters(wait);
            self.acknowledge()?;
        }
        Ok(())
    }

    /// A batch: the messages that are there, up to the limit; empty when none came in time. A single
    /// message is not delayed; only a batch that has begun waits for more.
    ///
    /// Redelivered messages are not mixed with others. A batch of them has one message at first and
    /// twice as many each time: a message that ends the process takes no other with it, and is alone
    /// in the end.
    fn next_batch(&mut self) -> anyhow::Result<Vec<Delivery>> {
        let is_publishing = self.consumer.dead_letters.in_flight() > 0;
        let poll = if is_publishing { POLL_WHILE_PUBLISHING } else { POLL_INTERVAL };
        let Some(first) = self.receive(poll)? else { return Ok(Vec::new()) };
        let started_at = Instant::now();
        let redelivered = first.redelivered;
        let (size, wait) = (self.consumer.config.batch_size, self.consumer.config.batch_wait);
        let limit = if redelivered { self.redelivery_limit.min(size) } else { size };
        self.redelivery_limit = if redelivered { limit * 2 } else { 1 };
        let mut batch = vec![first];
        while batch.len() < limit {
            let wait = match batch.len() {
                1 => Duration::ZERO,
                _ => wait.saturating_sub(started_at.elapsed()),
            };
            let delivery = match self.receive(wait) {
                Ok(Some(delivery)) => delivery,
                Ok(None) => break,
                // After the queue was deleted, these messages are the only copies.
                Err(err) => {
                    self.end_error = Some(err);
                    break;
                }
            };
            if delivery.redelivered != redelivered {
                self.lookahead = Some(delivery);
                break;
            }
            batch.push(delivery);
        }
        Ok(batch)
    }

    fn receive(&mut self, wait: Duration) -> anyhow::Result<Option<Delivery>> {
        if let Some(delivery) = self.lookahead.take() {
            return Ok(Some(delivery));
        }
        if let Some(err) = self.end_error.take() {
            return Err(err);
        }
        match self.deliveries.recv_timeout(wait) {
            Ok(ConsumerMessage::Delivery(delivery)) => Ok(Some(delivery)),
            Ok(ConsumerMessage::ServerClosedChannel(err)) => bail!(err),
            Ok(ConsumerMessage::ServerClosedConnection(err)) => bail!(err),
            Ok(ended) => bail!("the consumer ended: {ended:?}"),
            Err(err) if err.is_timeout() => Ok(None),
            Err(_) => bail!("the connection to the broker broke"),
        }
    }

    /// Books a batch. Messages that cannot be booked are rejected: [`Session::publish_dead_letters`]
    /// brings them to the dead letters.
    fn process_batch(&mut self, batch: Vec<Delivery>) -> anyhow::Result<()> {
        metrics::BATCH_SIZE.observe(batch.len() as f64);
        let counted = batch.len() == 1 && batch[0].redelivered;
        let BatchResult { dispositions, in_doubt_batches } = self.classify(&batch)?;
        observe_lag(&batch);
        self.settled.in_doubt_batches.extend(in_doubt_batches);
        for (delivery, disposition) in batch.into_iter().zip(dispositions) {
            match disposition {
                Disposition::Ack => self.settled.deliveries.push(delivery),
                Disposition::DeadLetter { reason, in_doubt_id } => {
                    let dead_letter_id = Uuid::now_v7();
                    let message =
                        RejectedMessage { delivery, reason, in_doubt_id, counted, dead_letter_id };
                    self.rejected.push(message);
                }
            }
        }
        Ok(())
    }

    /// If the queue was deleted, the rejected messages here are the only copies: all of them are
    /// published. If the connection broke, the broker delivers them again: only the confirms of
    /// those that are already published are waited for.
    fn flush_dead_letters(&mut self) {
        let mut last = usize::MAX;
        while self.consumer.dead_letters.in_flight() > 0
            || ((1..last).contains(&self.rejected.len()) && self.channel.round_trip().is_ok())
        {
            last = self.rejected.len();
            self.publish_dead_letters(CALL_TIMEOUT);
        }
    }

    /// Publishes rejected messages to the dead letters and collects confirms, waiting at most `wait`
    /// for the first. Orders go on meanwhile, also when the dead letters cannot be written.
    fn publish_dead_letters(&mut self, wait: Duration) {
        let dead_letters = &mut self.consumer.dead_letters;
        let in_flight = dead_letters.in_flight();
        let next = self.rejected.iter().take(DEAD_LETTER_WINDOW).skip(in_flight);
        dead_letters.publish(next.map(
            |RejectedMessage { delivery, reason, dead_letter_id, .. }| DeadLetter {
                delivery,
                reason,
                id: *dead_letter_id,
            },
        ));
        for message in self.rejected.drain(..dead_letters.take_confirmed(wait)) {
            let RejectedMessage { delivery, reason, in_doubt_id, counted, .. } = message;
            let id = delivery.properties.message_id().as_deref().unwrap_or_default();
            log::warn!("message {id:?} went to the dead letters: {reason}");
            metrics::DEAD_LETTERS.inc();
            if counted {
                self.settled.counted_bodies.push(delivery.body.clone());
            }
            self.settled.deliveries.push(delivery);
            self.settled.in_doubt_ids.extend(in_doubt_id);
        }
        metrics::DEAD_LETTERS_PENDING.set(self.rejected.len() as i64);
    }
}

/// The age of the last message of a batch. AMQP's timestamps have whole seconds.
fn observe_lag(batch: &[Delivery]) {
    let timestamp = batch.last().and_then(|delivery| *delivery.properties.timestamp());
    if let (Some(then), Ok(now)) = (timestamp, UNIX_EPOCH.elapsed()) {
        metrics::LAG.set(now.as_secs().saturating_sub(then) as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefetched_messages_fit_in_their_memory_whatever_the_batch_size() {
        for batch_size in [1, 100, 500, 4000, 10_000] {
            for max_mb in [1, 128, 1000] {
                let bytes = usize::from(prefetch(batch_size, max_mb)) * MAX_MESSAGE_BYTES;
                assert!(bytes <= max_mb << 20, "{batch_size}: {bytes} bytes of {max_mb} MiB");
                assert!(bytes > 0);
            }
        }
        assert_eq!(prefetch(500, 128), 2000, "the defaults do not limit each other");
    }
}
