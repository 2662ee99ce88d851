//! Classification by a finite set of labels (Algorithm 2): the label of largest s(u, label), or after fine-tuning of
//! largest `G' g_u(u)/tau + F` (34), (35).

use super::scores::{check_finite, exact};
use crate::data::gaussian2d::cholesky;
use crate::data::{Rows, permute};
use crate::device::cpu::{Cpu, Isa};
use crate::device::{Device, Engine, Gemm, View, ViewMut};
use crate::nn::Layout;
use crate::objective::{
    Batch, Gradients, Loss, LossError, Matrix, Objective, Pairs, Positives, Tilting, Write, check_tau, shape,
};
use crate::optim::{Adam, AdamConfig, Schedule};
use rayon::prelude::*;

/// Labels found, and how sure.
#[derive(Clone, Debug, PartialEq)]
pub struct Labels {
    /// `[inputs]`; ties: the lowest.
    pub labels: Vec<usize>,
    /// `softmax_k (s(u_i, label_k) + bias_k)`, `[inputs, classes]`.
    pub probabilities: Vec<f64>,
}

/// A classifier on frozen embeddings: logits `G' g/tau + F`.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// G', `[classes, dim]`.
    pub weight: Vec<f32>,
    /// F, `[classes]`.
    pub bias: Vec<f32>,
}

/// Labels the embeddings `inputs` by the embedded `classes`, `[classes, dim]`, and a bias of each class, `[classes]`.
///
/// # Errors
/// [`LossError::Shape`] when there is no class or shapes differ, [`LossError::Parameter`] for a `tau` that is not above 0,
/// [`LossError::NotFinite`] of a row.
pub fn classify(
    tilting: Tilting,
    tau: f64,
    inputs: &dyn Rows,
    classes: &dyn Rows,
    bias: Option<&[f32]>,
) -> Result<Labels, LossError> {
    let (n, dim, count) = (inputs.count(), inputs.dim(), classes.count());
    check_tau(tau)?;
    if count == 0 {
        return Err(LossError::Shape { what: "classes", found: "0 rows".into(), expected: "at least one".into() });
    }
    shape("columns of the inputs", dim, classes.dim())?;
    shape("biases, one of each class", bias.map_or(count, <[f32]>::len), count)?;
    check_finite("inputs", inputs)?;
    check_finite("classes", classes)?;
    let mut class = vec![0f32; count * dim];
    classes.read(0, &mut class);
    let mut probabilities = vec![0f64; n * count];
    let label = |(i, p): (usize, &mut [f64])| {
        let mut input = vec![0f32; dim];
        inputs.read(i, &mut input);
        for (k, (p, class)) in p.iter_mut().zip(class.chunks_exact(dim)).enumerate() {
            *p = exact(tilting, &input, class) / tau + bias.map_or(0.0, |b| f64::from(b[k]));
        }
        let best = (0..count).fold(0, |best, k| if p[k] > p[best] { k } else { best });
        let most = p[best];
        p.iter_mut().for_each(|p| *p = (*p - most).exp());
        let total: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= total);
        best
    };
    let labels = probabilities.par_chunks_exact_mut(count).enumerate().map(label).collect();
    Ok(Labels { labels, probabilities })
}

/// Share of the labels `found` that are the true ones.
///
/// # Panics
/// When there are not as many.
pub fn accuracy<L: Copy + Into<u64>>(found: &[usize], truth: &[L]) -> f64 {
    assert_eq!(found.len(), truth.len(), "labels");
    let right = found.iter().zip(truth).filter(|&(&found, &label)| found as u64 == label.into()).count();
    right as f64 / truth.len() as f64
}

/// Steps of fine-tuning, their batch and peak learning rate; the problem is convex and small, and rows are made alike in all
/// directions first.
const STEPS: u64 = 2000;
const BATCH: usize = 512;
const LR: f64 = 0.02;

/// Trains a classifier on frozen `embeddings`, `[M, dim]`, of known `labels`, each below `classes`, by the one-sided loss
/// (34): cross entropy less log K.
///
/// # Errors
/// [`LossError`] when shapes do not fit, there is no embedding, or one is not finite.
pub fn fine_tune(
    tau: f64,
    embeddings: &dyn Rows,
    labels: &[u32],
    classes: usize,
    seed: u64,
) -> Result<Head, LossError> {
    let (n, dim) = (embeddings.count(), embeddings.dim());
    if n == 0 {
        return Err(LossError::Shape { what: "embeddings", found: "0 rows".into(), expected: "at least one".into() });
    }
    shape("labels", labels.len(), n)?;
    let mut engine = Cpu::new();
    let device = Cpu::new();
    let mut layout = Layout::default();
    let weight = layout.push("weight", &[classes, dim]);
    let bias = layout.push("bias", &[classes]);
    let mut params = device.alloc(layout.len());
    let mut grads = device.alloc(layout.len());
    let mut adam = Adam::new(&device, AdamConfig::default(), &layout);
    let loss = Loss {
        tilting: Tilting::Dot,
        objective: Objective::Conditional { lambda_u: 0.0, lambda_v: 2.0 },
        tau: 1.0,
        smoothing: 0.0,
    };
    let spread = Spread::of(embeddings);
    let even = spread.even(embeddings);
    let batch = BATCH.min(n);
    let (mut g, mut host) = (vec![0f32; layout.len()], vec![0f32; layout.len()]);
    let (mut rows, mut positives) = (vec![0f32; batch * dim], vec![0u32; batch]);
    let per_epoch = (n / batch) as u64;
    for step in 0..STEPS {
        for (i, (row, positive)) in rows.chunks_exact_mut(dim).zip(&mut positives).enumerate() {
            let at = (step % per_epoch) as usize * batch + i;
            let pick = permute(seed, step / per_epoch, n, at);
            row.copy_from_slice(&even[pick * dim..][..dim]);
            *positive = labels[pick];
        }
        let batch = Batch {
            u: Matrix::f32(&rows, dim),
            v: Matrix::f32(&host[weight.clone()], dim),
            pairs: Pairs { positives: Positives::Index(&positives), ..Pairs::default() },
            offset_v: Some(&host[bias.clone()]),
            moments: None,
        };
        let (g_weight, g_bias) = g.split_at_mut(weight.end);
        let gradients =
            Gradients { u: None, v: Some(Write::Set(g_weight)), offset_v: Some(Write::Set(&mut g_bias[..classes])) };
        engine.loss(&loss, &batch, gradients)?;
        device.upload(&g, ViewMut { buf: &mut grads, at: 0..g.len() });
        let lr = LR * Schedule::Cosine.factor(step, 0, STEPS);
        adam.step(&device, step, lr, 1.0, &mut params, &grads);
        device.download(View { buf: &params, at: 0..host.len() }, &mut host);
    }
    Ok(spread.head(tau, &host[weight], &host[bias]))
}

/// How rows are spread: what makes them alike in all directions, `y = T (x - mean)`, of covariance 1, nearly.
struct Spread {
    mean: Vec<f64>,
    /// `[dim, dim]`, lower triangular.
    t: Vec<f64>,
}

impl Spread {
    /// Numbers a row over rows, times so much, is the weight that equal spread in all directions has beside what rows say of it:
    /// few rows say little, and what they hardly differ in is no more than chance.
    const CHANCE: f64 = 10.0;

    fn of(rows: &dyn Rows) -> Self {
        let (n, dim, device) = (rows.count(), rows.dim(), Cpu::wide(Isa::best()));
        let mut mean = vec![0f64; dim];
        blocks(rows, &vec![0.0; dim], |x| {
            x.chunks_exact(dim).for_each(|row| mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x / n as f64));
        });
        let mut factor = vec![0f64; dim * dim];
        blocks(rows, &mean, |x| {
            let shape = Gemm { m: dim, n: dim, k: x.len() / dim, transpose_a: true, transpose_b: false };
            let [left, right] = [(); 2].map(|()| View::first(x, x.len()));
            device.gemm(shape, left, right, Write::Add(ViewMut::first(&mut factor, dim * dim)));
        });
        let equal: f64 = factor.iter().step_by(dim + 1).sum::<f64>() / (n * dim) as f64;
        let chance = Self::CHANCE * dim as f64 / n as f64;
        factor.iter_mut().for_each(|c| *c /= (1.0 + chance) * n as f64);
        factor.iter_mut().step_by(dim + 1).for_each(|c| *c += chance / (1.0 + chance) * equal);
        let mut t = vec![0f64; dim * dim];
        t.iter_mut().step_by(dim + 1).for_each(|t| *t = 1.0);
        // Rows of which none differs from another, or whose squares f64 does not hold, stay as they are.
        if equal > 0.0 && cholesky(&mut factor, dim).is_ok() {
            for i in 0..dim {
                let (above, row) = t.split_at_mut(i * dim);
                let row = &mut row[..=i];
                for (above, &l) in above.chunks_exact(dim).zip(&factor[i * dim..]) {
                    row.iter_mut().zip(above).for_each(|(t, above)| *t -= l * above);
                }
                row.iter_mut().for_each(|t| *t /= factor[i * dim + i]);
            }
        }
        Spread { mean, t }
    }

    /// All rows, made alike.
    fn even(&self, rows: &dyn Rows) -> Vec<f32> {
        let (dim, device) = (rows.dim(), Cpu::wide(Isa::best()));
        let (mut even, mut y) = (Vec::with_capacity(rows.count() * dim), Vec::new());
        blocks(rows, &self.mean, |x| {
            y.resize(x.len(), 0.0);
            let shape = Gemm { m: x.len() / dim, n: dim, k: dim, transpose_a: false, transpose_b: true };
            let to = Write::Set(ViewMut::first(&mut y, x.len()));
            device.gemm(shape, View::first(x, x.len()), View::first(&self.t, dim * dim), to);
            even.extend(y.iter().map(|&y| y as f32));
        });
        even
    }

    /// The classifier of rows as they are whose logits are those of `weight` and `bias` on rows made alike.
    fn head(&self, tau: f64, weight: &[f32], bias: &[f32]) -> Head {
        let dim = self.mean.len();
        let mut head = Head { weight: Vec::with_capacity(weight.len()), bias: bias.to_vec() };
        let mut own = vec![0f64; dim];
        for (weight, bias) in weight.chunks_exact(dim).zip(&mut head.bias) {
            own.fill(0.0);
            for (&w, t) in weight.iter().zip(self.t.chunks_exact(dim)) {
                own.iter_mut().zip(t).for_each(|(own, t)| *own += f64::from(w) * t);
            }
            head.weight.extend(own.iter().map(|own| (tau * own) as f32));
            *bias -= own.iter().zip(&self.mean).map(|(own, mean)| own * mean).sum::<f64>() as f32;
        }
        head
    }
}

/// Calls `f` with all rows, some at a time, less `mean`.
fn blocks(rows: &dyn Rows, mean: &[f64], mut f: impl FnMut(&Vec<f64>)) {
    let (n, dim) = (rows.count(), rows.dim());
    let mut read = vec![0f32; BATCH.min(n) * dim];
    for first in (0..n).step_by(BATCH) {
        let read = &mut read[..BATCH.min(n - first) * dim];
        rows.read(first, read);
        let less = |row: &[f32]| row.iter().zip(mean).map(|(&x, mean)| f64::from(x) - mean).collect::<Vec<_>>();
        f(&read.chunks_exact(dim).flat_map(less).collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Table;
    use rand::{RngExt, SeedableRng};

    #[test]
    fn probabilities_are_the_softmax_and_ties_go_to_the_lowest() {
        let (inputs, classes) = ([1f32, 0.0, 0.5, -2.0], [0.0f32, 1.0, 2.0, 0.0, 2.0, 0.0]);
        let (inputs, classes) = (Table { data: &inputs, dim: 2 }, Table { data: &classes, dim: 2 });
        let got = classify(Tilting::Dot, 0.5, &inputs, &classes, None).unwrap();
        assert_eq!(got.labels, [1, 1]);
        let e = 4f64.exp();
        for (got, want) in got.probabilities.iter().zip([1.0, e, e].map(|x| x / (1.0 + 2.0 * e))) {
            assert!((got - want).abs() < 1e-12);
        }
        let biased = classify(Tilting::Dot, 0.5, &inputs, &classes, Some(&[0.0, 0.0, 0.1])).unwrap();
        assert_eq!(biased.labels, [2, 2]);
    }

    // Where the data are Gaussian with equal covariances, the best classifier is linear and known: fine-tuning finds
    // weights whose error rate is Bayes', and probabilities that are calibrated.
    #[test]
    fn fine_tuning_finds_the_bayes_classifier() {
        let (n, dim, classes) = (6000, 3, 3);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(4);
        let means: Vec<f32> = (0..classes * dim).map(|_| rng.random_range(-1.5..1.5)).collect();
        let labels: Vec<u32> = (0..n).map(|_| rng.random_range(0..classes as u32)).collect();
        // The sum of twelve uniform numbers, less 6, is near enough to normal.
        let mut normal = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
        let x: Vec<f32> = labels
            .iter()
            .flat_map(|&l| (0..dim).map(move |k| (l as usize) * dim + k))
            .map(|at| means[at] + normal())
            .collect();
        let x = Table { data: &x, dim };
        let tau = 0.3;
        let head = fine_tune(tau, &x, &labels, classes, 1).unwrap();
        let weight = Table { data: &head.weight, dim };
        let got = classify(Tilting::Dot, tau, &x, &weight, Some(&head.bias)).unwrap();
        // And where they are small, far from the origin and spread unevenly: the same classifier.
        let uneven: Vec<f32> =
            x.data.chunks(dim).flat_map(|x| [x[0], 3.0 * x[0] + x[1], x[2] - x[1]].map(|x| 0.01 * x + 2.0)).collect();
        let uneven = Table { data: &uneven, dim };
        let head = fine_tune(tau, &uneven, &labels, classes, 1).unwrap();
        let weight = Table { data: &head.weight, dim };
        let same = classify(Tilting::Dot, tau, &uneven, &weight, Some(&head.bias)).unwrap();
        let bayes: Vec<f32> = means.chunks(dim).map(|m| -0.5 * m.iter().map(|x| x * x).sum::<f32>()).collect();
        let best = classify(Tilting::Dot, 1.0, &x, &Table { data: &means, dim }, Some(&bayes)).unwrap();
        let [right, most] = [&got, &best].map(|found| accuracy(&found.labels, &labels));
        assert!((right - most).abs() < 0.005, "{right} {most}");
        for got in [got, same] {
            let off: f64 = got.probabilities.iter().zip(&best.probabilities).map(|(a, b)| (a - b).abs()).sum::<f64>();
            assert!(off < 0.02 * (n * classes) as f64, "{off}");
        }
    }

    // The rows that the first epoch's order leaves over are the only ones of their class: later ones see them.
    #[test]
    fn each_epoch_leaves_other_rows_over() {
        let (seed, n) = (3, BATCH + 20);
        let mut labels = vec![0u32; n];
        (BATCH..n).for_each(|at| labels[permute(seed, 0, n, at)] = 1);
        let x: Vec<f32> = labels.iter().flat_map(|&label| [label as f32, 1.0]).collect();
        let x = Table { data: &x, dim: 2 };
        let head = fine_tune(1.0, &x, &labels, 2, seed).unwrap();
        let got = classify(Tilting::Dot, 1.0, &x, &Table { data: &head.weight, dim: 2 }, Some(&head.bias)).unwrap();
        assert_eq!(got.labels, labels.iter().map(|&label| label as usize).collect::<Vec<_>>());
    }

    #[test]
    fn classes_that_are_no_numbers_are_refused() {
        let (input, classes) = ([1f32], [0.5f32, f32::NAN]);
        let [input, classes] = [&input[..], &classes].map(|data| Table { data, dim: 1 });
        for (inputs, classes, what) in [(&input, &classes, "classes row 1"), (&classes, &input, "inputs row 1")] {
            let error = classify(Tilting::Dot, 1.0, inputs, classes, None).unwrap_err().to_string();
            assert!(error.starts_with(what), "{error}");
        }
    }

    // Four points on the axes: covariance diag(2, 1/2), 5/4 on average, of which chance has 10 * 2/4 parts to one.
    #[test]
    fn few_rows_are_taken_for_nearly_even() {
        let rows = [3f32, 1.0, -1.0, 1.0, 1.0, 2.0, 1.0, 0.0];
        let spread = Spread::of(&Table { data: &rows, dim: 2 });
        assert_eq!(spread.mean, [1.0, 1.0]);
        let want = [2.0f64, 0.5].map(|own| ((own + 5.0 * 1.25) / 6.0).sqrt().recip());
        for (got, want) in spread.t.iter().zip([want[0], 0.0, 0.0, want[1]]) {
            assert!((got - want).abs() < 1e-12, "{:?}, want {want}", spread.t);
        }
    }
}
