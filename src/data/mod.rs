//! Pairs (u, v) from memory-mapped files and built-in generators, sampled by a counter-based permutation.

use std::path::PathBuf;

/// Which member of the pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    U,
    V,
}

/// A set of pairs, readable at any index from any thread.
pub trait Source: Send + Sync {
    /// Number of pairs.
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Numbers a sample on `side`.
    fn dim(&self, side: Side) -> usize;
    /// Writes samples `index` of `side`, `[index.len(), dim]`, as f32.
    fn gather(&self, side: Side, index: &[usize], out: &mut [f32]);
    /// Class of each pair, where the v side is a one-hot label.
    fn labels(&self) -> Option<&[u8]> {
        None
    }
}

/// Why data could not be read or written. Messages name the file, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: found {found}, expected {expected}", path.display())]
    Format { path: PathBuf, found: String, expected: String },
}

/// Position `index` of epoch `epoch`'s random order of 0..n: a keyed bijection, O(1) at any index, so that a
/// resumed run needs no state.
pub fn permute(_seed: u64, _epoch: u64, _n: usize, _index: usize) -> usize {
    todo!()
}
