//! The common part of the cases about a server's outage: orders and movies are posted, the server
//! has a fault for a while, the fault is undone, and everything recovers by itself.

use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::eventually;
use harness::get;
use harness::load::{Load, RECOVERY_S, Workload};

use crate::platform::{Platform, Program, wait_until};
use crate::{Case, ExpectedFinding, Outcome, Run};

/// A fault of a server.
pub(crate) struct Fault {
    /// The name of its case.
    pub(crate) name: &'static str,
    /// How long it lasts at least, in the short form and in the long one, in milliseconds.
    pub(crate) hold_ms: (u64, u64),
    /// The workload that needs this server not at all, and must go on meanwhile.
    pub(crate) unaffected: Workload,
    /// The services whose readiness must fail meanwhile.
    pub(crate) noticed_by: &'static [&'static str],
    /// What the logs of billing and of those services must contain; anything if it is empty.
    pub(crate) logged: &'static str,
    /// Injects it.
    pub(crate) inject: fn(&Platform) -> Undo,
}

/// Undoes a fault.
pub(crate) type Undo = Box<dyn FnOnce(&Platform)>;

/// The longest pause of the unaffected workload, in the short form, whose programs are slow and
/// whose machine may be busy, and in the long one.
const UNAFFECTED_PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(1));

/// How much longer that pause may be if the gateway was killed as well: without a broker it waits
/// 2 s for one before it serves requests.
const GATEWAY_START: Duration = Duration::from_secs(3);

/// How many orders more must be acknowledged before the mutant that holds them is killed.
const ORDERS_IN_HAND: usize = 100;

/// The case of a fault.
pub(crate) const fn case(fault: &Fault, run: fn(&mut Run<'_>) -> Outcome) -> Case {
    Case {
        name: fault.name,
        control: "the acknowledgement after the commit: a billing that acknowledges on delivery",
        expects: ExpectedFinding::LostOrDuplicated,
        // Too slow for the short form, which kills the servers in `crashes`.
        short: false,
        run,
    }
}

/// Injects the fault under load.
pub(crate) fn outage(run: &mut Run<'_>, fault: &Fault) -> Outcome {
    let mut outcome = Outcome::new("8 clients");
    let billing = if run.control { Program::Mutant } else { Program::Real };
    set_up(run, billing);
    let platform = &*run.platform;
    let orders = platform.start_load(Workload::Orders, &run.tag, 4);
    let movies = platform.start_load(Workload::Movies, &run.tag, 4);
    let memory = platform.sample_memory();
    orders.wait_for_progress_after("the start");
    let gateway = platform.gateway().pid();
    let hold = run.short_or_long(fault.hold_ms.0, fault.hold_ms.1);
    inject_and_recover(run, fault, hold, &[&orders, &movies], gateway, &mut outcome);
    outcome.faults = 1;
    if run.control {
        kill_mutant_with_orders_in_hand(platform, &run.tag, &orders);
    }
    platform.reconcile(movies, &mut outcome);
    platform.reconcile(orders, &mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

/// Starts gateway and billing with short heartbeats in the short form, so that a silent broker is
/// given up soon.
pub(crate) fn set_up(run: &Run<'_>, billing: Program) {
    let mut stack = run.platform.stack.clone();
    if !run.long {
        stack.set("RABBITMQ_HEARTBEAT_S", 2);
    }
    run.platform.gateway().restart(&stack, Program::Real);
    run.platform.billing().restart(&stack, billing);
    if billing == Program::Real {
        run.platform.wait_until_ready();
    }
}

/// Injects a fault, undoes it after `hold` milliseconds, and waits until all is well again. A
/// pause of the unaffected workload that is too long goes to `outcome`. `gateway` is the process
/// id of the gateway before the fault.
pub(crate) fn inject_and_recover(
    run: &Run<'_>,
    fault: &Fault,
    hold: u64,
    loads: &[&Load],
    gateway: u32,
    outcome: &mut Outcome,
) {
    let platform = &*run.platform;
    let is_unaffected = |load: &&&Load| load.workload().is_movies() == fault.unaffected.is_movies();
    let unaffected: Vec<&&Load> = loads.iter().filter(is_unaffected).collect();
    for load in &unaffected {
        load.take_pause();
    }
    let injected = Injected { platform, undo: Some((fault.inject)(platform)) };
    let over = Instant::now() + Duration::from_millis(hold);
    for load in &unaffected {
        load.wait_for_progress_after(&format!("the begin of {}", fault.name));
    }
    // A mutant's readiness says nothing.
    for service in fault.noticed_by.iter().filter(|_| !run.control) {
        let url = format!("{}/ready", platform.stack.health_url(service));
        eventually(format!("{service} is not ready: {}", fault.name), RECOVERY_S, || {
            get(&url).filter(|reply| reply.status == 503)
        });
    }
    for (service, supervisor) in platform.services() {
        let must_log = service == "billing" || fault.noticed_by.contains(&service);
        if must_log && !run.control {
            eventually(format!("{service} logs {:?}", fault.logged), RECOVERY_S, || {
                supervisor.log().contains(fault.logged).then_some(())
            });
        }
    }
    wait_until(over);
    let pause = unaffected.iter().map(|load| load.take_pause()).max().unwrap_or_default();
    println!("  {}: the unaffected paused {:.2} s", fault.name, pause.as_secs_f64());
    let killed = platform.gateway().pid() != gateway;
    let start = if killed { GATEWAY_START } else { Duration::ZERO };
    let allowed = run.short_or_long(UNAFFECTED_PAUSE.0, UNAFFECTED_PAUSE.1) + start;
    if pause > allowed && !run.control {
        let finding = format!("{}: the unaffected workload paused {pause:.1?}", fault.name);
        outcome.findings.push(finding);
    }
    drop(injected);
    for load in loads {
        load.wait_for_progress_after(fault.name);
    }
    platform.wait_until_ready();
}

/// An injected fault. It is undone also when the case panics, because the next case needs the
/// servers.
struct Injected<'p> {
    platform: &'p Platform,
    undo: Option<Undo>,
}

impl Drop for Injected<'_> {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            undo(self.platform);
        }
    }
}

/// The control: kills the mutant of billing while it has orders that it has not booked and that
/// the broker no longer has.
pub(crate) fn kill_mutant_with_orders_in_hand(platform: &Platform, tag: &str, orders: &Load) {
    let before = platform.orders(tag).len();
    eventually("the mutant books orders", RECOVERY_S, || {
        thread::park_timeout(Duration::from_millis(50));
        (platform.orders(tag).len() > before).then_some(())
    });
    platform.billing().signal("STOP");
    let before = orders.acknowledged();
    eventually("orders are acknowledged", RECOVERY_S, || {
        (orders.acknowledged() > before + ORDERS_IN_HAND).then_some(())
    });
    platform.billing().kill();
}
