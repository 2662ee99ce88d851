//! What frozen embeddings are used for.

pub mod classification;
pub mod modalities;
pub mod retrieval;
pub mod sampling;

pub(crate) mod scores;
