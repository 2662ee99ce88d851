//! The schedule of every fused pass: a Latin square of blocks.
//!
//! Rows and columns of the logit matrix are cut into at most [`PIECES`] pieces each. In phase p, row
//! piece t meets column piece (t + p) mod P, all t at once: every task owns its row state and its column
//! state, so accumulating into both needs no lock, no atomic and no private copy of a gradient. Each
//! piece meets its partners in an order fixed by the shape, hence the same bits for any number of threads.

use rayon::prelude::*;
use std::ops::Range;

/// Most pieces a side is cut into: the parallelism within a phase.
pub const PIECES: usize = 64;

/// Shortest piece worth a task of its own, and the shortest while there are fewer than four: a phase ends with a
/// meeting of all threads, and P^2 tasks take P of them. Pieces of 256 are a fifth faster than of 128 at N = 1024.
const SHORT: usize = 256;
const SHORTEST: usize = 128;

/// How `n` rows and `m` columns are cut: lengths of a row piece and of a column piece.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    pub rows: usize,
    pub cols: usize,
}

/// Multiply-adds and exponentials (as [`EXPONENTIAL`] each) of a matrix that one thread is through with before the
/// others have woken up: embeddings of 5 numbers at N = 512, not of 128.
const ALONE: usize = 1 << 24;
const EXPONENTIAL: usize = 32;

impl Cut {
    /// For an `n` x `m` matrix of logits of `dim` terms.
    pub fn new(n: usize, m: usize, dim: usize) -> Self {
        let shorter = if n * m * (dim + EXPONENTIAL) <= ALONE { 1 } else { n.min(m) };
        let pieces = shorter.div_ceil(SHORT).max(shorter.div_ceil(SHORTEST).min(4)).clamp(1, PIECES);
        // Column pieces start where a packed panel starts.
        let length = |n: usize| n.div_ceil(pieces).next_multiple_of(super::simd::WIDEST);
        Cut { rows: length(n), cols: length(m) }
    }

    /// The ranges of the pieces of `length` that cover `0..n`.
    pub fn pieces(n: usize, length: usize) -> impl Iterator<Item = Range<usize>> {
        (0..n).step_by(length).map(move |start| start..n.min(start + length))
    }
}

/// Runs `task` on every (row piece, column piece) of the square.
pub fn sweep<R: Send, C: Send>(
    rows: impl Iterator<Item = R>,
    cols: impl Iterator<Item = C>,
    task: impl Fn(&mut R, &mut C) + Sync,
) {
    let (mut rows, mut cols) = (rows.fuse(), cols.fuse());
    let mut rows: [Option<R>; PIECES] = std::array::from_fn(|_| rows.next());
    let mut cols: [Option<C>; PIECES] = std::array::from_fn(|_| cols.next());
    let phases = rows.iter().flatten().count().max(cols.iter().flatten().count());
    if phases == 1 {
        if let (Some(row), Some(col)) = (&mut rows[0], &mut cols[0]) {
            task(row, col);
        }
        return;
    }
    let (rows, cols) = (&mut rows[..phases], &mut cols[..phases]);
    for _ in 0..phases {
        rows.par_iter_mut().zip(cols.par_iter_mut()).for_each(|pair| {
            if let (Some(row), Some(col)) = pair {
                task(row, col);
            }
        });
        cols.rotate_left(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Every pair once, and each row's and column's partners in the same order on any pool.
    #[test]
    fn meets_every_pair_once_in_a_fixed_order() {
        for (n, m) in [(1, 1), (5, 3), (3, 8), (64, 64)] {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut met: (Vec<Vec<usize>>, Vec<Vec<usize>>) = (vec![vec![]; n], vec![vec![]; m]);
                pool.install(|| {
                    sweep(met.0.iter_mut().enumerate(), met.1.iter_mut().enumerate(), |(i, row), (j, col)| {
                        row.push(*j);
                        col.push(*i);
                    });
                });
                met
            };
            let met = run(1);
            assert_eq!(met, run(4));
            assert!(met.0.iter().all(|row| (0..m).all(|j| row.contains(&j)) && row.len() == m));
            assert!(met.1.iter().all(|col| col.len() == n));
        }
    }

    #[test]
    fn pieces_cover_and_fit() {
        for n in [1, 31, 128, 129, 8191, 8192, 1_000_003] {
            let cut = Cut::new(n, n, 64);
            assert!(Cut::pieces(n, cut.rows).count() <= PIECES);
            assert_eq!(Cut::pieces(n, cut.cols).map(|r| r.len()).sum::<usize>(), n);
        }
        // Few rows against many columns: the long side too fits the square.
        let cut = Cut::new(10, 1_000_000, 64);
        assert!(Cut::pieces(1_000_000, cut.cols).count() <= PIECES);
    }
}
