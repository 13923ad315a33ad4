//! Everything is killed, in turn, under a steady load; on servers of the test's own.

use std::collections::{HashMap, HashSet};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::eventually;
use postgres::{Client, NoTls};
use serde_json::{Value, json};

use crate::harness::{Service, Stack, agent, post};

/// How soon all must be well again once a killed part is back.
const RECOVERY_SECONDS: u64 = 10;

/// A private PostgreSQL and RabbitMQ that may be killed.
struct Servers {
    folder: PathBuf,
    stack: Stack,
}

impl Servers {
    fn start(mut stack: Stack) -> Servers {
        let ports = free_ports(5);
        for name in ["POSTGRES_PORT", "INVENTORY_DB_PORT", "BILLING_DB_PORT"] {
            stack.set(name, ports[0]);
        }
        let names = ["PORT", "MANAGEMENT_PORT", "DIST_PORT", "EPMD_PORT"];
        for (name, port) in names.iter().zip(&ports[1..]) {
            stack.set(&format!("RABBITMQ_{name}"), port);
        }
        let folder = std::env::temp_dir().join(format!("matinee-faults-{}", process::id()));
        let servers = Servers { folder, stack };
        servers.run("start", &[]);
        servers
    }

    fn run(&self, command: &str, arguments: &[&str]) {
        let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../provision/servers"))
            .arg(command)
            .arg(&self.folder)
            .args(arguments)
            .envs(&self.stack.env)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "provision/servers {command}: {said}");
    }

    fn connect(&self, database: &str) -> Client {
        postgres::Config::new()
            .host("127.0.0.1")
            .port(self.stack.env["POSTGRES_PORT"].parse().unwrap())
            .user(&chassis::testing::var("POSTGRES_SUPERUSER"))
            .password(chassis::testing::var("POSTGRES_SUPERUSER_PASSWORD"))
            .dbname(&chassis::testing::var(database))
            .connect(NoTls)
            .unwrap()
    }

    /// How often each value of a text column is there.
    fn count(&self, database: &str, query: &str) -> HashMap<String, usize> {
        let mut found = HashMap::new();
        for row in self.connect(database).query(query, &[]).unwrap() {
            *found.entry(row.get(0)).or_default() += 1;
        }
        found
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.run("remove", &[]);
    }
}

/// Ports outside the range from which the kernel takes those of clients.
fn free_ports(count: usize) -> Vec<u16> {
    let first = 12_000 + (process::id() % 9_000) as u16;
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (first..32_000).filter(free).take(count).collect()
}

/// Starts a service anew whenever it ends, as PM2 does.
struct Supervisor {
    service: Arc<Mutex<Service>>,
    ending: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Supervisor {
    fn start(stack: &Stack, name: &'static str) -> Supervisor {
        let service = Arc::new(Mutex::new(stack.start_and_wait(name)));
        let ending = Arc::new(AtomicBool::new(false));
        let (watched, stack, end) = (Arc::clone(&service), stack.clone(), Arc::clone(&ending));
        let thread = thread::spawn(move || {
            while !end.load(Ordering::SeqCst) {
                let mut service = watched.lock().unwrap();
                if service.child.try_wait().unwrap().is_some() {
                    *service = stack.start(name);
                }
                drop(service);
                thread::park_timeout(Duration::from_millis(20));
            }
        });
        Supervisor { service, ending, thread: Some(thread) }
    }

    fn kill(&self) {
        self.service.lock().unwrap().signal("KILL");
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// What each posted thing was told: the tables are held against it at the end.
#[derive(Default)]
struct Ledger {
    confirmed: HashSet<String>,
    /// Refused, or without an answer: may be there once, or not.
    open: HashSet<String>,
    faults: Vec<String>,
}

impl Ledger {
    /// Posts things one after the other until `ending`.
    fn keep(
        url: &str,
        name: &str,
        success: u16,
        body: impl Fn(&str) -> Value,
        ledger: &Mutex<Ledger>,
        ending: &AtomicBool,
    ) {
        let agent = agent();
        for number in 0.. {
            if ending.load(Ordering::SeqCst) {
                return;
            }
            let thing = format!("{name}-{number}");
            let answer = post(&agent, url, &body(&thing).to_string());
            let mut ledger = ledger.lock().unwrap();
            match answer {
                Ok((status, _)) if status == success => {
                    ledger.confirmed.insert(thing);
                    continue;
                }
                Ok((503 | 504, told)) if told["detail"].is_string() => (),
                Ok((status, told)) => ledger.faults.push(format!("{status}: {told}")),
                // The gateway itself was killed.
                Err(_) => (),
            }
            ledger.open.insert(thing);
            drop(ledger);
            thread::park_timeout(Duration::from_millis(10));
        }
    }

    fn check(&self, what: &str, found: &HashMap<String, usize>) {
        assert_eq!(self.faults, [""; 0], "{what}: answers that were no 503 or 504 with a problem");
        for thing in &self.confirmed {
            assert_eq!(found.get(thing), Some(&1), "{what}: confirmed {thing}");
        }
        for (thing, times) in found {
            let known = self.confirmed.contains(thing) || self.open.contains(thing);
            assert!(known && *times == 1, "{what}: {thing} is there {times} times");
        }
    }
}

#[test]
fn whatever_is_killed_under_load_what_was_confirmed_is_there_once_and_all_recovers() {
    let servers = Servers::start(Stack::new());
    let services = ["inventory", "billing", "gateway"]
        .map(|name| (name, Supervisor::start(&servers.stack, name)));
    servers.stack.wait_until_ready();

    let ending = AtomicBool::new(false);
    let (orders, movies) = (Mutex::new(Ledger::default()), Mutex::new(Ledger::default()));
    let (billing_url, movies_url) =
        (servers.stack.url("/api/billing"), servers.stack.url("/api/movies"));
    thread::scope(|scope| {
        for client in 0..4 {
            let (ending, orders, movies) = (&ending, &orders, &movies);
            let (billing_url, movies_url) = (&billing_url, &movies_url);
            scope.spawn(move || {
                let order = |user: &str| {
                    json!({ "user_id": user, "number_of_items": 1, "total_amount": "1.25" })
                };
                Ledger::keep(billing_url, &format!("order-{client}"), 200, order, orders, ending);
            });
            scope.spawn(move || {
                let movie = |title: &str| json!({ "title": title });
                Ledger::keep(movies_url, &format!("movie-{client}"), 201, movie, movies, ending);
            });
        }
        // Whatever happens in here, the clients must end.
        let end = End(&ending);
        let both_work = |after: &str| {
            let before = [&orders, &movies].map(|ledger| ledger.lock().unwrap().confirmed.len());
            eventually(format!("all works again after {after}"), RECOVERY_SECONDS, || {
                let now = [&orders, &movies].map(|ledger| ledger.lock().unwrap().confirmed.len());
                (now[0] > before[0] + 5 && now[1] > before[1] + 5).then_some(())
            });
        };
        both_work("the start");
        for _ in 0..2 {
            for (name, service) in &services {
                service.kill();
                both_work(name);
            }
            for server in ["postgres", "rabbitmq"] {
                servers.run("kill", &[server]);
                thread::park_timeout(Duration::from_millis(500));
                servers.run("start", &[]);
                both_work(server);
            }
        }
        drop(end);
    });

    let (orders, movies) = (orders.into_inner().unwrap(), movies.into_inner().unwrap());
    movies.check("movies", &servers.count("INVENTORY_DB_NAME", "select title from movies"));
    let booked = || servers.count("BILLING_DB_NAME", "select user_id from orders");
    let begun = Instant::now();
    eventually("every confirmed order is booked", 30, || {
        let booked = booked();
        orders.confirmed.iter().all(|order| booked.contains_key(order)).then_some(())
    });
    // A double would come with the last redeliveries.
    eventually("the queue is drained", 30, || {
        (begun.elapsed() > Duration::from_secs(2)).then_some(())
    });
    orders.check("orders", &booked());
    eprintln!(
        "confirmed {} orders and {} movies; open {} and {}",
        orders.confirmed.len(),
        movies.confirmed.len(),
        orders.open.len(),
        movies.open.len()
    );
}

struct End<'e>(&'e AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
