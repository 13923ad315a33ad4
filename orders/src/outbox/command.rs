//! `orders outbox`: the messages that wait, by hand.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::SystemTime;

use chassis::Env;
use chassis::response::timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::relay::Relay;
use super::store;
use crate::config::Config;
use crate::exclusive::{self, Lock};

const USAGE: &str = "\
Messages of orders that wait to be published. Database and broker are those of the
settings of orders.

  orders outbox list
      a line of JSON each, the oldest first
  orders outbox retry
      publishes what waits. A running service does it by itself, again and again;
      this is for when none runs
  orders outbox retry ORDER
      publishes all messages of an order once more, also those that were published:
      for a receiver that has lost them

Exit code 1: it failed; 2: wrong usage.
";

/// How many messages `list` reads at a time.
const PAGE_ROWS: i64 = 500;

#[derive(Serialize)]
struct Entry<'e> {
    id: i64,
    order_id: Uuid,
    message_id: &'e str,
    to: &'e str,
    age_s: u64,
    created_at: String,
}

/// Runs `orders outbox …`.
pub fn run_command(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["list"] => match list(&Config::from_env(Env::load())?) {
            // `list | head` is no failure.
            Err(err) if is_broken_pipe(&err) => Ok(ExitCode::SUCCESS),
            listed => listed.map(|()| ExitCode::SUCCESS),
        },
        ["retry"] => retry(&Config::from_env(Env::load())?),
        ["retry", order] => match order.parse() {
            Ok(order) => retry_order(&Config::from_env(Env::load())?, order),
            Err(_) => usage("ORDER must be the id of an order"),
        },
        ["-h" | "--help" | "help"] => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        _ => usage(""),
    }
}

fn usage(error: &str) -> anyhow::Result<ExitCode> {
    if !error.is_empty() {
        eprintln!("{error}");
    }
    eprint!("{USAGE}");
    Ok(ExitCode::from(2))
}

fn is_broken_pipe(err: &anyhow::Error) -> bool {
    err.downcast_ref::<io::Error>().is_some_and(|err| err.kind() == io::ErrorKind::BrokenPipe)
}

fn list(config: &Config) -> anyhow::Result<()> {
    let mut client = config.db.connect()?;
    let mut out = io::stdout().lock();
    let mut after = 0;
    loop {
        let page = config.db.with_deadline(|| store::next(&mut client, after, PAGE_ROWS))?;
        let Some(last) = page.last() else { return Ok(()) };
        after = last.id;
        for message in &page {
            let age = SystemTime::now().duration_since(message.created_at).unwrap_or_default();
            let entry = Entry {
                id: message.id,
                order_id: message.order_id,
                message_id: &message.message_id,
                to: if message.is_for_queue { &config.queue } else { &message.routing_key },
                age_s: age.as_secs(),
                created_at: timestamp(message.created_at),
            };
            serde_json::to_writer(&mut out, &entry).map_err(io::Error::from)?;
            out.write_all(b"\n")?;
        }
    }
}

fn retry(config: &Config) -> anyhow::Result<ExitCode> {
    let Some(mut session) = exclusive::open(&config.db, Lock::Relay)? else {
        println!("a service of orders runs and publishes what waits");
        return Ok(ExitCode::SUCCESS);
    };
    let mut relay = Relay::new(config);
    let mut published = 0;
    loop {
        match relay.publish_batch(&mut session)? {
            0 => break,
            count => published += count,
        }
    }
    println!("{published} published");
    Ok(ExitCode::SUCCESS)
}

fn retry_order(config: &Config, order: Uuid) -> anyhow::Result<ExitCode> {
    let mut client = config.db.connect()?;
    match config.db.with_deadline(|| store::publish_again(&mut client, order))? {
        0 => {
            eprintln!("the outbox has no message of this order; it keeps them for a week");
            Ok(ExitCode::FAILURE)
        }
        count => {
            println!("{count} will be published again");
            retry(config)
        }
    }
}
