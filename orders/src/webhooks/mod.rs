//! Events of payment and shipping providers: the same changes under the same rules as an
//! administrator's calls, by signed requests.

pub mod event;
pub mod routes;
pub mod signature;
pub mod store;
