//! Ranks and best matches, a block of scores at a time: the full score matrix is never formed.

use crate::device::{Device, Gemm, View, ViewMut};
use crate::objective::{Tilting, Write};
use kernels::law::Product;
use rayon::prelude::*;

/// Recall both ways: the share of queries whose own item is among the best K; ties rank by lowest index.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Recall {
    /// u finds its v first.
    pub u_to_v_at_1: f64,
    /// u finds its v among the first 5.
    pub u_to_v_at_5: f64,
    /// v finds its u first.
    pub v_to_u_at_1: f64,
    /// v finds its u among the first 5.
    pub v_to_u_at_5: f64,
}

/// Recall of pairs (u_i, v_i), `[N, dim]` each.
pub fn recall<D: Device<Real = f32>>(device: &D, tilting: Tilting, u: &[f32], v: &[f32], dim: usize) -> Recall {
    let share =
        |ranks: &[u32], k: u32| ranks.iter().filter(|&&rank| rank < k).count() as f64 / ranks.len().max(1) as f64;
    let forth = own_ranks(device, tilting, u, v, dim);
    let back = own_ranks(device, tilting, v, u, dim);
    Recall {
        u_to_v_at_1: share(&forth, 1),
        u_to_v_at_5: share(&forth, 5),
        v_to_u_at_1: share(&back, 1),
        v_to_u_at_5: share(&back, 5),
    }
}

/// For each query i of `[N, dim]`, how many of the items `[N, dim]` come before item i.
pub fn own_ranks<D: Device<Real = f32>>(
    device: &D,
    tilting: Tilting,
    queries: &[f32],
    items: &[f32],
    dim: usize,
) -> Vec<u32> {
    // A query's own item is in the first block it meets (ITEMS is a multiple of QUERIES).
    let mut own = vec![0f32; queries.len() / dim];
    let mut ranks = vec![0u32; own.len()];
    each_block(device, tilting, queries, items, dim, |block, scores| {
        let Block { first_query, first_item, items, opening } = block;
        let rows = first_query..first_query + scores.len() / items;
        let (own, ranks) = (&mut own[rows.clone()], &mut ranks[rows]);
        own.par_iter_mut().zip(ranks).zip(scores.par_chunks_exact(items)).enumerate().for_each(
            |(row, ((own, rank), scores))| {
                let i = first_query + row;
                if opening {
                    *own = scores[i - first_item];
                }
                let (before, after) = scores.split_at(i.clamp(first_item, first_item + items) - first_item);
                *rank +=
                    (before.iter().filter(|&s| s >= own).count() + after.iter().filter(|&s| s > own).count()) as u32;
            },
        );
    });
    ranks
}

/// The item `[M, dim]` of largest score for each query `[N, dim]`; ties: the lowest index.
pub fn best<D: Device<Real = f32>>(
    device: &D,
    tilting: Tilting,
    queries: &[f32],
    items: &[f32],
    dim: usize,
) -> Vec<usize> {
    let mut best = vec![(f32::NEG_INFINITY, usize::MAX); queries.len() / dim];
    each_block(device, tilting, queries, items, dim, |Block { first_query, first_item, items, .. }, scores| {
        best[first_query..].par_iter_mut().zip(scores.par_chunks_exact(items)).for_each(|(best, scores)| {
            for (j, &score) in scores.iter().enumerate() {
                if score > best.0 || (score == best.0 && first_item + j < best.1) {
                    *best = (score, first_item + j);
                }
            }
        });
    });
    best.into_iter().map(|(_, index)| index).collect()
}

/// Where a block of scores lies.
struct Block {
    first_query: usize,
    first_item: usize,
    /// Its columns.
    items: usize,
    /// Whether it is the first that its queries meet; it holds their own items.
    opening: bool,
}

/// Queries and items of a block.
const QUERIES: usize = 256;
const ITEMS: usize = 32 * QUERIES;

/// Calls `f` with each block of scores `[queries, items]`, beginning for each range of queries with the items of the
/// same indices. A score orders items as s(query, item) does: what only depends on the query is left out. Each score
/// is one sum in an order that depends on `dim` alone, so that equal items tie wherever they are.
fn each_block<D: Device<Real = f32>>(
    device: &D,
    tilting: Tilting,
    queries: &[f32],
    items: &[f32],
    dim: usize,
    mut f: impl FnMut(Block, &[f32]),
) {
    let (n, m) = (queries.len() / dim, items.len() / dim);
    let origin = if tilting.product() == Product::SquaredDistance { origin(items, dim) } else { vec![0.0; dim] };
    let shifted = |row: &[f32], out: &mut [f32]| {
        out.iter_mut().zip(row).zip(&origin).for_each(|((o, x), c)| *o = x - c);
    };
    let (mut left, mut right) = (device.alloc(QUERIES * dim), device.alloc(ITEMS * dim));
    let mut block = device.alloc(QUERIES * ITEMS);
    let (mut host, mut offset, mut scores) = (vec![0f32; ITEMS * dim], vec![0f32; ITEMS], vec![0f32; QUERIES * ITEMS]);
    for first_query in (0..n).step_by(QUERIES) {
        let rows = QUERIES.min(n - first_query);
        let from = queries[first_query * dim..].chunks_exact(dim);
        host.chunks_exact_mut(dim).zip(from).take(rows).for_each(|(to, row)| shifted(row, to));
        device.upload(&host[..rows * dim], ViewMut { buf: &mut left, at: 0..rows * dim });
        let blocks = m.div_ceil(ITEMS);
        for turn in 0..blocks {
            let first_item = (first_query / ITEMS + turn) % blocks * ITEMS;
            let cols = ITEMS.min(m - first_item);
            let from = items[first_item * dim..].par_chunks_exact(dim);
            host.par_chunks_exact_mut(dim).zip(&mut offset).zip(from).take(cols).for_each(|((to, offset), row)| {
                shifted(row, to);
                *offset = prepare(tilting, to);
            });
            device.upload(&host[..cols * dim], ViewMut { buf: &mut right, at: 0..cols * dim });
            device.gemm(
                Gemm { m: rows, n: cols, k: dim, transpose_a: false, transpose_b: true },
                View { buf: &left, at: 0..rows * dim },
                View { buf: &right, at: 0..cols * dim },
                Write::Set(ViewMut { buf: &mut block, at: 0..rows * cols }),
            );
            let scores = &mut scores[..rows * cols];
            device.download(View { buf: &block, at: 0..rows * cols }, scores);
            scores.par_chunks_exact_mut(cols).for_each(|row| row.iter_mut().zip(&offset).for_each(|(s, o)| *s += o));
            f(Block { first_query, first_item, items: cols, opening: turn == 0 }, scores);
        }
    }
}

/// Makes an item ready for an inner product with a query, and returns what to add to that.
fn prepare(tilting: Tilting, item: &mut [f32]) -> f32 {
    let square: f64 = item.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    if tilting.unit_rows() && square > 0.0 {
        item.iter_mut().for_each(|x| *x = (f64::from(*x) / square.sqrt()) as f32);
    }
    match tilting.product() {
        // -|q - x|^2/2 = <q, x> - |x|^2/2 - |q|^2/2.
        Product::SquaredDistance => (-0.5 * square) as f32,
        Product::Inner => 0.0,
    }
}

/// A point amid the items from which distances lose no digits: each coordinate's mean, rounded to a power of two below
/// its spread, so that exact numbers stay exact.
fn origin(items: &[f32], dim: usize) -> Vec<f32> {
    let count = (items.len() / dim) as f64;
    let column = |k: usize| items.iter().skip(k).step_by(dim).map(|&x| f64::from(x));
    (0..dim)
        .map(|k| {
            let mean = column(k).sum::<f64>() / count;
            let spread = (column(k).map(|x| (x - mean) * (x - mean)).sum::<f64>() / count).sqrt();
            let grid = if spread > 0.0 { spread.log2().floor().exp2() } else { return mean as f32 };
            ((mean / grid).round() * grid) as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use rand::{RngExt, SeedableRng};

    fn rng() -> rand_chacha::ChaCha8Rng {
        rand_chacha::ChaCha8Rng::seed_from_u64(2)
    }

    // Small integers: every score is exact, so that ties are ties, and the order is the definition's. Sizes are below
    // and above a block; far from the origin l2 has no digits to lose.
    #[test]
    fn ranks_and_best_matches_follow_the_definition() {
        let dim = 2;
        for (n, shift) in [(1, 0), (83, 0), (ITEMS + QUERIES + 7, 0), (QUERIES + 1, 1 << 20)] {
            let mut rng = rng();
            let mut draw =
                || -> Vec<f32> { (0..n * dim).map(|_| (rng.random_range(-9i32..10) + shift) as f32).collect() };
            let (u, v) = (draw(), draw());
            for tilting in [Tilting::Dot, Tilting::L2] {
                if (tilting, shift) == (Tilting::Dot, 1 << 20) {
                    continue;
                }
                let score = |i: usize, j: usize| -> f32 {
                    let pairs = (0..dim).map(|k| (u[i * dim + k], v[j * dim + k]));
                    match tilting {
                        Tilting::L2 => pairs.map(|(a, b)| -(a - b) * (a - b)).sum(),
                        _ => pairs.map(|(a, b)| a * b).sum(),
                    }
                };
                let ranks = own_ranks(&Cpu::new(), tilting, &u, &v, dim);
                let best = best(&Cpu::new(), tilting, &u, &v, dim);
                for i in (0..n).step_by(1 + n / 200).chain([n - 1]) {
                    let before = |&j: &usize| score(i, j) > score(i, i) || (score(i, j) == score(i, i) && j < i);
                    assert_eq!(ranks[i] as usize, (0..n).filter(before).count(), "{tilting:?} {n} {shift}");
                    let top = (1..n).fold(0, |top, j| if score(i, j) > score(i, top) { j } else { top });
                    assert_eq!(best[i], top, "{tilting:?} {n} {shift}");
                }
            }
        }
    }

    // The same item in two blocks ties to the bit: the later copy ranks one behind.
    #[test]
    fn equal_items_tie_across_blocks() {
        let (dim, copies, n) = (67, 40, ITEMS + 40);
        let mut rng = rng();
        let mut draw = || -> Vec<f32> {
            let mut x: Vec<f32> = (0..ITEMS * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
            x.extend_from_within(..copies * dim);
            x
        };
        let (u, v) = (draw(), draw());
        for &tilting in Tilting::ALL {
            let ranks = own_ranks(&Cpu::new(), tilting, &u, &v, dim);
            assert!((0..copies).all(|i| ranks[i + n - copies] == ranks[i] + 1), "{tilting:?}");
        }
    }

    #[test]
    fn cosine_forgets_lengths() {
        let (n, dim) = (83, 2);
        let x: Vec<f32> = (0..n).flat_map(|i| [(i as f32 * 0.05).cos(), (i as f32 * 0.05).sin()]).collect();
        let stretched: Vec<f32> = x.iter().enumerate().map(|(k, x)| x * (1 + k / dim % 7) as f32).collect();
        let found = recall(&Cpu::new(), Tilting::Cosine, &x, &stretched, dim);
        assert_eq!((found.u_to_v_at_1, found.v_to_u_at_5), (1.0, 1.0));
    }
}
