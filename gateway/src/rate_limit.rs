//! Limits how many requests each client address may make.
//!
//! The generic cell rate algorithm (GCRA, ITU-T I.371): for each address one number is kept, its
//! theoretical arrival time (TAT), at which its whole quota is available again. Each response shows the
//! state in the fields of draft-ietf-httpapi-ratelimit-headers-11.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use chassis::problem::Problem;
use chassis::request;
use chassis::router::RoutedResponse;
use chassis::upstream::ceil_seconds;
use parking_lot::Mutex;
use rouille::Request;

use crate::metrics;
use crate::trusted_proxies::TrustedProxies;

/// The table has `SETS * WAYS` entries, in 2 MiB.
const SETS: usize = 4096;
const WAYS: usize = 16;

/// A number of requests in a number of seconds. An address may make all of them at once; then each
/// request is available again after its part of the time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quota {
    requests: u64,
    seconds: u64,
}

/// The result of one request.
#[derive(Debug, PartialEq)]
struct Decision {
    /// Requests that the address may make now.
    remaining: u64,
    /// Until it may make one more.
    reset_after: Duration,
    allowed: bool,
}

/// Counts the requests of every address, for each class of requests that has a quota.
pub struct RateLimiter {
    classes: Vec<Class>,
    proxies: TrustedProxies,
    started: Instant,
}

/// Requests that count together.
struct Class {
    /// Its name in the response's headers.
    name: &'static str,
    quota: Quota,
    contains: fn(&Request) -> bool,
    table: ClientTable,
}

/// A fixed-size, 16-way set-associative table with a keyed hash. In a full set the entry with the
/// smallest TAT is replaced: its owner loses least, and an address that has its whole quota loses
/// nothing. To regain quota an attacker must fill a set, which takes exhausted quotas from tens of
/// thousands of addresses at once.
struct ClientTable {
    sets: Vec<Mutex<[Entry; WAYS]>>,
    hasher: RandomState,
}

#[derive(Clone, Copy)]
struct Entry {
    address: IpAddr,
    /// When the whole quota is available again, in nanoseconds since the start.
    tat: u64,
}

impl Quota {
    /// Parses `REQUESTS/SECONDS`, such as `100/60`; `None` for anything else.
    pub fn parse(text: &str) -> Option<Quota> {
        let (requests, seconds) = text.split_once('/')?;
        let rate = Quota { requests: requests.parse().ok()?, seconds: seconds.parse().ok()? };
        let is_valid =
            (1..=1_000_000).contains(&rate.requests) && (1..=86_400).contains(&rate.seconds);
        is_valid.then_some(rate)
    }

    /// The time after which one request is available again, in nanoseconds.
    fn emission_interval(&self) -> u64 {
        self.seconds * 1_000_000_000 / self.requests
    }

    /// Decides about one request at `now`; a request that is allowed advances `tat`. Both are in
    /// nanoseconds.
    fn check(&self, tat: &mut u64, now: u64) -> Decision {
        let (interval, quota) =
            (self.emission_interval(), self.emission_interval() * self.requests);
        let used = tat.saturating_sub(now);
        let allowed = used + interval <= quota;
        let used = if allowed { used + interval } else { used };
        *tat = now + used;
        let remaining = (quota - used) / interval;
        // After this request something is used, so one more than `remaining` is too much.
        let reset_after = Duration::from_nanos((remaining + 1) * interval - (quota - used));
        Decision { remaining, reset_after, allowed }
    }
}

impl RateLimiter {
    /// No address has made a request yet. `all` is the quota of all requests together, `logins` that
    /// of the requests with which an account can be guessed or made; `None` where none has a quota.
    pub fn new(
        all: Option<Quota>,
        logins: Option<Quota>,
        proxies: TrustedProxies,
    ) -> Option<RateLimiter> {
        let class = |name, quota: Option<Quota>, contains: fn(&Request) -> bool| {
            Some(Class { name, quota: quota?, contains, table: ClientTable::new() })
        };
        let classes = [class("default", all, |_| true), class("login", logins, is_login)];
        let classes: Vec<Class> = classes.into_iter().flatten().collect();
        let started = Instant::now();
        (!classes.is_empty()).then_some(RateLimiter { classes, proxies, started })
    }

    /// Calls `serve`, or answers 429 where the client has used up a quota. Health checks do not
    /// count and are always answered.
    pub fn limit(
        &self,
        request: &Request,
        serve: impl FnOnce() -> RoutedResponse,
    ) -> RoutedResponse {
        let path = request::path(request);
        if ["/health", "/health/ready"].contains(&path.strip_suffix('/').unwrap_or(&path)) {
            return serve();
        }
        let client = self.proxies.client_addr(request);
        let now = self.started.elapsed();
        let mut decisions: Vec<(&Class, Decision)> = Vec::new();
        for class in self.classes.iter().filter(|class| (class.contains)(request)) {
            let decision = class.check(client, now);
            let allowed = decision.allowed;
            decisions.push((class, decision));
            if !allowed {
                break;
            }
        }
        let headers = ratelimit_headers(&decisions);
        if let Some((class, decision)) = decisions.iter().find(|(_, it)| !it.allowed) {
            metrics::RATE_LIMITED.inc();
            let Quota { requests, seconds } = class.quota;
            let detail = match class.name {
                "login" => {
                    format!("an address may make {requests} requests of this kind in {seconds} s")
                }
                _ => format!("an address may make {requests} requests in {seconds} s"),
            };
            let wait = ceil_seconds(decision.reset_after).to_string();
            let problem = Problem::new(429, detail).with_header("Retry-After", wait);
            return RoutedResponse { route: "", result: Err(with_headers(problem, headers)) };
        }
        if decisions.is_empty() {
            return serve();
        }
        let RoutedResponse { route, result } = serve();
        let result = match result {
            Ok(mut response) => {
                response.headers.extend(headers.map(|(name, value)| (name.into(), value.into())));
                Ok(response)
            }
            Err(problem) => Err(with_headers(problem, headers)),
        };
        RoutedResponse { route, result }
    }
}

impl Class {
    fn check(&self, client: IpAddr, now: Duration) -> Decision {
        let key = client_key(client);
        let hash = self.table.hasher.hash_one(key) as usize;
        let set = &self.table.sets[hash % SETS];
        let mut set = set.lock();
        let known = set.iter().position(|known| known.address == key);
        let way = known.unwrap_or_else(|| {
            let oldest = (0..WAYS).min_by_key(|way| set[*way].tat).unwrap_or(0);
            set[oldest] = Entry { address: key, tat: 0 };
            oldest
        });
        self.quota.check(&mut set[way].tat, now.as_nanos() as u64)
    }
}

impl ClientTable {
    fn new() -> ClientTable {
        let unused = Entry { address: IpAddr::V6(Ipv6Addr::UNSPECIFIED), tat: 0 };
        let sets = (0..SETS).map(|_| Mutex::new([unused; WAYS])).collect();
        ClientTable { sets, hasher: RandomState::new() }
    }
}

/// Whether an account can be guessed, found or made by such a request.
fn is_login(request: &Request) -> bool {
    let path = request::path(request);
    let path = path.strip_suffix('/').unwrap_or(&path);
    match request.method() {
        "POST" => ["/api/v1/auth/login", "/api/v1/auth/refresh", "/api/v1/users"].contains(&path),
        "PUT" => path.starts_with("/api/v1/users/") && path.ends_with("/password"),
        "GET" | "HEAD" => path == "/api/v1/users/exists",
        _ => false,
    }
}

/// Sections 3 and 4 of the draft: the quota of each policy, and what is remaining of it for
/// the next `t` seconds.
fn ratelimit_headers(decisions: &[(&Class, Decision)]) -> [(&'static str, String); 2] {
    let (mut policies, mut states) = (Vec::new(), Vec::new());
    for (Class { name, quota, .. }, decision) in decisions {
        let Quota { requests, seconds } = quota;
        policies.push(format!("\"{name}\";q={requests};w={seconds}"));
        let time = ceil_seconds(decision.reset_after);
        states.push(format!("\"{name}\";r={};t={time}", decision.remaining));
    }
    [("RateLimit-Policy", policies.join(", ")), ("RateLimit", states.join(", "))]
}

fn with_headers(problem: Problem, headers: [(&'static str, String); 2]) -> Problem {
    headers.into_iter().fold(problem, |problem, (name, value)| problem.with_header(name, value))
}

/// The address that counts for a request: of IPv6 the network of 64 bits, because one client usually
/// has all of its addresses.
fn client_key(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)))
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rouille::Response;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limiter(rate: &str) -> Class {
        let quota = Quota::parse(rate).unwrap();
        Class { name: "default", quota, contains: |_| true, table: ClientTable::new() }
    }

    fn allowed(limiter: &Class, client: impl Into<IpAddr>, now: Duration) -> bool {
        limiter.check(client.into(), now).allowed
    }

    #[test]
    fn a_rate_is_requests_and_seconds_and_nothing_else() {
        assert_eq!(Quota::parse("100/60"), Some(Quota { requests: 100, seconds: 60 }));
        for wrong in ["", "100", "/", "0/1", "1/0", "-1/1", "1/1/1", "1 / 1", "1/s", "1.5/1"] {
            assert_eq!(Quota::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Quota::parse("1000001/1"), None);
        assert_eq!(Quota::parse("1/86401"), None);
    }

    #[test]
    fn the_whole_quota_may_be_used_at_once_and_comes_back_one_by_one() {
        let (limiter, client) = (limiter("4/2"), Ipv4Addr::LOCALHOST.into());
        let half = SECOND / 2;
        for remaining in [3, 2, 1, 0] {
            let decision = limiter.check(client, SECOND);
            assert_eq!(decision, Decision { remaining, reset_after: half, allowed: true });
        }
        // A rejected request uses nothing.
        for _ in 0..10 {
            let decision = limiter.check(client, SECOND);
            assert_eq!(decision, Decision { remaining: 0, reset_after: half, allowed: false });
        }
        assert!(!allowed(&limiter, client, SECOND + half - Duration::from_nanos(1)));
        assert!(allowed(&limiter, client, SECOND + half));
        assert!(!allowed(&limiter, client, SECOND + half));
        // After any pause there is one quota and no more.
        let later = SECOND * 1000;
        assert_eq!((0..10).filter(|_| allowed(&limiter, client, later)).count(), 4);
    }

    #[test]
    fn no_window_admits_more_than_rate_plus_one_burst() {
        for rate in ["1/1", "7/3", "1000000/1", "3/86400"] {
            let (limiter, client) = (limiter(rate), Ipv4Addr::LOCALHOST);
            let Quota { requests, seconds } = limiter.quota;
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
    fn a_million_addresses_do_not_lock_out_others_or_restore_a_used_up_quota() {
        let limiter = limiter("100/60");
        let abuser: IpAddr = Ipv4Addr::new(192, 0, 2, 1).into();
        while allowed(&limiter, abuser, SECOND) {}
        for number in 0..1_000_000_u32 {
            let address = Ipv4Addr::from_bits(0x0A00_0000 + number);
            assert!(allowed(&limiter, address, SECOND), "{address} is locked out");
        }
        assert!(!allowed(&limiter, abuser, SECOND), "other addresses have restored the quota");
    }

    #[test]
    fn logins_have_a_quota_of_their_own_beside_that_of_all_requests() {
        let quota = |text| Quota::parse(text);
        let limiter = RateLimiter::new(quota("9/60"), quota("2/60"), TrustedProxies::default());
        let limiter = limiter.unwrap();
        let ask = |method: &str, path: &str| {
            let request = Request::fake_http(method, path, vec![], vec![]);
            let serve = || RoutedResponse { route: "/", result: Ok(Response::text("yes")) };
            let result = limiter.limit(&request, serve).result;
            let response = result.unwrap_or_else(|problem| problem.into_response("id"));
            let header = response.headers.iter().find(|(name, _)| name == "RateLimit");
            (response.status_code, header.unwrap().1.to_string())
        };
        let login = ask("POST", "/api/v1/auth/login");
        assert_eq!(login, (200, "\"default\";r=8;t=7, \"login\";r=1;t=30".to_owned()));
        assert_eq!(ask("GET", "/api/v1/users/exists?email=a").0, 200);
        for (method, path) in [
            ("POST", "/api/v1/auth/login/"),
            ("POST", "/api/v1/auth/refresh"),
            ("POST", "/api/v1/%75sers"),
            ("PUT", "/api/v1/users/me/password"),
        ] {
            let (status, header) = ask(method, path);
            assert_eq!(status, 429, "{method} {path}");
            assert!(header.contains("\"login\";r=0"), "{header}");
        }
        assert_eq!(ask("GET", "/api/v1/users/me").0, 200);
        assert!(RateLimiter::new(None, None, TrustedProxies::default()).is_none());
    }
}
