//! Two encoders and the scalars of the loss, over one arena.

use super::{Encoder, EncoderSpec, Layout, NnError};
use std::ops::Range;

/// What is trained: encoders of u and of v, then the scalars `logit_scale` = log(1/tau) and `bias` (sigmoid's).
#[derive(Clone, Debug)]
pub struct Network {
    /// Encoders of u and of v.
    pub encoders: [Encoder; 2],
    /// All parameters.
    pub layout: Layout,
    /// Where log(1/tau) lies.
    pub logit_scale: Range<usize>,
    /// Where the bias lies.
    pub bias: Range<usize>,
}

impl Network {
    /// Encoders from `inputs` numbers a sample on each side to `dim`.
    ///
    /// # Errors
    /// [`NnError::Shape`] when layers do not fit.
    pub fn build(specs: [&EncoderSpec; 2], inputs: [usize; 2], dim: usize) -> Result<Self, NnError> {
        let mut layout = Layout::default();
        let u = Encoder::build(specs[0], "u", inputs[0], dim, &mut layout)?;
        let v = Encoder::build(specs[1], "v", inputs[1], dim, &mut layout)?;
        let logit_scale = layout.push("logit_scale", &[1]);
        let bias = layout.push("bias", &[1]);
        Ok(Network { encoders: [u, v], layout, logit_scale, bias })
    }

    /// Floating point operations of a step on `batch` pairs: forward, twice as many backward, and the loss's `8 batch^2 dim`.
    pub fn step_flops(&self, batch: usize) -> f64 {
        let [u, v] = self.encoders.each_ref().map(Encoder::multiply_adds);
        let (batch, dim) = (batch as f64, self.encoders[0].output as f64);
        6.0 * batch * (u + v) + 8.0 * batch * batch * dim
    }

    /// Initial parameters.
    pub fn init(&self, seed: u64, tau: f64, bias: f64) -> Vec<f32> {
        let mut params = vec![0.0; self.layout.len()];
        self.encoders.iter().for_each(|encoder| encoder.init(seed, &mut params));
        params[self.logit_scale.start] = -tau.ln() as f32;
        params[self.bias.start] = bias as f32;
        params
    }
}
