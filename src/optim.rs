//! Adam, AdamW, schedules and clipping, over the parameter arena.

use crate::device::{AdamStep, Device, View, ViewMut};
use std::ops::Range;

/// Optimiser settings.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamConfig {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Decoupled (AdamW); 0 is plain Adam. Applies to tensors of two and more dimensions only.
    pub weight_decay: f64,
}

/// The learning rate over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    Constant,
    /// Half a cosine from the peak down to zero.
    Cosine,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

impl Schedule {
    /// Factor on the peak learning rate at `step` (from 0) of `steps`, rising linearly over the first `warmup`
    /// steps, the last of which has the peak.
    pub fn factor(self, step: u64, warmup: u64, steps: u64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        match self {
            Schedule::Constant => 1.0,
            Schedule::Cosine => {
                let done = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
                0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
            }
        }
    }
}

/// Adam's moments, `[arena]` each.
#[derive(Debug)]
pub struct Adam<D: Device> {
    pub config: AdamConfig,
    pub m: D::Buf,
    pub v: D::Buf,
    /// Parts of the arena, each with its weight decay; together all of it.
    parts: Vec<(Range<usize>, f64)>,
}

impl<D: Device> Adam<D> {
    /// Zero moments for the parameters of `layout`.
    pub fn new(device: &D, config: AdamConfig, layout: &crate::nn::Layout) -> Self {
        let mut parts: Vec<(Range<usize>, f64)> = Vec::new();
        for span in &layout.spans {
            let decay = if span.shape.len() >= 2 { config.weight_decay } else { 0.0 };
            match parts.last_mut() {
                Some((at, last)) if *last == decay => at.end = span.at.end,
                _ => parts.push((span.at.clone(), decay)),
            }
        }
        Adam { config, m: device.alloc(layout.len()), v: device.alloc(layout.len()), parts }
    }

    /// Update number `step` (from 0) of `params` by `grads * grad_scale` at learning rate `lr`. To clip by norm, let
    /// `grad_scale` be `min(1, limit / grad_norm)`.
    pub fn step(&mut self, device: &D, step: u64, lr: f64, grad_scale: f64, params: &mut D::Buf, grads: &D::Buf) {
        let AdamConfig { beta1, beta2, eps, .. } = self.config;
        let bias = [beta1, beta2].map(|beta| 1.0 - beta.powf((step + 1) as f64));
        for (at, decay) in &self.parts {
            device.adam(
                &AdamStep { lr, beta1, beta2, eps, decay: *decay, bias, grad_scale },
                View { buf: grads, at: at.clone() },
                ViewMut { buf: params, at: at.clone() },
                ViewMut { buf: &mut self.m, at: at.clone() },
                ViewMut { buf: &mut self.v, at: at.clone() },
            );
        }
    }
}

/// The Euclidean norm of all gradients.
pub fn grad_norm<D: Device>(device: &D, grads: &D::Buf) -> f64 {
    device.sum_squares(View { buf: grads, at: 0..device.len(grads) }).sqrt()
}
