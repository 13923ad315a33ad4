//! All SQL of the webhook events, one function a query.

use chassis::db::renew_deadline;
use postgres::Error;

use super::event::ProviderEvent;
use crate::Db;

/// Notes an event, and locks it until the transaction ends. Whether it is to be carried out: it is new,
/// or it was refused before.
pub fn claim(db: &mut Db, event: &ProviderEvent, body: &str) -> Result<bool, Error> {
    let ProviderEvent { id, kind, order_id, .. } = event;
    let insert = "
        insert into webhook_events (id, type, order_id, body)
        values ($1, $2, $3, $4)
        on conflict (id) do update
        set received_at = now()
        where webhook_events.refusal is not null
        returning id";
    Ok(db.client.query_opt(insert, &[id, kind, order_id, &body])?.is_some())
}

/// Notes what became of an event: why it was refused, if it was.
pub fn finish(db: &mut Db, event: &ProviderEvent, refusal: Option<&str>) -> Result<(), Error> {
    renew_deadline();
    let update = "update webhook_events set refusal = $2 where id = $1";
    db.client.execute(update, &[&event.id, &refusal]).map(drop)
}
