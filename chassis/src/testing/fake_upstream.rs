//! An HTTP server that answers as a test wants: late, wrongly, or not at all.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

/// Listens in the place of a service until it is dropped.
#[must_use = "it stops listening when it is dropped"]
pub struct FakeUpstream {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    stopping: AtomicBool,
    requests: Mutex<Vec<Vec<u8>>>,
    /// The open connections, by a number.
    connections: Mutex<HashMap<usize, TcpStream>>,
}

impl FakeUpstream {
    /// Reads requests and hands each to `answer`, with the connection to write to. `answer`
    /// may write anything, and ends the connection by `false`. Each connection has a thread.
    pub fn start<F>(address: impl Into<SocketAddr>, answer: F) -> FakeUpstream
    where
        F: Fn(&mut TcpStream, &str) -> bool + Send + Sync + 'static,
    {
        let listener = TcpListener::bind(address.into()).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            requests: Mutex::default(),
            connections: Mutex::default(),
        });
        let (accepting, answer) = (Arc::clone(&shared), Arc::new(answer));
        let thread = thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                if accepting.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                accepting
                    .connections
                    .lock()
                    .extend(stream.try_clone().map(|clone| (number, clone)));
                let (serving, answer) = (Arc::clone(&accepting), Arc::clone(&answer));
                thread::spawn(move || {
                    serving.serve(stream, &*answer);
                    serving.connections.lock().remove(&number);
                });
            }
        });
        FakeUpstream { address, shared, thread: Some(thread) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The requests so far, head and body, in the order in which they were read. Those for
    /// `/health…` are left out: a caller's readiness sends them at any time.
    pub fn requests(&self) -> Vec<String> {
        let requests = self.shared.requests.lock();
        requests.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }

    /// The same as they came, for bytes that are not UTF-8.
    pub fn requests_as_bytes(&self) -> Vec<Vec<u8>> {
        self.shared.requests.lock().clone()
    }
}

impl Drop for FakeUpstream {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().map(JoinHandle::join);
        for (_, stream) in self.shared.connections.lock().drain() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn serve(&self, mut stream: TcpStream, answer: &dyn Fn(&mut TcpStream, &str) -> bool) {
        while let Some(request) = read_request(&mut stream) {
            let text = String::from_utf8_lossy(&request).into_owned();
            if !text.split(' ').nth(1).is_some_and(|target| target.starts_with("/health")) {
                self.requests.lock().push(request);
            }
            if !answer(&mut stream, &text) {
                break;
            }
        }
    }
}

/// A response of 200 with the body `ok`; for [`FakeUpstream::start`].
pub fn answer_ok(stream: &mut TcpStream, _request: &str) -> bool {
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").is_ok()
}

/// One request with a Content-Length or without a body; `None` at the end of the stream.
fn read_request(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        bytes.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.trim().parse().unwrap())];
    stream.read_exact(&mut body).ok()?;
    bytes.append(&mut body);
    Some(bytes)
}
