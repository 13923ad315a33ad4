//! The log under bad conditions: a full disk, a closed or unread pipe, rotation under load.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, pipe};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use chassis::testing::{eventually, unique_name};
use harness::services::services;
use harness::{Service, Stack, agent};

/// A service whose log goes where a test wants it.
struct Logging {
    service: Service,
    stack: Stack,
    name: &'static str,
}

impl Logging {
    fn start(name: &'static str, log: impl Into<Stdio>) -> Logging {
        let stack = Stack::new();
        let command = stack.command(name);
        Logging::launch(stack, name, command, log)
    }

    fn launch(
        stack: Stack,
        name: &'static str,
        mut command: Command,
        log: impl Into<Stdio>,
    ) -> Logging {
        let mut service = Service::start_with_log(&mut command, log);
        stack.wait_until_live(name, &mut service);
        Logging { service, stack, name }
    }

    fn dropped(&self) -> u64 {
        self.stack.metric(self.name, "log_lines_dropped_total") as u64
    }

    /// Each of these requests is answered, and is one line of the log.
    fn request(&self, times: usize, path: &str) {
        let (agent, url) = (agent(), format!("{}{path}", self.stack.service_url(self.name)));
        for _ in 0..times {
            assert_eq!(agent.get(&url).call().unwrap().status(), 404);
        }
    }

    fn stop(&mut self) -> ExitStatus {
        self.service.terminate()
    }
}

/// The names of all services.
fn names() -> impl Iterator<Item = &'static str> {
    services().iter().map(|row| row.name.as_str())
}

#[test]
fn a_service_goes_on_when_its_log_is_a_full_disk_or_a_closed_pipe() {
    for service in names() {
        for log_to in ["full disk", "closed pipe"] {
            let log = match log_to {
                "full disk" => Stdio::from(File::options().write(true).open("/dev/full").unwrap()),
                _ => Stdio::from(pipe().unwrap().1),
            };
            let mut running = Logging::start(service, log);
            running.request(50, "/nothing");
            eventually(format!("{service} counts the lost lines, {log_to}"), 20, || {
                (running.dropped() >= 50).then_some(())
            });
            assert!(running.stop().success(), "{service}, {log_to}");
        }
    }
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_line_leaves_no_torn_line() {
    let stack = Stack::new();
    let path = std::env::temp_dir().join(format!("matinee-{}-full.log", stack.address));
    // A limit on the file's size cuts a line in its middle, as a full disk does.
    let gateway = stack.command("gateway");
    let mut command = Command::new("env");
    command.envs(&stack.env).args(["--ignore-signal=XFSZ", "prlimit", "--fsize=20000:unlimited"]);
    command.arg(gateway.get_program());
    let mut running = Logging::launch(stack, "gateway", command, File::create(&path).unwrap());
    let size = || fs::metadata(&path).unwrap().len();
    let mut requests = 0;
    eventually("the disk is full", 30, || {
        running.request(20, "/before");
        requests += 20;
        (running.dropped() > 0).then_some(())
    });
    assert_eq!(size(), 20_000);
    let more = ["--fsize=unlimited", "--pid", &running.service.pid().to_string()];
    assert!(Command::new("prlimit").args(more).status().unwrap().success());
    running.request(20, "/after");
    let dropped = running.dropped();
    assert!(running.stop().success());

    let text = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(text.ends_with('\n'));
    text.lines().for_each(assert_whole);
    let lines = |path: &str| text.lines().filter(|line| line.contains(path)).count();
    assert_eq!(lines("GET /after"), 20);
    assert_eq!(lines("GET /before") as u64 + dropped, requests);
}

#[test]
fn a_service_that_cannot_start_exits_with_its_reason_and_also_when_it_cannot_log() {
    for service in names() {
        let mut stack = Stack::new();
        // An address for documentation (RFC 5737): no machine has it.
        stack.set(&format!("{}_HOST", service.to_uppercase()), "192.0.2.1");
        let output = stack.command(service).stderr(Stdio::piped()).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && text.contains("192.0.2.1"), "{service}: {text}");
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(stack.command(service).stderr(full).status().unwrap().code(), Some(1));
    }
}

/// Requests whose lines, of 3 KB each, are more than the pipe (64 KiB) and the service's own
/// buffer hold together.
const UNREAD: usize = 400;

#[test]
fn a_service_goes_on_when_its_log_is_not_read() {
    for service in names() {
        let (reader, writer) = pipe().unwrap();
        let mut running = Logging::start(service, writer);
        running.request(UNREAD, &format!("/{}", "x".repeat(3000)));
        assert!(running.dropped() > 0, "{service}");
        assert!(running.stop().success(), "{service}");
        for line in BufReader::new(reader).lines() {
            assert_whole(&line.unwrap());
        }
    }
}

#[test]
fn after_a_stall_the_log_reports_the_number_of_dropped_lines() {
    let (reader, writer) = pipe().unwrap();
    let mut gateway = Logging::start("gateway", writer);
    gateway.request(UNREAD, &format!("/{}", "x".repeat(3000)));
    assert!(gateway.dropped() > 0);

    let reading = thread::spawn(move || {
        let lines = BufReader::new(reader).lines().map(Result::unwrap);
        lines.inspect(|line| assert_whole(line)).collect::<Vec<String>>()
    });
    gateway.request(UNREAD, "/short");
    let dropped = gateway.dropped();
    assert!(gateway.stop().success());
    let lines = reading.join().unwrap();
    let missing = lines.iter().filter(|line| line.contains("lines of the log are missing"));
    assert!(missing.count() > 0);
    let read = lines.iter().filter(|line| line.contains("xxx") || line.contains("/short")).count();
    assert!(read < 2 * UNREAD && read as u64 + dropped >= 2 * UNREAD as u64, "{read} {dropped}");
}

#[test]
fn two_processes_that_share_a_log_write_whole_lines_also_while_it_is_rotated() {
    let (mut reader, writer) = pipe().unwrap();
    let path = std::env::temp_dir().join(format!("{}.log", unique_name("matinee-rotated")));
    let renamed = path.with_extension("1");
    let open = || File::options().create(true).append(true).open(&path).unwrap();

    // Two processes write to a pipe, two to a file.
    let mut running = [
        Logging::start("gateway", writer.try_clone().unwrap()),
        Logging::start("gateway", writer),
        Logging::start("gateway", open()),
        Logging::start("gateway", open()),
    ];
    let piped = thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    let load = |running: &[Logging]| {
        thread::scope(|scope| {
            for (number, gateway) in running.iter().enumerate() {
                for length in [0, 80, 1500, 5000] {
                    let path = format!("/{number}{}%F0%9F%8E%AC", "y".repeat(length));
                    scope.spawn(move || gateway.request(100, &path));
                }
            }
        });
    };
    thread::scope(|scope| {
        scope.spawn(|| load(&running));
        // Renamed, as by logrotate; the services keep writing to the same file.
        fs::rename(&path, &renamed).unwrap();
        let size = || fs::metadata(&renamed).unwrap().len();
        eventually("some of it is written", 30, || (size() > 50_000).then_some(()));
        // Truncated, as by PM2's pm2-logrotate and by `copytruncate`.
        File::options().write(true).open(&renamed).unwrap().set_len(0).unwrap();
    });
    for gateway in &mut running {
        assert_eq!(gateway.dropped(), 0);
        assert!(gateway.stop().success());
    }
    drop(running);

    let piped = piped.join().unwrap();
    let filed = fs::read_to_string(&renamed).unwrap();
    fs::remove_file(&renamed).unwrap();
    for text in [&piped, &filed] {
        assert!(text.ends_with('\n'));
        text.lines().for_each(assert_whole);
    }
    // Two processes with four clients each: no line of the pipe is lost.
    assert_eq!(piped.lines().filter(|line| line.contains("%F0%9F%8E%AC 404")).count(), 2 * 4 * 100);
    assert!(!filed.is_empty() && !filed.contains('\0'));
}

/// Checks that a line begins with its time and level and ends as lines of its kind end.
#[track_caller]
fn assert_whole(line: &str) {
    let (time, rest) = line.split_once(' ').unwrap_or_default();
    assert!(time.len() > 18 && time.ends_with('Z') && time.contains('T'), "{line}");
    assert!(rest.starts_with('['), "{line}");
    assert_eq!(line.matches("Z [").count(), 1, "{line}");
    if line.contains("] GET ") {
        let (_, peer) = line.rsplit_once(" peer=").unwrap_or_default();
        assert!(
            peer.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()),
            "{line}"
        );
    }
}
