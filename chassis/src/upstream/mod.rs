//! Calling another service over HTTP: pooled connections, deadlines, a bulkhead and a breaker.

use std::io::{self, ErrorKind, Read};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rouille::ResponseBody;
use ureq::Agent;
use ureq::http::{Request, Response, Uri};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use crate::problem::Problem;
use crate::semaphore::{FairSemaphore, SemaphorePermit};

pub mod breaker;
mod call;
mod transport;

use breaker::{Breaker, Permit};
pub use call::{Call, CallAnswer, DEADLINE_HEADER, deadline};
use transport::TcpConnector;

/// A response up to this size is read completely before it is passed on: one that breaks off is then
/// a 502 and not half a 200, and the upstream's thread is free.
const BUFFERED_RESPONSE_BYTES: usize = 32 << 10;

/// Connections that were idle for longer are not used. Shorter than an upstream's own idle timeout,
/// so that a connection is not used at the moment at which the upstream closes it.
const MAX_IDLE_AGE: Duration = Duration::from_secs(15);

/// The most connections that are kept. ureq takes the one that was idle longest, so that under any
/// load none of them grows old: without a limit, those that one burst has opened would stay open, and
/// the upstream keeps a thread for each.
const MAX_IDLE_CONNECTIONS: usize = 64;

/// How long a request waits for a permit of the bulkhead while the upstream answers others.
const ACQUIRE_TIMEOUT: Duration = Duration::from_millis(20);

mod metrics {
    use prometheus::{
        IntCounterVec, IntGaugeVec, register_int_counter_vec, register_int_gauge_vec,
    };

    crate::define_metrics! {
        pub(super) fn register;
        IN_FLIGHT: IntGaugeVec = register_int_gauge_vec!(
            "upstream_in_flight", "Requests that wait for an upstream.", &["upstream"]);
        REJECTED: IntCounterVec = register_int_counter_vec!(
            "upstream_rejected_total", "Requests rejected because too many waited for the upstream.",
            &["upstream"]);
        RETRIES: IntCounterVec = register_int_counter_vec!(
            "upstream_retries_total", "Requests sent again because their connection was lost.",
            &["upstream"]);
        BREAKER_STATE: IntGaugeVec = register_int_gauge_vec!(
            "circuit_breaker_state",
            "Circuit breaker of an upstream: 0 closed, 1 half-open (one request at a time), 2 open.",
            &["upstream"]);
        BREAKER_TRANSITIONS: IntCounterVec = register_int_counter_vec!(
            "circuit_breaker_transitions_total", "State changes of a circuit breaker, by new state.",
            &["upstream", "state"]);
        BREAKER_REJECTED: IntCounterVec = register_int_counter_vec!(
            "circuit_breaker_rejected_total",
            "Requests rejected because the circuit breaker was not closed.", &["upstream"]);
    }
}

/// How an upstream is called.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it listens.
    pub address: SocketAddr,
    /// The most requests that may wait for it at once.
    pub max_in_flight: usize,
    /// For the TCP connect.
    pub connect_timeout: Duration,
    /// From the begin of the request to the head of the response, a second attempt included.
    pub response_timeout: Duration,
    /// For each further part of the response.
    pub read_timeout: Duration,
    /// When it is not called for a while.
    pub breaker: breaker::Config,
}

/// Another service, called by name.
pub struct Upstream {
    name: &'static str,
    config: Config,
    agent: Agent,
    bulkhead: FairSemaphore,
    breaker: Breaker,
}

/// The response of an upstream.
pub struct Answer {
    /// Status and headers.
    pub head: Response<()>,
    /// Small bodies are complete; large ones are read as the client reads them.
    pub body: ResponseBody,
}

/// Resolves to the one address that was resolved at the start: the default resolver starts a thread
/// for every request that has a deadline.
#[derive(Debug)]
struct FixedResolver(SocketAddr);

impl Resolver for FixedResolver {
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

impl Upstream {
    /// Connects when the first request comes; `name` is its label in metrics and its name in texts.
    pub fn new(name: &'static str, config: Config) -> Upstream {
        metrics::register();
        let settings = Agent::config_builder()
            .timeout_connect(Some(config.connect_timeout))
            .timeout_per_read(Some(config.read_timeout))
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
            .max_idle_age(MAX_IDLE_AGE)
            .build();
        let in_flight = metrics::IN_FLIGHT.with_label_values(&[name]);
        // So a scrape shows a zero and not a gap.
        metrics::REJECTED.with_label_values(&[name]);
        metrics::RETRIES.with_label_values(&[name]);
        Upstream {
            name,
            agent: Agent::with_parts(settings, TcpConnector, FixedResolver(config.address)),
            bulkhead: FairSemaphore::new(config.max_in_flight).with_gauge(in_flight),
            breaker: Breaker::new(name, config.breaker.clone()),
            config,
        }
    }

    /// Sends a request and reads the head of the response. `request` has path and query as its target
    /// and is built again for a second attempt. `safe` requests (RFC 9110 section 9.2.1) are sent once
    /// more when their connection was lost.
    ///
    /// Fails with 503 where the upstream cannot be reached or is not called now, 504 where it is too
    /// slow, 502 where its response is malformed, 400 where the request cannot be sent.
    pub fn send(
        &self,
        is_safe: bool,
        request: impl Fn(&str) -> Result<Request<Option<Vec<u8>>>, ureq::http::Error>,
        expects_body: bool,
    ) -> Result<Answer, Problem> {
        self.send_within(self.config.response_timeout, is_safe, request, expects_body)
    }

    /// How long a request waits for the head of its response at most.
    pub fn response_timeout(&self) -> Duration {
        self.config.response_timeout
    }

    fn send_within(
        &self,
        timeout: Duration,
        is_safe: bool,
        request: impl Fn(&str) -> Result<Request<Option<Vec<u8>>>, ureq::http::Error>,
        expects_body: bool,
    ) -> Result<Answer, Problem> {
        // The permits are held until the head of the response is there. The body is between the
        // upstream, which has answered, and a client that may be slow.
        let (permit, _bulkhead_permit) = self.admit(is_safe)?;
        let answer = self.send_and_read_head(timeout, is_safe, request, expects_body);
        let now = Instant::now();
        match &answer {
            // Any HTTP response counts as a success, a 503 included: the upstream is alive and says
            // when to retry. Only failures on this side count: no connection, timeout, malformed
            // response.
            Err(problem) if [502, 503, 504].contains(&problem.status()) => permit.failed(now),
            // An error of the client; nothing was sent.
            Err(_) => drop(permit),
            Ok(_) => permit.succeeded(now),
        }
        answer
    }

    /// Permits of the breaker and of the bulkhead. When all permits are in use and the upstream answers
    /// no request, the next request is rejected at once: other threads are for other upstreams.
    fn admit(&self, is_safe: bool) -> Result<(Permit<'_>, SemaphorePermit), Problem> {
        let name = self.name;
        let open = |wait: Duration| {
            let seconds = ceil_seconds(wait).to_string();
            Problem::unavailable(format!("{name} keeps failing and is not called for a moment"))
                .with_header("Retry-After", seconds)
        };
        self.breaker.check(Instant::now(), is_safe).map_err(open)?;
        let bulkhead_permit =
            self.bulkhead.acquire_unless_stalled(ACQUIRE_TIMEOUT).ok_or_else(|| {
                metrics::REJECTED.with_label_values(&[name]).inc();
                Problem::unavailable(format!("too many requests wait for {name}"))
            })?;
        // The breaker may have opened while this request waited for the bulkhead.
        let permit = self.breaker.admit(Instant::now(), is_safe).map_err(open)?;
        Ok((permit, bulkhead_permit))
    }

    fn send_and_read_head(
        &self,
        timeout: Duration,
        is_safe: bool,
        request: impl Fn(&str) -> Result<Request<Option<Vec<u8>>>, ureq::http::Error>,
        expects_body: bool,
    ) -> Result<Answer, Problem> {
        let deadline = Instant::now() + timeout;
        let origin = format!("http://{}", self.config.address);
        let attempt = || {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ureq::Error::Timeout(ureq::Timeout::RecvResponse));
            }
            let (parts, body) = request(&origin)?.into_parts();
            let limited =
                |agent: &Agent, request| -> Result<_, ureq::Error> { Ok((agent.clone(), request)) };
            match body {
                Some(body) => {
                    let (agent, request) = limited(&self.agent, Request::from_parts(parts, body))?;
                    let request = agent
                        .configure_request(request)
                        .timeout_send_request(Some(left))
                        .timeout_send_body(Some(left))
                        .timeout_recv_response(Some(left))
                        .build();
                    agent.run(request)
                }
                None => {
                    let request = self
                        .agent
                        .configure_request(Request::from_parts(parts, ()))
                        .timeout_send_request(Some(left))
                        .timeout_recv_response(Some(left))
                        .build();
                    self.agent.run(request)
                }
            }
        };
        let answer = match attempt() {
            // The connection was lost, and the request may be sent twice.
            Err(err) if is_connection_lost(&err) && is_safe => {
                metrics::RETRIES.with_label_values(&[self.name]).inc();
                attempt()
            }
            answer => answer,
        };
        let (head, body) = answer.map_err(|err| self.to_problem(err))?.into_parts();
        let size = body.content_length().filter(|_| expects_body);
        let body = self.response_body(body.into_reader(), size)?;
        Ok(Answer { head: Response::from_parts(head, ()), body })
    }

    /// Small bodies completely, large ones as they are read.
    fn response_body(
        &self,
        mut reader: impl Read + Send + 'static,
        size: Option<u64>,
    ) -> Result<ResponseBody, Problem> {
        let name = self.name;
        let mut begin = Vec::new();
        let read = reader.by_ref().take(BUFFERED_RESPONSE_BYTES as u64).read_to_end(&mut begin);
        // The reader wraps ureq's own errors in io's; this unwraps them.
        read.map_err(|err| match ureq::Error::from(err) {
            err @ ureq::Error::Timeout(_) => {
                Problem::new(504, format!("{name} did not finish its response in time"))
                    .with_cause(err)
            }
            err => Problem::new(502, format!("{name} broke off its response")).with_cause(err),
        })?;
        let is_complete =
            begin.len() < BUFFERED_RESPONSE_BYTES || size == Some(BUFFERED_RESPONSE_BYTES as u64);
        if is_complete {
            return Ok(ResponseBody::from_data(begin));
        }
        let reader = PrefixedReader { prefix: begin, offset: 0, rest: reader };
        Ok(match size.and_then(|size| usize::try_from(size).ok()) {
            Some(size) => ResponseBody::from_reader_and_size(reader, size),
            None => ResponseBody::from_reader(reader),
        })
    }

    /// A readiness check: the upstream's own readiness.
    pub fn probe(&self) -> impl Fn() -> Result<(), String> + Send + use<> {
        let (agent, address) = (self.agent.clone(), self.config.address);
        let timeout = self.config.response_timeout;
        move || {
            let url = format!("http://{address}/health/ready");
            let request = agent.get(url).config().timeout_recv_response(Some(timeout)).build();
            let answer = request.call().map_err(|err| err.to_string())?;
            match answer.status().as_u16() {
                200 => Ok(()),
                status => Err(format!("it answers {status}")),
            }
        }
    }

    /// The response to a client where there is none to pass on.
    fn to_problem(&self, err: ureq::Error) -> Problem {
        use ureq::Timeout::{Connect, Resolve};
        let name = self.name;
        let unreachable = || Problem::unavailable(format!("{name} cannot be reached"));
        match &err {
            ureq::Error::Timeout(Connect | Resolve) => unreachable(),
            ureq::Error::Timeout(_) => Problem::new(504, format!("{name} did not answer in time")),
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                return Problem::bad_request(
                    "path, query or headers have characters that cannot be passed on",
                );
            }
            ureq::Error::Io(_) if is_connection_lost(&err) => Problem::unavailable(format!(
                "{name} closed the connection before it answered; the request may have been processed"
            )),
            ureq::Error::Io(_) | ureq::Error::ConnectionFailed | ureq::Error::HostNotFound => {
                unreachable()
            }
            _ => Problem::new(502, format!("{name} sent a malformed response")),
        }
        .with_cause(err)
    }
}

/// Whether a connection that had been made was lost.
fn is_connection_lost(err: &ureq::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let lost = [BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof];
    matches!(err, ureq::Error::Io(err) if lost.contains(&err.kind()))
}

/// A body whose begin was read already. The begin is freed as soon as it is read again: a slow client
/// spends most of its time on the rest.
struct PrefixedReader<R> {
    prefix: Vec<u8>,
    offset: usize,
    rest: R,
}

impl<R: Read> Read for PrefixedReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.prefix.is_empty() {
            return self.rest.read(out);
        }
        let read = (&self.prefix[self.offset..]).read(out)?;
        self.offset += read;
        if self.offset == self.prefix.len() {
            self.prefix = Vec::new();
        }
        Ok(read)
    }
}

/// A wait in whole seconds, rounded up, at least one: for `Retry-After`.
pub fn ceil_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0 || wait.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_rounded_up_to_whole_seconds() {
        for (millis, seconds) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (59_999, 60)] {
            assert_eq!(ceil_seconds(Duration::from_millis(millis)), seconds, "{millis} ms");
        }
    }
}
