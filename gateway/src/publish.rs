//! Publishing with confirms: one thread owns the connection and keeps many
//! messages outstanding; the threads of the server wait for theirs with a deadline.

use std::collections::BTreeMap;
use std::iter;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use amiquip::{
    AmqpProperties, Channel, Confirm, Connection, ConnectionBlockedNotification, Publish,
    QueueDeclareOptions, Return,
};
use anyhow::bail;
use chassis::Stop;
use chassis::broker::{self, Backoff, SocketDeadline};
use chassis::problem::Problem;
use crossbeam_channel::{Receiver, RecvError, Sender, never, select, unbounded};

use crate::{config, metrics};

/// The longest a call of the connection may take: they only hand bytes over.
const CALL: Duration = Duration::from_secs(2);

/// How often the thread looks up from its channels.
const TICK: Duration = Duration::from_millis(100);

/// A broker that confirms nothing for so long, though it has messages and has not
/// said that it is blocked, is given up: a new connection tells more.
const SILENCE: Duration = Duration::from_secs(10);

/// How long an order waits to be sent while the broker confirms others.
const PATIENCE: Duration = Duration::from_secs(1);

/// AMQP 0-9-1's delivery mode for a message that survives the broker.
const PERSISTENT: u8 = 2;

/// The side of the server's threads.
pub struct Publisher {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
    timeout: Duration,
}

/// The side of the one thread that publishes.
pub struct Worker {
    broker: broker::Config,
    queue: String,
    max_in_flight: usize,
    jobs: Receiver<Job>,
    shared: Arc<Shared>,
}

struct Shared {
    connected: AtomicBool,
    /// The broker has raised an alarm and takes no messages.
    blocked: AtomicBool,
    /// As many messages as may be are on their way, and for a while none was confirmed.
    stuck: AtomicBool,
}

/// A message to be sent; whoever posted it waits at the other end of `verdict`.
struct Job {
    id: String,
    body: String,
    verdict: Reply,
}

/// Where a verdict is put, once, for the thread that waits for it.
///
/// A channel would do, but whoever waits at crossbeam's spins and yields before it
/// sleeps: for a wait of milliseconds on a busy machine that is CPU taken from those
/// whose turn it is.
struct Slot {
    /// By the worker, which then sends the message, or by the waiter, who then has withdrawn it.
    claimed: AtomicBool,
    verdict: OnceLock<Verdict>,
    waiter: Thread,
}

/// The side that puts it there; dropped without a verdict, the fate is unknown.
struct Reply(Arc<Slot>);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    /// The broker has a persistent copy.
    Confirmed,
    /// The broker has none.
    Refused,
    /// The connection was lost in between.
    Unknown,
}

impl Publisher {
    /// Both sides; nothing is sent before the worker runs.
    pub fn new(config: &config::Publish) -> (Publisher, Worker) {
        // Of itself not bounded: each of the server's threads waits for one in it, and those
        // that were withdrawn go when the worker comes by.
        let (sender, receiver) = unbounded();
        let shared = Arc::new(Shared {
            connected: AtomicBool::new(false),
            blocked: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
        });
        let worker = Worker {
            broker: config.broker.clone(),
            queue: config.queue.clone(),
            max_in_flight: config.max_in_flight,
            jobs: receiver,
            shared: Arc::clone(&shared),
        };
        (Publisher { jobs: sender, shared, timeout: config.timeout }, worker)
    }

    /// Returns once the broker has confirmed a persistent copy, and not a moment before.
    pub fn publish(&self, id: &str, body: String) -> Result<(), Problem> {
        self.shared.usable().map_err(Problem::unavailable)?;
        if self.shared.stuck.load(Ordering::SeqCst) {
            return Err(Problem::unavailable("too many orders wait for the message broker"));
        }
        let begun = Instant::now();
        let answer = Slot::new();
        let verdict = Reply(Arc::clone(&answer));
        let job = Job { id: id.to_owned(), body, verdict };
        self.jobs.send(job).map_err(|_| Problem::internal().with_cause("no worker publishes"))?;
        let mut verdict = answer.wait_until(begun + PATIENCE.min(self.timeout));
        if verdict.is_none() {
            if answer.claim() {
                metrics::PUBLISHES.with_label_values(&["not_sent"]).inc();
                let told = "the message broker takes orders too slowly; this one was not sent";
                return Err(Problem::unavailable(told));
            }
            verdict = answer.wait_until(begun + self.timeout);
        }
        let outcome = match verdict {
            Some(Verdict::Confirmed) => return Ok(()),
            Some(Verdict::Refused) => "the message broker did not take the order",
            Some(Verdict::Unknown) | None => {
                "the message broker did not confirm the order; it may have arrived or not: \
                 repeat it with the same Idempotency-Key"
            }
        };
        Err(Problem::unavailable(outcome).with_cause(format!("message {id} is not confirmed")))
    }

    /// Gives the broker a moment: a gateway that shares its port with another one
    /// had better not open its door while it would refuse orders.
    pub fn await_connection(&self, limit: Duration, stop: &Stop) {
        let deadline = Instant::now() + limit;
        while self.shared.usable().is_err() && Instant::now() < deadline {
            if stop.sleep(Duration::from_millis(5)) {
                return;
            }
        }
    }

    /// Whether an order could be published now.
    pub fn probe(&self) -> impl Fn() -> Result<(), String> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        move || shared.usable().map_err(str::to_owned)
    }
}

impl Slot {
    /// For the thread that asks.
    fn new() -> Arc<Slot> {
        let (claimed, verdict) = (AtomicBool::new(false), OnceLock::new());
        Arc::new(Slot { claimed, verdict, waiter: thread::current() })
    }

    /// Whether it was nobody's before.
    fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::SeqCst)
    }

    fn wait_until(&self, deadline: Instant) -> Option<Verdict> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.verdict.get() {
                None if !left.is_zero() => thread::park_timeout(left),
                verdict => return verdict.copied(),
            }
        }
    }
}

impl Reply {
    fn put(&self, verdict: Verdict) {
        if self.0.verdict.set(verdict).is_ok() {
            self.0.waiter.unpark();
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.put(Verdict::Unknown);
    }
}

impl Shared {
    fn usable(&self) -> Result<(), &'static str> {
        if !self.connected.load(Ordering::SeqCst) {
            return Err("the message broker is not available");
        }
        if self.blocked.load(Ordering::SeqCst) {
            return Err("the message broker takes no messages for now");
        }
        Ok(())
    }
}

impl Worker {
    /// Publishes until `done`; connects again, for ever, when the broker goes away.
    pub fn run(&self, done: &Stop) {
        let mut backoff = Backoff::default();
        let mut told = String::new();
        while !done.is_requested() {
            let Err(err) = self.session(done) else { return };
            let was_connected = self.shared.connected.swap(false, Ordering::SeqCst);
            self.shared.stuck.store(false, Ordering::SeqCst);
            metrics::BROKER_CONNECTED.set(0);
            let reason = format!("{err:#}");
            // One line a reason, not one an attempt.
            if was_connected {
                log::error!("the broker is lost: {reason}");
                backoff.reset();
            } else if told != reason {
                log::warn!("the broker is not available, trying until it is: {reason}");
            }
            told = reason;
            for job in self.jobs.try_iter().filter(|job| job.verdict.0.claim()) {
                job.settle(Verdict::Refused);
            }
            done.sleep(backoff.next_delay());
        }
    }

    /// One connection, from its begin to its end.
    fn session(&self, done: &Stop) -> anyhow::Result<()> {
        let (mut connection, leash) = self.broker.connect("gateway")?;
        let channel = leash.with_deadline(CALL, || connection.open_channel(None))?;
        let talked = self.talk(&mut connection, &channel, &leash, done);
        let blocked = self.shared.blocked.load(Ordering::SeqCst);
        match &talked {
            Ok(()) if !blocked => leash.with_deadline(CALL, || {
                let _ = channel.close();
                let _ = connection.close();
            }),
            _ => {
                // Dropping a channel asks the broker to close it and waits: not on one
                // that does not answer.
                drop(leash);
                drop(channel);
                // Only the end of the connection knows why its channels fell silent.
                if let Err(cause) = connection.close()
                    && matches!(&talked, Err(err) if err.is::<RecvError>())
                {
                    bail!(cause);
                }
            }
        }
        talked
    }

    fn talk(
        &self,
        connection: &mut Connection,
        channel: &Channel,
        leash: &SocketDeadline,
        done: &Stop,
    ) -> anyhow::Result<()> {
        let (confirms, returns, blocks) = leash.with_deadline(CALL, || -> amiquip::Result<_> {
            // Without arguments, so that anybody's plain durable declaration is the same.
            let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
            channel.queue_declare(&self.queue, durable)?;
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

        let mut outstanding = Outstanding::new();
        let nothing = never();
        loop {
            let closed = !self.has_room(&outstanding);
            let (mut settled, mut sent) = (Vec::new(), Ok(()));
            select! {
                recv(if closed { &nothing } else { &self.jobs }) -> job => {
                    let Ok(job) = job else { return Ok(()) };
                    self.send(job, channel, leash, &mut outstanding)?;
                    self.send_waiting(channel, leash, &mut outstanding)?;
                }
                recv(confirms) -> confirm => {
                    for confirm in iter::once(confirm?).chain(confirms.try_iter()) {
                        // An unroutable message is returned first and then confirmed all the same.
                        for returned in returns.try_iter() {
                            outstanding.returned(&returned);
                        }
                        outstanding.confirmed(confirm, &mut settled);
                    }
                    // Before their clients are woken the broker has something to do again.
                    if outstanding.messages.is_empty() && !outstanding.unroutable {
                        sent = self.send_waiting(channel, leash, &mut outstanding);
                    }
                }
                recv(blocks) -> notice => {
                    let blocked = match notice? {
                        ConnectionBlockedNotification::Blocked(why) => {
                            log::error!("the broker takes no messages for now: {why}");
                            true
                        }
                        ConnectionBlockedNotification::Unblocked => {
                            log::info!("the broker takes messages again");
                            outstanding.heard = Instant::now();
                            false
                        }
                    };
                    self.shared.blocked.store(blocked, Ordering::SeqCst);
                }
                default(TICK) => (),
            }
            self.observe(&outstanding);
            for (job, verdict) in settled {
                job.settle(verdict);
            }
            sent?;
            if outstanding.unroutable {
                bail!("the queue {} is gone: connecting anew to declare it", self.queue);
            }
            // All requests are answered by then: whatever is outstanding, nobody waits for it.
            if done.is_requested() {
                return Ok(());
            }
            let blocked = self.shared.blocked.load(Ordering::SeqCst);
            if !blocked && !outstanding.messages.is_empty() && outstanding.heard.elapsed() > SILENCE
            {
                bail!("no confirm for {} s", SILENCE.as_secs());
            }
        }
    }

    /// Whether one more may be sent: to a broker that has raised an alarm none, because it
    /// would not read it.
    fn has_room(&self, outstanding: &Outstanding) -> bool {
        outstanding.messages.len() < self.max_in_flight
            && !self.shared.blocked.load(Ordering::SeqCst)
    }

    /// Tells the others how it stands.
    fn observe(&self, outstanding: &Outstanding) {
        let in_flight = outstanding.messages.len();
        metrics::PUBLISHES_IN_FLIGHT.set(in_flight as i64);
        let stuck = in_flight >= self.max_in_flight && outstanding.heard.elapsed() > PATIENCE;
        self.shared.stuck.store(stuck, Ordering::SeqCst);
    }

    /// Sends what there is, as far as there is room.
    fn send_waiting(
        &self,
        channel: &Channel,
        leash: &SocketDeadline,
        outstanding: &mut Outstanding,
    ) -> anyhow::Result<()> {
        while self.has_room(outstanding)
            && let Ok(job) = self.jobs.try_recv()
        {
            self.send(job, channel, leash, outstanding)?;
        }
        Ok(())
    }

    fn send(
        &self,
        job: Job,
        channel: &Channel,
        leash: &SocketDeadline,
        outstanding: &mut Outstanding,
    ) -> anyhow::Result<()> {
        // Its client has been told that it was not sent.
        if !job.verdict.0.claim() {
            return Ok(());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let properties = AmqpProperties::default()
            .with_content_type("application/json".to_owned())
            .with_delivery_mode(PERSISTENT)
            .with_message_id(job.id.clone())
            .with_timestamp(now.as_secs())
            .with_app_id("gateway".to_owned());
        let publish = Publish {
            body: job.body.as_bytes(),
            routing_key: self.queue.clone(),
            mandatory: true,
            immediate: false,
            properties,
        };
        let handed_over = leash.with_deadline(CALL, || channel.basic_publish("", publish));
        outstanding.add(job);
        Ok(handed_over?)
    }
}

/// What was sent and is not confirmed, by delivery tag. Whatever is left when it
/// is dropped has an unknown fate.
struct Outstanding {
    messages: BTreeMap<u64, Job>,
    last_tag: u64,
    /// When the broker last confirmed something, or had nothing to confirm.
    heard: Instant,
    unroutable: bool,
}

impl Outstanding {
    fn new() -> Outstanding {
        let heard = Instant::now();
        Outstanding { messages: BTreeMap::new(), last_tag: 0, heard, unroutable: false }
    }

    fn add(&mut self, job: Job) {
        if self.messages.is_empty() {
            self.heard = Instant::now();
        }
        self.last_tag += 1;
        self.messages.insert(self.last_tag, job);
    }

    /// Moves what is confirmed to the others that are settled.
    fn confirmed(&mut self, confirm: Confirm, settled: &mut Vec<(Job, Verdict)>) {
        self.heard = Instant::now();
        let (payload, verdict) = match confirm {
            Confirm::Ack(payload) => (payload, Verdict::Confirmed),
            Confirm::Nack(payload) => (payload, Verdict::Refused),
        };
        if payload.multiple {
            let later = self.messages.split_off(&(payload.delivery_tag + 1));
            let jobs = std::mem::replace(&mut self.messages, later).into_values();
            settled.extend(jobs.map(|job| (job, verdict)));
        } else {
            settled.extend(self.messages.remove(&payload.delivery_tag).map(|job| (job, verdict)));
        }
    }

    /// No queue has it. Of several with the same id, which a repeated key gives, nobody can
    /// tell which one is meant.
    fn returned(&mut self, returned: &Return) {
        self.unroutable = true;
        let id = returned.properties.message_id();
        let meant = self.messages.extract_if(.., |_, job| Some(&job.id) == id.as_ref());
        let meant: Vec<(u64, Job)> = meant.collect();
        let verdict = if meant.len() == 1 { Verdict::Refused } else { Verdict::Unknown };
        meant.into_iter().for_each(|(_, job)| job.settle(verdict));
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        metrics::PUBLISHES_IN_FLIGHT.set(0);
        for job in std::mem::take(&mut self.messages).into_values() {
            job.settle(Verdict::Unknown);
        }
    }
}

impl Job {
    fn settle(self, verdict: Verdict) {
        let label = match verdict {
            Verdict::Confirmed => "confirmed",
            Verdict::Refused => "rejected",
            Verdict::Unknown => "unknown",
        };
        metrics::PUBLISHES.with_label_values(&[label]).inc();
        self.verdict.put(verdict);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What those are told who sent messages with these ids, of which this one comes back.
    fn told(ids: &[&str], returned: &str) -> Vec<Option<Verdict>> {
        let mut outstanding = Outstanding::new();
        let slots: Vec<_> = ids.iter().map(|_| Slot::new()).collect();
        for (id, slot) in ids.iter().zip(&slots) {
            let (id, verdict) = ((*id).to_owned(), Reply(Arc::clone(slot)));
            outstanding.add(Job { id, body: String::new(), verdict });
        }
        outstanding.returned(&Return {
            reply_code: 312,
            reply_text: "NO_ROUTE".to_owned(),
            exchange: String::new(),
            routing_key: String::new(),
            content: Vec::new(),
            properties: AmqpProperties::default().with_message_id(returned.to_owned()),
        });
        slots.iter().map(|slot| slot.verdict.get().copied()).collect()
    }

    #[test]
    fn of_a_returned_message_it_is_told_that_nobody_took_it() {
        assert_eq!(told(&["a", "b"], "b"), [None, Some(Verdict::Refused)]);
    }

    #[test]
    fn of_a_returned_message_that_was_sent_twice_nothing_certain_is_told() {
        let unknown = Some(Verdict::Unknown);
        assert_eq!(told(&["a", "b", "a"], "a"), [unknown, None, unknown]);
    }
}
