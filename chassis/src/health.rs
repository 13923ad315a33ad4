//! Liveness and readiness.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rouille::Response;
use serde::Serialize;
use serde_json::json;

/// A probe without a result after this time counts as failed.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1500);

/// How long a result is used for further requests, so that many of them cost nothing. A failure is
/// kept for a shorter time: what was away while the service started may be there a moment later.
const SUCCESS_TTL: Duration = Duration::from_millis(250);
const FAILURE_TTL: Duration = Duration::from_millis(25);

/// Checks one dependency on a thread of its own. A dependency that hangs makes the check fail; it
/// does not make the handler hang.
pub struct Probe {
    name: &'static str,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// When the result was requested that is not there yet.
    requested_at: Option<Instant>,
    last: Option<ProbeResult>,
}

#[derive(Clone)]
struct ProbeResult {
    at: Instant,
    latency: Duration,
    result: Result<(), String>,
}

/// One line of the readiness response.
#[derive(Serialize)]
struct CheckReport {
    name: &'static str,
    status: &'static str,
    latency_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl Probe {
    /// `check` fails with a reason that may be shown to any client.
    pub fn new(
        name: &'static str,
        check: impl Fn() -> Result<(), String> + Send + 'static,
    ) -> anyhow::Result<Probe> {
        let shared = Arc::new(Shared::default());
        let worker = Arc::clone(&shared);
        thread::Builder::new().name(format!("probe-{name}")).spawn(move || worker.run(check))?;
        Ok(Probe { name, shared })
    }

    fn report(&self) -> CheckReport {
        let started = Instant::now();
        let last = self.shared.result(started);
        let waited = last.as_ref().map_or(started.elapsed(), |last| last.latency);
        let result = match last {
            Some(last) => last.result,
            None => Err(format!("no answer within {} ms", PROBE_TIMEOUT.as_millis())),
        };
        CheckReport {
            name: self.name,
            status: if result.is_ok() { "ok" } else { "unavailable" },
            latency_ms: (waited.as_secs_f64() * 1e5).round() / 100.0,
            detail: result.err(),
        }
    }
}

impl Shared {
    /// Runs the check whenever a result is requested; ends with the process.
    fn run(&self, check: impl Fn() -> Result<(), String>) {
        loop {
            self.changed.wait_while(&mut self.state.lock(), |state| state.requested_at.is_none());
            let at = Instant::now();
            // A panic must not end this thread: no later request would get a result.
            let result = catch_unwind(AssertUnwindSafe(&check))
                .unwrap_or_else(|_| Err("the check failed; the log has the reason".to_owned()));
            let mut state = self.state.lock();
            state.requested_at = None;
            state.last = Some(ProbeResult { at, latency: at.elapsed(), result });
            self.changed.notify_all();
        }
    }

    fn result(&self, now: Instant) -> Option<ProbeResult> {
        let is_fresh = |state: &State| {
            state.last.as_ref().is_some_and(|last| {
                let ttl = if last.result.is_ok() { SUCCESS_TTL } else { FAILURE_TTL };
                last.at + last.latency + ttl > now
            })
        };
        let mut state = self.state.lock();
        if !is_fresh(&state) {
            let since = *state.requested_at.get_or_insert(now);
            // While a dependency hangs, only the first requests wait for it.
            if since.elapsed() >= PROBE_TIMEOUT {
                return None;
            }
            self.changed.notify_all();
            self.changed.wait_while_for(&mut state, |state| !is_fresh(state), PROBE_TIMEOUT);
        }
        is_fresh(&state).then(|| state.last.clone()).flatten()
    }
}

/// `GET /health`: 200 while the process lives.
pub fn liveness() -> Response {
    Response::json(&json!({ "status": "ok" }))
}

/// `GET /health/ready`: 200, or 503 when a dependency is away; one line for each.
pub fn readiness(probes: &[Probe]) -> Response {
    let checks: Vec<CheckReport> = probes.iter().map(Probe::report).collect();
    let ready = checks.iter().all(|check| check.status == "ok");
    let lines: Vec<String> = checks.iter().map(|check| json!(check).to_string()).collect();
    let status = if ready { "ok" } else { "unavailable" };
    let body = format!("{{\"status\":\"{status}\",\"checks\":[\n  {}\n]}}\n", lines.join(",\n  "));
    Response::from_data("application/json; charset=utf-8", body).with_status_code(if ready {
        200
    } else {
        503
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dependency_that_comes_back_is_seen_sooner_than_one_that_goes() {
        let asked = Arc::new(Mutex::new(0));
        let count = Arc::clone(&asked);
        let comes = Probe::new("queue", move || {
            let mut asked = count.lock();
            *asked += 1;
            if *asked == 1 { Err("away".to_owned()) } else { Ok(()) }
        });
        let probes = [comes.unwrap()];
        let now = Instant::now();
        assert_eq!(readiness(&probes).status_code, 503);
        let shared = &probes[0].shared;
        // The time is an argument, so that the machine's speed does not matter.
        assert!(shared.result(now).unwrap().result.is_err());
        assert!(shared.result(Instant::now() + FAILURE_TTL).unwrap().result.is_ok());
        let at = shared.state.lock().last.clone().unwrap().at;
        assert!(shared.result(at + SUCCESS_TTL - FAILURE_TTL).unwrap().result.is_ok());
        assert_eq!(*asked.lock(), 2);
    }

    #[test]
    fn a_probe_works_on_after_its_check_has_panicked() {
        let calls = Arc::new(Mutex::new(0));
        let count = Arc::clone(&calls);
        let probe = Probe::new("panics-once", move || {
            *count.lock() += 1;
            assert!(*count.lock() > 1, "the first check panics");
            Ok(())
        });
        let shared = &probe.unwrap().shared;
        let failed = shared.result(Instant::now()).unwrap();
        assert!(failed.result.is_err());
        let later = failed.at + failed.latency + FAILURE_TTL;
        assert!(shared.result(later).unwrap().result.is_ok());
    }

    #[test]
    fn a_dependency_that_hangs_is_unavailable_after_the_deadline() {
        let hangs = Probe::new("db", || {
            loop {
                thread::park();
            }
        });
        let works = Probe::new("queue", || Ok(()));
        let started = Instant::now();
        let response = readiness(&[works.unwrap(), hangs.unwrap()]);
        assert_eq!(response.status_code, 503);
        assert!(started.elapsed() < PROBE_TIMEOUT * 2);
        let mut text = String::new();
        let (mut body, _) = response.data.into_reader_and_size();
        std::io::Read::read_to_string(&mut body, &mut text).unwrap();
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["checks"][0]["status"], "ok");
        assert_eq!(report["checks"][1]["detail"], "no answer within 1500 ms");
    }
}
