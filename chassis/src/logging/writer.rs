//! The thread that writes the log, and the bounded buffer before it.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use prometheus::{IntCounter, register_int_counter};

/// The most bytes of records that wait to be written: about two thousand records.
const MAX_BUFFERED_BYTES: usize = 256 * 1024;

/// The most bytes in one write, and in a record with its end of line. It is POSIX's PIPE_BUF on
/// Linux: up to this size a write to a pipe is never mixed with that of another process.
pub(super) const MAX_WRITE_BYTES: usize = 4096;

/// How long a line waits for others before it is written, unless this many bytes wait. Waking a
/// thread for each line would cost a request as much as reading a movie does.
const FLUSH_INTERVAL: Duration = Duration::from_millis(5);
const FLUSH_THRESHOLD_BYTES: usize = 32 * 1024;

/// How long the end of the process waits for a log that does not accept data.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

crate::define_metrics! {
    pub(super) fn register_metrics;
    DROPPED: IntCounter = register_int_counter!(
        "log_lines_dropped_total", "Lines of the log that were dropped: the buffer was full, or they could not be written.");
}

/// Puts together the parts in which simplelog writes a line; the last part is the end of line.
pub(super) struct LineSplitter {
    pub(super) line: Vec<u8>,
    pub(super) buffer: Arc<LogBuffer>,
}

impl Write for LineSplitter {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(piece);
        if piece.ends_with(b"\n") {
            self.buffer.push(&self.line);
            self.line.clear();
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.buffer.flush();
        Ok(())
    }
}

/// Complete lines, on their way from the threads that log to the thread that writes.
#[derive(Default)]
pub(super) struct LogBuffer {
    state: Mutex<BufferState>,
    /// There is something to write.
    work: Condvar,
    /// Everything is written.
    idle: Condvar,
}

#[derive(Default)]
struct BufferState {
    bytes: Vec<u8>,
    writing: bool,
    /// A thread waits until everything is written.
    flush_requested: bool,
}

impl LogBuffer {
    fn push(&self, line: &[u8]) {
        let mut state = self.state.lock();
        if state.bytes.len() + line.len() > MAX_BUFFERED_BYTES {
            DROPPED.inc();
            return;
        }
        let before = state.bytes.len();
        state.bytes.extend_from_slice(line);
        let enough = before < FLUSH_THRESHOLD_BYTES && state.bytes.len() >= FLUSH_THRESHOLD_BYTES;
        if (before == 0 || enough) && !state.writing {
            self.work.notify_one();
        }
    }

    fn flush(&self) {
        let busy = |state: &mut BufferState| state.writing || !state.bytes.is_empty();
        let mut state = self.state.lock();
        state.flush_requested = true;
        self.work.notify_one();
        self.idle.wait_while_for(&mut state, busy, FLUSH_TIMEOUT);
    }

    pub(super) fn run(&self, mut out: File) {
        let mut partial_line = Vec::new();
        let mut reported_drops = 0;
        let mut lines = Vec::new();
        loop {
            let mut state = self.state.lock();
            state.writing = false;
            if state.bytes.is_empty() {
                state.flush_requested = false;
                self.idle.notify_all();
                let empty = |state: &mut BufferState| state.bytes.is_empty();
                self.work.wait_while(&mut state, empty);
            }
            let below_threshold = |state: &mut BufferState| {
                state.bytes.len() < FLUSH_THRESHOLD_BYTES && !state.flush_requested
            };
            self.work.wait_while_for(&mut state, below_threshold, FLUSH_INTERVAL);
            state.writing = true;
            mem::swap(&mut state.bytes, &mut lines);
            drop(state);

            let mut written = false;
            for range in whole_line_batches(&lines) {
                let lost = write_lines(&mut out, &lines[range], &mut partial_line);
                DROPPED.inc_by(lost);
                written |= lost == 0;
            }
            lines.clear();
            let dropped = DROPPED.get();
            if written && dropped > reported_drops {
                log::warn!(
                    "{} lines of the log are missing before this one",
                    dropped - reported_drops
                );
                reported_drops = dropped;
            }
        }
    }
}

/// Ranges of complete lines, as many as fit into one write.
fn whole_line_batches(lines: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let rest = &lines[start..];
        let fitting = &rest[..rest.len().min(MAX_WRITE_BYTES)];
        let end = fitting.iter().rposition(|byte| *byte == b'\n')? + 1;
        let piece = start..start + end;
        start += end;
        Some(piece)
    })
}

/// Writes complete lines; returns how many were lost. A full disk may accept only the first half of
/// a line: the second half, `partial_line`, waits for space and is written before anything else.
fn write_lines(out: &mut impl Write, piece: &[u8], partial_line: &mut Vec<u8>) -> u64 {
    let written = write_until_error(out, partial_line);
    partial_line.drain(..written);
    if !partial_line.is_empty() {
        return count_lines(piece);
    }
    let rest = &piece[write_until_error(out, piece)..];
    let begun = piece.len() > rest.len() && piece[piece.len() - rest.len() - 1] != b'\n';
    let end = rest.iter().position(|byte| *byte == b'\n').filter(|_| begun).map_or(0, |at| at + 1);
    partial_line.extend_from_slice(&rest[..end]);
    count_lines(&rest[end..])
}

/// How many bytes were written before an error.
fn write_until_error(out: &mut impl Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match out.write(&bytes[written..]) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(err) if err.kind() == ErrorKind::Interrupted => (),
            // A process that shares the terminal or the pipe has made it non-blocking.
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
    fn each_write_is_whole_lines() {
        let line = |length| format!("{}\n", "z".repeat(length)).into_bytes();
        let lines: Vec<u8> = (0..MAX_WRITE_BYTES).step_by(7).flat_map(line).collect();
        let mut joined = Vec::new();
        for range in whole_line_batches(&lines) {
            let piece = &lines[range];
            assert!(piece.len() <= MAX_WRITE_BYTES && piece.ends_with(b"\n"));
            joined.extend_from_slice(piece);
        }
        assert!(joined == lines);
    }

    #[test]
    fn log_lines_beyond_the_buffer_are_dropped_and_counted() {
        let buffer = LogBuffer::default();
        let before = DROPPED.get();
        for _ in 0..MAX_BUFFERED_BYTES / 100 + 3 {
            buffer.push(&[b'x'; 100]);
        }
        assert!(buffer.state.lock().bytes.len() <= MAX_BUFFERED_BYTES);
        assert_eq!(DROPPED.get() - before, 3);
    }
}
