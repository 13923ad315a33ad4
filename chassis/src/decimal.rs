//! Scalars as JSON spells them: numbers that may come as strings, and amounts of money without a
//! float in between.

use std::fmt;

use serde_json::value::RawValue;

/// The text of a string, or a number as it is written; or the rule that is broken.
pub fn string_or_number(value: &RawValue) -> Result<String, &'static str> {
    let raw = value.get();
    match raw.as_bytes().first() {
        // It fails for half a surrogate pair.
        Some(b'"') => serde_json::from_str(raw).map_err(|_| "must be a valid string"),
        Some(b'-' | b'0'..=b'9') => Ok(raw.to_owned()),
        _ => Err("must be a string or a number"),
    }
}

/// An amount of money in hundredths of its currency, at least zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cents(pub i64);

impl Cents {
    /// Reads any spelling that JSON has for a number (`2.5`, `2.500`, `25e-1`), exactly. `None` for
    /// an amount that is negative, too large, or has a fraction of a hundredth.
    pub fn parse(text: &str) -> Option<Cents> {
        parse_cents(text).map(Cents)
    }
}

/// With two decimals: `9.99`.
impl fmt::Display for Cents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:02}", self.0 / 100, self.0 % 100)
    }
}

fn parse_cents(text: &str) -> Option<i64> {
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i64>().ok()?),
        None => (text, 0),
    };
    if mantissa.ends_with('.') {
        return None;
    }
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = || whole.bytes().chain(fraction.bytes());
    if whole.is_empty() || !digits().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // Zeros at the end count as part of the exponent.
    let zeros = digits().rev().take_while(|byte| *byte == b'0').count();
    let kept = whole.len() + fraction.len() - zeros;
    if kept == 0 {
        return Some(0);
    }
    let mut number: i64 = 0;
    for digit in digits().take(kept) {
        number = number.checked_mul(10)?.checked_add(i64::from(digit - b'0'))?;
    }
    let shift = zeros as i64 + 2 - fraction.len() as i64;
    // A negative power is a fraction of a hundredth.
    let power = u32::try_from(exponent.checked_add(shift)?).ok()?;
    number.checked_mul(10i64.checked_pow(power)?).filter(|_| !negative)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_amount_is_read_exactly_in_every_spelling_json_has() {
        let table = [
            ("0", Some(0)),
            ("-0", Some(0)),
            ("-0.00", Some(0)),
            ("29.99", Some(2999)),
            ("0.29", Some(29)),
            ("180", Some(18000)),
            ("007.50", Some(750)),
            ("1e2", Some(10000)),
            ("25E-1", Some(250)),
            ("1.5e+1", Some(1500)),
            ("100e-4", Some(1)),
            ("1e-3", None),
            ("1.005", None),
            ("1.0500000000000000000000000000000000000000", Some(105)),
            ("0.000000000000000000000000000000000000001", None),
            ("999999999999.99", Some(99_999_999_999_999)),
            ("1e400", None),
            ("1e99999999999999999999", None),
            ("-1", None),
            ("123456789012345678901234567890", None),
            ("", None),
            ("-", None),
            ("e1", None),
            (" 1", None),
            ("+1", None),
            (".5", None),
            ("5.", None),
            ("1,5", None),
            ("1.2.3", None),
            ("1_000", None),
            ("NaN", None),
            ("١", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_cents(text), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn a_parsed_amount_is_printed_with_the_same_value(text in "[0-9]{1,13}([.][0-9]{1,2})?") {
            let cents = Cents::parse(&text).unwrap();
            prop_assert_eq!(Cents::parse(&cents.to_string()), Some(cents));
        }

        #[test]
        fn any_text_is_parsed_or_refused_without_a_panic(text in "[-+0-9.eE]{0,40}") {
            if let Some(Cents(cents)) = Cents::parse(&text) {
                prop_assert!(cents >= 0);
            }
        }

        #[test]
        fn hundredths_survive_every_way_to_write_them(
            number in 0..=99_999_999_999_999i64,
            zeros in 0usize..40,
        ) {
            let zeros_text = "0".repeat(zeros);
            let plain = format!("{}.{:02}{zeros_text}", number / 100, number % 100);
            let shifted = format!("{number}{zeros_text}e-{}", zeros + 2);
            prop_assert_eq!(parse_cents(&plain), Some(number));
            prop_assert_eq!(parse_cents(&shifted), Some(number));
        }
    }
}
