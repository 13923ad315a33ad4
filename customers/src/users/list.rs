//! `GET /api/v1/users`: its parameters and its pages.

use chassis::Problem;
use chassis::query::{self, Query};
use rouille::Response;

use super::store;
use crate::App;

/// The longest text that is searched for, in characters.
const MAX_SEARCH_CHARS: usize = 254;

/// The parameters of the list.
#[derive(Debug)]
pub struct ListQuery {
    search: Option<String>,
    limit: i64,
    after: i64,
}

impl ListQuery {
    /// Parses the part of the URL after `?`.
    pub fn parse(query: &str) -> Result<ListQuery, Problem> {
        let mut query = Query::parse(query, &["search", "limit", "after"])?;
        let list = ListQuery {
            search: query.text("search", MAX_SEARCH_CHARS),
            limit: query.limit(),
            after: query.number("after", 0, 0..=i64::MAX),
        };
        query.finish()?;
        Ok(list)
    }
}

/// One page, with the address of the next one.
pub fn list_response(app: &App, query: &ListQuery) -> Result<Response, Problem> {
    let ListQuery { search, limit, after } = query;
    // One row more than wanted shows whether there are more.
    let users = app.db.read(|db| store::page(db, *after, search.as_deref(), limit + 1))?;
    let users = users.into_iter().map(|contact| contact.user).collect();
    Ok(query::page(users, *limit, |last| {
        let (limit, after) = (limit.to_string(), last.id.to_string());
        let parameters = [
            ("limit", Some(limit.as_str())),
            ("after", Some(&after)),
            ("search", search.as_deref()),
        ];
        format!("/api/v1/users?{}", query::build(&parameters))
    }))
}
