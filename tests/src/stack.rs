//! One set of services with variables of its own.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

use chassis::testing::http::{self, get};
use chassis::testing::process::Service;
use chassis::testing::{eventually, own_address};

use crate::binaries;
use crate::services::{service, services};

/// The variables of one set of services: what differs from `.env`.
#[derive(Clone)]
pub struct Stack {
    /// Where its services listen, each on the port that it has in `.env`.
    pub address: Ipv4Addr,
    /// Its variables.
    pub env: BTreeMap<String, String>,
    /// The network namespaces in which services run; a service without one runs in that of
    /// this process.
    pub namespaces: BTreeMap<String, String>,
}

impl Stack {
    /// All services of the table on one address of their own.
    pub fn new() -> Stack {
        let address = own_address();
        let mut stack = Stack { address, env: BTreeMap::new(), namespaces: BTreeMap::new() };
        for row in services() {
            let prefix = row.prefix();
            let metrics = format!("{address}:{}", row.port("METRICS_LISTEN"));
            stack.set(&format!("{prefix}_HOST"), address);
            stack.set(&format!("{prefix}_PORT"), row.port("PORT"));
            stack.set(&format!("{prefix}_METRICS_LISTEN"), metrics);
        }
        stack
    }

    /// The same variables on another address: those of [`Stack::new`] are the new one's own.
    pub fn on_another_address(&self) -> Stack {
        let mut other = Stack::new();
        for (name, value) in &self.env {
            other.env.entry(name.clone()).or_insert_with(|| value.clone());
        }
        other
    }

    /// Sets a variable.
    pub fn set(&mut self, name: &str, value: impl ToString) -> &mut Stack {
        self.env.insert(name.to_owned(), value.to_string());
        self
    }

    /// Starts a service's program.
    pub fn start(&self, service: &str) -> Service {
        self.launch(service, self.command(service))
    }

    /// Starts a service and waits until it answers on its port.
    pub fn start_and_wait(&self, service: &str) -> Service {
        let mut started = self.start(service);
        self.wait_until_live(service, &mut started);
        started
    }

    /// Waits until a started service answers on its port; panics with its log when it ends.
    pub fn wait_until_live(&self, service: &str, started: &mut Service) {
        let url = self.health_url(service);
        eventually(format!("{service} answers"), 30, || {
            assert!(started.exit_status().is_none(), "{service} has ended: {}", started.log());
            get(&url)
        });
    }

    /// Waits until a service says that all it needs is there.
    pub fn wait_until_ready(&self, service: &str, seconds: u64) {
        let url = format!("{}/ready", self.health_url(service));
        eventually(format!("{service} is ready"), seconds, || {
            get(&url).filter(|reply| reply.status == 200)
        });
    }

    /// A service's program with the variables of this stack.
    pub fn command(&self, service: &str) -> Command {
        let mut command = Command::new(binaries::program(service));
        command.envs(&self.env);
        command
    }

    /// Starts a program in a service's place, in its network namespace.
    pub fn launch(&self, service: &str, mut command: Command) -> Service {
        if let Some(namespace) = self.namespaces.get(service) {
            // ip executes the program in its own process: the process id is the service's.
            let mut inside = Command::new("ip");
            inside.args(["netns", "exec", namespace]);
            inside.arg(command.get_program()).args(command.get_args());
            command = inside;
        }
        Service::start(service, command.envs(&self.env))
    }

    /// A URL of the gateway.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.service_url("gateway"))
    }

    /// A service's `/health`.
    pub fn health_url(&self, service: &str) -> String {
        format!("{}/health", self.service_url(service))
    }

    /// A service's URL without a path.
    pub fn service_url(&self, service: &str) -> String {
        format!("http://{}", self.socket_address(service))
    }

    /// Where a service listens.
    pub fn socket_address(&self, name: &str) -> SocketAddr {
        let prefix = service(name).prefix();
        let [host, port] = ["HOST", "PORT"].map(|part| &self.env[&format!("{prefix}_{part}")]);
        SocketAddr::new(host.parse().unwrap(), port.parse().unwrap())
    }

    /// The address and port of a service's metrics.
    pub fn metrics_address(&self, name: &str) -> &str {
        &self.env[&format!("{}_METRICS_LISTEN", service(name).prefix())]
    }

    /// The sum of a service's metrics whose lines begin with `prefix`.
    pub fn metric(&self, service: &str, prefix: &str) -> f64 {
        http::metric(self.metrics_address(service), prefix)
    }
}

impl Default for Stack {
    fn default() -> Stack {
        Stack::new()
    }
}
