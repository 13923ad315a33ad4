//! Acknowledging messages, and then clearing what the database remembers of them.

use amiquip::{Channel, Delivery};
use chassis::broker::{CALL_TIMEOUT, SocketDeadline};
use uuid::Uuid;

use super::Session;
use crate::metrics;

/// How many batches may wait unacknowledged for a dead letter that came before them.
const MAX_UNACKED_BATCHES: usize = 2;

/// The channel of the deliveries and their acknowledgements.
#[derive(Clone, Copy)]
pub(super) struct AckChannel<'a> {
    pub(super) channel: &'a Channel,
    pub(super) deadline: &'a SocketDeadline,
    pub(super) prefetch: u16,
}

impl AckChannel<'_> {
    fn ack(self, delivery: Delivery) -> anyhow::Result<()> {
        Ok(self.deadline.with_deadline(CALL_TIMEOUT, || delivery.ack(self.channel))?)
    }

    fn ack_multiple(self, last: Delivery) -> anyhow::Result<()> {
        Ok(self.deadline.with_deadline(CALL_TIMEOUT, || last.ack_multiple(self.channel))?)
    }

    /// A call that changes nothing. Its answer proves that the broker has processed what we sent
    /// before, and that the messages that it delivered to us are still ours.
    pub(super) fn round_trip(self) -> anyhow::Result<()> {
        let qos = || self.channel.qos(0, self.prefetch, false);
        Ok(self.deadline.with_deadline(CALL_TIMEOUT, qos)?)
    }
}

/// A message that can never be booked.
pub(super) struct RejectedMessage {
    pub(super) delivery: Delivery,
    pub(super) reason: String,
    /// The record that puts its booking in doubt; deleted with the message.
    pub(super) in_doubt_id: Option<i64>,
    /// Whether attempts at it are counted in the database.
    pub(super) counted: bool,
    /// Its id among the dead letters, the same at each attempt to publish it.
    pub(super) dead_letter_id: Uuid,
}

/// Messages that are booked, or are among the dead letters, and what is to be deleted once the
/// broker has received their acknowledgements.
#[derive(Default)]
pub(super) struct PendingAcks {
    pub(super) deliveries: Vec<Delivery>,
    /// Transactions whose orders without a message id are in doubt until then.
    pub(super) in_doubt_batches: Vec<i64>,
    /// Records of doubt whose message is among the dead letters.
    pub(super) in_doubt_ids: Vec<i64>,
    /// Bodies of dead letters whose attempts were counted. If the count were deleted before the
    /// broker has received the acknowledgement, the message could end the process again.
    pub(super) counted_bodies: Vec<Vec<u8>>,
}

impl Session<'_, '_> {
    /// Acknowledges the settled messages, and then deletes their records.
    ///
    /// One acknowledgement covers all messages delivered before. So messages that came after a
    /// rejected one wait a little for it: an acknowledgement for each would cost more than booking
    /// them.
    pub(super) fn acknowledge(&mut self) -> anyhow::Result<()> {
        let PendingAcks { deliveries, in_doubt_batches, in_doubt_ids, counted_bodies } =
            std::mem::take(&mut self.settled);
        let first_rejected =
            self.rejected.first().map_or(u64::MAX, |message| message.delivery.delivery_tag());
        let (before, after): (Vec<Delivery>, Vec<Delivery>) =
            deliveries.into_iter().partition(|delivery| delivery.delivery_tag() < first_rejected);
        metrics::CONSUMED.inc_by(before.len() as u64);
        if let Some(last) = before.into_iter().max_by_key(Delivery::delivery_tag) {
            self.channel.ack_multiple(last)?;
        }
        let has_records =
            !(in_doubt_batches.is_empty() && in_doubt_ids.is_empty() && counted_bodies.is_empty());
        let may_wait =
            self.consumer.dead_letters.in_flight() > 0 && !self.consumer.stop.is_requested();
        let most = MAX_UNACKED_BATCHES * self.consumer.config.batch_size;
        if may_wait && !has_records && after.len() < most {
            self.settled.deliveries = after;
            return Ok(());
        }
        for delivery in after {
            self.channel.ack(delivery)?;
            metrics::CONSUMED.inc();
        }
        if has_records {
            self.channel.round_trip()?;
            // If this fails, a record remains. At worst a person has to look at a dead letter.
            self.consumer.store.best_effort(|store| {
                store.clear_in_doubt(&in_doubt_batches, &in_doubt_ids)?;
                counted_bodies.iter().try_for_each(|body| store.clear_attempts(body))
            });
        }
        Ok(())
    }
}
