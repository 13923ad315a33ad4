//! Other services: keys, ended sessions, the data of a customer.

use std::time::Duration;

use chassis::auth::{self, Authenticator, HttpSource, Revocation};
use serde_json::{Value, json};

use super::program::Program;
use super::*;

#[test]
fn the_public_keys_are_published_without_the_private_ones() {
    let customers = Customers::new();
    let reply = customers.get("/.well-known/jwks.json", None);
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("Cache-Control"), Some("public, max-age=300"));
    let key = &reply.json()["keys"][0];
    assert_eq!(
        (&key["kty"], &key["crv"], &key["alg"]),
        (&json!("OKP"), &json!("Ed25519"), &json!("EdDSA"))
    );
    assert_eq!(key["d"], Value::Null);
    for secret in test_var("CUSTOMERS_SIGNING_KEYS").split(',') {
        assert!(!reply.body.contains(secret));
    }
    assert_eq!(customers.internal("/.well-known/jwks.json").body, reply.body);
}

#[test]
fn the_list_of_ended_sessions_is_read_in_order_and_begins_again_for_another_database() {
    let customers = Customers::new();
    let mut admin = customers.superuser();
    admin
        .batch_execute(
            "insert into revocations (session_id, until)
             select gen_random_uuid(), now() + interval '15 min' from generate_series(1, 2500)",
        )
        .unwrap();
    let page = |after: i64, epoch: &str| -> auth::RevocationPage {
        let path = format!("/internal/revocations?after={after}&epoch={epoch}");
        serde_json::from_str(&customers.internal(&path).body).unwrap()
    };
    let first = page(0, "");
    assert_eq!((first.revocations.len(), first.more), (1000, true));
    let numbers: Vec<i64> = first.revocations.iter().map(|it| it.number).collect();
    assert!(numbers.is_sorted());
    let third = page(page(first.next, &first.epoch).next, &first.epoch);
    assert_eq!((third.revocations.len(), third.more), (500, false));
    let end = page(third.next, &first.epoch);
    assert_eq!((end.revocations.len(), end.next), (0, third.next));
    assert_eq!(page(third.next, "another").revocations[0].number, numbers[0]);
}

#[test]
fn no_ended_session_is_missed_however_the_transactions_overlap() {
    let customers = Customers::new();
    let mut slow = customers.superuser();
    let insert = "insert into revocations (session_id, until)
        values (gen_random_uuid(), now() + interval '15 min')";
    slow.batch_execute("begin").unwrap();
    slow.batch_execute(insert).unwrap();
    let fast = std::thread::spawn({
        let mut fast = customers.superuser();
        move || fast.batch_execute(insert).unwrap()
    });
    // The second waits for the first: else a reader would see its number and never the lower one.
    let mut admin = customers.superuser();
    eventually("the second waits", 10, || {
        let query = "select from pg_stat_activity
            where datname = current_database() and wait_event_type = 'Lock'";
        admin.query_opt(query, &[]).unwrap()
    });
    let page = |after: i64| -> Vec<Revocation> {
        let path = format!("/internal/revocations?after={after}");
        let page: auth::RevocationPage =
            serde_json::from_str(&customers.internal(&path).body).unwrap();
        page.revocations
    };
    assert!(page(0).is_empty());
    slow.batch_execute("commit").unwrap();
    fast.join().unwrap();
    assert_eq!(page(0).len(), 2);
}

#[test]
fn another_service_gets_the_data_of_a_customer_for_an_order() {
    let customers = Customers::new();
    let (id, tokens) = customers.customer();
    let path = format!("/internal/users/{id}");
    assert_eq!(customers.internal(&path).json()["name"], Value::Null);
    let names = json!({ "first_name": "Anna", "last_name": "Lind" });
    customers.send("PATCH", "/api/v1/users/me", Some(&tokens.access), &names);
    let contact = customers.internal(&path).json();
    assert_eq!((&contact["name"], &contact["state"]), (&json!("Anna Lind"), &json!("active")));
    assert_eq!(customers.internal("/internal/users/999999").status, 404);
    assert_eq!(customers.get(&path, None).status, 404, "not on the public listener");
}

/// Another service that verifies tokens by itself sees a logout, is not let down by a restart of
/// customers, and accepts no token when it has heard nothing for too long.
#[test]
fn another_service_verifies_tokens_by_itself_and_sees_every_logout() {
    let db = TestDb::new(&test_var("CUSTOMERS_DB_NAME"));
    let mut program = Program::start(&db.name, &[]);
    let post =
        |path: &str, token: Option<&str>, body: Value| program.ask("POST", path, token, &body);
    let account = json!({ "email": "other@example.org", "password": PASSWORD });
    assert_eq!(post("/api/v1/users", None, account.clone()).status, 201);
    let token = post("/api/v1/auth/login", None, account).json()["access_token"].clone();
    let token = token.as_str().unwrap().to_owned();

    let stop = Stop::default();
    let config = auth::Config {
        issuer: test_var("AUTH_ISSUER"),
        audience: test_var("AUTH_AUDIENCE"),
        max_stale: Duration::from_secs(2),
        poll_interval: Duration::from_millis(50),
    };
    let other =
        Authenticator::new(config, HttpSource::new(program.internal_address()), &stop).unwrap();
    let status = |token: &str| {
        let header = ("Authorization".into(), format!("Bearer {token}"));
        let request = rouille::Request::fake_http("GET", "/", vec![header], vec![]);
        other.principal(&request).map_or_else(|problem| problem.status(), |_| 200)
    };
    eventually("the other service has keys", 10, || (status(&token) == 200).then_some(()));
    assert_eq!(post("/api/v1/auth/logout", Some(&token), json!({})).status, 204);
    eventually("the logout is seen", 10, || (status(&token) == 401).then_some(()));

    program.service.kill();
    assert_eq!(status(&token), 401, "while customers is away");
    eventually("no token is accepted any more", 10, || (status(&token) == 503).then_some(()));
    let restarted = program.restart(&db.name);
    eventually("the feed is heard again", 10, || (status(&token) == 401).then_some(()));
    stop.request();
    drop(restarted);
}
