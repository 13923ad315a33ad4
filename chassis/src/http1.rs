//! HTTP/1.1 message framing (RFC 9112), strict: whatever two parsers could read
//! differently is refused, because the gateway and what stands behind it must
//! never disagree about where a request ends.
//!
//! Pure functions over bytes; `server` does the reading and the waiting. Public
//! for the fuzzer, which has no socket.

use httparse::Status;

use crate::problem::Problem;
use crate::server::Limits;

/// Longest request target, in bytes.
const MAX_TARGET: usize = 8 << 10;

/// Room for header fields; what a server allows is less.
const HEADER_ROOM: usize = 128;

/// Longest chunk-size line and longest trailer section, in bytes.
const MAX_CHUNK_LINE: usize = 256;
const MAX_TRAILERS: usize = 8 << 10;

/// What a request says before its body.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestHead {
    /// Any token.
    pub method: String,
    /// Path and query as they were sent.
    pub target: String,
    /// Names and values, without the white space around the values.
    pub headers: Vec<(String, String)>,
    /// How long the body is.
    pub framing: BodyFraming,
    /// Whether the client wants to send another request.
    pub keep_alive: bool,
    /// HTTP/1.0 and not 1.1.
    pub is_http10: bool,
    /// The client waits for a 100 before it sends the body.
    pub expects_continue: bool,
}

/// How the end of the body is told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BodyFraming {
    /// There is none.
    None,
    /// By its number of bytes.
    Length(usize),
    /// By a last chunk.
    Chunked,
}

/// Takes the next head out of `buffer`, with the empty lines before it (RFC 9112
/// section 2.2); `None` while it is not complete. `scan_offset` is zero for a new head
/// and kept between the calls for one.
pub fn parse_next_head(
    buffer: &mut Vec<u8>,
    scan_offset: &mut usize,
    limits: &Limits,
) -> Result<Option<RequestHead>, Problem> {
    while buffer.starts_with(b"\r\n") {
        buffer.drain(..2);
        *scan_offset = 0;
    }
    let Some(end) = head_end(buffer, scan_offset, limits.max_head_bytes)? else { return Ok(None) };
    let head = parse_head(&buffer[..end], limits.max_header_fields, limits.max_body_bytes)?;
    buffer.drain(..end);
    Ok(Some(head))
}

/// Finds the end of the head: the number of its bytes once all are there.
///
/// `scan_offset` remembers, between calls with a growing `buffer`, what need not be
/// looked at again. The outcome depends on the bytes alone, not on how they were
/// cut into packets.
fn head_end(
    buffer: &[u8],
    scan_offset: &mut usize,
    max_head: usize,
) -> Result<Option<usize>, Problem> {
    if buffer.first().is_some_and(|first| !is_token(*first) && *first != b'\r') {
        return Err(Problem::bad_request("this is not an HTTP request"));
    }
    let limit = buffer.len().min(max_head);
    while let Some(offset) = buffer[*scan_offset..limit].iter().position(|byte| *byte == b'\n') {
        let end = *scan_offset + offset + 1;
        *scan_offset = end;
        if !buffer[..end].ends_with(b"\r\n") {
            return Err(Problem::bad_request("a line of the head ends without a carriage return"));
        }
        if buffer[..end].ends_with(b"\r\n\r\n") {
            return Ok(Some(end));
        }
    }
    *scan_offset = limit;
    if buffer.len() < max_head {
        return Ok(None);
    }
    let first_line = buffer[..max_head].iter().position(|byte| *byte == b'\n');
    if first_line.is_none_or(|length| length > MAX_TARGET) {
        return Err(uri_too_long());
    }
    Err(Problem::new(431, format!("the head may have at most {max_head} bytes")))
}

fn uri_too_long() -> Problem {
    Problem::new(414, format!("path and query may have at most {MAX_TARGET} bytes"))
}

/// Reads a whole head of at most `max_headers` fields (128 in any case); a body may
/// have at most `max_body` bytes.
fn parse_head(bytes: &[u8], max_headers: usize, max_body: usize) -> Result<RequestHead, Problem> {
    let mut fields = [httparse::EMPTY_HEADER; HEADER_ROOM];
    let mut parsed = httparse::Request::new(&mut fields);
    match parsed.parse(bytes) {
        Ok(Status::Complete(_)) if parsed.headers.len() <= max_headers => (),
        Ok(Status::Partial) => return Err(Problem::bad_request("the head is not complete")),
        Ok(Status::Complete(_)) | Err(httparse::Error::TooManyHeaders) => {
            let detail = format!("a request may have at most {max_headers} header fields");
            return Err(Problem::new(431, detail));
        }
        Err(httparse::Error::Version) => {
            return Err(Problem::new(505, "the server speaks HTTP/1.1 and HTTP/1.0"));
        }
        Err(err) => return Err(Problem::bad_request(format!("the head is malformed: {err}"))),
    }
    let is_http10 = parsed.version == Some(0);
    let method = parsed.method.unwrap_or_default().to_owned();
    let target = parsed.path.unwrap_or_default();
    if target.len() > MAX_TARGET {
        return Err(uri_too_long());
    }

    let mut headers = Vec::with_capacity(parsed.headers.len());
    for field in parsed.headers.iter() {
        let value = str::from_utf8(field.value)
            .map_err(|_| Problem::bad_request(format!("header {} is not UTF-8", field.name)))?;
        headers.push((field.name.to_owned(), value.trim_matches([' ', '\t']).to_owned()));
    }
    let (target, authority) = origin_form(&method, target)?;
    check_host(&mut headers, authority, is_http10)?;
    let body = body_framing(&headers, is_http10, max_body)?;

    let connection = tokens(&headers, "Connection");
    let close = connection.iter().any(|token| token == "close");
    let keep = connection.iter().any(|token| token == "keep-alive");
    let expects_continue = match only(&headers, "Expect")? {
        Some(expect) if !expect.eq_ignore_ascii_case("100-continue") => {
            return Err(Problem::new(417, "the only expectation served is 100-continue"));
        }
        expect => expect.is_some() && !is_http10,
    };
    let keep_alive = if is_http10 { keep && !close } else { !close };
    Ok(RequestHead {
        method,
        target,
        headers,
        framing: body,
        keep_alive,
        is_http10,
        expects_continue,
    })
}

/// Reduces a target to path and query (RFC 9112 section 3.2), with the authority
/// that an absolute target names.
fn origin_form<'t>(method: &str, target: &'t str) -> Result<(String, Option<&'t str>), Problem> {
    if target.contains('#') {
        return Err(Problem::bad_request("a request target has no fragment"));
    }
    // Its target is an authority, and whoever passes it on would make it one.
    if method == "CONNECT" {
        return Err(Problem::bad_request("there are no tunnels here"));
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok((target.to_owned(), None));
    }
    let absolute = target.strip_prefix("http://").or_else(|| target.strip_prefix("https://"));
    match absolute {
        Some(rest) => {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            let (authority, path) = rest.split_at(end);
            let slash = if path.starts_with('/') { "" } else { "/" };
            Ok((format!("{slash}{path}"), Some(authority)))
        }
        None => Err(Problem::bad_request("a request target starts with a slash")),
    }
}

/// Exactly one sound Host field, save with HTTP/1.0 (RFC 9112 section 3.2).
fn check_host(
    headers: &mut Vec<(String, String)>,
    authority: Option<&str>,
    is_http10: bool,
) -> Result<(), Problem> {
    match only(headers, "Host")? {
        None if !is_http10 => return Err(Problem::bad_request("the Host header is missing")),
        Some(host) if !host.bytes().all(is_authority) => {
            return Err(Problem::bad_request("the Host header is malformed"));
        }
        _ => (),
    }
    if let Some(authority) = authority {
        if authority.is_empty() || !authority.bytes().all(is_authority) {
            return Err(Problem::bad_request("the authority of the target is malformed"));
        }
        // An absolute target outweighs the Host field.
        headers.retain(|(name, _)| !name.eq_ignore_ascii_case("Host"));
        headers.push(("Host".to_owned(), authority.to_owned()));
    }
    Ok(())
}

/// RFC 9112 section 6, without its leniencies.
fn body_framing(
    headers: &[(String, String)],
    is_http10: bool,
    max_body: usize,
) -> Result<BodyFraming, Problem> {
    let length = only(headers, "Content-Length")?;
    let has_coding = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("Transfer-Encoding"));
    if has_coding {
        if is_http10 || length.is_some() {
            return Err(Problem::bad_request(
                "Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0",
            ));
        }
        return match only(headers, "Transfer-Encoding")? {
            Some(coding) if coding.eq_ignore_ascii_case("chunked") => Ok(BodyFraming::Chunked),
            _ => Err(Problem::new(501, "the only transfer coding served is chunked")),
        };
    }
    let Some(digits) = length else { return Ok(BodyFraming::None) };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Problem::bad_request("Content-Length must be digits and nothing else"));
    }
    // Digits that do not fit are a number over any limit.
    match digits.parse::<usize>() {
        Ok(length) if length <= max_body => Ok(BodyFraming::Length(length)),
        _ => Err(too_large(max_body)),
    }
}

/// 413 with the limit that was passed.
fn too_large(max_body: usize) -> Problem {
    Problem::new(413, format!("the body may have at most {max_body} bytes"))
}

/// The value of a field that must not be repeated.
fn only<'h>(headers: &'h [(String, String)], wanted: &str) -> Result<Option<&'h str>, Problem> {
    let mut found = headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
    let first = found.next().map(|(_, value)| value.as_str());
    match found.next() {
        Some(_) => Err(Problem::bad_request(format!("the header {wanted} is repeated"))),
        None => Ok(first),
    }
}

/// The members of a list field, in lower case.
fn tokens(headers: &[(String, String)], wanted: &str) -> Vec<String> {
    let values = headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
    let members = values.flat_map(|(_, value)| value.split(','));
    members.map(|member| member.trim().to_ascii_lowercase()).collect()
}

/// RFC 9110 section 5.6.2.
pub(crate) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// RFC 3986 section 3.2, less the user part that no Host may have.
fn is_authority(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=:[]".contains(&byte)
}

/// Reads a body from pieces of any size.
pub struct BodyDecoder(Framing);

enum Framing {
    /// Bytes that are still to come.
    Length(usize),
    Chunked(Chunked),
}

impl BodyDecoder {
    /// For a body whose end is told like this; chunks are limited together to `max_body` bytes.
    pub fn new(body: BodyFraming, max_body: usize) -> BodyDecoder {
        BodyDecoder(match body {
            BodyFraming::None => Framing::Length(0),
            BodyFraming::Length(length) => Framing::Length(length),
            BodyFraming::Chunked => Framing::Chunked(Chunked::new(max_body)),
        })
    }

    /// Whether the whole body has been read.
    pub fn is_done(&self) -> bool {
        match &self.0 {
            Framing::Length(left) => *left == 0,
            Framing::Chunked(chunked) => chunked.is_done(),
        }
    }

    /// Takes what it can from `input`, appends the decoded bytes to `body`, and
    /// tells how many bytes it took: fewer than all only when the body is done.
    pub fn feed(&mut self, input: &[u8], body: &mut Vec<u8>) -> Result<usize, Problem> {
        match &mut self.0 {
            Framing::Length(left) => {
                let piece = input.len().min(*left);
                body.extend_from_slice(&input[..piece]);
                *left -= piece;
                Ok(piece)
            }
            Framing::Chunked(chunked) => chunked.feed(input, body),
        }
    }
}

/// A chunked body (RFC 9112 section 7.1).
struct Chunked {
    state: ChunkState,
    line: Vec<u8>,
    trailers: usize,
    max_body: usize,
}

enum ChunkState {
    Size,
    Data(usize),
    DataEnd,
    Trailers,
    Done,
}

impl Chunked {
    fn new(max_body: usize) -> Chunked {
        Chunked { state: ChunkState::Size, line: Vec::new(), trailers: 0, max_body }
    }

    fn is_done(&self) -> bool {
        matches!(self.state, ChunkState::Done)
    }

    fn feed(&mut self, input: &[u8], body: &mut Vec<u8>) -> Result<usize, Problem> {
        let mut taken = 0;
        while taken < input.len() && !self.is_done() {
            let rest = &input[taken..];
            if let ChunkState::Data(left) = self.state {
                let piece = left.min(rest.len());
                body.extend_from_slice(&rest[..piece]);
                taken += piece;
                self.state = match left - piece {
                    0 => ChunkState::DataEnd,
                    left => ChunkState::Data(left),
                };
                continue;
            }
            taken += 1;
            self.line.push(rest[0]);
            if rest[0] == b'\n' {
                let line = std::mem::take(&mut self.line);
                let line = line.strip_suffix(b"\r\n").ok_or_else(|| {
                    Problem::bad_request("a chunk line ends without a carriage return")
                })?;
                self.state = self.end_of_line(line, body.len())?;
            } else if self.line.len() > MAX_CHUNK_LINE
                && !matches!(self.state, ChunkState::Trailers)
            {
                return Err(Problem::bad_request("a chunk-size line is too long"));
            } else if self.trailers + self.line.len() > MAX_TRAILERS {
                return Err(Problem::new(431, "the trailer section is too long"));
            }
        }
        Ok(taken)
    }

    fn end_of_line(&mut self, line: &[u8], so_far: usize) -> Result<ChunkState, Problem> {
        match self.state {
            ChunkState::Size => {
                let (size, extension) = match line.iter().position(|byte| *byte == b';') {
                    Some(at) => line.split_at(at),
                    None => (line, &b""[..]),
                };
                let text = str::from_utf8(size).ok().filter(|text| {
                    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
                });
                let clean = !extension.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t');
                let (Some(text), true) = (text, clean) else {
                    return Err(Problem::bad_request("a chunk size is malformed"));
                };
                match usize::from_str_radix(text, 16) {
                    Ok(0) => Ok(ChunkState::Trailers),
                    Ok(size) if size <= self.max_body - so_far => Ok(ChunkState::Data(size)),
                    _ => Err(too_large(self.max_body)),
                }
            }
            ChunkState::DataEnd if line.is_empty() => Ok(ChunkState::Size),
            ChunkState::DataEnd => Err(Problem::bad_request("a chunk is longer than its size")),
            ChunkState::Trailers if line.is_empty() => Ok(ChunkState::Done),
            ChunkState::Trailers => {
                // Trailers are read for their form and then dropped: nobody here uses one.
                let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
                let sound = name.len() < line.len()
                    && !name.is_empty()
                    && name.iter().all(|byte| is_token(*byte))
                    && !line.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t');
                self.trailers += line.len() + 2;
                if sound {
                    Ok(ChunkState::Trailers)
                } else {
                    Err(Problem::bad_request("a trailer field is malformed"))
                }
            }
            ChunkState::Data(_) | ChunkState::Done => Err(Problem::internal()),
        }
    }
}
