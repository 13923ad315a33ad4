//! Webhooks: signatures, repetitions, and events that do not fit.

use std::time::{SystemTime, UNIX_EPOCH};

use chassis::testing::dispatch;
use chassis::testing::http::Reply;
use hmac::{Hmac, KeyInit, Mac};
use orders::routes::ROUTES;
use serde_json::{Value, json};
use sha2::Sha256;

use crate::Store;

fn sign(secret: &str, time: i64, body: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(format!("{time}.{body}").as_bytes());
    let hex: String =
        mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("t={time},v1={hex}")
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

impl Store {
    fn webhook(&self, provider: &str, body: &Value) -> Reply {
        let body = body.to_string();
        self.signed(provider, &sign("old-secret", now(), &body), &body)
    }

    fn signed(&self, provider: &str, signature: &str, body: &str) -> Reply {
        let path = format!("/api/v1/webhooks/{provider}");
        dispatch(ROUTES, &self.app, "POST", &path, &[("X-Signature", signature)], body)
    }
}

fn payment(id: &str, order: &Value) -> Value {
    json!({ "id": id, "type": "payment.succeeded", "order_id": order["id"], "amount": "19.98",
        "reference": "p-9", "method": "card" })
}

#[test]
fn providers_events_are_the_same_changes_as_the_administrators() {
    let store = Store::new();
    let order = store.order();
    let id = &order["id"];
    let event = |number: i64, kind: &str| {
        json!({ "id": format!("e-{number}"), "type": kind,
        "order_id": id, "carrier": "post", "tracking_number": "1", "reason": "no money" })
    };
    for _ in 0..2 {
        assert_eq!(store.webhook("payments", &event(1, "payment.failed")).status, 200);
        assert_eq!(store.webhook("payments", &payment("e-2", &order)).status, 200);
        assert_eq!(store.webhook("shipments", &event(3, "shipment.shipped")).status, 200);
        assert_eq!(store.webhook("shipments", &event(4, "shipment.delivered")).status, 200);
    }
    let order = store.get(&order);
    let history: Vec<(&Value, &Value)> = order["history"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| (&entry["type"], &entry["by"]))
        .collect();
    let expected = ["payment_failed", "paid", "shipped", "delivered"].map(|kind| json!(kind));
    let provider = json!("provider");
    let expected: Vec<(&Value, &Value)> = expected.iter().map(|kind| (kind, &provider)).collect();
    assert_eq!(history[1..], expected);
}

#[test]
fn only_a_right_signature_of_the_last_minutes_is_accepted() {
    let store = Store::new();
    let order = store.order();
    let body = payment("e", &order).to_string();
    for signature in [
        sign("wrong", now(), &body),
        sign("new-secret", now() - 301, &body),
        sign("new-secret", now() + 301, &body),
        sign("new-secret", now(), "{}"),
        String::new(),
    ] {
        let refused = store.signed("payments", &signature, &body);
        assert_eq!(refused.status, 401, "{signature}");
    }
    let path = "/api/v1/webhooks/payments";
    assert_eq!(dispatch(ROUTES, &store.app, "POST", path, &[], &body).status, 401);
    assert_eq!(store.get(&order)["status"], "pending");
    assert_eq!(store.signed("payments", &sign("new-secret", now(), &body), &body).status, 200);

    let without = Store::with(&[("ORDERS_WEBHOOK_SECRETS", "")]);
    assert_eq!(without.signed("payments", &sign("", now(), &body), &body).status, 404);
}

#[test]
fn an_event_that_does_not_fit_is_kept_and_may_fit_later() {
    let store = Store::new();
    let order = store.order();
    let shipped = json!({ "id": "s", "type": "shipment.shipped", "order_id": order["id"],
        "carrier": "post", "tracking_number": "1" });
    for _ in 0..2 {
        let refused = store.webhook("shipments", &shipped);
        assert_eq!((refused.status, &refused.json()["state"]), (409, &json!("pending")));
    }
    let kept = "webhook_events where refusal is not null";
    assert_eq!(store.count(kept), 1);
    assert_eq!(store.webhook("payments", &payment("p", &order)).status, 200);
    assert_eq!(store.webhook("shipments", &shipped).status, 200);
    assert_eq!(store.count(kept), 0);
    let mut wrong = payment("q", &order);
    wrong["amount"] = json!("1.00");
    assert_eq!(store.webhook("payments", &wrong).status, 409);
    let unknown = payment("u", &json!({ "id": "00000000-0000-0000-0000-000000000000" }));
    assert_eq!(store.webhook("payments", &unknown).status, 404);
    assert_eq!(store.count(kept), 2);
}

#[test]
fn every_invalid_field_of_an_event_is_named() {
    let store = Store::new();
    for (provider, body, detail) in [
        ("payments", json!({}), "id is required; order_id is required; type is required"),
        (
            "payments",
            json!({ "id": "e", "order_id": "x", "type": "shipment.shipped" }),
            "order_id must be the id of an order; \
             type must be payment.succeeded, payment.failed or refund.succeeded",
        ),
        (
            "shipments",
            json!({ "id": "e", "order_id": store.order()["id"], "type": "shipment.shipped" }),
            "carrier is required; tracking_number is required",
        ),
    ] {
        let refused = store.webhook(provider, &body);
        assert_eq!((refused.status, &refused.json()["detail"]), (422, &json!(detail)));
    }
    let text = "not json";
    assert_eq!(store.signed("payments", &sign("new-secret", now(), text), text).status, 400);
}
