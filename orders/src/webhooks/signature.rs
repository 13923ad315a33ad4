//! The signature of a webhook: `X-Signature: t=<unix seconds>,v1=<hex>`, where `v1` is HMAC-SHA256
//! (RFC 2104) of `t.body`. It may have several `v1`, while a secret is replaced.

use chassis::Secret;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// How far a signature's time may be from this machine's, in seconds.
const TOLERANCE_S: i64 = 300;

/// Why a signature is not accepted.
#[derive(Debug, PartialEq)]
pub enum SignatureError {
    /// The header is not of the form above.
    Malformed,
    /// The time is more than five minutes off.
    Time,
    /// No secret makes this signature.
    Mismatch,
}

impl SignatureError {
    /// For the client.
    pub fn as_str(&self) -> &'static str {
        match self {
            SignatureError::Malformed => "X-Signature must be t=<unix seconds>,v1=<hex>",
            SignatureError::Time => "the time in X-Signature is more than 5 minutes off",
            SignatureError::Mismatch => "X-Signature is not the signature of this body",
        }
    }
}

/// Checks a signature at this time, in Unix seconds. Signatures are compared in constant time.
pub fn verify(
    header: &str,
    body: &[u8],
    secrets: &[Secret],
    now: i64,
) -> Result<(), SignatureError> {
    let (mut time, mut signatures) = (None, Vec::new());
    for part in header.split(',') {
        match part.trim().split_once('=') {
            Some(("t", digits)) if time.is_none() => time = Some(digits),
            Some(("v1", hex)) => signatures.push(decode_hex(hex).ok_or(SignatureError::Malformed)?),
            Some((_, _)) => (),
            None => return Err(SignatureError::Malformed),
        }
    }
    let time = time.filter(|_| !signatures.is_empty()).ok_or(SignatureError::Malformed)?;
    let seconds: i64 = time.parse().map_err(|_| SignatureError::Malformed)?;
    let mut is_right = false;
    for secret in secrets {
        let mac = mac(secret, time, body);
        for signature in &signatures {
            is_right |= mac.clone().verify_slice(signature).is_ok();
        }
    }
    match is_right {
        false => Err(SignatureError::Mismatch),
        true if now.abs_diff(seconds) > TOLERANCE_S.unsigned_abs() => Err(SignatureError::Time),
        true => Ok(()),
    }
}

fn mac(secret: &Secret, time: &str, body: &[u8]) -> Hmac<Sha256> {
    // A key may have any length, so this never fails; without it no signature would be right.
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes())
        .unwrap_or_else(|_| unreachable!("HMAC takes a key of any length"));
    mac.update(time.as_bytes());
    mac.update(b".");
    mac.update(body);
    mac
}

fn decode_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let pairs = (0..64).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok());
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use chassis::Env;

    use super::*;

    fn secrets(list: &'static str) -> Vec<Secret> {
        Env::from_fn(move |_| Some(list.to_owned())).secrets("X")
    }

    // By: printf '1700000000.{"a":1}' | openssl dgst -sha256 -hmac first
    const OF_FIRST: &str = "6cec7c3b97296f6145c73e625243d78410b7e9bc25f64f9065364bc2424d8933";

    #[test]
    fn a_signature_of_any_secret_is_accepted_within_five_minutes() {
        let header = format!("t=1700000000,v1={OF_FIRST}");
        let check = |header: &str, list, now| verify(header, br#"{"a":1}"#, &secrets(list), now);
        for now in [1_700_000_000, 1_700_000_300, 1_699_999_700] {
            assert_eq!(check(&header, "second,first", now), Ok(()));
        }
        for now in [1_700_000_301, 1_699_999_699, i64::MAX, i64::MIN] {
            assert_eq!(check(&header, "first", now), Err(SignatureError::Time));
        }
        let both = format!("t=1700000000, v1={}, v1={OF_FIRST}, v0=x", "0".repeat(64));
        assert_eq!(check(&both, "first", 1_700_000_000), Ok(()));
        for (header, error) in [
            (header.replace("v1=6c", "v1=6d"), SignatureError::Mismatch),
            (header.replace("1700000000", "1700000001"), SignatureError::Mismatch),
            (header.replace("v1=6", "v1="), SignatureError::Malformed),
            (header.replace("v1", "v2"), SignatureError::Malformed),
            (header.replace("t=1", "t=x"), SignatureError::Malformed),
            (String::new(), SignatureError::Malformed),
            ("t=1700000000".to_owned(), SignatureError::Malformed),
            (format!("t=1700000000,v1={}", "é".repeat(32)), SignatureError::Malformed),
        ] {
            assert_eq!(check(&header, "first", 1_700_000_000), Err(error), "{header}");
        }
        assert_eq!(check(&header, "other", 1_700_000_000), Err(SignatureError::Mismatch));
        assert_eq!(check(&header, "", 1_700_000_000), Err(SignatureError::Mismatch));
    }
}
