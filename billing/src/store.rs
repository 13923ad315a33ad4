//! All of this service's SQL.

use std::collections::HashSet;

use chassis::db;
use postgres::{Client, Error, Statement, Transaction};

use crate::order::Order;

/// One order on its way into the table.
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    /// The message's id; without one nothing tells it from an equal order.
    pub message_id: Option<&'a str>,
    /// What was ordered.
    pub order: &'a Order,
}

/// A connection with the statements that every batch uses.
pub struct Store {
    client: Client,
    book: Statement,
}

/// Whether a row, not the server, is to blame: class 22 is a value that does
/// not fit, class 23 one that a constraint refuses.
pub fn is_data_error(err: &Error) -> bool {
    err.code().is_some_and(|state| ["22", "23"].contains(&&state.code()[..2]))
}

/// What PostgreSQL says, without the detail, which would show the row.
pub fn reason(err: &Error) -> String {
    match err.as_db_error() {
        Some(err) => format!("{} (SQLSTATE {})", err.message(), err.code().code()),
        None => err.to_string(),
    }
}

/// Whether the tables are there and may be read, and the server lets anybody write: not on
/// a replica, or when it was made read-only.
pub fn is_ready(db: &mut Client) -> Result<bool, Error> {
    db.batch_execute("select 1 from orders, processed_messages, in_doubt, attempts limit 0")?;
    Ok(db.query_one("select current_setting('transaction_read_only') = 'off'", &[])?.get(0))
}

impl Store {
    /// Connects and prepares.
    pub fn open(config: &db::Config) -> Result<Store, Error> {
        let mut client = config.connect()?;
        // A batch behind somebody's lock comes up for air, to see whether it is
        // time to stop, and tries again.
        config.with_deadline(|| client.batch_execute("set lock_timeout = '3s'"))?;
        // Ids in one order, so that two processes with the same messages cannot
        // deadlock; orders in the order posted.
        let book = config.with_deadline(|| {
            client.prepare(
                "with input as (
                 select n, message_id, user_id, number_of_items, cents * 0.01 as total_amount,
                        sha256(convert_to(concat_ws(' ', number_of_items, cents, user_id), 'UTF8'))
                            as digest
                 from unnest($1::text[], $2::text[], $3::integer[], $4::bigint[])
                     with ordinality as t (message_id, user_id, number_of_items, cents, n)
             ), fresh as (
                 insert into processed_messages (message_id, digest)
                 select message_id, digest from input
                 where message_id is not null
                 order by message_id
                 on conflict do nothing
                 returning message_id
             ), doubt as (
                 insert into in_doubt (batch, digest)
                 select $5::bigint, digest from input
                 where message_id is null
             ), booked as (
                 insert into orders (user_id, number_of_items, total_amount)
                 select user_id, number_of_items, total_amount
                 from input left join fresh using (message_id)
                 where message_id is null or fresh.message_id is not null
                 order by n
             )
             select message_id from fresh",
            )
        })?;
        Ok(Store { client, book })
    }

    /// The begin of a batch.
    pub fn begin(&mut self) -> Result<Booking<'_>, Error> {
        Ok(Booking { tx: self.client.transaction()?, book: &self.book })
    }

    /// Forgets which orders without an id are in doubt: those of whole batches, whose
    /// acknowledgement the broker has seen, and single ones, whose redelivered message
    /// went to the dead letters.
    pub fn forget_doubts(&mut self, batches: &[i64], ids: &[i64]) -> Result<(), Error> {
        let forget = "delete from in_doubt where batch = any($1) or id = any($2)";
        self.client.execute(forget, &[&batches, &ids])?;
        Ok(())
    }

    /// Counts that a message is taken in hand, before it can do any harm. Not while its order
    /// could not be booked: a process that dies behind somebody's lock did not die of it.
    pub fn count_attempt(&mut self, body: &[u8]) -> Result<i32, Error> {
        let mut tx = self.client.transaction()?;
        tx.batch_execute("lock table orders, processed_messages in row exclusive mode")?;
        let row = tx.query_one(
            "insert into attempts (digest, count)
             values (sha256($1), 1)
             on conflict (digest) do update
             set count = attempts.count + 1, last_at = now()
             returning count",
            &[&body],
        )?;
        tx.commit()?;
        Ok(row.get(0))
    }

    /// The message was dealt with, or at least did not end the process.
    pub fn forget_attempts(&mut self, body: &[u8]) -> Result<(), Error> {
        self.client.execute("delete from attempts where digest = sha256($1)", &[&body])?;
        Ok(())
    }

    /// Deletes some message ids older than that, at most `chunk`; returns how many.
    pub fn forget_message_ids(&mut self, days: i32, chunk: i64) -> Result<u64, Error> {
        self.client.execute(
            "delete from processed_messages
             where message_id in (
                 select message_id from processed_messages
                 where processed_at < now() - make_interval(days => $1)
                 order by processed_at
                 limit $2
             )",
            &[&days, &chunk],
        )
    }

    /// Deletes what crashes left behind and nobody came back to.
    pub fn forget_crashes(&mut self, days: i32) -> Result<(), Error> {
        let days: &[&(dyn postgres::types::ToSql + Sync)] = &[&days];
        let old = "now() - make_interval(days => $1)";
        self.client.execute(&format!("delete from in_doubt where booked_at < {old}"), days)?;
        self.client.execute(&format!("delete from attempts where last_at < {old}"), days)?;
        Ok(())
    }
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A new row.
    Booked,
    /// The same order was booked under this id before.
    Repeat,
    /// Another order was booked under this id before.
    Conflict,
}

/// A transaction that books one batch; dropped without a commit it leaves nothing.
pub struct Booking<'a> {
    tx: Transaction<'a>,
    book: &'a Statement,
}

impl Booking<'_> {
    /// For batches with messages that have no id: shared, unless somebody must
    /// know how the batches of others ended, such as one whose connection broke.
    pub fn lock_bare(&mut self, exclusive: bool) -> Result<(), Error> {
        let lock = match exclusive {
            true => "select pg_advisory_xact_lock(4711)",
            false => "select pg_advisory_xact_lock_shared(4711)",
        };
        self.tx.batch_execute(lock)
    }

    /// Whether an earlier attempt at this batch was committed after all.
    pub fn is_booked(&mut self, batch: i64) -> Result<bool, Error> {
        let row = self
            .tx
            .query_one("select exists (select from in_doubt where batch = $1)", &[&batch])?;
        Ok(row.get(0))
    }

    /// Which of the entries may be booked already by another batch: index and
    /// the id of the doubt. Each doubt answers for one entry.
    pub fn doubts(&mut self, entries: &[Entry], batch: i64) -> Result<Vec<(usize, i64)>, Error> {
        let Columns { message_ids, user_ids, numbers, cents } = columns(entries);
        let rows = self.tx.query(
            "with input as (
                 select n, digest, row_number() over (partition by digest order by n) as k
                 from unnest($1::text[], $2::text[], $3::integer[], $4::bigint[])
                     with ordinality as t (message_id, user_id, number_of_items, cents, n),
                     sha256(convert_to(concat_ws(' ', number_of_items, cents, user_id), 'UTF8'))
                         as digest
                 where message_id is null
             ), doubt as (
                 select id, digest, row_number() over (partition by digest order by id) as k
                 from in_doubt
                 where batch <> $5
             )
             select n, id from input join doubt using (digest, k)",
            &[&message_ids, &user_ids, &numbers, &cents, &batch],
        )?;
        let pair = |row: &postgres::Row| (row.get::<_, i64>(0) as usize - 1, row.get(1));
        Ok(rows.iter().map(pair).collect())
    }

    /// Books the entries in their order, each message id once. The numbers are
    /// the caller's own and come back with what became of each entry.
    pub fn book(
        &mut self,
        entries: &[(usize, Entry)],
        batch: i64,
    ) -> Result<Vec<(usize, Outcome)>, Error> {
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        let mut seen = HashSet::new();
        let firsts: Vec<Entry> = entries
            .iter()
            .map(|(_, entry)| *entry)
            .filter(|entry| entry.message_id.is_none_or(|id| seen.insert(id)))
            .collect();
        let Columns { message_ids, user_ids, numbers, cents } = columns(&firsts);
        let rows =
            self.tx.query(self.book, &[&message_ids, &user_ids, &numbers, &cents, &batch])?;
        let mut fresh: HashSet<&str> = rows.iter().map(|row| row.get(0)).collect();
        let mut outcomes = Vec::with_capacity(entries.len());
        let mut repeats = Vec::new();
        for (number, entry) in entries {
            if entry.message_id.is_none_or(|id| fresh.remove(id)) {
                outcomes.push((*number, Outcome::Booked));
            } else {
                repeats.push((*number, *entry));
            }
        }
        if !repeats.is_empty() {
            self.compare(&repeats, &mut outcomes)?;
        }
        Ok(outcomes)
    }

    /// Compares repeats with what was booked. A statement of its own, because it
    /// must see rows that another process committed while ours waited for them.
    fn compare(
        &mut self,
        repeats: &[(usize, Entry)],
        outcomes: &mut Vec<(usize, Outcome)>,
    ) -> Result<(), Error> {
        let entries: Vec<Entry> = repeats.iter().map(|(_, entry)| *entry).collect();
        let Columns { message_ids, user_ids, numbers, cents } = columns(&entries);
        let rows = self.tx.query(
            "select digest = sha256(convert_to(concat_ws(' ', number_of_items, cents, user_id), 'UTF8'))
             from unnest($1::text[], $2::text[], $3::integer[], $4::bigint[])
                 with ordinality as t (message_id, user_id, number_of_items, cents, n)
             left join processed_messages using (message_id)
             order by n",
            &[&message_ids, &user_ids, &numbers, &cents],
        )?;
        for ((number, _), row) in repeats.iter().zip(rows) {
            // Null when the id was forgotten this very moment.
            let other = row.get::<_, Option<bool>>(0) == Some(false);
            outcomes.push((*number, if other { Outcome::Conflict } else { Outcome::Repeat }));
        }
        Ok(())
    }

    /// As [`Store::forget_attempts`], together with the booking.
    pub fn forget_attempts(&mut self, body: &[u8]) -> Result<(), Error> {
        self.tx.execute("delete from attempts where digest = sha256($1)", &[&body])?;
        Ok(())
    }

    /// Makes it so.
    pub fn commit(self) -> Result<(), Error> {
        self.tx.commit()
    }
}

/// The entries as arrays, one a column.
struct Columns<'a> {
    message_ids: Vec<Option<&'a str>>,
    user_ids: Vec<&'a str>,
    numbers: Vec<i32>,
    cents: Vec<i64>,
}

fn columns<'a>(entries: &[Entry<'a>]) -> Columns<'a> {
    Columns {
        message_ids: entries.iter().map(|entry| entry.message_id).collect(),
        user_ids: entries.iter().map(|entry| entry.order.user_id.as_str()).collect(),
        numbers: entries.iter().map(|entry| entry.order.number_of_items).collect(),
        cents: entries.iter().map(|entry| entry.order.total_cents).collect(),
    }
}
