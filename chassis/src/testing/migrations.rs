//! Migrations, applied and rolled back as `provision/migrate.sh` does it: by dbmate, as the
//! owner of the database.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{TestDb, repository_root, test_var, unique_name};

/// The migrations of a folder in `sql/`, in their order.
pub fn migrations_of(database: &str) -> Vec<PathBuf> {
    let folder = repository_root().join("sql").join(database);
    let entries = fs::read_dir(&folder).unwrap_or_else(|err| panic!("{}: {err}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension() == Some(OsStr::new("sql")))
        .collect();
    files.sort();
    files
}

/// Applies migrations to a test's database, one after the other.
///
/// dbmate applies a whole folder, so this has a folder of its own with those that were added.
/// A database that was copied from a migrated one keeps what it has.
pub struct Migrator {
    url: String,
    folder: PathBuf,
}

impl Migrator {
    /// For a database of the service whose variables begin with `service` (`INVENTORY`); the
    /// role that owns the service's database becomes the owner of this one.
    pub fn new(db: &TestDb, service: &str) -> Migrator {
        let setting = |suffix: &str| test_var(&format!("{service}_DB_{suffix}"));
        let (owner, password) = (setting("OWNER"), setting("OWNER_PASSWORD"));
        let alter = format!("alter database {} owner to {owner}", db.name);
        db.superuser().batch_execute(&alter).unwrap();
        let port = test_var("POSTGRES_PORT");
        let url =
            format!("postgres://{owner}:{password}@127.0.0.1:{port}/{}?sslmode=disable", db.name);
        let folder = std::env::temp_dir().join(unique_name("matinee-migrations"));
        fs::create_dir_all(&folder).unwrap();
        Migrator { url, folder }
    }

    /// Applies this migration.
    pub fn apply(&self, migration: &Path) {
        let name = migration.file_name().unwrap();
        fs::copy(migration, self.folder.join(name)).unwrap();
        self.dbmate("migrate");
    }

    /// Applies a migration of the test's own: `up` and `down` are its statements. It counts as
    /// the last one, so that [`Migrator::roll_back`] rolls it back.
    pub fn apply_sql(&self, up: &str, down: &str) {
        let number = fs::read_dir(&self.folder).unwrap().count() + 900;
        let text = format!("-- migrate:up\n{up}\n\n-- migrate:down\n{down}\n");
        fs::write(self.folder.join(format!("{number}_test.sql")), text).unwrap();
        self.dbmate("migrate");
    }

    /// Rolls back the migration that was applied last.
    pub fn roll_back(&self) {
        self.dbmate("rollback");
    }

    /// Applies again what was rolled back.
    pub fn apply_pending(&self) {
        self.dbmate("migrate");
    }

    fn dbmate(&self, action: &str) {
        let installed = repository_root().join(".local/npm/node_modules/.bin/dbmate");
        let dbmate = std::env::var_os("DBMATE").unwrap_or(installed.into_os_string());
        let output = Command::new(&dbmate)
            .args(["--env-file", "/dev/null", "--no-dump-schema", "--migrations-dir"])
            .arg(&self.folder)
            .arg(action)
            .env("DATABASE_URL", &self.url)
            .output()
            .unwrap_or_else(|err| panic!("{}: {err}", dbmate.display()));
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "dbmate {action}: {stdout}{stderr}");
    }
}

impl Drop for Migrator {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
