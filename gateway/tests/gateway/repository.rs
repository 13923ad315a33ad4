//! What holds of the repository itself: each fact is said once, and no secret twice.

use std::fs;
use std::path::Path;
use std::process::Command;

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
        }
    }
}
