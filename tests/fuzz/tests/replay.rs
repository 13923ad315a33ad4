//! Every input that the fuzzer found worth keeping, and every example, keeps to what must hold.

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
fn requests_are_read_in_one_way_however_they_are_cut() {
    let kept = files("corpus/request");
    assert!(kept.len() > 50, "{} inputs", kept.len());
    kept.iter().for_each(|stream| fuzz::request::check(stream));
    for (_, stream, _) in corpus::streams().iter().filter(|(_, stream, _)| stream.len() < 20_000) {
        fuzz::request::check(stream);
    }
}

#[test]
fn what_the_gateway_takes_is_what_billing_books() {
    let kept = files("corpus/order");
    assert!(kept.len() > 50, "{} inputs", kept.len());
    kept.iter().chain(&files("../../billing/messages")).for_each(|body| fuzz::order::check(body));
}

#[test]
fn billing_lives_through_any_message() {
    let kept = files("corpus/message");
    assert!(kept.len() > 50, "{} inputs", kept.len());
    kept.iter().for_each(|message| fuzz::message::check(message));
}
