//! The contract, and the page that shows it.
//!
//! `build.rs` has packed every file with gzip. It is sent as it is to clients that
//! take gzip. For the others it is unpacked when the first of them asks, once for all:
//! to unpack on the way out costs each slow client 110 KiB, its window and its buffers.

use std::io::{Cursor, Read};
use std::sync::OnceLock;

use flate2::read::GzDecoder;
use rouille::input::parse_priority_header;
use rouille::{Request, Response, ResponseBody};

/// Nothing but what the gateway itself serves. Swagger UI carries its icons as
/// `data:` in its style sheet and needs no inline script and no inline style.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self' data:; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'";

/// A file of this binary, gzipped.
struct Asset {
    content_type: &'static str,
    gzip: &'static [u8],
    uncompressed: OnceLock<Vec<u8>>,
}

macro_rules! file {
    ($content_type:literal, $name:literal) => {
        Asset {
            content_type: $content_type,
            gzip: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".gz")),
            uncompressed: OnceLock::new(),
        }
    };
}

static YAML: Asset = file!("application/yaml", "openapi.yaml");
static JSON: Asset = file!("application/json", "openapi.json");
static PAGE: Asset = file!("text/html; charset=utf-8", "index.html");
static ASSETS: [(&str, Asset); 5] = [
    ("swagger-ui-bundle.js", file!("text/javascript; charset=utf-8", "swagger-ui-bundle.js")),
    ("swagger-ui.css", file!("text/css; charset=utf-8", "swagger-ui.css")),
    ("index.css", file!("text/css; charset=utf-8", "index.css")),
    ("start.js", file!("text/javascript; charset=utf-8", "start.js")),
    // Swagger UI's, which must accompany every copy of it.
    ("LICENSE", file!("text/uncompressed; charset=utf-8", "LICENSE")),
];

/// `GET /openapi.yaml`
pub fn openapi_yaml(request: &Request) -> Response {
    serve(&YAML, request)
}

/// `GET /openapi.json`
pub fn openapi_json(request: &Request) -> Response {
    serve(&JSON, request)
}

/// `GET /docs`
pub fn page(request: &Request) -> Response {
    serve(&PAGE, request)
        .with_unique_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        .with_unique_header("Referrer-Policy", "no-referrer")
}

/// `GET /docs/{name}`: one of the files that the page loads, or `None`.
pub fn asset(name: &str, request: &Request) -> Option<Response> {
    let (_, file) = ASSETS.iter().find(|(known, _)| *known == name)?;
    Some(serve(file, request))
}

/// Clients may keep the file but ask each time whether it is still good: a 304 is
/// cheap, and a new release never meets the script of the one before.
fn serve(file: &'static Asset, request: &Request) -> Response {
    let packed = accepts_gzip(request);
    let (check, size) = file.gzip_trailer();
    let body = if packed { file.gzip } else { file.uncompressed() };
    let body = ResponseBody::from_reader_and_size(Cursor::new(body), body.len());
    let mut response = Response {
        status_code: 200,
        headers: vec![
            ("Content-Type".into(), file.content_type.into()),
            ("Cache-Control".into(), "no-cache".into()),
            ("Vary".into(), "Accept-Encoding".into()),
        ],
        data: body,
        upgrade: None,
    };
    // The two forms of one file are different bytes and so have different tags.
    let mut form = "";
    if packed {
        form = "-gzip";
        response = response.with_unique_header("Content-Encoding", "gzip");
    }
    response = response.with_etag(request, format!("\"{check:08x}-{size:x}{form}\""));
    if response.status_code == 304 {
        // A 304 says nothing of a content that it does not have (RFC 9110 section 15.4.5).
        response.headers.retain(|(name, _)| !name.starts_with("Content-"));
    }
    response
}

fn accepts_gzip(request: &Request) -> bool {
    let header = request.header("Accept-Encoding").unwrap_or_default();
    let named = |coding: &str| {
        parse_priority_header(header)
            .find(|(name, _)| name.eq_ignore_ascii_case(coding))
            .map(|(_, quality)| quality > 0.0)
    };
    named("gzip").or_else(|| named("*")).unwrap_or(false)
}

impl Asset {
    fn uncompressed(&self) -> &[u8] {
        self.uncompressed.get_or_init(|| {
            let mut uncompressed = Vec::with_capacity(self.gzip_trailer().1);
            let unpacked = GzDecoder::new(self.gzip).read_to_end(&mut uncompressed);
            // Packed by `build.rs` and compiled in: nothing can have come between.
            unpacked.expect("a file of this binary can be unpacked");
            uncompressed
        })
    }

    /// The checksum of the unpacked file and its size, which end every gzip file.
    fn gzip_trailer(&self) -> (u32, usize) {
        let gzip_trailer = self.gzip.last_chunk::<8>().copied().unwrap_or_default();
        let number = u64::from_le_bytes(gzip_trailer);
        (number as u32, (number >> 32) as usize)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn request(headers: &[(&str, &str)]) -> Request {
        let headers = headers.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        Request::fake_http("GET", "/", headers.collect(), Vec::new())
    }

    fn header<'r>(response: &'r Response, name: &str) -> Option<&'r str> {
        let mut headers = response.headers.iter();
        headers.find(|(known, _)| known == name).map(|(_, value)| &**value)
    }

    fn body(response: Response) -> Vec<u8> {
        let (mut reader, size) = response.data.into_reader_and_size();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(size, Some(bytes.len()), "the announced size is the true one");
        bytes
    }

    fn text(response: Response) -> String {
        String::from_utf8(body(response)).unwrap()
    }

    #[test]
    fn the_yaml_is_the_file_that_people_edit() {
        let response = openapi_yaml(&request(&[]));
        assert_eq!(header(&response, "Content-Type"), Some("application/yaml"));
        assert_eq!(text(response), include_str!("../api/openapi.yaml"));
    }

    #[test]
    fn the_json_says_the_same_in_the_same_order() {
        let response = openapi_json(&request(&[]));
        assert_eq!(header(&response, "Content-Type"), Some("application/json"));
        let json = text(response);
        assert!(json.starts_with(r#"{"openapi":"3.1.0","info":{"title":"Matinee","#));
        assert!(json.find(r#""/api/movies""#) < json.find(r#""/api/billing""#));
        let contract: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(contract["paths"]["/api/movies"]["post"]["operationId"], "createMovie");
        // Numbers stay numbers, and what looks like one stays text.
        let id = &contract["paths"]["/api/movies/{id}"]["parameters"][0]["schema"];
        assert_eq!(id["maximum"], i64::MAX);
        let order = &contract["components"]["schemas"]["Order"]["properties"];
        assert_eq!(order["user_id"]["examples"], serde_json::json!(["20", 20]));
    }

    #[test]
    fn the_contract_has_the_version_of_the_package() {
        let contract: Value = serde_json::from_slice(&body(openapi_json(&request(&[])))).unwrap();
        assert_eq!(contract["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn the_page_loads_only_assets_that_exist_here() {
        let page = text(page(&request(&[])));
        let mut links = 0;
        for (_, rest) in
            page.match_indices("=\"/docs/").map(|(at, found)| page.split_at(at + found.len()))
        {
            let name = rest.split('"').next().unwrap();
            assert!(asset(name, &request(&[])).is_some(), "{name}");
            links += 1;
        }
        assert_eq!(links, 4);
        assert!(!page.contains("//"), "no address of another server");
    }

    #[test]
    fn the_page_is_in_a_language_and_under_a_policy() {
        let response = page(&request(&[]));
        assert!(
            header(&response, "Content-Security-Policy").unwrap().contains("script-src 'self';")
        );
        assert!(text(response).contains("<html lang=\"en\">"));
    }

    #[test]
    fn there_is_no_other_asset() {
        for name in ["", "index.html", "swagger-ui.css.gz", "../Cargo.toml", "LICENSE "] {
            assert!(asset(name, &request(&[])).is_none(), "{name:?}");
        }
    }

    #[test]
    fn gzip_goes_to_those_who_take_it_and_is_the_same_file() {
        for (name, _) in &ASSETS {
            let uncompressed = asset(name, &request(&[])).unwrap();
            assert_eq!(header(&uncompressed, "Content-Encoding"), None);
            let packed = asset(name, &request(&[("Accept-Encoding", "gzip, br")])).unwrap();
            assert_eq!(header(&packed, "Content-Encoding"), Some("gzip"));
            assert_eq!(header(&packed, "Vary"), Some("Accept-Encoding"));
            assert_ne!(header(&uncompressed, "ETag"), header(&packed, "ETag"));

            let mut unpacked = Vec::new();
            GzDecoder::new(&body(packed)[..]).read_to_end(&mut unpacked).unwrap();
            assert!(!unpacked.is_empty());
            assert!(unpacked == body(uncompressed), "{name}");
        }
    }

    #[test]
    fn accept_encoding_decides() {
        for (header, gzip) in [
            ("", false),
            ("gzip", true),
            ("GZIP", true),
            ("deflate, gzip;q=1.0, *;q=0.5", true),
            ("*", true),
            ("gzip;q=0", false),
            ("gzip;q=0, *", false),
            ("*;q=0", false),
            ("identity", false),
            ("br;q=,;;,gzip", true),
        ] {
            assert_eq!(accepts_gzip(&request(&[("Accept-Encoding", header)])), gzip, "{header}");
        }
        assert!(!accepts_gzip(&request(&[])));
    }

    #[test]
    fn a_client_that_has_the_file_gets_no_body() {
        let first = openapi_yaml(&request(&[]));
        let tag = header(&first, "ETag").unwrap();
        let again = openapi_yaml(&request(&[("If-None-Match", tag)]));
        assert_eq!(again.status_code, 304);
        assert_eq!(header(&again, "ETag"), Some(tag));
        for name in ["Content-Type", "Content-Encoding"] {
            assert_eq!(header(&again, name), None, "{name}");
        }
        assert!(body(again).is_empty());
        assert_eq!(openapi_yaml(&request(&[("If-None-Match", "\"other\"")])).status_code, 200);
    }
}
