//! One pass over rows: embeddings on their way to the tile and gradients on their way out of it, tallies into softmaxes,
//! and sums in a fixed order.
//!
//! Rows of numbers take a warp each, eight rows a block; rows of scalars a thread each, 256 a block.

use crate::abi::{
    Each, Finish, Fold, HOLE, Merge, Norm, Normalise, Prepare, Residual, Soften, SumColumns, MOST_SUMS, Total, Totals,
    Weigh,
};
use crate::contrast::{NEAR, anchor, anchored, optional};
use crate::law;
use crate::simt::*;

/// Rows of a block where a warp takes one.
pub(crate) const WARPS: u32 = 8;

/// The block's own of a launch's arguments: chosen number by number, as a place that is computed would be in local memory.
#[inline(always)]
pub(crate) fn own<A: Copy, const N: usize>(each: &[A; N]) -> A {
    let (z, mut own, mut k) = (block_z() as usize, each[0], 1);
    while k < N {
        if z == k {
            own = each[k];
        }
        k += 1;
    }
    own
}

/// A row's element as f32.
#[inline(always)]
unsafe fn read<T: Half, const HALVES: bool>(x: *const (), at: usize) -> f32 {
    // SAFETY: the launch contract.
    unsafe {
        if HALVES {
            T::unpack(u32::from(load(x.cast::<u16>().wrapping_add(at))))[0]
        } else {
            load(x.cast::<f32>().wrapping_add(at))
        }
    }
}

#[inline(always)]
pub(crate) fn bits<T: Half>(x: f32) -> u16 {
    T::pack(x, 0.0) as u16
}

/// Steps of a row whose numbers a lane brings at once, and holds: loads that wait for none before them, and a row of up to
/// 512 numbers is read but once.
const HELD: usize = 4;

/// Numbers of all of a warp's held steps, W neighbours a lane and step.
const fn held<const W: usize>() -> u32 {
    (HELD * 32 * W) as u32
}

/// First number of a lane's step `h` from `first`.
#[inline(always)]
fn step_at<const W: usize>(first: u32, h: usize) -> u32 {
    first + (h as u32 * 32 + lane()) * W as u32
}

/// What [`step_at`] names, or the row's first numbers where there are none: loads without branches.
#[inline(always)]
fn inside<const W: usize>(first: u32, h: usize, dim: u32) -> u32 {
    let k = step_at::<W>(first, h);
    if k < dim { k } else { 0 }
}

/// Nothing in place of what [`inside`] brought for numbers behind `dim`.
#[inline(always)]
fn zeros_behind<const W: usize>(x: &mut [[f32; W]; HELD], first: u32, dim: u32) {
    let mut h = 0;
    while h < HELD {
        let there = step_at::<W>(first, h) < dim;
        let mut c = 0;
        while c < W {
            x[h][c] = if there { x[h][c] } else { 0.0 };
            c += 1;
        }
        h += 1;
    }
}

/// Whether rows of `dim` may be taken by four: `addresses`, or'ed, are of 16 bytes.
#[inline(always)]
fn by_four(dim: u32, addresses: usize) -> bool {
    (dim.is_multiple_of(4)) & (addresses.is_multiple_of(16))
}

/// W neighbours, 1 or 4, in one load.
#[inline(always)]
unsafe fn singles<const W: usize>(from: *const f32) -> [f32; W] {
    let mut x = [0.0; W];
    // SAFETY: the launch contract; four where they are aligned.
    unsafe {
        if W == 4 {
            let all: [f32; 4] = load(from.cast());
            let mut c = 0;
            while c < W {
                x[c] = all[c];
                c += 1;
            }
        } else {
            x[0] = load(from);
        }
    }
    x
}

/// [`singles`] of halves.
#[inline(always)]
unsafe fn halves<T: Half, const W: usize>(from: *const u16) -> [f32; W] {
    let mut x = [0.0; W];
    // SAFETY: as in [`singles`].
    unsafe {
        if W == 4 {
            let words: [u32; 2] = load(from.cast());
            let mut c = 0;
            while c < W {
                x[c] = T::unpack(words[c / 2])[c % 2];
                c += 1;
            }
        } else {
            x[0] = T::unpack(u32::from(load(from)))[0];
        }
    }
    x
}

/// The opposite of [`singles`].
#[inline(always)]
unsafe fn put_singles<const W: usize>(to: *mut f32, x: [f32; W]) {
    // SAFETY: as in [`singles`].
    unsafe {
        if W == 4 {
            store(to.cast(), [x[0], x[1 % W], x[2 % W], x[3 % W]]);
        } else {
            store(to, x[0]);
        }
    }
}

/// The opposite of [`halves`]; what they were rounded to.
#[inline(always)]
unsafe fn put_halves<T: Half, const W: usize>(to: *mut u16, x: [f32; W]) -> [f32; W] {
    let mut rounded = [0.0; W];
    // SAFETY: as in [`singles`].
    unsafe {
        if W == 4 {
            let words = [T::pack(x[0], x[1 % W]), T::pack(x[2 % W], x[3 % W])];
            store(to.cast(), words);
            let mut c = 0;
            while c < W {
                rounded[c] = T::unpack(words[c / 2])[c % 2];
                c += 1;
            }
        } else {
            let half = bits::<T>(x[0]);
            store(to, half);
            rounded[0] = T::unpack(u32::from(half))[0];
        }
    }
    rounded
}

/// The held steps of a row of embeddings from number `first`; zeros behind `dim`.
#[inline(always)]
unsafe fn embedding<T: Half, const HALVES: bool, const W: usize>(
    a: &Prepare,
    row: u32,
    first: u32,
) -> [[f32; W]; HELD] {
    let from = row as usize * a.dim as usize;
    let mut x = [[0.0; W]; HELD];
    let mut h = 0;
    while h < HELD {
        let at = from + inside::<W>(first, h, a.dim) as usize;
        // SAFETY: the launch contract.
        x[h] = unsafe {
            if HALVES {
                halves::<T, W>(a.x.cast::<u16>().wrapping_add(at))
            } else {
                singles(a.x.cast::<f32>().wrapping_add(at))
            }
        };
        h += 1;
    }
    zeros_behind(&mut x, first, a.dim);
    x
}

/// Embeddings as the tile wants them: unit rows or centred rows, rounded to halves, a pitch apart.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Prepare`]; grid ceil(rows / 8).
#[inline(always)]
pub unsafe fn prepare<T: Half, const HALVES: bool>(a: &Prepare) {
    let row = block_x() * WARPS + warp();
    if row >= a.rows {
        return;
    }
    // SAFETY: the caller's promise; pitches are multiples of 8.
    unsafe {
        if by_four(a.dim, a.x as usize | a.shift as usize | a.out as usize) {
            prepare_row::<T, HALVES, 4>(a, row);
        } else {
            prepare_row::<T, HALVES, 1>(a, row);
        }
    }
}

#[inline(always)]
unsafe fn prepare_row<T: Half, const HALVES: bool, const W: usize>(a: &Prepare, row: u32) {
    // SAFETY: the launch contract; a row is written by its own warp.
    unsafe {
        let mut x = embedding::<T, HALVES, W>(a, row, 0);
        let mut scale = a.scale;
        if !a.inverse.is_null() {
            // There for the largest element, back for the norm, and there again below: what is held is read once.
            let mut top = 0f32;
            let mut first = 0;
            loop {
                let mut h = 0;
                while h < HELD {
                    let mut c = 0;
                    while c < W {
                        top = law::Num::max(top, law::Num::abs(x[h][c]));
                        c += 1;
                    }
                    h += 1;
                }
                if a.dim - first <= held::<W>() {
                    break;
                }
                first += held::<W>();
                x = embedding::<T, HALVES, W>(a, row, first);
            }
            // Times the inverse of the largest's power of two, so that squares neither overflow nor vanish.
            let power = max_lanes(top, 32).to_bits() & 0x7f80_0000;
            let inverse_power = f32::from_bits(0x7f00_0000u32.saturating_sub(power).max(0x0080_0000));
            let mut sum = 0f32;
            loop {
                let mut h = 0;
                while h < HELD {
                    let mut c = 0;
                    while c < W {
                        let x = x[h][c] * inverse_power;
                        sum = fma(x, x, sum);
                        c += 1;
                    }
                    h += 1;
                }
                if first == 0 {
                    break;
                }
                first -= held::<W>();
                x = embedding::<T, HALVES, W>(a, row, first);
            }
            let norm = sqrt(sum_lanes(sum, 32)) / inverse_power;
            scale = if norm < f32::MIN_POSITIVE { 0.0 } else { 1.0 / norm };
            if lane() == 0 {
                store(a.inverse.wrapping_add(row as usize), scale);
            }
        }
        let out = a.out.wrapping_add(row as usize * a.pitch as usize);
        let mut sum = 0f32;
        let mut first = 0;
        loop {
            let mut h = 0;
            while h < HELD {
                let k = step_at::<W>(first, h);
                let shift = if a.shift.is_null() {
                    [0.0; W]
                } else {
                    singles(a.shift.wrapping_add(inside::<W>(first, h, a.dim) as usize))
                };
                let mut scaled = [0.0; W];
                let mut c = 0;
                while c < W {
                    scaled[c] = if k < a.dim { (x[h][c] - shift[c]) * scale } else { 0.0 };
                    c += 1;
                }
                if k == a.dim {
                    scaled[0] = a.behind;
                }
                if k < a.pitch {
                    let rounded = put_halves::<T, W>(out.wrapping_add(k as usize), scaled);
                    let mut c = 0;
                    while c < W {
                        sum = fma(rounded[c], rounded[c], sum);
                        c += 1;
                    }
                }
                h += 1;
            }
            if a.pitch - first <= held::<W>() {
                break;
            }
            first += held::<W>();
            x = embedding::<T, HALVES, W>(a, row, first);
        }
        if !a.half_norm.is_null() {
            let sum = sum_lanes(sum, 32);
            if lane() == 0 {
                let offset = if a.offset.is_null() { 0.0 } else { load(a.offset.wrapping_add(row as usize)) };
                let x = fma(offset, core::f32::consts::LOG2_E, sum * a.norm_scale * optional(a.live, 0, 1.0));
                store(a.half_norm.wrapping_add(row as usize), x);
            }
        }
    }
}

/// Gradients from `acc = gain G other` through the tilting, see [`Finish`]; and `sum_i <x_i, acc_i>` a block.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Finish`]; grid ceil(rows / 8).
#[inline(always)]
pub unsafe fn finish<T: Half>(a: &Finish) {
    let row = block_x() * WARPS + warp();
    let mut along = 0f32;
    // SAFETY: the launch contract; pitches are multiples of 8.
    unsafe {
        if row < a.rows {
            along = if by_four(a.dim, a.acc as usize | a.x as usize | a.out as usize) {
                finish_row::<T, 4>(a, row)
            } else {
                finish_row::<T, 1>(a, row)
            };
        }
        if !a.along.is_null() {
            sum_of_warps(along, a.along);
        }
    }
}

/// The held steps of a row of `x` and of the sum of `acc`'s parts from number `first`; zeros behind `dim`.
#[inline(always)]
unsafe fn gradient<T: Half, const W: usize>(a: &Finish, row: u32, first: u32) -> ([[f32; W]; HELD], [[f32; W]; HELD]) {
    let (mut x, mut acc) = ([[0.0; W]; HELD], [[0.0; W]; HELD]);
    let mut from = a.acc.wrapping_add(row as usize * a.dim as usize);
    // SAFETY: the launch contract.
    unsafe {
        let mut h = 0;
        while h < HELD {
            let k = inside::<W>(first, h, a.dim) as usize;
            x[h] = halves::<T, W>(a.x.wrapping_add(row as usize * a.pitch as usize + k));
            acc[h] = singles(from.wrapping_add(k));
            h += 1;
        }
        let mut part = 1;
        while part < a.parts {
            // Where lanes meet, the compiler unrolls no loop: several parts at once are more registers than the row's own.
            sync_warp();
            from = from.wrapping_add(a.rows as usize * a.dim as usize);
            let mut more = [[0.0; W]; HELD];
            let mut h = 0;
            while h < HELD {
                more[h] = singles(from.wrapping_add(inside::<W>(first, h, a.dim) as usize));
                h += 1;
            }
            let mut h = 0;
            while h < HELD {
                let mut c = 0;
                while c < W {
                    acc[h][c] += more[h][c];
                    c += 1;
                }
                h += 1;
            }
            part += 1;
        }
    }
    // Of a product one nothing is not enough: the other may be no number.
    zeros_behind(&mut x, first, a.dim);
    zeros_behind(&mut acc, first, a.dim);
    (x, acc)
}

/// [`finish`] of a row: its `<x, acc>`.
#[inline(always)]
unsafe fn finish_row<T: Half, const W: usize>(a: &Finish, row: u32) -> f32 {
    // SAFETY: the launch contract; a row is written by its own warp, a number by the lane that read it.
    unsafe {
        let (mut x, mut acc) = gradient::<T, W>(a, row, 0);
        let mut along = 0f32;
        let mut first = 0;
        loop {
            let mut h = 0;
            while h < HELD {
                let mut c = 0;
                while c < W {
                    along = fma(x[h][c], acc[h][c], along);
                    c += 1;
                }
                h += 1;
            }
            if a.dim - first <= held::<W>() {
                break;
            }
            first += held::<W>();
            (x, acc) = gradient::<T, W>(a, row, first);
        }
        let along = sum_lanes(along, 32);
        if a.out.is_null() {
            return along;
        }
        let (mut scale, mut pull) = (a.scale * optional(a.live, 0, 1.0), 0f32);
        if !a.inverse.is_null() {
            // d(x/|x|): off the row's own direction, over its norm.
            pull = along;
            scale *= load(a.inverse.wrapping_add(row as usize));
        }
        if !a.g_sums.is_null() {
            // d|u - v|^2 = 2 (u sum G - G v), whose sign is in the scale.
            pull = a.gain * load(a.g_sums.wrapping_add(row as usize * a.g_stride as usize));
        }
        // Back from the end, whose numbers are held.
        let out = a.out.wrapping_add(row as usize * a.dim as usize);
        loop {
            let mut h = 0;
            while h < HELD {
                let k = step_at::<W>(first, h);
                if k < a.dim {
                    let to = out.wrapping_add(k as usize);
                    let old = if a.add != 0 { singles(to) } else { [0.0; W] };
                    let mut new = [0.0; W];
                    let mut c = 0;
                    while c < W {
                        new[c] = old[c] + scale * (acc[h][c] - pull * x[h][c]);
                        c += 1;
                    }
                    put_singles(to, new);
                }
                h += 1;
            }
            if first == 0 {
                break;
            }
            first -= held::<W>();
            (x, acc) = gradient::<T, W>(a, row, first);
        }
        along
    }
}

/// The sum over the block's warps of what their lanes hold alike, to `out[block]`.
#[inline(always)]
unsafe fn sum_of_warps(x: f32, out: *mut f64) {
    let (base, own) = (shared_base(), warp() * 4);
    // SAFETY: 32 bytes of shared memory, written once; the slot is this block's.
    unsafe {
        if lane() == 0 {
            store_shared(base + own, x);
        }
        sync();
        if thread() == 0 {
            let mut sum = 0f64;
            let mut w = 0;
            while w < WARPS {
                sum += f64::from(load_shared::<f32>(base + w * 4));
                w += 1;
            }
            store(out.wrapping_add(block_x() as usize), sum);
        }
    }
}

/// Residuals of MMD into factors, see [`Residual`].
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Residual`]; grid ceil(rows / 8).
#[inline(always)]
pub unsafe fn residual<T: Half>(a: &Residual) {
    let row = block_x() * WARPS + warp();
    let mut loss = 0f32;
    // SAFETY: the launch contract; a row is written by its own warp.
    unsafe {
        if row < a.rows {
            let (i, at) = (row as usize, row as usize * a.dim as usize);
            let weight = a.lambda * load(a.share.wrapping_add(i));
            let counts = weight > 0.0;
            let inverse_weight = if counts { a.scale / weight } else { 0.0 };
            let t = |k: u32| if counts { load(a.target.wrapping_add(at + k as usize)) } else { 0.0 };
            // The target of what the tile saw of features: near it a mean is little else.
            let seen = |k: u32| {
                if counts && !a.rounded.is_null() {
                    load(a.rounded.wrapping_add(at + k as usize))
                } else {
                    T::unpack(u32::from(bits::<T>((t(k) - load(a.shift.wrapping_add(k as usize))) * a.unit)))[0]
                }
            };
            // The residual without its weight: numbers of the size of features. What features were multiplied by adds up to
            // nothing, but for its rounding, of which the target's own, near -1, has the most: counted from the target, the
            // sum does not see that one.
            let sums = a.acc.wrapping_add(at + i);
            let total = load(sums.wrapping_add(a.dim as usize));
            let r = |k: u32| (load(sums.wrapping_add(k as usize)) - total * seen(k)) * inverse_weight;
            let (mut square, mut target) = (0f32, 0f32);
            let mut k = lane();
            while k < a.dim {
                (square, target) = (fma(r(k), r(k), square), fma(t(k), t(k), target));
                k += 32;
            }
            let (square, target) = (sum_lanes(square, 32), sum_lanes(target, 32));
            let length = sqrt(square);
            let inverse = if length < f32::MIN_POSITIVE { 0.0 } else { 1.0 / length };
            // <mean, out>, of what the tile will see of `out`.
            let mut along = 0f32;
            let mut k = lane();
            while k < a.pitch {
                let mut rounded = 0;
                if k < a.dim {
                    rounded = bits::<T>(r(k) * inverse);
                    along = fma(T::unpack(u32::from(rounded))[0], r(k) + seen(k), along);
                }
                store(a.out.wrapping_add(i * a.pitch as usize + k as usize), rounded);
                k += 32;
            }
            let along = sum_lanes(along, 32);
            if lane() == 0 {
                let [max, plain, ..]: Norm = load(a.norm.wrapping_add(i));
                let plain = plain * length / (a.unit * a.unit);
                store(a.norm.wrapping_add(i), [max, plain, 0.0, plain]);
                store(a.offset.wrapping_add(i), -along);
            }
            loss = 0.5 * weight * (square / (a.unit * a.unit) - target);
        }
        sum_of_warps(loss, a.loss);
    }
}

/// Rows times their shares.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Weigh`]; grid ceil(rows / 8).
#[inline(always)]
pub unsafe fn weigh(a: &Weigh) {
    let row = block_x() * WARPS + warp();
    if row < a.rows {
        // SAFETY: the launch contract; a row is written by its own warp.
        unsafe {
            let share: f32 = load(a.share.wrapping_add(row as usize));
            let mut k = lane();
            while k < a.dim {
                let at = row as usize * a.dim as usize + k as usize;
                let x = if share > 0.0 { load(a.x.wrapping_add(at)) } else { 0.0 };
                store(a.out.wrapping_add(at), share * x);
                k += 32;
            }
        }
    }
}

/// The sum of `x` over the block's 256 threads, in all of them: one fixed tree.
///
/// # Safety
/// All threads of the block call it; the first 2048 bytes of shared memory are its own.
#[inline(always)]
pub unsafe fn block_sum(x: f64) -> f64 {
    let (base, t) = (shared_base(), thread());
    // SAFETY: 2048 bytes of shared memory; halves are separated by barriers.
    unsafe {
        store_shared(base + t * 8, x);
        sync();
        let mut half = 128;
        while half > 0 {
            if t < half {
                let sum = load_shared::<f64>(base + t * 8) + load_shared::<f64>(base + (t + half) * 8);
                store_shared(base + t * 8, sum);
            }
            sync();
            half /= 2;
        }
        let sum = load_shared::<f64>(base);
        sync();
        sum
    }
}

/// The row's sum over the slots of its anchored exponentials, slots in order.
#[inline(always)]
unsafe fn anchored_sum(a: &Merge, row: usize) -> f32 {
    // SAFETY: the launch contract.
    let part = |p: u32| unsafe { load(a.sums.wrapping_add(p as usize * a.n as usize + row)) };
    let (mut sum, mut p) = (0f32, 0);
    // Eight loads at a time: each takes longer than all the sums.
    while p + 8 <= a.sum_slots {
        let parts = [part(p), part(p + 1), part(p + 2), part(p + 3), part(p + 4), part(p + 5), part(p + 6), part(p + 7)];
        let mut k = 0;
        while k < 8 {
            sum += parts[k];
            k += 1;
        }
        p += 8;
    }
    while p < a.sum_slots {
        sum += part(p);
        p += 1;
    }
    sum
}

/// A row's slots as one tally, and its sums over all logits; `holds` as [`anchored`] says.
#[inline(always)]
unsafe fn merged(a: &Merge, row: u32, holds: bool) -> ([f32; 4], [f32; 2]) {
    let at = |p: u32| p as usize * a.n as usize + row as usize;
    // SAFETY: the launch contract.
    unsafe {
        let (mut max, mut p) = (HOLE, 0);
        while p < a.slots {
            max = law::Num::max(max, load(a.tallies.wrapping_add(at(p)))[0]);
            p += 1;
        }
        // What the plain pairs add: a power of two that no f32 need hold, times a number of one octave.
        let plain = if holds { anchored_sum(a, row as usize) } else { 0.0 };
        let power = ((plain.to_bits() >> 23) as i32 - 127) as f32;
        let (plain_max, plain) = if plain > 0.0 {
            (anchor(a.scale * optional(a.live, 0, 1.0)) + power, plain * exp2(-power))
        } else {
            (HOLE, 0.0)
        };
        max = law::Num::max(max, plain_max);
        let (mut negatives, mut positives, mut pulled) = (plain * exp2(plain_max - max), 0f32, 0f32);
        let mut all = [0f32; 2];
        let mut p = 0;
        while p < a.slots {
            let part: [f32; 4] = load(a.tallies.wrapping_add(at(p)));
            let shrink = exp2(part[0] - max);
            negatives = fma(part[1], shrink, negatives);
            positives = fma(part[2], shrink, positives);
            pulled += part[3];
            if !a.all.is_null() {
                let part: [f32; 2] = load(a.all.wrapping_add(at(p)));
                all = [all[0] + part[0], all[1] + part[1]];
            }
            p += 1;
        }
        ([max, negatives, positives, pulled], all)
    }
}

/// Slots of [`crate::contrast::tally`] into one tally a row; and the block's rows into one log-sum-exp.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Merge`]; grid ceil(n / 256).
#[inline(always)]
pub unsafe fn merge(a: &Merge) {
    let row = block_x() * 256 + thread();
    let (mut max, mut sum) = (HOLE, 0f32);
    // SAFETY: the launch contract.
    unsafe {
        let holds = anchored(a.flags, a.blocks);
        if row < a.n {
            let (tally, all) = merged(a, row, holds);
            store(a.row.wrapping_add(row as usize), tally);
            if !a.all.is_null() {
                store(a.row_all.wrapping_add(row as usize), all);
            }
            (max, sum) = (tally[0], tally[1] + tally[2]);
        }
        // All 256 threads: the block's largest, then its sum.
        let (base, t) = (shared_base(), thread());
        store_shared(base + t * 4, if sum > 0.0 { max } else { HOLE });
        sync();
        let mut half = 128;
        while half > 0 {
            if t < half {
                let (x, y) = (load_shared::<f32>(base + t * 4), load_shared::<f32>(base + (t + half) * 4));
                store_shared(base + t * 4, law::Num::max(x, y));
            }
            sync();
            half /= 2;
        }
        let top = load_shared::<f32>(base);
        sync();
        let sum = block_sum(if sum > 0.0 { f64::from(sum * exp2(max - top)) } else { 0.0 });
        if t == 0 {
            store(a.block.wrapping_add(block_x() as usize), [top, sum as f32]);
        }
    }
}

/// The log-sum-exps of all blocks of [`merge`] into one.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Total`]; one block.
#[inline(always)]
pub unsafe fn total(a: &Total) {
    let t = thread();
    // SAFETY: the launch contract.
    unsafe {
        let mut top = HOLE;
        let mut b = 0;
        while b < a.blocks {
            top = law::Num::max(top, load(a.block.wrapping_add(b as usize))[0]);
            b += 1;
        }
        let mut sum = 0f64;
        let mut b = t;
        while b < a.blocks {
            let part: [f32; 2] = load(a.block.wrapping_add(b as usize));
            sum += f64::from(part[1] * exp2(part[0] - top));
            b += 256;
        }
        let sum = block_sum(sum);
        if t == 0 {
            store(a.out, [top, sum as f32]);
        }
    }
}

/// `log2 x` in nats.
#[inline(always)]
fn ln(x: f32) -> f32 {
    log2(x) * core::f32::consts::LN_2
}

/// Tallies into what [`crate::contrast::pull`] needs of a row, and the block's share of the loss.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Normalise`]; grid ceil(n / 256).
#[inline(always)]
pub unsafe fn normalise(a: &Normalise) {
    // SAFETY: the launch contract; `row_all` is there or null.
    unsafe { normalise_rows(a, |row| (load(a.row.wrapping_add(row as usize)), optional(a.row_all, row, [0.0; 2]))) }
}

/// [`merge`] and [`normalise`] of softmaxes of rows.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Soften`]; grid (ceil(n / 256), 1, sides).
#[inline(always)]
pub unsafe fn soften(each: &Each<Soften, 2>) {
    let a = &own(&each.0);
    if block_x() * 256 >= a.merge.n {
        return;
    }
    // SAFETY: the launch contract.
    unsafe {
        let holds = anchored(a.merge.flags, a.merge.blocks);
        normalise_rows(&a.normalise, |row| merged(&a.merge, row, holds));
    }
}

/// [`normalise`] of tallies, and sums over all logits, that `tallied` gives.
#[inline(always)]
unsafe fn normalise_rows(a: &Normalise, tallied: impl Fn(u32) -> ([f32; 4], [f32; 2])) {
    let row = block_x() * 256 + thread();
    let mut loss = 0f64;
    // SAFETY: the launch contract.
    unsafe {
        let mut far = false;
        if row < a.n {
            let at = row as usize;
            let ([max, negatives, positives, pulled], [all, ignored]) = tallied(row);
            let from = if a.joint.is_null() { max } else { load(a.joint)[0] };
            let below = anchor(a.scale * optional(a.live, 0, 1.0)) - from;
            far = below > NEAR || below.is_nan();
            let share: f32 = load(a.share.wrapping_add(at));
            let count = load(a.positives.wrapping_add(at)) as f32;
            let candidates = law::Num::max(a.opposite - ignored, 1.0);
            let sum = negatives + positives;
            // Means of logits over the positives and over all that count, in octaves from the largest.
            let mean = if count > 0.0 { pulled / count - max } else { 0.0 };
            let smooth_mean = if a.smoothing > 0.0 { all / candidates - max } else { mean };
            let target = mean + a.smoothing * (smooth_mean - mean);
            let weight = a.lambda * share;
            let smooth = weight * a.smoothing / candidates;
            let pull = if count > 0.0 { weight * (1.0 - a.smoothing) / count } else { 0.0 };
            if a.joint.is_null() {
                let weight_row = if sum > 0.0 { weight / sum } else { 0.0 };
                let only = count == 1.0;
                // 1 - P of an only positive, from the negatives: P itself may round to one.
                let others = if sum > 0.0 { weight_row * negatives } else { 0.0 };
                let t = if only { weight * a.smoothing - others - smooth } else { -pull - smooth };
                store(a.norm.wrapping_add(at), [max, weight_row, smooth, if only { 0.0 } else { weight_row }]);
                store(a.target.wrapping_add(at), t);
                if share > 0.0 {
                    let ratio = negatives / positives;
                    let r = if ratio < 1.0 { law::Num::ln_1p(Octave(ratio)).0 + ln(positives) } else { ln(sum) };
                    loss = f64::from(share) * f64::from(r - target * core::f32::consts::LN_2);
                }
            } else {
                let [z, sum]: [f32; 2] = load(a.joint);
                store(a.norm.wrapping_add(at), [z, 1.0 / sum, smooth, 1.0 / sum]);
                store(a.target.wrapping_add(at), -pull - smooth);
                if share > 0.0 {
                    loss = f64::from(share) * f64::from(target + (max - z)) * core::f64::consts::LN_2;
                }
            }
        }
        let loss = block_sum(loss);
        let (raised, base, warp) = (u32::from(ballot(far) != 0), shared_base(), warp());
        if lane() == 0 {
            store_shared(base + 4 * warp, raised);
        }
        sync();
        if thread() == 0 {
            store(a.loss.wrapping_add(block_x() as usize), loss);
            let (mut any, mut w) = (0, 0);
            while w < WARPS {
                any |= load_shared::<u32>(base + 4 * w);
                w += 1;
            }
            if !a.far.is_null() {
                store(a.far.wrapping_add(block_x() as usize), any);
            }
        }
    }
}

/// `out[i] (+)= sum_p slots[p, i]`, p in order.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Fold`]; grid ceil(len / 256).
#[inline(always)]
pub unsafe fn fold(a: &Fold) {
    let i = (block_x() * 256 + thread()) as usize;
    if i < a.len as usize {
        // SAFETY: the launch contract; an element is written by its own thread.
        unsafe {
            let mut sum = if a.add != 0 { load(a.out.wrapping_add(i)) } else { 0.0 };
            let mut p = 0;
            while p < a.slots {
                sum += load(a.parts.wrapping_add(p as usize * a.stride as usize + i));
                p += 1;
            }
            store(a.out.wrapping_add(i), sum);
        }
    }
}

/// Sums of each column of `[n, 4]`, or of one of f64: block b sums rows b, b + blocks, .. of 256 into its slot.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Totals`]; grid (blocks, 1, sums).
#[inline(always)]
pub unsafe fn totals(each: &Each<Totals, MOST_SUMS>) {
    let a = &own(&each.0);
    if block_x() >= a.blocks {
        return;
    }
    let mut sums = [0f64; 4];
    // SAFETY: the launch contract.
    unsafe {
        let mut i = block_x() as usize * 256 + thread() as usize;
        while i < a.n as usize {
            let mut c = 0;
            while c < 4 {
                if c < a.columns {
                    let at = i * a.columns as usize + c as usize;
                    sums[c as usize] += if a.doubles.is_null() {
                        f64::from(load(a.singles.wrapping_add(at)))
                    } else {
                        load(a.doubles.wrapping_add(at))
                    };
                }
                c += 1;
            }
            i += a.blocks as usize * 256;
        }
        let mut c = 0;
        while c < 4 {
            if c < a.columns {
                let sum = block_sum(sums[c as usize]);
                if thread() == 0 {
                    store(a.out.wrapping_add(block_x() as usize * a.columns as usize + c as usize), sum);
                }
            }
            c += 1;
        }
    }
}

/// Sums of columns of a row-major matrix over this block's rows: grid (ceil(dim / 32), parts), 8 rows at a time.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`SumColumns`].
#[inline(always)]
pub unsafe fn sum_columns<T: Half, const HALVES: bool>(a: &SumColumns) {
    let col = block_x() * 32 + lane();
    let first = block_y() * a.part;
    let end = (first + a.part).min(a.rows);
    let mut sum = 0f32;
    let base = shared_base();
    // SAFETY: the launch contract.
    unsafe {
        let mut i = first + warp();
        while i < end && col < a.dim {
            sum += read::<T, HALVES>(a.x, i as usize * a.dim as usize + col as usize);
            i += WARPS;
        }
        store_shared(base + thread() * 4, sum * a.scale);
        sync();
        if warp() == 0 && col < a.dim {
            let mut sum = 0f32;
            let mut w = 0;
            while w < WARPS {
                sum += load_shared::<f32>(base + (w * 32 + lane()) * 4);
                w += 1;
            }
            store(a.out.wrapping_add(block_y() as usize * a.dim as usize + col as usize), sum);
        }
    }
}
