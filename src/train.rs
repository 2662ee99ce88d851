//! The path: one loop, from data to parameters, without autograd.
//!
//! ```text
//! Prefetch::next_batch -> Encoder::forward -> u, v [batch, dim]
//!   -> Device::contrast = loss, du, dv          (one call; [batch, batch] never exists)
//!   -> Encoder::backward -> Adam::step -> record -> next batch
//! ```
//!
//! With gradient caching the batch is embedded in micro-batches that keep only their embeddings, the loss
//! sees all of them at once, and each micro-batch is embedded again to carry its gradient back: memory for
//! activations is that of a micro-batch, and the result that of the batch, to rounding.

mod moments;

use crate::checkpoint::{Checkpoint, Due, Metrics, Record};
use crate::config::{Config, parse_precision};
use crate::data::{DataError, Prefetch, Side, Source};
use crate::device::{Contrast, Device, View, ViewMut};
use crate::nn::Network;
use crate::objective::{LossError, Objective, Write};
use crate::optim::{Adam, grad_norm};
use moments::Moments;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Where training stands, told after every step.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps done and steps in all.
    pub steps: [u64; 2],
    /// Of the last batch.
    pub loss: f64,
}

/// How training ended.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The arena.
    pub params: Vec<f32>,
    /// Mean loss of the last epoch begun.
    pub loss: f64,
    /// Temperature at the end.
    pub tau: f64,
    /// Steps done in all, and in this call.
    pub steps: [u64; 2],
    /// Ended before its last step because it was told to.
    pub stopped: bool,
}

/// Why training failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The loss refused its inputs, embeddings that are not finite among them.
    #[error("step {step}: {source}")]
    Loss {
        /// From 0.
        step: u64,
        /// The loss's reason.
        source: LossError,
    },
    /// The loss is not a number any more.
    #[error("step {step}: the loss is {loss}; a smaller lr or grad_clip may help")]
    Diverged {
        /// From 0.
        step: u64,
        /// What it is.
        loss: f64,
    },
}

/// Trains `network` on `source`; `start` is a checkpoint to go on from. Files go to `dir`. Stops early, with a
/// checkpoint, once `stop` is set.
///
/// # Errors
/// [`TrainError`]; the last checkpoint stays.
#[allow(clippy::too_many_arguments)]
pub fn train<D: Contrast + Device<Real = f32>>(
    device: &mut D,
    config: &Config,
    network: &Network,
    source: &dyn Source,
    dir: Option<&Path>,
    start: Option<Checkpoint>,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(Progress),
) -> Result<Trained, TrainError> {
    let Network { encoders, layout, logit_scale, bias } = network;
    let (batch, dim) = (config.batch, config.dim);
    let micro = if config.micro_batch > 0 { config.micro_batch } else { batch };
    let sides = [Side::U, Side::V];
    let mut params = device.alloc(layout.len());
    let mut grads = device.alloc(layout.len());
    let mut adam = Adam::new(device, config.adam, layout);
    let start = start.unwrap_or_else(|| Checkpoint::fresh(config, network));
    for (buf, from) in [&mut params, &mut adam.m, &mut adam.v].into_iter().zip(&start.arenas) {
        device.upload(from, all_mut(buf, from.len()));
    }
    let mut x = sides.map(|side| device.alloc(batch * source.dim(side)));
    let mut moments = Moments::new(device, config, source);
    let mut embeddings = sides.map(|_| device.alloc(batch * dim));
    let mut d_embeddings = sides.map(|_| device.alloc(batch * dim));
    let mut acts = [encoders[0].acts(device, micro), encoders[1].acts(device, micro)];
    let precision = parse_precision(&config.precision).expect("validated");

    let epoch_steps = Prefetch::steps_per_epoch(source.len(), batch);
    let steps = config.epochs * epoch_steps;
    let (mut step, mut loss_sum) = (start.step, start.loss_sum);
    let mut scalars = [0f32; 2];
    let mut metrics = dir.map(|dir| Metrics::open(dir, step)).transpose()?;
    let mut due = Due::new();
    let mut logged = (Instant::now(), step);
    std::thread::scope(|scope| {
        let mut batches = (step < steps)
            .then(|| Prefetch::spawn(scope, source, config.seed, batch, step / epoch_steps, step % epoch_steps));
        while let Some(batches) = batches.as_mut().filter(|_| step < steps && !stop.load(Ordering::Relaxed)) {
            let data = batches.next_batch();
            for ((x, side), host) in x.iter_mut().zip(sides).zip([&data.u, &data.v]) {
                device.upload(host, all_mut(x, batch * source.dim(side)));
            }
            moments.update(device, config, &data.u, &data.v);
            let rows = |first: usize, width: usize| first * width..(first + micro) * width;
            for first in (0..batch).step_by(micro) {
                for s in 0..2 {
                    let x = View { buf: &x[s], at: rows(first, source.dim(sides[s])) };
                    encoders[s].forward(device, &params, x, micro, &mut acts[s]);
                    device.copy(
                        all(&acts[s].output, micro * dim),
                        ViewMut { buf: &mut embeddings[s], at: rows(first, dim) },
                    );
                }
            }

            device.download(View { buf: &params, at: logit_scale.clone() }, &mut scalars[..1]);
            device.download(View { buf: &params, at: bias.clone() }, &mut scalars[1..]);
            let mut loss = config.loss(step).expect("validated");
            if config.train_tau {
                loss.tau = (-f64::from(scalars[0])).exp();
            }
            if let Objective::Sigmoid { bias } = &mut loss.objective {
                *bias = f64::from(scalars[1]);
            }
            let [u, v] = &embeddings;
            let [du, dv] = &mut d_embeddings;
            let [du, dv] = [du, dv].map(|d| Write::Set(all_mut(d, batch * dim)));
            let (u, v) = (all(u, batch * dim), all(v, batch * dim));
            let value = device
                .contrast(&loss, precision, [batch, dim], u, v, moments.views(), du, dv)
                .map_err(|source| TrainError::Loss { step, source })?;
            if !value.loss.is_finite() {
                return Err(TrainError::Diverged { step, loss: value.loss });
            }

            device.fill(0.0, all_mut(&mut grads, layout.len()));
            for first in (0..batch).step_by(micro) {
                for s in 0..2 {
                    let x = View { buf: &x[s], at: rows(first, source.dim(sides[s])) };
                    if micro < batch {
                        encoders[s].forward(device, &params, x.again(), micro, &mut acts[s]);
                    }
                    let d = View { buf: &d_embeddings[s], at: rows(first, dim) };
                    device.copy(d, all_mut(&mut acts[s].d_output, micro * dim));
                    encoders[s].backward(device, &params, x, micro, &mut acts[s], &mut grads);
                }
            }
            let d_scale = if config.train_tau { -loss.tau * value.grad_tau } else { 0.0 };
            device.upload(&[d_scale as f32], ViewMut { buf: &mut grads, at: logit_scale.clone() });
            device.upload(&[value.grad_bias as f32], ViewMut { buf: &mut grads, at: bias.clone() });
            let log = step % config.log_every == 0 || step + 1 == steps;
            let norm = if log || config.grad_clip > 0.0 { grad_norm(device, &grads) } else { 0.0 };
            let clip = if config.grad_clip > 0.0 { (config.grad_clip / norm).min(1.0) } else { 1.0 };
            let lr = config.lr * config.schedule.factor(step, config.warmup, steps);
            adam.step(device, step, lr, clip, &mut params, &grads);
            if config.train_tau {
                device.download(View { buf: &params, at: logit_scale.clone() }, &mut scalars[..1]);
                let kept = scalars[0].clamp(0.0, 100f32.ln());
                device.upload(&[kept], ViewMut { buf: &mut params, at: logit_scale.clone() });
            }

            loss_sum = if step % epoch_steps == 0 { 0.0 } else { loss_sum } + value.loss;
            if let Some(metrics) = metrics.as_mut().filter(|_| log) {
                let samples = (step + 1 - logged.1) as f64 * batch as f64;
                let samples_per_s = samples / logged.0.elapsed().as_secs_f64();
                let epoch = step / epoch_steps;
                metrics.push(&Record {
                    step,
                    epoch,
                    loss: value.loss,
                    tau: loss.tau,
                    grad_norm: norm,
                    lr,
                    samples_per_s,
                })?;
                logged = (Instant::now(), step + 1);
            }
            step += 1;
            observe(Progress { steps: [step, steps], loss: value.loss });
            if let Some(dir) = dir.filter(|_| due.now()) {
                Checkpoint::of(device, config, step, loss_sum, [&params, &adam.m, &adam.v]).write(dir)?;
                due.written();
            }
        }
        Ok(())
    })?;
    let last = Checkpoint::of(device, config, step, loss_sum, [&params, &adam.m, &adam.v]);
    if let (Some(dir), Some(metrics)) = (dir, &mut metrics) {
        metrics.flush()?;
        last.write(dir)?;
    }
    let in_epoch = if step == 0 { 1 } else { (step - 1) % epoch_steps + 1 };
    let [params, ..] = last.arenas;
    let tau = if config.train_tau { (-f64::from(params[logit_scale.start])).exp() } else { config.tau };
    let steps_done = [step, step - start.step];
    Ok(Trained { params, loss: loss_sum / in_epoch as f64, tau, steps: steps_done, stopped: step < steps })
}

fn all<B>(buf: &B, len: usize) -> View<'_, B> {
    View { buf, at: 0..len }
}

fn all_mut<B>(buf: &mut B, len: usize) -> ViewMut<'_, B> {
    ViewMut { buf, at: 0..len }
}
