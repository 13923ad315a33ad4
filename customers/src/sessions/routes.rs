//! The HTTP API of sessions: login, refresh, logout, one's own sessions.

use std::net::IpAddr;

use chassis::auth::{Principal, Revocation};
use chassis::db::in_transaction;
use chassis::fields::Errors;
use chassis::router::Params;
use chassis::{Problem, request as http, response};
use rouille::{Request, Response};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::store::{self, Rotation, Session};
use super::tokens::{RefreshToken, Subject};
use crate::users::fields::comparison_key;
use crate::users::store::{self as users, Credentials, Login};
use crate::users::user::User;
use crate::{App, client_address, unix_now};

/// One text for all reasons: it does not show which accounts exist.
const WRONG_LOGIN: &str = "the e-mail address, user name or password is wrong";

/// How often a login is attempted whose account is changed meanwhile: its password, or only the hash
/// of it, by another login after the parameters have changed.
const MAX_LOGIN_ATTEMPTS: u32 = 3;

/// The fields of a login and of a refresh, not yet checked.
#[derive(Deserialize)]
struct RawLogin<'b> {
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    email: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    username: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    password: Option<&'b RawValue>,
}

#[derive(Deserialize)]
struct RawRefresh<'b> {
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    refresh_token: Option<&'b RawValue>,
}

/// A pair of tokens (RFC 6749 section 5.1).
#[derive(Serialize)]
struct Tokens {
    access_token: String,
    token_type: &'static str,
    expires_in: i64,
    refresh_token: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<User>,
}

#[derive(Serialize)]
struct CurrentSession {
    user: User,
    session: Session,
}

#[derive(Serialize)]
struct SessionList {
    items: Vec<Session>,
    next: Option<String>,
}

/// `POST /api/v1/auth/login`
pub fn login(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let (login, password) = parse_login(&http::json_text(request)?)?;
    let client = client_address(request);
    for _ in 0..MAX_LOGIN_ATTEMPTS {
        let user = verify_login(app, &login, &password, client)?;
        if let Some(begun) = begin_session(app, &user)? {
            return Ok(begun);
        }
    }
    Err(Problem::unavailable("the account is being changed; try again in a moment"))
}

/// The account of a login, if the password is right; its hash is made again where the parameters
/// have changed.
fn verify_login(
    app: &App,
    login: &Login,
    password: &str,
    client: IpAddr,
) -> Result<Credentials, Problem> {
    let account = match login {
        Login::Email(key) | Login::Username(key) => key.clone(),
        Login::Id(id) => id.to_string(),
    };
    app.throttle.check(&account, client)?;
    let found = app.db.read(|db| users::credentials(db, login))?;
    let turn = app.passwords.turn()?;
    // Again: others may have failed while this one waited for its turn.
    app.throttle.check(&account, client)?;
    let stored = found.as_ref().map(|found| found.password_hash.as_str());
    let verdict = turn.verify(password, stored)?;
    let Some(mut user) = found.filter(|found| verdict.matches && !found.disabled) else {
        app.throttle.failed(&account, client);
        return Err(invalid_grant(WRONG_LOGIN));
    };
    app.throttle.succeeded(&account, client);
    let rehashed = match verdict.needs_rehash {
        true => Some(turn.hash(password)?),
        false => None,
    };
    drop(turn);
    if let Some(hash) = rehashed {
        let old = Some(user.password_hash.as_str());
        app.db.write(|db| users::set_password_hash(db, user.id, old, &hash))?;
        user.password_hash = hash;
    }
    Ok(user)
}

/// `None` where the account has changed since its password was verified.
fn begin_session(app: &App, user: &Credentials) -> Result<Option<Response>, Problem> {
    let token = RefreshToken::generate().map_err(|err| Problem::internal().with_cause(err))?;
    let session_id = Uuid::now_v7();
    let hash = token.hash();
    let begun = app.db.write(|db| {
        in_transaction(db, |db| match store::insert(db, session_id, user, &hash, &app.lifetimes)? {
            Some(subject) => Ok(users::select(db, user.id)?.map(|user| (subject, user.user))),
            None => Ok(None),
        })
    })?;
    Ok(begun.map(|(subject, user)| response::ok(&tokens(app, &subject, &token, Some(user)))))
}

/// `POST /api/v1/auth/refresh`
pub fn refresh(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let text = http::json_text(request)?;
    let body: RawRefresh<'_> = http::json_object(&text)?;
    let mut errors = Errors::default();
    let sent = errors.required_text(body.refresh_token, "refresh_token", Ok);
    errors.into_result()?;
    let invalid = || invalid_grant("the refresh token is not valid");
    let old = RefreshToken::parse(&sent).ok_or_else(invalid)?;
    let new = RefreshToken::generate().map_err(|err| Problem::internal().with_cause(err))?;
    let (old_hash, new_hash) = (old.hash(), new.hash());
    match app.db.write(|db| store::rotate(db, &old_hash, &new_hash, &app.lifetimes))? {
        Rotation::Done(subject) => Ok(response::ok(&tokens(app, &subject, &new, None))),
        Rotation::Unknown => Err(invalid()),
        Rotation::Reused(ended) => {
            app.auth.end_sessions(&ended);
            log::warn!("a spent refresh token was used again: its session has ended");
            Err(invalid())
        }
    }
}

/// `POST /api/v1/auth/logout`: the session of the access token ends; again: 204.
pub fn logout(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal_of_any_session(request)?;
    let Principal { user_id, session_id, .. } = principal;
    let ended = app.db.write(|db| store::end(db, session_id, user_id, &app.lifetimes))?;
    app.auth.end_sessions(&ended);
    Ok(Response::empty_204())
}

/// `GET /api/v1/auth/session`
pub fn current(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    let Principal { user_id, session_id, .. } = principal;
    let found = app.db.read(|db| {
        let session = store::list(db, user_id, Some(session_id), session_id)?.pop();
        Ok((users::select(db, user_id)?, session))
    })?;
    match found {
        (Some(user), Some(session)) => {
            Ok(response::ok(&CurrentSession { user: user.user, session }))
        }
        // It has expired, or ended a moment ago.
        _ => Err(session_ended()),
    }
}

/// `GET /api/v1/auth/sessions`
pub fn list(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let Principal { user_id, session_id, .. } = app.auth.principal(request)?;
    let items = app.db.read(|db| store::list(db, user_id, None, session_id))?;
    Ok(response::ok(&SessionList { items, next: None }))
}

/// `DELETE /api/v1/auth/sessions`: all of one's own, the one of this request too.
pub fn end_all(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let Principal { user_id, .. } = app.auth.principal(request)?;
    let ended = app.db.write(|db| store::end_all(db, user_id, None, &app.lifetimes))?;
    app.auth.end_sessions(&ended);
    Ok(Response::empty_204())
}

/// `DELETE /api/v1/auth/sessions/{id}`
pub fn end_one(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let Principal { user_id, .. } = app.auth.principal(request)?;
    let not_found = || Problem::not_found("there is no such session");
    let id: Uuid = params.first().and_then(|id| id.parse().ok()).ok_or_else(not_found)?;
    let ended: Vec<Revocation> = app.db.write(|db| store::end(db, id, user_id, &app.lifetimes))?;
    if ended.is_empty() {
        return Err(not_found());
    }
    app.auth.end_sessions(&ended);
    Ok(Response::empty_204())
}

fn parse_login(text: &str) -> Result<(Login, String), Problem> {
    let body: RawLogin<'_> = http::json_object(text)?;
    let mut errors = Errors::default();
    let password = errors.required_text(body.password, "password", Ok);
    let login = match (body.email, body.username) {
        (Some(_), Some(_)) => {
            errors.add("username", "must not be given beside email");
            None
        }
        (None, Some(name)) => {
            let name = errors.required_text(Some(name), "username", Ok);
            Some(Login::Username(comparison_key(&name)))
        }
        (email, None) => {
            let email = errors.required_text(email, "email", Ok);
            Some(Login::Email(comparison_key(&email)))
        }
    };
    errors.into_result()?;
    let login = login.ok_or_else(|| Problem::invalid_field("email", "is required"))?;
    Ok((login, password))
}

fn tokens(app: &App, subject: &Subject, refresh: &RefreshToken, user: Option<User>) -> Tokens {
    let (access_token, expires_in) = app.issuer.access_token(subject, unix_now());
    let refresh_token = refresh.expose();
    Tokens { access_token, token_type: "Bearer", expires_in, refresh_token, user }
}

/// 401 for credentials that are not valid (the code of RFC 6749 section 5.2).
fn invalid_grant(detail: &str) -> Problem {
    Problem::new(401, detail).with_header("WWW-Authenticate", "Bearer error=\"invalid_grant\"")
}

fn session_ended() -> Problem {
    Problem::new(401, "the session has ended")
        .with_header("WWW-Authenticate", "Bearer error=\"invalid_token\"")
}
