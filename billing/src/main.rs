//! Starts the billing service: the queue's consumer, and HTTP for health and metrics.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use billing::config::Config;
use billing::routes::ROUTES;
use billing::{App, consumer, dead_letters, metrics, retention};
use chassis::{Env, Stop, logging, router, server};

const USAGE: &str = "\
Books the orders that arrive in RABBITMQ_QUEUE.

  billing                     runs the service; settings from the environment and .env
  billing dead-letters …      lists the messages that could not be booked, and requeues
                              or deletes them; see billing dead-letters --help
";

/// After a stop signal the process ends by then in any case. A message that is not acknowledged is
/// delivered again.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(4700);

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        None => serve().map(|()| ExitCode::SUCCESS),
        Some("dead-letters") => dead_letters::run_command(&arguments[1..]),
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
    // Descriptors for the database, and for the broker's connections.
    config.http.clamp_to_fd_limit(1, 8);
    metrics::register();
    let stop = Stop::on_signals()?;
    let status = Arc::new(consumer::Status::default());
    let app = App::new(&config, Arc::clone(&status))?;
    stop.force_exit_after(
        SHUTDOWN_TIMEOUT,
        "stopped in the middle of a batch: it will be delivered again",
    )?;

    thread::scope(|scope| {
        stop.spawn_critical(scope, "consumer", || consumer::run(&config, &stop, &status))?;
        stop.spawn_critical(scope, "retention", || retention::run(&config, &stop))?;
        let handle = move |request: &_| router::dispatch(ROUTES, &app, request);
        let served = server::run(&config.http, &stop, handle);
        stop.request();
        served
    })
}
