//! What kernel tests share: device arrays on the host twin, random numbers, and how far a result is from its reference.
#![allow(dead_code, reason = "each test uses its part")]

use half::{bf16, f16};
use kernels::abi::{Args, Kernel};
use kernels::simt::shim::{self, Memory};
use std::marker::PhantomData;

/// An array on the twin's card.
pub struct Array<T> {
    memory: Memory,
    of: PhantomData<T>,
}

impl<T: Copy> Array<T> {
    /// `len` elements of poison.
    pub fn poison(len: usize) -> Self {
        Array { memory: Memory::new(len * size_of::<T>()), of: PhantomData }
    }
    pub fn of(data: &[T]) -> Self {
        let array = Self::poison(data.len());
        // SAFETY: plain numbers, as bytes.
        let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) };
        array.memory.upload(0, bytes);
        array
    }
    pub fn ptr(&self) -> *const T {
        self.memory.address() as *const T
    }
    pub fn ptr_mut(&self) -> *mut T {
        self.memory.address() as *mut T
    }
    /// Poison again.
    pub fn refill(&self) {
        self.memory.upload(0, &vec![0xff; self.memory.bytes()]);
    }
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.bytes()];
        self.memory.download(0, &mut bytes);
        bytes
    }
    pub fn get(&self) -> Vec<T> {
        let bytes = self.bytes();
        // SAFETY: plain numbers, for which all bytes are valid.
        bytes.chunks_exact(size_of::<T>()).map(|b| unsafe { std::ptr::read_unaligned(b.as_ptr().cast()) }).collect()
    }
}

/// Runs a kernel.
pub fn launch<A: Args>(kernel: &Kernel<A>, grid: [u32; 3], args: &A, seed: u64) {
    // SAFETY: tests pass arrays of the extents the kernels state; what they get wrong the twin reports.
    unsafe { shim::launch(kernel, grid, args, seed) }
}

/// Random numbers without a crate.
pub struct Rng(pub u64);

impl Rng {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// In [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.word() % n as u64) as usize
    }
    pub fn vec(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.unit() * scale).collect()
    }
}

/// A 16-bit type: how to round to it and back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Type {
    Bf16,
    F16,
}

impl Type {
    pub fn bits(self, x: f32) -> u16 {
        match self {
            Type::Bf16 => bf16::from_f32(x).to_bits(),
            Type::F16 => f16::from_f32(x).to_bits(),
        }
    }
    pub fn value(self, bits: u16) -> f64 {
        match self {
            Type::Bf16 => bf16::from_bits(bits).to_f64(),
            Type::F16 => f16::from_bits(bits).to_f64(),
        }
    }
}

/// Rows of `dim` numbers as halves with a pitch, the padding poisoned: bits for the card, values for the reference.
pub fn halves(t: Type, x: &[f32], dim: usize, pitch: usize) -> (Array<u16>, Vec<f64>) {
    let mut bits = vec![u16::MAX; x.len() / dim * pitch];
    for (row, x) in bits.chunks_mut(pitch).zip(x.chunks(dim)) {
        row.iter_mut().zip(x).for_each(|(b, &x)| *b = t.bits(x));
    }
    let values = x.iter().map(|&x| t.value(t.bits(x))).collect();
    (Array::of(&bits), values)
}

/// `|a - b| / |b|`; NaN if anything is not a number.
pub fn distance(a: impl IntoIterator<Item = f64>, b: &[f64]) -> f64 {
    let (mut off, mut len, mut count) = (0.0, 0.0, 0);
    for (a, &b) in a.into_iter().zip(b) {
        off += (a - b) * (a - b);
        len += b * b;
        count += 1;
    }
    assert_eq!(count, b.len(), "a result of another length");
    (off / len).sqrt()
}
