//! Random batches with every option, shared by the tests of losses.
#![allow(dead_code, missing_docs)]

#[cfg(feature = "cli")]
pub mod command;

use contrastive::objective::{
    Batch, DataKernel, Loss, Matrix, Moments, Objective, Pairs, Positives, Tilting, features::random_fourier,
};
use half::{bf16, f16};
use rand::{RngExt, SeedableRng, distr::Distribution};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Positive {
    Diagonal,
    Index,
    Groups,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moment {
    None,
    Features,
    Gaussian,
    Linear,
}

/// A recipe of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub n: usize,
    pub m: usize,
    pub d: usize,
    pub tilting: Tilting,
    pub objective: Objective,
    pub tau: f64,
    pub smoothing: f64,
    pub positive: Positive,
    pub ignore: bool,
    pub weights: bool,
    pub offset: bool,
    pub moment: Moment,
    pub seed: u64,
}

impl Case {
    pub fn new(tilting: Tilting, objective: Objective, n: usize, m: usize, d: usize) -> Case {
        let moment = match objective {
            Objective::Mmd { .. } | Objective::JointMmd => Moment::Features,
            _ => Moment::None,
        };
        Case {
            n,
            m,
            d,
            tilting,
            objective,
            tau: if tilting == Tilting::Cosine { 0.1 } else { 1.5 },
            smoothing: 0.0,
            positive: Positive::Diagonal,
            ignore: false,
            weights: false,
            offset: false,
            moment,
            seed: (n * 1_000_003 + m * 1009 + d) as u64,
        }
    }

    pub fn loss(&self) -> Loss {
        Loss { tilting: self.tilting, objective: self.objective, tau: self.tau, smoothing: self.smoothing }
    }

    pub fn data(&self) -> Data {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let Case { n, m, d, .. } = *self;
        let mut normal = |count: usize, scale: f32| -> Vec<f32> {
            (0..count).map(|_| scale * Distribution::<f32>::sample(&StandardNormal, &mut rng)).collect()
        };
        // Pairs that belong together are near each other; all share an offset, which l2 must not lose digits to.
        let size = (1.0 / (d as f32).sqrt()).max(0.2);
        let common = normal(d, size);
        let shared = normal(n.max(m) * d, size);
        let (mut u, mut v) = (normal(n * d, 0.7 * size), normal(m * d, 0.7 * size));
        for x in [&mut u, &mut v] {
            x.iter_mut().zip(&shared).for_each(|(x, s)| *x += s);
            x.chunks_mut(d).for_each(|x| x.iter_mut().zip(&common).for_each(|(x, c)| *x += c));
        }
        let (x, y) = (normal(n * 3, 1.0), normal(m * 2, 1.0));
        let offset = normal(m, 0.5);
        let weights_u: Vec<f32> = normal(n, 1.0).iter().map(|w| w.abs() + 0.1).collect();
        let mut weights_v: Vec<f32> = normal(m, 1.0).iter().map(|w| w.abs() + 0.1).collect();
        let mut ids = |count: usize, of: i64| -> Vec<i64> { (0..count).map(|_| rng.random_range(0..of)).collect() };
        let classes = (n.min(m) as i64 / 3).max(1);
        // The first id is common, so that there is a positive.
        let (mut group_u, mut group_v) = (ids(n, classes + 1), ids(m, classes));
        (group_u[0], group_v[0]) = (0, 0);
        let ignore = (ids(n, 6), ids(m, 6));
        let index: Vec<u32> = ids(n, m as i64).iter().map(|&j| j as u32).collect();
        // A column without weight, but not the only one that has a positive.
        if let Some(j) = (1..m).find(|&j| j != index[0] as usize) {
            weights_v[j] = 0.0;
        }
        let (feature_u, feature_v) = (random_fourier(&x, 3, 1.5, 12, 3), random_fourier(&y, 2, 1.5, 8, 4));
        Data { u, v, x, y, feature_u, feature_v, offset, weights_u, weights_v, group_u, group_v, ignore, index }
    }
}

/// What a [`Case`] makes.
#[derive(Clone)]
pub struct Data {
    pub u: Vec<f32>,
    pub v: Vec<f32>,
    pub x: Vec<f32>,
    pub y: Vec<f32>,
    pub feature_u: Vec<f32>,
    pub feature_v: Vec<f32>,
    pub offset: Vec<f32>,
    pub weights_u: Vec<f32>,
    pub weights_v: Vec<f32>,
    pub group_u: Vec<i64>,
    pub group_v: Vec<i64>,
    pub ignore: (Vec<i64>, Vec<i64>),
    pub index: Vec<u32>,
}

impl Data {
    pub fn batch<'a>(&'a self, case: &Case) -> Batch<'a> {
        let positives = match case.positive {
            Positive::Diagonal => Positives::Diagonal,
            Positive::Index => Positives::Index(&self.index),
            Positive::Groups => Positives::Groups { u: &self.group_u, v: &self.group_v },
        };
        let data = (Matrix::f32(&self.x, 3), Matrix::f32(&self.y, 2));
        Batch {
            u: Matrix::f32(&self.u, case.d),
            v: Matrix::f32(&self.v, case.d),
            pairs: Pairs {
                positives,
                ignore: case.ignore.then_some((&self.ignore.0, &self.ignore.1)),
                weights_u: case.weights.then_some(&self.weights_u),
                weights_v: case.weights.then_some(&self.weights_v),
            },
            offset_v: case.offset.then_some(&self.offset),
            moments: match case.moment {
                Moment::None => None,
                Moment::Features => {
                    Some(Moments::Features { u: Matrix::f32(&self.feature_u, 12), v: Matrix::f32(&self.feature_v, 8) })
                }
                Moment::Gaussian => {
                    Some(Moments::Gram { kernel: DataKernel::Gaussian { width: 1.5 }, u: data.0, v: data.1 })
                }
                Moment::Linear => Some(Moments::Gram { kernel: DataKernel::Linear, u: data.0, v: data.1 }),
            },
        }
    }
}

/// One of everything, with parameters that break symmetries.
pub const OBJECTIVES: &[Objective] = &[
    Objective::Conditional { lambda_u: 1.0, lambda_v: 1.0 },
    Objective::Conditional { lambda_u: 0.3, lambda_v: 1.7 },
    Objective::Conditional { lambda_u: 2.0, lambda_v: 0.0 },
    Objective::Conditional { lambda_u: 0.0, lambda_v: 2.0 },
    Objective::Joint,
    Objective::JointShuffled { pairings: 3, seed: 11 },
    Objective::Sigmoid { bias: -1.3 },
    Objective::Mmd { lambda_u: 0.8, lambda_v: 1.3 },
    Objective::JointMmd,
];

/// All the options `objective` takes, one after another and all at once.
pub fn options(case: Case) -> Vec<Case> {
    if matches!(case.objective, Objective::JointShuffled { .. }) {
        return if case.n == case.m { vec![case, Case { weights: true, ..case }] } else { vec![] };
    }
    let mmd = case.moment != Moment::None;
    let smoothing = if mmd { 0.0 } else { 0.15 };
    let mut all = vec![
        case,
        Case { positive: Positive::Index, ..case },
        Case { positive: Positive::Groups, ..case },
        Case { ignore: true, ..case },
        Case { weights: true, ..case },
        Case { smoothing, ..case },
        Case { offset: true, ..case },
        Case { positive: Positive::Index, ignore: true, weights: true, smoothing, offset: true, ..case },
        Case { positive: Positive::Groups, ignore: true, weights: true, smoothing, offset: true, ..case },
    ];
    if mmd {
        for moment in [Moment::Gaussian, Moment::Linear] {
            all.push(Case { moment, ..case });
            all.push(Case { moment, positive: Positive::Groups, ignore: true, weights: true, offset: true, ..case });
            all.push(Case { moment, positive: Positive::Index, ignore: true, offset: true, ..case });
        }
    }
    all
}

/// `|a - b| / |b|`, of a `b` of `floor` at least; infinite where there is a NaN, which a maximum of several would lose.
pub fn relative(a: &[f64], b: &[f64], floor: f64) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(floor);
    if off.is_nan() { f64::INFINITY } else { off }
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// `x` in 16-bit storage.
pub struct Half {
    pub bf16: Vec<bf16>,
    pub f16: Vec<f16>,
}

impl Half {
    pub fn new(x: &[f32]) -> Half {
        Half {
            bf16: x.iter().map(|&x| bf16::from_f32(x)).collect(),
            f16: x.iter().map(|&x| f16::from_f32(x)).collect(),
        }
    }
    pub fn matrix(&self, bf16: bool, dim: usize) -> Matrix<'_> {
        if bf16 { Matrix::bf16(&self.bf16, dim) } else { Matrix::f16(&self.f16, dim) }
    }
}
