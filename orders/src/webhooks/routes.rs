//! The HTTP API for payment and shipping providers.

use std::io::Read;
use std::time::{SystemTime, UNIX_EPOCH};

use chassis::db::{in_transaction, renew_deadline};
use chassis::etag::Precondition;
use chassis::request::{self as http, single_header};
use chassis::router::Params;
use chassis::{Problem, response};
use rouille::{Request, Response};
use serde_json::json;

use super::event::{Provider, ProviderEvent};
use super::{signature, store};
use crate::orders::change;
use crate::orders::routes::into_result;
use crate::orders::store::Actor;
use crate::{App, metrics};

/// `POST /api/v1/webhooks/payments`
pub fn payments(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    receive(app, request, Provider::Payments)
}

/// `POST /api/v1/webhooks/shipments`
pub fn shipments(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    receive(app, request, Provider::Shipments)
}

fn receive(app: &App, request: &Request, provider: Provider) -> Result<Response, Problem> {
    if app.webhook_secrets.is_empty() {
        return Err(Problem::not_found("there is nothing at this path"));
    }
    let text = verified_body(app, request)?;
    let event = ProviderEvent::parse(&text, provider)?;
    let change = change::Request {
        order_id: event.order_id,
        owner: None,
        precondition: Precondition::default(),
        actor: Actor::Provider,
        event_id: event.event_id(),
        change: event.change.clone(),
    };
    let received = app.db.write(|db| {
        in_transaction(db, |db| {
            if !store::claim(db, &event, &text)? {
                return Ok(None);
            }
            renew_deadline();
            let outcome = change::apply(db, &change)?;
            let instance = db.statements.instance.clone();
            let result = into_result(outcome, &event.change, &instance);
            let refusal = result.as_ref().err().map(ToString::to_string);
            store::finish(db, &event, refusal.as_deref())?;
            Ok(Some(result))
        })
    })?;
    let answer = json!({ "id": event.id, "order_id": event.order_id });
    match received {
        Some(Ok(_)) => {
            app.wake();
            Ok(response::ok(&answer))
        }
        // The same event again.
        None => Ok(response::ok(&answer)),
        Some(Err(problem)) => {
            metrics::WEBHOOKS_REFUSED.inc();
            log::warn!("order {}: {} is refused: {problem}", event.order_id, event.kind);
            Err(problem)
        }
    }
}

/// The body, if its signature is right.
fn verified_body(app: &App, request: &Request) -> Result<String, Problem> {
    let unauthorized = |detail: &str| Problem::new(401, detail);
    let header = single_header(request, "X-Signature")?
        .ok_or_else(|| unauthorized("this needs a signature in the header X-Signature"))?;
    let mut bytes = Vec::new();
    if let Some(mut data) = request.data() {
        // The server has read the body already; this copies from memory.
        data.read_to_end(&mut bytes).map_err(|err| Problem::internal().with_cause(err))?;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |it| it.as_secs() as i64);
    signature::verify(header, &bytes, &app.webhook_secrets, now)
        .map_err(|err| unauthorized(err.as_str()))?;
    let text = String::from_utf8(bytes);
    text.map(|text| http::strip_bom(&text).to_owned())
        .map_err(|_| Problem::bad_request("the body is not valid UTF-8"))
}
