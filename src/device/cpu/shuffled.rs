//! The joint loss with a sampled normaliser (Remark 3.9): only the diagonal and K shuffled pairings
//! of the batch are ever looked at, O(N D K) work.

use super::buffers::sized;
use super::contrast::{Accumulated, Tilted, put};
use super::operand::Side;
use crate::objective::{Batch, Gradients, Loss, Value, pairing};
use kernels::law::Product;
use rayon::prelude::*;

/// Buffers of this objective.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Both sides as logits take them, `[N, D]` each.
    u: Vec<f32>,
    v: Vec<f32>,
    /// Logits of one pairing after another, `[K + 1, N]`: the diagonal first.
    logits: Vec<f32>,
    /// The pairings and their inverses, `[K + 1, N]`.
    forth: Vec<u32>,
    back: Vec<u32>,
}

impl Scratch {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * (self.u.capacity()
            + self.v.capacity()
            + self.logits.capacity()
            + self.forth.capacity()
            + self.back.capacity())
    }
}

/// Evaluates a validated batch: N = M, diagonal positives, nothing ignored, no offset.
pub fn evaluate(
    scratch: &mut super::contrast::Scratch,
    loss: &Loss,
    batch: &Batch<'_>,
    gradients: Gradients<'_>,
    pairings: u32,
    seed: u64,
) -> Value {
    let (n, dim) = (batch.u.rows, batch.u.dim);
    let super::contrast::Scratch { counts: prepared, middle, inverse_u, inverse_v, threads, pairings: own, .. } =
        scratch;
    let share = &prepared.row_share;
    let tilted = Tilted::new(loss, batch, middle, inverse_u, inverse_v, threads);
    let total = (pairings as usize + 1) * n;
    let (u, v) = (sized(&mut own.u, n * dim), sized(&mut own.v, n * dim));
    read_all(&tilted.u, u);
    read_all(&tilted.v, v);
    own.forth.clear();
    own.forth.extend(0..n as u32);
    for k in 0..pairings {
        own.forth.extend(pairing(n, seed, k).into_iter().map(|j| j as u32));
    }
    own.back.resize(total, 0);
    for (forth, back) in own.forth.chunks_exact(n).zip(own.back.chunks_exact_mut(n)) {
        for (i, &j) in forth.iter().enumerate() {
            back[j as usize] = i as u32;
        }
    }
    let (u, v, forth, back) = (&*u, &*v, &own.forth[..], &own.back[..]);
    let row = |x: &'_ [f32], i: u32| -> std::ops::Range<usize> {
        debug_assert!(x.len() >= (i as usize + 1) * dim);
        i as usize * dim..(i as usize + 1) * dim
    };
    let logits = sized(&mut own.logits, total);
    logits.par_iter_mut().enumerate().for_each(|(at, s)| {
        let (x, y) = (&u[row(u, (at % n) as u32)], &v[row(v, forth[at])]);
        let pairs = x.iter().zip(y).map(|(&x, &y)| (f64::from(x), f64::from(y)));
        let product: f64 = match tilted.product {
            Product::Inner => pairs.map(|(x, y)| x * y).sum(),
            Product::SquaredDistance => pairs.map(|(x, y)| (x - y) * (x - y)).sum(),
        };
        *s = (tilted.scale * product) as f32;
    });
    let (diagonal, shuffled) = logits.split_at(n);
    let max = shuffled.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = shuffled.iter().map(|&s| f64::from(s - max).exp()).sum();
    let positive: f64 = diagonal.iter().zip(share).map(|(&s, &w)| f64::from(w) * f64::from(s)).sum();
    let value = f64::from(max) + (sum / shuffled.len() as f64).ln() - positive;

    // G of pairing entry `at`, the diagonal's being its (negative) share.
    let g = |at: usize| {
        if at < n { -f64::from(share[at]) } else { f64::from(logits[at] - max).exp() / sum }
    };
    let gs: f64 = (0..total).map(|at| g(at) * f64::from(logits[at])).sum();
    let finish =
        |side: &Side<'_>, [own, other]: [&[f32]; 2], order: &[u32], by_row: bool, out: Option<Accumulated<'_>>| {
            let Some(mut out) = out else { return };
            // Entry `at` of pairing k seen from this side's row i.
            let entry = |k: usize, i: usize| k * n + if by_row { i } else { order[k * n + i] as usize };
            let entries = |i: usize| (0..=pairings as usize).map(move |k| (entry(k, i), order[k * n + i]));
            out.acc().par_chunks_mut(dim).enumerate().for_each(|(i, acc)| {
                acc.fill(0.0);
                for (at, j) in entries(i) {
                    let g = g(at) as f32;
                    let others = &other[row(other, j)];
                    match tilted.product {
                        Product::Inner => acc.iter_mut().zip(others).for_each(|(a, &x)| *a += g * x),
                        // Differences, of which nothing is lost to where rows lie.
                        Product::SquaredDistance => {
                            let pairs = others.iter().zip(&own[row(own, i as u32)]);
                            acc.iter_mut().zip(pairs).for_each(|(a, (&x, &o))| *a += g * (x - o));
                        }
                    }
                }
            });
            tilted.finish(side, out, threads);
        };
    finish(&tilted.u, [u, v], forth, true, Accumulated::new(gradients.u, &mut scratch.pulled.grad_u));
    finish(&tilted.v, [v, u], back, false, Accumulated::new(gradients.v, &mut scratch.pulled.grad_v));
    let column = |j: usize| (0..total).step_by(n).map(|first| g(first + back[first + j] as usize)).sum::<f64>() as f32;
    put(gradients.offset_v, column);
    Value { loss: value, grad_tau: -gs / tilted.tau, grad_bias: 0.0 }
}

fn read_all(side: &Side<'_>, out: &mut [f32]) {
    const CHUNK: usize = 256;
    let dim = side.rows.dim;
    out.par_chunks_mut(CHUNK * dim).enumerate().for_each(|(c, out)| {
        side.read(c * CHUNK..c * CHUNK + out.len() / dim, out);
    });
}
