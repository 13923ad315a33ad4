//! One line a record on stderr: time (UTC), level, message.

use std::io::{LineWriter, stderr};
use std::panic;

use simplelog::{ConfigBuilder, LevelFilter, WriteLogger};

use crate::env::Env;

/// Reads `LOG_LEVEL`; the default is `info`.
pub fn level_from_env(env: &mut Env) -> LevelFilter {
    // Spelled as a range of numbers it would be a riddle, so it is read as text.
    match env.optional("LOG_LEVEL").map(|text| text.parse()) {
        None => LevelFilter::Info,
        Some(Ok(level)) => level,
        Some(Err(_)) => {
            env.fault("LOG_LEVEL must be one of off, error, warn, info, debug, trace");
            LevelFilter::Info
        }
    }
}

/// Starts logging, and makes a panic one line of the log like any other error.
///
/// Without the `LineWriter` simplelog makes some twenty writes a record, and
/// lines of two threads or two processes would tear.
pub fn init(level: LevelFilter) -> anyhow::Result<()> {
    let config = ConfigBuilder::new()
        .set_time_format_rfc3339()
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        // amiquip tells each frame at debug, and each failure both there and to us.
        .add_filter_ignore_str("amiquip")
        .build();
    WriteLogger::init(level, config, LineWriter::new(stderr()))?;
    panic::set_hook(Box::new(|panic| log::error!("{}", panic.to_string().replace('\n', " "))));
    Ok(())
}
