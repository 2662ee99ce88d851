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
//! out     [outputs, pixels]  = weight [outputs, patch] col
//! d_col   [patch, pixels]    = weight' d_out,  added back to the pixels each patch came from
//! d_weight' [patch, outputs] += col d_out'
//! ```

use crate::device::{Activation, AdamStep, Conv, Gemm, Pool, Pooling, Real};
use crate::objective::Write;
use rayon::prelude::*;
use std::ops::Range;

/// Into how many parts a sum over samples is cut, whatever the number of threads.
const SHARDS: usize = 64;
/// Numbers an elementwise task works through.
const GRAIN: usize = 1 << 14;
/// Numbers of the patches of a block of output rows, about: half a first-level cache.
const BLOCK: usize = 1 << 13;
/// Width of the vectors that inner loops are written in.
const LANES: usize = 8;
/// Rows of a product kept in registers.
const ROWS: usize = 4;

/// `c = a b` or `c += a b` for `shape` = `[m, n, k]`, on the calling thread. Row strides are in brackets;
/// `b`'s must leave room for `n` rounded up to [`LANES`], and what lies there is read and ignored.
#[inline(always)]
fn product<T: Real>([m, n, k]: [usize; 3], a: (&[T], usize), b: (&[T], usize), c: Write<&mut [T]>, ldc: usize) {
    let (c, add) = match c {
        Write::Set(c) => (c, false),
        Write::Add(c) => (c, true),
    };
    for j in (0..n).step_by(LANES) {
        let columns = LANES.min(n - j);
        let b = (&b.0[j..], b.1);
        let mut store = |i: usize, tile: &[[T; LANES]]| {
            for (r, tile) in tile.iter().enumerate() {
                let c = &mut c[(i + r) * ldc + j..][..columns];
                for (c, &t) in c.iter_mut().zip(tile) {
                    *c = if add { *c + t } else { t };
                }
            }
        };
        let mut i = 0;
        while i + ROWS <= m {
            store(i, &tile::<T, ROWS>(k, (&a.0[i * a.1..], a.1), b));
            i += ROWS;
        }
        while i < m {
            store(i, &tile::<T, 1>(k, (&a.0[i * a.1..], a.1), b));
            i += 1;
        }
    }
}

/// `M` rows and [`LANES`] columns of a product. Multiply and add stay apart: a fused one is a library call on
/// machines that lack the instruction.
#[inline(always)]
fn tile<T: Real, const M: usize>(k: usize, a: (&[T], usize), b: (&[T], usize)) -> [[T; LANES]; M] {
    let rows: [&[T]; M] = std::array::from_fn(|r| &a.0[r * a.1..][..k]);
    let mut sum = [[T::ZERO; LANES]; M];
    for p in 0..k {
        let b = &b.0[p * b.1..][..LANES];
        for r in 0..M {
            let a = rows[r][p];
            for l in 0..LANES {
                sum[r][l] += a * b[l];
            }
        }
    }
    sum
}

/// How a convolution is cut up.
struct Blocks {
    /// Output rows in a block.
    rows: usize,
    /// Pixels of a block, rounded up to [`LANES`]: the row stride of `col`.
    stride: usize,
    /// Output channels rounded up to [`LANES`].
    outputs: usize,
}

impl Blocks {
    fn new(conv: &Conv) -> Self {
        let width = conv.out_width();
        let rows = (BLOCK / (conv.patch() * width)).clamp(1, conv.out_height());
        Blocks { rows, stride: (rows * width).next_multiple_of(LANES), outputs: conv.outputs.next_multiple_of(LANES) }
    }
    /// Every block as its output rows.
    fn iter(&self, conv: &Conv) -> impl Iterator<Item = Range<usize>> {
        let (step, height) = (self.rows, conv.out_height());
        (0..height).step_by(step).map(move |start| start..(start + step).min(height))
    }
    /// Scratch of one shard: patches, one side of the product, and the weight or its gradient transposed.
    fn sizes(&self, conv: &Conv) -> [usize; 3] {
        [conv.patch() * self.stride, self.stride * self.outputs, conv.patch() * self.outputs]
    }
    fn split<'a, T>(&self, conv: &Conv, scratch: &'a mut [T]) -> [&'a mut [T]; 3] {
        let [a, b, _] = self.sizes(conv);
        let (patches, rest) = scratch.split_at_mut(a);
        let (side, weight) = rest.split_at_mut(b);
        [patches, side, weight]
    }
}

/// Samples in a shard.
fn shard(rows: usize) -> usize {
    rows.div_ceil(SHARDS).max(1)
}

pub(super) fn conv_scratch(conv: &Conv, rows: usize) -> usize {
    SHARDS.min(rows) * Blocks::new(conv).sizes(conv).iter().sum::<usize>()
}

/// Numbers of scratch of one shard.
fn shard_scratch(conv: &Conv) -> usize {
    conv_scratch(conv, 1)
}

/// Visits the runs of pixels that `col` and the image share: for every row of `col` and output row of the block,
/// `visit(row of col, pixels in it, Some(first number in the image))`, with `None` where padding is.
#[inline(always)]
fn runs(conv: &Conv, block: Range<usize>, mut visit: impl FnMut(usize, Range<usize>, Option<usize>)) {
    let Conv { height, width, kernel, padding, .. } = *conv;
    let out_width = conv.out_width();
    for row in 0..conv.patch() {
        let (channel, ky, kx) = (row / (kernel * kernel), row / kernel % kernel, row % kernel);
        // Output column `o` reads image column `o + kx - padding`.
        let low = padding.saturating_sub(kx).min(out_width);
        let high = (width + padding).saturating_sub(kx).clamp(low, out_width);
        for (o, y) in block.clone().enumerate() {
            let at = o * out_width;
            let y = y + ky;
            if y < padding || y >= height + padding || low == high {
                visit(row, at..at + out_width, None);
            } else {
                visit(row, at..at + low, None);
                visit(row, at + low..at + high, Some((channel * height + y - padding) * width + low + kx - padding));
                visit(row, at + high..at + out_width, None);
            }
        }
    }
}

/// Gathers the patches of a block of output rows of one sample into `col`.
fn gather<T: Real>(conv: &Conv, block: Range<usize>, x: &[T], col: &mut [T], stride: usize) {
    runs(conv, block, |row, at, from| {
        let col = &mut col[row * stride..][at];
        match from {
            Some(from) => col.copy_from_slice(&x[from..][..col.len()]),
            None => col.fill(T::ZERO),
        }
    });
}

/// Adds `col` back to the pixels it was gathered from.
fn scatter<T: Real>(conv: &Conv, block: Range<usize>, col: &[T], dx: &mut [T], stride: usize) {
    runs(conv, block, |row, at, to| {
        if let Some(to) = to {
            let col = &col[row * stride..][at];
            for (dx, &c) in dx[to..].iter_mut().zip(col) {
                *dx += c;
            }
        }
    });
}

pub(super) fn conv<T: Real>(conv: &Conv, rows: usize, x: &[T], weight: &[T], out: &mut [T], scratch: &mut [T]) {
    let blocks = Blocks::new(conv);
    let (input, output, shard) = (conv.input_len(), conv.output_len(), shard(rows));
    let (width, pixels) = (conv.out_width(), conv.out_height() * conv.out_width());
    out.par_chunks_mut(shard * output)
        .zip(x.par_chunks(shard * input))
        .zip(scratch.par_chunks_mut(shard_scratch(conv)))
        .for_each(|((out, x), scratch)| {
            let [col, ..] = blocks.split(conv, scratch);
            for (out, x) in out.chunks_mut(output).zip(x.chunks(input)) {
                for block in blocks.iter(conv) {
                    gather(conv, block.clone(), x, col, blocks.stride);
                    product(
                        [conv.outputs, block.len() * width, conv.patch()],
                        (weight, conv.patch()),
                        (col, blocks.stride),
                        Write::Set(&mut out[block.start * width..]),
                        pixels,
                    );
                }
            }
        });
}

pub(super) fn conv_backward_data<T: Real>(
    conv: &Conv,
    rows: usize,
    weight: &[T],
    d_out: &[T],
    dx: &mut [T],
    scratch: &mut [T],
) {
    let blocks = Blocks::new(conv);
    let (input, output, shard) = (conv.input_len(), conv.output_len(), shard(rows));
    let (width, pixels) = (conv.out_width(), conv.out_height() * conv.out_width());
    dx.par_chunks_mut(shard * input)
        .zip(d_out.par_chunks(shard * output))
        .zip(scratch.par_chunks_mut(shard_scratch(conv)))
        .for_each(|((dx, d_out), scratch)| {
            let [d_col, side, turned] = blocks.split(conv, scratch);
            for (o, weight) in weight.chunks(conv.patch()).enumerate() {
                for (p, &w) in weight.iter().enumerate() {
                    turned[p * conv.outputs + o] = w;
                }
            }
            for (dx, d_out) in dx.chunks_mut(input).zip(d_out.chunks(output)) {
                dx.fill(T::ZERO);
                for block in blocks.iter(conv) {
                    let n = block.len() * width;
                    for (side, d_out) in side.chunks_mut(blocks.stride).zip(d_out.chunks(pixels)) {
                        side[..n].copy_from_slice(&d_out[block.start * width..][..n]);
                    }
                    product(
                        [conv.patch(), n, conv.outputs],
                        (turned, conv.outputs),
                        (side, blocks.stride),
                        Write::Set(d_col),
                        blocks.stride,
                    );
                    scatter(conv, block, d_col, dx, blocks.stride);
                }
            }
        });
}

pub(super) fn conv_backward_weight<T: Real>(
    conv: &Conv,
    rows: usize,
    x: &[T],
    d_out: &[T],
    d_weight: Write<&mut [T]>,
    scratch: &mut [T],
) {
    let blocks = Blocks::new(conv);
    let (input, output, shard) = (conv.input_len(), conv.output_len(), shard(rows));
    let (width, pixels) = (conv.out_width(), conv.out_height() * conv.out_width());
    x.par_chunks(shard * input)
        .zip(d_out.par_chunks(shard * output))
        .zip(scratch.par_chunks_mut(shard_scratch(conv)))
        .for_each(|((x, d_out), scratch)| {
            let [col, side, sum] = blocks.split(conv, scratch);
            sum.fill(T::ZERO);
            for (x, d_out) in x.chunks(input).zip(d_out.chunks(output)) {
                for block in blocks.iter(conv) {
                    let n = block.len() * width;
                    gather(conv, block.clone(), x, col, blocks.stride);
                    for (o, d_out) in d_out.chunks(pixels).enumerate() {
                        for (side, &d) in side.chunks_mut(blocks.outputs).zip(&d_out[block.start * width..][..n]) {
                            side[o] = d;
                        }
                    }
                    product(
                        [conv.patch(), blocks.outputs, n],
                        (col, blocks.stride),
                        (side, blocks.outputs),
                        Write::Add(sum),
                        blocks.outputs,
                    );
                }
            }
        });
    let (d_weight, add) = match d_weight {
        Write::Set(d) => (d, false),
        Write::Add(d) => (d, true),
    };
    let mut shards = scratch.chunks_mut(shard_scratch(conv)).take(rows.div_ceil(shard));
    let Some(first) = shards.next() else { return };
    let [.., total] = blocks.split(conv, first);
    for scratch in shards {
        let [.., sum] = blocks.split(conv, scratch);
        for (total, &s) in total.iter_mut().zip(&*sum) {
            *total += s;
        }
    }
    for (o, d_weight) in d_weight.chunks_mut(conv.patch()).enumerate() {
        for (p, d) in d_weight.iter_mut().enumerate() {
            let t = total[p * blocks.outputs + o];
            *d = if add { *d + t } else { t };
        }
    }
}

pub(super) fn bias_activation<T: Real>(
    shape: [usize; 3],
    activation: Activation,
    bias: Option<&[T]>,
    pre: &mut [T],
    out: Option<&mut [T]>,
) {
    match activation {
        Activation::None => biased_map(shape, bias, pre, out, |x| x),
        // Written so that NaN stays NaN.
        Activation::Relu => biased_map(shape, bias, pre, out, |x| if x < T::ZERO { T::ZERO } else { x }),
        Activation::Gelu => biased_map(shape, bias, pre, out, |x| x * normal(x).0),
    }
}

/// `pre += bias`, then `out` (or `pre`) `= f(pre)`.
fn biased_map<T: Real>(
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
            add_bias(pre);
            for (out, &x) in out.iter_mut().zip(&*pre) {
                *out = f(x);
            }
        }),
        None => pre.par_chunks_mut(grain).for_each(|pre| {
            add_bias(pre);
            for x in pre {
                *x = f(*x);
            }
        }),
    }
}

pub(super) fn bias_activation_backward<T: Real>(
    [rows, channels, pixels]: [usize; 3],
    activation: Activation,
    saved: &[T],
    d: &mut [T],
    d_bias: Option<Write<&mut [T]>>,
) {
    match activation {
        Activation::None => {}
        Activation::Relu => zip_map(saved, d, |x, d| if x <= T::ZERO { T::ZERO } else { d }),
        Activation::Gelu => zip_map(saved, d, |x, d| {
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
fn zip_map<T: Real>(x: &[T], d: &mut [T], f: impl Fn(T, T) -> T + Sync) {
    d.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(d, x)| {
        for (d, &x) in d.iter_mut().zip(x) {
            *d = f(x, *d);
        }
    });
}

/// The sum of `x`, by lanes.
fn sum<T: Real>(x: &[T]) -> f64 {
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

/// Chebyshev coefficients of `exp(z^2) erfc(z) / t` in `2t - 1`, `t = 4/(4 + z)`, from its values in 40 digits.
/// The first 12 are enough for f32.
const ERFC: [f64; 24] = [
    0.408_024_469_549_131_49,
    0.376_358_235_676_367_43,
    0.147_580_354_572_223_62,
    0.049_571_317_930_027_586,
    0.014_227_107_557_117_174,
    0.003_443_493_262_717_524_1,
    0.000_682_254_183_283_808_06,
    0.000_103_404_519_757_561_88,
    9.728_545_951_990_15e-6,
    -1.198_871_375_841_204_4e-7,
    -2.174_776_703_454_956_4e-7,
    -3.029_176_773_599_139_9e-8,
    9.479_917_565_204_630_2e-10,
    8.633_411_694_990_891_1e-10,
    6.872_156_425_956_353_4e-11,
    -1.703_489_843_829_336_4e-11,
    -3.392_130_686_835_654_3e-12,
    2.615_808_766_936_875_3e-13,
    1.212_767_580_235_116_5e-13,
    -2.114_689_538_592_846_8e-15,
    -4.117_340_933_785_413e-15,
    -6.328_713_119_821_906_7e-17,
    1.439_311_164_915_569_4e-16,
    4.561_486_577_450_827_8e-18,
];

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
                for (at, &d) in d_out.iter().enumerate() {
                    let corner = at / pooling.out_width() * size * width + at % pooling.out_width() * size;
                    match pooling.kind {
                        Pool::Max => {
                            let mut best = corner;
                            for y in 0..size {
                                for place in corner + y * width..corner + y * width + size {
                                    if x[place] > x[best] {
                                        best = place;
                                    }
                                }
                            }
                            dx[best] = d;
                        }
                        Pool::Average => {
                            for y in 0..size {
                                dx[corner + y * width..][..size].fill(d * share);
                            }
                        }
                    }
                }
            }
        },
    );
}

pub(super) fn adam<T: Real>(step: &AdamStep, grads: &[T], params: &mut [T], m: &mut [T], v: &mut [T]) {
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
            for (((p, m), v), &g) in params.iter_mut().zip(m).zip(v).zip(grads) {
                let g = g * scale;
                *m = b1 * *m + a1 * g;
                *v = b2 * *v + a2 * (g * g);
                *p = keep * *p - lr * *m / (v.sqrt() * root + eps);
            }
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

/// A stand-in until the real one lands.
pub(super) fn naive_gemm<T: Real>(shape: Gemm, a: &[T], b: &[T], c: Write<&mut [T]>) {
    let Gemm { m, n, k, transpose_a, transpose_b } = shape;
    let padded = n.next_multiple_of(LANES);
    let mut bb = vec![T::ZERO; k * padded];
    for p in 0..k {
        for j in 0..n {
            bb[p * padded + j] = if transpose_b { b[j * k + p] } else { b[p * n + j] };
        }
    }
    let aa: Vec<T> = if transpose_a { (0..m * k).map(|i| a[i % k * m + i / k]).collect() } else { a.to_vec() };
    let (c, add) = match c {
        Write::Set(c) => (c, false),
        Write::Add(c) => (c, true),
    };
    c.par_chunks_mut(16 * n).zip(aa.par_chunks(16 * k)).for_each(|(c, a)| {
        let rows = c.len() / n;
        product([rows, n, k], (a, k), (&bb, padded), if add { Write::Add(c) } else { Write::Set(c) }, n);
    });
}
