//! One line a record on stderr: time (UTC), level, message.
//!
//! Whoever reads the log (PM2, a pipe, a disk) may be slow, full or gone, and that must
//! not stop a service. So records wait in bounded memory for a thread that writes them;
//! what finds no place there, or cannot be written, is dropped and counted.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::ops::Range;
use std::os::fd::AsFd;
use std::panic;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use log::{Log, Metadata, Record};
use prometheus::{IntCounter, register_int_counter};
use simplelog::{ConfigBuilder, LevelFilter, WriteLogger};

use crate::env::Env;

/// Bytes of records that may wait: some two thousand of them.
const WAITING_MAX: usize = 256 * 1024;

/// Bytes written at once, and of a record with its end of line: POSIX's PIPE_BUF on
/// Linux, up to which a write to a pipe is never mixed with another process's.
const WRITE_MAX: usize = 4096;

/// How long a line may wait for others before it is written, unless so many bytes wait:
/// a thread woken for each line would cost a request as much as reading a movie does.
const GATHER: Duration = Duration::from_millis(5);
const GATHERED: usize = 32 * 1024;

/// How long the end of the process waits for a reader that does not read.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

crate::define_metrics! {
    fn register;
    DROPPED: IntCounter = register_int_counter!(
        "log_lines_dropped_total", "Lines of the log that nobody took in time, or that could not be written.");
}

/// Reads `LOG_LEVEL`; the default is `info`.
pub fn level_from_env(env: &mut Env) -> LevelFilter {
    // Spelled as a range of numbers it would be a riddle, so it is read as text.
    match env.optional("LOG_LEVEL").map(|text| text.parse()) {
        None => LevelFilter::Info,
        Some(Ok(level)) => level,
        Some(Err(_)) => {
            env.error("LOG_LEVEL must be one of off, error, warn, info, debug, trace");
            LevelFilter::Info
        }
    }
}

/// Starts logging, and makes a panic one line of the log like any other error.
/// What waits is written when the guard is dropped, at the end of `main`.
///
/// Only `service` (its crate) and the chassis are heard: what libraries say at debug and
/// trace holds headers, queries and frames of messages, which are nobody's to read.
pub fn init(level: LevelFilter, service: &'static str) -> anyhow::Result<Flush> {
    register();
    let config = ConfigBuilder::new()
        .set_time_format_rfc3339()
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .add_filter_allow_str(service)
        .add_filter_allow_str("chassis")
        .build();
    // A descriptor of its own: a write that hangs must not hold std's lock of stderr.
    let out = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let queue = Arc::new(Queue::default());
    let writer = Arc::clone(&queue);
    thread::Builder::new().name("log".into()).spawn(move || writer.run(out))?;
    let lines = Lines { line: Vec::with_capacity(WRITE_MAX), queue };
    log::set_boxed_logger(Box::new(OneLine(WriteLogger::new(level, config, lines))))?;
    log::set_max_level(level);
    panic::set_hook(Box::new(|panic| log::error!("{panic}")));
    Ok(Flush)
}

/// Writes what waits when it is dropped.
#[must_use = "what it guards is the last lines of the log"]
#[derive(Debug)]
pub struct Flush;

impl Drop for Flush {
    fn drop(&mut self) {
        log::logger().flush();
    }
}

/// Makes one line of a record's text before simplelog has it.
struct OneLine(Box<WriteLogger<Lines>>);

impl Log for OneLine {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args().to_string();
        let text = one_line(&text);
        let metadata = record.metadata().clone();
        self.0.log(&Record::builder().metadata(metadata).args(format_args!("{text}")).build());
    }

    fn flush(&self) {
        self.0.flush();
    }
}

/// Without control characters, so that no text from outside makes a line of its own or
/// speaks to a terminal; what is too long without its middle, because ids stand at the end.
fn one_line(text: &str) -> Cow<'_, str> {
    const GAP: &str = " […] ";
    const END: usize = 1024;
    /// Beside time, level and the end of the line.
    const MAX: usize = WRITE_MAX - 64;
    if text.len() <= MAX && text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Cow::Borrowed(text);
    }
    let mut line = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() { line.extend(letter.escape_default()) } else { line.push(letter) }
    }
    if line.len() > MAX {
        let head = line.floor_char_boundary(MAX - END - GAP.len());
        let tail = line.ceil_char_boundary(line.len() - END);
        line.replace_range(head..tail, GAP);
    }
    Cow::Owned(line)
}

/// Gathers the pieces in which simplelog writes a line, the last of which is its end.
struct Lines {
    line: Vec<u8>,
    queue: Arc<Queue>,
}

impl Write for Lines {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(piece);
        if piece.ends_with(b"\n") {
            self.queue.push(&self.line);
            self.line.clear();
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.queue.flush();
        Ok(())
    }
}

/// Whole lines on their way from the threads that log to the one that writes.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// There is something to write.
    work: Condvar,
    /// All is written.
    idle: Condvar,
}

#[derive(Default)]
struct Waiting {
    lines: Vec<u8>,
    writing: bool,
    /// Somebody waits until all is written.
    hurry: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut waiting = self.lock();
        if waiting.lines.len() + line.len() > WAITING_MAX {
            DROPPED.inc();
            return;
        }
        let before = waiting.lines.len();
        waiting.lines.extend_from_slice(line);
        let enough = before < GATHERED && waiting.lines.len() >= GATHERED;
        if (before == 0 || enough) && !waiting.writing {
            self.work.notify_one();
        }
    }

    fn flush(&self) {
        let busy = |waiting: &mut Waiting| waiting.writing || !waiting.lines.is_empty();
        let mut waiting = self.lock();
        waiting.hurry = true;
        self.work.notify_one();
        let _ = self.idle.wait_timeout_while(waiting, FLUSH_TIMEOUT, busy);
    }

    fn run(&self, mut out: File) {
        let mut torn = Vec::new();
        let mut told = 0;
        let mut lines = Vec::new();
        loop {
            let mut waiting = self.lock();
            waiting.writing = false;
            if waiting.lines.is_empty() {
                waiting.hurry = false;
                self.idle.notify_all();
                let empty = |waiting: &mut Waiting| waiting.lines.is_empty();
                let woken = self.work.wait_while(waiting, empty);
                waiting = woken.unwrap_or_else(PoisonError::into_inner);
            }
            let few = |waiting: &mut Waiting| waiting.lines.len() < GATHERED && !waiting.hurry;
            let gathered = self.work.wait_timeout_while(waiting, GATHER, few);
            waiting = gathered.unwrap_or_else(PoisonError::into_inner).0;
            waiting.writing = true;
            mem::swap(&mut waiting.lines, &mut lines);
            drop(waiting);

            let mut written = false;
            for range in pieces(&lines) {
                let lost = write_whole(&mut out, &lines[range], &mut torn);
                DROPPED.inc_by(lost);
                written |= lost == 0;
            }
            lines.clear();
            let dropped = DROPPED.get();
            if written && dropped > told {
                log::warn!("{} lines of the log are missing before this one", dropped - told);
                told = dropped;
            }
        }
    }
}

/// Whole lines, as many as fit into one write.
fn pieces(lines: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let rest = &lines[start..];
        let fitting = &rest[..rest.len().min(WRITE_MAX)];
        let end = fitting.iter().rposition(|byte| *byte == b'\n')? + 1;
        let piece = start..start + end;
        start += end;
        Some(piece)
    })
}

/// Writes a piece; how many of its lines were lost. A full disk may take the first half of a
/// line only: the second, `torn`, waits for room and comes before anything else.
fn write_whole(out: &mut impl Write, piece: &[u8], torn: &mut Vec<u8>) -> u64 {
    let written = write_some(out, torn);
    torn.drain(..written);
    if !torn.is_empty() {
        return count_lines(piece);
    }
    let rest = &piece[write_some(out, piece)..];
    let begun = piece.len() > rest.len() && piece[piece.len() - rest.len() - 1] != b'\n';
    let end = rest.iter().position(|byte| *byte == b'\n').filter(|_| begun).map_or(0, |at| at + 1);
    torn.extend_from_slice(&rest[..end]);
    count_lines(&rest[end..])
}

/// How many bytes were written before an error.
fn write_some(out: &mut impl Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match out.write(&bytes[written..]) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(err) if err.kind() == ErrorKind::Interrupted => (),
            // Somebody who shares the terminal or the pipe made it non-blocking.
            Err(err) if err.kind() == ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(_) => break,
        }
    }
    written
}

fn count_lines(piece: &[u8]) -> u64 {
    piece.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_whatever_it_says() {
        assert_eq!(one_line("a\r\nb\u{1b}[2J\0 é\u{85}"), "a\\r\\nb\\u{1b}[2J\\u{0} é\\u{85}");
    }

    #[test]
    fn a_long_record_keeps_its_begin_and_its_end() {
        for length in [1900, 2100, 5000, 100_000] {
            let text = format!("begin {} id=7", "é".repeat(length));
            let line = one_line(&text);
            assert!(line.len() < WRITE_MAX, "{}", line.len());
            assert!(line.starts_with("begin é") && line.ends_with("é id=7"), "{line}");
            assert_eq!(line.contains("[…]"), length > 2000);
        }
    }

    #[test]
    fn each_write_is_whole_lines() {
        let line = |length| format!("{}\n", "z".repeat(length)).into_bytes();
        let lines: Vec<u8> = (0..WRITE_MAX).step_by(7).flat_map(line).collect();
        let mut joined = Vec::new();
        for range in pieces(&lines) {
            let piece = &lines[range];
            assert!(piece.len() <= WRITE_MAX && piece.ends_with(b"\n"));
            joined.extend_from_slice(piece);
        }
        assert!(joined == lines);
    }

    #[test]
    fn what_finds_no_place_is_dropped_and_counted() {
        let queue = Queue::default();
        let before = DROPPED.get();
        for _ in 0..WAITING_MAX / 100 + 3 {
            queue.push(&[b'x'; 100]);
        }
        assert!(queue.lock().lines.len() <= WAITING_MAX);
        assert_eq!(DROPPED.get() - before, 3);
    }
}
