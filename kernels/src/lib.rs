//! The scalar law of tilted contrastive losses: what the CPU engine and the GPU kernels share.
#![no_std]

pub mod law;
