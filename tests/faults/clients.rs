//! Clients on plain sockets: thousands of slow ones on one thread, and well-behaved ones beside
//! them, whose responses are timed.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use harness::bodies;
use socket2::{Domain, Socket, Type};

/// The interval at which each slow client sends or receives.
const SLOW_INTERVAL: Duration = Duration::from_millis(100);

/// Slow clients whose connection has stopped connect again: at most so many of each kind an interval,
/// because they are to be slow and not a flood of connects.
const RECONNECTS_PER_INTERVAL: usize = 3;

/// The part of a stalled body that is sent; large, because the server must buffer it.
static BODY: [u8; 60_000] = [b' '; 60_000];

/// How often and for how long a well-behaved client repeats a request before it gives up.
const MAX_ATTEMPTS: usize = 20;
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);

/// The pause of a well-behaved client between two attempts and between two requests.
const PAUSE: Duration = Duration::from_millis(5);

/// How a client is slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slow {
    /// Sends its request's head byte by byte.
    Header,
    /// Sends the begin of its body and nothing more.
    Body,
    /// Has connected, or received a response, and sends nothing.
    Idle,
    /// Requests a large response and receives a little at a time.
    Reader,
}

impl Slow {
    pub(crate) const ALL: [Slow; 4] = [Slow::Header, Slow::Body, Slow::Idle, Slow::Reader];
}

/// Slow clients at work, until this is dropped.
pub(crate) struct SlowClients {
    stopping: Arc<AtomicBool>,
    /// How many connections could not be started.
    failed: Arc<AtomicUsize>,
    thread: Option<thread::JoinHandle<()>>,
}

struct SlowClient {
    kind: Slow,
    number: usize,
    stream: Option<TcpStream>,
    /// How often it has sent or received on its connection.
    step: usize,
}

impl SlowClients {
    /// Starts `each` clients of each kind; `large` is the path whose response is received slowly.
    pub(crate) fn start(
        target: SocketAddr,
        kinds: &[Slow],
        each: usize,
        large: &str,
    ) -> SlowClients {
        let stopping = Arc::new(AtomicBool::new(false));
        let clients = (0..each * kinds.len()).map(|number| SlowClient {
            kind: kinds[number % kinds.len()],
            number,
            stream: None,
            step: 0,
        });
        let mut clients: Vec<SlowClient> = clients.collect();
        let kinds = kinds.len();
        let failed = Arc::new(AtomicUsize::new(0));
        let (stopped, failures, large) =
            (Arc::clone(&stopping), Arc::clone(&failed), large.to_owned());
        let thread = thread::spawn(move || {
            let mut reconnects = clients.len();
            while !stopped.load(Ordering::SeqCst) {
                for client in &mut clients {
                    if client.act(target, &large, &mut reconnects).is_err() {
                        failures.fetch_add(1, Ordering::SeqCst);
                    }
                }
                reconnects = RECONNECTS_PER_INTERVAL * kinds;
                thread::park_timeout(SLOW_INTERVAL);
            }
        });
        SlowClients { stopping, failed, thread: Some(thread) }
    }

    /// How many connections could not be started, for lack of descriptors or ports.
    pub(crate) fn failed(&self) -> usize {
        self.failed.load(Ordering::SeqCst)
    }
}

impl Drop for SlowClients {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

impl SlowClient {
    /// Connects, sends or receives once; an error when it could not start to connect.
    fn act(&mut self, target: SocketAddr, large: &str, reconnects: &mut usize) -> io::Result<()> {
        let Some(stream) = &self.stream else {
            if *reconnects > 0 {
                *reconnects -= 1;
                self.step = 0;
                self.stream = Some(connect(target, self.number)?);
            }
            return Ok(());
        };
        let result = self.exchange(stream, large);
        self.step += 1;
        if result.is_err_and(|err| {
            !matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected)
        }) {
            self.stream = None;
        }
        Ok(())
    }

    fn exchange(&self, mut stream: &TcpStream, large: &str) -> io::Result<()> {
        let first = self.step == 0;
        match self.kind {
            Slow::Header => {
                let head = b"GET /health HTTP/1.1\r\nHost: slow\r\nX-Slow: ";
                stream.write_all(&[head.get(self.step).copied().unwrap_or(b'a')])?;
            }
            Slow::Body if first => {
                let head =
                    "POST /api/movies HTTP/1.1\r\nHost: slow\r\nContent-Length: 200000\r\n\r\n";
                stream.write_all(head.as_bytes())?;
                stream.write_all(&BODY)?;
            }
            Slow::Idle if first && self.number % 8 < 4 => {
                stream.write_all(b"GET /health HTTP/1.1\r\nHost: slow\r\n\r\n")?;
            }
            Slow::Reader if first => {
                stream
                    .write_all(format!("GET {large} HTTP/1.1\r\nHost: slow\r\n\r\n").as_bytes())?;
            }
            Slow::Body | Slow::Idle | Slow::Reader => (),
        }
        match stream.read(&mut [0; 512]) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            read => read.map(drop),
        }
    }
}

/// A non-blocking connection with a small receive buffer, from one of 200 addresses, so that ports
/// do not run out.
fn connect(target: SocketAddr, number: usize) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_recv_buffer_size(4096)?;
    socket
        .bind(&SocketAddr::from((Ipv4Addr::new(127, 0, 1, 1 + (number % 200) as u8), 0)).into())?;
    socket.set_nonblocking(true)?;
    // Returns EINPROGRESS as a rule.
    let _ = socket.connect(&target.into());
    Ok(socket.into())
}

/// What became of the requests of a well-behaved client.
#[derive(Default)]
pub(crate) struct ClientStats {
    /// The time from the first attempt to the response, in the order of the requests.
    pub(crate) times: Vec<Duration>,
    /// Attempts that had to be repeated.
    pub(crate) repeated: usize,
    /// Requests that were given up, each as the last response or error.
    pub(crate) given_up: Vec<String>,
}

impl ClientStats {
    /// The time within which this percentage of the requests was answered.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        percentile(&self.times, percent)
    }
}

/// The time that this percentage of `times` does not exceed.
pub(crate) fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times
        .get((times.len() * percent / 100).min(times.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

/// Sends the same request again and again until `until`, each time on a connection of its own. After
/// a 503 or a lost connection it repeats the request, as a well-behaved client does.
pub(crate) fn well_behaved_client(
    target: SocketAddr,
    request: &[u8],
    until: Instant,
) -> ClientStats {
    let mut stats = ClientStats::default();
    while Instant::now() < until {
        let started_at = Instant::now();
        let mut last = String::new();
        let mut attempts = (0..MAX_ATTEMPTS).take_while(|_| started_at.elapsed() < GIVE_UP_AFTER);
        let answered = attempts.any(|_| match status_of(target, request, GIVE_UP_AFTER) {
            Ok(200) => true,
            other => {
                last = format!("{other:?}");
                stats.repeated += 1;
                thread::park_timeout(PAUSE);
                false
            }
        });
        match answered {
            true => stats.times.push(started_at.elapsed()),
            false => stats.given_up.push(last),
        }
        thread::park_timeout(PAUSE);
    }
    stats
}

/// Sends one request, which must ask for the end of its connection; returns the status of the
/// response, or an error when the response is not complete.
pub(crate) fn status_of(target: SocketAddr, request: &[u8], timeout: Duration) -> io::Result<u16> {
    let mut stream = TcpStream::connect_timeout(&target, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.write_all(request)?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let head_end = find(&bytes, b"\r\n\r\n").ok_or(ErrorKind::UnexpectedEof)? + 4;
    let (status, length) = read_head(&bytes[..head_end])?;
    let body = bytes.split_off(head_end);
    if length.is_some_and(|length| length != body.len())
        || (length.is_none() && !body.ends_with(b"0\r\n\r\n"))
    {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(status)
}

/// The status and the Content-Length of a response's head.
pub(crate) fn read_head(head: &[u8]) -> io::Result<(u16, Option<usize>)> {
    let head = String::from_utf8_lossy(head);
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("Content-Length").then(|| value.trim().parse().ok())?
    });
    Ok((status.ok_or(ErrorKind::InvalidData)?, length))
}

/// The position of `wanted` in `bytes`.
pub(crate) fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// A GET that asks for the end of its connection.
pub(crate) fn get_request(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: good\r\nConnection: close\r\n\r\n").into_bytes()
}

/// A POST of an order of this user, on a connection that ends or stays open.
pub(crate) fn order_request(user: &str, keep_alive: bool) -> Vec<u8> {
    let body = bodies::order(user);
    let connection = if keep_alive { "keep-alive" } else { "close" };
    format!(
        "POST /api/billing HTTP/1.1\r\nHost: good\r\nConnection: {connection}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}
