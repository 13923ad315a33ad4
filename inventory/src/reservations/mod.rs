//! Stock that is reserved for orders: held, confirmed, committed, released or expired. Only other
//! services use it.

pub mod combine;
pub mod reservation;
pub mod routes;
pub mod store;
pub mod sweep;
