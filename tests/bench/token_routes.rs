//! A service with a route that needs an access token and one that does not: what a token costs, and
//! how soon another service knows that a session has ended.
//!
//! Reads `TOKENS_HOST`, `TOKENS_PORT`, `TOKENS_METRICS_LISTEN`, the address of customers' internal
//! API and the settings of tokens. With an access token as its argument it does not listen: it prints how
//! many microseconds a look at this token takes after the first one.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use chassis::auth::{self, Authenticator, HttpSource};
use chassis::router::{self, Route, route};
use chassis::{Env, Problem, Stop, logging, response, server};
use rouille::{Request, Response};
use serde_json::json;

const ROUTES: &[Route<Authenticator>] =
    &[route("GET", "/open", |_, _, _| Ok(answer(0))), route("GET", "/token", token)];

fn token(auth: &Authenticator, request: &Request, _: &router::Params) -> Result<Response, Problem> {
    Ok(answer(auth.principal(request)?.user_id))
}

fn answer(user_id: i64) -> Response {
    response::ok(&json!({ "user_id": user_id }))
}

fn main() -> anyhow::Result<()> {
    let mut env = Env::load();
    let http = server::Config::from_env(&mut env, "TOKENS");
    let config = auth::Config::from_env(&mut env);
    let customers = env.host_port("CUSTOMERS_HOST", "CUSTOMERS_INTERNAL_PORT");
    let level = logging::level_from_env(&mut env);
    let (http, config, customers, level) = env.finish((http, config, customers, level))?;
    let _log = logging::init(level, env!("CARGO_CRATE_NAME"))?;
    let stop = Stop::on_signals()?;
    let auth = Authenticator::new(config, HttpSource::new(customers), &stop)?;
    match std::env::args().nth(1) {
        Some(token) => print_cost(&auth, &token),
        None => server::run(&http, &stop, move |request| router::dispatch(ROUTES, &auth, request)),
    }
}

/// As JSON, on the standard output.
fn print_cost(auth: &Authenticator, token: &str) -> anyhow::Result<()> {
    const LOOKS: u32 = 1_000_000;
    let headers = vec![("Authorization".to_owned(), format!("Bearer {token}"))];
    let request = Request::fake_http("GET", "/token", headers, vec![]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Err(problem) = auth.principal(&request) {
        if Instant::now() > deadline {
            bail!("the token is refused: {problem}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    let begun = Instant::now();
    for _ in 0..LOOKS {
        if auth.principal(&request).is_err() {
            bail!("the token is refused");
        }
    }
    println!("{}", begun.elapsed().as_secs_f64() * 1e6 / f64::from(LOOKS));
    Ok(())
}
