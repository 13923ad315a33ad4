//! Publishing with confirms, for the few messages that this service sends.
//!
//! On a connection of its own: a broker short of memory stops reading from
//! connections that publish, and acknowledgements must get through.

use std::time::Duration;

use amiquip::{
    AmqpProperties, Channel, Confirm, ConfirmSmoother, Connection, Publish, QueueDeclareOptions,
    Return,
};
use anyhow::{bail, ensure};
use chassis::broker::{self, Leash};
use crossbeam_channel::Receiver;

/// How long the broker may take for one answer, or for the confirms of one [`Publisher::send`].
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
    leash: Leash,
    channel: Channel,
    confirms: Receiver<Confirm>,
    returns: Receiver<Return>,
    smoother: ConfirmSmoother,
    queue: String,
    _connection: Connection,
}

impl Publisher {
    /// Connects and declares the queue.
    pub fn connect(config: &broker::Config, queue: &str) -> anyhow::Result<Publisher> {
        let (mut connection, leash) = config.connect("billing publisher")?;
        let (channel, confirms, returns) = leash.within(CALL_TIMEOUT, || {
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
            _connection: connection,
        })
    }

    /// Sends them all; `Ok` when the broker holds every one. After an error
    /// nobody knows which of them it holds.
    pub fn send(&mut self, letters: Vec<Letter>) -> anyhow::Result<()> {
        let Publisher { leash, channel, confirms, returns, smoother, queue, .. } = self;
        leash.within(CALL_TIMEOUT, || {
            let mut outstanding = letters.len();
            for Letter { body, properties } in letters {
                let routing_key = queue.clone();
                let letter =
                    Publish { body, routing_key, mandatory: true, immediate: false, properties };
                channel.basic_publish("", letter)?;
            }
            while outstanding > 0 {
                let confirm = confirms.recv()?;
                for confirm in smoother.process(confirm) {
                    ensure!(matches!(confirm, Confirm::Ack(_)), "{queue} took no message");
                    outstanding -= 1;
                }
            }
            // A message without a queue is returned first and confirmed nevertheless.
            if returns.try_recv().is_ok() {
                bail!("{queue} is gone");
            }
            Ok(())
        })
    }
}

/// How every queue of ours is declared: plain and durable, no arguments.
pub fn durable() -> QueueDeclareOptions {
    QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() }
}
