//! All SQL of sessions, refresh tokens and revocations.

use std::time::Duration;

use chassis::Env;
use chassis::auth::{Revocation, RevocationPage};
use chassis::db::renew_deadline;
use postgres::{Client, Error, Row, Statement, Transaction};
use serde::Serialize;
use uuid::Uuid;

use super::tokens::Subject;
use crate::Db;
use crate::users::store::Credentials;

/// How many revocations are in one page.
const PAGE_ROWS: i64 = 1000;

/// A spent refresh token is remembered for this long: used again, it ends its session.
const REMEMBER_SPENT: Duration = Duration::from_secs(7 * 86_400);

/// By how much the end of an access token is later for a service than for this database: verifiers
/// accept a token for 5 s after it has expired, clocks differ, and a refresh may answer a moment after
/// the transaction that ends its session has begun.
const EXPIRY_MARGIN: Duration = Duration::from_secs(60);

/// A revocation stays in the list for this long after its last access token has expired.
const KEEP_REVOCATIONS: Duration = Duration::from_secs(3600);

/// How long sessions last.
#[derive(Clone, Debug)]
pub struct Lifetimes {
    /// After the last use.
    pub idle: Duration,
    /// After the login.
    pub max: Duration,
    /// How long a spent refresh token still gets a pair of its own: two tabs may use one at the
    /// same time, and an answer may be lost.
    pub grace: Duration,
    /// How long an access token is valid.
    pub access: Duration,
}

impl Lifetimes {
    /// Reads `CUSTOMERS_SESSION_IDLE_DAYS`, `CUSTOMERS_SESSION_MAX_DAYS`,
    /// `CUSTOMERS_ACCESS_TOKEN_MINUTES` and `CUSTOMERS_REFRESH_GRACE_MS`.
    pub fn from_env(env: &mut Env) -> Lifetimes {
        let mut time = |name: &str, default: u64, most: u64, unit_s: u64| {
            Duration::from_secs(env.number(name, default, 1..=most) * unit_s)
        };
        Lifetimes {
            idle: time("CUSTOMERS_SESSION_IDLE_DAYS", 30, 365, 86_400),
            max: time("CUSTOMERS_SESSION_MAX_DAYS", 90, 3650, 86_400),
            access: time("CUSTOMERS_ACCESS_TOKEN_MINUTES", 15, 1440, 60),
            grace: env.millis("CUSTOMERS_REFRESH_GRACE_MS", 10_000),
        }
    }

    /// For how long an access token that was issued a moment ago may be accepted, in seconds.
    fn listed_s(&self) -> f64 {
        (self.access + EXPIRY_MARGIN).as_secs_f64()
    }
}

/// The prepared statements of the sessions.
pub struct Statements {
    insert: Statement,
    lock: Statement,
    token: Statement,
    rotate: Statement,
    end: Statement,
    end_all: Statement,
    list: Statement,
    revocations: Statement,
}

/// A session as its owner sees it.
#[derive(Debug, Serialize)]
pub struct Session {
    /// Its id.
    pub id: Uuid,
    /// RFC 3339 in UTC with milliseconds.
    pub created_at: String,
    /// RFC 3339 in UTC with milliseconds.
    pub last_used_at: String,
    /// RFC 3339 in UTC with milliseconds.
    pub expires_at: String,
    /// Whether it is the session of this request.
    pub current: bool,
}

/// The outcome of a refresh.
#[derive(Debug)]
pub enum Rotation {
    /// The new token is in force.
    Done(Subject),
    /// No session has this token, or it has expired.
    Unknown,
    /// The token was spent before the grace: its session has ended.
    Reused(Vec<Revocation>),
}

macro_rules! rfc3339 {
    ($column:literal) => {
        concat!(
            "to_char(",
            $column,
            " at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"') as ",
            $column
        )
    };
}

// The user's row is locked until the commit: a change of its role or password, or its deletion, comes
// before and is seen, or comes after and ends this session with all others.
const INSERT: &str = "
    with owner as (
        select id, is_admin
        from users
        where id = $2 and deleted_at is null and not disabled and password_hash = $6
        for share
    ), session as (
        insert into sessions (id, user_id, expires_at)
        select $1, id, now() + least($3::float8, $4::float8) * interval '1 s' from owner
        returning expires_at
    ), token as (
        insert into refresh_tokens (hash, session_id)
        select $5, $1 from owner
    )
    select floor(extract(epoch from expires_at))::bigint as expires, is_admin
    from session, owner";

// The session's row is locked before its tokens are looked at: of two requests with one token the
// second waits for the first. The logout of a session locks it, too.
const LOCK: &str = "
    select sessions.id, sessions.user_id, users.is_admin,
        floor(extract(epoch from sessions.expires_at))::bigint as expires
    from sessions
    join users on users.id = sessions.user_id
    where sessions.id = (select session_id from refresh_tokens where hash = $1)
    and sessions.expires_at > now()
    and users.deleted_at is null and not users.disabled
    for update of sessions";

const TOKEN: &str = "
    select coalesce(spent_at < now() - $2::float8 * interval '1 s', false) as reused
    from refresh_tokens
    where hash = $1";

const ROTATE: &str = "
    with spent as (
        update refresh_tokens set spent_at = coalesce(spent_at, now()) where hash = $1
    ), issued as (
        insert into refresh_tokens (hash, session_id) values ($2, $3)
    )
    update sessions
    set last_used_at = now(),
        expires_at = least(
            now() + $4::float8 * interval '1 s', created_at + $5::float8 * interval '1 s')
    where id = $3
    returning floor(extract(epoch from expires_at))::bigint as expires";

// `order by` has all sessions deleted before the first revocation gets its number. Otherwise a
// transaction that holds the lock of the numbers could wait for the row of a session, and the one that
// holds the row for the numbers.
const END: &str = "
    with ended as (
        delete from sessions where id = $1 and user_id = $2 returning id
    )
    insert into revocations (session_id, until)
    select id, now() + $3::float8 * interval '1 s' from ended order by id
    returning number, session_id, extract(epoch from until)::bigint + 1 as until";

// The rows are locked in the order of their ids, so that two of these do not wait for each other.
const END_ALL: &str = "
    with locked as (
        select id from sessions
        where user_id = $1 and id is distinct from $2
        order by id
        for update
    ), ended as (
        delete from sessions where id in (select id from locked) returning id
    )
    insert into revocations (session_id, until)
    select id, now() + $3::float8 * interval '1 s' from ended order by id
    returning number, session_id, extract(epoch from until)::bigint + 1 as until";

const LIST: &str = concat!(
    "select id, ",
    rfc3339!("created_at"),
    ", ",
    rfc3339!("last_used_at"),
    ", ",
    rfc3339!("expires_at"),
    "
    from sessions
    where user_id = $1 and expires_at > now()
    and ($2::uuid is null or id = $2)
    order by sessions.last_used_at desc, id
    limit 100"
);

const REVOCATIONS: &str = "
    select number, session_id, extract(epoch from until)::bigint + 1 as until
    from revocations
    where number > $1
    order by number
    limit $2";

impl Statements {
    /// Prepares them on a connection.
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            insert: client.prepare(INSERT)?,
            lock: client.prepare(LOCK)?,
            token: client.prepare(TOKEN)?,
            rotate: client.prepare(ROTATE)?,
            end: client.prepare(END)?,
            end_all: client.prepare(END_ALL)?,
            list: client.prepare(LIST)?,
            revocations: client.prepare(REVOCATIONS)?,
        })
    }
}

/// Begins a session of a user with a refresh token; `None` where the account has changed since its
/// password was verified: it is gone or disabled, or has another hash.
pub fn insert(
    db: &mut Db,
    id: Uuid,
    user: &Credentials,
    token_hash: &[u8],
    lifetimes: &Lifetimes,
) -> Result<Option<Subject>, Error> {
    let user_id = user.id;
    let (idle, max) = (lifetimes.idle.as_secs_f64(), lifetimes.max.as_secs_f64());
    let parameters: [&(dyn postgres::types::ToSql + Sync); 6] =
        [&id, &user_id, &idle, &max, &token_hash, &user.password_hash];
    let row = db.client.query_opt(&db.statements.sessions.insert, &parameters)?;
    let subject = |row: Row| {
        Ok(Subject {
            user_id,
            session_id: id,
            is_admin: row.try_get("is_admin")?,
            session_expires: row.try_get("expires")?,
        })
    };
    row.map(subject).transpose()
}

/// Exchanges a refresh token for a new one, in one transaction.
pub fn rotate(
    db: &mut Db,
    old_hash: &[u8],
    new_hash: &[u8],
    lifetimes: &Lifetimes,
) -> Result<Rotation, Error> {
    let statements = &db.statements.sessions;
    let mut transaction = db.client.transaction()?;
    renew_deadline();
    let Some(session) = transaction.query_opt(&statements.lock, &[&old_hash])? else {
        return Ok(Rotation::Unknown);
    };
    let (id, user_id): (Uuid, i64) = (session.try_get("id")?, session.try_get("user_id")?);
    renew_deadline();
    let grace = lifetimes.grace.as_secs_f64();
    let Some(token) = transaction.query_opt(&statements.token, &[&old_hash, &grace])? else {
        return Ok(Rotation::Unknown);
    };
    renew_deadline();
    let rotation = if token.try_get("reused")? {
        Rotation::Reused(end_one(&mut transaction, &statements.end, id, user_id, lifetimes)?)
    } else {
        let (idle, max) = (lifetimes.idle.as_secs_f64(), lifetimes.max.as_secs_f64());
        let rotated =
            transaction.query_one(&statements.rotate, &[&old_hash, &new_hash, &id, &idle, &max])?;
        Rotation::Done(Subject {
            user_id,
            session_id: id,
            is_admin: session.try_get("is_admin")?,
            session_expires: rotated.try_get("expires")?,
        })
    };
    renew_deadline();
    transaction.commit()?;
    Ok(rotation)
}

fn end_one(
    transaction: &mut Transaction<'_>,
    end: &Statement,
    id: Uuid,
    user_id: i64,
    lifetimes: &Lifetimes,
) -> Result<Vec<Revocation>, Error> {
    let listed = lifetimes.listed_s();
    let ended = transaction.query(end, &[&id, &user_id, &listed])?;
    ended.iter().map(revocation).collect()
}

/// Ends one session of a user; none where it is over already or another user's.
pub fn end(
    db: &mut Db,
    id: Uuid,
    user_id: i64,
    lifetimes: &Lifetimes,
) -> Result<Vec<Revocation>, Error> {
    renew_deadline();
    let listed = lifetimes.listed_s();
    let ended = db.client.query(&db.statements.sessions.end, &[&id, &user_id, &listed])?;
    ended.iter().map(revocation).collect()
}

/// Ends all sessions of a user but the given one.
pub fn end_all(
    db: &mut Db,
    user_id: i64,
    but: Option<Uuid>,
    lifetimes: &Lifetimes,
) -> Result<Vec<Revocation>, Error> {
    renew_deadline();
    let listed = lifetimes.listed_s();
    let ended = db.client.query(&db.statements.sessions.end_all, &[&user_id, &but, &listed])?;
    ended.iter().map(revocation).collect()
}

/// The sessions of a user, or the one with this id, the last used first; at most 100.
pub fn list(
    db: &mut Db,
    user_id: i64,
    id: Option<Uuid>,
    current: Uuid,
) -> Result<Vec<Session>, Error> {
    let rows = db.client.query(&db.statements.sessions.list, &[&user_id, &id])?;
    let session = |row: &Row| {
        let id: Uuid = row.try_get("id")?;
        Ok(Session {
            id,
            created_at: row.try_get("created_at")?,
            last_used_at: row.try_get("last_used_at")?,
            expires_at: row.try_get("expires_at")?,
            current: id == current,
        })
    };
    rows.iter().map(session).collect()
}

/// The sessions that have ended, from the one behind `after`; from the first where `epoch` is not
/// this database's.
pub fn revocations(db: &mut Db, epoch: &str, after: i64) -> Result<RevocationPage, Error> {
    let own = db.statements.instance.clone();
    let after = if epoch == own { after } else { 0 };
    // One row more than wanted shows whether there are more.
    let rows = db.client.query(&db.statements.sessions.revocations, &[&after, &(PAGE_ROWS + 1)])?;
    let more = rows.len() as i64 > PAGE_ROWS;
    let wanted = rows.iter().take(PAGE_ROWS as usize);
    let revocations = wanted.map(revocation).collect::<Result<Vec<_>, _>>()?;
    let next = revocations.last().map_or(after, |last| last.number);
    Ok(RevocationPage { epoch: own, revocations, next, more })
}

fn revocation(row: &Row) -> Result<Revocation, Error> {
    Ok(Revocation {
        number: row.try_get("number")?,
        session_id: row.try_get("session_id")?,
        until: row.try_get("until")?,
    })
}

/// Deletes at most `rows` rows each of what is no longer needed; returns how many were deleted.
pub fn delete_expired(db: &mut Db, rows: i64) -> Result<u64, Error> {
    let spent = REMEMBER_SPENT.as_secs_f64();
    let kept = KEEP_REVOCATIONS.as_secs_f64();
    let statements: [(&str, f64); 3] = [
        (
            "delete from sessions where id in (
                select id from sessions where expires_at < now() - $2::float8 * interval '1 s'
                order by expires_at limit $1 for update skip locked)",
            0.0,
        ),
        (
            "delete from refresh_tokens where hash in (
                select hash from refresh_tokens
                where spent_at < now() - $2::float8 * interval '1 s'
                order by spent_at limit $1 for update skip locked)",
            spent,
        ),
        (
            "delete from revocations where number in (
                select number from revocations
                where until < now() - $2::float8 * interval '1 s'
                order by until limit $1)",
            kept,
        ),
    ];
    let mut deleted = 0;
    for (statement, seconds) in statements {
        renew_deadline();
        deleted += db.client.execute(statement, &[&rows, &seconds])?;
    }
    Ok(deleted)
}
