//! Bad input and attempts to get in.

use serde_json::{Value, json};

use super::*;

#[test]
fn a_body_that_is_no_object_or_has_wrong_fields_gets_a_clear_problem() {
    let customers = Customers::new();
    for path in ["/api/v1/users", "/api/v1/auth/login", "/api/v1/auth/refresh"] {
        for body in ["[]", "null", "\"x\"", "1"] {
            let reply = customers.ask("POST", path, &[], body);
            assert_eq!(reply.status, 422, "{path} {body}: {}", reply.body);
            assert!(reply.detail().contains("must be a JSON object"), "{}", reply.body);
        }
        for body in ["", "{", "{\"email\":\"\\ud800\"}x"] {
            assert_eq!(customers.ask("POST", path, &[], body).status, 400, "{path} {body}");
        }
        assert_eq!(
            customers.ask("POST", path, &[("Content-Type", "text/plain")], "{}").status,
            415
        );
        let reply = customers.ask("POST", path, &[], "{}");
        assert_eq!(reply.status, 422);
        assert!(!reply.json()["errors"].as_array().unwrap().is_empty());
    }
    for (body, rule) in [
        (r#"{"email":"a\u0000@b","password":"x"}"#, "email must not contain U+0000"),
        (r#"{"email":"\ud800@b","password":"x"}"#, "email must be a valid string"),
        (r#"{"email":["a@b"],"password":"x"}"#, "email must be a string"),
        (r#"{"email":"a@b","username":"c","password":"x"}"#, "username must not be given"),
        (r#"{"password":"x"}"#, "email is required"),
        (r#"{"email":"a@b"}"#, "password is required"),
    ] {
        let reply = customers.ask("POST", "/api/v1/auth/login", &[], body);
        assert_eq!(reply.status, 422, "{body}");
        assert!(reply.detail().contains(rule), "{body}: {}", reply.detail());
    }
    assert_eq!(customers.post("/api/v1/auth/refresh", json!({ "refresh_token": 1 })).status, 422);
    for token in ["", "x", &"A".repeat(43), &"A".repeat(100_000)] {
        assert_eq!(customers.refresh(token).status, 401);
    }
}

#[test]
fn one_kind_of_token_is_not_taken_for_the_other() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    assert_eq!(customers.status_with(&tokens.refresh), 401);
    assert_eq!(customers.refresh(&tokens.access).status, 401);
}

#[test]
fn failed_logins_have_to_pause_and_the_owner_elsewhere_does_not() {
    let customers = Customers::new();
    let (email, _) = customers.register();
    let login = |client: &str, password: &str| {
        let body = json!({ "email": email, "password": password }).to_string();
        customers.ask("POST", "/api/v1/auth/login", &[("X-Real-IP", client)], &body)
    };
    let statuses: Vec<u16> = (0..8).map(|_| login("192.0.2.1", "wrong password").status).collect();
    assert_eq!(statuses, [401, 401, 401, 401, 401, 401, 429, 429]);
    let paused = login("192.0.2.1", PASSWORD);
    assert_eq!(paused.status, 429, "also with the right password");
    assert_eq!(paused.header("Retry-After"), Some("1"));
    assert_eq!(login("192.0.2.2", PASSWORD).status, 200);
}

#[test]
fn a_guess_of_the_current_password_has_to_pause_as_well() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    let guess = json!({ "current_password": "wrong password", "new_password": "another password" });
    let set =
        || customers.send("PUT", "/api/v1/users/me/password", Some(&tokens.access), &guess).status;
    let statuses: Vec<u16> = (0..7).map(|_| set()).collect();
    assert_eq!(statuses, [403, 403, 403, 403, 403, 403, 429]);
}

#[test]
fn wrong_passwords_of_others_do_not_keep_a_customer_from_changing_the_own() {
    let customers = Customers::new();
    let (_, victim) = customers.customer();
    let set = |tokens: &Tokens, client: &str, current: &str| {
        let bearer = format!("Bearer {}", tokens.access);
        let headers = [("Authorization", bearer.as_str()), ("X-Real-IP", client)];
        let body = json!({ "current_password": current, "new_password": "another password" });
        let path = "/api/v1/users/me/password";
        customers.ask("PUT", path, &headers, &body.to_string()).status
    };
    for _ in 0..7 {
        let (_, stranger) = customers.customer();
        for _ in 0..5 {
            set(&stranger, "192.0.2.1", "wrong password");
        }
    }
    // The stranger's address has to pause; that of the victim does not.
    let (_, stranger) = customers.customer();
    assert_eq!(set(&stranger, "192.0.2.1", PASSWORD), 429);
    assert_eq!(set(&victim, "192.0.2.2", PASSWORD), 204);
}

#[test]
fn failed_logins_at_a_user_name_of_digits_do_not_count_for_the_account_of_that_id() {
    let customers = Customers::new();
    let (id, tokens) = customers.customer();
    for number in 0..40 {
        let body = json!({ "username": id.to_string(), "password": "wrong password" }).to_string();
        let client = format!("192.0.2.{number}");
        let headers = [("X-Real-IP", client.as_str())];
        assert_eq!(customers.ask("POST", "/api/v1/auth/login", &headers, &body).status, 401);
        if number >= 20 {
            break;
        }
    }
    let set = json!({ "current_password": PASSWORD, "new_password": "another password" });
    let path = "/api/v1/users/me/password";
    assert_eq!(customers.send("PUT", path, Some(&tokens.access), &set).status, 204);
}

#[test]
fn each_invalid_field_is_named_once() {
    let customers = Customers::new();
    let (_, tokens) = customers.customer();
    let token = Some(tokens.access.as_str());
    let errors = |method: &str, path: &str, token: Option<&str>, body: &str| -> Vec<String> {
        let bearer = format!("Bearer {}", token.unwrap_or_default());
        let headers = [("Authorization", bearer.as_str())];
        let reply = customers.ask(method, path, &headers[..token.iter().count()], body);
        assert_eq!(reply.status, 422, "{method} {path} {body}: {}", reply.body);
        let errors = reply.json()["errors"].clone();
        let fields = errors.as_array().unwrap().iter();
        fields.map(|error| error["field"].as_str().unwrap().to_owned()).collect()
    };
    let password = "/api/v1/users/me/password";
    for body in [
        r#"{"current_password":1,"new_password":"\u0000 a long password"}"#,
        r#"{"current_password":"\ud800 password","new_password":"\ud800 a long password"}"#,
        r#"{"new_password":"short"}"#,
        r#"{"new_password":null}"#,
        r#"{"current_password":null,"new_password":[]}"#,
        "{}",
    ] {
        let named = errors("PUT", password, token, body);
        assert_eq!(named, ["current_password", "new_password"], "{body}");
    }
    for (body, fields) in [
        (r#"{"email":"a@b","password":"\u0000 a long password"}"#, &["password"][..]),
        (r#"{"email":"a@b","password":""}"#, &["password"]),
        (r#"{"email":"a@b","password":null}"#, &["password"]),
        (r#"{"email":{},"password":7,"is_admin":null}"#, &["email", "password", "is_admin"]),
        (
            r#"{"email":"a@b@c","password":"a@b@c","username":"a@b"}"#,
            &["email", "password", "username"],
        ),
    ] {
        let mut named = errors("POST", "/api/v1/users", None, body);
        let mut fields = fields.to_vec();
        named.sort_unstable();
        fields.sort_unstable();
        assert_eq!(named, fields, "{body}");
    }
    let body = r#"{"email":"a","email":"b"}"#;
    assert_eq!(errors("POST", "/api/v1/users", None, body), ["body"]);
    assert_eq!(
        errors("PATCH", "/api/v1/users/me", token, r#"{"username":"a\u0000"}"#),
        ["username"]
    );
}

#[test]
fn a_disabled_account_is_answered_as_an_unknown_one() {
    let customers = Customers::new();
    let (email, id) = customers.register();
    let disable = "update users set disabled = true where id = $1";
    customers.superuser().execute(disable, &[&id]).unwrap();
    let unknown = customers.try_login("unknown@example.org", PASSWORD);
    let disabled = customers.try_login(&email, PASSWORD);
    assert_eq!((disabled.status, &disabled.body), (401, &unknown.body));
}

#[test]
fn an_answer_never_shows_a_password_or_its_hash() {
    let customers = Customers::new();
    let (_, admin) = customers.administrator();
    let (id, tokens) = customers.customer();
    for (path, token) in [
        ("/api/v1/users/me".to_owned(), &tokens.access),
        ("/api/v1/auth/session".to_owned(), &tokens.access),
        (format!("/api/v1/users/{id}"), &admin.access),
        ("/api/v1/users".to_owned(), &admin.access),
    ] {
        let reply = customers.get(&path, Some(token));
        assert_eq!(reply.status, 200);
        assert!(!reply.body.contains("argon2") && !reply.body.contains(PASSWORD), "{}", reply.body);
    }
    let internal: Value = customers.internal(&format!("/internal/users/{id}")).json();
    let names: Vec<&String> = internal.as_object().unwrap().keys().collect();
    assert_eq!(
        names,
        ["id", "name", "email", "shipping_address", "billing_address", "payment_method", "state"]
    );
}

#[test]
fn an_error_of_the_database_names_no_value_of_the_row() {
    let customers = Customers::new();
    let refused = customers.app.db.write(|db| {
        let insert = "insert into users (email, email_key, password_hash) values ($1, $1, $1)";
        db.client.execute(insert, &[&"x"])
    });
    // For the log: the error with all its causes.
    let error = format!("{:#}", anyhow::Error::from(refused.unwrap_err()));
    assert!(error.contains("users_email_check (23514)") || error.contains("(23514)"), "{error}");
    assert!(!error.contains("DETAIL") && !error.contains("(x,"), "{error}");
}

#[test]
fn without_its_database_the_service_answers_503_and_recovers() {
    let customers = Customers::new();
    let (email, _) = customers.register();
    let tokens = customers.login(&email);
    let mut admin = chassis::testing::connect_as_superuser("postgres");
    let name = &customers.db.name;
    let allow = |admin: &mut Client, allowed: bool| {
        admin.batch_execute(&format!("alter database {name} allow_connections {allowed}")).unwrap();
    };
    allow(&mut admin, false);
    let end = "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1";
    admin.execute(end, &[name]).unwrap();
    eventually("the database is away", 10, || {
        (customers.status_with(&tokens.access) == 503).then_some(())
    });
    assert_eq!(customers.try_login(&email, PASSWORD).status, 503);
    let register = json!({ "email": "new@example.org", "password": PASSWORD });
    assert_eq!(customers.post("/api/v1/users", register).status, 503);
    assert_eq!(customers.get("/health/ready", None).status, 503);
    allow(&mut admin, true);
    eventually("all is well again", 20, || {
        (customers.status_with(&tokens.access) == 200).then_some(())
    });
    assert_eq!(customers.try_login(&email, PASSWORD).status, 200);
}
