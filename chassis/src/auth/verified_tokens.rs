//! Tokens that were verified before. A signature takes some 50 µs to verify and a look at this
//! table less than one.

use std::hash::{BuildHasher, RandomState};

use parking_lot::Mutex;

use super::Principal;

/// Entries, in about 300 kB. A power of two.
const SLOTS: usize = 4096;

/// A table of fixed size, by a hash of the whole token. Each slot has a lock of its own, so requests
/// do not wait for each other. A token that has the same slot replaces the one before.
pub(super) struct VerifiedTokens {
    slots: Box<[Mutex<Option<VerifiedToken>>]>,
    /// SipHash with two secret keys, new in each process. Together they are 128 bits that cannot be
    /// computed outside this process: no token can be made that is taken for another one.
    hashers: [RandomState; 2],
}

#[derive(Clone, Copy)]
struct VerifiedToken {
    hash: TokenHash,
    /// Which set of keys has verified it.
    generation: u64,
    /// When it expires, in Unix seconds.
    exp: i64,
    principal: Principal,
}

/// The hash of a token, by which it is found.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct TokenHash([u64; 2]);

impl TokenHash {
    fn slot(self) -> usize {
        self.0[0] as usize % SLOTS
    }
}

impl VerifiedTokens {
    pub(super) fn new() -> VerifiedTokens {
        VerifiedTokens {
            slots: (0..SLOTS).map(|_| Mutex::new(None)).collect(),
            hashers: [RandomState::new(), RandomState::new()],
        }
    }

    /// The hash of a token.
    pub(super) fn hash(&self, token: &str) -> TokenHash {
        TokenHash([self.hashers[0].hash_one(token), self.hashers[1].hash_one(token)])
    }

    /// Principal and expiry of a token that the same set of keys has verified.
    pub(super) fn find(&self, hash: TokenHash, generation: u64) -> Option<(Principal, i64)> {
        let found = (*self.slots[hash.slot()].lock())?;
        let is_same = found.hash == hash && found.generation == generation;
        is_same.then_some((found.principal, found.exp))
    }

    /// Remembers a token that was verified.
    pub(super) fn insert(&self, hash: TokenHash, generation: u64, principal: Principal, exp: i64) {
        let verified = VerifiedToken { hash, generation, exp, principal };
        *self.slots[hash.slot()].lock() = Some(verified);
    }
}
