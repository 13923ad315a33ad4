//! The services that orders need: inventory for products and stock, customers for whom an order is.

use std::collections::HashMap;
use std::time::Instant;

use chassis::decimal::Cents;
use chassis::request::request_id;
use chassis::upstream::{self, Call, CallAnswer, Upstream};
use chassis::{Problem, request as http};
use rouille::Request;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::config::Limits;
use crate::stock::Command;

/// The other services.
pub struct Upstreams {
    inventory: Upstream,
    customers: Upstream,
}

/// The request for which another service is asked.
#[derive(Clone, Copy)]
pub struct Context<'r> {
    /// When its answer must be there.
    pub deadline: Instant,
    /// Its id.
    pub request_id: &'r str,
}

/// A customer as an order needs it.
#[derive(Debug, Deserialize)]
pub struct Customer {
    /// First and last name, or the user name.
    pub name: Option<String>,
    /// The e-mail address.
    pub email: String,
    /// The address in the account, as JSON.
    pub shipping_address: Option<Box<RawValue>>,
    /// The address in the account, as JSON.
    pub billing_address: Option<Box<RawValue>>,
    /// The payment method in the account, as JSON.
    pub payment_method: Option<Box<RawValue>>,
    state: String,
}

impl Customer {
    /// Whether the customer may order.
    pub fn is_active(&self) -> bool {
        self.state == "active"
    }
}

/// A product as it is sold now.
#[derive(Clone, Debug, Deserialize)]
pub struct Offer {
    sku: String,
    /// Its name.
    pub name: String,
    #[serde(deserialize_with = "deserialize_cents")]
    /// The price of one.
    pub price: Cents,
    /// How many can be ordered.
    pub available: i64,
    /// Whether it cannot be ordered any more.
    pub retired: bool,
}

/// A line of reserved stock.
#[derive(Clone, Debug, Deserialize)]
pub struct HeldLine {
    /// The product.
    pub sku: String,
    /// Its name.
    pub name: String,
    /// The price of one.
    #[serde(deserialize_with = "deserialize_cents")]
    pub unit_price: Cents,
    /// How many.
    pub quantity: i32,
}

/// What inventory says to a request for stock.
#[derive(Debug)]
pub enum HoldOutcome {
    /// All lines are held.
    Held(Vec<HeldLine>),
    /// These lines, by their places in the request, are of products that cannot be ordered.
    Unknown(Vec<usize>),
    /// There is not enough; 409 with the lines that fall short.
    Short(Problem),
}

#[derive(Deserialize)]
struct Offers {
    items: Vec<Offer>,
}

#[derive(Deserialize)]
struct Held {
    lines: Vec<HeldLine>,
}

fn deserialize_cents<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Cents, D::Error> {
    let text = String::deserialize(deserializer)?;
    Cents::parse(&text).ok_or_else(|| serde::de::Error::custom("it is no amount"))
}

impl<'r> Context<'r> {
    /// The deadline of a request, by its caller's wait and the limit of this service.
    pub fn of(request: &'r Request, limits: &Limits) -> Result<Context<'r>, Problem> {
        let deadline = upstream::deadline(request, limits.request_timeout)?;
        Ok(Context { deadline, request_id: request_id(request) })
    }
}

impl Upstreams {
    /// Connects when the first call is made.
    pub fn new(inventory: &upstream::Config, customers: &upstream::Config) -> Upstreams {
        Upstreams {
            inventory: Upstream::new("inventory", inventory.clone()),
            customers: Upstream::new("customers", customers.clone()),
        }
    }

    /// A readiness check.
    pub fn inventory_probe(&self) -> impl Fn() -> Result<(), String> + Send + use<> {
        self.inventory.probe()
    }

    /// A readiness check.
    pub fn customers_probe(&self) -> impl Fn() -> Result<(), String> + Send + use<> {
        self.customers.probe()
    }

    /// The customer with this id; `None` where there is none.
    pub fn customer(&self, context: Context, user_id: i64) -> Result<Option<Customer>, Problem> {
        let path = format!("/internal/users/{user_id}");
        let answer = self.customers.call(&call(context, "GET", &path, None))?;
        match answer.status {
            200 => parse("customers", &answer).map(Some),
            404 => Ok(None),
            _ => Err(unexpected("customers", &answer)),
        }
    }

    /// The products with these skus that exist, retired ones too.
    pub fn offers<'s>(
        &self,
        context: Context,
        skus: impl Iterator<Item = &'s str>,
    ) -> Result<HashMap<String, Offer>, Problem> {
        // A sku has no character that a query would have to encode.
        let query: Vec<String> = skus.map(|sku| format!("sku={sku}")).collect();
        if query.is_empty() {
            return Ok(HashMap::new());
        }
        let path = format!("/internal/products?{}", query.join("&"));
        let answer = self.inventory.call(&call(context, "GET", &path, None))?;
        if answer.status != 200 {
            return Err(unexpected("inventory", &answer));
        }
        let Offers { items } = parse("inventory", &answer)?;
        Ok(items.into_iter().map(|offer| (offer.sku.clone(), offer)).collect())
    }

    /// Has stock held for an order. Asking again is the same as asking once.
    pub fn hold(
        &self,
        context: Context,
        order_id: Uuid,
        lines: &[(&str, i32)],
        seconds: u64,
    ) -> Result<HoldOutcome, Problem> {
        let lines: Vec<Value> = lines
            .iter()
            .map(|(sku, quantity)| json!({ "sku": sku, "quantity": quantity }))
            .collect();
        let body = json!({ "lines": lines, "hold_seconds": seconds }).to_string();
        let path = format!("/internal/reservations/{order_id}");
        let answer = self.inventory.call(&call(context, "PUT", &path, Some(body)))?;
        match answer.status {
            200 => {
                let Held { lines } = parse("inventory", &answer)?;
                Ok(HoldOutcome::Held(lines))
            }
            409 | 422 => refusal(&answer),
            _ => Err(unexpected("inventory", &answer)),
        }
    }

    /// Sends a stock command; the inner error is inventory's refusal.
    pub fn stock_command(
        &self,
        context: Context,
        order_id: Uuid,
        command: Command,
    ) -> Result<Result<(), String>, Problem> {
        let path = format!("/internal/reservations/{order_id}");
        let (method, path) = match command {
            Command::Confirm => ("POST", format!("{path}/confirm")),
            Command::Commit => ("POST", format!("{path}/commit")),
            Command::Release => ("DELETE", path),
        };
        let answer = self.inventory.call(&call(context, method, &path, None))?;
        match answer.status {
            200 => Ok(Ok(())),
            404 | 409 => Ok(Err(detail(&answer))),
            _ => Err(unexpected("inventory", &answer)),
        }
    }
}

/// All calls of this service may be sent twice.
fn call<'c>(
    context: Context<'c>,
    method: &'static str,
    path: &'c str,
    body: Option<String>,
) -> Call<'c> {
    let Context { deadline, request_id } = context;
    Call { method, path, body, is_repeatable: true, deadline, request_id }
}

/// Why stock is not held.
fn refusal(answer: &CallAnswer) -> Result<HoldOutcome, Problem> {
    #[derive(Deserialize)]
    struct Refusal {
        #[serde(default)]
        errors: Vec<FieldError>,
        lines: Option<Value>,
        detail: String,
    }
    #[derive(Deserialize)]
    struct FieldError {
        field: String,
    }
    let refusal: Refusal = parse("inventory", answer)?;
    if let Some(lines) = refusal.lines {
        return Ok(HoldOutcome::Short(
            Problem::new(409, refusal.detail).with_member("lines", lines),
        ));
    }
    let place = |error: &FieldError| {
        error.field.strip_prefix("lines[")?.strip_suffix("].sku")?.parse().ok()
    };
    let places: Option<Vec<usize>> = refusal.errors.iter().map(place).collect();
    match places {
        Some(places) if !places.is_empty() => Ok(HoldOutcome::Unknown(places)),
        // The reservation of this order has ended meanwhile, or is of other lines.
        _ => Err(Problem::unavailable(format!("the stock was not reserved: {}", refusal.detail))),
    }
}

fn detail(answer: &CallAnswer) -> String {
    #[derive(Deserialize)]
    struct Refusal {
        detail: String,
    }
    let refusal: Result<Refusal, _> = serde_json::from_str(&answer.body);
    refusal
        .map_or_else(|_| format!("inventory answers {}", answer.status), |refusal| refusal.detail)
}

fn parse<'a, T: Deserialize<'a>>(name: &str, answer: &'a CallAnswer) -> Result<T, Problem> {
    http::json_object(&answer.body).map_err(|problem| {
        Problem::new(502, format!("{name} sent a malformed response"))
            .with_cause(problem.to_string())
    })
}

fn unexpected(name: &str, answer: &CallAnswer) -> Problem {
    Problem::new(502, format!("{name} sent an unexpected response"))
        .with_cause(format!("it answers {}", answer.status))
}
