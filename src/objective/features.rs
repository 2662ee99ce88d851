//! Random Fourier features: an explicit map whose inner products approximate the Gaussian kernel.

use rand::{SeedableRng, distr::Distribution};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;

/// Features `[rows, count]` of the rows of `x` `[rows, dim]` with
/// `<f(x), f(x')> ~ exp(-|x - x'|^2 / (2 width^2))`, error O(1/sqrt(count)):
/// `(cos <w_k, x>, sin <w_k, x>) / sqrt(K)` for `K = count / 2` waves `w_k` from N(0, I/width^2), drawn from `seed`.
/// Computed in f64. They come in pairs: the last feature of an odd `count` is 0.
///
/// # Panics
/// When `dim` is 0.
pub fn random_fourier(x: &[f32], dim: usize, width: f64, count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let waves: Vec<f64> =
        (0..count / 2 * dim).map(|_| Distribution::<f64>::sample(&StandardNormal, &mut rng) / width).collect();
    let scale = 1.0 / ((count / 2) as f64).sqrt();
    let mut out = vec![0.0; x.len() / dim * count];
    out.par_chunks_exact_mut(count.max(1)).zip(x.par_chunks_exact(dim)).for_each(|(out, x)| {
        for (pair, wave) in out.chunks_exact_mut(2).zip(waves.chunks_exact(dim)) {
            let phase: f64 = wave.iter().zip(x).map(|(w, &x)| w * f64::from(x)).sum();
            pair[0] = (scale * phase.cos()) as f32;
            pair[1] = (scale * phase.sin()) as f32;
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    // The root mean square error over pairs must fall like 1/sqrt(count): 16 times the features, a quarter of it.
    #[test]
    fn inner_products_approach_the_kernel() {
        let (rows, dim, width) = (40, 3, 1.3);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let x: Vec<f32> = (0..rows * dim).map(|_| StandardNormal.sample(&mut rng)).collect();
        let rms = |count: usize| {
            let f = random_fourier(&x, dim, width, count, 5);
            let mut sum = 0.0;
            for i in 0..rows {
                for j in 0..rows {
                    let pairs = |a: &[f32], d: usize| -> Vec<(f64, f64)> {
                        (0..d).map(|k| (f64::from(a[i * d + k]), f64::from(a[j * d + k]))).collect()
                    };
                    let square: f64 = pairs(&x, dim).iter().map(|(a, b)| (a - b) * (a - b)).sum();
                    let got: f64 = pairs(&f, count).iter().map(|(a, b)| a * b).sum();
                    sum += (got - (-square / (2.0 * width * width)).exp()).powi(2);
                }
            }
            (sum / (rows * rows) as f64).sqrt()
        };
        let (few, many) = (rms(256), rms(4096));
        assert!(few < 0.1 && many < 0.4 * few, "{few} {many}");
    }

    // cos^2 + sin^2 = 1 for every wave: the kernel's diagonal is exact at any count, unless the scale counts the idle
    // last feature of an odd one.
    #[test]
    fn rows_have_unit_norm_and_pools_do_not_matter() {
        let x: Vec<f32> = (0..21).map(|k| (k * k) as f32 * 0.37 - 5.0).collect();
        for count in [0, 1, 2, 3, 7, 64] {
            let f = random_fourier(&x, 3, 0.8, count, 9);
            assert_eq!(f.len(), 7 * count);
            for f in f.chunks_exact(count.max(1)) {
                let norm: f64 = f.iter().map(|&f| f64::from(f).powi(2)).sum();
                assert!((norm - f64::from(u8::from(count > 1))).abs() < 1e-6, "{count}: {norm}");
                assert!(count % 2 == 0 || f[count - 1] == 0.0, "{count}");
            }
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            assert_eq!(pool.install(|| random_fourier(&x, 3, 0.8, count, 9)), f);
        }
    }
}
