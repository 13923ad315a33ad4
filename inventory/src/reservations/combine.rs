//! Holds that wait for the database are sent to it together: one transaction for up to 64 of them.
//!
//! Hundreds of orders for one product would else lock its row one after the other, each until its
//! commit is on disk. A request that finds fewer than [`MAX_LEADERS`] others at work becomes a
//! leader: it takes all holds that wait, asks the database once and gives each its answer. No hold
//! waits for others to come: a lone one is sent at once.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use chassis::Problem;
use chassis::db::{Error, Pool};
use parking_lot::{Condvar, Mutex};
use postgres::error::SqlState;

use super::reservation::{Hold, Reservation};
use super::store::{self, Outcome, SHORT_LOCK_TIMEOUT};
use crate::{Db, Statements};

/// Most transactions at once: one waits for its commit while the other is at work.
const MAX_LEADERS: usize = 2;

/// Most holds of one transaction, and most lines of all of them.
const MAX_BATCH: usize = 64;
const MAX_BATCH_LINES: usize = 500;

/// The holds that wait for a leader.
#[derive(Default)]
pub struct HoldQueue(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Arc<Waiting>>,
    leaders: usize,
}

/// A hold whose request waits.
struct Waiting {
    hold: Hold,
    turn: Mutex<Option<Turn>>,
    changed: Condvar,
}

/// What a waiting request is to do next.
enum Turn {
    /// Send its hold and those that wait.
    Lead,
    /// Send its hold alone.
    Alone,
    /// Answer with this.
    Done(Outcome<Reservation>),
    /// Answer that the database is away.
    Unavailable,
}

impl HoldQueue {
    /// Holds stock for an order, together with others that wait.
    pub fn hold(&self, db: &Pool<Statements>, hold: Hold) -> Result<Outcome<Reservation>, Problem> {
        let own = Arc::new(Waiting { hold, turn: Mutex::new(None), changed: Condvar::new() });
        let leads = {
            let mut queue = self.0.lock();
            let leads = queue.leaders < MAX_LEADERS;
            match leads {
                true => queue.leaders += 1,
                false => queue.waiting.push_back(Arc::clone(&own)),
            }
            leads
        };
        let turn = if leads { Turn::Lead } else { own.wait() };
        let turn = match turn {
            Turn::Lead => self.lead(db, Arc::clone(&own))?,
            turn => turn,
        };
        match turn {
            Turn::Done(outcome) => Ok(outcome),
            Turn::Unavailable => Err(Problem::unavailable("the database is not available")),
            Turn::Lead | Turn::Alone => Ok(db.write(|db| hold_one(db, &own.hold))?),
        }
    }

    /// Sends a batch that begins with the request's own hold; returns that one's turn.
    fn lead(&self, db: &Pool<Statements>, own: Arc<Waiting>) -> Result<Turn, Problem> {
        let batch = Batch { queue: self, members: self.take_batch(own) };
        let holds: Vec<&Hold> = batch.members.iter().map(|member| &member.hold).collect();
        let answer = db.write(|db| match store::hold(db, &holds, SHORT_LOCK_TIMEOUT) {
            Err(err) if err.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(None),
            outcomes => outcomes.map(Some),
        });
        let alone = batch.members.len() == 1;
        let turns: Vec<Turn> = match answer {
            Ok(Some(outcomes)) => outcomes.into_iter().map(Turn::Done).collect(),
            // Something that one of them needs is locked for long: only that one waits for it, and
            // not as a leader.
            Ok(None) => holds.iter().map(|_| Turn::Alone).collect(),
            Err(err) if alone => return Err(err.into()),
            Err(err @ Error::Unavailable(_)) => {
                log::warn!("{} holds had no answer: {err}", holds.len());
                holds.iter().map(|_| Turn::Unavailable).collect()
            }
            // Nothing was changed, and only one of them may be to blame.
            Err(err) => {
                log::error!("{} holds are tried one by one: {err}", holds.len());
                holds.iter().map(|_| Turn::Alone).collect()
            }
        };
        let mut turns = turns.into_iter();
        let own = turns.next().unwrap_or(Turn::Alone);
        for (member, turn) in batch.members.iter().skip(1).zip(turns) {
            member.wake(turn);
        }
        Ok(own)
    }

    /// The leader's own hold and those that wait, the oldest first, each order once.
    fn take_batch(&self, own: Arc<Waiting>) -> Vec<Arc<Waiting>> {
        let mut ids = HashSet::from([own.hold.order_id]);
        let mut lines = own.hold.lines.len();
        let mut members = vec![own];
        let mut queue = self.0.lock();
        while let Some(next) = queue.waiting.front() {
            lines += next.hold.lines.len();
            let fits = members.len() < MAX_BATCH && lines <= MAX_BATCH_LINES;
            if !fits || !ids.insert(next.hold.order_id) {
                break;
            }
            members.extend(queue.waiting.pop_front());
        }
        members
    }
}

/// The holds of one leader. At its end, also by a panic, none of them is left without a turn, and the
/// next request that waits becomes the leader.
struct Batch<'q> {
    queue: &'q HoldQueue,
    members: Vec<Arc<Waiting>>,
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        for member in &self.members[1..] {
            member.wake(Turn::Alone);
        }
        let mut queue = self.queue.0.lock();
        match queue.waiting.pop_front() {
            Some(next) => next.wake(Turn::Lead),
            None => queue.leaders -= 1,
        }
    }
}

impl Waiting {
    fn wait(&self) -> Turn {
        let mut turn = self.turn.lock();
        loop {
            if let Some(turn) = turn.take() {
                return turn;
            }
            self.changed.wait(&mut turn);
        }
    }

    /// Gives the request its turn, unless it has got one.
    fn wake(&self, turn: Turn) {
        self.turn.lock().get_or_insert(turn);
        self.changed.notify_one();
    }
}

fn hold_one(db: &mut Db, hold: &Hold) -> Result<Outcome<Reservation>, postgres::Error> {
    let mut outcomes = store::hold(db, &[hold], "")?;
    // One outcome a hold.
    Ok(outcomes.pop().unwrap_or(Err(store::Refusal::NotFound)))
}
