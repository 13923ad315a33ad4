//! A movie: its fields, its JSON form, and its rules.

use chassis::{Problem, request};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A movie of the catalogue. The order of the fields is that of the answers.
#[derive(Clone, Debug, Serialize)]
pub struct Movie {
    /// Assigned by the database.
    pub id: i64,
    /// 1 to 255 characters.
    pub title: String,
    /// Up to 10,000 characters; empty when there is none.
    pub description: String,
}

/// The values of a new movie.
#[derive(Debug)]
pub struct NewMovie {
    /// Trimmed and within its limits.
    pub title: String,
    /// Within its limits.
    pub description: String,
}

/// The new values of a movie, at least one; `None` keeps the value.
#[derive(Debug)]
pub struct MovieUpdate {
    /// Trimmed and within its limits.
    pub title: Option<String>,
    /// Within its limits.
    pub description: Option<String>,
}

/// The fields of a body, not yet checked; other fields are skipped.
#[derive(Deserialize)]
struct RawMovie<'b> {
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    title: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    description: Option<&'b RawValue>,
}

/// The name of a field and the rule that it breaks.
type FieldError = (String, String);

impl NewMovie {
    /// Parses a body; the problem names every invalid field at once.
    pub fn from_json(text: &str) -> Result<NewMovie, Problem> {
        let body: RawMovie<'_> = request::json_object(text)?;
        let title = title(body.title)
            .and_then(|title| title.ok_or_else(|| ("title".to_owned(), "is required".to_owned())));
        let (title, description) = combine(title, description(body.description))?;
        Ok(NewMovie { title, description: description.unwrap_or_default() })
    }
}

impl MovieUpdate {
    /// Parses a body; the problem names every invalid field at once.
    pub fn from_json(text: &str) -> Result<MovieUpdate, Problem> {
        let body: RawMovie<'_> = request::json_object(text)?;
        let (title, description) = combine(title(body.title), description(body.description))?;
        if title.is_none() && description.is_none() {
            return Err(Problem::invalid_field("body", "must have a title or a description"));
        }
        Ok(MovieUpdate { title, description })
    }
}

fn combine<A, B>(a: Result<A, FieldError>, b: Result<B, FieldError>) -> Result<(A, B), Problem> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (a, b) => Err(Problem::unprocessable([a.err(), b.err()].into_iter().flatten().collect())),
    }
}

/// The title without white space (Unicode's `White_Space`) at its ends.
fn title(value: Option<&RawValue>) -> Result<Option<String>, FieldError> {
    text_field(value, "title", |text| {
        let title = text.trim();
        let length = title.chars().count();
        if (1..=255).contains(&length) {
            Ok(title)
        } else {
            Err("must be 1 to 255 characters after trimming")
        }
    })
}

fn description(value: Option<&RawValue>) -> Result<Option<String>, FieldError> {
    text_field(value, "description", |text| {
        let length = text.chars().count();
        if length <= 10_000 { Ok(text) } else { Err("must be at most 10000 characters") }
    })
}

/// The text of a field. Null is not "absent": whether it means "empty" or "unchanged" is for the
/// client to say.
fn text_field(
    value: Option<&RawValue>,
    field: &str,
    check: impl Fn(&str) -> Result<&str, &'static str>,
) -> Result<Option<String>, FieldError> {
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
