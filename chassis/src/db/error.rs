//! Why a statement failed, and what may be done about it.

use std::error::Error as StdError;
use std::{fmt, io};

use postgres::error::SqlState;

use crate::problem::Problem;

/// Why a query has no result.
#[derive(Debug)]
pub enum Error {
    /// The server is away, full, read-only or too slow. Trying again later may help.
    Unavailable(Box<dyn StdError + Send + Sync>),
    /// The statement itself failed: an error in our code, or data that a constraint refuses.
    Failed(postgres::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unavailable(_) => f.write_str("the database is not available"),
            // Without DETAIL, which holds the values of the row, and may hold personal data.
            Error::Failed(err) => match err.as_db_error() {
                Some(db) => {
                    let (message, code) = (db.message(), db.code().code());
                    write!(f, "the database refused a statement: {message} ({code})")
                }
                None => write!(f, "a statement failed: {err}"),
            },
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Error::Unavailable(cause) => Some(&**cause),
            Error::Failed(_) => None,
        }
    }
}

impl From<postgres::Error> for Error {
    fn from(err: postgres::Error) -> Error {
        if is_transient(&err) || is_stale_statement(&err) {
            Error::Unavailable(Box::new(err))
        } else {
            Error::Failed(err)
        }
    }
}

/// 503 where trying again may help, else 500.
impl From<Error> for Problem {
    fn from(err: Error) -> Problem {
        match err {
            Error::Unavailable(_) => Problem::unavailable("the database is not available"),
            Error::Failed(_) => Problem::internal(),
        }
        .with_cause(err)
    }
}

/// Whether the connection failed and not the statement. Then it is unknown whether a change was
/// made.
pub fn is_connection_lost(err: &postgres::Error) -> bool {
    match err.code() {
        // 57P01 to 57P05: shut down by an administrator, a crash or a start-up.
        Some(state) => state.code().starts_with("57P") || state.code().starts_with("08"),
        // Other errors come from the client side. Values of a wrong type are errors in our code.
        None => err.is_closed() || err.source().is_some_and(|cause| cause.is::<io::Error>()),
    }
}

/// Whether a prepared statement no longer fits its tables (0A000 "cached plan must not change
/// result type", after a migration), or the server does not know it (26000). The statement was not
/// executed: it may be prepared and executed again, also if it changes something.
pub fn is_stale_statement(err: &postgres::Error) -> bool {
    match err.as_db_error() {
        Some(db) if *db.code() == SqlState::INVALID_SQL_STATEMENT_NAME => true,
        Some(db) => {
            // The text is translated by the server (lc_messages); the function that reports it is
            // not, and it reports nothing else with this code.
            *db.code() == SqlState::FEATURE_NOT_SUPPORTED
                && (db.message().contains("cached plan")
                    || db.routine() == Some("RevalidateCachedQuery"))
        }
        None => false,
    }
}

/// Whether the same statement may succeed later. By SQLSTATE class, see PostgreSQL's appendix
/// "Error Codes": 53 resources, 57 operator, 58 system, 40 rollback by a conflict, 55 object in
/// use; 25006 is a read-only server.
pub fn is_transient(err: &postgres::Error) -> bool {
    is_connection_lost(err)
        || err.code().is_some_and(|state| {
            *state == SqlState::READ_ONLY_SQL_TRANSACTION
                || ["53", "57", "58", "40", "55"].contains(&&state.code()[..2])
        })
}

/// What readiness says of a failure, without any value: it names the cause where time will not
/// remove it.
pub(super) fn readiness_reason(err: &postgres::Error) -> &'static str {
    match err.code().map(SqlState::code) {
        Some(code) if code.starts_with("28") => "the database refuses the login",
        Some("3D000") => "the database does not exist",
        Some("3F000" | "42P01" | "42703" | "42883") => "the database is not migrated",
        Some("42501") => "the login lacks a right on the database or its tables",
        Some("25006") => "the database is read-only",
        Some("53300") => "the database has no connection left",
        Some("57P03") => "the database is starting or stopping",
        _ if is_connection_lost(err) => "no connection to the database",
        _ => "the database does not answer the query",
    }
}
