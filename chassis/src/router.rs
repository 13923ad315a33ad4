//! The table of routes: which handler serves a request.

use rouille::{Request, Response};

use crate::problem::Problem;
use crate::request::path;

/// The segments that a route's `{…}` and `*` matched, in order, encoded as [`path`] has them.
pub type Params<'r> = [&'r str];

/// The function that serves a route.
pub type Handler<A> = fn(&A, &Request, &Params<'_>) -> Result<Response, Problem>;

/// One row of a service's table of routes.
pub struct Route<A> {
    method: &'static str,
    path: &'static str,
    handler: Handler<A>,
}

/// A row of the table. In `path` a segment `{name}` matches any one segment, and a last segment
/// `*` matches any number of segments, also none; `method` may be `*`.
pub const fn route<A>(method: &'static str, path: &'static str, handler: Handler<A>) -> Route<A> {
    Route { method, path, handler }
}

/// A response and the path of its route, which is the label of its metrics.
pub struct RoutedResponse {
    /// The route's path as the table has it; `""` where none matched.
    pub route: &'static str,
    /// The response, or the problem to send.
    pub result: Result<Response, Problem>,
}

/// Finds the route of a request and calls its handler.
///
/// A path matches with and without a trailing slash. HEAD goes to the route of GET (the server
/// leaves the body out), OPTIONS is answered with `Allow`, and any other method that the path does
/// not have is 405. Where several paths of the table match, the first one counts.
pub fn dispatch<A>(routes: &[Route<A>], app: &A, request: &Request) -> RoutedResponse {
    let path = path(request);
    let method = if request.method() == "HEAD" { "GET" } else { request.method() };
    let mut allowed: Vec<&str> = Vec::new();
    let mut known = "";
    for route in routes {
        let Some(params) = match_template(route.path, &path) else { continue };
        // `/users/exists` is not `/users/{id}`, also with a method that only the latter has.
        if !known.is_empty() && route.path != known {
            continue;
        }
        if route.method == method || route.method == "*" {
            return RoutedResponse {
                route: route.path,
                result: (route.handler)(app, request, &params),
            };
        }
        known = route.path;
        allowed.push(route.method);
    }
    let result = if allowed.is_empty() && !(method == "OPTIONS" && path == "*") {
        Err(Problem::not_found("there is nothing at this path"))
    } else {
        if allowed.contains(&"GET") {
            allowed.push("HEAD");
        }
        allowed.push("OPTIONS");
        match method {
            "OPTIONS" => Ok(Response::empty_204().with_unique_header("Allow", allowed.join(", "))),
            _ => Err(Problem::method_not_allowed(&allowed.join(", "))),
        }
    };
    RoutedResponse { route: known, result }
}

fn match_template<'p>(template: &str, path: &'p str) -> Option<Vec<&'p str>> {
    let path = path.strip_prefix('/')?;
    // "//" is not "/" with a trailing slash.
    let path = path.strip_suffix('/').filter(|rest| !rest.is_empty()).unwrap_or(path);
    let mut segments = path.split('/');
    let mut params = Vec::new();
    for wanted in template[1..].split('/') {
        if wanted == "*" {
            params.extend(segments);
            return Some(params);
        }
        let segment = segments.next()?;
        if wanted.starts_with('{') {
            params.push(segment);
        } else if wanted != segment {
            return None;
        }
    }
    segments.next().is_none().then_some(params)
}

/// The positive_id in a path: a positive 64-bit integer in plain digits.
pub fn positive_id(params: &Params<'_>) -> Option<i64> {
    let digits = params.first().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    digits.parse().ok().filter(|positive_id| *positive_id > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_matches_with_and_without_a_trailing_slash_and_no_other_does() {
        let matches = |template, path| match_template(template, path).is_some();
        assert!(matches("/", "/") && matches("/a", "/a") && matches("/a", "/a/"));
        assert!(matches("/a/{id}", "/a/1/") && matches("/a/*", "/a") && matches("/a/*", "/a/b/c"));
        for (template, path) in [("/", "//"), ("/a", "/a//"), ("/a", "//a"), ("/a/{id}", "/a/1/2")]
        {
            assert!(!matches(template, path), "{path}");
        }
    }

    #[test]
    fn of_several_paths_that_match_the_first_one_counts_with_all_its_methods() {
        const ROUTES: &[Route<()>] = &[
            route("GET", "/users/exists", |(), _, _| Ok(Response::text("exists"))),
            route("GET", "/users/{id}", |(), _, _| Ok(Response::text("one"))),
            route("PATCH", "/users/{id}", |(), _, _| Ok(Response::text("changed"))),
        ];
        let status = |method: &str, path: &str| {
            let request = Request::fake_http(method, path, vec![], vec![]);
            let RoutedResponse { route, result } = dispatch(ROUTES, &(), &request);
            (route, result.map_or_else(|problem| problem.status(), |found| found.status_code))
        };
        assert_eq!(status("GET", "/users/exists"), ("/users/exists", 200));
        assert_eq!(status("PATCH", "/users/exists"), ("/users/exists", 405));
        assert_eq!(status("PATCH", "/users/7"), ("/users/{id}", 200));
    }
}
