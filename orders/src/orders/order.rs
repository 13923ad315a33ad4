//! An order: its fields and its JSON form.

use std::time::SystemTime;

use chassis::response::timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

/// What became of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Not paid yet.
    Pending,
    /// Paid, not shipped yet.
    Processing,
    /// On its way.
    Shipped,
    /// With the customer.
    Delivered,
    /// It will not be shipped.
    Canceled,
}

impl Status {
    const ALL: [Status; 5] =
        [Status::Pending, Status::Processing, Status::Shipped, Status::Delivered, Status::Canceled];

    /// As it stands in JSON and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Pending => "pending",
            Status::Processing => "processing",
            Status::Shipped => "shipped",
            Status::Delivered => "delivered",
            Status::Canceled => "canceled",
        }
    }

    /// The status of this name; `cancelled` is one, too.
    pub fn parse(name: &str) -> Option<Status> {
        let name = if name == "cancelled" { "canceled" } else { name };
        Status::ALL.into_iter().find(|status| status.as_str() == name)
    }
}

/// An order. The order of the fields is that of the answers; what is not there yet is null.
#[derive(Clone, Debug, Serialize)]
pub struct Order {
    /// UUIDv7.
    pub id: Uuid,
    /// Whose it is.
    pub user_id: i64,
    /// The store in which it was made, as the client named it.
    pub store_id: Option<String>,
    /// What became of it.
    pub status: Status,
    /// As the account was when the order was made.
    pub customer: Customer,
    /// The products.
    pub lines: Vec<Line>,
    /// The sum of the lines, with two decimals.
    pub items_total: String,
    /// With two decimals.
    pub shipping_cost: String,
    /// With two decimals.
    pub tax_amount: String,
    /// What is to be paid, with two decimals.
    pub total_amount: String,
    /// ISO 4217.
    pub currency: String,
    /// A postal address as JSON.
    pub shipping_address: Option<Box<RawValue>>,
    /// A postal address as JSON.
    pub billing_address: Option<Box<RawValue>>,
    /// What the customer wants to pay with, as JSON.
    pub payment_method: Option<Box<RawValue>>,
    /// What was paid.
    pub payment: Payment,
    /// What was shipped.
    pub shipment: Shipment,
    /// Why and when it was canceled.
    pub cancellation: Cancellation,
    /// What happened to it; only in the answer for a single order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub history: Option<Vec<HistoryEntry>>,
    /// Whether all its messages are published; not in the messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub published: Option<bool>,
    /// RFC 3339 in UTC with milliseconds.
    pub created_at: String,
    /// RFC 3339 in UTC with milliseconds.
    pub updated_at: String,
    /// Goes up with each change.
    #[serde(skip)]
    pub version: i64,
}

/// The customer of an order.
#[derive(Clone, Debug, Serialize)]
pub struct Customer {
    /// First and last name, or the user name.
    pub name: Option<String>,
    /// The e-mail address.
    pub email: String,
}

/// A product of an order, as it was when the order was made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// The key of the product.
    pub sku: String,
    /// Its name.
    pub name: String,
    /// The price of one, with two decimals.
    pub unit_price: String,
    /// How many.
    pub quantity: i32,
    /// With two decimals.
    pub line_total: String,
}

/// The payment of an order.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Payment {
    /// How it was paid, as the payment provider names it.
    pub method: Option<String>,
    /// The payment provider's name for it.
    pub reference: Option<String>,
    /// With two decimals.
    pub amount: Option<String>,
    /// RFC 3339.
    pub paid_at: Option<String>,
    /// The order was canceled after it was paid, and the money is not given back yet.
    pub refund_due: bool,
    /// RFC 3339.
    pub refunded_at: Option<String>,
}

/// The shipment of an order.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Shipment {
    /// Who carries it.
    pub carrier: Option<String>,
    /// The carrier's number.
    pub tracking_number: Option<String>,
    /// RFC 3339.
    pub shipped_at: Option<String>,
    /// RFC 3339.
    pub delivered_at: Option<String>,
}

/// The cancellation of an order.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cancellation {
    /// Why.
    pub reason: Option<String>,
    /// RFC 3339.
    pub canceled_at: Option<String>,
}

/// Something that happened to an order.
#[derive(Clone, Debug, Serialize)]
pub struct HistoryEntry {
    /// `created`, `paid`, `payment_failed`, `updated`, `shipped`, `delivered`, `canceled`, `refunded` or
    /// `deleted`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status after it.
    pub status: String,
    /// `customer`, `administrator`, `provider` or `service`.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
    /// RFC 3339.
    pub at: String,
}

impl Order {
    /// How many pieces there are.
    pub fn number_of_items(&self) -> i64 {
        self.lines.iter().map(|line| i64::from(line.quantity)).sum()
    }

    /// The text of the entity tag: the order's version, and whether it is published.
    pub fn entity_tag(&self, instance: &str) -> String {
        let published = u8::from(self.published.unwrap_or_default());
        format!("{instance}-{}.{published}", self.version)
    }
}

/// Now, in whole milliseconds: what the database keeps is then what the answer says.
pub fn now() -> SystemTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(since.as_millis() as u64)
}

/// A time that may not be there yet, as it stands in answers.
pub fn optional_timestamp(time: Option<SystemTime>) -> Option<String> {
    time.map(timestamp)
}
