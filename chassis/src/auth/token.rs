//! Access tokens: how they are made, and the checks of one that was received.

use std::borrow::Cow;
use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ed25519_dalek::Signature;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

use super::keys::{PublicKeys, SigningKeys};
use super::{ADMIN_ROLE, Principal};

/// A longer text is no token of ours: they have some 400 bytes.
const MAX_TOKEN_BYTES: usize = 2048;

/// By how much two machines' clocks may differ, in seconds.
const LEEWAY_S: i64 = 5;

/// The claims of an access token (RFC 9068 section 2.2). Times are Unix seconds.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Claims {
    /// Who has issued the token.
    pub iss: String,
    /// Who accepts it.
    pub aud: String,
    /// The user's id in decimal digits.
    pub sub: String,
    /// The session.
    pub sid: Uuid,
    /// When it was issued.
    pub iat: i64,
    /// When it expires.
    pub exp: i64,
    /// When it becomes valid, where that is not at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbf: Option<i64>,
    /// The user's roles: [`ADMIN_ROLE`], or none.
    pub roles: Vec<String>,
}

/// Why a token is refused. The text may be shown to the client.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TokenError {
    /// Not a compact JWS, or its parts are not what they must be.
    Malformed,
    /// Signed in another way than by EdDSA.
    Algorithm,
    /// Signed by a key that is not, or no longer, in use.
    UnknownKey,
    /// The signature is of another text or another key.
    Signature,
    /// Not issued for these services.
    Issuer,
    /// Its time is over.
    Expired,
    /// Its time has not come; one of the clocks is wrong.
    NotYetValid,
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TokenError::Malformed => "the access token is malformed",
            TokenError::Algorithm => "the access token is not signed by EdDSA",
            TokenError::UnknownKey => "the access token is signed by an unknown key",
            TokenError::Signature => "the signature of the access token is wrong",
            TokenError::Issuer => "the access token is of another issuer or for another audience",
            TokenError::Expired => "the access token has expired",
            TokenError::NotYetValid => "the access token is not valid yet",
        })
    }
}

/// The header of a token. Members that are not named here are ignored (RFC 7515 section 4).
#[derive(Deserialize)]
struct Header<'t> {
    #[serde(borrow)]
    alg: Cow<'t, str>,
    #[serde(borrow)]
    typ: Option<Cow<'t, str>>,
    #[serde(borrow)]
    kid: Option<Cow<'t, str>>,
    crit: Option<IgnoredAny>,
}

impl SigningKeys {
    /// A token with these claims, signed by the first key.
    pub fn sign(&self, claims: &Claims) -> String {
        let header = json!({ "alg": "EdDSA", "typ": "at+jwt", "kid": self.id() });
        // Neither has a map with keys that are no texts, so neither fails.
        let claims = serde_json::to_string(claims).unwrap_or_default();
        let encode = |part: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(part);
        let mut token =
            format!("{}.{}", encode(header.to_string().as_bytes()), encode(claims.as_bytes()));
        let signature = self.sign_bytes(token.as_bytes());
        token.push('.');
        token.push_str(&encode(&signature));
        token
    }
}

/// Verifies a token at the time `now` (Unix seconds) and returns its claims. The algorithm is checked
/// before anything else is read, the signature before any claim.
pub fn verify(
    token: &str,
    keys: &PublicKeys,
    issuer: &str,
    audience: &str,
    now: i64,
) -> Result<Claims, TokenError> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(TokenError::Malformed);
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
    let (header, claims) = signed.split_once('.').ok_or(TokenError::Malformed)?;
    let header = decode(header)?;
    let header: Header<'_> = parse(&header)?;
    if header.alg != "EdDSA" {
        return Err(TokenError::Algorithm);
    }
    // RFC 9068 section 4: the type keeps other tokens of the issuer from being taken for access
    // tokens. RFC 7515 section 4.1.11: what is critical and not understood is refused.
    let typ = header.typ.unwrap_or_default().to_ascii_lowercase();
    if typ.strip_prefix("application/").unwrap_or(&typ) != "at+jwt" || header.crit.is_some() {
        return Err(TokenError::Malformed);
    }
    let id = header.kid.ok_or(TokenError::UnknownKey)?;
    let key = keys.find(&id).ok_or(TokenError::UnknownKey)?;
    let signature = decode(signature)?;
    let signature = Signature::from_slice(&signature).map_err(|_| TokenError::Signature)?;
    key.verify_strict(signed.as_bytes(), &signature).map_err(|_| TokenError::Signature)?;
    let claims: Claims = parse(&decode(claims)?)?;
    if claims.iss != issuer || claims.aud != audience {
        return Err(TokenError::Issuer);
    }
    if is_expired(claims.exp, now) {
        return Err(TokenError::Expired);
    }
    if claims.iat.max(claims.nbf.unwrap_or(claims.iat)) > now.saturating_add(LEEWAY_S) {
        return Err(TokenError::NotYetValid);
    }
    Ok(claims)
}

/// Whether a token that expires at `exp` is refused at `now`; both are Unix seconds.
pub(super) fn is_expired(exp: i64, now: i64) -> bool {
    exp.saturating_add(LEEWAY_S) <= now
}

impl Claims {
    /// The user and session that they name.
    pub(super) fn principal(&self) -> Result<Principal, TokenError> {
        let user_id = self.sub.parse().ok().filter(|id| *id > 0).ok_or(TokenError::Malformed)?;
        let is_admin = self.roles.iter().any(|role| role == ADMIN_ROLE);
        Ok(Principal { user_id, session_id: self.sid, is_admin })
    }
}

fn decode(part: &str) -> Result<Vec<u8>, TokenError> {
    BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed)
}

/// A JSON object. Serde would take a list for a struct.
fn parse<'t, T: Deserialize<'t>>(json: &'t [u8]) -> Result<T, TokenError> {
    if json.first() != Some(&b'{') {
        return Err(TokenError::Malformed);
    }
    serde_json::from_slice(json).map_err(|_| TokenError::Malformed)
}
