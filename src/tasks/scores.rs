//! Scores of all queries against all items, a block at a time: the full matrix is never formed.

use crate::data::Rows;
use crate::device::cpu::Cpu;
use crate::device::{Device, Gemm, View, ViewMut};
use crate::objective::{Tilting, Write};
use kernels::law::Product;
use rayon::prelude::*;
use std::ops::Range;

/// A block of scores, `[queries.len(), items.len()]`.
pub struct Block<'a> {
    pub queries: Range<usize>,
    pub items: Range<usize>,
    pub scores: &'a [f32],
    /// How far a query's scores here may be from what they stand for, by rounding, `[queries.len()]`.
    pub slack: &'a [f32],
    /// The first block that its queries meet; it holds their own items, where there are as many.
    pub opening: bool,
    /// The last that they meet.
    pub closing: bool,
}

/// Queries and items of a block: its scores stay in cache.
pub const QUERIES: usize = 512;
pub const ITEMS: usize = 4 * QUERIES;

/// Calls `f` with each block of scores, beginning for each range of queries with the items of the same indices. A score
/// orders items as s(query, item) does and differs from it by what depends on the query alone: `dot` <q, x>,
/// `cosine` <q, x/|x|>, `l2` <q, x> - |x|^2/2. Each is one sum in an order that depends on the dimension alone, so that
/// equal items tie wherever they are. Sums that are no number rank last.
///
/// # Panics
/// When the two have different dimensions.
pub fn each_block(tilting: Tilting, queries: &dyn Rows, items: &dyn Rows, mut f: impl FnMut(Block<'_>)) {
    let (n, m, dim) = (queries.count(), items.count(), items.dim());
    assert_eq!(queries.dim(), dim, "queries and items of different dimensions");
    let device = Cpu::<f32>::new();
    let origin = if tilting.product() == Product::SquaredDistance { origin(items) } else { vec![0.0; dim] };
    let shift = |row: &mut [f32]| row.iter_mut().zip(&origin).for_each(|(x, c)| *x -= c);
    let (mut left, mut right) = (device.alloc(QUERIES * dim), device.alloc(ITEMS * dim));
    let mut block = device.alloc(QUERIES * ITEMS);
    let (mut host, mut offset, mut scores) = (vec![0f32; ITEMS * dim], vec![0f32; ITEMS], vec![0f32; QUERIES * ITEMS]);
    let (mut sizes, mut slack) = (vec![0f64; ITEMS], vec![0f32; QUERIES]);
    // Twice what a sum of so many products, each of rounded numbers, can lose.
    let loss = (dim + 8) as f64 * f64::from(f32::EPSILON);
    for first_query in (0..n).step_by(QUERIES) {
        let rows = QUERIES.min(n - first_query);
        queries.read(first_query, &mut host[..rows * dim]);
        host[..rows * dim].par_chunks_exact_mut(dim).for_each(shift);
        device.upload(&host[..rows * dim], ViewMut { buf: &mut left, at: 0..rows * dim });
        let norms: Vec<f64> = host[..rows * dim].par_chunks_exact(dim).map(|query| square(query).sqrt()).collect();
        let blocks = m.div_ceil(ITEMS);
        for turn in 0..blocks {
            let first_item = (first_query / ITEMS + turn) % blocks * ITEMS;
            let cols = ITEMS.min(m - first_item);
            // A few rows a time, on all cores.
            const PART: usize = 64;
            let parts = host[..cols * dim].par_chunks_mut(PART * dim).zip(offset.par_chunks_mut(PART));
            parts.zip(sizes.par_chunks_mut(PART)).enumerate().for_each(|(part, ((to, offset), sizes))| {
                items.read(first_item + part * PART, to);
                for ((row, offset), size) in to.chunks_exact_mut(dim).zip(offset).zip(sizes) {
                    shift(row);
                    *offset = prepare(tilting, row);
                    *size = square(row).sqrt();
                }
            });
            let longest = sizes[..cols].iter().fold(0f64, |most, &size| most.max(size));
            let lowest = offset[..cols].iter().fold(0f32, |least, &offset| least.min(offset));
            for (slack, norm) in slack.iter_mut().zip(&norms) {
                *slack = (loss * (norm * longest - f64::from(lowest))) as f32;
            }
            device.upload(&host[..cols * dim], ViewMut { buf: &mut right, at: 0..cols * dim });
            device.gemm(
                Gemm { m: rows, n: cols, k: dim, transpose_a: false, transpose_b: true },
                View { buf: &left, at: 0..rows * dim },
                View { buf: &right, at: 0..cols * dim },
                Write::Set(ViewMut { buf: &mut block, at: 0..rows * cols }),
            );
            let scores = &mut scores[..rows * cols];
            device.download(View { buf: &block, at: 0..rows * cols }, scores);
            scores.par_chunks_exact_mut(cols).for_each(|row| {
                row.iter_mut().zip(&offset).for_each(|(s, o)| *s = (*s + o).max(f32::NEG_INFINITY));
            });
            f(Block {
                queries: first_query..first_query + rows,
                items: first_item..first_item + cols,
                scores,
                slack: &slack[..rows],
                opening: turn == 0,
                closing: turn + 1 == blocks,
            });
        }
    }
}

/// `|x|^2`.
fn square(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

/// Makes an item ready for an inner product with a query, and returns what to add to that.
fn prepare(tilting: Tilting, item: &mut [f32]) -> f32 {
    let square = square(item);
    if tilting.unit_rows() && square > 0.0 {
        item.iter_mut().for_each(|x| *x = (f64::from(*x) / square.sqrt()) as f32);
    }
    match tilting.product() {
        // -|q - x|^2/2 = <q, x> - |x|^2/2 - |q|^2/2.
        Product::SquaredDistance => (-0.5 * square) as f32,
        Product::Inner => 0.0,
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
