//! The service from outside: its real routes on a real PostgreSQL.

mod abuse;
mod accounts;
mod administrators;
mod commands;
mod feed;
mod program;
mod races;
mod sessions;

use std::sync::atomic::{AtomicU32, Ordering};

use chassis::testing::http::Reply;
use chassis::testing::{TestDb, dispatch, eventually, test_var};
use chassis::{Env, Stop};
use customers::App;
use customers::config::Config;
use customers::routes::{INTERNAL_ROUTES, ROUTES};
use postgres::Client;
use serde_json::{Value, json};

/// A password that breaks no rule.
const PASSWORD: &str = "a password of ships";

/// The service on a database of a test's own, without the HTTP server.
struct Customers {
    app: App,
    db: TestDb,
    stop: Stop,
}

impl Customers {
    fn new() -> Customers {
        Customers::with(&[])
    }

    /// The same with these settings.
    fn with(settings: &[(&str, &str)]) -> Customers {
        let db = TestDb::new(&test_var("CUSTOMERS_DB_NAME"));
        let stop = Stop::default();
        let app = App::new(config(&db.name, settings), &stop).unwrap();
        let customers = Customers { app, db, stop };
        eventually("tokens can be verified", 10, || {
            (customers.get("/health/ready", None).status == 200).then_some(())
        });
        customers
    }

    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        dispatch(ROUTES, &self.app, method, path, headers, body)
    }

    fn internal(&self, path: &str) -> Reply {
        dispatch(INTERNAL_ROUTES, &self.app, "GET", path, &[], "")
    }

    fn send(&self, method: &str, path: &str, token: Option<&str>, body: &Value) -> Reply {
        let bearer = token.map(|token| format!("Bearer {token}"));
        let headers = bearer.iter().map(|bearer| ("Authorization", bearer.as_str()));
        let text = if body.is_null() { String::new() } else { body.to_string() };
        self.ask(method, path, &headers.collect::<Vec<_>>(), &text)
    }

    fn get(&self, path: &str, token: Option<&str>) -> Reply {
        self.send("GET", path, token, &Value::Null)
    }

    fn post(&self, path: &str, body: Value) -> Reply {
        self.send("POST", path, None, &body)
    }

    /// Registers an account of its own name; returns its e-mail address and id.
    fn register(&self) -> (String, i64) {
        let email = unique_email();
        let reply = self.post("/api/v1/users", json!({ "email": email, "password": PASSWORD }));
        assert_eq!(reply.status, 201, "{}", reply.body);
        (email, reply.json()["id"].as_i64().unwrap())
    }

    /// Logs in; panics where that fails.
    fn login(&self, email: &str) -> Tokens {
        let reply = self.try_login(email, PASSWORD);
        assert_eq!(reply.status, 200, "{}", reply.body);
        Tokens::of(&reply)
    }

    fn try_login(&self, email: &str, password: &str) -> Reply {
        self.post("/api/v1/auth/login", json!({ "email": email, "password": password }))
    }

    /// A new account that is logged in.
    fn customer(&self) -> (i64, Tokens) {
        let (email, id) = self.register();
        (id, self.login(&email))
    }

    /// A new administrator who is logged in.
    fn administrator(&self) -> (i64, Tokens) {
        let (email, id) = self.register();
        let promote = "update users set is_admin = true where id = $1";
        self.superuser().execute(promote, &[&id]).unwrap();
        (id, self.login(&email))
    }

    fn refresh(&self, token: &str) -> Reply {
        self.post("/api/v1/auth/refresh", json!({ "refresh_token": token }))
    }

    /// The status of a request that needs a token.
    fn status_with(&self, token: &str) -> u16 {
        self.get("/api/v1/users/me", Some(token)).status
    }

    fn superuser(&self) -> Client {
        self.db.superuser()
    }
}

impl Drop for Customers {
    fn drop(&mut self) {
        self.stop.request();
    }
}

/// As the service has it, but for the database's name, cheap hashes and what the test sets.
fn config(database: &str, settings: &[(&str, &str)]) -> Config {
    let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    let settings: Vec<(String, String)> = settings.iter().map(own).collect();
    let database = database.to_owned();
    let lookup = move |name: &str| {
        if let Some((_, value)) = settings.iter().find(|(known, _)| known == name) {
            return Some(value.clone());
        }
        match name {
            "CUSTOMERS_DB_NAME" => Some(database.clone()),
            "CUSTOMERS_ARGON2_MEMORY_KIB" => Some("64".to_owned()),
            "CUSTOMERS_ARGON2_ITERATIONS" => Some("1".to_owned()),
            "AUTH_POLL_INTERVAL_MS" => Some("20".to_owned()),
            _ => std::env::var(name).ok(),
        }
    };
    Config::from_env(Env::from_fn(lookup)).unwrap()
}

/// What a login or a refresh gives.
#[derive(Clone, Debug)]
struct Tokens {
    access: String,
    refresh: String,
}

impl Tokens {
    fn of(reply: &Reply) -> Tokens {
        let body = reply.json();
        let text = |name: &str| body[name].as_str().unwrap_or_else(|| panic!("{body}")).to_owned();
        Tokens { access: text("access_token"), refresh: text("refresh_token") }
    }
}

/// An e-mail address that no other account of the test has.
fn unique_email() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("user{}@example.org", NEXT.fetch_add(1, Ordering::Relaxed))
}
