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

use super::contrast::{Accumulated, Counted, Over, Sums, Tilted, conclude, pull_gradients};
use super::fused::{Buffer, Factor, Law, Logits, Norms, Part, Pull, RowSums, Side, Threads, grow, pack_columns};
use super::gemm::gemm;
use super::simd::Isa;
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
    ones: Norms,
    p: Vec<f32>,
    x: Vec<f32>,
    y: Vec<f32>,
    mean: Vec<f32>,
    lost: Vec<f32>,
    sums: Vec<f64>,
    packed: Buffer,
    all_u: Vec<f32>,
    all_v: Vec<f32>,
    part: Partial,
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
            &g.part.u,
            &g.part.v,
            &g.part.cols,
            &g.all_u,
            &g.all_v,
        ];
        let packed =
            [&self.packed_u, &self.packed_v, &g.packed_identity, &g.packed_data_u, &g.packed_data_v, &g.packed];
        4 * floats.iter().map(|v| v.capacity()).sum::<usize>()
            + packed.map(Buffer::bytes).iter().sum::<usize>()
            + 4 * self.moments.iter().map(Vec::capacity).sum::<usize>()
            + 4 * self.lost.capacity()
            + 8 * g.sums.capacity()
            + g.ones.bytes()
            + size_of::<RowSums>() * g.part.sums.capacity()
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
        row_norms,
        col_norms,
        row_sums,
        col_sums,
        grad_u,
        grad_v,
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
        row_norms.resize(n);
        (0..n).for_each(|i| row_norms.set_plain(i, max, (1.0 / sum) as f32));
    } else {
        row_side.probabilities(row_norms);
        col_side.probabilities(col_norms);
    }
    let context = Context { isa, batch, counts, tilted: &tilted, logits: &logits, row_norms, col_norms, threads };
    let moments = batch.moments.expect("validated: MMD has moments");
    let (value, sums) = match moments {
        Moments::Features { u, v } | Moments::Gram { kernel: DataKernel::Linear, u, v } => {
            let mut features = Features::new(own, u, v);
            let (value, law) = match over {
                Over::Each { lambda_u, lambda_v } => features.conditional(&context, lambda_u, lambda_v, row_sums),
                Over::All => features.joint(&context, row_sums),
            };
            (value, pull_gradients(&tilted, &logits, &law, gradients, row_sums, col_sums, grad_u, grad_v))
        }
        Moments::Gram { kernel: DataKernel::Gaussian { width }, u, v } => {
            let gram = &mut own.gram;
            let mut total = Total::new(&context, gradients, [grad_u, grad_v], row_sums, col_sums);
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
    row_norms: &'a Norms,
    col_norms: &'a Norms,
    threads: &'a Threads,
}

/// The rows of `matrix` in f32.
fn natural<'a>(matrix: Matrix<'a>, buffer: &'a mut Vec<f32>) -> &'a [f32] {
    if let Storage::F32(data) = matrix.data {
        return data;
    }
    grow(buffer, matrix.rows * matrix.dim);
    let out = &mut buffer[..matrix.rows * matrix.dim];
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
        let [carry_u, carry_v] = self.sides();
        let [f_u, f_v] = self.dims;
        let mut value = 0.0;
        let mut law = [None, None];
        if lambda_u > 0.0 {
            let part = context.col_norms.part(0..m);
            grow(self.residual_u, m * f_u);
            grow(self.targets, m * f_u);
            let (means, targets) = (&mut self.residual_u[..m * f_u], &mut self.targets[..m * f_u]);
            let means_only = Pull {
                carry_u,
                carry_v,
                out_rows: None,
                out_cols: Some(means),
                row_sums,
                col_sums: None,
                apart: false,
            };
            logits.pull(&Law::Softmax { rows: None, cols: Some(part) }, means_only);
            let means = &mut self.residual_u[..m * f_u];
            counts.target_means(batch, false, self.u, f_u, targets, self.lost);
            value += residuals(isa, means, targets, f_u, &counts.col_share, lambda_u, self.lost, self.mean_u);
            pack_columns::<f32>(isa, &Side::plain(Matrix::f32(means, f_u)), self.packed_u, threads);
            law[1] = Some(part.times(Factor { left: self.u, right: self.packed_u, dim: f_u, mean: self.mean_u }));
        }
        if lambda_v > 0.0 {
            let part = context.row_norms.part(0..n);
            grow(self.residual_v, n * f_v);
            grow(self.targets, n * f_v);
            let (means, targets) = (&mut self.residual_v[..n * f_v], &mut self.targets[..n * f_v]);
            let means_only = Pull {
                carry_u,
                carry_v,
                out_rows: Some(means),
                out_cols: None,
                row_sums,
                col_sums: None,
                apart: false,
            };
            logits.pull(&Law::Softmax { rows: Some(part), cols: None }, means_only);
            let means = &mut self.residual_v[..n * f_v];
            counts.target_means(batch, true, self.v, f_v, targets, self.lost);
            value += residuals(isa, means, targets, f_v, &counts.row_share, lambda_v, self.lost, self.mean_v);
            pack_columns::<f32>(isa, &carry_v, self.packed_v, threads);
            law[0] = Some(part.times(Factor { left: means, right: self.packed_v, dim: f_v, mean: self.mean_v }));
        }
        let [rows, cols] = law;
        (value, Law::Softmax { rows, cols })
    }

    fn joint(&mut self, context: &Context<'a>, row_sums: &mut Vec<RowSums>) -> (f64, Law<'_>) {
        let Context { isa, batch, counts, logits, threads, .. } = *context;
        let n = batch.u.rows;
        let [carry_u, carry_v] = self.sides();
        let [f_u, f_v] = self.dims;
        let part = context.row_norms.part(0..n);
        // H = W F_v, and less T F_v: small when the law is learned, so subtract before summing over rows.
        grow(self.residual_v, n * f_v);
        grow(self.targets, n * f_v);
        let (h, targets) = (&mut self.residual_v[..n * f_v], &mut self.targets[..n * f_v]);
        let means_only =
            Pull { carry_u, carry_v, out_rows: Some(&mut *h), out_cols: None, row_sums, col_sums: None, apart: false };
        logits.pull(&Law::Softmax { rows: Some(part), cols: None }, means_only);
        counts.target_means(batch, true, self.v, f_v, targets, self.lost);
        for (t, &w) in targets.chunks_exact_mut(f_v).zip(&counts.row_share) {
            t.iter_mut().for_each(|t| *t *= w);
        }
        let [law, target, gap, d] = self.moments;
        let mut moment = |out: &mut Vec<f32>, right: &[f32]| {
            out.resize(f_u * f_v, 0.0);
            let shape = Gemm { m: f_u, n: f_v, k: n, transpose_a: true, transpose_b: false };
            gemm(isa, shape, self.u, right, Write::Set(out), self.packed);
        };
        moment(law, h);
        moment(target, targets);
        let means = &mut *self.lost;
        means.clear();
        means.extend_from_slice(h);
        h.iter_mut().zip(&*targets).for_each(|(h, t)| *h -= t);
        moment(gap, h);
        // Of the law's own moments: they may be far smaller than the targets', and then so is the value.
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let value = dot(law, law) - 2.0 * dot(law, target);
        d.clear();
        d.extend(gap.iter().map(|&x| 2.0 * x));
        let shape = Gemm { m: n, n: f_v, k: f_u, transpose_a: false, transpose_b: false };
        gemm(isa, shape, self.u, d, Write::Set(h), self.packed);
        pack_columns::<f32>(isa, &carry_v, self.packed_v, threads);
        // As factors are multiplied out: where all weight is one pair's, its mean is that pair's factor, to the last bit.
        let rows = h.chunks_exact(f_v).zip(means.chunks_exact(f_v));
        let mean: f64 = rows.map(|(h, mean)| f64::from(Factor::entry(isa, h, mean))).sum();
        self.mean_v.clear();
        self.mean_v.resize(n, mean as f32);
        let factor = Factor { left: &self.residual_v[..n * f_v], right: self.packed_v, dim: f_v, mean: self.mean_v };
        (value, Law::Softmax { rows: Some(part.times(factor)), cols: None })
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

/// Which softmax a Gram panel cuts.
#[derive(Clone, Copy, PartialEq)]
enum Axis {
    /// Column softmaxes, a panel of columns.
    Cols,
    /// Row softmaxes, a panel of rows.
    Rows,
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
        [grad_u, grad_v]: [&'a mut Vec<f32>; 2],
        row_sums: &'a mut Vec<RowSums>,
        col_sums: &'a mut Vec<f32>,
    ) -> Self {
        let mut out = [Accumulated::new(gradients.u, grad_u), Accumulated::new(gradients.v, grad_v)];
        out.iter_mut().flatten().for_each(|out| out.acc().fill(0.0));
        row_sums.clear();
        row_sums.resize(context.batch.u.rows, RowSums::default());
        col_sums.clear();
        col_sums.resize(context.batch.v.rows, 0.0);
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
        part: &mut Partial,
    ) -> f64 {
        let dim = context.batch.u.dim;
        grow(&mut part.u, rows.len() * dim);
        grow(&mut part.v, cols.len() * dim);
        grow(&mut part.cols, cols.len());
        let (part_u, part_v) = (&mut part.u[..rows.len() * dim], &mut part.v[..cols.len() * dim]);
        let (part_cols, sums) = (&mut part.cols[..cols.len()], &mut part.sums);
        let pull = Pull {
            carry_u: context.tilted.u.slice(rows.clone()),
            carry_v: context.tilted.v.slice(cols.clone()),
            out_rows: Some(&mut *part_u),
            out_cols: Some(&mut *part_v),
            row_sums: &mut *sums,
            col_sums: Some(&mut *part_cols),
            apart: context.tilted.product == Product::SquaredDistance,
        };
        logits.pull(law, pull);
        let add = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(t, f)| *t += scale as f32 * f);
        if let Some(out) = &mut self.out[0] {
            add(&mut out.acc()[rows.start * dim..rows.end * dim], part_u);
        }
        if let Some(out) = &mut self.out[1] {
            add(&mut out.acc()[cols.start * dim..cols.end * dim], part_v);
        }
        add(&mut self.col_sums[cols], part_cols);
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

impl Gram {
    /// `out = K x` for the Gaussian kernel on `data` (packed), `x` `[rows, b]`, `out` `[cut, b]`, with K's rows or
    /// columns cut to those given.
    #[allow(clippy::too_many_arguments, reason = "operands, outputs and where they are cut")]
    fn apply(
        context: &Context<'_>,
        width: f64,
        data: Matrix<'_>,
        packed: &[f32],
        ones: &mut Norms,
        x: &[f32],
        b: usize,
        out: &mut [f32],
        sums: &mut Vec<RowSums>,
    ) {
        ones.resize(data.rows);
        (0..data.rows).for_each(|i| ones.set_plain(i, 0.0, 1.0));
        let cols = x.len() / b;
        let nothing = Pairs { positives: Positives::Diagonal, ..Pairs::default() };
        let logits = Logits {
            isa: context.isa,
            u: Side::plain(data),
            packed,
            inverse_v: &[],
            m: cols,
            product: Product::SquaredDistance,
            scale: (-0.5 / (width * width)) as f32,
            offset: None,
            anchor: None,
            grid: None,
            kept: None,
            exponentials: false,
            pairs: &nothing,
            origin: [0, 0],
            threads: context.threads,
        };
        let carry = Side::plain(Matrix::f32(x, b));
        let law = Law::Softmax { rows: Some(ones.part(0..data.rows)), cols: None };
        let pull = Pull {
            carry_u: carry,
            carry_v: carry,
            out_rows: Some(out),
            out_cols: None,
            row_sums: sums,
            col_sums: None,
            apart: false,
        };
        logits.pull(&law, pull);
    }

    /// An identity of `b` rows, plain and packed.
    fn identity(&mut self, context: &Context<'_>, b: usize) {
        self.identity.clear();
        self.identity.resize(b * b, 0.0);
        (0..b).for_each(|i| self.identity[i * (b + 1)] = 1.0);
        let side = Side::plain(Matrix::f32(&self.identity, b));
        pack_columns::<f32>(context.isa, &side, &mut self.packed_identity, context.threads);
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
        let Context { isa, batch, counts, logits, threads, .. } = *context;
        let (n, m, dim) = (batch.u.rows, batch.v.rows, batch.u.dim);
        let (long, short, share, counts) = match axis {
            Axis::Cols => (n, m, &counts.col_share, &counts.col_positives),
            Axis::Rows => (m, n, &counts.row_share, &counts.row_positives),
        };
        pack_columns::<f32>(isa, &Side::plain(data), &mut self.packed_data_u, threads);
        let mut value = 0.0;
        for start in (0..short).step_by(PANEL) {
            let panel = start..short.min(start + PANEL);
            let b = panel.len();
            self.identity(context, b);
            let eye = Side::plain(Matrix::f32(&self.identity, b));
            for (buffer, len) in [(&mut self.p, long * b), (&mut self.x, 2 * long * b), (&mut self.y, 2 * long * b)] {
                grow(buffer, len);
            }
            let p = &mut self.p[..long * b];
            // The panel of P, one row for each of the long side.
            let (block, at, part) = match axis {
                Axis::Cols => (
                    Logits {
                        packed: &logits.packed[start * dim..],
                        m: b,
                        offset: logits.offset.map(|o| &o[panel.clone()]),
                        origin: [0, start],
                        kept: None,
                        ..*logits
                    },
                    [0..n, panel.clone()],
                    context.col_norms.part(panel.clone()),
                ),
                Axis::Rows => (
                    Logits { u: logits.u.slice(panel.clone()), origin: [start, 0], kept: None, ..*logits },
                    [panel.clone(), 0..m],
                    context.row_norms.part(panel.clone()),
                ),
            };
            let (out_rows, out_cols) = if axis == Axis::Cols { (Some(&mut *p), None) } else { (None, Some(&mut *p)) };
            let pull = Pull {
                carry_u: eye,
                carry_v: eye,
                out_rows,
                out_cols,
                row_sums: &mut self.part.sums,
                col_sums: None,
                apart: false,
            };
            block.pull(&law_of(axis, part), pull);
            // X = [P - T | T], Y = K X.
            let (x, y) = (&mut self.x[..2 * long * b], &mut self.y[..2 * long * b]);
            for (x, p) in x.chunks_exact_mut(2 * b).zip(p.chunks_exact(b)) {
                x[..b].copy_from_slice(p);
                x[b..].fill(0.0);
            }
            let [rows, cols] = at.clone();
            batch.pairs.visit(rows, cols, |i, j, special| {
                if special == Special::Positive {
                    let (row, col) = if axis == Axis::Cols { (i, j) } else { (j, i) };
                    let t = 1.0 / counts[col] as f32;
                    x[row * 2 * b + col - start] -= t;
                    x[row * 2 * b + b + col - start] = t;
                }
            });
            Gram::apply(context, width, data, &self.packed_data_u, &mut self.ones, x, 2 * b, y, &mut self.part.sums);
            // Gamma = lambda x_j K (P - T) over P's panel, and <P_j, Gamma_j>.
            let mean = &mut self.sums;
            mean.clear();
            mean.resize(b, 0.0);
            for ((x, y), p) in x.chunks_exact(2 * b).zip(y.chunks_exact(2 * b)).zip(p.chunks_exact_mut(b)) {
                for (k, p) in p.iter_mut().enumerate() {
                    let weight = lambda * f64::from(share[start + k]);
                    let product = |k: usize| f64::from(x[k]) * f64::from(y[k]);
                    value += 0.5 * weight * (product(k) - product(b + k));
                    let gamma = weight * f64::from(y[k]);
                    mean[k] += f64::from(*p) * gamma;
                    *p = gamma as f32;
                }
            }
            self.mean.clear();
            self.mean.extend(mean.iter().map(|&x| x as f32));
            let factor = match axis {
                Axis::Cols => Factor { left: p, right: &self.packed_identity, dim: b, mean: &self.mean },
                Axis::Rows => {
                    pack_columns::<f32>(isa, &Side::plain(Matrix::f32(p, b)), &mut self.packed, threads);
                    Factor { left: &self.identity, right: &self.packed, dim: b, mean: &self.mean }
                }
            };
            total.pull(context, &block, &law_of(axis, part.times(factor)), at, 1.0, &mut self.part);
        }
        value
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
        let Context { isa, batch, counts, logits, threads, .. } = *context;
        let (n, m, dim) = (batch.u.rows, batch.v.rows, batch.u.dim);
        pack_columns::<f32>(isa, &Side::plain(data_u), &mut self.packed_data_u, threads);
        pack_columns::<f32>(isa, &Side::plain(data_v), &mut self.packed_data_v, threads);
        let law = Law::Softmax { rows: Some(context.row_norms.part(0..n)), cols: None };
        let (mut value, mut mean) = (0.0, 0.0);
        for start in (0..m).step_by(PANEL) {
            let panel = start..m.min(start + PANEL);
            let b = panel.len();
            self.identity(context, b);
            for (buffer, len) in [(&mut self.p, n.max(m) * b), (&mut self.x, 2 * n * b), (&mut self.y, 2 * n * b)] {
                grow(buffer, len);
            }
            // A panel of K_v, [M, b].
            grow(&mut self.all_v, m * b);
            let kernel = &mut self.all_v[..m * b];
            let packed = &self.packed_data_v[start * data_v.dim..];
            Gram::apply(context, width, data_v, packed, &mut self.ones, &self.identity, b, kernel, &mut self.part.sums);
            // W K_v and T K_v, [N, b].
            grow(&mut self.all_u, n * b);
            let (wk, tk) = (&mut self.p[..n * b], &mut self.all_u[..n * b]);
            let carry = Side::plain(Matrix::f32(kernel, b));
            let pull = Pull {
                carry_u: carry,
                carry_v: carry,
                out_rows: Some(&mut *wk),
                out_cols: None,
                row_sums: &mut self.part.sums,
                col_sums: None,
                apart: false,
            };
            logits.pull(&law, pull);
            counts.target_means(batch, true, kernel, b, tk, &mut self.lost);
            let (x, y) = (&mut self.x[..2 * n * b], &mut self.y[..2 * n * b]);
            for (i, x) in x.chunks_exact_mut(2 * b).enumerate() {
                for k in 0..b {
                    let t = counts.row_share[i] * tk[i * b + k];
                    x[k] = wk[i * b + k] - t;
                    x[b + k] = t;
                }
            }
            // Y = K_u [(W - T) K_v | T K_v]; Gamma = 2 K_u (W - T) K_v.
            Gram::apply(context, width, data_u, &self.packed_data_u, &mut self.ones, x, 2 * b, y, &mut self.part.sums);
            batch.pairs.visit(0..n, panel.clone(), |i, j, special| {
                if special == Special::Positive {
                    let t = f64::from(counts.row_share[i]) / f64::from(counts.row_positives[i]);
                    let y = &y[i * 2 * b..][..2 * b];
                    value -= t * (f64::from(y[j - start]) + f64::from(y[b + j - start]));
                }
            });
            let gamma = &mut self.p[..n * b];
            for (gamma, y) in gamma.chunks_exact_mut(b).zip(y.chunks_exact(2 * b)) {
                gamma.iter_mut().zip(y).for_each(|(g, y)| *g = 2.0 * y);
            }
            self.mean.clear();
            self.mean.resize(n, 0.0);
            let factor = Factor { left: gamma, right: &self.packed_identity, dim: b, mean: &self.mean };
            let block = Logits {
                packed: &logits.packed[start * dim..],
                m: b,
                offset: logits.offset.map(|o| &o[panel.clone()]),
                origin: [0, start],
                kept: None,
                ..*logits
            };
            let part = context.row_norms.part(0..n).times(factor);
            mean += total.pull(context, &block, &law_of(Axis::Rows, part), [0..n, panel], 1.0, &mut self.part);
        }
        // G = W o Gamma - <W, Gamma> W.
        total.pull(context, logits, &law, [0..n, 0..m], -mean, &mut self.part);
        value + 0.5 * mean
    }
}

fn law_of(axis: Axis, part: Part<'_>) -> Law<'_> {
    match axis {
        Axis::Cols => Law::Softmax { rows: None, cols: Some(part) },
        Axis::Rows => Law::Softmax { rows: Some(part), cols: None },
    }
}
