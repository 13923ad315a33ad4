//! The service from outside: its real routes on a real PostgreSQL.

mod movies;
mod products;
mod reservations;
mod stock;

use chassis::testing::http::Reply;
use chassis::testing::{self, TestDb, TokenIssuer, dispatch, eventually, test_var};
use chassis::{Env, Stop, db};
use inventory::App;
use inventory::config::Config;
use inventory::routes::{INTERNAL_ROUTES, ROUTES};
use postgres::Client;
use rouille::Response;
use serde_json::{Value, json};

/// The database as the service has it, but for its name.
fn config(database: &str) -> db::Config {
    service_config(database, &[]).db
}

fn service_config(database: &str, settings: &[(&'static str, String)]) -> Config {
    let (database, settings) = (database.to_owned(), settings.to_vec());
    let lookup = move |name: &str| {
        if let Some((_, value)) = settings.iter().find(|(known, _)| *known == name) {
            return Some(value.clone());
        }
        match name {
            "INVENTORY_DB_NAME" => Some(database.clone()),
            _ => std::env::var(name).ok(),
        }
    };
    Config::from_env(Env::from_fn(lookup)).unwrap()
}

/// The service without the HTTP server, and without the service that makes tokens.
fn app(db: db::Config) -> App {
    let config = service_config(&test_var("INVENTORY_DB_NAME"), &[]);
    let stop = Stop::default();
    // It need not look for tokens.
    stop.request();
    App::new(Config { db, ..config }, &stop).unwrap()
}

/// The service on a database of a test's own, with tokens.
struct Store {
    app: App,
    db: TestDb,
    issuer: TokenIssuer,
    admin: String,
    stop: Stop,
}

impl Store {
    fn new() -> Store {
        Store::with(&[])
    }

    /// The same with these settings.
    fn with(settings: &[(&'static str, String)]) -> Store {
        let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
        let issuer = TokenIssuer::start();
        let stop = Stop::default();
        let app = Store::app(&db.name, &issuer, &stop, settings);
        eventually("tokens can be verified", 10, || {
            (dispatch(ROUTES, &app, "GET", "/health/ready", &[], "").status == 200).then_some(())
        });
        let admin = issuer.token(1, true);
        Store { app, db, issuer, admin, stop }
    }

    /// A further instance of the service on a database.
    fn app(
        database: &str,
        issuer: &TokenIssuer,
        stop: &Stop,
        settings: &[(&'static str, String)],
    ) -> App {
        let address = issuer.address();
        let mut settings = settings.to_vec();
        settings.push(("CUSTOMERS_HOST", address.ip().to_string()));
        settings.push(("CUSTOMERS_INTERNAL_PORT", address.port().to_string()));
        App::new(service_config(database, &settings), stop).unwrap()
    }

    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        dispatch(ROUTES, &self.app, method, path, headers, body)
    }

    /// A request of an administrator, with a body unless that is null.
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
        let bearer = format!("Bearer {}", self.admin);
        let headers = [&[("Authorization", &*bearer)], headers].concat();
        self.ask(method, path, &headers, &text_of(body))
    }

    fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, &[], "")
    }

    fn internal(&self, method: &str, path: &str, body: &Value) -> Reply {
        dispatch(INTERNAL_ROUTES, &self.app, method, path, &[], &text_of(body))
    }

    /// A product of this price with this many on hand.
    fn product(&self, sku: &str, price: &str, on_hand: i32) {
        let body = json!({ "sku": sku, "name": format!("The {sku}"), "price": price });
        let created = self.admin("POST", "/api/v1/products", &body);
        assert_eq!(created.status, 201, "{}", created.body);
        self.set_stock(sku, on_hand);
    }

    fn set_stock(&self, sku: &str, on_hand: i32) {
        let path = format!("/api/v1/products/{sku}/stock");
        let set = self.admin("PUT", &path, &json!({ "on_hand": on_hand }));
        assert_eq!(set.status, 200, "{}", set.body);
    }

    /// What is on hand of a product, and what is reserved.
    fn stock(&self, sku: &str) -> (i64, i64) {
        let path = format!("/api/v1/products/{sku}/stock");
        let stock = self.admin("GET", &path, &Value::Null).json();
        (stock["on_hand"].as_i64().unwrap(), stock["reserved"].as_i64().unwrap())
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

fn text_of(body: &Value) -> String {
    if body.is_null() { String::new() } else { body.to_string() }
}

/// The ids of a list of movies.
fn ids(reply: &Reply) -> Vec<i64> {
    let movies = reply.json();
    movies.as_array().unwrap().iter().map(|movie| movie["id"].as_i64().unwrap()).collect()
}

fn respond(app: &App, path: &str) -> Response {
    testing::respond(ROUTES, app, "GET", path, &[], "")
}

fn ask(app: &App, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
    dispatch(ROUTES, app, method, path, headers, body)
}
