//! Loss and both gradients of every objective: `cargo bench --bench contrast`.
//!
//! `contrastive bench loss` reports the same against the matrix product and checks the answer first.
#![allow(missing_docs)]

use contrastive::objective::{Gradients, Moments, Objective, Pairs, Write, features::random_fourier};
use contrastive::{Batch, Cpu, Engine, Loss, Matrix, Tilting};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{SeedableRng, distr::Distribution};
use rand_distr::StandardNormal;

const D: usize = 128;

fn objectives(c: &mut Criterion) {
    let mut group = c.benchmark_group("loss and gradients, d = 128, cosine");
    group.sample_size(20);
    for n in [512, 2048] {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
        let mut draw = || -> Vec<f32> { (0..n * D).map(|_| StandardNormal.sample(&mut rng)).collect() };
        let (u, v) = (draw(), draw());
        let (x, y) = (random_fourier(&u, D, 11.0, 64, 0), random_fourier(&v, D, 11.0, 64, 0));
        for (name, objective) in [
            ("conditional", Objective::Conditional { lambda_u: 1.0, lambda_v: 1.0 }),
            ("one-sided", Objective::Conditional { lambda_u: 0.0, lambda_v: 2.0 }),
            ("joint", Objective::Joint),
            ("joint, 4 pairings", Objective::JointShuffled { pairings: 4, seed: 0 }),
            ("sigmoid", Objective::Sigmoid { bias: -10.0 }),
            ("mmd", Objective::Mmd { lambda_u: 1.0, lambda_v: 1.0 }),
            ("joint-mmd", Objective::JointMmd),
        ] {
            let loss = Loss { tilting: Tilting::Cosine, objective, tau: 0.07, smoothing: 0.0 };
            let mmd = name.ends_with("mmd");
            let moments = mmd.then(|| Moments::Features { u: Matrix::f32(&x, 64), v: Matrix::f32(&y, 64) });
            let batch = Batch {
                u: Matrix::f32(&u, D),
                v: Matrix::f32(&v, D),
                pairs: Pairs::default(),
                offset_v: None,
                moments,
            };
            let mut engine = Cpu::new();
            let (mut du, mut dv) = (vec![0f32; n * D], vec![0f32; n * D]);
            group.throughput(Throughput::Elements((n * n) as u64));
            group.bench_function(BenchmarkId::new(name, n), |b| {
                b.iter(|| {
                    let gradients =
                        Gradients { u: Some(Write::Set(&mut du)), v: Some(Write::Set(&mut dv)), offset_v: None };
                    engine.loss(&loss, &batch, gradients).unwrap()
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, objectives);
criterion_main!(benches);
