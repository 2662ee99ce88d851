//! The layers, each a forward and a backward made of device verbs.

use super::transformer::{self, Transformer};
use crate::device::{Activation, ConvPool, Device, Gemm, View, ViewMut};
use crate::objective::Write;
use std::ops::Range;

/// A layer; `weight` and `bias` say where its tensors lie in the arena.
#[derive(Clone, Debug)]
pub(super) enum Layer {
    Linear(Linear),
    /// A convolution with its bias, activation and pooling; weight and bias lie side by side.
    Conv {
        conv: ConvPool,
        params: Range<usize>,
    },
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

/// What a layer needs besides its input and output, some of it kept from forward to backward.
#[derive(Debug)]
pub(super) enum Work<D: Device> {
    Linear,
    Conv([D::Buf; 4]),
    Transformer(transformer::Acts<D>),
}

impl<D: Device> Work<D> {
    /// For up to `rows` samples.
    pub(super) fn new(layer: &Layer, device: &D, rows: usize) -> Self {
        match layer {
            Layer::Linear(_) => Work::Linear,
            Layer::Conv { conv, .. } => Work::Conv(device.conv_pool_work(conv, rows).map(|len| device.alloc(len))),
            Layer::Transformer(transformer) => Work::Transformer(transformer.acts(device, rows)),
        }
    }
}

impl Linear {
    /// Multiply-adds of a row's forward.
    pub(super) fn multiply_adds(&self) -> f64 {
        self.inputs as f64 * self.outputs as f64
    }

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
        let view = |at: &Range<usize>| View { buf: params, at: at.clone() };
        device.dense(
            [rows, self.inputs, self.outputs],
            self.activation,
            x,
            view(&self.weight),
            self.bias.as_ref().map(view),
            pre.map(|pre| ViewMut::first(pre, len)),
            ViewMut::first(out, len),
        );
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
        let shape = Gemm { m: rows, n: self.outputs, k: self.inputs, transpose_a: false, transpose_b: true };
        let weight = View { buf: params, at: self.weight.clone() };
        device.gemm(shape, x, weight, Write::Add(ViewMut::first(out, len)));
        if let Some(at) = self.bias.clone() {
            let bias = Some(View { buf: params, at });
            device.bias_activation([rows, self.outputs, 1], Activation::None, bias, ViewMut::first(out, len), None);
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
            device.bias_activation_backward(
                shape,
                activation,
                View::first(saved, len),
                ViewMut::first(d_out, len),
                d_bias,
            );
        }
        let d_out = View::first(d_out, len);
        let d_weight = Write::Add(ViewMut { buf: grads, at: self.weight.clone() });
        let shape = Gemm { m: outputs, n: inputs, k: rows, transpose_a: true, transpose_b: false };
        device.gemm(shape, d_out.again(), x, d_weight);
        if let Some(dx) = dx {
            let shape = Gemm { m: rows, n: inputs, k: outputs, transpose_a: false, transpose_b: false };
            let weight = View { buf: params, at: self.weight.clone() };
            device.gemm(shape, d_out, weight, Write::Set(ViewMut::first(dx, rows * inputs)));
        }
    }
}

impl Layer {
    /// Numbers a sample that forward reads.
    pub(super) fn input_len(&self) -> usize {
        match self {
            Layer::Linear(linear) => linear.inputs,
            Layer::Conv { conv, .. } => conv.conv.input_len(),
            Layer::Transformer(transformer) => transformer.input_len(),
        }
    }

    /// Numbers a sample that forward writes.
    pub(super) fn output_len(&self) -> usize {
        match self {
            Layer::Linear(linear) => linear.outputs,
            Layer::Conv { conv, .. } => conv.pooling().output_len(),
            Layer::Transformer(transformer) => transformer.output_len(),
        }
    }

    /// Multiply-adds of a sample's forward.
    pub(super) fn multiply_adds(&self) -> f64 {
        match self {
            Layer::Linear(linear) => linear.multiply_adds(),
            Layer::Conv { conv, .. } => conv.conv.output_len() as f64 * conv.conv.patch() as f64,
            Layer::Transformer(transformer) => transformer.multiply_adds(),
        }
    }

    /// Whether backward needs the input of the activation.
    pub(super) fn saves_pre(&self) -> bool {
        matches!(self, Layer::Linear(Linear { activation: Activation::Gelu, .. }))
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
        match (self, work) {
            (Layer::Linear(linear), Work::Linear) => linear.forward(device, params, rows, x, pre, out),
            (Layer::Conv { conv, params: at }, Work::Conv(work)) => {
                let params = View { buf: params, at: at.clone() };
                device.conv_pool(conv, rows, x, params, ViewMut::first(out, len), work);
            }
            (Layer::Transformer(transformer), Work::Transformer(acts)) => {
                transformer.forward(device, params, rows, x, out, acts);
            }
            _ => unreachable!("work of another layer"),
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
        match (self, work) {
            (Layer::Linear(linear), Work::Linear) => {
                linear.backward(device, params, rows, x, saved, d_out, dx, grads);
            }
            (Layer::Conv { conv, params: at }, Work::Conv(work)) => {
                let params = View { buf: params, at: at.clone() };
                let (dx, d_params) = (dx.map(|dx| ViewMut::first(dx, input)), ViewMut { buf: grads, at: at.clone() });
                device.conv_pool_backward(conv, rows, x, params, View::first(d_out, len), dx, d_params, work);
            }
            (Layer::Transformer(transformer), Work::Transformer(acts)) => {
                transformer.backward(device, params, rows, x, View::first(d_out, len), grads, acts);
            }
            _ => unreachable!("work of another layer"),
        }
    }
}
