//! The harness: the services' real programs, started for a test, and load on them.
//!
//! - [`Stack`]: the variables of one set of services, on a loopback address of its own; starts
//!   them. [`services`] is the table `provision/services`, [`binaries`] where their programs are.
//! - [`proxy::TcpProxy`]: delays, loses, cuts and resets what goes through it.
//! - [`load`]: clients that post distinct orders or movies, and the [`load::Ledger`] of what was
//!   acknowledged, which is compared with the tables.
//! - [`bodies`]: orders and movies as JSON.
//!
//! What a service's own tests need as well is in [`chassis::testing`]; of it, this crate
//! re-exports the HTTP client, [`Service`] and [`FakeUpstream`].

pub mod binaries;
pub mod bodies;
pub mod load;
pub mod proxy;
pub mod services;
mod stack;

use std::net::Ipv4Addr;

pub use chassis::testing::fake_upstream::{FakeUpstream, answer_ok};
pub use chassis::testing::http::{Reply, agent, get, post, send};
pub use chassis::testing::own_address;
pub use chassis::testing::process::Service;
pub use stack::Stack;

/// Everything that the gateway at this address sends back for `sent` and the end of the stream:
/// for requests that no client library would send.
pub fn raw(address: Ipv4Addr, sent: &str) -> String {
    chassis::testing::http::raw((address, 3000).into(), sent.as_bytes())
}
