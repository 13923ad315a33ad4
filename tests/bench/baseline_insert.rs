//! Books orders without a broker, as `provision/bench` sets it beside the draining of a
//! queue: billing's own statement, in batches, on one connection, each committed.
//!
//! Usage: `book ORDERS BATCH`; the database is that of billing's settings. Tells how
//! many orders were booked in how many seconds as JSON.

use std::time::Instant;

use billing::order::Order;
use billing::store::{BookingEntry, Store};
use chassis::decimal::Cents;
use chassis::{Env, db};
use serde_json::json;
use uuid::Uuid;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [orders, batch] = arguments.as_slice() else {
        anyhow::bail!("usage: book ORDERS BATCH");
    };
    let (orders, batch): (usize, usize) = (orders.parse()?, batch.parse()?);
    let mut env = Env::load();
    let config = db::Config::from_env(&mut env, "BILLING");
    let mut store = Store::open(&env.finish(config)?)?;

    let begun = Instant::now();
    let mut booked = 0;
    while booked < orders {
        let size = batch.min(orders - booked);
        let made = (booked..booked + size).map(|number| {
            let order =
                Order { user_id: number.to_string(), number_of_items: 5, total: Cents(18_000) };
            (Uuid::now_v7().to_string(), order)
        });
        let made: Vec<(String, Order)> = made.collect();
        let entries = made
            .iter()
            .map(|(id, order)| BookingEntry { message_id: Some(id), order })
            .enumerate()
            .collect::<Vec<_>>();
        let mut booking = store.begin()?;
        booking.book(&entries, 0)?;
        booking.commit()?;
        booked += size;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{}", json!({ "requests": booked, "seconds": seconds, "errors": 0 }));
    Ok(())
}
