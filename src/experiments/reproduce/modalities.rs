//! Beyond the paper: three modalities whose encoders are shared by all pairs, beside the closed form of each pair.

use super::super::Error;
use super::{Part, Request, above, axis, below, largest, mark, parallel, table};
use crate::data::gaussian2d::Gaussian;
use crate::data::{Side, Source, permute};
use crate::device::cpu::Cpu;
use crate::device::{Device, View, ViewMut};
use crate::nn::Layout;
use crate::objective::{Loss, Objective, Tilting};
use crate::optim::{Adam, AdamConfig, Schedule};
use crate::plot::{Axis, Figure, Panel, Shape, Style};
use crate::tasks::modalities::pairwise;
use crate::theory::{Certificate, Theory};
use crate::train::TrainError;
use rand::{RngExt, SeedableRng};
use std::ops::Range;

/// Three modalities.
pub const PART: Part =
    Part { name: "modalities", about: "three modalities on shared encoders (beyond the paper)", figures };

/// Numbers in x, y and z, and in the latent variable they have in common.
const DIMS: [usize; 3] = [3, 2, 4];
const LATENT: usize = 2;
const NAMES: [&str; 3] = ["x", "y", "z"];
const PAIRS: [[usize; 2]; 3] = [[0, 1], [0, 2], [1, 2]];
const BATCH: usize = 1024;

/// Where the numbers of modality `k` are in a sample of all.
fn span(k: usize) -> Range<usize> {
    let first = DIMS[..k].iter().sum();
    first..first + DIMS[k]
}

/// The covariance of (x, y, z): each is a fixed linear image of one latent variable, plus noise of unit variance.
fn covariance() -> Vec<f64> {
    let n = span(2).end;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(17);
    let image: Vec<f64> = (0..n * LATENT).map(|_| rng.random_range(-0.8..0.8)).collect();
    let entry = |i: usize, j: usize| {
        let common: f64 = (0..LATENT).map(|k| image[i * LATENT + k] * image[j * LATENT + k]).sum();
        common + f64::from(u8::from(i == j))
    };
    (0..n * n).map(|at| entry(at / n, at % n)).collect()
}

/// The block of `c` with these rows and columns.
fn block(c: &[f64], rows: Range<usize>, columns: Range<usize>) -> Vec<f64> {
    let n = span(2).end;
    rows.flat_map(|i| columns.clone().map(move |j| (i, j))).map(|(i, j)| c[i * n + j]).collect()
}

/// The law of two parts of a sample.
fn law(c: &[f64], u: Range<usize>, v: Range<usize>) -> Gaussian {
    let [uu, uv, vv] = [(&u, &u), (&u, &v), (&v, &v)].map(|(a, b)| block(c, a.clone(), b.clone()));
    Gaussian::new(u.len(), v.len(), uu, uv, vv).expect("the noise makes it positive definite")
}

/// Linear encoders `[dim, DIMS[k]]` that minimise the sum of the two-sided conditional losses of all pairs under `dot`.
fn train(c: &[f64], dim: usize, seed: u64, steps: u64) -> Result<Vec<Vec<f64>>, Error> {
    // x is one side of the sampler's pairs, (y, z) the other.
    let samples = law(c, span(0), span(1).start..span(2).end).sample(seed, 100_000);
    let all = |i: usize, out: &mut [f32]| {
        let (x, yz) = out.split_at_mut(DIMS[0]);
        samples.gather(Side::U, &[i], x);
        samples.gather(Side::V, &[i], yz);
    };
    let (device, mut engine) = (Cpu::new(), Cpu::new());
    let mut layout = Layout::default();
    let weights: Vec<Range<usize>> = (0..3).map(|k| layout.push(NAMES[k], &[dim, DIMS[k]])).collect();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut host: Vec<f32> = (0..layout.len()).map(|_| rng.random_range(-0.3..0.3)).collect();
    let (mut params, mut grads) = (device.alloc(host.len()), device.alloc(host.len()));
    device.upload(&host, ViewMut { buf: &mut params, at: 0..host.len() });
    let mut adam = Adam::new(&device, AdamConfig::default(), &layout);
    let loss = Loss {
        tilting: Tilting::Dot,
        objective: Objective::Conditional { lambda_u: 1.0, lambda_v: 1.0 },
        tau: 1.0,
        smoothing: 0.0,
    };
    let n = span(2).end;
    let mut rows = vec![0f32; BATCH * n];
    let mut embeddings = vec![vec![0f32; BATCH * dim]; 3];
    let mut gradients = embeddings.clone();
    let epoch = (samples.len() / BATCH) as u64;
    for step in 0..steps {
        for (i, row) in rows.chunks_exact_mut(n).enumerate() {
            all(permute(seed, step / epoch, samples.len(), (step % epoch) as usize * BATCH + i), row);
        }
        for (k, out) in embeddings.iter_mut().enumerate() {
            let weight = &host[weights[k].clone()];
            for (out, row) in out.chunks_exact_mut(dim).zip(rows.chunks_exact(n)) {
                for (out, weight) in out.iter_mut().zip(weight.chunks_exact(DIMS[k])) {
                    *out = weight.iter().zip(&row[span(k)]).map(|(w, x)| w * x).sum();
                }
            }
        }
        pairwise(&mut engine, &loss, &embeddings, dim, &mut gradients)
            .map_err(|source| TrainError::Loss { step, source })?;
        let mut grad = vec![0f32; host.len()];
        for (k, gradient) in gradients.iter().enumerate() {
            let grad = &mut grad[weights[k].clone()];
            for (gradient, row) in gradient.chunks_exact(dim).zip(rows.chunks_exact(n)) {
                for (grad, g) in grad.chunks_exact_mut(DIMS[k]).zip(gradient) {
                    grad.iter_mut().zip(&row[span(k)]).for_each(|(grad, x)| *grad += g * x);
                }
            }
        }
        device.upload(&grad, ViewMut { buf: &mut grads, at: 0..grad.len() });
        adam.step(&device, step, 1e-2 * Schedule::Cosine.factor(step, 0, steps), 1.0, &mut params, &grads);
        device.download(View { buf: &params, at: 0..host.len() }, &mut host);
    }
    Ok(weights.into_iter().map(|at| host[at].iter().map(|&w| f64::from(w)).collect()).collect())
}

/// Each pair of the encoders beside its own closed form.
fn certify(c: &[f64], encoders: &[Vec<f64>], dim: usize) -> [Certificate; 3] {
    PAIRS.map(|[u, v]| {
        let theory = Theory::new(&law(c, span(u), span(v)));
        let (nu, nv) = (DIMS[u], DIMS[v]);
        let entry = |at: usize| -> f64 {
            (0..dim).map(|k| encoders[u][k * nu + at / nv] * encoders[v][k * nv + at % nv]).sum()
        };
        let learned = theory.dot(&(0..nu * nv).map(entry).collect::<Vec<_>>());
        learned.certify(&theory.conditional_optimum(dim))
    })
}

fn figures(request: &Request<'_>) -> Result<Vec<Figure>, Error> {
    let c = covariance();
    // Room for all three Gram matrices at once, and none to spare.
    let dims = [span(2).end, 1];
    let steps = if request.quick { 800 } else { 5_000 };
    let found = parallel(&dims, |&dim| Ok(certify(&c, &train(&c, dim, request.seed, steps)?, dim)))?;
    let excess = |c: &Certificate| {
        [
            (c.err_u_given_v - c.optimum_u_given_v) / c.signal_u_given_v,
            (c.err_v_given_u - c.optimum_v_given_u) / c.signal_v_given_u,
        ]
    };
    let names: Vec<String> = PAIRS
        .iter()
        .flat_map(|&[u, v]| [format!("{}|{}", NAMES[u], NAMES[v]), format!("{}|{}", NAMES[v], NAMES[u])])
        .collect();
    let series: Vec<Vec<f64>> = found.iter().map(|pairs| pairs.iter().flat_map(excess).collect()).collect();
    let most = |at: usize| largest(series[at].iter().copied());
    let least = |at: usize| series[at].iter().copied().fold(f64::INFINITY, f64::min);
    let percent = |x: f64| format!("{:.2}%", 100.0 * x);
    Ok(vec![Figure {
        name: "modalities".into(),
        title: "Three modalities on shared encoders".into(),
        see: "With room for it, one encoder a modality reaches the closed form of every pair it is in; in one dimension the \
              pairs must agree on one direction, and none has its own best."
            .into(),
        panels: vec![Panel {
            title: "error of means over the pair's optimum".into(),
            x: Axis { names: names.clone(), ..Axis::default() },
            y: Axis { range: Some([0.0, 1.2 * most(1).max(most(0))]), ..axis("share of the signal") },
            marks: (dims.iter().zip(&series).enumerate())
                .map(|(k, (dim, series))| mark(format!("d = {dim}"), Style::Series(k), Shape::Bars(series.clone())))
                .collect(),
            equal: false,
        }],
        columns: 1,
        tables: vec![table(
            "excess of the squared error over the pair's own optimum of that dimension, as a share of the signal",
            &["mean of", "d = 9", "d = 1"],
            (names.into_iter().enumerate())
                .map(|(i, name)| vec![name, percent(series[0][i]), percent(series[1][i])])
                .collect(),
        )],
        criteria: vec![
            below("d = 9: the largest excess of a pair, as a share of its signal,", most(0), 0.02),
            above("d = 1: the smallest excess of a pair over the largest at d = 9", least(1) / most(0), 1.0),
        ],
    }])
}
