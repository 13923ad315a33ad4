//! The HTTP side: which request means what, and what is answered.

use chassis::router::{self, Params, Route, route};
use chassis::{Problem, health, request, response};
use rouille::{Request, Response};

use crate::App;
use crate::etag;
use crate::list::{self, Query};
use crate::movie::{Change, NewMovie};
use crate::store::{self, Outcome, Versioned};

/// The table of routes.
pub const ROUTES: &[Route<App>] = &[
    route("GET", "/api/movies", list),
    route("POST", "/api/movies", add),
    route("DELETE", "/api/movies", delete_all),
    route("GET", "/api/movies/{id}", show),
    route("PUT", "/api/movies/{id}", change),
    route("DELETE", "/api/movies/{id}", delete),
    route("GET", "/health", live),
    route("GET", "/health/ready", ready),
];

fn list(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    list::answer(&app.db, Query::parse(request.raw_query_string())?)
}

fn add(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let new = NewMovie::from_json(&request::json_text(request)?)?;
    let added = app.db.write(|db| store::add(db, &new))?;
    let location = format!("/api/movies/{}", added.movie.id);
    Ok(tagged(response::created(location, &added.movie), &added))
}

fn delete_all(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    // The list has no tag, so a condition that names one does not hold.
    if etag::condition(request)?.these.is_some() {
        return Err(Problem::new(412, "the list of all movies has no entity tag"));
    }
    let deleted = app.db.write(store::delete_all)?;
    Ok(response::ok(&AllDeleted {
        message: format!("Successfully deleted all {deleted} movies."),
        deleted,
    }))
}

fn show(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let id = id(params)?;
    let found = app.db.read(|db| store::find(db, id))?.ok_or_else(not_found)?;
    if etag::is_known(request, &found.version) {
        return Ok(tagged(Response::empty_204().with_status_code(304), &found));
    }
    Ok(tagged(response::ok(&found.movie), &found))
}

fn change(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let id = id(params)?;
    let change = Change::from_json(&request::json_text(request)?)?;
    let condition = etag::condition(request)?;
    let outcome = app.db.write(|db| store::change(db, id, &change, &condition))?;
    let changed = done(outcome)?;
    Ok(tagged(response::ok(&changed.movie), &changed))
}

fn delete(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let id = id(params)?;
    let condition = etag::condition(request)?;
    done(app.db.write(|db| store::delete(db, id, &condition))?)?;
    Ok(response::ok(&Deleted { message: "Movie was deleted successfully.", id }))
}

fn live(_: &App, _: &Request, _: &Params) -> Result<Response, Problem> {
    Ok(health::liveness())
}

fn ready(app: &App, _: &Request, _: &Params) -> Result<Response, Problem> {
    Ok(health::readiness(&app.probes))
}

/// The answer to the deletion of one movie.
#[derive(serde::Serialize)]
struct Deleted {
    message: &'static str,
    id: i64,
}

/// The answer to the deletion of all.
#[derive(serde::Serialize)]
struct AllDeleted {
    message: String,
    deleted: i64,
}

/// What cannot be an id is the name of nothing, so it is no malformed request.
fn id(params: &Params) -> Result<i64, Problem> {
    router::positive_id(params).ok_or_else(not_found)
}

fn done<T>(outcome: Outcome<T>) -> Result<T, Problem> {
    match outcome {
        Outcome::Done(result) => Ok(result),
        Outcome::Stale => Err(Problem::new(412, "the movie has changed since")),
        Outcome::Missing => Err(not_found()),
    }
}

fn not_found() -> Problem {
    Problem::not_found("Movie not found")
}

fn tagged(response: Response, versioned: &Versioned) -> Response {
    response.with_etag_keep(format!("\"{}\"", versioned.version))
}
