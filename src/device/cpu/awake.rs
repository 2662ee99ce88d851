//! Threads that stay awake through a loss or a training step.
//!
//! A pool's idle threads go to sleep within microseconds, and waking one takes as long as its part of a small pass. Between the
//! parallel loops of a step they therefore look for work without a pause.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A turn of looking for work. Not longer, as a thread that waits for its part of a loop may take the turn up meanwhile.
const TURN: Duration = Duration::from_micros(5);
/// Without any work for so long a thread may go to sleep: what runs then is long beside a waking.
const PATIENCE: Duration = Duration::from_millis(1);

/// Threads that stay awake, the caller among them: a small pass has no work for more, and others may want the processors.
const MOST: usize = 8;

thread_local! {
    static AWAKE: Cell<bool> = const { Cell::new(false) };
}

/// [`awake`], inside the pool: from outside, each parallel loop would enter it anew.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() { awake(work) } else { rayon::scope(|_| awake(work)) }
}

/// Runs `work` on this thread, the other threads of its pool awake as long as there is something for them to do now and then.
pub fn awake<R>(work: impl FnOnce() -> R) -> R {
    let (threads, caller) = (rayon::current_num_threads(), rayon::current_thread_index());
    if threads == 1 || caller.is_none() || AWAKE.get() {
        return work();
    }
    AWAKE.set(true);
    // Also when `work` unwinds. Nobody waits for those who watch: what they have found to do may be somebody else's, and long.
    let end = End(Arc::default());
    for _ in 1..threads.min(MOST) {
        let watch = Watch { done: end.0.clone(), caller, idle_since: Instant::now() };
        rayon::spawn(move || watch.turn());
    }
    work()
}

struct End(Arc<AtomicBool>);

impl Drop for End {
    fn drop(&mut self) {
        AWAKE.set(false);
        self.0.store(true, Ordering::Release);
    }
}

/// What a thread that stays awake knows.
struct Watch {
    done: Arc<AtomicBool>,
    caller: Option<usize>,
    idle_since: Instant,
}

impl Watch {
    /// Looks for work for a turn, and leaves the next turn to whoever is free.
    fn turn(mut self) {
        let begun = Instant::now();
        // The caller, who waits for the others' parts, passes it on at once.
        while rayon::current_thread_index() != self.caller && begun.elapsed() < TURN {
            if self.done.load(Ordering::Acquire) {
                return;
            }
            if rayon::yield_now() == Some(rayon::Yield::Executed) {
                self.idle_since = Instant::now();
            } else {
                std::hint::spin_loop();
            }
        }
        if !self.done.load(Ordering::Acquire) && self.idle_since.elapsed() < PATIENCE {
            rayon::spawn(move || self.turn());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    // Parallel loops within parallel loops, from inside and from outside of pools of several sizes: all of it comes to its end,
    // and an unwinding one does too.
    #[test]
    fn loops_end_whatever_the_pool() {
        let inner = |i: usize| (0..i).into_par_iter().with_max_len(1).sum::<usize>();
        let work = || (0..64).into_par_iter().with_max_len(1).map(inner).sum::<usize>();
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for _ in 0..50 {
                assert_eq!(pool.install(|| awake(|| work() + awake(work))), 2 * 41_664);
            }
            let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.install(|| awake(|| -> usize { panic!("{}", work()) }))
            }));
            assert!(unwound.is_err());
            assert_eq!(pool.install(|| awake(work)), 41_664);
        }
        assert_eq!(in_pool(work), 41_664);
    }

    // A job of somebody else's that waits for what comes after `work`, and is found by who looks for work meanwhile.
    #[test]
    fn nobody_waits_for_the_jobs_of_others() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let (ended, end) = std::sync::mpsc::channel();
        let (waited, wait) = std::sync::mpsc::channel();
        pool.install(|| {
            awake(|| {
                rayon::spawn(move || waited.send(end.recv()).unwrap());
                std::thread::sleep(Duration::from_millis(20));
            });
            ended.send(()).unwrap();
        });
        assert_eq!(wait.recv().unwrap(), Ok(()));
    }
}
