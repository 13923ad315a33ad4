//! The responses that handlers build most often.

use rouille::Response;
use serde::Serialize;

/// 200 with a JSON body.
pub fn ok(body: &impl Serialize) -> Response {
    Response::json(body)
}

/// 201 with a JSON body and where the new resource is.
pub fn created(location: String, body: &impl Serialize) -> Response {
    ok(body).with_status_code(201).with_unique_header("Location", location)
}
