//! Booking a batch: parse its messages, write their orders, and decide what becomes of each message.
//!
//! Messages without an id: the transaction records their orders as in doubt. When such a message is
//! delivered again because its acknowledgement was lost, the record is found, and a person decides:
//! it may be an equal order of its own. An advisory lock and a round trip to the broker close the gap
//! between two processes: either our transaction was committed before the other process looks for
//! records, or we see that the message is no longer ours and commit nothing.

use std::panic;
use std::sync::Arc;

use amiquip::Delivery;
use chassis::db::{self, error_summary, renew_deadline};

use super::Session;
use crate::metrics;
use crate::order::Order;
use crate::store::{self, BookingEntry, Outcome, Store};

/// How often a message may be alone in hand when the process dies.
const MAX_ATTEMPTS: i32 = 3;

/// Longest message id, in characters; AMQP's own limit is 255 bytes.
const MESSAGE_ID_MAX: usize = 255;

/// What is to be done with a message.
#[derive(Clone, Debug)]
pub(super) enum Disposition {
    /// Its order is booked: acknowledge it.
    Ack,
    /// It can never be booked: publish it to the dead letters.
    DeadLetter { reason: String, in_doubt_id: Option<i64> },
}

fn dead_letter(reason: impl ToString) -> Disposition {
    Disposition::DeadLetter { reason: reason.to_string(), in_doubt_id: None }
}

/// What became of a batch.
pub(super) struct BatchResult {
    /// One for each message.
    pub(super) dispositions: Vec<Disposition>,
    /// See [`super::acks::PendingAcks`].
    pub(super) in_doubt_batches: Vec<i64>,
}

/// A message that is an order.
struct ParsedMessage<'a> {
    /// Its place in the batch.
    index: usize,
    message_id: Option<&'a str>,
    order: Order,
}

/// What one transaction did, by the places of its entries.
struct Booked {
    /// Entries that may have been booked by another batch, and the id of the record.
    in_doubt: Vec<(usize, i64)>,
    outcomes: Vec<(usize, Outcome)>,
}

impl Session<'_, '_> {
    pub(super) fn classify(&mut self, batch: &[Delivery]) -> anyhow::Result<BatchResult> {
        let dispositions = vec![Disposition::Ack; batch.len()];
        let mut result = BatchResult { dispositions, in_doubt_batches: Vec::new() };
        let redelivered = batch[0].redelivered;
        let mut single_body = None;
        if redelivered && batch.len() == 1 {
            let body = batch[0].body.as_slice();
            let attempts =
                self.consumer.store.retry_until_available(store::is_data_error, |store, _| {
                    Ok(store.count_attempt(body)?)
                })?;
            if attempts > MAX_ATTEMPTS {
                let reason =
                    format!("the process died {MAX_ATTEMPTS} times with this message in hand");
                result.dispositions[0] = dead_letter(reason);
                return Ok(result);
            }
            single_body = Some(body);
        }
        let mut messages = Vec::with_capacity(batch.len());
        for (index, delivery) in batch.iter().enumerate() {
            match parse_message(delivery.properties.message_id().as_deref(), &delivery.body) {
                Ok((message_id, order)) => {
                    messages.push(ParsedMessage { index, message_id, order });
                }
                Err(reason) => result.dispositions[index] = dead_letter(reason),
            }
        }
        let _attempt = single_body.map(|body| self.not_counted_if_the_database_hangs(body));
        self.book(&messages, redelivered, single_body, &mut result)?;
        Ok(result)
    }

    /// While the value lives: when the database hangs and the watchdog ends the process, the attempt
    /// at this message is uncounted first. The message is not the cause.
    fn not_counted_if_the_database_hangs(&self, body: &[u8]) -> impl Drop + use<> {
        struct Guard;
        impl Drop for Guard {
            fn drop(&mut self) {
                db::before_exit(None);
            }
        }
        let (config, body) = (self.consumer.config.db.clone(), Arc::<[u8]>::from(body));
        db::before_exit(Some(Box::new(move || {
            let uncounted = Store::open(&config).and_then(|mut store| store.clear_attempts(&body));
            if let Err(err) = uncounted {
                log::warn!("an attempt stays counted: {}", error_summary(&err));
            }
        })));
        Guard
    }

    /// Books the messages in one transaction; if PostgreSQL refuses a row, in two halves, and so on
    /// until the refused message is alone.
    fn book(
        &mut self,
        messages: &[ParsedMessage],
        redelivered: bool,
        single_body: Option<&[u8]>,
        result: &mut BatchResult,
    ) -> anyhow::Result<()> {
        if messages.is_empty() {
            return Ok(());
        }
        let batch = fastrand::i64(..);
        let timer = metrics::BATCH_SECONDS.start_timer();
        let booked = self.book_once_available(messages, redelivered, single_body, batch);
        timer.observe_duration();
        let Booked { in_doubt, outcomes } = match booked {
            Ok(booked) => booked,
            Err(err) => match (err.downcast_ref::<postgres::Error>(), messages) {
                (None, _) => return Err(err),
                (Some(err), [failing_message]) => {
                    result.dispositions[failing_message.index] = dead_letter(error_summary(err));
                    return Ok(());
                }
                (Some(_), several) => {
                    let (first, second) = several.split_at(several.len() / 2);
                    self.book(first, redelivered, None, result)?;
                    return self.book(second, redelivered, None, result);
                }
            },
        };
        if messages.iter().any(|message| message.message_id.is_none()) {
            result.in_doubt_batches.push(batch);
        }
        for (place, id) in in_doubt {
            result.dispositions[messages[place].index] = Disposition::DeadLetter {
                reason: "may be booked already: it has no message id, and an equal order was \
                         booked just before its acknowledgement was lost"
                    .to_owned(),
                in_doubt_id: Some(id),
            };
        }
        for (place, outcome) in outcomes {
            match outcome {
                Outcome::Booked => metrics::BOOKED.inc(),
                Outcome::Duplicate => metrics::DUPLICATES.inc(),
                Outcome::Conflict => {
                    let reason = "another order was booked under this message id before";
                    result.dispositions[messages[place].index] = dead_letter(reason);
                }
            }
        }
        Ok(())
    }

    /// One transaction, tried again until the database is there.
    fn book_once_available(
        &mut self,
        messages: &[ParsedMessage],
        redelivered: bool,
        single_body: Option<&[u8]>,
        batch: i64,
    ) -> anyhow::Result<Booked> {
        let entries: Vec<BookingEntry> = messages.iter().map(BookingEntry::from).collect();
        let channel = self.channel;
        let has_no_id = entries.iter().any(|entry| entry.message_id.is_none());
        let attempt = |store: &mut Store, is_retry: bool| {
            let mut booking = store.begin()?;
            renew_deadline();
            let (mut in_doubt, mut was_committed) = (Vec::new(), false);
            if has_no_id {
                booking.lock_messages_without_id(redelivered || is_retry)?;
                channel.round_trip()?;
                renew_deadline();
                if redelivered {
                    in_doubt = booking.find_in_doubt(&entries, batch)?;
                    renew_deadline();
                }
                was_committed = is_retry && booking.is_booked(batch)?;
                renew_deadline();
            }
            let is_bookable = |place: usize, entry: &BookingEntry| {
                let doubted = in_doubt.iter().any(|(doubted, _)| *doubted == place);
                entry.message_id.is_some() || !(doubted || was_committed)
            };
            let bookable: Vec<(usize, BookingEntry)> = entries
                .iter()
                .copied()
                .enumerate()
                .filter(|(place, entry)| is_bookable(*place, entry))
                .collect();
            let outcomes = booking.book(&bookable, batch)?;
            renew_deadline();
            if let Some(body) = single_body {
                booking.clear_attempts(body)?;
                renew_deadline();
            }
            booking.commit()?;
            Ok(Booked { in_doubt, outcomes })
        };
        self.consumer.store.retry_until_available(store::is_data_error, |store, is_retry| {
            let booked = attempt(store, is_retry);
            if let (Err(_), Some(body)) = (&booked, single_body) {
                // Whatever failed, it has not ended the process.
                renew_deadline();
                let _ = store.clear_attempts(body);
            }
            booked
        })
    }
}

impl<'a> From<&'a ParsedMessage<'_>> for BookingEntry<'a> {
    fn from(message: &'a ParsedMessage<'_>) -> BookingEntry<'a> {
        BookingEntry { message_id: message.message_id, order: &message.order }
    }
}

/// The id, if a message has one, and its order; or why it cannot be booked.
pub fn parse_message<'m>(
    message_id: Option<&'m str>,
    body: &[u8],
) -> Result<(Option<&'m str>, Order), String> {
    let id = message_id.filter(|id| !id.is_empty());
    // Bytes that are not UTF-8 arrive as U+0000, see `chassis::broker`.
    if id.is_some_and(|id| id.contains('\0') || id.chars().count() > MESSAGE_ID_MAX) {
        return Err(format!(
            "the message id must be UTF-8, with 1 to {MESSAGE_ID_MAX} characters and no U+0000"
        ));
    }
    match panic::catch_unwind(|| Order::parse(body)) {
        Ok(Ok(order)) => Ok((id, order)),
        Ok(Err(invalid)) => Err(invalid.to_string()),
        Err(_) => Err("the service failed while it read the message; its log says where".into()),
    }
}
