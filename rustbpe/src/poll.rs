//! Letting the caller look for Ctrl-C while a loop runs.

use std::time::{Duration, Instant};

/// How often a caller is let look for Ctrl-C.
pub const POLL: Duration = Duration::from_millis(50);

/// In unit tests every tick polls, and ticks are frequent, so that they can fail at each.
const INTERVAL: Duration = if cfg!(test) { Duration::ZERO } else { POLL };

/// Calls the caller's `poll` about every [`POLL`], if it is asked often enough; its error ends the work.
pub struct Poller<F> {
    poll: F,
    polled: Option<Instant>,
    steps: usize,
}

impl<E, F: FnMut() -> Result<(), E>> Poller<F> {
    /// Steps of a loop between two looks at the clock: microseconds to a millisecond.
    const STEPS: usize = if cfg!(test) { 1 << 6 } else { 1 << 14 };

    pub fn new(poll: F) -> Self {
        Self {
            poll,
            polled: None,
            steps: 0,
        }
    }

    pub fn tick(&mut self) -> Result<(), E> {
        if self
            .polled
            .is_none_or(|polled| polled.elapsed() >= INTERVAL)
        {
            (self.poll)()?;
            self.polled = Some(Instant::now());
        }
        Ok(())
    }

    /// [`Poller::tick`] at every so many steps of a loop.
    #[inline]
    pub fn step(&mut self) -> Result<(), E> {
        self.step_by(1)
    }

    /// Many steps that were made without asking.
    #[inline]
    pub fn step_by(&mut self, steps: usize) -> Result<(), E> {
        self.steps += steps;
        if self.steps >= Self::STEPS {
            self.steps = 0;
            self.tick()?;
        }
        Ok(())
    }
}
