//! The store, with the patience to wait for a database that is away.

use anyhow::bail;
use chassis::broker::Backoff;
use chassis::{Stop, db};

use crate::store::{self, Store};

/// One connection, opened when it is needed.
pub struct Books {
    config: db::Config,
    stop: Stop,
    store: Option<Store>,
    /// Why it waits, as the log was told; empty while the database works.
    waiting: String,
}

impl Books {
    /// Not connected yet.
    pub fn new(config: db::Config, stop: Stop) -> Books {
        Books { config, stop, store: None, waiting: String::new() }
    }

    /// Does the work, and does it again on a new connection as long as the server
    /// is to blame: it is away, or in trouble, or the tables are not there yet.
    /// `work` is told whether it runs again; then nobody knows whether the first
    /// time took effect.
    ///
    /// An error is either PostgreSQL's and the data's fault, see
    /// [`store::is_data_error`], or no error of PostgreSQL's at all.
    pub fn patiently<T>(
        &mut self,
        mut work: impl FnMut(&mut Store, bool) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let mut backoff = Backoff::default();
        let mut again = false;
        loop {
            let err =
                match self.open().and_then(|(db, store)| db.with_deadline(|| work(store, again))) {
                    Ok(done) => {
                        if !self.waiting.is_empty() {
                            log::info!("the database works again");
                            self.waiting.clear();
                        }
                        return Ok(done);
                    }
                    Err(err) => err,
                };
            match err.downcast_ref::<postgres::Error>() {
                Some(cause) if !store::is_data_error(cause) => {
                    let reason = store::reason(cause);
                    // One line a reason, not one an attempt.
                    if self.waiting != reason {
                        // What no waiting mends, somebody has to.
                        let level = match db::is_transient(cause) {
                            true => log::Level::Warn,
                            false => log::Level::Error,
                        };
                        log::log!(level, "waiting for the database: {reason}");
                        self.waiting = reason;
                    }
                }
                _ => return Err(err),
            }
            self.store = None;
            again = true;
            if self.stop.sleep(backoff.next_delay()) {
                bail!("stopped while waiting for the database");
            }
        }
    }

    /// Does what may be left undone.
    pub fn try_once(&mut self, work: impl FnOnce(&mut Store) -> Result<(), postgres::Error>) {
        if let Some(store) = &mut self.store
            && let Err(err) = self.config.with_deadline(|| work(store))
        {
            log::debug!("left undone: {}", store::reason(&err));
            self.store = None;
        }
    }

    fn open(&mut self) -> anyhow::Result<(&db::Config, &mut Store)> {
        let store = match &mut self.store {
            Some(store) => store,
            none => none.insert(Store::open(&self.config)?),
        };
        Ok((&self.config, store))
    }
}
