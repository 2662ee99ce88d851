//! What encoders are made of besides products: activations, pooling, layer normalisation, attention.
//!
//! Elements take a thread each, sums over rows a block each and parts in a fixed order; tokens and queries a warp each.

use crate::abi::{Activate, ActivateBackward, Attend, LayerNorm, LayerNormBackward, MaskColumns, Pool, SumChannels};
use crate::law::ERFC;
use crate::rows::block_sum;
use crate::simt::*;

/// Warps of a block where one takes a row.
const WARPS: u32 = 8;
/// Numbers of a head that a lane keeps at most: heads of up to 128.
const HELD: usize = 4;

/// `e^x`.
#[inline(always)]
fn exp(x: f32) -> f32 {
    exp2(x * core::f32::consts::LOG2_E)
}

/// The standard normal's distribution function and density: `erfc` by its Chebyshev series, see [`ERFC`].
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    const TERMS: usize = 12;
    let z = (if x < 0.0 { -x } else { x }) * core::f32::consts::FRAC_1_SQRT_2;
    let t = 4.0 / (4.0 + z);
    let s = t + t - 1.0;
    let (mut b1, mut b2) = (0f32, 0f32);
    let mut k = TERMS;
    while k > 1 {
        k -= 1;
        (b1, b2) = (fma(s + s, b1, ERFC[k] as f32 - b2), b1);
    }
    let g = fma(s, b1, ERFC[0] as f32 - b2);
    let e = exp(-0.5 * x * x);
    let tail = 0.5 * t * g * e;
    (if x < 0.0 { tail } else { 1.0 - tail }, e * 0.398_942_3)
}

/// The activation of code `a.activation`: 0 none, 1 ReLU, 2 GELU.
#[inline(always)]
pub(crate) fn activation(code: u32, x: f32) -> f32 {
    match code {
        1 => {
            if x > 0.0 {
                x
            } else {
                0.0
            }
        }
        2 => x * normal(x).0,
        _ => x,
    }
}

/// `pre += bias` in place, and `out = activation(pre)`; or the activation in place. Grid any, elements in turn.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Activate`].
#[inline(always)]
pub unsafe fn activate(a: &Activate) {
    if a.pixels == 0 || a.channels == 0 {
        return;
    }
    let mut i = block_x() * 256 + thread();
    while i < a.len {
        let at = i as usize;
        // SAFETY: the launch contract; an element is one thread's.
        unsafe {
            let mut x = load(a.pre.wrapping_add(at));
            if !a.bias.is_null() {
                x += load(a.bias.wrapping_add((i / a.pixels % a.channels) as usize));
            }
            let y = activation(a.activation, x);
            if a.out.is_null() {
                store(a.pre.wrapping_add(at), y);
            } else {
                store(a.pre.wrapping_add(at), x);
                store(a.out.wrapping_add(at), y);
            }
        }
        i += grid_x() * 256;
    }
}

/// The slope of [`activation`] at `x`; what overwrote x serves as well for ReLU.
#[inline(always)]
fn slope(code: u32, x: f32) -> f32 {
    match code {
        1 => {
            if x > 0.0 {
                1.0
            } else {
                0.0
            }
        }
        2 => {
            let (cdf, density) = normal(x);
            fma(x, density, cdf)
        }
        _ => 1.0,
    }
}

/// `d *= activation'(saved)` in place. Grid any.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`ActivateBackward`].
#[inline(always)]
pub unsafe fn activate_backward(a: &ActivateBackward) {
    let mut i = block_x() * 256 + thread();
    while i < a.len {
        let at = i as usize;
        // SAFETY: the launch contract; an element is one thread's.
        unsafe {
            let (x, d) = (load(a.saved.wrapping_add(at)), load(a.d.wrapping_add(at)));
            store(a.d.wrapping_add(at), d * slope(a.activation, x));
        }
        i += grid_x() * 256;
    }
}

/// [`activate_backward`] and the sums of columns that a bias' gradient is, in one pass: grid (ceil(channels / 32), parts),
/// 8 rows at a time.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`MaskColumns`].
#[inline(always)]
pub unsafe fn mask_columns(a: &MaskColumns) {
    let col = block_x() * 32 + lane();
    let first = block_y() * a.part;
    let end = (first + a.part).min(a.rows);
    let base = shared_base();
    let mut sum = 0f32;
    // SAFETY: the launch contract; an element is one thread's.
    unsafe {
        let mut i = first + warp();
        while i < end && col < a.channels {
            let at = i as usize * a.channels as usize + col as usize;
            let d = load(a.d.wrapping_add(at)) * slope(a.activation, load(a.saved.wrapping_add(at)));
            store(a.d.wrapping_add(at), d);
            sum += d;
            i += WARPS;
        }
        store_shared(base + thread() * 4, sum);
        sync();
        if warp() == 0 && col < a.channels {
            let mut sum = 0f32;
            let mut w = 0;
            while w < WARPS {
                sum += load_shared::<f32>(base + (w * 32 + lane()) * 4);
                w += 1;
            }
            store(a.out.wrapping_add((block_y() * a.channels + col) as usize), sum);
        }
    }
}

/// `out[p, c]` = sum of `x[r, c, p]` over pixels and the rows of part p, a warp a row; grid (channels, parts).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`SumChannels`].
#[inline(always)]
pub unsafe fn sum_channels(a: &SumChannels) {
    let (channel, part) = (block_x(), block_y());
    let first = part * a.part;
    let end = (first + a.part).min(a.rows);
    let mut sum = 0f32;
    let mut r = first + warp();
    // SAFETY: the launch contract.
    unsafe {
        while r < end {
            let row = (r as usize * a.channels as usize + channel as usize) * a.pixels as usize;
            let mut p = lane();
            while p < a.pixels {
                // All on their way before the first is added; behind the last pixel it once more, for nothing.
                let mut x = [0f32; 8];
                let mut b = 0;
                while b < 8 {
                    let at = (p + 32 * b as u32).min(a.pixels - 1);
                    x[b] = load(a.x.wrapping_add(row + at as usize));
                    b += 1;
                }
                let mut b = 0;
                while b < 8 {
                    sum += if p + 32 * (b as u32) < a.pixels { x[b] } else { 0.0 };
                    b += 1;
                }
                p += 256;
            }
            r += WARPS;
        }
        let sum = block_sum(f64::from(sum));
        if thread() == 0 {
            store(a.out.wrapping_add((part * a.channels + channel) as usize), sum as f32);
        }
    }
}

/// Windows of `size x size` into one number; grid any.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Pool`].
#[inline(always)]
pub unsafe fn pool(a: &Pool) {
    // SAFETY: the launch contract; a window is one thread's.
    unsafe {
        windows(a, |out, first| {
            let mut y = if a.max != 0 { load(a.x.wrapping_add(first)) } else { 0.0 };
            let mut k = 0;
            while k < a.size * a.size {
                let x = load(a.x.wrapping_add(first + (k / a.size * a.width + k % a.size) as usize));
                y = if a.max == 0 {
                    y + x
                } else if x > y {
                    x
                } else {
                    y
                };
                k += 1;
            }
            let scale = if a.max != 0 { 1.0 } else { 1.0 / (a.size * a.size) as f32 };
            store(a.y.wrapping_add(out), y * scale);
        });
    }
}

/// Gradient of [`pool`]: `x` is what it read, `y` the gradient of what it wrote, `dx` zeros outside of all windows.
/// Grid any.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Pool`].
#[inline(always)]
pub unsafe fn pool_backward(a: &Pool) {
    // SAFETY: the launch contract; a window is one thread's.
    unsafe {
        windows(a, |out, first| {
            let d = load(a.y.wrapping_add(out));
            let at = |k: u32| first + (k / a.size * a.width + k % a.size) as usize;
            let mut best = 0;
            if a.max != 0 {
                let mut top = load(a.x.wrapping_add(first));
                let mut k = 1;
                while k < a.size * a.size {
                    let x = load(a.x.wrapping_add(at(k)));
                    // Strictly: a maximum reached twice is the first's.
                    (top, best) = if x > top { (x, k) } else { (top, best) };
                    k += 1;
                }
            }
            let mut k = 0;
            while k < a.size * a.size {
                let g = if a.max == 0 {
                    d / (a.size * a.size) as f32
                } else if k == best {
                    d
                } else {
                    0.0
                };
                store(a.dx.wrapping_add(at(k)), g);
                k += 1;
            }
        });
    }
}

/// Calls `f` with the index of every window of this thread, and of its first number in x.
#[inline(always)]
unsafe fn windows(a: &Pool, f: impl Fn(usize, usize)) {
    if a.size == 0 || a.width < a.size || a.height < a.size {
        return;
    }
    let (rows, cols) = (a.height / a.size, a.width / a.size);
    let mut i = block_x() * 256 + thread();
    while i < a.images * rows * cols {
        let (image, window) = (i / (rows * cols), i % (rows * cols));
        let (y, x) = (window / cols * a.size, window % cols * a.size);
        f(i as usize, image as usize * (a.height * a.width) as usize + (y * a.width + x) as usize);
        i += grid_x() * 256;
    }
}

/// Layer normalisation, a warp a row; grid ceil(rows / 8).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`LayerNorm`].
#[inline(always)]
pub unsafe fn layer_norm(a: &LayerNorm) {
    let row = block_x() * WARPS + warp();
    if row >= a.rows {
        return;
    }
    let (from, to) = (row as usize * a.stride as usize, row as usize * a.width as usize);
    let x = |k: u32| {
        // SAFETY: the launch contract.
        unsafe { load(a.x.wrapping_add(from + k as usize)) }
    };
    let mut sum = 0f32;
    let mut k = lane();
    while k < a.width {
        sum += x(k);
        k += 32;
    }
    let mean = sum_lanes(sum, 32) / a.width as f32;
    let mut sum = 0f32;
    let mut k = lane();
    while k < a.width {
        sum = fma(x(k) - mean, x(k) - mean, sum);
        k += 32;
    }
    let rstd = 1.0 / sqrt(sum_lanes(sum, 32) / a.width as f32 + a.eps);
    // SAFETY: the launch contract; a row is one warp's.
    unsafe {
        let mut k = lane();
        while k < a.width {
            let (gain, bias) =
                (load(a.affine.wrapping_add(k as usize)), load(a.affine.wrapping_add((a.width + k) as usize)));
            store(a.out.wrapping_add(to + k as usize), fma((x(k) - mean) * rstd, gain, bias));
            k += 32;
        }
        if lane() == 0 {
            store(a.stats.wrapping_add(2 * row as usize), mean);
            store(a.stats.wrapping_add(2 * row as usize + 1), rstd);
        }
    }
}

/// Gradient of [`layer_norm`] in x, a warp a row; grid ceil(rows / 8).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`LayerNormBackward`].
#[inline(always)]
pub unsafe fn layer_norm_backward(a: &LayerNormBackward) {
    let row = block_x() * WARPS + warp();
    if row >= a.rows {
        return;
    }
    let (from, to) = (row as usize * a.stride as usize, row as usize * a.width as usize);
    // SAFETY: the launch contract; a row is one warp's.
    unsafe {
        let (mean, rstd) = (load(a.stats.wrapping_add(2 * row as usize)), load(a.stats.wrapping_add(2 * row as usize + 1)));
        let term = |k: u32| {
            let y = (load(a.x.wrapping_add(from + k as usize)) - mean) * rstd;
            (y, load(a.d_out.wrapping_add(to + k as usize)) * load(a.affine.wrapping_add(k as usize)))
        };
        let (mut sum, mut along) = (0f32, 0f32);
        let mut k = lane();
        while k < a.width {
            let (y, g) = term(k);
            sum += g;
            along = fma(y, g, along);
            k += 32;
        }
        let width = a.width as f32;
        let (sum, along) = (sum_lanes(sum, 32) / width, sum_lanes(along, 32) / width);
        let mut k = lane();
        while k < a.width {
            let (y, g) = term(k);
            let at = a.dx.wrapping_add(from + k as usize);
            let old = if a.add != 0 { load(at) } else { 0.0 };
            store(at, old + rstd * (g - sum - y * along));
            k += 32;
        }
    }
}

/// Gradient of [`layer_norm`] in gain and bias: sums over the rows of part p to `d_affine[p]` `[2, width]`; grid
/// (ceil(width / 32), parts), 8 rows at a time.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`LayerNormBackward`].
#[inline(always)]
pub unsafe fn layer_norm_affine(a: &LayerNormBackward) {
    let col = block_x() * 32 + lane();
    let first = block_y() * a.part;
    let end = (first + a.part).min(a.rows);
    let (mut gain, mut bias) = (0f32, 0f32);
    let base = shared_base();
    // SAFETY: the launch contract.
    unsafe {
        let mut i = first + warp();
        while i < end && col < a.width {
            let row = i as usize;
            let (mean, rstd) = (load(a.stats.wrapping_add(2 * row)), load(a.stats.wrapping_add(2 * row + 1)));
            let y = (load(a.x.wrapping_add(row * a.stride as usize + col as usize)) - mean) * rstd;
            let d = load(a.d_out.wrapping_add(row * a.width as usize + col as usize));
            gain = fma(d, y, gain);
            bias += d;
            i += WARPS;
        }
        store_shared(base + thread() * 8, [gain, bias]);
        sync();
        if warp() == 0 && col < a.width {
            let mut sums = [0f32; 2];
            let mut w = 0;
            while w < WARPS {
                let part: [f32; 2] = load_shared(base + (w * 32 + lane()) * 8);
                sums = [sums[0] + part[0], sums[1] + part[1]];
                w += 1;
            }
            let to = a.d_affine.wrapping_add((block_y() * 2 * a.width + col) as usize);
            store(to, sums[0]);
            store(to.wrapping_add(a.width as usize), sums[1]);
        }
    }
}

/// A token's numbers in one head, spread over the warp.
type Token = [f32; HELD];

/// What is where in `qkv` `[rows, time, 3, heads, head]`.
#[derive(Clone, Copy)]
struct Heads<'a> {
    a: &'a Attend,
    row: u32,
    head: u32,
}

impl Heads<'_> {
    /// Where token t's query (0), key (1) or value (2) starts.
    #[inline(always)]
    fn at(self, t: u32, which: u32) -> usize {
        let token = (self.row * self.a.time + t) as usize * 3 + which as usize;
        (token * self.a.heads as usize + self.head as usize) * self.a.head as usize
    }
    /// Where token t starts in arrays laid out as `out`.
    #[inline(always)]
    fn out(self, t: u32) -> usize {
        ((self.row * self.a.time + t) as usize * self.a.heads as usize + self.head as usize) * self.a.head as usize
    }
    #[inline(always)]
    fn stat(self, t: u32) -> usize {
        (self.row * self.a.heads + self.head) as usize * self.a.time as usize + t as usize
    }
    #[inline(always)]
    unsafe fn token(self, from: *const f32) -> Token {
        let mut x = [0.0; HELD];
        let mut k = 0;
        while k < HELD {
            let at = lane() + 32 * k as u32;
            if at < self.a.head {
                // SAFETY: inside the head.
                x[k] = unsafe { load(from.wrapping_add(at as usize)) };
            }
            k += 1;
        }
        x
    }
    #[inline(always)]
    unsafe fn put(self, to: *mut f32, x: Token, scale: f32) {
        let mut k = 0;
        while k < HELD {
            let at = lane() + 32 * k as u32;
            if at < self.a.head {
                // SAFETY: inside the head.
                unsafe { store(to.wrapping_add(at as usize), x[k] * scale) };
            }
            k += 1;
        }
    }
}

#[inline(always)]
fn dot(x: Token, y: Token) -> f32 {
    let mut sum = 0f32;
    let mut k = 0;
    while k < HELD {
        sum = fma(x[k], y[k], sum);
        k += 1;
    }
    sum_lanes(sum, 32)
}

#[inline(always)]
fn add(to: &mut Token, scale: f32, x: Token) {
    let mut k = 0;
    while k < HELD {
        to[k] = fma(scale, x[k], to[k]);
        k += 1;
    }
}

/// The token of this warp, with its row and head: grid (ceil(time / 8), heads, rows).
#[inline(always)]
fn warp_token(a: &Attend) -> (Heads<'_>, u32) {
    (Heads { a, row: block_z(), head: block_y() }, block_x() * WARPS + warp())
}

/// Softmax attention, a warp a query.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Attend`].
#[inline(always)]
pub unsafe fn attention(a: &Attend) {
    let (h, t) = warp_token(a);
    if t >= a.time {
        return;
    }
    // SAFETY: the launch contract; a query is one warp's.
    unsafe {
        let q = h.token(a.qkv.wrapping_add(h.at(t, 0)));
        let (mut max, mut sum, mut out) = (f32::NEG_INFINITY, 0f32, [0.0; HELD]);
        let mut j = 0;
        while j < if a.causal != 0 { t + 1 } else { a.time } {
            let s = dot(q, h.token(a.qkv.wrapping_add(h.at(j, 1)))) * a.scale;
            let top = if s > max { s } else { max };
            let (shrink, e) = (exp(max - top), exp(s - top));
            let v = h.token(a.qkv.wrapping_add(h.at(j, 2)));
            let mut k = 0;
            while k < HELD {
                out[k] = fma(e, v[k], out[k] * shrink);
                k += 1;
            }
            (max, sum) = (top, fma(sum, shrink, e));
            j += 1;
        }
        h.put(a.out.wrapping_add(h.out(t)), out, 1.0 / sum);
        if lane() == 0 {
            store(a.lse.wrapping_add(h.stat(t)), max + log2(sum) * core::f32::consts::LN_2);
        }
    }
}

/// Gradient of [`attention`] in queries, a warp a query; leaves `<d_out, out>` in `delta`.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Attend`].
#[inline(always)]
pub unsafe fn attention_queries(a: &Attend) {
    let (h, t) = warp_token(a);
    if t >= a.time {
        return;
    }
    // SAFETY: the launch contract; a query is one warp's.
    unsafe {
        let q = h.token(a.qkv.wrapping_add(h.at(t, 0)));
        let d = h.token(a.d_out.wrapping_add(h.out(t)));
        let delta = dot(d, h.token(a.out.wrapping_add(h.out(t))));
        let lse = load(a.lse.wrapping_add(h.stat(t)));
        let mut dq = [0.0; HELD];
        let mut j = 0;
        while j < if a.causal != 0 { t + 1 } else { a.time } {
            let key = h.token(a.qkv.wrapping_add(h.at(j, 1)));
            let p = exp(dot(q, key) * a.scale - lse);
            let dp = dot(d, h.token(a.qkv.wrapping_add(h.at(j, 2))));
            add(&mut dq, p * (dp - delta), key);
            j += 1;
        }
        h.put(a.d_qkv.wrapping_add(h.at(t, 0)), dq, a.scale);
        if lane() == 0 {
            store(a.delta.wrapping_add(h.stat(t)), delta);
        }
    }
}

/// Gradient of [`attention`] in keys and values, a warp a key; after [`attention_queries`].
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Attend`].
#[inline(always)]
pub unsafe fn attention_keys(a: &Attend) {
    let (h, t) = warp_token(a);
    if t >= a.time {
        return;
    }
    // SAFETY: the launch contract; a key is one warp's.
    unsafe {
        let key = h.token(a.qkv.wrapping_add(h.at(t, 1)));
        let value = h.token(a.qkv.wrapping_add(h.at(t, 2)));
        let (mut dk, mut dv) = ([0.0; HELD], [0.0; HELD]);
        let mut i = if a.causal != 0 { t } else { 0 };
        while i < a.time {
            let q = h.token(a.qkv.wrapping_add(h.at(i, 0)));
            let d = h.token(a.d_out.wrapping_add(h.out(i)));
            let p = exp(dot(q, key) * a.scale - load(a.lse.wrapping_add(h.stat(i))));
            add(&mut dv, p, d);
            add(&mut dk, p * (dot(d, value) - load(a.delta.wrapping_add(h.stat(i)))), q);
            i += 1;
        }
        h.put(a.d_qkv.wrapping_add(h.at(t, 1)), dk, a.scale);
        h.put(a.d_qkv.wrapping_add(h.at(t, 2)), dv, 1.0);
    }
}
