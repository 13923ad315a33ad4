//! Keys and ended sessions from the service that issues tokens, over HTTP.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use ureq::Agent;

use super::feed::{RevocationPage, Source};
use super::keys::PublicKeys;

/// For each step of a request: connect, response, next part of the body.
const TIMEOUT: Duration = Duration::from_secs(2);

/// The largest answer. A page of revocations has about 120 kB.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Reads from the internal listener of the service that issues tokens.
pub struct HttpSource {
    agent: Agent,
    address: SocketAddr,
}

impl HttpSource {
    /// Connects when the first answer is needed.
    pub fn new(address: SocketAddr) -> HttpSource {
        let agent = Agent::config_builder()
            .timeout_connect(Some(TIMEOUT))
            .timeout_send_request(Some(TIMEOUT))
            .timeout_recv_response(Some(TIMEOUT))
            .timeout_per_read(Some(TIMEOUT))
            .http_status_as_error(false)
            .proxy(None)
            .max_redirects(0)
            .build()
            .new_agent();
        HttpSource { agent, address }
    }

    fn get(&self, path: &str) -> anyhow::Result<String> {
        let mut answer = self.agent.get(format!("http://{}{path}", self.address)).call()?;
        ensure!(answer.status() == 200, "{path} answers {}", answer.status().as_u16());
        Ok(answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string()?)
    }
}

impl Source for HttpSource {
    fn keys(&self) -> anyhow::Result<PublicKeys> {
        PublicKeys::from_jwks(&self.get("/.well-known/jwks.json")?)
    }

    fn revocations(&self, epoch: &str, after: i64) -> anyhow::Result<RevocationPage> {
        let page = self.get(&format!("/internal/revocations?after={after}&epoch={epoch}"))?;
        serde_json::from_str(&page).context("the page of revocations cannot be read")
    }
}
