//! Layer normalisation: rows in parallel, and for the gradients of gain and bias columns in parallel.
//!
//! With `z = (x - mean) rstd` and `g = d_out gain`, a row's backward is
//! `dx = rstd (g - mean(g) - z mean(g z))`; over rows, `d_gain = sum d_out z` and `d_bias = sum d_out`.

use super::layers::{GRAIN, LANES, sum};
use super::simd::{Isa, Lane, Op, Simd};
use crate::device::{Norm, Real};
use crate::objective::Write;
use rayon::prelude::*;

/// Columns whose sums over rows a task owns.
const COLUMNS: usize = 4 * LANES;

/// What backward reads besides `d_out`: `x` with rows `stride` apart, `affine` `[2, width]`, `stats` `[rows, 2]`.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a, T> {
    pub x: &'a [T],
    pub affine: &'a [T],
    pub stats: &'a [T],
}

/// Rows a task works through.
fn grain(norm: &Norm) -> usize {
    (GRAIN / norm.width).max(1)
}

pub(super) fn layer_norm<T: Lane>(
    isa: Isa,
    norm: &Norm,
    rows: usize,
    x: &[T],
    affine: &[T],
    out: &mut [T],
    stats: &mut [T],
) {
    let &Norm { width, stride } = norm;
    assert!(
        x.len() == norm.input_len(rows) && affine.len() == 2 * width,
        "operands of the normalisation do not fit its shape"
    );
    assert!(out.len() == rows * width && stats.len() == 2 * rows, "results of the normalisation do not fit its shape");
    let grain = grain(norm);
    out.par_chunks_mut(grain * width)
        .zip(stats.par_chunks_mut(grain * 2))
        .zip(x.par_chunks(grain * stride))
        .for_each(|((out, stats), x)| isa.run(Forward { norm, x, affine, out, stats }));
}

/// [`layer_norm`] of a task's rows.
struct Forward<'a, T> {
    norm: &'a Norm,
    x: &'a [T],
    affine: &'a [T],
    out: &'a mut [T],
    stats: &'a mut [T],
}

impl<T: Lane> Op for Forward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Forward { norm: &Norm { width, stride }, x, affine, out, stats } = self;
        let (gain, bias) = affine.split_at(width);
        let rows = x.chunks(stride).zip(stats.as_chunks_mut::<2>().0);
        for (out, (x, stats)) in out.chunks_mut(width).zip(rows) {
            let x = &x[..width];
            let mean = T::from_f64(sum(x) / width as f64);
            // Centred first: squares of a large mean would drown the deviation.
            for (out, &x) in out.iter_mut().zip(x) {
                *out = x - mean;
            }
            let variance = inner(out, out) / width as f64;
            let rstd = T::from_f64((variance + Norm::EPS).sqrt().recip());
            for ((out, &gain), &bias) in out.iter_mut().zip(gain).zip(bias) {
                *out = gain * (*out * rstd) + bias;
            }
            *stats = [mean, rstd];
        }
    }
}

/// The inner product, by lanes.
#[inline(always)]
pub(super) fn inner<T: Real>(a: &[T], b: &[T]) -> f64 {
    let mut sums = [T::ZERO; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            sums[l] += a[l] * b[l];
        }
    }
    let mut total: f64 = sums.iter().map(|s| s.to_f64()).sum();
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        total += (a * b).to_f64();
    }
    total
}

pub(super) fn layer_norm_backward<T: Lane>(
    isa: Isa,
    norm: &Norm,
    rows: usize,
    saved: Saved<'_, T>,
    d_out: &[T],
    dx: Write<&mut [T]>,
    d_affine: Write<&mut [T]>,
) {
    let &Norm { width, stride } = norm;
    let (dx, add) = dx.split();
    let Saved { x, affine, stats } = saved;
    assert!(
        x.len() == norm.input_len(rows) && dx.len() == x.len() && d_out.len() == rows * width,
        "operands of the normalisation do not fit its shape"
    );
    let grain = grain(norm);
    dx.par_chunks_mut(grain * stride)
        .zip(x.par_chunks(grain * stride))
        .zip(stats.par_chunks(grain * 2))
        .zip(d_out.par_chunks(grain * width))
        .for_each(|(((dx, x), stats), d_out)| {
            isa.run(Backward { norm, saved: Saved { x, affine, stats }, d_out, dx, add });
        });

    let (d_affine, add) = d_affine.split();
    let (d_gain, d_bias) = d_affine.split_at_mut(width);
    d_gain.par_chunks_mut(COLUMNS).zip(d_bias.par_chunks_mut(COLUMNS)).enumerate().for_each(
        |(task, (d_gain, d_bias))| {
            isa.run(Columns { norm, saved, d_out, first: task * COLUMNS, d_gain, d_bias, add });
        },
    );
}

/// dL/dx of a task's rows.
struct Backward<'a, T> {
    norm: &'a Norm,
    saved: Saved<'a, T>,
    d_out: &'a [T],
    dx: &'a mut [T],
    add: bool,
}

impl<T: Lane> Op for Backward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Backward { norm: &Norm { width, stride }, saved: Saved { x, affine, stats }, d_out, dx, add } = self;
        let gain = &affine[..width];
        let rows = x.chunks(stride).zip(stats.as_chunks::<2>().0).zip(d_out.chunks(width));
        for (dx, ((x, &[mean, rstd]), d_out)) in dx.chunks_mut(stride).zip(rows) {
            let (x, dx) = (&x[..width], &mut dx[..width]);
            let (mut sums, mut products) = ([T::ZERO; LANES], [T::ZERO; LANES]);
            let chunks = x.chunks(LANES).zip(gain.chunks(LANES)).zip(d_out.chunks(LANES));
            for ((x, gain), d) in chunks {
                for l in 0..x.len() {
                    let g = d[l] * gain[l];
                    sums[l] += g;
                    products[l] += g * ((x[l] - mean) * rstd);
                }
            }
            let mean_g = T::from_f64(sum(&sums) / width as f64);
            let mean_gz = T::from_f64(sum(&products) / width as f64);
            for (((dx, &x), &gain), &d) in dx.iter_mut().zip(x).zip(gain).zip(d_out) {
                let z = (x - mean) * rstd;
                let value = rstd * (d * gain - mean_g - z * mean_gz);
                *dx = if add { *dx + value } else { value };
            }
        }
    }
}

/// dL/d gain and dL/d bias of the columns from `first` on: all rows in order, so that sums do not depend on the
/// number of threads.
struct Columns<'a, T> {
    norm: &'a Norm,
    saved: Saved<'a, T>,
    d_out: &'a [T],
    first: usize,
    d_gain: &'a mut [T],
    d_bias: &'a mut [T],
    add: bool,
}

impl<T: Lane> Op for Columns<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Columns { norm: &Norm { width, stride }, saved: Saved { x, stats, .. }, d_out, first, d_gain, d_bias, add } =
            self;
        let n = d_gain.len();
        let (mut gains, mut biases) = ([0.0f64; COLUMNS], [0.0f64; COLUMNS]);
        let rows = x.chunks(stride).zip(stats.as_chunks::<2>().0).zip(d_out.chunks(width));
        for ((x, &[mean, rstd]), d_out) in rows {
            let (x, d_out) = (&x[first..first + n], &d_out[first..first + n]);
            for (((gain, bias), &x), &d) in gains.iter_mut().zip(&mut biases).zip(x).zip(d_out) {
                *gain += (d * ((x - mean) * rstd)).to_f64();
                *bias += d.to_f64();
            }
        }
        for (d, sum) in d_gain.iter_mut().zip(gains).chain(d_bias.iter_mut().zip(biases)) {
            let sum = T::from_f64(sum);
            *d = if add { *d + sum } else { sum };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    // Widths on both sides of a register and of a task's columns, single numbers, rows apart, a mean a million times
    // the deviation. The definition is two plain sums. Tolerance: rounding of that mean, 1e-16 of it.
    #[test]
    fn layer_norm_is_its_definition() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for (rows, width, stride, shift) in [
            (1, 1, 1, 0.0),
            (3, 7, 7, 0.0),
            (67, 37, 37, 1e6),
            (5, 64, 64, -3.0),
            (4, 13, 65, 0.5),
            (2, 1000, 3000, 0.0),
        ] {
            let norm = Norm { width, stride };
            let mut random =
                |n: usize, shift: f64| -> Vec<f64> { (0..n).map(|_| shift + rng.random_range(-1.0..1.0)).collect() };
            let (x, affine) = (random(norm.input_len(rows), shift), random(2 * width, 0.0));
            for isa in Isa::available() {
                let (mut out, mut stats) = (vec![f64::NAN; rows * width], vec![f64::NAN; 2 * rows]);
                layer_norm(isa, &norm, rows, &x, &affine, &mut out, &mut stats);
                for i in 0..rows {
                    let x = &x[i * stride..][..width];
                    let mean = x.iter().sum::<f64>() / width as f64;
                    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
                    let rstd = 1.0 / (variance + 1e-5).sqrt();
                    assert!((stats[2 * i] - mean).abs() <= 1e-14 * (1.0 + shift.abs()));
                    assert!((stats[2 * i + 1] / rstd - 1.0).abs() <= 1e-12);
                    for k in 0..width {
                        let want = affine[k] * (x[k] - mean) * rstd + affine[width + k];
                        let off = (out[i * width + k] - want).abs();
                        assert!(off <= 1e-13 * (10.0 + shift.abs()), "{norm:?} {} row {i}: {off:e}", isa.name());
                    }
                }
            }
        }
    }
}
