//! An order: its rules, and the id of its message.
//!
//! Billing applies the same rules to messages of the queue, because any client may publish there;
//! both are tested with the examples in `billing/messages/`, and the fuzzer holds them against each
//! other.

use chassis::decimal::{self, Cents};
use chassis::problem::Problem;
use chassis::request;
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::{Uuid, uuid};

/// The namespace of ids that are made from idempotency keys (RFC 9562 section 5.5).
const IDEMPOTENCY_NAMESPACE: Uuid = uuid!("0a4d1f1e-52a4-4f0f-9a3b-6f1c5ee0c2b7");

const USER_ID_RULE: &str = "must be a string of 1 to 255 characters without U+0000, or a number";
const NUMBER_OF_ITEMS_RULE: &str =
    "must be a whole number from 0 to 2147483647, as a number or a string of digits";
const TOTAL_AMOUNT_RULE: &str =
    "must be from 0 to 999999999999.99 with at most two decimals, as a number or a string";

/// The largest amount: what `numeric(14, 2)` holds.
const TOTAL_AMOUNT_MAX: Cents = Cents(99_999_999_999_999);

/// The largest body of an order, in bytes, unknown fields included: billing has about two thousand
/// orders in memory at a time.
pub const MAX_ORDER_BYTES: usize = 16 << 10;

/// A valid order.
#[derive(Debug)]
pub struct Order {
    /// The body of its message: the request's body without white space between its tokens.
    pub body: String,
    user_id: String,
}

#[derive(Deserialize)]
struct RawOrder<'b> {
    #[serde(borrow)]
    user_id: Option<&'b RawValue>,
    #[serde(borrow)]
    number_of_items: Option<&'b RawValue>,
    #[serde(borrow)]
    total_amount: Option<&'b RawValue>,
}

impl Order {
    /// Parses a body: 400 when it is not JSON, 422 with one entry for each invalid field.
    pub fn parse(text: &str) -> Result<Order, Problem> {
        let fields: RawOrder<'_> = request::json_object(text)?;
        let mut invalid = Vec::new();
        let mut check =
            |field: &str, value: Option<&RawValue>, holds: fn(&str) -> bool, rule: &str| {
                let Some(value) = value else {
                    invalid.push((field.to_owned(), "is required".to_owned()));
                    return None;
                };
                let kept = decimal::string_or_number(value).ok().filter(|text| holds(text));
                if kept.is_none() {
                    invalid.push((field.to_owned(), rule.to_owned()));
                }
                kept
            };
        let user_id = check("user_id", fields.user_id, is_user_id, USER_ID_RULE);
        check("number_of_items", fields.number_of_items, is_number_of_items, NUMBER_OF_ITEMS_RULE);
        check("total_amount", fields.total_amount, is_total_amount, TOTAL_AMOUNT_RULE);
        match user_id {
            Some(user_id) if invalid.is_empty() => Ok(Order { body: minify(text), user_id }),
            _ => Err(Problem::unprocessable(invalid)),
        }
    }

    /// The message's id: a new one (UUIDv7), or the one of this user and key, the same each time (UUIDv5).
    pub fn message_id(&self, key: Option<&str>) -> String {
        let id = match key {
            Some(key) => {
                // A user id contains no U+0000, so two different pairs never give the same name.
                Uuid::new_v5(&IDEMPOTENCY_NAMESPACE, format!("{}\0{key}", self.user_id).as_bytes())
            }
            None => Uuid::now_v7(),
        };
        id.to_string()
    }
}

fn is_user_id(text: &str) -> bool {
    (1..=255).contains(&text.chars().count()) && !text.contains('\0')
}

fn is_number_of_items(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<i32>().is_ok()
}

fn is_total_amount(text: &str) -> bool {
    Cents::parse(text).is_some_and(|cents| cents <= TOTAL_AMOUNT_MAX)
}

/// Removes the white space between tokens; everything else stays as it is written.
fn minify(json: &str) -> String {
    let (mut in_string, mut escaped) = (false, false);
    json.chars()
        .filter(|letter| {
            match letter {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => in_string = !in_string,
                _ => (),
            }
            in_string || !matches!(letter, ' ' | '\t' | '\n' | '\r')
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_queued_as_it_was_spelled_without_the_white_space_around() {
        let text = "{ \"total_amount\" : 29.90 ,\n\t\"user_id\": \"a \\\" \\u0041\",\r\n \"number_of_items\":\"007\", \"x\": [ 1, 2 ] }";
        let order = Order::parse(text).unwrap();
        let queued =
            r#"{"total_amount":29.90,"user_id":"a \" \u0041","number_of_items":"007","x":[1,2]}"#;
        assert_eq!(order.body, queued);
        assert_eq!(order.user_id, "a \" A");
    }

    #[test]
    fn every_broken_field_is_named() {
        let problem = Order::parse(r#"{"user_id":"","number_of_items":-1,"total_amount":1.005}"#);
        let answer = problem.unwrap_err().to_string();
        for field in ["user_id must", "number_of_items must", "total_amount must"] {
            assert!(answer.contains(field), "{answer}");
        }
        let answer = Order::parse(r#"{"user_id":1}"#).unwrap_err().to_string();
        assert_eq!(answer, "number_of_items is required; total_amount is required");
    }

    #[test]
    fn what_is_no_json_is_a_400_and_what_is_no_order_a_422() {
        let order = |user: &str, items: &str, amount: &str| {
            format!(r#"{{"user_id":{user},"number_of_items":{items},"total_amount":{amount}}}"#)
        };
        let deep = format!("{{\"user_id\":{}", "[".repeat(500));
        for (text, status) in [
            ("", 400),
            ("{", 400),
            ("hello", 400),
            (&deep, 400),
            ("null", 422),
            ("7", 422),
            ("[\"20\",\"1\",\"2\"]", 422),
            ("{}", 422),
            (r#"{"user_id":1,"user_id":2,"number_of_items":1,"total_amount":1}"#, 422),
            (&order("null", "1", "1"), 422),
            (&order("true", "1", "1"), 422),
            (&order("{}", "1", "1"), 422),
            (&order("\"\\u0000\"", "1", "1"), 422),
            (&order(&format!("\"{}\"", "x".repeat(256)), "1", "1"), 422),
            (&order("1", "2147483648", "1"), 422),
            (&order("1", "1.0", "1"), 422),
            (&order("1", "\" 1\"", "1"), 422),
            (&order("1", "\"\"", "1"), 422),
            (&order("1", "1", "-0.01"), 422),
            (&order("1", "1", "1000000000000"), 422),
            (&order("1", "1", "\"1_000\""), 422),
            (&order("1", "1", "\"NaN\""), 422),
            (&order("1", "1", "1e400"), 422),
        ] {
            assert_eq!(Order::parse(text).unwrap_err().status(), status, "{text}");
        }
    }

    #[test]
    fn numbers_and_strings_up_to_the_limits_are_orders() {
        for (user, items, amount) in [
            ("20", "99", "250"),
            ("\"20\"", "\"99\"", "\"250\""),
            ("1.5", "0", "0"),
            ("-1", "2147483647", "999999999999.99"),
            ("1", "1", "1.5e2"),
            ("1", "1", "1.500"),
        ] {
            let text = format!(
                r#"{{"user_id":{user},"number_of_items":{items},"total_amount":{amount}}}"#
            );
            Order::parse(&text).unwrap_or_else(|problem| panic!("{text}: {problem}"));
        }
    }

    #[test]
    fn a_key_and_a_user_always_give_the_same_id_and_others_another() {
        let order = |user: &str| {
            let text = format!(r#"{{"user_id":{user},"number_of_items":1,"total_amount":1}}"#);
            Order::parse(&text).unwrap()
        };
        let id = order("\"20\"").message_id(Some("a"));
        assert_eq!(order("20").message_id(Some("a")), id);
        assert_ne!(order("20").message_id(Some("b")), id);
        assert_ne!(order("21").message_id(Some("a")), id);
        assert_ne!(order("20").message_id(None), order("20").message_id(None));
    }
}
