//! HTTP/1.1 message framing (RFC 9112), strict: input that two parsers could read differently
//! is rejected, because the gateway and its upstreams must agree about where a request ends.
//!
//! Pure functions over bytes; `server` reads the sockets. Public for the fuzzer.

use httparse::Status;

use crate::problem::Problem;

/// Longest request target, in bytes.
const MAX_TARGET_BYTES: usize = 8 << 10;

/// The most header fields that can be parsed; a server allows fewer.
const MAX_PARSED_HEADERS: usize = 128;

/// Longest chunk-size line and longest trailer section, in bytes.
const MAX_CHUNK_LINE_BYTES: usize = 256;
const MAX_TRAILER_BYTES: usize = 8 << 10;

/// The limits of a request's head and body.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Longest head, its request line and header fields together, in bytes.
    pub max_head_bytes: usize,
    /// Most header fields.
    pub max_header_fields: usize,
    /// Largest body, in bytes.
    pub max_body_bytes: usize,
}

/// A request's head: all that comes before its body.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestHead {
    /// The method, any token.
    pub method: String,
    /// Path and query as they were sent.
    pub target: String,
    /// Names and values, without the white space around the values. A value is opaque bytes (RFC
    /// 9110 section 5.5): each byte is one character U+0000 to U+00FF (ISO 8859-1), so that no
    /// byte is lost. [`crate::request::header_bytes`] gives the bytes back.
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

/// How the end of the body is recognised.
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
    limits: &HeadLimits,
) -> Result<Option<RequestHead>, Problem> {
    while buffer.starts_with(b"\r\n") {
        buffer.drain(..2);
        *scan_offset = 0;
    }
    let Some(end) = find_head_end(buffer, scan_offset, limits.max_head_bytes)? else {
        return Ok(None);
    };
    let head = parse_head(&buffer[..end], limits)?;
    buffer.drain(..end);
    Ok(Some(head))
}

/// Finds the end of the head: the number of its bytes once all are there.
///
/// `scan_offset` remembers, between calls with a growing `buffer`, how far it was searched. The
/// result depends only on the bytes, not on how they were split into packets.
fn find_head_end(
    buffer: &[u8],
    scan_offset: &mut usize,
    max_head: usize,
) -> Result<Option<usize>, Problem> {
    if buffer.first().is_some_and(|first| !is_token_byte(*first) && *first != b'\r') {
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
    if first_line.is_none_or(|length| length > MAX_TARGET_BYTES) {
        return Err(uri_too_long());
    }
    Err(Problem::new(431, format!("the head may have at most {max_head} bytes")))
}

fn uri_too_long() -> Problem {
    Problem::new(414, format!("path and query may have at most {MAX_TARGET_BYTES} bytes"))
}

/// Parses a complete head.
fn parse_head(bytes: &[u8], limits: &HeadLimits) -> Result<RequestHead, Problem> {
    let HeadLimits { max_header_fields, max_body_bytes, .. } = *limits;
    let mut fields = [httparse::EMPTY_HEADER; MAX_PARSED_HEADERS];
    let mut parsed = httparse::Request::new(&mut fields);
    match parsed.parse(bytes) {
        Ok(Status::Complete(_)) if parsed.headers.len() <= max_header_fields => (),
        Ok(Status::Partial) => return Err(Problem::bad_request("the head is not complete")),
        Ok(Status::Complete(_)) | Err(httparse::Error::TooManyHeaders) => {
            let detail = format!("a request may have at most {max_header_fields} header fields");
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
    if target.len() > MAX_TARGET_BYTES {
        return Err(uri_too_long());
    }

    let mut headers = Vec::with_capacity(parsed.headers.len());
    for field in parsed.headers.iter() {
        let value: String = field.value.iter().map(|byte| char::from(*byte)).collect();
        headers.push((field.name.to_owned(), value.trim_matches([' ', '\t']).to_owned()));
    }
    let (target, authority) = origin_form(&method, target)?;
    validate_host(&mut headers, authority, is_http10)?;
    let framing = body_framing(&headers, is_http10, max_body_bytes)?;

    let connection = list_values(&headers, "Connection");
    let close = connection.iter().any(|token| token == "close");
    let keep = connection.iter().any(|token| token == "keep-alive");
    let expects_continue = match single_value(&headers, "Expect")? {
        Some(expect) if !expect.eq_ignore_ascii_case("100-continue") => {
            return Err(Problem::new(417, "the only expectation served is 100-continue"));
        }
        expect => expect.is_some() && !is_http10,
    };
    let keep_alive = if is_http10 { keep && !close } else { !close };
    Ok(RequestHead { method, target, headers, framing, keep_alive, is_http10, expects_continue })
}

/// Reduces a target to path and query (RFC 9112 section 3.2), with the authority
/// that an absolute target names.
fn origin_form<'t>(method: &str, target: &'t str) -> Result<(String, Option<&'t str>), Problem> {
    if target.contains('#') {
        return Err(Problem::bad_request("a request target has no fragment"));
    }
    // The target of CONNECT is an authority; passed on, it would be taken for one.
    if method == "CONNECT" {
        return Err(Problem::bad_request("CONNECT is not supported"));
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok((target.to_owned(), None));
    }
    // A scheme is case-insensitive (RFC 3986 section 3.1).
    let absolute = target.split_once("://").filter(|(scheme, _)| {
        scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https")
    });
    match absolute {
        Some((_, rest)) => {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            let (authority, path) = rest.split_at(end);
            let slash = if path.starts_with('/') { "" } else { "/" };
            Ok((format!("{slash}{path}"), Some(authority)))
        }
        None => Err(Problem::bad_request("a request target starts with a slash")),
    }
}

/// There must be exactly one valid Host field, except with HTTP/1.0 (RFC 9112 section 3.2).
fn validate_host(
    headers: &mut Vec<(String, String)>,
    authority: Option<&str>,
    is_http10: bool,
) -> Result<(), Problem> {
    match single_value(headers, "Host")? {
        None if !is_http10 => return Err(Problem::bad_request("the Host header is missing")),
        Some(host) if !host.bytes().all(is_authority_byte) => {
            return Err(Problem::bad_request("the Host header is malformed"));
        }
        _ => (),
    }
    if let Some(authority) = authority {
        if authority.is_empty() || !authority.bytes().all(is_authority_byte) {
            return Err(Problem::bad_request("the authority of the target is malformed"));
        }
        // The authority of an absolute target replaces the Host field.
        headers.retain(|(name, _)| !name.eq_ignore_ascii_case("Host"));
        headers.push(("Host".to_owned(), authority.to_owned()));
    }
    Ok(())
}

/// RFC 9112 section 6, without the exceptions that it allows a recipient.
fn body_framing(
    headers: &[(String, String)],
    is_http10: bool,
    max_body: usize,
) -> Result<BodyFraming, Problem> {
    let length = single_value(headers, "Content-Length")?;
    let has_coding = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("Transfer-Encoding"));
    if has_coding {
        if is_http10 || length.is_some() {
            return Err(Problem::bad_request(
                "Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0",
            ));
        }
        return match single_value(headers, "Transfer-Encoding")? {
            Some(coding) if coding.eq_ignore_ascii_case("chunked") => Ok(BodyFraming::Chunked),
            _ => Err(Problem::new(501, "the only transfer coding served is chunked")),
        };
    }
    let Some(digits) = length else { return Ok(BodyFraming::None) };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Problem::bad_request("Content-Length must be digits and nothing else"));
    }
    // Digits that do not fit into a usize exceed any limit.
    match digits.parse::<usize>() {
        Ok(length) if length <= max_body => Ok(BodyFraming::Length(length)),
        _ => Err(content_too_large(max_body)),
    }
}

/// 413, naming the limit.
fn content_too_large(max_body: usize) -> Problem {
    Problem::new(413, format!("the body may have at most {max_body} bytes"))
}

/// The value of a field that must not be repeated.
fn single_value<'h>(
    headers: &'h [(String, String)],
    wanted: &str,
) -> Result<Option<&'h str>, Problem> {
    let mut found = headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
    let first = found.next().map(|(_, value)| value.as_str());
    match found.next() {
        Some(_) => Err(Problem::bad_request(format!("the header {wanted} is repeated"))),
        None => Ok(first),
    }
}

/// The members of a list field, in lower case.
fn list_values(headers: &[(String, String)], wanted: &str) -> Vec<String> {
    let values = headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
    let members = values.flat_map(|(_, value)| value.split(','));
    members.map(|member| member.trim().to_ascii_lowercase()).collect()
}

/// RFC 9110 section 5.6.2.
pub(crate) fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// RFC 3986 section 3.2, less the user part that no Host may have.
fn is_authority_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=:[]".contains(&byte)
}

/// Decodes a body from input that is split anyhow.
pub struct BodyDecoder(DecoderState);

enum DecoderState {
    /// The number of bytes that are missing.
    Length(usize),
    Chunked(ChunkedDecoder),
}

impl BodyDecoder {
    /// A decoder for this framing; a chunked body may have at most `max_body` bytes in all.
    pub fn new(body: BodyFraming, max_body: usize) -> BodyDecoder {
        BodyDecoder(match body {
            BodyFraming::None => DecoderState::Length(0),
            BodyFraming::Length(length) => DecoderState::Length(length),
            BodyFraming::Chunked => DecoderState::Chunked(ChunkedDecoder::new(max_body)),
        })
    }

    /// Whether the body is complete.
    pub fn is_done(&self) -> bool {
        match &self.0 {
            DecoderState::Length(left) => *left == 0,
            DecoderState::Chunked(chunked) => chunked.is_done(),
        }
    }

    /// Decodes `input`, appends the decoded bytes to `body`, and returns how many bytes of `input`
    /// it has used: fewer than all only when the body is complete.
    pub fn feed(&mut self, input: &[u8], body: &mut Vec<u8>) -> Result<usize, Problem> {
        match &mut self.0 {
            DecoderState::Length(left) => {
                let piece = input.len().min(*left);
                body.extend_from_slice(&input[..piece]);
                *left -= piece;
                Ok(piece)
            }
            DecoderState::Chunked(chunked) => chunked.feed(input, body),
        }
    }
}

/// A chunked body (RFC 9112 section 7.1).
struct ChunkedDecoder {
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

impl ChunkedDecoder {
    fn new(max_body: usize) -> ChunkedDecoder {
        ChunkedDecoder { state: ChunkState::Size, line: Vec::new(), trailers: 0, max_body }
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
            } else if self.line.len() > MAX_CHUNK_LINE_BYTES
                && !matches!(self.state, ChunkState::Trailers)
            {
                return Err(Problem::bad_request("a chunk-size line is too long"));
            } else if self.trailers + self.line.len() > MAX_TRAILER_BYTES {
                return Err(Problem::new(431, "the trailer section is too long"));
            }
        }
        Ok(taken)
    }

    fn end_of_line(&mut self, line: &[u8], decoded: usize) -> Result<ChunkState, Problem> {
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
                    Ok(size) if size <= self.max_body - decoded => Ok(ChunkState::Data(size)),
                    _ => Err(content_too_large(self.max_body)),
                }
            }
            ChunkState::DataEnd if line.is_empty() => Ok(ChunkState::Size),
            ChunkState::DataEnd => Err(Problem::bad_request("a chunk is longer than its size")),
            ChunkState::Trailers if line.is_empty() => Ok(ChunkState::Done),
            ChunkState::Trailers => {
                // Trailers are checked and discarded: no service uses one.
                let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
                let is_valid = name.len() < line.len()
                    && !name.is_empty()
                    && name.iter().all(|byte| is_token_byte(*byte))
                    && !line.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t');
                self.trailers += line.len() + 2;
                if is_valid {
                    Ok(ChunkState::Trailers)
                } else {
                    Err(Problem::bad_request("a trailer field is malformed"))
                }
            }
            ChunkState::Data(_) | ChunkState::Done => Err(Problem::internal()),
        }
    }
}
