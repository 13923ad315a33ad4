//! The request parser: a stream of bytes is read in one way, however it is cut into packets, and
//! no more lenient parser reads it differently.

use std::sync::LazyLock;

use chassis::http1::{self, BodyDecoder, BodyFraming, HeadLimits, RequestHead};
use chassis::problem::Problem;

/// Small limits, so that the fuzzer also finds inputs beyond them.
const LIMITS: HeadLimits =
    HeadLimits { max_head_bytes: 1024, max_header_fields: 16, max_body_bytes: 256 };

/// The control: with this variable set the parser accepts `Content-Length: +3` as 3, and the
/// checks must find it.
static MUTANT: LazyLock<bool> = LazyLock::new(|| std::env::var_os("FUZZ_MUTANT").is_some());

/// Panics where another parser could read `stream` differently.
pub fn check(stream: &[u8]) {
    let whole = read(&[stream]);
    for size in [1, 5] {
        let pieces: Vec<&[u8]> = stream.chunks(size).collect();
        assert_eq!(read(&pieces), whole, "read differently in pieces of {size}");
    }
    let mut start = 0;
    for request in &whole.requests {
        is_valid(request);
        for leniency in Leniency::all() {
            let lenient =
                leniency.read(&stream[start..]).map(|(body, bytes)| (body, start + bytes));
            let ours = (request.body.clone(), request.end);
            assert_eq!(lenient.as_ref(), Some(&ours), "{leniency:?} reads {request:?} differently");
        }
        start = request.end;
        reserialises_identically(request);
    }
}

/// A request, its body decoded, and where it ends in the stream.
#[derive(Debug, PartialEq)]
struct Request {
    head: RequestHead,
    body: Vec<u8>,
    end: usize,
}

/// What became of a stream.
#[derive(Debug, Default, PartialEq)]
struct Reading {
    requests: Vec<Request>,
    /// Status and text of the rejection that ended it.
    rejected: Option<(u16, String)>,
}

/// One connection, read as the server reads it.
#[derive(Default)]
struct Connection {
    buffer: Vec<u8>,
    received: usize,
    scanned: usize,
    started: Option<(RequestHead, BodyDecoder, Vec<u8>)>,
    requests: Vec<Request>,
    closed: bool,
}

fn read(pieces: &[&[u8]]) -> Reading {
    let limits = LIMITS;
    let mut connection = Connection::default();
    for piece in pieces {
        connection.buffer.extend_from_slice(piece);
        connection.received += piece.len();
        if let Err(problem) = connection.advance(&limits) {
            let rejected = Some((problem.status(), problem.to_string()));
            return Reading { requests: connection.requests, rejected };
        }
        if connection.closed {
            break;
        }
    }
    Reading { requests: connection.requests, rejected: None }
}

impl Connection {
    /// Reads all requests that the buffer has completely.
    fn advance(&mut self, limits: &HeadLimits) -> Result<(), Problem> {
        while !self.closed {
            if self.started.is_none() {
                if *MUTANT {
                    accept_sign(&mut self.buffer);
                }
                let head = http1::parse_next_head(&mut self.buffer, &mut self.scanned, limits)?;
                let Some(head) = head else { return Ok(()) };
                self.scanned = 0;
                let reader = BodyDecoder::new(head.framing, limits.max_body_bytes);
                self.started = Some((head, reader, Vec::new()));
            }
            let Some((_, reader, body)) = &mut self.started else { return Ok(()) };
            let taken = reader.feed(&self.buffer, body)?;
            self.buffer.drain(..taken);
            if !reader.is_done() {
                return Ok(());
            }
            if let Some((head, _, body)) = self.started.take() {
                self.closed = !head.keep_alive;
                let end = self.received - self.buffer.len();
                self.requests.push(Request { head, body, end });
            }
        }
        Ok(())
    }
}

/// Replaces the sign of a length by a digit.
fn accept_sign(buffer: &mut [u8]) {
    let sign = b"\r\nContent-Length: +";
    let found = buffer.windows(sign.len()).position(|window| window.eq_ignore_ascii_case(sign));
    if let Some(at) = found {
        buffer[at + sign.len() - 1] = b'0';
    }
}

/// What a handler may rely on.
fn is_valid(Request { head, body, .. }: &Request) {
    let values = |wanted: &str| -> Vec<&str> {
        let named = head.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
        named.map(|(_, value)| value.as_str()).collect()
    };
    let (lengths, codings) = (values("Content-Length"), values("Transfer-Encoding"));
    match head.framing {
        BodyFraming::None => assert!(lengths.is_empty() && codings.is_empty() && body.is_empty()),
        BodyFraming::Length(length) => {
            assert_eq!(body.len(), length);
            assert!(codings.is_empty() && lengths.len() == 1);
            assert!(lengths[0].bytes().all(|byte| byte.is_ascii_digit()));
            assert_eq!(lengths[0].parse(), Ok(length));
        }
        BodyFraming::Chunked => {
            assert!(lengths.is_empty() && !head.is_http10);
            assert_eq!(codings.len(), 1);
        }
    }
    assert!(body.len() <= LIMITS.max_body_bytes);
    assert!(
        head.headers.len() <= LIMITS.max_header_fields + 1,
        "one more is the Host of an absolute target"
    );
    assert!(values("Host").len() == 1 || head.is_http10 && values("Host").is_empty());
    assert!(head.target.starts_with('/') || head.target == "*");
    let graphic = |text: &str| !text.bytes().any(|byte| byte <= b' ' || byte == 0x7f);
    assert!(graphic(&head.target) && graphic(&head.method) && !head.method.is_empty());
    for (name, value) in &head.headers {
        assert!(graphic(name) && !name.is_empty() && !name.contains(':'), "{name:?}");
        assert!(!value.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t'), "{value:?}");
        assert_eq!(value.trim_matches([' ', '\t']), value);
    }
}

/// A request that is written out as it was read is read in the same way.
fn reserialises_identically(request: &Request) {
    let Request { head, body, .. } = request;
    let mut out = Vec::new();
    let version = if head.is_http10 { "1.0" } else { "1.1" };
    out.extend(format!("{} {} HTTP/{version}\r\n", head.method, head.target).bytes());
    for (name, value) in &head.headers {
        out.extend(format!("{name}: ").bytes());
        out.extend(chassis::request::header_bytes(value));
        out.extend(b"\r\n");
    }
    out.extend(b"\r\n");
    if head.framing == BodyFraming::Chunked {
        for chunk in body.chunks(3) {
            out.extend(format!("{:X}\r\n", chunk.len()).bytes());
            out.extend(chunk);
            out.extend(b"\r\n");
        }
        out.extend(b"0\r\n\r\n");
    } else {
        out.extend(body);
    }
    let limits = HeadLimits { max_head_bytes: 4096, max_header_fields: 32, ..LIMITS };
    let length = out.len();
    let mut connection = Connection { buffer: out, received: length, ..Connection::default() };
    let ended = connection.advance(&limits).map_err(|problem| problem.to_string());
    assert_eq!(ended, Ok(()), "{request:?}");
    assert_eq!(connection.requests.len(), 1, "{request:?}");
    let again = &connection.requests[0];
    assert_eq!((&again.head, &again.body, again.end), (head, body, length));
}

/// A parser that accepts what parsers in the field have been seen to accept. Where ours accepts a
/// request, each of these must find the same body and the same end.
#[derive(Clone, Copy, Debug)]
struct Leniency {
    /// A lone carriage return ends a line, as a lone line feed does for all of them.
    bare_cr: bool,
    /// Of several lengths the last one counts, not the first.
    last_length: bool,
    /// Content-Length outweighs Transfer-Encoding.
    length_first: bool,
    /// A number may have a sign; otherwise a sign ends it.
    signs: bool,
}

impl Leniency {
    fn all() -> impl Iterator<Item = Leniency> {
        (0..16).map(|bits| Leniency {
            bare_cr: bits & 1 > 0,
            last_length: bits & 2 > 0,
            length_first: bits & 4 > 0,
            signs: bits & 8 > 0,
        })
    }

    /// The body of the first request and how many bytes the request has.
    fn read(self, stream: &[u8]) -> Option<(Vec<u8>, usize)> {
        let mut at = stream.iter().position(|byte| !b"\r\n".contains(byte))?;
        let mut fields: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        self.line(stream, &mut at)?;
        loop {
            let line = self.line(stream, &mut at)?;
            match (line.first(), fields.last_mut()) {
                (None, _) => break,
                (Some(b' ' | b'\t'), Some((_, value))) => value.extend(line),
                _ => {
                    let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
                    let name = line[..colon].trim_ascii().to_ascii_lowercase();
                    let value = line.get(colon + 1..).unwrap_or_default().trim_ascii();
                    fields.push((name, value.to_ascii_lowercase()));
                }
            }
        }
        let named = |wanted: &[u8]| -> Vec<&[u8]> {
            let found = fields.iter().filter(|(name, _)| name == wanted);
            found.map(|(_, value)| value.as_slice()).collect()
        };
        let lengths = named(b"content-length");
        let length = if self.last_length { lengths.last() } else { lengths.first() };
        let contains = |value: &&[u8]| value.windows(7).any(|word| word == b"chunked");
        let chunked = named(b"transfer-encoding").iter().any(contains);
        match length {
            Some(length) if self.length_first || !chunked => {
                let length = self.number(length, 10);
                let body = stream.get(at..at.checked_add(length)?)?;
                Some((body.to_vec(), at + length))
            }
            _ if chunked => self.chunks(stream, at),
            _ => Some((Vec::new(), at)),
        }
    }

    fn chunks(self, stream: &[u8], mut at: usize) -> Option<(Vec<u8>, usize)> {
        let mut body = Vec::new();
        loop {
            let size = self.number(self.line(stream, &mut at)?, 16);
            if size == 0 {
                break;
            }
            body.extend(stream.get(at..at.checked_add(size)?)?);
            at += size;
            self.line(stream, &mut at)?;
        }
        while !self.line(stream, &mut at)?.is_empty() {}
        Some((body, at))
    }

    /// The line at `at`, which is moved behind it.
    fn line<'s>(self, stream: &'s [u8], at: &mut usize) -> Option<&'s [u8]> {
        let rest = &stream[*at..];
        let ends = |byte: &u8| *byte == b'\n' || *byte == b'\r' && self.bare_cr;
        let length = rest.iter().position(ends)?;
        let both = rest[length..].starts_with(b"\r\n");
        *at += length + if both { 2 } else { 1 };
        let line = &rest[..length];
        Some(line.strip_suffix(b"\r").unwrap_or(line))
    }

    /// Like C's strtol: white space, a sign, a prefix, and as many digits as follow.
    fn number(self, text: &[u8], radix: u32) -> usize {
        let mut text = text.trim_ascii_start();
        if self.signs {
            text = text.strip_prefix(b"+").unwrap_or(text);
        }
        if radix == 16 && text.starts_with(b"0x") {
            text = &text[2..];
        }
        let digits = text.iter().map_while(|byte| char::from(*byte).to_digit(radix));
        digits.fold(0, |number: usize, digit| {
            number.saturating_mul(radix as usize).saturating_add(digit as usize)
        })
    }
}
