//! The fused passes over the logit matrix. A tile of S lives in cache, is reduced or turned into
//! G = dL/dS, multiplied out, and forgotten; memory never grows with N M.
//!
//! ```text
//! for every (row piece, column piece) of the sweep, in parallel
//!   for every block of rows, read as f32 (normalised)
//!     for every block of columns
//!       S    = scale * product(u, v) + offset       micro-kernel on packed v
//!       tally: sums of exponentials of rows and of columns  -- pass 1, [`Logits::tally`]
//!       or G = law(S); out_u += G carry_v; out_v += G' carry_u   -- pass 2, [`Logits::pull`]
//! ```
//!
//! Exponentials are taken against an [`Logits::anchor`] that all logits share where their spread is known to be small
//! enough: then one of them serves its row and its column. Otherwise each row and each column has its own maximum.
//! Pass 1 may leave logits in [`Kept`] for the passes after it, as many as its budget holds: a quarter less work; where G is
//! all that pass 2 makes of them, their exponentials ([`Logits::exponentials`]).
//!
//! Positives are taken out of the tile and put back as scalars: their probability may round to one,
//! and what is left of the gradient then is one minus it, which only the sum over negatives knows.

use super::operand::{Element, ElementOp, Operands, left_stride, read_apart};
use super::simd::{
    Inner, Isa, LONG, Left, Op, Own, Register, Right, Simd, Vector, WIDEST, pack_transposed, packed_len, product,
};
use super::sweep::{Cut, sweep};
use super::together;
use crate::objective::{Matrix, Pairs, Storage, counts::Special};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use kernels::law::{self, Lse, Num, Product, Softmax};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most rows of a tile: the tile and what is multiplied with it fit the second-level cache.
pub const ROWS: usize = 264;
/// Most columns of a tile.
pub const COLS: usize = 256;

/// Numbers of a tile.
pub const TILE: usize = ROWS * COLS;

/// A logit that stands for no pair: its exponential is 0 under every law, and it is finite, so that
/// a product with zero stays zero.
const HOLE: f32 = -1e30;

/// One side's embeddings, read as f32 the way a tilting wants them.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    pub rows: Matrix<'a>,
    /// Multiplies each row, `[rows]`, or empty: 1/|row|, 0 for a zero row.
    pub inverse: &'a [f32],
}

impl<'a> Side<'a> {
    /// Rows as they are.
    pub fn plain(rows: Matrix<'a>) -> Self {
        Side { rows, inverse: &[] }
    }

    /// Rows `range` as a side of their own.
    pub fn slice(&self, range: Range<usize>) -> Side<'a> {
        let inverse = self.inverse_of(range.clone());
        Side { rows: self.rows.slice(range), inverse }
    }

    /// 1/|row| of rows `range`, or nothing.
    pub fn inverse_of(&self, range: Range<usize>) -> &'a [f32] {
        if self.inverse.is_empty() { self.inverse } else { &self.inverse[range] }
    }

    /// Rows `range` as f32 into `out`, `[range, D]`.
    pub fn read(&self, range: Range<usize>, out: &mut [f32]) {
        let dim = self.rows.dim;
        let at = range.start * dim..range.end * dim;
        match self.rows.data {
            Storage::F32(x) => out.copy_from_slice(&x[at]),
            Storage::Bf16(x) => x[at].convert_to_f32_slice(out),
            Storage::F16(x) => x[at].convert_to_f32_slice(out),
        }
        if !self.inverse.is_empty() {
            for (row, &inverse) in out.chunks_exact_mut(dim).zip(&self.inverse[range]) {
                row.iter_mut().for_each(|x| *x *= inverse);
            }
        }
    }
}

/// Packs the transpose of all rows of `side` into `out`: the right operand of a product with its rows.
pub fn pack_columns<T: Element>(isa: T::Isa, side: &Side<'_>, out: &mut Buffer, threads: &Threads) {
    let (rows, depth) = (side.rows.rows, T::count(side.rows.dim));
    let out: &mut [T] = out.elements(packed_len(depth, rows));
    out.par_chunks_mut(COLS * depth).with_min_len(together(COLS * depth)).enumerate().for_each(|(b, out)| {
        let range = b * COLS..rows.min((b + 1) * COLS);
        threads.with(|ws| {
            let natural: &mut [T] = ws.natural.elements(range.len() * depth);
            T::read(side, range.clone(), natural);
            T::run(isa, PackTransposed { natural, depth, n: range.len(), out });
        });
    });
}

/// [`pack_transposed`].
pub struct PackTransposed<'a, T> {
    pub natural: &'a [T],
    pub depth: usize,
    pub n: usize,
    pub out: &'a mut [T],
}

impl<T: Element> ElementOp<T> for PackTransposed<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self)
    where
        T: Operands<S>,
    {
        pack_transposed::<S, T>(self.natural, self.depth, self.depth, self.n, self.out);
    }
}

/// Buffers of one task at a time. Those of operands hold either kind: a pair is as large as an f32.
#[derive(Debug, Default)]
pub struct Workspace {
    /// A row block of u, `[ROWS, D]`.
    u: Buffer,
    /// Rows on their way into a packed operand.
    natural: Buffer,
    /// Results whose width is not a whole number of registers.
    spill: Buffer,
    /// The tile of S, which becomes that of G.
    tile: Buffer,
    /// The tile of G as pairs along its rows and along its columns.
    halves: [Buffer; 2],
    /// Rows and columns that differences are taken from.
    own: [Buffer; 2],
    /// The tiles of a law's factors.
    by_row: Buffer,
    by_col: Buffer,
    /// Special pairs of the tile with their logit and their G, rows in order.
    specials: Vec<(usize, usize, f32, f32)>,
}

impl Workspace {
    /// Room for rows on their way through.
    pub fn rows(&mut self, len: usize) -> &mut [f32] {
        self.natural.sized(len)
    }
}

/// One workspace a thread, and what they share.
#[derive(Debug, Default)]
pub struct Threads {
    each: Vec<Mutex<Workspace>>,
    /// The right operands of the gradient products: rows of u and of v, packed piece by piece.
    carried: Mutex<[Buffer; 2]>,
    /// Parts of a sum over rows.
    along: Mutex<Vec<f64>>,
}

impl Threads {
    /// Makes room for every thread of the current pool.
    pub fn fit(&mut self) {
        let threads = rayon::current_num_threads();
        if self.each.len() < threads {
            self.each.resize_with(threads, Mutex::default);
        }
    }

    /// The parts of a sum over rows, of a call that is alone in summing.
    pub fn along(&self) -> MutexGuard<'_, Vec<f64>> {
        self.along.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on this thread's workspace.
    pub fn with<R>(&self, f: impl FnOnce(&mut Workspace) -> R) -> R {
        let index = rayon::current_thread_index().unwrap_or(0) % self.each.len();
        f(&mut self.each[index].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let buffers = |w: &Workspace| [&w.u, &w.natural, &w.spill, &w.tile, &w.by_row, &w.by_col].map(Buffer::bytes);
        let each = |w: &Mutex<Workspace>| {
            let w = w.lock().unwrap_or_else(PoisonError::into_inner);
            let more = w.halves.iter().chain(&w.own).map(Buffer::bytes);
            buffers(&w).into_iter().chain(more).sum::<usize>() + 24 * w.specials.capacity()
        };
        let carried = self.carried.lock().unwrap_or_else(PoisonError::into_inner);
        let along = 8 * self.along().capacity();
        self.each.iter().map(each).sum::<usize>() + carried.iter().map(Buffer::bytes).sum::<usize>() + along
    }
}

/// Packs all rows of `side` as the right operands of products with G, `length` rows a piece; nothing if not `wanted`.
fn pack_pieces<'b, T: Element>(
    isa: T::Isa,
    side: &Side<'_>,
    length: usize,
    wanted: bool,
    out: &'b mut Buffer,
    threads: &Threads,
) -> impl Iterator<Item = &'b [T]> {
    let (rows, each) = (side.rows.rows, packed_len(T::count(length), side.rows.dim));
    let out: &mut [T] = out.elements(if wanted { rows.div_ceil(length) * each } else { 0 });
    out.par_chunks_mut(each).with_min_len(together(each)).enumerate().for_each(|(piece, out)| {
        let range = piece * length..rows.min((piece + 1) * length);
        threads.with(|ws| T::run(isa, PackRows { side, range, natural: &mut ws.natural, out }));
    });
    out.chunks(each)
}

/// Rows of a side on their way into a right operand of a product with G.
struct PackRows<'a, T> {
    side: &'a Side<'a>,
    range: Range<usize>,
    natural: &'a mut Buffer,
    out: &'a mut [T],
}

impl<T: Element> ElementOp<T> for PackRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self)
    where
        T: Operands<S>,
    {
        let len = packed_len(T::count(self.range.len()), self.side.rows.dim);
        T::pack_rows(self.side, self.range, self.natural, &mut self.out[..len]);
    }
}

/// A cache line of numbers.
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Numbers that begin with a cache line, so that no register of theirs crosses one.
#[derive(Debug, Default)]
pub struct Buffer(Vec<Line>);

impl Buffer {
    /// The first `len` of at least as many.
    pub fn sized(&mut self, len: usize) -> &mut [f32] {
        grow(&mut self.0, len.div_ceil(16));
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    /// As [`Buffer::sized`], of either kind of operand: a pair is as large as an f32.
    pub fn elements<T: Element>(&mut self, len: usize) -> &mut [T] {
        bytemuck::cast_slice_mut(self.sized(len))
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        64 * self.0.capacity()
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Grows `buffer` to at least `len`.
pub fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

/// The logit matrix, never formed: `S = scale * product(u, v) + offset`.
#[derive(Clone, Copy)]
pub struct Logits<'a, T: Element = f32> {
    pub isa: T::Isa,
    pub u: Side<'a>,
    /// v packed by [`pack_columns`].
    pub packed: &'a [T],
    /// 1/|row| of v, or empty: for pairs, whose rows are packed as they are stored.
    pub inverse_v: &'a [f32],
    /// Number of columns.
    pub m: usize,
    pub product: Product,
    pub scale: f32,
    /// Added to column j, `[M]`.
    pub offset: Option<&'a [f32]>,
    /// A number no logit is further from than [`SPREAD`], if one is known.
    pub anchor: Option<f32>,
    /// How logits are kept; `None`: as they are.
    pub grid: Option<Grid>,
    /// What pass 1 left of these logits.
    pub kept: Option<&'a Kept>,
    /// Whether it leaves `exp(S - anchor)` and not S (of special pairs S all the same): where there is an anchor and no grid,
    /// both sides have a softmax without smoothing, and of [`RowSums`] nothing is wanted.
    pub exponentials: bool,
    pub pairs: &'a Pairs<'a>,
    /// Where this block lies in the matrix that `pairs` speaks of.
    pub origin: [usize; 2],
    pub threads: &'a Threads,
}

/// How far logits may lie from their anchor: exponentials up to `e^40`, sums of 2^40 of them, a loss weight over such
/// a sum, and what multiplies them all are normal numbers.
pub const SPREAD: f64 = 40.0;

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
    slot: usize,
    /// Slots of each row piece, and how many pieces have one more.
    each: usize,
    more: usize,
}

/// A task's slot, less the tiles that were written to it or read from it.
enum Slot<Plain, Steps> {
    Plain(Plain),
    Steps(Grid, Steps),
}

impl Slot<&mut [f32], &mut [i16]> {
    #[inline(always)]
    fn write(&mut self, tile: &[f32]) {
        match self {
            Slot::Plain(slot) => slot.split_off_mut(..tile.len()).expect(ALL_TILES).copy_from_slice(tile),
            Slot::Steps(grid, slot) => grid.write(tile, slot.split_off_mut(..tile.len()).expect(ALL_TILES)),
        }
    }
}

impl Slot<&[f32], &[i16]> {
    #[inline(always)]
    fn read(&mut self, tile: &mut [f32]) {
        match self {
            Slot::Plain(slot) => tile.copy_from_slice(slot.split_off(..tile.len()).expect(ALL_TILES)),
            Slot::Steps(grid, slot) => grid.read(slot.split_off(..tile.len()).expect(ALL_TILES), tile),
        }
    }
}

const ALL_TILES: &str = "a slot holds all tiles of its task";

impl Kept {
    /// Products this deep take no longer than copies to and from a slot.
    const SHALLOW: usize = 8;

    /// Room for as many of a sweep's tasks as `budget` bytes hold.
    fn fit(&mut self, cut: Cut, n: usize, m: usize, grid: Option<Grid>, budget: usize) {
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
    fn fill(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let ranges = self.ranges();
        let mut rest: &mut [f32] = self.data.sized(self.data.len());
        ranges.map(move |range| rest.split_off_mut(..range.len()).expect("room for all slots"))
    }

    /// The slots of each row piece.
    fn pieces(&self) -> impl Iterator<Item = &[f32]> {
        self.ranges().map(|range| &self.data[range])
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }
}

/// Which softmaxes an objective is made of.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    /// Over each row (v|u).
    pub rows: bool,
    /// Over each column (u|v).
    pub cols: bool,
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
    fn clear(&mut self, len: usize, anchor: Option<f32>) {
        self.anchor = anchor;
        self.max.clear();
        self.max.resize(len, anchor.unwrap_or(f32::NEG_INFINITY));
        self.sum.clear();
        self.sum.resize(len, 0.0);
        self.rest.clear();
        self.rest.resize(len, Tally::default());
    }

    fn pieces(&mut self, length: usize) -> impl Iterator<Item = TallyPiece<'_>> {
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

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * (self.max.capacity() + self.sum.capacity()) + size_of::<Tally>() * self.rest.capacity()
    }
}

struct TallyPiece<'a> {
    first: usize,
    max: &'a mut [f32],
    sum: &'a mut [f32],
    rest: &'a mut [Tally],
}

/// Blocks of about one length, at most `most`, that cover `range`, each a whole number of `unit`s.
pub fn blocks(range: Range<usize>, most: usize, unit: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let length = range.len().div_ceil(range.len().div_ceil(most).max(1)).next_multiple_of(unit).max(unit);
    range.clone().step_by(length).map(move |start| start..range.end.min(start + length))
}

/// Blocks of rows: whole micro-kernels of any instruction set.
fn row_blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> + Clone {
    blocks(range, ROWS, 12)
}

/// Blocks of columns: they start where a packed panel starts.
fn col_blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> + Clone {
    blocks(range, COLS, WIDEST)
}

impl<T: Element> Logits<'_, T> {
    fn cut(&self) -> Cut {
        Cut::new(self.u.rows.rows, self.m, self.u.rows.dim)
    }

    /// Pass 1: the LSE of every row and of every column, as `want` says. `logit_sums` fills [`Tally::logits`]; logits
    /// that fit `budget` bytes stay in `kept`.
    pub fn tally(&self, [rows, cols]: [&mut Tallies; 2], want: Want, logit_sums: bool, kept: &mut Kept, budget: usize) {
        rows.clear(self.u.rows.rows, self.anchor);
        cols.clear(self.m, self.anchor);
        let cut = self.cut();
        let worth = self.exponentials || T::count(self.u.rows.dim) > Kept::SHALLOW;
        kept.fit(cut, self.u.rows.rows, self.m, self.grid, if worth { budget } else { 0 });
        let slot = kept.slot;
        sweep(rows.pieces(cut.rows).zip(kept.fill()), cols.pieces(cut.cols), |(row, slots), col| {
            let keep = slots.split_off_mut(..slot).map(|slot| match self.grid {
                Some(grid) => Slot::Steps(grid, bytemuck::cast_slice_mut(slot)),
                None => Slot::Plain(slot),
            });
            self.threads.with(|ws| {
                T::run(self.isa, TallyBlock { logits: self, row, col, want, logit_sums, keep, ws });
            });
        });
    }

    /// Pass 2: `out_rows += G carry_v`, `out_cols += G' carry_u`, and the sums of [`RowSums`] and `col_sums`
    /// (`[M]`, column sums of G). Outputs are overwritten.
    pub fn pull(&self, law: &Law<'_>, pull: Pull<'_>) {
        let Pull { carry_u, carry_v, out_rows, out_cols, row_sums, col_sums, apart } = pull;
        let (n, m, cut) = (self.u.rows.rows, self.m, self.cut());
        row_sums.clear();
        row_sums.resize(n, RowSums::default());
        let mut out_rows = Pieces::new(out_rows, cut.rows * carry_v.rows.dim);
        let mut out_cols = Pieces::new(out_cols, cut.cols * carry_u.rows.dim);
        let mut col_sums = Pieces::new(col_sums, cut.cols);
        let mut carried = self.threads.carried.lock().unwrap_or_else(PoisonError::into_inner);
        let [packed_u, packed_v] = &mut *carried;
        let mut packed_u = pack_pieces::<T>(self.isa, &carry_u, cut.rows, out_cols.0.is_some(), packed_u, self.threads);
        let mut packed_v = pack_pieces::<T>(self.isa, &carry_v, cut.cols, out_rows.0.is_some(), packed_v, self.threads);
        let (slot, mut slots) = self.kept.map_or((1, None), |kept| (kept.slot, Some(kept.pieces())));
        let rows = Cut::pieces(n, cut.rows).zip(row_sums.chunks_mut(cut.rows)).map(|(range, sums)| PullRows {
            range,
            out: out_rows.next(),
            packed: packed_u.next().unwrap_or(&[]),
            sums,
            slots: slots.as_mut().and_then(Iterator::next).unwrap_or(&[]),
        });
        let cols = Cut::pieces(m, cut.cols).map(|range| PullCols {
            range,
            out: out_cols.next(),
            packed: packed_v.next().unwrap_or(&[]),
            sums: col_sums.next(),
        });
        sweep(rows, cols, |row, col| {
            let kept = row.slots.split_off(..slot).map(|slot| match self.grid {
                Some(grid) => Slot::Steps(grid, bytemuck::cast_slice(slot)),
                None => Slot::Plain(slot),
            });
            self.threads.with(|ws| {
                let (carry_u, carry_v) = (&carry_u, &carry_v);
                T::run(self.isa, PullBlock { logits: self, law, carry_u, carry_v, row, col, kept, apart, ws });
            });
        });
    }

    /// The special pairs of a block, in this matrix's own indices.
    fn visit(&self, rows: &Range<usize>, cols: &Range<usize>, mut f: impl FnMut(usize, usize, Special)) {
        let [i0, j0] = self.origin;
        let (rows, cols) = (rows.start + i0..rows.end + i0, cols.start + j0..cols.end + j0);
        self.pairs.visit(rows, cols, |i, j, special| f(i - i0, j - j0, special));
    }
}

/// How far apart the rows of a tile are: whole registers of any instruction set.
#[inline(always)]
pub fn stride(cols: &Range<usize>) -> usize {
    cols.len().next_multiple_of(WIDEST)
}

/// Columns of a tile, rounded up to whole registers.
#[inline(always)]
fn wide<S: Simd>(cols: &Range<usize>) -> usize {
    cols.len().next_multiple_of(<S::F32 as Register<f32>>::LANES)
}

/// `x` a register at a time.
#[inline(always)]
fn lanes<S: Simd>(x: &[f32]) -> std::slice::ChunksExact<'_, f32> {
    x.chunks_exact(<S::F32 as Register<f32>>::LANES)
}

#[inline(always)]
fn lanes_mut<S: Simd>(x: &mut [f32]) -> std::slice::ChunksExactMut<'_, f32> {
    x.chunks_exact_mut(<S::F32 as Register<f32>>::LANES)
}

/// All lanes folded by `f`, in order.
#[inline(always)]
fn fold<S: Simd>(x: S::F32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; WIDEST];
    x.store(&mut lanes);
    let lanes = &lanes[..<S::F32 as Register<f32>>::LANES];
    lanes[1..].iter().fold(lanes[0], |a, &b| f(a, b))
}

struct TallyBlock<'a, 'p, 'w, T: Element> {
    logits: &'a Logits<'a, T>,
    row: &'w mut TallyPiece<'p>,
    col: &'w mut TallyPiece<'p>,
    want: Want,
    logit_sums: bool,
    keep: Option<Slot<&'w mut [f32], &'w mut [i16]>>,
    ws: &'w mut Workspace,
}

impl<T: Element> ElementOp<T> for TallyBlock<'_, '_, '_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self)
    where
        T: Operands<S>,
    {
        let TallyBlock { logits, row, col, want, logit_sums, mut keep, ws } = self;
        ws.tile.sized(TILE);
        for rows in row_blocks(row.first..row.first + row.max.len()) {
            let u = ws.u.elements(rows.len() * left_stride(T::count(logits.u.rows.dim)));
            T::read_left(logits, rows.clone(), u);
            for cols in col_blocks(col.first..col.first + col.max.len()) {
                let stride = stride(&cols);
                let s = ws.tile.sized(rows.len() * stride);
                T::tile(logits, u, s, &rows, &cols);
                ws.specials.clear();
                logits.visit(&rows, &cols, |i, j, special| {
                    let s = &mut s[(i - rows.start) * stride + j - cols.start];
                    row.rest[i - row.first].add(*s, special);
                    col.rest[j - col.first].add(*s, special);
                    ws.specials.push((i, j, *s, 0.0));
                    *s = f32::NEG_INFINITY;
                });
                if logit_sums {
                    for (i, s) in rows.clone().zip(s.chunks_exact(stride)) {
                        for (j, &s) in cols.clone().zip(s).filter(|(_, s)| **s > f32::NEG_INFINITY) {
                            row.rest[i - row.first].logits += f64::from(s);
                            col.rest[j - col.first].logits += f64::from(s);
                        }
                    }
                }
                let wide = wide::<S>(&cols);
                for row in s.chunks_exact_mut(stride) {
                    row[cols.len()..wide].fill(f32::NEG_INFINITY);
                }
                let at_rows = rows.start - row.first..rows.end - row.first;
                let at_cols = cols.start - col.first..cols.end - col.first;
                let mut exponentials: &mut [f32] = &mut [];
                if let (true, Some(Slot::Plain(slot))) = (logits.exponentials, &mut keep) {
                    exponentials = slot.split_off_mut(..s.len()).expect(ALL_TILES);
                }
                if let Some(anchor) = logits.anchor {
                    let (by_row, by_col) = (&mut row.sum[at_rows], &mut col.sum[at_cols]);
                    tally_anchored::<S>(s, stride, wide, anchor, exponentials, by_row, by_col);
                } else {
                    if want.rows {
                        tally_rows::<S>(s, stride, wide, &mut row.max[at_rows.clone()], &mut row.sum[at_rows]);
                    }
                    if want.cols {
                        tally_cols::<S>(s, stride, &mut col.max[at_cols.clone()], &mut col.sum[at_cols]);
                    }
                }
                let Some(keep) = &mut keep else { continue };
                let kept = if logits.exponentials { exponentials } else { &mut *s };
                for &(i, j, logit, _) in &ws.specials {
                    kept[(i - rows.start) * stride + j - cols.start] = logit;
                }
                if !logits.exponentials {
                    keep.write(s);
                }
            }
        }
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
            let e = law::exp_uncapped(S::F32::load(s).sub(anchor));
            if let Some(kept) = kept.as_mut().and_then(Iterator::next) {
                e.store(kept);
            }
            part = part.add(e);
            S::F32::load(col).add(e).store(col);
        }
        *sum += fold::<S>(part, |a, b| a + b);
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
            part = part.add(law::exp_uncapped(S::F32::load(s).sub(anchor)));
        }
        *sum = *sum * law::decay(*max, new) + fold::<S>(part, |a, b| a + b);
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
            part = part.add(law::exp_uncapped(S::F32::load(&row[at..]).sub(anchor)));
        }
        S::F32::load(old_sum).mul_add(law::decay(old, anchor), part).store(old_sum);
        new.store(old_max);
    }
    max.copy_from_slice(&old_max[..w]);
    sum.copy_from_slice(&old_sum[..w]);
}

/// What a tile holds before [`Law::apply`] makes G of it.
#[derive(Clone, Copy)]
enum Holds<'a> {
    Logits,
    /// Logits, of which one exponential serves both sides and G is all that is wanted.
    Shared,
    /// Nothing yet: these are the exponentials, and of special pairs the logits.
    Exponentials(&'a [f32]),
}

/// How G follows from S.
#[allow(clippy::large_enum_variant, reason = "one a call, on the stack")]
pub enum Law<'a> {
    /// `G_ij = R_ij + C_ij - T_ij` of a weighted row softmax R, a weighted column softmax C and the targets T of [`Norms`].
    Softmax { rows: Option<Part<'a>>, cols: Option<Part<'a>> },
    /// `G_ij = w_i (sigmoid(S_ij + bias) - t)`: `t` is `smoothing`/2 for negatives, 1 - `smoothing`/2 for positives.
    Sigmoid { bias: f32, smoothing: f32, share: &'a [f32] },
}

/// The row (or column) part of a softmax law: a view of [`Norms`], see there.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    pub max: &'a [f32],
    pub weight: &'a [f32],
    pub smooth: &'a [f32],
    pub targets: &'a [Target],
    /// What `max` is everywhere, if it is one number.
    pub anchor: Option<f32>,
    /// Multiplies the probabilities: `P_ij (Q_ij - mean)`, as MMD wants.
    pub factor: Option<Factor<'a>>,
}

impl<'a> Part<'a> {
    /// The same with its probabilities multiplied by `factor`.
    pub fn times(self, factor: Factor<'a>) -> Self {
        Part { factor: Some(factor), ..self }
    }

    /// This side's part of G at a positive of logit `s`.
    fn at_positive(&self, i: usize, s: f32) -> f32 {
        let plain = Softmax { max: self.max[i], weight: self.weight[i] };
        match self.targets[i] {
            Target::None => plain.of(s),
            Target::Shared { pull } => plain.of(s) - pull - self.smooth[i],
            Target::Among { share, max, mean, others, slack } => {
                let above = (s - max) - mean;
                share * ((above.exp_m1() - others * above.exp()) + slack) - self.smooth[i]
            }
            Target::Only { others, slack } => slack - others - self.smooth[i],
        }
    }
}

/// `Q = left right'`, less a mean for each row (or column).
#[derive(Clone, Copy)]
pub struct Factor<'a> {
    /// `[N, f]`.
    pub left: &'a [f32],
    /// `[M, f]` packed by [`pack_columns`].
    pub right: &'a [f32],
    /// f.
    pub dim: usize,
    /// `[N]` in a row part, `[M]` in a column part.
    pub mean: &'a [f32],
}

/// The normalisers of one side's softmaxes.
#[derive(Debug, Default)]
pub struct Norms {
    pub max: Vec<f32>,
    /// Loss weight over the sum of `exp(s - max)`.
    pub weight: Vec<f32>,
    /// Target of every pair not ignored, times the loss weight.
    pub smooth: Vec<f32>,
    /// What positives are pulled to.
    pub targets: Vec<Target>,
    /// What `max` is everywhere, if it is one number.
    pub anchor: Option<f32>,
}

/// A positive's part of the law, for one row or column.
#[derive(Clone, Copy, Debug, Default)]
pub enum Target {
    /// Positives are not special: the law is a plain probability.
    #[default]
    None,
    /// Target `pull` (times the loss weight) for each positive, of a softmax over more than its row.
    Shared { pull: f32 },
    /// One of several positives, of which `share` is an equal part of the loss weight. Their logarithmic mean is `max + mean`: were
    /// all logits equal to it, the row's positives would have `1 - others` of the softmax in equal parts. As in [`Target::Only`]
    /// that 1 is taken off before it can hide the rest.
    Among { share: f32, max: f32, mean: f32, others: f32, slack: f32 },
    /// The only positive: its weighted `P - 1` is `-others`, plus `slack` that smoothing takes off the target.
    Only { others: f32, slack: f32 },
}

impl Norms {
    pub fn resize(&mut self, len: usize) {
        self.max.resize(len, 0.0);
        self.weight.resize(len, 0.0);
        self.smooth.resize(len, 0.0);
        self.targets.resize(len, Target::None);
        self.anchor = None;
    }

    /// A plain probability for row (column) i.
    pub fn set_plain(&mut self, i: usize, max: f32, weight: f32) {
        (self.max[i], self.weight[i], self.smooth[i], self.targets[i]) = (max, weight, 0.0, Target::None);
    }

    /// The law of rows (columns) `range`.
    pub fn part(&self, range: Range<usize>) -> Part<'_> {
        Part {
            max: &self.max[range.clone()],
            weight: &self.weight[range.clone()],
            smooth: &self.smooth[range.clone()],
            targets: &self.targets[range],
            anchor: self.anchor,
            factor: None,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * (self.max.capacity() + self.weight.capacity() + self.smooth.capacity())
            + size_of::<Target>() * self.targets.capacity()
    }
}

/// Sums along a row, in f64; zeros where exponentials are kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct RowSums {
    /// `sum_j G_ij S_ij`.
    pub gs: f64,
    /// `sum_j G_ij`.
    pub g: f64,
    /// The row's loss times its weight, for laws whose value is a sum over pairs.
    pub value: f64,
}

/// Operands and outputs of [`Logits::pull`].
pub struct Pull<'a> {
    /// `[N, e]`.
    pub carry_u: Side<'a>,
    /// `[M, f]`.
    pub carry_v: Side<'a>,
    /// `[N, f]`.
    pub out_rows: Option<&'a mut [f32]>,
    /// `[M, e]`.
    pub out_cols: Option<&'a mut [f32]>,
    pub row_sums: &'a mut Vec<RowSums>,
    /// `[M]`.
    pub col_sums: Option<&'a mut [f32]>,
    /// Whether what is carried are differences to the output's own row, a gradient's of squared distances: `sum_j G_ij (v_j - u_i)`
    /// for row i. The two sums apart lose what they cancel of.
    pub apart: bool,
}

/// An optional output handed out piece by piece, zeroed.
struct Pieces<'a>(Option<std::slice::ChunksMut<'a, f32>>);

impl<'a> Pieces<'a> {
    fn new(all: Option<&'a mut [f32]>, length: usize) -> Self {
        Pieces(all.map(|all| {
            all.par_chunks_mut(1 << 16).for_each(|part| part.fill(0.0));
            all.chunks_mut(length)
        }))
    }
    fn next(&mut self) -> Option<&'a mut [f32]> {
        self.0.as_mut().and_then(Iterator::next)
    }
}

struct PullRows<'a, T> {
    range: Range<usize>,
    out: Option<&'a mut [f32]>,
    /// The piece's rows of `carry_u`.
    packed: &'a [T],
    sums: &'a mut [RowSums],
    /// What pass 1 kept for its tasks that are still to come.
    slots: &'a [f32],
}

struct PullCols<'a, T> {
    range: Range<usize>,
    out: Option<&'a mut [f32]>,
    /// The piece's rows of `carry_v`.
    packed: &'a [T],
    sums: Option<&'a mut [f32]>,
}

struct PullBlock<'a, 'r, 'c, 'w, T: Element> {
    logits: &'a Logits<'a, T>,
    law: &'a Law<'a>,
    carry_u: &'a Side<'a>,
    carry_v: &'a Side<'a>,
    row: &'w mut PullRows<'r, T>,
    col: &'w mut PullCols<'c, T>,
    kept: Option<Slot<&'w [f32], &'w [i16]>>,
    apart: bool,
    ws: &'w mut Workspace,
}

impl<T: Element> ElementOp<T> for PullBlock<'_, '_, '_, '_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self)
    where
        T: Operands<S>,
    {
        let PullBlock { logits, law, carry_u, carry_v, row, col, mut kept, apart, ws } = self;
        let (first_row, first_col) = (row.range.start, col.range.start);
        ws.tile.sized(TILE);
        for rows in row_blocks(row.range.clone()) {
            let at_rows = rows.start - first_row..rows.end - first_row;
            let u = ws.u.elements(rows.len() * left_stride(T::count(logits.u.rows.dim)));
            if kept.is_none() {
                T::read_left(logits, rows.clone(), u);
            }
            let [own_rows, own_cols] = &mut ws.own;
            let own_rows = apart.then(|| own(carry_u, rows.clone(), own_rows));
            for cols in col_blocks(col.range.clone()) {
                let at_cols = cols.start - first_col..cols.end - first_col;
                let stride = stride(&cols);
                let tile = ws.tile.sized(rows.len() * stride);
                let holds = match &mut kept {
                    Some(Slot::Plain(slot)) if logits.exponentials => {
                        Holds::Exponentials(slot.split_off(..tile.len()).expect(ALL_TILES))
                    }
                    Some(kept) => {
                        kept.read(tile);
                        Holds::Logits
                    }
                    None => {
                        T::tile(logits, u, tile, &rows, &cols);
                        if logits.exponentials { Holds::Shared } else { Holds::Logits }
                    }
                };
                let at_specials = if let Holds::Exponentials(kept) = holds { kept } else { &*tile };
                let sums = &mut row.sums[at_rows.clone()];
                take_specials(logits, law, &rows, &cols, at_specials, sums, &mut ws.specials);
                let by_col = col.sums.as_deref_mut().map(|sums| &mut sums[at_cols.clone()]);
                let factors = law.factors::<S>(&rows, &cols, [&mut ws.by_row, &mut ws.by_col]);
                law.apply::<S>([&rows, &cols], tile, holds, factors, &ws.specials, sums, by_col);
                let inverse = [(carry_u, &rows), (carry_v, &cols)].map(|(side, range)| side.inverse_of(range.clone()));
                let [by_row, by_col] = T::lefts(tile, rows.len(), cols.len(), inverse, &mut ws.halves);
                if let Some(out) = &mut row.out {
                    let (total, first) = (T::count(col.range.len()), T::count(at_cols.start));
                    let (out, dim) = (&mut out[at_rows.start * carry_v.rows.dim..], carry_v.rows.dim);
                    let right = Right { packed: col.packed, total, first };
                    T::carry(by_row, right, own_rows, out, dim, &mut ws.spill);
                }
                if let Some(out) = &mut col.out {
                    let (total, first) = (T::count(row.range.len()), T::count(at_rows.start));
                    let (out, dim) = (&mut out[at_cols.start * carry_u.rows.dim..], carry_u.rows.dim);
                    let right = Right { packed: row.packed, total, first };
                    let own = apart.then(|| own(carry_v, cols.clone(), own_cols));
                    T::carry(by_col, right, own, out, dim, &mut ws.spill);
                }
            }
        }
    }
}

/// Rows `range` of a side, to take differences from.
fn own<'w>(side: &Side<'_>, range: Range<usize>, out: &'w mut Buffer) -> Own<'w> {
    let stride = side.rows.dim.next_multiple_of(WIDEST);
    let data = out.sized(range.len() * stride);
    read_apart(side, range, stride, data);
    Own { data, stride }
}

/// Notes every special pair of the tile `s` with its logit and its G.
fn take_specials<T: Element>(
    logits: &Logits<'_, T>,
    law: &Law<'_>,
    rows: &Range<usize>,
    cols: &Range<usize>,
    s: &[f32],
    sums: &mut [RowSums],
    specials: &mut Vec<(usize, usize, f32, f32)>,
) {
    specials.clear();
    logits.visit(rows, cols, |i, j, special| {
        let s = s[(i - rows.start) * stride(cols) + j - cols.start];
        let gradient = match special {
            Special::Ignored => return specials.push((i, j, law.logit_of_no_part(), 0.0)),
            Special::Positive if law.positives_are_plain() => return,
            Special::Positive => law.at_positive(i, j, s, &mut sums[i - rows.start]),
        };
        specials.push((i, j, s, gradient));
    });
    // Positives came first, then ignored pairs.
    specials.sort_unstable_by_key(|&(i, j, ..)| (i, j));
}

impl Law<'_> {
    /// Whether positives follow the same law as negatives.
    fn positives_are_plain(&self) -> bool {
        match self {
            Law::Softmax { rows, cols } => {
                [rows, cols].into_iter().flatten().all(|part| matches!(part.targets.first(), None | Some(Target::None)))
            }
            Law::Sigmoid { .. } => false,
        }
    }

    /// G at a positive; adds its part of the value.
    fn at_positive(&self, i: usize, j: usize, s: f32, sums: &mut RowSums) -> f32 {
        match self {
            Law::Softmax { rows, cols } => {
                rows.map_or(0.0, |part| part.at_positive(i, s)) + cols.map_or(0.0, |part| part.at_positive(j, s))
            }
            Law::Sigmoid { bias, smoothing, share } => {
                // softplus(x) - (1 - e/2) x = softplus(-x) + e/2 x, and 1 - e/2 - sigmoid(x) = sigmoid(-x) - e/2.
                let x = s + bias;
                let (value, sigma) = law::softplus_sigmoid(-x);
                // `apply` takes off e/2 x for every pair of the row, this one included.
                let pulled = if *smoothing > 0.0 { f64::from(*smoothing) * f64::from(x) } else { 0.0 };
                sums.value += f64::from(share[i]) * (f64::from(value) + pulled);
                share[i] * (0.5 * smoothing - sigma)
            }
        }
    }

    /// The logit that adds nothing to what [`Law::apply`] sums over whole rows.
    fn logit_of_no_part(&self) -> f32 {
        match self {
            Law::Softmax { .. } => 0.0,
            Law::Sigmoid { bias, .. } => -bias,
        }
    }

    /// The tiles of the row part's and of the column part's factor.
    #[inline(always)]
    fn factors<'q, S: Simd>(
        &self,
        rows: &Range<usize>,
        cols: &Range<usize>,
        buffers: [&'q mut Buffer; 2],
    ) -> [&'q [f32]; 2] {
        let mut tiles = [&[][..]; 2];
        if let Law::Softmax { rows: by_row, cols: by_col } = self {
            for ((part, buffer), tile) in [by_row, by_col].into_iter().zip(buffers).zip(&mut tiles) {
                if let Some(Part { factor: Some(factor), .. }) = part {
                    let buffer = buffer.sized(TILE);
                    factor.tile::<S>(rows, cols, buffer);
                    *tile = buffer;
                }
            }
        }
        tiles
    }

    /// Turns the tile into that of G, and adds its sums: the value's where the law has any, `sum_j G S` and `sum_j G` to its
    /// rows, `sum_i G` to its columns.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "operands and outputs of one tile")]
    fn apply<S: Simd>(
        &self,
        [rows, cols]: [&Range<usize>; 2],
        tile: &mut [f32],
        holds: Holds<'_>,
        [by_row, by_col]: [&[f32]; 2],
        specials: &[(usize, usize, f32, f32)],
        sums: &mut [RowSums],
        col_sums: Option<&mut [f32]>,
    ) {
        if let (Law::Softmax { rows: Some(by_row), cols: Some(by_col) }, Holds::Shared | Holds::Exponentials(_)) =
            (self, holds)
        {
            return apply_bare::<S>([(by_row, rows), (by_col, cols)], tile, holds, specials, col_sums);
        }
        let (w, wide, stride) = (cols.len(), wide::<S>(cols), stride(cols));
        let mut columns = Columns::default();
        if let Law::Softmax { cols: Some(part), .. } = self {
            columns.fill(part, cols);
        }
        let mut specials = specials;
        let mut total = [0.0; COLS];
        let mut logit = [0.0; COLS];
        for (r, (row, sums)) in tile.chunks_exact_mut(stride).zip(sums).enumerate() {
            let (i, row) = (rows.start + r, &mut row[..wide]);
            row[w..].fill(HOLE);
            let (own, rest) = specials.split_at(specials.iter().take_while(|special| special.0 == i).count());
            specials = rest;
            own.iter().for_each(|&(_, j, ..)| row[j - cols.start] = HOLE);
            if let Law::Softmax { rows: Some(by_row), cols: Some(_) } = self
                && columns.shares_exponentials(by_row, i)
            {
                let (mut gs, mut g_sum) = shared_row::<S>(by_row, i, &columns, row);
                for &(_, j, s, g) in own {
                    row[j - cols.start] = g;
                    (gs, g_sum) = (gs + f64::from(g) * f64::from(s), g_sum + f64::from(g));
                }
                (sums.gs, sums.g) = (sums.gs + gs, sums.g + g_sum);
            } else {
                for (logit, s) in lanes_mut::<S>(&mut logit).zip(lanes::<S>(row)) {
                    S::F32::load(s).store(logit);
                }
                match self {
                    Law::Softmax { rows: row_part, cols: col_part } => {
                        let q = by_row.get(r * COLS..).unwrap_or(&[]);
                        match row_part {
                            Some(part) => row_softmax::<S>(part, i, q, row),
                            None => row.fill(0.0),
                        }
                        if let Some(part) = col_part {
                            let q = by_col.get(r * COLS..).unwrap_or(&[]);
                            add_col_softmax::<S>(part.factor.is_some(), &columns, q, &logit, row);
                        }
                    }
                    Law::Sigmoid { bias, smoothing, share } => {
                        let value = sigmoid_row::<S>(*bias, *smoothing, share[i], row);
                        sums.value += f64::from(share[i]) * f64::from(value);
                    }
                }
                for &(_, j, s, g) in own {
                    (logit[j - cols.start], row[j - cols.start]) = (s, g);
                }
                logit[w..wide].fill(0.0);
                row[w..].fill(0.0);
                self.subtract_linear(i, &logit[..w], sums);
                let (mut gs, mut sum) = (S::F32::splat(0.0), S::F32::splat(0.0));
                for (s, g) in lanes::<S>(&logit).zip(lanes::<S>(row)) {
                    let g = S::F32::load(g);
                    gs = g.mul_add(S::F32::load(s), gs);
                    sum = sum.add(g);
                }
                sums.gs += f64::from(fold::<S>(gs, |a, b| a + b));
                sums.g += f64::from(fold::<S>(sum, |a, b| a + b));
            }
            if col_sums.is_some() {
                for (total, g) in lanes_mut::<S>(&mut total).zip(lanes::<S>(row)) {
                    S::F32::load(total).add(S::F32::load(g)).store(total);
                }
            }
        }
        if let Some(sums) = col_sums {
            sums.iter_mut().zip(&total).for_each(|(c, x)| *c += x);
        }
    }

    /// Takes `e/2 x` off the value for every pair of row `i` whose logit is given.
    #[inline(always)]
    fn subtract_linear(&self, i: usize, s: &[f32], sums: &mut RowSums) {
        if let Law::Sigmoid { bias, smoothing, share } = self
            && *smoothing > 0.0
        {
            let x: f64 = s.iter().map(|&s| f64::from(s + bias)).sum();
            sums.value -= 0.5 * f64::from(*smoothing) * f64::from(share[i]) * x;
        }
    }
}

/// A column part's numbers for the columns of a tile.
struct Columns {
    max: [f32; COLS],
    weight: [f32; COLS],
    smooth: [f32; COLS],
    mean: [f32; COLS],
    /// What `max` is everywhere, if it is one number, and there is neither a factor nor smoothing.
    anchor: Option<f32>,
}

impl Default for Columns {
    fn default() -> Self {
        Columns { max: [0.0; COLS], weight: [0.0; COLS], smooth: [0.0; COLS], mean: [0.0; COLS], anchor: None }
    }
}

impl Columns {
    fn fill(&mut self, part: &Part<'_>, cols: &Range<usize>) {
        let w = cols.len();
        self.max[..w].copy_from_slice(&part.max[cols.clone()]);
        self.weight[..w].copy_from_slice(&part.weight[cols.clone()]);
        self.smooth[..w].copy_from_slice(&part.smooth[cols.clone()]);
        if let Some(factor) = &part.factor {
            self.mean[..w].copy_from_slice(&factor.mean[cols.clone()]);
        } else if self.smooth == [0.0; COLS] {
            self.anchor = part.anchor;
        }
    }

    /// Whether one exponential serves row `i` of `part` and the columns.
    fn shares_exponentials(&self, part: &Part<'_>, i: usize) -> bool {
        self.anchor.is_some() && self.anchor == part.anchor && part.factor.is_none() && part.smooth[i] == 0.0
    }
}

/// Row `i` of `R + C` where one exponential serves both; `sum_j G S` and `sum_j G`.
#[inline(always)]
fn shared_row<S: Simd>(part: &Part<'_>, i: usize, columns: &Columns, row: &mut [f32]) -> (f64, f64) {
    let (anchor, weight) = (S::F32::splat(part.max[i]), S::F32::splat(part.weight[i]));
    let (mut gs, mut sum) = (S::F32::splat(0.0), S::F32::splat(0.0));
    let weights = &columns.weight[..row.len()];
    for (to, w) in lanes_mut::<S>(row).zip(lanes::<S>(weights)) {
        let s = S::F32::load(to);
        let g = law::exp_uncapped(s.sub(anchor)).mul(S::F32::load(w).add(weight));
        (gs, sum) = (g.mul_add(s, gs), sum.add(g));
        g.store(to);
    }
    (f64::from(fold::<S>(gs, |a, b| a + b)), f64::from(fold::<S>(sum, |a, b| a + b)))
}

/// [`Law::apply`] of both sides' softmaxes where one exponential serves both and of the sums only `col_sums` are wanted: a row
/// of `R + C` is a multiple of that exponential, which is there already, if it was kept.
#[inline(always)]
fn apply_bare<S: Simd>(
    [(by_row, rows), (by_col, cols)]: [(&Part<'_>, &Range<usize>); 2],
    tile: &mut [f32],
    holds: Holds<'_>,
    specials: &[(usize, usize, f32, f32)],
    col_sums: Option<&mut [f32]>,
) {
    let (wide, stride) = (wide::<S>(cols), stride(cols));
    let mut weights = [0.0; COLS];
    weights[..cols.len()].copy_from_slice(&by_col.weight[cols.clone()]);
    for (r, (i, row)) in rows.clone().zip(tile.chunks_exact_mut(stride)).enumerate() {
        let row = &mut row[..wide];
        let weight = S::F32::splat(by_row.weight[i]);
        if let Holds::Exponentials(kept) = holds {
            let kept = lanes::<S>(&kept[r * stride..][..wide]);
            for ((to, e), w) in lanes_mut::<S>(row).zip(kept).zip(lanes::<S>(&weights)) {
                S::F32::load(e).mul(S::F32::load(w).add(weight)).store(to);
            }
        } else {
            row[cols.len()..].fill(HOLE);
            let anchor = S::F32::splat(by_row.max[i]);
            for (to, w) in lanes_mut::<S>(row).zip(lanes::<S>(&weights)) {
                let e = law::exp_uncapped(S::F32::load(to).sub(anchor));
                e.mul(S::F32::load(w).add(weight)).store(to);
            }
        }
    }
    for &(i, j, _, g) in specials {
        tile[(i - rows.start) * stride + j - cols.start] = g;
    }
    if let Some(sums) = col_sums {
        let mut total = [0.0; COLS];
        for row in tile.chunks_exact(stride) {
            for (total, g) in lanes_mut::<S>(&mut total).zip(lanes::<S>(&row[..wide])) {
                S::F32::load(total).add(S::F32::load(g)).store(total);
            }
        }
        sums.iter_mut().zip(&total).for_each(|(c, x)| *c += x);
    }
}

/// Row `i` of a row softmax, times its factor `q` less its mean.
#[inline(always)]
fn row_softmax<S: Simd>(part: &Part<'_>, i: usize, q: &[f32], row: &mut [f32]) {
    let norm = Softmax { max: S::F32::splat(part.max[i]), weight: S::F32::splat(part.weight[i]) };
    if let Some(factor) = &part.factor {
        let mean = S::F32::splat(factor.mean[i]);
        for (g, q) in lanes_mut::<S>(row).zip(lanes::<S>(q)) {
            norm.of(S::F32::load(g)).mul(S::F32::load(q).sub(mean)).store(g);
        }
    } else {
        let smooth = S::F32::splat(part.smooth[i]);
        for g in lanes_mut::<S>(row) {
            norm.of(S::F32::load(g)).sub(smooth).store(g);
        }
    }
}

/// Adds a row of column softmaxes of the logits `s`, times their factor `q` less its mean.
#[inline(always)]
fn add_col_softmax<S: Simd>(factor: bool, columns: &Columns, q: &[f32], s: &[f32], row: &mut [f32]) {
    let lanes_count = <S::F32 as Register<f32>>::LANES;
    for (n, (g, s)) in lanes_mut::<S>(row).zip(lanes::<S>(s)).enumerate() {
        let at = n * lanes_count;
        let norm = Softmax { max: S::F32::load(&columns.max[at..]), weight: S::F32::load(&columns.weight[at..]) };
        let p = norm.of(S::F32::load(s));
        let before = S::F32::load(g);
        let sum = if factor {
            p.mul_add(S::F32::load(&q[at..]).sub(S::F32::load(&columns.mean[at..])), before)
        } else {
            before.add(p.sub(S::F32::load(&columns.smooth[at..])))
        };
        sum.store(g);
    }
}

/// A row of the sigmoid law; returns the sum of its softplus.
#[inline(always)]
fn sigmoid_row<S: Simd>(bias: f32, smoothing: f32, share: f32, row: &mut [f32]) -> f32 {
    let (w, b, t) = (S::F32::splat(share), S::F32::splat(bias), S::F32::splat(0.5 * smoothing));
    let mut value = S::F32::splat(0.0);
    for g in lanes_mut::<S>(row) {
        let (softplus, sigma) = law::softplus_sigmoid(S::F32::load(g).add(b));
        value = value.add(softplus);
        sigma.sub(t).mul(w).store(g);
    }
    fold::<S>(value, |a, b| a + b)
}

impl Factor<'_> {
    /// The entry of `Q` of two rows, as a tile has it.
    pub fn entry(isa: Isa, left: &[f32], right: &[f32]) -> f32 {
        isa.run(Entry { left, right })
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, rows: &Range<usize>, cols: &Range<usize>, q: &mut [f32]) {
        let left = Left {
            data: &self.left[rows.start * self.dim..],
            row: self.dim,
            col: 1,
            rows: rows.len(),
            depth: self.dim,
        };
        product::<S, f32, Inner, LONG>(left, &self.right[cols.start * self.dim..], cols.len(), q, COLS, false);
    }
}

struct Entry<'a> {
    left: &'a [f32],
    right: &'a [f32],
}

impl Op for Entry<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self) -> f32 {
        let mut total = S::F32::splat(0.0);
        for (left, right) in self.left.chunks(LONG).zip(self.right.chunks(LONG)) {
            let mut sum = S::F32::splat(0.0);
            for (&x, &y) in left.iter().zip(right) {
                sum = S::F32::splat(x).mul_add(S::F32::splat(y), sum);
            }
            total = total.add(sum);
        }
        fold::<S>(total, |first, _| first)
    }
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
