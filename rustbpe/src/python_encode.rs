//! Many texts to ids on several threads, and the ids to Python's lists, with a look for Ctrl-C every now and then.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::thread::Builder;
use std::time::Instant;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyList;

use crate::encode::{EncodeError, Model};
use crate::poll::{Poller, POLL};
use crate::python::{check_signals, internal_error, no_thread};
use crate::split::SplitError;

/// Numbers of a list that are made between two looks for Ctrl-C: some milliseconds.
const PART: usize = 1 << 18;

/// A list of `ids`, which for a large text takes longer than a user who presses Ctrl-C waits.
pub fn list_of<'py>(py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
    let (first, rest) = ids.split_at(ids.len().min(PART));
    let list = PyList::new(py, first)?;
    for part in rest.chunks(PART) {
        py.check_signals()?;
        part.iter().try_for_each(|id| list.append(id))?;
    }
    Ok(list)
}

pub fn list_of_lists<'py>(py: Python<'py>, rows: &[Vec<u32>]) -> PyResult<Bound<'py, PyList>> {
    let (lists, mut made) = (PyList::empty(py), 0);
    for ids in rows {
        made += ids.len() + 1;
        if made >= PART {
            py.check_signals()?;
            made = 0;
        }
        lists.append(list_of(py, ids)?)?;
    }
    Ok(lists)
}

type Encoded = Result<Vec<u32>, SplitError>;

/// The caller has given up: nobody waits for the answer.
struct Stopped;

/// Encodes on `num_threads` workers while the calling thread looks for Ctrl-C.
pub fn encode_all(
    model: &Model,
    texts: &[PyBackedStr],
    num_threads: usize,
) -> PyResult<Vec<Vec<u32>>> {
    let (stop, next) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (sender, results) = channel::<(usize, Encoded)>();
    std::thread::scope(|scope| {
        for _ in 0..num_threads.min(texts.len()) {
            let (sender, stop, next) = (sender.clone(), &stop, &next);
            let encode = move || {
                while !stop.load(Ordering::Relaxed) {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(text) = texts.get(i) else { break };
                    let mut ids = Vec::new();
                    let mut poller = Poller::new(|| match stop.load(Ordering::Relaxed) {
                        true => Err(Stopped),
                        false => Ok(()),
                    });
                    let encoded = match model.encode(text, &mut ids, &mut poller) {
                        Ok(()) => Ok(ids),
                        Err(EncodeError::Split(error)) => Err(error),
                        Err(EncodeError::Caller(Stopped)) => break,
                    };
                    let _ = sender.send((i, encoded)); // fails when the caller has given up
                }
            };
            if let Err(error) = Builder::new().spawn_scoped(scope, encode) {
                stop.store(true, Ordering::Relaxed);
                return Err(no_thread(&error));
            }
        }
        drop(sender); // `results` then disconnects when the last worker is gone
        let collected = collect(&results, texts.len());
        stop.store(true, Ordering::Relaxed);
        collected
    })
}

fn collect(results: &Receiver<(usize, Encoded)>, num_texts: usize) -> PyResult<Vec<Vec<u32>>> {
    let mut ids = vec![Vec::new(); num_texts];
    let mut missing = num_texts;
    let mut polled = Instant::now();
    while missing > 0 {
        match results.recv_timeout(POLL) {
            Ok((i, encoded)) => {
                ids[i] = encoded?;
                missing -= 1;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(internal_error()),
        }
        if polled.elapsed() >= POLL {
            check_signals()?;
            polled = Instant::now();
        }
    }
    Ok(ids)
}
