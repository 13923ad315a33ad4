//! A thread that works alone: of all instances of the service one holds an advisory lock of the
//! database and does the work, the others wait for the lock.

use std::time::Duration;

use chassis::backoff::RetryLog;
use chassis::db::{self, error_summary};
use chassis::{Problem, Stop};
use log::Level;
use postgres::{Client, Error};

use crate::waker::Waker;

/// How often work is looked for that another instance has written, and how often the lock is tried.
const INTERVAL: Duration = Duration::from_secs(1);

/// The locks, by numbers that no other program uses in this database.
#[derive(Clone, Copy)]
pub enum Lock {
    /// Publishing the outbox.
    Relay = 0x6f72_6401,
    /// Sending stock commands.
    StockSender = 0x6f72_6402,
}

/// The connection that holds the lock.
pub struct Session<'s> {
    config: &'s db::Config,
    client: Client,
}

impl Session<'_> {
    /// Runs one statement, under the deadline of the database.
    pub fn statement<T>(
        &mut self,
        run: impl FnOnce(&mut Client) -> Result<T, Error>,
    ) -> anyhow::Result<T> {
        let client = &mut self.client;
        Ok(self.config.with_deadline(|| run(client))?)
    }
}

/// Opens a session and takes its lock; `None` where another session holds it.
pub fn open(config: &db::Config, lock: Lock) -> anyhow::Result<Option<Session<'_>>> {
    let mut session = connect(config)?;
    Ok(try_lock(&mut session, lock)?.then_some(session))
}

/// What these threads write need not be on the disk at once: work that is not marked as done because of
/// a crash of PostgreSQL is done again, which is harmless.
fn connect(config: &db::Config) -> anyhow::Result<Session<'_>> {
    let mut session = Session { config, client: config.connect()? };
    session.statement(|client| client.batch_execute("set synchronous_commit = off"))?;
    Ok(session)
}

fn try_lock(session: &mut Session<'_>, lock: Lock) -> anyhow::Result<bool> {
    let query = "select pg_try_advisory_lock($1)";
    session.statement(|client| client.query_one(query, &[&(lock as i64)])?.try_get(0))
}

/// Runs `work` again and again while this process holds the lock, until `stop`. `work` says whether
/// there may be more to do; if not, the thread waits for `waker`, a second at most. After an error the
/// connection is replaced, and the lock with it, after a growing pause; `what` is its line in the log.
pub fn run(
    config: &db::Config,
    lock: Lock,
    waker: &Waker,
    stop: &Stop,
    what: &str,
    mut work: impl FnMut(&mut Session<'_>) -> anyhow::Result<bool>,
) {
    let mut session: Option<(Session<'_>, bool)> = None;
    let mut log = RetryLog::default();
    while !stop.is_requested() {
        match step(config, lock, &mut session, &mut work) {
            Ok(more) => {
                if log.succeeded() {
                    log::info!("{what}: it works again");
                }
                if !more {
                    waker.wait(INTERVAL);
                }
            }
            Err(err) => {
                session = None;
                let pause = log.failed(Level::Warn, what, &reason(&err));
                stop.sleep(pause);
            }
        }
    }
}

fn step<'s>(
    config: &'s db::Config,
    lock: Lock,
    session: &mut Option<(Session<'s>, bool)>,
    work: &mut impl FnMut(&mut Session<'_>) -> anyhow::Result<bool>,
) -> anyhow::Result<bool> {
    let (session, is_locked) = match session {
        Some(open) => open,
        none => none.insert((connect(config)?, false)),
    };
    if !*is_locked {
        *is_locked = try_lock(session, lock)?;
    }
    if *is_locked { work(session) } else { Ok(false) }
}

/// Why the work failed, without the values of a row.
fn reason(err: &anyhow::Error) -> String {
    if let Some(err) = err.downcast_ref::<Error>() {
        return error_summary(err);
    }
    format!("{err:#}")
}

/// A problem as an error of a thread.
pub fn problem_error(problem: Problem) -> anyhow::Error {
    anyhow::anyhow!("{problem}")
}
