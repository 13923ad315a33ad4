//! From a request to its user, or to the problem that refuses it (RFC 6750).

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rouille::Request;

use super::feed::{Feed, Revocation, Source};
use super::token::{TokenError, is_expired, verify};
use super::verified_tokens::{TokenHash, VerifiedTokens};
use super::{Config, Principal};
use crate::problem::Problem;
use crate::request::single_header;
use crate::stop::Stop;

/// Verifies the access tokens of requests.
#[derive(Clone)]
pub struct Authenticator(Arc<Shared>);

struct Shared {
    config: Config,
    feed: Arc<Feed>,
    verified: VerifiedTokens,
}

impl Authenticator {
    /// Starts the thread that keeps keys and ended sessions up to date. Until it has both, requests
    /// that need a token get 503.
    pub fn new(config: Config, source: impl Source, stop: &Stop) -> anyhow::Result<Authenticator> {
        let feed = Arc::new(Feed::new());
        feed.follow(&config, source, stop)?;
        Ok(Authenticator(Arc::new(Shared { config, feed, verified: VerifiedTokens::new() })))
    }

    /// The user of a request. Without a valid access token, or with one of a session that has ended,
    /// 401; 400 where the header `Authorization` is repeated; 503 where it is not known which
    /// sessions have ended.
    pub fn principal(&self, request: &Request) -> Result<Principal, Problem> {
        let principal = self.principal_of_any_session(request)?;
        if self.0.feed.has_ended(principal.session_id) {
            return Err(invalid_token("the session has ended"));
        }
        Ok(principal)
    }

    /// The same, also for a session that has ended: for a logout that is repeated.
    pub fn principal_of_any_session(&self, request: &Request) -> Result<Principal, Problem> {
        let token = bearer_token(request)?;
        self.check_fresh().map_err(Problem::unavailable)?;
        self.verify(token, unix_now()).map_err(|err| invalid_token(&err.to_string()))
    }

    /// Ends sessions at once in this process.
    pub fn end_sessions(&self, revoked: &[Revocation]) {
        self.0.feed.end(revoked);
    }

    /// A readiness check: whether it is known which sessions have ended.
    pub fn probe(&self) -> impl Fn() -> Result<(), String> + Send + use<> {
        let this = self.clone();
        move || this.check_fresh()
    }

    fn check_fresh(&self) -> Result<(), String> {
        let max_stale = self.0.config.max_stale;
        match self.0.feed.age() {
            Some(age) if age <= max_stale => Ok(()),
            Some(_) => Err(format!(
                "for more than {} s it is not known which sessions have ended",
                max_stale.as_secs()
            )),
            None => Err("it is not known yet which sessions have ended".to_owned()),
        }
    }

    fn verify(&self, token: &str, now: i64) -> Result<Principal, TokenError> {
        let hash = self.0.verified.hash(token);
        let generation = self.0.feed.generation();
        if let Some((principal, exp)) = self.0.verified.find(hash, generation) {
            return if is_expired(exp, now) { Err(TokenError::Expired) } else { Ok(principal) };
        }
        match self.verify_signature(token, hash, now) {
            Err(TokenError::UnknownKey) => {
                self.0.feed.refetch_keys();
                self.verify_signature(token, hash, now)
            }
            verified => verified,
        }
    }

    fn verify_signature(
        &self,
        token: &str,
        hash: TokenHash,
        now: i64,
    ) -> Result<Principal, TokenError> {
        let (generation, keys) = self.0.feed.keys();
        let Config { issuer, audience, .. } = &self.0.config;
        let claims = verify(token, &keys, issuer, audience, now)?;
        let principal = claims.principal()?;
        self.0.verified.insert(hash, generation, principal, claims.exp);
        Ok(principal)
    }
}

/// The token in the header `Authorization`; the scheme may be in upper or lower case (RFC 9110
/// section 11.1).
fn bearer_token(request: &Request) -> Result<&str, Problem> {
    let header = single_header(request, "Authorization").map_err(|problem| {
        problem.with_header("WWW-Authenticate", "Bearer error=\"invalid_request\"")
    })?;
    // RFC 6750 section 3.1: without a token there is no error code.
    let missing = || {
        Problem::new(401, "this needs an access token: Authorization: Bearer …")
            .with_header("WWW-Authenticate", "Bearer")
    };
    let (scheme, token) = header.and_then(|it| it.split_once(' ')).ok_or_else(missing)?;
    match scheme.eq_ignore_ascii_case("Bearer") {
        true => Ok(token.trim_matches(' ')),
        false => Err(missing()),
    }
}

fn invalid_token(reason: &str) -> Problem {
    let challenge = format!("Bearer error=\"invalid_token\", error_description=\"{reason}\"");
    Problem::new(401, reason).with_header("WWW-Authenticate", challenge)
}

/// The time of this machine's clock, in Unix seconds.
pub(super) fn unix_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
