//! Registration, one's own account, passwords, deletion.

use std::thread;

use serde_json::{Value, json};

use super::*;

fn address() -> Value {
    json!({
        "name": "Anna Lind", "line1": "Storgatan 1", "line2": null, "city": "Umeå",
        "postal_code": "90325", "region": null, "country": "SE"
    })
}

#[test]
fn an_account_is_registered_shown_changed_and_deleted() {
    let customers = Customers::new();
    let body = json!({
        "email": "Anna.Lind+shop@Example.org", "password": PASSWORD, "username": "Anna-Lind",
        "first_name": " Anna ", "last_name": "", "unknown": 1
    });
    let created = customers.post("/api/v1/users", body);
    assert_eq!(created.status, 201, "{}", created.body);
    let user = created.json();
    let id = user["id"].as_i64().unwrap();
    assert_eq!(created.header("Location"), Some(format!("/api/v1/users/{id}").as_str()));
    let names: Vec<&String> = user.as_object().unwrap().keys().collect();
    assert_eq!(
        names,
        [
            "id",
            "email",
            "username",
            "first_name",
            "last_name",
            "is_admin",
            "shipping_address",
            "billing_address",
            "payment_method",
            "created_at",
            "updated_at"
        ]
    );
    assert_eq!(user["email"], "Anna.Lind+shop@Example.org");
    assert_eq!((&user["first_name"], &user["last_name"]), (&json!("Anna"), &Value::Null));
    let created_at = user["created_at"].as_str().unwrap();
    assert!(created_at.len() == 24 && created_at.ends_with('Z'), "{created_at}");

    let token = customers.login("anna.lind+SHOP@example.org").access;
    let me = customers.get("/api/v1/users/me", Some(&token));
    assert_eq!((me.status, me.json()), (200, user));
    assert_eq!(customers.get(&format!("/api/v1/users/{id}"), Some(&token)).status, 200);

    let change = json!({
        "shipping_address": address(), "username": null, "last_name": "Lind",
        "payment_method": { "type": "invoice", "label": "Faktura" }
    });
    let changed = customers.send("PATCH", "/api/v1/users/me", Some(&token), &change);
    assert_eq!(changed.status, 200, "{}", changed.body);
    let changed = changed.json();
    assert_eq!(changed["shipping_address"], address());
    assert_eq!((&changed["username"], &changed["last_name"]), (&Value::Null, &json!("Lind")));
    assert_eq!(changed["payment_method"]["reference"], Value::Null);
    assert_eq!(changed["first_name"], "Anna", "what is absent is kept");

    let deleted = customers.send("DELETE", "/api/v1/users/me", Some(&token), &Value::Null);
    assert_eq!(deleted.status, 204);
    assert_eq!(customers.status_with(&token), 401);
}

#[test]
fn a_deleted_account_leaves_no_personal_data_and_its_address_is_free() {
    let customers = Customers::new();
    let (email, id) = customers.register();
    let tokens = customers.login(&email);
    let change = json!({ "first_name": "Gone", "billing_address": address() });
    customers.send("PATCH", "/api/v1/users/me", Some(&tokens.access), &change);
    assert_eq!(
        customers.send("DELETE", "/api/v1/users/me", Some(&tokens.access), &Value::Null).status,
        204
    );
    let mut admin = customers.superuser();
    let row: String =
        admin.query_one("select users::text from users where id = $1", &[&id]).unwrap().get(0);
    for personal in [email.as_str(), "Gone", "Storgatan", "argon2id"] {
        assert!(!row.contains(personal), "{row}");
    }
    assert_eq!(customers.try_login(&email, PASSWORD).status, 401);
    assert_eq!(customers.refresh(&tokens.refresh).status, 401);
    assert_eq!(customers.internal(&format!("/internal/users/{id}")).status, 404);
    let again = customers.post("/api/v1/users", json!({ "email": email, "password": PASSWORD }));
    assert_eq!(again.status, 201);
    assert_ne!(again.json()["id"], id, "an id is never used again");
}

#[test]
fn an_address_or_name_that_is_taken_in_any_case_is_409() {
    let customers = Customers::new();
    let register = |email: &str, username: &str| {
        let body = json!({ "email": email, "username": username, "password": PASSWORD });
        customers.post("/api/v1/users", body)
    };
    assert_eq!(register("Straße@example.org", "Ångström").status, 201);
    let taken = register("STRAßE@EXAMPLE.ORG", "other");
    assert_eq!((taken.status, taken.detail().contains("e-mail")), (409, true));
    // The decomposed form of the same letters.
    let taken = register("other@example.org", "a\u{30a}ngstro\u{308}m");
    assert_eq!((taken.status, taken.detail().contains("user name")), (409, true));
    let exists = |query: &str| customers.get(&format!("/api/v1/users/exists?{query}"), None);
    assert_eq!(exists("username=%C3%A5ngstr%C3%B6m").json(), json!({ "exists": true }));
    assert_eq!(exists("email=unknown@example.org").json(), json!({ "exists": false }));
    assert_eq!(exists("email=a@b&username=c").status, 422);
    assert_eq!(exists("").status, 422);
}

#[test]
fn of_many_registrations_of_one_address_at_once_one_succeeds() {
    let customers = Customers::new();
    let body = json!({ "email": "race@example.org", "password": PASSWORD });
    let statuses: Vec<u16> = thread::scope(|scope| {
        let register = || customers.post("/api/v1/users", body.clone()).status;
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(register)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let created = statuses.iter().filter(|status| **status == 201).count();
    assert_eq!(created, 1, "{statuses:?}");
    assert!(statuses.iter().all(|status| [201, 409].contains(status)), "{statuses:?}");
}

#[test]
fn the_longest_addresses_of_any_letters_are_kept_and_longer_ones_are_422() {
    let customers = Customers::new();
    for letter in ["a", "ü", "\u{10400}", "\u{3300}"] {
        let email = |length: usize| format!("{}@x", letter.repeat(length - 2));
        let register = |email: &str| {
            customers.post("/api/v1/users", json!({ "email": email, "password": PASSWORD }))
        };
        // One letter more than it looks: "\u{3300}" is compared as four.
        let longest = email(if letter == "\u{3300}" { 65 } else { 254 });
        let created = register(&longest);
        assert_eq!((created.status, &created.json()["email"]), (201, &json!(longest)));
        assert_eq!(register(&format!(" {longest}\n")).status, 409, "{letter}");
        assert_eq!(customers.try_login(&longest.to_uppercase(), PASSWORD).status, 200);
        assert_eq!(register(&email(255)).status, 422, "{letter}");
    }
}

#[test]
fn an_address_or_name_of_another_account_is_409_for_a_change_too() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    let other = json!({
        "email": "Taken@example.org", "username": "Taken", "password": PASSWORD
    });
    assert_eq!(customers.post("/api/v1/users", other).status, 201);
    let change =
        |body: Value| customers.send("PATCH", "/api/v1/users/me", Some(&tokens.access), &body);
    let email = json!({ "email": "taken@EXAMPLE.org", "current_password": PASSWORD });
    let taken = change(email);
    assert_eq!((taken.status, taken.detail().contains("e-mail")), (409, true));
    let taken = change(json!({ "username": "taken", "first_name": "Not kept" }));
    assert_eq!((taken.status, taken.detail().contains("user name")), (409, true));
    let me = customers.get("/api/v1/users/me", Some(&tokens.access)).json();
    assert_eq!(me["first_name"], Value::Null, "all of a change or nothing");
    // One's own address in another spelling is not taken.
    let own = me["email"].as_str().unwrap().to_uppercase();
    let respelled = change(json!({ "email": own, "current_password": PASSWORD }));
    assert_eq!((respelled.status, &respelled.json()["email"]), (200, &json!(own)));
}

#[test]
fn while_no_password_can_be_hashed_what_needs_it_is_503_and_all_else_is_served() {
    let settings = [("CUSTOMERS_HASHES_AT_ONCE", "1"), ("CUSTOMERS_HASH_WAIT_MS", "1")];
    let customers = Customers::with(&settings);
    let (email, _) = customers.register();
    let tokens = customers.login(&email);
    let token = Some(tokens.access.as_str());
    let turn = customers.app.passwords.turn().unwrap();
    let register = json!({ "email": unique_email(), "password": PASSWORD });
    let password = json!({ "current_password": PASSWORD, "new_password": "another password" });
    let address = json!({ "email": unique_email(), "current_password": PASSWORD });
    for reply in [
        customers.post("/api/v1/users", register.clone()),
        customers.try_login(&email, PASSWORD),
        customers.try_login("unknown@example.org", PASSWORD),
        customers.send("PUT", "/api/v1/users/me/password", token, &password),
        customers.send("PATCH", "/api/v1/users/me", token, &address),
    ] {
        assert_eq!((reply.status, reply.header("Retry-After")), (503, Some("1")), "{}", reply.body);
    }
    assert_eq!(customers.status_with(&tokens.access), 200);
    let name = json!({ "first_name": "Anna" });
    assert_eq!(customers.send("PATCH", "/api/v1/users/me", token, &name).status, 200);
    assert_eq!(customers.refresh(&tokens.refresh).status, 200);
    drop(turn);
    assert_eq!(customers.post("/api/v1/users", register).status, 201);
    assert_eq!(customers.send("PUT", "/api/v1/users/me/password", token, &password).status, 204);
}

#[test]
fn an_account_has_an_entity_tag_and_a_change_may_name_it() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    let bearer = format!("Bearer {}", tokens.access);
    let ask = |method: &str, header: (&str, &str), body: &str| {
        customers.ask(method, "/api/v1/users/me", &[("Authorization", &bearer), header], body)
    };
    let first = customers.get("/api/v1/users/me", Some(&tokens.access));
    let tag = first.header("ETag").unwrap().to_owned();
    assert_eq!(ask("GET", ("If-None-Match", &tag), "").status, 304);
    let changed = ask("PATCH", ("If-Match", &tag), r#"{"first_name":"New"}"#);
    assert_eq!(changed.status, 200);
    assert_ne!(changed.header("ETag"), Some(tag.as_str()));
    assert_eq!(ask("PATCH", ("If-Match", &tag), r#"{"first_name":"Old"}"#).status, 412);
    assert_eq!(ask("DELETE", ("If-Match", &tag), "").status, 412);
    assert_eq!(ask("GET", ("If-Match", &tag), "").status, 412);
    assert_eq!(ask("GET", ("If-None-Match", &tag), "").json()["first_name"], "New");
}

#[test]
fn the_owner_changes_the_address_with_the_current_password_only() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    let change =
        |body: Value| customers.send("PATCH", "/api/v1/users/me", Some(&tokens.access), &body);
    let missing = change(json!({ "email": "new@example.org" }));
    assert_eq!(
        (missing.status, &missing.json()["errors"][0]["field"]),
        (422, &json!("current_password"))
    );
    let wrong = json!({ "email": "new@example.org", "current_password": "wrong password" });
    assert_eq!(change(wrong).status, 403);
    let right = change(json!({ "email": "new@example.org", "current_password": PASSWORD }));
    assert_eq!((right.status, &right.json()["email"]), (200, &json!("new@example.org")));
    assert_eq!(customers.try_login("new@example.org", PASSWORD).status, 200);
}

#[test]
fn a_new_password_ends_all_other_sessions_of_the_user() {
    let customers = Customers::new();
    let (email, _) = customers.register();
    let [here, there] = [(); 2].map(|()| customers.login(&email));
    let set =
        |body: Value| customers.send("PUT", "/api/v1/users/me/password", Some(&here.access), &body);
    assert_eq!(set(json!({ "new_password": "another password" })).status, 422);
    let common = json!({ "current_password": PASSWORD, "new_password": "password1" });
    assert!(set(common).detail().contains("most common"));
    let own = json!({ "current_password": PASSWORD, "new_password": email });
    assert!(set(own).detail().contains("must not be"));
    let wrong = json!({ "current_password": "wrong password", "new_password": "another password" });
    assert_eq!(set(wrong).status, 403);
    let right = json!({ "current_password": PASSWORD, "new_password": "another password" });
    assert_eq!(set(right).status, 204);
    assert_eq!(customers.status_with(&here.access), 200);
    assert_eq!(customers.status_with(&there.access), 401);
    assert_eq!(customers.refresh(&there.refresh).status, 401);
    assert_eq!(customers.try_login(&email, PASSWORD).status, 401);
    assert_eq!(customers.try_login(&email, "another password").status, 200);
}

#[test]
fn an_account_of_somebody_else_does_not_exist_for_a_customer() {
    let customers = Customers::new();
    let (other, _) = customers.customer();
    let (_, tokens) = customers.customer();
    let path = format!("/api/v1/users/{other}");
    for (method, path) in [("GET", &path), ("PATCH", &path), ("DELETE", &path)] {
        let reply = customers.send(method, path, Some(&tokens.access), &json!({}));
        assert_eq!(reply.status, 404, "{method}");
    }
    let body = json!({ "new_password": "another password" });
    let password = format!("{path}/password");
    assert_eq!(customers.send("PUT", &password, Some(&tokens.access), &body).status, 404);
    assert_eq!(customers.get("/api/v1/users", Some(&tokens.access)).status, 403);
    for path in ["/api/v1/users/me", &path, "/api/v1/users"] {
        let reply = customers.get(path, None);
        assert_eq!((reply.status, reply.header("WWW-Authenticate")), (401, Some("Bearer")));
    }
}

#[test]
fn a_password_is_hashed_again_at_the_login_after_the_parameters_have_changed() {
    let customers = Customers::new();
    let (email, id) = customers.register();
    let hash = || -> String {
        let query = "select password_hash from users where id = $1";
        customers.superuser().query_one(query, &[&id]).unwrap().get(0)
    };
    assert!(hash().starts_with("$argon2id$v=19$m=64,t=1,p=1$"));
    let stop = Stop::default();
    let settings = [("CUSTOMERS_ARGON2_MEMORY_KIB", "128")];
    let app = App::new(config(&customers.db.name, &settings), &stop).unwrap();
    let body = json!({ "email": email, "password": PASSWORD }).to_string();
    let reply = dispatch(ROUTES, &app, "POST", "/api/v1/auth/login", &[], &body);
    stop.request();
    assert_eq!(reply.status, 200);
    assert!(hash().starts_with("$argon2id$v=19$m=128,t=1,p=1$"), "{}", hash());
    assert_eq!(customers.try_login(&email, PASSWORD).status, 200);
}
