//! The three services together, from outside.

mod backup;
mod clock;
mod framing;
mod logs;
mod migrations;
mod repository;
mod secrets;
mod system;
