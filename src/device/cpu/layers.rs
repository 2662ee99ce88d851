//! The verbs of encoders and optimisers on slices.
//!
//! Every result is the same bit for bit for any number of threads: outputs are split into parts that no other
//! part touches, and where samples are summed the batch is cut into [`SHARDS`] fixed shards whose partial sums are
//! added in order.

use super::simd::{Isa, Op, Simd, WIDEST};
use super::together;
use crate::device::{Activation, AdamStep, Pool, Pooling, Real};
use crate::objective::Write;
use kernels::law::ERFC;
use rayon::prelude::*;

/// Into how many parts a sum over samples is cut, whatever the number of threads.
pub(super) const SHARDS: usize = 64;
/// Numbers an elementwise task works through.
pub(super) const GRAIN: usize = 1 << 14;
/// Numbers of the widest register.
pub(super) const REGISTER: usize = WIDEST / 2;
/// Numbers summed side by side.
pub(super) const LANES: usize = 8;

/// Samples in a shard.
pub(super) fn shard(rows: usize) -> usize {
    rows.div_ceil(SHARDS).max(1)
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
    let Some((d_bias, add)) = d_bias.map(Write::split) else { return };
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
pub(super) fn normal<T: Real>(x: T) -> (T, T) {
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

/// `now` is [`crate::device::Device::adam`]'s, and the factor.
pub(super) fn adam<T: Real>(
    isa: Isa,
    step: &AdamStep,
    [lr, bias_1, bias_2, factor]: [f64; 4],
    grads: &[T],
    params: &mut [T],
    m: &mut [T],
    v: &mut [T],
) {
    let real = T::from_f64;
    let (b1, a1, b2, a2) = (real(step.beta1), real(1.0 - step.beta1), real(step.beta2), real(1.0 - step.beta2));
    let (keep, lr) = (real(1.0 - lr * step.decay), real(lr / bias_1));
    let (root, eps, scale) = (real(bias_2.sqrt().recip()), real(step.eps), real(factor));
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
    sums.par_iter_mut().zip(x.par_chunks(shard)).with_min_len(together(shard)).for_each(|(sum, x)| {
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
pub(super) mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    pub fn random(n: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
        (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    pub fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
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
