//! A TCP proxy that delays, loses, cuts and resets what goes through it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use socket2::{SockRef, TcpKeepalive};

/// What happens to the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They arrive.
    Pass,
    /// Each piece arrives later by this time.
    Delay(Duration),
    /// Connections are accepted and kept, and the bytes of one direction are dropped without a
    /// word, as by a firewall that has lost its table. A connection that has lost bytes carries
    /// none in that direction any more, also after this mode.
    Blackhole(Direction),
    /// A connection ends after so many bytes of responses, as if they were complete.
    Truncate(usize),
    /// Every connection ends by RST, also a new one.
    Reset,
    /// Every connection ends by RST, and no new one is accepted.
    Refuse,
}

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    Requests,
    /// From the server to the client: the server has done what was asked, and the client does
    /// not learn of it.
    Responses,
}

/// Forwards connections until it is dropped.
pub struct TcpProxy {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Shared {
    target: SocketAddr,
    stopping: AtomicBool,
    state: Mutex<State>,
}

struct State {
    mode: Mode,
    connections: Vec<Weak<Link>>,
}

/// Both ends of a connection; closed when both threads that use them have ended.
struct Link {
    client: TcpStream,
    server: TcpStream,
    /// It has lost bytes. Later ones would arrive without them, which no network does.
    dead: AtomicBool,
    /// Bytes of responses that still pass in [`Mode::Truncate`].
    left: AtomicUsize,
}

impl TcpProxy {
    /// Listens on a free port of `127.0.0.1`.
    pub fn start(target: SocketAddr) -> TcpProxy {
        TcpProxy::start_on(Ipv4Addr::LOCALHOST, target)
    }

    /// The same on another address of this machine.
    pub fn start_on(address: Ipv4Addr, target: SocketAddr) -> TcpProxy {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = State { mode: Mode::Pass, connections: Vec::new() };
        let shared =
            Arc::new(Shared { target, stopping: AtomicBool::new(false), state: Mutex::new(state) });
        let accepting = Arc::clone(&shared);
        let thread = thread::spawn(move || accepting.accept(listener, address));
        TcpProxy { address, shared, thread: Some(thread) }
    }

    /// Changes what happens, also on connections that are open.
    pub fn set(&self, mode: Mode) {
        let mut state = self.shared.state.lock();
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

    /// Makes the thread that accepts look at the mode.
    fn wake(&self) {
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.set(Mode::Reset);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

impl Shared {
    fn mode(&self) -> Mode {
        self.state.lock().mode
    }

    fn accept(self: &Arc<Self>, listener: TcpListener, address: SocketAddr) {
        let mut listener = Some(listener);
        while !self.stopping.load(Ordering::SeqCst) {
            if self.mode() == Mode::Refuse {
                listener = None;
                thread::park_timeout(Duration::from_millis(20));
                continue;
            }
            // Another process may have taken the port meanwhile: unlikely, and this panics then.
            let listener = listener.get_or_insert_with(|| TcpListener::bind(address).unwrap());
            let Ok((client, _)) = listener.accept() else { continue };
            if matches!(self.mode(), Mode::Reset | Mode::Refuse) {
                let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
                continue;
            }
            let Ok(server) = TcpStream::connect(self.target) else { continue };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            // It notices a dead client as soon as the databases do, in whose place it listens.
            let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(5));
            let keepalive = keepalive.with_interval(Duration::from_secs(2)).with_retries(3);
            let _ = SockRef::from(&client).set_tcp_keepalive(&keepalive);
            let _ = SockRef::from(&client).set_tcp_user_timeout(Some(Duration::from_secs(10)));
            let mut state = self.state.lock();
            let left = if let Mode::Truncate(bytes) = state.mode { bytes } else { 0 };
            let link =
                Link { client, server, dead: AtomicBool::new(false), left: AtomicUsize::new(left) };
            let link = Arc::new(link);
            state.connections.retain(|link| link.strong_count() > 0);
            state.connections.push(Arc::downgrade(&link));
            drop(state);
            for direction in [Direction::Requests, Direction::Responses] {
                let (shared, link) = (Arc::clone(self), Arc::clone(&link));
                thread::spawn(move || shared.pump(&link, direction));
            }
        }
    }

    /// Moves bytes in one direction until the connection ends.
    fn pump(&self, link: &Link, direction: Direction) {
        let (mut from, mut to) = match direction {
            Direction::Requests => (&link.client, &link.server),
            Direction::Responses => (&link.server, &link.client),
        };
        let mut piece = [0; 16 << 10];
        loop {
            let read = from.read(&mut piece).unwrap_or(0);
            let mode = self.mode();
            if matches!(mode, Mode::Reset | Mode::Refuse) {
                return link.reset();
            }
            if mode == Mode::Blackhole(direction) && read > 0 {
                link.dead.store(true, Ordering::SeqCst);
            }
            if let Mode::Delay(time) = mode {
                thread::park_timeout(time);
            }
            let mut piece = &piece[..read];
            let mut last = read == 0;
            if let (Mode::Truncate(_), Direction::Responses) = (mode, direction) {
                let left = link.left.load(Ordering::SeqCst).min(read);
                link.left.fetch_sub(left, Ordering::SeqCst);
                last |= left < read;
                piece = &piece[..left];
            }
            // The end of the stream is lost on a dead connection, too.
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
                    // Truncated: both sides end.
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
