//! Faults of the links between the processes: a proxy of the campaign delays, loses, cuts and
//! resets what goes through it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use chassis::testing::{eventually, test_var};
use harness::load::{Load, RECOVERY_S, Workload};
use harness::proxy::{Direction, Mode, TcpProxy};

use crate::platform::{Platform, Program, wait_until};
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "network-all-links",
        control: "the confirm: a gateway that answers 200 as soon as it has sent",
        expects: ExpectedFinding::LostOrDuplicated,
        short: true,
        run: all_links,
    },
    Case {
        name: "network-gateway-inventory",
        control: "that a POST is never repeated: a client that repeats it",
        expects: ExpectedFinding::LostOrDuplicated,
        short: false,
        run: |run| one_link(run, &LINKS[0]),
    },
    Case {
        name: "network-gateway-broker",
        control: "the confirm: a gateway that answers 200 as soon as it has sent",
        expects: ExpectedFinding::LostOrDuplicated,
        short: false,
        run: |run| one_link(run, &LINKS[1]),
    },
    Case {
        name: "network-billing-broker",
        control: "the acknowledgement after the commit: a billing that acknowledges on delivery",
        expects: ExpectedFinding::LostOrDuplicated,
        short: false,
        run: |run| one_link(run, &LINKS[2]),
    },
    Case {
        name: "network-billing-database",
        control: "the acknowledgement after the commit: a billing that acknowledges on delivery",
        expects: ExpectedFinding::LostOrDuplicated,
        short: false,
        run: |run| one_link(run, &LINKS[3]),
    },
    Case {
        name: "network-inventory-database",
        control: "that a POST is never repeated: a client that repeats it",
        expects: ExpectedFinding::LostOrDuplicated,
        short: false,
        run: |run| one_link(run, &LINKS[4]),
    },
];

/// A connection between a service and another service or a server.
pub(crate) struct Link {
    /// The service that connects.
    pub(crate) service: &'static str,
    /// What it connects to: its variables `_HOST` and `_PORT` begin so.
    pub(crate) other: &'static str,
}

pub(crate) const LINKS: [Link; 5] = [
    Link { service: "gateway", other: "INVENTORY" },
    Link { service: "gateway", other: "RABBITMQ" },
    Link { service: "billing", other: "RABBITMQ" },
    Link { service: "billing", other: "BILLING_DB" },
    Link { service: "inventory", other: "INVENTORY_DB" },
];

/// Starts a proxy for each link, and restarts the services with these and with `settings`.
fn through_proxies<'l>(
    platform: &Platform,
    links: &'l [Link],
    settings: &[(&str, u64)],
    program: impl Fn(&str) -> Program,
) -> Vec<(&'l Link, TcpProxy)> {
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
            let proxy = TcpProxy::start(target);
            stack.set(&format!("{}_HOST", link.other), proxy.address.ip());
            stack.set(&format!("{}_PORT", link.other), proxy.address.port());
            proxies.push((link, proxy));
        }
        supervisor.restart(&stack, program(name));
    }
    proxies
}

/// Clients that post orders and movies, and the time until both are processed again after a fault.
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
        movies: Workload,
    ) -> Traffic<'p> {
        Traffic {
            platform,
            tag,
            orders: platform.start_load(Workload::Orders, tag, clients),
            movies: platform.start_load(movies, tag, clients),
        }
    }

    /// Waits until requests succeed and all orders are booked that are acknowledged now; returns
    /// how long both took.
    pub(crate) fn wait_for_recovery_after(&self, fault: &str) -> Duration {
        let over = Instant::now();
        let acknowledged = self.orders.acknowledged();
        self.orders.wait_for_progress_after(fault);
        self.movies.wait_for_progress_after(fault);
        let mut db = self.platform.connect("BILLING_DB_NAME");
        let mut due = Instant::now();
        eventually(format!("orders are booked again after {fault}"), RECOVERY_S, || {
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

    pub(crate) fn reconcile(self, outcome: &mut Outcome) {
        self.platform.reconcile(self.movies, outcome);
        self.platform.reconcile(self.orders, outcome);
    }
}

/// All links at once, with short deadlines.
fn all_links(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new("8 clients");
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
        "gateway" if control => Program::Mutant,
        _ => Program::Real,
    });
    let memory = platform.sample_memory();
    if control {
        // The mutant answers 200 to every order: one that the proxy loses is lost.
        let orders = platform.start_load(Workload::Orders, &run.tag, 2);
        orders.wait_for_progress_after("the start");
        proxies.iter().for_each(|(_, proxy)| proxy.set(Mode::Blackhole(Direction::Requests)));
        orders.wait_for_progress_after("the proxies lose all requests");
        proxies.iter().for_each(|(_, proxy)| proxy.set(Mode::Reset));
        proxies.iter().for_each(|(_, proxy)| proxy.set(Mode::Pass));
        platform.reconcile(orders, &mut outcome);
        return outcome;
    }
    let traffic = Traffic::start(platform, &run.tag, 4, Workload::Movies);
    traffic.wait_for_recovery_after("the start");
    let faults = [Mode::Blackhole(Direction::Responses), Mode::Reset];
    for round in 0..run.short_or_long(1, 5) {
        for mode in
            faults.into_iter().chain((round > 0).then_some(Mode::Blackhole(Direction::Requests)))
        {
            proxies.iter().for_each(|(_, proxy)| proxy.set(mode));
            wait_until(Instant::now() + Duration::from_millis(run.random.u64(500..1500)));
            proxies.iter().for_each(|(_, proxy)| proxy.set(Mode::Pass));
            let took = traffic.wait_for_recovery_after(&format!("{mode:?}"));
            println!("  all links, {mode:?}: recovered after {:.1} s", took.as_secs_f64());
            outcome.faults += proxies.len();
        }
    }
    traffic.reconcile(&mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

/// Every fault of one link, with the deadlines of `.env`.
fn one_link(run: &mut Run<'_>, link: &'static Link) -> Outcome {
    let mut outcome = Outcome::new("8 clients");
    let platform = &*run.platform;
    // A server that hangs while its host acknowledges is given up after this time and 5 s more.
    let settings = [("BILLING_DB_STATEMENT_TIMEOUT_MS", 10_000)];
    let carries_messages = ["RABBITMQ", "BILLING_DB"].contains(&link.other);
    let mutant = run.control && carries_messages;
    let proxies = through_proxies(platform, std::slice::from_ref(link), &settings, |service| {
        if mutant && service == link.service { Program::Mutant } else { Program::Real }
    });
    let proxy = &proxies[0].1;
    let memory = platform.sample_memory();
    let faults = [
        Mode::Delay(Duration::from_millis(50)),
        Mode::Blackhole(Direction::Requests),
        Mode::Blackhole(Direction::Responses),
        Mode::Truncate(run.random.usize(1..100)),
        Mode::Reset,
        Mode::Refuse,
    ];
    if run.control {
        let workload = if carries_messages { Workload::Orders } else { Workload::RetriedMovies };
        let load = platform.start_load(workload, &run.tag, 4);
        load.wait_for_progress_after("the start");
        for direction in [Direction::Requests, Direction::Responses] {
            proxy.set(Mode::Blackhole(direction));
            wait_until(Instant::now() + Duration::from_secs(2));
            proxy.set(Mode::Reset);
            wait_until(Instant::now() + Duration::from_millis(200));
            proxy.set(Mode::Pass);
            load.wait_for_progress_after("the link was reset");
        }
        platform.reconcile(load, &mut outcome);
        return outcome;
    }
    let traffic = Traffic::start(platform, &run.tag, 4, Workload::Movies);
    traffic.wait_for_recovery_after("the start");
    for mode in faults {
        proxy.set(mode);
        wait_until(Instant::now() + Duration::from_millis(run.random.u64(2000..5000)));
        proxy.set(Mode::Pass);
        let name = format!("{} to {}, {mode:?}", link.service, link.other);
        let took = traffic.wait_for_recovery_after(&name);
        println!("  {name}: recovered after {:.1} s", took.as_secs_f64());
        outcome.faults += 1;
    }
    traffic.reconcile(&mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}
