//! Making an order: what it is, what is refused, keys, and upstreams that fail.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::inventory::Mode;
use crate::{ANNA, BEN, FAILING, Store, path};

const ORDERS: &str = "/api/v1/orders";

fn items(items: &[(&str, i64)]) -> Value {
    let items = items.iter().map(|(sku, quantity)| json!({ "sku": sku, "quantity": quantity }));
    json!({ "items": items.collect::<Vec<_>>() })
}

#[test]
fn an_order_has_all_its_figures_and_is_read_as_it_was_answered() {
    let settings = [
        ("STORE_SHIPPING_COST", "4.90"),
        ("STORE_SHIPPING_FREE_FROM", "50"),
        ("STORE_TAX_PERCENT", "19"),
    ];
    let store = Store::with(&settings);
    let created = store.ask(ANNA, "POST", ORDERS, &items(&[("b", 1), ("a", 1), ("b", 2)]));
    assert_eq!(created.status, 201, "{}", created.body);
    let order = created.json();
    assert_eq!(created.header("Location"), Some(&*path(&order, "")));
    let at = &order["created_at"];
    let expected = json!({
        "id": order["id"], "user_id": ANNA, "store_id": null, "status": "pending",
        "customer": { "name": "Anna Ek", "email": "7@example.org" },
        "lines": [
            { "sku": "b", "name": "The b", "unit_price": "0.50", "quantity": 3, "line_total": "1.50" },
            { "sku": "a", "name": "The a", "unit_price": "9.99", "quantity": 1, "line_total": "9.99" },
        ],
        // 19 % of 16.39 is 3.1141.
        "items_total": "11.49", "shipping_cost": "4.90", "tax_amount": "3.11", "total_amount": "19.50",
        "currency": "EUR",
        "shipping_address": { "name": "Anna Ek", "line1": "Kungsgatan 1", "line2": null,
            "city": "Stockholm", "postal_code": null, "region": null, "country": "SE" },
        "billing_address": null, "payment_method": null,
        "payment": { "method": null, "reference": null, "amount": null, "paid_at": null,
            "refund_due": false, "refunded_at": null },
        "shipment": { "carrier": null, "tracking_number": null, "shipped_at": null,
            "delivered_at": null },
        "cancellation": { "reason": null, "canceled_at": null },
        "history": [{ "type": "created", "status": "pending", "by": "customer", "reason": null,
            "at": at }],
        "published": false, "created_at": at, "updated_at": at,
    });
    assert_eq!(order, expected);
    let read = store.ask(ANNA, "GET", &path(&order, ""), &Value::Null);
    assert_eq!((read.body.as_str(), read.etag()), (created.body.as_str(), created.etag()));
    let tag = [("If-None-Match", created.etag())];
    let same = store.ask_with(ANNA, "GET", &path(&order, ""), &tag, &Value::Null);
    assert_eq!(same.status, 304);
    assert_eq!(store.ask(BEN, "GET", &path(&order, ""), &Value::Null).status, 404);
    assert_eq!(store.inventory.state(&order), Some("held"));
    store.send_stock_commands();
    assert_eq!(store.inventory.state(&order), Some("confirmed"));

    let free = store.ask(ANNA, "POST", ORDERS, &items(&[("a", 6)])).json();
    assert_eq!((&free["shipping_cost"], &free["tax_amount"]), (&json!("0.00"), &json!("11.39")));
}

#[test]
fn all_spellings_and_the_older_paths_make_the_same_order() {
    let store = Store::new();
    for (path, body) in [
        ("/api/v1/orders", json!({ "items": [{ "sku": "a", "quantity": 1 }] })),
        ("/v1/order", json!({ "user_id": ANNA.to_string(), "product_code": "a" })),
        (
            "/orders",
            json!({ "customerId": ANNA, "items": [{ "productId": "a", "quantity": 1,
            "price": 9.99 }], "itemsTotal": 9.99, "totalAmount": "9.99" }),
        ),
    ] {
        let created = store.ask(ANNA, "POST", path, &body);
        assert_eq!((created.status, &created.json()["total_amount"]), (201, &json!("9.99")));
    }
    let of_anna = json!({ "user_id": ANNA, "product_code": "a" });
    assert_eq!(store.ask(BEN, "POST", "/v1/order", &of_anna).status, 403);
    let by_admin = store.admin("POST", "/v1/order", &of_anna).json();
    assert_eq!(by_admin["user_id"], ANNA);
    assert_eq!(by_admin["history"][0]["by"], "administrator");
}

#[test]
fn what_cannot_be_ordered_is_refused_and_reserves_nothing() {
    let store = Store::new();
    let many: Vec<Value> =
        (0..101).map(|n| json!({ "sku": format!("p{n}"), "quantity": 1 })).collect();
    let address = json!({ "name": "A", "line1": "B", "city": "C", "country": "XX" });
    let with = |name: &str, value: Value| {
        let mut body = items(&[("a", 1)]);
        body[name] = value;
        body
    };
    for (status, body, detail) in [
        (
            422,
            items(&[("x", 1), ("a", 1), ("gone", 1)]),
            "items[0].sku is no product that can be ordered; \
             items[2].sku is no product that can be ordered",
        ),
        (422, json!({ "items": many }), "items must be a list of 1 to 100 items"),
        (422, items(&[("a", 0)]), "items[0].quantity must be a whole number from 1 to 99"),
        (409, items(&[("c", 4)]), "there is not enough"),
        (409, with("expected_total", json!("1.00")), "not as expected: total_amount is 9.99"),
        (
            422,
            with("shipping_address", address),
            "shipping_address.country must be a country code of two capital letters (ISO 3166-1), \
             such as SE",
        ),
        (
            422,
            with("note", json!("4111 1111 1111 1111")),
            "note must not hold the number of a card",
        ),
        (422, with("user_id", json!("x")), "user_id must be the number of a user"),
    ] {
        let refused = store.ask(ANNA, "POST", ORDERS, &body);
        assert_eq!((refused.status, &refused.json()["detail"]), (status, &json!(detail)), "{body}");
    }
    for (user, rule) in [
        (100, "user_id must be a customer who has an account"),
        (13, "user_id must be an account that may order"),
    ] {
        let refused = store.ask(user, "POST", ORDERS, &items(&[("a", 1)]));
        assert_eq!((refused.status, &refused.json()["detail"]), (422, &json!(rule)));
    }
    let long_key = "k".repeat(256);
    let headers = [("Idempotency-Key", long_key.as_str())];
    let refused = store.ask_with(ANNA, "POST", ORDERS, &headers, &items(&[("a", 1)]));
    assert_eq!(refused.status, 400);
    // What was held for the one whose total was not as expected is given back.
    store.send_stock_commands();
    assert_eq!((store.count("orders"), store.inventory.count("held")), (0, 0));
    assert_eq!(store.inventory.count("released"), 1);
}

#[test]
fn a_key_gets_the_first_answer_again_and_belongs_to_one_request() {
    let store = Store::new();
    let ask = |user: i64, key: &str, body: &Value| {
        store.ask_with(user, "POST", ORDERS, &[("Idempotency-Key", key)], body)
    };
    let body = items(&[("a", 1)]);
    let first = ask(ANNA, "k", &body);
    assert_eq!((first.status, first.header("Idempotency-Replayed")), (201, None));
    store.pay(&first.json());
    for key in ["k", "\"k\""] {
        let again = ask(ANNA, key, &body);
        assert_eq!((again.status, &again.body), (201, &first.body));
        assert_eq!(again.header("Idempotency-Replayed"), Some("true"));
        assert_eq!(again.header("Location"), first.header("Location"));
        assert_eq!(again.etag(), first.etag());
    }
    let other = ask(ANNA, "k", &items(&[("a", 2)]));
    assert_eq!(other.status, 422);
    // The key in the body is the same key, and another user's is another.
    let mut in_body = body.clone();
    in_body["idempotencyKey"] = json!("in-body");
    let by_body = store.ask(ANNA, "POST", ORDERS, &in_body);
    assert_eq!(store.ask(ANNA, "POST", ORDERS, &in_body).body, by_body.body);
    assert_ne!(ask(BEN, "k", &body).body, first.body);
    assert_eq!(store.count("orders"), 3);

    // A refusal is not kept: the same key may then succeed, also with another body.
    assert_eq!(ask(ANNA, "r", &items(&[("c", 9)])).status, 409);
    assert_eq!(ask(ANNA, "r", &items(&[("c", 1)])).status, 201);
}

#[test]
fn while_the_first_request_with_a_key_runs_a_repetition_is_409() {
    let store = Store::with(&[("ORDERS_REQUEST_TIMEOUT_MS", "700")]);
    let ask = || {
        let headers = [("Idempotency-Key", "k")];
        store.ask_with(ANNA, "POST", ORDERS, &headers, &items(&[("a", 1)]))
    };
    store.inventory.set_mode(Mode::Silent);
    thread::scope(|scope| {
        let first = scope.spawn(ask);
        while store.count("idempotency_keys") == 0 {
            thread::yield_now();
        }
        let second = ask();
        assert_eq!((second.status, second.header("Retry-After")), (409, Some("1")));
        assert_eq!(first.join().unwrap().status, 504);
    });
    // After its failure the next attempt may begin at once.
    store.inventory.set_mode(Mode::Works);
    assert_eq!(ask().status, 201);
    assert_eq!((store.count("orders"), store.inventory.calls().len()), (1, 1));
}

#[test]
fn a_hundred_repetitions_of_a_key_over_two_instances_make_one_order() {
    let store = Store::new();
    let other = store.another();
    let body = items(&[("a", 1)]).to_string();
    let answers: Vec<(u16, String)> = thread::scope(|scope| {
        let ask = |number: usize| {
            let (store, body) = (&store, &body);
            let app = if number.is_multiple_of(2) { &store.app } else { &other };
            scope.spawn(move || {
                let deadline = Instant::now() + Duration::from_secs(20);
                loop {
                    let headers = [("Idempotency-Key", "k")];
                    let reply = store.ask_app(app, ANNA, "POST", ORDERS, &headers, body);
                    // Running still, or no connection of the pool was free.
                    if ![409, 503].contains(&reply.status) || Instant::now() > deadline {
                        return (reply.status, reply.body);
                    }
                }
            })
        };
        let threads: Vec<_> = (0..100).map(ask).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(answers[0].0, 201, "{}", answers[0].1);
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!((store.count("orders"), store.inventory.count("held")), (1, 1));
    let headers = [("Idempotency-Key", "k")];
    let other_body = store.ask_with(ANNA, "POST", ORDERS, &headers, &items(&[("a", 2)]));
    assert_eq!(other_body.status, 422);
}

#[test]
fn an_attempt_that_was_killed_is_repeated_with_the_same_order() {
    let store = Store::new();
    let body = items(&[("a", 1)]);
    let ask = || store.ask_with(ANNA, "POST", ORDERS, &[("Idempotency-Key", "k")], &body);
    // As a kill after the hold leaves it: the key is claimed, and the stock is held.
    store.inventory.set_mode(Mode::Nonsense);
    assert_eq!(ask().status, 502);
    store.inventory.set_mode(Mode::Works);
    let claimed = "update idempotency_keys set locked_until = now() + interval '1 hour'
        returning order_id::text";
    let id: String = store.superuser().query_one(claimed, &[]).unwrap().get(0);
    assert_eq!(ask().status, 409);
    let given_up = "update idempotency_keys set locked_until = now()";
    store.superuser().execute(given_up, &[]).unwrap();
    let made = ask();
    assert_eq!((made.status, &made.json()["id"]), (201, &json!(id)));
}

#[test]
fn each_failure_of_inventory_is_answered_rightly_within_the_deadline() {
    let store = Store::with(&[("ORDERS_REQUEST_TIMEOUT_MS", "800")]);
    let body = items(&[("a", 1)]);
    store.inventory.set_mode(Mode::FailsEverySecondTime);
    for _ in 0..4 {
        assert_eq!(store.ask(ANNA, "POST", ORDERS, &body).status, 201);
    }
    for (mode, status) in
        [(Mode::Fails, 503), (Mode::Nonsense, 502), (Mode::BreaksOff, 503), (Mode::Silent, 504)]
    {
        store.inventory.set_mode(mode);
        let started = Instant::now();
        let answer = store.ask(ANNA, "POST", ORDERS, &body);
        assert_eq!(answer.status, status, "{mode:?}: {}", answer.body);
        assert!(started.elapsed() < Duration::from_secs(3), "{mode:?}");
    }
    // A caller that waits less is answered sooner.
    store.inventory.set_mode(Mode::Silent);
    let started = Instant::now();
    let headers = [("X-Request-Deadline-Ms", "200")];
    let answer = store.ask_with(ANNA, "POST", ORDERS, &headers, &body);
    assert!([503, 504].contains(&answer.status), "{}", answer.body);
    assert!(started.elapsed() < Duration::from_millis(700));
    assert_eq!(store.count("orders"), 4);
}

#[test]
fn customers_that_fail_every_second_time_cost_no_order() {
    let store = Store::new();
    for _ in 0..5 {
        let made = store.ask(FAILING, "POST", ORDERS, &items(&[("a", 1)]));
        assert_eq!(made.status, 201, "{}", made.body);
    }
    assert_eq!((store.count("orders"), store.inventory.count("held")), (5, 5));
}

#[test]
fn a_list_has_pages_and_filters_and_only_ones_own_orders() {
    let store = Store::new();
    let ids: Vec<Value> = (0..5).map(|_| store.order()["id"].clone()).collect();
    store.ask(BEN, "POST", ORDERS, &items(&[("b", 1)]));
    let list =
        |user: i64, query: &str| store.ask(user, "GET", &format!("{ORDERS}{query}"), &Value::Null);
    let ids_of = |page: &Value| -> Vec<Value> {
        page["items"].as_array().unwrap().iter().map(|order| order["id"].clone()).collect()
    };
    let mut found = Vec::new();
    let mut next = json!("/api/v1/orders?limit=2");
    while let Some(path) = next.as_str() {
        let page = store.ask(ANNA, "GET", path, &Value::Null).json();
        found.extend(ids_of(&page));
        next = page["next"].clone();
    }
    found.reverse();
    assert_eq!(found, ids);

    store.pay(&json!({ "id": ids[0], "total_amount": "19.98" }));
    let of_status = list(ANNA, "?status=processing").json();
    assert_eq!(ids_of(&of_status), [ids[0].clone()]);
    assert_eq!(of_status["items"][0]["lines"][0]["sku"], "a");
    assert_eq!(list(ANNA, "?published=true").json()["items"], json!([]));
    assert_eq!(ids_of(&list(ANNA, "?published=false").json()).len(), 5);
    assert_eq!(list(ANNA, &format!("?user_id={BEN}")).status, 403);
    let all = store.admin("GET", ORDERS, &Value::Null).json();
    assert_eq!(ids_of(&all).len(), 6);
    let of_ben = store.admin("GET", &format!("{ORDERS}?user_id={BEN}"), &Value::Null).json();
    assert_eq!(ids_of(&of_ben).len(), 1);
    for query in
        ["?status=x", "?status=", "?after=x", "?after=", "?limit=101", "?published=1", "?user_id=x"]
    {
        assert_eq!(list(ANNA, query).status, 422, "{query}");
    }
    for id in ["x", "7", "00000000-0000-0000-0000-000000000000"] {
        assert_eq!(list(ANNA, &format!("/{id}")).status, 404, "{id}");
    }
}
