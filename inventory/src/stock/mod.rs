//! The stock of products: how many are on hand, and who changed that, when and why.

pub mod routes;
pub mod store;
