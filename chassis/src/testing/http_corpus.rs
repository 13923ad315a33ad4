//! Streams of requests, sound and crooked, that any server here must read in one way.
//!
//! The tests of the server loop use them, those of the gateway in front of
//! inventory, and the fuzzer, which begins with them.

/// A name, what is sent, and what a server must make of it, cut anyhow into packets:
/// one status a request, and the request as it was read.
pub type Stream = (&'static str, Vec<u8>, Vec<&'static str>);

/// The streams.
pub fn streams() -> Vec<Stream> {
    let long = |before: &str, letters: usize, after: &str| {
        [before.as_bytes(), "x".repeat(letters).as_bytes(), after.as_bytes()].concat()
    };
    let text = |text: &str| text.as_bytes().to_vec();
    let many_headers = "A: b\r\n".repeat(5000);
    let hundred_one = "A: b\r\n".repeat(101);
    vec![
        ("a plain request", text("GET /a HTTP/1.1\r\nHost: h\r\n\r\n"), vec!["200 GET /a h"]),
        (
            "two pipelined requests",
            text(
                "POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\nHost: h\r\n\r\n",
            ),
            vec!["200 POST /a h abc", "200 GET /b h"],
        ),
        (
            "empty lines before a request",
            text(
                "\r\n\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n",
            ),
            vec!["200 GET /a h", "200 GET /b h"],
        ),
        (
            "a chunked body with extension and trailer",
            text(
                "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0A\r\n0123456789\r\n0\r\nX-T: v\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n",
            ),
            vec!["200 POST / h abc0123456789", "200 GET /b h"],
        ),
        (
            "HTTP/1.0 closes, without Host too",
            text("GET /a HTTP/1.0\r\n\r\nGET /b HTTP/1.0\r\n\r\n"),
            vec!["200 GET /a none"],
        ),
        (
            "HTTP/1.0 with keep-alive",
            text("GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /b HTTP/1.0\r\n\r\n"),
            vec!["200 GET /a none", "200 GET /b none"],
        ),
        (
            "Connection: close",
            text(
                "GET /a HTTP/1.1\r\nHost: h\r\nConnection: Close\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n",
            ),
            vec!["200 GET /a h"],
        ),
        (
            "an absolute target outweighs Host",
            text("GET http://other:80/a?b HTTP/1.1\r\nHost: h\r\n\r\n"),
            vec!["200 GET /a?b other:80"],
        ),
        (
            "a raw UTF-8 path",
            text("GET /ü%2F//.. HTTP/1.1\r\nHost: h\r\n\r\n"),
            vec!["200 GET /ü%2F//.. h"],
        ),
        (
            "100-continue",
            text(
                "POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\nab",
            ),
            vec!["200 POST / h ab"],
        ),
        (
            "HEAD has no body",
            text("HEAD /stream HTTP/1.1\r\nHost: h\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n"),
            vec!["200", "200 GET /b h"],
        ),
        (
            "Transfer-Encoding and Content-Length",
            text(
                "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            ),
            vec!["400"],
        ),
        (
            "two equal Content-Lengths",
            text("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc"),
            vec!["400"],
        ),
        (
            "a list of lengths",
            text("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3, 3\r\n\r\nabc"),
            vec!["400"],
        ),
        (
            "a signed length",
            text("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +3\r\n\r\nabc"),
            vec!["400"],
        ),
        (
            "a length with letters",
            text("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3x\r\n\r\nabc"),
            vec!["400"],
        ),
        (
            "a negative length",
            text("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\nabc"),
            vec!["400"],
        ),
        (
            "an empty length",
            text("POST / HTTP/1.1\r\nHost: h\r\nContent-Length:\r\n\r\nabc"),
            vec!["400"],
        ),
        (
            "a length of 10^18",
            text("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000000000000\r\n\r\n"),
            vec!["413"],
        ),
        (
            "a length past 64 bits",
            text("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999999\r\n\r\n"),
            vec!["413"],
        ),
        (
            "a chunk past the limit",
            text(
                "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n",
            ),
            vec!["413"],
        ),
        (
            "identity is no coding",
            text("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity\r\n\r\n"),
            vec!["501"],
        ),
        (
            "gzip is not served",
            text("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
            vec!["501"],
        ),
        (
            "two codings",
            text(
                "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            ),
            vec!["400"],
        ),
        (
            "a coding with HTTP/1.0",
            text("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            vec!["400"],
        ),
        (
            "a chunk size with a sign",
            text(
                "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n",
            ),
            vec!["400"],
        ),
        (
            "a chunk longer than its size",
            text(
                "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
            ),
            vec!["400"],
        ),
        (
            "a chunk line with a bare line feed",
            text(
                "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
            ),
            vec!["400"],
        ),
        ("no Host", text("GET / HTTP/1.1\r\n\r\n"), vec!["400"]),
        ("two Hosts", text("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"), vec!["400"]),
        ("a Host with a path", text("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"), vec!["400"]),
        ("a NUL", text("GET / HTTP/1.1\r\nHost: h\r\nA: \0\r\n\r\n"), vec!["400"]),
        ("a folded header", text("GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n c\r\n\r\n"), vec!["400"]),
        (
            "a space before the colon",
            text("GET / HTTP/1.1\r\nHost: h\r\nA : b\r\n\r\n"),
            vec!["400"],
        ),
        ("a bare line feed", text("GET / HTTP/1.1\nHost: h\n\n"), vec!["400"]),
        (
            "a bare carriage return",
            text("GET / HTTP/1.1\r\nHost: h\r\nA: b\rc\r\n\r\n"),
            vec!["400"],
        ),
        (
            "a path that is not UTF-8",
            b"GET /\xff HTTP/1.1\r\nHost: h\r\n\r\n".to_vec(),
            vec!["400"],
        ),
        (
            "a header that is not UTF-8",
            b"GET / HTTP/1.1\r\nHost: h\r\nA: \xff\r\n\r\n".to_vec(),
            vec!["200 GET / h"],
        ),
        (
            "an absolute target with its scheme in capitals",
            text("GET HTTP://h/a HTTP/1.1\r\nHost: h\r\n\r\n"),
            vec!["200 GET /a h"],
        ),
        ("a fragment", text("GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n"), vec!["400"]),
        (
            "an authority as target",
            text("CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n"),
            vec!["400"],
        ),
        ("a tunnel to a path", text("CONNECT /a HTTP/1.1\r\nHost: h\r\n\r\n"), vec!["400"]),
        ("another version", text("GET / HTTP/1.2\r\nHost: h\r\n\r\n"), vec!["505"]),
        ("the preface of HTTP/2", text("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), vec!["505"]),
        ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), vec!["400"]),
        (
            "another expectation",
            text("POST / HTTP/1.1\r\nHost: h\r\nExpect: 200-ok\r\n\r\n"),
            vec!["417"],
        ),
        (
            "a header of 1 MB",
            long("GET / HTTP/1.1\r\nHost: h\r\nA: ", 1 << 20, "\r\n\r\n"),
            vec!["431"],
        ),
        (
            "5,000 headers",
            [b"GET / HTTP/1.1\r\nHost: h\r\n", many_headers.as_bytes(), b"\r\n"].concat(),
            vec!["431"],
        ),
        (
            "101 headers",
            [b"GET / HTTP/1.1\r\nHost: h\r\n", hundred_one.as_bytes(), b"\r\n"].concat(),
            vec!["431"],
        ),
        ("a URL of 200 KB", long("GET /", 200_000, " HTTP/1.1\r\nHost: h\r\n\r\n"), vec!["414"]),
        ("a URL of 9 KB", long("GET /", 9_000, " HTTP/1.1\r\nHost: h\r\n\r\n"), vec!["414"]),
        ("half a head", text("GET / HTTP/1.1\r\nHo"), vec!["400"]),
        (
            "half a body",
            text("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nabc"),
            vec!["400"],
        ),
        (
            "half a chunk",
            text("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc"),
            vec!["400"],
        ),
    ]
}
