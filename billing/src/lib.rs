//! Books the orders that arrive in a queue, each once.

pub mod config;
pub mod routes;

pub mod order;

pub mod consume;

pub mod books;
pub mod store;

pub mod dead_letters;
pub mod publish;

pub mod forget;
pub mod metrics;
