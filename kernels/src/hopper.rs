//! The mainloops of Hopper: tiles of 128 x 256 by `wgmma`, operands brought by TMA, for all D.
//!
//! ```text
//! warpgroups 0, 1   wait full[s]; wgmma of k 4 x 16; wait for those before; arrive empty[s']
//! warp 8            one lane: wait empty[s]; TMA A and B slices of k 64 into stage s, counted at full[s]
//! ```
//!
//! 3 x 128 threads, of which the products take nearly all registers (`setmaxnreg`). The ring of stages runs on across
//! tiles, so that the first slices of the next tile come in under the epilogue of this one. The warpgroups share a tile in
//! one of two ways:
//!
//! * *together*, 64 rows each, every slice read by both: tallies by rows, products, and G with sums;
//! * *in turns*, 128 columns each and slices of their own, so that while the one multiplies the other has its epilogue: sums
//!   of both sides, and G of the softmax losses.
//!
//! The epilogues are those of `contrast.rs`; G leaves by `stmatrix` and TMA.

use crate::abi::{
    COLUMN_PULL, COLUMN_TALLY, Gemm, HOPPER_BARS, HOPPER_COLS, HOPPER_ROWS, HOPPER_STAGES_BOTH, HOPPER_STAGES_GEMM,
    HOPPER_STAGES_PULL, HOPPER_STAGES_TURNS, HopperGemm, HopperPull, HopperTally, HopperTallyBoth, NO_SPAN, Norm, Pull,
};
use crate::contrast::{
    Columns, FactoredLaw, Fragments, Law, PlainLaw, RowTallies, Shares, SigmoidLaw, SoftmaxLaw, Take, Walk, anchor, anchored,
    anchored_weight, apart, exponentials, near, optional, pull, pull_anchored, pull_plain_pairs, rows_of, spans_of,
};
use crate::rows::own;
use crate::simt::*;

/// k of a slice.
const DEPTH: u32 = 64;
/// Bytes of a slice of A.
const SLICE_A: u32 = HOPPER_ROWS * DEPTH * 2;
/// Bytes of a block of 64 x 64, one box of an operand stored along the tile.
const BLOCK: u32 = 64 * 64 * 2;
/// Bytes of a stage of which both warpgroups read.
const STAGE: u32 = SLICE_A + HOPPER_COLS * DEPTH * 2;
/// Bytes of a stage with half of the columns.
const HALF_STAGE: u32 = SLICE_A + HALF * DEPTH * 2;
/// Half of a tile's columns.
const HALF: u32 = HOPPER_COLS / 2;
/// Registers of a consumer's thread, and of the producer's.
const CONSUMER: u32 = 240;
const PRODUCER: u32 = 24;

/// A ring of stages, as one role sees it.
#[derive(Clone, Copy)]
struct Ring {
    base: u32,
    bars: u32,
    /// Of a stage.
    bytes: u32,
    stage: u32,
    parity: u32,
}

impl Ring {
    /// The ring at `base`, its barriers at `bars`; consumers start at parity 0, the producer at 1: all stages are empty.
    #[inline(always)]
    fn new(base: u32, bars: u32, bytes: u32, parity: u32) -> Self {
        Ring { base, bars, bytes, stage: 0, parity }
    }
    #[inline(always)]
    fn full(self) -> u32 {
        self.bars + self.stage * 16
    }
    #[inline(always)]
    fn empty(self) -> u32 {
        self.bars + self.stage * 16 + 8
    }
    #[inline(always)]
    fn at(self) -> u32 {
        self.base + self.stage * self.bytes
    }
    #[inline(always)]
    fn advance<const STAGES: u32>(&mut self) {
        self.stage += 1;
        if self.stage == STAGES {
            self.stage = 0;
            self.parity ^= 1;
        }
    }
    /// Past the slices of `depth` k, which are the other warpgroup's.
    #[inline(always)]
    fn skip<const STAGES: u32>(&mut self, depth: u32) {
        let mut k = 0;
        while k < depth {
            self.advance::<STAGES>();
            k += DEPTH;
        }
    }
}

/// Barriers of the ring, of which `warps` empty a stage, and behind them two of [`Turns`]; by one thread, seen by all.
#[inline(always)]
unsafe fn set_up<const STAGES: u32>(bars: u32, warps: u32) {
    if thread() == 0 {
        let mut s = 0;
        while s < STAGES {
            // SAFETY: 16 bytes a stage at `bars`.
            unsafe {
                mbarrier_init(bars + s * 16, 1);
                mbarrier_init(bars + s * 16 + 8, warps);
            }
            s += 1;
        }
        // SAFETY: 16 bytes more.
        unsafe {
            mbarrier_init(bars + STAGES * 16, 4);
            mbarrier_init(bars + STAGES * 16 + 8, 4);
        }
        fence_init();
    }
    sync();
}

/// Brings `depth` k from `from` on of the tile at (`row`, `col`), as many columns as a stage has room for. `TA`, `TB`: 1
/// where the operand is stored with the tile's rows (columns) running fastest.
#[inline(always)]
unsafe fn produce<const STAGES: u32, const TA: u32, const TB: u32>(
    ring: &mut Ring,
    [a, b]: [u64; 2],
    row: u32,
    col: u32,
    from: u32,
    depth: u32,
) {
    let mut k = from;
    while k < from + depth {
        // SAFETY: the stage is empty once its last readers have arrived; maps are the kernel's argument.
        unsafe {
            mbarrier_wait(ring.empty(), ring.parity);
            mbarrier_expect(ring.full(), ring.bytes);
            let (to, full) = (ring.at(), ring.full());
            if TA == 1 {
                tma_load(to, a, row, k, full);
                tma_load(to + BLOCK, a, row + 64, k, full);
            } else {
                tma_load(to, a, k, row, full);
            }
            let to = to + SLICE_A;
            if TB == 1 {
                let mut at = 0;
                while at < ring.bytes - SLICE_A {
                    tma_load(to + at, b, col + at / (2 * DEPTH), k, full);
                    at += BLOCK;
                }
            } else {
                tma_load(to, b, k, col, full);
            }
        }
        ring.advance::<STAGES>();
        k += DEPTH;
    }
}

/// Sums of products of 64 rows and 2 N columns, N a lane.
trait Products {
    /// Adds 16 k of a product to them, or with `more` 0 replaces them.
    ///
    /// # Safety
    /// As [`Half::wgmma_n256`].
    unsafe fn multiply<T: Half, const TA: u32, const TB: u32>(&mut self, a: u64, b: u64, more: u32);
}
impl Products for Accumulator<128> {
    #[inline(always)]
    unsafe fn multiply<T: Half, const TA: u32, const TB: u32>(&mut self, a: u64, b: u64, more: u32) {
        // SAFETY: the caller's promise.
        unsafe { T::wgmma_n256::<TA, TB>(self, a, b, more) }
    }
}
impl Products for Accumulator<64> {
    #[inline(always)]
    unsafe fn multiply<T: Half, const TA: u32, const TB: u32>(&mut self, a: u64, b: u64, more: u32) {
        // SAFETY: the caller's promise.
        unsafe { T::wgmma_n128::<TA, TB>(self, a, b, more) }
    }
}

/// The products of one tile of the warpgroup's 64 rows and all columns of a stage, all of them retired: the warpgroups together.
#[inline(always)]
unsafe fn consume<T: Half, P: Products, const STAGES: u32, const TA: u32, const TB: u32>(
    ring: &mut Ring,
    acc: &mut P,
    depth: u32,
) {
    let group = warp() >> 2;
    let mut before = *ring;
    let mut k = 0;
    while k < depth {
        // SAFETY: the stage is full; its readers release it below, after their wait.
        unsafe {
            mbarrier_wait(ring.full(), ring.parity);
            wgmma_fence();
            let at = ring.at() + group * BLOCK;
            let a = if TA == 1 { descriptor_mn(at, BLOCK) } else { descriptor_k(at) };
            let at = ring.at() + SLICE_A;
            let b = if TB == 1 { descriptor_mn(at, BLOCK) } else { descriptor_k(at) };
            let step = |along_tile: u32| if along_tile == 1 { 128u64 } else { 2 };
            let mut q = 0;
            while q < 4 {
                acc.multiply::<T, TA, TB>(a + q * step(TA), b + q * step(TB), k | q as u32);
                q += 1;
            }
            wgmma_commit();
            if k != 0 {
                wgmma_wait::<1>();
                if lane() == 0 {
                    mbarrier_arrive(before.empty());
                }
            }
        }
        before = *ring;
        ring.advance::<STAGES>();
        k += DEPTH;
    }
    wgmma_wait::<0>();
    if lane() == 0 {
        // SAFETY: initialised.
        unsafe { mbarrier_arrive(before.empty()) };
    }
}

/// Whose products it is to be issued: the warpgroups' in turns, those of 0 first. It also keeps a warpgroup from waiting for a
/// stage whose turn before, the other's, is not over: of two phases a parity cannot tell which is meant.
struct Turns {
    /// Of each warpgroup, a phase for each of its turns.
    bars: u32,
    group: u32,
    count: u32,
}

impl Turns {
    #[inline(always)]
    fn new(bars: u32) -> Self {
        Turns { bars, group: warp() >> 2, count: 0 }
    }
    /// Waits for the turn before, which is the other's.
    #[inline(always)]
    unsafe fn wait(&self) {
        // SAFETY: initialised.
        unsafe {
            if self.group == 1 {
                mbarrier_wait(self.bars, self.count & 1);
            } else if self.count > 0 {
                mbarrier_wait(self.bars + 8, (self.count - 1) & 1);
            }
        }
    }
    #[inline(always)]
    unsafe fn done(&mut self) {
        if lane() == 0 {
            // SAFETY: initialised.
            unsafe { mbarrier_arrive(self.bars + 8 * self.group) };
        }
        self.count += 1;
    }
}

/// The products of the warpgroup's own 128 columns of a tile, of its upper and its lower 64 rows, all of them retired: the
/// warpgroups in turns. Both operands are stored with k running fastest.
#[inline(always)]
unsafe fn consume_own<T: Half, const STAGES: u32>(
    ring: &mut Ring,
    turns: &mut Turns,
    [upper, lower]: [&mut Accumulator<64>; 2],
    depth: u32,
) {
    if turns.group == 1 {
        ring.skip::<STAGES>(depth);
    }
    let mut before = *ring;
    let mut k = 0;
    // SAFETY: as for `consume`.
    unsafe {
        turns.wait();
        while k < depth {
            mbarrier_wait(ring.full(), ring.parity);
            wgmma_fence();
            let (a, c) = (descriptor_k(ring.at()), descriptor_k(ring.at() + BLOCK));
            let b = descriptor_k(ring.at() + SLICE_A);
            let mut q = 0;
            while q < 4 {
                T::wgmma_n128::<0, 0>(upper, a + 2 * q, b + 2 * q, k | q as u32);
                T::wgmma_n128::<0, 0>(lower, c + 2 * q, b + 2 * q, k | q as u32);
                q += 1;
            }
            wgmma_commit();
            if k != 0 {
                wgmma_wait::<1>();
                if lane() == 0 {
                    mbarrier_arrive(before.empty());
                }
            }
            before = *ring;
            ring.advance::<STAGES>();
            k += DEPTH;
        }
        turns.done();
        wgmma_wait::<0>();
        if lane() == 0 {
            mbarrier_arrive(before.empty());
        }
    }
    if turns.group == 0 {
        ring.skip::<STAGES>(depth);
    }
}

/// A lane's share of 64 rows of a tile: two rows by N/4 pairs of columns.
struct Wide<'a, const N: usize> {
    acc: &'a mut Accumulator<N>,
    /// Staging of the 64 rows as halves, swizzled blocks of 64 columns; only written by `put`.
    staging: u32,
    /// The lane's first row in the tile.
    row: u32,
    /// The last even pair.
    even: [u32; 2],
}

impl<'a, const N: usize> Wide<'a, N> {
    /// Of the 64 rows of the tile from `first` on.
    #[inline(always)]
    fn new(acc: &'a mut Accumulator<N>, first: u32, staging: u32) -> Self {
        Wide { acc, staging, row: first + (warp() & 3) * 16 + (lane() >> 2), even: [0; 2] }
    }
    /// Of the warpgroup's 64 rows, where they work together.
    #[inline(always)]
    fn together(acc: &'a mut Accumulator<N>) -> Self {
        let first = (warp() >> 2) * 64;
        Self::new(acc, first, 0)
    }
}

impl<const N: usize> Fragments<2> for Wide<'_, N> {
    const PAIRS: usize = N / 4;
    #[inline(always)]
    fn row(&self, r: usize) -> u32 {
        self.row + 8 * r as u32
    }
    #[inline(always)]
    fn col(&self, p: usize) -> u32 {
        8 * p as u32 + 2 * (lane() & 3)
    }
    #[inline(always)]
    fn get(&self, r: usize, p: usize, c: usize) -> f32 {
        self.acc[4 * p + 2 * r + c]
    }
    #[inline(always)]
    fn set(&mut self, r: usize, p: usize, c: usize, x: f32) {
        self.acc[4 * p + 2 * r + c] = x;
    }
    #[inline(always)]
    unsafe fn put(&mut self, p: usize, g: [u32; 2]) {
        if p.is_multiple_of(2) {
            self.even = g;
            return;
        }
        let sixteen = p as u32 / 2;
        let row = (self.row & 48) + (lane() & 15);
        let chunk = sixteen % 4 * 2 + (lane() >> 4);
        let to = self.staging + sixteen / 4 * BLOCK + row * 128 + ((chunk ^ (row & 7)) << 4);
        // SAFETY: the warpgroup's own staging, whose last store has been read.
        unsafe { stmatrix(to, [self.even[0], self.even[1], g[0], g[1]]) };
    }
}

/// Barrier 3: the 256 threads that consume.
#[inline(always)]
fn consumer_barrier() {
    named_barrier::<3, 256>();
}

/// Barriers 1 and 2: the 128 threads of a warpgroup.
#[inline(always)]
fn warpgroup_barrier() {
    if warp() < 4 {
        named_barrier::<1, 128>();
    } else {
        named_barrier::<2, 128>();
    }
}

/// [`crate::abi::Tally`] of a row tile against `tiles` column tiles of 256, or those of them whose plain pairs nobody has
/// tallied; grid (splits, row tiles, sides), one slot a split; with ALL, [`crate::abi::Tally::all`] too.
///
/// # Safety
/// The launch contract; `at` is the address of the argument.
#[inline(always)]
pub unsafe fn tally<T: Half, const ALL: bool>(a: &HopperTally, at: u64) {
    const STAGES: u32 = HOPPER_STAGES_GEMM;
    let maps = at + u64::from(block_z()) * 256;
    let (a, maps) = (&own(&a.tallies), [maps, maps + 128]);
    let base = shared_base();
    let bars = base + STAGES * STAGE;
    let row = block_y() * HOPPER_ROWS;
    let l = &a.logits;
    let first = block_x() * a.tiles;
    let end = (first + a.tiles).min(l.m.div_ceil(HOPPER_COLS));
    if row >= l.n || first >= end {
        return;
    }
    // SAFETY: the launch contract.
    unsafe {
        set_up::<STAGES>(bars, 8);
        let take = if anchored(l.flags, l.blocks) { Take::Rest } else { Take::All };
        let mut walk = Walk::new(l, take, row, first, end);
        let mut t = walk.next_tile();
        if warp() >= 8 {
            registers_down::<PRODUCER>();
            if warp() == 8 {
                let mut ring = Ring::new(base, bars, STAGE, 1);
                while t < end {
                    if lane() == 0 {
                        produce::<STAGES, 0, 0>(&mut ring, maps, row, t * HOPPER_COLS, 0, l.depth);
                    }
                    t = walk.next_tile();
                }
            }
        } else {
            registers_up::<CONSUMER>();
            let mut ring = Ring::new(base, bars, STAGE, 0);
            let mut acc = accumulator::<128>();
            let mut tallies = RowTallies::<2, ALL>::none();
            let rows = rows_of(l, &Wide::together(&mut acc), row);
            let mut turn = 0;
            while t < end {
                let columns = Columns::new(bars + HOPPER_BARS, turn, HOPPER_COLS, COLUMN_TALLY);
                columns.stage(l, t * HOPPER_COLS, thread());
                consumer_barrier();
                consume::<T, _, STAGES, 0, 0>(&mut ring, &mut acc, l.depth);
                let mut tile = Wide::together(&mut acc);
                tallies.add(a, &rows, &mut tile, columns);
                turn += 1;
                t = walk.next_tile();
            }
            tallies.store(a, &Wide::together(&mut acc), row, block_x());
        }
    }
}

/// Sums of the half tile's columns over the warp's 32 rows, to `to` `[128]` in shared memory: with each exchange a lane hands
/// half of its columns to the other.
#[inline(always)]
unsafe fn sum_columns(upper: &Wide<'_, 64>, lower: &Wide<'_, 64>, to: u32) {
    let mut sums = [0f32; 32];
    let mut p = 0;
    while p < 16 {
        let mut c = 0;
        while c < 2 {
            let own = (upper.get(0, p, c) + upper.get(1, p, c)) + (lower.get(0, p, c) + lower.get(1, p, c));
            // So that a lane is left with columns 64 apart, and those of a warp are side by side.
            sums[4 * (p % 8) + 2 * (p / 8) + c] = own;
            c += 1;
        }
        p += 1;
    }
    let (mut half, mut mask) = (16, 16);
    while half >= 4 {
        let second = lane() & mask != 0;
        let mut k = 0;
        while k < half {
            let (keep, give) = if second { (sums[k + half], sums[k]) } else { (sums[k], sums[k + half]) };
            sums[k] = keep + shuffle_xor(give, mask);
            k += 1;
        }
        (half, mask) = (half / 2, mask / 2);
    }
    let to = to + 4 * (8 * (lane() >> 2) + 2 * (lane() & 3));
    // SAFETY: the caller's 512 bytes.
    unsafe {
        store_shared(to, [sums[0], sums[1]]);
        store_shared(to + 256, [sums[2], sums[3]]);
    }
}

/// [`HopperTallyBoth`] of `down` row tiles against `across` column tiles; grid (splits, groups). A group's sums of a column
/// are one thread's, which adds to them from row tile to row tile.
///
/// # Safety
/// The launch contract; `at` is the address of the argument.
#[inline(always)]
pub unsafe fn tally_both<T: Half>(a: &HopperTallyBoth, at: u64) {
    const STAGES: u32 = HOPPER_STAGES_BOTH;
    let (l, maps) = (&a.logits, [at, at + 128]);
    let base = shared_base();
    let bars = base + STAGES * HALF_STAGE;
    let buffers = bars + HOPPER_BARS;
    let words = buffers + 2 * 4 * HOPPER_COLS * 4;
    let (mut r, first) = (block_y() * a.down, block_x() * a.across);
    let bottom = (r + a.down).min(l.n.div_ceil(HOPPER_ROWS));
    let end = (first + a.across).min(l.m.div_ceil(HOPPER_COLS));
    // SAFETY: the launch contract.
    unsafe {
        set_up::<STAGES>(bars, 4);
        if warp() >= 8 {
            registers_down::<PRODUCER>();
            if warp() == 8 {
                let mut ring = Ring::new(base, bars, HALF_STAGE, 1);
                while r < bottom {
                    let row = r * HOPPER_ROWS;
                    let mut walk = Walk::new(l, Take::Plain, row, first, end);
                    let mut t = walk.next_tile();
                    while t < end {
                        if lane() == 0 {
                            let col = t * HOPPER_COLS;
                            produce::<STAGES, 0, 0>(&mut ring, maps, row, col, 0, l.depth);
                            produce::<STAGES, 0, 0>(&mut ring, maps, row, col + HALF, 0, l.depth);
                        }
                        t = walk.next_tile();
                    }
                    r += 1;
                }
            }
        } else {
            registers_up::<CONSUMER>();
            let mut ring = Ring::new(base, bars, HALF_STAGE, 0);
            let mut turns = Turns::new(bars + STAGES * 16);
            let (mut upper, mut lower) = (accumulator::<64>(), accumulator::<64>());
            let (group, thread) = (warp() >> 2, thread() & 127);
            let buffers = buffers + group * 2 * 4 * HALF * 4;
            let scale = l.scale * optional(l.live, 0, 1.0);
            let anchor = anchor(scale);
            // Sums of all slots of a row are powers of two that f32 holds, and so are their inverses.
            const MOST: f32 = (1u128 << 118) as f32;
            // Below it the exponentials lost below 2^-126 could be 2^-20 of a sum.
            let least = if l.n > l.m { l.n } else { l.m } as f32 * exp2(-106.0);
            let column = |t: u32| {
                let col = t * HOPPER_COLS + group * HALF + thread;
                let to = a.col_sums.wrapping_add(block_y() as usize * l.m as usize + col as usize);
                (to, !a.col_sums.is_null() && col < l.m)
            };
            let mut t = first;
            while t < end {
                let (to, there) = column(t);
                store_where(to.cast(), 0, there);
                t += 1;
            }
            let (mut raised, mut turn) = (false, 0);
            while r < bottom {
                let row = r * HOPPER_ROWS;
                let (mut sums, mut any) = ([[0f32; 2]; 2], false);
                let mut walk = Walk::new(l, Take::Plain, row, first, end);
                let mut t = walk.next_tile();
                while t < end {
                    let (to, there) = column(t);
                    // Early, as it takes as long as the products.
                    let before = if there { load(to) } else { 0.0 };
                    consume_own::<T, STAGES>(&mut ring, &mut turns, [&mut upper, &mut lower], l.depth);
                    let mut halves = [Wide::new(&mut upper, 0, 0), Wide::new(&mut lower, 64, 0)];
                    exponentials(&mut halves[0], scale, anchor, &mut sums[0]);
                    exponentials(&mut halves[1], scale, anchor, &mut sums[1]);
                    if !a.col_sums.is_null() {
                        let buffer = buffers + (turn & 1) * 4 * HALF * 4;
                        sum_columns(&halves[0], &halves[1], buffer + (warp() & 3) * HALF * 4);
                        warpgroup_barrier();
                        let (mut sum, mut w) = (0f32, 0);
                        while w < 4 {
                            sum += load_shared::<f32>(buffer + (w * HALF + thread) * 4);
                            w += 1;
                        }
                        store_where(to.cast(), (before + sum).to_bits(), there);
                        raised |= !(sum >= least && before + sum < MOST);
                    }
                    any = true;
                    turn += 1;
                    t = walk.next_tile();
                }
                let mut q = 0;
                while q < 4 {
                    let sum = sum_lanes(sums[q / 2][q % 2], 4);
                    raised |= any && !(sum >= least && sum < MOST);
                    let i = row + 64 * (q as u32 / 2) + (warp() & 3) * 16 + (lane() >> 2) + 8 * (q as u32 % 2);
                    let slot = (2 * block_x() + group) as usize;
                    let to = a.row_sums.wrapping_add(slot * l.n as usize + i as usize);
                    store_where(to.cast(), sum.to_bits(), lane() & 3 == 0 && i < l.n);
                    q += 1;
                }
                r += 1;
            }
            let raised = u32::from(ballot(raised) != 0);
            let warp = warp();
            if lane() == 0 {
                store_shared(words + 4 * warp, raised);
            }
            consumer_barrier();
            if warp == 0 && thread == 0 {
                let (mut any, mut w) = (0, 0);
                while w < 8 {
                    any |= load_shared::<u32>(words + 4 * w);
                    w += 1;
                }
                store(a.flags.wrapping_add((block_y() * grid_x() + block_x()) as usize), any);
            }
        }
    }
}

/// A warpgroup's four blocks of staging, `ACROSS` side by side, to the chunk from (`row`, `col`) on.
#[inline(always)]
unsafe fn store_staged<const ACROSS: u32>(staging: u32, map: u64, row: u32, col: u32) {
    let mut q = 0;
    while q < 4 {
        // SAFETY: written, fenced and met at by the warpgroup; the map is the kernel's argument.
        unsafe { tma_store(staging + q * BLOCK, map, col + q % ACROSS * 64, row + q / ACROSS * 64) };
        q += 1;
    }
    bulk_commit();
}

/// [`crate::abi::Pull`] over all tiles of a chunk, each block taking every `grid`-th: the warpgroups together.
#[inline(always)]
unsafe fn pull_together<T: Half, L: Law, const SUMS: bool>(a: &HopperPull, at: u64, law: L) {
    const STAGES: u32 = HOPPER_STAGES_PULL;
    let (a, maps, map_g) = (&a.pull, [at, at + 128], at + 256);
    let base = shared_base();
    let staging = base + STAGES * STAGE;
    let bars = staging + HOPPER_ROWS * HOPPER_COLS * 2;
    let (down, across) = (a.rows.div_ceil(HOPPER_ROWS), a.cols.div_ceil(HOPPER_COLS));
    if across == 0 {
        return;
    }
    let depth = a.logits.depth;
    // SAFETY: the launch contract.
    unsafe {
        set_up::<STAGES>(bars, 8);
        if warp() >= 8 {
            registers_down::<PRODUCER>();
            if warp() == 8 && lane() == 0 {
                let mut ring = Ring::new(base, bars, STAGE, 1);
                let mut t = block_x();
                while t < down * across {
                    let (row, col) = (t / across * HOPPER_ROWS, t % across * HOPPER_COLS);
                    produce::<STAGES, 0, 0>(&mut ring, maps, a.row + row, a.col + col, 0, depth);
                    t += grid_x();
                }
            }
        } else {
            registers_up::<CONSUMER>();
            let mut ring = Ring::new(base, bars, STAGE, 0);
            let mut acc = accumulator::<128>();
            let group = warp() >> 2;
            let staging = staging + group * 4 * BLOCK;
            let (mut t, mut turn) = (block_x(), 0);
            while t < down * across {
                let (in_row, in_col) = (t / across * HOPPER_ROWS, t % across * HOPPER_COLS);
                let columns = Columns::new(bars + HOPPER_BARS, turn, HOPPER_COLS, COLUMN_PULL);
                columns.stage(&a.logits, a.col + in_col, thread());
                if L::NORMS {
                    columns.stage_norms(a, a.col + in_col, thread());
                }
                consumer_barrier();
                consume::<T, _, STAGES, 0, 0>(&mut ring, &mut acc, depth);
                // The thread that stores the staging knows when it has been read.
                let stores = warp() & 3 == 0 && lane() == 0;
                if stores {
                    bulk_wait_read();
                }
                warpgroup_barrier();
                let slots = [t % across, t / across * 8 + warp()];
                let mut tile = Wide { staging, ..Wide::together(&mut acc) };
                pull::<T, L, _, 2, SUMS>(a, law, &mut tile, columns, [in_row, in_col], slots);
                fence_async();
                warpgroup_barrier();
                if stores {
                    store_staged::<4>(staging, map_g, in_row + group * 64, in_col);
                }
                t += grid_x();
                turn += 1;
            }
            // Shared memory must outlive its readers.
            if warp() & 3 == 0 && lane() == 0 {
                bulk_wait_read();
            }
        }
    }
}

/// What a warpgroup's tile of G takes from memory if its pairs are plain. Asked for a tile ahead, it comes with the products.
#[derive(Clone, Copy)]
struct Ahead {
    plain: [[u32; 2]; 2],
    column: [f32; 2],
    rows: [[f32; 2]; 4],
}

impl Ahead {
    /// Of the tile at (`row`, `col`); a thread has one of its columns, a lane four of its rows.
    #[inline(always)]
    unsafe fn of(a: &Pull, row: u32, col: u32, thread: u32) -> Self {
        let l = &a.logits;
        // Of a norm only its maximum and its weight; the last for those that are not there.
        let norm = |norms: *const Norm, i: u32, count: u32| {
            let i = 2 * if i < count { i } else { count.saturating_sub(1) };
            // SAFETY: the launch contract.
            unsafe { optional(norms.cast::<[f32; 2]>(), i, [f32::INFINITY, 0.0]) }
        };
        let first = row + (warp() & 3) * 16 + (lane() >> 2);
        // SAFETY: the launch contract: the tile is in a span of either side.
        let plain = unsafe { spans_of(l, row, col) };
        let rows = [first, first + 8, first + 64, first + 72].map(|i| norm(a.norm_u, i, l.n));
        Ahead { plain, column: norm(a.norm_v, col + thread, l.m), rows }
    }
    /// Of nothing plain.
    const NONE: Ahead = Ahead { plain: [NO_SPAN; 2], column: [0.0; 2], rows: [[0.0; 2]; 4] };
}

/// [`crate::abi::Pull`] over all tiles of a chunk, each block taking every `grid`-th: the warpgroups in turns. For the softmax losses
/// without sums: what else there is to know of a pair takes more registers than two halves of a tile leave.
#[inline(always)]
unsafe fn pull_in_turns<T: Half>(a: &HopperPull, at: u64) {
    const STAGES: u32 = HOPPER_STAGES_TURNS;
    let (a, maps, map_g) = (&a.pull, [at, at + 128], at + 256);
    let base = shared_base();
    let staging = base + STAGES * HALF_STAGE;
    let bars = staging + HOPPER_ROWS * HOPPER_COLS * 2;
    let (down, across) = (a.rows.div_ceil(HOPPER_ROWS), a.cols.div_ceil(HOPPER_COLS));
    if across == 0 {
        return;
    }
    let depth = a.logits.depth;
    // SAFETY: the launch contract.
    unsafe {
        set_up::<STAGES>(bars, 4);
        if warp() >= 8 {
            registers_down::<PRODUCER>();
            if warp() == 8 && lane() == 0 {
                let mut ring = Ring::new(base, bars, HALF_STAGE, 1);
                let mut t = block_x();
                while t < down * across {
                    let (row, col) = (a.row + t / across * HOPPER_ROWS, a.col + t % across * HOPPER_COLS);
                    produce::<STAGES, 0, 0>(&mut ring, maps, row, col, 0, depth);
                    produce::<STAGES, 0, 0>(&mut ring, maps, row, col + HALF, 0, depth);
                    t += grid_x();
                }
            }
        } else {
            registers_up::<CONSUMER>();
            let mut ring = Ring::new(base, bars, HALF_STAGE, 0);
            let mut turns = Turns::new(bars + STAGES * 16);
            let (mut upper, mut lower) = (accumulator::<64>(), accumulator::<64>());
            let (group, thread) = (warp() >> 2, thread() & 127);
            let staging = staging + group * 4 * BLOCK;
            let buffers = bars + HOPPER_BARS + group * 2 * HALF * COLUMN_PULL;
            let l = &a.logits;
            let holds = anchored(l.flags, l.blocks);
            // No flag is of a row without plain pairs: its maximum may be anywhere.
            let near = near(a.far_u, a.row, a.rows) & near(a.far_v, a.col, a.cols);
            let shared = holds & near & l.ignore_u.is_null();
            let scale = l.scale * optional(l.live, 0, 1.0);
            let anchor = anchor(scale);
            // The thread that stores the staging knows when it has been read.
            let stores = thread == 0;
            let place = |t: u32| [t / across * HOPPER_ROWS, t % across * HOPPER_COLS + group * HALF];
            let ahead_of = |t: u32| {
                let [in_row, in_col] = place(if t < down * across { t } else { 0 });
                if holds { Ahead::of(a, a.row + in_row, a.col + in_col, thread) } else { Ahead::NONE }
            };
            let (mut t, mut turn) = (block_x(), 0);
            let mut ahead = ahead_of(t);
            while t < down * across {
                let [in_row, in_col] = place(t);
                let col = a.col + in_col;
                let columns = Columns::new(buffers, turn, HALF, COLUMN_PULL);
                let weighted = apart(ahead.plain);
                let by_row = ahead.rows.map(|norm| anchored_weight(a, norm, anchor));
                if weighted {
                    columns.stage_weight(anchored_weight(a, ahead.column, anchor), thread);
                } else if shared {
                    let own = Shares::of(a, a.norm_v, a.target_v, l.id_v, col + thread, l.m, anchor);
                    columns.stage_shares(&own, thread);
                } else {
                    columns.stage(l, col, thread);
                    columns.stage_norms(a, col, thread);
                }
                ahead = ahead_of(t + grid_x());
                consume_own::<T, STAGES>(&mut ring, &mut turns, [&mut upper, &mut lower], depth);
                if stores {
                    bulk_wait_read();
                }
                warpgroup_barrier();
                let mut halves = [Wide::new(&mut upper, 0, staging), Wide::new(&mut lower, 64, staging + 2 * BLOCK)];
                if weighted {
                    pull_plain_pairs::<T, _, 2>(&mut halves[0], scale, anchor, [by_row[0], by_row[1]], columns);
                    pull_plain_pairs::<T, _, 2>(&mut halves[1], scale, anchor, [by_row[2], by_row[3]], columns);
                } else if shared {
                    let first = a.row + in_row + halves[0].row(0);
                    let own = |i: u32| Shares::of(a, a.norm_u, a.target_u, l.id_u, first + i, l.n, anchor);
                    pull_anchored::<T, _, 2>(&mut halves[0], scale, anchor, [own(0), own(8)], columns);
                    pull_anchored::<T, _, 2>(&mut halves[1], scale, anchor, [own(64), own(72)], columns);
                } else {
                    let at = [in_row, in_col];
                    pull::<T, _, _, 2, false>(a, SoftmaxLaw, &mut halves[0], columns, at, [0; 2]);
                    pull::<T, _, _, 2, false>(a, SoftmaxLaw, &mut halves[1], columns, at, [0; 2]);
                }
                fence_async();
                warpgroup_barrier();
                if stores {
                    store_staged::<2>(staging, map_g, in_row, in_col);
                }
                t += grid_x();
                turn += 1;
            }
            // Shared memory must outlive its readers.
            if stores {
                bulk_wait_read();
            }
        }
    }
}

/// [`crate::abi::Pull`] of the softmax losses, with its sums or without; any grid.
///
/// # Safety
/// The launch contract; `at` is the address of the argument.
#[inline(always)]
pub unsafe fn pull_softmax<T: Half, const SUMS: bool>(a: &HopperPull, at: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        if SUMS {
            pull_together::<T, _, true>(a, at, SoftmaxLaw)
        } else {
            pull_in_turns::<T>(a, at)
        }
    }
}

/// [`crate::abi::Pull`] of the sigmoid loss; any grid.
///
/// # Safety
/// The launch contract; `at` is the address of the argument.
#[inline(always)]
pub unsafe fn pull_sigmoid<T: Half>(a: &HopperPull, at: u64) {
    // SAFETY: the caller's promise.
    unsafe { pull_together::<T, _, true>(a, at, SigmoidLaw) }
}

/// [`crate::abi::Pull`] of logits as they are; any grid.
///
/// # Safety
/// The launch contract; `at` is the address of the argument.
#[inline(always)]
pub unsafe fn pull_plain<T: Half>(a: &HopperPull, at: u64) {
    // SAFETY: the caller's promise.
    unsafe { pull_together::<T, _, false>(a, at, PlainLaw) }
}

/// [`crate::abi::Pull`] of softmaxes times a factor, with its sums; any grid.
///
/// # Safety
/// The launch contract; `at` is the address of the argument.
#[inline(always)]
pub unsafe fn pull_factored<T: Half>(a: &HopperPull, at: u64) {
    // SAFETY: the caller's promise.
    unsafe { pull_together::<T, _, true>(a, at, FactoredLaw) }
}

/// A tile of a product: where in C, and which part of k.
struct Work {
    row: u32,
    col: u32,
    part: u32,
    from: u32,
    depth: u32,
}

impl Work {
    /// Of all parts.
    #[inline(always)]
    fn count(g: &Gemm) -> u32 {
        g.m.div_ceil(HOPPER_ROWS) * g.n.div_ceil(HOPPER_COLS) * g.k.div_ceil(g.depth.max(1))
    }
    #[inline(always)]
    fn of(g: &Gemm, t: u32) -> Self {
        let across = g.n.div_ceil(HOPPER_COLS).max(1);
        let tiles = (g.m.div_ceil(HOPPER_ROWS) * across).max(1);
        let (part, tile) = (t / tiles, t % tiles);
        let from = part * g.depth;
        let (row, col) = (tile / across * HOPPER_ROWS, tile % across * HOPPER_COLS);
        Work { row, col, part, from, depth: g.depth.min(g.k.saturating_sub(from)) }
    }
}

/// Brings the tiles of both products, stages of `bytes`.
#[inline(always)]
unsafe fn produce_gemm<const STAGES: u32>(a: &HopperGemm, at: u64, mut ring: Ring) {
    let of_gv = Work::count(&a.gemms[0]);
    let end = of_gv + Work::count(&a.gemms[1]);
    let mut t = block_x();
    while t < end {
        // SAFETY: the launch contract.
        unsafe {
            if t < of_gv {
                let w = Work::of(&a.gemms[0], t);
                produce::<STAGES, 0, 1>(&mut ring, [at, at + 128], w.row, w.col, w.from, w.depth);
            } else {
                let w = Work::of(&a.gemms[1], t - of_gv);
                produce::<STAGES, 1, 1>(&mut ring, [at + 256, at + 384], w.row, w.col, w.from, w.depth);
            }
        }
        t += grid_x();
    }
}

/// Multiplies what [`produce_gemm`] brings, and adds it to C.
#[inline(always)]
unsafe fn consume_gemm<T: Half, const N: usize, const STAGES: u32>(a: &HopperGemm, mut ring: Ring)
where
    Accumulator<N>: Products,
{
    let of_gv = Work::count(&a.gemms[0]);
    let end = of_gv + Work::count(&a.gemms[1]);
    let mut acc = accumulator::<N>();
    let mut t = block_x();
    while t < end {
        // SAFETY: the launch contract; every tile of a part's C is one block's.
        unsafe {
            if t < of_gv {
                let w = Work::of(&a.gemms[0], t);
                consume::<T, _, STAGES, 0, 1>(&mut ring, &mut acc, w.depth);
                add_to(&a.gemms[0], &w, &Wide::together(&mut acc));
            } else {
                let w = Work::of(&a.gemms[1], t - of_gv);
                consume::<T, _, STAGES, 1, 1>(&mut ring, &mut acc, w.depth);
                add_to(&a.gemms[1], &w, &Wide::together(&mut acc));
            }
        }
        t += grid_x();
    }
}

/// The products of a chunk of G in halves, `C (+)= G V` and `C (+)= G' U`: together, as the tiles of one seldom fill a card.
/// Each block takes every `grid`-th tile; any grid. Narrow embeddings have tiles half as wide.
///
/// # Safety
/// The launch contract; `at` is the address of the argument.
#[inline(always)]
pub unsafe fn gemm<T: Half>(a: &HopperGemm, at: u64) {
    const STAGES: u32 = HOPPER_STAGES_GEMM;
    let base = shared_base();
    let bars = base + STAGES * STAGE;
    let narrow = a.gemms[0].n <= HALF && a.gemms[1].n <= HALF;
    let bytes = if narrow { HALF_STAGE } else { STAGE };
    // SAFETY: the launch contract.
    unsafe {
        set_up::<STAGES>(bars, 8);
        if warp() >= 8 {
            registers_down::<PRODUCER>();
            if warp() == 8 && lane() == 0 {
                produce_gemm::<STAGES>(a, at, Ring::new(base, bars, bytes, 1));
            }
        } else {
            registers_up::<CONSUMER>();
            let ring = Ring::new(base, bars, bytes, 0);
            if narrow {
                consume_gemm::<T, 64, STAGES>(a, ring);
            } else {
                consume_gemm::<T, 128, STAGES>(a, ring);
            }
        }
    }
}

/// The tile to its part's copy of C.
#[inline(always)]
unsafe fn add_to<const N: usize>(g: &Gemm, w: &Work, tile: &Wide<'_, N>) {
    let c = g.c.wrapping_add(w.part as usize * g.part as usize);
    let even = g.pitch_c.is_multiple_of(2);
    let at = |p: usize, r: usize| {
        let (i, j) = (w.row + tile.row(r), w.col + tile.col(p));
        (c.wrapping_add(i as usize * g.pitch_c as usize + j as usize), i < g.m && j < g.n, j + 1 < g.n)
    };
    let mut p = 0;
    while p < N / 4 {
        // SAFETY: the launch contract: C has these elements, and they are this lane's.
        unsafe {
            // What C holds is read sixteen pairs at a time: one by one, each wait would be as long as the sixteen's.
            let mut old = [[0f32; 2]; 16];
            if g.add != 0 {
                let mut q = 0;
                while q < 16 {
                    let (from, first, second) = at(p + q / 2, q % 2);
                    if first {
                        if even && second {
                            old[q] = load(from.cast_const().cast());
                        } else {
                            old[q][0] = load(from.cast_const());
                            if second {
                                old[q][1] = load(from.cast_const().wrapping_add(1));
                            }
                        }
                    }
                    q += 1;
                }
            }
            let mut q = 0;
            while q < 16 {
                let (to, first, second) = at(p + q / 2, q % 2);
                let sum = [old[q][0] + tile.get(q % 2, p + q / 2, 0), old[q][1] + tile.get(q % 2, p + q / 2, 1)];
                if first {
                    if even && second {
                        store(to.cast(), sum);
                    } else {
                        store(to, sum[0]);
                        if second {
                            store(to.wrapping_add(1), sum[1]);
                        }
                    }
                }
                q += 1;
            }
        }
        p += 8;
    }
}
