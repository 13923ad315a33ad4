//! What must hold of any bytes that come from outside: functions that panic where it does not.
//!
//! `provision/local fuzz` lets libFuzzer look for such bytes, guided by which code
//! they reach; what it has found interesting is kept in `corpus/`, and `cargo test`
//! goes through all of it.

pub mod message;
pub mod order;
pub mod request;
