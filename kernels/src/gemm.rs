//! Matrix products on the portable tile: those of the loss' gradients, from halves, and those of encoders, from f32.
//!
//! Grid (column tiles, row tiles, parts): every part sums its own range of k into its own copy of C, so that a product
//! with a long k and few tiles fills the card; [`crate::rows::fold`] adds the copies in order.

use crate::abi::{Dense, Gemm, TILE};
use crate::layers::activation;
use crate::simt::*;
use crate::tile::{Acc, Along, ByK, ByTile, Halves, Operand, Place, Singles, product};
use core::marker::PhantomData;

/// Hands over the elements of the tile at (`row`, `col`) that C has: where, in which column, their sum.
#[inline(always)]
fn each(g: &Gemm, acc: &Acc, row: u32, col: u32, take: impl Fn(usize, u32, f32)) {
    let place = Place::of_lane();
    let mut f = 0;
    while f < 16 {
        let mut e = 0;
        while e < 4 {
            let (i, j) = (row + place.row_of(f, e), col + place.col_of(f, e));
            if i < g.m && j < g.n {
                take(i as usize * g.pitch_c as usize + j as usize, j, acc[f][e]);
            }
            e += 1;
        }
        f += 1;
    }
}

/// C from the product of `a` and `b` over this block's part of k.
#[inline(always)]
unsafe fn gemm<T: Half, A: Operand, B: Operand>(g: &Gemm, a: A, b: B, depth: u32) {
    let (row, col) = (block_y() * TILE, block_x() * TILE);
    let out = g.c.wrapping_add(block_z() as usize * g.part as usize);
    // SAFETY: the caller's promise.
    let acc = unsafe { product::<T, _, _>(a, b, row, col, depth) };
    each(g, &acc, row, col, |at, _, sum| {
        // SAFETY: the launch contract; every block has its own tile of its own copy.
        unsafe {
            let old = if g.add != 0 { load(out.wrapping_add(at)) } else { 0.0 };
            store(out.wrapping_add(at), old + sum);
        }
    });
}

/// A dense layer of f32, `[m, k]` and `[n, k]`: bias and activation on the tile while it is in registers.
///
/// # Safety
/// The launch contract: operands and results have the extents stated in [`Dense`].
#[inline(always)]
pub unsafe fn dense<T: Half, const GELU: bool>(a: &Dense) {
    let g = &a.gemm;
    let (row, col) = (block_y() * TILE, block_x() * TILE);
    let singles = |at: *const (), pitch: u32| Singles { at: at.cast::<f32>(), pitch, to: PhantomData::<T> };
    let left = ByK { source: singles(g.a, g.pitch_a), count: g.m, depth: g.k };
    let right = ByK { source: singles(g.b, g.pitch_b), count: g.n, depth: g.k };
    // SAFETY: the caller's promise.
    let acc = unsafe { product::<T, _, _>(left, right, row, col, g.k) };
    each(g, &acc, row, col, |at, j, sum| {
        // SAFETY: the launch contract; every block has its own tile.
        unsafe {
            let x = sum + load(a.bias.wrapping_add(j as usize));
            if !a.pre.is_null() {
                store(a.pre.wrapping_add(at), x);
            }
            store(g.c.wrapping_add(at), activation(if GELU { 2 } else { a.activation & 1 }, x));
        }
    });
}

/// An operand's first element of this block's part of k, and how many k there are.
#[inline(always)]
fn part<E>(g: &Gemm, at: *const E, pitch: u32, along: Along) -> (*const E, u32) {
    let first = block_z() * g.depth;
    let step = match along {
        Along::K => first as usize,
        Along::Tile => first as usize * pitch as usize,
    };
    (at.wrapping_add(step), g.k.saturating_sub(first).min(g.depth))
}

macro_rules! kernel {
    ($($(#[$doc:meta])* $name:ident: $source:ident $element:ty, $a:ident $along_a:ident, $b:ident $along_b:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// The launch contract: operands and C have the extents stated in [`Gemm`].
        #[inline(always)]
        pub unsafe fn $name<T: Half>(g: &Gemm) {
            let (a, depth) = part(g, g.a.cast::<$element>(), g.pitch_a, Along::$along_a);
            let (b, _) = part(g, g.b.cast::<$element>(), g.pitch_b, Along::$along_b);
            let a = $a { source: source!($source T, a, g.pitch_a), count: g.m, depth };
            let b = $b { source: source!($source T, b, g.pitch_b), count: g.n, depth };
            // SAFETY: the caller's promise.
            unsafe { gemm::<T, _, _>(g, a, b, depth) }
        }
    )*};
}
macro_rules! source {
    (Halves $t:ident, $at:expr, $pitch:expr) => {
        Halves { at: $at, pitch: $pitch }
    };
    (Singles $t:ident, $at:expr, $pitch:expr) => {
        Singles { at: $at, pitch: $pitch, to: PhantomData::<$t> }
    };
}

kernel! {
    /// `C = A B` of halves: G `[m, k]` by rows of embeddings `[k, n]`.
    halves_nn: Halves u16, ByK K, ByTile Tile;
    /// `C = A' B` of halves: G `[k, m]` by rows of embeddings `[k, n]`.
    halves_tn: Halves u16, ByTile Tile, ByTile Tile;
    /// `C = A B` of f32, `[m, k]` and `[k, n]`.
    singles_nn: Singles f32, ByK K, ByTile Tile;
    /// `C = A B'` of f32, `[m, k]` and `[n, k]`.
    singles_nt: Singles f32, ByK K, ByK K;
    /// `C = A' B` of f32, `[k, m]` and `[k, n]`.
    singles_tn: Singles f32, ByTile Tile, ByTile Tile;
    /// `C = A' B'` of f32, `[k, m]` and `[n, k]`.
    singles_tt: Singles f32, ByTile Tile, ByK K;
}
