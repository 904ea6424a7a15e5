//! What one merge does to the pairs around it, collected while it walks its positions and handed to the index afterwards.

use crate::poll::Poller;

/// A pair in the index.
pub struct Occurrences {
    pub count: u64,
    pub positions: Vec<u32>, // ascending; a superset of the places where the pair is now
}

/// What one merge does to the pairs with one neighbouring token.
#[derive(Clone, Copy, Default)]
pub struct Neighbour {
    pub count: u64,
    pub places: u32,
}

/// A neighbour, the count, and what the index needs to know if that is high enough.
pub type Drained = (u32, u64, Option<Occurrences>);

/// The neighbours of one merge, on one side.
#[derive(Default)]
pub struct Side {
    of_id: Vec<Neighbour>, // zeros between two merges
    seen: Vec<u32>,
    places: Vec<(u32, u32)>, // (neighbour, position of its pair with the new token)
}

impl Side {
    /// Makes room for one more id.
    pub fn push_id(&mut self) {
        self.of_id.push(Neighbour::default());
    }

    /// Neighbours that there are now.
    pub fn len(&self) -> usize {
        self.seen.len()
    }

    pub fn add(&mut self, id: u32, position: u32, count: u64) {
        let neighbour = &mut self.of_id[id as usize];
        if neighbour.places == 0 {
            self.seen.push(id);
        }
        neighbour.count += count;
        neighbour.places += 1;
        self.places.push((id, position));
    }

    /// Each neighbour with its count and, if that is at least `floor`, what the index needs to know of their pair.
    /// An error of `poller` leaves this unusable.
    pub fn drain<E, F: FnMut() -> Result<(), E>>(
        &mut self,
        floor: u64,
        poller: &mut Poller<F>,
    ) -> Result<Vec<Drained>, E> {
        let mut drained = Vec::with_capacity(self.seen.len());
        let mut wanted = false;
        for (i, &id) in self.seen.iter().enumerate() {
            let Neighbour { count, places } = self.of_id[id as usize];
            let occurrences = (count >= floor).then(|| Occurrences {
                count,
                positions: Vec::with_capacity(places as usize),
            });
            wanted |= occurrences.is_some();
            drained.push((id, count, occurrences));
            self.of_id[id as usize].places = i as u32; // now its place in `drained`
        }
        if wanted {
            for &(id, position) in &self.places {
                poller.step()?;
                let place = self.of_id[id as usize].places as usize;
                if let Some(occurrences) = &mut drained[place].2 {
                    occurrences.positions.push(position);
                }
            }
        }
        for id in self.seen.drain(..) {
            self.of_id[id as usize] = Neighbour::default();
        }
        self.places.clear();
        Ok(drained)
    }
}
