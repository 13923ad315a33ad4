//! What the tests of every service need: its servers, an HTTP client, and processes to start.
//!
//! - [`TestDb`], [`TestVhost`]: a database and a virtual host of one test's own, on the servers
//!   that `provision/local test` starts; [`connect_as_superuser`], [`management_api`].
//! - [`dispatch()`]: a request to a service's routes, without a socket.
//! - [`migrations`]: applies and rolls back migrations as `provision/migrate.sh` does.
//! - [`http`]: one client for every test ([`http::send`], [`http::post`], [`http::raw`]), and
//!   [`http::metric`], which reads a service's metrics.
//! - [`process::Service`]: a started program with its log; signals, and what `/proc` says of it.
//! - [`fake_upstream::FakeUpstream`]: an HTTP server that answers as a test wants.
//! - `TokenIssuer`: access tokens without the service that makes them.
//! - [`http_corpus`]: streams of bytes that every server here must read in one way.
//! - [`eventually`]: polls with a deadline, where another test would sleep.

mod db;
mod dispatch;
pub mod fake_upstream;
pub mod http;
pub mod http_corpus;
pub mod migrations;
pub mod process;
#[cfg(feature = "auth")]
mod token_issuer;
mod vhost;

use std::fmt::Display;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::id;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

pub use db::{TestDb, connect_as_service, connect_as_superuser, end_other_sessions};
pub use dispatch::{dispatch, respond};
#[cfg(feature = "auth")]
pub use token_issuer::TokenIssuer;
pub use vhost::{TestVhost, admin_broker, management_api, vhost_path};

/// A name that no other test has, in this process or another.
pub fn unique_name(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}_{}_{number}", id())
}

/// An address that no other test has. The whole of 127.0.0.0/8 is this machine's, so services
/// of different tests never share a port.
pub fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = id();
    let (high, low) = ((process / 250 % 250) as u8, (process % 250) as u8);
    Ipv4Addr::new(127, 1 + low, 1 + high, NEXT.fetch_add(1, Ordering::SeqCst))
}

/// The repository's root folder.
pub fn repository_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A variable of the test servers. Without servers a test fails; it is not skipped.
pub fn test_var(name: &str) -> String {
    let value = std::env::var(name).ok();
    assert!(
        value.is_some() && std::env::var("MATINEE_TEST_SERVERS_DIR").is_ok(),
        "{name} is not set: run the tests by `provision/local test cargo`, which starts the servers"
    );
    value.unwrap_or_default()
}

/// Polls until `find` finds something; panics with `what` after `seconds`.
pub fn eventually<T>(what: impl Display, seconds: u64, mut find: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {seconds} s: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Sets a flag when it is dropped, also by a panic: a scoped thread that runs until the flag
/// is set would otherwise keep a failed test from ending.
pub struct SetOnDrop<'f>(pub &'f AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
