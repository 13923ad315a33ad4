//! How many requests each client address may make.
//!
//! The generic cell rate algorithm (GCRA, ITU-T I.371): of each address one number is
//! kept, the moment at which all that it has used will have been given back. The answer
//! says how it stands in the fields of draft-ietf-httpapi-ratelimit-headers-11.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use chassis::problem::Problem;
use chassis::request;
use chassis::router::RoutedResponse;
use rouille::Request;

use crate::metrics;
use crate::proxies::Proxies;

/// The table has place for `SETS * PLACES` addresses, in 2 MiB.
const SETS: usize = 4096;
const PLACES: usize = 16;

/// So many requests in so much time. An address may make all of them at once; then each
/// comes back after its part of the time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    requests: u64,
    seconds: u64,
}

/// How an address stands after a request.
#[derive(Debug, PartialEq)]
struct Standing {
    /// Requests that it may make at once now.
    left: u64,
    /// Until there is one more.
    more_in: Duration,
    allowed: bool,
}

/// Counts the requests of every address.
pub struct Limiter {
    rate: Rate,
    proxies: Proxies,
    table: Table,
    started: Instant,
}

/// A table that never grows. An address has its set, found by a keyed hash that nobody
/// outside can aim at, and in a full set it takes the place of the address that owes
/// least. So a new address is always let in, one that owes much stays known for as long
/// as it does, and what is forgotten is little: an address that owes nothing is as good
/// as one never seen. Only who has used up its quota from many thousands of addresses at
/// a time gets some of it back.
struct Table {
    sets: Vec<Mutex<[Account; PLACES]>>,
    hasher: RandomState,
}

#[derive(Clone, Copy)]
struct Account {
    address: IpAddr,
    /// When nothing will be owed any more, in nanoseconds since the start.
    even_at: u64,
}

impl Rate {
    /// Reads `REQUESTS/SECONDS`, such as `100/60`; what else there is, is `None`.
    pub fn parse(text: &str) -> Option<Rate> {
        let (requests, seconds) = text.split_once('/')?;
        let rate = Rate { requests: requests.parse().ok()?, seconds: seconds.parse().ok()? };
        let sane = (1..=1_000_000).contains(&rate.requests) && (1..=86_400).contains(&rate.seconds);
        sane.then_some(rate)
    }

    /// What one request costs, in nanoseconds.
    fn cost(&self) -> u64 {
        self.seconds * 1_000_000_000 / self.requests
    }

    /// One request at `now` of an address that is even at `even_at`, which a request that
    /// is allowed moves on. Both are in nanoseconds.
    fn charge(&self, even_at: &mut u64, now: u64) -> Standing {
        let (cost, quota) = (self.cost(), self.cost() * self.requests);
        let owed = even_at.saturating_sub(now);
        let allowed = owed + cost <= quota;
        let owed = if allowed { owed + cost } else { owed };
        *even_at = now + owed;
        let left = (quota - owed) / cost;
        // Something is owed now, so that one more than is left would be too much.
        let more_in = Duration::from_nanos((left + 1) * cost - (quota - owed));
        Standing { left, more_in, allowed }
    }
}

impl Limiter {
    /// Knows nobody yet.
    pub fn new(rate: Rate, proxies: Proxies) -> Limiter {
        let nobody = Account { address: IpAddr::V6(Ipv6Addr::UNSPECIFIED), even_at: 0 };
        let sets = (0..SETS).map(|_| Mutex::new([nobody; PLACES])).collect();
        let table = Table { sets, hasher: RandomState::new() };
        Limiter { rate, proxies, table, started: Instant::now() }
    }

    /// Lets `serve` answer, unless the client has used up its quota: 429. The questions of
    /// monitors cost nothing and are always answered.
    pub fn guard(
        &self,
        request: &Request,
        serve: impl FnOnce() -> RoutedResponse,
    ) -> RoutedResponse {
        let path = request::path(request);
        if ["/health", "/health/ready"].contains(&path.strip_suffix('/').unwrap_or(path)) {
            return serve();
        }
        let client = self.proxies.client(request);
        let standing = self.charge(client, self.started.elapsed());
        let fields = self.fields(&standing);
        if !standing.allowed {
            metrics::RATE_LIMITED.inc();
            let Rate { requests, seconds } = self.rate;
            let detail = format!("an address may make {requests} requests in {seconds} s");
            let wait = seconds_up(standing.more_in).to_string();
            let problem = Problem::new(429, detail).with_header("Retry-After", wait);
            return RoutedResponse { route: "", result: Err(with_fields(problem, fields)) };
        }
        let RoutedResponse { route, result } = serve();
        let result = match result {
            Ok(mut response) => {
                response.headers.extend(fields.map(|(name, value)| (name.into(), value.into())));
                Ok(response)
            }
            Err(problem) => Err(with_fields(problem, fields)),
        };
        RoutedResponse { route, result }
    }

    fn charge(&self, client: IpAddr, now: Duration) -> Standing {
        let account = key(client);
        let hash = self.table.hasher.hash_one(account) as usize;
        let set = &self.table.sets[hash % SETS];
        let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
        let known = set.iter().position(|known| known.address == account);
        let place = known.unwrap_or_else(|| {
            let owes_least = (0..PLACES).min_by_key(|place| set[*place].even_at).unwrap_or(0);
            set[owes_least] = Account { address: account, even_at: 0 };
            owes_least
        });
        self.rate.charge(&mut set[place].even_at, now.as_nanos() as u64)
    }

    /// Sections 3 and 4 of the draft: the quota of the policy, and what is left of it for
    /// the next `t` seconds.
    fn fields(&self, standing: &Standing) -> [(&'static str, String); 2] {
        let Rate { requests, seconds } = self.rate;
        let time = seconds_up(standing.more_in);
        [
            ("RateLimit-Policy", format!("\"default\";q={requests};w={seconds}")),
            ("RateLimit", format!("\"default\";r={};t={time}", standing.left)),
        ]
    }
}

fn with_fields(problem: Problem, fields: [(&'static str, String); 2]) -> Problem {
    fields.into_iter().fold(problem, |problem, (name, value)| problem.with_header(name, value))
}

/// Whom a request is charged to: an IPv6 network of 64 bits is one household, and whoever
/// has it has all of its addresses.
fn key(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)))
        }
        v4 => v4,
    }
}

/// In whole seconds, never too few, and never none.
pub(crate) fn seconds_up(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0 || wait.is_zero())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limiter(rate: &str) -> Limiter {
        Limiter::new(Rate::parse(rate).unwrap(), Proxies::default())
    }

    fn allowed(limiter: &Limiter, client: impl Into<IpAddr>, now: Duration) -> bool {
        limiter.charge(client.into(), now).allowed
    }

    #[test]
    fn a_rate_is_requests_and_seconds_and_nothing_else() {
        assert_eq!(Rate::parse("100/60"), Some(Rate { requests: 100, seconds: 60 }));
        for wrong in ["", "100", "/", "0/1", "1/0", "-1/1", "1/1/1", "1 / 1", "1/s", "1.5/1"] {
            assert_eq!(Rate::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Rate::parse("1000001/1"), None);
        assert_eq!(Rate::parse("1/86401"), None);
    }

    #[test]
    fn the_whole_quota_may_be_used_at_once_and_comes_back_bit_by_bit() {
        let (limiter, client) = (limiter("4/2"), Ipv4Addr::LOCALHOST.into());
        let half = SECOND / 2;
        for left in [3, 2, 1, 0] {
            let standing = limiter.charge(client, SECOND);
            assert_eq!(standing, Standing { left, more_in: half, allowed: true });
        }
        // Who is refused owes no more for having asked.
        for _ in 0..10 {
            let standing = limiter.charge(client, SECOND);
            assert_eq!(standing, Standing { left: 0, more_in: half, allowed: false });
        }
        assert!(!allowed(&limiter, client, SECOND + half - Duration::from_nanos(1)));
        assert!(allowed(&limiter, client, SECOND + half));
        assert!(!allowed(&limiter, client, SECOND + half));
        // However long one has been away, there is one quota and no more.
        let later = SECOND * 1000;
        assert_eq!((0..10).filter(|_| allowed(&limiter, client, later)).count(), 4);
    }

    #[test]
    fn in_any_time_an_address_gets_its_rate_and_at_most_one_quota_more() {
        for rate in ["1/1", "7/3", "1000000/1", "3/86400"] {
            let (limiter, client) = (limiter(rate), Ipv4Addr::LOCALHOST);
            let Rate { requests, seconds } = limiter.rate;
            let steps = 4 * requests.min(10_000);
            let got = (0..steps).filter(|step| {
                let now =
                    Duration::from_secs_f64(2.0 * seconds as f64 * *step as f64 / steps as f64);
                allowed(&limiter, client, now)
            });
            assert!(got.count() as u64 <= 3 * requests, "{rate}");
        }
    }

    #[test]
    fn every_address_has_its_own_quota_and_an_ipv6_network_of_64_bits_is_one() {
        let limiter = limiter("1/60");
        for (client, expected) in [
            ("192.0.2.1", true),
            ("192.0.2.1", false),
            ("::ffff:192.0.2.1", false),
            ("192.0.2.2", true),
            ("2001:db8:0:1::1", true),
            ("2001:db8:0:1:ffff::2", false),
            ("2001:db8:0:2::1", true),
        ] {
            let address: IpAddr = client.parse().unwrap();
            assert_eq!(allowed(&limiter, address, SECOND), expected, "{client}");
        }
    }

    #[test]
    fn a_million_addresses_take_no_more_memory_free_nobody_and_lock_nobody_out() {
        let limiter = limiter("100/60");
        let abuser: IpAddr = Ipv4Addr::new(192, 0, 2, 1).into();
        while allowed(&limiter, abuser, SECOND) {}
        for number in 0..1_000_000_u32 {
            let address = Ipv4Addr::from_bits(0x0A00_0000 + number);
            assert!(allowed(&limiter, address, SECOND), "{address} is locked out");
        }
        assert!(!allowed(&limiter, abuser, SECOND), "the flood has freed the abuser");
        assert_eq!(limiter.table.sets.len(), SETS);
        assert!(size_of::<Mutex<[Account; PLACES]>>() * SETS <= 5 << 19);
    }

    #[test]
    fn waits_are_told_in_whole_seconds_and_never_too_short() {
        for (millis, told) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (59_999, 60)] {
            assert_eq!(seconds_up(Duration::from_millis(millis)), told, "{millis} ms");
        }
    }
}
