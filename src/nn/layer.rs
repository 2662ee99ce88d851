//! The layers, each a forward and a backward made of device verbs.

use super::transformer::{self, Transformer};
use super::{part, part_mut};
use crate::device::{Activation, Conv, Device, Gemm, Pooling, View, ViewMut};
use crate::objective::Write;
use std::ops::Range;

/// A layer; `weight` and `bias` say where its tensors lie in the arena.
#[derive(Clone, Debug)]
pub(super) enum Layer {
    Linear(Linear),
    /// `activation(x * W + b)`, shapes in [`Conv`].
    Conv {
        conv: Conv,
        weight: Range<usize>,
        bias: Range<usize>,
        activation: Activation,
    },
    Pool(Pooling),
    /// Always the first layer, so that nobody asks for its `dx`.
    Transformer(Transformer),
}

/// `activation(x W' + b)`, `x` `[rows, inputs]`, `W` `[outputs, inputs]`, `b` `[outputs]`.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    pub inputs: usize,
    pub outputs: usize,
    pub weight: Range<usize>,
    pub bias: Option<Range<usize>>,
    pub activation: Activation,
}

/// What layers need besides their inputs and outputs.
#[derive(Debug)]
pub(super) struct Work<D: Device> {
    /// For convolutions.
    scratch: D::Buf,
    /// Of the transformer, if there is one.
    transformer: Option<transformer::Acts<D>>,
}

impl<D: Device> Work<D> {
    /// For up to `rows` samples.
    pub(super) fn new(layers: &[Layer], device: &D, rows: usize) -> Self {
        let scratch = |layer: &Layer| match layer {
            Layer::Conv { conv, .. } => device.conv_scratch(conv, rows),
            Layer::Linear(_) | Layer::Pool(_) | Layer::Transformer(_) => 0,
        };
        Work {
            scratch: device.alloc(layers.iter().map(scratch).max().unwrap_or(0)),
            transformer: match layers.first() {
                Some(Layer::Transformer(transformer)) => Some(transformer.acts(device, rows)),
                _ => None,
            },
        }
    }

    fn transformer(&mut self) -> &mut transformer::Acts<D> {
        self.transformer.as_mut().expect("made for layers of which the first is a transformer")
    }
}

impl Linear {
    /// `out = layer(x)`; with `pre`, the activation's input stays there.
    pub(super) fn forward<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        rows: usize,
        x: View<'_, D::Buf>,
        pre: Option<&mut D::Buf>,
        out: &mut D::Buf,
    ) {
        let len = rows * self.outputs;
        let (pre, out) = match pre {
            Some(pre) => (pre, Some(part_mut(out, len))),
            None => (out, None),
        };
        self.product(device, params, rows, x, Write::Set(part_mut(pre, len)));
        self.bias_activation(device, params, rows, part_mut(pre, len), out);
    }

    /// `out += x W' + b`: a layer without activation on a residual stream.
    pub(super) fn forward_add<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        rows: usize,
        x: View<'_, D::Buf>,
        out: &mut D::Buf,
    ) {
        let len = rows * self.outputs;
        self.product(device, params, rows, x, Write::Add(part_mut(out, len)));
        self.bias_activation(device, params, rows, part_mut(out, len), None);
    }

    /// `out = x W'`.
    fn product<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        rows: usize,
        x: View<'_, D::Buf>,
        out: Write<ViewMut<'_, D::Buf>>,
    ) {
        let shape = Gemm { m: rows, n: self.outputs, k: self.inputs, transpose_a: false, transpose_b: true };
        device.gemm(shape, x, View { buf: params, at: self.weight.clone() }, out);
    }

    fn bias_activation<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        rows: usize,
        pre: ViewMut<'_, D::Buf>,
        out: Option<ViewMut<'_, D::Buf>>,
    ) {
        if self.bias.is_some() || self.activation != Activation::None {
            let bias = self.bias.clone().map(|at| View { buf: params, at });
            device.bias_activation([rows, self.outputs, 1], self.activation, bias, pre, out);
        }
    }

    /// From `d_out`, which it spends, adds to `grads` and overwrites `dx`. `saved` is what the bias was added to.
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
    ) {
        let &Linear { inputs, outputs, activation, .. } = self;
        let len = rows * outputs;
        if self.bias.is_some() || activation != Activation::None {
            let d_bias = self.bias.clone().map(|at| Write::Add(ViewMut { buf: &mut *grads, at }));
            let shape = [rows, outputs, 1];
            device.bias_activation_backward(shape, activation, part(saved, len), part_mut(d_out, len), d_bias);
        }
        let d_out = part(d_out, len);
        let d_weight = Write::Add(ViewMut { buf: grads, at: self.weight.clone() });
        let shape = Gemm { m: outputs, n: inputs, k: rows, transpose_a: true, transpose_b: false };
        device.gemm(shape, d_out.again(), x, d_weight);
        if let Some(dx) = dx {
            let shape = Gemm { m: rows, n: inputs, k: outputs, transpose_a: false, transpose_b: false };
            let weight = View { buf: params, at: self.weight.clone() };
            device.gemm(shape, d_out, weight, Write::Set(part_mut(dx, rows * inputs)));
        }
    }
}

impl Layer {
    /// Numbers a sample that forward reads.
    pub(super) fn input_len(&self) -> usize {
        match self {
            Layer::Linear(linear) => linear.inputs,
            Layer::Conv { conv, .. } => conv.input_len(),
            Layer::Pool(pooling) => pooling.input_len(),
            Layer::Transformer(transformer) => transformer.input_len(),
        }
    }

    /// Numbers a sample that forward writes.
    pub(super) fn output_len(&self) -> usize {
        match self {
            Layer::Linear(linear) => linear.outputs,
            Layer::Conv { conv, .. } => conv.output_len(),
            Layer::Pool(pooling) => pooling.output_len(),
            Layer::Transformer(transformer) => transformer.output_len(),
        }
    }

    /// Whether backward needs the input of the activation.
    pub(super) fn saves_pre(&self) -> bool {
        match self {
            Layer::Linear(Linear { activation, .. }) | Layer::Conv { activation, .. } => {
                *activation == Activation::Gelu
            }
            Layer::Pool(_) | Layer::Transformer(_) => false,
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
        work: &mut Work<D>,
    ) {
        let len = rows * self.output_len();
        match self {
            Layer::Linear(linear) => linear.forward(device, params, rows, x, pre, out),
            Layer::Conv { conv, weight, bias, activation } => {
                let (pre, out) = match pre {
                    Some(pre) => (pre, Some(part_mut(out, len))),
                    None => (out, None),
                };
                let view = |at: &Range<usize>| View { buf: params, at: at.clone() };
                device.conv(conv, rows, x, view(weight), part_mut(pre, len), &mut work.scratch);
                let shape = [rows, conv.outputs, conv.out_height() * conv.out_width()];
                device.bias_activation(shape, *activation, Some(view(bias)), part_mut(pre, len), out);
            }
            Layer::Pool(pooling) => device.pool(pooling, rows, x, part_mut(out, len)),
            Layer::Transformer(transformer) => transformer.forward(device, params, rows, x, out, work.transformer()),
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
        work: &mut Work<D>,
    ) {
        let (len, input) = (rows * self.output_len(), rows * self.input_len());
        match self {
            Layer::Linear(linear) => linear.backward(device, params, rows, x, saved, d_out, dx, grads),
            Layer::Conv { conv, weight, bias, activation } => {
                let shape = [rows, conv.outputs, conv.out_height() * conv.out_width()];
                let d_bias = Write::Add(ViewMut { buf: &mut *grads, at: bias.clone() });
                let saved = part(saved, len);
                device.bias_activation_backward(shape, *activation, saved, part_mut(d_out, len), Some(d_bias));
                let d_out = part(d_out, len);
                let d_weight = Write::Add(ViewMut { buf: grads, at: weight.clone() });
                device.conv_backward_weight(conv, rows, x, d_out.again(), d_weight, &mut work.scratch);
                if let Some(dx) = dx {
                    let weight = View { buf: params, at: weight.clone() };
                    device.conv_backward_data(conv, rows, weight, d_out, part_mut(dx, input), &mut work.scratch);
                }
            }
            Layer::Pool(pooling) => {
                if let Some(dx) = dx {
                    device.pool_backward(pooling, rows, x, part(d_out, len), part_mut(dx, input));
                }
            }
            Layer::Transformer(transformer) => {
                transformer.backward(device, params, rows, x, part(d_out, len), grads, work.transformer());
            }
        }
    }
}
