//! Long lists and odd bodies in little memory; alone in its process, because it measures it.

use std::fs;
use std::io::{self, Read};

use chassis::testing::{TestDb, test_var};
use chassis::{Env, Stop, router};
use inventory::App;
use inventory::config::Config;
use inventory::routes::ROUTES;
use rouille::Request;

const MOVIES: i64 = 2000;

#[test]
fn neither_a_list_of_80_megabytes_nor_a_body_full_of_unknown_fields_takes_much_memory() {
    let database = TestDb::new(&test_var("INVENTORY_DB_NAME"));
    let fill = "insert into movies (title, description)
        select 'Movie ' || n, repeat('🎬', 10000)
        from generate_series(1, $1::bigint) as n";
    database.superuser().execute(fill, &[&MOVIES]).unwrap();
    let name = database.name.clone();
    let env = Env::from_fn(move |variable| match variable {
        "INVENTORY_DB_NAME" => Some(name.clone()),
        other => std::env::var(other).ok(),
    });
    let stop = Stop::default();
    // It need not look for tokens.
    stop.request();
    let app = App::new(Config::from_env(env).unwrap(), &stop).unwrap();

    let one = Request::fake_http("GET", "/api/movies/1", vec![], vec![]);
    assert_eq!(router::dispatch(ROUTES, &app, &one).result.unwrap().status_code, 200);
    // As values these objects would take some forty times the room of their text.
    let before = peak_kib();
    let body = format!(r#"{{"title":"x","y":[{}0]}}"#, r#"{"":0},"#.repeat(36_000)).into_bytes();
    let odd = Request::fake_http("PUT", "/api/movies/1", vec![], body);
    assert_eq!(router::dispatch(ROUTES, &app, &odd).result.unwrap().status_code, 200);
    let grown = peak_kib() - before;
    assert!(grown < 2 << 10, "{grown} KiB more for a body");

    let before = peak_kib();
    let all = Request::fake_http("GET", "/api/movies", vec![], vec![]);
    let response = router::dispatch(ROUTES, &app, &all).result.unwrap();
    let (reader, size) = response.data.into_reader_and_size();
    assert_eq!(size, None);
    let mut counted = Counted { reader, bytes: 0, titles: 0 };
    io::copy(&mut counted, &mut io::sink()).unwrap();
    let grown = peak_kib() - before;
    assert_eq!(counted.titles, MOVIES);
    assert!(counted.bytes > 80_000_000, "{} bytes", counted.bytes);
    assert!(grown < 8 << 10, "{grown} KiB more");
}

struct Counted<R> {
    reader: R,
    bytes: u64,
    titles: i64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(out)?;
        self.bytes += read as u64;
        self.titles += out[..read].iter().filter(|byte| **byte == b'{').count() as i64;
        Ok(read)
    }
}

/// The most memory that this process ever had.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
