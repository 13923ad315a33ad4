//! An operator reloads, scales, stops and starts the services by PM2 under load.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use chassis::testing::test_var;
use harness::binaries;
use harness::load::Workload;

use crate::outage::kill_mutant_with_orders_in_hand;
use crate::platform::{Platform, Program, wait_until};
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "pm2-reload",
        control: "the second instance of the gateway",
        expects: ExpectedFinding::Text("failed in a reload"),
        // PM2 needs many seconds for two instances.
        short: false,
        run: reload,
    },
    Case {
        name: "pm2-operations",
        control: "the acknowledgement after the commit: a billing that acknowledges on delivery",
        expects: ExpectedFinding::LostOrDuplicated,
        short: false,
        run: operations,
    },
];

/// Runs the platform's services by a PM2 of this campaign's own, until it is dropped.
struct Pm2<'p> {
    platform: &'p Platform,
    home: PathBuf,
    instances: u32,
}

impl<'p> Pm2<'p> {
    /// Starts the apps of the ecosystem file in the place of the platform's services.
    fn start(platform: &'p Platform, instances: u32) -> Pm2<'p> {
        for (_, supervisor) in platform.services() {
            supervisor.replace(Program::External);
        }
        // A short path: PM2 puts its sockets there, and their paths have at most 107 bytes.
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
            .env("MATINEE_BIN_DIR", binaries::directory())
            .env("GATEWAY_INSTANCES", self.instances.to_string())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) {
        let output = self.command(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "pm2 {arguments:?}: {errors}");
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

/// `pm2 reload gateway_app`: with two instances no request fails.
fn reload(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new("8 clients");
    let platform = &*run.platform;
    let pm2 = Pm2::start(platform, if run.control { 1 } else { 2 });
    let orders = platform.start_load(Workload::Orders, &run.tag, 4);
    let movies = platform.start_load(Workload::Movies, &run.tag, 4);
    orders.wait_for_progress_after("the start");
    movies.wait_for_progress_after("the start");
    for _ in 0..run.short_or_long(1, 5) {
        pm2.run(&["reload", "gateway_app"]);
        outcome.faults += 1;
        orders.wait_for_progress_after("the reload");
        movies.wait_for_progress_after("the reload");
    }
    for (name, load) in [("orders", &orders), ("movies", &movies)] {
        if load.failed() > 0 {
            outcome.findings.push(format!("{} {name} failed in a reload", load.failed()));
        }
    }
    platform.reconcile(movies, &mut outcome);
    platform.reconcile(orders, &mut outcome);
    drop(pm2);
    outcome
}

/// Scaling, restarts of everything, stop and start: nothing is lost or done twice.
fn operations(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new("8 clients");
    let platform = &*run.platform;
    if run.control {
        platform.billing().replace(Program::Mutant);
        let orders = platform.start_load(Workload::Orders, &run.tag, 16);
        kill_mutant_with_orders_in_hand(platform, &run.tag, &orders);
        platform.reconcile(orders, &mut outcome);
        return outcome;
    }
    let pm2 = Pm2::start(platform, 2);
    let orders = platform.start_load(Workload::Orders, &run.tag, 4);
    let movies = platform.start_load(Workload::Movies, &run.tag, 4);
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
    for step in steps.iter().cycle().take(steps.len() * run.short_or_long(1, 2)) {
        let failed = orders.failed() + movies.failed();
        pm2.run(step);
        outcome.faults += 1;
        wait_until(Instant::now() + Duration::from_secs(1));
        orders.wait_for_progress_after(&step.join(" "));
        movies.wait_for_progress_after(&step.join(" "));
        let failed = orders.failed() + movies.failed() - failed;
        println!("  pm2 {}: {failed} requests failed", step.join(" "));
    }
    platform.reconcile(movies, &mut outcome);
    platform.reconcile(orders, &mut outcome);
    drop(pm2);
    outcome
}
