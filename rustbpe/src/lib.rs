//! Exact byte-pair encoding: training, and encoding with what was trained.
//!
//! One file a step: [`split`] cuts text into pieces ([`scanner`] is its fast path for the default pattern), [`count`]
//! counts the distinct ones on all threads (in the tables of [`words`]), [`merge`] finds the merges (in the array of [`layout`]),
//! [`encode`] applies them
//! (`piece_cache` remembers what it did lately). Only `python` and `python_encode` know of Python, so that everything else is tested by
//! `cargo test --no-default-features`.

#![deny(unsafe_code)]

pub mod count;
pub mod encode;
pub mod layout;
pub mod merge;
mod neighbours;
mod piece_cache;
pub mod poll;
pub mod scanner;
pub mod split;
pub mod words;

#[cfg(feature = "python")]
mod python;
#[cfg(feature = "python")]
mod python_encode;
