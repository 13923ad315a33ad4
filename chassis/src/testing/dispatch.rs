//! A request to a service's routes, without a socket.

use std::io::Read;

use rouille::Request;

use super::http::Reply;
use crate::router::{self, Route};

/// The response of a service's routes to a request.
pub fn dispatch<A>(
    routes: &[Route<A>],
    app: &A,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Reply {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let request = Request::fake_http(method, path, headers.collect(), body.as_bytes().to_vec());
    let answer = router::dispatch(routes, app, &request);
    let response = answer.result.unwrap_or_else(|problem| problem.into_response("test"));
    let mut body = String::new();
    response.data.into_reader_and_size().0.read_to_string(&mut body).unwrap();
    let headers = response.headers.into_iter();
    let headers = headers.map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
    Reply { status: response.status_code, headers, body }
}
