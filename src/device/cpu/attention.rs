//! Softmax attention: a task owns whole samples and walks their heads, [`QUERIES`] queries at a time.
//!
//! ```text
//! forward   S = Q K' / sqrt(head),  P = exp(S - lse) with lse the rows' log-sum-exp,  O = P V
//! backward  dV = P' dO,  dP = dO V',  delta_i = sum_j P_ij dP_ij,  dS = P (dP - delta) / sqrt(head),
//!           dQ = dS K,   dK = dS' Q
//! ```
//!
//! `delta` is `<dO_i, O_i>` too, but summed as it is here rounding leaves nothing where one key has all the weight.
//! Only the rows of S under a block of queries exist at a time, `[QUERIES, time]`, in cache; backward multiplies
//! them out again. Keys and values are packed once a head, in blocks of [`KEYS`], so that under a causal mask
//! blocks no query of the block sees are left out. One task makes all gradients of a head, so nothing is summed
//! across threads.

use super::layers::{LANES, REGISTER, SHARDS, shard, sum};
use super::norm::inner;
use super::simd::{Inner, Isa, LONG, Lane, Left, Op, SHORT, Simd, WIDEST, pack, pack_transposed, product};
use crate::device::{Attention, Real};
use rayon::prelude::*;
use std::ops::Range;

/// Queries whose logits are in cache at a time: a multiple of every micro-kernel's height.
const QUERIES: usize = 48;
/// Keys packed together: a multiple of the widest panel.
const KEYS: usize = 4 * WIDEST;

/// What backward reads: `qkv` `[rows, time, 3, heads, head]`, `d_out` `[rows, time, heads, head]`, `lse`
/// `[rows, heads, time]`.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a, T> {
    pub qkv: &'a [T],
    pub lse: &'a [T],
    pub d_out: &'a [T],
}

/// An attention's shape with the strides of a task's scratch.
#[derive(Clone, Copy)]
struct Plan {
    time: usize,
    heads: usize,
    head: usize,
    width: usize,
    causal: bool,
    /// Of a tile of logits.
    stride: usize,
    /// Of a matrix of `head` columns.
    padded: usize,
}

impl Plan {
    fn new(attention: &Attention) -> Plan {
        let &Attention { time, heads, head, causal } = attention;
        let (stride, padded) = (time.next_multiple_of(WIDEST), head.next_multiple_of(REGISTER));
        Plan { time, heads, head, width: attention.width(), causal, stride, padded }
    }
    /// How many keys the query at `at` sees.
    fn seen(&self, at: usize) -> usize {
        if self.causal { at + 1 } else { self.time }
    }
    /// Blocks of queries, and how many keys each meets: whole blocks of them.
    fn queries(self) -> impl Iterator<Item = (Range<usize>, usize)> {
        (0..self.time).step_by(QUERIES).map(move |start| {
            let end = (start + QUERIES).min(self.time);
            (start..end, self.seen(end - 1).next_multiple_of(KEYS).min(self.time))
        })
    }
    /// Blocks of the first `n` keys.
    fn keys(n: usize) -> impl Iterator<Item = Range<usize>> {
        (0..n).step_by(KEYS).map(move |start| start..(start + KEYS).min(n))
    }
    /// Numbers of all keys or values of a head, packed in blocks; transposed ones need as many.
    fn packed(&self) -> usize {
        self.time.next_multiple_of(KEYS) * self.padded
    }
    /// Where the block that starts at key `start` begins among packed ones.
    fn block(&self, start: usize) -> usize {
        start * self.padded
    }
    /// Numbers of a tile, and of a block of results.
    fn tile(&self) -> [usize; 2] {
        [QUERIES * self.stride, QUERIES * self.padded]
    }
    /// Parts of a forward task's scratch: keys, values, tile, result.
    fn forward(&self) -> [usize; 4] {
        let [tile, result] = self.tile();
        [self.packed(), self.packed(), tile, result]
    }
    /// Parts of a backward task's: keys transposed and as they are, values transposed, both tiles, result, packed
    /// queries and their dL/d out, dL/dk and dL/dv `[time, padded]`.
    fn backward(&self) -> [usize; 10] {
        let ([tile, result], packed) = (self.tile(), self.packed());
        let sums = self.time * self.padded;
        [packed, packed, packed, tile, tile, result, result, result, sums, sums]
    }

    /// Packs rows of `x` `[time, .]` (first numbers of its tokens `ldx` apart), as they are and transposed, in blocks.
    #[inline(always)]
    fn pack<S: Simd, T: Lane>(&self, x: &[T], ldx: usize, plain: Option<&mut [T]>, transposed: Option<&mut [T]>) {
        if let Some(plain) = plain {
            for keys in Plan::keys(self.time) {
                let to = &mut plain[self.block(keys.start)..];
                pack::<S, T>(&x[keys.start * ldx..], ldx, keys.len(), self.head, to);
            }
        }
        if let Some(transposed) = transposed {
            for keys in Plan::keys(self.time) {
                let to = &mut transposed[self.block(keys.start)..];
                pack_transposed::<S, T>(&x[keys.start * ldx..], ldx, self.head, keys.len(), to);
            }
        }
    }

    /// `tile = a B'`, `a` `[queries, head]`, B `[n, head]` packed transposed.
    #[inline(always)]
    fn against<S: Simd, T: Lane>(&self, a: Left<'_, T>, packed: &[T], n: usize, tile: &mut [T]) {
        for keys in Plan::keys(n) {
            let b = &packed[self.block(keys.start)..];
            product::<S, T, Inner, SHORT>(a, b, keys.len(), &mut tile[keys.start..], self.stride, false);
        }
    }

    /// `out = tile B`, tile `[rows, n]`, B `[n, head]` packed as it is, out `[rows, padded]`.
    #[inline(always)]
    fn gather<S: Simd, T: Lane>(&self, tile: &[T], rows: usize, packed: &[T], n: usize, out: &mut [T]) {
        for keys in Plan::keys(n) {
            let a = Left { data: &tile[keys.start..], row: self.stride, col: 1, rows, depth: keys.len() };
            let b = &packed[self.block(keys.start)..];
            product::<S, T, Inner, LONG>(a, b, self.head, out, self.padded, keys.start > 0);
        }
    }

    /// `sums += tile' B`, tile `[rows, n]`, B `[rows, head]` packed as it is, sums `[n, padded]`.
    #[inline(always)]
    fn scatter<S: Simd, T: Lane>(&self, tile: &[T], rows: usize, packed: &[T], n: usize, sums: &mut [T]) {
        let a = Left { data: tile, row: 1, col: self.stride, rows: n, depth: rows };
        product::<S, T, Inner, LONG>(a, packed, self.head, sums, self.padded, true);
    }
}

/// A scratch in its parts.
fn cut<T, const N: usize>(mut scratch: &mut [T], sizes: [usize; N]) -> [&mut [T]; N] {
    sizes.map(|size| {
        let (part, rest) = std::mem::take(&mut scratch).split_at_mut(size);
        scratch = rest;
        part
    })
}

/// Room for every task, `size` numbers each.
fn room<T: Lane>(scratch: &mut Vec<T>, rows: usize, size: usize) -> &mut [T] {
    let len = SHARDS.min(rows) * size;
    if scratch.len() < len {
        scratch.resize(len, T::ZERO);
    }
    &mut scratch[..len]
}

/// `1/sqrt(head)`.
fn scale<T: Real>(head: usize) -> T {
    T::from_f64((head as f64).sqrt().recip())
}

pub(super) fn attention<T: Lane>(
    isa: Isa,
    attention: &Attention,
    rows: usize,
    qkv: &[T],
    out: &mut [T],
    lse: &mut [T],
    scratch: &mut Vec<T>,
) {
    let (sample, logits) = (attention.time * attention.width(), attention.heads * attention.time);
    assert!(
        qkv.len() == 3 * rows * sample && out.len() == rows * sample && lse.len() == rows * logits,
        "operands of the attention do not fit its shape"
    );
    let (plan, shard) = (Plan::new(attention), shard(rows));
    let size = plan.forward().iter().sum();
    out.par_chunks_mut(shard * sample)
        .zip(lse.par_chunks_mut(shard * logits))
        .zip(qkv.par_chunks(3 * shard * sample))
        .zip(room(scratch, rows, size).par_chunks_mut(size))
        .for_each(|(((out, lse), qkv), scratch)| isa.run(Forward { plan, qkv, out, lse, scratch }));
}

/// [`attention`] of a shard.
struct Forward<'a, T> {
    plan: Plan,
    qkv: &'a [T],
    out: &'a mut [T],
    lse: &'a mut [T],
    scratch: &'a mut [T],
}

impl<T: Lane> Op for Forward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Forward { plan, qkv, out, lse, scratch } = self;
        let Plan { time, heads, head, width, .. } = plan;
        let (ld, scale) = (3 * width, scale(head));
        let [keys, values, tile, result] = cut(scratch, plan.forward());
        let samples = out.chunks_mut(time * width).zip(lse.chunks_mut(heads * time));
        for ((out, lse), qkv) in samples.zip(qkv.chunks(time * ld)) {
            for (h, lse) in lse.chunks_mut(time).enumerate() {
                let q = &qkv[h * head..];
                plan.pack::<S, T>(&q[width..], ld, None, Some(keys));
                plan.pack::<S, T>(&q[2 * width..], ld, Some(values), None);
                for (block, n) in plan.queries() {
                    let queries =
                        Left { data: &q[block.start * ld..], row: ld, col: 1, rows: block.len(), depth: head };
                    plan.against::<S, T>(queries, keys, n, tile);
                    for (tile, at) in tile.chunks_mut(plan.stride).zip(block.clone()) {
                        let (seen, unseen) = tile[..n].split_at_mut(plan.seen(at));
                        lse[at] = softmax(seen, scale);
                        unseen.fill(T::ZERO);
                    }
                    plan.gather::<S, T>(tile, block.len(), values, n, result);
                    for (result, at) in result.chunks(plan.padded).zip(block) {
                        out[at * width + h * head..][..head].copy_from_slice(&result[..head]);
                    }
                }
            }
        }
    }
}

/// Overwrites a row of products with the softmax of `scale` times them, and returns the log-sum-exp.
#[inline(always)]
fn softmax<T: Real>(row: &mut [T], scale: T) -> T {
    let mut lanes = [row[0]; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for l in 0..LANES {
            lanes[l] = if chunk[l] > lanes[l] { chunk[l] } else { lanes[l] };
        }
    }
    let max = lanes.iter().chain(rest).fold(row[0], |a, &b| if b > a { b } else { a }) * scale;
    for x in row.iter_mut() {
        *x = exponential(*x * scale - max);
    }
    let sum = sum(row);
    let share = T::from_f64(sum.recip());
    for x in row {
        *x = *x * share;
    }
    max + T::from_f64(sum.ln())
}

/// `e^x`, NaN where `x` is no finite number: the f32 exponential is finite everywhere, and would hide an overflow.
#[inline(always)]
fn exponential<T: Real>(x: T) -> T {
    x.exp() + T::ZERO * x
}

pub(super) fn attention_backward<T: Lane>(
    isa: Isa,
    attention: &Attention,
    rows: usize,
    saved: Saved<'_, T>,
    d_qkv: &mut [T],
    scratch: &mut Vec<T>,
) {
    let (sample, logits) = (attention.time * attention.width(), attention.heads * attention.time);
    let Saved { qkv, lse, d_out } = saved;
    assert!(
        qkv.len() == 3 * rows * sample && d_qkv.len() == qkv.len() && lse.len() == rows * logits,
        "operands of the attention do not fit its shape"
    );
    assert!(d_out.len() == rows * sample, "operands of the attention do not fit its shape");
    let (plan, shard) = (Plan::new(attention), shard(rows));
    let size = plan.backward().iter().sum();
    d_qkv
        .par_chunks_mut(3 * shard * sample)
        .zip(qkv.par_chunks(3 * shard * sample))
        .zip(d_out.par_chunks(shard * sample))
        .zip(lse.par_chunks(shard * logits))
        .zip(room(scratch, rows, size).par_chunks_mut(size))
        .for_each(|((((d_qkv, qkv), d_out), lse), scratch)| {
            isa.run(Backward { plan, saved: Saved { qkv, lse, d_out }, d_qkv, scratch });
        });
}

/// [`attention_backward`] of a shard.
struct Backward<'a, T> {
    plan: Plan,
    saved: Saved<'a, T>,
    d_qkv: &'a mut [T],
    scratch: &'a mut [T],
}

impl<T: Lane> Op for Backward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Backward { plan, saved: Saved { qkv, lse, d_out }, d_qkv, scratch } = self;
        let Plan { time, heads, head, width, stride, padded, .. } = plan;
        let (ld, scale) = (3 * width, scale(head));
        let [keys_t, keys, values_t, p, ds, dq, queries, pulls, dk, dv] = cut(scratch, plan.backward());
        let samples = qkv.chunks(time * ld).zip(d_out.chunks(time * width));
        let results = d_qkv.chunks_mut(time * ld).zip(lse.chunks(heads * time));
        for ((d_qkv, lse), (qkv, d_out)) in results.zip(samples) {
            for h in 0..heads {
                let (q, d_out) = (&qkv[h * head..], &d_out[h * head..]);
                let lse = &lse[h * time..][..time];
                plan.pack::<S, T>(&q[width..], ld, Some(keys), Some(keys_t));
                plan.pack::<S, T>(&q[2 * width..], ld, None, Some(values_t));
                dk.fill(T::ZERO);
                dv.fill(T::ZERO);
                for (block, n) in plan.queries() {
                    let rows = block.len();
                    let (q, d_out) = (&q[block.start * ld..], &d_out[block.start * width..]);
                    plan.against::<S, T>(Left { data: q, row: ld, col: 1, rows, depth: head }, keys_t, n, p);
                    plan.against::<S, T>(Left { data: d_out, row: width, col: 1, rows, depth: head }, values_t, n, ds);
                    for ((p, ds), at) in p.chunks_mut(stride).zip(ds.chunks_mut(stride)).zip(block.clone()) {
                        let seen = plan.seen(at);
                        let (seen_p, seen_ds) = (&mut p[..seen], &mut ds[..seen]);
                        seen_p.iter_mut().for_each(|p| *p = exponential(*p * scale - lse[at]));
                        // Of these very numbers, so that nothing is left where one key has all the weight.
                        let delta = T::from_f64(inner(seen_p, seen_ds));
                        for (p, ds) in seen_p.iter().zip(seen_ds) {
                            *ds = *p * (*ds - delta) * scale;
                        }
                        p[seen..n].fill(T::ZERO);
                        ds[seen..n].fill(T::ZERO);
                    }
                    pack::<S, T>(q, ld, rows, head, queries);
                    pack::<S, T>(d_out, width, rows, head, pulls);
                    plan.scatter::<S, T>(ds, rows, queries, n, dk);
                    plan.scatter::<S, T>(p, rows, pulls, n, dv);
                    plan.gather::<S, T>(ds, rows, keys, n, dq);
                    for (dq, at) in dq.chunks(padded).zip(block) {
                        d_qkv[at * ld + h * head..][..head].copy_from_slice(&dq[..head]);
                    }
                }
                for (at, (dk, dv)) in dk.chunks(padded).zip(dv.chunks(padded)).enumerate() {
                    d_qkv[at * ld + width + h * head..][..head].copy_from_slice(&dk[..head]);
                    d_qkv[at * ld + 2 * width + h * head..][..head].copy_from_slice(&dv[..head]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    /// The definition, a query at a time: out `[rows, time, heads, head]`, lse `[rows, heads, time]`, and
    /// dL/dqkv where dL/d out is `d_out`, from the whole Jacobian of the softmax.
    fn naive(a: &Attention, rows: usize, qkv: &[f64], d_out: &[f64]) -> [Vec<f64>; 3] {
        let (width, root) = (a.width(), (a.head as f64).sqrt());
        let (mut out, mut lse) = (vec![0.0; rows * a.time * width], vec![0.0; rows * a.heads * a.time]);
        let mut d_qkv = vec![0.0; qkv.len()];
        for (row, h, i) in
            (0..rows * a.heads * a.time).map(|n| (n / a.time / a.heads, n / a.time % a.heads, n % a.time))
        {
            // Where token t's query, key or value (0, 1, 2) begins.
            let at = |t: usize, which: usize| ((row * a.time + t) * 3 + which) * width + h * a.head;
            let to = (row * a.time + i) * width + h * a.head;
            let keys = if a.causal { i + 1 } else { a.time };
            let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).take(a.head).map(|(x, y)| x * y).sum::<f64>();
            let s: Vec<f64> = (0..keys).map(|j| dot(&qkv[at(i, 0)..], &qkv[at(j, 1)..]) / root).collect();
            let max = s.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = s.iter().map(|s| (s - max).exp()).sum();
            lse[(row * a.heads + h) * a.time + i] = max + sum.ln();
            let p: Vec<f64> = s.iter().map(|s| (s - max).exp() / sum).collect();
            let dp: Vec<f64> = (0..keys).map(|j| dot(&d_out[to..], &qkv[at(j, 2)..])).collect();
            for j in 0..keys {
                let ds: f64 = (0..keys).map(|l| dp[l] * p[l] * (f64::from(u8::from(l == j)) - p[j])).sum();
                for k in 0..a.head {
                    out[to + k] += p[j] * qkv[at(j, 2) + k];
                    d_qkv[at(i, 0) + k] += ds * qkv[at(j, 1) + k] / root;
                    d_qkv[at(j, 1) + k] += ds * qkv[at(i, 0) + k] / root;
                    d_qkv[at(j, 2) + k] += p[j] * d_out[to + k];
                }
            }
        }
        [out, lse, d_qkv]
    }

    // One token; primes; several blocks of queries and of keys; heads narrower and wider than a register; logits from
    // 1e-2 to 1e4, where a softmax without its maximum overflows. Tolerance: the rounding of a logit.
    #[test]
    fn attention_and_its_backward_are_their_definition() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        for (rows, time, heads, head, size) in [
            (1, 1, 1, 1, 1.0),
            (3, 1, 2, 5, 100.0),
            (2, 7, 3, 5, 0.1),
            (67, 13, 1, 3, 1.0),
            (1, 131, 2, 17, 30.0),
            (2, 300, 1, 33, 1.0),
        ] {
            for causal in [false, true] {
                let shape = Attention { time, heads, head, causal };
                let n = rows * time * shape.width();
                let mut random =
                    |n: usize, size: f64| -> Vec<f64> { (0..n).map(|_| size * rng.random_range(-1.0..1.0)).collect() };
                let (qkv, d_out) = (random(3 * n, size), random(n, 1.0));
                let want = naive(&shape, rows, &qkv, &d_out);
                for isa in Isa::available() {
                    let [mut out, mut lse, mut d_qkv] = want.clone().map(|w| vec![f64::NAN; w.len()]);
                    let mut scratch = vec![f64::NAN; 7];
                    attention(isa, &shape, rows, &qkv, &mut out, &mut lse, &mut scratch);
                    scratch.fill(f64::NAN);
                    let saved = Saved { qkv: &qkv, lse: &lse, d_out: &d_out };
                    attention_backward(isa, &shape, rows, saved, &mut d_qkv, &mut scratch);
                    let off = |got: &[f64], want: &[f64]| {
                        let offs = got.iter().zip(want).map(|(g, w)| (g - w).abs());
                        offs.fold(0.0, |most: f64, off| if off.is_nan() { f64::INFINITY } else { most.max(off) })
                    };
                    // Whatever one key has all the weight of has no gradient in queries and keys.
                    let width = shape.width();
                    let of_values = |at: usize| at % (3 * width) >= 2 * width;
                    assert!(time > 1 || d_qkv.iter().enumerate().all(|(at, &d)| of_values(at) || d == 0.0));
                    let logit = 10.0 + size * size * (head as f64).sqrt();
                    let off =
                        [off(&lse, &want[1]), off(&out, &want[0]) / size, off(&d_qkv, &want[2]) / (10.0 + size * size)];
                    assert!(off.iter().all(|off| *off <= 1e-14 * logit), "{shape:?} {}: {off:?}", isa.name());
                }
            }
        }
    }

    // The f32 exponential is finite everywhere: without care an overflowing logit would look like a large one.
    #[test]
    fn an_overflow_is_not_hidden() {
        let shape = Attention { time: 2, heads: 1, head: 1, causal: false };
        let qkv = [1e30f32, 1e30, 1.0, 1.0, 1.0, 1.0];
        let (mut out, mut lse) = ([0.0; 2], [0.0; 2]);
        attention(Isa::best(), &shape, 1, &qkv, &mut out, &mut lse, &mut Vec::new());
        assert!(out[0].is_nan() && lse[0].is_nan());
        assert_eq!(out[1], 1.0);
    }
}
