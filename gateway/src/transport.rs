//! The sockets to inventory, with fewer system calls than ureq's own: for each request
//! ureq asks twice in three calls whether a socket is alive, and sets both of its
//! timeouts anew because some microseconds less are left each time.

use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::time::Duration;
use std::{fmt, io};

use socket2::SockRef;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};
use ureq::{Error, Timeout};

/// How much later than asked for a timeout may come, so that it need not be set anew.
const LATE: Duration = Duration::from_millis(50);

/// An answer that takes so many reads is long.
const LONG: u32 = 8;

/// Linux's `MSG_PEEK | MSG_DONTWAIT`.
const PEEK_AT_ONCE: i32 = 0x02 | 0x40;

/// Connects to the one address that the resolver gives.
#[derive(Debug)]
pub(crate) struct Plain;

/// A connected socket and its buffers.
pub(crate) struct Socket {
    stream: TcpStream,
    buffers: LazyBuffers,
    /// Of the buffers for input and output, in bytes.
    sizes: (usize, usize),
    /// Since something was sent.
    reads: u32,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
}

impl Connector for Plain {
    type Out = Socket;

    fn connect(&self, details: &ConnectionDetails, _: Option<()>) -> Result<Option<Socket>, Error> {
        let address = details.addrs.first().ok_or(Error::HostNotFound)?;
        let connected = match details.timeout.not_zero() {
            Some(limit) => TcpStream::connect_timeout(address, *limit),
            None => TcpStream::connect(address),
        };
        let stream = connected.map_err(|err| explain(err, Timeout::Connect))?;
        stream.set_nodelay(true)?;
        let config = details.config;
        let sizes = (config.input_buffer_size(), config.output_buffer_size());
        let buffers = LazyBuffers::new(sizes.0, sizes.1);
        let (read_timeout, write_timeout) = (None, None);
        Ok(Some(Socket { stream, buffers, sizes, reads: 0, read_timeout, write_timeout }))
    }
}

impl Transport for Socket {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let timeout = timeout.for_write();
        if let Some(new) = renewed(self.write_timeout, timeout)? {
            self.stream.set_write_timeout(new)?;
            self.write_timeout = new;
        }
        self.reads = 0;
        let sent = self.stream.write_all(&self.buffers.output()[..amount]);
        sent.map_err(|err| explain(err, timeout.reason))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let timeout = timeout.for_read();
        if let Some(new) = renewed(self.read_timeout, timeout)? {
            self.stream.set_read_timeout(new)?;
            self.read_timeout = new;
        }
        self.reads += 1;
        if self.reads >= LONG && self.buffers.input().is_empty() {
            // Whoever takes this answer may be slow; the buffer for output is not needed.
            self.reads = 0;
            self.buffers = LazyBuffers::new(self.sizes.0, self.sizes.1);
        }
        let read = loop {
            match self.stream.read(self.buffers.input_append_buf()) {
                Err(err) if err.kind() == ErrorKind::Interrupted => (),
                read => break read.map_err(|err| explain(err, timeout.reason))?,
            }
        };
        self.buffers.input_appended(read);
        Ok(read > 0)
    }

    /// Whether nothing has come that nobody asked for, an end least of all.
    fn is_open(&mut self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        let peeked = SockRef::from(&self.stream).recv_with_flags(&mut byte, PEEK_AT_ONCE);
        peeked.is_err_and(|err| err.kind() == ErrorKind::WouldBlock)
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").field("peer", &self.stream.peer_addr().ok()).finish()
    }
}

/// The timeout to set, unless the one that is set will do; an error when no time is left.
fn renewed(set: Option<Duration>, next: NextTimeout) -> Result<Option<Option<Duration>>, Error> {
    if next.after.is_not_happening() {
        return Ok(set.is_some().then_some(None));
    }
    let left = *next.after;
    if left.is_zero() {
        return Err(Error::Timeout(next.reason));
    }
    let will_do = set.is_some_and(|set| (left..=left + LATE).contains(&set));
    Ok((!will_do).then_some(Some(left + LATE)))
}

fn explain(err: io::Error, reason: Timeout) -> Error {
    match err.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Error::Timeout(reason),
        _ => Error::Io(err),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_set_anew_only_when_the_one_that_is_set_is_too_short_or_too_long() {
        let set = Some(Duration::from_millis(5000));
        let next = |millis: u64| {
            let after = Duration::from_millis(millis).into();
            renewed(set, NextTimeout { after, reason: Timeout::PerRead, ..NextTimeout::default() })
        };
        assert_eq!(next(5000).unwrap(), None);
        assert_eq!(next(4950).unwrap(), None);
        assert_eq!(next(4949).unwrap(), Some(Some(Duration::from_millis(4999))));
        assert_eq!(next(5001).unwrap(), Some(Some(Duration::from_millis(5051))));
        assert!(matches!(next(0), Err(Error::Timeout(Timeout::PerRead))));
        assert_eq!(renewed(set, NextTimeout::default()).unwrap(), Some(None));
        assert_eq!(renewed(None, NextTimeout::default()).unwrap(), None);
    }
}
