//! Customers register, log in, refresh and log out while customers and its database are killed, and
//! while other services hear nothing of ended sessions.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use chassis::Stop;
use chassis::auth::{self, Authenticator, HttpSource};
use chassis::testing::{SetOnDrop, eventually, test_var};
use harness::proxy::{Direction, Mode, TcpProxy};
use harness::{Reply, agent, send};
use parking_lot::Mutex;
use rouille::Request;
use serde_json::{Value, json};
use ureq::Agent;

use crate::platform::Platform;
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "accounts-killed",
        control: "the commit on the disk: a database that acknowledges before (synchronous_commit)",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: accounts_killed,
    },
    Case {
        name: "ended-sessions-cut-off",
        control: "the limit on the age of what is known: AUTH_MAX_STALE_MS",
        expects: ExpectedFinding::Text("was let in"),
        short: true,
        run: ended_sessions_cut_off,
    },
];

const CLIENTS: usize = 8;

const PASSWORD: &str = "a password of the campaign";

/// The answers that clients got.
#[derive(Default)]
struct Ledger {
    /// The e-mail addresses of accounts that were acknowledged.
    registered: Vec<String>,
    /// How many registrations were sent.
    sent: usize,
    /// Refresh tokens of sessions that are logged in.
    open: Vec<String>,
    /// Access and refresh tokens of sessions whose logout was acknowledged.
    ended: Vec<(String, String)>,
    /// Answers that no fault explains.
    unexpected: Vec<String>,
}

/// A client of the gateway.
struct Client<'p> {
    agent: Agent,
    platform: &'p Platform,
}

impl Client<'_> {
    fn new(platform: &Platform) -> Client<'_> {
        Client { agent: agent(), platform }
    }

    /// `None` without a complete answer.
    fn ask(&self, method: &str, path: &str, token: Option<&str>, body: &Value) -> Option<Reply> {
        let bearer = token.map(|token| format!("Bearer {token}"));
        let mut headers = vec![("Content-Type", "application/json")];
        headers.extend(bearer.iter().map(|bearer| ("Authorization", bearer.as_str())));
        let body = if body.is_null() { String::new() } else { body.to_string() };
        send(&self.agent, method, &self.platform.stack.url(path), &headers, &body).ok()
    }

    /// The same, again until it is answered and not by 5xx.
    fn ask_until_answered(
        &self,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: &Value,
    ) -> Reply {
        eventually(format!("{method} {path} is answered"), 60, || {
            self.ask(method, path, token, body).filter(|reply| reply.status < 500)
        })
    }

    fn login(&self, email: &str) -> Option<Reply> {
        let body = json!({ "email": email, "password": PASSWORD });
        self.ask("POST", "/api/v1/auth/login", None, &body)
    }

    fn refresh(&self, token: &str) -> Reply {
        let body = json!({ "refresh_token": token });
        self.ask_until_answered("POST", "/api/v1/auth/refresh", None, &body)
    }
}

fn token(reply: &Reply, name: &str) -> String {
    reply.json()[name].as_str().unwrap_or_default().to_owned()
}

/// Registers, logs in, and logs out every second session, until `stopping`.
fn run_client(platform: &Platform, tag: &str, stopping: &AtomicBool, ledger: &Mutex<Ledger>) {
    let client = Client::new(platform);
    let mut number = 0;
    while !stopping.load(Ordering::SeqCst) {
        number += 1;
        let email = format!("{tag}-{number}@example.org").to_lowercase();
        ledger.lock().sent += 1;
        let body = json!({ "email": email, "password": PASSWORD });
        let registered = client.ask("POST", "/api/v1/users", None, &body);
        match registered.as_ref().map(|reply| reply.status) {
            Some(201) => ledger.lock().registered.push(email.clone()),
            // Faults: no answer, or one that says that it may be tried again.
            None | Some(502..=504) => continue,
            Some(status) => {
                ledger.lock().unexpected.push(format!("a registration was answered {status}"));
                continue;
            }
        }
        let Some(login) = client.login(&email) else { continue };
        match login.status {
            200 => (),
            502..=504 => continue,
            status => {
                ledger.lock().unexpected.push(format!("a login was answered {status}"));
                continue;
            }
        }
        let (access, refresh) = (token(&login, "access_token"), token(&login, "refresh_token"));
        if number % 2 == 0 {
            ledger.lock().open.push(refresh);
            continue;
        }
        let logout = client.ask("POST", "/api/v1/auth/logout", Some(&access), &Value::Null);
        if logout.is_some_and(|reply| reply.status == 204) {
            ledger.lock().ended.push((access, refresh));
        }
    }
}

/// No account and no session that was acknowledged is lost, and no session that was ended lives.
fn accounts_killed(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new(format!("{CLIENTS} clients"));
    let platform = &*run.platform;
    if run.control {
        set_synchronous_commit(platform, "off");
    }
    let (stopping, ledger) = (AtomicBool::new(false), Mutex::new(Ledger::default()));
    let (rounds, control, tag) = (run.short_or_long(3, 25), run.control, run.tag.clone());
    let random = &mut run.random;
    let memory = platform.sample_memory();
    thread::scope(|scope| {
        let _stop = SetOnDrop(&stopping);
        for client in 0..CLIENTS {
            let tag = format!("{tag}-{client}");
            let (stopping, ledger) = (&stopping, &ledger);
            scope.spawn(move || run_client(platform, &tag, stopping, ledger));
        }
        let wait_for_progress = |after: &str| {
            let before = ledger.lock().registered.len();
            eventually(format!("accounts are registered after {after}"), 60, || {
                (ledger.lock().registered.len() > before + CLIENTS).then_some(())
            });
        };
        wait_for_progress("the start");
        for _ in 0..rounds {
            if !control {
                for _ in 0..2 {
                    thread::park_timeout(Duration::from_millis(random.u64(50..700)));
                    platform.service("customers").kill();
                    outcome.faults += 1;
                    wait_for_progress("the kill of customers");
                }
            }
            platform.servers("kill", &["postgres"]);
            platform.servers("start", &[]);
            outcome.faults += 1;
            wait_for_progress("the kill of PostgreSQL");
        }
    });
    if control {
        set_synchronous_commit(platform, "on");
    }
    platform.wait_until_ready();
    reconcile(platform, ledger.into_inner(), &mut outcome, &tag);
    outcome.peak_memory = memory.peak();
    outcome
}

/// For the service's role: whether a commit waits for the disk.
fn set_synchronous_commit(platform: &Platform, value: &str) {
    let role = test_var("CUSTOMERS_DB_USER");
    let mut admin = platform.connect("CUSTOMERS_DB_NAME");
    admin.batch_execute(&format!("alter role {role} set synchronous_commit = {value}")).unwrap();
    // It holds for new sessions.
    let end = "select pg_terminate_backend(pid) from pg_stat_activity where usename = $1";
    admin.execute(end, &[&role]).unwrap();
}

fn reconcile(platform: &Platform, ledger: Ledger, outcome: &mut Outcome, tag: &str) {
    let mut admin = platform.connect("CUSTOMERS_DB_NAME");
    let query = "select email from users where starts_with(email, lower($1))";
    let rows = admin.query(query, &[&format!("{tag}-")]).unwrap();
    let found: std::collections::HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
    outcome.acknowledged += ledger.registered.len();
    outcome.found += rows.len();
    outcome.lost += ledger.registered.iter().filter(|email| !found.contains(*email)).count();
    outcome.duplicated += rows.len() - found.len();
    if rows.len() > ledger.sent {
        outcome.findings.push(format!("{} accounts of {} sent", rows.len(), ledger.sent));
    }
    let client = Client::new(platform);
    let step = (ledger.open.len() / 50).max(1);
    for refresh in ledger.open.iter().step_by(step) {
        let status = client.refresh(refresh).status;
        if status != 200 {
            outcome.findings.push(format!("a session that was acknowledged is answered {status}"));
            outcome.lost += 1;
        }
    }
    for (access, refresh) in &ledger.ended {
        let me = client.ask_until_answered("GET", "/api/v1/users/me", Some(access), &Value::Null);
        let again = client.refresh(refresh).status;
        if (me.status, again) != (401, 401) {
            let statuses = format!("{} and {again}", me.status);
            outcome.findings.push(format!("an ended session was let in: {statuses}"));
        }
    }
    outcome.answered += ledger.open.len() + ledger.ended.len();
    outcome.findings.extend(ledger.unexpected.into_iter().take(3));
    // The accounts of the campaign would make later cases slow.
    admin.batch_execute("truncate users, sessions, refresh_tokens, revocations").unwrap();
}

/// Another service verifies tokens by itself, and the network between it and customers is cut.
fn ended_sessions_cut_off(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new("1 client, 1 other service");
    let platform = &*run.platform;
    let host = platform.stack.socket_address("customers").ip();
    let port: u16 = test_var("CUSTOMERS_INTERNAL_PORT").parse().unwrap();
    let proxy = TcpProxy::start(SocketAddr::new(host, port));
    let max_stale = Duration::from_secs(2);
    let config = auth::Config {
        issuer: test_var("AUTH_ISSUER"),
        audience: test_var("AUTH_AUDIENCE"),
        max_stale: if run.control { Duration::from_secs(3600) } else { max_stale },
        poll_interval: Duration::from_millis(100),
    };
    let stop = Stop::default();
    let other = Authenticator::new(config, HttpSource::new(proxy.address), &stop).unwrap();
    let status = |access: &str| {
        let header = ("Authorization".to_owned(), format!("Bearer {access}"));
        let request = Request::fake_http("GET", "/", vec![header], vec![]);
        other.principal(&request).map_or_else(|problem| problem.status(), |_| 200)
    };
    let client = Client::new(platform);
    let answered = AtomicUsize::new(0);
    let lets_in = |access: &str| {
        answered.fetch_add(1, Ordering::Relaxed);
        status(access) == 200
    };
    let modes =
        [Mode::Refuse, Mode::Blackhole(Direction::Responses), Mode::Truncate(20), Mode::Reset];
    for (number, mode) in modes.iter().cycle().take(run.short_or_long(4, 12)).enumerate() {
        let email = format!("{}-{number}@example.org", run.tag).to_lowercase();
        let body = json!({ "email": email, "password": PASSWORD });
        client.ask_until_answered("POST", "/api/v1/users", None, &body);
        let login = client.login(&email).unwrap();
        let access = token(&login, "access_token");
        eventually("the token is accepted", 30, || lets_in(&access).then_some(()));
        proxy.set(*mode);
        let logout =
            client.ask_until_answered("POST", "/api/v1/auth/logout", Some(&access), &Value::Null);
        assert_eq!(logout.status, 204);
        outcome.acknowledged += 1;
        let deadline = Instant::now() + max_stale + Duration::from_millis(500);
        // It may not know yet; later it must know that it does not know.
        while lets_in(&access) && Instant::now() < deadline {
            thread::park_timeout(Duration::from_millis(20));
        }
        if lets_in(&access) {
            outcome.findings.push("a session that had ended was let in".to_owned());
        } else {
            outcome.found += 1;
        }
        proxy.set(Mode::Pass);
        outcome.faults += 1;
        if !run.control {
            eventually("the end is known", 30, || (status(&access) == 401).then_some(()));
        }
    }
    stop.request();
    outcome.answered = answered.into_inner();
    outcome
}
