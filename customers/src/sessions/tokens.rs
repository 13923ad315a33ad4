//! The pair of tokens that a session has: an access token for every service, and a refresh token
//! for the next pair.

use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use chassis::auth::{ADMIN_ROLE, Claims, SigningKeys};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The bytes of a refresh token.
const REFRESH_TOKEN_BYTES: usize = 32;

/// A refresh token: 256 random bits. It is never printed.
pub struct RefreshToken([u8; REFRESH_TOKEN_BYTES]);

impl RefreshToken {
    /// A new one, from the operating system's random numbers.
    pub fn generate() -> Result<RefreshToken, getrandom::Error> {
        let mut bytes = [0; REFRESH_TOKEN_BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(RefreshToken(bytes))
    }

    /// Parses what a client sent; `None` for anything that is no token of ours.
    pub fn parse(text: &str) -> Option<RefreshToken> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        bytes.try_into().ok().map(RefreshToken)
    }

    /// The text for the client: base64url, 43 characters.
    pub fn expose(&self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(self.0)
    }

    /// By which the database knows it. A fast hash is enough: the token is random.
    pub fn hash(&self) -> Vec<u8> {
        Sha256::digest(self.0).to_vec()
    }
}

impl fmt::Debug for RefreshToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RefreshToken(..)")
    }
}

/// What makes access tokens.
pub struct Issuer {
    /// The keys; the first one signs.
    pub keys: SigningKeys,
    /// The claim `iss`.
    pub issuer: String,
    /// The claim `aud`.
    pub audience: String,
    /// How long an access token is valid, in seconds.
    pub lifetime_s: i64,
}

/// For whom an access token is.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// The user.
    pub user_id: i64,
    /// The session.
    pub session_id: Uuid,
    /// Whether the user is an administrator now.
    pub is_admin: bool,
    /// When the session expires at the latest, in Unix seconds.
    pub session_expires: i64,
}

impl Issuer {
    /// A signed access token and the seconds for which it is valid. It does not outlive its session.
    pub fn access_token(&self, subject: &Subject, now: i64) -> (String, i64) {
        let exp = (now + self.lifetime_s).min(subject.session_expires);
        let roles = if subject.is_admin { vec![ADMIN_ROLE.to_owned()] } else { Vec::new() };
        let claims = Claims {
            iss: self.issuer.clone(),
            aud: self.audience.clone(),
            sub: subject.user_id.to_string(),
            sid: subject.session_id,
            iat: now,
            exp,
            nbf: None,
            roles,
        };
        (self.keys.sign(&claims), (exp - now).max(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refresh_token_is_read_back_and_nothing_else_is_one() {
        let token = RefreshToken::generate().unwrap();
        let text = token.expose();
        assert_eq!(text.len(), 43);
        assert_eq!(RefreshToken::parse(&text).unwrap().hash(), token.hash());
        assert!(!format!("{token:?}").contains(&text));
        let padded = format!("{text}=");
        for other in ["", "a", &text[1..], &padded, "a.b.c"] {
            assert!(RefreshToken::parse(other).is_none(), "{other}");
        }
    }
}
