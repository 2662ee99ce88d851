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
use half::bf16;
use kernels::law::Num;
use std::ops::Range;

/// An instruction set this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

/// `pairs`: with units that multiply pairs of bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512 {
        pairs: bool,
    },
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable {
        pairs: bool,
    },
}

impl Isa {
    /// All that this machine has, fastest first; last one that any machine has and that is for tests: bf16 units made of
    /// f32 ones.
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
                if is_x86_feature_detected!("avx512bf16") {
                    found.push(Isa(Kind::Avx512 { pairs: true }));
                }
                found.push(Isa(Kind::Avx512 { pairs: false }));
            }
            if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
                found.push(Isa(Kind::Avx2));
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            found.push(Isa(Kind::Neon));
        }
        found.extend([false, true].map(|pairs| Isa(Kind::Portable { pairs })));
        found
    }

    /// The fastest.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    /// For people: `avx512+bf16`, `avx512`, `avx2+fma`, `neon`, `portable`, `portable+bf16`.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 { pairs: true } => "avx512+bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 { pairs: false } => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2+fma",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
            Kind::Portable { pairs: false } => "portable",
            Kind::Portable { pairs: true } => "portable+bf16",
        }
    }

    /// Runs `op`, compiled for this instruction set.
    #[inline]
    pub fn run<O: Op>(self, op: O) -> O::Out {
        match self.0 {
            // SAFETY: `Isa::available` saw every feature that `avx512` enables.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 { .. } => unsafe { avx512(op) },
            // SAFETY: `Isa::available` saw every feature that `avx2` enables.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { avx2(op) },
            // SAFETY: `Isa::available` saw the feature that `neon` enables.
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => unsafe { neon(op) },
            Kind::Portable { .. } => op.run::<Portable>(),
        }
    }

    /// This instruction set as one with units that multiply pairs of bf16, if it has them.
    pub fn pairs(self) -> Option<PairIsa> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 { pairs: true } => Some(PairIsa(PairKind::Avx512)),
            Kind::Portable { pairs: true } => Some(PairIsa(PairKind::Portable)),
            _ => None,
        }
    }
}

/// An instruction set this machine has, with units that multiply pairs of bf16.
#[derive(Clone, Copy, Debug)]
pub struct PairIsa(PairKind);

#[derive(Clone, Copy, Debug)]
enum PairKind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    Portable,
}

impl PairIsa {
    /// Runs `op`, compiled for this instruction set.
    #[inline]
    pub fn run<O: PairOp>(self, op: O) -> O::Out {
        match self.0 {
            // SAFETY: `Isa::available` saw every feature that `avx512_pairs` enables.
            #[cfg(target_arch = "x86_64")]
            PairKind::Avx512 => unsafe { avx512_pairs(op) },
            PairKind::Portable => op.run::<Portable>(),
        }
    }
}

/// An algorithm over vectors of any width. `run` must be `inline(always)`.
pub trait Op {
    type Out;
    fn run<S: Simd>(self) -> Self::Out;
}

/// An [`Op`] that multiplies pairs of bf16.
pub trait PairOp {
    type Out;
    fn run<S: Pairs>(self) -> Self::Out;
}

/// A register of `LANES` operands.
pub trait Register<T>: Copy {
    const LANES: usize;
    /// The first `LANES` of `from`.
    fn load(from: &[T]) -> Self;
    fn broadcast(x: T) -> Self;
}

/// A register of numbers.
pub trait Vector<T>: Register<T> {
    /// Over the first `LANES` of `to`.
    fn store(self, to: &mut [T]);
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
    /// `if a < b { x } else { self }`, number by number, of a finite `self`.
    #[inline(always)]
    fn unless_lt(self, a: Self, b: Self, x: Self) -> Self {
        x.where_lt(a, b).plus(self.minus(self.where_lt(a, b)))
    }
    /// Both in turns, `[a_0, b_0, a_1, b_1, ..]`.
    fn interleave(self, b: Self) -> [Self; 2];
}

/// An instruction set's registers, and its micro-kernel's shape.
pub trait Simd {
    /// f32 registers, which also carry the scalar law.
    type F32: Vector<f32> + Num;
    type F64: Vector<f64>;
    /// Registers half as wide, if it has them: two of their multiplications at a time where one of the others.
    type Narrow: Simd;

    /// `c[i, j] (+)= sum_k a[i, k] b[k, j]` for a panel `b`, see [`product`].
    fn panel<T: Operand<Self>, P: Multiply<Self, T>, F: Finish<P::Sum>, const V: usize, const STEP: usize>(
        tile: Tile<'_, T>,
        c: &mut [P::Sum],
        add: bool,
        finish: F,
    ) where
        Self: Sized;

    /// `c[i, j] (+)= sum_k a[i, k] (b[k, j] - own[i, j])` for a panel `b`, see [`differences`].
    fn panel_apart<const V: usize>(tile: Tile<'_, f32>, own: Own<'_>, c: &mut [f32], add: bool)
    where
        Self: Sized;
}

/// An instruction set with units that multiply pairs of bf16.
pub trait Pairs: Simd {
    /// As many pairs as [`Simd::F32`] has numbers.
    type Pair: Register<Pair>;

    /// `sum + a_0 b_0 + a_1 b_1`, lane by lane. Subnormal numbers may count as zeros.
    fn dot(a: Self::Pair, b: Self::Pair, sum: Self::F32) -> Self::F32;
    /// Both numbers of every lane, rounded to nearest even.
    fn pair(low: Self::F32, high: Self::F32, to: &mut [Pair]);
    /// The numbers of two registers in their order, rounded to nearest even.
    fn halves(first: Self::F32, second: Self::F32, to: &mut [Pair]);
}

/// Two bf16, the first one in the lower half.
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Pair(u32);

impl Pair {
    pub fn new(low: bf16, high: bf16) -> Self {
        Pair(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16)
    }
    pub fn numbers(self) -> [f32; 2] {
        [f32::from_bits(self.0 << 16), f32::from_bits(self.0 & 0xffff_0000)]
    }
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

/// What the micro-kernel takes: f32, f64, or pairs of bf16.
pub trait Operand<S>: Copy + Default {
    type In: Register<Self>;
    /// Rows of a panel that are gone through before the next panel: so many stay in the first-level cache.
    const PART: usize;
}

impl<S: Simd, T: Lane> Operand<S> for T {
    type In = <T as Lane>::In<S>;
    const PART: usize = LONG;
}

impl<S: Pairs> Operand<S> for Pair {
    type In = S::Pair;
    const PART: usize = PAIRS;
}

/// How two operands enter a sum of products.
pub trait Multiply<S: Simd, T: Operand<S>> {
    type Sum: Lane;
    fn step(a: T::In, b: T::In, sum: <Self::Sum as Lane>::In<S>) -> <Self::Sum as Lane>::In<S>;
}

/// `kernels::law::Product::Inner`: `a b`.
pub struct Inner;
/// `kernels::law::Product::SquaredDistance`: `(a - b)^2`. Twice the work of expanding the square, and none of its cancellation.
pub struct SquaredDistance;

impl<S: Simd, T: Lane> Multiply<S, T> for Inner {
    type Sum = T;
    #[inline(always)]
    fn step(a: <T as Lane>::In<S>, b: <T as Lane>::In<S>, sum: <T as Lane>::In<S>) -> <T as Lane>::In<S> {
        a.fma(b, sum)
    }
}

impl<S: Pairs> Multiply<S, Pair> for Inner {
    type Sum = f32;
    #[inline(always)]
    fn step(a: S::Pair, b: S::Pair, sum: S::F32) -> S::F32 {
        S::dot(a, b, sum)
    }
}

impl<S: Simd, T: Lane> Multiply<S, T> for SquaredDistance {
    type Sum = T;
    #[inline(always)]
    fn step(a: <T as Lane>::In<S>, b: <T as Lane>::In<S>, sum: <T as Lane>::In<S>) -> <T as Lane>::In<S> {
        let d = a.minus(b);
        d.fma(d, sum)
    }
}

/// What becomes of a product's sums before they are stored.
pub trait Finish<T: Lane>: Copy {
    /// `R` rows from row `i` on, `V` registers from column `j` on.
    fn finish<S: Simd, const R: usize, const V: usize>(self, sums: &mut [[T::In<S>; V]; R], i: usize, j: usize);
}

/// Nothing.
#[derive(Clone, Copy)]
pub struct AsIs;

impl<T: Lane> Finish<T> for AsIs {
    #[inline(always)]
    fn finish<S: Simd, const R: usize, const V: usize>(self, _: &mut [[T::In<S>; V]; R], _: usize, _: usize) {}
}

/// `sum rows[i] cols[j] + offset[j]`; `cols` and `offset` hold whole registers.
#[derive(Clone, Copy)]
pub struct Affine<'a> {
    pub rows: &'a [f32],
    pub cols: &'a [f32],
    pub offset: &'a [f32],
}

impl Finish<f32> for Affine<'_> {
    #[expect(clippy::needless_range_loop, reason = "adapters of iterators are calls where a compiler inlines none")]
    #[inline(always)]
    fn finish<S: Simd, const R: usize, const V: usize>(self, sums: &mut [[S::F32; V]; R], i: usize, j: usize) {
        let lanes = <S::F32 as Register<f32>>::LANES;
        for v in 0..V {
            let at = j + v * lanes;
            let (col, offset) = (S::F32::load(&self.cols[at..]), S::F32::load(&self.offset[at..]));
            for r in 0..R {
                sums[r][v] = sums[r][v].fma(col.mul(S::F32::splat(self.rows[i + r])), offset);
            }
        }
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

/// A left operand against one packed panel `[depth, width]`, results `ldc` apart from column `first` on.
pub struct Tile<'a, T> {
    a: Left<'a, T>,
    panel: &'a [T],
    ldc: usize,
    first: usize,
}

/// Terms summed before they are added to others. For encoders and gradients: as many as a panel's part has.
pub const LONG: usize = 256;
/// For logits: short partial sums, because a logit's rounding error enters an exponential.
pub const SHORT: usize = 64;
/// For pairs, of two terms each: half of the first-level cache is enough.
pub const PAIRS: usize = 128;

/// `c (+)= a b` for `b` packed by [`pack`] or [`pack_transposed`]: `c[i, j]` at `c[i * ldc + j]`, with room for
/// `n` rounded up to whole registers in each row (the surplus columns receive products with zeros).
#[inline(always)]
pub fn product<S: Simd, T: Operand<S>, P: Multiply<S, T>, const STEP: usize>(
    a: Left<'_, T>,
    packed: &[T],
    n: usize,
    c: &mut [P::Sum],
    ldc: usize,
    add: bool,
) {
    product_part::<S, T, P, AsIs, STEP>(a, Right { packed, total: a.depth, first: 0 }, n, c, ldc, add, AsIs);
}

/// [`product`] with some rows of a packed operand, and a finish.
#[inline(always)]
pub fn product_part<S: Simd, T: Operand<S>, P: Multiply<S, T>, F: Finish<P::Sum>, const STEP: usize>(
    a: Left<'_, T>,
    b: Right<'_, T>,
    n: usize,
    c: &mut [P::Sum],
    ldc: usize,
    add: bool,
    finish: F,
) {
    let lanes = <T::In as Register<T>>::LANES;
    let width = 2 * lanes;
    if a.depth == 0 {
        if !add {
            for row in c.chunks_mut(ldc).take(a.rows) {
                row[..n].fill(P::Sum::ZERO);
            }
        }
        return;
    }
    let total = a.depth;
    let mut k0 = 0;
    while k0 < total {
        let depth = T::PART.min(total - k0);
        let a = Left { data: &a.data[k0 * a.col..], depth, ..a };
        let add = add || k0 > 0;
        let last = k0 + depth == total;
        let mut j = 0;
        while j < n {
            let w = if n - j > lanes { width } else { lanes };
            let start = j * b.total + (b.first + k0) * w;
            let tile = Tile { a, panel: &b.packed[start..start + depth * w], ldc, first: j };
            let c = &mut c[j..];
            match (w == width, last) {
                (true, true) => S::panel::<T, P, F, 2, STEP>(tile, c, add, finish),
                (true, false) => S::panel::<T, P, AsIs, 2, STEP>(tile, c, add, AsIs),
                (false, true) => S::panel::<T, P, F, 1, STEP>(tile, c, add, finish),
                (false, false) => S::panel::<T, P, AsIs, 1, STEP>(tile, c, add, AsIs),
            }
            j += w;
        }
        k0 += depth;
    }
}

/// What differences are taken from: `own[i, j]` at `data[i * stride + j]`, whole registers of it.
#[derive(Clone, Copy)]
pub struct Own<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// `c[i, j] (+)= sum_k a[i, k] (b[k, j] - own[i, j])`, for `b` and `c` as in [`product`].
#[inline(always)]
pub fn differences<S: Simd>(
    a: Left<'_, f32>,
    b: Right<'_, f32>,
    own: Own<'_>,
    n: usize,
    c: &mut [f32],
    ldc: usize,
    add: bool,
) {
    let lanes = <S::F32 as Register<f32>>::LANES;
    for k0 in (0..a.depth).step_by(LONG) {
        let depth = LONG.min(a.depth - k0);
        let a = Left { data: &a.data[k0 * a.col..], depth, ..a };
        let add = add || k0 > 0;
        let mut j = 0;
        while j < n {
            let w = if n - j > lanes { 2 * lanes } else { lanes };
            let start = j * b.total + (b.first + k0) * w;
            let tile = Tile { a, panel: &b.packed[start..start + depth * w], ldc, first: j };
            let (own, c) = (Own { data: &own.data[j..], ..own }, &mut c[j..]);
            if w > lanes {
                S::panel_apart::<2>(tile, own, c, add)
            } else {
                S::panel_apart::<1>(tile, own, c, add)
            }
            j += w;
        }
    }
}

/// The sum of the first `lanes` numbers, a power of two, by halves: in order, each addition would wait for the one before.
#[inline(always)]
pub fn sum_by_halves<T: Lane, const N: usize>(numbers: &mut [T; N], lanes: usize) -> T {
    let mut half = lanes / 2;
    while half > 0 {
        for i in 0..half {
            numbers[i] += numbers[i + half];
        }
        half /= 2;
    }
    numbers[0]
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
    let lanes = <<T as Lane>::In<S> as Register<T>>::LANES;
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
                    <<T as Lane>::In<S> as Register<T>>::load(from).store(to);
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
pub fn pack_transposed<S: Simd, T: Operand<S>>(b: &[T], ldb: usize, depth: usize, n: usize, out: &mut [T]) {
    let lanes = <T::In as Register<T>>::LANES;
    let mut j = 0;
    while j < n {
        let w = if n - j > lanes { 2 * lanes } else { lanes };
        let real = w.min(n - j);
        let panel = &mut out[j * depth..][..depth * w];
        if real < w {
            panel.fill(T::default());
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

/// Packs row-major bf16 `b` (`n` columns, rows `ldb` apart) into rows `range` of panels of `total` rows of pairs: a pair is
/// two rows' numbers, the last one's second a zero where there is no row.
#[inline(always)]
pub fn pack_pairs<S: Pairs>(b: &[bf16], ldb: usize, n: usize, range: Range<usize>, total: usize, out: &mut [Pair]) {
    let lanes = <S::F32 as Register<f32>>::LANES;
    let mut j = 0;
    while j < n {
        let w = if n - j > lanes { 2 * lanes } else { lanes };
        let real = w.min(n - j);
        let panel = &mut out[j * total..][range.start * w..range.end * w];
        for (to, rows) in panel.chunks_exact_mut(w).zip(b.chunks(2 * ldb)) {
            let low = &rows[j..j + real];
            if let Some(high) = rows.get(ldb + j..ldb + j + real) {
                to.iter_mut().zip(low.iter().zip(high)).for_each(|(to, (&low, &high))| *to = Pair::new(low, high));
            } else {
                to.iter_mut().zip(low).for_each(|(to, &low)| *to = Pair::new(low, bf16::ZERO));
            }
            to[real..].fill(Pair::default());
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

/// Whether all of the first `rows` x `depth` elements that lie as those of `a` are within `data`, by the furthest of them:
/// in numbers so wide that none wraps.
#[inline(always)]
fn holds<T>(data: &[T], a: &Left<'_, T>, rows: usize, depth: usize) -> bool {
    let last = |count: usize, apart: usize| (count as u128 - 1) * apart as u128;
    rows > 0 && depth > 0 && last(rows, a.row) + last(depth, a.col) < data.len() as u128
}

/// Sums of the products of `R` rows, which begin with `data` and lie as those of `a`, with some rows of a panel of `V`
/// registers: the inner loop of everything.
#[expect(clippy::needless_range_loop, reason = "adapters of iterators are calls where a compiler inlines none")]
#[inline(always)]
fn sums<S: Simd, T: Operand<S>, P: Multiply<S, T>, const R: usize, const V: usize>(
    data: &[T],
    a: &Left<'_, T>,
    panel: &[T],
) -> [[SumOf<S, T, P>; V]; R] {
    let lanes = <T::In as Register<T>>::LANES;
    let mut sum = [[<SumOf<S, T, P> as Register<P::Sum>>::broadcast(P::Sum::ZERO); V]; R];
    // What is read below.
    assert!(holds(data, a, R, panel.len() / (V * lanes)));
    for (k, from) in panel.chunks_exact(V * lanes).enumerate() {
        // Loops over indices here and below: a closure has no target features, and what is not inlined into it is called. So
        // are adapters of iterators, in programs built without thin local LTO.
        let mut b = [T::In::broadcast(T::default()); V];
        for v in 0..V {
            b[v] = T::In::load(&from[v * lanes..]);
        }
        for r in 0..R {
            // SAFETY: r < R and k is below the panel's rows: one of the elements of the assertion above.
            let x = unsafe { *data.get_unchecked(r * a.row + k * a.col) };
            let x = T::In::broadcast(x);
            for v in 0..V {
                sum[r][v] = P::step(x, b[v], sum[r][v]);
            }
        }
    }
    sum
}

/// `R` rows of C against one panel of `V` registers, `STEP` terms a partial sum.
#[inline(always)]
fn micro<
    S: Simd,
    T: Operand<S>,
    P: Multiply<S, T>,
    F: Finish<P::Sum>,
    const R: usize,
    const V: usize,
    const STEP: usize,
>(
    tile: &Tile<'_, T>,
    first: usize,
    c: &mut [P::Sum],
    add: bool,
    finish: F,
) {
    let lanes = <T::In as Register<T>>::LANES;
    let Tile { a, panel, ldc, first: column } = tile;
    let mut a0 = &a.data[first * a.row..];
    assert!(panel.len() == a.depth * V * lanes);
    if add {
        for r in 0..R {
            let row = &c[(first + r) * ldc..][..V * lanes];
            prefetch(&row[0]);
            prefetch(&row[V * lanes - 1]);
        }
    }
    let first_part = if STEP < T::PART { panel.len().min(STEP * V * lanes) } else { panel.len() };
    let mut sum = sums::<S, T, P, R, V>(a0, a, &panel[..first_part]);
    if STEP < T::PART {
        for part in panel[first_part..].chunks(STEP * V * lanes) {
            a0 = &a0[STEP * a.col..];
            let more = sums::<S, T, P, R, V>(a0, a, part);
            for r in 0..R {
                for v in 0..V {
                    sum[r][v] = sum[r][v].plus(more[r][v]);
                }
            }
        }
    }
    if add {
        for r in 0..R {
            let row = &c[(first + r) * ldc..][..V * lanes];
            for v in 0..V {
                sum[r][v] = <SumOf<S, T, P> as Register<P::Sum>>::load(&row[v * lanes..]).plus(sum[r][v]);
            }
        }
    }
    finish.finish::<S, R, V>(&mut sum, first, *column);
    for r in 0..R {
        let row = &mut c[(first + r) * ldc..][..V * lanes];
        for v in 0..V {
            sum[r][v].store(&mut row[v * lanes..]);
        }
    }
}

/// [`micro`] of differences, whose own numbers stay in registers.
#[expect(clippy::needless_range_loop, reason = "adapters of iterators are calls where a compiler inlines none")]
#[inline(always)]
fn micro_apart<S: Simd, const R: usize, const V: usize>(
    tile: &Tile<'_, f32>,
    own: Own<'_>,
    first: usize,
    c: &mut [f32],
    add: bool,
) {
    let lanes = <S::F32 as Register<f32>>::LANES;
    let Tile { a, panel, ldc, .. } = tile;
    let mut sum = [[S::F32::broadcast(0.0); V]; R];
    let mut from = sum;
    for r in 0..R {
        let row = &own.data[(first + r) * own.stride..][..V * lanes];
        for v in 0..V {
            from[r][v] = S::F32::load(&row[v * lanes..]);
        }
    }
    let a0 = &a.data[first * a.row..];
    // What is read below.
    assert!(holds(a0, a, R, a.depth) && panel.len() == a.depth * V * lanes);
    for (k, row) in panel.chunks_exact(V * lanes).enumerate() {
        let mut b = [S::F32::broadcast(0.0); V];
        for v in 0..V {
            b[v] = S::F32::load(&row[v * lanes..]);
        }
        for r in 0..R {
            // SAFETY: r < R and k < depth: one of the elements of the assertion above.
            let x = S::F32::broadcast(unsafe { *a0.get_unchecked(r * a.row + k * a.col) });
            for v in 0..V {
                sum[r][v] = x.fma(b[v].minus(from[r][v]), sum[r][v]);
            }
        }
    }
    for r in 0..R {
        let row = &mut c[(first + r) * ldc..][..V * lanes];
        for v in 0..V {
            let to = &mut row[v * lanes..];
            (if add { S::F32::load(to).plus(sum[r][v]) } else { sum[r][v] }).store(to);
        }
    }
}

/// The register of a product's sums.
type SumOf<S, T, P> = <<P as Multiply<S, T>>::Sum as Lane>::In<S>;

macro_rules! simd {
    ($name:ident, [$($entry:ident $op:ident $features:literal)?], $f32:ty, $f64:ty, $narrow:ty, [$most:literal, $next:literal $(, $fewer:literal)*]) => {
        struct $name;
        $(
            #[target_feature(enable = $features)]
            fn $entry<O: $op>(op: O) -> O::Out {
                op.run::<$name>()
            }
        )?
        impl Simd for $name {
            type F32 = $f32;
            type F64 = $f64;
            type Narrow = $narrow;
            #[inline(always)]
            fn panel<T: Operand<Self>, P: Multiply<Self, T>, F: Finish<P::Sum>, const V: usize, const STEP: usize>(
                tile: Tile<'_, T>,
                c: &mut [P::Sum],
                add: bool,
                finish: F,
            ) {
                // Compiled once for all products of a kind, and not into each of them: a panel is work enough for a call,
                // and its micro-kernels are most of the code.
                $(#[target_feature(enable = $features)])?
                #[inline(never)]
                fn apart<T: Operand<$name>, P: Multiply<$name, T>, F: Finish<P::Sum>, const V: usize, const STEP: usize>(
                    tile: &Tile<'_, T>,
                    c: &mut [P::Sum],
                    add: bool,
                    finish: F,
                ) {
                    let rows = tile.a.rows;
                    let mut i = 0;
                    // One register a row: twice the rows for as many independent sums.
                    while V == 1 && rows - i >= 2 * $most {
                        micro::<$name, T, P, F, { 2 * $most }, V, STEP>(tile, i, c, add, finish);
                        i += 2 * $most;
                    }
                    // Two of the second height keep the multipliers busier than one of the first and a remainder.
                    let pair = 2 * $next;
                    while rows - i >= $most && (pair <= $most || rows - i != pair) {
                        micro::<$name, T, P, F, $most, V, STEP>(tile, i, c, add, finish);
                        i += $most;
                    }
                    while rows - i >= $next {
                        micro::<$name, T, P, F, $next, V, STEP>(tile, i, c, add, finish);
                        i += $next;
                    }
                    $(while rows - i >= $fewer {
                        micro::<$name, T, P, F, $fewer, V, STEP>(tile, i, c, add, finish);
                        i += $fewer;
                    })*
                }
                // SAFETY: code of this type runs only within `Isa::run` or `PairIsa::run` of an instruction set that has these
                // features (a larger one where this is its `Narrow`), and those exist only where the CPU has them; without any
                // there is nothing to have.
                #[allow(unused_unsafe, reason = "not every instruction set asks for features")]
                unsafe {
                    apart::<T, P, F, V, STEP>(&tile, c, add, finish);
                }
            }
            #[inline(always)]
            fn panel_apart<const V: usize>(tile: Tile<'_, f32>, own: Own<'_>, c: &mut [f32], add: bool) {
                $(#[target_feature(enable = $features)])?
                #[inline(never)]
                fn once<const V: usize>(tile: &Tile<'_, f32>, own: Own<'_>, c: &mut [f32], add: bool) {
                    /// Half of the registers that hold sums hold what is subtracted.
                    const HALF: usize = $most / 2;
                    let rows = tile.a.rows;
                    let mut i = 0;
                    while rows - i >= HALF {
                        micro_apart::<$name, HALF, V>(tile, own, i, c, add);
                        i += HALF;
                    }
                    while i < rows {
                        micro_apart::<$name, 1, V>(tile, own, i, c, add);
                        i += 1;
                    }
                }
                // SAFETY: as in `panel`.
                #[allow(unused_unsafe, reason = "not every instruction set asks for features")]
                unsafe {
                    once::<V>(&tile, own, c, add);
                }
            }
        }
    };
}

// Accumulators (rows x 2), two of B and one broadcast fill the register file: 32 registers, of AVX2 and unknown ones 16. The second
// heights too have as many independent sums as hide a multiply-add's latency.
#[cfg(target_arch = "x86_64")]
simd!(Avx512, [avx512 Op "avx512f,avx512vl,avx512dq,avx512bw,fma,avx2"], x86::Zmm, Pack<f64, 8>, Avx2, [12, 8, 4, 1]);
#[cfg(target_arch = "x86_64")]
simd!(Avx512Pairs, [avx512_pairs PairOp "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,fma,avx2"], x86::Zmm, Pack<f64, 8>, Avx2, [12, 8, 4, 1]);
#[cfg(target_arch = "x86_64")]
simd!(Avx2, [avx2 Op "fma,avx2"], x86::Ymm, Pack<f64, 4>, Avx2, [6, 4, 2, 1]);
#[cfg(target_arch = "aarch64")]
simd!(Neon, [neon Op "neon"], arm::Quad, Pack<f64, 2>, Neon, [12, 8, 4, 1]);
simd!(Portable, [], Pack<f32, 4>, Pack<f64, 2>, Portable, [4, 2, 1]);

#[cfg(target_arch = "x86_64")]
impl Pairs for Avx512Pairs {
    type Pair = x86::ZmmPairs;
    #[inline(always)]
    fn dot(a: x86::ZmmPairs, b: x86::ZmmPairs, sum: x86::Zmm) -> x86::Zmm {
        // SAFETY: code of this type runs only within `PairIsa::run`, which has seen that the CPU has avx512bf16.
        unsafe { a.dot(b, sum) }
    }
    #[inline(always)]
    fn pair(low: x86::Zmm, high: x86::Zmm, to: &mut [Pair]) {
        // SAFETY: code of this type runs only within `PairIsa::run`, which has seen that the CPU has avx512bf16.
        unsafe { low.pair(high) }.store(to);
    }
    #[inline(always)]
    fn halves(first: x86::Zmm, second: x86::Zmm, to: &mut [Pair]) {
        // SAFETY: code of this type runs only within `PairIsa::run`, which has seen that the CPU has avx512bf16.
        unsafe { first.halves(second) }.store(to);
    }
}

impl Pairs for Portable {
    type Pair = Pack<Pair, 4>;
    #[inline(always)]
    fn dot(a: Pack<Pair, 4>, b: Pack<Pair, 4>, sum: Pack<f32, 4>) -> Pack<f32, 4> {
        Pack(std::array::from_fn(|l| {
            let ([a0, a1], [b0, b1]) = (a.0[l].numbers(), b.0[l].numbers());
            sum.0[l] + a0 * b0 + a1 * b1
        }))
    }
    #[inline(always)]
    fn pair(low: Pack<f32, 4>, high: Pack<f32, 4>, to: &mut [Pair]) {
        for (to, (&low, &high)) in to[..4].iter_mut().zip(low.0.iter().zip(&high.0)) {
            *to = Pair::new(bf16::from_f32(low), bf16::from_f32(high));
        }
    }
    #[inline(always)]
    fn halves(first: Pack<f32, 4>, second: Pack<f32, 4>, to: &mut [Pair]) {
        let numbers = first.0.chunks_exact(2).chain(second.0.chunks_exact(2));
        for (to, pair) in to[..4].iter_mut().zip(numbers) {
            *to = Pair::new(bf16::from_f32(pair[0]), bf16::from_f32(pair[1]));
        }
    }
}

/// A register as an array, left to the compiler: f64 everywhere, f32 where nothing better is known.
#[derive(Clone, Copy)]
struct Pack<T, const L: usize>([T; L]);

impl<T: Copy, const L: usize> Register<T> for Pack<T, L> {
    const LANES: usize = L;
    #[inline(always)]
    fn load(from: &[T]) -> Self {
        Pack(std::array::from_fn(|l| from[l]))
    }
    #[inline(always)]
    fn broadcast(x: T) -> Self {
        Pack([x; L])
    }
}

impl<T: Real, const L: usize> Vector<T> for Pack<T, L> {
    #[inline(always)]
    fn store(self, to: &mut [T]) {
        to[..L].copy_from_slice(&self.0);
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
    #[inline(always)]
    fn interleave(self, b: Self) -> [Self; 2] {
        [0, L / 2].map(|half| Pack(std::array::from_fn(|l| [self, b][l % 2].0[half + l / 2])))
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

/// A register of f32 by its intrinsics; `max` is the second operand where they are not ordered. What differs more than in
/// names is the type's own: `where_raw`, `select_lt_raw`, `scale2_raw` and `interleave_raw`; and the module's: which numbers
/// `LT`, `EQ` and `NOT_LT` mean a comparison to `where_raw`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! register {
    ($name:ident, $raw:ty, $lanes:literal, $load:ident, $store:ident, $set1:ident, $add:ident, $sub:ident,
     $mul:ident, $div:ident, $fma:ident, $max:ident) => {
        #[derive(Clone, Copy)]
        pub struct $name($raw);

        impl Register<f32> for $name {
            const LANES: usize = $lanes;
            #[inline(always)]
            fn load(from: &[f32]) -> Self {
                let from = &from[..$lanes];
                // SAFETY: the slice holds LANES numbers; unaligned loads are allowed; CPU features as in the module's note.
                $name(unsafe { $load(from.as_ptr()) })
            }
            #[inline(always)]
            fn broadcast(x: f32) -> Self {
                // SAFETY: CPU features as in the module's note.
                $name(unsafe { $set1(x) })
            }
        }

        impl Vector<f32> for $name {
            #[inline(always)]
            fn store(self, to: &mut [f32]) {
                let to = &mut to[..$lanes];
                // SAFETY: the slice holds LANES numbers; unaligned stores are allowed; CPU features as in the module's note.
                unsafe { $store(to.as_mut_ptr(), self.0) }
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
                $name(unsafe { Self::where_raw::<LT>(self.0, a.0, b.0) })
            }
            #[inline(always)]
            fn where_eq(self, a: Self, b: Self) -> Self {
                // SAFETY: CPU features as in the module's note.
                $name(unsafe { Self::where_raw::<EQ>(self.0, a.0, b.0) })
            }
            #[inline(always)]
            fn interleave(self, b: Self) -> [Self; 2] {
                // SAFETY: CPU features as in the module's note.
                unsafe { Self::interleave_raw(self.0, b.0) }.map($name)
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
                $name(unsafe { Self::where_raw::<NOT_LT>(self.0, x.0, low.0) })
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Registers of the x86-64 extensions. Their values come only from code that `Isa::run` or `PairIsa::run` entered, which
    //! have seen that the CPU has their features: avx2 and fma for [`Ymm`], avx512f, avx512bw and avx512vl for [`Zmm`].

    use super::{Num, Pair, Register, Vector};
    use std::arch::x86_64::*;

    const LT: i32 = _CMP_LT_OQ;
    const EQ: i32 = _CMP_EQ_OQ;
    const NOT_LT: i32 = _CMP_NLT_UQ;

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
        /// # Safety
        /// Needs avx512f.
        #[inline(always)]
        unsafe fn interleave_raw(a: __m512, b: __m512) -> [__m512; 2] {
            // SAFETY: the caller's.
            unsafe {
                let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
                [_mm512_permutex2var_ps(a, first, b), _mm512_permutex2var_ps(a, second, b)]
            }
        }
    }

    /// 16 pairs of bf16.
    #[derive(Clone, Copy)]
    pub struct ZmmPairs(__m512i);

    impl Register<Pair> for ZmmPairs {
        const LANES: usize = 16;
        #[inline(always)]
        fn load(from: &[Pair]) -> Self {
            let from = &from[..16];
            // SAFETY: the slice holds 64 bytes; unaligned loads are allowed; CPU features as in the module's note.
            ZmmPairs(unsafe { _mm512_loadu_si512(from.as_ptr().cast()) })
        }
        #[inline(always)]
        fn broadcast(x: Pair) -> Self {
            // SAFETY: CPU features as in the module's note.
            ZmmPairs(unsafe { _mm512_set1_epi32(x.0.cast_signed()) })
        }
    }

    impl ZmmPairs {
        /// `sum + a_0 b_0 + a_1 b_1`.
        ///
        /// # Safety
        /// Needs avx512bf16.
        #[inline(always)]
        pub unsafe fn dot(self, b: Self, sum: Zmm) -> Zmm {
            // SAFETY: both types are 512 bits of which all values are valid.
            let (a, b) = unsafe {
                (std::mem::transmute::<__m512i, __m512bh>(self.0), std::mem::transmute::<__m512i, __m512bh>(b.0))
            };
            // SAFETY: the caller's.
            Zmm(unsafe { _mm512_dpbf16_ps(sum.0, a, b) })
        }
        #[inline(always)]
        pub fn store(self, to: &mut [Pair]) {
            let to = &mut to[..16];
            // SAFETY: the slice holds 64 bytes; unaligned stores are allowed; CPU features as in the module's note.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), self.0) }
        }
    }

    impl Zmm {
        /// 32 numbers in their order, as bf16.
        ///
        /// # Safety
        /// Needs avx512bf16.
        #[inline(always)]
        pub unsafe fn halves(self, second: Self) -> ZmmPairs {
            // SAFETY: both types are 512 bits of which all values are valid; CPU features are the caller's.
            ZmmPairs(unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second.0, self.0)) })
        }
        /// A number of each register in every lane, as bf16.
        ///
        /// # Safety
        /// Needs avx512bf16.
        #[inline(always)]
        pub unsafe fn pair(self, high: Self) -> ZmmPairs {
            /// Which of the 32 numbers of two registers come one after another.
            const ORDER: [u16; 32] = {
                let mut order = [0; 32];
                let mut i = 0;
                while i < 32 {
                    order[i] = (i / 2 + 16 * (i % 2)) as u16;
                    i += 1;
                }
                order
            };
            // SAFETY: `ORDER` holds 64 bytes; unaligned loads are allowed; avx512bf16 is the caller's, the rest as in the
            // module's note.
            ZmmPairs(unsafe {
                _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), self.halves(high).0)
            })
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
        /// # Safety
        /// Needs avx2.
        #[inline(always)]
        unsafe fn interleave_raw(a: __m256, b: __m256) -> [__m256; 2] {
            // SAFETY: the caller's.
            unsafe {
                // Of each half register.
                let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)]
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    //! Registers of NEON. Their values come only from code that `Isa::run` entered.

    use super::{Num, Register, Vector};
    use std::arch::aarch64::*;

    const LT: i32 = 0;
    const EQ: i32 = 1;
    const NOT_LT: i32 = 2;

    register!(
        Quad,
        float32x4_t,
        4,
        vld1q_f32,
        vst1q_f32,
        vdupq_n_f32,
        vaddq_f32,
        vsubq_f32,
        vmulq_f32,
        vdivq_f32,
        fma,
        max
    );

    /// # Safety
    /// Needs neon.
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: the caller's.
        unsafe { vfmaq_f32(c, a, b) }
    }
    /// # Safety
    /// Needs neon.
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the caller's. FMAX would make NaN of a NaN on either side.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }

    impl Quad {
        /// # Safety
        /// Needs neon.
        #[inline(always)]
        unsafe fn where_raw<const CMP: i32>(y: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
            // SAFETY: the caller's.
            unsafe {
                let mask = match CMP {
                    LT => vcltq_f32(a, b),
                    EQ => vceqq_f32(a, b),
                    _ => vmvnq_u32(vcltq_f32(a, b)),
                };
                vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(y), mask))
            }
        }
        /// # Safety
        /// Needs neon.
        #[inline(always)]
        unsafe fn select_lt_raw(a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t {
            // SAFETY: the caller's.
            unsafe { vbslq_f32(vcltq_f32(a, b), x, y) }
        }
        /// # Safety
        /// Needs neon.
        #[inline(always)]
        unsafe fn scale2_raw(x: float32x4_t, n: float32x4_t) -> float32x4_t {
            // SAFETY: the caller's.
            unsafe {
                let n = vshlq_n_s32::<23>(vreinterpretq_s32_f32(n));
                vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), n))
            }
        }
        /// # Safety
        /// Needs neon.
        #[inline(always)]
        unsafe fn interleave_raw(a: float32x4_t, b: float32x4_t) -> [float32x4_t; 2] {
            // SAFETY: the caller's.
            unsafe { [vzip1q_f32(a, b), vzip2q_f32(a, b)] }
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

    /// A product, or one of differences, with a single row of columns.
    struct Strided<'a> {
        a: Left<'a, f32>,
        apart: bool,
    }

    impl Op for Strided<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self) {
            let (packed, mut c) = ([1.0; WIDEST], vec![0.0; self.a.rows * WIDEST]);
            let own = Own { data: &vec![0.0; self.a.rows * WIDEST], stride: WIDEST };
            if self.apart {
                let b = Right { packed: &packed, total: 1, first: 0 };
                differences::<S>(self.a, b, own, WIDEST, &mut c, WIDEST, false);
            } else {
                product::<S, f32, Inner, LONG>(self.a, &packed, WIDEST, &mut c, WIDEST, false);
            }
        }
    }

    // Rows so far apart that where the last of a micro-kernel's begins wraps to the second element; those between are nowhere.
    #[test]
    fn a_stride_that_wraps_is_refused() {
        let data = [1f32; 2];
        for rows in [4, 6, 8, 12, 24usize] {
            // Newton's 1 / (rows - 1).
            let row = (0..6).fold(1usize, |x, _| x.wrapping_mul(2usize.wrapping_sub((rows - 1).wrapping_mul(x))));
            assert_eq!((rows - 1).wrapping_mul(row), 1);
            let a = Left { data: &data, row, col: 1, rows, depth: 1 };
            for (isa, apart) in Isa::available().into_iter().flat_map(|isa| [(isa, false), (isa, true)]) {
                let done = std::panic::catch_unwind(|| isa.run(Strided { a, apart }));
                assert!(done.is_err(), "{} {rows} {apart}", isa.name());
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
