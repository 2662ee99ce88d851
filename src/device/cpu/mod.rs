//! The CPU: a fused engine on all cores, deterministic bit for bit for any number of threads.

mod gemm;
mod simd;

pub use simd::{Isa, Lane};

use super::{Contrast, Device, Engine, Features, Gemm, View, ViewMut};
use crate::objective::{Batch, Gradients, Loss, LossError, Precision, Value, Write};
use std::sync::{Mutex, PoisonError};

/// The CPU as a device. `T` is the arithmetic of encoders: f32, or f64 to check gradients.
/// Losses exist in f32 only.
#[derive(Debug)]
pub struct Cpu<T = f32> {
    isa: Isa,
    /// The packed operand of the last matrix product.
    packed: Mutex<Vec<T>>,
}

impl<T: Lane> Cpu<T> {
    /// With the fastest instruction set this machine has.
    pub fn new() -> Self {
        Cpu::with_isa(Isa::best())
    }

    /// With an instruction set of your choice from [`Isa::available`].
    pub fn with_isa(isa: Isa) -> Self {
        Cpu { isa, packed: Mutex::default() }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl<T: Lane> Default for Cpu<T> {
    fn default() -> Self {
        Cpu::new()
    }
}

impl Engine for Cpu<f32> {
    fn loss(&mut self, _loss: &Loss, _batch: &Batch<'_>, _gradients: Gradients<'_>) -> Result<Value, LossError> {
        todo!()
    }
    fn scratch_bytes(&self) -> usize {
        todo!()
    }
}

impl<T: Lane> Device for Cpu<T> {
    type Real = T;
    type Buf = Vec<T>;

    fn alloc(&self, len: usize) -> Vec<T> {
        vec![T::ZERO; len]
    }
    fn upload(&self, from: &[f32], to: ViewMut<'_, Vec<T>>) {
        for (t, &f) in to.buf[to.at].iter_mut().zip(from) {
            *t = T::from_f64(f64::from(f));
        }
    }
    fn download(&self, from: View<'_, Vec<T>>, to: &mut [f32]) {
        for (t, &f) in to.iter_mut().zip(&from.buf[from.at]) {
            *t = f.to_f64() as f32;
        }
    }
    fn gemm(&self, shape: Gemm, a: View<'_, Vec<T>>, b: View<'_, Vec<T>>, c: Write<ViewMut<'_, Vec<T>>>) {
        let c = match c {
            Write::Set(c) => Write::Set(&mut c.buf[c.at]),
            Write::Add(c) => Write::Add(&mut c.buf[c.at]),
        };
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        gemm::gemm(self.isa, shape, &a.buf[a.at], &b.buf[b.at], c, &mut packed);
    }
}

impl Contrast for Cpu<f32> {
    fn contrast(
        &mut self,
        _loss: &Loss,
        _precision: Precision,
        _shape: [usize; 2],
        _u: View<'_, Vec<f32>>,
        _v: View<'_, Vec<f32>>,
        _moments: Option<Features<'_, Vec<f32>>>,
        _grad_u: Write<ViewMut<'_, Vec<f32>>>,
        _grad_v: Write<ViewMut<'_, Vec<f32>>>,
    ) -> Result<Value, LossError> {
        todo!()
    }
}
