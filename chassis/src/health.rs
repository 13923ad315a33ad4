//! Whether a service lives, and whether it can do its work.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rouille::Response;
use serde::Serialize;
use serde_json::json;

/// A probe that has not answered by then counts as failed.
const DEADLINE: Duration = Duration::from_millis(1500);

/// An answer this young serves further askers, so that asking costs nothing. Bad news grows
/// old sooner: what was away while the service started may be there a moment later.
const FRESH: Duration = Duration::from_millis(250);
const FRESH_FAILURE: Duration = Duration::from_millis(25);

/// One dependency, asked on a thread of its own: a dependency that hangs makes
/// the answer "no", never a handler that hangs with it.
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
    /// Since when the question is open.
    asked: Option<Instant>,
    last: Option<Finding>,
}

#[derive(Clone)]
struct Finding {
    at: Instant,
    latency: Duration,
    result: Result<(), String>,
}

/// One line of the readiness answer.
#[derive(Serialize)]
struct Check {
    name: &'static str,
    status: &'static str,
    latency_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl Probe {
    /// `ask` fails with a reason that may be shown to anybody.
    pub fn new(
        name: &'static str,
        ask: impl Fn() -> Result<(), String> + Send + 'static,
    ) -> anyhow::Result<Probe> {
        let shared = Arc::new(Shared::default());
        let asked = Arc::clone(&shared);
        thread::Builder::new().name(format!("probe-{name}")).spawn(move || asked.serve(ask))?;
        Ok(Probe { name, shared })
    }

    fn check(&self) -> Check {
        let started = Instant::now();
        let finding = self.shared.ask(started);
        let waited = finding.as_ref().map_or(started.elapsed(), |finding| finding.latency);
        let result = match finding {
            Some(finding) => finding.result,
            None => Err(format!("no answer within {} ms", DEADLINE.as_millis())),
        };
        Check {
            name: self.name,
            status: if result.is_ok() { "ok" } else { "unavailable" },
            latency_ms: (waited.as_secs_f64() * 1e5).round() / 100.0,
            detail: result.err(),
        }
    }
}

impl Shared {
    /// Answers askers for ever; ends with the process.
    fn serve(&self, ask: impl Fn() -> Result<(), String>) {
        loop {
            let state = self.lock();
            drop(
                self.changed
                    .wait_while(state, |state| state.asked.is_none())
                    .unwrap_or_else(PoisonError::into_inner),
            );
            let at = Instant::now();
            let result = ask();
            let mut state = self.lock();
            state.asked = None;
            state.last = Some(Finding { at, latency: at.elapsed(), result });
            self.changed.notify_all();
        }
    }

    fn ask(&self, now: Instant) -> Option<Finding> {
        let fresh = |state: &State| {
            state.last.as_ref().is_some_and(|last| {
                let fresh = if last.result.is_ok() { FRESH } else { FRESH_FAILURE };
                last.at + last.latency + fresh > now
            })
        };
        let mut state = self.lock();
        if !fresh(&state) {
            let since = *state.asked.get_or_insert(now);
            // Those who ask a dependency that hangs shall not all hang with it.
            if since.elapsed() >= DEADLINE {
                return None;
            }
            self.changed.notify_all();
            let waited = self.changed.wait_timeout_while(state, DEADLINE, |state| !fresh(state));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        fresh(&state).then(|| state.last.clone()).flatten()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `GET /health`: 200 while the process lives.
pub fn liveness() -> Response {
    Response::json(&json!({ "status": "ok" }))
}

/// `GET /health/ready`: 200, or 503 when a dependency is away; one line for each.
pub fn readiness(probes: &[Probe]) -> Response {
    let checks: Vec<Check> = probes.iter().map(Probe::check).collect();
    let ready = checks.iter().all(|check| check.status == "ok");
    let lines: Vec<String> = checks.iter().map(|check| json!(check).to_string()).collect();
    let status = if ready { "ok" } else { "unavailable" };
    let body = format!("{{\"status\":\"{status}\",\"checks\":[\n  {}\n]}}\n", lines.join(",\n  "));
    Response::from_data("application/json; charset=utf-8", body)
        .with_status_code(if ready { 200 } else { 503 })
        .with_no_cache()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dependency_that_comes_back_is_seen_sooner_than_one_that_goes() {
        let asked = Arc::new(Mutex::new(0));
        let count = Arc::clone(&asked);
        let comes = Probe::new("queue", move || {
            let mut asked = count.lock().unwrap();
            *asked += 1;
            if *asked == 1 { Err("away".to_owned()) } else { Ok(()) }
        });
        let probes = [comes.unwrap()];
        let now = Instant::now();
        assert_eq!(readiness(&probes).status_code, 503);
        let shared = &probes[0].shared;
        // Time is told, so that the machine's speed does not matter.
        assert!(shared.ask(now).unwrap().result.is_err());
        assert!(shared.ask(Instant::now() + FRESH_FAILURE).unwrap().result.is_ok());
        let at = shared.lock().last.clone().unwrap().at;
        assert!(shared.ask(at + FRESH - FRESH_FAILURE).unwrap().result.is_ok());
        assert_eq!(*asked.lock().unwrap(), 2);
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
        assert!(started.elapsed() < DEADLINE * 2);
        let mut text = String::new();
        let (mut body, _) = response.data.into_reader_and_size();
        std::io::Read::read_to_string(&mut body, &mut text).unwrap();
        let told: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(told["checks"][0]["status"], "ok");
        assert_eq!(told["checks"][1]["detail"], "no answer within 1500 ms");
    }
}
