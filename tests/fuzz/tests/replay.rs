//! The checks hold for every input of the corpus and for every example.

use std::fs;
use std::path::Path;

use chassis::testing::http_corpus as corpus;

/// The files of a folder under this crate's own.
fn files(folder: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = fs::read_dir(&folder).unwrap_or_else(|err| panic!("{}: {err}", folder.display()));
    entries.map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect()
}

#[test]
fn a_request_is_read_in_one_way_however_it_is_cut_into_packets() {
    let kept = files("corpus/request");
    assert!(kept.len() > 50, "{} inputs", kept.len());
    kept.iter().for_each(|stream| fuzz::request::check(stream));
    for (_, stream, _) in corpus::streams().iter().filter(|(_, stream, _)| stream.len() < 20_000) {
        fuzz::request::check(stream);
    }
}

#[test]
fn the_gateway_accepts_exactly_the_orders_that_billing_books() {
    let kept = files("corpus/order");
    assert!(kept.len() > 50, "{} inputs", kept.len());
    kept.iter().chain(&files("../../billing/messages")).for_each(|body| fuzz::order::check(body));
}

#[test]
fn any_message_is_parsed_or_rejected_without_a_panic() {
    let kept = files("corpus/message");
    assert!(kept.len() > 50, "{} inputs", kept.len());
    kept.iter().for_each(|message| fuzz::message::check(message));
}

#[test]
fn no_access_token_is_accepted_but_a_signed_one_with_the_right_header_and_claims() {
    let kept = files("corpus/token");
    assert!(kept.len() > 20, "{} inputs", kept.len());
    kept.iter().for_each(|token| fuzz::token::check(token));
}
