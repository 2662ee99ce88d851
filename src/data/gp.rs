//! The Gaussian process experiment (section 6.1 of the paper).
//!
//! `w(x) = sum_j sqrt(l_j) xi_j psi_j(x)` on (0, 1) with `xi_j ~ N(0, 1)`, `psi_j(x) = sqrt(2) cos(j pi x)`,
//! `l_j = (j^2 pi^2 + 9)^-2` and j = 1..1000. u is w at the points `x_i = (i - 1/2)/12`, i = 1..12, plus noise
//! N(0, 0.05^2); v is the first five coefficients xi_1..xi_5. So (u, v) is Gaussian with `C_vv = I` and
//!
//! ```text
//! C_uv[i, j] = sqrt(l_j) psi_j(x_i),   C_uu[i, k] = sum_j l_j psi_j(x_i) psi_j(x_k) + 0.05^2 [i = k]
//! ```
//!
//! Samples are drawn from that law itself: 17 normal numbers a pair instead of 1012.

use super::gaussian2d::Gaussian;
use std::f64::consts::{PI, SQRT_2};

/// Points of observation: the numbers in u.
pub const POINTS: usize = 12;
/// Leading coefficients: the numbers in v.
pub const COEFFICIENTS: usize = 5;
/// Modes in all.
pub const MODES: usize = 1000;
/// Standard deviation of the noise on u.
pub const NOISE: f64 = 0.05;

/// The law of (u, v): exact covariance blocks (12 x 12, 12 x 5, 5 x 5) and a sampler.
pub fn gp() -> Gaussian {
    let mut c_uu = vec![0.0; POINTS * POINTS];
    for i in 0..POINTS {
        for k in 0..POINTS {
            let noise = if i == k { NOISE * NOISE } else { 0.0 };
            c_uu[i * POINTS + k] = noise + (1..=MODES).map(|j| amplitude(j, i) * amplitude(j, k)).sum::<f64>();
        }
    }
    let c_uv = (0..POINTS).flat_map(|i| (1..=COEFFICIENTS).map(move |j| amplitude(j, i))).collect();
    let mut c_vv = vec![0.0; COEFFICIENTS * COEFFICIENTS];
    c_vv.iter_mut().step_by(COEFFICIENTS + 1).for_each(|x| *x = 1.0);
    Gaussian::new(POINTS, COEFFICIENTS, c_uu, c_uv, c_vv).expect("the noise makes it positive definite")
}

/// The points of observation `x_i`.
pub fn points() -> [f64; POINTS] {
    std::array::from_fn(|i| (i as f64 + 0.5) / POINTS as f64)
}

/// `w(x)` of the coefficients `xi_1, xi_2, ..`; those not given are zero.
pub fn field(xi: &[f64], x: f64) -> f64 {
    xi.iter().enumerate().map(|(j, xi)| xi * mode(j + 1, x)).sum()
}

/// `sqrt(l_j) psi_j(x)`.
fn mode(j: usize, x: f64) -> f64 {
    let wave = j as f64 * PI;
    SQRT_2 * (wave * x).cos() / (wave * wave + 9.0)
}

/// `sqrt(l_j) psi_j` at point `i` (from 0).
fn amplitude(j: usize, i: usize) -> f64 {
    mode(j, points()[i])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::gaussian2d::{cholesky, tests::covariance_sigmas};
    use crate::data::{Side, Source};
    use rand::SeedableRng;
    use rand_distr::{Distribution, StandardNormal};

    #[test]
    fn the_signals_are_the_known_numbers() {
        let law = gp();
        let c_uv = |i: usize, j: usize| law.c_uv[i * COEFFICIENTS + j];
        // E|E[u|v]|^2 = trace(C_uv C_vu), as C_vv = I; the reference numbers have four digits.
        let signal_u: f64 = law.c_uv.iter().map(|x| x * x).sum();
        assert!((signal_u - 0.04068).abs() < 5e-6, "{signal_u}");
        // E|E[v|u]|^2 = trace(C_vu C_uu^-1 C_uv) = sum_j |L^-1 c_j|^2 with C_uu = L L'.
        let mut lower = law.c_uu.clone();
        cholesky(&mut lower, POINTS).unwrap();
        let mut signal_v = 0.0;
        for j in 0..COEFFICIENTS {
            let mut y = [0.0; POINTS];
            for i in 0..POINTS {
                let dot: f64 = (0..i).map(|k| lower[i * POINTS + k] * y[k]).sum();
                y[i] = (c_uv(i, j) - dot) / lower[i * POINTS + i];
            }
            signal_v += y.iter().map(|x| x * x).sum::<f64>();
        }
        assert!((signal_v - 2.151).abs() < 5e-4, "{signal_v}");
    }

    #[test]
    fn samples_have_the_law() {
        let law = gp();
        let sample = law.sample(1, 100_000);
        assert_eq!((sample.dim(Side::U), sample.dim(Side::V)), (12, 5));
        let sigmas = covariance_sigmas(&law, &sample);
        assert!(sigmas < 4.5, "{sigmas} sigmas: the largest of 229 entries at a fixed seed");
    }

    /// The construction as the experiment tells it, coefficient by coefficient, has the blocks that are claimed.
    #[test]
    fn the_sum_of_modes_has_the_law() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        let samples = 20_000;
        let (mut u, mut v) = (Vec::new(), Vec::new());
        let t = 3.0f64;
        // psi_j(x_i) sqrt(l_j), written from the definition and not from `amplitude`.
        let basis: Vec<f64> = (0..MODES * POINTS)
            .map(|at| {
                let (j, i) = ((at / POINTS + 1) as f64, (at % POINTS + 1) as f64);
                let l = (j * j * PI * PI + t * t).powf(-2.0);
                l.sqrt() * 2.0f64.sqrt() * (j * PI * ((i - 0.5) / 12.0)).cos()
            })
            .collect();
        for _ in 0..samples {
            let mut w = [0.0f64; POINTS];
            for (j, psi) in basis.chunks_exact(POINTS).enumerate() {
                let xi: f64 = StandardNormal.sample(&mut rng);
                if j < COEFFICIENTS {
                    v.push(xi as f32);
                }
                w.iter_mut().zip(psi).for_each(|(w, psi)| *w += xi * psi);
            }
            u.extend(w.iter().map(|w| {
                let noise: f64 = StandardNormal.sample(&mut rng);
                (w + 0.05 * noise) as f32
            }));
        }
        let sigmas = covariance_sigmas(&gp(), &crate::data::Memory::new(u, POINTS, v, COEFFICIENTS));
        assert!(sigmas < 4.5, "{sigmas} sigmas: the largest of 229 entries at a fixed seed");
    }
}
