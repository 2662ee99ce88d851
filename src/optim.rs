//! Adam, AdamW, schedules and clipping, over the parameter arena.

use crate::device::Device;

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
    /// Factor on the peak learning rate at `step` (from 0) of `steps`, rising linearly over the first `warmup`.
    pub fn factor(self, _step: u64, _warmup: u64, _steps: u64) -> f64 {
        todo!()
    }
}

/// Adam's moments, `[arena]` each.
#[derive(Debug)]
pub struct Adam<D: Device> {
    pub config: AdamConfig,
    pub m: D::Buf,
    pub v: D::Buf,
}

impl<D: Device> Adam<D> {
    pub fn new(_device: &D, _config: AdamConfig, _layout: &crate::nn::Layout) -> Self {
        todo!()
    }
    /// Update number `step` (from 0) of `params` by `grads * grad_scale` at learning rate `lr`.
    pub fn step(&mut self, _device: &D, _step: u64, _lr: f64, _grad_scale: f64, _params: &mut D::Buf, _grads: &D::Buf) {
        todo!()
    }
}

/// The Euclidean norm of all gradients.
pub fn grad_norm<D: Device>(_device: &D, _grads: &D::Buf) -> f64 {
    todo!()
}
