//! What pass 1 leaves of the logits for the passes after it, as much as a budget holds: a slot a task, with its tiles one
//! after another, in f32 or, beside units for bf16, in 16 bits ([`Grid`]).

use super::buffers::Buffer;
use super::sweep::Cut;
use half::bf16;
use std::ops::Range;

/// Logits in 16 bits: a whole number of steps from their middle.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    middle: f32,
    step: f32,
}

impl Grid {
    /// For logits from `low` to `high`, if that is fine enough: half a step changes an exponential by at most half of
    /// what rounding it to bf16 does.
    pub fn new(low: f64, high: f64) -> Option<Grid> {
        let step = (high - low) / 2.0 / f64::from(i16::MAX);
        let grid = Grid { middle: ((low + high) / 2.0) as f32, step: (step as f32).max(f32::MIN_POSITIVE) };
        (step <= f64::from(bf16::EPSILON) / 2.0).then_some(grid)
    }

    #[inline(always)]
    fn write(self, logits: &[f32], to: &mut [i16]) {
        /// Numbers added to it are rounded to whole ones, which its low bits hold.
        const WHOLE: f32 = 1.5 * (1 << 23) as f32;
        let steps = 1.0 / self.step;
        let numbers = to.iter_mut().zip(logits);
        numbers.for_each(|(to, s)| *to = ((s - self.middle) * steps + WHOLE).to_bits() as i16);
    }

    #[inline(always)]
    fn read(self, from: &[i16], logits: &mut [f32]) {
        logits.iter_mut().zip(from).for_each(|(s, &from)| *s = f32::from(from) * self.step + self.middle);
    }
}

/// Logits that pass 1 left for the passes after it: those of each row piece's first tasks.
#[derive(Debug, Default)]
pub struct Kept {
    /// One slot a task, one row after another in each tile; the slots of a row piece side by side, in the order of its tasks.
    data: Buffer,
    /// f32s that a slot takes.
    pub slot: usize,
    /// Slots of each row piece, and how many pieces have one more.
    each: usize,
    more: usize,
}

impl Kept {
    /// Products this deep take no longer than copies to and from a slot.
    pub const SHALLOW: usize = 8;

    /// Room for as many of a sweep's tasks as `budget` bytes hold.
    pub fn fit(&mut self, cut: Cut, n: usize, m: usize, grid: Option<Grid>, budget: usize) {
        let (pieces, tasks) = (n.div_ceil(cut.rows), m.div_ceil(cut.cols));
        self.slot = cut.rows * cut.cols / if grid.is_some() { 2 } else { 1 };
        let slots = (budget / (4 * self.slot)).min(pieces * tasks);
        (self.each, self.more) = (slots / pieces, slots % pieces);
        self.data.sized(slots * self.slot);
    }

    /// Where the slots of each row piece are.
    fn ranges(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let Kept { slot, each, more, .. } = *self;
        let from = move |piece: usize| slot * (piece * each + piece.min(more));
        (0..).map(move |piece| from(piece)..from(piece + 1))
    }

    /// The slots of each row piece, to be filled.
    pub fn fill(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let ranges = self.ranges();
        let mut rest: &mut [f32] = self.data.sized(self.data.len());
        ranges.map(move |range| rest.split_off_mut(..range.len()).expect("room for all slots"))
    }

    /// The slots of each row piece.
    pub fn pieces(&self) -> impl Iterator<Item = &[f32]> {
        self.ranges().map(|range| &self.data[range])
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }
}

/// A task's slot, less the tiles that were written to it or read from it.
pub enum Slot<Plain, Steps> {
    /// Numbers as they are.
    Plain(Plain),
    Steps(Grid, Steps),
}

impl<'a> Slot<&'a mut [f32], &'a mut [i16]> {
    /// The first of `slots`, to be filled, if there is any.
    pub fn fill(slots: &mut &'a mut [f32], slot: usize, grid: Option<Grid>) -> Option<Self> {
        slots.split_off_mut(..slot).map(|slot| match grid {
            Some(grid) => Slot::Steps(grid, bytemuck::cast_slice_mut(slot)),
            None => Slot::Plain(slot),
        })
    }

    #[inline(always)]
    pub fn write(&mut self, tile: &[f32]) {
        match self {
            Slot::Plain(slot) => next_mut(slot, tile.len()).copy_from_slice(tile),
            Slot::Steps(grid, slot) => grid.write(tile, next_mut(slot, tile.len())),
        }
    }
}

impl<'a> Slot<&'a [f32], &'a [i16]> {
    /// The first of `slots`, to be read, if there is any.
    pub fn open(slots: &mut &'a [f32], slot: usize, grid: Option<Grid>) -> Option<Self> {
        slots.split_off(..slot).map(|slot| match grid {
            Some(grid) => Slot::Steps(grid, bytemuck::cast_slice(slot)),
            None => Slot::Plain(slot),
        })
    }

    #[inline(always)]
    pub fn read(&mut self, tile: &mut [f32]) {
        match self {
            Slot::Plain(slot) => tile.copy_from_slice(next(slot, tile.len())),
            Slot::Steps(grid, slot) => grid.read(next(slot, tile.len()), tile),
        }
    }
}

const ALL_TILES: &str = "a slot holds all tiles of its task";

/// The next tile of a slot, of `len` numbers.
#[inline(always)]
pub fn next<'a, T>(slot: &mut &'a [T], len: usize) -> &'a [T] {
    slot.split_off(..len).expect(ALL_TILES)
}

/// As [`next`], to be written.
#[inline(always)]
pub fn next_mut<'a, T>(slot: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    slot.split_off_mut(..len).expect(ALL_TILES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    #[test]
    fn a_grid_is_half_a_step_off_at_most() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(8);
        for (low, high) in [(-1.0, 1.0), (-127.0, 127.0), (900.0, 903.0), (0.0, 0.0), (-1e-42, 1e-42)] {
            let grid = Grid::new(low, high).expect("narrow enough");
            let (low, high) = (low as f32, high as f32);
            let mut logits: Vec<f32> = (0..1000).map(|_| low + (high - low) * rng.random_range(0f32..1.0)).collect();
            logits.extend([low, high, grid.middle]);
            let (mut steps, mut again) = (vec![i16::MIN; logits.len()], vec![f32::NAN; logits.len()]);
            grid.write(&logits, &mut steps);
            grid.read(&steps, &mut again);
            for (s, again) in logits.iter().zip(again) {
                assert!((s - again).abs() <= 0.5 * grid.step + 2.0 * f32::EPSILON * s.abs(), "{grid:?} {s} {again}");
            }
        }
        for (low, high) in [(-130.0, 130.0), (0.0, f64::INFINITY), (f64::NAN, f64::NAN)] {
            assert!(Grid::new(low, high).is_none());
        }
    }
}
