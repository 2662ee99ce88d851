//! Exact search: the items of largest score for each query, and recall (Algorithm 1; the modes of the empirical
//! conditional, Theorem 4.2).

use super::scores::{Scorer, Scores, Which, best, exact};
use crate::data::Rows;
use crate::device::cpu::search::{self, Operand, Pair};
use crate::device::cpu::{Isa, inner};
use crate::device::{DeviceError, Search};
use crate::objective::{LossError, Tilting, shape};
use rayon::prelude::*;
use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;

/// Recall both ways: the share of queries whose own item is among the best K; ties rank by lowest index.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
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
/// # Errors
/// [`LossError::Shape`] when the two have different shapes or no rows, [`LossError::NotFinite`] of a row.
pub fn recall(tilting: Tilting, u: &dyn Rows, v: &dyn Rows) -> Result<Recall, LossError> {
    Ok(of_ranks([own_ranks(tilting, u, v)?, own_ranks(tilting, v, u)?]))
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
/// As [`recall`], and [`LossError::Device`].
pub fn recall_on(device: &mut dyn Search, tilting: Tilting, u: &dyn Rows, v: &dyn Rows) -> Result<Recall, LossError> {
    Ok(of_ranks([own_ranks_on(device, tilting, u, v)?, own_ranks_on(device, tilting, v, u)?]))
}

/// [`own_ranks`] by the scores of a device.
fn own_ranks_on(
    device: &mut dyn Search,
    tilting: Tilting,
    queries: &dyn Rows,
    items: &dyn Rows,
) -> Result<Vec<u32>, LossError> {
    shape("queries, each of which has an item", queries.count(), items.count())?;
    let mut ranks = Vec::with_capacity(queries.count());
    let scorer = Scorer::new(tilting, queries, items)?;
    scorer.hold(device)?;
    each_batch(&scorer, queries, |first, rows| {
        ranks.extend(device.ranks(rows, first)?);
        Ok(())
    })?;
    Ok(ranks)
}

/// Queries that a device is given at a time.
const BATCH: usize = 16_384;

/// Calls `f` with the first of every [`BATCH`] of queries, and with all of them.
fn each_batch(
    scorer: &Scorer<'_>,
    queries: &dyn Rows,
    mut f: impl FnMut(usize, &[f32]) -> Result<(), DeviceError>,
) -> Result<(), LossError> {
    let (n, dim) = (queries.count(), queries.dim());
    let mut rows = vec![0f32; BATCH.min(n) * dim];
    for first in (0..n).step_by(BATCH) {
        let count = BATCH.min(n - first);
        scorer.read_queries(first..first + count, &mut rows[..count * dim]);
        f(first, &rows[..count * dim]).map_err(LossError::Device)?;
    }
    Ok(())
}

/// For each query i, how many of the items come before item i, by s(query, item) in f64: what sums in f32 cannot tell from
/// item i is looked at again.
///
/// # Errors
/// As [`recall`].
pub fn own_ranks(tilting: Tilting, queries: &dyn Rows, items: &dyn Rows) -> Result<Vec<u32>, LossError> {
    shape("queries, each of which has an item", queries.count(), items.count())?;
    let scorer = Scorer::new(tilting, queries, items)?;
    let mut owns = vec![Own::default(); queries.count()];
    let dim = items.dim();
    owns.par_iter_mut().enumerate().for_each_init(
        || vec![0f32; dim],
        |query, (i, own)| {
            scorer.read_queries(i..i + 1, query);
            own.norm = inner(query, query).sqrt();
        },
    );
    scorer.scan_as::<f32, _>(Isa::best(), Which::Diagonal, &mut owns, |scores, own| {
        if let Some(&score) = scores.query.checked_sub(scores.first).and_then(|at| scores.scores.get(at)) {
            (own.score, own.off) = (f64::from(score), scores.slack.of(own.norm, 0.0));
        }
    })?;
    scorer.scan(Which::All, &mut owns, |Scores { query, first, scores, most, slack }, own| {
        // Both scores may be off.
        let off = own.off + slack.of(own.norm, 0.0);
        let [low, high] = if off.is_finite() {
            [((own.score - off) as f32).next_down(), ((own.score + off) as f32).next_up()]
        } else {
            [f32::NEG_INFINITY, f32::INFINITY]
        };
        if most < low {
            return;
        }
        own.rank += scores.iter().filter(|&&score| score > high).count() as u32;
        for (at, few) in (first..).step_by(FEW).zip(scores.chunks(FEW)) {
            // Without a branch for each.
            if few.iter().fold(false, |any, score| any | ((*score >= low) & (*score <= high))) {
                let close = (at..).zip(few).filter(|(item, score)| (low..=high).contains(*score) && *item != query);
                own.rank += close.filter(|&(item, _)| own.exact.comes_before(&scorer, item, query)).count() as u32;
            }
        }
    })?;
    Ok(owns.into_iter().map(|own| own.rank).collect())
}

/// What is known of a query's own item.
#[derive(Clone, Default)]
struct Own {
    /// Its score, and how far it may be off.
    score: f64,
    off: f64,
    /// Norm of the query.
    norm: f64,
    /// How many items come before it.
    rank: u32,
    exact: Exact,
}

/// A query's row, that of an item, and its own item's score, once they were needed.
#[derive(Clone, Default)]
struct Exact {
    query: Vec<f32>,
    item: Vec<f32>,
    own: f64,
}

impl Exact {
    /// Whether `item` comes before the query's own, which has its number.
    fn comes_before(&mut self, scorer: &Scorer<'_>, item: usize, query: usize) -> bool {
        let dim = scorer.items.dim();
        if self.query.is_empty() {
            (self.query, self.item) = (vec![0.0; dim], vec![0.0; dim]);
            scorer.queries.read(query, &mut self.query);
            self.own = self.score(scorer, query);
        }
        let score = self.score(scorer, item);
        score > self.own || score == self.own && item < query
    }

    fn score(&mut self, scorer: &Scorer<'_>, item: usize) -> f64 {
        scorer.items.read(item, &mut self.item);
        exact(scorer.tilting, &self.query, &self.item)
    }
}

/// More candidates than asked for: of those that rounding can hardly tell apart, f64 chooses.
const SPARE: usize = 16;
/// Scores looked at together: a register of them.
const FEW: usize = 16;
/// From this dimension on products of bf16 make up for looking at more candidates.
const WIDE: usize = 48;

/// The `k` items of largest s(query, item) for each query, in the order of their scores in f64: found among the best by
/// scores in bf16 where there are units for it, by scores in f32, or, where rounding could have left one of them out, among
/// all that it could have. Memory is O(queries k); where it comes to that, 16 bytes an item and 256 MiB.
///
/// # Errors
/// [`LossError::Parameter`] unless `k` is between 1 and the number of items, [`LossError::Shape`] when dimensions differ or
/// there is no item or 2^32 of them, [`LossError::NotFinite`] of a row.
pub fn top_k(tilting: Tilting, queries: &dyn Rows, items: &dyn Rows, k: usize) -> Result<Best, LossError> {
    top_k_under(Isa::best(), tilting, queries, items, k)
}

fn top_k_under(isa: Isa, tilting: Tilting, queries: &dyn Rows, items: &dyn Rows, k: usize) -> Result<Best, LossError> {
    let mut search = Settling::new(Scorer::new(tilting, queries, items)?, k)?;
    if let Some(isa) = isa.pairs().filter(|_| items.dim() >= WIDE) {
        search.narrow::<Pair>(isa)?;
    }
    search.narrow::<f32>(isa)?;
    search.finish(isa)?;
    Ok(search.best)
}

/// [`top_k`] with candidates by the scores of a device: the same items, in the same order.
///
/// # Errors
/// As [`top_k`], and [`LossError::Device`].
pub fn top_k_on(
    device: &mut dyn Search,
    tilting: Tilting,
    queries: &dyn Rows,
    items: &dyn Rows,
    k: usize,
) -> Result<Best, LossError> {
    let count = items.count();
    let mut search = Settling::new(Scorer::new(tilting, queries, items)?, k)?;
    // Its scores have a few roundings more.
    let keep = (k + SPARE.max(k / 2)).min(count);
    let mut candidates = Vec::with_capacity(queries.count());
    let slack = search.scorer.hold(device)?;
    each_batch(&search.scorer, queries, |_, rows| {
        candidates.extend(device.nearest(rows, keep)?.chunks_exact(keep).map(|kept| {
            let least = kept.iter().fold(f32::INFINITY, |least, &(score, _)| least.min(score));
            Candidates { kept: kept.to_vec(), floor: if keep < count { least } else { f32::NEG_INFINITY } }
        }));
        Ok(())
    })?;
    search.settle(&candidates, |query| slack.of(inner(query, query).sqrt(), 0.0));
    search.finish(Isa::best())?;
    Ok(search.best)
}

/// A search of which some queries are settled.
struct Settling<'a> {
    scorer: Scorer<'a>,
    k: usize,
    best: Best,
    /// Queries of which it is not certain yet.
    open: Vec<usize>,
    /// What scores of the `k` best are at least, of each of them.
    least: Vec<f64>,
}

impl<'a> Settling<'a> {
    fn new(scorer: Scorer<'a>, k: usize) -> Result<Self, LossError> {
        let (n, count) = (scorer.queries.count(), scorer.items.count());
        if !(1..=count).contains(&k) {
            let expected = format!("1 to {count}, the number of items").into();
            return Err(LossError::Parameter { what: "k", found: k.to_string(), expected });
        }
        let best = Best { indices: vec![0; n * k], scores: vec![0.0; n * k] };
        Ok(Settling { scorer, k, best, open: (0..n).collect(), least: vec![f64::NEG_INFINITY; n] })
    }

    /// Settles what scores of operands `O` can tell.
    fn narrow<O: Operand>(&mut self, isa: O::Isa) -> Result<(), LossError> {
        if self.open.is_empty() {
            return Ok(());
        }
        let keep = self.k + SPARE;
        let mut candidates: Vec<Candidates> = self.open.iter().map(|_| Candidates::default()).collect();
        let chosen = Chosen { rows: self.scorer.queries, which: &self.open };
        let scorer = self.scorer.of(&chosen, self.scorer.items);
        let slack = scorer.scan_as::<O, _>(isa, Which::All, &mut candidates, |scores, candidates| {
            candidates.take(&scores, keep);
        })?;
        candidates.par_iter_mut().for_each(|candidates| candidates.prune(keep));
        let dim = self.scorer.items.dim();
        self.settle(&candidates, |query| {
            let mut distance = [0.0];
            search::queries::<O>(isa, query, dim, &mut Vec::new(), &mut distance);
            slack.of(inner(query, query).sqrt(), distance[0])
        });
        Ok(())
    }

    /// Settles the open queries, each by its candidates, of which `slack` says how far their scores may be off.
    fn settle(&mut self, candidates: &[Candidates], slack: impl Fn(&[f32]) -> f64 + Sync) {
        let Settling { scorer, k, open, .. } = &*self;
        let k = *k;
        let (count, dim) = (scorer.items.count(), scorer.items.dim());
        let found: Vec<Result<Vec<(f64, usize)>, f64>> = open
            .par_iter()
            .zip(candidates)
            .map(|(&i, candidates)| {
                let mut query = vec![0f32; dim];
                scorer.read_queries(i..i + 1, &mut query);
                if let Some(close) = candidates.close(k, count, slack(&query)) {
                    return Ok(scorer.exactly(i, close, k));
                }
                let mut least = scorer.at_least(&query, candidates.kept.iter().map(|kept| kept.1 as usize));
                Err(*least.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1)
            })
            .collect();
        self.least.clear();
        for (i, found) in std::mem::take(&mut self.open).into_iter().zip(found) {
            match found {
                Ok(found) => self.put(i, found),
                Err(least) => {
                    self.open.push(i);
                    self.least.push(least);
                }
            }
        }
    }

    /// Settles the open queries: where items are equal, by one of each.
    fn finish(&mut self, isa: Isa) -> Result<(), LossError> {
        if self.open.is_empty() {
            return Ok(());
        }
        let alike = Alike::new(self.scorer.items);
        if alike.groups.len() == self.scorer.items.count() {
            return self.reach(isa);
        }
        let first: Vec<usize> = (0..alike.groups.len()).map(|group| alike.members(group)[0] as usize).collect();
        let queries = Chosen { rows: self.scorer.queries, which: &self.open };
        let items = Chosen { rows: self.scorer.items, which: &first };
        let k = self.k.min(first.len());
        let mut among = Settling::new(self.scorer.of(&queries, &items), k)?;
        among.narrow::<f32>(isa)?;
        among.reach(isa)?;
        // The best k are among the first k of each of the best k groups: before any other there are as many.
        let Best { indices, scores } = &among.best;
        let found: Vec<_> = indices.chunks_exact(k).zip(scores.chunks_exact(k)).collect();
        for (i, (groups, scores)) in std::mem::take(&mut self.open).into_iter().zip(found) {
            let members = |(&group, &score): (&usize, &f64)| {
                alike.members(group).iter().take(self.k).map(move |&item| (score, item as usize))
            };
            let found = groups.iter().zip(scores).flat_map(members).collect();
            self.put(i, best(found, self.k));
        }
        Ok(())
    }

    /// Settles the open queries by the exact scores of all items that may be among the best.
    fn reach(&mut self, isa: Isa) -> Result<(), LossError> {
        /// Items of all queries that are held at a time.
        const HELD: usize = 1 << 26;
        let (items, k) = (self.scorer.items, self.k);
        let (open, least) = (std::mem::take(&mut self.open), std::mem::take(&mut self.least));
        let group = (HELD / items.count()).max(1);
        for (open, least) in open.chunks(group).zip(least.chunks(group)) {
            let chosen = Chosen { rows: self.scorer.queries, which: open };
            let scorer = self.scorer.of(&chosen, items);
            let mut query = vec![0f32; items.dim()];
            let mut reached: Vec<Reached> = (0..open.len())
                .map(|i| {
                    scorer.read_queries(i..i + 1, &mut query);
                    Reached { least: least[i], norm: inner(&query, &query).sqrt(), items: Vec::new() }
                })
                .collect();
            scorer.scan_as::<f32, _>(isa, Which::All, &mut reached, |scores, reached| reached.take(&scores))?;
            let found = reached
                .par_iter()
                .enumerate()
                .map(|(i, reached)| scorer.exactly(i, reached.items.iter().map(|&item| item as usize), k));
            let found: Vec<_> = found.collect();
            open.iter().zip(found).for_each(|(&i, found)| self.put(i, found));
        }
        Ok(())
    }

    fn put(&mut self, i: usize, found: Vec<(f64, usize)>) {
        for (at, (score, item)) in (i * self.k..).zip(found) {
            (self.best.indices[at], self.best.scores[at]) = (item, score);
        }
    }
}

/// The items that may be among the best of a query.
struct Reached {
    /// What scores of the best are at least.
    least: f64,
    /// Norm of the query.
    norm: f64,
    items: Vec<u32>,
}

impl Reached {
    fn take(&mut self, &Scores { first, scores, most, slack, .. }: &Scores<'_>) {
        let low = self.least - slack.of(self.norm, 0.0);
        if f64::from(most) >= low {
            let close = (first as u32..).zip(scores).filter(|&(_, &score)| f64::from(score) >= low);
            self.items.extend(close.map(|(item, _)| item));
        }
    }
}

/// Rows in groups of equal ones (or, where hashes collide, in more), by their first.
struct Alike {
    order: Vec<u32>,
    /// Where in `order` each group is.
    groups: Vec<Range<u32>>,
}

impl Alike {
    fn new(rows: &dyn Rows) -> Self {
        let dim = rows.dim();
        let hash = |row: &mut Vec<f32>, i: usize| {
            rows.read(i, row);
            let mut hasher = DefaultHasher::new();
            hasher.write(bytemuck::cast_slice(row));
            (hasher.finish(), i as u32)
        };
        let mut hashes: Vec<(u64, u32)> = Vec::new();
        (0..rows.count()).into_par_iter().map_init(|| vec![0f32; dim], hash).collect_into_vec(&mut hashes);
        hashes.par_sort_unstable();
        let (mut row, mut before) = (vec![0f32; dim], vec![0f32; dim]);
        let mut same = |a: &(u64, u32), b: &(u64, u32)| {
            let read = |i: u32, row: &mut [f32]| rows.read(i as usize, row);
            a.0 == b.0 && {
                read(a.1, &mut before);
                read(b.1, &mut row);
                bytemuck::cast_slice::<f32, u32>(&row) == bytemuck::cast_slice::<f32, u32>(&before)
            }
        };
        let mut end = 0;
        let mut groups: Vec<Range<u32>> = hashes
            .chunk_by(|a, b| same(a, b))
            .map(|group| {
                let start = end;
                end += group.len() as u32;
                start..end
            })
            .collect();
        let order: Vec<u32> = hashes.into_iter().map(|(_, item)| item).collect();
        groups.sort_unstable_by_key(|group| order[group.start as usize]);
        Alike { order, groups }
    }

    /// Rows of a group, in order.
    fn members(&self, group: usize) -> &[u32] {
        let Range { start, end } = self.groups[group];
        &self.order[start as usize..end as usize]
    }
}

/// Some of the rows.
struct Chosen<'a> {
    rows: &'a dyn Rows,
    which: &'a [usize],
}

impl Rows for Chosen<'_> {
    fn count(&self) -> usize {
        self.which.len()
    }
    fn dim(&self) -> usize {
        self.rows.dim()
    }
    fn read(&self, start: usize, out: &mut [f32]) {
        for (&i, out) in self.which[start..].iter().zip(out.chunks_exact_mut(self.dim())) {
            self.rows.read(i, out);
        }
    }
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
    /// The items that may be among the best `k` of `count`, where scores may be off by `slack`; `None` where one that was
    /// left out may be.
    fn close(&self, k: usize, count: usize, slack: f64) -> Option<impl Iterator<Item = usize>> {
        let mut scores: Vec<f32> = self.kept.iter().map(|kept| kept.0).collect();
        let (_, &mut least, _) = scores.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        // Both scores may be off. What is no number is not greater, and an infinity is not far from the largest number.
        let behind = move |score: f32| f64::from(least.min(f32::MAX)) - f64::from(score) > 2.0 * slack;
        let certain = self.kept.len() == count || behind(self.floor);
        certain.then(|| self.kept.iter().filter(move |kept| !behind(kept.0)).map(|kept| kept.1 as usize))
    }

    /// Takes what matters of a run of scores; `keep` are kept, and some more until the next pruning. Inlined where the
    /// scores are made, for their instruction set.
    #[inline(always)]
    fn take(&mut self, &Scores { first, scores, most, .. }: &Scores<'_>, keep: usize) {
        // Nearly always nothing matters: one comparison tells.
        if most < self.floor {
            return;
        }
        for (at, few) in (first..).step_by(FEW).zip(scores.chunks(FEW)) {
            // Without a branch for each.
            if few.iter().fold(false, |any, score| any | (*score >= self.floor)) {
                let better = few.iter().zip(at as u32..).filter(|few| *few.0 >= self.floor);
                self.kept.extend(better.map(|(&score, item)| (score, item)));
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

    // Clusters far apart leave a squared distance few digits in f32, whatever point it is counted from.
    #[test]
    fn ranks_are_those_of_f64() {
        let x = [-10_000f32, 9_999.9, 10_000.1, 0.1];
        let x = Table { data: &x, dim: 1 };
        assert_eq!(own_ranks(Tilting::L2, &x, &x).unwrap(), [0; 4]);
        let all = recall(Tilting::L2, &x, &x).unwrap();
        assert_eq!((all.u_to_v_at_1, all.v_to_u_at_1), (1.0, 1.0));
        // Items that nothing can tell apart rank by their number, those that f64 can by their score.
        let items: Vec<f32> = (0..300).flat_map(|i| [1.0, (i / 2) as f32 * 1e-12]).collect();
        let queries: Vec<f32> = (0..300).flat_map(|_| [1.0, 1.0]).collect();
        let ranks =
            own_ranks(Tilting::Dot, &Table { data: &queries, dim: 2 }, &Table { data: &items, dim: 2 }).unwrap();
        let want: Vec<u32> = (0..300).map(|i| 298 - i / 2 * 2 + i % 2).collect();
        assert_eq!(ranks, want);
    }

    // More items than are kept have one score in f32; in f64 the last of them is the best.
    #[test]
    fn what_f32_cannot_tell_apart_is_told_apart() {
        let items: Vec<f32> = (0..3000).flat_map(|i| [1.0, i as f32 * 1e-12]).collect();
        let items = Table { data: &items, dim: 2 };
        let queries = [1f32, 1.0, 1.0, -1.0];
        let found = top_k(Tilting::Dot, &Table { data: &queries, dim: 2 }, &items, 2).unwrap();
        assert_eq!(found.indices, [2999, 2998, 0, 1]);
    }

    // Clusters closer than f32 tells apart, more in each than there are candidates, and one item so long that what f32 may lose of
    // it is more than all scores.
    #[test]
    fn what_is_left_open_is_settled_by_what_may_matter() {
        let (n, m, dim) = (20, 3000, 50);
        let mut rng = rng();
        let mut draw = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-1f32..1.0)).collect() };
        let (queries, centres, jitter) = (draw(n * dim), draw(30 * dim), draw(m * dim));
        let mut items: Vec<f32> = (0..m * dim).map(|at| centres[at % (30 * dim)] + 1e-7 * jitter[at]).collect();
        items[7 * dim..8 * dim].iter_mut().for_each(|x| *x *= 1e6);
        let [queries, items] = [&queries, &items].map(|data| Table { data, dim });
        for &tilting in Tilting::ALL {
            let scorer = Scorer::new(tilting, &queries, &items).unwrap();
            for k in [1, 5, 150] {
                let want: Vec<(f64, usize)> = (0..n).flat_map(|i| scorer.exactly(i, 0..m, k)).collect();
                let found = top_k(tilting, &queries, &items, k).unwrap();
                let found: Vec<_> = found.scores.into_iter().zip(found.indices).collect();
                assert!(found == want, "{tilting:?} {k}");
            }
            let [some, others] = [queries.data, &items.data[..n * dim]].map(|data| Table { data, dim });
            let ranks = own_ranks(tilting, &some, &others).unwrap();
            let scorer = Scorer::new(tilting, &some, &others).unwrap();
            for (i, &rank) in ranks.iter().enumerate() {
                let order = scorer.exactly(i, 0..n, n);
                assert_eq!(order[rank as usize].1, i, "{tilting:?}");
            }
        }
    }

    // Numbers of one sign are one direction, however long.
    #[test]
    fn items_of_one_direction_tie() {
        let items: Vec<f32> = (0..500).map(|i| 0.1 + (i * 37 % 101) as f32 * 0.731).collect();
        let items = Table { data: &items, dim: 1 };
        let found = top_k(Tilting::Cosine, &Table { data: &[0.7], dim: 1 }, &items, 20).unwrap();
        assert!(found.indices.into_iter().eq(0..20));
    }

    // Copies fill every list of candidates; rows that differ where queries are 0 tie with them, and are other rows.
    #[test]
    fn of_equal_items_the_first_come_first() {
        let (n, m, dim) = (9, 3000, 50);
        let mut rng = rng();
        let mut queries: Vec<f32> = (0..n * dim).map(|_| rng.random_range(-1f32..1.0)).collect();
        queries.chunks_exact_mut(dim).for_each(|row| row[dim - 1] = 0.0);
        let mut kinds: Vec<f32> = (0..4 * dim).map(|_| rng.random_range(-1f32..1.0)).collect();
        kinds.extend_from_within(..);
        (4..8).for_each(|kind| kinds[kind * dim + dim - 1] = 0.25 * kind as f32);
        let which: Vec<usize> = (0..m).map(|_| rng.random_range(0..8)).collect();
        let items: Vec<f32> = which.iter().flat_map(|kind| &kinds[kind * dim..][..dim]).copied().collect();
        let alike = Alike::new(&Table { data: &items, dim });
        assert_eq!(alike.groups.len(), 8);
        for group in 0..8 {
            let members = alike.members(group);
            assert!(members.iter().all(|&i| which[i as usize] == which[members[0] as usize]) && members.is_sorted());
        }
        let [queries, items] = [&queries, &items].map(|data| Table { data, dim });
        for &tilting in Tilting::ALL {
            let scorer = Scorer::new(tilting, &queries, &items).unwrap();
            for k in [1, 5, 700, m] {
                let want: Vec<(f64, usize)> = (0..n).flat_map(|i| scorer.exactly(i, 0..m, k)).collect();
                let found = top_k(tilting, &queries, &items, k).unwrap();
                let found: Vec<_> = found.scores.into_iter().zip(found.indices).collect();
                assert!(found == want, "{tilting:?} {k}");
            }
        }
    }

    // By whatever units, the answer is that of f64: also where bf16, or f32, tells nothing apart, loses all digits, or overflows.
    #[test]
    fn every_instruction_set_finds_the_best_in_f64() {
        let k = 5;
        let mut rng = rng();
        // Numbers about a mean, times a scale.
        let all = [(0.0, 1.0, 1.0), (1.0, 1e-3, 1.0), (0.0, 1.0, 1e-25), (0.0, 1.0, 1e19)];
        // Queries further apart than they are long in f32, and as pairs of bf16 too.
        for (dim, n, m, numbers) in [
            (WIDE, 31, ITEMS + 70, &all[..]),
            (67, 31, ITEMS + 70, &all),
            (1024, 13, 300, &all[..2]),
            (2048, 13, 300, &all[..2]),
        ] {
            for &(mean, spread, scale) in numbers {
                let mut draw = |rows: usize| -> Vec<f32> {
                    (0..rows * dim).map(|_| scale * (mean + spread * rng.random_range(-1f32..1.0))).collect()
                };
                let (u, v) = (draw(n), draw(m));
                let [u, v] = [&u, &v].map(|data| Table { data, dim });
                for &tilting in Tilting::ALL {
                    let scorer = Scorer::new(tilting, &u, &v).unwrap();
                    let want: Vec<(f64, usize)> = (0..n).flat_map(|i| scorer.exactly(i, 0..m, k)).collect();
                    for isa in Isa::available() {
                        let found = top_k_under(isa, tilting, &u, &v, k).unwrap();
                        let found: Vec<_> = found.scores.into_iter().zip(found.indices).collect();
                        assert_eq!(found, want, "{isa:?} {tilting:?} {dim} {mean} {scale:e}");
                    }
                }
            }
        }
    }

    // What bf16 settles of random rows: nearly all, or its pass was for nothing; of rows that it cannot tell apart, nothing.
    #[test]
    fn bf16_settles_what_it_can() {
        let Some((isa, pairs)) = Isa::available().into_iter().find_map(|isa| Some((isa, isa.pairs()?))) else {
            unreachable!("every machine emulates units for bf16");
        };
        let (n, m, dim, k) = (64, 5000, 96, 5);
        let mut rng = rng();
        for (spread, most) in [(1.0, 3), (1e-3, n)] {
            let mut draw = |rows: usize| -> Vec<f32> {
                (0..rows * dim).map(|_| 1.0 - spread + spread * rng.random_range(-1f32..1.0)).collect()
            };
            let (u, v) = (draw(n), draw(m));
            let [u, v] = [&u, &v].map(|data| Table { data, dim });
            let mut search = Settling::new(Scorer::new(Tilting::Cosine, &u, &v).unwrap(), k).unwrap();
            search.narrow::<Pair>(pairs).unwrap();
            assert!(search.open.len() <= most && (most < n || search.open.len() == n), "{isa:?} {}", search.open.len());
        }
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
                        // No sum is -0, which would rank behind 0.
                        _ => 0.0 + pairs.map(|(a, b)| a * b).sum::<f32>(),
                    }
                };
                let [u, v] = [&u, &v].map(|data| Table { data, dim });
                let ranks = own_ranks(tilting, &u, &v).unwrap();
                let k = n.min(7);
                let best = top_k(tilting, &u, &v, k).unwrap();
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
            let ranks = own_ranks(tilting, &u, &v).unwrap();
            assert!((0..copies).all(|i| ranks[i + n - copies] == ranks[i] + 1), "{tilting:?}");
        }
    }

    #[test]
    fn cosine_forgets_lengths() {
        let (n, dim) = (83, 2);
        let x: Vec<f32> = (0..n).flat_map(|i| [(i as f32 * 0.05).cos(), (i as f32 * 0.05).sin()]).collect();
        let stretched: Vec<f32> = x.iter().enumerate().map(|(k, x)| x * (1 + k / dim % 7) as f32).collect();
        let found = recall(Tilting::Cosine, &Table { data: &x, dim }, &Table { data: &stretched, dim }).unwrap();
        assert_eq!((found.u_to_v_at_1, found.v_to_u_at_5), (1.0, 1.0));
    }

    #[test]
    fn what_cannot_be_searched_is_refused() {
        fn table(data: &[f32]) -> Table<'_> {
            Table { data, dim: 2 }
        }
        let good = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        let message = |e: LossError| e.to_string();
        for &tilting in Tilting::ALL {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut broken = good;
                broken[3] = bad;
                let (rows, good) = (table(&broken), table(&good));
                for k in [1, 3] {
                    let refused = message(top_k(tilting, &good, &rows, k).unwrap_err());
                    assert_eq!(refused, "items row 1: found a value that is not finite, expected finite numbers");
                    assert!(message(top_k(tilting, &rows, &good, k).unwrap_err()).starts_with("queries row 1"));
                }
                assert!(message(recall(tilting, &good, &rows).unwrap_err()).contains("row 1"), "{tilting:?}");
            }
            for k in [0, 4] {
                let refused = message(top_k(tilting, &table(&good), &table(&good), k).unwrap_err());
                assert_eq!(refused, format!("k: found {k}, expected 1 to 3, the number of items"));
            }
            let narrow = Table { data: &good, dim: 3 };
            assert!(message(top_k(tilting, &narrow, &table(&good), 1).unwrap_err()).contains("found 3, expected 2"));
            assert!(
                message(recall(tilting, &table(&good), &table(&good[..4])).unwrap_err())
                    .contains("found 3, expected 2")
            );
            assert!(
                message(top_k(tilting, &table(&good), &table(&[]), 1).unwrap_err()).contains("items: found 0 rows")
            );
        }
        /// Zeros that nobody has asked for when they are refused.
        struct Many;
        impl Rows for Many {
            fn count(&self) -> usize {
                1 << 32
            }
            fn dim(&self) -> usize {
                2
            }
            fn read(&self, _: usize, _: &mut [f32]) {
                panic!("too many to be read");
            }
        }
        let refused = message(top_k(Tilting::L2, &table(&good), &Many, 1).unwrap_err());
        assert_eq!(refused, "items: found 4294967296 rows, expected fewer than 2^32");
        // Far apart, and numbers all the same.
        let far = [3e38f32, -3e38, 3e38, -3e38];
        let found = top_k(Tilting::L2, &Table { data: &far, dim: 1 }, &Table { data: &far, dim: 1 }, 2).unwrap();
        assert_eq!(found.indices, [0, 2, 1, 3, 0, 2, 1, 3]);
    }

    // Ones beside 2^24 are lost to f32: item 0 scores 10 and is given 0, item 1 scores 5.
    #[test]
    fn ranks_are_those_of_f64_under_dot() {
        let large = (1u32 << 24) as f32;
        let q = [1f32; 24];
        let mut x = [1f32; 24];
        (x[0], x[11]) = (large, -large);
        x[12..].copy_from_slice(&[5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let [queries, items] = [&q[..], &x].map(|data| Table { data, dim: 12 });
        assert_eq!(own_ranks(Tilting::Dot, &queries, &items).unwrap(), [0, 1]);
    }

    #[test]
    fn cosines_of_nothing_are_zero_and_have_no_sign() {
        assert_eq!(exact(Tilting::Cosine, &[0.0, 0.0], &[1.0, 2.0]).to_bits(), 0);
        assert_eq!(exact(Tilting::Cosine, &[1.0, 2.0], &[0.0, 0.0]).to_bits(), 0);
        // Below 0, but its square is below f64.
        assert_eq!(exact(Tilting::Cosine, &[3e38, 0.0, 1e-45], &[0.0, 3e38, -1e-45]).to_bits(), 0);
    }
}
