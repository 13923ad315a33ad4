//! A movie: its fields, its form in JSON, and what may be said of it.

use chassis::{Problem, request};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A movie of the catalogue. The order of the fields is that of the answers.
#[derive(Clone, Debug, Serialize)]
pub struct Movie {
    /// Given by the database.
    pub id: i64,
    /// What it is called.
    pub title: String,
    /// What it is about; empty when nothing is known.
    pub description: String,
}

/// What a new movie shall be.
#[derive(Debug)]
pub struct NewMovie {
    /// Trimmed and within its limits.
    pub title: String,
    /// Within its limits.
    pub description: String,
}

/// What shall change of a movie, at least one of the two; `None` keeps its value.
#[derive(Debug)]
pub struct Change {
    /// Trimmed and within its limits.
    pub title: Option<String>,
    /// Within its limits.
    pub description: Option<String>,
}

/// What a body says of a movie, as it is spelled; other fields are skipped.
#[derive(Deserialize)]
struct Body<'b> {
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    title: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    description: Option<&'b RawValue>,
}

/// A field and the rule that it breaks.
type Fault = (String, String);

impl NewMovie {
    /// Takes a body apart; every field at fault is told at once.
    pub fn from_json(text: &str) -> Result<NewMovie, Problem> {
        let body: Body<'_> = request::json_object(text)?;
        let title = title(body.title)
            .and_then(|title| title.ok_or_else(|| ("title".to_owned(), "is required".to_owned())));
        let (title, description) = both(title, description(body.description))?;
        Ok(NewMovie { title, description: description.unwrap_or_default() })
    }
}

impl Change {
    /// Takes a body apart; every field at fault is told at once.
    pub fn from_json(text: &str) -> Result<Change, Problem> {
        let body: Body<'_> = request::json_object(text)?;
        let (title, description) = both(title(body.title), description(body.description))?;
        if title.is_none() && description.is_none() {
            return Err(Problem::invalid_field("body", "must have a title or a description"));
        }
        Ok(Change { title, description })
    }
}

fn both<A, B>(a: Result<A, Fault>, b: Result<B, Fault>) -> Result<(A, B), Problem> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (a, b) => Err(Problem::unprocessable([a.err(), b.err()].into_iter().flatten().collect())),
    }
}

/// Without the white space (Unicode's `White_Space`) around it; inside it stays.
fn title(value: Option<&RawValue>) -> Result<Option<String>, Fault> {
    text(value, "title", |text| {
        let title = text.trim();
        let length = title.chars().count();
        if (1..=255).contains(&length) {
            Ok(title)
        } else {
            Err("must be 1 to 255 characters after trimming")
        }
    })
}

fn description(value: Option<&RawValue>) -> Result<Option<String>, Fault> {
    text(value, "description", |text| {
        let length = text.chars().count();
        if length <= 10_000 { Ok(text) } else { Err("must be at most 10000 characters") }
    })
}

/// A field that, where it is present, is a text. Null is not "absent": whether it
/// would mean "empty" or "as it was" is for the client to say.
fn text(
    value: Option<&RawValue>,
    field: &str,
    check: impl Fn(&str) -> Result<&str, &'static str>,
) -> Result<Option<String>, Fault> {
    let Some(value) = value else { return Ok(None) };
    // It fails for anything but a string, and for half a surrogate pair.
    let checked = match serde_json::from_str::<String>(value.get()) {
        // The one character that PostgreSQL cannot store.
        Ok(text) if text.contains('\0') => Err("must not contain U+0000"),
        Ok(text) => check(&text).map(str::to_owned),
        Err(_) if value.get().starts_with('"') => Err("must be a valid string"),
        Err(_) => Err("must be a string"),
    };
    match checked {
        Ok(text) => Ok(Some(text)),
        Err(rule) => Err((field.to_owned(), rule.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(body: serde_json::Value) -> Result<NewMovie, Problem> {
        NewMovie::from_json(&body.to_string())
    }

    #[test]
    fn a_title_is_trimmed_of_unicode_white_space_and_of_nothing_else() {
        let title = |text: &str| new(serde_json::json!({ "title": text })).unwrap().title;
        assert_eq!(title("\u{3000}\t\u{a0} The  Matrix\u{2028}\r\n"), "The  Matrix");
        // A right-to-left mark and a zero-width joiner are no white space.
        assert_eq!(title("\u{200f}שלום\u{200d}"), "\u{200f}שלום\u{200d}");
    }

    #[test]
    fn a_character_is_a_unicode_scalar_value_whatever_its_bytes() {
        let long = |title, description| {
            new(serde_json::json!({
                "title": "🎬".repeat(title),
                "description": "🎬".repeat(description),
            }))
        };
        assert!(long(255, 10_000).is_ok());
        let refused = long(256, 10_001).unwrap_err().to_string();
        assert_eq!(
            refused,
            "title must be 1 to 255 characters after trimming; \
             description must be at most 10000 characters"
        );
    }
}
