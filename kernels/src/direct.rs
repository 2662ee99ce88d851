//! Convolutions of few channels on the ordinary lanes, all in f32: a tile of the tensor core would be mostly empty.
//!
//! A block has an image in shared memory, zeros around it, so that nobody asks where it ends; a thread has sums over
//! windows of it in registers:
//!
//! ```text
//! convolve   2 x 2 pixels of 3 channels: a window of (kernel + 1)^2 serves all of them
//! weight     a row of the kernel for 3 channels: each number of a line serves `kernel` of its columns
//! ```
//!
//! The kernel's side is a constant, 3 or 5. [`Geometry::fits_direct`](crate::abi::Geometry::fits_direct) and its like say
//! what fits.

use crate::abi::{Conv, DIRECT_GROUP, DIRECT_WEIGHT_THREADS};
use crate::conv::geometry;
use crate::simt::*;

/// Channels of a thread.
const GROUP: usize = DIRECT_GROUP as usize;
/// Threads of a block that convolves.
const THREADS: u32 = 128;
/// Loads that a thread has in flight.
const BATCH: usize = 8;

/// Zeros in the first `bytes` of shared memory, rounded up to 16.
#[inline(always)]
unsafe fn zeros<const THREADS: u32>(bytes: u32) {
    let mut at = thread() * 16;
    while at < bytes {
        // SAFETY: the caller's shared memory, a multiple of 16 bytes; each 16 are one thread's.
        unsafe { store_shared(shared_base() + at, [0f32; 4]) };
        at += THREADS * 16;
    }
}

/// Brings `[planes, lines, width]` at `from` to shared memory, each number to the byte that `to` says. `len` of them in all;
/// they are told apart by counting: nothing is divided on the way.
#[inline(always)]
unsafe fn bring<const THREADS: u32>(
    from: *const f32,
    [len, lines, width]: [u32; 3],
    to: impl Fn(u32, u32, u32) -> u32,
) {
    if lines == 0 || width == 0 {
        return;
    }
    let digits = |n: u32| (n / width / lines, n / width % lines, n % width);
    let (mut plane, mut y, mut x) = digits(thread());
    let step = digits(THREADS);
    let mut i = thread();
    while i < len {
        let (mut value, mut place) = ([0f32; BATCH], [0u32; BATCH]);
        let mut b = 0;
        while b < BATCH {
            place[b] = to(plane, y, x);
            // The last again where there are no more: a branch would wait for each.
            let at = (i + b as u32 * THREADS).min(len - 1);
            // SAFETY: the caller's array.
            value[b] = unsafe { load(from.wrapping_add(at as usize)) };
            (plane, y, x) = (plane + step.0, y + step.1, x + step.2);
            (y, x) = if x >= width { (y + 1, x - width) } else { (y, x) };
            (plane, y) = if y >= lines { (plane + 1, y - lines) } else { (plane, y) };
            b += 1;
        }
        let mut b = 0;
        while b < BATCH {
            if i + (b as u32 * THREADS) < len {
                // SAFETY: the caller's places, each of one number.
                unsafe { store_shared(place[b], value[b]) };
            }
            b += 1;
        }
        i += BATCH as u32 * THREADS;
    }
}

/// Sums of 2 x 2 pixels by 3 channels, over `channels` of the image: its window is at `window`, channels `plane` and lines
/// `pitch` bytes apart; a group's weights are at `weight`, 16 bytes an element of the kernel.
#[inline(always)]
unsafe fn tile<const K: usize>(
    mut window: u32,
    mut weight: u32,
    [channels, plane, pitch]: [u32; 3],
) -> [[[f32; 2]; 2]; GROUP] {
    let mut sums = [[[0f32; 2]; 2]; GROUP];
    let mut c = 0;
    while c < channels {
        // Of the kernel's row above: the lower pixels see it where the upper see the row itself.
        let mut above = [[0f32; 4]; K];
        let mut line = 0;
        while line <= K {
            let (mut x, mut row) = ([0f32; 6], [[0f32; 4]; K]);
            // SAFETY: lines and weights of the caller.
            unsafe {
                let mut i = 0;
                while i <= K {
                    [x[i], x[i + 1]] = load_shared::<[f32; 2]>(window + line as u32 * pitch + i as u32 * 4);
                    i += 2;
                }
                let mut k = 0;
                while k < K && line < K {
                    row[k] = load_shared(weight + (line * K + k) as u32 * 16);
                    k += 1;
                }
            }
            let mut k = 0;
            while k < K {
                let mut o = 0;
                while o < GROUP {
                    let mut p = 0;
                    while p < 2 {
                        if line < K {
                            sums[o][0][p] = fma(row[k][o], x[k + p], sums[o][0][p]);
                        }
                        if line > 0 {
                            sums[o][1][p] = fma(above[k][o], x[k + p], sums[o][1][p]);
                        }
                        p += 1;
                    }
                    o += 1;
                }
                k += 1;
            }
            above = row;
            line += 1;
        }
        window += plane;
        weight += (K * K) as u32 * 16;
        c += 1;
    }
    sums
}

/// `out = x * weight`; or with `TURNED` `out = dL/dx`, arrays as [`crate::conv::backward_data`] has them. Grid parts, of
/// `part` rows each.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Conv`], which fits.
#[inline(always)]
pub unsafe fn convolve<const TURNED: bool>(a: &Conv) {
    let (g, outputs) = (geometry(a), opaque(a.outputs));
    let p = g.padded_tiles();
    let (square, groups, tiles) = (g.kernel * g.kernel, outputs.div_ceil(DIRECT_GROUP), p.across * p.down);
    let patch = g.channels * square;
    if p.across == 0 || tiles == 0 {
        return;
    }
    let weights = shared_base();
    let images = weights + groups * patch * 16;
    let plane = p.lines * p.pitch * 4;
    // Both are even where a row's are.
    let pairs = g.width_out.is_multiple_of(2) && (a.out as usize).is_multiple_of(8);
    let (mut r, end) = (block_x() * a.part, ((block_x() + 1) * a.part).min(a.rows));
    // SAFETY: the launch contract; rows are a block's own, tiles a thread's.
    unsafe {
        // Around images, and in groups that are not full: these stay.
        zeros::<THREADS>(groups * patch * 16 + g.channels * plane);
        sync();
        let place = |o: u32, c: u32, e: u32| weights + (o / DIRECT_GROUP * patch + c * square + e) * 16 + o % DIRECT_GROUP * 4;
        if TURNED {
            bring::<THREADS>(a.weight, [outputs * patch, outputs, square], |c, o, e| place(o, c, square - 1 - e));
        } else {
            bring::<THREADS>(a.weight, [outputs * patch, g.channels, square], place);
        }
        while r < end {
            let len = g.channels * g.height * g.width;
            bring::<THREADS>(a.x.wrapping_add(r as usize * len as usize), [len, g.height, g.width], |c, y, x| {
                images + c * plane + ((y + g.padding) * p.pitch + x + g.padding) * 4
            });
            sync();
            let mut item = thread();
            while item < groups * tiles {
                let (group, at) = (item / tiles, item % tiles);
                let (y, x) = (at / p.across * 2, at % p.across * 2);
                let window = images + (y * p.pitch + x) * 4;
                let (weight, steps) = (weights + group * patch * 16, [g.channels, plane, p.pitch * 4]);
                let sums = if g.kernel == 3 { tile::<3>(window, weight, steps) } else { tile::<5>(window, weight, steps) };
                let mut o = 0;
                while o < GROUP {
                    let channel = group * DIRECT_GROUP + o as u32;
                    let image = (r as usize * outputs as usize + channel as usize) * g.pixels as usize;
                    let mut i = 0;
                    while i < 2 {
                        let y = y + i as u32;
                        let to = a.out.wrapping_add(image + (y * g.width_out + x) as usize);
                        if channel < outputs && y < g.height_out() {
                            if pairs {
                                store(to.cast(), sums[o][i]);
                            } else {
                                store(to, sums[o][i][0]);
                                if x + 1 < g.width_out {
                                    store(to.wrapping_add(1), sums[o][i][1]);
                                }
                            }
                        }
                        i += 1;
                    }
                    o += 1;
                }
                item += THREADS;
            }
            // The next image comes where this one was read.
            sync();
            r += 1;
        }
    }
}

/// Adds to the sums of a kernel's row what a row of pixels makes of a line at `x` and the gradients at `d` of 3 channels,
/// `runs` of 4 numbers.
#[inline(always)]
unsafe fn run<const K: usize>(sums: &mut [[f32; 5]; GROUP], x: u32, d: [u32; GROUP], runs: u32) {
    // SAFETY: lines of the caller, that of x longer by 4.
    unsafe {
        let mut left = load_shared::<[f32; 4]>(x);
        let mut n = 0;
        while n < runs {
            let right = load_shared::<[f32; 4]>(x + (n + 1) * 16);
            let line = [left[0], left[1], left[2], left[3], right[0], right[1], right[2], right[3]];
            let mut o = 0;
            while o < GROUP {
                let d = load_shared::<[f32; 4]>(d[o] + n * 16);
                let mut p = 0;
                while p < 4 {
                    let mut k = 0;
                    while k < K {
                        sums[o][k] = fma(d[p], line[p + k], sums[o][k]);
                        k += 1;
                    }
                    p += 1;
                }
                o += 1;
            }
            left = right;
            n += 1;
        }
    }
}

/// `out[part]` `[outputs, channels kernel^2]` = the part's share of dL/d weight, `weight` = dL/d output; grid parts, of
/// `part` rows each. Rows of pixels are dealt out to threads as long as there are any; their sums are added in order.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Conv`], which fits.
#[inline(always)]
pub unsafe fn weight(a: &Conv) {
    const ALL: u32 = DIRECT_WEIGHT_THREADS;
    let (g, outputs) = (geometry(a), opaque(a.outputs));
    let p = g.padded_runs();
    let rows_of = |item: u32| (item / g.kernel / g.channels, item / g.kernel % g.channels, item % g.kernel);
    let items = outputs.div_ceil(DIRECT_GROUP) * g.channels * g.kernel;
    if g.kernel == 0 || g.channels == 0 || items == 0 {
        return;
    }
    let splits = (ALL / items).min(p.down);
    let (split, item) = (thread() / items, thread() % items);
    let (group, c, ky) = rows_of(item);
    let (base, plane) = (shared_base(), p.lines * p.pitch * 4);
    let gradients = base + g.channels * plane;
    let plane_d = p.down * p.across * 16;
    let mut d = [0u32; GROUP];
    let mut o = 0;
    while o < GROUP {
        // Behind the last channel it once more, for nothing.
        d[o] = gradients + (group * DIRECT_GROUP + o as u32).min(outputs - 1) * plane_d;
        o += 1;
    }
    let line = base + c * plane + ky * p.pitch * 4;
    let mut sums = [[0f32; 5]; GROUP];
    let (mut r, end) = (block_x() * a.part, ((block_x() + 1) * a.part).min(a.rows));
    // SAFETY: the launch contract; a part is a block's own.
    unsafe {
        // Around images, and behind rows of pixels: these stay.
        zeros::<ALL>(g.channels * plane + outputs * plane_d);
        while r < end {
            // The zeros, or what was read of the image before.
            sync();
            let len = g.channels * g.height * g.width;
            bring::<ALL>(a.x.wrapping_add(r as usize * len as usize), [len, g.height, g.width], |c, y, x| {
                base + c * plane + ((y + g.padding) * p.pitch + x + g.padding) * 4
            });
            let len = outputs * g.pixels;
            bring::<ALL>(a.weight.wrapping_add(r as usize * len as usize), [len, p.down, g.width_out], |o, y, x| {
                gradients + o * plane_d + y * p.across * 16 + x * 4
            });
            sync();
            let mut y = split;
            while y < p.down && split < splits {
                let (x, d) = (line + y * p.pitch * 4, d.map(|d| d + y * p.across * 16));
                if g.kernel == 3 {
                    run::<3>(&mut sums, x, d, p.across);
                } else {
                    run::<5>(&mut sums, x, d, p.across);
                }
                y += splits;
            }
            r += 1;
        }
        sync();
        let each = DIRECT_GROUP * g.kernel;
        let mut o = 0;
        while o < GROUP {
            let mut k = 0;
            while k < 5 {
                if k < g.kernel && split < splits {
                    store_shared(base + (thread() * each + o as u32 * g.kernel + k) * 4, sums[o][k as usize]);
                }
                k += 1;
            }
            o += 1;
        }
        sync();
        let out = a.out.wrapping_add(block_x() as usize * (outputs * g.channels * g.kernel * g.kernel) as usize);
        let mut n = thread();
        while n < items * each {
            let (group, c, ky) = rows_of(n / each);
            let (o, kx) = (group * DIRECT_GROUP + n % each / g.kernel, n % g.kernel);
            let (mut sum, mut s) = (0f32, 0);
            while s < splits {
                sum += load_shared::<f32>(base + (s * items * each + n) * 4);
                s += 1;
            }
            if o < outputs {
                store(out.wrapping_add((((o * g.channels + c) * g.kernel + ky) * g.kernel + kx) as usize), sum);
            }
            n += ALL;
        }
    }
}
