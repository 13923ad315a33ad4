//! The HTTP API of accounts.

use chassis::auth::{Principal, Revocation};
use chassis::db::in_transaction;
use chassis::etag;
use chassis::fields::Errors;
use chassis::query::Query;
use chassis::router::Params;
use chassis::{Problem, request as http, response};
use rouille::{Request, Response};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::list::{ListQuery, list_response};
use super::store::{self, Credentials, Login, Outcome};
use super::user::{NewUser, UserUpdate};
use crate::passwords::check_new;
use crate::sessions::store as sessions;
use crate::{App, client_address};

#[derive(Deserialize)]
struct RawPassword<'b> {
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    current_password: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    new_password: Option<&'b RawValue>,
}

#[derive(Serialize)]
struct Exists {
    exists: bool,
}

/// `POST /api/v1/users`
pub fn register(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let new = NewUser::from_json(&http::json_text(request)?)?;
    let username = new.profile.username.as_deref();
    // Before the password is hashed, which takes a while. Another registration may still be faster.
    match app.db.read(|db| store::exists(db, Some(&new.email), username))? {
        (true, _) => return Err(email_taken()),
        (_, true) => return Err(username_taken()),
        _ => (),
    }
    let hash = app.passwords.turn()?.hash(&new.password)?;
    let created = into_result(app.db.write(|db| store::insert(db, &new, &hash, false))?)?;
    let location = format!("/api/v1/users/{}", created.user.id);
    Ok(with_etag(response::created(location, &created.user), &created.version))
}

/// `GET /api/v1/users`
pub fn list(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    app.auth.principal(request)?.require_admin()?;
    list_response(app, &ListQuery::parse(request.raw_query_string())?)
}

/// `GET /api/v1/users/exists`
pub fn exists(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let mut query = Query::parse(request.raw_query_string(), &["email", "username"])?;
    let (email, username) = (query.value("email"), query.value("username"));
    if email.is_some() == username.is_some() {
        return Err(Problem::invalid_field("query", "must have either email or username"));
    }
    let (by_email, by_username) =
        app.db.read(|db| store::exists(db, email.as_deref(), username.as_deref()))?;
    Ok(response::ok(&Exists { exists: by_email || by_username }))
}

/// `GET /api/v1/users/{id or me}`
pub fn get(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let (_, id) = account(app, request, params)?;
    let if_match = etag::if_match(request)?;
    let found = app.db.read(|db| store::select(db, id))?.ok_or_else(not_found)?;
    if if_match.is_some_and(|tags| !tags.contains(&found.version)) {
        return Err(precondition_failed());
    }
    if etag::matches_if_none_match(request, &found.version) {
        return Ok(with_etag(Response::empty_204().with_status_code(304), &found.version));
    }
    Ok(with_etag(response::ok(&found.user), &found.version))
}

/// `PATCH /api/v1/users/{id or me}`
pub fn update(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let (principal, id) = account(app, request, params)?;
    let update = UserUpdate::from_json(&http::json_text(request)?)?;
    let precondition = etag::precondition(request)?;
    if update.is_admin.is_some() {
        principal.require_admin()?;
    }
    if update.email.is_some() && id == principal.user_id {
        verify_own_password(app, request, id, update.current_password.as_deref())?;
    }
    let (outcome, ended) = app.db.write(|db| {
        in_transaction(db, |db| {
            let outcome = store::update(db, id, &update, &precondition)?;
            // The role is in the access tokens, so those of before must not be accepted.
            let ended = match &outcome {
                Outcome::Done(updated) if updated.role_changed => {
                    sessions::end_all(db, id, None, &app.lifetimes)?
                }
                _ => Vec::new(),
            };
            Ok((outcome, ended))
        })
    })?;
    app.auth.end_sessions(&ended);
    let updated = into_result(outcome)?.versioned;
    Ok(with_etag(response::ok(&updated.user), &updated.version))
}

/// `DELETE /api/v1/users/{id or me}`
pub fn delete(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let (_, id) = account(app, request, params)?;
    let precondition = etag::precondition(request)?;
    let (outcome, ended) = app.db.write(|db| {
        in_transaction(db, |db| {
            let outcome = store::delete(db, id, &precondition)?;
            let ended = match outcome {
                Outcome::Done(()) => sessions::end_all(db, id, None, &app.lifetimes)?,
                _ => Vec::new(),
            };
            Ok((outcome, ended))
        })
    })?;
    app.auth.end_sessions(&ended);
    into_result(outcome)?;
    Ok(Response::empty_204())
}

/// `PUT /api/v1/users/{id or me}/password`
pub fn set_password(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let (principal, id) = account(app, request, params)?;
    let text = http::json_text(request)?;
    let body: RawPassword<'_> = http::json_object(&text)?;
    let is_own = id == principal.user_id;
    let mut errors = Errors::default();
    let current = match is_own {
        true => errors.required_text(body.current_password, "current_password", Ok),
        false => String::new(),
    };
    let user = app.db.read(|db| store::credentials(db, &Login::Id(id)))?.ok_or_else(not_found)?;
    let own: Vec<&str> = user.own_names.iter().map(String::as_str).collect();
    let new = errors.required_text(body.new_password, "new_password", |text| {
        check_new(&text, &own).map(|()| text)
    });
    errors.into_result()?;
    if is_own {
        verify(app, request, &user, &current)?;
    }
    let hash = app.passwords.turn()?.hash(&new)?;
    // The owner stays logged in here; another login may be the reason for the change.
    let kept = is_own.then_some(principal.session_id);
    let ended: Option<Vec<Revocation>> = app.db.write(|db| {
        in_transaction(db, |db| {
            // Where the owner gave the current password, it must still be the current one.
            let old = is_own.then_some(user.password_hash.as_str());
            match store::set_password_hash(db, id, old, &hash)? {
                true => sessions::end_all(db, id, kept, &app.lifetimes).map(Some),
                false => Ok(None),
            }
        })
    })?;
    let ended = ended.ok_or_else(|| Problem::new(409, "the account has changed meanwhile"))?;
    app.auth.end_sessions(&ended);
    Ok(Response::empty_204())
}

/// Who asks, and which account the path names: one's own, or any for an administrator. For others
/// an account that is not theirs does not exist.
fn account(app: &App, request: &Request, params: &Params) -> Result<(Principal, i64), Problem> {
    let principal = app.auth.principal(request)?;
    let id = match params.first() {
        Some(&"me") => principal.user_id,
        _ => chassis::router::positive_id(params).ok_or_else(not_found)?,
    };
    match principal.is_admin || id == principal.user_id {
        true => Ok((principal, id)),
        false => Err(not_found()),
    }
}

fn verify_own_password(
    app: &App,
    request: &Request,
    id: i64,
    password: Option<&str>,
) -> Result<(), Problem> {
    let Some(password) = password else {
        let rule = "is required to change the e-mail address";
        return Err(Problem::invalid_field("current_password", rule));
    };
    let user = app.db.read(|db| store::credentials(db, &Login::Id(id)))?.ok_or_else(not_found)?;
    verify(app, request, &user, password)
}

/// 403 where it is not the password of the account. A failure counts as one of a login does, for the
/// account and for the address of the client.
fn verify(app: &App, request: &Request, user: &Credentials, password: &str) -> Result<(), Problem> {
    // Neither an e-mail address nor a user name that is sent to a login has this form.
    let account = format!("\0{}", user.id);
    let client = client_address(request);
    app.throttle.check(&account, client)?;
    let turn = app.passwords.turn()?;
    // Again: others may have failed while this one waited for its turn.
    app.throttle.check(&account, client)?;
    if turn.verify(password, Some(&user.password_hash))?.matches {
        app.throttle.succeeded(&account, client);
        return Ok(());
    }
    app.throttle.failed(&account, client);
    Err(Problem::new(403, "the current password is wrong"))
}

fn into_result<T>(outcome: Outcome<T>) -> Result<T, Problem> {
    match outcome {
        Outcome::Done(result) => Ok(result),
        Outcome::NotFound => Err(not_found()),
        Outcome::PreconditionFailed => Err(precondition_failed()),
        Outcome::EmailTaken => Err(email_taken()),
        Outcome::UsernameTaken => Err(username_taken()),
        Outcome::LastAdministrator => {
            Err(Problem::new(409, "this is the last administrator: there must be one"))
        }
    }
}

fn email_taken() -> Problem {
    Problem::new(409, "an account has this e-mail address already")
}

fn username_taken() -> Problem {
    Problem::new(409, "an account has this user name already")
}

fn not_found() -> Problem {
    Problem::not_found("there is no such user")
}

fn precondition_failed() -> Problem {
    Problem::new(412, "the user has changed since")
}

/// What is one person's is kept by no cache: the server sends `no-store`.
fn with_etag(response: Response, version: &str) -> Response {
    response.with_etag_keep(format!("\"{version}\""))
}
