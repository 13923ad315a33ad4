//! Publishing with confirms, for services that send few messages.
//!
//! On a connection of its own: a broker that is short of memory stops reading from connections
//! that publish, and a consumer's acknowledgements must get through.

use std::time::{Duration, Instant};

use amiquip::{
    AmqpProperties, Channel, Confirm, ConfirmSmoother, Connection, ExchangeDeclareOptions,
    ExchangeType, Publish, Return,
};
use anyhow::{bail, ensure};
use crossbeam_channel::Receiver;

use super::{CALL_TIMEOUT, Config, SocketDeadline, declare_queue};

/// A message for an exchange.
pub struct Message<'a> {
    /// The exchange; an empty name is the default exchange.
    pub exchange: &'a str,
    /// The routing key; at the default exchange the name of a queue.
    pub routing_key: &'a str,
    /// Whether a queue must take it. A message for which there is none makes publishing fail.
    pub mandatory: bool,
    /// Content.
    pub body: &'a [u8],
    /// Properties.
    pub properties: AmqpProperties,
}

impl<'a> Message<'a> {
    /// A message for a queue, which must be there.
    pub fn to_queue(queue: &'a str, body: &'a [u8], properties: AmqpProperties) -> Message<'a> {
        Message { exchange: "", routing_key: queue, mandatory: true, body, properties }
    }
}

/// A channel in confirm mode. After an error it must be replaced.
pub struct Publisher {
    // First, so that it is dropped first and closing the channel does not wait for a dead socket.
    deadline: SocketDeadline,
    channel: Channel,
    confirms: Receiver<Confirm>,
    returns: Receiver<Return>,
    smoother: ConfirmSmoother,
    queue: String,
    in_flight: usize,
    /// When the broker last confirmed a message, or had none to confirm.
    last_confirm_at: Instant,
    _connection: Connection,
}

impl Publisher {
    /// Connects and declares the queue; `name` is how the management page lists the connection.
    pub fn connect(config: &Config, name: &str, queue: &str) -> anyhow::Result<Publisher> {
        let (mut connection, deadline) = config.connect(name)?;
        let (channel, _) = declare_queue(&mut connection, &deadline, queue)?;
        let (confirms, returns) = deadline.with_deadline(CALL_TIMEOUT, || {
            let confirms = channel.listen_for_publisher_confirms()?;
            let returns = channel.listen_for_returns()?;
            channel.enable_publisher_confirms()?;
            anyhow::Ok((confirms, returns))
        })?;
        Ok(Publisher {
            deadline,
            channel,
            confirms,
            returns,
            smoother: ConfirmSmoother::new(),
            queue: queue.to_owned(),
            in_flight: 0,
            last_confirm_at: Instant::now(),
            _connection: connection,
        })
    }

    /// Publishes all messages; `Ok` when the broker has confirmed every one. After an error it is
    /// unknown which of them the broker has.
    pub fn publish_and_wait(&mut self, messages: Vec<Message>) -> anyhow::Result<()> {
        self.publish(messages)?;
        while self.in_flight > 0 {
            self.collect_confirms(CALL_TIMEOUT)?;
        }
        Ok(())
    }

    /// Declares a durable topic exchange, so that there is one to publish to.
    pub fn declare_topic_exchange(&self, name: &str) -> anyhow::Result<()> {
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        self.deadline.with_deadline(CALL_TIMEOUT, || {
            self.channel.exchange_declare(ExchangeType::Topic, name, durable)?;
            Ok(())
        })
    }

    /// How many messages are published and not confirmed yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Publishes the messages and does not wait for their confirms.
    pub fn publish(&mut self, messages: Vec<Message>) -> anyhow::Result<()> {
        if self.in_flight == 0 {
            self.last_confirm_at = Instant::now();
        }
        self.in_flight += messages.len();
        self.deadline.with_deadline(CALL_TIMEOUT, || {
            for Message { exchange, routing_key, mandatory, body, properties } in messages {
                let routing_key = routing_key.to_owned();
                let publish =
                    Publish { body, routing_key, mandatory, immediate: false, properties };
                self.channel.basic_publish(exchange, publish)?;
            }
            Ok(())
        })
    }

    /// How many more messages the broker has confirmed, in the order in which they were published;
    /// waits at most `wait` for the first. Fails when the broker rejects one, or confirms none for
    /// [`CALL_TIMEOUT`].
    pub fn collect_confirms(&mut self, mut wait: Duration) -> anyhow::Result<usize> {
        let before = self.in_flight;
        while self.in_flight > 0 {
            let confirm = match self.confirms.recv_timeout(wait) {
                Ok(confirm) => confirm,
                Err(err) if err.is_timeout() => break,
                Err(_) => bail!("the connection to the broker broke"),
            };
            for confirm in self.smoother.process(confirm) {
                ensure!(matches!(confirm, Confirm::Ack(_)), "the broker rejected a message");
                self.in_flight -= 1;
            }
            wait = Duration::ZERO;
        }
        // A message without a queue is returned first and then confirmed all the same.
        if self.returns.try_recv().is_ok() {
            bail!("{} is gone", self.queue);
        }
        if self.in_flight < before {
            self.last_confirm_at = Instant::now();
        }
        let overdue = self.in_flight > 0 && self.last_confirm_at.elapsed() >= CALL_TIMEOUT;
        ensure!(!overdue, "the broker confirms nothing");
        Ok(before - self.in_flight)
    }
}
