//! The service from outside: its real routes on a real PostgreSQL and a real RabbitMQ, with inventory
//! and customers played by the harness.

mod carts;
mod changes;
mod creation;
mod inventory;
mod outbox;
mod races;
mod webhooks;

use std::collections::HashMap;
use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chassis::testing::http::Reply;
use chassis::testing::{TestDb, TestVhost, TokenIssuer, dispatch, eventually, test_var};
use chassis::{Env, Stop};
use orders::App;
use orders::config::Config;
use orders::routes::ROUTES;
use postgres::Client;
use serde_json::{Value, json};

use inventory::Inventory;

/// The service on a database and a virtual host of a test's own.
struct Store {
    config: Config,
    app: Arc<App>,
    db: TestDb,
    inventory: Inventory,
    issuer: TokenIssuer,
    stop: Stop,
    settings: HashMap<&'static str, String>,
    _vhost: TestVhost,
}

const ANNA: i64 = 7;
const BEN: i64 = 8;
const FAILING: i64 = 50;

/// How often was asked for [`FAILING`].
static FAILURES: AtomicUsize = AtomicUsize::new(0);

impl Store {
    fn new() -> Store {
        Store::with(&[])
    }

    /// The same with these settings.
    fn with(own: &[(&'static str, &str)]) -> Store {
        let (db, vhost) = (TestDb::new(&test_var("ORDERS_DB_NAME")), TestVhost::new());
        let issuer = TokenIssuer::start_with(answer_as_customers);
        let inventory = Inventory::start();
        let (customers, stock) = (issuer.address(), inventory.address());
        let mut settings = HashMap::from([
            ("ORDERS_DB_NAME", db.name.clone()),
            ("RABBITMQ_VHOST", vhost.name.clone()),
            ("CUSTOMERS_HOST", customers.ip().to_string()),
            ("CUSTOMERS_INTERNAL_PORT", customers.port().to_string()),
            ("INVENTORY_HOST", stock.ip().to_string()),
            ("INVENTORY_INTERNAL_PORT", stock.port().to_string()),
            ("ORDERS_WEBHOOK_SECRETS", "new-secret,old-secret".to_owned()),
        ]);
        settings.extend(own.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let config = config(&settings);
        let stop = Stop::default();
        let app = Arc::new(App::new(&config, &stop).unwrap());
        let store = Store { config, app, db, inventory, issuer, stop, settings, _vhost: vhost };
        eventually("tokens can be verified", 10, || {
            (store.ask(ANNA, "GET", "/api/v1/orders", &Value::Null).status == 200).then_some(())
        });
        store
    }

    /// A further instance of the service on the same database.
    fn another(&self) -> Arc<App> {
        let app = Arc::new(App::new(&self.config, &self.stop).unwrap());
        eventually("tokens can be verified", 10, || {
            let reply = self.ask_app(&app, ANNA, "GET", "/api/v1/orders", &[], "");
            (reply.status == 200).then_some(())
        });
        app
    }

    /// A request of a customer, with a body unless that is null.
    fn ask(&self, user_id: i64, method: &str, path: &str, body: &Value) -> Reply {
        self.ask_with(user_id, method, path, &[], body)
    }

    fn ask_with(
        &self,
        user_id: i64,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> Reply {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.ask_app(&self.app, user_id, method, path, headers, &body)
    }

    fn ask_app(
        &self,
        app: &App,
        user_id: i64,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Reply {
        let bearer = format!("Bearer {}", self.issuer.token(user_id, false));
        let headers = [&[("Authorization", &*bearer)], headers].concat();
        dispatch(ROUTES, app, method, path, &headers, body)
    }

    /// A request of an administrator, whose id is 1.
    fn admin(&self, method: &str, path: &str, body: &Value) -> Reply {
        self.admin_with(method, path, &[], body)
    }

    fn admin_with(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> Reply {
        let bearer = format!("Bearer {}", self.issuer.token(1, true));
        let headers = [&[("Authorization", &*bearer)], headers].concat();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        dispatch(ROUTES, &self.app, method, path, &headers, &body)
    }

    /// Anna's new order of two of `a`, 9.99 each.
    fn order(&self) -> Value {
        let body = json!({ "items": [{ "sku": "a", "quantity": 2 }] });
        let created = self.ask(ANNA, "POST", "/api/v1/orders", &body);
        assert_eq!(created.status, 201, "{}", created.body);
        created.json()
    }

    fn pay(&self, order: &Value) -> Reply {
        let body = json!({ "amount": order["total_amount"], "reference": "p-1", "method": "card" });
        self.admin("PUT", &path(order, "/payment"), &body)
    }

    fn ship(&self, order: &Value) -> Reply {
        let body = json!({ "carrier": "post", "tracking_number": "4111111111111111" });
        self.admin("PUT", &path(order, "/shipment/tracking"), &body)
    }

    fn get(&self, order: &Value) -> Value {
        let found = self.admin("GET", &path(order, ""), &Value::Null);
        assert_eq!(found.status, 200, "{}", found.body);
        found.json()
    }

    /// Sends all stock commands that are due.
    fn send_stock_commands(&self) {
        use orders::exclusive::{Lock, open};
        let mut session = open(&self.config.db, Lock::StockSender).unwrap().unwrap();
        while orders::stock::sender::send_batch(&self.app, &mut session, &Stop::default()).unwrap()
        {
        }
    }

    fn count(&self, table: &str) -> i64 {
        let query = format!("select count(*) from {table}");
        self.superuser().query_one(&query, &[]).unwrap().get(0)
    }

    fn superuser(&self) -> Client {
        self.db.superuser()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.stop.request();
    }
}

fn config(settings: &HashMap<&'static str, String>) -> Config {
    let settings = settings.clone();
    let lookup = move |name: &str| settings.get(name).cloned().or_else(|| std::env::var(name).ok());
    Config::from_env(Env::from_fn(lookup)).unwrap()
}

/// The path of an order.
fn path(order: &Value, rest: &str) -> String {
    format!("/api/v1/orders/{}{rest}", order["id"].as_str().unwrap())
}

/// Users 1 to 99 are there; 13 is disabled, and for [`FAILING`] each second request fails.
fn answer_as_customers(stream: &mut TcpStream, request: &str) -> bool {
    let path = request.split(' ').nth(1).unwrap_or_default();
    let id = path.strip_prefix("/internal/users/").and_then(|id| id.parse::<i64>().ok());
    match id {
        None => reply(stream, 200, &json!({ "status": "ok" })),
        Some(FAILING) if FAILURES.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) => {
            reply(stream, 500, &json!({ "detail": "a failure" }))
        }
        Some(id) if id > 99 => reply(stream, 404, &json!({ "detail": "there is no such user" })),
        Some(id) => {
            let user = json!({
                "id": id, "name": "Anna Ek", "email": format!("{id}@example.org"),
                "shipping_address": { "name": "Anna Ek", "line1": "Kungsgatan 1", "line2": null,
                    "city": "Stockholm", "postal_code": null, "region": null, "country": "SE" },
                "billing_address": null, "payment_method": null,
                "state": if id == 13 { "disabled" } else { "active" },
            });
            reply(stream, 200, &user)
        }
    }
}

fn reply(stream: &mut TcpStream, status: u16, body: &Value) -> bool {
    let body = body.to_string();
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).is_ok()
}
