//! The entity tags that a request names, RFC 9110 sections 8.8.3, 13.1.1 and 13.1.2.
//!
//! rouille compares `If-None-Match` as a text with the tag; lists, weak tags and
//! `*` are left to its user.

use chassis::Problem;
use rouille::Request;

/// A list of tags, or "any".
#[derive(Debug, PartialEq)]
enum Tags {
    Any,
    These(Vec<Tag>),
}

#[derive(Debug, PartialEq)]
struct Tag {
    weak: bool,
    text: String,
}

/// Whether `If-None-Match` names this version, so that a 304 will do. What cannot
/// be understood names nothing: a whole answer is never wrong.
pub(crate) fn is_known(request: &Request, version: &str) -> bool {
    match header(request, "If-None-Match").as_deref().and_then(parse) {
        Some(Tags::Any) => true,
        // The weak comparison.
        Some(Tags::These(tags)) => tags.iter().any(|tag| tag.text == version),
        None => false,
    }
}

/// Which versions a request allows to be changed.
#[derive(Debug, Default, PartialEq)]
pub struct Condition {
    /// Only these; `None` is any.
    pub these: Option<Vec<String>>,
    /// None of these.
    pub not_these: Vec<String>,
}

impl Condition {
    /// Whether it is none: any version will do.
    pub fn is_empty(&self) -> bool {
        self.these.is_none() && self.not_these.is_empty()
    }
}

/// What `If-Match` and `If-None-Match` demand of a change. What cannot be understood is
/// an error: changing anyway might overwrite.
pub(crate) fn condition(request: &Request) -> Result<Condition, Problem> {
    let mut condition = Condition::default();
    let tags = |name| match header(request, name) {
        Some(header) => parse(&header).map(Some).ok_or_else(|| {
            Problem::bad_request(format!("{name} must be * or a list of entity tags in quotes"))
        }),
        None => Ok(None),
    };
    let texts = |tags: &[Tag]| tags.iter().map(|tag| tag.text.clone()).collect();
    if let Some(Tags::These(mut tags)) = tags("If-Match")? {
        // The strong comparison: a weak tag equals nothing.
        tags.retain(|tag| !tag.weak);
        condition.these = Some(texts(&tags));
    }
    match tags("If-None-Match")? {
        // There must be none at all, and only what is there can be changed.
        Some(Tags::Any) => condition.these = Some(Vec::new()),
        // The weak comparison.
        Some(Tags::These(tags)) => condition.not_these = texts(&tags),
        None => (),
    }
    Ok(condition)
}

/// A header that may come in several lines, which mean the same as one list.
fn header(request: &Request, name: &str) -> Option<String> {
    let lines = request.headers().filter(|(key, _)| key.eq_ignore_ascii_case(name));
    lines.map(|(_, value)| value.to_owned()).reduce(|all, line| all + "," + &line)
}

fn parse(header: &str) -> Option<Tags> {
    if header.trim() == "*" {
        return Some(Tags::Any);
    }
    let mut tags = Vec::new();
    let mut rest = header;
    loop {
        // A sender makes no empty elements, a recipient takes them (section 5.6.1.2).
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return (!tags.is_empty()).then_some(Tags::These(tags));
        }
        let (weak, quoted) = rest.strip_prefix("W/").map_or((false, rest), |tag| (true, tag));
        // A tag may have a comma in it, but no quote, space or control.
        let (text, behind) = quoted.strip_prefix('"')?.split_once('"')?;
        if text.chars().any(|char| char <= ' ' || char == '\x7f') {
            return None;
        }
        tags.push(Tag { weak, text: text.to_owned() });
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
    fn a_list_of_tags_is_read_as_the_standard_says() {
        let strong = |text| Tag { weak: false, text: String::from(text) };
        let weak = |text| Tag { weak: true, text: String::from(text) };
        let these = |tags| Some(Tags::These(tags));
        for (header, tags) in [
            ("*", Some(Tags::Any)),
            (" * ", Some(Tags::Any)),
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
