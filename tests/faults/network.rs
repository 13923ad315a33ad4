//! What happens between the processes: links that swallow, cut, reset and slow down what
//! goes through them, by a proxy of the driver.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use chassis::testing::{eventually, test_var};

use crate::load::{Load, RECOVERY, What};
use crate::platform::{Platform, Program, wait_until};
use crate::{Case, Finds, Outcome, Run};
use harness::proxy::{Direction, Mode, Proxy};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "network-all-links",
        control: "the confirm: a gateway that answers 200 as soon as it has sent",
        finds: Finds::Loss,
        short: true,
        run: all_links,
    },
    Case {
        name: "network-gateway-inventory",
        control: "that a POST is never repeated: a client that does",
        finds: Finds::Loss,
        short: false,
        run: |run| one_link(run, &LINKS[0]),
    },
    Case {
        name: "network-gateway-broker",
        control: "the confirm: a gateway that answers 200 as soon as it has sent",
        finds: Finds::Loss,
        short: false,
        run: |run| one_link(run, &LINKS[1]),
    },
    Case {
        name: "network-billing-broker",
        control: "the acknowledgement after the commit: a consumer that has acknowledged before",
        finds: Finds::Loss,
        short: false,
        run: |run| one_link(run, &LINKS[2]),
    },
    Case {
        name: "network-billing-database",
        control: "the acknowledgement after the commit: a consumer that has acknowledged before",
        finds: Finds::Loss,
        short: false,
        run: |run| one_link(run, &LINKS[3]),
    },
    Case {
        name: "network-inventory-database",
        control: "that a POST is never repeated: a client that does",
        finds: Finds::Loss,
        short: false,
        run: |run| one_link(run, &LINKS[4]),
    },
];

/// Who asks whom.
pub(crate) struct Link {
    pub(crate) service: &'static str,
    /// The variables `_HOST` and `_PORT` by which it finds the other side.
    pub(crate) other: &'static str,
}

pub(crate) const LINKS: [Link; 5] = [
    Link { service: "gateway", other: "INVENTORY" },
    Link { service: "gateway", other: "RABBITMQ" },
    Link { service: "billing", other: "RABBITMQ" },
    Link { service: "billing", other: "BILLING_DB" },
    Link { service: "inventory", other: "INVENTORY_DB" },
];

/// Gives each link a proxy, and starts the services anew with these and with `settings`.
fn through_proxies<'l>(
    platform: &Platform,
    links: &'l [Link],
    settings: &[(&str, u64)],
    program: impl Fn(&str) -> Program,
) -> Vec<(&'l Link, Proxy)> {
    let mut proxies = Vec::new();
    for (name, supervisor) in platform.services() {
        let mut stack = platform.stack.clone();
        for (setting, value) in settings {
            stack.set(setting, value);
        }
        for link in links.iter().filter(|link| link.service == name) {
            let [host, port] = ["HOST", "PORT"].map(|part| {
                let variable = format!("{}_{part}", link.other);
                stack.env.get(&variable).cloned().unwrap_or_else(|| test_var(&variable))
            });
            let target = SocketAddr::new(host.parse().unwrap(), port.parse().unwrap());
            let proxy = Proxy::start(target);
            stack.set(&format!("{}_HOST", link.other), proxy.address.ip());
            stack.set(&format!("{}_PORT", link.other), proxy.address.port());
            proxies.push((link, proxy));
        }
        supervisor.restart(&stack, program(name));
    }
    proxies
}

/// Orders and movies in a stream, and how soon they are where they belong after a fault.
pub(crate) struct Traffic<'p> {
    platform: &'p Platform,
    tag: &'p str,
    pub(crate) orders: Load,
    pub(crate) movies: Load,
}

impl<'p> Traffic<'p> {
    pub(crate) fn start(
        platform: &'p Platform,
        tag: &'p str,
        clients: usize,
        movies: What,
    ) -> Traffic<'p> {
        Traffic {
            platform,
            tag,
            orders: Load::start(platform, What::Orders, tag, clients),
            movies: Load::start(platform, movies, tag, clients),
        }
    }

    /// Waits until requests succeed and until all orders are booked that were acknowledged
    /// by now; how long both took.
    pub(crate) fn recovers_after(&self, fault: &str) -> Duration {
        let over = Instant::now();
        let acknowledged = self.orders.acknowledged();
        self.orders.flows_again_after(fault);
        self.movies.flows_again_after(fault);
        let mut db = self.platform.connect("BILLING_DB_NAME");
        let mut due = Instant::now();
        eventually(format!("orders are booked again after {fault}"), RECOVERY, || {
            if Instant::now() < due {
                return None;
            }
            due = Instant::now() + Duration::from_millis(100);
            let count = "select count(distinct user_id) from orders where starts_with(user_id, $1)";
            let booked: i64 = db.query_one(count, &[&self.tag]).unwrap().get(0);
            (booked as usize >= acknowledged).then_some(())
        });
        over.elapsed()
    }

    pub(crate) fn settle(self, outcome: &mut Outcome) {
        self.movies.settle(self.platform, outcome);
        self.orders.settle(self.platform, outcome);
    }
}

/// All links at once, with short deadlines.
fn all_links(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome { load: "8 clients".into(), ..Outcome::default() };
    let platform = &*run.platform;
    let settings = [
        ("RABBITMQ_HEARTBEAT_S", 2),
        ("GATEWAY_PUBLISH_CONFIRM_TIMEOUT_MS", 1000),
        ("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", 2000),
        ("BILLING_DB_STATEMENT_TIMEOUT_MS", 1000),
        ("INVENTORY_DB_STATEMENT_TIMEOUT_MS", 1000),
    ];
    let control = run.control;
    let proxies = through_proxies(platform, &LINKS, &settings, |service| match service {
        "gateway" if control => Program::Careless,
        _ => Program::Real,
    });
    let memory = platform.watch_memory();
    if control {
        // It answers 200 to everything: what is swallowed is lost.
        let orders = Load::start(platform, What::Orders, &run.tag, 2);
        orders.flows_again_after("the start");
        proxies.iter().for_each(|(_, proxy)| proxy.set(Mode::Swallow(Direction::Requests)));
        orders.flows_again_after("what is swallowed was acknowledged");
        proxies.iter().for_each(|(_, proxy)| proxy.set(Mode::Reset));
        proxies.iter().for_each(|(_, proxy)| proxy.set(Mode::Pass));
        orders.settle(platform, &mut outcome);
        return outcome;
    }
    let traffic = Traffic::start(platform, &run.tag, 4, What::Movies);
    traffic.recovers_after("the start");
    let faults = [Mode::Swallow(Direction::Answers), Mode::Reset];
    for round in 0..run.either(1, 5) {
        for mode in
            faults.into_iter().chain((round > 0).then_some(Mode::Swallow(Direction::Requests)))
        {
            proxies.iter().for_each(|(_, proxy)| proxy.set(mode));
            wait_until(Instant::now() + Duration::from_millis(run.random.u64(500..1500)));
            proxies.iter().for_each(|(_, proxy)| proxy.set(Mode::Pass));
            let took = traffic.recovers_after(&format!("{mode:?}"));
            println!("  all links, {mode:?}: well after {:.1} s", took.as_secs_f64());
            outcome.faults += proxies.len();
        }
    }
    traffic.settle(&mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

/// Everything that can happen to one link, with the deadlines of `.env`.
fn one_link(run: &mut Run<'_>, link: &'static Link) -> Outcome {
    let mut outcome = Outcome { load: "8 clients".into(), ..Outcome::default() };
    let platform = &*run.platform;
    // A server whose host answers and that itself does not is given up after this and 5 s.
    let settings = [("BILLING_DB_STATEMENT_TIMEOUT_MS", 10_000)];
    let by_the_queue = ["RABBITMQ", "BILLING_DB"].contains(&link.other);
    let careless = run.control && by_the_queue;
    let proxies = through_proxies(platform, std::slice::from_ref(link), &settings, |service| {
        if careless && service == link.service { Program::Careless } else { Program::Real }
    });
    let proxy = &proxies[0].1;
    let memory = platform.watch_memory();
    let faults = [
        Mode::Delay(Duration::from_millis(50)),
        Mode::Swallow(Direction::Requests),
        Mode::Swallow(Direction::Answers),
        Mode::Truncate(run.random.usize(1..100)),
        Mode::Reset,
        Mode::Refuse,
    ];
    if run.control {
        let what = if by_the_queue { What::Orders } else { What::StubbornMovies };
        let load = Load::start(platform, what, &run.tag, 4);
        load.flows_again_after("the start");
        for direction in [Direction::Requests, Direction::Answers] {
            proxy.set(Mode::Swallow(direction));
            wait_until(Instant::now() + Duration::from_secs(2));
            proxy.set(Mode::Reset);
            wait_until(Instant::now() + Duration::from_millis(200));
            proxy.set(Mode::Pass);
            load.flows_again_after("the link was cut");
        }
        load.settle(platform, &mut outcome);
        return outcome;
    }
    let traffic = Traffic::start(platform, &run.tag, 4, What::Movies);
    traffic.recovers_after("the start");
    for mode in faults {
        proxy.set(mode);
        wait_until(Instant::now() + Duration::from_millis(run.random.u64(2000..5000)));
        proxy.set(Mode::Pass);
        let name = format!("{} to {}, {mode:?}", link.service, link.other);
        let took = traffic.recovers_after(&name);
        println!("  {name}: well after {:.1} s", took.as_secs_f64());
        outcome.faults += 1;
    }
    traffic.settle(&mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}
