//! The wall clock jumps by forty days, forward and back (libfaketime): no deadline, connection
//! or message id is affected.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chassis::testing::{TestDb, TestVhost, eventually, test_var};

use harness::Stack;

/// Seconds.
const DAY: f64 = 24.0 * 3600.0;

/// The wall clock of the processes that are started with it. The monotonic clock is not changed,
/// as on a machine whose clock is set.
struct Clock(PathBuf);

impl Clock {
    fn for_services_of(stack: &mut Stack) -> Clock {
        let places = fs::read_dir("/usr/lib").unwrap().map(|entry| entry.unwrap().path());
        let library = places
            .map(|place| place.join("faketime/libfaketime.so.1"))
            .find(|file| file.exists())
            .expect("libfaketime is missing: apt-get install faketime");
        let file = std::env::temp_dir().join(format!("matinee-clock-{}", stack.address));
        let clock = Clock(file);
        clock.set("+0");
        stack
            .set("LD_PRELOAD", library.display())
            .set("FAKETIME_TIMESTAMP_FILE", clock.0.display())
            .set("FAKETIME_NO_CACHE", 1)
            .set("FAKETIME_DONT_FAKE_MONOTONIC", 1)
            .set("DONT_FAKE_MONOTONIC", 1);
        clock
    }

    fn set(&self, offset: &str) {
        // Atomically, or a process could read half of it.
        let new = self.0.with_extension("new");
        fs::write(&new, offset).unwrap();
        fs::rename(&new, &self.0).unwrap();
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Asks for the service's health; returns how many days its clock is ahead, and the request id.
fn days_ahead(stream: &mut BufReader<TcpStream>) -> (f64, String) {
    stream.get_mut().write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let (mut date, mut id, mut length) = (String::new(), String::new(), 0);
    loop {
        let mut line = String::new();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the connection was closed");
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            if line == "\r\n" { break } else { continue }
        };
        match name.to_lowercase().as_str() {
            "date" => date = value.to_owned(),
            "x-request-id" => id = value.to_owned(),
            "content-length" => length = value.parse().unwrap(),
            _ => (),
        }
    }
    stream.read_exact(&mut vec![0; length]).unwrap();
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let shown = seconds(httpdate::parse_http_date(&date).unwrap());
    ((shown - seconds(SystemTime::now())) / DAY, id)
}

#[test]
fn a_jump_of_the_clock_closes_no_connection_and_repeats_no_request_id() {
    let mut stack = Stack::new();
    let clock = Clock::for_services_of(&mut stack);
    let _gateway = stack.start_and_wait("gateway");
    // One connection: it must not count as idle for too long.
    let mut stream = BufReader::new(TcpStream::connect((stack.address, 3000)).unwrap());
    let mut last = String::new();
    for (offset, days) in [("+0", 0.0), ("+40d", 40.0), ("-40d", -40.0), ("+0", 0.0)] {
        clock.set(offset);
        for _ in 0..3 {
            let (ahead, id) = days_ahead(&mut stream);
            assert!((ahead - days).abs() < 0.1, "{offset}: {ahead} days ahead");
            // The ids (UUIDv7) keep growing, so that none comes twice.
            assert!(id > last, "{offset}: {id} after {last}");
            last = id;
        }
    }
}

/// The deadline of a request's body, and of inventory's response.
const DEADLINE: Duration = Duration::from_secs(3);

#[test]
fn a_jump_of_the_clock_does_not_move_a_running_deadline() {
    let mut stack = Stack::new();
    let clock = Clock::for_services_of(&mut stack);
    stack
        .set("HTTP_BODY_TIMEOUT_MS", DEADLINE.as_millis())
        .set("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", DEADLINE.as_millis());
    // It accepts connections and sends nothing.
    let _inventory = TcpListener::bind((stack.address, 8080)).unwrap();
    let _gateway = stack.start_and_wait("gateway");
    let connect = || TcpStream::connect((stack.address, 3000)).unwrap();
    let mut other = BufReader::new(connect());
    let started_at = Instant::now();
    let send_request = |request: &str| {
        let mut stream = connect();
        stream.write_all(request.as_bytes()).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let response = thread::spawn(move || {
            let status = reader.lines().next().unwrap().unwrap();
            (status, started_at.elapsed())
        });
        (stream, response)
    };
    let (mut body, stalled) =
        send_request("POST /api/billing HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{");
    let (_waiting, unanswered) = send_request("GET /api/movies/1 HTTP/1.1\r\nHost: x\r\n\r\n");
    for (offset, days) in [("+40d", 40.0), ("-40d", -40.0), ("+0", 0.0)] {
        clock.set(offset);
        assert!((days_ahead(&mut other).0 - days).abs() < 0.1);
        // Its arrival makes the gateway look at the clock again.
        body.write_all(b" ").unwrap();
    }
    for (response, wanted) in [(stalled, "408"), (unanswered, "504")] {
        let (status, time) = response.join().unwrap();
        assert!(status.contains(wanted), "{status} instead of {wanted} after {time:?}");
        let right = DEADLINE.mul_f64(0.9)..DEADLINE + Duration::from_secs(5);
        assert!(right.contains(&time), "{wanted} after {time:?}");
    }
}

#[test]
fn a_jump_of_billings_clock_deletes_no_message_id_before_its_retention_ends() {
    let orders = TestDb::new(&test_var("BILLING_DB_NAME"));
    let vhost = TestVhost::new();
    let mut stack = Stack::new();
    stack.set("BILLING_DB_NAME", &orders.name).set("RABBITMQ_VHOST", &vhost.name);
    let clock = Clock::for_services_of(&mut stack);
    let mut db = orders.superuser();
    db.batch_execute(
        "insert into processed_messages select age || ' days', '', now() - make_interval(days => age)
         from unnest(array[1, 29, 31]) age",
    )
    .unwrap();
    clock.set("+40d");
    let billing = stack.start_and_wait("billing");
    // It deletes old ids at its start; the database's clock decides which are old.
    let mut left = || {
        let rows = db.query("select message_id from processed_messages order by 1", &[]).unwrap();
        rows.iter().map(|row| row.get(0)).collect::<Vec<String>>()
    };
    eventually("the old id is deleted", 30, || (left().len() < 3).then_some(()));
    eventually("the deletion is logged", 30, || {
        billing.log().contains("1 old message ids deleted").then_some(())
    });
    assert_eq!(left(), ["1 days", "29 days"]);
    let mut stream = BufReader::new(TcpStream::connect((stack.address, 8081)).unwrap());
    assert!(days_ahead(&mut stream).0 > 39.0);
}
