//! The servers and all services, and what a case can do to them.

use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::process::resident_bytes;
use chassis::testing::{
    connect_as_superuser, eventually, management_api, repository_root, test_var, vhost_path,
};
use harness::bodies::expected_text;
use harness::load::{Load, LoadConfig, RECOVERY_S, Workload};
use harness::services::services;
use harness::{Service, Stack, get};
use parking_lot::Mutex;
use postgres::Client;

use crate::{Outcome, mutants};

/// How soon a service that has ended is started again.
const RESTART_DELAY: Duration = Duration::from_millis(20);

/// A thing that is not there this long after the last one that arrived is lost.
const SETTLE_TIME: Duration = Duration::from_secs(5);

/// How much later than its deadline a response of the gateway may come: the machine may be busy.
const LATENCY_MARGIN: Duration = Duration::from_secs(3);

/// All services, on the servers in `MATINEE_TEST_SERVERS_DIR`, which must be this campaign's own.
pub(crate) struct Platform {
    pub(crate) stack: Stack,
    supervisors: Vec<(&'static str, Supervisor)>,
}

/// What runs in a service's place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// The service itself.
    Real,
    /// One without a protection: see [`mutants`].
    Mutant,
    /// The service itself, with so few file descriptors.
    FdLimited(u32),
    /// No process of this campaign's supervisor: the case starts the service itself.
    External,
}

impl Platform {
    /// Starts the services and waits until they are ready.
    pub(crate) fn start() -> Platform {
        let mut stack = Stack::new();
        for (name, value) in malloc_settings() {
            stack.set(&name, value);
        }
        Platform::start_with(stack)
    }

    /// The same with these settings.
    pub(crate) fn start_with(stack: Stack) -> Platform {
        let started = services().iter().map(|row| {
            let name = row.name.as_str();
            (name, Supervisor::start(&stack, name))
        });
        let platform = Platform { supervisors: started.collect(), stack };
        platform.wait_until_ready();
        platform
    }

    /// Makes everything as it was after the start: servers up, real services with the settings
    /// of `.env`, all ready, no message in the queue.
    pub(crate) fn restore(&mut self) {
        self.servers("start", &[]);
        for (_, supervisor) in &self.supervisors {
            if supervisor.program() != Program::Real || supervisor.stack().env != self.stack.env {
                supervisor.restart(&self.stack, Program::Real);
            }
            supervisor.shared.state.lock().unexpected_exits = 0;
        }
        self.wait_until_ready();
        self.wait_for_empty_queue();
    }

    /// Waits until the gateway and billing say that all they need is there. The gateway's
    /// readiness includes inventory's.
    pub(crate) fn wait_until_ready(&self) {
        for service in ["gateway", "orders", "billing"] {
            self.stack.wait_until_ready(service, RECOVERY_S);
        }
    }

    /// The services by name.
    pub(crate) fn services(&self) -> impl Iterator<Item = (&'static str, &Supervisor)> {
        self.supervisors.iter().map(|(name, supervisor)| (*name, supervisor))
    }

    /// A service by its name.
    pub(crate) fn service(&self, name: &str) -> &Supervisor {
        let found = self.services().find(|(known, _)| *known == name);
        found.unwrap_or_else(|| panic!("there is no service {name}")).1
    }

    pub(crate) fn gateway(&self) -> &Supervisor {
        self.service("gateway")
    }

    pub(crate) fn inventory(&self) -> &Supervisor {
        self.service("inventory")
    }

    pub(crate) fn billing(&self) -> &Supervisor {
        self.service("billing")
    }

    /// Runs `provision/dev-servers` for the servers of this campaign; returns its output.
    pub(crate) fn servers(&self, command: &str, arguments: &[&str]) -> String {
        let output = Command::new(repository_root().join("provision/dev-servers"))
            .arg(command)
            .arg(test_var("MATINEE_TEST_SERVERS_DIR"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "provision/dev-servers {command} {arguments:?}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The superuser's connection to the database that a variable names.
    pub(crate) fn connect(&self, variable: &str) -> Client {
        connect_as_superuser(&test_var(variable))
    }

    /// How often each order is booked whose user begins with `tag`.
    pub(crate) fn orders(&self, tag: &str) -> HashMap<String, usize> {
        self.count(
            "BILLING_DB_NAME",
            "select user_id from orders where starts_with(user_id, $1)",
            tag,
        )
    }

    /// How often each movie is in the table whose title begins with `tag`.
    pub(crate) fn movies(&self, tag: &str) -> HashMap<String, usize> {
        self.count(
            "INVENTORY_DB_NAME",
            "select title from movies where starts_with(title, $1)",
            tag,
        )
    }

    fn count(&self, database: &str, query: &str, tag: &str) -> HashMap<String, usize> {
        let mut found = HashMap::new();
        for row in self.connect(database).query(query, &[&tag]).unwrap() {
            *found.entry(row.get(0)).or_default() += 1;
        }
        found
    }

    /// Starts clients that post until they are stopped.
    pub(crate) fn start_load(&self, workload: Workload, tag: &str, clients: usize) -> Load {
        self.start_limited_load(workload, tag, clients, usize::MAX)
    }

    /// Starts clients that post `limit` things together.
    pub(crate) fn start_limited_load(
        &self,
        workload: Workload,
        tag: &str,
        clients: usize,
        limit: usize,
    ) -> Load {
        Load::start(LoadConfig {
            workload,
            gateway: self.stack.service_url("gateway"),
            tag: tag.to_owned(),
            clients,
            limit,
            max_latency: self.max_latency(workload),
        })
    }

    /// The gateway's own deadline for such a request, and a margin.
    fn max_latency(&self, workload: Workload) -> Duration {
        // The link between the clients and the gateway may be cut: see `partitions`.
        if !self.stack.url("").starts_with("http://127.") {
            return Duration::MAX;
        }
        let deadlines: &[&str] = match workload.is_movies() {
            true => &["UPSTREAM_CONNECT", "UPSTREAM_RESPONSE"],
            false => &["PUBLISH_CONFIRM"],
        };
        let milliseconds = deadlines
            .iter()
            .map(|name| test_var(&format!("GATEWAY_{name}_TIMEOUT_MS")).parse::<u64>().unwrap());
        LATENCY_MARGIN + Duration::from_millis(milliseconds.sum())
    }

    /// Stops the clients and compares their ledger with the table, into `outcome`.
    ///
    /// An acknowledged thing must be there exactly once, another posted one at most once, each
    /// with the values that were posted, and nothing that was never posted.
    pub(crate) fn reconcile(&self, load: Load, outcome: &mut Outcome) {
        let (workload, tag) = (load.workload(), load.tag().to_owned());
        let ledger = load.finish();
        let look = || match workload.is_movies() {
            true => self.movies(&tag),
            false => self.orders(&tag),
        };
        // An order that is late is not lost: billing may still have it. A duplicate would come
        // with the last redeliveries.
        if !workload.is_movies() {
            self.wait_for_empty_queue();
        }
        let mut found = look();
        let mut changed_at = Instant::now();
        while ledger.compare(&found).lost > 0 && changed_at.elapsed() < SETTLE_TIME {
            thread::park_timeout(Duration::from_millis(50));
            let now = look();
            if now.len() != found.len() {
                changed_at = Instant::now();
            }
            found = now;
        }
        let comparison = ledger.compare(&found);
        outcome.acknowledged += ledger.acknowledged.len();
        outcome.found += found.len();
        outcome.lost += comparison.lost;
        outcome.duplicated += comparison.duplicated;
        for id in comparison.unknown.iter().take(3) {
            outcome.findings.push(format!("{id} is in the table and was never posted"));
        }
        outcome.findings.extend(self.altered(workload, &tag).into_iter().take(3));
        outcome.longest_pause = outcome.longest_pause.max(ledger.longest_pause);
        outcome.findings.extend(ledger.unexpected);
    }

    /// Things that are in the table with other values than were posted.
    fn altered(&self, workload: Workload, tag: &str) -> Vec<String> {
        let (database, query) = match workload.is_movies() {
            true => (
                "INVENTORY_DB_NAME",
                "select title, description from movies where starts_with(title, $1)",
            ),
            false => (
                "BILLING_DB_NAME",
                "select user_id, number_of_items || ' for ' || total_amount from orders
                 where starts_with(user_id, $1)",
            ),
        };
        let rows = self.connect(database).query(query, &[&tag]).unwrap();
        let rows = rows.iter().map(|row| (row.get(0), row.get(1)));
        rows.filter(|(id, values): &(String, String)| *values != expected_text(id))
            .map(|(id, values)| format!("{id} has the values {values}, not {}", expected_text(&id)))
            .collect()
    }

    /// Messages in a queue, with those that are delivered and not acknowledged.
    pub(crate) fn queue_depth(&self, queue: &str) -> usize {
        let list = self.servers("rabbitmqctl", &["--quiet", "list_queues", "name", "messages"]);
        let found = list
            .lines()
            .find_map(|line| line.strip_prefix(queue)?.strip_prefix('\t')?.parse().ok());
        found.unwrap_or_else(|| panic!("no queue {queue} in {list}"))
    }

    /// Waits until every message of the queue is booked or rejected.
    pub(crate) fn wait_for_empty_queue(&self) {
        let queue = test_var("RABBITMQ_QUEUE");
        eventually("the queue is empty", 120, || (self.queue_depth(&queue) == 0).then_some(()));
    }

    /// Empties the queue of dead letters; returns how many there were.
    pub(crate) fn purge_dead_letters(&self) -> usize {
        let queue = format!("{}.dead", test_var("RABBITMQ_QUEUE"));
        let depth = self.queue_depth(&queue);
        management_api("DELETE", &format!("queues/{}/{queue}/contents", vhost_path()), None);
        depth
    }

    /// The sum of a service's metrics whose lines begin with `prefix`.
    pub(crate) fn metric(&self, service: &str, prefix: &str) -> f64 {
        self.stack.metric(service, prefix)
    }

    /// Samples the resident memory of all services together, until the sampler is dropped.
    pub(crate) fn sample_memory(&self) -> PeakSampler {
        let services: Vec<Arc<Shared>> =
            self.services().map(|(_, supervisor)| Arc::clone(&supervisor.shared)).collect();
        PeakSampler::start(move || {
            services.iter().map(|service| resident(service.state.lock().service.pid())).sum()
        })
    }

    /// The process id that a service has now.
    pub(crate) fn pid(&self, service: &str) -> u32 {
        self.service(service).pid()
    }
}

/// Waits until a service answers that another process starts, and starts again if it ends.
fn wait_until_live(stack: &Stack, service: &str) {
    let url = stack.health_url(service);
    eventually(format!("{service} answers"), RECOVERY_S, || get(&url));
}

/// What the ecosystem file sets for glibc, so that memory is measured as users have it.
fn malloc_settings() -> Vec<(String, String)> {
    let file = include_str!("../../provision/ecosystem.config.js");
    let settings = file.split_once("const malloc = {").and_then(|(_, rest)| rest.split_once('}'));
    let settings = settings.map_or("", |(settings, _)| settings);
    let pairs = settings.split(',').filter_map(|pair| pair.split_once(':'));
    let pairs: Vec<(String, String)> = pairs
        .map(|(name, value)| (name.trim().to_owned(), value.trim().trim_matches('\'').to_owned()))
        .collect();
    assert!(!pairs.is_empty(), "the ecosystem file has no settings for malloc");
    pairs
}

/// Resident memory of a service in bytes; 0 when it has ended, and when its process was just
/// forked and still runs this program.
pub(crate) fn resident(pid: u32) -> u64 {
    let arguments = |pid: &str| std::fs::read(format!("/proc/{pid}/cmdline")).ok();
    if arguments(&pid.to_string()) == arguments("self") { 0 } else { resident_bytes(pid) }
}

/// Samples a number ten times a second and keeps the largest.
pub(crate) struct PeakSampler {
    shared: Arc<(AtomicBool, AtomicU64)>,
    thread: Option<thread::JoinHandle<()>>,
}

impl PeakSampler {
    /// Samples until it is dropped.
    pub(crate) fn start(sample: impl Fn() -> u64 + Send + 'static) -> PeakSampler {
        let shared = Arc::new((AtomicBool::new(false), AtomicU64::new(0)));
        let sampling = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            while !sampling.0.load(Ordering::SeqCst) {
                sampling.1.fetch_max(sample(), Ordering::SeqCst);
                thread::park_timeout(Duration::from_millis(100));
            }
        });
        PeakSampler { shared, thread: Some(thread) }
    }

    /// The largest sample so far.
    pub(crate) fn peak(&self) -> u64 {
        self.shared.1.load(Ordering::SeqCst)
    }
}

impl Drop for PeakSampler {
    fn drop(&mut self) {
        self.shared.0.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Starts a service again whenever it ends, as PM2 does.
pub(crate) struct Supervisor {
    name: &'static str,
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Shared {
    stopping: AtomicBool,
    state: Mutex<State>,
}

struct State {
    stack: Stack,
    program: Program,
    service: Service,
    /// A case has sent it a signal that ends it.
    killed: bool,
    /// How often it ended without such a signal.
    unexpected_exits: usize,
}

impl Supervisor {
    pub(crate) fn start(stack: &Stack, name: &'static str) -> Supervisor {
        let service = launch(stack, name, Program::Real);
        let (stack, program) = (stack.clone(), Program::Real);
        let state = State { stack, program, service, killed: false, unexpected_exits: 0 };
        let shared =
            Arc::new(Shared { stopping: AtomicBool::new(false), state: Mutex::new(state) });
        let watched = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            while !watched.stopping.load(Ordering::SeqCst) {
                let mut state = watched.state.lock();
                if state.service.exit_status().is_some() {
                    if !std::mem::take(&mut state.killed) {
                        state.unexpected_exits += 1;
                    }
                    state.service = launch(&state.stack, name, state.program);
                }
                drop(state);
                thread::park_timeout(RESTART_DELAY);
            }
        });
        Supervisor { name, shared, thread: Some(thread) }
    }

    /// SIGKILL; it is started again.
    pub(crate) fn kill(&self) {
        self.signal("KILL");
    }

    /// Sends a signal by its name, such as `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        let mut state = self.shared.state.lock();
        state.killed |= !["STOP", "CONT"].contains(&name);
        state.service.signal(name);
    }

    /// How often it has ended by itself since [`Platform::restore`].
    pub(crate) fn unexpected_exits(&self) -> usize {
        self.shared.state.lock().unexpected_exits
    }

    /// The process id that it has now.
    pub(crate) fn pid(&self) -> u32 {
        self.shared.state.lock().service.pid()
    }

    /// What it has logged since its last start.
    pub(crate) fn log(&self) -> String {
        self.shared.state.lock().service.log()
    }

    /// Runs another program in its place, with its settings.
    pub(crate) fn replace(&self, program: Program) {
        let stack = self.stack();
        self.restart(&stack, program);
    }

    /// Starts it again with other settings, and waits until it answers.
    pub(crate) fn restart(&self, stack: &Stack, program: Program) {
        let mut state = self.shared.state.lock();
        // Killed before the new one starts: two would share the port.
        state.service.kill();
        state.service = launch(stack, self.name, program);
        (state.stack, state.program, state.killed) = (stack.clone(), program, false);
        drop(state);
        if program != Program::External {
            wait_until_live(stack, self.name);
        }
    }

    /// The settings that it runs with.
    pub(crate) fn stack(&self) -> Stack {
        self.shared.state.lock().stack.clone()
    }

    fn program(&self) -> Program {
        self.shared.state.lock().program
    }
}

fn launch(stack: &Stack, name: &str, program: Program) -> Service {
    match program {
        Program::Real => stack.start(name),
        Program::Mutant => {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args([mutants::ARGUMENT, name]);
            stack.launch(name, command)
        }
        Program::FdLimited(descriptors) => {
            let mut command = Command::new("prlimit");
            let service = stack.command(name);
            command.arg(format!("--nofile={descriptors}")).arg(service.get_program());
            stack.launch(name, command)
        }
        Program::External => {
            let mut command = Command::new("sleep");
            command.arg("infinity");
            stack.launch(name, command)
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Waits until `moment`, while a fault or a load lasts.
pub(crate) fn wait_until(moment: Instant) {
    while let Some(left) =
        moment.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    {
        thread::park_timeout(left);
    }
}
