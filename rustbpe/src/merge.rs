//! Words to merges: repeatedly join the adjacent pair with the highest count.
//!
//! The index holds, for each pair, its exact count and the positions where it was once seen (some are stale and skipped when
//! the pair is merged). A merge walks its positions in ascending order, which is leftmost-first in each word, and touches only
//! the neighbours.
//!
//! Counts of pairs only fall, and a pair that a merge brings is at most as frequent as the merged one. So the highest count
//! never rises, and pairs far below it need not be known yet: the index holds those at or above a floor only. When none is left,
//! the floor is lowered and the words are read again, some log(highest count) times in all. For the same reason
//! heap entries are upper bounds: one that is too high is corrected when it comes to the top, and the entry taken is always the
//! true maximum.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::hash_map::Entry;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::layout::{Layout, NONE};
use crate::neighbours::{Neighbour, Occurrences, Side};
use crate::poll::Poller;
use crate::words::{TooManyWords, WordTable};

/// Two adjacent token ids, left and right.
pub type Pair = (u32, u32);

/// The first 256 ids are the single bytes.
pub const NUM_BYTES: usize = 256;

/// The floor is the highest count divided by this, or higher. Measured on 158 MB of English with 65,280 merges: 8 reads the
/// words seven times and merges in 0.60 s, 256 three times in 0.45 s; without a floor the index takes 10 MB more.
const FLOOR_DIVISOR: u64 = 256;

/// So many pairs may be indexed beyond the number of merges that are left.
const SPARE_PAIRS: usize = 1024;

/// Positions that are looked at together.
const BLOCK: usize = 256;

/// Why merging ended early. `E` is the caller's own error, from polling.
#[derive(Debug)]
pub enum MergeError<E> {
    Caller(E),
    Words(TooManyWords),
}

/// The merges in order; merge i makes id 256 + i. Fewer than `max_merges` when no pair is left.
///
/// Ties go to the smaller pair of ids. `poll` is called about every [`POLL`](crate::poll::POLL); its error ends the training.
pub fn find_merges<E>(
    words: Vec<WordTable>,
    max_merges: usize,
    poll: impl FnMut() -> Result<(), E>,
) -> Result<Vec<Pair>, MergeError<E>> {
    let mut poller = Poller::new(poll);
    let layout = Layout::new(words, &mut poller)?;
    let mut trainer = Trainer::new(layout);
    let merges = trainer.run(max_merges, &mut poller);
    merges.map_err(MergeError::Caller)
}

struct Trainer {
    layout: Layout,
    lengths: Vec<u32>, // bytes of each id
    reads: u32,        // how often the words were read for the index
    floor: u64,        // the index holds the pairs with at least this count, and no others
    index: FxHashMap<u64, Occurrences>,
    heap: BinaryHeap<(u64, Reverse<u64>)>, // (at least the pair's count, key)
    left: Side,
    right: Side,
}

/// Keys order as their pairs do.
fn key(pair: Pair) -> u64 {
    u64::from(pair.0) << 32 | u64::from(pair.1)
}

/// The floor for pairs of these counts: 1 at least, and never above the highest.
fn floor_for(counts: &mut [u64], max_pairs: usize) -> u64 {
    let highest = counts.iter().copied().max().unwrap_or(0);
    let floor = (highest / FLOOR_DIVISOR).max(1);
    if counts.len() <= max_pairs {
        return floor;
    }
    let (_, &mut last, _) = counts.select_nth_unstable_by_key(max_pairs, |&count| Reverse(count));
    floor.max(last)
}

impl Trainer {
    fn new(layout: Layout) -> Self {
        let mut trainer = Self {
            layout,
            lengths: Vec::new(),
            reads: 0,
            floor: u64::MAX,
            index: FxHashMap::default(),
            heap: BinaryHeap::new(),
            left: Side::default(),
            right: Side::default(),
        };
        (0..NUM_BYTES).for_each(|_| trainer.push_id(1));
        trainer
    }

    fn push_id(&mut self, num_bytes: u32) {
        self.lengths.push(num_bytes);
        self.left.push_id();
        self.right.push_id();
    }

    fn run<E, F: FnMut() -> Result<(), E>>(
        &mut self,
        max_merges: usize,
        poller: &mut Poller<F>,
    ) -> Result<Vec<Pair>, E> {
        let mut merges = Vec::new();
        while merges.len() < max_merges {
            match self.pop_most_frequent() {
                Some((pair, occurrences)) => {
                    self.merge(pair, &occurrences.positions, poller)?;
                    merges.push(pair);
                    poller.tick()?;
                }
                None if self.floor == 1 => break, // the index had all pairs
                None => self.lower_floor(max_merges - merges.len(), poller)?,
            }
        }
        Ok(merges)
    }

    /// Reads the words for the pairs that are frequent enough by now.
    ///
    /// More pairs than merges are seldom needed. From the third time on, twice as many are taken each time: no text makes
    /// us read the words more often than log(pairs) + log(highest count) times.
    fn lower_floor<E, F: FnMut() -> Result<(), E>>(
        &mut self,
        merges_left: usize,
        poller: &mut Poller<F>,
    ) -> Result<(), E> {
        self.reads += 1;
        let doublings = self.reads.saturating_sub(2).min(24);
        let max_pairs = merges_left.saturating_add(SPARE_PAIRS);
        let max_pairs = max_pairs.saturating_mul(1 << doublings);
        self.index = FxHashMap::default(); // before the passes: they need the room
        self.heap = BinaryHeap::new();
        let (layout, lengths) = (&self.layout, &self.lengths);
        let mut pairs: FxHashMap<u64, Neighbour> = FxHashMap::default();
        layout.for_each_pair(lengths, poller, |pair, _, count| {
            let pair = pairs.entry(key(pair)).or_default();
            pair.count += count;
            pair.places += 1;
        })?;
        let mut counts: Vec<u64> = pairs.values().map(|pair| pair.count).collect();
        self.floor = floor_for(&mut counts, max_pairs);
        pairs.retain(|_, pair| pair.count >= self.floor);
        self.index.reserve(pairs.len());
        for (&key, &Neighbour { count, places }) in &pairs {
            poller.step()?;
            let positions = Vec::with_capacity(places as usize);
            self.index.insert(key, Occurrences { count, positions });
        }
        let entries = pairs.iter().map(|(&key, pair)| (pair.count, Reverse(key)));
        self.heap = entries.collect();
        drop(pairs);
        let index = &mut self.index;
        layout.for_each_pair(lengths, poller, |pair, position, _| {
            if let Some(pair) = index.get_mut(&key(pair)) {
                pair.positions.push(position);
            }
        })
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
    fn merge<E, F: FnMut() -> Result<(), E>>(
        &mut self,
        (a, b): Pair,
        positions: &[u32],
        poller: &mut Poller<F>,
    ) -> Result<(), E> {
        let new = self.lengths.len() as u32;
        let (a_length, b_length) = (self.lengths[a as usize], self.lengths[b as usize]);
        self.push_id(a_length + b_length);
        let mut runs = self.layout.runs.cursor();
        let symbols = &mut self.layout.symbols;
        let mut there = [0; BLOCK];
        for block in positions.chunks(BLOCK) {
            // First only look, so that the processor waits for many slots at once, and not for one after the other.
            let mut found = 0;
            for &position in block {
                there[found] = position;
                let (left, right) = (position as usize, (position + a_length) as usize);
                found += usize::from((symbols[left] == a) & (symbols[right] == b));
            }
            poller.step()?;
            for &position in &there[..found] {
                poller.step()?;
                let middle = position + a_length;
                // Look again: the merge before may have taken `a` away. Sound although slots inside a token keep old ids:
                // the first slot of a swallowed token is overwritten below, always with an id above `a` or NONE, so it
                // can never read `a` again.
                if symbols[position as usize] != a || symbols[middle as usize] != b {
                    continue;
                }
                let end = middle + b_length;
                let count = runs.count_at(position);
                let (before, after) = (symbols[position as usize - 1], symbols[end as usize]);
                if before != NONE {
                    let start = position - self.lengths[before as usize];
                    self.left.add(before, start, count);
                }
                if after != NONE {
                    self.right.add(after, position, count);
                }
                symbols[middle as usize] = NONE;
                symbols[position as usize] = new;
                symbols[end as usize - 1] = new;
            }
        }
        self.update_index((a, b), new, poller)
    }

    /// For each neighbour of the new token: its pair with the new token gains what its pair with the old one loses.
    fn update_index<E, F: FnMut() -> Result<(), E>>(
        &mut self,
        (a, b): Pair,
        new: u32,
        poller: &mut Poller<F>,
    ) -> Result<(), E> {
        let mut lost = Vec::with_capacity(self.left.len() + self.right.len());
        let mut gained = Vec::new();
        for (id, count, occurrences) in self.left.drain(self.floor, poller)? {
            lost.push((key((id, a)), count));
            gained.extend(occurrences.map(|found| (key((id, new)), found)));
        }
        for (id, count, occurrences) in self.right.drain(self.floor, poller)? {
            lost.push((key((b, id)), count));
            gained.extend(occurrences.map(|found| (key((new, id)), found)));
        }
        // Gains first: in "abab" the second place takes (new, a) away again, which the first one brought.
        let gained_keys: Vec<u64> = gained.iter().map(|(key, _)| *key).collect();
        self.index.extend(gained);
        for (key, count) in lost {
            if let Entry::Occupied(mut pair) = self.index.entry(key) {
                pair.get_mut().count -= count;
                if pair.get().count < self.floor {
                    pair.remove();
                }
            }
        }
        for key in gained_keys {
            if let Some(pair) = self.index.get(&key) {
                self.heap.push((pair.count, Reverse(key)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::SharedWords;
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
        let counts = SharedWords::default();
        for (word, count) in words {
            counts.add(word, *count);
        }
        find_merges(counts.into_tables().unwrap(), max_merges, || {
            Ok::<(), ()>(())
        })
        .unwrap()
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
    fn counts_that_span_many_floors_merge_in_order() {
        // The most frequent pair has 4^9 times the count of the rarest: the index is built anew again and again.
        let words: Vec<(Vec<u8>, u64)> = (0..10u32)
            .map(|i| (vec![b'a' + i as u8, b'k' + i as u8, b'a'], 4u64.pow(i)))
            .collect();
        assert_eq!(fast(&words, 99), naive(&words, 99));
    }

    /// Fails at the poll after `polls` of them; true if it came to that, false if training ended before.
    fn fails_after(polls: usize) -> bool {
        let counts = SharedWords::default();
        counts.add(&b"ab".repeat(300), 1);
        let mut left = polls;
        let merges = find_merges(counts.into_tables().unwrap(), usize::MAX, || {
            left = left.checked_sub(1).ok_or("ctrl-c")?;
            Ok(())
        });
        match merges {
            Ok(merges) => {
                assert!(merges.len() > 8);
                false
            }
            Err(error) => {
                assert!(matches!(error, MergeError::Caller("ctrl-c")));
                true
            }
        }
    }

    #[test]
    fn an_error_of_any_poll_ends_merging() {
        let polls = (0..).find(|&polls| !fails_after(polls)).unwrap();
        assert!(
            polls > 20,
            "{polls} only: layout, index and merges should each poll"
        );
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
