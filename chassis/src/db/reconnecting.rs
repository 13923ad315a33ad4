//! One connection with a service's statements, for a worker that waits until the database is back.

use anyhow::bail;

use super::{Config, is_stale_statement, is_transient};
use crate::backoff::RetryLog;
use crate::stop::Stop;

/// Opens a service's store: connects and prepares its statements.
pub type Open<S> = fn(&Config) -> Result<S, postgres::Error>;

/// A store that is opened when it is needed, and again after its connection was lost.
pub struct ReconnectingStore<S> {
    config: Config,
    stop: Stop,
    open: Open<S>,
    store: Option<S>,
    retry: RetryLog,
}

impl<S> ReconnectingStore<S> {
    /// Not connected yet.
    pub fn new(config: Config, stop: Stop, open: Open<S>) -> ReconnectingStore<S> {
        ReconnectingStore { config, stop, open, store: None, retry: RetryLog::default() }
    }

    /// Runs `work`, again on a new connection as long as the server is the cause of the failure: it
    /// is away or in trouble, or the tables are missing or have changed. The second argument of
    /// `work` is whether it runs again: then it is unknown whether the first run took effect.
    /// `work` calls [`super::renew_deadline`] between its statements.
    ///
    /// An error is one of PostgreSQL's for which `is_data_error` is true, or not one of
    /// PostgreSQL's, or the stop.
    pub fn retry_until_available<T>(
        &mut self,
        is_data_error: fn(&postgres::Error) -> bool,
        mut work: impl FnMut(&mut S, bool) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let mut again = false;
        loop {
            let result = self
                .store()
                .and_then(|(config, store)| config.with_deadline(|| work(store, again)));
            let err = match result {
                Ok(done) => {
                    if self.retry.succeeded() {
                        log::info!("the database works again");
                    }
                    return Ok(done);
                }
                Err(err) => err,
            };
            let pause = match err.downcast_ref::<postgres::Error>() {
                Some(cause) if !is_data_error(cause) => {
                    // An operator must act where waiting does not help.
                    let will_pass = is_transient(cause) || is_stale_statement(cause);
                    let level = if will_pass { log::Level::Warn } else { log::Level::Error };
                    self.retry.failed(level, "waiting for the database", &error_summary(cause))
                }
                _ => return Err(err),
            };
            self.store = None;
            again = true;
            if self.stop.sleep(pause) {
                bail!("stopped while waiting for the database");
            }
        }
    }

    /// Runs `work` once, if there is a connection. A failure is only logged.
    pub fn best_effort(&mut self, work: impl FnOnce(&mut S) -> Result<(), postgres::Error>) {
        if let Some(store) = &mut self.store
            && let Err(err) = self.config.with_deadline(|| work(store))
        {
            log::debug!("not done: {}", error_summary(&err));
            self.store = None;
        }
    }

    fn store(&mut self) -> anyhow::Result<(&Config, &mut S)> {
        let store = match &mut self.store {
            Some(store) => store,
            none => none.insert((self.open)(&self.config)?),
        };
        Ok((&self.config, store))
    }
}

/// What PostgreSQL says, without the detail, which would show the row.
pub fn error_summary(err: &postgres::Error) -> String {
    match err.as_db_error() {
        Some(err) => format!("{} (SQLSTATE {})", err.message(), err.code().code()),
        None => err.to_string(),
    }
}
