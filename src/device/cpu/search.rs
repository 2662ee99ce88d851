//! Inner products of queries with many items, a tile at a time: what exact search reduces.

use super::simd::{self, Inner, Isa, LONG, Left, Op, Register, Simd, Vector, WIDEST, pack_transposed, product};
use kernels::law::Num;

/// Columns of a tile: with the queries it is multiplied with it fits the second-level cache.
pub const COLS: usize = 192;

/// Numbers of `count` packed items.
pub fn packed_len(count: usize, dim: usize) -> usize {
    simd::packed_len(dim, count)
}

/// Packs `items` `[count, dim]` as the right operand of [`each_row`]: [`COLS`] items of many, or the last of them.
pub fn pack_items(isa: Isa, items: &[f32], dim: usize, out: &mut [f32]) {
    isa.run(Pack { items, dim, out });
}

struct Pack<'a> {
    items: &'a [f32],
    dim: usize,
    out: &'a mut [f32],
}

impl Op for Pack<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        pack_transposed::<S, f32>(self.items, self.dim, self.dim, self.items.len() / self.dim, self.out);
    }
}

/// Calls `f(query, first item, scores, largest score)` for each of `queries` `[rows, dim]` and each run of items:
/// scores are `<query, item> + offset`, -inf where that is no number. Each is one sum in an order that depends on `dim`
/// alone. `packed` holds as many items as there are offsets; `tile` grows as needed.
pub fn each_row(
    isa: Isa,
    queries: &[f32],
    dim: usize,
    packed: &[f32],
    offset: &[f32],
    tile: &mut Vec<f32>,
    f: impl FnMut(usize, usize, &[f32], f32),
) {
    let len = queries.len() / dim * COLS;
    if tile.len() < len {
        tile.resize(len, 0.0);
    }
    isa.run(EachRow { queries, dim, packed, offset, tile, f });
}

struct EachRow<'a, F> {
    queries: &'a [f32],
    dim: usize,
    packed: &'a [f32],
    offset: &'a [f32],
    tile: &'a mut [f32],
    f: F,
}

impl<F: FnMut(usize, usize, &[f32], f32)> Op for EachRow<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let EachRow { queries, dim, packed, offset, tile, mut f } = self;
        let lanes = <S::F32 as Register<f32>>::LANES;
        let none = S::F32::splat(f32::NEG_INFINITY);
        let rows = queries.len() / dim;
        for (at, offset) in offset.chunks(COLS).enumerate() {
            let (first, w) = (at * COLS, offset.len());
            let left = Left { data: queries, row: dim, col: 1, rows, depth: dim };
            product::<S, f32, Inner, LONG>(left, &packed[first * dim..], w, tile, COLS, false);
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
