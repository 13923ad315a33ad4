//! The HTTP API of movies.

use chassis::etag::{self, Precondition};
use chassis::router::{self, Params};
use chassis::{Problem, request as http, response};
use rouille::{Request, Response};
use serde::Serialize;

use super::list::{ListQuery, list_response};
use super::movie::{MovieUpdate, NewMovie};
use super::store::{self, Versioned, WriteOutcome};
use crate::App;

/// `GET /api/movies`
pub fn list(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let response = list_response(&app.db, ListQuery::parse(request.raw_query_string())?)?;
    Ok(response::no_cache(response))
}

/// `POST /api/movies`
pub fn create(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let new = NewMovie::from_json(&http::json_text(request)?)?;
    let created = app.db.write(|db| store::insert(db, &new))?.ok_or_else(no_id_left)?;
    let location = format!("/api/movies/{}", created.movie.id);
    Ok(with_etag(response::created(location, &created.movie), &created))
}

/// `DELETE /api/movies`
pub fn delete_all(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    // A client that means some movies (`?id=5`, `?title=Gone`) must not lose all of them.
    if !request.raw_query_string().is_empty() {
        let rule = "is not allowed: this request deletes all movies; delete one at /api/movies/ID";
        return Err(Problem::invalid_field("query", rule));
    }
    // The list has no entity tag, so a precondition that names one does not hold.
    if etag::precondition(request)?.if_match.is_some() {
        return Err(Problem::new(412, "the list of all movies has no entity tag"));
    }
    let deleted = app.db.write(store::delete_all)?;
    let message = format!("Successfully deleted all {deleted} movies.");
    Ok(response::ok(&AllDeleted { message, deleted }))
}

/// `GET /api/movies/{id}`
pub fn get(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let id = movie_id(params)?;
    let if_match = etag::if_match(request)?;
    let found = app.db.read(|db| store::select(db, id))?.ok_or_else(not_found)?;
    if if_match.is_some_and(|tags| !tags.contains(&found.version)) {
        return Err(precondition_failed());
    }
    if etag::matches_if_none_match(request, &found.version) {
        return Ok(with_etag(Response::empty_204().with_status_code(304), &found));
    }
    Ok(with_etag(response::ok(&found.movie), &found))
}

/// `PUT /api/movies/{id}`
pub fn update(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let id = movie_id(params)?;
    let update = MovieUpdate::from_json(&http::json_text(request)?)?;
    let precondition = etag::precondition(request)?;
    let outcome = app.db.write(|db| store::update(db, id, &update, &precondition))?;
    let updated = into_result(outcome)?;
    Ok(with_etag(response::ok(&updated.movie), &updated))
}

/// `DELETE /api/movies/{id}`
pub fn delete(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let id = movie_id(params)?;
    let precondition: Precondition = etag::precondition(request)?;
    into_result(app.db.write(|db| store::delete(db, id, &precondition))?)?;
    Ok(response::ok(&Deleted { message: "Movie was deleted successfully.", id }))
}

/// The response to the deletion of one movie.
#[derive(Serialize)]
struct Deleted {
    message: &'static str,
    id: i64,
}

/// The response to the deletion of all movies.
#[derive(Serialize)]
struct AllDeleted {
    message: String,
    deleted: i64,
}

/// The id in the path. A text that cannot be an id names no movie, so it is 404 and not 400.
fn movie_id(params: &Params) -> Result<i64, Problem> {
    router::positive_id(params).ok_or_else(not_found)
}

fn into_result<T>(outcome: WriteOutcome<T>) -> Result<T, Problem> {
    match outcome {
        WriteOutcome::Done(result) => Ok(result),
        WriteOutcome::PreconditionFailed => Err(precondition_failed()),
        WriteOutcome::NotFound => Err(not_found()),
    }
}

fn precondition_failed() -> Problem {
    Problem::new(412, "the movie has changed since")
}

/// After an import of the greatest possible id. It is no 503, because it does not pass by itself.
fn no_id_left() -> Problem {
    Problem::new(409, "no id is left for a new movie: an id of 9223372036854775807 was used")
}

fn not_found() -> Problem {
    Problem::not_found("Movie not found")
}

/// A movie may be kept by caches, if they ask each time whether it has changed.
fn with_etag(response: Response, versioned: &Versioned) -> Response {
    response::no_cache(response).with_etag_keep(format!("\"{}\"", versioned.version))
}
