//! One call of another service with a small answer, within the deadline of the request that needs it.

use std::io::Read;
use std::time::{Duration, Instant};

use rouille::Request;
use ureq::http;

use super::{Answer, Upstream};
use crate::problem::Problem;
use crate::request::single_header;

/// How many milliseconds the caller of a service waits for its answer.
pub const DEADLINE_HEADER: &str = "X-Request-Deadline-Ms";

/// The longest answer that is read.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// A call.
pub struct Call<'c> {
    /// The method.
    pub method: &'static str,
    /// Path and query.
    pub path: &'c str,
    /// A body of JSON.
    pub body: Option<String>,
    /// Whether it may be sent twice. Such a call is sent once more where its connection was lost or
    /// the answer is a failure of the upstream (500, 502, 503), while there is time.
    pub is_repeatable: bool,
    /// When the answer must be there.
    pub deadline: Instant,
    /// The id of the request that needs it: the logs of both services are joined by it.
    pub request_id: &'c str,
}

/// The answer to a [`Call`].
#[derive(Debug)]
pub struct CallAnswer {
    /// The status, below 500.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Upstream {
    /// Makes a call. Its deadline goes with it ([`DEADLINE_HEADER`]).
    ///
    /// Fails with 503 where the upstream cannot be reached, is not called now or fails itself, and with
    /// 504 where there is no answer at the deadline.
    pub fn call(&self, call: &Call<'_>) -> Result<CallAnswer, Problem> {
        let first = self.attempt(call);
        match first {
            Err(problem) if call.is_repeatable && problem.status() != 504 => {
                super::metrics::RETRIES.with_label_values(&[self.name]).inc();
                log::debug!("{} {} is sent again: {problem}", call.method, call.path);
                self.attempt(call)
            }
            answer => answer,
        }
    }

    fn attempt(&self, call: &Call<'_>) -> Result<CallAnswer, Problem> {
        let left = call.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Problem::new(504, format!("there was no time left to ask {}", self.name)));
        }
        let build = |origin: &str| {
            let builder = http::Request::builder()
                .method(call.method)
                .uri(format!("{origin}{}", call.path))
                .header("X-Request-Id", call.request_id)
                .header(DEADLINE_HEADER, left.as_millis().max(1).to_string());
            let builder = match &call.body {
                Some(_) => builder.header("Content-Type", "application/json"),
                None => builder,
            };
            // An empty body has a length, too: without one it would be sent in chunks.
            let has_body = call.body.is_some() || ["POST", "PUT"].contains(&call.method);
            let body = call.body.clone().unwrap_or_default().into_bytes();
            builder.body(has_body.then_some(body))
        };
        let timeout = left.min(self.config.response_timeout);
        let Answer { head, body } = self.send_within(timeout, false, build, true)?;
        let mut text = String::new();
        let (reader, _) = body.into_reader_and_size();
        reader.take(MAX_ANSWER_BYTES).read_to_string(&mut text).map_err(|err| {
            Problem::unavailable(format!("{} broke off its answer", self.name)).with_cause(err)
        })?;
        match head.status().as_u16() {
            504 => Err(Problem::new(504, format!("{} did not answer in time", self.name))),
            status @ 500.. => Err(Problem::unavailable(format!("{} is not available", self.name))
                .with_cause(format!("it answers {status}"))),
            status => Ok(CallAnswer { status, body: text }),
        }
    }
}

/// When the answer to a request must be there: `limit` from now, or sooner where its caller waits less.
pub fn deadline(request: &Request, limit: Duration) -> Result<Instant, Problem> {
    let header = single_header(request, DEADLINE_HEADER)?;
    let caller = header.and_then(|value| value.parse().ok()).map(Duration::from_millis);
    Ok(Instant::now() + caller.map_or(limit, |caller| caller.min(limit)))
}
