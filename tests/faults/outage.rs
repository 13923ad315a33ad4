//! What the cases about a server that is hurt have in common: orders and movies flow,
//! the server is hurt for a while and healed, and everything comes back by itself.

use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::eventually;

use crate::load::{Load, RECOVERY, What};
use crate::platform::{Platform, Program, wait_until};
use crate::{Case, Finds, Outcome, Run};
use harness::agent;

/// One thing that is done to a server.
pub(crate) struct Fault {
    /// As the case is called.
    pub(crate) name: &'static str,
    /// How long it lasts at least, in the short form and in the long one, in milliseconds.
    pub(crate) hold_ms: (u64, u64),
    /// What the clients go on to be told is done, all the while.
    pub(crate) unhurt: What,
    /// Those who say meanwhile that they are not ready.
    pub(crate) noticed_by: &'static [&'static str],
    /// What the log of billing, and of those, has a line with; nothing in particular if empty.
    pub(crate) logged: &'static str,
    /// Does it; what it returns undoes it.
    pub(crate) inject: fn(&Platform) -> Heal,
}

/// The longest pause of those whom a fault must not hurt, in the short form, whose programs are
/// slow and whose machine may be busy, and in the long one.
const UNHURT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(1));

/// How much longer that is if the gateway was killed, too: without a broker it waits 2 s for one
/// before it serves anybody.
const GATEWAY_STARTS: Duration = Duration::from_secs(3);

/// Undoes a fault.
pub(crate) type Heal = Box<dyn FnOnce(&Platform)>;

/// A case of one such fault.
pub(crate) const fn case(fault: &Fault, run: fn(&mut Run<'_>) -> Outcome) -> Case {
    Case {
        name: fault.name,
        control: "the acknowledgement after the commit: a consumer that has acknowledged before",
        finds: Finds::Loss,
        // Too slow for the short form, which kills servers in `delivery`.
        short: false,
        run,
    }
}

/// Hurts the server under load.
pub(crate) fn outage(run: &mut Run<'_>, fault: &Fault) -> Outcome {
    let mut outcome = Outcome { load: "8 clients".into(), ..Outcome::default() };
    let billing = if run.control { Program::Careless } else { Program::Real };
    set_up(run, billing);
    let platform = &*run.platform;
    let orders = Load::start(platform, What::Orders, &run.tag, 4);
    let movies = Load::start(platform, What::Movies, &run.tag, 4);
    let memory = platform.watch_memory();
    orders.flows_again_after("the start");
    let gateway = platform.gateway.pid();
    let hold = run.either(fault.hold_ms.0, fault.hold_ms.1);
    suffer(run, fault, hold, &[&orders, &movies], gateway, &mut outcome);
    outcome.faults = 1;
    if run.control {
        die_with_orders_in_hand(platform, &run.tag, &orders);
    }
    movies.settle(platform, &mut outcome);
    orders.settle(platform, &mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

/// In the short form, a broker that is silent is given up soon.
pub(crate) fn set_up(run: &Run<'_>, billing: Program) {
    let mut stack = run.platform.stack.clone();
    if !run.long {
        stack.set("RABBITMQ_HEARTBEAT_S", 2);
    }
    run.platform.gateway.restart(&stack, Program::Real);
    run.platform.billing.restart(&stack, billing);
    if billing == Program::Real {
        run.platform.wait_until_ready();
    }
}

/// The fault from its begin to the moment when all is well again; into `outcome`, how long
/// those paused whom it must not hurt. It lasts `hold` milliseconds at least; `gateway` is its
/// process of before.
pub(crate) fn suffer(
    run: &Run<'_>,
    fault: &Fault,
    hold: u64,
    loads: &[&Load],
    gateway: u32,
    outcome: &mut Outcome,
) {
    let platform = &*run.platform;
    let unhurt: Vec<&&Load> = loads.iter().filter(|load| load.is(fault.unhurt)).collect();
    for load in &unhurt {
        load.pause();
    }
    let injected = Injected { platform, heal: Some((fault.inject)(platform)) };
    let over = Instant::now() + Duration::from_millis(hold);
    for load in &unhurt {
        load.flows_again_after(&format!("{} has begun", fault.name));
    }
    // The careless ones say what they like.
    for service in fault.noticed_by.iter().filter(|_| !run.control) {
        let url = format!("{}/ready", platform.stack.health_url(service));
        eventually(format!("{service} notices {}", fault.name), RECOVERY, || {
            agent().get(&url).call().ok().filter(|answer| answer.status() == 503)
        });
    }
    for (service, supervisor) in platform.services() {
        let must = service == "billing" || fault.noticed_by.contains(&service);
        if must && !run.control {
            eventually(format!("{service} logs {:?}", fault.logged), RECOVERY, || {
                supervisor.log().contains(fault.logged).then_some(())
            });
        }
    }
    wait_until(over);
    let pause = unhurt.iter().map(|load| load.pause()).max().unwrap_or_default();
    println!("  {}: the others paused {:.2} s", fault.name, pause.as_secs_f64());
    let killed = platform.gateway.pid() != gateway;
    let more = if killed { GATEWAY_STARTS } else { Duration::ZERO };
    if pause > run.either(UNHURT.0, UNHURT.1) + more && !run.control {
        outcome.wrong.push(format!("{} hurts the others: they paused {pause:.1?}", fault.name));
    }
    drop(injected);
    for load in loads {
        load.flows_again_after(fault.name);
    }
    platform.wait_until_ready();
}

/// A fault that is healed also when the case fails meanwhile: the next one wants its servers.
struct Injected<'p> {
    platform: &'p Platform,
    heal: Option<Heal>,
}

impl Drop for Injected<'_> {
    fn drop(&mut self) {
        if let Some(heal) = self.heal.take() {
            heal(self.platform);
        }
    }
}

/// The control: the careless consumer dies with orders in hand that the broker has forgotten.
pub(crate) fn die_with_orders_in_hand(platform: &Platform, tag: &str, orders: &Load) {
    let before = platform.orders(tag).len();
    eventually("the careless consumer books orders", RECOVERY, || {
        thread::park_timeout(Duration::from_millis(50));
        (platform.orders(tag).len() > before).then_some(())
    });
    platform.billing.signal("STOP");
    let before = orders.acknowledged();
    eventually("orders are acknowledged", RECOVERY, || {
        (orders.acknowledged() > before + 100).then_some(())
    });
    platform.billing.kill();
}
