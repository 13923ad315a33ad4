//! What happens between the machines: each service in a network namespace of its own, all on
//! one switch, which drops the packets of one link or goes dead on a whole machine. Nobody is
//! told: no RST, no ICMP, as when a cable is pulled or a firewall forgets.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{self, Command};
use std::time::{Duration, Instant};

use chassis::testing::test_var;

use crate::load::{Load, What};
use crate::network::{LINKS, Link, Traffic};
use crate::platform::{Platform, Program, wait_until};
use crate::{Case, Finds, Outcome, Run};
use harness::proxy::{Mode, Proxy};

pub(crate) const CASES: &[Case] = &[Case {
    name: "hosts-cut-off",
    control: "the confirm: a gateway that answers 200 as soon as it has sent",
    finds: Finds::Loss,
    short: false,
    run: cut_off,
}];

/// The last byte of each machine's address; the switch's other end has 1.
const MACHINES: [(&str, u8); 3] = [("gateway", 10), ("inventory", 11), ("billing", 12)];

/// The servers, by the variables `_HOST` and `_PORT` that say where they are.
const SERVERS: [&str; 3] = ["RABBITMQ", "INVENTORY_DB", "BILLING_DB"];

/// Every link, and then whole machines, longer than anybody waits for a sign of life.
fn cut_off(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome { load: "8 clients, 3 machines".into(), ..Outcome::default() };
    // It would book the orders that the one that is cut off cannot book.
    run.platform.billing.replace(Program::Absent);
    let site = Site::start(run.platform);
    let (platform, network) = (&site.platform, &site.network);
    if run.control {
        let broker = &site.servers["RABBITMQ"];
        platform.gateway.replace(Program::Careless);
        let orders = Load::start(platform, What::Orders, &run.tag, 2);
        orders.flows_again_after("the start");
        network.cut(&site.ends(&LINKS[1]));
        orders.flows_again_after("what is dropped was acknowledged");
        // The gateway's kernel would go on trying and, in the end, bring it all.
        broker.set(Mode::Reset);
        network.heal();
        wait_until(Instant::now() + Duration::from_secs(1));
        broker.set(Mode::Pass);
        orders.settle(platform, &mut outcome);
        return outcome;
    }
    let memory = platform.watch_memory();
    let traffic = Traffic::start(platform, &run.tag, 4, What::Movies);
    traffic.recovers_after("the start");
    let mut hold = |fault: &str, unhurt: &[&Load], heal: &dyn Fn()| {
        let time = Duration::from_secs(run.either(5, 15));
        let _ = (traffic.orders.pause(), traffic.movies.pause());
        let processes = platform.services().map(|(name, service)| (name, service.pid()));
        wait_until(Instant::now() + time);
        for load in unhurt {
            load.flows_again_after(&format!("{fault}, with which it has nothing to do"));
        }
        heal();
        let well = traffic.recovers_after(fault);
        // One that waits for its database in vain ends and begins anew.
        let ended = processes.iter().filter(|(name, pid)| platform.pid(name) != *pid);
        let ended: Vec<&str> = ended.map(|(name, _)| *name).collect();
        println!(
            "  {fault} for {} s: orders paused {:.1} s, movies {:.1} s; \
             well {:.1} s after it; ended: {ended:?}",
            time.as_secs(),
            traffic.orders.pause().as_secs_f64(),
            traffic.movies.pause().as_secs_f64(),
            well.as_secs_f64(),
        );
        outcome.faults += 1;
    };
    let unhurt_by = |service: &str, other: &str| match (service, other) {
        ("gateway", "RABBITMQ") => vec![&traffic.movies],
        ("gateway", "") => vec![],
        ("gateway" | "inventory", _) => vec![&traffic.orders],
        _ => vec![&traffic.orders, &traffic.movies],
    };
    for link in &LINKS {
        network.cut(&site.ends(link));
        let fault = format!("{} cut off from {}", link.service, link.other);
        hold(&fault, &unhurt_by(link.service, link.other), &|| network.heal());
    }
    for (machine, _) in MACHINES {
        network.set_cable(machine, "down");
        let fault = format!("{machine}'s machine cut off");
        hold(&fault, &unhurt_by(machine, ""), &|| network.set_cable(machine, "up"));
    }
    traffic.settle(&mut outcome);
    outcome.peak_memory = memory.peak();
    outcome
}

/// A platform on three machines; dropped in this order.
struct Site {
    platform: Platform,
    servers: BTreeMap<&'static str, Proxy>,
    network: Network,
}

impl Site {
    /// Starts it on the servers of `platform`. They listen on 127.0.0.1 only, and so each has
    /// a proxy on the network.
    fn start(platform: &Platform) -> Site {
        let network = Network::start();
        let servers: BTreeMap<_, _> = SERVERS
            .into_iter()
            .map(|name| {
                let [host, port] = ["HOST", "PORT"].map(|part| test_var(&format!("{name}_{part}")));
                let target = SocketAddr::new(host.parse().unwrap(), port.parse().unwrap());
                (name, Proxy::start_on(network.address(1), target))
            })
            .collect();
        let mut stack = platform.stack.clone();
        for (name, server) in &servers {
            stack.set(&format!("{name}_HOST"), server.address.ip());
            stack.set(&format!("{name}_PORT"), server.address.port());
        }
        for (name, byte) in MACHINES {
            let upper = name.to_uppercase();
            let metrics = format!("{upper}_METRICS_LISTEN");
            let port = stack.env[&metrics].rsplit_once(':').unwrap().1.to_owned();
            stack.set(&metrics, format!("{}:{port}", network.address(byte)));
            stack.set(&format!("{upper}_HOST"), network.address(byte));
            stack.namespaces.insert(name.to_owned(), network.namespace(name));
        }
        Site { platform: Platform::start_with(stack), servers, network }
    }

    /// Where the two sides of a link are: the first asks, the second listens.
    fn ends(&self, link: &Link) -> (Ipv4Addr, SocketAddr) {
        let setting = |name: &str| &self.platform.stack.env[&format!("{}_{name}", link.other)];
        let listens = format!("{}:{}", setting("HOST"), setting("PORT")).parse().unwrap();
        let host = &self.platform.stack.env[&format!("{}_HOST", link.service.to_uppercase())];
        (host.parse().unwrap(), listens)
    }
}

/// Three machines and this one on a switch. The switch has a namespace of its own, so that no
/// firewall of this machine has a say in what passes.
struct Network {
    owner: u32,
    /// The first three bytes of its addresses.
    prefix: [u8; 3],
}

impl Network {
    fn start() -> Network {
        remove_dead();
        let network = Network { owner: process::id(), prefix: free_prefix() };
        let switch = network.namespace("switch");
        ip(&format!("netns add {switch}")).unwrap_or_else(|said| {
            panic!("this case needs root, network namespaces and ip (iproute2): {said}")
        });
        must(ip(&format!("-netns {switch} link add switch type bridge")));
        must(ip(&format!("-netns {switch} link set switch up")));
        for (name, byte) in MACHINES {
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
        network.join("", &here, "here", 1);
        network
            .nft(
                "add table bridge faults;
                 add chain bridge faults forward { type filter hook forward priority 0; }",
            )
            .unwrap_or_else(|said| panic!("this case needs nft (nftables): {said}"));
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

    /// From now on what one of a link's sides sends is dropped on the way to the other.
    fn cut(&self, (asks, listens): &(Ipv4Addr, SocketAddr)) {
        let (other, port) = (listens.ip(), listens.port());
        let rule = "add rule bridge faults forward";
        must(self.nft(&format!(
            "{rule} ip saddr {asks} ip daddr {other} tcp dport {port} counter drop;
             {rule} ip saddr {other} ip daddr {asks} tcp sport {port} counter drop"
        )));
    }

    /// Ends what [`Network::cut`] began.
    fn heal(&self) {
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
        said_by(Command::new("ip").args(["netns", "exec", &switch, "nft", commands]))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(self.owner);
    }
}

/// Three bytes of a network that nobody here has a route to.
fn free_prefix() -> [u8; 3] {
    let begin = process::id() as u16;
    let prefixes = (0..=u16::MAX).map(|step| begin.wrapping_add(step).to_be_bytes());
    let mut prefixes = prefixes.map(|[b, c]| [10, b, c]);
    let is_free = |[a, b, c]: &[u8; 3]| {
        let routes = |relation: &str| {
            must(ip(&format!("-4 route show table all {relation} {a}.{b}.{c}.0/24")))
        };
        // Wider ones lead there too; only the default route leads everywhere.
        routes("root").is_empty() && routes("match").lines().all(|line| line.starts_with("default"))
    };
    prefixes.find(is_free).expect("a network is free in 10.0.0.0/8")
}

/// Removes what campaigns left behind that were killed so hard that they could not clean up.
fn remove_dead() {
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

/// Removes the machines and the switch of the campaign with this process id, and what runs on them.
fn remove(owner: u32) {
    let _ = ip(&format!("link delete {}", device(owner)));
    for name in MACHINES.map(|(name, _)| name).into_iter().chain(["switch"]) {
        let namespace = namespace(owner, name);
        let pids = ip(&format!("netns pids {namespace}")).unwrap_or_default();
        if !pids.is_empty() {
            let _ = said_by(Command::new("kill").arg("-KILL").args(pids.lines()));
        }
        let _ = ip(&format!("netns delete {namespace}"));
    }
}

fn namespace(owner: u32, name: &str) -> String {
    format!("matinee-{owner}-{name}")
}

/// This machine's end; a device's name has at most 15 bytes.
fn device(owner: u32) -> String {
    format!("matinee{owner}")
}

fn ip(arguments: &str) -> Result<String, String> {
    said_by(Command::new("ip").args(arguments.split_whitespace()))
}

/// What a command printed, or what it said when it failed.
fn said_by(command: &mut Command) -> Result<String, String> {
    let done = command.output().map_err(|err| err.to_string())?;
    let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if done.status.success() { Ok(said(&done.stdout)) } else { Err(said(&done.stderr)) }
}

fn must<T>(result: Result<T, String>) -> T {
    result.unwrap_or_else(|said| panic!("{said}"))
}
