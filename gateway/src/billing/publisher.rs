//! Publishing with confirms: one thread owns the connection and has many messages unconfirmed at a
//! time; the threads of the server wait for the outcome of theirs, with a deadline.

use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use amiquip::{AmqpProperties, Channel, Connection, ConnectionBlockedNotification, Publish};
use anyhow::bail;
use chassis::Stop;
use chassis::backoff::RetryLog;
use chassis::broker::{self, SocketDeadline, declare_queue, permanent_reason};
use chassis::problem::Problem;
use crossbeam_channel::{Receiver, RecvError, Sender, never, select, unbounded};
use parking_lot::Mutex;

use super::unconfirmed::{
    Completion, CompletionSender, PendingPublish, PublishOutcome, Unconfirmed,
};
use crate::{config, metrics};

/// How long a call of the connection may take. Calls only hand bytes over.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// How often the worker checks for a stop.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A broker that has messages, is not blocked and confirms nothing for this long is considered dead: a
/// new connection shows more.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an order waits to be sent while the broker confirms others.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(1);

/// AMQP 0-9-1's delivery mode for a message that survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// The side of the server's threads.
pub struct Publisher {
    pending: Sender<PendingPublish>,
    shared: Arc<Shared>,
    confirm_timeout: Duration,
}

/// The side of the one thread that publishes.
pub struct Worker {
    broker: broker::Config,
    queue: String,
    max_in_flight: usize,
    pending: Receiver<PendingPublish>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    connected: AtomicBool,
    /// The broker has raised an alarm and accepts no messages.
    blocked: AtomicBool,
    /// The most messages are unconfirmed, and for some time none was confirmed.
    stalled: AtomicBool,
    /// Why there is no connection, where waiting will not help.
    permanent_reason: Mutex<Option<&'static str>>,
}

impl Publisher {
    /// Both sides. Nothing is published before the worker runs.
    pub fn new(config: &config::Publisher) -> (Publisher, Worker) {
        // Unbounded, but it holds at most one live entry for each of the server's threads: cancelled
        // entries are skipped when the worker next takes from it.
        let (sender, receiver) = unbounded();
        let shared = Arc::new(Shared::default());
        let worker = Worker {
            broker: config.broker.clone(),
            queue: config.queue.clone(),
            max_in_flight: config.max_in_flight,
            pending: receiver,
            shared: Arc::clone(&shared),
        };
        (Publisher { pending: sender, shared, confirm_timeout: config.confirm_timeout }, worker)
    }

    /// Returns when the broker has confirmed a persistent copy, and not before.
    pub fn publish(&self, id: &str, body: String) -> Result<(), Problem> {
        self.shared.check_available().map_err(Problem::unavailable)?;
        if self.shared.stalled.load(Ordering::SeqCst) {
            return Err(Problem::unavailable("too many orders wait for the message broker"));
        }
        let started_at = Instant::now();
        let completion = Completion::new();
        let sender = CompletionSender(Arc::clone(&completion));
        let message = PendingPublish { id: id.to_owned(), body, completion: sender };
        let queued = self.pending.send(message);
        queued.map_err(|_| Problem::internal().with_cause("the publisher's worker has ended"))?;
        let queue_timeout = QUEUE_TIMEOUT.min(self.confirm_timeout);
        let mut outcome = completion.wait_until(started_at + queue_timeout);
        if outcome.is_none() {
            if completion.try_claim() {
                metrics::PUBLISHES.with_label_values(&["not_sent"]).inc();
                let detail = "the message broker accepts orders too slowly; this one was not sent";
                return Err(Problem::unavailable(detail));
            }
            outcome = completion.wait_until(started_at + self.confirm_timeout);
        }
        let detail = match outcome {
            Some(PublishOutcome::Confirmed) => return Ok(()),
            Some(PublishOutcome::Rejected) => "the message broker did not accept the order",
            Some(PublishOutcome::Unknown) | None => {
                "the message broker did not confirm the order; it may have arrived or not: \
                 repeat it with the same Idempotency-Key"
            }
        };
        Err(Problem::unavailable(detail).with_cause(format!("message {id} is not confirmed")))
    }

    /// Waits a moment for the connection: a gateway that shares its port with another one should not
    /// accept requests while it would refuse orders.
    pub fn await_connection(&self, timeout: Duration, stop: &Stop) {
        let deadline = Instant::now() + timeout;
        while self.shared.check_available().is_err() && Instant::now() < deadline {
            if stop.sleep(Duration::from_millis(5)) {
                return;
            }
        }
    }

    /// Whether an order could be published now; fails with the reason.
    pub fn probe(&self) -> impl Fn() -> Result<(), String> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        move || {
            shared
                .check_available()
                .map_err(|reason| shared.permanent_reason.lock().unwrap_or(reason).to_owned())
        }
    }
}

impl Shared {
    fn check_available(&self) -> Result<(), &'static str> {
        if !self.connected.load(Ordering::SeqCst) {
            return Err("the message broker is not available");
        }
        if self.blocked.load(Ordering::SeqCst) {
            return Err("the message broker accepts no messages for now");
        }
        Ok(())
    }
}

impl Worker {
    /// Publishes until `stop`, and connects again as often as needed.
    pub fn run(&self, stop: &Stop) {
        let mut retry = RetryLog::default();
        while !stop.is_requested() {
            let Err(err) = self.run_connection(stop) else { return };
            let was_connected = self.shared.connected.swap(false, Ordering::SeqCst);
            self.shared.stalled.store(false, Ordering::SeqCst);
            *self.shared.permanent_reason.lock() = permanent_reason(&err);
            metrics::BROKER_CONNECTED.set(0);
            let (level, what) = match was_connected {
                true => (log::Level::Error, "the connection to the broker is lost"),
                false => (log::Level::Warn, "the broker is not available, trying until it is"),
            };
            if was_connected {
                retry.succeeded();
            }
            let pause = retry.failed(level, what, &format!("{err:#}"));
            for message in self.pending.try_iter().filter(|it| it.completion.0.try_claim()) {
                message.complete(PublishOutcome::Rejected);
            }
            stop.sleep(pause);
        }
    }

    /// Publishes on one connection, from its begin to its end.
    fn run_connection(&self, stop: &Stop) -> anyhow::Result<()> {
        let (mut connection, deadline) = self.broker.connect("gateway")?;
        let (channel, _) = declare_queue(&mut connection, &deadline, &self.queue)?;
        let ended = self.publish_loop(&mut connection, &channel, &deadline, stop);
        let blocked = self.shared.blocked.load(Ordering::SeqCst);
        match &ended {
            Ok(()) if !blocked => deadline.with_deadline(CALL_TIMEOUT, || {
                let _ = channel.close();
                let _ = connection.close();
            }),
            _ => {
                // Dropping a channel asks the broker to close it and waits for the answer: not for a
                // broker that does not answer.
                drop(deadline);
                drop(channel);
                // Only the connection's own end has the reason why its channels ended.
                if let Err(cause) = connection.close()
                    && matches!(&ended, Err(err) if err.is::<RecvError>())
                {
                    bail!(cause);
                }
            }
        }
        ended
    }

    fn publish_loop(
        &self,
        connection: &mut Connection,
        channel: &Channel,
        deadline: &SocketDeadline,
        stop: &Stop,
    ) -> anyhow::Result<()> {
        let (confirms, returns, blocks) =
            deadline.with_deadline(CALL_TIMEOUT, || -> amiquip::Result<_> {
                let confirms = channel.listen_for_publisher_confirms()?;
                let returns = channel.listen_for_returns()?;
                let blocks = connection.listen_for_connection_blocked()?;
                channel.enable_publisher_confirms()?;
                Ok((confirms, returns, blocks))
            })?;
        self.shared.blocked.store(false, Ordering::SeqCst);
        self.shared.connected.store(true, Ordering::SeqCst);
        metrics::BROKER_CONNECTED.set(1);
        log::info!("publishing to {} at {}", self.queue, self.broker.address);

        let mut unconfirmed = Unconfirmed::new();
        let none = never();
        loop {
            let may_send = self.has_room(&unconfirmed);
            let (mut completed, mut sent) = (Vec::new(), Ok(()));
            select! {
                recv(if may_send { &self.pending } else { &none }) -> message => {
                    let Ok(message) = message else { return Ok(()) };
                    self.send(message, channel, deadline, &mut unconfirmed)?;
                    self.send_queued(channel, deadline, &mut unconfirmed)?;
                }
                recv(confirms) -> confirm => {
                    for confirm in iter::once(confirm?).chain(confirms.try_iter()) {
                        // An unroutable message is returned first and then confirmed all the same.
                        for returned in returns.try_iter() {
                            unconfirmed.on_return(&returned);
                        }
                        unconfirmed.on_confirm(confirm, &mut completed);
                    }
                    // Sent before the waiting threads are woken: the broker has work meanwhile.
                    if unconfirmed.is_empty() && !unconfirmed.saw_unroutable {
                        sent = self.send_queued(channel, deadline, &mut unconfirmed);
                    }
                }
                recv(blocks) -> notice => {
                    let blocked = match notice? {
                        ConnectionBlockedNotification::Blocked(why) => {
                            log::error!("the broker accepts no messages for now: {why}");
                            true
                        }
                        ConnectionBlockedNotification::Unblocked => {
                            log::info!("the broker accepts messages again");
                            unconfirmed.last_confirm_at = Instant::now();
                            false
                        }
                    };
                    self.shared.blocked.store(blocked, Ordering::SeqCst);
                }
                default(POLL_INTERVAL) => (),
            }
            self.update_state(&unconfirmed);
            for (message, outcome) in completed {
                message.complete(outcome);
            }
            sent?;
            if unconfirmed.saw_unroutable {
                bail!("the queue {} is gone: connecting again to declare it", self.queue);
            }
            // At a stop all requests are answered: no thread waits for what is unconfirmed.
            if stop.is_requested() {
                return Ok(());
            }
            let blocked = self.shared.blocked.load(Ordering::SeqCst);
            let silent_for = unconfirmed.last_confirm_at.elapsed();
            if !blocked && !unconfirmed.is_empty() && silent_for > CONFIRM_TIMEOUT {
                bail!("no confirm for {} s", CONFIRM_TIMEOUT.as_secs());
            }
        }
    }

    /// Whether one more message may be sent. None is sent to a broker that has raised an alarm: it
    /// would not read it.
    fn has_room(&self, unconfirmed: &Unconfirmed) -> bool {
        unconfirmed.len() < self.max_in_flight && !self.shared.blocked.load(Ordering::SeqCst)
    }

    fn update_state(&self, unconfirmed: &Unconfirmed) {
        let in_flight = unconfirmed.len();
        metrics::PUBLISHES_UNCONFIRMED.set(in_flight as i64);
        let stalled = in_flight >= self.max_in_flight
            && unconfirmed.last_confirm_at.elapsed() > QUEUE_TIMEOUT;
        self.shared.stalled.store(stalled, Ordering::SeqCst);
    }

    /// Sends the queued messages while there is room.
    fn send_queued(
        &self,
        channel: &Channel,
        deadline: &SocketDeadline,
        unconfirmed: &mut Unconfirmed,
    ) -> anyhow::Result<()> {
        while self.has_room(unconfirmed)
            && let Ok(message) = self.pending.try_recv()
        {
            self.send(message, channel, deadline, unconfirmed)?;
        }
        Ok(())
    }

    fn send(
        &self,
        message: PendingPublish,
        channel: &Channel,
        deadline: &SocketDeadline,
        unconfirmed: &mut Unconfirmed,
    ) -> anyhow::Result<()> {
        // Its client got an answer already that says that it was not sent.
        if !message.completion.0.try_claim() {
            return Ok(());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let properties = AmqpProperties::default()
            .with_content_type("application/json".to_owned())
            .with_delivery_mode(PERSISTENT)
            .with_message_id(message.id.clone())
            .with_timestamp(now.as_secs())
            .with_app_id("gateway".to_owned());
        let publish = Publish {
            body: message.body.as_bytes(),
            routing_key: self.queue.clone(),
            mandatory: true,
            immediate: false,
            properties,
        };
        let sent = deadline.with_deadline(CALL_TIMEOUT, || channel.basic_publish("", publish));
        unconfirmed.add(message);
        Ok(sent?)
    }
}
