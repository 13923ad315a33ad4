//! The gateway from outside: alone, with the broker, and in front of the whole system.

mod backup;
mod clock;
mod door;
mod forward;
mod framing;
mod harness;
mod logs;
// With more modes than the tests need.
#[allow(dead_code)]
#[path = "../faults/proxy.rs"]
mod proxy;
mod publish;
mod repository;
mod secrets;
mod system;
