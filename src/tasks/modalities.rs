//! More than two modalities: the sum of a pairwise objective over all pairs of them, on shared encoders.

use crate::device::Engine;
use crate::objective::{Batch, Gradients, Loss, LossError, Matrix, Pairs, Write};

/// `sum_{a < b} L(e_a, e_b)` of embeddings `e_a`, each `[N, dim]`, row i of all from one sample. `gradients[a]`,
/// `[N, dim]`, is overwritten with the sum's gradient in `e_a`.
///
/// # Errors
/// [`LossError`], as [`Engine::loss`].
///
/// # Panics
/// When there are fewer than two modalities, or not as many gradients.
pub fn pairwise(
    engine: &mut impl Engine,
    loss: &Loss,
    embeddings: &[Vec<f32>],
    dim: usize,
    gradients: &mut [Vec<f32>],
) -> Result<f64, LossError> {
    let count = embeddings.len();
    assert!(count > 1 && gradients.len() == count, "{count} modalities, {} gradients", gradients.len());
    let mut total = 0.0;
    for b in 1..count {
        for a in 0..b {
            let (before, from_b) = gradients.split_at_mut(b);
            let (du, dv) = (&mut before[a][..], &mut from_b[0][..]);
            // Each modality's first pair: the first one's is (0, 1), any other's is the one with the first.
            let u = if a == 0 && b == 1 { Write::Set(du) } else { Write::Add(du) };
            let v = if a == 0 { Write::Set(dv) } else { Write::Add(dv) };
            let [u_rows, v_rows] = [a, b].map(|k| Matrix::f32(&embeddings[k], dim));
            let batch = Batch { u: u_rows, v: v_rows, pairs: Pairs::default(), offset_v: None, moments: None };
            total += engine.loss(loss, &batch, Gradients { u: Some(u), v: Some(v), offset_v: None })?.loss;
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;
    use crate::objective::{Objective, Tilting};
    use rand::{RngExt, SeedableRng};

    /// Against the sum's own differences, in every embedding of four modalities.
    #[test]
    fn the_gradient_is_that_of_the_sum() {
        let (n, dim) = (7, 3);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        let mut embeddings: Vec<Vec<f32>> =
            (0..4).map(|_| (0..n * dim).map(|_| rng.random_range(-1.0..1.0)).collect()).collect();
        let loss = Loss {
            tilting: Tilting::L2,
            objective: Objective::Conditional { lambda_u: 1.3, lambda_v: 0.4 },
            tau: 0.7,
            smoothing: 0.0,
        };
        let mut engine = Cpu::new();
        let mut gradients = vec![vec![f32::NAN; n * dim]; 4];
        pairwise(&mut engine, &loss, &embeddings, dim, &mut gradients).unwrap();
        let mut scrap = gradients.clone();
        for a in 0..4 {
            for at in 0..n * dim {
                let x = embeddings[a][at];
                let mut value = |step: f32| {
                    embeddings[a][at] = x + step;
                    pairwise(&mut engine, &loss, &embeddings, dim, &mut scrap).unwrap()
                };
                let found = (value(1e-2) - value(-1e-2)) / 2e-2;
                embeddings[a][at] = x;
                assert!((found - f64::from(gradients[a][at])).abs() < 2e-4, "{a}, {at}: {found}, {}", gradients[a][at]);
            }
        }
    }
}
