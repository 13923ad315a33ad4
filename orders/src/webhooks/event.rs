//! An event of a provider: its JSON form, and the change that it is.

use chassis::Problem;
use chassis::fields::Errors;
use chassis::request::{self, deserialize_present};
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::{Uuid, uuid};

use crate::orders::change::Change;
use crate::orders::input::refuse_card_numbers;
use crate::pricing::MAX_TOTAL;

/// The namespace of ids that are made from providers' ids (RFC 9562 section 5.5).
const NAMESPACE: Uuid = uuid!("5b0cf8f2-6a7e-4c53-9f0e-1d9d3a8a6f11");

/// Which provider's events a path takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Provider {
    /// `payment.…` and `refund.…`
    Payments,
    /// `shipment.…`
    Shipments,
}

/// An event of a provider.
#[derive(Debug)]
pub struct ProviderEvent {
    /// The provider's id.
    pub id: String,
    /// Such as `payment.succeeded`.
    pub kind: String,
    /// The order.
    pub order_id: Uuid,
    /// What it changes.
    pub change: Change,
}

#[derive(Deserialize)]
struct RawEvent<'b> {
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    id: Option<&'b RawValue>,
    #[serde(borrow, default, rename = "type", deserialize_with = "deserialize_present")]
    kind: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    order_id: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    amount: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    reference: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    method: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    reason: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    carrier: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    tracking_number: Option<&'b RawValue>,
}

impl ProviderEvent {
    /// Parses a body; the problem names every invalid field at once.
    pub fn parse(text: &str, provider: Provider) -> Result<ProviderEvent, Problem> {
        let body: RawEvent<'_> = request::json_object(text)?;
        let mut errors = Errors::default();
        refuse_card_numbers(text, &mut errors);
        let id = errors.short_text(body.id, "id", 255);
        let id = errors.require(id, "id");
        let order_id = errors.required_text(body.order_id, "order_id", |text| {
            text.parse().map_err(|_| "must be the id of an order")
        });
        let kind = errors.short_text(body.kind, "type", 100);
        let kind = errors.require(kind, "type");
        let change = change(&body, &kind, provider, &mut errors);
        errors.into_result()?;
        match change {
            Some(change) => Ok(ProviderEvent { id, kind, order_id, change }),
            None => Err(Problem::invalid_field("type", "is required")),
        }
    }

    /// The id of the order's event: the same each time.
    pub fn event_id(&self) -> Uuid {
        Uuid::new_v5(&NAMESPACE, self.id.as_bytes())
    }
}

fn change(
    body: &RawEvent<'_>,
    kind: &str,
    provider: Provider,
    errors: &mut Errors,
) -> Option<Change> {
    let mut text = |raw, field: &str, required: bool, max: usize| {
        let given = errors.short_text(raw, field, max);
        match required {
            true => Some(errors.require(given, field)),
            false => given.value(),
        }
    };
    Some(match (provider, kind) {
        (Provider::Payments, "payment.succeeded") => {
            let reference = text(body.reference, "reference", true, 200)?;
            let method = text(body.method, "method", false, 100);
            let amount = errors.amount(body.amount, "amount", MAX_TOTAL);
            let amount = errors.require(amount, "amount").to_string();
            Change::Pay { amount, reference, method }
        }
        (Provider::Payments, "payment.failed") => {
            Change::FailPayment { reason: text(body.reason, "reason", false, 200) }
        }
        (Provider::Payments, "refund.succeeded") => {
            Change::Refund { reference: text(body.reference, "reference", false, 200) }
        }
        (Provider::Shipments, "shipment.shipped") => Change::Ship {
            carrier: text(body.carrier, "carrier", true, 100)?,
            tracking_number: text(body.tracking_number, "tracking_number", true, 100)?,
        },
        (Provider::Shipments, "shipment.delivered") => Change::Deliver,
        // What is missing has its error already.
        (_, "") => return None,
        (Provider::Payments, _) => {
            errors.add("type", "must be payment.succeeded, payment.failed or refund.succeeded");
            return None;
        }
        (Provider::Shipments, _) => {
            errors.add("type", "must be shipment.shipped or shipment.delivered");
            return None;
        }
    })
}
