//! Tiltings, the log-sum-exp monoid and the objectives' dL/dS, as pure f32 functions.

/// How a logit is made from two embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tilting {
    /// `<u/|u|, v/|v|> / tau`.
    Cosine,
    /// `<u, v> / tau`.
    Dot,
    /// `-|u - v|^2 / (2 tau)`.
    L2,
}
