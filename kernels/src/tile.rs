//! The portable tile product: 128 x 128 of `A B`, k in slices of 32, on `mma.sync`.
//!
//! A block of 8 warps, four by two, each with 32 x 64 of the tile in its registers. Four slices of both operands are in
//! shared memory or on their way there. Operands are read as 16-byte chunks of halves by a [`Source`], from matrices
//! stored with k running fastest ([`Along::K`]) or with rows (columns) of the product running fastest ([`Along::Tile`]);
//! what lies outside of a matrix is zeros.

use crate::abi::{TILE, TILE_STAGES};
use crate::simt::*;

/// k of a slice.
const DEPTH: u32 = 32;
/// Bytes of a slice of one operand.
const SLICE: u32 = TILE * DEPTH * 2;

/// A tile's products in a lane's registers: `[2 x 8]` fragments of 16 x 8, see [`Half::mma`].
pub type Acc = [[f32; 4]; 16];

/// What the numbers of a stored matrix are, and how 8 of them come to shared memory as halves.
pub trait Source: Copy {
    /// Brings elements `at..at + 8` of row `row` to the 16 bytes at `to`; those from `valid` on are zeros.
    ///
    /// # Safety
    /// `valid` of them are readable, `to` is a chunk of a slice that nobody reads before the next `sync`.
    unsafe fn chunk(self, to: u32, row: u32, at: u32, valid: u32);
}

/// Halves, rows a multiple of 16 bytes apart.
#[derive(Clone, Copy)]
pub struct Halves {
    /// The matrix.
    pub at: *const u16,
    /// Elements from row to row, a multiple of 8.
    pub pitch: u32,
}

impl Source for Halves {
    #[inline(always)]
    unsafe fn chunk(self, to: u32, row: u32, at: u32, valid: u32) {
        let from = if valid == 0 { self.at } else { self.at.wrapping_add(row as usize * self.pitch as usize + at as usize) };
        // SAFETY: both are multiples of 16 bytes, and the caller promises the rest.
        unsafe { copy_async(to, from, 2 * valid) };
    }
}

/// f32, rounded to halves on the way; rows any number of elements apart.
#[derive(Clone, Copy)]
pub struct Singles<T> {
    /// The matrix.
    pub at: *const f32,
    /// Elements from row to row.
    pub pitch: u32,
    /// What they are rounded to.
    pub to: core::marker::PhantomData<T>,
}

impl<T: Half> Source for Singles<T> {
    #[inline(always)]
    unsafe fn chunk(self, to: u32, row: u32, at: u32, valid: u32) {
        let from = self.at.wrapping_add(row as usize * self.pitch as usize + at as usize);
        let mut x = [0f32; 8];
        // SAFETY: `valid` elements are readable; vectors only where their address is a multiple of 16 bytes.
        unsafe {
            if valid == 8 && (from as usize).is_multiple_of(16) {
                let (low, high) = (load(from.cast::<[f32; 4]>()), load(from.wrapping_add(4).cast::<[f32; 4]>()));
                let mut i = 0;
                while i < 4 {
                    (x[i], x[i + 4]) = (low[i], high[i]);
                    i += 1;
                }
            } else {
                let mut i = 0;
                while i < 8 {
                    if (i as u32) < valid {
                        x[i] = load(from.wrapping_add(i));
                    }
                    i += 1;
                }
            }
            store_shared(to, [T::pack(x[0], x[1]), T::pack(x[2], x[3]), T::pack(x[4], x[5]), T::pack(x[6], x[7])]);
        }
    }
}

/// What runs fastest in a stored operand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Along {
    /// The summed dimension.
    K,
    /// Rows of the product for A, columns for B.
    Tile,
}

/// An operand, stored as `[outer, inner]`.
pub trait Operand: Copy {
    /// What its inner dimension is.
    const ALONG: Along;
    /// Brings its slice from `first` (row or column of the product) and `k` on to shared memory.
    ///
    /// # Safety
    /// As [`Source::chunk`], for the whole slice at `to`.
    unsafe fn slice(self, to: u32, first: u32, k: u32);
}

/// Stored with k running fastest: `[count, depth]`.
#[derive(Clone, Copy)]
pub struct ByK<S> {
    /// Its numbers.
    pub source: S,
    /// Rows (columns) of the product that it has.
    pub count: u32,
    /// k that it has.
    pub depth: u32,
}

/// Stored with rows (columns) of the product running fastest: `[depth, count]`.
#[derive(Clone, Copy)]
pub struct ByTile<S> {
    /// Its numbers.
    pub source: S,
    /// Rows (columns) of the product that it has.
    pub count: u32,
    /// k that it has.
    pub depth: u32,
}

/// Of 8 from `at`, how many lie below `end`.
#[inline(always)]
fn valid(at: u32, end: u32) -> u32 {
    end.saturating_sub(at).min(8)
}

impl<S: Source> Operand for ByK<S> {
    const ALONG: Along = Along::K;
    #[inline(always)]
    unsafe fn slice(self, to: u32, first: u32, k: u32) {
        let mut c = thread();
        while c < TILE * DEPTH / 8 {
            let (row, chunk) = (c / 4, c % 4);
            let inside = if first + row < self.count { valid(k + chunk * 8, self.depth) } else { 0 };
            // SAFETY: only what is inside is read, each chunk is written by one thread.
            unsafe { self.source.chunk(to + place_by_k(row, chunk), first + row, k + chunk * 8, inside) };
            c += 256;
        }
    }
}

impl<S: Source> Operand for ByTile<S> {
    const ALONG: Along = Along::Tile;
    #[inline(always)]
    unsafe fn slice(self, to: u32, first: u32, k: u32) {
        let mut c = thread();
        while c < TILE * DEPTH / 8 {
            let (row, chunk) = (c / 16, c % 16);
            let inside = if k + row < self.depth { valid(first + chunk * 8, self.count) } else { 0 };
            // SAFETY: only what is inside is read, each chunk is written by one thread.
            unsafe { self.source.chunk(to + place_by_tile(row, chunk), k + row, first + chunk * 8, inside) };
            c += 256;
        }
    }
}

/// Rows of 64 bytes; chunks are exchanged so that the eight rows `ldmatrix` takes at a time lie in different banks.
#[inline(always)]
fn place_by_k(row: u32, chunk: u32) -> u32 {
    row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4)
}
/// Rows of 256 bytes, exchanged likewise.
#[inline(always)]
fn place_by_tile(row: u32, chunk: u32) -> u32 {
    row * 256 + ((chunk ^ (row & 7)) << 4)
}

/// Rows `row..row + 16` of A, k `16 q..16 q + 16` of the slice, as `mma` takes them.
#[inline(always)]
unsafe fn fragment_a<A: Operand>(slice: u32, row: u32, q: u32) -> [u32; 4] {
    let l = lane();
    // SAFETY: inside the slice, whose copies were waited for.
    unsafe {
        match A::ALONG {
            Along::K => ldmatrix(slice + place_by_k(row + (l & 15), q * 2 + (l >> 4))),
            Along::Tile => ldmatrix_t(slice + place_by_tile(q * 16 + ((l >> 4) << 3) + (l & 7), (row >> 3) + ((l >> 3) & 1))),
        }
    }
}

/// Columns `col..col + 16` of B, two fragments of 8 columns.
#[inline(always)]
unsafe fn fragments_b<B: Operand>(slice: u32, col: u32, q: u32) -> [[u32; 2]; 2] {
    let l = lane();
    // SAFETY: inside the slice, whose copies were waited for.
    let x = unsafe {
        match B::ALONG {
            Along::K => ldmatrix(slice + place_by_k(col + (l & 7) + ((l >> 4) << 3), q * 2 + ((l >> 3) & 1))),
            Along::Tile => ldmatrix_t(slice + place_by_tile(q * 16 + (((l >> 3) & 1) << 3) + (l & 7), (col >> 3) + (l >> 4))),
        }
    };
    [[x[0], x[1]], [x[2], x[3]]]
}

/// Where a lane's share of the tile lies.
#[derive(Clone, Copy)]
pub struct Place {
    /// The warp's first row in the tile.
    pub row: u32,
    /// The warp's first column in the tile.
    pub col: u32,
    /// Row of the lane in a fragment; the other is 8 below.
    pub lane_row: u32,
    /// First of the two columns of the lane in a fragment.
    pub lane_col: u32,
}

impl Place {
    /// This lane's.
    #[inline(always)]
    pub fn of_lane() -> Self {
        let (w, l) = (warp(), lane());
        Place { row: (w >> 1) * 32, col: (w & 1) * 64, lane_row: l >> 2, lane_col: 2 * (l & 3) }
    }
    /// Row in the tile of element `e` (0 to 3) of fragment `f`.
    #[inline(always)]
    pub fn row_of(self, f: usize, e: usize) -> u32 {
        self.row + (f as u32 >> 3) * 16 + self.lane_row + (e as u32 >> 1) * 8
    }
    /// Column in the tile of element `e` of fragment `f`.
    #[inline(always)]
    pub fn col_of(self, f: usize, e: usize) -> u32 {
        self.col + (f as u32 & 7) * 8 + self.lane_col + (e as u32 & 1)
    }
}

/// Where slice `s` of A is; that of B follows.
#[inline(always)]
fn stage(s: u32) -> u32 {
    shared_base() + (s % TILE_STAGES) * 2 * SLICE
}

/// Sets off slice `s` of both operands, if there is one; a group of copies in any case.
#[inline(always)]
unsafe fn fill<A: Operand, B: Operand>(a: A, b: B, row: u32, col: u32, s: u32, depth: u32) {
    if s * DEPTH < depth {
        // SAFETY: the caller's promise: nobody reads the stage.
        unsafe {
            a.slice(stage(s), row, s * DEPTH);
            b.slice(stage(s) + SLICE, col, s * DEPTH);
        }
    }
    copy_commit();
}

/// The tile at (`row`, `col`) of the product of `a` and `b`, summed over `k` of `0..depth`.
///
/// # Safety
/// All 256 threads of the block call it; the first [`crate::abi::TILE_SHARED`] bytes of shared memory are the product's.
#[inline(always)]
pub unsafe fn product<T: Half, A: Operand, B: Operand>(a: A, b: B, row: u32, col: u32, depth: u32) -> Acc {
    let place = Place::of_lane();
    let mut acc: Acc = [[0.0; 4]; 16];
    // The last reader of the previous product's slices may be behind.
    sync();
    let mut s = 0;
    while s < TILE_STAGES - 1 {
        // SAFETY: all stages are free.
        unsafe { fill(a, b, row, col, s, depth) };
        s += 1;
    }
    // Slices behind the last are empty groups: when it ends, nothing is on its way.
    let mut s = 0;
    while s * DEPTH < depth {
        copy_wait::<{ TILE_STAGES - 2 }>();
        sync();
        // SAFETY: the stage's last reading is behind the `sync`.
        unsafe { fill(a, b, row, col, s + TILE_STAGES - 1, depth) };
        let (at_a, at_b) = (stage(s), stage(s) + SLICE);
        let mut q = 0;
        while q < DEPTH / 16 {
            // SAFETY: this stage's copies were waited for, by all threads.
            unsafe {
                let fa = [fragment_a::<A>(at_a, place.row, q), fragment_a::<A>(at_a, place.row + 16, q)];
                let mut j = 0;
                while j < 4 {
                    let fb = fragments_b::<B>(at_b, place.col + j as u32 * 16, q);
                    let mut i = 0;
                    while i < 2 {
                        T::mma(&mut acc[i * 8 + 2 * j], fa[i], fb[0]);
                        T::mma(&mut acc[i * 8 + 2 * j + 1], fa[i], fb[1]);
                        i += 1;
                    }
                    j += 1;
                }
            }
            q += 1;
        }
        s += 1;
    }
    acc
}
