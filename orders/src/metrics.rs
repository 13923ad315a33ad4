//! The metrics of orders.

use prometheus::{
    Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, histogram_opts, register_gauge,
    register_histogram, register_int_counter, register_int_counter_vec, register_int_gauge,
};

chassis::define_metrics! {
    /// Registers them.
    pub fn register;
    ORDER_EVENTS: IntCounterVec = register_int_counter_vec!(
        "order_events_total", "Events of orders, by their type.", &["type"]);
    REPLAYS: IntCounter = register_int_counter!(
        "order_replays_total", "Repeated requests that got the answer of the first one.");
    OUTBOX_PENDING: IntGauge = register_int_gauge!(
        "outbox_pending", "Messages that are not published yet.");
    OUTBOX_OLDEST: Gauge = register_gauge!(
        "outbox_oldest_seconds", "Age of the oldest message that is not published yet.");
    OUTBOX_PUBLISHED: IntCounter = register_int_counter!(
        "outbox_published_total", "Messages that this process has published.");
    OUTBOX_DELAY: Histogram = register_histogram!(histogram_opts!(
        "outbox_delay_seconds", "From a message's change to its confirm by the broker.",
        vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 10.0, 60.0]));
    STOCK_PENDING: IntGauge = register_int_gauge!(
        "stock_commands_pending", "Stock commands that inventory has not answered yet.");
    STOCK_OLDEST: Gauge = register_gauge!(
        "stock_commands_oldest_seconds", "Age of the oldest stock command without an answer.");
    STOCK_REFUSED: IntCounterVec = register_int_counter_vec!(
        "stock_commands_refused_total", "Stock commands that inventory has refused.", &["command"]);
    WEBHOOKS_REFUSED: IntCounter = register_int_counter!(
        "webhook_events_refused_total", "Webhook events that did not fit the state of their order.");
}
