//! Tokens that were verified before. A signature takes some 50 µs to verify and a look at this
//! table some 2, most of it for the hash.

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::Principal;

/// Entries, in about 360 kB. A power of two.
const SLOTS: usize = 4096;

/// A table of fixed size, by the SHA-256 of the whole token. Each slot has a lock of its own, so
/// requests do not wait for each other. A token that has the same slot replaces the one before.
pub(super) struct VerifiedTokens {
    slots: Box<[Mutex<Option<VerifiedToken>>]>,
}

#[derive(Clone, Copy)]
struct VerifiedToken {
    hash: [u8; 32],
    /// Which set of keys has verified it.
    generation: u64,
    /// When it expires, in Unix seconds.
    exp: i64,
    principal: Principal,
}

/// The hash of a token, by which it is found.
#[derive(Clone, Copy)]
pub(super) struct TokenHash([u8; 32]);

impl TokenHash {
    pub(super) fn of(token: &str) -> TokenHash {
        TokenHash(Sha256::digest(token).into())
    }

    fn slot(self) -> usize {
        let [first, second, ..] = self.0;
        usize::from(u16::from_le_bytes([first, second])) % SLOTS
    }
}

impl VerifiedTokens {
    pub(super) fn new() -> VerifiedTokens {
        VerifiedTokens { slots: (0..SLOTS).map(|_| Mutex::new(None)).collect() }
    }

    /// Principal and expiry of a token that the same set of keys has verified.
    pub(super) fn find(&self, hash: TokenHash, generation: u64) -> Option<(Principal, i64)> {
        let found = (*self.slots[hash.slot()].lock())?;
        let is_same = found.hash == hash.0 && found.generation == generation;
        is_same.then_some((found.principal, found.exp))
    }

    /// Remembers a token that was verified.
    pub(super) fn insert(&self, hash: TokenHash, generation: u64, principal: Principal, exp: i64) {
        let verified = VerifiedToken { hash: hash.0, generation, exp, principal };
        *self.slots[hash.slot()].lock() = Some(verified);
    }
}
