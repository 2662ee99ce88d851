//! The fused passes over the logit matrix.
//!
//! ```text
//! tally   rows of S: (max, sums over negatives and positives) of a part of the columns, one slot each
//! both    rows and columns of plain pairs by one exponential, sums over tiles to slots (Hopper, unit rows)
//! merge   slots -> the row's softmax (`rows.rs`); columns are the rows of the swapped logits
//! pull    a chunk of G = dL/dS from the tile of S, rounded to halves; its products are `gemm`s
//! ```
//!
//! What happens to a tile of S is written once, over [`Fragments`]; the mainloops that make it are `tile.rs` (portable,
//! here) and `hopper.rs`.
//!
//! Logits count in octaves. A softmax of one side knows, of its row i (or column), the norm `(max, weight, smooth, pos)`
//! and the target `t`, and adds to G
//!
//! * `weight 2^(x - max) - smooth` at an ordinary negative,
//! * `pos 2^(x - max) + t` at a positive: with several positives `pos = weight` and `t = -smooth - pull`; with one
//!   `pos = 0` and `t` holds `-(1 - P)` made from the sum over negatives, because P may round to one,
//! * 0 at an ignored pair.

use crate::abi::{ANCHOR, COLUMN_PULL, COLUMN_TALLY, Each, HOLE, Logits, Norm, Pull, SPAN, TILE, TILE_SHARED, Tally};
use crate::law::{self, Num, Softmax};
use crate::rows::own;
use crate::simt::*;
use crate::tile::{Acc, ByK, Halves, Place, product};

/// Below this a logit is a hole.
const NO_PAIR: f32 = 0.5 * HOLE;

#[inline(always)]
pub(crate) unsafe fn optional<T: Word>(array: *const T, i: u32, none: T) -> T {
    // SAFETY: the launch contract: an array that is there has an element for every row (column).
    if array.is_null() { none } else { unsafe { load(array.wrapping_add(i as usize)) } }
}

/// A whole number of octaves, [`ANCHOR`] or a little less below a logit of `scale`.
#[inline(always)]
pub fn anchor(scale: f32) -> f32 {
    (scale as i32 + 1) as f32 - ANCHOR
}

/// Whether the plain pairs have been tallied from the anchor, and no block raised its flag; all lanes of a warp ask.
///
/// # Safety
/// The launch contract: `blocks` flags, or null.
#[inline(always)]
pub unsafe fn anchored(flags: *const u32, blocks: u32) -> bool {
    // SAFETY: the caller's promise.
    !flags.is_null() & unsafe { none_raised(flags, blocks) }
}

/// Whether none of `blocks` flags is raised, nor of none; all lanes of a warp ask.
///
/// # Safety
/// The launch contract: `blocks` flags, or null.
#[inline(always)]
pub unsafe fn none_raised(flags: *const u32, blocks: u32) -> bool {
    let (mut raised, mut b) = (0, lane());
    while b < blocks && !flags.is_null() {
        // SAFETY: the caller's promise.
        raised |= unsafe { load(flags.wrapping_add(b as usize)) };
        b += 32;
    }
    ballot(raised != 0) == 0
}

/// Whether no flag of [`crate::abi::Normalise::far`] is raised of `rows` rows from `row` on; all lanes get the answer.
///
/// # Safety
/// The launch contract: flags of these rows, or null.
#[inline(always)]
pub unsafe fn near(far: *const u32, row: u32, rows: u32) -> bool {
    let first = if far.is_null() { far } else { far.wrapping_add((row / 256) as usize) };
    // SAFETY: the caller's promise.
    unsafe { none_raised(first, (row % 256 + rows).div_ceil(256)) }
}

/// Octaves that a maximum may lie below the anchor: a weight of a softmax times them is a number of f32.
pub const NEAR: f32 = 100.0;

/// Which column tiles of [`SPAN`] columns a walk along a row tile takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// All.
    All,
    /// Plain ones.
    Plain,
    /// The others.
    Rest,
}

/// A walk along the column tiles of one row tile, the same in all lanes of a warp.
pub struct Walk {
    take: Take,
    span: [u32; 2],
    spans: *const [u32; 2],
    at: u32,
    end: u32,
    first: u32,
    mask: u32,
}

impl Walk {
    /// Along the column tiles from `at` to `end` of the row tile whose first row is `row`.
    ///
    /// # Safety
    /// The launch contract of `l`, which has spans unless all are taken; the tiles are of `l`.
    #[inline(always)]
    pub unsafe fn new(l: &Logits, take: Take, row: u32, at: u32, end: u32) -> Self {
        // SAFETY: the caller's promise.
        let span = if take == Take::All { [0; 2] } else { unsafe { load(l.span_u.wrapping_add((row / SPAN) as usize)) } };
        Walk { take, span, spans: l.span_v, at, end, first: at, mask: 0 }
    }

    /// The next tile, or `end`; all lanes of a warp ask.
    #[inline(always)]
    pub fn next_tile(&mut self) -> u32 {
        while self.mask == 0 {
            if self.at >= self.end {
                return self.end;
            }
            // 32 tiles at a time, one a lane.
            let tile = self.at + lane();
            let mut taken = tile < self.end;
            if self.take != Take::All {
                let tile = if taken { tile } else { self.at };
                // SAFETY: the tile is one of the logits'.
                let span = unsafe { load(self.spans.wrapping_add(tile as usize)) };
                taken &= apart([self.span, span]) == (self.take == Take::Plain);
            }
            self.mask = ballot(taken);
            (self.first, self.at) = (self.at, self.at + 32);
        }
        let tile = self.first + self.mask.trailing_zeros();
        self.mask &= self.mask - 1;
        tile
    }
}

/// The spans of the tile at (`row`, `col`), inside one each way.
///
/// # Safety
/// The launch contract of `l`, which has spans.
#[inline(always)]
pub unsafe fn spans_of(l: &Logits, row: u32, col: u32) -> [[u32; 2]; 2] {
    // SAFETY: the caller's promise.
    unsafe { [load(l.span_u.wrapping_add((row / SPAN) as usize)), load(l.span_v.wrapping_add((col / SPAN) as usize))] }
}

/// Whether the pairs of two spans are plain.
#[inline(always)]
pub fn apart([u, v]: [[u32; 2]; 2]) -> bool {
    (u[1] < v[0]) | (v[1] < u[0])
}

/// What the block knows of a tile's columns: staged in shared memory, so that the epilogue, which is all unrolled, reads
/// it at constant offsets. Two buffers, used in turn: a barrier a tile is enough.
#[derive(Clone, Copy)]
pub struct Columns {
    /// Shared address: shifts, ids, ignore ids of the columns; then, for a pull, norms and targets.
    at: u32,
    count: u32,
}

impl Columns {
    /// The buffer of turn `turn` of two at `base`, `count` columns each; `bytes` is [`crate::abi::COLUMN_TALLY`] or
    /// [`crate::abi::COLUMN_PULL`].
    #[inline(always)]
    pub fn new(base: u32, turn: u32, count: u32, bytes: u32) -> Self {
        Columns { at: base + (turn & 1) * count * bytes, count }
    }

    /// Thread `t` brings column `col + t`. A column past the last has a shift of -inf.
    ///
    /// # Safety
    /// The launch contract of `l`; the buffer is not being read.
    #[inline(always)]
    pub unsafe fn stage(self, l: &Logits, col: u32, t: u32) {
        let j = col + t;
        let to = self.at + 4 * t;
        if t < self.count {
            let inside = j < l.m;
            let from = if inside { j } else { 0 };
            // SAFETY: `from` is a column.
            unsafe {
                let shift = optional(l.shift_v, from, 0.0);
                store_shared(to, if inside { shift } else { f32::NEG_INFINITY });
                store_shared(to + 4 * self.count, load(l.id_v.wrapping_add(from as usize)));
                let ignore = optional(l.ignore_v, from, u32::MAX);
                store_shared(to + 8 * self.count, if inside { ignore } else { u32::MAX });
            }
        }
    }

    /// What [`pull`] needs besides.
    ///
    /// # Safety
    /// As [`Columns::stage`], for `a`.
    #[inline(always)]
    pub unsafe fn stage_norms(self, a: &Pull, col: u32, t: u32) {
        if t < self.count {
            let from = if col + t < a.logits.m { col + t } else { 0 };
            let to = self.at + 12 * self.count;
            // SAFETY: `from` is a column.
            unsafe {
                store_shared(to + 16 * t, norm(a.norm_v, from));
                store_shared(to + 16 * self.count + 4 * t, optional(a.target_v, from, 0.0));
            }
        }
    }

    /// What [`pull_plain_pairs`] needs instead of all: the weight of the thread's column.
    ///
    /// # Safety
    /// The buffer is not being read.
    #[inline(always)]
    pub unsafe fn stage_weight(self, weight: f32, t: u32) {
        // SAFETY: the caller's promise; threads are as many as columns.
        unsafe { store_shared(self.at + 4 * t, weight) };
    }
    #[inline(always)]
    unsafe fn weights(self, j: u32) -> [f32; 2] {
        // SAFETY: staged.
        unsafe { load_shared(self.at + 4 * j) }
    }

    /// What [`pull_anchored`] needs instead of all.
    ///
    /// # Safety
    /// As [`Columns::stage_weight`].
    #[inline(always)]
    pub unsafe fn stage_shares(self, s: &Shares, t: u32) {
        let words = [s.negative, s.positive, s.target, f32::from_bits(s.id)];
        // SAFETY: the caller's promise; threads are as many as columns.
        unsafe { store_shared(self.at + 16 * t, words) };
    }
    #[inline(always)]
    unsafe fn shares(self, j: u32) -> Shares {
        // SAFETY: staged.
        let [negative, positive, target, id]: [f32; 4] = unsafe { load_shared(self.at + 16 * j) };
        Shares { negative, positive, target, id: id.to_bits() }
    }

    /// The pair whose first is column `j` of the tile.
    #[inline(always)]
    unsafe fn pair(self, j: u32) -> Pair {
        let at = self.at + 4 * j;
        // SAFETY: staged.
        unsafe { Pair { shift: load_shared(at), id: self.ids(j), ignore: load_shared(at + 8 * self.count) } }
    }
    #[inline(always)]
    unsafe fn ids(self, j: u32) -> [u32; 2] {
        // SAFETY: staged.
        unsafe { load_shared(self.at + 4 * j + 4 * self.count) }
    }
    #[inline(always)]
    unsafe fn norm(self, j: u32) -> Norm {
        // SAFETY: staged.
        unsafe { load_shared(self.at + 12 * self.count + 16 * j) }
    }
    #[inline(always)]
    unsafe fn targets(self, j: u32) -> [f32; 2] {
        // SAFETY: staged.
        unsafe { load_shared(self.at + 28 * self.count + 4 * j) }
    }
}

/// Two neighbouring columns.
#[derive(Clone, Copy)]
struct Pair {
    shift: [f32; 2],
    id: [u32; 2],
    ignore: [u32; 2],
}

/// What a lane knows of one of its rows.
#[derive(Clone, Copy)]
pub struct Row {
    shift: f32,
    id: u32,
    ignore: u32,
}

impl Row {
    /// Row `i`; one past the last has a shift of -inf.
    #[inline(always)]
    unsafe fn of(l: &Logits, i: u32) -> Self {
        let inside = i < l.n;
        let at = if inside { i } else { 0 };
        // SAFETY: `at` is a row.
        unsafe {
            Row {
                shift: if inside { optional(l.shift_u, at, 0.0) } else { f32::NEG_INFINITY },
                id: load(l.id_u.wrapping_add(at as usize)),
                ignore: optional(l.ignore_u, at, u32::MAX - 1),
            }
        }
    }

    /// The logit of a product with column c of `pair`: a hole where the pair is ignored, -inf outside of the matrix.
    #[inline(always)]
    fn logit(&self, pair: &Pair, c: usize, product: f32, scale: f32) -> f32 {
        let x = fma(product, scale, self.shift + pair.shift[c]);
        if (self.ignore != pair.ignore[c]) | (self.id == pair.id[c]) { x } else { HOLE }
    }
}

/// A tile's products in a lane's registers: R rows of the tile by pairs of neighbouring columns.
pub trait Fragments<const R: usize> {
    /// Pairs of columns of a lane.
    const PAIRS: usize;
    /// Row of the tile.
    fn row(&self, r: usize) -> u32;
    /// Column of the tile, the first of pair `p`.
    fn col(&self, p: usize) -> u32;
    /// The product of row r and column c of pair p.
    fn get(&self, r: usize, p: usize, c: usize) -> f32;
    /// Replaces it.
    fn set(&mut self, r: usize, p: usize, c: usize, x: f32);
    /// Takes pair `p` of G of all rows, as halves; pairs come in order.
    ///
    /// # Safety
    /// The launch contract of the chunk.
    unsafe fn put(&mut self, p: usize, g: [u32; R]);
}

/// The rows of a lane in the tile whose first is `row`.
///
/// # Safety
/// The launch contract of `l`.
#[inline(always)]
pub unsafe fn rows_of<F: Fragments<R>, const R: usize>(l: &Logits, tile: &F, row: u32) -> [Row; R] {
    // SAFETY: as the caller.
    let mut rows = [unsafe { Row::of(l, row + tile.row(0)) }; R];
    let mut r = 1;
    while r < R {
        // SAFETY: as the caller.
        rows[r] = unsafe { Row::of(l, row + tile.row(r)) };
        r += 1;
    }
    rows
}

/// Every so many pairs a fence for the assembler's scheduler: it would bring all columns first, and run out of registers.
#[inline(always)]
fn hold(pair: usize, every: usize) {
    if pair.is_multiple_of(every) {
        sync_warp();
    }
}

/// A branch that the assembler cannot see through, and so cannot schedule across; the compiler can, what is not [`pin`]ned.
#[inline(always)]
fn hold_all() {
    if ballot(true) == 0 {
        trap();
    }
}

/// A lane's tallies of its rows; with ALL, sums over all logits too. Every lane keeps a running maximum of its own, so that none waits for another.
pub struct RowTallies<const R: usize, const ALL: bool> {
    max: [f32; R],
    negatives: [f32; R],
    positives: [f32; R],
    pulled: [f32; R],
    all: [f32; R],
    ignored: [f32; R],
}

impl<const R: usize, const ALL: bool> RowTallies<R, ALL> {
    /// Of nothing.
    #[inline(always)]
    pub fn none() -> Self {
        let none = [0.0; R];
        RowTallies { max: [HOLE; R], negatives: none, positives: none, pulled: none, all: none, ignored: none }
    }

    /// Adds a tile of `columns`; its products become logits.
    ///
    /// # Safety
    /// The launch contract of [`Tally`].
    #[inline(always)]
    pub unsafe fn add<F: Fragments<R>>(&mut self, a: &Tally, rows: &[Row; R], tile: &mut F, columns: Columns) {
        let l = &a.logits;
        // SAFETY: two numbers, if any.
        let scale = l.scale * unsafe { optional(l.live, 0, 1.0) };
        let mut top = self.max;
        let mut p = 0;
        while p < F::PAIRS {
            // SAFETY: staged.
            let pair = unsafe { columns.pair(tile.col(p)) };
            let mut c = 0;
            while c < 2 {
                let mut r = 0;
                while r < R {
                    let x = rows[r].logit(&pair, c, tile.get(r, p, c), scale);
                    tile.set(r, p, c, x);
                    top[r] = Num::max(top[r], x);
                    if ALL {
                        self.all[r] += if x > NO_PAIR { x } else { 0.0 };
                        self.ignored[r] += if x == HOLE { 1.0 } else { 0.0 };
                    }
                    r += 1;
                }
                c += 1;
            }
            p += 1;
            hold(p, 8);
        }
        let mut r = 0;
        while r < R {
            let shrink = exp2(self.max[r] - top[r]);
            self.negatives[r] *= shrink;
            self.positives[r] *= shrink;
            self.max[r] = top[r];
            r += 1;
        }
        let mut p = 0;
        while p < F::PAIRS {
            // SAFETY: staged.
            let id = unsafe { columns.ids(tile.col(p)) };
            let mut c = 0;
            while c < 2 {
                let mut r = 0;
                while r < R {
                    let x = tile.get(r, p, c);
                    let counts = x > NO_PAIR;
                    let e = if counts { exp2(x - self.max[r]) } else { 0.0 };
                    let positive = counts & (id[c] == rows[r].id);
                    self.negatives[r] += if positive { 0.0 } else { e };
                    self.positives[r] += if positive { e } else { 0.0 };
                    self.pulled[r] += if positive { x } else { 0.0 };
                    r += 1;
                }
                c += 1;
            }
            p += 1;
            hold(p, 8);
        }
    }

    /// Joins the four lanes of each row of the tile at `row`, and writes its slot.
    ///
    /// # Safety
    /// The launch contract of [`Tally`]; the slot is this warp's alone.
    #[inline(always)]
    pub unsafe fn store<F: Fragments<R>>(&self, a: &Tally, tile: &F, row: u32, slot: u32) {
        let slot = slot as usize * a.logits.n as usize;
        let mut r = 0;
        while r < R {
            let top = max_lanes(self.max[r], 4);
            let shrink = exp2(self.max[r] - top);
            let tally = [
                top,
                sum_lanes(self.negatives[r] * shrink, 4),
                sum_lanes(self.positives[r] * shrink, 4),
                sum_lanes(self.pulled[r], 4),
            ];
            let whole = if ALL { [sum_lanes(self.all[r], 4), sum_lanes(self.ignored[r], 4)] } else { [0.0; 2] };
            let i = row + tile.row(r);
            if i < a.logits.n && lane() & 3 == 0 {
                // SAFETY: the launch contract.
                unsafe {
                    store(a.slots.wrapping_add(slot + i as usize), tally);
                    if ALL {
                        store(a.all.wrapping_add(slot + i as usize), whole);
                    }
                }
            }
            r += 1;
        }
    }
}

/// G and what is summed over the tile, for a logit in octaves. Without branches: a positive is a choice of numbers.
pub trait Law: Copy {
    /// Whether columns have norms.
    const NORMS: bool;
    /// Whether G is multiplied by [`Pull::factor`].
    const FACTORED: bool;
    /// What it knows of a row.
    type Row: Copy;
    /// Of row `i`.
    ///
    /// # Safety
    /// The launch contract.
    unsafe fn row(&self, a: &Pull, i: u32) -> Self::Row;
    /// (G, value) of a pair in a column of norm and target `col`.
    fn of(&self, a: &Pull, row: &Self::Row, col: (&Norm, f32), positive: bool, x: f32) -> (f32, f32);
    /// By what a pair's G counts in d tau: its logit `x` without a bias, or that less what changes nothing.
    #[inline(always)]
    fn lever(&self, _row: &Self::Row, _col: &Norm, x: f32) -> f32 {
        x
    }
}

/// Conditional and joint losses, and plain probabilities: a sum of a row and a column softmax.
#[derive(Clone, Copy)]
pub struct SoftmaxLaw;

#[inline(always)]
unsafe fn norm(norms: *const Norm, i: u32) -> Norm {
    // SAFETY: as the caller. A softmax that is not there is 0 times an exponential that is 0.
    unsafe { optional(norms, i, [f32::INFINITY, 0.0, 0.0, 0.0]) }
}

/// `weight 2^(x - max)`.
#[inline(always)]
fn softmax(max: f32, weight: f32, x: f32) -> f32 {
    Softmax { max: Octave(max), weight: Octave(weight) }.of(Octave(x)).0
}

impl Law for SoftmaxLaw {
    const NORMS: bool = true;
    const FACTORED: bool = false;
    type Row = (Norm, f32);
    #[inline(always)]
    unsafe fn row(&self, a: &Pull, i: u32) -> (Norm, f32) {
        // SAFETY: the launch contract.
        unsafe { (norm(a.norm_u, i), optional(a.target_u, i, 0.0)) }
    }
    #[inline(always)]
    fn of(&self, _: &Pull, (row, t): &(Norm, f32), (col, s): (&Norm, f32), positive: bool, x: f32) -> (f32, f32) {
        let (by_row, by_col) = if positive { (row[3], col[3]) } else { (row[1], col[1]) };
        let rest = if positive { t + s } else { -(row[2] + col[2]) };
        (softmax(row[0], by_row, x) + (softmax(col[0], by_col, x) + rest), 0.0)
    }
}

/// The sigmoid loss; a row's target is its share of the loss.
#[derive(Clone, Copy)]
pub struct SigmoidLaw;

impl Law for SigmoidLaw {
    const NORMS: bool = false;
    const FACTORED: bool = false;
    type Row = f32;
    #[inline(always)]
    unsafe fn row(&self, a: &Pull, i: u32) -> f32 {
        // SAFETY: the launch contract.
        unsafe { load(a.target_u.wrapping_add(i as usize)) }
    }
    #[inline(always)]
    fn of(&self, a: &Pull, share: &f32, _: (&Norm, f32), positive: bool, x: f32) -> (f32, f32) {
        // softplus(x) - (1 - e/2) x = softplus(-x) + e/2 x, and sigmoid(x) - 1 = -sigmoid(-x): a positive is a negative
        // of the opposite logit, pulled the other way.
        let (x, signed) = if positive { (-x, -share) } else { (x, *share) };
        let (value, sigma) = law::softplus_sigmoid(Octave(x));
        let half = 0.5 * a.smoothing;
        (signed * (sigma.0 - half), share * (value.0 - half * Octave::NATS * x))
    }
}

/// Logits as they are.
#[derive(Clone, Copy)]
pub struct PlainLaw;

impl Law for PlainLaw {
    const NORMS: bool = false;
    const FACTORED: bool = false;
    type Row = ();
    #[inline(always)]
    unsafe fn row(&self, _: &Pull, _: u32) {}
    #[inline(always)]
    fn of(&self, _: &Pull, _: &(), _: (&Norm, f32), _: bool, x: f32) -> (f32, f32) {
        (x, 0.0)
    }
}

/// A softmax times a factor of each pair: what MMD pulls with. The factor is a chunk of its own, made before from other
/// rows than the embeddings: two products at once would be more accumulators than a lane has registers.
#[derive(Clone, Copy)]
pub struct FactoredLaw;

impl Law for FactoredLaw {
    const NORMS: bool = true;
    const FACTORED: bool = true;
    type Row = Norm;
    #[inline(always)]
    unsafe fn row(&self, a: &Pull, i: u32) -> Norm {
        // SAFETY: the launch contract.
        unsafe { norm(a.norm_u, i) }
    }
    #[inline(always)]
    fn of(&self, _: &Pull, row: &Norm, (col, _): (&Norm, f32), positive: bool, x: f32) -> (f32, f32) {
        let weight = if positive { row[3] + col[3] } else { row[1] + col[1] };
        let lever = self.lever(row, col, x);
        let p = softmax(0.0, weight, lever);
        // Over the sum of P its mean, from which d tau's levers count in the end.
        (p, p * lever)
    }
    /// From the maximum of the one softmax that is there: along it G adds up to nothing, but for rounding, whose sum is not
    /// to be multiplied by what all its logits have in common. Their mean is not known before the sums are.
    #[inline(always)]
    fn lever(&self, row: &Norm, col: &Norm, x: f32) -> f32 {
        x - row[0].min(col[0])
    }
}

/// One tile of a chunk of `gain G`, at (`in_row`, `in_col`) of the chunk: handed to [`Fragments::put`], and with SUMS its
/// sums to the slots `row_slot` and `col_slot`, which are this warp's.
///
/// # Safety
/// The launch contract: all of [`Pull`]'s arrays have the extents stated there.
#[inline(always)]
pub unsafe fn pull<T: Half, L: Law, F: Fragments<R>, const R: usize, const SUMS: bool>(
    a: &Pull,
    law: L,
    tile: &mut F,
    columns: Columns,
    [in_row, in_col]: [u32; 2],
    [row_slot, col_slot]: [u32; 2],
) {
    let l = &a.logits;
    let row = a.row + in_row;
    // SAFETY: the launch contract.
    unsafe {
        let rows = rows_of(l, tile, row);
        let side = |r: usize| law.row(a, (row + tile.row(r)).min(l.n.saturating_sub(1)));
        let mut sides = [side(0); R];
        let mut r = 1;
        while r < R {
            sides[r] = side(r);
            r += 1;
        }
        let scale = l.scale * optional(l.live, 0, 1.0);
        // No softmax has a bias, nor a register for one.
        let bias = if L::NORMS { 0.0 } else { a.bias + optional(l.live, 1, 0.0) };
        let (mut value, mut sum, mut moment, mut weight) = ([0f32; R], [0f32; R], [0f32; R], [0f32; R]);
        let mut p = 0;
        while p < F::PAIRS {
            let mut g = [[0f32; 2]; R];
            let j = tile.col(p);
            let pair = columns.pair(j);
            let targets = if L::NORMS { columns.targets(j) } else { [0.0; 2] };
            let mut factor = [[1f32; 2]; R];
            if L::FACTORED {
                let at = (in_col + j).min(a.pitch - 2) as usize;
                let mut r = 0;
                while r < R {
                    let i = (in_row + tile.row(r)).min(a.rows - 1) as usize;
                    factor[r] = T::unpack(load(a.factor.wrapping_add(i * a.pitch as usize + at).cast::<u32>()));
                    r += 1;
                }
            }
            let mut c = 0;
            while c < 2 {
                let norm = if L::NORMS { columns.norm(j + c as u32) } else { [0.0; 4] };
                let mut by_col = 0f32;
                let mut r = 0;
                while r < R {
                    let x = rows[r].logit(&pair, c, tile.get(r, p, c), scale);
                    let counts = x > NO_PAIR;
                    let x = if counts { x + bias } else { 0.0 };
                    let positive = pair.id[c] == rows[r].id;
                    let (p_ij, v_ij) = law.of(a, &sides[r], (&norm, targets[c]), positive, x);
                    let g_ij = if L::FACTORED { p_ij * factor[r][c] } else { p_ij };
                    let g_ij = if counts { g_ij } else { 0.0 };
                    value[r] += if counts { v_ij } else { 0.0 };
                    sum[r] += g_ij;
                    weight[r] += if L::FACTORED & counts { p_ij } else { 0.0 };
                    let lever = if counts { law.lever(&sides[r], &norm, x - bias) } else { 0.0 };
                    moment[r] = fma(g_ij, lever, moment[r]);
                    by_col += g_ij;
                    g[r][c] = g_ij * a.gain;
                    r += 1;
                }
                if SUMS {
                    // Lanes that differ in bits 2 to 4 hold other rows of this column.
                    by_col += shuffle_xor(by_col, 4);
                    by_col += shuffle_xor(by_col, 8);
                    by_col += shuffle_xor(by_col, 16);
                    let inside = in_col + j + c as u32;
                    let to = a.col_sums.wrapping_add(col_slot as usize * a.cols as usize + inside as usize);
                    store_where(to.cast(), by_col.to_bits(), lane() < 4 && inside < a.cols);
                }
                c += 1;
            }
            let mut words = [0; R];
            let mut r = 0;
            while r < R {
                words[r] = T::pack(g[r][0], g[r][1]);
                r += 1;
            }
            tile.put(p, words);
            p += 1;
            if SUMS {
                let mut r = 0;
                while r < R {
                    (value[r], sum[r], moment[r]) = (pin(value[r]), pin(sum[r]), pin(moment[r]));
                    if L::FACTORED {
                        weight[r] = pin(weight[r]);
                    }
                    r += 1;
                }
                if R == 4 {
                    hold_all();
                }
            }
        }
        if SUMS {
            let slot = row_slot as usize * a.rows as usize;
            let mut r = 0;
            while r < R {
                let weight = if L::FACTORED { sum_lanes(weight[r], 4) } else { 0.0 };
                let sums = [sum_lanes(value[r], 4), sum_lanes(sum[r], 4), sum_lanes(moment[r], 4), weight];
                let i = in_row + tile.row(r);
                if lane() & 3 == 0 && i < a.rows {
                    store(a.row_sums.wrapping_add(slot + i as usize), sums);
                }
                r += 1;
            }
        }
    }
}

/// What a plain pair's exponential from the anchor is multiplied by for `gain G` of one softmax, of maximum and weight `norm`.
#[inline(always)]
pub fn anchored_weight(a: &Pull, norm: [f32; 2], anchor: f32) -> f32 {
    a.gain * norm[1] * exp2(anchor - norm[0])
}

/// What a row (column) has in `gain G`: factors of the exponential from the anchor at a negative and at a positive, and what is
/// added at a positive.
#[derive(Clone, Copy)]
pub struct Shares {
    negative: f32,
    positive: f32,
    target: f32,
    id: u32,
}

impl Shares {
    /// Of row (column) `i` of a side's norms and targets, which may be null, and ids; of the last where it is not one of `count`.
    ///
    /// # Safety
    /// The launch contract of [`Pull`].
    #[inline(always)]
    pub unsafe fn of(a: &Pull, norms: *const Norm, targets: *const f32, ids: *const u32, i: u32, count: u32, anchor: f32) -> Self {
        let i = if i < count { i } else { count.saturating_sub(1) };
        // SAFETY: the caller's promise.
        unsafe {
            let [max, negative, _, positive] = norm(norms, i);
            Shares {
                negative: anchored_weight(a, [max, negative], anchor),
                positive: anchored_weight(a, [max, positive], anchor),
                target: a.gain * optional(targets, i, 0.0),
                id: load(ids.wrapping_add(i as usize)),
            }
        }
    }
}

/// The exponentials of the tile's logits from `anchor` in place of its products, for plain pairs without shifts; adds each
/// row's sum.
#[inline(always)]
pub fn exponentials<F: Fragments<R>, const R: usize>(tile: &mut F, scale: f32, anchor: f32, sums: &mut [f32; R]) {
    let mut own = [0f32; R];
    let mut p = 0;
    while p < F::PAIRS {
        let mut c = 0;
        while c < 2 {
            let mut r = 0;
            while r < R {
                let e = exp2(fma(tile.get(r, p, c), scale, -anchor));
                tile.set(r, p, c, e);
                own[r] += e;
                r += 1;
            }
            c += 1;
        }
        p += 1;
    }
    let mut r = 0;
    while r < R {
        sums[r] += own[r];
        r += 1;
    }
}

/// G of a whole tile, as halves: `g(tile, columns, r, p, c)` of each pair, `columns` what is known of the pair p of columns.
///
/// # Safety
/// As [`Fragments::put`].
#[inline(always)]
unsafe fn put_all<T: Half, F: Fragments<R>, C, const R: usize>(
    tile: &mut F,
    columns: impl Fn(u32) -> C,
    g: impl Fn(&F, &C, usize, usize, usize) -> f32,
) {
    let mut p = 0;
    while p < F::PAIRS {
        let known = columns(tile.col(p));
        let mut words = [0; R];
        let mut r = 0;
        while r < R {
            words[r] = T::pack(g(tile, &known, r, p, 0), g(tile, &known, r, p, 1));
            r += 1;
        }
        // SAFETY: the caller's promise.
        unsafe { tile.put(p, words) };
        p += 1;
    }
}

/// [`pull`] of softmaxes for a tile of plain pairs without shifts: one exponential from `anchor` for both sides,
/// `gain G = 2^(x - anchor) (weight_i + weight_j)`.
///
/// # Safety
/// The launch contract of the chunk; columns' weights are staged.
#[inline(always)]
pub unsafe fn pull_plain_pairs<T: Half, F: Fragments<R>, const R: usize>(
    tile: &mut F,
    scale: f32,
    anchor: f32,
    by_row: [f32; R],
    columns: Columns,
) {
    // SAFETY: the caller's promise.
    unsafe {
        put_all::<T, F, _, R>(
            tile,
            |j| columns.weights(j),
            |tile, by_col, r, p, c| exp2(fma(tile.get(r, p, c), scale, -anchor)) * (by_row[r] + by_col[c]),
        );
    }
}

/// The same with positives among the pairs. What lies outside of the matrix has a G too, of nobody: it is not stored.
///
/// # Safety
/// The launch contract of the chunk; columns' shares are staged.
#[inline(always)]
pub unsafe fn pull_anchored<T: Half, F: Fragments<R>, const R: usize>(
    tile: &mut F,
    scale: f32,
    anchor: f32,
    rows: [Shares; R],
    columns: Columns,
) {
    // SAFETY: the caller's promise.
    unsafe {
        put_all::<T, F, _, R>(
            tile,
            |j| [columns.shares(j), columns.shares(j + 1)],
            |tile, cols, r, p, c| {
                let (row, col) = (&rows[r], &cols[c]);
                let positive = row.id == col.id;
                let weight = if positive { row.positive + col.positive } else { row.negative + col.negative };
                let target = if positive { row.target + col.target } else { 0.0 };
                fma(exp2(fma(tile.get(r, p, c), scale, -anchor)), weight, target)
            },
        );
    }
}

/// The portable tile as fragments: four rows of a lane by eight pairs.
struct Portable<'a> {
    acc: Acc,
    place: Place,
    /// Where G goes, if it goes anywhere, and where in the chunk the tile is.
    chunk: Option<(&'a Pull, [u32; 2])>,
}

impl Fragments<4> for Portable<'_> {
    const PAIRS: usize = 8;
    #[inline(always)]
    fn row(&self, r: usize) -> u32 {
        self.place.row_of((r >> 1) * 8, (r & 1) * 2)
    }
    #[inline(always)]
    fn col(&self, p: usize) -> u32 {
        self.place.col_of(p, 0)
    }
    #[inline(always)]
    fn get(&self, r: usize, p: usize, c: usize) -> f32 {
        self.acc[(r >> 1) * 8 + p][(r & 1) * 2 + c]
    }
    #[inline(always)]
    fn set(&mut self, r: usize, p: usize, c: usize, x: f32) {
        self.acc[(r >> 1) * 8 + p][(r & 1) * 2 + c] = x;
    }
    #[inline(always)]
    unsafe fn put(&mut self, p: usize, g: [u32; 4]) {
        let Some((a, [row, col])) = self.chunk else { return };
        let at = col + self.col(p);
        let mut r = 0;
        while r < 4 {
            let i = row + self.row(r);
            let to = a.g.wrapping_add(i as usize * a.pitch as usize + at as usize);
            // SAFETY: inside the chunk; every block has its own part of it.
            unsafe { store_where(to.cast(), g[r], i < a.rows && at < a.pitch) };
            r += 1;
        }
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

/// [`Tally`] of a row tile against `tiles` column tiles; grid (splits, row tiles, sides), two slots a split; with ALL,
/// [`Tally::all`] too.
///
/// # Safety
/// The launch contract: all of [`Tally`]'s arrays have the extents stated there.
#[inline(always)]
pub unsafe fn tally<T: Half, const ALL: bool>(each: &Each<Tally, 2>) {
    let a = &own(&each.0);
    let l = &a.logits;
    let row = block_y() * TILE;
    if row >= l.n || block_x() * a.tiles * TILE >= l.m {
        return;
    }
    let mut tile = Portable { acc: [[0.0; 4]; 16], place: Place::of_lane(), chunk: None };
    // SAFETY: the launch contract; slots are this warp's own.
    unsafe {
        let rows = rows_of(l, &tile, row);
        let mut tallies = RowTallies::<4, ALL>::none();
        let first = block_x() * a.tiles;
        let mut t = first;
        while t < first + a.tiles && t * TILE < l.m {
            let columns = Columns::new(shared_base() + TILE_SHARED, t, TILE, COLUMN_TALLY);
            columns.stage(l, t * TILE, thread());
            tile.acc = products::<T>(l, row, t * TILE);
            tallies.add(a, &rows, &mut tile, columns);
            t += 1;
        }
        tallies.store(a, &tile, row, block_x() * 2 + (warp() & 1));
    }
}

#[inline(always)]
unsafe fn pull_portable<T: Half, L: Law, const SUMS: bool>(a: &Pull, law: L) {
    let at = [block_y() * TILE, block_x() * TILE];
    let slots = [block_x() * 2 + (warp() & 1), block_y() * 4 + (warp() >> 1)];
    // SAFETY: the caller's promise.
    unsafe {
        let columns = Columns::new(shared_base() + TILE_SHARED, 0, TILE, COLUMN_PULL);
        columns.stage(&a.logits, a.col + at[1], thread());
        if L::NORMS {
            columns.stage_norms(a, a.col + at[1], thread());
        }
        let acc = products::<T>(&a.logits, a.row + at[0], a.col + at[1]);
        let mut tile = Portable { acc, place: Place::of_lane(), chunk: Some((a, at)) };
        pull::<T, L, _, 4, SUMS>(a, law, &mut tile, columns, at, slots);
    }
}

/// [`Pull`] of the softmax losses, with its sums or without; grid (column tiles, row tiles) of the chunk.
///
/// # Safety
/// The launch contract.
#[inline(always)]
pub unsafe fn pull_softmax<T: Half, const SUMS: bool>(a: &Pull) {
    // SAFETY: the caller's promise.
    unsafe { pull_portable::<T, _, SUMS>(a, SoftmaxLaw) }
}

/// [`Pull`] of the sigmoid loss; grid (column tiles, row tiles) of the chunk.
///
/// # Safety
/// The launch contract.
#[inline(always)]
pub unsafe fn pull_sigmoid<T: Half>(a: &Pull) {
    // SAFETY: the caller's promise.
    unsafe { pull_portable::<T, _, true>(a, SigmoidLaw) }
}

/// [`Pull`] of logits as they are; grid (column tiles, row tiles) of the chunk.
///
/// # Safety
/// The launch contract.
#[inline(always)]
pub unsafe fn pull_plain<T: Half>(a: &Pull) {
    // SAFETY: the caller's promise.
    unsafe { pull_portable::<T, _, false>(a, PlainLaw) }
}

/// [`Pull`] of softmaxes times a factor, with its sums; grid (column tiles, row tiles) of the chunk.
///
/// # Safety
/// The launch contract.
#[inline(always)]
pub unsafe fn pull_factored<T: Half>(a: &Pull) {
    // SAFETY: the caller's promise.
    unsafe { pull_portable::<T, _, true>(a, FactoredLaw) }
}
