//! A user: its fields, its JSON form, and its rules.

use chassis::fields::{Errors, address, payment_method};
use chassis::{Problem, request};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::fields;
use crate::passwords::check_new;

/// An account as its owner and administrators see it. The order of the fields is that of the
/// answers; what is not set is null.
#[derive(Debug, Serialize)]
pub struct User {
    /// Assigned by the database, never used again.
    pub id: i64,
    /// As it was sent.
    pub email: String,
    /// As it was sent.
    pub username: Option<String>,
    /// Up to 100 characters.
    pub first_name: Option<String>,
    /// Up to 100 characters.
    pub last_name: Option<String>,
    /// Whether the user may administrate.
    pub is_admin: bool,
    /// A postal address as JSON, see [`chassis::fields::address`].
    pub shipping_address: Option<Box<RawValue>>,
    /// A postal address as JSON, see [`chassis::fields::address`].
    pub billing_address: Option<Box<RawValue>>,
    /// As JSON, see [`chassis::fields::payment_method`].
    pub payment_method: Option<Box<RawValue>>,
    /// RFC 3339 in UTC with milliseconds.
    pub created_at: String,
    /// RFC 3339 in UTC with milliseconds.
    pub updated_at: String,
}

/// A new account.
#[derive(Debug)]
pub struct NewUser {
    /// The e-mail address.
    pub email: String,
    /// The password, not yet hashed.
    pub password: String,
    /// The other fields.
    pub profile: Profile,
}

/// The fields that may be set at registration and changed later.
#[derive(Debug, Default)]
pub struct Profile {
    /// The user name.
    pub username: Option<String>,
    /// The first name.
    pub first_name: Option<String>,
    /// The last name.
    pub last_name: Option<String>,
    /// A postal address as JSON, see [`chassis::fields::address`].
    pub shipping_address: Option<String>,
    /// A postal address as JSON, see [`chassis::fields::address`].
    pub billing_address: Option<String>,
    /// As JSON, see [`chassis::fields::payment_method`].
    pub payment_method: Option<String>,
}

/// The changes of a `PATCH`.
#[derive(Debug)]
pub struct UserUpdate {
    /// The names of the columns that change.
    pub changes: Vec<&'static str>,
    /// The new e-mail address.
    pub email: Option<String>,
    /// The new value of `is_admin`.
    pub is_admin: Option<bool>,
    /// The new values of the other fields; `None` clears one that changes.
    pub profile: Profile,
    /// The owner's password, which a new e-mail address needs.
    pub current_password: Option<String>,
}

/// The fields of a body, not yet checked; other fields are skipped.
#[derive(Deserialize)]
struct RawUser<'b> {
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    email: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    password: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    current_password: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    username: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    first_name: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    last_name: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    is_admin: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    shipping_address: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    billing_address: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "request::deserialize_present")]
    payment_method: Option<&'b RawValue>,
}

impl NewUser {
    /// Parses the body of a registration; the problem names every invalid field at once.
    pub fn from_json(text: &str) -> Result<NewUser, Problem> {
        let body: RawUser<'_> = request::json_object(text)?;
        let mut errors = Errors::default();
        let email = errors.required_text(body.email, "email", fields::email);
        if body.is_admin.is_some() {
            errors.add("is_admin", "cannot be set at registration");
        }
        let (profile, _) = profile(&body, &mut errors);
        let own = profile.own_names(&email);
        let password = errors
            .required_text(body.password, "password", |text| check_new(&text, &own).map(|()| text));
        errors.into_result()?;
        Ok(NewUser { email, password, profile })
    }
}

impl Profile {
    /// What a password must not be.
    pub fn own_names<'p>(&'p self, email: &'p str) -> Vec<&'p str> {
        let names = [&self.username, &self.first_name, &self.last_name];
        names.into_iter().flatten().map(String::as_str).chain([email]).collect()
    }
}

impl UserUpdate {
    /// Parses the body of a `PATCH`; the problem names every invalid field at once.
    pub fn from_json(text: &str) -> Result<UserUpdate, Problem> {
        let body: RawUser<'_> = request::json_object(text)?;
        let mut errors = Errors::default();
        if body.password.is_some() {
            errors.add("password", "is changed by PUT …/password");
        }
        let email = body.email.map(|raw| errors.required_text(Some(raw), "email", fields::email));
        let is_admin = body.is_admin.and_then(|raw| {
            let parsed = serde_json::from_str(raw.get()).ok();
            if parsed.is_none() {
                errors.add("is_admin", "must be true or false");
            }
            parsed
        });
        let current_password = errors.text(body.current_password, "current_password", Ok).value();
        let (profile, mut changes) = profile(&body, &mut errors);
        changes.extend(email.as_ref().map(|_| "email"));
        changes.extend(is_admin.map(|_| "is_admin"));
        errors.into_result()?;
        Ok(UserUpdate { changes, email, is_admin, profile, current_password })
    }
}

/// The fields that registration and `PATCH` share, and the names of those that the body has.
fn profile(body: &RawUser<'_>, errors: &mut Errors) -> (Profile, Vec<&'static str>) {
    let mut changes = Vec::new();
    let mut note =
        |name: &'static str, is_present: bool| changes.extend(is_present.then_some(name));
    let mut name = |raw: Option<&RawValue>, field: &'static str, errors: &mut Errors| {
        note(field, raw.is_some());
        errors.short_text(raw, field, 100).value()
    };
    let first_name = name(body.first_name, "first_name", errors);
    let last_name = name(body.last_name, "last_name", errors);
    note("username", body.username.is_some());
    note("shipping_address", body.shipping_address.is_some());
    note("billing_address", body.billing_address.is_some());
    note("payment_method", body.payment_method.is_some());
    let profile = Profile {
        username: errors.text(body.username, "username", fields::username).value(),
        first_name,
        last_name,
        shipping_address: address(body.shipping_address, "shipping_address", errors),
        billing_address: address(body.billing_address, "billing_address", errors),
        payment_method: payment_method(body.payment_method, "payment_method", errors),
    };
    (profile, changes)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn errors_of(body: Value) -> Vec<String> {
        let problem = NewUser::from_json(&body.to_string()).unwrap_err().to_string();
        problem.split("; ").map(str::to_owned).collect()
    }

    fn account(name: &str, value: Value) -> Value {
        let mut body = json!({ "email": "a@example.org", "password": "a password of ships" });
        body[name] = value;
        body
    }

    #[test]
    fn every_invalid_field_of_a_registration_is_named_at_once() {
        let body = json!({ "email": "a", "username": "a b", "first_name": 1, "is_admin": true });
        assert_eq!(
            errors_of(body),
            [
                "email must be an e-mail address of 3 to 254 characters",
                "is_admin cannot be set at registration",
                "first_name must be a string",
                "username must be 1 to 64 letters, digits, dots, hyphens or underscores",
                "password is required",
            ]
        );
        assert_eq!(
            errors_of(account("password", json!(""))),
            ["password must have 8 to 128 characters"]
        );
        assert_eq!(errors_of(account("password", Value::Null)), ["password must not be null"]);
    }

    #[test]
    fn an_email_address_has_an_at_sign_and_254_characters_at_most() {
        let long = |length: usize| format!("{}@x", "ü".repeat(length - 2));
        for email in ["a@b", "A+b@Example.ORG", "用户@例え.jp", &long(254), " a@b "] {
            assert!(
                NewUser::from_json(&account("email", json!(email)).to_string()).is_ok(),
                "{email}"
            );
        }
        for email in ["", "a", "@b", "a@", "a@b@c", "a b@c", "a\n@b", "a\u{0}@b", &long(255)] {
            assert_eq!(errors_of(account("email", json!(email))).len(), 1, "{email}");
        }
        // A second `@`, blanks and 258 characters, once the compatibility forms are resolved.
        for email in ["a\u{ff20}b@c", "\u{fdfa}@b", &format!("{}@b", "\u{fb03}".repeat(86))] {
            assert_eq!(errors_of(account("email", json!(email))).len(), 1, "{email}");
        }
    }

    #[test]
    fn the_number_of_a_card_is_refused_and_not_repeated() {
        let method = |reference: &str| {
            account("payment_method", json!({ "type": "card", "reference": reference }))
        };
        for card in ["4111111111111111", "4111 1111 1111 1111", "x 3782-822463-10005 y"] {
            let errors = errors_of(method(card));
            assert_eq!(errors, ["payment_method.reference must not hold the number of a card"]);
        }
        for other in ["4111111111111112", "tok_4111111111", "123456789012"] {
            assert!(NewUser::from_json(&method(other).to_string()).is_ok(), "{other}");
        }
    }

    #[test]
    fn an_address_needs_name_line_city_and_a_country_code() {
        let errors = errors_of(account("shipping_address", json!({ "country": "se", "city": 1 })));
        assert_eq!(
            errors,
            [
                "shipping_address.name is required",
                "shipping_address.line1 is required",
                "shipping_address.city must be a string",
                "shipping_address.country must be a country code of two capital letters \
                 (ISO 3166-1), such as SE",
            ]
        );
        let list = errors_of(account("billing_address", json!([])));
        assert_eq!(list, ["billing_address must be an object"]);
        let body = account(
            "billing_address",
            json!({ "name": "A", "line1": "B 1", "city": "C", "country": "SE", "line2": " " }),
        );
        let user = NewUser::from_json(&body.to_string()).unwrap();
        assert_eq!(
            user.profile.billing_address.as_deref(),
            Some(
                r#"{"name":"A","line1":"B 1","line2":null,"city":"C","postal_code":null,"region":null,"country":"SE"}"#
            )
        );
    }

    #[test]
    fn a_patch_changes_what_it_names_and_null_clears_what_may_be_empty() {
        let update = |body: Value| UserUpdate::from_json(&body.to_string());
        assert!(update(json!({})).unwrap().changes.is_empty());
        let cleared = update(json!({ "first_name": null, "username": null, "last_name": "" }));
        assert_eq!(cleared.unwrap().changes, ["first_name", "last_name", "username"]);
        for (body, rule) in [
            (json!({ "email": null }), "email must not be null"),
            (json!({ "is_admin": null }), "is_admin must be true or false"),
            (json!({ "is_admin": 1 }), "is_admin must be true or false"),
            (json!({ "password": "x" }), "password is changed by PUT …/password"),
        ] {
            assert_eq!(update(body).unwrap_err().to_string(), rule);
        }
    }
}
