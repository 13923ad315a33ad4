//! Movies.

use std::fmt::Write as _;
use std::io::Read as _;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use chassis::db;
use chassis::testing::http::Reply;
use chassis::testing::{TestDb, eventually, test_var};
use inventory::App;
use postgres::{Client, NoTls};
use serde_json::{Value, json};

use crate::{Store, app, ask, config, ids, respond};

/// A catalogue of this test's own, empty, and the service in front of it.
fn inventory() -> (App, TestDb) {
    let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    (app(config(&db.name)), db)
}

fn get(app: &App, path: &str) -> Reply {
    ask(app, "GET", path, &[], "")
}

fn post(app: &App, body: &Value) -> Reply {
    ask(app, "POST", "/api/movies", &[], &body.to_string())
}

fn put(app: &App, path: &str, body: &Value) -> Reply {
    ask(app, "PUT", path, &[], &body.to_string())
}

/// So many movies, `Movie 1` with `plot 1` and so on.
fn fill(db: &TestDb, movies: i64) {
    let fill = "insert into movies (title, description)
        select 'Movie ' || n, 'plot ' || n
        from generate_series(1, $1::bigint) as n";
    db.superuser().execute(fill, &[&movies]).unwrap();
}

/// Ends every connection of the service.
fn cut(admin: &mut Client) {
    let cut = "select pg_terminate_backend(pid)
        from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid()";
    admin.execute(cut, &[]).unwrap();
}

/// Ends every connection of the service and lets it make no new one.
fn shut(admin: &mut Client, db: &TestDb) {
    admin.batch_execute(&format!("revoke connect on database {} from public", db.name)).unwrap();
    cut(admin);
}

// --- one movie ----------------------------------------------------------------

#[test]
fn a_movie_is_added_shown_changed_and_deleted() {
    let (app, _db) = inventory();
    let added = post(&app, &json!({ "title": "Metropolis", "description": "1927" }));
    assert_eq!(added.status, 201);
    assert_eq!(added.body, r#"{"id":1,"title":"Metropolis","description":"1927"}"#);
    assert_eq!(added.header("Location"), Some("/api/movies/1"));
    assert_eq!(added.header("Content-Type"), Some("application/json; charset=utf-8"));

    for path in ["/api/movies/1", "/api/movies/1/", "/api/movies/1?x=1"] {
        let shown = get(&app, path);
        assert_eq!((shown.status, &shown.body), (200, &added.body), "{path}");
        assert_eq!(shown.etag(), added.etag());
    }
    for path in ["/api/movies", "/api/movies/"] {
        let listed = get(&app, path);
        assert_eq!((listed.status, listed.body), (200, format!("[{}]", added.body)), "{path}");
    }

    let changed = put(&app, "/api/movies/1/", &json!({ "title": " M " }));
    assert_eq!(changed.status, 200);
    assert_eq!(changed.body, r#"{"id":1,"title":"M","description":"1927"}"#);
    assert_eq!(get(&app, "/api/movies/1").body, changed.body);
    let changed = put(&app, "/api/movies/1", &json!({ "description": "", "id": 9, "x": null }));
    assert_eq!(changed.body, r#"{"id":1,"title":"M","description":""}"#);

    let deleted = ask(&app, "DELETE", "/api/movies/1", &[], "");
    assert_eq!(deleted.status, 200);
    assert_eq!(deleted.body, r#"{"message":"Movie was deleted successfully.","id":1}"#);
    assert_eq!(get(&app, "/api/movies/1").status, 404);
    assert_eq!(get(&app, "/api/movies").body, "[]");
    // The id of a deleted movie is not given out again.
    assert_eq!(post(&app, &json!({ "title": "M" })).json()["id"], 2);
}

#[test]
fn text_is_stored_byte_for_byte() {
    let (app, db) = inventory();
    let mut admin = db.superuser();
    let every_control: String = (1..=0x9fu8).map(char::from).collect();
    let long = "🎬é\u{200f}\"\\".repeat(2000);
    for text in [
        r#"'; drop table movies; -- "x" \ % _ $1 {} <b>&amp;"#,
        "🎬👩‍🚀 \u{1F1FA}\u{1F1F3}",
        "\u{202b}\u{200f}שלום עולם\u{202c} مرحبا",
        "e\u{301} is not é; \u{feff} \u{fffd} \u{ffff} \u{10ffff}",
        "Zażółć\r\n\tgęślą\u{2028}jaźń",
        &every_control,
        &long,
    ] {
        let title: String = text.trim().chars().take(255).collect();
        let title = title.trim();
        let added = post(&app, &json!({ "title": title, "description": text }));
        assert_eq!(added.status, 201, "{}", added.body);
        let id = added.json()["id"].as_i64().unwrap();
        let shown = get(&app, &format!("/api/movies/{id}"));
        assert_eq!(shown.body, added.body);
        assert_eq!(shown.json(), json!({ "id": id, "title": title, "description": text }));
        let found = get(&app, &format!("/api/movies?after={}&limit=1", id - 1));
        assert_eq!(found.body, format!("[{}]", added.body));
        let stored = "select convert_to(title, 'UTF8'), convert_to(description, 'UTF8')
            from movies
            where id = $1";
        let stored = admin.query_one(stored, &[&id]).unwrap();
        assert_eq!(stored.get::<_, &[u8]>(0), title.as_bytes());
        assert_eq!(stored.get::<_, &[u8]>(1), text.as_bytes());
    }
}

#[test]
fn a_title_is_trimmed_and_a_description_is_not() {
    let (app, _db) = inventory();
    let body = json!({ "title": "\u{3000}\u{a0} \n M \t\u{2003}", "description": " \n x \t" });
    assert_eq!(post(&app, &body).body, r#"{"id":1,"title":"M","description":" \n x \t"}"#);
    assert_eq!(put(&app, "/api/movies/1", &body).json()["title"], "M");
}

#[test]
fn the_longest_texts_fit() {
    let (app, _db) = inventory();
    for char in ["a", "é", "🎬", "\u{1}"] {
        let body = json!({ "title": char.repeat(255), "description": char.repeat(10_000) });
        let added = post(&app, &body);
        assert_eq!(added.status, 201, "{char}");
        assert_eq!(added.json()["description"], body["description"]);
    }
}

#[test]
fn what_cannot_be_is_refused_with_every_field_at_fault() {
    let (app, _db) = inventory();
    assert_eq!(post(&app, &json!({ "title": "here" })).status, 201);
    let title_256 = json!({ "title": "é".repeat(256) }).to_string();
    let plot_10001 = json!({ "title": "a", "description": "🎬".repeat(10_001) }).to_string();
    let refusals: &[(&str, &str, &str, u16, &[&str])] = &[
        ("POST", "/api/movies", "", 400, &[]),
        ("POST", "/api/movies", "{", 400, &[]),
        ("POST", "/api/movies", r#"{"title":"a"} x"#, 400, &[]),
        ("POST", "/api/movies", r#"{"title":"\ud800"}"#, 422, &["title"]),
        ("POST", "/api/movies", r#"{"title":"a","title":"b"}"#, 422, &["body"]),
        ("POST", "/api/movies", "null", 422, &["body"]),
        ("POST", "/api/movies", r#"["title"]"#, 422, &["body"]),
        ("POST", "/api/movies", "{}", 422, &["title"]),
        ("POST", "/api/movies", r#"{"Title":"a"}"#, 422, &["title"]),
        ("POST", "/api/movies", r#"{"title":null}"#, 422, &["title"]),
        ("POST", "/api/movies", r#"{"title":7}"#, 422, &["title"]),
        ("POST", "/api/movies", r#"{"title":["a"]}"#, 422, &["title"]),
        ("POST", "/api/movies", r#"{"title":""}"#, 422, &["title"]),
        ("POST", "/api/movies", r#"{"title":" \u3000\n"}"#, 422, &["title"]),
        ("POST", "/api/movies", r#"{"title":"a\u0000b"}"#, 422, &["title"]),
        ("POST", "/api/movies", &title_256, 422, &["title"]),
        ("POST", "/api/movies", &plot_10001, 422, &["description"]),
        ("POST", "/api/movies", r#"{"title":"a","description":null}"#, 422, &["description"]),
        ("POST", "/api/movies", r#"{"title":"a","description":1}"#, 422, &["description"]),
        ("POST", "/api/movies", r#"{"title":"a","description":"\u0000"}"#, 422, &["description"]),
        ("POST", "/api/movies", r#"{"description":{}}"#, 422, &["title", "description"]),
        ("PUT", "/api/movies/1", "", 400, &[]),
        ("PUT", "/api/movies/1", "[]", 422, &["body"]),
        ("PUT", "/api/movies/1", "{}", 422, &["body"]),
        ("PUT", "/api/movies/1", r#"{"id":2}"#, 422, &["body"]),
        ("PUT", "/api/movies/1", r#"{"title":null}"#, 422, &["title"]),
        ("PUT", "/api/movies/1", r#"{"title":"  "}"#, 422, &["title"]),
        ("PUT", "/api/movies/1", &title_256, 422, &["title"]),
        ("PUT", "/api/movies/1", r#"{"description":null}"#, 422, &["description"]),
        (
            "PUT",
            "/api/movies/1",
            r#"{"title":1,"description":"\u0000"}"#,
            422,
            &["title", "description"],
        ),
        ("PUT", "/api/movies/2", r#"{"title":"a"}"#, 404, &[]),
        ("GET", "/api/movies/2", "", 404, &[]),
        ("DELETE", "/api/movies/2", "", 404, &[]),
        ("PUT", "/api/movies/0", "not read", 404, &[]),
        ("GET", "/api/movies?limit=0", "", 422, &["limit"]),
        ("GET", "/api/movies?limit=1001", "", 422, &["limit"]),
        ("GET", "/api/movies?limit=", "", 422, &["limit"]),
        ("GET", "/api/movies?limit=%2B5", "", 422, &["limit"]),
        ("GET", "/api/movies?limit=-1", "", 422, &["limit"]),
        ("GET", "/api/movies?limit=5.0", "", 422, &["limit"]),
        ("GET", "/api/movies?limit=99999999999999999999", "", 422, &["limit"]),
        ("GET", "/api/movies?after=-1", "", 422, &["after"]),
        ("GET", "/api/movies?after=9223372036854775808", "", 422, &["after"]),
        ("GET", "/api/movies?after=x&limit=x&title=%00", "", 422, &["title", "limit", "after"]),
        ("GET", "/api/movies?title=a&title=b", "", 422, &["title"]),
        ("GET", "/api/movies?title=%FF", "", 400, &[]),
        ("GET", "/api/movies?x=%C3%28", "", 400, &[]),
        ("PATCH", "/api/movies", "", 405, &[]),
        ("POST", "/api/movies/1", "{}", 405, &[]),
        ("PUT", "/api/movies", "{}", 405, &[]),
        ("GET", "/api/movies/1/cast", "", 404, &[]),
        ("GET", "/api", "", 404, &[]),
    ];
    for (method, path, body, status, fields) in refusals {
        let reply = ask(&app, method, path, &[], body);
        let case = format!("{method} {path} {body:.60}: {}", reply.body);
        assert_eq!(reply.status, *status, "{case}");
        assert_eq!(reply.header("Content-Type"), Some("application/problem+json"), "{case}");
        let problem = reply.json();
        assert_eq!(problem["error"], problem["detail"], "{case}");
        let invalid: Vec<&str> = problem["errors"].as_array().map_or(Vec::new(), |errors| {
            errors.iter().map(|error| error["field"].as_str().unwrap()).collect()
        });
        assert_eq!(&invalid, fields, "{case}");
    }
    assert_eq!(get(&app, "/api/movies").body, r#"[{"id":1,"title":"here","description":""}]"#);
}

#[test]
fn what_is_no_positive_64_bit_integer_is_the_id_of_nothing() {
    let (app, _db) = inventory();
    for id in [
        "0",
        "-1",
        "+1",
        "1.0",
        "1e3",
        "abc",
        "%31",
        "9223372036854775808",
        "9".repeat(40).as_str(),
    ] {
        for method in ["GET", "PUT", "DELETE"] {
            let reply = ask(&app, method, &format!("/api/movies/{id}"), &[], r#"{"title":"a"}"#);
            assert_eq!((reply.status, &reply.json()["detail"]), (404, &json!("Movie not found")));
        }
    }
    assert_eq!(get(&app, "/api/movies/9223372036854775807").status, 404);
}

#[test]
fn the_body_of_a_get_or_delete_is_ignored() {
    let (app, db) = inventory();
    fill(&db, 2);
    for (method, path) in [
        ("GET", "/api/movies"),
        ("GET", "/api/movies/2"),
        ("DELETE", "/api/movies/2"),
        ("DELETE", "/api/movies"),
    ] {
        let headers = [("Content-Type", "text/plain")];
        assert_eq!(ask(&app, method, path, &headers, "{not json").status, 200, "{method} {path}");
    }
}

#[test]
fn a_body_is_json_by_default_and_nothing_else_is_taken() {
    let (app, _db) = inventory();
    for (content_type, status) in [
        ("application/json", 201),
        ("application/json; charset=utf-8", 201),
        ("application/vnd.movie+json", 201),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ] {
        let headers = [("Content-Type", content_type)];
        let reply = ask(&app, "POST", "/api/movies", &headers, r#"{"title":"a"}"#);
        assert_eq!(reply.status, status, "{content_type}");
    }
}

#[test]
fn head_options_and_405_tell_what_a_path_knows() {
    let (app, _db) = inventory();
    assert_eq!(post(&app, &json!({ "title": "a" })).status, 201);
    for (path, allow) in [
        ("/api/movies", "GET, POST, DELETE, HEAD, OPTIONS"),
        ("/api/movies/1", "GET, PUT, DELETE, HEAD, OPTIONS"),
    ] {
        assert_eq!(ask(&app, "HEAD", path, &[], "").status, 200);
        let options = ask(&app, "OPTIONS", path, &[], "");
        assert_eq!((options.status, options.header("Allow")), (204, Some(allow)));
        let patch = ask(&app, "PATCH", path, &[], "");
        assert_eq!((patch.status, patch.header("Allow")), (405, Some(allow)));
    }
}

#[test]
fn deleting_all_movies_tells_how_many_and_starts_the_ids_again() {
    let (app, db) = inventory();
    let none = ask(&app, "DELETE", "/api/movies", &[], "");
    assert_eq!(none.body, r#"{"message":"Successfully deleted all 0 movies.","deleted":0}"#);
    fill(&db, 12);
    // The list has no tag: a condition that names one cannot hold.
    let conditional = ask(&app, "DELETE", "/api/movies", &[("If-Match", "\"1\"")], "");
    assert_eq!((conditional.status, get(&app, "/api/movies/12").status), (412, 200));
    let all = ask(&app, "DELETE", "/api/movies/", &[], "");
    assert_eq!(all.status, 200);
    assert_eq!(all.body, r#"{"message":"Successfully deleted all 12 movies.","deleted":12}"#);
    assert_eq!(get(&app, "/api/movies").body, "[]");
    assert_eq!(post(&app, &json!({ "title": "first again" })).json()["id"], 1);
}

#[test]
fn a_deletion_of_all_with_a_query_is_refused_and_deletes_nothing() {
    let (app, db) = inventory();
    fill(&db, 3);
    for query in ["id=2", "title=Movie%202", "limit=1", "after=2", "x", "=", "&"] {
        for path in ["/api/movies", "/api/movies/"] {
            let refused = ask(&app, "DELETE", &format!("{path}?{query}"), &[], "");
            assert_eq!(refused.status, 422, "{path}?{query}: {}", refused.body);
            assert!(refused.body.contains("deletes all movies"), "{}", refused.body);
        }
    }
    assert_eq!(ids(&get(&app, "/api/movies")), [1, 2, 3]);
    assert_eq!(ask(&app, "DELETE", "/api/movies?", &[], "").status, 200);
}

// --- versions -----------------------------------------------------------------

#[test]
fn a_version_that_the_client_has_is_not_sent_again() {
    let (app, _db) = inventory();
    let etag = post(&app, &json!({ "title": "a" })).etag().to_owned();
    assert!(etag.starts_with('"') && etag.ends_with('"') && etag.len() > 2, "{etag}");
    let weak = format!("W/{etag}");
    let list = format!("\"other\" , {weak}, \"x\"");
    for (sent, status) in [
        (etag.as_str(), 304),
        (&weak, 304),
        (&list, 304),
        ("*", 304),
        ("\"other\"", 200),
        (etag.trim_matches('"'), 200),
        ("garbage", 200),
    ] {
        let reply = ask(&app, "GET", "/api/movies/1", &[("if-none-match", sent)], "");
        assert_eq!((reply.status, reply.etag()), (status, etag.as_str()), "{sent}");
        assert_eq!(reply.body.is_empty(), status == 304, "{sent}");
        assert_eq!(reply.header("Content-Type").is_none(), status == 304, "{sent}");
    }
    let two_lines = [("If-None-Match", "\"other\""), ("If-None-Match", etag.as_str())];
    assert_eq!(ask(&app, "GET", "/api/movies/1", &two_lines, "").status, 304);
    let changed = put(&app, "/api/movies/1", &json!({ "title": "b" }));
    assert_ne!(changed.etag(), etag);
    let reply = ask(&app, "GET", "/api/movies/1", &[("If-None-Match", &etag)], "");
    assert_eq!((reply.status, reply.etag()), (200, changed.etag()));
    assert_eq!(ask(&app, "GET", "/api/movies/2", &[("If-None-Match", "*")], "").status, 404);
}

#[test]
fn a_get_or_head_with_an_if_match_of_another_version_is_412() {
    let (app, _db) = inventory();
    let stale = post(&app, &json!({ "title": "a" })).etag().to_owned();
    let current = put(&app, "/api/movies/1", &json!({ "title": "b" })).etag().to_owned();
    let (weak, list) = (format!("W/{current}"), format!("{stale}, {current}"));
    for method in ["GET", "HEAD"] {
        for (sent, status) in [
            ("\"other\"", 412),
            (stale.as_str(), 412),
            (&weak, 412),
            (&current, 200),
            (&list, 200),
            ("*", 200),
            ("garbage", 400),
        ] {
            let reply = ask(&app, method, "/api/movies/1", &[("If-Match", sent)], "");
            assert_eq!(reply.status, status, "{method} {sent}: {}", reply.body);
        }
        // If-Match is looked at first (RFC 9110 section 13.2.2).
        let both = [("If-Match", stale.as_str()), ("If-None-Match", &current)];
        assert_eq!(ask(&app, method, "/api/movies/1", &both, "").status, 412);
        assert_eq!(ask(&app, method, "/api/movies/2", &[("If-Match", "*")], "").status, 404);
    }
}

#[test]
fn a_tag_of_another_cluster_or_timeline_matches_nothing() {
    let (app, _db) = inventory();
    let current = post(&app, &json!({ "title": "a" })).etag().to_owned();
    // The same transaction number after another cluster, and without any.
    let (cluster, version) = current.trim_matches('"').split_once('-').unwrap();
    let other = format!("\"{:x}-{version}\"", u64::from_str_radix(cluster, 16).unwrap() ^ 1);
    for tag in [other, format!("\"{version}\""), format!("\"-{version}\"")] {
        for method in ["GET", "PUT", "DELETE"] {
            let headers = [("If-Match", tag.as_str())];
            let reply = ask(&app, method, "/api/movies/1", &headers, r#"{"title":"b"}"#);
            assert_eq!(reply.status, 412, "{method} {tag}");
        }
        let read = ask(&app, "GET", "/api/movies/1", &[("If-None-Match", tag.as_str())], "");
        assert_eq!((read.status, &read.json()["title"]), (200, &json!("a")), "{tag}");
    }
}

#[test]
fn a_change_or_deletion_with_a_stale_tag_is_refused() {
    let (app, _db) = inventory();
    let long = json!({ "title": "a", "description": "🎬é".repeat(5000) });
    let stale = post(&app, &long).etag().to_owned();
    let mut current = put(&app, "/api/movies/1", &json!({ "title": "b" })).etag().to_owned();
    assert_eq!(get(&app, "/api/movies/1").etag(), current);
    let body = r#"{"title":"c"}"#;

    let weak = format!("W/{current}");
    for (sent, status) in [
        (stale.as_str(), 412),
        (&weak, 412),
        ("\"\"", 412),
        ("garbage", 400),
        ("", 400),
        (current.trim_matches('"'), 400),
    ] {
        for method in ["PUT", "DELETE"] {
            let reply = ask(&app, method, "/api/movies/1", &[("If-Match", sent)], body);
            assert_eq!(reply.status, status, "{method} {sent}: {}", reply.body);
        }
    }
    assert_eq!(get(&app, "/api/movies/1").json()["title"], "b");

    for list in [format!("{stale}, {current}"), "*".to_owned()] {
        let sent = list.replace(&stale, &current);
        let reply = ask(&app, "PUT", "/api/movies/1", &[("If-Match", &sent)], body);
        assert_eq!(reply.status, 200, "{sent}");
        assert_ne!(reply.etag(), current);
        reply.etag().clone_into(&mut current);
    }
    // There is no version of a movie that is not there.
    for (sent, method) in [("*", "PUT"), ("*", "DELETE"), (&stale, "PUT"), (&stale, "DELETE")] {
        let reply = ask(&app, method, "/api/movies/2", &[("If-Match", sent)], body);
        assert_eq!(reply.status, 404, "{method} {sent}");
    }
    let deleted = ask(&app, "DELETE", "/api/movies/1", &[("If-Match", &current)], "");
    assert_eq!(deleted.status, 200);
}

#[test]
fn a_change_or_deletion_may_demand_that_a_version_is_not_there() {
    let (app, _db) = inventory();
    let stale = post(&app, &json!({ "title": "a" })).etag().to_owned();
    let current = put(&app, "/api/movies/1", &json!({ "title": "b" })).etag().to_owned();
    let body = r#"{"title":"c"}"#;
    let (weak, list) = (format!("W/{current}"), format!("{stale}, {current}"));
    for (sent, status) in
        [("*", 412), (current.as_str(), 412), (&weak, 412), (&list, 412), ("garbage", 400)]
    {
        for method in ["PUT", "DELETE"] {
            let reply = ask(&app, method, "/api/movies/1", &[("If-None-Match", sent)], body);
            assert_eq!(reply.status, status, "{method} {sent}: {}", reply.body);
        }
    }
    // Both must hold.
    let both = [("If-Match", current.as_str()), ("If-None-Match", "*")];
    assert_eq!(ask(&app, "PUT", "/api/movies/1", &both, body).status, 412);
    let all = ask(&app, "DELETE", "/api/movies", &[("If-None-Match", "*")], "");
    assert_eq!(all.status, 412, "the list is there");
    assert_eq!(get(&app, "/api/movies/1").json()["title"], "b");

    let missing = ask(&app, "PUT", "/api/movies/2", &[("If-None-Match", "*")], body);
    assert_eq!(missing.status, 404);
    let changed = ask(&app, "PUT", "/api/movies/1", &[("If-None-Match", &stale)], body);
    assert_eq!((changed.status, &changed.json()["title"]), (200, &json!("c")));
    let deleted = ask(&app, "DELETE", "/api/movies/1", &[("If-None-Match", &current)], "");
    assert_eq!(deleted.status, 200);
}

#[test]
fn of_concurrent_changes_with_if_match_none_is_lost() {
    let (app, _db) = inventory();
    assert_eq!(post(&app, &json!({ "title": "0" })).status, 201);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut counted = 0;
                while counted < 25 {
                    let seen = get(&app, "/api/movies/1");
                    let count: u32 = seen.json()["title"].as_str().unwrap().parse().unwrap();
                    let body = json!({ "title": (count + 1).to_string() }).to_string();
                    let headers = [("If-Match", seen.etag())];
                    match ask(&app, "PUT", "/api/movies/1", &headers, &body).status {
                        200 => counted += 1,
                        status => assert_eq!(status, 412),
                    }
                }
            });
        }
    });
    assert_eq!(get(&app, "/api/movies/1").json()["title"], "100");
}

#[test]
fn of_concurrent_changes_to_different_fields_none_is_lost() {
    let (app, _db) = inventory();
    assert_eq!(post(&app, &json!({ "title": "0", "description": "0" })).status, 201);
    thread::scope(|scope| {
        for field in ["title", "description"] {
            let app = &app;
            scope.spawn(move || {
                for count in 1..=50 {
                    let body = json!({ field: count.to_string() });
                    let reply = put(app, "/api/movies/1", &body);
                    assert_eq!(reply.json()[field], body[field]);
                }
            });
        }
    });
    assert_eq!(get(&app, "/api/movies/1").body, r#"{"id":1,"title":"50","description":"50"}"#);
}

// --- the list -----------------------------------------------------------------

#[test]
fn a_title_is_found_by_any_part_of_it_as_it_stands() {
    let (app, _db) = inventory();
    let titles = [
        "The Matrix",
        "AMÉLIE Poulain",
        "100% Wolf",
        "snake_case",
        r"back\slash",
        "a=b&c+d",
        "it's \"quoted\"",
        "НОЧНОЙ Дозор",
        "千と千尋の神隠し",
        "🎬 action",
    ];
    for title in titles {
        assert_eq!(post(&app, &json!({ "title": title })).status, 201);
    }
    for (part, found) in [
        ("matrix", vec![1]),
        ("MATRIX", vec![1]),
        ("trix", vec![1]),
        ("e+m", vec![1]),
        ("e%20M", vec![1]),
        ("am%C3%A9lie", vec![2]),
        ("amélie", vec![2]),
        ("amelie", vec![]),
        ("%25", vec![3]),
        ("0%25%20w", vec![3]),
        ("_", vec![4]),
        ("e_C", vec![4]),
        ("%5C", vec![5]),
        ("k%5Cs", vec![5]),
        ("=", vec![6]),
        ("a%3Db%26c%2Bd", vec![6]),
        ("'", vec![7]),
        ("%22quoted", vec![7]),
        ("ночной", vec![8]),
        ("千尋", vec![9]),
        ("%F0%9F%8E%AC", vec![10]),
        ("back_slash", vec![]),
        ("nothing", vec![]),
        ("", (1..=10).collect()),
        ("%zz", vec![]),
    ] {
        let reply = get(&app, &format!("/api/movies?x=1&title={part}"));
        assert_eq!((reply.status, ids(&reply)), (200, found), "{part}");
    }
    assert_eq!(get(&app, "/api/movies?title=nothing").body, "[]");
    assert_eq!(ids(&get(&app, "/api/movies?title=a&limit=1&after=1")), [2]);
}

#[test]
fn the_pages_that_links_lead_to_hold_every_movie_once_and_in_order() {
    let (app, db) = inventory();
    fill(&db, 1300);
    let gaps = "delete from movies where id % 7 = 0 or id between 400 and 480";
    db.superuser().batch_execute(gaps).unwrap();
    let all = ids(&get(&app, "/api/movies"));
    assert!(all.is_sorted() && all.len() > 1000);
    let with_1 = ids(&get(&app, "/api/movies?title=movie%201"));
    for (start, limit, expected) in [
        ("/api/movies?limit=50", 50, &all[..]),
        ("/api/movies?limit=1000", 1000, &all),
        ("/api/movies/?after=100&limit=333", 333, &all[86..]),
        ("/api/movies?limit=17&title=movie+1", 17, &with_1),
    ] {
        let (mut walked, mut path) = (Vec::new(), Some(start.to_owned()));
        while let Some(next) = path {
            let page = get(&app, &next);
            path = page.next();
            let ids = ids(&page);
            assert!(ids.len() == limit || path.is_none(), "{next}");
            walked.extend(ids);
        }
        assert_eq!(walked, expected, "{start}");
    }
    assert_eq!(get(&app, "/api/movies").next(), None);
    assert_eq!(ids(&get(&app, "/api/movies?after=1299")), [1300]);
    assert_eq!(get(&app, "/api/movies?after=9223372036854775807&limit=1").body, "[]");
}

#[test]
fn a_link_is_there_just_when_there_is_more() {
    let (app, db) = inventory();
    let mut movies = 0;
    for (wanted, limit) in [
        (0, 1),
        (1, 1),
        (2, 1),
        (499, 500),
        (500, 500),
        (501, 500),
        (999, 1000),
        (1000, 1000),
        (1000, 999),
        (1001, 1000),
    ] {
        fill(&db, wanted - movies);
        movies = wanted;
        let page = get(&app, &format!("/api/movies?limit={limit}"));
        assert_eq!(ids(&page), (1..=movies.min(limit)).collect::<Vec<_>>());
        let next = (movies > limit).then(|| format!("/api/movies?limit={limit}&after={limit}"));
        assert_eq!(page.next(), next, "{movies} movies");
    }
    // Long texts end a page of the database early, not the client's.
    db.superuser().batch_execute("update movies set description = repeat('é', 10000)").unwrap();
    let page = get(&app, "/api/movies?limit=20");
    assert_eq!(ids(&page), (1..=20).collect::<Vec<_>>());
    assert_eq!(page.next().as_deref(), Some("/api/movies?limit=20&after=20"));
}

#[test]
fn a_long_list_holds_no_connection_while_the_client_reads() {
    let (_, db) = inventory();
    fill(&db, 5000);
    let app = app(db::Config { pool_size: 1, ..config(&db.name) });
    let (mut reader, size) = respond(&app, "/api/movies").data.into_reader_and_size();
    assert_eq!(size, None);
    let mut body = Vec::new();
    loop {
        let read = reader.by_ref().take(50_000).read_to_end(&mut body).unwrap();
        if read == 0 {
            break;
        }
        // With one connection in all, this would be a 503 if the list held it.
        assert_eq!(get(&app, "/api/movies/1").status, 200);
    }
    let mut expected = String::new();
    for id in 1..=5000 {
        let start = if id == 1 { '[' } else { ',' };
        write!(expected, r#"{start}{{"id":{id},"title":"Movie {id}","description":"plot {id}"}}"#)
            .unwrap();
    }
    assert_eq!(String::from_utf8(body).unwrap(), expected + "]");
}

#[test]
fn a_short_list_has_a_known_length() {
    let (app, db) = inventory();
    fill(&db, 500);
    let (_, size) = respond(&app, "/api/movies").data.into_reader_and_size();
    assert!(size.is_some());
}

#[test]
fn a_list_whose_database_goes_away_breaks_off_with_an_error() {
    let (app, db) = inventory();
    fill(&db, 5000);
    let (mut reader, _) = respond(&app, "/api/movies").data.into_reader_and_size();
    let mut start = [0; 1000];
    reader.read_exact(&mut start).unwrap();
    shut(&mut db.superuser(), &db);
    let mut rest = Vec::new();
    let err = reader.read_to_end(&mut rest).unwrap_err();
    assert!(err.to_string().contains("the database is not available"), "{err}");
    assert_ne!(rest.last(), Some(&b']'));
}

#[test]
fn a_list_survives_the_loss_of_its_connections() {
    let (app, db) = inventory();
    fill(&db, 5000);
    let mut admin = db.superuser();
    let (mut reader, _) = respond(&app, "/api/movies").data.into_reader_and_size();
    let mut body = Vec::new();
    while reader.by_ref().take(30_000).read_to_end(&mut body).unwrap() > 0 {
        cut(&mut admin);
    }
    let movies: Vec<Value> = serde_json::from_slice(&body).unwrap();
    assert_eq!(movies.len(), 5000);
}

#[test]
fn a_list_waits_its_turn_when_all_connections_are_in_use() {
    let (_, db) = inventory();
    fill(&db, 1000);
    let pool_timeout = Duration::from_millis(500);
    let app = app(db::Config { pool_size: 1, pool_timeout, ..config(&db.name) });
    let (mut reader, _) = respond(&app, "/api/movies").data.into_reader_and_size();
    let mut lock = db.superuser();
    let mut lock = lock.transaction().unwrap();
    lock.batch_execute("lock table movies in access exclusive mode").unwrap();
    let mut body = Vec::new();
    thread::scope(|scope| {
        // This one has the only connection, and waits for the lock with it.
        let other = scope.spawn(|| get(&app, "/api/movies/1").status);
        eventually("the other waits", 5, || {
            let waits = "select
                from pg_locks
                where relation = 'movies'::regclass
                and database = (select oid from pg_database where datname = current_database())
                and not granted";
            lock.query_opt(waits, &[]).unwrap()
        });
        let list = scope.spawn(|| reader.read_to_end(&mut body).unwrap());
        // One refusal shows that a whole timeout has passed.
        assert_eq!(get(&app, "/api/movies/1").status, 503);
        lock.rollback().unwrap();
        assert_eq!(other.join().unwrap(), 200);
        list.join().unwrap();
    });
    assert_eq!(serde_json::from_slice::<Vec<Value>>(&body).unwrap().len(), 1000);
}

#[test]
fn a_rare_title_among_many_is_found_by_the_index() {
    let (app, db) = inventory();
    let mut admin = db.superuser();
    admin
        .batch_execute(
            "insert into movies (title)
             select md5(n::text) || case when n % 10000 = 7 then ' Nosferatu' else '' end
             from generate_series(1, 50000) as n;
             analyze movies",
        )
        .unwrap();
    let fastest = |path: &str, found: &[i64]| {
        let ask = |_| {
            let started = Instant::now();
            assert_eq!(ids(&get(&app, path)), found);
            started.elapsed()
        };
        (0..10).map(ask).min().unwrap()
    };
    let by_index = fastest("/api/movies?title=nosfer", &[7, 10_007, 20_007, 30_007, 40_007]);
    // Too short for trigrams, so every title must be looked at.
    let by_scan = fastest("/api/movies?title=zz", &[]);
    assert!(by_index < by_scan / 5, "index {by_index:?}, scan {by_scan:?}");

    // The server counts when the connections end.
    drop(app);
    cut(&mut admin);
    let scans = "select idx_scan
        from pg_stat_user_indexes
        where indexrelname = 'movies_title_trgm'";
    eventually("ten scans of the index", 20, || {
        let scans: i64 = admin.query_one(scans, &[]).unwrap().get(0);
        (scans == 10).then_some(())
    });
}

#[test]
fn a_title_is_found_in_any_case_and_in_either_unicode_form() {
    let (app, _db) = inventory();
    for title in ["Cafe\u{301} Society", "Όδος", "100% Wolf"] {
        let added = post(&app, &json!({ "title": title }));
        assert_eq!(added.json()["title"], title, "stored as it was sent");
    }
    for (part, expected) in [
        ("caf%C3%A9", vec![1]),
        ("CAFE%CC%81", vec![1]),
        ("cafe%20", vec![]),
        ("%CE%8C%CE%94%CE%9F%CE%A3", vec![2]),
        ("0%25", vec![3]),
        ("_", vec![]),
    ] {
        assert_eq!(ids(&get(&app, &format!("/api/movies?title={part}"))), expected, "{part}");
    }
}

#[test]
fn after_an_import_with_explicit_ids_a_movie_gets_the_next_free_id() {
    let (app, db) = inventory();
    db.superuser()
        .batch_execute(
            "insert into movies (id, title)
             overriding system value
             values (1, 'Alien'), (2, 'Brazil'), (40, 'Casablanca')",
        )
        .unwrap();
    for id in [41, 42] {
        let added = post(&app, &json!({ "title": "Dune" }));
        assert_eq!((added.status, &added.json()["id"]), (201, &json!(id)));
    }
}

#[test]
fn after_an_import_of_the_greatest_possible_id_a_new_movie_is_a_409_that_says_so() {
    let (app, db) = inventory();
    db.superuser()
        .batch_execute(
            "insert into movies (id, title)
             overriding system value
             values (1, 'Alien'), (9223372036854775806, 'Brazil')",
        )
        .unwrap();
    let last = post(&app, &json!({ "title": "Casablanca" }));
    assert_eq!((last.status, &last.json()["id"]), (201, &json!(i64::MAX)));
    for _ in 0..2 {
        let refused = post(&app, &json!({ "title": "Dune" }));
        assert_eq!(refused.status, 409, "{}", refused.body);
        assert!(refused.body.contains("no id is left"), "{}", refused.body);
    }
    // Everything else goes on.
    let changed = put(&app, "/api/movies/9223372036854775807", &json!({ "title": "C" }));
    assert_eq!(changed.status, 200);
    assert_eq!(ids(&get(&app, "/api/movies")), [1, i64::MAX - 1, i64::MAX]);
    assert_eq!(ask(&app, "DELETE", "/api/movies", &[], "").status, 200);
    assert_eq!(post(&app, &json!({ "title": "Dune" })).json()["id"], 1);
}

// --- when the database fails ----------------------------------------------------

#[test]
fn a_database_that_is_away_is_a_503_within_about_a_second() {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let app = app(db::Config { address: nowhere, ..config("none") });
    for (method, path) in [
        ("GET", "/api/movies"),
        ("GET", "/api/movies/1"),
        ("POST", "/api/movies"),
        ("PUT", "/api/movies/1"),
        ("DELETE", "/api/movies/1"),
        ("DELETE", "/api/movies"),
        ("GET", "/health/ready"),
    ] {
        let started = Instant::now();
        let reply = ask(&app, method, path, &[], r#"{"title":"a"}"#);
        assert_eq!(reply.status, 503, "{method} {path}");
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        if path.starts_with("/api") {
            assert_eq!(reply.json()["detail"], "the database is not available");
            assert_eq!(reply.header("Retry-After"), Some("1"));
        }
    }
    assert_eq!(get(&app, "/health").body, r#"{"status":"ok"}"#);
    // A refusal needs no database.
    assert_eq!(post(&app, &json!({})).status, 422);
}

#[test]
fn readiness_follows_the_database() {
    let Store { app, db, .. } = &Store::new();
    let mut admin = db.superuser();
    let ready = get(app, "/health/ready");
    let checks = ready.json()["checks"].clone();
    assert_eq!((ready.status, &checks[0]["name"]), (200, &json!("postgresql")));
    assert_eq!(checks[1]["name"], "revocations");
    shut(&mut admin, db);
    eventually("not ready", 5, || (get(app, "/health/ready").status == 503).then_some(()));
    admin.batch_execute(&format!("grant connect on database {} to public", db.name)).unwrap();
    eventually("ready again", 10, || (get(app, "/health/ready").status == 200).then_some(()));
    assert_eq!(get(app, "/api/movies").status, 200);
}

#[test]
fn a_question_is_asked_again_and_a_change_is_never_made_twice_when_connections_end() {
    let (app, db) = inventory();
    let mut admin = db.superuser();
    let mut added = 0;
    for _ in 0..20 {
        assert_eq!(get(&app, "/api/movies?limit=1").status, 200);
        cut(&mut admin);
        assert_eq!(get(&app, "/api/movies?limit=1").status, 200);
        cut(&mut admin);
        match post(&app, &json!({ "title": "once" })).status {
            201 => added += 1,
            status => assert_eq!(status, 503),
        }
    }
    assert_eq!(ids(&get(&app, "/api/movies")).len(), added);
}

#[test]
fn a_statement_that_takes_too_long_is_a_503() {
    let (_, db) = inventory();
    let statement_timeout = Duration::from_millis(200);
    let app = app(db::Config { statement_timeout, ..config(&db.name) });
    assert_eq!(get(&app, "/api/movies").status, 200);
    let mut admin = db.superuser();
    let mut lock = admin.transaction().unwrap();
    lock.batch_execute("lock table movies in access exclusive mode").unwrap();
    for (method, path) in [("GET", "/api/movies/1"), ("DELETE", "/api/movies")] {
        assert_eq!(ask(&app, method, path, &[], "").status, 503, "{method} {path}");
    }
    lock.rollback().unwrap();
    assert_eq!(get(&app, "/api/movies").status, 200);
}

#[test]
fn the_service_can_do_in_the_database_only_what_it_does() {
    // A copy has not the rights of the original, so this is the original.
    let mut service = config(&test_var("INVENTORY_DB_NAME")).connect().unwrap();
    for statement in [
        "create table mine (id int)",
        "create temporary table mine (id int)",
        "create schema mine",
        "create function mine() returns int language sql as 'select 1'",
        "drop table movies",
        "truncate movies",
        "alter table movies disable trigger all",
        "drop index movies_title_trgm",
        "select setval('movies_id_seq', 1)",
        "select * from schema_migrations",
        "drop function delete_all_movies()",
        "select * from pg_authid",
        "select pg_read_file('/etc/passwd')",
        "copy movies to program 'cat'",
        "create role mine",
        "create database mine",
        "set role movies_owner",
        "alter role matinee_inventory superuser",
    ] {
        let refused = service.batch_execute(statement).expect_err(statement);
        assert_eq!(refused.code().map(|code| code.code()), Some("42501"), "{statement}: {refused}");
    }
    let refused =
        config(&test_var("BILLING_DB_NAME")).connect().err().expect("no way to billing_db");
    assert_eq!(refused.code().map(|code| code.code()), Some("42501"));
    let wrong = postgres::Config::new()
        .host("127.0.0.1")
        .port(test_var("INVENTORY_DB_PORT").parse().unwrap())
        .user(&test_var("INVENTORY_DB_USER"))
        .password("wrong")
        .dbname(&test_var("INVENTORY_DB_NAME"))
        .connect(NoTls);
    assert_eq!(wrong.err().unwrap().code().map(|code| code.code()), Some("28P01"));
}
