//! No credential is ever told: not in a log at any level, not in an answer, not in a
//! command line. Nor are bodies and headers of requests logged.

use std::fs;
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use chassis::testing::{TestDb, TestVhost, eventually, management_api, test_var};
use serde_json::json;

use harness::{Service, Stack, agent};

const SERVICES: [&str; 3] = ["inventory", "billing", "gateway"];
const MARK: &str = "Zq8Xk4Vw7";

/// Words that must not appear, in every form in which a program might show them.
fn told(text: &str, secret: &str) -> Option<&'static str> {
    let decimal = secret.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
    let hex = |case: fn(u8) -> String| secret.bytes().map(case).collect::<String>();
    // In base64 a word looks in three ways, by what stands before it; its ends are shared
    // with its neighbours.
    let base64 = |before: usize| {
        let encoded = BASE64_STANDARD_NO_PAD.encode(format!("{}{secret}", &"___"[..before]));
        encoded[[0, 2, 3][before]..encoded.len() - 2].to_owned()
    };
    [
        ("as it is", secret.to_owned()),
        ("backwards", secret.chars().rev().collect()),
        ("in decimal", decimal),
        ("in hexadecimal", hex(|byte| format!("{byte:02x}"))),
        ("in hexadecimal", hex(|byte| format!("{byte:02X}"))),
        ("percent-encoded", hex(|byte| format!("%{byte:02X}"))),
        ("in base64", base64(0)),
        ("in base64", base64(1)),
        ("in base64", base64(2)),
    ]
    .into_iter()
    .find_map(|(how, form)| text.contains(&form).then_some(how))
}

#[track_caller]
fn assert_untold(whose: &str, text: &str, secrets: &[String]) {
    for secret in secrets {
        if let Some(how) = told(text, secret) {
            panic!("{whose} tells {secret} {how}:\n{text}");
        }
    }
}

#[test]
fn what_looks_for_secrets_finds_them_in_every_form() {
    let secret = format!("{MARK}-found");
    for before in ["", "a", "ab", "abc:", "user:"] {
        let encoded = BASE64_STANDARD_NO_PAD.encode(format!("{before}{secret}\0z"));
        assert!(told(&format!("Basic {encoded}"), &secret).is_some(), "{encoded}");
    }
    for line in [
        format!("postgres://user:{secret}@host"),
        format!("{:?}", secret.as_bytes()),
        secret.bytes().map(|byte| format!("%{byte:02X}")).collect(),
        secret.bytes().map(|byte| format!("{byte:02x}")).collect(),
    ] {
        assert!(told(&line, &secret).is_some(), "{line}");
    }
    assert_eq!(told("user_id is required", &secret), None);
}

/// Logins of this test's own, with passwords that are nowhere else.
struct Logins {
    database: TestDb,
    names: Vec<String>,
}

impl Logins {
    fn make(stack: &mut Stack, vhost: &TestVhost, passwords: &mut Vec<String>) -> Logins {
        let database = TestDb::new(&test_var("INVENTORY_DB_NAME"));
        let mut logins = Logins { database, names: Vec::new() };
        for service in ["INVENTORY", "BILLING", "GATEWAY"] {
            let name = format!("{}_{}", vhost.name, service.to_lowercase());
            let password = format!("{MARK}-{name}");
            if service != "GATEWAY" {
                let group = format!("{}_service", service.to_lowercase());
                let make =
                    format!("create role {name} login password '{password}' in role {group}");
                logins.database.superuser().batch_execute(&make).unwrap();
                stack.set(&format!("{service}_DB_USER"), &name);
                stack.set(&format!("{service}_DB_PASSWORD"), &password);
            }
            if service != "INVENTORY" {
                let user = json!({ "password": password, "tags": "" });
                management_api("PUT", &format!("users/{name}"), Some(user));
                let rights = json!({ "configure": ".*", "write": ".*", "read": ".*" });
                let path = format!("permissions/{}/{name}", vhost.name);
                management_api("PUT", &path, Some(rights));
                stack.set(&format!("{service}_RABBITMQ_USER"), &name);
                stack.set(&format!("{service}_RABBITMQ_PASSWORD"), &password);
            }
            logins.names.push(name);
            passwords.push(password);
        }
        logins
    }
}

impl Drop for Logins {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = self.database.superuser().batch_execute(&format!("drop role if exists {name}"));
            management_api("DELETE", &format!("users/{name}"), None);
        }
    }
}

/// All that the services answer when asked for everything, headers among it.
fn ask_everything(stack: &Stack, private: &str) -> String {
    let mut heard = String::new();
    let mut urls = Vec::new();
    for service in SERVICES {
        let metrics = &stack.env[&format!("{}_METRICS_LISTEN", service.to_uppercase())];
        let url = stack.service_url(service);
        urls.extend([
            format!("{url}/health/ready"),
            format!("{url}/no"),
            format!("http://{metrics}/"),
        ]);
    }
    urls.extend(
        ["/openapi.json", "/api/movies/1", "/api/movies?limit=x"].map(|path| stack.url(path)),
    );
    for url in urls {
        let mut answer = agent().get(&url).call().unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        heard += &format!("{:?}\n{text}\n", answer.headers());
    }
    for (path, body) in [
        ("/api/movies", json!({ "title": private, "description": private })),
        ("/api/movies", json!({ "title": [private] })),
        ("/api/billing", json!({ "user_id": private, "number_of_items": 1, "total_amount": 1 })),
        ("/api/billing", json!({ "user_id": private, "number_of_items": private })),
        ("/api/billing", json!(private)),
    ] {
        let answer = agent()
            .post(format!("{}?q={private}", stack.url(path)))
            .header("Authorization", format!("Bearer {private}"))
            .header("Cookie", format!("session={private}"))
            .header("Idempotency-Key", private)
            .send(body.to_string());
        heard += &format!("{:?}\n", answer.unwrap().headers());
    }
    heard
}

#[test]
fn no_log_no_answer_and_no_error_holds_a_credential_or_what_a_client_sent() {
    let orders = TestDb::new(&test_var("BILLING_DB_NAME"));
    let vhost = TestVhost::new();
    let private = format!("{MARK}-private");
    let mut secrets = vec![private.clone()];
    let mut right = Stack::new();
    let logins = Logins::make(&mut right, &vhost, &mut secrets);
    right.set("INVENTORY_DB_NAME", &logins.database.name);
    right.set("BILLING_DB_NAME", &orders.name);
    right.set("RABBITMQ_VHOST", &vhost.name);
    right.set("LOG_LEVEL", "trace").set("RUST_BACKTRACE", "full");

    let on_own_address = |stack: &Stack| {
        let mut other = Stack::new();
        for (name, value) in &stack.env {
            if !other.env.contains_key(name) {
                other.set(name, value);
            }
        }
        other
    };
    let mut wrong = on_own_address(&right);
    for name in ["INVENTORY_DB", "BILLING_DB", "BILLING_RABBITMQ", "GATEWAY_RABBITMQ"] {
        let password = format!("{MARK}-wrong-{name}");
        wrong.set(&format!("{name}_PASSWORD"), &password);
        secrets.push(password);
    }
    let mut away = on_own_address(&right);
    for name in ["INVENTORY_DB_PORT", "BILLING_DB_PORT", "RABBITMQ_PORT"] {
        // "Discard", on an address of this test's own: nobody listens there.
        away.set(name, 9);
    }
    for name in ["INVENTORY_DB_HOST", "BILLING_DB_HOST", "RABBITMQ_HOST"] {
        let address = away.address;
        away.set(name, address);
    }

    for (stack, works) in [(&right, true), (&wrong, false), (&away, false)] {
        let running: Vec<Service> = SERVICES.map(|name| stack.start_and_wait(name)).into();
        if works {
            let url = stack.url("/health/ready");
            eventually("the gateway is ready", 30, || {
                agent().get(&url).call().ok().filter(|answer| answer.status() == 200)
            });
        } else {
            for service in &running {
                eventually("it says that something is away", 30, || {
                    ["[ERROR]", "[WARN]"]
                        .iter()
                        .any(|level| service.log().contains(level))
                        .then_some(())
                });
            }
        }
        let heard = ask_everything(stack, &private);
        assert_untold("an answer", &heard, &secrets[1..]);
        if works {
            eventually("the order is booked", 30, || {
                let count = orders.superuser().query_one("select count(*) from orders", &[]);
                (count.unwrap().get::<_, i64>(0) == 1).then_some(())
            });
        }
        let mut list = stack.command("billing");
        let listed = output_of(list.args(["dead-letters", "list"]).stdout(Stdio::piped()));
        assert_eq!(listed.0, works, "{}", listed.1);
        assert_untold("billing dead-letters", &listed.1, &secrets);
        for (name, service) in SERVICES.iter().zip(&running) {
            service.signal("TERM");
            eventually(format!("{name} says that it listens"), 20, || {
                service.log().contains("listening on").then_some(())
            });
            assert_untold(name, &service.log(), &secrets);
        }
    }
}

fn output_of(command: &mut Command) -> (bool, String) {
    let output = command.stderr(Stdio::piped()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn a_refusal_to_start_names_the_variable_and_never_its_value() {
    let secret = format!("{MARK}-malformed");
    for (service, names) in [
        (
            "inventory",
            ["INVENTORY_DB_HOST", "INVENTORY_DB_PORT", "HTTP_MAX_BODY_BYTES", "LOG_LEVEL"],
        ),
        (
            "billing",
            ["BILLING_DB_PORT", "RABBITMQ_HOST", "BILLING_BATCH_SIZE", "BILLING_METRICS_LISTEN"],
        ),
        (
            "gateway",
            ["RABBITMQ_PORT", "GATEWAY_HTTP_MAX_CONNECTIONS", "GATEWAY_HOST", "INVENTORY_HOST"],
        ),
    ] {
        let mut stack = Stack::new();
        for name in names {
            // No character of a host name, so that nobody is asked for it.
            stack.set(name, format!("{secret} /"));
        }
        // A password without the sign before it.
        let directory = std::env::temp_dir().join(format!("matinee-{}", stack.address));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(".env"), format!("NEW_PASSWORD {secret}\n")).unwrap();
        let (started, text) = output_of(stack.command(service).current_dir(&directory));
        fs::remove_dir_all(&directory).unwrap();
        assert!(!started);
        for name in names.iter().chain(&[".env: line 1"]) {
            assert!(text.contains(name), "{name}: {text}");
        }
        assert_untold(service, &text, std::slice::from_ref(&secret));
    }
}

#[test]
fn no_command_line_of_the_provisioning_holds_a_credential() {
    let secrets: Vec<String> = std::env::vars()
        .filter_map(|(name, value)| name.ends_with("_PASSWORD").then_some(value))
        .collect();
    assert!(secrets.len() > 5, "{}", secrets.len());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../provision/migrate.sh");
    let mut seen = String::new();
    // Each run is short, and so are those that it starts.
    eventually("psql and dbmate were seen", 60, || {
        let mut child = Command::new(script)
            .arg("INVENTORY")
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", test_var("POSTGRES_PORT"))
            .env("PGUSER", test_var("POSTGRES_SUPERUSER"))
            .env("PGPASSWORD", test_var("POSTGRES_SUPERUSER_PASSWORD"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let status = loop {
            for line in command_lines() {
                if !seen.contains(&line) {
                    seen += &(line + "\n");
                }
            }
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            std::thread::yield_now();
        };
        assert!(status.success());
        // And the servers, which have been running all the time.
        let all = ["psql", "dbmate", "postgres", "beam"];
        all.iter().all(|name| seen.contains(name)).then_some(())
    });
    assert_untold("a command line", &seen, &secrets);
}

/// Of what we start: PostgreSQL, RabbitMQ, and what the scripts call.
fn command_lines() -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines
        .filter(|line| {
            ["psql", "dbmate", "postgres", "beam", "rabbit", "epmd"]
                .iter()
                .any(|name| line.contains(name))
        })
        .collect()
}
