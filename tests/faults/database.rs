//! Faults of PostgreSQL while orders are booked and movies are written.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use chassis::testing::process::signal;
use chassis::testing::{eventually, test_var};
use harness::load::Workload;
use postgres::Client;

use crate::Case;
use crate::outage::{Fault, case, outage};
use crate::platform::Platform;

pub(crate) const CASES: &[Case] = &[
    case(&KILLED, |run| outage(run, &KILLED)),
    case(&RESTARTED, |run| outage(run, &RESTARTED)),
    case(&STOPPED, |run| outage(run, &STOPPED)),
    case(&SESSION_KILLED, |run| outage(run, &SESSION_KILLED)),
    case(&SESSIONS_ENDED, |run| outage(run, &SESSIONS_ENDED)),
    case(&LOCKED, |run| outage(run, &LOCKED)),
    case(&EXHAUSTED, |run| outage(run, &EXHAUSTED)),
    case(&READ_ONLY, |run| outage(run, &READ_ONLY)),
    case(&DISK_FULL, |run| outage(run, &DISK_FULL)),
];

pub(crate) const FAULTS: &[&Fault] = &[
    &KILLED,
    &RESTARTED,
    &STOPPED,
    &SESSION_KILLED,
    &SESSIONS_ENDED,
    &LOCKED,
    &EXHAUSTED,
    &READ_ONLY,
    &DISK_FULL,
];

const BILLING: &[&str] = &["billing"];

const KILLED: Fault = Fault {
    name: "database-killed",
    hold_ms: (500, 3_000),
    unaffected: Workload::Orders,
    noticed_by: BILLING,
    logged: "",
    inject: |platform| {
        platform.servers("kill", &["postgres"]);
        Box::new(|platform| drop(platform.servers("start", &[])))
    },
};

const RESTARTED: Fault = Fault {
    name: "database-restarted",
    hold_ms: (0, 3_000),
    unaffected: Workload::Orders,
    noticed_by: BILLING,
    logged: "",
    inject: |platform| {
        platform.servers("stop", &["postgres"]);
        Box::new(|platform| drop(platform.servers("start", &[])))
    },
};

const STOPPED: Fault = Fault {
    name: "database-stopped",
    hold_ms: (2_000, 20_000),
    unaffected: Workload::Orders,
    noticed_by: BILLING,
    logged: "",
    inject: |platform| {
        platform.servers("kill", &["postgres", "STOP"]);
        Box::new(|platform| drop(platform.servers("kill", &["postgres", "CONT"])))
    },
};

/// A session is killed, as by the kernel when memory is short: PostgreSQL ends all others and
/// recovers.
const SESSION_KILLED: Fault = Fault {
    name: "database-session-killed",
    hold_ms: (500, 3_000),
    unaffected: Workload::Orders,
    noticed_by: &[],
    logged: "",
    inject: |platform| {
        let find = "select pid from pg_stat_activity where application_name = 'billing' limit 1";
        let mut admin = platform.connect("BILLING_DB_NAME");
        let pid: i32 = admin.query_one(find, &[]).unwrap().get(0);
        signal(pid as u32, "KILL").unwrap();
        // Otherwise it was no session of PostgreSQL's.
        eventually("PostgreSQL ends all sessions", 10, || admin.batch_execute("select 1").err());
        Box::new(|platform| drop(platform.servers("start", &[])))
    },
};

const SESSIONS_ENDED: Fault = Fault {
    name: "database-sessions-ended",
    hold_ms: (0, 0),
    unaffected: Workload::Orders,
    noticed_by: &[],
    logged: "",
    inject: |platform| {
        let mut admin = platform.connect("BILLING_DB_NAME");
        let mut ended = HashSet::new();
        for _ in 0..20 {
            ended.extend(end_sessions(&mut admin));
            thread::park_timeout(Duration::from_millis(100));
        }
        // Services with another application_name would keep their sessions.
        assert_eq!(ended, HashSet::from(["billing", "inventory"].map(str::to_owned)));
        Box::new(|_| ())
    },
};

pub(crate) const LOCKED: Fault = Fault {
    name: "database-orders-locked",
    hold_ms: (4_000, 20_000),
    unaffected: Workload::Orders,
    noticed_by: BILLING,
    logged: "",
    inject: |platform| {
        let mut admin = platform.connect("BILLING_DB_NAME");
        admin.batch_execute("begin; lock table orders in access exclusive mode").unwrap();
        Box::new(|_| drop(admin))
    },
};

/// The services' sessions are ended and no new one is accepted. A limit on their roles gives the
/// same error (53300) as a server without free connections, at once.
const EXHAUSTED: Fault = Fault {
    name: "database-connections-gone",
    hold_ms: (1_000, 10_000),
    unaffected: Workload::Orders,
    noticed_by: BILLING,
    logged: "too many connections",
    inject: |platform| {
        let limit = |platform: &Platform, connections: i32| {
            let mut admin = platform.connect("BILLING_DB_NAME");
            for role in [test_var("BILLING_DB_USER"), test_var("INVENTORY_DB_USER")] {
                let alter = format!("alter role {role} connection limit {connections}");
                admin.batch_execute(&alter).unwrap();
            }
            end_sessions(&mut admin);
        };
        limit(platform, 0);
        Box::new(move |platform| limit(platform, -1))
    },
};

/// As after a failover to a replica, or when an operator sets it.
const READ_ONLY: Fault = Fault {
    name: "database-read-only",
    hold_ms: (1_000, 10_000),
    unaffected: Workload::Orders,
    noticed_by: BILLING,
    logged: "read-only transaction",
    inject: |platform| {
        let set = |platform: &Platform, what: &str| {
            let mut admin = platform.connect("BILLING_DB_NAME");
            admin.batch_execute(what).unwrap();
            admin.batch_execute("select pg_reload_conf()").unwrap();
        };
        set(platform, "alter system set default_transaction_read_only = on");
        Box::new(move |platform| set(platform, "alter system reset default_transaction_read_only"))
    },
};

/// The tables are moved to a small disk, which is then filled.
const DISK_FULL: Fault = Fault {
    name: "database-disk-full",
    hold_ms: (3_000, 10_000),
    unaffected: Workload::Orders,
    noticed_by: &[],
    logged: "No space left on device",
    inject: |platform| {
        let disk = SmallDisk::mount(platform);
        let folder = disk.folder.display().to_string();
        let run = |platform: &Platform, database: &str, statements: &[String]| {
            let mut admin = platform.connect(database);
            for statement in statements {
                admin.batch_execute(statement).unwrap();
            }
        };
        let tables = [
            ("BILLING_DB_NAME", &["orders", "processed_messages"][..]),
            ("INVENTORY_DB_NAME", &["movies"][..]),
        ];
        run(platform, "BILLING_DB_NAME", &[format!("create tablespace small location '{folder}'")]);
        let move_to = move |platform: &Platform, place: &str| {
            for (database, names) in tables {
                let alter = |name| format!("alter table {name} set tablespace {place}");
                run(platform, database, &names.iter().map(alter).collect::<Vec<_>>());
            }
        };
        move_to(platform, "small");
        disk.fill();
        Box::new(move |platform| {
            disk.free_space();
            move_to(platform, "pg_default");
            run(platform, "BILLING_DB_NAME", &["drop tablespace small".to_owned()]);
            drop(disk);
        })
    },
};

/// Ends the sessions of the services; returns their names.
fn end_sessions(admin: &mut Client) -> Vec<String> {
    let end = "select application_name, pg_terminate_backend(pid) from pg_stat_activity
               where application_name in ('billing', 'inventory')";
    let rows = admin.query(end, &[]).unwrap();
    rows.iter().filter(|row| row.get(1)).map(|row| row.get(0)).collect()
}

/// A disk in memory that only PostgreSQL's user may enter.
struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    /// Mounts one that has 32 MiB more than the databases need.
    fn mount(platform: &Platform) -> SmallDisk {
        let mut admin = platform.connect("BILLING_DB_NAME");
        let row = admin
            .query_one(
                "select current_setting('data_directory'),
                        (sum(pg_database_size(datname)) / 1024)::bigint
                 from pg_database",
                &[],
            )
            .unwrap();
        let owner = std::fs::metadata(row.get::<_, String>(0)).unwrap();
        let folder = std::env::temp_dir().join(format!("matinee-{}-disk", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let disk = SmallDisk { folder };
        let kib = row.get::<_, i64>(1) + (32 << 10);
        let options = format!("size={kib}k,mode=0700,uid={},gid={}", owner.uid(), owner.gid());
        let mount = ["-t", "tmpfs", "-o", &options, "tmpfs"];
        let mounted = Command::new("mount").args(mount).arg(&disk.folder).status().unwrap();
        assert!(
            mounted.success(),
            "a small disk can be mounted only by root: run this case as root"
        );
        disk
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }

    /// Fills it to the last byte.
    fn fill(&self) {
        let mut file = File::create(self.filler()).unwrap();
        while file.write_all(&[0; 1 << 16]).is_ok() {}
        while file.write_all(&[0]).is_ok() {}
    }

    fn free_space(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.folder).status();
        let _ = std::fs::remove_dir(&self.folder);
    }
}
