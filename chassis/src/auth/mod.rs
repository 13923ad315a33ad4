//! Who makes a request: access tokens, the keys that verify them, and the sessions that have ended.
//!
//! A service verifies tokens by itself. [`Authenticator`] keeps the public keys and the list of
//! ended sessions in memory; one thread keeps both up to date ([`Source`]). No request waits for
//! another service, except where a token names a key that was added a moment ago.
//!
//! Tokens are JWS in compact form (RFC 7515) with the algorithm EdDSA over Ed25519 (RFC 8037) and
//! the claims of RFC 9068.

mod authenticator;
mod feed;
#[cfg(feature = "upstream")]
mod http_source;
mod keys;
#[cfg(test)]
mod tests;
mod token;
mod verified_tokens;

use std::time::Duration;

use uuid::Uuid;

pub use authenticator::Authenticator;
pub use feed::{Revocation, RevocationPage, Source};
#[cfg(feature = "upstream")]
pub use http_source::HttpSource;
pub use keys::{PublicKeys, SigningKeys};
pub use token::{Claims, TokenError, verify};

use crate::env::Env;
use crate::problem::Problem;

/// The role of administrators in the claim `roles`.
pub const ADMIN_ROLE: &str = "admin";

/// The user that a request's access token names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Principal {
    /// The user's id.
    pub user_id: i64,
    /// The session to which the token belongs.
    pub session_id: Uuid,
    /// Whether the user was an administrator when the token was made.
    pub is_admin: bool,
}

impl Principal {
    /// 403 unless the user is an administrator (RFC 6750 section 3.1).
    pub fn require_admin(&self) -> Result<(), Problem> {
        match self.is_admin {
            true => Ok(()),
            false => Err(Problem::new(403, "this needs an administrator")
                .with_header("WWW-Authenticate", "Bearer error=\"insufficient_scope\"")),
        }
    }
}

/// Which tokens are accepted, and how old the list of ended sessions may be.
#[derive(Clone, Debug)]
pub struct Config {
    /// The claim `iss` of every token.
    pub issuer: String,
    /// The claim `aud` of every token.
    pub audience: String,
    /// When nothing was heard of ended sessions for longer than this, no token is accepted: one
    /// of them may be of a session that has ended.
    pub max_stale: Duration,
    /// The pause between two looks at the list of ended sessions.
    pub poll_interval: Duration,
}

impl Config {
    /// Reads `AUTH_ISSUER`, `AUTH_AUDIENCE`, `AUTH_MAX_STALE_MS` and `AUTH_POLL_INTERVAL_MS`.
    pub fn from_env(env: &mut Env) -> Config {
        Config {
            issuer: env.required("AUTH_ISSUER"),
            audience: env.required("AUTH_AUDIENCE"),
            max_stale: env.millis("AUTH_MAX_STALE_MS", 60_000),
            poll_interval: env.millis("AUTH_POLL_INTERVAL_MS", 500),
        }
    }
}
