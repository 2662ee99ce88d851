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

/// The arguments of up to N pieces of work in one launch: block z does the z-th. The grid is as large as the largest wants;
/// blocks that another does not want return.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Each<A, const N: usize>(pub [A; N]);
// SAFETY: as its arguments.
unsafe impl<A: Args, const N: usize> Args for Each<A, N> {}

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
    /// The same source, for the host twin: called by every lane, with the argument's address as TMA would have it.
    #[cfg(feature = "shim")]
    pub body: unsafe fn(&A, u64),
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

/// Bytes of shared memory for each of a tally's columns.
pub const COLUMN_TALLY: u32 = 12;
/// Bytes of shared memory for each of a pull's columns.
pub const COLUMN_PULL: u32 = 32;
/// Shared memory of a portable tally.
pub const TALLY_SHARED: u32 = TILE_SHARED + 2 * TILE * COLUMN_TALLY;
/// Shared memory of a portable pull.
pub const PULL_SHARED: u32 = TILE_SHARED + TILE * COLUMN_PULL;

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
    /// See [`Temper::live`]; or null: a factor of 1, and nothing added.
    pub live: *const f32,
    /// The least and the largest id of each [`SPAN`] rows, `[ceil(n / SPAN)]`: where those of rows and of columns lie apart,
    /// pairs are *plain*, neither positive nor ignored nor outside of the matrix. Null: nothing is known to be plain.
    pub span_u: *const [u32; 2],
    /// `[ceil(m / SPAN)]`.
    pub span_v: *const [u32; 2],
    /// `[blocks]` of [`HopperTallyBoth`], which has tallied the plain pairs; or null, then nobody has.
    pub flags: *const u32,
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
    /// Number of flags.
    pub blocks: u32,
}

/// Rows (columns) that a span is of.
pub const SPAN: u32 = 256;
/// The span of rows that have no plain pairs.
pub const NO_SPAN: [u32; 2] = [0, u32::MAX];

/// A logit that stands for no pair: its exponential is 0 whatever is subtracted, and it is finite.
pub const HOLE: f32 = -1e30;

/// Row tallies, see `contrast.rs`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    /// What is tallied.
    pub logits: Logits,
    /// `[2 splits, n]`: largest logit of the part, sum of `2^(x - max)` over negatives, over positives, and the sum of
    /// positives' logits.
    pub slots: *mut [f32; 4],
    /// `[2 splits, n]`: sum of all logits that count, and how many are ignored; of the kernels that make it.
    pub all: *mut [f32; 2],
    /// Column tiles of a block; the grid is (splits, row tiles, sides).
    pub tiles: u32,
    /// To a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Tally {}

/// What a softmax of one side needs of a row to tell G: see `contrast.rs`.
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
    /// See [`Normalise::far`], of the rows' softmax and of the columns'; or null, where there is none. Asked where `logits` has
    /// flags.
    pub far_u: *const u32,
    /// `[ceil(m / 256)]`.
    pub far_v: *const u32,
    /// Of the factored law, which has the softmax of one side and no targets: G is multiplied by it, halves `[rows, pitch]`.
    pub factor: *const u16,
    /// The chunk, halves `[rows, pitch]`: `gain G`.
    pub g: *mut u16,
    /// `[2 column tiles of the chunk, rows]`: sums over the part's columns of value, G, G x and nothing; of the factored law,
    /// whose x counts from the softmax's maximum, of P x, G, G x and P. Or null.
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

/// A matrix product `C (+)= op(A) op(B)`; element types and storage are the kernel's, see `gemm.rs`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// A.
    pub a: *const (),
    /// B.
    pub b: *const (),
    /// C, f32 `[m, pitch_c]`, one copy a part.
    pub c: *mut f32,
    /// Rows of C.
    pub m: u32,
    /// Columns of C.
    pub n: u32,
    /// Summed dimension.
    pub k: u32,
    /// k of a part, a multiple of 8.
    pub depth: u32,
    /// Elements from row to row of A as stored; of halves a multiple of 8.
    pub pitch_a: u32,
    /// Of B.
    pub pitch_b: u32,
    /// Of C.
    pub pitch_c: u32,
    /// Not 0: added to what C holds.
    pub add: u32,
    /// Elements from one part's copy of C to the next.
    pub part: u64,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Gemm {}

/// A dense layer: `pre = A B' + bias` and `C = activation(pre)`; [`Gemm`] of one part that adds nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Dense {
    /// The product, and where the result goes.
    pub gemm: Gemm,
    /// `[n]`.
    pub bias: *const f32,
    /// As C, or null.
    pub pre: *mut f32,
    /// Of the kernel that is not GELU's: 0 none, 1 ReLU.
    pub activation: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Dense {}

/// Embeddings on their way to the tile: `out = round(scale (x - shift) / |x|)`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Prepare {
    /// `[rows, dim]`, f32 or halves as the kernel says.
    pub x: *const (),
    /// Subtracted from every row, `[dim]`, or null.
    pub shift: *const f32,
    /// In nats, added to the logits of the row, `[rows]`, or null.
    pub offset: *const f32,
    /// Halves `[rows, pitch]`; behind `dim` one number more, then zeros.
    pub out: *mut u16,
    /// `[rows]`: 1/|x|, 0 for a row of norm below the normal numbers; null leaves rows as long as they are.
    pub inverse: *mut f32,
    /// `[rows]`: `norm_scale |out|^2 + log2(e) offset`, what a tilting adds to the row's logits; or null.
    pub half_norm: *mut f32,
    /// See [`Temper::live`]: its factor is `norm_scale`'s; or null: 1.
    pub live: *const f32,
    /// Rows.
    pub rows: u32,
    /// Embedding dimension.
    pub dim: u32,
    /// Halves from row to row of `out`.
    pub pitch: u32,
    /// Octaves of a unit of `|out|^2`.
    pub norm_scale: f32,
    /// Factor on rows that are left as long as they are.
    pub scale: f32,
    /// That number: 0, or a 1, which makes of a product a column with the sums of the other factor's rows.
    pub behind: f32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Prepare {}

/// What MMD pulls a row by: its residual, the mean feature under its softmax less that of its positives.
///
/// Features count in units of which one is `1/unit`, and from `shift`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Residual {
    /// Sums of features, each `weight (P - T) / scale` times as halves have it, f32 `[rows, dim + 1]`; behind them the sum of
    /// what they were multiplied by.
    pub acc: *const f32,
    /// Mean features of each row's positives, as they came, f32 `[rows, dim]`; not read where `share` is 0.
    pub target: *const f32,
    /// The same of features as products take them: rounded, in their units, from `shift`. Null where each row has one
    /// positive: then `target` is rounded here. Not read where `share` is 0.
    pub rounded: *const f32,
    /// `[dim]`.
    pub shift: *const f32,
    /// Each row's share of the loss, `[rows]`.
    pub share: *const f32,
    /// `[rows]`, see [`Pull::norm_u`]. In: weights `lambda share` over the sum. Out: weights of a softmax that is
    /// multiplied by `<out_i, unit (f - shift)> + offset_i`.
    pub norm: *mut Norm,
    /// Unit residuals, halves `[rows, pitch]`, zeros behind `dim`.
    pub out: *mut u16,
    /// `[rows]`.
    pub offset: *mut f32,
    /// `[ceil(rows / 8)]`: `lambda share (|residual|^2 - |target|^2) / 2`.
    pub loss: *mut f64,
    /// Rows.
    pub rows: u32,
    /// Features.
    pub dim: u32,
    /// Halves from row to row of `out`.
    pub pitch: u32,
    /// See `acc`.
    pub scale: f32,
    /// A power of two.
    pub unit: f32,
    /// Weight of this side in the loss.
    pub lambda: f32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Residual {}

/// `out = share_i x`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Weigh {
    /// `[rows, dim]`; not read where `share` is 0.
    pub x: *const f32,
    /// `[rows]`.
    pub share: *const f32,
    /// `[rows, dim]`.
    pub out: *mut f32,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub dim: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Weigh {}

/// Gradients on their way out: `out (+)= scale inverse (acc - pull x)`, `pull` = `<x, acc>` for unit rows,
/// `gain g_sum` for squared distances, else 0.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Finish {
    /// `gain G other` in parts, `[parts, rows, dim]`.
    pub acc: *const f32,
    /// What the tile saw, halves `[rows, pitch]`.
    pub x: *const u16,
    /// As [`Prepare::inverse`], or null.
    pub inverse: *const f32,
    /// Row sums of G, `[rows, g_stride]`, the first of each; or null.
    pub g_sums: *const f32,
    /// `[rows, dim]`, or null.
    pub out: *mut f32,
    /// `sum_i <x_i, acc_i>` over each block's rows, `[ceil(rows / 8)]`, or null.
    pub along: *mut f64,
    /// See [`Temper::live`]: its factor is `scale`'s; or null: 1.
    pub live: *const f32,
    /// Rows.
    pub rows: u32,
    /// Embedding dimension.
    pub dim: u32,
    /// Halves from row to row of `x`.
    pub pitch: u32,
    /// dS/d product, over the gain.
    pub scale: f32,
    /// See [`Pull::gain`].
    pub gain: f32,
    /// Elements from row to row of `g_sums`.
    pub g_stride: u32,
    /// Not 0: added to what `out` holds.
    pub add: u32,
    /// Parts of `acc`.
    pub parts: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Finish {}

/// Slots of a tally into one a row.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Merge {
    /// See [`Tally::slots`], `[slots, n]`.
    pub tallies: *const [f32; 4],
    /// See [`Tally::all`], `[slots, n]`, or null.
    pub all: *const [f32; 2],
    /// `[n]`.
    pub row: *mut [f32; 4],
    /// `[n]`, used with `all`.
    pub row_all: *mut [f32; 2],
    /// `[ceil(n / 256)]`: (max, sum) of all the block's logits.
    pub block: *mut [f32; 2],
    /// See [`HopperTallyBoth::row_sums`] and `col_sums`, `[sum_slots, n]`; or null.
    pub sums: *const f32,
    /// See [`Logits::flags`].
    pub flags: *const u32,
    /// See [`Logits::live`].
    pub live: *const f32,
    /// See [`Logits::scale`].
    pub scale: f32,
    /// Of `sums`.
    pub sum_slots: u32,
    /// Number of flags.
    pub blocks: u32,
    /// Rows.
    pub n: u32,
    /// Slots of a row.
    pub slots: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Merge {}

/// (max, sum) of all logits.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Total {
    /// See [`Merge::block`].
    pub block: *const [f32; 2],
    /// One.
    pub out: *mut [f32; 2],
    /// Of `block`.
    pub blocks: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Total {}

/// Tallies into norms, targets and the loss.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Normalise {
    /// See [`Merge::row`].
    pub row: *const [f32; 4],
    /// See [`Merge::row_all`], or null.
    pub row_all: *const [f32; 2],
    /// Positives of each row, `[n]`.
    pub positives: *const u32,
    /// Each row's share of the loss, `[n]`.
    pub share: *const f32,
    /// (max, sum) of all logits for the joint loss, else null.
    pub joint: *const [f32; 2],
    /// `[n]`, see [`Pull::norm_u`].
    pub norm: *mut Norm,
    /// `[n]`, see [`Pull::target_u`].
    pub target: *mut f32,
    /// `[ceil(n / 256)]`: whether a row's maximum is so far below the anchor of `scale` that its weight, taken from there, is
    /// beyond f32: see `contrast.rs`. Or null.
    pub far: *mut u32,
    /// See [`Logits::live`].
    pub live: *const f32,
    /// `[ceil(n / 256)]`: `sum_i share_i (r_i - <T_i, S_i>)` in nats; for the joint loss `sum_i share_i <T_i, S_i>` less
    /// the max of all logits.
    pub loss: *mut f64,
    /// Rows.
    pub n: u32,
    /// Length of the other side.
    pub opposite: f32,
    /// Weight of this side in the loss.
    pub lambda: f32,
    /// Label smoothing.
    pub smoothing: f32,
    /// See [`Logits::scale`].
    pub scale: f32,
    /// To a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Normalise {}

/// [`Merge`] and [`Normalise`] of a side whose softmaxes are of rows: tallies stay in registers, so that neither's `row` and
/// `row_all` and no `block` are there.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Soften {
    /// Slots into tallies.
    pub merge: Merge,
    /// Tallies into norms, targets and the loss.
    pub normalise: Normalise,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Soften {}

/// `out[i] (+)= sum_p parts[p, i]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Fold {
    /// `[slots, stride]`.
    pub parts: *const f32,
    /// `[len]`.
    pub out: *mut f32,
    /// Elements from slot to slot.
    pub stride: u64,
    /// Elements.
    pub len: u32,
    /// Slots.
    pub slots: u32,
    /// Not 0: added to what `out` holds.
    pub add: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Fold {}

/// Column sums of `[n, columns]`, at most 4 columns, in f64.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Totals {
    /// Used if `doubles` is null.
    pub singles: *const f32,
    /// Or null.
    pub doubles: *const f64,
    /// `[blocks, columns]`.
    pub out: *mut f64,
    /// Rows.
    pub n: u32,
    /// Columns, 1 to 4.
    pub columns: u32,
    /// Blocks that share the rows.
    pub blocks: u32,
    /// To a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Totals {}

/// Sums of one launch of [`Totals`]: losses by rows and by columns, and two over all pairs.
pub const MOST_SUMS: usize = 4;

/// `out[p, k] = scale sum of x[i, k] over rows i of part p`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SumColumns {
    /// `[rows, dim]`, f32 or halves as the kernel says.
    pub x: *const (),
    /// `[parts, dim]`.
    pub out: *mut f32,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub dim: u32,
    /// Rows of a part.
    pub part: u32,
    /// Factor on the sums.
    pub scale: f32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for SumColumns {}

/// Rows of a Hopper tile.
pub const HOPPER_ROWS: u32 = 128;
/// Columns of a Hopper tile.
pub const HOPPER_COLS: u32 = 256;
/// Stages of a ring of slices that the warpgroups share.
pub const HOPPER_STAGES_GEMM: u32 = 4;
/// Stages of a ring of slices of half a tile, each of one warpgroup.
pub const HOPPER_STAGES_BOTH: u32 = 6;
/// Stages where a tile of G has to find room beside them: shared ones,
pub const HOPPER_STAGES_PULL: u32 = 3;
/// and ones of each warpgroup.
pub const HOPPER_STAGES_TURNS: u32 = 4;
const HOPPER_STAGE: u32 = (HOPPER_ROWS + HOPPER_COLS) * 64 * 2;
const HOPPER_STAGE_HALF: u32 = (HOPPER_ROWS + HOPPER_COLS / 2) * 64 * 2;
/// Bytes of a ring's barriers.
pub const HOPPER_BARS: u32 = 128;
/// Shared memory of a Hopper product.
pub const HOPPER_SHARED_GEMM: u32 = HOPPER_STAGES_GEMM * HOPPER_STAGE + HOPPER_BARS;
/// Shared memory of a Hopper tally.
pub const HOPPER_SHARED_TALLY: u32 = HOPPER_SHARED_GEMM + 2 * HOPPER_COLS * COLUMN_TALLY;
/// Shared memory of a Hopper tally of both sides: sums of columns of four warps each, in turns, and a word a warp.
pub const HOPPER_SHARED_BOTH: u32 =
    HOPPER_STAGES_BOTH * HOPPER_STAGE_HALF + HOPPER_BARS + 2 * 4 * HOPPER_COLS * 4 + 8 * 4;
/// Shared memory of a tile of G, and what is known of its columns, in turns.
const HOPPER_G: u32 = HOPPER_ROWS * HOPPER_COLS * 2 + HOPPER_BARS + 2 * HOPPER_COLS * COLUMN_PULL;
/// Shared memory of a Hopper pull.
pub const HOPPER_SHARED_PULL: u32 = HOPPER_STAGES_PULL * HOPPER_STAGE + HOPPER_G;
/// Shared memory of the one without sums.
pub const HOPPER_SHARED_TURNS: u32 = HOPPER_STAGES_TURNS * HOPPER_STAGE_HALF + HOPPER_G;

/// [`Tally`] of up to two sides, as in [`Each`], with their maps, 128-byte swizzle: u in boxes of 64 k x 128 rows, v of 64 k x
/// 256 rows.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperTally {
    /// u, v of each.
    pub maps: [[TensorMap; 2]; 2],
    /// The rest; `tiles` counts tiles of [`HOPPER_COLS`], slots are `[splits, n]`.
    pub tallies: [Tally; 2],
}
// SAFETY: scalars, device pointers and maps.
unsafe impl Args for HopperTally {}

/// Row and column sums of the exponentials `2^(x - anchor)` of plain pairs, for logits without shifts none of which is much
/// beyond `scale`: unit rows. One exponential serves both sides. The anchor lies [`ANCHOR`] octaves below the largest logit
/// there may be. A sum so small that what exponentials lost below 2^-126 could matter, or one beyond f32, raises a flag:
/// then none of the sums is used, and tallies are of all pairs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperTallyBoth {
    /// u, v, both in boxes of 64 k x 128 rows.
    pub maps: [TensorMap; 2],
    /// What is tallied; `flags` is not read.
    pub logits: Logits,
    /// `[2 splits, n]`.
    pub row_sums: *mut f32,
    /// `[groups, m]`, or null.
    pub col_sums: *mut f32,
    /// `[groups, splits]`.
    pub flags: *mut u32,
    /// Row tiles of a group; the grid is (splits, groups).
    pub down: u32,
    /// Column tiles of a split.
    pub across: u32,
}
// SAFETY: scalars, device pointers and maps.
unsafe impl Args for HopperTallyBoth {}

/// Octaves from the anchor to the largest logit: exponentials may be up to 2^ANCHOR, a sum of 2^30 of them is still finite.
pub const ANCHOR: f32 = 96.0;

/// [`Pull`] with its maps: as [`HopperTally`], of the softmax losses without sums as [`HopperTallyBoth`]; and the chunk of G in
/// boxes of 64 x 64.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperPull {
    /// u, v, g.
    pub maps: [TensorMap; 3],
    /// The rest; row sums have a slot each column tile of [`HOPPER_COLS`], column sums 8 each row tile.
    pub pull: Pull,
}
// SAFETY: scalars, device pointers and maps.
unsafe impl Args for HopperPull {}

/// `C (+)= A B` and `C (+)= A' B`, with their maps: A in boxes of 64 k x 128 rows, or 64 x 64 where it is stored
/// transposed; B of 64 x 64.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperGemm {
    /// A, B of the one and of the other.
    pub maps: [TensorMap; 4],
    /// C and sizes; `depth` a multiple of 64 but for a single part. One without rows is none.
    pub gemms: [Gemm; 2],
}
// SAFETY: scalars, device pointers and maps.
unsafe impl Args for HopperGemm {}

/// Bias and activation over `[rows, channels, pixels]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Activate {
    /// In place: gets the bias, or becomes the activation if `out` is null.
    pub pre: *mut f32,
    /// `[channels]`, or null.
    pub bias: *const f32,
    /// As `pre`, or null.
    pub out: *mut f32,
    /// `rows channels pixels`.
    pub len: u32,
    /// Channels.
    pub channels: u32,
    /// Pixels of a channel.
    pub pixels: u32,
    /// 0 none, 1 ReLU, 2 GELU.
    pub activation: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Activate {}

/// `d *= activation'(saved)`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ActivateBackward {
    /// `[len]`.
    pub saved: *const f32,
    /// `[len]`, in place.
    pub d: *mut f32,
    /// Elements.
    pub len: u32,
    /// 0 none, 1 ReLU, 2 GELU.
    pub activation: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for ActivateBackward {}

/// `d *= activation'(saved)` over `[rows, channels]`, and `out[p, c]` = sum of it over the rows of part p.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MaskColumns {
    /// `[rows, channels]`.
    pub saved: *const f32,
    /// `[rows, channels]`, in place.
    pub d: *mut f32,
    /// `[parts, channels]`.
    pub out: *mut f32,
    /// Rows.
    pub rows: u32,
    /// Channels.
    pub channels: u32,
    /// Rows of a part.
    pub part: u32,
    /// 1 ReLU, 2 GELU.
    pub activation: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for MaskColumns {}

/// Sums over rows and pixels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SumChannels {
    /// `[rows, channels, pixels]`.
    pub x: *const f32,
    /// `[parts, channels]`.
    pub out: *mut f32,
    /// Rows.
    pub rows: u32,
    /// Channels.
    pub channels: u32,
    /// Pixels of a channel.
    pub pixels: u32,
    /// Rows of a part.
    pub part: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for SumChannels {}

/// Pooling by windows that do not overlap.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    /// `[images, height, width]`.
    pub x: *const f32,
    /// `[images, height / size, width / size]`: the result, or its gradient.
    pub y: *mut f32,
    /// Backward: as `x`.
    pub dx: *mut f32,
    /// Rows times channels.
    pub images: u32,
    /// Of an image.
    pub height: u32,
    /// Of an image.
    pub width: u32,
    /// Side of a window.
    pub size: u32,
    /// Not 0: the maximum; else the mean.
    pub max: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Pool {}

/// `out = gain (x - mean) rstd + bias`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    /// `[rows, width]`, rows `stride` apart.
    pub x: *const f32,
    /// `[2, width]`: gain, bias.
    pub affine: *const f32,
    /// `[rows, width]`.
    pub out: *mut f32,
    /// `[rows, 2]`: mean, 1/deviation.
    pub stats: *mut f32,
    /// Rows.
    pub rows: u32,
    /// Numbers of a row.
    pub width: u32,
    /// Numbers from row to row of x.
    pub stride: u32,
    /// Added to the variance.
    pub eps: f32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for LayerNorm {}

/// Gradients of [`LayerNorm`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LayerNormBackward {
    /// As forward.
    pub x: *const f32,
    /// As forward.
    pub affine: *const f32,
    /// As forward.
    pub stats: *const f32,
    /// `[rows, width]`.
    pub d_out: *const f32,
    /// As x.
    pub dx: *mut f32,
    /// `[parts, 2, width]`.
    pub d_affine: *mut f32,
    /// Rows.
    pub rows: u32,
    /// Numbers of a row.
    pub width: u32,
    /// Numbers from row to row of x.
    pub stride: u32,
    /// Rows of a part.
    pub part: u32,
    /// Not 0: dx is added to.
    pub add: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for LayerNormBackward {}

/// Numbers of a head that the attention kernels take at most.
pub const HEAD_MOST: u32 = 128;

/// Softmax attention within sequences, `softmax(scale q k') v`; head of at most [`HEAD_MOST`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Attend {
    /// `[rows, time, 3, heads, head]`.
    pub qkv: *const f32,
    /// `[rows, time, heads, head]`.
    pub out: *mut f32,
    /// `[rows, heads, time]`: log-sum-exp of a query's logits, nats.
    pub lse: *mut f32,
    /// Backward: as `out`.
    pub d_out: *const f32,
    /// Backward: as `qkv`.
    pub d_qkv: *mut f32,
    /// Backward: as `lse`.
    pub delta: *mut f32,
    /// Tokens of a sequence.
    pub time: u32,
    /// Heads.
    pub heads: u32,
    /// Numbers of a token in a head.
    pub head: u32,
    /// Not 0: a token sees none after it.
    pub causal: u32,
    /// `1/sqrt(head)`.
    pub scale: f32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Attend {}

/// AdamW: `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2` with `g = factor grads`, then
/// `params = (1 - lr decay) params - lr (m / bias1) / (sqrt(v / bias2) + eps)`. Nothing where the factor is not finite.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    /// `[len]`.
    pub grads: *const f32,
    /// `[len]`.
    pub params: *mut f32,
    /// `[len]`.
    pub m: *mut f32,
    /// `[len]`.
    pub v: *mut f32,
    /// lr, bias1, bias2.
    pub now: *const f32,
    /// One.
    pub factor: *const f32,
    /// Elements.
    pub len: u32,
    /// Decay of m.
    pub beta1: f32,
    /// Decay of v.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Weight decay.
    pub decay: f32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Adam {}

/// What an optimiser does with gradients of a norm: see `optim.rs`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Judge {
    /// Sums of squares of the gradients, `[parts]`.
    pub squares: *const f64,
    /// Of the step: one.
    pub loss: *const f32,
    /// What the gradients were multiplied by, and steps since that last changed, updated; or null: 1 for ever.
    pub scaling: *mut f32,
    /// Norm, factor.
    pub out: *mut f32,
    /// Of squares.
    pub parts: u32,
    /// Largest norm left as it is; 0: all are.
    pub limit: f32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Judge {}

/// Steps without overflow after which gradients are scaled by twice as much.
pub const SCALING_PATIENCE: f32 = 2000.0;
/// Gradients are scaled by this at most; and by its inverse at least.
pub const SCALING_MOST: f32 = 16_777_216.0;

/// Rows by number: `to[i] = from[index[i]]`, or `to[index[i]] = from[i]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Choose {
    /// `[_, width]`.
    pub from: *const f32,
    /// `[_, width]`.
    pub to: *mut f32,
    /// Whole numbers, `[count]`.
    pub index: *const f32,
    /// Rows copied.
    pub count: u32,
    /// Numbers of a row.
    pub width: u32,
    /// Rows of what is indexed: those outside of it read as NaN, and are not written.
    pub rows: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Choose {}

/// `to = factor from`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// `[len]`.
    pub from: *const f32,
    /// `[len]`.
    pub to: *mut f32,
    /// One.
    pub factor: *const f32,
    /// Elements.
    pub len: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Scale {}

/// Keeps numbers between two.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Clamp {
    /// `[len]`, in place.
    pub x: *mut f32,
    /// Elements.
    pub len: u32,
    /// They are at least this.
    pub low: f32,
    /// And at most this.
    pub high: f32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Clamp {}

/// A loss's learned scalars, as its kernels take them: see [`Logits::live`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Temper {
    /// log(1/tau): one, or null.
    pub logit_scale: *const f32,
    /// Of the sigmoid loss: one, or null.
    pub bias: *const f32,
    /// 1/tau, and the bias in octaves.
    pub live: *mut f32,
    /// 1/tau where it is not learned.
    pub inverse_tau: f32,
    /// The bias where it is not learned.
    pub fixed_bias: f32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Temper {}

/// A loss's sums into what is kept of it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Settle {
    /// Loss by rows, loss by columns, `sum <u, gain G v>`, then the four of [`Pull::row_sums`].
    pub scalars: *const f64,
    /// (max, sum) of all logits for the joint loss, else null.
    pub joint: *const [f32; 2],
    /// See [`Temper::live`].
    pub live: *const f32,
    /// Loss, d loss/d log(1/tau) (0 unless learned), d loss/d bias, tau.
    pub out: *mut f32,
    /// What the row's, the column's and the summed loss count; 0: not at all.
    pub weights: [f32; 3],
    /// Added.
    pub constant: f32,
    /// `d loss/d log(1/tau)` is this times `<u, gain G v> / tau`; 0: that is not made.
    pub along: f32,
    /// And this times the sum of G x, x from its mean under P where there is one; 0: that is not made.
    pub moment: f32,
    /// Not 0: there is a bias.
    pub bias: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Settle {}

/// Shared memory of a block that reduces scores: a tile of them, columns apart.
pub const SEARCH_SHARED: u32 = TILE * (TILE + 4) * 4;

/// Rows of f32 as halves that a product over `3 pitch` multiplies as if they had 22 bits; see `search.rs`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// `[rows, dim]`.
    pub x: *const f32,
    /// `[rows, 3 pitch]`, zeros behind `dim` in each third.
    pub out: *mut u16,
    /// What a row's halves count, a power of two: `[rows]`.
    pub unit: *mut f32,
    /// Rows.
    pub rows: u32,
    /// Numbers of a row.
    pub dim: u32,
    /// A multiple of 8.
    pub pitch: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Split {}

/// Queries against items: the score of a pair is the product of their rows, in their units, plus the item's offset.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Search {
    /// `[n, depth]`, made by [`Split`].
    pub queries: *const u16,
    /// `[m, depth]`, likewise.
    pub items: *const u16,
    /// Of queries, `[n]`.
    pub query_unit: *const f32,
    /// Of items, `[m]`.
    pub item_unit: *const f32,
    /// `[m]`.
    pub offset: *const f32,
    /// Each query's score against its own item, `[n]`.
    pub own: *mut f32,
    /// How many items come before a query's own, `[2 splits, n]`.
    pub ranks: *mut u32,
    /// Keys of the best items, `[2 splits + 1, keep, n]`, the last of all splits: a score's bits, in the order of scores, above
    /// the complement of the item; 0 is none.
    pub heaps: *mut u64,
    /// Queries.
    pub n: u32,
    /// Items.
    pub m: u32,
    /// Halves of a row, a multiple of 8.
    pub depth: u32,
    /// Item tiles of a split; for `merge`, heaps of a query.
    pub tiles: u32,
    /// Items kept of a query, at least 1.
    pub keep: u32,
    /// Query i's own item is `first + i`.
    pub first: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Search {}

/// Sums of squares.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Squares {
    /// `[len]`.
    pub x: *const f32,
    /// `[blocks]`.
    pub out: *mut f64,
    /// Elements.
    pub len: u32,
    /// Nothing; to a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Squares {}

/// One number everywhere.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// `[len]`.
    pub out: *mut f32,
    /// Elements.
    pub len: u32,
    /// What they become.
    pub value: f32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Fill {}

/// Standard normals, see [`crate::random::normals`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Normals {
    /// `[len]`, of the kernel's type.
    pub out: *mut (),
    /// Elements.
    pub len: u64,
    /// What they are drawn from.
    pub seed: u64,
    /// And this.
    pub stream: u32,
    /// To a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Normals {}

/// Orders of pairings, see `paired.rs`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DrawPairings {
    /// `[pairings + 1, n]`: the column that each row is paired with; the first pairing is the diagonal.
    pub forth: *mut u32,
    /// `[pairings + 1, n]`: the row that each column is paired with.
    pub back: *mut u32,
    /// What they are drawn from.
    pub seed: u64,
    /// Rows, and columns.
    pub n: u32,
    /// Drawn pairings.
    pub pairings: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for DrawPairings {}

/// Logits of pairings and their row tallies, see `paired.rs`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PairedTally {
    /// As many rows as columns.
    pub logits: Logits,
    /// [`DrawPairings::forth`].
    pub forth: *const u32,
    /// `[pairings + 1, n]`: the logits, in octaves.
    pub x: *mut f32,
    /// `[n]`: of each row, the largest logit of its drawn pairs, the sum of `2^(x - max)` over them, nothing, and the
    /// diagonal's logit. The slots of a [`Merge`].
    pub slots: *mut [f32; 4],
    /// Drawn pairings.
    pub pairings: u32,
    /// To a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for PairedTally {}

/// Rows (or columns) of G of the shuffled joint loss times the other side, see `paired.rs`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PairedPull {
    /// The other side's embeddings, halves `[n, pitch]`.
    pub other: *const u16,
    /// Whom each row (column) is paired with: [`DrawPairings::forth`] (`back`).
    pub order: *const u32,
    /// [`PairedTally::x`].
    pub x: *const f32,
    /// (max, sum) of all drawn logits.
    pub joint: *const [f32; 2],
    /// G of the diagonal's pairs beside their drawn part, `[n]`.
    pub target: *const f32,
    /// `[n, dim]`: sums of G times rows of `other`; or null.
    pub acc: *mut f32,
    /// `[n]`: nothing, sum of G, of G x, nothing; or null.
    pub row_sums: *mut [f32; 4],
    /// `[n]`: sum of G; or null.
    pub col_sums: *mut f32,
    /// Rows, and columns.
    pub n: u32,
    /// Drawn pairings.
    pub pairings: u32,
    /// Embedding dimension.
    pub dim: u32,
    /// Halves from row to row of `other`, a multiple of 8.
    pub pitch: u32,
    /// 1: `acc` is the rows'; 0: the columns'.
    pub by_row: u32,
    /// To a multiple of 8 bytes.
    pub reserved: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for PairedPull {}

/// An image read through a square kernel, stride 1: output pixel (y, x) sees `y + ky - padding`, `x + kx - padding`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Of the image that is read.
    pub channels: u32,
    /// Of the image that is read.
    pub height: u32,
    /// Of the image that is read.
    pub width: u32,
    /// Side of the kernel.
    pub kernel: u32,
    /// Zeros around the image.
    pub padding: u32,
    /// Pixels of an output image.
    pub pixels: u32,
    /// Columns of an output image.
    pub width_out: u32,
}

/// Channels of the result that a thread of a direct convolution makes: of 1, 3, 6, 16 or 32 of them hardly one is made
/// for nothing.
pub const DIRECT_GROUP: u32 = 3;
/// Shared memory of a direct convolution: five blocks share a multiprocessor's.
pub const DIRECT_SHARED: u32 = 40 << 10;
/// Threads of a block that sums a weight's gradient directly.
pub const DIRECT_WEIGHT_THREADS: u32 = 512;
/// Shared memory of such a block.
pub const DIRECT_WEIGHT_SHARED: u32 = 48 << 10;

/// Where `direct.rs` has padded images in shared memory, in numbers.
#[derive(Clone, Copy, Debug)]
pub struct Padded {
    /// Tiles (or runs) of output pixels in a row.
    pub across: u32,
    /// Rows of them.
    pub down: u32,
    /// Lines of a channel.
    pub lines: u32,
    /// From line to line.
    pub pitch: u32,
}

impl Geometry {
    /// Rows of an output image.
    pub const fn height_out(&self) -> u32 {
        self.height + 2 * self.padding + 1 - self.kernel
    }
    /// For tiles of 2 x 2 output pixels, read two numbers at a time: a row of tiles begins in the bank in which the one
    /// above it ends.
    pub const fn padded_tiles(&self) -> Padded {
        let (across, down) = (self.width_out.div_ceil(2), self.height_out().div_ceil(2));
        let width = 2 * across + self.kernel - 1;
        let pitch = width + (across.next_multiple_of(2) + 16 - width % 16) % 16;
        Padded { across, down, lines: 2 * down + self.kernel - 1, pitch }
    }
    /// For runs of 4 output pixels, read four numbers at a time: lines begin in banks of their own.
    pub const fn padded_runs(&self) -> Padded {
        let across = self.width_out.div_ceil(4);
        Padded { across, down: self.height_out(), lines: self.height + 2 * self.padding, pitch: 4 * ((across + 1) | 1) }
    }
    /// Kernels of which direct convolutions have products in registers.
    const fn is_direct(&self) -> bool {
        matches!(self.kernel, 3 | 5)
    }
    /// Whether a direct convolution into `outputs` channels has room for its weights and an image.
    pub const fn fits_direct(&self, outputs: u32) -> bool {
        // Wide enough for any two counts of channels.
        let (p, channels) = (self.padded_tiles(), self.channels as u128);
        let weights = outputs.div_ceil(DIRECT_GROUP) as u128 * channels * (4 * self.kernel * self.kernel) as u128;
        let image = channels * p.lines as u128 * p.pitch as u128;
        self.is_direct() && 4 * (weights + image) <= DIRECT_SHARED as u128
    }
    /// Whether the gradient of a weight of `outputs` channels has a thread for each of its sums, and room for an image
    /// and the output's gradient.
    pub const fn fits_direct_weight(&self, outputs: u32) -> bool {
        let (p, channels) = (self.padded_runs(), self.channels as u128);
        let sums = outputs.div_ceil(DIRECT_GROUP) as u128 * channels * self.kernel as u128;
        let image = channels * p.lines as u128 * p.pitch as u128;
        let gradient = outputs as u128 * p.down as u128 * (4 * p.across) as u128;
        self.is_direct()
            && sums <= DIRECT_WEIGHT_THREADS as u128
            && 4 * (image + gradient) <= DIRECT_WEIGHT_SHARED as u128
    }
}

/// A convolution, or one of its gradients; see `conv.rs` for what the arrays are in each.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Conv {
    /// `[rows, channels, height, width]`.
    pub x: *const f32,
    /// `[outputs, channels, kernel, kernel]`; for the data's gradient `[channels, outputs, kernel, kernel]`; for the
    /// weight's the output's gradient `[rows, outputs, pixels]`.
    pub weight: *const f32,
    /// `[rows, outputs, pixels]`; for the weight's gradient `[parts, outputs, channels kernel^2]`.
    pub out: *mut f32,
    /// Images.
    pub rows: u32,
    /// Channels of the result.
    pub outputs: u32,
    /// How the image is read.
    pub geometry: Geometry,
    /// Rows of a part of the weight's gradient; of a block of a direct convolution.
    pub part: u32,
}
// SAFETY: scalars and device pointers.
unsafe impl Args for Conv {}
