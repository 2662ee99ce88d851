//! What pass 1 learns of every row and every column: sums of exponentials over its negatives, and what is known of its special
//! pairs apart from them.

use super::buffers::reset;
use super::simd::{Register, Simd, Vector};
use super::sweep::Axis;
use super::tile::{COLS, Place, fold, lanes, lanes_mut, total};
use crate::objective::counts::Special;
use kernels::law::{Lse, Num, decay, exp_uncapped};
use std::ops::Range;

/// Which softmaxes an objective is made of.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    /// Over each row (v|u).
    pub rows: bool,
    /// Over each column (u|v).
    pub cols: bool,
}

impl Want {
    /// The side whose softmax is the only one.
    pub fn only(self) -> Option<Axis> {
        match self {
            Want { rows: true, cols: false } => Some(Axis::Rows),
            Want { rows: false, cols: true } => Some(Axis::Cols),
            _ => None,
        }
    }
}

/// What pass 1 knows of a row or a column apart from its negatives' LSE.
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    /// LSE over the positives.
    pub positives: Lse,
    /// Sum of the positives' logits.
    pub positive_logits: f64,
    /// Sum of all logits not ignored; of positives alone without label smoothing.
    pub logits: f64,
    /// Pairs ignored.
    pub ignored: u32,
}

impl Default for Tally {
    fn default() -> Self {
        Tally { positives: Lse::EMPTY, positive_logits: 0.0, logits: 0.0, ignored: 0 }
    }
}

impl Tally {
    fn add(&mut self, s: f32, special: Special) {
        match special {
            Special::Positive => {
                self.positives = self.positives.merge(Lse::of(s));
                self.positive_logits += f64::from(s);
                self.logits += f64::from(s);
            }
            Special::Ignored => self.ignored += 1,
        }
    }
}

/// Pass 1's result for one side.
#[derive(Debug, Default)]
pub struct Tallies {
    /// Largest logit over negatives, or the anchor of all.
    pub max: Vec<f32>,
    /// Sum of `exp(s - max)` over negatives.
    pub sum: Vec<f32>,
    pub rest: Vec<Tally>,
    /// What `max` is for every row, if it is one number.
    pub anchor: Option<f32>,
}

impl Tallies {
    pub fn clear(&mut self, len: usize, anchor: Option<f32>) {
        self.anchor = anchor;
        reset(&mut self.max, len, anchor.unwrap_or(f32::NEG_INFINITY));
        reset(&mut self.sum, len, 0.0);
        reset(&mut self.rest, len, Tally::default());
    }

    pub fn pieces(&mut self, length: usize) -> impl Iterator<Item = TallyPiece<'_>> {
        let max = self.max.chunks_mut(length);
        let sum = self.sum.chunks_mut(length);
        let rest = self.rest.chunks_mut(length);
        max.zip(sum).zip(rest).enumerate().map(move |(i, ((max, sum), rest))| TallyPiece {
            first: i * length,
            max,
            sum,
            rest,
        })
    }

    /// All of them as rows (columns) from `first` on.
    pub fn whole(&mut self, first: usize) -> TallyPiece<'_> {
        TallyPiece { first, max: &mut self.max, sum: &mut self.sum, rest: &mut self.rest }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * (self.max.capacity() + self.sum.capacity()) + size_of::<Tally>() * self.rest.capacity()
    }
}

/// Tallies of neighbouring rows (columns).
pub struct TallyPiece<'a> {
    first: usize,
    max: &'a mut [f32],
    sum: &'a mut [f32],
    rest: &'a mut [Tally],
}

impl TallyPiece<'_> {
    /// Its rows (columns).
    pub fn range(&self) -> Range<usize> {
        self.first..self.first + self.max.len()
    }

    /// Adds a special pair's logit.
    pub fn add(&mut self, i: usize, s: f32, special: Special) {
        self.rest[i - self.first].add(s, special);
    }

    /// (max, sum) of rows (columns) `range`.
    fn sums(&mut self, range: &Range<usize>) -> (&mut [f32], &mut [f32]) {
        let at = range.start - self.first..range.end - self.first;
        (&mut self.max[at.clone()], &mut self.sum[at])
    }
}

/// Adds all logits of the tile `s` but holes of minus infinity to [`Tally::logits`].
#[inline(always)]
pub fn add_logits(place: &Place, s: &[f32], row: &mut TallyPiece<'_>, col: &mut TallyPiece<'_>) {
    for (i, s) in place.rows.clone().zip(s.chunks_exact(place.stride())) {
        for (j, &s) in place.cols.clone().zip(s).filter(|(_, s)| **s > f32::NEG_INFINITY) {
            row.rest[i - row.first].logits += f64::from(s);
            col.rest[j - col.first].logits += f64::from(s);
        }
    }
}

/// Adds the exponentials of the tile `s` to what is wanted: against the `anchor` to both sides, and then they are left in
/// `kept` too, a tile or nothing; without one against each row's and each column's own maximum.
#[inline(always)]
pub fn add_exponentials<S: Simd>(
    place: &Place,
    s: &mut [f32],
    anchor: Option<f32>,
    want: Want,
    kept: &mut [f32],
    row: &mut TallyPiece<'_>,
    col: &mut TallyPiece<'_>,
) {
    let (stride, wide) = (place.stride(), place.wide::<S>());
    for row in s.chunks_exact_mut(stride) {
        row[place.cols.len()..wide].fill(f32::NEG_INFINITY);
    }
    let ((row_max, row_sum), (col_max, col_sum)) = (row.sums(&place.rows), col.sums(&place.cols));
    if let Some(anchor) = anchor {
        return tally_anchored::<S>(s, stride, wide, anchor, kept, row_sum, col_sum);
    }
    if want.rows {
        tally_rows::<S>(s, stride, wide, row_max, row_sum);
    }
    if want.cols {
        tally_cols::<S>(s, stride, col_max, col_sum);
    }
}

/// Adds each row's and each column's `exp(s - anchor)` to their sums, and leaves it in `kept`, a tile or nothing.
#[inline(always)]
fn tally_anchored<S: Simd>(
    s: &[f32],
    stride: usize,
    wide: usize,
    anchor: f32,
    kept: &mut [f32],
    rows: &mut [f32],
    cols: &mut [f32],
) {
    let anchor = S::F32::splat(anchor);
    let mut by_col = [0.0; COLS];
    let mut kept = kept.chunks_exact_mut(stride);
    for (row, sum) in s.chunks_exact(stride).zip(rows) {
        let mut part = S::F32::splat(0.0);
        let mut kept = kept.next().map(lanes_mut::<S>);
        for (s, col) in lanes::<S>(&row[..wide]).zip(lanes_mut::<S>(&mut by_col)) {
            let e = exp_uncapped(S::F32::load(s).sub(anchor));
            if let Some(kept) = kept.as_mut().and_then(Iterator::next) {
                e.store(kept);
            }
            part = part.add(e);
            S::F32::load(col).add(e).store(col);
        }
        *sum += total::<S>(part);
    }
    cols.iter_mut().zip(&by_col).for_each(|(c, x)| *c += x);
}

/// Merges each row of the tile into its running (max, sum).
#[inline(always)]
fn tally_rows<S: Simd>(s: &[f32], stride: usize, wide: usize, max: &mut [f32], sum: &mut [f32]) {
    for ((row, max), sum) in s.chunks_exact(stride).zip(max).zip(sum) {
        let row = &row[..wide];
        let mut top = S::F32::splat(f32::NEG_INFINITY);
        for s in lanes::<S>(row) {
            top = top.max(S::F32::load(s));
        }
        // The floor keeps -inf - -inf, a NaN, out of an empty row.
        let new = Num::max(fold::<S>(top, Num::max), *max);
        let anchor = S::F32::splat(Num::max(new, f32::MIN));
        let mut part = S::F32::splat(0.0);
        for s in lanes::<S>(row) {
            part = part.add(exp_uncapped(S::F32::load(s).sub(anchor)));
        }
        *sum = *sum * decay(*max, new) + total::<S>(part);
        *max = new;
    }
}

/// Merges each column of the tile into its running (max, sum).
#[inline(always)]
fn tally_cols<S: Simd>(s: &[f32], stride: usize, max: &mut [f32], sum: &mut [f32]) {
    let (mut old_max, mut old_sum) = ([f32::NEG_INFINITY; COLS], [0.0; COLS]);
    let w = max.len();
    old_max[..w].copy_from_slice(max);
    old_sum[..w].copy_from_slice(sum);
    let lanes_count = <S::F32 as Register<f32>>::LANES;
    for (g, (old_max, old_sum)) in lanes_mut::<S>(&mut old_max).zip(lanes_mut::<S>(&mut old_sum)).enumerate() {
        let at = g * lanes_count;
        if at >= w {
            break;
        }
        let old = S::F32::load(old_max);
        let mut new = old;
        for row in s.chunks_exact(stride) {
            new = new.max(S::F32::load(&row[at..]));
        }
        let anchor = new.max(S::F32::splat(f32::MIN));
        let mut part = S::F32::splat(0.0);
        for row in s.chunks_exact(stride) {
            part = part.add(exp_uncapped(S::F32::load(&row[at..]).sub(anchor)));
        }
        S::F32::load(old_sum).mul_add(decay(old, anchor), part).store(old_sum);
        new.store(old_max);
    }
    max.copy_from_slice(&old_max[..w]);
    sum.copy_from_slice(&old_sum[..w]);
}
