//! The loss of one side's softmax, 6 N M D operations: a strip of rows (columns) is through with both passes before the next, its
//! logits kept meanwhile.
//!
//! ```text
//! for every strip of rows, in parallel                 sweep.rs, march
//!   tally the strip against all columns, and keep S    pass 1
//!   its rows' softmaxes
//!   pull:  out_u += G carry_v, out_v += G' carry_u     pass 2, of columns when the strips before are through with them
//! ```
//!
//! So what is kept grows with a strip and not with the matrix. Of two sides' softmaxes neither is known before all of S was seen.

use super::buffers::{Buffer, reset};
use super::fused::{Logits, Pull};
use super::kept::{Kept, Slot};
use super::law::{Law, Normalisers, Softmaxes};
use super::operand::Element;
use super::sweep::{Axis, Cut, march};
use super::tally::{Tallies, Want};
use std::ops::Range;

/// What a thread knows of the strip that it is at.
#[derive(Debug, Default)]
pub struct Strip {
    tallies: Tallies,
    /// Of the other side's rows, which nothing is made of.
    others: Tallies,
    normalisers: Normalisers,
    /// Its logits against the first pieces of the other side.
    kept: Buffer,
}

impl Strip {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.tallies.bytes() + self.others.bytes() + self.normalisers.bytes() + self.kept.bytes()
    }
}

/// One side's softmax, strip by strip.
pub struct Strips<'a, T: Element, F> {
    pub logits: &'a Logits<'a, T>,
    pub axis: Axis,
    /// Whether [`Tally::logits`](super::tally::Tally::logits) are wanted.
    pub logit_sums: bool,
    /// Makes softmaxes of a strip's tallies, and tells its part of the loss.
    pub normalise: F,
    /// Bytes that kept logits may take, of all threads together.
    pub budget: usize,
}

impl<T: Element, F: Fn(Range<usize>, &Tallies, &mut Normalisers) -> f64 + Sync> Strips<'_, T, F> {
    /// Both passes: what `pull` asks for, see [`Logits::pull`], and the sum of what `normalise` tells.
    pub fn pull(&self, pull: Pull<'_>) -> f64 {
        let (logits, apart) = (self.logits, pull.apart);
        let (n, m, dim) = (logits.similarity.n(), logits.similarity.m, logits.similarity.u.rows.dim);
        let cut = Cut::strips(n, m, dim, self.axis);
        let (strips, pieces) = match self.axis {
            Axis::Rows => (n.div_ceil(cut.rows), Cut::pieces(m, cut.cols)),
            Axis::Cols => (m.div_ceil(cut.cols), Cut::pieces(n, cut.rows)),
        };
        let slot = cut.rows * cut.cols;
        let worth = logits.exponentials || T::count(dim) > Kept::SHALLOW;
        // Whichever of the pool's threads take part.
        let budget = if worth { self.budget / rayon::current_num_threads() } else { 0 };
        let kept = (budget / (4 * slot)).min(pieces.len()) * slot;

        let mut values = logits.threads.along();
        reset(&mut values, strips, 0.0);
        logits.in_pieces(cut, pull, |[carry_u, carry_v], rows, cols| match self.axis {
            Axis::Rows => march(rows.zip(values.iter_mut()), cols, |(mut row, value), meet| {
                let range = row.range.clone();
                let (own, carry_u) = (logits.of_rows(range.clone()), &carry_u.slice(range.clone()));
                row.range = 0..range.len();
                logits.threads.with_strip(|strip| {
                    let (softmaxes, mut kept) = self.softmaxes(&own, range, pieces.clone(), [kept, slot], strip, value);
                    let law = Law::Softmax { rows: Some(softmaxes), cols: None };
                    meet(&mut |col| {
                        let kept = Slot::open(&mut kept, slot, None);
                        own.pull_pieces(&law, [carry_u, carry_v], &mut row, col, kept, apart);
                    });
                });
            }),
            Axis::Cols => march(cols.zip(values.iter_mut()), rows, |(mut col, value), meet| {
                let range = col.range.clone();
                let (own, carry_v) = (logits.of_cols(range.clone()), &carry_v.slice(range.clone()));
                col.range = 0..range.len();
                logits.threads.with_strip(|strip| {
                    let (softmaxes, mut kept) = self.softmaxes(&own, range, pieces.clone(), [kept, slot], strip, value);
                    let law = Law::Softmax { rows: None, cols: Some(softmaxes) };
                    meet(&mut |row| {
                        let kept = Slot::open(&mut kept, slot, None);
                        own.pull_pieces(&law, [carry_u, carry_v], row, &mut col, kept, apart);
                    });
                });
            }),
        });
        // One order for any number of threads.
        values.iter().sum()
    }

    /// Pass 1 of the strip `range`, whose logits these are, against `pieces` of the other side: its softmaxes, and what was kept,
    /// `kept` numbers, a `slot` of them a piece. `value` gets its part of the loss.
    fn softmaxes<'s>(
        &self,
        logits: &Logits<'_, T>,
        range: Range<usize>,
        pieces: impl Iterator<Item = Range<usize>>,
        [kept, slot]: [usize; 2],
        strip: &'s mut Strip,
        value: &mut f64,
    ) -> (Softmaxes<'s>, &'s [f32]) {
        let length = range.len();
        let want = Want { rows: self.axis == Axis::Rows, cols: self.axis == Axis::Cols };
        let Strip { tallies, others, normalisers, kept: buffer } = strip;
        tallies.clear(length, logits.anchor);
        let mut own = tallies.whole(0);
        let buffer = buffer.sized(kept);
        let mut rest = &mut buffer[..];
        for piece in pieces {
            others.clear(piece.len(), logits.anchor);
            let mut other = others.whole(piece.start);
            let keep = Slot::fill(&mut rest, slot, None);
            match self.axis {
                Axis::Rows => logits.tally_pieces(&mut own, &mut other, want, self.logit_sums, keep),
                Axis::Cols => logits.tally_pieces(&mut other, &mut own, want, self.logit_sums, keep),
            }
        }
        *value = (self.normalise)(range, tallies, normalisers);
        (normalisers.softmaxes(0..length), buffer)
    }
}
