//! Requests that change one account at the same time: each sees what the other has done.

use std::thread;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::*;

/// The right to number ended sessions, as the schema takes it.
const LOCK_REVOCATIONS: &str =
    "select pg_advisory_xact_lock('public.revocations'::regclass::oid::bigint)";

/// Waits until so many statements wait for a lock in this database.
fn await_lock_waits(customers: &Customers, statements: i64) {
    let mut admin = customers.superuser();
    let count = "select count(*) from pg_stat_activity
        where datname = current_database() and wait_event_type = 'Lock'";
    eventually(format!("{statements} statements wait for a lock"), 10, || {
        let waiting: i64 = admin.query_one(count, &[]).unwrap().get(0);
        (waiting == statements).then_some(())
    });
}

/// Registers an account with this password; returns its id.
fn register_with(customers: &Customers, password: &str) -> i64 {
    let body = json!({ "email": unique_email(), "password": password });
    let reply = customers.post("/api/v1/users", body);
    assert_eq!(reply.status, 201, "{}", reply.body);
    reply.json()["id"].as_i64().unwrap()
}

/// A login whose account gets the password of another one after the login has verified it.
fn login_while_the_hash_changes(new_password: &str) -> (Customers, String, Reply) {
    let customers = Customers::new();
    let (email, id) = customers.register();
    let other = register_with(&customers, new_password);
    let mut changing = customers.superuser();
    let mut change = changing.transaction().unwrap();
    let set = "update users set password_hash = (select password_hash from users where id = $2)
        where id = $1";
    change.execute(set, &[&id, &other]).unwrap();
    let login = thread::scope(|scope| {
        let login = scope.spawn(|| customers.try_login(&email, PASSWORD));
        await_lock_waits(&customers, 1);
        change.commit().unwrap();
        login.join().unwrap()
    });
    (customers, email, login)
}

#[test]
fn a_login_with_the_old_password_fails_when_the_password_is_changed_meanwhile() {
    let (customers, email, login) = login_while_the_hash_changes("another password");
    assert_eq!(login.status, 401, "{}", login.body);
    assert_eq!(customers.try_login(&email, "another password").status, 200);
}

#[test]
fn a_login_succeeds_when_another_login_hashes_the_password_again_meanwhile() {
    let (_customers, _, login) = login_while_the_hash_changes(PASSWORD);
    assert_eq!(login.status, 200, "{}", login.body);
}

#[test]
fn all_sessions_and_one_of_them_can_be_ended_at_once() {
    let customers = Customers::new();
    let (email, _) = customers.register();
    let [first, second] = [(); 2].map(|()| customers.login(&email));
    let mut holder = customers.superuser();
    let mut lock = holder.transaction().unwrap();
    lock.execute(LOCK_REVOCATIONS, &[]).unwrap();
    let (all, one) = thread::scope(|scope| {
        let end = |method, path, token| {
            let customers = &customers;
            scope.spawn(move || customers.send(method, path, Some(token), &Value::Null).status)
        };
        let all = end("DELETE", "/api/v1/auth/sessions", first.access.as_str());
        await_lock_waits(&customers, 1);
        let one = end("POST", "/api/v1/auth/logout", second.access.as_str());
        await_lock_waits(&customers, 2);
        lock.commit().unwrap();
        (all.join().unwrap(), one.join().unwrap())
    });
    assert_eq!((all, one), (204, 204));
    for tokens in [first, second] {
        assert_eq!(customers.status_with(&tokens.access), 401);
        assert_eq!(customers.refresh(&tokens.refresh).status, 401);
    }
}

#[test]
fn a_refresh_that_waits_for_a_logout_is_refused() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    let mut holder = customers.superuser();
    let mut lock = holder.transaction().unwrap();
    lock.execute(LOCK_REVOCATIONS, &[]).unwrap();
    let (logout, refresh) = thread::scope(|scope| {
        let logout = scope.spawn(|| {
            let path = "/api/v1/auth/logout";
            customers.send("POST", path, Some(&tokens.access), &Value::Null).status
        });
        await_lock_waits(&customers, 1);
        let refresh = scope.spawn(|| customers.refresh(&tokens.refresh).status);
        await_lock_waits(&customers, 2);
        lock.commit().unwrap();
        (logout.join().unwrap(), refresh.join().unwrap())
    });
    assert_eq!((logout, refresh), (204, 401));
}

#[test]
fn a_refresh_does_not_keep_a_role_that_is_taken_away_meanwhile() {
    let customers = Customers::new();
    let (_, admin) = customers.administrator();
    let (id, other) = customers.administrator();
    let mut holder = customers.superuser();
    let mut lock = holder.transaction().unwrap();
    lock.execute("select from users where id = $1 for update", &[&id]).unwrap();
    let (demoted, refreshed) = thread::scope(|scope| {
        let demoted = scope.spawn(|| {
            let path = format!("/api/v1/users/{id}");
            let demote = json!({ "is_admin": false });
            customers.send("PATCH", &path, Some(&admin.access), &demote).status
        });
        await_lock_waits(&customers, 1);
        // The role has not been taken away yet.
        let refreshed = Tokens::of(&customers.refresh(&other.refresh));
        lock.commit().unwrap();
        (demoted.join().unwrap(), refreshed)
    });
    assert_eq!(demoted, 200);
    assert_eq!(customers.get("/api/v1/users", Some(&refreshed.access)).status, 401);
    assert_eq!(customers.refresh(&refreshed.refresh).status, 401);
}

/// Verifiers accept a token for 5 s after it has expired, and their clocks may differ from that of
/// the database.
#[test]
fn an_ended_session_is_listed_for_longer_than_its_tokens_are_accepted_anywhere() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    let claims = tokens.access.split('.').nth(1).unwrap();
    let claims = BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    let logout = customers.send("POST", "/api/v1/auth/logout", Some(&tokens.access), &Value::Null);
    assert_eq!(logout.status, 204);
    let listed = customers.internal("/internal/revocations").json();
    let until = listed["revocations"][0]["until"].as_i64().unwrap();
    let expires = claims["exp"].as_i64().unwrap();
    assert!(until >= expires + 60, "listed until {until}, expires at {expires}");
}
