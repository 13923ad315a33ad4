//! A request to a service's routes, without a socket.

use std::io::Read;

use rouille::{Request, Response};

use super::http::Reply;
use crate::router::{self, Route};

/// The response of a service's routes to a request, completely read.
pub fn dispatch<A>(
    routes: &[Route<A>],
    app: &A,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Reply {
    let response = respond(routes, app, method, path, headers, body);
    let mut body = String::new();
    response.data.into_reader_and_size().0.read_to_string(&mut body).unwrap();
    let headers = response.headers.into_iter();
    let headers = headers.map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
    Reply { status: response.status_code, headers, body }
}

/// The response as the routes make it: a long body is not read yet.
pub fn respond<A>(
    routes: &[Route<A>],
    app: &A,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Response {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let request = Request::fake_http(method, path, headers.collect(), body.as_bytes().to_vec());
    let answer = router::dispatch(routes, app, &request);
    answer.result.unwrap_or_else(|problem| problem.into_response("test"))
}
