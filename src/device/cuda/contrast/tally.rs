//! First pass: softmaxes of rows, of columns or of all pairs, their targets, and the loss.

use super::call::{Call, Form, U, V};
use super::{Cuda, blocks, each};
use crate::device::cuda::CudaError;
use crate::device::cuda::card::Card;
use kernels::abi::{self, Logits};
use kernels::entries as e;
use std::ptr::{null, null_mut};

/// What [`abi::Tally`] leaves of a side, and how many of it there are of each row.
#[derive(Clone, Copy)]
pub(super) struct TallySlots {
    pub(super) tallies: *const [f32; 4],
    /// Null without smoothing.
    pub(super) all: *const [f32; 2],
    pub(super) count: usize,
}

/// What [`abi::HopperTallyBoth`] made of the plain pairs.
#[derive(Clone, Copy)]
pub(super) struct Anchored {
    /// Of rows and of columns.
    pub(super) sums: [*const f32; 2],
    pub(super) slots: [usize; 2],
    pub(super) flags: *const u32,
    pub(super) blocks: usize,
}

impl<C: Card> Cuda<C> {
    /// The softmaxes that the form wants, their targets, and the loss.
    pub(super) fn softmaxes(&mut self, call: &mut Call) -> Result<(), CudaError> {
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
    pub(super) fn tallied(&mut self, call: &Call, which: usize, joint: bool) -> Result<*const [f32; 2], CudaError> {
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
    pub(super) fn softmax(
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
    pub(super) fn merge(&self, call: &Call, which: usize, slots: TallySlots) -> abi::Merge {
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
    pub(super) fn normalise(
        &mut self,
        call: &mut Call,
        which: usize,
        lambda: f64,
    ) -> Result<abi::Normalise, CudaError> {
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
    pub(super) fn tally_both(&mut self, call: &Call, lambdas: [f64; 2]) -> Result<Option<Anchored>, CudaError> {
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
    pub(super) fn tally(&mut self, call: &Call, wanted: &[usize]) -> Result<Vec<TallySlots>, CudaError> {
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
