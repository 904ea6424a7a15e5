//! Text to pieces: a merge never crosses the border between two pieces.

use fancy_regex::Regex;

use crate::scanner::Scanner;

/// GPT-4's split pattern with at most two digits a number token.
pub const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// A pattern that does not compile, or a text on which the engine gave up (its backtracking is bounded).
#[derive(Debug, Clone)]
pub struct SplitError(pub String);

/// A compiled split pattern. Clones are cheap, and a thread that splits much should own one: the regex engine's
/// scratch space belongs to a value, and threads that share it wait for each other.
#[derive(Debug, Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Debug, Clone)]
enum Engine {
    Scanner(Scanner), // for DEFAULT_PATTERN only
    Regex(Box<Regex>),
    #[cfg(test)]
    Panic,
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, SplitError> {
        let engine = if pattern == DEFAULT_PATTERN {
            Engine::Scanner(Scanner::default())
        } else {
            Engine::Regex(Box::new(compile(pattern)?))
        };
        let pattern = pattern.to_string();
        Ok(Self { pattern, engine })
    }

    /// One with a bug.
    #[cfg(test)]
    pub fn panicking() -> Self {
        let (pattern, engine) = (String::new(), Engine::Panic);
        Self { pattern, engine }
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `visit` with start and end of each non-empty piece in order, until it returns false. Text that the pattern does
    /// not match is left out, as tiktoken does.
    pub fn for_each_piece(
        &self,
        text: &str,
        mut visit: impl FnMut(usize, usize) -> bool,
    ) -> Result<(), SplitError> {
        let regex = match &self.engine {
            Engine::Scanner(scanner) => {
                let mut start = 0;
                while let Some(end) = scanner.piece_end(text, start) {
                    if !visit(start, end) {
                        break;
                    }
                    start = end;
                }
                return Ok(());
            }
            Engine::Regex(regex) => regex,
            #[cfg(test)]
            Engine::Panic => panic!("on purpose"),
        };
        for found in regex.find_iter(text) {
            let piece = found.map_err(|error| gave_up(text, &error))?;
            if piece.start() < piece.end() && !visit(piece.start(), piece.end()) {
                break;
            }
        }
        Ok(())
    }
}

fn compile(pattern: &str) -> Result<Regex, SplitError> {
    Regex::new(pattern).map_err(|error| {
        SplitError(format!(
            "the split pattern is not a valid regular expression: {error}"
        ))
    })
}

fn gave_up(text: &str, error: &fancy_regex::Error) -> SplitError {
    SplitError(format!(
        "the split pattern gave up on a text of {} bytes: {error}",
        text.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(pattern: &str, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        let splitter = Splitter::new(pattern).unwrap();
        splitter
            .for_each_piece(text, |start, end| {
                out.push(text[start..end].to_string());
                true
            })
            .unwrap();
        out
    }

    #[test]
    fn default_pattern_splits_as_documented() {
        let text = "I'll pay 12345 €!!\n\n  ok";
        let want = [
            "I",
            "'ll",
            " pay",
            " ",
            "12",
            "34",
            "5",
            " €!!\n\n",
            " ",
            " ok",
        ];
        assert_eq!(pieces(DEFAULT_PATTERN, text), want);
    }

    #[test]
    fn unmatched_text_and_empty_matches_are_left_out() {
        assert_eq!(pieces("[a-z]*", "ab1 cd"), ["ab", "cd"]);
    }

    #[test]
    fn a_bad_pattern_is_an_error() {
        assert!(Splitter::new("(").is_err());
    }
}
