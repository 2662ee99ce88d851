//! The layers, each a forward and a backward made of device verbs.

use super::{part, part_mut};
use crate::device::{Activation, Conv, Device, Gemm, Pooling, View, ViewMut};
use crate::objective::Write;
use std::ops::Range;

/// A layer; `weight` and `bias` say where its tensors lie in the arena.
#[derive(Clone, Debug)]
pub(super) enum Layer {
    /// `activation(x W' + b)`, `x` `[rows, inputs]`, `W` `[outputs, inputs]`, `b` `[outputs]`.
    Linear {
        inputs: usize,
        outputs: usize,
        weight: Range<usize>,
        bias: Option<Range<usize>>,
        activation: Activation,
    },
    /// `activation(x * W + b)`, shapes in [`Conv`].
    Conv {
        conv: Conv,
        weight: Range<usize>,
        bias: Range<usize>,
        activation: Activation,
    },
    Pool(Pooling),
}

impl Layer {
    /// Numbers a sample that forward reads.
    pub(super) fn input_len(&self) -> usize {
        match self {
            Layer::Linear { inputs, .. } => *inputs,
            Layer::Conv { conv, .. } => conv.input_len(),
            Layer::Pool(pooling) => pooling.input_len(),
        }
    }

    /// Numbers a sample that forward writes.
    pub(super) fn output_len(&self) -> usize {
        match self {
            Layer::Linear { outputs, .. } => *outputs,
            Layer::Conv { conv, .. } => conv.output_len(),
            Layer::Pool(pooling) => pooling.output_len(),
        }
    }

    /// Whether backward needs the input of the activation.
    pub(super) fn saves_pre(&self) -> bool {
        match self {
            Layer::Linear { activation, .. } | Layer::Conv { activation, .. } => *activation == Activation::Gelu,
            Layer::Pool(_) => false,
        }
    }

    /// Numbers of scratch for `rows` samples.
    pub(super) fn scratch<D: Device>(&self, device: &D, rows: usize) -> usize {
        match self {
            Layer::Conv { conv, .. } => device.conv_scratch(conv, rows),
            Layer::Linear { .. } | Layer::Pool(_) => 0,
        }
    }

    /// The activation and the `[rows, channels, pixels]` it works on, with the bias; `None` where neither does anything.
    fn activation(&self, rows: usize) -> Option<([usize; 3], Activation)> {
        match self {
            Layer::Linear { bias: None, activation: Activation::None, .. } | Layer::Pool(_) => None,
            Layer::Linear { outputs, activation, .. } => Some(([rows, *outputs, 1], *activation)),
            Layer::Conv { conv, activation, .. } => {
                Some(([rows, conv.outputs, conv.out_height() * conv.out_width()], *activation))
            }
        }
    }

    fn bias(&self) -> Option<Range<usize>> {
        match self {
            Layer::Linear { bias, .. } => bias.clone(),
            Layer::Conv { bias, .. } => Some(bias.clone()),
            Layer::Pool(_) => None,
        }
    }

    /// `out = layer(x)`; where [`Self::saves_pre`], the activation's input stays in `pre`.
    #[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
    pub(super) fn forward<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        rows: usize,
        x: View<'_, D::Buf>,
        pre: Option<&mut D::Buf>,
        out: &mut D::Buf,
        scratch: &mut D::Buf,
    ) {
        let len = rows * self.output_len();
        let (pre, out) = match pre {
            Some(pre) => (pre, Some(part_mut(out, len))),
            None => (out, None),
        };
        match self {
            &Layer::Linear { inputs, outputs, ref weight, .. } => {
                let shape = Gemm { m: rows, n: outputs, k: inputs, transpose_a: false, transpose_b: true };
                device.gemm(shape, x, View { buf: params, at: weight.clone() }, Write::Set(part_mut(pre, len)));
            }
            Layer::Conv { conv, weight, .. } => {
                let weight = View { buf: params, at: weight.clone() };
                device.conv(conv, rows, x, weight, part_mut(pre, len), scratch);
            }
            Layer::Pool(pooling) => device.pool(pooling, rows, x, part_mut(pre, len)),
        }
        if let Some((shape, activation)) = self.activation(rows) {
            let bias = self.bias().map(|at| View { buf: params, at });
            device.bias_activation(shape, activation, bias, part_mut(pre, len), out);
        }
    }

    /// From `d_out`, which it spends, adds to `grads` and overwrites `dx`. `saved` is `pre` or, without one, `out`.
    #[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
    pub(super) fn backward<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        rows: usize,
        x: View<'_, D::Buf>,
        saved: &D::Buf,
        d_out: &mut D::Buf,
        dx: Option<&mut D::Buf>,
        grads: &mut D::Buf,
        scratch: &mut D::Buf,
    ) {
        let len = rows * self.output_len();
        if let Some((shape, activation)) = self.activation(rows) {
            let d_bias = self.bias().map(|at| Write::Add(ViewMut { buf: &mut *grads, at }));
            device.bias_activation_backward(shape, activation, part(saved, len), part_mut(d_out, len), d_bias);
        }
        let d_out = part(d_out, len);
        let dx = dx.map(|dx| part_mut(dx, rows * self.input_len()));
        match self {
            &Layer::Linear { inputs, outputs, ref weight, .. } => {
                let d_weight = Write::Add(ViewMut { buf: grads, at: weight.clone() });
                let shape = Gemm { m: outputs, n: inputs, k: rows, transpose_a: true, transpose_b: false };
                device.gemm(shape, d_out.again(), x, d_weight);
                if let Some(dx) = dx {
                    let shape = Gemm { m: rows, n: inputs, k: outputs, transpose_a: false, transpose_b: false };
                    device.gemm(shape, d_out, View { buf: params, at: weight.clone() }, Write::Set(dx));
                }
            }
            Layer::Conv { conv, weight, .. } => {
                let d_weight = Write::Add(ViewMut { buf: grads, at: weight.clone() });
                device.conv_backward_weight(conv, rows, x, d_out.again(), d_weight, scratch);
                if let Some(dx) = dx {
                    let weight = View { buf: params, at: weight.clone() };
                    device.conv_backward_data(conv, rows, weight, d_out, dx, scratch);
                }
            }
            Layer::Pool(pooling) => {
                if let Some(dx) = dx {
                    device.pool_backward(pooling, rows, x, d_out, dx);
                }
            }
        }
    }
}
