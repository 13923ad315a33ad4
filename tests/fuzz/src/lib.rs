//! What must hold of any bytes that come from outside: functions that panic where it does not.
//!
//! `provision/local fuzz` lets libFuzzer search for such bytes, guided by the code that an input
//! reaches. The inputs that reached new code are kept in `corpus/`, and `cargo test` checks them
//! all.

pub mod message;
pub mod order;
pub mod request;
pub mod token;
