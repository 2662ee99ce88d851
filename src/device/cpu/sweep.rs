//! The schedules of the fused passes: a Latin square of blocks, and a march of strips.
//!
//! **Square** ([`sweep`]). Rows and columns of the logit matrix are cut into at most [`PIECES`] pieces each. In phase p, row
//! piece t meets column piece (t + p) mod P: every task owns its row state and its column state, so
//! accumulating into both needs no lock that is ever waited for, no atomic and no private copy of a gradient.
//! Each piece meets its partners in an order fixed by the shape, hence the same bits for any number of threads.
//!
//! Threads take the tasks in one order, phase after phase, and wait for no phase to end: a task begins when its
//! two pieces are through with their tasks of the phase before, which were taken before it.
//!
//! **March** ([`march`]), for what has to have seen a whole row (column) before it can go on with it: a thread takes a strip of
//! neighbouring rows, meets all column pieces in their order, and takes the next strip. A column piece meets the strips in their
//! order: a strip that comes to it waits for the one before.

use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most pieces a side is cut into: the parallelism within a phase.
pub const PIECES: usize = 64;

/// Shortest piece worth a task of its own, the shortest while there are fewer than four, and that of a side so short beside
/// the other that few rows are work enough: a rank's own against all that were gathered.
const SHORT: usize = 256;
const SHORTEST: usize = 128;
const NARROW: usize = 32;
/// How many times as long the other side is then.
const LONGER: usize = 16;

/// Longest strip of a march.
const STRIP: usize = 256;
/// Fewest strips of a march, and pieces that they meet, where they are not too short for it: threads meet them one after another.
const FEW: usize = 4;

/// A side of the logit matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Axis {
    Rows,
    Cols,
}

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

    /// As [`Cut::new`], of strips of `axis` for a [`march`] past pieces of the other side.
    pub fn strips(n: usize, m: usize, dim: usize, axis: Axis) -> Self {
        let least = if is_for_one(n, m, dim) { 1 } else { FEW };
        let length = |n: usize, pieces: usize| n.div_ceil(pieces).next_multiple_of(super::simd::WIDEST);
        let strip = |n: usize| length(n, n.div_ceil(STRIP).max(least.min(n.div_ceil(NARROW))));
        let piece = |n: usize| length(n, n.div_ceil(SHORT).max(least.min(n.div_ceil(NARROW))).min(PIECES));
        match axis {
            Axis::Rows => Cut { rows: strip(n), cols: piece(m) },
            Axis::Cols => Cut { rows: piece(n), cols: strip(m) },
        }
    }

    /// The ranges of the pieces of `length` that cover `0..n`.
    pub fn pieces(n: usize, length: usize) -> impl ExactSizeIterator<Item = Range<usize>> + Clone + Send {
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

    fn state(&self) -> MutexGuard<'_, Option<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
            if let (Some(r), Some(c)) = (&mut *row.state(), &mut *col.state()) {
                task(r, c);
            }
            row.phase.store(phase + 1, Ordering::Release);
            col.phase.store(phase + 1, Ordering::Release);
        }
    };
    on_threads(phases, work);
}

/// Runs `work(strip, meet)` for every strip, in threads that take them in order. `meet(f)` runs `f` on all pieces of the other
/// side, each after the strips before are through with it; `work` calls it once, and what it does before waits for nobody.
pub fn march<A: Send, B: Send>(
    strips: impl ExactSizeIterator<Item = A> + Send,
    pieces: impl Iterator<Item = B>,
    work: impl Fn(A, &mut dyn FnMut(&mut dyn FnMut(&mut B))) + Sync,
) {
    let ((pieces, count), most) = (Piece::all(pieces), strips.len());
    let (strips, failed) = (Mutex::new(strips.enumerate()), AtomicBool::new(false));
    let take = || strips.lock().unwrap_or_else(PoisonError::into_inner).next();
    on_threads(most, || {
        let _alarm = Alarm(&failed);
        while !failed.load(Ordering::Relaxed)
            && let Some((turn, strip)) = take()
        {
            work(strip, &mut |f| {
                for piece in &pieces[..count] {
                    if !piece.wait_for(turn, &failed) {
                        return;
                    }
                    piece.state().as_mut().into_iter().for_each(&mut *f);
                    piece.phase.store(turn + 1, Ordering::Release);
                }
            });
        }
    });
}

/// Runs `work` on as many threads of the pool as there may be use for.
fn on_threads(most: usize, work: impl Fn() + Sync) {
    let threads = rayon::current_num_threads().min(most);
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

    // Every pair once, and each piece the strips in their order.
    #[test]
    fn a_march_meets_every_pair_once_in_order() {
        for (n, m) in [(1, 1), (7, 3), (200, 64)] {
            for threads in [1, 4] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut met: Vec<Vec<usize>> = vec![vec![]; m];
                let mut passed = vec![0; n];
                pool.install(|| {
                    march(passed.iter_mut().enumerate(), met.iter_mut(), |(i, passed), meet| {
                        meet(&mut |piece| {
                            piece.push(i);
                            *passed += 1;
                        });
                    });
                });
                assert!(met.iter().all(|piece| piece.iter().copied().eq(0..n)), "{n} {m} {threads}");
                assert!(passed.iter().all(|&count| count == m));
            }
        }
    }

    // Neither schedule waits for ever for a task that unwound.
    #[test]
    fn a_task_that_unwinds_ends_the_others() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let ends = |f: &(dyn Fn() + Sync)| {
            let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.install(f)));
            assert!(unwound.is_err());
        };
        ends(&|| sweep(0..8, 0..8, |row, col| assert!((*row, *col) != (3, 5))));
        ends(&|| march(0..8, 0..8, |row, meet| meet(&mut |col| assert!((row, *col) != (3, 5)))));
    }

    #[test]
    fn pieces_cover_and_fit() {
        for n in [1, 31, 128, 129, 8191, 8192, 1_000_003] {
            let cut = Cut::new(n, n, 64);
            assert!(Cut::pieces(n, cut.rows).count() <= PIECES);
            assert_eq!(Cut::pieces(n, cut.cols).map(|r| r.len()).sum::<usize>(), n);
        }
        for (n, m) in [(1, 1), (33, 1000), (512, 512), (4096, 100), (1_000_003, 131_072)] {
            let (rows, cols) = (Cut::strips(n, m, 64, Axis::Rows), Cut::strips(m, n, 64, Axis::Cols));
            assert_eq!((rows.rows, rows.cols), (cols.cols, cols.rows));
            assert!(rows.rows <= STRIP && Cut::pieces(m, rows.cols).len() <= PIECES);
        }
        // A product that wraps to 0.
        assert!(!is_for_one(1 << 31, 1 << 31, 32));
        // Few rows against many columns: the long side too fits the square.
        let cut = Cut::new(10, 1_000_000, 64);
        assert!(Cut::pieces(1_000_000, cut.cols).count() <= PIECES);
    }
}
