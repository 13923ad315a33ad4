//! Routing and request decoding over rouille's types.

use std::io::Read;

use rouille::{Request, Response};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::problem::Problem;

/// The segments that a route's `{…}` and `*` matched, undecoded, in order.
pub type Params<'r> = [&'r str];

/// What serves a route.
pub type Handler<A> = fn(&A, &Request, &Params<'_>) -> Result<Response, Problem>;

/// One line of a service's table of routes.
pub struct Route<A> {
    method: &'static str,
    path: &'static str,
    handler: Handler<A>,
}

/// A line of the table. In `path` a segment `{name}` matches any one segment and
/// a last segment `*` any number of them, none too; `method` may be `*`.
pub const fn route<A>(method: &'static str, path: &'static str, handler: Handler<A>) -> Route<A> {
    Route { method, path, handler }
}

/// An answer and the path of the route it came from, by which it is counted.
pub struct Answer {
    /// The route's path as the table spells it; `""` where none matched.
    pub route: &'static str,
    /// What to send.
    pub result: Result<Response, Problem>,
}

/// Finds the route of a request and lets it answer.
///
/// A path matches with and without a trailing slash. HEAD goes to the route of
/// GET (the server leaves the body out), OPTIONS is answered with `Allow`, and
/// any other method that the path does not know is a 405.
pub fn dispatch<A>(routes: &[Route<A>], app: &A, request: &Request) -> Answer {
    let path = path(request);
    let method = if request.method() == "HEAD" { "GET" } else { request.method() };
    let mut allowed: Vec<&str> = Vec::new();
    let mut known = "";
    for route in routes {
        let Some(params) = matches(route.path, path) else { continue };
        if route.method == method || route.method == "*" {
            return Answer { route: route.path, result: (route.handler)(app, request, &params) };
        }
        known = route.path;
        allowed.push(route.method);
    }
    let result = if allowed.is_empty() && !(method == "OPTIONS" && path == "*") {
        Err(Problem::not_found("there is nothing at this path"))
    } else {
        if allowed.contains(&"GET") {
            allowed.push("HEAD");
        }
        allowed.push("OPTIONS");
        match method {
            "OPTIONS" => Ok(Response::empty_204().with_unique_header("Allow", allowed.join(", "))),
            _ => Err(Problem::method_not_allowed(&allowed.join(", "))),
        }
    };
    Answer { route: known, result }
}

/// The path as it was sent, without the query.
pub fn path(request: &Request) -> &str {
    let url = request.raw_url();
    url.split_once('?').map_or(url, |(path, _)| path)
}

fn matches<'p>(template: &str, path: &'p str) -> Option<Vec<&'p str>> {
    let path = path.strip_prefix('/')?;
    let path = path.strip_suffix('/').unwrap_or(path);
    let mut segments = path.split('/');
    let mut params = Vec::new();
    for wanted in template[1..].split('/') {
        if wanted == "*" {
            params.extend(segments);
            return Some(params);
        }
        let segment = segments.next()?;
        if wanted.starts_with('{') {
            params.push(segment);
        } else if wanted != segment {
            return None;
        }
    }
    segments.next().is_none().then_some(params)
}

/// The id in a path: a positive 64-bit integer in plain digits.
pub fn id(params: &Params<'_>) -> Option<i64> {
    let digits = params.first().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    digits.parse().ok().filter(|id| *id > 0)
}

/// The request's id: the client's own where it is sane, else one made by the server.
pub fn request_id(request: &Request) -> &str {
    request.header("X-Request-Id").unwrap_or("-")
}

/// The value of a header that must not be repeated.
pub fn single_header<'r>(request: &'r Request, name: &str) -> Result<Option<&'r str>, Problem> {
    let mut found = request.headers().filter(|(known, _)| known.eq_ignore_ascii_case(name));
    match (found.next(), found.next()) {
        (_, Some(_)) => Err(Problem::malformed(format!("the header {name} is repeated"))),
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
        data.read_to_end(&mut body).map_err(|err| Problem::internal().because(err))?;
    }
    String::from_utf8(body).map_err(|_| Problem::malformed("the body is not valid UTF-8"))
}

/// Reads a JSON object: not JSON is 400, anything but an object 422, and so is what
/// `T` refuses. Fields that `T` does not know are skipped without being built.
pub fn json_object<'t, T: Deserialize<'t>>(text: &'t str) -> Result<T, Problem> {
    let is_object = text.trim_ascii_start().starts_with('{');
    match serde_json::from_str(text) {
        Ok(read) if is_object => Ok(read),
        Err(err) if !err.is_data() => Err(not_json(&err)),
        Err(err) if is_object => Err(Problem::invalid("body", format!("cannot be read: {err}"))),
        // Serde would take a list for a struct.
        _ => Err(Problem::invalid("body", "must be a JSON object")),
    }
}

/// For a field of type `Option<&RawValue>`: null is a value, only an absent field is `None`.
pub fn present<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// The 400 for a body that serde_json could not read.
fn not_json(err: &serde_json::Error) -> Problem {
    Problem::malformed(format!("the body is not JSON: {err}"))
}

/// 200 with a JSON body.
pub fn ok(body: &impl Serialize) -> Response {
    Response::json(body)
}

/// 201 with a JSON body and where the new resource is.
pub fn created(location: String, body: &impl Serialize) -> Response {
    ok(body).with_status_code(201).with_unique_header("Location", location)
}
