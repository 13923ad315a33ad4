//! The entity tags that a request names, RFC 9110 sections 8.8.3, 13.1.1 and 13.1.2.
//!
//! rouille compares `If-None-Match` as a text with the tag. Lists of tags, weak tags and `*` must be
//! handled by its user.

use rouille::Request;

use crate::problem::Problem;
use crate::request::header_values;

/// A list of tags, or "any".
#[derive(Debug, PartialEq)]
enum EntityTags {
    Any,
    List(Vec<EntityTag>),
}

#[derive(Debug, PartialEq)]
struct EntityTag {
    weak: bool,
    text: String,
}

/// Whether `If-None-Match` names this version, so that 304 is the answer. A header that cannot be
/// parsed names none: a complete response is never wrong.
pub fn matches_if_none_match(request: &Request, version: &str) -> bool {
    match combined_header(request, "If-None-Match").as_deref().and_then(parse) {
        Some(EntityTags::Any) => true,
        // The weak comparison.
        Some(EntityTags::List(tags)) => tags.iter().any(|tag| tag.text == version),
        None => false,
    }
}

/// The versions for which a request may be carried out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Precondition {
    /// Only these; `None` is any.
    pub if_match: Option<Vec<String>>,
    /// Not these.
    pub if_none_match: Vec<String>,
}

impl Precondition {
    /// Whether there is none: any version will do.
    pub fn is_empty(&self) -> bool {
        self.if_match.is_none() && self.if_none_match.is_empty()
    }

    /// For tags of the form `INSTANCE-VERSION`: the precondition with the versions of this instance
    /// (see [`crate::db::instance_id`]). A tag of another instance names no version of this one.
    pub fn of_instance(&self, instance: &str) -> Precondition {
        let own = |tags: &Vec<String>| {
            let versions = tags
                .iter()
                .filter_map(|tag| tag.strip_prefix(instance)?.strip_prefix('-').map(str::to_owned));
            versions.collect()
        };
        Precondition {
            if_match: self.if_match.as_ref().map(own),
            if_none_match: own(&self.if_none_match),
        }
    }
}

/// What `If-Match` and `If-None-Match` demand of a change. A header that cannot be parsed is 400:
/// carrying out the change might overwrite another one.
pub fn precondition(request: &Request) -> Result<Precondition, Problem> {
    let mut precondition = Precondition { if_match: if_match(request)?, ..Precondition::default() };
    match tags(request, "If-None-Match")? {
        // There must be no version at all, and only what exists can be changed.
        Some(EntityTags::Any) => precondition.if_match = Some(Vec::new()),
        // The weak comparison.
        Some(EntityTags::List(tags)) => {
            precondition.if_none_match = tags.into_iter().map(|tag| tag.text).collect();
        }
        None => (),
    }
    Ok(precondition)
}

/// The versions that `If-Match` allows; `None` is any. For GET and HEAD, where `If-None-Match` asks
/// for a 304 instead of forbidding something (RFC 9110 section 13.2.2).
pub fn if_match(request: &Request) -> Result<Option<Vec<String>>, Problem> {
    Ok(match tags(request, "If-Match")? {
        // The strong comparison: a weak tag equals nothing.
        Some(EntityTags::List(tags)) => {
            Some(tags.into_iter().filter(|tag| !tag.weak).map(|tag| tag.text).collect())
        }
        Some(EntityTags::Any) | None => None,
    })
}

fn tags(request: &Request, name: &str) -> Result<Option<EntityTags>, Problem> {
    match combined_header(request, name) {
        Some(header) => parse(&header).map(Some).ok_or_else(|| {
            Problem::bad_request(format!("{name} must be * or a list of entity tags in quotes"))
        }),
        None => Ok(None),
    }
}

/// The value of a header that may come in several fields, which mean the same as one list.
fn combined_header(request: &Request, name: &str) -> Option<String> {
    header_values(request, name).map(str::to_owned).reduce(|all, value| all + "," + &value)
}

fn parse(header: &str) -> Option<EntityTags> {
    if header.trim() == "*" {
        return Some(EntityTags::Any);
    }
    let mut tags = Vec::new();
    let mut rest = header;
    loop {
        // A sender must not generate empty elements, a recipient must accept them (5.6.1.2).
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return (!tags.is_empty()).then_some(EntityTags::List(tags));
        }
        let (weak, quoted) = rest.strip_prefix("W/").map_or((false, rest), |tag| (true, tag));
        // A tag may contain a comma, but no quote, space or control character.
        let (text, behind) = quoted.strip_prefix('"')?.split_once('"')?;
        if text.chars().any(|char| char <= ' ' || char == '\x7f') {
            return None;
        }
        tags.push(EntityTag { weak, text: text.to_owned() });
        rest = behind.trim_start_matches([' ', '\t']);
        if !rest.is_empty() && !rest.starts_with(',') {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_entity_tags_is_parsed_by_rfc_9110() {
        let strong = |text| EntityTag { weak: false, text: String::from(text) };
        let weak = |text| EntityTag { weak: true, text: String::from(text) };
        let these = |tags| Some(EntityTags::List(tags));
        for (header, tags) in [
            ("*", Some(EntityTags::Any)),
            (" * ", Some(EntityTags::Any)),
            (r#""7""#, these(vec![strong("7")])),
            (r#""""#, these(vec![strong("")])),
            (r#"W/"7""#, these(vec![weak("7")])),
            (r#" "7" ,"a,b",, W/"é""#, these(vec![strong("7"), strong("a,b"), weak("é")])),
            (r#"*, "7""#, None),
            (r#""7" "8""#, None),
            (r#""7"#, None),
            (r#"w/"7""#, None),
            (r#""a b""#, None),
            ("7", None),
            (",", None),
            ("", None),
        ] {
            assert_eq!(parse(header), tags, "{header}");
        }
    }
}
