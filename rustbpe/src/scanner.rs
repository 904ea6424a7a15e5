//! A hand-written scanner for exactly [`DEFAULT_PATTERN`](crate::split::DEFAULT_PATTERN): one pass and no backtracking, where
//! the regex engine backtracks on every run of white space. The tests hold it equal to the engine.
//!
//! The alternatives of the pattern, in order, as the comments below number them:
//! 1. `'(?i:[sdmt]|ll|ve|re)`  2. `[^\r\n\p{L}\p{N}]?+\p{L}+`  3. `\p{N}{1,2}`  4. ` ?[^\s\p{L}\p{N}]++[\r\n]*`
//! 5. `\s*[\r\n]`  6. `\s+(?!\S)`  7. `\s+`. Some alternative matches at every character, so no text is left out.

use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

const OTHER: u8 = 0;
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 3;
const NEWLINE: u8 = 4; // \r and \n, which are white space too

const NUM_CHARS: usize = 0x11_0000;

/// The class of every character, from the Unicode tables of the regex engine, so that both always agree.
fn classes() -> &'static [u8] {
    static CLASSES: OnceLock<Vec<u8>> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let mut classes = vec![OTHER; NUM_CHARS];
        for (pattern, class) in [
            (r"\p{L}", LETTER),
            (r"\p{N}", NUMBER),
            (r"\s", SPACE),
            (r"[\r\n]", NEWLINE),
        ] {
            let hir = regex_syntax::parse(pattern).expect("a valid class");
            let HirKind::Class(Class::Unicode(ranges)) = hir.kind() else {
                unreachable!("{pattern} is a Unicode class");
            };
            for range in ranges.ranges() {
                classes[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        classes
    })
}

#[derive(Debug, Clone, Copy)]
pub struct Scanner {
    classes: &'static [u8],
}

impl Default for Scanner {
    fn default() -> Self {
        Self { classes: classes() }
    }
}

impl Scanner {
    /// Class of the character at `at` and the position behind it; None at the end.
    fn class(&self, text: &str, at: usize) -> Option<(u8, usize)> {
        #[cfg(test)]
        tests::LOOKED_AT.set(tests::LOOKED_AT.get() + 1);
        let byte = *text.as_bytes().get(at)?;
        if byte < 0x80 {
            return Some((self.classes[byte as usize], at + 1));
        }
        let char = text[at..].chars().next()?;
        Some((self.classes[char as usize], at + char.len_utf8()))
    }

    /// The position behind the run of `class` that begins at `at`.
    fn run_end(&self, text: &str, mut at: usize, class: u8) -> usize {
        while let Some((found, next)) = self.class(text, at) {
            if found != class {
                break;
            }
            at = next;
        }
        at
    }

    /// Where the piece that begins at `start` ends; None at the end of the text.
    #[inline]
    pub fn piece_end(&self, text: &str, start: usize) -> Option<usize> {
        ascii_word_end(text.as_bytes(), start).or_else(|| self.any_piece_end(text, start))
    }

    fn any_piece_end(&self, text: &str, start: usize) -> Option<usize> {
        let (class, second) = self.class(text, start)?;
        match class {
            LETTER => return Some(self.run_end(text, second, LETTER)), // 2
            NUMBER => match self.class(text, second) {
                Some((NUMBER, third)) => return Some(third), // 3
                _ => return Some(second),
            },
            _ => {}
        }
        if let Some(end) = contraction_end(text, start) {
            return Some(end); // 1
        }
        let following = self.class(text, second);
        if let (true, Some((LETTER, third))) = (class != NEWLINE, following) {
            return Some(self.run_end(text, third, LETTER)); // 2
        }
        let symbols = match (class, following) {
            (OTHER, _) => Some(second),
            (SPACE, Some((OTHER, third))) if text.as_bytes()[start] == b' ' => Some(third),
            _ => None,
        };
        match symbols {
            Some(at) => {
                let at = self.run_end(text, at, OTHER);
                Some(self.run_end(text, at, NEWLINE)) // 4
            }
            None => Some(self.space_end(text, start)),
        }
    }

    /// Alternatives 5 to 7, where a run of white space begins at `start`.
    fn space_end(&self, text: &str, start: usize) -> usize {
        let (mut end, mut last, mut newline_end) = (start, start, None);
        while let Some((class @ (SPACE | NEWLINE), next)) = self.class(text, end) {
            (last, end) = (end, next);
            if class == NEWLINE {
                newline_end = Some(end);
            }
        }
        match newline_end {
            Some(newline_end) => newline_end, // 5: back to the last newline
            None if end < text.len() && last > start => last, // 6: all but the last
            None => end,                      // 6 at the end of the text, 7 elsewhere
        }
    }
}

/// [`Scanner::piece_end`] for most words of English: alternative 2 of at most 15 ASCII characters, found without a branch a byte.
/// None means that this shortcut does not know.
#[inline]
fn ascii_word_end(bytes: &[u8], start: usize) -> Option<usize> {
    let window = bytes.get(start..)?.first_chunk::<16>()?;
    let (low, high) = (&window[..8], &window[8..]);
    let mut others = u128::from(not_letters(low)) | u128::from(not_letters(high)) << 64;
    let mut shortest = 1;
    if others & 0x80 != 0 {
        if !OPENS_WORD[usize::from(window[0])] {
            return None;
        }
        others &= !0x80;
        shortest = 2;
    }
    let length = others.trailing_zeros() as usize / 8;
    // behind the word: an ASCII character that is no letter
    (length >= shortest && *window.get(length)? < 0x80).then_some(start + length)
}

/// ASCII characters that begin alternative 2, and no other, if a letter follows: those of class OTHER or SPACE but `'`.
const OPENS_WORD: [bool; 256] = {
    let mut opens = [false; 256];
    let mut byte = 0;
    while byte < 0x80 {
        let char = byte as u8;
        opens[byte] = !(char.is_ascii_alphanumeric() || matches!(char, b'\'' | b'\r' | b'\n'));
        byte += 1;
    }
    opens
};

/// 0x80 in place of each of 8 bytes that is no ASCII letter.
#[inline]
fn not_letters(eight: &[u8]) -> u64 {
    const EACH: u64 = 0x0101_0101_0101_0101;
    let bytes = u64::from_le_bytes(eight.try_into().expect("8 bytes"));
    // Case folded and below 0x80, so that adding 0x80 - x to a byte sets its top bit from x on, and carries nothing over.
    let folded = (bytes | (EACH * 0x20)) & (EACH * 0x7f);
    let from_a = folded + EACH * (0x80 - b'a' as u64);
    let above_z = folded + EACH * (0x7f - b'z' as u64);
    (!from_a | above_z | bytes) & (EACH * 0x80)
}

/// Alternative 1. Ignoring case, Unicode has one more s: U+017F.
fn contraction_end(text: &str, start: usize) -> Option<usize> {
    match text.as_bytes()[start..] {
        [b'\'', b's' | b'S' | b'd' | b'D' | b'm' | b'M' | b't' | b'T', ..] => Some(start + 2),
        [b'\'', b'l' | b'L', b'l' | b'L', ..] => Some(start + 3),
        [b'\'', b'v' | b'V' | b'r' | b'R', b'e' | b'E', ..] => Some(start + 3),
        [b'\'', 0xc5, 0xbf, ..] => Some(start + 3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::DEFAULT_PATTERN;
    use fancy_regex::Regex;
    use proptest::prelude::*;
    use std::cell::Cell;

    thread_local! {
        /// Characters whose class was asked for, each time that it was.
        pub static LOOKED_AT: Cell<usize> = const { Cell::new(0) };
    }

    #[test]
    fn a_character_is_looked_at_a_few_times_only_in_any_monotony() {
        for unit in [
            " ",
            "\n",
            "\r\n",
            " \n",
            "\n ",
            "\t ",
            "\u{a0}",
            "a",
            "é",
            "a ",
            "1",
            "12 ",
            "!",
            " !",
            "!\n",
            "'",
            "'s",
            "' ",
            "漢",
            "\u{301}",
            "e\u{301}",
            "😀",
            "👨\u{200d}👩",
        ] {
            for (head, tail) in [("", ""), ("x", "x"), ("\n", "!"), ("'", "\n")] {
                let text = format!("{head}{}{tail}", unit.repeat(3000));
                LOOKED_AT.set(0);
                scanned(&text);
                let characters = text.chars().count();
                assert!(
                    LOOKED_AT.get() <= 6 * characters,
                    "{} for {characters} of {unit:?}",
                    LOOKED_AT.get()
                );
            }
        }
    }

    fn by_engine<'t>(regex: &Regex, text: &'t str) -> Vec<&'t str> {
        regex.find_iter(text).map(|m| m.unwrap().as_str()).collect()
    }

    fn scanned(text: &str) -> Vec<&str> {
        let (scanner, mut start) = (Scanner::default(), 0);
        std::iter::from_fn(|| {
            let from = start;
            start = scanner.piece_end(text, from)?;
            Some(&text[from..start])
        })
        .collect()
    }

    fn assert_same(regex: &Regex, text: &str) {
        assert_eq!(scanned(text), by_engine(regex, text), "on {text:?}");
    }

    #[test]
    fn equals_the_engine_around_every_character() {
        let regex = Regex::new(DEFAULT_PATTERN).unwrap();
        // One long text a context: the engine's start-up would cost more than the matching.
        for (before, after) in [
            ("", ""),
            ("'", "x'"),
            ("'l", "' "),
            ("'", "e\n"),
            (" ", "1"),
            ("\n", "\t "),
        ] {
            let mut text = String::new();
            for char in '\0'..=char::MAX {
                text.push_str(before);
                text.push(char);
                text.push_str(after);
            }
            assert!(
                scanned(&text) == by_engine(&regex, &text),
                "around {before:?}, {after:?}"
            );
        }
    }

    #[test]
    fn equals_the_engine_on_all_short_texts() {
        let regex = Regex::new(DEFAULT_PATTERN).unwrap();
        let alphabet = [
            "'", "s", "L", "e", "ſ", "é", "7", "²", " ", "\n", "\r", "\u{a0}", "!", "\u{301}",
        ];
        let mut texts = vec![String::new()];
        for _ in 0..4 {
            let longer = texts
                .iter()
                .flat_map(|t| alphabet.map(|c| format!("{t}{c}")));
            texts = longer.collect();
            texts.iter().for_each(|text| assert_same(&regex, text));
        }
    }

    proptest! {
        #[test]
        fn equals_the_engine_on_random_text(text in any::<String>(), prose in "([a-zA-Z'’ \t\r\n0-9!?é٣\u{2003}]|ll|re){0,60}") {
            let regex = Regex::new(DEFAULT_PATTERN).unwrap();
            assert_same(&regex, &text);
            assert_same(&regex, &prose);
        }
    }
}
