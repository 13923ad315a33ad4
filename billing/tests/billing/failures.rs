//! What becomes of orders when something breaks.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use chassis::testing::{eventually, management_api};
use postgres::Client;

use crate::harness::{Shop, booked, get, numbered, order};

#[test]
fn killed_ten_times_while_20_000_messages_flow_it_books_exactly_20_000() {
    const COUNT: usize = 20_000;
    let shop = Shop::new();
    shop.post(&numbered(COUNT));
    let mut db = shop.db.superuser();
    for kill in 1..=10 {
        let mut process = shop.start();
        let goal = kill * COUNT as i64 / 12;
        eventually("some orders", 60, || (booked(&mut db) >= goal).then_some(()));
        process.kill();
    }
    let _process = shop.start();
    shop.await_orders(COUNT as i64, 60);
    let users: BTreeSet<String> = shop.users().into_iter().collect();
    assert_eq!(users.len(), COUNT);
    assert_eq!(shop.take_dead().len(), 0);
}

#[test]
fn killed_with_messages_without_ids_it_books_none_twice_and_loses_none() {
    const COUNT: usize = 10_000;
    let shop = Shop::new();
    let messages: Vec<_> = (0..COUNT).map(|number| ("", order(number))).collect();
    shop.post(&messages);
    let mut db = shop.db.superuser();
    for kill in 1..=10 {
        let mut process = shop.start();
        let goal = kill * COUNT as i64 / 14;
        eventually("some orders", 60, || (booked(&mut db) >= goal).then_some(()));
        process.kill();
    }
    let _process = shop.start();
    eventually("every order booked", 60, || (booked(&mut db) as usize == COUNT).then_some(()));
    eventually("an empty queue", 60, || (shop.depth("") == 0).then_some(()));
    let users: BTreeSet<String> = shop.users().into_iter().collect();
    assert_eq!(users.len(), COUNT);
    // Those whose acknowledgement was lost are left for a person to decide.
    for dead in shop.take_dead() {
        assert!(dead.reason.starts_with("may be booked already"), "{}", dead.reason);
    }
}

#[test]
fn a_message_without_an_id_that_may_be_booked_already_is_left_to_a_person() {
    let shop = Shop::new();
    shop.post(&[("", order(1)), ("", order(2)), ("", order(2)), ("id", order(2))]);
    // As after a process that booked two of them and died: the rest is delivered again.
    shop.deliver_without_acknowledging(4);
    let mut db = shop.db.superuser();
    db.batch_execute(
        "insert into in_doubt (batch, digest)
         select 1, sha256(convert_to('1 999 ' || user_id, 'UTF8'))
         from unnest(array['1', '2']) as user_id",
    )
    .unwrap();
    let _billing = shop.consume();
    shop.await_orders(2, 10);
    assert_eq!(shop.users(), ["2", "2"]);
    let dead = shop.await_dead(2, 10);
    for (dead, user) in dead.iter().zip([1, 2]) {
        assert!(dead.reason.starts_with("may be booked already"), "{}", dead.reason);
        assert_eq!(dead.body, order(user).as_bytes());
    }
    eventually("no doubts", 10, || {
        let doubts: i64 = db.query_one("select count(*) from in_doubt", &[]).unwrap().get(0);
        (doubts == 0).then_some(())
    });
}

#[test]
fn a_message_that_kills_the_process_is_given_up_and_takes_no_neighbour_with_it() {
    let shop = Shop::new();
    let mut db = shop.db.superuser();
    // The test kills the process whenever it has this order in hand.
    db.batch_execute(
        "create function dwell() returns trigger language plpgsql as
             'begin if new.user_id = ''10'' then perform pg_sleep(60); end if; return new; end';
         create trigger dwell before insert on orders for each row execute function dwell();",
    )
    .unwrap();
    shop.post(&numbered(20));
    let sleeping = |db: &mut Client| -> i64 {
        let asked = "select count(*) from pg_stat_activity
                     where datname = current_database() and wait_event = 'PgSleep'";
        db.query_one(asked, &[]).unwrap().get(0)
    };
    let refuse = |kind: &str, most: serde_json::Value| {
        let policy = format!("policies/{}/nothing", shop.vhost.name);
        let definition = serde_json::json!({ "max-length": most, "overflow": "reject-publish" });
        let pattern = format!("^{}$", shop.config().dead_queue().replace('.', "[.]"));
        let body =
            serde_json::json!({ "pattern": pattern, "priority": 9, "definition": definition });
        management_api(kind, &policy, Some(body));
    };
    // At first no dead letter can be written.
    refuse("PUT", serde_json::json!(0));
    let mut kills = 0;
    let metrics = format!("http://{}/metrics", shop.config().http.metrics_listen);
    let given_up = || get(&metrics).1.contains("billing_dead_letters_pending 1");
    let mut process = loop {
        let mut process = shop.start();
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
        shop.break_database_connections_but(&mut db);
        eventually("its session gone", 30, || (sleeping(&mut db) == 0).then_some(()));
    };
    // What was given up stays so, also when the process dies before anybody else knows.
    process.kill();
    refuse("DELETE", serde_json::Value::Null);
    let _process = shop.start();
    shop.await_orders(19, 30);
    let dead = shop.await_dead(1, 10);
    assert_eq!(dead[0].body, order(10).as_bytes());
    assert_eq!(dead[0].reason, "the process died 3 times with this message in hand");
    // In a batch at first, then three times alone; now and then its batch halves it once more.
    assert!(kills <= 8, "{kills}");
}

#[test]
fn an_order_that_cannot_be_booked_is_not_given_up_however_often_the_process_dies() {
    let shop = Shop::new();
    let mut db = shop.db.superuser();
    shop.post(&numbered(1));
    shop.deliver_without_acknowledging(1);

    let mut other = shop.db.superuser();
    let mut lock = other.transaction().unwrap();
    lock.batch_execute("lock table orders in access exclusive mode").unwrap();
    let waits = "from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock'";
    for death in 0..6 {
        let mut process = shop.start();
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
        shop.db.superuser().execute(&end, &[]).unwrap();
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
        let mut process = shop.start();
        eventually("a refusal in this life", 30, || {
            let refusals = "select case when is_called then last_value else 0 end from refusals";
            (db.query_one(refusals, &[]).unwrap().get::<_, i64>(0) > death).then_some(())
        });
        process.kill();
    }
    db.batch_execute("drop trigger refuse on orders").unwrap();

    let _process = shop.start();
    shop.await_orders(1, 30);
    assert_eq!(shop.take_dead().len(), 0);
}

#[test]
fn a_lock_held_by_somebody_delays_and_loses_nothing() {
    let shop = Shop::new();
    let mut db = shop.db.superuser();
    let mut other = shop.db.superuser();
    let mut lock = other.transaction().unwrap();
    lock.batch_execute("lock table orders in exclusive mode").unwrap();
    let _billing = shop.consume();
    shop.post(&numbered(1000));
    // Until somebody waits for the lock, and has waited for more than its limit once.
    let waits = "select count(*) from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock'
                     and now() - query_start > interval '1 second'";
    eventually("a wait for the lock", 10, || {
        (db.query_one(waits, &[]).unwrap().get::<_, i64>(0) > 0).then_some(())
    });
    assert_eq!(booked(&mut db), 0);
    lock.commit().unwrap();
    shop.await_orders(1000, 30);
}

#[test]
fn database_connections_broken_in_mid_drain_lose_nothing_and_book_nothing_twice() {
    let shop = Shop::new();
    let mut messages = numbered(10_000);
    for (id, _) in messages.iter_mut().step_by(3) {
        id.clear();
    }
    shop.post(&messages);
    let _billing = shop.consume();
    let mut db = shop.db.superuser();
    for part in 1..=4 {
        eventually("some orders", 60, || (booked(&mut db) >= part * 2000).then_some(()));
        shop.break_database_connections_but(&mut db);
    }
    shop.await_orders(10_000, 60);
    let expected: Vec<String> = (0..10_000).map(|number| number.to_string()).collect();
    assert_eq!(shop.users(), expected);
    assert_eq!(shop.take_dead().len(), 0);
}

#[test]
fn a_database_that_is_away_is_waited_for() {
    let shop = Shop::new();
    let mut db = shop.db.superuser();
    // Nobody may forbid connections to the database that he is connected to.
    let elsewhere = Shop::new();
    let allow = |allowed: bool| {
        let statement = format!("alter database {} allow_connections {allowed}", shop.db.name);
        elsewhere.db.superuser().batch_execute(&statement).unwrap();
    };
    allow(false);
    let billing = shop.consume();
    shop.post(&numbered(100));
    // It has them in hand, and keeps them.
    eventually("the messages taken", 10, || (shop.depth("") == 0).then_some(()));
    assert_eq!(booked(&mut db), 0);
    // Also while it waits it can be stopped at once.
    let stopping = Instant::now();
    drop(billing);
    assert!(stopping.elapsed() < Duration::from_secs(5), "{:?}", stopping.elapsed());
    let _billing = shop.consume();
    eventually("the messages taken again", 10, || (shop.depth("") == 0).then_some(()));
    allow(true);
    shop.await_orders(100, 30);
}

#[test]
fn broker_connections_broken_in_mid_drain_lose_nothing_and_book_nothing_twice() {
    const COUNT: i64 = 20_000;
    let shop = Shop::new();
    let _billing = shop.consume();
    let mut db = shop.db.superuser();
    // The management API lists a new connection only after seconds.
    for part in 1..=3 {
        let some: Vec<_> =
            numbered(COUNT as usize / 4 * part).split_off(COUNT as usize / 4 * (part - 1));
        shop.post(&some);
        eventually("a connection to break", 30, || {
            (shop.break_broker_connections() > 0).then_some(())
        });
    }
    shop.post(&numbered(COUNT as usize));
    eventually("all orders", 60, || (booked(&mut db) == COUNT).then_some(()));
    shop.await_orders(COUNT, 60);
    assert_eq!(shop.take_dead().len(), 0);
}

#[test]
fn a_queue_that_is_deleted_is_declared_again() {
    let shop = Shop::new();
    let _billing = shop.consume();
    shop.post(&[("1", order(1))]);
    shop.await_orders(1, 10);
    let (vhost, config) = (&shop.vhost.name, shop.config());
    for queue in [&config.dead_queue(), &config.queue] {
        management_api("DELETE", &format!("queues/{vhost}/{queue}"), None);
    }
    shop.post(&[("2", order(2)), ("3", "garbage".to_owned())]);
    shop.await_orders(2, 10);
    assert_eq!(shop.await_dead(1, 10)[0].body, b"garbage");
}

#[test]
fn what_is_in_hand_when_the_queue_is_deleted_is_booked() {
    const COUNT: usize = 100;
    // Longer than the test: it holds a batch and waits for company.
    let shop = Shop::new().with("BILLING_BATCH_WAIT_MS", "600000");
    shop.post(&numbered(COUNT));
    let _billing = shop.consume();
    let left = shop.delete_queue_when_all_is_delivered();
    shop.await_orders(COUNT as i64 - i64::from(left), 30);
}

#[test]
fn what_is_hopeless_and_in_hand_when_the_queue_is_deleted_goes_to_the_dead_letters() {
    // Many times what is on its way at once, and less than a batch.
    const COUNT: usize = 450;
    let shop = Shop::new().with("BILLING_BATCH_WAIT_MS", "600000");
    shop.post(&vec![("", "garbage"); COUNT]);
    let _billing = shop.consume();
    let left = shop.delete_queue_when_all_is_delivered();
    assert_eq!(left, 0);
    shop.await_dead(COUNT, 30);
}

#[test]
fn terminated_under_load_it_ends_within_five_seconds_and_nothing_is_lost() {
    const COUNT: usize = 20_000;
    let shop = Shop::new();
    shop.post(&numbered(COUNT));
    let mut db = shop.db.superuser();
    let mut process = shop.start();
    eventually("some orders", 30, || (booked(&mut db) > 2000).then_some(()));
    process.terminate();
    let stopping = Instant::now();
    let status = eventually("its end", 6, || process.0.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert!(stopping.elapsed() < Duration::from_secs(5), "{:?}", stopping.elapsed());
    // What it had in hand it finished: nothing in the queue is booked already.
    assert_eq!(booked(&mut db) as usize + shop.depth(""), COUNT);
    let _process = shop.start();
    shop.await_orders(COUNT as i64, 60);
}

#[test]
fn its_health_tells_whether_it_can_work() {
    let shop = Shop::new();
    let mut process = shop.start();
    let ready = |wanted: u16| {
        let url = format!("http://{}/health/ready", shop.config().http.listen);
        eventually(format!("{wanted} from {url}"), 10, || {
            let (status, text) = get(&url);
            (status == wanted).then_some(text)
        })
    };
    let told = ready(200);
    assert!(told.contains("postgresql") && told.contains("rabbitmq"), "{told}");
    shop.db.superuser().batch_execute("alter table orders rename to gone").unwrap();
    assert!(ready(503).contains("the tables cannot be read"));
    shop.db.superuser().batch_execute("alter table gone rename to orders").unwrap();
    ready(200);
    process.kill();
}
