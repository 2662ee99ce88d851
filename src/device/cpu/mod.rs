//! The CPU: a fused engine on all cores, deterministic bit for bit for any number of threads.

mod gemm;
mod layers;
mod simd;

pub use simd::{Isa, Lane};

use super::{Activation, AdamStep, Contrast, Conv, Device, Engine, Features, Gemm, Pooling, View, ViewMut};
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

/// The numbers a view shows.
fn read<'a, T>(view: &View<'a, Vec<T>>) -> &'a [T] {
    &view.buf[view.at.clone()]
}

/// The numbers a view lets be written.
fn write<T>(view: ViewMut<'_, Vec<T>>) -> &mut [T] {
    &mut view.buf[view.at]
}

/// [`write`] under its mode.
fn part<T>(view: Write<ViewMut<'_, Vec<T>>>) -> Write<&mut [T]> {
    match view {
        Write::Set(view) => Write::Set(write(view)),
        Write::Add(view) => Write::Add(write(view)),
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
    fn len(&self, buf: &Vec<T>) -> usize {
        buf.len()
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
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        gemm::gemm(self.isa, shape, read(&a), read(&b), part(c), &mut packed);
    }

    fn copy(&self, from: View<'_, Vec<T>>, to: ViewMut<'_, Vec<T>>) {
        write(to).copy_from_slice(read(&from));
    }
    fn fill(&self, value: f64, to: ViewMut<'_, Vec<T>>) {
        write(to).fill(T::from_f64(value));
    }
    fn bias_activation(
        &self,
        shape: [usize; 3],
        activation: Activation,
        bias: Option<View<'_, Vec<T>>>,
        pre: ViewMut<'_, Vec<T>>,
        out: Option<ViewMut<'_, Vec<T>>>,
    ) {
        layers::bias_activation(self.isa, shape, activation, bias.as_ref().map(read), write(pre), out.map(write));
    }
    fn bias_activation_backward(
        &self,
        shape: [usize; 3],
        activation: Activation,
        saved: View<'_, Vec<T>>,
        d: ViewMut<'_, Vec<T>>,
        d_bias: Option<Write<ViewMut<'_, Vec<T>>>>,
    ) {
        layers::bias_activation_backward(self.isa, shape, activation, read(&saved), write(d), d_bias.map(part));
    }
    fn conv_scratch(&self, conv: &Conv, rows: usize) -> usize {
        layers::conv_scratch(conv, rows)
    }
    fn conv(
        &self,
        conv: &Conv,
        rows: usize,
        x: View<'_, Vec<T>>,
        weight: View<'_, Vec<T>>,
        out: ViewMut<'_, Vec<T>>,
        scratch: &mut Vec<T>,
    ) {
        layers::conv(self.isa, conv, rows, read(&x), read(&weight), write(out), scratch);
    }
    fn conv_backward_data(
        &self,
        conv: &Conv,
        rows: usize,
        weight: View<'_, Vec<T>>,
        d_out: View<'_, Vec<T>>,
        dx: ViewMut<'_, Vec<T>>,
        scratch: &mut Vec<T>,
    ) {
        layers::conv_backward_data(self.isa, conv, rows, read(&weight), read(&d_out), write(dx), scratch);
    }
    fn conv_backward_weight(
        &self,
        conv: &Conv,
        rows: usize,
        x: View<'_, Vec<T>>,
        d_out: View<'_, Vec<T>>,
        d_weight: Write<ViewMut<'_, Vec<T>>>,
        scratch: &mut Vec<T>,
    ) {
        layers::conv_backward_weight(self.isa, conv, rows, read(&x), read(&d_out), part(d_weight), scratch);
    }
    fn pool(&self, pooling: &Pooling, rows: usize, x: View<'_, Vec<T>>, out: ViewMut<'_, Vec<T>>) {
        layers::pool(pooling, rows, read(&x), write(out));
    }
    fn pool_backward(
        &self,
        pooling: &Pooling,
        rows: usize,
        x: View<'_, Vec<T>>,
        d_out: View<'_, Vec<T>>,
        dx: ViewMut<'_, Vec<T>>,
    ) {
        layers::pool_backward(pooling, rows, read(&x), read(&d_out), write(dx));
    }
    fn adam(
        &self,
        step: &AdamStep,
        grads: View<'_, Vec<T>>,
        params: ViewMut<'_, Vec<T>>,
        m: ViewMut<'_, Vec<T>>,
        v: ViewMut<'_, Vec<T>>,
    ) {
        layers::adam(self.isa, step, read(&grads), write(params), write(m), write(v));
    }
    fn sum_squares(&self, x: View<'_, Vec<T>>) -> f64 {
        layers::sum_squares(read(&x))
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
