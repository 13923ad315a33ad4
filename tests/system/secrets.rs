//! No credential leaves a service: not by a log of any level, a response, or a command line.
//! Bodies and headers of requests are not logged either.

use std::fs;
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use chassis::testing::{TestDb, TestVhost, eventually, management_api, test_var};
use serde_json::json;

use harness::bodies::{movie, order};
use harness::services::services;
use harness::{Service, Stack, agent, get, send};

/// How every secret of these tests begins.
const MARK: &str = "Zq8Xk4Vw7";

/// In which form a text holds a secret, of all in which a program might show it.
fn form_of(text: &str, secret: &str) -> Option<&'static str> {
    let decimal = secret.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
    let hex = |case: fn(u8) -> String| secret.bytes().map(case).collect::<String>();
    // The base64 form of a word depends on how many bytes precede it, modulo 3. Its first and
    // last letters also depend on the neighbouring bytes, so these are left out.
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
fn assert_without(secrets: &[String], source: &str, text: &str) {
    for secret in secrets {
        if let Some(form) = form_of(text, secret) {
            panic!("{source} holds {secret} {form}:\n{text}");
        }
    }
}

#[test]
fn the_search_finds_a_secret_in_every_form() {
    let secret = format!("{MARK}-found");
    for before in ["", "a", "ab", "abc:", "user:"] {
        let encoded = BASE64_STANDARD_NO_PAD.encode(format!("{before}{secret}\0z"));
        assert!(form_of(&format!("Basic {encoded}"), &secret).is_some(), "{encoded}");
    }
    for line in [
        format!("postgres://user:{secret}@host"),
        format!("{:?}", secret.as_bytes()),
        secret.bytes().map(|byte| format!("%{byte:02X}")).collect(),
        secret.bytes().map(|byte| format!("{byte:02x}")).collect(),
    ] {
        assert!(form_of(&line, &secret).is_some(), "{line}");
    }
    assert_eq!(form_of("user_id is required", &secret), None);
}

/// Logins of this test's own, with passwords that no other program knows.
struct Logins {
    database: TestDb,
    names: Vec<String>,
}

impl Logins {
    fn create(stack: &mut Stack, vhost: &TestVhost, passwords: &mut Vec<String>) -> Logins {
        let database = TestDb::new(&test_var("INVENTORY_DB_NAME"));
        let mut logins = Logins { database, names: Vec::new() };
        for row in services() {
            let (name, prefix) = (format!("{}_{}", vhost.name, row.name), row.prefix());
            let password = format!("{MARK}-{name}");
            if row.database.is_some() {
                let group = format!("{}_service", row.name);
                let create =
                    format!("create role {name} login password '{password}' in role {group}");
                logins.database.superuser().batch_execute(&create).unwrap();
                stack.set(&format!("{prefix}_DB_USER"), &name);
                stack.set(&format!("{prefix}_DB_PASSWORD"), &password);
            }
            if row.broker.is_some() {
                let user = json!({ "password": password, "tags": "" });
                management_api("PUT", &format!("users/{name}"), Some(user));
                let permissions = json!({ "configure": ".*", "write": ".*", "read": ".*" });
                let path = format!("permissions/{}/{name}", vhost.name);
                management_api("PUT", &path, Some(permissions));
                stack.set(&format!("{prefix}_RABBITMQ_USER"), &name);
                stack.set(&format!("{prefix}_RABBITMQ_PASSWORD"), &password);
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

/// All responses of the services, headers included, to requests of every kind; those with a
/// body send `private` in every part.
fn responses(stack: &Stack, private: &str) -> String {
    let mut received = String::new();
    let mut urls = Vec::new();
    for row in services() {
        let url = stack.service_url(&row.name);
        let metrics = stack.metrics_address(&row.name);
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
        let reply = get(&url).unwrap();
        received += &format!("{:?}\n{}\n", reply.headers, reply.body);
    }
    let authorization = format!("Bearer {private}");
    let cookie = format!("session={private}");
    let headers = [
        ("Content-Type", "application/json"),
        ("Authorization", authorization.as_str()),
        ("Cookie", cookie.as_str()),
        ("Idempotency-Key", private),
    ];
    for (path, body) in [
        ("/api/movies", movie(private, private)),
        ("/api/movies", json!({ "title": [private] }).to_string()),
        ("/api/billing", order(private)),
        ("/api/billing", json!({ "user_id": private, "number_of_items": private }).to_string()),
        ("/api/billing", json!(private).to_string()),
    ] {
        let url = format!("{}?q={private}", stack.url(path));
        let reply = send(&agent(), "POST", &url, &headers, &body).unwrap();
        received += &format!("{:?}\n", reply.headers);
    }
    received
}

#[test]
fn no_log_response_or_error_holds_a_credential_or_the_content_of_a_request() {
    let orders = TestDb::new(&test_var("BILLING_DB_NAME"));
    let vhost = TestVhost::new();
    let private = format!("{MARK}-private");
    let mut secrets = vec![private.clone()];
    let mut right = Stack::new();
    let logins = Logins::create(&mut right, &vhost, &mut secrets);
    right.set("INVENTORY_DB_NAME", &logins.database.name);
    right.set("BILLING_DB_NAME", &orders.name);
    right.set("RABBITMQ_VHOST", &vhost.name);
    right.set("LOG_LEVEL", "trace").set("RUST_BACKTRACE", "full");

    let mut wrong = right.on_another_address();
    let (mut logins_of, mut servers) = (Vec::new(), vec!["RABBITMQ".to_owned()]);
    for row in services() {
        let database = row.database.as_ref().map(|_| format!("{}_DB", row.prefix()));
        servers.extend(database.clone());
        logins_of.extend(database);
        logins_of.extend(row.broker.as_ref().map(|_| format!("{}_RABBITMQ", row.prefix())));
    }
    for login in logins_of {
        let password = format!("{MARK}-wrong-{login}");
        wrong.set(&format!("{login}_PASSWORD"), &password);
        secrets.push(password);
    }
    let mut unreachable = right.on_another_address();
    for server in servers {
        // The port "discard", on an address of this test's own: no process listens there.
        unreachable.set(&format!("{server}_HOST"), unreachable.address);
        unreachable.set(&format!("{server}_PORT"), 9);
    }

    for (stack, works) in [(&right, true), (&wrong, false), (&unreachable, false)] {
        let running: Vec<Service> =
            services().iter().map(|row| stack.start_and_wait(&row.name)).collect();
        if works {
            stack.wait_until_ready("gateway", 30);
        } else {
            for service in &running {
                eventually("it logs that a server is not available", 30, || {
                    ["[ERROR]", "[WARN]"]
                        .iter()
                        .any(|level| service.log().contains(level))
                        .then_some(())
                });
            }
        }
        assert_without(&secrets[1..], "a response", &responses(stack, &private));
        if works {
            eventually("the order is booked", 30, || {
                let count = orders.superuser().query_one("select count(*) from orders", &[]);
                (count.unwrap().get::<_, i64>(0) == 1).then_some(())
            });
        }
        let mut list = stack.command("billing");
        let listed = output_of(list.args(["dead-letters", "list"]).stdout(Stdio::piped()));
        assert_eq!(listed.0, works, "{}", listed.1);
        assert_without(&secrets, "billing dead-letters", &listed.1);
        for (row, mut service) in services().iter().zip(running) {
            service.terminate();
            assert!(service.log().contains("listening on"), "{}", service.log());
            assert_without(&secrets, &row.name, &service.log());
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
            // With characters that no host name has, so that no name server is asked for it.
            stack.set(name, format!("{secret} /"));
        }
        // A line with a password and without "=".
        let directory = std::env::temp_dir().join(format!("matinee-secrets-{}", stack.address));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(".env"), format!("NEW_PASSWORD {secret}\n")).unwrap();
        let (started, text) = output_of(stack.command(service).current_dir(&directory));
        fs::remove_dir_all(&directory).unwrap();
        assert!(!started);
        for name in names.iter().chain(&[".env: line 1"]) {
            assert!(text.contains(name), "{name}: {text}");
        }
        assert_without(std::slice::from_ref(&secret), service, &text);
    }
}

#[test]
fn no_command_line_of_the_scripts_and_servers_holds_a_credential() {
    let secrets: Vec<String> = std::env::vars()
        .filter_map(|(name, value)| name.ends_with("_PASSWORD").then_some(value))
        .collect();
    assert!(secrets.len() > 5, "{}", secrets.len());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../provision/migrate.sh");
    let mut seen = String::new();
    // The processes are short-lived: the migrations run again until all were seen.
    eventually("psql and dbmate were seen", 60, || {
        let mut child = Command::new(script)
            .arg("inventory")
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
        // The last two are the servers, which run all the time.
        let all = ["psql", "dbmate", "postgres", "beam"];
        all.iter().all(|name| seen.contains(name)).then_some(())
    });
    assert_without(&secrets, "a command line", &seen);
}

/// The command lines of PostgreSQL, of RabbitMQ, and of the programs that the scripts call.
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
