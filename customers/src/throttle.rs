//! Pauses after failed logins.
//!
//! Failures are counted for three keys: the pair of account and client address, the address alone,
//! and the account alone. Pair and address have to pause, longer after each failure. An account
//! that many addresses try is slower for each new address: its first attempt has to wait, and is
//! then let through however often others fail meanwhile. So a stranger can keep the owner, who
//! comes from another address, out for a minute at most.
//!
//! The counts are in the memory of one process. Several instances count each for itself.

use std::hash::{BuildHasher, Hash, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use chassis::Problem;
use parking_lot::Mutex;

/// The table has `SETS * WAYS` entries, in about 1 MB.
const SETS: usize = 4096;
const WAYS: usize = 8;

/// Failures without a pause: typing errors. An address may belong to many users.
const FREE_FOR_PAIR: u32 = 5;
const FREE_FOR_ADDRESS: u32 = 30;
const FREE_FOR_ACCOUNT: u32 = 20;

/// The longest pause; the first one has a second, and each failure doubles it.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// After this time without a failure the count begins again.
const FORGET_AFTER: Duration = Duration::from_secs(15 * 60);

/// Counts failed logins, in memory of fixed size.
pub struct Throttle {
    sets: Vec<Mutex<[Entry; WAYS]>>,
    hasher: RandomState,
    started: Instant,
}

/// Times are since the start of the process.
#[derive(Clone, Copy, Default)]
struct Entry {
    /// The keyed hash of its key; 0 for none.
    key: u64,
    failures: u32,
    last_failure: Duration,
    /// No attempt before this.
    paused_until: Duration,
}

#[derive(Hash)]
enum Key<'k> {
    Pair(&'k str, IpAddr),
    Address(IpAddr),
    Account(&'k str),
}

impl Entry {
    fn failures(&self, now: Duration) -> u32 {
        if now > self.last_failure + FORGET_AFTER { 0 } else { self.failures }
    }

    fn pause_left(&self, now: Duration) -> Duration {
        self.paused_until.saturating_sub(now)
    }

    /// Counts a failure; those beyond `free` are followed by a pause.
    fn fail(&mut self, free: u32, now: Duration) {
        self.failures = self.failures(now).saturating_add(1);
        self.last_failure = now;
        self.paused_until = now + pause(self.failures, free);
    }
}

/// The pause after so many failures.
fn pause(failures: u32, free: u32) -> Duration {
    match failures.checked_sub(free + 1) {
        Some(doublings) => (Duration::from_secs(1) * (1 << doublings.min(6))).min(MAX_PAUSE),
        None => Duration::ZERO,
    }
}

impl Default for Throttle {
    fn default() -> Throttle {
        Throttle::new()
    }
}

impl Throttle {
    /// Nothing has failed yet.
    pub fn new() -> Throttle {
        let sets = (0..SETS).map(|_| Mutex::new([Entry::default(); WAYS])).collect();
        Throttle { sets, hasher: RandomState::new(), started: Instant::now() }
    }

    /// 429 with the seconds to wait, where an attempt at this account from this address has to
    /// pause. `account` is the normalised name that was sent, whether or not there is such a user.
    pub fn check(&self, account: &str, client: IpAddr) -> Result<(), Problem> {
        let left = self.pause_left(account, client_key(client), self.started.elapsed());
        if left.is_zero() {
            return Ok(());
        }
        let seconds = left.as_millis().div_ceil(1000).to_string();
        Err(Problem::new(429, "too many failed logins; wait before the next attempt")
            .with_header("Retry-After", seconds))
    }

    /// Counts a failed login.
    pub fn failed(&self, account: &str, client: IpAddr) {
        self.count_failure(account, client_key(client), self.started.elapsed());
    }

    /// Forgets the failures at this account after a login.
    pub fn succeeded(&self, account: &str, client: IpAddr) {
        for key in [Key::Pair(account, client_key(client)), Key::Account(account)] {
            self.with_entry(key, |entry| *entry = Entry { key: entry.key, ..Entry::default() });
        }
    }

    fn pause_left(&self, account: &str, client: IpAddr, now: Duration) -> Duration {
        let address = self.with_entry(Key::Address(client), |entry| entry.pause_left(now));
        let failures = self.with_entry(Key::Account(account), |entry| entry.failures(now));
        let account_pause = pause(failures, FREE_FOR_ACCOUNT);
        let pair = self.with_entry(Key::Pair(account, client), |entry| {
            let is_new = entry.failures(now) == 0 && entry.paused_until.is_zero();
            if is_new && !account_pause.is_zero() {
                entry.paused_until = now + account_pause;
                entry.last_failure = now;
            }
            entry.pause_left(now)
        });
        pair.max(address)
    }

    fn count_failure(&self, account: &str, client: IpAddr, now: Duration) {
        for (key, free) in [
            (Key::Pair(account, client), FREE_FOR_PAIR),
            (Key::Address(client), FREE_FOR_ADDRESS),
            (Key::Account(account), FREE_FOR_ACCOUNT),
        ] {
            self.with_entry(key, |entry| entry.fail(free, now));
        }
    }

    /// Changes the entry of a key. A key without one takes the place of the entry in its set whose
    /// last failure is longest ago.
    fn with_entry<T>(&self, key: Key<'_>, change: impl FnOnce(&mut Entry) -> T) -> T {
        let hash = self.hasher.hash_one(key).max(1);
        let mut set = self.sets[hash as usize % SETS].lock();
        let known = set.iter().position(|entry| entry.key == hash);
        let way = known.unwrap_or_else(|| {
            let oldest = (0..WAYS).min_by_key(|way| set[*way].last_failure).unwrap_or(0);
            set[oldest] = Entry { key: hash, ..Entry::default() };
            oldest
        });
        change(&mut set[way])
    }
}

/// A client that has one address of IPv6 usually has its whole /64.
fn client_key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRANGER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const OWNER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(std::net::Ipv4Addr::from_bits(0x0a00_0000 + number))
    }

    #[test]
    fn typing_errors_cost_nothing_and_pauses_grow_to_a_minute() {
        let throttle = Throttle::new();
        let mut pauses = Vec::new();
        let mut now = at(1);
        for _ in 0..14 {
            throttle.count_failure("anna", STRANGER, now);
            let left = throttle.pause_left("anna", STRANGER, now);
            pauses.push(left.as_secs());
            now += left;
            assert!(throttle.pause_left("anna", STRANGER, now).is_zero());
        }
        assert_eq!(pauses, [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]);
        // A pause holds for this account only, until the address itself has failed too often.
        assert!(throttle.pause_left("berta", STRANGER, now).is_zero());
    }

    #[test]
    fn a_login_and_a_quarter_of_an_hour_end_the_count() {
        let throttle = Throttle::new();
        for _ in 0..7 {
            throttle.failed("anna", STRANGER);
        }
        assert!(throttle.check("anna", STRANGER).is_err());
        throttle.succeeded("anna", STRANGER);
        assert!(throttle.check("anna", STRANGER).is_ok());
        for _ in 0..7 {
            throttle.count_failure("berta", STRANGER, at(1));
        }
        throttle.count_failure("berta", STRANGER, at(1000));
        assert!(throttle.pause_left("berta", STRANGER, at(1000)).is_zero());
    }

    #[test]
    fn the_owner_gets_in_after_a_minute_however_many_strangers_try() {
        let throttle = Throttle::new();
        for number in 0..10_000 {
            throttle.count_failure("anna", address(number), at(1));
        }
        let wait = throttle.pause_left("anna", OWNER, at(10));
        assert_eq!(wait, MAX_PAUSE);
        for second in 10..70 {
            throttle.count_failure("anna", address(second), at(second.into()));
        }
        assert!(throttle.pause_left("anna", OWNER, at(70)).is_zero());
    }

    #[test]
    fn an_address_that_tries_many_accounts_has_to_pause() {
        let throttle = Throttle::new();
        for number in 0..31 {
            throttle.count_failure(&number.to_string(), STRANGER, at(1));
        }
        assert_eq!(throttle.pause_left("another", STRANGER, at(1)), at(1));
        assert!(throttle.pause_left("another", OWNER, at(1)).is_zero());
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one() {
        let throttle = Throttle::new();
        for number in 0..7u16 {
            let address = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, number, 0, 0, number);
            throttle.failed("anna", address.into());
        }
        let same = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 9, 9, 9, 9);
        let other = Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 9, 9, 9, 9);
        assert!(throttle.check("anna", same.into()).is_err());
        assert!(throttle.check("anna", other.into()).is_ok());
    }
}
