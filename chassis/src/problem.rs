//! The answer to a request that is refused or fails: RFC 9457 problem details.

use std::error::Error;
use std::fmt;

use rouille::Response;
use serde::Serialize;
use serde_json::{Map, Value};

/// A refusal or a failure. The client gets the detail; the cause goes only to the log.
#[derive(Debug)]
pub struct Problem {
    status: u16,
    title: &'static str,
    detail: String,
    fields: Vec<(String, String)>,
    // Boxed, because it is rarely there and every result has room for a problem.
    members: Option<Box<Map<String, Value>>>,
    headers: Vec<(&'static str, String)>,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl Problem {
    /// Any status, with the standard's reason phrase as the title.
    pub fn new(status: u16, detail: impl Into<String>) -> Problem {
        Problem {
            status,
            title: reason_phrase(status),
            detail: detail.into(),
            fields: Vec::new(),
            members: None,
            headers: Vec::new(),
            cause: None,
        }
    }

    /// 400: the request cannot be parsed.
    pub fn bad_request(detail: impl Into<String>) -> Problem {
        Problem::new(400, detail)
    }

    /// 404.
    pub fn not_found(detail: impl Into<String>) -> Problem {
        Problem::new(404, detail)
    }

    /// 405; `allow` lists the methods of the resource.
    pub fn method_not_allowed(allow: &str) -> Problem {
        Problem::new(405, format!("this resource answers to {allow}")).with_header("Allow", allow)
    }

    /// 422 for one field and the rule that it breaks.
    pub fn invalid_field(field: &str, rule: impl Into<String>) -> Problem {
        Problem::unprocessable(vec![(field.to_owned(), rule.into())])
    }

    /// 422 with one entry for each field: its name and the rule that it breaks.
    pub fn unprocessable(fields: Vec<(String, String)>) -> Problem {
        let messages: Vec<String> =
            fields.iter().map(|(field, rule)| format!("{field} {rule}")).collect();
        Problem { fields, ..Problem::new(422, messages.join("; ")) }
    }

    /// 503: something that this service needs is away. Trying again later may help.
    pub fn unavailable(detail: impl Into<String>) -> Problem {
        Problem::new(503, detail).with_header("Retry-After", "1")
    }

    /// 500: a failure that no request should cause.
    pub fn internal() -> Problem {
        Problem::new(500, "the request could not be served; the log of the service has the reason")
    }

    /// Adds the cause, for the log.
    pub fn with_cause(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Problem {
        self.cause = Some(cause.into());
        self
    }

    /// Adds a member to the document (RFC 9457 section 3.2), for programs.
    pub fn with_member(mut self, name: &str, value: impl Serialize) -> Problem {
        // It fails only for a map whose keys are no strings.
        let value = serde_json::to_value(value).unwrap_or_default();
        self.members.get_or_insert_default().insert(name.to_owned(), value);
        self
    }

    /// Adds a header to the response.
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Problem {
        self.headers.push((name, value.into()));
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The response. `error` repeats the detail for clients that look for that key; `errors` has
    /// one entry for each invalid field.
    pub fn into_response(self, request_id: &str) -> Response {
        let document = Document {
            kind: "about:blank",
            title: self.title,
            status: self.status,
            detail: &self.detail,
            error: &self.detail,
            request_id,
            errors: self.fields.iter().map(|(field, rule)| FieldError { field, rule }).collect(),
            members: self.members.as_deref(),
        };
        let mut response = Response::json(&document)
            .with_status_code(self.status)
            .with_unique_header("Content-Type", "application/problem+json");
        for (name, value) in self.headers {
            response = response.with_unique_header(name, value);
        }
        response
    }
}

/// The members of the document, in the order in which they are sent.
#[derive(Serialize)]
struct Document<'p> {
    #[serde(rename = "type")]
    kind: &'p str,
    title: &'p str,
    status: u16,
    detail: &'p str,
    error: &'p str,
    request_id: &'p str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldError<'p>>,
    #[serde(flatten)]
    members: Option<&'p Map<String, Value>>,
}

#[derive(Serialize)]
struct FieldError<'p> {
    field: &'p str,
    rule: &'p str,
}

/// For the log: the detail and, where there is one, the cause with its own causes.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)?;
        let mut cause: Option<&dyn Error> = self.cause.as_ref().map(|boxed| &**boxed as _);
        while let Some(err) = cause {
            write!(f, ": {err}")?;
            cause = err.source();
        }
        Ok(())
    }
}

/// The reason phrase of a status, RFC 9110 section 15.
pub(crate) fn reason_phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        206 => "Partial Content",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "Status",
    }
}
