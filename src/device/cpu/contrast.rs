//! Losses on the CPU: which fused passes each objective takes, and the numbers around them.

use super::buffers::{Buffer, Threads, reset, sized};
use super::fused::{Logits, Pull, SPREAD};
use super::kept::{Grid, Kept};
use super::law::{Law, Normalisers, RowSums, Target};
use super::operand::{Element, Side, Similarity, pack_columns};
use super::simd::{Isa, Pair};
use super::strips::Strips;
use super::sweep::{Axis, is_for_one};
use super::tally::{Tallies, Want};
use super::{inner, joint, together};
use crate::objective::{Batch, Gradients, Loss, Matrix, Objective, Storage, Value, Write, counts::Counts};
use kernels::law::{Num, Product, decay};
use rayon::prelude::*;
use std::ops::Range;

/// Rows handled by one task of a pass over embeddings.
pub(super) const CHUNK: usize = 128;

/// Norms of rows whose products, also with sums of exponentials, are numbers of f32.
pub(super) const MODERATE: Range<f64> = 1e-15..1e15;

/// Everything a call needs beyond its inputs and outputs; grows to the largest call and stays.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) counts: Counts,
    pub(super) packed: Buffer,
    pub(super) middle: Vec<f32>,
    pub(super) inverse_u: Vec<f32>,
    pub(super) inverse_v: Vec<f32>,
    pub(super) rows: Tallies,
    pub(super) cols: Tallies,
    pub(super) row_normalisers: Normalisers,
    pub(super) col_normalisers: Normalisers,
    pub(super) pulled: Pulled,
    pub(super) threads: Threads,
    pub(super) kept: Kept,
    /// Bytes that kept logits may take.
    pub(super) budget: usize,
    pub(super) mmd: super::mmd::Scratch,
    pub(super) pairings: super::shuffled::Scratch,
}

impl Scratch {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let Pulled { row_sums, col_sums, grad_u, grad_v } = &self.pulled;
        let floats = [&self.middle, &self.inverse_u, &self.inverse_v, col_sums, grad_u, grad_v];
        4 * floats.iter().map(|v| v.capacity()).sum::<usize>()
            + size_of::<RowSums>() * row_sums.capacity()
            + self.packed.bytes()
            + self.counts.bytes()
            + self.rows.bytes()
            + self.cols.bytes()
            + self.row_normalisers.bytes()
            + self.col_normalisers.bytes()
            + self.threads.bytes()
            + self.kept.bytes()
            + self.mmd.bytes()
            + self.pairings.bytes()
    }
}

/// What pass 2 leaves beside the caller's outputs.
#[derive(Debug, Default)]
pub(super) struct Pulled {
    pub(super) row_sums: Vec<RowSums>,
    pub(super) col_sums: Vec<f32>,
    /// Gradients of the rows the product sees, before they go through the tilting, where they are added to the caller's.
    pub(super) grad_u: Vec<f32>,
    pub(super) grad_v: Vec<f32>,
}

/// What a tilting does to embeddings before the product, and the products' scale.
pub(super) struct Tilted<'a> {
    pub(super) u: Side<'a>,
    pub(super) v: Side<'a>,
    pub(super) product: Product,
    /// `dS/d product`.
    pub(super) scale: f64,
    pub(super) tau: f64,
    /// Norms of the longest rows of u and of v, of squared distances how far they are from one point.
    pub(super) longest: [f64; 2],
    /// Smallest and largest logit that embeddings this long can have, without offsets.
    reach: [f64; 2],
}

impl<'a> Tilted<'a> {
    /// Of a batch whose inverse norms (cosine) are known; `middle` is for a row amid the others (l2).
    pub(super) fn new(
        loss: &Loss,
        batch: &Batch<'a>,
        middle: &mut Vec<f32>,
        inverse_u: &'a [f32],
        inverse_v: &'a [f32],
        threads: &Threads,
    ) -> Self {
        middle.clear();
        if loss.tilting.product() == Product::SquaredDistance {
            middle_row([batch.u, batch.v], middle, threads);
        }
        let u = Side { rows: batch.u, inverse: inverse_u };
        let v = Side { rows: batch.v, inverse: inverse_v };
        let (product, scale) = (loss.tilting.product(), loss.tilting.scale() / loss.tau);
        // A unit row's norm is 1 to a few rounding errors.
        let longest =
            if loss.tilting.unit_rows() { [1.001; 2] } else { [u, v].map(|side| longest(&side, middle, threads)) };
        let [a, b] = longest;
        let reach = match product {
            Product::Inner => [-(scale * a * b).abs(), (scale * a * b).abs()],
            Product::SquaredDistance => [scale.min(0.0) * (a + b).powi(2), scale.max(0.0) * (a + b).powi(2)],
        };
        Tilted { u, v, product, scale, tau: loss.tau, longest, reach }
    }

    /// Smallest and largest logit there can be.
    fn range(&self, offset: Option<&[f32]>) -> [f64; 2] {
        let [mut low, mut high] = self.reach;
        if let Some(offset) = offset {
            low += f64::from(offset.iter().fold(f32::INFINITY, |a, &b| a.min(b)));
            high += f64::from(offset.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)));
        }
        [low, high]
    }

    /// Turns `acc = G other` into the gradient of `side`'s rows, in place or added to `out`:
    /// times dS/d product, through the product's other factor and the row normalisation; of squared distances `acc` is of
    /// differences, see [`Pull::apart`]. Returns the sum of `<row, acc>`.
    pub(super) fn finish(&self, side: &Side<'_>, acc: Accumulated<'_>, threads: &Threads) -> f64 {
        let dim = side.rows.dim;
        let transform = |first: usize, acc: &mut [f32]| -> f64 {
            threads.with(|ws| {
                let rows = acc.len() / dim;
                let x = ws.rows(rows * dim);
                side.read(first..first + rows, x);
                let pairs = acc.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).enumerate();
                pairs.map(|(i, (acc, x))| self.transform_row(side, first + i, x, acc)).sum()
            })
        };
        let mut along = threads.along();
        along.resize(side.rows.rows.div_ceil(CHUNK), 0.0);
        let parts = along.par_iter_mut().with_min_len(together(CHUNK * dim)).enumerate();
        match acc {
            Accumulated::InPlace(out) => parts
                .zip(out.par_chunks_mut(CHUNK * dim))
                .for_each(|((c, along), out)| *along = transform(c * CHUNK, out)),
            Accumulated::AddTo { acc, out } => {
                parts.zip(acc.par_chunks_mut(CHUNK * dim)).zip(out.par_chunks_mut(CHUNK * dim)).for_each(
                    |(((c, along), acc), out)| {
                        *along = transform(c * CHUNK, acc);
                        out.iter_mut().zip(&*acc).for_each(|(o, a)| *o += a);
                    },
                );
            }
        }
        // One order for any number of threads.
        along.iter().sum()
    }

    fn transform_row(&self, side: &Side<'_>, i: usize, x: &[f32], acc: &mut [f32]) -> f64 {
        let along = inner(acc, x);
        match self.product {
            Product::Inner => {
                let (mut scale, mut own) = (self.scale as f32, 0.0);
                if let Some(&inverse) = side.inverse.get(i) {
                    // d(x/|x|): off the row's own direction, over its norm.
                    own = along as f32;
                    scale *= inverse;
                }
                acc.iter_mut().zip(x).for_each(|(a, &x)| *a = scale * (*a - own * x));
            }
            Product::SquaredDistance => {
                let scale = -2.0 * self.scale as f32;
                acc.iter_mut().for_each(|a| *a *= scale);
            }
        }
        along
    }
}

/// Where a side's `G other` was accumulated.
pub(super) enum Accumulated<'a> {
    /// In the caller's output, to be overwritten.
    InPlace(&'a mut [f32]),
    /// In scratch, to be added to the caller's output.
    AddTo { acc: &'a mut [f32], out: &'a mut [f32] },
}

impl<'a> Accumulated<'a> {
    pub(super) fn new(out: Option<Write<&'a mut [f32]>>, scratch: &'a mut Vec<f32>) -> Option<Self> {
        Some(match out? {
            Write::Set(out) => Accumulated::InPlace(out),
            Write::Add(out) => Accumulated::AddTo { acc: sized(scratch, out.len()), out },
        })
    }

    pub(super) fn acc(&mut self) -> &mut [f32] {
        match self {
            Accumulated::InPlace(acc) | Accumulated::AddTo { acc, .. } => acc,
        }
    }
}

/// 1/|row|; 0 for a row whose norm is not a normal number.
fn inverse_norms(rows: Matrix<'_>, out: &mut Vec<f32>, threads: &Threads) {
    let dim = rows.dim;
    out.resize(rows.rows, 0.0);
    out.par_chunks_mut(CHUNK).with_min_len(together(CHUNK * dim)).enumerate().for_each(|(c, out)| {
        threads.with(|ws| {
            let x = ws.rows(out.len() * dim);
            Side::plain(rows).read(c * CHUNK..c * CHUNK + out.len(), x);
            for (out, x) in out.iter_mut().zip(x.chunks_exact(dim)) {
                let norm = inner(x, x).sqrt();
                *out = if norm < f64::from(f32::MIN_POSITIVE) { 0.0 } else { (1.0 / norm) as f32 };
            }
        });
    });
}

/// The largest norm of a side's rows, or distance from a point `from`.
fn longest(side: &Side<'_>, from: &[f32], threads: &Threads) -> f64 {
    let dim = side.rows.dim;
    let chunk = |start: usize| {
        threads.with(|ws| {
            let range = start..side.rows.rows.min(start + CHUNK);
            let x = ws.rows(range.len() * dim);
            side.read(range, x);
            let rows = x.chunks_exact_mut(dim).map(|x| {
                x.iter_mut().zip(from).for_each(|(x, from)| *x -= from);
                inner(x, x)
            });
            rows.fold(0.0, f64::max)
        })
    };
    let chunks = (0..side.rows.rows.div_ceil(CHUNK)).into_par_iter().with_min_len(together(CHUNK * dim));
    chunks.map(|c| chunk(c * CHUNK)).reduce(|| 0.0, f64::max).sqrt() * 1.001
}

/// A point amid the rows of both sides: each coordinate's median over a few of them. A mean would follow one row that is
/// far from all others.
fn middle_row(sides: [Matrix<'_>; 2], out: &mut Vec<f32>, threads: &Threads) {
    /// Of each side.
    const FEW: usize = 8;
    let dim = sides[0].dim;
    let counts = sides.map(|side| side.rows.min(FEW));
    threads.with(|ws| {
        let some = ws.rows((counts[0] + counts[1]) * dim);
        let mut free = some.chunks_exact_mut(dim);
        for (side, count) in sides.into_iter().zip(counts) {
            for (k, to) in (0..count).zip(&mut free) {
                let at = k * side.rows / count;
                Side::plain(side).read(at..at + 1, to);
            }
        }
        out.extend((0..dim).map(|k| {
            let mut column = [0f32; 2 * FEW];
            let column = &mut column[..counts[0] + counts[1]];
            column.iter_mut().zip(some.chunks_exact(dim)).for_each(|(x, row)| *x = row[k]);
            column.sort_unstable_by(f32::total_cmp);
            column[column.len() / 2]
        }));
    });
}

/// Evaluates a validated batch.
pub fn evaluate(isa: Isa, scratch: &mut Scratch, loss: &Loss, batch: &Batch<'_>, gradients: Gradients<'_>) -> Value {
    scratch.threads.fit();
    let Scratch { inverse_u, inverse_v, threads, .. } = scratch;
    for (rows, inverse) in [(batch.u, inverse_u), (batch.v, inverse_v)] {
        inverse.clear();
        if loss.tilting.unit_rows() {
            inverse_norms(rows, inverse, threads);
        }
    }
    let form = match loss.objective {
        Objective::Conditional { lambda_u, lambda_v } => Form::Softmax(Over::Each { lambda_u, lambda_v }),
        Objective::Joint => Form::Softmax(Over::All),
        Objective::Sigmoid { bias } => Form::Sigmoid { bias },
        Objective::JointShuffled { pairings, seed } => {
            return super::shuffled::evaluate(scratch, loss, batch, gradients, pairings, seed);
        }
        Objective::Mmd { .. } | Objective::JointMmd => {
            return super::mmd::evaluate(isa, scratch, loss, batch, gradients);
        }
    };
    let halves = matches!((batch.u.data, batch.v.data), (Storage::Bf16(_), Storage::Bf16(_)));
    // Products of rows as they are stored are numbers of f32 only where norms are moderate.
    let moderate = |rows: Matrix<'_>, inverse: &[f32]| {
        if loss.tilting.unit_rows() {
            inverse.iter().all(|&x| x == 0.0 || MODERATE.contains(&f64::from(x)))
        } else {
            MODERATE.contains(&longest(&Side::plain(rows), &[], &scratch.threads))
        }
    };
    let pairs = halves && loss.tilting.product() == Product::Inner;
    match isa.pairs() {
        Some(isa) if pairs && moderate(batch.u, &scratch.inverse_u) && moderate(batch.v, &scratch.inverse_v) => {
            form.evaluate::<Pair>(isa, scratch, loss, batch, gradients)
        }
        _ => form.evaluate::<f32>(isa, scratch, loss, batch, gradients),
    }
}

/// Objectives whose G follows from S pair by pair.
#[derive(Clone, Copy)]
enum Form {
    Softmax(Over),
    Sigmoid { bias: f64 },
}

/// What a softmax is over: each row and each column, or the whole matrix.
#[derive(Clone, Copy)]
pub(super) enum Over {
    Each { lambda_u: f64, lambda_v: f64 },
    All,
}

impl Over {
    pub(super) fn want(self) -> Want {
        match self {
            Over::Each { lambda_u, lambda_v } => Want { rows: lambda_v > 0.0, cols: lambda_u > 0.0 },
            Over::All => Want { rows: true, cols: false },
        }
    }
}

impl Form {
    fn evaluate<T: Element>(
        self,
        isa: T::Isa,
        scratch: &mut Scratch,
        loss: &Loss,
        batch: &Batch<'_>,
        gradients: Gradients<'_>,
    ) -> Value {
        match self {
            Form::Softmax(over) => softmax::<T>(isa, scratch, loss, batch, gradients, over),
            Form::Sigmoid { bias } => sigmoid::<T>(isa, scratch, loss, batch, gradients, bias),
        }
    }
}

fn softmax<T: Element>(
    isa: T::Isa,
    scratch: &mut Scratch,
    loss: &Loss,
    batch: &Batch<'_>,
    gradients: Gradients<'_>,
    over: Over,
) -> Value {
    let (n, m) = (batch.u.rows, batch.v.rows);
    let Scratch {
        counts,
        packed,
        middle,
        inverse_u,
        inverse_v,
        rows,
        cols,
        row_normalisers,
        col_normalisers,
        threads,
        kept,
        budget,
        pulled,
        ..
    } = scratch;
    let tilted = Tilted::new(loss, batch, middle, inverse_u, inverse_v, threads);
    pack_columns::<T>(isa, &tilted.v, packed, threads);
    let mut logits = tilted.logits::<T>(isa, batch, packed, threads);
    if matches!(over, Over::All)
        && let Some(h) = joint::anchor(loss, batch, &tilted, &logits)
    {
        return joint::evaluate(&tilted, &logits, h, &counts.row_share, gradients, pulled);
    }
    let smoothing = loss.smoothing;
    // A positive's P less its target is as small as the loss is, unless the target is all of a row's: a step of the grid is not.
    let several = |positives: &[u32]| positives.iter().any(|&count| count > 1);
    if matches!(over, Over::All) || several(&counts.row_positives) || several(&counts.col_positives) {
        logits.grid = None;
    }
    let want = over.want();
    // The sum of G S is that of <u, G v>, where S is linear in u and G not rounded before it meets v.
    logits.exponentials = logits.anchor.is_some()
        && (matches!(over, Over::Each { .. }) && smoothing == 0.0)
        && (tilted.product == Product::Inner && !T::ROUNDS);
    if let Over::Each { lambda_u, lambda_v } = over
        && let Some(axis) = want.only()
    {
        // A strip's are few enough to be kept as they are, and then how many are kept changes no bit.
        logits.grid = None;
        let [by_row, by_col] = Counted::both(counts, [rows, cols]);
        let (side, lambda) = if axis == Axis::Rows { (by_row, 0.5 * lambda_v) } else { (by_col, 0.5 * lambda_u) };
        let normalise = |range, tallies: &_, normalisers: &mut _| {
            side.part(range, tallies).normalise(lambda, smoothing, normalisers)
        };
        let strips = Strips { logits: &logits, axis, logit_sums: smoothing > 0.0, normalise, budget: *budget };
        let mut mean = 0.0;
        let walk = |pull: Pull<'_>| mean = strips.pull(pull);
        let sums = pull_and_settle(&tilted, &logits, walk, gradients, pulled, |_, _, _| ());
        return Value { loss: lambda * (mean - (side.opposite as f64).ln()), grad_tau: sums.grad_tau, grad_bias: 0.0 };
    }
    logits.tally([rows, cols], want, smoothing > 0.0, kept, *budget);
    logits.kept = Some(kept);

    let [row_side, col_side] = Counted::both(counts, [rows, cols]);
    let value;
    let law;
    match over {
        Over::Each { lambda_u, lambda_v } => {
            let one = |side: Counted<'_>, lambda: f64, normalisers: &mut _| {
                lambda * (side.normalise(lambda, smoothing, normalisers) - (side.opposite as f64).ln())
            };
            let mut by_row = || one(row_side, 0.5 * lambda_v, row_normalisers);
            let mut by_col = || one(col_side, 0.5 * lambda_u, col_normalisers);
            let (by_row, by_col) =
                if is_for_one(n, m, batch.u.dim) { (by_row(), by_col()) } else { rayon::join(by_row, by_col) };
            value = by_row + by_col;
            law = Law::Softmax {
                rows: Some(row_normalisers.softmaxes(0..n)),
                cols: Some(col_normalisers.softmaxes(0..m)),
            };
        }
        Over::All => {
            let (max, sum) = row_side.total();
            value = f64::from(max) + sum.ln() - ((n as f64).ln() + (m as f64).ln()) - row_side.mean_target(smoothing);
            row_side.normalise_joint(max, sum, smoothing, row_normalisers);
            law = Law::Softmax { rows: Some(row_normalisers.softmaxes(0..n)), cols: None };
        }
    }
    let sums = pull_gradients(&tilted, &logits, &law, gradients, pulled);
    Value { loss: value, grad_tau: sums.grad_tau, grad_bias: 0.0 }
}

fn sigmoid<T: Element>(
    isa: T::Isa,
    scratch: &mut Scratch,
    loss: &Loss,
    batch: &Batch<'_>,
    gradients: Gradients<'_>,
    bias: f64,
) -> Value {
    let Scratch { counts, packed, middle, inverse_u, inverse_v, threads, pulled, .. } = scratch;
    let tilted = Tilted::new(loss, batch, middle, inverse_u, inverse_v, threads);
    pack_columns::<T>(isa, &tilted.v, packed, threads);
    let logits = tilted.logits::<T>(isa, batch, packed, threads);
    let law = Law::Sigmoid { bias: bias as f32, smoothing: loss.smoothing as f32, share: &counts.row_share };
    let sums = pull_gradients(&tilted, &logits, &law, gradients, pulled);
    Value { loss: sums.value, grad_tau: sums.grad_tau, grad_bias: sums.g }
}

impl<'a> Tilted<'a> {
    /// `packed` is what [`pack_columns`] made of v.
    pub(super) fn logits<'b, T: Element>(
        &'b self,
        isa: T::Isa,
        batch: &'b Batch<'a>,
        packed: &'b [f32],
        threads: &'b Threads,
    ) -> Logits<'b, T> {
        let [low, high] = self.range(batch.offset_v);
        Logits {
            isa,
            similarity: Similarity {
                u: self.u,
                packed: bytemuck::cast_slice(packed),
                inverse_v: self.v.inverse,
                m: batch.v.rows,
                product: self.product,
                scale: self.scale as f32,
                offset: batch.offset_v,
            },
            anchor: ((high - low) / 2.0 <= SPREAD).then_some(((low + high) / 2.0) as f32),
            grid: T::ROUNDS.then(|| Grid::new(low, high)).flatten(),
            kept: None,
            exponentials: false,
            pairs: &batch.pairs,
            origin: [0, 0],
            threads,
        }
    }
}

/// Scalars summed over all of G.
pub(super) struct Sums {
    pub(super) value: f64,
    pub(super) g: f64,
    pub(super) grad_tau: f64,
}

/// Pass 2 with every gradient wanted.
pub(super) fn pull_gradients<T: Element>(
    tilted: &Tilted<'_>,
    logits: &Logits<'_, T>,
    law: &Law<'_>,
    gradients: Gradients<'_>,
    pulled: &mut Pulled,
) -> Sums {
    pull_and_settle(tilted, logits, |pull: Pull<'_>| logits.pull(law, pull), gradients, pulled, |_, _, _| ())
}

/// [`pull_gradients`] by another `walk` over the logits; `settle` has `G other` of both sides, where it is wanted, the sums of
/// rows and those of columns, before they go through the tilting.
pub(super) fn pull_and_settle<T: Element>(
    tilted: &Tilted<'_>,
    logits: &Logits<'_, T>,
    walk: impl FnOnce(Pull<'_>),
    gradients: Gradients<'_>,
    Pulled { row_sums, col_sums, grad_u, grad_v }: &mut Pulled,
    settle: impl FnOnce([Option<&mut [f32]>; 2], &mut [RowSums], &mut [f32]),
) -> Sums {
    let mut out_u = match gradients.u {
        // Also without a gradient: d tau is made of it.
        None if logits.exponentials => {
            Some(Accumulated::InPlace(sized(grad_u, tilted.u.rows.rows * tilted.u.rows.dim)))
        }
        out => Accumulated::new(out, grad_u),
    };
    let mut out_v = Accumulated::new(gradients.v, grad_v);
    let want_cols = gradients.offset_v.is_some() || logits.similarity.offset.is_some();
    reset(col_sums, logits.similarity.m, 0.0);
    walk(Pull {
        carry: [tilted.u, tilted.v],
        out: [out_u.as_mut().map(Accumulated::acc), out_v.as_mut().map(Accumulated::acc)],
        row_sums,
        col_sums: want_cols.then_some(&mut col_sums[..]),
        apart: tilted.product == Product::SquaredDistance,
    });
    settle([out_u.as_mut().map(Accumulated::acc), out_v.as_mut().map(Accumulated::acc)], row_sums, col_sums);
    conclude(tilted, logits, [out_u, out_v], gradients.offset_v, row_sums, col_sums)
}

/// Takes accumulated gradients through the tilting, and sums the scalars.
pub(super) fn conclude<T: Element>(
    tilted: &Tilted<'_>,
    logits: &Logits<'_, T>,
    [out_u, out_v]: [Option<Accumulated<'_>>; 2],
    out_offset: Option<Write<&mut [f32]>>,
    row_sums: &[RowSums],
    col_sums: &[f32],
) -> Sums {
    let along = out_u.map(|out| tilted.finish(&tilted.u, out, logits.threads));
    if let Some(out) = out_v {
        tilted.finish(&tilted.v, out, logits.threads);
    }
    put(out_offset, |j| col_sums[j]);
    let mut sums = Sums { value: 0.0, g: 0.0, grad_tau: 0.0 };
    let mut gs = 0.0;
    for row in row_sums {
        sums.value += row.value;
        sums.g += row.g;
        gs += row.gs;
    }
    if let (true, Some(along)) = (logits.exponentials, along) {
        gs = tilted.scale * along;
    } else if let Some(offset) = logits.similarity.offset {
        // The offset is part of S, but not of what tau divides.
        gs -= offset.iter().zip(col_sums).map(|(&o, &g)| f64::from(o) * f64::from(g)).sum::<f64>();
    }
    sums.grad_tau = -gs / tilted.tau;
    sums
}

/// Writes `value(j)` to number j of an output, if it is wanted.
pub(super) fn put(out: Option<Write<&mut [f32]>>, value: impl Fn(usize) -> f32) {
    let Some((out, add)) = out.map(Write::split) else { return };
    for (j, out) in out.iter_mut().enumerate() {
        *out = if add { *out + value(j) } else { value(j) };
    }
}

/// `weight` over the sum of a softmax: nothing where all of it is ignored, no number where the sum is none, so that logits
/// beyond f32 are seen.
fn share_of(weight: f64, total: f64) -> f32 {
    if total == 0.0 {
        0.0
    } else if total.is_finite() {
        (weight / total) as f32
    } else {
        f32::NAN
    }
}

/// One side's tallies with what turns them into losses and normalisers.
#[derive(Clone, Copy)]
pub(super) struct Counted<'a> {
    pub(super) tallies: &'a Tallies,
    pub(super) positives: &'a [u32],
    pub(super) share: &'a [f32],
    /// Length of the other side.
    pub(super) opposite: usize,
}

impl<'a> Counted<'a> {
    /// Of rows and of columns.
    pub(super) fn both(counts: &'a Counts, [rows, cols]: [&'a Tallies; 2]) -> [Self; 2] {
        let Counts { row_positives, col_positives, row_share, col_share, .. } = counts;
        [
            Counted { tallies: rows, positives: row_positives, share: row_share, opposite: col_positives.len() },
            Counted { tallies: cols, positives: col_positives, share: col_share, opposite: row_positives.len() },
        ]
    }

    /// Rows `range` alone, of which these are the tallies.
    fn part(self, range: Range<usize>, tallies: &'a Tallies) -> Self {
        let (positives, share) = (&self.positives[range.clone()], &self.share[range]);
        Counted { tallies, positives, share, ..self }
    }

    /// (max, sum over negatives, sum over positives) of row i.
    fn parts(&self, i: usize) -> (f32, f32, f32) {
        let positives = self.tallies.rest[i].positives;
        if let Some(anchor) = self.tallies.anchor {
            let decay = f64::from(decay(positives.max, anchor));
            return (anchor, self.tallies.sum[i], (positives.sum * decay) as f32);
        }
        let max = Num::max(self.tallies.max[i], positives.max);
        let negative = self.tallies.sum[i] * decay(self.tallies.max[i], max);
        let positive = (positives.sum * f64::from(decay(positives.max, max))) as f32;
        (if max < f32::MIN { 0.0 } else { max }, negative, positive)
    }

    /// `r_i - <T_i, S_i>`, accurate also where it is tiny, of what [`Counted::parts`] says.
    fn loss(&self, i: usize, (max, negative, positive): (f32, f32, f32), smoothing: f64) -> f64 {
        let tally = &self.tallies.rest[i];
        let mean = tally.positive_logits / f64::from(self.positives[i]);
        let base = if positive > 0.0 {
            let odds = f64::from(negative) / f64::from(positive);
            // A plain logarithm is the faster one.
            (if odds < 0.5 { odds.ln_1p() } else { (1.0 + odds).ln() })
                + (f64::from(tally.positives.max) - mean)
                + tally.positives.sum.ln()
        } else {
            f64::from(max) + f64::from(negative).ln() - mean
        };
        base + smoothing * (mean - self.mean_logit(i, smoothing))
    }

    fn mean_logit(&self, i: usize, smoothing: f64) -> f64 {
        if smoothing == 0.0 { 0.0 } else { self.tallies.rest[i].logits / self.candidates(i) }
    }

    /// Pairs of row i that are not ignored.
    fn candidates(&self, i: usize) -> f64 {
        self.opposite as f64 - f64::from(self.tallies.rest[i].ignored)
    }

    /// `sum_i w_i <T_i, S_i>`.
    fn mean_target(&self, smoothing: f64) -> f64 {
        let terms = self.share.iter().enumerate().filter(|&(_, &w)| w > 0.0);
        let target = |i: usize| {
            let mean = self.tallies.rest[i].positive_logits / f64::from(self.positives[i]);
            mean + smoothing * (self.mean_logit(i, smoothing) - mean)
        };
        terms.map(|(i, &w)| f64::from(w) * target(i)).sum()
    }

    /// (max, sum) of the LSE over everything. A row ignored whole has no part in it: its anchor means nothing.
    pub(super) fn total(&self) -> (f32, f64) {
        let rows = || (0..self.share.len()).map(|i| self.parts(i)).filter(|(_, n, p)| n + p != 0.0);
        let max = rows().map(|(max, ..)| max).fold(f32::NEG_INFINITY, f32::max);
        let sum = rows().map(|(row_max, n, p)| f64::from(row_max - max).exp() * (f64::from(n) + f64::from(p)));
        (max, sum.sum())
    }

    /// Row softmaxes weighted by `lambda w_i`; returns `sum_i w_i (r_i - <T_i, S_i>)`.
    fn normalise(&self, lambda: f64, smoothing: f64, normalisers: &mut Normalisers) -> f64 {
        normalisers.resize(self.share.len());
        normalisers.anchor = self.tallies.anchor;
        let mut mean_loss = 0.0;
        for i in 0..self.share.len() {
            let parts = self.parts(i);
            let (max, negative, positive) = parts;
            let weight = lambda * f64::from(self.share[i]);
            let total = f64::from(negative) + f64::from(positive);
            if self.share[i] > 0.0 {
                mean_loss += f64::from(self.share[i]) * self.loss(i, parts, smoothing);
            }
            normalisers.max[i] = max;
            normalisers.weight[i] = share_of(weight, total);
            normalisers.smooth[i] = (weight * smoothing / self.candidates(i).max(1.0)) as f32;
            let others = if total > 0.0 { f64::from(negative) / total } else { 0.0 };
            normalisers.targets[i] = if self.positives[i] == 1 {
                Target::Only { others: (weight * others) as f32, slack: (weight * smoothing) as f32 }
            } else {
                let (count, positives) = (f64::from(self.positives[i].max(1)), self.tallies.rest[i].positives);
                Target::Among {
                    share: (weight / count) as f32,
                    max: positives.max,
                    mean: (positives.sum / count).ln() as f32,
                    others: others as f32,
                    slack: smoothing as f32,
                }
            };
        }
        mean_loss
    }

    /// Plain row probabilities: no weights, no targets.
    pub(super) fn probabilities(&self, normalisers: &mut Normalisers) {
        normalisers.resize(self.share.len());
        for i in 0..self.share.len() {
            let (max, negative, positive) = self.parts(i);
            let total = f64::from(negative) + f64::from(positive);
            normalisers.set_plain(i, max, share_of(1.0, total));
        }
    }

    /// One softmax over everything, with each row's share of the targets.
    fn normalise_joint(&self, max: f32, sum: f64, smoothing: f64, normalisers: &mut Normalisers) {
        normalisers.resize(self.share.len());
        for i in 0..self.share.len() {
            let weight = f64::from(self.share[i]);
            normalisers.max[i] = max;
            normalisers.weight[i] = (1.0 / sum) as f32;
            normalisers.smooth[i] = (weight * smoothing / self.candidates(i).max(1.0)) as f32;
            normalisers.targets[i] =
                Target::Shared { pull: (weight * (1.0 - smoothing) / f64::from(self.positives[i].max(1))) as f32 };
        }
    }
}
