//! The fields of a body: what each must be, and all errors together.

use std::fmt::Display;

use chassis::Problem;
use serde_json::value::RawValue;
use unicode_normalization::UnicodeNormalization;

use crate::passwords::check_new;

/// What a body says of a field.
#[derive(Clone, Debug, PartialEq)]
pub enum Given<T> {
    /// Nothing.
    Absent,
    /// `null`.
    Null,
    /// A value.
    Value(T),
}

impl<T> Given<T> {
    /// The value, if there is one.
    pub fn value(self) -> Option<T> {
        match self {
            Given::Value(value) => Some(value),
            Given::Absent | Given::Null => None,
        }
    }

    /// Whether the body names the field.
    pub fn is_present(&self) -> bool {
        !matches!(self, Given::Absent)
    }
}

/// Collects the rules that the fields of one body break.
#[derive(Default)]
pub struct Errors(Vec<(String, String)>);

impl Errors {
    /// Adds an error.
    pub fn add(&mut self, field: &str, rule: impl Display) {
        self.0.push((field.to_owned(), rule.to_string()));
    }

    /// 422 with all errors, if there is one.
    pub fn into_result(self) -> Result<(), Problem> {
        if self.0.is_empty() { Ok(()) } else { Err(Problem::unprocessable(self.0)) }
    }

    /// The text of a field; null is allowed.
    pub fn text(
        &mut self,
        raw: Option<&RawValue>,
        field: &str,
        check: impl Fn(String) -> Result<String, &'static str>,
    ) -> Given<String> {
        let Some(raw) = raw else { return Given::Absent };
        if raw.get() == "null" {
            return Given::Null;
        }
        // It fails for anything but a string, and for half a surrogate pair.
        let checked = match serde_json::from_str::<String>(raw.get()) {
            // The one character that PostgreSQL cannot store.
            Ok(text) if text.contains('\0') => Err("must not contain U+0000"),
            Ok(text) => check(text),
            Err(_) if raw.get().starts_with('"') => Err("must be a valid string"),
            Err(_) => Err("must be a string"),
        };
        checked.map_or_else(
            |rule| {
                self.add(field, rule);
                Given::Null
            },
            Given::Value,
        )
    }

    /// The text of a field that must be there.
    pub fn required(
        &mut self,
        raw: Option<&RawValue>,
        field: &str,
        check: impl Fn(String) -> Result<String, &'static str>,
    ) -> String {
        let errors = self.0.len();
        let given = self.text(raw, field, check);
        match given {
            Given::Value(text) => return text,
            Given::Absent => self.add(field, "is required"),
            Given::Null if self.0.len() == errors => self.add(field, "must be a string"),
            Given::Null => (),
        }
        String::new()
    }

    /// A new password, which must be there. `own` are the e-mail address and the names of the account.
    pub fn new_password(&mut self, raw: Option<&RawValue>, field: &str, own: &[&str]) -> String {
        self.required(raw, field, |text| check_new(&text, own).map(|()| text))
    }
}

/// Text of at most this many characters, trimmed, without control characters; `None` where it is
/// empty.
pub fn short_text(text: &str, most: usize) -> Result<Option<String>, &'static str> {
    let text = text.trim();
    if text.chars().any(char::is_control) {
        return Err("must not contain control characters");
    }
    if text.chars().count() > most {
        return Err(match most {
            50 => "must be at most 50 characters",
            100 => "must be at most 100 characters",
            _ => "must be at most 200 characters",
        });
    }
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

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
