//! The fields of a JSON body: what each must be, and all errors together.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::value::RawValue;

use crate::decimal::Cents;
use crate::problem::Problem;

mod objects;

pub use objects::{address, holds_card_number, object, payment_method};

/// What a body says of a field.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Given<T> {
    /// Nothing.
    #[default]
    Absent,
    /// `null`.
    Null,
    /// Something that breaks a rule; the error was added.
    Invalid,
    /// A value.
    Value(T),
}

impl<T> Given<T> {
    /// The value, if there is one.
    pub fn value(self) -> Option<T> {
        match self {
            Given::Value(value) => Some(value),
            Given::Absent | Given::Null | Given::Invalid => None,
        }
    }

    /// Whether the body names the field.
    pub fn is_present(&self) -> bool {
        !matches!(self, Given::Absent)
    }
}

/// Collects the rules that the fields of one body break. A method that reads a field adds an error
/// where the field breaks the rule; an absent field and null break none.
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

    /// A field that is parsed by `parse`.
    pub fn field<'r, T, R: Display>(
        &mut self,
        raw: Option<&'r RawValue>,
        field: &str,
        parse: impl FnOnce(&'r str) -> Result<T, R>,
    ) -> Given<T> {
        match raw.map(|raw| raw.get()) {
            None => Given::Absent,
            Some("null") => Given::Null,
            Some(json) => match parse(json) {
                Ok(value) => Given::Value(value),
                Err(rule) => {
                    self.add(field, rule);
                    Given::Invalid
                }
            },
        }
    }

    /// The value of a field that must be there and must not be null. Without one it is the default
    /// value, and there is an error.
    pub fn require<T: Default>(&mut self, given: Given<T>, field: &str) -> T {
        match given {
            Given::Value(value) => return value,
            Given::Absent => self.add(field, "is required"),
            Given::Null => self.add(field, "must not be null"),
            Given::Invalid => (),
        }
        T::default()
    }

    /// A text.
    pub fn text<T>(
        &mut self,
        raw: Option<&RawValue>,
        field: &str,
        check: impl FnOnce(String) -> Result<T, &'static str>,
    ) -> Given<T> {
        // The parser fails for anything but a string, and for half a surrogate pair.
        self.field(raw, field, |json| match serde_json::from_str::<String>(json) {
            // The one character that PostgreSQL cannot store.
            Ok(text) if text.contains('\0') => Err("must not contain U+0000"),
            Ok(text) => check(text),
            Err(_) if json.starts_with('"') => Err("must be a valid string"),
            Err(_) => Err("must be a string"),
        })
    }

    /// A text that must be there.
    pub fn required_text<T: Default>(
        &mut self,
        raw: Option<&RawValue>,
        field: &str,
        check: impl FnOnce(String) -> Result<T, &'static str>,
    ) -> T {
        let given = self.text(raw, field, check);
        self.require(given, field)
    }

    /// A text of one line with at most this many characters, without white space at its ends. An
    /// empty one is null.
    pub fn short_text(
        &mut self,
        raw: Option<&RawValue>,
        field: &str,
        max_chars: usize,
    ) -> Given<String> {
        let trim = |text: String| match text.trim() {
            line if line.chars().any(char::is_control) => {
                Err("must not contain control characters")
            }
            line => Ok(line.to_owned()),
        };
        match self.text(raw, field, trim) {
            Given::Value(line) if line.is_empty() => Given::Null,
            Given::Value(line) if line.chars().count() > max_chars => {
                self.add(field, format!("must be at most {max_chars} characters"));
                Given::Invalid
            }
            given => given,
        }
    }

    /// A whole number, written without fraction and exponent.
    pub fn integer(
        &mut self,
        raw: Option<&RawValue>,
        field: &str,
        range: RangeInclusive<i64>,
    ) -> Given<i64> {
        self.field(raw, field, |json| match json.parse() {
            Ok(number) if range.contains(&number) => Ok(number),
            _ => Err(format!("must be a whole number from {} to {}", range.start(), range.end())),
        })
    }

    /// An amount of money, as a number or as a string that spells one.
    pub fn amount(&mut self, raw: Option<&RawValue>, field: &str, max: Cents) -> Given<Cents> {
        self.field(raw, field, |json| {
            let is_scalar =
                json.starts_with(['"', '-']) || json.starts_with(|c: char| c.is_ascii_digit());
            let text = match json.starts_with('"') {
                true => serde_json::from_str(json).unwrap_or_default(),
                false => json.to_owned(),
            };
            let amount = Cents::parse(&text).filter(|amount| is_scalar && *amount <= max);
            amount.ok_or_else(|| {
                format!("must be an amount from 0.00 to {max} with at most two decimals")
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::to_raw_value;

    use super::*;

    fn raw(json: &str) -> Box<RawValue> {
        RawValue::from_string(json.to_owned()).unwrap()
    }

    #[test]
    fn a_whole_number_has_neither_fraction_nor_exponent_and_is_in_its_range() {
        for (json, expected) in [
            ("1", Some(1)),
            ("99", Some(99)),
            ("-0", None),
            ("0", None),
            ("100", None),
            ("-1", None),
            ("1.0", None),
            ("1e1", None),
            ("10000000000", None),
            ("99999999999999999999", None),
            ("\"1\"", None),
            ("true", None),
            ("[]", None),
        ] {
            let mut errors = Errors::default();
            let given = errors.integer(Some(&raw(json)), "n", 1..=99);
            assert_eq!(given.value(), expected, "{json}");
            assert_eq!(errors.into_result().is_ok(), expected.is_some(), "{json}");
        }
    }

    #[test]
    fn an_amount_is_a_number_or_a_string_that_spells_one() {
        for (json, expected) in [
            ("9.99", Some(999)),
            ("\"9.99\"", Some(999)),
            ("0", Some(0)),
            ("100.00", Some(10_000)),
            ("100.01", None),
            ("1.005", None),
            ("-1", None),
            ("1e30", None),
            ("\"NaN\"", None),
            ("\"\"", None),
            ("\" 1\"", None),
            ("true", None),
            ("{}", None),
        ] {
            let mut errors = Errors::default();
            let given = errors.amount(Some(&raw(json)), "price", Cents(10_000));
            assert_eq!(given.value(), expected.map(Cents), "{json}");
            assert_eq!(errors.into_result().is_ok(), expected.is_some(), "{json}");
        }
    }

    #[test]
    fn an_absent_field_null_and_an_invalid_value_are_told_apart() {
        let mut errors = Errors::default();
        let long = to_raw_value("ab\ncd").unwrap();
        for (raw, expected) in [
            (None, Given::Absent),
            (Some(&*raw("null")), Given::Null),
            (Some(&*raw("\"  \"")), Given::Null),
            (Some(&*raw("\" ab \"")), Given::Value("ab".to_owned())),
            (Some(&*raw("\"abcd\"")), Given::Invalid),
            (Some(&*long), Given::Invalid),
            (Some(&*raw("1")), Given::Invalid),
        ] {
            assert_eq!(errors.short_text(raw, "name", 3), expected);
        }
        let text = errors.into_result().unwrap_err().to_string();
        assert_eq!(
            text,
            "name must be at most 3 characters; name must not contain control characters; \
             name must be a string"
        );
    }
}
