//! A product: its fields, its JSON form, and its rules.

use chassis::decimal::Cents;
use chassis::fields::{Errors, Given};
use chassis::{Problem, request};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use url::Url;

/// The highest price that the column has digits for.
pub const MAX_PRICE: Cents = Cents(999_999_999_999);

/// Limits in characters.
const MAX_NAME_CHARS: usize = 200;
const MAX_DESCRIPTION_CHARS: usize = 2000;
const MAX_URL_CHARS: usize = 2000;

/// A product of the catalogue. The order of the fields is that of the answers.
#[derive(Clone, Debug, Serialize)]
pub struct Product {
    /// The key, given by an administrator and never used again.
    pub sku: String,
    /// 1 to 200 characters.
    pub name: String,
    /// Up to 2,000 characters; empty when there is none.
    pub description: String,
    /// With two decimals: `9.99`.
    pub price: String,
    /// ISO 4217.
    pub currency: String,
    /// Absolute, `https` or `http`.
    pub image_url: Option<String>,
    /// How many can be ordered: those on hand less those reserved.
    pub available: i32,
    /// RFC 3339 in UTC with milliseconds.
    pub created_at: String,
    /// RFC 3339 in UTC with milliseconds.
    pub updated_at: String,
}

/// The values of a new product.
#[derive(Debug)]
pub struct NewProduct {
    /// The key.
    pub sku: String,
    /// The name.
    pub name: String,
    /// Empty when there is none.
    pub description: String,
    /// The price of one.
    pub price: Cents,
    /// Absolute, `https` or `http`.
    pub image_url: Option<String>,
}

/// The new values of a product. What is `None` stays as it is.
#[derive(Debug)]
pub struct ProductUpdate {
    /// The name.
    pub name: Option<String>,
    /// The description; empty where it was cleared.
    pub description: Option<String>,
    /// The price of one.
    pub price: Option<Cents>,
    /// The address of a picture; the inner `None` clears it.
    pub image_url: Option<Option<String>>,
}

/// The fields of a body, not yet checked; other fields are skipped.
#[derive(Deserialize)]
struct RawProduct<'b> {
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    sku: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    name: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    description: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    price: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    currency: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    image_url: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    on_hand: Option<&'b RawValue>,
}

impl NewProduct {
    /// Parses the body of a creation; the problem names every invalid field at once.
    pub fn from_json(text: &str, currency: &str) -> Result<NewProduct, Problem> {
        let body: RawProduct<'_> = request::json_object(text)?;
        let mut errors = Errors::default();
        let sku = errors.required_text(body.sku, "sku", parse_sku);
        let name = name(body.name, &mut errors);
        let name = errors.require(name, "name");
        let price = errors.amount(body.price, "price", MAX_PRICE);
        let new = NewProduct {
            sku,
            name,
            price: errors.require(price, "price"),
            description: description(body.description, &mut errors).value().unwrap_or_default(),
            image_url: errors.text(body.image_url, "image_url", parse_image_url).value(),
        };
        check_fixed(&body, currency, &mut errors);
        errors.into_result()?;
        Ok(new)
    }
}

impl ProductUpdate {
    /// Parses the body of a change of the product `sku`; the problem names every invalid field at
    /// once.
    pub fn from_json(text: &str, sku: &str, currency: &str) -> Result<ProductUpdate, Problem> {
        let body: RawProduct<'_> = request::json_object(text)?;
        let mut errors = Errors::default();
        if errors.text(body.sku, "sku", Ok).value().is_some_and(|given| given != sku) {
            errors.add("sku", "cannot be changed");
        }
        let name = name(body.name, &mut errors);
        let price = errors.amount(body.price, "price", MAX_PRICE);
        let description = description(body.description, &mut errors);
        let image_url = errors.text(body.image_url, "image_url", parse_image_url);
        let update = ProductUpdate {
            name: name.is_present().then(|| errors.require(name, "name")),
            description: description.is_present().then(|| description.value().unwrap_or_default()),
            price: price.is_present().then(|| errors.require(price, "price")),
            image_url: image_url.is_present().then(|| image_url.value()),
        };
        check_fixed(&body, currency, &mut errors);
        errors.into_result()?;
        Ok(update)
    }
}

/// Fields of an answer that a body cannot set: ignoring them would hide a mistake.
fn check_fixed(body: &RawProduct<'_>, currency: &str, errors: &mut Errors) {
    let given = errors.text(body.currency, "currency", Ok).value();
    if given.is_some_and(|given| given != currency) {
        errors.add("currency", format!("must be {currency}, the currency of this store"));
    }
    if body.on_hand.is_some() {
        errors.add("on_hand", "is set by PUT /api/v1/products/{sku}/stock");
    }
}

/// The key of a product: 1 to 64 of `A-Z a-z 0-9 . _ -`. Of dots alone it would be a relative
/// segment of a path (RFC 3986 section 3.3).
pub fn parse_sku(text: String) -> Result<String, &'static str> {
    match is_sku(&text) {
        true => Ok(text),
        false => Err("must be 1 to 64 letters, digits, dots, hyphens or underscores"),
    }
}

/// Whether a text can be the key of a product.
pub fn is_sku(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&text.len())
        && text.bytes().all(allowed)
        && text.bytes().any(|byte| byte != b'.')
}

fn name(raw: Option<&RawValue>, errors: &mut Errors) -> Given<String> {
    errors.short_text(raw, "name", MAX_NAME_CHARS)
}

fn description(raw: Option<&RawValue>, errors: &mut Errors) -> Given<String> {
    errors.text(raw, "description", |text| match text.chars().count() {
        0..=MAX_DESCRIPTION_CHARS => Ok(text),
        _ => Err("must be at most 2000 characters"),
    })
}

/// An absolute URL as it was sent, if a browser can fetch it.
fn parse_image_url(text: String) -> Result<String, &'static str> {
    let scheme_and_rest = text.split_once("://");
    let is_web = scheme_and_rest.is_some_and(|(scheme, rest)| {
        // The parser would skip further slashes before the host.
        ["https", "http"].contains(&scheme) && !rest.starts_with(['/', '\\'])
    });
    // The parser would remove these.
    let has_gap = text.chars().any(|letter| letter.is_whitespace() || letter.is_control());
    let is_url = Url::parse(&text).is_ok_and(|url| url.has_host());
    match is_web && is_url && !has_gap && text.chars().count() <= MAX_URL_CHARS {
        true => Ok(text),
        false => Err("must be an absolute https or http URL of at most 2000 characters"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error(body: serde_json::Value) -> String {
        let new = NewProduct::from_json(&body.to_string(), "EUR");
        new.err().map(|problem| problem.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_sku_has_1_to_64_letters_digits_dots_hyphens_and_underscores() {
        for sku in ["a", "classic-box", "A.b_c-9", &"x".repeat(64), "..a"] {
            assert!(is_sku(sku), "{sku}");
        }
        for sku in ["", &"x".repeat(65), "a b", "é", "a/b", ".", "..", "a\n", "a%2Fb", "a\0"] {
            assert!(!is_sku(sku), "{sku:?}");
        }
    }

    #[test]
    fn an_image_is_an_absolute_web_address() {
        for url in ["https://example.org/a.png", "http://localhost:8080/ä?x=1#y"] {
            assert_eq!(parse_image_url(url.to_owned()).as_deref(), Ok(url));
        }
        for url in [
            "",
            "/a.png",
            "example.org/a.png",
            "ftp://example.org/a",
            "javascript:alert(1)",
            "https://",
            "https:///a",
            "https://exa mple.org",
            "https://example.org/\n",
            " https://example.org",
            "https://[::1",
            "https://example.org:99999/",
        ] {
            assert!(parse_image_url(url.to_owned()).is_err(), "{url}");
        }
    }

    #[test]
    fn every_invalid_field_is_named() {
        assert_eq!(error(json!({ "sku": "a", "name": "A", "price": "1.00" })), "");
        assert_eq!(
            error(json!({ "sku": "a b", "name": " ", "price": 1.005, "currency": "USD" })),
            "sku must be 1 to 64 letters, digits, dots, hyphens or underscores; \
             name must not be null; \
             price must be an amount from 0.00 to 9999999999.99 with at most two decimals; \
             currency must be EUR, the currency of this store"
        );
        let missing = "sku is required; name is required; price is required; \
                       on_hand is set by PUT /api/v1/products/{sku}/stock";
        assert_eq!(error(json!({ "on_hand": 1 })), missing);
    }
}
