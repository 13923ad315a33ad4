//! The HTTP client of all tests, and the reading of metrics.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::http::Request;

/// How long a request may take in all, and how long [`raw`] waits for each part of a response.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Most bytes of a response's body: a list of movies may have many.
const MAX_BODY_BYTES: u64 = 1 << 30;

/// A response that was received completely.
#[derive(Debug)]
pub struct Reply {
    /// Its status code.
    pub status: u16,
    /// Its header fields, in order.
    pub headers: Vec<(String, String)>,
    /// Its body; bytes that are not UTF-8 are replaced.
    pub body: String,
}

impl Reply {
    /// Reads a response as [`raw`] returns it. The body stays as it was sent: chunks are not
    /// joined. `None` when the head is not complete.
    pub fn parse(text: &str) -> Option<Reply> {
        let (head, body) = text.split_once("\r\n\r\n")?;
        let mut lines = head.lines();
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let fields = lines.filter_map(|line| line.split_once(':'));
        let fields = fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
        Some(Reply { status, headers: fields.collect(), body: body.to_owned() })
    }

    /// The first header field of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// The entity tag, with its quotes; panics where there is none.
    #[track_caller]
    pub fn etag(&self) -> &str {
        self.header("ETag").unwrap_or_else(|| panic!("no ETag: {self:?}"))
    }

    /// The `detail` of a problem; panics where there is none.
    #[track_caller]
    pub fn detail(&self) -> String {
        self.json()["detail"].as_str().unwrap_or_else(|| panic!("{}", self.body)).to_owned()
    }

    /// The path in `Link`, if there is a next page.
    pub fn next(&self) -> Option<String> {
        let link = self.header("Link")?;
        let path = link.strip_prefix('<').and_then(|link| link.strip_suffix(">; rel=\"next\""));
        Some(path.unwrap_or_else(|| panic!("{link}")).to_owned())
    }

    /// The body as JSON; panics with the body when it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|err| panic!("{err}: {}", self.body))
    }
}

/// A client that returns every status as a response, and uses no proxy of the environment.
pub fn agent() -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(TIMEOUT))
        .proxy(None)
        .build()
        .new_agent()
}

/// Sends a request; an error when no complete response came. GET and HEAD with an empty `body`
/// have none.
pub fn send(
    agent: &Agent,
    method: &str,
    url: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Result<Reply, ureq::Error> {
    let mut request = Request::builder().method(method).uri(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut response = match (method, body) {
        ("GET" | "HEAD", "") => agent.run(request.body(())?)?,
        _ => agent.run(request.body(body)?)?,
    };
    let bytes = response.body_mut().with_config().limit(MAX_BODY_BYTES).read_to_vec()?;
    let headers = response.headers().iter().map(|(name, value)| {
        (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
    });
    Ok(Reply {
        status: response.status().as_u16(),
        headers: headers.collect(),
        body: String::from_utf8_lossy(&bytes).into_owned(),
    })
}

/// The response to a GET; `None` when no complete response came.
pub fn get(url: &str) -> Option<Reply> {
    send(&agent(), "GET", url, &[], "").ok()
}

/// Status and body of the response to a POST of JSON; a body that is not JSON comes as a text.
pub fn post(agent: &Agent, url: &str, body: &str) -> Result<(u16, Value), ureq::Error> {
    let Reply { status, body, .. } =
        send(agent, "POST", url, &[("Content-Type", "application/json")], body)?;
    Ok((status, serde_json::from_str(&body).unwrap_or(Value::String(body))))
}

/// Everything that a server sends back for these bytes and the end of the stream: for requests
/// that no client library would send. A reset after the response is ignored.
pub fn raw(address: SocketAddr, sent: &[u8]) -> String {
    raw_on(TcpStream::connect(address).unwrap(), sent)
}

/// The same on a connection that a test has made.
pub fn raw_on(mut stream: TcpStream, sent: &[u8]) -> String {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    // A server that rejects a request early may close before all of it is sent.
    let _ = stream.write_all(sent);
    let _ = stream.shutdown(Shutdown::Write);
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(err) if err.kind() != ErrorKind::ConnectionReset => panic!("{err}"),
        _ => String::from_utf8_lossy(&bytes).into_owned(),
    }
}

/// The sum of all metrics of a service whose lines begin with `prefix`: the name of a metric,
/// or a name with labels. `listen` is the address in `<SERVICE>_METRICS_LISTEN`.
pub fn metric(listen: &str, prefix: &str) -> f64 {
    let url = format!("http://{listen}/metrics");
    let text = get(&url).unwrap_or_else(|| panic!("{url} does not answer")).body;
    let lines = text.lines().filter(|line| line.starts_with(prefix));
    lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}
