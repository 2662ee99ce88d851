//! Positives, ignored pairs and weights, resolved for an engine: counts, shares of the loss, and the
//! special entries of any block of the logit matrix.

use super::validate::bad;
use super::{Batch, LossError, Pairs, Positives};
use std::collections::HashMap;
use std::ops::Range;

/// What a pair is when it is not an ordinary negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Pulled together.
    Positive,
    /// Out of the loss.
    Ignored,
}

/// [`Pairs`] with its counts; keeps its buffers between calls.
#[derive(Debug, Default)]
pub struct Counts {
    /// Positives of each row `[N]`.
    pub row_positives: Vec<u32>,
    /// Positives of each column `[M]`.
    pub col_positives: Vec<u32>,
    /// `w_i` `[N]`: sums to one over rows with a positive, 0 on the others; over all rows where a loss is of each pair.
    pub row_share: Vec<f32>,
    /// `x_j` `[M]`: sums to one over columns with a positive, 0 on the others.
    pub col_share: Vec<f32>,
    /// Of each id of `Positives::Groups`.
    groups: HashMap<i64, Group>,
}

/// Rows and columns that carry an id: how many, and the first of them.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    rows: u32,
    cols: u32,
    first_row: u32,
    first_col: u32,
}

impl Counts {
    /// Counts for a validated batch. `all_rows`: weights are shares of all rows, as the sigmoid loss has them, and not of those
    /// that have a positive.
    ///
    /// # Errors
    /// [`LossError::Parameter`] where no id has a positive, or all weights that count are 0, of which there are no shares.
    pub fn prepare(&mut self, batch: &Batch<'_>, all_rows: bool) -> Result<(), LossError> {
        let (n, m) = (batch.u.rows, batch.v.rows);
        let (rows, cols) = (&mut self.row_positives, &mut self.col_positives);
        rows.clear();
        cols.clear();
        match batch.pairs.positives {
            Positives::Diagonal => {
                rows.extend((0..n).map(|i| u32::from(i < m)));
                cols.extend((0..m).map(|j| u32::from(j < n)));
            }
            Positives::Index(index) => {
                rows.resize(n, 1);
                cols.resize(m, 0);
                for &j in index {
                    cols[j as usize] += 1;
                }
            }
            Positives::Groups { u, v } => {
                self.groups.clear();
                for (i, id) in (0..).zip(u) {
                    let group = self.groups.entry(*id).or_insert(Group { first_row: i, ..Group::default() });
                    group.rows += 1;
                }
                for (j, id) in (0..).zip(v) {
                    let group = self.groups.entry(*id).or_default();
                    if group.cols == 0 {
                        group.first_col = j;
                    }
                    group.cols += 1;
                }
                rows.extend(u.iter().map(|id| self.groups[id].cols));
                cols.extend(v.iter().map(|id| self.groups[id].rows));
                if rows.iter().all(|&positives| positives == 0) {
                    return Err(bad("groups", "no id common to u and v", "at least one positive pair"));
                }
            }
        }
        let Pairs { weights_u, weights_v, .. } = batch.pairs;
        shares("weights of u", &mut self.row_share, &self.row_positives, weights_u, !all_rows)?;
        shares("weights of v", &mut self.col_share, &self.col_positives, weights_v, true)
    }

    /// Mean of the positives' features `[rows, dim]` for each row (`of_rows`: `from` are of columns) or each column (of
    /// rows); zeros where there is no positive. `lost` is scratch: what long sums lose goes there, and comes back at their end.
    pub fn target_means(
        &self,
        batch: &Batch<'_>,
        of_rows: bool,
        from: &[f32],
        dim: usize,
        out: &mut [f32],
        lost: &mut Vec<f32>,
    ) {
        out.fill(0.0);
        lost.clear();
        lost.resize(out.len(), 0.0);
        let row = |i: usize| i * dim..(i + 1) * dim;
        let mut add = |out: &mut [f32], i: usize, x: &[f32]| {
            for ((out, lost), &x) in out[row(i)].iter_mut().zip(&mut lost[row(i)]).zip(x) {
                let sum = *out + x;
                // Exactly what the sum rounded off.
                let took = sum - *out;
                *lost += (*out - (sum - took)) + (x - took);
                *out = sum;
            }
        };
        match batch.pairs.positives {
            Positives::Diagonal => {
                let both = batch.u.rows.min(batch.v.rows) * dim;
                out[..both].copy_from_slice(&from[..both]);
            }
            Positives::Index(index) => {
                for (i, &j) in index.iter().enumerate() {
                    if of_rows {
                        add(out, i, &from[row(j as usize)]);
                    } else {
                        add(out, j as usize, &from[row(i)]);
                    }
                }
                out.iter_mut().zip(&*lost).for_each(|(out, lost)| *out += lost);
                divide(out, if of_rows { &self.row_positives } else { &self.col_positives }, dim);
            }
            Positives::Groups { u, v } => {
                let (to_ids, from_ids, counts) =
                    if of_rows { (u, v, &self.row_positives) } else { (v, u, &self.col_positives) };
                // Sums are made where a group comes first, and copied from there.
                let first = |id: &i64| {
                    let group = &self.groups[id];
                    let (first, there) =
                        if of_rows { (group.first_row, group.rows) } else { (group.first_col, group.cols) };
                    (there > 0).then_some(first as usize)
                };
                for (id, x) in from_ids.iter().zip(from.chunks_exact(dim)) {
                    if let Some(first) = first(id) {
                        add(out, first, x);
                    }
                }
                out.iter_mut().zip(&*lost).for_each(|(out, lost)| *out += lost);
                for (i, id) in to_ids.iter().enumerate() {
                    if let Some(first) = first(id).filter(|&first| first != i) {
                        out.copy_within(row(first), i * dim);
                    }
                }
                divide(out, counts, dim);
            }
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * (self.row_positives.capacity()
            + self.col_positives.capacity()
            + self.row_share.capacity()
            + self.col_share.capacity())
            + self.groups.capacity() * (size_of::<(i64, Group)>() + 1)
    }
}

/// Makes means of sums `[counts, dim]`.
fn divide(sums: &mut [f32], counts: &[u32], dim: usize) {
    for (sums, &count) in sums.chunks_exact_mut(dim).zip(counts) {
        let share = 1.0 / count.max(1) as f32;
        sums.iter_mut().for_each(|x| *x *= share);
    }
}

fn shares(
    what: &'static str,
    out: &mut Vec<f32>,
    positives: &[u32],
    weights: Option<&[f32]>,
    only_positive: bool,
) -> Result<(), LossError> {
    let weight = |i: usize| {
        if only_positive && positives[i] == 0 { 0.0 } else { weights.map_or(1.0, |w| f64::from(w[i])) }
    };
    let total: f64 = (0..positives.len()).map(weight).sum();
    if total == 0.0 {
        return Err(bad(what, "only zeros where there is a positive", "a weight above 0 there"));
    }
    let scale = 1.0 / total;
    out.clear();
    out.extend((0..positives.len()).map(|i| (weight(i) * scale) as f32));
    Ok(())
}

impl Pairs<'_> {
    /// Calls `f(i, j, special)` for every pair of the block that is not an ordinary negative, rows in order.
    #[inline]
    pub fn visit(&self, rows: Range<usize>, cols: Range<usize>, mut f: impl FnMut(usize, usize, Special)) {
        match self.positives {
            Positives::Diagonal => {
                for i in rows.start.max(cols.start)..rows.end.min(cols.end) {
                    f(i, i, Special::Positive);
                }
            }
            Positives::Index(index) => {
                for i in rows.clone() {
                    let j = index[i] as usize;
                    if cols.contains(&j) {
                        f(i, j, Special::Positive);
                    }
                }
            }
            Positives::Groups { u, v } => {
                equal_ids(u, v, &rows, &cols, |i, j| f(i, j, Special::Positive));
            }
        }
        if let Some((u, v)) = self.ignore {
            equal_ids(u, v, &rows, &cols, |i, j| {
                if !self.is_positive(i, j) {
                    f(i, j, Special::Ignored);
                }
            });
        }
    }

    /// Whether (i, j) is a positive.
    #[inline]
    pub fn is_positive(&self, i: usize, j: usize) -> bool {
        match self.positives {
            Positives::Diagonal => i == j,
            Positives::Index(index) => index[i] as usize == j,
            Positives::Groups { u, v } => u[i] == v[j],
        }
    }
}

#[inline]
fn equal_ids(u: &[i64], v: &[i64], rows: &Range<usize>, cols: &Range<usize>, mut f: impl FnMut(usize, usize)) {
    for i in rows.clone() {
        let id = u[i];
        // Most rows of most blocks hold no match: ask the whole row at once, without branches.
        if v[cols.clone()].iter().fold(false, |any, &other| any | (other == id)) {
            for j in cols.clone() {
                if v[j] == id {
                    f(i, j);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::Matrix;

    // A class of 60,000: each of its numbers is rounded as it is added to a sum thousands of times as large.
    #[test]
    fn means_of_long_sums_lose_nothing() {
        let n = 60_000;
        let from = vec![0.1f32; n];
        let plain = from.iter().sum::<f32>() / n as f32;
        let off = |mean: f32| (f64::from(mean) / f64::from(0.1f32) - 1.0).abs();
        assert!(off(plain) > 1e-5, "{plain}");
        let (to, class, classes) = (vec![0; n], vec![7; n], [7]);
        for positives in [Positives::Index(&to), Positives::Groups { u: &class, v: &classes }] {
            let mut batch = Batch::new(Matrix::f32(&from, 1), Matrix::f32(&[1.0], 1));
            batch.pairs.positives = positives;
            let (mut counts, mut mean) = (Counts::default(), [f32::NAN]);
            counts.prepare(&batch, false).unwrap();
            counts.target_means(&batch, false, &from, 1, &mut mean, &mut Vec::new());
            assert!(off(mean[0]) < 3e-7, "{mean:?}");
        }
    }
}
