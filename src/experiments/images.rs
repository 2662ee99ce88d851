//! LeNet against one-hot labels: rendered digits, and MNIST from its files (section 6.2).

use super::{Error, Experiment, Learned, OneHot, Report, check_samples};
use crate::config::{Config, ConfigError};
use crate::data::images::PIXELS;
use crate::data::{Side, SideOf, Split, Table, digits, idx, share_of};
use crate::nn::EncoderSpec;
use crate::tasks::classification;
use std::sync::Arc;

/// Built-in rendered digits.
pub const DIGITS: Experiment = Experiment {
    name: "digits",
    about: "LeNet on rendered digits, which need no file",
    labelled: true,
    defaults: |base| Config { samples: 20_000, held_out: 0.25, epochs: 8, lambda_u: 0.0, lambda_v: 2.0, ..lenet(base) },
    quick: |config| Config { samples: 6_000, epochs: 4, ..config },
    data_files: |_| Vec::new(),
    data: |config| {
        check_samples(config, PIXELS)?;
        let held_out = share_of(config.samples, config.held_out);
        Ok(Split::at_end(Arc::new(digits::digits(config.seed, config.samples + held_out)), held_out))
    },
    evaluate: None,
    report,
};

/// MNIST.
pub const MNIST: Experiment = Experiment {
    name: "mnist",
    about: "LeNet on MNIST's four IDX files in --data DIR, as in the paper",
    labelled: true,
    defaults: |base| Config { epochs: 300, lr: 1e-4, ..lenet(base) },
    quick: |config| Config { epochs: 1, lr: 1e-3, ..config },
    // However they are spelt.
    data_files: |config| {
        let entries = std::fs::read_dir(&config.data).into_iter().flatten().flatten();
        let idx = entries.filter(|entry| entry.file_name().to_string_lossy().contains("-ubyte"));
        idx.map(|entry| entry.path()).collect()
    },
    data: |config| {
        if config.data.as_os_str().is_empty() {
            return Err(ConfigError::value("data", "nothing", "the folder of MNIST's four IDX files").into());
        }
        Ok(idx::mnist(&config.data)?)
    },
    evaluate: None,
    report,
};

fn lenet(base: Config) -> Config {
    Config { dim: 10, encoder_u: EncoderSpec::Lenet {}, encoder_v: EncoderSpec::Identity {}, ..base }
}

/// Classifies each held-out image by the label of largest s(u, label) (Algorithm 2).
fn report(learned: &Learned<'_>, report: &mut Report) -> Result<(), Error> {
    let Some(labels) = learned.split.test.labels().filter(|labels| !labels.is_empty()) else { return Ok(()) };
    let images = learned.embed(&SideOf(&*learned.split.test, Side::U), Side::U);
    let classes = learned.split.test.dim(Side::V);
    let names = learned.embed(&OneHot(classes), Side::V);
    let dim = learned.config.dim;
    let [inputs, names] = [&images, &names].map(|data| Table { data, dim });
    let found = classification::classify(learned.tilting, learned.tau, &inputs, &names, None)?.labels;
    let accuracy = classification::accuracy(&found, labels);
    report.insert("test_accuracy", accuracy);
    report.table.push(format!("test accuracy: {:.2}% of {} images", 100.0 * accuracy, labels.len()));
    Ok(())
}
