//! The gateway from outside: alone, in front of fakes, and with a real broker.

mod breaker_and_rate_limit;
mod forward;
mod publish;
