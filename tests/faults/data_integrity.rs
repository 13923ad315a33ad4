//! Texts are stored byte for byte, conditional updates are not lost, and the deletion of all movies
//! does not disturb other requests.

use std::collections::HashSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use chassis::testing::{SetOnDrop, eventually};
use harness::{Reply, agent, bodies, send};
use parking_lot::Mutex;
use serde_json::{Value, json};
use ureq::Agent;

use crate::platform::Program;
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "texts-unchanged",
        control: "four-byte characters: an inventory that stores a question mark for each",
        expects: ExpectedFinding::Text("text "),
        short: true,
        run: texts_unchanged,
    },
    Case {
        name: "concurrent-updates",
        control: "If-Match",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: concurrent_updates,
    },
    Case {
        name: "all-movies-deleted",
        control: "the deletion of all at once: one deletion for each movie",
        expects: ExpectedFinding::Text("the ids do not start again"),
        short: true,
        run: all_movies_deleted,
    },
];

/// Texts with a meaning in SQL, `like`, JSON, HTTP, shells or terminals.
const SPECIAL_TEXTS: &[&str] = &[
    "'; drop table movies; --",
    "\" or 1=1 --",
    "$1 :name ? {} %s %n",
    "E'\\x41' \\' \\\\ \\u0041 \\n",
    "100%",
    "a_b",
    "a\\b",
    "/* */ -- #",
    "null",
    "{\"title\":\"x\"}",
    "</script><!-- &amp; <b>",
    "\u{202e}txt.exe\u{202c} \u{200f}\u{5e9}\u{5dc}\u{5d5}\u{5dd}\u{200e} \u{2066}x\u{2069}",
    "e\u{301} \u{e9} \u{212b} \u{c5} \u{fb01}",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "a\r\nSet-Cookie: b\tc",
    "\u{1}\u{7f}\u{85}x\u{2028}\u{feff}x",
];

/// The most characters of a movie's description.
const MAX_CHARACTERS: usize = 10_000;

fn texts_unchanged(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new("all of Unicode");
    let mut url = run.platform.stack.url("/api/movies");
    if run.control {
        run.platform.inventory().replace(Program::Mutant);
        url = format!("{}/api/movies", run.platform.stack.service_url("inventory"));
    }
    let agent = agent();
    let mut texts = all_characters();
    texts.extend(SPECIAL_TEXTS.iter().map(|text| text.to_string()));
    texts.push("😀".repeat(MAX_CHARACTERS));
    texts.push("\\".repeat(MAX_CHARACTERS));
    texts.push("\u{1}".repeat(MAX_CHARACTERS));
    let mut titles = HashSet::new();
    for (number, text) in texts.iter().enumerate() {
        // In brackets, because white space around a title is removed.
        let start: String = text.chars().take(200).collect();
        let movie =
            json!({ "title": format!("[{}/{number} {start}]", run.tag), "description": text });
        outcome.acknowledged += 1;
        let added = match send_json(&agent, "POST", &url, None, &movie) {
            (201, added) if text_of(&added) == text_of(&movie) => added,
            (status, body) => {
                outcome.findings.push(format!("text {number} got {status} {}", brief(&body)));
                continue;
            }
        };
        let one = format!("{url}/{}", added["id"]);
        let mut found = send_json(&agent, "GET", &one, None, &Value::Null).1;
        let again = !run.control && number % run.short_or_long(10, 1) == 0;
        if text_of(&found) == text_of(&movie) && again {
            // The same text again, each character as an escape.
            let other = json!({ "description": "" });
            send_json(&agent, "PUT", &one, None, &other);
            let escaped = escape_all(text);
            let body = format!("{{\"description\":\"{escaped}\"}}");
            found = exchange(&agent, "PUT", &one, None, &body).2;
        }
        if text_of(&found) == text_of(&movie) {
            outcome.found += 1;
            titles.insert(movie["title"].as_str().unwrap_or_default().to_owned());
        } else {
            outcome.findings.push(format!("text {number} is stored as {}", brief(&found)));
        }
    }
    if run.control {
        return outcome;
    }
    let (_, list) = send_json(&agent, "GET", &url, None, &Value::Null);
    let listed: HashSet<String> =
        list.as_array().into_iter().flatten().map(|movie| text_of(movie).0).collect();
    for title in titles.difference(&listed) {
        outcome.findings.push(format!("not in the list: {title:?}"));
    }
    // In a pattern of `like` each of these would match the other, too.
    for (part, other) in [("5%5", "5x5"), ("6_6", "6x6"), ("7\\7", "77"), ("8\\%8", "8%8")] {
        for text in [part, other] {
            send_json(
                &agent,
                "POST",
                &url,
                None,
                &json!({ "title": format!("{}{text}", run.tag) }),
            );
        }
        let wanted = format!("{}{part}", run.tag);
        let found = format!("{url}?title={}", percent_encode(&wanted));
        let (_, found) = send_json(&agent, "GET", &found, None, &Value::Null);
        let found: Vec<String> =
            found.as_array().into_iter().flatten().map(|movie| text_of(movie).0).collect();
        if found != [wanted.as_str()] {
            outcome.findings.push(format!("?title= finds {found:?} for {wanted:?}"));
        }
    }
    delete_movies(run);
    outcome
}

/// Every Unicode scalar value but U+0000, in texts of the largest size.
fn all_characters() -> Vec<String> {
    let characters: Vec<char> = ('\u{1}'..=char::MAX).collect();
    characters.chunks(MAX_CHARACTERS).map(|chunk| chunk.iter().collect()).collect()
}

/// `\uXXXX` for each UTF-16 code unit.
fn escape_all(text: &str) -> String {
    text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect()
}

fn percent_encode(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// Title and description.
fn text_of(movie: &Value) -> (String, String) {
    let text = |field: &str| movie[field].as_str().unwrap_or_default().to_owned();
    (text("title"), text("description"))
}

fn brief(body: &Value) -> String {
    body.to_string().chars().take(200).collect()
}

/// Status and JSON of the response; status 0 and the error when there was none.
fn send_json(
    agent: &Agent,
    method: &str,
    url: &str,
    tag: Option<&str>,
    body: &Value,
) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let (status, _, body) = exchange(agent, method, url, tag, &body);
    (status, body)
}

/// The same with the entity tag of the response.
fn exchange(
    agent: &Agent,
    method: &str,
    url: &str,
    tag: Option<&str>,
    body: &str,
) -> (u16, String, Value) {
    let mut headers = vec![("Content-Type", "application/json")];
    headers.extend(tag.map(|tag| ("If-Match", tag)));
    let reply: Reply = match send(agent, method, url, &headers, body) {
        Ok(reply) => reply,
        Err(err) => return (0, String::new(), err.to_string().into()),
    };
    let tag = reply.header("ETag").unwrap_or_default().to_owned();
    match serde_json::from_str(&reply.body) {
        Ok(body) => (reply.status, tag, body),
        Err(err) => (0, tag, format!("{err}: {}", brief(&reply.body.into())).into()),
    }
}

fn delete_movies(run: &Run<'_>) {
    let mut admin = run.platform.connect("INVENTORY_DB_NAME");
    let _ = admin.execute("delete from movies where position($1 in title) > 0", &[&run.tag]);
}

/// Clients that increment a number in the description of one movie.
const COUNTERS: usize = 8;

fn concurrent_updates(run: &mut Run<'_>) -> Outcome {
    let times = run.short_or_long(10, 200);
    let mut outcome = Outcome::new(format!("{COUNTERS} clients, {times} each"));
    let url = run.platform.stack.url("/api/movies");
    let movie = json!({ "title": run.tag, "description": "0" });
    let (_, added) = send_json(&agent(), "POST", &url, None, &movie);
    let one = format!("{url}/{}", added["id"]);
    let (done, rejected) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (barrier, findings) = (Barrier::new(COUNTERS), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..COUNTERS {
            scope.spawn(|| {
                let agent = agent();
                let mut updates = 0;
                for round in 0.. {
                    let (_, tag, found) = exchange(&agent, "GET", &one, None, "");
                    let count = text_of(&found).1.parse::<usize>().unwrap_or_default();
                    // In the first round all clients have read the same version.
                    if round == 0 {
                        barrier.wait();
                    }
                    let condition = (!run.control).then_some(tag.as_str());
                    let change = json!({ "description": (count + 1).to_string() });
                    match send_json(&agent, "PUT", &one, condition, &change) {
                        (200, _) => updates += 1,
                        (412, _) => _ = rejected.fetch_add(1, Ordering::SeqCst),
                        (status, body) => {
                            findings.lock().push(format!("{status} {}", brief(&body)));
                            break;
                        }
                    }
                    if updates == times {
                        break;
                    }
                }
                done.fetch_add(updates, Ordering::SeqCst);
            });
        }
    });
    outcome.findings = findings.into_inner();
    outcome.faults = rejected.into_inner();
    outcome.acknowledged = done.into_inner();
    let (_, found) = send_json(&agent(), "GET", &one, None, &Value::Null);
    outcome.found = text_of(&found).1.parse().unwrap_or_default();
    outcome.lost = outcome.acknowledged.saturating_sub(outcome.found);
    if outcome.found > outcome.acknowledged {
        outcome.findings.push("more updates than were acknowledged".into());
    }
    delete_movies(run);
    outcome
}

/// The description that belongs to a title: long enough that a part of it could be seen.
fn description_of(title: &str) -> String {
    format!("{title};").repeat(50)
}

fn all_movies_deleted(run: &mut Run<'_>) -> Outcome {
    let times = if run.control { 1 } else { run.short_or_long(10, 200) };
    let mut outcome = Outcome::new("4 that add, 2 that read");
    let url = run.platform.stack.url("/api/movies");
    let stopping = AtomicBool::new(false);
    let (added, read) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
    let findings = Mutex::new(Vec::new());
    let report = |finding: String| findings.lock().push(finding);
    let mut older = HashSet::new();
    let newer: Vec<String> = (0..20).map(|number| format!("{}/newer-{number}", run.tag)).collect();
    thread::scope(|scope| {
        for client in 0..4 {
            let (url, stopping, added, report) = (&url, &stopping, &added, &report);
            let tag = &run.tag;
            scope.spawn(move || {
                let agent = agent();
                for number in (0..).take_while(|_| !stopping.load(Ordering::SeqCst)) {
                    let title = format!("{tag}/{client}-{number}");
                    let movie = bodies::movie(&title, &description_of(&title));
                    match post(&agent, url, &movie) {
                        (201, _) => added.lock().push(title),
                        (status, body) => report(format!("POST {status} {}", brief(&body))),
                    }
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                let agent = agent();
                while !stopping.load(Ordering::SeqCst) {
                    let (status, list) = send_json(&agent, "GET", &url, None, &Value::Null);
                    if status != 200 {
                        report(format!("GET {status} {}", brief(&list)));
                    }
                    for movie in list.as_array().into_iter().flatten() {
                        let (title, description) = text_of(movie);
                        if title.starts_with(&run.tag) && description != description_of(&title) {
                            report(format!("a part of a movie: {}", brief(movie)));
                        }
                    }
                    read.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let stop_clients = SetOnDrop(&stopping);
        let agent = agent();
        for _ in 0..times {
            // There are movies to delete, and the readers have read a list.
            let before = (added.lock().len(), read.load(Ordering::SeqCst));
            eventually("movies are added and read", 30, || {
                let more = added.lock().len() > before.0 + 10;
                (more && read.load(Ordering::SeqCst) > before.1).then_some(())
            });
            older = added.lock().iter().cloned().collect();
            match run.control {
                true => delete_one_by_one(&agent, &url),
                false => match send_json(&agent, "DELETE", &url, None, &Value::Null) {
                    (200, _) => (),
                    (status, body) => report(format!("DELETE {status} {}", brief(&body))),
                },
            }
            outcome.faults += 1;
        }
        // The last deletion is done: these must stay.
        for title in &newer {
            match post(&agent, &url, &bodies::movie(title, &description_of(title))) {
                (201, _) => (),
                (status, body) => report(format!("POST {status} {}", brief(&body))),
            }
        }
        drop(stop_clients);
    });
    outcome.acknowledged = added.into_inner().len() + newer.len();
    let stored = run.platform.movies(&run.tag);
    outcome.found = stored.len();
    outcome.lost = newer.iter().filter(|title| !stored.contains_key(*title)).count();
    outcome.duplicated = stored.values().filter(|times| **times > 1).count();
    outcome.findings = findings.into_inner();
    for title in stored.keys().filter(|title| older.contains(*title)) {
        outcome.findings.push(format!("{title} is older than the deletion and still stored"));
    }
    match run.control {
        true => delete_one_by_one(&agent(), &url),
        false => drop(send_json(&agent(), "DELETE", &url, None, &Value::Null)),
    }
    let (_, first) = send_json(&agent(), "POST", &url, None, &json!({ "title": run.tag }));
    if first["id"] != 1 {
        outcome.findings.push(format!("the ids do not start again: {}", brief(&first)));
    }
    delete_movies(run);
    outcome
}

fn post(agent: &Agent, url: &str, body: &str) -> (u16, Value) {
    let (status, _, body) = exchange(agent, "POST", url, None, body);
    (status, body)
}

fn delete_one_by_one(agent: &Agent, url: &str) {
    let (_, list) = send_json(agent, "GET", url, None, &Value::Null);
    for movie in list.as_array().into_iter().flatten() {
        send_json(agent, "DELETE", &format!("{url}/{}", movie["id"]), None, &Value::Null);
    }
}
