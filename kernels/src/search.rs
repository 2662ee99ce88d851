//! Exact search: scores of queries against items, a tile at a time, counted or chosen from as they are made.
//!
//! ```text
//! split     rows of f32 as two halves a number: the product over three times the depth has 22 bits of each
//! own       the score of query i against item first + i
//! rank      how many items come before that one
//! nearest   the best `keep` items of each query: a heap for each thread, the worst on top
//! merge     a query's heaps into one
//! ```
//!
//! A tile goes through shared memory, columns together, so that a thread meets half a row's scores in the order of their
//! columns and nothing is shared between threads. Heaps lie in global memory: after the first tiles hardly anything gets
//! into one, and they may be of any size. A score is one sum in an order that depends on the depth alone: equal items tie
//! to the bit, wherever they are.

use crate::abi::{Search, Split, TILE};
use crate::law;
use crate::rows::{WARPS, bits};
use crate::simt::*;
use crate::tile::{ByK, Halves, Place, product};

/// Numbers from a column of a tile in shared memory to the next: what a warp writes at a time lies in different banks.
const STRIDE: u32 = TILE + 4;
/// Columns of a tile that a thread goes through.
const HALF: u32 = TILE / 2;

/// `[high, high, low]` of queries or, with ITEMS, `[high, low, high]`: what a number is rounded to, and what is left of it.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Split`]; grid ceil(rows / 8).
#[inline(always)]
pub unsafe fn split<const ITEMS: bool>(a: &Split) {
    let row = block_x() * WARPS + warp();
    if row >= a.rows {
        return;
    }
    let x = |k: u32| {
        // SAFETY: the launch contract.
        if k < a.dim { unsafe { load(a.x.wrapping_add(row as usize * a.dim as usize + k as usize)) } } else { 0.0 }
    };
    let mut top = 0f32;
    let mut k = lane();
    while k < a.dim {
        top = law::Num::max(top, law::Num::abs(x(k)));
        k += 32;
    }
    // The largest becomes 2^7 to 2^8: all that is left of it is well above the least of halves.
    let exponent = (max_lanes(top, 32).to_bits() >> 23).clamp(8, 255);
    let (scale, unit) = (f32::from_bits((261 - exponent) << 23), f32::from_bits((exponent - 7) << 23));
    if lane() == 0 {
        // SAFETY: the launch contract.
        unsafe { store(a.unit.wrapping_add(row as usize), unit) };
    }
    let mut k = lane();
    while k < a.pitch {
        // SAFETY: the launch contract; a row is written by its own warp.
        unsafe {
            let x = x(k) * scale;
            let high = bits::<F16>(x);
            let low = bits::<F16>(x - F16::unpack(u32::from(high))[0]);
            let to = a.out.wrapping_add(row as usize * 3 * a.pitch as usize + k as usize);
            store(to, high);
            store(to.wrapping_add(a.pitch as usize), if ITEMS { low } else { high });
            store(to.wrapping_add(2 * a.pitch as usize), if ITEMS { high } else { low });
        }
        k += 32;
    }
}

/// Calls `take(item, score)` for each of the tile's items that this thread has of its query, in their order; -inf where a
/// score is no number.
///
/// # Safety
/// The launch contract; all 256 threads of the block call it.
#[inline(always)]
unsafe fn scores(a: &Search, row: u32, col: u32, mut take: impl FnMut(u32, f32)) {
    let queries = ByK { source: Halves { at: a.queries, pitch: a.depth }, count: a.n, depth: a.depth };
    let items = ByK { source: Halves { at: a.items, pitch: a.depth }, count: a.m, depth: a.depth };
    // SAFETY: the launch contract; between barriers the tile is written or read.
    unsafe {
        let acc = product::<F16, _, _>(queries, items, row, col, a.depth);
        let (base, place) = (shared_base(), Place::of_lane());
        // Other warps may still read the last slices, which lie where scores go.
        sync();
        let mut f = 0;
        while f < 16 {
            let mut e = 0;
            while e < 4 {
                store_shared(base + 4 * (place.col_of(f, e) * STRIDE + place.row_of(f, e)), acc[f][e]);
                e += 1;
            }
            f += 1;
        }
        sync();
        if query(row) < a.n {
            let unit = load(a.query_unit.wrapping_add(query(row) as usize));
            let mut c = thread() / TILE * HALF;
            let end = (c + HALF).min(a.m - col);
            while c < end {
                let (x, j) = (load_shared::<f32>(base + 4 * (c * STRIDE + thread() % TILE)), (col + c) as usize);
                let x = fma(x * unit, load(a.item_unit.wrapping_add(j)), load(a.offset.wrapping_add(j)));
                take(col + c, if x > f32::NEG_INFINITY { x } else { f32::NEG_INFINITY });
                c += 1;
            }
        }
    }
}

/// The query of this thread, whose tile starts at `row`; beyond the last there is none.
#[inline(always)]
fn query(row: u32) -> u32 {
    row + thread() % TILE
}

/// The item tiles of this block: grid (splits, query tiles).
#[inline(always)]
unsafe fn every_tile(a: &Search, mut take: impl FnMut(u32, f32)) {
    let mut t = block_x() * a.tiles;
    let end = t + a.tiles;
    while t < end && t * TILE < a.m {
        // SAFETY: the caller's promise.
        unsafe { scores(a, block_y() * TILE, t * TILE, &mut take) };
        t += 1;
    }
}

/// Which of the two threads of a query in each split.
#[inline(always)]
fn slot() -> usize {
    (block_x() * 2 + thread() / TILE) as usize
}

/// Each query's score against its own item; grid (1, query tiles).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Search`].
#[inline(always)]
pub unsafe fn own(a: &Search) {
    let row = block_y() * TILE;
    // SAFETY: the launch contract; one thread has the item.
    unsafe {
        scores(a, row, a.first + row, |j, x| {
            if j == a.first + query(row) {
                store(a.own.wrapping_add(query(row) as usize), x);
            }
        });
    }
}

/// How many items come before each query's own, those of the split; grid (splits, query tiles).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Search`].
#[inline(always)]
pub unsafe fn rank(a: &Search) {
    let i = query(block_y() * TILE);
    // SAFETY: the launch contract; the slot is this thread's.
    unsafe {
        let own: f32 = if i < a.n { load(a.own.wrapping_add(i as usize)) } else { 0.0 };
        let mut count = 0;
        every_tile(a, |j, x| count += u32::from((x > own) | ((x == own) & (j < a.first + i))));
        if i < a.n {
            store(a.ranks.wrapping_add(slot() * a.n as usize + i as usize), count);
        }
    }
}

/// Larger for a better item: by its score, then by its index. 0 is none.
#[inline(always)]
fn key(score: f32, item: u32) -> u64 {
    let bits = score.to_bits();
    let ordered = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(ordered) << 32 | u64::from(!item)
}

/// The best so many keys of a query, the worst of them on top.
struct Heap {
    at: *mut u64,
    /// Keys from one to the next.
    step: usize,
    keep: u32,
    worst: u64,
}

impl Heap {
    /// Heap `slot` of query `i`, of no items yet; nothing where there is no such query.
    #[inline(always)]
    unsafe fn new(a: &Search, slot: usize, i: u32) -> Self {
        let (step, keep) = (a.n as usize, a.keep as usize);
        let at = a.heaps.wrapping_add(slot * keep * step + i as usize);
        let mut e = 0;
        while e < keep && i < a.n {
            // SAFETY: the caller's promise: it is this thread's.
            unsafe { store(at.wrapping_add(e * step), 0) };
            e += 1;
        }
        Heap { at, step, keep: a.keep, worst: 0 }
    }

    /// In place of the worst, if it is better.
    #[inline(always)]
    unsafe fn offer(&mut self, key: u64) {
        if key <= self.worst {
            return;
        }
        let at = |e: u32| self.at.wrapping_add(e as usize * self.step);
        // SAFETY: below `keep`; it is this thread's.
        unsafe {
            let mut e = 0;
            loop {
                let mut next = 2 * e + 1;
                if next >= self.keep {
                    break;
                }
                let mut least: u64 = load(at(next));
                if next + 1 < self.keep {
                    let other = load(at(next + 1));
                    (next, least) = if other < least { (next + 1, other) } else { (next, least) };
                }
                if least >= key {
                    break;
                }
                store(at(e), least);
                e = next;
            }
            store(at(e), key);
            self.worst = load(at(0));
        }
    }
}

/// The best items of the split for each query; grid (splits, query tiles).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Search`].
#[inline(always)]
pub unsafe fn nearest(a: &Search) {
    // SAFETY: the launch contract; the heap is this thread's.
    unsafe {
        let mut heap = Heap::new(a, slot(), query(block_y() * TILE));
        every_tile(a, |j, x| heap.offer(key(x, j)));
    }
}

/// All heaps of a query into one, behind them; grid ceil(n / 256).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Search`]; `tiles` is how many heaps a query has.
#[inline(always)]
pub unsafe fn merge(a: &Search) {
    let i = block_x() * 256 + thread();
    if i < a.n {
        // SAFETY: the launch contract; the heaps of a query are one thread's.
        unsafe {
            let count = a.tiles as usize * a.keep as usize;
            let mut heap = Heap::new(a, a.tiles as usize, i);
            let mut e = 0;
            while e < count {
                heap.offer(load(a.heaps.wrapping_add(e * a.n as usize + i as usize)));
                e += 1;
            }
        }
    }
}
