//! The sockets to an upstream, with fewer system calls than ureq's own: for each request ureq checks
//! with three calls twice whether a socket is alive, and sets both timeouts again because a few
//! microseconds less are left.

use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::time::Duration;
use std::{fmt, io};

use libc::{MSG_DONTWAIT, MSG_PEEK};
use socket2::SockRef;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};
use ureq::{Error, Timeout};

/// How much later than requested a timeout may come, so that it need not be set again.
const TIMEOUT_SLACK: Duration = Duration::from_millis(50);

/// A response that takes this many reads is long.
const LONG_RESPONSE_READS: u32 = 8;

/// Connects to the one address that the resolver gives.
#[derive(Debug)]
pub(super) struct TcpConnector;

/// A connected socket and its buffers.
pub(super) struct TcpTransport {
    stream: TcpStream,
    buffers: LazyBuffers,
    /// Of the buffers for input and output, in bytes.
    buffer_sizes: (usize, usize),
    /// How often was read since the last request.
    reads: u32,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
}

impl Connector for TcpConnector {
    type Out = TcpTransport;

    fn connect(
        &self,
        details: &ConnectionDetails,
        _: Option<()>,
    ) -> Result<Option<TcpTransport>, Error> {
        let address = details.addrs.first().ok_or(Error::HostNotFound)?;
        let connected = match details.timeout.not_zero() {
            Some(limit) => TcpStream::connect_timeout(address, *limit),
            None => TcpStream::connect(address),
        };
        let stream = connected.map_err(|err| to_ureq_error(err, Timeout::Connect))?;
        stream.set_nodelay(true)?;
        let config = details.config;
        let buffer_sizes = (config.input_buffer_size(), config.output_buffer_size());
        let buffers = LazyBuffers::new(buffer_sizes.0, buffer_sizes.1);
        let (read_timeout, write_timeout) = (None, None);
        Ok(Some(TcpTransport {
            stream,
            buffers,
            buffer_sizes,
            reads: 0,
            read_timeout,
            write_timeout,
        }))
    }
}

impl Transport for TcpTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let timeout = timeout.for_write();
        if let Some(new) = timeout_to_set(self.write_timeout, timeout)? {
            self.stream.set_write_timeout(new)?;
            self.write_timeout = new;
        }
        self.reads = 0;
        let sent = self.stream.write_all(&self.buffers.output()[..amount]);
        sent.map_err(|err| to_ureq_error(err, timeout.reason))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let timeout = timeout.for_read();
        if let Some(new) = timeout_to_set(self.read_timeout, timeout)? {
            self.stream.set_read_timeout(new)?;
            self.read_timeout = new;
        }
        self.reads += 1;
        if self.reads >= LONG_RESPONSE_READS && self.buffers.input().is_empty() {
            // The client of this response may be slow, and the output buffer is not needed.
            self.reads = 0;
            self.buffers = LazyBuffers::new(self.buffer_sizes.0, self.buffer_sizes.1);
        }
        let read = loop {
            match self.stream.read(self.buffers.input_append_buf()) {
                Err(err) if err.kind() == ErrorKind::Interrupted => (),
                read => break read.map_err(|err| to_ureq_error(err, timeout.reason))?,
            }
        };
        self.buffers.input_appended(read);
        Ok(read > 0)
    }

    /// Whether the connection can be used: no unexpected input has come, and no end.
    fn is_open(&mut self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        let peeked =
            SockRef::from(&self.stream).recv_with_flags(&mut byte, MSG_PEEK | MSG_DONTWAIT);
        peeked.is_err_and(|err| err.kind() == ErrorKind::WouldBlock)
    }
}

impl fmt::Debug for TcpTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpTransport").field("peer", &self.stream.peer_addr().ok()).finish()
    }
}

/// The timeout to set, unless the one that is set is close enough; an error when no time is left.
fn timeout_to_set(
    set: Option<Duration>,
    next: NextTimeout,
) -> Result<Option<Option<Duration>>, Error> {
    if next.after.is_not_happening() {
        return Ok(set.is_some().then_some(None));
    }
    let left = *next.after;
    if left.is_zero() {
        return Err(Error::Timeout(next.reason));
    }
    let is_close = set.is_some_and(|set| (left..=left + TIMEOUT_SLACK).contains(&set));
    Ok((!is_close).then_some(Some(left + TIMEOUT_SLACK)))
}

fn to_ureq_error(err: io::Error, reason: Timeout) -> Error {
    match err.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Error::Timeout(reason),
        _ => Error::Io(err),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_set_again_only_when_the_one_that_is_set_is_too_short_or_too_long() {
        let set = Some(Duration::from_millis(5000));
        let next = |millis: u64| {
            let after = Duration::from_millis(millis).into();
            timeout_to_set(
                set,
                NextTimeout { after, reason: Timeout::PerRead, ..NextTimeout::default() },
            )
        };
        assert_eq!(next(5000).unwrap(), None);
        assert_eq!(next(4950).unwrap(), None);
        assert_eq!(next(4949).unwrap(), Some(Some(Duration::from_millis(4999))));
        assert_eq!(next(5001).unwrap(), Some(Some(Duration::from_millis(5051))));
        assert!(matches!(next(0), Err(Error::Timeout(Timeout::PerRead))));
        assert_eq!(timeout_to_set(set, NextTimeout::default()).unwrap(), Some(None));
        assert_eq!(timeout_to_set(None, NextTimeout::default()).unwrap(), None);
    }
}
