//! Declaring a module's metrics; `server` serves all of them in the Prometheus text format.
//!
//! Memory, threads and descriptors of the process come from the prometheus crate.

/// Declares metrics of a module as statics, and a function that registers them all: so a scrape
/// shows a zero for what has not happened yet, and not a gap.
#[macro_export]
macro_rules! define_metrics {
    ($(#[$doc:meta])* $visible:vis fn $register:ident; $($name:ident: $kind:ty = $make:expr;)*) => {
        $(pub(crate) static $name: ::std::sync::LazyLock<$kind> =
            // Fails only for a name that is taken or malformed: an error in the module.
            ::std::sync::LazyLock::new(|| $make.expect("a metric is registered once"));)*

        $(#[$doc])*
        $visible fn $register() {
            $(::std::sync::LazyLock::force(&$name);)*
        }
    };
}
