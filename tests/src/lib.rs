//! The real binaries, each test's on a loopback address of its own.

pub mod proxy;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::Duration;

use chassis::testing::eventually;
use serde_json::Value;
use ureq::Agent;

/// An address that no other test has: the whole of 127.0.0.0/8 is ours, so that
/// services of different tests never share a port.
pub fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = process::id();
    let (high, low) = ((process / 250 % 250) as u8, (process % 250) as u8);
    Ipv4Addr::new(127, 1 + low, 1 + high, NEXT.fetch_add(1, Ordering::SeqCst))
}

/// Where the services' programs are.
pub fn binaries() -> PathBuf {
    // A test's own program is in target/<profile>/deps, the services' are one level higher.
    let beside = || {
        let test = std::env::current_exe().unwrap_or_default();
        test.parent().and_then(Path::parent).map(Path::to_path_buf).unwrap_or_default()
    };
    std::env::var_os("MATINEE_BIN_DIR").map_or_else(beside, PathBuf::from)
}

/// The variables of one stack: what differs from `.env`.
#[derive(Clone)]
pub struct Stack {
    /// The loopback address on which its services listen.
    pub address: Ipv4Addr,
    /// Variables and their values.
    pub env: BTreeMap<String, String>,
    /// The network namespaces in which services run; those without one run in this process's own.
    pub namespaces: BTreeMap<String, String>,
}

impl Default for Stack {
    fn default() -> Stack {
        Stack::new()
    }
}

impl Stack {
    /// A stack on an address of its own, with the usual ports.
    pub fn new() -> Stack {
        let address = own_address();
        let mut stack = Stack { address, env: BTreeMap::new(), namespaces: BTreeMap::new() };
        for (service, port, metrics) in
            [("GATEWAY", 3000, 9301), ("INVENTORY", 8080, 9302), ("BILLING", 8081, 9303)]
        {
            stack.set(&format!("{service}_HOST"), address);
            stack.set(&format!("{service}_PORT"), port);
            stack.set(&format!("{service}_METRICS_LISTEN"), format!("{address}:{metrics}"));
        }
        stack
    }

    /// Sets a variable.
    pub fn set(&mut self, name: &str, value: impl ToString) -> &mut Stack {
        self.env.insert(name.to_owned(), value.to_string());
        self
    }

    /// The URL of a path at the gateway.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.service_url("gateway"))
    }

    /// Starts a service's binary.
    pub fn start(&self, service: &str) -> Service {
        self.launch(service, self.command(service))
    }

    /// A service's binary with the variables of this stack.
    pub fn command(&self, service: &str) -> Command {
        let path = binaries().join(service);
        assert!(path.exists(), "{} is missing: cargo build --workspace", path.display());
        let mut command = Command::new(path);
        command.envs(&self.env).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// Starts a program in a service's place; its log goes to a file that a failing test can show.
    pub fn launch(&self, service: &str, mut command: Command) -> Service {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let log = format!("matinee-{}-{service}-{number}.log", self.address);
        let log = std::env::temp_dir().join(log);
        if let Some(namespace) = self.namespaces.get(service) {
            // It becomes the program: the process is the service's own.
            let mut inside = Command::new("ip");
            inside.args(["netns", "exec", namespace]);
            inside.arg(command.get_program()).args(command.get_args());
            command = inside;
        }
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let child = command
            .envs(&self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        Service { child, log }
    }

    /// Starts a service and waits until it answers on its port.
    pub fn start_and_wait(&self, service: &str) -> Service {
        let mut started = self.start(service);
        let url = self.health_url(service);
        eventually(format!("{service} answers"), 20, || {
            assert!(started.child.try_wait().unwrap().is_none(), "{service}: {}", started.log());
            agent().get(&url).call().ok()
        });
        started
    }

    /// Where a service says that it lives.
    pub fn health_url(&self, service: &str) -> String {
        format!("{}/health", self.service_url(service))
    }

    /// Where a service listens.
    pub fn service_url(&self, service: &str) -> String {
        let port = match service {
            "gateway" => 3000,
            "inventory" => 8080,
            _ => 8081,
        };
        format!("http://{}:{port}", self.env[&format!("{}_HOST", service.to_uppercase())])
    }
}

/// A running process; killed when it is dropped.
pub struct Service {
    /// The process.
    pub child: Child,
    log: PathBuf,
}

impl Service {
    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// A signal by its name, such as `TERM` or `STOP`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success(), "kill -{name}");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}

/// A client that takes every status for an answer.
pub fn agent() -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(30)))
        .proxy(None)
        .build()
        .new_agent()
}

/// Status and JSON of an answer; an error when there was none.
pub fn post(agent: &Agent, url: &str, body: &str) -> Result<(u16, Value), ureq::Error> {
    let mut answer = agent.post(url).content_type("application/json").send(body)?;
    let text = answer.body_mut().read_to_string()?;
    Ok((answer.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text))))
}

/// All bytes that come back for `sent`, for what no client library would send.
pub fn raw(address: Ipv4Addr, sent: &str) -> String {
    let mut stream = TcpStream::connect((address, 3000)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(sent.as_bytes()).unwrap();
    let _ = stream.shutdown(Shutdown::Write);
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}
