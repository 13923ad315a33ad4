//! Every migration of every database goes up, down and up again: the way down leaves nothing
//! behind, and the way up works after it.

use std::process::Command;

use chassis::testing::migrations::{Migrator, migrations_of};
use chassis::testing::{TestDb, test_var};
use harness::services::{ServiceRow, services};

#[test]
fn every_migration_of_every_database_can_be_rolled_back_and_applied_again() {
    let with_database: Vec<&ServiceRow> =
        services().iter().filter(|row| row.database.is_some()).collect();
    assert!(with_database.len() > 1, "{with_database:?}");
    for row in with_database {
        walk(row.database.as_deref().unwrap_or_default(), &row.prefix());
    }
}

fn walk(database: &str, service: &str) {
    let migrations = migrations_of(database);
    assert!(!migrations.is_empty(), "there is no migration in sql/{database}");
    let db = MigrationDb::new(service);
    let mut below = db.schema();
    for migration in migrations {
        let name = format!("sql/{database}/{}", migration.file_name().unwrap().display());
        db.migrator.apply(&migration);
        let above = db.schema();
        assert_ne!(above, below, "{name} changes nothing");
        db.migrator.roll_back();
        assert_eq!(db.schema(), below, "{name} leaves something behind");
        db.migrator.apply_pending();
        assert_eq!(db.schema(), above, "{name} does not do the same again");
        below = above;
    }
}

/// An empty database of the owner that runs the service's migrations.
struct MigrationDb {
    db: TestDb,
    migrator: Migrator,
}

impl MigrationDb {
    fn new(service: &str) -> MigrationDb {
        let db = TestDb::new("template0");
        db.superuser().batch_execute("revoke create on schema public from public").unwrap();
        let migrator = Migrator::new(&db, service);
        MigrationDb { db, migrator }
    }

    /// Everything in the database as SQL: tables, constraints, functions, privileges.
    fn schema(&self) -> String {
        let output = Command::new("pg_dump")
            .args(["--schema-only", "--exclude-table", "schema_migrations"])
            .args(["--host", "127.0.0.1", "--username", &test_var("POSTGRES_SUPERUSER")])
            .args(["--port", &test_var("POSTGRES_PORT"), &self.db.name])
            .env("PGPASSWORD", test_var("POSTGRES_SUPERUSER_PASSWORD"))
            .output()
            .unwrap_or_else(|err| panic!("pg_dump: {err}"));
        let dump = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{dump}{}", String::from_utf8_lossy(&output.stderr));
        // pg_dump guards its script with a word that differs from run to run.
        let guards = [r"\restrict ", r"\unrestrict "];
        let lines = dump.lines().filter(|line| !guards.iter().any(|guard| line.starts_with(guard)));
        lines.flat_map(|line| [line, "\n"]).collect()
    }
}
