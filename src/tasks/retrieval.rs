//! Ranks and best matches, a block of scores at a time: the full score matrix is never formed.

use crate::device::{Device, Gemm, View, ViewMut};
use crate::objective::{Tilting, Write};
use kernels::law::Product;

/// Scores held at once.
const BLOCK: usize = 1 << 22;

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
    let mut ranks = Vec::with_capacity(queries.len() / dim);
    each_row(device, tilting, queries, items, dim, |i, scores| {
        let own = scores[i];
        let above = scores.iter().filter(|&&s| s > own).count();
        let tied = scores[..i].iter().filter(|&&s| s == own).count();
        ranks.push((above + tied) as u32);
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
    let mut best = Vec::with_capacity(queries.len() / dim);
    each_row(device, tilting, queries, items, dim, |_, scores| {
        best.push((0..scores.len()).fold(0, |top, j| if scores[j] > scores[top] { j } else { top }));
    });
    best
}

/// Calls `f(i, scores)` for each query in order. A score orders items as s(query, item) does; what only
/// depends on the query is left out.
fn each_row<D: Device<Real = f32>>(
    device: &D,
    tilting: Tilting,
    queries: &[f32],
    items: &[f32],
    dim: usize,
    mut f: impl FnMut(usize, &[f32]),
) {
    let (n, m) = (queries.len() / dim, items.len() / dim);
    let squares = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    let mut prepared = items.to_vec();
    let mut offset = vec![0f32; m];
    for (item, offset) in prepared.chunks_exact_mut(dim).zip(&mut offset) {
        if tilting.unit_rows() {
            let norm = squares(item).sqrt();
            let inverse = if norm > 0.0 { 1.0 / norm } else { 0.0 };
            item.iter_mut().for_each(|x| *x = (f64::from(*x) * inverse) as f32);
        }
        if tilting.product() == Product::SquaredDistance {
            // -|q - x|^2/2 = <q, x> - |x|^2/2 - |q|^2/2.
            *offset = (-0.5 * squares(item)) as f32;
        }
    }
    let mut right = device.alloc(m * dim);
    device.upload(&prepared, ViewMut { buf: &mut right, at: 0..m * dim });
    let rows = (BLOCK / m.max(1)).clamp(1, n.max(1));
    let (mut left, mut block) = (device.alloc(rows * dim), device.alloc(rows * m));
    let mut scores = vec![0f32; rows * m];
    for first in (0..n).step_by(rows) {
        let rows = rows.min(n - first);
        device.upload(&queries[first * dim..(first + rows) * dim], ViewMut { buf: &mut left, at: 0..rows * dim });
        device.gemm(
            Gemm { m: rows, n: m, k: dim, transpose_a: false, transpose_b: true },
            View { buf: &left, at: 0..rows * dim },
            View { buf: &right, at: 0..m * dim },
            Write::Set(ViewMut { buf: &mut block, at: 0..rows * m }),
        );
        device.download(View { buf: &block, at: 0..rows * m }, &mut scores[..rows * m]);
        for (i, scores) in scores[..rows * m].chunks_exact_mut(m).enumerate() {
            scores.iter_mut().zip(&offset).for_each(|(s, o)| *s += o);
            f(first + i, scores);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;
    use rand::{RngExt, SeedableRng};

    // Small integers: every score is exact, so that ties are ties, and the order is the definition's.
    #[test]
    fn ranks_and_best_matches_follow_the_definition() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        let (n, dim) = (83, 2);
        let mut draw = || -> Vec<f32> { (0..n * dim).map(|_| rng.random_range(-2i32..3) as f32).collect() };
        let (u, v) = (draw(), draw());
        for tilting in [Tilting::Dot, Tilting::L2] {
            let score = |i: usize, j: usize| -> f32 {
                let pairs = (0..dim).map(|k| (u[i * dim + k], v[j * dim + k]));
                match tilting {
                    Tilting::L2 => pairs.map(|(a, b)| -(a - b) * (a - b)).sum(),
                    _ => pairs.map(|(a, b)| a * b).sum(),
                }
            };
            let order = |i: usize| {
                let mut order: Vec<usize> = (0..n).collect();
                order.sort_by(|&a, &b| score(i, b).total_cmp(&score(i, a)).then(a.cmp(&b)));
                order
            };
            let ranks = own_ranks(&Cpu::new(), tilting, &u, &v, dim);
            let best = best(&Cpu::new(), tilting, &u, &v, dim);
            for i in 0..n {
                assert_eq!(order(i)[ranks[i] as usize], i, "{tilting:?}");
                assert_eq!(order(i)[0], best[i], "{tilting:?}");
            }
        }
        // Cosine forgets lengths: each row finds itself, stretched.
        let x: Vec<f32> = (0..n).flat_map(|i| [(i as f32 * 0.05).cos(), (i as f32 * 0.05).sin()]).collect();
        let stretched: Vec<f32> = x.iter().enumerate().map(|(k, x)| x * (1 + k / dim % 7) as f32).collect();
        let found = recall(&Cpu::new(), Tilting::Cosine, &x, &stretched, dim);
        assert_eq!((found.u_to_v_at_1, found.v_to_u_at_5), (1.0, 1.0));
    }
}
