//! What inventory answers to orders, as its own tests show it; and what else it may do.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chassis::decimal::Cents;
use chassis::testing::fake_upstream::FakeUpstream;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::reply;

/// Has the products a (9.99), b (0.50), c (14.99, 3 available) and gone (retired).
pub(crate) struct Inventory {
    upstream: FakeUpstream,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    prices: Mutex<BTreeMap<String, String>>,
    /// By order: what became of its reservation.
    states: Mutex<BTreeMap<String, &'static str>>,
    calls: Mutex<Vec<String>>,
    mode: Mutex<Mode>,
    requests: AtomicUsize,
}

/// How it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Mode {
    #[default]
    Works,
    /// 503 to each first of two requests.
    FailsEverySecondTime,
    /// 503 to all.
    Fails,
    /// Not at all.
    Silent,
    /// Closes the connection.
    BreaksOff,
    /// With something that is no JSON.
    Nonsense,
}

impl Inventory {
    pub(crate) fn start() -> Inventory {
        let shared = Arc::new(Shared::default());
        for (sku, price) in [("a", "9.99"), ("b", "0.50"), ("c", "14.99"), ("gone", "1.00")] {
            shared.prices.lock().insert(sku.to_owned(), price.to_owned());
        }
        let answering = Arc::clone(&shared);
        let answer = move |stream: &mut TcpStream, request: &str| answering.answer(stream, request);
        let upstream = FakeUpstream::start((Ipv4Addr::LOCALHOST, 0), answer);
        Inventory { upstream, shared }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.upstream.address()
    }

    pub(crate) fn set_mode(&self, mode: Mode) {
        *self.shared.mode.lock() = mode;
    }

    pub(crate) fn set_price(&self, sku: &str, price: &str) {
        self.shared.prices.lock().insert(sku.to_owned(), price.to_owned());
    }

    /// What became of an order's reservation.
    pub(crate) fn state(&self, order: &Value) -> Option<&'static str> {
        self.shared.states.lock().get(order["id"].as_str().unwrap()).copied()
    }

    pub(crate) fn set_state(&self, order: &Value, state: &'static str) {
        let id = order["id"].as_str().unwrap().to_owned();
        self.shared.states.lock().insert(id, state);
    }

    /// How many reservations are in this state.
    pub(crate) fn count(&self, state: &str) -> usize {
        self.shared.states.lock().values().filter(|known| **known == state).count()
    }

    /// The calls so far, without those that only read.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.shared.calls.lock().clone()
    }
}

impl Shared {
    fn answer(&self, stream: &mut TcpStream, request: &str) -> bool {
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        if path.starts_with("/health") {
            return reply(stream, 200, &json!({ "status": "ok" }));
        }
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        match *self.mode.lock() {
            Mode::Works => (),
            Mode::FailsEverySecondTime if number % 2 == 1 => (),
            Mode::FailsEverySecondTime | Mode::Fails => {
                return reply(stream, 503, &json!({ "detail": "not now" }));
            }
            Mode::Silent => return true,
            Mode::BreaksOff => return false,
            Mode::Nonsense => return reply(stream, 200, &json!("nonsense")),
        }
        let (status, body) = match path.split_once("/internal/reservations/") {
            Some((_, rest)) => {
                let (id, call) = rest.split_once('/').unwrap_or((rest, ""));
                let call = if method == "DELETE" { "release" } else { call };
                self.calls
                    .lock()
                    .push(format!("{} {id}", if call.is_empty() { "hold" } else { call }));
                match call {
                    "" => self.hold(id, request),
                    call => self.change(id, call),
                }
            }
            None => self.offers(path),
        };
        reply(stream, status, &body)
    }

    fn offers(&self, path: &str) -> (u16, Value) {
        let (_, query) = path.split_once('?').unwrap();
        let prices = self.prices.lock();
        let skus = query.split('&').filter_map(|pair| pair.strip_prefix("sku="));
        let offer = |sku: &str| {
            let price = prices.get(sku)?;
            Some(json!({ "sku": sku, "name": format!("The {sku}"), "price": price,
                "available": available(sku), "retired": sku == "gone" }))
        };
        (200, json!({ "currency": "EUR", "items": skus.filter_map(offer).collect::<Vec<_>>() }))
    }

    fn hold(&self, id: &str, request: &str) -> (u16, Value) {
        let (_, body) = request.split_once("\r\n\r\n").unwrap();
        let body: Value = serde_json::from_str(body).unwrap();
        let (mut lines, mut unknown, mut short) = (Vec::new(), Vec::new(), Vec::new());
        for (number, line) in body["lines"].as_array().unwrap().iter().enumerate() {
            let (sku, quantity) =
                (line["sku"].as_str().unwrap(), line["quantity"].as_i64().unwrap());
            let price = self.prices.lock().get(sku).cloned().filter(|_| sku != "gone");
            let Some(price) = price else {
                unknown.push(json!({ "field": format!("lines[{number}].sku"), "rule": "unknown" }));
                continue;
            };
            assert!(Cents::parse(&price).is_some());
            if quantity > available(sku) {
                short
                    .push(json!({ "sku": sku, "quantity": quantity, "available": available(sku) }));
            }
            lines.push(json!({ "sku": sku, "name": format!("The {sku}"), "unit_price": price,
                "quantity": quantity }));
        }
        if !unknown.is_empty() {
            return (422, json!({ "detail": "unknown", "errors": unknown }));
        }
        if !short.is_empty() {
            return (409, json!({ "detail": "there is not enough", "lines": short }));
        }
        let mut states = self.states.lock();
        match states.get(id).copied() {
            None | Some("held" | "expired") => {
                states.insert(id.to_owned(), "held");
            }
            Some("confirmed") => (),
            Some(state) => return (409, json!({ "detail": "it has ended", "state": state })),
        }
        (200, json!({ "order_id": id, "state": "held", "lines": lines }))
    }

    fn change(&self, id: &str, call: &str) -> (u16, Value) {
        let mut states = self.states.lock();
        let old = states.get(id).copied();
        let new = match (call, old) {
            ("confirm", Some("held" | "confirmed")) => "confirmed",
            ("commit", Some("confirmed" | "committed")) => "committed",
            ("release", Some("held" | "confirmed" | "released" | "expired")) => "released",
            (_, None) => return (404, json!({ "detail": "there is no reservation" })),
            (_, Some(state)) => {
                return (409, json!({ "detail": format!("the reservation is {state}") }));
            }
        };
        states.insert(id.to_owned(), new);
        (200, json!({ "order_id": id, "state": new }))
    }
}

fn available(sku: &str) -> i64 {
    if sku == "c" { 3 } else { 1000 }
}
