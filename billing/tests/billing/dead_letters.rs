//! `billing dead-letters`: list, requeue and delete.

use std::process::Output;

use amiquip::AmqpProperties;
use chassis::broker::{Message, Publisher};
use chassis::testing::eventually;
use serde_json::Value;

use crate::harness::{BillingFixture, order};

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_corrected_dead_letter_is_requeued_with_its_id_and_booked_once() {
    let fixture = BillingFixture::new();
    let _billing = fixture.consume();
    let broken = r#"{"user_id":"20","number_of_items":"99","total_amount":"-1"}"#;
    fixture.post(&[("broken", broken.to_owned()), ("good", order(1))]);
    fixture.await_orders(1, 10);
    eventually("a dead letter", 10, || (fixture.depth(".dead") == 1).then_some(()));

    let listed = lines(&fixture.dead_letters(&["list"]));
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0]["position"], 1);
    assert_eq!(listed[0]["message_id"], "broken");
    assert_eq!(listed[0]["body"], broken);
    let rule = "total_amount must be from 0 to 999999999999.99, with at most two decimals";
    assert_eq!(listed[0]["reason"], rule);
    assert!(listed[0]["failed_at"].as_str().unwrap().ends_with("GMT"));
    // Looking changes nothing.
    assert_eq!(lines(&fixture.dead_letters(&["list"])).len(), 1);

    let output = fixture.dead_letters(&["requeue", "broken", "--body", broken]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains(rule), "{output:?}");

    let output = fixture.dead_letters(&["requeue", "broken", "--body", &order("mended")]);
    assert_eq!(said(&output), "1 requeued\n");
    fixture.await_orders(2, 10);
    assert_eq!(fixture.users(), ["1", "mended"]);
    assert_eq!(fixture.depth(".dead"), 0);
    // It kept its id: the same again is known.
    fixture.post(&[("broken", order("mended")), ("last", order("last"))]);
    fixture.await_orders(3, 10);
}

#[test]
fn a_dead_letter_with_a_conflicting_id_is_requeued_under_a_new_one_and_booked_once() {
    let fixture = BillingFixture::new();
    let _billing = fixture.consume();
    fixture.post(&[("taken", order(1)), ("taken", order(2))]);
    eventually("a dead letter", 10, || (fixture.depth(".dead") == 1).then_some(()));
    let listed = lines(&fixture.dead_letters(&["list"]));
    let key = listed[0]["key"].as_str().unwrap().to_owned();

    // Under its own it only comes back.
    assert_eq!(said(&fixture.dead_letters(&["requeue", &key])), "1 requeued\n");
    eventually("it is back", 10, || (fixture.depth(".dead") == 1).then_some(()));
    let listed = lines(&fixture.dead_letters(&["list"]));
    let key = listed[0]["key"].as_str().unwrap().to_owned();
    assert_eq!(said(&fixture.dead_letters(&["requeue", "--new-id", &key])), "1 requeued\n");
    fixture.await_orders(2, 10);
    assert_eq!(fixture.users(), ["1", "2"]);
    assert_eq!(fixture.depth(".dead"), 0);
    // Its id is now known.
    fixture.post(&[(key.as_str(), order(2)), ("last", order(3))]);
    fixture.await_orders(3, 10);
    assert_eq!(fixture.users(), ["1", "2", "3"]);
}

#[test]
fn dead_letters_without_an_id_are_selected_by_key_or_position() {
    let fixture = BillingFixture::new();
    let billing = fixture.consume();
    fixture.post(&[("", "one"), ("", "two"), ("", "three"), ("", "four")]);
    eventually("dead letters", 10, || (fixture.depth(".dead") == 4).then_some(()));
    let listed = lines(&fixture.dead_letters(&["list", "--limit", "3"]));
    let bodies: Vec<&str> = listed.iter().map(|line| line["body"].as_str().unwrap()).collect();
    assert_eq!(bodies, ["one", "two", "three"]);

    let key = listed[2]["key"].as_str().unwrap();
    let output = fixture.dead_letters(&["requeue", key, "--body", &order(3)]);
    assert_eq!(said(&output), "1 requeued\n");
    let output = fixture.dead_letters(&["requeue", "#2", "--body", &order(2)]);
    assert_eq!(said(&output), "1 requeued\n");
    fixture.await_orders(2, 10);
    assert_eq!(fixture.users(), ["3", "2"]);
    assert_eq!(said(&fixture.dead_letters(&["delete", "#2"])), "1 deleted\n");
    let left = lines(&fixture.dead_letters(&["list"]));
    assert_eq!(left.len(), 1);
    assert_eq!(left[0]["body"], "one");

    // Without billing they stay in its queue.
    drop(billing);
    assert_eq!(said(&fixture.dead_letters(&["requeue", "all"])), "1 requeued\n");
    assert_eq!(fixture.depth(""), 1);
    assert_eq!(said(&fixture.dead_letters(&["requeue", "all"])), "0 requeued\n");
}

#[test]
fn a_dead_letter_with_two_copies_is_requeued_once() {
    let fixture = BillingFixture::new();
    let _billing = fixture.consume();
    fixture.post(&[("", "garbage")]);
    eventually("a dead letter", 10, || (fixture.depth(".dead") == 1).then_some(()));
    fixture.copy_dead_letter();
    let listed = lines(&fixture.dead_letters(&["list"]));
    assert_eq!(listed.len(), 2);
    let key = listed[0]["key"].as_str().unwrap();
    let output = fixture.dead_letters(&["requeue", key, "--body", &order(1)]);
    assert_eq!(said(&output), "1 requeued\n");
    fixture.await_orders(1, 10);
    assert_eq!(fixture.depth(".dead"), 0);
}

#[test]
fn a_command_that_cannot_be_carried_out_says_why_and_changes_nothing() {
    let fixture = BillingFixture::new();
    let billing = fixture.consume();
    fixture.post(&[("a", order(1)), ("a", order(2)), ("a", order(3))]);
    eventually("dead letters", 10, || (fixture.depth(".dead") == 2).then_some(()));
    drop(billing);
    let body = order(4);
    for (arguments, code, part) in [
        (&["requeue", "missing"][..], 1, "there is no dead letter missing"),
        (&["requeue", "a", "--body", &body], 1, "name one by its key"),
        (&["requeue", "a", "--body", "{}"], 1, "user_id is required"),
        (&["requeue"], 2, "billing dead-letters list"),
        (&["requeue", ""], 2, "which dead letter?"),
        (&["list", "--limit", "x"], 2, "takes a number"),
        (&["burn"], 2, "billing dead-letters list"),
        (&[], 2, "billing dead-letters list"),
        (&["--help"], 0, "billing dead-letters list"),
    ] {
        let output = fixture.dead_letters(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert!(said(&output).contains(part), "{arguments:?}: {}", said(&output));
    }
    assert_eq!(fixture.depth(".dead"), 2);
    assert_eq!(fixture.depth(""), 0);
}

#[test]
fn the_older_names_of_the_commands_still_work() {
    let fixture = BillingFixture::new();
    let _billing = fixture.consume();
    fixture.post(&[("a", "garbage"), ("b", "garbage")]);
    eventually("dead letters", 10, || (fixture.depth(".dead") == 2).then_some(()));
    assert_eq!(
        said(&fixture.dead_letters(&["put-back", "a", "--body", &order(1)])),
        "1 requeued\n"
    );
    assert_eq!(said(&fixture.dead_letters(&["drop", "b"])), "1 deleted\n");
    fixture.await_orders(1, 10);
}

#[test]
fn a_message_that_expired_is_listed_with_the_reason_of_the_broker() {
    let fixture = BillingFixture::new();
    // Without a consumer the message expires in the queue, and the policy moves it.
    assert_eq!(fixture.depth(".dead"), 0);
    let mut publisher =
        Publisher::connect(&fixture.admin(), "test", &fixture.config().queue).unwrap();
    let properties = AmqpProperties::default().with_expiration("1".to_owned());
    let (queue, order) = (fixture.config().queue, order(1));
    let message = Message::to_queue(&queue, order.as_bytes(), properties);
    publisher.publish_and_wait(vec![message]).unwrap();
    eventually("a dead letter", 10, || (fixture.depth(".dead") == 1).then_some(()));
    let listed = lines(&fixture.dead_letters(&["list"]));
    let queue = fixture.config().queue;
    let expected = format!("the broker moved it here from {queue}: it expired");
    assert_eq!(listed[0]["reason"], expected.as_str());
}
