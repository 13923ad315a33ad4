//! Reading a request: its path, its headers and its JSON body.

use std::borrow::Cow;
use std::io::Read;

use rouille::Request;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::problem::Problem;

/// The path for routing, without the query. Percent-encoded unreserved characters are decoded,
/// because they mean the same (RFC 3986 section 6.2.2.2): `/api/%6Dovies` is `/api/movies`.
/// Everything else stays as it was sent: `%2F` is no separator.
pub fn path(request: &Request) -> Cow<'_, str> {
    let url = request.raw_url();
    let path = url.split_once('?').map_or(url, |(path, _)| path);
    if !path.contains('%') {
        return Cow::Borrowed(path);
    }
    let mut decoded = String::with_capacity(path.len());
    let mut parts = path.split('%');
    decoded.extend(parts.next());
    for part in parts {
        let byte = part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match byte.filter(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(byte)) {
            Some(byte) => {
                decoded.push(char::from(byte));
                decoded.push_str(&part[2..]);
            }
            None => {
                decoded.push('%');
                decoded.push_str(part);
            }
        }
    }
    Cow::Owned(decoded)
}

/// The request's id: the client's own if it is valid, else one made by the server.
pub fn request_id(request: &Request) -> &str {
    request.header("X-Request-Id").unwrap_or("-")
}

/// The values of a header that may come in several fields, in their order.
pub fn header_values<'r>(request: &'r Request, name: &str) -> impl Iterator<Item = &'r str> {
    let fields = request.headers().filter(move |(known, _)| known.eq_ignore_ascii_case(name));
    fields.map(|(_, value)| value)
}

/// The value of a header that must not be repeated.
pub fn single_header<'r>(request: &'r Request, name: &str) -> Result<Option<&'r str>, Problem> {
    let mut values = header_values(request, name);
    match (values.next(), values.next()) {
        (_, Some(_)) => Err(Problem::bad_request(format!("the header {name} is repeated"))),
        (first, None) => Ok(first),
    }
}

/// The key of the header `Idempotency-Key`, if there is one.
pub fn idempotency_key(request: &Request) -> Result<Option<String>, Problem> {
    let header = single_header(request, "Idempotency-Key")?;
    header.map(parse_idempotency_key).transpose()
}

/// The key in a value of `Idempotency-Key` (IETF draft-ietf-httpapi-idempotency-key-header), quoted as the
/// draft has it or bare: 1 to 255 printable ASCII characters, else 400.
pub fn parse_idempotency_key(header: &str) -> Result<String, Problem> {
    let inner = header.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let key = inner.unwrap_or(header);
    let printable = key.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    // In quotes a backslash begins an escape: neither it nor a quote is supported.
    let plain = !key.contains('"') && (inner.is_none() || !key.contains('\\'));
    if printable && plain && (1..=255).contains(&key.len()) {
        Ok(key.to_owned())
    } else {
        Err(Problem::bad_request("Idempotency-Key must be 1 to 255 printable ASCII characters"))
    }
}

/// The bytes of a header value. A value that was received has one character U+0000 to U+00FF for
/// each byte (see [`crate::http1::RequestHead`]); any other character is encoded as UTF-8.
pub fn header_bytes(value: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(value.len());
    for letter in value.chars() {
        match u8::try_from(letter) {
            Ok(byte) => bytes.push(byte),
            Err(_) => bytes.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

/// The header value for these bytes: the reverse of [`header_bytes`].
pub fn header_value(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

/// The body as text that is expected to be JSON, without a byte order mark (RFC 8259 section 8.1).
///
/// A body without a content type is taken as JSON. Another content type is 415, and so is a
/// content coding (RFC 9110 section 12.5.3); bytes that are not UTF-8 are 400.
pub fn json_text(request: &Request) -> Result<String, Problem> {
    if let Some(sent) = single_header(request, "Content-Type")? {
        let kind = sent.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let is_json = kind == "application/json"
            || (kind.starts_with("application/") && kind.ends_with("+json"));
        if !is_json {
            let hint = "send JSON with the header \"Content-Type: application/json\"";
            return Err(Problem::new(415, hint).with_header("Accept", "application/json"));
        }
    }
    let mut codings = header_values(request, "Content-Encoding").flat_map(|value| value.split(','));
    if codings.any(|coding| !["", "identity"].contains(&&*coding.trim().to_ascii_lowercase())) {
        let hint = "send the body without a Content-Encoding";
        return Err(Problem::new(415, hint).with_header("Accept-Encoding", "identity"));
    }
    let mut body = Vec::new();
    if let Some(mut data) = request.data() {
        // The server has read the body already; this copies from memory.
        data.read_to_end(&mut body).map_err(|err| Problem::internal().with_cause(err))?;
    }
    let text = String::from_utf8(body);
    let text = text.map_err(|_| Problem::bad_request("the body is not valid UTF-8"))?;
    Ok(match strip_bom(&text) {
        stripped if stripped.len() == text.len() => text,
        stripped => stripped.to_owned(),
    })
}

/// Text without the byte order mark that some editors and shells write before it. A reader of
/// JSON may ignore it (RFC 8259 section 8.1).
pub fn strip_bom(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Reads a JSON object: not JSON is 400, anything but an object 422, and so is what
/// `T` rejects. Fields that `T` does not know are skipped without being built.
pub fn json_object<'t, T: Deserialize<'t>>(text: &'t str) -> Result<T, Problem> {
    let is_object = text.trim_ascii_start().starts_with('{');
    match serde_json::from_str(text) {
        Ok(read) if is_object => Ok(read),
        Err(err) if !err.is_data() => {
            Err(Problem::bad_request(format!("the body is not JSON: {err}")))
        }
        Err(err) if is_object => {
            Err(Problem::invalid_field("body", format!("cannot be read: {err}")))
        }
        // Serde would take a list for a struct.
        _ => Err(Problem::invalid_field("body", "must be a JSON object")),
    }
}

/// For a field of type `Option<&RawValue>`: null is a value, only an absent field is `None`.
pub fn deserialize_present<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_of(url: &str) -> String {
        path(&Request::fake_http("GET", url, vec![], vec![])).into_owned()
    }

    #[test]
    fn an_idempotency_key_may_be_quoted_or_bare_and_must_be_printable() {
        assert_eq!(parse_idempotency_key("\"abc\"").unwrap(), "abc");
        assert_eq!(parse_idempotency_key("abc").unwrap(), "abc");
        for bad in ["", "\"\"", "\"", "a\"b", "\"a\\\"b\"", "ä", &"x".repeat(256)] {
            assert_eq!(parse_idempotency_key(bad).unwrap_err().status(), 400, "{bad}");
        }
    }

    #[test]
    fn percent_encoded_unreserved_characters_are_decoded_for_routing_and_no_others() {
        assert_eq!(path_of("/api/%6Dovies/%31?title=%6D"), "/api/movies/1");
        assert_eq!(path_of("/%7e%2D%2e%5F"), "/~-._");
        for kept in ["/a%2Fb", "/%25", "/%", "/%4", "/%zz", "/%c3%bc", "/%+1", "/ü%", "/%ü"] {
            assert_eq!(path_of(kept), kept);
        }
    }

    #[test]
    fn a_header_value_is_kept_byte_for_byte() {
        let bytes: Vec<u8> = (0x20..=0xff).collect();
        assert_eq!(header_bytes(&header_value(&bytes)), bytes);
        assert_eq!(header_bytes("a \u{20ac}"), "a \u{20ac}".as_bytes());
    }

    fn post(headers: &[(&str, &str)], body: &[u8]) -> Result<String, u16> {
        let headers = headers.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        let request = Request::fake_http("POST", "/", headers.collect(), body.to_vec());
        json_text(&request).map_err(|problem| problem.status())
    }

    #[test]
    fn a_byte_order_mark_before_json_is_ignored() {
        assert_eq!(post(&[], b"\xef\xbb\xbf{}").as_deref(), Ok("{}"));
        assert_eq!(post(&[], b"\xef\xbb\xbf\xef\xbb\xbf{}").unwrap(), "\u{feff}{}");
    }

    #[test]
    fn a_body_with_a_content_coding_is_415() {
        for refused in ["gzip", "br", "identity, gzip", "x"] {
            assert_eq!(post(&[("Content-Encoding", refused)], b"{}"), Err(415), "{refused}");
        }
        assert_eq!(post(&[("Content-Encoding", "Identity")], b"{}").as_deref(), Ok("{}"));
    }
}
