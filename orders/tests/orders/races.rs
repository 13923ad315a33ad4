//! Two changes of an order at once, against a model that makes them one after the other.

use std::sync::Barrier;
use std::thread;

use chassis::testing::http::Reply;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use crate::{ANNA, Store, path};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    Pay,
    PayAgain,
    Ship,
    Deliver,
    CancelByOwner,
    CancelByAdmin,
    Refund,
    Delete,
}

/// What the model has of an order.
#[derive(Clone, Debug, PartialEq)]
struct Model {
    status: &'static str,
    paid_by: Option<&'static str>,
    refund_due: bool,
    refunded: bool,
    deleted: bool,
}

impl Model {
    fn new() -> Model {
        Model {
            status: "pending",
            paid_by: None,
            refund_due: false,
            refunded: false,
            deleted: false,
        }
    }

    /// Makes a call; its status.
    fn apply(&mut self, call: Call) -> u16 {
        if self.deleted {
            return match call {
                Call::Delete => 204,
                Call::Refund if self.refund_due => {
                    (self.refund_due, self.refunded) = (false, true);
                    200
                }
                Call::Refund if self.refunded => 200,
                Call::Refund => 409,
                _ => 404,
            };
        }
        match (call, self.status) {
            (Call::Pay | Call::PayAgain, _) => {
                let reference = if call == Call::Pay { "p-1" } else { "p-2" };
                if self.status == "pending" {
                    (self.status, self.paid_by) = ("processing", Some(reference));
                    return 200;
                }
                if self.paid_by == Some(reference) { 200 } else { 409 }
            }
            (Call::Ship, "processing") => {
                self.status = "shipped";
                200
            }
            (Call::Ship, "shipped" | "delivered") => 200,
            (Call::Deliver, "shipped" | "delivered") => {
                self.status = "delivered";
                200
            }
            (Call::CancelByOwner | Call::CancelByAdmin, "canceled") => 200,
            (Call::CancelByOwner | Call::CancelByAdmin, "pending")
            | (Call::CancelByAdmin, "processing") => {
                self.status = "canceled";
                self.refund_due = self.paid_by.is_some();
                200
            }
            (Call::Refund, _) if self.refund_due => {
                (self.refund_due, self.refunded) = (false, true);
                200
            }
            (Call::Refund, _) if self.refunded => 200,
            (Call::Delete, "pending" | "canceled" | "delivered") => {
                if self.status == "pending" {
                    self.status = "canceled";
                }
                self.deleted = true;
                204
            }
            _ => 409,
        }
    }
}

impl Store {
    fn call(&self, order: &Value, call: Call) -> Reply {
        let none = Value::Null;
        match call {
            Call::Pay => self.pay(order),
            Call::PayAgain => {
                let body = json!({ "amount": order["total_amount"], "reference": "p-2" });
                self.admin("PUT", &path(order, "/payment"), &body)
            }
            Call::Ship => self.ship(order),
            Call::Deliver => self.admin("POST", &path(order, "/delivery"), &none),
            Call::CancelByOwner => self.ask(ANNA, "POST", &path(order, "/cancellation"), &none),
            Call::CancelByAdmin => self.admin("POST", &path(order, "/cancellation"), &none),
            Call::Refund => self.admin("PUT", &path(order, "/refund"), &none),
            Call::Delete => self.ask(ANNA, "DELETE", &path(order, ""), &none),
        }
    }

    /// The order as the model has it.
    fn model(&self, order: &Value) -> Model {
        let query = "select status, payment_reference, refund_due, refunded_at is not null,
            deleted_at is not null from orders where id = $1::text::uuid";
        let row = self.superuser().query_one(query, &[&order["id"].as_str().unwrap()]).unwrap();
        let status: String = row.get(0);
        let reference: Option<String> = row.get(1);
        let statuses = ["pending", "processing", "shipped", "delivered", "canceled"];
        Model {
            status: statuses.into_iter().find(|known| *known == status).unwrap(),
            paid_by: ["p-1", "p-2"].into_iter().find(|known| reference.as_deref() == Some(known)),
            refund_due: row.get(2),
            refunded: row.get(3),
            deleted: row.get(4),
        }
    }

    /// What billing gets, and what inventory has, fit the order.
    fn check_effects(&self, order: &Value, model: &Model) {
        let id = order["id"].as_str().unwrap();
        let query = "select
            (select count(*) from outbox where order_id = $1::text::uuid and target = 'queue'),
            (select count(*) from order_events where order_id = $1::text::uuid),
            (select version from orders where id = $1::text::uuid)";
        let row = self.superuser().query_one(query, &[&id]).unwrap();
        let (booked, events, version): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        assert_eq!(booked, i64::from(model.paid_by.is_some()));
        assert_eq!(events, version);
        let state = match model.status {
            "canceled" => "released",
            "shipped" | "delivered" => "committed",
            _ => "confirmed",
        };
        assert_eq!(self.inventory.state(order), Some(state), "{model:?}");
    }
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        4 => Just(Call::Pay),
        1 => Just(Call::PayAgain),
        3 => Just(Call::Ship),
        2 => Just(Call::Deliver),
        2 => Just(Call::CancelByOwner),
        2 => Just(Call::CancelByAdmin),
        1 => Just(Call::Refund),
        2 => Just(Call::Delete),
    ]
}

#[test]
fn any_sequence_of_calls_is_answered_as_the_model_answers_it() {
    let store = Store::new();
    let mut runner = TestRunner::new(Config { cases: 40, ..Config::default() });
    let result = runner.run(&prop::collection::vec(call(), 1..8), |calls| {
        let order = store.order();
        let mut model = Model::new();
        for call in calls {
            let expected = model.apply(call);
            let reply = store.call(&order, call);
            prop_assert_eq!(reply.status, expected, "{:?} {:?}: {}", call, &model, reply.body);
        }
        store.send_stock_commands();
        prop_assert_eq!(store.model(&order), model.clone());
        store.check_effects(&order, &model);
        Ok(())
    });
    result.unwrap_or_else(|err| panic!("{err}"));
}

#[test]
fn two_calls_at_once_are_answered_as_if_one_came_after_the_other() {
    let store = Store::new();
    let mut runner = TestRunner::new(Config { cases: 60, ..Config::default() });
    let calls = (prop::collection::vec(call(), 0..3), call(), call());
    let result = runner.run(&calls, |(before, first, second)| {
        let order = store.order();
        let mut model = Model::new();
        for call in before {
            model.apply(call);
            store.call(&order, call);
        }
        let barrier = Barrier::new(2);
        let at_once = |call: Call| {
            barrier.wait();
            store.call(&order, call).status
        };
        let answers = thread::scope(|scope| {
            let other = scope.spawn(|| at_once(second));
            let answer = at_once(first);
            (answer, other.join().unwrap())
        });
        let in_order = |one: Call, other: Call| {
            let mut after = model.clone();
            let answers = (after.apply(one), after.apply(other));
            (answers, after)
        };
        let (forward, after_forward) = in_order(first, second);
        let ((b, a), after_reverse) = in_order(second, first);
        let found = store.model(&order);
        let fits = (answers == forward && found == after_forward)
            || (answers == (a, b) && found == after_reverse);
        prop_assert!(
            fits,
            "{:?}, {:?} at once in {:?}: {:?} {:?}",
            first,
            second,
            model,
            answers,
            found
        );
        store.send_stock_commands();
        store.check_effects(&order, &found);
        Ok(())
    });
    result.unwrap_or_else(|err| panic!("{err}"));
}
