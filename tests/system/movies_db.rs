//! The functions of movies_db, called with the service's login: how titles are compared, ids
//! after an import, and a deletion that cannot get its lock.

use std::ops::RangeInclusive;
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::{TestDb, eventually, test_var};
use postgres::error::SqlState;
use postgres::types::Type;
use postgres::{Client, Error, NoTls};

#[test]
fn titles_are_compared_without_case_and_in_one_unicode_form() {
    let mut service = connect(&test_var("INVENTORY_DB_NAME"));
    let mut finds = |title: &str, part: &str| -> bool {
        let query = "select search_key($1) like search_key('%' || $2 || '%')";
        service.query_one(query, &[&title, &part]).unwrap().get(0)
    };
    for (title, part) in [
        ("The Matrix", "the MATRIX"),
        // Form D and form C of "é", both ways and in either case.
        ("Cafe\u{301} Society", "caf\u{e9}"),
        ("Caf\u{e9} Society", "CAFE\u{301}"),
        // The two small letters of sigma.
        ("Όδος", "ΌΔΟΣ"),
        ("ΌΔΟΣ", "όδος"),
        ("Ο\u{301}δος", "όδοσ"),
        ("Страна глухих", "СТРАНА"),
        ("GROẞSTADT", "großstadt"),
        ("İstanbul", "istanbul"),
        ("I\u{307}stanbul", "istanbul"),
        ("ISTANBUL", "ıstanbul"),
        ("Kelvin", "\u{212a}ELVIN"),
        ("Ǆungla", "ǆungla"),
        ("東京物語", "京物"),
        ("100% Wolf", "0\\% w"),
        ("a_b\\c", "a\\_B\\\\C"),
    ] {
        assert!(finds(title, part), "{part:?} is not found in {title:?}");
    }
    for (title, part) in [
        ("Großstadt", "GROSSSTADT"),
        ("Café", "cafe"),
        ("100 Wolf", "0\\%"),
        ("axb", "a\\_b"),
        ("Matrix", "Matrices"),
    ] {
        assert!(!finds(title, part), "{part:?} is found in {title:?}");
    }
}

/// The function has one case for ASCII, one for form C and one for the rest.
#[test]
fn for_every_character_case_and_form_make_no_difference() {
    let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    let query = "
        select count(*)
        from (
            -- Without the surrogates.
            select chr(generate_series(1, 55295)) as letter
            union all
            select chr(generate_series(57344, 1114111))
        ) as letters
        where (
            letter <> upper(letter)
            or letter <> lower(letter)
            or letter is not nfd normalized
        ) and (
            search_key(letter) <> lower(upper(normalize(letter, nfc)))
            or search_key('é' || letter) <> lower(upper(normalize('é' || letter, nfc)))
            or search_key(normalize(letter, nfd)) <> search_key(letter)
            or search_key(upper(letter)) <> search_key(letter)
            or search_key(lower(letter)) <> search_key(letter)
            or search_key(search_key(letter)) <> search_key(letter)
        )";
    let differ: i64 = db.superuser().query_one(query, &[]).unwrap().get(0);
    assert_eq!(differ, 0);
}

#[test]
fn a_search_among_20_000_titles_uses_the_trigram_index() {
    let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    import(&db, 1..=20_000);
    db.superuser().batch_execute("analyze movies").unwrap();
    // As the service: the function is inlined only for a role that may execute it.
    let plan = connect(&db.name)
        .query_typed(
            "explain
             select id
             from movies
             where id > 0
             and search_key(title) like search_key($1)
             order by id
             limit 501",
            &[(&"%ΚΙΝΗΜΑ\u{301} 777%", Type::TEXT)],
        )
        .unwrap();
    let plan: Vec<&str> = plan.iter().map(|row| row.get(0)).collect();
    assert!(plan.iter().any(|line| line.contains("movies_title_trgm")), "{plan:#?}");
}

#[test]
fn after_an_import_with_explicit_ids_the_next_id_is_free() {
    let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    let mut service = connect(&db.name);
    assert_eq!(insert(&mut service).unwrap(), 1);
    import(&db, 2..=50);
    let taken = insert(&mut service).unwrap_err();
    assert_eq!(taken.code(), Some(&SqlState::UNIQUE_VIOLATION), "{taken}");
    advance_ids(&mut service);
    assert_eq!(insert(&mut service).unwrap(), 51);
}

#[test]
fn advancing_the_ids_never_sets_them_back() {
    let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    let mut service = connect(&db.name);
    advance_ids(&mut service);
    assert_eq!(insert(&mut service).unwrap(), 1, "in an empty table");
    assert_eq!(insert(&mut service).unwrap(), 2);
    service.batch_execute("delete from movies").unwrap();
    advance_ids(&mut service);
    assert_eq!(insert(&mut service).unwrap(), 3, "an id is not used twice");
    service.batch_execute("select delete_all_movies()").unwrap();
    advance_ids(&mut service);
    assert_eq!(insert(&mut service).unwrap(), 1, "after the deletion of all");
}

#[test]
fn concurrent_inserts_after_an_import_all_succeed_within_three_attempts() {
    let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    import(&db, 1..=500);
    let services: Vec<Client> = (0..8).map(|_| connect(&db.name)).collect();
    thread::scope(|scope| {
        for mut service in services {
            scope.spawn(move || {
                for _ in 0..20 {
                    let mut inserted = insert(&mut service);
                    for _ in 0..2 {
                        if inserted.is_err() {
                            advance_ids(&mut service);
                            inserted = insert(&mut service);
                        }
                    }
                    inserted.unwrap();
                }
            });
        }
    });
    let row = db.superuser().query_one("select count(*), max(id) from movies", &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (660, 660));
}

#[test]
fn a_deletion_of_all_that_waits_for_a_backup_gives_up_and_reads_go_on() {
    let db = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    import(&db, 1..=3);
    let mut backup = db.superuser();
    let mut transaction = backup.transaction().unwrap();
    transaction.batch_execute("lock table movies in access share mode").unwrap();

    let (mut deleter, mut reader) = (connect(&db.name), connect(&db.name));
    let deletion = thread::spawn(move || deleter.batch_execute("select delete_all_movies()"));
    let mut observer = db.superuser();
    eventually("the deletion waits for the lock", 5, || {
        let query = "
            select 1
            from pg_locks
            where relation = 'movies'::regclass
            and mode = 'AccessExclusiveLock'
            and not granted";
        observer.query_opt(query, &[]).unwrap()
    });
    let started = Instant::now();
    let read: i64 = reader.query_one("select count(*) from movies", &[]).unwrap().get(0);
    assert_eq!(read, 3);
    // Half a second, and as much for a busy machine.
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    let failed = deletion.join().unwrap().unwrap_err();
    assert_eq!(failed.code(), Some(&SqlState::LOCK_NOT_AVAILABLE), "{failed}");

    transaction.rollback().unwrap();
    let deleted: i64 = reader.query_one("select delete_all_movies()", &[]).unwrap().get(0);
    assert_eq!(deleted, 3);
}

/// Adds movies with these ids, without the sequence.
fn import(db: &TestDb, ids: RangeInclusive<i64>) {
    let import = "
        insert into movies (id, title)
        overriding system value
        select id, 'Κινημά ' || id
        from generate_series($1::bigint, $2::bigint) as id";
    db.superuser().execute(import, &[ids.start(), ids.end()]).unwrap();
}

fn insert(service: &mut Client) -> Result<i64, Error> {
    let insert = "insert into movies (title) values ('Alien') returning id";
    service.query_one(insert, &[]).map(|row| row.get(0))
}

fn advance_ids(service: &mut Client) {
    service.batch_execute("select advance_movie_ids()").unwrap();
}

/// Connects with the service's login and its default statement timeout.
fn connect(database: &str) -> Client {
    postgres::Config::new()
        .host("127.0.0.1")
        .port(test_var("INVENTORY_DB_PORT").parse().unwrap())
        .user(&test_var("INVENTORY_DB_USER"))
        .password(test_var("INVENTORY_DB_PASSWORD"))
        .dbname(database)
        .options("-c statement_timeout=3000")
        .connect(NoTls)
        .unwrap()
}
