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
mod call;
mod kernels;
mod memory;
mod mmd;
mod paired;
mod pull;
mod tally;

pub use block::{Block, Tallies};
pub use memory::{CardRows, Embedding, OnCard};

use super::card::{Arena, Card, Dim, MapSpec};
use super::verbs::Verbs;
use super::{CudaError, Module, runs};
use crate::device::Engine;
use crate::objective::{
    Batch, Gradients, Loss, LossError, Matrix, Moments, Objective, Pairs, Positives, Precision, Storage, Value, Write,
    counts::Counts,
};
use ::kernels::abi::{self, Kernel, TensorMap};
use ::kernels::entries as e;
use ::kernels::law::Product;
use bytemuck::Pod;
use call::{Call, Drawn, Form, Given, Share, Side, Slots, Terms, U, V, scalar};
use kernels::{BF16, F16};
use memory::{Out, addresses, elsewhere, features_at, fit};
use pull::CHUNK;
use std::collections::HashMap;
use std::f64::consts::{LN_2, LOG2_E};
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, PoisonError};

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

    /// Evaluates `loss` on `embeddings` that are on the card, u `[N, dim]` and v `[M, dim]`, whoever owns them, and `pairs` that
    /// are the host's; gradients stay on the card. The MMD losses take `features` of each row of u and of v.
    ///
    /// # Errors
    /// As [`Engine::loss`] of this engine; [`LossError::Shape`] for buffers of other lengths; [`LossError::Device`] for those of
    /// another card. [`LossError::NotFinite`] is found after the launches: gradients hold rubbish then, and its row is 0.
    pub fn loss_on_card<B: OnCard<C>>(
        &mut self,
        loss: &Loss,
        pairs: &Pairs<'_>,
        embeddings: [&B; 2],
        dim: usize,
        features: Option<[&B::Singles; 2]>,
        gradients: [Option<Write<&mut B::Singles>>; 2],
    ) -> Result<Value, LossError> {
        let card = Arc::clone(&self.card);
        let at = addresses(&card, embeddings, dim, gradients)?;
        let features = features.map(|features| features_at(&card, features, at.rows)).transpose()?;
        let data = features.as_ref().map(|(rows, _)| *rows);
        // SAFETY: by the contract of `OnCard`, for as long as `at` and `features` hold what they hold; lengths were checked, and
        // outputs are borrowed mutably.
        unsafe { self.loss_at(loss, self.rounded(B::Number::PRECISION), pairs, at.rows, data, at.out) }
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
        if let Some((out, add)) = out_offset.map(Write::split) {
            out.iter_mut().zip(&col_sums).for_each(|(o, g)| *o = if add { *o + g } else { *g });
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

/// The least and the largest id of each span of rows, see [`Logits::span_u`]. An `ignored` pair could be anywhere.
fn spans(ids: &[u32], ignored: bool) -> Vec<[u32; 2]> {
    let span = |ids: &[u32]| match (ids.iter().min(), ids.iter().max()) {
        (Some(&low), Some(&high)) if ids.len() == abi::SPAN as usize && !ignored => [low, high],
        _ => abi::NO_SPAN,
    };
    ids.chunks(abi::SPAN as usize).map(span).collect()
}

fn only_cpu(what: &'static str, found: &str, expected: &'static str) -> LossError {
    LossError::Parameter { what, found: found.into(), expected: expected.into() }
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
