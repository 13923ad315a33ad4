//! The responses that handlers build most often.

use rouille::Response;
use serde::Serialize;

/// 200 with a JSON body.
pub fn ok(body: &impl Serialize) -> Response {
    Response::json(body)
}

/// 201 with a JSON body and the location of the new resource.
pub fn created(location: String, body: &impl Serialize) -> Response {
    ok(body).with_status_code(201).with_unique_header("Location", location)
}

/// Lets caches keep a response, if they ask each time whether it is still right (RFC 9111 section
/// 5.2.2.4). Without this the server sends `no-store`.
pub fn no_cache(response: Response) -> Response {
    response.with_unique_header("Cache-Control", "no-cache")
}
