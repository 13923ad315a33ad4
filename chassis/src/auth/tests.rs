//! Tokens and requests that must be refused, and the feed of ended sessions.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::bail;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use rouille::Request;
use serde_json::{Value, json};
use uuid::Uuid;

use super::authenticator::unix_now;
use super::*;
use crate::stop::Stop;
use crate::testing::eventually;

const SEED: &str = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A";
const OTHER_SEED: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

fn keys(seeds: &str) -> SigningKeys {
    SigningKeys::parse(seeds).unwrap()
}

fn claims(session_id: Uuid) -> Claims {
    let now = unix_now();
    Claims {
        iss: "matinee".to_owned(),
        aud: "matinee".to_owned(),
        sub: "7".to_owned(),
        sid: session_id,
        iat: now,
        exp: now + 900,
        nbf: None,
        roles: Vec::new(),
    }
}

fn checked(token: &str) -> Result<Claims, TokenError> {
    verify(token, &keys(SEED).public(), "matinee", "matinee", unix_now())
}

/// A token of any header and claims with a right signature.
fn signed(header: &Value, claims: &Value) -> String {
    let encode = |part: &Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
    let text = format!("{}.{}", encode(header), encode(claims));
    let signature = BASE64_URL_SAFE_NO_PAD.encode(keys(SEED).sign_bytes(text.as_bytes()));
    format!("{text}.{signature}")
}

fn header() -> Value {
    json!({ "alg": "EdDSA", "typ": "at+jwt", "kid": keys(SEED).id() })
}

fn with(mut object: Value, name: &str, value: Value) -> Value {
    match value {
        Value::Null => drop(object.as_object_mut().unwrap().remove(name)),
        value => object[name] = value,
    }
    object
}

#[test]
fn a_token_that_was_signed_is_verified_and_has_the_claims_it_was_given() {
    let claims = claims(Uuid::now_v7());
    assert_eq!(checked(&keys(SEED).sign(&claims)), Ok(claims.clone()));
    assert_eq!(checked(&signed(&header(), &json!(claims))), Ok(claims));
}

#[test]
fn no_other_algorithm_than_eddsa_is_accepted() {
    let claims = json!(claims(Uuid::now_v7()));
    for alg in ["none", "None", "HS256", "RS256", "ES256", "eddsa", "EdDSA ", "Ed25519", ""] {
        let token = signed(&with(header(), "alg", json!(alg)), &claims);
        assert_eq!(checked(&token), Err(TokenError::Algorithm), "{alg}");
    }
    // Without a signature, as "none" would have it.
    let encode = |part: &Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
    let unsigned = format!("{}.{}.", encode(&header()), encode(&claims));
    assert_eq!(checked(&unsigned), Err(TokenError::Signature));
    for alg in [json!(null), json!(1), json!(["EdDSA"])] {
        let token = signed(&with(header(), "alg", alg), &claims);
        assert_eq!(checked(&token), Err(TokenError::Malformed));
    }
}

#[test]
fn the_public_key_is_no_secret_with_which_a_token_can_be_signed() {
    use sha2::{Digest, Sha256};
    // HMAC-SHA256 by RFC 2104, with the public key as the secret.
    let jwks = keys(SEED).public().to_jwks();
    let key = BASE64_URL_SAFE_NO_PAD.decode(jwks["keys"][0]["x"].as_str().unwrap()).unwrap();
    let pad = |byte: u8| -> Vec<u8> {
        (0..64).map(|at| key.get(at).copied().unwrap_or(0) ^ byte).collect()
    };
    let encode = |part: &Value| BASE64_URL_SAFE_NO_PAD.encode(part.to_string());
    let claims = json!(claims(Uuid::now_v7()));
    let text = format!("{}.{}", encode(&with(header(), "alg", json!("HS256"))), encode(&claims));
    let inner = Sha256::digest([pad(0x36), text.clone().into_bytes()].concat());
    let mac = Sha256::digest([pad(0x5c), inner.to_vec()].concat());
    let token = format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(mac));
    assert_eq!(checked(&token), Err(TokenError::Algorithm));
}

#[test]
fn a_key_id_is_compared_and_nothing_else() {
    let claims = json!(claims(Uuid::now_v7()));
    let other = keys(OTHER_SEED);
    for kid in [other.id(), "../../etc/passwd", "' or 1=1 --", "", "http://evil.example/jwks"] {
        let token = signed(&with(header(), "kid", json!(kid)), &claims);
        assert_eq!(checked(&token), Err(TokenError::UnknownKey), "{kid}");
    }
    // Another key's signature under a known id.
    let both = SigningKeys::parse(&format!("{OTHER_SEED},{SEED}")).unwrap();
    let token = signed(&with(header(), "kid", json!(both.id())), &claims);
    let refused = verify(&token, &both.public(), "matinee", "matinee", unix_now());
    assert_eq!(refused, Err(TokenError::Signature));
    // A key that the token brings itself is not read.
    let jwk = both.public().to_jwks()["keys"][0].clone();
    let token = signed(&with(with(header(), "jwk", jwk), "kid", json!("own")), &claims);
    assert_eq!(checked(&token), Err(TokenError::UnknownKey));
}

#[test]
fn a_token_of_another_kind_or_with_a_critical_extension_is_refused() {
    let claims = json!(claims(Uuid::now_v7()));
    for typ in [json!("JWT"), json!(""), json!("rt+jwt"), Value::Null] {
        let token = signed(&with(header(), "typ", typ.clone()), &claims);
        assert_eq!(checked(&token), Err(TokenError::Malformed), "{typ}");
    }
    let token = signed(&with(header(), "crit", json!(["exp"])), &claims);
    assert_eq!(checked(&token), Err(TokenError::Malformed));
    let token = signed(&with(header(), "typ", json!("application/AT+JWT")), &claims);
    assert!(checked(&token).is_ok(), "RFC 7515 section 4.1.9: with and without the prefix");
}

#[test]
fn a_token_is_valid_in_its_time_with_five_seconds_for_clocks() {
    let now = unix_now();
    let base = json!(claims(Uuid::now_v7()));
    let changed =
        |name: &str, at: i64| checked(&signed(&header(), &with(base.clone(), name, json!(at))));
    assert!(changed("exp", now - 3).is_ok());
    assert_eq!(changed("exp", now - 6), Err(TokenError::Expired));
    assert!(changed("iat", now + 3).is_ok());
    // A clock that is ten minutes fast or slow.
    assert_eq!(changed("iat", now + 600), Err(TokenError::NotYetValid));
    assert_eq!(changed("nbf", now + 600), Err(TokenError::NotYetValid));
    assert_eq!(changed("exp", now - 600), Err(TokenError::Expired));
    for at in [i64::MIN, i64::MAX] {
        let _ = (changed("exp", at), changed("iat", at), changed("nbf", at));
    }
}

#[test]
fn a_token_for_others_or_with_claims_missing_or_malformed_is_refused() {
    let base = json!(claims(Uuid::now_v7()));
    for (name, value, error) in [
        ("iss", json!("another"), TokenError::Issuer),
        ("aud", json!("another"), TokenError::Issuer),
        ("aud", json!(["matinee"]), TokenError::Malformed),
        ("iss", Value::Null, TokenError::Malformed),
        ("sid", json!("x"), TokenError::Malformed),
        ("exp", json!("9999999999"), TokenError::Malformed),
        ("exp", json!(1e300), TokenError::Malformed),
        ("exp", Value::Null, TokenError::Malformed),
        ("roles", json!("admin"), TokenError::Malformed),
    ] {
        let token = signed(&header(), &with(base.clone(), name, value));
        assert_eq!(checked(&token), Err(error), "{name}");
    }
    for sub in ["0", "-1", "x", "", "99999999999999999999"] {
        let claims = Claims { sub: sub.to_owned(), ..claims(Uuid::now_v7()) };
        assert_eq!(claims.principal(), Err(TokenError::Malformed), "{sub}");
    }
}

#[test]
fn every_flipped_bit_and_every_cut_makes_a_token_invalid() {
    let token = keys(SEED).sign(&claims(Uuid::now_v7()));
    for at in 0..token.len() {
        assert!(checked(&token[..at]).is_err(), "cut at {at}");
        for bit in 0..7 {
            let mut bytes = token.clone().into_bytes();
            bytes[at] ^= 1 << bit;
            let Ok(changed) = String::from_utf8(bytes) else { continue };
            assert!(checked(&changed).is_err(), "bit {bit} of byte {at}");
        }
    }
    for text in ["", ".", "..", "...", "a.b", "a.b.c.d", "ä.ö.ü"] {
        assert!(checked(text).is_err(), "{text}");
    }
    let padded = format!("{token}=");
    assert!(checked(&padded).is_err());
}

/// A source that a test changes.
#[derive(Clone)]
struct TestSource(Arc<Mutex<TestState>>);

struct TestState {
    available: bool,
    keys: PublicKeys,
    epoch: &'static str,
    revocations: Vec<Revocation>,
    key_fetches: usize,
}

impl TestSource {
    fn new() -> TestSource {
        TestSource(Arc::new(Mutex::new(TestState {
            available: true,
            keys: keys(SEED).public(),
            epoch: "a",
            revocations: Vec::new(),
            key_fetches: 0,
        })))
    }

    fn end(&self, session_id: Uuid) {
        let mut state = self.0.lock();
        let number = state.revocations.len() as i64 + 1;
        state.revocations.push(Revocation { number, session_id, until: unix_now() + 900 });
    }
}

impl Source for TestSource {
    fn keys(&self) -> anyhow::Result<PublicKeys> {
        let mut state = self.0.lock();
        state.key_fetches += 1;
        match state.available {
            true => Ok(state.keys.clone()),
            false => bail!("away"),
        }
    }

    fn revocations(&self, epoch: &str, after: i64) -> anyhow::Result<RevocationPage> {
        let state = self.0.lock();
        let after = if epoch == state.epoch { after } else { 0 };
        let mut behind = state.revocations.iter().filter(|it| it.number > after);
        // One a page, so that a reader has to ask on.
        let revocations: Vec<Revocation> = behind.next().cloned().into_iter().collect();
        let next = revocations.last().map_or(after, |last| last.number);
        let more = behind.next().is_some();
        match state.available {
            true => Ok(RevocationPage { epoch: state.epoch.to_owned(), revocations, next, more }),
            false => bail!("away"),
        }
    }
}

struct Fixture {
    source: TestSource,
    auth: Authenticator,
    stop: Stop,
}

impl Fixture {
    fn new(source: TestSource, max_stale: Duration) -> Fixture {
        let config = Config {
            issuer: "matinee".to_owned(),
            audience: "matinee".to_owned(),
            max_stale,
            poll_interval: Duration::from_millis(5),
        };
        let stop = Stop::default();
        let auth = Authenticator::new(config, source.clone(), &stop).unwrap();
        Fixture { source, auth, stop }
    }

    fn ready() -> Fixture {
        let fixture = Fixture::new(TestSource::new(), Duration::from_secs(60));
        eventually("the keys are there", 10, || fixture.auth.probe()().ok());
        fixture
    }

    fn ask(&self, headers: &[(&str, &str)]) -> Result<Principal, (u16, String)> {
        let headers = headers.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        let request = Request::fake_http("GET", "/", headers.collect(), vec![]);
        self.auth.principal(&request).map_err(|problem| {
            let status = problem.status();
            let response = problem.into_response("id");
            let challenge = response.headers.iter().find(|(name, _)| name == "WWW-Authenticate");
            (status, challenge.map_or(String::new(), |(_, value)| value.to_string()))
        })
    }

    fn ask_with(&self, token: &str) -> Result<Principal, (u16, String)> {
        self.ask(&[("Authorization", &format!("Bearer {token}"))])
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop.request();
    }
}

#[test]
fn a_request_with_a_token_is_its_users_and_the_scheme_has_no_case() {
    let fixture = Fixture::ready();
    let session_id = Uuid::now_v7();
    let admin = Claims { roles: vec!["admin".to_owned()], ..claims(session_id) };
    let token = keys(SEED).sign(&admin);
    let expected = Principal { user_id: 7, session_id, is_admin: true };
    for scheme in ["Bearer", "bearer", "BEARER"] {
        let header = format!("{scheme} {token}");
        assert_eq!(fixture.ask(&[("Authorization", &header)]), Ok(expected));
    }
    assert!(expected.require_admin().is_ok());
    let customer = fixture.ask_with(&keys(SEED).sign(&claims(session_id))).unwrap();
    assert_eq!(customer.require_admin().unwrap_err().status(), 403);
}

#[test]
fn a_request_without_a_valid_token_is_told_how_to_authenticate() {
    let fixture = Fixture::ready();
    let token = keys(SEED).sign(&claims(Uuid::now_v7()));
    let bearer = format!("Bearer {token}");
    let challenge = |headers: &[(&str, &str)]| fixture.ask(headers).unwrap_err();
    assert_eq!(challenge(&[]), (401, "Bearer".to_owned()));
    assert_eq!(challenge(&[("Authorization", "Basic YTpi")]), (401, "Bearer".to_owned()));
    assert_eq!(challenge(&[("Authorization", &token)]), (401, "Bearer".to_owned()));
    let twice = [("Authorization", bearer.as_str()), ("Authorization", bearer.as_str())];
    assert_eq!(challenge(&twice), (400, "Bearer error=\"invalid_request\"".to_owned()));
    let long = format!("Bearer {}", "a".repeat(8 << 10));
    for wrong in ["Bearer ", "Bearer x", "Bearer a.b.c", long.as_str()] {
        let (status, text) = challenge(&[("Authorization", wrong)]);
        assert_eq!(status, 401);
        assert!(text.starts_with("Bearer error=\"invalid_token\""), "{text}");
    }
}

#[test]
fn a_session_that_has_ended_is_refused_also_with_a_token_that_was_seen_before() {
    let fixture = Fixture::ready();
    let sessions = [(); 3].map(|()| Uuid::now_v7());
    let tokens = sessions.map(|id| keys(SEED).sign(&claims(id)));
    assert!(tokens.iter().all(|token| fixture.ask_with(token).is_ok()));
    fixture.source.end(sessions[0]);
    fixture.source.end(sessions[1]);
    for token in &tokens[..2] {
        eventually("the end is known", 10, || fixture.ask_with(token).err());
    }
    assert!(fixture.ask_with(&tokens[2]).is_ok());
    let until = unix_now() + 900;
    fixture.auth.end_sessions(&[Revocation { number: 0, session_id: sessions[2], until }]);
    let (status, text) = fixture.ask_with(&tokens[2]).unwrap_err();
    assert_eq!(status, 401);
    assert!(text.contains("the session has ended"), "{text}");
}

#[test]
fn a_list_of_another_epoch_is_read_from_its_first_number() {
    let fixture = Fixture::ready();
    let (before, after) = (Uuid::now_v7(), Uuid::now_v7());
    let token = |id| keys(SEED).sign(&claims(id));
    fixture.source.end(before);
    eventually("the end is known", 10, || fixture.ask_with(&token(before)).err());
    {
        let mut state = fixture.source.0.lock();
        state.epoch = "b";
        state.revocations.clear();
    }
    fixture.source.end(after);
    eventually("the end is known", 10, || fixture.ask_with(&token(after)).err());
    assert!(fixture.ask_with(&token(before)).is_err(), "an end is never taken back");
}

#[test]
fn nobody_gets_in_while_it_is_not_known_which_sessions_have_ended() {
    let source = TestSource::new();
    source.0.lock().available = false;
    let fixture = Fixture::new(source, Duration::from_millis(50));
    let token = keys(SEED).sign(&claims(Uuid::now_v7()));
    assert_eq!(fixture.ask_with(&token).unwrap_err().0, 503);
    assert!(fixture.auth.probe()().is_err());
    fixture.source.0.lock().available = true;
    eventually("it is known", 10, || fixture.ask_with(&token).ok());
    fixture.source.0.lock().available = false;
    eventually("it is too long ago", 10, || fixture.auth.probe()().err());
    assert_eq!(fixture.ask_with(&token).unwrap_err().0, 503);
    assert_eq!(fixture.ask(&[]).unwrap_err().0, 401, "without a token it is not asked");
}

#[test]
fn a_new_key_is_fetched_when_a_token_names_it_and_not_for_each_request() {
    let fixture = Fixture::ready();
    let rotated = keys(&format!("{OTHER_SEED},{SEED}"));
    fixture.source.0.lock().keys = rotated.public();
    let fetches = || fixture.source.0.lock().key_fetches;
    assert_eq!(fetches(), 1);
    assert!(fixture.ask_with(&rotated.sign(&claims(Uuid::now_v7()))).is_ok());
    assert!(fixture.ask_with(&keys(SEED).sign(&claims(Uuid::now_v7()))).is_ok());
    assert_eq!(fetches(), 2);
    let unknown = keys("AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE");
    for _ in 0..100 {
        let refused = fixture.ask_with(&unknown.sign(&claims(Uuid::now_v7())));
        assert_eq!(refused.unwrap_err().0, 401);
    }
    assert_eq!(fetches(), 2);
}

#[test]
fn a_key_that_was_taken_away_verifies_no_token_also_none_that_was_seen_before() {
    let source = TestSource::new();
    let rotated = keys(&format!("{OTHER_SEED},{SEED}"));
    source.0.lock().keys = rotated.public();
    let fixture = Fixture::new(source, Duration::from_secs(60));
    eventually("the keys are there", 10, || fixture.auth.probe()().ok());
    let old = keys(SEED).sign(&claims(Uuid::now_v7()));
    assert!(fixture.ask_with(&old).is_ok());
    fixture.source.0.lock().keys = keys(OTHER_SEED).public();
    // A token of an unknown key has the keys fetched.
    let unknown = keys("AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE");
    let _ = fixture.ask_with(&unknown.sign(&claims(Uuid::now_v7())));
    assert_eq!(fixture.ask_with(&old).unwrap_err().0, 401);
}

#[test]
fn many_threads_verify_many_tokens_and_each_gets_its_own_user() {
    let fixture = Fixture::ready();
    let tokens: Vec<(i64, String)> = (1..=200)
        .map(|id: i64| {
            let claims = Claims { sub: id.to_string(), ..claims(Uuid::now_v7()) };
            (id, keys(SEED).sign(&claims))
        })
        .collect();
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for (id, token) in tokens.iter().cycle().take(2000) {
                    assert_eq!(fixture.ask_with(token).unwrap().user_id, *id);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(answered.load(Ordering::Relaxed), 8000);
}
