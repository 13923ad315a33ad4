//! Orders: what the gateway takes at the door is what billing books, and nothing
//! that it has answered with 200 ends among the dead letters.

use std::collections::BTreeMap;

use serde_json::Value;
use serde_json::value::RawValue;

/// Panics where the gateway and billing do not read `body` in the same way, or one
/// of them reads it wrongly.
pub fn check(body: &[u8]) {
    let booked = billing::order::Order::parse(body);
    let Ok(text) = str::from_utf8(body) else {
        assert!(booked.is_err(), "billing takes what is not UTF-8");
        return;
    };
    let taken = match gateway::order::Order::parse(text) {
        Ok(taken) => taken,
        Err(problem) => {
            assert!([400, 422].contains(&problem.status()), "{problem}");
            assert!(booked.is_err(), "billing takes what the gateway refuses: {problem}");
            return;
        }
    };
    let queued = billing::order::Order::parse(taken.body.as_bytes());
    assert_eq!(queued, booked, "the queued body says something else");
    let booked = match booked {
        Ok(booked) => booked,
        Err(refused) => panic!("the gateway has taken what billing refuses: {refused}"),
    };
    as_it_was_spelled(text, &booked);
    compacted(text, &taken);
}

/// The values, read once more in another way, and the limits of their columns.
fn as_it_was_spelled(text: &str, booked: &billing::order::Order) {
    let fields: BTreeMap<String, &RawValue> = fields(text);
    let spelled = |name: &str| -> String {
        let raw = fields[name].get();
        match raw.starts_with('"') {
            true => serde_json::from_str(raw).unwrap(),
            false => raw.to_owned(),
        }
    };
    assert_eq!(booked.user_id, spelled("user_id"));
    assert!((1..=255).contains(&booked.user_id.chars().count()) && !booked.user_id.contains('\0'));
    let items: u64 = spelled("number_of_items").parse().unwrap();
    assert_eq!(u64::try_from(booked.number_of_items), Ok(items));
    let amount = spelled("total_amount");
    assert_eq!(Some(booked.total_cents), cents(&amount), "{amount}");
    // What numeric(14, 2) holds.
    assert!((0..=99_999_999_999_999).contains(&booked.total_cents), "{amount}");
}

fn fields(text: &str) -> BTreeMap<String, &RawValue> {
    serde_json::from_str(text).unwrap()
}

/// A decimal number in cents, by moving the point in its digits.
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

/// Leaving out white space changes nothing else.
fn compacted(text: &str, taken: &gateway::order::Order) {
    assert!(taken.body.len() <= text.len());
    let again = gateway::order::Order::parse(&taken.body).unwrap();
    assert_eq!(again.body, taken.body);
    assert_eq!(again.message_id(Some("key")), taken.message_id(Some("key")));
    let (before, after) = (fields(text), fields(&taken.body));
    assert!(before.keys().eq(after.keys()));
    for (name, raw) in before {
        // A number that no double holds is no Value, but spelled alike.
        let value = |raw: &RawValue| serde_json::from_str::<Value>(raw.get()).ok();
        assert_eq!(value(raw), value(after[&name]), "{name}");
    }
}
