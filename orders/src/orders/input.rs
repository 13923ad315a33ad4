//! The body of a request for an order: its fields in all their spellings, and their rules.

use chassis::auth::Principal;
use chassis::decimal::{Cents, string_or_number};
use chassis::fields::{Errors, Given, address, holds_card_number, payment_method};
use chassis::request::{self, deserialize_present};
use chassis::{Problem, request as http};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::carts::cart::MAX_LINES;
use crate::pricing::{MAX_TOTAL, Totals};
use crate::upstreams::HeldLine;

/// Members whose values are names that a client chooses, and never the number of a card, although
/// one may look like it.
const NAMES: [&str; 8] = [
    "idempotencyKey",
    "idempotency_key",
    "sku",
    "product_code",
    "productCode",
    "product_id",
    "productId",
    "tracking_number",
];

/// What a request wants.
#[derive(Debug)]
pub struct OrderInput {
    /// For whom; without it for the one who asks.
    pub user_id: Option<i64>,
    /// The products, each sku once. Empty for a checkout.
    pub lines: Vec<InputLine>,
    /// As the client named it.
    pub store_id: Option<String>,
    /// As JSON; without it that of the account.
    pub shipping_address: Option<String>,
    /// As JSON; without it that of the account.
    pub billing_address: Option<String>,
    /// As JSON; without it that of the account.
    pub payment_method: Option<String>,
    /// What the client has seen.
    pub expected: Expected,
    /// The key, where it is in the body.
    pub idempotency_key: Option<String>,
}

/// A product of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct InputLine {
    /// The product.
    pub sku: String,
    /// How many.
    pub quantity: i32,
    /// Its first place in the request's list.
    pub place: usize,
}

/// The figures that a client has sent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Expected {
    items_total: Option<Cents>,
    shipping_cost: Option<Cents>,
    tax_amount: Option<Cents>,
    total_amount: Option<Cents>,
    /// By sku.
    prices: Vec<(String, Cents)>,
}

#[derive(Default, Deserialize)]
struct RawOrder<'b> {
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    #[serde(alias = "lines", alias = "orderItems")]
    items: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    #[serde(alias = "sku", alias = "productCode", alias = "product_id", alias = "productId")]
    product_code: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    quantity: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    #[serde(alias = "userId", alias = "customer_id", alias = "customerId")]
    user_id: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "storeId")]
    store_id: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "shippingAddress")]
    shipping_address: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "billingAddress")]
    billing_address: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "paymentMethod")]
    payment_method: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "itemsTotal")]
    items_total: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "shippingCost")]
    shipping_cost: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "taxAmount")]
    tax_amount: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "totalAmount")]
    total_amount: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "expectedTotal")]
    expected_total: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present", alias = "idempotencyKey")]
    idempotency_key: Option<&'b RawValue>,
}

/// An item of an order or of a cart, not yet checked.
#[derive(Deserialize)]
pub(crate) struct RawItem<'b> {
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    #[serde(
        alias = "product_code",
        alias = "productCode",
        alias = "product_id",
        alias = "productId"
    )]
    pub(crate) sku: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    pub(crate) quantity: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    #[serde(alias = "unit_price", alias = "unitPrice")]
    price: Option<&'b RawValue>,
}

impl OrderInput {
    /// Parses the body of a new order; the problem names every invalid field at once.
    pub fn parse(text: &str, max_quantity: i64) -> Result<OrderInput, Problem> {
        let body: RawOrder<'_> = request::json_object(text)?;
        let mut errors = Errors::default();
        let mut input = common(&body, text, &mut errors);
        match (body.items, body.product_code) {
            (None, Some(_)) => {
                let sku = errors.required_text(body.product_code, "product_code", parse_sku);
                let quantity = errors.integer(body.quantity, "quantity", 1..=max_quantity);
                let quantity = quantity.value().unwrap_or(1) as i32;
                input.lines.push(InputLine { sku, quantity, place: 0 });
            }
            (items, _) => {
                let lines = items_of(items, max_quantity, &mut input.expected, &mut errors);
                input.lines = lines;
            }
        }
        errors.into_result()?;
        Ok(input)
    }

    /// Parses the body of a checkout, which may be empty: the products are those of the cart.
    pub fn parse_checkout(text: &str) -> Result<OrderInput, Problem> {
        let text = if text.trim_ascii().is_empty() { "{}" } else { text };
        let body: RawOrder<'_> = request::json_object(text)?;
        let mut errors = Errors::default();
        let input = common(&body, text, &mut errors);
        errors.into_result()?;
        Ok(input)
    }

    /// For whom the order is. Only an administrator orders for another user.
    pub fn owner(&self, principal: &Principal) -> Result<i64, Problem> {
        match self.user_id {
            Some(user_id) if user_id != principal.user_id => {
                principal.require_admin()?;
                Ok(user_id)
            }
            _ => Ok(principal.user_id),
        }
    }
}

impl Expected {
    /// Compares the figures with the right ones: 409 with these where one differs.
    pub fn check(&self, totals: &Totals, lines: &[HeldLine]) -> Result<(), Problem> {
        let figures = [
            ("items_total", self.items_total, totals.items_total),
            ("shipping_cost", self.shipping_cost, totals.shipping_cost),
            ("tax_amount", self.tax_amount, totals.tax_amount),
            ("total_amount", self.total_amount, totals.total_amount),
        ];
        let mut wrong: Vec<String> = figures
            .iter()
            .filter(|(_, sent, right)| sent.is_some_and(|sent| sent != *right))
            .map(|(name, _, right)| format!("{name} is {right}"))
            .collect();
        for (sku, sent) in &self.prices {
            let line = lines.iter().find(|line| line.sku == *sku && line.unit_price != *sent);
            wrong.extend(line.map(|line| format!("the price of {sku} is {}", line.unit_price)));
        }
        if wrong.is_empty() {
            return Ok(());
        }
        let prices: Vec<Value> = lines
            .iter()
            .map(|line| {
                serde_json::json!({ "sku": line.sku, "unit_price": line.unit_price.to_string() })
            })
            .collect();
        let mut problem = Problem::new(409, format!("not as expected: {}", wrong.join(", ")));
        for (name, _, right) in figures {
            problem = problem.with_member(name, right.to_string());
        }
        Err(problem.with_member("lines", prices))
    }
}

/// The key of a product: 1 to 64 letters, digits, dots, hyphens and underscores, not only dots.
pub fn parse_sku(text: String) -> Result<String, &'static str> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let is_sku = (1..=64).contains(&text.len())
        && text.bytes().all(allowed)
        && text.bytes().any(|byte| byte != b'.');
    match is_sku {
        true => Ok(text),
        false => Err("must be 1 to 64 letters, digits, dots, hyphens or underscores"),
    }
}

/// Adds an error for each value of a body that holds the number of a card.
pub fn refuse_card_numbers(text: &str, errors: &mut Errors) {
    if let Ok(body) = serde_json::from_str(text) {
        find_card_numbers(&body, "", errors);
    }
}

fn find_card_numbers(value: &Value, field: &str, errors: &mut Errors) {
    let rule = "must not hold the number of a card";
    match value {
        Value::String(text) if holds_card_number(text) => errors.add(field, rule),
        Value::Number(number) if holds_card_number(&number.to_string()) => errors.add(field, rule),
        Value::Array(values) => {
            for (number, value) in values.iter().enumerate() {
                find_card_numbers(value, &format!("{field}[{number}]"), errors);
            }
        }
        Value::Object(members) => {
            for (name, value) in members {
                if NAMES.contains(&name.as_str()) && !value.is_object() && !value.is_array() {
                    continue;
                }
                let name = if field.is_empty() { name.clone() } else { format!("{field}.{name}") };
                find_card_numbers(value, &name, errors);
            }
        }
        _ => (),
    }
}

/// What an order and a checkout share.
fn common(body: &RawOrder<'_>, text: &str, errors: &mut Errors) -> OrderInput {
    refuse_card_numbers(text, errors);
    let mut amount = |raw, name: &str| errors.amount(raw, name, MAX_TOTAL).value();
    let expected = Expected {
        items_total: amount(body.items_total, "items_total"),
        shipping_cost: amount(body.shipping_cost, "shipping_cost"),
        tax_amount: amount(body.tax_amount, "tax_amount"),
        total_amount: {
            let total = amount(body.total_amount, "total_amount");
            amount(body.expected_total, "expected_total").or(total)
        },
        prices: Vec::new(),
    };
    let user_id = errors.field(body.user_id, "user_id", |json| {
        let raw = RawValue::from_string(json.to_owned()).map_err(|_| "must be a number")?;
        let text = string_or_number(&raw)?;
        let id = text.parse().ok().filter(|id: &i64| *id > 0);
        id.filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
            .ok_or("must be the number of a user")
    });
    let key = errors.text(body.idempotency_key, "idempotency_key", |key| {
        http::parse_idempotency_key(&key).map_err(|_| "must be 1 to 255 printable ASCII characters")
    });
    OrderInput {
        user_id: user_id.value(),
        lines: Vec::new(),
        store_id: errors.short_text(body.store_id, "store_id", 100).value(),
        shipping_address: address(body.shipping_address, "shipping_address", errors),
        billing_address: address(body.billing_address, "billing_address", errors),
        payment_method: payment_method(body.payment_method, "payment_method", errors),
        expected,
        idempotency_key: key.value(),
    }
}

/// The lines of a list of items. The same sku twice is added up.
fn items_of(
    items: Option<&RawValue>,
    max_quantity: i64,
    expected: &mut Expected,
    errors: &mut Errors,
) -> Vec<InputLine> {
    let items = errors.field(items, "items", |json| {
        let items: Option<Vec<&RawValue>> = serde_json::from_str(json).ok();
        items
            .filter(|items| (1..=MAX_LINES).contains(&items.len()))
            .ok_or("must be a list of 1 to 100 items")
    });
    let items = match items {
        Given::Absent => {
            errors.add("items", "is required, or product_code for one product");
            Vec::new()
        }
        given => errors.require(given, "items"),
    };
    let mut lines: Vec<InputLine> = Vec::with_capacity(items.len());
    for (place, raw) in items.into_iter().enumerate() {
        let item = serde_json::from_str::<RawItem<'_>>(raw.get());
        let Some(item) = item.ok().filter(|_| raw.get().starts_with('{')) else {
            errors.add(&format!("items[{place}]"), "must be an object");
            continue;
        };
        let field = |name: &str| format!("items[{place}].{name}");
        let sku = errors.required_text(item.sku, &field("sku"), parse_sku);
        let quantity = errors.integer(item.quantity, &field("quantity"), 1..=max_quantity);
        let quantity = errors.require(quantity, &field("quantity")) as i32;
        if let Given::Value(price) = errors.amount(item.price, &field("price"), MAX_TOTAL) {
            expected.prices.push((sku.clone(), price));
        }
        match lines.iter_mut().find(|line| line.sku == sku && !sku.is_empty()) {
            Some(line) if i64::from(line.quantity + quantity) > max_quantity => {
                let rule = format!("makes more than {max_quantity} of {sku}");
                errors.add(&field("quantity"), rule);
            }
            Some(line) => line.quantity += quantity,
            None => lines.push(InputLine { sku, quantity, place }),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: Value) -> Result<OrderInput, String> {
        OrderInput::parse(&body.to_string(), 99).map_err(|problem| problem.to_string())
    }

    #[test]
    fn the_short_form_is_one_of_one_product() {
        let input = parse(json!({ "user_id": "7", "product_code": "classic-box" })).unwrap();
        assert_eq!(input.user_id, Some(7));
        let line = InputLine { sku: "classic-box".to_owned(), quantity: 1, place: 0 };
        assert_eq!(input.lines, [line]);
    }

    #[test]
    fn names_in_camel_case_are_the_same_fields() {
        let input = parse(json!({
            "customerId": 7, "storeId": "s", "idempotencyKey": "k", "itemsTotal": 19.98,
            "shippingCost": "0.00", "taxAmount": 0, "totalAmount": "19.98",
            "items": [{ "productId": "a", "quantity": 2, "price": 9.99 }],
        }));
        let input = input.unwrap();
        assert_eq!((input.user_id, input.store_id.as_deref()), (Some(7), Some("s")));
        assert_eq!(input.idempotency_key.as_deref(), Some("k"));
        let expected = Expected {
            items_total: Some(Cents(1998)),
            shipping_cost: Some(Cents(0)),
            tax_amount: Some(Cents(0)),
            total_amount: Some(Cents(1998)),
            prices: vec![("a".to_owned(), Cents(999))],
        };
        assert_eq!(input.expected, expected);
    }

    #[test]
    fn every_invalid_field_is_named_at_once() {
        let body = json!({
            "user_id": -1, "store_id": 1, "expected_total": "1.005", "shipping_address": { "city": "A" },
            "items": [1, { "sku": "a b", "quantity": 0 }, { "quantity": 1.5, "sku": "a" },
                { "sku": "b", "quantity": 60 }, { "sku": "b", "quantity": 60 }],
        });
        assert_eq!(
            parse(body).unwrap_err().split("; ").collect::<Vec<_>>(),
            [
                "expected_total must be an amount from 0.00 to 9999999999.99 with at most two decimals",
                "user_id must be the number of a user",
                "store_id must be a string",
                "shipping_address.name is required",
                "shipping_address.line1 is required",
                "shipping_address.country is required",
                "items[0] must be an object",
                "items[1].sku must be 1 to 64 letters, digits, dots, hyphens or underscores",
                "items[1].quantity must be a whole number from 1 to 99",
                "items[2].quantity must be a whole number from 1 to 99",
                "items[4].quantity makes more than 99 of b",
            ]
        );
        let none = "items is required, or product_code for one product";
        assert_eq!(parse(json!({})).unwrap_err(), none);
        for items in [json!([]), json!({}), json!(vec![json!({}); 101])] {
            let text = parse(json!({ "items": items })).unwrap_err();
            assert_eq!(text, "items must be a list of 1 to 100 items");
        }
    }

    #[test]
    fn the_number_of_a_card_is_refused_wherever_it_stands() {
        let items = json!([{ "sku": "4111111111111111", "quantity": 1 }]);
        let body = json!({
            "items": items, "idempotencyKey": "4111111111111111", "note": "4111 1111 1111 1111",
            "card": { "number": 4111111111111111u64 }, "cards": ["5555-5555-5555-4444"],
        });
        assert_eq!(
            parse(body).unwrap_err().split("; ").collect::<Vec<_>>(),
            [
                "note must not hold the number of a card",
                "card.number must not hold the number of a card",
                "cards[0] must not hold the number of a card",
            ]
        );
        let fine = json!({ "items": items, "idempotencyKey": "4111111111111111" });
        assert!(parse(fine).is_ok());
    }

    #[test]
    fn figures_that_differ_are_refused_with_the_right_ones() {
        let line = HeldLine {
            sku: "a".to_owned(),
            name: "A".to_owned(),
            unit_price: Cents(999),
            quantity: 2,
        };
        let totals = Totals {
            items_total: Cents(1998),
            shipping_cost: Cents(0),
            tax_amount: Cents(0),
            total_amount: Cents(1998),
        };
        let check = |body: Value| {
            let body = json!({ "items": [{ "sku": "a", "quantity": 2, "price": body["price"] }],
                "expected_total": body["total"] });
            parse(body).unwrap().expected.check(&totals, std::slice::from_ref(&line))
        };
        assert!(check(json!({ "price": "9.99", "total": 19.98 })).is_ok());
        assert!(check(json!({})).is_ok());
        let problem = check(json!({ "price": 5, "total": 10 })).unwrap_err();
        assert_eq!(
            (problem.status(), problem.to_string().as_str()),
            (409, "not as expected: total_amount is 19.98, the price of a is 9.99")
        );
    }
}
