//! `GET /api/movies`: what may be asked, and an answer of any size in bounded memory.
//!
//! A long list is read from the database page by page as the client takes it, with
//! no connection held in between, so that a slow reader costs one buffer and no more.
//! The pages are not one snapshot: a movie that is added, changed or deleted while
//! the list is on its way may be in it or not.

use std::borrow::Cow;
use std::io::{self, Read};
use std::ops::RangeInclusive;

use chassis::Problem;
use chassis::db::Pool;
use percent_encoding::percent_decode_str;
use rouille::{Response, ResponseBody};

use crate::store::{self, Statements, Wanted};

/// Most movies in one page from the database.
const PAGE_ROWS: i64 = 500;

/// A page ends with the movie whose text reaches this. More is faster with long texts,
/// and costs 256 slow clients more memory than there is.
const PAGE_BYTES: i64 = 24 << 10;

/// How often a page is tried once the answer has begun: nobody is told "try again"
/// then, so a busy pool or a restart of the database is rather waited out a little.
const TRIES: u32 = 3;

/// What a client may ask for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Query {
    /// Only titles that contain this.
    title: Option<String>,
    /// At most so many.
    limit: Option<i64>,
    /// Only ids above this one.
    after: i64,
}

impl Query {
    /// Reads the part of the URL behind `?`. Parameters with other names are ignored.
    pub fn parse(query: &str) -> Result<Query, Problem> {
        // The parser below would put U+FFFD for what is no UTF-8 and go on.
        if percent_decode_str(query).decode_utf8().is_err() {
            return Err(Problem::bad_request("the query is not valid UTF-8"));
        }
        let (mut title, mut limit, mut after) = (None, None, None);
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
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
        let mut faults = Vec::new();
        let mut fault = |field: &str, rule: &str| faults.push((field.to_owned(), rule.to_owned()));
        if title.as_ref().is_some_and(|title| title.contains('\0')) {
            fault("title", "must not contain U+0000");
        }
        let limit = number(limit, 1..=1000).unwrap_or_else(|()| {
            fault("limit", "must be 1 to 1000");
            None
        });
        let after = number(after, 0..=i64::MAX).unwrap_or_else(|()| {
            fault("after", "must be 0 to 9223372036854775807");
            None
        });
        if !faults.is_empty() {
            return Err(Problem::unprocessable(faults));
        }
        // Every title contains the empty text.
        let title = title.map(Cow::into_owned).filter(|title| !title.is_empty());
        Ok(Query { title, limit, after: after.unwrap_or(0) })
    }

    /// The `Link` to the page behind this id.
    fn next(&self, limit: i64, after: i64) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("limit", &limit.to_string()).append_pair("after", &after.to_string());
        if let Some(title) = &self.title {
            query.append_pair("title", title);
        }
        format!("</api/movies?{}>; rel=\"next\"", query.finish())
    }
}

/// A number in plain digits; absent is none.
fn number(text: Option<Cow<str>>, range: RangeInclusive<i64>) -> Result<Option<i64>, ()> {
    let Some(text) = text else { return Ok(None) };
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(());
    }
    text.parse().ok().filter(|number| range.contains(number)).map(Some).ok_or(())
}

/// The list. The first page is read now, so that a database that is away is a 503;
/// if it goes away later the answer breaks off, and cannot be taken for a whole one.
pub fn answer(db: &Pool<Statements>, query: Query) -> Result<Response, Problem> {
    let mut list = List {
        db: db.clone(),
        after: query.after,
        until: i64::MAX,
        left: query.limit.unwrap_or(i64::MAX),
        separator: b'[',
        buffer: Vec::new(),
        taken: 0,
        whole: false,
        query,
    };
    let more = list.fetch()?;
    let mut response = Response::from_data("application/json; charset=utf-8", Vec::new());
    if let Some(limit) = list.query.limit {
        // The link goes ahead of the body, so the end must be known now.
        let next = if list.whole { more.then_some(list.after) } else { list.find_end()? };
        if let Some(after) = next {
            response = response.with_unique_header("Link", list.query.next(limit, after));
        }
    }
    response.data = if list.whole {
        ResponseBody::from_data(list.buffer)
    } else {
        ResponseBody::from_reader(list)
    };
    Ok(response)
}

/// A list on its way, as JSON.
struct List {
    db: Pool<Statements>,
    query: Query,
    /// The last id that came.
    after: i64,
    /// The last id that may come.
    until: i64,
    /// How many movies may still come.
    left: i64,
    /// What stands before the next movie.
    separator: u8,
    /// The page that the client is taking.
    buffer: Vec<u8>,
    /// How much of it is taken.
    taken: usize,
    /// Whether it is the last.
    whole: bool,
}

impl List {
    /// Puts the next page in the buffer; tells whether the database has more.
    fn fetch(&mut self) -> Result<bool, Problem> {
        // Given back before the wait for a connection, and the new one made while it
        // is held: so no more pages are in memory twice than there are connections.
        self.buffer = Vec::new();
        self.taken = 0;
        let wanted = Wanted {
            after: self.after,
            until: self.until,
            rows: PAGE_ROWS.min(self.left),
            bytes: PAGE_BYTES,
            title: self.query.title.as_deref(),
        };
        let separator = self.separator;
        let ask = |db: &mut store::Db| Ok(render(separator, &store::page(db, &wanted)?));
        // Whoever asks for a little must not stand behind hundreds of pages of long lists.
        let begun = separator == b',';
        let page = if begun { self.db.read_background(ask) } else { self.db.read(ask) }?;
        self.buffer = page.json.map_err(|err| Problem::internal().with_cause(err))?;
        self.left -= page.movies;
        if let Some(last) = page.last {
            self.after = last;
            self.separator = b',';
        }
        self.whole = !page.more || self.left == 0;
        if self.whole {
            if self.separator == b'[' {
                self.buffer.push(b'[');
            }
            self.buffer.push(b']');
        }
        Ok(page.more)
    }

    /// Finds out where a limited list will end, and the id behind which another
    /// one would go on, if there is more.
    fn find_end(&mut self) -> Result<Option<i64>, Problem> {
        let title = self.query.title.as_deref();
        let ids = self.db.read(|db| store::ids(db, self.after, self.left + 1, title))?;
        let fits = usize::try_from(self.left).unwrap_or(usize::MAX).min(ids.len());
        self.until = ids[..fits].last().copied().unwrap_or(self.after);
        Ok((ids.len() > fits).then_some(self.until))
    }
}

impl Read for List {
    /// An error means that the rest is lost: the answer must not end as if whole.
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.buffer.len() && !self.whole {
            let mut tries = 1;
            while let Err(problem) = self.fetch() {
                if problem.status() != 503 || tries == TRIES {
                    return Err(io::Error::other(problem.to_string()));
                }
                tries += 1;
            }
        }
        let read = (&self.buffer[self.taken..]).read(out)?;
        self.taken += read;
        Ok(read)
    }
}

/// What is kept of a page from the database.
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
        // A slow client keeps it for long.
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
        let first = Query::parse(query).unwrap();
        assert_eq!(first.title.as_deref(), Some("a=b&\"> 野%"));
        let link = first.next(7, 41);
        assert_eq!(
            link,
            "</api/movies?limit=7&after=41&title=a%3Db%26%22%3E+%E9%87%8E%25>; rel=\"next\""
        );
        let (_, query) = link.split_once('?').unwrap();
        let (query, _) = query.split_once('>').unwrap();
        assert_eq!(Query::parse(query).unwrap(), Query { after: 41, ..first });
    }
}
