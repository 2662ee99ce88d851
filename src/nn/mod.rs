//! Encoders without autograd: flat parameters, and layers as forward/backward pairs.
//!
//! An [`Encoder`] is a list of layers, each a forward and a backward made of [`Device`] verbs. Its tensors are spans
//! of one flat arena whose [`Layout`] all encoders of a model share, so an optimiser step is one pass and a checkpoint
//! one array. What forward saves for backward are fields of [`Acts`], allocated once.

mod layer;
mod network;
mod transformer;

pub use network::Network;

use crate::device::{Activation, Attention, Conv, ConvPool, Device, Pool, View, ViewMut};
use layer::{Layer, Linear, Work};
use rand::{RngExt, SeedableRng};
use std::ops::Range;
use transformer::Transformer;

/// One named tensor of the parameter arena.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// e.g. `u.0.weight`.
    pub name: String,
    /// Row-major; empty for a single number.
    pub shape: Vec<usize>,
    /// Its numbers in the arena.
    pub at: Range<usize>,
}

/// The layout of all parameters in one flat array: one optimiser pass, one checkpoint tensor each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layout {
    /// In the order of the arena, without gaps.
    pub spans: Vec<Span>,
}

impl Layout {
    /// Appends a tensor and returns where it lies.
    pub fn push(&mut self, name: &str, shape: &[usize]) -> Range<usize> {
        let start = self.len();
        // More than there are addresses is for those who allocate to refuse.
        let at = start..start.saturating_add(numbers(shape).unwrap_or(usize::MAX));
        self.spans.push(Span { name: name.to_owned(), shape: shape.to_vec(), at: at.clone() });
        at
    }
    /// Total number of parameters.
    pub fn len(&self) -> usize {
        self.spans.last().map_or(0, |s| s.at.end)
    }
    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }
}

/// Numbers of a tensor; `None` for more than there are addresses.
fn numbers(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |all, &size| all.checked_mul(size))
}

/// What a configuration file says of an encoder.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum EncoderSpec {
    // Braces: serde takes any key beside the kind of a variant without them.
    /// The data itself is the embedding (one-hot labels, prescribed embeddings).
    Identity {},
    /// `g(x) = W x (+ b)`.
    Linear {
        /// Whether to add a bias; off by default.
        #[serde(default)]
        bias: bool,
    },
    /// Hidden layers with an activation between, linear at the end; biases everywhere.
    Mlp {
        /// Widths of the hidden layers, from the input on; may be empty.
        hidden: Vec<usize>,
        /// Behind every hidden layer.
        activation: Activation,
    },
    /// LeNet-5 on 28x28 images: conv 6@5x5 (padding 2), pool 2, conv 16@5x5, pool 2, 120, 84, output; ReLU, max pooling.
    Lenet {},
    /// Convolutions on `[channels, height, width]` images, each with an activation and a pooling, then a linear layer.
    Cnn {
        /// Channels, height and width of the input.
        image: [usize; 3],
        /// The convolutions, from the input on; may be empty.
        conv: Vec<ConvSpec>,
        /// Between every convolution and its pooling.
        activation: Activation,
    },
    /// A text-style transformer on `[time, channels]` sequences, whose last token a linear layer reads: learned
    /// positions, normalisation before attention and before a GELU layer of 4 times the width, residuals around both.
    Transformer {
        /// Tokens, and numbers a token, of the input.
        sequence: [usize; 2],
        /// Numbers a token inside.
        width: usize,
        /// Of attention; they share the width out among them.
        heads: usize,
        /// Blocks; may be 0.
        depth: usize,
        /// Whether a token sees itself and those before it only; on by default.
        #[serde(default = "on")]
        causal: bool,
    },
}

impl EncoderSpec {
    /// Numbers a sample that it reads; `None` where the data tells, or for more than there are addresses.
    pub fn input_len(&self) -> Option<usize> {
        match self {
            EncoderSpec::Identity {} | EncoderSpec::Linear { .. } | EncoderSpec::Mlp { .. } => None,
            EncoderSpec::Lenet {} => numbers(&LENET),
            EncoderSpec::Cnn { image, .. } => numbers(image),
            EncoderSpec::Transformer { sequence, .. } => numbers(sequence),
        }
    }
}

/// The images that LeNet reads.
const LENET: [usize; 3] = [1, 28, 28];

/// The default of a switch that is on.
fn on() -> bool {
    true
}

/// One convolution (stride 1) and the pooling behind it.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvSpec {
    /// Channels out.
    pub channels: usize,
    /// Side of the square kernel.
    pub kernel: usize,
    /// Zeros on every side of the image; none by default.
    #[serde(default)]
    pub padding: usize,
    /// Maximum or mean.
    pub pool: Pool,
    /// Side of the pooling window; 1 pools nothing.
    pub pool_size: usize,
}

/// Most numbers of an image between layers.
const MOST_PIXELS: usize = 1 << 31;
/// Blocks of a transformer: each is named before its memory is asked for.
const MOST_BLOCKS: usize = 1 << 12;

/// Why an encoder could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NnError {
    /// Layers that do not fit each other or the data.
    #[error("encoder_{encoder}: found {found}, expected {expected}")]
    Shape {
        /// The encoder's prefix in the layout.
        encoder: String,
        /// What the specification says.
        found: String,
        /// What would fit.
        expected: String,
    },
}

/// A stack of layers from `input` numbers a sample to `output`.
#[derive(Clone, Debug)]
pub struct Encoder {
    /// Numbers a sample.
    pub input: usize,
    /// Numbers an embedding.
    pub output: usize,
    layers: Vec<Layer>,
    tensors: Vec<Tensor>,
}

/// What initialisation knows of a tensor.
#[derive(Clone, Debug)]
struct Tensor {
    /// Its place in the layout's list of spans.
    span: usize,
    at: Range<usize>,
    init: Init,
}

/// What a tensor's numbers are at first.
#[derive(Clone, Copy, Debug)]
enum Init {
    /// Uniform in +- this bound.
    Uniform(f32),
    /// All the same.
    Constant(f32),
}

impl Init {
    /// PyTorch's default, where a unit of the layer has `fan_in` inputs: uniform in +-1/sqrt(fan_in).
    fn fan_in(fan_in: usize) -> Init {
        Init::Uniform((fan_in as f32).sqrt().recip())
    }
}

/// What forward keeps for backward, and the gradients on their way down; sized once for `rows` samples.
#[derive(Debug)]
pub struct Acts<D: Device> {
    /// The embedding `[rows, output]` after forward.
    pub output: D::Buf,
    /// dL/d output `[rows, output]`, filled by the caller before backward, which leaves it as it is.
    pub d_output: D::Buf,
    /// What lies between layers: one less than there are layers.
    hidden: Vec<Hidden<D>>,
    /// One a layer.
    work: Vec<Work<D>>,
}

/// The output of a layer that is not the last, `[rows, width]` each.
#[derive(Debug)]
struct Hidden<D: Device> {
    out: D::Buf,
    /// dL/d out, which backward turns into dL/d pre in place.
    d_out: D::Buf,
    /// The input of the activation, where its derivative cannot be read from its output.
    pre: Option<D::Buf>,
}

/// The first stream of a seed's generator that initial parameters are drawn from: span i takes the i-th.
const STREAM: u64 = 1 << 40;

impl Encoder {
    /// Appends this encoder's tensors, named `prefix.0.weight` ..., to `layout`. Weights are `[outputs, inputs]` and
    /// `[outputs, inputs, kernel, kernel]`, each followed by its bias `[outputs]`. A transformer is layer 0, its tensors
    /// `prefix.0.input.weight`, `prefix.0.position`, `prefix.0.blocks.0.qkv.weight` ...; the linear layer is 1.
    ///
    /// # Errors
    /// [`NnError::Shape`] when the layers do not fit `input` or `output`.
    pub fn build(
        spec: &EncoderSpec,
        prefix: &str,
        input: usize,
        output: usize,
        layout: &mut Layout,
    ) -> Result<Self, NnError> {
        let shape = |found: String, expected: String| NnError::Shape { encoder: prefix.to_owned(), found, expected };
        if input == 0 || output == 0 {
            return Err(shape(format!("{input} inputs and {output} outputs"), "at least 1 of each".to_owned()));
        }
        let encoder = Encoder { input, output, layers: Vec::new(), tensors: Vec::new() };
        let mut builder = Builder { encoder, prefix, layout, width: input };
        match spec {
            EncoderSpec::Identity {} => {
                if input != output {
                    return Err(shape(
                        format!("{output} outputs (dim)"),
                        format!("{input}, the inputs of an identity"),
                    ));
                }
            }
            EncoderSpec::Linear { bias } => builder.linear(output, *bias, Activation::None),
            EncoderSpec::Mlp { hidden, activation } => {
                for &width in hidden {
                    if width == 0 {
                        return Err(shape("a hidden layer of width 0".to_owned(), "at least 1".to_owned()));
                    }
                    builder.linear(width, true, *activation);
                }
                builder.linear(output, true, Activation::None);
            }
            EncoderSpec::Lenet {} => {
                let conv = |channels, padding| ConvSpec { channels, kernel: 5, padding, pool: Pool::Max, pool_size: 2 };
                builder.convolutions(LENET, &[conv(6, 2), conv(16, 0)], Activation::Relu)?;
                builder.linear(120, true, Activation::Relu);
                builder.linear(84, true, Activation::Relu);
                builder.linear(output, true, Activation::None);
            }
            EncoderSpec::Cnn { image, conv, activation } => {
                builder.convolutions(*image, conv, *activation)?;
                builder.linear(output, true, Activation::None);
            }
            &EncoderSpec::Transformer { sequence, width, heads, depth, causal } => {
                builder.transformer(sequence, [width, heads, depth], causal)?;
                builder.linear(output, true, Activation::None);
            }
        }
        Ok(builder.encoder)
    }

    /// Fills this encoder's spans of the arena with PyTorch's default initial law: weights and biases uniform in
    /// +-1/sqrt(fan_in). In a transformer of depth D, gains are 1 and their biases 0, a position is as a bias of the
    /// input, and layers that add to the stream are 1/sqrt(2 D) of that law. A tensor's numbers depend on the seed and
    /// its place in the layout only.
    pub fn init(&self, seed: u64, params: &mut [f32]) {
        for tensor in &self.tensors {
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(STREAM + tensor.span as u64);
            for p in &mut params[tensor.at.clone()] {
                *p = match tensor.init {
                    Init::Uniform(bound) => bound * (2.0 * rng.random::<f32>() - 1.0),
                    Init::Constant(x) => x,
                };
            }
        }
    }

    /// Multiply-adds of a sample's forward.
    fn multiply_adds(&self) -> f64 {
        self.layers.iter().map(Layer::multiply_adds).sum()
    }

    /// Buffers for up to `rows` samples.
    pub fn acts<D: Device>(&self, device: &D, rows: usize) -> Acts<D> {
        let between = self.layers.len().saturating_sub(1);
        let hidden = |layer: &Layer| {
            let len = rows * layer.output_len();
            Hidden {
                out: device.alloc(len),
                d_out: device.alloc(len),
                pre: layer.saves_pre().then(|| device.alloc(len)),
            }
        };
        Acts {
            output: device.alloc(rows * self.output),
            d_output: device.alloc(rows * self.output),
            hidden: self.layers[..between].iter().map(hidden).collect(),
            work: self.layers.iter().map(|layer| Work::new(layer, device, rows)).collect(),
        }
    }

    /// Embeds `x` `[rows, input]` into `acts.output[..rows * output]`.
    ///
    /// # Panics
    /// When `x` is not `rows` samples, or `acts` was made for fewer.
    pub fn forward<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        x: View<'_, D::Buf>,
        rows: usize,
        acts: &mut Acts<D>,
    ) {
        assert_eq!(x.at.len(), rows * self.input, "x is not {rows} samples of {} numbers", self.input);
        if self.layers.is_empty() {
            device.copy(x, ViewMut::first(&mut acts.output, rows * self.output));
        } else {
            for (i, layer) in self.layers.iter().enumerate() {
                let (before, after) = acts.hidden.split_at_mut(i);
                let x = before.last().map_or(x.again(), |before| View::first(&before.out, rows * layer.input_len()));
                let (pre, out) = match after.first_mut() {
                    Some(hidden) => (hidden.pre.as_mut(), &mut hidden.out),
                    None => (None, &mut acts.output),
                };
                layer.forward(device, params, rows, x, pre, out, &mut acts.work[i]);
            }
        }
    }

    /// From `acts.d_output`, adds dL/dparams to `grads` (laid out as the arena). `x`, `rows` as in the forward before.
    pub fn backward<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        x: View<'_, D::Buf>,
        rows: usize,
        acts: &mut Acts<D>,
        grads: &mut D::Buf,
    ) {
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let (before, after) = acts.hidden.split_at_mut(i);
            let (x, dx) = match before.last_mut() {
                Some(before) => (View::first(&before.out, rows * layer.input_len()), Some(&mut before.d_out)),
                None => (x.again(), None),
            };
            let (saved, d_out) = match after.first_mut() {
                Some(hidden) => (hidden.pre.as_ref().unwrap_or(&hidden.out), &mut hidden.d_out),
                None => (&acts.output, &mut acts.d_output),
            };
            layer.backward(device, params, rows, x, saved, d_out, dx, grads, &mut acts.work[i]);
        }
    }
}

/// An encoder under construction.
struct Builder<'a> {
    encoder: Encoder,
    prefix: &'a str,
    layout: &'a mut Layout,
    /// Numbers a sample that the next layer reads.
    width: usize,
}

impl Builder<'_> {
    /// Appends `kind` ("weight", "bias") of the layer under construction.
    fn tensor(&mut self, kind: &str, shape: &[usize], init: Init) -> Range<usize> {
        let layer = self.encoder.layers.len();
        let span = self.layout.spans.len();
        let at = self.layout.push(&format!("{}.{layer}.{kind}", self.prefix), shape);
        self.encoder.tensors.push(Tensor { span, at: at.clone(), init });
        at
    }

    fn linear(&mut self, outputs: usize, bias: bool, activation: Activation) {
        let inputs = std::mem::replace(&mut self.width, outputs);
        let weight = self.tensor("weight", &[outputs, inputs], Init::fan_in(inputs));
        let bias = bias.then(|| self.tensor("bias", &[outputs], Init::fan_in(inputs)));
        self.encoder.layers.push(Layer::Linear(Linear { inputs, outputs, weight, bias, activation }));
    }

    fn transformer(
        &mut self,
        [time, channels]: [usize; 2],
        [width, heads, depth]: [usize; 3],
        causal: bool,
    ) -> Result<(), NnError> {
        let shape =
            |found: String, expected: String| Err(NnError::Shape { encoder: self.prefix.to_owned(), found, expected });
        if numbers(&[time, channels]) != Some(self.width) {
            return shape(format!("{} inputs", self.width), format!("{time} x {channels}, a sequence"));
        }
        if width == 0 || heads == 0 || !width.is_multiple_of(heads) {
            let found = format!("a width of {width} with {heads} heads");
            return shape(found, "at least 1 of each, and a width that the heads divide".to_owned());
        }
        if depth > MOST_BLOCKS {
            return shape(format!("a depth of {depth}"), format!("at most {MOST_BLOCKS}"));
        }
        let attention = Attention { time, heads, head: width / heads, causal };
        let transformer = Transformer::build(self, channels, attention, depth);
        self.encoder.layers.push(Layer::Transformer(transformer));
        self.width = width;
        Ok(())
    }

    fn convolutions(&mut self, image: [usize; 3], specs: &[ConvSpec], activation: Activation) -> Result<(), NnError> {
        let shape =
            |found: String, expected: String| Err(NnError::Shape { encoder: self.prefix.to_owned(), found, expected });
        let [mut channels, mut height, mut width] = image;
        if numbers(&image) != Some(self.width) {
            let found = format!("{} inputs", self.width);
            return shape(found, format!("{channels} x {height} x {width}, an image"));
        }
        for (i, &ConvSpec { channels: outputs, kernel, padding, pool, pool_size: size }) in specs.iter().enumerate() {
            if outputs == 0 || kernel == 0 || size == 0 {
                let found = format!("conv {i} of {outputs} channels, kernel {kernel} and pool_size {size}");
                return shape(found, "at least 1 of each".to_owned());
            }
            let padded = |side: usize| padding.checked_mul(2).and_then(|both| both.checked_add(side));
            let pixels = padded(height).zip(padded(width)).and_then(|(h, w)| h.checked_mul(w));
            if pixels.and_then(|pixels| pixels.checked_mul(outputs.max(channels))).is_none_or(|all| all > MOST_PIXELS) {
                let found = format!("conv {i} of {outputs} channels and padding {padding}");
                return shape(found, format!("images of at most {MOST_PIXELS} numbers"));
            }
            if height.min(width) + 2 * padding < kernel {
                let found = format!("conv {i} of kernel {kernel}");
                return shape(found, format!("at most its image, {height} x {width} with padding {padding}"));
            }
            let conv = Conv { inputs: channels, height, width, outputs, kernel, padding };
            (channels, height, width) = (outputs, conv.out_height(), conv.out_width());
            if height.min(width) < size {
                let found = format!("conv {i} with pool_size {size}");
                return shape(found, format!("at most its image, {height} x {width}"));
            }
            let weight = self.tensor("weight", &[outputs, conv.inputs, kernel, kernel], Init::fan_in(conv.patch()));
            let bias = self.tensor("bias", &[outputs], Init::fan_in(conv.patch()));
            let conv = ConvPool { conv, activation, pool, size };
            (height, width) = (conv.pooling().out_height(), conv.pooling().out_width());
            self.encoder.layers.push(Layer::Conv { conv, params: weight.start..bias.end });
        }
        self.width = channels * height * width;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mlp(hidden: &[usize]) -> EncoderSpec {
        EncoderSpec::Mlp { hidden: hidden.to_vec(), activation: Activation::Gelu }
    }

    #[test]
    fn lenet_has_the_tensors_of_the_paper() {
        let mut layout = Layout::default();
        Encoder::build(&EncoderSpec::Lenet {}, "u", 784, 10, &mut layout).unwrap();
        let spans: Vec<_> = layout.spans.iter().map(|s| (s.name.as_str(), s.shape.as_slice())).collect();
        let want: [(&str, &[usize]); 10] = [
            ("u.0.weight", &[6, 1, 5, 5]),
            ("u.0.bias", &[6]),
            ("u.1.weight", &[16, 6, 5, 5]),
            ("u.1.bias", &[16]),
            ("u.2.weight", &[120, 400]),
            ("u.2.bias", &[120]),
            ("u.3.weight", &[84, 120]),
            ("u.3.bias", &[84]),
            ("u.4.weight", &[10, 84]),
            ("u.4.bias", &[10]),
        ];
        assert_eq!(spans, want);
        assert_eq!(layout.len(), 61_706);
    }

    // Names and shapes are the format of saved models. Gains are 1, their biases 0, and of the law's bound a layer that
    // adds to the stream of two blocks takes half.
    #[test]
    fn a_transformer_has_its_tensors_and_initial_law() {
        let spec = EncoderSpec::Transformer { sequence: [50, 2], width: 12, heads: 3, depth: 2, causal: true };
        let mut layout = Layout::default();
        let encoder = Encoder::build(&spec, "v", 100, 7, &mut layout).unwrap();
        let mut params = vec![9.0; layout.len()];
        encoder.init(1, &mut params);
        let mut want: Vec<(String, Vec<usize>, f32)> =
            vec![("0.input.weight".into(), vec![12, 2], 2.0), ("0.position".into(), vec![50, 12], 2.0)];
        for b in 0..2 {
            for (name, shape, fan_in) in [
                ("norm_1.gain", &[12][..], 0.0),
                ("norm_1.bias", &[12], 0.0),
                ("qkv.weight", &[36, 12], 12.0),
                ("qkv.bias", &[36], 12.0),
                ("mix.weight", &[12, 12], 48.0),
                ("mix.bias", &[12], 48.0),
                ("norm_2.gain", &[12], 0.0),
                ("norm_2.bias", &[12], 0.0),
                ("up.weight", &[48, 12], 12.0),
                ("up.bias", &[48], 12.0),
                ("down.weight", &[12, 48], 192.0),
                ("down.bias", &[12], 192.0),
            ] {
                want.push((format!("0.blocks.{b}.{name}"), shape.to_vec(), fan_in));
            }
        }
        want.extend([("0.norm.gain".into(), vec![12], 0.0), ("0.norm.bias".into(), vec![12], 0.0)]);
        want.extend([("1.weight".into(), vec![7, 12], 12.0), ("1.bias".into(), vec![7], 12.0)]);
        assert_eq!(layout.spans.len(), want.len());
        for (span, (name, shape, fan_in)) in layout.spans.iter().zip(&want) {
            assert_eq!((&span.name, &span.shape), (&format!("v.{name}"), shape));
            let part = &params[span.at.clone()];
            if *fan_in == 0.0 {
                let constant = if name.ends_with("gain") { 1.0 } else { 0.0 };
                assert!(part.iter().all(|&p| p == constant), "{name}");
            } else {
                let largest = part.iter().fold(0.0f32, |a, p| a.max(p.abs())) * fan_in.sqrt();
                assert!((0.6..=1.0).contains(&largest), "{name}: largest {largest}");
            }
        }
    }

    // Uniform in +-1/sqrt(fan_in): the bound is reached but not passed, the mean is near 0, and a tensor's numbers are
    // its own: no two tensors share them, and building another encoder behind changes none.
    #[test]
    fn initial_parameters_are_uniform_and_belong_to_their_place() {
        let mut layout = Layout::default();
        let u = Encoder::build(&mlp(&[200]), "u", 100, 100, &mut layout).unwrap();
        let mut alone = vec![9.0; layout.len()];
        u.init(1, &mut alone);
        let v = Encoder::build(&mlp(&[200]), "v", 100, 100, &mut layout).unwrap();
        let mut params = vec![9.0; layout.len()];
        v.init(1, &mut params);
        assert!(params[..alone.len()].iter().all(|&p| p == 9.0));
        u.init(1, &mut params);
        assert_eq!(params[..alone.len()], alone);
        assert_ne!(params[alone.len()..], alone);
        for (span, fan_in) in layout.spans.iter().zip([100.0f32, 100.0, 200.0, 200.0].repeat(2)) {
            let part = &params[span.at.clone()];
            let largest = part.iter().fold(0.0f32, |a, p| a.max(p.abs())) * fan_in.sqrt();
            let mean = part.iter().sum::<f32>() / part.len() as f32 * fan_in.sqrt();
            assert!((0.9..=1.0).contains(&largest), "{}: largest {largest}", span.name);
            // Three standard deviations, 1/sqrt(3) each over the root of the count.
            assert!(mean.abs() < 3.0 / (3.0 * part.len() as f32).sqrt(), "{}: mean {mean}", span.name);
        }
        let mut other = vec![0.0; layout.len()];
        u.init(2, &mut other);
        assert_ne!(other[..alone.len()], alone);
    }

    #[test]
    fn layers_that_do_not_fit_are_errors() {
        let conv =
            |channels, kernel, padding, pool_size| ConvSpec { channels, kernel, padding, pool: Pool::Max, pool_size };
        let cnn = |image, conv| EncoderSpec::Cnn { image, conv, activation: Activation::Relu };
        let transformer =
            |sequence, width, heads| EncoderSpec::Transformer { sequence, width, heads, depth: 1, causal: true };
        for (spec, input, output, part) in [
            (EncoderSpec::Identity {}, 3, 4, "4 outputs"),
            (EncoderSpec::Linear { bias: true }, 0, 4, "0 inputs"),
            (EncoderSpec::Linear { bias: true }, 4, 0, "0 outputs"),
            (mlp(&[3, 0]), 3, 4, "width 0"),
            (EncoderSpec::Lenet {}, 783, 10, "783 inputs"),
            (cnn([2, 4, 4], vec![]), 31, 1, "31 inputs"),
            (cnn([2, usize::MAX, 4], vec![]), 31, 1, "31 inputs"),
            (cnn([2, 4, 4], vec![conv(0, 3, 0, 1)]), 32, 1, "0 channels"),
            (cnn([2, 4, 4], vec![conv(1, 0, 0, 1)]), 32, 1, "kernel 0"),
            (cnn([2, 4, 4], vec![conv(1, 3, 0, 0)]), 32, 1, "pool_size 0"),
            (cnn([2, 4, 4], vec![conv(1, 5, 0, 1)]), 32, 1, "kernel 5"),
            (cnn([2, 4, 4], vec![conv(1, 3, 0, 2), conv(1, 2, 0, 1)]), 32, 1, "kernel 2"),
            (cnn([2, 4, 4], vec![conv(1, 3, 0, 3)]), 32, 1, "pool_size 3"),
            (cnn([2, 4, 4], vec![conv(1, 3, usize::MAX / 2, 1)]), 32, 1, "padding 9223372036854775807"),
            (cnn([2, 4, 4], vec![conv(1, 3, 1 << 40, 1)]), 32, 1, "padding 1099511627776"),
            (transformer([5, 2], 6, 2), 11, 1, "11 inputs"),
            (transformer([usize::MAX, 2], 6, 2), 10, 1, "10 inputs"),
            (transformer([5, 2], 0, 2), 10, 1, "width of 0"),
            (transformer([5, 2], 6, 0), 10, 1, "0 heads"),
            (transformer([5, 2], 6, 4), 10, 1, "4 heads"),
        ] {
            let error = Encoder::build(&spec, "u", input, output, &mut Layout::default()).unwrap_err().to_string();
            assert!(error.starts_with("encoder_u: found ") && error.contains(part), "{error}");
        }
    }

    // Twice a multiply-add forward and twice that backward; a causal query sees half of the keys, and itself.
    #[test]
    fn operations_of_a_step_are_counted() {
        let linear = EncoderSpec::Linear { bias: true };
        let transformer = |causal| EncoderSpec::Transformer { sequence: [5, 2], width: 4, heads: 2, depth: 3, causal };
        let flops = |v: &EncoderSpec| Network::build([&linear, v], [7, 10], 3).unwrap().step_flops(11);
        let step = |v: f64| 6.0 * 11.0 * (7.0 * 3.0 + v) + 8.0 * 11.0 * 11.0 * 3.0;
        assert_eq!(flops(&linear), step(10.0 * 3.0));
        for (causal, seen) in [(true, 3.0), (false, 5.0)] {
            let block = 12.0 * 4.0 * 4.0 + 2.0 * seen * 4.0;
            assert_eq!(flops(&transformer(causal)), step(5.0 * (2.0 * 4.0 + 3.0 * block) + 4.0 * 3.0));
        }
    }

    #[test]
    fn a_kernel_may_be_as_large_as_its_padded_image() {
        let build = |kernel| {
            let conv = ConvSpec { channels: 2, kernel, padding: 1, pool: Pool::Max, pool_size: 1 };
            let spec = EncoderSpec::Cnn { image: [1, 3, 4], conv: vec![conv], activation: Activation::Relu };
            Encoder::build(&spec, "u", 12, 2, &mut Layout::default())
        };
        assert!(build(5).is_ok());
        assert!(build(6).unwrap_err().to_string().contains("kernel 6"));
    }
}
