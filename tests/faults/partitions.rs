//! Network partitions: each machine of `provision/services` is a network namespace, all on one
//! switch, which drops the packets of one link or disconnects a whole machine. There is no RST and
//! no ICMP, as when a cable is unplugged or a firewall loses its table.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{self, Command};
use std::time::{Duration, Instant};

use chassis::testing::process::signal;
use chassis::testing::test_var;
use harness::load::{Load, Workload};
use harness::proxy::{Mode, TcpProxy};
use harness::services::{service, services};

use crate::network::{LINKS, Link, Traffic};
use crate::platform::{Platform, Program, wait_until};
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[Case {
    name: "partitions",
    control: "the confirm: a gateway that answers 200 as soon as it has sent",
    expects: ExpectedFinding::LostOrDuplicated,
    short: false,
    run: partitions,
}];

/// The last byte of the address of this machine; the machines have the next from 10 on.
const HERE: u8 = 1;
const FIRST_MACHINE: u8 = 10;

/// The machines of the table, each with the last byte of its address.
fn machines() -> Vec<(&'static str, u8)> {
    let mut names: Vec<&str> = Vec::new();
    for row in services() {
        if !names.contains(&row.machine.as_str()) {
            names.push(&row.machine);
        }
    }
    names.into_iter().zip(FIRST_MACHINE..).collect()
}

/// The servers, by the variables `_HOST` and `_PORT` that say where they are.
fn servers() -> Vec<String> {
    let with_database = services().iter().filter(|row| row.database.is_some());
    let databases = with_database.map(|row| format!("{}_DB", row.prefix()));
    databases.chain(["RABBITMQ".to_owned()]).collect()
}

/// Cuts every link, and then whole machines, for longer than any timeout of a connection.
fn partitions(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new("8 clients");
    // Otherwise it would book the orders that the billing of the lab cannot book.
    run.platform.billing().replace(Program::External);
    let lab = NetnsLab::start(run.platform);
    let (platform, network) = (&lab.platform, &lab.network);
    if run.control {
        let broker = &lab.servers["RABBITMQ"];
        platform.gateway().replace(Program::Mutant);
        let orders = platform.start_load(Workload::Orders, &run.tag, 2);
        orders.wait_for_progress_after("the start");
        network.cut(&lab.ends(&LINKS[1]));
        orders.wait_for_progress_after("the link drops all packets");
        // Otherwise the gateway's kernel would retransmit everything in the end.
        broker.set(Mode::Reset);
        network.restore_links();
        wait_until(Instant::now() + Duration::from_secs(1));
        broker.set(Mode::Pass);
        platform.reconcile(orders, &mut outcome);
        return outcome;
    }
    let memory = platform.sample_memory();
    let traffic = Traffic::start(platform, &run.tag, 4, Workload::Movies);
    traffic.wait_for_recovery_after("the start");
    let mut hold = |fault: &str, unaffected: &[&Load], undo: &dyn Fn()| {
        let time = Duration::from_secs(run.short_or_long(5, 15));
        let _ = (traffic.orders.take_pause(), traffic.movies.take_pause());
        let processes: Vec<_> =
            platform.services().map(|(name, service)| (name, service.pid())).collect();
        wait_until(Instant::now() + time);
        for load in unaffected {
            load.wait_for_progress_after(&format!("the begin of {fault}, which is not on its way"));
        }
        undo();
        let recovery = traffic.wait_for_recovery_after(fault);
        // A service that waits for its database in vain exits and is started again.
        let exited = processes.iter().filter(|(name, pid)| platform.pid(name) != *pid);
        let exited: Vec<&str> = exited.map(|(name, _)| *name).collect();
        println!(
            "  {fault} for {} s: orders paused {:.1} s, movies {:.1} s; \
             recovered after {:.1} s; exited: {exited:?}",
            time.as_secs(),
            traffic.orders.take_pause().as_secs_f64(),
            traffic.movies.take_pause().as_secs_f64(),
            recovery.as_secs_f64(),
        );
        outcome.faults += 1;
    };
    for link in &LINKS {
        network.cut(&lab.ends(link));
        let fault = format!("a cut between {} and {}", link.service, link.other);
        let unaffected = match (link.service, link.other) {
            ("gateway", "RABBITMQ") => vec![&traffic.movies],
            ("gateway" | "inventory", _) => vec![&traffic.orders],
            _ => vec![&traffic.orders, &traffic.movies],
        };
        hold(&fault, &unaffected, &|| network.restore_links());
    }
    for (machine, _) in machines() {
        network.set_cable(machine, "down");
        let has = |name: &str| service(name).machine == machine;
        let orders = (!has("gateway")).then_some(&traffic.orders);
        let movies = (!has("gateway") && !has("inventory")).then_some(&traffic.movies);
        let unaffected: Vec<&Load> = orders.into_iter().chain(movies).collect();
        hold(&format!("a cut of {machine}"), &unaffected, &|| network.set_cable(machine, "up"));
    }
    traffic.reconcile(&mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

/// A platform on machines of its own; its fields are dropped in this order.
struct NetnsLab {
    platform: Platform,
    servers: BTreeMap<String, TcpProxy>,
    network: Network,
}

impl NetnsLab {
    /// Starts it on the servers of `platform`. These listen on 127.0.0.1 only, so each has a proxy
    /// on the network.
    fn start(platform: &Platform) -> NetnsLab {
        let network = Network::start();
        let servers: BTreeMap<_, _> = servers()
            .into_iter()
            .map(|name| {
                let [host, port] = ["HOST", "PORT"].map(|part| test_var(&format!("{name}_{part}")));
                let target = SocketAddr::new(host.parse().unwrap(), port.parse().unwrap());
                (name, TcpProxy::start_on(network.address(HERE), target))
            })
            .collect();
        let mut stack = platform.stack.clone();
        for (name, server) in &servers {
            stack.set(&format!("{name}_HOST"), server.address.ip());
            stack.set(&format!("{name}_PORT"), server.address.port());
        }
        for row in services() {
            let machines = machines();
            let machine = machines.iter().find(|(name, _)| *name == row.machine);
            let address = network.address(machine.map_or(FIRST_MACHINE, |(_, byte)| *byte));
            let metrics = format!("{address}:{}", row.port("METRICS_LISTEN"));
            stack.set(&format!("{}_METRICS_LISTEN", row.prefix()), metrics);
            stack.set(&format!("{}_HOST", row.prefix()), address);
            stack.namespaces.insert(row.name.clone(), network.namespace(&row.machine));
        }
        NetnsLab { platform: Platform::start_with(stack), servers, network }
    }

    /// The addresses of both sides of a link: the first connects, the second listens.
    fn ends(&self, link: &Link) -> (Ipv4Addr, SocketAddr) {
        let setting = |name: &str| &self.platform.stack.env[&format!("{}_{name}", link.other)];
        let listens = format!("{}:{}", setting("HOST"), setting("PORT")).parse().unwrap();
        let host = &self.platform.stack.env[&format!("{}_HOST", link.service.to_uppercase())];
        (host.parse().unwrap(), listens)
    }
}

/// The machines and this one on a switch. The switch has a namespace of its own, so that no
/// firewall of this machine affects it.
struct Network {
    owner: u32,
    /// The first three bytes of all addresses.
    prefix: [u8; 3],
}

impl Network {
    fn start() -> Network {
        remove_stale();
        let network = Network { owner: process::id(), prefix: free_prefix() };
        let switch = network.namespace("switch");
        ip(&format!("netns add {switch}")).unwrap_or_else(|err| {
            panic!("this case needs root, network namespaces and ip (iproute2): {err}")
        });
        must(ip(&format!("-netns {switch} link add switch type bridge")));
        must(ip(&format!("-netns {switch} link set switch up")));
        for (name, byte) in machines() {
            let machine = network.namespace(name);
            must(ip(&format!("netns add {machine}")));
            must(ip(&format!(
                "link add name eth0 netns {machine} type veth peer name {name} netns {switch}"
            )));
            must(ip(&format!("-netns {machine} link set lo up")));
            network.join(&format!("-netns {machine}"), "eth0", name, byte);
        }
        let here = device(network.owner);
        must(ip(&format!("link add name {here} type veth peer name here netns {switch}")));
        network.join("", &here, "here", HERE);
        network
            .nft(
                "add table bridge faults;
                 add chain bridge faults forward { type filter hook forward priority 0; }",
            )
            .unwrap_or_else(|err| panic!("this case needs nft (nftables): {err}"));
        network
    }

    /// Gives a machine's `device` its address, and joins its other end to the switch.
    fn join(&self, machine: &str, device: &str, port: &str, byte: u8) {
        let address = self.address(byte);
        must(ip(&format!("{machine} address add {address}/24 dev {device}")));
        must(ip(&format!("{machine} link set {device} up")));
        let switch = self.namespace("switch");
        must(ip(&format!("-netns {switch} link set {port} master switch up")));
    }

    fn address(&self, byte: u8) -> Ipv4Addr {
        let [a, b, c] = self.prefix;
        Ipv4Addr::new(a, b, c, byte)
    }

    fn namespace(&self, name: &str) -> String {
        namespace(self.owner, name)
    }

    /// Drops all packets between the two sides of a link from now on.
    fn cut(&self, (client, listens): &(Ipv4Addr, SocketAddr)) {
        let (other, port) = (listens.ip(), listens.port());
        let rule = "add rule bridge faults forward";
        must(self.nft(&format!(
            "{rule} ip saddr {client} ip daddr {other} tcp dport {port} counter drop;
             {rule} ip saddr {other} ip daddr {client} tcp sport {port} counter drop"
        )));
    }

    /// Ends what [`Network::cut`] began.
    fn restore_links(&self) {
        let rules = must(self.nft("list chain bridge faults forward"));
        must(self.nft("flush chain bridge faults forward"));
        let unused = rules.matches("packets 0 ").count();
        assert!(unused < 2, "nothing was dropped: {rules}");
    }

    /// Makes the switch's port to a machine `down` or `up`.
    fn set_cable(&self, machine: &str, state: &str) {
        must(ip(&format!("-netns {} link set {machine} {state}", self.namespace("switch"))));
    }

    fn nft(&self, commands: &str) -> Result<String, String> {
        let switch = self.namespace("switch");
        output_of(Command::new("ip").args(["netns", "exec", &switch, "nft", commands]))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(self.owner);
    }
}

/// The first three bytes of a network to which this machine has no route.
fn free_prefix() -> [u8; 3] {
    let first = process::id() as u16;
    let prefixes = (0..=u16::MAX).map(|step| first.wrapping_add(step).to_be_bytes());
    let mut prefixes = prefixes.map(|[b, c]| [10, b, c]);
    let is_free = |[a, b, c]: &[u8; 3]| {
        let routes = |relation: &str| {
            must(ip(&format!("-4 route show table all {relation} {a}.{b}.{c}.0/24")))
        };
        // A wider network would contain it; the default route contains everything.
        routes("root").is_empty() && routes("match").lines().all(|line| line.starts_with("default"))
    };
    prefixes.find(is_free).expect("a network is free in 10.0.0.0/8")
}

/// Removes the namespaces of campaigns that were killed before they could clean up.
fn remove_stale() {
    let list = ip("netns list").unwrap_or_default();
    for line in list.lines() {
        let name = line.strip_prefix("matinee-").and_then(|name| name.split_once('-'));
        let Some(owner) = name.and_then(|(owner, _)| owner.parse().ok()) else { continue };
        let command = std::fs::read_to_string(format!("/proc/{owner}/cmdline"));
        if !command.is_ok_and(|command| command.contains("faults")) {
            remove(owner);
        }
    }
}

/// Removes the machines and the switch of the campaign with this process id, and kills the
/// processes on them.
fn remove(owner: u32) {
    let _ = ip(&format!("link delete {}", device(owner)));
    for name in machines().into_iter().map(|(name, _)| name).chain(["switch"]) {
        let namespace = namespace(owner, name);
        let pids = ip(&format!("netns pids {namespace}")).unwrap_or_default();
        for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
            let _ = signal(pid, "KILL");
        }
        let _ = ip(&format!("netns delete {namespace}"));
    }
}

fn namespace(owner: u32, name: &str) -> String {
    format!("matinee-{owner}-{name}")
}

/// This machine's device on the switch; a device's name has at most 15 bytes.
fn device(owner: u32) -> String {
    format!("matinee{owner}")
}

fn ip(arguments: &str) -> Result<String, String> {
    output_of(Command::new("ip").args(arguments.split_whitespace()))
}

/// The output of a command, or its errors when it failed.
fn output_of(command: &mut Command) -> Result<String, String> {
    let done = command.output().map_err(|err| err.to_string())?;
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if done.status.success() { Ok(text(&done.stdout)) } else { Err(text(&done.stderr)) }
}

fn must<T>(result: Result<T, String>) -> T {
    result.unwrap_or_else(|err| panic!("{err}"))
}
