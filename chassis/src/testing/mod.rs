//! Databases and virtual hosts for tests, on the servers that `provision/local test` starts.

pub mod http_corpus;

use std::fmt::Display;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use postgres::{Client, NoTls};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A name that no other test has, in this process or another.
fn unique(what: &str) -> String {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{what}_{}_{number}", process::id())
}

/// A variable of the test servers; a test without servers fails, it does not skip.
pub fn test_var(name: &str) -> String {
    let value = std::env::var(name).ok();
    assert!(
        value.is_some() && std::env::var("MATINEE_TEST_SERVERS_DIR").is_ok(),
        "{name} is not set: run the tests by `provision/local test cargo`, which starts the servers"
    );
    value.unwrap_or_default()
}

/// Polls until `find` finds something; panics with `what` after `seconds`.
pub fn eventually<T>(what: impl Display, seconds: u64, mut find: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {seconds} s: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A database of one test's own, a copy of a migrated one; dropped at the end.
pub struct TestDb {
    /// Its name.
    pub name: String,
}

impl TestDb {
    /// Copies the database `template` (such as the one in `INVENTORY_DB_NAME`).
    pub fn new(template: &str) -> TestDb {
        let name = unique("test");
        let mut admin = TestDb::connect_as_superuser("postgres");
        // One copy at a time: the template must have no other session meanwhile.
        admin.batch_execute("select pg_advisory_lock(1)").unwrap();
        let create = format!("create database {name} template {template}");
        admin.batch_execute(&create).unwrap();
        TestDb { name }
    }

    /// The superuser's view of this database.
    pub fn superuser(&self) -> Client {
        TestDb::connect_as_superuser(&self.name)
    }

    fn connect_as_superuser(database: &str) -> Client {
        postgres::Config::new()
            .host("127.0.0.1")
            .port(test_var("POSTGRES_PORT").parse().unwrap())
            .user(&test_var("POSTGRES_SUPERUSER"))
            .password(test_var("POSTGRES_SUPERUSER_PASSWORD"))
            .dbname(database)
            .connect(NoTls)
            .unwrap()
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        let mut admin = TestDb::connect_as_superuser("postgres");
        let drop = format!("drop database if exists {} with (force)", self.name);
        let _ = admin.batch_execute(&drop);
    }
}

/// A virtual host of one test's own, where the services' users may do what they
/// may do in the real one; deleted at the end.
pub struct TestVhost {
    /// Its name.
    pub name: String,
}

impl TestVhost {
    /// Makes one with the permissions and policies of the virtual host in `RABBITMQ_VHOST`.
    pub fn new() -> TestVhost {
        let name = unique("test");
        management_api("PUT", &format!("vhosts/{name}"), None);
        let vhost = TestVhost { name };
        let original = test_var("RABBITMQ_VHOST").replace('/', "%2F");
        for permission in management_list(&format!("vhosts/{original}/permissions")) {
            let user = permission["user"].as_str().unwrap_or_default();
            let path = format!("permissions/{}/{user}", vhost.name);
            management_api("PUT", &path, Some(permission.clone()));
        }
        for policy in management_list(&format!("policies/{original}")) {
            let policy_name = policy["name"].as_str().unwrap_or_default();
            let path = format!("policies/{}/{policy_name}", vhost.name);
            management_api("PUT", &path, Some(policy.clone()));
        }
        vhost
    }
}

impl Default for TestVhost {
    fn default() -> TestVhost {
        TestVhost::new()
    }
}

impl Drop for TestVhost {
    fn drop(&mut self) {
        management_api("DELETE", &format!("vhosts/{}", self.name), None);
    }
}

fn management_list(path: &str) -> Vec<serde_json::Value> {
    management_api("GET", path, None).as_array().cloned().unwrap_or_default()
}

/// A call of the broker's management API (`path` after `/api/`); its JSON answer, or null.
pub fn management_api(
    method: &str,
    path: &str,
    body: Option<serde_json::Value>,
) -> serde_json::Value {
    let port = test_var("RABBITMQ_MANAGEMENT_PORT");
    let (user, password) = (test_var("RABBITMQ_ADMIN_USER"), test_var("RABBITMQ_ADMIN_PASSWORD"));
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(format!("http://127.0.0.1:{port}/api/{path}"))
        .header(
            "Authorization",
            format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}"))),
        )
        .header("Content-Type", "application/json")
        .body(body.map(|body| body.to_string()).unwrap_or_default())
        .unwrap();
    let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
    let mut response = agent.run(request).unwrap_or_else(|err| panic!("{method} {path}: {err}"));
    let text = response.body_mut().read_to_string().unwrap();
    // What is to be deleted may be gone already.
    let fine = response.status().as_u16() < 400 || method == "DELETE";
    assert!(fine, "{method} {path}: {} {text}", response.status());
    serde_json::from_str(&text).unwrap_or_default()
}
