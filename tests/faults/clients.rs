//! Clients on bare sockets: slow ones by the thousand on one thread, and good ones
//! beside them, whose answers are timed.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

/// How often each slow client does what it does.
const TURN: Duration = Duration::from_millis(100);

/// Slow clients that were shown out come back, so many of each kind a turn: they are to
/// be slow, and no flood of connects.
const RETURNS: usize = 3;

/// What a stalled body has sent: much, because the server must keep it.
static BODY: [u8; 60_000] = [b' '; 60_000];

/// How often a good client asks before it gives up, and for how long.
const TRIES: usize = 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// How a client is slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slow {
    /// Sends its head byte by byte.
    Header,
    /// Sends the begin of its body and no more.
    Body,
    /// Has connected, or has an answer, and says nothing.
    Idle,
    /// Has asked for much and takes a little at a time.
    Reader,
}

impl Slow {
    pub(crate) const ALL: [Slow; 4] = [Slow::Header, Slow::Body, Slow::Idle, Slow::Reader];
}

/// Slow clients at work, until this is dropped.
pub(crate) struct Crowd {
    ending: Arc<AtomicBool>,
    /// How many connections could not be begun.
    failed: Arc<AtomicUsize>,
    thread: Option<thread::JoinHandle<()>>,
}

struct SlowClient {
    kind: Slow,
    number: usize,
    stream: Option<TcpStream>,
    turn: usize,
}

impl Crowd {
    /// `each` clients of each of these kinds; `large` is the path whose answer is taken slowly.
    pub(crate) fn start(target: SocketAddr, kinds: &[Slow], each: usize, large: &str) -> Crowd {
        let ending = Arc::new(AtomicBool::new(false));
        let clients = (0..each * kinds.len()).map(|number| SlowClient {
            kind: kinds[number % kinds.len()],
            number,
            stream: None,
            turn: 0,
        });
        let mut clients: Vec<SlowClient> = clients.collect();
        let kinds = kinds.len();
        let failed = Arc::new(AtomicUsize::new(0));
        let (ended, failures, large) = (Arc::clone(&ending), Arc::clone(&failed), large.to_owned());
        let thread = thread::spawn(move || {
            let mut returns = clients.len();
            while !ended.load(Ordering::SeqCst) {
                for client in &mut clients {
                    if client.take_turn(target, &large, &mut returns).is_err() {
                        failures.fetch_add(1, Ordering::SeqCst);
                    }
                }
                returns = RETURNS * kinds;
                thread::park_timeout(TURN);
            }
        });
        Crowd { ending, failed, thread: Some(thread) }
    }

    /// How many connections could not even be begun, for want of descriptors or ports.
    pub(crate) fn failed(&self) -> usize {
        self.failed.load(Ordering::SeqCst)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

impl SlowClient {
    /// An error when it could not begin to connect.
    fn take_turn(
        &mut self,
        target: SocketAddr,
        large: &str,
        returns: &mut usize,
    ) -> io::Result<()> {
        let Some(stream) = &self.stream else {
            if *returns > 0 {
                *returns -= 1;
                self.turn = 0;
                self.stream = Some(connect(target, self.number)?);
            }
            return Ok(());
        };
        let done = self.act(stream, large);
        self.turn += 1;
        if done.is_err_and(|err| {
            !matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected)
        }) {
            self.stream = None;
        }
        Ok(())
    }

    fn act(&self, mut stream: &TcpStream, large: &str) -> io::Result<()> {
        let first = self.turn == 0;
        match self.kind {
            Slow::Header => {
                let head = b"GET /health HTTP/1.1\r\nHost: slow\r\nX-Slow: ";
                stream.write_all(&[head.get(self.turn).copied().unwrap_or(b'a')])?;
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

/// A non-blocking connection whose kernel takes little; from one of many addresses, so
/// that ports do not run out.
fn connect(target: SocketAddr, number: usize) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_recv_buffer_size(4096)?;
    socket
        .bind(&SocketAddr::from((Ipv4Addr::new(127, 0, 1, 1 + (number % 200) as u8), 0)).into())?;
    socket.set_nonblocking(true)?;
    // EINPROGRESS, as a rule.
    let _ = socket.connect(&target.into());
    Ok(socket.into())
}

/// What good clients saw.
#[derive(Default)]
pub(crate) struct Seen {
    /// From the first try to the answer, in the order of time.
    pub(crate) times: Vec<Duration>,
    /// Tries that had to be repeated.
    pub(crate) repeated: usize,
    /// Requests that were given up, and the last that was told.
    pub(crate) given_up: Vec<String>,
}

impl Seen {
    /// The time within which so many of a hundred were answered.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        percentile(&self.times, percent)
    }
}

/// The time within which so many of a hundred are.
pub(crate) fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times
        .get((times.len() * percent / 100).min(times.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

/// Asks the same again and again until `until`, each time on a connection of its own.
/// A 503 and a lost connection are repeated at once: that is what such a client does.
pub(crate) fn good_client(target: SocketAddr, request: &[u8], until: Instant) -> Seen {
    let mut seen = Seen::default();
    while Instant::now() < until {
        let begun = Instant::now();
        let mut told = String::new();
        let mut tries = (0..TRIES).take_while(|_| begun.elapsed() < PATIENCE);
        let answered = tries.any(|_| match ask(target, request, PATIENCE) {
            Ok(answer) if answer.status == 200 => true,
            other => {
                told = format!("{other:?}");
                seen.repeated += 1;
                thread::park_timeout(Duration::from_millis(5));
                false
            }
        });
        match answered {
            true => seen.times.push(begun.elapsed()),
            false => seen.given_up.push(told),
        }
        thread::park_timeout(Duration::from_millis(5));
    }
    seen
}

/// An answer that came whole.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) status: u16,
}

/// Sends one request, which must ask for the end of its connection, and reads its answer;
/// an error when that is not whole.
pub(crate) fn ask(target: SocketAddr, request: &[u8], patience: Duration) -> io::Result<Told> {
    let mut stream = TcpStream::connect_timeout(&target, patience)?;
    stream.set_read_timeout(Some(patience))?;
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
    Ok(Told { status })
}

/// The status of a head, and the length that it announces.
pub(crate) fn read_head(head: &[u8]) -> io::Result<(u16, Option<usize>)> {
    let head = String::from_utf8_lossy(head);
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("Content-Length").then(|| value.trim().parse().ok())?
    });
    Ok((status.ok_or(ErrorKind::InvalidData)?, length))
}

/// Where a text begins in another.
pub(crate) fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// A request that asks for the end of its connection.
pub(crate) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: good\r\nConnection: close\r\n\r\n").into_bytes()
}

/// An order of this user, on a connection that ends or stays.
pub(crate) fn order(user: &str, stays: bool) -> Vec<u8> {
    let body =
        format!("{{\"user_id\":\"{user}\",\"number_of_items\":1,\"total_amount\":\"1.25\"}}");
    let connection = if stays { "keep-alive" } else { "close" };
    format!(
        "POST /api/billing HTTP/1.1\r\nHost: good\r\nConnection: {connection}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}
