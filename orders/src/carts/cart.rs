//! A cart: its lines with the names and prices of this moment, and its JSON form.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use chassis::decimal::Cents;
use serde::Serialize;

use crate::upstreams::Offer;

/// Most lines of a cart or an order.
pub const MAX_LINES: usize = 100;

/// What the database has of a cart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StoredCart {
    /// 0 for a cart that was never filled or was emptied.
    pub version: i64,
    /// In the order in which they were added.
    pub lines: Vec<StoredLine>,
}

/// A line of a [`StoredCart`].
#[derive(Clone, Debug, PartialEq)]
pub struct StoredLine {
    /// The product.
    pub sku: String,
    /// How many.
    pub quantity: i32,
}

/// A cart as its owner sees it.
#[derive(Debug, Serialize)]
pub struct Cart {
    user_id: i64,
    lines: Vec<Line>,
    /// Of the lines whose product can be ordered.
    total: String,
    currency: String,
}

#[derive(Debug, Serialize)]
struct Line {
    sku: String,
    name: Option<String>,
    quantity: i32,
    unit_price: Option<String>,
    line_total: Option<String>,
    /// How many can be ordered.
    available: i64,
    /// The product cannot be ordered any more.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    unavailable: bool,
}

impl Cart {
    /// A cart with what inventory says of its products.
    pub fn new(
        user_id: i64,
        stored: &StoredCart,
        offers: &HashMap<String, Offer>,
        currency: &str,
    ) -> Cart {
        let mut total = Cents(0);
        let lines = stored.lines.iter().map(|line| {
            let offer = offers.get(&line.sku);
            let sold = offer.filter(|offer| !offer.retired);
            let line_total =
                sold.map(|offer| Cents(offer.price.0.saturating_mul(line.quantity.into())));
            total.0 = total.0.saturating_add(line_total.map_or(0, |cents| cents.0));
            Line {
                sku: line.sku.clone(),
                name: offer.map(|offer| offer.name.clone()),
                quantity: line.quantity,
                unit_price: sold.map(|offer| offer.price.to_string()),
                line_total: line_total.map(|cents| cents.to_string()),
                available: sold.map_or(0, |offer| offer.available),
                unavailable: sold.is_none(),
            }
        });
        let lines = lines.collect();
        Cart { user_id, lines, total: total.to_string(), currency: currency.to_owned() }
    }
}

/// The text of the entity tag of a cart's answer: the cart's version, and a hash of the rest, which is
/// inventory's.
pub fn entity_tag(instance: &str, version: i64, body: &str) -> String {
    // With the same keys in each process and on each start.
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    format!("{instance}-{version}.{:x}", hasher.finish())
}
