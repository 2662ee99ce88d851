//! Every kernel by name: the one table that the card's entry points and the host's handles are made from.

use crate::abi::{self, Kernel, Module};
#[cfg(any(target_arch = "nvptx64", feature = "shim"))]
use crate::contrast;
#[cfg(any(target_arch = "nvptx64", feature = "shim"))]
use crate::simt::{Bf16, F16};

/// For each line: on the card an entry point with its launch bounds written beside it, on the host a [`Kernel`].
macro_rules! entries {
    ($($module:ident $flag:meta: {$(
        $(#[$doc:meta])*
        $name:ident / $constant:ident ($args:ty), threads $threads:literal, blocks $blocks:literal, shared $shared:expr, $body:expr;
    )*})*) => {
        $($(
            $(#[$doc])*
            #[cfg(not(target_arch = "nvptx64"))]
            pub const $constant: Kernel<$args> = Kernel {
                name: stringify!($name),
                module: Module::$module,
                threads: $threads,
                blocks: $blocks,
                shared: $shared,
                #[cfg(feature = "shim")]
                body: $body,
                args: core::marker::PhantomData,
            };
        )*)*

        #[cfg(target_arch = "nvptx64")]
        mod card {
            use super::*;
            $($(
                #[cfg($flag)]
                core::arch::global_asm!(concat!("// @launch ", stringify!($name), " ", $threads, " ", $blocks));
                #[cfg($flag)]
                #[unsafe(no_mangle)]
                unsafe extern "ptx-kernel" fn $name(args: $args) {
                    // SAFETY: the host launches it under the contract of the body.
                    unsafe { $body(&args) }
                }
            )*)*
        }

        /// Name, module, threads, blocks a multiprocessor and shared bytes of every kernel.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ALL: &[(&str, Module, u32, u32, u32)] =
            &[$($((stringify!($name), Module::$module, $threads, $blocks, $shared),)*)*];
    };
}

entries! {
    Portable not(hopper): {
        /// Row tallies of bf16 logits.
        tally_bf16 / TALLY_BF16 (abi::Tally), threads 256, blocks 1, shared abi::TILE_SHARED, contrast::tally::<Bf16>;
        /// Row tallies of f16 logits.
        tally_f16 / TALLY_F16 (abi::Tally), threads 256, blocks 1, shared abi::TILE_SHARED, contrast::tally::<F16>;
        /// A chunk of G of the softmax losses in bf16.
        pull_softmax_bf16 / PULL_SOFTMAX_BF16 (abi::Pull), threads 256, blocks 1, shared abi::TILE_SHARED, contrast::pull_softmax::<Bf16>;
        /// A chunk of G of the softmax losses in f16.
        pull_softmax_f16 / PULL_SOFTMAX_F16 (abi::Pull), threads 256, blocks 1, shared abi::TILE_SHARED, contrast::pull_softmax::<F16>;
        /// A chunk of G of the sigmoid loss in bf16.
        pull_sigmoid_bf16 / PULL_SIGMOID_BF16 (abi::Pull), threads 256, blocks 1, shared abi::TILE_SHARED, contrast::pull_sigmoid::<Bf16>;
        /// A chunk of G of the sigmoid loss in f16.
        pull_sigmoid_f16 / PULL_SIGMOID_F16 (abi::Pull), threads 256, blocks 1, shared abi::TILE_SHARED, contrast::pull_sigmoid::<F16>;
    }
}
