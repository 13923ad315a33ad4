//! Logging: one line a record on stderr, with time (UTC), level and message.
//!
//! The reader of the log (PM2, a pipe, a disk) may be slow, full or gone. This must not stop a
//! service. So records wait in bounded memory for a thread that writes them; records that do not
//! fit, or cannot be written, are dropped and counted.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::panic;
use std::sync::Arc;
use std::thread;

use log::{Log, Metadata, Record};
use simplelog::{ConfigBuilder, LevelFilter, WriteLogger};

mod writer;

use writer::{LineSplitter, LogBuffer, MAX_WRITE_BYTES, register_metrics};

use crate::env::Env;

/// Reads `LOG_LEVEL`; the default is `info`.
pub fn level_from_env(env: &mut Env) -> LevelFilter {
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
/// Buffered lines are written when the guard is dropped, at the end of `main`.
///
/// Only `service` (its crate) and the chassis are logged: at debug and trace, libraries log headers,
/// queries and frames of messages, which hold personal data.
pub fn init(level: LevelFilter, service: &'static str) -> anyhow::Result<FlushGuard> {
    register_metrics();
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
    let buffer = Arc::new(LogBuffer::default());
    let writer = Arc::clone(&buffer);
    thread::Builder::new().name("log".into()).spawn(move || writer.run(out))?;
    let lines = LineSplitter { line: Vec::with_capacity(MAX_WRITE_BYTES), buffer };
    log::set_boxed_logger(Box::new(SingleLineLogger(WriteLogger::new(level, config, lines))))?;
    log::set_max_level(level);
    panic::set_hook(Box::new(|panic| log::error!("{panic}")));
    Ok(FlushGuard)
}

/// Writes the buffered lines when it is dropped.
#[must_use = "without it the last lines of the log are lost"]
#[derive(Debug)]
pub struct FlushGuard;

impl Drop for FlushGuard {
    fn drop(&mut self) {
        log::logger().flush();
    }
}

/// Makes one line of a record's text before simplelog gets it.
struct SingleLineLogger(Box<WriteLogger<LineSplitter>>);

impl Log for SingleLineLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args().to_string();
        let text = sanitize(&text);
        let metadata = record.metadata().clone();
        self.0.log(&Record::builder().metadata(metadata).args(format_args!("{text}")).build());
    }

    fn flush(&self) {
        self.0.flush();
    }
}

/// A text without control characters, so that no input makes a line of its own or controls a
/// terminal. A text that is too long loses its middle, because ids are at the end.
fn sanitize(text: &str) -> Cow<'_, str> {
    const GAP: &str = " […] ";
    const END: usize = 1024;
    /// Beside time, level and the end of the line.
    const MAX: usize = MAX_WRITE_BYTES - 64;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_whatever_it_says() {
        assert_eq!(sanitize("a\r\nb\u{1b}[2J\0 é\u{85}"), "a\\r\\nb\\u{1b}[2J\\u{0} é\\u{85}");
    }

    #[test]
    fn a_long_record_keeps_its_begin_and_its_end() {
        for length in [1900, 2100, 5000, 100_000] {
            let text = format!("begin {} id=7", "é".repeat(length));
            let line = sanitize(&text);
            assert!(line.len() < MAX_WRITE_BYTES, "{}", line.len());
            assert!(line.starts_with("begin é") && line.ends_with("é id=7"), "{line}");
            assert_eq!(line.contains("[…]"), length > 2000);
        }
    }
}
