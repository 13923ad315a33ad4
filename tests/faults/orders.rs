//! Carts become orders, orders are paid, shipped and canceled, while every service and server is
//! killed, also between any two steps of making an order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{
    AmqpProperties, Connection, Exchange, FieldTable, Publish, QueueDeclareOptions,
    QueueDeleteOptions,
};
use chassis::broker::{self, SocketDeadline};
use chassis::testing::{SetOnDrop, TokenIssuer, admin_broker, eventually, http, test_var};
use harness::{FakeUpstream, Reply, agent, send};
use parking_lot::Mutex;
use serde_json::{Value, json};
use ureq::Agent;
use uuid::Uuid;

use crate::platform::{Platform, Program, wait_until};
use crate::stock::add_product;
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "orders-killed",
        control: "the idempotency key: clients that repeat without it",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: orders_killed,
    },
    Case {
        name: "outbox-broker-killed",
        control: "the confirms: a relay that marks what it has only sent",
        expects: ExpectedFinding::Text("were never published"),
        short: true,
        run: outbox_broker_killed,
    },
];

const CLIENTS: usize = 12;

/// Pieces of each product: enough for all orders of a case.
const PIECES: i32 = 100_000_000;

/// The number of the advisory lock of the relay.
const RELAY_LOCK: i64 = 0x6f72_6401;

/// A step of making or changing an order at which orders is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Point {
    /// The key is claimed.
    BeforeCustomers,
    AfterCustomers,
    BeforeHold,
    /// Inventory holds the stock, and orders does not know it.
    AfterHold,
    BeforeStockCommand,
    /// Inventory has carried the command out, and orders does not know it.
    AfterStockCommand,
}

const POINTS: [Point; 6] = [
    Point::BeforeCustomers,
    Point::AfterCustomers,
    Point::BeforeHold,
    Point::AfterHold,
    Point::BeforeStockCommand,
    Point::AfterStockCommand,
];

/// Stands between orders and another service, and kills orders at the armed point.
struct Interceptor {
    upstream: FakeUpstream,
}

#[derive(Default)]
struct Trigger {
    armed: Mutex<Option<Point>>,
    fired: AtomicUsize,
    pid: Mutex<u32>,
}

impl Trigger {
    /// Kills orders if it is armed for this point.
    fn at(&self, point: Point) {
        let mut armed = self.armed.lock();
        if *armed == Some(point) {
            *armed = None;
            let _ = chassis::testing::process::signal(*self.pid.lock(), "KILL");
            self.fired.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Interceptor {
    fn start(target: SocketAddr, trigger: &Arc<Trigger>) -> Interceptor {
        let trigger = Arc::clone(trigger);
        let answer = move |stream: &mut TcpStream, request: &str| {
            let points = points_of(request);
            if let Some((before, _)) = points {
                trigger.at(before);
            }
            let Some(reply) = forward(target, request) else { return false };
            if let Some((_, after)) = points {
                trigger.at(after);
            }
            stream.write_all(reply.as_bytes()).is_ok()
        };
        Interceptor { upstream: FakeUpstream::start((Ipv4Addr::LOCALHOST, 0), answer) }
    }

    fn address(&self) -> SocketAddr {
        self.upstream.address()
    }
}

fn points_of(request: &str) -> Option<(Point, Point)> {
    let (line, _) = request.split_once("\r\n")?;
    match line {
        _ if line.starts_with("GET /internal/users/") => {
            Some((Point::BeforeCustomers, Point::AfterCustomers))
        }
        _ if line.starts_with("PUT /internal/reservations/") => {
            Some((Point::BeforeHold, Point::AfterHold))
        }
        _ if line.contains(" /internal/reservations/") => {
            Some((Point::BeforeStockCommand, Point::AfterStockCommand))
        }
        _ => None,
    }
}

/// The whole response, on a connection of its own; `None` where there is none.
fn forward(target: SocketAddr, request: &str) -> Option<String> {
    let request = request.replacen("\r\n", "\r\nConnection: close\r\n", 1);
    let stream = TcpStream::connect_timeout(&target, Duration::from_secs(1)).ok()?;
    let response = std::panic::catch_unwind(|| http::raw_on(stream, request.as_bytes())).ok()?;
    let (head, body) = response.split_once("\r\n\r\n")?;
    // The connection to orders stays open.
    let lines = head.lines().filter(|line| !line.to_ascii_lowercase().starts_with("connection:"));
    Some(format!("{}\r\n\r\n{body}", lines.collect::<Vec<_>>().join("\r\n")))
}

/// The answers that clients got.
#[derive(Default)]
struct Ledger {
    /// By the name that a client gave its order: the ids that it got.
    made: BTreeMap<String, HashSet<Uuid>>,
    sent: HashSet<String>,
    paid: HashSet<Uuid>,
    canceled: HashSet<Uuid>,
    shipped: HashSet<Uuid>,
    unexpected: Vec<String>,
    last: Option<Instant>,
    longest_pause: Duration,
}

impl Ledger {
    fn acknowledge(&mut self) {
        let now = Instant::now();
        if let Some(last) = self.last.replace(now) {
            self.longest_pause = self.longest_pause.max(now - last);
        }
    }
}

struct Client<'c> {
    platform: &'c Platform,
    issuer: &'c TokenIssuer,
    agent: Agent,
    user_id: i64,
    stopping: &'c AtomicBool,
    ledger: &'c Mutex<Ledger>,
}

impl Client<'_> {
    /// A request until it has an answer that no fault explains; `None` at the end of the case.
    fn ask(
        &self,
        method: &str,
        path: &str,
        admin: bool,
        key: Option<&str>,
        body: &Value,
    ) -> Option<Reply> {
        let user_id = if admin { 1 } else { self.user_id };
        let bearer = format!("Bearer {}", self.issuer.token(user_id, admin));
        let mut headers = vec![("Content-Type", "application/json"), ("Authorization", &*bearer)];
        headers.extend(key.map(|key| ("Idempotency-Key", key)));
        let url = self.platform.stack.url(path);
        let deadline = Instant::now() + Duration::from_secs(90);
        while Instant::now() < deadline {
            let reply = send(&self.agent, method, &url, &headers, &body.to_string());
            match reply {
                // Still running: the attempt before was cut off, and may be killed.
                Ok(reply) if reply.status == 409 && reply.header("Retry-After").is_some() => (),
                Ok(reply) if ![502, 503, 504].contains(&reply.status) => return Some(reply),
                _ => (),
            }
            if self.stopping.load(Ordering::SeqCst) {
                return None;
            }
            thread::park_timeout(Duration::from_millis(10));
        }
        self.ledger.lock().unexpected.push(format!("{method} {path} has no answer for 90 s"));
        None
    }

    fn unexpected(&self, what: &str, reply: &Reply) {
        let text = format!("{what} is answered {}: {}", reply.status, reply.body);
        self.ledger.lock().unexpected.push(text);
    }

    /// Orders, pays, ships and cancels until the end.
    fn run(&self, tag: &str, products: &[String], with_key: bool, random: &mut fastrand::Rng) {
        let mut number = 0;
        while !self.stopping.load(Ordering::SeqCst) {
            number += 1;
            let name = format!("{tag}-{number}");
            self.ledger.lock().sent.insert(name.clone());
            let key = with_key.then_some(name.as_str());
            let sku = &products[random.usize(..products.len())];
            let other = &products[random.usize(..products.len())];
            // A checkout now and then; its cart may be left from a client that was killed.
            let made = if with_key && number % 4 == 0 {
                let item = json!({ "sku": sku, "quantity": 1 });
                let path = format!("/api/v1/carts/me/items/{sku}");
                let Some(_) = self.ask("PUT", &path, false, None, &item) else { return };
                let body = json!({ "store_id": name });
                self.ask("POST", "/api/v1/carts/me/checkout", false, key, &body)
            } else {
                let items = json!([{ "sku": sku, "quantity": 1 }, { "sku": other, "quantity": 2 }]);
                let body = json!({ "store_id": name, "items": items });
                self.ask("POST", "/api/v1/orders", false, key, &body)
            };
            let Some(made) = made else { return };
            if made.status != 201 {
                self.unexpected("an order", &made);
                continue;
            }
            let order = made.json();
            let id: Uuid = order["id"].as_str().unwrap().parse().unwrap();
            {
                let mut ledger = self.ledger.lock();
                ledger.made.entry(name).or_default().insert(id);
                ledger.acknowledge();
            }
            self.go_on_with(&order, id, random);
        }
    }

    fn go_on_with(&self, order: &Value, id: Uuid, random: &mut fastrand::Rng) {
        let path = |rest: &str| format!("/api/v1/orders/{id}/{rest}");
        let change = |method: &str, rest: &str, admin: bool, body: &Value, what: &str| {
            let reply = self.ask(method, &path(rest), admin, None, body)?;
            if reply.status != 200 {
                self.unexpected(what, &reply);
                return None;
            }
            self.ledger.lock().acknowledge();
            Some(())
        };
        match random.u8(0..5) {
            0 => (),
            1 => {
                if change("POST", "cancellation", false, &json!({}), "a cancellation").is_some() {
                    self.ledger.lock().canceled.insert(id);
                }
            }
            further => {
                let payment = json!({ "amount": order["total_amount"], "reference": id });
                if change("PUT", "payment", true, &payment, "a payment").is_none() {
                    return;
                }
                self.ledger.lock().paid.insert(id);
                let shipment = json!({ "carrier": "post", "tracking_number": id });
                if further > 2
                    && change("PUT", "shipment/tracking", true, &shipment, "a shipment").is_some()
                {
                    self.ledger.lock().shipped.insert(id);
                }
            }
        }
    }
}

/// Accounts, products and a queue of all events, which are gone when it is dropped.
struct Fixture<'p> {
    platform: &'p Platform,
    users: Vec<i64>,
    products: Vec<String>,
    issuer: TokenIssuer,
    queue: String,
}

impl<'p> Fixture<'p> {
    fn new(platform: &'p Platform, tag: &str) -> Fixture<'p> {
        let insert =
            "insert into users (email, email_key, password_hash) values ($1, lower($1), 'none')
            returning id";
        let mut customers = platform.connect("CUSTOMERS_DB_NAME");
        let users = (0..CLIENTS)
            .map(|number| {
                let email = format!("{tag}-{number}@example.org");
                customers.query_one(insert, &[&email]).unwrap().get(0)
            })
            .collect();
        let products: Vec<String> = (0..5).map(|number| format!("{tag}-{number}")).collect();
        let mut inventory = platform.connect("INVENTORY_DB_NAME");
        for sku in &products {
            add_product(&mut inventory, sku, PIECES);
        }
        let queue = format!("{tag}-events");
        let (mut connection, _deadline) = connect_to_broker();
        let channel = connection.open_channel(None).unwrap();
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(&queue, durable).unwrap();
        let exchange = test_var("ORDERS_RABBITMQ_EXCHANGE");
        channel.queue_bind(&queue, &exchange, "#", FieldTable::new()).unwrap();
        let _ = connection.close();
        Fixture { platform, users, products, issuer: TokenIssuer::start(), queue }
    }

    /// Runs clients while `faults` injects faults, until it ends.
    fn with_clients(
        &self,
        tag: &str,
        with_key: bool,
        seed: u64,
        faults: impl FnOnce(&Mutex<Ledger>),
    ) -> Ledger {
        let (stopping, ledger) = (AtomicBool::new(false), Mutex::new(Ledger::default()));
        thread::scope(|scope| {
            let _stop = SetOnDrop(&stopping);
            for (number, user_id) in self.users.iter().enumerate() {
                let (stopping, ledger) = (&stopping, &ledger);
                let mut random = fastrand::Rng::with_seed(seed + number as u64);
                let tag = format!("{tag}-{number}");
                scope.spawn(move || {
                    let client = Client {
                        platform: self.platform,
                        issuer: &self.issuer,
                        agent: agent(),
                        user_id: *user_id,
                        stopping,
                        ledger,
                    };
                    client.run(&tag, &self.products, with_key, &mut random);
                });
            }
            faults(&ledger);
        });
        ledger.into_inner()
    }

    /// Waits until all messages are published, all stock commands are answered, and all holds that
    /// belong to no order have expired.
    fn settle(&self) {
        let none = |variable: &str, query: &str| {
            eventually(format!("none: {query}"), 120, || {
                let row = self.platform.connect(variable).query_one(query, &[]).ok()?;
                (row.get::<_, i64>(0) == 0).then_some(())
            });
        };
        let pending = "select count(*) from outbox where published_at is null";
        none("ORDERS_DB_NAME", pending);
        none("ORDERS_DB_NAME", "select count(*) from stock_commands where done_at is null");
        none("INVENTORY_DB_NAME", "select count(*) from reservations where state = 'held'");
        self.platform.wait_for_empty_queue();
    }

    /// The ids of the events in the queue, and how many came after a later one of their order.
    fn received_in_order(&self) -> (HashSet<Uuid>, usize) {
        let (mut connection, _deadline) = connect_to_broker();
        let channel = connection.open_channel(None).unwrap();
        let mut versions: HashMap<Uuid, i64> = HashMap::new();
        let (mut seen, mut wrong) = (HashSet::new(), 0);
        let query = "select order_id, version from order_events where id = $1";
        let mut db = self.platform.connect("ORDERS_DB_NAME");
        let query = db.prepare(query).unwrap();
        while let Some(got) = channel.basic_get(&self.queue, true).unwrap() {
            let id = got.delivery.properties.message_id().clone().unwrap_or_default();
            let id: Uuid = id.parse().unwrap_or_default();
            if got.delivery.routing_key == "created_order" || !seen.insert(id) {
                continue;
            }
            let Some(row) = db.query_opt(&query, &[&id]).unwrap() else { continue };
            let (order, version): (Uuid, i64) = (row.get(0), row.get(1));
            let last = versions.entry(order).or_default();
            wrong += usize::from(version < *last);
            *last = version.max(*last);
        }
        let _ = connection.close();
        (seen, wrong)
    }

    /// Compares the answers that clients got with the tables of all services.
    fn reconcile(&self, ledger: Ledger, tag: &str, outcome: &mut Outcome) {
        let mut store = self.platform.connect("ORDERS_DB_NAME");
        let query = "select store_id, id from orders where starts_with(store_id, $1)";
        let mut found: HashMap<String, Vec<Uuid>> = HashMap::new();
        for row in store.query(query, &[&tag]).unwrap() {
            found.entry(row.get(0)).or_default().push(row.get(1));
        }
        outcome.acknowledged += ledger.made.len();
        outcome.found += found.len();
        for (name, ids) in &ledger.made {
            let there = found.get(name).map_or(&[][..], Vec::as_slice);
            outcome.lost += usize::from(!ids.iter().all(|id| there.contains(id)));
        }
        outcome.duplicated += found.values().filter(|ids| ids.len() > 1).count();
        for name in found.keys().filter(|name| !ledger.sent.contains(*name)).take(3) {
            outcome.findings.push(format!("{name} was never ordered"));
        }
        let statuses: HashMap<Uuid, (String, bool)> = store
            .query(
                "select id, status, paid_at is not null from orders where starts_with(store_id, $1)",
                &[&tag],
            )
            .unwrap()
            .iter()
            .map(|row| (row.get(0), (row.get(1), row.get(2))))
            .collect();
        let status = |id: &Uuid| statuses.get(id).map_or("none", |(status, _)| status.as_str());
        for (ids, expected) in [
            (&ledger.paid, &["processing", "shipped"][..]),
            (&ledger.shipped, &["shipped"]),
            (&ledger.canceled, &["canceled"]),
        ] {
            for id in ids.iter().filter(|id| !expected.contains(&status(id))).take(3) {
                let text = format!("{id} is {} and not {expected:?}", status(id));
                outcome.findings.push(text);
            }
        }
        self.check_billing(&statuses, outcome);
        self.check_stock(&statuses, outcome);
        let pause = ledger.longest_pause;
        outcome.longest_pause = outcome.longest_pause.max(pause);
        outcome.findings.extend(ledger.unexpected.into_iter().take(5));
    }

    /// Each paid order is booked once, and no other.
    fn check_billing(&self, statuses: &HashMap<Uuid, (String, bool)>, outcome: &mut Outcome) {
        let mut billing = self.platform.connect("BILLING_DB_NAME");
        let paid: Vec<String> = statuses
            .iter()
            .filter(|(_, (_, is_paid))| *is_paid)
            .map(|(id, _)| id.to_string())
            .collect();
        let query = "select count(*) from processed_messages where message_id = any($1)";
        let booked: i64 = billing.query_one(query, &[&paid]).unwrap().get(0);
        let users: Vec<String> = self.users.iter().map(i64::to_string).collect();
        let query = "select count(*) from orders where user_id = any($1)";
        let rows: i64 = billing.query_one(query, &[&users]).unwrap().get(0);
        if (booked, rows) != (paid.len() as i64, paid.len() as i64) {
            let text = format!("{} are paid, {booked} booked, {rows} rows", paid.len());
            outcome.findings.push(text);
        }
    }

    /// Each reservation is as its order needs it, and the sums of the stock are right.
    fn check_stock(&self, statuses: &HashMap<Uuid, (String, bool)>, outcome: &mut Outcome) {
        let mut inventory = self.platform.connect("INVENTORY_DB_NAME");
        let query = "select distinct order_id, state
            from reservations join reservation_lines using (order_id)
            where sku = any($1)";
        for row in inventory.query(query, &[&self.products]).unwrap() {
            let (order, state): (Uuid, String) = (row.get(0), row.get(1));
            let status = statuses.get(&order).map_or("none", |(status, _)| status.as_str());
            let fits = match state.as_str() {
                "confirmed" => ["pending", "processing"].contains(&status),
                "committed" => ["shipped", "delivered"].contains(&status),
                "released" => ["canceled", "none"].contains(&status),
                "expired" => status == "none",
                _ => false,
            };
            if !fits && outcome.findings.len() < 20 {
                let text = format!("the stock of {order}, which is {status}, is {state}");
                outcome.findings.push(text);
            }
        }
        let query = "select sku from stock
            left join (
                select sku,
                    coalesce(sum(quantity) filter (where state in ('held', 'confirmed')), 0) as held,
                    coalesce(sum(quantity) filter (where state = 'committed'), 0) as gone
                from reservation_lines join reservations using (order_id)
                group by sku
            ) as lines using (sku)
            where sku = any($1)
            and (reserved <> coalesce(held, 0) or on_hand <> $2::int - coalesce(gone, 0))";
        for row in inventory.query(query, &[&self.products, &PIECES]).unwrap() {
            let sku: String = row.get(0);
            outcome.findings.push(format!("the sums of {sku} are wrong"));
        }
    }
}

impl Drop for Fixture<'_> {
    fn drop(&mut self) {
        // After a panic the broker may be away: a second panic would end the whole campaign.
        if let Ok((mut connection, _deadline)) = broker_config().connect("campaign") {
            if let Ok(channel) = connection.open_channel(None) {
                let _ = channel.queue_delete(&self.queue, QueueDeleteOptions::default());
            }
            let _ = connection.close();
        }
        let clean = [
            (
                "ORDERS_DB_NAME",
                "truncate orders, order_lines, order_events, outbox, stock_commands,
                idempotency_keys, carts, cart_lines, webhook_events",
            ),
            (
                "INVENTORY_DB_NAME",
                "truncate reservation_lines, reservations, stock_adjustments,
                stock, products",
            ),
        ];
        for (variable, statement) in clean {
            let _ = self.platform.connect(variable).batch_execute(statement);
        }
    }
}

fn connect_to_broker() -> (Connection, SocketDeadline) {
    let config = broker_config();
    eventually("a connection to the broker", 60, || config.connect("campaign").ok())
}

fn broker_config() -> broker::Config {
    admin_broker(&test_var("RABBITMQ_VHOST"))
}

/// Every acknowledged order exists once with its stock held once, every paid one is booked once, every
/// event is published in the order of its order, and no stock is held for an order that does not exist.
fn orders_killed(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new(format!("{CLIENTS} clients"));
    let platform = &*run.platform;
    let fixture = Fixture::new(platform, &run.tag);
    let trigger = Arc::new(Trigger::default());
    let internal = |service: &str| {
        let host = platform.stack.socket_address(service).ip();
        let port = test_var(&format!("{}_INTERNAL_PORT", service.to_uppercase()));
        SocketAddr::new(host, port.parse().unwrap())
    };
    let inventory = Interceptor::start(internal("inventory"), &trigger);
    let customers = Interceptor::start(internal("customers"), &trigger);
    let mut stack = platform.stack.clone();
    for (prefix, address) in
        [("INVENTORY", inventory.address()), ("CUSTOMERS", customers.address())]
    {
        stack.set(&format!("{prefix}_HOST"), address.ip());
        stack.set(&format!("{prefix}_INTERNAL_PORT"), address.port());
    }
    // Holds of orders that were never made expire within the case.
    stack.set("ORDERS_HOLD_SECONDS", 10);
    let orders = platform.service("orders");
    orders.restart(&stack, Program::Real);
    platform.wait_until_ready();
    let memory = platform.sample_memory();
    let (rounds, control) = (run.short_or_long(1, 12), run.control);
    let (tag, seed) = (run.tag.clone(), run.random.u64(..));
    let random = &mut run.random;
    let faults = &mut outcome.faults;
    let ledger = fixture.with_clients(&tag, !control, seed, |ledger| {
        let wait_for_progress = |after: &str| {
            let before = ledger.lock().made.len();
            eventually(format!("orders are made after {after}"), 90, || {
                (ledger.lock().made.len() > before + CLIENTS).then_some(())
            });
        };
        wait_for_progress("the start");
        for _ in 0..rounds {
            for point in POINTS {
                *trigger.pid.lock() = orders.pid();
                *trigger.armed.lock() = Some(point);
                let fired = trigger.fired.load(Ordering::SeqCst);
                eventually(format!("orders is killed at {point:?}"), 60, || {
                    (trigger.fired.load(Ordering::SeqCst) > fired).then_some(())
                });
                *faults += 1;
                wait_for_progress(&format!("the kill at {point:?}"));
            }
            let mut services = ["orders", "inventory", "customers", "billing", "gateway", "orders"];
            random.shuffle(&mut services);
            for service in services {
                wait_until(Instant::now() + Duration::from_millis(random.u64(20..400)));
                platform.service(service).kill();
                *faults += 1;
                wait_for_progress(&format!("the kill of {service}"));
            }
            for server in ["postgres", "rabbitmq"] {
                platform.servers("kill", &[server]);
                platform.servers("start", &[]);
                *faults += 1;
                wait_for_progress(&format!("the kill of {server}"));
            }
        }
    });
    platform.wait_until_ready();
    fixture.settle();
    outcome.peak_memory = memory.peak();
    let (published, wrong) = fixture.received_in_order();
    if wrong > 0 {
        outcome.findings.push(format!("{wrong} events came after a later one of their order"));
    }
    check_published(platform, &published, &mut outcome);
    fixture.reconcile(ledger, &tag, &mut outcome);
    outcome
}

/// Every event of every order is in the queue.
fn check_published(platform: &Platform, published: &HashSet<Uuid>, outcome: &mut Outcome) {
    let rows =
        platform.connect("ORDERS_DB_NAME").query("select id from order_events", &[]).unwrap();
    let missing = rows.iter().filter(|row| !published.contains(&row.get(0))).count();
    if missing > 0 {
        outcome.findings.push(format!("{missing} events of {} were never published", rows.len()));
    }
}

/// Messages are published while the broker is killed again and again.
fn outbox_broker_killed(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new(format!("{CLIENTS} clients"));
    let platform = &*run.platform;
    let fixture = Fixture::new(platform, &run.tag);
    let (tag, seed, control) = (run.tag.clone(), run.random.u64(..), run.control);
    let rounds = run.short_or_long(3, 20);
    let random = &mut run.random;
    let stopping = AtomicBool::new(false);
    let faults = &mut outcome.faults;
    let ledger = thread::scope(|scope| {
        let _stop = SetOnDrop(&stopping);
        if control {
            let mut db = platform.connect("ORDERS_DB_NAME");
            platform.service("orders").kill();
            eventually("the lock of the relay", 30, || {
                let query = "select pg_try_advisory_lock($1)";
                let row = db.query_one(query, &[&RELAY_LOCK]).unwrap();
                row.get::<_, bool>(0).then_some(())
            });
            let stopping = &stopping;
            scope.spawn(move || relay_without_confirms(&mut db, stopping));
        }
        fixture.with_clients(&tag, true, seed, |ledger| {
            for _ in 0..rounds {
                let before = ledger.lock().made.len();
                eventually("orders are made", 90, || {
                    (ledger.lock().made.len() > before + 10 * CLIENTS).then_some(())
                });
                wait_until(Instant::now() + Duration::from_millis(random.u64(0..300)));
                platform.servers("kill", &["rabbitmq"]);
                platform.servers("start", &[]);
                *faults += 1;
            }
        })
    });
    platform.wait_until_ready();
    if control {
        let left = "update outbox set published_at = now() where published_at is null";
        platform.connect("ORDERS_DB_NAME").batch_execute(left).unwrap();
    }
    fixture.settle();
    let (published, _) = fixture.received_in_order();
    check_published(platform, &published, &mut outcome);
    if !control {
        fixture.reconcile(ledger, &tag, &mut outcome);
    }
    outcome
}

/// As others have done it: what is sent counts as published.
fn relay_without_confirms(db: &mut postgres::Client, stopping: &AtomicBool) {
    let exchange_name = test_var("ORDERS_RABBITMQ_EXCHANGE");
    while !stopping.load(Ordering::SeqCst) {
        let (mut connection, deadline) = connect_to_broker();
        let Ok(channel) = connection.open_channel(None) else { continue };
        while !stopping.load(Ordering::SeqCst) {
            let query = "update outbox set published_at = now()
                where id in (select id from outbox where published_at is null order by id limit 50)
                returning message_id, routing_key, body, target";
            let rows = db.query(query, &[]).unwrap();
            if rows.is_empty() {
                thread::park_timeout(Duration::from_millis(5));
            }
            let publish = |row: &postgres::Row| {
                let properties =
                    AmqpProperties::default().with_delivery_mode(2).with_message_id(row.get(0));
                let body: String = row.get(2);
                let is_for_queue = row.get::<_, &str>(3) == "queue";
                let key = match is_for_queue {
                    true => test_var("RABBITMQ_QUEUE"),
                    false => row.get(1),
                };
                let message = Publish::with_properties(body.as_bytes(), key, properties);
                match is_for_queue {
                    true => Exchange::direct(&channel).publish(message),
                    false => channel.basic_publish(&*exchange_name, message),
                }
            };
            let sent: Result<(), _> = deadline
                .with_deadline(Duration::from_secs(3), || rows.iter().try_for_each(publish));
            if sent.is_err() {
                break;
            }
        }
    }
}
