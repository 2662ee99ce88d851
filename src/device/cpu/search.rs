//! Scores of queries with many items: a tile of them at a time, which exact search reduces, and exact ones.

use super::operand::{Element, ElementOp, Operands, PackTransposed, left_stride};
pub use super::simd::Pair;
use super::simd::{self, Isa, Left, Op, PairIsa, PairOp, Pairs, Register, Right, Simd, Vector, WIDEST};
use super::{in_eight, inner};
use crate::objective::Tilting;
use kernels::law::{Num, Product};

/// Columns of a tile: with the queries it is multiplied with it fits the second-level cache.
pub const COLS: usize = 192;

/// What queries and items are multiplied as.
pub trait Operand: Element {
    /// `rows` `[_, dim]` as operands `stride` apart, in `buffer` where they are others, and how far from each row its operand is.
    fn of<'a>(
        isa: Self::Isa,
        rows: &'a [f32],
        dim: usize,
        stride: usize,
        buffer: &'a mut Vec<Self>,
        distances: &mut [f64],
    ) -> &'a [Self];
}

impl Operand for f32 {
    fn of<'a>(
        _: Isa,
        rows: &'a [f32],
        dim: usize,
        stride: usize,
        buffer: &'a mut Vec<f32>,
        distances: &mut [f64],
    ) -> &'a [f32] {
        distances.fill(0.0);
        if stride == dim {
            return rows;
        }
        buffer.resize(rows.len() / dim * stride, 0.0);
        let to = buffer.chunks_exact_mut(stride);
        to.zip(rows.chunks_exact(dim)).for_each(|(to, row)| to[..dim].copy_from_slice(row));
        buffer
    }
}

/// Rounded to bf16.
impl Operand for Pair {
    fn of<'a>(
        isa: PairIsa,
        rows: &'a [f32],
        dim: usize,
        stride: usize,
        buffer: &'a mut Vec<Pair>,
        distances: &mut [f64],
    ) -> &'a [Pair] {
        buffer.resize(rows.len() / dim * stride, Pair::default());
        isa.run(Round { rows, dim, stride, out: buffer, distances });
        buffer
    }
}

struct Round<'a> {
    rows: &'a [f32],
    dim: usize,
    stride: usize,
    out: &'a mut [Pair],
    distances: &'a mut [f64],
}

impl PairOp for Round<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Pairs>(self) {
        let lanes = <S::F32 as Register<f32>>::LANES;
        let rows = self.rows.chunks_exact(self.dim).zip(self.out.chunks_exact_mut(self.stride));
        for ((row, out), distance) in rows.zip(self.distances) {
            let mut sums = [0f64; WIDEST];
            for (row, out) in row.chunks(2 * lanes).zip(out[..Pair::count(self.dim)].chunks_mut(lanes)) {
                let (mut numbers, mut pairs) = ([0f32; 2 * WIDEST], [Pair::default(); WIDEST]);
                numbers[..row.len()].copy_from_slice(row);
                S::halves(S::F32::load(&numbers), S::F32::load(&numbers[lanes..]), &mut pairs);
                for ((sum, numbers), pair) in sums.iter_mut().zip(numbers.as_chunks::<2>().0).zip(&pairs[..lanes]) {
                    let rounded = pair.numbers();
                    let [a, b] = [0, 1].map(|i| f64::from(numbers[i] - rounded[i]));
                    *sum += a * a + b * b;
                }
                out.copy_from_slice(&pairs[..out.len()]);
            }
            *distance = sums.iter().sum::<f64>().sqrt();
        }
    }
}

/// Squared norms of `rows` `[_, dim]`; with `unit` rows are divided by their norms then, but for those of length zero.
pub fn squares<T: Operand>(isa: T::Isa, rows: &mut [f32], dim: usize, unit: bool, out: &mut [f64]) {
    T::run(isa, Squares { rows, dim, unit, out });
}

struct Squares<'a> {
    rows: &'a mut [f32],
    dim: usize,
    unit: bool,
    out: &'a mut [f64],
}

impl<T: Element> ElementOp<T> for Squares<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self)
    where
        T: Operands<S>,
    {
        for (row, square) in self.rows.chunks_exact_mut(self.dim).zip(self.out) {
            *square = inner(row, row);
            if self.unit && *square > 0.0 {
                let norm = square.sqrt();
                row.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
            }
        }
    }
}

/// Numbers of `count` packed items.
pub fn packed_len<T: Operand>(count: usize, dim: usize) -> usize {
    simd::packed_len(T::count(dim), count)
}

/// Packs `items` `[count, dim]` as the right operand of [`each_row`], [`COLS`] items of many, or the last of them, and how far
/// from each its operand is; `buffer` grows as needed.
pub fn pack_items<T: Operand>(
    isa: T::Isa,
    items: &[f32],
    dim: usize,
    buffer: &mut Vec<T>,
    distances: &mut [f64],
    out: &mut [T],
) {
    let depth = T::count(dim);
    let natural = T::of(isa, items, dim, depth, buffer, distances);
    T::run(isa, PackTransposed { natural, depth, n: items.len() / dim, out });
}

/// `rows` `[_, dim]` as the queries of [`each_row`], in `buffer` where they are others, and how far from each its operand is.
pub fn queries<'a, T: Operand>(
    isa: T::Isa,
    rows: &'a [f32],
    dim: usize,
    buffer: &'a mut Vec<T>,
    distances: &mut [f64],
) -> &'a [T] {
    T::of(isa, rows, dim, left_stride(T::count(dim)), buffer, distances)
}

/// Calls `f(query, first item, scores, largest score)` for each of [`queries`] and each run of items:
/// scores are `<query, item> + offset`, -inf where that is no number. Each is one sum in an order that depends on `dim`
/// alone. `packed` holds as many items as there are offsets; `tile` grows as needed.
pub fn each_row<T: Operand>(
    isa: T::Isa,
    queries: &[T],
    dim: usize,
    packed: &[T],
    offset: &[f32],
    tile: &mut Vec<f32>,
    f: impl FnMut(usize, usize, &[f32], f32),
) {
    let depth = T::count(dim);
    let len = queries.len() / left_stride(depth) * COLS;
    if tile.len() < len {
        tile.resize(len, 0.0);
    }
    T::run(isa, EachRow { queries, depth, packed, offset, tile, f });
}

struct EachRow<'a, T, F> {
    queries: &'a [T],
    depth: usize,
    packed: &'a [T],
    offset: &'a [f32],
    tile: &'a mut [f32],
    f: F,
}

impl<T: Operand, F: FnMut(usize, usize, &[f32], f32)> ElementOp<T> for EachRow<'_, T, F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self)
    where
        T: Operands<S>,
    {
        let EachRow { queries, depth, packed, offset, tile, mut f } = self;
        let lanes = <S::F32 as Register<f32>>::LANES;
        let none = S::F32::splat(f32::NEG_INFINITY);
        let stride = left_stride(depth);
        let rows = queries.len() / stride;
        for (at, offset) in offset.chunks(COLS).enumerate() {
            let (first, w) = (at * COLS, offset.len());
            let left = Left { data: queries, row: stride, col: 1, rows, depth };
            let right = Right { packed: &packed[first * depth..], total: depth, first: 0 };
            T::product(left, right, None, w, tile, COLS, false);
            let mut padded = [f32::NEG_INFINITY; COLS];
            padded[..w].copy_from_slice(offset);
            for (i, row) in tile.chunks_exact_mut(COLS).take(rows).enumerate() {
                let row = &mut row[..w.next_multiple_of(lanes)];
                let mut most = none;
                for (s, offset) in row.chunks_exact_mut(lanes).zip(padded.chunks_exact(lanes)) {
                    // The second of two operands where one is no number.
                    let score = S::F32::load(s).add(S::F32::load(offset)).max(none);
                    score.store(s);
                    most = most.max(score);
                }
                let mut by_lane = [f32::NEG_INFINITY; WIDEST];
                most.store(&mut by_lane);
                f(i, first, &row[..w], by_lane.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)));
            }
        }
    }
}

/// s(query, item) at tau = 1, in f64.
pub fn exact(tilting: Tilting, query: &[f32], item: &[f32]) -> f64 {
    exact_of(tilting, query, square(tilting, query), item)
}

/// Of a query, what [`exact_of`] wants of it: its squared norm where rows are of unit length.
#[inline(always)]
fn square(tilting: Tilting, query: &[f32]) -> f64 {
    if tilting.unit_rows() { inner(query, query) } else { 0.0 }
}

/// [`exact`] of a query and its [`square`].
#[inline(always)]
fn exact_of(tilting: Tilting, query: &[f32], square: f64, item: &[f32]) -> f64 {
    match tilting.product() {
        Product::SquaredDistance => -0.5 * in_eight(query, item, |q, x| (q - x) * (q - x)),
        Product::Inner if tilting.unit_rows() => {
            let (along, own) = (inner(query, item), inner(item, item));
            // Where products are exact this is one rounding of a number that items of one direction share: they tie. And
            // no -0, which would rank behind 0.
            let part = along * along / (own * square);
            if square > 0.0 && own > 0.0 { part.sqrt().copysign(along) + 0.0 } else { 0.0 }
        }
        Product::Inner => inner(query, item),
    }
}

/// [`exact`] of a query and each of `items` `[out, dim]`.
pub fn exact_each(tilting: Tilting, query: &[f32], items: &[f32], out: &mut [f64]) {
    Isa::best().run(ExactEach { tilting, query, items, out });
}

struct ExactEach<'a> {
    tilting: Tilting,
    query: &'a [f32],
    items: &'a [f32],
    out: &'a mut [f64],
}

impl Op for ExactEach<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let ExactEach { tilting, query, items, out } = self;
        let square = square(tilting, query);
        for (out, item) in out.iter_mut().zip(items.chunks_exact(query.len())) {
            *out = exact_of(tilting, query, square, item);
        }
    }
}
