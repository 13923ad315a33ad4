//! All services together, as an operator runs them.

use std::time::{Duration, Instant};

use chassis::testing::{TestDb, TestVhost, eventually, management_api, test_var};
use harness::bodies::{movie, order};
use harness::load::{Load, LoadConfig, Workload};
use harness::services::services;
use harness::{Stack, agent, get, post, send};
use serde_json::{Value, json};

/// A stack with databases and a virtual host of its own.
struct System {
    stack: Stack,
    movies: TestDb,
    orders: TestDb,
    vhost: TestVhost,
}

impl System {
    fn new() -> System {
        let movies = TestDb::new(&test_var("INVENTORY_DB_NAME"));
        let orders = TestDb::new(&test_var("BILLING_DB_NAME"));
        let vhost = TestVhost::new();
        let mut stack = Stack::new();
        stack.set("INVENTORY_DB_NAME", &movies.name);
        stack.set("BILLING_DB_NAME", &orders.name);
        stack.set("RABBITMQ_VHOST", &vhost.name);
        System { stack, movies, orders, vhost }
    }

    fn post_order(&self, user: &str) -> (u16, Value) {
        post(&agent(), &self.stack.url("/api/billing/"), &order(user)).unwrap()
    }

    /// Posts an order of this user until the gateway accepts it.
    fn post_first_order(&self, user: &str) {
        eventually("the gateway accepts an order", 20, || {
            (self.post_order(user).0 == 200).then_some(())
        });
    }

    /// The users of the booked orders, in the order of their ids.
    fn booked(&self) -> Vec<String> {
        let rows = self.orders.superuser().query("select user_id from orders order by id", &[]);
        rows.unwrap().iter().map(|row| row.get(0)).collect()
    }

    fn start_load(&self, clients: usize) -> Load {
        Load::start(LoadConfig {
            workload: Workload::Orders,
            gateway: self.stack.service_url("gateway"),
            tag: "load".to_owned(),
            clients,
            limit: usize::MAX,
            max_latency: Duration::MAX,
        })
    }
}

#[test]
fn movies_go_through_the_gateway_to_the_database_and_back() {
    let system = System::new();
    let _services = ["inventory", "gateway"].map(|name| system.stack.start_and_wait(name));
    let url = system.stack.url("/api/movies/");
    let description = "Very short \"description\" 🎬 ‏שלום";
    let (status, added) = post(&agent(), &url, &movie(" A new movie ", description)).unwrap();
    let expected = json!({ "id": 1, "title": "A new movie", "description": description });
    assert_eq!((status, &added), (201, &expected));
    assert_eq!(get(&url).unwrap().json(), json!([expected]));
    let row = system.movies.superuser().query_one("select title from movies", &[]).unwrap();
    assert_eq!(row.get::<_, String>(0), "A new movie");
}

#[test]
fn orders_posted_while_billing_is_stopped_are_booked_in_their_order_once_it_starts() {
    let system = System::new();
    let _gateway = system.stack.start_and_wait("gateway");
    let billing = system.stack.start_and_wait("billing");
    system.post_first_order("20");
    eventually("the first order is booked", 20, || (system.booked() == ["20"]).then_some(()));
    drop(billing);

    let users: Vec<String> = (22..62).map(|user| user.to_string()).collect();
    for user in &users {
        assert_eq!(system.post_order(user).0, 200);
    }
    assert_eq!(system.booked(), ["20"]);

    let _billing = system.stack.start_and_wait("billing");
    eventually("all orders are booked", 20, || (system.booked().len() == 41).then_some(()));
    assert_eq!(system.booked()[1..], users);
}

#[test]
fn each_order_is_booked_without_waiting_for_the_next() {
    let system = System::new();
    let _services = ["billing", "gateway"].map(|name| system.stack.start_and_wait(name));
    system.post_first_order("0");
    eventually("the first order is booked", 20, || (system.booked().len() == 1).then_some(()));
    // How long it takes is measured by the benchmark.
    for number in 1..20 {
        assert_eq!(system.post_order(&number.to_string()).0, 200);
        eventually("a lone order is booked", 5, || (system.booked().len() > number).then_some(()));
    }
}

#[test]
fn an_order_repeated_with_its_idempotency_key_is_booked_once() {
    let system = System::new();
    let _services = ["billing", "gateway"].map(|name| system.stack.start_and_wait(name));
    let url = system.stack.url("/api/billing");
    let post = |key: &str, user: &str| {
        let headers = [("Content-Type", "application/json"), ("Idempotency-Key", key)];
        send(&agent(), "POST", &url, &headers, &order(user)).unwrap().status
    };
    eventually("the gateway accepts an order", 20, || (post("a", "1") == 200).then_some(()));
    for _ in 0..5 {
        assert_eq!(post("a", "1"), 200);
    }
    assert_eq!(post("b", "1"), 200);
    assert_eq!(post("a", "2"), 200);
    assert_eq!(post("last", "3"), 200);
    eventually("the last order is booked", 20, || {
        system.booked().contains(&"3".to_owned()).then_some(())
    });
    assert_eq!(system.booked(), ["1", "1", "2", "3"]);
}

#[test]
fn a_gateway_that_gets_sigterm_under_load_answers_all_requests_that_it_has_accepted() {
    let system = System::new();
    let _billing = system.stack.start_and_wait("billing");
    let mut gateway = system.stack.start_and_wait("gateway");
    system.post_first_order("first");
    let load = system.start_load(8);
    eventually("orders flow", 20, || (load.acknowledged() > 100).then_some(()));
    let stopped_at = Instant::now();
    let status = gateway.terminate();
    assert!(status.success(), "{status}: {}", gateway.log());
    assert!(stopped_at.elapsed() < Duration::from_secs(5), "{:?}", stopped_at.elapsed());

    let ledger = load.finish();
    assert_eq!((ledger.rejected, ledger.unanswered), (0, 0), "{:?}", ledger.failures);
    let mut confirmed: Vec<String> = ledger.acknowledged.into_iter().collect();
    confirmed.push("first".to_owned());
    eventually("every confirmed order is booked", 20, || {
        (system.booked().len() == confirmed.len()).then_some(())
    });
    let mut booked = system.booked();
    booked.sort();
    confirmed.sort();
    assert_eq!(booked, confirmed);
}

#[test]
fn a_second_gateway_takes_over_the_port_of_the_first_without_refusing_a_request() {
    let system = System::new();
    let mut first = system.stack.start_and_wait("gateway");
    system.post_first_order("first");
    let load = system.start_load(4);
    let second = system.stack.start("gateway");
    eventually("the second gateway is connected to the broker", 20, || {
        second.log().contains("publishing to").then_some(())
    });
    first.signal("INT");
    let status = eventually("the first gateway ends", 20, || first.exit_status());
    assert!(status.success(), "{}", first.log());
    load.wait_for_progress_after("the first gateway has ended");
    let ledger = load.finish();
    assert_eq!((ledger.rejected, ledger.unanswered), (0, 0), "{:?}", ledger.failures);
    assert!(second.log().contains("POST /api/billing 200"), "{}{}", first.log(), second.log());
}

#[test]
fn a_message_that_is_no_order_becomes_a_dead_letter_and_billing_goes_on() {
    let system = System::new();
    let _billing = system.stack.start_and_wait("billing");
    let queue = test_var("RABBITMQ_QUEUE");
    let publish = |payload: &str| {
        let path = format!("exchanges/{}/amq.default/publish", system.vhost.name);
        let message = json!({
            "properties": {}, "routing_key": queue, "payload": payload, "payload_encoding": "string"
        });
        management_api("POST", &path, Some(message))["routed"] == true
    };
    eventually("the queue is declared", 20, || publish("not an order").then_some(()));
    assert!(publish(&order("by hand")));
    eventually("the order is booked", 20, || (system.booked() == ["by hand"]).then_some(()));
    let path = format!("queues/{}/{queue}.dead/get", system.vhost.name);
    let look = json!({ "count": 10, "ackmode": "ack_requeue_true", "encoding": "auto" });
    // Orders do not wait for dead letters, so it may be published after the order is booked.
    let dead = eventually("the dead letter is published", 20, || {
        let dead = management_api("POST", &path, Some(look.clone()));
        dead.as_array().is_some_and(|found| !found.is_empty()).then_some(dead)
    });
    assert_eq!(dead.as_array().map(Vec::len), Some(1), "{dead}");
    assert_eq!(dead[0]["payload"], "not an order");
    assert!(dead[0]["properties"]["headers"]["x-reason"].is_string(), "{dead}");
}

#[test]
fn a_service_with_malformed_settings_names_all_of_them_and_does_not_start() {
    for row in services() {
        let mut stack = Stack::new();
        let port = format!("{}_PORT", row.prefix());
        stack.set(&port, "eighty").set("LOG_LEVEL", "loud");
        let mut started = stack.start(&row.name);
        let status = started.child.wait().unwrap();
        assert!(!status.success());
        for error in [format!("{port} must be"), "LOG_LEVEL must be".to_owned()] {
            assert!(started.log().contains(&error), "{error} is not in {}", started.log());
        }
    }
}
