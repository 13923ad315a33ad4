//! The outbox: messages that are written with a change and published afterwards, whatever happens to
//! the process that wrote them.

pub mod command;
pub mod messages;
pub mod relay;
pub mod store;
