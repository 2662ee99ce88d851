//! A loss whose logits are shared out among ranks: each has a block of them.
//!
//! A rank tallies its block; tallies of blocks with the same rows (columns) merge into those of the whole; with these it
//! pulls its part. One contract: everything that [`Cuda::pull_block`] returns is a sum over the block's pairs, so that loss,
//! scalar gradients, dU and dV of all blocks add up to those of [`Cuda::loss_on_card`] on the whole.

use super::call::{Call, Form, Given, Share, U, V};
use super::memory::{CardRows, Embedding, OnCard, addresses, elsewhere, wrong_len};
use super::{Cuda, only_cpu};
use crate::device::cuda::card::Card;
use crate::objective::{Batch, Loss, LossError, Objective, Pairs, Precision, Value, Write};
use kernels::abi::HOLE;
use std::ptr::null;
use std::sync::Arc;

/// Where a block lies in the whole, whose pair i is row i of both sides.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Its first row and its first column.
    pub at: [usize; 2],
    /// Rows and columns of the whole.
    pub whole: [usize; 2],
}

/// What softmaxes over rows and columns need of their logits, which count in octaves: plain numbers, for ranks to exchange.
#[derive(Clone, Debug, PartialEq)]
pub struct Tallies {
    /// Of each row: the largest logit, the sums of `2^(x - largest)` over negatives and over positives, the sum of
    /// positives. Empty where the loss has no row softmax.
    pub rows: Vec<[f32; 4]>,
    /// Of each column, likewise.
    pub cols: Vec<[f32; 4]>,
    /// Of all pairs, for the joint loss: the largest logit and the sum of `2^(x - largest)`.
    pub all: [f32; 2],
}

impl Tallies {
    /// Of no pairs.
    const NONE: Tallies = Tallies { rows: vec![], cols: vec![], all: [HOLE, 0.0] };

    /// Adds the rows of `other`, a block of the same rows.
    ///
    /// # Panics
    /// When it has another number of them.
    pub fn merge_rows(&mut self, other: &Tallies) {
        merge(&mut self.rows, &other.rows);
    }

    /// Adds the columns of `other`, a block of the same columns.
    ///
    /// # Panics
    /// When it has another number of them.
    pub fn merge_cols(&mut self, other: &Tallies) {
        merge(&mut self.cols, &other.cols);
    }

    /// Adds all pairs of `other`, any other block.
    pub fn merge_all(&mut self, other: &Tallies) {
        let largest = self.all[0].max(other.all[0]);
        let sum = [self.all, other.all].into_iter().map(|[max, sum]| sum * (max - largest).exp2()).sum();
        self.all = [largest, sum];
    }
}

fn merge(to: &mut [[f32; 4]], from: &[[f32; 4]]) {
    assert_eq!(to.len(), from.len(), "blocks of other rows or columns");
    for (to, from) in to.iter_mut().zip(from) {
        let largest = to[0].max(from[0]);
        let [a, b] = [to[0], from[0]].map(|max| (max - largest).exp2());
        *to = [largest, to[1] * a + from[1] * b, to[2] * a + from[2] * b, to[3] + from[3]];
    }
}

impl<C: Card> Cuda<C> {
    /// Tallies of a block: of `u`, its rows, against `v`, its columns, as [`Self::loss_on_card`] takes them. The sigmoid
    /// loss needs none.
    ///
    /// # Errors
    /// As [`Self::loss_on_card`]; [`LossError::Parameter`] for smoothing, MMD and the shuffled joint loss, which blocks do not have;
    /// [`LossError::Shape`] for a block that is not in the whole.
    pub fn tally_block<B: OnCard<C>>(
        &mut self,
        loss: &Loss,
        embeddings: [&B; 2],
        dim: usize,
        block: Block,
    ) -> Result<Tallies, LossError> {
        let card = Arc::clone(&self.card);
        let at = addresses(&card, embeddings, dim, [None, None])?;
        let (call, _) = self.block(loss, B::Number::PRECISION, at.rows, block)?;
        let mut tallies = Tallies::NONE;
        let (lambdas, joint) = call.form.softmaxes();
        let sides = [(&mut tallies.rows, call.u.rows), (&mut tallies.cols, call.v.rows)];
        for (which, ((to, len), lambda)) in sides.into_iter().zip(lambdas).enumerate() {
            if lambda > 0.0 {
                self.tallied(&call, which, joint)?;
                to.resize(len, [0.0; 4]);
                self.arena.download("tally", to)?;
            }
        }
        if joint {
            self.arena.download("joint", std::slice::from_mut(&mut tallies.all))?;
        }
        Ok(tallies)
    }

    /// A block's part of the loss and of its gradients, from the merged tallies of its rows and columns in the whole.
    ///
    /// # Errors
    /// As [`Self::tally_block`]; [`LossError::Shape`] for tallies of other rows or columns.
    pub fn pull_block<B: OnCard<C>>(
        &mut self,
        loss: &Loss,
        embeddings: [&B; 2],
        dim: usize,
        block: Block,
        tallies: &Tallies,
        gradients: [Option<Write<&mut B::Singles>>; 2],
    ) -> Result<Value, LossError> {
        let card = Arc::clone(&self.card);
        let at = addresses(&card, embeddings, dim, gradients)?;
        let (mut call, batch) = self.block(loss, B::Number::PRECISION, at.rows, block)?;
        let (lambdas, joint) = call.form.softmaxes();
        if matches!(call.form, Form::Sigmoid { .. }) {
            call.u.target = call.u.share;
        }
        if joint {
            self.put("joint", &[tallies.all])?;
        }
        let sides = [("tallies of rows", &tallies.rows), ("tallies of columns", &tallies.cols)];
        for (which, ((what, from), lambda)) in sides.into_iter().zip(lambdas).enumerate() {
            let len = [call.u.rows, call.v.rows][which];
            if lambda > 0.0 {
                if from.len() != len {
                    return Err(wrong_len(what, from.len(), format!("{len}, one each")));
                }
                self.put("tally", from)?;
                self.softmax(&mut call, which, lambda, joint, null())?;
            }
        }
        // A row's own terms are counted once, in its first block.
        let share = Share { rows: block.at[1] == 0, cols: block.at[0] == 0, whole: Some(block.whole) };
        let bound = call.bound(&self.counts);
        let gain = self.gradients(&call, &[call.part()], bound, at.out, false)?;
        self.value(&Given { call, gain, known: None }, loss, &batch, None, share)
    }

    /// The block's call, prepared, with ids, counts and shares of the whole.
    fn block(
        &mut self,
        loss: &Loss,
        precision: Precision,
        rows: [CardRows; 2],
        block: Block,
    ) -> Result<(Call, Batch<'static>), LossError> {
        if loss.smoothing > 0.0 {
            return Err(only_cpu("smoothing", &loss.smoothing.to_string(), "0 for a block"));
        }
        if matches!(loss.objective, Objective::JointShuffled { .. }) {
            return Err(only_cpu("objective", "the shuffled joint loss", "one of all pairs for a block"));
        }
        for which in [0, 1] {
            let end = block.at[which].saturating_add(rows[which].rows);
            if end > block.whole[which] {
                let what = ["rows of the block", "columns of the block"][which];
                let found = format!("{} to {end}", block.at[which]);
                let expected = format!("a part of 0 to {}", block.whole[which]);
                return Err(LossError::Shape { what, found, expected });
            }
        }
        if loss.objective.takes_moments() {
            return Err(only_cpu("objective", "mmd or joint-mmd", "conditional, joint or sigmoid for a block"));
        }
        let batch = elsewhere(Pairs::default(), rows, None);
        batch.parameters(loss)?;
        let pairs = block.whole[0].min(block.whole[1]);
        self.plain = None;
        self.repaired += 1;
        let all_rows = loss.objective.is_of_each_pair();
        for (which, slots) in [&U, &V].into_iter().enumerate() {
            let own = block.at[which]..block.at[which] + rows[which].rows;
            let of = if all_rows && which == 0 { block.whole[0] } else { pairs };
            let id: Vec<u32> = own.clone().map(|i| i as u32).collect();
            let positives: Vec<u32> = own.clone().map(|i| u32::from(i < pairs)).collect();
            let share: Vec<f32> = own.map(|i| if i < of { (1.0 / of as f64) as f32 } else { 0.0 }).collect();
            self.put(slots.id, &id)?;
            self.put(slots.positives, &positives)?;
            self.put(slots.share, &share)?;
            if which == 0 {
                self.counts.row_share = share;
            } else {
                self.counts.col_share = share;
            }
        }
        let mut call = self.call(loss, self.rounded(precision), rows, false, null())?;
        // Nobody looks for its plain pairs.
        (call.u.span, call.v.span) = (null(), null());
        self.prepare(&mut call, rows, null())?;
        Ok((call, batch))
    }
}
