//! Inventory's program over HTTP on a real PostgreSQL: lengths, locks, migrations, and entity tags
//! after a restore.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use chassis::testing::http::raw;
use chassis::testing::migrations::{Migrator, migrations_of};
use chassis::testing::{SetOnDrop, TestDb, eventually, test_var};
use harness::bodies::movie;
use harness::{Reply, Service, Stack, agent, get, post, send};
use serde_json::json;

use crate::backup::Backup;

const JSON: (&str, &str) = ("Content-Type", "application/json");

/// Inventory with a database of its own.
struct Inventory {
    stack: Stack,
    db: TestDb,
    _service: Service,
}

impl Inventory {
    fn new() -> Inventory {
        let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
        let mut stack = Stack::new();
        stack.set("INVENTORY_DB_NAME", &db.name);
        let _service = stack.start_and_wait("inventory");
        Inventory { stack, db, _service }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.stack.service_url("inventory"))
    }

    fn post(&self, title: &str) -> u16 {
        post(&agent(), &self.url("/api/movies"), &movie(title, "")).unwrap().0
    }

    fn put(&self, path: &str, title: &str, headers: &[(&str, &str)]) -> Reply {
        let headers = [&[JSON], headers].concat();
        send(&agent(), "PUT", &self.url(path), &headers, &movie(title, "")).unwrap()
    }
}

#[test]
fn head_has_the_length_that_get_has_or_none() {
    let inventory = Inventory::new();
    let fill = "insert into movies (title, description)
        select 'Movie ' || n, repeat('x', 500)
        from generate_series(1, 3000) as n";
    inventory.db.superuser().batch_execute(fill).unwrap();
    let address = inventory.stack.socket_address("inventory");
    let ask = |method: &str, path: &str| {
        let sent = format!("{method} {path} HTTP/1.1\r\nHost: h\r\n\r\n");
        Reply::parse(&raw(address, sent.as_bytes())).unwrap()
    };
    for (path, has_length) in [
        ("/api/movies?limit=5", true),
        ("/api/movies?title=nothing", true),
        ("/api/movies/1", true),
        ("/api/movies/9999", true),
        ("/api/movies?limit=0", true),
        ("/health", true),
        ("/health/ready", true),
        // Longer than what is sent at once: the length is not known at the beginning.
        ("/api/movies?limit=100", false),
        ("/api/movies", false),
    ] {
        let [head, get] = ["HEAD", "GET"].map(|method| ask(method, path));
        assert_eq!((head.status, head.body.as_str()), (get.status, ""), "{path}");
        let length = get.header("Content-Length");
        assert_eq!(length.is_some(), has_length, "{path}");
        assert_eq!(head.header("Content-Length"), length, "{path}");
        if let Some(length) = length {
            assert_eq!(length, get.body.len().to_string(), "{path}");
        }
    }
}

#[test]
fn changes_that_wait_for_a_locked_row_leave_connections_for_reads() {
    let inventory = Inventory::new();
    for title in ["locked", "free"] {
        assert_eq!(inventory.post(title), 201);
    }
    let mut admin = inventory.db.superuser();
    let mut lock = admin.transaction().unwrap();
    lock.batch_execute("select from movies where id = 1 for update").unwrap();
    thread::scope(|scope| {
        let inventory = &inventory;
        let changes: Vec<_> = (0..10)
            .map(|number| {
                let title = format!("change {number}");
                scope.spawn(move || inventory.put("/api/movies/1", &title, &[]))
            })
            .collect();
        let mut observer = inventory.db.superuser();
        eventually("changes wait for the row", 10, || {
            let waiting = "select count(*)
                from pg_stat_activity
                where datname = current_database() and wait_event_type = 'Lock'";
            let waiting: i64 = observer.query_one(waiting, &[]).unwrap().get(0);
            (waiting > 3).then_some(())
        });
        // Also other changes are refused in the end, but no read is.
        for path in ["/api/movies/1", "/api/movies/2", "/api/movies"] {
            let reply = get(&inventory.url(path)).unwrap();
            assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        }
        let checks = get(&inventory.url("/health/ready")).unwrap().json()["checks"].clone();
        assert_eq!(
            (&checks[0]["name"], &checks[0]["status"]),
            (&json!("postgresql"), &json!("ok"))
        );
        lock.rollback().unwrap();
        for change in changes {
            let reply = change.join().unwrap();
            assert!([200, 503].contains(&reply.status), "{} {}", reply.status, reply.body);
            assert_eq!(reply.header("Retry-After").is_some(), reply.status == 503);
        }
    });
    assert_eq!(inventory.put("/api/movies/1", "after it", &[]).status, 200);
}

#[test]
fn a_migration_and_its_way_back_are_no_error_for_clients_that_read_and_write() {
    const CLIENTS: usize = 4;
    let inventory = Inventory::new();
    assert_eq!(inventory.post("first"), 201);
    let migrator = Migrator::new(&inventory.db, "INVENTORY");
    let (done, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let _done = SetOnDrop(&done);
        for client in 0..CLIENTS {
            let (inventory, done, answered) = (&inventory, &done, &answered);
            scope.spawn(move || {
                while !done.load(Ordering::SeqCst) {
                    let title = format!("Movie of client {client}");
                    let replies = [
                        (inventory.post(&title), 201),
                        (inventory.put("/api/movies/1", &title, &[]).status, 200),
                        (get(&inventory.url("/api/movies/1")).unwrap().status, 200),
                        (get(&inventory.url("/api/movies?limit=2")).unwrap().status, 200),
                        (get(&inventory.url("/api/movies?title=first")).unwrap().status, 200),
                    ];
                    for (status, expected) in replies {
                        assert_eq!(status, expected);
                    }
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let wait_for_progress = || {
            let before = answered.load(Ordering::SeqCst);
            eventually("all clients are answered", 20, || {
                (answered.load(Ordering::SeqCst) > before + 2 * CLIENTS).then_some(())
            });
        };
        wait_for_progress();
        // The way from the version before to this one, and back.
        let newest = &migrations_of("movies_db")[3..];
        for migration in newest {
            migrator.apply(migration);
        }
        for _ in newest {
            migrator.roll_back();
        }
        wait_for_progress();
        migrator.apply_pending();
        wait_for_progress();
        for (up, down) in [
            (
                "alter table movies alter column title type varchar(255);",
                "alter table movies alter column title type text;",
            ),
            (
                "alter table movies add column year int; alter table movies drop column year;
                 alter table movies alter column description type varchar(10000);",
                "alter table movies alter column description type text;",
            ),
        ] {
            migrator.apply_sql(up, down);
            wait_for_progress();
            migrator.roll_back();
            wait_for_progress();
            migrator.apply_pending();
            wait_for_progress();
        }
    });
    let log = inventory._service.log();
    assert!(log.contains("statements are prepared again"), "{log}");
}

#[test]
fn a_tag_from_before_a_restore_matches_no_other_content() {
    let mut inventory = Inventory::new();
    assert_eq!(inventory.post("in the backup"), 201);
    let backup = Backup::new(&inventory.db);
    let edited = inventory.put("/api/movies/1", "edited after the backup", &[]);
    let stale = edited.header("ETag").unwrap().to_owned();

    inventory._service.terminate();
    backup.restore(&inventory.db);
    inventory._service = inventory.stack.start_and_wait("inventory");

    let restored = get(&inventory.url("/api/movies/1")).unwrap();
    assert_eq!(restored.json()["title"], "in the backup");
    for number in 0..20 {
        let refused = inventory.put("/api/movies/1", "by the stale tag", &[("If-Match", &stale)]);
        assert_eq!(refused.status, 412, "{}", refused.body);
        // Each uses up a transaction number.
        let changed = inventory.put("/api/movies/1", &number.to_string(), &[]);
        assert_ne!(changed.header("ETag").unwrap(), stale);
    }
    let shown = get(&inventory.url("/api/movies/1")).unwrap();
    assert_eq!(shown.json(), json!({ "id": 1, "title": "19", "description": "" }));
}
