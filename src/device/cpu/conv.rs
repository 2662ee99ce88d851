//! Convolutions, with samples as the lanes of registers.
//!
//! A group of as many samples as a register has numbers is turned round once, `[channels, height, width, samples]`;
//! from then on every loop is over whole registers whatever an image's width, a kernel's size or a window's, nothing is
//! gathered into patches, and what follows the convolution (bias, activation, pooling) meets it in cache. With `x`
//! padded by zeros, `k = (c, ky, kx)` and `p = (y, x)` a pixel:
//!
//! ```text
//! out[o, p]    = sum_k w[o, k] x[p + k]
//! d_w[o, k]   += sum_p d_out[o, p] x[p + k]
//! dx[c, q]     = sum_{o, ky, kx} w[o, k] d_out[o, q - k]
//! ```
//!
//! Shards of whole groups share the threads. What is summed over samples is summed in a group, then over the groups of
//! a shard and then over shards, in order: the same bits for any number of threads.

use super::layers::{SHARDS, normal};
use super::simd::{Isa, Lane, Op, Register, Simd, Vector, WIDEST, sum_by_halves};
use crate::device::{Activation, Conv, ConvPool, Pool};
use crate::objective::Write;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Numbers of the widest register.
const REGISTER: usize = WIDEST / 2;
/// Pixels worked on side by side.
const PIXELS: usize = 2;
/// Numbers of one channel block's gradient that are read again for every pair of taps: half a first-level cache.
const CACHED: usize = 1 << 12;

/// How many channels are worked on side by side where `left` are left: with [`PIXELS`], 12 registers of sums.
#[inline(always)]
fn block(left: usize) -> usize {
    match left {
        6.. => 6,
        4.. => 4,
        2.. => 2,
        _ => left,
    }
}

/// Calls `$f::<S, T, R>($first, ..)` for all blocks of `$channels` channels.
macro_rules! blocks {
    ($channels:expr, |$first:ident| $f:ident($($arg:expr),*)) => {
        let mut $first = 0;
        while $first < $channels {
            let size = block($channels - $first);
            match size {
                6 => $f::<S, T, 6>($($arg),*),
                4 => $f::<S, T, 4>($($arg),*),
                2 => $f::<S, T, 2>($($arg),*),
                _ => $f::<S, T, 1>($($arg),*),
            }
            $first += size;
        }
    };
}

/// A convolution and the arrays of a group of samples, each number a register: `x` `[inputs, high, wide]` with its
/// padding, `d` `[outputs, height, row]` with a zero on both sides of a row.
#[derive(Clone, Copy)]
struct Shape {
    conv: Conv,
    high: usize,
    wide: usize,
    height: usize,
    width: usize,
    row: usize,
}

impl Shape {
    fn new(conv: &Conv) -> Self {
        let (height, width) = (conv.out_height(), conv.out_width());
        let (high, wide) = (conv.height + 2 * conv.padding, conv.width + 2 * conv.padding);
        Shape { conv: *conv, high, wide, height, width, row: width + 2 * (PIXELS - 1) }
    }
    fn x(&self) -> usize {
        self.conv.inputs * self.high * self.wide
    }
    fn d(&self) -> usize {
        self.conv.outputs * self.height * self.row
    }
    fn weights(&self) -> usize {
        self.conv.outputs * self.conv.patch()
    }
    /// Numbers that a slot holds: x, then d or the output, then dx or what pooling left.
    fn slot(&self) -> usize {
        REGISTER * (self.x() + self.d() + self.conv.input_len().max(self.conv.output_len()))
    }
    /// A slot's arrays, `lanes` numbers a register.
    fn split<'a, T>(&self, lanes: usize, slot: &'a mut [T]) -> [&'a mut [T]; 3] {
        let (x, rest) = slot.split_at_mut(lanes * self.x());
        let (d, rest) = rest.split_at_mut(lanes * self.d());
        [x, d, rest]
    }
}

/// Samples in a register.
struct Lanes<T>(PhantomData<T>);

impl<T: Lane> Op for Lanes<T> {
    type Out = usize;
    #[inline(always)]
    fn run<S: Simd>(self) -> usize {
        <T::In<S> as Register<T>>::LANES
    }
}

/// Samples in a shard: whole groups.
fn shard<T: Lane>(isa: Isa, rows: usize) -> usize {
    rows.div_ceil(SHARDS).max(1).next_multiple_of(isa.run(Lanes::<T>(PhantomData)))
}

pub(super) fn scratch(conv: &Conv, rows: usize) -> usize {
    let shape = Shape::new(conv);
    REGISTER + SHARDS.min(rows) * (shape.slot() + shape.weights() + conv.outputs) + shape.weights()
}

/// Numbers that [`forward`] keeps for [`backward`].
pub(super) fn kept(c: &ConvPool, rows: usize) -> usize {
    REGISTER + rows.next_multiple_of(REGISTER) * kept_len(c)
}

/// The same of a sample: see [`pool`], or the activation's input.
fn kept_len(c: &ConvPool) -> usize {
    if by_window(c) { 2 * c.pooling().output_len() } else { c.conv.output_len() }
}

/// Where in `numbers`, which are [`REGISTER`] more than are wanted, the first cache line begins: no register that is
/// loaded from there on crosses one.
fn line<T>(numbers: &[T]) -> usize {
    numbers.as_ptr().align_offset(64).min(REGISTER)
}

/// The scratch of one call: packed weights, a shard's sums each, and a slot for every thread at work.
struct Work<'a, T> {
    packed: &'a mut [T],
    sums: &'a mut [T],
    slots: Slots<'a, T>,
}

struct Slots<'a, T>([Option<Mutex<&'a mut [T]>>; SHARDS]);

impl<'a, T: Lane> Work<'a, T> {
    fn new(shape: &Shape, scratch: &'a mut [T]) -> Self {
        let most = (scratch.len() - REGISTER - shape.weights()) / (shape.slot() + shape.weights() + shape.conv.outputs);
        let at = line(scratch);
        let (slots, rest) = scratch[at..].split_at_mut(most * shape.slot());
        let (packed, sums) = rest.split_at_mut(shape.weights());
        let mut slots = slots.chunks_exact_mut(shape.slot()).map(Mutex::new);
        Work { packed, sums, slots: Slots(std::array::from_fn(|_| slots.next())) }
    }
}

impl<T> Slots<'_, T> {
    /// Runs `f` on a slot that no other thread is using.
    fn with<R>(&self, f: impl FnOnce(&mut [T]) -> R) -> R {
        let index = rayon::current_thread_index().unwrap_or(0);
        let there = self.0.iter().flatten().count();
        let slot = self.0[index % there].as_ref().expect("as many as are there");
        f(&mut slot.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Weights by blocks of outputs, `[patch, block]` each.
fn pack_outputs<T: Lane>(conv: &Conv, weight: &[T], packed: &mut [T]) {
    let (patch, mut first) = (conv.patch(), 0);
    while first < conv.outputs {
        let size = block(conv.outputs - first);
        for (k, to) in packed[first * patch..][..size * patch].chunks_exact_mut(size).enumerate() {
            to.iter_mut().enumerate().for_each(|(r, to)| *to = weight[(first + r) * patch + k]);
        }
        first += size;
    }
}

/// Weights by blocks of inputs, `[outputs, kernel^2, block]` each.
fn pack_inputs<T: Lane>(conv: &Conv, weight: &[T], packed: &mut [T]) {
    let (patch, taps, mut first) = (conv.patch(), conv.kernel * conv.kernel, 0);
    while first < conv.inputs {
        let size = block(conv.inputs - first);
        let to = &mut packed[first * conv.outputs * taps..][..size * conv.outputs * taps];
        for (at, to) in to.chunks_exact_mut(size).enumerate() {
            let (o, tap) = (at / taps, at % taps);
            to.iter_mut().enumerate().for_each(|(r, to)| *to = weight[o * patch + (first + r) * taps + tap]);
        }
        first += size;
    }
}

/// The transpose of as many registers as one has numbers: as many rounds as indices have bits, each of which makes the
/// uppermost bit of an index (row, column) its lowest.
#[inline(always)]
fn turn<T: Lane, V: Vector<T>>(mut rows: [V; REGISTER]) -> [V; REGISTER] {
    let half = V::LANES / 2;
    for _ in 0..V::LANES.ilog2() {
        let before = rows;
        for i in 0..half {
            [rows[2 * i], rows[2 * i + 1]] = before[i].interleave(before[i + half]);
        }
    }
    rows
}

/// Where parts of `size` begin that make up `0..len`, the last one ending there; none if `len` is smaller.
#[inline(always)]
fn parts(len: usize, size: usize) -> impl Iterator<Item = usize> {
    let last = len.checked_sub(size);
    last.into_iter().flat_map(move |last| (0..len).step_by(size).map(move |at| at.min(last)))
}

/// `to[i, l] = x[l, at + i]` for rows of `len` numbers; lanes without a sample are 0.
#[inline(always)]
fn enter<S: Simd, T: Lane>(x: &[T], len: usize, at: usize, to: &mut [T]) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let n = to.len() / lanes;
    for part in parts(n, lanes) {
        let mut rows = [<T::In<S> as Register<T>>::broadcast(T::ZERO); REGISTER];
        for (l, row) in rows.iter_mut().enumerate().take(lanes) {
            if let Some(x) = x.get(l * len + at + part..).filter(|x| x.len() >= lanes) {
                *row = <T::In<S> as Register<T>>::load(x);
            }
        }
        let to = to[part * lanes..].chunks_exact_mut(lanes);
        turn(rows).into_iter().zip(to).take(lanes).for_each(|(row, to)| row.store(to));
    }
    if n < lanes {
        for l in 0..lanes {
            let to = to.chunks_exact_mut(lanes);
            match x.get(l * len + at..l * len + at + n) {
                Some(row) => to.zip(row).for_each(|(to, &x)| to[l] = x),
                None => to.for_each(|to| to[l] = T::ZERO),
            }
        }
    }
}

/// [`enter`] of whole images into padded ones, or into rows with a zero on both sides.
#[inline(always)]
fn enter_images<S: Simd, T: Lane>(
    x: &[T],
    [images, height, width]: [usize; 3],
    [above, beside]: [usize; 2],
    to: &mut [T],
) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let (high, wide) = (height + 2 * above, width + 2 * beside);
    if above + beside == 0 {
        return enter::<S, T>(x, images * height * width, 0, &mut to[..images * height * width * lanes]);
    }
    to.fill(T::ZERO);
    for (image, to) in to.chunks_exact_mut(high * wide * lanes).enumerate().take(images) {
        for (y, to) in to.chunks_exact_mut(wide * lanes).skip(above).take(height).enumerate() {
            let at = (image * height + y) * width;
            enter::<S, T>(x, images * height * width, at, &mut to[beside * lanes..][..width * lanes]);
        }
    }
}

/// `to[l, i] = from[i, l]`, for the samples that there are, rows of `len` numbers.
#[inline(always)]
fn leave<S: Simd, T: Lane>(from: &[T], len: usize, to: &mut [T]) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    for part in parts(len, lanes) {
        let mut rows = [<T::In<S> as Register<T>>::broadcast(T::ZERO); REGISTER];
        let from = from[part * lanes..].chunks_exact(lanes);
        rows.iter_mut().zip(from).take(lanes).for_each(|(row, from)| *row = <T::In<S> as Register<T>>::load(from));
        let to = to.chunks_exact_mut(len);
        turn(rows).into_iter().zip(to).take(lanes).for_each(|(row, to)| row.store(&mut to[part..]));
    }
    if len < lanes {
        for (l, to) in to.chunks_exact_mut(len).enumerate() {
            to.iter_mut().zip(from.chunks_exact(lanes)).for_each(|(to, from)| *to = from[l]);
        }
    }
}

/// `out[o, p] = bias[o] + sum_k w[o, k] x[p + k]`, rows of `out` `shape.width` long.
#[inline(always)]
fn correlate<S: Simd, T: Lane>(shape: &Shape, x: &[T], packed: &[T], bias: &[T], out: &mut [T]) {
    blocks!(shape.conv.outputs, |first| correlate_block(shape, x, packed, bias, first, out));
}

#[inline(always)]
fn correlate_block<S: Simd, T: Lane, const R: usize>(
    shape: &Shape,
    x: &[T],
    packed: &[T],
    bias: &[T],
    first: usize,
    out: &mut [T],
) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let (weights, _) = packed[first * shape.conv.patch()..][..R * shape.conv.patch()].as_chunks::<R>();
    let start = std::array::from_fn(|r| bias.get(first + r).map_or(T::ZERO, |&b| b));
    let (image, row) = (shape.height * shape.width * lanes, shape.width * lanes);
    let out = &mut out[first * image..][..R * image];
    for y in 0..shape.height {
        let x = &x[y * shape.wide * lanes..];
        let mut at = 0;
        while at < shape.width {
            let (x, out) = (&x[at * lanes..], &mut out[y * row + at * lanes..]);
            if shape.width - at >= PIXELS {
                correlate_pixels::<S, T, R, PIXELS>(shape, x, weights, start, image, out);
                at += PIXELS;
            } else {
                correlate_pixels::<S, T, R, 1>(shape, x, weights, start, image, out);
                at += 1;
            }
        }
    }
}

#[inline(always)]
fn correlate_pixels<S: Simd, T: Lane, const R: usize, const P: usize>(
    shape: &Shape,
    x: &[T],
    weights: &[[T; R]],
    start: [T; R],
    image: usize,
    out: &mut [T],
) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let kernel = shape.conv.kernel;
    let mut sums = [[<T::In<S> as Register<T>>::broadcast(T::ZERO); P]; R];
    for (sums, &start) in sums.iter_mut().zip(&start) {
        *sums = [<T::In<S> as Register<T>>::broadcast(start); P];
    }
    for (line, weights) in weights.chunks_exact(kernel).enumerate() {
        let (c, ky) = (line / kernel, line % kernel);
        let x = &x[(c * shape.high + ky) * shape.wide * lanes..][..(kernel + P - 1) * lanes];
        for (kx, weights) in weights.iter().enumerate() {
            let mut pixels = [<T::In<S> as Register<T>>::broadcast(T::ZERO); P];
            for (p, pixel) in pixels.iter_mut().enumerate() {
                *pixel = <T::In<S> as Register<T>>::load(&x[(kx + p) * lanes..][..lanes]);
            }
            for (sums, &w) in sums.iter_mut().zip(weights) {
                let w = <T::In<S> as Register<T>>::broadcast(w);
                for (sum, &pixel) in sums.iter_mut().zip(&pixels) {
                    *sum = w.fma(pixel, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (p, sum) in sums.iter().enumerate() {
            sum.store(&mut out[r * image + p * lanes..][..lanes]);
        }
    }
}

/// `dx[c, q] = sum_{o, k} w[o, k] d[o, q - k]`.
#[inline(always)]
fn spread<S: Simd, T: Lane>(shape: &Shape, d: &[T], packed: &[T], dx: &mut [T]) {
    blocks!(shape.conv.inputs, |first| spread_block(shape, d, packed, first, dx));
}

#[inline(always)]
fn spread_block<S: Simd, T: Lane, const R: usize>(shape: &Shape, d: &[T], packed: &[T], first: usize, dx: &mut [T]) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let Conv { height, width, outputs, kernel, padding, .. } = shape.conv;
    let all = outputs * kernel * kernel;
    let (weights, _) = packed[first * all..][..R * all].as_chunks::<R>();
    let image = height * width * lanes;
    let dx = &mut dx[first * image..][..R * image];
    for y in 0..height {
        let mut at = 0;
        while at < width {
            let (q, dx) = ([y + padding, at + padding], &mut dx[(y * width + at) * lanes..]);
            if width - at >= PIXELS {
                spread_pixels::<S, T, R, PIXELS>(shape, d, weights, q, image, dx);
                at += PIXELS;
            } else {
                spread_pixels::<S, T, R, 1>(shape, d, weights, q, image, dx);
                at += 1;
            }
        }
    }
}

/// The taps through which an output within `0..len` reaches one of the pixels from `q` to `q + pixels`.
#[inline(always)]
fn taps(q: usize, pixels: usize, len: usize, kernel: usize) -> Range<usize> {
    let low = (q + 1).saturating_sub(len).min(kernel);
    low..(q + pixels).min(kernel).max(low)
}

#[inline(always)]
fn spread_pixels<S: Simd, T: Lane, const R: usize, const P: usize>(
    shape: &Shape,
    d: &[T],
    weights: &[[T; R]],
    [y, x]: [usize; 2],
    image: usize,
    dx: &mut [T],
) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let kernel = shape.conv.kernel;
    let (rows, columns) = (taps(y, 1, shape.height, kernel), taps(x, P, shape.width, kernel));
    let mut sums = [[<T::In<S> as Register<T>>::broadcast(T::ZERO); P]; R];
    if !columns.is_empty() {
        for (weights, d) in weights.chunks_exact(kernel * kernel).zip(d.chunks_exact(shape.height * shape.row * lanes))
        {
            for ky in rows.clone() {
                let weights = &weights[ky * kernel..][columns.clone()];
                // A row has `PIXELS - 1` zeros in front: the last tap reads the first number of this part.
                let from = (y - ky) * shape.row + x + PIXELS - columns.end;
                let d = &d[from * lanes..][..(columns.len() + P - 1) * lanes];
                for (weights, at) in weights.iter().zip((0..columns.len()).rev()) {
                    let mut pixels = [<T::In<S> as Register<T>>::broadcast(T::ZERO); P];
                    for (p, pixel) in pixels.iter_mut().enumerate() {
                        *pixel = <T::In<S> as Register<T>>::load(&d[(at + p) * lanes..][..lanes]);
                    }
                    for (sums, &w) in sums.iter_mut().zip(weights) {
                        let w = <T::In<S> as Register<T>>::broadcast(w);
                        for (sum, &pixel) in sums.iter_mut().zip(&pixels) {
                            *sum = w.fma(pixel, *sum);
                        }
                    }
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (p, sum) in sums.iter().enumerate() {
            sum.store(&mut dx[r * image + p * lanes..][..lanes]);
        }
    }
}

/// `sums[o, k] += sum_p d[o, p] x[p + k]`, summed over lanes too.
#[inline(always)]
fn weigh<S: Simd, T: Lane>(shape: &Shape, x: &[T], d: &[T], sums: &mut [T]) {
    blocks!(shape.conv.outputs, |first| weigh_block(shape, x, d, first, sums));
}

#[inline(always)]
fn weigh_block<S: Simd, T: Lane, const R: usize>(shape: &Shape, x: &[T], d: &[T], first: usize, sums: &mut [T]) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let (kernel, patch, image) = (shape.conv.kernel, shape.conv.patch(), shape.height * shape.row * lanes);
    let d = &d[first * image..][..R * image];
    let sums = &mut sums[first * patch..][..R * patch];
    let lines = (CACHED / (R * shape.row * lanes)).clamp(1, shape.height);
    let from = |k: usize| {
        let (c, ky, kx) = (k / (kernel * kernel), k / kernel % kernel, k % kernel);
        ((c * shape.high + ky) * shape.wide + kx) * lanes
    };
    for start in (0..shape.height).step_by(lines) {
        let rows = start..(start + lines).min(shape.height);
        let mut k = 0;
        while k < patch {
            if patch - k >= PIXELS {
                let x = std::array::from_fn(|t| &x[from(k + t)..]);
                weigh_taps::<S, T, R, PIXELS>(shape, x, d, rows.clone(), &mut sums[k..]);
                k += PIXELS;
            } else {
                weigh_taps::<S, T, R, 1>(shape, [&x[from(k)..]], d, rows.clone(), &mut sums[k..]);
                k += 1;
            }
        }
    }
}

#[inline(always)]
fn weigh_taps<S: Simd, T: Lane, const R: usize, const K: usize>(
    shape: &Shape,
    x: [&[T]; K],
    d: &[T],
    rows: Range<usize>,
    to: &mut [T],
) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let (image, row) = (shape.height * shape.row * lanes, shape.width * lanes);
    let mut sums = [[<T::In<S> as Register<T>>::broadcast(T::ZERO); K]; R];
    for y in rows {
        let mut lines = [d; R];
        for (r, line) in lines.iter_mut().enumerate() {
            *line = &d[r * image + (y * shape.row + PIXELS - 1) * lanes..][..row];
        }
        let mut images = x;
        for image in &mut images {
            *image = &image[y * shape.wide * lanes..][..row];
        }
        let mut at = 0;
        while at < row {
            let mut pixels = [<T::In<S> as Register<T>>::broadcast(T::ZERO); K];
            for (pixel, image) in pixels.iter_mut().zip(&images) {
                *pixel = <T::In<S> as Register<T>>::load(&image[at..][..lanes]);
            }
            for (sums, line) in sums.iter_mut().zip(&lines) {
                let d = <T::In<S> as Register<T>>::load(&line[at..][..lanes]);
                for (sum, &pixel) in sums.iter_mut().zip(&pixels) {
                    *sum = d.fma(pixel, *sum);
                }
            }
            at += lanes;
        }
    }
    // Short loops, which the compiler unrolls: others would keep the sums above in memory.
    let mut numbers = [[[T::ZERO; REGISTER]; K]; R];
    for (numbers, sums) in numbers.iter_mut().zip(&sums) {
        for (numbers, sum) in numbers.iter_mut().zip(sums) {
            sum.store(numbers);
        }
    }
    for (r, numbers) in numbers.iter_mut().enumerate() {
        for (k, numbers) in numbers.iter_mut().enumerate() {
            to[r * shape.conv.patch() + k] += sum_by_halves(numbers, lanes);
        }
    }
}

/// `sums[o] += sum_p d[o, p]`, summed over lanes too; line by line, for the digits.
#[inline(always)]
fn sum_channels<S: Simd, T: Lane>(shape: &Shape, d: &[T], sums: &mut [T]) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    for (d, to) in d.chunks_exact(shape.height * shape.row * lanes).zip(sums) {
        let mut sum = <T::In<S> as Register<T>>::broadcast(T::ZERO);
        for d in d.chunks_exact(shape.row * lanes) {
            let mut line = <T::In<S> as Register<T>>::broadcast(T::ZERO);
            for d in d.chunks_exact(lanes) {
                line = line.plus(<T::In<S> as Register<T>>::load(d));
            }
            sum = sum.plus(line);
        }
        let mut numbers = [T::ZERO; REGISTER];
        sum.store(&mut numbers);
        *to += sum_by_halves(&mut numbers, lanes);
    }
}

/// An activation.
trait Act {
    /// Its values and its derivatives at the numbers of `x`.
    fn both<T: Lane, V: Vector<T>>(x: V) -> (V, V);
}

/// [`Activation::None`].
struct Same;
/// [`Activation::Relu`].
struct Relu;
/// [`Activation::Gelu`].
struct Gelu;

impl Act for Same {
    #[inline(always)]
    fn both<T: Lane, V: Vector<T>>(x: V) -> (V, V) {
        (x, V::broadcast(T::ONE))
    }
}

impl Act for Relu {
    // NaN stays NaN.
    #[inline(always)]
    fn both<T: Lane, V: Vector<T>>(x: V) -> (V, V) {
        let zero = V::broadcast(T::ZERO);
        (x.larger(zero), V::broadcast(T::ONE).where_lt(zero, x))
    }
}

impl Act for Gelu {
    #[inline(always)]
    fn both<T: Lane, V: Vector<T>>(x: V) -> (V, V) {
        let (mut value, mut slope) = ([T::ZERO; REGISTER], [T::ZERO; REGISTER]);
        x.store(&mut value);
        for (x, slope) in value.iter_mut().zip(&mut slope).take(V::LANES) {
            let (cdf, density) = normal(*x);
            (*x, *slope) = (*x * cdf, cdf + *x * density);
        }
        (V::load(&value), V::load(&slope))
    }
}

/// Whether backward needs of a window no more than where its maximum is and the activation's derivative there.
fn by_window(c: &ConvPool) -> bool {
    c.pool == Pool::Max && c.size > 1
}

/// `out = pool(A(pre))`. Of maxima `kept` has, two registers a window, which of its numbers is the first largest and
/// the activation's derivative there.
#[inline(always)]
fn pool<S: Simd, T: Lane, A: Act>(c: &ConvPool, pre: &[T], kept: &mut [T], out: &mut [T]) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let (p, size) = (c.pooling(), c.size);
    let (zero, share) = (<T::In<S> as Register<T>>::broadcast(T::ZERO), share::<S, T>(size));
    let one = <T::In<S> as Register<T>>::broadcast(T::ONE);
    let row = p.width * lanes;
    let mut kept = kept.chunks_exact_mut(2 * lanes);
    let images = pre.chunks_exact(p.height * row).zip(out.chunks_exact_mut(p.out_height() * p.out_width() * lanes));
    for (pre, out) in images {
        for (pre, out) in pre.chunks_exact(size * row).zip(out.chunks_exact_mut(p.out_width() * lanes)) {
            for (window, out) in out.chunks_exact_mut(lanes).enumerate() {
                let from = |y: usize, x: usize| (y * p.width + window * size + x) * lanes;
                let (mut pooled, mut slope) =
                    A::both::<T, T::In<S>>(<T::In<S> as Register<T>>::load(&pre[from(0, 0)..]));
                let (mut which, mut at) = (zero, zero);
                for y in 0..size {
                    for x in usize::from(y == 0)..size {
                        let (value, new) = A::both::<T, T::In<S>>(<T::In<S> as Register<T>>::load(&pre[from(y, x)..]));
                        if by_window(c) {
                            at = at.plus(one);
                            which = which.unless_lt(pooled, value, at);
                            slope = slope.unless_lt(pooled, value, new);
                            pooled = pooled.larger(value);
                        } else {
                            pooled = pooled.plus(value);
                        }
                    }
                }
                if by_window(c) {
                    let kept = kept.next().expect("two registers a window");
                    which.store(kept);
                    slope.store(&mut kept[lanes..]);
                } else {
                    pooled = pooled.fma(share, zero);
                }
                pooled.store(out);
            }
        }
    }
}

/// What each of a window's numbers counts in their mean.
#[inline(always)]
fn share<S: Simd, T: Lane>(size: usize) -> T::In<S> {
    <T::In<S> as Register<T>>::broadcast(T::from_f64(1.0 / (size * size) as f64))
}

/// `d = dL/d pre` from `d_out = dL/d out`; every number of `d` is set. `kept` is what [`pool`] left of maxima, `pre`
/// where means are taken.
#[inline(always)]
fn pool_backward<S: Simd, T: Lane, A: Act>(shape: &Shape, c: &ConvPool, kept: &[T], d_out: &[T], d: &mut [T]) {
    let lanes = <T::In<S> as Register<T>>::LANES;
    let (p, size) = (c.pooling(), c.size);
    let (zero, share) = (<T::In<S> as Register<T>>::broadcast(T::ZERO), share::<S, T>(size));
    let one = <T::In<S> as Register<T>>::broadcast(T::ONE);
    d.fill(T::ZERO);
    let mut windows = kept.chunks_exact(2 * lanes);
    let images = d_out.chunks_exact(p.out_height() * p.out_width() * lanes);
    for (image, (d_out, d)) in images.zip(d.chunks_exact_mut(p.height * shape.row * lanes)).enumerate() {
        let lines = d_out.chunks_exact(p.out_width() * lanes).zip(d.chunks_exact_mut(size * shape.row * lanes));
        for (line, (d_out, d)) in lines.enumerate() {
            for (window, d_out) in d_out.chunks_exact(lanes).enumerate() {
                let d_out = <T::In<S> as Register<T>>::load(d_out);
                let to = |y: usize, x: usize| (y * shape.row + PIXELS - 1 + window * size + x) * lanes;
                if by_window(c) {
                    let kept = windows.next().expect("two registers a window");
                    let which = <T::In<S> as Register<T>>::load(kept);
                    let given = d_out.fma(<T::In<S> as Register<T>>::load(&kept[lanes..]), zero);
                    let mut at = zero;
                    for y in 0..size {
                        for x in 0..size {
                            given.where_eq(at, which).store(&mut d[to(y, x)..]);
                            at = at.plus(one);
                        }
                    }
                } else {
                    let given = d_out.fma(share, zero);
                    for y in 0..size {
                        let from = (image * p.height + line * size + y) * p.width + window * size;
                        for (x, pre) in kept[from * lanes..].chunks_exact(lanes).enumerate().take(size) {
                            let (_, slope) = A::both::<T, T::In<S>>(<T::In<S> as Register<T>>::load(pre));
                            given.fma(slope, zero).store(&mut d[to(y, x)..]);
                        }
                    }
                }
            }
        }
    }
}

/// [`Conv`] by itself.
pub(super) fn conv<T: Lane>(isa: Isa, conv: &Conv, rows: usize, x: &[T], w: &[T], out: &mut [T], scratch: &mut [T]) {
    let (shape, shard) = (Shape::new(conv), shard::<T>(isa, rows));
    let Work { packed, slots, .. } = Work::new(&shape, scratch);
    pack_outputs(conv, w, packed);
    let packed = &*packed;
    out.par_chunks_mut(shard * conv.output_len()).zip(x.par_chunks(shard * conv.input_len())).for_each(|(out, x)| {
        slots.with(|slot| isa.run(Correlate { shape, x, packed, out, slot }));
    });
}

/// [`conv`] of a shard.
struct Correlate<'a, T> {
    shape: Shape,
    x: &'a [T],
    packed: &'a [T],
    out: &'a mut [T],
    slot: &'a mut [T],
}

impl<T: Lane> Op for Correlate<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Correlate { shape, x, packed, out, slot } = self;
        let lanes = <T::In<S> as Register<T>>::LANES;
        let Conv { inputs, height, width, padding, .. } = shape.conv;
        let [xs, _, ys] = shape.split(lanes, slot);
        let (input, output) = (shape.conv.input_len(), shape.conv.output_len());
        let ys = &mut ys[..lanes * output];
        for (x, out) in x.chunks(lanes * input).zip(out.chunks_mut(lanes * output)) {
            enter_images::<S, T>(x, [inputs, height, width], [padding; 2], xs);
            correlate::<S, T>(&shape, xs, packed, &[], ys);
            leave::<S, T>(ys, output, out);
        }
    }
}

pub(super) fn backward_data<T: Lane>(
    isa: Isa,
    conv: &Conv,
    rows: usize,
    weight: &[T],
    d_out: &[T],
    dx: &mut [T],
    scratch: &mut [T],
) {
    let (shape, shard) = (Shape::new(conv), shard::<T>(isa, rows));
    let Work { packed, slots, .. } = Work::new(&shape, scratch);
    pack_inputs(conv, weight, packed);
    let packed = &*packed;
    dx.par_chunks_mut(shard * conv.input_len())
        .zip(d_out.par_chunks(shard * conv.output_len()))
        .for_each(|(dx, d_out)| slots.with(|slot| isa.run(Spread { shape, d_out, packed, dx, slot })));
}

/// [`backward_data`] of a shard.
struct Spread<'a, T> {
    shape: Shape,
    d_out: &'a [T],
    packed: &'a [T],
    dx: &'a mut [T],
    slot: &'a mut [T],
}

impl<T: Lane> Op for Spread<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Spread { shape, d_out, packed, dx, slot } = self;
        let lanes = <T::In<S> as Register<T>>::LANES;
        let [_, d, dxs] = shape.split(lanes, slot);
        let (input, output) = (shape.conv.input_len(), shape.conv.output_len());
        let dxs = &mut dxs[..lanes * input];
        for (dx, d_out) in dx.chunks_mut(lanes * input).zip(d_out.chunks(lanes * output)) {
            enter_images::<S, T>(d_out, [shape.conv.outputs, shape.height, shape.width], [0, PIXELS - 1], d);
            spread::<S, T>(&shape, d, packed, dxs);
            leave::<S, T>(dxs, input, dx);
        }
    }
}

pub(super) fn backward_weight<T: Lane>(
    isa: Isa,
    conv: &Conv,
    rows: usize,
    x: &[T],
    d_out: &[T],
    d_weight: Write<&mut [T]>,
    scratch: &mut [T],
) {
    let (shape, shard) = (Shape::new(conv), shard::<T>(isa, rows));
    let Work { sums, slots, .. } = Work::new(&shape, scratch);
    let sums = &mut sums[..rows.div_ceil(shard) * shape.weights()];
    x.par_chunks(shard * conv.input_len())
        .zip(d_out.par_chunks(shard * conv.output_len()))
        .zip(sums.par_chunks_mut(shape.weights()))
        .for_each(|((x, d_out), sums)| slots.with(|slot| isa.run(Weigh { shape, x, d_out, sums, slot })));
    add_shards(sums, d_weight);
}

/// Adds the shards' sums to `to`, in order, or sets it to them.
fn add_shards<T: Lane>(sums: &[T], to: Write<&mut [T]>) {
    let (to, add) = to.split();
    if !add {
        to.fill(T::ZERO);
    }
    let len = to.len();
    for (i, to) in to.iter_mut().enumerate() {
        *to += sums.iter().skip(i).step_by(len).fold(T::ZERO, |sum, &x| sum + x);
    }
}

/// [`backward_weight`] of a shard.
struct Weigh<'a, T> {
    shape: Shape,
    x: &'a [T],
    d_out: &'a [T],
    sums: &'a mut [T],
    slot: &'a mut [T],
}

impl<T: Lane> Op for Weigh<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Weigh { shape, x, d_out, sums, slot } = self;
        let lanes = <T::In<S> as Register<T>>::LANES;
        let Conv { inputs, height, width, outputs, padding, .. } = shape.conv;
        let [xs, d, _] = shape.split(lanes, slot);
        let (input, output) = (shape.conv.input_len(), shape.conv.output_len());
        sums.fill(T::ZERO);
        for (x, d_out) in x.chunks(lanes * input).zip(d_out.chunks(lanes * output)) {
            enter_images::<S, T>(x, [inputs, height, width], [padding; 2], xs);
            enter_images::<S, T>(d_out, [outputs, shape.height, shape.width], [0, PIXELS - 1], d);
            weigh::<S, T>(&shape, xs, d, sums);
        }
    }
}

/// [`ConvPool`]: `params` are the weights and, behind them, the biases. Leaves in `kept`, by groups, what [`backward`]
/// needs.
#[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
pub(super) fn forward<T: Lane>(
    isa: Isa,
    c: &ConvPool,
    rows: usize,
    x: &[T],
    params: &[T],
    kept: &mut [T],
    out: &mut [T],
    scratch: &mut [T],
) {
    let (shape, shard) = (Shape::new(&c.conv), shard::<T>(isa, rows));
    let Work { packed, slots, .. } = Work::new(&shape, scratch);
    let (weight, bias) = params.split_at(shape.weights());
    pack_outputs(&c.conv, weight, packed);
    let packed = &*packed;
    let at = line(kept);
    out.par_chunks_mut(shard * c.pooling().output_len())
        .zip(x.par_chunks(shard * c.conv.input_len()))
        .zip(kept[at..].par_chunks_mut(shard * kept_len(c)))
        .for_each(|((out, x), kept)| {
            slots.with(|slot| isa.run(Forward { shape, c, x, packed, bias, kept, out, slot }));
        });
}

/// [`forward`] of a shard.
struct Forward<'a, T> {
    shape: Shape,
    c: &'a ConvPool,
    x: &'a [T],
    packed: &'a [T],
    bias: &'a [T],
    kept: &'a mut [T],
    out: &'a mut [T],
    slot: &'a mut [T],
}

impl<T: Lane> Op for Forward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Forward { shape, c, x, packed, bias, kept, out, slot } = self;
        let lanes = <T::In<S> as Register<T>>::LANES;
        let Conv { inputs, height, width, padding, .. } = shape.conv;
        let [xs, d, ys] = shape.split(lanes, slot);
        let (input, output, pooled) = (c.conv.input_len(), c.conv.output_len(), c.pooling().output_len());
        let ys = &mut ys[..lanes * pooled];
        let groups = x.chunks(lanes * input).zip(out.chunks_mut(lanes * pooled));
        for ((x, out), kept) in groups.zip(kept.chunks_exact_mut(lanes * kept_len(c))) {
            enter_images::<S, T>(x, [inputs, height, width], [padding; 2], xs);
            let (pre, kept) = if by_window(c) { (&mut d[..lanes * output], kept) } else { (kept, &mut [][..]) };
            correlate::<S, T>(&shape, xs, packed, bias, pre);
            match c.activation {
                Activation::None => pool::<S, T, Same>(c, pre, kept, ys),
                Activation::Relu => pool::<S, T, Relu>(c, pre, kept, ys),
                Activation::Gelu => pool::<S, T, Gelu>(c, pre, kept, ys),
            }
            leave::<S, T>(ys, pooled, out);
        }
    }
}

/// What [`backward`] reads.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a, T> {
    pub(super) x: &'a [T],
    pub(super) params: &'a [T],
    pub(super) kept: &'a [T],
    pub(super) d_out: &'a [T],
}

/// Backward of [`forward`]: `dx`, and gradients of the weights and biases, added to `d_params`, laid out as they are.
pub(super) fn backward<T: Lane>(
    isa: Isa,
    c: &ConvPool,
    rows: usize,
    Saved { x, params, kept, d_out }: Saved<'_, T>,
    dx: Option<&mut [T]>,
    d_params: &mut [T],
    scratch: &mut [T],
) {
    let (shape, shard) = (Shape::new(&c.conv), shard::<T>(isa, rows));
    let Work { packed, sums, slots } = Work::new(&shape, scratch);
    pack_inputs(&c.conv, &params[..shape.weights()], packed);
    let packed = &*packed;
    let sums = &mut sums[..rows.div_ceil(shard) * params.len()];
    let shards = x
        .par_chunks(shard * c.conv.input_len())
        .zip(kept[line(kept)..].par_chunks(shard * kept_len(c)))
        .zip(d_out.par_chunks(shard * c.pooling().output_len()))
        .zip(sums.par_chunks_mut(params.len()));
    match dx {
        Some(dx) => {
            shards.zip(dx.par_chunks_mut(shard * c.conv.input_len())).for_each(|((((x, kept), d_out), sums), dx)| {
                let dx = Some(dx);
                slots.with(|slot| isa.run(Backward { shape, c, x, packed, kept, d_out, dx, sums, slot }));
            })
        }
        None => shards.for_each(|(((x, kept), d_out), sums)| {
            let dx = None;
            slots.with(|slot| isa.run(Backward { shape, c, x, packed, kept, d_out, dx, sums, slot }));
        }),
    }
    add_shards(sums, Write::Add(d_params));
}

/// [`backward`] of a shard.
struct Backward<'a, T> {
    shape: Shape,
    c: &'a ConvPool,
    x: &'a [T],
    packed: &'a [T],
    kept: &'a [T],
    d_out: &'a [T],
    dx: Option<&'a mut [T]>,
    sums: &'a mut [T],
    slot: &'a mut [T],
}

impl<T: Lane> Op for Backward<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self) {
        let Backward { shape, c, x, packed, kept, d_out, mut dx, sums, slot } = self;
        let lanes = <T::In<S> as Register<T>>::LANES;
        let Conv { inputs, height, width, padding, .. } = shape.conv;
        let [xs, d, rest] = shape.split(lanes, slot);
        let (input, pooled) = (c.conv.input_len(), c.pooling().output_len());
        sums.fill(T::ZERO);
        let (d_weight, d_bias) = sums.split_at_mut(shape.weights());
        let groups = x.chunks(lanes * input).zip(d_out.chunks(lanes * pooled));
        for (group, ((x, d_out), kept)) in groups.zip(kept.chunks_exact(lanes * kept_len(c))).enumerate() {
            let ds = &mut rest[..lanes * pooled];
            enter::<S, T>(d_out, pooled, 0, ds);
            match c.activation {
                Activation::None => pool_backward::<S, T, Same>(&shape, c, kept, ds, d),
                Activation::Relu => pool_backward::<S, T, Relu>(&shape, c, kept, ds, d),
                Activation::Gelu => pool_backward::<S, T, Gelu>(&shape, c, kept, ds, d),
            }
            sum_channels::<S, T>(&shape, d, d_bias);
            enter_images::<S, T>(x, [inputs, height, width], [padding; 2], xs);
            weigh::<S, T>(&shape, xs, d, d_weight);
            if let Some(dx) = &mut dx {
                let dxs = &mut rest[..lanes * input];
                spread::<S, T>(&shape, d, packed, dxs);
                let samples = x.len() / input;
                leave::<S, T>(dxs, input, &mut dx[group * lanes * input..][..samples * input]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layers::{
        self,
        tests::{dot, random},
    };
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    /// The definition: six loops.
    fn naive_conv(c: &Conv, rows: usize, x: &[f64], weight: &[f64]) -> Vec<f64> {
        let (height, width, k) = (c.out_height(), c.out_width(), c.kernel);
        let mut out = vec![0.0; rows * c.output_len()];
        for (at, out) in out.iter_mut().enumerate() {
            let (ox, oy) = (at % width, at / width % height);
            let (o, row) = (at / (width * height) % c.outputs, at / c.output_len());
            for i in 0..c.inputs {
                for (ky, kx) in (0..k * k).map(|at| (at / k, at % k)) {
                    let (y, x_) = (oy + ky, ox + kx);
                    let inside = |at: usize, len: usize| (c.padding..len + c.padding).contains(&at);
                    if inside(y, c.height) && inside(x_, c.width) {
                        let from = ((row * c.inputs + i) * c.height + y - c.padding) * c.width + x_ - c.padding;
                        *out += x[from] * weight[((o * c.inputs + i) * k + ky) * k + kx];
                    }
                }
            }
        }
        out
    }

    // Images of one and of several blocks, batches of one and of several samples a shard, padding beyond the kernel.
    // The backwards are the adjoints of the forward: <conv(x, w), d> = <x, dx> = <w, dw>. Tolerance: rounding of sums
    // of 1e5 terms; any misplaced term shows as 1e-3 or more.
    #[test]
    fn convolution_is_its_definition_and_backward_its_adjoint() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (inputs, height, width, outputs, kernel, padding, rows) in [
            (1, 1, 1, 1, 1, 0, 1),
            (1, 28, 28, 6, 5, 2, 3),
            (6, 14, 14, 16, 5, 0, 67),
            (7, 41, 37, 3, 7, 1, 2),
            (2, 3, 2, 5, 2, 4, 131),
            (3, 5, 11, 33, 5, 0, 2),
        ] {
            let c = Conv { inputs, height, width, outputs, kernel, padding };
            let (x, d) = (random(rows * c.input_len(), &mut rng), random(rows * c.output_len(), &mut rng));
            let weight = random(outputs * c.patch(), &mut rng);
            let want = naive_conv(&c, rows, &x, &weight);
            for isa in Isa::available() {
                let mut scratch = vec![f64::NAN; scratch(&c, rows)];
                let mut out = vec![f64::NAN; want.len()];
                conv(isa, &c, rows, &x, &weight, &mut out, &mut scratch);
                for (o, w) in out.iter().zip(&want) {
                    assert!((o - w).abs() < 1e-12, "{c:?} {}: {o}, want {w}", isa.name());
                }
                scratch.fill(f64::NAN);
                let mut dx = vec![f64::NAN; x.len()];
                backward_data(isa, &c, rows, &weight, &d, &mut dx, &mut scratch);
                scratch.fill(f64::NAN);
                let mut dw = vec![f64::NAN; weight.len()];
                backward_weight(isa, &c, rows, &x, &d, Write::Set(&mut dw), &mut scratch);
                let (value, size) = (dot(&want, &d), dot(&want, &want).sqrt() * dot(&d, &d).sqrt());
                assert!((dot(&x, &dx) - value).abs() < 1e-13 * size, "{c:?} {} data", isa.name());
                assert!((dot(&weight, &dw) - value).abs() < 1e-13 * size, "{c:?} {} weight", isa.name());
                let set = dw.clone();
                backward_weight(isa, &c, rows, &x, &d, Write::Add(&mut dw), &mut scratch);
                assert!(dw.iter().zip(&set).all(|(twice, once)| *twice == 2.0 * once));
            }
        }
    }

    // Of equal maxima the first has the gradient, as torch's.
    #[test]
    fn ties_of_a_window_are_its_first_number() {
        let conv = Conv { inputs: 1, height: 4, width: 4, outputs: 1, kernel: 1, padding: 0 };
        let c = ConvPool { conv, activation: Activation::None, pool: Pool::Max, size: 2 };
        // A window of equal numbers, one whose largest are its second and third, its last two, its first and last.
        let x = [5.0, 5.0, 1.0, 3.0, 5.0, 5.0, 3.0, 2.0, 0.0, 1.0, 4.0, 2.0, 2.0, 2.0, 1.0, 4.0];
        let want = [7.0, 0.0, 0.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 10.0, 0.0, 9.0, 0.0, 0.0, 0.0];
        for isa in Isa::available() {
            let (mut work, mut kept) = (vec![f64::NAN; scratch(&conv, 1)], vec![f64::NAN; kept(&c, 1)]);
            let (mut out, mut dx, mut d_params) = ([f64::NAN; 4], [f64::NAN; 16], [0.0; 2]);
            forward(isa, &c, 1, &x, &[1.0, 0.0], &mut kept, &mut out, &mut work);
            assert_eq!(out, [5.0, 3.0, 2.0, 4.0]);
            let saved = Saved { x: &x, params: &[1.0, 0.0], kept: &kept, d_out: &[7.0, 8.0, 9.0, 10.0] };
            backward(isa, &c, 1, saved, Some(&mut dx), &mut d_params, &mut work);
            assert_eq!(dx, want, "{}", isa.name());
        }
    }

    // The verbs one after the other, whose own tests are above and in `layers`. Windows that leave rows and columns
    // over, ties among what a ReLU made 0, batches of part of a group and of several shards.
    #[test]
    fn fused_is_the_verbs_one_after_the_other() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for (conv, size, rows) in [
            (Conv { inputs: 1, height: 28, width: 28, outputs: 6, kernel: 5, padding: 2 }, 2, 19),
            (Conv { inputs: 6, height: 14, width: 14, outputs: 16, kernel: 5, padding: 0 }, 2, 3),
            (Conv { inputs: 3, height: 9, width: 7, outputs: 5, kernel: 2, padding: 3 }, 3, 131),
            (Conv { inputs: 2, height: 4, width: 3, outputs: 1, kernel: 3, padding: 1 }, 1, 70),
        ] {
            let (x, params) =
                (random(rows * conv.input_len(), &mut rng), random(conv.outputs * (conv.patch() + 1), &mut rng));
            let shape = [rows, conv.outputs, conv.out_height() * conv.out_width()];
            let (weight, bias) = params.split_at(conv.outputs * conv.patch());
            for (activation, pool) in [
                (Activation::None, Pool::Average),
                (Activation::Relu, Pool::Max),
                (Activation::Relu, Pool::Average),
                (Activation::Gelu, Pool::Max),
            ] {
                let c = ConvPool { conv, activation, pool, size };
                let d_out = random(rows * c.pooling().output_len(), &mut rng);
                for isa in Isa::available() {
                    let mut work = vec![f64::NAN; scratch(&conv, rows)];
                    let [mut pre, mut act, mut d] = [0; 3].map(|_| vec![f64::NAN; rows * conv.output_len()]);
                    super::conv(isa, &conv, rows, &x, weight, &mut pre, &mut work);
                    layers::bias_activation(isa, shape, activation, Some(bias), &mut pre, Some(&mut act));
                    let mut want = vec![f64::NAN; d_out.len()];
                    layers::pool(&c.pooling(), rows, &act, &mut want);
                    layers::pool_backward(&c.pooling(), rows, &act, &d_out, &mut d);
                    let mut d_want = vec![1.0; params.len()];
                    let (d_weight, d_bias) = d_want.split_at_mut(weight.len());
                    layers::bias_activation_backward(isa, shape, activation, &pre, &mut d, Some(Write::Add(d_bias)));
                    backward_weight(isa, &conv, rows, &x, &d, Write::Add(d_weight), &mut work);
                    let mut dx_want = vec![f64::NAN; x.len()];
                    backward_data(isa, &conv, rows, weight, &d, &mut dx_want, &mut work);

                    let mut kept = vec![f64::NAN; kept(&c, rows)];
                    let [mut out, mut dx] = [want.len(), x.len()].map(|len| vec![f64::NAN; len]);
                    work.fill(f64::NAN);
                    forward(isa, &c, rows, &x, &params, &mut kept, &mut out, &mut work);
                    for d_input in [true, false] {
                        work.fill(f64::NAN);
                        let mut d_params = vec![1.0; params.len()];
                        let saved = Saved { x: &x, params: &params, kept: &kept, d_out: &d_out };
                        backward(isa, &c, rows, saved, d_input.then_some(&mut dx), &mut d_params, &mut work);
                        for (what, got, want) in
                            [("out", &out, &want), ("params", &d_params, &d_want), ("dx", &dx, &dx_want)]
                        {
                            let most = want.iter().fold(1.0f64, |most, w| most.max(w.abs()));
                            for (got, want) in got.iter().zip(want) {
                                // Sums in another order.
                                let near = (got - want).abs() < 1e-12 * most;
                                assert!(near, "{c:?} {rows} {} {what}: {got} for {want}", isa.name());
                            }
                        }
                    }
                }
            }
        }
    }
}
