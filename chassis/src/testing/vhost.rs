//! Virtual hosts of one test's own, and the broker's management API.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

use super::{http, test_var, unique_name};
use crate::broker;
use crate::env::Env;

/// A virtual host of one test's own, in which the services' users have the permissions that
/// they have in the real one; deleted at the end.
pub struct TestVhost {
    /// Its name.
    pub name: String,
}

impl TestVhost {
    /// Makes one with the permissions and policies of the virtual host in `RABBITMQ_VHOST`.
    pub fn new() -> TestVhost {
        let name = unique_name("test");
        management_api("PUT", &format!("vhosts/{name}"), None);
        let vhost = TestVhost { name };
        let original = vhost_path();
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

/// How the administrator connects to a virtual host: may do what no service may.
pub fn admin_broker(vhost: &str) -> broker::Config {
    let vhost = vhost.to_owned();
    let mut env = Env::from_fn(move |name| match name {
        "RABBITMQ_VHOST" => Some(vhost.clone()),
        "ADMIN_RABBITMQ_USER" => Some(test_var("RABBITMQ_ADMIN_USER")),
        "ADMIN_RABBITMQ_PASSWORD" => Some(test_var("RABBITMQ_ADMIN_PASSWORD")),
        name => std::env::var(name).ok(),
    });
    let config = broker::Config::from_env(&mut env, "ADMIN");
    env.finish(config).unwrap()
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

/// The virtual host in `RABBITMQ_VHOST` as a part of a path: `%2F` for `/`.
pub fn vhost_path() -> String {
    test_var("RABBITMQ_VHOST").replace('/', "%2F")
}

fn management_list(path: &str) -> Vec<Value> {
    management_api("GET", path, None).as_array().cloned().unwrap_or_default()
}

/// A call of the broker's management API (`path` after `/api/`); its JSON answer, or null.
pub fn management_api(method: &str, path: &str, body: Option<Value>) -> Value {
    let port = test_var("RABBITMQ_MANAGEMENT_PORT");
    let (user, password) = (test_var("RABBITMQ_ADMIN_USER"), test_var("RABBITMQ_ADMIN_PASSWORD"));
    let login = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")));
    let url = format!("http://127.0.0.1:{port}/api/{path}");
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let headers = [("Authorization", login.as_str()), ("Content-Type", "application/json")];
    let reply = http::send(&http::agent(), method, &url, &headers, &body)
        .unwrap_or_else(|err| panic!("{method} {path}: {err}"));
    // A resource that is to be deleted may be gone already.
    assert!(
        reply.status < 400 || method == "DELETE",
        "{method} {path}: {} {}",
        reply.status,
        reply.body
    );
    serde_json::from_str(&reply.body).unwrap_or_default()
}
