//! Second pass: G of a chunk of the pairs, what it is multiplied with, gradients through the tilting, and all sums.

use super::call::{Call, Form, Side, U, V, scalar};
use super::memory::Out;
use super::{Cuda, blocks};
use crate::device::cuda::CudaError;
use crate::device::cuda::card::Card;
use crate::objective::Write;
use kernels::abi::{self, Logits};
use kernels::entries as e;
use std::f64::consts::LOG2_E;
use std::ptr::{null, null_mut};

/// Rows and columns of G kept at a time: 32 MiB of halves, about the cache of a large card.
pub(super) const CHUNK: usize = 4096;

/// Copies of a sum that is cut into parts, at most.
pub(super) const MOST_PARTS: usize = 4;

/// Blocks of a first pass of ordered sums.
pub(super) const PARTS: usize = 256;

/// A part of G: softmaxes of rows and columns with their targets, or null, times a factor.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) norm_u: *const abi::Norm,
    pub(super) target_u: *const f32,
    pub(super) norm_v: *const abi::Norm,
    pub(super) target_v: *const f32,
    pub(super) far: [*const u32; 2],
    pub(super) factor: Option<Logits>,
}

impl Default for Part {
    fn default() -> Self {
        Part { norm_u: null(), target_u: null(), norm_v: null(), target_v: null(), far: [null(); 2], factor: None }
    }
}

/// What a chunk of G is multiplied with: halves `[rows, pitch]`.
#[derive(Clone, Copy)]
pub(super) struct Carried {
    pub(super) at: *const u16,
    pub(super) dim: usize,
    pub(super) pitch: usize,
}

/// Sums over chunks of G times a side, `[parts, rows, dim]`: each part has its own range of a chunk's k.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) at: *mut f32,
    pub(super) rows: usize,
    pub(super) dim: usize,
    /// k of a part.
    pub(super) depth: usize,
    pub(super) parts: usize,
}

impl Sums {
    /// In one part.
    pub(super) fn whole(at: *mut f32, rows: usize, dim: usize) -> Self {
        Sums { at, rows, dim, depth: usize::MAX, parts: 1 }
    }
}

/// Laws of a chunk.
#[derive(Clone, Copy)]
pub(super) enum Pulling {
    Softmax,
    SoftmaxSums,
    Sigmoid,
    Plain,
    Factored,
}

impl<C: Card> Cuda<C> {
    /// What `parts` pull, of which G nowhere exceeds `bound`, and the sums that the loss is made of; the gain of G.
    pub(super) fn gradients(
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

    /// `gain G V` and `gain G' U`, chunk by chunk; G is the sum of `parts`.
    pub(super) fn pull(
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
    pub(super) fn slots(&self) -> (usize, usize, usize) {
        if self.hopper { (abi::HOPPER_COLS as usize, 1, 8) } else { (abi::TILE as usize, 2, 4) }
    }

    /// The chunk of `gain G` of `part` whose first pair is (`row`, `col`), without sums.
    pub(super) fn chunk_at(
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

    pub(super) fn chunk_of_g(&self, call: &Call, pulling: Pulling, args: abi::Pull) -> Result<(), CudaError> {
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
    pub(super) fn sums(
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
    pub(super) fn product(
        &self,
        transposed: bool,
        chunk: &abi::Pull,
        other: Carried,
        acc: Sums,
        add: bool,
    ) -> abi::Gemm {
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
    pub(super) fn multiply(&self, call: &Call, gemms: [Option<abi::Gemm>; 2]) -> Result<(), CudaError> {
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
    pub(super) fn finish(
        &self,
        call: &Call,
        side: &Side,
        gain: f64,
        acc: Sums,
        out: Out,
        g_sums: Option<(*mut f32, u32)>,
        along: *mut f64,
    ) -> Result<(), CudaError> {
        let (out, add) = out.map_or((null_mut(), false), Write::split);
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
            add: u32::from(add),
            parts: acc.parts as u32,
        };
        self.run(&call.kernels.finish, [blocks(side.rows, 8), 1, 1], &args)
    }

    /// All `sums`, of one block each: parts first, then the parts where there are several.
    pub(super) fn total(&mut self, sums: &[abi::Totals]) -> Result<(), CudaError> {
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
}

/// Into how many parts k is cut of products with `tiles` tiles, on a card of so many `multiprocessors`: those whose waves take the
/// least time, where a wave of tiles of all k takes 1. A part more is a copy more to write and to add up, which is taken for a
/// sixteenth (unmeasured).
fn parts(tiles: usize, multiprocessors: usize) -> usize {
    let time = |parts: usize| (tiles * parts).div_ceil(multiprocessors) as f64 / parts as f64 + parts as f64 / 16.0;
    (1..=MOST_PARTS).min_by(|a, b| time(*a).total_cmp(&time(*b))).unwrap_or(1)
}

/// A power of two that brings G as close to the end of f16's range as its bound allows.
pub(super) fn gain(bound: f64) -> f64 {
    (32768.0 / bound.clamp(1e-30, 1e30)).log2().floor().exp2()
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
