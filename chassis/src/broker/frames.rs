//! The connection's stream, with message properties that amiquip can parse.
//!
//! AMQP strings are bytes. amiquip's parser takes UTF-8 only, and where one property is not, it loses
//! that one and all that follow, the message id among them: the same message would be booked twice.
//! So invalid bytes are replaced in content header frames before amiquip reads them (AMQP 0-9-1
//! sections 2.3.5 and 4.2.6.1). The length of a frame never changes:
//! - in the message id each invalid byte becomes U+0000, which no valid id contains;
//! - in other short strings and in the names of headers it becomes `?`;
//! - a header value that is an invalid string (type `S`) becomes a byte array (type `x`): no byte is
//!   lost.

use std::io::{self, Read, Write};

use amiquip::IoStream;
use mio::net::TcpStream;
use mio::{Evented, Poll, PollOpt, Ready, Token};

/// How many bytes are read at once.
const READ_BYTES: usize = 16 << 10;

/// The frame's type, channel and size, before its payload; and the frame-end octet after it.
const FRAME_HEADER_BYTES: usize = 7;
const FRAME_END_BYTES: usize = 1;
const CONTENT_HEADER: u8 = 2;

/// A content header's class, weight and body size, before its property flags.
const FIXED_BYTES: usize = 12;

/// A TCP stream whose incoming content headers are repaired.
pub(super) struct FrameStream {
    stream: TcpStream,
    filter: FrameFilter,
    scratch: Box<[u8; READ_BYTES]>,
}

impl FrameStream {
    pub(super) fn new(stream: TcpStream) -> FrameStream {
        let scratch = Box::new([0; READ_BYTES]);
        FrameStream { stream, filter: FrameFilter::default(), scratch }
    }
}

impl Read for FrameStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let taken = self.filter.take(out);
            if taken > 0 || out.is_empty() {
                return Ok(taken);
            }
            match self.stream.read(&mut self.scratch[..])? {
                0 => return Ok(0),
                read => self.filter.add(&self.scratch[..read]),
            }
        }
    }
}

impl Write for FrameStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Evented for FrameStream {
    fn register(&self, poll: &Poll, token: Token, ready: Ready, opt: PollOpt) -> io::Result<()> {
        self.stream.register(poll, token, ready, opt)
    }

    fn reregister(&self, poll: &Poll, token: Token, ready: Ready, opt: PollOpt) -> io::Result<()> {
        self.stream.reregister(poll, token, ready, opt)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        Evented::deregister(&self.stream, poll)
    }
}

impl IoStream for FrameStream {}

/// The bytes between the socket and amiquip.
#[derive(Default)]
struct FrameFilter {
    bytes: Vec<u8>,
    /// How many of them were given out.
    taken: usize,
    /// Up to where they are checked and may be given out.
    ready: usize,
    /// How many bytes of a frame that needs no check are still to come.
    pass: usize,
}

impl FrameFilter {
    fn take(&mut self, out: &mut [u8]) -> usize {
        let count = out.len().min(self.ready - self.taken);
        out[..count].copy_from_slice(&self.bytes[self.taken..][..count]);
        self.taken += count;
        count
    }

    /// Adds what was read. Only an incomplete content header, or the begin of a frame whose type or
    /// size is not known yet, is held back.
    fn add(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.taken);
        self.ready -= self.taken;
        self.taken = 0;
        self.bytes.extend_from_slice(bytes);
        loop {
            let passed = self.pass.min(self.bytes.len() - self.ready);
            self.ready += passed;
            self.pass -= passed;
            let rest = &mut self.bytes[self.ready..];
            let Some((kind, size)) = frame_header(rest).filter(|_| self.pass == 0) else { return };
            let length = FRAME_HEADER_BYTES + size + FRAME_END_BYTES;
            if kind != CONTENT_HEADER {
                self.pass = length;
            } else if let Some(frame) = rest.get_mut(..length) {
                repair(&mut frame[FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + size]);
                self.ready += length;
            } else {
                return;
            }
        }
    }
}

/// The type and the payload size of the frame that begins here.
fn frame_header(bytes: &[u8]) -> Option<(u8, usize)> {
    let header = bytes.get(..FRAME_HEADER_BYTES)?;
    let size = u32::from_be_bytes(header[3..7].try_into().ok()?);
    Some((header[0], size as usize))
}

/// The properties of class basic in the order of their flags, the highest first.
#[derive(Clone, Copy, PartialEq)]
enum Property {
    ShortString,
    MessageId,
    Table,
    Octet,
    Timestamp,
}

const PROPERTIES: [Property; 14] = [
    Property::ShortString, // content-type
    Property::ShortString, // content-encoding
    Property::Table,       // headers
    Property::Octet,       // delivery-mode
    Property::Octet,       // priority
    Property::ShortString, // correlation-id
    Property::ShortString, // reply-to
    Property::ShortString, // expiration
    Property::MessageId,
    Property::Timestamp,
    Property::ShortString, // type
    Property::ShortString, // user-id
    Property::ShortString, // app-id
    Property::ShortString, // cluster-id
];

/// Replaces invalid bytes in a content header's payload. One that cannot be parsed stays as it is.
fn repair(payload: &mut [u8]) {
    if let Some(properties) = payload.get_mut(FIXED_BYTES..) {
        let _ = repair_properties(properties);
    }
}

fn repair_properties(mut rest: &mut [u8]) -> Option<()> {
    let flags = u16::from_be_bytes(split(&mut rest, 2)?.try_into().ok()?);
    for (index, property) in PROPERTIES.into_iter().enumerate() {
        if flags & (1 << (15 - index)) == 0 {
            continue;
        }
        match property {
            Property::Octet => drop(split(&mut rest, 1)?),
            Property::Timestamp => drop(split(&mut rest, 8)?),
            Property::Table => repair_table(&mut rest)?,
            Property::ShortString => replace_invalid(short_string(&mut rest)?, b'?'),
            Property::MessageId => replace_invalid(short_string(&mut rest)?, 0),
        }
    }
    Some(())
}

fn repair_table(rest: &mut &mut [u8]) -> Option<()> {
    let length = long(rest)?;
    let mut table = split(rest, length)?;
    while !table.is_empty() {
        replace_invalid(short_string(&mut table)?, b'?');
        repair_value(&mut table)?;
    }
    Some(())
}

/// One field value: its type and the value, by RabbitMQ's table of types (AMQP 0-9-1 errata,
/// section 3).
fn repair_value(rest: &mut &mut [u8]) -> Option<()> {
    let kind = split(rest, 1)?;
    match kind[0] {
        b'V' => (),
        b't' | b'b' | b'B' => drop(split(rest, 1)?),
        b's' | b'u' | b'U' => drop(split(rest, 2)?),
        b'I' | b'i' | b'f' => drop(split(rest, 4)?),
        b'D' => drop(split(rest, 5)?),
        b'l' | b'L' | b'd' | b'T' => drop(split(rest, 8)?),
        b'F' => repair_table(rest)?,
        b'x' => {
            let length = long(rest)?;
            split(rest, length)?;
        }
        b'S' => {
            let length = long(rest)?;
            if str::from_utf8(split(rest, length)?).is_err() {
                kind[0] = b'x';
            }
        }
        b'A' => {
            let length = long(rest)?;
            let mut array = split(rest, length)?;
            while !array.is_empty() {
                repair_value(&mut array)?;
            }
        }
        _ => return None,
    }
    Some(())
}

fn split<'p>(rest: &mut &'p mut [u8], count: usize) -> Option<&'p mut [u8]> {
    let (first, others) = std::mem::take(rest).split_at_mut_checked(count)?;
    *rest = others;
    Some(first)
}

fn long(rest: &mut &mut [u8]) -> Option<usize> {
    Some(u32::from_be_bytes(split(rest, 4)?.try_into().ok()?) as usize)
}

fn short_string<'p>(rest: &mut &'p mut [u8]) -> Option<&'p mut [u8]> {
    let length = usize::from(split(rest, 1)?[0]);
    split(rest, length)
}

fn replace_invalid(mut text: &mut [u8], replacement: u8) {
    while let Err(err) = str::from_utf8(text) {
        let invalid = err.error_len().unwrap_or(text.len() - err.valid_up_to());
        let end = err.valid_up_to() + invalid;
        text[err.valid_up_to()..end].fill(replacement);
        text = &mut text[end..];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn short(text: &[u8]) -> Vec<u8> {
        [&[text.len() as u8], text].concat()
    }

    fn table(name: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
        let field =
            [short(name), vec![kind], (value.len() as u32).to_be_bytes().into(), value.into()];
        let field = field.concat();
        [(field.len() as u32).to_be_bytes().to_vec(), field].concat()
    }

    /// A frame of this type around a payload.
    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = (payload.len() as u32).to_be_bytes();
        [&[kind, 0, 1], &size[..], payload, &[0xce]].concat()
    }

    /// A content header with headers, correlation id and message id.
    fn content_header(headers: &[u8], correlation_id: &[u8], message_id: &[u8]) -> Vec<u8> {
        let flags = (1u16 << 13 | 1 << 10 | 1 << 7).to_be_bytes();
        let properties = [&flags[..], headers, &short(correlation_id), &short(message_id)].concat();
        frame(CONTENT_HEADER, &[&[0; FIXED_BYTES][..], &properties].concat())
    }

    /// What comes out for `sent`, read in parts of `part` bytes.
    fn filtered(sent: &[u8], part: usize) -> Vec<u8> {
        let (mut filter, mut out, mut buffer) = (FrameFilter::default(), Vec::new(), [0; 7]);
        for bytes in sent.chunks(part) {
            filter.add(bytes);
            loop {
                match filter.take(&mut buffer) {
                    0 => break,
                    taken => out.extend_from_slice(&buffer[..taken]),
                }
            }
        }
        out
    }

    #[test]
    fn invalid_bytes_are_replaced_and_nothing_else_changes() {
        let sent = [
            frame(1, b"\xff method"),
            content_header(&table(b"na\xffme", b'S', b"v\xff"), b"caf\xe9", b"id\xff\xc3"),
            frame(3, b"\xff body"),
        ];
        let expected = [
            frame(1, b"\xff method"),
            content_header(&table(b"na?me", b'x', b"v\xff"), b"caf?", b"id\0\0"),
            frame(3, b"\xff body"),
        ];
        for part in [1, 2, 3, 10, 1000] {
            assert_eq!(filtered(&sent.concat(), part), expected.concat(), "in parts of {part}");
        }
    }

    proptest! {
        #[test]
        fn valid_frames_pass_unchanged(
            name in "[a-zé]{0,8}", value in ".{0,20}", correlation in ".{0,20}", id in ".{0,20}",
            part in 1usize..40,
        ) {
            let headers = table(name.as_bytes(), b'S', value.as_bytes());
            let header = content_header(&headers, correlation.as_bytes(), id.as_bytes());
            let sent = [frame(1, b"deliver"), header, frame(3, b"{}"), frame(8, b"")].concat();
            prop_assert_eq!(filtered(&sent, part), sent);
        }

        #[test]
        fn any_payload_keeps_its_length(payload: Vec<u8>, part in 1usize..40) {
            let sent = frame(CONTENT_HEADER, &payload);
            prop_assert_eq!(filtered(&sent, part).len(), sent.len());
        }
    }
}
