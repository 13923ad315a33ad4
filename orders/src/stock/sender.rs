//! Sends the stock commands to inventory: one thread of all instances, of each order in its order, again
//! and again until inventory has answered.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use chassis::Stop;
use chassis::db::in_transaction;
use chassis::etag::Precondition;
use log::{error, warn};
use uuid::Uuid;

use super::Command;
use super::store::{self, PendingCommand};
use crate::config::Config;
use crate::exclusive::{self, Lock, Session, problem_error};
use crate::orders::change::{self, Change};
use crate::orders::store::Actor;
use crate::upstreams::Context;
use crate::{App, metrics};

/// The most commands of one look.
const BATCH_ROWS: i64 = 200;

/// The longest pause before a command is sent again.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Why an order is canceled whose stock was sold to others before it was confirmed.
const OUT_OF_STOCK: &str = "out of stock";

/// Runs until `stop`.
pub fn run(app: &App, config: &Config, stop: &Stop) {
    let what = "stock commands wait for inventory";
    exclusive::run(&config.db, Lock::StockSender, &app.stock, stop, what, |session| {
        send_batch(app, session, stop)
    });
}

/// Sends the commands that are due; whether there may be more. Inventory's failure ends the batch: the
/// next commands would fail, too.
pub fn send_batch(app: &App, session: &mut Session<'_>, stop: &Stop) -> anyhow::Result<bool> {
    let commands = session.statement(|client| store::next(client, BATCH_ROWS))?;
    let mut done = Vec::with_capacity(commands.len());
    let mut failed = None;
    let mut waiting = HashSet::new();
    for pending in &commands {
        if stop.is_requested() {
            break;
        }
        if !pending.is_due || waiting.contains(&pending.order_id) {
            waiting.insert(pending.order_id);
            continue;
        }
        match send(app, pending) {
            Ok(refusal) => done.push((pending.id, refusal)),
            Err(err) => {
                failed = Some((pending, err));
                break;
            }
        }
    }
    if !done.is_empty() {
        session.statement(|client| store::mark_done(client, &done))?;
    }
    if let Some((pending, err)) = failed {
        // The others are due still: each look begins with another one.
        let pause = Duration::from_millis(100 << pending.attempts.clamp(0, 16)).min(MAX_PAUSE);
        let text = err.to_string();
        session.statement(|client| store::postpone(client, pending.id, pause, &text))?;
        return Err(err);
    }
    Ok(!done.is_empty())
}

/// Sends a command; the answer is inventory's refusal, if it has refused.
fn send(app: &App, pending: &PendingCommand) -> anyhow::Result<Option<String>> {
    let PendingCommand { order_id, command, .. } = *pending;
    let request_id = order_id.to_string();
    let deadline = Instant::now() + app.limits.request_timeout;
    let context = Context { deadline, request_id: &request_id };
    let answer = app.upstreams.stock_command(context, order_id, command);
    let Err(refusal) = answer.map_err(problem_error)? else { return Ok(None) };
    metrics::STOCK_REFUSED.with_label_values(&[command.as_str()]).inc();
    match command {
        Command::Confirm => {
            warn!("order {order_id}: its stock is not confirmed: {refusal}");
            cancel(app, order_id)?;
        }
        Command::Commit | Command::Release => {
            error!(
                "order {order_id}: inventory refuses to {} its stock: {refusal}",
                command.as_str()
            );
        }
    }
    Ok(Some(refusal))
}

/// Cancels an order that cannot be shipped; one that is canceled already stays so.
fn cancel(app: &App, order_id: Uuid) -> anyhow::Result<()> {
    let request = change::Request {
        order_id,
        owner: None,
        precondition: Precondition::default(),
        actor: Actor::Service,
        event_id: Uuid::now_v7(),
        change: Change::Cancel(Some(OUT_OF_STOCK.to_owned()), true),
    };
    app.db.write(|db| in_transaction(db, |db| change::apply(db, &request)))?;
    app.outbox.wake();
    Ok(())
}
