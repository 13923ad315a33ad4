//! All SQL of the movies, one function a query.
//!
//! The version of a movie is PostgreSQL's `xmin`, the transaction that wrote the row: it changes with
//! every change and needs no column. Transaction numbers repeat in another database, for example
//! after a restore into a new cluster. So an entity tag also names the database: a tag from another one
//! never matches.

use chassis::db::{like_pattern, renew_deadline};
use chassis::etag::Precondition;
use postgres::error::SqlState;
use postgres::types::{ToSql, Type};
use postgres::{Client, Error, Row, Statement};

use super::movie::{Movie, MovieUpdate, NewMovie};
use crate::Db;

/// The prepared statements of the movies.
pub struct Statements {
    select: Statement,
    insert: Statement,
    advance_ids: Statement,
    update: Statement,
    delete: Statement,
    delete_all: Statement,
    page: Statement,
}

impl Statements {
    /// Prepares them on a connection.
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            select: client.prepare(SELECT)?,
            insert: client.prepare(INSERT)?,
            advance_ids: client.prepare("select advance_movie_ids()")?,
            update: client.prepare(UPDATE)?,
            delete: client.prepare(DELETE)?,
            delete_all: client.prepare("select delete_all_movies()")?,
            page: client.prepare(PAGE)?,
        })
    }
}

/// A movie and its version.
#[derive(Debug)]
pub struct Versioned {
    /// The movie.
    pub movie: Movie,
    /// The text of its entity tag.
    pub version: String,
}

/// The outcome of a change to one movie.
#[derive(Debug)]
pub enum WriteOutcome<T> {
    /// Done.
    Done(T),
    /// Not done: the movie exists in a version that the precondition excludes.
    PreconditionFailed,
    /// Not done: there is no such movie.
    NotFound,
}

const SELECT: &str = "
    select id, title, description, xmin::text as version
    from movies
    where id = $1";

/// The movie with this id.
pub fn select(db: &mut Db, id: i64) -> Result<Option<Versioned>, Error> {
    let row = db.client.query_opt(&db.statements.movies.select, &[&id])?;
    row.as_ref().map(|row| versioned(db, row)).transpose()
}

const INSERT: &str = "
    insert into movies (title, description)
    values ($1, $2)
    returning id, title, description, xmin::text as version";

/// How often an insert is attempted whose id is taken.
const MAX_INSERT_ATTEMPTS: u32 = 3;

/// Adds a movie under the next free id, or returns `None` when the greatest possible id is used up.
/// After an import with explicit ids the sequence lags behind: then it is advanced, and the insert
/// is attempted again.
pub fn insert(db: &mut Db, new: &NewMovie) -> Result<Option<Versioned>, Error> {
    let mut attempts = 1;
    loop {
        match db.client.query_one(&db.statements.movies.insert, &[&new.title, &new.description]) {
            Ok(row) => return versioned(db, &row).map(Some),
            Err(err) if err.code() == Some(&SqlState::SEQUENCE_GENERATOR_LIMIT_EXCEEDED) => {
                return Ok(None);
            }
            // The only unique constraint is the primary key.
            Err(err)
                if err.code() == Some(&SqlState::UNIQUE_VIOLATION)
                    && attempts < MAX_INSERT_ATTEMPTS =>
            {
                renew_deadline();
                db.client.execute(&db.statements.movies.advance_ids, &[])?;
                renew_deadline();
                attempts += 1;
            }
            Err(err) => return Err(err),
        }
    }
}

// Precondition and change are one statement: of two clients with the same version the second waits
// for the first, reads the row again and finds another xmin. `existed` reads the table as it was
// before, which is enough for a 404.
const UPDATE: &str = "
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

/// Changes the movie if the precondition allows its version.
pub fn update(
    db: &mut Db,
    id: i64,
    update: &MovieUpdate,
    precondition: &Precondition,
) -> Result<WriteOutcome<Versioned>, Error> {
    let Precondition { if_match, if_none_match } =
        precondition.of_instance(&db.statements.instance);
    let parameters: [&(dyn ToSql + Sync); 5] =
        [&id, &update.title, &update.description, &if_match, &if_none_match];
    let row = db.client.query_one(&db.statements.movies.update, &parameters)?;
    match row.try_get::<_, Option<i64>>("id")? {
        Some(_) => Ok(WriteOutcome::Done(versioned(db, &row)?)),
        None => why_not(&row, precondition),
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

/// Deletes the movie if the precondition allows its version.
pub fn delete(
    db: &mut Db,
    id: i64,
    precondition: &Precondition,
) -> Result<WriteOutcome<()>, Error> {
    let Precondition { if_match, if_none_match } =
        precondition.of_instance(&db.statements.instance);
    let row =
        db.client.query_one(&db.statements.movies.delete, &[&id, &if_match, &if_none_match])?;
    match row.try_get("done")? {
        true => Ok(WriteOutcome::Done(())),
        false => why_not(&row, precondition),
    }
}

/// Why a change found no row. Without a precondition another client has just deleted the movie, even
/// if it existed when the statement began.
fn why_not<T>(row: &Row, precondition: &Precondition) -> Result<WriteOutcome<T>, Error> {
    let existed: bool = row.try_get("existed")?;
    Ok(if existed && !precondition.is_empty() {
        WriteOutcome::PreconditionFailed
    } else {
        WriteOutcome::NotFound
    })
}

/// Deletes every movie, starts the ids again at 1, and tells how many there were.
pub fn delete_all(db: &mut Db) -> Result<i64, Error> {
    db.client.query_one(&db.statements.movies.delete_all, &[])?.try_get(0)
}

/// A page of the list, in the order of ids.
pub struct PageQuery<'a> {
    /// Only ids above this one.
    pub after: i64,
    /// Only ids up to this one.
    pub until: i64,
    /// At most this many movies.
    pub rows: i64,
    /// At most about this many bytes of text: the movie that reaches it is the last.
    pub bytes: i64,
    /// Only titles that contain this, in upper or lower case.
    pub title: Option<&'a str>,
}

/// The result of a [`PageQuery`].
pub struct Page {
    /// The movies, at least one if there is any.
    pub movies: Vec<Movie>,
    /// Whether there are more of them up to `until`.
    pub more: bool,
}

/// The server applies the limits in rows and in bytes, so that 500 movies with 40 KB of text each
/// are never sent at once. `octet_length` does not read a text that is stored apart, and only the
/// rows of the page are sent. One row more than wanted is examined: it shows whether there are more.
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
const PAGE_BY_TITLE: &str = page!("and search_key(title) like search_key($5)");

/// The movies of the query, as many as fit in a page.
pub fn page(db: &mut Db, query: &PageQuery) -> Result<Page, Error> {
    let PageQuery { after, until, rows, bytes, title } = query;
    let rows = match title {
        None => db.client.query(&db.statements.movies.page, &[after, until, rows, bytes])?,
        // Not prepared: whether the trigram index or a walk along the ids is faster depends on how
        // frequent the text is, so the planner must see it. It costs the server a plan each time,
        // but no further round trip.
        Some(part) => db.client.query_typed(
            PAGE_BY_TITLE,
            &[
                (after, Type::INT8),
                (until, Type::INT8),
                (rows, Type::INT8),
                (bytes, Type::INT8),
                (&like_pattern(part), Type::TEXT),
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
    and search_key(title) like search_key($3)
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
            let pattern = like_pattern(part);
            db.client.query_typed(IDS_BY_TITLE, &[after, rows, (&pattern, Type::TEXT)])?
        }
    };
    rows.iter().map(|row| row.try_get("id")).collect()
}

fn versioned(db: &Db, row: &Row) -> Result<Versioned, Error> {
    let xmin: &str = row.try_get("version")?;
    let version = format!("{}-{xmin}", db.statements.instance);
    Ok(Versioned { movie: movie(row)?, version })
}

fn movie(row: &Row) -> Result<Movie, Error> {
    Ok(Movie {
        id: row.try_get("id")?,
        title: row.try_get("title")?,
        description: row.try_get("description")?,
    })
}
