//! Reading a request: its path, its headers and its JSON body.

use std::io::Read;

use rouille::Request;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::problem::Problem;

/// The path as it was sent, without the query.
pub fn path(request: &Request) -> &str {
    let url = request.raw_url();
    url.split_once('?').map_or(url, |(path, _)| path)
}

/// The request's id: the client's own where it is sane, else one made by the server.
pub fn request_id(request: &Request) -> &str {
    request.header("X-Request-Id").unwrap_or("-")
}

/// The value of a header that must not be repeated.
pub fn single_header<'r>(request: &'r Request, name: &str) -> Result<Option<&'r str>, Problem> {
    let mut found = request.headers().filter(|(known, _)| known.eq_ignore_ascii_case(name));
    match (found.next(), found.next()) {
        (_, Some(_)) => Err(Problem::bad_request(format!("the header {name} is repeated"))),
        (first, None) => Ok(first.map(|(_, value)| value)),
    }
}

/// The body as text that is meant to be JSON.
///
/// A body without a content type is taken as JSON; another type is 415.
pub fn json_text(request: &Request) -> Result<String, Problem> {
    if let Some(sent) = single_header(request, "Content-Type")? {
        let kind = sent.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let json = kind == "application/json"
            || (kind.starts_with("application/") && kind.ends_with("+json"));
        if !json {
            let hint = "send JSON with the header \"Content-Type: application/json\"";
            return Err(Problem::new(415, hint).with_header("Accept", "application/json"));
        }
    }
    let mut body = Vec::new();
    if let Some(mut data) = request.data() {
        // The server has read the body already; this copies from memory.
        data.read_to_end(&mut body).map_err(|err| Problem::internal().with_cause(err))?;
    }
    String::from_utf8(body).map_err(|_| Problem::bad_request("the body is not valid UTF-8"))
}

/// Reads a JSON object: not JSON is 400, anything but an object 422, and so is what
/// `T` refuses. Fields that `T` does not know are skipped without being built.
pub fn json_object<'t, T: Deserialize<'t>>(text: &'t str) -> Result<T, Problem> {
    let is_object = text.trim_ascii_start().starts_with('{');
    match serde_json::from_str(text) {
        Ok(read) if is_object => Ok(read),
        Err(err) if !err.is_data() => Err(invalid_json(&err)),
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

/// The 400 for a body that serde_json could not read.
fn invalid_json(err: &serde_json::Error) -> Problem {
    Problem::bad_request(format!("the body is not JSON: {err}"))
}
