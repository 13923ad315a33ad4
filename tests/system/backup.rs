//! `provision/local backup` and `restore`: the restored databases equal those that were saved.

use std::path::Path;
use std::process::Command;

use chassis::testing::{TestDb, connect_as_service, test_var};
use postgres::Client;

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

#[test]
fn a_restored_backup_has_every_row_and_privilege_and_continues_with_the_next_id() {
    let template = [test_var("INVENTORY_DB_NAME"), test_var("BILLING_DB_NAME")];
    let [old, new] = [0, 1].map(|_| template.each_ref().map(|name| TestDb::new(name)));
    old[0].superuser().batch_execute(MOVIES).unwrap();
    old[1].superuser().batch_execute(ORDERS).unwrap();
    // A row that the restore must remove.
    let other = "insert into orders (user_id, number_of_items, total_amount) values ('x', 1, 1)";
    new[1].superuser().batch_execute(other).unwrap();

    let directory = std::env::temp_dir().join(format!("matinee-backup-{}", old[0].name));
    run("backup", &directory, &old);
    run("restore", &directory, &new);
    std::fs::remove_dir_all(&directory).unwrap();

    for (old, new) in old.iter().zip(&new) {
        let (before, after) = (content(&mut old.superuser()), content(&mut new.superuser()));
        assert!(before.len() > 5, "{before:?}");
        assert_eq!(before, after);
    }
    // The services' own roles have their privileges again, and no others.
    let mut movies = connect_as_service("INVENTORY", &new[0].name);
    let add = "insert into movies (title) values ('next') returning id";
    assert_eq!(movies.query_one(add, &[]).unwrap().get::<_, i64>(0), 9223372036854770001);
    assert!(movies.batch_execute("truncate movies").is_err());
    let deleted = movies.query_one("select delete_all_movies()", &[]).unwrap().get::<_, i64>(0);
    assert!(deleted > 90, "{deleted}");
    let mut orders = connect_as_service("BILLING", &new[1].name);
    let add = "insert into orders (user_id, number_of_items, total_amount) values ('y', 1, 1)
        returning id";
    assert_eq!(orders.query_one(add, &[]).unwrap().get::<_, i64>(0), 5);
    assert!(orders.batch_execute("delete from orders").is_err());
}

fn run(command: &str, directory: &Path, databases: &[TestDb; 2]) {
    let done = Command::new(LOCAL)
        .arg(command)
        .arg(directory)
        .env("INVENTORY_DB_NAME", &databases[0].name)
        .env("BILLING_DB_NAME", &databases[1].name)
        .output()
        .unwrap();
    assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
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
