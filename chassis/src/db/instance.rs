//! Which database this is.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use postgres::{Client, Error};

/// A text for a database, its cluster and the cluster's timeline, the same on each of its connections
/// and for each process. Transaction numbers and sequences begin again in another database, such as
/// one that was restored from a backup; timelines differ after a failover.
pub fn instance_id(client: &mut Client) -> Result<String, Error> {
    let row = client.query_one(
        "select system_identifier, timeline_id, pg_database.oid
         from pg_control_system(), pg_control_checkpoint(), pg_database
         where datname = current_database()",
        &[],
    )?;
    let (system, timeline, database): (i64, i32, u32) =
        (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let mut hasher = DefaultHasher::new();
    (system, timeline, database).hash(&mut hasher);
    Ok(format!("{:x}", hasher.finish()))
}
