//! What every service counts, in the Prometheus text format.
//!
//! A service adds its own to the same registry by [`define_metrics!`](crate::define_metrics!). Memory, threads and descriptors of the process come from the crate.

use prometheus::{
    Encoder, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, TextEncoder,
    histogram_opts, register_histogram, register_histogram_vec, register_int_counter,
    register_int_counter_vec, register_int_gauge,
};
use rouille::{Request, Response};

use crate::problem::Problem;
use crate::router::RoutedResponse;

/// Declares metrics of a module as statics, and a function that registers them all,
/// so that a scrape shows a zero and not a gap.
#[macro_export]
macro_rules! define_metrics {
    ($(#[$doc:meta])* $visible:vis fn $register:ident; $($name:ident: $kind:ty = $make:expr;)*) => {
        $(pub(crate) static $name: ::std::sync::LazyLock<$kind> =
            // Fails only for a name that is taken or malformed: a fault of the module.
            ::std::sync::LazyLock::new(|| $make.expect("a metric is registered once"));)*

        $(#[$doc])*
        $visible fn $register() {
            $(::std::sync::LazyLock::force(&$name);)*
        }
    };
}

define_metrics! {
    pub(crate) fn register_server;
    REQUESTS: IntCounterVec = register_int_counter_vec!(
        "http_requests_total", "Requests answered.", &["route", "method", "status_class"]);
    REQUEST_SECONDS: HistogramVec = register_histogram_vec!(histogram_opts!(
        "http_request_duration_seconds", "From the request's first byte to the answer's last.",
        vec![0.000_25, 0.001, 0.004, 0.016, 0.064, 0.25, 1.0, 4.0, 16.0]), &["route"]);
    CONNECTIONS: IntGauge = register_int_gauge!(
        "http_connections_open", "Client connections.");
    EVICTED: IntCounter = register_int_counter!(
        "http_connections_evicted_total", "Waiting connections closed to make room for new ones.");
    REJECTED: IntCounter = register_int_counter!(
        "http_connections_rejected_total", "Connections answered 503 because none could make room.");
    ACCEPT_ERRORS: IntCounter = register_int_counter!(
        "http_accept_errors_total", "Failed accepts, such as too many open files.");
}

define_metrics! {
    pub(crate) fn register_pool;
    POOL_CONNECTIONS: IntGauge = register_int_gauge!(
        "db_pool_connections", "Connections of the database pool.");
    POOL_IDLE: IntGauge = register_int_gauge!(
        "db_pool_idle", "Connections of the database pool that nobody uses.");
    POOL_TIMEOUTS: IntCounter = register_int_counter!(
        "db_pool_timeouts_total", "Waits for a database connection that were given up.");
    POOL_WAIT: Histogram = register_histogram!(histogram_opts!(
        "db_pool_wait_seconds", "Waits for a database connection.",
        vec![0.000_01, 0.000_1, 0.001, 0.01, 0.1, 1.0]));
}

/// Serves a scrape at any path; for a listener apart from the public door.
pub fn scrape(_request: &Request) -> RoutedResponse {
    RoutedResponse { route: "/metrics", result: render() }
}

fn render() -> Result<Response, Problem> {
    let encoder = TextEncoder::new();
    let mut text = Vec::new();
    encoder
        .encode(&prometheus::gather(), &mut text)
        .map_err(|err| Problem::internal().with_cause(err))?;
    Ok(Response::from_data(encoder.format_type().to_owned(), text))
}
