//! A service with a route that needs an access token and one that does not: what a token costs, and
//! how soon another service knows that a session has ended.
//!
//! Reads `TOKENS_HOST`, `TOKENS_PORT`, `TOKENS_METRICS_LISTEN`, the address of customers' internal
//! API and the settings of tokens.

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
    server::run(&http, &stop, move |request| router::dispatch(ROUTES, &auth, request))
}
