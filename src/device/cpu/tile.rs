//! A tile of the logit matrix: how large it is, where it lies, how its numbers lie in memory, and a register of them at a time.

use super::simd::{Register, Simd, Vector, WIDEST, sum_by_halves};
use kernels::law::Num;
use std::ops::Range;

/// Most rows of a tile: the tile and what is multiplied with it fit the second-level cache.
pub const ROWS: usize = 264;
/// Most columns of a tile.
pub const COLS: usize = 256;

/// Numbers of a tile.
pub const TILE: usize = ROWS * COLS;

/// Where a tile lies in its matrix.
#[derive(Clone, Debug)]
pub struct Place {
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

impl Place {
    /// How far apart the rows of the tile are: whole registers of any instruction set.
    #[inline(always)]
    pub fn stride(&self) -> usize {
        self.cols.len().next_multiple_of(WIDEST)
    }

    /// Columns, rounded up to whole registers.
    #[inline(always)]
    pub fn wide<S: Simd>(&self) -> usize {
        self.cols.len().next_multiple_of(<S::F32 as Register<f32>>::LANES)
    }

    /// Numbers that the tile takes.
    #[inline(always)]
    pub fn size(&self) -> usize {
        self.rows.len() * self.stride()
    }

    /// Where the tile has the pair of row `i` and column `j`.
    #[inline(always)]
    pub fn at(&self, i: usize, j: usize) -> usize {
        (i - self.rows.start) * self.stride() + j - self.cols.start
    }
}

/// A special pair, set aside: its logit, and its G once a law has told it.
#[derive(Clone, Copy, Debug)]
pub struct Aside {
    pub i: usize,
    pub j: usize,
    pub logit: f32,
    pub g: f32,
}

/// Blocks of about one length, at most `most`, that cover `range`, each a whole number of `unit`s.
pub fn blocks(range: Range<usize>, most: usize, unit: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let length = range.len().div_ceil(range.len().div_ceil(most).max(1)).next_multiple_of(unit).max(unit);
    range.clone().step_by(length).map(move |start| start..range.end.min(start + length))
}

/// Blocks of rows: whole micro-kernels of any instruction set.
pub fn row_blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> + Clone {
    blocks(range, ROWS, 12)
}

/// Blocks of columns: they start where a packed panel starts.
pub fn col_blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> + Clone {
    blocks(range, COLS, WIDEST)
}

/// `x` a register at a time.
#[inline(always)]
pub fn lanes<S: Simd>(x: &[f32]) -> std::slice::ChunksExact<'_, f32> {
    x.chunks_exact(<S::F32 as Register<f32>>::LANES)
}

#[inline(always)]
pub fn lanes_mut<S: Simd>(x: &mut [f32]) -> std::slice::ChunksExactMut<'_, f32> {
    x.chunks_exact_mut(<S::F32 as Register<f32>>::LANES)
}

/// All lanes folded by `f`, in order.
#[inline(always)]
pub fn fold<S: Simd>(x: S::F32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; WIDEST];
    x.store(&mut lanes);
    let lanes = &lanes[..<S::F32 as Register<f32>>::LANES];
    lanes[1..].iter().fold(lanes[0], |a, &b| f(a, b))
}

/// The sum of all lanes.
#[inline(always)]
pub fn total<S: Simd>(x: S::F32) -> f32 {
    let mut lanes = [0.0; WIDEST];
    x.store(&mut lanes);
    sum_by_halves(&mut lanes, <S::F32 as Register<f32>>::LANES)
}

/// Adds a row of a tile to the columns' `totals`.
#[inline(always)]
pub fn add_row<S: Simd>(totals: &mut [f32; COLS], row: &[f32]) {
    for (total, x) in lanes_mut::<S>(totals).zip(lanes::<S>(row)) {
        S::F32::load(total).add(S::F32::load(x)).store(total);
    }
}
