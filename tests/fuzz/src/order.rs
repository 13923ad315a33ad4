//! Orders: the gateway accepts exactly the bodies that billing books, and no order that it has
//! answered with 200 becomes a dead letter.

use std::collections::BTreeMap;

use serde_json::Value;
use serde_json::value::RawValue;

/// Panics where the gateway and billing read `body` differently, or one of them reads it wrongly.
pub fn check(body: &[u8]) {
    let booked = billing::order::Order::parse(body);
    let Ok(text) = str::from_utf8(body) else {
        assert!(booked.is_err(), "billing accepts a body that is not UTF-8");
        return;
    };
    // The gateway reads every body of JSON through `json_text`, which does this.
    let text = chassis::request::strip_bom(text);
    let accepted = match gateway::billing::order::Order::parse(text) {
        Ok(accepted) => accepted,
        Err(problem) => {
            assert!([400, 422].contains(&problem.status()), "{problem}");
            assert!(booked.is_err(), "billing accepts what the gateway rejects: {problem}");
            return;
        }
    };
    let queued = billing::order::Order::parse(accepted.body.as_bytes());
    assert_eq!(queued, booked, "the queued body is another order");
    let booked = match booked {
        Ok(booked) => booked,
        Err(invalid) => panic!("the gateway accepts what billing rejects: {invalid}"),
    };
    matches_raw_text(text, &booked);
    is_minified(text, &accepted);
}

/// The values are those of the text, which is read here in another way, and fit their columns.
fn matches_raw_text(text: &str, booked: &billing::order::Order) {
    let fields: BTreeMap<String, &RawValue> = fields(text);
    let raw_value = |name: &str| -> String {
        let raw = fields[name].get();
        match raw.starts_with('"') {
            true => serde_json::from_str(raw).unwrap(),
            false => raw.to_owned(),
        }
    };
    assert_eq!(booked.user_id, raw_value("user_id"));
    assert!((1..=255).contains(&booked.user_id.chars().count()) && !booked.user_id.contains('\0'));
    let items: u64 = raw_value("number_of_items").parse().unwrap();
    assert_eq!(u64::try_from(booked.number_of_items), Ok(items));
    let amount = raw_value("total_amount");
    assert_eq!(Some(booked.total.0), cents(&amount), "{amount}");
    // The range of numeric(14, 2).
    assert!((0..=99_999_999_999_999).contains(&booked.total.0), "{amount}");
}

fn fields(text: &str) -> BTreeMap<String, &RawValue> {
    serde_json::from_str(text).unwrap()
}

/// A decimal number in cents, computed by moving the point in its digits.
fn cents(text: &str) -> Option<i64> {
    let lower = text.to_ascii_lowercase();
    let (mantissa, exponent) = lower.split_once('e').unwrap_or((&lower, "0"));
    let mantissa = mantissa.strip_prefix('-').unwrap_or(mantissa);
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_start_matches('0');
    if significant.is_empty() {
        return Some(0);
    }
    let point = whole.len() as i64 + exponent.parse::<i64>().ok()? + 2;
    let point = usize::try_from(point).ok().filter(|point| *point < digits.len() + 20)?;
    let padded = format!("{digits:0<point$}");
    let (before, after) = padded.split_at(point);
    let exact = after.bytes().all(|digit| digit == b'0') && !text.starts_with('-');
    before.trim_start_matches('0').parse().ok().filter(|_| exact)
}

/// The queued body is the text without white space and otherwise the same.
fn is_minified(text: &str, accepted: &gateway::billing::order::Order) {
    assert!(accepted.body.len() <= text.len());
    let again = gateway::billing::order::Order::parse(&accepted.body).unwrap();
    assert_eq!(again.body, accepted.body);
    assert_eq!(again.message_id(Some("key")), accepted.message_id(Some("key")));
    let (before, after) = (fields(text), fields(&accepted.body));
    assert!(before.keys().eq(after.keys()));
    for (name, raw) in before {
        // A number that no double holds cannot be read as a Value: its text is compared above.
        let value = |raw: &RawValue| serde_json::from_str::<Value>(raw.get()).ok();
        assert_eq!(value(raw), value(after[&name]), "{name}");
    }
}
