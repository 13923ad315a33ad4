//! Who the client is: the peer of the connection or, behind proxies that are trusted,
//! the one they name in `X-Forwarded-For`.

use std::net::{IpAddr, SocketAddr};

use rouille::Request;

/// The proxies whose word is taken; nobody's by default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Proxies(Vec<Network>);

/// All addresses that begin with the same bits.
#[derive(Clone, Debug, PartialEq)]
struct Network {
    address: IpAddr,
    prefix: u32,
}

impl Proxies {
    /// Reads addresses and networks (`10.0.0.0/8`, `2001:db8::/32`), separated by commas;
    /// fails with the entry that is none. A network whose address has bits beyond its
    /// prefix is an error and not a guess.
    pub fn parse(list: &str) -> Result<Proxies, String> {
        let entries = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        let networks: Result<_, _> =
            entries.map(|entry| Network::parse(entry).ok_or(entry.to_owned())).collect();
        networks.map(Proxies)
    }

    /// Whether the peer of this request is a trusted proxy.
    pub fn vouch_for(&self, request: &Request) -> bool {
        self.trust(request.remote_addr().ip())
    }

    /// The address that the request comes from: the last in the chain that is not a
    /// trusted proxy. An entry that is no address ends the chain, since nobody knows what
    /// stands before it: then it is the proxy that has named it.
    pub fn client(&self, request: &Request) -> IpAddr {
        let mut client = request.remote_addr().ip().to_canonical();
        let lines: Vec<&str> = lines(request, "X-Forwarded-For").collect();
        let mut before = lines.iter().rev().flat_map(|line| line.rsplit(','));
        while self.trust(client) {
            match before.next().and_then(|entry| address(entry.trim())) {
                Some(address) => client = address,
                None => break,
            }
        }
        client
    }

    fn trust(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(address))
    }
}

impl Network {
    fn parse(text: &str) -> Option<Network> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let bits = width(address);
        let prefix = match prefix {
            // Rust would take a sign.
            Some(digits) if !digits.bytes().all(|byte| byte.is_ascii_digit()) => return None,
            Some(digits) => digits.parse().ok().filter(|prefix| *prefix <= bits)?,
            None => bits,
        };
        let network = Network { address, prefix };
        (to_bits(address) == network.begin(address)).then_some(network)
    }

    fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && self.begin(address) == to_bits(self.address)
    }

    /// The first bits of an address; the others are 0.
    fn begin(&self, address: IpAddr) -> u128 {
        let rest = width(address) - self.prefix;
        to_bits(address).checked_shr(rest).and_then(|bits| bits.checked_shl(rest)).unwrap_or(0)
    }
}

/// The values of a header that may come in several lines, in their order.
pub(crate) fn lines<'r>(request: &'r Request, name: &str) -> impl Iterator<Item = &'r str> {
    let lines = request.headers().filter(move |(known, _)| known.eq_ignore_ascii_case(name));
    lines.map(|(_, value)| value)
}

/// An entry of `X-Forwarded-For`: some proxies add the port, some put IPv6 in brackets.
fn address(entry: &str) -> Option<IpAddr> {
    let bare = entry.strip_prefix('[').and_then(|entry| entry.strip_suffix(']')).unwrap_or(entry);
    let address = bare.parse().ok();
    let address = address.or_else(|| Some(entry.parse::<SocketAddr>().ok()?.ip()));
    address.as_ref().map(IpAddr::to_canonical)
}

fn width(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn to_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The client of a request by `peer`, with these lines of `X-Forwarded-For`.
    fn client(trusted: &str, peer: &str, lines: &[&str]) -> String {
        let headers = lines.iter().map(|line| ("x-forwarded-for".to_owned(), (*line).to_owned()));
        let peer = SocketAddr::new(peer.parse().unwrap(), 4711);
        let request = Request::fake_http_from(peer, "GET", "/", headers.collect(), Vec::new());
        Proxies::parse(trusted).unwrap().client(&request).to_string()
    }

    #[test]
    fn nobody_but_a_trusted_proxy_is_believed() {
        for (trusted, peer, lines, expected) in [
            ("", "192.0.2.1", &["198.51.100.7"][..], "192.0.2.1"),
            ("192.0.2.2", "192.0.2.1", &["198.51.100.7"], "192.0.2.1"),
            ("192.0.2.1", "192.0.2.1", &["198.51.100.7"], "198.51.100.7"),
            ("192.0.2.0/24", "192.0.2.1", &[], "192.0.2.1"),
            // What a client writes in front of the chain is only text.
            ("192.0.2.0/24", "192.0.2.1", &["1.1.1.1, 198.51.100.7"], "198.51.100.7"),
            ("192.0.2.0/24", "192.0.2.1", &["1.1.1.1, 198.51.100.7, 192.0.2.9"], "198.51.100.7"),
            ("192.0.2.0/24", "192.0.2.1", &["1.1.1.1", "198.51.100.7,192.0.2.9"], "198.51.100.7"),
            ("192.0.2.0/24", "192.0.2.1", &["192.0.2.8, 192.0.2.9"], "192.0.2.8"),
            // An entry that is no address: the proxy that wrote it down.
            ("192.0.2.0/24", "192.0.2.1", &["1.1.1.1, unknown"], "192.0.2.1"),
            ("192.0.2.0/24", "192.0.2.1", &["1.1.1.1, unknown, 192.0.2.9"], "192.0.2.9"),
            ("192.0.2.0/24", "192.0.2.1", &["1.1.1.1,"], "192.0.2.1"),
            ("192.0.2.0/24", "192.0.2.1", &["198.51.100.7:80"], "198.51.100.7"),
            ("192.0.2.0/24", "::ffff:192.0.2.1", &["::ffff:198.51.100.7"], "198.51.100.7"),
            ("2001:db8::/32", "2001:db8::1", &["[2001:db9::1]:80"], "2001:db9::1"),
            ("2001:db8::/32", "2001:db8::1", &["[2001:db9::1]"], "2001:db9::1"),
            ("0.0.0.0/0", "192.0.2.1", &["198.51.100.7"], "198.51.100.7"),
            ("0.0.0.0/0", "2001:db8::1", &["198.51.100.7"], "2001:db8::1"),
            ("::/0", "192.0.2.1", &["198.51.100.7"], "192.0.2.1"),
        ] {
            let found = client(trusted, peer, lines);
            assert_eq!(found, expected, "{trusted:?} trusted, {peer} says {lines:?}");
        }
    }

    #[test]
    fn a_list_is_read_whole_or_not_at_all() {
        assert_eq!(Proxies::parse(" , "), Ok(Proxies::default()));
        assert!(Proxies::parse("127.0.0.1, 10.0.0.0/8,::1,fe80::/10").is_ok());
        for wrong in [
            "localhost",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0.1/8",
            "::1/64",
            "::/129",
            "10.0.0",
            "10.0.0.0/8/8",
            "10.0.0.1:80",
        ] {
            let list = format!("127.0.0.1,{wrong}");
            assert_eq!(Proxies::parse(&list), Err(wrong.to_owned()));
        }
    }
}
