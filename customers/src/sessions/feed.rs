//! The list of ended sessions for this service itself, from its own database.

use chassis::auth::{PublicKeys, RevocationPage, Source};
use chassis::db::Pool;

use super::store;
use crate::Statements;

/// Keys of the settings, and revocations of the database.
pub struct DatabaseSource {
    /// The database.
    pub db: Pool<Statements>,
    /// The public keys to the keys that sign here.
    pub keys: PublicKeys,
}

impl Source for DatabaseSource {
    fn keys(&self) -> anyhow::Result<PublicKeys> {
        Ok(self.keys.clone())
    }

    fn revocations(&self, epoch: &str, after: i64) -> anyhow::Result<RevocationPage> {
        Ok(self.db.read_background(|db| store::revocations(db, epoch, after))?)
    }
}
