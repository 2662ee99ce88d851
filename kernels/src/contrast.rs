//! The fused passes over the logit matrix, portable path.
//!
//! ```text
//! tally   rows of S: (max, sums over negatives and positives) of a part of the columns, one slot each
//! merge   slots -> the row's softmax (`rows.rs`); columns are the rows of the swapped logits
//! pull    a chunk of G = dL/dS from the tile of S, rounded to halves; its products are `gemm`s
//! ```
//!
//! Logits count in octaves. A softmax of one side knows, of its row i (or column), the norm `(max, weight, smooth, pos)`
//! and the target `t`, and adds to G
//!
//! * `weight 2^(x - max) - smooth` at an ordinary negative,
//! * `pos 2^(x - max) + t` at a positive: with several positives `pos = weight` and `t = -smooth - pull`; with one
//!   `pos = 0` and `t` holds `-(1 - P)` made from the sum over negatives, because P may round to one,
//! * 0 at an ignored pair.

use crate::abi::{HOLE, Logits, Norm, Pull, TILE, Tally};
use crate::law::{self, Num, Softmax};
use crate::simt::*;
use crate::tile::{Acc, ByK, Halves, Place, product};

/// Below this a logit is a hole.
const NO_PAIR: f32 = 0.5 * HOLE;

#[inline(always)]
unsafe fn optional<T: Word>(array: *const T, i: u32, none: T) -> T {
    // SAFETY: the launch contract: an array that is there has an element for every row (column).
    if array.is_null() { none } else { unsafe { load(array.wrapping_add(i as usize)) } }
}

/// What a lane knows of one of its columns.
#[derive(Clone, Copy)]
struct Column {
    shift: f32,
    id: u32,
    ignore: u32,
    inside: bool,
}

impl Column {
    #[inline(always)]
    unsafe fn of(l: &Logits, j: u32) -> Self {
        let inside = j < l.m;
        let at = if inside { j } else { 0 };
        // SAFETY: `at` is a column.
        unsafe {
            Column {
                shift: optional(l.shift_v, at, 0.0),
                id: load(l.id_v.wrapping_add(at as usize)),
                ignore: optional(l.ignore_v, at, u32::MAX),
                inside,
            }
        }
    }
}

/// What a lane knows of one of its rows.
#[derive(Clone, Copy)]
struct Row {
    shift: f32,
    id: u32,
    ignore: u32,
    at: u32,
    inside: bool,
}

impl Row {
    #[inline(always)]
    unsafe fn of(l: &Logits, i: u32) -> Self {
        let inside = i < l.n;
        let at = if inside { i } else { 0 };
        // SAFETY: `at` is a row.
        unsafe {
            Row {
                shift: optional(l.shift_u, at, 0.0),
                id: load(l.id_u.wrapping_add(at as usize)),
                ignore: optional(l.ignore_u, at, u32::MAX - 1),
                at,
                inside,
            }
        }
    }

    /// The logit of a product with column `c`, a hole where there is no pair that counts.
    #[inline(always)]
    fn logit(&self, c: &Column, product: f32, scale: f32) -> f32 {
        let x = fma(product, scale, self.shift + c.shift);
        let counts = self.inside & c.inside & ((self.ignore != c.ignore) | (self.id == c.id));
        if counts { x } else { HOLE }
    }
}

/// The four rows of a lane: fragments 0 and 8, elements 0 and 2.
#[inline(always)]
unsafe fn rows_of(l: &Logits, place: Place, row: u32) -> [Row; 4] {
    // SAFETY: as the callee.
    unsafe {
        [
            Row::of(l, row + place.row_of(0, 0)),
            Row::of(l, row + place.row_of(0, 2)),
            Row::of(l, row + place.row_of(8, 0)),
            Row::of(l, row + place.row_of(8, 2)),
        ]
    }
}

/// The tile of products at (`row`, `col`).
#[inline(always)]
unsafe fn products<T: Half>(l: &Logits, row: u32, col: u32) -> Acc {
    let u = ByK { source: Halves { at: l.u, pitch: l.pitch }, count: l.n, depth: l.depth };
    let v = ByK { source: Halves { at: l.v, pitch: l.pitch }, count: l.m, depth: l.depth };
    // SAFETY: the launch contract.
    unsafe { product::<T, _, _>(u, v, row, col, l.depth) }
}

/// Tallies of a row tile against `tiles` column tiles; grid (splits, row tiles).
///
/// Every lane keeps a running maximum of its own for each of its rows, so that no lane waits for another inside the loop.
///
/// # Safety
/// The launch contract: all of [`Tally`]'s arrays have the extents stated there.
#[inline(always)]
pub unsafe fn tally<T: Half>(a: &Tally) {
    let l = &a.logits;
    let place = Place::new();
    let row = block_y() * TILE;
    let with_all = !a.all.is_null();
    // SAFETY: the launch contract; slots are this block's own.
    unsafe {
        let rows = rows_of(l, place, row);
        let mut max = [HOLE; 4];
        let (mut negatives, mut positives, mut pulled) = ([0f32; 4], [0f32; 4], [0f32; 4]);
        let (mut all, mut ignored) = ([0f32; 4], [0f32; 4]);
        let first = block_x() * a.tiles;
        let mut t = first;
        while t < first + a.tiles && t * TILE < l.m {
            let mut acc = products::<T>(l, row, t * TILE);
            let mut top = max;
            let mut j = 0;
            while j < 16 {
                let column = Column::of(l, t * TILE + place.col_of(j >> 1, j & 1));
                let mut r = 0;
                while r < 4 {
                    let x = &mut acc[(r >> 1) * 8 + (j >> 1)][(r & 1) * 2 + (j & 1)];
                    *x = rows[r].logit(&column, *x, l.scale);
                    top[r] = Num::max(top[r], *x);
                    if with_all {
                        let counts = *x > NO_PAIR;
                        all[r] += if counts { *x } else { 0.0 };
                        ignored[r] += if column.inside & !counts { 1.0 } else { 0.0 };
                    }
                    r += 1;
                }
                j += 1;
            }
            let mut r = 0;
            while r < 4 {
                let shrink = exp2(max[r] - top[r]);
                negatives[r] *= shrink;
                positives[r] *= shrink;
                max[r] = top[r];
                r += 1;
            }
            let mut j = 0;
            while j < 16 {
                let id = Column::of(l, t * TILE + place.col_of(j >> 1, j & 1)).id;
                let mut r = 0;
                while r < 4 {
                    let x = acc[(r >> 1) * 8 + (j >> 1)][(r & 1) * 2 + (j & 1)];
                    let counts = x > NO_PAIR;
                    let e = if counts { exp2(x - max[r]) } else { 0.0 };
                    let positive = counts & (id == rows[r].id);
                    negatives[r] += if positive { 0.0 } else { e };
                    positives[r] += if positive { e } else { 0.0 };
                    pulled[r] += if positive { x } else { 0.0 };
                    r += 1;
                }
                j += 1;
            }
            t += 1;
        }
        // The four lanes of a row.
        let slot = (block_x() * 2 + (warp() & 1)) as usize * l.n as usize;
        let mut r = 0;
        while r < 4 {
            let top = max_lanes(max[r], 4);
            let shrink = exp2(max[r] - top);
            let tally = [
                top,
                sum_lanes(negatives[r] * shrink, 4),
                sum_lanes(positives[r] * shrink, 4),
                sum_lanes(pulled[r], 4),
            ];
            let whole = [sum_lanes(all[r], 4), sum_lanes(ignored[r], 4)];
            if rows[r].inside && lane() & 3 == 0 {
                store(a.slots.wrapping_add(slot + rows[r].at as usize), tally);
                if with_all {
                    store(a.all.wrapping_add(slot + rows[r].at as usize), whole);
                }
            }
            r += 1;
        }
    }
}

/// G and what is summed over the tile, for a logit in octaves.
trait Law: Copy {
    /// What it knows of a row or a column.
    type Side: Copy;
    unsafe fn row(&self, a: &Pull, i: u32) -> Self::Side;
    unsafe fn col(&self, a: &Pull, j: u32) -> Self::Side;
    /// (G, value) of a pair that is no positive.
    fn negative(&self, row: &Self::Side, col: &Self::Side, x: f32) -> (f32, f32);
    /// (G, value) of a positive.
    unsafe fn positive(&self, a: &Pull, row: (u32, &Self::Side), col: (u32, &Self::Side), x: f32) -> (f32, f32);
}

/// Conditional and joint losses, and plain probabilities: a sum of a row and a column softmax.
#[derive(Clone, Copy)]
pub struct SoftmaxLaw;

#[inline(always)]
unsafe fn norm(norms: *const Norm, i: u32) -> Norm {
    // SAFETY: as the callee. A softmax that is not there is 0 times an exponential that is 0.
    unsafe { optional(norms, i, [f32::INFINITY, 0.0, 0.0, 0.0]) }
}

#[inline(always)]
fn softmax(max: f32, weight: f32, x: f32) -> f32 {
    Softmax { max: Octave(max), weight: Octave(weight) }.of(Octave(x)).0
}

impl Law for SoftmaxLaw {
    type Side = Norm;
    #[inline(always)]
    unsafe fn row(&self, a: &Pull, i: u32) -> Norm {
        // SAFETY: the launch contract.
        unsafe { norm(a.norm_u, i) }
    }
    #[inline(always)]
    unsafe fn col(&self, a: &Pull, j: u32) -> Norm {
        // SAFETY: the launch contract.
        unsafe { norm(a.norm_v, j) }
    }
    #[inline(always)]
    fn negative(&self, row: &Norm, col: &Norm, x: f32) -> (f32, f32) {
        (softmax(row[0], row[1], x) + softmax(col[0], col[1], x) - (row[2] + col[2]), 0.0)
    }
    #[inline(always)]
    unsafe fn positive(&self, a: &Pull, (i, row): (u32, &Norm), (j, col): (u32, &Norm), x: f32) -> (f32, f32) {
        // SAFETY: the launch contract.
        let (t_u, t_v) = unsafe { (optional(a.target_u, i, 0.0), optional(a.target_v, j, 0.0)) };
        (softmax(row[0], row[3], x) + softmax(col[0], col[3], x) + (t_u + t_v), 0.0)
    }
}

/// The sigmoid loss; a row's norm is its share of the loss.
#[derive(Clone, Copy)]
pub struct SigmoidLaw;

impl Law for SigmoidLaw {
    type Side = f32;
    #[inline(always)]
    unsafe fn row(&self, a: &Pull, i: u32) -> f32 {
        // SAFETY: the launch contract.
        unsafe { load(a.target_u.wrapping_add(i as usize)) }
    }
    #[inline(always)]
    unsafe fn col(&self, a: &Pull, _: u32) -> f32 {
        a.smoothing
    }
    #[inline(always)]
    fn negative(&self, share: &f32, smoothing: &f32, x: f32) -> (f32, f32) {
        let (value, sigma) = law::softplus_sigmoid(Octave(x));
        (share * (sigma.0 - 0.5 * smoothing), share * (value.0 - 0.5 * smoothing * Octave::NATS * x))
    }
    #[inline(always)]
    unsafe fn positive(&self, _: &Pull, (_, share): (u32, &f32), (_, smoothing): (u32, &f32), x: f32) -> (f32, f32) {
        // softplus(x) - (1 - e/2) x = softplus(-x) + e/2 x, and sigmoid(x) - 1 = -sigmoid(-x).
        let (value, sigma) = law::softplus_sigmoid(Octave(-x));
        (share * (0.5 * smoothing - sigma.0), share * (value.0 + 0.5 * smoothing * Octave::NATS * x))
    }
}

/// One tile of a chunk of `gain G`; grid (column tiles, row tiles) of the chunk.
///
/// # Safety
/// The launch contract: all of [`Pull`]'s arrays have the extents stated there.
#[inline(always)]
unsafe fn pull<T: Half, L: Law>(a: &Pull, law: L) {
    let l = &a.logits;
    let place = Place::new();
    let (in_row, in_col) = (block_y() * TILE, block_x() * TILE);
    let (row, col) = (a.row + in_row, a.col + in_col);
    let (with_rows, with_cols) = (!a.row_sums.is_null(), !a.col_sums.is_null());
    // SAFETY: the launch contract; every block has its own part of the chunk and its own slots.
    unsafe {
        let acc = products::<T>(l, row, col);
        let rows = rows_of(l, place, row);
        let sides = [law.row(a, rows[0].at), law.row(a, rows[1].at), law.row(a, rows[2].at), law.row(a, rows[3].at)];
        let (mut value, mut sum, mut moment) = ([0f32; 4], [0f32; 4], [0f32; 4]);
        let mut f = 0;
        while f < 8 {
            let mut g = [[0f32; 2]; 4];
            let mut c = 0;
            while c < 2 {
                let j = col + place.col_of(f, c);
                let column = Column::of(l, j);
                let other = law.col(a, if column.inside { j } else { 0 });
                let mut by_col = 0f32;
                let mut r = 0;
                while r < 4 {
                    let x = rows[r].logit(&column, acc[(r >> 1) * 8 + f][(r & 1) * 2 + c], l.scale);
                    let counts = x > NO_PAIR;
                    let x = if counts { x + a.bias } else { 0.0 };
                    let (mut g_ij, mut v_ij) = law.negative(&sides[r], &other, x);
                    if counts & (column.id == rows[r].id) {
                        (g_ij, v_ij) = law.positive(a, (rows[r].at, &sides[r]), (j, &other), x);
                    }
                    g_ij = if counts { g_ij } else { 0.0 };
                    value[r] += if counts { v_ij } else { 0.0 };
                    sum[r] += g_ij;
                    moment[r] = fma(g_ij, x - a.bias, moment[r]);
                    by_col += g_ij;
                    g[r][c] = g_ij * a.gain;
                    r += 1;
                }
                if with_cols {
                    // Lanes that differ in bits 2 to 4 hold other rows of this column.
                    by_col += shuffle_xor(by_col, 4);
                    by_col += shuffle_xor(by_col, 8);
                    by_col += shuffle_xor(by_col, 16);
                    let inside = in_col + place.col_of(f, c);
                    if column.inside && lane() < 4 && inside < a.cols {
                        let slot = (block_y() * 4 + (warp() >> 1)) as usize;
                        store(a.col_sums.wrapping_add(slot * a.cols as usize + inside as usize), by_col);
                    }
                }
                c += 1;
            }
            let at = in_col + place.col_of(f, 0);
            let mut r = 0;
            while r < 4 {
                let i = in_row + place.row_of((r >> 1) * 8, (r & 1) * 2);
                if i < a.rows && at < a.pitch {
                    let to = a.g.wrapping_add(i as usize * a.pitch as usize + at as usize);
                    store(to.cast::<u32>(), T::pack(g[r][0], g[r][1]));
                }
                r += 1;
            }
            f += 1;
        }
        if with_rows {
            let slot = (block_x() * 2 + (warp() & 1)) as usize * a.rows as usize;
            let mut r = 0;
            while r < 4 {
                let sums = [sum_lanes(value[r], 4), sum_lanes(sum[r], 4), sum_lanes(moment[r], 4), 0.0];
                let i = in_row + place.row_of((r >> 1) * 8, (r & 1) * 2);
                if rows[r].inside && lane() & 3 == 0 && i < a.rows {
                    store(a.row_sums.wrapping_add(slot + i as usize), sums);
                }
                r += 1;
            }
        }
    }
}

/// [`Pull`] of the softmax losses.
///
/// # Safety
/// The launch contract.
#[inline(always)]
pub unsafe fn pull_softmax<T: Half>(a: &Pull) {
    // SAFETY: the caller's promise.
    unsafe { pull::<T, _>(a, SoftmaxLaw) }
}

/// [`Pull`] of the sigmoid loss.
///
/// # Safety
/// The launch contract.
#[inline(always)]
pub unsafe fn pull_sigmoid<T: Half>(a: &Pull) {
    // SAFETY: the caller's promise.
    unsafe { pull::<T, _>(a, SigmoidLaw) }
}
