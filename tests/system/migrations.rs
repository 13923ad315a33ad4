//! Every migration of every database goes up, down and up again: its way back
//! leaves nothing behind, and its way up works after it.
//!
//! The steps are made as `provision/migrate.sh` makes them: by dbmate, as the
//! database's owner.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, id};

use chassis::testing::{TestDb, test_var};

#[test]
fn every_migration_of_movies_db_has_a_way_back() {
    walk("sql/movies_db", "INVENTORY");
}

#[test]
fn every_migration_of_billing_db_has_a_way_back() {
    walk("sql/billing_db", "BILLING");
}

fn walk(migrations: &str, service: &str) {
    let stairs = Stairs::new(migrations, service);
    let mut steps: Vec<PathBuf> = fs::read_dir(root().join(migrations))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension() == Some(OsStr::new("sql")))
        .collect();
    steps.sort();
    assert!(!steps.is_empty(), "there is no migration in {migrations}");
    let mut below = stairs.schema();
    for step in steps {
        let name = step.file_name().unwrap();
        fs::copy(&step, stairs.taken.join(name)).unwrap();
        stairs.dbmate("migrate");
        let above = stairs.schema();
        assert_ne!(above, below, "{name:?} changes nothing");
        stairs.dbmate("rollback");
        assert_eq!(stairs.schema(), below, "{name:?} leaves something behind");
        stairs.dbmate("migrate");
        assert_eq!(stairs.schema(), above, "{name:?} does not do the same again");
        below = above;
    }
}

/// A database with nothing in it, and a folder with the steps taken so far.
struct Stairs {
    db: TestDb,
    url: String,
    taken: PathBuf,
}

impl Stairs {
    fn new(migrations: &str, service: &str) -> Stairs {
        let setting = |suffix: &str| test_var(&format!("{service}_DB_{suffix}"));
        let db = TestDb::new("template0");
        let owner = setting("OWNER");
        db.superuser()
            .batch_execute(&format!(
                "alter database {} owner to {owner};
                 revoke create on schema public from public",
                db.name
            ))
            .unwrap();
        let address = format!("{}:{}", setting("HOST"), setting("PORT"));
        let password = setting("OWNER_PASSWORD");
        let url = format!("postgres://{owner}:{password}@{address}/{}?sslmode=disable", db.name);
        let name = format!("stairway-{}-{}", id(), migrations.replace('/', "-"));
        let taken = std::env::temp_dir().join(name);
        fs::create_dir_all(&taken).unwrap();
        Stairs { db, url, taken }
    }

    fn dbmate(&self, action: &str) {
        let installed = root().join(".local/npm/node_modules/.bin/dbmate");
        let dbmate = std::env::var_os("DBMATE").unwrap_or(installed.into_os_string());
        let mut command = Command::new(&dbmate);
        command.args(["--env-file", "/dev/null", "--no-dump-schema", "--migrations-dir"]);
        command.arg(&self.taken).arg(action).env("DATABASE_URL", &self.url);
        run(command);
    }

    /// All that is in the database, as SQL: tables, constraints, functions, grants.
    fn schema(&self) -> String {
        let mut command = Command::new("pg_dump");
        command.args(["--schema-only", "--exclude-table", "schema_migrations"]);
        command.args(["--host", "127.0.0.1", "--username", &test_var("POSTGRES_SUPERUSER")]);
        command.args(["--port", &test_var("POSTGRES_PORT"), &self.db.name]);
        command.env("PGPASSWORD", test_var("POSTGRES_SUPERUSER_PASSWORD"));
        let dump = run(command);
        // pg_dump guards its script with a word that is another one each time.
        let guards = [r"\restrict ", r"\unrestrict "];
        let lines = dump.lines().filter(|line| !guards.iter().any(|guard| line.starts_with(guard)));
        lines.flat_map(|line| [line, "\n"]).collect()
    }
}

impl Drop for Stairs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.taken);
    }
}

fn run(mut command: Command) -> String {
    let output = command.output().unwrap_or_else(|err| panic!("{command:?}: {err}"));
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{:?}: {}{}",
        command.get_program(),
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}
