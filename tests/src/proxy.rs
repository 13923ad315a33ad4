//! A TCP proxy that spoils what goes through it, in a way that can be changed at any moment.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// What happens to what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It arrives.
    Pass,
    /// Each piece arrives later.
    Delay(Duration),
    /// Connections are accepted and kept, and what one side sends is swallowed: as a firewall
    /// does that has forgotten the connection. One that has lost something stays dead, and
    /// nobody is told, also when this mode is over.
    Swallow(Direction),
    /// After so many bytes of answers the connection ends, as if that had been all.
    Truncate(usize),
    /// Connections end by RST, also new ones.
    Reset,
    /// Connections end by RST, and nobody listens any more.
    Refuse,
}

/// One of the two directions of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What the client sends; the server hears nothing.
    Requests,
    /// What the server sends: it has heard, done and answered, and the client never learns it.
    Answers,
}

/// Forwards connections until it is dropped.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Shared {
    target: SocketAddr,
    ending: AtomicBool,
    state: Mutex<State>,
}

struct State {
    mode: Mode,
    connections: Vec<Weak<Link>>,
}

/// Both ends of a connection; closed when nobody uses them any more.
struct Link {
    client: TcpStream,
    server: TcpStream,
    /// It has lost bytes: to go on would be a fault that no network has.
    dead: AtomicBool,
    /// Bytes of answers that still pass in [`Mode::Truncate`].
    left: AtomicUsize,
}

impl Proxy {
    /// Listens on a free port of `127.0.0.1`.
    pub fn start(target: SocketAddr) -> Proxy {
        Proxy::start_on(Ipv4Addr::LOCALHOST, target)
    }

    /// The same on another address of this machine.
    pub fn start_on(address: Ipv4Addr, target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = State { mode: Mode::Pass, connections: Vec::new() };
        let shared =
            Arc::new(Shared { target, ending: AtomicBool::new(false), state: Mutex::new(state) });
        let accepting = Arc::clone(&shared);
        let thread = thread::spawn(move || accepting.accept(listener, address));
        Proxy { address, shared, thread: Some(thread) }
    }

    /// From now on, and for the connections that there are, this happens.
    pub fn set(&self, mode: Mode) {
        let mut state = self.shared.lock();
        state.mode = mode;
        for link in state.connections.iter().filter_map(Weak::upgrade) {
            match mode {
                Mode::Truncate(bytes) => link.left.store(bytes, Ordering::SeqCst),
                Mode::Reset | Mode::Refuse => link.reset(),
                _ => (),
            }
        }
        drop(state);
        self.wake();
    }

    /// Lets `accept` look up.
    fn wake(&self) {
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        self.set(Mode::Reset);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mode(&self) -> Mode {
        self.lock().mode
    }

    fn accept(self: &Arc<Self>, listener: TcpListener, address: SocketAddr) {
        let mut listener = Some(listener);
        while !self.ending.load(Ordering::SeqCst) {
            if self.mode() == Mode::Refuse {
                listener = None;
                thread::park_timeout(Duration::from_millis(20));
                continue;
            }
            // Nobody else takes a port so soon that was somebody's a moment ago; if it happens, it is seen.
            let listener = listener.get_or_insert_with(|| TcpListener::bind(address).unwrap());
            let Ok((client, _)) = listener.accept() else { continue };
            if matches!(self.mode(), Mode::Reset | Mode::Refuse) {
                let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
                continue;
            }
            let Ok(server) = TcpStream::connect(self.target) else { continue };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            // It notices that a client is cut off as soon as the databases do, in whose place it is.
            let silence = TcpKeepalive::new().with_time(Duration::from_secs(5));
            let silence = silence.with_interval(Duration::from_secs(2)).with_retries(3);
            let _ = SockRef::from(&client).set_tcp_keepalive(&silence);
            let _ = SockRef::from(&client).set_tcp_user_timeout(Some(Duration::from_secs(10)));
            let mut state = self.lock();
            let left = if let Mode::Truncate(bytes) = state.mode { bytes } else { 0 };
            let link =
                Link { client, server, dead: AtomicBool::new(false), left: AtomicUsize::new(left) };
            let link = Arc::new(link);
            state.connections.retain(|link| link.strong_count() > 0);
            state.connections.push(Arc::downgrade(&link));
            drop(state);
            for direction in [Direction::Requests, Direction::Answers] {
                let (shared, link) = (Arc::clone(self), Arc::clone(&link));
                thread::spawn(move || shared.pump(&link, direction));
            }
        }
    }

    /// Moves bytes in one direction until the connection ends.
    fn pump(&self, link: &Link, direction: Direction) {
        let (mut from, mut to) = match direction {
            Direction::Requests => (&link.client, &link.server),
            Direction::Answers => (&link.server, &link.client),
        };
        let mut piece = [0; 16 << 10];
        loop {
            let read = from.read(&mut piece).unwrap_or(0);
            let mode = self.mode();
            if matches!(mode, Mode::Reset | Mode::Refuse) {
                return link.reset();
            }
            if mode == Mode::Swallow(direction) && read > 0 {
                link.dead.store(true, Ordering::SeqCst);
            }
            if let Mode::Delay(time) = mode {
                thread::park_timeout(time);
            }
            let mut piece = &piece[..read];
            let mut last = read == 0;
            if let (Mode::Truncate(_), Direction::Answers) = (mode, direction) {
                let left = link.left.load(Ordering::SeqCst).min(read);
                link.left.fetch_sub(left, Ordering::SeqCst);
                last |= left < read;
                piece = &piece[..left];
            }
            // The end of a dead connection is not told either.
            let dead = link.dead.load(Ordering::SeqCst);
            if dead && last {
                return;
            }
            if !dead && to.write_all(piece).is_err() {
                // The other direction must end as well.
                return link.reset();
            }
            if last {
                let _ = to.shutdown(Shutdown::Write);
                if read > 0 {
                    // Cut in the middle: both sides, for good.
                    let _ = (
                        link.client.shutdown(Shutdown::Both),
                        link.server.shutdown(Shutdown::Both),
                    );
                }
                return;
            }
        }
    }
}

impl Link {
    /// RST to both sides, sent when the last user is gone; reading ends at once.
    fn reset(&self) {
        for stream in [&self.client, &self.server] {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
            let _ = stream.shutdown(Shutdown::Read);
        }
    }
}
