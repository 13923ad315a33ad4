//! The gateway's own metrics.

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, register_int_counter, register_int_counter_vec,
    register_int_gauge,
};

chassis::define_metrics! {
    /// Registers all of them.
    pub fn register;
    RATE_LIMITED: IntCounter = register_int_counter!(
        "http_requests_rate_limited_total",
        "Requests rejected because their address had used up its quota.");
    PUBLISHES: IntCounterVec = register_int_counter_vec!(
        "broker_publishes_total",
        "Messages by outcome; not_sent: withdrawn after a wait for others.", &["outcome"]);
    PUBLISHES_UNCONFIRMED: IntGauge = register_int_gauge!(
        "broker_publishes_unconfirmed", "Messages that are published and not confirmed yet.");
    BROKER_CONNECTED: IntGauge = register_int_gauge!(
        "broker_connected", "1 while the broker is connected.");
}
