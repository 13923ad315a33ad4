//! Forwarding a request to an upstream: which headers pass, and what they say of the way.

use std::io::Read;

use chassis::problem::Problem;
use chassis::request::{header_bytes, header_value, header_values, request_id};
use chassis::upstream::{Answer, DEADLINE_HEADER, Upstream};
use rouille::{Request, Response};
use ureq::http;

use crate::trusted_proxies::TrustedProxies;

/// Headers that concern one connection (RFC 9110 section 7.6.1), or that each side makes itself.
const HOP_BY_HOP: [&str; 12] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Headers that name the way of a request; the gateway sets them.
const FORWARDED: [&str; 3] = ["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"];

/// Headers that the gateway sets for each upstream.
const SET_HERE: [&str; 2] = ["X-Request-Id", DEADLINE_HEADER];

/// Names the client itself, as the gateway knows it; services trust this header.
const REAL_IP: &str = "X-Real-IP";

/// Passes a request to an upstream unchanged, and its response back: method, path, query, body, and
/// the headers but the hop-by-hop ones.
pub fn forward(
    upstream: &Upstream,
    proxies: &TrustedProxies,
    request: &Request,
) -> Result<Response, Problem> {
    let mut body = Vec::new();
    if let Some(mut data) = request.data() {
        data.read_to_end(&mut body).map_err(|err| Problem::internal().with_cause(err))?;
    }
    let headers = set_forwarded_headers(proxies, request, strip_hop_by_hop(request.headers()));
    // An upstream that calls others answers before the gateway gives up.
    let deadline = upstream.response_timeout() * 9 / 10;
    let has_body = !body.is_empty() || ["POST", "PUT", "PATCH"].contains(&request.method());
    let build = |origin: &str| {
        let uri = format!("{origin}{}", request.raw_url());
        let mut builder = http::Request::builder().method(request.method()).uri(uri);
        for (name, value) in &headers {
            if !SET_HERE.iter().any(|ours| name.eq_ignore_ascii_case(ours)) {
                builder = builder.header(name, header_bytes(value));
            }
        }
        // Set here, so that a client cannot remove it by naming it in Connection: the logs of both
        // services are joined by it.
        let builder = builder
            .header("X-Request-Id", request_id(request))
            .header(DEADLINE_HEADER, deadline.as_millis().to_string());
        builder.body(has_body.then(|| body.clone()))
    };
    // RFC 9110 section 9.2.1.
    let is_safe = ["GET", "HEAD", "OPTIONS"].contains(&request.method());
    let expects_body = request.method() != "HEAD";
    let Answer { head, body } = upstream.send(is_safe, build, expects_body)?;
    let fields = head.headers().iter();
    let fields: Vec<(&str, String)> =
        fields.map(|(name, value)| (name.as_str(), header_value(value.as_bytes()))).collect();
    let mut headers = strip_hop_by_hop(fields.iter().map(|(name, value)| (*name, value.as_str())));
    // The length in a response to HEAD is that of a GET, and there is no body to count.
    if !expects_body && let Some((_, length)) = fields.iter().find(|it| it.0 == "content-length") {
        headers.push(("Content-Length".to_owned(), length.clone()));
    }
    Ok(Response {
        status_code: head.status().as_u16(),
        headers: headers.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
        data: body,
        upgrade: None,
    })
}

/// Replaces what the headers say of the request's way. What a trusted proxy says is kept, and its
/// address is added; for any other peer only what the gateway sees itself is set.
fn set_forwarded_headers(
    proxies: &TrustedProxies,
    request: &Request,
    mut headers: Vec<(String, String)>,
) -> Vec<(String, String)> {
    let is_trusted = proxies.trusts_peer_of(request);
    headers.retain(|(name, _)| {
        let name = name.to_ascii_lowercase();
        let is_forwarding_header = name.starts_with("x-forwarded-") || name == "forwarded";
        let mut set_here = FORWARDED.iter().chain([&REAL_IP]);
        let is_set_here = set_here.any(|ours| ours.eq_ignore_ascii_case(&name));
        !is_set_here && (is_trusted || !is_forwarding_header)
    });
    let trusted_values = |name| header_values(request, name).filter(|_| is_trusted);
    let peer = request.remote_addr().ip().to_canonical().to_string();
    let forwarded_for: Vec<&str> = trusted_values(FORWARDED[0]).chain([peer.as_str()]).collect();
    // Where a proxy has added a field instead of replacing it, the last one counts.
    let proto = trusted_values(FORWARDED[1]).last().unwrap_or("http");
    let host = trusted_values(FORWARDED[2]).last().or(request.header("Host"));
    let values = [Some(forwarded_for.join(", ")), Some(proto.to_owned()), host.map(str::to_owned)];
    let fields = FORWARDED.iter().zip(values);
    headers.extend(fields.filter_map(|(name, value)| Some(((*name).to_owned(), value?))));
    headers.push((REAL_IP.to_owned(), proxies.client_addr(request).to_string()));
    headers
}

/// The headers that are passed to the other side.
fn strip_hop_by_hop<'h>(
    headers: impl Iterator<Item = (&'h str, &'h str)>,
) -> Vec<(String, String)> {
    let headers: Vec<(&str, &str)> = headers.collect();
    let listed = headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("Connection"));
    let listed: Vec<String> = listed
        .flat_map(|(_, value)| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    let passes = |name: &str| {
        let name = name.to_ascii_lowercase();
        !HOP_BY_HOP.contains(&name.as_str()) && !listed.contains(&name)
    };
    let passed = headers.into_iter().filter(|(name, _)| passes(name));
    passed.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}
