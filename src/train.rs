//! The path: one loop, from data to parameters, without autograd.
//!
//! ```text
//! Prefetch::next_batch -> Encoder::forward -> u, v [batch, dim]
//!   -> Contrast::contrast = loss, du, dv        (one call; [batch, batch] never exists)
//!   -> Encoder::backward -> Adam::step -> record -> next batch
//! ```
//!
//! A step is given to the device whole, in numbers that are there: its batch, learning rate and place in the log come
//! from a plan of the next steps, and its results stay until they are read, for the next line of the metrics. Where
//! that costs nothing, on the CPU, a plan is of one step.
//!
//! With gradient caching the batch is embedded in micro-batches that keep only their embeddings, the loss
//! sees all of them at once, and each micro-batch is embedded again to carry its gradient back: memory for
//! activations is that of a micro-batch, and the result that of the batch, to rounding.

mod moments;
mod outcome;
mod state;

pub use crate::checkpoint::Evaluation;
use crate::checkpoint::{Checkpoint, Due, Metrics, Origin, Record};
use crate::config::Config;
use crate::data::{Prefetch, Source};
use crate::device::{Contrast, Device};
use crate::nn::Network;
use crate::objective::LossError;
pub use outcome::{Progress, TrainError, Trained};
use state::{Results, State};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Measures a model: its parameters and temperature.
pub type Evaluate<'a, D> = dyn FnMut(&D, &[f32], f64) -> Evaluation + 'a;

/// Steps that scaled gradients may overflow in, one after another: by then the scale has gone from its largest to its least.
const MOST_SKIPS: u32 = 48;

/// A training of `network` on `source`, with all the memory that it takes.
pub struct Training<'a, D: Contrast> {
    config: &'a Config,
    source: &'a dyn Source,
    start: Checkpoint,
    state: State<'a, D>,
}

impl<'a, D: Contrast + Device<Real = f32>> Training<'a, D> {
    /// `start` is a checkpoint to go on from. Nothing is written yet.
    ///
    /// # Panics
    /// When the settings were not validated.
    pub fn new(
        device: &D,
        config: &'a Config,
        network: &'a Network,
        source: &'a dyn Source,
        start: Option<Checkpoint>,
    ) -> Self {
        let start = start.unwrap_or_else(|| Checkpoint::fresh(Origin::of(device, source), config, network));
        let state = State::new(device, config, network, source, &start);
        Training { config, source, start, state }
    }

    /// Trains. Files go to `dir`. Stops early, with a checkpoint, once `stop` is set. What `evaluate` measures after each epoch
    /// goes to the line of its last step.
    ///
    /// # Errors
    /// [`TrainError`]; the last checkpoint stays.
    ///
    /// # Panics
    /// When the batch is larger than the source.
    pub fn run(
        self,
        device: &mut D,
        dir: Option<&Path>,
        stop: &AtomicBool,
        observe: &mut dyn FnMut(Progress),
        mut evaluate: Option<&mut Evaluate<'_, D>>,
    ) -> Result<Trained, TrainError> {
        let Training { config, source, start, mut state } = self;
        let begun = Instant::now();
        let epoch_steps = Prefetch::steps_per_epoch(source.len(), config.batch);
        let steps = config.epochs.saturating_mul(epoch_steps);
        let (mut step, mut loss_sum) = (start.step, start.loss_sum);
        let mut skips = 0;
        let mut metrics = dir.map(|dir| Metrics::open(dir, step)).transpose()?;
        let mut logged = (Instant::now(), step);
        let mut due = Due::new();
        // A run that has made its last step takes no more time.
        let finished = step >= steps;
        let seconds = || start.seconds + if finished { 0.0 } else { begun.elapsed().as_secs_f64() };
        std::thread::scope(|scope| {
            let at = (step / epoch_steps, step % epoch_steps);
            let resident = state.is_resident();
            let spawn = || Prefetch::spawn(scope, source, config.seed, config.batch, at.0, at.1);
            let mut batches = (!resident).then(spawn).transpose().map_err(|e| TrainError::Device(Box::new(e)))?;
            while step < steps && !stop.load(Ordering::Relaxed) {
                let ahead = unread(config, step, epoch_steps).min(D::AHEAD);
                let rate = |step| config.lr * config.schedule.factor(step, config.warmup, steps);
                let rates: Vec<f64> = (step..step + ahead).map(rate).collect();
                state.plan(device, step, &rates);
                for step in step..step + ahead {
                    if let Some(batches) = &mut batches {
                        state.feed(device, batches.next_batch());
                    }
                    state.step(device, step).map_err(|source| match source {
                        LossError::NotFinite { what, .. } => TrainError::NotFinite { step, what },
                        source => TrainError::Loss { step, source },
                    })?;
                }
                device.finish().map_err(TrainError::Device)?;
                for (Results { loss, tau, grad_norm, skipped, diverged }, lr) in
                    state.results(device, rates.len()).zip(rates)
                {
                    skips = if skipped { skips + 1 } else { 0 };
                    if diverged || skips > MOST_SKIPS {
                        return Err(TrainError::Diverged { step, loss, grad_norm });
                    }
                    let epoch = step / epoch_steps;
                    loss_sum = if step % epoch_steps == 0 { 0.0 } else { loss_sum } + loss;
                    let evaluate = evaluate.as_mut().filter(|_| (step + 1) % epoch_steps == 0);
                    if let Some(metrics) = &mut metrics
                        && (step % config.log_every == 0 || step + 1 == steps || evaluate.is_some())
                    {
                        let samples = (step + 1 - logged.1) as f64 * config.batch as f64;
                        let samples_per_s = samples / logged.0.elapsed().as_secs_f64();
                        let evaluation = evaluate.map(|f| f(device, &state.params(device), state.tau(device)));
                        logged = (Instant::now(), step + 1);
                        let evaluation = evaluation.unwrap_or_default();
                        metrics.push(&Record { step, epoch, loss, tau, grad_norm, lr, samples_per_s, evaluation })?;
                    }
                    step += 1;
                    observe(Progress { steps: [step, steps], loss });
                }
                if let (Some(dir), Some(metrics)) = (dir, &mut metrics)
                    && due.now()
                {
                    metrics.sync()?;
                    state.checkpoint(device, step, loss_sum, seconds()).write(dir)?;
                    due.written();
                }
            }
            Ok(())
        })?;
        // A card that failed has no parameters to save.
        device.finish().map_err(TrainError::Device)?;
        let last = state.checkpoint(device, step, loss_sum, seconds());
        if let (Some(dir), Some(metrics)) = (dir, &mut metrics) {
            metrics.sync()?;
            if !finished {
                last.write(dir)?;
            }
        }
        Ok(Trained {
            loss: loss_sum / (step.saturating_sub(1) % epoch_steps + 1) as f64,
            tau: state.tau(device),
            steps: step,
            seconds: last.seconds,
            stopped: step < steps,
            params: last.arenas.into_iter().next().expect("three arenas"),
        })
    }
}

/// Steps from `step` on of which no result is wanted before the last one's: a line of the metrics, or an epoch's end.
fn unread(config: &Config, step: u64, epoch_steps: u64) -> u64 {
    let line = (config.log_every - step % config.log_every) % config.log_every + 1;
    line.min(epoch_steps - step % epoch_steps)
}
