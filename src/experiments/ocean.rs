//! Flows and the drifters they carry (section 6.3): coefficients as they are, trajectories through a transformer.

use super::{Experiment, check_samples, open_pairs, retrieval};
use crate::config::Config;
use crate::data::ocean::{COEFFICIENTS, Ocean, Recording};
use crate::data::{Source, Split, share_of};
use crate::nn::EncoderSpec;
use crate::objective::Tilting;
use crate::optim::Schedule;
use std::path::PathBuf;
use std::sync::Arc;

/// Trajectories and flows.
pub const OCEAN: Experiment = Experiment {
    name: "ocean",
    about: "a transformer of drifters' trajectories finds the flows that carried them, and flows their trajectories",
    labelled: false,
    defaults: |base| Config {
        samples: 2 * 32_268,
        held_out: 0.5,
        epochs: 20,
        batch: 128,
        lr: 1e-4,
        dim: COEFFICIENTS,
        tilting: Tilting::Cosine,
        tau: 0.07,
        train_tau: true,
        encoder_u: EncoderSpec::Identity {},
        encoder_v: transformer([1000, 2], 256, 12),
        ..base
    },
    // Ten positions a token, which makes velocities easy to read off and sequences short.
    quick: |config| Config {
        samples: 40_000,
        held_out: 0.05,
        epochs: 16,
        lr: 2e-3,
        warmup: 100,
        schedule: Schedule::Cosine,
        tau: 0.02,
        encoder_v: transformer([10, 20], 64, 3),
        ..config
    },
    data_files,
    data: |config| {
        let source: Arc<dyn Source> = if let [u, v] = &data_files(config)[..] {
            Arc::new(open_pairs(config, u, v)?)
        } else {
            let recording = if config.quick { Recording::QUICK } else { Recording::PAPER };
            check_samples(config, COEFFICIENTS + recording.dim())?;
            Arc::new(Ocean::new(config.seed, recording).sample(config.samples))
        };
        let held_out = share_of(source.len(), config.held_out);
        Ok(Split::at_end(source, held_out))
    },
    evaluate: Some(retrieval::evaluate),
    report: retrieval::report,
};

/// Of pairs that are not to be made.
fn data_files(config: &Config) -> Vec<PathBuf> {
    let made = config.data.as_os_str().is_empty();
    if made { Vec::new() } else { ["u.npy", "v.npy"].map(|name| config.data.join(name)).into() }
}

fn transformer(sequence: [usize; 2], width: usize, depth: usize) -> EncoderSpec {
    EncoderSpec::Transformer { sequence, width, heads: 4, depth, causal: true }
}
