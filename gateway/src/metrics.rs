//! What the gateway counts beside what every service does.

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, IntGaugeVec, register_int_counter,
    register_int_counter_vec, register_int_gauge, register_int_gauge_vec,
};

chassis::define_metrics! {
    /// Registers all of them.
    pub fn register;
    FORWARD_IN_FLIGHT: IntGauge = register_int_gauge!(
        "upstream_in_flight", "Requests that wait for inventory.");
    FORWARD_REFUSED: IntCounter = register_int_counter!(
        "upstream_rejected_total", "Requests refused because too many waited for inventory.");
    FORWARD_RETRIED: IntCounter = register_int_counter!(
        "upstream_retries_total", "Requests asked again because their connection died.");
    BREAKER_STATE: IntGaugeVec = register_int_gauge_vec!(
        "circuit_breaker_state",
        "Circuit breaker of an upstream: 0 closed (asked), 1 half-open (tried by one), 2 open (not asked).",
        &["upstream"]);
    BREAKER_TRANSITIONS: IntCounterVec = register_int_counter_vec!(
        "circuit_breaker_transitions_total", "Changes of a circuit breaker by its new state.",
        &["upstream", "state"]);
    BREAKER_REFUSED: IntCounterVec = register_int_counter_vec!(
        "circuit_breaker_rejected_total", "Requests refused because the circuit breaker was not closed.",
        &["upstream"]);
    RATE_LIMITED: IntCounter = register_int_counter!(
        "http_requests_rate_limited_total", "Requests refused because their address had used up its quota.");
    PUBLISHES: IntCounterVec = register_int_counter_vec!(
        "broker_publishes_total",
        "Messages by what the broker said of them; not_sent: withdrawn after a wait for others.",
        &["outcome"]);
    PUBLISHES_IN_FLIGHT: IntGauge = register_int_gauge!(
        "broker_publishes_unconfirmed", "Messages not yet confirmed.");
    BROKER_CONNECTED: IntGauge = register_int_gauge!(
        "broker_connected", "1 while the broker is connected.");
}
