//! Forwarding to inventory: one agent with a pool of connections, a deadline for
//! each phase, a limit on how many requests may wait at once, and a breaker.

use std::io::{self, ErrorKind, Read};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use chassis::problem::Problem;
use chassis::request::request_id;
use chassis::semaphore::{FairSemaphore, SemaphorePermit};
use rouille::{Request, Response, ResponseBody};
use ureq::Agent;
use ureq::http::{Uri, request, response};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use crate::breaker::{Breaker, Permit};
use crate::config::Forward;
use crate::limit::seconds_up;
use crate::metrics;
use crate::proxies::{Proxies, lines};
use crate::transport::Plain;

/// An answer up to this size is read whole before it is passed on, so that one
/// that breaks off is a 502 and not a torn 200, and inventory's thread is free.
const HELD: usize = 32 << 10;

/// Shorter than inventory's idle timeout: a connection is not used at the moment
/// at which inventory closes it.
const MAX_IDLE: Duration = Duration::from_secs(15);

/// Most connections that are kept for later. ureq takes the one that has lain longest, so
/// that under any load none of them grows old: what one burst has opened would stay open,
/// and inventory keeps a thread for each.
const MAX_IDLE_CONNECTIONS: usize = 64;

/// How long a request waits for a place while inventory is at work.
const PATIENCE: Duration = Duration::from_millis(20);

/// Headers that concern one connection (RFC 9110 section 7.6.1), or that this side makes itself.
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

/// Asks inventory.
pub struct Inventory {
    agent: Agent,
    address: SocketAddr,
    turns: FairSemaphore,
    breaker: Breaker,
    proxies: Proxies,
}

/// The one address that was resolved at the start.
///
/// The default resolver starts a thread for every request that has a deadline.
#[derive(Debug)]
struct Fixed(SocketAddr);

impl Resolver for Fixed {
    fn resolve(
        &self,
        _: &Uri,
        _: &ureq::config::Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        addresses.push(self.0);
        Ok(addresses)
    }
}

impl Inventory {
    /// Connects when it is first asked.
    pub fn new(config: &Forward, proxies: Proxies) -> Inventory {
        let settings = Agent::config_builder()
            .timeout_connect(Some(config.connect_timeout))
            .timeout_send_request(Some(config.timeout))
            .timeout_send_body(Some(config.timeout))
            .timeout_recv_response(Some(config.timeout))
            .timeout_per_read(Some(config.body_timeout))
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent("")
            .accept("")
            .accept_encoding("")
            .input_buffer_size(8 << 10)
            .output_buffer_size(16 << 10)
            .max_idle_connections(MAX_IDLE_CONNECTIONS)
            .max_idle_connections_per_host(MAX_IDLE_CONNECTIONS)
            .max_idle_age(MAX_IDLE)
            .build();
        Inventory {
            agent: Agent::with_parts(settings, Plain, Fixed(config.inventory)),
            address: config.inventory,
            turns: FairSemaphore::new(config.max_in_flight)
                .with_gauge(metrics::FORWARD_IN_FLIGHT.clone()),
            breaker: Breaker::new("inventory", config.breaker.clone()),
            proxies,
        }
    }

    /// Passes a request on as it came and its answer back as it comes.
    pub fn forward(&self, request: &Request) -> Result<Response, Problem> {
        // Until the begin of the answer is there: what comes after is between inventory,
        // which has answered, and a client that may be slow.
        let (permit, _turn) = self.enter(request)?;
        let answer = self.exchange(request);
        let now = Instant::now();
        match &answer {
            // Any answer is one, a 503 too: inventory is there, says why, and would not
            // be helped by being left alone. What it could not have said is ours:
            Err(problem) if [502, 503, 504].contains(&problem.status()) => permit.failed(now),
            // The client's mistake, and nothing was asked.
            Err(_) => drop(permit),
            Ok(_) => permit.succeeded(now),
        }
        answer
    }

    /// Asks and reads the begin of the answer; fails with what the client is told when
    /// there is none.
    fn exchange(&self, request: &Request) -> Result<Response, Problem> {
        let mut body = Vec::new();
        if let Some(mut data) = request.data() {
            data.read_to_end(&mut body).map_err(|err| Problem::internal().with_cause(err))?;
        }
        let (head, body) = match self.ask(request, &body) {
            // The connection died under a question that may be asked twice.
            Err(err) if is_disconnect(&err) && ["GET", "HEAD"].contains(&request.method()) => {
                metrics::FORWARD_RETRIED.inc();
                self.ask(request, &body)
            }
            answer => answer,
        }
        .map_err(explain)?
        .into_parts();
        let size = body.content_length();
        let expects_body = request.method() != "HEAD";
        let data = pass_on(body.into_reader(), size.filter(|_| expects_body))?;
        let mut headers = keep(head.headers.iter().map(|(name, value)| {
            let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
            (name.as_str().to_owned(), value)
        }));
        // The one place where a length speaks of a body that is not there.
        let announced = head.headers.get("Content-Length").and_then(|value| value.to_str().ok());
        if let (false, Some(announced)) = (expects_body, announced) {
            headers.push(("Content-Length".to_owned(), announced.to_owned()));
        }
        let headers = headers.into_iter().map(|(name, value)| (name.into(), value.into()));
        Ok(Response {
            status_code: head.status.as_u16(),
            headers: headers.collect(),
            data,
            upgrade: None,
        })
    }

    /// Whether inventory says that it can do its work.
    pub fn probe(&self) -> impl Fn() -> Result<(), String> + Send + use<> {
        let (agent, address) = (self.agent.clone(), self.address);
        move || {
            let url = format!("http://{address}/health/ready");
            let answer = agent.get(url).call().map_err(|err| err.to_string())?;
            match answer.status().as_u16() {
                200 => Ok(()),
                status => Err(format!("it answers {status}")),
            }
        }
    }

    fn ask(
        &self,
        request: &Request,
        body: &[u8],
    ) -> Result<response::Response<ureq::Body>, ureq::Error> {
        let uri = format!("http://{}{}", self.address, request.raw_url());
        let mut builder = request::Builder::new().method(request.method()).uri(uri);
        let headers = request.headers().map(|(name, value)| (name.to_owned(), value.to_owned()));
        for (name, value) in self.tell_the_way(request, keep(headers)) {
            if !name.eq_ignore_ascii_case("X-Request-Id") {
                builder = builder.header(name, value);
            }
        }
        // By which both logs are told together: no client can keep it back by naming
        // it in Connection.
        builder = builder.header("X-Request-Id", request_id(request));
        let has_body = !body.is_empty() || ["POST", "PUT", "PATCH"].contains(&request.method());
        match has_body {
            true => self.agent.run(builder.body(body)?),
            false => self.agent.run(builder.body(())?),
        }
    }

    /// Replaces what the headers say of the way that the request came. A trusted proxy's
    /// word is kept and its address added; of anybody else only what is seen is told.
    fn tell_the_way(
        &self,
        request: &Request,
        mut headers: Vec<(String, String)>,
    ) -> Vec<(String, String)> {
        const OURS: [&str; 3] = ["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"];
        let believed = self.proxies.vouch_for(request);
        headers.retain(|(name, _)| {
            let name = name.to_ascii_lowercase();
            let of_the_way = name.starts_with("x-forwarded-")
                || ["forwarded", "x-real-ip"].contains(&name.as_str());
            let ours = OURS.iter().any(|ours| ours.eq_ignore_ascii_case(&name));
            !ours && (believed || !of_the_way)
        });
        let said = |name| lines(request, name).filter(|_| believed);
        let peer = request.remote_addr().ip().to_canonical().to_string();
        let route: Vec<&str> = said(OURS[0]).chain([peer.as_str()]).collect();
        // A proxy that adds a line instead of replacing it has the last word.
        let proto = said(OURS[1]).last().unwrap_or("http");
        let host = said(OURS[2]).last().or(request.header("Host"));
        let told = [Some(route.join(", ")), Some(proto.to_owned()), host.map(str::to_owned)];
        let told = OURS.iter().zip(told);
        headers.extend(told.filter_map(|(name, value)| Some(((*name).to_owned(), value?))));
        headers
    }

    /// Leave to ask and a place among the requests that wait for inventory. When all are
    /// taken and inventory answers nobody, the next is refused at once: the other threads
    /// belong to healthy routes.
    fn enter(&self, request: &Request) -> Result<(Permit<'_>, SemaphorePermit), Problem> {
        // RFC 9110 section 9.2.1.
        let safe = ["GET", "HEAD", "OPTIONS"].contains(&request.method());
        let not_now = |wait| {
            Problem::unavailable("inventory keeps failing and is left alone for a moment")
                .with_header("Retry-After", seconds_up(wait).to_string())
        };
        self.breaker.check(Instant::now(), safe).map_err(not_now)?;
        let turn = self.turns.acquire_unless_stalled(PATIENCE).ok_or_else(|| {
            metrics::FORWARD_REFUSED.inc();
            Problem::unavailable("too many requests wait for inventory")
        })?;
        // It may have opened while this one waited for its turn.
        let permit = self.breaker.admit(Instant::now(), safe).map_err(not_now)?;
        Ok((permit, turn))
    }
}

/// The answer's body: small ones whole, large ones as they come.
fn pass_on(
    mut reader: impl Read + Send + 'static,
    size: Option<u64>,
) -> Result<ResponseBody, Problem> {
    let mut begin = Vec::new();
    let read = reader.by_ref().take(HELD as u64).read_to_end(&mut begin);
    // The reader wraps ureq's own errors in io's; this takes them out again.
    read.map_err(|err| match ureq::Error::from(err) {
        err @ ureq::Error::Timeout(_) => {
            Problem::new(504, "inventory did not finish its answer in time").with_cause(err)
        }
        err => Problem::new(502, "inventory broke off its answer").with_cause(err),
    })?;
    let whole = begin.len() < HELD || size == Some(HELD as u64);
    if whole {
        return Ok(ResponseBody::from_data(begin));
    }
    let rest = Resumed { begin, taken: 0, rest: reader };
    Ok(match size.and_then(|size| usize::try_from(size).ok()) {
        Some(size) => ResponseBody::from_reader_and_size(rest, size),
        None => ResponseBody::from_reader(rest),
    })
}

/// An answer whose begin has been read. The begin is given back as soon as it is taken:
/// a slow client is at the rest for long.
struct Resumed<R> {
    begin: Vec<u8>,
    taken: usize,
    rest: R,
}

impl<R: Read> Read for Resumed<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.begin.is_empty() {
            return self.rest.read(out);
        }
        let read = (&self.begin[self.taken..]).read(out)?;
        self.taken += read;
        if self.taken == self.begin.len() {
            self.begin = Vec::new();
        }
        Ok(read)
    }
}

/// The headers that go on to the other side.
fn keep(headers: impl Iterator<Item = (String, String)>) -> Vec<(String, String)> {
    let headers: Vec<(String, String)> = headers.collect();
    let listed = headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("Connection"));
    let listed: Vec<String> = listed
        .flat_map(|(_, value)| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    let passes = |name: &str| {
        let name = name.to_ascii_lowercase();
        !HOP_BY_HOP.contains(&name.as_str()) && !listed.contains(&name)
    };
    headers.into_iter().filter(|(name, _)| passes(name)).collect()
}

/// What the client is told when there is no answer to pass on.
fn explain(err: ureq::Error) -> Problem {
    use ureq::Timeout::{Connect, Resolve};
    match &err {
        ureq::Error::Timeout(Connect | Resolve) => {
            Problem::unavailable("inventory cannot be reached")
        }
        ureq::Error::Timeout(_) => Problem::new(504, "inventory did not answer in time"),
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
            return Problem::bad_request(
                "path, query or headers have characters that cannot be passed on",
            );
        }
        ureq::Error::Io(_) if is_disconnect(&err) => Problem::unavailable(
            "inventory went away before it answered; what was asked may have been done",
        ),
        ureq::Error::Io(_) | ureq::Error::ConnectionFailed | ureq::Error::HostNotFound => {
            Problem::unavailable("inventory cannot be reached")
        }
        _ => Problem::new(502, "inventory gave an answer that makes no sense"),
    }
    .with_cause(err)
}

/// Whether a connection that had been made was lost.
fn is_disconnect(err: &ureq::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let lost = [BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof];
    matches!(err, ureq::Error::Io(err) if lost.contains(&err.kind()))
}
