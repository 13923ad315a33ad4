//! Access tokens without the service that makes them.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;
use uuid::Uuid;

use super::fake_upstream::{FakeUpstream, answer_ok};
use super::test_var;
use crate::auth::{ADMIN_ROLE, Claims, RevocationPage, SigningKeys};

/// Answers as the internal API of the service that makes tokens does, with its keys and no ended
/// session, and makes tokens.
pub struct TokenIssuer {
    keys: SigningKeys,
    upstream: FakeUpstream,
}

impl TokenIssuer {
    /// Listens until it is dropped.
    pub fn start() -> TokenIssuer {
        TokenIssuer::start_with(answer_ok)
    }

    /// The same with `other` for requests of anything else.
    pub fn start_with(
        other: impl Fn(&mut TcpStream, &str) -> bool + Send + Sync + 'static,
    ) -> TokenIssuer {
        let keys = SigningKeys::parse(&test_var("CUSTOMERS_SIGNING_KEYS")).unwrap();
        let jwks = keys.public().to_jwks().to_string();
        let page = RevocationPage { epoch: "1".into(), revocations: vec![], next: 0, more: false };
        let page = json!(page).to_string();
        let answer = move |stream: &mut TcpStream, request: &str| {
            let body = match request.split(' ').nth(1).unwrap_or_default() {
                "/.well-known/jwks.json" => &jwks,
                path if path.starts_with("/internal/revocations") => &page,
                _ => return other(stream, request),
            };
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
                .is_ok()
        };
        TokenIssuer { keys, upstream: FakeUpstream::start((Ipv4Addr::LOCALHOST, 0), answer) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.upstream.address()
    }

    /// An access token for a session of its own.
    pub fn token(&self, user_id: i64, is_admin: bool) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        self.keys.sign(&Claims {
            iss: test_var("AUTH_ISSUER"),
            aud: test_var("AUTH_AUDIENCE"),
            sub: user_id.to_string(),
            sid: Uuid::now_v7(),
            iat: now,
            exp: now + 900,
            nbf: None,
            roles: if is_admin { vec![ADMIN_ROLE.to_owned()] } else { vec![] },
        })
    }
}
