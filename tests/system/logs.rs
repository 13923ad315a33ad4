//! The log in trouble: its disk full, its pipe closed or unread, rotated under load.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, pipe};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;

use chassis::testing::eventually;

use harness::{Stack, agent};

const SERVICES: [&str; 3] = ["gateway", "inventory", "billing"];

/// A service whose log goes where a test wants it; killed when it is dropped.
struct Logging {
    child: Child,
    url: String,
    metrics: String,
}

impl Logging {
    fn start(stack: &Stack, service: &str, log: impl Into<Stdio>) -> Logging {
        Logging::launch(stack, service, stack.command(service).stderr(log))
    }

    fn launch(stack: &Stack, service: &str, command: &mut Command) -> Logging {
        let metrics = &stack.env[&format!("{}_METRICS_LISTEN", service.to_uppercase())];
        let child = command.spawn().unwrap();
        let url = stack.service_url(service);
        let mut started = Logging { child, url, metrics: format!("http://{metrics}/metrics") };
        let url = format!("{}/health", started.url);
        eventually(format!("{service} answers"), 30, || {
            assert!(started.child.try_wait().unwrap().is_none(), "{service} has ended");
            agent().get(&url).call().ok()
        });
        started
    }

    fn dropped(&self) -> u64 {
        let text = agent().get(&self.metrics).call().unwrap().body_mut().read_to_string().unwrap();
        let line = text.lines().find(|line| line.starts_with("log_lines_dropped_total "));
        line.and_then(|line| line.split(' ').nth(1)).unwrap().parse().unwrap()
    }

    /// Each of these requests is answered, and is one line of the log.
    fn ask(&self, times: usize, path: &str) {
        let (agent, url) = (agent(), format!("{}{path}", self.url));
        for _ in 0..times {
            assert_eq!(agent.get(&url).call().unwrap().status(), 404);
        }
    }

    fn stop(&mut self) -> ExitStatus {
        let status = Command::new("kill").arg(self.child.id().to_string()).status();
        assert!(status.unwrap().success());
        eventually("it stops", 20, || self.child.try_wait().unwrap())
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_full_disk_or_a_closed_pipe_under_the_log_stops_no_service() {
    for service in SERVICES {
        for gone in ["disk", "pipe"] {
            let log = match gone {
                "disk" => Stdio::from(File::options().write(true).open("/dev/full").unwrap()),
                _ => Stdio::from(pipe().unwrap().1),
            };
            let mut running = Logging::start(&Stack::new(), service, log);
            running.ask(50, "/nothing");
            eventually(format!("{service} counts the lines, {gone}"), 20, || {
                (running.dropped() >= 50).then_some(())
            });
            assert!(running.stop().success(), "{service}, {gone}");
        }
    }
}

#[test]
fn a_disk_that_is_full_in_the_middle_of_a_line_and_then_has_room_tears_no_line() {
    let stack = Stack::new();
    let path = std::env::temp_dir().join(format!("matinee-{}-full.log", stack.address));
    // A limit on the file's size takes the begin of a line, as a full disk does.
    let gateway = stack.command("gateway");
    let mut command = Command::new("env");
    command.envs(&stack.env).args(["--ignore-signal=XFSZ", "prlimit", "--fsize=20000:unlimited"]);
    command.arg(gateway.get_program()).stdout(Stdio::null()).stderr(File::create(&path).unwrap());
    let mut running = Logging::launch(&stack, "gateway", &mut command);
    let size = || fs::metadata(&path).unwrap().len();
    let mut asked = 0;
    eventually("the disk is full", 30, || {
        running.ask(20, "/before");
        asked += 20;
        (running.dropped() > 0).then_some(())
    });
    assert_eq!(size(), 20_000);
    let more = ["--fsize=unlimited", "--pid", &running.child.id().to_string()];
    assert!(Command::new("prlimit").args(more).status().unwrap().success());
    running.ask(20, "/after");
    let dropped = running.dropped();
    assert!(running.stop().success());

    let text = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(text.ends_with('\n'));
    text.lines().for_each(assert_whole);
    let lines = |path: &str| text.lines().filter(|line| line.contains(path)).count();
    assert_eq!(lines("GET /after"), 20);
    assert_eq!(lines("GET /before") as u64 + dropped, asked);
}

#[test]
fn a_service_that_cannot_start_says_so_also_where_nobody_can_read_it() {
    for service in SERVICES {
        let mut stack = Stack::new();
        // Of RFC 5737, for documentation: no machine has it.
        stack.set(&format!("{}_HOST", service.to_uppercase()), "192.0.2.1");
        let told = stack.command(service).stderr(Stdio::piped()).output().unwrap();
        let text = String::from_utf8(told.stderr).unwrap();
        assert!(told.status.code() == Some(1) && text.contains("192.0.2.1"), "{service}: {text}");
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(stack.command(service).stderr(full).status().unwrap().code(), Some(1));
    }
}

/// More than the pipe (64 KiB) and the service's own memory for it hold together.
const UNREAD: usize = 400;

#[test]
fn a_reader_of_the_log_that_has_stopped_stops_no_service() {
    for service in SERVICES {
        let (reader, writer) = pipe().unwrap();
        let mut running = Logging::start(&Stack::new(), service, writer);
        running.ask(UNREAD, &format!("/{}", "x".repeat(3000)));
        assert!(running.dropped() > 0, "{service}");
        assert!(running.stop().success(), "{service}");
        for line in BufReader::new(reader).lines() {
            assert_whole(&line.unwrap());
        }
    }
}

#[test]
fn when_the_log_is_read_again_it_says_how_much_is_missing() {
    let (reader, writer) = pipe().unwrap();
    let mut gateway = Logging::start(&Stack::new(), "gateway", writer);
    gateway.ask(UNREAD, &format!("/{}", "x".repeat(3000)));
    assert!(gateway.dropped() > 0);

    let reading = thread::spawn(move || {
        let lines = BufReader::new(reader).lines().map(Result::unwrap);
        lines.inspect(|line| assert_whole(line)).collect::<Vec<String>>()
    });
    gateway.ask(UNREAD, "/short");
    let dropped = gateway.dropped();
    assert!(gateway.stop().success());
    let lines = reading.join().unwrap();
    let missing = lines.iter().filter(|line| line.contains("lines of the log are missing"));
    assert!(missing.count() > 0);
    let read = lines.iter().filter(|line| line.contains("xxx") || line.contains("/short")).count();
    assert!(read < 2 * UNREAD && read as u64 + dropped >= 2 * UNREAD as u64, "{read} {dropped}");
}

#[test]
fn lines_of_two_processes_under_load_are_whole_also_when_the_log_is_rotated() {
    let (mut reader, writer) = pipe().unwrap();
    let stack = Stack::new();
    let path = std::env::temp_dir().join(format!("matinee-{}-rotated.log", stack.address));
    let renamed = path.with_extension("1");
    let open = || File::options().create(true).append(true).open(&path).unwrap();

    // The same line to a pipe and to a file; each of them is shared by two processes.
    let mut running = [
        Logging::start(&stack, "gateway", writer.try_clone().unwrap()),
        Logging::start(&Stack::new(), "gateway", writer),
        Logging::start(&Stack::new(), "gateway", open()),
        Logging::start(&Stack::new(), "gateway", open()),
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
                    scope.spawn(move || gateway.ask(100, &path));
                }
            }
        });
    };
    thread::scope(|scope| {
        scope.spawn(|| load(&running));
        // Moved away, as logrotate does it; the services go on in the same file.
        fs::rename(&path, &renamed).unwrap();
        let size = || fs::metadata(&renamed).unwrap().len();
        eventually("some of it is written", 30, || (size() > 50_000).then_some(()));
        // Emptied in place, as PM2's module and `copytruncate` do it.
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
    // 2 processes of 4 clients; nothing of the pipe is lost.
    assert_eq!(piped.lines().filter(|line| line.contains("%F0%9F%8E%AC 404")).count(), 2 * 4 * 100);
    assert!(!filed.is_empty() && !filed.contains('\0'));
}

/// Begins with the time and the level, and ends as lines of its kind end.
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
