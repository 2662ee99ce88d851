//! What frozen embeddings are used for.

pub mod classification;
pub mod retrieval;
pub mod sampling;

mod scores;
