//! The schedule of every fused pass: a Latin square of blocks.
//!
//! Rows and columns of the logit matrix are cut into at most [`PIECES`] pieces each. In phase p, row
//! piece t meets column piece (t + p) mod P: every task owns its row state and its column state, so
//! accumulating into both needs no lock that is ever waited for, no atomic and no private copy of a gradient.
//! Each piece meets its partners in an order fixed by the shape, hence the same bits for any number of threads.
//!
//! Threads take the tasks in one order, phase after phase, and wait for no phase to end: a task begins when its
//! two pieces are through with their tasks of the phase before, which were taken before it.

use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Most pieces a side is cut into: the parallelism within a phase.
pub const PIECES: usize = 64;

/// Shortest piece worth a task of its own, the shortest while there are fewer than four, and that of a side so short beside
/// the other that few rows are work enough: a rank's own against all that were gathered.
const SHORT: usize = 256;
const SHORTEST: usize = 128;
const NARROW: usize = 32;
/// How many times as long the other side is then.
const LONGER: usize = 16;

/// How `n` rows and `m` columns are cut: lengths of a row piece and of a column piece.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    pub rows: usize,
    pub cols: usize,
}

/// Multiply-adds and exponentials (as [`EXPONENTIAL`] each) of a matrix that one thread is through with before the
/// others have woken up: embeddings of 5 numbers at N = 256, not of 64.
const ALONE: usize = 1 << 22;
const EXPONENTIAL: usize = 32;

/// Whether one thread is through with an `n` x `m` matrix of logits of `dim` terms before the others have woken up.
pub fn is_for_one(n: usize, m: usize, dim: usize) -> bool {
    n.saturating_mul(m).saturating_mul(dim.saturating_add(EXPONENTIAL)) <= ALONE
}

impl Cut {
    /// For an `n` x `m` matrix of logits of `dim` terms.
    pub fn new(n: usize, m: usize, dim: usize) -> Self {
        let shorter = if is_for_one(n, m, dim) { 1 } else { n.min(m) };
        let least = if n.max(m) >= LONGER * shorter { NARROW } else { SHORTEST };
        let pieces = shorter.div_ceil(SHORT).max(shorter.div_ceil(least).min(4)).clamp(1, PIECES);
        // Column pieces start where a packed panel starts.
        let length = |n: usize| n.div_ceil(pieces).next_multiple_of(super::simd::WIDEST);
        Cut { rows: length(n), cols: length(m) }
    }

    /// The ranges of the pieces of `length` that cover `0..n`.
    pub fn pieces(n: usize, length: usize) -> impl Iterator<Item = Range<usize>> {
        (0..n).step_by(length).map(move |start| start..n.min(start + length))
    }
}

/// A piece, and how many phases it is through with.
struct Piece<T> {
    state: Mutex<Option<T>>,
    phase: AtomicUsize,
}

impl<T> Piece<T> {
    fn all(states: impl Iterator<Item = T>) -> ([Piece<T>; PIECES], usize) {
        let mut states = states.fuse();
        let mut count = 0;
        let pieces = std::array::from_fn(|_| {
            let state = states.next();
            count += usize::from(state.is_some());
            Piece { state: Mutex::new(state), phase: AtomicUsize::new(0) }
        });
        (pieces, count)
    }

    /// Whether there is anything to go on with: not when another task has failed.
    fn wait_for(&self, phase: usize, failed: &AtomicBool) -> bool {
        let mut turns = 0u32;
        while self.phase.load(Ordering::Acquire) != phase {
            if failed.load(Ordering::Relaxed) {
                return false;
            }
            turns += 1;
            // A neighbour may hold the processor that the other thread needs.
            if turns.is_multiple_of(256) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        true
    }
}

/// Tells the other threads when a task unwinds: they would wait for it for ever.
struct Alarm<'a>(&'a AtomicBool);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Runs `task(row piece, column piece)` on every pair of the square.
pub fn sweep<R: Send, C: Send>(
    rows: impl Iterator<Item = R>,
    cols: impl Iterator<Item = C>,
    task: impl Fn(&mut R, &mut C) + Sync,
) {
    let ((rows, n), (cols, m)) = (Piece::all(rows), Piece::all(cols));
    let phases = n.max(m);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        let _alarm = Alarm(&failed);
        loop {
            let turn = next.fetch_add(1, Ordering::Relaxed);
            if turn >= phases * phases {
                return;
            }
            let (phase, t) = (turn / phases, turn % phases);
            let (row, col) = (&rows[t], &cols[(t + phase) % phases]);
            if !row.wait_for(phase, &failed) || !col.wait_for(phase, &failed) {
                return;
            }
            if let (Some(r), Some(c)) = (
                &mut *row.state.lock().unwrap_or_else(PoisonError::into_inner),
                &mut *col.state.lock().unwrap_or_else(PoisonError::into_inner),
            ) {
                task(r, c);
            }
            row.phase.store(phase + 1, Ordering::Release);
            col.phase.store(phase + 1, Ordering::Release);
        }
    };
    let threads = rayon::current_num_threads().min(phases);
    if threads == 1 {
        return work();
    }
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| work());
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
        // A product that wraps to 0.
        assert!(!is_for_one(1 << 31, 1 << 31, 32));
        // Few rows against many columns: the long side too fits the square.
        let cut = Cut::new(10, 1_000_000, 64);
        assert!(Cut::pieces(1_000_000, cut.cols).count() <= PIECES);
    }
}
