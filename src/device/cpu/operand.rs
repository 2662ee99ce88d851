//! What the fused passes multiply: f32, on any machine, or pairs of bf16, on units for them.
//!
//! | | f32 | pairs |
//! | --- | --- | --- |
//! | embeddings | read as the tilting wants them | as they are stored; 1/\|row\| multiplies logits and G instead |
//! | logits, exponentials, sums | f32 | f32 |
//! | G as an operand | the tile itself | rounded to bf16, once along rows and once along columns |
//!
//! A [`Side`] is rows with what a tilting multiplies them by; a [`Similarity`] says how S follows from two of them. Rows are
//! packed as right operands once a pass: [`pack_columns`] for S, [`pack_pieces`] for the products with G.

use super::buffers::{Buffer, Threads};
use super::simd::{
    Affine, AsIs, Inner, Isa, LONG, Left, Op, Operand, Own, PAIRS, Pair, PairIsa, PairOp, Pairs, Register, Right,
    SHORT, Simd, SquaredDistance, Vector, WIDEST, differences, pack_pairs, pack_part, pack_transposed, packed_len,
    product_part,
};
use super::tile::{COLS, Place, ROWS, TILE, blocks};
use super::together;
use crate::objective::{Matrix, Storage};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use kernels::law::{Num, Product};
use rayon::prelude::*;
use std::fmt::Debug;
use std::ops::Range;

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
        part_of(self.inverse, range)
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

/// How logits follow from embeddings: `S = scale * product(u, v) + offset`.
#[derive(Clone, Copy, Debug)]
pub struct Similarity<'a, T> {
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
}

impl<T: Element> Similarity<'_, T> {
    /// Number of rows.
    pub fn n(&self) -> usize {
        self.u.rows.rows
    }

    /// That of rows `range` alone.
    pub fn of_rows(&self, range: Range<usize>) -> Self {
        Similarity { u: self.u.slice(range), ..*self }
    }

    /// That of columns `range` alone, which start where a packed panel does.
    pub fn of_cols(&self, range: Range<usize>) -> Self {
        Similarity {
            packed: &self.packed[range.start * T::count(self.u.rows.dim)..],
            inverse_v: part_of(self.inverse_v, range.clone()),
            m: range.len(),
            offset: self.offset.map(|offset| &offset[range]),
            ..*self
        }
    }
}

/// Those of `range`, where there are any.
fn part_of(inverse: &[f32], range: Range<usize>) -> &[f32] {
    if inverse.is_empty() { inverse } else { &inverse[range] }
}

/// How far apart rows of `depth` elements lie as the left operand of S: were it a multiple of 4096 bytes, all would share
/// one set of the first-level cache, which has fewer lines than the micro-kernel reads rows.
pub fn left_stride(depth: usize) -> usize {
    if depth.is_multiple_of(1024) { depth + WIDEST } else { depth }
}

/// f32 or [`Pair`], and the instruction sets that multiply them.
pub trait Element: bytemuck::Pod + Default + Debug + Send + Sync {
    type Isa: Copy + Debug + Send + Sync;
    /// Whether exponentials are rounded to bf16 before they are multiplied.
    const ROUNDS: bool;

    /// Elements that hold `n` numbers of a row.
    fn count(n: usize) -> usize;
    /// Rows `range` of a side as an operand of S, `[range, count(D)]`.
    fn read(side: &Side<'_>, range: Range<usize>, out: &mut [Self]);
    /// Rows `range` of u as [`Operands::tile`] takes them, [`left_stride`] apart.
    fn read_left(similarity: &Similarity<'_, Self>, range: Range<usize>, out: &mut [Self]);
    /// Runs `op`, compiled for this instruction set.
    fn run<O: ElementOp<Self>>(isa: Self::Isa, op: O) -> O::Out;
}

/// An algorithm over an [`Element`] and vectors of any width. `run` must be `inline(always)`.
pub trait ElementOp<T> {
    type Out;
    fn run<S: Simd>(self) -> Self::Out
    where
        T: Operands<S>;
}

/// An [`Element`] under an instruction set.
pub trait Operands<S: Simd>: Element + Operand<S> {
    /// The tile of S at `place`, of rows of u. What surplus columns hold means nothing.
    fn tile(similarity: &Similarity<'_, Self>, u: &[Self], s: &mut [f32], place: &Place);
    /// Packs rows `range` of `side` as the right operand of a product with G.
    fn pack_rows(side: &Side<'_>, range: Range<usize>, natural: &mut Buffer, packed: &mut [Self]);
    /// The tile of G as the left operand of a product with v's rows, and its transpose with u's. `inverse` are those of
    /// the tile's rows and columns; `halves` grow as needed.
    fn lefts<'g>(g: &'g [f32], place: &Place, inverse: [&[f32]; 2], halves: &'g mut [Buffer; 2])
    -> [Left<'g, Self>; 2];
    /// `c (+)= left right`, or `left (right - own)`, for `n` columns, see [`product_part`] and [`differences`].
    fn product(
        left: Left<'_, Self>,
        right: Right<'_, Self>,
        own: Option<Own<'_>>,
        n: usize,
        c: &mut [f32],
        ldc: usize,
        add: bool,
    );
    /// `out += left right`, or `left (right - own)` with the output's own rows, `out` `[rows, dim]`, with what
    /// [`pack_rows`](Self::pack_rows) packed.
    #[inline(always)]
    fn carry(
        left: Left<'_, Self>,
        right: Right<'_, Self>,
        own: Option<Own<'_>>,
        out: &mut [f32],
        dim: usize,
        spill: &mut Buffer,
    ) {
        carry::<S, Self>(left, right, own, out, dim, spill);
    }
}

impl Element for f32 {
    type Isa = Isa;
    const ROUNDS: bool = false;

    fn count(n: usize) -> usize {
        n
    }
    fn read(side: &Side<'_>, range: Range<usize>, out: &mut [f32]) {
        side.read(range, out);
    }
    /// With the scale, if a product is linear in them.
    fn read_left(similarity: &Similarity<'_, f32>, range: Range<usize>, out: &mut [f32]) {
        read_apart(&similarity.u, range, left_stride(similarity.u.rows.dim), out);
        if similarity.product == Product::Inner {
            out.iter_mut().for_each(|x| *x *= similarity.scale);
        }
    }
    fn run<O: ElementOp<f32>>(isa: Isa, op: O) -> O::Out {
        isa.run(OfSingles(op))
    }
}

/// Rows `range` of a side as operands of S, `stride` apart.
pub fn read_apart<T: Element>(side: &Side<'_>, range: Range<usize>, stride: usize, out: &mut [T]) {
    let depth = T::count(side.rows.dim);
    if stride == depth {
        return T::read(side, range, out);
    }
    for (i, out) in range.zip(out.chunks_exact_mut(stride)) {
        T::read(side, i..i + 1, &mut out[..depth]);
    }
}

struct OfSingles<O>(O);

impl<O: ElementOp<f32>> Op for OfSingles<O> {
    type Out = O::Out;
    #[inline(always)]
    fn run<S: Simd>(self) -> O::Out {
        self.0.run::<S>()
    }
}

impl<S: Simd> Operands<S> for f32 {
    #[inline(always)]
    fn tile(similarity: &Similarity<'_, f32>, u: &[f32], s: &mut [f32], place: &Place) {
        let Place { rows, cols } = place;
        let dim = similarity.u.rows.dim;
        let left = Left { data: u, row: left_stride(dim), col: 1, rows: rows.len(), depth: dim };
        let right = Right { packed: &similarity.packed[cols.start * dim..], total: dim, first: 0 };
        let (n, ldc) = (cols.len(), place.stride());
        let multipliers = |scale: f32| {
            let mut multipliers = Multipliers::new(scale);
            if let Some(offset) = similarity.offset {
                multipliers.offset[..n].copy_from_slice(&offset[cols.clone()]);
            }
            multipliers
        };
        match similarity.product {
            // Rows of u came with the scale.
            Product::Inner if similarity.offset.is_none() => {
                product_part::<S, f32, Inner, _, SHORT>(left, right, n, s, ldc, false, AsIs);
            }
            Product::Inner => {
                let multipliers = multipliers(1.0);
                product_part::<S, f32, Inner, _, SHORT>(left, right, n, s, ldc, false, multipliers.finish());
            }
            Product::SquaredDistance => {
                let multipliers = multipliers(similarity.scale);
                product_part::<S, f32, SquaredDistance, _, SHORT>(left, right, n, s, ldc, false, multipliers.finish());
            }
        }
    }

    #[inline(always)]
    fn pack_rows(side: &Side<'_>, range: Range<usize>, natural: &mut Buffer, packed: &mut [f32]) {
        let (dim, total) = (side.rows.dim, range.len());
        for rows in blocks(range.clone(), ROWS, 1) {
            let natural = natural.sized(rows.len() * dim);
            side.read(rows.clone(), natural);
            let at = rows.start - range.start..rows.end - range.start;
            if is_narrow::<S>(dim) {
                pack_part::<S::Narrow, f32>(natural, dim, dim, at, total, packed);
            } else {
                pack_part::<S, f32>(natural, dim, dim, at, total, packed);
            }
        }
    }

    #[inline(always)]
    fn lefts<'g>(g: &'g [f32], place: &Place, _: [&[f32]; 2], _: &'g mut [Buffer; 2]) -> [Left<'g, f32>; 2] {
        let (rows, cols, stride) = (place.rows.len(), place.cols.len(), place.stride());
        [
            Left { data: g, row: stride, col: 1, rows, depth: cols },
            Left { data: g, row: 1, col: stride, rows: cols, depth: rows },
        ]
    }

    #[inline(always)]
    fn product(
        left: Left<'_, f32>,
        right: Right<'_, f32>,
        own: Option<Own<'_>>,
        n: usize,
        c: &mut [f32],
        ldc: usize,
        add: bool,
    ) {
        match own {
            Some(own) => differences::<S>(left, right, own, n, c, ldc, add),
            None => product_part::<S, f32, Inner, _, LONG>(left, right, n, c, ldc, add, AsIs),
        }
    }

    #[inline(always)]
    fn carry(
        left: Left<'_, f32>,
        right: Right<'_, f32>,
        own: Option<Own<'_>>,
        out: &mut [f32],
        dim: usize,
        spill: &mut Buffer,
    ) {
        if !is_narrow::<S>(dim) {
            carry::<S, f32>(left, right, own, out, dim, spill);
        } else if left.row == 1 {
            across_of::<S>(left, right, own, out, dim);
        } else {
            carry::<S::Narrow, f32>(left, right, own, out, dim, spill);
        }
    }
}

/// [`across`] for rows of `dim` numbers.
#[inline(always)]
fn across_of<S: Simd>(left: Left<'_, f32>, right: Right<'_, f32>, own: Option<Own<'_>>, out: &mut [f32], dim: usize) {
    match dim {
        1 => across::<S, 1, 2>(left, right, own, out),
        2 => across::<S, 2, 2>(left, right, own, out),
        3 => across::<S, 3, 2>(left, right, own, out),
        4 => across::<S, 4, 2>(left, right, own, out),
        5 => across::<S, 5, 2>(left, right, own, out),
        6 => across::<S, 6, 2>(left, right, own, out),
        7 => across::<S, 7, 1>(left, right, own, out),
        _ => across::<S, 8, 1>(left, right, own, out),
    }
}

/// `out += left right` of rows of `K` numbers, less each output's own if there are any, with G's columns side by side in
/// registers: all of their numbers are used, where one of a narrow row's are K.
#[inline(always)]
fn across<S: Simd, const K: usize, const V: usize>(
    left: Left<'_, f32>,
    right: Right<'_, f32>,
    own: Option<Own<'_>>,
    out: &mut [f32],
) {
    let (lanes, wide) = (<S::F32 as Register<f32>>::LANES, <<S::Narrow as Simd>::F32 as Register<f32>>::LANES);
    let rows = &right.packed[right.first * wide..];
    for first in (0..left.rows).step_by(V * lanes) {
        let mut sum = [[S::F32::splat(0.0); V]; K];
        let mut from = sum;
        if let Some(own) = own {
            let mut turned = [[0.0; 2 * WIDEST]; K];
            for (j, own) in own.data[first * own.stride..].chunks(own.stride).take(V * lanes).enumerate() {
                turned.iter_mut().zip(own).for_each(|(turned, &x)| turned[j] = x);
            }
            for (from, turned) in from.iter_mut().zip(&turned) {
                for (v, from) in from.iter_mut().enumerate() {
                    *from = S::F32::load(&turned[v * lanes..]);
                }
            }
        }
        for (g, row) in left.data.chunks(left.col).zip(rows.chunks_exact(wide)).take(left.depth) {
            let mut columns = [S::F32::splat(0.0); V];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = S::F32::load(&g[first + v * lanes..]);
            }
            for ((sum, from), &x) in sum.iter_mut().zip(&from).zip(row) {
                let x = S::F32::splat(x);
                for ((sum, &from), &g) in sum.iter_mut().zip(from).zip(&columns) {
                    let x = if own.is_some() { x.sub(from) } else { x };
                    *sum = x.mul_add(g, *sum);
                }
            }
        }
        let mut sums = [[0.0; 2 * WIDEST]; K];
        for (sums, sum) in sums.iter_mut().zip(&sum) {
            for (v, sum) in sum.iter().enumerate() {
                sum.store(&mut sums[v * lanes..]);
            }
        }
        for (j, out) in out[first * K..left.rows * K].chunks_exact_mut(K).take(V * lanes).enumerate() {
            out.iter_mut().zip(&sums).for_each(|(out, sums)| *out += sums[j]);
        }
    }
}

/// Whether a register half as wide holds a row of `dim`.
#[inline(always)]
fn is_narrow<S: Simd>(dim: usize) -> bool {
    dim <= <<S::Narrow as Simd>::F32 as Register<f32>>::LANES
}

impl Element for Pair {
    type Isa = PairIsa;
    const ROUNDS: bool = true;

    fn count(n: usize) -> usize {
        n.div_ceil(2)
    }
    fn read(side: &Side<'_>, range: Range<usize>, out: &mut [Pair]) {
        let dim = side.rows.dim;
        let rows = stored(side, range).chunks_exact(dim);
        for (out, row) in out.chunks_exact_mut(Pair::count(dim)).zip(rows) {
            let (pairs, last) = row.as_chunks();
            out.iter_mut().zip(pairs).for_each(|(out, &[low, high])| *out = Pair::new(low, high));
            if let &[last] = last {
                out[dim / 2] = Pair::new(last, bf16::ZERO);
            }
        }
    }
    fn read_left(similarity: &Similarity<'_, Pair>, range: Range<usize>, out: &mut [Pair]) {
        read_apart(&similarity.u, range, left_stride(Pair::count(similarity.u.rows.dim)), out);
    }
    fn run<O: ElementOp<Pair>>(isa: PairIsa, op: O) -> O::Out {
        isa.run(OfPairs(op))
    }
}

struct OfPairs<O>(O);

impl<O: ElementOp<Pair>> PairOp for OfPairs<O> {
    type Out = O::Out;
    #[inline(always)]
    fn run<S: Pairs>(self) -> O::Out {
        self.0.run::<S>()
    }
}

impl<S: Pairs> Operands<S> for Pair {
    #[inline(always)]
    fn tile(similarity: &Similarity<'_, Pair>, u: &[Pair], s: &mut [f32], place: &Place) {
        let Place { rows, cols } = place;
        let depth = Pair::count(similarity.u.rows.dim);
        let left = Left { data: u, row: left_stride(depth), col: 1, rows: rows.len(), depth };
        let right = Right { packed: &similarity.packed[cols.start * depth..], total: depth, first: 0 };
        let mut multipliers = Multipliers::new(similarity.scale);
        if !similarity.u.inverse.is_empty() {
            multipliers.rows.iter_mut().zip(&similarity.u.inverse[rows.clone()]).for_each(|(f, x)| *f *= x);
            multipliers.cols[..cols.len()].copy_from_slice(&similarity.inverse_v[cols.clone()]);
        }
        if let Some(offset) = similarity.offset {
            multipliers.offset[..cols.len()].copy_from_slice(&offset[cols.clone()]);
        }
        let finish = multipliers.finish();
        product_part::<S, Pair, Inner, _, PAIRS>(left, right, cols.len(), s, place.stride(), false, finish);
    }

    #[inline(always)]
    fn pack_rows(side: &Side<'_>, range: Range<usize>, _: &mut Buffer, packed: &mut [Pair]) {
        let (dim, total) = (side.rows.dim, Pair::count(range.len()));
        pack_pairs::<S>(stored(side, range), dim, dim, 0..total, total, packed);
    }

    #[inline(always)]
    fn lefts<'g>(
        g: &'g [f32],
        place: &Place,
        [by_row, by_col]: [&[f32]; 2],
        halves: &'g mut [Buffer; 2],
    ) -> [Left<'g, Pair>; 2] {
        let (rows, cols, stride) = (place.rows.len(), place.cols.len(), place.stride());
        let lanes = <S::F32 as Register<f32>>::LANES;
        let wide = cols.next_multiple_of(2 * lanes);
        let mut multipliers = Multipliers::new(1.0);
        multipliers.rows.iter_mut().zip(by_row).for_each(|(f, &x)| *f = x);
        multipliers.cols.iter_mut().zip(by_col).for_each(|(f, &x)| *f = x);
        let [along_rows, along_cols]: [&mut [Pair]; 2] = halves.each_mut().map(|buffer| buffer.elements(TILE / 2));
        for (i, row) in g.chunks_exact(stride).take(rows).enumerate() {
            let to = along_rows[i * stride / 2..][..wide / 2].chunks_exact_mut(lanes);
            let pairs = row.chunks_exact(2 * lanes).zip(multipliers.cols.chunks_exact(2 * lanes));
            for (to, (g, factor)) in to.zip(pairs) {
                let [first, second] = [0, lanes].map(|at| (&g[at..], &factor[at..]));
                S::halves(scaled::<S>(first), scaled::<S>(second), to);
            }
        }
        for (i, rows) in g.chunks(2 * stride).take(Pair::count(rows)).enumerate() {
            let (low, high) = rows.split_at(stride);
            let [first, second] = [2 * i, 2 * i + 1].map(|row| S::F32::splat(multipliers.rows[row]));
            let to = along_cols[i * stride..][..wide].chunks_exact_mut(lanes);
            for (at, to) in (0..wide).step_by(lanes).zip(to) {
                let low = S::F32::load(&low[at..]).mul(first);
                // Rows come in even numbers but for the last, whose partner is zeros.
                let high = if high.is_empty() { S::F32::splat(0.0) } else { S::F32::load(&high[at..]).mul(second) };
                S::pair(low, high, to);
            }
        }
        [
            Left { data: along_rows, row: stride / 2, col: 1, rows, depth: Pair::count(cols) },
            Left { data: along_cols, row: 1, col: stride, rows: cols, depth: Pair::count(rows) },
        ]
    }

    #[inline(always)]
    fn product(
        left: Left<'_, Pair>,
        right: Right<'_, Pair>,
        own: Option<Own<'_>>,
        n: usize,
        c: &mut [f32],
        ldc: usize,
        add: bool,
    ) {
        assert!(own.is_none(), "pairs are multiplied where logits are inner products");
        product_part::<S, Pair, Inner, _, PAIRS>(left, right, n, c, ldc, add, AsIs);
    }
}

/// A side's rows as they are stored.
fn stored<'a>(side: &Side<'a>, range: Range<usize>) -> &'a [bf16] {
    match side.rows.data {
        Storage::Bf16(x) => &x[range.start * side.rows.dim..range.end * side.rows.dim],
        Storage::F32(_) | Storage::F16(_) => unreachable!("pairs are multiplied where both sides are stored as bf16"),
    }
}

/// What the numbers of a tile are multiplied by and what is added, padded to whole registers.
struct Multipliers {
    rows: [f32; ROWS],
    cols: [f32; COLS],
    offset: [f32; COLS],
}

impl Multipliers {
    fn new(rows: f32) -> Self {
        Multipliers { rows: [rows; ROWS], cols: [1.0; COLS], offset: [0.0; COLS] }
    }
    fn finish(&self) -> Affine<'_> {
        Affine { rows: &self.rows, cols: &self.cols, offset: &self.offset }
    }
}

#[inline(always)]
fn scaled<S: Simd>((x, factor): (&[f32], &[f32])) -> S::F32 {
    S::F32::load(x).mul(S::F32::load(factor))
}

/// [`Operands::carry`] by the micro-kernel.
#[inline(always)]
fn carry<S: Simd, T: Operands<S>>(
    left: Left<'_, T>,
    right: Right<'_, T>,
    own: Option<Own<'_>>,
    out: &mut [f32],
    dim: usize,
    spill: &mut Buffer,
) {
    if dim.is_multiple_of(<S::F32 as Register<f32>>::LANES) {
        T::product(left, right, own, dim, out, dim, true);
    } else {
        let wide = dim.next_multiple_of(WIDEST);
        let spill = spill.sized(left.rows * wide);
        T::product(left, right, own, dim, spill, wide, false);
        for (out, spill) in out.chunks_exact_mut(dim).zip(spill.chunks_exact(wide)) {
            out.iter_mut().zip(spill).for_each(|(o, s)| *o += s);
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

/// Packs all rows of `side` as the right operands of products with G, `length` rows a piece; nothing if not `wanted`.
pub fn pack_pieces<'b, T: Element>(
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
