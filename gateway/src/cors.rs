//! Cross-origin requests from web pages (WHATWG Fetch, "CORS protocol").

use chassis::router::RoutedResponse;
use rouille::{Request, Response};

/// The response headers that a page may read, besides the ones that the standard allows.
const EXPOSED: &str = concat!(
    "Location, ETag, Link, X-Request-Id, Retry-After, RateLimit, WWW-Authenticate, ",
    "Idempotency-Replayed"
);

const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE";

/// How long a browser may keep the answer to a preflight, in seconds.
const MAX_AGE_S: &str = "600";

/// The origins whose pages may use the API. Credentials are never allowed.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Origins {
    /// No page on another origin.
    #[default]
    None,
    /// Pages of any origin.
    Any,
    /// Pages of these origins, in lower case.
    List(Vec<String>),
}

impl Origins {
    /// Parses nothing, `*`, or origins such as `https://shop.example:8443`, separated by commas; fails
    /// with the first invalid entry.
    pub fn parse(text: &str) -> Result<Origins, String> {
        let entries: Vec<&str> =
            text.split(',').map(str::trim).filter(|entry| !entry.is_empty()).collect();
        match entries.as_slice() {
            [] => Ok(Origins::None),
            ["*"] => Ok(Origins::Any),
            entries => {
                let parsed = entries.iter().map(|it| parse_origin(it).ok_or((*it).to_owned()));
                parsed.collect::<Result<_, _>>().map(Origins::List)
            }
        }
    }

    /// Answers a preflight, or calls `serve` and adds the CORS headers to its response, also to a
    /// problem.
    pub fn handle(
        &self,
        request: &Request,
        serve: impl FnOnce() -> RoutedResponse,
    ) -> RoutedResponse {
        if *self == Origins::None {
            return serve();
        }
        let headers = self.headers(request.header("Origin"));
        let is_preflight = request.method() == "OPTIONS"
            && request.header("Origin").is_some()
            && request.header("Access-Control-Request-Method").is_some();
        let RoutedResponse { route, result } = match is_preflight {
            true => RoutedResponse { route: "", result: Ok(self.preflight(request)) },
            false => serve(),
        };
        let result = match result {
            Ok(response) => Ok(headers.into_iter().fold(response, |response, (name, value)| {
                if name == "Vary" {
                    return add_vary(response, &value);
                }
                response.with_unique_header(name, value)
            })),
            Err(problem) => Err(headers
                .into_iter()
                .fold(problem, |problem, (name, value)| problem.with_header(name, value))),
        };
        RoutedResponse { route, result }
    }

    fn headers(&self, origin: Option<&str>) -> Vec<(&'static str, String)> {
        let exposed = ("Access-Control-Expose-Headers", EXPOSED.to_owned());
        match (self, origin) {
            (Origins::None, _) => Vec::new(),
            (Origins::Any, _) => vec![("Access-Control-Allow-Origin", "*".to_owned()), exposed],
            (Origins::List(list), Some(origin)) if list.contains(&origin.to_ascii_lowercase()) => {
                // A cache must not give this response to a page of another origin.
                let vary = ("Vary", "Origin".to_owned());
                vec![("Access-Control-Allow-Origin", origin.to_owned()), exposed, vary]
            }
            (Origins::List(_), _) => vec![("Vary", "Origin".to_owned())],
        }
    }

    fn preflight(&self, request: &Request) -> Response {
        let response = Response::empty_204();
        let is_allowed = self.headers(request.header("Origin")).len() > 1;
        if !is_allowed {
            return response;
        }
        let response = response
            .with_unique_header("Access-Control-Allow-Methods", METHODS)
            .with_unique_header("Access-Control-Max-Age", MAX_AGE_S);
        // No header has a meaning here that would make it dangerous, so those asked for are allowed.
        match request.header("Access-Control-Request-Headers") {
            Some(names) => {
                response.with_unique_header("Access-Control-Allow-Headers", names.to_owned())
            }
            None => response,
        }
    }
}

fn add_vary(mut response: Response, value: &str) -> Response {
    response.headers.push(("Vary".into(), value.to_owned().into()));
    response
}

/// `scheme://host[:port]` in lower case, without a path.
fn parse_origin(text: &str) -> Option<String> {
    let (scheme, authority) = text.split_once("://")?;
    let is_scheme = !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let is_authority = !authority.is_empty()
        && authority.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte));
    (is_scheme && is_authority).then(|| text.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use chassis::problem::Problem;

    use super::*;

    fn answer(origins: &str, headers: &[(&str, &str)], method: &str, fail: bool) -> Response {
        let headers = headers.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        let request = Request::fake_http(method, "/", headers.collect(), vec![]);
        let serve = || RoutedResponse {
            route: "/",
            result: if fail { Err(Problem::not_found("no")) } else { Ok(Response::text("yes")) },
        };
        let routed = Origins::parse(origins).unwrap().handle(&request, serve);
        routed.result.unwrap_or_else(|problem| problem.into_response("id"))
    }

    fn header(response: &Response, wanted: &str) -> Option<String> {
        let mut found = response.headers.iter().filter(|(name, _)| name == wanted);
        found.next().map(|(_, value)| value.to_string())
    }

    const ALLOWED: &str = "Access-Control-Allow-Origin";

    #[test]
    fn without_origins_no_response_has_a_cors_header() {
        let response = answer("", &[("Origin", "https://a.example")], "GET", false);
        assert_eq!((header(&response, ALLOWED), header(&response, "Vary")), (None, None));
    }

    #[test]
    fn a_listed_origin_gets_its_headers_and_another_gets_none() {
        let listed = "https://a.example, http://localhost:8000";
        for fail in [false, true] {
            let response = answer(listed, &[("Origin", "https://a.example")], "GET", fail);
            assert_eq!(header(&response, ALLOWED).as_deref(), Some("https://a.example"));
            assert_eq!(header(&response, "Vary").as_deref(), Some("Origin"));
            let exposed = header(&response, "Access-Control-Expose-Headers").unwrap();
            for name in ["ETag", "Retry-After", "Idempotency-Replayed"] {
                assert!(exposed.contains(name), "{exposed}");
            }
            assert_eq!(header(&response, "Access-Control-Allow-Credentials"), None);
            for other in ["https://b.example", "https://a.example.evil.example", "null"] {
                let response = answer(listed, &[("Origin", other)], "GET", fail);
                assert_eq!(header(&response, ALLOWED), None, "{other}");
                assert_eq!(header(&response, "Vary").as_deref(), Some("Origin"), "{other}");
            }
        }
    }

    #[test]
    fn a_preflight_is_answered_here() {
        let preflight = [
            ("Origin", "https://a.example"),
            ("Access-Control-Request-Method", "PUT"),
            ("Access-Control-Request-Headers", "content-type,if-match"),
        ];
        for origins in ["*", "https://a.example"] {
            let response = answer(origins, &preflight, "OPTIONS", true);
            assert_eq!(response.status_code, 204);
            assert!(header(&response, "Access-Control-Allow-Methods").unwrap().contains("PUT"));
            let headers = header(&response, "Access-Control-Allow-Headers");
            assert_eq!(headers.as_deref(), Some("content-type,if-match"));
        }
        let response = answer("https://b.example", &preflight, "OPTIONS", true);
        assert_eq!(header(&response, "Access-Control-Allow-Methods"), None);
        let plain = answer("*", &[("Origin", "https://a.example")], "OPTIONS", false);
        assert_eq!(plain.status_code, 200, "without a requested method it is no preflight");
    }

    #[test]
    fn an_entry_that_is_no_origin_is_an_error() {
        for wrong in ["a.example", "https://a.example/path", "https://", "*, https://a.example"] {
            assert!(Origins::parse(wrong).is_err(), "{wrong}");
        }
    }
}
