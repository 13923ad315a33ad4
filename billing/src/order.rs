//! An order: its fields, the JSON it is read from and the rules it must keep.
//!
//! The gateway applies the same rules before it publishes an order, but any client of the queue may
//! have written a message by hand. The fuzzer holds the two against each other.

use std::fmt;

use chassis::decimal::{self, Cents};
use chassis::request::strip_bom;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

/// The longest user id, in characters.
const USER_ID_MAX: usize = 255;

/// The largest amount: what `numeric(14, 2)` holds.
const TOTAL_AMOUNT_MAX: Cents = Cents(99_999_999_999_999);

/// An order; every value is within the range of its column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// 1 to 255 characters.
    pub user_id: String,
    /// 0 to 2147483647.
    pub number_of_items: i32,
    /// 0 to 999999999999.99.
    pub total: Cents,
}

/// Why a message is no order: it names the field and the rule, never the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidOrder(pub String);

impl fmt::Display for InvalidOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The three fields, not yet checked. A key that occurs twice is an error of serde's; other keys are
/// skipped.
#[derive(Deserialize)]
struct RawOrder<'a> {
    #[serde(borrow)]
    user_id: Option<&'a RawValue>,
    #[serde(borrow)]
    number_of_items: Option<&'a RawValue>,
    #[serde(borrow)]
    total_amount: Option<&'a RawValue>,
}

impl Order {
    /// Parses the body of a message. A byte order mark before the JSON is ignored (RFC 8259 section
    /// 8.1).
    pub fn parse(body: &[u8]) -> Result<Order, InvalidOrder> {
        let invalid = |reason: String| Err(InvalidOrder(reason));
        let Ok(text) = std::str::from_utf8(body) else {
            return invalid("the body is not valid UTF-8".to_owned());
        };
        let text = strip_bom(text);
        let not_json = |err: serde_json::Error| format!("the body is not JSON: {err}");
        // Serde would take an array for a struct.
        if !text.trim_ascii_start().starts_with('{') {
            return invalid(match serde_json::from_str::<IgnoredAny>(text) {
                Ok(_) => "the body must be a JSON object".to_owned(),
                Err(err) => not_json(err),
            });
        }
        let raw: RawOrder = match serde_json::from_str(text) {
            Ok(raw) => raw,
            Err(err) if err.is_data() => return invalid(err.to_string()),
            Err(err) => return invalid(not_json(err)),
        };
        Ok(Order {
            user_id: user_id(required_text("user_id", raw.user_id)?)?,
            number_of_items: number_of_items(&required_text(
                "number_of_items",
                raw.number_of_items,
            )?)?,
            total: total(&required_text("total_amount", raw.total_amount)?)?,
        })
    }
}

/// The text of a string, or a number as it is raw.
fn required_text(field: &str, value: Option<&RawValue>) -> Result<String, InvalidOrder> {
    let value = value.ok_or_else(|| InvalidOrder(format!("{field} is required")))?;
    decimal::string_or_number(value).map_err(|rule| InvalidOrder(format!("{field} {rule}")))
}

fn user_id(text: String) -> Result<String, InvalidOrder> {
    if text.contains('\0') {
        return Err(InvalidOrder("user_id must not contain U+0000".to_owned()));
    }
    if !(1..=USER_ID_MAX).contains(&text.chars().count()) {
        return Err(InvalidOrder(format!("user_id must have 1 to {USER_ID_MAX} characters")));
    }
    Ok(text)
}

fn number_of_items(text: &str) -> Result<i32, InvalidOrder> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or_else(|| {
        InvalidOrder(format!("number_of_items must be a whole number from 0 to {}", i32::MAX))
    })
}

fn total(text: &str) -> Result<Cents, InvalidOrder> {
    Cents::parse(text).filter(|cents| *cents <= TOTAL_AMOUNT_MAX).ok_or_else(|| {
        let rule = "must be from 0 to 999999999999.99, with at most two decimals";
        InvalidOrder(format!("total_amount {rule}"))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_byte_order_mark_before_the_json_is_ignored() {
        let body = "\u{feff}{\"user_id\":\"3\",\"number_of_items\":5,\"total_amount\":\"180\"}";
        let expected = Order { user_id: "3".to_owned(), number_of_items: 5, total: Cents(18_000) };
        assert_eq!(Order::parse(body.as_bytes()), Ok(expected));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_order_or_invalid_with_a_reason(body: Vec<u8>) {
            match Order::parse(&body) {
                Ok(order) => prop_assert!(order.total <= TOTAL_AMOUNT_MAX),
                Err(InvalidOrder(reason)) => prop_assert!(!reason.is_empty()),
            }
        }
    }
}
