//! The ids of short pieces that were encoded lately: most of any text is words that have just been there.

/// Longer pieces are not kept: they come once.
const MAX_PIECE_BYTES: usize = 15;
/// Pieces of more tokens are not kept.
const MAX_IDS: usize = 3;
/// Of 32 bytes each, 1 MiB: what the second-level cache of a core holds.
const SLOTS: usize = 1 << 15;

#[derive(Clone, Copy, Default)]
struct Slot {
    key: u128, // 0: empty
    ids: [u32; MAX_IDS],
    count: u32,
}

/// For one model. Each key has one slot; a newer piece takes an older one's place, so no text makes it slow.
pub struct PieceCache {
    slots: Box<[Slot]>,
}

impl Default for PieceCache {
    fn default() -> Self {
        let slots = vec![Slot::default(); SLOTS].into_boxed_slice();
        Self { slots }
    }
}

impl PieceCache {
    /// What stands for the piece `start..end` of `text`: its bytes and its length; None for one that is not kept.
    #[inline]
    pub fn key(text: &[u8], start: usize, end: usize) -> Option<u128> {
        let length = end - start;
        if length > MAX_PIECE_BYTES {
            return None;
        }
        let bytes = match text[start..].first_chunk::<16>() {
            Some(window) => u128::from_le_bytes(*window) & ((1 << (8 * length)) - 1),
            None => {
                let mut window = [0; 16];
                window[..length].copy_from_slice(&text[start..end]);
                u128::from_le_bytes(window)
            }
        };
        Some(bytes | (length as u128) << 120)
    }

    /// Appends the ids of a piece that is kept; false if it is not.
    #[inline]
    pub fn append(&self, key: u128, ids: &mut Vec<u32>) -> bool {
        let slot = &self.slots[slot_of(key)];
        if slot.key != key {
            return false;
        }
        if slot.count == 1 {
            ids.push(slot.ids[0]);
        } else {
            ids.extend_from_slice(&slot.ids[..slot.count as usize]);
        }
        true
    }

    pub fn keep(&mut self, key: u128, piece_ids: &[u32]) {
        if piece_ids.len() > MAX_IDS {
            return;
        }
        let slot = &mut self.slots[slot_of(key)];
        slot.key = key;
        slot.count = piece_ids.len() as u32;
        slot.ids[..piece_ids.len()].copy_from_slice(piece_ids);
    }
}

#[inline]
fn slot_of(key: u128) -> usize {
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 / golden ratio
    let folded = (key as u64).wrapping_mul(MIX) ^ (key >> 64) as u64;
    let mixed = (folded ^ folded >> 32).wrapping_mul(MIX);
    (mixed >> 32) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_that_differ_in_length_or_in_a_byte_have_other_keys() {
        let text = b"\0\0\0abcabd________________";
        let keys: Vec<u128> = [(0, 0), (0, 1), (0, 2), (3, 6), (6, 9), (3, 5)]
            .into_iter()
            .map(|(start, end)| PieceCache::key(text, start, end).unwrap())
            .collect();
        for (i, key) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(key));
        }
        assert_eq!(PieceCache::key(text, 3, 5), PieceCache::key(b"ab", 0, 2));
        assert_eq!(PieceCache::key(text, 0, 16), None);
    }

    #[test]
    fn what_is_kept_comes_back_until_another_takes_its_place() {
        let mut cache = PieceCache::default();
        let keys: Vec<u128> = (1..SLOTS as u128 * 2).map(|n| n | 4 << 120).collect();
        for (n, &key) in keys.iter().enumerate() {
            cache.keep(key, &[n as u32; 3][..n % 4]);
            let mut ids = vec![7];
            assert!(cache.append(key, &mut ids));
            assert_eq!(ids[1..], [n as u32; 3][..n % 4]);
        }
        let kept = |key: &&u128| cache.append(**key, &mut Vec::new());
        assert!((SLOTS / 2..=SLOTS).contains(&keys.iter().filter(kept).count()));
        let mut cache = PieceCache::default();
        cache.keep(keys[0], &[1, 2, 3, 4]);
        assert!(!cache.append(keys[0], &mut Vec::new()));
    }
}
