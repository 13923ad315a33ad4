//! Starts the gateway: HTTP in front, one thread that publishes behind.

use std::thread;
use std::time::Duration;

use chassis::health::Probe;
use chassis::{Env, Stop, logging, router, server};
use gateway::config::Config;
use gateway::forward::Inventory;
use gateway::limit::Limiter;
use gateway::publish::Publisher;
use gateway::{App, metrics, routes};

fn main() -> anyhow::Result<()> {
    let mut env = Env::load();
    let level = logging::level_from_env(&mut env);
    let config = Config::from_env(&mut env);
    let mut config = env.finish(config)?;
    let _log = logging::init(level, env!("CARGO_CRATE_NAME"))?;
    config.fit_descriptors();
    metrics::register();

    let stop = Stop::on_signals()?;
    // Requests in flight at a stop still want their confirms: the publisher ends after them.
    let done = Stop::default();
    let inventory = Inventory::new(&config.forward, config.proxies.clone());
    let (publisher, worker) = Publisher::new(&config.publish);
    let probes = vec![
        Probe::new("inventory", inventory.probe())?,
        Probe::new("rabbitmq", publisher.probe())?,
    ];
    let app = App { inventory, publisher, probes };
    let limiter = config.rate_limit.map(|rate| Limiter::new(rate, config.proxies.clone()));

    thread::scope(|scope| {
        stop.spawn_critical(scope, "publisher", || worker.run(&done))?;
        app.publisher.await_connection(Duration::from_secs(2), &stop);
        let handle = move |request: &_| {
            let serve = || router::dispatch(routes::ROUTES, &app, request);
            match &limiter {
                Some(limiter) => limiter.guard(request, serve),
                None => serve(),
            }
        };
        let served = server::run(&config.http, &stop, handle);
        done.request();
        served
    })
}
