//! Words to merges: repeatedly join the adjacent pair with the highest count.
//!
//! All distinct words lie in one array of symbols, one slot a byte, words separated by [`NONE`]. A token fills its first and
//! its last slot with its id; with the length of each id known, both neighbours of a token are found in O(1) and no links are
//! stored. Words are sorted by count, so the count at a position comes from a short table of runs.
//!
//! The index holds, for each pair, its exact count and the positions where it was once seen (some are stale and skipped when
//! the pair is merged). A merge walks its positions in ascending order, which is leftmost-first in each word, and touches only
//! the neighbours. Old pairs only lose counts, so heap entries are upper bounds: an entry that is too high is
//! corrected when it comes to the top, and the entry taken is always the true maximum.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::BinaryHeap;
use std::time::Instant;

use rustc_hash::FxHashMap;

use crate::count::{WordCounts, POLL};

/// Two adjacent token ids, left and right.
pub type Pair = (u32, u32);

/// The first 256 ids are the single bytes.
pub const NUM_BYTES: usize = 256;

/// In the symbols: between two words, and where a token that was swallowed from the left began.
const NONE: u32 = u32::MAX;

/// Why merging ended early. `E` is the caller's own error, from polling.
#[derive(Debug)]
pub enum MergeError<E> {
    Caller(E),
    /// The distinct words have more bytes than positions of 32 bits can number.
    TooManyWords,
}

struct Occurrences {
    count: u64,
    positions: Vec<u32>, // ascending; a superset of the places where the pair is now
}

/// What one merge does to the pairs with one neighbouring token.
#[derive(Default)]
struct Neighbour {
    count: u64,
    positions: Vec<u32>,
}

struct Words {
    symbols: Vec<u32>,
    runs: Vec<(u32, u64)>, // from this position on, words have this count
}

/// The merges in order; merge i makes id 256 + i. Fewer than `max_merges` when no pair is left.
///
/// Ties go to the smaller pair of ids. `poll` is called about every [`POLL`]; its error ends the training.
pub fn find_merges<E>(
    words: WordCounts,
    max_merges: usize,
    mut poll: impl FnMut() -> Result<(), E>,
) -> Result<Vec<Pair>, MergeError<E>> {
    let words = lay_out(words).ok_or(MergeError::TooManyWords)?;
    let mut trainer = Trainer::new(words);
    let mut merges = Vec::new();
    let mut polled = Instant::now();
    while merges.len() < max_merges {
        let Some((pair, occurrences)) = trainer.pop_most_frequent() else {
            break;
        };
        trainer.merge(pair, &occurrences.positions);
        merges.push(pair);
        if polled.elapsed() >= POLL {
            poll().map_err(MergeError::Caller)?;
            polled = Instant::now();
        }
    }
    Ok(merges)
}

fn lay_out(words: WordCounts) -> Option<Words> {
    let mut order: Vec<u32> = (0..words.len() as u32)
        .filter(|&i| words.word(i as usize).len() > 1)
        .collect();
    order.sort_by_key(|&i| Reverse(words.count(i as usize)));
    let bytes: usize = order.iter().map(|&i| words.word(i as usize).len()).sum();
    let num_symbols = bytes + order.len() + 1;
    u32::try_from(num_symbols).ok()?;
    let mut symbols = Vec::with_capacity(num_symbols);
    let mut runs: Vec<(u32, u64)> = Vec::new();
    symbols.push(NONE);
    for &i in &order {
        let count = words.count(i as usize);
        if runs.last().is_none_or(|run| run.1 != count) {
            runs.push((symbols.len() as u32, count));
        }
        symbols.extend(words.word(i as usize).iter().map(|&byte| u32::from(byte)));
        symbols.push(NONE);
    }
    Some(Words { symbols, runs })
}

/// Walks the runs for ascending positions.
struct RunCursor<'a> {
    runs: &'a [(u32, u64)],
}

impl RunCursor<'_> {
    fn count_at(&mut self, position: u32) -> u64 {
        if self.runs.len() > 1 && self.runs[1].0 <= position {
            let passed = self.runs.partition_point(|run| run.0 <= position);
            self.runs = &self.runs[passed - 1..];
        }
        self.runs[0].1
    }
}

struct Trainer {
    words: Words,
    lengths: Vec<u32>, // bytes of each id
    index: FxHashMap<u64, Occurrences>,
    heap: BinaryHeap<(u64, Reverse<u64>)>, // (at least the pair's count, key)
    left: Vec<Neighbour>,                  // by id; empty between two merges
    right: Vec<Neighbour>,
    left_seen: Vec<u32>,
    right_seen: Vec<u32>,
}

/// Keys order as their pairs do.
fn key(pair: Pair) -> u64 {
    u64::from(pair.0) << 32 | u64::from(pair.1)
}

impl Trainer {
    fn new(words: Words) -> Self {
        let mut pairs: Vec<Neighbour> = Vec::new();
        pairs.resize_with(NUM_BYTES * NUM_BYTES, Neighbour::default);
        for pass in 0..2 {
            // The first pass counts places, so that the second one allocates each list once.
            let mut cursor = RunCursor { runs: &words.runs };
            for (position, two) in words.symbols.windows(2).enumerate() {
                if two[0] == NONE || two[1] == NONE {
                    continue;
                }
                let pair = &mut pairs[two[0] as usize * NUM_BYTES + two[1] as usize];
                if pass == 0 {
                    pair.count += 1;
                    continue;
                }
                if pair.positions.is_empty() {
                    pair.positions.reserve_exact(pair.count as usize);
                    pair.count = 0;
                }
                pair.count += cursor.count_at(position as u32);
                pair.positions.push(position as u32);
            }
        }
        let mut index = FxHashMap::default();
        let mut heap = BinaryHeap::new();
        for (i, pair) in pairs.into_iter().enumerate() {
            if pair.count > 0 {
                let key = key(((i / NUM_BYTES) as u32, (i % NUM_BYTES) as u32));
                heap.push((pair.count, Reverse(key)));
                let (count, positions) = (pair.count, pair.positions);
                index.insert(key, Occurrences { count, positions });
            }
        }
        let mut trainer = Self {
            words,
            lengths: vec![1; NUM_BYTES],
            index,
            heap,
            left: Vec::new(),
            right: Vec::new(),
            left_seen: Vec::new(),
            right_seen: Vec::new(),
        };
        trainer.left.resize_with(NUM_BYTES, Neighbour::default);
        trainer.right.resize_with(NUM_BYTES, Neighbour::default);
        trainer
    }

    /// Takes the pair with the highest count (ties: the smallest pair) out of the index.
    fn pop_most_frequent(&mut self) -> Option<(Pair, Occurrences)> {
        loop {
            let mut top = self.heap.peek_mut()?;
            let (claimed, Reverse(key)) = *top;
            match self.index.get(&key) {
                Some(pair) if pair.count == claimed => {
                    PeekMut::pop(top);
                    let pair = ((key >> 32) as u32, key as u32);
                    return self.index.remove(&key).map(|found| (pair, found));
                }
                Some(pair) => top.0 = pair.count, // sifts down when `top` is dropped
                None => {
                    PeekMut::pop(top);
                }
            }
        }
    }

    /// Joins `pair` into a new id wherever it still stands, and brings the index up to date.
    fn merge(&mut self, (a, b): Pair, positions: &[u32]) {
        let new = self.lengths.len() as u32;
        let (a_length, b_length) = (self.lengths[a as usize], self.lengths[b as usize]);
        self.lengths.push(a_length + b_length);
        self.left.push(Neighbour::default());
        self.right.push(Neighbour::default());
        let symbols = &mut self.words.symbols;
        let mut cursor = RunCursor {
            runs: &self.words.runs,
        };
        for &position in positions {
            let middle = position + a_length;
            // Sound although slots inside a token keep old ids: the first slot of a swallowed token is overwritten below,
            // always with an id above `a` or NONE, so it can never read `a` again.
            if symbols[position as usize] != a || symbols[middle as usize] != b {
                continue;
            }
            let end = middle + b_length;
            let count = cursor.count_at(position);
            let (before, after) = (symbols[position as usize - 1], symbols[end as usize]);
            if before != NONE {
                let neighbour = &mut self.left[before as usize];
                if neighbour.count == 0 {
                    self.left_seen.push(before);
                }
                neighbour.count += count;
                let start = position - self.lengths[before as usize];
                neighbour.positions.push(start);
            }
            if after != NONE {
                let neighbour = &mut self.right[after as usize];
                if neighbour.count == 0 {
                    self.right_seen.push(after);
                }
                neighbour.count += count;
                neighbour.positions.push(position);
            }
            symbols[middle as usize] = NONE;
            symbols[position as usize] = new;
            symbols[end as usize - 1] = new;
        }
        self.update_index((a, b), new);
    }

    /// For each neighbour of the new token: its pair with the new token gains what its pair with the old one loses.
    fn update_index(&mut self, (a, b): Pair, new: u32) {
        let (left_seen, right_seen) = (
            std::mem::take(&mut self.left_seen),
            std::mem::take(&mut self.right_seen),
        );
        let mut lost = Vec::with_capacity(left_seen.len() + right_seen.len());
        let mut gained = Vec::with_capacity(lost.capacity());
        for &id in &left_seen {
            let Neighbour { count, positions } = std::mem::take(&mut self.left[id as usize]);
            lost.push((key((id, a)), count));
            gained.push(key((id, new)));
            self.index
                .insert(key((id, new)), Occurrences { count, positions });
        }
        for &id in &right_seen {
            let Neighbour { count, positions } = std::mem::take(&mut self.right[id as usize]);
            lost.push((key((b, id)), count));
            gained.push(key((new, id)));
            self.index
                .insert(key((new, id)), Occurrences { count, positions });
        }
        // Gains first: in "abab" the second merge takes (new, a) away again, which the first one brought.
        for (key, count) in lost {
            if let Some(pair) = self.index.get_mut(&key) {
                pair.count -= count;
                if pair.count == 0 {
                    self.index.remove(&key);
                }
            }
        }
        for key in gained {
            if let Some(pair) = self.index.get(&key) {
                self.heap.push((pair.count, Reverse(key)));
            }
        }
        self.left_seen = left_seen;
        self.right_seen = right_seen;
        self.left_seen.clear();
        self.right_seen.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn join(word: &[u32], pair: Pair, new: u32) -> Vec<u32> {
        let mut out = Vec::new();
        let mut i = 0;
        while i < word.len() {
            if i + 1 < word.len() && (word[i], word[i + 1]) == pair {
                out.push(new);
                i += 2;
            } else {
                out.push(word[i]);
                i += 1;
            }
        }
        out
    }

    fn naive(words: &[(Vec<u8>, u64)], max_merges: usize) -> Vec<Pair> {
        let mut words: Vec<(Vec<u32>, u64)> = words
            .iter()
            .map(|(word, count)| (word.iter().map(|&byte| u32::from(byte)).collect(), *count))
            .collect();
        let mut merges = Vec::new();
        while merges.len() < max_merges {
            let mut counts: BTreeMap<Pair, u64> = BTreeMap::new();
            for (word, count) in &words {
                for two in word.windows(2) {
                    *counts.entry((two[0], two[1])).or_default() += count;
                }
            }
            let best = counts
                .iter()
                .max_by_key(|(&pair, &count)| (count, Reverse(pair)));
            let Some((&pair, _)) = best else { break };
            let new = (NUM_BYTES + merges.len()) as u32;
            for (word, _) in &mut words {
                *word = join(word, pair, new);
            }
            merges.push(pair);
        }
        merges
    }

    fn fast(words: &[(Vec<u8>, u64)], max_merges: usize) -> Vec<Pair> {
        let mut counts = WordCounts::default();
        for (word, count) in words {
            counts.add(word, *count);
        }
        find_merges(counts, max_merges, || Ok::<(), ()>(())).unwrap()
    }

    proptest! {
        #[test]
        fn merges_are_those_of_the_naive_algorithm(
            words in prop::collection::vec((prop::collection::vec(97u8..100, 1..14), 1u64..5), 0..30),
            max_merges in 0usize..60,
        ) {
            prop_assert_eq!(fast(&words, max_merges), naive(&words, max_merges));
        }
    }

    #[test]
    fn runs_of_one_byte_merge_from_the_left() {
        let words = [(b"aaaaaaa".to_vec(), 3), (b"aaaa".to_vec(), 1)];
        assert_eq!(fast(&words, 9), naive(&words, 9));
        assert_eq!(fast(&words, 2), [(97, 97), (256, 256)]);
    }

    #[test]
    fn ties_go_to_the_smaller_pair() {
        let words = [
            (b"zy".to_vec(), 2),
            (b"bz".to_vec(), 2),
            (b"ba".to_vec(), 2),
        ];
        assert_eq!(fast(&words, 3), [(98, 97), (98, 122), (122, 121)]);
    }

    #[test]
    fn merging_ends_when_no_pair_is_left() {
        assert_eq!(
            fast(&[(b"ab".to_vec(), 1), (b"c".to_vec(), 9)], 50),
            [(97, 98)]
        );
        assert!(fast(&[], 50).is_empty());
    }
}
