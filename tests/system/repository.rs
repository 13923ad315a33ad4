//! What holds of the repository itself: each fact is said once, and no secret twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Name and value of each line of `.env`.
fn settings() -> Vec<(String, String)> {
    let text = fs::read_to_string(Path::new(ROOT).join(".env")).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn the_readme_names_every_setting_and_no_other() {
    let readme = fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let (_, section) = readme.split_once("\n## Settings\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let is_name = |text: &str| {
        text.contains('_')
            && !text.ends_with('_')
            && text
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
    };
    let mut named: Vec<&str> = section.split('`').filter(|text| is_name(text)).collect();
    let settings = settings();
    let mut known: Vec<&str> = settings.iter().map(|(name, _)| name.as_str()).collect();
    named.sort_unstable();
    known.sort_unstable();
    assert_eq!(named, known);
}

#[test]
fn no_credential_stands_outside_env() {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(ROOT)
        .output()
        .unwrap();
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let files = String::from_utf8(listed.stdout).unwrap();
    let secrets: Vec<(String, String)> =
        settings().into_iter().filter(|(name, _)| name.ends_with("_PASSWORD")).collect();
    assert!(secrets.len() > 5 && files.lines().count() > 50);
    for file in files.lines().filter(|file| *file != ".env") {
        let Ok(bytes) = fs::read(Path::new(ROOT).join(file)) else { continue };
        let text = String::from_utf8_lossy(&bytes);
        for (name, value) in &secrets {
            assert!(!text.contains(value.as_str()), "{file} holds the value of {name}");
            let encoded = BASE64_STANDARD_NO_PAD.encode(value);
            assert!(!text.contains(&encoded), "{file} holds the value of {name} in base64");
        }
        if let Some(url) = text.split("://").skip(1).find(|rest| has_credentials(rest)) {
            let shown: String = url.chars().take(40).collect();
            panic!("{file} has a URL with a password: {shown}");
        }
        // This file has examples of them.
        if let Some(shown) = literal_credential(&text)
            && !file.ends_with("repository.rs")
        {
            panic!("{file} has a credential: {shown}");
        }
    }
}

/// A private key, or a text that is given to something whose name ends like a credential's.
fn literal_credential(text: &str) -> Option<String> {
    const NAMES: [&str; 6] = ["password", "passwd", "secret", "token", "api_key", "access_key"];
    if let Some((_, key)) = text.split_once("PRIVATE KEY-----") {
        return Some(format!("a private key {}", key.lines().take(2).collect::<String>()));
    }
    let lower = text.to_ascii_lowercase();
    let mut places = NAMES.iter().flat_map(|name| {
        let length = name.len();
        lower.match_indices(*name).map(move |(at, _)| at + length)
    });
    places.find_map(|at| literal_after(&text[at..])).map(str::to_owned)
}

/// The text of `"…: 'text'` or `="text"`; none if it is taken from elsewhere or another name.
fn literal_after(rest: &str) -> Option<&str> {
    let rest = rest.trim_start_matches(['"', '\'']).trim_start_matches(' ');
    let rest = rest.strip_prefix([':', '=']).filter(|rest| !rest.starts_with('='))?;
    let rest = rest.trim_start_matches(' ');
    let quote = rest.chars().next().filter(|first| ['"', '\''].contains(first))?;
    let literal = rest[1..].split([quote, '\n']).next()?;
    let elsewhere = literal.contains(['$', '%', '{', '<']) || literal.contains("password");
    (literal.len() > 5 && !elsewhere).then_some(literal)
}

#[test]
fn a_credential_is_told_from_other_texts() {
    for found in [
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE",
        "let password = \"hunter2-9\";",
        "\"RABBITMQ_PASSWORD\": \"hunter2-9\"",
        "api_key='0123456789'",
    ] {
        assert!(literal_credential(found).is_some(), "{found}");
    }
    for harmless in [
        "password = \"$DB_PASSWORD\"",
        "role password :'owner_password'",
        "password_encryption = 'scram-sha-256'",
        "tokens.any(|token| token == \"keep-alive\")",
        "the password: \"x\"",
    ] {
        assert_eq!(literal_credential(harmless), None, "{harmless}");
    }
}

/// Of a URL after "://": a user and a password that are not taken from elsewhere.
fn has_credentials(rest: &str) -> bool {
    let end = rest.find(|letter: char| letter.is_whitespace() || "/?#\"'`<>)".contains(letter));
    let Some((user, _)) = rest[..end.unwrap_or(rest.len())].rsplit_once('@') else { return false };
    user.contains(':') && !user.contains(['%', '$', '{'])
}

#[test]
fn a_url_with_a_password_is_told_from_others() {
    assert!(has_credentials("guest:guest@127.0.0.1:5672/ and more"));
    for harmless in ["%s:%s@%s:%s/%s", "127.0.0.1:3000/a@b:c", "user@host/", "{user}:{password}@x"]
    {
        assert!(!has_credentials(harmless), "{harmless}");
    }
}

/// An advisory is listed as long as its crate is built in, no longer, and with the calls
/// that would reach it: the services make none of them.
#[test]
fn the_advisories_that_the_readme_lists_are_those_of_the_lock_file_and_nobody_calls_them() {
    let root = Path::new(ROOT);
    let lock = fs::read_to_string(root.join("Cargo.lock")).unwrap();
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let rows: Vec<Vec<&str>> = readme
        .lines()
        .filter(|line| line.starts_with("| RUSTSEC-"))
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    assert!(rows.len() > 5);
    for row in rows {
        let (name, version) = row[2].split_once(' ').unwrap();
        let package = format!("name = \"{name}\"\nversion = \"{version}\"");
        assert!(lock.contains(&package), "{}: Cargo.lock has no {}", row[1], row[2]);
    }
    let calls =
        ["multipart", "post_input", "AMQPUri", "Connection::open", "insecure_open(", "net2"];
    for service in ["chassis", "gateway", "inventory", "billing"] {
        let sources = sources(&root.join(service).join("src"));
        assert!(!sources.is_empty(), "{service} has no sources");
        for path in sources {
            let text = fs::read_to_string(&path).unwrap();
            let call = calls.iter().find(|call| text.contains(*call));
            assert!(call.is_none(), "{}: {call:?}", path.display());
        }
    }
}

/// Every file in this folder and the folders in it.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}
