//! Starts the inventory service: HTTP in front of the catalogue and its stock.

use std::sync::Arc;
use std::thread;

use chassis::{Env, Stop, logging, router, server};
use inventory::App;
use inventory::config::Config;
use inventory::reservations::sweep;
use inventory::routes::{INTERNAL_ROUTES, ROUTES};

fn main() -> anyhow::Result<()> {
    let mut config = Config::from_env(Env::load())?;
    let _log = logging::init(config.log_level, env!("CARGO_CRATE_NAME"))?;
    // Each client takes one descriptor, the pool its connections, the readiness probe one more.
    config.http.clamp_to_fd_limit(1, config.db.pool_size as usize + 1);
    let stop = Stop::on_signals()?;
    let (http, internal_listen) = (config.http.clone(), config.internal_listen);
    let app = Arc::new(App::new(config, &stop)?);
    thread::scope(|scope| {
        let (sweeper, sweep_stop) = (Arc::clone(&app), &stop);
        stop.spawn_critical(scope, "sweep", move || sweep::run(&sweeper.db, sweep_stop))?;
        let internal = Arc::clone(&app);
        let served = server::run_with_internal(
            &http,
            internal_listen,
            &stop,
            move |request| router::dispatch(ROUTES, &app, request),
            move |request| router::dispatch(INTERNAL_ROUTES, &internal, request),
        );
        stop.request();
        served
    })
}
