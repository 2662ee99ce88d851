//! Convolution as a product whose operands are gathered on their way to shared memory: no patches are ever stored.
//!
//! ```text
//! forward     out[pixel, o]  = sum over (c, ky, kx)  patch[pixel, (c, ky, kx)] weight[o, (c, ky, kx)]
//! data        dx[pixel, c]   = sum over (o, ky, kx)  patch of d_out, kernel turned round  weight[o, c, ky, kx]
//! weight      dw[o, (c,k)]   = sum over pixels       d_out[pixel, o] patch[pixel, (c, k)]
//! ```
//!
//! Images are `[rows, channels, height, width]`; a pixel of the product is one of a row's output image. Products are of
//! halves, sums f32. Where channels are few a tile is mostly empty: `direct.rs` is for these.

use crate::abi::{Conv, Geometry, TILE};
use crate::simt::*;
use crate::tile::{ByK, ByTile, Place, Singles, Source, product};
use core::marker::PhantomData;

/// Field by field, as numbers of which the compiler knows nothing: else it copies the struct through local memory.
#[inline(always)]
pub(crate) fn geometry(a: &Conv) -> Geometry {
    let Geometry { channels, height, width, kernel, padding, pixels, width_out } = &a.geometry;
    Geometry {
        channels: opaque(*channels),
        height: opaque(*height),
        width: opaque(*width),
        kernel: opaque(*kernel),
        padding: opaque(*padding),
        pixels: opaque(*pixels),
        width_out: opaque(*width_out),
    }
}

/// What gives a stored operand's numbers one by one.
trait Gather: Copy {
    /// What is known of a row, found once for eight of its numbers.
    type Row: Copy;
    fn row(self, row: u32) -> Self::Row;
    /// Number `at` of a row.
    ///
    /// # Safety
    /// It is there.
    unsafe fn number(self, row: Self::Row, at: u32) -> f32;
}

/// Gathered numbers as halves.
#[derive(Clone, Copy)]
struct Gathered<G, T>(G, PhantomData<T>);

impl<G: Gather, T: Half> Source for Gathered<G, T> {
    #[inline(always)]
    unsafe fn chunk(self, to: u32, row: u32, at: u32, valid: u32) {
        let row = self.0.row(row);
        let mut words = [0u32; 4];
        let mut w = 0;
        while w < 4 {
            let i = 2 * w as u32;
            // SAFETY: `valid` numbers from `at` on are there.
            let (low, high) = unsafe {
                (
                    if i < valid { self.0.number(row, at + i) } else { 0.0 },
                    if i + 1 < valid { self.0.number(row, at + i + 1) } else { 0.0 },
                )
            };
            words[w] = T::pack(low, high);
            w += 1;
        }
        // SAFETY: the caller's chunk.
        unsafe { store_shared(to, words) };
    }
}

/// Row `pixel`, number (c, ky, kx): what the kernel's element sees from the pixel; zeros outside of the image.
#[derive(Clone, Copy)]
struct Patches {
    x: *const f32,
    /// Of the image that is read, and of the pixels.
    g: Geometry,
}

impl Gather for Patches {
    /// First number of the row's images, y and x of the pixel.
    type Row = (usize, u32, u32);
    #[inline(always)]
    fn row(self, pixel: u32) -> (usize, u32, u32) {
        let g = self.g;
        if g.pixels == 0 || g.width_out == 0 {
            return (0, 0, 0);
        }
        let (row, p) = (pixel / g.pixels, pixel % g.pixels);
        (row as usize * (g.channels * g.height * g.width) as usize, p / g.width_out, p % g.width_out)
    }
    #[inline(always)]
    unsafe fn number(self, (row, y, x): (usize, u32, u32), k: u32) -> f32 {
        let g = self.g;
        if g.kernel == 0 {
            return 0.0;
        }
        let (line, kx) = (k / g.kernel, k % g.kernel);
        let (c, ky) = (line / g.kernel, line % g.kernel);
        let (y, x) = (y + ky, x + kx);
        if y < g.padding || x < g.padding || y >= g.height + g.padding || x >= g.width + g.padding {
            return 0.0;
        }
        let at = row + ((c * g.height + y - g.padding) * g.width + (x - g.padding)) as usize;
        // SAFETY: inside the image.
        unsafe { load(self.x.wrapping_add(at)) }
    }
}

/// Row `pixel`, number o: images by pixels.
#[derive(Clone, Copy)]
struct Channels {
    x: *const f32,
    pixels: u32,
    channels: u32,
}

impl Gather for Channels {
    /// The pixel in channel 0.
    type Row = usize;
    #[inline(always)]
    fn row(self, pixel: u32) -> usize {
        if self.pixels == 0 {
            return 0;
        }
        (pixel / self.pixels) as usize * (self.channels * self.pixels) as usize + (pixel % self.pixels) as usize
    }
    #[inline(always)]
    unsafe fn number(self, row: usize, o: u32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { load(self.x.wrapping_add(row + (o * self.pixels) as usize)) }
    }
}

/// Row (o, ky, kx) of the kernel turned round, number c.
#[derive(Clone, Copy)]
struct Turned {
    weight: *const f32,
    /// Elements of a kernel, and channels of the image that the convolution read.
    square: u32,
    inputs: u32,
}

impl Gather for Turned {
    /// The element in channel 0.
    type Row = usize;
    #[inline(always)]
    fn row(self, row: u32) -> usize {
        if self.square == 0 {
            return 0;
        }
        (row / self.square * self.inputs * self.square + (self.square - 1 - row % self.square)) as usize
    }
    #[inline(always)]
    unsafe fn number(self, row: usize, c: u32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { load(self.weight.wrapping_add(row + (c * self.square) as usize)) }
    }
}

/// Writes the tile of `[pixels of all rows, channels]` as images.
#[inline(always)]
unsafe fn put_images(a: &Conv, acc: &crate::tile::Acc, count: u32) {
    let (g, place) = (geometry(a), Place::of_lane());
    if g.pixels == 0 {
        return;
    }
    let (row, col) = (block_y() * TILE, block_x() * TILE);
    let mut f = 0;
    while f < 16 {
        let mut e = 0;
        while e < 4 {
            let (pixel, c) = (row + place.row_of(f, e), col + place.col_of(f, e));
            if pixel < a.rows * g.pixels && c < count {
                let image = (pixel / g.pixels) as usize * count as usize + c as usize;
                // SAFETY: the launch contract; every block has its own pixels and channels.
                unsafe { store(a.out.wrapping_add(image * g.pixels as usize + (pixel % g.pixels) as usize), acc[f][e]) };
            }
            e += 1;
        }
        f += 1;
    }
}

/// `out = x * weight`; grid (output channel tiles, pixel tiles).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Conv`].
#[inline(always)]
pub unsafe fn forward<T: Half>(a: &Conv) {
    let g = geometry(a);
    let depth = g.channels * g.kernel * g.kernel;
    let x = ByK { source: Gathered::<_, T>(Patches { x: a.x, g }, PhantomData), count: a.rows * g.pixels, depth };
    let w = ByK { source: Singles { at: a.weight, pitch: depth, to: PhantomData::<T> }, count: a.outputs, depth };
    // SAFETY: the launch contract.
    unsafe {
        let acc = product::<T, _, _>(x, w, block_y() * TILE, block_x() * TILE, depth);
        put_images(a, &acc, a.outputs);
    }
}

/// `out = dL/dx`, `x` = dL/d output, `geometry` that of the output read back through the kernel turned round, `outputs`
/// the channels of x; grid (channel tiles, pixel tiles).
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Conv`].
#[inline(always)]
pub unsafe fn backward_data<T: Half>(a: &Conv) {
    let g = geometry(a);
    let square = g.kernel * g.kernel;
    let depth = g.channels * square;
    let d = ByK { source: Gathered::<_, T>(Patches { x: a.x, g }, PhantomData), count: a.rows * g.pixels, depth };
    let source = Gathered::<_, T>(Turned { weight: a.weight, square, inputs: a.outputs }, PhantomData);
    let w = ByTile { source, count: a.outputs, depth };
    // SAFETY: the launch contract.
    unsafe {
        let acc = product::<T, _, _>(d, w, block_y() * TILE, block_x() * TILE, depth);
        put_images(a, &acc, a.outputs);
    }
}

/// `out[part]` `[outputs, channels kernel^2]` = the part's share of dL/d weight, `weight` = dL/d output; grid (patch
/// tiles, output tiles, parts) of `part` rows each.
///
/// # Safety
/// The launch contract: arrays of the extents stated in [`Conv`].
#[inline(always)]
pub unsafe fn backward_weight<T: Half>(a: &Conv) {
    let g = geometry(a);
    let patch = g.channels * g.kernel * g.kernel;
    let first = block_z() * a.part;
    let rows = a.rows.saturating_sub(first).min(a.part);
    let depth = rows * g.pixels;
    let image = (g.channels * g.height * g.width) as usize;
    let x = a.x.wrapping_add(first as usize * image);
    let d = a.weight.wrapping_add(first as usize * (a.outputs * g.pixels) as usize);
    let source = Gathered::<_, T>(Channels { x: d, pixels: g.pixels, channels: a.outputs }, PhantomData);
    let d = ByTile { source, count: a.outputs, depth };
    let x = ByTile { source: Gathered::<_, T>(Patches { x, g }, PhantomData), count: patch, depth };
    let (row, col) = (block_y() * TILE, block_x() * TILE);
    let out = a.out.wrapping_add(block_z() as usize * (a.outputs * patch) as usize);
    // SAFETY: the launch contract; every block has its own tile of its own part.
    unsafe {
        let acc = product::<T, _, _>(d, x, row, col, depth);
        let place = Place::of_lane();
        let mut f = 0;
        while f < 16 {
            let mut e = 0;
            while e < 4 {
                let (o, k) = (row + place.row_of(f, e), col + place.col_of(f, e));
                if o < a.outputs && k < patch {
                    store(out.wrapping_add(o as usize * patch as usize + k as usize), acc[f][e]);
                }
                e += 1;
            }
            f += 1;
        }
    }
}
