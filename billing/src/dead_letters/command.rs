//! `billing dead-letters`: lists dead letters, requeues or deletes them.

use std::collections::HashSet;
use std::io::{self, Write};
use std::process::ExitCode;

use amiquip::{Channel, Connection, Delivery, Get};
use anyhow::{Context, ensure};
use chassis::Env;
use chassis::broker::{CALL_TIMEOUT, Message, Publisher, SocketDeadline, declare_queue};
use serde::Serialize;
use uuid::Uuid;

use super::properties::{FAILED_AT_HEADER, ID_HEADER, header, reason, without_reason};
use crate::config::Config;
use crate::order::Order;

/// How many messages are held unacknowledged while some are requeued.
const REQUEUE_BATCH: usize = 100;

/// How many messages `list` shows without --limit.
const DEFAULT_LIMIT: usize = 100;

const USAGE: &str = "\
The dead letters: messages that could not be booked, each with its reason.

  billing dead-letters list [--limit N]
      one line of JSON each, oldest first, at most N (100); changes nothing
  billing dead-letters requeue SELECTOR [--body JSON] [--new-id]
      sends them to RABBITMQ_QUEUE again, with the same message id;
      --body: with this content instead, for a single one;
      --new-id: with the key as their message id, where the old one is invalid
  billing dead-letters delete SELECTOR
      deletes them

SELECTOR is a key or a message id as the list shows it, #N for a position in the
list, or all. Works while billing runs. Exit code 1: it failed, or there is no
such dead letter; 2: wrong usage. put-back and drop are the older names of
requeue and delete.
";

/// Runs `billing dead-letters …`.
pub fn run_command(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["list"] => list(DEFAULT_LIMIT),
        ["list", "--limit", limit] => match limit.parse() {
            Ok(limit) => list(limit),
            Err(_) => Ok(usage_error("--limit takes a number")),
        },
        ["requeue" | "put-back", rest @ ..] => match parse_requeue_args(rest) {
            Some((selector, body, new_id)) => {
                if let Some(Err(invalid)) = body.map(|body| Order::parse(body.as_bytes())) {
                    eprintln!("with this body it would come back at once: {invalid}");
                    return Ok(ExitCode::FAILURE);
                }
                apply(selector, &Action::Requeue { body, new_id })
            }
            None => Ok(usage_error("which dead letter?")),
        },
        ["delete" | "drop", selector] => apply(selector, &Action::Delete),
        ["-h" | "--help" | "help"] => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        _ => Ok(usage_error("list, requeue or delete?")),
    }
}

/// Selector, new body, and whether the message gets a new id.
fn parse_requeue_args<'a>(arguments: &[&'a str]) -> Option<(&'a str, Option<&'a str>, bool)> {
    let (mut selector, mut body, mut new_id) = (None, None, false);
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match *argument {
            "--body" if body.is_none() => body = Some(*arguments.next()?),
            "--new-id" => new_id = true,
            name if selector.is_none() => selector = Some(name),
            _ => return None,
        }
    }
    Some((selector?, body, new_id))
}

fn usage_error(question: &str) -> ExitCode {
    eprint!("{question}\n\n{USAGE}");
    ExitCode::from(2)
}

fn list(limit: usize) -> anyhow::Result<ExitCode> {
    let config = Config::from_env(Env::load())?;
    match DeadLetterQueue::open(&config)?.list(limit) {
        // `list | head` is no failure.
        Err(err) if is_broken_pipe(&err) => Ok(ExitCode::SUCCESS),
        listed => listed.map(|()| ExitCode::SUCCESS),
    }
}

fn is_broken_pipe(err: &anyhow::Error) -> bool {
    err.downcast_ref::<io::Error>().is_some_and(|err| err.kind() == io::ErrorKind::BrokenPipe)
}

fn apply(selector: &str, action: &Action) -> anyhow::Result<ExitCode> {
    if selector.is_empty() {
        return Ok(usage_error("which dead letter?"));
    }
    let config = Config::from_env(Env::load())?;
    let done = DeadLetterQueue::open(&config)?.apply(&config, selector, action)?;
    if done == 0 && selector != "all" {
        eprintln!("there is no dead letter {selector}; billing dead-letters list shows them");
        return Ok(ExitCode::FAILURE);
    }
    let verb = if matches!(action, Action::Delete) { "deleted" } else { "requeued" };
    println!("{done} {verb}");
    Ok(ExitCode::SUCCESS)
}

enum Action<'a> {
    Requeue { body: Option<&'a str>, new_id: bool },
    Delete,
}

/// One line of the list.
#[derive(Serialize)]
struct ListEntry<'a> {
    position: usize,
    key: &'a str,
    message_id: Option<&'a str>,
    reason: &'a str,
    failed_at: &'a str,
    body: &'a str,
}

/// The queue of dead letters for this command. Messages that it gets and does not acknowledge are
/// back in their places when the connection ends.
struct DeadLetterQueue {
    deadline: SocketDeadline,
    channel: Channel,
    /// How many messages there were at the begin. Later ones are left alone.
    count: usize,
    name: String,
    _connection: Connection,
}

impl DeadLetterQueue {
    fn open(config: &Config) -> anyhow::Result<DeadLetterQueue> {
        let (mut connection, deadline) = config.broker.connect("billing dead-letters")?;
        let name = config.dead_letter_queue();
        let (channel, count) = declare_queue(&mut connection, &deadline, &name)?;
        let count = count as usize;
        Ok(DeadLetterQueue { deadline, channel, count, name, _connection: connection })
    }

    fn next(&self) -> anyhow::Result<Option<Get>> {
        let get = || self.channel.basic_get(&*self.name, false);
        let got = self.deadline.with_deadline(CALL_TIMEOUT, get);
        got.context("the dead letters cannot be read")
    }

    fn list(&mut self, limit: usize) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        for position in 1..=self.count.min(limit) {
            let Some(Get { delivery, .. }) = self.next()? else { break };
            let entry = ListEntry {
                position,
                key: header(&delivery, ID_HEADER),
                message_id: delivery.properties.message_id().as_deref(),
                reason: &reason(&delivery),
                failed_at: header(&delivery, FAILED_AT_HEADER),
                body: &String::from_utf8_lossy(&delivery.body),
            };
            serde_json::to_writer(&mut out, &entry).map_err(io::Error::from)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    }

    /// Applies the action to the selected dead letters; returns how many there were.
    fn apply(&mut self, config: &Config, selector: &str, action: &Action) -> anyhow::Result<usize> {
        let mut publisher =
            Publisher::connect(&config.broker, "billing dead-letters", &config.queue)?;
        let has_new_body = matches!(action, Action::Requeue { body: Some(_), .. });
        let mut done = 0;
        let mut selected = Vec::new();
        let mut ids = HashSet::new();
        for position in 1..=self.count {
            let Some(Get { delivery, .. }) = self.next()? else { break };
            if !matches_selector(&delivery, position, selector) {
                continue;
            }
            let id = header(&delivery, ID_HEADER);
            // A second copy of a dead letter is acknowledged with the first.
            let is_copy = !id.is_empty() && !ids.insert(id.to_owned());
            selected.push((delivery, is_copy));
            // A new body is for one dead letter only, so all must be seen first.
            if selected.len() == REQUEUE_BATCH && !has_new_body {
                done += self.apply_to(&mut publisher, &config.queue, &mut selected, action)?;
            }
        }
        if has_new_body {
            let originals = selected.iter().filter(|(_, is_copy)| !is_copy).count();
            ensure!(originals < 2, "{originals} dead letters are selected: name one by its key");
        }
        done += self.apply_to(&mut publisher, &config.queue, &mut selected, action)?;
        Ok(done)
    }

    /// Acknowledges them only when the broker has confirmed what was requeued.
    fn apply_to(
        &self,
        publisher: &mut Publisher,
        queue: &str,
        selected: &mut Vec<(Delivery, bool)>,
        action: &Action,
    ) -> anyhow::Result<usize> {
        let originals =
            || selected.iter().filter(|(_, is_copy)| !is_copy).map(|(delivery, _)| delivery);
        let count = originals().count();
        if let Action::Requeue { body: replacement_body, new_id } = action {
            let message = |delivery| {
                let Delivery { body, properties, .. }: &Delivery = delivery;
                let body = replacement_body.map_or(body.as_slice(), str::as_bytes);
                let mut properties = without_reason(properties);
                if *new_id {
                    // The same id each time: a message that is requeued twice is one order.
                    let id = match header(delivery, ID_HEADER) {
                        "" => Uuid::now_v7().to_string(),
                        id => id.to_owned(),
                    };
                    properties = properties.with_message_id(id);
                }
                Message::to_queue(queue, body, properties)
            };
            publisher.publish_and_wait(originals().map(message).collect())?;
        }
        for (delivery, _) in selected.drain(..) {
            self.deadline.with_deadline(CALL_TIMEOUT, || delivery.ack(&self.channel))?;
        }
        // The answer proves that the broker has received the acknowledgements.
        self.deadline.with_deadline(CALL_TIMEOUT, || self.channel.qos(0, 0, false))?;
        Ok(count)
    }
}

fn matches_selector(delivery: &Delivery, position: usize, selector: &str) -> bool {
    selector == "all"
        || selector == header(delivery, ID_HEADER)
        || Some(selector) == delivery.properties.message_id().as_deref()
        || selector.strip_prefix('#').is_some_and(|number| number == position.to_string())
}
