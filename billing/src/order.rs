//! An order: its fields, the JSON it is read from and the rules it must keep.
//!
//! The gateway applies the same rules at its door, but whoever may publish to
//! the queue may have written a message by hand.

use std::fmt;

use chassis::decimal;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

/// The longest user id, in characters.
const USER_ID_MAX: usize = 255;

/// The largest amount, in cents: what `numeric(14, 2)` holds.
const TOTAL_AMOUNT_MAX: i64 = 99_999_999_999_999;

/// What somebody ordered; every value is within its column's range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Who ordered.
    pub user_id: String,
    /// How many.
    pub number_of_items: i32,
    /// For how much, in cents: exact, and no float on the way.
    pub total_cents: i64,
}

/// Why a message is no order: names the field and the rule, never the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(pub String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The three values as the JSON spells them. A key that occurs twice is an
/// error of serde's, keys of other names are skipped.
#[derive(Deserialize)]
struct Spelled<'a> {
    #[serde(borrow)]
    user_id: Option<&'a RawValue>,
    #[serde(borrow)]
    number_of_items: Option<&'a RawValue>,
    #[serde(borrow)]
    total_amount: Option<&'a RawValue>,
}

impl Order {
    /// Reads the body of a message.
    pub fn parse(body: &[u8]) -> Result<Order, Refused> {
        let refused = |reason: String| Err(Refused(reason));
        let Ok(text) = std::str::from_utf8(body) else {
            return refused("the body is not valid UTF-8".to_owned());
        };
        let not_json = |err: serde_json::Error| format!("the body is not JSON: {err}");
        // An array would do for serde as well.
        if !text.trim_ascii_start().starts_with('{') {
            return refused(match serde_json::from_str::<IgnoredAny>(text) {
                Ok(_) => "the body must be a JSON object".to_owned(),
                Err(err) => not_json(err),
            });
        }
        let spelled: Spelled = match serde_json::from_str(text) {
            Ok(spelled) => spelled,
            Err(err) if err.is_data() => return refused(err.to_string()),
            Err(err) => return refused(not_json(err)),
        };
        Ok(Order {
            user_id: user_id(text_of("user_id", spelled.user_id)?)?,
            number_of_items: number_of_items(&text_of(
                "number_of_items",
                spelled.number_of_items,
            )?)?,
            total_cents: total_cents(&text_of("total_amount", spelled.total_amount)?)?,
        })
    }
}

/// The text of a string, or a number as it is spelled.
fn text_of(field: &str, value: Option<&RawValue>) -> Result<String, Refused> {
    let value = value.ok_or_else(|| Refused(format!("{field} is required")))?;
    decimal::string_or_number(value).map_err(|rule| Refused(format!("{field} {rule}")))
}

fn user_id(text: String) -> Result<String, Refused> {
    if text.contains('\0') {
        return Err(Refused("user_id must not contain U+0000".to_owned()));
    }
    if !(1..=USER_ID_MAX).contains(&text.chars().count()) {
        return Err(Refused(format!("user_id must have 1 to {USER_ID_MAX} characters")));
    }
    Ok(text)
}

fn number_of_items(text: &str) -> Result<i32, Refused> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or_else(|| {
        Refused(format!("number_of_items must be a whole number from 0 to {}", i32::MAX))
    })
}

fn total_cents(text: &str) -> Result<i64, Refused> {
    decimal::parse_cents(text).filter(|cents| *cents <= TOTAL_AMOUNT_MAX).ok_or_else(|| {
        let rule = "must be from 0 to 999999999999.99, with at most two decimals";
        Refused(format!("total_amount {rule}"))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_an_order_or_refused_with_a_reason(body: Vec<u8>) {
            if let Err(Refused(reason)) = Order::parse(&body) {
                prop_assert!(!reason.is_empty());
            }
        }
    }
}
