//! The words on an NVIDIA card: PTX, and nothing else; all `asm!` of the house but what `entries.rs` needs of an entry.
//!
//! What the lanes of a warp do together must stay where it is written. Of inline assembly the compiler does not know so:
//! it may copy it into the arms of a branch, and a card whose lanes meet at two copies waits for ever. Of its own
//! instructions for these words it does know. Left in assembly are those that it has none for (`wgmma`), or only one of
//! types that Rust cannot hand over (`ldmatrix`, `stmatrix`: shared addresses; f16 `mma`: pairs of halves), none of them
//! `pure`. `ptx/convergence.py` looks at all of them in the PTX.

use super::Word;
use core::arch::{asm, global_asm};

unsafe extern "unadjusted" {
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    fn bar_warp_sync(lanes: u32);
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.all"]
    fn barrier_all(id: u32);
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.count"]
    fn barrier_count(id: u32, threads: u32);
    #[link_name = "llvm.nvvm.shfl.sync.bfly.f32"]
    fn shfl_bfly_f32(lanes: u32, x: f32, mask: u32, clamp: u32) -> f32;
    #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
    fn shfl_idx_u32(lanes: u32, x: u32, from: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.vote.ballot.sync"]
    fn vote_ballot(lanes: u32, x: bool) -> u32;
    #[link_name = "llvm.nvvm.mma.m16n8k16.row.col.bf16"]
    fn mma_m16n8k16_bf16(a: u32, b: u32, c: u32, d: u32, e: u32, f: u32, x: f32, y: f32, z: f32, w: f32) -> Four;
    #[link_name = "llvm.nvvm.wgmma.fence.sync.aligned"]
    fn wgmma_fence_sync();
    #[link_name = "llvm.nvvm.wgmma.commit_group.sync.aligned"]
    fn wgmma_commit_group();
    #[link_name = "llvm.nvvm.wgmma.wait_group.sync.aligned"]
    fn wgmma_wait_group(most: u64);
    #[link_name = "llvm.nvvm.setmaxnreg.inc.sync.aligned.u32"]
    fn setmaxnreg_inc(registers: u32);
    #[link_name = "llvm.nvvm.setmaxnreg.dec.sync.aligned.u32"]
    fn setmaxnreg_dec(registers: u32);
}

/// What a product gives a lane.
#[repr(C)]
struct Four(f32, f32, f32, f32);

/// All lanes of a warp.
const ALL: u32 = u32::MAX;

global_asm!(".extern .shared .align 1024 .b8 dynamic_shared[];");

macro_rules! special {
    ($($(#[$doc:meta])* $name:ident = $register:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            let x: u32;
            // SAFETY: reads a special register.
            unsafe { asm!(concat!("mov.u32 {}, ", $register, ";"), out(reg32) x, options(pure, nomem, nostack, preserves_flags)) };
            x
        }
    )*};
}
special! {
    /// Thread of the block.
    thread = "%tid.x";
    /// Block of the grid, along x.
    block_x = "%ctaid.x";
    /// Block of the grid, along y.
    block_y = "%ctaid.y";
    /// Block of the grid, along z.
    block_z = "%ctaid.z";
    /// Blocks of the grid along x.
    grid_x = "%nctaid.x";
}

/// Lane of the warp.
#[inline(always)]
pub fn lane() -> u32 {
    thread() & 31
}
/// Warp of the block, known to be the same in all its lanes: which are asked, so that all must ask.
#[inline(always)]
pub fn warp() -> u32 {
    uniform(thread() >> 5)
}

macro_rules! statement {
    ($($(#[$doc:meta])* $name:ident $(<$c:ident>)? = $text:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name$(<const $c: u32>)?() {
            // SAFETY: synchronises, touches no memory of its own; a barrier that is not met by all is a hang, not unsafety.
            unsafe { asm!($text, $(const $c,)? options(nostack)) };
        }
    )*};
}
statement! {
    /// Ends a group of this thread's `copy_async`.
    copy_commit = "cp.async.commit_group;";
    /// Waits until at most N of this thread's latest groups are in flight.
    copy_wait<N> = "cp.async.wait_group {};";
    /// Makes `mbarrier_init` visible to copies.
    fence_init = "fence.mbarrier_init.release.cluster;";
    /// What this thread wrote to shared memory is seen by TMA and wgmma after the next barrier.
    fence_async = "fence.proxy.async.shared::cta;";
    /// Ends a group of this thread's TMA stores.
    bulk_commit = "cp.async.bulk.commit_group;";
    /// Waits until this thread's TMA stores have read their shared memory.
    bulk_wait_read = "cp.async.bulk.wait_group.read 0;";
}

macro_rules! together {
    ($($(#[$doc:meta])* $name:ident $(<$($c:ident),*>)? ($($x:ident: $type:ty),*) $(-> $out:ty)? = $call:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name$(<$(const $c: u32),*>)?($($x: $type),*) $(-> $out)? {
            // SAFETY: touches no memory of its own; lanes that do not all come are a hang, not unsafety.
            unsafe { $call }
        }
    )*};
}
together! {
    /// All threads of the block meet; what they wrote is seen by all.
    sync() = barrier_all(0);
    /// `THREADS` threads meet at barrier `ID` (1 to 15).
    named_barrier<ID, THREADS>() = barrier_count(ID, THREADS);
    /// All lanes of the warp meet; what they wrote is seen by all of them.
    sync_warp() = bar_warp_sync(ALL);
    /// `x` of the lane that differs in the bits of `mask`.
    shuffle_xor(x: f32, mask: u32) -> f32 = shfl_bfly_f32(ALL, x, mask, 31);
    /// `x` of lane 0.
    uniform(x: u32) -> u32 = shfl_idx_u32(ALL, x, 0, 31);
    /// A bit a lane: whose `x` is true.
    ballot(x: bool) -> u32 = vote_ballot(ALL, x);
    /// Before the first wgmma on registers or memory that other instructions wrote.
    wgmma_fence() = wgmma_fence_sync();
    /// Ends a group of wgmma.
    wgmma_commit() = wgmma_commit_group();
    /// Waits until at most N of the latest groups are in flight.
    wgmma_wait<N>() = wgmma_wait_group(N as u64);
    /// This warpgroup's registers a thread, up to N.
    registers_up<N>() = setmaxnreg_inc(N);
    /// This warpgroup's registers a thread, down to N.
    registers_down<N>() = setmaxnreg_dec(N);
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(x: f32) -> f32 {
            let y: f32;
            // SAFETY: arithmetic.
            unsafe { asm!($text, out(reg32) y, in(reg32) x, options(pure, nomem, nostack, preserves_flags)) };
            y
        }
    )*};
}
unary! {
    /// `2^x`, 2 ulp; results below 2^-126 are 0.
    exp2 = "ex2.approx.ftz.f32 {}, {};";
    /// `log2 x`, absolute error 2^-22 on [1/2, 2], relative 2^-22 elsewhere.
    log2 = "lg2.approx.f32 {}, {};";
    /// `1/x`, 1 ulp; 0 where that is below 2^-126.
    reciprocal = "rcp.approx.ftz.f32 {}, {};";
    /// The square root, correctly rounded.
    sqrt = "sqrt.rn.f32 {}, {};";
}

/// `a b + c`, rounded once.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    let y: f32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("fma.rn.f32 {}, {}, {}, {};", out(reg32) y, in(reg32) a, in(reg32) b, in(reg32) c, options(pure, nomem, nostack, preserves_flags))
    };
    y
}

macro_rules! pack {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(low: f32, high: f32) -> u32 {
            let y: u32;
            // SAFETY: arithmetic. Not `pure`: it must stay after the wait that precedes it in the source.
            unsafe { asm!($text, out(reg32) y, in(reg32) high, in(reg32) low, options(nomem, nostack, preserves_flags)) };
            y
        }
    )*};
}
pack! {
    /// Two bf16, rounded to nearest even.
    pack_bf16 = "cvt.rn.bf16x2.f32 {}, {}, {};";
    /// Two f16, rounded to nearest even.
    pack_f16 = "cvt.rn.f16x2.f32 {}, {}, {};";
}
/// The two f16 of a word.
#[inline(always)]
pub fn unpack_f16(word: u32) -> [f32; 2] {
    let (low, high): (f32, f32);
    // SAFETY: arithmetic.
    unsafe {
        asm!("{{ .reg .b16 a, b; mov.b32 {{a, b}}, {w}; cvt.f32.f16 {x}, a; cvt.f32.f16 {y}, b; }}",
            w = in(reg32) word, x = out(reg32) low, y = out(reg32) high, options(pure, nomem, nostack, preserves_flags))
    };
    [low, high]
}

/// `x`, of which the compiler knows nothing any more: a loop bounded by it stays a loop.
#[inline(always)]
pub fn opaque(x: u32) -> u32 {
    let y: u32;
    // SAFETY: a move.
    unsafe { asm!("mov.b32 {}, {};", out(reg32) y, in(reg32) x, options(nomem, nostack, preserves_flags)) };
    y
}

/// `x`, computed here and not later: the compiler moves sums to where they are used, past their branches.
#[inline(always)]
pub fn pin(mut x: f32) -> f32 {
    // SAFETY: nothing.
    unsafe { asm!("// {}", inout(reg32) x, options(nomem, nostack, preserves_flags)) };
    x
}

/// Stops the kernel with an error.
#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: does not return.
    unsafe { asm!("trap;", options(noreturn)) }
}

/// Where the block's dynamic shared memory starts, a multiple of 1024.
#[inline(always)]
pub fn shared_base() -> u32 {
    let x: u64;
    // SAFETY: an address, not an access.
    unsafe { asm!("mov.u64 {}, dynamic_shared;", out(reg64) x, options(pure, nomem, nostack, preserves_flags)) };
    x as u32
}

macro_rules! word {
    ($($type:ty, $reg:ident, $suffix:literal;)*) => {$(
        impl Word for $type {
            #[inline(always)]
            unsafe fn load(at: *const Self) -> Self {
                let x: $type;
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("ld.global.", $suffix, " {}, [{}];"), out($reg) x, in(reg64) at, options(nostack, readonly, preserves_flags)) };
                x
            }
            #[inline(always)]
            unsafe fn store(at: *mut Self, value: Self) {
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("st.global.", $suffix, " [{}], {};"), in(reg64) at, in($reg) value, options(nostack, preserves_flags)) };
            }
            #[inline(always)]
            unsafe fn load_shared(at: u32) -> Self {
                let x: $type;
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("ld.shared.", $suffix, " {}, [{}];"), out($reg) x, in(reg32) at, options(nostack, readonly, preserves_flags)) };
                x
            }
            #[inline(always)]
            unsafe fn store_shared(at: u32, value: Self) {
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("st.shared.", $suffix, " [{}], {};"), in(reg32) at, in($reg) value, options(nostack, preserves_flags)) };
            }
        }
    )*};
}
word! {
    u16, reg16, "u16";
    u32, reg32, "u32";
    i32, reg32, "s32";
    u64, reg64, "u64";
    f32, reg32, "f32";
    f64, reg64, "f64";
}

macro_rules! vector {
    ($($type:ty, $n:literal, $suffix:literal, $list:literal, $($i:literal)*;)*) => {$(
        impl Word for [$type; $n] {
            #[inline(always)]
            unsafe fn load(at: *const Self) -> Self {
                let mut x = [Default::default(); $n];
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("ld.global.", $suffix, " ", $list, ", [{at}];"), $(out(reg32) x[$i],)* at = in(reg64) at, options(nostack, readonly, preserves_flags)) };
                x
            }
            #[inline(always)]
            unsafe fn store(at: *mut Self, value: Self) {
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("st.global.", $suffix, " [{at}], ", $list, ";"), $(in(reg32) value[$i],)* at = in(reg64) at, options(nostack, preserves_flags)) };
            }
            #[inline(always)]
            unsafe fn load_shared(at: u32) -> Self {
                let mut x = [Default::default(); $n];
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("ld.shared.", $suffix, " ", $list, ", [{at}];"), $(out(reg32) x[$i],)* at = in(reg32) at, options(nostack, readonly, preserves_flags)) };
                x
            }
            #[inline(always)]
            unsafe fn store_shared(at: u32, value: Self) {
                // SAFETY: the caller's promise.
                unsafe { asm!(concat!("st.shared.", $suffix, " [{at}], ", $list, ";"), $(in(reg32) value[$i],)* at = in(reg32) at, options(nostack, preserves_flags)) };
            }
        }
    )*};
}
vector! {
    f32, 2, "v2.f32", "{{{}, {}}}", 0 1;
    f32, 4, "v4.f32", "{{{}, {}, {}, {}}}", 0 1 2 3;
    u32, 2, "v2.u32", "{{{}, {}}}", 0 1;
    u32, 4, "v4.u32", "{{{}, {}, {}, {}}}", 0 1 2 3;
}

/// [`Word::store`] where `when`, without a branch: between branches the compiler moves arithmetic about, and registers
/// run out.
///
/// # Safety
/// As there, where `when`.
#[inline(always)]
pub unsafe fn store_where(at: *mut u32, value: u32, when: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {w}, 0; @p st.global.u32 [{a}], {v}; }}", w = in(reg32) when as u32, a = in(reg64) at, v = in(reg32) value, options(nostack, preserves_flags))
    };
}

/// Copies 16 bytes from global to shared memory behind this thread's back; with `bytes` below 16 the rest is zeros.
///
/// # Safety
/// Both addresses are multiples of 16, `from` readable for `bytes`, `to` not touched before the copy was waited for.
#[inline(always)]
pub unsafe fn copy_async(to: u32, from: *const u16, bytes: u32) {
    // SAFETY: the caller's promise.
    unsafe { asm!("cp.async.cg.shared.global [{}], [{}], 16, {};", in(reg32) to, in(reg64) from, in(reg32) bytes, options(nostack)) };
}

macro_rules! ldmatrix {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub unsafe fn $name(at: u32) -> [u32; 4] {
            let (a, b, c, d): (u32, u32, u32, u32);
            // SAFETY: the caller's promise.
            unsafe { asm!($text, out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) at, options(nostack)) };
            [a, b, c, d]
        }
    )*};
}
ldmatrix! {
    /// Four 8 x 8 matrices of halves: lane l names row l mod 8 of matrix l/8 (16 bytes), and gets of each matrix elements
    /// 2 (l mod 4) and the next of row l/4.
    ///
    /// # Safety
    /// As [`Word::load_shared`], for 16 bytes.
    ldmatrix = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{}, {}, {}, {}}}, [{}];";
    /// As [`ldmatrix`], each matrix transposed.
    ///
    /// # Safety
    /// As there.
    ldmatrix_t = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{}, {}, {}, {}}}, [{}];";
}

/// The inverse of [`ldmatrix`].
///
/// # Safety
/// As [`Word::store_shared`], for 16 bytes.
#[inline(always)]
pub unsafe fn stmatrix(at: u32, x: [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("stmatrix.sync.aligned.m8n8.x4.shared.b16 [{}], {{{}, {}, {}, {}}};", in(reg32) at, in(reg32) x[0], in(reg32) x[1], in(reg32) x[2], in(reg32) x[3], options(nostack))
    };
}

/// [`super::Half::mma`].
#[inline(always)]
pub fn mma_bf16(acc: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    // SAFETY: registers only; all lanes take part.
    let Four(x, y, z, w) =
        unsafe { mma_m16n8k16_bf16(a[0], a[1], a[2], a[3], b[0], b[1], acc[0], acc[1], acc[2], acc[3]) };
    *acc = [x, y, z, w];
}
/// [`super::Half::mma`].
#[inline(always)]
pub fn mma_f16(acc: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    // SAFETY: registers only; all lanes take part.
    unsafe {
        asm!("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
            inout(reg32) acc[0], inout(reg32) acc[1], inout(reg32) acc[2], inout(reg32) acc[3],
            in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg32) b[0], in(reg32) b[1],
            options(nomem, nostack))
    };
}

/// A barrier at `at` that `arrivals` arrivals complete.
///
/// # Safety
/// `at` is 8 bytes of shared memory used for nothing else.
#[inline(always)]
pub unsafe fn mbarrier_init(at: u32, arrivals: u32) {
    // SAFETY: the caller's promise.
    unsafe { asm!("mbarrier.init.shared::cta.b64 [{}], {};", in(reg32) at, in(reg32) arrivals, options(nostack)) };
}
/// Arrives, and has the phase wait for `bytes` more of copies.
///
/// # Safety
/// `at` was initialised.
#[inline(always)]
pub unsafe fn mbarrier_expect(at: u32, bytes: u32) {
    // SAFETY: the caller's promise.
    unsafe { asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {};", in(reg32) at, in(reg32) bytes, options(nostack)) };
}
/// Arrives.
///
/// # Safety
/// `at` was initialised.
#[inline(always)]
pub unsafe fn mbarrier_arrive(at: u32) {
    // SAFETY: the caller's promise.
    unsafe { asm!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(reg32) at, options(nostack)) };
}
/// Waits until the phase of this parity is complete.
///
/// # Safety
/// `at` was initialised.
#[inline(always)]
pub unsafe fn mbarrier_wait(at: u32, parity: u32) {
    let mut done = 0u32;
    while done == 0 {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("{{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [{b}], {p}; selp.u32 {r}, 1, 0, p; }}", b = in(reg32) at, p = in(reg32) parity, r = out(reg32) done, options(nostack))
        };
    }
}

/// Copies the box of `map` at (x, y) to shared memory, and counts its bytes at `barrier`.
///
/// # Safety
/// `map` is the address of a kernel argument's [`crate::abi::TensorMap`]; `to` is 128-byte aligned (1024 if swizzled) with room for the box.
#[inline(always)]
pub unsafe fn tma_load(to: u32, map: u64, x: u32, y: u32, barrier: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [{d}], [{m}, {{{x}, {y}}}], [{b}];", d = in(reg32) to, m = in(reg64) map, x = in(reg32) x, y = in(reg32) y, b = in(reg32) barrier, options(nostack))
    };
}
/// Copies shared memory to the box of `map` at (x, y); outside of the tensor nothing is written.
///
/// # Safety
/// As [`tma_load`]; `fence_async` and a barrier came after the writes.
#[inline(always)]
pub unsafe fn tma_store(from: u32, map: u64, x: u32, y: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [{m}, {{{x}, {y}}}], [{s}];", s = in(reg32) from, m = in(reg64) map, x = in(reg32) x, y = in(reg32) y, options(nostack))
    };
}

/// Products of `wgmma` in a lane's registers, 2 rows a lane: element `4 j + e` is of row `16 (warp mod 4) + lane/4 + 8 (e/2)`
/// and column `8 j + 2 (lane mod 4) + e mod 2`. Not to be read before `wgmma_wait`.
pub type Accumulator<const N: usize> = [f32; N];

/// An accumulator of zeros.
#[inline(always)]
pub fn accumulator<const N: usize>() -> Accumulator<N> {
    [0.0; N]
}

macro_rules! wgmma {
    ($($name:ident $columns:literal $type:literal: $first:literal $($i:literal)*;)*) => {$(
        /// `acc = a b + (acc if accumulate)`, both operands in shared memory; see [`super::Half`].
        ///
        /// # Safety
        /// Descriptors of live, fenced operands, not overwritten before `wgmma_wait`; all lanes of the warpgroup take part.
        #[inline(always)]
        pub unsafe fn $name<const A_ALONG_TILE: u32, const B_ALONG_TILE: u32>(
            acc: &mut Accumulator<{ $columns / 2 }>,
            a: u64,
            b: u64,
            accumulate: u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe {
                asm!(concat!("{{ .reg .pred p; setp.ne.b32 p, {s}, 0; wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.", $type, ".", $type,
                        " {{{", $first, "}", $(", {", $i, "}",)* "}}, {a}, {b}, p, 1, 1, {ta}, {tb}; }}"),
                    inout(reg32) acc[$first], $(inout(reg32) acc[$i],)*
                    a = in(reg64) a, b = in(reg64) b, s = in(reg32) accumulate, ta = const A_ALONG_TILE, tb = const B_ALONG_TILE, options(nostack))
            };
        }
    )*};
}
wgmma! {
    wgmma_n128_bf16 128 "bf16": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63;
    wgmma_n128_f16 128 "f16": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63;
    wgmma_n256_bf16 256 "bf16": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95 96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119 120 121 122 123 124 125 126 127;
    wgmma_n256_f16 256 "f16": 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95 96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119 120 121 122 123 124 125 126 127;
}
