//! Publishing with confirms, for the few messages that this service sends.
//!
//! On a connection of its own: a broker short of memory stops reading from
//! connections that publish, and acknowledgements must get through.

use std::time::{Duration, Instant};

use amiquip::{
    AmqpProperties, Channel, Confirm, ConfirmSmoother, Connection, Publish, QueueDeclareOptions,
    Return,
};
use anyhow::{bail, ensure};
use chassis::broker::{self, SocketDeadline};
use crossbeam_channel::Receiver;

/// How long the broker may take for one answer, or confirm nothing.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// A message to be sent to a queue by its name.
pub struct Letter<'a> {
    /// Content.
    pub body: &'a [u8],
    /// Properties.
    pub properties: AmqpProperties,
}

/// A confirmed channel. After an error it is of no more use.
pub struct Publisher {
    // First, so that it is dropped first and the rest does not hang on a dead socket.
    leash: SocketDeadline,
    channel: Channel,
    confirms: Receiver<Confirm>,
    returns: Receiver<Return>,
    smoother: ConfirmSmoother,
    queue: String,
    /// Sent, and not confirmed yet.
    under_way: usize,
    /// When the broker last confirmed something, or had nothing to confirm.
    heard: Instant,
    _connection: Connection,
}

impl Publisher {
    /// Connects and declares the queue.
    pub fn connect(config: &broker::Config, queue: &str) -> anyhow::Result<Publisher> {
        let (mut connection, leash) = config.connect("billing publisher")?;
        let (channel, confirms, returns) = leash.with_deadline(CALL_TIMEOUT, || {
            let channel = connection.open_channel(None)?;
            channel.queue_declare(queue, durable())?;
            let confirms = channel.listen_for_publisher_confirms()?;
            let returns = channel.listen_for_returns()?;
            channel.enable_publisher_confirms()?;
            anyhow::Ok((channel, confirms, returns))
        })?;
        Ok(Publisher {
            leash,
            channel,
            confirms,
            returns,
            smoother: ConfirmSmoother::new(),
            queue: queue.to_owned(),
            under_way: 0,
            heard: Instant::now(),
            _connection: connection,
        })
    }

    /// Sends them all; `Ok` when the broker holds every one. After an error
    /// nobody knows which of them it holds.
    pub fn send(&mut self, letters: Vec<Letter>) -> anyhow::Result<()> {
        self.start(letters)?;
        while self.under_way > 0 {
            self.confirmed(CALL_TIMEOUT)?;
        }
        Ok(())
    }

    /// How many are sent and not confirmed yet.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// Sends them and does not wait.
    pub fn start(&mut self, letters: Vec<Letter>) -> anyhow::Result<()> {
        if self.under_way == 0 {
            self.heard = Instant::now();
        }
        self.under_way += letters.len();
        self.leash.with_deadline(CALL_TIMEOUT, || {
            for Letter { body, properties } in letters {
                let routing_key = self.queue.clone();
                let letter =
                    Publish { body, routing_key, mandatory: true, immediate: false, properties };
                self.channel.basic_publish("", letter)?;
            }
            Ok(())
        })
    }

    /// How many more of those under way the broker holds, in the order in which they were
    /// sent; waits for the first at most so long. As an error: it takes one not, or none
    /// for too long.
    pub fn confirmed(&mut self, mut wait: Duration) -> anyhow::Result<usize> {
        let before = self.under_way;
        while self.under_way > 0 {
            let confirm = match self.confirms.recv_timeout(wait) {
                Ok(confirm) => confirm,
                Err(err) if err.is_timeout() => break,
                Err(_) => bail!("the connection to the broker broke"),
            };
            for confirm in self.smoother.process(confirm) {
                ensure!(matches!(confirm, Confirm::Ack(_)), "{} took no message", self.queue);
                self.under_way -= 1;
            }
            wait = Duration::ZERO;
        }
        // A message without a queue is returned first and confirmed nevertheless.
        if self.returns.try_recv().is_ok() {
            bail!("{} is gone", self.queue);
        }
        if self.under_way < before {
            self.heard = Instant::now();
        }
        let overdue = self.under_way > 0 && self.heard.elapsed() >= CALL_TIMEOUT;
        ensure!(!overdue, "the broker confirms nothing");
        Ok(before - self.under_way)
    }
}

/// How every queue of ours is declared: plain and durable, no arguments.
pub fn durable() -> QueueDeclareOptions {
    QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() }
}
