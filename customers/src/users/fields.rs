//! E-mail addresses and user names: what each must be, and how they are compared.

use unicode_normalization::UnicodeNormalization;

/// An e-mail address. Whether it exists only a message to it can show, so little is checked: as it was
/// sent, and in the form in which it is compared, where one character may have become several.
pub fn email(text: String) -> Result<String, &'static str> {
    let text = text.trim();
    match is_email(text) && is_email(&comparison_key(text)) {
        true => Ok(text.to_owned()),
        false => Err("must be an e-mail address of 3 to 254 characters"),
    }
}

fn is_email(text: &str) -> bool {
    let has_gap = text.chars().any(|letter| letter.is_whitespace() || letter.is_control());
    let parts = text.split_once('@').filter(|(mailbox, domain)| {
        !mailbox.is_empty() && !domain.is_empty() && !domain.contains('@')
    });
    parts.is_some() && !has_gap && text.chars().count() <= 254
}

/// A user name. Without `@`, so that no user name looks like an e-mail address.
pub fn username(text: String) -> Result<String, &'static str> {
    let text = text.trim();
    let allowed = |letter: char| letter.is_alphanumeric() || "._-".contains(letter);
    match (1..=64).contains(&text.chars().count()) && text.nfkc().all(allowed) {
        true => Ok(text.to_owned()),
        false => Err("must be 1 to 64 letters, digits, dots, hyphens or underscores"),
    }
}

/// The form in which e-mail addresses and user names are compared.
pub fn comparison_key(text: &str) -> String {
    text.trim().nfkc().collect::<String>().to_lowercase()
}
