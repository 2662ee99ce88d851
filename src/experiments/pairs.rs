//! Your own pairs: two `.npy` files, memory-mapped.

use super::{Error, Experiment, open_pairs, retrieval};
use crate::config::{Config, ConfigError};
use crate::data::{Source, Split, share_of};
use crate::nn::EncoderSpec;
use crate::objective::Tilting;
use std::sync::Arc;

/// Pairs from files.
pub const PAIRS: Experiment = Experiment {
    name: "pairs",
    about: "your own pairs: row i of --u U.npy with row i of --v V.npy",
    labelled: false,
    defaults: |base| Config {
        dim: 128,
        tilting: Tilting::Cosine,
        tau: 0.07,
        train_tau: true,
        encoder_u: EncoderSpec::Linear { bias: true },
        encoder_v: EncoderSpec::Linear { bias: true },
        held_out: 0.1,
        ..base
    },
    quick: |config| Config { epochs: 1, ..config },
    data_files: |config| vec![config.u.clone(), config.v.clone()],
    data,
    evaluate: Some(retrieval::evaluate),
    report: retrieval::report,
};

fn data(config: &Config) -> Result<Split, Error> {
    for (key, path) in [("u", &config.u), ("v", &config.v)] {
        if path.as_os_str().is_empty() {
            return Err(ConfigError::value(key, "nothing", "a .npy file of pairs").into());
        }
    }
    let source = open_pairs(config, &config.u, &config.v)?;
    // A share above 0 is of one pair at least: a report is of something then.
    let share = share_of(source.len(), config.held_out);
    let held_out = share.max(usize::from(config.held_out > 0.0));
    Ok(Split::at_end(Arc::new(source), held_out))
}
