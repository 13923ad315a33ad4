//! The program itself, over HTTP, with its log.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use chassis::testing::http::{self, agent, send};
use chassis::testing::process::Service;
use serde_json::{Value, json};

use super::*;

/// A started program on an address of its own; its settings are those of the tests.
pub(crate) struct Program {
    pub(crate) service: Service,
    address: Ipv4Addr,
}

impl Program {
    pub(crate) fn start(database: &str, settings: &[(&str, &str)]) -> Program {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let address = Ipv4Addr::new(127, 200 ^ high, low, NEXT.fetch_add(1, Ordering::Relaxed));
        Program::start_at(address, database, settings)
    }

    /// The same database and address again, after this program has ended.
    pub(crate) fn restart(&self, database: &str) -> Program {
        Program::start_at(self.address, database, &[])
    }

    fn start_at(address: Ipv4Addr, database: &str, settings: &[(&str, &str)]) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_customers"));
        command
            .env("CUSTOMERS_HOST", address.to_string())
            .env("CUSTOMERS_METRICS_LISTEN", format!("{address}:9304"))
            .env("CUSTOMERS_DB_NAME", database)
            .env("CUSTOMERS_ARGON2_MEMORY_KIB", "64")
            .envs(settings.iter().copied());
        let service = Service::start("customers", &mut command);
        let mut program = Program { service, address };
        eventually("customers is ready", 20, || {
            let Program { service, .. } = &mut program;
            assert!(service.exit_status().is_none(), "{}", service.log());
            let url = format!("http://{address}:{}/health/ready", test_var("CUSTOMERS_PORT"));
            let reply = send(&agent(), "GET", &url, &[], "").ok()?;
            (reply.status == 200).then_some(())
        });
        program
    }

    pub(crate) fn internal_address(&self) -> SocketAddr {
        (self.address, test_var("CUSTOMERS_INTERNAL_PORT").parse().unwrap()).into()
    }

    pub(crate) fn ask(
        &self,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: &Value,
    ) -> http::Reply {
        let bearer = token.map(|token| format!("Bearer {token}"));
        let mut headers = vec![("Content-Type", "application/json")];
        headers.extend(bearer.iter().map(|bearer| ("Authorization", bearer.as_str())));
        let url = format!("http://{}:{}{path}", self.address, test_var("CUSTOMERS_PORT"));
        let text = if body.is_null() { String::new() } else { body.to_string() };
        send(&agent(), method, &url, &headers, &text).unwrap()
    }
}

/// One text of a JSON body.
fn text(reply: &http::Reply, name: &str) -> String {
    reply.json()[name].as_str().unwrap_or_else(|| panic!("{}", reply.body)).to_owned()
}

#[test]
fn nothing_personal_no_password_and_no_token_is_ever_logged() {
    let db = TestDb::new(&test_var("CUSTOMERS_DB_NAME"));
    let mut program = Program::start(&db.name, &[("LOG_LEVEL", "trace")]);
    let email = "Private.Person@example.org";
    let card = "4111 1111 1111 1111";
    let login = json!({ "email": email, "password": PASSWORD });
    let none = Value::Null;
    let register = json!({
        "email": email, "password": PASSWORD, "username": "private-name", "first_name": "Privata"
    });
    let post = |path: &str, body: &Value| program.ask("POST", path, None, body);
    assert_eq!(post("/api/v1/users", &register).status, 201);
    assert_eq!(post("/api/v1/users", &register).status, 409);
    let wrong = json!({ "email": email, "password": "private wrong password" });
    assert_eq!(post("/api/v1/auth/login", &wrong).status, 401);
    let tokens = post("/api/v1/auth/login", &login);
    assert_eq!(tokens.status, 200, "{}", tokens.body);
    let (access, refresh) = (text(&tokens, "access_token"), text(&tokens, "refresh_token"));
    let ask = |method, path, body: &Value| program.ask(method, path, Some(&access), body).status;
    assert_eq!(ask("GET", "/api/v1/users/me", &none), 200);
    let method = json!({ "payment_method": { "type": "card", "reference": card } });
    assert_eq!(ask("PATCH", "/api/v1/users/me", &method), 422);
    assert_eq!(ask("PATCH", "/api/v1/users/me", &json!({ "email": 1 })), 422);
    assert_eq!(ask("PATCH", "/api/v1/users/me", &json!({ "is_admin": true })), 403);
    let set = json!({ "current_password": PASSWORD, "new_password": "private new password" });
    assert_eq!(ask("PUT", "/api/v1/users/me/password", &set), 204);
    let exists = format!("/api/v1/users/exists?email={email}");
    assert_eq!(text_of_exists(&program, &exists), json!(true));
    let refreshed = post("/api/v1/auth/refresh", &json!({ "refresh_token": refresh }));
    assert_eq!(refreshed.status, 200);
    assert_eq!(ask("POST", "/api/v1/auth/logout", &none), 204);
    assert_eq!(ask("GET", "/api/v1/users/me", &none), 401);

    assert!(program.service.terminate().success());
    let log = program.service.log();
    assert!(log.contains("/api/v1/auth/login") && log.contains("401"), "{log}");
    let folded = log.to_lowercase();
    for private in [
        email,
        "private-name",
        "Privata",
        PASSWORD,
        "private wrong password",
        "private new password",
        "4111",
        "argon2",
        access.rsplit('.').next().unwrap(),
        &refresh,
        &text(&refreshed, "refresh_token"),
    ] {
        assert!(!folded.contains(&private.to_lowercase()), "{private} is in the log:\n{log}");
    }
}

fn text_of_exists(program: &Program, path: &str) -> Value {
    program.ask("GET", path, None, &Value::Null).json()["exists"].clone()
}

#[test]
fn an_account_outlives_the_program_when_it_is_killed() {
    let db = TestDb::new(&test_var("CUSTOMERS_DB_NAME"));
    let mut program = Program::start(&db.name, &[]);
    let account = json!({ "email": "kept@example.org", "password": PASSWORD });
    assert_eq!(program.ask("POST", "/api/v1/users", None, &account).status, 201);
    let tokens = program.ask("POST", "/api/v1/auth/login", None, &account);
    let (access, refresh) = (text(&tokens, "access_token"), text(&tokens, "refresh_token"));
    program.service.kill();
    let program = program.restart(&db.name);
    let me = program.ask("GET", "/api/v1/users/me", Some(&access), &Value::Null);
    assert_eq!((me.status, text(&me, "email").as_str()), (200, "kept@example.org"));
    let refreshed =
        program.ask("POST", "/api/v1/auth/refresh", None, &json!({ "refresh_token": refresh }));
    assert_eq!(refreshed.status, 200);
}
