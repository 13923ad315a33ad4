//! The address of the client: the peer of the connection or, behind trusted proxies, the one that
//! they name in `X-Forwarded-For`.

use std::net::{IpAddr, SocketAddr};

use chassis::request::header_values;
use ipnet::IpNet;
use rouille::Request;

/// The proxies whose headers are trusted; none by default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrustedProxies(Vec<IpNet>);

impl TrustedProxies {
    /// Parses addresses and networks (`10.0.0.0/8`, `2001:db8::/32`), separated by commas; fails with
    /// the first invalid entry. A network with bits beyond its prefix is an error and not a guess.
    pub fn parse(list: &str) -> Result<TrustedProxies, String> {
        let entries = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        let networks: Result<_, _> =
            entries.map(|entry| parse_network(entry).ok_or(entry.to_owned())).collect();
        networks.map(TrustedProxies)
    }

    /// Whether the peer of this request is a trusted proxy.
    pub fn trusts_peer_of(&self, request: &Request) -> bool {
        self.contains(request.remote_addr().ip())
    }

    /// The address of the client: the last in the chain that is not a trusted proxy. An entry that is
    /// no address ends the chain, because what comes before it cannot be checked: then the client is
    /// the proxy that has named it.
    pub fn client_addr(&self, request: &Request) -> IpAddr {
        let mut client = request.remote_addr().ip().to_canonical();
        let values: Vec<&str> = header_values(request, "X-Forwarded-For").collect();
        let mut before = values.iter().rev().flat_map(|value| value.rsplit(','));
        while self.contains(client) {
            match before.next().and_then(|entry| parse_forwarded_for(entry.trim())) {
                Some(address) => client = address,
                None => break,
            }
        }
        client
    }

    fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }
}

fn parse_network(text: &str) -> Option<IpNet> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.into());
    }
    let network: IpNet = text.parse().ok()?;
    (network.trunc() == network).then_some(network)
}

/// An entry of `X-Forwarded-For`: some proxies add the port, some put IPv6 in brackets.
fn parse_forwarded_for(entry: &str) -> Option<IpAddr> {
    let bare = entry.strip_prefix('[').and_then(|entry| entry.strip_suffix(']')).unwrap_or(entry);
    let address = bare.parse().ok();
    let address = address.or_else(|| Some(entry.parse::<SocketAddr>().ok()?.ip()));
    address.as_ref().map(IpAddr::to_canonical)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The client of a request by `peer`, with these lines of `X-Forwarded-For`.
    fn client(trusted: &str, peer: &str, lines: &[&str]) -> String {
        let headers = lines.iter().map(|line| ("x-forwarded-for".to_owned(), (*line).to_owned()));
        let peer = SocketAddr::new(peer.parse().unwrap(), 4711);
        let request = Request::fake_http_from(peer, "GET", "/", headers.collect(), Vec::new());
        TrustedProxies::parse(trusted).unwrap().client_addr(&request).to_string()
    }

    #[test]
    fn x_forwarded_for_counts_only_from_a_trusted_proxy() {
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
        assert_eq!(TrustedProxies::parse(" , "), Ok(TrustedProxies::default()));
        assert!(TrustedProxies::parse("127.0.0.1, 10.0.0.0/8,::1,fe80::/10").is_ok());
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
            assert_eq!(TrustedProxies::parse(&list), Err(wrong.to_owned()));
        }
    }
}
