//! What the gateway counts beside what every service does.

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, register_int_counter, register_int_counter_vec,
    register_int_gauge,
};

chassis::metrics! {
    /// Registers all of them.
    pub fn register;
    FORWARD_IN_FLIGHT: IntGauge = register_int_gauge!(
        "forward_in_flight", "Requests that wait for inventory.");
    FORWARD_REFUSED: IntCounter = register_int_counter!(
        "forward_refused_total", "Requests refused because too many waited for inventory.");
    FORWARD_RETRIED: IntCounter = register_int_counter!(
        "forward_retried_total", "Requests asked again because their connection died.");
    PUBLISHES: IntCounterVec = register_int_counter_vec!(
        "publishes_total", "Messages by what the broker said of them.", &["outcome"]);
    PUBLISHES_IN_FLIGHT: IntGauge = register_int_gauge!(
        "publishes_in_flight", "Messages not yet confirmed.");
    BROKER_CONNECTED: IntGauge = register_int_gauge!(
        "broker_connected", "1 while the broker is connected.");
}
