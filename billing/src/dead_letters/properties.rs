//! The AMQP properties of dead letters.

use std::time::SystemTime;

use amiquip::{AmqpProperties, AmqpValue, Delivery, FieldTable};
use uuid::Uuid;

/// Identifies one dead letter among those with the same message id, or without one.
pub(super) const ID_HEADER: &str = "x-dead-letter-id";
pub(super) const REASON_HEADER: &str = "x-reason";
pub(super) const FAILED_AT_HEADER: &str = "x-failed-at";

/// RabbitMQ's record of why and where it has dead-lettered a message itself.
const DEATH_HEADER: &str = "x-death";

/// Headers that make the broker send copies to further queues.
const ROUTING_HEADERS: [&str; 2] = ["CC", "BCC"];

const PERSISTENT: u8 = 2;

/// The properties of a message as a dead letter.
pub(super) fn with_reason(original: &AmqpProperties, reason: &str, id: Uuid) -> AmqpProperties {
    let mut headers = headers(original);
    let failed_at = httpdate::fmt_http_date(SystemTime::now());
    headers.insert(ID_HEADER.into(), AmqpValue::LongString(id.to_string()));
    headers.insert(REASON_HEADER.into(), AmqpValue::LongString(reason.into()));
    headers.insert(FAILED_AT_HEADER.into(), AmqpValue::LongString(failed_at));
    copy_properties(original).with_headers(headers)
}

/// The properties of a dead letter as the message that it was.
pub(super) fn without_reason(original: &AmqpProperties) -> AmqpProperties {
    let mut headers = headers(original);
    for name in [ID_HEADER, REASON_HEADER, FAILED_AT_HEADER] {
        headers.remove(name);
    }
    copy_properties(original).with_headers(headers)
}

/// The text of a header; empty where there is none.
pub(super) fn header<'a>(delivery: &'a Delivery, name: &str) -> &'a str {
    match delivery.properties.headers().as_ref().and_then(|headers| headers.get(name)) {
        Some(AmqpValue::LongString(text)) => text,
        _ => "",
    }
}

/// Why the message is here: the consumer's reason, or RabbitMQ's own for a message that expired or
/// that exceeded a limit of its queue (the first entry of `x-death`, the latest).
pub(super) fn reason(delivery: &Delivery) -> String {
    let own = header(delivery, REASON_HEADER);
    if !own.is_empty() {
        return own.to_owned();
    }
    let deaths =
        delivery.properties.headers().as_ref().and_then(|headers| headers.get(DEATH_HEADER));
    let Some(AmqpValue::FieldArray(deaths)) = deaths else { return String::new() };
    let Some(AmqpValue::FieldTable(death)) = deaths.first() else { return String::new() };
    let text = |name: &str| match death.get(name) {
        Some(AmqpValue::LongString(text)) => text.as_str(),
        _ => "?",
    };
    let reason = match text("reason") {
        "expired" => "it expired",
        "maxlen" => "the queue was full",
        "delivery_limit" => "it was delivered too often",
        other => other,
    };
    format!("the broker moved it here from {}: {reason}", text("queue"))
}

fn headers(original: &AmqpProperties) -> FieldTable {
    let mut headers = original.headers().clone().unwrap_or_default();
    for name in ROUTING_HEADERS {
        headers.remove(name);
    }
    headers
}

/// All properties but the headers; the message is persistent. Not copied are the expiration, which
/// would delete the dead letter, and the AMQP user, which only the original sender may name.
fn copy_properties(original: &AmqpProperties) -> AmqpProperties {
    let mut copy = AmqpProperties::default().with_delivery_mode(PERSISTENT);
    macro_rules! keep {
        ($($get:ident $with:ident),*) => {
            $(if let Some(value) = original.$get() {
                copy = copy.$with(value.clone());
            })*
        };
    }
    keep!(
        content_type with_content_type, content_encoding with_content_encoding,
        priority with_priority, correlation_id with_correlation_id, reply_to with_reply_to,
        message_id with_message_id, timestamp with_timestamp, type_ with_type_,
        app_id with_app_id
    );
    copy
}
