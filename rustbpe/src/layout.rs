//! All distinct words in one array of symbols, one slot a byte, words separated by [`NONE`].
//!
//! A token fills its first and its last slot with its id; with the length of each id known, both neighbours of a token are
//! found in O(1) and no links are stored. Words are sorted by count, so the count at a position comes from a short
//! table of runs.

use std::cmp::Reverse;

use rustc_hash::FxHashMap;

use crate::merge::{MergeError, Pair};
use crate::poll::Poller;
use crate::words::{TooManyWords, WordTable};

/// In the symbols: between two words, and where a token that was swallowed from the left began.
pub const NONE: u32 = u32::MAX;

/// Bytes of a word that are laid out together.
const PART: usize = 1 << 12;

pub struct Layout {
    pub symbols: Vec<u32>,
    pub runs: Runs,
}

impl Layout {
    /// A counting sort: how many slots the words of each count need, and then every word goes to its place.
    pub fn new<E, F: FnMut() -> Result<(), E>>(
        tables: Vec<WordTable>,
        poller: &mut Poller<F>,
    ) -> Result<Self, MergeError<E>> {
        let mut slots_of_count: FxHashMap<u64, usize> = FxHashMap::default();
        for table in &tables {
            for (word, count) in words_with_pairs(table) {
                *slots_of_count.entry(count).or_default() += word.len() + 1;
                poller.step().map_err(MergeError::Caller)?;
            }
        }
        let num_slots = 1 + slots_of_count.values().sum::<usize>();
        if u32::try_from(num_slots).is_err() {
            return Err(MergeError::Words(TooManyWords));
        }
        let mut counts: Vec<u64> = slots_of_count.keys().copied().collect();
        counts.sort_unstable_by_key(|&count| Reverse(count));
        let mut runs = Vec::with_capacity(counts.len());
        let (mut start, mut place_of_count) = (1, slots_of_count);
        for count in counts {
            runs.push((start as u32, count));
            let place = place_of_count.entry(count).or_default();
            start += std::mem::replace(place, start);
        }
        let mut symbols = vec![NONE; num_slots];
        for table in tables {
            for (word, count) in words_with_pairs(&table) {
                let place = place_of_count.entry(count).or_default();
                let slots = &mut symbols[*place..*place + word.len()];
                // In parts: one word may be the whole text.
                for (slots, bytes) in slots.chunks_mut(PART).zip(word.chunks(PART)) {
                    for (slot, &byte) in slots.iter_mut().zip(bytes) {
                        *slot = u32::from(byte);
                    }
                    poller.step_by(bytes.len()).map_err(MergeError::Caller)?;
                }
                *place += word.len() + 1;
            }
        } // a table is dropped as soon as its words are laid out
        let runs = Runs { runs };
        Ok(Self { symbols, runs })
    }

    /// Calls `visit` with each pair of adjacent tokens, its position and its word's count, in ascending order.
    pub fn for_each_pair<E, F: FnMut() -> Result<(), E>>(
        &self,
        lengths: &[u32],
        poller: &mut Poller<F>,
        mut visit: impl FnMut(Pair, u32, u64),
    ) -> Result<(), E> {
        let mut runs = self.runs.cursor();
        let mut position = 1;
        while let Some(&left) = self.symbols.get(position as usize) {
            poller.step()?;
            if left == NONE {
                position += 1; // a word's end
                continue;
            }
            let next = position + lengths[left as usize];
            let right = self.symbols[next as usize];
            if right != NONE {
                visit((left, right), position, runs.count_at(position));
            }
            position = next;
        }
        Ok(())
    }
}

fn words_with_pairs(table: &WordTable) -> impl Iterator<Item = (&[u8], u64)> {
    table.iter().filter(|(word, _)| word.len() > 1)
}

/// The counts of words by position: from each one on, words have this count.
pub struct Runs {
    runs: Vec<(u32, u64)>,
}

impl Runs {
    pub fn cursor(&self) -> RunCursor<'_> {
        RunCursor { runs: &self.runs }
    }
}

/// Walks the runs for ascending positions.
pub struct RunCursor<'a> {
    runs: &'a [(u32, u64)],
}

impl RunCursor<'_> {
    pub fn count_at(&mut self, position: u32) -> u64 {
        if self.runs.len() > 1 && self.runs[1].0 <= position {
            let passed = self.runs.partition_point(|run| run.0 <= position);
            self.runs = &self.runs[passed - 1..];
        }
        self.runs[0].1
    }
}
