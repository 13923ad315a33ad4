//! Texts come back byte for byte, changes with a condition are not lost, and a deletion of
//! everything hurts nobody.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;

use serde_json::{Value, json};
use ureq::Agent;

use crate::platform::Program;
use crate::{Case, Finds, Outcome, Run};
use harness::agent;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "texts-come-back",
        control: "four-byte letters: an inventory that keeps a question mark for each",
        finds: Finds::Fault("text "),
        short: true,
        run: texts_come_back,
    },
    Case {
        name: "no-update-is-lost",
        control: "If-Match",
        finds: Finds::Loss,
        short: true,
        run: no_update_is_lost,
    },
    Case {
        name: "all-movies-deleted",
        control: "the deletion of all at once: each movie by itself",
        finds: Finds::Fault("the ids do not start again"),
        short: true,
        run: all_movies_deleted,
    },
];

/// What SQL, `like`, JSON, HTTP, shells and people's screens may stumble over.
const STUMBLING_BLOCKS: &[&str] = &[
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

/// Letters that the text of one movie may have.
const LETTERS: usize = 10_000;

fn texts_come_back(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome { load: "all of Unicode".into(), ..Outcome::default() };
    let mut url = run.platform.stack.url("/api/movies");
    if run.control {
        run.platform.inventory.replace(Program::Careless);
        url = format!("http://{}:8080/api/movies", run.platform.stack.address);
    }
    let agent = agent();
    let mut texts = every_letter();
    texts.extend(STUMBLING_BLOCKS.iter().map(|text| text.to_string()));
    texts.push("😀".repeat(LETTERS));
    texts.push("\\".repeat(LETTERS));
    texts.push("\u{1}".repeat(LETTERS));
    let mut titles = HashSet::new();
    for (number, text) in texts.iter().enumerate() {
        // Between brackets, because white space around a title is none of it.
        let begin: String = text.chars().take(200).collect();
        let movie =
            json!({ "title": format!("[{}/{number} {begin}]", run.tag), "description": text });
        outcome.acknowledged += 1;
        let added = match tell(&agent, "POST", &url, None, &movie) {
            (201, added) if text_of(&added) == text_of(&movie) => added,
            (status, told) => {
                outcome.wrong.push(format!("text {number} was told {status} {}", brief(&told)));
                continue;
            }
        };
        let one = format!("{url}/{}", added["id"]);
        let mut found = tell(&agent, "GET", &one, None, &Value::Null).1;
        let again = !run.control && number % run.either(10, 1) == 0;
        if text_of(&found) == text_of(&movie) && again {
            // The same again, each letter as JSON may also spell it.
            let other = json!({ "description": "" });
            tell(&agent, "PUT", &one, None, &other);
            let spelled = spell_out(text);
            let body = format!("{{\"description\":\"{spelled}\"}}");
            found = send(&agent, "PUT", &one, None, &body).1;
        }
        if text_of(&found) == text_of(&movie) {
            outcome.found += 1;
            titles.insert(movie["title"].as_str().unwrap_or_default().to_owned());
        } else {
            outcome.wrong.push(format!("text {number} came back as {}", brief(&found)));
        }
    }
    if run.control {
        return outcome;
    }
    let (_, list) = tell(&agent, "GET", &url, None, &Value::Null);
    let listed: HashSet<String> =
        list.as_array().into_iter().flatten().map(|movie| text_of(movie).0).collect();
    for title in titles.difference(&listed) {
        outcome.wrong.push(format!("not in the list: {title:?}"));
    }
    // In a pattern each of these would stand for others.
    for (part, other) in [("5%5", "5x5"), ("6_6", "6x6"), ("7\\7", "77"), ("8\\%8", "8%8")] {
        for text in [part, other] {
            tell(&agent, "POST", &url, None, &json!({ "title": format!("{}{text}", run.tag) }));
        }
        let wanted = format!("{}{part}", run.tag);
        let found = format!("{url}?title={}", percent_encode(&wanted));
        let (_, found) = tell(&agent, "GET", &found, None, &Value::Null);
        let found: Vec<String> =
            found.as_array().into_iter().flatten().map(|movie| text_of(movie).0).collect();
        if found != [wanted.as_str()] {
            outcome.wrong.push(format!("?title= finds {found:?} for {wanted:?}"));
        }
    }
    forget_movies(run);
    outcome
}

/// Every scalar value but U+0000, in texts of the largest size.
fn every_letter() -> Vec<String> {
    let letters: Vec<char> = ('\u{1}'..=char::MAX).collect();
    letters.chunks(LETTERS).map(|letters| letters.iter().collect()).collect()
}

/// `\uXXXX` for each unit of UTF-16.
fn spell_out(text: &str) -> String {
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

fn brief(told: &Value) -> String {
    told.to_string().chars().take(200).collect()
}

/// Status and JSON of an answer.
fn tell(agent: &Agent, method: &str, url: &str, tag: Option<&str>, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    send(agent, method, url, tag, &body)
}

fn send(agent: &Agent, method: &str, url: &str, tag: Option<&str>, body: &str) -> (u16, Value) {
    let (status, _, told) = exchange(agent, method, url, tag, body);
    (status, told)
}

/// The same with the entity tag of the answer.
fn exchange(
    agent: &Agent,
    method: &str,
    url: &str,
    tag: Option<&str>,
    body: &str,
) -> (u16, String, Value) {
    let mut request = ureq::http::Request::builder().method(method).uri(url);
    if let Some(tag) = tag {
        request = request.header("If-Match", tag);
    }
    let request = request.header("Content-Type", "application/json");
    let answer = match body {
        "" => agent.run(request.body(()).unwrap()),
        body => agent.run(request.body(body).unwrap()),
    };
    let mut answer = match answer {
        Ok(answer) => answer,
        Err(err) => return (0, String::new(), err.to_string().into()),
    };
    let tag = answer.headers().get("ETag").and_then(|tag| tag.to_str().ok()).unwrap_or_default();
    let tag = tag.to_owned();
    let text = answer.body_mut().with_config().limit(1 << 30).read_to_string();
    let told = text.map_err(|err| err.to_string()).and_then(|text| {
        serde_json::from_str(&text).map_err(|err| format!("{err}: {}", brief(&text.into())))
    });
    match told {
        Ok(told) => (answer.status().as_u16(), tag, told),
        Err(err) => (0, tag, err.into()),
    }
}

fn forget_movies(run: &Run<'_>) {
    let mut admin = run.platform.connect("INVENTORY_DB_NAME");
    let _ = admin.execute("delete from movies where position($1 in title) > 0", &[&run.tag]);
}

/// Clients that count in the description of one movie.
const COUNTERS: usize = 8;

fn no_update_is_lost(run: &mut Run<'_>) -> Outcome {
    let times = run.either(10, 200);
    let mut outcome =
        Outcome { load: format!("{COUNTERS} clients, {times} each"), ..Outcome::default() };
    let url = run.platform.stack.url("/api/movies");
    let movie = json!({ "title": run.tag, "description": "0" });
    let (_, added) = tell(&agent(), "POST", &url, None, &movie);
    let one = format!("{url}/{}", added["id"]);
    let (done, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (barrier, wrong) = (Barrier::new(COUNTERS), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..COUNTERS {
            scope.spawn(|| {
                let agent = agent();
                let mut mine = 0;
                for round in 0.. {
                    let (_, tag, found) = exchange(&agent, "GET", &one, None, "");
                    let count = text_of(&found).1.parse::<usize>().unwrap_or_default();
                    // Once all have seen the same for sure.
                    if round == 0 {
                        barrier.wait();
                    }
                    let condition = (!run.control).then_some(tag.as_str());
                    let change = json!({ "description": (count + 1).to_string() });
                    match tell(&agent, "PUT", &one, condition, &change) {
                        (200, _) => mine += 1,
                        (412, _) => _ = refused.fetch_add(1, Ordering::SeqCst),
                        (status, told) => {
                            wrong.lock().unwrap().push(format!("{status} {}", brief(&told)));
                            break;
                        }
                    }
                    if mine == times {
                        break;
                    }
                }
                done.fetch_add(mine, Ordering::SeqCst);
            });
        }
    });
    outcome.wrong = wrong.into_inner().unwrap();
    outcome.faults = refused.into_inner();
    outcome.acknowledged = done.into_inner();
    let (_, found) = tell(&agent(), "GET", &one, None, &Value::Null);
    outcome.found = text_of(&found).1.parse().unwrap_or_default();
    outcome.lost = outcome.acknowledged.saturating_sub(outcome.found);
    if outcome.found > outcome.acknowledged {
        outcome.wrong.push("more changes than were acknowledged".into());
    }
    forget_movies(run);
    outcome
}

/// What belongs to a title: long enough that half of it could be seen.
fn description_of(title: &str) -> String {
    format!("{title};").repeat(50)
}

fn all_movies_deleted(run: &mut Run<'_>) -> Outcome {
    let times = if run.control { 1 } else { run.either(10, 200) };
    let mut outcome = Outcome { load: "4 that add, 2 that read".into(), ..Outcome::default() };
    let url = run.platform.stack.url("/api/movies");
    let ending = AtomicBool::new(false);
    let (added, read) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
    let wrong = Mutex::new(Vec::new());
    let complain = |what: String| wrong.lock().unwrap().push(what);
    let mut older = HashSet::new();
    let newer: Vec<String> = (0..20).map(|number| format!("{}/newer-{number}", run.tag)).collect();
    thread::scope(|scope| {
        for client in 0..4 {
            let (url, ending, added, complain) = (&url, &ending, &added, &complain);
            let tag = &run.tag;
            scope.spawn(move || {
                let agent = agent();
                for number in (0..).take_while(|_| !ending.load(Ordering::SeqCst)) {
                    let title = format!("{tag}/{client}-{number}");
                    let movie = json!({ "title": title, "description": description_of(&title) });
                    match tell(&agent, "POST", url, None, &movie) {
                        (201, _) => added.lock().unwrap().push(title),
                        (status, told) => complain(format!("POST {status} {}", brief(&told))),
                    }
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                let agent = agent();
                while !ending.load(Ordering::SeqCst) {
                    let (status, list) = tell(&agent, "GET", &url, None, &Value::Null);
                    if status != 200 {
                        complain(format!("GET {status} {}", brief(&list)));
                    }
                    for movie in list.as_array().into_iter().flatten() {
                        let (title, description) = text_of(movie);
                        if title.starts_with(&run.tag) && description != description_of(&title) {
                            complain(format!("half a movie: {}", brief(movie)));
                        }
                    }
                    read.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        // Whatever happens in here, the clients must end.
        let end = End(&ending);
        let agent = agent();
        for _ in 0..times {
            // Something is there to delete, and the readers have seen a list.
            let seen = (added.lock().unwrap().len(), read.load(Ordering::SeqCst));
            chassis::testing::eventually("movies are added and read", 30, || {
                let more = added.lock().unwrap().len() > seen.0 + 10;
                (more && read.load(Ordering::SeqCst) > seen.1).then_some(())
            });
            older = added.lock().unwrap().iter().cloned().collect();
            match run.control {
                true => delete_one_by_one(&agent, &url),
                false => match tell(&agent, "DELETE", &url, None, &Value::Null) {
                    (200, _) => (),
                    (status, told) => complain(format!("DELETE {status} {}", brief(&told))),
                },
            }
            outcome.faults += 1;
        }
        // The last deletion is over: nothing may happen to these.
        for title in &newer {
            let movie = json!({ "title": title, "description": description_of(title) });
            match tell(&agent, "POST", &url, None, &movie) {
                (201, _) => (),
                (status, told) => complain(format!("POST {status} {}", brief(&told))),
            }
        }
        drop(end);
    });
    outcome.acknowledged = added.into_inner().unwrap().len() + newer.len();
    let there = run.platform.movies(&run.tag);
    outcome.found = there.len();
    outcome.lost = newer.iter().filter(|title| !there.contains_key(*title)).count();
    outcome.double = there.values().filter(|times| **times > 1).count();
    outcome.wrong = wrong.into_inner().unwrap();
    for title in there.keys().filter(|title| older.contains(*title)) {
        outcome.wrong.push(format!("{title} is older than the deletion and still there"));
    }
    match run.control {
        true => delete_one_by_one(&agent(), &url),
        false => drop(tell(&agent(), "DELETE", &url, None, &Value::Null)),
    }
    let (_, first) = tell(&agent(), "POST", &url, None, &json!({ "title": run.tag }));
    if first["id"] != 1 {
        outcome.wrong.push(format!("the ids do not start again: {}", brief(&first)));
    }
    forget_movies(run);
    outcome
}

/// Ends the clients when it is dropped.
struct End<'e>(&'e AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn delete_one_by_one(agent: &Agent, url: &str) {
    let (_, list) = tell(agent, "GET", url, None, &Value::Null);
    for movie in list.as_array().into_iter().flatten() {
        tell(agent, "DELETE", &format!("{url}/{}", movie["id"]), None, &Value::Null);
    }
}
