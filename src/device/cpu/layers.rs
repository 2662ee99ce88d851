//! The verbs of encoders and optimisers on slices.
//!
//! Every result is the same bit for bit for any number of threads: outputs are split into parts that no other
//! part touches, and where samples are summed the batch is cut into [`SHARDS`] fixed shards whose partial sums are
//! added in order.
//!
//! Convolutions are matrix products, a block of output rows of one sample at a time, so that the block stays in
//! cache: with `col` `[patch, pixels]` the patches under the block's pixels,
//!
//! ```text
//! out'      [pixels, outputs]  = col' weight',          weight [outputs, patch]
//! d_col     [patch, pixels]    = weight' d_out,  added back to the pixels each patch came from
//! d_weight' [patch, outputs]  += col d_out'
//! ```

use super::simd::{Inner, Isa, LONG, Lane, Left, Op, Simd, WIDEST, pack, pack_transposed, packed_len, product};
use crate::device::{Activation, AdamStep, Conv, Pool, Pooling, Real};
use crate::objective::Write;
use kernels::law::ERFC;
use rayon::prelude::*;
use std::ops::Range;

/// Into how many parts a sum over samples is cut, whatever the number of threads.
pub(super) const SHARDS: usize = 64;
/// Numbers an elementwise task works through.
pub(super) const GRAIN: usize = 1 << 14;
/// Numbers of the patches of a block of output rows, about: with its packed copy, a part of a second-level cache.
const BLOCK: usize = 1 << 15;
/// Numbers of the widest register.
pub(super) const REGISTER: usize = WIDEST / 2;
/// Numbers summed side by side.
pub(super) const LANES: usize = 8;

/// How a convolution is cut up, and a shard's scratch.
#[derive(Clone, Copy)]
struct Blocks {
    /// Output rows in a block.
    rows: usize,
    /// Pixels of a block with room for whole registers: the row stride of `col`.
    stride: usize,
    /// Output channels with room for whole registers: the row stride of results by output channel.
    outputs: usize,
    /// Numbers of a strip; of `col`; of a packed operand; of a product's result.
    scratch: [usize; 4],
}

impl Blocks {
    fn new(conv: &Conv) -> Self {
        let (patch, width) = (conv.patch(), conv.out_width());
        let rows = (BLOCK / (patch * width)).clamp(1, conv.out_height());
        let pixels = rows * width;
        let (stride, outputs) = (pixels.next_multiple_of(REGISTER), conv.outputs.next_multiple_of(REGISTER));
        let packed = packed_len(conv.outputs, pixels).max(packed_len(patch.max(pixels), conv.outputs));
        let strip = (rows + conv.kernel - 1) * width;
        let result = patch.max(pixels) * outputs;
        Blocks { rows, stride, outputs, scratch: [strip, patch * stride, packed, result] }
    }
    /// Every block as its output rows.
    fn iter(self, conv: &Conv) -> impl Iterator<Item = Range<usize>> {
        let height = conv.out_height();
        (0..height).step_by(self.rows).map(move |start| start..(start + self.rows).min(height))
    }
    /// Numbers of scratch of one shard.
    fn shard(self) -> usize {
        self.scratch.iter().sum()
    }
    /// A shard's scratch in its parts.
    fn split<T>(self, scratch: &mut [T]) -> [&mut [T]; 4] {
        let (strip, rest) = scratch.split_at_mut(self.scratch[0]);
        let (col, rest) = rest.split_at_mut(self.scratch[1]);
        let (packed, result) = rest.split_at_mut(self.scratch[2]);
        [strip, col, packed, result]
    }
}

/// Samples in a shard.
pub(super) fn shard(rows: usize) -> usize {
    rows.div_ceil(SHARDS).max(1)
}

pub(super) fn conv_scratch(conv: &Conv, rows: usize) -> usize {
    SHARDS.min(rows) * Blocks::new(conv).shard()
}

/// Visits the lines of a strip: the image rows under a block of output rows (`block` and `kernel - 1` more), as the
/// `kx`-th column of the kernel sees them, `[lines, out_width]`. `visit(pixels of the strip, Some(first number in the
/// channel's image))`, with `None` where padding is.
#[inline(always)]
fn lines(conv: &Conv, block: &Range<usize>, kx: usize, mut visit: impl FnMut(Range<usize>, Option<usize>)) {
    let Conv { height, width, kernel, padding, .. } = *conv;
    let out_width = conv.out_width();
    // Output column `o` reads image column `o + kx - padding`.
    let low = padding.saturating_sub(kx).min(out_width);
    let high = (width + padding).saturating_sub(kx).clamp(low, out_width);
    for (line, y) in (block.start..block.end + kernel - 1).enumerate() {
        let at = line * out_width;
        if y < padding || y >= height + padding || low == high {
            visit(at..at + out_width, None);
        } else {
            visit(at..at + low, None);
            visit(at + low..at + high, Some((y - padding) * width + low + kx - padding));
            visit(at + high..at + out_width, None);
        }
    }
}

/// Gathers the patches of a block of output rows of one sample into `col`. The rows of `col` for one channel and
/// kernel column are one strip, an output row apart.
#[inline(always)]
fn gather<T: Real>(conv: &Conv, block: Range<usize>, x: &[T], strip: &mut [T], col: &mut [T], stride: usize) {
    let (kernel, width) = (conv.kernel, conv.out_width());
    let n = block.len() * width;
    for (x, col) in x.chunks(conv.height * conv.width).zip(col.chunks_mut(kernel * kernel * stride)) {
        for kx in 0..kernel {
            lines(conv, &block, kx, |at, from| match from {
                Some(from) => strip[at.clone()].copy_from_slice(&x[from..][..at.len()]),
                None => strip[at].fill(T::ZERO),
            });
            for ky in 0..kernel {
                col[(ky * kernel + kx) * stride..][..n].copy_from_slice(&strip[ky * width..][..n]);
            }
        }
    }
}

/// Adds `col` back to the pixels it was gathered from.
#[inline(always)]
fn scatter<T: Real>(conv: &Conv, block: Range<usize>, col: &[T], strip: &mut [T], dx: &mut [T], stride: usize) {
    let (kernel, width) = (conv.kernel, conv.out_width());
    let n = block.len() * width;
    for (dx, col) in dx.chunks_mut(conv.height * conv.width).zip(col.chunks(kernel * kernel * stride)) {
        for kx in 0..kernel {
            strip.fill(T::ZERO);
            for ky in 0..kernel {
                add(&mut strip[ky * width..][..n], &col[(ky * kernel + kx) * stride..]);
            }
            lines(conv, &block, kx, |at, to| {
                if let Some(to) = to {
                    add(&mut dx[to..][..at.len()], &strip[at]);
                }
            });
        }
    }
}

/// `to += from`, as far as `to` goes.
#[inline(always)]
fn add<T: Real>(to: &mut [T], from: &[T]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

pub(super) fn conv<T: Lane>(
    isa: Isa,
    conv: &Conv,
    rows: usize,
    x: &[T],
    weight: &[T],
    out: &mut [T],
    scratch: &mut [T],
) {
    let shard = shard(rows);
    out.par_chunks_mut(shard * conv.output_len())
        .zip(x.par_chunks(shard * conv.input_len()))
        .zip(scratch.par_chunks_mut(Blocks::new(conv).shard()))
        .for_each(|((out, x), scratch)| isa.run(Forward { conv, x, weight, out, scratch }));
}

/// [`conv`] of a shard.
struct Forward<'a, T> {
    conv: &'a Conv,
    x: &'a [T],
    weight: &'a [T],
    out: &'a mut [T],
    scratch: &'a mut [T],
}

impl<T: Lane> Op for Forward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Forward { conv, x, weight, out, scratch } = self;
        let blocks = Blocks::new(conv);
        let (width, pixels, depth) = (conv.out_width(), conv.out_height() * conv.out_width(), conv.patch());
        let [strip, col, packed, result] = blocks.split(scratch);
        pack_transposed::<S, T>(weight, depth, depth, conv.outputs, packed);
        for (out, x) in out.chunks_mut(conv.output_len()).zip(x.chunks(conv.input_len())) {
            for block in blocks.iter(conv) {
                let (at, n) = (block.start * width, block.len() * width);
                gather(conv, block, x, strip, col, blocks.stride);
                let col = Left { data: col, row: 1, col: blocks.stride, rows: n, depth };
                product::<S, T, Inner, LONG>(col, packed, conv.outputs, result, blocks.outputs, false);
                for (o, out) in out.chunks_mut(pixels).enumerate() {
                    for (out, result) in out[at..at + n].iter_mut().zip(result.chunks(blocks.outputs)) {
                        *out = result[o];
                    }
                }
            }
        }
    }
}

pub(super) fn conv_backward_data<T: Lane>(
    isa: Isa,
    conv: &Conv,
    rows: usize,
    weight: &[T],
    d_out: &[T],
    dx: &mut [T],
    scratch: &mut [T],
) {
    let shard = shard(rows);
    dx.par_chunks_mut(shard * conv.input_len())
        .zip(d_out.par_chunks(shard * conv.output_len()))
        .zip(scratch.par_chunks_mut(Blocks::new(conv).shard()))
        .for_each(|((dx, d_out), scratch)| isa.run(BackwardData { conv, weight, d_out, dx, scratch }));
}

/// [`conv_backward_data`] of a shard.
struct BackwardData<'a, T> {
    conv: &'a Conv,
    weight: &'a [T],
    d_out: &'a [T],
    dx: &'a mut [T],
    scratch: &'a mut [T],
}

impl<T: Lane> Op for BackwardData<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let BackwardData { conv, weight, d_out, dx, scratch } = self;
        let blocks = Blocks::new(conv);
        let (width, pixels, depth) = (conv.out_width(), conv.out_height() * conv.out_width(), conv.outputs);
        let [strip, d_col, packed, _] = blocks.split(scratch);
        for (dx, d_out) in dx.chunks_mut(conv.input_len()).zip(d_out.chunks(conv.output_len())) {
            dx.fill(T::ZERO);
            for block in blocks.iter(conv) {
                let n = block.len() * width;
                pack::<S, T>(&d_out[block.start * width..], pixels, depth, n, packed);
                let weight = Left { data: weight, row: 1, col: conv.patch(), rows: conv.patch(), depth };
                product::<S, T, Inner, LONG>(weight, packed, n, d_col, blocks.stride, false);
                scatter(conv, block, d_col, strip, dx, blocks.stride);
            }
        }
    }
}

pub(super) fn conv_backward_weight<T: Lane>(
    isa: Isa,
    conv: &Conv,
    rows: usize,
    x: &[T],
    d_out: &[T],
    d_weight: Write<&mut [T]>,
    scratch: &mut [T],
) {
    let (blocks, shard) = (Blocks::new(conv), shard(rows));
    x.par_chunks(shard * conv.input_len())
        .zip(d_out.par_chunks(shard * conv.output_len()))
        .zip(scratch.par_chunks_mut(blocks.shard()))
        .for_each(|((x, d_out), scratch)| isa.run(BackwardWeight { conv, x, d_out, scratch }));
    let (d_weight, keep) = match d_weight {
        Write::Set(d) => (d, false),
        Write::Add(d) => (d, true),
    };
    if !keep {
        d_weight.fill(T::ZERO);
    }
    let mut sums = scratch.chunks_mut(blocks.shard()).take(rows.div_ceil(shard)).map(|scratch| {
        let [.., sum] = blocks.split(scratch);
        &mut sum[..conv.patch() * blocks.outputs]
    });
    let Some(total) = sums.next() else { return };
    for sum in sums {
        add(total, sum);
    }
    for (o, d_weight) in d_weight.chunks_mut(conv.patch()).enumerate() {
        for (d, total) in d_weight.iter_mut().zip(total.chunks(blocks.outputs)) {
            *d += total[o];
        }
    }
}

/// [`conv_backward_weight`] of a shard: leaves its transposed gradient `[patch, outputs]` in the scratch's last part.
struct BackwardWeight<'a, T> {
    conv: &'a Conv,
    x: &'a [T],
    d_out: &'a [T],
    scratch: &'a mut [T],
}

impl<T: Lane> Op for BackwardWeight<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let BackwardWeight { conv, x, d_out, scratch } = self;
        let blocks = Blocks::new(conv);
        let (width, pixels) = (conv.out_width(), conv.out_height() * conv.out_width());
        let [strip, col, packed, sum] = blocks.split(scratch);
        let sum = &mut sum[..conv.patch() * blocks.outputs];
        sum.fill(T::ZERO);
        for (x, d_out) in x.chunks(conv.input_len()).zip(d_out.chunks(conv.output_len())) {
            for block in blocks.iter(conv) {
                let (at, n) = (block.start * width, block.len() * width);
                gather(conv, block, x, strip, col, blocks.stride);
                pack_transposed::<S, T>(&d_out[at..], pixels, n, conv.outputs, packed);
                let col = Left { data: col, row: blocks.stride, col: 1, rows: conv.patch(), depth: n };
                product::<S, T, Inner, LONG>(col, packed, conv.outputs, sum, blocks.outputs, true);
            }
        }
    }
}

/// An elementwise loop, compiled for the instruction set it runs on.
struct Each<F>(F);

impl<F: FnOnce()> Op for Each<F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        (self.0)();
    }
}

pub(super) fn bias_activation<T: Real>(
    isa: Isa,
    shape: [usize; 3],
    activation: Activation,
    bias: Option<&[T]>,
    pre: &mut [T],
    out: Option<&mut [T]>,
) {
    match activation {
        Activation::None => biased_map(isa, shape, bias, pre, out, |x| x),
        // Written so that NaN stays NaN.
        Activation::Relu => biased_map(isa, shape, bias, pre, out, |x| if x < T::ZERO { T::ZERO } else { x }),
        Activation::Gelu => biased_map(isa, shape, bias, pre, out, |x| x * normal(x).0),
    }
}

/// `pre += bias`, then `out` (or `pre`) `= f(pre)`.
fn biased_map<T: Real>(
    isa: Isa,
    [_, channels, pixels]: [usize; 3],
    bias: Option<&[T]>,
    pre: &mut [T],
    out: Option<&mut [T]>,
    f: impl Fn(T) -> T + Sync,
) {
    let row = channels * pixels;
    let grain = (GRAIN / row).max(1) * row;
    let add_bias = |pre: &mut [T]| match bias {
        None => {}
        Some(bias) if pixels == 1 => {
            for pre in pre.chunks_mut(row) {
                for (x, &b) in pre.iter_mut().zip(bias) {
                    *x += b;
                }
            }
        }
        Some(bias) => {
            for (pre, &b) in pre.chunks_mut(pixels).zip(bias.iter().cycle()) {
                for x in pre {
                    *x += b;
                }
            }
        }
    };
    match out {
        Some(out) => out.par_chunks_mut(grain).zip(pre.par_chunks_mut(grain)).for_each(|(out, pre)| {
            isa.run(Each(|| {
                add_bias(pre);
                for (out, &x) in out.iter_mut().zip(&*pre) {
                    *out = f(x);
                }
            }));
        }),
        None => pre.par_chunks_mut(grain).for_each(|pre| {
            isa.run(Each(|| {
                add_bias(pre);
                for x in pre {
                    *x = f(*x);
                }
            }));
        }),
    }
}

pub(super) fn bias_activation_backward<T: Real>(
    isa: Isa,
    [rows, channels, pixels]: [usize; 3],
    activation: Activation,
    saved: &[T],
    d: &mut [T],
    d_bias: Option<Write<&mut [T]>>,
) {
    match activation {
        Activation::None => {}
        Activation::Relu => zip_map(isa, saved, d, |x, d| if x <= T::ZERO { T::ZERO } else { d }),
        Activation::Gelu => zip_map(isa, saved, d, |x, d| {
            let (cdf, density) = normal(x);
            d * (cdf + x * density)
        }),
    }
    let (d_bias, add) = match d_bias {
        None => return,
        Some(Write::Set(d)) => (d, false),
        Some(Write::Add(d)) => (d, true),
    };
    // Tasks own channels and walk all rows in order: sums do not depend on the number of threads.
    let channels_a_task = if pixels == 1 { 4 * LANES } else { 1 };
    d_bias.par_chunks_mut(channels_a_task).enumerate().for_each(|(task, d_bias)| {
        let mut sums = [0.0f64; 4 * LANES];
        let sums = &mut sums[..d_bias.len()];
        for row in 0..rows {
            let d = &d[(row * channels + task * channels_a_task) * pixels..][..sums.len() * pixels];
            if pixels == 1 {
                for (sum, &d) in sums.iter_mut().zip(d) {
                    *sum += d.to_f64();
                }
            } else {
                sums[0] += sum(d);
            }
        }
        for (d, &sum) in d_bias.iter_mut().zip(&*sums) {
            let sum = T::from_f64(sum);
            *d = if add { *d + sum } else { sum };
        }
    });
}

/// `d = f(x, d)`.
fn zip_map<T: Real>(isa: Isa, x: &[T], d: &mut [T], f: impl Fn(T, T) -> T + Sync) {
    d.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(d, x)| {
        isa.run(Each(|| {
            for (d, &x) in d.iter_mut().zip(x) {
                *d = f(x, *d);
            }
        }));
    });
}

/// The sum of `x`, by lanes.
#[inline(always)]
pub(super) fn sum<T: Real>(x: &[T]) -> f64 {
    let mut sums = [T::ZERO; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for l in 0..LANES {
            sums[l] += chunk[l];
        }
    }
    sums.iter().chain(rest).map(|s| s.to_f64()).sum()
}

/// The standard normal's distribution function and density at `x`.
///
/// From `erfc(z) = exp(-z^2) t g(t)`, `z = |x| / sqrt 2`, `t = 4/(4 + z)`, with `g` as the Chebyshev series
/// [`ERFC`] in `2t - 1`: relative accuracy in the left tail too.
#[inline(always)]
fn normal<T: Real>(x: T) -> (T, T) {
    let terms = if size_of::<T>() == 4 { 12 } else { ERFC.len() };
    let z = if x < T::ZERO { -x } else { x } * T::from_f64(std::f64::consts::FRAC_1_SQRT_2);
    let four = T::from_f64(4.0);
    let t = four / (four + z);
    let s = t + t - T::ONE;
    let (mut b1, mut b2) = (T::ZERO, T::ZERO);
    for &c in ERFC[1..terms].iter().rev() {
        (b1, b2) = (T::from_f64(c) + (s + s) * b1 - b2, b1);
    }
    let g = T::from_f64(ERFC[0]) + s * b1 - b2;
    let e = (x * x * T::from_f64(-0.5)).exp();
    let tail = T::from_f64(0.5) * t * g * e;
    // 1 / sqrt(2 pi)
    let density = e * T::from_f64(0.398_942_280_401_432_7);
    (if x < T::ZERO { tail } else { T::ONE - tail }, density)
}

pub(super) fn pool<T: Real>(pooling: &Pooling, rows: usize, x: &[T], out: &mut [T]) {
    let shard = shard(rows * pooling.channels);
    let (image, window) = (pooling.height * pooling.width, pooling.out_height() * pooling.out_width());
    out.par_chunks_mut(shard * window).zip(x.par_chunks(shard * image)).for_each(|(out, x)| {
        for (out, x) in out.chunks_mut(window).zip(x.chunks(image)) {
            match pooling.kind {
                Pool::Max => reduce(pooling, x, out, |a, b| if b > a { b } else { a }),
                Pool::Average => {
                    reduce(pooling, x, out, |a, b| a + b);
                    let scale = T::from_f64(1.0 / (pooling.size * pooling.size) as f64);
                    for out in out {
                        *out = *out * scale;
                    }
                }
            }
        }
    });
}

/// Folds every window of an image with `f`, in reading order.
#[inline(always)]
fn reduce<T: Real>(pooling: &Pooling, x: &[T], out: &mut [T], f: impl Fn(T, T) -> T) {
    let Pooling { width, size, .. } = *pooling;
    for (out, x) in out.chunks_mut(pooling.out_width()).zip(x.chunks(size * width)) {
        for (line, x) in x.chunks(width).enumerate() {
            for (out, x) in out.iter_mut().zip(x.chunks(size)) {
                let (first, rest) = if line == 0 { (x[0], &x[1..]) } else { (*out, x) };
                *out = rest.iter().fold(first, |a, &b| f(a, b));
            }
        }
    }
}

pub(super) fn pool_backward<T: Real>(pooling: &Pooling, rows: usize, x: &[T], d_out: &[T], dx: &mut [T]) {
    let Pooling { height, width, size, .. } = *pooling;
    let shard = shard(rows * pooling.channels);
    let (image, window) = (height * width, pooling.out_height() * pooling.out_width());
    let share = T::from_f64(1.0 / (size * size) as f64);
    dx.par_chunks_mut(shard * image).zip(x.par_chunks(shard * image)).zip(d_out.par_chunks(shard * window)).for_each(
        |((dx, x), d_out)| {
            dx.fill(T::ZERO);
            for ((dx, x), d_out) in dx.chunks_mut(image).zip(x.chunks(image)).zip(d_out.chunks(window)) {
                let lines = dx.chunks_mut(size * width).zip(x.chunks(size * width));
                for ((dx, x), d_out) in lines.zip(d_out.chunks(pooling.out_width())) {
                    for (ox, &d) in d_out.iter().enumerate() {
                        let rows = (0..size).map(|y| y * width + ox * size);
                        match pooling.kind {
                            Pool::Max => {
                                let mut best = (x[ox * size], ox * size);
                                for row in rows {
                                    for (at, &x) in (row..).zip(&x[row..row + size]) {
                                        // A select, not a branch: which pixel wins is hard to predict.
                                        best = if x > best.0 { (x, at) } else { best };
                                    }
                                }
                                dx[best.1] = d;
                            }
                            Pool::Average => rows.for_each(|row| dx[row..row + size].fill(d * share)),
                        }
                    }
                }
            }
        },
    );
}

pub(super) fn adam<T: Real>(isa: Isa, step: &AdamStep, grads: &[T], params: &mut [T], m: &mut [T], v: &mut [T]) {
    let real = T::from_f64;
    let (b1, a1, b2, a2) = (real(step.beta1), real(1.0 - step.beta1), real(step.beta2), real(1.0 - step.beta2));
    let (keep, lr) = (real(1.0 - step.lr * step.decay), real(step.lr / step.bias[0]));
    let (root, eps, scale) = (real(step.bias[1].sqrt().recip()), real(step.eps), real(step.grad_scale));
    params
        .par_chunks_mut(GRAIN)
        .zip(m.par_chunks_mut(GRAIN))
        .zip(v.par_chunks_mut(GRAIN))
        .zip(grads.par_chunks(GRAIN))
        .for_each(|(((params, m), v), grads)| {
            isa.run(Each(|| {
                for (((p, m), v), &g) in params.iter_mut().zip(m).zip(v).zip(grads) {
                    let g = g * scale;
                    *m = b1 * *m + a1 * g;
                    *v = b2 * *v + a2 * (g * g);
                    *p = keep * *p - lr * *m / (v.sqrt() * root + eps);
                }
            }));
        });
}

pub(super) fn sum_squares<T: Real>(x: &[T]) -> f64 {
    let mut sums = [0.0f64; SHARDS];
    let shard = x.len().div_ceil(SHARDS).max(1);
    sums.par_iter_mut().zip(x.par_chunks(shard)).for_each(|(sum, x)| {
        let mut lanes = [0.0f64; LANES];
        for chunk in x.chunks(LANES) {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                let x = x.to_f64();
                *lane += x * x;
            }
        }
        *sum = lanes.iter().sum();
    });
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(n: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
        (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// The definition: six loops.
    fn naive_conv(c: &Conv, rows: usize, x: &[f64], weight: &[f64]) -> Vec<f64> {
        let (height, width, k) = (c.out_height(), c.out_width(), c.kernel);
        let mut out = vec![0.0; rows * c.output_len()];
        for (at, out) in out.iter_mut().enumerate() {
            let (ox, oy) = (at % width, at / width % height);
            let (o, row) = (at / (width * height) % c.outputs, at / c.output_len());
            for i in 0..c.inputs {
                for (ky, kx) in (0..k * k).map(|at| (at / k, at % k)) {
                    let (y, x_) = (oy + ky, ox + kx);
                    let inside = |at: usize, len: usize| (c.padding..len + c.padding).contains(&at);
                    if inside(y, c.height) && inside(x_, c.width) {
                        let from = ((row * c.inputs + i) * c.height + y - c.padding) * c.width + x_ - c.padding;
                        *out += x[from] * weight[((o * c.inputs + i) * k + ky) * k + kx];
                    }
                }
            }
        }
        out
    }

    // Images of one and of several blocks, batches of one and of several samples a shard, padding beyond the kernel.
    // The backwards are the adjoints of the forward: <conv(x, w), d> = <x, dx> = <w, dw>. Tolerance: rounding of sums
    // of 1e5 terms; any misplaced term shows as 1e-3 or more.
    #[test]
    fn convolution_is_its_definition_and_backward_its_adjoint() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (inputs, height, width, outputs, kernel, padding, rows) in [
            (1, 1, 1, 1, 1, 0, 1),
            (1, 28, 28, 6, 5, 2, 3),
            (6, 14, 14, 16, 5, 0, 67),
            (7, 41, 37, 3, 7, 1, 2),
            (2, 3, 2, 5, 2, 4, 131),
            (3, 5, 11, 33, 5, 0, 2),
        ] {
            let c = Conv { inputs, height, width, outputs, kernel, padding };
            let (x, d) = (random(rows * c.input_len(), &mut rng), random(rows * c.output_len(), &mut rng));
            let weight = random(outputs * c.patch(), &mut rng);
            let want = naive_conv(&c, rows, &x, &weight);
            for isa in Isa::available() {
                let mut scratch = vec![f64::NAN; conv_scratch(&c, rows)];
                let mut out = vec![f64::NAN; want.len()];
                conv(isa, &c, rows, &x, &weight, &mut out, &mut scratch);
                for (o, w) in out.iter().zip(&want) {
                    assert!((o - w).abs() < 1e-12, "{c:?} {}: {o}, want {w}", isa.name());
                }
                scratch.fill(f64::NAN);
                let mut dx = vec![f64::NAN; x.len()];
                conv_backward_data(isa, &c, rows, &weight, &d, &mut dx, &mut scratch);
                scratch.fill(f64::NAN);
                let mut dw = vec![f64::NAN; weight.len()];
                conv_backward_weight(isa, &c, rows, &x, &d, Write::Set(&mut dw), &mut scratch);
                let (value, size) = (dot(&want, &d), dot(&want, &want).sqrt() * dot(&d, &d).sqrt());
                assert!((dot(&x, &dx) - value).abs() < 1e-13 * size, "{c:?} {} data", isa.name());
                assert!((dot(&weight, &dw) - value).abs() < 1e-13 * size, "{c:?} {} weight", isa.name());
                let set = dw.clone();
                conv_backward_weight(isa, &c, rows, &x, &d, Write::Add(&mut dw), &mut scratch);
                assert!(dw.iter().zip(&set).all(|(twice, once)| *twice == 2.0 * once));
            }
        }
    }

    #[test]
    fn pooling_is_its_definition_and_ties_go_first() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for (channels, height, width, size, rows) in
            [(1, 1, 1, 1, 1), (3, 7, 5, 2, 67), (2, 9, 11, 3, 3), (1, 4, 6, 4, 2)]
        {
            let x = random(rows * channels * height * width, &mut rng);
            for kind in [Pool::Max, Pool::Average] {
                let p = Pooling { kind, channels, height, width, size };
                let mut out = vec![f64::NAN; rows * p.output_len()];
                pool(&p, rows, &x, &mut out);
                for (at, &out) in out.iter().enumerate() {
                    let (ox, oy) = (at % p.out_width(), at / p.out_width() % p.out_height());
                    let image = &x[at / (p.out_width() * p.out_height()) * height * width..][..height * width];
                    let window = (0..size * size).map(|k| image[(oy * size + k / size) * width + ox * size + k % size]);
                    let want = match kind {
                        Pool::Max => window.fold(f64::MIN, f64::max),
                        Pool::Average => window.sum::<f64>() / (size * size) as f64,
                    };
                    assert!((out - want).abs() < 1e-15, "{p:?}: {out}, want {want}");
                }
            }
        }
        let p = Pooling { kind: Pool::Max, channels: 1, height: 3, width: 4, size: 2 };
        let x = [0.0, 1.0, 5.0, 5.0, 1.0, 1.0, 5.0, 5.0, 9.0, 9.0, 9.0, 9.0];
        let mut dx = [f64::NAN; 12];
        pool_backward(&p, 1, &x, &[2.0, 3.0], &mut dx);
        assert_eq!(dx, [0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }

    // Values of the normal law in 20 digits. A dropped term of the series shows.
    #[test]
    fn normal_is_accurate_in_both_tails() {
        let known = [
            (0.0, 0.5, 0.398_942_280_401_432_7),
            (0.3, 0.617_911_422_188_952_8, 0.381_387_815_460_524_1),
            (-1.0, 0.158_655_253_931_457_05, 0.241_970_724_519_143_34),
            (2.5, 0.993_790_334_674_223_8, 0.017_528_300_493_568_54),
            (-4.0, 3.167_124_183_311_992_4e-5, 0.000_133_830_225_764_885_34),
            (-8.0, 6.220_960_574_271_784e-16, 5.052_271_083_536_893e-15),
        ];
        for (x, cdf, density) in known {
            let got = normal::<f64>(x);
            assert!((got.0 / cdf - 1.0).abs() < 1e-14 && (got.1 / density - 1.0).abs() < 1e-14, "{x}: {got:?}");
            let got = normal::<f32>(x as f32);
            let off = |got: f32, want: f64| (f64::from(got) / want - 1.0).abs();
            // x^2/2 = 32 at -8 is what the exponent's rounding is multiplied by.
            assert!(off(got.0, cdf) < 5e-6 && off(got.1, density) < 5e-6, "{x}: {got:?}");
        }
    }

    #[test]
    fn bias_and_activation_are_their_definition() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for shape @ [rows, channels, pixels] in [[1, 1, 1], [67, 37, 1], [5, 3, 77], [2, 1, 20_000]] {
            let n = rows * channels * pixels;
            let (x, bias, d) = (random(n, &mut rng), random(channels, &mut rng), random(n, &mut rng));
            let channel = |i: usize| i / pixels % channels;
            for isa in Isa::available() {
                let mut pre = x.clone();
                let mut out = vec![f64::NAN; n];
                bias_activation(isa, shape, Activation::Relu, Some(&bias), &mut pre, Some(&mut out));
                let mut over = x.clone();
                bias_activation(isa, shape, Activation::Relu, Some(&bias), &mut over, None);
                assert_eq!(over, out);
                let (mut dd, mut d_bias) = (d.clone(), vec![1.0; channels]);
                bias_activation_backward(isa, shape, Activation::Relu, &out, &mut dd, Some(Write::Add(&mut d_bias)));
                let mut want = vec![1.0; channels];
                for i in 0..n {
                    let z = x[i] + bias[channel(i)];
                    assert_eq!((pre[i], out[i], dd[i]), (z, z.max(0.0), if z > 0.0 { d[i] } else { 0.0 }));
                    want[channel(i)] += dd[i];
                }
                // Sums of up to 20,000 terms of size 1 in another order.
                assert!(d_bias.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-10));
            }
        }
        let mut nan = [f64::NAN];
        bias_activation(Isa::best(), [1, 1, 1], Activation::Relu, None, &mut nan, None);
        assert!(nan[0].is_nan(), "a NaN must not be hidden");
    }

    #[test]
    fn sum_of_squares_is_its_definition() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        for n in [0, 1, 63, 64, 65, 100_003] {
            let x = random(n, &mut rng);
            let want = dot(&x, &x);
            assert!((sum_squares(&x) - want).abs() <= 1e-12 * want);
        }
    }
}
