//! The optimiser's pass over all parameters, and what it needs to know of the gradients.

use crate::abi::{Adam, Fill, Squares};
use crate::rows::block_sum;
use crate::simt::*;

/// AdamW in place, see [`Adam`]; grid any, elements in turn.
///
/// # Safety
/// The launch contract: arrays of the extents stated there.
#[inline(always)]
pub unsafe fn adam(a: &Adam) {
    let mut i = block_x() * 256 + thread();
    while i < a.len {
        let at = i as usize;
        // SAFETY: the launch contract; an element is one thread's.
        unsafe {
            let g = load(a.grads.wrapping_add(at)) * a.grad_scale;
            let m = fma(a.beta1, load(a.m.wrapping_add(at)), (1.0 - a.beta1) * g);
            let v = fma(a.beta2, load(a.v.wrapping_add(at)), (1.0 - a.beta2) * g * g);
            store(a.m.wrapping_add(at), m);
            store(a.v.wrapping_add(at), v);
            let p = load(a.params.wrapping_add(at));
            let step = a.lr * (m / a.bias1) / (sqrt(v / a.bias2) + a.eps);
            store(a.params.wrapping_add(at), fma(-a.lr * a.decay, p, p) - step);
        }
        i += grid_x() * 256;
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
