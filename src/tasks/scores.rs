//! Scores of all queries against all items, a tile at a time: the full matrix is never formed.

use crate::data::Rows;
use crate::device::Search;
pub use crate::device::cpu::search::exact;
use crate::device::cpu::search::{self, Operand};
use crate::device::cpu::{Isa, inner};
use crate::objective::{LossError, Tilting, shape};
use kernels::law::Product;
use rayon::prelude::*;
use std::ops::Range;

/// A run of scores of one query.
pub struct Scores<'a> {
    pub query: usize,
    /// Index of the first.
    pub first: usize,
    pub scores: &'a [f32],
    /// The largest of them.
    pub most: f32,
    /// What rounding can have done to them.
    pub slack: &'a Slack,
}

/// Which pairs of queries and items are looked at.
#[derive(Clone, Copy, PartialEq)]
pub enum Which {
    All,
    /// Those of one index, and some more.
    Diagonal,
}

/// Items made ready at a time.
pub const ITEMS: usize = 4096;
/// Queries of a task, about: a whole number of micro-kernels, and tasks enough that nobody waits long for the last.
pub const QUERIES: usize = 48;

/// What rounding can have done to the scores of some items.
#[derive(Clone, Copy)]
pub struct Slack {
    /// Roundings of a score.
    terms: usize,
    /// Whether scores stand for squared distances, which f64 rounds too.
    squares: bool,
    /// Norm of the longest item, and the least offset.
    longest: f64,
    lowest: f32,
    /// How far an item's operand is from it, at most.
    rounded: f64,
}

impl Slack {
    fn new(terms: usize, tilting: Tilting) -> Self {
        let squares = tilting.product() == Product::SquaredDistance;
        Slack { terms, squares, longest: 0.0, lowest: 0.0, rounded: 0.0 }
    }

    /// With an item of norm `size`, what is `added` to its scores, and an operand so far from it.
    fn with(self, size: f64, added: f32, rounded: f64) -> Self {
        Slack {
            longest: self.longest.max(size),
            lowest: self.lowest.min(added),
            rounded: self.rounded.max(rounded),
            ..self
        }
    }

    /// Of the items of both.
    fn and(self, other: &Slack) -> Self {
        self.with(other.longest, other.lowest, other.rounded)
    }

    /// How far a query's scores may be from what they stand for: `distance` is how far its operand is from it. Infinite
    /// where sums may overflow, and no number where a norm is none.
    pub fn of(&self, query_norm: f64, distance: f64) -> f64 {
        let product = (query_norm + distance) * (self.longest + self.rounded);
        if product > f64::from(f32::MAX) / 4.0 {
            return f64::INFINITY;
        }
        let loss = self.terms as f64 * f64::from(f32::EPSILON) * (product - f64::from(self.lowest));
        // Products that are too small for a normal number may count as nothing.
        let lost = self.terms as f64 * f64::from(f32::MIN_POSITIVE);
        let far = query_norm + self.longest;
        let square = if self.squares { self.terms as f64 * f64::EPSILON * far * far } else { 0.0 };
        loss + square + lost + distance * self.longest + (query_norm + distance) * self.rounded
    }
}

/// Queries and items, made comparable: a score orders items as s(query, item) does and differs from it by what depends
/// on the query alone: `dot` <q, x>, `cosine` <q, x/|x|>, `l2` <q, x> - |x|^2/2. Each is one sum in an order that
/// depends on the dimension alone, so that equal items tie wherever they are. Sums that are no number rank last.
pub struct Scorer<'a> {
    pub tilting: Tilting,
    pub queries: &'a dyn Rows,
    pub items: &'a dyn Rows,
    origin: Vec<f32>,
}

impl<'a> Scorer<'a> {
    /// # Errors
    /// [`LossError::Shape`] when the two have different dimensions, or there is no item or 2^32 of them;
    /// [`LossError::NotFinite`] of a query.
    pub fn new(tilting: Tilting, queries: &'a dyn Rows, items: &'a dyn Rows) -> Result<Self, LossError> {
        shape("columns of the queries", queries.dim(), items.dim())?;
        if items.count() == 0 {
            return Err(LossError::Shape { what: "items", found: "0 rows".into(), expected: "at least one".into() });
        }
        // Their indices are u32 inside.
        if items.count() > u32::MAX as usize {
            let found = format!("{} rows", items.count());
            return Err(LossError::Shape { what: "items", found, expected: "fewer than 2^32".into() });
        }
        check_finite("queries", queries)?;
        let squares = tilting.product() == Product::SquaredDistance;
        Ok(Scorer { tilting, queries, items, origin: if squares { origin(items) } else { Vec::new() } })
    }

    /// The same for some of the queries and of the items.
    pub fn of(&self, queries: &'a dyn Rows, items: &'a dyn Rows) -> Self {
        Scorer { queries, items, origin: self.origin.clone(), ..*self }
    }

    /// The best `k` of `among` for query `i`, by [`exact`] scores; ties: the lowest index.
    pub fn exactly(&self, i: usize, among: impl Iterator<Item = usize>, k: usize) -> Vec<(f64, usize)> {
        /// Items read at a time.
        const FEW: usize = 32;
        let dim = self.items.dim();
        let mut query = vec![0f32; dim];
        self.queries.read(i, &mut query);
        let mut found: Vec<(f64, usize)> = among.map(|j| (0.0, j)).collect();
        let (mut items, mut scores) = (vec![0f32; FEW * dim], [0f64; FEW]);
        for few in found.chunks_mut(FEW) {
            let (items, scores) = (&mut items[..few.len() * dim], &mut scores[..few.len()]);
            few.iter().zip(items.chunks_exact_mut(dim)).for_each(|(&(_, j), item)| self.items.read(j, item));
            search::exact_each(self.tilting, &query, items, scores);
            few.iter_mut().zip(scores).for_each(|(found, score)| found.0 = *score);
        }
        best(found, k)
    }

    /// What scores of `query`, as [`Self::read_queries`] has it, and of the items `among` are at least, by f64.
    pub fn at_least(&self, query: &[f32], among: impl Iterator<Item = usize>) -> Vec<f64> {
        let (mut item, none) = (vec![0f32; self.items.dim()], Slack::new(self.terms(), self.tilting));
        let norm = inner(query, query).sqrt();
        let one = |j: usize| {
            self.items.read(j, &mut item);
            self.shift(&mut item);
            let square = inner(&item, &item);
            let (added, size) = ready(self.tilting, square);
            let along = inner(query, &item) * if size > 0.0 { size / square.sqrt() } else { 1.0 };
            let least = along + f64::from(added) - none.with(size, added, 0.0).of(norm, 0.0);
            if least.is_nan() { f64::NEG_INFINITY } else { least }
        };
        among.map(one).collect()
    }

    /// Twice what a sum of so many products, each of rounded numbers, can lose.
    fn terms(&self) -> usize {
        self.items.dim() + 8
    }

    fn shift(&self, row: &mut [f32]) {
        row.iter_mut().zip(&self.origin).for_each(|(x, c)| *x -= c);
    }

    /// Queries `range` as scores have them, `[range, dim]`.
    pub fn read_queries(&self, range: Range<usize>, out: &mut [f32]) {
        self.queries.read(range.start, out);
        out.chunks_exact_mut(self.queries.dim()).for_each(|row| self.shift(row));
    }

    /// Has `device` hold the items, made ready.
    pub fn hold(&self, device: &mut dyn Search) -> Result<Slack, LossError> {
        check_finite("items", self.items)?;
        let (count, dim) = (self.items.count(), self.items.dim());
        let (mut slack, isa) = (Slack::new(device.terms(dim), self.tilting), Isa::best());
        device
            .hold(count, dim, &mut |first, rows, offsets| {
                self.items.read(first, rows);
                let sizes = rows.par_chunks_exact_mut(dim).zip(&mut *offsets).map(|(row, offset)| {
                    self.shift(row);
                    let mut square = [0.0];
                    search::squares::<f32>(isa, row, dim, self.tilting.unit_rows(), &mut square);
                    let (added, size) = ready(self.tilting, square[0]);
                    *offset = added;
                    (size, added)
                });
                let (size, added) = sizes.reduce(|| (0.0, 0.0), |a, b| (f64::max(a.0, b.0), f32::min(a.1, b.1)));
                slack = slack.with(size, added, 0.0);
            })
            .map_err(LossError::Device)?;
        Ok(slack)
    }

    /// Calls `f` with runs of scores, sums in f32, of every query and its state, items in order. On all cores: queries
    /// share them.
    ///
    /// # Errors
    /// [`LossError::NotFinite`] of an item, when `f` has been called for those before it.
    pub fn scan<T: Send>(
        &self,
        which: Which,
        states: &mut [T],
        f: impl Fn(Scores<'_>, &mut T) + Sync,
    ) -> Result<Slack, LossError> {
        self.scan_as::<f32, T>(Isa::best(), which, states, f)
    }

    /// [`scan`](Self::scan) of scores of operands `O`.
    ///
    /// # Errors
    /// As [`Self::scan`].
    pub fn scan_as<O: Operand, T: Send>(
        &self,
        isa: O::Isa,
        which: Which,
        states: &mut [T],
        f: impl Fn(Scores<'_>, &mut T) + Sync,
    ) -> Result<Slack, LossError> {
        let (n, m, dim) = (self.queries.count(), self.items.count(), self.items.dim());
        let none = Slack::new(self.terms(), self.tilting);
        let mut slack = none;
        let mut packed = vec![O::default(); search::packed_len::<O>(ITEMS.min(m), dim)];
        let (mut offset, mut sizes) = (vec![0f32; ITEMS], vec![(0f64, 0f64); ITEMS]);
        for first_item in (0..m).step_by(ITEMS) {
            let cols = ITEMS.min(m - first_item);
            let queries = if which == Which::All { 0..n } else { first_item.min(n)..n.min(first_item + cols) };
            if queries.is_empty() {
                break;
            }
            let (offset, sizes) = (&mut offset[..cols], &mut sizes[..cols]);
            let mut slacks = vec![none; cols.div_ceil(search::COLS)];
            let parts = packed.par_chunks_mut(search::COLS * O::count(dim)).zip(offset.par_chunks_mut(search::COLS));
            parts.zip(sizes.par_chunks_mut(search::COLS)).enumerate().for_each_init(
                <(Vec<f32>, Vec<O>, Vec<f64>)>::default,
                |(rows, operands, distances), (part, ((packed, offset), sizes))| {
                    rows.resize(offset.len() * dim, 0.0);
                    distances.resize(offset.len(), 0.0);
                    self.items.read(first_item + part * search::COLS, rows);
                    rows.chunks_exact_mut(dim).for_each(|row| self.shift(row));
                    let squares = &mut *distances;
                    search::squares::<O>(isa, rows, dim, self.tilting.unit_rows(), squares);
                    for ((square, offset), (size, _)) in squares.iter().zip(offset).zip(&mut *sizes) {
                        (*offset, *size) = ready(self.tilting, *square);
                    }
                    search::pack_items(isa, rows, dim, operands, distances, packed);
                    sizes.iter_mut().zip(distances).for_each(|((_, rounded), distance)| *rounded = *distance);
                },
            );
            for (item, &(size, rounded)) in (first_item..).zip(&*sizes) {
                if !size.is_finite() {
                    // Or it is too far from the origin.
                    let mut row = vec![0f32; dim];
                    self.items.read(item, &mut row);
                    finite("items", item, &row)?;
                }
                let (part, added) = ((item - first_item) / search::COLS, offset[item - first_item]);
                slacks[part] = slacks[part].with(size, added, rounded);
            }
            let (offset, slacks) = (&*offset, &slacks[..]);
            slack = slacks.iter().fold(slack, Slack::and);
            // As many tasks as keep a few cores busy to the end.
            let tasks = queries.len().div_ceil(QUERIES).next_multiple_of(4);
            let rows = queries.len().div_ceil(tasks).next_multiple_of(12);
            let tasks = states[queries.clone()].par_chunks_mut(rows).enumerate();
            tasks.for_each_init(
                <(Vec<f32>, Vec<O>, Vec<f64>, Vec<f32>)>::default,
                |(own, operands, distances, tile), (task, states)| {
                    let start = queries.start + task * rows;
                    own.resize(states.len() * dim, 0.0);
                    distances.resize(states.len(), 0.0);
                    self.read_queries(start..start + states.len(), own);
                    let own = search::queries(isa, own, dim, operands, distances);
                    search::each_row(isa, own, dim, &packed, offset, tile, |i, first, scores, most| {
                        let (slack, query) = (&slacks[first / search::COLS], start + i);
                        f(Scores { query, first: first_item + first, scores, most, slack }, &mut states[i]);
                    });
                },
            );
        }
        Ok(slack)
    }
}

/// The `k` largest scores and their items; ties: the lowest index.
pub fn best(mut found: Vec<(f64, usize)>, k: usize) -> Vec<(f64, usize)> {
    let order = |a: &(f64, usize), b: &(f64, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    found.select_nth_unstable_by(k - 1, order);
    found.truncate(k);
    found.sort_unstable_by(order);
    found
}

/// Fails where row number `index` of `what` holds what is no number.
fn finite(what: &'static str, index: usize, row: &[f32]) -> Result<(), LossError> {
    if row.iter().all(|x| x.is_finite()) { Ok(()) } else { Err(LossError::NotFinite { what, row: Some(index) }) }
}

/// Fails at the first of `rows` that holds what is no number.
pub fn check_finite(what: &'static str, rows: &dyn Rows) -> Result<(), LossError> {
    let bad = (0..rows.count()).into_par_iter().map_init(
        || vec![0f32; rows.dim()],
        |row, i| {
            rows.read(i, row);
            finite(what, i, row).err()
        },
    );
    bad.find_map_first(|bad| bad).map_or(Ok(()), Err)
}

/// What to add to an item's inner product with a query, and the item's norm in it, of an item of squared norm `square`.
fn ready(tilting: Tilting, square: f64) -> (f32, f64) {
    if !square.is_finite() {
        return (0.0, f64::INFINITY);
    }
    match tilting.product() {
        // -|q - x|^2/2 = <q, x> - |x|^2/2 - |q|^2/2.
        Product::SquaredDistance => ((-0.5 * square) as f32, square.sqrt()),
        Product::Inner if tilting.unit_rows() && square > 0.0 => (0.0, 1.0),
        Product::Inner => (0.0, square.sqrt()),
    }
}

/// A point amid the items from which distances lose no digits: each coordinate's mean, rounded to a power of two below
/// its spread, so that exact numbers stay exact.
fn origin(items: &dyn Rows) -> Vec<f32> {
    let (count, dim) = (items.count(), items.dim());
    let mut row = vec![0f32; dim];
    let mut sums = |f: &dyn Fn(usize, f64) -> f64| {
        let mut sums = vec![0f64; dim];
        for i in 0..count {
            items.read(i, &mut row);
            sums.iter_mut().zip(&row).enumerate().for_each(|(k, (sum, &x))| *sum += f(k, f64::from(x)));
        }
        sums.iter_mut().for_each(|sum| *sum /= count as f64);
        sums
    };
    let mean = sums(&|_, x| x);
    let variance = sums(&|k, x| (x - mean[k]) * (x - mean[k]));
    mean.iter()
        .zip(&variance)
        .map(|(mean, variance)| {
            let grid = variance.sqrt().log2().floor().exp2();
            if grid > 0.0 { ((mean / grid).round() * grid) as f32 } else { *mean as f32 }
        })
        .collect()
}
