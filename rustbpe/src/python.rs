//! The Python module. The GIL is held only to pull documents, to look for Ctrl-C and to build the answers; a panic becomes
//! a RuntimeError, so that nothing but ordinary exceptions reaches Python.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyUserWarning, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyDict, PyIterator, PyList, PyString};

use crate::count::{count_words, Batch, CountError};
use crate::encode::{EncodeError, Model};
use crate::merge::{find_merges, MergeError, NUM_BYTES};
use crate::poll::Poller;
use crate::python_encode::{encode_all, list_of, list_of_lists};
use crate::split::{SplitError, Splitter, DEFAULT_PATTERN};
use crate::words::{TooManyWords, WordTable};

/// A batch is closed at this size even when it has fewer documents than `buffer_size`: it bounds memory and lets several
/// threads share the work when documents are long.
const MAX_BATCH_BYTES: usize = 1 << 20;

/// More threads than any machine has cores are a mistake, and may not start.
const MOST_THREADS: usize = 1024;

impl From<SplitError> for PyErr {
    fn from(error: SplitError) -> Self {
        PyValueError::new_err(error.0)
    }
}

impl From<CountError<PyErr>> for PyErr {
    fn from(error: CountError<PyErr>) -> Self {
        match error {
            CountError::Caller(error) => error,
            CountError::Split(error) => error.into(),
            CountError::Words(error) => error.into(),
            CountError::Worker => internal_error(),
            CountError::Spawn(error) => no_thread(&error),
        }
    }
}

impl From<EncodeError<PyErr>> for PyErr {
    fn from(error: EncodeError<PyErr>) -> Self {
        match error {
            EncodeError::Caller(error) => error,
            EncodeError::Split(error) => error.into(),
        }
    }
}

impl From<MergeError<PyErr>> for PyErr {
    fn from(error: MergeError<PyErr>) -> Self {
        match error {
            MergeError::Caller(error) => error,
            MergeError::Words(error) => error.into(),
        }
    }
}

impl From<TooManyWords> for PyErr {
    fn from(_: TooManyWords) -> Self {
        PyValueError::new_err(
            "the distinct words of this text have more than 4 GiB: train on less text",
        )
    }
}

pub(crate) fn internal_error() -> PyErr {
    PyRuntimeError::new_err("rustbpe failed inside (a bug: its panic message is on stderr)")
}

pub(crate) fn no_thread(error: &std::io::Error) -> PyErr {
    PyOSError::new_err(format!(
        "the system gives no more threads ({error}): ask for fewer with num_threads"
    ))
}

/// Runs `work` without the GIL.
fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> PyResult<T> + Send) -> PyResult<T> {
    py.detach(|| catch_unwind(AssertUnwindSafe(work)))
        .unwrap_or_else(|_| Err(internal_error()))
}

pub(crate) fn check_signals() -> PyResult<()> {
    Python::attach(|py| py.check_signals())
}

fn threads_or_all(num_threads: Option<usize>) -> PyResult<usize> {
    match num_threads {
        Some(n) if (1..=MOST_THREADS).contains(&n) => Ok(n),
        Some(n) => Err(PyValueError::new_err(format!(
            "num_threads must be from 1 to {MOST_THREADS}; got {n}"
        ))),
        None => Ok(std::thread::available_parallelism().map_or(1, |n| n.get())),
    }
}

/// Pulls documents into `batch` until it is full or the iterator ends.
fn pull(documents: &Py<PyIterator>, buffer_size: usize, batch: &mut Batch) -> PyResult<()> {
    Python::attach(|py| {
        let mut documents = documents.bind(py).clone();
        while batch.num_documents() < buffer_size && batch.num_bytes() < MAX_BATCH_BYTES {
            let Some(document) = documents.next() else {
                break;
            };
            let document = document?;
            let Ok(text) = document.downcast::<PyString>() else {
                let got = document.get_type().name()?;
                let message = format!("the iterator must yield str, one a document; got {got}");
                return Err(PyTypeError::new_err(message));
            };
            batch.push(text.to_str()?);
        }
        Ok(())
    })
}

/// Byte-pair encoding, trained exactly and applied as tiktoken does. See README.md.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    // Training replaces both as a whole, so a failed training changes nothing and encoding may run meanwhile.
    trained: RwLock<(Arc<Model>, Option<Stats>)>,
}

/// Of one training.
#[derive(Clone, Copy)]
struct Stats {
    counting: Duration, // reading, splitting and counting
    merging: Duration,
    distinct_words: usize,
}

impl Tokenizer {
    fn trained(&self) -> (Arc<Model>, Option<Stats>) {
        let trained = self.trained.read().unwrap_or_else(PoisonError::into_inner);
        trained.clone()
    }

    fn model(&self) -> Arc<Model> {
        self.trained().0
    }
}

#[pymethods]
impl Tokenizer {
    /// An untrained tokenizer: the default pattern and the 256 single bytes.
    #[new]
    fn new() -> PyResult<Self> {
        let model = Model::new(Splitter::new(DEFAULT_PATTERN)?, &[]);
        let trained = RwLock::new((Arc::new(model), None));
        Ok(Self { trained })
    }

    /// One with the tokens of another training, in the order of their ranks: the 256 single bytes first, all different.
    ///
    /// It encodes as tiktoken does with the same ranks, whatever training they come from.
    #[staticmethod]
    #[pyo3(signature = (tokens, pattern=None))]
    fn from_ranks(tokens: Vec<Vec<u8>>, pattern: Option<&str>) -> PyResult<Self> {
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        let tokens = tokens.into_iter().map(Vec::into_boxed_slice).collect();
        let Some(model) = Model::from_ranks(splitter, tokens) else {
            let message = "the tokens must begin with the 256 single bytes, and all differ";
            return Err(PyValueError::new_err(message));
        };
        let trained = RwLock::new((Arc::new(model), None));
        Ok(Self { trained })
    }

    /// Learns a vocabulary of at most `vocab_size` tokens from an iterable of documents.
    ///
    /// The merges are those of the naive algorithm, ties in pair counts broken towards the smaller pair of ids, for any
    /// number of threads. When the text supports fewer tokens, there are fewer, with a warning. Any error, also one that
    /// the iterator raises, leaves the tokenizer as it was.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, *, num_threads=None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: usize,
        pattern: Option<&str>,
        num_threads: Option<usize>,
    ) -> PyResult<()> {
        let max_merges = usize::try_from(vocab_size)
            .ok()
            .filter(|&size| size <= i32::MAX as usize)
            .and_then(|size| size.checked_sub(NUM_BYTES));
        let Some(max_merges) = max_merges else {
            return Err(PyValueError::new_err(format!(
                "vocab_size must be from 256 (the single bytes) to 2147483647; got {vocab_size}"
            )));
        };
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size must be at least 1"));
        }
        if iterator.is_instance_of::<PyString>() {
            let message = "the iterator must yield documents, but it is one str: put it in a list";
            return Err(PyTypeError::new_err(message));
        }
        let num_threads = threads_or_all(num_threads)?;
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        let documents = iterator.try_iter()?.unbind();
        let (model, stats) = detached(py, || {
            let fill = |batch: &mut Batch| pull(&documents, buffer_size, batch);
            let started = Instant::now();
            let words = count_words(&splitter, num_threads, fill, check_signals)?;
            let (counted, distinct_words) =
                (Instant::now(), words.iter().map(WordTable::len).sum());
            let merges = find_merges(words, max_merges, check_signals)?;
            let stats = Stats {
                counting: counted - started,
                merging: counted.elapsed(),
                distinct_words,
            };
            Ok((Model::new(splitter, &merges), stats))
        })?;
        let num_merges = model.tokens().len() - NUM_BYTES;
        let trained = (Arc::new(model), Some(stats));
        *self.trained.write().unwrap_or_else(PoisonError::into_inner) = trained;
        if num_merges < max_merges {
            let message = format!(
                "the text supports only {} tokens, not the {vocab_size} asked for\0",
                NUM_BYTES + num_merges
            );
            let message = std::ffi::CStr::from_bytes_with_nul(message.as_bytes())
                .map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
            PyErr::warn(py, &py.get_type::<PyUserWarning>(), message, 1)?;
        }
        Ok(())
    }

    /// The split pattern.
    fn get_pattern(&self) -> String {
        self.model().pattern().to_string()
    }

    /// (bytes, rank) of every token in the order of ranks; the first 256 are the single bytes.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let model = self.model();
        let tokens = model.tokens().iter().zip(0u32..);
        tokens
            .map(|(token, rank)| (PyBytes::new(py, token), rank))
            .collect()
    }

    /// The number of tokens, the 256 single bytes included.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.model().tokens().len()
    }

    /// Of the last training: seconds in counting (reading and splitting included) and in merging, and the number of distinct
    /// words; empty before.
    #[getter]
    fn training_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        if let Some(stats) = self.trained().1 {
            dict.set_item("counting_s", stats.counting.as_secs_f64())?;
            dict.set_item("merging_s", stats.merging.as_secs_f64())?;
            dict.set_item("distinct_words", stats.distinct_words)?;
        }
        Ok(dict)
    }

    /// The ids of `text`, as tiktoken gives them for the same pattern and ranks.
    fn encode<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyList>> {
        let model = self.model();
        let ids = detached(py, || {
            let mut ids = Vec::new();
            model.encode(text, &mut ids, &mut Poller::new(check_signals))?;
            Ok(ids)
        })?;
        list_of(py, &ids)
    }

    /// The ids of each text, on `num_threads` threads (default: all).
    #[pyo3(signature = (texts, *, num_threads=None))]
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        num_threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyList>> {
        let (model, num_threads) = (self.model(), threads_or_all(num_threads)?);
        let rows = detached(py, || encode_all(&model, &texts, num_threads))?;
        list_of_lists(py, &rows)
    }

    /// `batch_encode` as bytes: each id is a little-endian number of `id_bytes` (2 or 4) bytes.
    #[pyo3(signature = (texts, *, id_bytes, num_threads=None))]
    fn batch_encode_bytes<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        id_bytes: usize,
        num_threads: Option<usize>,
    ) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let (model, num_threads) = (self.model(), threads_or_all(num_threads)?);
        let most_tokens = match id_bytes {
            2 => 1 << 16,
            4 => u64::from(u32::MAX),
            _ => return Err(PyValueError::new_err("id_bytes must be 2 or 4")),
        };
        if model.tokens().len() as u64 > most_tokens {
            let message = format!("{} ids do not fit {id_bytes} bytes", model.tokens().len());
            return Err(PyValueError::new_err(message));
        }
        let encoded = detached(py, || encode_all(&model, &texts, num_threads))?;
        let to_bytes = |ids: Vec<u32>| {
            PyBytes::new_with(py, ids.len() * id_bytes, |bytes| {
                for (id, place) in ids.iter().zip(bytes.chunks_exact_mut(id_bytes)) {
                    place.copy_from_slice(&id.to_le_bytes()[..id_bytes]);
                }
                Ok(())
            })
        };
        encoded.into_iter().map(to_bytes).collect()
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD.
    fn decode(&self, py: Python<'_>, ids: Vec<u32>) -> PyResult<String> {
        let model = self.model();
        detached(py, || match model.decode(&ids) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(id) => Err(PyValueError::new_err(format!(
                "there is no token {id} in a vocabulary of {}",
                model.tokens().len()
            ))),
        })
    }
}

/// Panics as a bug would, here or in a worker: the tests see what Python gets of it.
#[pyfunction]
fn _panic(py: Python<'_>, in_worker: bool) -> PyResult<()> {
    detached(py, || {
        if !in_worker {
            panic!("on purpose");
        }
        std::thread::scope(|scope| {
            scope.spawn(|| panic!("on purpose"));
        });
        Ok(())
    })
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("DEFAULT_PATTERN", DEFAULT_PATTERN)?;
    module.add_function(wrap_pyfunction!(_panic, module)?)?;
    module.add_class::<Tokenizer>()
}
