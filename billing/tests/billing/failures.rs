//! What becomes of orders when something breaks.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use chassis::testing::{eventually, management_api};
use postgres::Client;

use crate::harness::{BillingFixture, booked, get, numbered, order};

#[test]
fn killed_ten_times_while_20_000_messages_flow_it_books_exactly_20_000() {
    const COUNT: usize = 20_000;
    let fixture = BillingFixture::new();
    fixture.post(&numbered(COUNT));
    let mut db = fixture.db.superuser();
    for kill in 1..=10 {
        let mut process = fixture.start();
        let goal = kill * COUNT as i64 / 12;
        eventually("some orders", 60, || (booked(&mut db) >= goal).then_some(()));
        process.kill();
    }
    let _process = fixture.start();
    fixture.await_orders(COUNT as i64, 60);
    let users: BTreeSet<String> = fixture.users().into_iter().collect();
    assert_eq!(users.len(), COUNT);
    assert_eq!(fixture.take_dead_letters().len(), 0);
}

#[test]
fn killed_with_messages_without_ids_it_books_none_twice_and_loses_none() {
    const COUNT: usize = 10_000;
    let fixture = BillingFixture::new();
    let messages: Vec<_> = (0..COUNT).map(|number| ("", order(number))).collect();
    fixture.post(&messages);
    let mut db = fixture.db.superuser();
    for kill in 1..=10 {
        let mut process = fixture.start();
        let goal = kill * COUNT as i64 / 14;
        eventually("some orders", 60, || (booked(&mut db) >= goal).then_some(()));
        process.kill();
    }
    let _process = fixture.start();
    eventually("every order booked", 60, || (booked(&mut db) as usize == COUNT).then_some(()));
    eventually("an empty queue", 60, || (fixture.depth("") == 0).then_some(()));
    let users: BTreeSet<String> = fixture.users().into_iter().collect();
    assert_eq!(users.len(), COUNT);
    // Those whose acknowledgement was lost are left for a person to decide.
    for dead in fixture.take_dead_letters() {
        assert!(dead.reason.starts_with("may be booked already"), "{}", dead.reason);
    }
}

#[test]
fn a_message_without_an_id_that_may_be_booked_already_is_a_dead_letter() {
    let fixture = BillingFixture::new();
    fixture.post(&[("", order(1)), ("", order(2)), ("", order(2)), ("id", order(2))]);
    // As after a process that booked two of them and died: the rest is delivered again.
    fixture.deliver_without_acknowledging(4);
    let mut db = fixture.db.superuser();
    db.batch_execute(
        "insert into in_doubt (batch, digest)
         select 1, sha256(convert_to('1 999 ' || user_id, 'UTF8'))
         from unnest(array['1', '2']) as user_id",
    )
    .unwrap();
    let _billing = fixture.consume();
    fixture.await_orders(2, 10);
    assert_eq!(fixture.users(), ["2", "2"]);
    let dead = fixture.await_dead_letters(2, 10);
    for (dead, user) in dead.iter().zip([1, 2]) {
        assert!(dead.reason.starts_with("may be booked already"), "{}", dead.reason);
        assert_eq!(dead.body, order(user).as_bytes());
    }
    eventually("no orders in doubt", 10, || {
        let records: i64 = db.query_one("select count(*) from in_doubt", &[]).unwrap().get(0);
        (records == 0).then_some(())
    });
}

#[test]
fn a_message_that_ends_the_process_is_a_dead_letter_and_the_others_are_booked() {
    let fixture = BillingFixture::new();
    let mut db = fixture.db.superuser();
    // The test kills the process whenever it has this order in hand.
    db.batch_execute(
        "create function dwell() returns trigger language plpgsql as
             'begin if new.user_id = ''10'' then perform pg_sleep(60); end if; return new; end';
         create trigger dwell before insert on orders for each row execute function dwell();",
    )
    .unwrap();
    fixture.post(&numbered(20));
    let sleeping = |db: &mut Client| -> i64 {
        let asked = "select count(*) from pg_stat_activity
                     where datname = current_database() and wait_event = 'PgSleep'";
        db.query_one(asked, &[]).unwrap().get(0)
    };
    let refuse = |kind: &str, most: serde_json::Value| {
        let policy = format!("policies/{}/nothing", fixture.vhost.name);
        let definition = serde_json::json!({ "max-length": most, "overflow": "reject-publish" });
        let pattern = format!("^{}$", fixture.config().dead_letter_queue().replace('.', "[.]"));
        let body =
            serde_json::json!({ "pattern": pattern, "priority": 9, "definition": definition });
        management_api(kind, &policy, Some(body));
    };
    // At first no dead letter can be written.
    refuse("PUT", serde_json::json!(0));
    let mut kills = 0;
    let metrics = format!("http://{}/metrics", fixture.config().http.metrics_listen);
    let given_up = || get(&metrics).1.contains("billing_dead_letters_pending 1");
    let mut process = loop {
        let mut process = fixture.start();
        let killing =
            eventually("the killer in hand, or given up", 30, || match sleeping(&mut db) {
                0 if !given_up() => None,
                sleeping => Some(sleeping > 0),
            });
        if !killing {
            break process;
        }
        process.kill();
        kills += 1;
        fixture.break_database_connections_but(&mut db);
        eventually("its session gone", 30, || (sleeping(&mut db) == 0).then_some(()));
    };
    // What was given up stays so, also when the process dies before anybody else knows.
    process.kill();
    refuse("DELETE", serde_json::Value::Null);
    let _process = fixture.start();
    fixture.await_orders(19, 30);
    let dead = fixture.await_dead_letters(1, 10);
    assert_eq!(dead[0].body, order(10).as_bytes());
    assert_eq!(dead[0].reason, "the process died 3 times with this message in hand");
    // In a batch at first, then three times alone; now and then its batch halves it once more.
    assert!(kills <= 8, "{kills}");
}

#[test]
fn an_order_that_waits_for_the_database_is_never_a_dead_letter_however_often_the_process_dies() {
    let fixture = BillingFixture::new();
    let mut db = fixture.db.superuser();
    fixture.post(&numbered(1));
    fixture.deliver_without_acknowledging(1);

    let mut other = fixture.db.superuser();
    let mut lock = other.transaction().unwrap();
    lock.batch_execute("lock table orders in access exclusive mode").unwrap();
    let waits = "from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock'";
    for death in 0..6 {
        let mut process = fixture.start();
        let mut waiting = |count: i64| {
            let asked = format!("select count(*) {waits}");
            eventually(format!("{count} that wait for the lock"), 30, || {
                (db.query_one(&asked, &[]).unwrap().get::<_, i64>(0) == count).then_some(())
            });
        };
        waiting(1);
        // As an operator ends it, and as the kernel does.
        if death % 2 == 0 {
            process.terminate();
            process.0.wait().unwrap();
        } else {
            process.kill();
        }
        let end = format!("select pg_terminate_backend(pid) {waits}");
        fixture.db.superuser().execute(&end, &[]).unwrap();
        waiting(0);
    }
    lock.commit().unwrap();

    // And when the server says no, as it does when its disk is full.
    db.batch_execute(
        "create sequence refusals;
         create function refuse() returns trigger language plpgsql security definer as
             'begin perform nextval(''refusals''); raise disk_full; end';
         create trigger refuse before insert on orders for each row execute function refuse();",
    )
    .unwrap();
    for death in 0..6 {
        let mut process = fixture.start();
        eventually("a refusal in this life", 30, || {
            let refusals = "select case when is_called then last_value else 0 end from refusals";
            (db.query_one(refusals, &[]).unwrap().get::<_, i64>(0) > death).then_some(())
        });
        process.kill();
    }
    db.batch_execute("drop trigger refuse on orders").unwrap();

    let _process = fixture.start();
    fixture.await_orders(1, 30);
    assert_eq!(fixture.take_dead_letters().len(), 0);
}

#[test]
fn a_locked_table_delays_orders_and_loses_none() {
    let fixture = BillingFixture::new();
    let mut db = fixture.db.superuser();
    let mut other = fixture.db.superuser();
    let mut lock = other.transaction().unwrap();
    lock.batch_execute("lock table orders in exclusive mode").unwrap();
    let _billing = fixture.consume();
    fixture.post(&numbered(1000));
    // Until billing waits for the lock, and has waited for longer than its limit once.
    let waits = "select count(*) from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock'
                     and now() - query_start > interval '1 second'";
    eventually("a wait for the lock", 10, || {
        (db.query_one(waits, &[]).unwrap().get::<_, i64>(0) > 0).then_some(())
    });
    assert_eq!(booked(&mut db), 0);
    lock.commit().unwrap();
    fixture.await_orders(1000, 30);
}

#[test]
fn database_connections_broken_in_mid_drain_lose_nothing_and_book_nothing_twice() {
    let fixture = BillingFixture::new();
    let mut messages = numbered(10_000);
    for (id, _) in messages.iter_mut().step_by(3) {
        id.clear();
    }
    fixture.post(&messages);
    let _billing = fixture.consume();
    let mut db = fixture.db.superuser();
    for part in 1..=4 {
        eventually("some orders", 60, || (booked(&mut db) >= part * 2000).then_some(()));
        fixture.break_database_connections_but(&mut db);
    }
    fixture.await_orders(10_000, 60);
    let expected: Vec<String> = (0..10_000).map(|number| number.to_string()).collect();
    assert_eq!(fixture.users(), expected);
    assert_eq!(fixture.take_dead_letters().len(), 0);
}

#[test]
fn a_database_that_is_away_is_waited_for() {
    let fixture = BillingFixture::new();
    let mut db = fixture.db.superuser();
    // A session cannot forbid connections to its own database.
    let elsewhere = BillingFixture::new();
    let allow = |allowed: bool| {
        let statement = format!("alter database {} allow_connections {allowed}", fixture.db.name);
        elsewhere.db.superuser().batch_execute(&statement).unwrap();
    };
    allow(false);
    let billing = fixture.consume();
    fixture.post(&numbered(100));
    // It has them in hand, and keeps them.
    eventually("the messages taken", 10, || (fixture.depth("") == 0).then_some(()));
    assert_eq!(booked(&mut db), 0);
    // Also while it waits it can be stopped at once.
    let stopping = Instant::now();
    drop(billing);
    assert!(stopping.elapsed() < Duration::from_secs(5), "{:?}", stopping.elapsed());
    let _billing = fixture.consume();
    eventually("the messages taken again", 10, || (fixture.depth("") == 0).then_some(()));
    allow(true);
    fixture.await_orders(100, 30);
}

#[test]
fn broker_connections_broken_in_mid_drain_lose_nothing_and_book_nothing_twice() {
    const COUNT: i64 = 20_000;
    let fixture = BillingFixture::new();
    let _billing = fixture.consume();
    let mut db = fixture.db.superuser();
    // The management API lists a new connection only after seconds.
    for part in 1..=3 {
        let some: Vec<_> =
            numbered(COUNT as usize / 4 * part).split_off(COUNT as usize / 4 * (part - 1));
        fixture.post(&some);
        eventually("a connection to break", 30, || {
            (fixture.break_broker_connections() > 0).then_some(())
        });
    }
    fixture.post(&numbered(COUNT as usize));
    eventually("all orders", 60, || (booked(&mut db) == COUNT).then_some(()));
    fixture.await_orders(COUNT, 60);
    assert_eq!(fixture.take_dead_letters().len(), 0);
}

#[test]
fn a_queue_that_is_deleted_is_declared_again() {
    let fixture = BillingFixture::new();
    let _billing = fixture.consume();
    fixture.post(&[("1", order(1))]);
    fixture.await_orders(1, 10);
    let (vhost, config) = (&fixture.vhost.name, fixture.config());
    for queue in [&config.dead_letter_queue(), &config.queue] {
        management_api("DELETE", &format!("queues/{vhost}/{queue}"), None);
    }
    fixture.post(&[("2", order(2)), ("3", "garbage".to_owned())]);
    fixture.await_orders(2, 10);
    assert_eq!(fixture.await_dead_letters(1, 10)[0].body, b"garbage");
}

#[test]
fn prefetched_messages_are_booked_when_the_queue_is_deleted() {
    const COUNT: usize = 100;
    // Longer than the test: it holds a batch and waits for company.
    let fixture = BillingFixture::new().with("BILLING_BATCH_WAIT_MS", "600000");
    fixture.post(&numbered(COUNT));
    let _billing = fixture.consume();
    let left = fixture.delete_queue_when_all_is_delivered();
    fixture.await_orders(COUNT as i64 - i64::from(left), 30);
}

#[test]
fn prefetched_invalid_messages_are_dead_letters_when_the_queue_is_deleted() {
    // Many times what is on its way at once, and less than a batch.
    const COUNT: usize = 450;
    let fixture = BillingFixture::new().with("BILLING_BATCH_WAIT_MS", "600000");
    fixture.post(&vec![("", "garbage"); COUNT]);
    let _billing = fixture.consume();
    let left = fixture.delete_queue_when_all_is_delivered();
    assert_eq!(left, 0);
    fixture.await_dead_letters(COUNT, 30);
}

#[test]
fn terminated_under_load_it_ends_within_five_seconds_and_nothing_is_lost() {
    const COUNT: usize = 20_000;
    let fixture = BillingFixture::new();
    fixture.post(&numbered(COUNT));
    let mut db = fixture.db.superuser();
    let mut process = fixture.start();
    eventually("some orders", 30, || (booked(&mut db) > 2000).then_some(()));
    process.terminate();
    let stopping = Instant::now();
    let status = eventually("its end", 6, || process.0.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert!(stopping.elapsed() < Duration::from_secs(5), "{:?}", stopping.elapsed());
    // What it had in hand it finished: nothing in the queue is booked already.
    assert_eq!(booked(&mut db) as usize + fixture.depth(""), COUNT);
    let _process = fixture.start();
    fixture.await_orders(COUNT as i64, 60);
}

#[test]
fn readiness_reflects_database_and_broker() {
    let fixture = BillingFixture::new();
    let mut process = fixture.start();
    let ready = |wanted: u16| {
        let url = format!("http://{}/health/ready", fixture.config().http.listen);
        eventually(format!("{wanted} from {url}"), 10, || {
            let (status, text) = get(&url);
            (status == wanted).then_some(text)
        })
    };
    let body = ready(200);
    assert!(body.contains("postgresql") && body.contains("rabbitmq"), "{body}");
    fixture.db.superuser().batch_execute("alter table orders rename to gone").unwrap();
    assert!(ready(503).contains("the database is not migrated"));
    fixture.db.superuser().batch_execute("alter table gone rename to orders").unwrap();
    ready(200);
    process.kill();
}

#[test]
fn a_restart_of_the_database_that_is_over_does_not_make_readiness_fail() {
    let fixture = BillingFixture::new();
    let mut process = fixture.start();
    let url = format!("http://{}/health/ready", fixture.config().http.listen);
    eventually("ready", 10, || (get(&url).0 == 200).then_some(()));
    let mut db = fixture.db.superuser();
    for _ in 0..3 {
        fixture.break_database_connections_but(&mut db);
        let (status, body) = get(&url);
        assert!(status == 200 || body.contains("rabbitmq"), "{status} {body}");
    }
    process.kill();
}

#[test]
fn readiness_says_that_the_broker_refuses_the_login() {
    let fixture = BillingFixture::new().with("BILLING_RABBITMQ_PASSWORD", "not the password");
    let mut process = fixture.start();
    let url = format!("http://{}/health/ready", fixture.config().http.listen);
    eventually("the reason", 20, || get(&url).1.contains("refuses the login").then_some(()));
    process.kill();
}
