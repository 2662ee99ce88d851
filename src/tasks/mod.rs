//! What frozen embeddings are used for.

pub mod retrieval;
