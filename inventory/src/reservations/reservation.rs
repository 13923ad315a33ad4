//! A reservation: its lines, its JSON form, and its rules.

use std::collections::BTreeMap;
use std::time::Duration;

use chassis::fields::Errors;
use chassis::{Problem, request};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::products::product::parse_sku;

/// Most lines of one reservation.
const MAX_LINES: usize = 100;

/// Most pieces of one line.
const MAX_QUANTITY: i64 = 1_000_000;

/// How long stock may be held, in seconds.
const MAX_HOLD_S: i64 = 86_400;

/// A request to hold stock for an order.
#[derive(Clone, Debug, PartialEq)]
pub struct Hold {
    /// The order.
    pub order_id: Uuid,
    /// What it needs, each sku once.
    pub lines: Vec<HoldLine>,
    /// How long the stock is held unless the reservation is confirmed.
    pub duration: Duration,
}

/// One product of a [`Hold`].
#[derive(Clone, Debug, PartialEq)]
pub struct HoldLine {
    /// The product.
    pub sku: String,
    /// How many.
    pub quantity: i32,
}

/// Reserved stock. The order of the fields is that of the answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reservation {
    /// The order.
    pub order_id: Uuid,
    /// What became of it.
    pub state: State,
    /// Until when it is held, RFC 3339 in UTC with milliseconds; null unless it is held.
    pub expires_at: Option<String>,
    /// The products, as they were when the stock was reserved.
    pub lines: Vec<Line>,
}

/// One product of a [`Reservation`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// The product.
    pub sku: String,
    /// Its name.
    pub name: String,
    /// The price of one, with two decimals.
    pub unit_price: String,
    /// How many.
    pub quantity: i32,
}

/// What became of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Reserved for a time.
    Held,
    /// Reserved until it is committed or released.
    Confirmed,
    /// The stock has left.
    Committed,
    /// The stock was given back.
    Released,
    /// It was not confirmed in time, and the stock was given back.
    Expired,
}

impl State {
    /// As the database and the answers write it.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Held => "held",
            State::Confirmed => "confirmed",
            State::Committed => "committed",
            State::Released => "released",
            State::Expired => "expired",
        }
    }

    /// The state that the database calls so.
    pub fn parse(text: &str) -> Option<State> {
        let all =
            [State::Held, State::Confirmed, State::Committed, State::Released, State::Expired];
        all.into_iter().find(|state| state.as_str() == text)
    }
}

/// A line for which there is not enough stock.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shortage {
    /// The product.
    pub sku: String,
    /// How many the order needs.
    pub quantity: i32,
    /// How many there are.
    pub available: i32,
}

#[derive(Deserialize)]
struct RawHold<'b> {
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    lines: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    hold_seconds: Option<&'b RawValue>,
}

#[derive(Deserialize)]
struct RawLine<'b> {
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    sku: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    quantity: Option<&'b RawValue>,
}

impl Hold {
    /// Parses the body of a request to hold stock; the problem names every invalid field at once.
    /// Lines with the same sku are added up.
    pub fn from_json(order_id: Uuid, text: &str) -> Result<Hold, Problem> {
        let body: RawHold<'_> = request::json_object(text)?;
        let mut errors = Errors::default();
        let seconds = errors.integer(body.hold_seconds, "hold_seconds", 1..=MAX_HOLD_S);
        let seconds = errors.require(seconds, "hold_seconds");
        let lines: Vec<&RawValue> = {
            let given = errors.field(body.lines, "lines", |json| {
                serde_json::from_str(json)
                    .ok()
                    .filter(|lines: &Vec<&RawValue>| (1..=MAX_LINES).contains(&lines.len()))
                    .ok_or("must be a list of 1 to 100 lines")
            });
            errors.require(given, "lines")
        };
        let mut merged: Vec<HoldLine> = Vec::with_capacity(lines.len());
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for (number, raw) in lines.iter().enumerate() {
            let Some(HoldLine { sku, quantity }) = line(raw, number, &mut errors) else { continue };
            match places.get(&sku) {
                Some(place) => merged[*place].quantity += quantity,
                None => {
                    places.insert(sku.clone(), merged.len());
                    merged.push(HoldLine { sku, quantity });
                }
            }
        }
        errors.into_result()?;
        let duration = Duration::from_secs(seconds.unsigned_abs());
        Ok(Hold { order_id, lines: merged, duration })
    }
}

fn line(raw: &RawValue, number: usize, errors: &mut Errors) -> Option<HoldLine> {
    let parsed = serde_json::from_str::<RawLine<'_>>(raw.get());
    let Some(line) = parsed.ok().filter(|_| raw.get().starts_with('{')) else {
        errors.add(&format!("lines[{number}]"), "must be an object");
        return None;
    };
    let sku = errors.required_text(line.sku, &format!("lines[{number}].sku"), parse_sku);
    let field = format!("lines[{number}].quantity");
    let quantity = errors.integer(line.quantity, &field, 1..=MAX_QUANTITY);
    let quantity = errors.require(quantity, &field);
    Some(HoldLine { sku, quantity: quantity as i32 })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_same_sku_twice_is_added_up_and_every_invalid_field_is_named() {
        let parse = |body: serde_json::Value| Hold::from_json(Uuid::nil(), &body.to_string());
        let hold = parse(json!({ "hold_seconds": 60, "lines": [
            { "sku": "b", "quantity": 1 }, { "sku": "a", "quantity": 2 },
            { "sku": "b", "quantity": 3 },
        ] }));
        let lines = vec![
            HoldLine { sku: "b".to_owned(), quantity: 4 },
            HoldLine { sku: "a".to_owned(), quantity: 2 },
        ];
        assert_eq!(hold.unwrap().lines, lines);
        let refused = |body| parse(body).unwrap_err().to_string();
        assert_eq!(
            refused(json!({ "lines": [1, { "sku": "a b", "quantity": 0 }, { "quantity": 1.5 }] })),
            "hold_seconds is required; lines[0] must be an object; \
             lines[1].sku must be 1 to 64 letters, digits, dots, hyphens or underscores; \
             lines[1].quantity must be a whole number from 1 to 1000000; \
             lines[2].sku is required; \
             lines[2].quantity must be a whole number from 1 to 1000000"
        );
        for lines in [json!([]), json!({}), json!(vec![json!({}); 101])] {
            let text = refused(json!({ "hold_seconds": 1, "lines": lines }));
            assert_eq!(text, "lines must be a list of 1 to 100 lines");
        }
    }
}
