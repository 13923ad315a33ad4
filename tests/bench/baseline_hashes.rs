//! Verifies a password again and again on every core, as `provision/bench` sets it beside logins.
//!
//! Usage: `baseline_hashes SECONDS`; the parameters of the hash are those of the settings of customers.
//! Prints how many passwords were verified in how many seconds as JSON.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use chassis::Env;
use customers::passwords::{Config, Passwords};
use serde_json::json;

fn main() -> anyhow::Result<()> {
    let seconds: u64 = std::env::args().nth(1).unwrap_or_default().parse()?;
    let mut env = Env::load();
    let config = Config::from_env(&mut env);
    let config = env.finish(config)?;
    let passwords = Passwords::new(&config);
    let problem = |problem: chassis::Problem| anyhow::anyhow!("{problem}");
    let stored = passwords.turn().and_then(|turn| turn.hash("a password")).map_err(problem)?;

    let (verified, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..config.at_once {
            scope.spawn(|| {
                while begun.elapsed() < Duration::from_secs(seconds) {
                    let turn = passwords.turn();
                    let verdict = turn.and_then(|turn| turn.verify("a password", Some(&stored)));
                    let matches = verdict.is_ok_and(|verdict| verdict.matches);
                    if matches { &verified } else { &failed }.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let requests = verified.into_inner() + failed.load(Ordering::Relaxed);
    let seconds = begun.elapsed().as_secs_f64();
    let errors = failed.into_inner();
    println!("{}", json!({ "requests": requests, "seconds": seconds, "errors": errors }));
    Ok(())
}
