//! Connecting to RabbitMQ, with the deadlines that amiquip lacks.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use amiquip::{Auth, Connection, ConnectionOptions, ConnectionTuning};
use anyhow::Context;

use crate::env::{Env, Secret};

mod deadline;
mod frames;
mod publisher;
mod queue;

pub use deadline::SocketDeadline;
use frames::FrameStream;
pub use publisher::{Message, Publisher};
pub use queue::{declare_queue, permanent_reason};

/// How long the broker may take to answer one call, or to confirm anything.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the TCP connect may take, and the login after it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Where the broker is, and the login.
#[derive(Clone, Debug)]
pub struct Config {
    /// Server address.
    pub address: SocketAddr,
    /// Virtual host, undecoded: `/` is `/`.
    pub vhost: String,
    /// Login.
    pub user: String,
    /// Its password.
    pub password: Secret,
    /// Seconds between heartbeats. A broker that is silent for two of them is considered dead.
    pub heartbeat_s: u16,
}

impl Config {
    /// Reads `RABBITMQ_HOST`, `_PORT`, `_VHOST`, `_HEARTBEAT_S` and, for the login,
    /// `<PREFIX>_RABBITMQ_USER` and `_PASSWORD`.
    pub fn from_env(env: &mut Env, prefix: &str) -> Config {
        Config {
            address: env.host_port("RABBITMQ_HOST", "RABBITMQ_PORT"),
            vhost: env.required("RABBITMQ_VHOST"),
            user: env.required(&format!("{prefix}_RABBITMQ_USER")),
            password: env.secret(&format!("{prefix}_RABBITMQ_PASSWORD")),
            heartbeat_s: env.number("RABBITMQ_HEARTBEAT_S", 10, 1..=600),
        }
    }

    /// Opens a connection; `name` is how the management page lists it.
    ///
    /// Connection and deadline share one socket: when the deadline closes it, every call that
    /// hangs inside the connection returns with an error at once.
    pub fn connect(&self, name: &str) -> anyhow::Result<(Connection, SocketDeadline)> {
        let stream = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT)
            .with_context(|| format!("no connection to the broker at {}", self.address))?;
        // Without TCP_NODELAY the confirm of a single message waits for the delayed-ACK timer.
        stream.set_nodelay(true)?;
        socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(CONNECT_TIMEOUT * 2))?;
        let deadline = SocketDeadline::new(stream.try_clone()?)?;
        let options = ConnectionOptions::default()
            .auth(Auth::Plain {
                username: self.user.clone(),
                password: self.password.expose().to_owned(),
            })
            .virtual_host(&self.vhost)
            .heartbeat(self.heartbeat_s)
            .connection_timeout(Some(CONNECT_TIMEOUT))
            .information(Some(name.to_owned()));
        let connection = deadline.with_deadline(CONNECT_TIMEOUT, || {
            let stream = FrameStream::new(mio::net::TcpStream::from_stream(stream)?);
            // A message is handed to the connection's thread in three parts, and the caller waits
            // when the channel is full. With the default of 16 that is after every fifth message.
            let tuning = ConnectionTuning::default().mem_channel_bound(512);
            Connection::insecure_open_stream(stream, options, tuning).with_context(|| {
                format!("no login as {} at the broker at {}", self.user, self.address)
            })
        })?;
        Ok((connection, deadline))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn connecting_fails_when_the_broker_accepts_and_never_answers() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let mut env = Env::from_fn(move |name| {
            Some(match name {
                "RABBITMQ_HOST" => "127.0.0.1".to_owned(),
                "RABBITMQ_PORT" => address.port().to_string(),
                "RABBITMQ_HEARTBEAT_S" => "1".to_owned(),
                _ => "x".to_owned(),
            })
        });
        let config = Config::from_env(&mut env, "TEST");
        let started = Instant::now();
        assert!(config.connect("test").is_err());
        assert!(started.elapsed() < CONNECT_TIMEOUT * 3);
    }
}
