//! Vector registers and the one micro-kernel: all of the CPU engine's `unsafe`.
//!
//! An algorithm is written once, as an [`Op`], over the [`Simd`] trait; [`Isa::run`] compiles it for each
//! instruction set and picks the one this machine has. The implementors of `Simd` are private to this
//! file, so `Isa::run` is the only way to reach them, and an [`Isa`] exists only after its CPU features
//! were detected: a value of the type is the proof that its instructions may be executed.
//!
//! Everything between `Isa::run` and the intrinsics is `inline(always)`: a function with
//! `target_feature` is never inlined into one without, and a call per vector would cost more than the work.

use crate::device::Real;
use kernels::law::Num;
use std::ops::Range;

/// An instruction set this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// All that this machine has, fastest first.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("avx2")
            {
                found.push(Isa(Kind::Avx512));
            }
            if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
                found.push(Isa(Kind::Avx2));
            }
        }
        found.push(Isa(Kind::Portable));
        found
    }

    /// The fastest.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    /// For people: `avx512`, `avx2+fma`, `portable`.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2+fma",
            Kind::Portable => "portable",
        }
    }

    /// Runs `op`, compiled for this instruction set.
    #[inline]
    pub fn run<O: Op>(self, op: O) -> O::Out {
        match self.0 {
            // SAFETY: `Isa::available` saw every feature that `avx512` enables.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { avx512(op) },
            // SAFETY: `Isa::available` saw every feature that `avx2` enables.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { avx2(op) },
            Kind::Portable => op.run::<Portable>(),
        }
    }
}

/// An algorithm over vectors of any width. `run` must be `inline(always)`.
pub trait Op {
    type Out;
    fn run<S: Simd>(self) -> Self::Out;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,fma,avx2")]
fn avx512<O: Op>(op: O) -> O::Out {
    op.run::<Avx512>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "fma,avx2")]
fn avx2<O: Op>(op: O) -> O::Out {
    op.run::<Avx2>()
}

/// A register of `LANES` numbers.
pub trait Vector<T>: Copy {
    const LANES: usize;
    /// The first `LANES` of `from`.
    fn load(from: &[T]) -> Self;
    /// Over the first `LANES` of `to`.
    fn store(self, to: &mut [T]);
    fn broadcast(x: T) -> Self;
    fn plus(self, b: Self) -> Self;
    fn minus(self, b: Self) -> Self;
    /// `self * b + c`.
    fn fma(self, b: Self, c: Self) -> Self;
    /// `if b > self { b } else { self }`, number by number.
    fn larger(self, b: Self) -> Self;
    /// `self` where `a < b`, else 0.
    fn where_lt(self, a: Self, b: Self) -> Self;
    /// `self` where `a == b`, else 0.
    fn where_eq(self, a: Self, b: Self) -> Self;
}

/// An instruction set's registers, and its micro-kernel's shape.
pub trait Simd {
    /// f32 registers, which also carry the scalar law.
    type F32: Vector<f32> + Num;
    type F64: Vector<f64>;

    /// `c[i, j] (+)= sum_k a[i, k] b[k, j]` for a panel `b`, see [`product`].
    fn panel<T: Lane, P: Multiply, const V: usize>(tile: Tile<'_, T>, c: &mut [T], add: bool);
}

/// Numbers that fill vector registers: f32 and f64.
pub trait Lane: Real {
    /// This number's register under `S`.
    type In<S: Simd>: Vector<Self>;
}

impl Lane for f32 {
    type In<S: Simd> = S::F32;
}

impl Lane for f64 {
    type In<S: Simd> = S::F64;
}

/// How a pair of numbers enters a sum of products.
pub trait Multiply {
    fn step<T, V: Vector<T>>(a: V, b: V, sum: V) -> V;
}

/// `kernels::law::Product::Inner`: `a b`.
pub struct Inner;
/// `kernels::law::Product::SquaredDistance`: `(a - b)^2`. Twice the work of expanding the square, and none of its cancellation.
pub struct SquaredDistance;

impl Multiply for Inner {
    #[inline(always)]
    fn step<T, V: Vector<T>>(a: V, b: V, sum: V) -> V {
        a.fma(b, sum)
    }
}

impl Multiply for SquaredDistance {
    #[inline(always)]
    fn step<T, V: Vector<T>>(a: V, b: V, sum: V) -> V {
        let d = a.minus(b);
        d.fma(d, sum)
    }
}

/// The widest panel of any instruction set: a row of C padded to a multiple of it suits them all.
pub const WIDEST: usize = 32;

/// A left operand: `a[i, k]` at `data[i * row + k * col]`, `rows` by `depth`.
#[derive(Clone, Copy)]
pub struct Left<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
    pub rows: usize,
    pub depth: usize,
}

/// A right operand: rows `first..first + depth` of all `total` rows that were packed together, see [`pack`].
#[derive(Clone, Copy)]
pub struct Right<'a, T> {
    pub packed: &'a [T],
    pub total: usize,
    pub first: usize,
}

/// A left operand against one packed panel `[depth, width]`, results `ldc` apart.
pub struct Tile<'a, T> {
    a: Left<'a, T>,
    panel: &'a [T],
    ldc: usize,
}

/// Terms summed in a register before they are added to C. Encoders and gradients: a panel's part stays in the
/// first-level cache.
pub const LONG: usize = 256;
/// Logits: short partial sums, because a logit's rounding error enters an exponential.
pub const SHORT: usize = 64;

/// `c (+)= a b` for `b` packed by [`pack`] or [`pack_transposed`]: `c[i, j]` at `c[i * ldc + j]`, with room for
/// `n` rounded up to whole registers in each row (the surplus columns receive products with zeros).
#[inline(always)]
pub fn product<S: Simd, T: Lane, P: Multiply, const STEP: usize>(
    a: Left<'_, T>,
    packed: &[T],
    n: usize,
    c: &mut [T],
    ldc: usize,
    add: bool,
) {
    product_part::<S, T, P, STEP>(a, Right { packed, total: a.depth, first: 0 }, n, c, ldc, add);
}

/// [`product`] with some rows of a packed operand.
#[inline(always)]
pub fn product_part<S: Simd, T: Lane, P: Multiply, const STEP: usize>(
    a: Left<'_, T>,
    b: Right<'_, T>,
    n: usize,
    c: &mut [T],
    ldc: usize,
    add: bool,
) {
    let lanes = <T::In<S> as Vector<T>>::LANES;
    let width = 2 * lanes;
    if a.depth == 0 {
        if !add {
            for row in c.chunks_mut(ldc).take(a.rows) {
                row[..n].fill(T::ZERO);
            }
        }
        return;
    }
    let total = a.depth;
    let mut k0 = 0;
    while k0 < total {
        let depth = STEP.min(total - k0);
        let a = Left { data: &a.data[k0 * a.col..], depth, ..a };
        let add = add || k0 > 0;
        let mut j = 0;
        while j < n {
            let w = if n - j > lanes { width } else { lanes };
            let start = j * b.total + (b.first + k0) * w;
            let tile = Tile { a, panel: &b.packed[start..start + depth * w], ldc };
            if w == width {
                S::panel::<T, P, 2>(tile, &mut c[j..], add);
            } else {
                S::panel::<T, P, 1>(tile, &mut c[j..], add);
            }
            j += w;
        }
        k0 += depth;
    }
}

/// Elements that hold a packed operand of `n` columns and `depth` rows on any instruction set.
pub fn packed_len(depth: usize, n: usize) -> usize {
    depth * n.next_multiple_of(WIDEST / 2)
}

/// Packs row-major `b` (`depth` rows, `n` columns, rows `ldb` apart) into panels.
#[inline(always)]
pub fn pack<S: Simd, T: Lane>(b: &[T], ldb: usize, depth: usize, n: usize, out: &mut [T]) {
    pack_part::<S, T>(b, ldb, n, 0..depth, depth, out);
}

/// Packs row-major `b` (`n` columns, rows `ldb` apart) into rows `range` of panels of `total` rows.
#[inline(always)]
pub fn pack_part<S: Simd, T: Lane>(b: &[T], ldb: usize, n: usize, range: Range<usize>, total: usize, out: &mut [T]) {
    let lanes = <T::In<S> as Vector<T>>::LANES;
    let mut j = 0;
    while j < n {
        let w = if n - j > lanes { 2 * lanes } else { lanes };
        let real = w.min(n - j);
        let panel = &mut out[j * total..][range.start * w..range.end * w];
        for (to, from) in panel.chunks_exact_mut(w).zip(b.chunks(ldb)) {
            let from = &from[j..j + real];
            if real == w {
                // Registers: a copy of a length unknown here would be a call.
                for (to, from) in to.chunks_exact_mut(lanes).zip(from.chunks_exact(lanes)) {
                    <T::In<S> as Vector<T>>::load(from).store(to);
                }
            } else {
                to[..real].copy_from_slice(from);
                to[real..].fill(T::ZERO);
            }
        }
        j += w;
    }
}

/// Packs the transpose of row-major `b` (`n` rows of `depth` numbers, `ldb` apart) into panels.
#[inline(always)]
pub fn pack_transposed<S: Simd, T: Lane>(b: &[T], ldb: usize, depth: usize, n: usize, out: &mut [T]) {
    let lanes = <T::In<S> as Vector<T>>::LANES;
    let mut j = 0;
    while j < n {
        let w = if n - j > lanes { 2 * lanes } else { lanes };
        let real = w.min(n - j);
        let panel = &mut out[j * depth..][..depth * w];
        if real < w {
            panel.fill(T::ZERO);
        }
        // A few columns of the panel at a time: their writes share cache lines.
        for k0 in (0..depth).step_by(16) {
            let k1 = depth.min(k0 + 16);
            for jj in 0..real {
                let row = &b[(j + jj) * ldb..][k0..k1];
                for (k, &x) in (k0..k1).zip(row) {
                    panel[k * w + jj] = x;
                }
            }
        }
        j += w;
    }
}

/// Asks for the cache line of `x`, which the micro-kernel adds to when its sums are done.
#[inline(always)]
fn prefetch<T>(x: &T) {
    // SAFETY: a prefetch reads nothing; SSE is part of x86-64.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(std::ptr::from_ref(x).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// `R` rows of C against one panel of `V` registers: the inner loop of everything.
#[inline(always)]
fn micro<S: Simd, T: Lane, P: Multiply, const R: usize, const V: usize>(
    tile: &Tile<'_, T>,
    first: usize,
    c: &mut [T],
    add: bool,
) {
    let lanes = <T::In<S> as Vector<T>>::LANES;
    let Tile { a, panel, ldc } = tile;
    let zero = <T::In<S> as Vector<T>>::broadcast(T::ZERO);
    let mut sum = [[zero; V]; R];
    let a0 = &a.data[first * a.row..];
    // The furthest element read below.
    assert!((R - 1) * a.row + (a.depth - 1) * a.col < a0.len() && panel.len() == a.depth * V * lanes);
    if add {
        for r in 0..R {
            let row = &c[(first + r) * ldc..][..V * lanes];
            prefetch(&row[0]);
            prefetch(&row[V * lanes - 1]);
        }
    }
    for (k, from) in panel.chunks_exact(V * lanes).enumerate() {
        // Loops, not closures: a closure has no target features, and what is not inlined into it is called.
        let mut b = [zero; V];
        for (b, from) in b.iter_mut().zip(from.chunks_exact(lanes)) {
            *b = <T::In<S> as Vector<T>>::load(from);
        }
        for (r, sum) in sum.iter_mut().enumerate() {
            // SAFETY: r < R and k < depth, so the index is at most that of the assertion above.
            let x = unsafe { *a0.get_unchecked(r * a.row + k * a.col) };
            let x = <T::In<S> as Vector<T>>::broadcast(x);
            for (sum, &b) in sum.iter_mut().zip(&b) {
                *sum = P::step(x, b, *sum);
            }
        }
    }
    for (r, sum) in sum.iter().enumerate() {
        let row = &mut c[(first + r) * ldc..][..V * lanes];
        for (&sum, to) in sum.iter().zip(row.chunks_exact_mut(lanes)) {
            let sum = if add { <T::In<S> as Vector<T>>::load(to).plus(sum) } else { sum };
            sum.store(to);
        }
    }
}

macro_rules! simd {
    ($name:ident, $f32:ty, $f64:ty, [$most:literal, $next:literal $(, $fewer:literal)*]) => {
        struct $name;
        impl Simd for $name {
            type F32 = $f32;
            type F64 = $f64;
            #[inline(always)]
            fn panel<T: Lane, P: Multiply, const V: usize>(tile: Tile<'_, T>, c: &mut [T], add: bool) {
                let rows = tile.a.rows;
                let mut i = 0;
                // One register a row: twice the rows for as many independent sums.
                while V == 1 && rows - i >= 2 * $most {
                    micro::<Self, T, P, { 2 * $most }, V>(&tile, i, c, add);
                    i += 2 * $most;
                }
                // Two of the second height keep the multipliers busier than one of the first and a remainder.
                let pair = 2 * $next;
                while rows - i >= $most && (pair <= $most || rows - i != pair) {
                    micro::<Self, T, P, $most, V>(&tile, i, c, add);
                    i += $most;
                }
                while rows - i >= $next {
                    micro::<Self, T, P, $next, V>(&tile, i, c, add);
                    i += $next;
                }
                $(while rows - i >= $fewer {
                    micro::<Self, T, P, $fewer, V>(&tile, i, c, add);
                    i += $fewer;
                })*
            }
        }
    };
}

// Accumulators (rows x 2), two of B and one broadcast fill the register file: 32, 16 and 16 registers. The second
// heights too have as many independent sums as hide a multiply-add's latency.
#[cfg(target_arch = "x86_64")]
simd!(Avx512, x86::Zmm, Pack<f64, 8>, [12, 8, 4, 1]);
#[cfg(target_arch = "x86_64")]
simd!(Avx2, x86::Ymm, Pack<f64, 4>, [6, 4, 2, 1]);
simd!(Portable, Pack<f32, 4>, Pack<f64, 2>, [4, 2, 1]);

/// A register as an array, left to the compiler: f64 everywhere, f32 where nothing better is known.
#[derive(Clone, Copy)]
struct Pack<T, const L: usize>([T; L]);

impl<T: Real, const L: usize> Vector<T> for Pack<T, L> {
    const LANES: usize = L;
    #[inline(always)]
    fn load(from: &[T]) -> Self {
        Pack(std::array::from_fn(|l| from[l]))
    }
    #[inline(always)]
    fn store(self, to: &mut [T]) {
        to[..L].copy_from_slice(&self.0);
    }
    #[inline(always)]
    fn broadcast(x: T) -> Self {
        Pack([x; L])
    }
    #[inline(always)]
    fn plus(self, b: Self) -> Self {
        Pack(std::array::from_fn(|l| self.0[l] + b.0[l]))
    }
    #[inline(always)]
    fn minus(self, b: Self) -> Self {
        Pack(std::array::from_fn(|l| self.0[l] - b.0[l]))
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Pack(std::array::from_fn(|l| self.0[l] * b.0[l] + c.0[l]))
    }
    #[inline(always)]
    fn larger(self, b: Self) -> Self {
        Pack(std::array::from_fn(|l| if b.0[l] > self.0[l] { b.0[l] } else { self.0[l] }))
    }
    #[inline(always)]
    fn where_lt(self, a: Self, b: Self) -> Self {
        Pack(std::array::from_fn(|l| if a.0[l] < b.0[l] { self.0[l] } else { T::ZERO }))
    }
    #[inline(always)]
    fn where_eq(self, a: Self, b: Self) -> Self {
        Pack(std::array::from_fn(|l| if a.0[l] == b.0[l] { self.0[l] } else { T::ZERO }))
    }
}

impl<const L: usize> Pack<f32, L> {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Pack(std::array::from_fn(|l| f(self.0[l], b.0[l])))
    }
}

impl<const L: usize> Num for Pack<f32, L> {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Pack([x; L])
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, Num::add)
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, Num::sub)
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, Num::mul)
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.zip(b, Num::div)
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        self.fma(b, c)
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.zip(b, Num::max)
    }
    #[inline(always)]
    fn scale2(self, n: Self) -> Self {
        self.zip(n, Num::scale2)
    }
    #[inline(always)]
    fn select_lt(self, b: Self, x: Self, y: Self) -> Self {
        Pack(std::array::from_fn(|l| self.0[l].select_lt(b.0[l], x.0[l], y.0[l])))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Registers of the x86-64 extensions. Their values come only from code that `Isa::run` entered.

    use super::{Num, Vector};
    use std::arch::x86_64::*;

    macro_rules! register {
        ($name:ident, $raw:ty, $lanes:literal, $load:ident, $store:ident, $set1:ident, $add:ident, $sub:ident,
         $mul:ident, $div:ident, $fma:ident, $max:ident) => {
            #[derive(Clone, Copy)]
            pub struct $name($raw);

            impl Vector<f32> for $name {
                const LANES: usize = $lanes;
                #[inline(always)]
                fn load(from: &[f32]) -> Self {
                    let from = &from[..$lanes];
                    // SAFETY: the slice holds LANES numbers; unaligned loads are allowed; CPU features as in the module's note.
                    $name(unsafe { $load(from.as_ptr()) })
                }
                #[inline(always)]
                fn store(self, to: &mut [f32]) {
                    let to = &mut to[..$lanes];
                    // SAFETY: the slice holds LANES numbers; unaligned stores are allowed; CPU features as in the module's note.
                    unsafe { $store(to.as_mut_ptr(), self.0) }
                }
                #[inline(always)]
                fn broadcast(x: f32) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { $set1(x) })
                }
                #[inline(always)]
                fn plus(self, b: Self) -> Self {
                    self.add(b)
                }
                #[inline(always)]
                fn minus(self, b: Self) -> Self {
                    self.sub(b)
                }
                #[inline(always)]
                fn fma(self, b: Self, c: Self) -> Self {
                    self.mul_add(b, c)
                }
                #[inline(always)]
                fn larger(self, b: Self) -> Self {
                    // SAFETY: CPU features as in the module's note. The second operand where they are not ordered.
                    $name(unsafe { $max(b.0, self.0) })
                }
                #[inline(always)]
                fn where_lt(self, a: Self, b: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { Self::where_raw::<_CMP_LT_OQ>(self.0, a.0, b.0) })
                }
                #[inline(always)]
                fn where_eq(self, a: Self, b: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { Self::where_raw::<_CMP_EQ_OQ>(self.0, a.0, b.0) })
                }
            }

            impl Num for $name {
                #[inline(always)]
                fn splat(x: f32) -> Self {
                    Self::broadcast(x)
                }
                #[inline(always)]
                fn add(self, b: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { $add(self.0, b.0) })
                }
                #[inline(always)]
                fn sub(self, b: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { $sub(self.0, b.0) })
                }
                #[inline(always)]
                fn mul(self, b: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { $mul(self.0, b.0) })
                }
                #[inline(always)]
                fn div(self, b: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { $div(self.0, b.0) })
                }
                #[inline(always)]
                fn mul_add(self, b: Self, c: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { $fma(self.0, b.0, c.0) })
                }
                #[inline(always)]
                fn max(self, b: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { $max(self.0, b.0) })
                }
                #[inline(always)]
                fn scale2(self, n: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { Self::scale2_raw(self.0, n.0) })
                }
                #[inline(always)]
                fn select_lt(self, b: Self, x: Self, y: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { Self::select_lt_raw(self.0, b.0, x.0, y.0) })
                }
                #[inline(always)]
                fn zero_lt(self, x: Self, low: Self) -> Self {
                    // SAFETY: CPU features as in the module's note.
                    $name(unsafe { Self::where_raw::<_CMP_NLT_UQ>(self.0, x.0, low.0) })
                }
            }
        };
    }

    register!(
        Zmm,
        __m512,
        16,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_set1_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_div_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps
    );
    register!(
        Ymm,
        __m256,
        8,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_set1_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_div_ps,
        _mm256_fmadd_ps,
        _mm256_max_ps
    );

    impl Zmm {
        /// # Safety
        /// Needs avx512f.
        #[inline(always)]
        unsafe fn scale2_raw(x: __m512, n: __m512) -> __m512 {
            // SAFETY: the caller's.
            unsafe {
                let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
                _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), n))
            }
        }
        /// # Safety
        /// Needs avx512f.
        #[inline(always)]
        unsafe fn select_lt_raw(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
            // SAFETY: the caller's.
            unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
        }
        /// # Safety
        /// Needs avx512f.
        #[inline(always)]
        unsafe fn where_raw<const CMP: i32>(y: __m512, a: __m512, b: __m512) -> __m512 {
            // SAFETY: the caller's.
            unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<CMP>(a, b), y) }
        }
    }

    impl Ymm {
        /// # Safety
        /// Needs avx2.
        #[inline(always)]
        unsafe fn scale2_raw(x: __m256, n: __m256) -> __m256 {
            // SAFETY: the caller's.
            unsafe {
                let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n))
            }
        }
        /// # Safety
        /// Needs avx2.
        #[inline(always)]
        unsafe fn select_lt_raw(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
            // SAFETY: the caller's.
            unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
        }
        /// # Safety
        /// Needs avx2.
        #[inline(always)]
        unsafe fn where_raw<const CMP: i32>(y: __m256, a: __m256, b: __m256) -> __m256 {
            // SAFETY: the caller's.
            unsafe { _mm256_and_ps(_mm256_cmp_ps::<CMP>(a, b), y) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    struct Check<'a, T> {
        a: Left<'a, T>,
        b: &'a [T],
        n: usize,
        transposed: bool,
        squared: bool,
    }

    impl<T: Lane> Op for Check<'_, T> {
        type Out = Vec<T>;
        #[inline(always)]
        fn run<S: Simd>(self) -> Vec<T> {
            let depth = self.a.depth;
            let ldc = self.n.next_multiple_of(WIDEST) + WIDEST;
            let mut packed = vec![T::from_f64(f64::NAN); packed_len(depth, self.n)];
            if self.transposed {
                pack_transposed::<S, T>(self.b, depth, depth, self.n, &mut packed);
            } else {
                pack::<S, T>(self.b, self.n, depth, self.n, &mut packed);
            }
            let mut c = vec![T::from_f64(f64::NAN); self.a.rows * ldc];
            for add in [false, true] {
                if self.squared {
                    product::<S, T, SquaredDistance, SHORT>(self.a, &packed, self.n, &mut c, ldc, add);
                } else {
                    product::<S, T, Inner, LONG>(self.a, &packed, self.n, &mut c, ldc, add);
                }
            }
            c.chunks(ldc).flat_map(|row| row[..self.n].to_vec()).collect()
        }
    }

    fn products_agree<T: Lane>(tolerance: f64) {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        let mut random =
            |n: usize| -> Vec<T> { (0..n).map(|_| T::from_f64(f64::from(rng.random_range(-1.0f32..1.0)))).collect() };
        for (m, n, k) in [(1, 1, 1), (2, 17, 3), (13, 33, 5), (29, 95, 64), (12, 32, 257), (5, 48, 600)] {
            let (a, b) = (random(m * k), random(k * n));
            for (at, bt, squared) in [(false, false, false), (true, true, false), (false, true, true)] {
                let (row, col) = if at { (1, m) } else { (k, 1) };
                let left = Left { data: &a, row, col, rows: m, depth: k };
                let want: Vec<f64> = (0..m * n)
                    .map(|ij| {
                        let (i, j) = (ij / n, ij % n);
                        // Twice: once set, once added.
                        2.0 * (0..k)
                            .map(|l| {
                                let x = a[i * row + l * col].to_f64();
                                let y = b[if bt { j * k + l } else { l * n + j }].to_f64();
                                if squared { (x - y) * (x - y) } else { x * y }
                            })
                            .sum::<f64>()
                    })
                    .collect();
                let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt();
                for isa in Isa::available() {
                    let got = isa.run(Check { a: left, b: &b, n, transposed: bt, squared });
                    let off = got.iter().zip(&want).map(|(g, w)| (g.to_f64() - w).powi(2)).sum::<f64>().sqrt();
                    assert!(off <= tolerance * norm, "{} {m}x{n}x{k} {at} {bt} {squared}: {off:e}", isa.name());
                }
            }
        }
    }

    // Rounding of sums of up to 600 terms: a few units in the last place. A lost or doubled term shows as 1e-2.
    #[test]
    fn products_agree_with_the_definition_in_f32() {
        products_agree::<f32>(1e-6);
    }
    #[test]
    fn products_agree_with_the_definition_in_f64() {
        products_agree::<f64>(1e-14);
    }
}
