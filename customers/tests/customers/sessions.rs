//! Login, refresh, logout, one's own sessions.

use std::thread;

use serde_json::{Value, json};

use super::*;

#[test]
fn a_login_gives_a_pair_of_tokens_and_the_user() {
    let customers = Customers::new();
    let body = json!({ "email": "a@example.org", "username": "Anna", "password": PASSWORD });
    assert_eq!(customers.post("/api/v1/users", body).status, 201);
    for login in [json!({ "email": "A@example.ORG" }), json!({ "username": "anna" })] {
        let mut body = login;
        body["password"] = json!(PASSWORD);
        let reply = customers.post("/api/v1/auth/login", body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        let answer = reply.json();
        assert_eq!((&answer["token_type"], &answer["expires_in"]), (&json!("Bearer"), &json!(900)));
        assert_eq!(answer["user"]["username"], "Anna");
        let tokens = Tokens::of(&reply);
        let session = customers.get("/api/v1/auth/session", Some(&tokens.access)).json();
        assert_eq!(session["user"]["email"], "a@example.org");
        assert_eq!(session["session"]["current"], true);
    }
}

#[test]
fn an_unknown_user_and_a_wrong_password_get_one_answer() {
    let customers = Customers::new();
    let (email, _) = customers.register();
    let unknown = customers.try_login("unknown@example.org", PASSWORD);
    let wrong = customers.try_login(&email, "wrong password");
    let case = customers.try_login(&email, &PASSWORD.to_uppercase());
    for reply in [&wrong, &case] {
        assert_eq!((reply.status, &reply.body), (401, &unknown.body));
        assert_eq!(reply.headers, unknown.headers);
    }
    assert_eq!(unknown.header("WWW-Authenticate"), Some("Bearer error=\"invalid_grant\""));
}

#[test]
fn a_refresh_gives_a_new_pair_and_spends_the_old_token() {
    let customers = Customers::with(&[("CUSTOMERS_REFRESH_GRACE_MS", "1")]);
    let (_, first) = customers.customer();
    let second = Tokens::of(&customers.refresh(&first.refresh));
    assert_ne!(first.refresh, second.refresh);
    assert_eq!(customers.status_with(&second.access), 200);
    let third = Tokens::of(&customers.refresh(&second.refresh));
    // Once the grace is over the first token looks stolen: the session ends for both.
    eventually("the grace is over", 10, || {
        (customers.refresh(&first.refresh).status == 401).then_some(())
    });
    assert_eq!(customers.refresh(&third.refresh).status, 401);
    for token in [&first, &second, &third] {
        assert_eq!(customers.status_with(&token.access), 401);
    }
}

#[test]
fn two_tabs_that_refresh_at_once_both_go_on() {
    let customers = Customers::new();
    let (_, first) = customers.customer();
    let pairs: Vec<Tokens> = thread::scope(|scope| {
        let refresh = || Tokens::of(&customers.refresh(&first.refresh));
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(refresh)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for pair in &pairs {
        assert_eq!(customers.status_with(&pair.access), 200);
        assert_eq!(customers.refresh(&pair.refresh).status, 200);
    }
    // The answer to a refresh was lost: the client asks once more.
    assert_eq!(customers.refresh(&pairs[0].refresh).status, 200);
    let all: Vec<&String> = pairs.iter().map(|pair| &pair.refresh).collect();
    assert_eq!(all.iter().collect::<std::collections::HashSet<_>>().len(), all.len());
}

#[test]
fn a_logout_ends_the_session_with_all_that_is_in_its_grace() {
    let customers = Customers::new();
    let (_, first) = customers.customer();
    let [second, third] = [(); 2].map(|()| Tokens::of(&customers.refresh(&first.refresh)));
    let logout = |token: &str| {
        customers.send("POST", "/api/v1/auth/logout", Some(token), &Value::Null).status
    };
    assert_eq!(logout(&second.access), 204);
    assert_eq!(logout(&second.access), 204, "again");
    for tokens in [&first, &second, &third] {
        assert_eq!(customers.status_with(&tokens.access), 401);
        assert_eq!(customers.refresh(&tokens.refresh).status, 401);
    }
    assert_eq!(customers.send("POST", "/api/v1/auth/logout", None, &Value::Null).status, 401);
}

#[test]
fn a_session_ends_days_after_its_last_use_and_days_after_its_login() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    let mut admin = customers.superuser();
    let days = |admin: &mut Client| -> f64 {
        let query = "select extract(epoch from expires_at - now())::float8 / 86400 from sessions";
        admin.query_one(query, &[]).unwrap().get(0)
    };
    assert!((days(&mut admin) - 30.0).abs() < 0.1);
    let age = "update sessions set created_at = now() - interval '80 days', expires_at = now() + interval '1 h'";
    admin.batch_execute(age).unwrap();
    let next = Tokens::of(&customers.refresh(&tokens.refresh));
    assert!((days(&mut admin) - 10.0).abs() < 0.1, "90 days after the login");
    admin.batch_execute("update sessions set expires_at = now()").unwrap();
    assert_eq!(customers.refresh(&next.refresh).status, 401);
    assert_eq!(customers.get("/api/v1/auth/session", Some(&next.access)).status, 401);
}

#[test]
fn an_access_token_does_not_outlive_its_session() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    let age = "update sessions set created_at = now() - interval '90 days' + interval '60 s'";
    customers.superuser().batch_execute(age).unwrap();
    let expires = customers.refresh(&tokens.refresh).json()["expires_in"].as_i64().unwrap();
    assert!((50..=60).contains(&expires), "{expires}");
}

#[test]
fn sessions_are_listed_and_ended_by_their_owner_only() {
    let customers = Customers::new();
    let (email, _) = customers.register();
    let [here, there] = [(); 2].map(|()| customers.login(&email));
    let (_, stranger) = customers.customer();
    let list = |token: &str| {
        let reply = customers.get("/api/v1/auth/sessions", Some(token)).json();
        reply["items"].as_array().unwrap().clone()
    };
    let sessions = list(&here.access);
    assert_eq!(sessions.len(), 2);
    let other = sessions.iter().find(|session| session["current"] == false).unwrap();
    let path = format!("/api/v1/auth/sessions/{}", other["id"].as_str().unwrap());
    let end =
        |path: &str, token: &str| customers.send("DELETE", path, Some(token), &Value::Null).status;
    assert_eq!(end(&path, &stranger.access), 404);
    assert_eq!(end("/api/v1/auth/sessions/x", &here.access), 404);
    assert_eq!(end(&path, &here.access), 204);
    assert_eq!(customers.status_with(&there.access), 401);
    assert_eq!(end(&path, &here.access), 404);
    assert_eq!(end("/api/v1/auth/sessions", &here.access), 204);
    assert_eq!(customers.status_with(&here.access), 401);
    assert_eq!(customers.status_with(&stranger.access), 200);
}

#[test]
fn what_has_expired_is_deleted_and_what_is_in_use_stays() {
    let customers = Customers::new();
    let (_, kept) = customers.customer();
    let (_, expired) = customers.customer();
    let mut admin = customers.superuser();
    Tokens::of(&customers.refresh(&kept.refresh));
    admin
        .batch_execute(
            "update refresh_tokens set spent_at = now() - interval '8 days' where spent_at is not null;
             update sessions set expires_at = now() - interval '1 s'
             where id = (select id from sessions order by created_at desc limit 1);
             insert into revocations (session_id, until)
             values (gen_random_uuid(), now() - interval '2 h'), (gen_random_uuid(), now())",
        )
        .unwrap();
    let deleted = customers.app.db.write(|db| customers::sessions::store::delete_expired(db, 100));
    assert_eq!(deleted.unwrap(), 3);
    let mut count = |table: &str| -> i64 {
        admin.query_one(&format!("select count(*) from {table}"), &[]).unwrap().get(0)
    };
    assert_eq!((count("sessions"), count("refresh_tokens"), count("revocations")), (1, 1, 1));
    assert_eq!(customers.refresh(&expired.refresh).status, 401);
}
