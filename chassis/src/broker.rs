//! Connecting to RabbitMQ, with the deadlines that amiquip lacks.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{Auth, Connection, ConnectionOptions, ConnectionTuning};
use anyhow::Context;

use crate::env::{Env, Secret};

/// TCP connect and handshake together may take at most twice this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How often a [`SocketDeadline`] looks at its deadline.
const TICK: Duration = Duration::from_millis(100);

/// Where the broker is and who asks.
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
    /// A peer that is silent for two of these, in seconds, is given up.
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
    /// Both parts hang on one socket: when the deadline cuts it, every call that is
    /// stuck inside the connection returns with an error at once.
    pub fn connect(&self, name: &str) -> anyhow::Result<(Connection, SocketDeadline)> {
        let stream = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT)
            .with_context(|| format!("no connection to the broker at {}", self.address))?;
        // Without it the confirms of lone messages wait for the delayed-ack timer.
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
            let stream = mio::net::TcpStream::from_stream(stream)?;
            // Each message is handed over in three parts, and whoever does it waits when there is
            // no room: not after every fifth message.
            let tuning = ConnectionTuning::default().mem_channel_bound(512);
            Connection::insecure_open_stream(stream, options, tuning).with_context(|| {
                format!("no login as {} at the broker at {}", self.user, self.address)
            })
        })?;
        Ok((connection, deadline))
    }
}

/// Cuts a connection's socket when a call overstays its deadline.
pub struct SocketDeadline {
    shared: Arc<Shared>,
}

struct Shared {
    socket: TcpStream,
    started: Instant,
    /// Milliseconds after `started`; [`NO_DEADLINE`] while no call is under way, [`CLOSED`] at the end.
    deadline_ms: AtomicU64,
}

const NO_DEADLINE: u64 = u64::MAX;
const CLOSED: u64 = u64::MAX - 1;

impl SocketDeadline {
    fn new(socket: TcpStream) -> anyhow::Result<SocketDeadline> {
        let shared = Arc::new(Shared {
            socket,
            started: Instant::now(),
            deadline_ms: AtomicU64::new(NO_DEADLINE),
        });
        let watched = Arc::clone(&shared);
        thread::Builder::new().name("broker-deadline".into()).stack_size(64 << 10).spawn(
            move || {
                loop {
                    thread::sleep(TICK);
                    match watched.deadline_ms.load(Ordering::SeqCst) {
                        NO_DEADLINE => continue,
                        CLOSED => return,
                        deadline if watched.now_ms() < deadline => continue,
                        _ => {
                            log::warn!("the broker did not answer in time: connection cut");
                            let _ = watched.socket.shutdown(Shutdown::Both);
                            return;
                        }
                    }
                }
            },
        )?;
        Ok(SocketDeadline { shared })
    }

    /// Runs `call`; if it takes longer than `limit` the socket is cut under it.
    pub fn with_deadline<T>(&self, limit: Duration, call: impl FnOnce() -> T) -> T {
        let deadline = self.shared.now_ms() + limit.as_millis() as u64;
        self.shared.deadline_ms.store(deadline, Ordering::SeqCst);
        let result = call();
        self.shared.deadline_ms.store(NO_DEADLINE, Ordering::SeqCst);
        result
    }
}

impl Drop for SocketDeadline {
    fn drop(&mut self) {
        self.shared.deadline_ms.store(CLOSED, Ordering::SeqCst);
        // Whatever still sits on the connection shall not keep its owner waiting.
        let _ = self.shared.socket.shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}

/// Growing pauses between attempts, half of each by chance, so that many clients
/// of one server do not come back in step.
#[derive(Default)]
pub struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next pause: 100 ms at first, never more than 3 s.
    pub fn next_delay(&mut self) -> Duration {
        let full = (100u64 << self.attempts.min(5)).min(3000);
        self.attempts += 1;
        Duration::from_millis(full / 2 + fastrand::u64(0..=full / 2))
    }

    /// Something worked: start small again.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_three_seconds_and_begin_anew_after_a_success() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..8).map(|_| backoff.next_delay().as_millis()).collect();
        assert!((50..=100).contains(&pauses[0]), "{pauses:?}");
        assert!((1500..=3000).contains(&pauses[7]), "{pauses:?}");
        backoff.reset();
        assert!(backoff.next_delay().as_millis() <= 100);
    }

    #[test]
    fn a_broker_that_accepts_and_never_answers_is_given_up() {
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
