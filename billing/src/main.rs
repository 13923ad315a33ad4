//! Starts the billing service: the queue's consumer, and HTTP for health and metrics.

use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use billing::config::Config;
use billing::routes::{self, App};
use billing::{consume, dead_letters, forget, metrics};
use chassis::env::Env;
use chassis::{Stop, logging, server};

const USAGE: &str = "\
Books the orders that arrive in RABBITMQ_QUEUE.

  billing                     runs the service; settings from the environment and .env
  billing dead-letters …      looks at the messages that could not become orders,
                              and puts them back; see billing dead-letters --help
";

/// Later than this after a stop signal the process ends in any case: an order
/// that is not acknowledged by then is delivered again.
const STOP_LIMIT: Duration = Duration::from_millis(4700);

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        None => serve().map(|()| ExitCode::SUCCESS),
        Some("dead-letters") => dead_letters::command(&arguments[1..]),
        Some("-h" | "--help" | "help") => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        Some(_) => {
            eprint!("{USAGE}");
            Ok(ExitCode::from(2))
        }
    }
}

fn serve() -> anyhow::Result<()> {
    let mut config = Config::from_env(Env::load())?;
    let _log = logging::init(config.log_level, env!("CARGO_CRATE_NAME"))?;
    // Beside its clients: the database, and the broker for consuming and publishing.
    config.http.clamp_to_fd_limit(1, 8);
    metrics::register();
    let stop = Stop::on_signals()?;
    let consuming = Arc::new(AtomicBool::new(false));
    let app = App::new(&config, Arc::clone(&consuming))?;
    end_in_time(&stop)?;

    thread::scope(|scope| {
        stop.spawn_critical(scope, "consumer", || consume::run(&config, &stop, &consuming))?;
        stop.spawn_critical(scope, "forget", || forget::run(&config, &stop))?;
        let served = server::run(&config.http, &stop, move |request| routes::handle(&app, request));
        stop.request();
        served
    })
}

fn end_in_time(stop: &Stop) -> anyhow::Result<()> {
    let stop = stop.clone();
    thread::Builder::new().name("stop-limit".into()).spawn(move || {
        while !stop.sleep(Duration::from_secs(3600)) {}
        thread::sleep(STOP_LIMIT);
        log::warn!("stopped in the middle of a batch: it will be delivered again");
        log::logger().flush();
        process::exit(1);
    })?;
    Ok(())
}
