//! The objects that several services read: postal addresses and payment methods.

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use uuid::Uuid;

use super::{Errors, Given};
use crate::request::deserialize_present;

/// A postal address.
#[derive(Serialize)]
struct Address {
    name: Option<String>,
    line1: Option<String>,
    line2: Option<String>,
    city: Option<String>,
    postal_code: Option<String>,
    region: Option<String>,
    country: Option<String>,
}

/// What a payment provider gave; never the number of a card.
#[derive(Serialize)]
struct PaymentMethod {
    #[serde(rename = "type")]
    kind: Option<String>,
    label: Option<String>,
    reference: Option<String>,
}

#[derive(Deserialize)]
struct RawAddress<'b> {
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    name: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    line1: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    line2: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    city: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    postal_code: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    region: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    country: Option<&'b RawValue>,
}

#[derive(Deserialize)]
struct RawPaymentMethod<'b> {
    #[serde(borrow, default, rename = "type", deserialize_with = "deserialize_present")]
    kind: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    label: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    reference: Option<&'b RawValue>,
}

/// An object in a field; null and an absent field are `None`.
pub fn object<'b, T: Deserialize<'b>>(
    raw: Option<&'b RawValue>,
    field: &str,
    errors: &mut Errors,
) -> Option<T> {
    let text = raw.map(RawValue::get).filter(|text| *text != "null")?;
    let parsed = Some(text).filter(|text| text.starts_with('{'));
    let parsed = parsed.and_then(|text| serde_json::from_str(text).ok());
    if parsed.is_none() {
        errors.add(field, "must be an object");
    }
    parsed
}

/// A text of an object, up to 200 characters; `required` says that it must be there.
fn member(
    raw: Option<&RawValue>,
    field: &str,
    required: bool,
    errors: &mut Errors,
) -> Option<String> {
    let given = errors.short_text(raw, field, 200);
    if required && matches!(given, Given::Absent | Given::Null) {
        errors.add(field, "is required");
    }
    given.value()
}

/// A postal address; its JSON form with all its fields. Null and an absent field are `None`.
pub fn address(raw: Option<&RawValue>, field: &str, errors: &mut Errors) -> Option<String> {
    let raw: RawAddress<'_> = object(raw, field, errors)?;
    let mut text =
        |raw, name: &str, required| member(raw, &format!("{field}.{name}"), required, errors);
    let address = Address {
        name: text(raw.name, "name", true),
        line1: text(raw.line1, "line1", true),
        line2: text(raw.line2, "line2", false),
        city: text(raw.city, "city", true),
        postal_code: text(raw.postal_code, "postal_code", false),
        region: text(raw.region, "region", false),
        country: text(raw.country, "country", true),
    };
    if address.country.as_ref().is_some_and(|code| !is_country(code)) {
        let rule = "must be a country code of two capital letters (ISO 3166-1), such as SE";
        errors.add(&format!("{field}.country"), rule);
    }
    to_raw_value(&address).ok().map(|raw| raw.get().to_owned())
}

/// What a payment provider gave: `type`, `label`, `reference`; its JSON form with all its fields. Null
/// and an absent field are `None`.
pub fn payment_method(raw: Option<&RawValue>, field: &str, errors: &mut Errors) -> Option<String> {
    let raw: RawPaymentMethod<'_> = object(raw, field, errors)?;
    let mut text = |raw, name: &str, required| {
        let field = format!("{field}.{name}");
        let text = member(raw, &field, required, errors);
        if text.as_deref().is_some_and(holds_card_number) {
            errors.add(&field, "must not hold the number of a card");
        }
        text
    };
    let method = PaymentMethod {
        kind: text(raw.kind, "type", true),
        label: text(raw.label, "label", false),
        reference: text(raw.reference, "reference", false),
    };
    to_raw_value(&method).ok().map(|raw| raw.get().to_owned())
}

/// Whether a text has 13 to 19 digits that satisfy the check of card numbers (ISO/IEC 7812-1, Luhn):
/// in one piece, or in groups with blanks or hyphens between, where no letter touches them. So a UUID is
/// none, whatever its digits are.
pub fn holds_card_number(text: &str) -> bool {
    let is_number = |digits: &str| (13..=19).contains(&digits.len()) && satisfies_luhn(digits);
    if Uuid::try_parse(text).is_ok() {
        return false;
    }
    if text.split(|letter: char| !letter.is_ascii_digit()).any(is_number) {
        return true;
    }
    let is_separator = |letter: char| " -".contains(letter);
    let is_part = |letter: char| letter.is_ascii_digit() || is_separator(letter);
    // What stands directly before the group, if no separator is between.
    let mut before: Option<char> = None;
    for part in text.split_inclusive(|letter: char| !is_part(letter)) {
        let behind = part.chars().next_back().filter(|letter| !is_part(*letter));
        let group = behind.map_or(part, |behind| &part[..part.len() - behind.len_utf8()]);
        let touches = |letter: Option<char>, separated: bool| {
            !separated && letter.is_some_and(char::is_alphanumeric)
        };
        let is_alone = !touches(before, group.starts_with(is_separator))
            && !touches(behind, group.ends_with(is_separator));
        let digits: String = group.chars().filter(char::is_ascii_digit).collect();
        if is_alone && is_number(&digits) {
            return true;
        }
        before = behind;
    }
    false
}

fn satisfies_luhn(digits: &str) -> bool {
    let sum: u32 = digits
        .bytes()
        .rev()
        .enumerate()
        .map(|(place, digit)| {
            let digit = u32::from(digit - b'0') << (place % 2);
            if digit > 9 { digit - 9 } else { digit }
        })
        .sum();
    sum.is_multiple_of(10)
}

/// Whether it is an officially assigned code of ISO 3166-1 alpha-2.
fn is_country(code: &str) -> bool {
    code.len() == 2 && COUNTRIES.split_ascii_whitespace().any(|known| known == code)
}

const COUNTRIES: &str = "
    AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS
    BT BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE
    EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM
    HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC
    LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA
    NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW
    SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO
    TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_card_is_found_and_a_uuid_is_none() {
        for card in [
            "4111111111111111",
            "4111 1111 1111 1111",
            "x 3782-822463-10005 y",
            "tok_4111111111111111",
            "(4111-1111-1111-1111)",
            "card4111111111111111",
        ] {
            assert!(holds_card_number(card), "{card}");
        }
        for other in [
            "4111111111111112",
            "tok_4111111111",
            "123456789012",
            "4111 1111 1111 1111 1111",
            "a4111 1111 1111 1111",
            "4111 1111 1111 1111b",
            // The digits of its last two groups satisfy the check.
            "01a21d3a-aad1-766d-4111-111111111111",
            "pay-01a21d3a-aad1-766d-8411-1111111111a1",
        ] {
            assert!(!holds_card_number(other), "{other}");
        }
    }
}
