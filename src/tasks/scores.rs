//! Scores of all queries against all items, a tile at a time: the full matrix is never formed.

use crate::data::Rows;
use crate::device::cpu::{Isa, search};
use crate::device::{DeviceError, Search};
use crate::objective::Tilting;
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
}

/// Which pairs of queries and items are looked at.
#[derive(Clone, Copy, PartialEq)]
pub enum Pairs {
    All,
    /// Those of one index, and some more.
    Diagonal,
}

/// Items made ready at a time.
pub const ITEMS: usize = 4096;
/// Queries of a task, about: a whole number of micro-kernels, and tasks enough that nobody waits long for the last.
pub const QUERIES: usize = 48;

/// What rounding can have done to the scores of a pass over all items.
#[derive(Clone, Copy)]
pub struct Slack {
    /// Roundings of a score.
    terms: usize,
    /// Norm of the longest item, and the least offset.
    longest: f64,
    lowest: f32,
}

impl Slack {
    /// How far a query's scores may be from what they stand for.
    pub fn of(&self, query_norm: f64) -> f32 {
        let loss = self.terms as f64 * f64::from(f32::EPSILON);
        (loss * (query_norm * self.longest - f64::from(self.lowest))) as f32
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
    /// # Panics
    /// When the two have different dimensions.
    pub fn new(tilting: Tilting, queries: &'a dyn Rows, items: &'a dyn Rows) -> Self {
        assert_eq!(queries.dim(), items.dim(), "queries and items of different dimensions");
        let squares = tilting.product() == Product::SquaredDistance;
        Scorer { tilting, queries, items, origin: if squares { origin(items) } else { Vec::new() } }
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
    pub fn hold(&self, device: &mut dyn Search) -> Result<Slack, DeviceError> {
        let (count, dim) = (self.items.count(), self.items.dim());
        let mut slack = Slack { terms: device.terms(dim), longest: 0.0, lowest: 0.0 };
        device.hold(count, dim, &mut |first, rows, offsets| {
            self.items.read(first, rows);
            let ready = rows.par_chunks_exact_mut(dim).zip(&mut *offsets).map(|(row, offset)| {
                self.shift(row);
                let (added, size) = prepare(self.tilting, row);
                *offset = added;
                (size, added)
            });
            let (size, added) = ready.reduce(|| (0.0, 0.0), |a, b| (f64::max(a.0, b.0), f32::min(a.1, b.1)));
            (slack.longest, slack.lowest) = (slack.longest.max(size), slack.lowest.min(added));
        })?;
        Ok(slack)
    }

    /// Calls `f` with runs of scores of every query and its state, items in order. On all cores: queries share them.
    pub fn scan<T: Send>(&self, pairs: Pairs, states: &mut [T], f: impl Fn(Scores<'_>, &mut T) + Sync) -> Slack {
        let (n, m, dim) = (self.queries.count(), self.items.count(), self.items.dim());
        let isa = Isa::best();
        // Twice what a sum of so many products, each of rounded numbers, can lose.
        let mut slack = Slack { terms: dim + 8, longest: 0.0, lowest: 0.0 };
        let mut packed = vec![0f32; search::packed_len(ITEMS.min(m), dim)];
        let (mut offset, mut sizes) = (vec![0f32; ITEMS], vec![0f64; ITEMS]);
        for first_item in (0..m).step_by(ITEMS) {
            let cols = ITEMS.min(m - first_item);
            let queries = if pairs == Pairs::All { 0..n } else { first_item.min(n)..n.min(first_item + cols) };
            if queries.is_empty() {
                break;
            }
            let (offset, sizes) = (&mut offset[..cols], &mut sizes[..cols]);
            let parts = packed.par_chunks_mut(search::COLS * dim).zip(offset.par_chunks_mut(search::COLS));
            parts.zip(sizes.par_chunks_mut(search::COLS)).enumerate().for_each_init(
                Vec::new,
                |rows: &mut Vec<f32>, (part, ((packed, offset), sizes))| {
                    rows.resize(offset.len() * dim, 0.0);
                    self.items.read(first_item + part * search::COLS, rows);
                    for ((row, offset), size) in rows.chunks_exact_mut(dim).zip(offset).zip(sizes) {
                        self.shift(row);
                        (*offset, *size) = prepare(self.tilting, row);
                    }
                    search::pack_items(isa, rows, dim, packed);
                },
            );
            let offset = &*offset;
            slack.longest = sizes.iter().fold(slack.longest, |most, &size| most.max(size));
            slack.lowest = offset.iter().fold(slack.lowest, |least, &offset| least.min(offset));
            // As many tasks as keep a few cores busy to the end.
            let tasks = queries.len().div_ceil(QUERIES).next_multiple_of(4);
            let rows = queries.len().div_ceil(tasks).next_multiple_of(12);
            let tasks = states[queries.clone()].par_chunks_mut(rows).enumerate();
            tasks.for_each_init(Default::default, |(own, tile): &mut (Vec<f32>, Vec<f32>), (task, states)| {
                let start = queries.start + task * rows;
                own.resize(states.len() * dim, 0.0);
                self.read_queries(start..start + states.len(), own);
                search::each_row(isa, own, dim, &packed, offset, tile, |i, first, scores, most| {
                    f(Scores { query: start + i, first: first_item + first, scores, most }, &mut states[i]);
                });
            });
        }
        slack
    }
}

/// `|x|^2`, in eight sums: one would wait for each addition.
pub fn square(x: &[f32]) -> f64 {
    let mut sums = [0f64; 8];
    let parts = x.chunks_exact(8);
    let rest: f64 = parts.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
    }
    sums.iter().sum::<f64>() + rest
}

/// Makes an item ready for an inner product with a query; returns what to add to that, and its norm then.
fn prepare(tilting: Tilting, item: &mut [f32]) -> (f32, f64) {
    let square = square(item);
    let mut norm = square.sqrt();
    if tilting.unit_rows() && square > 0.0 {
        item.iter_mut().for_each(|x| *x = (f64::from(*x) / square.sqrt()) as f32);
        norm = 1.0;
    }
    match tilting.product() {
        // -|q - x|^2/2 = <q, x> - |x|^2/2 - |q|^2/2.
        Product::SquaredDistance => ((-0.5 * square) as f32, norm),
        Product::Inner => (0.0, norm),
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

/// s(query, item) at tau = 1, in f64.
pub fn exact(tilting: Tilting, query: &[f32], item: &[f32]) -> f64 {
    let pairs = || query.iter().zip(item).map(|(&q, &x)| (f64::from(q), f64::from(x)));
    let inner = || pairs().map(|(q, x)| q * x).sum::<f64>();
    match tilting.product() {
        Product::SquaredDistance => -0.5 * pairs().map(|(q, x)| (q - x) * (q - x)).sum::<f64>(),
        Product::Inner if tilting.unit_rows() => {
            let norms = (pairs().map(|(q, _)| q * q).sum::<f64>() * pairs().map(|(_, x)| x * x).sum::<f64>()).sqrt();
            if norms > 0.0 { inner() / norms } else { 0.0 }
        }
        Product::Inner => inner(),
    }
}
