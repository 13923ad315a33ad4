//! What administrators may do, and that there is always one.

use std::thread;

use serde_json::{Value, json};

use super::*;

#[test]
fn an_administrator_sees_and_changes_every_account() {
    let customers = Customers::new();
    let (_, admin) = customers.administrator();
    let (id, customer) = customers.customer();
    let path = format!("/api/v1/users/{id}");
    let token = Some(admin.access.as_str());
    assert_eq!(customers.get(&path, token).json()["id"], id);
    let change = json!({ "email": "changed@example.org", "first_name": "By hand" });
    let changed = customers.send("PATCH", &path, token, &change);
    assert_eq!((changed.status, &changed.json()["first_name"]), (200, &json!("By hand")));
    let password = json!({ "new_password": "another password" });
    let set = customers.send("PUT", &format!("{path}/password"), token, &password);
    assert_eq!(set.status, 204);
    assert_eq!(customers.status_with(&customer.access), 401, "its sessions have ended");
    assert_eq!(customers.try_login("changed@example.org", "another password").status, 200);
    assert_eq!(customers.send("DELETE", &path, token, &Value::Null).status, 204);
    assert_eq!(customers.send("DELETE", &path, token, &Value::Null).status, 404);
    assert_eq!(customers.get("/api/v1/users/999999", token).status, 404);
}

#[test]
fn only_an_administrator_gives_the_role_and_it_holds_from_the_next_login() {
    let customers = Customers::new();
    let (_, admin) = customers.administrator();
    let (email, id) = customers.register();
    let customer = customers.login(&email);
    let promote = json!({ "is_admin": true });
    let smuggled = customers.send("PATCH", "/api/v1/users/me", Some(&customer.access), &promote);
    assert_eq!(smuggled.status, 403);
    let body = json!({ "email": "x@example.org", "password": PASSWORD, "is_admin": false });
    assert_eq!(customers.post("/api/v1/users", body).status, 422);

    let path = format!("/api/v1/users/{id}");
    let promoted = customers.send("PATCH", &path, Some(&admin.access), &promote);
    assert_eq!((promoted.status, &promoted.json()["is_admin"]), (200, &json!(true)));
    assert_eq!(customers.status_with(&customer.access), 401, "the token has the old role");
    let token = customers.login(&email).access;
    assert_eq!(customers.get("/api/v1/users", Some(&token)).status, 200);
    customers.send("PATCH", &path, Some(&admin.access), &promote);
    assert_eq!(customers.status_with(&token), 200, "the role has not changed");

    let demote = json!({ "is_admin": false });
    assert_eq!(customers.send("PATCH", &path, Some(&admin.access), &demote).status, 200);
    assert_eq!(customers.get("/api/v1/users", Some(&token)).status, 401);
}

#[test]
fn the_last_administrator_stays_whatever_two_of_them_do_at_once() {
    for delete in [false, true] {
        let customers = Customers::new();
        let pair = [(); 2].map(|()| customers.administrator());
        let statuses: Vec<u16> = thread::scope(|scope| {
            let customers = &customers;
            let threads: Vec<_> = pair
                .iter()
                .map(|(id, tokens)| {
                    let path = format!("/api/v1/users/{id}");
                    scope.spawn(move || match delete {
                        true => customers.send("DELETE", &path, Some(&tokens.access), &Value::Null),
                        false => {
                            let demote = json!({ "is_admin": false });
                            customers.send("PATCH", &path, Some(&tokens.access), &demote)
                        }
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap().status).collect()
        });
        let refused = statuses.iter().filter(|status| **status == 409).count();
        assert_eq!(refused, 1, "delete {delete}: {statuses:?}");
        let count = "select count(*) from users where is_admin and deleted_at is null";
        let left: i64 = customers.superuser().query_one(count, &[]).unwrap().get(0);
        assert_eq!(left, 1, "delete {delete}");
    }
}

#[test]
fn the_list_is_searched_in_any_case_and_read_page_by_page() {
    let customers = Customers::new();
    let (_, admin) = customers.administrator();
    for (number, name) in ["Åsa", "ÅSA", "a_b", "a%b", "axb"].iter().enumerate() {
        let body = json!({
            "email": format!("list{number}@example.org"), "password": PASSWORD, "first_name": name
        });
        assert_eq!(customers.post("/api/v1/users", body).status, 201);
    }
    let token = Some(admin.access.as_str());
    let names = |query: &str| -> Vec<String> {
        let reply = customers.get(&format!("/api/v1/users?{query}"), token);
        assert_eq!(reply.status, 200, "{}", reply.body);
        let items = reply.json()["items"].clone();
        let names = items.as_array().unwrap().iter();
        names.filter_map(|user| user["first_name"].as_str().map(str::to_owned)).collect()
    };
    // The decomposed form of the same letters.
    assert_eq!(names("search=A%CC%8ASA"), ["Åsa", "ÅSA"]);
    assert_eq!(names("search=%25"), ["a%b"]);
    assert_eq!(names("search=a_b"), ["a_b"]);
    assert_eq!(names("search=LIST4%40"), ["axb"]);
    let mut path = "/api/v1/users?limit=2&search=example.org".to_owned();
    let mut seen = 0;
    loop {
        let reply = customers.get(&path, token);
        let page = reply.json();
        seen += page["items"].as_array().unwrap().len();
        let Some(next) = page["next"].as_str() else { break };
        assert_eq!(reply.header("Link"), Some(format!("<{next}>; rel=\"next\"").as_str()));
        path = next.to_owned();
    }
    assert_eq!(seen, 6);
    assert_eq!(customers.get("/api/v1/users?limit=101", token).status, 422);
}
