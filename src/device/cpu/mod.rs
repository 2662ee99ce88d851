//! The CPU: a fused engine on all cores, deterministic bit for bit for any number of threads.

use super::{Contrast, Device, Engine, Features, Gemm, Real, View, ViewMut};
use crate::objective::{Batch, Gradients, Loss, LossError, Precision, Value, Write};

/// The CPU as a device. `T` is the arithmetic of encoders: f32, or f64 to check gradients.
/// Losses exist in f32 only.
#[derive(Debug)]
pub struct Cpu<T = f32> {
    real: std::marker::PhantomData<T>,
}

impl<T: Real> Cpu<T> {
    /// The best instruction set this machine has.
    pub fn new() -> Self {
        todo!()
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

impl<T: Real> Device for Cpu<T> {
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
    fn gemm(&self, _shape: Gemm, _a: View<'_, Vec<T>>, _b: View<'_, Vec<T>>, _c: Write<ViewMut<'_, Vec<T>>>) {
        todo!()
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
