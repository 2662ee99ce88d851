//! The shuffled joint loss on a card: see `paired.rs` of the kernels.

use super::call::{Call, Drawn, Side, U};
use super::pull::Sums;
use super::{Cuda, blocks};
use crate::device::cuda::CudaError;
use crate::device::cuda::card::Card;
use kernels::abi;
use kernels::entries as e;
use std::ptr::null_mut;

impl<C: Card> Cuda<C> {
    /// Draws the pairings and takes their logits: a tally a row, as [`Self::tally`]'s in one slot.
    pub(super) fn tally_pairings(&mut self, call: &Call, drawn: Drawn) -> Result<*const [f32; 4], CudaError> {
        let (n, pairings) = (call.u.rows, drawn.pairings);
        let blocks_of_all = n.div_ceil(256) * (pairings as usize + 1);
        let Some(blocks_of_all) = i32::try_from(blocks_of_all).ok() else {
            return Err(CudaError::Shape("pairings of fewer than 2^39 pairs in all"));
        };
        let [forth, back] = self.pairings(call, drawn)?;
        let args = abi::DrawPairings { forth, back, seed: drawn.seed, n: n as u32, pairings };
        self.run(&e::DRAW_PAIRINGS, [blocks_of_all as u32, 1, 1], &args)?;
        let slots: *mut [f32; 4] = self.arena.get(U.tallies, n)?;
        let x = self.arena.get("logits of pairings", (pairings as usize + 1) * n)?;
        let logits = call.logits(&call.u, &call.v);
        let args = abi::PairedTally { logits, forth, x, slots, pairings, reserved: 0 };
        self.run(&call.kernels.paired_tally, [blocks(n, 8), 1, 1], &args)?;
        Ok(slots)
    }

    /// `G V` and `G' U`, and the sums of G where they are wanted.
    pub(super) fn pull_pairings(
        &mut self,
        call: &Call,
        drawn: Drawn,
        sums: Option<(*mut f32, *mut f32)>,
        [acc_u, acc_v]: [Option<Sums>; 2],
    ) -> Result<(), CudaError> {
        let order = self.pairings(call, drawn)?;
        let n = call.u.rows;
        let x: *mut f32 = self.arena.get("logits of pairings", (drawn.pairings as usize + 1) * n)?;
        let joint: *mut [f32; 2] = self.arena.get("joint", 1)?;
        let (row_sums, col_sums) = sums.unwrap_or((null_mut(), null_mut()));
        let run = |which: usize, other: &Side, acc: Option<Sums>| {
            let by_row = which == 0;
            let args = abi::PairedPull {
                other: other.halves,
                order: order[which],
                x,
                joint,
                target: call.u.target,
                acc: acc.map_or(null_mut(), |acc| acc.at),
                row_sums: if by_row { row_sums.cast() } else { null_mut() },
                col_sums: if by_row { null_mut() } else { col_sums },
                n: n as u32,
                pairings: drawn.pairings,
                dim: call.dim as u32,
                pitch: call.pitch as u32,
                by_row: u32::from(by_row),
                reserved: 0,
            };
            self.run(&call.kernels.paired_pull, [blocks(n, 8), 1, 1], &args)
        };
        run(0, &call.v, acc_u)?;
        if acc_v.is_some() || !col_sums.is_null() { run(1, &call.u, acc_v) } else { Ok(()) }
    }

    /// Slots of the pairings and of their inverses.
    fn pairings(&mut self, call: &Call, drawn: Drawn) -> Result<[*mut u32; 2], CudaError> {
        let len = (drawn.pairings as usize + 1) * call.u.rows;
        Ok([self.arena.get("pairings", len)?, self.arena.get("pairings back", len)?])
    }
}
