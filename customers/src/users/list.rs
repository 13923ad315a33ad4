//! `GET /api/v1/users`: its parameters and its pages.

use std::borrow::Cow;

use chassis::Problem;
use percent_encoding::percent_decode_str;
use rouille::Response;
use serde::Serialize;

use super::store;
use super::user::User;
use crate::App;

/// How many users a page has by default, and at most.
const DEFAULT_LIMIT: i64 = 20;
const MAX_LIMIT: i64 = 100;

/// The longest text that is searched for, in characters.
const MAX_SEARCH: usize = 254;

/// The parameters of the list.
#[derive(Debug, PartialEq)]
pub struct ListQuery {
    search: Option<String>,
    limit: i64,
    after: i64,
}

#[derive(Serialize)]
struct Page {
    items: Vec<User>,
    next: Option<String>,
}

/// The parameters of a query that have these names, in their order; each may be given once. Others
/// are ignored.
pub fn parameters<'q, const N: usize>(
    query: &'q str,
    names: [&str; N],
) -> Result<[Option<Cow<'q, str>>; N], Problem> {
    // The parser below would replace invalid UTF-8 by U+FFFD.
    if percent_decode_str(query).decode_utf8().is_err() {
        return Err(Problem::bad_request("the query is not valid UTF-8"));
    }
    let mut values = [const { None }; N];
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let Some(place) = names.iter().position(|known| **known == *name) else { continue };
        if value.contains('\0') {
            return Err(Problem::invalid_field(&name, "must not contain U+0000"));
        }
        if values[place].replace(value).is_some() {
            return Err(Problem::invalid_field(&name, "must be given once"));
        }
    }
    Ok(values)
}

impl ListQuery {
    /// Parses the part of the URL after `?`.
    pub fn parse(query: &str) -> Result<ListQuery, Problem> {
        let [search, limit, after] = parameters(query, ["search", "limit", "after"])?;
        let mut errors = Vec::new();
        let mut number = |name: &str, text: Option<Cow<str>>, default, most: i64, least: i64| {
            let Some(text) = text else { return default };
            let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number = text.parse().ok().filter(|number| (least..=most).contains(number));
            number.filter(|_| is_number).unwrap_or_else(|| {
                errors.push((name.to_owned(), format!("must be {least} to {most}")));
                default
            })
        };
        let limit = number("limit", limit, DEFAULT_LIMIT, MAX_LIMIT, 1);
        let after = number("after", after, 0, i64::MAX, 0);
        if search.as_ref().is_some_and(|text| text.chars().count() > MAX_SEARCH) {
            errors.push(("search".to_owned(), "must be at most 254 characters".to_owned()));
        }
        if !errors.is_empty() {
            return Err(Problem::unprocessable(errors));
        }
        // Every text contains the empty one, so it is no filter.
        let search = search.map(Cow::into_owned).filter(|text| !text.is_empty());
        Ok(ListQuery { search, limit, after })
    }

    fn next(&self, after: i64) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("limit", &self.limit.to_string());
        query.append_pair("after", &after.to_string());
        if let Some(search) = &self.search {
            query.append_pair("search", search);
        }
        format!("/api/v1/users?{}", query.finish())
    }
}

/// One page, with the address of the next one.
pub fn list_response(app: &App, query: &ListQuery) -> Result<Response, Problem> {
    let search = query.search.as_deref();
    // One row more than wanted shows whether there are more.
    let rows = query.limit + 1;
    let mut users = app.db.read(|db| store::page(db, query.after, search, rows))?;
    let more = users.len() as i64 > query.limit;
    users.truncate(query.limit as usize);
    let next = users.last().filter(|_| more).map(|last| query.next(last.user.id));
    let items = users.into_iter().map(|contact| contact.user).collect();
    let response = chassis::response::ok(&Page { items, next: next.clone() });
    Ok(match next {
        Some(next) => response.with_unique_header("Link", format!("<{next}>; rel=\"next\"")),
        None => response,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_parameter_has_its_range_and_is_given_once() {
        let parsed = ListQuery::parse("search=%25&limit=100&after=7&other=x").unwrap();
        assert_eq!(parsed, ListQuery { search: Some("%".to_owned()), limit: 100, after: 7 });
        let default = ListQuery { search: None, limit: 20, after: 0 };
        assert_eq!(ListQuery::parse("search=").unwrap(), default);
        for (query, error) in [
            ("limit=0&after=-1", "limit must be 1 to 100; after must be 0 to 9223372036854775807"),
            ("limit=101", "limit must be 1 to 100"),
            ("limit=", "limit must be 1 to 100"),
            ("limit=+1", "limit must be 1 to 100"),
            ("search=a&search=b", "search must be given once"),
            ("search=%00", "search must not contain U+0000"),
            ("search=%ff", "the query is not valid UTF-8"),
        ] {
            assert_eq!(ListQuery::parse(query).unwrap_err().to_string(), error, "{query}");
        }
    }
}
