//! The keys that sign and verify access tokens: Ed25519 (RFC 8032), published as a JWK set
//! (RFC 7517, RFC 8037).

use std::fmt;

use anyhow::{Context, ensure};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::env::Env;

/// The most keys in a set. Two are enough for a rotation.
const MAX_KEYS: usize = 16;

/// The private keys of the service that issues tokens. They are never printed.
pub struct SigningKeys(Vec<(String, SigningKey)>);

/// The public keys, each with its id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PublicKeys(Vec<(String, VerifyingKey)>);

impl SigningKeys {
    /// Reads the setting `name`: see [`SigningKeys::parse`].
    pub fn from_env(env: &mut Env, name: &str) -> SigningKeys {
        let text = env.secret(name);
        SigningKeys::parse(text.expose()).unwrap_or_else(|rule| {
            // A missing setting is reported already.
            if !text.expose().is_empty() {
                env.error(&format!("{name} {rule}"));
            }
            SigningKeys(Vec::new())
        })
    }

    /// Parses private keys with commas between: 32 random bytes each, as base64url without
    /// padding. The first one signs, all verify. The error is a rule and holds no part of the text.
    pub fn parse(text: &str) -> Result<SigningKeys, String> {
        let mut keys: Vec<(String, SigningKey)> = Vec::new();
        for (index, part) in text.split(',').map(str::trim).enumerate() {
            let seed = BASE64_URL_SAFE_NO_PAD.decode(part).ok().and_then(|it| it.try_into().ok());
            let seed: [u8; 32] = seed.ok_or_else(|| {
                format!("must be keys of 32 bytes in base64url; number {} is none", index + 1)
            })?;
            let key = SigningKey::from_bytes(&seed);
            let id = thumbprint(&key.verifying_key());
            if keys.iter().any(|(known, _)| *known == id) {
                return Err(format!("has the same key twice; number {} is one of them", index + 1));
            }
            keys.push((id, key));
        }
        match keys.len() {
            0..=MAX_KEYS => Ok(SigningKeys(keys)),
            _ => Err(format!("must be at most {MAX_KEYS} keys")),
        }
    }

    /// The public keys to these.
    pub fn public(&self) -> PublicKeys {
        PublicKeys(self.0.iter().map(|(id, key)| (id.clone(), key.verifying_key())).collect())
    }

    /// The id of the key that signs.
    pub(super) fn id(&self) -> &str {
        &self.0[0].0
    }

    /// Signs with the first key.
    pub(super) fn sign_bytes(&self, message: &[u8]) -> [u8; 64] {
        self.0[0].1.sign(message).to_bytes()
    }
}

impl fmt::Debug for SigningKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = self.0.iter().map(|(id, _)| id);
        f.debug_tuple("SigningKeys").field(&ids.collect::<Vec<_>>()).finish()
    }
}

impl PublicKeys {
    /// The JWK set, as `/.well-known/jwks.json` shows it.
    pub fn to_jwks(&self) -> Value {
        let jwk = |(id, key): &(String, VerifyingKey)| {
            let x = BASE64_URL_SAFE_NO_PAD.encode(key.as_bytes());
            json!({ "kty": "OKP", "crv": "Ed25519", "x": x, "use": "sig", "alg": "EdDSA", "kid": id })
        };
        json!({ "keys": self.0.iter().map(jwk).collect::<Vec<_>>() })
    }

    /// Reads a JWK set. Keys of other kinds are left out (RFC 7517 section 5); fails where the text
    /// is no set, has too many keys, or has none of ours.
    pub fn from_jwks(text: &str) -> anyhow::Result<PublicKeys> {
        let set: JwkSet = serde_json::from_str(text).context("not a JWK set")?;
        ensure!(set.keys.len() <= MAX_KEYS, "more than {MAX_KEYS} keys");
        let mut keys = Vec::new();
        for jwk in set.keys {
            let (Some(id), Some(x)) = (jwk.kid, jwk.x) else { continue };
            if jwk.kty != "OKP" || jwk.crv.as_deref() != Some("Ed25519") {
                continue;
            }
            let bytes = BASE64_URL_SAFE_NO_PAD.decode(x).ok().and_then(|it| it.try_into().ok());
            let bytes: [u8; 32] = bytes.context("a key is not 32 bytes in base64url")?;
            keys.push((id, VerifyingKey::from_bytes(&bytes).context("a key is not on the curve")?));
        }
        ensure!(!keys.is_empty(), "there is no Ed25519 key in the set");
        Ok(PublicKeys(keys))
    }

    /// The key with this id.
    pub(super) fn find(&self, id: &str) -> Option<&VerifyingKey> {
        self.0.iter().find(|(known, _)| known == id).map(|(_, key)| key)
    }
}

#[derive(Deserialize)]
struct JwkSet {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    crv: Option<String>,
    x: Option<String>,
    kid: Option<String>,
}

/// The id of a key: the hash of its required members in their order (RFC 7638 section 3).
fn thumbprint(key: &VerifyingKey) -> String {
    let x = BASE64_URL_SAFE_NO_PAD.encode(key.as_bytes());
    let members = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#);
    BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(members))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The private key of RFC 8037 appendix A.1, and another one.
    const SEED: &str = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A";
    const OTHER: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

    #[test]
    fn the_id_of_a_key_is_its_thumbprint() {
        let keys = SigningKeys::parse(SEED).unwrap();
        // RFC 8037 appendix A.3.
        assert_eq!(keys.id(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
        let jwks = keys.public().to_jwks();
        assert_eq!(jwks["keys"][0]["x"], "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo");
    }

    #[test]
    fn a_published_set_is_read_back_and_keys_of_other_kinds_are_left_out() {
        let public = SigningKeys::parse(&format!("{SEED}, {OTHER}")).unwrap().public();
        let mut jwks = public.to_jwks();
        let rsa = json!({ "kty": "RSA", "kid": "r", "n": "AQAB", "e": "AQAB" });
        jwks["keys"].as_array_mut().unwrap().push(rsa);
        assert_eq!(PublicKeys::from_jwks(&jwks.to_string()).unwrap(), public);
        for wrong in [
            "",
            "[]",
            "{}",
            r#"{"keys":[]}"#,
            r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"k","x":"AA"}]}"#,
        ] {
            assert!(PublicKeys::from_jwks(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_text_that_is_no_key_is_refused_and_not_repeated() {
        let padded = format!("{SEED}=");
        let twice = format!("{SEED},{SEED}");
        for (text, rule) in [
            ("secret", "number 1 is none"),
            (padded.as_str(), "number 1 is none"),
            (twice.as_str(), "number 2 is one of them"),
        ] {
            let refused = SigningKeys::parse(text).unwrap_err();
            assert!(refused.contains(rule), "{refused}");
            assert!(!refused.contains("secret") && !refused.contains(SEED), "{refused}");
        }
        let second = SigningKeys::parse(&format!("{SEED},")).unwrap_err();
        assert!(second.contains("number 2 is none"), "{second}");
    }
}
