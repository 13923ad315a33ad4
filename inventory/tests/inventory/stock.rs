//! The stock of products.

use std::thread;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::Store;

const STOCK: &str = "/api/v1/products/a/stock";
const ADJUSTMENTS: &str = "/api/v1/products/a/stock/adjustments";

/// Holds this many of product `a` for a new order.
fn hold(store: &Store, quantity: i32) {
    let path = format!("/internal/reservations/{}", Uuid::now_v7());
    let lines = json!([{ "sku": "a", "quantity": quantity }]);
    let held = store.internal("PUT", &path, &json!({ "hold_seconds": 600, "lines": lines }));
    assert_eq!(held.status, 200, "{}", held.body);
}

#[test]
fn stock_is_set_and_adjusted_and_each_change_is_kept() {
    let store = Store::new();
    store.product("a", "1.00", 100);
    let body = json!({ "change": -3, "reason": "broken" });
    let adjusted = store.admin("POST", ADJUSTMENTS, &body);
    assert_eq!(adjusted.status, 201, "{}", adjusted.body);
    let adjustment = adjusted.json();
    assert_eq!((&adjustment["change"], &adjustment["on_hand"]), (&json!(-3), &json!(97)));
    assert_eq!((&adjustment["reason"], &adjustment["user_id"]), (&json!("broken"), &json!(1)));
    let set = store.admin("PUT", STOCK, &json!({ "on_hand": 90, "reason": "counted" }));
    let stock = set.json();
    assert_eq!((&stock["on_hand"], &stock["reserved"]), (&json!(90), &json!(0)));
    assert_eq!(stock["available"], 90);

    let first = store.admin("GET", &format!("{ADJUSTMENTS}?limit=2"), &Value::Null).json();
    let items = first["items"].as_array().unwrap();
    let changes: Vec<(i64, &str)> = items
        .iter()
        .map(|item| (item["change"].as_i64().unwrap(), item["reason"].as_str().unwrap()))
        .collect();
    assert_eq!(changes, [(-7, "counted"), (-3, "broken")]);
    let rest = store.admin("GET", first["next"].as_str().unwrap(), &Value::Null).json();
    assert_eq!(rest["items"][0]["change"], 100);
    assert_eq!((rest["items"].as_array().unwrap().len(), &rest["next"]), (1, &Value::Null));
    for path in ["/api/v1/products/none/stock", "/api/v1/products/none/stock/adjustments"] {
        assert_eq!(store.admin("GET", path, &Value::Null).status, 404);
    }
}

#[test]
fn stock_never_falls_below_what_is_reserved() {
    let store = Store::new();
    store.product("a", "1.00", 10);
    hold(&store, 6);
    let set = store.admin("PUT", STOCK, &json!({ "on_hand": 5 }));
    assert_eq!(set.status, 409, "{}", set.body);
    assert_eq!((&set.json()["on_hand"], &set.json()["reserved"]), (&json!(10), &json!(6)));
    let adjust = |change: i64| {
        store.admin("POST", ADJUSTMENTS, &json!({ "change": change, "reason": "x" })).status
    };
    assert_eq!(adjust(-5), 409);
    assert_eq!(adjust(-4), 201);
    assert_eq!(adjust(999_999_995), 422);
    assert_eq!(adjust(999_999_994), 201);
    assert_eq!(store.stock("a"), (1_000_000_000, 6));
}

#[test]
fn an_adjustment_is_repeated_by_its_key_and_made_once() {
    let store = Store::new();
    store.product("a", "1.00", 10);
    store.product("b", "1.00", 10);
    let send = |path: &str, key: &str, change: i32| {
        let body = json!({ "change": change, "reason": "found" });
        store.admin_with("POST", path, &[("Idempotency-Key", key)], &body)
    };
    let first = send(ADJUSTMENTS, "k1", 5);
    let again = send(ADJUSTMENTS, "\"k1\"", 5);
    assert_eq!((first.status, again.status), (201, 201));
    assert_eq!(first.body, again.body);
    assert_eq!(first.header("Idempotency-Replayed"), None);
    assert_eq!(again.header("Idempotency-Replayed"), Some("true"));
    assert_eq!(store.stock("a"), (15, 0));
    for other in [send(ADJUSTMENTS, "k1", 6), send("/api/v1/products/b/stock/adjustments", "k1", 5)]
    {
        assert_eq!(other.status, 422, "{}", other.body);
        assert_eq!(other.json()["errors"][0]["field"], "Idempotency-Key");
    }
    assert_eq!(send(ADJUSTMENTS, &"x".repeat(256), 5).status, 400);
    // Many at once.
    thread::scope(|scope| {
        let tries: Vec<_> = (0..8).map(|_| scope.spawn(|| send(ADJUSTMENTS, "k2", 1))).collect();
        let replies: Vec<_> = tries.into_iter().map(|it| it.join().unwrap()).collect();
        assert!(replies.iter().all(|it| it.status == 201 && it.body == replies[0].body));
    });
    assert_eq!(store.stock("a"), (16, 0));
    assert_eq!(store.stock("b"), (10, 0));
}

#[test]
fn stock_has_a_tag_and_bad_numbers_are_named() {
    let store = Store::new();
    store.product("a", "1.00", 10);
    let shown = store.admin("GET", STOCK, &Value::Null);
    let tag = shown.etag().to_owned();
    let same = store.admin_with("GET", STOCK, &[("If-None-Match", &tag)], &Value::Null);
    assert_eq!(same.status, 304);
    let put = |tag: &str| {
        store.admin_with("PUT", STOCK, &[("If-Match", tag)], &json!({ "on_hand": 11 })).status
    };
    assert_eq!((put(&tag), put(&tag)), (200, 412));
    let whole = "on_hand must be a whole number from 0 to 1000000000";
    for (body, detail) in [
        (json!({}), "on_hand is required"),
        (json!({ "on_hand": -1 }), whole),
        (json!({ "on_hand": 1.5 }), whole),
        (json!({ "on_hand": 10_000_000_000i64 }), whole),
        (json!({ "on_hand": "5" }), whole),
        (json!({ "on_hand": null }), "on_hand must not be null"),
    ] {
        let refused = store.admin("PUT", STOCK, &body);
        assert_eq!((refused.status, &refused.json()["detail"]), (422, &json!(detail)), "{body}");
    }
    for (body, detail) in [
        (json!({}), "change is required; reason is required"),
        (json!({ "change": 0, "reason": "x" }), "change must not be 0"),
        (json!({ "change": 1, "reason": "  " }), "reason must not be null"),
        (
            json!({ "change": 1e10, "reason": "x" }),
            "change must be a whole number from -1000000000 to 1000000000",
        ),
    ] {
        let refused = store.admin("POST", ADJUSTMENTS, &body);
        assert_eq!((refused.status, &refused.json()["detail"]), (422, &json!(detail)), "{body}");
    }
}
