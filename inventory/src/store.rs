//! All SQL of the catalogue, one function a question.
//!
//! The version of a movie is PostgreSQL's `xmin`, the transaction that wrote the
//! row: it changes with every change and costs no column.

use chassis::db::Connection;
use postgres::types::Type;
use postgres::{Client, Error, Row, Statement};

use crate::etag::Condition;
use crate::movie::{Change, Movie, NewMovie};

/// A pooled connection to the catalogue.
pub type Db = Connection<Statements>;

/// What is prepared once a connection, so that a question is one round trip and
/// its plan is ready.
pub struct Statements {
    ping: Statement,
    find: Statement,
    add: Statement,
    change: Statement,
    delete: Statement,
    delete_all: Statement,
    page: Statement,
}

impl Statements {
    /// For [`chassis::db::Pool::new`].
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            ping: client.prepare("select 1")?,
            find: client.prepare(FIND)?,
            add: client.prepare(ADD)?,
            change: client.prepare(CHANGE)?,
            delete: client.prepare(DELETE)?,
            delete_all: client.prepare("select delete_all_movies()")?,
            page: client.prepare(PAGE)?,
        })
    }
}

/// A movie and which version of it this is.
#[derive(Debug)]
pub struct Versioned {
    /// The movie.
    pub movie: Movie,
    /// Its version.
    pub version: String,
}

/// What became of a change to one movie.
#[derive(Debug)]
pub enum Outcome<T> {
    /// Done.
    Done(T),
    /// Not done: the movie is there, but in another version.
    Stale,
    /// Not done: there is no such movie.
    Missing,
}

/// Succeeds when the database answers; a read-only one is enough for most of the work.
pub fn ping(db: &mut Db) -> Result<(), Error> {
    db.client.query_one(&db.statements.ping, &[]).map(drop)
}

const FIND: &str = "
    select id, title, description, xmin::text as version
    from movies
    where id = $1";

/// The movie with this id.
pub fn find(db: &mut Db, id: i64) -> Result<Option<Versioned>, Error> {
    let row = db.client.query_opt(&db.statements.find, &[&id])?;
    row.as_ref().map(versioned).transpose()
}

const ADD: &str = "
    insert into movies (title, description)
    values ($1, $2)
    returning id, title, description, xmin::text as version";

/// Adds a movie under the next free id.
pub fn add(db: &mut Db, new: &NewMovie) -> Result<Versioned, Error> {
    let row = db.client.query_one(&db.statements.add, &[&new.title, &new.description])?;
    versioned(&row)
}

// Condition and change are one statement: of two that saw the same version the
// second waits for the first, looks at the row again and finds another xmin.
// `existed` looks at the table as it was before, which is all that a 404 needs.
const CHANGE: &str = "
    with changed as (
        update movies
        set title = coalesce($2, title), description = coalesce($3, description)
        where id = $1
        and ($4::text[] is null or xmin::text = any($4))
        and xmin::text <> all($5::text[])
        returning id, title, description, xmin::text as version
    )
    select asked.existed, changed.id, changed.title, changed.description, changed.version
    from (select exists (select from movies where id = $1) as existed) as asked
    left join changed on true";

/// Changes the movie if its version is one that the condition allows.
pub fn change(
    db: &mut Db,
    id: i64,
    change: &Change,
    condition: &Condition,
) -> Result<Outcome<Versioned>, Error> {
    let Condition { these, not_these } = condition;
    let parameters: [&(dyn postgres::types::ToSql + Sync); 5] =
        [&id, &change.title, &change.description, these, not_these];
    let row = db.client.query_one(&db.statements.change, &parameters)?;
    match row.try_get::<_, Option<i64>>("id")? {
        Some(_) => Ok(Outcome::Done(versioned(&row)?)),
        None => not_done(&row, condition),
    }
}

const DELETE: &str = "
    with deleted as (
        delete from movies
        where id = $1
        and ($2::text[] is null or xmin::text = any($2))
        and xmin::text <> all($3::text[])
        returning id
    )
    select
        exists (select from deleted) as done,
        exists (select from movies where id = $1) as existed";

/// Deletes the movie if its version is one that the condition allows.
pub fn delete(db: &mut Db, id: i64, condition: &Condition) -> Result<Outcome<()>, Error> {
    let Condition { these, not_these } = condition;
    let row = db.client.query_one(&db.statements.delete, &[&id, these, not_these])?;
    if row.try_get("done")? { Ok(Outcome::Done(())) } else { not_done(&row, condition) }
}

/// A change without a condition that found no row lost against a deletion, even
/// if the movie was there when it began.
fn not_done<T>(row: &Row, condition: &Condition) -> Result<Outcome<T>, Error> {
    let existed: bool = row.try_get("existed")?;
    Ok(if existed && !condition.is_empty() { Outcome::Stale } else { Outcome::Missing })
}

/// Deletes every movie, starts the ids again at 1, and tells how many there were.
pub fn delete_all(db: &mut Db) -> Result<i64, Error> {
    db.client.query_one(&db.statements.delete_all, &[])?.try_get(0)
}

/// A part of the list, in the order of ids.
pub struct Wanted<'a> {
    /// Only ids above this one.
    pub after: i64,
    /// Only ids up to this one.
    pub until: i64,
    /// At most so many movies.
    pub rows: i64,
    /// At most about so many bytes of text: the movie that reaches it is the last.
    pub bytes: i64,
    /// Only titles that contain this, in upper or lower case.
    pub title: Option<&'a str>,
}

/// The answer to a [`Wanted`].
pub struct Page {
    /// The movies, at least one if there is any.
    pub movies: Vec<Movie>,
    /// Whether there are more of them up to `until`.
    pub more: bool,
}

/// The limits in rows and in bytes both hold on the server, so that 500 movies
/// with 40 KB of text each are never on their way at once: `octet_length` does not
/// fetch a text that is stored apart, and only the rows that are shown are sent.
/// One row more than wanted is looked at, because it tells whether there are more.
macro_rules! page {
    ($filter:literal) => {
        concat!(
            "
    select id, title, description, found
    from (
        select
            id, title, description,
            row_number() over place as number,
            sum(octet_length(title) + octet_length(description)) over before as bytes_before,
            count(*) over () as found
        from (
            select id, title, description
            from movies
            where id > $1
            and id <= $2 ",
            $filter,
            "
            order by id
            limit $3::bigint + 1
        ) as candidates
        window
            place as (order by id),
            before as (order by id rows between unbounded preceding and 1 preceding)
    ) as measured
    where number <= $3
    and (number = 1 or bytes_before < $4)
    order by id"
        )
    };
}

const PAGE: &str = page!("");
const PAGE_BY_TITLE: &str = page!("and title ilike $5");

/// The movies that are wanted, or as many of them as fit in a page.
pub fn page(db: &mut Db, wanted: &Wanted) -> Result<Page, Error> {
    let Wanted { after, until, rows, bytes, title } = wanted;
    let rows = match title {
        None => db.client.query(&db.statements.page, &[after, until, rows, bytes])?,
        // Not prepared: whether the trigram index or a walk along the ids is better
        // depends on how frequent the text is, so the planner must see it. This costs
        // the server a plan each time, but no further round trip.
        Some(part) => db.client.query_typed(
            PAGE_BY_TITLE,
            &[
                (after, Type::INT8),
                (until, Type::INT8),
                (rows, Type::INT8),
                (bytes, Type::INT8),
                (&containing(part), Type::TEXT),
            ],
        )?,
    };
    let found: i64 = rows.first().map_or(Ok(0), |row| row.try_get("found"))?;
    let movies: Vec<Movie> = rows.iter().map(movie).collect::<Result<_, _>>()?;
    let more = usize::try_from(found).is_ok_and(|found| found > movies.len());
    Ok(Page { movies, more })
}

const IDS: &str = "
    select id
    from movies
    where id > $1
    order by id
    limit $2";

const IDS_BY_TITLE: &str = "
    select id
    from movies
    where id > $1
    and title ilike $3
    order by id
    limit $2";

/// The ids of the next `rows` movies after this one.
pub fn ids(db: &mut Db, after: i64, rows: i64, title: Option<&str>) -> Result<Vec<i64>, Error> {
    let range: [(&(dyn postgres::types::ToSql + Sync), Type); 2] =
        [(&after, Type::INT8), (&rows, Type::INT8)];
    let rows = match title {
        None => db.client.query_typed(IDS, &range)?,
        Some(part) => {
            let [after, rows] = range;
            let pattern = containing(part);
            db.client.query_typed(IDS_BY_TITLE, &[after, rows, (&pattern, Type::TEXT)])?
        }
    };
    rows.iter().map(|row| row.try_get("id")).collect()
}

/// The pattern of `ilike` for a text that has `part` in it, read as it stands.
fn containing(part: &str) -> String {
    let mut pattern = String::with_capacity(part.len() + 2);
    pattern.push('%');
    for char in part.chars() {
        if matches!(char, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(char);
    }
    pattern.push('%');
    pattern
}

fn versioned(row: &Row) -> Result<Versioned, Error> {
    Ok(Versioned { movie: movie(row)?, version: row.try_get("version")? })
}

fn movie(row: &Row) -> Result<Movie, Error> {
    Ok(Movie {
        id: row.try_get("id")?,
        title: row.try_get("title")?,
        description: row.try_get("description")?,
    })
}
