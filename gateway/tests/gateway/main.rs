//! The gateway from outside: alone, with the broker, and in front of the whole system.

mod backup;
mod clock;
mod door;
mod forward;
mod framing;
mod harness;
mod logs;
mod publish;
mod repository;
mod secrets;
mod system;
