//! Stock is held for orders over two instances of inventory, while these and PostgreSQL are killed,
//! and by many clients whose lines cross.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::{SetOnDrop, eventually, test_var};
use harness::{agent, send};
use parking_lot::Mutex;
use postgres::Client;
use serde_json::json;
use ureq::Agent;
use uuid::Uuid;

use crate::platform::{Supervisor, wait_until};
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "stock-oversold",
        control: "lock and constraint: stock that is checked by one statement and taken by another",
        expects: ExpectedFinding::Text("are held of 100"),
        short: true,
        run: oversold,
    },
    Case {
        name: "stock-crossed-lines",
        control: "the order of the locks: stock that is locked in the order of the lines",
        expects: ExpectedFinding::Text("deadlocks"),
        short: true,
        run: crossed_lines,
    },
];

/// Orders for one product, and its pieces.
const ORDERS: usize = 1000;
const PIECES: i32 = 100;

const CLIENTS: usize = 40;

/// A product of this name with so many pieces.
pub(crate) fn add_product(admin: &mut Client, sku: &str, on_hand: i32) {
    let add = "with added as (
            insert into products (sku, name, price) values ($1, $1, 1) returning sku
        )
        insert into stock (sku, on_hand) select sku, $2 from added";
    admin.execute(add, &[&sku, &on_hand]).unwrap();
}

/// The internal API of an instance of inventory.
fn internal_api(address: SocketAddr) -> String {
    format!("http://{}:{}", address.ip(), test_var("INVENTORY_INTERNAL_PORT"))
}

/// Asks to hold one piece of each of these until there is an answer that is no 5xx; whether it is held.
fn hold(
    agent: &Agent,
    instances: &[String; 2],
    first: usize,
    skus: &[&str],
) -> Result<bool, String> {
    let order = Uuid::now_v7();
    let lines: Vec<_> = skus.iter().map(|sku| json!({ "sku": sku, "quantity": 1 })).collect();
    let body = json!({ "hold_seconds": 3600, "lines": lines }).to_string();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut instance = first;
    while Instant::now() < deadline {
        let url = format!("{}/internal/reservations/{order}", instances[instance % 2]);
        let headers = [("Content-Type", "application/json")];
        match send(agent, "PUT", &url, &headers, &body).map(|reply| reply.status) {
            Ok(200) => return Ok(true),
            Ok(409) => return Ok(false),
            // A fault: the same order again, at the other instance.
            Ok(500) => return Err("a hold is answered 500".to_owned()),
            Ok(502..=504) | Err(_) => thread::park_timeout(Duration::from_millis(5)),
            Ok(status) => return Err(format!("a hold is answered {status}")),
        }
        instance += 1;
    }
    Err("a hold has no answer for 60 s".to_owned())
}

/// Of 1,000 orders for 100 pieces exactly 100 are held, and the sums are right at every moment.
fn oversold(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new(format!("{CLIENTS} clients, {ORDERS} orders a product"));
    let platform = &*run.platform;
    let mut second_stack = platform.stack.on_another_address();
    second_stack.set("CUSTOMERS_HOST", platform.stack.socket_address("customers").ip());
    let second = Supervisor::start(&second_stack, "inventory");
    second_stack.wait_until_ready("inventory", 60);
    let instances = [&platform.stack, &second_stack]
        .map(|stack| internal_api(stack.socket_address("inventory")));
    let memory = platform.sample_memory();
    if run.control {
        let drop = "alter table stock drop constraint stock_not_oversold";
        platform.connect("INVENTORY_DB_NAME").batch_execute(drop).unwrap();
    }
    let (rounds, kills_database) = (run.short_or_long(5, 40), !run.control);
    for round in 0..rounds {
        let sku = format!("{}-{round}", run.tag);
        add_product(&mut platform.connect("INVENTORY_DB_NAME"), &sku, PIECES);
        let (next, done) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (held, findings) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let (control, random) = (run.control, &mut run.random);
        thread::scope(|scope| {
            let _done = SetOnDrop(&done);
            scope.spawn(|| watch_sums(&sku, &done, &findings));
            let clients: Vec<_> = (0..CLIENTS)
                .map(|_| {
                    scope.spawn(|| {
                        let (agent, mut db) =
                            (agent(), control.then(|| platform.connect("INVENTORY_DB_NAME")));
                        loop {
                            let number = next.fetch_add(1, Ordering::SeqCst);
                            if number >= ORDERS {
                                return;
                            }
                            let result = match &mut db {
                                Some(db) => Ok(hold_unsafely(db, &sku)),
                                None => hold(&agent, &instances, number, &[&sku]),
                            };
                            match result {
                                Ok(true) => drop(held.fetch_add(1, Ordering::SeqCst)),
                                Ok(false) => (),
                                Err(finding) => findings.lock().push(finding),
                            }
                        }
                    })
                })
                .collect();
            // Faults as long as clients ask. The pieces are gone after some 50 ms.
            while kills_database && clients.iter().any(|client| !client.is_finished()) {
                for instance in [platform.service("inventory"), &second] {
                    thread::park_timeout(Duration::from_millis(random.u64(0..20)));
                    instance.kill();
                    outcome.faults += 1;
                }
                if random.bool() {
                    platform.servers("kill", &["postgres"]);
                    platform.servers("start", &[]);
                    outcome.faults += 1;
                }
            }
            for client in clients {
                client.join().unwrap();
            }
        });
        let held = held.into_inner();
        let mut admin = platform.connect("INVENTORY_DB_NAME");
        let count = "select count(*) from reservation_lines join reservations using (order_id)
            where sku = $1 and state = 'held'";
        let found: i64 = admin.query_one(count, &[&sku]).unwrap().get(0);
        outcome.acknowledged += held;
        outcome.found += found as usize;
        if !control {
            outcome.lost += held.saturating_sub(found as usize);
        }
        if held != PIECES as usize {
            outcome.findings.push(format!("{held} are held of {PIECES}"));
        }
        outcome.findings.extend(findings.into_inner().into_iter().take(3));
    }
    outcome.peak_memory = memory.peak();
    let mut admin = platform.connect("INVENTORY_DB_NAME");
    admin
        .batch_execute(
            "truncate reservation_lines, reservations, stock_adjustments, stock, products",
        )
        .unwrap();
    if run.control {
        let add = "alter table stock add constraint stock_not_oversold
            check (reserved between 0 and on_hand)";
        admin.batch_execute(add).unwrap();
    }
    outcome
}

/// Looks all the time whether what is reserved is what the reservations need.
fn watch_sums(sku: &str, done: &AtomicBool, findings: &Mutex<Vec<String>>) {
    let wrong =
        "select format('%s of %s are reserved, reservations need %s', reserved, on_hand, needed)
        from stock, lateral (
            select coalesce(sum(quantity), 0) as needed
            from reservation_lines join reservations using (order_id)
            where reservation_lines.sku = stock.sku and state in ('held', 'confirmed')
        ) as lines
        where stock.sku = $1 and (reserved <> needed or reserved > on_hand)";
    let connect = || {
        postgres::Config::new()
            .host(&test_var("INVENTORY_DB_HOST"))
            .port(test_var("INVENTORY_DB_PORT").parse().unwrap())
            .dbname(&test_var("INVENTORY_DB_NAME"))
            .user(&test_var("POSTGRES_SUPERUSER"))
            .password(test_var("POSTGRES_SUPERUSER_PASSWORD"))
            .connect(postgres::NoTls)
            .ok()
    };
    let mut db = None;
    while !done.load(Ordering::SeqCst) {
        if db.is_none() {
            db = connect();
        }
        let rows = db.as_mut().map(|db: &mut Client| db.query(wrong, &[&sku]));
        match rows {
            Some(Ok(rows)) => {
                let texts = rows.iter().map(|row| row.get::<_, String>(0));
                findings.lock().extend(texts.take(1));
            }
            // PostgreSQL was killed.
            _ => db = None,
        }
        thread::park_timeout(Duration::from_millis(2));
    }
}

/// Without a lock and without a condition, as others have done it.
fn hold_unsafely(db: &mut Client, sku: &str) -> bool {
    let available = "select on_hand - reserved from stock where sku = $1";
    if db.query_one(available, &[&sku]).unwrap().get::<_, i32>(0) < 1 {
        return false;
    }
    db.execute("update stock set reserved = reserved + 1 where sku = $1", &[&sku]).unwrap();
    true
}

/// Orders for A and B beside orders for B and A: no transaction is ended by a deadlock.
fn crossed_lines(run: &mut Run<'_>) -> Outcome {
    const CONNECTIONS: usize = 64;
    let mut outcome = Outcome::new(format!("{CONNECTIONS} clients"));
    let platform = &*run.platform;
    let mut admin = platform.connect("INVENTORY_DB_NAME");
    let skus = ["a", "b"].map(|name| format!("{}-{name}", run.tag));
    for sku in &skus {
        add_product(&mut admin, sku, 1_000_000_000);
    }
    let deadlocks = |admin: &mut Client| -> i64 {
        let count = "select deadlocks from pg_stat_database where datname = current_database()";
        admin.query_one(count, &[]).unwrap().get(0)
    };
    let before = deadlocks(&mut admin);
    let address = platform.stack.socket_address("inventory");
    let instances = [internal_api(address), internal_api(address)];
    let (done, held) = (AtomicBool::new(false), AtomicUsize::new(0));
    let findings = Mutex::new(Vec::new());
    let time = Duration::from_secs(run.short_or_long(5, 60));
    thread::scope(|scope| {
        let _done = SetOnDrop(&done);
        for client in 0..CONNECTIONS {
            let crossed = [[&*skus[0], &*skus[1]], [&*skus[1], &*skus[0]]][client % 2];
            let (done, held, findings) = (&done, &held, &findings);
            let instances = &instances;
            let control = run.control;
            scope.spawn(move || {
                let (agent, mut db) =
                    (agent(), control.then(|| platform.connect("INVENTORY_DB_NAME")));
                while !done.load(Ordering::SeqCst) {
                    let result = match &mut db {
                        Some(db) => lock_in_the_order_of(db, crossed),
                        None => hold(&agent, instances, 0, &crossed),
                    };
                    match result {
                        Ok(_) => drop(held.fetch_add(1, Ordering::SeqCst)),
                        Err(finding) => findings.lock().push(finding),
                    }
                }
            });
        }
        wait_until(Instant::now() + time);
    });
    // The statistics are sent when a session is idle.
    let found = match run.control {
        true => eventually("the deadlocks are counted", 20, || {
            Some(deadlocks(&mut admin) - before).filter(|count| *count > 0)
        }),
        false => deadlocks(&mut admin) - before,
    };
    if found > 0 {
        outcome.findings.push(format!("{found} deadlocks"));
    }
    outcome.findings.extend(findings.into_inner().into_iter().take(3));
    outcome.acknowledged = held.into_inner();
    let count = "select count(*) from reservations where state = 'held'";
    outcome.found = admin.query_one(count, &[]).unwrap().get::<_, i64>(0) as usize;
    if !run.control {
        outcome.lost = outcome.acknowledged.saturating_sub(outcome.found);
    }
    admin
        .batch_execute(
            "truncate reservation_lines, reservations, stock_adjustments, stock, products",
        )
        .unwrap();
    outcome
}

/// Takes one piece of each in this order, in one transaction.
fn lock_in_the_order_of(db: &mut Client, skus: [&str; 2]) -> Result<bool, String> {
    let mut transaction = db.transaction().map_err(|err| err.to_string())?;
    for sku in skus {
        let take = "update stock set reserved = reserved + 1 where sku = $1";
        transaction.execute(take, &[&sku]).map_err(|err| err.to_string())?;
    }
    transaction.commit().map(|()| true).map_err(|err| err.to_string())
}
