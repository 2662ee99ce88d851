//! Maximum mean discrepancy of the conditionals (or of the joint) of the learned law.
//!
//! With feature maps the fused passes do all of it: a pass whose carried rows are features instead of
//! embeddings is attention, `m_j = sum_i P_ij f_i`, and
//!
//! ```text
//! conditional  L = sum_j x_j (|m_j|^2/2 - <m_j, t_j>),  W_j = x_j (m_j - t_j),  G_ij = P_ij (<f_i, W_j> - <m_j, W_j>)
//! joint        C = F_u' W F_v, E = F_u' T F_v,  L = |C - E|^2 - |E|^2,  G = W o (F_u D F_v' - <C, D>),  D = 2 (C - E)
//! ```
//!
//! with t_j the mean feature of column j's positives. With a kernel instead, products with K take the
//! place of features, [`PANEL`] columns (or rows) at a time: O(N^2 M) work, O((N + M) PANEL) memory. K
//! is never formed either: `K X` is a pass over the l2 logits of the data under the law G = exp(S).

use super::buffers::{Buffer, Threads, reset, sized};
use super::contrast::{Accumulated, Counted, Over, Pulled, Sums, Tilted, conclude, pull_gradients};
use super::fused::{Logits, Pull};
use super::gemm::gemm;
use super::law::{Factor, Law, Normalisers, RowSums, Softmaxes};
use super::operand::{Side, Similarity, pack_columns};
use super::simd::Isa;
use super::sweep::Axis;
use crate::device::Gemm;
use crate::objective::{
    Batch, DataKernel, Gradients, Loss, Matrix, Moments, Objective, Pairs, Positives, Storage, Value, Write,
    counts::{Counts, Special},
};
use kernels::law::Product;
use std::ops::Range;

/// Columns (rows) of a Gram panel.
const PANEL: usize = 128;

/// Buffers of these objectives.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Features in f32, `[N, f_u]` and `[M, f_v]`, where storage is narrower.
    features_u: Vec<f32>,
    features_v: Vec<f32>,
    /// Mean features, then residuals W, `[M, f_u]` and `[N, f_v]`.
    residual_u: Vec<f32>,
    residual_v: Vec<f32>,
    /// Mean features of the positives.
    targets: Vec<f32>,
    /// Moments `[f_u, f_v]` of the joint law, of the targets, of the gap between them, and twice that.
    moments: [Vec<f32>; 4],
    /// What sums of targets lost.
    lost: Vec<f32>,
    /// What a factor subtracts.
    mean_u: Vec<f32>,
    mean_v: Vec<f32>,
    /// Right operands of factors, packed.
    packed_u: Buffer,
    packed_v: Buffer,
    /// Packed operand of small products.
    packed: Vec<f32>,
    gram: Gram,
}

/// Buffers of the Gram form.
#[derive(Debug, Default)]
struct Gram {
    identity: Vec<f32>,
    packed_identity: Buffer,
    packed_data_u: Buffer,
    packed_data_v: Buffer,
    /// Normalisers of K, whose law is `exp(S)`.
    ones: Normalisers,
    /// A panel of probabilities P (or of `W K_v`), then of Gamma.
    p: Vec<f32>,
    /// What is multiplied by K, and the product.
    x: Vec<f32>,
    y: Vec<f32>,
    /// What a factor subtracts, and the sums that it is made of.
    mean: Vec<f32>,
    sums: Vec<f64>,
    /// What sums of targets lost.
    lost: Vec<f32>,
    /// Right operand of a factor, packed.
    packed: Buffer,
    /// A panel of K_v and of `T K_v`.
    k_v: Vec<f32>,
    t_k_v: Vec<f32>,
    partial: Partial,
}

/// One panel's gradients, before they are added to the others'.
#[derive(Debug, Default)]
struct Partial {
    u: Vec<f32>,
    v: Vec<f32>,
    cols: Vec<f32>,
    sums: Vec<RowSums>,
}

impl Scratch {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let g = &self.gram;
        let floats = [
            &self.features_u,
            &self.features_v,
            &self.residual_u,
            &self.residual_v,
            &self.targets,
            &self.mean_u,
            &self.mean_v,
            &self.packed,
            &g.identity,
            &g.p,
            &g.x,
            &g.y,
            &g.mean,
            &g.lost,
            &g.partial.u,
            &g.partial.v,
            &g.partial.cols,
            &g.k_v,
            &g.t_k_v,
        ];
        let packed =
            [&self.packed_u, &self.packed_v, &g.packed_identity, &g.packed_data_u, &g.packed_data_v, &g.packed];
        4 * floats.iter().map(|v| v.capacity()).sum::<usize>()
            + packed.map(Buffer::bytes).iter().sum::<usize>()
            + 4 * self.moments.iter().map(Vec::capacity).sum::<usize>()
            + 4 * self.lost.capacity()
            + 8 * g.sums.capacity()
            + g.ones.bytes()
            + size_of::<RowSums>() * g.partial.sums.capacity()
    }
}

/// Evaluates a validated batch.
pub fn evaluate(
    isa: Isa,
    scratch: &mut super::contrast::Scratch,
    loss: &Loss,
    batch: &Batch<'_>,
    gradients: Gradients<'_>,
) -> Value {
    let n = batch.u.rows;
    let super::contrast::Scratch {
        counts,
        packed,
        middle,
        inverse_u,
        inverse_v,
        rows,
        cols,
        row_normalisers,
        col_normalisers,
        pulled,
        threads,
        kept,
        budget,
        mmd: own,
        ..
    } = scratch;
    let tilted = Tilted::new(loss, batch, middle, inverse_u, inverse_v, threads);
    pack_columns::<f32>(isa, &tilted.v, packed, threads);
    let mut logits = tilted.logits::<f32>(isa, batch, packed, threads);
    let over = match loss.objective {
        Objective::Mmd { lambda_u, lambda_v } => Over::Each { lambda_u, lambda_v },
        _ => Over::All,
    };
    logits.tally([rows, cols], over.want(), false, kept, *budget);
    logits.kept = Some(kept);
    let [row_side, col_side] = Counted::both(counts, [rows, cols]);
    if let Over::All = over {
        let (max, sum) = row_side.total();
        row_normalisers.resize(n);
        (0..n).for_each(|i| row_normalisers.set_plain(i, max, (1.0 / sum) as f32));
    } else {
        row_side.probabilities(row_normalisers);
        col_side.probabilities(col_normalisers);
    }
    let context =
        Context { isa, batch, counts, tilted: &tilted, logits: &logits, row_normalisers, col_normalisers, threads };
    let moments = batch.moments.expect("validated: MMD has moments");
    let (value, sums) = match moments {
        Moments::Features { u, v } | Moments::Gram { kernel: DataKernel::Linear, u, v } => {
            let mut features = Features::new(own, u, v);
            let (value, law) = match over {
                Over::Each { lambda_u, lambda_v } => {
                    features.conditional(&context, lambda_u, lambda_v, &mut pulled.row_sums)
                }
                Over::All => features.joint(&context, &mut pulled.row_sums),
            };
            (value, pull_gradients(&tilted, &logits, &law, gradients, pulled))
        }
        Moments::Gram { kernel: DataKernel::Gaussian { width }, u, v } => {
            let gram = &mut own.gram;
            let mut total = Total::new(&context, gradients, pulled);
            let value = match over {
                Over::Each { lambda_u, lambda_v } => {
                    gram.conditional(&context, width, u, Axis::Cols, lambda_u, &mut total)
                        + gram.conditional(&context, width, v, Axis::Rows, lambda_v, &mut total)
                }
                Over::All => gram.joint(&context, width, u, v, &mut total),
            };
            (value, total.conclude(&context))
        }
    };
    Value { loss: value, grad_tau: sums.grad_tau, grad_bias: 0.0 }
}

struct Context<'a> {
    isa: Isa,
    batch: &'a Batch<'a>,
    counts: &'a Counts,
    tilted: &'a Tilted<'a>,
    logits: &'a Logits<'a>,
    row_normalisers: &'a Normalisers,
    col_normalisers: &'a Normalisers,
    threads: &'a Threads,
}

/// The rows of `matrix` in f32.
fn natural<'a>(matrix: Matrix<'a>, buffer: &'a mut Vec<f32>) -> &'a [f32] {
    if let Storage::F32(data) = matrix.data {
        return data;
    }
    let out = sized(buffer, matrix.rows * matrix.dim);
    Side::plain(matrix).read(0..matrix.rows, out);
    out
}

/// The feature form.
struct Features<'a> {
    u: &'a [f32],
    v: &'a [f32],
    dims: [usize; 2],
    residual_u: &'a mut Vec<f32>,
    residual_v: &'a mut Vec<f32>,
    targets: &'a mut Vec<f32>,
    moments: &'a mut [Vec<f32>; 4],
    lost: &'a mut Vec<f32>,
    mean_u: &'a mut Vec<f32>,
    mean_v: &'a mut Vec<f32>,
    packed_u: &'a mut Buffer,
    packed_v: &'a mut Buffer,
    packed: &'a mut Vec<f32>,
}

impl<'a> Features<'a> {
    fn new(own: &'a mut Scratch, u: Matrix<'a>, v: Matrix<'a>) -> Self {
        Features {
            u: natural(u, &mut own.features_u),
            v: natural(v, &mut own.features_v),
            dims: [u.dim, v.dim],
            residual_u: &mut own.residual_u,
            residual_v: &mut own.residual_v,
            targets: &mut own.targets,
            moments: &mut own.moments,
            lost: &mut own.lost,
            mean_u: &mut own.mean_u,
            mean_v: &mut own.mean_v,
            packed_u: &mut own.packed_u,
            packed_v: &mut own.packed_v,
            packed: &mut own.packed,
        }
    }

    fn sides(&self) -> [Side<'a>; 2] {
        [Side::plain(Matrix::f32(self.u, self.dims[0])), Side::plain(Matrix::f32(self.v, self.dims[1]))]
    }

    fn conditional(
        &mut self,
        context: &Context<'a>,
        lambda_u: f64,
        lambda_v: f64,
        row_sums: &mut Vec<RowSums>,
    ) -> (f64, Law<'_>) {
        let Context { isa, batch, counts, logits, threads, .. } = *context;
        let (n, m) = (batch.u.rows, batch.v.rows);
        let carry = self.sides();
        let [f_u, f_v] = self.dims;
        let mut value = 0.0;
        let mut by = [None, None];
        if lambda_u > 0.0 {
            let softmaxes = context.col_normalisers.softmaxes(0..m);
            let (means, targets) = (sized(self.residual_u, m * f_u), sized(self.targets, m * f_u));
            logits.pull(&law_of(Axis::Cols, softmaxes), Pull::plain(carry, [None, Some(&mut *means)], row_sums));
            counts.target_means(batch, false, self.u, f_u, targets, self.lost);
            value += residuals(isa, means, targets, f_u, &counts.col_share, lambda_u, self.lost, self.mean_u);
            pack_columns::<f32>(isa, &Side::plain(Matrix::f32(means, f_u)), self.packed_u, threads);
            by[1] = Some(softmaxes.times(Factor { left: self.u, right: self.packed_u, dim: f_u, mean: self.mean_u }));
        }
        if lambda_v > 0.0 {
            let softmaxes = context.row_normalisers.softmaxes(0..n);
            let (means, targets) = (sized(self.residual_v, n * f_v), sized(self.targets, n * f_v));
            logits.pull(&law_of(Axis::Rows, softmaxes), Pull::plain(carry, [Some(&mut *means), None], row_sums));
            counts.target_means(batch, true, self.v, f_v, targets, self.lost);
            value += residuals(isa, means, targets, f_v, &counts.row_share, lambda_v, self.lost, self.mean_v);
            pack_columns::<f32>(isa, &carry[1], self.packed_v, threads);
            by[0] = Some(softmaxes.times(Factor { left: means, right: self.packed_v, dim: f_v, mean: self.mean_v }));
        }
        let [rows, cols] = by;
        (value, Law::Softmax { rows, cols })
    }

    fn joint(&mut self, context: &Context<'a>, row_sums: &mut Vec<RowSums>) -> (f64, Law<'_>) {
        let Context { isa, batch, counts, logits, threads, .. } = *context;
        let n = batch.u.rows;
        let carry = self.sides();
        let [f_u, f_v] = self.dims;
        let softmaxes = context.row_normalisers.softmaxes(0..n);
        // H = W F_v, and less T F_v: small when the law is learned, so subtract before summing over rows.
        let (h, targets) = (sized(self.residual_v, n * f_v), sized(self.targets, n * f_v));
        logits.pull(&law_of(Axis::Rows, softmaxes), Pull::plain(carry, [Some(&mut *h), None], row_sums));
        counts.target_means(batch, true, self.v, f_v, targets, self.lost);
        for (t, &w) in targets.chunks_exact_mut(f_v).zip(&counts.row_share) {
            t.iter_mut().for_each(|t| *t *= w);
        }
        let [learned, target, gap, d] = self.moments;
        let mut moment = |out: &mut Vec<f32>, right: &[f32]| {
            out.resize(f_u * f_v, 0.0);
            let shape = Gemm { m: f_u, n: f_v, k: n, transpose_a: true, transpose_b: false };
            gemm(isa, shape, self.u, right, Write::Set(out), self.packed);
        };
        moment(learned, h);
        moment(target, targets);
        let means = &mut *self.lost;
        means.clear();
        means.extend_from_slice(h);
        h.iter_mut().zip(&*targets).for_each(|(h, t)| *h -= t);
        moment(gap, h);
        // Of the law's own moments: they may be far smaller than the targets', and then so is the value.
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let value = dot(learned, learned) - 2.0 * dot(learned, target);
        d.clear();
        d.extend(gap.iter().map(|&x| 2.0 * x));
        let shape = Gemm { m: n, n: f_v, k: f_u, transpose_a: false, transpose_b: false };
        gemm(isa, shape, self.u, d, Write::Set(h), self.packed);
        pack_columns::<f32>(isa, &carry[1], self.packed_v, threads);
        // As factors are multiplied out: where all weight is one pair's, its mean is that pair's factor, to the last bit.
        let rows = h.chunks_exact(f_v).zip(means.chunks_exact(f_v));
        let mean: f64 = rows.map(|(h, mean)| f64::from(Factor::entry(isa, h, mean))).sum();
        self.mean_v.clear();
        self.mean_v.resize(n, mean as f32);
        let factor = Factor { left: h, right: self.packed_v, dim: f_v, mean: self.mean_v };
        (value, law_of(Axis::Rows, softmaxes.times(factor)))
    }
}

/// Turns means into residuals `lambda x_j (m_j - t_j)`, writes `<m_j, residual_j>`, and returns
/// `lambda sum_j x_j (|m_j|^2/2 - <m_j, t_j>)`.
#[allow(clippy::too_many_arguments, reason = "operands, outputs and scratch")]
fn residuals(
    isa: Isa,
    means: &mut [f32],
    targets: &[f32],
    dim: usize,
    share: &[f32],
    lambda: f64,
    own: &mut Vec<f32>,
    dots: &mut Vec<f32>,
) -> f64 {
    dots.clear();
    let mut value = 0.0;
    for ((means, targets), &share) in means.chunks_exact_mut(dim).zip(targets.chunks_exact(dim)).zip(share) {
        let weight = lambda * f64::from(share);
        own.clear();
        own.extend_from_slice(means);
        for (m, &t) in means.iter_mut().zip(targets) {
            let (mean, target) = (f64::from(*m), f64::from(t));
            value += weight * mean * (0.5 * mean - target);
            *m = (weight * (mean - target)) as f32;
        }
        // As factors are multiplied out: where a softmax is one pair's, its mean is that pair's factor, to the last bit.
        dots.push(Factor::entry(isa, own, means));
    }
    value
}

/// Gradients summed over panels.
struct Total<'a> {
    out: [Option<Accumulated<'a>>; 2],
    offset_v: Option<Write<&'a mut [f32]>>,
    row_sums: &'a mut Vec<RowSums>,
    col_sums: &'a mut Vec<f32>,
}

impl<'a> Total<'a> {
    fn new(
        context: &Context<'_>,
        gradients: Gradients<'a>,
        Pulled { row_sums, col_sums, grad_u, grad_v }: &'a mut Pulled,
    ) -> Self {
        let mut out = [Accumulated::new(gradients.u, grad_u), Accumulated::new(gradients.v, grad_v)];
        out.iter_mut().flatten().for_each(|out| out.acc().fill(0.0));
        reset(row_sums, context.batch.u.rows, RowSums::default());
        reset(col_sums, context.batch.v.rows, 0.0);
        Total { out, offset_v: gradients.offset_v, row_sums, col_sums }
    }

    /// Adds `scale` times the gradients that `law` pulls from the block of logits at `rows` x `cols`; returns sum G.
    fn pull(
        &mut self,
        context: &Context<'_>,
        logits: &Logits<'_>,
        law: &Law<'_>,
        [rows, cols]: [Range<usize>; 2],
        scale: f64,
        partial: &mut Partial,
    ) -> f64 {
        let dim = context.batch.u.dim;
        let out_u = sized(&mut partial.u, rows.len() * dim);
        let out_v = sized(&mut partial.v, cols.len() * dim);
        let (col_sums, sums) = (sized(&mut partial.cols, cols.len()), &mut partial.sums);
        let pull = Pull {
            carry: [context.tilted.u.slice(rows.clone()), context.tilted.v.slice(cols.clone())],
            out: [Some(&mut *out_u), Some(&mut *out_v)],
            row_sums: &mut *sums,
            col_sums: Some(&mut *col_sums),
            apart: context.tilted.product == Product::SquaredDistance,
        };
        logits.pull(law, pull);
        let add = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(t, f)| *t += scale as f32 * f);
        let [to_u, to_v] = &mut self.out;
        for (to, range, from) in [(to_u, &rows, out_u), (to_v, &cols, out_v)] {
            if let Some(to) = to {
                add(&mut to.acc()[range.start * dim..range.end * dim], from);
            }
        }
        add(&mut self.col_sums[cols], col_sums);
        let mut g = 0.0;
        for (to, from) in self.row_sums[rows].iter_mut().zip(&*sums) {
            to.gs += scale * from.gs;
            to.g += scale * from.g;
            g += from.g;
        }
        g
    }

    fn conclude(self, context: &Context<'_>) -> Sums {
        conclude(context.tilted, context.logits, self.out, self.offset_v, self.row_sums, self.col_sums)
    }
}

/// The Gaussian kernel K on rows of data.
struct Kernel<'a> {
    width: f64,
    data: Matrix<'a>,
    /// Those that are K's columns, packed.
    packed: &'a [f32],
}

impl Kernel<'_> {
    /// `out = K x`, `x` `[columns, b]`, for as many of K's columns as `x` has rows.
    fn times(
        &self,
        context: &Context<'_>,
        x: &[f32],
        b: usize,
        out: &mut [f32],
        ones: &mut Normalisers,
        sums: &mut Vec<RowSums>,
    ) {
        let rows = self.data.rows;
        ones.resize(rows);
        (0..rows).for_each(|i| ones.set_plain(i, 0.0, 1.0));
        let nothing = Pairs { positives: Positives::Diagonal, ..Pairs::default() };
        let logits = Logits {
            isa: context.isa,
            similarity: Similarity {
                u: Side::plain(self.data),
                packed: self.packed,
                inverse_v: &[],
                m: x.len() / b,
                product: Product::SquaredDistance,
                scale: (-0.5 / (self.width * self.width)) as f32,
                offset: None,
            },
            anchor: None,
            grid: None,
            kept: None,
            exponentials: false,
            pairs: &nothing,
            origin: [0, 0],
            threads: context.threads,
        };
        let carry = Side::plain(Matrix::f32(x, b));
        let law = Law::Softmax { rows: Some(ones.softmaxes(0..rows)), cols: None };
        logits.pull(&law, Pull::plain([carry; 2], [Some(out), None], sums));
    }
}

/// Column softmaxes of a few columns, or row softmaxes of a few rows: of the long side each has a number.
struct Panel<'a> {
    axis: Axis,
    /// Its columns (rows).
    range: Range<usize>,
    logits: Logits<'a>,
    softmaxes: Softmaxes<'a>,
}

impl<'a> Panel<'a> {
    fn new(context: &Context<'a>, axis: Axis, range: Range<usize>) -> Self {
        let (logits, softmaxes) = match axis {
            Axis::Cols => (context.logits.of_cols(range.clone()), context.col_normalisers.softmaxes(range.clone())),
            Axis::Rows => (context.logits.of_rows(range.clone()), context.row_normalisers.softmaxes(range.clone())),
        };
        Panel { axis, range, logits, softmaxes }
    }

    /// Rows and columns of the logits that it is made of.
    fn at(&self) -> [Range<usize>; 2] {
        match self.axis {
            Axis::Cols => [0..self.logits.similarity.n(), self.range.clone()],
            Axis::Rows => [self.range.clone(), 0..self.logits.similarity.m],
        }
    }

    /// Length of the long side, and of the other.
    fn shape(&self) -> (usize, usize) {
        let Similarity { m, .. } = self.logits.similarity;
        match self.axis {
            Axis::Cols => (self.logits.similarity.n(), m),
            Axis::Rows => (m, self.logits.similarity.n()),
        }
    }
}

impl Gram {
    /// An identity of `b` rows, plain and packed.
    fn identity(&mut self, context: &Context<'_>, b: usize) {
        reset(&mut self.identity, b * b, 0.0);
        (0..b).for_each(|i| self.identity[i * (b + 1)] = 1.0);
        let side = Side::plain(Matrix::f32(&self.identity, b));
        pack_columns::<f32>(context.isa, &side, &mut self.packed_identity, context.threads);
    }

    /// `Y = K X` of both halves of X, `[rows of data, 2 b]`.
    fn smooth(&mut self, context: &Context<'_>, width: f64, data: Matrix<'_>, b: usize) {
        let kernel = Kernel { width, data, packed: &self.packed_data_u };
        let len = data.rows * 2 * b;
        let (x, y) = (sized(&mut self.x, len), sized(&mut self.y, len));
        kernel.times(context, x, 2 * b, y, &mut self.ones, &mut self.partial.sums);
    }

    /// One side's conditional MMD: `data` is what the softmaxes' long side is made of.
    fn conditional(
        &mut self,
        context: &Context<'_>,
        width: f64,
        data: Matrix<'_>,
        axis: Axis,
        lambda: f64,
        total: &mut Total<'_>,
    ) -> f64 {
        if lambda == 0.0 {
            return 0.0;
        }
        let Context { isa, batch, threads, .. } = *context;
        let short = if axis == Axis::Cols { batch.v.rows } else { batch.u.rows };
        pack_columns::<f32>(isa, &Side::plain(data), &mut self.packed_data_u, threads);
        let mut value = 0.0;
        for start in (0..short).step_by(PANEL) {
            let panel = Panel::new(context, axis, start..short.min(start + PANEL));
            let (long, b) = panel.shape();
            self.identity(context, b);
            self.probabilities(&panel);
            self.deviations(context, &panel);
            self.smooth(context, width, data, b);
            self.conditional_gamma(context, &panel, lambda, &mut value);
            let gamma = sized(&mut self.p, long * b);
            let factor = match axis {
                Axis::Cols => Factor { left: gamma, right: &self.packed_identity, dim: b, mean: &self.mean },
                Axis::Rows => {
                    pack_columns::<f32>(isa, &Side::plain(Matrix::f32(gamma, b)), &mut self.packed, threads);
                    Factor { left: &self.identity, right: &self.packed, dim: b, mean: &self.mean }
                }
            };
            let law = law_of(axis, panel.softmaxes.times(factor));
            total.pull(context, &panel.logits, &law, panel.at(), 1.0, &mut self.partial);
        }
        value
    }

    /// P, `[long, b]`: each column a softmax of the panel.
    fn probabilities(&mut self, panel: &Panel<'_>) {
        let (long, b) = panel.shape();
        let eye = Side::plain(Matrix::f32(&self.identity, b));
        let p = Some(sized(&mut self.p, long * b));
        let out = if panel.axis == Axis::Cols { [p, None] } else { [None, p] };
        let law = law_of(panel.axis, panel.softmaxes);
        panel.logits.pull(&law, Pull::plain([eye; 2], out, &mut self.partial.sums));
    }

    /// `X = [P - T | T]`, `[long, 2 b]`.
    fn deviations(&mut self, context: &Context<'_>, panel: &Panel<'_>) {
        let (long, b) = panel.shape();
        let x = sized(&mut self.x, 2 * long * b);
        for (x, p) in x.chunks_exact_mut(2 * b).zip(self.p.chunks_exact(b)) {
            x[..b].copy_from_slice(p);
            x[b..].fill(0.0);
        }
        let [rows, cols] = panel.at();
        context.batch.pairs.visit(rows, cols, |i, j, special| {
            if special == Special::Positive {
                let (row, col, positives) = match panel.axis {
                    Axis::Cols => (i, j, &context.counts.col_positives),
                    Axis::Rows => (j, i, &context.counts.row_positives),
                };
                let t = 1.0 / positives[col] as f32;
                let k = col - panel.range.start;
                x[row * 2 * b + k] -= t;
                x[row * 2 * b + b + k] = t;
            }
        });
    }

    /// Makes `Gamma = lambda x_j K (P - T)` of P in its place, and its means `<P_j, Gamma_j>`; adds to the value.
    fn conditional_gamma(&mut self, context: &Context<'_>, panel: &Panel<'_>, lambda: f64, value: &mut f64) {
        let (long, b) = panel.shape();
        let share = match panel.axis {
            Axis::Cols => &context.counts.col_share,
            Axis::Rows => &context.counts.row_share,
        };
        reset(&mut self.sums, b, 0.0);
        let rows = self.x.chunks_exact(2 * b).zip(self.y.chunks_exact(2 * b));
        for ((x, y), p) in rows.zip(sized(&mut self.p, long * b).chunks_exact_mut(b)) {
            for (k, (p, mean)) in p.iter_mut().zip(&mut self.sums).enumerate() {
                let weight = lambda * f64::from(share[panel.range.start + k]);
                let product = |k: usize| f64::from(x[k]) * f64::from(y[k]);
                *value += 0.5 * weight * (product(k) - product(b + k));
                let gamma = weight * f64::from(y[k]);
                *mean += f64::from(*p) * gamma;
                *p = gamma as f32;
            }
        }
        self.mean.clear();
        self.mean.extend(self.sums.iter().map(|&x| x as f32));
    }

    /// The joint MMD, panels of columns.
    fn joint(
        &mut self,
        context: &Context<'_>,
        width: f64,
        data_u: Matrix<'_>,
        data_v: Matrix<'_>,
        total: &mut Total<'_>,
    ) -> f64 {
        let Context { isa, batch, logits, row_normalisers, threads, .. } = *context;
        let (n, m) = (batch.u.rows, batch.v.rows);
        pack_columns::<f32>(isa, &Side::plain(data_u), &mut self.packed_data_u, threads);
        pack_columns::<f32>(isa, &Side::plain(data_v), &mut self.packed_data_v, threads);
        let probabilities = row_normalisers.softmaxes(0..n);
        let (mut value, mut mean) = (0.0, 0.0);
        for start in (0..m).step_by(PANEL) {
            let panel = start..m.min(start + PANEL);
            let b = panel.len();
            self.identity(context, b);
            self.joint_deviations(context, width, data_v, panel.clone());
            self.smooth(context, width, data_u, b);
            self.joint_gamma(context, panel.clone(), &mut value);
            reset(&mut self.mean, n, 0.0);
            let gamma = sized(&mut self.p, n * b);
            let factor = Factor { left: gamma, right: &self.packed_identity, dim: b, mean: &self.mean };
            let law = law_of(Axis::Rows, probabilities.times(factor));
            let (block, at) = (logits.of_cols(panel.clone()), [0..n, panel]);
            mean += total.pull(context, &block, &law, at, 1.0, &mut self.partial);
        }
        // G = W o Gamma - <W, Gamma> W.
        let law = law_of(Axis::Rows, probabilities);
        total.pull(context, logits, &law, [0..n, 0..m], -mean, &mut self.partial);
        value + 0.5 * mean
    }

    /// `X = [(W - T) K_v | T K_v]` of a panel of K_v's columns, `[N, 2 b]`.
    fn joint_deviations(&mut self, context: &Context<'_>, width: f64, data_v: Matrix<'_>, panel: Range<usize>) {
        let Context { batch, counts, logits, row_normalisers, .. } = *context;
        let (n, m, b) = (batch.u.rows, batch.v.rows, panel.len());
        // K_v, [M, b].
        let kernel = Kernel { width, data: data_v, packed: &self.packed_data_v[panel.start * data_v.dim..] };
        let k_v = sized(&mut self.k_v, m * b);
        kernel.times(context, &self.identity, b, k_v, &mut self.ones, &mut self.partial.sums);
        // W K_v and T K_v, [N, b].
        let (wk, tk) = (sized(&mut self.p, n * b), sized(&mut self.t_k_v, n * b));
        let law = law_of(Axis::Rows, row_normalisers.softmaxes(0..n));
        let carry = Side::plain(Matrix::f32(k_v, b));
        logits.pull(&law, Pull::plain([carry; 2], [Some(&mut *wk), None], &mut self.partial.sums));
        counts.target_means(batch, true, k_v, b, tk, &mut self.lost);
        for (i, x) in sized(&mut self.x, 2 * n * b).chunks_exact_mut(2 * b).enumerate() {
            for k in 0..b {
                let t = counts.row_share[i] * tk[i * b + k];
                x[k] = wk[i * b + k] - t;
                x[b + k] = t;
            }
        }
    }

    /// `Gamma = 2 K_u (W - T) K_v`, `[N, b]`, of a panel of columns; takes the targets' part off the value.
    fn joint_gamma(&mut self, context: &Context<'_>, panel: Range<usize>, value: &mut f64) {
        let (Context { batch, counts, .. }, b) = (context, panel.len());
        let y = &self.y;
        batch.pairs.visit(0..batch.u.rows, panel.clone(), |i, j, special| {
            if special == Special::Positive {
                let t = f64::from(counts.row_share[i]) / f64::from(counts.row_positives[i]);
                let y = &y[i * 2 * b..][..2 * b];
                *value -= t * (f64::from(y[j - panel.start]) + f64::from(y[b + j - panel.start]));
            }
        });
        let gamma = sized(&mut self.p, batch.u.rows * b);
        for (gamma, y) in gamma.chunks_exact_mut(b).zip(self.y.chunks_exact(2 * b)) {
            gamma.iter_mut().zip(y).for_each(|(g, y)| *g = 2.0 * y);
        }
    }
}

fn law_of(axis: Axis, softmaxes: Softmaxes<'_>) -> Law<'_> {
    match axis {
        Axis::Cols => Law::Softmax { rows: None, cols: Some(softmaxes) },
        Axis::Rows => Law::Softmax { rows: Some(softmaxes), cols: None },
    }
}
