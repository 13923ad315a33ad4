//! The servers and the three services, and what can be done to them.

use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::{eventually, management_api, test_var};
use postgres::{Client, NoTls};

use crate::careless;
use crate::load::RECOVERY;
use harness::{Service, Stack, agent};

/// How soon a service that has ended is started anew.
const RESTART: Duration = Duration::from_millis(20);

/// The whole platform, on the servers in `MATINEE_TEST_SERVERS_DIR`, which must be this campaign's own.
pub(crate) struct Platform {
    pub(crate) stack: Stack,
    pub(crate) inventory: Supervisor,
    pub(crate) billing: Supervisor,
    pub(crate) gateway: Supervisor,
}

/// What runs in a service's place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// The service itself.
    Real,
    /// One without its protection: see [`careless`].
    Careless,
    /// The service itself, with so few descriptors.
    Starved(u32),
    /// Nothing: somebody else runs it.
    Absent,
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
        let [inventory, billing, gateway] =
            ["inventory", "billing", "gateway"].map(|name| Supervisor::start(&stack, name));
        let platform = Platform { stack, inventory, billing, gateway };
        platform.wait_until_ready();
        platform
    }

    /// Makes everything as it was after the start: servers up, real services with the settings
    /// of `.env`, all ready.
    pub(crate) fn restore(&mut self) {
        self.servers("start", &[]);
        for supervisor in [&mut self.inventory, &mut self.billing, &mut self.gateway] {
            if supervisor.program() != Program::Real || supervisor.stack().env != self.stack.env {
                supervisor.restart(&self.stack, Program::Real);
            }
            supervisor.shared.lock().deaths = 0;
        }
        self.wait_until_ready();
        self.await_empty_queue();
    }

    /// Waits until the gateway says that all it needs is there, and billing too.
    pub(crate) fn wait_until_ready(&self) {
        for service in ["gateway", "billing"] {
            let url = format!("{}/ready", self.stack.health_url(service));
            eventually(format!("{service} is ready"), RECOVERY, || {
                agent().get(&url).call().ok().filter(|answer| answer.status() == 200)
            });
        }
    }

    /// The services by name.
    pub(crate) fn services(&self) -> [(&'static str, &Supervisor); 3] {
        [("inventory", &self.inventory), ("billing", &self.billing), ("gateway", &self.gateway)]
    }

    /// `provision/dev-servers` for the servers of this campaign.
    pub(crate) fn servers(&self, command: &str, arguments: &[&str]) -> String {
        let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../provision/dev-servers"))
            .arg(command)
            .arg(test_var("MATINEE_TEST_SERVERS_DIR"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "provision/dev-servers {command} {arguments:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The superuser's connection to a database, by the variable that names it.
    pub(crate) fn connect(&self, database: &str) -> Client {
        postgres::Config::new()
            .host("127.0.0.1")
            .port(test_var("POSTGRES_PORT").parse().unwrap())
            .user(&test_var("POSTGRES_SUPERUSER"))
            .password(test_var("POSTGRES_SUPERUSER_PASSWORD"))
            .dbname(&test_var(database))
            .connect(NoTls)
            .unwrap()
    }

    /// How often each order is booked whose user begins with `tag`.
    pub(crate) fn orders(&self, tag: &str) -> HashMap<String, usize> {
        self.count(
            "BILLING_DB_NAME",
            "select user_id from orders where starts_with(user_id, $1)",
            tag,
        )
    }

    /// How often each movie is there whose title begins with `tag`.
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

    /// Messages in a queue, those included that are delivered and not acknowledged.
    pub(crate) fn depth(&self, queue: &str) -> usize {
        let list = self.servers("rabbitmqctl", &["--quiet", "list_queues", "name", "messages"]);
        let found = list
            .lines()
            .find_map(|line| line.strip_prefix(queue)?.strip_prefix('\t')?.parse().ok());
        found.unwrap_or_else(|| panic!("no queue {queue} in {list}"))
    }

    /// Waits until everything in the queue is booked or rejected.
    pub(crate) fn await_empty_queue(&self) {
        let queue = test_var("RABBITMQ_QUEUE");
        eventually("the queue is empty", 120, || (self.depth(&queue) == 0).then_some(()));
    }

    /// Empties the queue of dead letters; how many there were.
    pub(crate) fn purge_dead_letters(&self) -> usize {
        let queue = format!("{}.dead", test_var("RABBITMQ_QUEUE"));
        let depth = self.depth(&queue);
        let vhost = test_var("RABBITMQ_VHOST").replace('/', "%2F");
        management_api("DELETE", &format!("queues/{vhost}/{queue}/contents"), None);
        depth
    }

    /// The sum of a service's metrics whose names begin so.
    pub(crate) fn metric(&self, service: &str, name: &str) -> f64 {
        let address = &self.stack.env[&format!("{}_METRICS_LISTEN", service.to_uppercase())];
        let mut answer = agent().get(format!("http://{address}/metrics")).call().unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        let lines = text.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    /// Samples the memory of the services until it is asked for the peak.
    pub(crate) fn watch_memory(&self) -> Watch {
        let services = self.services().map(|(_, supervisor)| Arc::clone(&supervisor.shared));
        Watch::new(move || {
            services.iter().map(|service| resident(service.lock().service.child.id())).sum()
        })
    }

    /// A service's process of this moment.
    pub(crate) fn pid(&self, service: &str) -> u32 {
        let mut services = self.services().into_iter();
        let found = services.find(|(name, _)| *name == service);
        found.map_or(0, |(_, supervisor)| supervisor.pid())
    }
}

/// Waits until a service that somebody else has started answers on its port.
fn wait_until_alive(stack: &Stack, service: &str) {
    let url = stack.health_url(service);
    eventually(format!("{service} answers"), RECOVERY, || agent().get(&url).call().ok());
}

/// What the ecosystem file tells glibc, so that memory is measured as users have it.
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

/// Resident memory of a process in bytes; 0 when it has ended, or when it is one that has
/// just begun and still has the driver's memory.
pub(crate) fn resident(pid: u32) -> u64 {
    let arguments = |pid: &str| std::fs::read(format!("/proc/{pid}/cmdline")).ok();
    if arguments(&pid.to_string()) == arguments("self") {
        return 0;
    }
    let line = status_line(pid, "VmRSS:").unwrap_or_default();
    line.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}

/// How many threads a process has; 0 when it has ended.
pub(crate) fn threads(pid: u32) -> usize {
    status_line(pid, "Threads:").and_then(|line| line.parse().ok()).unwrap_or(0)
}

/// How many descriptors a process has open; 0 when it has ended.
pub(crate) fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

fn status_line(pid: u32, name: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name)).map(|line| line.trim().to_owned())
}

/// Looks at a number again and again.
pub(crate) struct Watch {
    shared: Arc<(AtomicBool, AtomicU64)>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watch {
    /// Ten times a second, until it is dropped.
    pub(crate) fn new(look: impl Fn() -> u64 + Send + 'static) -> Watch {
        let shared = Arc::new((AtomicBool::new(false), AtomicU64::new(0)));
        let watched = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            while !watched.0.load(Ordering::SeqCst) {
                watched.1.fetch_max(look(), Ordering::SeqCst);
                thread::park_timeout(Duration::from_millis(100));
            }
        });
        Watch { shared, thread: Some(thread) }
    }

    /// The largest until now; of memory: bytes, of the three services together.
    pub(crate) fn peak(&self) -> u64 {
        self.shared.1.load(Ordering::SeqCst)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.0.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Starts a service anew whenever it ends, as PM2 does.
pub(crate) struct Supervisor {
    name: &'static str,
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Shared {
    ending: AtomicBool,
    state: Mutex<State>,
}

struct State {
    stack: Stack,
    program: Program,
    service: Service,
    /// Somebody has sent it a signal that ends it.
    killed: bool,
    /// How often it ended and nobody had.
    deaths: usize,
}

impl Supervisor {
    fn start(stack: &Stack, name: &'static str) -> Supervisor {
        let service = launch(stack, name, Program::Real);
        let (stack, program) = (stack.clone(), Program::Real);
        let state = State { stack, program, service, killed: false, deaths: 0 };
        let shared = Arc::new(Shared { ending: AtomicBool::new(false), state: Mutex::new(state) });
        let watched = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            while !watched.ending.load(Ordering::SeqCst) {
                let mut state = watched.lock();
                if state.service.child.try_wait().unwrap().is_some() {
                    if !std::mem::take(&mut state.killed) {
                        state.deaths += 1;
                    }
                    state.service = launch(&state.stack, name, state.program);
                }
                drop(state);
                thread::park_timeout(RESTART);
            }
        });
        Supervisor { name, shared, thread: Some(thread) }
    }

    /// SIGKILL; it is started anew.
    pub(crate) fn kill(&self) {
        self.signal("KILL");
    }

    /// A signal by its name, such as `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        let mut state = self.shared.lock();
        state.killed |= !["STOP", "CONT"].contains(&name);
        state.service.signal(name);
    }

    /// How often it has ended by itself since [`Platform::restore`].
    pub(crate) fn deaths(&self) -> usize {
        self.shared.lock().deaths
    }

    /// The process of this moment.
    pub(crate) fn pid(&self) -> u32 {
        self.shared.lock().service.child.id()
    }

    /// What it has written since its last start.
    pub(crate) fn log(&self) -> String {
        self.shared.lock().service.log()
    }

    /// Runs something else in its place, with the settings it has.
    pub(crate) fn replace(&self, program: Program) {
        let stack = self.stack();
        self.restart(&stack, program);
    }

    /// Starts it anew with other settings, and waits until it answers.
    pub(crate) fn restart(&self, stack: &Stack, program: Program) {
        let mut state = self.shared.lock();
        // The old one first: they would share the port.
        let _ = state.service.child.kill();
        let _ = state.service.child.wait();
        state.service = launch(stack, self.name, program);
        (state.stack, state.program, state.killed) = (stack.clone(), program, false);
        drop(state);
        if program != Program::Absent {
            wait_until_alive(stack, self.name);
        }
    }

    /// The settings it runs with.
    pub(crate) fn stack(&self) -> Stack {
        self.shared.lock().stack.clone()
    }

    fn program(&self) -> Program {
        self.shared.lock().program
    }
}

fn launch(stack: &Stack, name: &str, program: Program) -> Service {
    match program {
        Program::Real => stack.start(name),
        Program::Careless => {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args([careless::ARGUMENT, name]);
            stack.launch(name, command)
        }
        Program::Starved(descriptors) => {
            let mut command = Command::new("prlimit");
            let service = stack.command(name);
            command.arg(format!("--nofile={descriptors}")).arg(service.get_program());
            stack.launch(name, command)
        }
        Program::Absent => {
            let mut command = Command::new("sleep");
            command.arg("infinity");
            stack.launch(name, command)
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Waits until `moment`, for what must go on for a while.
pub(crate) fn wait_until(moment: Instant) {
    while let Some(left) =
        moment.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    {
        thread::park_timeout(left);
    }
}
