//! What may happen to an order after it was made. Each change is one conditional `update`: of two at
//! once one finds the order in the state that it needs, and the other one is refused.

use std::time::SystemTime;

use chassis::db::renew_deadline;
use chassis::etag::Precondition;
use postgres::Error;
use postgres::types::ToSql;
use uuid::Uuid;

use super::order::{Order, Status, now};
use super::store::{self, Actor, Event, order_of_row, versions};
use crate::outbox::messages;
use crate::stock::Command;
use crate::{Db, order_columns};

/// A change of an order.
#[derive(Clone, Debug)]
pub enum Change {
    /// It was paid.
    Pay {
        /// With two decimals; it must be the order's total.
        amount: String,
        /// The payment provider's name for the payment.
        reference: String,
        /// How.
        method: Option<String>,
    },
    /// The payment provider could not take the money.
    FailPayment {
        /// Why.
        reason: Option<String>,
    },
    /// It is sent to another address, as JSON.
    SetShippingAddress(String),
    /// It was shipped, or its number was wrong.
    Ship {
        /// Who carries it.
        carrier: String,
        /// The carrier's number.
        tracking_number: String,
    },
    /// It is with the customer.
    Deliver,
    /// It will not be shipped. The second field says whether also one that is paid may be canceled.
    Cancel(Option<String>, bool),
    /// The money of a canceled order was given back.
    Refund {
        /// The payment provider's name for it.
        reference: Option<String>,
    },
    /// It is gone for its owner; one that is pending is canceled.
    Delete,
}

/// A change, and what must be true of the order.
#[derive(Clone, Debug)]
pub struct Request {
    /// The order.
    pub order_id: Uuid,
    /// Only an order of this user.
    pub owner: Option<i64>,
    /// Only in these versions.
    pub precondition: Precondition,
    /// Who.
    pub actor: Actor,
    /// The id of the event; where it is used already, the change was made before.
    pub event_id: Uuid,
    /// What.
    pub change: Change,
}

/// What became of a change.
#[derive(Debug)]
pub enum Outcome {
    /// Done; the order after it.
    Done(Order),
    /// Nothing had to be done: the order is as the change wants it.
    Unchanged(Order),
    /// There is no such order.
    NotFound,
    /// The order was deleted before.
    Deleted,
    /// The order is in another version than the precondition allows.
    PreconditionFailed,
    /// The order is not in a state for it.
    Refused(Order),
    /// The amount is not the order's total.
    WrongAmount(Order),
}

/// Makes the `update` of a change. Of the parameters $1 to $5 are those of every change.
macro_rules! update {
    ($set:literal, $when:literal) => {
        concat!(
            "update orders
            set version = version + 1, updated_at = greatest(updated_at, $5), ",
            $set,
            "
            where id = $1 and ($2::bigint is null or user_id = $2)
            and ($3::bigint[] is null or version = any($3)) and version <> all($4::bigint[])
            and ",
            $when,
            "
            returning ",
            order_columns!()
        )
    };
}

const PAY: &str = update!(
    "status = 'processing', payment_kind = $6, payment_reference = $7, paid_amount = total_amount,
    paid_at = $5",
    "deleted_at is null and status = 'pending' and total_amount = $8::text::numeric"
);
const FAIL_PAYMENT: &str = update!("status = status", "deleted_at is null and status = 'pending'");
const SET_SHIPPING_ADDRESS: &str = update!(
    "shipping_address = $6::text::json",
    "deleted_at is null and status in ('pending', 'processing')
    and shipping_address::text is distinct from $6::text"
);
const SHIP: &str = update!(
    "status = 'shipped', carrier = $6, tracking_number = $7, shipped_at = $5",
    "deleted_at is null and status = 'processing'"
);
const CORRECT_TRACKING: &str = update!(
    "carrier = $6, tracking_number = $7",
    "deleted_at is null and status = 'shipped' and (carrier, tracking_number) <> ($6, $7)"
);
const DELIVER: &str =
    update!("status = 'delivered', delivered_at = $5", "deleted_at is null and status = 'shipped'");
const CANCEL: &str = update!(
    "status = 'canceled', canceled_at = $5, cancellation_reason = $6,
    refund_due = paid_at is not null",
    "deleted_at is null and (status = 'pending' or ($7 and status = 'processing'))"
);
// Also of an order that was deleted: the money is due all the same.
const REFUND: &str = update!(
    "refund_due = false, refunded_at = $5, refund_reference = $6",
    "status = 'canceled' and refund_due"
);
const DELETE_PENDING: &str = update!(
    "status = 'canceled', canceled_at = $5, cancellation_reason = 'deleted', deleted_at = $5",
    "deleted_at is null and status = 'pending'"
);
const DELETE_ENDED: &str =
    update!("deleted_at = $5", "deleted_at is null and status in ('canceled', 'delivered')");

/// Makes a change, and writes its event, its messages and its stock command. A part of a transaction,
/// which is to be committed whatever the outcome.
pub fn apply(db: &mut Db, request: &Request) -> Result<Outcome, Error> {
    let at = now();
    let no = None;
    match &request.change {
        Change::Pay { amount, reference, method } => {
            let done = update(db, request, at, PAY, &[method, reference, amount])?;
            finish(db, request, at, done, ("paid", no, None))
        }
        Change::FailPayment { reason } => {
            let done = update(db, request, at, FAIL_PAYMENT, &[])?;
            finish(db, request, at, done, ("payment_failed", reason.clone(), None))
        }
        Change::SetShippingAddress(address) => {
            let done = update(db, request, at, SET_SHIPPING_ADDRESS, &[address])?;
            finish(db, request, at, done, ("updated", no, None))
        }
        Change::Ship { carrier, tracking_number } => {
            let shipped = update(db, request, at, SHIP, &[carrier, tracking_number])?;
            if shipped.is_some() {
                let event = ("shipped", no, Some(Command::Commit));
                return finish(db, request, at, shipped, event);
            }
            renew_deadline();
            let done = update(db, request, at, CORRECT_TRACKING, &[carrier, tracking_number])?;
            finish(db, request, at, done, ("updated", no, None))
        }
        Change::Deliver => {
            let done = update(db, request, at, DELIVER, &[])?;
            finish(db, request, at, done, ("delivered", no, None))
        }
        Change::Cancel(reason, also_paid) => {
            let done = update(db, request, at, CANCEL, &[reason, also_paid])?;
            let event = ("canceled", reason.clone(), Some(Command::Release));
            finish(db, request, at, done, event)
        }
        Change::Refund { reference } => {
            let done = update(db, request, at, REFUND, &[reference])?;
            finish(db, request, at, done, ("refunded", no, None))
        }
        Change::Delete => {
            let canceled = update(db, request, at, DELETE_PENDING, &[])?;
            if canceled.is_some() {
                let event = ("canceled", Some("deleted".to_owned()), Some(Command::Release));
                return finish(db, request, at, canceled, event);
            }
            renew_deadline();
            let done = update(db, request, at, DELETE_ENDED, &[])?;
            finish(db, request, at, done, ("deleted", no, None))
        }
    }
}

fn update(
    db: &mut Db,
    request: &Request,
    at: SystemTime,
    sql: &str,
    own: &[&(dyn ToSql + Sync)],
) -> Result<Option<Order>, Error> {
    let precondition = request.precondition.of_instance(&db.statements.instance);
    let (allowed, forbidden) = versions(&precondition);
    let common: [&(dyn ToSql + Sync); 5] =
        [&request.order_id, &request.owner, &allowed, &forbidden, &at];
    let row = db.client.query_opt(sql, &[&common, own].concat())?;
    row.as_ref().map(order_of_row).transpose()
}

/// Writes what follows from a change; without one, finds out why there was none.
fn finish(
    db: &mut Db,
    request: &Request,
    at: SystemTime,
    changed: Option<Order>,
    (kind, reason, command): (&'static str, Option<String>, Option<Command>),
) -> Result<Outcome, Error> {
    let Some(mut order) = changed else { return why_not(db, request) };
    store::add_lines(db, std::slice::from_mut(&mut order))?;
    // The time in the row may be later, where another machine's clock is ahead.
    let event = Event { id: request.event_id, kind, actor: request.actor, reason, at };
    let messages = messages::of_event(&order, &event);
    store::record(db, &order, &event, &messages, command)?;
    order.published = Some(false);
    store::add_history(db, &mut order)?;
    log::info!("order {}: {kind}", order.id);
    Ok(Outcome::Done(order))
}

fn why_not(db: &mut Db, request: &Request) -> Result<Outcome, Error> {
    renew_deadline();
    let found = store::select(db, request.order_id, request.owner, true)?;
    let Some(mut order) = found else { return Ok(Outcome::NotFound) };
    renew_deadline();
    let deleted = "select deleted_at is not null from orders where id = $1";
    let is_deleted: bool = db.client.query_one(deleted, &[&order.id])?.try_get(0)?;
    if is_deleted && !matches!(request.change, Change::Refund { .. }) {
        return Ok(Outcome::Deleted);
    }
    let precondition = request.precondition.of_instance(&db.statements.instance);
    let (allowed, forbidden) = versions(&precondition);
    if allowed.is_some_and(|allowed| !allowed.contains(&order.version))
        || forbidden.contains(&order.version)
    {
        return Ok(Outcome::PreconditionFailed);
    }
    store::add_history(db, &mut order)?;
    Ok(match is_done_already(&order, &request.change) {
        true => Outcome::Unchanged(order),
        false => match &request.change {
            Change::Pay { amount, .. }
                if order.status == Status::Pending && *amount != order.total_amount =>
            {
                Outcome::WrongAmount(order)
            }
            _ => Outcome::Refused(order),
        },
    })
}

/// Whether an order is as a change wants it, so that a repetition changes nothing.
fn is_done_already(order: &Order, change: &Change) -> bool {
    match change {
        Change::Pay { amount, reference, .. } => {
            order.payment.reference.as_ref() == Some(reference)
                && order.payment.amount.as_ref() == Some(amount)
        }
        Change::SetShippingAddress(address) => {
            matches!(order.status, Status::Pending | Status::Processing)
                && order.shipping_address.as_ref().is_some_and(|kept| kept.get() == address)
        }
        Change::Ship { carrier, tracking_number } => {
            order.shipment.carrier.as_ref() == Some(carrier)
                && order.shipment.tracking_number.as_ref() == Some(tracking_number)
        }
        Change::Deliver => order.status == Status::Delivered,
        Change::Cancel(..) => order.status == Status::Canceled,
        Change::Refund { .. } => order.payment.refunded_at.is_some(),
        Change::FailPayment { .. } | Change::Delete => false,
    }
}
