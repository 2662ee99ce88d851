//! What lanes do together, done by some of them only: the twin does not let it pass, as a card would not.

use kernels::abi::{Args, Kernel, Module};
use kernels::simt::{self, shim};
use std::panic::{AssertUnwindSafe, catch_unwind};

#[derive(Clone, Copy)]
#[repr(C)]
struct Nothing(u32);
// SAFETY: a number.
unsafe impl Args for Nothing {}

/// What the twin has to say of a kernel of one warpgroup.
fn complaint(body: unsafe fn(&Nothing, u64)) -> Option<String> {
    let kernel = Kernel {
        name: "some",
        module: Module::Portable,
        threads: 128,
        blocks: 1,
        shared: 0,
        body,
        args: std::marker::PhantomData,
    };
    // SAFETY: there are no pointers.
    let run = || unsafe { shim::launch(&kernel, [1, 1, 1], &Nothing(0), 3) };
    let panic = catch_unwind(AssertUnwindSafe(run)).err()?;
    Some(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "not a message".into()))
}

#[test]
#[expect(clippy::if_same_then_else, reason = "what is tested is the same word in both arms")]
fn lanes_that_do_not_come_or_come_from_elsewhere_are_missed() {
    // The warp's number under a branch on the lane: what stopped `finish` on the first card.
    let alone = complaint(|_, _| {
        if simt::lane() == 0 {
            simt::warp();
        }
    });
    assert!(alone.as_ref().is_some_and(|m| m.contains("deadlock")), "{alone:?}");
    // Its other lanes at another line, where they all shuffle.
    let elsewhere = complaint(|_, _| {
        if simt::lane() == 0 {
            simt::warp();
        }
        simt::shuffle_xor(1.0, 1);
    });
    assert!(elsewhere.as_ref().is_some_and(|m| m.contains("comes from")), "{elsewhere:?}");
    // A barrier in both arms of a branch, which a card does not take for one.
    let arms = complaint(|_, _| if simt::thread() == 0 { simt::sync() } else { simt::sync() });
    assert!(arms.as_ref().is_some_and(|m| m.contains("comes from")), "{arms:?}");
    // Three warps of a warpgroup.
    let three = complaint(|_, _| {
        if simt::warp() < 3 {
            simt::wgmma_fence();
        }
    });
    assert!(three.as_ref().is_some_and(|m| m.contains("deadlock")), "{three:?}");
    // Warps may come to a barrier of the block from where each of them is.
    let warps = complaint(|_, _| if simt::warp() == 0 { simt::sync() } else { simt::sync() });
    assert!(warps.is_none(), "{warps:?}");
}
