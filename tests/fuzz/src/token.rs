//! Access tokens: no text is accepted that was not signed, and of what was signed only what has the
//! right header and claims.

use std::sync::LazyLock;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use chassis::auth::{Claims, PublicKeys, verify};
use ed25519_dalek::{Signer, SigningKey};
use serde_json::{Value, json};

/// The time of the checks, in Unix seconds.
const NOW: i64 = 1_800_000_000;

const KEY_ID: &str = "k";

static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[7; 32]));

static KEYS: LazyLock<PublicKeys> = LazyLock::new(|| {
    let x = BASE64_URL_SAFE_NO_PAD.encode(KEY.verifying_key().as_bytes());
    let jwk = json!({ "kty": "OKP", "crv": "Ed25519", "x": x, "kid": KEY_ID });
    PublicKeys::from_jwks(&json!({ "keys": [jwk] }).to_string()).expect("a JWK set")
});

/// Uses the input as a token, and its first line as header and its rest as claims of a token with a
/// right signature. Panics where a token is accepted that must not be.
pub fn check(input: &[u8]) {
    if let Ok(text) = str::from_utf8(input) {
        assert!(accepted(text).is_none(), "a token without a signature is accepted");
    }
    let mut parts = input.splitn(2, |byte| *byte == b'\n');
    let (header, claims) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let Some(read) = accepted(&sign(header, claims)) else { return };
    // Read in another way: as values, of which the last one of a name counts.
    let header: Value = serde_json::from_slice(header).expect("a header that is JSON");
    assert_eq!((&header["alg"], &header["kid"]), (&json!("EdDSA"), &json!(KEY_ID)));
    let typ = header["typ"].as_str().expect("a type").to_ascii_lowercase();
    assert!(["at+jwt", "application/at+jwt"].contains(&typ.as_str()), "{typ}");
    assert!(header["crit"].is_null());
    let claims: Value = serde_json::from_slice(claims).expect("claims that are JSON");
    assert_eq!((&claims["iss"], &claims["aud"]), (&json!("i"), &json!("a")));
    let seconds = |name: &str| claims[name].as_i64();
    assert!(seconds("exp").is_some_and(|exp| exp > NOW - 5));
    assert!(seconds("iat").is_some_and(|iat| iat <= NOW + 5));
    assert!(seconds("nbf").is_none_or(|nbf| nbf <= NOW + 5));
    assert_eq!(claims["sub"], json!(read.sub));
    assert_eq!(claims["roles"], json!(read.roles));
}

fn accepted(token: &str) -> Option<Claims> {
    verify(token, &KEYS, "i", "a", NOW).ok()
}

fn sign(header: &[u8], claims: &[u8]) -> String {
    let encode = |part: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(part);
    let signed = format!("{}.{}", encode(header), encode(claims));
    let signature = KEY.sign(signed.as_bytes());
    format!("{signed}.{}", encode(&signature.to_bytes()))
}
