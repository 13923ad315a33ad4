//! The three services together, as an operator runs them.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use chassis::testing::{TestDb, TestVhost, eventually, management_api, test_var};
use serde_json::{Value, json};

use harness::{Service, Stack, agent, post};

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
        let body = json!({ "user_id": user, "number_of_items": "99", "total_amount": "250" });
        post(&agent(), &self.stack.url("/api/billing/"), &body.to_string()).unwrap()
    }

    /// The users of the booked orders, in the order of their ids.
    fn booked(&self) -> Vec<String> {
        let rows = self.orders.superuser().query("select user_id from orders order by id", &[]);
        rows.unwrap().iter().map(|row| row.get(0)).collect()
    }
}

#[test]
fn movies_go_through_the_gateway_to_the_database_and_back() {
    let system = System::new();
    let _services = ["inventory", "gateway"].map(|name| system.stack.start_and_wait(name));
    let url = system.stack.url("/api/movies/");
    let (status, movie) = post(
        &agent(),
        &url,
        r#"{"title":" A new movie ","description":"Very short \"description\" 🎬 ‏שלום"}"#,
    )
    .unwrap();
    let expected = json!({
        "id": 1, "title": "A new movie", "description": "Very short \"description\" 🎬 ‏שלום"
    });
    assert_eq!((status, &movie), (201, &expected));
    let mut listed = agent().get(&url).call().unwrap();
    let listed: Value = serde_json::from_str(&listed.body_mut().read_to_string().unwrap()).unwrap();
    assert_eq!(listed, json!([expected]));
    let row = system.movies.superuser().query_one("select title from movies", &[]).unwrap();
    assert_eq!(row.get::<_, String>(0), "A new movie");
}

#[test]
fn orders_posted_while_billing_is_stopped_are_booked_in_their_order_once_it_starts() {
    let system = System::new();
    let _gateway = system.stack.start_and_wait("gateway");
    let billing = system.stack.start_and_wait("billing");
    eventually("the gateway takes orders", 20, || (system.post_order("20").0 == 200).then_some(()));
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
fn an_order_is_in_the_table_within_100_ms_of_its_answer_as_a_rule() {
    let system = System::new();
    let _services = ["billing", "gateway"].map(|name| system.stack.start_and_wait(name));
    eventually("the gateway takes orders", 20, || (system.post_order("0").0 == 200).then_some(()));
    eventually("the first is booked", 20, || (system.booked().len() == 1).then_some(()));
    // How long each took is for a benchmark; here, that one does not wait for the next.
    for order in 1..20 {
        assert_eq!(system.post_order(&order.to_string()).0, 200);
        eventually("a lone order is booked", 5, || (system.booked().len() > order).then_some(()));
    }
}

#[test]
fn an_order_repeated_with_its_key_is_booked_once() {
    let system = System::new();
    let _services = ["billing", "gateway"].map(|name| system.stack.start_and_wait(name));
    let send = |key: &str, user: &str| {
        let body = json!({ "user_id": user, "number_of_items": 1, "total_amount": 1.5 });
        let request = agent()
            .post(system.stack.url("/api/billing"))
            .content_type("application/json")
            .header("Idempotency-Key", key);
        request.send(body.to_string()).unwrap().status().as_u16()
    };
    eventually("the gateway takes orders", 20, || (send("a", "1") == 200).then_some(()));
    for _ in 0..5 {
        assert_eq!(send("a", "1"), 200);
    }
    assert_eq!(send("b", "1"), 200);
    assert_eq!(send("a", "2"), 200);
    assert_eq!(send("last", "3"), 200);
    eventually("the last is booked", 20, || {
        system.booked().contains(&"3".to_owned()).then_some(())
    });
    assert_eq!(system.booked(), ["1", "1", "2", "3"]);
}

/// Posts orders from several threads until `done` says so; what each was told.
fn keep_posting(system: &System, clients: usize, until: Instant) -> Vec<JoinHandle<Ledger>> {
    (0..clients)
        .map(|client| {
            let url = system.stack.url("/api/billing");
            thread::spawn(move || {
                let (agent, mut ledger) = (agent(), Ledger::default());
                for order in 0.. {
                    if Instant::now() > until {
                        break;
                    }
                    let user = format!("{client}-{order}");
                    let body = json!({ "user_id": user, "number_of_items": 1, "total_amount": 1 });
                    match post(&agent, &url, &body.to_string()) {
                        Ok((200, _)) => ledger.confirmed.push(user),
                        Ok((status, told)) => ledger.refused.push(format!("{status} {told}")),
                        // Refused by the kernel: nobody listens any more.
                        Err(err) if err.to_string().contains("refused") => return ledger,
                        Err(err) => ledger.unanswered.push(err.to_string()),
                    }
                }
                ledger
            })
        })
        .collect()
}

#[derive(Default)]
struct Ledger {
    confirmed: Vec<String>,
    refused: Vec<String>,
    unanswered: Vec<String>,
}

#[test]
fn a_gateway_told_to_stop_under_load_answers_all_it_has_accepted() {
    let system = System::new();
    let _billing = system.stack.start_and_wait("billing");
    let mut gateway = system.stack.start_and_wait("gateway");
    eventually("the gateway takes orders", 20, || (system.post_order("x").0 == 200).then_some(()));
    let clients = keep_posting(&system, 8, Instant::now() + Duration::from_secs(30));
    thread::park_timeout(Duration::from_millis(700));
    let told = Instant::now();
    gateway.signal("TERM");
    let status = gateway.child.wait().unwrap();
    assert!(status.success(), "{status}: {}", gateway.log());
    assert!(told.elapsed() < Duration::from_secs(5), "{:?}", told.elapsed());
    let mut confirmed = vec!["x".to_owned()];
    for client in clients {
        let ledger = client.join().unwrap();
        assert_eq!(ledger.unanswered, [""; 0], "accepted and not answered");
        assert_eq!(ledger.refused, [""; 0]);
        confirmed.extend(ledger.confirmed);
    }
    assert!(confirmed.len() > 8);
    eventually("every confirmed order is booked", 20, || {
        (system.booked().len() == confirmed.len()).then_some(())
    });
    let mut booked = system.booked();
    booked.sort();
    confirmed.sort();
    assert_eq!(booked, confirmed);
}

#[test]
fn two_gateways_take_turns_on_one_port_without_refusing_anyone() {
    let system = System::new();
    let first = system.stack.start_and_wait("gateway");
    eventually("the first takes orders", 20, || (system.post_order("x").0 == 200).then_some(()));
    let clients = keep_posting(&system, 4, Instant::now() + Duration::from_secs(5));
    let second = system.stack.start("gateway");
    eventually("the second is connected to the broker", 20, || {
        second.log().contains("publishing to").then_some(())
    });
    first.signal("INT");
    let mut first = first;
    assert!(first.child.wait().unwrap().success(), "{}", first.log());
    for client in clients {
        let ledger = client.join().unwrap();
        assert_eq!(ledger.unanswered, [""; 0]);
        assert_eq!(ledger.refused, [""; 0]);
        assert!(!ledger.confirmed.is_empty(), "{}{}", first.log(), second.log());
    }
    eventually("the second took orders", 20, || {
        second.log().contains("POST /api/billing 200").then_some(())
    });
}

#[test]
fn garbage_that_anybody_publishes_goes_to_the_dead_letters_and_billing_goes_on() {
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
    eventually("the queue is there", 20, || publish("not an order").then_some(()));
    assert!(publish(r#"{"user_id":"by hand","number_of_items":"1","total_amount":"2.50"}"#));
    eventually("the order is booked", 20, || (system.booked() == ["by hand"]).then_some(()));
    let path = format!("queues/{}/{queue}.dead/get", system.vhost.name);
    let look = json!({ "count": 10, "ackmode": "ack_requeue_true", "encoding": "auto" });
    // Orders do not wait for dead letters: those may come a moment later.
    let dead = eventually("a dead letter is there", 20, || {
        let dead = management_api("POST", &path, Some(look.clone()));
        dead.as_array().is_some_and(|found| !found.is_empty()).then_some(dead)
    });
    assert_eq!(dead.as_array().map(Vec::len), Some(1), "{dead}");
    assert_eq!(dead[0]["payload"], "not an order");
    assert!(dead[0]["properties"]["headers"]["x-reason"].is_string(), "{dead}");
}

#[test]
fn a_service_without_its_settings_names_all_of_them_and_does_not_start() {
    for service in ["gateway", "inventory", "billing"] {
        let mut stack = Stack::new();
        let port = format!("{}_PORT", service.to_uppercase());
        stack.set(&port, "eighty").set("LOG_LEVEL", "loud");
        let mut started: Service = stack.start(service);
        let status = started.child.wait().unwrap();
        assert!(!status.success());
        for fault in [format!("{port} must be"), "LOG_LEVEL must be".to_owned()] {
            assert!(started.log().contains(&fault), "{fault} is not in {}", started.log());
        }
    }
}
