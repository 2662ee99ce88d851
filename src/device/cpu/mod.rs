//! The CPU: a fused engine on all cores, deterministic bit for bit for any number of threads.

mod attention;
mod awake;
mod buffers;
mod contrast;
mod conv;
mod fused;
mod gemm;
mod joint;
mod kept;
mod law;
mod layers;
mod mmd;
mod norm;
mod operand;
pub(crate) mod search;
mod shuffled;
mod simd;
mod sweep;
mod tally;
mod tile;

pub use simd::{Isa, Lane};

use super::{
    Activation, AdamStep, Attention, Contrast, Conv, ConvPool, Device, DeviceError, Embeddings, Engine, Gemm, Norm,
    Pooling, Scalars, View, ViewMut,
};
use crate::objective::{
    Batch, Gradients, Loss, LossError, Matrix, Moments, Objective, Pairs, Precision, Storage, Value, Write,
};
use half::{bf16, f16};
use kernels::abi::{SCALING_MOST, SCALING_PATIENCE};
use std::sync::{Mutex, PoisonError};

/// `<a, b>` of two rows in f64.
#[inline(always)]
pub(crate) fn inner(a: &[f32], b: &[f32]) -> f64 {
    in_eight(a, b, |a, b| a * b)
}

/// The sum of `term` over two rows, in eight sums: one would wait for each addition.
#[inline(always)]
fn in_eight(a: &[f32], b: &[f32], term: impl Fn(f64, f64) -> f64) -> f64 {
    let term = |(&a, &b): (&f32, &f32)| term(f64::from(a), f64::from(b));
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0f64; 8];
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, pair)| *sum += term(pair));
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(term).sum::<f64>()
}

/// Numbers one thread is through with before another has woken up.
const ALONE: usize = 1 << 14;

/// How many tasks of so many `numbers` a thread takes at least.
fn together(numbers: usize) -> usize {
    ALONE.div_ceil(numbers.max(1))
}

/// Bytes of logits that a loss keeps between its passes unless told otherwise: about what caches hold.
pub const WORKSPACE: usize = 32 << 20;

/// The CPU as a device. `T` is the arithmetic of encoders: f32, or f64 to check gradients.
/// Losses exist in f32 only.
///
/// It runs on the rayon pool of its caller. Through a loss up to 8 of the pool's threads look for work without a pause, and go
/// to sleep 1 ms after they found the last of it.
#[derive(Debug)]
pub struct Cpu<T = f32> {
    isa: Isa,
    /// Packed operands of the last matrix product or attention.
    packed: Mutex<Vec<T>>,
    scratch: contrast::Scratch,
    /// Embeddings of a training batch in 16-bit storage.
    stored_bf16: Vec<bf16>,
    stored_f16: Vec<f16>,
}

impl<T: Lane> Cpu<T> {
    /// With the fastest instruction set this machine has.
    pub fn new() -> Self {
        Cpu::with_isa(Isa::best())
    }

    /// With an instruction set of your choice from [`Isa::available`].
    pub fn with_isa(isa: Isa) -> Self {
        Cpu {
            isa,
            packed: Mutex::default(),
            scratch: contrast::Scratch { budget: WORKSPACE, ..Default::default() },
            stored_bf16: Vec::new(),
            stored_f16: Vec::new(),
        }
    }

    /// Lets losses keep logits between their passes in up to `bytes` of memory, beyond scratch that grows as (N + M) D.
    /// What is kept need not be multiplied out again: a loss and both gradients of N x M logits take 6 N M D operations
    /// where all fit, in 4 N M bytes, and 8 N M D where none do, with the same bits. On units that multiply bf16 they take
    /// 2 N M bytes, and gradients differ by less than those units' rounding. The default is [`WORKSPACE`].
    pub fn set_workspace(&mut self, bytes: usize) {
        self.scratch.budget = bytes;
    }

    /// The buffer of packed operands. Not its lock: a thread that waits for a product's parts may begin another product.
    fn take_packed(&self) -> Vec<T> {
        std::mem::take(&mut *self.packed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn give_packed(&self, packed: Vec<T>) {
        *self.packed.lock().unwrap_or_else(PoisonError::into_inner) = packed;
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

impl Engine for Cpu<f32> {
    fn loss(&mut self, loss: &Loss, batch: &Batch<'_>, gradients: Gradients<'_>) -> Result<Value, LossError> {
        batch.validate(loss)?;
        gradients.validate(batch)?;
        self.scratch.counts.prepare(batch, loss.objective.is_of_each_pair())?;
        let (n, m, dim) = (batch.u.rows, batch.v.rows, batch.u.dim);
        let evaluate = || contrast::evaluate(self.isa, &mut self.scratch, loss, batch, gradients);
        Ok(if sweep::is_for_one(n, m, dim) { evaluate() } else { awake::in_pool(evaluate) })
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch.bytes()
    }
}

impl<T: Lane> Device for Cpu<T> {
    type Real = T;
    type Buf = Vec<T>;

    fn kind(&self) -> &'static str {
        "cpu"
    }
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
        let mut packed = self.take_packed();
        gemm::gemm(self.isa, shape, read(&a), read(&b), c.map(write), &mut packed);
        self.give_packed(packed);
    }

    fn finish(&self) -> Result<(), DeviceError> {
        Ok(())
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
        layers::bias_activation_backward(
            self.isa,
            shape,
            activation,
            read(&saved),
            write(d),
            d_bias.map(|d| d.map(write)),
        );
    }
    fn conv_scratch(&self, conv: &Conv, rows: usize) -> usize {
        conv::scratch(conv, rows)
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
        conv::conv(self.isa, conv, rows, read(&x), read(&weight), write(out), scratch);
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
        conv::backward_data(self.isa, conv, rows, read(&weight), read(&d_out), write(dx), scratch);
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
        conv::backward_weight(self.isa, conv, rows, read(&x), read(&d_out), d_weight.map(write), scratch);
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
    fn conv_pool_work(&self, c: &ConvPool, rows: usize) -> [usize; 4] {
        [conv::kept(c, rows), 0, 0, conv::scratch(&c.conv, rows)]
    }
    fn conv_pool(
        &self,
        c: &ConvPool,
        rows: usize,
        x: View<'_, Vec<T>>,
        params: View<'_, Vec<T>>,
        out: ViewMut<'_, Vec<T>>,
        [kept, _, _, scratch]: &mut [Vec<T>; 4],
    ) {
        conv::forward(self.isa, c, rows, read(&x), read(&params), kept, write(out), scratch);
    }
    fn conv_pool_backward(
        &self,
        c: &ConvPool,
        rows: usize,
        x: View<'_, Vec<T>>,
        params: View<'_, Vec<T>>,
        d_out: View<'_, Vec<T>>,
        dx: Option<ViewMut<'_, Vec<T>>>,
        d_params: ViewMut<'_, Vec<T>>,
        [kept, _, _, scratch]: &mut [Vec<T>; 4],
    ) {
        let saved = conv::Saved { x: read(&x), params: read(&params), kept, d_out: read(&d_out) };
        conv::backward(self.isa, c, rows, saved, dx.map(write), write(d_params), scratch);
    }
    fn layer_norm(
        &self,
        norm: &Norm,
        rows: usize,
        x: View<'_, Vec<T>>,
        affine: View<'_, Vec<T>>,
        out: ViewMut<'_, Vec<T>>,
        stats: ViewMut<'_, Vec<T>>,
    ) {
        norm::layer_norm(self.isa, norm, rows, read(&x), read(&affine), write(out), write(stats));
    }
    fn layer_norm_backward(
        &self,
        norm: &Norm,
        rows: usize,
        x: View<'_, Vec<T>>,
        affine: View<'_, Vec<T>>,
        stats: View<'_, Vec<T>>,
        d_out: View<'_, Vec<T>>,
        dx: Write<ViewMut<'_, Vec<T>>>,
        d_affine: Write<ViewMut<'_, Vec<T>>>,
    ) {
        let saved = norm::Saved { x: read(&x), affine: read(&affine), stats: read(&stats) };
        norm::layer_norm_backward(self.isa, norm, rows, saved, read(&d_out), dx.map(write), d_affine.map(write));
    }
    fn attention(
        &self,
        attention: &Attention,
        rows: usize,
        qkv: View<'_, Vec<T>>,
        out: ViewMut<'_, Vec<T>>,
        lse: ViewMut<'_, Vec<T>>,
    ) {
        let mut packed = self.take_packed();
        attention::attention(self.isa, attention, rows, read(&qkv), write(out), write(lse), &mut packed);
        self.give_packed(packed);
    }
    fn attention_backward(
        &self,
        attention: &Attention,
        rows: usize,
        qkv: View<'_, Vec<T>>,
        _: View<'_, Vec<T>>,
        lse: View<'_, Vec<T>>,
        d_out: View<'_, Vec<T>>,
        d_qkv: ViewMut<'_, Vec<T>>,
        _: ViewMut<'_, Vec<T>>,
    ) {
        let mut packed = self.take_packed();
        let saved = attention::Saved { qkv: read(&qkv), lse: read(&lse), d_out: read(&d_out) };
        attention::attention_backward(self.isa, attention, rows, saved, write(d_qkv), &mut packed);
        self.give_packed(packed);
    }
    fn adam(
        &self,
        step: &AdamStep,
        now: View<'_, Vec<T>>,
        factor: View<'_, Vec<T>>,
        grads: View<'_, Vec<T>>,
        params: ViewMut<'_, Vec<T>>,
        m: ViewMut<'_, Vec<T>>,
        v: ViewMut<'_, Vec<T>>,
    ) {
        let (now, factor) = (read(&now), read(&factor)[0].to_f64());
        if factor.is_finite() {
            let now = [now[0].to_f64(), now[1].to_f64(), now[2].to_f64(), factor];
            layers::adam(self.isa, step, now, read(&grads), write(params), write(m), write(v));
        }
    }
    fn judge(
        &self,
        limit: f64,
        loss: View<'_, Vec<T>>,
        grads: View<'_, Vec<T>>,
        scaling: Option<ViewMut<'_, Vec<T>>>,
        to: ViewMut<'_, Vec<T>>,
    ) {
        let mut none = [T::ONE, T::ZERO];
        let scaling = scaling.map_or(&mut none[..], write);
        let (scale, good) = (scaling[0].to_f64(), scaling[1].to_f64());
        let squares = layers::sum_squares(read(&grads));
        // Beyond f32 its square has no moment: nothing would be learned after it.
        let norm = if (squares as f32).is_finite() { squares.sqrt() / scale } else { f64::INFINITY };
        let clip = if limit > 0.0 && norm > limit { limit / norm } else { 1.0 };
        let counts = norm.is_finite() && read(&loss)[0].to_f64().is_finite();
        let to = write(to);
        to[0] = T::from_f64(norm);
        to[1] = T::from_f64(if counts { clip / scale } else { f64::NAN });
        let most = f64::from(SCALING_MOST);
        let (scale, good) = match norm.is_finite() {
            false => ((0.5 * scale).max(most.recip()), 0.0),
            true if good + 1.0 >= f64::from(SCALING_PATIENCE) => ((2.0 * scale).min(most), 0.0),
            true => (scale, good + 1.0),
        };
        (scaling[0], scaling[1]) = (T::from_f64(scale), T::from_f64(good));
    }
    fn gather(&self, width: usize, from: View<'_, Vec<T>>, index: View<'_, Vec<T>>, to: ViewMut<'_, Vec<T>>) {
        let from = read(&from);
        for (to, row) in write(to).chunks_mut(width).zip(read(&index)) {
            to.copy_from_slice(&from[row.to_f64() as usize * width..][..width]);
        }
    }
    fn scatter(&self, width: usize, from: View<'_, Vec<T>>, index: View<'_, Vec<T>>, to: ViewMut<'_, Vec<T>>) {
        let to = write(to);
        for (from, row) in read(&from).chunks(width).zip(read(&index)) {
            to[row.to_f64() as usize * width..][..width].copy_from_slice(from);
        }
    }
    fn scale(&self, factor: View<'_, Vec<T>>, from: View<'_, Vec<T>>, to: ViewMut<'_, Vec<T>>) {
        let factor = read(&factor)[0];
        write(to).iter_mut().zip(read(&from)).for_each(|(to, &from)| *to = factor * from);
    }
    fn clamp(&self, low: f64, high: f64, x: ViewMut<'_, Vec<T>>) {
        write(x).iter_mut().for_each(|x| *x = T::from_f64(x.to_f64().clamp(low, high)));
    }
}

impl Contrast for Cpu<f32> {
    const AHEAD: u64 = 1;
    type Recorded = ();

    fn contrast(
        &mut self,
        loss: &Loss,
        embeddings: Embeddings<'_, Vec<f32>>,
        [grad_u, grad_v]: [Write<ViewMut<'_, Vec<f32>>>; 2],
        scalars: Scalars<'_, Vec<f32>>,
    ) -> Result<(), LossError> {
        let (mut loss, learned) = (*loss, scalars.logit_scale.is_some());
        if let Some(scale) = scalars.logit_scale {
            loss.tau = (-f64::from(read(&scale)[0])).exp();
        }
        if let (Objective::Sigmoid { bias }, Some(learned)) = (&mut loss.objective, scalars.bias) {
            *bias = f64::from(read(&learned)[0]);
        }
        let Embeddings { u, v, rows, dim, precision, moments } = embeddings;
        let (u, v) = (&u.buf[u.at], &v.buf[v.at]);
        let mut bf16 = std::mem::take(&mut self.stored_bf16);
        let mut f16 = std::mem::take(&mut self.stored_f16);
        let [u, v] = match precision {
            Precision::F32 => [Storage::F32(u), Storage::F32(v)],
            Precision::Bf16 => stored(&mut bf16, u, v).map(Storage::Bf16),
            Precision::F16 => stored(&mut f16, u, v).map(Storage::F16),
        };
        let matrix = |data| Matrix { data, rows, dim };
        let features = moments.as_ref().map(|m| Moments::Features {
            u: Matrix::f32(&m.u.buf[m.u.at.clone()], m.dims[0]),
            v: Matrix::f32(&m.v.buf[m.v.at.clone()], m.dims[1]),
        });
        let batch = Batch { u: matrix(u), v: matrix(v), pairs: Pairs::default(), offset_v: None, moments: features };
        let gradients = Gradients { u: Some(grad_u.map(write)), v: Some(grad_v.map(write)), offset_v: None };
        let value = self.loss(&loss, &batch, gradients);
        (self.stored_bf16, self.stored_f16) = (bf16, f16);
        let value = value?;
        let by_scale = if learned { -loss.tau * value.grad_tau } else { 0.0 };
        let out = [value.loss, by_scale, value.grad_bias, loss.tau];
        write(scalars.out).iter_mut().zip(out).for_each(|(to, x)| *to = x as f32);
        Ok(())
    }

    fn is_narrow(&self) -> bool {
        false
    }
    fn keep(&self, _: [usize; 2]) -> Option<[Vec<f32>; 2]> {
        None
    }
    fn repeat(
        &mut self,
        (): &mut (),
        work: &mut dyn FnMut(&mut Self) -> Result<(), LossError>,
    ) -> Result<(), LossError> {
        awake::awake(|| work(self))
    }
}

/// Both sides rounded to 16-bit storage, in one buffer.
fn stored<'a, H: FromF32>(buffer: &'a mut Vec<H>, u: &[f32], v: &[f32]) -> [&'a [H]; 2] {
    buffer.clear();
    buffer.extend(u.iter().chain(v).map(|&x| H::from_f32(x)));
    let (u, v) = buffer.split_at(u.len());
    [u, v]
}

trait FromF32 {
    fn from_f32(x: f32) -> Self;
}
impl FromF32 for bf16 {
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}
impl FromF32 for f16 {
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}
