//! Encoders without autograd: flat parameters, and layers as forward/backward pairs.

use crate::device::{Activation, Device, Pool, View, ViewMut};
use std::ops::Range;

/// One named tensor of the parameter arena.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// e.g. `u.0.weight`.
    pub name: String,
    pub shape: Vec<usize>,
    pub at: Range<usize>,
}

/// The layout of all parameters in one flat array: one optimiser pass, one checkpoint tensor each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layout {
    pub spans: Vec<Span>,
}

impl Layout {
    /// Appends a tensor and returns where it lies.
    pub fn push(&mut self, name: &str, shape: &[usize]) -> Range<usize> {
        let start = self.len();
        let at = start..start + shape.iter().product::<usize>();
        self.spans.push(Span { name: name.to_owned(), shape: shape.to_vec(), at: at.clone() });
        at
    }
    /// Total number of parameters.
    pub fn len(&self) -> usize {
        self.spans.last().map_or(0, |s| s.at.end)
    }
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }
}

/// What a configuration file says of an encoder.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum EncoderSpec {
    /// The data itself is the embedding (one-hot labels, prescribed embeddings).
    Identity,
    /// `g(x) = W x (+ b)`.
    Linear {
        #[serde(default)]
        bias: bool,
    },
    /// Hidden layers with an activation between, linear at the end; biases everywhere.
    Mlp { hidden: Vec<usize>, activation: Activation },
    /// LeNet-5 on 28x28 images: conv 6@5x5 (padding 2), pool 2, conv 16@5x5, pool 2, 120, 84, output; ReLU, max pooling.
    Lenet,
    /// Convolutions on `[channels, height, width]` images, each with an activation and a pooling, then a linear layer.
    Cnn { image: [usize; 3], conv: Vec<ConvSpec>, activation: Activation },
}

/// One convolution (stride 1) and the pooling behind it.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvSpec {
    pub channels: usize,
    pub kernel: usize,
    #[serde(default)]
    pub padding: usize,
    pub pool: Pool,
    pub pool_size: usize,
}

/// Why an encoder could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NnError {
    #[error("encoder {encoder}: found {found}, expected {expected}")]
    Shape { encoder: String, found: String, expected: String },
}

/// A stack of layers from `input` numbers a sample to `output`.
#[derive(Clone, Debug)]
pub struct Encoder {
    pub input: usize,
    pub output: usize,
}

/// What forward keeps for backward, and the gradients on their way down; sized once for `rows` samples.
#[derive(Debug)]
pub struct Acts<D: Device> {
    /// The embedding `[rows, output]` after forward.
    pub output: D::Buf,
    /// dL/d output `[rows, output]`, filled by the caller before backward.
    pub d_output: D::Buf,
}

impl Encoder {
    /// Appends this encoder's tensors, named `prefix.0.weight` ..., to `layout`.
    ///
    /// # Errors
    /// [`NnError::Shape`] when the layers do not fit `input` or `output`.
    pub fn build(
        _spec: &EncoderSpec,
        _prefix: &str,
        _input: usize,
        _output: usize,
        _layout: &mut Layout,
    ) -> Result<Self, NnError> {
        todo!()
    }
    /// Fills this encoder's spans of the arena with PyTorch's default initial law (uniform in +-1/sqrt(fan_in)).
    pub fn init(&self, _seed: u64, _params: &mut [f32]) {
        todo!()
    }
    /// Buffers for up to `rows` samples.
    pub fn acts<D: Device>(&self, _device: &D, _rows: usize) -> Acts<D> {
        todo!()
    }
    /// Embeds `x` `[rows, input]` into `acts.output[..rows * output]`.
    pub fn forward<D: Device>(
        &self,
        _device: &D,
        _params: &D::Buf,
        _x: View<'_, D::Buf>,
        _rows: usize,
        _acts: &mut Acts<D>,
    ) {
        todo!()
    }
    /// From `acts.d_output`, adds dL/dparams to `grads` (laid out as the arena). `x`, `rows` as in the forward before.
    pub fn backward<D: Device>(
        &self,
        _device: &D,
        _params: &D::Buf,
        _x: View<'_, D::Buf>,
        _rows: usize,
        _acts: &mut Acts<D>,
        _grads: &mut D::Buf,
    ) {
        todo!()
    }
}

#[allow(unused)]
fn placeholder<D: Device>(_: ViewMut<'_, D::Buf>) {}
