//! Configuration from the environment, and from `.env` where one is found.
//!
//! A service reads every variable once, at start, through one [`Env`], which
//! collects what is missing or malformed so that all of it is reported at once.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

/// A value that must not be printed.
#[derive(Clone, Default)]
pub struct Secret(String);

impl Secret {
    /// The value itself: the one way out.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

type Lookup = dyn Fn(&str) -> Option<String>;

/// Reads variables and remembers every fault until [`Env::finish`].
pub struct Env {
    lookup: Box<Lookup>,
    faults: Vec<String>,
}

impl Env {
    /// The environment of this process, completed by the nearest `.env` at or
    /// above the current directory. A variable that is set wins over the file.
    pub fn load() -> Env {
        let mut env = Env::of(|name| std::env::var(name).ok());
        match dotenvy::dotenv() {
            Err(err) if !err.not_found() => env.faults.push(env_file_fault(&err)),
            _ => (),
        }
        env
    }

    /// Variables from `lookup` instead of the process.
    pub fn of(lookup: impl Fn(&str) -> Option<String> + 'static) -> Env {
        Env { lookup: Box::new(lookup), faults: Vec::new() }
    }

    /// A required text.
    pub fn text(&mut self, name: &str) -> String {
        self.optional(name).unwrap_or_else(|| {
            self.faults.push(format!("{name} is missing"));
            String::new()
        })
    }

    /// A text that may be absent.
    pub fn optional(&mut self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    /// Adds a fault that only the caller can see, named after its variable.
    pub fn fault(&mut self, fault: &str) {
        self.faults.push(fault.to_owned());
    }

    /// A required credential.
    pub fn secret(&mut self, name: &str) -> Secret {
        Secret(self.text(name))
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
                self.faults.push(format!("{name} must be a whole number from {low} to {high}"));
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
        let value = self.text(name);
        self.resolve(name, &value)
    }

    /// A required address in two variables, a host and a port.
    pub fn host_port(&mut self, host: &str, port: &str) -> SocketAddr {
        let number = self.number(port, 0, 1..=u16::MAX);
        if number == 0 {
            let fault = format!("{port} is missing");
            if !self.faults.iter().any(|known| known.starts_with(port)) {
                self.faults.push(fault);
            }
        }
        let name = self.text(host);
        // An IPv6 address needs its brackets before a port can follow.
        let joined = if name.contains(':') {
            format!("[{name}]:{number}")
        } else {
            format!("{name}:{number}")
        };
        self.resolve(host, &joined)
    }

    fn resolve(&mut self, name: &str, value: &str) -> SocketAddr {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        if value.is_empty() || value.starts_with(':') {
            return nowhere;
        }
        match value.to_socket_addrs().ok().and_then(|mut found| found.next()) {
            Some(address) => address,
            None => {
                self.faults.push(format!("{name} is not an address that resolves"));
                nowhere
            }
        }
    }

    /// Hands out the finished configuration, or one error that names every fault.
    pub fn finish<T>(self, config: T) -> anyhow::Result<T> {
        if self.faults.is_empty() {
            return Ok(config);
        }
        anyhow::bail!("the configuration is not usable:\n  {}", self.faults.join("\n  "))
    }
}

/// dotenvy shows the whole line that it cannot read, which may hold a password.
fn env_file_fault(err: &dotenvy::Error) -> String {
    match err {
        dotenvy::Error::LineParse(line, _) => match line.split_once('=') {
            Some((name, _))
                if name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_') =>
            {
                format!(".env: the value of {name} cannot be read")
            }
            _ => ".env: a line is not NAME=value".to_owned(),
        },
        other => format!(".env: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &'static [(&'static str, &'static str)]) -> Env {
        Env::of(|name| {
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
        let message = env.finish(()).unwrap_err().to_string();
        for fault in ["PASSWORD is missing", "THREADS must be", "PORT must be"] {
            assert!(message.contains(fault), "{message}");
        }
        assert!(!message.contains("many") && !message.contains("99999"), "{message}");
    }

    #[test]
    fn an_absent_tunable_has_its_default_and_a_set_one_its_value() {
        let mut env = env(&[("WAIT_MS", "250"), ("HOST", "::1"), ("PORT", "80")]);
        assert_eq!(env.millis("WAIT_MS", 5), Duration::from_millis(250));
        assert_eq!(env.number("OTHER", 7u16, 1..=9), 7);
        assert_eq!(env.host_port("HOST", "PORT"), "[::1]:80".parse().unwrap());
        env.finish(()).unwrap();
    }

    #[test]
    fn a_line_of_the_file_that_cannot_be_read_is_named_and_not_shown() {
        for (line, fault) in [
            ("PASSWORD=hunter2 'x", ".env: the value of PASSWORD cannot be read"),
            ("PASSWORD hunter2", ".env: a line is not NAME=value"),
            ("PASSWORD hunter2=", ".env: a line is not NAME=value"),
        ] {
            let err = dotenvy::Iter::new(line.as_bytes()).next().unwrap().unwrap_err();
            assert!(err.to_string().contains("hunter2"), "what it is about: {err}");
            assert_eq!(env_file_fault(&err), fault);
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
