//! Exact search: the items of largest score for each query, and recall (Algorithm 1; the modes of the empirical
//! conditional, Theorem 4.2).

use super::scores::{Pairs, Scorer, Scores, Slack, exact, square};
use crate::data::Rows;
use crate::device::{DeviceError, Search};
use crate::objective::Tilting;
use rayon::prelude::*;

/// Recall both ways: the share of queries whose own item is among the best K; ties rank by lowest index.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Recall {
    /// u finds its v first.
    pub u_to_v_at_1: f64,
    /// u finds its v among the first 5.
    pub u_to_v_at_5: f64,
    /// v finds its u first.
    pub v_to_u_at_1: f64,
    /// v finds its u among the first 5.
    pub v_to_u_at_5: f64,
}

/// The best items of each query.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Best {
    /// `[queries, k]`, best first; ties: the lowest index.
    pub indices: Vec<usize>,
    /// s(query, item) at tau = 1, `[queries, k]`.
    pub scores: Vec<f64>,
}

/// Recall of pairs (u_i, v_i).
///
/// # Panics
/// When the two have different shapes.
pub fn recall(tilting: Tilting, u: &dyn Rows, v: &dyn Rows) -> Recall {
    of_ranks([own_ranks(tilting, u, v), own_ranks(tilting, v, u)])
}

fn of_ranks([forth, back]: [Vec<u32>; 2]) -> Recall {
    Recall {
        u_to_v_at_1: recall_at(&forth, 1),
        u_to_v_at_5: recall_at(&forth, 5),
        v_to_u_at_1: recall_at(&back, 1),
        v_to_u_at_5: recall_at(&back, 5),
    }
}

/// The share of ranks (from 0) below `k`.
pub fn recall_at(ranks: &[u32], k: u32) -> f64 {
    ranks.iter().filter(|&&rank| rank < k).count() as f64 / ranks.len().max(1) as f64
}

/// [`recall`] by the scores of a device.
///
/// # Errors
/// The device's own.
///
/// # Panics
/// As [`recall`].
pub fn recall_on(device: &mut dyn Search, tilting: Tilting, u: &dyn Rows, v: &dyn Rows) -> Result<Recall, DeviceError> {
    Ok(of_ranks([own_ranks_on(device, tilting, u, v)?, own_ranks_on(device, tilting, v, u)?]))
}

/// [`own_ranks`] by the scores of a device.
fn own_ranks_on(
    device: &mut dyn Search,
    tilting: Tilting,
    queries: &dyn Rows,
    items: &dyn Rows,
) -> Result<Vec<u32>, DeviceError> {
    assert_eq!(queries.count(), items.count(), "query i's own item is item i");
    let mut ranks = Vec::with_capacity(queries.count());
    if queries.count() > 0 {
        let scorer = Scorer::new(tilting, queries, items);
        scorer.hold(device)?;
        each_batch(&scorer, queries, |first, rows| {
            ranks.extend(device.ranks(rows, first)?);
            Ok(())
        })?;
    }
    Ok(ranks)
}

/// Queries that a device is given at a time.
const BATCH: usize = 16_384;

/// Calls `f` with the first of every [`BATCH`] of queries, and with all of them.
fn each_batch(
    scorer: &Scorer<'_>,
    queries: &dyn Rows,
    mut f: impl FnMut(usize, &[f32]) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let (n, dim) = (queries.count(), queries.dim());
    let mut rows = vec![0f32; BATCH.min(n) * dim];
    for first in (0..n).step_by(BATCH) {
        let count = BATCH.min(n - first);
        scorer.read_queries(first..first + count, &mut rows[..count * dim]);
        f(first, &rows[..count * dim])?;
    }
    Ok(())
}

/// For each query i, how many of the items come before item i; scores are sums in f32.
///
/// # Panics
/// When the two have different shapes.
pub fn own_ranks(tilting: Tilting, queries: &dyn Rows, items: &dyn Rows) -> Vec<u32> {
    assert_eq!(queries.count(), items.count(), "query i's own item is item i");
    let scorer = Scorer::new(tilting, queries, items);
    let mut ranks = vec![(0f32, 0u32); queries.count()];
    scorer.scan(Pairs::Diagonal, &mut ranks, |Scores { query, first, scores, .. }, (own, _)| {
        if let Some(&score) = query.checked_sub(first).and_then(|at| scores.get(at)) {
            *own = score;
        }
    });
    scorer.scan(Pairs::All, &mut ranks, |Scores { query, first, scores, most }, (own, rank)| {
        if most < *own {
            return;
        }
        let (before, after) = scores.split_at(query.clamp(first, first + scores.len()) - first);
        *rank += (before.iter().filter(|&s| s >= own).count() + after.iter().filter(|&s| s > own).count()) as u32;
    });
    ranks.into_iter().map(|(_, rank)| rank).collect()
}

/// More candidates than asked for: of those that f32 can hardly tell apart, f64 chooses.
const SPARE: usize = 16;

/// The `k` items of largest s(query, item) for each query, in the order of their scores in f64: found among the best by
/// scores in f32, or, where rounding could have left one of them out, among all. Memory is O(queries k).
///
/// # Panics
/// When `k` is above the number of items, or dimensions differ.
pub fn top_k(tilting: Tilting, queries: &dyn Rows, items: &dyn Rows, k: usize) -> Best {
    assert!(k <= items.count(), "the best {k} of {} items", items.count());
    if k == 0 {
        return Best::default();
    }
    let keep = k + SPARE;
    let scorer = Scorer::new(tilting, queries, items);
    let mut candidates: Vec<Candidates> = (0..queries.count()).map(|_| Candidates::default()).collect();
    let slack = scorer.scan(Pairs::All, &mut candidates, |scores, candidates| candidates.take(&scores, keep));
    candidates.par_iter_mut().for_each(|candidates| candidates.prune(keep));
    settle(&scorer, k, candidates, slack)
}

/// [`top_k`] with candidates by the scores of a device: the same items, in the same order.
///
/// # Errors
/// The device's own.
///
/// # Panics
/// As [`top_k`].
pub fn top_k_on(
    device: &mut dyn Search,
    tilting: Tilting,
    queries: &dyn Rows,
    items: &dyn Rows,
    k: usize,
) -> Result<Best, DeviceError> {
    let count = items.count();
    assert!(k <= count, "the best {k} of {count} items");
    if k == 0 || queries.count() == 0 {
        return Ok(Best::default());
    }
    // Its scores have a few roundings more.
    let keep = (k + SPARE.max(k / 2)).min(count);
    let scorer = Scorer::new(tilting, queries, items);
    let mut candidates = Vec::with_capacity(queries.count());
    let slack = scorer.hold(device)?;
    each_batch(&scorer, queries, |_, rows| {
        candidates.extend(device.nearest(rows, keep)?.chunks_exact(keep).map(|kept| {
            let least = kept.iter().fold(f32::INFINITY, |least, &(score, _)| least.min(score));
            Candidates { kept: kept.to_vec(), floor: if keep < count { least } else { f32::NEG_INFINITY } }
        }));
        Ok(())
    })?;
    Ok(settle(&scorer, k, candidates, slack))
}

/// The best `k` of each query in f64: of its candidates, or, where their scores do not tell, of all items.
fn settle(scorer: &Scorer<'_>, k: usize, candidates: Vec<Candidates>, slack: Slack) -> Best {
    let Scorer { tilting, queries, items, .. } = *scorer;
    let (n, dim) = (queries.count(), items.dim());
    let mut best = Best { indices: vec![0; n * k], scores: vec![0.0; n * k] };
    let out = best.indices.par_chunks_exact_mut(k).zip(best.scores.par_chunks_exact_mut(k));
    candidates.par_iter().zip(out).enumerate().for_each(|(i, (candidates, (indices, scores)))| {
        let (mut query, mut item) = (vec![0f32; dim], vec![0f32; dim]);
        scorer.read_queries(i..i + 1, &mut query);
        let slack = slack.of(square(&query).sqrt());
        queries.read(i, &mut query);
        let mut again = |j: usize| {
            items.read(j, &mut item);
            (exact(tilting, &query, &item), j)
        };
        let order = |a: &(f64, usize), b: &(f64, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        let mut found: Vec<(f64, usize)> = candidates.kept.iter().map(|&(_, j)| again(j as usize)).collect();
        found.sort_unstable_by(order);
        if found.len() < items.count() && !candidates.certain(&found[..k], slack) {
            found = (0..items.count()).map(again).collect();
            found.select_nth_unstable_by(k - 1, order);
            found[..k].sort_unstable_by(order);
        }
        for ((index, score), (s, j)) in indices.iter_mut().zip(scores).zip(found) {
            (*index, *score) = (j, s);
        }
    });
    best
}

/// The best items of one query so far, and perhaps some more.
struct Candidates {
    kept: Vec<(f32, u32)>,
    /// No score below it matters.
    floor: f32,
}

impl Default for Candidates {
    fn default() -> Self {
        Candidates { kept: Vec::new(), floor: f32::NEG_INFINITY }
    }
}

impl Candidates {
    /// Whether no item that was left out can be better than one of `found`, where scores may be off by `slack`.
    fn certain(&self, found: &[(f64, usize)], slack: f32) -> bool {
        let of = |j: usize| self.kept.iter().find(|kept| kept.1 as usize == j).map_or(f32::NEG_INFINITY, |kept| kept.0);
        let least = found.iter().fold(f32::INFINITY, |least, &(_, j)| least.min(of(j)));
        // Both scores may be off; neither infinities nor what is no number compare as greater.
        f64::from(least) - f64::from(self.floor) > 2.0 * f64::from(slack)
    }

    /// Takes what matters of a run of scores; `keep` are kept, and some more until the next pruning.
    fn take(&mut self, &Scores { first, scores, most, .. }: &Scores<'_>, keep: usize) {
        // Nearly always nothing matters: one comparison tells.
        if most < self.floor {
            return;
        }
        for (j, &score) in scores.iter().enumerate() {
            if score >= self.floor {
                self.kept.push((score, (first + j) as u32));
            }
        }
        if self.kept.len() >= 2 * keep {
            self.prune(keep);
        }
    }

    fn prune(&mut self, keep: usize) {
        if self.kept.len() > keep {
            self.kept.select_nth_unstable_by(keep - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            self.kept.truncate(keep);
            self.floor = self.kept[keep - 1].0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Table;
    use crate::tasks::scores::{ITEMS, QUERIES};
    use rand::{RngExt, SeedableRng};

    fn rng() -> rand_chacha::ChaCha8Rng {
        rand_chacha::ChaCha8Rng::seed_from_u64(2)
    }

    // More items than are kept have one score in f32; in f64 the last of them is the best.
    #[test]
    fn what_f32_cannot_tell_apart_is_told_apart() {
        let items: Vec<f32> = (0..3000).flat_map(|i| [1.0, i as f32 * 1e-12]).collect();
        let items = Table { data: &items, dim: 2 };
        let queries = [1f32, 1.0, 1.0, -1.0];
        let found = top_k(Tilting::Dot, &Table { data: &queries, dim: 2 }, &items, 2);
        assert_eq!(found.indices, [2999, 2998, 0, 1]);
    }

    // Small integers: every score is exact, so that ties are ties, and the order is the definition's. Sizes are below
    // and above a block; far from the origin l2 has no digits to lose.
    #[test]
    fn ranks_and_best_matches_follow_the_definition() {
        let dim = 2;
        for (n, shift) in [(1, 0), (83, 0), (ITEMS + QUERIES + 7, 0), (QUERIES + 1, 1 << 20)] {
            let mut rng = rng();
            let mut draw =
                || -> Vec<f32> { (0..n * dim).map(|_| (rng.random_range(-9i32..10) + shift) as f32).collect() };
            let (u, v) = (draw(), draw());
            for tilting in [Tilting::Dot, Tilting::L2] {
                if (tilting, shift) == (Tilting::Dot, 1 << 20) {
                    continue;
                }
                let score = |i: usize, j: usize| -> f32 {
                    let pairs = (0..dim).map(|k| (u[i * dim + k], v[j * dim + k]));
                    match tilting {
                        Tilting::L2 => pairs.map(|(a, b)| -(a - b) * (a - b)).sum(),
                        _ => pairs.map(|(a, b)| a * b).sum(),
                    }
                };
                let [u, v] = [&u, &v].map(|data| Table { data, dim });
                let ranks = own_ranks(tilting, &u, &v);
                let k = n.min(7);
                let best = top_k(tilting, &u, &v, k);
                for i in (0..n).step_by(1 + n / 200).chain([n - 1]) {
                    let before = |&j: &usize| score(i, j) > score(i, i) || (score(i, j) == score(i, i) && j < i);
                    assert_eq!(ranks[i] as usize, (0..n).filter(before).count(), "{tilting:?} {n} {shift}");
                    // As numpy's stable argsort of the negative scores has them.
                    let mut order: Vec<usize> = (0..n).collect();
                    order.sort_by(|&a, &b| score(i, b).total_cmp(&score(i, a)));
                    assert_eq!(best.indices[i * k..][..k], order[..k], "{tilting:?} {n} {shift}");
                }
            }
        }
    }

    // The same item in two blocks ties to the bit: the later copy ranks one behind.
    #[test]
    fn equal_items_tie_across_blocks() {
        let (dim, copies, n) = (67, 40, ITEMS + 40);
        let mut rng = rng();
        let mut draw = || -> Vec<f32> {
            let mut x: Vec<f32> = (0..ITEMS * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
            x.extend_from_within(..copies * dim);
            x
        };
        let (u, v) = (draw(), draw());
        for &tilting in Tilting::ALL {
            let [u, v] = [&u, &v].map(|data| Table { data, dim });
            let ranks = own_ranks(tilting, &u, &v);
            assert!((0..copies).all(|i| ranks[i + n - copies] == ranks[i] + 1), "{tilting:?}");
        }
    }

    #[test]
    fn cosine_forgets_lengths() {
        let (n, dim) = (83, 2);
        let x: Vec<f32> = (0..n).flat_map(|i| [(i as f32 * 0.05).cos(), (i as f32 * 0.05).sin()]).collect();
        let stretched: Vec<f32> = x.iter().enumerate().map(|(k, x)| x * (1 + k / dim % 7) as f32).collect();
        let found = recall(Tilting::Cosine, &Table { data: &x, dim }, &Table { data: &stretched, dim });
        assert_eq!((found.u_to_v_at_1, found.v_to_u_at_5), (1.0, 1.0));
    }
}
