//! Starts the customers service, or manages accounts by hand.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use chassis::{Env, Stop, logging, router, server};
use customers::App;
use customers::config::Config;
use customers::routes::{INTERNAL_ROUTES, ROUTES};
use customers::sessions::sweep;
use customers::users::command;

const USAGE: &str = "\
Customers: accounts, logins and tokens.

  customers            runs the service; settings from the environment and .env
  customers users …    creates, promotes, lists or disables accounts; see
                       customers users --help
";

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        None => serve().map(|()| ExitCode::SUCCESS),
        Some("users") => command::run_command(&arguments[1..]),
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
    // Each client takes one descriptor, the pool its connections, the readiness probe one more.
    config.http.clamp_to_fd_limit(1, config.db.pool_size as usize + 1);
    let stop = Stop::on_signals()?;
    let (http, internal_listen) = (config.http.clone(), config.internal_listen);
    let app = Arc::new(App::new(config, &stop)?);
    thread::scope(|scope| {
        let sweeper = Arc::clone(&app);
        let sweep_stop = &stop;
        stop.spawn_critical(scope, "sweep", move || sweep::run(&sweeper, sweep_stop))?;
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
