//! More than can be done: requests come at a fixed rate, whatever becomes of those before
//! them, as they do from people.
//!
//! The generator is one thread on the same cores as the services: what it calls
//! saturation is less than they could do alone. The rates are relative to that, and so is
//! what is asked for.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSliceMut, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant, SystemTime};

use mio::net::TcpStream;
use mio::{Events, Poll, PollOpt, Ready, Token};
use nix::cmsg_space;
use nix::sys::socket::sockopt::ReceiveTimestampns;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt};
use nix::sys::time::TimeSpec;
use socket2::{Domain, Socket, Type};

use crate::clients::{find, order, percentile, read_head};
use crate::platform::Program;
use crate::{Case, Finds, Outcome, Run};
use harness::agent;

pub(crate) const CASES: &[Case] = &[Case {
    name: "overload",
    control: "the limit on connections: a service that lets everybody queue",
    finds: Finds::Fault("goodput"),
    short: true,
    run: overload,
}];

/// A client that has no answer by then has left; what comes later is of no use.
const PATIENCE: Duration = Duration::from_millis(500);

/// A client that finds no connection free by then has not come at all. There are fewer of
/// them than five times saturation wants: in a queue here all would grow old before they
/// are sent, and what is measured would be this queue.
const QUEUE: Duration = Duration::from_millis(20);

/// The rates, in parts of the saturation.
const RATES: [f64; 4] = [0.5, 1.0, 2.0, 5.0];

/// What a refusal may take, in the long form.
const REFUSAL: Duration = Duration::from_millis(50);

/// Connections of the measurement of the saturation, and most of all others: half as many
/// again as there are places. With more of them their connects take so much of the same
/// processor that this is what is measured.
const CLOSED: usize = 48;
const OPEN: usize = 384;

fn overload(run: &mut Run<'_>) -> Outcome {
    let mut outcome = Outcome { load: "0.5 to 5 times saturation".into(), ..Outcome::default() };
    let address = run.platform.stack.address;
    let time = Duration::from_millis(run.either(1500, 10_000));
    let memory = run.platform.watch_memory();
    let movie = serde_json::json!({ "title": run.tag, "description": "x".repeat(500) });
    let url = run.platform.stack.url("/api/movies");
    let added = harness::post(&agent(), &url, &movie.to_string()).unwrap().1;
    let read = format!("GET /api/movies/{} HTTP/1.1\r\nHost: load\r\n\r\n", added["id"]);
    let order = order(&run.tag, true);
    let gateway = SocketAddr::from((address, 3000));
    let floods = match run.control {
        true => {
            run.platform.inventory.replace(Program::Careless);
            vec![("careless", SocketAddr::from((address, 8080)), read.as_bytes())]
        }
        false => vec![("reads", gateway, read.as_bytes()), ("orders", gateway, &order)],
    };
    for (name, target, request) in floods {
        let mut generator = Generator::new(target, request);
        // The better of two, for the same reason as below.
        let saturation = generator.saturation(time).max(generator.saturation(time));
        let mut peak: f64 = 0.0;
        for rate in RATES {
            let (mut goodput, mut slow) = (0.0_f64, Duration::MAX);
            let poor = |goodput| rate > 2.0 && goodput < enough(run.long) * peak;
            let late = |slow| run.long && !run.control && slow > REFUSAL;
            // What somebody else does on this machine must not decide: the best of three.
            for _ in 0..3 {
                let seen = generator.open_loop(rate * saturation, time);
                let last = percentile(&seen.refused, 99);
                println!(
                    "  {name} at {rate} of {saturation:.0}/s: {:.0}/s sent, goodput {:.0}/s p99 \
                     {:.1?}, {} refused p50 {:.1?} p99 {last:.1?} ({} over {REFUSAL:?}), {} late, {} \
                     broken, {} never sent",
                    seen.sent() as f64 / time.as_secs_f64(),
                    seen.goodput(time),
                    percentile(&seen.good, 99),
                    seen.refused.len(),
                    percentile(&seen.refused, 50),
                    seen.refused.iter().filter(|time| **time > REFUSAL).count(),
                    seen.late,
                    seen.broken,
                    seen.unsent,
                );
                outcome.faults += seen.refused.len();
                if seen.other > 0 {
                    outcome.wrong.push(format!("{name} at {rate}: {} other answers", seen.other));
                }
                if !run.control && rate > 1.5 && !seen.excess_is_refused(run.long) {
                    outcome.wrong.push(format!("{name} at {rate}: the excess gets no 503"));
                }
                (goodput, slow) = (goodput.max(seen.goodput(time)), slow.min(last));
                if !poor(goodput) && !late(slow) {
                    break;
                }
            }
            if poor(goodput) {
                let told = format!("{name} at {rate}: goodput {goodput:.0}/s, peak {peak:.0}/s");
                outcome.wrong.push(told);
            }
            if late(slow) {
                outcome.wrong.push(format!("{name} at {rate}: refusals take {slow:?}"));
            }
            peak = peak.max(goodput);
        }
        if !run.control {
            normal_again(&mut generator, saturation, name, &mut outcome);
        }
        match name {
            "orders" => {
                let (good, sent) = (generator.good, generator.sent);
                outcome.settle_equal(run.platform, &run.tag, good, sent);
            }
            _ => outcome.answered += generator.good,
        }
    }
    outcome.peak_memory = memory.peak();
    if !run.control {
        outcome.nobody_has_ended(run.platform);
    }
    let mut admin = run.platform.connect("INVENTORY_DB_NAME");
    let _ = admin.execute("delete from movies where title = $1", &[&run.tag]);
    outcome
}

/// What part of the peak must be left at five times saturation.
fn enough(long: bool) -> f64 {
    if long { 0.8 } else { 0.4 }
}

/// Within five seconds a moderate load is served as if nothing had been.
fn normal_again(generator: &mut Generator<'_>, saturation: f64, name: &str, outcome: &mut Outcome) {
    let over = Instant::now();
    let mut last = String::new();
    while over.elapsed() < Duration::from_secs(5) {
        let time = Duration::from_millis(500);
        let seen = generator.open_loop(saturation * 0.25, time);
        if seen.is_all_well() {
            println!("  {name}: normal again after {:.1?}", over.elapsed());
            return;
        }
        last = format!("{} of {} good", seen.good.len(), seen.due());
    }
    outcome.wrong.push(format!("{name} is not normal 5 s after: {last}"));
}

/// Sends the same request again and again.
pub(crate) struct Generator<'r> {
    target: SocketAddr,
    request: &'r [u8],
    /// Most connections of an open loop.
    pub(crate) connections: usize,
    /// In all measurements: how many were good, and how many were sent.
    pub(crate) good: usize,
    pub(crate) sent: usize,
}

/// What came of the requests of one measurement.
#[derive(Default)]
pub(crate) struct Seen {
    /// 2xx within the patience, each with its time since it was due.
    pub(crate) good: Vec<Duration>,
    /// 503, each with its time from when it was sent until the kernel had the answer: what
    /// either waited for this thread is none of the service's.
    refused: Vec<Duration>,
    /// Any other answer.
    other: usize,
    /// 2xx too late, and what had no answer when the measurement ended.
    late: usize,
    /// Connections that ended without an answer.
    broken: usize,
    /// The client left before there was a connection for it.
    unsent: usize,
}

impl Seen {
    fn goodput(&self, time: Duration) -> f64 {
        self.good.len() as f64 / time.as_secs_f64()
    }

    fn sent(&self) -> usize {
        self.good.len() + self.refused.len() + self.other + self.late + self.broken
    }

    pub(crate) fn due(&self) -> usize {
        self.sent() + self.unsent
    }

    /// Whether 99 of 100 were served in time.
    pub(crate) fn is_all_well(&self) -> bool {
        self.due() > 0 && self.good.len() * 100 >= self.due() * 99
    }

    /// Whether some were told 503, and 99 of 100 that were sent anything, in the long form
    /// in time.
    fn excess_is_refused(&self, in_time: bool) -> bool {
        let untold = self.broken + if in_time { self.late } else { 0 };
        !self.refused.is_empty() && untold * 100 <= self.sent()
    }
}

struct Connection {
    stream: TcpStream,
    /// When the request that is on its way was due.
    due: Option<Instant>,
    /// When it was sent, or its connection begun.
    sent: SystemTime,
    connected: bool,
    received: Vec<u8>,
}

impl<'r> Generator<'r> {
    pub(crate) fn new(target: SocketAddr, request: &'r [u8]) -> Generator<'r> {
        Generator { target, request, connections: OPEN, good: 0, sent: 0 }
    }

    /// Requests a second that are answered when each client sends the next as soon as it
    /// has the answer.
    pub(crate) fn saturation(&mut self, time: Duration) -> f64 {
        self.generate(None, time, CLOSED).goodput(time)
    }

    /// The highest rate (a second) at which 99 of 100 requests that come of themselves are
    /// served: less than what clients reach that wait for each other.
    pub(crate) fn sustained(&mut self, time: Duration) -> f64 {
        let mut rate = 0.2 * self.saturation(time);
        // A second time, so that one bad moment does not decide.
        while (0..2).any(|_| self.open_loop(1.1 * rate, time).is_all_well()) {
            rate *= 1.1;
        }
        rate
    }

    /// Requests that are due at this rate (a second), whatever becomes of them.
    pub(crate) fn open_loop(&mut self, rate: f64, time: Duration) -> Seen {
        self.generate(Some(rate), time, self.connections)
    }

    fn generate(&mut self, rate: Option<f64>, time: Duration, most: usize) -> Seen {
        let poll = Poll::new().unwrap();
        let mut events = Events::with_capacity(1024);
        let mut connections: Vec<Option<Connection>> = (0..most).map(|_| None).collect();
        let mut idle: Vec<usize> = Vec::new();
        let mut vacant: Vec<usize> = (0..most).collect();
        let mut due: VecDeque<Instant> = VecDeque::new();
        let (mut seen, mut scheduled) = (Seen::default(), 0_u32);
        let begun = Instant::now();
        let step = rate.map(|rate| Duration::from_secs_f64(1.0 / rate.max(1.0)));
        loop {
            let now = Instant::now();
            let elapsed = now - begun;
            if elapsed > time + PATIENCE || (elapsed > time && vacant.len() + idle.len() == most) {
                break;
            }
            if elapsed < time {
                match step {
                    Some(step) => {
                        while step * scheduled <= elapsed {
                            due.push_back(begun + step * scheduled);
                            scheduled += 1;
                        }
                    }
                    None => due.resize(idle.len() + vacant.len(), now),
                }
            } else if step.is_none() {
                due.clear();
            }
            while due.front().is_some_and(|due| now - *due > QUEUE) {
                due.pop_front();
                seen.unsent += 1;
            }
            while let Some(moment) = due.front().copied() {
                let Some(place) = idle.pop().or_else(|| vacant.pop()) else { break };
                due.pop_front();
                if self.send(&poll, &mut connections, place, moment).is_err() {
                    connections[place] = None;
                    vacant.push(place);
                    seen.broken += 1;
                }
            }
            poll.poll(&mut events, Some(Duration::from_millis(1))).unwrap();
            for event in &events {
                let place = usize::from(event.token());
                let Some(connection) = &mut connections[place] else { continue };
                let was_idle = connection.due.is_none();
                match connection.go_on(self.request, event.readiness(), &mut seen) {
                    Ok(true) => idle.push(place),
                    Ok(false) => (),
                    Err(_) => {
                        if connection.due.is_some() {
                            seen.broken += 1;
                        }
                        if was_idle {
                            idle.retain(|other| *other != place);
                        }
                        connections[place] = None;
                        vacant.push(place);
                    }
                }
            }
        }
        seen.late += connections.iter().flatten().filter(|one| one.due.is_some()).count();
        seen.unsent += due.len();
        self.good += seen.good.len();
        self.sent += seen.sent();
        seen
    }

    /// Sends on the connection that is there, or on a new one.
    fn send(
        &self,
        poll: &Poll,
        connections: &mut [Option<Connection>],
        place: usize,
        due: Instant,
    ) -> io::Result<()> {
        if let Some(connection) = &mut connections[place] {
            connection.due = Some(due);
            connection.sent = SystemTime::now();
            return connection.stream.write_all(self.request);
        }
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let source = Ipv4Addr::new(127, 0, 2, 1 + (place % 200) as u8);
        socket.bind(&SocketAddr::from((source, 0)).into())?;
        setsockopt(&socket, ReceiveTimestampns, &true)?;
        let sent = SystemTime::now();
        let mut stream = TcpStream::connect_stream(socket.into(), &self.target)?;
        // On loopback there mostly is a connection by now, and the first event may be far.
        let connected = match stream.write(self.request) {
            Ok(written) if written == self.request.len() => true,
            Ok(_) => return Err(ErrorKind::WriteZero.into()),
            Err(err) if err.kind() == ErrorKind::WouldBlock => false,
            Err(err) => return Err(err),
        };
        poll.register(
            &stream,
            Token(place),
            Ready::readable() | Ready::writable(),
            PollOpt::edge(),
        )?;
        connections[place] =
            Some(Connection { stream, due: Some(due), sent, connected, received: Vec::new() });
        Ok(())
    }
}

impl Connection {
    /// Whether an answer is complete and the connection free; an error when it has ended.
    fn go_on(&mut self, request: &[u8], ready: Ready, seen: &mut Seen) -> io::Result<bool> {
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
                    200..300 if time <= PATIENCE => seen.good.push(time),
                    200..300 => seen.late += 1,
                    // Zero where a connection was ended just before its next request.
                    503 => seen.refused.push(arrived.duration_since(self.sent).unwrap_or_default()),
                    _ => seen.other += 1,
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

/// What has come, and when the last of it did.
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
