//! The responses that handlers build most often.

use std::time::SystemTime;

use rouille::Response;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

const TIMESTAMP: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

/// A time as it stands in answers: RFC 3339 in UTC with milliseconds.
pub fn timestamp(time: SystemTime) -> String {
    // It fails only where a string cannot be written to.
    OffsetDateTime::from(time).format(TIMESTAMP).unwrap_or_default()
}

/// 200 with a JSON body.
pub fn ok(body: &impl Serialize) -> Response {
    Response::json(body)
}

/// 201 with a JSON body and the location of the new resource.
pub fn created(location: String, body: &impl Serialize) -> Response {
    ok(body).with_status_code(201).with_unique_header("Location", location)
}

/// Lets caches keep a response, if they ask each time whether it is still right (RFC 9111 section
/// 5.2.2.4). Without this the server sends `no-store`.
pub fn no_cache(response: Response) -> Response {
    response.with_unique_header("Cache-Control", "no-cache")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_timestamp_is_in_utc_with_milliseconds() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_795_768_530_123_999);
        assert_eq!(timestamp(time), "2026-11-27T08:35:30.123Z");
        assert_eq!(timestamp(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00.000Z");
    }
}
