//! Starts the inventory service: HTTP in front of the movie catalogue.

use chassis::{Env, Stop, http, logging, server};
use inventory::App;
use inventory::config::Config;
use inventory::routes::ROUTES;

fn main() -> anyhow::Result<()> {
    let mut config = Config::from_env(Env::load())?;
    let _log = logging::init(config.log_level, env!("CARGO_CRATE_NAME"))?;
    config.http.fit_descriptors(1, config.db.pool_size as usize);
    let stop = Stop::on_signals()?;
    let app = App::new(config.db)?;
    server::run(&config.http, &stop, move |request| http::dispatch(ROUTES, &app, request))
}
