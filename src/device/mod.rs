//! Machines: the verbs that encoders, losses and optimisers are made of, and the engines behind them.

pub mod cpu;

use crate::objective::{Batch, Gradients, Loss, LossError, Value, Write};
use std::ops::Range;

/// An engine that evaluates losses on embeddings in host memory.
pub trait Engine {
    /// Evaluates `loss` on `batch`, writing the gradients asked for.
    ///
    /// # Errors
    /// [`LossError`] when a shape, a parameter or a value is out of its domain; nothing is written then.
    fn loss(&mut self, loss: &Loss, batch: &Batch<'_>, gradients: Gradients<'_>) -> Result<Value, LossError>;

    /// Bytes of scratch the engine holds now, beyond inputs and outputs: its peak, as it only grows.
    fn scratch_bytes(&self) -> usize;
}

/// A part of a device buffer, read.
#[derive(Debug)]
pub struct View<'a, B> {
    pub buf: &'a B,
    pub at: Range<usize>,
}

/// A part of a device buffer, written.
#[derive(Debug)]
pub struct ViewMut<'a, B> {
    pub buf: &'a mut B,
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
    const ZERO: Self;
    const ONE: Self;
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    fn sqrt(self) -> Self;
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

/// A pooling window moves by its own size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    Max,
    Average,
}

/// Elementwise non-linearity after a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    None,
    Relu,
    /// The exact GELU, `x Phi(x)`.
    Gelu,
}

/// The verbs encoders and optimisers are made of. Shapes are row-major; outputs say whether they
/// overwrite or add. A device never allocates inside a verb after its first call at a shape.
pub trait Device: Sync {
    type Real: Real;
    /// A flat array of [`Self::Real`] in device memory.
    type Buf: Send + Sync;

    /// `len` zeros.
    fn alloc(&self, len: usize) -> Self::Buf;
    /// Copies host numbers in; lengths must be equal.
    fn upload(&self, from: &[f32], to: ViewMut<'_, Self::Buf>);
    /// Copies device numbers out, as f32.
    fn download(&self, from: View<'_, Self::Buf>, to: &mut [f32]);
    /// `c = op(a) op(b)`, see [`Gemm`].
    fn gemm(&self, shape: Gemm, a: View<'_, Self::Buf>, b: View<'_, Self::Buf>, c: Write<ViewMut<'_, Self::Buf>>);
}

/// The fused loss on embeddings that live on the device; the trainer's one call.
pub trait Contrast: Device<Real = f32> {
    /// As [`Engine::loss`] with diagonal positives, for `u`, `v` `[rows, dim]` in device buffers rounded to
    /// `precision` storage. `moments` are features `[rows, f_u]`, `[rows, f_v]` with their widths.
    fn contrast(
        &mut self,
        loss: &Loss,
        precision: crate::objective::Precision,
        shape: [usize; 2],
        u: View<'_, Self::Buf>,
        v: View<'_, Self::Buf>,
        moments: Option<Features<'_, Self::Buf>>,
        grad_u: Write<ViewMut<'_, Self::Buf>>,
        grad_v: Write<ViewMut<'_, Self::Buf>>,
    ) -> Result<Value, LossError>;
}

/// Feature maps of a batch of data, on the device: `u` `[rows, dims[0]]`, `v` `[rows, dims[1]]`.
#[derive(Debug)]
pub struct Features<'a, B> {
    pub u: View<'a, B>,
    pub v: View<'a, B>,
    pub dims: [usize; 2],
}

impl<B> View<'_, B> {
    /// The same part, borrowed again.
    pub fn again(&self) -> View<'_, B> {
        View { buf: self.buf, at: self.at.clone() }
    }
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            fn to_f64(self) -> f64 {
                self as f64
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            fn exp(self) -> Self {
                self.exp()
            }
        }
    };
}
real!(f32);
real!(f64);
