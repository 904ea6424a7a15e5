//! Text to ids and back with the merges that were found. The ids are those of tiktoken with the same ranks.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use crate::merge::{Pair, NUM_BYTES};
use crate::piece_cache::PieceCache;
use crate::poll::Poller;
use crate::split::{SplitError, Splitter};

/// Up to this many bytes, rescanning a piece for each merge is faster than a heap.
const SMALL_PIECE_BYTES: usize = 64;

/// Why encoding ended early. `E` is the caller's own error, from polling.
#[derive(Debug)]
pub enum EncodeError<E> {
    Caller(E),
    Split(SplitError),
}

/// A split pattern with the tokens that were trained on it. What it computes never changes once made.
pub struct Model {
    splitter: Splitter,
    tokens: Vec<Box<[u8]>>, // bytes of each id
    merges: FxHashMap<Pair, u32>,
    ids: FxHashMap<Box<[u8]>, u32>, // whole pieces that are one token
    caches: Mutex<Vec<PieceCache>>, // one for each thread that encodes at the same time
}

impl Model {
    pub fn new(splitter: Splitter, merges: &[Pair]) -> Self {
        let mut tokens: Vec<Box<[u8]>> = (0..NUM_BYTES).map(|b| vec![b as u8].into()).collect();
        for &(left, right) in merges {
            let joined = [&*tokens[left as usize], &*tokens[right as usize]].concat();
            tokens.push(joined.into());
        }
        let first = NUM_BYTES as u32;
        Self {
            splitter,
            merges: merges.iter().copied().zip(first..).collect(),
            ids: tokens.iter().cloned().zip(0..).collect(),
            tokens,
            caches: Mutex::default(),
        }
    }

    /// With the tokens of another training, by rank; None unless they begin with the 256 single bytes in order, none is empty
    /// and all differ.
    ///
    /// As in tiktoken, any two neighbours merge whose bytes together are a token.
    pub fn from_ranks(splitter: Splitter, tokens: Vec<Box<[u8]>>) -> Option<Self> {
        let bytes_first =
            tokens.len() >= NUM_BYTES && (0..NUM_BYTES).all(|byte| *tokens[byte] == [byte as u8]);
        let ids: FxHashMap<Box<[u8]>, u32> = tokens.iter().cloned().zip(0..).collect();
        if !bytes_first || ids.len() < tokens.len() || tokens.iter().any(|token| token.is_empty()) {
            return None;
        }
        // Only where both parts have the length of some token: looking at every byte of a token would cost the square of
        // its length, and those of a single letter may have 100,000.
        let mut lengths: Vec<usize> = tokens.iter().map(|token| token.len()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut merges = FxHashMap::default();
        for (token, id) in tokens.iter().zip(0..) {
            for &middle in lengths.iter().take_while(|&&length| length < token.len()) {
                if lengths.binary_search(&(token.len() - middle)).is_err() {
                    continue;
                }
                let (left, right) = token.split_at(middle);
                if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                    merges.insert((left, right), id);
                }
            }
        }
        Some(Self {
            splitter,
            tokens,
            merges,
            ids,
            caches: Mutex::default(),
        })
    }

    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    /// The bytes of each id, in order.
    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// Appends the ids of `text`. An error of `poller` ends the work at once, also within a piece of any length.
    pub fn encode<E, F: FnMut() -> Result<(), E>>(
        &self,
        text: &str,
        ids: &mut Vec<u32>,
        poller: &mut Poller<F>,
    ) -> Result<(), EncodeError<E>> {
        let mut cache = self.caches().pop().unwrap_or_default();
        let (bytes, mut encoded) = (text.as_bytes(), Ok(()));
        let split = self.splitter.for_each_piece(text, |start, end| {
            encoded = poller.step();
            if encoded.is_err() {
                return false;
            }
            let key = PieceCache::key(bytes, start, end);
            if key.is_some_and(|key| cache.append(key, ids)) {
                return true;
            }
            let first = ids.len();
            encoded = self.encode_piece(&bytes[start..end], ids, poller);
            if let (Some(key), true) = (key, encoded.is_ok()) {
                cache.keep(key, &ids[first..]);
            }
            encoded.is_ok()
        });
        self.caches().push(cache);
        encoded.map_err(EncodeError::Caller)?;
        split.map_err(EncodeError::Split)
    }

    fn caches(&self) -> MutexGuard<'_, Vec<PieceCache>> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn encode_piece<E, F: FnMut() -> Result<(), E>>(
        &self,
        piece: &[u8],
        ids: &mut Vec<u32>,
        poller: &mut Poller<F>,
    ) -> Result<(), E> {
        if let Some(&id) = self.ids.get(piece) {
            ids.push(id);
        } else if piece.len() <= SMALL_PIECE_BYTES {
            self.merge_by_scan(piece, ids);
        } else {
            self.merge_by_heap(piece, ids, poller)?;
        }
        Ok(())
    }

    /// O(n^2), with nothing but one small array.
    fn merge_by_scan(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let first = ids.len();
        ids.extend(piece.iter().map(|&byte| u32::from(byte)));
        loop {
            let part = &ids[first..];
            let lowest = part
                .windows(2)
                .enumerate()
                .filter_map(|(i, two)| Some((*self.merges.get(&(two[0], two[1]))?, i)))
                .min();
            let Some((id, i)) = lowest else { break };
            ids[first + i] = id;
            ids.remove(first + i + 1);
        }
    }

    /// O(n log n), for the pieces that someone makes to hurt.
    fn merge_by_heap<E, F: FnMut() -> Result<(), E>>(
        &self,
        piece: &[u8],
        ids: &mut Vec<u32>,
        poller: &mut Poller<F>,
    ) -> Result<(), E> {
        let n = piece.len();
        let mut symbols: Vec<Option<u32>> = piece.iter().map(|&b| Some(u32::from(b))).collect();
        let mut next: Vec<usize> = (1..=n).collect();
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut heap = BinaryHeap::new();
        let candidate = |symbols: &[Option<u32>], left: usize, right: usize| {
            let pair = (symbols.get(left).copied()??, symbols.get(right).copied()??);
            Some(Reverse((*self.merges.get(&pair)?, left, pair.0, right)))
        };
        for right in 1..n {
            poller.step()?;
            heap.extend(candidate(&symbols, right - 1, right));
        }
        while let Some(Reverse((id, left, left_id, right))) = heap.pop() {
            poller.step()?;
            // Stale when either side has been merged since: then the pair's ids or its end differ.
            let same = symbols[left] == Some(left_id) && next[left] == right;
            if !same
                || candidate(&symbols, left, right) != Some(Reverse((id, left, left_id, right)))
            {
                continue;
            }
            symbols[left] = Some(id);
            symbols[right] = None;
            next[left] = next[right];
            if next[left] < n {
                previous[next[left]] = left;
                heap.extend(candidate(&symbols, left, next[left]));
            }
            if previous[left] < n {
                heap.extend(candidate(&symbols, previous[left], left));
            }
        }
        ids.extend(symbols.into_iter().flatten());
        Ok(())
    }

    /// The bytes of `ids`, or the first id that there is none of.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, u32> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.tokens.get(id as usize).ok_or(id)?);
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::find_merges;
    use crate::words::SharedWords;
    use proptest::prelude::*;

    fn model(words: &[Vec<u8>], max_merges: usize) -> Model {
        let counts = SharedWords::default();
        words.iter().for_each(|word| counts.add(word, 1));
        let merges = find_merges(counts.into_tables().unwrap(), max_merges, || {
            Ok::<(), ()>(())
        })
        .unwrap();
        Model::new(Splitter::new(".+").unwrap(), &merges)
    }

    proptest! {
        #[test]
        fn heap_and_scan_agree_and_decode_restores(
            words in prop::collection::vec(prop::collection::vec(97u8..100, 1..14), 1..20),
            piece in prop::collection::vec(97u8..100, 0..90),
        ) {
            let model = model(&words, 40);
            let (mut by_scan, mut by_heap) = (vec![7], vec![7]);
            model.merge_by_scan(&piece, &mut by_scan);
            let mut poller = Poller::new(|| Ok::<(), ()>(()));
            model.merge_by_heap(&piece, &mut by_heap, &mut poller).unwrap();
            prop_assert_eq!(&by_scan, &by_heap);
            prop_assert_eq!(model.decode(&by_scan[1..]).unwrap(), piece);
        }
    }

    #[test]
    fn every_token_encodes_to_itself() {
        let model = model(&[b"banana bandana".to_vec(), b"aaaaaaa".to_vec()], 99);
        for (id, token) in model.tokens().iter().enumerate() {
            let mut ids = Vec::new();
            model.merge_by_scan(token, &mut ids);
            assert_eq!(ids, [id as u32]);
        }
    }

    #[test]
    fn an_error_of_poll_ends_encoding_within_a_piece() {
        let model = model(&[b"abab".to_vec()], 2);
        let text = "ab".repeat(1000);
        let fails_after = |mut polls: usize| {
            let poll = || {
                polls = polls.checked_sub(1).ok_or("ctrl-c")?;
                Ok(())
            };
            let encoded = model.encode(&text, &mut Vec::new(), &mut Poller::new(poll));
            matches!(encoded, Err(EncodeError::Caller("ctrl-c")))
        };
        let polls = (0..).find(|&polls| !fails_after(polls)).unwrap();
        assert!(polls > 40, "{polls} only, in one piece of 2,000 bytes");
    }

    #[test]
    fn ranks_alone_give_the_same_ids() {
        let trained = model(&[b"banana bandana".to_vec(), b"aaaaaaa".to_vec()], 99);
        let splitter = Splitter::new(".+").unwrap();
        let read = Model::from_ranks(splitter, trained.tokens().to_vec()).unwrap();
        for text in [
            "banana",
            "bandanabanana aaa",
            "",
            "x",
            "aaaaaaaaaaaaaaaaaaaaaaa",
        ] {
            for _ in 0..2 {
                let (mut ids, mut others) = (Vec::new(), Vec::new());
                let mut poller = Poller::new(|| Ok::<(), ()>(()));
                trained.encode(text, &mut ids, &mut poller).unwrap();
                read.encode(text, &mut others, &mut poller).unwrap();
                assert_eq!(ids, others);
            }
        }
    }

    #[test]
    fn ranks_that_are_not_bytes_first_and_all_different_are_refused() {
        let bytes = || (0..=255u8).map(|byte| Box::from([byte]));
        let read = |tokens: Vec<Box<[u8]>>| {
            Model::from_ranks(Splitter::new(".+").unwrap(), tokens).is_some()
        };
        assert!(read(bytes().collect()));
        assert!(!read(bytes().skip(1).collect()));
        assert!(!read(bytes().rev().collect()));
        for wrong in [&b"a"[..], b""] {
            assert!(!read(bytes().chain([Box::from(wrong)]).collect()));
        }
    }

    #[test]
    fn an_unknown_id_is_named() {
        assert_eq!(model(&[b"ab".to_vec()], 1).decode(&[97, 300]), Err(300));
    }
}
