//! What the CPU engine and the GPU share, and the GPU's kernels.
//!
//! | module | what |
//! | --- | --- |
//! | [`law`] | tiltings, the log-sum-exp monoid, what dL/dS is made of: one definition for all machines |
//! | [`random`] | random numbers and orders as functions of a counter |
//! | [`abi`] | a kernel's name, launch bounds and its one argument: what host and card agree on |
//! | [`entries`] | every kernel, once |
//! | `simt` | the device's vocabulary; on the host its twin, with feature `shim` |
//! | `tile` | the portable tile product that losses and encoders share |
//! | `gemm` | matrix products on the tile |
//! | `conv`, `direct`, `layers`, `optim` | what encoders and their training are made of |
//! | `hopper` | the same passes on `wgmma` and TMA |
//! | `rows` | embeddings in, gradients out, tallies into softmaxes, ordered sums |
//! | `contrast` | tallies and gradients of the logit matrix |
//! | `paired` | the joint loss of sampled pairs |
//! | `search` | ranks and best matches |
//!
//! The PTX of these sources is committed under `ptx/`; `ptx/build.py` makes it.
#![cfg_attr(not(feature = "shim"), no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, abi_unadjusted, asm_experimental_arch, link_llvm_intrinsics))]

pub mod abi;
pub mod entries;
pub mod law;
pub mod random;

/// Modules of device code: for the card, or for its host twin.
macro_rules! device {
    ($($(#[$doc:meta])* mod $name:ident;)*) => {$(
        $(#[$doc])*
        #[cfg(any(target_arch = "nvptx64", feature = "shim"))]
        pub mod $name;
    )*};
}
device! {
    mod contrast;
    mod conv;
    mod direct;
    mod gemm;
    mod hopper;
    mod layers;
    mod optim;
    mod paired;
    mod rows;
    mod search;
    mod simt;
    mod tile;
}

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    simt::trap()
}
