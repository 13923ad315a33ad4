//! `GET /api/movies`: its parameters, and a response of any length in bounded memory.
//!
//! A long list is read from the database page by page, as fast as the client reads it, and without
//! holding a connection in between: a slow client costs one buffer. The pages are not one snapshot: a
//! movie that is added, changed or deleted meanwhile may or may not be in the list.

use std::borrow::Cow;
use std::io::{self, Read};
use std::ops::RangeInclusive;

use chassis::Problem;
use chassis::db::Pool;
use chassis::query;
use rouille::{Response, ResponseBody};

use super::store::{self, PageQuery};
use crate::{Db, Statements};

/// Most movies in one page from the database.
const PAGE_ROWS: i64 = 500;

/// A page ends with the movie whose text reaches this many bytes. A larger page is faster with long
/// texts, but 256 slow clients would take more memory than there is.
const PAGE_BYTES: i64 = 24 << 10;

/// How often a page is fetched once the response has begun. The status is sent by then and cannot
/// become 503, so a busy pool or a restart of the database is waited out for a short time.
const MAX_FETCH_ATTEMPTS: u32 = 3;

/// The parameters of the list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ListQuery {
    /// Only titles that contain this.
    title: Option<String>,
    /// At most this many.
    limit: Option<i64>,
    /// Only ids above this one.
    after: i64,
}

impl ListQuery {
    /// Parses the part of the URL after `?`. Parameters with other names are ignored.
    pub fn parse(query: &str) -> Result<ListQuery, Problem> {
        let (mut title, mut limit, mut after) = (None, None, None);
        for (name, value) in query::pairs(query)? {
            let known = match &*name {
                "title" => &mut title,
                "limit" => &mut limit,
                "after" => &mut after,
                _ => continue,
            };
            if known.replace(value).is_some() {
                return Err(Problem::invalid_field(&name, "must be given once"));
            }
        }
        let mut errors = Vec::new();
        let mut error = |field: &str, rule: &str| errors.push((field.to_owned(), rule.to_owned()));
        if title.as_ref().is_some_and(|title| title.contains('\0')) {
            error("title", "must not contain U+0000");
        }
        let limit = parse_integer(limit, 1..=1000).unwrap_or_else(|()| {
            error("limit", "must be 1 to 1000");
            None
        });
        let after = parse_integer(after, 0..=i64::MAX).unwrap_or_else(|()| {
            error("after", "must be 0 to 9223372036854775807");
            None
        });
        if !errors.is_empty() {
            return Err(Problem::unprocessable(errors));
        }
        // Every title contains the empty text, so it is no filter.
        let title = title.map(Cow::into_owned).filter(|title| !title.is_empty());
        Ok(ListQuery { title, limit, after: after.unwrap_or(0) })
    }

    /// The `Link` to the page after this id.
    fn next(&self, limit: i64, after: i64) -> String {
        let (limit, after) = (limit.to_string(), after.to_string());
        let parameters = [
            ("limit", Some(limit.as_str())),
            ("after", Some(&after)),
            ("title", self.title.as_deref()),
        ];
        format!("</api/movies?{}>; rel=\"next\"", query::build(&parameters))
    }
}

/// A number in digits only; `None` where it is absent.
fn parse_integer(text: Option<Cow<str>>, range: RangeInclusive<i64>) -> Result<Option<i64>, ()> {
    let Some(text) = text else { return Ok(None) };
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(());
    }
    text.parse().ok().filter(|number| range.contains(number)).map(Some).ok_or(())
}

/// The response. The first page is read now, so that a database that is away is 503. If it goes away
/// later, the response breaks off, and a client cannot take it for a complete one.
pub fn list_response(db: &Pool<Statements>, query: ListQuery) -> Result<Response, Problem> {
    let mut list = MovieStream {
        db: db.clone(),
        after: query.after,
        last_id: i64::MAX,
        remaining: query.limit.unwrap_or(i64::MAX),
        separator: b'[',
        buffer: Vec::new(),
        offset: 0,
        complete: false,
        query,
    };
    let more = list.fetch_page()?;
    let mut response = Response::from_data("application/json; charset=utf-8", Vec::new());
    if let Some(limit) = list.query.limit {
        // The header is sent before the body, so the end of the page must be known now.
        let next = if list.complete { more.then_some(list.after) } else { list.find_page_end()? };
        if let Some(after) = next {
            response = response.with_unique_header("Link", list.query.next(limit, after));
        }
    }
    response.data = if list.complete {
        ResponseBody::from_data(list.buffer)
    } else {
        ResponseBody::from_reader(list)
    };
    Ok(response)
}

/// A list that is being sent, as JSON.
struct MovieStream {
    db: Pool<Statements>,
    query: ListQuery,
    /// The last id that was fetched.
    after: i64,
    /// The last id of the list.
    last_id: i64,
    /// How many movies may still be fetched.
    remaining: i64,
    /// What is written before the next movie.
    separator: u8,
    /// The page that the client is reading.
    buffer: Vec<u8>,
    /// How much of it was read.
    offset: usize,
    /// Whether it is the last page.
    complete: bool,
}

impl MovieStream {
    /// Fetches the next page into the buffer; returns whether the database has more.
    fn fetch_page(&mut self) -> Result<bool, Problem> {
        // The old page is freed before the wait for a connection, and the new one is rendered while
        // the connection is held: so not more pages exist twice than there are connections.
        self.buffer = Vec::new();
        self.offset = 0;
        let page_query = PageQuery {
            after: self.after,
            until: self.last_id,
            rows: PAGE_ROWS.min(self.remaining),
            bytes: PAGE_BYTES,
            title: self.query.title.as_deref(),
        };
        let separator = self.separator;
        let ask = |db: &mut Db| Ok(render(separator, &store::page(db, &page_query)?));
        // Queries of short requests overtake the later pages of long lists.
        let is_later_page = separator == b',';
        let page = if is_later_page { self.db.read_background(ask) } else { self.db.read(ask) }?;
        self.buffer = page.json.map_err(|err| Problem::internal().with_cause(err))?;
        self.remaining -= page.movies;
        if let Some(last) = page.last {
            self.after = last;
            self.separator = b',';
        }
        self.complete = !page.more || self.remaining == 0;
        if self.complete {
            if self.separator == b'[' {
                self.buffer.push(b'[');
            }
            self.buffer.push(b']');
        }
        Ok(page.more)
    }

    /// Finds the last id of a limited list, and the id after which the next page begins, if there is
    /// one.
    fn find_page_end(&mut self) -> Result<Option<i64>, Problem> {
        let title = self.query.title.as_deref();
        let ids = self.db.read(|db| store::ids(db, self.after, self.remaining + 1, title))?;
        let fits = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(ids.len());
        self.last_id = ids[..fits].last().copied().unwrap_or(self.after);
        Ok((ids.len() > fits).then_some(self.last_id))
    }
}

impl Read for MovieStream {
    /// An error ends the response early: it must not look complete.
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.offset == self.buffer.len() && !self.complete {
            let mut tries = 1;
            while let Err(problem) = self.fetch_page() {
                if problem.status() != 503 || tries == MAX_FETCH_ATTEMPTS {
                    return Err(io::Error::other(problem.to_string()));
                }
                tries += 1;
            }
        }
        let read = (&self.buffer[self.offset..]).read(out)?;
        self.offset += read;
        Ok(read)
    }
}

/// A page from the database as JSON.
struct Rendered {
    json: serde_json::Result<Vec<u8>>,
    movies: i64,
    last: Option<i64>,
    more: bool,
}

/// The movies with a comma between them, and `first` before them.
fn render(first: u8, page: &store::Page) -> Rendered {
    let json = || {
        let mut json = Vec::new();
        for (place, movie) in page.movies.iter().enumerate() {
            json.push(if place == 0 { first } else { b',' });
            serde_json::to_writer(&mut json, movie)?;
        }
        // A slow client occupies it for long.
        json.shrink_to_fit();
        Ok(json)
    };
    Rendered {
        json: json(),
        movies: page.movies.len() as i64,
        last: page.movies.last().map(|movie| movie.id),
        more: page.more,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_to_the_next_page_asks_the_same_question() {
        let query = "title=a%3Db%26%22%3E+%E9%87%8E%25&limit=7&after=3";
        let first = ListQuery::parse(query).unwrap();
        assert_eq!(first.title.as_deref(), Some("a=b&\"> 野%"));
        let link = first.next(7, 41);
        assert_eq!(
            link,
            "</api/movies?limit=7&after=41&title=a%3Db%26%22%3E+%E9%87%8E%25>; rel=\"next\""
        );
        let (_, query) = link.split_once('?').unwrap();
        let (query, _) = query.split_once('>').unwrap();
        assert_eq!(ListQuery::parse(query).unwrap(), ListQuery { after: 41, ..first });
    }
}
