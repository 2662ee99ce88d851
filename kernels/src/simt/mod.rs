//! The device's vocabulary: the only words kernels are written in.
//!
//! | what | words |
//! | --- | --- |
//! | where am I | `thread` `lane` `block_x/y/z` `grid_x` |
//! | meeting | `sync` `named_barrier` `sync_warp` |
//! | lanes of a warp | `warp` `shuffle_xor` `uniform` `ballot`: all 32 come to them |
//! | numbers | `exp2` `log2` `reciprocal` `sqrt` `fma`, [`Half`] |
//! | global memory | `load` `store` `store_where` (scalars and 8- or 16-byte vectors) |
//! | shared memory | `shared_base` `load_shared` `store_shared` `ldmatrix` `ldmatrix_t` `stmatrix` |
//! | copies in flight | `copy_async` `copy_commit` `copy_wait`; `tma_load` `tma_store` `bulk_commit` `bulk_wait_read` |
//! | barriers in shared memory | `mbarrier_init/expect/arrive/wait` `fence_init` `fence_async` |
//! | tensor cores | [`Half::mma`]; [`Half::wgmma_n256`] and its like, `accumulator` `wgmma_fence` `wgmma_commit` `wgmma_wait` |
//! | registers | `registers_up` `registers_down` `opaque` `pin` |
//!
//! Shared memory is addressed by `u32` bytes from `shared_base()`. A word comes in two bodies of one signature: [`card`]
//! (PTX) and [`shim`] (the host twin, which is also where misuse panics). A kernel contains no `asm!`, no intrinsics and
//! no pointer arithmetic on shared memory.

#[cfg(target_arch = "nvptx64")]
mod card;
#[cfg(target_arch = "nvptx64")]
pub use card::*;
#[cfg(not(target_arch = "nvptx64"))]
pub mod shim;
#[cfg(not(target_arch = "nvptx64"))]
pub use shim::words::*;

use crate::law::Num;

/// A 16-bit storage type of embeddings: what tensor cores multiply. Accumulation is always f32.
pub trait Half: Copy + 'static {
    /// Whether this is bf16 (else IEEE f16).
    const BF16: bool;

    /// Two numbers rounded to nearest even, the first in the low half.
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        if Self::BF16 { pack_bf16(low, high) } else { pack_f16(low, high) }
    }
    /// The two numbers of a word, the low half first.
    #[inline(always)]
    fn unpack(word: u32) -> [f32; 2] {
        if Self::BF16 { [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)] } else { unpack_f16(word) }
    }
    /// `acc += a b`, one m16n8k16 product of a warp: `a` row-major 16 x 16, `b` column-major 16 x 8.
    ///
    /// Lane l holds, of `acc`, rows l/4 and l/4 + 8, columns 2 (l mod 4) and the next.
    #[inline(always)]
    fn mma(acc: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        if Self::BF16 { mma_bf16(acc, a, b) } else { mma_f16(acc, a, b) }
    }
    /// [`mma`](Half::mma) of a warpgroup: 64 x 128 x 16, operands in shared memory, finished by `wgmma_wait`. `A_ALONG_TILE` and
    /// `B_ALONG_TILE` are 1 where an operand is stored with the tile's rows (columns) running fastest.
    ///
    /// # Safety
    /// Descriptors of live, fenced operands, not overwritten before `wgmma_wait`; all lanes of the warpgroup take part.
    #[inline(always)]
    unsafe fn wgmma_n128<const A_ALONG_TILE: u32, const B_ALONG_TILE: u32>(
        acc: &mut Accumulator<64>,
        a: u64,
        b: u64,
        accumulate: u32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if Self::BF16 {
                wgmma_n128_bf16::<A_ALONG_TILE, B_ALONG_TILE>(acc, a, b, accumulate)
            } else {
                wgmma_n128_f16::<A_ALONG_TILE, B_ALONG_TILE>(acc, a, b, accumulate)
            }
        }
    }
    /// [`mma`](Half::mma) of a warpgroup: 64 x 256 x 16, operands in shared memory, finished by `wgmma_wait`. `A_ALONG_TILE` and
    /// `B_ALONG_TILE` are 1 where an operand is stored with the tile's rows (columns) running fastest.
    ///
    /// # Safety
    /// Descriptors of live, fenced operands, not overwritten before `wgmma_wait`; all lanes of the warpgroup take part.
    #[inline(always)]
    unsafe fn wgmma_n256<const A_ALONG_TILE: u32, const B_ALONG_TILE: u32>(
        acc: &mut Accumulator<128>,
        a: u64,
        b: u64,
        accumulate: u32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if Self::BF16 {
                wgmma_n256_bf16::<A_ALONG_TILE, B_ALONG_TILE>(acc, a, b, accumulate)
            } else {
                wgmma_n256_f16::<A_ALONG_TILE, B_ALONG_TILE>(acc, a, b, accumulate)
            }
        }
    }
}

/// The upper half of an f32.
#[derive(Clone, Copy, Debug)]
pub struct Bf16;
/// IEEE binary16.
#[derive(Clone, Copy, Debug)]
pub struct F16;

impl Half for Bf16 {
    const BF16: bool = true;
}
impl Half for F16 {
    const BF16: bool = false;
}

/// A lane's f32 counted in octaves: its exponential is `2^x`, one instruction of the card. Logits arrive in octaves
/// because their scale already carries the factor log2(e).
#[derive(Clone, Copy, Debug)]
pub struct Octave(pub f32);

impl Num for Octave {
    const NATS: f32 = core::f32::consts::LN_2;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Octave(x)
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        Octave(self.0 + b.0)
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        Octave(self.0 - b.0)
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Octave(self.0 * b.0)
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Octave(self.0 * reciprocal(b.0))
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Octave(fma(self.0, b.0, c.0))
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        Octave(if self.0 > b.0 { self.0 } else { b.0 })
    }
    #[inline(always)]
    fn scale2(self, n: Self) -> Self {
        Octave(self.0 * exp2(n.0 - crate::law::MAGIC))
    }
    #[inline(always)]
    fn select_lt(self, b: Self, x: Self, y: Self) -> Self {
        if self.0 < b.0 { x } else { y }
    }
    #[inline(always)]
    fn exp(self) -> Self {
        Octave(exp2(self.0))
    }
    /// Relative error 4e-6: the series to 1/16, where the card's logarithm has as many digits left.
    #[inline(always)]
    fn ln_1p(self) -> Self {
        let t = self.0;
        let series = fma(t, fma(t, fma(t, fma(t, 0.2, -0.25), 1.0 / 3.0), -0.5), 1.0) * t;
        // Outside of the choice: instructions of the card are not moved into a branch, they make one.
        let logarithm = log2(1.0 + t) * core::f32::consts::LN_2;
        Octave(if t < 0.0625 { series } else { logarithm })
    }
}

/// Types that `load` and `store` move in one instruction, naturally aligned.
pub trait Word: Copy + 'static {
    /// Reads one from global memory.
    ///
    /// # Safety
    /// `at` is aligned and inside a live device allocation that no block writes during this launch, but for this thread.
    unsafe fn load(at: *const Self) -> Self;
    /// Writes one to global memory.
    ///
    /// # Safety
    /// `at` is aligned and inside a live device allocation; no other thread touches it during this launch.
    unsafe fn store(at: *mut Self, value: Self);
    /// Reads one from shared memory.
    ///
    /// # Safety
    /// `at` is aligned, inside the block's shared memory and written before, with a barrier between.
    unsafe fn load_shared(at: u32) -> Self;
    /// Writes one to shared memory.
    ///
    /// # Safety
    /// `at` is aligned and inside the block's shared memory; other threads' accesses are separated by barriers.
    unsafe fn store_shared(at: u32, value: Self);
}

/// [`Word::load`].
///
/// # Safety
/// As there.
#[inline(always)]
pub unsafe fn load<T: Word>(at: *const T) -> T {
    // SAFETY: the caller's promise.
    unsafe { T::load(at) }
}
/// [`Word::store`].
///
/// # Safety
/// As there.
#[inline(always)]
pub unsafe fn store<T: Word>(at: *mut T, value: T) {
    // SAFETY: the caller's promise.
    unsafe { T::store(at, value) }
}
/// [`Word::load_shared`].
///
/// # Safety
/// As there.
#[inline(always)]
pub unsafe fn load_shared<T: Word>(at: u32) -> T {
    // SAFETY: the caller's promise.
    unsafe { T::load_shared(at) }
}
/// [`Word::store_shared`].
///
/// # Safety
/// As there.
#[inline(always)]
pub unsafe fn store_shared<T: Word>(at: u32, value: T) {
    // SAFETY: the caller's promise.
    unsafe { T::store_shared(at, value) }
}

/// The sum over lanes that differ in the bits of `1..WIDTH`, in every one of them: one fixed tree of additions.
#[inline(always)]
pub fn sum_lanes(mut x: f32, width: u32) -> f32 {
    let mut step = 1;
    while step < width {
        x += shuffle_xor(x, step);
        step *= 2;
    }
    x
}

/// The largest over lanes that differ in the bits of `1..WIDTH`.
#[inline(always)]
pub fn max_lanes(mut x: f32, width: u32) -> f32 {
    let mut step = 1;
    while step < width {
        let other = shuffle_xor(x, step);
        x = if x > other { x } else { other };
        step *= 2;
    }
    x
}

/// `wgmma` operand in shared memory, 128-byte swizzle, k running fastest: 8-row groups lie 1024 bytes apart.
/// The next 16 k are `+ 2`.
#[inline(always)]
pub fn descriptor_k(at: u32) -> u64 {
    ((at as u64 & 0x3ffff) >> 4) | (1 << 16) | (64 << 32) | (1 << 62)
}

/// `wgmma` operand in shared memory, 128-byte swizzle, rows (or columns) of the product running fastest: blocks of 64 of
/// them lie `block` bytes apart, groups of 8 k 1024 bytes apart. The next 16 k are `+ 128`.
#[inline(always)]
pub fn descriptor_mn(at: u32, block: u32) -> u64 {
    ((at as u64 & 0x3ffff) >> 4) | (((block >> 4) as u64) << 16) | (64 << 32) | (1 << 62)
}
