//! Maximum mean discrepancy with feature maps, as attention: its passes over the chunks of S.
//!
//! ```text
//! residual  W = G' F_u with G of the conditional loss: lambda x_j (mean feature under column j's softmax less its target)
//! factor    <f_i, w_j> + offset_j, a chunk of plain logits of other rows; w_j is W_j over its length
//! pull      P_ij times the factor, the length in P's weight
//! ```
//!
//! and the same by rows. The joint loss has one residual, F_u' (exp(S - z) - T) F_v, small enough for the host.
//! A softmax less its target is rounded after the subtraction, so nothing is lost where they are close.

use super::call::{Call, Form, Side};
use super::memory::CardRows;
use super::pull::{Carried, PARTS, Part, Pulling, Sums, gain};
use super::{Cuda, blocks, only_cpu, prepare};
use crate::device::cuda::CudaError;
use crate::device::cuda::card::Card;
use crate::objective::{Batch, LossError, Matrix, Moments, Positives, Storage};
use kernels::abi::{self, Logits};
use kernels::entries as e;
use std::borrow::Cow;
use std::ptr::{null, null_mut};

/// Rows of a part of a product over all rows.
const PART: usize = 4096;

/// Names of one side's features in the arena.
struct Slots {
    halves: &'static str,
    shift: &'static str,
    target: &'static str,
    host_target: &'static str,
    host_rounded: &'static str,
    other: &'static str,
    residual: &'static str,
    offset: &'static str,
    losses: &'static str,
}

const SLOTS: [Slots; 2] = [
    Slots {
        halves: "features of u",
        shift: "mean features of u",
        target: "targets of u",
        host_target: "host targets of u",
        host_rounded: "host rounded targets of u",
        other: "factor of u",
        residual: "residual of u",
        offset: "offset of the factor of u",
        losses: "losses of residuals of v",
    },
    Slots {
        halves: "features of v",
        shift: "mean features of v",
        target: "targets of v",
        host_target: "host targets of v",
        host_rounded: "host rounded targets of v",
        other: "factor of v",
        residual: "residual of v",
        offset: "offset of the factor of v",
        losses: "losses of residuals of u",
    },
];

/// Features as products take them: `unit (f - shift)`, of length one at most.
struct Features {
    rows: Carried,
    count: usize,
    shift: *const f32,
    unit: f64,
}

/// The softmaxes of rows (`which` 1) or columns (0), and the features of the other side that they carry.
struct Softmaxes {
    which: usize,
    lambda: f64,
    features: CardRows,
    /// Mean features of the positives.
    target: *const f32,
}

/// What the gradient of an MMD loss is pulled by.
pub(super) struct Pulled {
    pub(super) parts: Vec<Part>,
    /// No element of G is larger.
    pub(super) bound: f64,
    /// The loss, where it is known already.
    pub(super) loss: Option<f64>,
}

/// The features that `moments` compare, on the host.
pub(super) fn features<'a>(moments: &Moments<'a>) -> Result<[Matrix<'a>; 2], LossError> {
    match *moments {
        Moments::Features { u, v } | Moments::Gram { kernel: crate::objective::DataKernel::Linear, u, v } => Ok([u, v]),
        Moments::Gram { .. } => Err(only_cpu(
            "kernel on data",
            "the exact gaussian",
            "random features of it, or the linear kernel, on a card; or the CPU engine",
        )),
    }
}

/// The numbers of a matrix in f32.
pub(super) fn singles(matrix: Matrix<'_>) -> Cow<'_, [f32]> {
    match matrix.data {
        Storage::F32(x) => x.into(),
        Storage::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        Storage::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
    }
}

/// The power of two at or below `1/x`; one where `x` says nothing.
fn inverse_power(x: f64) -> f64 {
    if x > 0.0 && x.is_finite() { (-x.log2().ceil().clamp(-60.0, 60.0)).exp2() } else { 1.0 }
}

impl<C: Card> Cuda<C> {
    /// Residuals, and what each of the loss' parts pulls; the softmaxes are there, with their targets.
    pub(super) fn residuals(
        &mut self,
        call: &mut Call,
        batch: &Batch<'_>,
        features: [CardRows; 2],
    ) -> Result<Pulled, LossError> {
        let targets = self.targets(batch, features)?;
        match call.form {
            Form::JointMmd => Ok(self.joint_residual(call, features, targets[1])?),
            Form::Mmd { lambda_u, lambda_v } => {
                let mut pulled = Pulled { parts: vec![], bound: 0.0, loss: None };
                for (which, lambda) in [lambda_u, lambda_v].into_iter().enumerate() {
                    if lambda > 0.0 {
                        let softmaxes = Softmaxes { which, lambda, features: features[which], target: targets[which] };
                        let (part, bound) = self.conditional_residual(call, batch, softmaxes)?;
                        pulled.parts.push(part);
                        pulled.bound += bound;
                    }
                }
                Ok(pulled)
            }
            _ => unreachable!("no other loss has moments"),
        }
    }

    /// Mean features of each column's and each row's positives.
    fn targets(&mut self, batch: &Batch<'_>, own: [CardRows; 2]) -> Result<[*const f32; 2], LossError> {
        let mut targets = own.map(|rows| rows.at.cast());
        if matches!(batch.pairs.positives, Positives::Diagonal) {
            return Ok(targets);
        }
        let moments = batch.moments.as_ref().expect("validated: MMD has moments");
        let counts = [batch.v.rows, batch.u.rows];
        for (which, (matrix, to)) in features(moments)?.into_iter().zip(&mut targets).enumerate() {
            let mut means = vec![0f32; counts[which] * matrix.dim];
            self.counts.target_means(batch, which == 1, &singles(matrix), matrix.dim, &mut means, &mut Vec::new());
            *to = self.put(SLOTS[which].host_target, &means)?;
        }
        Ok(targets)
    }

    /// Mean features of each column's (`which` 0) or row's positives as products see them; null where a positive is one.
    fn rounded_targets(
        &mut self,
        call: &Call,
        batch: &Batch<'_>,
        which: usize,
        f: &Features,
    ) -> Result<*const f32, CudaError> {
        if matches!(batch.pairs.positives, Positives::Diagonal) {
            return Ok(null());
        }
        let moments = batch.moments.as_ref().expect("validated: MMD has moments");
        let matrix = features(moments).expect("they were there for the targets")[which];
        let mut shift = vec![0f32; matrix.dim];
        self.arena.download(SLOTS[which].shift, &mut shift)?;
        let mut rows = singles(matrix).into_owned();
        for row in rows.chunks_exact_mut(matrix.dim) {
            row.iter_mut()
                .zip(&shift)
                .for_each(|(x, shift)| *x = call.kernels.precision.round((*x - shift) * f.unit as f32));
        }
        let mut means = vec![0f32; [batch.v.rows, batch.u.rows][which] * matrix.dim];
        self.counts.target_means(batch, which == 1, &rows, matrix.dim, &mut means, &mut Vec::new());
        Ok(self.put(SLOTS[which].host_rounded, &means)?)
    }

    /// The part of one side's softmaxes.
    fn conditional_residual(
        &mut self,
        call: &mut Call,
        batch: &Batch<'_>,
        Softmaxes { which, lambda, features, target }: Softmaxes,
    ) -> Result<(Part, f64), CudaError> {
        let slots = &SLOTS[which];
        let f = self.features(call, slots, features, true)?;
        let (side, shares) =
            if which == 0 { (call.v, &self.counts.col_share) } else { (call.u, &self.counts.row_share) };
        let most = lambda * f64::from(shares.iter().copied().fold(0.0, f32::max));
        let mut part = Part::default();
        if which == 0 {
            (part.norm_v, part.target_v, part.far[1]) = (side.norm, side.target, side.far);
        } else {
            (part.norm_u, part.target_u, part.far[0]) = (side.norm, side.target, side.far);
        }
        let rounded = self.rounded_targets(call, batch, which, &f)?;
        let (acc, gain) = self.carry(call, part, which == 0, &f, slots.residual, most)?;
        let dim = features.dim;
        let out: *mut u16 = self.arena.get(slots.other, side.rows * f.rows.pitch)?;
        let offset: *mut f32 = self.arena.get(slots.offset, side.rows)?;
        let loss: *mut f64 = self.arena.get(slots.losses, side.rows.div_ceil(8))?;
        let args = abi::Residual {
            acc,
            target,
            rounded,
            shift: f.shift,
            share: side.share,
            norm: side.norm.cast_mut(),
            out,
            offset,
            loss,
            rows: side.rows as u32,
            dim: dim as u32,
            pitch: f.rows.pitch as u32,
            scale: (1.0 / gain) as f32,
            unit: f.unit as f32,
            lambda: lambda as f32,
        };
        self.run(&call.kernels.residual, [blocks(side.rows, 8), 1, 1], &args)?;
        // In place of the softmax's own, which is not in the loss.
        let own = if which == 0 { &mut call.v } else { &mut call.u };
        own.losses = (loss.cast_const(), side.rows.div_ceil(8));
        let own = Factor { halves: f.rows.at, shift: null() };
        let other = Factor { halves: out, shift: offset };
        let mut part = Part::default();
        let sides = if which == 0 {
            part.norm_v = side.norm;
            [own, other]
        } else {
            part.norm_u = side.norm;
            [other, own]
        };
        part.factor = Some(factor(call, sides, dim, f.rows.pitch));
        // Neither a residual nor a factor is longer than two features.
        Ok((part, 4.0 * most / (f.unit * f.unit)))
    }

    fn joint_residual(
        &mut self,
        call: &mut Call,
        [features_u, features_v]: [CardRows; 2],
        target: *const f32,
    ) -> Result<Pulled, CudaError> {
        let (n, dims) = (call.u.rows, [features_u.dim, features_v.dim]);
        let size = dims[0] * dims[1];
        let [f_u, f_v] =
            [self.features(call, &SLOTS[0], features_u, false)?, self.features(call, &SLOTS[1], features_v, false)?];
        let part = Part { norm_u: call.u.norm, target_u: call.u.target, far: [call.u.far, null()], ..Part::default() };
        // exp(S - z) sums to one, and so do the targets.
        let (h, gain) = self.carry(call, part, false, &f_v, SLOTS[1].residual, 2.0)?;
        let weighed: *mut f32 = self.arena.get(SLOTS[1].target, n * dims[1])?;
        let args = abi::Weigh { x: target, share: call.u.share, out: weighed, rows: n as u32, dim: dims[1] as u32 };
        self.run(&e::WEIGH, [blocks(n, 8), 1, 1], &args)?;
        let mut moments = [vec![0f32; size], vec![0f32; size]];
        for ((slot, right), out) in [("gap", h), ("moment", weighed)].into_iter().zip(&mut moments) {
            self.moment(slot, features_u.at.cast(), right, n, dims)?;
            self.arena.download(slot, out)?;
        }
        let [mut gap, moment] = moments;
        let scale = (1.0 / (gain * f_v.unit)) as f32;
        gap.iter_mut().for_each(|x| *x *= scale);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let loss = dot(&gap, &gap) - dot(&moment, &moment);
        let mean = 2.0 * (dot(&gap, &gap) + dot(&moment, &gap));
        // D = 2 gap, in units that keep its products with features in the range of halves.
        let length = 2.0 * dot(&gap, &gap).sqrt();
        let bound = length / (f_u.unit * f_v.unit) + mean.abs();
        let unit = inverse_power(bound) / f_v.unit;
        gap.iter_mut().for_each(|x| *x = (2.0 * unit * f64::from(*x)) as f32);
        let d = self.put("gap", &gap)?;
        let left: *mut f32 = self.arena.get(SLOTS[1].residual, n * dims[1])?;
        let args = abi::Gemm {
            a: features_u.at,
            b: d.cast_const().cast(),
            c: left,
            m: n as u32,
            n: dims[1] as u32,
            k: dims[0] as u32,
            depth: dims[0].next_multiple_of(8) as u32,
            pitch_a: dims[0] as u32,
            pitch_b: dims[1] as u32,
            pitch_c: dims[1] as u32,
            add: 0,
            part: 0,
        };
        self.run(&e::GEMM_NN_BF16, [blocks(dims[1], 128), blocks(n, 128), 1], &args)?;
        let halves: *mut u16 = self.arena.get(SLOTS[1].other, n * f_v.rows.pitch)?;
        let rows = CardRows { at: left.cast_const().cast(), singles: true, rows: n, dim: dims[1] };
        self.run(&call.kernels.prepare_f32, [blocks(n, 8), 1, 1], &prepare(rows, halves, f_v.rows.pitch))?;
        let offset = self.put(SLOTS[1].offset, &vec![(-mean * unit * f_v.unit) as f32; n])?;
        // Softmaxes without targets, whose weights take the units back.
        let mut total = [0f32; 2];
        self.arena.download("joint", &mut total)?;
        total[1] *= (unit * f_v.unit) as f32;
        self.put("joint", &[total])?;
        self.softmax(call, 0, 0.0, true, null())?;
        let sides = [Factor { halves, shift: offset }, Factor { halves: f_v.rows.at, shift: null() }];
        let part =
            Part { norm_u: call.u.norm, factor: Some(factor(call, sides, dims[1], f_v.rows.pitch)), ..Part::default() };
        Ok(Pulled { parts: vec![part], bound, loss: Some(loss) })
    }

    /// Features from their mean (`centred`), with a 1 behind each, or as they are, in halves, in units of which the longest has one at most.
    fn features(&mut self, call: &Call, slots: &Slots, rows: CardRows, centred: bool) -> Result<Features, CudaError> {
        let dim = rows.dim + usize::from(centred);
        let pitch = dim.next_multiple_of(8);
        let halves: *mut u16 = self.arena.get(slots.halves, rows.rows * pitch)?;
        let shift = if centred { self.mean_row(call, &[rows], slots.shift)? } else { null_mut() };
        // Lengths by way of bf16, whose range is that of f32.
        let squares: *mut f32 = self.arena.get("lengths of features", rows.rows)?;
        let grid = [blocks(rows.rows, 8), 1, 1];
        let args = abi::Prepare { shift, half_norm: squares, norm_scale: 1.0, ..prepare(rows, halves, pitch) };
        self.run(&e::PREPARE_BF16_F32, grid, &args)?;
        let mut lengths = vec![0f32; rows.rows];
        self.arena.download("lengths of features", &mut lengths)?;
        let unit = inverse_power(f64::from(lengths.into_iter().fold(0.0, f32::max)).sqrt());
        let (scale, behind) = (unit as f32, f32::from(u8::from(centred)));
        let args = abi::Prepare { shift, scale, behind, ..prepare(rows, halves, pitch) };
        self.run(&call.kernels.prepare_f32, grid, &args)?;
        Ok(Features { rows: Carried { at: halves, dim, pitch }, count: rows.rows, shift, unit })
    }

    /// `gain G F`, or with `transposed` `gain G' F`, of `part`, chunk by chunk; and the gain that keeps G, at most `most`, in
    /// halves.
    fn carry(
        &mut self,
        call: &Call,
        part: Part,
        transposed: bool,
        features: &Features,
        slot: &'static str,
        most: f64,
    ) -> Result<(*mut f32, f64), CudaError> {
        let gain = gain(most);
        let (n, m, dim) = (call.u.rows, call.v.rows, features.rows.dim);
        debug_assert_eq!(features.count, if transposed { n } else { m });
        let rows = if transposed { m } else { n };
        let acc = Sums::whole(self.arena.get(slot, rows * dim)?, rows, dim);
        for row in (0..n).step_by(self.chunk) {
            for col in (0..m).step_by(self.chunk) {
                let args = self.chunk_at(call, &part, gain, [row, col])?;
                self.chunk_of_g(call, Pulling::Softmax, args)?;
                let add = if transposed { row > 0 } else { col > 0 };
                let product = self.product(transposed, &args, features.rows, acc, add);
                self.multiply(call, if transposed { [None, Some(product)] } else { [Some(product), None] })?;
            }
        }
        Ok((acc.at, gain))
    }

    /// `left' right` over `n` rows of f32, to `slot`.
    fn moment(
        &mut self,
        slot: &'static str,
        left: *const f32,
        right: *const f32,
        n: usize,
        dims: [usize; 2],
    ) -> Result<(), CudaError> {
        let size = dims[0] * dims[1];
        let most = (1 << 22) / size;
        let parts = n.div_ceil(PART).min(PARTS).min(most.max(1));
        let depth = n.div_ceil(parts).next_multiple_of(8);
        let parts = n.div_ceil(depth);
        let slots: *mut f32 = self.arena.get("moments of parts", parts * size)?;
        let out: *mut f32 = self.arena.get(slot, size)?;
        let args = abi::Gemm {
            a: left.cast(),
            b: right.cast(),
            c: slots,
            m: dims[0] as u32,
            n: dims[1] as u32,
            k: n as u32,
            depth: depth as u32,
            pitch_a: dims[0] as u32,
            pitch_b: dims[1] as u32,
            pitch_c: dims[1] as u32,
            add: 0,
            part: size as u64,
        };
        self.run(&e::GEMM_TN_BF16, [blocks(dims[1], 128), blocks(dims[0], 128), parts as u32], &args)?;
        self.fold(slots, parts, size, (out, false))
    }
}

/// Halves of one side of a factor, and what is added to its logits.
struct Factor {
    halves: *const u16,
    shift: *const f32,
}

/// The logits of a factor.
fn factor(call: &Call, [u, v]: [Factor; 2], depth: usize, pitch: usize) -> Logits {
    let none = |side: &Side| Side { ignore: null(), ..*side };
    Logits {
        u: u.halves,
        v: v.halves,
        shift_u: u.shift,
        shift_v: v.shift,
        depth: depth as u32,
        pitch: pitch as u32,
        scale: 1.0,
        live: null(),
        ..call.logits(&none(&call.u), &none(&call.v))
    }
}
