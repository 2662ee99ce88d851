//! Jointly Gaussian pairs.

use super::{DataError, Memory};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

/// The law `(u, v) ~ N(0, [[C_uu, C_uv], [C_vu, C_vv]])`, all blocks row-major f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Gaussian {
    /// Numbers in u.
    pub dim_u: usize,
    /// Numbers in v.
    pub dim_v: usize,
    /// `[dim_u, dim_u]`.
    pub c_uu: Vec<f64>,
    /// `[dim_u, dim_v]`.
    pub c_uv: Vec<f64>,
    /// `[dim_v, dim_v]`.
    pub c_vv: Vec<f64>,
    /// Lower Cholesky factor of the whole covariance, `[dim_u + dim_v]` squared.
    factor: Vec<f64>,
}

/// Samples drawn from one random stream: sample i depends on (seed, i) alone, for any thread and sample count.
const CHUNK: usize = 1024;

/// The two-dimensional example (section 5.4 of the paper): u and v are numbers, of variance 1.5 each and covariance 1.
pub fn gaussian2d() -> Gaussian {
    Gaussian::new(1, 1, vec![1.5], vec![1.0], vec![1.5]).expect("its determinant is 1.25")
}

impl Gaussian {
    /// The law with these blocks, of the shapes the fields tell.
    ///
    /// # Errors
    /// [`DataError::Covariance`] when a block has another number of elements or none, or the whole is not positive definite.
    pub fn new(dim_u: usize, dim_v: usize, c_uu: Vec<f64>, c_uv: Vec<f64>, c_vv: Vec<f64>) -> Result<Self, DataError> {
        let (found, expected) = ([c_uu.len(), c_uv.len(), c_vv.len()], [dim_u * dim_u, dim_u * dim_v, dim_v * dim_v]);
        if found != expected || expected.contains(&0) {
            let text = |n: [usize; 3]| format!("blocks uu, uv, vv of {n:?} elements");
            let expected = format!("{}, none of them 0", text(expected));
            return Err(DataError::Covariance { found: text(found), expected });
        }
        let symmetric = |c: &[f64], n: usize| {
            let entries = || (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
            entries().all(|(i, j)| (c[i * n + j] - c[j * n + i]).abs() <= 1e-9 * (c[i * n + i] * c[j * n + j]).sqrt())
        };
        let finite = [&c_uu, &c_uv, &c_vv].iter().all(|c| c.iter().all(|x| x.is_finite()));
        if !(finite && symmetric(&c_uu, dim_u) && symmetric(&c_vv, dim_v)) {
            let found = "blocks that are not finite, or uu or vv that is not symmetric".into();
            return Err(DataError::Covariance { found, expected: "a covariance".into() });
        }
        let n = dim_u + dim_v;
        let mut c = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                c[i * n + j] = match (i < dim_u, j < dim_u) {
                    (true, _) => c_uu[i * dim_u + j],
                    (false, true) => c_uv[j * dim_v + i - dim_u],
                    (false, false) => c_vv[(i - dim_u) * dim_v + j - dim_u],
                };
            }
        }
        cholesky(&mut c, n)?;
        Ok(Gaussian { dim_u, dim_v, c_uu, c_uv, c_vv, factor: c })
    }
    /// Draws `samples` pairs by `seed`.
    pub fn sample(&self, seed: u64, samples: usize) -> Memory {
        let (mut u, mut v) = (vec![0.0; samples * self.dim_u], vec![0.0; samples * self.dim_v]);
        let n = self.dim_u + self.dim_v;
        u.par_chunks_mut(CHUNK * self.dim_u).zip(v.par_chunks_mut(CHUNK * self.dim_v)).enumerate().for_each(
            |(chunk, (u, v))| {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(chunk as u64);
                let mut z = vec![0.0; n];
                for (u, v) in u.chunks_exact_mut(self.dim_u).zip(v.chunks_exact_mut(self.dim_v)) {
                    z.fill_with(|| StandardNormal.sample(&mut rng));
                    for (i, x) in u.iter_mut().chain(v).enumerate() {
                        let row = &self.factor[i * n..i * n + i + 1];
                        *x = row.iter().zip(&z).map(|(l, z): (&f64, &f64)| l * z).sum::<f64>() as f32;
                    }
                }
            },
        );
        Memory::new(u, self.dim_u, v, self.dim_v)
    }
}

/// Replaces the lower triangle of `c` `[n, n]` by its Cholesky factor.
pub(crate) fn cholesky(c: &mut [f64], n: usize) -> Result<(), DataError> {
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| c[i * n + k] * c[j * n + k]).sum();
            let rest = c[i * n + j] - dot;
            if i > j {
                c[i * n + j] = rest / c[j * n + j];
            } else if rest > 0.0 {
                c[i * n + i] = rest.sqrt();
            } else {
                let found = format!("pivot {rest} in row {i}");
                return Err(DataError::Covariance { found, expected: "a positive definite matrix".into() });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::{Side, Source};

    /// Largest deviation of the empirical covariance (known zero mean) from the exact one, in standard errors.
    pub(crate) fn covariance_sigmas(law: &Gaussian, sample: &Memory) -> f64 {
        let samples = sample.len() as f64;
        let (u, v) = (sample.side(Side::U), sample.side(Side::V));
        let block = |x: &[f32], dx: usize, y: &[f32], dy: usize, exact: &[f64], var_x: &[f64], var_y: &[f64]| {
            let mut worst = 0.0f64;
            for i in 0..dx {
                for j in 0..dy {
                    let sum: f64 = (0..sample.len()).map(|s| f64::from(x[s * dx + i]) * f64::from(y[s * dy + j])).sum();
                    let c = exact[i * dy + j];
                    // Wick: Var(xy) = var_x var_y + c^2.
                    let error = ((var_x[i * dx + i] * var_y[j * dy + j] + c * c) / samples).sqrt();
                    worst = worst.max((sum / samples - c).abs() / error);
                }
            }
            worst
        };
        let (du, dv) = (law.dim_u, law.dim_v);
        block(u, du, u, du, &law.c_uu, &law.c_uu, &law.c_uu)
            .max(block(u, du, v, dv, &law.c_uv, &law.c_uu, &law.c_vv))
            .max(block(v, dv, v, dv, &law.c_vv, &law.c_vv, &law.c_vv))
    }

    #[test]
    fn the_sample_has_the_covariance() {
        let law = gaussian2d();
        let sample = law.sample(7, 200_000);
        assert_eq!((sample.len(), sample.dim(Side::U), sample.dim(Side::V)), (200_000, 1, 1));
        // Fixed seed: 4 sigmas does not flicker, and a wrong factor (L' for L) is hundreds of sigmas off.
        let sigmas = covariance_sigmas(&law, &sample);
        assert!(sigmas < 4.0, "{sigmas}");
        let law = Gaussian::new(2, 1, vec![2.0, -0.5, -0.5, 1.0], vec![0.3, 0.6], vec![0.7]).unwrap();
        let sigmas = covariance_sigmas(&law, &law.sample(8, 100_003));
        assert!(sigmas < 4.0, "{sigmas}");
    }

    #[test]
    fn samples_depend_on_seed_and_index_alone() {
        let law = gaussian2d();
        let many = law.sample(3, 5 * CHUNK + 1);
        let few = law.sample(3, CHUNK + 5);
        assert_eq!(many.side(Side::U)[..CHUNK + 5], *few.side(Side::U));
        assert_eq!(many.side(Side::V)[..CHUNK + 5], *few.side(Side::V));
        let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(single.install(|| law.sample(3, 5 * CHUNK + 1)), many);
        assert_ne!(law.sample(4, CHUNK + 5), few);
        assert_ne!(many.side(Side::U)[..CHUNK], many.side(Side::U)[CHUNK..2 * CHUNK]);
        assert_eq!(law.sample(3, 0).len(), 0);
    }

    #[test]
    fn what_is_no_covariance_is_refused() {
        let indefinite = Gaussian::new(1, 1, vec![1.0], vec![1.0], vec![1.0]).unwrap_err().to_string();
        assert!(indefinite.contains("pivot 0 in row 1"), "{indefinite}");
        assert!(Gaussian::new(1, 1, vec![f64::NAN], vec![0.0], vec![1.0]).is_err());
        assert!(Gaussian::new(2, 1, vec![1.0], vec![1.0], vec![1.0]).unwrap_err().to_string().contains("[4, 2, 1]"));
        assert!(Gaussian::new(0, 1, vec![], vec![], vec![1.0]).is_err());
        // Only the lower triangles are factored: what is above them would go unseen.
        let (wide, one, none) = (vec![1.0, 0.5, 0.0, 1.0], vec![1.0], vec![0.0; 2]);
        for lopsided in
            [Gaussian::new(2, 1, wide.clone(), none.clone(), one.clone()), Gaussian::new(1, 2, one, none, wide)]
        {
            assert!(lopsided.unwrap_err().to_string().contains("not symmetric"));
        }
    }
}
