//! The paper's figures.

mod ocean;

use super::Error;
use crate::plot::Figure;
use crate::train::Progress;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Figures 13 to 15, from a run in the folder `ocean` of `dir`; none if it was stopped.
///
/// # Errors
/// [`Error`].
pub fn ocean(
    quick: bool,
    seed: u64,
    dir: &Path,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(Progress),
) -> Result<Vec<Figure>, Error> {
    ocean::figures(quick, seed, dir, stop, observe)
}
