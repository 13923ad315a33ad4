//! The consumer: takes orders from the queue in batches, books each batch in one
//! transaction, and only then acknowledges.
//!
//! A message has one of three fates, see [`Session::settle`]: dealt with (booked
//! now, or known already), hopeless (a copy goes to the dead letters), or not now
//! (the database is waited for; without the broker it is delivered again).
//!
//! Nothing is booked twice, because the id of a message is written in the
//! transaction that books it. A message *without* an id is told from an equal one
//! only by being unacknowledged, so its order is recorded as in doubt until the
//! broker has seen the acknowledgement; see [`Session::book`].

use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use amiquip::{Channel, ConsumerMessage, ConsumerOptions, Delivery};
use anyhow::bail;
use chassis::Stop;
use chassis::broker::{Backoff, SocketDeadline};
use crossbeam_channel::Receiver;
use uuid::Uuid;

use crate::books::Books;
use crate::config::Config;
use crate::dead_letters::{Dead, Grave};
use crate::metrics;
use crate::order::Order;
use crate::publish::{CALL_TIMEOUT, durable};
use crate::store::{self, Entry, Outcome, Store};

/// How often an idle consumer looks whether it is time to stop, and whether dead letters
/// have arrived.
const TICK: Duration = Duration::from_millis(100);
const QUICK_TICK: Duration = Duration::from_millis(5);

/// How many batches the broker may send ahead: while one is booked the next must come in,
/// and with less than this in hand the broker sends in small pieces, which cost it twice.
const PREFETCHED: usize = 4;

/// How often a message may be in hand alone when the process dies.
const ATTEMPTS: i32 = 3;

/// How many dead letters are on their way at once: a slow broker makes progress, not copies.
const BURIED_AT_ONCE: usize = 100;

/// How many batches wait at most to be acknowledged together with a dead letter.
const HELD: usize = 2;

/// Longest message id, in characters; AMQP's own limit is 255 bytes.
const MESSAGE_ID_MAX: usize = 255;

/// Consumes until `stop`, connecting again for ever. `consuming` tells others.
pub fn run(config: &Config, stop: &Stop, consuming: &AtomicBool) {
    let mut consumer = Consumer {
        config,
        stop,
        books: Books::new(config.db.clone(), stop.clone()),
        grave: Grave::new(config.broker.clone(), config.dead_queue()),
        backoff: Backoff::default(),
    };
    let mut told = String::new();
    while !stop.is_requested() {
        let ended = consumer.connect(consuming);
        if consuming.swap(false, Ordering::SeqCst) {
            told.clear();
        }
        metrics::CONNECTED.set(0);
        if let Err(err) = ended
            && !stop.is_requested()
        {
            // One line a reason, not one an attempt.
            let reason = format!("{err:#}");
            let level = if told == reason { log::Level::Debug } else { log::Level::Warn };
            log::log!(level, "not consuming {}, trying until it works: {reason}", config.queue);
            told = reason;
            stop.sleep(consumer.backoff.next_delay());
        }
    }
}

/// What outlives a connection.
struct Consumer<'a> {
    config: &'a Config,
    stop: &'a Stop,
    books: Books,
    grave: Grave,
    backoff: Backoff,
}

impl Consumer<'_> {
    /// One connection's life. `Ok` when it was time to stop.
    fn connect(&mut self, consuming: &AtomicBool) -> anyhow::Result<()> {
        let (mut connection, leash) = self.config.broker.connect("billing consumer")?;
        let ended = leash
            .with_deadline(CALL_TIMEOUT, || connection.open_channel(None))
            .map_err(anyhow::Error::from)
            .and_then(|channel| {
                let ended = self.consume(&channel, &leash, consuming);
                leash.with_deadline(CALL_TIMEOUT, || drop(channel));
                ended
            });
        // Every call into the library may hang, also those that a drop makes.
        leash.with_deadline(CALL_TIMEOUT, || {
            let _ = connection.close();
        });
        ended
    }

    fn consume(
        &mut self,
        channel: &Channel,
        leash: &SocketDeadline,
        consuming: &AtomicBool,
    ) -> anyhow::Result<()> {
        let queue = self.config.queue.as_str();
        let prefetch = u16::try_from(self.config.batch_size * PREFETCHED).unwrap_or(u16::MAX);
        let consumer = leash.with_deadline(CALL_TIMEOUT, || {
            channel.queue_declare(queue, durable())?;
            channel.queue_declare(self.config.dead_queue(), durable())?;
            channel.qos(0, prefetch, false)?;
            channel.basic_consume(queue, ConsumerOptions::default())
        })?;
        log::info!("consuming {queue}");
        metrics::CONNECTED.set(1);
        consuming.store(true, Ordering::SeqCst);
        let ended = Session {
            consumer: self,
            line: Line { channel, leash, prefetch },
            deliveries: consumer.receiver(),
            next: None,
            ended: None,
            trial: 1,
            parked: Vec::new(),
            done: Done::default(),
        }
        .run();
        leash.with_deadline(CALL_TIMEOUT, || drop(consumer));
        ended
    }
}

/// The channel that deliveries come by and acknowledgements go by.
#[derive(Clone, Copy)]
struct Line<'a> {
    channel: &'a Channel,
    leash: &'a SocketDeadline,
    prefetch: u16,
}

impl Line<'_> {
    fn ack(self, delivery: Delivery) -> anyhow::Result<()> {
        Ok(self.leash.with_deadline(CALL_TIMEOUT, || delivery.ack(self.channel))?)
    }

    fn ack_multiple(self, last: Delivery) -> anyhow::Result<()> {
        Ok(self.leash.with_deadline(CALL_TIMEOUT, || last.ack_multiple(self.channel))?)
    }

    /// A question whose answer proves that the broker has seen what we sent, and
    /// that what it delivered to us was still ours.
    fn prove(self) -> anyhow::Result<()> {
        Ok(self.leash.with_deadline(CALL_TIMEOUT, || self.channel.qos(0, self.prefetch, false))?)
    }
}

struct Session<'a, 'c> {
    consumer: &'a mut Consumer<'c>,
    line: Line<'a>,
    deliveries: &'a Receiver<ConsumerMessage>,
    /// Received already, for the next batch.
    next: Option<Delivery>,
    /// Why there will be no more, once what came before is dealt with.
    ended: Option<anyhow::Error>,
    /// How many redelivered messages are taken at once.
    trial: usize,
    /// On their way to the dead letters, in the order in which they came.
    parked: Vec<Parked>,
    /// Not acknowledged yet.
    done: Done,
}

/// A hopeless message.
struct Parked {
    delivery: Delivery,
    reason: String,
    /// The record that made its booking doubtful; goes with it.
    doubt: Option<i64>,
    /// Whether its attempts are counted.
    attempted: bool,
    /// Its name among the dead letters, the same at each try.
    key: Uuid,
}

/// What the broker may forget.
#[derive(Default)]
struct Done {
    /// Booked, or among the dead letters.
    deliveries: Vec<Delivery>,
    /// Transactions whose orders without a message id are in doubt until the
    /// broker has seen their acknowledgement.
    batches: Vec<i64>,
    /// Doubts whose message is among the dead letters.
    doubts: Vec<i64>,
    /// Bodies whose attempts were counted, of messages among the dead letters. The count
    /// must outlive an acknowledgement that is lost: else they would kill again.
    attempted: Vec<Vec<u8>>,
}

/// What is to be done with a message.
#[derive(Clone, Debug)]
enum Fate {
    /// Its order is booked: acknowledge.
    Settled,
    /// It never will be: to the dead letters.
    Hopeless { reason: String, doubt: Option<i64> },
}

fn hopeless(reason: impl ToString) -> Fate {
    Fate::Hopeless { reason: reason.to_string(), doubt: None }
}

/// What became of a batch.
struct Judgement {
    /// One for each message.
    fates: Vec<Fate>,
    /// See [`Done`].
    batches: Vec<i64>,
}

/// A message that can be read.
struct Candidate<'a> {
    /// Its place in the batch.
    index: usize,
    message_id: Option<&'a str>,
    order: Order,
}

impl Session<'_, '_> {
    fn run(&mut self) -> anyhow::Result<()> {
        let ended = self.work();
        self.bury_the_rest();
        ended.and_then(|()| self.acknowledge())
    }

    /// Whoever has deleted the queue has left no other copy of what is parked. After a
    /// broken connection it comes again, and only what is under way is waited for.
    fn bury_the_rest(&mut self) {
        let mut last = usize::MAX;
        while self.consumer.grave.under_way() > 0
            || ((1..last).contains(&self.parked.len()) && self.line.prove().is_ok())
        {
            last = self.parked.len();
            self.bury(CALL_TIMEOUT);
        }
    }

    fn work(&mut self) -> anyhow::Result<()> {
        while !self.consumer.stop.is_requested() {
            let mut wait = Duration::ZERO;
            if self.parked.len() < self.consumer.config.batch_size {
                let batch = self.take()?;
                if !batch.is_empty() {
                    // One that has killed the process must not come back a moment after it
                    // was given up.
                    if batch[0].redelivered {
                        wait = CALL_TIMEOUT;
                    }
                    self.settle(batch)?;
                    self.consumer.backoff.reset();
                }
            } else {
                // The dead letters cannot be written, and no more may pile up here.
                self.consumer.stop.sleep(TICK);
            }
            self.bury(wait);
            self.acknowledge()?;
        }
        Ok(())
    }

    /// A batch: what is there, up to the limit; empty after a quiet tick. The
    /// first message waits for company only if it is not alone.
    ///
    /// Redelivered messages are taken apart from others, one at first and then
    /// twice as many each time: one that kills the process takes no neighbour
    /// with it, and comes to be alone in the end.
    fn take(&mut self) -> anyhow::Result<Vec<Delivery>> {
        let tick = if self.consumer.grave.under_way() > 0 { QUICK_TICK } else { TICK };
        let Some(first) = self.receive(tick)? else { return Ok(Vec::new()) };
        let begun = Instant::now();
        let redelivered = first.redelivered;
        let (size, wait) = (self.consumer.config.batch_size, self.consumer.config.batch_wait);
        let limit = if redelivered { self.trial.min(size) } else { size };
        self.trial = if redelivered { limit * 2 } else { 1 };
        let mut batch = vec![first];
        while batch.len() < limit {
            let wait = match batch.len() {
                1 => Duration::ZERO,
                _ => wait.saturating_sub(begun.elapsed()),
            };
            let delivery = match self.receive(wait) {
                Ok(Some(delivery)) => delivery,
                Ok(None) => break,
                // When somebody has deleted the queue, what is in hand is all there is of it.
                Err(err) => {
                    self.ended = Some(err);
                    break;
                }
            };
            if delivery.redelivered != redelivered {
                self.next = Some(delivery);
                break;
            }
            batch.push(delivery);
        }
        Ok(batch)
    }

    fn receive(&mut self, wait: Duration) -> anyhow::Result<Option<Delivery>> {
        if let Some(delivery) = self.next.take() {
            return Ok(Some(delivery));
        }
        if let Some(err) = self.ended.take() {
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

    /// Deals with a batch: reads it and books it. What is hopeless is parked, until
    /// [`Session::bury`] has brought it to the dead letters.
    fn settle(&mut self, batch: Vec<Delivery>) -> anyhow::Result<()> {
        metrics::BATCH_SIZE.observe(batch.len() as f64);
        let attempted = batch.len() == 1 && batch[0].redelivered;
        let Judgement { fates, batches } = self.judge(&batch)?;
        observe_lag(&batch);
        self.done.batches.extend(batches);
        for (delivery, fate) in batch.into_iter().zip(fates) {
            match fate {
                Fate::Settled => self.done.deliveries.push(delivery),
                Fate::Hopeless { reason, doubt } => {
                    let key = Uuid::now_v7();
                    self.parked.push(Parked { delivery, reason, doubt, attempted, key });
                }
            }
        }
        Ok(())
    }

    fn judge(&mut self, batch: &[Delivery]) -> anyhow::Result<Judgement> {
        let fates = vec![Fate::Settled; batch.len()];
        let mut judgement = Judgement { fates, batches: Vec::new() };
        let redelivered = batch[0].redelivered;
        let mut alone = None;
        if redelivered && batch.len() == 1 {
            let body = batch[0].body.as_slice();
            let attempts =
                self.consumer.books.patiently(|store, _| Ok(store.count_attempt(body)?))?;
            if attempts > ATTEMPTS {
                let reason = format!("the process died {ATTEMPTS} times with this message in hand");
                judgement.fates[0] = hopeless(reason);
                return Ok(judgement);
            }
            alone = Some(body);
        }
        let mut candidates = Vec::with_capacity(batch.len());
        for (index, delivery) in batch.iter().enumerate() {
            match read(delivery.properties.message_id().as_deref(), &delivery.body) {
                Ok((message_id, order)) => candidates.push(Candidate { index, message_id, order }),
                Err(reason) => judgement.fates[index] = hopeless(reason),
            }
        }
        self.book(&candidates, redelivered, alone, &mut judgement)?;
        Ok(judgement)
    }

    /// Books the candidates in one transaction; if a row does not fit, in two
    /// halves, and so on until the culprit is alone.
    ///
    /// Messages without an id: the transaction records them as in doubt. When one
    /// of them is delivered again because the acknowledgement was lost, the record
    /// is found and a person decides, for it may as well be an equal order. The
    /// lock and the proof close the gap between two processes: either ours was
    /// committed before the other one looks, or we see that the message is no
    /// longer ours and commit nothing.
    fn book(
        &mut self,
        candidates: &[Candidate],
        redelivered: bool,
        alone: Option<&[u8]>,
        judgement: &mut Judgement,
    ) -> anyhow::Result<()> {
        if candidates.is_empty() {
            return Ok(());
        }
        let batch = fastrand::i64(..);
        let bare = candidates.iter().any(|candidate| candidate.message_id.is_none());
        let entries: Vec<Entry> = candidates.iter().map(Entry::from).collect();
        let line = self.line;
        let timer = metrics::BOOKING_SECONDS.start_timer();
        let once = |store: &mut Store, again: bool| {
            let mut booking = store.begin()?;
            let mut doubts = Vec::new();
            let mut bare_are_booked = false;
            if bare {
                booking.lock_bare(redelivered || again)?;
                line.prove()?;
                if redelivered {
                    doubts = booking.doubts(&entries, batch)?;
                }
                bare_are_booked = again && booking.is_booked(batch)?;
            }
            let mut open = Vec::with_capacity(entries.len());
            for (place, entry) in entries.iter().enumerate() {
                let doubted = doubts.iter().any(|(doubted, _)| *doubted == place);
                if entry.message_id.is_some() || !(doubted || bare_are_booked) {
                    open.push((place, *entry));
                }
            }
            let outcomes = booking.book(&open, batch)?;
            if let Some(body) = alone {
                booking.forget_attempts(body)?;
            }
            booking.commit()?;
            Ok((doubts, outcomes))
        };
        let booked = self.consumer.books.patiently(|store, again| {
            let booked = once(store, again);
            if let (Err(_), Some(body)) = (&booked, alone) {
                // Whatever was wrong, it has not killed the process.
                let _ = store.forget_attempts(body);
            }
            booked
        });
        timer.observe_duration();
        let (doubts, outcomes) = match booked {
            Ok(booked) => booked,
            Err(err) => match (err.downcast_ref::<postgres::Error>(), candidates) {
                (None, _) => return Err(err),
                (Some(err), [culprit]) => {
                    judgement.fates[culprit.index] = hopeless(store::reason(err));
                    return Ok(());
                }
                (Some(_), several) => {
                    let (former, latter) = several.split_at(several.len() / 2);
                    self.book(former, redelivered, None, judgement)?;
                    return self.book(latter, redelivered, None, judgement);
                }
            },
        };
        if bare {
            judgement.batches.push(batch);
        }
        for (place, doubt) in doubts {
            judgement.fates[candidates[place].index] = Fate::Hopeless {
                reason: "may be booked already: it has no message id, and an equal order was \
                         booked just before its acknowledgement was lost"
                    .to_owned(),
                doubt: Some(doubt),
            };
        }
        for (place, outcome) in outcomes {
            match outcome {
                Outcome::Booked => metrics::BOOKED.inc(),
                Outcome::Repeat => metrics::DUPLICATE.inc(),
                Outcome::Conflict => {
                    let reason = "another order was booked under this message id before";
                    judgement.fates[candidates[place].index] = hopeless(reason);
                }
            }
        }
        Ok(())
    }

    /// Sends what is parked on its way to the dead letters, and sees what has arrived
    /// there, waiting at most so long: that is done. Orders go on meanwhile, also when it
    /// cannot be written.
    fn bury(&mut self, wait: Duration) {
        let grave = &mut self.consumer.grave;
        let under_way = grave.under_way();
        let next = self.parked.iter().take(BURIED_AT_ONCE).skip(under_way);
        grave.send(next.map(|Parked { delivery, reason, key, .. }| Dead {
            delivery,
            reason,
            key: *key,
        }));
        for parked in self.parked.drain(..grave.buried(wait)) {
            let Parked { delivery, reason, doubt, attempted, .. } = parked;
            let id = delivery.properties.message_id().as_deref().unwrap_or_default();
            log::warn!("message {id:?} went to the dead letters: {reason}");
            metrics::REJECTED.inc();
            if attempted {
                self.done.attempted.push(delivery.body.clone());
            }
            self.done.deliveries.push(delivery);
            self.done.doubts.extend(doubt);
        }
        metrics::PARKED.set(self.parked.len() as i64);
    }

    /// Tells the broker what it may forget, and then the database.
    ///
    /// One acknowledgement covers everything delivered before, so what came after a parked
    /// message waits a little for it: one for each would cost more than the orders do.
    fn acknowledge(&mut self) -> anyhow::Result<()> {
        let Done { deliveries, batches, doubts, attempted } = std::mem::take(&mut self.done);
        let parked = self.parked.first().map_or(u64::MAX, |parked| parked.delivery.delivery_tag());
        let (before, after): (Vec<Delivery>, Vec<Delivery>) =
            deliveries.into_iter().partition(|delivery| delivery.delivery_tag() < parked);
        metrics::CONSUMED.inc_by(before.len() as u64);
        if let Some(last) = before.into_iter().max_by_key(Delivery::delivery_tag) {
            self.line.ack_multiple(last)?;
        }
        let doubtful = !(batches.is_empty() && doubts.is_empty() && attempted.is_empty());
        let soon = self.consumer.grave.under_way() > 0 && !self.consumer.stop.is_requested();
        if soon && !doubtful && after.len() < HELD * self.consumer.config.batch_size {
            self.done.deliveries = after;
            return Ok(());
        }
        for delivery in after {
            self.line.ack(delivery)?;
            metrics::CONSUMED.inc();
        }
        if doubtful {
            self.line.prove()?;
            // If this fails, a record stays behind that may cost somebody a look.
            self.consumer.books.try_once(|store| {
                store.forget_doubts(&batches, &doubts)?;
                attempted.iter().try_for_each(|body| store.forget_attempts(body))
            });
        }
        Ok(())
    }
}

impl<'a> From<&'a Candidate<'_>> for Entry<'a> {
    fn from(candidate: &'a Candidate<'_>) -> Entry<'a> {
        Entry { message_id: candidate.message_id, order: &candidate.order }
    }
}

/// The id, if a message has one, and the order; or why it cannot be one.
pub fn read<'m>(
    message_id: Option<&'m str>,
    body: &[u8],
) -> Result<(Option<&'m str>, Order), String> {
    let id = message_id.filter(|id| !id.is_empty());
    if id.is_some_and(|id| id.contains('\0') || id.chars().count() > MESSAGE_ID_MAX) {
        return Err(format!(
            "the message id must have 1 to {MESSAGE_ID_MAX} characters and no U+0000"
        ));
    }
    match panic::catch_unwind(|| Order::parse(body)) {
        Ok(Ok(order)) => Ok((id, order)),
        Ok(Err(refused)) => Err(refused.to_string()),
        Err(_) => Err("the service failed while it read the message; its log says where".into()),
    }
}

/// AMQP's timestamps have whole seconds.
fn observe_lag(batch: &[Delivery]) {
    let timestamp = batch.last().and_then(|delivery| *delivery.properties.timestamp());
    if let (Some(then), Ok(now)) = (timestamp, UNIX_EPOCH.elapsed()) {
        metrics::LAG.set(now.as_secs().saturating_sub(then) as i64);
    }
}
