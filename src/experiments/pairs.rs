//! Your own pairs: two `.npy` files, memory-mapped.

use super::{Error, Experiment, Learned, Report};
use crate::config::{Config, ConfigError};
use crate::data::{PairsSource, Side, Source, Split, Table};
use crate::nn::EncoderSpec;
use crate::tasks::retrieval;
use std::sync::Arc;

/// Pairs from files.
pub const PAIRS: Experiment = Experiment {
    name: "pairs",
    about: "your own pairs: row i of --u U.npy with row i of --v V.npy",
    labelled: false,
    defaults: |base| Config {
        dim: 128,
        tilting: "cosine".into(),
        tau: 0.07,
        train_tau: true,
        encoder_u: EncoderSpec::Linear { bias: true },
        encoder_v: EncoderSpec::Linear { bias: true },
        held_out: 0.1,
        ..base
    },
    quick: |config| Config { epochs: 1, ..config },
    data,
    report,
};

fn data(config: &Config) -> Result<Split, Error> {
    for (key, path) in [("u", &config.u), ("v", &config.v)] {
        if path.as_os_str().is_empty() {
            return Err(ConfigError::value(key, "nothing", "a .npy file of pairs").into());
        }
    }
    let source = PairsSource::open(&config.u, &config.v)?;
    let held_out = (source.len() as f64 * config.held_out) as usize;
    Ok(Split::at_end(Arc::new(source), held_out))
}

fn report(learned: &Learned<'_>, report: &mut Report) {
    if learned.split.test.is_empty() {
        return;
    }
    let [u, v] = [Side::U, Side::V].map(|side| learned.embed_test(side));
    let [u, v] = [&u, &v].map(|data| Table { data, dim: learned.config.dim });
    let recall = retrieval::recall(learned.tilting, &u, &v);
    report.insert("recall", recall);
    report.table.push(format!(
        "{:<10}{:>8}{:>8}   on {} held-out pairs",
        "recall",
        "@1",
        "@5",
        learned.split.test.len()
    ));
    for (name, at_1, at_5) in
        [("u to v", recall.u_to_v_at_1, recall.u_to_v_at_5), ("v to u", recall.v_to_u_at_1, recall.v_to_u_at_5)]
    {
        report.table.push(format!("{name:<10}{:>7.1}%{:>7.1}%", 100.0 * at_1, 100.0 * at_5));
    }
}
