//! Random numbers on a card.

use super::CudaError;
use super::card::{Buffer, Card};
use super::contrast::Embedding;
use crate::objective::Precision;
use kernels::abi::Normals;
use kernels::entries as e;
use std::sync::Arc;

/// `len` of the standard normals that `(seed, stream)` stands for: those of [`kernels::random::normals`], rounded to `T`.
///
/// # Errors
/// [`CudaError::OutOfMemory`] or [`CudaError::Driver`].
pub fn normals<T: Embedding, C: Card>(
    card: &Arc<C>,
    len: usize,
    seed: u64,
    stream: u32,
) -> Result<Buffer<T, C>, CudaError> {
    let mut out: Buffer<T, C> = Buffer::new(card, len)?;
    let kernel = match T::PRECISION {
        Precision::F32 => &e::NORMALS_F32,
        Precision::Bf16 => &e::NORMALS_BF16,
        Precision::F16 => &e::NORMALS_F16,
    };
    let args = Normals { out: out.ptr_mut(..)?.cast(), len: len as u64, seed, stream, reserved: 0 };
    let blocks = len.div_ceil(4 * 256).clamp(1, 1 << 16) as u32;
    // SAFETY: the kernel of this element type, on a buffer of as many elements.
    unsafe { card.launch(kernel, [blocks, 1, 1], &args) }?;
    Ok(out)
}
