//! What must hold of the repository itself: settings are documented, credentials stand in .env
//! only, and the advisories that are ignored are those that are listed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use harness::services::{dotenv, services};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

#[test]
fn the_page_of_settings_names_every_setting_and_no_other() {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/settings.md")).unwrap();
    let (_, section) = page.split_once("\n## Settings\n").unwrap();
    let is_name = |text: &str| {
        text.contains('_')
            && !text.ends_with('_')
            && text
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
    };
    let mut named: Vec<&str> = section.split('`').filter(|text| is_name(text)).collect();
    let mut known: Vec<&str> = dotenv().keys().map(String::as_str).collect();
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
    let secrets: Vec<(&String, &String)> = dotenv()
        .iter()
        .filter(|(name, _)| name.ends_with("_PASSWORD") || name.ends_with("_KEYS"))
        .collect();
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
        // This file has examples of credentials.
        if let Some(shown) = literal_credential(&text)
            && !file.ends_with("repo_lint.rs")
        {
            panic!("{file} has a credential: {shown}");
        }
    }
}

/// A private key, or a literal that is assigned to a name that ends like a credential's.
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

/// The text of `"…: 'text'` or `="text"`; none where it is a placeholder or another name.
fn literal_after(rest: &str) -> Option<&str> {
    let rest = rest.trim_start_matches(['"', '\'']).trim_start_matches(' ');
    let rest = rest.strip_prefix([':', '=']).filter(|rest| !rest.starts_with('='))?;
    let rest = rest.trim_start_matches(' ');
    let quote = rest.chars().next().filter(|first| ['"', '\''].contains(first))?;
    let literal = rest[1..].split([quote, '\n']).next()?;
    let placeholder = literal.contains(['$', '%', '{', '<']) || literal.contains("password");
    (literal.len() > 5 && !placeholder).then_some(literal)
}

#[test]
fn the_search_finds_credentials_and_no_other_text() {
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

/// Whether a URL, from behind its "://", holds a user and a password that is no placeholder.
fn has_credentials(rest: &str) -> bool {
    let end = rest.find(|letter: char| letter.is_whitespace() || "/?#\"'`<>)".contains(letter));
    let Some((user, _)) = rest[..end.unwrap_or(rest.len())].rsplit_once('@') else { return false };
    user.contains(':') && !user.contains(['%', '$', '{'])
}

#[test]
fn the_search_finds_urls_with_a_password_and_no_others() {
    assert!(has_credentials("guest:guest@127.0.0.1:5672/ and more"));
    for harmless in ["%s:%s@%s:%s/%s", "127.0.0.1:3000/a@b:c", "user@host/", "{user}:{password}@x"]
    {
        assert!(!has_credentials(harmless), "{harmless}");
    }
}

/// An advisory is listed as long as its crate is built in, and no longer. Each is listed with
/// the calls that would reach its fault; the services make none of them.
#[test]
fn the_listed_advisories_are_those_of_the_lock_file_and_their_calls_are_not_used() {
    let root = Path::new(ROOT);
    let lock = fs::read_to_string(root.join("Cargo.lock")).unwrap();
    let page = fs::read_to_string(root.join("docs/decisions.md")).unwrap();
    let rows: Vec<Vec<&str>> = page
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
    for package in services().iter().map(|row| row.name.as_str()).chain(["chassis"]) {
        let sources = sources(&root.join(package).join("src"));
        assert!(!sources.is_empty(), "{package} has no sources");
        for path in sources {
            let text = fs::read_to_string(&path).unwrap();
            let call = calls.iter().find(|call| code_of(&text).any(|line| line.contains(*call)));
            assert!(call.is_none(), "{}: {call:?}", path.display());
        }
    }
}

/// The lines of a source without those that are comments.
fn code_of(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim_start).filter(|line| !line.starts_with("//"))
}

/// Every file in this folder and the folders in it.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}
