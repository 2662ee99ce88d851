//! What a training step works on: buffers made once, and the passes over them.

use super::moments::Moments;
use crate::checkpoint::{Checkpoint, Origin};
use crate::config::Config;
use crate::data::{Order, PairBatch, Side, Source};
use crate::device::{Contrast, Device, Embeddings, SCALING_START, Scalars, View, ViewMut};
use crate::nn::{Acts, Network};
use crate::objective::{Loss, LossError, Objective, Precision, Write};
use crate::optim::Adam;
use std::ops::Range;

/// Numbers of a plan's row before its samples: the row, the next, and [`Adam::now`].
const PLAN: usize = 5;
/// Samples of a gathering from a source that moves to the device.
const MOVED: usize = 4096;
/// Buffers number samples in f32, exactly up to here.
const NUMBERED: usize = 1 << 24;

/// A model in training on a device. Arrays of two are (u, v).
pub(super) struct State<'a, D: Contrast> {
    config: &'a Config,
    network: &'a Network,
    precision: Precision,
    origin: Origin,
    samples: usize,
    /// Rows embedded at a time.
    micro: usize,
    /// The arena, its gradient, and Adam's moments.
    params: D::Buf,
    grads: D::Buf,
    adam: Adam<D>,
    /// All data `[samples, inputs]`, if it is on the device.
    data: Option<[D::Buf; 2]>,
    /// Data `[batch, inputs]`.
    x: [D::Buf; 2],
    moments: Moments<D::Buf>,
    /// `[batch, dim]`.
    embeddings: [D::Buf; 2],
    /// dL/d embeddings `[batch, dim]`.
    d_embeddings: [D::Buf; 2],
    acts: [Acts<D>; 2],
    /// Rows for the steps to come `[AHEAD, PLAN (+ batch)]`, the row whose turn it is, and that row.
    plan: D::Buf,
    cursor: D::Buf,
    now: D::Buf,
    /// What a step leaves, and those of the plan's steps: [`Scalars::out`], `[norm, factor]` of [`Device::judge`].
    scalars: D::Buf,
    judged: D::Buf,
    log: [D::Buf; 2],
    /// [`Device::judge`]'s scaling of the gradients, where products are narrow.
    scaling: Option<D::Buf>,
    recorded: D::Recorded,
}

/// What a step leaves for people.
#[derive(Clone, Copy, Debug)]
pub(super) struct Results {
    /// Of its batch, nats.
    pub loss: f64,
    /// Temperature used.
    pub tau: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Left out, as gradients overflowed because they were scaled: the scale is less after it.
    pub skipped: bool,
    /// Not finite, and no matter of scaling: the step changed nothing.
    pub diverged: bool,
}

impl<'a, D: Contrast> State<'a, D> {
    /// The state that `start` holds.
    pub(super) fn new(
        device: &D,
        config: &'a Config,
        network: &'a Network,
        source: &dyn Source,
        start: &Checkpoint,
    ) -> Self {
        let Network { encoders, layout, .. } = network;
        let micro = config.micro();
        let mut adam = Adam::new(device, config.adam, layout);
        let mut params = device.alloc(layout.len());
        for (buf, from) in [&mut params, &mut adam.m, &mut adam.v].into_iter().zip(&start.arenas) {
            device.upload(from, ViewMut::first(buf, layout.len()));
        }
        let batch_of = |width: usize| device.alloc(config.batch * width);
        let scaling = device.is_narrow().then(|| {
            let mut scaling = device.alloc(2);
            device.upload(&start.scaling, ViewMut::first(&mut scaling, 2));
            scaling
        });
        let x = [0, 1].map(|side| batch_of(encoders[side].input));
        let moments = Moments::new(device, config, source);
        let [embeddings, d_embeddings] = [0, 1].map(|_| [0, 1].map(|_| batch_of(config.dim)));
        let acts = [0, 1].map(|side| encoders[side].acts(device, micro));
        // Last, so that it is told what is free.
        let data = moments.views().is_none().then(|| keep(device, source)).flatten();
        let plan = PLAN + if data.is_some() { config.batch } else { 0 };
        let ahead = D::AHEAD as usize;
        State {
            config,
            network,
            precision: config.precision,
            origin: start.origin.clone(),
            samples: source.len(),
            micro,
            params,
            grads: device.alloc(layout.len()),
            adam,
            data,
            x,
            moments,
            embeddings,
            d_embeddings,
            acts,
            plan: device.alloc(ahead * plan),
            cursor: device.alloc(1),
            now: device.alloc(plan),
            scalars: device.alloc(4),
            judged: device.alloc(2),
            log: [4, 2].map(|width| device.alloc(ahead * width)),
            scaling,
            recorded: D::Recorded::default(),
        }
    }

    /// Whether the device has all data: then a plan says which of it is a batch, and nothing is to be fed.
    pub(super) fn is_resident(&self) -> bool {
        self.data.is_some()
    }

    /// Numbers of the next steps, from `first` on, each with its learning rate.
    pub(super) fn plan(&mut self, device: &D, first: u64, rates: &[f64]) {
        let Config { seed, batch, .. } = *self.config;
        let epoch_steps = (self.samples / batch) as u64;
        let (mut host, mut index) = (Vec::new(), Vec::new());
        let mut order: Option<(u64, Order)> = None;
        for (row, (step, lr)) in (first..).zip(rates).enumerate() {
            host.extend([row as f32, (row + 1) as f32]);
            host.extend(self.adam.now(step, *lr));
            if self.is_resident() {
                let (epoch, at) = (step / epoch_steps, (step % epoch_steps) as usize * batch);
                let (_, order) = match order.take().filter(|(of, _)| *of == epoch) {
                    Some(same) => order.insert(same),
                    None => order.insert((epoch, Order::new(seed, epoch, self.samples))),
                };
                index.clear();
                order.extend(at..at + batch, &mut index);
                host.extend(index.iter().map(|&i| i as f32));
            }
        }
        device.upload(&host, ViewMut::first(&mut self.plan, host.len()));
        device.upload(&[0.0], ViewMut::first(&mut self.cursor, 1));
    }

    /// A batch from the host.
    pub(super) fn feed(&mut self, device: &D, data: &PairBatch) {
        self.moments.update(device, self.config, &data.u, &data.v);
        for (x, host) in self.x.iter_mut().zip([&data.u, &data.v]) {
            device.upload(host, ViewMut::first(x, host.len()));
        }
    }

    /// The plan's next step, number `step` of the run.
    pub(super) fn step(&mut self, device: &mut D, step: u64) -> Result<(), LossError> {
        let loss = self.config.loss(step);
        if matches!(loss.objective, Objective::JointShuffled { .. }) {
            // Other pairings each time.
            return self.passes(device, &loss);
        }
        let mut recorded = std::mem::take(&mut self.recorded);
        let done = device.repeat(&mut recorded, &mut |device| self.passes(device, &loss));
        self.recorded = recorded;
        done
    }

    /// All of a step: nothing in it comes from the host or goes there.
    fn passes(&mut self, device: &mut D, loss: &Loss) -> Result<(), LossError> {
        let row = device.len(&self.now);
        let rows = device.len(&self.plan);
        device.gather(
            row,
            View::first(&self.plan, rows),
            View::first(&self.cursor, 1),
            ViewMut::first(&mut self.now, row),
        );
        device.copy(View { buf: &self.now, at: 1..2 }, ViewMut::first(&mut self.cursor, 1));
        if let Some(data) = &self.data {
            for ((x, data), encoder) in self.x.iter_mut().zip(data).zip(&self.network.encoders) {
                let (width, index) = (encoder.input, View { buf: &self.now, at: PLAN..row });
                device.gather(
                    width,
                    View::first(data, self.samples * width),
                    index,
                    ViewMut::first(x, self.config.batch * width),
                );
            }
        }
        self.embed(device);
        self.contrast(device, loss)?;
        self.backward(device);
        self.update(device);
        let index = View { buf: &self.now, at: 0..1 };
        for ((log, from), width) in self.log.iter_mut().zip([&self.scalars, &self.judged]).zip([4, 2]) {
            let len = D::AHEAD as usize * width;
            device.scatter(width, View::first(from, width), index.again(), ViewMut::first(log, len));
        }
        Ok(())
    }

    /// Embeds a batch, a micro-batch at a time, keeping the embeddings alone.
    fn embed(&mut self, device: &D) {
        for side in [0, 1] {
            for first in (0..self.config.batch).step_by(self.micro) {
                self.forward(device, side, first);
                let len = self.micro * self.config.dim;
                let to = ViewMut { buf: &mut self.embeddings[side], at: rows(first, self.micro, self.config.dim) };
                device.copy(View::first(&self.acts[side].output, len), to);
            }
        }
    }

    /// Evaluates `loss`, at the temperature and bias learned so far, leaving its gradients beside the embeddings.
    fn contrast(&mut self, device: &mut D, loss: &Loss) -> Result<(), LossError> {
        let (batch, dim) = (self.config.batch, self.config.dim);
        let [u, v] = self.embeddings.each_ref().map(|e| View::first(e, batch * dim));
        let gradients = self.d_embeddings.each_mut().map(|d| Write::Set(ViewMut::first(d, batch * dim)));
        let embeddings =
            Embeddings { u, v, rows: batch, dim, precision: self.precision, moments: self.moments.views() };
        let param = |at: &Range<usize>| View { buf: &self.params, at: at.clone() };
        let scalars = Scalars {
            logit_scale: self.config.train_tau.then(|| param(&self.network.logit_scale)),
            bias: loss.objective.is_of_each_pair().then(|| param(&self.network.bias)),
            out: ViewMut::first(&mut self.scalars, 4),
        };
        device.contrast(loss, embeddings, gradients, scalars)
    }

    /// Gradients of the whole arena, from those of the embeddings and of the loss's scalars.
    fn backward(&mut self, device: &D) {
        let (batch, dim, micro) = (self.config.batch, self.config.dim, self.micro);
        device.fill(0.0, ViewMut::first(&mut self.grads, self.network.layout.len()));
        for side in [0, 1] {
            for first in (0..batch).step_by(micro) {
                if micro < batch {
                    self.forward(device, side, first);
                }
                let (encoder, acts) = (&self.network.encoders[side], &mut self.acts[side]);
                let d = View { buf: &self.d_embeddings[side], at: rows(first, micro, dim) };
                scaled(device, &self.scaling, d, ViewMut::first(&mut acts.d_output, micro * dim));
                let x = View { buf: &self.x[side], at: rows(first, micro, encoder.input) };
                encoder.backward(device, &self.params, x, micro, acts, &mut self.grads);
            }
        }
        // log(1/tau) and the bias lie side by side, as their gradients do.
        let at = self.network.logit_scale.start..self.network.bias.end;
        let d = View { buf: &self.scalars, at: 1..3 };
        scaled(device, &self.scaling, d, ViewMut { buf: &mut self.grads, at });
    }

    /// One optimiser step; a trained temperature stays within CLIP's bounds.
    fn update(&mut self, device: &D) {
        let (loss, grads) =
            (View { buf: &self.scalars, at: 0..1 }, View::first(&self.grads, self.network.layout.len()));
        let scaling = self.scaling.as_mut().map(|s| ViewMut::first(s, 2));
        device.judge(self.config.grad_clip, loss, grads, scaling, ViewMut::first(&mut self.judged, 2));
        let (now, factor) = (View { buf: &self.now, at: 2..PLAN }, View { buf: &self.judged, at: 1..2 });
        self.adam.update(device, now, factor, &mut self.params, &self.grads);
        if self.config.train_tau {
            let scale = ViewMut { buf: &mut self.params, at: self.network.logit_scale.clone() };
            device.clamp(0.0, 100f64.ln(), scale);
        }
    }

    /// What the plan's first `count` steps left.
    pub(super) fn results(&self, device: &D, count: usize) -> impl Iterator<Item = Results> + use<D> {
        let [scalars, judged] = [0, 1].map(|which| {
            let mut host = vec![0.0; count * [4, 2][which]];
            device.download(View::first(&self.log[which], host.len()), &mut host);
            host
        });
        let narrow = self.scaling.is_some();
        (0..count).map(move |row| {
            let [loss, tau, grad_norm] = [scalars[4 * row], scalars[4 * row + 3], judged[2 * row]].map(f64::from);
            let skipped = narrow && !grad_norm.is_finite();
            let diverged = !(loss.is_finite() && (skipped || grad_norm.is_finite()));
            Results { loss, tau, grad_norm, skipped, diverged }
        })
    }

    /// The temperature learned so far.
    pub(super) fn tau(&self, device: &D) -> f64 {
        if !self.config.train_tau {
            return self.config.tau;
        }
        let mut scale = [0.0];
        device.download(View { buf: &self.params, at: self.network.logit_scale.clone() }, &mut scale);
        (-f64::from(scale[0])).exp()
    }

    /// The arena.
    pub(super) fn params(&self, device: &D) -> Vec<f32> {
        self.arena(device, &self.params)
    }

    /// What is laid out as the arena.
    fn arena(&self, device: &D, buf: &D::Buf) -> Vec<f32> {
        let mut host = vec![0.0; self.network.layout.len()];
        device.download(View::first(buf, host.len()), &mut host);
        host
    }

    /// All that is needed to go on from here.
    pub(super) fn checkpoint(&self, device: &D, step: u64, loss_sum: f64, seconds: f64) -> Checkpoint {
        let mut scaling = [SCALING_START, 0.0];
        if let Some(buf) = &self.scaling {
            device.download(View::first(buf, 2), &mut scaling);
        }
        let arenas = [&self.params, &self.adam.m, &self.adam.v].map(|buf| self.arena(device, buf));
        let (config, origin) = (self.config.clone(), self.origin.clone());
        Checkpoint { config, origin, step, loss_sum, seconds, scaling, arenas }
    }

    /// Embeds the micro-batch that begins at row `first` into `acts`.
    fn forward(&mut self, device: &D, side: usize, first: usize) {
        let encoder = &self.network.encoders[side];
        let x = View { buf: &self.x[side], at: rows(first, self.micro, encoder.input) };
        encoder.forward(device, &self.params, x, self.micro, &mut self.acts[side]);
    }
}

/// All data of `source` on the device, if it takes them.
fn keep<D: Contrast>(device: &D, source: &dyn Source) -> Option<[D::Buf; 2]> {
    let samples = source.len();
    if samples > NUMBERED {
        return None;
    }
    let sides = [Side::U, Side::V];
    let mut data = device.keep(sides.map(|side| samples * source.dim(side)))?;
    let mut host = Vec::new();
    for (buf, side) in data.iter_mut().zip(sides) {
        let width = source.dim(side);
        for first in (0..samples).step_by(MOVED) {
            let index: Vec<usize> = (first..samples.min(first + MOVED)).collect();
            host.resize(index.len() * width, 0.0);
            source.gather(side, &index, &mut host);
            device.upload(&host, ViewMut { buf, at: rows(first, index.len(), width) });
        }
    }
    Some(data)
}

/// `to = from`, times the scaling if there is one.
fn scaled<D: Device>(device: &D, scaling: &Option<D::Buf>, from: View<'_, D::Buf>, to: ViewMut<'_, D::Buf>) {
    match scaling {
        Some(scaling) => device.scale(View { buf: scaling, at: 0..1 }, from, to),
        None => device.copy(from, to),
    }
}

/// Where `count` rows of `width` numbers lie, from row `first` on.
fn rows(first: usize, count: usize, width: usize) -> Range<usize> {
    first * width..(first + count) * width
}
