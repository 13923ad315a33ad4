//! Messages that are published and not confirmed yet, and the threads that wait for their outcome.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Instant;

use amiquip::{Confirm, Return};

use crate::metrics;

/// What the broker did with a message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PublishOutcome {
    /// It has a persistent copy.
    Confirmed,
    /// It has no copy.
    Rejected,
    /// The connection was lost before the confirm.
    Unknown,
}

/// A message to be published.
pub(super) struct PendingPublish {
    pub(super) id: String,
    pub(super) body: String,
    pub(super) completion: CompletionSender,
}

/// Where the outcome is put, once, for the thread that waits for it.
///
/// A channel would do as well, but a thread that waits at crossbeam's spins and yields before it
/// sleeps. For waits of milliseconds on a busy machine that takes CPU from other threads.
pub(super) struct Completion {
    /// Set by the worker, which then publishes the message, or by the waiting thread, which has then
    /// withdrawn it.
    claimed: AtomicBool,
    outcome: OnceLock<PublishOutcome>,
    waiter: Thread,
}

/// The worker's side. Dropped without an outcome, the outcome is unknown.
pub(super) struct CompletionSender(pub(super) Arc<Completion>);

impl Completion {
    /// For the current thread.
    pub(super) fn new() -> Arc<Completion> {
        let (claimed, outcome) = (AtomicBool::new(false), OnceLock::new());
        Arc::new(Completion { claimed, outcome, waiter: thread::current() })
    }

    /// Whether this call has claimed it.
    pub(super) fn try_claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::SeqCst)
    }

    pub(super) fn wait_until(&self, deadline: Instant) -> Option<PublishOutcome> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.outcome.get() {
                None if !left.is_zero() => thread::park_timeout(left),
                outcome => return outcome.copied(),
            }
        }
    }
}

impl CompletionSender {
    fn complete(&self, outcome: PublishOutcome) {
        if self.0.outcome.set(outcome).is_ok() {
            self.0.waiter.unpark();
        }
    }
}

impl Drop for CompletionSender {
    fn drop(&mut self) {
        self.complete(PublishOutcome::Unknown);
    }
}

impl PendingPublish {
    /// Counts the outcome and wakes the waiting thread.
    pub(super) fn complete(self, outcome: PublishOutcome) {
        let label = match outcome {
            PublishOutcome::Confirmed => "confirmed",
            PublishOutcome::Rejected => "rejected",
            PublishOutcome::Unknown => "unknown",
        };
        metrics::PUBLISHES.with_label_values(&[label]).inc();
        self.completion.complete(outcome);
    }
}

/// The messages without a confirm, by delivery tag. When it is dropped, their outcome is unknown.
pub(super) struct Unconfirmed {
    messages: BTreeMap<u64, PendingPublish>,
    last_tag: u64,
    /// When the broker last confirmed a message, or had none to confirm.
    pub(super) last_confirm_at: Instant,
    /// Whether a message came back because its queue is gone.
    pub(super) saw_unroutable: bool,
}

impl Unconfirmed {
    pub(super) fn new() -> Unconfirmed {
        let last_confirm_at = Instant::now();
        Unconfirmed {
            messages: BTreeMap::new(),
            last_tag: 0,
            last_confirm_at,
            saw_unroutable: false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.messages.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    pub(super) fn add(&mut self, message: PendingPublish) {
        if self.messages.is_empty() {
            self.last_confirm_at = Instant::now();
        }
        self.last_tag += 1;
        self.messages.insert(self.last_tag, message);
    }

    /// Moves the messages of a confirm, with their outcomes, to `completed`.
    pub(super) fn on_confirm(
        &mut self,
        confirm: Confirm,
        completed: &mut Vec<(PendingPublish, PublishOutcome)>,
    ) {
        self.last_confirm_at = Instant::now();
        let (payload, outcome) = match confirm {
            Confirm::Ack(payload) => (payload, PublishOutcome::Confirmed),
            Confirm::Nack(payload) => (payload, PublishOutcome::Rejected),
        };
        let tag = payload.delivery_tag;
        if payload.multiple {
            let later = self.messages.split_off(&(tag + 1));
            let messages = std::mem::replace(&mut self.messages, later).into_values();
            completed.extend(messages.map(|message| (message, outcome)));
        } else {
            completed.extend(self.messages.remove(&tag).map(|message| (message, outcome)));
        }
    }

    /// A message came back: no queue has it. Of several messages with the same id, which a repeated
    /// key gives, it is unknown which one is meant.
    pub(super) fn on_return(&mut self, returned: &Return) {
        self.saw_unroutable = true;
        let id = returned.properties.message_id();
        let meant = self.messages.extract_if(.., |_, message| Some(&message.id) == id.as_ref());
        let meant: Vec<(u64, PendingPublish)> = meant.collect();
        let outcome = match meant.len() {
            1 => PublishOutcome::Rejected,
            _ => PublishOutcome::Unknown,
        };
        meant.into_iter().for_each(|(_, message)| message.complete(outcome));
    }
}

impl Drop for Unconfirmed {
    fn drop(&mut self) {
        metrics::PUBLISHES_UNCONFIRMED.set(0);
        for message in std::mem::take(&mut self.messages).into_values() {
            message.complete(PublishOutcome::Unknown);
        }
    }
}

#[cfg(test)]
mod tests {
    use amiquip::AmqpProperties;

    use super::*;

    /// The outcomes of messages with these ids, of which this one is returned.
    fn outcomes(ids: &[&str], returned: &str) -> Vec<Option<PublishOutcome>> {
        let mut unconfirmed = Unconfirmed::new();
        let completions: Vec<_> = ids.iter().map(|_| Completion::new()).collect();
        for (id, completion) in ids.iter().zip(&completions) {
            let completion = CompletionSender(Arc::clone(completion));
            let id = (*id).to_owned();
            unconfirmed.add(PendingPublish { id, body: String::new(), completion });
        }
        unconfirmed.on_return(&Return {
            reply_code: 312,
            reply_text: "NO_ROUTE".to_owned(),
            exchange: String::new(),
            routing_key: String::new(),
            content: Vec::new(),
            properties: AmqpProperties::default().with_message_id(returned.to_owned()),
        });
        completions.iter().map(|completion| completion.outcome.get().copied()).collect()
    }

    #[test]
    fn a_returned_message_is_reported_as_rejected() {
        assert_eq!(outcomes(&["a", "b"], "b"), [None, Some(PublishOutcome::Rejected)]);
    }

    #[test]
    fn a_returned_message_with_a_duplicate_id_is_reported_as_unknown() {
        let unknown = Some(PublishOutcome::Unknown);
        assert_eq!(outcomes(&["a", "b", "a"], "a"), [unknown, None, unknown]);
    }
}
