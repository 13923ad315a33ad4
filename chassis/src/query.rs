//! The query of a URL: its parameters, and the pages of a list.

use std::borrow::Cow;
use std::ops::RangeInclusive;

use percent_encoding::percent_decode_str;
use rouille::Response;
use serde::Serialize;

use crate::problem::Problem;
use crate::response;

/// How many items a page has by default, and at most.
const DEFAULT_LIMIT: i64 = 20;
const MAX_LIMIT: i64 = 100;

/// The known parameters of a query, and the errors that were found in them.
pub struct Query<'q> {
    values: Vec<(&'static str, Cow<'q, str>)>,
    errors: Vec<(String, String)>,
}

impl<'q> Query<'q> {
    /// Parses the part of a URL after `?`. A parameter of these names may be given once; others are
    /// ignored.
    pub fn parse(query: &'q str, names: &[&'static str]) -> Result<Query<'q>, Problem> {
        let pairs = pairs(query)?;
        let mut parsed = Query { values: Vec::new(), errors: Vec::new() };
        for (name, value) in pairs {
            let Some(known) = names.iter().find(|known| **known == name) else { continue };
            if value.contains('\0') {
                return Err(Problem::invalid_field(known, "must not contain U+0000"));
            }
            if parsed.values.iter().any(|(name, _)| name == known) {
                return Err(Problem::invalid_field(known, "must be given once"));
            }
            parsed.values.push((known, value));
        }
        Ok(parsed)
    }

    /// Adds an error.
    pub fn error(&mut self, name: &str, rule: impl Into<String>) {
        self.errors.push((name.to_owned(), rule.into()));
    }

    /// A parameter as it is; an empty one is a value, too.
    pub fn value(&mut self, name: &str) -> Option<Cow<'q, str>> {
        let place = self.values.iter().position(|(known, _)| *known == name)?;
        Some(self.values.swap_remove(place).1)
    }

    /// A text of at most this many characters; `None` where it is empty.
    pub fn text(&mut self, name: &str, max_chars: usize) -> Option<String> {
        let text = self.value(name).filter(|text| !text.is_empty())?;
        if text.chars().count() > max_chars {
            self.error(name, format!("must be at most {max_chars} characters"));
        }
        Some(text.into_owned())
    }

    /// A number in digits only.
    pub fn number(&mut self, name: &str, default: i64, range: RangeInclusive<i64>) -> i64 {
        let Some(text) = self.value(name) else { return default };
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse().ok().filter(|number| is_number && range.contains(number));
        number.unwrap_or_else(|| {
            self.error(name, format!("must be {} to {}", range.start(), range.end()));
            default
        })
    }

    /// `true` or `false`.
    pub fn flag(&mut self, name: &str) -> Option<bool> {
        let flag = self.value(name)?.parse().ok();
        if flag.is_none() {
            self.error(name, "must be true or false");
        }
        flag
    }

    /// The size of a page.
    pub fn limit(&mut self) -> i64 {
        self.number("limit", DEFAULT_LIMIT, 1..=MAX_LIMIT)
    }

    /// 422 with all errors, if there is one.
    pub fn finish(self) -> Result<(), Problem> {
        if self.errors.is_empty() { Ok(()) } else { Err(Problem::unprocessable(self.errors)) }
    }
}

/// All parameters in their order, decoded.
pub fn pairs(query: &str) -> Result<impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)>, Problem> {
    // The parser would replace invalid UTF-8 by U+FFFD.
    if percent_decode_str(query).decode_utf8().is_err() {
        return Err(Problem::bad_request("the query is not valid UTF-8"));
    }
    Ok(form_urlencoded::parse(query.as_bytes()))
}

/// A query of these parameters; one without a value is left out.
pub fn build(parameters: &[(&str, Option<&str>)]) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (name, value) in parameters {
        if let Some(value) = value {
            query.append_pair(name, value);
        }
    }
    query.finish()
}

#[derive(Serialize)]
struct Page<T> {
    items: Vec<T>,
    next: Option<String>,
}

/// One page of a list from up to `limit` + 1 items: the last one of these only shows that there are
/// more. `next` makes the path of the next page from the last item of this one.
pub fn page<T: Serialize>(
    mut items: Vec<T>,
    limit: i64,
    next: impl FnOnce(&T) -> String,
) -> Response {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(next);
    let link = next.as_ref().map(|path| format!("<{path}>; rel=\"next\""));
    let response = response::ok(&Page { items, next });
    match link {
        // RFC 8288.
        Some(link) => response.with_unique_header("Link", link),
        None => response,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(query: &str) -> String {
        let parse = || {
            let mut query = Query::parse(query, &["search", "limit", "after", "in_stock"])?;
            query.text("search", 3);
            query.limit();
            query.number("after", 0, 0..=i64::MAX);
            query.flag("in_stock");
            query.finish()
        };
        parse().err().map(|problem| problem.to_string()).unwrap_or_default()
    }

    #[test]
    fn each_parameter_has_its_range_and_is_given_once() {
        for (query, expected) in [
            ("search=%25&limit=100&after=7&other=x&other=y&in_stock=true", ""),
            ("search=", ""),
            ("limit=0&after=-1", "limit must be 1 to 100; after must be 0 to 9223372036854775807"),
            ("limit=101", "limit must be 1 to 100"),
            ("limit=", "limit must be 1 to 100"),
            ("limit=%2B1", "limit must be 1 to 100"),
            ("search=a&search=b", "search must be given once"),
            ("search=abcd", "search must be at most 3 characters"),
            ("search=%00", "search must not contain U+0000"),
            ("search=%ff", "the query is not valid UTF-8"),
            ("in_stock=1", "in_stock must be true or false"),
        ] {
            assert_eq!(errors(query), expected, "{query}");
        }
    }

    #[test]
    fn the_path_of_the_next_page_asks_the_same_question() {
        let query = build(&[("limit", Some("2")), ("search", Some("a=b&\"> 野%")), ("x", None)]);
        let mut parsed = Query::parse(&query, &["limit", "search", "x"]).unwrap();
        assert_eq!(parsed.text("search", 99).as_deref(), Some("a=b&\"> 野%"));
        assert_eq!((parsed.limit(), parsed.value("x")), (2, None));
    }
}
