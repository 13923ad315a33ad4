//! What an operator does under load, by PM2: reloads, scales, stops and starts.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use chassis::testing::test_var;

use crate::load::{Load, What};
use crate::outage::die_with_orders_in_hand;
use crate::platform::{Platform, Program, wait_until};
use crate::{Case, Finds, Outcome, Run};
use harness::binaries;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "pm2-reload",
        control: "the second instance of the gateway",
        finds: Finds::Fault("failed in a reload"),
        // PM2 takes its time for two instances.
        short: false,
        run: reload,
    },
    Case {
        name: "pm2-operations",
        control: "the acknowledgement after the commit: a consumer that has acknowledged before",
        finds: Finds::Loss,
        short: false,
        run: operations,
    },
];

/// The platform's services under a PM2 of this campaign's own, until it is dropped.
struct Pm2<'p> {
    platform: &'p Platform,
    home: PathBuf,
    instances: u32,
}

impl<'p> Pm2<'p> {
    /// Starts the three apps of the ecosystem file where the platform's services were.
    fn start(platform: &'p Platform, instances: u32) -> Pm2<'p> {
        for (_, supervisor) in platform.services() {
            supervisor.replace(Program::Absent);
        }
        // Sockets have short paths.
        let home = std::env::temp_dir().join(format!("matinee-pm2-{}", std::process::id()));
        let pm2 = Pm2 { platform, home, instances };
        pm2.run(&[
            "start",
            concat!(env!("CARGO_MANIFEST_DIR"), "/../provision/ecosystem.config.js"),
        ]);
        platform.wait_until_ready();
        pm2
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(test_var("MATINEE_PM2"));
        command
            .args(arguments)
            .arg("--silent")
            .envs(&self.platform.stack.env)
            .env("PM2_HOME", &self.home)
            .env("MATINEE_BIN_DIR", binaries())
            .env("GATEWAY_INSTANCES", self.instances.to_string())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) {
        let done = self.command(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "pm2 {arguments:?}: {said}");
    }
}

impl Drop for Pm2<'_> {
    fn drop(&mut self) {
        let _ = self.command(&["kill"]).output();
        let _ = std::fs::remove_dir_all(&self.home);
        for (_, supervisor) in self.platform.services() {
            supervisor.replace(Program::Real);
        }
    }
}

/// `pm2 reload gateway_app`: with two instances nobody is refused.
fn reload(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome { load: "8 clients".into(), ..Outcome::default() };
    let platform = &*run.platform;
    let pm2 = Pm2::start(platform, if run.control { 1 } else { 2 });
    let orders = Load::start(platform, What::Orders, &run.tag, 4);
    let movies = Load::start(platform, What::Movies, &run.tag, 4);
    orders.flows_again_after("the start");
    movies.flows_again_after("the start");
    for _ in 0..run.either(1, 5) {
        pm2.run(&["reload", "gateway_app"]);
        outcome.faults += 1;
        orders.flows_again_after("the reload");
        movies.flows_again_after("the reload");
    }
    for (name, load) in [("orders", &orders), ("movies", &movies)] {
        if load.failed() > 0 {
            outcome.wrong.push(format!("{} {name} failed in a reload", load.failed()));
        }
    }
    movies.settle(platform, &mut outcome);
    orders.settle(platform, &mut outcome);
    drop(pm2);
    outcome
}

/// Scaling, a rolling restart of everything, stop and start: nothing is lost or done twice.
fn operations(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome { load: "8 clients".into(), ..Outcome::default() };
    let platform = &*run.platform;
    if run.control {
        platform.billing.replace(Program::Careless);
        let orders = Load::start(platform, What::Orders, &run.tag, 16);
        die_with_orders_in_hand(platform, &run.tag, &orders);
        orders.settle(platform, &mut outcome);
        return outcome;
    }
    let pm2 = Pm2::start(platform, 2);
    let orders = Load::start(platform, What::Orders, &run.tag, 4);
    let movies = Load::start(platform, What::Movies, &run.tag, 4);
    let steps: &[&[&str]] = &[
        &["scale", "billing_app", "3"],
        &["scale", "billing_app", "1"],
        &["reload", "gateway_app"],
        &["restart", "inventory_app"],
        &["restart", "billing_app"],
        &["restart", "gateway_app"],
        &["stop", "billing_app"],
        &["start", "billing_app"],
        &["reload", "all"],
        &["restart", "all"],
    ];
    for step in steps.iter().cycle().take(steps.len() * run.either(1, 2)) {
        let failed = orders.failed() + movies.failed();
        pm2.run(step);
        outcome.faults += 1;
        wait_until(Instant::now() + Duration::from_secs(1));
        orders.flows_again_after(&step.join(" "));
        movies.flows_again_after(&step.join(" "));
        let failed = orders.failed() + movies.failed() - failed;
        println!("  pm2 {}: {failed} requests failed", step.join(" "));
    }
    movies.settle(platform, &mut outcome);
    orders.settle(platform, &mut outcome);
    drop(pm2);
    outcome
}
