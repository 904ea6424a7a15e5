//! Letting the caller look for Ctrl-C while a loop runs.

use std::time::{Duration, Instant};

/// How often a caller is let look for Ctrl-C.
pub const POLL: Duration = Duration::from_millis(50);

/// Calls the caller's `poll` about every [`POLL`], if it is asked often enough; its error ends the work.
pub struct Poller<F> {
    poll: F,
    polled: Instant,
}

impl<E, F: FnMut() -> Result<(), E>> Poller<F> {
    /// Steps of a loop between two looks at the clock: microseconds to a millisecond.
    const STEPS: usize = 1 << 14;

    pub fn new(poll: F) -> Self {
        let polled = Instant::now();
        Self { poll, polled }
    }

    pub fn tick(&mut self) -> Result<(), E> {
        if self.polled.elapsed() >= POLL {
            (self.poll)()?;
            self.polled = Instant::now();
        }
        Ok(())
    }

    /// [`Poller::tick`] at every so many steps of a loop.
    #[inline]
    pub fn step(&mut self, step: usize) -> Result<(), E> {
        if step.is_multiple_of(Self::STEPS) {
            self.tick()?;
        }
        Ok(())
    }
}
