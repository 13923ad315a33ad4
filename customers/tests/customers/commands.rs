//! `customers users`: accounts by hand.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use super::*;

fn users(customers: &Customers, arguments: &[&str], password: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_customers"))
        .arg("users")
        .args(arguments)
        .env("CUSTOMERS_DB_NAME", &customers.db.name)
        .env("CUSTOMERS_ARGON2_MEMORY_KIB", "64")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(password.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

#[test]
fn the_first_administrator_is_made_by_hand_and_can_log_in() {
    let customers = Customers::new();
    let made = users(&customers, &["create", "--admin", "Boss@example.org"], "a long password\n");
    assert!(made.status.success(), "{}", text(&made));
    assert!(!text(&made).contains("a long password"));
    let token = Tokens::of(&customers.try_login("boss@example.org", "a long password")).access;
    assert_eq!(customers.get("/api/v1/users", Some(&token)).status, 200);
    // Again: the account gets the new password, and its sessions end.
    let again = users(&customers, &["create", "boss@example.org", "--admin"], "another password");
    assert!(again.status.success(), "{}", text(&again));
    assert_eq!(customers.try_login("boss@example.org", "another password").status, 200);
    eventually("the old session has ended", 10, || {
        (customers.status_with(&token) == 401).then_some(())
    });
    let list = text(&users(&customers, &["list"], ""));
    assert_eq!(list, "1\tBoss@example.org\t-\tadministrator\tactive\n");
}

#[test]
fn an_account_is_promoted_disabled_and_enabled_by_hand() {
    let customers = Customers::new();
    let (_, admin) = customers.administrator();
    let (email, _) = customers.register();
    let tokens = customers.login(&email);
    assert!(users(&customers, &["disable", &email], "").status.success());
    eventually("its session has ended", 10, || {
        (customers.status_with(&tokens.access) == 401).then_some(())
    });
    assert_eq!(customers.try_login(&email, PASSWORD).status, 401);
    assert!(users(&customers, &["enable", &email], "").status.success());
    assert!(users(&customers, &["promote", &email], "").status.success());
    let token = customers.login(&email).access;
    assert_eq!(customers.get("/api/v1/users", Some(&token)).status, 200);
    assert_eq!(customers.get("/api/v1/users", Some(&admin.access)).status, 200);
    assert!(text(&users(&customers, &["list", &email], "")).contains("\tadministrator\tactive"));
}

#[test]
fn a_command_that_cannot_be_done_says_why() {
    let customers = Customers::new();
    let run = |arguments: &[&str], password: &str| {
        let done = users(&customers, arguments, password);
        (done.status.code().unwrap(), text(&done))
    };
    for (arguments, password, code, reason) in [
        (&["create", "a@example.org"][..], "password1", 1, "most common"),
        (&["create", "a@example.org"], "", 1, "no password"),
        (&["create", "nonsense"], PASSWORD, 1, "EMAIL must be"),
        (&["promote", "a@example.org"], "", 1, "there is no account"),
        (&["nonsense"], "", 2, "customers users create"),
        (&[], "", 2, "customers users create"),
    ] {
        let (status, said) = run(arguments, password);
        assert_eq!(status, code, "{arguments:?}: {said}");
        assert!(said.contains(reason), "{arguments:?}: {said}");
    }
    assert_eq!(run(&["create", "a@example.org", "--admin"], PASSWORD).0, 0);
    let (status, said) = run(&["disable", "a@example.org"], "");
    assert!(status == 1 && said.contains("last administrator"), "{said}");
    assert_eq!(run(&["create", "A@example.org"], PASSWORD).0, 1);
}
