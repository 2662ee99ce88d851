//! Draws from the learned conditional nu(u|v): item i with weight softmax_i s(u_i, v), with replacement (28).

use super::scores::{Scorer, Scores, Which, exact};
use crate::data::Rows;
use crate::device::cpu::inner;
use crate::objective::{LossError, Tilting, check_tau};
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

/// Draws for each query.
#[derive(Clone, Debug, PartialEq)]
pub struct Draws {
    /// Which items, `[queries, count]`, in the order drawn.
    pub indices: Vec<usize>,
    /// Their weights, `[queries, count]`.
    pub weights: Vec<f64>,
    /// Effective number of items, `1 / sum_i w_i^2`, `[queries]`: 1 when one has all the weight, as many as there are
    /// when all have the same.
    pub ess: Vec<f64>,
}

/// Draws `count` items for each query, at temperature `tau`. The items are read twice; memory is O(queries count).
///
/// # Errors
/// [`LossError::Parameter`] for a `tau` that is not above 0, [`LossError::Shape`] when there is no item or dimensions
/// differ, [`LossError::NotFinite`] of a row.
pub fn sample(
    tilting: Tilting,
    tau: f64,
    queries: &dyn Rows,
    items: &dyn Rows,
    count: usize,
    seed: u64,
) -> Result<Draws, LossError> {
    check_tau(tau)?;
    let scorer = Scorer::new(tilting, queries, items)?;
    let n = queries.count();
    // A score as [`Scorer`] has it, times this, is s(query, item) but for a constant of the query.
    let gains: Vec<f64> = (0..n)
        .map(|i| {
            let mut query = vec![0f32; queries.dim()];
            queries.read(i, &mut query);
            let norm = inner(&query, &query).sqrt();
            if !tilting.unit_rows() {
                1.0 / tau
            } else if norm > 0.0 {
                1.0 / (norm * tau)
            } else {
                0.0
            }
        })
        .collect();
    let mut tallies = vec![Tally::default(); n];
    let tally = |Scores { query, scores, .. }: Scores<'_>, tally: &mut Tally| tally.add(scores, gains[query]);
    let slack = scorer.scan(Which::All, &mut tallies, tally)?;
    // What sums in f32 may have lost too much of, or overflow in, is summed in f64.
    let in_f64 = |i: usize| {
        let mut query = vec![0f32; queries.dim()];
        scorer.read_queries(i..i + 1, &mut query);
        let off = slack.of(inner(&query, &query).sqrt(), 0.0) * gains[i];
        !(off < CLOSE && tallies[i].most.is_finite() && tallies[i].sum.is_finite())
    };
    let in_f64: Vec<bool> = (0..n).into_par_iter().map(in_f64).collect();
    let mut draws = Draws { indices: vec![0; n * count], weights: vec![0.0; n * count], ess: vec![] };
    // A draw is the item at which the weights' running sum passes a uniform number.
    let (mut indices, mut weights) = (&mut draws.indices[..], &mut draws.weights[..]);
    let mut walks: Vec<_> = (0..n)
        .map(|i| {
            let out = (indices.split_off_mut(..count).expect(EACH), weights.split_off_mut(..count).expect(EACH));
            (Walk::new(count, seed, i as u64), out)
        })
        .collect();
    walks.par_iter_mut().zip(&mut tallies).enumerate().filter(|&(i, _)| in_f64[i]).for_each(
        |(i, ((walk, out), tally))| {
            let logits = logits(tilting, tau, queries, items, i);
            *tally = Tally::default();
            tally.take(logits.iter().copied());
            walk.pass(0, logits.iter().map(|&s| tally.weight(s)), out);
        },
    );
    if count > 0 {
        scorer.scan(Which::All, &mut walks, |Scores { query, first, scores, .. }, (walk, out)| {
            if !in_f64[query] {
                let weigh = |&score: &f32| tallies[query].weight(f64::from(score) * gains[query]);
                walk.pass(first, scores.iter().map(weigh), out);
            }
        })?;
    }
    draws.ess = tallies.iter().map(|t| t.sum * t.sum / t.squares).collect();
    Ok(draws)
}

/// How far a logit may be off, at the worst: most are thirty times as near.
const CLOSE: f64 = 1.0 / 64.0;

const EACH: &str = "as many draws for each query";

/// s(query i, item) of every item, in f64.
fn logits(tilting: Tilting, tau: f64, queries: &dyn Rows, items: &dyn Rows, i: usize) -> Vec<f64> {
    let (mut query, mut item) = (vec![0f32; queries.dim()], vec![0f32; items.dim()]);
    queries.read(i, &mut query);
    let one = |j: usize| {
        items.read(j, &mut item);
        exact(tilting, &query, &item) / tau
    };
    (0..items.count()).map(one).collect()
}

/// Sums of exp(logit - most) and of its square.
#[derive(Clone, Copy)]
struct Tally {
    most: f64,
    sum: f64,
    squares: f64,
}

impl Default for Tally {
    fn default() -> Self {
        Tally { most: f64::NEG_INFINITY, sum: 0.0, squares: 0.0 }
    }
}

impl Tally {
    fn add(&mut self, scores: &[f32], gain: f64) {
        self.take(scores.iter().map(|&s| f64::from(s) * gain));
    }
    fn take(&mut self, logits: impl Iterator<Item = f64> + Clone) {
        let most = logits.clone().fold(self.most, f64::max);
        let fade = (self.most - most).exp();
        (self.most, self.sum, self.squares) = (most, self.sum * fade, self.squares * fade * fade);
        for logit in logits {
            let x = (logit - most).exp();
            self.sum += x;
            self.squares += x * x;
        }
    }
    fn weight(&self, logit: f64) -> f64 {
        (logit - self.most).exp() / self.sum
    }
}

/// Where the running sum of a query's weights is, and the uniform numbers it has still to pass: the least is last.
struct Walk {
    at: f64,
    due: Vec<(f64, usize)>,
}

impl Walk {
    fn new(count: usize, seed: u64, query: u64) -> Self {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(query);
        // What rounding takes from the sum of the weights is less than what is kept free here.
        let mut due: Vec<(f64, usize)> = (0..count).map(|slot| (rng.random::<f64>() * (1.0 - 1e-9), slot)).collect();
        due.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        Walk { at: 0.0, due }
    }

    /// Past items of such `weights`, the first of which is `first`.
    fn pass(
        &mut self,
        first: usize,
        weights: impl Iterator<Item = f64>,
        (indices, drawn): &mut (&mut [usize], &mut [f64]),
    ) {
        for (item, weight) in (first..).zip(weights) {
            self.at += weight;
            while let Some(&(_, slot)) = self.due.last().filter(|(u, _)| *u < self.at) {
                self.due.pop();
                (indices[slot], drawn[slot]) = (item, weight);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Table;

    // Against weights by the definition, over more than one block; frequencies by a chi-square with known moments.
    #[test]
    fn draws_have_the_weights_of_the_definition() {
        let (items, dim, count) = (2500, 3, 40_000);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let mut draw = |n: usize| -> Vec<f32> { (0..n * dim).map(|_| rng.random_range(-1.5..1.5)).collect() };
        let (x, q) = (draw(items), draw(2));
        let (tables, tau) = ([Table { data: &q, dim }, Table { data: &x, dim }], 0.6);
        for &tilting in Tilting::ALL {
            let got = sample(tilting, tau, &tables[0], &tables[1], count, 9).unwrap();
            for i in 0..2 {
                let s =
                    |j: usize| super::super::scores::exact(tilting, &q[i * dim..][..dim], &x[j * dim..][..dim]) / tau;
                let total: f64 = (0..items).map(|j| s(j).exp()).sum();
                let w: Vec<f64> = (0..items).map(|j| s(j).exp() / total).collect();
                let ess = 1.0 / w.iter().map(|w| w * w).sum::<f64>();
                assert!((got.ess[i] / ess - 1.0).abs() < 1e-5, "{tilting:?}: {} {ess}", got.ess[i]);
                let mut seen = vec![0.0; items];
                for (&j, &weight) in got.indices[i * count..][..count].iter().zip(&got.weights[i * count..][..count]) {
                    assert!((weight / w[j] - 1.0).abs() < 1e-5);
                    seen[j] += 1.0;
                }
                let chi: f64 =
                    seen.iter().zip(&w).map(|(n, w)| (n - count as f64 * w).powi(2) / (count as f64 * w)).sum();
                // Mean items - 1; its variance is that of Poisson numbers, rare ones counting more.
                let spread = (2.0 * items as f64 + w.iter().map(|w| 1.0 / (count as f64 * w)).sum::<f64>()).sqrt();
                assert!((chi - items as f64 + 1.0).abs() < 4.0 * spread, "{tilting:?}: {chi}, spread {spread}");
            }
            assert_eq!(got, sample(tilting, tau, &tables[0], &tables[1], count, 9).unwrap());
        }
    }

    // Clusters so far apart that sums in f32 from one point lose the distances within them; and a common part of all rows.
    #[test]
    fn far_clusters_have_the_weights_of_the_definition() {
        let (items, dim) = (600, 3);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        for (tilting, far, spread) in
            [(Tilting::L2, 1e4f32, 1.0f32), (Tilting::L2, 300.0, 1.0), (Tilting::Dot, 3e3, 3e-4)]
        {
            let mut draw = |n: usize| -> Vec<f32> {
                let centre = |i: usize| if tilting == Tilting::L2 && i % 2 == 1 { -far } else { far };
                (0..n * dim).map(|k| centre(k / dim) + spread * rng.random_range(-1.0..1.0f32)).collect()
            };
            let (x, q) = (draw(items), draw(4));
            let [queries, table] = [&q, &x].map(|data| Table { data, dim });
            let got = sample(tilting, 1.0, &queries, &table, 5, 9).unwrap();
            for i in 0..4 {
                let s = |j: usize| super::super::scores::exact(tilting, &q[i * dim..][..dim], &x[j * dim..][..dim]);
                let most = (0..items).map(s).fold(f64::NEG_INFINITY, f64::max);
                let (sum, squares) =
                    (0..items).map(|j| (s(j) - most).exp()).fold((0.0, 0.0), |a, w| (a.0 + w, a.1 + w * w));
                let ess = sum * sum / squares;
                assert!((got.ess[i] / ess - 1.0).abs() < 1e-2, "{tilting:?} {far}: {} {ess}", got.ess[i]);
                for (&j, &weight) in got.indices[i * 5..][..5].iter().zip(&got.weights[i * 5..][..5]) {
                    assert!((weight / ((s(j) - most).exp() / sum) - 1.0).abs() < 1e-2, "{tilting:?} {far}");
                }
            }
        }
    }

    // Scores that no f32 holds, and squared distances.
    #[test]
    fn logits_beyond_f32_have_weights_still() {
        let (q, x) = ([1e20f32, 1.0], [1e10f32, 1e19, 1e-3]);
        for (tilting, first) in [(Tilting::Dot, 1), (Tilting::L2, 1)] {
            let got = sample(tilting, 1.0, &Table { data: &q, dim: 1 }, &Table { data: &x, dim: 1 }, 20, 1).unwrap();
            assert!(got.indices[..20].iter().all(|&i| i == first), "{tilting:?}: {got:?}");
            assert!(got.weights[..20].iter().all(|&w| w == 1.0) && got.ess[0] == 1.0, "{tilting:?}: {got:?}");
        }
    }

    #[test]
    fn one_item_with_all_the_weight_is_always_drawn() {
        let (q, x) = ([1f32], [0f32, 800.0, 3.0]);
        let got = sample(Tilting::Dot, 1.0, &Table { data: &q, dim: 1 }, &Table { data: &x, dim: 1 }, 50, 1).unwrap();
        assert!(got.indices.iter().all(|&i| i == 1) && got.ess == [1.0]);
    }

    #[test]
    fn what_has_no_weights_is_refused() {
        let (one, bad) = ([1f32], [1f32, f32::NAN]);
        let [one, bad] = [&one[..], &bad].map(|data| Table { data, dim: 1 });
        for tau in [0.0, -1.0, f64::NAN] {
            assert!(sample(Tilting::Dot, tau, &one, &one, 3, 1).unwrap_err().to_string().starts_with("tau"));
        }
        assert!(sample(Tilting::Dot, 1.0, &one, &bad, 3, 1).unwrap_err().to_string().starts_with("items row 1"));
        assert!(sample(Tilting::Dot, 1.0, &bad, &one, 3, 1).unwrap_err().to_string().starts_with("queries row 1"));
    }

    // Equal queries in one call: with one stream of random numbers their draws would be the same.
    #[test]
    fn queries_draw_by_streams_of_their_own() {
        let (q, x) = ([1f32; 2], [0f32, 0.1, 0.2, 0.3, 0.4, 0.5]);
        let [queries, items] = [&q[..], &x].map(|data| Table { data, dim: 1 });
        let got = sample(Tilting::Dot, 1.0, &queries, &items, 30, 1).unwrap();
        assert_eq!(got.ess[0], got.ess[1]);
        assert_ne!(got.indices[..30], got.indices[30..]);
    }
}
