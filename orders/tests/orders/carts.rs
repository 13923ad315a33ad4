//! Carts: lines, limits, versions, and the checkout.

use std::thread;

use serde_json::{Value, json};

use crate::inventory::Mode;
use crate::{ANNA, BEN, Store};

const CART: &str = "/api/v1/carts/me";

impl Store {
    fn add(&self, sku: &str, quantity: i64) {
        let body = json!({ "sku": sku, "quantity": quantity });
        let added = self.ask(ANNA, "POST", &format!("{CART}/items"), &body);
        assert_eq!(added.status, 200, "{}", added.body);
    }

    fn cart(&self) -> Value {
        self.ask(ANNA, "GET", CART, &Value::Null).json()
    }
}

#[test]
fn a_cart_has_the_names_and_prices_of_this_moment() {
    let store = Store::new();
    let empty = json!({ "user_id": ANNA, "lines": [], "total": "0.00", "currency": "EUR" });
    assert_eq!(store.cart(), empty);
    store.add("a", 2);
    store.add("b", 1);
    store.add("a", 3);
    let line = |sku: &str, quantity: i64, price: &str, total: &str, available: i64| {
        json!({ "sku": sku, "name": format!("The {sku}"), "quantity": quantity, "unit_price": price,
            "line_total": total, "available": available })
    };
    let lines = json!([line("a", 5, "9.99", "49.95", 1000), line("b", 1, "0.50", "0.50", 1000)]);
    assert_eq!((&store.cart()["lines"], &store.cart()["total"]), (&lines, &json!("50.45")));

    store.inventory.set_price("a", "1.00");
    assert_eq!(store.cart()["total"], "5.50");
    let set = store.ask(ANNA, "PUT", &format!("{CART}/items/a"), &json!({ "quantity": 1 }));
    assert_eq!((set.status, &set.json()["total"]), (200, &json!("1.50")));
    for _ in 0..2 {
        let removed = store.ask(ANNA, "DELETE", &format!("{CART}/items/a"), &Value::Null);
        assert_eq!(removed.status, 204);
    }
    assert_eq!(store.cart()["total"], "0.50");
    for _ in 0..2 {
        assert_eq!(store.ask(ANNA, "DELETE", CART, &Value::Null).status, 204);
    }
    assert_eq!(store.cart(), empty);
}

#[test]
fn a_cart_is_its_owners_and_an_administrators() {
    let store = Store::new();
    store.add("a", 1);
    let of_anna = format!("/api/v1/carts/{ANNA}");
    assert_eq!(store.ask(ANNA, "GET", &of_anna, &Value::Null).json()["total"], "9.99");
    assert_eq!(store.admin("GET", &of_anna, &Value::Null).json()["total"], "9.99");
    for (method, path) in [
        ("GET", of_anna.clone()),
        ("DELETE", of_anna.clone()),
        ("POST", format!("{of_anna}/items")),
        ("PUT", format!("{of_anna}/items/a")),
        ("DELETE", format!("{of_anna}/items/a")),
        ("POST", format!("{of_anna}/checkout")),
        ("GET", "/api/v1/carts/x".to_owned()),
    ] {
        let refused = store.ask(BEN, method, &path, &json!({ "sku": "a", "quantity": 1 }));
        assert_eq!(refused.status, 404, "{method} {path}: {}", refused.body);
    }
}

#[test]
fn quantities_and_products_of_a_cart_have_rules() {
    let store = Store::new();
    let items = format!("{CART}/items");
    for (body, rule) in [
        (json!({ "sku": "a", "quantity": 0 }), "quantity must be a whole number from 1 to 99"),
        (json!({ "sku": "a", "quantity": 100 }), "quantity must be a whole number from 1 to 99"),
        (json!({ "sku": "a", "quantity": "1" }), "quantity must be a whole number from 1 to 99"),
        (json!({ "quantity": 1 }), "sku is required"),
        (json!({ "sku": "x", "quantity": 1 }), "sku is no product that can be ordered"),
        (json!({ "sku": "gone", "quantity": 1 }), "sku is no product that can be ordered"),
    ] {
        let refused = store.ask(ANNA, "POST", &items, &body);
        assert_eq!((refused.status, &refused.json()["detail"]), (422, &json!(rule)), "{body}");
    }
    store.add("a", 60);
    let refused = store.ask(ANNA, "POST", &items, &json!({ "sku": "a", "quantity": 40 }));
    let rule = "quantity would make more than 99 of this product";
    assert_eq!((refused.status, &refused.json()["detail"]), (422, &json!(rule)));
    assert_eq!(store.cart()["lines"][0]["quantity"], 60);

    for number in 0..99 {
        store.inventory.set_price(&format!("p{number}"), "1.00");
        store.add(&format!("p{number}"), 1);
    }
    let refused = store.ask(ANNA, "POST", &items, &json!({ "sku": "b" }));
    let detail = "the cart has 100 lines, and no more fit in it";
    assert_eq!((refused.status, &refused.json()["detail"]), (409, &json!(detail)));
    store.add("a", 1);
    assert_eq!(store.cart()["lines"].as_array().unwrap().len(), 100);
}

#[test]
fn a_change_of_a_cart_may_name_the_version_that_it_wants() {
    let store = Store::new();
    store.add("a", 1);
    let first = store.ask(ANNA, "GET", CART, &Value::Null);
    let tag = first.etag().to_owned();
    let not_modified = [("If-None-Match", tag.as_str())];
    let get = || store.ask_with(ANNA, "GET", CART, &not_modified, &Value::Null).status;
    assert_eq!(get(), 304);
    let set = |tag: &str, quantity: i64| {
        let (path, body) = (format!("{CART}/items/a"), json!({ "quantity": quantity }));
        store.ask_with(ANNA, "PUT", &path, &[("If-Match", tag)], &body)
    };
    let second = set(&tag, 2);
    assert_eq!(second.status, 200, "{}", second.body);
    assert_eq!(get(), 200);
    assert_eq!(set(&tag, 3).status, 412);
    for (method, path) in [("DELETE", CART.to_owned()), ("DELETE", format!("{CART}/items/a"))] {
        let refused = store.ask_with(ANNA, method, &path, &[("If-Match", &tag)], &Value::Null);
        assert_eq!(refused.status, 412, "{method} {path}");
    }
    // A change of a price is another answer, and no change of the cart.
    store.inventory.set_price("a", "2.00");
    let third = store.ask(ANNA, "GET", CART, &Value::Null);
    assert_ne!(third.etag(), second.etag());
    assert_eq!(set(second.etag(), 4).status, 200);
}

#[test]
fn of_adds_at_once_each_is_counted() {
    let store = Store::new();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..5).for_each(|_| store.add("a", 1)));
        }
    });
    assert_eq!(store.cart()["lines"][0]["quantity"], 40);
}

#[test]
fn a_checkout_makes_an_order_of_the_cart_and_empties_it() {
    let store = Store::new();
    store.add("b", 3);
    store.add("a", 1);
    let checkout = |headers: &[(&str, &str)], body: &Value| {
        store.ask_with(ANNA, "POST", &format!("{CART}/checkout"), headers, body)
    };
    let wrong = checkout(&[], &json!({ "expected_total": "11.00" }));
    assert_eq!((wrong.status, &wrong.json()["total_amount"]), (409, &json!("11.49")));
    assert_eq!(store.cart()["total"], "11.49");
    let key = [("Idempotency-Key", "k")];
    let done = checkout(&key, &json!({ "expected_total": "11.49" }));
    assert_eq!(done.status, 201, "{}", done.body);
    let order = done.json();
    let sku = |place: usize| &order["lines"][place]["sku"];
    assert_eq!((sku(0), sku(1)), (&json!("b"), &json!("a")));
    assert_eq!(store.cart()["lines"], json!([]));
    let again = checkout(&key, &json!({ "expected_total": "11.49" }));
    assert_eq!((again.status, &again.body), (201, &done.body));
    assert_eq!(again.header("Idempotency-Replayed"), Some("true"));
    let empty = checkout(&[], &Value::Null);
    assert_eq!((empty.status, &empty.json()["detail"]), (409, &json!("the cart is empty")));
    assert_eq!(store.count("orders"), 1);
}

#[test]
fn a_line_whose_product_is_gone_stays_visible_and_blocks_the_checkout() {
    let store = Store::new();
    store.add("a", 1);
    store.add("b", 1);
    let retire = "update cart_lines set sku = 'gone' where sku = 'b'";
    store.superuser().execute(retire, &[]).unwrap();
    let line = &store.cart()["lines"][1];
    let expected = json!({ "sku": "gone", "name": "The gone", "quantity": 1, "unit_price": null,
        "line_total": null, "available": 0, "unavailable": true });
    assert_eq!((line, &store.cart()["total"]), (&expected, &json!("9.99")));
    let refused = store.ask(ANNA, "POST", &format!("{CART}/checkout"), &Value::Null);
    assert_eq!((refused.status, &refused.json()["lines"]), (409, &json!(["gone"])));
    assert_eq!((store.count("orders"), store.cart()["lines"].as_array().unwrap().len()), (0, 2));
}

#[test]
fn a_cart_without_inventory_is_503_and_is_not_changed() {
    let store = Store::new();
    store.add("a", 1);
    store.inventory.set_mode(Mode::Fails);
    assert_eq!(store.ask(ANNA, "GET", CART, &Value::Null).status, 503);
    let added = store.ask(ANNA, "POST", &format!("{CART}/items"), &json!({ "sku": "b" }));
    assert_eq!(added.status, 503);
    store.inventory.set_mode(Mode::Works);
    assert_eq!(store.cart()["lines"].as_array().unwrap().len(), 1);
}
