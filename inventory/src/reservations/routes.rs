//! The internal API of reservations. Every call may be repeated.

use chassis::router::Params;
use chassis::{Problem, request as http, response};
use rouille::{Request, Response};
use serde::Serialize;
use uuid::Uuid;

use super::reservation::{Hold, Reservation, Shortage, State};
use super::store::{self, Refusal};
use crate::App;

#[derive(Serialize)]
struct ReservationAnswer<'a> {
    #[serde(flatten)]
    reservation: &'a Reservation,
    currency: &'a str,
}

#[derive(Serialize)]
struct StateAnswer {
    order_id: Uuid,
    state: State,
}

/// `PUT /internal/reservations/{order_id}`: all lines or none.
pub fn hold(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let order_id = order_id(params)?;
    let hold = Hold::from_json(order_id, &http::json_text(request)?)?;
    let held = app.holds.hold(&app.db, hold)?;
    let reservation = &held.map_err(problem)?;
    Ok(response::ok(&ReservationAnswer { reservation, currency: &app.currency }))
}

/// `GET /internal/reservations/{order_id}`
pub fn get(app: &App, _: &Request, params: &Params) -> Result<Response, Problem> {
    let order_id = order_id(params)?;
    let found = app.db.read(|db| store::select(db, order_id))?;
    let reservation = &found.ok_or_else(not_found)?;
    Ok(response::ok(&ReservationAnswer { reservation, currency: &app.currency }))
}

/// `POST /internal/reservations/{order_id}/confirm`: it no longer expires.
pub fn confirm(app: &App, _: &Request, params: &Params) -> Result<Response, Problem> {
    let order_id = order_id(params)?;
    app.db.write(|db| store::confirm(db, order_id))?.map_err(problem)?;
    Ok(response::ok(&StateAnswer { order_id, state: State::Confirmed }))
}

/// `POST /internal/reservations/{order_id}/commit`: the stock has left.
pub fn commit(app: &App, _: &Request, params: &Params) -> Result<Response, Problem> {
    let order_id = order_id(params)?;
    app.db.write(|db| store::commit(db, order_id))?.map_err(problem)?;
    Ok(response::ok(&StateAnswer { order_id, state: State::Committed }))
}

/// `DELETE /internal/reservations/{order_id}`: the stock is given back.
pub fn release(app: &App, _: &Request, params: &Params) -> Result<Response, Problem> {
    let order_id = order_id(params)?;
    app.db.write(|db| store::release(db, order_id))?.map_err(problem)?;
    Ok(response::ok(&StateAnswer { order_id, state: State::Released }))
}

/// The order in the path. A text that is no UUID names no reservation, so it is 404.
fn order_id(params: &Params) -> Result<Uuid, Problem> {
    params.first().and_then(|id| id.parse().ok()).ok_or_else(not_found)
}

fn not_found() -> Problem {
    Problem::not_found("there is no reservation for this order")
}

fn problem(refusal: Refusal) -> Problem {
    match refusal {
        Refusal::NotFound => not_found(),
        Refusal::Unknown(skus) => {
            let errors = skus.into_iter();
            let errors = errors.map(|(number, sku)| {
                (
                    format!("lines[{number}].sku"),
                    format!("is no product that can be ordered: {sku}"),
                )
            });
            Problem::unprocessable(errors.collect())
        }
        Refusal::Short(lines) => {
            let text = |Shortage { sku, quantity, available }: &Shortage| {
                format!("{sku} ({quantity} wanted, {available} available)")
            };
            let texts: Vec<String> = lines.iter().map(text).collect();
            Problem::new(409, format!("there is not enough of {}", texts.join(", ")))
                .with_member("lines", lines)
        }
        Refusal::OtherLines(state) => {
            Problem::new(409, "this order has a reservation with other lines")
                .with_member("state", state)
        }
        Refusal::State(state) => {
            Problem::new(409, format!("the reservation of this order is {}", state.as_str()))
                .with_member("state", state)
        }
    }
}
