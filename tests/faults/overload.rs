//! Overload: requests come at a fixed rate whatever becomes of those before them, as from users
//! who do not know of each other (an open loop).
//!
//! The generator is one thread on the same cores as the services, so the saturation that it measures
//! is less than they could serve alone. The rates, and what must be served, are relative to it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSliceMut, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant, SystemTime};

use harness::{agent, bodies, post};
use mio::net::TcpStream;
use mio::{Events, Poll, PollOpt, Ready, Token};
use nix::cmsg_space;
use nix::sys::socket::sockopt::ReceiveTimestampns;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt};
use nix::sys::time::TimeSpec;
use socket2::{Domain, Socket, Type};

use crate::clients::{find, order_request, percentile, read_head};
use crate::platform::Program;
use crate::{Case, ExpectedFinding, Outcome, Run};

pub(crate) const CASES: &[Case] = &[Case {
    name: "overload",
    control: "the limit on connections: an inventory that queues every request",
    expects: ExpectedFinding::Text("goodput"),
    short: true,
    run: overload,
}];

/// A client without a response by then has left: a later one counts as late.
const CLIENT_TIMEOUT: Duration = Duration::from_millis(500);

/// A request that finds no free connection by then is not sent. Five times saturation needs more
/// connections than there are: in a longer queue all requests would become old before they are
/// sent, and the measurement would be that of this queue.
const MAX_QUEUE_TIME: Duration = Duration::from_millis(20);

/// The rates, as multiples of the saturation.
const RATES: [f64; 4] = [0.5, 1.0, 2.0, 5.0];

/// The longest 99th percentile of a 503, in the long form.
const MAX_REJECTION_TIME: Duration = Duration::from_millis(50);

/// Connections for the measurement of the saturation (a closed loop), and the most of an open loop:
/// half as many again as the limit on connections. With more of them the connects use so much of
/// the same processor that they would be what is measured.
const CLOSED_LOOP_CONNECTIONS: usize = 48;
const OPEN_LOOP_CONNECTIONS: usize = 384;

fn overload(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome::new("0.5 to 5 times saturation");
    let time = Duration::from_millis(run.short_or_long(1500, 10_000));
    let memory = run.platform.sample_memory();
    let stack = &run.platform.stack;
    let movie = bodies::movie(&run.tag, &"x".repeat(500));
    let added = post(&agent(), &stack.url("/api/movies"), &movie).unwrap().1;
    let read = format!("GET /api/movies/{} HTTP/1.1\r\nHost: load\r\n\r\n", added["id"]);
    let order = order_request(&run.tag, true);
    let [gateway, inventory] = ["gateway", "inventory"].map(|name| stack.socket_address(name));
    let floods = match run.control {
        true => {
            run.platform.inventory().replace(Program::Mutant);
            vec![("mutant", inventory, read.as_bytes())]
        }
        false => vec![("reads", gateway, read.as_bytes()), ("orders", gateway, &order)],
    };
    for (name, target, request) in floods {
        let mut generator = Generator::new(target, request);
        // The higher of two, because other programs may disturb one.
        let saturation = generator.saturation(time).max(generator.saturation(time));
        let mut peak: f64 = 0.0;
        for rate in RATES {
            let (mut goodput, mut slow) = (0.0_f64, Duration::MAX);
            let poor = |goodput| rate > 2.0 && goodput < min_share_of_peak(run.long) * peak;
            let late = |slow| run.long && !run.control && slow > MAX_REJECTION_TIME;
            // The best of three, because other programs may disturb one.
            for _ in 0..3 {
                let measured = generator.open_loop(rate * saturation, time);
                let last = percentile(&measured.rejected, 99);
                println!(
                    "  {name} at {rate} of {saturation:.0}/s: {:.0}/s sent, goodput {:.0}/s p99 \
                     {:.1?}, {} rejected p50 {:.1?} p99 {last:.1?} ({} over {MAX_REJECTION_TIME:?}), {} late, {} \
                     broken, {} never sent",
                    measured.sent() as f64 / time.as_secs_f64(),
                    measured.goodput(time),
                    percentile(&measured.good, 99),
                    measured.rejected.len(),
                    percentile(&measured.rejected, 50),
                    measured.rejected.iter().filter(|time| **time > MAX_REJECTION_TIME).count(),
                    measured.late,
                    measured.broken,
                    measured.unsent,
                );
                outcome.faults += measured.rejected.len();
                if measured.other > 0 {
                    outcome
                        .findings
                        .push(format!("{name} at {rate}: {} other responses", measured.other));
                }
                if !run.control && rate > 1.5 && !measured.rejects_excess(run.long) {
                    outcome.findings.push(format!("{name} at {rate}: the excess is not rejected"));
                }
                (goodput, slow) = (goodput.max(measured.goodput(time)), slow.min(last));
                if !poor(goodput) && !late(slow) {
                    break;
                }
            }
            if poor(goodput) {
                outcome
                    .findings
                    .push(format!("{name} at {rate}: goodput {goodput:.0}/s, peak {peak:.0}/s"));
            }
            if late(slow) {
                outcome.findings.push(format!("{name} at {rate}: rejections take {slow:?}"));
            }
            peak = peak.max(goodput);
        }
        if !run.control {
            check_recovery(&mut generator, saturation, name, &mut outcome);
        }
        match name {
            "orders" => {
                let (good, sent) = (generator.good, generator.sent);
                outcome.reconcile_count(run.platform, &run.tag, good, sent);
            }
            _ => outcome.answered += generator.good,
        }
    }
    outcome.peak_memory = memory.peak();
    if !run.control {
        outcome.assert_no_unexpected_exit(run.platform);
    }
    let mut admin = run.platform.connect("INVENTORY_DB_NAME");
    let _ = admin.execute("delete from movies where title = $1", &[&run.tag]);
    outcome
}

/// The share of the peak goodput that five times saturation must leave.
fn min_share_of_peak(long: bool) -> f64 {
    if long { 0.8 } else { 0.4 }
}

/// Within five seconds after the overload a moderate load must be served normally.
fn check_recovery(
    generator: &mut Generator<'_>,
    saturation: f64,
    name: &str,
    outcome: &mut Outcome,
) {
    let overload_end = Instant::now();
    let mut last = String::new();
    while overload_end.elapsed() < Duration::from_secs(5) {
        let time = Duration::from_millis(500);
        let measured = generator.open_loop(saturation * 0.25, time);
        if measured.is_normal() {
            println!("  {name}: normal again after {:.1?}", overload_end.elapsed());
            return;
        }
        last = format!("{} of {} good", measured.good.len(), measured.due());
    }
    outcome.findings.push(format!("{name} is not normal 5 s after the overload: {last}"));
}

/// Sends the same request again and again.
pub(crate) struct Generator<'r> {
    target: SocketAddr,
    request: &'r [u8],
    /// The most connections of an open loop.
    pub(crate) connections: usize,
    /// Good responses and requests sent, of all measurements.
    pub(crate) good: usize,
    pub(crate) sent: usize,
}

/// What became of the requests of one measurement.
#[derive(Default)]
pub(crate) struct Measurement {
    /// 2xx within [`CLIENT_TIMEOUT`], each with the time since it was due.
    pub(crate) good: Vec<Duration>,
    /// 503, each with the time from its sending until the kernel received the response: the time
    /// that either waited for this thread is not the service's.
    rejected: Vec<Duration>,
    /// Any other response.
    other: usize,
    /// 2xx too late, and requests without a response when the measurement ended.
    late: usize,
    /// Connections that ended without a response.
    broken: usize,
    /// Requests that found no free connection.
    unsent: usize,
}

impl Measurement {
    fn goodput(&self, time: Duration) -> f64 {
        self.good.len() as f64 / time.as_secs_f64()
    }

    fn sent(&self) -> usize {
        self.good.len() + self.rejected.len() + self.other + self.late + self.broken
    }

    pub(crate) fn due(&self) -> usize {
        self.sent() + self.unsent
    }

    /// Whether 99 % were answered in time.
    pub(crate) fn is_normal(&self) -> bool {
        self.due() > 0 && self.good.len() * 100 >= self.due() * 99
    }

    /// Whether some requests got a 503, and 99 % of all that were sent got any response; if `in_time`,
    /// no late one.
    fn rejects_excess(&self, in_time: bool) -> bool {
        let unanswered = self.broken + if in_time { self.late } else { 0 };
        !self.rejected.is_empty() && unanswered * 100 <= self.sent()
    }
}

struct Connection {
    stream: TcpStream,
    /// When the request in flight was due.
    due: Option<Instant>,
    /// When it was sent, or its connection was started.
    sent: SystemTime,
    connected: bool,
    received: Vec<u8>,
}

impl<'r> Generator<'r> {
    pub(crate) fn new(target: SocketAddr, request: &'r [u8]) -> Generator<'r> {
        Generator { target, request, connections: OPEN_LOOP_CONNECTIONS, good: 0, sent: 0 }
    }

    /// Requests a second that are answered when each client sends the next one as soon as it has the
    /// response.
    pub(crate) fn saturation(&mut self, time: Duration) -> f64 {
        self.generate(None, time, CLOSED_LOOP_CONNECTIONS).goodput(time)
    }

    /// The highest rate (a second) of an open loop at which 99 % of the requests are answered in time:
    /// less than the saturation of a closed loop.
    pub(crate) fn sustained(&mut self, time: Duration) -> f64 {
        let mut rate = 0.2 * self.saturation(time);
        // A second attempt, because other programs may disturb one.
        while (0..2).any(|_| self.open_loop(1.1 * rate, time).is_normal()) {
            rate *= 1.1;
        }
        rate
    }

    /// Sends requests at this rate (a second), whatever becomes of them.
    pub(crate) fn open_loop(&mut self, rate: f64, time: Duration) -> Measurement {
        self.generate(Some(rate), time, self.connections)
    }

    fn generate(&mut self, rate: Option<f64>, time: Duration, most: usize) -> Measurement {
        let poll = Poll::new().unwrap();
        let mut events = Events::with_capacity(1024);
        let mut connections: Vec<Option<Connection>> = (0..most).map(|_| None).collect();
        let mut idle: Vec<usize> = Vec::new();
        let mut vacant: Vec<usize> = (0..most).collect();
        let mut due: VecDeque<Instant> = VecDeque::new();
        let (mut measured, mut scheduled) = (Measurement::default(), 0_u32);
        let started_at = Instant::now();
        let step = rate.map(|rate| Duration::from_secs_f64(1.0 / rate.max(1.0)));
        loop {
            let now = Instant::now();
            let elapsed = now - started_at;
            if elapsed > time + CLIENT_TIMEOUT
                || (elapsed > time && vacant.len() + idle.len() == most)
            {
                break;
            }
            if elapsed < time {
                match step {
                    Some(step) => {
                        while step * scheduled <= elapsed {
                            due.push_back(started_at + step * scheduled);
                            scheduled += 1;
                        }
                    }
                    None => due.resize(idle.len() + vacant.len(), now),
                }
            } else if step.is_none() {
                due.clear();
            }
            while due.front().is_some_and(|due| now - *due > MAX_QUEUE_TIME) {
                due.pop_front();
                measured.unsent += 1;
            }
            while let Some(moment) = due.front().copied() {
                let Some(slot) = idle.pop().or_else(|| vacant.pop()) else { break };
                due.pop_front();
                if self.send(&poll, &mut connections, slot, moment).is_err() {
                    connections[slot] = None;
                    vacant.push(slot);
                    measured.broken += 1;
                }
            }
            poll.poll(&mut events, Some(Duration::from_millis(1))).unwrap();
            for event in &events {
                let slot = usize::from(event.token());
                let Some(connection) = &mut connections[slot] else { continue };
                let was_idle = connection.due.is_none();
                match connection.advance(self.request, event.readiness(), &mut measured) {
                    Ok(true) => idle.push(slot),
                    Ok(false) => (),
                    Err(_) => {
                        if connection.due.is_some() {
                            measured.broken += 1;
                        }
                        if was_idle {
                            idle.retain(|other| *other != slot);
                        }
                        connections[slot] = None;
                        vacant.push(slot);
                    }
                }
            }
        }
        measured.late += connections.iter().flatten().filter(|one| one.due.is_some()).count();
        measured.unsent += due.len();
        self.good += measured.good.len();
        self.sent += measured.sent();
        measured
    }

    /// Sends on the open connection of this slot, or on a new one.
    fn send(
        &self,
        poll: &Poll,
        connections: &mut [Option<Connection>],
        slot: usize,
        due: Instant,
    ) -> io::Result<()> {
        if let Some(connection) = &mut connections[slot] {
            connection.due = Some(due);
            connection.sent = SystemTime::now();
            return connection.stream.write_all(self.request);
        }
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let source = Ipv4Addr::new(127, 0, 2, 1 + (slot % 200) as u8);
        socket.bind(&SocketAddr::from((source, 0)).into())?;
        setsockopt(&socket, ReceiveTimestampns, &true)?;
        let sent = SystemTime::now();
        let mut stream = TcpStream::connect_stream(socket.into(), &self.target)?;
        // On loopback it is mostly connected by now, and its first event may come much later.
        let connected = match stream.write(self.request) {
            Ok(written) if written == self.request.len() => true,
            Ok(_) => return Err(ErrorKind::WriteZero.into()),
            Err(err) if err.kind() == ErrorKind::WouldBlock => false,
            Err(err) => return Err(err),
        };
        poll.register(
            &stream,
            Token(slot),
            Ready::readable() | Ready::writable(),
            PollOpt::edge(),
        )?;
        connections[slot] =
            Some(Connection { stream, due: Some(due), sent, connected, received: Vec::new() });
        Ok(())
    }
}

impl Connection {
    /// Whether a response is complete and the connection free; an error when it has ended.
    fn advance(
        &mut self,
        request: &[u8],
        ready: Ready,
        measured: &mut Measurement,
    ) -> io::Result<bool> {
        if !self.connected && ready.is_writable() {
            self.connected = true;
            self.stream.write_all(request)?;
        }
        let mut piece = [0; 16 << 10];
        let mut ended = false;
        let mut arrived = SystemTime::now();
        loop {
            match receive(&self.stream, &mut piece) {
                Ok((0, _)) => {
                    ended = true;
                    break;
                }
                Ok((read, stamp)) => {
                    self.received.extend_from_slice(&piece[..read]);
                    arrived = stamp.unwrap_or(arrived);
                }
                Err(err) if err.kind() == ErrorKind::WouldBlock => break,
                Err(err) => return Err(err),
            }
        }
        let mut free = false;
        if let Some(end) = find(&self.received, b"\r\n\r\n").map(|at| at + 4) {
            let (status, length) = read_head(&self.received[..end])?;
            let whole = end + length.unwrap_or_default();
            if let (Some(due), true) = (self.due, self.received.len() >= whole) {
                let time = due.elapsed();
                match status {
                    200..300 if time <= CLIENT_TIMEOUT => measured.good.push(time),
                    200..300 => measured.late += 1,
                    // Zero where the 503 came just before the next request was sent.
                    503 => measured
                        .rejected
                        .push(arrived.duration_since(self.sent).unwrap_or_default()),
                    _ => measured.other += 1,
                }
                ended |= find(&self.received[..end], b"onnection: close").is_some();
                self.received.clear();
                self.due = None;
                free = true;
            }
        }
        if ended { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(free) }
    }
}

/// Receives bytes; returns their number, and when the kernel received the last of them.
fn receive(stream: &TcpStream, piece: &mut [u8]) -> io::Result<(usize, Option<SystemTime>)> {
    let mut control = cmsg_space!(TimeSpec);
    let mut piece = [IoSliceMut::new(piece)];
    let message =
        recvmsg::<()>(stream.as_raw_fd(), &mut piece, Some(&mut control), MsgFlags::empty())?;
    let stamp = message.cmsgs()?.find_map(|one| match one {
        ControlMessageOwned::ScmTimestampns(time) => {
            Some(SystemTime::UNIX_EPOCH + Duration::from(time))
        }
        _ => None,
    });
    Ok((message.bytes, stamp))
}
