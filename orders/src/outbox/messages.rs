//! The messages of an event: their receivers and their forms.

use chassis::response::timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::orders::order::Order;
use crate::orders::store::Event;

/// The routing key of the older form of `order.created`.
const OLDER_FORM: &str = "created_order";

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// The queue of billing.
    Queue,
    /// The exchange of orders.
    Exchange,
}

impl Target {
    /// As it stands in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Target::Queue => "queue",
            Target::Exchange => "exchange",
        }
    }
}

/// A message that is to be published.
#[derive(Debug)]
pub struct NewMessage {
    /// By which a receiver recognises a repetition.
    pub message_id: String,
    /// Where it goes.
    pub target: Target,
    /// What it is, for a receiver that does not want all.
    pub routing_key: String,
    /// JSON.
    pub body: String,
}

/// The message of an event.
#[derive(Serialize)]
struct EventMessage<'m> {
    id: Uuid,
    #[serde(rename = "type")]
    kind: &'m str,
    occurred_at: String,
    producer: &'m str,
    order: &'m Order,
}

/// The older form of a new order.
#[derive(Serialize)]
struct CreatedMessage<'m> {
    producer: &'m str,
    sent_at: String,
    #[serde(rename = "type")]
    kind: &'m str,
    payload: CreatedPayload<'m>,
}

#[derive(Serialize)]
struct CreatedPayload<'m> {
    order: CreatedOrder<'m>,
}

#[derive(Serialize)]
struct CreatedOrder<'m> {
    order_id: Uuid,
    customer_fullname: &'m str,
    product_name: String,
    total_amount: &'m str,
    created_at: &'m str,
}

/// The message that billing books.
#[derive(Serialize)]
struct BillingMessage<'m> {
    user_id: String,
    number_of_items: i64,
    total_amount: &'m str,
}

/// The messages of an event, in the order in which they are published.
pub fn of_event(order: &Order, event: &Event) -> Vec<NewMessage> {
    let order = &Order { history: None, published: None, ..order.clone() };
    let message_id = event.id.to_string();
    let kind = format!("order.{}", event.kind);
    let occurred_at = timestamp(event.at);
    let message = |routing_key: &str, body: String| NewMessage {
        message_id: message_id.clone(),
        target: Target::Exchange,
        routing_key: routing_key.to_owned(),
        body,
    };
    let body = json(&EventMessage {
        id: event.id,
        kind: &kind,
        occurred_at: occurred_at.clone(),
        producer: "orders",
        order,
    });
    let mut messages = vec![message(&kind, body)];
    match event.kind {
        "created" => {
            let names: Vec<&str> = order.lines.iter().map(|line| line.name.as_str()).collect();
            let created = CreatedMessage {
                producer: "orders",
                sent_at: occurred_at,
                kind: OLDER_FORM,
                payload: CreatedPayload {
                    order: CreatedOrder {
                        order_id: order.id,
                        customer_fullname: order.customer.name.as_deref().unwrap_or_default(),
                        product_name: names.join(", "),
                        total_amount: &order.total_amount,
                        created_at: &order.created_at,
                    },
                },
            };
            messages.push(message(OLDER_FORM, json(&created)));
        }
        "paid" => messages.push(NewMessage {
            // An order is paid once, so it is booked once.
            message_id: order.id.to_string(),
            target: Target::Queue,
            routing_key: String::new(),
            body: json(&BillingMessage {
                user_id: order.user_id.to_string(),
                number_of_items: order.number_of_items(),
                total_amount: &order.total_amount,
            }),
        }),
        _ => (),
    }
    messages
}

fn json(message: &impl Serialize) -> String {
    // It fails only for a map whose keys are no strings.
    serde_json::to_string(message).unwrap_or_default()
}
