//! What this service counts beside what every service does.

use prometheus::{
    Histogram, IntCounter, IntGauge, exponential_buckets, histogram_opts, register_histogram,
    register_int_counter, register_int_gauge,
};

chassis::define_metrics! {
    /// Registers all of them.
    pub fn register;
    CONNECTED: IntGauge = register_int_gauge!(
        "billing_consumer_connected", "1 while this process consumes the queue.");
    CONSUMED: IntCounter = register_int_counter!(
        "billing_messages_consumed_total", "Messages processed and acknowledged.");
    BOOKED: IntCounter = register_int_counter!(
        "billing_orders_booked_total", "Orders written to the table.");
    DUPLICATES: IntCounter = register_int_counter!(
        "billing_messages_duplicates_total", "Messages whose order was booked already.");
    DEAD_LETTERS: IntCounter = register_int_counter!(
        "billing_dead_letters_total", "Messages published to the dead letters.");
    DEAD_LETTERS_PENDING: IntGauge = register_int_gauge!(
        "billing_dead_letters_pending", "Messages that are not published to the dead letters yet.");
    BATCH_SIZE: Histogram = register_histogram!(histogram_opts!(
        "billing_batch_size", "Messages in a batch.",
        exponential_buckets(1.0, 2.0, 11).unwrap_or_default()));
    BATCH_SECONDS: Histogram = register_histogram!(histogram_opts!(
        "billing_batch_duration_seconds", "From a batch's begin to its commit.",
        exponential_buckets(0.000_5, 2.0, 14).unwrap_or_default()));
    LAG: IntGauge = register_int_gauge!(
        "billing_consumer_lag_seconds", "Age of the last message processed, by its timestamp.");
}
