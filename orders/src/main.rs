//! Starts the orders service: HTTP in front, and behind it the threads that publish messages, send
//! stock commands and cancel what is not paid in time.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use chassis::{Env, Stop, logging, router, server};
use orders::config::Config;
use orders::orders::sweep;
use orders::routes::ROUTES;
use orders::{App, outbox, stock};

const USAGE: &str = "\
Carts and orders.

  orders             runs the service; settings from the environment and .env
  orders outbox …    lists the messages that wait to be published, and publishes
                     them; see orders outbox --help
";

/// After a stop signal the process ends by then in any case. What the threads had not finished is done
/// by the next process.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(4700);

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        None => serve().map(|()| ExitCode::SUCCESS),
        Some("outbox") => outbox::command::run_command(&arguments[1..]),
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
    // Each client takes one descriptor and two of upstreams; besides there are the pool, the threads'
    // own connections to the database and the broker, and the probes.
    config.http.clamp_to_fd_limit(3, config.db.pool_size as usize + 10);
    let stop = Stop::on_signals()?;
    let app = Arc::new(App::new(&config, &stop)?);
    let why = "stopped while the broker or inventory was waited for: it will be done again";
    stop.force_exit_after(SHUTDOWN_TIMEOUT, why)?;
    thread::scope(|scope| {
        let (app, config, stop) = (&app, &config, &stop);
        stop.spawn_critical(scope, "outbox-relay", move || outbox::relay::run(app, config, stop))?;
        stop.spawn_critical(scope, "stock-sender", move || stock::sender::run(app, config, stop))?;
        stop.spawn_critical(scope, "sweep", move || sweep::run(app, stop))?;
        let handler = Arc::clone(app);
        let handle = move |request: &_| router::dispatch(ROUTES, &*handler, request);
        let served = server::run(&config.http, stop, handle);
        stop.request();
        served
    })
}
