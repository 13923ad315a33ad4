//! Messages: what they say, in which order they are published, and that none is lost.

use std::thread;

use amiquip::{Connection, ExchangeDeclareOptions, ExchangeType, FieldTable, QueueDeclareOptions};
use chassis::Stop;
use chassis::broker::SocketDeadline;
use chassis::testing::{admin_broker, eventually};
use orders::outbox::relay;
use serde_json::{Value, json};

use crate::{ANNA, Store, path};

/// As the administrator: a queue that gets all messages of the exchange.
struct Receiver {
    connection: Connection,
    _deadline: SocketDeadline,
    queue: String,
}

impl Receiver {
    fn new(store: &Store) -> Receiver {
        let (connection, deadline) =
            admin_broker(&store.config.broker.vhost).connect("test").unwrap();
        let mut receiver =
            Receiver { connection, _deadline: deadline, queue: "everything".to_owned() };
        let channel = receiver.connection.open_channel(None).unwrap();
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(ExchangeType::Topic, &store.config.exchange, durable).unwrap();
        channel.queue_declare(&receiver.queue, QueueDeclareOptions::default()).unwrap();
        let (queue, exchange) = (&receiver.queue, &store.config.exchange);
        channel.queue_bind(queue, exchange, "#", FieldTable::new()).unwrap();
        receiver
    }

    /// What is in a queue now: routing key, message id and body.
    fn take(&mut self, queue: &str) -> Vec<(String, String, Value)> {
        let channel = self.connection.open_channel(None).unwrap();
        let mut found = Vec::new();
        while let Some(got) = channel.basic_get(queue, true).unwrap() {
            let delivery = got.delivery;
            let id = delivery.properties.message_id().clone().unwrap_or_default();
            assert_eq!(delivery.properties.delivery_mode(), &Some(2));
            let body = serde_json::from_slice(&delivery.body).unwrap();
            found.push((delivery.routing_key, id, body));
        }
        channel.close().unwrap();
        found
    }

    fn take_all(&mut self) -> Vec<(String, String, Value)> {
        let queue = self.queue.clone();
        self.take(&queue)
    }
}

impl Store {
    /// Runs the relay while `work` runs and until nothing waits.
    fn with_relay<T>(&self, work: impl FnOnce() -> T) -> T {
        let stop = Stop::default();
        thread::scope(|scope| {
            let relay = scope.spawn(|| relay::run(&self.app, &self.config, &stop));
            let done = work();
            eventually("an empty outbox", 20, || {
                (self.count("outbox where published_at is null") == 0).then_some(())
            });
            stop.request();
            relay.join().unwrap();
            done
        })
    }
}

#[test]
fn each_event_is_published_and_a_paid_order_is_in_the_queue_of_billing() {
    let store = Store::new();
    let mut receiver = Receiver::new(&store);
    let order = store.with_relay(|| {
        let order = store.order();
        store.pay(&order);
        store.ship(&order);
        store.admin("POST", &path(&order, "/delivery"), &Value::Null);
        order
    });
    let order = store.get(&order);
    assert_eq!(order["published"], true);
    let id = order["id"].as_str().unwrap();
    let received = receiver.take_all();
    let keys: Vec<&str> = received.iter().map(|(key, ..)| key.as_str()).collect();
    let expected =
        ["order.created", "created_order", "order.paid", "order.shipped", "order.delivered"];
    assert_eq!(keys, expected);
    let (_, message_id, created) = &received[0];
    assert_eq!((&created["id"], &created["type"]), (&json!(message_id), &json!("order.created")));
    assert_eq!((&created["producer"], &created["order"]["id"]), (&json!("orders"), &json!(id)));
    assert_eq!(created["occurred_at"], order["created_at"]);
    assert_eq!(created["order"]["total_amount"], "19.98");
    for absent in ["history", "published"] {
        assert!(created["order"].get(absent).is_none());
    }
    let older = json!({ "producer": "orders", "sent_at": order["created_at"],
        "type": "created_order", "payload": { "order": { "order_id": id,
            "customer_fullname": "Anna Ek", "product_name": "The a", "total_amount": "19.98",
            "created_at": order["created_at"] } } });
    assert_eq!(received[1].2, older);
    assert_eq!(received[2].2["order"]["status"], "processing");

    let booked = receiver.take(&store.config.queue);
    let expected = json!({ "user_id": "7", "number_of_items": 2, "total_amount": "19.98" });
    assert_eq!(booked.len(), 1);
    assert_eq!((booked[0].1.as_str(), &booked[0].2), (id, &expected));
}

#[test]
fn messages_wait_while_the_broker_is_away_and_are_published_in_order() {
    let store = Store::new();
    let orders: Vec<Value> = (0..20).map(|_| store.order()).collect();
    orders.iter().for_each(|order| assert_eq!(store.pay(order).status, 200));
    assert_eq!(store.get(&orders[0])["published"], false);
    let list = store.ask(ANNA, "GET", "/api/v1/orders?published=false&limit=100", &Value::Null);
    assert_eq!(list.json()["items"].as_array().unwrap().len(), 20);

    let mut receiver = Receiver::new(&store);
    store.with_relay(|| ());
    let received = receiver.take_all();
    for order in &orders {
        let of_order = received.iter().filter(|(_, _, body)| body["order"]["id"] == order["id"]);
        let keys: Vec<&str> = of_order.map(|(key, ..)| key.as_str()).collect();
        assert_eq!(keys, ["order.created", "order.paid"]);
    }
    assert_eq!(receiver.take(&store.config.queue).len(), 20);
}

#[test]
fn what_was_not_marked_is_published_again_under_the_same_id() {
    let store = Store::new();
    let mut receiver = Receiver::new(&store);
    store.with_relay(|| store.order());
    let first = receiver.take_all();
    // As a kill between the confirm and the mark leaves it.
    let unmark = "update outbox set published_at = null";
    store.superuser().execute(unmark, &[]).unwrap();
    store.with_relay(|| ());
    assert_eq!(receiver.take_all(), first);
}

#[test]
fn of_two_relays_one_works() {
    let store = Store::new();
    let mut receiver = Receiver::new(&store);
    let other = store.another();
    let stop = Stop::default();
    thread::scope(|scope| {
        scope.spawn(|| relay::run(&other, &store.config, &stop));
        store.with_relay(|| (0..30).for_each(|_| drop(store.order())));
        stop.request();
    });
    assert_eq!(receiver.take_all().len(), 60);
}

#[test]
fn the_command_lists_what_waits_and_publishes_it() {
    use std::process::Command;
    let store = Store::new();
    let mut receiver = Receiver::new(&store);
    let order = store.order();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_orders"));
        let output = command.arg("outbox").args(arguments).envs(&store.settings).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), text, String::from_utf8(output.stderr).unwrap())
    };
    let (code, listed, _) = run(&["list"]);
    let first: Value = serde_json::from_str(listed.lines().next().unwrap()).unwrap();
    assert_eq!((code, listed.lines().count()), (Some(0), 2));
    assert_eq!((&first["order_id"], &first["to"]), (&order["id"], &json!("order.created")));
    assert_eq!(run(&["retry"]).1, "2 published\n");
    assert_eq!((run(&["list"]).1.as_str(), receiver.take_all().len()), ("", 2));
    let again = run(&["retry", order["id"].as_str().unwrap()]);
    assert_eq!(again.1, "2 will be published again\n2 published\n");
    assert_eq!(receiver.take_all().len(), 2);
    let unknown = run(&["retry", "00000000-0000-0000-0000-000000000000"]);
    assert_eq!(unknown.0, Some(1));
    for wrong in [&[][..], &["retry", "x"], &["x"]] {
        assert_eq!(run(wrong).0, Some(2), "{wrong:?}");
    }
}
