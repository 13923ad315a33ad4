//! Databases of one test's own.

use postgres::{Client, NoTls};

use super::{test_var, unique_name};

/// A database of one test's own, a copy of a migrated one; dropped at the end.
pub struct TestDb {
    /// Its name.
    pub name: String,
}

impl TestDb {
    /// Copies the database `template` (such as the one in `INVENTORY_DB_NAME`).
    pub fn new(template: &str) -> TestDb {
        let name = unique_name("test");
        let mut admin = connect_as_superuser("postgres");
        // One copy at a time: PostgreSQL refuses to copy a template that has another session.
        admin.batch_execute("select pg_advisory_lock(1)").unwrap();
        let create = format!("create database {name} template {template}");
        admin.batch_execute(&create).unwrap();
        TestDb { name }
    }

    /// The superuser's connection to this database.
    pub fn superuser(&self) -> Client {
        connect_as_superuser(&self.name)
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        let mut admin = connect_as_superuser("postgres");
        let drop = format!("drop database if exists {} with (force)", self.name);
        let _ = admin.batch_execute(&drop);
    }
}

/// The superuser's connection to a database.
pub fn connect_as_superuser(database: &str) -> Client {
    connect(database, &test_var("POSTGRES_SUPERUSER"), &test_var("POSTGRES_SUPERUSER_PASSWORD"))
}

/// A connection with a service's own role; `service` is as its variables begin: `INVENTORY`.
pub fn connect_as_service(service: &str, database: &str) -> Client {
    let setting = |suffix| test_var(&format!("{service}_DB_{suffix}"));
    connect(database, &setting("USER"), &setting("PASSWORD"))
}

/// Ends every session of this database but the given one.
pub fn end_other_sessions(admin: &mut Client) {
    let end = "select pg_terminate_backend(pid)
        from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid()";
    admin.execute(end, &[]).unwrap();
}

fn connect(database: &str, user: &str, password: &str) -> Client {
    postgres::Config::new()
        .host("127.0.0.1")
        .port(test_var("POSTGRES_PORT").parse().unwrap())
        .user(user)
        .password(password)
        .dbname(database)
        .connect(NoTls)
        .unwrap()
}
