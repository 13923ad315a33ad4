//! What happens to an order: each event, what is refused, and what follows.

use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::http::Reply;
use orders::orders::sweep;
use serde_json::{Value, json};

use crate::{ANNA, BEN, Store, path};

#[track_caller]
fn assert_refused(reply: &Reply, detail: &str, state: &str) {
    let body = reply.json();
    assert_eq!(
        (reply.status, &body["detail"], &body["state"]),
        (409, &json!(detail), &json!(state))
    );
    assert!(reply.header("ETag").is_some());
}

/// The types of the history.
fn history(order: &Value) -> Vec<&str> {
    let entries = order["history"].as_array().unwrap();
    entries.iter().map(|entry| entry["type"].as_str().unwrap()).collect()
}

#[test]
fn an_order_is_paid_shipped_and_delivered_and_every_step_may_be_repeated() {
    let store = Store::new();
    let order = store.order();
    for _ in 0..2 {
        let paid = store.pay(&order);
        assert_eq!((paid.status, &paid.json()["status"]), (200, &json!("processing")));
        let payment = &paid.json()["payment"];
        assert_eq!((&payment["amount"], &payment["reference"]), (&json!("19.98"), &json!("p-1")));
    }
    for _ in 0..2 {
        let shipped = store.ship(&order);
        assert_eq!((shipped.status, &shipped.json()["status"]), (200, &json!("shipped")));
    }
    let corrected = json!({ "carrier": "post", "trackingNumber": "2" });
    let corrected = store.admin("PUT", &path(&order, "/shipment/tracking"), &corrected);
    assert_eq!(corrected.json()["shipment"]["tracking_number"], "2");
    for _ in 0..2 {
        let delivered = store.admin("POST", &path(&order, "/delivery"), &Value::Null);
        assert_eq!((delivered.status, &delivered.json()["status"]), (200, &json!("delivered")));
    }
    let order = store.get(&order);
    assert_eq!(history(&order), ["created", "paid", "shipped", "updated", "delivered"]);
    store.send_stock_commands();
    assert_eq!(store.inventory.state(&order), Some("committed"));
    let id = order["id"].as_str().unwrap();
    let calls = ["hold", "confirm", "commit"].map(|call| format!("{call} {id}"));
    assert_eq!(store.inventory.calls(), calls);
}

#[test]
fn an_event_out_of_order_is_refused_with_the_state() {
    let store = Store::new();
    let order = store.order();
    let delivered = store.admin("POST", &path(&order, "/delivery"), &Value::Null);
    assert_refused(
        &delivered,
        "the order is pending; only one that is shipped is delivered",
        "pending",
    );
    assert_refused(
        &store.ship(&order),
        "the order is pending; only one that is processing is shipped",
        "pending",
    );
    let wrong = json!({ "amount": "19.97", "reference": "r" });
    let wrong = store.admin("PUT", &path(&order, "/payment"), &wrong);
    assert_refused(&wrong, "the order's total is 19.98 EUR", "pending");
    assert_eq!(wrong.json()["total_amount"], "19.98");
    store.pay(&order);
    let other = json!({ "amount": "19.98", "reference": "another" });
    let other = store.admin("PUT", &path(&order, "/payment"), &other);
    assert_refused(
        &other,
        "the order is processing; only one that is pending is paid",
        "processing",
    );
    let canceled = store.ask(ANNA, "POST", &path(&order, "/cancellation"), &Value::Null);
    assert_refused(
        &canceled,
        "the order is processing; its customer can cancel it only while it is pending",
        "processing",
    );
    let deleted = store.ask(ANNA, "DELETE", &path(&order, ""), &Value::Null);
    assert_refused(
        &deleted,
        "the order is processing; one that is processing or shipped is not deleted",
        "processing",
    );
    for (status, detail) in [
        ("shipped", "it follows from a shipment: PUT …/shipment/tracking"),
        ("processing", "it follows from a payment: PUT …/payment"),
        ("pending", "no order becomes pending again"),
    ] {
        let set = store.admin("PUT", &path(&order, "/status"), &json!({ "status": status }));
        assert_refused(&set, detail, "processing");
    }
    let unknown = store.admin("PUT", &path(&order, "/status"), &json!({ "status": "lost" }));
    assert_eq!(unknown.status, 422);
    assert_eq!(history(&store.get(&order)), ["created", "paid"]);
}

#[test]
fn what_is_an_administrators_is_403_for_a_customer_and_another_users_order_404() {
    let store = Store::new();
    let order = store.order();
    for (method, rest) in [
        ("PUT", "/payment"),
        ("PUT", "/shipment/tracking"),
        ("POST", "/delivery"),
        ("PUT", "/refund"),
        ("PUT", "/status"),
    ] {
        let refused = store.ask(ANNA, method, &path(&order, rest), &json!({}));
        assert_eq!(refused.status, 403, "{rest}");
    }
    for (method, rest, body) in [
        ("GET", "", Value::Null),
        ("DELETE", "", Value::Null),
        ("POST", "/cancellation", Value::Null),
        ("PUT", "/shipping", json!({ "name": "B", "line1": "B", "city": "B", "country": "SE" })),
    ] {
        let refused = store.ask(BEN, method, &path(&order, rest), &body);
        assert_eq!(refused.status, 404, "{method} {rest}: {}", refused.body);
    }
    assert_eq!(store.get(&order)["status"], "pending");
}

#[test]
fn a_paid_order_that_is_canceled_owes_a_refund() {
    let store = Store::new();
    let order = store.order();
    store.pay(&order);
    for _ in 0..2 {
        let body = json!({ "reason": "broken" });
        let canceled = store.admin("POST", &path(&order, "/cancellation"), &body).json();
        assert_eq!(
            (&canceled["status"], &canceled["payment"]["refund_due"]),
            (&json!("canceled"), &json!(true))
        );
        assert_eq!(canceled["cancellation"]["reason"], "broken");
    }
    // It may be deleted meanwhile: the money is due all the same.
    assert_eq!(store.ask(ANNA, "DELETE", &path(&order, ""), &Value::Null).status, 204);
    for _ in 0..2 {
        let refunded = store.admin("PUT", &path(&order, "/refund"), &json!({ "reference": "r" }));
        assert_eq!(refunded.status, 200, "{}", refunded.body);
        assert_eq!(refunded.json()["payment"]["refund_due"], false);
    }
    store.send_stock_commands();
    assert_eq!(store.inventory.state(&order), Some("released"));
    let unpaid = store.order();
    store.ask(ANNA, "POST", &path(&unpaid, "/cancellation"), &Value::Null);
    let refused = store.admin("PUT", &path(&unpaid, "/refund"), &Value::Null);
    assert_refused(
        &refused,
        "the order is canceled; only a canceled one that was paid is refunded",
        "canceled",
    );
}

#[test]
fn a_deleted_order_is_gone_and_kept_for_the_books() {
    let store = Store::new();
    let order = store.order();
    for _ in 0..2 {
        assert_eq!(store.ask(ANNA, "DELETE", &path(&order, ""), &Value::Null).status, 204);
    }
    assert_eq!(store.ask(ANNA, "GET", &path(&order, ""), &Value::Null).status, 404);
    assert_eq!(store.pay(&order).status, 404);
    let list = store.ask(ANNA, "GET", "/api/v1/orders", &Value::Null).json();
    assert_eq!(list["items"], json!([]));
    let kept = "select status from orders where deleted_at is not null";
    let status: String = store.superuser().query_one(kept, &[]).unwrap().get(0);
    assert_eq!(status, "canceled");
    store.send_stock_commands();
    assert_eq!(store.inventory.state(&order), Some("released"));
}

#[test]
fn the_address_is_changed_until_the_order_is_shipped() {
    let store = Store::new();
    let order = store.order();
    let address =
        |line1: &str| json!({ "name": "B", "line1": line1, "city": "B", "country": "SE" });
    let set = |body: &Value| store.ask(ANNA, "PUT", &path(&order, "/shipping"), body);
    assert_eq!(set(&address("1")).json()["shipping_address"]["line1"], "1");
    let wrapped = json!({ "shipping_address": address("2") });
    assert_eq!(set(&wrapped).json()["shipping_address"]["line1"], "2");
    assert_eq!(set(&wrapped).status, 200);
    assert_eq!(set(&json!({ "name": "B" })).status, 422);
    assert_eq!(set(&address("4111 1111 1111 1111")).status, 422);
    assert_eq!(history(&store.get(&order)), ["created", "updated", "updated"]);
    store.pay(&order);
    assert_eq!(set(&address("3")).status, 200);
    store.ship(&order);
    assert_refused(
        &set(&address("4")),
        "the order is shipped; the address is changed until the order is shipped",
        "shipped",
    );
}

#[test]
fn a_change_may_name_the_version_that_it_wants() {
    let store = Store::new();
    let order = store.order();
    let first = store.admin("GET", &path(&order, ""), &Value::Null);
    let paid = store.pay(&order);
    let deliver = |tag: &str| {
        let (path, body) = (path(&order, "/status"), json!({ "status": "canceled" }));
        store.admin_with("PUT", &path, &[("If-Match", tag)], &body)
    };
    assert_eq!(deliver(first.etag()).status, 412);
    assert_eq!(deliver("\"other\"").status, 412);
    let published = "update outbox set published_at = now()";
    store.superuser().execute(published, &[]).unwrap();
    // Being published is a part of the answer, and no change of the order.
    assert_ne!(store.admin("GET", &path(&order, ""), &Value::Null).etag(), paid.etag());
    assert_eq!(deliver(paid.etag()).status, 200);
}

#[test]
fn an_order_that_is_not_paid_in_time_is_canceled() {
    let store = Store::new();
    let (late, paid) = (store.order(), store.order());
    store.pay(&paid);
    // The time of an id is in whole milliseconds.
    let between = Instant::now() + Duration::from_millis(2);
    while Instant::now() < between + Duration::from_millis(2) {
        thread::yield_now();
    }
    let new = store.order();
    let ttl = between.elapsed();
    assert_eq!(store.app.db.write(|db| sweep::expire(db, ttl)).unwrap(), 1);
    let canceled = store.get(&late);
    assert_eq!(canceled["cancellation"]["reason"], "payment expired");
    assert_eq!(canceled["history"][1]["by"], "service");
    assert_eq!(store.get(&new)["status"], "pending");
    store.send_stock_commands();
    assert_eq!(store.inventory.state(&late), Some("released"));
    assert_eq!(store.inventory.state(&paid), Some("confirmed"));
}

#[test]
fn an_order_whose_stock_was_sold_before_it_was_confirmed_is_canceled() {
    let store = Store::new();
    let order = store.order();
    store.pay(&order);
    store.inventory.set_state(&order, "committed");
    store.send_stock_commands();
    let canceled = store.get(&order);
    assert_eq!(canceled["cancellation"]["reason"], "out of stock");
    assert_eq!(canceled["payment"]["refund_due"], true);
}

#[test]
fn the_schema_refuses_sums_and_states_that_cannot_be() {
    let store = Store::new();
    store.order();
    for wrong in [
        "update orders set total_amount = 1",
        "update orders set items_total = 1, total_amount = 1",
        "update orders set status = 'processing'",
        "update orders set refund_due = true",
        "update orders set deleted_at = now()",
        "update orders set status = 'lost'",
        "update order_lines set line_total = 1",
        "update order_lines set quantity = 0",
    ] {
        let refused = store.superuser().batch_execute(wrong).unwrap_err();
        assert_eq!(refused.code().unwrap().code(), "23514", "{wrong}");
    }
}
