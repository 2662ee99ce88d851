//! The joint loss with a sampled normaliser (Remark 3.9): the diagonal and some random pairings, and no other pair.
//!
//! ```text
//! draw    (seed, k) -> pairing k and its inverse, pairing 0 being the diagonal
//! tally   logits of all pairings; a row's tally of the drawn ones, which `merge` and `total` take as they take any
//! pull    rows of G other: a row's pairs one after the other; and the same for columns, by the inverse
//! ```
//!
//! `G` is `2^(x - max) / sum` at a drawn pair, once for each time it is drawn, and the target on the diagonal. Nothing of it
//! is rounded to halves. Rows take a warp each.

use crate::abi::{DrawPairings, HOLE, PairedPull, PairedTally};
use crate::contrast::optional;
use crate::law::Num;
use crate::random::Order;
use crate::rows::WARPS;
use crate::simt::*;

/// Pairings and their inverses; a thread a pair, grid ceil(n / 256) (pairings + 1).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`DrawPairings`].
#[inline(always)]
pub unsafe fn draw(a: &DrawPairings) {
    let across = a.n.div_ceil(256);
    let (i, k) = (block_x() % across * 256 + thread(), block_x() / across);
    if i < a.n {
        // As `pairing` of the host draws them.
        let j = if k == 0 { i } else { Order::new(a.seed, !u64::from(k - 1), u64::from(a.n)).at(u64::from(i)) as u32 };
        let first = k as usize * a.n as usize;
        // SAFETY: the launch contract; an order visits every column once.
        unsafe {
            store(a.forth.wrapping_add(first + i as usize), j);
            store(a.back.wrapping_add(first + j as usize), i);
        }
    }
}

/// Eight neighbours of a row.
#[inline(always)]
unsafe fn eight<T: Half>(row: *const u16, at: u32) -> [f32; 8] {
    // SAFETY: the launch contract; pitches are multiples of 8.
    let [a, b, c, d]: [u32; 4] = unsafe { load(row.wrapping_add(at as usize).cast()) };
    let ([a, b], [c, d], [e, f], [g, h]) = (T::unpack(a), T::unpack(b), T::unpack(c), T::unpack(d));
    [a, b, c, d, e, f, g, h]
}

/// Logits of every pairing, and each row's tally.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`PairedTally`]; grid ceil(n / 8).
#[inline(always)]
pub unsafe fn tally<T: Half>(a: &PairedTally) {
    let row = block_x() * WARPS + warp();
    let l = &a.logits;
    if row >= l.n {
        return;
    }
    // SAFETY: the launch contract; a row is written by its own warp.
    unsafe {
        let scale = l.scale * optional(l.live, 0, 1.0);
        let u = l.u.wrapping_add(row as usize * l.pitch as usize);
        let (mut max, mut sum, mut diagonal) = (HOLE, 0f32, 0f32);
        let mut k = 0;
        while k <= a.pairings {
            let at = k as usize * l.n as usize + row as usize;
            let j = load(a.forth.wrapping_add(at));
            let v = l.v.wrapping_add(j as usize * l.pitch as usize);
            let mut dot = 0f32;
            let mut c = lane() * 8;
            while c < l.pitch {
                let (x, y) = (eight::<T>(u, c), eight::<T>(v, c));
                let mut e = 0;
                while e < 8 {
                    dot = fma(x[e], y[e], dot);
                    e += 1;
                }
                c += 256;
            }
            let x = fma(scale, sum_lanes(dot, 32), optional(l.shift_u, row, 0.0) + optional(l.shift_v, j, 0.0));
            if lane() == 0 {
                store(a.x.wrapping_add(at), x);
            }
            if k == 0 {
                diagonal = x;
            } else {
                let top = Num::max(max, x);
                sum = fma(sum, exp2(max - top), exp2(x - top));
                max = top;
            }
            k += 1;
        }
        if lane() == 0 {
            store(a.slots.wrapping_add(row as usize), [max, sum, 0.0, diagonal]);
        }
    }
}

/// Rows of `G other`, and their sums of G.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`PairedPull`]; grid ceil(n / 8).
#[inline(always)]
pub unsafe fn pull<T: Half>(a: &PairedPull) {
    let row = block_x() * WARPS + warp();
    if row >= a.n {
        return;
    }
    // SAFETY: the launch contract; a row is written by its own warp.
    unsafe {
        let [max, sum]: [f32; 2] = load(a.joint);
        let mut first = 0;
        while first < a.dim {
            // 512 numbers of a row, 16 of them a lane's; those behind it are of padding, or of its beginning again.
            let at = [first + lane() * 8, first + 256 + lane() * 8];
            let from = at.map(|c| if c < a.pitch { c } else { 0 });
            let mut acc = [[0f32; 8]; 2];
            let (mut all, mut moment) = (0f32, 0f32);
            let mut k = 0;
            while k <= a.pairings {
                let pairing = k as usize * a.n as usize;
                let j = load(a.order.wrapping_add(pairing + row as usize));
                let of = if a.by_row != 0 { row } else { j } as usize;
                let x = load(a.x.wrapping_add(pairing + of));
                let g = if k == 0 { load(a.target.wrapping_add(of)) } else { exp2(x - max) / sum };
                (all, moment) = (all + g, fma(g, x, moment));
                let other = a.other.wrapping_add(j as usize * a.pitch as usize);
                let mut h = 0;
                while h < 2 && !a.acc.is_null() {
                    let y = eight::<T>(other, from[h]);
                    let mut e = 0;
                    while e < 8 {
                        acc[h][e] = fma(g, y[e], acc[h][e]);
                        e += 1;
                    }
                    h += 1;
                }
                k += 1;
            }
            let mut h = 0;
            while h < 2 {
                let mut e = 0;
                while e < 8 {
                    let c = at[h] + e as u32;
                    if c < a.dim && !a.acc.is_null() {
                        store(a.acc.wrapping_add(row as usize * a.dim as usize + c as usize), acc[h][e]);
                    }
                    e += 1;
                }
                h += 1;
            }
            if (first == 0) & (lane() == 0) {
                if !a.row_sums.is_null() {
                    store(a.row_sums.wrapping_add(row as usize), [0.0, all, moment, 0.0]);
                }
                if !a.col_sums.is_null() {
                    store(a.col_sums.wrapping_add(row as usize), all);
                }
            }
            first += 512;
        }
    }
}
