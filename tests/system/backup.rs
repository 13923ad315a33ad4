//! `provision/local backup` and `restore`: the restored databases equal those that were saved, a
//! restore that is refused changes nothing, and the caller's shell has no influence.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use chassis::testing::migrations::{Migrator, migrations_of};
use chassis::testing::{
    TestDb, connect_as_service, connect_as_superuser, repository_root, test_var, unique_name,
};
use harness::services::{ServiceRow, services};
use parking_lot::Mutex;
use postgres::Client;

use crate::shell::unfriendly_shell;

const LOCAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../provision/local");

/// Every character that PostgreSQL can store, the longest texts, and gaps in the ids.
const MOVIES: &str = "
    insert into movies (title, description)
    select repeat(chr(128512), 254) || (c / 10000)::text::char(1), string_agg(chr(c), '' order by c)
    from generate_series(1, 1114111) c
    where c not between 55296 and 57343
    group by c / 10000;
    delete from movies where id % 7 = 0;
    select setval(pg_get_serial_sequence('movies', 'id'), 9223372036854770000);";

const ORDERS: &str = r"
    insert into orders (user_id, number_of_items, total_amount) values
        (repeat(chr(128512), 255), 2147483647, 999999999999.99),
        (E'\\N\t\r\n''\u200f', 0, 0.00), ('gone', 1, 1), ('last', 1, 0.01);
    delete from orders where user_id = 'gone';
    insert into processed_messages values (E'\\\t', '\x00ff', '2020-02-29 23:59:59.999999+00');
    insert into in_doubt (batch, digest) values (-9223372036854775808, '');";

const ORDER: &str =
    "insert into orders (user_id, number_of_items, total_amount) values ('x', 1, 1)";

const USERS: &str = "
    insert into users (email, email_key, password_hash, is_admin, shipping_address) values
        (repeat(chr(128512), 252) || '@b', 'a', 'x', true, '{\"b\":1,  \"a\":2}'), ('c@d', 'c', 'x', false, null);
    insert into sessions (id, user_id, expires_at) values (gen_random_uuid(), 1, now());
    insert into refresh_tokens (hash, session_id) select decode(repeat('00ff', 16), 'hex'), id from sessions;
    insert into revocations (session_id, until) values (gen_random_uuid(), now());
    update users set email = null, email_key = null, password_hash = null, deleted_at = now() where id = 2;";

#[test]
fn a_restored_backup_has_every_row_and_privilege_and_continues_with_the_next_id() {
    let [old, new] = [Databases::new(), Databases::new()];
    old.movies().superuser().batch_execute(MOVIES).unwrap();
    old.orders().superuser().batch_execute(ORDERS).unwrap();
    old.users().superuser().batch_execute(USERS).unwrap();
    // A row that the restore must remove.
    new.orders().superuser().batch_execute(ORDER).unwrap();
    let folder = Folder::new();
    old.backup(&folder);
    new.restore(&folder);

    for (old, new) in old.contents().into_iter().zip(new.contents()) {
        assert!(old.len() > 5, "{old:?}");
        assert_eq!(old, new);
    }
    // The services' own roles have their privileges again, and no others.
    let mut movies = connect_as_service("INVENTORY", &new.movies().name);
    let add = "insert into movies (title) values ('next') returning id";
    assert_eq!(movies.query_one(add, &[]).unwrap().get::<_, i64>(0), 9223372036854770001);
    assert!(movies.batch_execute("truncate movies").is_err());
    let deleted = movies.query_one("select delete_all_movies()", &[]).unwrap().get::<_, i64>(0);
    assert!(deleted > 90, "{deleted}");
    let mut orders = connect_as_service("BILLING", &new.orders().name);
    let add = "insert into orders (user_id, number_of_items, total_amount) values ('y', 1, 1)
        returning id";
    assert_eq!(orders.query_one(add, &[]).unwrap().get::<_, i64>(0), 5);
    assert!(orders.batch_execute("delete from orders").is_err());
    let mut users = connect_as_service("CUSTOMERS", &new.users().name);
    let add =
        "insert into users (email, email_key, password_hash) values ('e@f', 'e', 'x') returning id";
    assert_eq!(users.query_one(add, &[]).unwrap().get::<_, i64>(0), 3);
    let end = "insert into revocations (session_id, until) values (gen_random_uuid(), now())
        returning number";
    assert_eq!(users.query_one(end, &[]).unwrap().get::<_, i64>(0), 2);
    assert!(users.batch_execute("delete from users").is_err());
}

#[test]
fn a_restore_that_is_refused_changes_nothing() {
    let [saved, present] = [Databases::new(), Databases::new()];
    saved.movies().superuser().batch_execute(MOVIES).unwrap();
    saved.orders().superuser().batch_execute(ORDERS).unwrap();
    present.orders().superuser().batch_execute(ORDER).unwrap();
    let backup = Folder::new();
    saved.backup(&backup);
    let read = |name: &str| fs::read(backup.0.join(name)).unwrap();
    let (movies, orders) = (read("inventory.dump"), read("billing.dump"));
    let (users, carts) = (read("customers.dump"), read("orders.dump"));
    saved.orders().superuser().batch_execute("create table later (id int)").unwrap();
    saved.backup(&backup);
    let later = read("billing.dump");

    let before = present.contents();
    let refused = |inventory: Option<&[u8]>, billing: Option<&[u8]>, reason: &str| {
        let folder = Folder::new();
        let (customers, orders) = (Some(&*users), Some(&*carts));
        for (name, dump) in [
            ("inventory.dump", inventory),
            ("customers.dump", customers),
            ("orders.dump", orders),
            ("billing.dump", billing),
        ] {
            if let Some(dump) = dump {
                fs::write(folder.0.join(name), dump).unwrap();
            }
        }
        let output = present.run("restore", &folder, &mut Command::new(LOCAL));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(reason), "{reason}: {text}");
        assert_eq!(present.contents(), before, "{reason}");
    };
    let (movies, orders) = (Some(&*movies), Some(&*orders));
    refused(orders, orders, "is not a dump of inventory");
    refused(movies, movies, "is not a dump of billing");
    refused(movies, None, "billing.dump is missing");
    refused(None, orders, "inventory.dump is missing");
    refused(movies, Some(&later), "has no table later");
    let whole = orders.unwrap_or_default();
    for length in [0, 4, whole.len() / 4, whole.len() / 2, whole.len() - 1] {
        refused(movies, Some(&whole[..length]), "is not a complete dump");
    }
    refused(movies, Some(b"create table orders (id int);"), "is not a complete dump");
    let _running = connect_as_service("BILLING", &present.orders().name);
    refused(movies, orders, "billing is running");

    let mut databases = connect_as_superuser("postgres");
    let left = "select datname::text from pg_database where datname like '%restored'";
    assert!(databases.query(left, &[]).unwrap().is_empty());
}

#[test]
fn a_backup_from_before_a_migration_is_restored_and_then_migrated() {
    let old = Databases::of(|_| TestDb::new("template0"));
    let mut steps = 0;
    for (row, db) in &old.0 {
        db.superuser().batch_execute("revoke create on schema public from public").unwrap();
        let migrations = migrations_of(row.database.as_deref().unwrap());
        Migrator::new(db, &row.prefix()).apply(&migrations[0]);
        steps += migrations.len() - 1;
    }
    assert!(steps > 0, "there is no migration after the first");
    let movie = "insert into movies (title) values ('Caf\u{e9}')";
    old.movies().superuser().batch_execute(movie).unwrap();
    old.orders().superuser().batch_execute(ORDER).unwrap();
    let folder = Folder::new();
    old.backup(&folder);

    let new = Databases::new();
    new.restore(&folder);
    let migrated = Databases::new();
    migrated.movies().superuser().batch_execute(movie).unwrap();
    migrated.orders().superuser().batch_execute(ORDER).unwrap();
    assert_eq!(new.contents(), migrated.contents());
    let found = "select title from movies where search_key(title) like search_key('%CAFE\u{301}')";
    let mut movies = connect_as_service("INVENTORY", &new.movies().name);
    assert_eq!(movies.query(found, &[]).unwrap().len(), 1);
}

#[test]
fn backup_restore_and_psql_reach_their_own_server_whatever_is_set_in_the_shell() {
    let databases = Databases::new();
    databases.movies().superuser().batch_execute(MOVIES).unwrap();
    let before = databases.contents();
    let (folder, shell) = (Folder::new(), Folder::new());
    for command in ["backup", "restore"] {
        let mut local = unfriendly_shell(&shell.0, LOCAL);
        let output = databases.run(command, &folder, &mut local);
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(databases.contents(), before);

    let servers = repository_root().join("provision/dev-servers");
    let output = unfriendly_shell(&shell.0, servers)
        .args(["psql", &test_var("MATINEE_TEST_SERVERS_DIR"), "--no-align", "--tuples-only"])
        .args(["--dbname", &databases.movies().name])
        .args(["--command", "show port", "--command", "show client_encoding"])
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let expected = format!("{}\nUTF8\n", test_var("POSTGRES_PORT"));
    assert_eq!(printed, expected, "{}", String::from_utf8_lossy(&output.stderr));
}

/// A directory of one test's own.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        let path = std::env::temp_dir().join(unique_name("matinee-backup"));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The databases that a backup saves, each of one test's own.
struct Databases(Vec<(&'static ServiceRow, TestDb)>);

impl Databases {
    fn new() -> Databases {
        Databases::of(|row| TestDb::new(&test_var(&format!("{}_DB_NAME", row.prefix()))))
    }

    fn of(make: impl Fn(&ServiceRow) -> TestDb) -> Databases {
        let rows = services().iter().filter(|row| row.database.is_some());
        Databases(rows.map(|row| (row, make(row))).collect())
    }

    fn movies(&self) -> &TestDb {
        self.of_service("inventory")
    }

    fn orders(&self) -> &TestDb {
        self.of_service("billing")
    }

    fn users(&self) -> &TestDb {
        self.of_service("customers")
    }

    fn of_service(&self, name: &str) -> &TestDb {
        let found = self.0.iter().find(|(row, _)| row.name == name);
        &found.unwrap_or_else(|| panic!("{name} has no database")).1
    }

    fn contents(&self) -> Vec<Vec<String>> {
        self.0.iter().map(|(_, db)| content(&mut db.superuser())).collect()
    }

    fn backup(&self, folder: &Folder) {
        self.succeed("backup", folder);
    }

    fn restore(&self, folder: &Folder) {
        self.succeed("restore", folder);
    }

    fn succeed(&self, command: &str, folder: &Folder) {
        let output = self.run(command, folder, &mut Command::new(LOCAL));
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn run(&self, command: &str, folder: &Folder, local: &mut Command) -> Output {
        let names = self.0.iter().map(|(row, db)| (*row, db.name.as_str()));
        run(local.arg(command).arg(&folder.0), names)
    }
}

/// A restore sets the passwords of roles that all databases share, and PostgreSQL refuses that to
/// two sessions at a time.
fn run<'d>(
    local: &mut Command,
    databases: impl Iterator<Item = (&'static ServiceRow, &'d str)>,
) -> Output {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    for (row, name) in databases {
        local.env(format!("{}_DB_NAME", row.prefix()), name);
    }
    local.output().unwrap()
}

/// A backup of a test's own movies, and of nothing else.
pub(crate) struct Backup {
    folder: Folder,
    databases: Databases,
}

impl Backup {
    pub(crate) fn new(movies: &TestDb) -> Backup {
        let backup = Backup { folder: Folder::new(), databases: Databases::new() };
        backup.run("backup", movies);
        backup
    }

    pub(crate) fn restore(&self, movies: &TestDb) {
        self.run("restore", movies);
    }

    fn run(&self, command: &str, movies: &TestDb) {
        let mut local = Command::new(LOCAL);
        local.arg(command).arg(&self.folder.0);
        let name = |(row, db): &'_ (&'static ServiceRow, TestDb)| match row.name.as_str() {
            "inventory" => (*row, movies.name.clone()),
            _ => (*row, db.name.clone()),
        };
        let names: Vec<(&ServiceRow, String)> = self.databases.0.iter().map(name).collect();
        let output = run(&mut local, names.iter().map(|(row, name)| (*row, name.as_str())));
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Of each table, the migrations among them, the number of rows and a hash of them in order; of
/// each relation and function the owner and the privileges; of each sequence the position.
fn content(db: &mut Client) -> Vec<String> {
    let tables = db
        .query("select tablename::text from pg_tables where schemaname = 'public' order by 1", &[]);
    let mut found = Vec::new();
    for table in tables.unwrap().iter().map(|row| row.get::<_, String>(0)) {
        let ask = format!(
            "select count(*) || ' ' || coalesce(md5(string_agg(row::text, '|' order by row::text collate \"C\")), '')
             from {table} row"
        );
        found.push(format!("{table} {}", db.query_one(&ask, &[]).unwrap().get::<_, String>(0)));
    }
    let privileges = "
        select format('%s %s %s', relname, relowner::regrole, relacl) from pg_class
        where relnamespace = 'public'::regnamespace
        union all
        select format('%s %s %s', proname, proowner::regrole, proacl) from pg_proc
        where pronamespace = 'public'::regnamespace
        union all
        select format('%s at %s', sequencename, last_value) from pg_sequences
        order by 1";
    found.extend(db.query(privileges, &[]).unwrap().iter().map(|row| row.get::<_, String>(0)));
    found
}
