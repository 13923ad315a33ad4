//! All of this service's SQL.

use std::collections::HashSet;

use chassis::db;
use postgres::{Client, Error, Statement, Transaction};

use crate::order::Order;

/// An order to be booked.
#[derive(Clone, Copy)]
pub struct BookingEntry<'a> {
    /// The message's id. Without one the order cannot be distinguished from an equal one.
    pub message_id: Option<&'a str>,
    /// The order.
    pub order: &'a Order,
}

/// A connection with the statements that every batch uses.
pub struct Store {
    client: Client,
    book: Statement,
}

/// Whether the data is the cause and not the server: class 22 is a value that does not fit, class 23
/// one that a constraint refuses.
pub fn is_data_error(err: &Error) -> bool {
    err.code().is_some_and(|state| ["22", "23"].contains(&&state.code()[..2]))
}

/// The readiness check: the tables exist and may be read, and the server accepts changes: it is no
/// replica and was not made read-only.
pub fn check_readiness(client: &mut Client) -> Result<Result<(), String>, Error> {
    client.batch_execute("select 1 from orders, processed_messages, in_doubt, attempts limit 0")?;
    let row = client.query_one("select current_setting('transaction_read_only') = 'off'", &[])?;
    let is_writable: bool = row.try_get(0)?;
    Ok(if is_writable { Ok(()) } else { Err("the database is read-only".to_owned()) })
}

impl Store {
    /// Connects and prepares.
    pub fn open(config: &db::Config) -> Result<Store, Error> {
        let mut client = config.connect()?;
        // A batch that waits for a lock is tried again after 3 s, so that it notices a stop.
        config.with_deadline(|| client.batch_execute("set lock_timeout = '3s'"))?;
        // Ids are inserted in one order, so that two processes with the same messages cannot
        // deadlock; orders in the order in which they were posted.
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
             ), recorded as (
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

    /// Begins the transaction of a batch.
    pub fn begin(&mut self) -> Result<BookingTransaction<'_>, Error> {
        Ok(BookingTransaction { tx: self.client.transaction()?, book: &self.book })
    }

    /// Deletes records of orders in doubt: those of whole batches, whose acknowledgement the broker has
    /// received, and single ones, whose message is among the dead letters.
    pub fn clear_in_doubt(&mut self, batches: &[i64], ids: &[i64]) -> Result<(), Error> {
        let forget = "delete from in_doubt where batch = any($1) or id = any($2)";
        self.client.execute(forget, &[&batches, &ids])?;
        Ok(())
    }

    /// Counts an attempt at a message, before it is made; returns how many there were. The attempt is
    /// not counted while the tables are locked: a process that dies then did not die of the message.
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

    /// Deletes the count: the message was processed, or at least did not end the process.
    pub fn clear_attempts(&mut self, body: &[u8]) -> Result<(), Error> {
        self.client.execute("delete from attempts where digest = sha256($1)", &[&body])?;
        Ok(())
    }

    /// Deletes message ids that are older than `days`, at most `limit`; returns how many.
    pub fn purge_message_ids(&mut self, days: i32, limit: i64) -> Result<u64, Error> {
        self.client.execute(
            "delete from processed_messages
             where message_id in (
                 select message_id from processed_messages
                 where processed_at < now() - make_interval(days => $1)
                 order by processed_at
                 limit $2
             )",
            &[&days, &limit],
        )
    }

    /// Deletes records that crashes have left and that are older than `days`.
    pub fn purge_recovery_tables(&mut self, days: i32) -> Result<(), Error> {
        let days: &[&(dyn postgres::types::ToSql + Sync)] = &[&days];
        let old = "now() - make_interval(days => $1)";
        self.client.execute(&format!("delete from in_doubt where booked_at < {old}"), days)?;
        self.client.execute(&format!("delete from attempts where last_at < {old}"), days)?;
        Ok(())
    }
}

/// What became of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A new row.
    Booked,
    /// The same order was booked under this id before.
    Duplicate,
    /// Another order was booked under this id before.
    Conflict,
}

/// A transaction that books one batch; dropped without a commit it changes nothing.
pub struct BookingTransaction<'a> {
    tx: Transaction<'a>,
    book: &'a Statement,
}

impl BookingTransaction<'_> {
    /// For batches with messages without an id: a shared lock; an exclusive one for a batch that must
    /// know how those of other processes ended, because it was delivered before.
    pub fn lock_messages_without_id(&mut self, exclusive: bool) -> Result<(), Error> {
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

    /// The entries that another batch may have booked: their places and the ids of the records. Each
    /// record stands for one entry.
    pub fn find_in_doubt(
        &mut self,
        entries: &[BookingEntry],
        batch: i64,
    ) -> Result<Vec<(usize, i64)>, Error> {
        let Columns { message_ids, user_ids, numbers, cents } = columns(entries);
        let rows = self.tx.query(
            "with input as (
                 select n, digest, row_number() over (partition by digest order by n) as k
                 from unnest($1::text[], $2::text[], $3::integer[], $4::bigint[])
                     with ordinality as t (message_id, user_id, number_of_items, cents, n),
                     sha256(convert_to(concat_ws(' ', number_of_items, cents, user_id), 'UTF8'))
                         as digest
                 where message_id is null
             ), record as (
                 select id, digest, row_number() over (partition by digest order by id) as k
                 from in_doubt
                 where batch <> $5
             )
             select n, id from input join record using (digest, k)",
            &[&message_ids, &user_ids, &numbers, &cents, &batch],
        )?;
        let pair = |row: &postgres::Row| (row.get::<_, i64>(0) as usize - 1, row.get(1));
        Ok(rows.iter().map(pair).collect())
    }

    /// Books the entries in their order, each message id once. The numbers are the caller's own and
    /// are returned with the outcomes.
    pub fn book(
        &mut self,
        entries: &[(usize, BookingEntry)],
        batch: i64,
    ) -> Result<Vec<(usize, Outcome)>, Error> {
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        let mut seen = HashSet::new();
        let firsts: Vec<BookingEntry> = entries
            .iter()
            .map(|(_, entry)| *entry)
            .filter(|entry| entry.message_id.is_none_or(|id| seen.insert(id)))
            .collect();
        let Columns { message_ids, user_ids, numbers, cents } = columns(&firsts);
        let rows =
            self.tx.query(self.book, &[&message_ids, &user_ids, &numbers, &cents, &batch])?;
        let mut fresh: HashSet<&str> = rows.iter().map(|row| row.get(0)).collect();
        let mut outcomes = Vec::with_capacity(entries.len());
        let mut duplicates = Vec::new();
        for (number, entry) in entries {
            if entry.message_id.is_none_or(|id| fresh.remove(id)) {
                outcomes.push((*number, Outcome::Booked));
            } else {
                duplicates.push((*number, *entry));
            }
        }
        if !duplicates.is_empty() {
            self.classify_duplicates(&duplicates, &mut outcomes)?;
        }
        Ok(outcomes)
    }

    /// Compares duplicates with what was booked. A statement of its own, because it must see rows that
    /// another process has committed while ours waited for them.
    fn classify_duplicates(
        &mut self,
        duplicates: &[(usize, BookingEntry)],
        outcomes: &mut Vec<(usize, Outcome)>,
    ) -> Result<(), Error> {
        let entries: Vec<BookingEntry> = duplicates.iter().map(|(_, entry)| *entry).collect();
        let Columns { message_ids, user_ids, numbers, cents } = columns(&entries);
        let rows = self.tx.query(
            "select digest = sha256(convert_to(concat_ws(' ', number_of_items, cents, user_id), 'UTF8'))
             from unnest($1::text[], $2::text[], $3::integer[], $4::bigint[])
                 with ordinality as t (message_id, user_id, number_of_items, cents, n)
             left join processed_messages using (message_id)
             order by n",
            &[&message_ids, &user_ids, &numbers, &cents],
        )?;
        for ((number, _), row) in duplicates.iter().zip(rows) {
            // Null where the id was purged in the meantime.
            let other = row.get::<_, Option<bool>>(0) == Some(false);
            outcomes.push((*number, if other { Outcome::Conflict } else { Outcome::Duplicate }));
        }
        Ok(())
    }

    /// As [`Store::clear_attempts`], together with the booking.
    pub fn clear_attempts(&mut self, body: &[u8]) -> Result<(), Error> {
        self.tx.execute("delete from attempts where digest = sha256($1)", &[&body])?;
        Ok(())
    }

    /// Commits the transaction.
    pub fn commit(self) -> Result<(), Error> {
        self.tx.commit()
    }
}

/// The entries as arrays, one for each column.
struct Columns<'a> {
    message_ids: Vec<Option<&'a str>>,
    user_ids: Vec<&'a str>,
    numbers: Vec<i32>,
    cents: Vec<i64>,
}

fn columns<'a>(entries: &[BookingEntry<'a>]) -> Columns<'a> {
    Columns {
        message_ids: entries.iter().map(|entry| entry.message_id).collect(),
        user_ids: entries.iter().map(|entry| entry.order.user_id.as_str()).collect(),
        numbers: entries.iter().map(|entry| entry.order.number_of_items).collect(),
        cents: entries.iter().map(|entry| entry.order.total.0).collect(),
    }
}
