//! Machines: the verbs that encoders, losses and optimisers are made of, and the engines behind them.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use crate::objective::{Batch, Gradients, Loss, LossError, Precision, Value, Write};
use std::ops::Range;

/// An engine that evaluates losses on embeddings in host memory.
pub trait Engine {
    /// Evaluates `loss` on `batch`, writing the gradients asked for. The scalar gradients of [`Value`] always come with
    /// it, so that a value alone costs the two passes that all gradients cost, less their products.
    ///
    /// # Errors
    /// [`LossError`] when a shape, a parameter or a value is out of its domain; nothing is written then.
    fn loss(&mut self, loss: &Loss, batch: &Batch<'_>, gradients: Gradients<'_>) -> Result<Value, LossError>;

    /// Bytes of scratch the engine holds now, beyond inputs and outputs: its peak, as it only grows.
    fn scratch_bytes(&self) -> usize;
}

/// `read(first, rows, offsets)` gives items `[_, dim]` from `first` on, and what is added to their scores.
pub type ReadItems<'a> = dyn FnMut(usize, &mut [f32], &mut [f32]) + 'a;

/// Exact search on a device: items are held, queries come. A score is `<query, item>` plus the item's offset, -inf where that
/// is no number: one sum in an order that depends on the dimension alone, so that equal items tie wherever they are. Of equal
/// scores the lowest index is the best.
pub trait Search {
    /// Roundings of a score of `dim` products, each of at most [`f32::EPSILON`] of the two norms.
    fn terms(&self, dim: usize) -> usize;

    /// Takes `count` > 0 items of `dim` numbers in place of those held.
    ///
    /// # Errors
    /// The device's own.
    fn hold(&mut self, count: usize, dim: usize, read: &mut ReadItems<'_>) -> Result<(), DeviceError>;

    /// For each of `queries` `[_, dim]`, at least one, the score and index of the `keep` best items, in no order;
    /// `keep` is at least one and at most as many as are held.
    ///
    /// # Errors
    /// The device's own.
    fn nearest(&mut self, queries: &[f32], keep: usize) -> Result<Vec<(f32, u32)>, DeviceError>;

    /// For each of `queries` `[_, dim]`, at least one, how many items are better than item `first + i`, which is held.
    ///
    /// # Errors
    /// The device's own.
    fn ranks(&mut self, queries: &[f32], first: usize) -> Result<Vec<u32>, DeviceError>;

    /// Bytes held on the device, which is the most there ever were.
    fn scratch_bytes(&self) -> usize;
}

/// Why a device could not do its work.
pub type DeviceError = Box<dyn std::error::Error + Send + Sync>;

/// A part of a device buffer, read.
#[derive(Debug)]
pub struct View<'a, B> {
    /// The whole buffer.
    pub buf: &'a B,
    /// The part of it that is meant.
    pub at: Range<usize>,
}

impl<'a, B> View<'a, B> {
    /// The first `len` numbers of `buf`.
    pub fn first(buf: &'a B, len: usize) -> Self {
        View { buf, at: 0..len }
    }
}

/// A part of a device buffer, written.
#[derive(Debug)]
pub struct ViewMut<'a, B> {
    /// The whole buffer.
    pub buf: &'a mut B,
    /// The part of it that is meant.
    pub at: Range<usize>,
}

/// Number type of a device's buffers and arithmetic: f32 in production, f64 to check gradients.
pub trait Real:
    bytemuck::Pod
    + Send
    + Sync
    + std::fmt::Debug
    + PartialOrd
    + Default
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The nearest number to `x`.
    fn from_f64(x: f64) -> Self;
    /// The same number.
    fn to_f64(self) -> f64;
    /// The square root.
    fn sqrt(self) -> Self;
    /// `e^self`, finite for every finite argument in f32 (see [`kernels::law::exp`]).
    fn exp(self) -> Self;
}

/// C = op(A) op(B): shapes of a matrix product of row-major operands.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Summed dimension.
    pub k: usize,
    /// A is stored `[k, m]` rather than `[m, k]`.
    pub transpose_a: bool,
    /// B is stored `[n, k]` rather than `[k, n]`.
    pub transpose_b: bool,
}

/// What becomes of a pooling window, which moves by its own size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// Its largest number.
    Max,
    /// Its mean.
    Average,
}

/// Elementwise non-linearity after a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// The identity.
    None,
    /// `max(x, 0)`.
    Relu,
    /// The exact GELU, `x Phi(x)`.
    Gelu,
}

/// A two-dimensional convolution (cross-correlation, as everywhere in this field) with stride 1 and zero padding:
/// `x` `[rows, inputs, height, width]`, weight `[outputs, inputs, kernel, kernel]`,
/// out `[rows, outputs, out_height, out_width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    /// Channels in.
    pub inputs: usize,
    /// Rows of an input image.
    pub height: usize,
    /// Columns of an input image.
    pub width: usize,
    /// Channels out.
    pub outputs: usize,
    /// Side of the square kernel.
    pub kernel: usize,
    /// Zeros around the image, on every side; the padded image must hold a kernel.
    pub padding: usize,
}

impl Conv {
    /// Rows of an output image.
    pub fn out_height(&self) -> usize {
        self.height + 2 * self.padding + 1 - self.kernel
    }
    /// Columns of an output image.
    pub fn out_width(&self) -> usize {
        self.width + 2 * self.padding + 1 - self.kernel
    }
    /// Numbers a weight row multiplies: `inputs * kernel^2`.
    pub fn patch(&self) -> usize {
        self.inputs * self.kernel * self.kernel
    }
    /// Numbers in a sample of `x`.
    pub fn input_len(&self) -> usize {
        self.inputs * self.height * self.width
    }
    /// Numbers in a sample of the output.
    pub fn output_len(&self) -> usize {
        self.outputs * self.out_height() * self.out_width()
    }
}

/// Pooling of `[rows, channels, height, width]` by windows of `size x size` that do not overlap;
/// rows and columns that fill no window are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pooling {
    /// Maximum or mean.
    pub kind: Pool,
    /// Channels, each pooled by itself.
    pub channels: usize,
    /// Rows of an input image.
    pub height: usize,
    /// Columns of an input image.
    pub width: usize,
    /// Side of the square window.
    pub size: usize,
}

impl Pooling {
    /// Rows of an output image.
    pub fn out_height(&self) -> usize {
        self.height / self.size
    }
    /// Columns of an output image.
    pub fn out_width(&self) -> usize {
        self.width / self.size
    }
    /// Numbers in a sample of `x`.
    pub fn input_len(&self) -> usize {
        self.channels * self.height * self.width
    }
    /// Numbers in a sample of the output.
    pub fn output_len(&self) -> usize {
        self.channels * self.out_height() * self.out_width()
    }
}

/// A convolution with what follows it: its bias, an activation, and pooling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvPool {
    /// The convolution.
    pub conv: Conv,
    /// Behind the bias.
    pub activation: Activation,
    /// Behind the activation.
    pub pool: Pool,
    /// Side of the pooling window, at most the image's; 1 pools nothing.
    pub size: usize,
}

impl ConvPool {
    /// Its last part.
    pub fn pooling(&self) -> Pooling {
        let Conv { outputs, .. } = self.conv;
        let (height, width) = (self.conv.out_height(), self.conv.out_width());
        Pooling { kind: self.pool, channels: outputs, height, width, size: self.size }
    }
    /// Numbers of all weights and, behind them, all biases.
    pub fn params(&self) -> usize {
        self.conv.outputs * (self.conv.patch() + 1)
    }
    /// Weights and biases within both.
    fn weight_and_bias(&self, params: &Range<usize>) -> [Range<usize>; 2] {
        let middle = params.start + self.conv.outputs * self.conv.patch();
        [params.start..middle, middle..params.end]
    }
}

/// Layer normalisation of vectors of `width` numbers, each by its own mean and deviation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Norm {
    /// Numbers in a vector.
    pub width: usize,
    /// From the start of a vector to that of the next in `x`, at least `width`: more than that reads one token of
    /// every sequence.
    pub stride: usize,
}

impl Norm {
    /// Added to the variance.
    pub const EPS: f64 = 1e-5;

    /// Numbers of `x` from the first of `rows` vectors to the end of the last.
    pub fn input_len(&self, rows: usize) -> usize {
        rows.saturating_sub(1) * self.stride + if rows == 0 { 0 } else { self.width }
    }
}

/// Softmax attention within each of several sequences, in heads that do not see each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attention {
    /// Tokens of a sequence.
    pub time: usize,
    /// Heads.
    pub heads: usize,
    /// Numbers of a query, a key or a value of one head.
    pub head: usize,
    /// Whether a token sees itself and those before it only, rather than all.
    pub causal: bool,
}

impl Attention {
    /// Numbers of a token, all heads: `heads * head`.
    pub fn width(&self) -> usize {
        self.heads * self.head
    }
}

/// Adam with decoupled weight decay; see [`Device::adam`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamStep {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay, not yet times the learning rate.
    pub decay: f64,
}

/// Scale of the gradients where training in narrow products begins; see [`Device::judge`].
pub const SCALING_START: f32 = 65536.0;

/// [`Device::dense`] as a product and what comes after it.
#[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
pub(crate) fn dense_by_parts<D: Device + ?Sized>(
    device: &D,
    [rows, inputs, outputs]: [usize; 3],
    activation: Activation,
    x: View<'_, D::Buf>,
    weight: View<'_, D::Buf>,
    bias: Option<View<'_, D::Buf>>,
    pre: Option<ViewMut<'_, D::Buf>>,
    out: ViewMut<'_, D::Buf>,
) {
    let (mut to, active) = match pre {
        Some(pre) => (pre, Some(out)),
        None => (out, None),
    };
    let product = Gemm { m: rows, n: outputs, k: inputs, transpose_a: false, transpose_b: true };
    device.gemm(product, x, weight, Write::Set(to.again()));
    if bias.is_some() || activation != Activation::None || active.is_some() {
        device.bias_activation([rows, outputs, 1], activation, bias, to, active);
    }
}

/// The verbs encoders and optimisers are made of. Shapes are row-major. An output is a [`Write`] where a caller
/// may want to add to it; a bare [`ViewMut`] is overwritten, or updated in place where its verb says so.
/// A verb takes memory at its first call at a shape; later ones take at most the few words in which work is passed on.
pub trait Device: Sync {
    /// The numbers of buffers and arithmetic.
    type Real: Real;
    /// A flat array of [`Self::Real`] in device memory.
    type Buf: Send + Sync;

    /// `len` zeros.
    fn alloc(&self, len: usize) -> Self::Buf;
    /// What it is, as summaries and checkpoints have it: `cpu` or `cuda`.
    fn kind(&self) -> &'static str;
    /// How many numbers `buf` holds.
    fn len(&self, buf: &Self::Buf) -> usize;
    /// Copies host numbers in; lengths must be equal.
    fn upload(&self, from: &[f32], to: ViewMut<'_, Self::Buf>);
    /// Copies device numbers out, as f32.
    fn download(&self, from: View<'_, Self::Buf>, to: &mut [f32]);
    /// `c = op(a) op(b)`, see [`Gemm`].
    fn gemm(&self, shape: Gemm, a: View<'_, Self::Buf>, b: View<'_, Self::Buf>, c: Write<ViewMut<'_, Self::Buf>>);

    /// Waits for all verbs before. They have no result: the first that failed, after which none did anything, is told
    /// here.
    ///
    /// # Errors
    /// What the machine said.
    fn finish(&self) -> Result<(), DeviceError>;

    /// Exact search on the device; `None` where it is the host's.
    fn search(&self) -> Option<Box<dyn Search>> {
        None
    }

    /// `to = from`; lengths must be equal.
    fn copy(&self, from: View<'_, Self::Buf>, to: ViewMut<'_, Self::Buf>);
    /// Every number of `to` becomes `value`.
    fn fill(&self, value: f64, to: ViewMut<'_, Self::Buf>);

    /// With `shape` = `[rows, channels, pixels]`: `pre[r, c, p] += bias[c]` in place, then `out = activation(pre)`.
    /// Without `out` the activation overwrites `pre`.
    fn bias_activation(
        &self,
        shape: [usize; 3],
        activation: Activation,
        bias: Option<View<'_, Self::Buf>>,
        pre: ViewMut<'_, Self::Buf>,
        out: Option<ViewMut<'_, Self::Buf>>,
    );
    /// Backward of [`Self::bias_activation`]: `d *= activation'(pre)` in place, then `d_bias[c]` is the sum of `d`
    /// over rows and pixels. `saved` is `pre` as forward left it; what overwrote it serves as well where the
    /// derivative can be read from it (`None` and `Relu`). The derivative of ReLU at 0 is 0.
    fn bias_activation_backward(
        &self,
        shape: [usize; 3],
        activation: Activation,
        saved: View<'_, Self::Buf>,
        d: ViewMut<'_, Self::Buf>,
        d_bias: Option<Write<ViewMut<'_, Self::Buf>>>,
    );

    /// A dense layer, `out = activation(x weight' + bias)`, with `shape` = `[rows, inputs, outputs]`: x `[rows, inputs]`,
    /// weight `[outputs, inputs]`, bias `[outputs]`. With `pre` what the activation reads stays there; without it `out`
    /// is all there is.
    #[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
    fn dense(
        &self,
        [rows, inputs, outputs]: [usize; 3],
        activation: Activation,
        x: View<'_, Self::Buf>,
        weight: View<'_, Self::Buf>,
        bias: Option<View<'_, Self::Buf>>,
        pre: Option<ViewMut<'_, Self::Buf>>,
        out: ViewMut<'_, Self::Buf>,
    ) {
        dense_by_parts(self, [rows, inputs, outputs], activation, x, weight, bias, pre, out);
    }

    /// Numbers of scratch that the three convolution verbs need for up to `rows` samples.
    fn conv_scratch(&self, conv: &Conv, rows: usize) -> usize;
    /// `out = x * weight`, a [`Conv`] without bias.
    fn conv(
        &self,
        conv: &Conv,
        rows: usize,
        x: View<'_, Self::Buf>,
        weight: View<'_, Self::Buf>,
        out: ViewMut<'_, Self::Buf>,
        scratch: &mut Self::Buf,
    );
    /// `dx = dL/dx` from `d_out = dL/d out`.
    fn conv_backward_data(
        &self,
        conv: &Conv,
        rows: usize,
        weight: View<'_, Self::Buf>,
        d_out: View<'_, Self::Buf>,
        dx: ViewMut<'_, Self::Buf>,
        scratch: &mut Self::Buf,
    );
    /// `d_weight = dL/d weight` from `d_out = dL/d out`.
    fn conv_backward_weight(
        &self,
        conv: &Conv,
        rows: usize,
        x: View<'_, Self::Buf>,
        d_out: View<'_, Self::Buf>,
        d_weight: Write<ViewMut<'_, Self::Buf>>,
        scratch: &mut Self::Buf,
    );

    /// `out` = the maximum or the mean of every window of `x`, see [`Pooling`].
    fn pool(&self, pooling: &Pooling, rows: usize, x: View<'_, Self::Buf>, out: ViewMut<'_, Self::Buf>);
    /// `dx = dL/dx` from `d_out = dL/d out`. A maximum reached more than once sends its gradient to the first place
    /// in reading order; `x` is what forward read.
    fn pool_backward(
        &self,
        pooling: &Pooling,
        rows: usize,
        x: View<'_, Self::Buf>,
        d_out: View<'_, Self::Buf>,
        dx: ViewMut<'_, Self::Buf>,
    );

    /// Numbers of the buffers that [`Self::conv_pool`] works on with up to `rows` samples. The first two keep what
    /// backward needs.
    fn conv_pool_work(&self, c: &ConvPool, rows: usize) -> [usize; 4] {
        let len = rows * c.conv.output_len();
        [if c.activation == Activation::Gelu { len } else { 0 }, len, len, self.conv_scratch(&c.conv, rows)]
    }
    /// `out = pool(activation(x * weight + bias))`, see [`ConvPool`]: `params` are the weights and, behind them, the
    /// biases.
    fn conv_pool(
        &self,
        c: &ConvPool,
        rows: usize,
        x: View<'_, Self::Buf>,
        params: View<'_, Self::Buf>,
        out: ViewMut<'_, Self::Buf>,
        work: &mut [Self::Buf; 4],
    ) {
        let [pre, activated, _, scratch] = work;
        let (shape, len) =
            ([rows, c.conv.outputs, c.conv.out_height() * c.conv.out_width()], rows * c.conv.output_len());
        let [weight, bias] = c.weight_and_bias(&params.at).map(|at| View { buf: params.buf, at });
        let saves = c.activation == Activation::Gelu;
        self.conv(
            &c.conv,
            rows,
            x,
            weight,
            ViewMut { buf: if saves { &mut *pre } else { &mut *activated }, at: 0..len },
            scratch,
        );
        if saves {
            let (pre, out) = (ViewMut { buf: pre, at: 0..len }, ViewMut { buf: &mut *activated, at: 0..len });
            self.bias_activation(shape, c.activation, Some(bias), pre, Some(out));
        } else {
            let pre = ViewMut { buf: &mut *activated, at: 0..len };
            self.bias_activation(shape, c.activation, Some(bias), pre, None);
        }
        self.pool(&c.pooling(), rows, View { buf: activated, at: 0..len }, out);
    }
    /// Backward of [`Self::conv_pool`], with `work` as that left it: `dx`, if it is wanted, and `d_params`, laid out
    /// as `params`, which are added to. `x` is what forward read.
    #[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
    fn conv_pool_backward(
        &self,
        c: &ConvPool,
        rows: usize,
        x: View<'_, Self::Buf>,
        params: View<'_, Self::Buf>,
        d_out: View<'_, Self::Buf>,
        dx: Option<ViewMut<'_, Self::Buf>>,
        d_params: ViewMut<'_, Self::Buf>,
        work: &mut [Self::Buf; 4],
    ) {
        let [pre, activated, d, scratch] = work;
        let (shape, len) =
            ([rows, c.conv.outputs, c.conv.out_height() * c.conv.out_width()], rows * c.conv.output_len());
        let [weight, _] = c.weight_and_bias(&params.at);
        let [d_weight, d_bias] = c.weight_and_bias(&d_params.at);
        let activated = View { buf: &*activated, at: 0..len };
        self.pool_backward(&c.pooling(), rows, activated.again(), d_out, ViewMut { buf: &mut *d, at: 0..len });
        let saved = if c.activation == Activation::Gelu { View { buf: &*pre, at: 0..len } } else { activated };
        let d_bias = Write::Add(ViewMut { buf: &mut *d_params.buf, at: d_bias });
        self.bias_activation_backward(shape, c.activation, saved, ViewMut { buf: &mut *d, at: 0..len }, Some(d_bias));
        let d = View { buf: &*d, at: 0..len };
        let d_weight = Write::Add(ViewMut { buf: d_params.buf, at: d_weight });
        self.conv_backward_weight(&c.conv, rows, x, d.again(), d_weight, scratch);
        if let Some(dx) = dx {
            self.conv_backward_data(&c.conv, rows, View { buf: params.buf, at: weight }, d, dx, scratch);
        }
    }

    /// `out[i] = gain (x[i] - mean_i) rstd_i + bias`, with `rstd = 1/sqrt(variance + Norm::EPS)` and the variance that
    /// divides by `width`: `x` `[rows, width]`, its rows `norm.stride` apart, `affine` `[2, width]` the gain and then
    /// the bias, `out` `[rows, width]`. Leaves `[mean_i, rstd_i]` in `stats` `[rows, 2]`.
    fn layer_norm(
        &self,
        norm: &Norm,
        rows: usize,
        x: View<'_, Self::Buf>,
        affine: View<'_, Self::Buf>,
        out: ViewMut<'_, Self::Buf>,
        stats: ViewMut<'_, Self::Buf>,
    );
    /// Backward of [`Self::layer_norm`]: `dx`, laid out as `x`, and `d_affine` `[2, width]` from `d_out`
    /// `[rows, width]`. What lies between the rows of `dx` is not touched.
    #[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
    fn layer_norm_backward(
        &self,
        norm: &Norm,
        rows: usize,
        x: View<'_, Self::Buf>,
        affine: View<'_, Self::Buf>,
        stats: View<'_, Self::Buf>,
        d_out: View<'_, Self::Buf>,
        dx: Write<ViewMut<'_, Self::Buf>>,
        d_affine: Write<ViewMut<'_, Self::Buf>>,
    );

    /// `out = softmax(q k' / sqrt(head)) v` in every sequence and head, see [`Attention`]: `qkv`
    /// `[rows, time, 3, heads, head]`, `out` `[rows, time, heads, head]`. Leaves the log-sum-exp of every query's
    /// logits in `lse` `[rows, heads, time]`. No `[time, time]` matrix is stored.
    fn attention(
        &self,
        attention: &Attention,
        rows: usize,
        qkv: View<'_, Self::Buf>,
        out: ViewMut<'_, Self::Buf>,
        lse: ViewMut<'_, Self::Buf>,
    );
    /// Backward of [`Self::attention`]: `d_qkv`, laid out as `qkv`, from `d_out`, laid out as `out`; the probabilities
    /// are computed again from `lse`. `delta` `[rows, heads, time]` is scratch.
    #[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
    fn attention_backward(
        &self,
        attention: &Attention,
        rows: usize,
        qkv: View<'_, Self::Buf>,
        out: View<'_, Self::Buf>,
        lse: View<'_, Self::Buf>,
        d_out: View<'_, Self::Buf>,
        d_qkv: ViewMut<'_, Self::Buf>,
        delta: ViewMut<'_, Self::Buf>,
    );

    /// AdamW in place on `params` and the moments `m`, `v`, all of one length, with `g = factor grads` and
    /// `now` = [lr, 1 - beta1^t, 1 - beta2^t] at the t-th update, t from 1:
    /// `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`,
    /// `params = (1 - lr decay) params - lr (m / now[1]) / (sqrt(v / now[2]) + eps)`.
    /// Nothing happens where the one number of `factor` is not finite.
    #[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
    fn adam(
        &self,
        step: &AdamStep,
        now: View<'_, Self::Buf>,
        factor: View<'_, Self::Buf>,
        grads: View<'_, Self::Buf>,
        params: ViewMut<'_, Self::Buf>,
        m: ViewMut<'_, Self::Buf>,
        v: ViewMut<'_, Self::Buf>,
    );
    /// What an optimiser does with `grads`, into `to` = [norm, factor]: their Euclidean norm, summed in f64, and what
    /// [`Self::adam`] multiplies them by: `min(1, limit / norm)`, 1 where the limit is 0, or NaN where the norm or the
    /// one number of `loss` is not finite.
    ///
    /// With `scaling` = [s, k] gradients are s times what is meant: the norm is that of `grads / s`, the factor
    /// undoes s; and s is halved where the norm is not finite, and doubled after 2000 steps, which k counts, in which
    /// it was.
    fn judge(
        &self,
        limit: f64,
        loss: View<'_, Self::Buf>,
        grads: View<'_, Self::Buf>,
        scaling: Option<ViewMut<'_, Self::Buf>>,
        to: ViewMut<'_, Self::Buf>,
    );
    /// `to[i] = from[index[i]]`, rows of `width` numbers; `index` holds whole numbers, from 0, of rows of `from`.
    fn gather(&self, width: usize, from: View<'_, Self::Buf>, index: View<'_, Self::Buf>, to: ViewMut<'_, Self::Buf>);
    /// `to[index[i]] = from[i]`, rows of `width` numbers; no two of `index` are equal.
    fn scatter(&self, width: usize, from: View<'_, Self::Buf>, index: View<'_, Self::Buf>, to: ViewMut<'_, Self::Buf>);
    /// `to` = the one number of `factor` times `from`, as long.
    fn scale(&self, factor: View<'_, Self::Buf>, from: View<'_, Self::Buf>, to: ViewMut<'_, Self::Buf>);
    /// Brings numbers into `[low, high]`.
    fn clamp(&self, low: f64, high: f64, x: ViewMut<'_, Self::Buf>);
}

/// What training asks of a device besides: the fused loss on embeddings that live there, and steps without a word to
/// the host.
pub trait Contrast: Device<Real = f32> {
    /// Steps that may be given before the results of the first are read: 1 where reading costs nothing.
    const AHEAD: u64;
    /// A step as the device remembers it, see [`Self::repeat`].
    type Recorded: Default;

    /// As [`Engine::loss`] with diagonal positives; `gradients` are dL/du and dL/dv, `[rows, dim]`.
    ///
    /// # Errors
    /// [`LossError`]. Numbers that are not finite may be an error or show in the results.
    fn contrast(
        &mut self,
        loss: &Loss,
        embeddings: Embeddings<'_, Self::Buf>,
        gradients: [Write<ViewMut<'_, Self::Buf>>; 2],
        scalars: Scalars<'_, Self::Buf>,
    ) -> Result<(), LossError>;

    /// Whether products round to f16, whose range ends where gradients may be: they need scaling.
    fn is_narrow(&self) -> bool;

    /// Room for two arrays of data that stay on the device; `None` where that gains nothing or they would take more than
    /// half of what is free.
    fn keep(&self, lens: [usize; 2]) -> Option<[Self::Buf; 2]>;

    /// Does `work`, which does the same at each call: the same verbs, of the same shapes, on the same buffers, and
    /// nothing with numbers of the host. A device may record it once and run the record from then on.
    ///
    /// # Errors
    /// Those of `work`.
    fn repeat(
        &mut self,
        recorded: &mut Self::Recorded,
        work: &mut dyn FnMut(&mut Self) -> Result<(), LossError>,
    ) -> Result<(), LossError>;
}

/// The trained scalars of a loss, on a device.
#[derive(Debug)]
pub struct Scalars<'a, B> {
    /// log(1/tau), one number, in place of the loss's own tau.
    pub logit_scale: Option<View<'a, B>>,
    /// The sigmoid loss's bias, one number, in place of the loss's own.
    pub bias: Option<View<'a, B>>,
    /// Gets the loss, dL/d logit_scale (0 without one), dL/d bias, and tau.
    pub out: ViewMut<'a, B>,
}

/// A batch of embedded pairs on a device.
#[derive(Debug)]
pub struct Embeddings<'a, B> {
    /// `[rows, dim]`.
    pub u: View<'a, B>,
    /// `[rows, dim]`.
    pub v: View<'a, B>,
    /// Number of pairs.
    pub rows: usize,
    /// Embedding dimension.
    pub dim: usize,
    /// What u and v are rounded to before the loss sees them.
    pub precision: Precision,
    /// Required by the MMD objectives only.
    pub moments: Option<Features<'a, B>>,
}

/// Feature maps of a batch of data, on a device.
#[derive(Debug)]
pub struct Features<'a, B> {
    /// `[rows, dims[0]]`.
    pub u: View<'a, B>,
    /// `[rows, dims[1]]`.
    pub v: View<'a, B>,
    /// Features a sample on each side.
    pub dims: [usize; 2],
}

impl<B> View<'_, B> {
    /// The same part, borrowed again.
    pub fn again(&self) -> View<'_, B> {
        View { buf: self.buf, at: self.at.clone() }
    }
}

impl<'a, B> ViewMut<'a, B> {
    /// The first `len` numbers of `buf`.
    pub fn first(buf: &'a mut B, len: usize) -> Self {
        ViewMut { buf, at: 0..len }
    }

    /// The same part, lent out.
    pub fn again(&mut self) -> ViewMut<'_, B> {
        ViewMut { buf: &mut *self.buf, at: self.at.clone() }
    }
}

macro_rules! real {
    ($t:ty, $exp:expr) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
        }
    };
}
// The law's exponential vectorises, where the library's is a call; and so does a loop around it, once inlined.
real!(f32, kernels::law::exp);
real!(f64, f64::exp);
