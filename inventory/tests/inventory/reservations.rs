//! Reservations: their states, what is refused, and many at once.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::http::Reply;
use chassis::testing::{SetOnDrop, dispatch, eventually};
use inventory::reservations::{store, sweep};
use inventory::routes::INTERNAL_ROUTES;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{Store, text_of};

/// The lines of a hold.
fn lines(lines: &[(&str, i64)]) -> Value {
    lines.iter().map(|(sku, quantity)| json!({ "sku": sku, "quantity": quantity })).collect()
}

impl Store {
    fn hold(&self, order: Uuid, wanted: &[(&str, i64)]) -> Reply {
        let body = json!({ "hold_seconds": 600, "lines": lines(wanted) });
        self.internal("PUT", &format!("/internal/reservations/{order}"), &body)
    }

    /// `confirm`, `commit` or `release`.
    fn call(&self, call: &str, order: Uuid) -> Reply {
        let path = format!("/internal/reservations/{order}");
        match call {
            "release" => self.internal("DELETE", &path, &Value::Null),
            call => self.internal("POST", &format!("{path}/{call}"), &Value::Null),
        }
    }

    fn state(&self, order: Uuid) -> String {
        let path = format!("/internal/reservations/{order}");
        self.internal("GET", &path, &Value::Null).json()["state"].as_str().unwrap().to_owned()
    }

    /// Makes all holds expire now.
    fn expire(&self) {
        let past = "update reservations set expires_at = now() - interval '1 s'
            where state = 'held'";
        self.superuser().execute(past, &[]).unwrap();
        while self.app.db.write(|db| store::expire(db, 100)).unwrap() > 0 {}
    }

    /// Panics unless what is reserved of each product is what held and confirmed reservations need.
    fn check_sums(&self) {
        let wrong = "select sku, reserved, on_hand, needed.quantity
            from stock
            left join (
                select sku, sum(quantity) as quantity
                from reservation_lines join reservations using (order_id)
                where state in ('held', 'confirmed')
                group by sku
            ) as needed using (sku)
            where reserved <> coalesce(needed.quantity, 0)";
        let rows = self.superuser().query(wrong, &[]).unwrap();
        assert!(rows.is_empty(), "{rows:?}");
    }
}

#[test]
fn a_hold_reserves_all_lines_and_says_what_they_cost() {
    let store = Store::new();
    store.product("a", "9.99", 5);
    store.product("b", "0.50", 2);
    let order = Uuid::now_v7();
    let held = store.hold(order, &[("b", 1), ("a", 2), ("b", 1)]);
    assert_eq!(held.status, 200, "{}", held.body);
    let reservation = held.json();
    let expires_at = reservation["expires_at"].as_str().unwrap();
    let expected = json!({
        "order_id": order, "state": "held", "expires_at": expires_at, "currency": "EUR",
        "lines": [
            { "sku": "b", "name": "The b", "unit_price": "0.50", "quantity": 2 },
            { "sku": "a", "name": "The a", "unit_price": "9.99", "quantity": 2 },
        ],
    });
    assert_eq!(reservation, expected);
    assert_eq!((store.stock("a"), store.stock("b")), ((5, 2), (2, 2)));
    assert_eq!(store.get("/api/v1/products/a").json()["available"], 3);

    // Again, and in another order: the same answer, also after the price has changed.
    store.admin("PATCH", "/api/v1/products/a", &json!({ "price": 20, "name": "Other" }));
    for again in
        [store.hold(order, &[("b", 2), ("a", 2)]), store.hold(order, &[("a", 2), ("b", 2)])]
    {
        assert_eq!((again.status, again.json()), (200, expected.clone()));
    }
    assert_eq!(store.stock("a"), (5, 2));
    let path = format!("/internal/reservations/{order}");
    assert_eq!(store.internal("GET", &path, &Value::Null).json(), expected);

    let other = store.hold(order, &[("a", 3)]);
    assert_eq!((other.status, &other.json()["state"]), (409, &json!("held")));
    assert_eq!(other.json()["detail"], "this order has a reservation with other lines");
    store.check_sums();
}

#[test]
fn a_hold_that_falls_short_reserves_nothing_and_names_each_line() {
    let store = Store::new();
    store.product("a", "1.00", 5);
    store.product("b", "1.00", 1);
    store.product("c", "1.00", 9);
    let order = Uuid::now_v7();
    let short = store.hold(order, &[("a", 6), ("c", 1), ("b", 2)]);
    assert_eq!(short.status, 409, "{}", short.body);
    let detail = "there is not enough of a (6 wanted, 5 available), b (2 wanted, 1 available)";
    assert_eq!(short.json()["detail"], detail);
    let expected = json!([
        { "sku": "a", "quantity": 6, "available": 5 },
        { "sku": "b", "quantity": 2, "available": 1 },
    ]);
    assert_eq!(short.json()["lines"], expected);
    for sku in ["a", "b", "c"] {
        assert_eq!(store.stock(sku).1, 0);
    }
    assert_eq!(store.call("confirm", order).status, 404);
    assert_eq!(store.hold(order, &[("a", 5), ("c", 1)]).status, 200, "the id is free");

    store.admin("DELETE", "/api/v1/products/c", &Value::Null);
    let unknown = store.hold(Uuid::now_v7(), &[("b", 1), ("none", 1), ("c", 1)]);
    assert_eq!(unknown.status, 422, "{}", unknown.body);
    let errors = json!([
        { "field": "lines[1].sku", "rule": "is no product that can be ordered: none" },
        { "field": "lines[2].sku", "rule": "is no product that can be ordered: c" },
    ]);
    assert_eq!(unknown.json()["errors"], errors);
    // What was held before it was retired stays.
    assert_eq!(store.call("confirm", order).status, 200);
    assert_eq!(store.call("commit", order).status, 200);
    store.check_sums();
}

#[test]
fn each_call_may_be_repeated_and_an_impossible_one_names_the_state_it_found() {
    let store = Store::new();
    store.product("a", "1.00", 100);
    // How a reservation gets into each state, and what each call answers then.
    for (way, confirm, commit, release) in [
        (&["hold"][..], Ok("confirmed"), Err("held"), Ok("released")),
        (&["hold", "confirm"], Ok("confirmed"), Ok("committed"), Ok("released")),
        (&["hold", "confirm", "commit"], Err("committed"), Ok("committed"), Err("committed")),
        (&["hold", "release"], Err("released"), Err("released"), Ok("released")),
        (&["hold", "confirm", "release"], Err("released"), Err("released"), Ok("released")),
        (&["hold", "expire"], Ok("confirmed"), Err("expired"), Ok("released")),
    ] {
        for (call, expected) in [("confirm", confirm), ("commit", commit), ("release", release)] {
            let order = Uuid::now_v7();
            for step in way {
                match *step {
                    "hold" => assert_eq!(store.hold(order, &[("a", 2)]).status, 200),
                    "expire" => store.expire(),
                    step => assert_eq!(store.call(step, order).status, 200, "{way:?}"),
                }
            }
            for _ in 0..2 {
                let reply = store.call(call, order);
                let answer = match reply.status {
                    200 => Ok(reply.json()["state"].as_str().unwrap().to_owned()),
                    409 => Err(reply.json()["state"].as_str().unwrap().to_owned()),
                    status => panic!("{status} {}", reply.body),
                };
                let expected = expected.map(str::to_owned).map_err(str::to_owned);
                assert_eq!(answer, expected, "{way:?}, {call}");
                if let Ok(state) = answer {
                    assert_eq!(store.state(order), state);
                }
            }
            store.check_sums();
        }
    }
    let unknown = Uuid::now_v7();
    for call in ["confirm", "commit", "release"] {
        assert_eq!(store.call(call, unknown).status, 404, "{call}");
    }
    assert_eq!(store.internal("PUT", "/internal/reservations/7", &json!({})).status, 404);
}

#[test]
fn a_hold_expires_unless_it_is_confirmed_and_is_held_again_where_there_is_enough() {
    let store = Store::new();
    store.product("a", "1.00", 3);
    let (kept, late, again) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    for order in [kept, late, again] {
        assert_eq!(store.hold(order, &[("a", 1)]).status, 200);
    }
    assert_eq!(store.call("confirm", kept).status, 200);
    store.expire();
    assert_eq!(
        [kept, late, again].map(|order| store.state(order)),
        ["confirmed", "expired", "expired"]
    );
    assert_eq!(store.stock("a"), (3, 1));

    // The same hold again has the price of now.
    store.admin("PATCH", "/api/v1/products/a", &json!({ "price": 2 }));
    let other = store.hold(again, &[("a", 2)]);
    assert_eq!((other.status, &other.json()["state"]), (409, &json!("expired")));
    let held = store.hold(again, &[("a", 1)]);
    assert_eq!((held.status, &held.json()["state"]), (200, &json!("held")), "{}", held.body);
    assert_eq!(held.json()["lines"][0]["unit_price"], "2.00");
    assert!(held.json()["expires_at"].is_string());

    let last = Uuid::now_v7();
    assert_eq!(store.hold(last, &[("a", 1)]).status, 200);
    let short = store.call("confirm", late);
    assert_eq!(short.status, 409, "{}", short.body);
    assert_eq!(short.json()["lines"], json!([{ "sku": "a", "quantity": 1, "available": 0 }]));
    assert_eq!(store.state(late), "expired");
    assert_eq!(store.call("release", last).status, 200);
    // Acknowledged orders are kept, also for a product that is retired meanwhile.
    store.admin("DELETE", "/api/v1/products/a", &Value::Null);
    assert_eq!(store.call("confirm", late).status, 200);
    assert_eq!(store.stock_of_retired("a"), (3, 3));
    store.check_sums();
}

impl Store {
    fn stock_of_retired(&self, sku: &str) -> (i32, i32) {
        let select = "select on_hand, reserved from stock where sku = $1";
        let row = self.superuser().query_one(select, &[&sku]).unwrap();
        (row.get(0), row.get(1))
    }
}

#[test]
fn the_sweep_gives_back_what_has_expired_and_deletes_what_ended_a_week_ago() {
    let store = Store::new();
    store.product("a", "1.00", 500);
    let orders: Vec<Uuid> = (0..250).map(|_| Uuid::now_v7()).collect();
    for order in &orders {
        let body = json!({ "hold_seconds": 1, "lines": lines(&[("a", 1)]) });
        store.internal("PUT", &format!("/internal/reservations/{order}"), &body);
    }
    assert_eq!(store.call("release", orders[0]).status, 200);
    let old = "update reservations set updated_at = now() - interval '8 days'
        where state = 'released'";
    store.superuser().execute(old, &[]).unwrap();
    thread::scope(|scope| {
        // Two instances at once.
        let stop = &store.stop;
        for _ in 0..2 {
            scope.spawn(|| sweep::run(&store.app.db, stop));
        }
        eventually("all of it is given back", 10, || (store.stock("a").1 == 0).then_some(()));
        eventually("the old one is deleted", 10, || {
            (store.call("release", orders[0]).status == 404).then_some(())
        });
        stop.request();
    });
    assert_eq!(store.state(orders[1]), "expired");
    store.check_sums();
}

#[test]
fn bad_holds_are_refused_with_one_entry_for_each_field() {
    let store = Store::new();
    store.product("a", "1.00", 1);
    let path = format!("/internal/reservations/{}", Uuid::now_v7());
    let whole = "lines[0].quantity must be a whole number from 1 to 1000000";
    for (quantity, detail) in [
        (json!(0), whole),
        (json!(-1), whole),
        (json!(1.5), whole),
        (json!(10_000_000_000i64), whole),
        (json!("1"), whole),
        (Value::Null, "lines[0].quantity must not be null"),
    ] {
        let body = json!({ "hold_seconds": 1, "lines": [{ "sku": "a", "quantity": quantity }] });
        let refused = store.internal("PUT", &path, &body);
        assert_eq!((refused.status, &refused.json()["detail"]), (422, &json!(detail)));
    }
    for (seconds, status) in [(0, 422), (1, 200), (86_401, 422)] {
        let body = json!({ "hold_seconds": seconds, "lines": lines(&[("a", 1)]) });
        assert_eq!(store.internal("PUT", &path, &body).status, status, "{seconds}");
    }
    let many: Vec<Value> =
        (0..101).map(|n| json!({ "sku": format!("s{n}"), "quantity": 1 })).collect();
    let body = json!({ "hold_seconds": 1, "lines": many });
    assert_eq!(store.internal("PUT", &path, &body).status, 422);
    assert_eq!(dispatch(INTERNAL_ROUTES, &store.app, "PUT", &path, &[], "{").status, 400);
}

#[test]
fn of_1000_orders_at_once_for_100_pieces_exactly_100_are_held() {
    let store = Store::new();
    store.product("a", "1.00", 100);
    store.product("b", "1.00", 1_000_000);
    let second = Store::app(&store.db.name, &store.issuer, &store.stop, &[]);
    let done = AtomicBool::new(false);
    let held: usize = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                store.check_sums();
            }
        });
        let _done = SetOnDrop(&done);
        let clients: Vec<_> = (0..40)
            .map(|client| {
                let (store, second) = (&store, &second);
                scope.spawn(move || {
                    let app = if client % 2 == 0 { &store.app } else { second };
                    let hold = |number: usize| {
                        let wanted: &[(&str, i64)] = if number.is_multiple_of(2) {
                            &[("a", 1), ("b", 1)]
                        } else {
                            &[("b", 2), ("a", 1)]
                        };
                        let body = json!({ "hold_seconds": 600, "lines": lines(wanted) });
                        let path = format!("/internal/reservations/{}", Uuid::now_v7());
                        let held =
                            dispatch(INTERNAL_ROUTES, app, "PUT", &path, &[], &text_of(&body));
                        assert!([200, 409].contains(&held.status), "{}", held.body);
                        held.status == 200
                    };
                    (0..25).filter(|number| hold(*number)).count()
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    assert_eq!(held, 100);
    assert_eq!(store.stock("a"), (100, 100));
    store.check_sums();
}

#[test]
fn the_same_order_from_many_clients_is_held_once_with_equal_answers() {
    let store = Store::new();
    store.product("a", "1.00", 100);
    let second = Store::app(&store.db.name, &store.issuer, &store.stop, &[]);
    for _ in 0..10 {
        let path = format!("/internal/reservations/{}", Uuid::now_v7());
        let body = text_of(&json!({ "hold_seconds": 600, "lines": lines(&[("a", 1)]) }));
        let bodies: Vec<String> = thread::scope(|scope| {
            let clients: Vec<_> = (0..10)
                .map(|client| {
                    let app = if client % 2 == 0 { &store.app } else { &second };
                    let (path, body) = (&path, &body);
                    scope.spawn(move || dispatch(INTERNAL_ROUTES, app, "PUT", path, &[], body))
                })
                .collect();
            clients.into_iter().map(|client| client.join().unwrap().body).collect()
        });
        assert!(bodies.iter().all(|body| *body == bodies[0]), "{bodies:?}");
    }
    assert_eq!(store.stock("a"), (100, 10));
    store.check_sums();
}

#[test]
fn a_locked_product_delays_only_the_holds_that_need_it() {
    let store = Store::new();
    store.product("locked", "1.00", 100);
    store.product("free", "1.00", 100);
    let mut admin = store.superuser();
    let mut lock = admin.transaction().unwrap();
    lock.execute("select from stock where sku = 'locked' for update", &[]).unwrap();
    thread::scope(|scope| {
        let waiting: Vec<_> =
            (0..3).map(|_| scope.spawn(|| store.hold(Uuid::now_v7(), &[("locked", 1)]))).collect();
        eventually("holds wait for the lock", 10, || {
            let waits = "select count(*) from pg_stat_activity
                where datname = current_database() and wait_event_type = 'Lock'";
            let waiting: i64 = store.superuser().query_one(waits, &[]).unwrap().get(0);
            (waiting > 0).then_some(())
        });
        let started = Instant::now();
        let free: Vec<_> =
            (0..20).map(|_| scope.spawn(|| store.hold(Uuid::now_v7(), &[("free", 1)]))).collect();
        for hold in free {
            assert_eq!(hold.join().unwrap().status, 200);
        }
        // A statement waits for a lock for up to 3 s.
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        lock.rollback().unwrap();
        for hold in waiting {
            let held = hold.join().unwrap();
            assert_eq!(held.status, 200, "{}", held.body);
        }
    });
    assert_eq!(store.stock("free"), (100, 20));
    store.check_sums();
}

// --- against a model -------------------------------------------------------------

#[derive(Clone, Debug)]
enum Step {
    Hold(usize, Vec<(usize, i64)>),
    Confirm(usize),
    Commit(usize),
    Release(usize),
    Expire,
    SetStock(usize, i64),
    Adjust(usize, i64),
}

const SKUS: [&str; 3] = ["a", "b", "c"];

/// What the service should know, in memory.
#[derive(Default)]
struct Model {
    on_hand: [i64; 3],
    reserved: [i64; 3],
    orders: BTreeMap<usize, (&'static str, BTreeMap<usize, i64>)>,
}

impl Model {
    /// The status that the service must answer with.
    fn step(&mut self, step: &Step) -> u16 {
        match step {
            Step::Hold(order, wanted) => {
                let mut lines = BTreeMap::new();
                for (sku, quantity) in wanted {
                    *lines.entry(*sku).or_insert(0) += quantity;
                }
                match self.orders.get(order) {
                    Some((_, known)) if *known != lines => return 409,
                    Some(("held" | "confirmed", _)) => return 200,
                    Some(("committed" | "released", _)) => return 409,
                    _ => (),
                }
                if !self.reserve(&lines) {
                    return 409;
                }
                self.orders.insert(*order, ("held", lines));
                200
            }
            Step::Confirm(order) => match self.orders.get(order).cloned() {
                None => 404,
                Some(("confirmed", _)) => 200,
                Some(("held", _)) => self.to(*order, "confirmed"),
                Some(("expired", lines)) if self.reserve(&lines) => self.to(*order, "confirmed"),
                Some(_) => 409,
            },
            Step::Commit(order) => match self.orders.get(order).cloned() {
                None => 404,
                Some(("committed", _)) => 200,
                Some(("confirmed", lines)) => {
                    self.free(&lines);
                    for (sku, quantity) in &lines {
                        self.on_hand[*sku] -= quantity;
                    }
                    self.to(*order, "committed")
                }
                Some(_) => 409,
            },
            Step::Release(order) => match self.orders.get(order).cloned() {
                None => 404,
                Some(("committed", _)) => 409,
                Some((state, lines)) => {
                    if ["held", "confirmed"].contains(&state) {
                        self.free(&lines);
                    }
                    self.to(*order, "released")
                }
            },
            Step::Expire => {
                let held = self.orders.iter().filter(|(_, (state, _))| *state == "held");
                let held: Vec<_> =
                    held.map(|(order, (_, lines))| (*order, lines.clone())).collect();
                for (order, lines) in held {
                    self.free(&lines);
                    self.to(order, "expired");
                }
                200
            }
            Step::SetStock(sku, on_hand) => self.set(*sku, *on_hand, 200),
            Step::Adjust(sku, change) => self.set(*sku, self.on_hand[*sku] + change, 201),
        }
    }

    fn set(&mut self, sku: usize, on_hand: i64, status: u16) -> u16 {
        if on_hand < self.reserved[sku] {
            return 409;
        }
        self.on_hand[sku] = on_hand;
        status
    }

    fn reserve(&mut self, lines: &BTreeMap<usize, i64>) -> bool {
        let fits =
            |(sku, quantity): (&usize, &i64)| self.on_hand[*sku] - self.reserved[*sku] >= *quantity;
        if !lines.iter().all(fits) {
            return false;
        }
        for (sku, quantity) in lines {
            self.reserved[*sku] += quantity;
        }
        true
    }

    fn free(&mut self, lines: &BTreeMap<usize, i64>) {
        for (sku, quantity) in lines {
            self.reserved[*sku] -= quantity;
        }
    }

    fn to(&mut self, order: usize, state: &'static str) -> u16 {
        self.orders.get_mut(&order).unwrap().0 = state;
        200
    }
}

fn step() -> impl Strategy<Value = Step> {
    let order = 0..4usize;
    let line = (0..3usize, 1..6i64);
    prop_oneof![
        4 => (order.clone(), prop::collection::vec(line, 1..4)).prop_map(|(o, l)| Step::Hold(o, l)),
        3 => order.clone().prop_map(Step::Confirm),
        2 => order.clone().prop_map(Step::Commit),
        2 => order.prop_map(Step::Release),
        1 => Just(Step::Expire),
        1 => (0..3usize, 0..10i64).prop_map(|(sku, on_hand)| Step::SetStock(sku, on_hand)),
        1 => (0..3usize, prop_oneof![-5..0i64, 1..5i64])
            .prop_map(|(sku, change)| Step::Adjust(sku, change)),
    ]
}

#[test]
fn any_sequence_of_calls_has_the_answers_and_the_sums_of_a_model_in_memory() {
    let store = Store::new();
    for sku in SKUS {
        store.product(sku, "1.00", 8);
    }
    let mut runner =
        TestRunner::new(Config { cases: 60, failure_persistence: None, ..Config::default() });
    let sequences = prop::collection::vec(step(), 1..40);
    let result = runner.run(&sequences, |steps| {
        let mut admin = store.superuser();
        admin
            .batch_execute("delete from reservations; update stock set on_hand = 8, reserved = 0")
            .unwrap();
        let mut model = Model { on_hand: [8; 3], ..Model::default() };
        let orders: Vec<Uuid> = (0..4).map(|_| Uuid::now_v7()).collect();
        for step in &steps {
            let status = match step {
                Step::Hold(order, wanted) => {
                    let wanted: Vec<(&str, i64)> =
                        wanted.iter().map(|(sku, quantity)| (SKUS[*sku], *quantity)).collect();
                    store.hold(orders[*order], &wanted).status
                }
                Step::Confirm(order) => store.call("confirm", orders[*order]).status,
                Step::Commit(order) => store.call("commit", orders[*order]).status,
                Step::Release(order) => store.call("release", orders[*order]).status,
                Step::Expire => {
                    store.expire();
                    200
                }
                Step::SetStock(sku, on_hand) => {
                    let path = format!("/api/v1/products/{}/stock", SKUS[*sku]);
                    store.admin("PUT", &path, &json!({ "on_hand": on_hand })).status
                }
                Step::Adjust(sku, change) => {
                    let path = format!("/api/v1/products/{}/stock/adjustments", SKUS[*sku]);
                    store.admin("POST", &path, &json!({ "change": change, "reason": "x" })).status
                }
            };
            prop_assert_eq!(status, model.step(step), "{:?} of {:?}", step, steps);
            for (number, sku) in SKUS.iter().enumerate() {
                prop_assert_eq!(store.stock(sku), (model.on_hand[number], model.reserved[number]));
            }
            for (order, (state, _)) in &model.orders {
                prop_assert_eq!(&store.state(orders[*order]), state);
            }
        }
        store.check_sums();
        Ok(())
    });
    result.unwrap();
}
