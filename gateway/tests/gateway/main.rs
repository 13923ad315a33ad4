//! The gateway from outside: alone, with the broker, and in front of the whole system.

mod door;
mod forward;
mod harness;
mod publish;
mod repository;
mod system;
