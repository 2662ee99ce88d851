//! The definition of every loss, written naively in f64: forms all N x M matrices, and shares no
//! arithmetic with the engines. Everything fast is tested against this.

use super::counts::Counts;
use super::{Batch, DataKernel, Loss, LossError, Matrix, Moments, Objective, Pairs, Positives, Storage, Tilting};

/// Value and gradients in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// As [`super::Value::loss`].
    pub loss: f64,
    /// dL/du, `[N, D]`.
    pub grad_u: Vec<f64>,
    /// dL/dv, `[M, D]`.
    pub grad_v: Vec<f64>,
    /// dL/dtau.
    pub grad_tau: f64,
    /// dL/dbias.
    pub grad_bias: f64,
    /// dL/d offset_v, `[M]`.
    pub grad_offset_v: Vec<f64>,
}

/// A small dense matrix, row by row.
#[derive(Clone, Debug)]
struct Dense {
    rows: usize,
    cols: usize,
    x: Vec<f64>,
}

impl Dense {
    fn from_fn(rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Dense {
        Dense { rows, cols, x: (0..rows * cols).map(|k| f(k / cols, k % cols)).collect() }
    }
    fn at(&self, i: usize, j: usize) -> f64 {
        self.x[i * self.cols + j]
    }
    fn map(&self, f: impl Fn(usize, usize, f64) -> f64) -> Dense {
        Dense::from_fn(self.rows, self.cols, |i, j| f(i, j, self.at(i, j)))
    }
    fn transpose(&self) -> Dense {
        Dense::from_fn(self.cols, self.rows, |i, j| self.at(j, i))
    }
    fn times(&self, b: &Dense) -> Dense {
        let mut out = Dense::from_fn(self.rows, b.cols, |_, _| 0.0);
        for (i, out) in out.x.chunks_mut(b.cols).enumerate() {
            for (k, a) in row(self, i).iter().enumerate() {
                out.iter_mut().zip(row(b, k)).for_each(|(out, b)| *out += a * b);
            }
        }
        out
    }
    /// A number of each row.
    fn by_row(&self, f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        (0..self.rows).map(|i| f(row(self, i))).collect()
    }
    fn dot(&self, b: &Dense) -> f64 {
        self.x.iter().zip(&b.x).map(|(a, b)| a * b).sum()
    }
    fn read(m: &Matrix<'_>) -> Dense {
        let x = match m.data {
            Storage::F32(x) => x.iter().map(|&x| f64::from(x)).collect(),
            Storage::Bf16(x) => x.iter().map(|x| x.to_f64()).collect(),
            Storage::F16(x) => x.iter().map(|x| x.to_f64()).collect(),
        };
        Dense { rows: m.rows, cols: m.dim, x }
    }
}

/// Evaluates `loss` on `batch` by its definition. O(N M) memory, O(N^3) work for MMD.
///
/// # Errors
/// As the engines'.
pub fn loss(loss: &Loss, batch: &Batch<'_>) -> Result<Reference, LossError> {
    batch.validate(loss)?;
    Counts::default().prepare(batch, loss.objective.is_of_each_pair())?;
    let (u, v) = (Dense::read(&batch.u), Dense::read(&batch.v));
    let plain = logits(loss, &u, &v);
    let s = plain.map(|_, j, s| s + batch.offset_v.map_or(0.0, |o| f64::from(o[j])));
    let kinds = Kinds::new(batch);
    let (value, g) = value_and_g(loss, batch, &s, &kinds);
    let (grad_u, grad_v) = through_tilting(loss, &u, &v, &g);
    let bias = loss.objective.is_of_each_pair();
    Ok(Reference {
        loss: value,
        grad_u: grad_u.x,
        grad_v: grad_v.x,
        grad_tau: -g.dot(&plain) / loss.tau,
        grad_bias: if bias { g.x.iter().sum() } else { 0.0 },
        grad_offset_v: (0..g.cols).map(|j| (0..g.rows).map(|i| g.at(i, j)).sum()).collect(),
    })
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn row(m: &Dense, i: usize) -> &[f64] {
    &m.x[i * m.cols..(i + 1) * m.cols]
}

fn unit(m: &Dense) -> Dense {
    let norms = m.by_row(norm);
    m.map(|i, _, x| if norms[i] == 0.0 { 0.0 } else { x / norms[i] })
}

fn logits(loss: &Loss, u: &Dense, v: &Dense) -> Dense {
    match loss.tilting {
        Tilting::Cosine => unit(u).times(&unit(v).transpose()).map(|_, _, s| s / loss.tau),
        Tilting::Dot => u.times(&v.transpose()).map(|_, _, s| s / loss.tau),
        Tilting::L2 => Dense::from_fn(u.rows, v.rows, |i, j| {
            let square: f64 = row(u, i).iter().zip(row(v, j)).map(|(a, b)| (a - b).powi(2)).sum();
            -square / (2.0 * loss.tau)
        }),
    }
}

fn through_tilting(loss: &Loss, u: &Dense, v: &Dense, g: &Dense) -> (Dense, Dense) {
    let one = |x: &Dense, y: &Dense, g: &Dense| match loss.tilting {
        Tilting::Dot => g.times(y).map(|_, _, d| d / loss.tau),
        Tilting::L2 => Dense::from_fn(x.rows, x.cols, |i, k| {
            (0..y.rows).map(|j| g.at(i, j) * (y.at(j, k) - x.at(i, k))).sum::<f64>() / loss.tau
        }),
        Tilting::Cosine => {
            let d = g.times(&unit(y)).map(|_, _, d| d / loss.tau);
            let (e, norms) = (unit(x), x.by_row(norm));
            let along = d.map(|i, k, d_ik| d_ik * e.at(i, k)).by_row(|products| products.iter().sum());
            d.map(|i, k, d_ik| if norms[i] == 0.0 { 0.0 } else { (d_ik - along[i] * e.at(i, k)) / norms[i] })
        }
    };
    (one(u, v, g), one(v, u, &g.transpose()))
}

/// What each pair is, and each row's and column's weight.
struct Kinds {
    positive: Dense,
    /// 0 for ignored pairs, 1 for the others.
    present: Dense,
    w: Vec<f64>,
    x: Vec<f64>,
    w_all: Vec<f64>,
}

impl Kinds {
    fn new(batch: &Batch<'_>) -> Kinds {
        let (n, m) = (batch.u.rows, batch.v.rows);
        let Pairs { positives, ignore, weights_u, weights_v } = batch.pairs;
        let is_positive = |i: usize, j: usize| match positives {
            Positives::Diagonal => i == j,
            Positives::Index(index) => index[i] as usize == j,
            Positives::Groups { u, v } => u[i] == v[j],
        };
        let positive = Dense::from_fn(n, m, |i, j| f64::from(u8::from(is_positive(i, j))));
        let present = Dense::from_fn(n, m, |i, j| match ignore {
            Some((u, v)) if u[i] == v[j] && !is_positive(i, j) => 0.0,
            _ => 1.0,
        });
        let share = |len: usize, weights: Option<&[f32]>, counts: &dyn Fn(usize) -> bool| -> Vec<f64> {
            let raw: Vec<f64> =
                (0..len).map(|i| if counts(i) { weights.map_or(1.0, |w| f64::from(w[i])) } else { 0.0 }).collect();
            let total: f64 = raw.iter().sum();
            raw.iter().map(|x| if total > 0.0 { x / total } else { 0.0 }).collect()
        };
        let row_has = |i: usize| row(&positive, i).iter().sum::<f64>() > 0.0;
        let col_has = |j: usize| (0..n).any(|i| positive.at(i, j) > 0.0);
        let (w, x) = (share(n, weights_u, &row_has), share(m, weights_v, &col_has));
        let w_all = share(n, weights_u, &|_| true);
        Kinds { positive, present, w, x, w_all }
    }

    /// Row targets `T^r`, rows without a positive being zero.
    fn targets(&self, smoothing: f64) -> Dense {
        let [counts, candidates] = [&self.positive, &self.present].map(|pairs| pairs.by_row(|row| row.iter().sum()));
        self.positive.map(|i, j, p| {
            if counts[i] == 0.0 || self.present.at(i, j) == 0.0 {
                return 0.0;
            }
            (1.0 - smoothing) * p / counts[i] + smoothing / candidates[i]
        })
    }

    /// The same pairs with rows and columns exchanged.
    fn transpose(&self) -> Kinds {
        Kinds {
            positive: self.positive.transpose(),
            present: self.present.transpose(),
            w: self.x.clone(),
            x: self.w.clone(),
            w_all: self.x.clone(),
        }
    }
}

/// Softmax of each row over the pairs present, and its log-sum-exp.
fn softmax_rows(s: &Dense, present: &Dense) -> (Dense, Vec<f64>) {
    let lse: Vec<f64> = (0..s.rows)
        .map(|i| {
            let here = || (0..s.cols).filter(move |&j| present.at(i, j) > 0.0).map(move |j| s.at(i, j));
            let max = here().fold(f64::NEG_INFINITY, f64::max);
            max + here().map(|s| (s - max).exp()).sum::<f64>().ln()
        })
        .collect();
    (s.map(|i, j, s| if present.at(i, j) > 0.0 { (s - lse[i]).exp() } else { 0.0 }), lse)
}

/// `sum_i w_i (r_i - log M - <T_i, S_i>)` and its derivative in S.
fn one_sided(s: &Dense, kinds: &Kinds, smoothing: f64) -> (f64, Dense) {
    let (p, lse) = softmax_rows(s, &kinds.present);
    let t = kinds.targets(smoothing);
    let mut value = 0.0;
    for i in (0..s.rows).filter(|&i| kinds.w[i] > 0.0) {
        let pulled: f64 = row(&t, i).iter().zip(row(s, i)).map(|(t, s)| t * s).sum();
        value += kinds.w[i] * (lse[i] - (s.cols as f64).ln() - pulled);
    }
    (value, s.map(|i, j, _| if kinds.w[i] > 0.0 { kinds.w[i] * (p.at(i, j) - t.at(i, j)) } else { 0.0 }))
}

/// Softmax of everything present, and its log-sum-exp.
fn softmax_all(s: &Dense, present: &Dense) -> (Dense, f64) {
    let all = |m: &Dense| Dense { rows: 1, cols: m.x.len(), x: m.x.clone() };
    let (p, lse) = softmax_rows(&all(s), &all(present));
    (Dense { rows: s.rows, cols: s.cols, x: p.x }, lse[0])
}

fn value_and_g(loss: &Loss, batch: &Batch<'_>, s: &Dense, kinds: &Kinds) -> (f64, Dense) {
    let (n, m) = (s.rows as f64, s.cols as f64);
    let e = loss.smoothing;
    match loss.objective {
        Objective::Conditional { lambda_u, lambda_v } => {
            let (value_v, g_v) = one_sided(s, kinds, e);
            let (value_u, g_u) = one_sided(&s.transpose(), &kinds.transpose(), e);
            let g = s.map(|i, j, _| 0.5 * (lambda_v * g_v.at(i, j) + lambda_u * g_u.at(j, i)));
            (0.5 * (lambda_v * value_v + lambda_u * value_u), g)
        }
        Objective::Joint => {
            let (p, z) = softmax_all(s, &kinds.present);
            let t = kinds.targets(e).map(|i, _, t| kinds.w[i] * t);
            (z - (n * m).ln() - t.dot(s), p.map(|i, j, p| p - t.at(i, j)))
        }
        Objective::JointShuffled { pairings, seed } => {
            let orders: Vec<Vec<usize>> = (0..pairings).map(|k| super::pairing(s.rows, seed, k)).collect();
            let pairs = || orders.iter().flat_map(|o| o.iter().copied().enumerate());
            let max = pairs().map(|(i, j)| s.at(i, j)).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = pairs().map(|(i, j)| (s.at(i, j) - max).exp()).sum();
            let count = f64::from(pairings) * n;
            let pulled: f64 = (0..s.rows).map(|i| kinds.w[i] * s.at(i, i)).sum();
            let mut g = s.map(|i, j, _| if i == j { -kinds.w[i] } else { 0.0 });
            for (i, j) in pairs() {
                g.x[i * s.cols + j] += (s.at(i, j) - max).exp() / sum;
            }
            (max + (sum / count).ln() - pulled, g)
        }
        Objective::Sigmoid { bias } => {
            let target = |i: usize, j: usize| if kinds.positive.at(i, j) > 0.0 { 1.0 - e / 2.0 } else { e / 2.0 };
            let weight = |i: usize, j: usize| kinds.w_all[i] * kinds.present.at(i, j);
            let value = s.map(|i, j, s| {
                let x = s + bias;
                // softplus(x) - t x, as t softplus(-x) + (1 - t) softplus(x).
                let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
                weight(i, j) * (target(i, j) * softplus(-x) + (1.0 - target(i, j)) * softplus(x))
            });
            let g = s.map(|i, j, s| {
                let x = s + bias;
                // 1/(1 + e^-x) - t without cancellation where t is 1.
                let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
                let t = target(i, j);
                weight(i, j) * ((1.0 - t) * sigmoid(x) - t * sigmoid(-x))
            });
            (value.x.iter().sum(), g)
        }
        Objective::Mmd { lambda_u, lambda_v } => {
            let (k_u, k_v) = grams(batch);
            let (value_u, g_u) = conditional_mmd(&s.transpose(), &kinds.transpose(), &k_u);
            let (value_v, g_v) = conditional_mmd(s, kinds, &k_v);
            let g = s.map(|i, j, _| lambda_u * g_u.at(j, i) + lambda_v * g_v.at(i, j));
            (lambda_u * value_u + lambda_v * value_v, g)
        }
        Objective::JointMmd => {
            let (k_u, k_v) = grams(batch);
            let (w, _) = softmax_all(s, &kinds.present);
            let t = kinds.targets(0.0).map(|i, _, t| kinds.w[i] * t);
            let kwk = k_u.times(&w).times(&k_v);
            let gap = w.map(|i, j, w| w - t.at(i, j));
            let slope = k_u.times(&gap).times(&k_v).map(|_, _, x| 2.0 * x);
            let mean = w.dot(&slope);
            (w.dot(&kwk) - 2.0 * t.dot(&kwk), w.map(|i, j, w| w * (slope.at(i, j) - mean)))
        }
    }
}

/// `sum_i w_i (P_i K P_i'/2 - P_i K T_i')` over the rows of `s`, K the kernel on the data of its columns.
fn conditional_mmd(s: &Dense, kinds: &Kinds, k: &Dense) -> (f64, Dense) {
    let (p, _) = softmax_rows(s, &kinds.present);
    let t = kinds.targets(0.0);
    let (pk, tk) = (p.times(k), t.times(k));
    let used = |i: usize| kinds.w[i] > 0.0;
    let value = (0..s.rows)
        .filter(|&i| used(i))
        .map(|i| kinds.w[i] * (0..s.cols).map(|j| p.at(i, j) * (0.5 * pk.at(i, j) - tk.at(i, j))).sum::<f64>());
    let value = value.sum();
    let gap = pk.map(|i, j, pk| pk - tk.at(i, j));
    let mean = p.map(|i, j, p| p * gap.at(i, j)).by_row(|terms| terms.iter().sum());
    let g = p.map(|i, j, p| if used(i) { kinds.w[i] * p * (gap.at(i, j) - mean[i]) } else { 0.0 });
    (value, g)
}

/// K of the data of u and of v, `[N, N]` and `[M, M]`.
fn grams(batch: &Batch<'_>) -> (Dense, Dense) {
    let gram = |x: &Matrix<'_>, kernel: DataKernel| {
        let x = Dense::read(x);
        match kernel {
            DataKernel::Linear => x.times(&x.transpose()),
            DataKernel::Gaussian { width } => Dense::from_fn(x.rows, x.rows, |i, j| {
                let square: f64 = row(&x, i).iter().zip(row(&x, j)).map(|(a, b)| (a - b).powi(2)).sum();
                (-square / (2.0 * width * width)).exp()
            }),
        }
    };
    match batch.moments.as_ref().expect("validated: MMD has moments") {
        Moments::Features { u, v } => (gram(u, DataKernel::Linear), gram(v, DataKernel::Linear)),
        Moments::Gram { kernel, u, v } => (gram(u, *kernel), gram(v, *kernel)),
    }
}
