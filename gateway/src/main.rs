//! Starts the gateway: HTTP in front, one thread that publishes behind.

use std::thread;
use std::time::Duration;

use chassis::{Env, Stop, logging, server};
use gateway::config::Config;
use gateway::{App, metrics};

/// How long the start waits for the broker before requests are accepted without it.
const BROKER_WAIT: Duration = Duration::from_secs(2);

fn main() -> anyhow::Result<()> {
    let mut config = Config::from_env(Env::load())?;
    let _log = logging::init(config.log_level, env!("CARGO_CRATE_NAME"))?;
    config.clamp_to_fd_limit();
    metrics::register();
    let stop = Stop::on_signals()?;
    // Requests that are in flight at a stop still need their confirms: the publisher ends after them.
    let publisher_stop = Stop::default();
    let (app, worker) = App::new(&config)?;

    thread::scope(|scope| {
        stop.spawn_critical(scope, "publisher", || worker.run(&publisher_stop))?;
        app.publisher.await_connection(BROKER_WAIT, &stop);
        let served = server::run(&config.http, &stop, move |request| app.handle(request));
        publisher_stop.request();
        served
    })
}
