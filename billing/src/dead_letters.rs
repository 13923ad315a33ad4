//! The dead letters: messages that cannot become orders, each with its reason,
//! and the command that shows them and puts them back.

use std::collections::HashSet;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use amiquip::{AmqpProperties, AmqpValue, Channel, Connection, Delivery, FieldTable, Get};
use anyhow::{Context, ensure};
use chassis::broker::{self, Backoff, SocketDeadline};
use chassis::env::Env;
use serde::Serialize;
use uuid::Uuid;

use crate::config::Config;
use crate::order::Order;
use crate::publish::{CALL_TIMEOUT, Letter, Publisher, durable};

/// What names one dead letter among those with the same message id, or none.
const KEY: &str = "x-dead-letter-id";
const REASON: &str = "x-reason";
const FAILED_AT: &str = "x-failed-at";

/// Headers by which the broker would send copies to further queues.
const ROUTING: [&str; 2] = ["CC", "BCC"];

/// How many messages are held unacknowledged while some are put back.
const CHUNK: usize = 100;

/// A message on its way to the dead letters.
pub struct Dead<'a> {
    /// The message.
    pub delivery: &'a Delivery,
    /// Why it cannot become an order.
    pub reason: &'a str,
    /// Its name there. After a try that failed there may be two copies of one name.
    pub key: Uuid,
}

/// Writes dead letters, connecting when there is one.
pub struct Grave {
    config: broker::Config,
    queue: String,
    publisher: Option<Publisher>,
    backoff: Backoff,
    due: Option<Instant>,
}

impl Grave {
    /// Not connected yet.
    pub fn new(config: broker::Config, queue: String) -> Grave {
        Grave { config, queue, publisher: None, backoff: Backoff::default(), due: None }
    }

    /// How many are sent of which the broker has not said that it holds a copy.
    pub fn under_way(&self) -> usize {
        self.publisher.as_ref().map_or(0, Publisher::under_way)
    }

    /// Sends copies with their reasons, or none: after a failure it takes a growing pause.
    pub fn send<'a>(&mut self, dead: impl Iterator<Item = Dead<'a>>) {
        if self.due.is_some_and(|due| Instant::now() < due) {
            return;
        }
        let letters = dead.map(|dead| Letter {
            body: &dead.delivery.body,
            properties: with_reason(&dead.delivery.properties, dead.reason, dead.key),
        });
        let letters: Vec<Letter> = letters.collect();
        if letters.is_empty() {
            return;
        }
        if let Err(err) = self.publisher().and_then(|publisher| publisher.start(letters)) {
            self.failed(&err);
        }
    }

    /// How many more of those under way the broker holds, the oldest first; waits for the
    /// first at most so long. After a failure none is under way any more: they are to be
    /// sent again.
    pub fn buried(&mut self, wait: Duration) -> usize {
        let Some(publisher) = self.publisher.as_mut().filter(|one| one.under_way() > 0) else {
            return 0;
        };
        match publisher.confirmed(wait) {
            Ok(count) => {
                if count > 0 {
                    self.backoff.reset();
                    self.due = None;
                }
                count
            }
            Err(err) => {
                self.failed(&err);
                0
            }
        }
    }

    fn publisher(&mut self) -> anyhow::Result<&mut Publisher> {
        match &mut self.publisher {
            Some(publisher) => Ok(publisher),
            none => Ok(none.insert(Publisher::connect(&self.config, &self.queue)?)),
        }
    }

    fn failed(&mut self, err: &anyhow::Error) {
        let level = if self.due.is_none() { log::Level::Warn } else { log::Level::Debug };
        log::log!(level, "dead letters wait until they can be written: {err:#}");
        self.publisher = None;
        self.due = Some(Instant::now() + self.backoff.next_delay());
    }
}

fn with_reason(original: &AmqpProperties, reason: &str, key: Uuid) -> AmqpProperties {
    let mut headers = headers(original);
    let failed_at = httpdate::fmt_http_date(SystemTime::now());
    headers.insert(KEY.into(), AmqpValue::LongString(key.to_string()));
    headers.insert(REASON.into(), AmqpValue::LongString(reason.into()));
    headers.insert(FAILED_AT.into(), AmqpValue::LongString(failed_at));
    copy(original).with_headers(headers)
}

fn without_reason(original: &AmqpProperties) -> AmqpProperties {
    let mut headers = headers(original);
    for name in [KEY, REASON, FAILED_AT] {
        headers.remove(name);
    }
    copy(original).with_headers(headers)
}

fn headers(original: &AmqpProperties) -> FieldTable {
    let mut headers = original.headers().clone().unwrap_or_default();
    for name in ROUTING {
        headers.remove(name);
    }
    headers
}

/// All properties but the headers, and persistent. Not copied: the expiration,
/// which would delete the letter, and the AMQP user, which only the original
/// sender may name.
fn copy(original: &AmqpProperties) -> AmqpProperties {
    const PERSISTENT: u8 = 2;
    let mut copy = AmqpProperties::default().with_delivery_mode(PERSISTENT);
    macro_rules! keep {
        ($($get:ident $with:ident),*) => {
            $(if let Some(value) = original.$get() {
                copy = copy.$with(value.clone());
            })*
        };
    }
    keep!(
        content_type with_content_type, content_encoding with_content_encoding,
        priority with_priority, correlation_id with_correlation_id, reply_to with_reply_to,
        message_id with_message_id, timestamp with_timestamp, type_ with_type_,
        app_id with_app_id
    );
    copy
}

const USAGE: &str = "\
The dead letters: messages that could not become orders, each with its reason.

  billing dead-letters list [--limit N]
      one line of JSON each, oldest first, at most N (100); changes nothing
  billing dead-letters put-back WHICH [--body JSON] [--new-id]
      sends them to RABBITMQ_QUEUE again, with the same message id;
      --body: with this content instead, for a single one;
      --new-id: with the key as their message id, where the old one is at fault
  billing dead-letters drop WHICH
      deletes them

WHICH is a key or a message id as the list shows it, #N for a position in the
list, or all. Works while billing runs. Exit code 1: it failed, or there is no
such letter; 2: the command was not understood.
";

/// `billing dead-letters …`
pub fn command(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (action, limit) = match arguments.as_slice() {
        ["list"] => (None, 100),
        ["list", "--limit", limit] => match limit.parse() {
            Ok(limit) => (None, limit),
            Err(_) => return Ok(misunderstood("--limit takes a number")),
        },
        ["put-back", rest @ ..] => {
            let Some((which, body, new_id)) = put_back(rest) else {
                return Ok(misunderstood("which letter?"));
            };
            if let Some(Err(refused)) = body.map(|body| Order::parse(body.as_bytes())) {
                eprintln!("with this body it would come back at once: {refused}");
                return Ok(ExitCode::FAILURE);
            }
            (Some((which, Fate::PutBack { body, new_id })), 0)
        }
        ["drop", which] => (Some((*which, Fate::Drop)), 0),
        ["-h" | "--help" | "help"] => {
            print!("{USAGE}");
            return Ok(ExitCode::SUCCESS);
        }
        _ => return Ok(misunderstood("what shall be done?")),
    };
    if let Some(("", _)) = action {
        return Ok(misunderstood("which letter?"));
    }
    let config = Config::from_env(Env::load())?;
    let mut queue = DeadQueue::open(&config)?;
    let Some((which, fate)) = action else {
        return match queue.list(limit) {
            // `list | head` is no failure.
            Err(err) if is_broken_pipe(&err) => Ok(ExitCode::SUCCESS),
            listed => listed.map(|()| ExitCode::SUCCESS),
        };
    };
    let done = queue.settle(&config, which, &fate)?;
    let verb = if matches!(fate, Fate::Drop) { "deleted" } else { "put back" };
    if done == 0 && which != "all" {
        eprintln!("there is no dead letter {which}; billing dead-letters list shows them");
        return Ok(ExitCode::FAILURE);
    }
    println!("{done} {verb}");
    Ok(ExitCode::SUCCESS)
}

/// Which, with what body, and whether under another id.
fn put_back<'a>(arguments: &[&'a str]) -> Option<(&'a str, Option<&'a str>, bool)> {
    let (mut which, mut body, mut new_id) = (None, None, false);
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match *argument {
            "--body" if body.is_none() => body = Some(*arguments.next()?),
            "--new-id" => new_id = true,
            name if which.is_none() => which = Some(name),
            _ => return None,
        }
    }
    Some((which?, body, new_id))
}

fn misunderstood(what: &str) -> ExitCode {
    eprint!("{what}\n\n{USAGE}");
    ExitCode::from(2)
}

fn is_broken_pipe(err: &anyhow::Error) -> bool {
    err.downcast_ref::<io::Error>().is_some_and(|err| err.kind() == io::ErrorKind::BrokenPipe)
}

enum Fate<'a> {
    PutBack { body: Option<&'a str>, new_id: bool },
    Drop,
}

/// One line of the list.
#[derive(Serialize)]
struct Line<'a> {
    position: usize,
    key: &'a str,
    message_id: Option<&'a str>,
    reason: &'a str,
    failed_at: &'a str,
    body: &'a str,
}

/// The queue of dead letters as seen by the command: what it gets and does not
/// acknowledge is back in its place when the connection ends.
struct DeadQueue {
    leash: SocketDeadline,
    channel: Channel,
    name: String,
    /// Messages that were there at the begin; later ones are not ours.
    count: usize,
    _connection: Connection,
}

impl DeadQueue {
    fn open(config: &Config) -> anyhow::Result<DeadQueue> {
        let (mut connection, leash) = config.broker.connect("billing dead-letters")?;
        let name = config.dead_queue();
        let (channel, count) = leash.with_deadline(CALL_TIMEOUT, || {
            let channel = connection.open_channel(None)?;
            let declared = channel.queue_declare(name.as_str(), durable())?;
            let count = declared.declared_message_count().unwrap_or_default() as usize;
            anyhow::Ok((channel, count))
        })?;
        Ok(DeadQueue { leash, channel, name, count, _connection: connection })
    }

    fn next(&self) -> anyhow::Result<Option<Get>> {
        let got =
            self.leash.with_deadline(CALL_TIMEOUT, || self.channel.basic_get(&*self.name, false));
        got.context("the dead letters cannot be read")
    }

    fn list(&mut self, limit: usize) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        for position in 1..=self.count.min(limit) {
            let Some(Get { delivery, .. }) = self.next()? else { break };
            let line = Line {
                position,
                key: header(&delivery, KEY),
                message_id: delivery.properties.message_id().as_deref(),
                reason: header(&delivery, REASON),
                failed_at: header(&delivery, FAILED_AT),
                body: &String::from_utf8_lossy(&delivery.body),
            };
            serde_json::to_writer(&mut out, &line).map_err(io::Error::from)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    }

    /// Finds those meant and deals with them; returns how many.
    fn settle(&mut self, config: &Config, which: &str, fate: &Fate) -> anyhow::Result<usize> {
        let mut publisher = Publisher::connect(&config.broker, &config.queue)?;
        let mended = matches!(fate, Fate::PutBack { body: Some(_), .. });
        let mut done = 0;
        let mut found = Vec::new();
        let mut keys = HashSet::new();
        for position in 1..=self.count {
            let Some(Get { delivery, .. }) = self.next()? else { break };
            if !is_meant(&delivery, position, which) {
                continue;
            }
            let key = header(&delivery, KEY);
            // A second copy of a letter is dealt with by the first.
            let copy = !key.is_empty() && !keys.insert(key.to_owned());
            found.push((delivery, copy));
            // With a new body there may be one only, so all must be seen first.
            if found.len() == CHUNK && !mended {
                self.deal(&mut publisher, &mut found, fate, &mut done)?;
            }
        }
        if mended {
            let meant = found.iter().filter(|(_, copy)| !copy).count();
            ensure!(meant < 2, "{meant} letters are meant: name one by its key");
        }
        self.deal(&mut publisher, &mut found, fate, &mut done)?;
        Ok(done)
    }

    /// Acknowledges them only when the broker holds what was put back.
    fn deal(
        &self,
        publisher: &mut Publisher,
        found: &mut Vec<(Delivery, bool)>,
        fate: &Fate,
        done: &mut usize,
    ) -> anyhow::Result<()> {
        let originals = || found.iter().filter(|(_, copy)| !copy).map(|(delivery, _)| delivery);
        *done += originals().count();
        if let Fate::PutBack { body: mended, new_id } = fate {
            let letter = |delivery| {
                let Delivery { body, properties, .. }: &Delivery = delivery;
                let body = mended.map_or(body.as_slice(), str::as_bytes);
                let mut properties = without_reason(properties);
                if *new_id {
                    // The same each time: what is put back twice is still one order.
                    let key = match header(delivery, KEY) {
                        "" => Uuid::now_v7().to_string(),
                        key => key.to_owned(),
                    };
                    properties = properties.with_message_id(key);
                }
                Letter { body, properties }
            };
            publisher.send(originals().map(letter).collect())?;
        }
        for (delivery, _) in found.drain(..) {
            self.leash.with_deadline(CALL_TIMEOUT, || delivery.ack(&self.channel))?;
        }
        // Its answer proves that the broker has seen the acknowledgements.
        self.leash.with_deadline(CALL_TIMEOUT, || self.channel.qos(0, 0, false))?;
        Ok(())
    }
}

fn is_meant(delivery: &Delivery, position: usize, which: &str) -> bool {
    which == "all"
        || which == header(delivery, KEY)
        || Some(which) == delivery.properties.message_id().as_deref()
        || which.strip_prefix('#').is_some_and(|number| number == position.to_string())
}

fn header<'a>(delivery: &'a Delivery, name: &str) -> &'a str {
    match delivery.properties.headers().as_ref().and_then(|headers| headers.get(name)) {
        Some(AmqpValue::LongString(text)) => text,
        _ => "",
    }
}
