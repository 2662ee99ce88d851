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
mod strips;
mod sweep;
mod tally;
mod tile;
mod verbs;

pub use simd::{Isa, Lane};

use super::{Contrast, Embeddings, Engine, Scalars, View, ViewMut};
use crate::objective::{
    Batch, Gradients, Loss, LossError, Matrix, Moments, Objective, Pairs, Precision, Storage, Value, Write,
};
use half::{bf16, f16};
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

impl Cpu {
    /// With the fastest instruction set this machine has.
    pub fn new() -> Self {
        Cpu::with_isa(Isa::best())
    }

    /// With an instruction set of your choice from [`Isa::available`].
    pub fn with_isa(isa: Isa) -> Self {
        Cpu::of(isa)
    }
}

impl Cpu<f64> {
    /// In f64, with an instruction set from [`Isa::available`].
    pub fn wide(isa: Isa) -> Self {
        Cpu::of(isa)
    }
}

impl<T: Lane> Cpu<T> {
    fn of(isa: Isa) -> Self {
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
    /// 2 N M bytes, and gradients differ by less than those units' rounding. A one-sided conditional loss keeps 1 KiB a column (row)
    /// and thread at most, apart from what others keep, and takes 6 N M D where these fit. The default is [`WORKSPACE`].
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

impl Default for Cpu {
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
