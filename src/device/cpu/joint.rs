//! The joint loss in one pass, 6 N M D operations: its softmax is over all pairs, so that what divides the exponentials is one
//! number, and may be told after they were multiplied out.
//!
//! With h a number near all logits, E = exp(S - h) of the negatives, p_i the positives' logits, w_i their shares and Z the sum
//! of all exponentials,
//!
//! ```text
//! L        = h + log Z - log N M - sum_i w_i p_i
//! dL/dS_ij = E_ij / Z           of negatives
//! dL/dS_ii = exp(p_i - h) / Z - w_i
//! ```
//!
//! The latter is small beside both of its terms once pairs are learned: positives have no part in the products, and theirs
//! are added once Z is known.

use super::buffers::Threads;
use super::contrast::{CHUNK, MODERATE, Pulled, Tilted, pull_and_settle};
use super::fused::{Logits, Pull};
use super::law::{Law, RowSums};
use super::operand::{Element, Side};
use super::together;
use crate::objective::{Batch, Gradients, Loss, Positives, Value};
use kernels::law::Product;
use rayon::prelude::*;

/// The `h` of a loss that one pass suffices for: it is near all logits, and positives are the diagonal, so that what is theirs
/// is a number a row.
pub fn anchor<T: Element>(loss: &Loss, batch: &Batch<'_>, tilted: &Tilted<'_>, logits: &Logits<'_, T>) -> Option<f32> {
    let plain = matches!(batch.pairs.positives, Positives::Diagonal) && loss.smoothing == 0.0;
    logits.anchor.filter(|_| plain && tilted.longest.iter().all(|norm| MODERATE.contains(norm)))
}

/// The loss under the `h` that [`anchor`] gives. `share`: w, `[N]`.
pub fn evaluate<T: Element>(
    tilted: &Tilted<'_>,
    logits: &Logits<'_, T>,
    h: f32,
    share: &[f32],
    gradients: Gradients<'_>,
    pulled: &mut Pulled,
) -> Value {
    let (n, m) = (tilted.u.rows.rows, tilted.v.rows.rows);
    let mut value = 0.0;
    let settle = |outs: [Option<&mut [f32]>; 2], row_sums: &mut [RowSums], col_sums: &mut [f32]| {
        let above = |p: f64| (p - f64::from(h)).exp();
        // A positive's logit is all that the law adds to its row's value.
        let positives = || row_sums[..n.min(m)].iter().map(|row| row.value).zip(share.iter().map(|&w| f64::from(w)));
        let z = row_sums.iter().map(|row| row.g).sum::<f64>() + positives().map(|(p, _)| above(p)).sum::<f64>();
        let pulls: f64 = positives().map(|(p, w)| w * p).sum();
        value = f64::from(h) + z.ln() - ((n as f64).ln() + (m as f64).ln()) - pulls;
        for (sum, (p, w)) in col_sums.iter_mut().zip(positives()) {
            *sum += (above(p) - w * z) as f32;
        }
        col_sums.iter_mut().for_each(|sum| *sum = (f64::from(*sum) / z) as f32);
        for (i, row) in row_sums.iter_mut().enumerate() {
            let p = row.value;
            let own = if i < m { above(p) / z - f64::from(share[i]) } else { 0.0 };
            *row = RowSums { gs: row.gs / z + own * p, g: own, value: 0.0 };
        }
        let [out_u, out_v] = outs;
        for (out, side, other) in [(out_u, &tilted.u, &tilted.v), (out_v, &tilted.v, &tilted.u)] {
            if let Some(out) = out {
                add_positives(out, [side, other], 1.0 / z, &row_sums[..n.min(m)], tilted.product, logits.threads);
            }
        }
    };
    let law = Law::Exponential { anchor: h };
    let walk = |pull: Pull<'_>| logits.pull(&law, pull);
    let sums = pull_and_settle(tilted, logits, walk, gradients, pulled, settle);
    Value { loss: value, grad_tau: sums.grad_tau, grad_bias: 0.0 }
}

/// Makes `scale out_i + g_i x_i` of every row of `out`, x the other side's row, or how far it is from this side's.
fn add_positives(
    out: &mut [f32],
    [side, other]: [&Side<'_>; 2],
    scale: f64,
    positives: &[RowSums],
    product: Product,
    threads: &Threads,
) {
    let dim = side.rows.dim;
    out.par_chunks_mut(CHUNK * dim).with_min_len(together(CHUNK * dim)).enumerate().for_each(|(c, out)| {
        threads.with(|ws| {
            let (x, from) = ws.rows(2 * dim).split_at_mut(dim);
            for (i, out) in (c * CHUNK..).zip(out.chunks_exact_mut(dim)) {
                out.iter_mut().for_each(|out| *out *= scale as f32);
                let Some(&RowSums { g, .. }) = positives.get(i) else { continue };
                other.read(i..i + 1, x);
                if product == Product::SquaredDistance {
                    side.read(i..i + 1, from);
                    x.iter_mut().zip(&*from).for_each(|(x, from)| *x -= from);
                }
                out.iter_mut().zip(&*x).for_each(|(out, x)| *out += g as f32 * x);
            }
        });
    });
}
