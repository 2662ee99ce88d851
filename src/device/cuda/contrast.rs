//! Losses on a card: which launches make one, in which order, and the numbers around them.
//!
//! ```text
//! prepare   u, v -> halves (unit rows, centred rows), norms
//! tally     rows of S and rows of S' -> slots
//! soften    slots -> softmaxes, targets, losses of blocks (merge, total and normalise where one softmax is over all pairs)
//! for every chunk of S, row chunks outside
//!   pull    G of the chunk, in halves; its row and column sums where they are wanted
//!   gemm    dU += G V, dV += G' U
//! finish    dU, dV through the tilting; <u, dU> for d tau
//! totals    all scalars, in f64
//! ```
//!
//! Scratch is O((N + M) D) and one chunk; nothing is allocated when shapes repeat. Sums have one order: no result
//! depends on which block came first.

mod block;
mod mmd;
mod paired;

pub use block::{Block, Tallies};

use super::card::{Arena, Buffer, Card, Dim, MapSpec};
use super::verbs::Verbs;
use super::{CudaError, Module, runs};
use crate::device::Engine;
use crate::objective::{
    Batch, Gradients, Loss, LossError, Matrix, Moments, Objective, Pairs, Positives, Precision, Storage, Value, Write,
    counts::Counts,
};
use bytemuck::Pod;
use kernels::abi::{self, Kernel, Logits, TensorMap};
use kernels::entries as e;
use kernels::law::Product;
use std::collections::HashMap;
use std::f64::consts::{LN_2, LOG2_E};
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, PoisonError};

/// Rows and columns of G kept at a time: 32 MiB of halves, about the cache of a large card.
const CHUNK: usize = 4096;

/// Copies of a sum that is cut into parts, at most.
const MOST_PARTS: usize = 4;

/// Blocks of a first pass of ordered sums.
const PARTS: usize = 256;

/// The kernels of one 16-bit type.
struct Kernels {
    precision: Precision,
    prepare_f32: Kernel<abi::Prepare>,
    prepare_half: Kernel<abi::Prepare>,
    sum_columns: Kernel<abi::SumColumns>,
    /// Without and with sums over all logits.
    tally: [Kernel<abi::Each<abi::Tally, 2>>; 2],
    /// Without and with sums of G.
    softmax: [Kernel<abi::Pull>; 2],
    sigmoid: Kernel<abi::Pull>,
    plain: Kernel<abi::Pull>,
    factored: Kernel<abi::Pull>,
    residual: Kernel<abi::Residual>,
    paired_tally: Kernel<abi::PairedTally>,
    paired_pull: Kernel<abi::PairedPull>,
    gv: Kernel<abi::Gemm>,
    gu: Kernel<abi::Gemm>,
    finish: Kernel<abi::Finish>,
    hopper: Hopper,
}

struct Hopper {
    tally: [Kernel<abi::HopperTally>; 2],
    both: Kernel<abi::HopperTallyBoth>,
    softmax: [Kernel<abi::HopperPull>; 2],
    sigmoid: Kernel<abi::HopperPull>,
    plain: Kernel<abi::HopperPull>,
    factored: Kernel<abi::HopperPull>,
    gemm: Kernel<abi::HopperGemm>,
}

static BF16: Kernels = Kernels {
    precision: Precision::Bf16,
    prepare_f32: e::PREPARE_BF16_F32,
    prepare_half: e::PREPARE_BF16_BF16,
    sum_columns: e::SUM_COLUMNS_BF16,
    tally: [e::TALLY_BF16, e::TALLY_ALL_BF16],
    softmax: [e::PULL_SOFTMAX_BF16, e::PULL_SOFTMAX_SUMS_BF16],
    sigmoid: e::PULL_SIGMOID_BF16,
    plain: e::PULL_PLAIN_BF16,
    factored: e::PULL_FACTORED_BF16,
    residual: e::RESIDUAL_BF16,
    paired_tally: e::PAIRED_TALLY_BF16,
    paired_pull: e::PAIRED_PULL_BF16,
    gv: e::GEMM_GV_BF16,
    gu: e::GEMM_GU_BF16,
    finish: e::FINISH_BF16,
    hopper: Hopper {
        tally: [e::HOPPER_TALLY_BF16, e::HOPPER_TALLY_ALL_BF16],
        both: e::HOPPER_TALLY_BOTH_BF16,
        softmax: [e::HOPPER_PULL_SOFTMAX_BF16, e::HOPPER_PULL_SOFTMAX_SUMS_BF16],
        sigmoid: e::HOPPER_PULL_SIGMOID_BF16,
        plain: e::HOPPER_PULL_PLAIN_BF16,
        factored: e::HOPPER_PULL_FACTORED_BF16,
        gemm: e::HOPPER_GEMM_BF16,
    },
};

static F16: Kernels = Kernels {
    precision: Precision::F16,
    prepare_f32: e::PREPARE_F16_F32,
    prepare_half: e::PREPARE_F16_F16,
    sum_columns: e::SUM_COLUMNS_F16,
    tally: [e::TALLY_F16, e::TALLY_ALL_F16],
    softmax: [e::PULL_SOFTMAX_F16, e::PULL_SOFTMAX_SUMS_F16],
    sigmoid: e::PULL_SIGMOID_F16,
    plain: e::PULL_PLAIN_F16,
    factored: e::PULL_FACTORED_F16,
    residual: e::RESIDUAL_F16,
    paired_tally: e::PAIRED_TALLY_F16,
    paired_pull: e::PAIRED_PULL_F16,
    gv: e::GEMM_GV_F16,
    gu: e::GEMM_GU_F16,
    finish: e::FINISH_F16,
    hopper: Hopper {
        tally: [e::HOPPER_TALLY_F16, e::HOPPER_TALLY_ALL_F16],
        both: e::HOPPER_TALLY_BOTH_F16,
        softmax: [e::HOPPER_PULL_SOFTMAX_F16, e::HOPPER_PULL_SOFTMAX_SUMS_F16],
        sigmoid: e::HOPPER_PULL_SIGMOID_F16,
        plain: e::HOPPER_PULL_PLAIN_F16,
        factored: e::HOPPER_PULL_FACTORED_F16,
        gemm: e::HOPPER_GEMM_F16,
    },
};

/// Rows of embeddings on the card.
#[derive(Clone, Copy, Debug)]
pub struct CardRows {
    /// `[rows, dim]`, f32 or the 16-bit type of the loss.
    pub at: *const (),
    /// Whether they are f32.
    pub singles: bool,
    /// Number of rows.
    pub rows: usize,
    /// Numbers of each.
    pub dim: usize,
}

mod sealed {
    /// Kernels read a buffer as numbers of its `PRECISION`, so no type but those here may say what that is.
    pub trait Sealed: bytemuck::Pod {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// What embeddings on a card may be made of: f32, bf16 and f16.
pub trait Embedding: sealed::Sealed {
    /// The precision they are in; f32 is rounded to the engine's.
    const PRECISION: Precision;
}
impl Embedding for f32 {
    const PRECISION: Precision = Precision::F32;
}
impl Embedding for half::bf16 {
    const PRECISION: Precision = Precision::Bf16;
}
impl Embedding for half::f16 {
    const PRECISION: Precision = Precision::F16;
}

/// What a loss is evaluated on, on the card.
#[derive(Clone, Copy)]
struct Inputs {
    /// u and v.
    rows: [CardRows; 2],
    /// What MMD compares, in f32.
    features: Option<[CardRows; 2]>,
    /// Added to the logits of each column, or null.
    offset: *const f32,
}

/// Which terms of the loss, beside the sums over its own pairs, a call counts.
#[derive(Clone, Copy)]
struct Share {
    /// Those of its rows; those of its columns; with both, the constants.
    rows: bool,
    cols: bool,
    /// Rows and columns of the whole, if that is more than the call's own.
    whole: Option<[usize; 2]>,
}

impl Share {
    const WHOLE: Share = Share { rows: true, cols: true, whole: None };
}

/// A part of G: softmaxes of rows and columns with their targets, or null, times a factor.
#[derive(Clone, Copy)]
struct Part {
    norm_u: *const abi::Norm,
    target_u: *const f32,
    norm_v: *const abi::Norm,
    target_v: *const f32,
    far: [*const u32; 2],
    factor: Option<Logits>,
}

impl Default for Part {
    fn default() -> Self {
        Part { norm_u: null(), target_u: null(), norm_v: null(), target_v: null(), far: [null(); 2], factor: None }
    }
}

/// What a chunk of G is multiplied with: halves `[rows, pitch]`.
#[derive(Clone, Copy)]
struct Carried {
    at: *const u16,
    dim: usize,
    pitch: usize,
}

/// Sums over chunks of G times a side, `[parts, rows, dim]`: each part has its own range of a chunk's k.
#[derive(Clone, Copy)]
struct Sums {
    at: *mut f32,
    rows: usize,
    dim: usize,
    /// k of a part.
    depth: usize,
    parts: usize,
}

impl Sums {
    /// In one part.
    fn whole(at: *mut f32, rows: usize, dim: usize) -> Self {
        Sums { at, rows, dim, depth: usize::MAX, parts: 1 }
    }
}

/// Laws of a chunk.
#[derive(Clone, Copy)]
enum Pulling {
    Softmax,
    SoftmaxSums,
    Sigmoid,
    Plain,
    Factored,
}

/// Where a gradient goes on the card, if it is wanted.
type Out = Option<Write<*mut f32>>;

/// Learned scalars of a loss on the card, or null, and where its results go: see [`abi::Temper`], [`abi::Settle`].
#[derive(Clone, Copy)]
pub(super) struct Scalars {
    pub logit_scale: *const f32,
    pub bias: *const f32,
    pub out: *mut f32,
}

/// The loss engine of one card: scratch, and what it remembers of the last batch.
#[derive(Debug)]
pub struct Cuda<C: Card> {
    pub(super) card: Arc<C>,
    arena: Arena<C>,
    counts: Counts,
    /// Sizes of the last batch whose pairs were the plain diagonal: nothing to upload if the next one's are the same.
    plain: Option<[usize; 2]>,
    /// How often ids and shares have been replaced: a recorded step has those it was recorded with.
    pub(super) repaired: u64,
    chunk: usize,
    hopper: bool,
    pub(super) precision: Precision,
    pub(super) verbs: Mutex<Verbs<C>>,
}

/// One side, prepared.
#[derive(Clone, Copy)]
struct Side {
    halves: *const u16,
    inverse: *const f32,
    shift: *const f32,
    id: *const u32,
    ignore: *const u32,
    /// See [`Logits::span_u`].
    span: *const [u32; 2],
    positives: *const u32,
    share: *const f32,
    norm: *const abi::Norm,
    target: *const f32,
    /// See [`abi::Normalise::far`]; null where nobody asks.
    far: *const u32,
    /// Its part of the loss in parts, and how many; null where it has none.
    losses: (*const f64, usize),
    rows: usize,
}

/// What [`abi::Tally`] leaves of a side, and how many of it there are of each row.
#[derive(Clone, Copy)]
struct TallySlots {
    tallies: *const [f32; 4],
    /// Null without smoothing.
    all: *const [f32; 2],
    count: usize,
}

/// Names of a side's slots in the arena.
struct Slots {
    halves: &'static str,
    inverse: &'static str,
    shift: &'static str,
    id: &'static str,
    ignore: &'static str,
    span: &'static str,
    positives: &'static str,
    share: &'static str,
    norm: &'static str,
    far: &'static str,
    target: &'static str,
    acc: &'static str,
    tallies: &'static str,
    tallies_of_all: &'static str,
    losses: &'static str,
}

const U: Slots = Slots {
    halves: "u",
    inverse: "1/|u|",
    shift: "shift of u",
    id: "id of u",
    ignore: "ignore of u",
    span: "span of u",
    positives: "positives of u",
    share: "share of u",
    norm: "norm of u",
    far: "far norm of u",
    target: "target of u",
    acc: "acc of u",
    tallies: "tallies of u",
    tallies_of_all: "tallies of all of u",
    losses: "losses of u",
};
const V: Slots = Slots {
    halves: "v",
    inverse: "1/|v|",
    shift: "shift of v",
    id: "id of v",
    ignore: "ignore of v",
    span: "span of v",
    positives: "positives of v",
    share: "share of v",
    norm: "norm of v",
    far: "far norm of v",
    target: "target of v",
    acc: "acc of v",
    tallies: "tallies of v",
    tallies_of_all: "tallies of all of v",
    losses: "losses of v",
};

/// Scalars of a call, in the slot "scalars".
mod scalar {
    pub const ROW_LOSS: usize = 0;
    pub const COL_LOSS: usize = 1;
    pub const ALONG: usize = 2;
    /// Of [`kernels::abi::Pull::row_sums`], over everything.
    pub const SUMS: usize = 3;
    pub const COUNT: usize = 7;
}

/// A batch whose embeddings and features are elsewhere.
fn elsewhere<'a>(pairs: Pairs<'a>, rows: [CardRows; 2], features: Option<[CardRows; 2]>) -> Batch<'a> {
    let matrix = |r: CardRows| Matrix { data: Storage::F32(&[]), rows: r.rows, dim: r.dim };
    let [u, v] = rows.map(matrix);
    let moments = features.map(|f| f.map(matrix)).map(|[u, v]| Moments::Features { u, v });
    Batch { u, v, pairs, offset_v: None, moments }
}

/// Refuses addresses of which there could be no loss.
fn fit(rows: &[CardRows; 2], features: Option<&[CardRows; 2]>, out: &[Out; 2]) -> Result<(), LossError> {
    let wrong = |what, found: String, expected: String| Err(LossError::Shape { what, found, expected });
    let named = |names: [&'static str; 2], rows: &[CardRows; 2]| names.into_iter().zip(*rows);
    let data = features.into_iter().flat_map(|f| named(["data of u", "data of v"], f));
    for (what, r) in named(["u", "v"], rows).chain(data) {
        if r.rows == 0 || r.dim == 0 || r.rows.max(r.dim) > u32::MAX as usize {
            return wrong(what, format!("[{}, {}]", r.rows, r.dim), "1 to 2^32 - 1 rows and columns".into());
        }
        if r.at.is_null() {
            return wrong(what, "a null address".into(), format!("that of [{}, {}] numbers", r.rows, r.dim));
        }
    }
    for (what, out) in ["gradient of u", "gradient of v"].into_iter().zip(out) {
        if matches!(out, Some(Write::Set(at) | Write::Add(at)) if at.is_null()) {
            return wrong(what, "a null address".into(), "that of as many numbers as the rows have".into());
        }
    }
    if rows[0].dim != rows[1].dim {
        return wrong("columns of v", rows[1].dim.to_string(), rows[0].dim.to_string());
    }
    let Some(features) = features else { return Ok(()) };
    for ((what, f), r) in named(["rows of data of u", "rows of data of v"], features).zip(rows) {
        if f.rows != r.rows {
            return wrong(what, f.rows.to_string(), r.rows.to_string());
        }
        if !f.singles {
            return wrong(what, "halves".into(), "numbers of f32".into());
        }
    }
    Ok(())
}

/// Rows as halves `[rows, pitch]` at `out`, as they are.
fn prepare(rows: CardRows, out: *mut u16, pitch: usize) -> abi::Prepare {
    abi::Prepare {
        x: rows.at,
        shift: null(),
        offset: null(),
        out,
        inverse: null_mut(),
        half_norm: null_mut(),
        live: null(),
        rows: rows.rows as u32,
        dim: rows.dim as u32,
        pitch: pitch as u32,
        norm_scale: 0.0,
        scale: 1.0,
        behind: 0.0,
    }
}

/// At least one piece of work, each of its own blocks, as one launch. What lies behind the last has no blocks.
fn each<A: Copy, const N: usize>(work: &[([u32; 2], A)]) -> ([u32; 3], abi::Each<A, N>) {
    let most = |axis: usize| work.iter().map(|(grid, _)| grid[axis]).max().unwrap_or(0);
    let args = std::array::from_fn(|k| work[k.min(work.len() - 1)].1);
    ([most(0), most(1), work.len() as u32], abi::Each(args))
}

fn blocks(n: usize, of: usize) -> u32 {
    n.div_ceil(of) as u32
}

impl<C: Card> Cuda<C> {
    /// An engine without scratch yet, which rounds f32 embeddings to `precision`, bf16 or f16.
    pub fn new(card: &Arc<C>, precision: Precision) -> Self {
        let hopper = runs(Module::Hopper, card.capability());
        Cuda {
            card: Arc::clone(card),
            arena: Arena::new(card),
            counts: Counts::default(),
            plain: None,
            repaired: 0,
            chunk: CHUNK,
            hopper,
            precision,
            verbs: Verbs::new(card),
        }
    }

    /// Another edge of the chunk of G: rounded up to a multiple of 256.
    pub fn with_chunk(mut self, edge: usize) -> Self {
        self.chunk = edge.max(1).next_multiple_of(256);
        self
    }

    /// Portable kernels even where Hopper's would run.
    pub fn portable(mut self) -> Self {
        self.hopper = false;
        self
    }

    /// Evaluates `loss` on embeddings that are on the card, `u` `[N, dim]` and `v` `[M, dim]`, and `pairs` that are the host's;
    /// gradients stay on the card. The MMD losses take `features` of each row of u and of v.
    ///
    /// # Errors
    /// As [`Engine::loss`] of this engine; [`LossError::Shape`] for buffers of other lengths; [`LossError::Device`] for those of
    /// another card. [`LossError::NotFinite`] is found after the launches: gradients hold rubbish then, and its row is 0.
    pub fn loss_on_card<T: Embedding>(
        &mut self,
        loss: &Loss,
        pairs: &Pairs<'_>,
        [u, v]: [&Buffer<T, C>; 2],
        dim: usize,
        features: Option<[&Buffer<f32, C>; 2]>,
        gradients: [Option<Write<&mut Buffer<f32, C>>>; 2],
    ) -> Result<Value, LossError> {
        if features.iter().flatten().any(|x| !Arc::ptr_eq(x.card(), &self.card)) {
            return Err(CudaError::OtherCard.into());
        }
        let (rows, out) = addresses(&self.card, [u, v], dim, gradients)?;
        let features = match features {
            Some(features) => {
                let mut on_card = rows;
                for ((x, what), rows) in features.into_iter().zip(["data of u", "data of v"]).zip(&mut on_card) {
                    if x.is_empty() || !x.len().is_multiple_of(rows.rows) {
                        return Err(wrong_len(
                            what,
                            x.len(),
                            format!("as many numbers for each of {} rows", rows.rows),
                        ));
                    }
                    (rows.at, rows.singles, rows.dim) = (x.ptr(..)?.cast(), true, x.len() / rows.rows);
                }
                Some(on_card)
            }
            None => None,
        };
        // SAFETY: buffers of the lengths checked above; outputs are borrowed mutably.
        unsafe { self.loss_at(loss, self.rounded(T::PRECISION), pairs, rows, features, out) }
    }

    /// The same on raw addresses, for programs with memory of their own: on [`super::Driver::of_stream`]'s stream.
    /// `precision` is what f32 rows are rounded to, or the type of others; features are f32.
    ///
    /// # Safety
    /// `rows`, `features` and `out` are addresses of `[rows, dim]` numbers in the card's memory, aligned as their type is, that
    /// live until the call returns; nobody else writes the rows and features or touches the outputs meanwhile. An output is
    /// nowhere in the rest.
    ///
    /// # Errors
    /// As [`Self::loss_on_card`]; [`LossError::Shape`] also for a null address, and for no rows or numbers of them.
    pub unsafe fn loss_at(
        &mut self,
        loss: &Loss,
        precision: Precision,
        pairs: &Pairs<'_>,
        rows: [CardRows; 2],
        features: Option<[CardRows; 2]>,
        out: [Option<Write<*mut f32>>; 2],
    ) -> Result<Value, LossError> {
        fit(&rows, features.as_ref(), &out)?;
        let mut batch = elsewhere(*pairs, rows, features);
        batch.parameters(loss)?;
        batch.pairs_fit()?;
        let mut host = [vec![], vec![]];
        if let Some(features) = &features
            && !matches!(pairs.positives, Positives::Diagonal)
        {
            // Targets are means over positives then, which the host takes.
            for (f, host) in features.iter().zip(&mut host) {
                host.resize(f.rows * f.dim, 0f32);
                // SAFETY: the caller's promise: as many numbers of f32 are there.
                unsafe { self.card.download(f.at.cast(), bytemuck::cast_slice_mut(host)) }.map_err(LossError::from)?;
            }
            let [u, v] = [0, 1].map(|which| Matrix::f32(&host[which], features[which].dim));
            batch.moments = Some(Moments::Features { u, v });
        }
        let inputs = Inputs { rows, features, offset: null() };
        let value = self.evaluate(loss, precision, inputs, &batch, out, None)?;
        // A NaN may leave the loss by way of a pair that then does not count; not <u, dU>.
        let finite = value.loss.is_finite() && value.grad_tau.is_finite() && value.grad_bias.is_finite();
        if finite { Ok(value) } else { Err(LossError::NotFinite { what: "u or v", row: None }) }
    }

    /// What embeddings of `precision` are multiplied in.
    fn rounded(&self, precision: Precision) -> Precision {
        if precision == Precision::F32 { self.precision } else { precision }
    }

    /// Evaluates embeddings that are on the card; `batch` gives everything else, its embeddings' data are not looked at.
    ///
    /// # Errors
    /// As [`Engine::loss`] of this engine.
    fn evaluate(
        &mut self,
        loss: &Loss,
        precision: Precision,
        inputs: Inputs,
        batch: &Batch<'_>,
        out: [Out; 2],
        out_offset: Option<Write<&mut [f32]>>,
    ) -> Result<Value, LossError> {
        let with_columns = batch.offset_v.is_some() || out_offset.is_some();
        let given = self.give(loss, precision, inputs, batch, out, with_columns, null())?;
        self.value(&given, loss, batch, out_offset, Share::WHOLE)
    }

    /// Gives the card all launches of a loss; its scalars are left in their slots, from which [`Self::value`] or
    /// [`Self::settle`] makes what is kept. `live` is [`abi::Temper`]'s or null.
    #[allow(clippy::too_many_arguments, reason = "the public calls name them")]
    fn give(
        &mut self,
        loss: &Loss,
        precision: Precision,
        Inputs { rows, features, offset }: Inputs,
        batch: &Batch<'_>,
        out: [Out; 2],
        with_columns: bool,
        live: *const f32,
    ) -> Result<Given, LossError> {
        self.pairs(&batch.pairs, batch, loss.objective.is_of_each_pair())?;
        let mut call = self.call(loss, precision, rows, batch.pairs.ignore.is_some(), live)?;
        self.prepare(&mut call, rows, offset)?;
        self.softmaxes(&mut call)?;

        let (parts, bound, known) = match features {
            Some(features) => {
                let mmd::Pulled { parts, bound, loss } = self.residuals(&mut call, batch, features)?;
                (parts, bound, loss)
            }
            None => (vec![call.part()], call.bound(&self.counts), None),
        };
        let gain = self.gradients(&call, &parts, bound, out, with_columns)?;
        Ok(Given { call, gain, known })
    }

    /// What the launches of a call share; ids and shares are in their slots.
    fn call(
        &mut self,
        loss: &Loss,
        precision: Precision,
        rows: [CardRows; 2],
        ignore: bool,
        live: *const f32,
    ) -> Result<Call, LossError> {
        // Of so many pairs a probability times the largest gain is a number of few bits, or none.
        let joint = matches!(loss.objective, Objective::Joint | Objective::JointMmd);
        if precision == Precision::F16 && joint && rows[0].rows.saturating_mul(rows[1].rows) > 1 << 32 {
            let pairs = format!("f16 for a joint loss of {} x {} pairs", rows[0].rows, rows[1].rows);
            return Err(only_cpu("precision", &pairs, "bf16: f16 holds joint losses of at most 2^32 pairs"));
        }
        let kernels = match precision {
            Precision::Bf16 => &BF16,
            Precision::F16 => &F16,
            Precision::F32 => return Err(only_cpu("precision", "f32", "bf16 or f16 on a card, or the CPU engine")),
        };
        let dim = rows[0].dim;
        Ok(Call {
            kernels,
            tilt: loss.tilting.scale() / if live.is_null() { loss.tau } else { 1.0 },
            squared: loss.tilting.product() == Product::SquaredDistance,
            unit: loss.tilting.unit_rows(),
            live,
            smoothing: loss.smoothing,
            dim,
            pitch: dim.next_multiple_of(8),
            form: Form::of(loss),
            drawn: match loss.objective {
                Objective::JointShuffled { pairings, seed } => Some(Drawn { pairings, seed }),
                _ => None,
            },
            u: self.side(&U, rows[0].rows, ignore)?,
            v: self.side(&V, rows[1].rows, ignore)?,
            anchored: None,
        })
    }

    /// What `parts` pull, of which G nowhere exceeds `bound`, and the sums that the loss is made of; the gain of G.
    fn gradients(
        &mut self,
        call: &Call,
        parts: &[Part],
        bound: f64,
        out: [Out; 2],
        with_columns: bool,
    ) -> Result<f64, CudaError> {
        let (n, m, dim) = (call.u.rows, call.v.rows, call.dim);
        let scalars: *mut f64 = self.arena.get("scalars", scalar::COUNT)?;
        let with_sums = call.levered() || with_columns || matches!(call.form, Form::Sigmoid { .. });
        let sums = if with_sums {
            let row: *mut f32 = self.arena.get("row sums", 4 * n)?;
            let col: *mut f32 = self.arena.get("column sums", m)?;
            Some((row, col))
        } else {
            None
        };
        // Pairings' G is not rounded to halves.
        let gain = if call.drawn.is_some() { 1.0 } else { gain(bound) };
        // Also without a gradient: d tau is made of <u, G V>, or of sums on the way.
        let others = |rows: usize| if call.drawn.is_some() { 1 } else { rows };
        let acc_u = self.sums(U.acc, out[0], [n, others(m)], dim)?;
        let acc_v = match out[1] {
            None => None,
            out => Some(self.sums(V.acc, out, [m, others(n)], dim)?),
        };
        match call.drawn {
            Some(drawn) => self.pull_pairings(call, drawn, sums, [Some(acc_u), acc_v])?,
            None => self.pull(call, parts, gain, sums, acc_u, acc_v)?,
        }
        let along: *mut f64 = self.arena.get("along", n.div_ceil(8))?;
        let g_sums = call.squared.then_some(sums).flatten();
        self.finish(call, &call.u, gain, acc_u, out[0], g_sums.map(|(row, _)| (row.wrapping_add(1), 4)), along)?;
        if let Some(acc) = acc_v {
            self.finish(call, &call.v, gain, acc, out[1], g_sums.map(|(_, col)| (col, 1)), null_mut())?;
        }
        let summed = |singles: *const f32, doubles: *const f64, n: usize, columns: u32, at: usize| {
            let out = scalars.wrapping_add(at);
            abi::Totals { singles, doubles, out, n: n as u32, columns, blocks: 1, reserved: 0 }
        };
        let mut all = vec![summed(null(), along, n.div_ceil(8), 1, scalar::ALONG)];
        for (side, at) in [(&call.u, scalar::ROW_LOSS), (&call.v, scalar::COL_LOSS)] {
            let (losses, count) = side.losses;
            if !losses.is_null() {
                all.push(summed(null(), losses, count, 1, at));
            }
        }
        if let Some((row, _)) = sums {
            all.push(summed(row, null(), n, 4, scalar::SUMS));
        }
        self.total(&all)?;
        Ok(gain)
    }

    /// The loss of `rows` at scalars that the card alone knows, its results among them: nothing is waited for, but by MMD,
    /// of whose `features` the host needs lengths.
    ///
    /// # Safety
    /// As [`Self::loss_at`], of the features and of the scalars too.
    ///
    /// # Errors
    /// As [`Engine::loss`] of this engine; numbers are not looked at.
    pub(super) unsafe fn learn(
        &mut self,
        loss: &Loss,
        precision: Precision,
        rows: [CardRows; 2],
        features: Option<[CardRows; 2]>,
        out: [Out; 2],
        scalars: Scalars,
    ) -> Result<(), LossError> {
        let batch = elsewhere(Pairs::default(), rows, features);
        batch.parameters(loss)?;
        let live: *mut f32 = self.arena.get("live", 2)?;
        let bias = if let Objective::Sigmoid { bias } = loss.objective { bias as f32 } else { 0.0 };
        let inverse_tau = (1.0 / loss.tau) as f32;
        let Scalars { logit_scale, bias: learned_bias, out: results } = scalars;
        let args = abi::Temper { logit_scale, bias: learned_bias, live, inverse_tau, fixed_bias: bias };
        self.run(&e::TEMPER, [1, 1, 1], &args)?;
        let inputs = Inputs { rows, features, offset: null() };
        let given = self.give(loss, precision, inputs, &batch, out, false, live)?;
        self.settle(&given, !logit_scale.is_null(), results)?;
        Ok(())
    }

    /// As [`Self::value`], on the card.
    fn settle(&mut self, Given { call, gain, known }: &Given, by_scale: bool, out: *mut f32) -> Result<(), CudaError> {
        let Terms { weights, normaliser, constant } = call.terms(Share::WHOLE, *known);
        let joint = if normaliser { self.arena.get::<[f32; 2]>("joint", 1)?.cast_const() } else { null() };
        let args = abi::Settle {
            scalars: self.arena.get::<f64>("scalars", scalar::COUNT)?,
            joint,
            live: call.live,
            out,
            weights: weights.map(|w| w as f32),
            constant: constant as f32,
            along: if by_scale && !call.levered() { (call.tilt / *gain) as f32 } else { 0.0 },
            moment: if by_scale && call.levered() { LN_2 as f32 } else { 0.0 },
            bias: u32::from(matches!(call.form, Form::Sigmoid { .. })),
            reserved: 0,
        };
        self.run(&e::SETTLE, [1, 1, 1], &args)
    }

    /// Reads the scalars back and puts the loss together.
    fn value(
        &mut self,
        Given { call, gain, known }: &Given,
        loss: &Loss,
        batch: &Batch<'_>,
        out_offset: Option<Write<&mut [f32]>>,
        share: Share,
    ) -> Result<Value, LossError> {
        let m = call.v.rows;
        let mut s = [0f64; scalar::COUNT];
        self.arena.download("scalars", &mut s)?;
        let mut col_sums = vec![];
        if batch.offset_v.is_some() || out_offset.is_some() {
            col_sums.resize(m, 0f32);
            self.arena.download("column sums", &mut col_sums)?;
        }
        match out_offset {
            Some(Write::Set(out)) => out.copy_from_slice(&col_sums),
            Some(Write::Add(out)) => out.iter_mut().zip(&col_sums).for_each(|(o, g)| *o += g),
            None => {}
        }
        // Sum of G times what tau divides of S.
        let moment = if call.levered() {
            // MMD's G adds up to nothing, but for rounding: logits count from their mean under the softmax, and offsets from
            // theirs, so that it has little to multiply.
            let [by_weight, g, moment, weight] = [0, 1, 2, 3].map(|k| s[scalar::SUMS + k]);
            let mean = if weight > 0.0 { by_weight / weight } else { 0.0 };
            let offset = batch.offset_v.unwrap_or_default();
            let mean_offset = match call.form {
                Form::Mmd { .. } | Form::JointMmd => offset.iter().map(|&o| f64::from(o)).sum::<f64>() / m as f64,
                _ => 0.0,
            };
            let shifted: f64 =
                offset.iter().zip(&col_sums).map(|(&o, &g)| (f64::from(o) - mean_offset) * f64::from(g)).sum();
            (moment - g * mean) * LN_2 - shifted
        } else {
            call.tilt * s[scalar::ALONG] / gain
        };
        let Terms { weights, normaliser, constant } = call.terms(share, *known);
        // What counts 0 may never have been written.
        let own = weights.into_iter().zip([scalar::ROW_LOSS, scalar::COL_LOSS, scalar::SUMS]);
        let mut value = Value {
            loss: constant + own.filter(|(weight, _)| *weight != 0.0).map(|(weight, at)| weight * s[at]).sum::<f64>(),
            grad_tau: -moment / loss.tau,
            grad_bias: if matches!(call.form, Form::Sigmoid { .. }) { s[scalar::SUMS + 1] } else { 0.0 },
        };
        if normaliser {
            let mut total = [0f32; 2];
            self.arena.download("joint", &mut total)?;
            value.loss += f64::from(total[1]).ln();
        }
        Ok(value)
    }

    /// Positives, ignored pairs and weights: counted on the host, as dense ids on the card.
    fn pairs(&mut self, pairs: &Pairs<'_>, batch: &Batch<'_>, all_rows: bool) -> Result<(), LossError> {
        let (n, m) = (batch.u.rows, batch.v.rows);
        let diagonal = matches!(pairs.positives, Positives::Diagonal);
        let plain = diagonal && pairs.weights_u.is_none() && pairs.weights_v.is_none() && !(all_rows && n > m);
        if plain && pairs.ignore.is_none() && self.plain == Some([n, m]) {
            return Ok(());
        }
        self.plain = None;
        self.repaired += 1;
        self.counts.prepare(batch, all_rows)?;
        let iota = |len: usize| (0..len as u32).collect::<Vec<_>>();
        let (id_u, id_v) = match pairs.positives {
            Positives::Diagonal => (iota(n), iota(m)),
            Positives::Index(index) => (index.to_vec(), iota(m)),
            Positives::Groups { u, v } => dense(u, v),
        };
        self.put(U.id, &id_u)?;
        self.put(V.id, &id_v)?;
        self.put(U.span, &spans(&id_u, pairs.ignore.is_some()))?;
        self.put(V.span, &spans(&id_v, pairs.ignore.is_some()))?;
        if let Some((u, v)) = pairs.ignore {
            let (u, v) = dense(u, v);
            self.put(U.ignore, &u)?;
            self.put(V.ignore, &v)?;
        }
        let Cuda { card, arena, counts, .. } = self;
        put(card, arena, U.positives, &counts.row_positives)?;
        put(card, arena, V.positives, &counts.col_positives)?;
        put(card, arena, U.share, &counts.row_share)?;
        put(card, arena, V.share, &counts.col_share)?;
        if plain && pairs.ignore.is_none() {
            self.plain = Some([n, m]);
        }
        Ok(())
    }

    fn side(&mut self, slots: &Slots, rows: usize, ignore: bool) -> Result<Side, CudaError> {
        Ok(Side {
            halves: null(),
            inverse: null(),
            shift: null(),
            id: self.arena.get(slots.id, rows)?,
            ignore: if ignore { self.arena.get(slots.ignore, rows)? } else { null() },
            span: self.arena.get(slots.span, rows.div_ceil(abi::SPAN as usize))?,
            positives: self.arena.get(slots.positives, rows)?,
            share: self.arena.get(slots.share, rows)?,
            norm: null(),
            target: null(),
            far: null(),
            losses: (null(), 0),
            rows,
        })
    }

    /// Embeddings as the tile wants them.
    fn prepare(&mut self, call: &mut Call, rows: [CardRows; 2], offset: *const f32) -> Result<(), CudaError> {
        let pitch = call.pitch;
        let mut shift = null_mut();
        if call.squared {
            // Centred rows: squared distances lose nothing to a common mean.
            shift = self.mean_row(call, &rows, "mean row")?;
        }
        for (which, (r, slots)) in rows.into_iter().zip([&U, &V]).enumerate() {
            let offset = if which == 1 { offset } else { null() };
            let halves: *mut u16 = self.arena.get(slots.halves, r.rows * pitch)?;
            let inverse = if call.unit { self.arena.get(slots.inverse, r.rows)? } else { null_mut() };
            let half_norm =
                if call.squared || !offset.is_null() { self.arena.get(slots.shift, r.rows)? } else { null_mut() };
            let args = abi::Prepare {
                shift,
                offset,
                inverse,
                half_norm,
                live: call.live,
                norm_scale: if call.squared { (call.tilt * LOG2_E) as f32 } else { 0.0 },
                ..prepare(r, halves, pitch)
            };
            let kernel = if r.singles { &call.kernels.prepare_f32 } else { &call.kernels.prepare_half };
            self.run(kernel, [blocks(r.rows, 8), 1, 1], &args)?;
            let side = if which == 0 { &mut call.u } else { &mut call.v };
            (side.halves, side.inverse, side.shift) = (halves, inverse, half_norm);
        }
        Ok(())
    }

    /// The mean over all of `rows`.
    fn mean_row(&mut self, call: &Call, rows: &[CardRows], slot: &'static str) -> Result<*mut f32, CudaError> {
        let (dim, parts) = (rows[0].dim, |r: &CardRows| r.rows.div_ceil(1024));
        let count = rows.iter().map(parts).sum();
        let slots: *mut f32 = self.arena.get("sums of columns", count * dim)?;
        let mut to = slots;
        for r in rows {
            let args = abi::SumColumns {
                x: r.at,
                out: to,
                rows: r.rows as u32,
                dim: dim as u32,
                part: 1024,
                scale: 1.0 / rows.iter().map(|r| r.rows).sum::<usize>() as f32,
            };
            let kernel = if r.singles { &e::SUM_COLUMNS_F32 } else { &call.kernels.sum_columns };
            self.run(kernel, [blocks(dim, 32), parts(r) as u32, 1], &args)?;
            to = to.wrapping_add(parts(r) * dim);
        }
        let mean = self.arena.get(slot, dim)?;
        self.fold(slots, count, dim, (mean, false))?;
        Ok(mean)
    }

    /// The softmaxes that the form wants, their targets, and the loss.
    fn softmaxes(&mut self, call: &mut Call) -> Result<(), CudaError> {
        if matches!(call.form, Form::Sigmoid { .. }) {
            call.u.target = call.u.share;
        }
        let (lambdas, joint) = call.form.softmaxes();
        if call.drawn.is_none() {
            call.anchored = self.tally_both(call, lambdas)?;
        }
        if joint {
            let row_all = self.tallied(call, 0, true)?;
            return self.softmax(call, 0, lambdas[0], true, row_all);
        }
        let wanted: Vec<usize> = [0, 1].into_iter().filter(|&which| lambdas[which] > 0.0).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let mut soften = vec![];
        for (&which, slots) in wanted.iter().zip(self.tally(call, &wanted)?) {
            let merge = self.merge(call, which, slots);
            let normalise = self.normalise(call, which, lambdas[which])?;
            soften.push(([blocks(call.side(which).rows, 256), 1], abi::Soften { merge, normalise }));
        }
        self.run_each(&e::SOFTEN, &soften)
    }

    /// Tallies of the rows (`which` 0) or columns, one each, in the slot "tally"; with smoothing, sums over all logits; for
    /// `joint` the log-sum-exp of all, in the slot "joint".
    fn tallied(&mut self, call: &Call, which: usize, joint: bool) -> Result<*const [f32; 2], CudaError> {
        let n = call.side(which).rows;
        let slots = match call.drawn {
            Some(drawn) => TallySlots { tallies: self.tally_pairings(call, drawn)?, all: null(), count: 1 },
            None => self.tally(call, &[which])?[0],
        };
        let row: *mut [f32; 4] = self.arena.get("tally", n)?;
        let row_all: *mut [f32; 2] =
            if slots.all.is_null() { null_mut() } else { self.arena.get("tally of all", n)? };
        let block: *mut [f32; 2] = self.arena.get("tally of blocks", n.div_ceil(256))?;
        let args = abi::Merge { row, row_all, block, ..self.merge(call, which, slots) };
        self.run(&e::MERGE, [blocks(n, 256), 1, 1], &args)?;
        if joint {
            let out = self.arena.get("joint", 1)?;
            let args = abi::Total { block, out, blocks: blocks(n, 256), reserved: 0 };
            self.run(&e::TOTAL, [1, 1, 1], &args)?;
        }
        Ok(row_all)
    }

    /// The softmax of what [`Self::tallied`] left, its targets and its part of the loss.
    fn softmax(
        &mut self,
        call: &mut Call,
        which: usize,
        lambda: f64,
        joint: bool,
        row_all: *const [f32; 2],
    ) -> Result<(), CudaError> {
        let n = call.side(which).rows;
        let joint: *mut [f32; 2] = if joint { self.arena.get("joint", 1)? } else { null_mut() };
        let args =
            abi::Normalise { row: self.arena.get("tally", n)?, row_all, joint, ..self.normalise(call, which, lambda)? };
        self.run(&e::NORMALISE, [blocks(n, 256), 1, 1], &args)
    }

    /// Slots of the rows (`which` 0) or columns into tallies that go nowhere.
    fn merge(&self, call: &Call, which: usize, slots: TallySlots) -> abi::Merge {
        let logits = call.logits(&call.u, &call.v);
        abi::Merge {
            tallies: slots.tallies,
            all: slots.all,
            row: null_mut(),
            row_all: null_mut(),
            block: null_mut(),
            sums: call.anchored.map_or(null(), |a| a.sums[which]),
            flags: logits.flags,
            live: logits.live,
            scale: logits.scale,
            sum_slots: call.anchored.map_or(0, |a| a.slots[which] as u32),
            blocks: logits.blocks,
            n: call.side(which).rows as u32,
            slots: slots.count as u32,
            reserved: 0,
        }
    }

    /// Tallies from nowhere into the softmaxes of the rows (`which` 0) or columns, which get their slots; of rows, not of all.
    fn normalise(&mut self, call: &mut Call, which: usize, lambda: f64) -> Result<abi::Normalise, CudaError> {
        let slots = [&U, &V][which];
        let [n, opposite] = [which, 1 - which].map(|which| call.side(which).rows);
        let norm: *mut abi::Norm = self.arena.get(slots.norm, n)?;
        let target: *mut f32 = self.arena.get(slots.target, n)?;
        let far = match call.anchored {
            Some(_) => self.arena.get(slots.far, n.div_ceil(256))?,
            None => null_mut(),
        };
        let loss: *mut f64 = self.arena.get(slots.losses, n.div_ceil(256))?;
        let side = if which == 0 { &mut call.u } else { &mut call.v };
        (side.norm, side.target, side.far, side.losses) = (norm, target, far, (loss.cast_const(), n.div_ceil(256)));
        Ok(abi::Normalise {
            row: null(),
            row_all: null(),
            positives: side.positives,
            share: side.share,
            joint: null(),
            norm,
            target,
            far,
            live: call.live,
            loss,
            n: n as u32,
            opposite: opposite as f32,
            lambda: lambda as f32,
            smoothing: call.smoothing as f32,
            scale: call.logits(&call.u, &call.v).scale,
            reserved: 0,
        })
    }

    /// Sums over the plain pairs of both sides, where unit rows bound the logits and one exponential can serve both.
    fn tally_both(&mut self, call: &Call, lambdas: [f64; 2]) -> Result<Option<Anchored>, CudaError> {
        let (u, v) = (&call.u, &call.v);
        let bounded = call.unit && u.shift.is_null() && v.shift.is_null() && call.smoothing == 0.0;
        // With fewer rows than two spans there are no plain pairs.
        let span = abi::SPAN as usize;
        let some = u.rows.max(v.rows) >= 2 * span && u.rows.min(v.rows) >= span && !u.span.is_null();
        if !(self.hopper && bounded && some && lambdas != [0.0; 2]) {
            return Ok(None);
        }
        let tiles = [u.rows.div_ceil(abi::HOPPER_ROWS as usize), v.rows.div_ceil(abi::HOPPER_COLS as usize)];
        let [down, across] = rectangle(tiles, self.card.multiprocessors() as usize);
        let [groups, splits] = [tiles[0].div_ceil(down), tiles[1].div_ceil(across)];
        let row_sums: *mut f32 = self.arena.get("anchored sums of rows", 2 * splits * u.rows)?;
        let col_sums: *mut f32 =
            if lambdas[1] > 0.0 { self.arena.get("anchored sums of columns", groups * v.rows)? } else { null_mut() };
        let flags: *mut u32 = self.arena.get("flags", groups * splits)?;
        let args = abi::HopperTallyBoth {
            maps: [
                self.map(call, u.halves, [u.rows, call.dim], call.pitch, abi::HOPPER_ROWS)?,
                self.map(call, v.halves, [v.rows, call.dim], call.pitch, abi::HOPPER_COLS / 2)?,
            ],
            logits: call.logits(u, v),
            row_sums,
            col_sums,
            flags,
            down: down as u32,
            across: across as u32,
        };
        self.run(&call.kernels.hopper.both, [splits as u32, groups as u32, 1], &args)?;
        Ok(Some(Anchored { sums: [row_sums, col_sums], slots: [2 * splits, groups], flags, blocks: groups * splits }))
    }

    /// Tallies of the rows (0) and columns (1) that are `wanted`, but of the plain pairs if those have been tallied; with
    /// smoothing, sums over all logits.
    fn tally(&mut self, call: &Call, wanted: &[usize]) -> Result<Vec<TallySlots>, CudaError> {
        let (tile, per_split) = if self.hopper { (abi::HOPPER_COLS, 1) } else { (abi::TILE, 2) };
        let down = |which: usize| call.side(which).rows.div_ceil(abi::TILE as usize);
        // Row tiles may leave multiprocessors idle: then their columns are split, as far as all blocks run at once.
        let most = self.card.multiprocessors() as usize / wanted.iter().map(|&which| down(which)).sum::<usize>();
        let with_all = call.smoothing > 0.0;
        let (mut slots, mut args) = (vec![], vec![]);
        for &which in wanted {
            let (this, other) = (call.side(which), call.side(1 - which));
            let across = other.rows.div_ceil(tile as usize);
            let tiles = across.div_ceil(most.clamp(1, across));
            let splits = across.div_ceil(tiles);
            let count = per_split * splits;
            let names = [&U, &V][which];
            let tallies: *mut [f32; 4] = self.arena.get(names.tallies, count * this.rows)?;
            let all: *mut [f32; 2] =
                if with_all { self.arena.get(names.tallies_of_all, count * this.rows)? } else { null_mut() };
            let logits = call.logits(this, other);
            let tally = abi::Tally { logits, slots: tallies, all, tiles: tiles as u32, reserved: 0 };
            slots.push(TallySlots { tallies, all, count });
            args.push(([splits as u32, down(which) as u32], tally));
        }
        if self.hopper {
            let maps = |l: &Logits| -> Result<_, CudaError> {
                let map = |at, rows: u32, tile| self.map(call, at, [rows as usize, call.dim], call.pitch, tile);
                Ok([map(l.u, l.n, abi::HOPPER_ROWS)?, map(l.v, l.m, abi::HOPPER_COLS)?])
            };
            let (grid, abi::Each(tallies)) = each(&args);
            let maps = [maps(&tallies[0].logits)?, maps(&tallies[1].logits)?];
            self.run(&call.kernels.hopper.tally[usize::from(with_all)], grid, &abi::HopperTally { maps, tallies })?;
        } else {
            self.run_each(&call.kernels.tally[usize::from(with_all)], &args)?;
        }
        Ok(slots)
    }

    /// `gain G V` and `gain G' U`, chunk by chunk; G is the sum of `parts`.
    fn pull(
        &mut self,
        call: &Call,
        parts: &[Part],
        gain: f64,
        sums: Option<(*mut f32, *mut f32)>,
        acc_u: Sums,
        acc_v: Option<Sums>,
    ) -> Result<(), CudaError> {
        let (n, m, dim) = (call.u.rows, call.v.rows, call.dim);
        let (tile, row_slots, col_slots) = self.slots();
        let [carry_u, carry_v] = [call.u, call.v].map(|side| Carried { at: side.halves, dim, pitch: call.pitch });
        for row in (0..n).step_by(self.chunk) {
            for col in (0..m).step_by(self.chunk) {
                for (k, part) in parts.iter().enumerate() {
                    let mut args = self.chunk_at(call, part, gain, [row, col])?;
                    let (rows, cols) = (args.rows as usize, args.cols as usize);
                    let (by_row, by_col) = (row_slots * cols.div_ceil(tile), col_slots * rows.div_ceil(128));
                    // The factored law always sums.
                    if sums.is_some() || part.factor.is_some() {
                        args.row_sums = self.arena.get("row sums of tiles", by_row * rows)?;
                        args.col_sums = self.arena.get("column sums of tiles", by_col * cols)?;
                    }
                    if let Some(logits) = part.factor {
                        let g = self.arena.get("factor", rows * args.pitch as usize)?;
                        let plain = abi::Pull { logits, g, gain: 1.0, ..args };
                        self.chunk_of_g(call, Pulling::Plain, plain)?;
                        args.factor = g;
                    }
                    let pulling = match (call.form, part.factor) {
                        (_, Some(_)) => Pulling::Factored,
                        (Form::Sigmoid { .. }, _) => Pulling::Sigmoid,
                        _ if sums.is_some() => Pulling::SoftmaxSums,
                        _ => Pulling::Softmax,
                    };
                    self.chunk_of_g(call, pulling, args)?;
                    let (later_col, later_row) = (col > 0 || k > 0, row > 0 || k > 0);
                    let gv = self.product(false, &args, carry_v, acc_u, later_col);
                    let gu = acc_v.map(|acc| self.product(true, &args, carry_u, acc, later_row));
                    self.multiply(call, [Some(gv), gu])?;
                    if let Some((row_sums, col_sums)) = sums {
                        let to = row_sums.wrapping_add(4 * row);
                        self.fold(args.row_sums.cast(), by_row, 4 * rows, (to, later_col))?;
                        let to = col_sums.wrapping_add(col);
                        self.fold(args.col_sums, by_col, cols, (to, later_row))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Columns of a tile; slots of row sums a column tile, of column sums a row tile.
    fn slots(&self) -> (usize, usize, usize) {
        if self.hopper { (abi::HOPPER_COLS as usize, 1, 8) } else { (abi::TILE as usize, 2, 4) }
    }

    /// The chunk of `gain G` of `part` whose first pair is (`row`, `col`), without sums.
    fn chunk_at(
        &mut self,
        call: &Call,
        part: &Part,
        gain: f64,
        [row, col]: [usize; 2],
    ) -> Result<abi::Pull, CudaError> {
        let (n, m) = (call.u.rows, call.v.rows);
        // One pitch for all chunks of a call.
        let pitch = self.chunk.min(m).next_multiple_of(8);
        let g: *mut u16 = self.arena.get("g", self.chunk.min(n) * pitch)?;
        let (bias, smoothing) = match call.form {
            Form::Sigmoid { .. } if !call.live.is_null() => (0.0, call.smoothing as f32),
            Form::Sigmoid { bias } => ((bias * LOG2_E) as f32, call.smoothing as f32),
            _ => (0.0, 0.0),
        };
        Ok(abi::Pull {
            logits: call.logits(&call.u, &call.v),
            norm_u: part.norm_u,
            target_u: part.target_u,
            norm_v: part.norm_v,
            target_v: part.target_v,
            far_u: part.far[0],
            far_v: part.far[1],
            factor: null(),
            g,
            row_sums: null_mut(),
            col_sums: null_mut(),
            row: row as u32,
            col: col as u32,
            rows: self.chunk.min(n - row) as u32,
            cols: self.chunk.min(m - col) as u32,
            pitch: pitch as u32,
            gain: gain as f32,
            bias,
            smoothing,
        })
    }

    fn chunk_of_g(&self, call: &Call, pulling: Pulling, args: abi::Pull) -> Result<(), CudaError> {
        let (rows, cols, l) = (args.rows as usize, args.cols as usize, args.logits);
        if self.hopper {
            let (depth, pitch) = (l.depth as usize, l.pitch as usize);
            // In turns warpgroups have half a tile each.
            let half = matches!(pulling, Pulling::Softmax);
            let cols_of_box = if half { abi::HOPPER_COLS / 2 } else { abi::HOPPER_COLS };
            let maps = [
                self.map(call, l.u, [l.n as usize, depth], pitch, abi::HOPPER_ROWS)?,
                self.map(call, l.v, [l.m as usize, depth], pitch, cols_of_box)?,
                self.map(call, args.g, [rows, cols], args.pitch as usize, 64)?,
            ];
            let hopper = &call.kernels.hopper;
            let kernel = match pulling {
                Pulling::Softmax => &hopper.softmax[0],
                Pulling::SoftmaxSums => &hopper.softmax[1],
                Pulling::Sigmoid => &hopper.sigmoid,
                Pulling::Plain => &hopper.plain,
                Pulling::Factored => &hopper.factored,
            };
            let tiles = rows.div_ceil(abi::HOPPER_ROWS as usize) * cols.div_ceil(abi::HOPPER_COLS as usize);
            return self.run(kernel, [self.resident(tiles), 1, 1], &abi::HopperPull { maps, pull: args });
        }
        let kernel = match pulling {
            Pulling::Softmax => &call.kernels.softmax[0],
            Pulling::SoftmaxSums => &call.kernels.softmax[1],
            Pulling::Sigmoid => &call.kernels.sigmoid,
            Pulling::Plain => &call.kernels.plain,
            Pulling::Factored => &call.kernels.factored,
        };
        self.run(kernel, [blocks(cols, abi::TILE as usize), blocks(rows, abi::TILE as usize), 1], &args)
    }

    /// Where the sums of `[rows, others]` pairs' G times rows of `dim` numbers are: in `out`, if they may be (aligned for two
    /// numbers at once) and one part suffices. Tiles of a chunk may leave part of the card idle, at the end or from the start: then k is cut into parts.
    fn sums(
        &mut self,
        slot: &'static str,
        out: Out,
        [rows, others]: [usize; 2],
        dim: usize,
    ) -> Result<Sums, CudaError> {
        let tile = if self.hopper { abi::HOPPER_COLS } else { abi::TILE };
        let down = [rows, others].map(|len| len.min(self.chunk).div_ceil(abi::TILE as usize));
        let tiles = (down[0] + down[1]) * dim.div_ceil(tile as usize);
        let k = others.min(self.chunk);
        let parts = parts(tiles, self.card.multiprocessors() as usize);
        let depth = k.div_ceil(parts).next_multiple_of(64);
        let parts = k.div_ceil(depth);
        let at = match out {
            Some(Write::Set(at)) if parts == 1 && at.addr().is_multiple_of(8) => at,
            _ => self.arena.get(slot, parts * rows * dim)?,
        };
        Ok(Sums { at, rows, dim, depth, parts })
    }

    /// `acc (+)= G other`, or with `transposed` G' times the rows of the chunk.
    fn product(&self, transposed: bool, chunk: &abi::Pull, other: Carried, acc: Sums, add: bool) -> abi::Gemm {
        let (rows, cols) = ((chunk.rows, chunk.row as usize), (chunk.cols, chunk.col as usize));
        let ((m, to), (k, first)) = if transposed { (cols, rows) } else { (rows, cols) };
        abi::Gemm {
            a: chunk.g.cast_const().cast(),
            b: other.at.wrapping_add(first * other.pitch).cast(),
            c: acc.at.wrapping_add(to * acc.dim),
            m,
            n: acc.dim as u32,
            k,
            depth: acc.depth.min(k.next_multiple_of(64) as usize) as u32,
            pitch_a: chunk.pitch,
            pitch_b: other.pitch as u32,
            pitch_c: acc.dim as u32,
            add: u32::from(add),
            part: (acc.rows * acc.dim) as u64,
        }
    }

    /// [`Self::product`]s of a chunk, the plain one and the transposed.
    fn multiply(&self, call: &Call, gemms: [Option<abi::Gemm>; 2]) -> Result<(), CudaError> {
        let tile = if self.hopper { abi::HOPPER_COLS } else { abi::TILE } as usize;
        // Down, across, parts.
        let tiles = |g: &abi::Gemm| {
            let [m, n, k, depth] = [g.m, g.n, g.k, g.depth].map(|x| x as usize);
            [blocks(m, abi::TILE as usize), blocks(n, tile), blocks(k, depth)]
        };
        if !self.hopper {
            for (gemm, kernel) in gemms.iter().zip([&call.kernels.gv, &call.kernels.gu]) {
                if let Some(gemm) = gemm {
                    let [down, across, parts] = tiles(gemm);
                    self.run(kernel, [across, down, parts], gemm)?;
                }
            }
            return Ok(());
        }
        let map = |g: &abi::Gemm, transposed: bool| {
            let [m, n, k] = [g.m, g.n, g.k].map(|x| x as usize);
            let (stored, tile) = if transposed { ([k, m], 64) } else { ([m, k], abi::HOPPER_ROWS) };
            Ok([
                self.map(call, g.a.cast(), stored, g.pitch_a as usize, tile)?,
                self.map(call, g.b.cast(), [k, n], g.pitch_b as usize, 64)?,
            ])
        };
        let count = gemms.iter().flatten().map(|g| tiles(g).iter().product::<u32>() as usize).sum();
        // What is not wanted has the other's maps and no rows.
        let Some(any) = gemms[0].or(gemms[1]) else { return Ok(()) };
        let [one, other] = gemms.map(|g| g.unwrap_or(abi::Gemm { m: 0, ..any }));
        let maps = match gemms {
            [Some(gv), Some(gu)] => [map(&gv, false)?, map(&gu, true)?],
            [_, Some(gu)] => [map(&gu, true)?; 2],
            _ => [map(&any, false)?; 2],
        };
        let [[a, b], [c, d]] = maps;
        let args = abi::HopperGemm { maps: [a, b, c, d], gemms: [one, other] };
        self.run(&call.kernels.hopper.gemm, [self.resident(count), 1, 1], &args)
    }

    #[allow(clippy::too_many_arguments, reason = "one launch")]
    fn finish(
        &self,
        call: &Call,
        side: &Side,
        gain: f64,
        acc: Sums,
        out: Out,
        g_sums: Option<(*mut f32, u32)>,
        along: *mut f64,
    ) -> Result<(), CudaError> {
        let (out, add) = match out {
            None => (null_mut(), 0),
            Some(Write::Set(at)) => (at, 0),
            Some(Write::Add(at)) => (at, 1),
        };
        let scale = if call.squared { -2.0 * call.tilt } else { call.tilt };
        let (g_sums, g_stride) = g_sums.unwrap_or((null_mut(), 0));
        let args = abi::Finish {
            acc: acc.at,
            x: side.halves,
            inverse: side.inverse,
            g_sums,
            out,
            along,
            live: call.live,
            rows: side.rows as u32,
            dim: call.dim as u32,
            pitch: call.pitch as u32,
            scale: (scale / gain) as f32,
            gain: gain as f32,
            g_stride,
            add,
            parts: acc.parts as u32,
        };
        self.run(&call.kernels.finish, [blocks(side.rows, 8), 1, 1], &args)
    }

    /// All `sums`, of one block each: parts first, then the parts where there are several.
    fn total(&mut self, sums: &[abi::Totals]) -> Result<(), CudaError> {
        let slots: *mut f64 = self.arena.get("totals of parts", sums.len() * PARTS * 4)?;
        let (mut first, mut then) = (vec![], vec![]);
        for (k, &sum) in sums.iter().enumerate() {
            // Four rows a thread are less than another launch.
            let parts = sum.n.div_ceil(1024).min(PARTS as u32);
            if parts > 1 {
                let slots = slots.wrapping_add(k * PARTS * 4);
                first.push(([parts, 1], abi::Totals { out: slots, blocks: parts, ..sum }));
                then.push(([1, 1], abi::Totals { singles: null(), doubles: slots, n: parts, ..sum }));
            } else {
                first.push(([1, 1], sum));
            }
        }
        self.run_each(&e::TOTALS, &first)?;
        if then.is_empty() { Ok(()) } else { self.run_each(&e::TOTALS, &then) }
    }

    fn upload(&mut self, matrix: Matrix<'_>, slot: &'static str) -> Result<CardRows, CudaError> {
        let (at, singles): (*const (), bool) = match matrix.data {
            Storage::F32(x) => (self.put(slot, x)?.cast_const().cast(), true),
            Storage::Bf16(x) => (self.put(slot, x)?.cast_const().cast(), false),
            Storage::F16(x) => (self.put(slot, x)?.cast_const().cast(), false),
        };
        Ok(CardRows { at, singles, rows: matrix.rows, dim: matrix.dim })
    }

    fn put_features(&mut self, matrix: Matrix<'_>, slot: &'static str) -> Result<CardRows, CudaError> {
        let at = self.put(slot, &mmd::singles(matrix))?;
        Ok(CardRows { at: at.cast_const().cast(), singles: true, rows: matrix.rows, dim: matrix.dim })
    }

    fn put<T: Pod>(&mut self, slot: &'static str, data: &[T]) -> Result<*mut T, CudaError> {
        put(&self.card, &mut self.arena, slot, data)
    }

    fn map(
        &self,
        call: &Call,
        at: *const u16,
        [rows, cols]: [usize; 2],
        pitch: usize,
        tile: u32,
    ) -> Result<TensorMap, CudaError> {
        let dims =
            [Dim { size: cols as u64, stride: 2, tile: 64 }, Dim { size: rows as u64, stride: 2 * pitch as u64, tile }];
        self.card.tensor_map(&MapSpec { base: at.cast(), precision: call.kernels.precision, dims })
    }

    /// Blocks of a kernel that walks over tiles by itself.
    fn resident(&self, tiles: usize) -> u32 {
        tiles.min(self.card.multiprocessors() as usize) as u32
    }

    /// One launch of at least one piece of work.
    fn run_each<A: abi::Args, const N: usize>(
        &self,
        kernel: &Kernel<abi::Each<A, N>>,
        work: &[([u32; 2], A)],
    ) -> Result<(), CudaError> {
        let (grid, args) = each(work);
        self.run(kernel, grid, &args)
    }

    pub(super) fn run<A: abi::Args>(&self, kernel: &Kernel<A>, grid: [u32; 3], args: &A) -> Result<(), CudaError> {
        if grid[1..].iter().any(|&n| n > 65_535) {
            return Err(CudaError::Grid { kernel: kernel.name, grid });
        }
        // SAFETY: every address in `args` is of a slot of the arena that was asked for at the extent the kernel's argument
        // states, or of a part of a caller's buffer, which its view checked and its verb sizes; what a kernel writes is
        // scratch that only this engine's queue of work touches, or the caller's output, borrowed mutably.
        unsafe { self.card.launch(kernel, grid, args) }
    }
}

impl<C: Card> Engine for Cuda<C> {
    /// The embeddings go to the card, the gradients come back; [`LossError::Parameter`] for what only the CPU evaluates,
    /// [`LossError::Device`] for what the card refuses.
    fn loss(&mut self, loss: &Loss, batch: &Batch<'_>, gradients: Gradients<'_>) -> Result<Value, LossError> {
        batch.validate(loss)?;
        gradients.validate(batch)?;
        let precision = match (batch.u.data, batch.v.data) {
            (Storage::Bf16(_), Storage::Bf16(_)) => Precision::Bf16,
            (Storage::F16(_), Storage::F16(_)) => Precision::F16,
            (Storage::F32(_), Storage::F32(_)) => self.precision,
            _ => return Err(only_cpu("storage", "two types", "one type for u and v on a card")),
        };
        let (u, v) = (self.upload(batch.u, "input u")?, self.upload(batch.v, "input v")?);
        let offset = match batch.offset_v {
            Some(x) => self.put("offset of v", x)?.cast_const(),
            None => null(),
        };
        let features = batch.moments.as_ref().map(mmd::features).transpose()?;
        let features = match features {
            Some([u, v]) => Some([self.put_features(u, "data of u")?, self.put_features(v, "data of v")?]),
            None => None,
        };
        let mut host = [gradients.u, gradients.v];
        let mut out = [None; 2];
        for (which, (host, out)) in host.iter_mut().zip(&mut out).enumerate() {
            let (slot, rows) = [("gradient of u", u.rows), ("gradient of v", v.rows)][which];
            *out = match host {
                Some(Write::Set(_)) => Some(Write::Set(self.arena.get(slot, rows * u.dim)?)),
                Some(Write::Add(x)) => Some(Write::Add(self.put(slot, x)?)),
                None => None,
            };
        }
        let inputs = Inputs { rows: [u, v], features, offset };
        let value = self.evaluate(loss, precision, inputs, batch, out, gradients.offset_v)?;
        for (slot, host) in ["gradient of u", "gradient of v"].into_iter().zip(host) {
            if let Some(Write::Set(x) | Write::Add(x)) = host {
                self.arena.download(slot, x)?;
            }
        }
        Ok(value)
    }

    fn scratch_bytes(&self) -> usize {
        let verbs = self.verbs.lock().unwrap_or_else(PoisonError::into_inner).bytes();
        self.arena.bytes() + self.counts.bytes() + verbs
    }
}

/// Which softmaxes and which law an objective takes.
#[derive(Clone, Copy)]
enum Form {
    Conditional { lambda_u: f64, lambda_v: f64 },
    Joint,
    Sigmoid { bias: f64 },
    Mmd { lambda_u: f64, lambda_v: f64 },
    JointMmd,
}

impl Form {
    /// Weights of the row and the column softmaxes, and whether one softmax is over all pairs.
    fn softmaxes(self) -> ([f64; 2], bool) {
        match self {
            Form::Conditional { lambda_u, lambda_v } => ([0.5 * lambda_v, 0.5 * lambda_u], false),
            Form::Mmd { lambda_u, lambda_v } => ([lambda_v, lambda_u], false),
            Form::Joint | Form::JointMmd => ([1.0, 0.0], true),
            Form::Sigmoid { .. } => ([0.0; 2], false),
        }
    }

    fn of(loss: &Loss) -> Self {
        match loss.objective {
            Objective::Conditional { lambda_u, lambda_v } => Form::Conditional { lambda_u, lambda_v },
            Objective::Joint | Objective::JointShuffled { .. } => Form::Joint,
            Objective::Sigmoid { bias } => Form::Sigmoid { bias },
            Objective::Mmd { lambda_u, lambda_v } => Form::Mmd { lambda_u, lambda_v },
            Objective::JointMmd => Form::JointMmd,
        }
    }
}

/// A loss whose launches the card has.
struct Given {
    call: Call,
    /// What G was multiplied by.
    gain: f64,
    /// The loss, where the host knows it.
    known: Option<f64>,
}

/// What the launches of one call share.
struct Call {
    kernels: &'static Kernels,
    /// dS/d product.
    tilt: f64,
    squared: bool,
    unit: bool,
    /// See [`abi::Temper`]; then `tilt` and the bias are those of tau = 1 and 0.
    live: *const f32,
    smoothing: f64,
    dim: usize,
    pitch: usize,
    form: Form,
    drawn: Option<Drawn>,
    u: Side,
    v: Side,
    anchored: Option<Anchored>,
}

/// The pairings that stand for all pairs, in the joint loss.
#[derive(Clone, Copy)]
struct Drawn {
    pairings: u32,
    seed: u64,
}

/// What a loss is made of.
struct Terms {
    /// What the losses by rows, by columns and of the sums count; 0: not at all.
    weights: [f64; 3],
    /// Whether the log of the sum over all pairs, in the slot "joint", is added.
    normaliser: bool,
    /// Added.
    constant: f64,
}

/// What [`abi::HopperTallyBoth`] made of the plain pairs.
#[derive(Clone, Copy)]
struct Anchored {
    /// Of rows and of columns.
    sums: [*const f32; 2],
    slots: [usize; 2],
    flags: *const u32,
    blocks: usize,
}

impl Call {
    /// u (`which` 0) or v.
    fn side(&self, which: usize) -> &Side {
        if which == 0 { &self.u } else { &self.v }
    }

    /// Whether d tau is made of sums of G times its lever: where that is G V's `<u, dU>` instead, it has what rounding G to
    /// halves left of its sum, which for MMD should be nothing, times what all logits have in common.
    fn levered(&self) -> bool {
        self.squared || matches!(self.form, Form::Mmd { .. } | Form::JointMmd)
    }

    fn logits(&self, rows: &Side, cols: &Side) -> Logits {
        // |u - v|^2 = |u|^2 + |v|^2 - 2 <u, v>; the norms are the shifts.
        let scale = if self.squared { -2.0 * self.tilt } else { self.tilt };
        Logits {
            u: rows.halves,
            v: cols.halves,
            shift_u: rows.shift,
            shift_v: cols.shift,
            id_u: rows.id,
            id_v: cols.id,
            ignore_u: rows.ignore,
            ignore_v: cols.ignore,
            live: self.live,
            span_u: rows.span,
            span_v: cols.span,
            flags: self.anchored.map_or(null(), |a| a.flags),
            n: rows.rows as u32,
            m: cols.rows as u32,
            depth: self.dim as u32,
            pitch: self.pitch as u32,
            scale: (scale * LOG2_E) as f32,
            blocks: self.anchored.map_or(0, |a| a.blocks as u32),
        }
    }

    /// What the loss is made of, of a `share` of it; `known` where the host knows it.
    fn terms(&self, share: Share, known: Option<f64>) -> Terms {
        let [n, m] = share.whole.unwrap_or([self.u.rows, self.v.rows]).map(|count| count as f64);
        let own = |own: bool, weight: f64| if own { weight } else { 0.0 };
        let all = share.rows && share.cols;
        let terms = |by_row: f64, by_col: f64, summed: f64, constant: f64| Terms {
            weights: [own(share.rows, by_row), own(share.cols, by_col), summed],
            normaliser: false,
            constant: own(all, constant),
        };
        match self.form {
            Form::Conditional { lambda_u, lambda_v } => {
                let (by_row, by_col) = (0.5 * lambda_v, 0.5 * lambda_u);
                terms(by_row, by_col, 0.0, -by_row * m.ln() - by_col * n.ln())
            }
            Form::Joint => Terms { normaliser: all, ..terms(-1.0, 0.0, 0.0, -n.ln() - self.columns(m).ln()) },
            // A residual's loss has its lambda.
            Form::Mmd { lambda_u, lambda_v } => {
                let [by_row, by_col] = [lambda_v, lambda_u].map(|lambda| f64::from(u8::from(lambda > 0.0)));
                terms(by_row, by_col, 0.0, 0.0)
            }
            Form::JointMmd => terms(0.0, 0.0, 0.0, known.expect("the host has its residual")),
            Form::Sigmoid { .. } => terms(0.0, 0.0, 1.0, 0.0),
        }
    }

    /// Pairs of a row that the joint loss is normalised by, of `m` there are.
    fn columns(&self, m: f64) -> f64 {
        self.drawn.map_or(m, |drawn| f64::from(drawn.pairings))
    }

    /// The one part of G that all but MMD have.
    fn part(&self) -> Part {
        Part {
            norm_u: self.u.norm,
            target_u: self.u.target,
            norm_v: self.v.norm,
            target_v: self.v.target,
            far: [self.u.far, self.v.far],
            factor: None,
        }
    }

    /// No element of G of this part is larger.
    fn bound(&self, counts: &Counts) -> f64 {
        let largest = |share: &[f32]| f64::from(share.iter().copied().fold(0.0, f32::max));
        let (by_row, by_col) = (largest(&counts.row_share), largest(&counts.col_share));
        match self.form {
            Form::Conditional { lambda_u, lambda_v } => 0.5 * (lambda_v * by_row + lambda_u * by_col),
            Form::Joint => 1.0 + by_row,
            Form::Sigmoid { .. } => by_row,
            Form::Mmd { .. } | Form::JointMmd => unreachable!("its residuals bound it"),
        }
    }
}

/// The least and the largest id of each span of rows, see [`Logits::span_u`]. An `ignored` pair could be anywhere.
fn spans(ids: &[u32], ignored: bool) -> Vec<[u32; 2]> {
    let span = |ids: &[u32]| match (ids.iter().min(), ids.iter().max()) {
        (Some(&low), Some(&high)) if ids.len() == abi::SPAN as usize && !ignored => [low, high],
        _ => abi::NO_SPAN,
    };
    ids.chunks(abi::SPAN as usize).map(span).collect()
}

/// Rows and columns of tiles a block takes of `tiles`, at most `blocks` of them: the blocks with most have as few as can be,
/// and then each tile row and column is cut as seldom as can be.
fn rectangle([rows, cols]: [usize; 2], blocks: usize) -> [usize; 2] {
    let of = |groups: usize| {
        let (down, most) = (rows.div_ceil(groups), blocks / groups);
        [down, cols.div_ceil(most.min(cols))]
    };
    let cost = |[down, across]: &[usize; 2]| (down * across, rows.div_ceil(*down) + cols.div_ceil(*across));
    (1..=blocks.min(rows)).map(of).min_by_key(cost).unwrap_or([rows, cols])
}

/// Into how many parts k is cut of products with `tiles` tiles, on a card of so many `multiprocessors`: those whose waves take the
/// least time, where a wave of tiles of all k takes 1. A part more is a copy more to write and to add up, which is taken for a
/// sixteenth (unmeasured).
fn parts(tiles: usize, multiprocessors: usize) -> usize {
    let time = |parts: usize| (tiles * parts).div_ceil(multiprocessors) as f64 / parts as f64 + parts as f64 / 16.0;
    (1..=MOST_PARTS).min_by(|a, b| time(*a).total_cmp(&time(*b))).unwrap_or(1)
}

/// A power of two that brings G as close to the end of f16's range as its bound allows.
fn gain(bound: f64) -> f64 {
    (32768.0 / bound.clamp(1e-30, 1e30)).log2().floor().exp2()
}

fn only_cpu(what: &'static str, found: &str, expected: &'static str) -> LossError {
    LossError::Parameter { what, found: found.into(), expected: expected.into() }
}

fn wrong_len(what: &'static str, found: usize, expected: String) -> LossError {
    LossError::Shape { what, found: format!("{found} elements"), expected }
}

/// Where embeddings on `card` and their gradients are, if they are there and their lengths go together.
fn addresses<T: Embedding, C: Card>(
    card: &Arc<C>,
    [u, v]: [&Buffer<T, C>; 2],
    dim: usize,
    gradients: [Option<Write<&mut Buffer<f32, C>>>; 2],
) -> Result<([CardRows; 2], [Out; 2]), LossError> {
    let mut rows = [CardRows { at: null(), singles: T::PRECISION == Precision::F32, rows: 0, dim }; 2];
    let mut out = [None; 2];
    let names = [("u", "gradient of u"), ("v", "gradient of v")];
    for (((x, gradient), name), (rows, out)) in
        [u, v].into_iter().zip(gradients).zip(names).zip(rows.iter_mut().zip(&mut out))
    {
        let elsewhere = |other: &Arc<C>| !Arc::ptr_eq(other, card);
        let out_elsewhere = matches!(&gradient, Some(Write::Set(to) | Write::Add(to)) if elsewhere(to.card()));
        if elsewhere(x.card()) || out_elsewhere {
            return Err(CudaError::OtherCard.into());
        }
        if dim == 0 || x.is_empty() || !x.len().is_multiple_of(dim) {
            return Err(wrong_len(name.0, x.len(), format!("rows of {dim} elements, at least one")));
        }
        (rows.at, rows.rows) = (x.ptr(..)?.cast(), x.len() / dim);
        *out = match gradient {
            Some(Write::Set(to) | Write::Add(to)) if to.len() != x.len() => {
                return Err(wrong_len(name.1, to.len(), format!("{} elements", x.len())));
            }
            Some(Write::Set(to)) => Some(Write::Set(to.ptr_mut(..)?)),
            Some(Write::Add(to)) => Some(Write::Add(to.ptr_mut(..)?)),
            None => None,
        };
    }
    Ok((rows, out))
}

/// Host numbers in a slot.
fn put<T: Pod, C: Card>(
    card: &Arc<C>,
    arena: &mut Arena<C>,
    slot: &'static str,
    data: &[T],
) -> Result<*mut T, CudaError> {
    let at: *mut T = arena.get(slot, data.len())?;
    // SAFETY: the slot holds as many numbers, in one allocation that lives as long as the arena.
    unsafe { card.upload(bytemuck::cast_slice(data), at.cast()) }?;
    Ok(at)
}

/// Ids as small numbers, equal where the ids are.
fn dense(u: &[i64], v: &[i64]) -> (Vec<u32>, Vec<u32>) {
    let mut known = HashMap::new();
    let mut number = |id: &i64| {
        let next = known.len() as u32;
        *known.entry(*id).or_insert(next)
    };
    (u.iter().map(&mut number).collect(), v.iter().map(&mut number).collect())
}

impl From<CudaError> for LossError {
    fn from(error: CudaError) -> Self {
        LossError::Device(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On 132 multiprocessors, for chunks of 4096 x 4096 and narrower embeddings, or smaller ones.
    #[test]
    fn products_are_cut_so_that_waves_are_full() {
        let of = |rows: usize, dim: usize| parts(2 * rows.div_ceil(128) * dim.div_ceil(256), 132);
        assert_eq!([128, 256, 512, 768, 1024].map(|dim| of(4096, dim)), [2, 2, 1, 2, 1]);
        assert_eq!([256, 512, 1024].map(|rows| of(rows, 512)), [4, 4, 4]);
        assert_eq!(parts(1, 1), 1);
    }
}
