//! Orders and movies as JSON.

use std::fmt::Display;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::{Value, json};

/// An order of one item for 1.25.
pub fn order(user: impl Display) -> String {
    order_of(user, "1", "\"1.25\"")
}

/// An order whose items and amount are these JSON texts: `1`, `"1"`, `1e2`.
pub fn order_of(user: impl Display, items: &str, amount: &str) -> String {
    let user = Value::from(user.to_string());
    format!("{{\"user_id\":{user},\"number_of_items\":{items},\"total_amount\":{amount}}}")
}

/// A movie.
pub fn movie(title: &str, description: &str) -> String {
    json!({ "title": title, "description": description }).to_string()
}

/// Items and amount that belong to the order of this user and, nearly always, to no other:
/// where two orders are mixed up, it shows.
pub fn values_of(user: &str) -> (u64, String) {
    let mut hasher = DefaultHasher::new();
    user.hash(&mut hasher);
    let hash = hasher.finish();
    let cents = hash % 100_000_000;
    ((hash >> 32) % 100 + 1, format!("{}.{:02}", cents / 100, cents % 100))
}

/// The same as one text; the description that belongs to the movie of this title.
pub fn expected_text(id: &str) -> String {
    let (items, amount) = values_of(id);
    format!("{items} for {amount}")
}
