//! Configuration from the environment, and from `.env` where one is found.
//!
//! A service reads every variable once, at start, through one [`Env`], which
//! collects what is missing or malformed so that all of it is reported at once.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

/// A value that is never printed.
#[derive(Clone, Default)]
pub struct Secret(String);

impl Secret {
    /// The value.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Returned for an address that cannot be resolved, next to its error.
const UNSPECIFIED: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));

type Lookup = dyn Fn(&str) -> Option<String>;

/// Reads variables and collects every error until [`Env::finish`].
pub struct Env {
    lookup: Box<Lookup>,
    errors: Vec<String>,
}

impl Env {
    /// The environment of this process, completed by the nearest `.env` at or
    /// above the current directory. A variable that is set wins over the file.
    pub fn load() -> Env {
        let (values, errors) = match load_dotenv() {
            Ok(values) => (values, Vec::new()),
            Err(error) => (HashMap::new(), vec![error]),
        };
        let of_the_file = move |name: &str| values.get(name).cloned();
        let lookup = move |name: &str| std::env::var(name).ok().or_else(|| of_the_file(name));
        Env { lookup: Box::new(lookup), errors }
    }

    /// Variables from `lookup` instead of the process.
    pub fn from_fn(lookup: impl Fn(&str) -> Option<String> + 'static) -> Env {
        Env { lookup: Box::new(lookup), errors: Vec::new() }
    }

    /// A required text.
    pub fn required(&mut self, name: &str) -> String {
        self.optional(name).unwrap_or_else(|| {
            self.errors.push(format!("{name} is missing"));
            String::new()
        })
    }

    /// A text that may be absent.
    pub fn optional(&mut self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    /// Adds an error of the caller's own; it names the variable, never its value.
    pub fn error(&mut self, error: &str) {
        self.errors.push(error.to_owned());
    }

    /// A required credential.
    pub fn secret(&mut self, name: &str) -> Secret {
        Secret(self.required(name))
    }

    /// Credentials with commas between them; none where the variable is absent.
    pub fn secrets(&mut self, name: &str) -> Vec<Secret> {
        let list = self.optional(name).unwrap_or_default();
        let values = list.split(',').map(str::trim).filter(|value| !value.is_empty());
        values.map(|value| Secret(value.to_owned())).collect()
    }

    /// A required currency, ISO 4217.
    pub fn currency(&mut self, name: &str) -> String {
        let code = self.required(name);
        let is_code = code.len() == 3 && code.bytes().all(|byte| byte.is_ascii_uppercase());
        // An empty one is reported as missing.
        if !is_code && !code.is_empty() {
            self.errors.push(format!("{name} must be a code of three capital letters (ISO 4217)"));
        }
        code
    }

    /// A number within `range`; `default` when the variable is absent.
    pub fn number<T>(&mut self, name: &str, default: T, range: RangeInclusive<T>) -> T
    where
        T: FromStr + PartialOrd + fmt::Display,
    {
        let Some(value) = self.optional(name) else {
            return default;
        };
        match value.parse() {
            Ok(number) if range.contains(&number) => number,
            _ => {
                let (low, high) = (range.start(), range.end());
                self.errors.push(format!("{name} must be a whole number from {low} to {high}"));
                default
            }
        }
    }

    /// A time in milliseconds, at least one, at most an hour.
    pub fn millis(&mut self, name: &str, default: u64) -> Duration {
        Duration::from_millis(self.number(name, default, 1..=3_600_000))
    }

    /// A required address as `host:port`. A host name is resolved now, once.
    pub fn address(&mut self, name: &str) -> SocketAddr {
        let value = self.required(name);
        self.resolve(name, &value)
    }

    /// A required address in two variables, a host and a port.
    pub fn host_port(&mut self, host: &str, port: &str) -> SocketAddr {
        if self.optional(port).is_none() {
            self.errors.push(format!("{port} is missing"));
        }
        let number = self.number(port, 0, 1..=u16::MAX);
        let name = self.required(host);
        // An IPv6 address needs its brackets before a port can follow.
        let joined = if name.contains(':') && !name.starts_with('[') {
            format!("[{name}]:{number}")
        } else {
            format!("{name}:{number}")
        };
        self.resolve(host, &joined)
    }

    fn resolve(&mut self, name: &str, value: &str) -> SocketAddr {
        if value.is_empty() || value.starts_with(':') {
            return UNSPECIFIED;
        }
        match value.to_socket_addrs().ok().and_then(|mut found| found.next()) {
            Some(address) => address,
            None => {
                self.errors.push(format!("{name} is not an address that resolves"));
                UNSPECIFIED
            }
        }
    }

    /// Hands out the finished configuration, or one error that names every error.
    pub fn finish<T>(self, config: T) -> anyhow::Result<T> {
        if self.errors.is_empty() {
            return Ok(config);
        }
        anyhow::bail!("the configuration is not usable:\n  {}", self.errors.join("\n  "))
    }
}

/// The values of the nearest `.env`; empty where there is none.
fn load_dotenv() -> Result<HashMap<String, String>, String> {
    let here = std::env::current_dir().map_err(|err| format!(".env: {err}"))?;
    match here.ancestors().map(|folder| folder.join(".env")).find(|file| file.exists()) {
        Some(file) => {
            let bytes = fs::read(&file).map_err(|err| format!("{}: {err}", file.display()))?;
            parse_dotenv(&bytes).map_err(|error| format!("{}: {error}", file.display()))
        }
        None => Ok(HashMap::new()),
    }
}

/// Parses lines `NAME=value`. A value is taken literally, without quotes or expansion: the scripts,
/// PM2 and Vagrant read it in the same way, and a password may have any character in it. An error
/// names the line and does not show it, because it may hold a password.
fn parse_dotenv(text: &[u8]) -> Result<HashMap<String, String>, String> {
    if text.starts_with("\u{feff}".as_bytes()) {
        return Err("line 1 begins with a byte order mark; save the file without it".into());
    }
    let mut values = HashMap::new();
    let mut lines: HashMap<&str, usize> = HashMap::new();
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.starts_with(b"#") || line.iter().all(|byte| b" \t".contains(byte)) {
            continue;
        }
        let is_name = |name: &str| {
            name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        let pair = str::from_utf8(line).ok().and_then(|line| line.split_once('='));
        let Some((name, value)) = pair.filter(|(name, _)| is_name(name)) else {
            return Err(format!(
                "line {number} is not NAME=value (no \"export\", no space before \"=\")"
            ));
        };
        if let Some(first) = lines.insert(name, number) {
            return Err(format!("line {number} sets {name} again, which line {first} sets"));
        }
        values.insert(name.to_owned(), value.to_owned());
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &'static [(&'static str, &'static str)]) -> Env {
        Env::from_fn(|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn every_fault_is_reported_at_once_and_no_value_is_shown() {
        let mut env = env(&[("THREADS", "many"), ("PORT", "99999"), ("HOST", "127.0.0.1")]);
        env.secret("PASSWORD");
        env.number("THREADS", 4, 1..=256);
        env.host_port("HOST", "PORT");
        env.host_port("HOST", "OTHER_PORT");
        env.host_port("HOST", "PORT_OF_METRICS");
        let message = env.finish(()).unwrap_err().to_string();
        for error in [
            "PASSWORD is missing",
            "THREADS must be",
            "PORT must be",
            "OTHER_PORT is missing",
            "PORT_OF_METRICS is missing",
        ] {
            assert!(message.contains(error), "{message}");
        }
        assert!(!message.contains("many") && !message.contains("99999"), "{message}");
    }

    #[test]
    fn an_absent_tunable_has_its_default_and_a_set_one_its_value() {
        let mut env =
            env(&[("WAIT_MS", "250"), ("HOST", "::1"), ("BRACKETS", "[::1]"), ("PORT", "80")]);
        assert_eq!(env.millis("WAIT_MS", 5), Duration::from_millis(250));
        assert_eq!(env.number("OTHER", 7u16, 1..=9), 7);
        for host in ["HOST", "BRACKETS"] {
            assert_eq!(env.host_port(host, "PORT"), "[::1]:80".parse().unwrap());
        }
        env.finish(()).unwrap();
    }

    #[test]
    fn values_of_the_file_are_taken_literally() {
        let text =
            "# a comment\n\nPASSWORD=a'b\"c$HOME\\ #d=e \r\nEMPTY=\n \t\nb=\u{2028}é\n_a1=x\r";
        let expected =
            [("PASSWORD", "a'b\"c$HOME\\ #d=e "), ("EMPTY", ""), ("b", "\u{2028}é"), ("_a1", "x")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(parse_dotenv(text.as_bytes()).unwrap(), HashMap::from(expected));
    }

    #[test]
    fn a_line_of_the_file_that_cannot_be_parsed_is_named_and_not_shown() {
        for (text, error) in [
            (
                "A=1\nPASSWORD hunter2",
                "line 2 is not NAME=value (no \"export\", no space before \"=\")",
            ),
            (
                "PASSWORD hunter2=",
                "line 1 is not NAME=value (no \"export\", no space before \"=\")",
            ),
            (
                "export PASSWORD=hunter2",
                "line 1 is not NAME=value (no \"export\", no space before \"=\")",
            ),
            (
                "\u{feff}PASSWORD=hunter2",
                "line 1 begins with a byte order mark; save the file without it",
            ),
            ("=hunter2", "line 1 is not NAME=value (no \"export\", no space before \"=\")"),
            ("PASSWORD=hunter2\nPASSWORD=hunter3", "line 2 sets PASSWORD again, which line 1 sets"),
        ] {
            assert_eq!(parse_dotenv(text.as_bytes()).unwrap_err(), error);
        }
    }

    #[test]
    fn a_secret_does_not_print_itself() {
        let mut env = env(&[("PASSWORD", "hunter2")]);
        let secret = env.secret("PASSWORD");
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert_eq!(secret.expose(), "hunter2");
    }
}
