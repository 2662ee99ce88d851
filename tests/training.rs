//! The training loop: against a ten-step run written out in f64, through stops, and in micro-batches.
#![cfg(feature = "cli")]
#![allow(missing_docs)]

use contrastive::checkpoint::Checkpoint;
use contrastive::config::{Config, Partial};
use contrastive::data::{Side, Source, gp, permute};
use contrastive::experiments::{self, resolve};
use contrastive::nn::Network;
use contrastive::objective::{Batch, Loss, Matrix, Objective, reference};
use contrastive::train::{Trained, train};
use contrastive::{Cpu, Tilting};
use std::sync::atomic::{AtomicBool, Ordering};

fn config(toml: &str) -> Config {
    resolve(None, toml::from_str(toml).unwrap()).unwrap()
}

fn network(config: &Config, source: &dyn Source) -> Network {
    let inputs = [source.dim(Side::U), source.dim(Side::V)];
    Network::build([&config.encoder_u, &config.encoder_v], inputs, config.dim).unwrap()
}

/// Trains on `source`, losses of all steps beside the result.
fn losses(config: &Config, source: &dyn Source) -> (Vec<f64>, Trained) {
    let mut all = Vec::new();
    let network = network(config, source);
    let stop = AtomicBool::new(false);
    let trained =
        train(&mut Cpu::new(), config, &network, source, None, None, &stop, &mut |p| all.push(p.loss)).unwrap();
    (all, trained)
}

/// Ten steps of linear encoders, a trained temperature and Adam, written out in f64 with nothing of the trainer but
/// its initial parameters and its order of samples; the loss and its gradients are the reference's.
#[test]
fn ten_steps_follow_a_run_written_out_in_f64() {
    for (objective, name) in [
        (Objective::Conditional { lambda_u: 1.0, lambda_v: 1.0 }, "conditional"),
        (Objective::Sigmoid { bias: -1.0 }, "sigmoid"),
    ] {
        let config = config(&format!(
            "experiment = 'gp'\ntilting = 'cosine'\ntau = 0.2\ntrain_tau = true\nbatch = 50\nsamples = 250\nepochs = 2\n\
             lr = 0.01\ndim = 3\nschedule = 'constant'\nobjective = '{name}'\nbias = -1.0"
        ));
        let source = gp::gp().sample(config.seed, 250);
        let network = network(&config, &source);
        let (got, _) = losses(&config, &source);
        assert_eq!(got.len(), 10);

        let mut params: Vec<f64> = network.init(0, 0.2, -1.0).iter().map(|&x| f64::from(x)).collect();
        let (mut m, mut v) = (vec![0.0; params.len()], vec![0.0; params.len()]);
        for (t, got) in got.iter().enumerate() {
            let index: Vec<usize> = (0..50).map(|i| permute(0, t as u64 / 5, 250, t % 5 * 50 + i)).collect();
            let x = [(Side::U, 12), (Side::V, 5)].map(|(side, dim)| {
                let mut x = vec![0f32; 50 * dim];
                source.gather(side, &index, &mut x);
                x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>()
            });
            // W is [3, inputs], one side after the other.
            let dims = [12, 5];
            let starts = [0, 3 * 12];
            let embed = |s: usize| -> Vec<f32> {
                let w = &params[starts[s]..];
                let entry =
                    |i: usize, k: usize| (0..dims[s]).map(|j| w[k * dims[s] + j] * x[s][i * dims[s] + j]).sum::<f64>();
                (0..150).map(|ik| entry(ik / 3, ik % 3) as f32).collect()
            };
            let [u, v_] = [embed(0), embed(1)];
            let tau = (-params[network.logit_scale.start]).exp();
            let objective = match objective {
                Objective::Sigmoid { .. } => Objective::Sigmoid { bias: params[network.bias.start] },
                other => other,
            };
            let loss = Loss { tilting: Tilting::Cosine, objective, tau, smoothing: 0.0 };
            let batch = Batch {
                u: Matrix::f32(&u, 3),
                v: Matrix::f32(&v_, 3),
                pairs: Default::default(),
                offset_v: None,
                moments: None,
            };
            let want = reference::loss(&loss, &batch).unwrap();
            // f32 parameters drift from f64 ones by rounding; a wrong step shows at 1e-2.
            assert!((want.loss - got).abs() < 2e-5 * want.loss.abs().max(1.0), "step {t}: {got} for {}", want.loss);
            let mut grads = vec![0.0; params.len()];
            for (s, d) in [&want.grad_u, &want.grad_v].into_iter().enumerate() {
                for k in 0..3 {
                    for j in 0..dims[s] {
                        grads[starts[s] + k * dims[s] + j] =
                            (0..50).map(|i| d[i * 3 + k] * x[s][i * dims[s] + j]).sum();
                    }
                }
            }
            grads[network.logit_scale.start] = -tau * want.grad_tau;
            grads[network.bias.start] = want.grad_bias;
            for (i, g) in grads.iter().enumerate() {
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let (m_hat, v_hat) =
                    (m[i] / (1.0 - 0.9f64.powi(t as i32 + 1)), v[i] / (1.0 - 0.999f64.powi(t as i32 + 1)));
                params[i] -= 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
            }
        }
    }
}

// The batch is what the loss sees, however little of it is embedded at a time.
#[test]
fn micro_batches_are_the_batch_to_rounding() {
    let encoder = "{ kind = 'mlp', hidden = [17], activation = 'gelu' }";
    for objective in ["conditional", "mmd"] {
        let text = format!(
            "samples = 240\nbatch = 60\nepochs = 3\ntau = 0.5\ntilting = 'l2'\nobjective = '{objective}'\n\
             encoder_u = {encoder}\nencoder_v = {encoder}\n"
        );
        let source = gp::gp().sample(3, 240);
        let (whole, trained) = losses(&config(&text), &source);
        for micro in [1, 15, 30] {
            let (parts, cached) = losses(&config(&format!("micro_batch = {micro}\n{text}")), &source);
            for (a, b) in whole.iter().zip(&parts) {
                assert!((a - b).abs() < 1e-5 * a.abs().max(1.0), "{objective} {micro}: {a} {b}");
            }
            let off = trained.params.iter().zip(&cached.params).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Adam turns a rounding difference in a gradient near zero into a fraction of a step of 1e-3.
            assert!(off < 2e-4, "{objective} {micro}: {off}");
        }
    }
}

#[test]
fn every_objective_and_tilting_learns() {
    let source = gp::gp().sample(1, 1000);
    for objective in ["conditional", "joint", "sigmoid", "mmd", "joint-mmd"] {
        for tilting in ["cosine", "dot", "l2"] {
            for precision in ["f32", "bf16", "f16"] {
                let config = config(&format!(
                    "samples = 1000\nbatch = 100\nepochs = 12\nlr = 0.01\nobjective = '{objective}'\ntilting = '{tilting}'\n\
                     precision = '{precision}'\ntau = 0.5\nkernel = 'linear'"
                ));
                let (all, _) = losses(&config, &source);
                let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
                let (first, last) = (mean(&all[..10]), mean(&all[all.len() - 10..]));
                // MMD values are small numbers: a percent of them is more than a batch's noise.
                assert!(last < first - 0.01 * first.abs(), "{objective} {tilting} {precision}: {first} to {last}");
            }
        }
    }
}

// The shuffled joint loss draws new pairings each step, and learns what the whole one learns.
#[test]
fn shuffled_pairings_learn_too() {
    let source = gp::gp().sample(1, 1000);
    let text = "samples = 1000\nbatch = 200\nepochs = 40\nlr = 0.01\nobjective = 'joint'\n";
    let (whole, _) = losses(&config(text), &source);
    let (sampled, _) = losses(&config(&format!("{text}pairings = 4\n")), &source);
    let tail = |x: &[f64]| x[x.len() - 40..].iter().sum::<f64>() / 40.0;
    // The log of a sampled mean is noisy and biased down a little.
    assert!((tail(&whole) - tail(&sampled)).abs() < 0.1, "{} {}", tail(&whole), tail(&sampled));
}

#[test]
fn stopping_anywhere_changes_no_bit() {
    let config =
        config("samples = 1000\nbatch = 90\nepochs = 5\nobjective = 'sigmoid'\ntrain_tau = true\nlog_every = 7");
    let run = |dir: &std::path::Path, resume: bool, until: u64| {
        let stop = AtomicBool::new(false);
        let mut observe = |p: contrastive::train::Progress| {
            if p.steps[0] >= until {
                stop.store(true, Ordering::Relaxed);
            }
        };
        experiments::run(&mut Cpu::new(), "cpu", &config, dir, resume, &stop, &mut observe).unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    assert!(!run(&whole, false, u64::MAX).stopped);
    let model = |dir: &std::path::Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    // 11 steps an epoch: within one, at its end, in the last, one before the end.
    for stops in [vec![1], vec![11], vec![5, 12, 30], vec![54], vec![50, 51, 52, 53]] {
        let parts = dir.path().join(format!("{stops:?}"));
        for (i, &until) in stops.iter().enumerate() {
            assert!(run(&parts, i > 0, until).stopped);
            assert_eq!(Checkpoint::read(&parts).unwrap().unwrap().step, until);
        }
        let end = run(&parts, true, u64::MAX);
        assert!(!end.stopped && model(&parts) == model(&whole), "{stops:?}");
        let loss = |dir: &std::path::Path| {
            let text = std::fs::read_to_string(dir.join("summary.json")).unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap()["loss"].clone()
        };
        assert_eq!(loss(&parts), loss(&whole), "the mean over the last epoch survives a stop within it");
    }
}

#[test]
fn settings_come_from_flags_then_file_then_experiment() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.toml");
    std::fs::write(&file, "lr = 0.5\nbatch = 64\n[encoder_u]\nkind = 'mlp'\nhidden = [8]\nactivation = 'relu'\n")
        .unwrap();
    let flags = Partial { batch: Some(32), ..Partial::default() };
    let config = resolve(Some(&file), flags).unwrap();
    assert_eq!((config.lr, config.batch, config.epochs, &config.experiment[..]), (0.5, 32, 500, "gp"));
    // What is written reproduces what was resolved.
    assert_eq!(toml::from_str::<Config>(&config.to_toml()).unwrap(), config);
    std::fs::write(&file, "[encoder_u]\nkind = 'mlp'\nhiden = [8]\n").unwrap();
    let error = resolve(Some(&file), Partial::default()).unwrap_err().to_string();
    assert!(error.contains("run.toml") && error.contains("hiden"), "{error}");
}
