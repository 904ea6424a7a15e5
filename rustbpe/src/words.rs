//! Distinct words with their counts: a small table a thread, and one set of tables that all threads share.
//!
//! Most words of any text are few and short. A thread counts words of up to 15 bytes in a table whose entries are the words
//! themselves, 24 bytes each, so a lookup touches one cache line; the keys of some hundred words are collected first
//! and looked up together, so that the processor waits for many of them at once. When a table is full, it is emptied
//! into the shared ones. Memory is then one copy of each distinct word and a few megabytes a thread.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;

/// Words up to this length are their own key: 15 bytes and the length.
const SHORT_BYTES: usize = 15;
const KEY_BYTES: usize = SHORT_BYTES + 1;
const PENDING_WORDS: usize = 512;
const FIRST_SLOTS: usize = 1 << 11;
/// 3 MiB of entries, for some 80,000 words: about as many as 8 MB of English have.
const MOST_SLOTS: usize = 1 << 17;
/// A thread's long words are given away when they have more bytes than this.
const MOST_LONG_BYTES: usize = 2 << 20;
const SHARD_BITS: u32 = 5;

/// A word's bytes, zeros, and its length: no two words have the same, and none has zeros only.
type Key = [u64; 2];

fn key_of(window: [u8; KEY_BYTES], length: usize) -> Key {
    // Not a loop over the word's bytes but a mask for what is not of the word.
    let bytes = u128::from_le_bytes(window) & ((1 << (8 * length)) - 1);
    let key = bytes | (length as u128) << (8 * SHORT_BYTES);
    [key as u64, (key >> 64) as u64]
}

fn bytes_of(key: Key) -> [u8; KEY_BYTES] {
    (u128::from(key[0]) | u128::from(key[1]) << 64).to_le_bytes()
}

/// Bytes to a number, with a secret of each training: nobody can write a text of which all words collide.
#[derive(Clone, Copy)]
struct Hasher {
    secret: [u64; 2],
}

impl Hasher {
    fn new() -> Self {
        let random = RandomState::new();
        let secret = [random.hash_one(0), random.hash_one(1)];
        Self { secret }
    }

    fn of_key(self, key: Key) -> u64 {
        fold(key[0] ^ self.secret[0], key[1] ^ self.secret[1])
    }

    fn of_word(self, word: &[u8]) -> u64 {
        if word.len() <= SHORT_BYTES {
            let mut window = [0; KEY_BYTES];
            window[..word.len()].copy_from_slice(word);
            return self.of_key(key_of(window, word.len()));
        }
        let (chunks, rest) = word.as_chunks::<8>();
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        let mut hash = self.secret[0] ^ word.len() as u64;
        for chunk in chunks.iter().chain([&last]) {
            hash = fold(hash ^ u64::from_le_bytes(*chunk), self.secret[1]);
        }
        hash
    }
}

/// Both halves of the product, in one number.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// Words of any length, interned in one arena: a word costs its bytes and about 20 more.
#[derive(Default)]
pub struct WordTable {
    arena: Vec<u8>,
    ends: Vec<u32>, // word i is arena[ends[i-1]..ends[i]]
    counts: Vec<u64>,
    table: HashTable<u32>,
    overflow: bool, // a word was left out: the arena would have more than 4 GiB
}

impl WordTable {
    fn add(&mut self, word: &[u8], hash: u64, count: u64, hasher: Hasher) {
        // The highest bits name the shard, so they are alike in a table; hashbrown's tags must not be.
        let mixed = |hash: u64| hash.rotate_left(32);
        let (arena, ends) = (&self.arena, &self.ends);
        let same = |&index: &u32| word_at(arena, ends, index as usize) == word;
        if let Some(&index) = self.table.find(mixed(hash), same) {
            self.counts[index as usize] += count;
            return;
        }
        let Ok(end) = u32::try_from(arena.len() + word.len()) else {
            self.overflow = true;
            return;
        };
        let index = ends.len() as u32; // below `end`: no word is empty
        self.arena.extend_from_slice(word);
        self.ends.push(end);
        self.counts.push(count);
        let (arena, ends) = (&self.arena, &self.ends);
        self.table.insert_unique(mixed(hash), index, |&index| {
            mixed(hasher.of_word(word_at(arena, ends, index as usize)))
        });
    }

    fn clear(&mut self) {
        self.arena.clear();
        self.ends.clear();
        self.counts.clear();
        self.table.clear();
    }

    /// The number of distinct words.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Each word with its count.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        let words = (0..self.ends.len()).map(|index| word_at(&self.arena, &self.ends, index));
        words.zip(self.counts.iter().copied())
    }
}

fn word_at<'a>(arena: &'a [u8], ends: &[u32], index: usize) -> &'a [u8] {
    let start = if index == 0 { 0 } else { ends[index - 1] };
    &arena[start as usize..ends[index] as usize]
}

/// The distinct words have more bytes than positions of 32 bits can number.
#[derive(Debug)]
pub struct TooManyWords;

/// What all threads counted, in shards by hash, so that threads seldom wait for each other.
pub struct SharedWords {
    hasher: Hasher,
    shards: Vec<Mutex<WordTable>>,
}

impl Default for SharedWords {
    fn default() -> Self {
        let shards = (0..1 << SHARD_BITS).map(|_| Mutex::default()).collect();
        let hasher = Hasher::new();
        Self { hasher, shards }
    }
}

impl SharedWords {
    /// Adds one word, which is not empty. For many there is [`LocalWords`].
    pub fn add(&self, word: &[u8], count: u64) {
        let hash = self.hasher.of_word(word);
        self.lock(shard_of(hash))
            .add(word, hash, count, self.hasher);
    }

    /// The tables; no word is in two of them.
    pub fn into_tables(self) -> Result<Vec<WordTable>, TooManyWords> {
        let shards = self.shards.into_iter();
        let tables: Vec<WordTable> = shards
            .map(|shard| shard.into_inner().unwrap_or_else(PoisonError::into_inner))
            .collect();
        match tables.iter().any(|table| table.overflow) {
            true => Err(TooManyWords),
            false => Ok(tables),
        }
    }

    fn lock(&self, shard: usize) -> MutexGuard<'_, WordTable> {
        // A poisoned table is that of a worker that panicked: the training fails when it is joined.
        let shard = &self.shards[shard];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shard_of(hash: u64) -> usize {
    (hash >> (u64::BITS - SHARD_BITS)) as usize
}

#[derive(Clone, Copy, Default)]
struct Entry {
    key: Key,
    count: u64, // 0 where there is none
}

/// One thread's words, on their way to [`SharedWords`].
pub struct LocalWords<'s> {
    shared: &'s SharedWords,
    pending: Vec<Key>,
    entries: Vec<Entry>, // a power of two of them; linear probing from the highest bits of the hash
    used: usize,
    long: WordTable,
}

impl<'s> LocalWords<'s> {
    pub fn new(shared: &'s SharedWords) -> Self {
        Self {
            shared,
            pending: Vec::with_capacity(PENDING_WORDS),
            entries: vec![Entry::default(); FIRST_SLOTS],
            used: 0,
            long: WordTable::default(),
        }
    }

    /// Counts the word `text[start..end]`, which is not empty.
    #[inline]
    pub fn add(&mut self, text: &[u8], start: usize, end: usize) {
        let length = end - start;
        if length > SHORT_BYTES {
            self.add_long(&text[start..end]);
            return;
        }
        let window = match text[start..].first_chunk::<KEY_BYTES>() {
            Some(window) => *window, // one load, reaching into what follows
            None => {
                let mut window = [0; KEY_BYTES];
                window[..length].copy_from_slice(&text[start..end]);
                window
            }
        };
        self.pending.push(key_of(window, length));
        if self.pending.len() == PENDING_WORDS {
            self.settle();
        }
    }

    #[cold]
    fn add_long(&mut self, word: &[u8]) {
        let hasher = self.shared.hasher;
        self.long.add(word, hasher.of_word(word), 1, hasher);
        if self.long.arena.len() > MOST_LONG_BYTES {
            self.give_long();
        }
    }

    /// Looks up the pending words: independent of each other, so their cache misses overlap.
    fn settle(&mut self) {
        if (self.used + PENDING_WORDS) * 3 > self.entries.len() * 2 {
            self.make_room();
        }
        for &key in &self.pending {
            let slot = slot_of(&self.entries, self.shared.hasher, key);
            let entry = &mut self.entries[slot];
            self.used += usize::from(entry.count == 0);
            entry.key = key;
            entry.count += 1;
        }
        self.pending.clear();
    }

    /// Leaves room for at least as many words as can be pending.
    #[cold]
    fn make_room(&mut self) {
        if self.entries.len() == MOST_SLOTS {
            self.give_short();
            return;
        }
        let larger = vec![Entry::default(); self.entries.len() * 4];
        for entry in std::mem::replace(&mut self.entries, larger) {
            if entry.count > 0 {
                let slot = slot_of(&self.entries, self.shared.hasher, entry.key);
                self.entries[slot] = entry;
            }
        }
    }

    /// Gives all words to the shared tables; call it at the end.
    pub fn give(&mut self) {
        self.settle();
        self.give_short();
        self.give_long();
    }

    /// The slots are in the order of the hashes and so in that of the shards: one lock a shard, not one a word.
    fn give_short(&mut self) {
        let (shared, mut held) = (self.shared, None);
        for entry in self.entries.iter_mut().filter(|entry| entry.count > 0) {
            let Entry { key, count } = std::mem::take(entry);
            let hash = shared.hasher.of_key(key);
            let shard = shard_of(hash);
            let table = match &mut held {
                Some((of, table)) if *of == shard => table,
                _ => {
                    held = None; // unlocks: a thread that holds one never waits for another
                    &mut held.insert((shard, shared.lock(shard))).1
                }
            };
            let bytes = bytes_of(key);
            let length = usize::from(bytes[SHORT_BYTES]);
            table.add(&bytes[..length], hash, count, shared.hasher);
        }
        self.used = 0;
    }

    fn give_long(&mut self) {
        for (word, count) in self.long.iter() {
            self.shared.add(word, count);
        }
        self.shared.lock(0).overflow |= self.long.overflow;
        self.long.clear();
    }
}

/// Where `key` is, or is to be.
#[inline]
fn slot_of(entries: &[Entry], hasher: Hasher, key: Key) -> usize {
    let mask = entries.len() - 1;
    let mut slot = (hasher.of_key(key) >> (u64::BITS - entries.len().trailing_zeros())) as usize;
    while entries[slot & mask].key != key && entries[slot & mask].count > 0 {
        slot += 1;
    }
    slot & mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn counted(shared: SharedWords) -> BTreeMap<Vec<u8>, u64> {
        let mut words = BTreeMap::new();
        for table in shared.into_tables().unwrap() {
            for (word, count) in table.iter() {
                assert!(
                    words.insert(word.to_vec(), count).is_none(),
                    "a word is there twice"
                );
            }
        }
        words
    }

    fn plainly(words: &[Vec<u8>]) -> BTreeMap<Vec<u8>, u64> {
        let mut counts = BTreeMap::new();
        for word in words {
            *counts.entry(word.clone()).or_default() += 1;
        }
        counts
    }

    fn by_tables(words: &[Vec<u8>]) -> BTreeMap<Vec<u8>, u64> {
        let shared = SharedWords::default();
        let mut local = LocalWords::new(&shared);
        let text = words.concat();
        let mut start = 0;
        for word in words {
            local.add(&text, start, start + word.len());
            start += word.len();
        }
        local.give();
        drop(local);
        counted(shared)
    }

    proptest! {
        #[test]
        fn counts_are_those_of_a_plain_map(
            words in prop::collection::vec(prop::collection::vec(0u8..3, 1..40), 0..200),
        ) {
            prop_assert_eq!(by_tables(&words), plainly(&words));
        }
    }

    #[test]
    fn words_that_fill_the_table_many_times_are_all_counted() {
        let number = |i: u32| (i % 300_000).to_string().into_bytes();
        let words: Vec<Vec<u8>> = (0..700_000).map(number).collect();
        assert_eq!(by_tables(&words), plainly(&words));
    }

    #[test]
    fn many_long_words_are_all_counted() {
        let words: Vec<Vec<u8>> = (0..9_000u32)
            .map(|i| (i % 8_000).to_string().repeat(300).into_bytes())
            .collect();
        assert_eq!(by_tables(&words), plainly(&words));
    }

    #[test]
    fn a_word_and_its_copy_with_zeros_behind_are_two() {
        let words: Vec<Vec<u8>> = (1..17).map(|length| vec![0; length]).collect();
        assert_eq!(by_tables(&words).len(), 16);
    }
}
