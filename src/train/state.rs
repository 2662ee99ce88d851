//! What a training step works on: buffers made once, and the passes over them.

use super::TrainError;
use super::moments::Moments;
use crate::checkpoint::Checkpoint;
use crate::config::{Config, parse_precision};
use crate::data::{PairBatch, Source};
use crate::device::{Contrast, Device, Embeddings, View, ViewMut};
use crate::nn::{Acts, Network};
use crate::objective::{Loss, Objective, Precision, Value, Write};
use crate::optim::Adam;
use std::ops::Range;

/// A model in training on a device. Arrays of two are (u, v).
pub(super) struct State<'a, D: Device> {
    config: &'a Config,
    network: &'a Network,
    precision: Precision,
    /// Rows embedded at a time.
    micro: usize,
    /// The arena, its gradient, and Adam's moments.
    params: D::Buf,
    pub(super) grads: D::Buf,
    adam: Adam<D>,
    /// Data `[batch, inputs]`.
    x: [D::Buf; 2],
    moments: Moments<D::Buf>,
    /// `[batch, dim]`.
    embeddings: [D::Buf; 2],
    /// dL/d embeddings `[batch, dim]`.
    d_embeddings: [D::Buf; 2],
    acts: [Acts<D>; 2],
}

impl<'a, D: Contrast + Device<Real = f32>> State<'a, D> {
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
            device.upload(from, all_mut(buf, layout.len()));
        }
        let batch_of = |width: usize| device.alloc(config.batch * width);
        State {
            config,
            network,
            precision: parse_precision(&config.precision).expect("validated"),
            micro,
            params,
            grads: device.alloc(layout.len()),
            adam,
            x: [0, 1].map(|side| batch_of(encoders[side].input)),
            moments: Moments::new(device, config, source),
            embeddings: [0, 1].map(|_| batch_of(config.dim)),
            d_embeddings: [0, 1].map(|_| batch_of(config.dim)),
            acts: [0, 1].map(|side| encoders[side].acts(device, micro)),
        }
    }

    /// Embeds a batch, a micro-batch at a time, keeping the embeddings alone.
    pub(super) fn embed(&mut self, device: &D, data: &PairBatch) {
        let (batch, dim) = (self.config.batch, self.config.dim);
        self.moments.update(device, self.config, &data.u, &data.v);
        for (side, host) in [&data.u, &data.v].into_iter().enumerate() {
            device.upload(host, all_mut(&mut self.x[side], host.len()));
            for first in (0..batch).step_by(self.micro) {
                self.forward(device, side, first);
                let to = ViewMut { buf: &mut self.embeddings[side], at: rows(first, self.micro, dim) };
                device.copy(all(&self.acts[side].output, self.micro * dim), to);
            }
        }
    }

    /// The loss to evaluate at `step`: the configured one at the temperature and bias learned so far.
    pub(super) fn loss(&self, device: &D, step: u64) -> Loss {
        let scalar = |at: &Range<usize>| {
            let mut host = [0.0];
            device.download(View { buf: &self.params, at: at.clone() }, &mut host);
            f64::from(host[0])
        };
        let mut loss = self.config.loss(step).expect("validated");
        if self.config.train_tau {
            loss.tau = (-scalar(&self.network.logit_scale)).exp();
        }
        if let Objective::Sigmoid { bias } = &mut loss.objective {
            *bias = scalar(&self.network.bias);
        }
        loss
    }

    /// Evaluates `loss` on the embeddings, leaving its gradients beside them.
    pub(super) fn contrast(&mut self, device: &mut D, step: u64, loss: &Loss) -> Result<Value, TrainError> {
        let (batch, dim) = (self.config.batch, self.config.dim);
        let [u, v] = self.embeddings.each_ref().map(|e| all(e, batch * dim));
        let gradients = self.d_embeddings.each_mut().map(|d| Write::Set(all_mut(d, batch * dim)));
        let embeddings =
            Embeddings { u, v, rows: batch, dim, precision: self.precision, moments: self.moments.views() };
        device.contrast(loss, embeddings, gradients).map_err(|source| TrainError::Loss { step, source })
    }

    /// Gradients of the whole arena, from those of the embeddings and of the loss's scalars.
    pub(super) fn backward(&mut self, device: &D, loss: &Loss, value: &Value) {
        let (batch, dim, micro) = (self.config.batch, self.config.dim, self.micro);
        device.fill(0.0, all_mut(&mut self.grads, self.network.layout.len()));
        for side in [0, 1] {
            for first in (0..batch).step_by(micro) {
                if micro < batch {
                    self.forward(device, side, first);
                }
                let (encoder, acts) = (&self.network.encoders[side], &mut self.acts[side]);
                let d = View { buf: &self.d_embeddings[side], at: rows(first, micro, dim) };
                device.copy(d, all_mut(&mut acts.d_output, micro * dim));
                let x = View { buf: &self.x[side], at: rows(first, micro, encoder.input) };
                encoder.backward(device, &self.params, x, micro, acts, &mut self.grads);
            }
        }
        let d_logit_scale = if self.config.train_tau { -loss.tau * value.grad_tau } else { 0.0 };
        for (d, at) in [(d_logit_scale, &self.network.logit_scale), (value.grad_bias, &self.network.bias)] {
            device.upload(&[d as f32], ViewMut { buf: &mut self.grads, at: at.clone() });
        }
    }

    /// One optimiser step; a trained temperature stays within CLIP's bounds.
    pub(super) fn update(&mut self, device: &D, step: u64, lr: f64, grad_scale: f64) {
        self.adam.step(device, step, lr, grad_scale, &mut self.params, &self.grads);
        if self.config.train_tau {
            let mut scale = [0.0];
            device.download(View { buf: &self.params, at: self.network.logit_scale.clone() }, &mut scale);
            let kept = [scale[0].clamp(0.0, 100f32.ln())];
            device.upload(&kept, ViewMut { buf: &mut self.params, at: self.network.logit_scale.clone() });
        }
    }

    /// The arena.
    pub(super) fn params(&self, device: &D) -> Vec<f32> {
        let mut host = vec![0.0; self.network.layout.len()];
        device.download(all(&self.params, host.len()), &mut host);
        host
    }

    /// All that is needed to go on from here.
    pub(super) fn checkpoint(&self, device: &D, step: u64, loss_sum: f64, seconds: f64) -> Checkpoint {
        Checkpoint::of(device, self.config, step, loss_sum, seconds, [&self.params, &self.adam.m, &self.adam.v])
    }

    /// Embeds the micro-batch that begins at row `first` into `acts`.
    fn forward(&mut self, device: &D, side: usize, first: usize) {
        let encoder = &self.network.encoders[side];
        let x = View { buf: &self.x[side], at: rows(first, self.micro, encoder.input) };
        encoder.forward(device, &self.params, x, self.micro, &mut self.acts[side]);
    }
}

/// Where `count` rows of `width` numbers lie, from row `first` on.
fn rows(first: usize, count: usize, width: usize) -> Range<usize> {
    first * width..(first + count) * width
}

fn all<B>(buf: &B, len: usize) -> View<'_, B> {
    View { buf, at: 0..len }
}

fn all_mut<B>(buf: &mut B, len: usize) -> ViewMut<'_, B> {
    ViewMut { buf, at: 0..len }
}
