//! What a training tells while it goes on and when it ends.

use crate::data::DataError;
use crate::device::DeviceError;
use crate::objective::LossError;

/// Where training stands, told after every step.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps done and steps in all.
    pub steps: [u64; 2],
    /// Of the last batch.
    pub loss: f64,
}

/// How training ended.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The arena.
    pub params: Vec<f32>,
    /// Mean loss of the last epoch begun.
    pub loss: f64,
    /// Temperature at the end.
    pub tau: f64,
    /// Steps done, those before a resumption included.
    pub steps: u64,
    /// What they took.
    pub seconds: f64,
    /// Ended before its last step because it was told to.
    pub stopped: bool,
}

/// Why training failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The loss refused its inputs, embeddings that are not finite among them.
    #[error("step {step}: {source}")]
    Loss {
        /// From 0.
        step: u64,
        /// The loss's reason.
        source: LossError,
    },
    /// An embedding is not finite.
    #[error(
        "step {step}: found embeddings of {what} that are not finite, expected finite numbers: smaller data, a smaller lr or another precision may help"
    )]
    NotFinite {
        /// From 0.
        step: u64,
        /// u, v or either.
        what: &'static str,
    },
    /// The device could not do its work.
    #[error(transparent)]
    Device(DeviceError),
    /// The loss or its gradient is not finite any more; the parameters still are.
    #[error(
        "step {step}: found loss {loss} and gradient norm {grad_norm}, expected finite numbers; a smaller lr may help, in another folder if there is a checkpoint by now"
    )]
    Diverged {
        /// From 0.
        step: u64,
        /// Of this step.
        loss: f64,
        /// Of this step.
        grad_norm: f64,
    },
}
