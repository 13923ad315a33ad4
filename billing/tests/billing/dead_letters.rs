//! `billing dead-letters`: looking at them, mending them, putting them back.

use std::process::Output;

use chassis::testing::eventually;
use serde_json::Value;

use crate::harness::{Shop, order};

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_mended_dead_letter_is_put_back_with_its_id_and_booked_once() {
    let shop = Shop::new();
    let _billing = shop.consume();
    let broken = r#"{"user_id":"20","number_of_items":"99","total_amount":"-1"}"#;
    shop.post(&[("broken", broken.to_owned()), ("good", order(1))]);
    shop.await_orders(1, 10);
    eventually("a dead letter", 10, || (shop.depth(".dead") == 1).then_some(()));

    let listed = lines(&shop.dead_letters(&["list"]));
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0]["position"], 1);
    assert_eq!(listed[0]["message_id"], "broken");
    assert_eq!(listed[0]["body"], broken);
    let rule = "total_amount must be from 0 to 999999999999.99, with at most two decimals";
    assert_eq!(listed[0]["reason"], rule);
    assert!(listed[0]["failed_at"].as_str().unwrap().ends_with("GMT"));
    // Looking changes nothing.
    assert_eq!(lines(&shop.dead_letters(&["list"])).len(), 1);

    let output = shop.dead_letters(&["put-back", "broken", "--body", broken]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains(rule), "{output:?}");

    let output = shop.dead_letters(&["put-back", "broken", "--body", &order("mended")]);
    assert_eq!(said(&output), "1 put back\n");
    shop.await_orders(2, 10);
    assert_eq!(shop.users(), ["1", "mended"]);
    assert_eq!(shop.depth(".dead"), 0);
    // It kept its id: the same again is known.
    shop.post(&[("broken", order("mended")), ("last", order("last"))]);
    shop.await_orders(3, 10);
}

#[test]
fn a_dead_letter_whose_id_is_at_fault_is_put_back_under_another_and_booked_once() {
    let shop = Shop::new();
    let _billing = shop.consume();
    shop.post(&[("taken", order(1)), ("taken", order(2))]);
    eventually("a dead letter", 10, || (shop.depth(".dead") == 1).then_some(()));
    let listed = lines(&shop.dead_letters(&["list"]));
    let key = listed[0]["key"].as_str().unwrap().to_owned();

    // Under its own it only comes back.
    assert_eq!(said(&shop.dead_letters(&["put-back", &key])), "1 put back\n");
    eventually("it is back", 10, || (shop.depth(".dead") == 1).then_some(()));
    let listed = lines(&shop.dead_letters(&["list"]));
    let key = listed[0]["key"].as_str().unwrap().to_owned();
    assert_eq!(said(&shop.dead_letters(&["put-back", "--new-id", &key])), "1 put back\n");
    shop.await_orders(2, 10);
    assert_eq!(shop.users(), ["1", "2"]);
    assert_eq!(shop.depth(".dead"), 0);
    // Its id is now known.
    shop.post(&[(key.as_str(), order(2)), ("last", order(3))]);
    shop.await_orders(3, 10);
    assert_eq!(shop.users(), ["1", "2", "3"]);
}

#[test]
fn letters_without_an_id_are_named_by_key_or_position() {
    let shop = Shop::new();
    let billing = shop.consume();
    shop.post(&[("", "one"), ("", "two"), ("", "three"), ("", "four")]);
    eventually("dead letters", 10, || (shop.depth(".dead") == 4).then_some(()));
    let listed = lines(&shop.dead_letters(&["list", "--limit", "3"]));
    let bodies: Vec<&str> = listed.iter().map(|line| line["body"].as_str().unwrap()).collect();
    assert_eq!(bodies, ["one", "two", "three"]);

    let key = listed[2]["key"].as_str().unwrap();
    let output = shop.dead_letters(&["put-back", key, "--body", &order(3)]);
    assert_eq!(said(&output), "1 put back\n");
    let output = shop.dead_letters(&["put-back", "#2", "--body", &order(2)]);
    assert_eq!(said(&output), "1 put back\n");
    shop.await_orders(2, 10);
    assert_eq!(shop.users(), ["3", "2"]);
    assert_eq!(said(&shop.dead_letters(&["drop", "#2"])), "1 deleted\n");
    let left = lines(&shop.dead_letters(&["list"]));
    assert_eq!(left.len(), 1);
    assert_eq!(left[0]["body"], "one");

    // Without billing they stay in its queue.
    drop(billing);
    assert_eq!(said(&shop.dead_letters(&["put-back", "all"])), "1 put back\n");
    assert_eq!(shop.depth(""), 1);
    assert_eq!(said(&shop.dead_letters(&["put-back", "all"])), "0 put back\n");
}

#[test]
fn a_letter_that_is_there_twice_is_put_back_once() {
    let shop = Shop::new();
    let _billing = shop.consume();
    shop.post(&[("", "garbage")]);
    eventually("a dead letter", 10, || (shop.depth(".dead") == 1).then_some(()));
    shop.copy_dead();
    let listed = lines(&shop.dead_letters(&["list"]));
    assert_eq!(listed.len(), 2);
    let key = listed[0]["key"].as_str().unwrap();
    let output = shop.dead_letters(&["put-back", key, "--body", &order(1)]);
    assert_eq!(said(&output), "1 put back\n");
    shop.await_orders(1, 10);
    assert_eq!(shop.depth(".dead"), 0);
}

#[test]
fn a_command_that_cannot_be_carried_out_says_why_and_changes_nothing() {
    let shop = Shop::new();
    let billing = shop.consume();
    shop.post(&[("a", order(1)), ("a", order(2)), ("a", order(3))]);
    eventually("dead letters", 10, || (shop.depth(".dead") == 2).then_some(()));
    drop(billing);
    let body = order(4);
    for (arguments, code, part) in [
        (&["put-back", "nobody"][..], 1, "there is no dead letter nobody"),
        (&["put-back", "a", "--body", &body], 1, "name one by its key"),
        (&["put-back", "a", "--body", "{}"], 1, "user_id is required"),
        (&["put-back"], 2, "billing dead-letters list"),
        (&["put-back", ""], 2, "which letter?"),
        (&["list", "--limit", "x"], 2, "takes a number"),
        (&["burn"], 2, "billing dead-letters list"),
        (&[], 2, "billing dead-letters list"),
        (&["--help"], 0, "billing dead-letters list"),
    ] {
        let output = shop.dead_letters(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert!(said(&output).contains(part), "{arguments:?}: {}", said(&output));
    }
    assert_eq!(shop.depth(".dead"), 2);
    assert_eq!(shop.depth(""), 0);
}
