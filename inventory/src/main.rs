//! Starts the inventory service: HTTP in front of the catalogue.

use chassis::{Env, Stop, logging, router, server};
use inventory::App;
use inventory::config::Config;
use inventory::routes::ROUTES;

fn main() -> anyhow::Result<()> {
    let mut config = Config::from_env(Env::load())?;
    let _log = logging::init(config.log_level, env!("CARGO_CRATE_NAME"))?;
    // Each client takes one descriptor, the pool its connections, the readiness probe one more.
    config.http.clamp_to_fd_limit(1, config.db.pool_size as usize + 1);
    let stop = Stop::on_signals()?;
    let app = App::new(config.db)?;
    server::run(&config.http, &stop, move |request| router::dispatch(ROUTES, &app, request))
}
