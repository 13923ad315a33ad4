//! The public door: forwards `/api/movies` to inventory, puts `/api/billing` on
//! the queue, and shows the contract. It owns no data.

pub mod breaker;
pub mod config;
pub mod docs;
pub mod forward;
pub mod limit;
pub mod metrics;
pub mod order;
pub mod proxies;
pub mod publish;
pub mod routes;

mod transport;

use chassis::health::Probe;

/// What the routes work with.
pub struct App {
    /// Asks inventory.
    pub inventory: forward::Inventory,
    /// Puts orders on the queue.
    pub publisher: publish::Publisher,
    /// What readiness looks at.
    pub probes: Vec<Probe>,
}
