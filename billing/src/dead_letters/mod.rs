//! The dead letters: messages that can never be booked, each with its reason.

mod command;
mod properties;
mod publisher;

pub use command::run_command;
pub use publisher::{DeadLetter, DeadLetterPublisher};
