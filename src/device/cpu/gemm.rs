//! Matrix products of encoders: the packed micro-kernel over blocks of C, in parallel.
//!
//! Each element of C is one sum in an order that depends on shapes alone, so the result has the same
//! bits for any number of threads.

use super::operand::left_stride;
use super::simd::{Inner, Isa, LONG, Lane, Left, Op, Simd, WIDEST, pack, pack_transposed, packed_len, product};
use crate::device::Gemm;
use crate::objective::Write;
use rayon::prelude::*;

/// Multiply-adds below which threads cost more than they bring.
const SERIAL: usize = 1 << 17;

/// Columns of C finished at a time in a task's own buffer.
const COLUMNS: usize = 4 * WIDEST;

/// And rows.
const ROWS: usize = 12;

/// `c = op(a) op(b)`; `packed` holds the packed B and grows as needed.
pub fn gemm<T: Lane>(isa: Isa, shape: Gemm, a: &[T], b: &[T], c: Write<&mut [T]>, packed: &mut Vec<T>) {
    let Gemm { m, n, k, transpose_a, transpose_b } = shape;
    let (c, add) = c.split();
    assert!(a.len() == m * k && b.len() == k * n && c.len() == m * n, "gemm operands do not fit the shape");
    if m == 0 || n == 0 {
        return;
    }
    let (row, col) = if transpose_a { (1, m) } else { (k, 1) };
    // At most 64 blocks, each a whole number of micro-kernel heights.
    let rows = if m * n * k <= SERIAL { m } else { m.div_ceil(64).next_multiple_of(ROWS) };
    // A block's own copy of a few rows of A, where they lie at a distance that is none for the cache and are read again.
    let near = if !transpose_a && n > COLUMNS && k > 0 && left_stride(k) != k { ROWS * left_stride(k) } else { 0 };
    // So that there is a part of `packed` for each block, also where it is not used.
    let (columns, blocks, own) = (packed_len(k, n), m.div_ceil(rows), near.max(1));
    if packed.len() < columns + blocks * own {
        packed.resize(columns + blocks * own, T::ZERO);
    }
    let (packed, nears) = packed.split_at_mut(columns);
    isa.run(Pack { b, n, k, transposed: transpose_b, out: packed });
    let packed = &*packed;
    let block = |first: usize, c: &mut [T], own: &mut [T]| {
        let a = Left { data: a.get(first * row..).unwrap_or(&[]), row, col, rows: c.len() / n, depth: k };
        isa.run(Block { a, packed, n, c, add, near: &mut own[..near] });
    };
    if blocks == 1 {
        block(0, c, nears);
    } else {
        let parts = c.par_chunks_mut(rows * n).zip(nears.par_chunks_mut(own));
        parts.enumerate().for_each(|(i, (c, own))| block(i * rows, c, own));
    }
}

struct Pack<'a, T> {
    b: &'a [T],
    n: usize,
    k: usize,
    transposed: bool,
    out: &'a mut [T],
}

impl<T: Lane> Op for Pack<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        if self.transposed {
            pack_transposed::<S, T>(self.b, self.k, self.k, self.n, self.out);
        } else {
            pack::<S, T>(self.b, self.n, self.k, self.n, self.out);
        }
    }
}

struct Block<'a, T> {
    a: Left<'a, T>,
    packed: &'a [T],
    n: usize,
    c: &'a mut [T],
    add: bool,
    /// For [`ROWS`] rows of `a`, [`left_stride`] apart, or nothing: then they are read where they are.
    near: &'a mut [T],
}

impl<T: Lane> Op for Block<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Block { a, packed, n, c, add, near } = self;
        let mut tile = [T::ZERO; ROWS * COLUMNS];
        for (i, c) in c.chunks_mut(ROWS * n).enumerate() {
            let rows = c.len() / n;
            let mut a = Left { data: a.data.get(i * ROWS * a.row..).unwrap_or(&[]), rows, ..a };
            if !near.is_empty() {
                let stride = left_stride(a.depth);
                for (near, row) in near.chunks_exact_mut(stride).zip(a.data.chunks_exact(a.row)).take(rows) {
                    near[..a.depth].copy_from_slice(row);
                }
                a = Left { data: near, row: stride, ..a };
            }
            for j in (0..n).step_by(COLUMNS) {
                let w = COLUMNS.min(n - j);
                product::<S, T, Inner, LONG>(a, &packed[j * a.depth..], w, &mut tile, COLUMNS, false);
                for (c, tile) in c.chunks_mut(n).zip(tile.chunks(COLUMNS)) {
                    let (c, tile) = (&mut c[j..j + w], &tile[..w]);
                    if add {
                        c.iter_mut().zip(tile).for_each(|(c, &t)| *c += t);
                    } else {
                        c.copy_from_slice(tile);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    // All four layouts, sizes on both sides of the parallel threshold, set and added.
    #[test]
    fn agrees_with_the_definition() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let mut packed = Vec::new();
        for (m, n, k) in [(1, 1, 1), (3, 5, 2), (129, 67, 31), (64, 300, 70), (7, 129, 513), (29, 135, 1024)] {
            let (a, b, before) = (random(m * k), random(k * n), random(m * n));
            for (transpose_a, transpose_b) in [(false, false), (true, false), (false, true), (true, true)] {
                let shape = Gemm { m, n, k, transpose_a, transpose_b };
                let x = |i: usize, l: usize| f64::from(a[if transpose_a { l * m + i } else { i * k + l }]);
                let y = |l: usize, j: usize| f64::from(b[if transpose_b { j * k + l } else { l * n + j }]);
                for isa in Isa::available() {
                    let mut set = vec![f32::NAN; m * n];
                    gemm(isa, shape, &a, &b, Write::Set(&mut set), &mut packed);
                    let mut added = before.clone();
                    gemm(isa, shape, &a, &b, Write::Add(&mut added), &mut packed);
                    for i in 0..m {
                        for j in 0..n {
                            let want: f64 = (0..k).map(|l| x(i, l) * y(l, j)).sum();
                            // Rounding of sums of up to 1,024 terms of size below 1.
                            assert!((f64::from(set[i * n + j]) - want).abs() < 2e-5);
                            let want = want + f64::from(before[i * n + j]);
                            assert!((f64::from(added[i * n + j]) - want).abs() < 2e-5);
                        }
                    }
                }
            }
        }
    }
}
