//! Pieces to distinct words with their counts, on several threads.
//!
//! Every worker counts in a table of its own; shared are the queue of batches and the sums. Sums do not depend on order, so
//! the counts are the same for any number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::Mutex;
use std::thread::Builder;

use crate::poll::POLL;
use crate::split::{SplitError, Splitter};
use crate::words::{LocalWords, SharedWords, TooManyWords, WordTable};

/// Documents in one allocation, which goes back to be filled again.
#[derive(Default)]
pub struct Batch {
    text: String,
    ends: Vec<usize>, // document i is text[ends[i-1]..ends[i]]
}

impl Batch {
    pub fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }

    pub fn push(&mut self, document: &str) {
        self.text.push_str(document);
        self.ends.push(self.text.len());
    }

    pub fn num_documents(&self) -> usize {
        self.ends.len()
    }

    pub fn num_bytes(&self) -> usize {
        self.text.len()
    }

    /// Where each document lies in the text.
    fn documents(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut start = 0;
        self.ends
            .iter()
            .map(move |&end| std::mem::replace(&mut start, end)..end)
    }
}

/// Why counting ended early. `E` is the caller's own error, from reading or from polling.
#[derive(Debug)]
pub enum CountError<E> {
    Caller(E),
    Split(SplitError),
    Words(TooManyWords),
    /// A worker panicked: a bug of this crate.
    Worker,
    /// The system gave no thread.
    Spawn(std::io::Error),
}

/// Counts the words of all batches that `fill` delivers, with `num_threads` workers.
///
/// `fill` runs on the calling thread while the workers count the batches before; it gets an empty batch and leaves it empty
/// at the end of the input. `poll` is called at least every [`POLL`] while the caller waits. An error of either stops all workers.
pub fn count_words<E>(
    splitter: &Splitter,
    num_threads: usize,
    mut fill: impl FnMut(&mut Batch) -> Result<(), E>,
    mut poll: impl FnMut() -> Result<(), E>,
) -> Result<Vec<WordTable>, CountError<E>> {
    let stop = AtomicBool::new(false);
    let shared = SharedWords::default();
    let (work_sender, work) = channel::<Batch>();
    let (spare_sender, spare) = channel::<Batch>();
    // One batch a worker, and one that is being filled: memory is bounded by these.
    for _ in 0..num_threads + 1 {
        let _ = spare_sender.send(Batch::default());
    }
    let work = Mutex::new(work);
    std::thread::scope(|scope| {
        let workers: Result<Vec<_>, _> = (0..num_threads)
            .map(|_| {
                let (splitter, spare_sender) = (splitter.clone(), spare_sender.clone());
                let (work, stop, shared) = (&work, &stop, &shared);
                let count = move || count_queue(&splitter, work, &spare_sender, stop, shared);
                Builder::new().spawn_scoped(scope, count)
            })
            .collect();
        // Those that did start end when `work_sender` is dropped.
        let workers = workers.map_err(CountError::Spawn)?;
        drop(spare_sender); // `spare` then disconnects when the last worker is gone
        let read = feed(work_sender, &spare, &stop, &mut fill, &mut poll);
        if read.is_err() {
            stop.store(true, Ordering::Relaxed);
        }
        let mut failure = None;
        for worker in workers {
            match worker.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => failure = Some(CountError::Split(error)),
                Err(_) => failure = Some(CountError::Worker),
            }
        }
        read.map_err(CountError::Caller)?;
        failure.map_or(Ok(()), Err)
    })?;
    shared.into_tables().map_err(CountError::Words)
}

/// Fills and sends batches until the input ends or a worker fails, and then waits for the workers to finish.
fn feed<E>(
    work: Sender<Batch>,
    spare: &Receiver<Batch>,
    stop: &AtomicBool,
    fill: &mut impl FnMut(&mut Batch) -> Result<(), E>,
    poll: &mut impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    let mut work = Some(work);
    loop {
        match spare.recv_timeout(POLL) {
            Ok(mut batch) => {
                if let Some(sender) = &work {
                    batch.clear();
                    fill(&mut batch)?;
                    if batch.num_documents() == 0 || sender.send(batch).is_err() {
                        work = None; // workers end when the queue is empty and closed
                    }
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(()); // a worker failed; its error is found when it is joined
        }
        poll()?;
    }
}

fn count_queue(
    splitter: &Splitter,
    work: &Mutex<Receiver<Batch>>,
    spare: &Sender<Batch>,
    stop: &AtomicBool,
    shared: &SharedWords,
) -> Result<(), SplitError> {
    let mut words = LocalWords::new(shared);
    loop {
        let next = match work.lock() {
            Ok(queue) => queue.recv(),
            Err(_) => break, // another worker panicked while it held the queue
        };
        let Ok(batch) = next else { break };
        let text = batch.text.as_bytes();
        for document in batch.documents() {
            let counted = splitter.for_each_piece(&batch.text[document.clone()], |start, end| {
                words.add(text, document.start + start, document.start + end);
                !stop.load(Ordering::Relaxed)
            });
            if let Err(error) = counted {
                stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
        let _ = spare.send(batch);
    }
    words.give();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::DEFAULT_PATTERN;
    use std::collections::BTreeMap;

    fn count(texts: &[&str], num_threads: usize) -> BTreeMap<Vec<u8>, u64> {
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let mut rest = texts.iter();
        let fill = |batch: &mut Batch| -> Result<(), ()> {
            rest.by_ref().take(2).for_each(|text| batch.push(text));
            Ok(())
        };
        let words = count_words(&splitter, num_threads, fill, || Ok(())).unwrap();
        let words = words.iter().flat_map(|table| table.iter());
        words.map(|(word, count)| (word.to_vec(), count)).collect()
    }

    #[test]
    fn counts_are_the_same_for_any_number_of_threads() {
        let texts = ["a b a", "", "b b", "ü ü", " a", "a a a a"];
        let one = count(&texts, 1);
        assert_eq!(one[&b" a"[..]], 5);
        for num_threads in 2..5 {
            assert_eq!(one, count(&texts, num_threads));
        }
    }

    #[test]
    fn an_error_of_the_reader_is_returned() {
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let mut calls = 0;
        let fill = |batch: &mut Batch| {
            calls += 1;
            batch.push("some text");
            if calls == 20 {
                Err("broken")
            } else {
                Ok(())
            }
        };
        let result = count_words(&splitter, 2, fill, || Ok(()));
        assert!(matches!(result, Err(CountError::Caller("broken"))));
    }

    #[test]
    fn a_panic_in_a_worker_is_an_error_even_of_an_endless_input() {
        let fill = |batch: &mut Batch| -> Result<(), ()> {
            batch.push("endless");
            Ok(())
        };
        let result = count_words(&Splitter::panicking(), 2, fill, || Ok(()));
        assert!(matches!(result, Err(CountError::Worker)));
    }

    #[test]
    fn an_error_of_poll_stops_counting() {
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let fill = |batch: &mut Batch| {
            batch.push("endless");
            Ok(())
        };
        let result = count_words(&splitter, 2, fill, || Err("ctrl-c"));
        assert!(matches!(result, Err(CountError::Caller("ctrl-c"))));
    }
}
