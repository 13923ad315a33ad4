//! Started programs, and what the kernel says of a process.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::str::FromStr;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{eventually, unique_name};

/// A started program; killed when it is dropped.
pub struct Service {
    /// The process.
    pub child: Child,
    /// The file that its standard error goes to; none where a test has another use for it.
    log: Option<PathBuf>,
}

impl Service {
    /// Starts a program without standard input and output. Its log goes to a file of its own,
    /// which is deleted with the service.
    pub fn start(name: &str, command: &mut Command) -> Service {
        let log =
            std::env::temp_dir().join(format!("{}.log", unique_name(&format!("matinee-{name}"))));
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let mut service = Service::start_with_log(command, file);
        service.log = Some(log);
        service
    }

    /// The same with a log that goes where the test wants it.
    pub fn start_with_log(command: &mut Command, log: impl Into<Stdio>) -> Service {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap_or_else(|err| panic!("{command:?}: {err}"));
        Service { child, log: None }
    }

    /// What it has logged until now.
    pub fn log(&self) -> String {
        self.log.as_ref().and_then(|log| fs::read_to_string(log).ok()).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Sends a signal by its name, such as `TERM` or `STOP`.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name).unwrap_or_else(|err| panic!("kill -{name}: {err}"));
    }

    /// Asks it to end (SIGTERM) and waits until it has, 20 s at most.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM");
        eventually("the process ends after SIGTERM", 20, || self.exit_status())
    }

    /// SIGKILL, and the wait for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
        if let Some(log) = &self.log {
            let _ = fs::remove_file(log);
        }
    }
}

/// Sends a signal by its name, such as `TERM`, to any process.
pub fn signal(pid: u32, name: &str) -> Result<(), String> {
    let signal = Signal::from_str(&format!("SIG{name}")).map_err(|err| err.to_string())?;
    kill(Pid::from_raw(pid as i32), signal).map_err(|err| err.to_string())
}

/// Resident memory of a process in bytes; 0 when it has ended.
pub fn resident_bytes(pid: u32) -> u64 {
    kib(pid, "VmRSS:") * 1024
}

/// The most resident memory that a process ever had, in bytes; 0 when it has ended.
pub fn peak_resident_bytes(pid: u32) -> u64 {
    kib(pid, "VmHWM:") * 1024
}

/// How many threads a process has; 0 when it has ended.
pub fn thread_count(pid: u32) -> usize {
    status_line(pid, "Threads:").and_then(|line| line.parse().ok()).unwrap_or(0)
}

/// How many file descriptors a process has open; 0 when it has ended.
pub fn open_fds(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

fn kib(pid: u32, name: &str) -> u64 {
    let line = status_line(pid, name).unwrap_or_default();
    line.trim_end_matches(" kB").parse().unwrap_or(0)
}

fn status_line(pid: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name)).map(|line| line.trim().to_owned())
}
