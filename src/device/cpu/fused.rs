//! The fused passes over the logit matrix. A tile of S lives in cache, is reduced or turned into
//! G = dL/dS, multiplied out, and forgotten; memory never grows with N M.
//!
//! ```text
//! for every (row piece, column piece) of the sweep, in parallel            sweep.rs
//!   for every block of rows, read as f32 (normalised)
//!     for every block of columns
//!       S    = scale * product(u, v) + offset       micro-kernel on packed v, operand.rs
//!       tally: sums of exponentials of rows and of columns  -- pass 1, [`Logits::tally`], tally.rs
//!       or G = law(S); out_u += G carry_v; out_v += G' carry_u   -- pass 2, [`Logits::pull`], law.rs
//! ```
//!
//! One side's softmax alone takes both passes strip by strip: strips.rs.
//!
//! Exponentials are taken against an [`Logits::anchor`] that all logits share where their spread is known to be small
//! enough: then one of them serves its row and its column. Otherwise each row and each column has its own maximum.
//! Pass 1 may leave logits in [`Kept`] for the passes after it, as many as its budget holds: a quarter less work; where G is
//! all that pass 2 makes of them, their exponentials ([`Logits::exponentials`]).
//!
//! Positives are taken out of the tile and put back as scalars: their probability may round to one,
//! and what is left of the gradient then is one minus it, which only the sum over negatives knows.

use super::buffers::{Buffer, Threads, Workspace, reset};
use super::kept::{Grid, Kept, Slot, next, next_mut};
use super::law::{Holds, Law, RowSums};
use super::operand::{Element, ElementOp, Operands, Side, Similarity, left_stride, pack_pieces, read_apart};
use super::simd::{Own, Right, Simd, WIDEST};
use super::sweep::{Cut, sweep};
use super::tally::{Tallies, TallyPiece, Want, add_exponentials, add_logits};
use super::tile::{Aside, Place, TILE, col_blocks, row_blocks};
use crate::objective::{Pairs, counts::Special};
use rayon::prelude::*;
use std::ops::Range;

/// How far logits may lie from their anchor: exponentials up to `e^40`, sums of 2^40 of them, a loss weight over such
/// a sum, and what multiplies them all are normal numbers.
pub const SPREAD: f64 = 40.0;

/// The logit matrix S, never formed, and what the passes over it need to know.
#[derive(Clone, Copy)]
pub struct Logits<'a, T: Element = f32> {
    pub isa: T::Isa,
    pub similarity: Similarity<'a, T>,
    /// A number no logit is further from than [`SPREAD`], if one is known.
    pub anchor: Option<f32>,
    /// How logits are kept; `None`: as they are.
    pub grid: Option<Grid>,
    /// What pass 1 left of these logits.
    pub kept: Option<&'a Kept>,
    /// Whether it leaves `exp(S - anchor)` and not S (of special pairs S all the same): where there is an anchor and no grid, the
    /// law is softmaxes without smoothing, and of [`RowSums`] nothing is wanted.
    pub exponentials: bool,
    pub pairs: &'a Pairs<'a>,
    /// Where this block lies in the matrix that `pairs` speaks of.
    pub origin: [usize; 2],
    pub threads: &'a Threads,
}

impl<T: Element> Logits<'_, T> {
    /// Rows `range` alone, of which nothing was kept.
    pub fn of_rows(&self, range: Range<usize>) -> Self {
        let origin = [self.origin[0] + range.start, self.origin[1]];
        Logits { similarity: self.similarity.of_rows(range), origin, kept: None, ..*self }
    }

    /// Columns `range` alone, which start where a packed panel does; of which nothing was kept.
    pub fn of_cols(&self, range: Range<usize>) -> Self {
        let origin = [self.origin[0], self.origin[1] + range.start];
        Logits { similarity: self.similarity.of_cols(range), origin, kept: None, ..*self }
    }

    fn cut(&self) -> Cut {
        Cut::new(self.similarity.n(), self.similarity.m, self.similarity.u.rows.dim)
    }

    /// Pass 1: the LSE of every row and of every column, as `want` says. `logit_sums` fills [`Tally::logits`]; logits
    /// that fit `budget` bytes stay in `kept`.
    ///
    /// [`Tally::logits`]: super::tally::Tally::logits
    pub fn tally(&self, [rows, cols]: [&mut Tallies; 2], want: Want, logit_sums: bool, kept: &mut Kept, budget: usize) {
        let (n, m, dim, cut) = (self.similarity.n(), self.similarity.m, self.similarity.u.rows.dim, self.cut());
        rows.clear(n, self.anchor);
        cols.clear(m, self.anchor);
        let worth = self.exponentials || T::count(dim) > Kept::SHALLOW;
        kept.fit(cut, n, m, self.grid, if worth { budget } else { 0 });
        let slot = kept.slot;
        sweep(rows.pieces(cut.rows).zip(kept.fill()), cols.pieces(cut.cols), |(row, slots), col| {
            let keep = Slot::fill(slots, slot, self.grid);
            self.tally_pieces(row, col, want, logit_sums, keep);
        });
    }

    /// Pass 1 of a row piece and a column piece.
    pub fn tally_pieces(
        &self,
        row: &mut TallyPiece<'_>,
        col: &mut TallyPiece<'_>,
        want: Want,
        logit_sums: bool,
        keep: Option<Slot<&mut [f32], &mut [i16]>>,
    ) {
        self.threads.with(|ws| {
            T::run(self.isa, TallyTask { logits: self, row, col, want, logit_sums, keep, ws });
        });
    }

    /// Pass 2: `out_rows += G carry_v`, `out_cols += G' carry_u`, and the sums of [`RowSums`] and `col_sums`
    /// (`[M]`, column sums of G). Outputs are overwritten.
    pub fn pull(&self, law: &Law<'_>, pull: Pull<'_>) {
        let (slot, mut slots) = self.kept.map_or((1, None), |kept| (kept.slot, Some(kept.pieces())));
        let apart = pull.apart;
        self.in_pieces(self.cut(), pull, |carry, rows, cols| {
            let rows = rows.map(|row| (row, slots.as_mut().and_then(Iterator::next).unwrap_or(&[])));
            sweep(rows, cols, |(row, slots), col| {
                self.pull_pieces(law, carry, row, col, Slot::open(slots, slot, self.grid), apart);
            });
        });
    }

    /// Cuts the rows and the columns of pass 2 into pieces, which `walk` goes through: it has what is carried, and both sides'
    /// pieces in their order.
    pub fn in_pieces(
        &self,
        cut: Cut,
        pull: Pull<'_>,
        walk: impl for<'p> FnOnce([&'p Side<'p>; 2], InOrder<'_, RowPiece<'p, T>>, InOrder<'_, ColPiece<'p, T>>),
    ) {
        let Pull { carry: [carry_u, carry_v], out: [out_rows, out_cols], row_sums, col_sums, apart: _ } = pull;
        let (n, m) = (self.similarity.n(), self.similarity.m);
        reset(row_sums, n, RowSums::default());
        let mut out_rows = Pieces::new(out_rows, cut.rows * carry_v.rows.dim);
        let mut out_cols = Pieces::new(out_cols, cut.cols * carry_u.rows.dim);
        let mut col_sums = Pieces::new(col_sums, cut.cols);
        let mut carried = self.threads.carried();
        let [packed_u, packed_v] = &mut *carried;
        let mut packed_u = pack_pieces::<T>(self.isa, &carry_u, cut.rows, out_cols.0.is_some(), packed_u, self.threads);
        let mut packed_v = pack_pieces::<T>(self.isa, &carry_v, cut.cols, out_rows.0.is_some(), packed_v, self.threads);
        let mut rows = Cut::pieces(n, cut.rows).zip(row_sums.chunks_mut(cut.rows)).map(|(range, sums)| {
            let packed = packed_u.next().unwrap_or(&[]);
            PullPiece { range, out: out_rows.next(), packed, sums }
        });
        let mut cols = Cut::pieces(m, cut.cols).map(|range| {
            let packed = packed_v.next().unwrap_or(&[]);
            PullPiece { range, out: out_cols.next(), packed, sums: col_sums.next() }
        });
        walk([&carry_u, &carry_v], &mut rows, &mut cols);
    }

    /// Pass 2 of a row piece and a column piece. `kept`: what pass 1 left of them; `carry` has as many rows as there are logits.
    pub fn pull_pieces(
        &self,
        law: &Law<'_>,
        carry: [&Side<'_>; 2],
        row: &mut RowPiece<'_, T>,
        col: &mut ColPiece<'_, T>,
        kept: Option<Slot<&[f32], &[i16]>>,
        apart: bool,
    ) {
        self.threads.with(|ws| {
            T::run(self.isa, PullTask { logits: self, law, carry, row, col, kept, apart, ws });
        });
    }

    /// The special pairs of a tile, in this matrix's own indices: positives first, then those ignored.
    fn visit(&self, place: &Place, mut f: impl FnMut(usize, usize, Special)) {
        let ([i0, j0], Place { rows, cols }) = (self.origin, place);
        let (rows, cols) = (rows.start + i0..rows.end + i0, cols.start + j0..cols.end + j0);
        self.pairs.visit(rows, cols, |i, j, special| f(i - i0, j - j0, special));
    }
}

/// Pass 1 of a row piece and a column piece.
struct TallyTask<'a, 'r, 'c, 'w, T: Element> {
    logits: &'a Logits<'a, T>,
    row: &'w mut TallyPiece<'r>,
    col: &'w mut TallyPiece<'c>,
    want: Want,
    logit_sums: bool,
    keep: Option<Slot<&'w mut [f32], &'w mut [i16]>>,
    ws: &'w mut Workspace,
}

impl<T: Element> ElementOp<T> for TallyTask<'_, '_, '_, '_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self)
    where
        T: Operands<S>,
    {
        let TallyTask { logits, row, col, want, logit_sums, mut keep, ws } = self;
        let similarity = &logits.similarity;
        ws.tile.sized(TILE);
        for rows in row_blocks(row.range()) {
            let u = ws.u.elements(rows.len() * left_stride(T::count(similarity.u.rows.dim)));
            T::read_left(similarity, rows.clone(), u);
            for cols in col_blocks(col.range()) {
                let place = Place { rows: rows.clone(), cols };
                let s = ws.tile.sized(place.size());
                T::tile(similarity, u, s, &place);
                tally_specials(logits, &place, s, row, col, &mut ws.asides);
                if logit_sums {
                    add_logits(&place, s, row, col);
                }
                let mut exponentials: &mut [f32] = &mut [];
                if let (true, Some(Slot::Plain(slot))) = (logits.exponentials, &mut keep) {
                    exponentials = next_mut(slot, s.len());
                }
                add_exponentials::<S>(&place, s, logits.anchor, want, exponentials, row, col);
                let Some(keep) = &mut keep else { continue };
                let kept = if logits.exponentials { exponentials } else { &mut *s };
                for aside in &ws.asides {
                    kept[place.at(aside.i, aside.j)] = aside.logit;
                }
                if !logits.exponentials {
                    keep.write(s);
                }
            }
        }
    }
}

/// Adds every special pair of the tile `s` to its row's and its column's tally, and sets it aside: negatives are left.
fn tally_specials<T: Element>(
    logits: &Logits<'_, T>,
    place: &Place,
    s: &mut [f32],
    row: &mut TallyPiece<'_>,
    col: &mut TallyPiece<'_>,
    asides: &mut Vec<Aside>,
) {
    asides.clear();
    logits.visit(place, |i, j, special| {
        let s = &mut s[place.at(i, j)];
        row.add(i, *s, special);
        col.add(j, *s, special);
        asides.push(Aside { i, j, logit: *s, g: 0.0 });
        *s = f32::NEG_INFINITY;
    });
}

/// Operands and outputs of [`Logits::pull`].
pub struct Pull<'a> {
    /// `[N, e]` and `[M, f]`.
    pub carry: [Side<'a>; 2],
    /// Of rows, `[N, f]`, and of columns, `[M, e]`.
    pub out: [Option<&'a mut [f32]>; 2],
    pub row_sums: &'a mut Vec<RowSums>,
    /// `[M]`.
    pub col_sums: Option<&'a mut [f32]>,
    /// Whether what is carried are differences to the output's own row, a gradient's of squared distances: `sum_j G_ij (v_j - u_i)`
    /// for row i. The two sums apart lose what they cancel of.
    pub apart: bool,
}

impl<'a> Pull<'a> {
    /// Rows that are carried as they are, and no sums of columns.
    pub fn plain(carry: [Side<'a>; 2], out: [Option<&'a mut [f32]>; 2], row_sums: &'a mut Vec<RowSums>) -> Self {
        Pull { carry, out, row_sums, col_sums: None, apart: false }
    }
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

/// Pieces in their order.
pub type InOrder<'i, Piece> = &'i mut (dyn ExactSizeIterator<Item = Piece> + Send);
pub type RowPiece<'a, T> = PullPiece<'a, T, &'a mut [RowSums]>;
pub type ColPiece<'a, T> = PullPiece<'a, T, Option<&'a mut [f32]>>;

/// Neighbouring rows (columns) in pass 2.
pub struct PullPiece<'a, T, Sums> {
    pub range: Range<usize>,
    out: Option<&'a mut [f32]>,
    /// The piece's rows of what is carried to the other side.
    packed: &'a [T],
    sums: Sums,
}

impl<T: Element, Sums> PullPiece<'_, T, Sums> {
    /// Where its rows (columns) `range` are in it.
    fn at(&self, range: &Range<usize>) -> Range<usize> {
        range.start - self.range.start..range.end - self.range.start
    }

    /// What is carried, from its row (column) `first` on.
    fn right(&self, first: usize) -> Right<'_, T> {
        Right { packed: self.packed, total: T::count(self.range.len()), first: T::count(first) }
    }
}

/// Pass 2 of a row piece and a column piece.
struct PullTask<'a, 'r, 'c, 'w, T: Element> {
    logits: &'a Logits<'a, T>,
    law: &'a Law<'a>,
    carry: [&'a Side<'a>; 2],
    row: &'w mut RowPiece<'r, T>,
    col: &'w mut ColPiece<'c, T>,
    kept: Option<Slot<&'w [f32], &'w [i16]>>,
    apart: bool,
    ws: &'w mut Workspace,
}

impl<T: Element> ElementOp<T> for PullTask<'_, '_, '_, '_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self)
    where
        T: Operands<S>,
    {
        let PullTask { logits, law, carry: [carry_u, carry_v], row, col, mut kept, apart, ws } = self;
        let similarity = &logits.similarity;
        ws.tile.sized(TILE);
        for rows in row_blocks(row.range.clone()) {
            let at_rows = row.at(&rows);
            let u = ws.u.elements(rows.len() * left_stride(T::count(similarity.u.rows.dim)));
            if kept.is_none() {
                T::read_left(similarity, rows.clone(), u);
            }
            let [own_rows, own_cols] = &mut ws.own;
            let own_rows = apart.then(|| own(carry_u, rows.clone(), own_rows));
            for cols in col_blocks(col.range.clone()) {
                let at_cols = col.at(&cols);
                let place = Place { rows: rows.clone(), cols };
                let tile = ws.tile.sized(place.size());
                let holds = fetch::<S, T>(logits, u, &mut kept, &place, tile);

                let sums = &mut row.sums[at_rows.clone()];
                judge_specials(logits, law, &place, holds.logits(tile), sums, &mut ws.asides);
                let factors = law.factors::<S>(&place, &mut ws.factors);
                let col_sums = col.sums.as_deref_mut().map(|sums| &mut sums[at_cols.clone()]);
                law.apply::<S>(&place, tile, holds, factors, &ws.asides, sums, col_sums);

                let inverse = [carry_u.inverse_of(rows.clone()), carry_v.inverse_of(place.cols.clone())];
                let [by_row, by_col] = T::lefts(tile, &place, inverse, &mut ws.halves);
                if let Some(out) = &mut row.out {
                    let (dim, right) = (carry_v.rows.dim, col.right(at_cols.start));
                    T::carry(by_row, right, own_rows, &mut out[at_rows.start * dim..], dim, &mut ws.spill);
                }
                if let Some(out) = &mut col.out {
                    let (dim, right) = (carry_u.rows.dim, row.right(at_rows.start));
                    let own_cols = apart.then(|| own(carry_v, place.cols, own_cols));
                    T::carry(by_col, right, own_cols, &mut out[at_cols.start * dim..], dim, &mut ws.spill);
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

/// Fills the tile with logits, those that were kept or the products of `u` anew; of exponentials that were kept it says where
/// they are.
#[inline(always)]
fn fetch<'k, S: Simd, T: Operands<S>>(
    logits: &Logits<'_, T>,
    u: &[T],
    kept: &mut Option<Slot<&'k [f32], &'k [i16]>>,
    place: &Place,
    tile: &mut [f32],
) -> Holds<'k> {
    match kept {
        Some(Slot::Plain(slot)) if logits.exponentials => Holds::Exponentials(next(slot, tile.len())),
        Some(kept) => {
            kept.read(tile);
            Holds::Logits
        }
        None => {
            T::tile(&logits.similarity, u, tile, place);
            if logits.exponentials { Holds::Shared } else { Holds::Logits }
        }
    }
}

/// Sets aside every special pair of the tile of logits `s` whose G is its own, rows in order.
fn judge_specials<T: Element>(
    logits: &Logits<'_, T>,
    law: &Law<'_>,
    place: &Place,
    s: &[f32],
    sums: &mut [RowSums],
    asides: &mut Vec<Aside>,
) {
    asides.clear();
    logits.visit(place, |i, j, special| {
        asides.extend(law.judge(i, j, special, s[place.at(i, j)], &mut sums[i - place.rows.start]));
    });
    asides.sort_unstable_by_key(|aside| (aside.i, aside.j));
}
