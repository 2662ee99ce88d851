//! Adam, AdamW, schedules and clipping, over the parameter arena.

use crate::device::{AdamStep, Device, View, ViewMut};
use std::ops::Range;

/// Optimiser settings.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment, after its bias correction.
    pub eps: f64,
    /// Decoupled (AdamW); 0 is plain Adam. Applies to tensors of two and more dimensions only.
    pub weight_decay: f64,
}

/// The learning rate over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// The peak throughout.
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
    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Schedule::Constant => "constant",
            Schedule::Cosine => "cosine",
        }
    }

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
    /// As given to [`Self::new`].
    pub config: AdamConfig,
    /// Mean of the gradients, by `beta1`.
    pub m: D::Buf,
    /// Mean of their squares, by `beta2`.
    pub v: D::Buf,
    /// Parts of the arena, each with its weight decay; together all of it.
    parts: Vec<(Range<usize>, f64)>,
    /// What [`Self::step`] is given by the host, `[4]`.
    given: D::Buf,
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
        Adam { config, m: device.alloc(layout.len()), v: device.alloc(layout.len()), parts, given: device.alloc(4) }
    }

    /// What update number `step` (from 0) at learning rate `lr` takes of the host: see [`Device::adam`].
    pub fn now(&self, step: u64, lr: f64) -> [f32; 3] {
        let bias = |beta: f64| 1.0 - beta.powf((step + 1) as f64);
        [lr, bias(self.config.beta1), bias(self.config.beta2)].map(|x| x as f32)
    }

    /// Update number `step` (from 0) of `params` by `grads * grad_scale` at learning rate `lr`.
    pub fn step(&mut self, device: &D, step: u64, lr: f64, grad_scale: f64, params: &mut D::Buf, grads: &D::Buf) {
        let [lr, bias_1, bias_2] = self.now(step, lr);
        let given = [lr, bias_1, bias_2, grad_scale as f32];
        device.upload(&given, ViewMut { buf: &mut self.given, at: 0..4 });
        let Adam { config, m, v, parts, given } = self;
        let (now, factor) = (View { buf: given, at: 0..3 }, View { buf: given, at: 3..4 });
        update(device, config, parts, [now, factor], params, [m, v], grads);
    }

    /// The same by numbers that are on the device: `now` holds [`Self::now`], and [`Device::judge`] leaves a `factor`.
    pub fn update(
        &mut self,
        device: &D,
        now: View<'_, D::Buf>,
        factor: View<'_, D::Buf>,
        params: &mut D::Buf,
        grads: &D::Buf,
    ) {
        let Adam { config, m, v, parts, .. } = self;
        update(device, config, parts, [now, factor], params, [m, v], grads);
    }
}

fn update<D: Device>(
    device: &D,
    config: &AdamConfig,
    parts: &[(Range<usize>, f64)],
    [now, factor]: [View<'_, D::Buf>; 2],
    params: &mut D::Buf,
    [m, v]: [&mut D::Buf; 2],
    grads: &D::Buf,
) {
    let AdamConfig { beta1, beta2, eps, .. } = *config;
    for (at, decay) in parts {
        device.adam(
            &AdamStep { beta1, beta2, eps, decay: *decay },
            now.again(),
            factor.again(),
            View { buf: grads, at: at.clone() },
            ViewMut { buf: &mut *params, at: at.clone() },
            ViewMut { buf: &mut *m, at: at.clone() },
            ViewMut { buf: &mut *v, at: at.clone() },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::{Cpu, Isa};
    use crate::nn::Layout;
    use rand::{RngExt, SeedableRng};

    // One parameter at a time, as the papers write it, with t from 1; a wrong place of eps, a missing bias correction
    // or a decayed bias vector shows at 1e-4 and above.
    #[test]
    fn adam_and_adamw_follow_the_scalar_recursion() {
        let device = Cpu::wide(Isa::best());
        let mut layout = Layout::default();
        for (name, shape) in [("w", &[5, 7][..]), ("b", &[5]), ("k", &[3, 2, 2, 2]), ("j", &[2, 2]), ("scale", &[])] {
            layout.push(name, shape);
        }
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for weight_decay in [0.0, 0.3] {
            let config = AdamConfig { beta1: 0.8, beta2: 0.95, eps: 1e-3, weight_decay };
            let mut adam = Adam::new(&device, config, &layout);
            let mut params: Vec<f64> = (0..layout.len()).map(|_| rng.random_range(-1.0..1.0)).collect();
            let mut want = params.clone();
            let mut moments = vec![(0.0, 0.0); layout.len()];
            for step in 0..20 {
                // What the host gives is f32.
                let scale = f64::from(rng.random_range(0.5f32..1.0));
                let [lr, bias_1, bias_2] = adam.now(step, 0.1 / (step + 1) as f64).map(f64::from);
                let t = step as i32 + 1;
                assert!((bias_1 / (1.0 - 0.8f64.powi(t)) - 1.0).abs() < 1e-7);
                assert!((bias_2 / (1.0 - 0.95f64.powi(t)) - 1.0).abs() < 1e-7);
                let grads: Vec<f64> = (0..layout.len()).map(|_| rng.random_range(-1.0..1.0)).collect();
                adam.step(&device, step, lr, scale, &mut params, &grads);
                for span in &layout.spans {
                    for i in span.at.clone() {
                        let (g, (m, v)) = (grads[i] * scale, &mut moments[i]);
                        *m = 0.8 * *m + 0.2 * g;
                        *v = 0.95 * *v + 0.05 * g * g;
                        if span.name != "b" && span.name != "scale" {
                            want[i] -= lr * weight_decay * want[i];
                        }
                        let (m_hat, v_hat) = (*m / bias_1, *v / bias_2);
                        want[i] -= lr * m_hat / (v_hat.sqrt() + 1e-3);
                    }
                }
            }
            for (got, want) in params.iter().zip(&want) {
                assert!((got - want).abs() < 1e-13, "decay {weight_decay}: {got}, want {want}");
            }
        }
    }

    #[test]
    fn schedules_rise_and_fall() {
        let cosine = |step| Schedule::Cosine.factor(step, 4, 14);
        assert_eq!([0, 1, 2, 3].map(cosine), [0.25, 0.5, 0.75, 1.0]);
        assert_eq!((cosine(4), cosine(14), cosine(99)), (1.0, 0.0, 0.0));
        assert!((cosine(9) - 0.5).abs() < 1e-15);
        assert!((4..14).all(|step| cosine(step + 1) < cosine(step)));
        assert_eq!([0, 3, 4, 99].map(|step| Schedule::Constant.factor(step, 4, 14)), [0.25, 1.0, 1.0, 1.0]);
        // A warmup as long as the run, and a run of no steps, are not errors.
        assert!(Schedule::Cosine.factor(5, 5, 5).is_finite() && Schedule::Cosine.factor(0, 0, 0).is_finite());
    }

    // Norm and factor, by what they are for: plain, clipped, scaled, not finite.
    #[test]
    fn gradients_are_judged() {
        let device = Cpu::wide(Isa::best());
        let grads = vec![3.0, 0.0, -4.0];
        let judge = |limit: f64, loss: f64, grads: &Vec<f64>, scaling: Option<&mut Vec<f64>>| {
            let (loss, mut to) = (vec![loss], vec![9.0; 2]);
            let scaling = scaling.map(|buf| ViewMut { buf, at: 0..2 });
            let (loss, grads) = (View { buf: &loss, at: 0..1 }, View { buf: grads, at: 0..grads.len() });
            device.judge(limit, loss, grads, scaling, ViewMut { buf: &mut to, at: 0..2 });
            to
        };
        assert_eq!(judge(0.0, 1.0, &grads, None), [5.0, 1.0]);
        assert_eq!(judge(10.0, 1.0, &grads, None), [5.0, 1.0]);
        assert_eq!(judge(2.0, 1.0, &grads, None), [5.0, 0.4]);
        assert!(judge(2.0, f64::NAN, &grads, None)[1].is_nan());
        let mut scaling = vec![4.0, 7.0];
        assert_eq!(judge(0.5, 1.0, &grads, Some(&mut scaling)), [1.25, 0.1]);
        assert_eq!(scaling, [4.0, 8.0]);
        // Whose bad luck it was does not matter: a loss that is no number leaves the scaling alone.
        assert!(judge(0.5, f64::INFINITY, &grads, Some(&mut scaling))[1].is_nan());
        assert_eq!(scaling, [4.0, 9.0]);
        assert!(judge(0.5, 1.0, &vec![f64::INFINITY], Some(&mut scaling))[1].is_nan());
        assert_eq!(scaling, [2.0, 0.0]);
        scaling[1] = 1999.0;
        assert_eq!(judge(0.0, 1.0, &grads, Some(&mut scaling)), [2.5, 0.5]);
        assert_eq!(scaling, [4.0, 0.0]);
    }
}
