//! What host and card agree on: a kernel's name, its launch bounds and its one argument.
//!
//! Every kernel takes one `repr(C)` struct by value, built by the host and read by the card, so that neither the order
//! nor the number of arguments can drift. Device addresses are raw pointers in it: the host never follows them.

use core::marker::PhantomData;

/// The argument of one kernel.
///
/// # Safety
/// The type is `repr(C)` and made of scalars, device pointers and [`TensorMap`]s only: its bytes are copied to the card.
pub unsafe trait Args: Copy + 'static {}

/// Which PTX module holds a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Module {
    /// `mma.sync`, `ldmatrix`, `cp.async`: every card of compute capability 8.0 or later.
    Portable,
    /// `wgmma`, TMA, `mbarrier`: compute capability 9.0 and no other.
    Hopper,
}

/// A kernel as the host sees it.
#[derive(Debug)]
pub struct Kernel<A> {
    /// Its entry in the PTX.
    pub name: &'static str,
    /// Where it is.
    pub module: Module,
    /// Threads of a block; the PTX promises as much to the assembler.
    pub threads: u32,
    /// Blocks that share a multiprocessor.
    pub blocks: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
    /// The same source, for the host twin: called by every lane.
    #[cfg(feature = "shim")]
    pub body: unsafe fn(&A),
    /// Its argument.
    pub args: PhantomData<fn(A)>,
}

/// A tensor as the TMA unit sees it: opaque, made by the driver (or by the host twin).
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(pub [u64; 16]);

/// Rows and columns of a portable tile.
pub const TILE: u32 = 128;
/// Slices of a portable tile's operands in shared memory.
pub const TILE_STAGES: u32 = 4;
/// Shared memory of a portable tile product.
pub const TILE_SHARED: u32 = TILE_STAGES * 2 * TILE * 32 * 2;

/// A batch of logits as a tile sees it: `x_ij = scale <u_i, v_j> + shift_u[i] + shift_v[j]`, in octaves.
///
/// Swapping the roles of u and v is swapping the fields: columns are the rows of the swapped logits.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Logits {
    /// Row embeddings, halves `[n, pitch]`; the first `depth` of each count.
    pub u: *const u16,
    /// Column embeddings, halves `[m, pitch]`.
    pub v: *const u16,
    /// Added to every logit of a row, `[n]`, or null.
    pub shift_u: *const f32,
    /// Added to every logit of a column, `[m]`, or null.
    pub shift_v: *const f32,
    /// (i, j) is a positive when the ids are equal, `[n]`.
    pub id_u: *const u32,
    /// `[m]`.
    pub id_v: *const u32,
    /// (i, j) leaves the loss when these are equal and the ids are not, `[n]`, or null.
    pub ignore_u: *const u32,
    /// `[m]`, or null.
    pub ignore_v: *const u32,
    /// Rows.
    pub n: u32,
    /// Columns.
    pub m: u32,
    /// Embedding dimension.
    pub depth: u32,
    /// Halves from row to row, a multiple of 8.
    pub pitch: u32,
    /// Octaves of a unit of the product.
    pub scale: f32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}

/// A logit that stands for no pair: its exponential is 0 whatever is subtracted, and it is finite.
pub const HOLE: f32 = -1e30;

/// Row tallies, see [`crate::contrast`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    /// What is tallied.
    pub logits: Logits,
    /// `[2 splits, n]`: largest logit of the part, sum of `2^(x - max)` over negatives, over positives, and the sum of
    /// positives' logits.
    pub slots: *mut [f32; 4],
    /// `[2 splits, n]`: sum of all logits that count, and how many are ignored; or null.
    pub all: *mut [f32; 2],
    /// Column tiles of a block; the grid is (splits, row tiles).
    pub tiles: u32,
    /// To a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Tally {}

/// What a softmax of one side needs of a row to tell G: see [`crate::contrast`].
pub type Norm = [f32; 4];

/// G of a chunk of the logits.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Pull {
    /// All logits.
    pub logits: Logits,
    /// Row softmax `[n]`: max, weight, smoothing, weight at positives; or null.
    pub norm_u: *const Norm,
    /// Added at positives, `[n]`.
    pub target_u: *const f32,
    /// Column softmax `[m]`, or null.
    pub norm_v: *const Norm,
    /// `[m]`.
    pub target_v: *const f32,
    /// The chunk, halves `[rows, pitch]`: `gain G`.
    pub g: *mut u16,
    /// `[2 column tiles of the chunk, rows]`: sums over the part's columns of value, G, G x; or null.
    pub row_sums: *mut [f32; 4],
    /// `[4 row tiles of the chunk, cols]`: sums of G over the part's rows; or null.
    pub col_sums: *mut f32,
    /// First row of the chunk, a multiple of [`TILE`].
    pub row: u32,
    /// First column of the chunk, a multiple of [`TILE`].
    pub col: u32,
    /// Rows of the chunk, at most.
    pub rows: u32,
    /// Columns of the chunk, at most.
    pub cols: u32,
    /// Halves from row to row of the chunk.
    pub pitch: u32,
    /// G is stored times this, so that it fits a half.
    pub gain: f32,
    /// Of the sigmoid law: added to every logit, in octaves.
    pub bias: f32,
    /// Of the sigmoid law: label smoothing.
    pub smoothing: f32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Pull {}
