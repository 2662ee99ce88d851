//! That a loss takes no memory once it has been evaluated in its shape.
#![allow(missing_docs)]

mod common;

use common::Case;
use contrastive::objective::{Gradients, Objective, Tilting, Write};
use contrastive::{Cpu, Engine};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's, counted.
struct Counted;

thread_local! {
    /// Of this thread: that of the test runner takes memory when it likes.
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is the system's own, with the caller's promises.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// Calls that took memory after the first.
fn taken(case: &Case, add: bool) -> Vec<usize> {
    let data = case.data();
    let batch = data.batch(case);
    let loss = case.loss();
    let mut out = [case.n * case.d, case.m * case.d, case.m].map(|len| vec![0f32; len]);
    let mut cpu = Cpu::new();
    let mut call = || {
        let [u, v, offset_v] =
            out.each_mut().map(|out| Some(if add { Write::Add(&mut out[..]) } else { Write::Set(&mut out[..]) }));
        let before = COUNT.get();
        cpu.loss(&loss, &batch, Gradients { u, v, offset_v }).unwrap();
        COUNT.get() - before
    };
    let first = call();
    assert!(first > 0, "nothing is counted");
    (0..3).map(|_| call()).collect()
}

// One thread: a pool of several passes its tasks on in blocks of memory now and then. The shuffled joint loss draws its
// pairings anew.
#[test]
fn a_loss_takes_memory_once() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        for &objective in common::OBJECTIVES.iter().filter(|o| !matches!(o, Objective::JointShuffled { .. })) {
            for &tilting in Tilting::ALL {
                for (n, m) in [(40, 40), (300, 280)] {
                    for (k, case) in common::options(Case::new(tilting, objective, n, m, 9)).into_iter().enumerate() {
                        assert_eq!(taken(&case, k % 2 == 1), [0; 3], "{case:?}");
                    }
                }
            }
        }
    });
}
