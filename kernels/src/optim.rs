//! The optimiser's pass over all parameters, what it needs to know of the gradients, and the numbers of a step that the
//! host does not see: they are the card's, so that a step waits for nobody and a recorded one can be run again.

use crate::abi::{
    Adam, Choose, Clamp, Fill, Judge, Normals, SCALING_MOST, SCALING_PATIENCE, Scale, Settle, Squares, Temper,
};
use crate::random;
use crate::rows::{bits, block_sum};
use crate::simt::*;

/// AdamW in place, see [`Adam`]; grid any, elements in turn.
///
/// # Safety
/// The launch contract: arrays of the extents stated there.
#[inline(always)]
pub unsafe fn adam(a: &Adam) {
    // SAFETY: the launch contract; an element is one thread's.
    unsafe {
        let factor = load(a.factor);
        if !factor.is_finite() {
            return;
        }
        let (lr, bias1, bias2) = (load(a.now), load(a.now.wrapping_add(1)), load(a.now.wrapping_add(2)));
        let mut i = block_x() * 256 + thread();
        while i < a.len {
            let at = i as usize;
            let g = load(a.grads.wrapping_add(at)) * factor;
            let m = fma(a.beta1, load(a.m.wrapping_add(at)), (1.0 - a.beta1) * g);
            let v = fma(a.beta2, load(a.v.wrapping_add(at)), (1.0 - a.beta2) * g * g);
            store(a.m.wrapping_add(at), m);
            store(a.v.wrapping_add(at), v);
            let p = load(a.params.wrapping_add(at));
            let step = lr * (m / bias1) / (sqrt(v / bias2) + a.eps);
            store(a.params.wrapping_add(at), fma(-lr * a.decay, p, p) - step);
            i += grid_x() * 256;
        }
    }
}

/// From the sums of [`squares`]: the norm of the gradients, less their scaling, and what [`adam`] multiplies them by: the
/// scaling undone and the norm brought down to the limit, or NaN where loss or norm is not finite. With a scaling: halved
/// where the norm is not finite, doubled after [`SCALING_PATIENCE`] steps in which it was. One block.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Judge`].
#[inline(always)]
pub unsafe fn judge(a: &Judge) {
    // SAFETY: the launch contract.
    unsafe {
        let mut sum = 0f64;
        let mut i = thread();
        while i < a.parts {
            sum += load(a.squares.wrapping_add(i as usize));
            i += 256;
        }
        let sum = block_sum(sum);
        if thread() != 0 {
            return;
        }
        let patience = a.scaling.wrapping_add(1);
        let (scale, good) = if a.scaling.is_null() { (1.0, 0.0) } else { (load(a.scaling), load(patience)) };
        let norm = sqrt(sum as f32) / scale;
        let clip = if a.limit > 0.0 && norm > a.limit { a.limit / norm } else { 1.0 };
        let counts = norm.is_finite() && load(a.loss).is_finite();
        store(a.out, norm);
        store(a.out.wrapping_add(1), if counts { clip / scale } else { f32::NAN });
        if !a.scaling.is_null() {
            let (scale, good) = if !norm.is_finite() {
                (if scale * SCALING_MOST > 1.0 { 0.5 * scale } else { scale }, 0.0)
            } else if good + 1.0 >= SCALING_PATIENCE {
                (if scale < SCALING_MOST { 2.0 * scale } else { scale }, 0.0)
            } else {
                (scale, good + 1.0)
            };
            store(a.scaling, scale);
            store(patience, good);
        }
    }
}

/// Sums of squares: block b of elements b, b + blocks, .. of 256 into its slot, in f64. Grid any.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Squares`].
#[inline(always)]
pub unsafe fn squares(a: &Squares) {
    let mut sum = 0f64;
    let mut i = block_x() * 256 + thread();
    // SAFETY: the launch contract.
    unsafe {
        while i < a.len {
            let x = f64::from(load(a.x.wrapping_add(i as usize)));
            sum += x * x;
            i += grid_x() * 256;
        }
        let sum = block_sum(sum);
        if thread() == 0 {
            store(a.out.wrapping_add(block_x() as usize), sum);
        }
    }
}

/// Every element becomes `value`. Grid any.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Fill`].
#[inline(always)]
pub unsafe fn fill(a: &Fill) {
    let mut i = block_x() * 256 + thread();
    while i < a.len {
        // SAFETY: the launch contract; an element is one thread's.
        unsafe { store(a.out.wrapping_add(i as usize), a.value) };
        i += grid_x() * 256;
    }
}

/// Standard normals in f32 or, with HALVES, rounded to halves; a thread four neighbours, grid any.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Normals`].
#[inline(always)]
pub unsafe fn normals<T: Half, const HALVES: bool>(a: &Normals) {
    let mut index = block_x() as u64 * 256 + thread() as u64;
    while 4 * index < a.len {
        let four = random::normals(a.seed, a.stream, index, sqrt);
        let mut k = 0;
        while k < 4 {
            let at = 4 * index as usize + k;
            if (at as u64) < a.len {
                // SAFETY: the launch contract; an element is one thread's.
                unsafe {
                    if HALVES {
                        store(a.out.cast::<u16>().wrapping_add(at), bits::<T>(four[k]));
                    } else {
                        store(a.out.cast::<f32>().wrapping_add(at), four[k]);
                    }
                }
            }
            k += 1;
        }
        index += grid_x() as u64 * 256;
    }
}

/// Rows by number, see [`Choose`]: gathered, or with SCATTER scattered; no two to the same place. Grid any.
///
/// # Safety
/// The launch contract: arrays of the extents stated there.
#[inline(always)]
pub unsafe fn choose<const SCATTER: bool>(a: &Choose) {
    if a.width == 0 {
        return;
    }
    let mut i = block_x() * 256 + thread();
    while i < a.count * a.width {
        // SAFETY: the launch contract; an element is one thread's.
        unsafe {
            let row = load(a.index.wrapping_add((i / a.width) as usize)) as u32;
            let at = row as usize * a.width as usize + (i % a.width) as usize;
            if SCATTER {
                if row < a.rows {
                    store(a.to.wrapping_add(at), load(a.from.wrapping_add(i as usize)));
                }
            } else {
                store(a.to.wrapping_add(i as usize), if row < a.rows { load(a.from.wrapping_add(at)) } else { f32::NAN });
            }
        }
        i += grid_x() * 256;
    }
}

/// `to = factor from`. Grid any.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Scale`].
#[inline(always)]
pub unsafe fn scale(a: &Scale) {
    let mut i = block_x() * 256 + thread();
    while i < a.len {
        let at = i as usize;
        // SAFETY: the launch contract; an element is one thread's.
        unsafe { store(a.to.wrapping_add(at), load(a.factor) * load(a.from.wrapping_add(at))) };
        i += grid_x() * 256;
    }
}

/// Keeps numbers between two; NaN stays. Grid any.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Clamp`].
#[inline(always)]
pub unsafe fn clamp(a: &Clamp) {
    let mut i = block_x() * 256 + thread();
    while i < a.len {
        let at = a.x.wrapping_add(i as usize);
        // SAFETY: the launch contract; an element is one thread's.
        unsafe {
            let x = load(at);
            let x = if x < a.low { a.low } else { x };
            store(at, if x > a.high { a.high } else { x });
        }
        i += grid_x() * 256;
    }
}

/// A loss's learned scalars as its kernels take them. One block.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Temper`].
#[inline(always)]
pub unsafe fn temper(a: &Temper) {
    const OCTAVES: f32 = core::f32::consts::LOG2_E;
    if thread() != 0 {
        return;
    }
    // SAFETY: the launch contract.
    unsafe {
        let inverse = if a.logit_scale.is_null() { a.inverse_tau } else { exp2(load(a.logit_scale) * OCTAVES) };
        let bias = if a.bias.is_null() { a.fixed_bias } else { load(a.bias) };
        store(a.live, inverse);
        store(a.live.wrapping_add(1), bias * OCTAVES);
    }
}

/// A loss's sums into the loss, its scalar gradients and tau. One block.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Settle`].
#[inline(always)]
pub unsafe fn settle(a: &Settle) {
    if thread() != 0 {
        return;
    }
    // SAFETY: the launch contract. What counts 0 may never have been written: it is not read.
    unsafe {
        let of = |weight: f32, at: usize| {
            if weight == 0.0 { 0.0 } else { f64::from(weight) * load(a.scalars.wrapping_add(at)) }
        };
        let mut loss = of(a.weights[0], 0) + of(a.weights[1], 1) + of(a.weights[2], 3) + f64::from(a.constant);
        if !a.joint.is_null() {
            let [_, sum]: [f32; 2] = load(a.joint);
            loss += f64::from(log2(sum)) * core::f64::consts::LN_2;
        }
        let inverse = load(a.live);
        let weight = of(a.moment, 6);
        let mean = if weight > 0.0 { of(a.moment, 3) / weight } else { 0.0 };
        let by_scale = of(a.along, 2) * f64::from(inverse) + of(a.moment, 5) - of(a.moment, 4) * mean;
        store(a.out, loss as f32);
        store(a.out.wrapping_add(1), by_scale as f32);
        store(a.out.wrapping_add(2), of(if a.bias != 0 { 1.0 } else { 0.0 }, 4) as f32);
        store(a.out.wrapping_add(3), 1.0 / inverse);
    }
}
