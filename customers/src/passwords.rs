//! Hashing of passwords, and the rules for new ones.
//!
//! argon2id with the parameters of OWASP's Password Storage Cheat Sheet as defaults. One hash takes a
//! core for some 30 ms and 19 MiB of memory, so only a few are made at once; the others wait for
//! their turn.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use argon2::password_hash::Error as HashError;
use argon2::password_hash::phc::{Output, ParamsString, PasswordHash, Salt};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use chassis::semaphore::{FairSemaphore, SemaphorePermit};
use chassis::{Env, Problem};
use parking_lot::Mutex;
use unicode_normalization::UnicodeNormalization;

/// How long a password may be, in characters of its normal form.
const MIN_CHARACTERS: usize = 8;
const MAX_CHARACTERS: usize = 128;

/// A longer text is not normalised: it cannot be a password. In bytes.
const MAX_BYTES: usize = 16 << 10;

/// A name must have this many characters to be looked for in a password, and the password must have
/// this many besides.
const MIN_NAME_CHARACTERS: usize = 4;

/// How passwords are hashed.
#[derive(Clone, Debug)]
pub struct Config {
    /// Memory, iterations and lanes of one hash.
    pub params: Params,
    /// The most hashes that are made at once.
    pub at_once: usize,
    /// How long a request waits for its turn.
    pub wait: Duration,
}

impl Config {
    /// Reads `CUSTOMERS_ARGON2_MEMORY_KIB`, `_ITERATIONS`, `_PARALLELISM`,
    /// `CUSTOMERS_HASHES_AT_ONCE` and `CUSTOMERS_HASH_WAIT_MS`.
    pub fn from_env(env: &mut Env) -> Config {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let memory = env.number("CUSTOMERS_ARGON2_MEMORY_KIB", 19_456, 64..=1 << 20);
        let iterations = env.number("CUSTOMERS_ARGON2_ITERATIONS", 2, 1..=100);
        let lanes = env.number("CUSTOMERS_ARGON2_PARALLELISM", 1, 1..=8);
        Config {
            // The ranges above are within argon2's own.
            params: Params::new(memory, iterations, lanes, None).unwrap_or_default(),
            at_once: env.number("CUSTOMERS_HASHES_AT_ONCE", cores, 1..=256),
            wait: env.millis("CUSTOMERS_HASH_WAIT_MS", 2000),
        }
    }
}

/// Makes and verifies hashes, a few at once.
pub struct Passwords {
    argon2: Argon2<'static>,
    turns: FairSemaphore,
    wait: Duration,
    /// The memory of former hashes, for the next ones: new pages from the system would cost a tenth of
    /// the time of a hash.
    memory: Mutex<Vec<Vec<Block>>>,
    /// Whether a hash was made since the last [`Passwords::free_unused_memory`].
    is_used: AtomicBool,
    /// Verified in the place of a user's hash where there is no such user. No password fits.
    decoy: String,
}

/// The result of a verification.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Whether it is the password.
    pub matches: bool,
    /// Whether the stored hash was made with other parameters than are set now.
    pub needs_rehash: bool,
}

/// The right to make one hash after the other.
pub struct Turn<'p> {
    passwords: &'p Passwords,
    _permit: SemaphorePermit,
}

impl Passwords {
    /// With these settings.
    pub fn new(config: &Config) -> Passwords {
        let params = &config.params;
        let (memory, iterations, lanes) = (params.m_cost(), params.t_cost(), params.p_cost());
        let decoy = format!(
            "$argon2id$v=19$m={memory},t={iterations},p={lanes}${salt}${hash}",
            salt = "A".repeat(22),
            hash = "A".repeat(43),
        );
        Passwords {
            argon2: Argon2::new(Algorithm::Argon2id, Version::V0x13, params.clone()),
            turns: FairSemaphore::new(config.at_once),
            wait: config.wait,
            memory: Mutex::default(),
            is_used: AtomicBool::new(false),
            decoy,
        }
    }

    /// Waits for a turn; 503 where none comes in time.
    pub fn turn(&self) -> Result<Turn<'_>, Problem> {
        let permit = self.turns.acquire(self.wait).ok_or_else(|| {
            Problem::unavailable("too many passwords are being checked; try again in a moment")
        })?;
        Ok(Turn { passwords: self, _permit: permit })
    }

    /// Gives the memory of hashes back to the system where none was made since the last call.
    pub fn free_unused_memory(&self) {
        if !self.is_used.swap(false, Ordering::Relaxed) {
            self.memory.lock().clear();
        }
    }

    /// The hash of a text, of this length.
    fn output(
        &self,
        argon2: &Argon2,
        text: &[u8],
        salt: &[u8],
        length: usize,
    ) -> Result<Output, HashError> {
        self.is_used.store(true, Ordering::Relaxed);
        let mut memory = self.memory.lock().pop().unwrap_or_default();
        memory.resize(argon2.params().block_count(), Block::new());
        let mut output = [0; Output::MAX_LENGTH];
        let output = output.get_mut(..length).ok_or(HashError::OutputSize)?;
        argon2.hash_password_into_with_memory(text, salt, output, &mut memory)?;
        self.memory.lock().push(memory);
        Ok(Output::new(output)?)
    }
}

impl Turn<'_> {
    /// The hash of a new password, as a PHC string with parameters and salt.
    pub fn hash(&self, password: &str) -> Result<String, Problem> {
        let make = || -> Result<String, HashError> {
            let argon2 = &self.passwords.argon2;
            let normal = normalize(password).unwrap_or_default();
            let salt = Salt::generate();
            let length = Params::DEFAULT_OUTPUT_LEN;
            let output = self.passwords.output(argon2, normal.as_bytes(), &salt, length)?;
            let hash = PasswordHash {
                algorithm: Algorithm::Argon2id.ident(),
                version: Some(Version::V0x13.into()),
                params: ParamsString::try_from(argon2.params())?,
                salt: Some(salt),
                hash: Some(output),
            };
            Ok(hash.to_string())
        };
        make().map_err(|err| Problem::internal().with_cause(err))
    }

    /// Whether a password is the one of the hash `stored`. Without a hash, because there is no such
    /// user, it takes as long and does not match.
    pub fn verify(&self, password: &str, stored: Option<&str>) -> Result<Verdict, Problem> {
        let verify = || -> Result<Verdict, HashError> {
            let normal = normalize(password);
            // What is too long for a password is compared with the decoy, too: it takes as long.
            let stored = stored.filter(|_| normal.is_some()).unwrap_or(&self.passwords.decoy);
            let stored = PasswordHash::new(stored)?;
            let (Some(salt), Some(expected)) = (&stored.salt, &stored.hash) else {
                return Err(HashError::EncodingInvalid);
            };
            let algorithm = Algorithm::try_from(stored.algorithm.as_str())?;
            let version = stored.version.map(Version::try_from).transpose()?.unwrap_or_default();
            let argon2 = Argon2::new(algorithm, version, Params::try_from(&stored)?);
            let normal = normal.unwrap_or_default();
            let output = self.passwords.output(&argon2, normal.as_bytes(), salt, expected.len())?;
            let costs = |params: &Params| (params.m_cost(), params.t_cost(), params.p_cost());
            let wanted = costs(self.passwords.argon2.params());
            // Outputs are compared in constant time.
            let matches = output == *expected;
            Ok(Verdict { matches, needs_rehash: costs(argon2.params()) != wanted })
        };
        verify().map_err(|err| Problem::internal().with_cause(err))
    }
}

/// The form in which a password is hashed: the same password may reach us in different code points,
/// by the keyboard (NIST SP 800-63B section 5.1.1.2). `None` where it is too long.
fn normalize(password: &str) -> Option<String> {
    if password.len() > MAX_BYTES {
        return None;
    }
    let normal: String = password.nfkc().take(MAX_CHARACTERS + 1).collect();
    (normal.chars().count() <= MAX_CHARACTERS).then_some(normal)
}

/// The rule that a new password breaks. `own` are the user's e-mail and names.
pub fn check_new(password: &str, own: &[&str]) -> Result<(), &'static str> {
    let length = normalize(password).map(|normal| normal.chars().count());
    if length.is_none_or(|length| length < MIN_CHARACTERS) {
        return Err("must have 8 to 128 characters");
    }
    let folded = fold(password);
    if [password, folded.as_str()].iter().any(passwords::analyzer::is_common_password) {
        return Err("is one of the most common passwords");
    }
    let mailbox = |name: &str| name.split_once('@').map(|(mailbox, _)| mailbox.to_owned());
    let own = own.iter().flat_map(|name| [Some((*name).to_owned()), mailbox(name)]).flatten();
    if own.into_iter().any(|name| is_mostly(&folded, &fold(&name))) {
        return Err("must not be the e-mail address or a name of the account");
    }
    Ok(())
}

/// Whether a password is a name with hardly anything besides.
fn is_mostly(password: &str, name: &str) -> bool {
    let length = |text: &str| text.chars().count();
    length(name) >= MIN_NAME_CHARACTERS
        && password.contains(name)
        && length(password) - length(name) < MIN_NAME_CHARACTERS
}

fn fold(text: &str) -> String {
    text.nfkc().collect::<String>().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passwords(memory: u32) -> Passwords {
        let params = Params::new(memory, 1, 1, None).unwrap();
        Passwords::new(&Config { params, at_once: 1, wait: Duration::from_millis(1) })
    }

    #[test]
    fn a_password_fits_its_hash_in_every_unicode_form_and_no_other_does() {
        let passwords = passwords(64);
        let turn = passwords.turn().unwrap();
        let hash = turn.hash("Zo\u{eb} liest \u{2460}").unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=64,t=1,p=1$"), "{hash}");
        let verdict = |password: &str| turn.verify(password, Some(&hash)).unwrap();
        assert!(verdict("Zo\u{eb} liest \u{2460}").matches);
        assert!(verdict("Zoe\u{308} liest 1").matches);
        for wrong in ["", "zo\u{eb} liest \u{2460}", "Zo\u{eb} liest \u{2460} "] {
            assert!(!verdict(wrong).matches, "{wrong}");
        }
        assert_ne!(turn.hash("same").unwrap(), turn.hash("same").unwrap());
    }

    #[test]
    fn no_password_fits_an_unknown_user_or_is_cut() {
        let passwords = passwords(64);
        let turn = passwords.turn().unwrap();
        for password in ["", "AAAAAAAAAAAAAAAA", &"x".repeat(100_000)] {
            assert!(!turn.verify(password, None).unwrap().matches);
        }
        let longest = "x".repeat(128);
        let hash = turn.hash(&longest).unwrap();
        assert!(turn.verify(&longest, Some(&hash)).unwrap().matches);
        assert!(!turn.verify(&"x".repeat(129), Some(&hash)).unwrap().matches);
        assert!(!turn.verify(&"x".repeat(127), Some(&hash)).unwrap().matches);
    }

    #[test]
    fn a_hash_of_other_parameters_is_verified_and_to_be_made_again() {
        let (old, new) = (passwords(64), passwords(128));
        let hash = old.turn().unwrap().hash("correct horse").unwrap();
        let verdict = new.turn().unwrap().verify("correct horse", Some(&hash)).unwrap();
        assert_eq!(verdict, Verdict { matches: true, needs_rehash: true });
        let verdict = old.turn().unwrap().verify("correct horse", Some(&hash)).unwrap();
        assert_eq!(verdict, Verdict { matches: true, needs_rehash: false });
    }

    #[test]
    fn who_gets_no_turn_in_time_gets_503_with_retry_after() {
        let passwords = passwords(64);
        let _turn = passwords.turn().unwrap();
        let refused = passwords.turn().err().unwrap();
        assert_eq!(refused.status(), 503);
        let response = refused.into_response("id");
        assert!(response.headers.iter().any(|(name, _)| name == "Retry-After"));
    }

    #[test]
    fn a_new_password_is_long_enough_uncommon_and_not_the_users_own_name() {
        let own = ["Anna.Lindqvist@example.org", "annika", "Lindqvist"];
        for (password, rule) in [
            ("", "8 to 128"),
            ("seven77", "8 to 128"),
            (&"long".repeat(33), "8 to 128"),
            // One character, which becomes eighteen.
            (&"\u{fdfa}".repeat(8), "8 to 128"),
            ("password1", "common"),
            ("PassWord1", "common"),
            ("iloveyou", "common"),
            ("anna.lindqvist@example.org", "a name"),
            ("ANNA.Lindqvist", "a name"),
            ("lindqvist99", "a name"),
            ("12annika", "a name"),
        ] {
            let refused = check_new(password, &own);
            assert!(refused.is_err_and(|text| text.contains(rule)), "{password}: {refused:?}");
        }
        for password in ["a password of ships", "lindqvist and the sea", "ünïcödé-9", "        "]
        {
            assert_eq!(check_new(password, &own), Ok(()), "{password}");
        }
    }
}
