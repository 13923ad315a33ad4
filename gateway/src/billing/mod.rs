//! `POST /api/billing`: validates an order and publishes it to the queue.

pub mod idempotency;
pub mod order;
pub mod publisher;
mod unconfirmed;

use chassis::problem::Problem;
use chassis::router::Params;
use chassis::{request as http, response};
use rouille::{Request, Response};
use serde_json::json;

use crate::App;
use order::Order;

/// `POST /api/billing`
pub fn place_order(app: &App, request: &Request, _: &Params<'_>) -> Result<Response, Problem> {
    let key = http::idempotency_key(request)?;
    let text = http::json_text(request)?;
    if text.len() > order::MAX_ORDER_BYTES {
        let limit = order::MAX_ORDER_BYTES;
        return Err(Problem::new(413, format!("an order may have at most {limit} bytes")));
    }
    let order = Order::parse(&text)?;
    let id = order.message_id(key.as_deref());
    if key.is_some() && !app.idempotency.is_same_body(&id, &order.body) {
        let rule = "was used before with another body; use a new key for another order";
        return Err(Problem::invalid_field("Idempotency-Key", rule));
    }
    app.publisher.publish(&id, order.body)?;
    Ok(response::ok(&json!({ "message": "Message posted", "id": id })))
}
