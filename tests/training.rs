//! Whole runs: that they stop and go on to the same bits, learn what an independent f64 twin learns, and refuse what
//! they should before a file is written.
#![cfg(feature = "cli")]
#![allow(missing_docs)]

use contrastive::Cpu;
use contrastive::checkpoint::{Checkpoint, Metrics, Origin, Record};
use contrastive::config::{Config, ConfigError, ObjectiveName, Partial};
use contrastive::data::{Memory, Npy, Side, Source, gp, permute, tensors, write_npy_f32};
use contrastive::experiments::{self, Error, Model, Outcome};
use contrastive::nn::{EncoderSpec, Network};
use contrastive::objective::{Batch, Loss, Matrix, Objective, Precision, Tilting, reference};
use contrastive::optim::{AdamConfig, Schedule};
use contrastive::train::{Progress, TrainError, Training};
use rand::{RngExt, SeedableRng};
use std::collections::BTreeSet;
use std::f64::consts::PI;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// The settings that `toml` gives over an experiment's own.
fn settings(toml: &str) -> Config {
    experiments::resolve(toml::from_str(toml).unwrap()).unwrap()
}

/// Runs to step `until`, or to the end.
fn run(config: &Config, dir: &Path, resume: bool, until: Option<u64>) -> Result<Outcome, Error> {
    let stop = AtomicBool::new(until == Some(0));
    experiments::run(&mut Cpu::new(), config, dir, resume, &stop, &mut |progress| {
        stop.store(until.is_some_and(|until| progress.steps[0] >= until), Ordering::Relaxed);
    })
}

/// The lines of a run's metrics without their speed, which no run repeats.
fn metrics(dir: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    assert!(text.ends_with('\n'));
    text.lines()
        .map(|line| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(line.as_object_mut().unwrap().remove("samples_per_s").unwrap().as_f64().unwrap() > 0.0);
            line
        })
        .collect()
}

fn summary(dir: &Path) -> serde_json::Value {
    serde_json::from_str(&fs::read_to_string(dir.join("summary.json")).unwrap()).unwrap()
}

fn model(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("model.safetensors")).unwrap()
}

/// Everything that changes from step to step at once: 7 steps an epoch, 21 in all, the last pairs of each left out.
const BUSY: &str = r#"
experiment = "gp"
samples = 230
batch = 32
micro_batch = 8
epochs = 3
tilting = "cosine"
objective = "sigmoid"
tau = 0.2
train_tau = true
bias = -3.0
lr = 1e-2
warmup = 5
schedule = "cosine"
grad_clip = 0.5
log_every = 2
seed = 9
[adam]
weight_decay = 0.1
[encoder_u]
kind = "mlp"
hidden = [16]
activation = "gelu"
"#;

/// The pairings of the shuffled joint loss are a function of the step.
const SHUFFLED: &str = "experiment = 'gp'\nsamples = 230\nbatch = 32\nepochs = 3\nobjective = 'joint'\npairings = 3\n";

/// Convolutions, and one-hot labels without parameters.
const IMAGES: &str = "experiment = 'digits'\nsamples = 112\nbatch = 16\nepochs = 3\nlog_every = 1\n";

/// Recall on 28 pairs at the end of each epoch, which is measured and changes nothing.
const OCEAN: &str = r#"
experiment = "ocean"
quick = true
samples = 140
held_out = 0.2
batch = 16
epochs = 3
[encoder_v]
kind = "transformer"
sequence = [10, 20]
width = 8
heads = 2
depth = 1
"#;

// Fails when any state is missing from the checkpoint: the data's position, a moment, the schedule's step, the bias.
#[test]
fn a_run_that_stops_and_goes_on_ends_in_the_same_bits() {
    for toml in [BUSY, SHUFFLED, IMAGES, OCEAN] {
        let config = settings(toml);
        let whole = tempfile::tempdir().unwrap();
        assert!(!run(&config, whole.path(), false, None).unwrap().stopped);
        assert_eq!(summary(whole.path())["steps"], 21);
        // Before the first step, within an epoch, at its end (7, 14), at the last step, and several times.
        for stops in [&[0][..], &[1], &[7], &[12], &[20], &[3, 7, 8, 19]] {
            let parts = tempfile::tempdir().unwrap();
            for (i, &stop) in stops.iter().enumerate() {
                assert!(run(&config, parts.path(), i > 0, Some(stop)).unwrap().stopped);
                assert_eq!(Checkpoint::read(parts.path()).unwrap().unwrap().step, stop);
                assert!(
                    !parts.path().join("summary.json").exists() && !parts.path().join("model.safetensors").exists()
                );
            }
            assert!(!run(&config, parts.path(), true, None).unwrap().stopped);
            assert!(model(whole.path()) == model(parts.path()), "stopped at {stops:?}: another model");
            assert_eq!(metrics(whole.path()), metrics(parts.path()), "stopped at {stops:?}");
            for key in ["loss", "tau", "steps", "test_accuracy", "recall"] {
                assert_eq!(summary(whole.path())[key], summary(parts.path())[key], "stopped at {stops:?}: {key}");
            }
        }
    }
}

// What kill -9 leaves: an old checkpoint, metrics beyond it and half a line.
#[test]
fn metrics_beyond_the_checkpoint_are_written_again() {
    let config = settings(BUSY);
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&config, whole.path(), false, None).unwrap();
    run(&config, killed.path(), false, Some(9)).unwrap();
    let mut file = fs::OpenOptions::new().append(true).open(killed.path().join("metrics.jsonl")).unwrap();
    write!(
        file,
        "{{\"step\":9,\"loss\":1}}\n{{\"step\":10,\"loss\":1}}\n{{\"step\":12,\"loss\":1}}\n{{\"step\":8,\"lo"
    )
    .unwrap();
    drop(file);
    run(&config, killed.path(), true, None).unwrap();
    assert_eq!(metrics(whole.path()), metrics(killed.path()));
    let steps: Vec<u64> = metrics(killed.path()).iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (0..21).step_by(2).collect::<Vec<u64>>());

    // Without any checkpoint the run begins anew; a finished one only reports again.
    fs::remove_file(killed.path().join("checkpoint.safetensors")).unwrap();
    run(&config, killed.path(), true, None).unwrap();
    assert_eq!(metrics(whole.path()), metrics(killed.path()));
    let before = (model(killed.path()), metrics(killed.path()), summary(killed.path())["loss"].clone());
    let seconds = |dir: &Path| summary(dir)["seconds"].as_f64().unwrap();
    let (first, speed) = (seconds(killed.path()), summary(killed.path())["samples_per_s"].as_f64().unwrap());
    run(&config, killed.path(), true, None).unwrap();
    // No step, no time.
    assert!(first > 0.0 && seconds(killed.path()) == first && speed > 0.0);
    assert!(summary(killed.path())["samples_per_s"].as_f64().unwrap() == speed);
    assert!(before == (model(killed.path()), metrics(killed.path()), summary(killed.path())["loss"].clone()));
}

// The mean over the steps of the epoch that was begun, also where it was not ended.
#[test]
fn the_loss_of_a_stopped_run_is_of_the_steps_it_made() {
    let config = Config { log_every: 1, ..settings(BUSY) };
    for (until, last) in [(3, 3), (7, 7), (9, 2)] {
        let dir = tempfile::tempdir().unwrap();
        let Outcome { report, stopped } = run(&config, dir.path(), false, Some(until)).unwrap();
        let lines = metrics(dir.path());
        assert!(stopped && lines.len() as u64 == until);
        let losses = lines[lines.len() - last..].iter().map(|line| line["loss"].as_f64().unwrap());
        let want = losses.sum::<f64>() / last as f64;
        assert!((report.values["loss"].as_f64().unwrap() - want).abs() < 1e-12, "{until}: {report:?}, want {want}");
    }
}

#[test]
fn an_origin_tells_data_apart() {
    let of = |u: &[f32], v: &[f32]| Origin::of(&Cpu::new(), &Memory::new(u.to_vec(), 1, v.to_vec(), 1)).data;
    // More rows than are looked at.
    let (ones, mut other) = ([1f32; 300], [1f32; 300]);
    other[299] = 2.0;
    let all = [of(&ones, &ones), of(&ones[..299], &ones[..299]), of(&other, &ones), of(&ones, &other)];
    assert!((0..4).all(|i| (0..i).all(|j| all[i] != all[j])), "{all:?}");
    assert_eq!(of(&ones, &ones), all[0]);
}

#[test]
fn metrics_are_on_disk_line_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let mut open = Metrics::open(dir.path(), 0).unwrap();
    let evaluation = [("recall".into(), 0.5.into())].into_iter().collect();
    let record =
        Record { step: 0, epoch: 0, loss: -1.5, tau: 1.0, grad_norm: 2.0, lr: 0.1, samples_per_s: 9.0, evaluation };
    open.push(&record).unwrap();
    // The file is still open: a reader, or a kill, sees the line.
    assert_eq!(metrics(dir.path())[0]["loss"], -1.5);
    assert_eq!(metrics(dir.path())[0]["recall"], 0.5);
}

#[test]
fn resuming_with_other_settings_is_refused_by_name() {
    let config = settings(BUSY);
    let dir = tempfile::tempdir().unwrap();
    run(&config, dir.path(), false, Some(5)).unwrap();
    let files = |dir: &Path| -> Vec<Vec<u8>> {
        ["config.toml", "metrics.jsonl", "checkpoint.safetensors"].map(|f| fs::read(dir.join(f)).unwrap()).into()
    };
    let before = files(dir.path());
    for (key, other) in [
        ("lr", Config { lr: 2e-2, ..config.clone() }),
        ("seed", Config { seed: 10, ..config.clone() }),
        ("epochs", Config { epochs: 4, ..config.clone() }),
        ("tilting", Config { tilting: Tilting::Dot, ..config.clone() }),
        ("encoder_v", Config { encoder_v: config.encoder_u.clone(), ..config.clone() }),
    ] {
        let message = run(&other, dir.path(), true, None).unwrap_err().to_string();
        assert!(message.contains(&format!("{key} = ")), "{key}: {message}");
    }
    // An unfinished run is not overwritten unasked.
    let message = run(&config, dir.path(), false, None).unwrap_err().to_string();
    assert!(message.contains("--resume"), "{message}");
    assert!(before == files(dir.path()), "a refusal wrote something");
    // How often lines are logged changes no bit of the model.
    run(&Config { log_every: 1, ..config }, dir.path(), true, None).unwrap();
}

#[test]
fn a_broken_checkpoint_is_an_error_and_no_panic() {
    let config = settings(BUSY);
    let dir = tempfile::tempdir().unwrap();
    run(&config, dir.path(), false, Some(5)).unwrap();
    let path = dir.path().join("checkpoint.safetensors");
    let whole = fs::read(&path).unwrap();
    for cut in [0, 7, 100, whole.len() - 1] {
        fs::write(&path, &whole[..cut]).unwrap();
        let error = run(&config, dir.path(), true, None).unwrap_err();
        assert!(error.is_input() && error.to_string().contains("checkpoint.safetensors"), "{error}");
    }
    fs::write(&path, &whole).unwrap();
    let (arenas, metadata) = tensors::read(&path).unwrap();
    let arenas: Vec<_> = arenas.iter().map(|t| (&t.name[..], &t.shape[..], &t.data[..])).collect();
    for key in ["config", "device", "data", "step", "loss_sum", "seconds", "scaling"] {
        let mut metadata = metadata.clone();
        metadata.remove(key).unwrap();
        tensors::write(&path, &arenas, &metadata).unwrap();
        let error = run(&config, dir.path(), true, None).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(&format!("no usable {key}")), "{error}");
    }
    // Moments that are not those of these parameters, and what no run has left.
    for (at, name) in [(0, "param"), (1, "adam_m"), (2, "adam_v")] {
        let (shape, mut broken) = (arenas[at].1, arenas[at].2.to_vec());
        let write = |shape: &[usize], data: &[f32]| {
            let mut arenas = arenas.clone();
            arenas[at] = (name, shape, data);
            tensors::write(&path, &arenas, &metadata).unwrap();
            let error = run(&config, dir.path(), true, None).unwrap_err();
            assert!(error.is_input() && error.to_string().contains("no usable "), "{name}: {error}");
        };
        write(&[shape[0] - 1], &broken[1..]);
        broken[3] = f32::NAN;
        write(shape, &broken);
    }
}

// All sums of the engine, of encoders and of their gradients are in one order: any thread count, the same bits.
#[test]
fn the_model_does_not_depend_on_the_number_of_threads() {
    // Above the sizes below which products stay on one thread.
    let gp = "experiment = 'gp'\nsamples = 1600\nbatch = 400\nepochs = 2\ntrain_tau = true\n";
    for toml in [gp, BUSY, IMAGES, OCEAN] {
        let models = [1, 3].map(|threads| {
            let dir = tempfile::tempdir().unwrap();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&settings(toml), dir.path(), false, None)).unwrap();
            model(dir.path())
        });
        assert!(models[0] == models[1], "1 and 3 threads differ for {toml}");
    }
}

/// Parameters after `config` ran on `source` in memory, from the network's initial ones.
fn learn(config: &Config, source: &dyn Source) -> (Network, Vec<f32>, Vec<f32>, Vec<f64>) {
    let inputs = [source.dim(Side::U), source.dim(Side::V)];
    let network = Network::build([&config.encoder_u, &config.encoder_v], inputs, config.dim).unwrap();
    let start = network.init(config.seed, config.tau, config.bias);
    let mut losses = Vec::new();
    let stop = AtomicBool::new(false);
    let observe = &mut |progress: Progress| losses.push(progress.loss);
    let mut cpu = Cpu::new();
    let training = Training::new(&cpu, config, &network, source, None);
    let trained = training.run(&mut cpu, None, &stop, observe, None).unwrap();
    (network, start, trained.params, losses)
}

// With eps far above the gradient's size Adam's first step is nearly lr/eps times the gradient, so that parameters
// compare gradients; at the usual eps it is the gradient's sign, and rounding could flip it.
#[test]
fn gradient_caching_is_the_plain_step_to_rounding() {
    let source = gp::gp().sample(4, 48);
    for objective in [ObjectiveName::Conditional, ObjectiveName::Sigmoid, ObjectiveName::Mmd] {
        let plain = Config {
            samples: 48,
            batch: 48,
            epochs: 1,
            objective,
            tau: 0.5,
            train_tau: true,
            lr: 1.0,
            adam: AdamConfig { eps: 10.0, ..AdamConfig::default() },
            ..settings(BUSY.replace("micro_batch = 8", "").as_str())
        };
        let (_, start, want, _) = learn(&plain, &source);
        let moved = want.iter().zip(&start).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(moved > 1e-3, "{objective:?}: nothing was learned");
        for micro_batch in [1, 8, 24, 48] {
            let (_, _, got, _) = learn(&Config { micro_batch, ..plain.clone() }, &source);
            for (got, want) in got.iter().zip(&want) {
                // Sums of 48 f32 terms in another order.
                let near = (got - want).abs() < 1e-5 * moved.max(1.0);
                assert!(near, "{objective:?}, micro-batch {micro_batch}: {got} for {want}, moved by {moved}");
            }
        }
    }
}

/// The losses of a run of linear encoders, and its parameters at the end, written out in f64 with plain loops: nothing
/// of the trainer but its order of samples and initial parameters; the loss and its gradients are the reference's.
fn twin(config: &Config, network: &Network, source: &dyn Source, start: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (n, d, inputs) = (config.batch, config.dim, [source.dim(Side::U), source.dim(Side::V)]);
    let starts = [0, d * inputs[0]];
    let (scale, bias) = (network.logit_scale.start, network.bias.start);
    let epoch_steps = source.len() / n;
    let steps = epoch_steps * config.epochs as usize;
    let mut p: Vec<f64> = start.iter().map(|&x| f64::from(x)).collect();
    let (mut m, mut s) = (vec![0.0; p.len()], vec![0.0; p.len()]);
    let mut losses = Vec::new();
    for step in 0..steps {
        let index: Vec<usize> = (0..n)
            .map(|i| permute(config.seed, (step / epoch_steps) as u64, source.len(), step % epoch_steps * n + i))
            .collect();
        let x = [Side::U, Side::V].map(|side| {
            let mut x = vec![0f32; n * source.dim(side)];
            source.gather(side, &index, &mut x);
            x.into_iter().map(f64::from).collect::<Vec<f64>>()
        });
        let [u, v] = [0, 1].map(|side| {
            let (w, x, inputs) = (&p[starts[side]..], &x[side], inputs[side]);
            let entry = |i: usize, k: usize| (0..inputs).map(|j| w[k * inputs + j] * x[i * inputs + j]).sum::<f64>();
            (0..n * d).map(|ik| entry(ik / d, ik % d) as f32).collect::<Vec<f32>>()
        });
        let tau = if config.train_tau { (-p[scale]).exp() } else { config.tau };
        let objective = match config.loss(step as u64).objective {
            Objective::Sigmoid { .. } => Objective::Sigmoid { bias: p[bias] },
            other => other,
        };
        let loss = Loss { tau, objective, ..config.loss(0) };
        let (u, v) = (Matrix::f32(&u, d), Matrix::f32(&v, d));
        let batch = Batch { u, v, pairs: Default::default(), offset_v: None, moments: None };
        let value = reference::loss(&loss, &batch).unwrap();
        losses.push(value.loss);
        let mut grad = vec![0.0; p.len()];
        for (side, d_out) in [&value.grad_u, &value.grad_v].into_iter().enumerate() {
            for ik in 0..n * d {
                for j in 0..inputs[side] {
                    grad[starts[side] + ik % d * inputs[side] + j] += d_out[ik] * x[side][ik / d * inputs[side] + j];
                }
            }
        }
        grad[scale] = if config.train_tau { -tau * value.grad_tau } else { 0.0 };
        grad[bias] = value.grad_bias;
        let norm = grad.iter().map(|g| g * g).sum::<f64>().sqrt();
        let clip = if config.grad_clip > 0.0 { (config.grad_clip / norm).min(1.0) } else { 1.0 };
        let warm = config.warmup as usize;
        let lr = config.lr
            * match config.schedule {
                _ if step < warm => (step + 1) as f64 / warm as f64,
                Schedule::Constant => 1.0,
                Schedule::Cosine => 0.5 + 0.5 * (PI * (step - warm) as f64 / (steps - warm) as f64).cos(),
            };
        for k in 0..p.len() {
            let g = clip * grad[k];
            m[k] = 0.9 * m[k] + 0.1 * g;
            s[k] = 0.999 * s[k] + 0.001 * g * g;
            let bias = [0.9f64, 0.999].map(|beta| 1.0 - beta.powi(step as i32 + 1));
            let decay = if k < scale { config.adam.weight_decay } else { 0.0 };
            p[k] -= lr * (decay * p[k] + m[k] / bias[0] / ((s[k] / bias[1]).sqrt() + 1e-8));
        }
        if config.train_tau {
            p[scale] = p[scale].clamp(0.0, 100f64.ln());
        }
    }
    (losses, p)
}

// The golden curve. Its numbers come from `twin` at every run; a wrong sign of dL/dtau, a schedule one step late, a clip
// after Adam or a batch out of order shows at 1e-3 and above.
#[test]
fn ten_steps_follow_an_f64_twin() {
    let source = gp::gp().sample(11, 200);
    let plain = Config { batch: 37, epochs: 2, lr: 1e-2, seed: 5, ..settings("schedule = 'constant'") };
    let full = Config {
        tilting: Tilting::Cosine,
        objective: ObjectiveName::Sigmoid,
        bias: -1.0,
        tau: 0.3,
        train_tau: true,
        warmup: 3,
        schedule: Schedule::Cosine,
        grad_clip: 0.02,
        adam: AdamConfig { weight_decay: 0.5, ..AdamConfig::default() },
        ..plain.clone()
    };
    let shuffled = Config { tilting: Tilting::L2, objective: ObjectiveName::Joint, pairings: 2, ..plain.clone() };
    // A rate at which the temperature meets its upper bound.
    let clamped = Config { tau: 0.97, train_tau: true, lr: 0.3, ..plain.clone() };
    for (name, config) in [("plain", plain), ("full", full), ("shuffled", shuffled), ("clamped", clamped)] {
        let (network, start, params, losses) = learn(&config, &source);
        let (want, want_params) = twin(&config, &network, &source, &start);
        assert_eq!(losses.len(), 10);
        for (step, (got, want)) in losses.iter().zip(&want).enumerate() {
            // f32 embeddings of magnitude 1 and ten f32 updates.
            assert!((got - want).abs() < 2e-5 * want.abs().max(1.0), "{name}, step {step}: {got}, want {want}");
        }
        for (what, at) in [("log(1/tau)", &network.logit_scale), ("bias", &network.bias)] {
            let (got, want) = (f64::from(params[at.start]), want_params[at.start]);
            assert!((got - want).abs() < 1e-5, "{name}: {what} {got}, want {want}");
        }
        assert_eq!(params[network.logit_scale.start] != start[network.logit_scale.start], config.train_tau, "{name}");
        assert_eq!(
            params[network.bias.start] != start[network.bias.start],
            config.objective == ObjectiveName::Sigmoid,
            "{name}"
        );
    }
}

#[test]
fn every_objective_and_tilting_learns() {
    let source = gp::gp().sample(1, 1000);
    for objective in ["conditional", "joint", "sigmoid", "mmd", "joint-mmd"] {
        for tilting in ["cosine", "dot", "l2"] {
            for precision in ["f32", "bf16", "f16"] {
                let config = settings(&format!(
                    "samples = 1000\nbatch = 100\nepochs = 12\nlr = 0.01\nobjective = '{objective}'\ntilting = '{tilting}'\n\
                     precision = '{precision}'\ntau = 0.5\nkernel = 'linear'"
                ));
                let (_, _, _, all) = learn(&config, &source);
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
fn every_step_draws_pairings_of_its_own() {
    let seed = |seed, step| match (Config { seed, ..settings(SHUFFLED) }).loss(step).objective {
        Objective::JointShuffled { pairings: 3, seed } => seed,
        other => panic!("{other:?}"),
    };
    let seeds: Vec<u64> = (0..3).flat_map(|run| (0..30).map(move |step| seed(run, step))).collect();
    assert!((0..90).all(|i| (0..i).all(|j| seeds[i] != seeds[j])), "{seeds:?}");
}

#[test]
fn shuffled_pairings_learn_too() {
    let source = gp::gp().sample(1, 1000);
    let text = "samples = 1000\nbatch = 200\nepochs = 40\nlr = 0.01\nobjective = 'joint'\n";
    let (_, _, _, whole) = learn(&settings(text), &source);
    let (_, _, _, sampled) = learn(&settings(&format!("{text}pairings = 4\n")), &source);
    let tail = |x: &[f64]| x[x.len() - 40..].iter().sum::<f64>() / 40.0;
    // The log of a sampled mean is noisy and biased down a little.
    assert!((tail(&whole) - tail(&sampled)).abs() < 0.1, "{} {}", tail(&whole), tail(&sampled));
}

#[test]
fn a_loss_that_is_no_number_is_an_error_and_keeps_the_checkpoint() {
    let config = Config { lr: 1e30, ..settings("experiment = 'gp'\nsamples = 64\nbatch = 16\nepochs = 4\n") };
    let dir = tempfile::tempdir().unwrap();
    run(&config, dir.path(), false, Some(1)).unwrap();
    let before = fs::read(dir.path().join("checkpoint.safetensors")).unwrap();
    let error = run(&config, dir.path(), true, None).unwrap_err();
    assert!(matches!(error, Error::Train(TrainError::Diverged { step: 1, .. } | TrainError::Loss { step: 1, .. })));
    assert!(!error.is_input() && error.to_string().starts_with("step 1: "), "{error}");
    assert!(before == fs::read(dir.path().join("checkpoint.safetensors")).unwrap());
    assert!(Checkpoint::read(dir.path()).unwrap().unwrap().arenas[0].iter().all(|x| x.is_finite()));
}

#[test]
fn every_experiment_writes_its_settings_so_that_they_make_the_run_again() {
    for experiment in experiments::ALL {
        for quick in [false, true] {
            let flags = Partial { experiment: Some(experiment.name.into()), quick: Some(quick), ..Partial::default() };
            let config = experiments::resolve(flags).unwrap();
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), config.to_toml()).unwrap();
            assert_eq!(experiments::resolve(Partial::read(file.path()).unwrap()).unwrap(), config);
            assert_eq!(config.difference(&config), None);
        }
    }
    let busy = settings(BUSY);
    assert_eq!(settings(&busy.to_toml()), busy);
}

#[test]
fn flags_win_over_the_file_and_the_file_over_the_experiment() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "experiment = 'pairs'\ndim = 7\nlr = 0.25\n[adam]\nbeta2 = 0.95\n").unwrap();
    let flags = Partial { dim: Some(9), ..Partial::default() };
    let config = experiments::resolve(flags.over(Partial::read(file.path()).unwrap())).unwrap();
    assert_eq!((&config.experiment[..], config.dim, config.lr, config.tau), ("pairs", 9, 0.25, 0.07));
    assert_eq!((config.adam.beta1, config.adam.beta2), (0.9, 0.95));
}

#[test]
fn what_is_no_setting_is_refused_by_file_and_key() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for (text, key) in [
        ("epoch = 3", "epoch"),
        ("lr = 'fast'", "string"),
        ("[adam]\nbeta3 = 0.9", "beta3"),
        ("[encoder_u]\nkind = 'resnet'", "resnet"),
        ("[encoder_u]\nkind = 'linear'\nwidth = 3", "width"),
        ("lr = ", "line 1"),
        ("epochs = -1", "-1"),
        ("lr = 1.0\ntilting = 'euclid'", "line 2: tilting: found euclid, expected cosine, dot, l2"),
        ("objective = 'triplet'", "objective: found triplet, expected conditional, joint, sigmoid, mmd, joint-mmd"),
        ("precision = 'f8'", "precision: found f8, expected f32, bf16, f16"),
        ("schedule = 'linear'", "schedule: found linear, expected constant, cosine"),
        ("kernel = 'gaussian:0'", "kernel: found gaussian:0, expected gaussian:WIDTH with WIDTH above 0, or linear"),
    ] {
        fs::write(file.path(), text).unwrap();
        let error = Partial::read(file.path()).unwrap_err();
        assert!(matches!(error, ConfigError::Parse { .. }), "{text}: {error}");
        let message = error.to_string();
        let named = message.contains(key) && message.contains(file.path().to_str().unwrap());
        assert!(named && !message.contains('\n'), "{text}: {message}");
    }
    // Those of a model are read in the same way.
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.toml"), "seed = 1\nlr = 'fast'\n").unwrap();
    let message = Model::load(dir.path()).err().unwrap().to_string();
    assert!(message.contains("config.toml: line 2: ") && !message.contains('\n'), "{message}");
    let value = |toml: &str| experiments::resolve(toml::from_str(toml).unwrap()).unwrap_err();
    for (toml, key) in [
        ("experiment = 'cifar'", "experiment"),
        ("epochs = 0", "epochs"),
        ("batch = 0", "batch"),
        ("dim = 0", "dim"),
        ("samples = 0", "samples"),
        ("log_every = 0", "log_every"),
        ("lr = 0.0", "lr"),
        ("lr = nan", "lr"),
        ("tau = -1.0", "tau"),
        ("tau = inf", "tau"),
        ("tau = 0.001\ntrain_tau = true", "tau"),
        ("lambda_u = -1.0", "lambda_u"),
        ("lambda_u = 0.0\nlambda_v = 0.0", "lambda_u and lambda_v"),
        ("features = 7", "features"),
        ("smoothing = 1.0", "smoothing"),
        ("smoothing = 0.1\nobjective = 'mmd'", "smoothing"),
        ("smoothing = 0.1\nobjective = 'joint'\npairings = 2", "smoothing"),
        ("held_out = 1.0", "held_out"),
        ("grad_clip = -1.0", "grad_clip"),
        ("bias = nan", "bias"),
        ("micro_batch = 100", "micro_batch"),
        ("[adam]\nbeta1 = 1.0", "adam.beta1"),
        ("[adam]\neps = 0.0", "adam.eps"),
        // Numbers of f64 that f32 does not hold: devices would find them after the folder was made.
        ("[adam]\neps = 1e-50", "adam.eps"),
        ("tau = 1e-40", "tau"),
        ("lambda_u = 1e39", "lambda_u"),
        ("objective = 'sigmoid'\nbias = 1e39", "bias"),
        ("lr = 1e-60", "lr"),
        ("[adam]\nweight_decay = -0.1", "adam.weight_decay"),
        ("kernel = 'gaussian:1e-320'", "kernel"),
    ] {
        let error = value(toml);
        assert!(matches!(error, ConfigError::Value { key: found, .. } if found == key), "{toml}: {error}");
    }
    // Beyond TOML's integers, where a run could not write down its own settings.
    let flags = Partial { seed: Some(u64::MAX), ..Partial::default() };
    assert!(experiments::resolve(flags).unwrap_err().to_string().starts_with("seed: "));
}

/// `[rows, dim]` of numbers in [-1, 1).
fn noise(seed: u64, rows: usize, dim: usize) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..rows * dim).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Settings of a run on `n` pairs that share a hidden vector: v is u and its square, turned and noisy.
fn pairs(dir: &Path, n: usize) -> Config {
    let (du, dv) = (6, 9);
    let (u, noise, turn) = (noise(1, n, du), noise(2, n, dv), noise(3, dv, du));
    let v: Vec<f32> = (0..n * dv)
        .map(|at| {
            let (i, k) = (at / dv, at % dv);
            (0..du).map(|j| turn[k * du + j] * u[i * du + j]).sum::<f32>() + 0.1 * noise[at]
        })
        .collect();
    let (u_path, v_path) = (dir.join("u.npy"), dir.join("v.npy"));
    write_npy_f32(&u_path, &[n, du], &u).unwrap();
    write_npy_f32(&v_path, &[n, dv], &v).unwrap();
    Config { u: u_path, v: v_path, epochs: 30, batch: 100, lr: 1e-2, dim: 6, ..settings("experiment = 'pairs'\n") }
}

#[test]
fn pairs_are_learned_embedded_and_retrieved() {
    let data = tempfile::tempdir().unwrap();
    let config = pairs(data.path(), 1000);
    let dir = data.path().join("run/nested");
    run(&config, &dir, false, None).unwrap();
    let summary = summary(&dir);
    // 100 held-out pairs: chance is 0.01 and 0.05.
    for (key, least) in [("u_to_v_at_1", 0.6), ("u_to_v_at_5", 0.9), ("v_to_u_at_1", 0.6), ("v_to_u_at_5", 0.9)] {
        let recall = summary["recall"][key].as_f64().unwrap();
        assert!((least..=1.0).contains(&recall), "{key}: {recall}");
    }
    for key in ["experiment", "seconds", "steps", "samples_per_s", "device", "loss", "tau"] {
        assert!(!summary[key].is_null(), "{key}");
    }
    assert!(summary["tau"].as_f64().unwrap() != 0.07, "the temperature is trained");

    // Recall over training is of the pairs it names: here more are learned by heart than are found among new ones.
    let lines = metrics(&dir);
    let mut apart = lines.iter().filter(|line| line.get("recall_train_u_to_v_at_1").is_some());
    assert!(apart.any(|line| line["recall_train_u_to_v_at_1"] != line["recall_test_u_to_v_at_1"]));
    // A share of less than a pair is of one.
    let few = Config { held_out: 1e-4, epochs: 1, ..config.clone() };
    run(&few, &data.path().join("few"), false, None).unwrap();
    assert_eq!(self::summary(&data.path().join("few"))["recall"]["u_to_v_at_5"], 1.0);

    // The model alone embeds as its tensors say, more rows than a chunk holds at once included.
    let x = noise(5, 1500, 9);
    let (input, output) = (data.path().join("x.npy"), data.path().join("e.npy"));
    write_npy_f32(&input, &[1500, 9], &x).unwrap();
    let model = Model::load(&dir).unwrap();
    assert_eq!(model.config, config);
    model.embed(&Cpu::new(), Side::V, &Npy::open(&input).unwrap(), &output, Precision::F32).unwrap();
    let (tensors, _) = tensors::read(&dir.join("model.safetensors")).unwrap();
    let tensor = |name: &str| &tensors.iter().find(|t| t.name == name).unwrap().data;
    let (w, b) = (tensor("v.0.weight"), tensor("v.0.bias"));
    let embedded = Npy::open(&output).unwrap();
    assert_eq!((embedded.rows(), embedded.dim()), (1500, 6));
    for (at, got) in embedded.as_f32().unwrap().iter().enumerate() {
        let (i, k) = (at / 6, at % 6);
        let want: f32 = (0..9).map(|j| w[k * 9 + j] * x[i * 9 + j]).sum::<f32>() + b[k];
        assert!((got - want).abs() < 1e-5, "row {i}: {got}, want {want}");
    }
    let message = model
        .embed(&Cpu::new(), Side::U, &Npy::open(&input).unwrap(), &output, Precision::F32)
        .unwrap_err()
        .to_string();
    assert!(message.contains("x.npy: found 9 columns, expected 6"), "{message}");

    // Settings of another model beside its tensors.
    let mlp = EncoderSpec::Mlp { hidden: vec![], activation: contrastive::device::Activation::Relu };
    for other in [
        Config { encoder_v: mlp.clone(), ..config.clone() },
        Config { encoder_u: mlp, ..config.clone() },
        Config { dim: 5, ..config.clone() },
        Config { tilting: Tilting::Dot, ..config.clone() },
    ] {
        fs::write(dir.join("config.toml"), other.to_toml()).unwrap();
        let message = Model::load(&dir).err().expect("another model").to_string();
        assert!(message.contains("model.safetensors: found"), "{message}");
    }
    // Tensors of the right names and other shapes.
    fs::write(dir.join("config.toml"), config.to_toml()).unwrap();
    let (mut found, metadata) = tensors::read(&dir.join("model.safetensors")).unwrap();
    found.iter_mut().filter(|t| t.name == "v.0.weight").for_each(|t| t.shape.reverse());
    let entries: Vec<_> = found.iter().map(|t| (&t.name[..], &t.shape[..], &t.data[..])).collect();
    tensors::write(&dir.join("model.safetensors"), &entries, &metadata).unwrap();
    let message = Model::load(&dir).err().expect("another shape").to_string();
    assert!(message.contains("no tensor v.0.weight of shape"), "{message}");
}

// Each u is its v: the lower the temperature, the lower the loss. Nothing else is learned.
#[test]
fn a_learned_temperature_stays_above_its_least() {
    let dir = tempfile::tempdir().unwrap();
    let config = pairs(dir.path(), 200);
    let same = Config {
        v: config.u.clone(),
        encoder_u: EncoderSpec::Identity {},
        encoder_v: EncoderSpec::Identity {},
        ..config
    };
    let same = Config { tilting: Tilting::Cosine, tau: 0.02, train_tau: true, lr: 0.3, ..same };
    run(&same, &dir.path().join("run"), false, None).unwrap();
    let tau = summary(&dir.path().join("run"))["tau"].as_f64().unwrap();
    assert!((tau - 0.01).abs() < 1e-8, "{tau}");
}

// As in the paper's ocean: u are the numbers of a flow, v is where it carries a particle. Here z' = i w z + i a e^{i b t}
// from z = 1, which has a closed form; every 24th of two turns is stored.
#[test]
fn a_transformer_learns_flows_from_trajectories() {
    let data = tempfile::tempdir().unwrap();
    let (n, time) = (900, 24);
    let u = noise(8, n, 3);
    let mut v = Vec::new();
    for u in u.chunks(3) {
        let (w, a, b) = (1.0 + 0.5 * u[0], 0.5 * u[1], 2.5 + 0.5 * u[2]);
        for t in (0..time).map(|t| 4.0 * std::f32::consts::PI * t as f32 / time as f32) {
            let share = a / (b - w);
            let turn = |angle: f32, size: f32| [size * angle.cos(), size * angle.sin()];
            let (free, forced) = (turn(w * t, 1.0 - share), turn(b * t, share));
            v.extend([free[0] + forced[0], free[1] + forced[1]]);
        }
    }
    write_npy_f32(data.path().join("u.npy"), &[n, 3], &u).unwrap();
    write_npy_f32(data.path().join("v.npy"), &[n, 2 * time], &v).unwrap();
    let file = data.path().join("flows.toml");
    let text = format!(
        "experiment = 'pairs'\nu = '{0}/u.npy'\nv = '{0}/v.npy'\nepochs = 25\nbatch = 90\nlr = 3e-3\ndim = 8\n\
         [encoder_u]\nkind = 'mlp'\nhidden = [64]\nactivation = 'gelu'\n\
         [encoder_v]\nkind = 'transformer'\nsequence = [24, 2]\nwidth = 24\nheads = 3\ndepth = 2\n",
        data.path().display()
    );
    fs::write(&file, text).unwrap();
    let config = experiments::resolve(Partial::read(&file).unwrap()).unwrap();
    let EncoderSpec::Transformer { causal: true, .. } = config.encoder_v else { panic!("{:?}", config.encoder_v) };

    let dir = data.path().join("run");
    run(&config, &dir, false, None).unwrap();
    let summary = summary(&dir);
    // 90 held-out pairs: chance is 0.011 and 0.056.
    for (key, least) in [("u_to_v_at_1", 0.3), ("u_to_v_at_5", 0.7), ("v_to_u_at_1", 0.3), ("v_to_u_at_5", 0.7)] {
        let recall = summary["recall"][key].as_f64().unwrap();
        assert!((least..=1.0).contains(&recall), "{key}: {recall}");
    }
    let model = Model::load(&dir).unwrap();
    assert_eq!(model.config, config);
    let output = data.path().join("e.npy");
    model.embed(&Cpu::new(), Side::V, &Npy::open(&config.v).unwrap(), &output, Precision::F32).unwrap();
    assert_eq!((Npy::open(&output).unwrap().rows(), Npy::open(&output).unwrap().dim()), (n, 8));
    let message = model
        .embed(&Cpu::new(), Side::V, &Npy::open(&config.u).unwrap(), &output, Precision::F32)
        .unwrap_err()
        .to_string();
    assert!(message.contains("u.npy: found 3 columns, expected 48"), "{message}");
}

#[test]
fn bad_input_writes_nothing() {
    let data = tempfile::tempdir().unwrap();
    let good = pairs(data.path(), 120);
    let short = data.path().join("short.npy");
    write_npy_f32(&short, &[119, 9], &noise(1, 119, 9)).unwrap();
    let nan = data.path().join("nan.npy");
    let mut x = noise(1, 120, 9);
    x[7 * 9 + 2] = f32::NAN;
    write_npy_f32(&nan, &[120, 9], &x).unwrap();
    let out = data.path().join("out");
    let lenet = EncoderSpec::Lenet {};
    for (config, part) in [
        // 12 of the 120 pairs are held out.
        (Config { batch: 109, ..good.clone() }, "batch: found 109, expected at most the 108"),
        (Config { v: short, ..good.clone() }, "short.npy: found 119 rows"),
        (Config { v: nan, ..good.clone() }, "nan.npy: found a value that is not finite in row 7"),
        (Config { u: data.path().join("none.npy"), ..good.clone() }, "none.npy"),
        (Config { u: Default::default(), ..good.clone() }, "u: found nothing"),
        (Config { encoder_u: lenet, ..good.clone() }, "encoder_u"),
        (Config { tau: 0.0, ..good.clone() }, "tau"),
        (settings("experiment = 'mnist'"), "data: found nothing"),
        (settings("experiment = 'mnist'\ndata = '/nonexistent'"), "/nonexistent"),
    ] {
        let error = run(&config, &out, false, None).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(part), "{part}: {error}");
        assert!(!out.exists(), "{part}: a folder was made");
    }
    // A file where the folder should be.
    fs::write(&out, b"mine").unwrap();
    let error = run(&good, &out, false, None).unwrap_err();
    assert!(error.is_input() && error.to_string().contains("out"), "{error}");
    assert_eq!(fs::read(&out).unwrap(), b"mine");
}

// Two runs would write over each other's files.
#[test]
fn a_folder_is_one_runs_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let other = fs::File::open(dir.path()).unwrap();
    other.lock().unwrap();
    let error = run(&settings(BUSY), dir.path(), false, Some(2)).unwrap_err();
    assert!(error.is_input() && error.to_string().contains("a run that goes on"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    drop(other);
    run(&settings(BUSY), dir.path(), false, Some(2)).unwrap();
}

// On another device, or of other data, other bits would come of it.
#[test]
fn a_checkpoint_goes_on_where_it_was_made() {
    let dir = tempfile::tempdir().unwrap();
    let config = settings(BUSY);
    run(&config, dir.path(), false, Some(3)).unwrap();
    let made = Checkpoint::read(dir.path()).unwrap().unwrap();
    for (origin, part) in [
        (Origin { device: "cuda".into(), ..made.origin.clone() }, "--device cuda"),
        (Origin { data: "0".into(), ..made.origin.clone() }, "other data"),
    ] {
        Checkpoint { origin, ..made.clone() }.write(dir.path()).unwrap();
        let error = run(&config, dir.path(), true, None).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(part), "{error}");
    }
    made.write(dir.path()).unwrap();
    assert!(!run(&config, dir.path(), true, None).unwrap().stopped);
    // A file that was changed in between.
    let folder = tempfile::tempdir().unwrap();
    let config = Config { epochs: 2, batch: 50, ..pairs(folder.path(), 400) };
    run(&config, dir.path(), false, Some(3)).unwrap();
    let (u, v) = (Npy::open(folder.path().join("u.npy")).unwrap(), folder.path().join("v.npy"));
    let rows = u.rows();
    let wide = Npy::open(&v).unwrap().dim();
    write_npy_f32(&v, &[rows, wide], &noise(99, rows, wide)).unwrap();
    let error = run(&config, dir.path(), true, None).unwrap_err();
    assert!(error.is_input() && error.to_string().contains("other data"), "{error}");
}

// Its checkpoint gone, what a finished run left is not kept beside new settings.
#[test]
fn resuming_without_a_checkpoint_is_a_new_run() {
    let dir = tempfile::tempdir().unwrap();
    run(&settings(BUSY), dir.path(), false, None).unwrap();
    fs::remove_file(Checkpoint::path(dir.path())).unwrap();
    let other = Config { dim: 3, ..settings(BUSY) };
    run(&other, dir.path(), true, Some(3)).unwrap();
    assert!(!dir.path().join("summary.json").exists() && !dir.path().join("model.safetensors").exists());
}

// Squares of such gradients are beyond f32, and Adam would not move again.
#[test]
fn gradients_whose_squares_f32_does_not_hold_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = run(&settings("samples = 1000\nbatch = 100\ntau = 1e-30\n"), dir.path(), false, None).unwrap_err();
    assert!(matches!(error, Error::Train(TrainError::Diverged { .. })), "{error}");
}

// W of these encoders has digits beyond those of I + W: the report does without its closed form, and the model is there.
#[test]
fn encoders_too_large_for_a_closed_form_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let outcome = run(
        &settings("samples = 1000\nbatch = 100\nepochs = 1\ntilting = 'l2'\ntau = 1e-16\nlr = 1e-9\n"),
        dir.path(),
        false,
        None,
    );
    let report = outcome.unwrap().report;
    assert!(
        report.table[0].starts_with("no closed form") && dir.path().join("model.safetensors").exists(),
        "{report:?}"
    );
}

#[test]
fn a_new_run_takes_the_place_of_a_finished_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = settings(SHUFFLED);
    run(&config, dir.path(), false, None).unwrap();
    let names = || -> BTreeSet<String> {
        fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect()
    };
    let five = ["checkpoint.safetensors", "config.toml", "metrics.jsonl", "model.safetensors", "summary.json"];
    assert_eq!(names(), five.map(String::from).into());
    let old = model(dir.path());
    run(&Config { seed: 1, ..config }, dir.path(), false, Some(3)).unwrap();
    // Nothing of the old run is beside the new one's settings, and no temporary file is left.
    assert_eq!(names(), ["checkpoint.safetensors", "config.toml", "metrics.jsonl"].map(String::from).into());
    run(&Config { seed: 1, ..settings(SHUFFLED) }, dir.path(), true, None).unwrap();
    assert!(model(dir.path()) != old, "another seed, another model");
}

// The short runs of the experiments, each against what it should reach. Slack over what the seed gives, and far from
// what an untrained model gives: excess 1, accuracy 0.1.
#[test]
fn quick_gp_comes_near_the_closed_form() {
    let dir = tempfile::tempdir().unwrap();
    run(&settings("quick = true"), dir.path(), false, None).unwrap();
    let theory = &summary(dir.path())["theory"];
    for side in ["u_given_v", "v_given_u"] {
        let number = |kind: &str| theory[format!("{kind}_{side}")].as_f64().unwrap();
        let excess = (number("err") - number("optimum")) / number("signal");
        assert!((0.0..0.03).contains(&excess), "{side}: {excess}");
    }
}

#[test]
fn quick_gaussian2d_learns_the_closed_forms_of_three_models() {
    // In-batch sums bias A by 1% at this batch, and up to 3% may be; the short run adds its own.
    for (toml, a, b) in [
        ("", 4.0 / 9.0, 0.0),
        ("tilting = 'l2'\nlambda_u = 2.0\nlambda_v = 0.0\n", 4.0 / 5.0, 8.0 / 15.0),
        ("tilting = 'l2'\nlambda_u = 0.0\nlambda_v = 2.0\n", 4.0 / 5.0, 6.0 / 5.0),
        ("objective = 'joint'\n", 1.0 / 3.0, 0.0),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let config = settings(&format!("experiment = 'gaussian2d'\nquick = true\n{toml}"));
        run(&config, dir.path(), false, None).unwrap();
        let summary = summary(dir.path());
        for (key, want) in [("a", a), ("b", b)] {
            let (got, best) = (summary[key].as_f64().unwrap(), summary[format!("{key}_optimum")].as_f64().unwrap());
            assert!((best - want).abs() < 1e-9, "{toml}{key}: closed form {best}, want {want}");
            assert!((got - want).abs() <= 0.06 * want, "{toml}{key}: learned {got}, want {want}");
        }
    }
}

#[test]
fn models_without_a_closed_form_train_without_a_certificate() {
    let short = "experiment = 'gp'\nsamples = 64\nbatch = 16\nepochs = 2\n";
    for (toml, keys) in [
        ("tilting = 'cosine'\n", 0),
        ("[encoder_u]\nkind = 'mlp'\nhidden = [3]\nactivation = 'relu'\n", 0),
        ("[encoder_v]\nkind = 'linear'\nbias = true\n", 0),
        ("[encoder_v]\nkind = 'identity'\n", 0),
        ("objective = 'mmd'\n", 4),
        ("smoothing = 0.1\n", 4),
        ("tilting = 'l2'\n", 4),
        ("tilting = 'l2'\nlambda_u = 2.0\nlambda_v = 0.0\n", 7),
        ("dim = 9\n", 7),
    ] {
        let dir = tempfile::tempdir().unwrap();
        run(&settings(&format!("{short}{toml}")), dir.path(), false, None).unwrap();
        let summary = summary(dir.path());
        let theory = summary["theory"].as_object().unwrap();
        assert_eq!((theory.len(), theory.values().filter(|x| x.is_number()).count()), (7, keys), "{toml}");
    }
}

#[test]
fn quick_digits_are_learned() {
    let dir = tempfile::tempdir().unwrap();
    run(&settings("experiment = 'digits'\nquick = true"), dir.path(), false, None).unwrap();
    let accuracy = summary(dir.path())["test_accuracy"].as_f64().unwrap();
    assert!((0.7..=1.0).contains(&accuracy), "{accuracy}");
    let losses: Vec<f64> = metrics(dir.path()).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    assert!(losses[losses.len() - 1] < losses[0] - 1.0, "{losses:?}");
}
