//! A training run as data: experiment defaults, under a TOML file, under flags.

use crate::nn::EncoderSpec;
use crate::objective::{DataKernel, Loss, LossError, Objective, Precision, Tilting, fits_f32};
use crate::optim::{AdamConfig, Schedule};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::path::{Path, PathBuf};

/// Why a configuration is not usable. Messages name the file or key, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file could not be read.
    #[error("{}: found {source}, expected a file that can be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not a configuration.
    #[error("{}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What the parser says, on one line.
        reason: String,
    },
    /// A value out of its domain.
    #[error("{key}: found {found}, expected {expected}")]
    Value {
        /// The key, as in the file; the flag is `--key` with dashes.
        key: &'static str,
        /// What was given.
        found: String,
        /// What is possible.
        expected: String,
    },
}

impl ConfigError {
    /// A value out of its domain.
    pub fn value(key: &'static str, found: impl ToString, expected: impl Into<String>) -> Self {
        ConfigError::Value { key, found: found.to_string(), expected: expected.into() }
    }
}

macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)*) => {
        /// Every setting of a run, resolved; written to the run's `config.toml`.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Config { $($(#[$doc])* pub $name: $type,)* }

        /// Settings some of which are given: a file's, or the flags'.
        #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Partial {
            $($(#[$doc])* pub $name: Option<$type>,)*
            /// Folder of the run's files. This and those below say where and how a run is made; [`Config`] has none of them.
            pub out: Option<PathBuf>,
            /// Whether to go on from the folder's checkpoint.
            pub resume: Option<bool>,
            /// `auto`, `cpu`, `cuda` or `cuda:K`.
            pub device: Option<String>,
            /// Of the CPU.
            pub threads: Option<usize>,
        }

        impl Config {
            /// These settings with those given in `partial` in their place.
            pub fn with(self, partial: Partial) -> Config {
                Config { $($name: partial.$name.unwrap_or(self.$name),)* }
            }
        }

        impl Partial {
            /// Whether the setting `key` is given; of a longer name (`adam.eps`) its first word counts.
            pub fn has(&self, key: &str) -> bool {
                match key.split(['.', ' ']).next().unwrap_or_default() {
                    $(stringify!($name) => self.$name.is_some(),)*
                    _ => false,
                }
            }
            /// These settings, and where they say nothing, those of `below`.
            pub fn over(self, below: Partial) -> Partial {
                Partial {
                    $($name: self.$name.or(below.$name),)*
                    out: self.out.or(below.out),
                    resume: self.resume.or(below.resume),
                    device: self.device.or(below.device),
                    threads: self.threads.or(below.threads),
                }
            }
        }
    };
}

settings! {
    /// Which experiment: see [`crate::experiments`].
    experiment: String,
    /// `pairs`: the u side, `.npy`; empty for none.
    u: PathBuf,
    /// `pairs`: the v side, `.npy`; empty for none.
    v: PathBuf,
    /// `mnist`: folder of the IDX files. `ocean`: folder of `u.npy` and `v.npy`, if they are not to be made. Empty for none.
    data: PathBuf,
    /// Samples to generate (gp, gaussian2d, digits, ocean).
    samples: usize,
    /// Share of the pairs held out for the report: the last ones (pairs, ocean), or as many more (digits); in \[0, 1).
    held_out: f64,
    /// A short run, for a first look and for tests.
    quick: bool,
    /// Passes over the training pairs.
    epochs: u64,
    /// Pairs a step.
    batch: usize,
    /// Gradient caching: pairs embedded at a time; 0 embeds the whole batch at once.
    micro_batch: usize,
    /// Embedding dimension.
    dim: usize,
    /// `cosine`, `dot` or `l2`.
    tilting: String,
    /// `conditional`, `joint`, `sigmoid`, `mmd` or `joint-mmd`.
    objective: String,
    /// Weight of u|v.
    lambda_u: f64,
    /// Weight of v|u.
    lambda_v: f64,
    /// Temperature, the initial one if trained.
    tau: f64,
    /// Train log(1/tau), kept in \[0, ln 100\].
    train_tau: bool,
    /// Sigmoid's bias, the initial one: it is trained.
    bias: f64,
    /// Label smoothing.
    smoothing: f64,
    /// joint: random pairings that stand for all pairs; 0 takes all.
    pairings: u32,
    /// mmd, joint-mmd: `gaussian:WIDTH` or `linear`, the kernel on data.
    kernel: String,
    /// mmd, joint-mmd: random Fourier features of a Gaussian kernel, even.
    features: usize,
    /// Storage of embeddings in the loss: `f32`, `bf16` or `f16`.
    precision: String,
    /// Makes the run reproducible.
    seed: u64,
    /// Peak learning rate.
    lr: f64,
    /// Steps of linear warmup.
    warmup: u64,
    /// `constant` or `cosine`.
    schedule: Schedule,
    /// Largest gradient norm; 0 does not clip.
    grad_clip: f64,
    /// Steps between lines of `metrics.jsonl`.
    log_every: u64,
    /// Adam's settings.
    adam: AdamConfig,
    /// Encoder of u.
    encoder_u: EncoderSpec,
    /// Encoder of v.
    encoder_v: EncoderSpec,
}

/// Objectives by their names on the command line.
pub const OBJECTIVES: &[&str] = &["conditional", "joint", "sigmoid", "mmd", "joint-mmd"];

/// `cosine`, `dot` or `l2`.
///
/// # Errors
/// [`ConfigError::Value`] naming the choices.
pub fn parse_tilting(name: &str) -> Result<Tilting, ConfigError> {
    let names = || Tilting::ALL.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ");
    Tilting::ALL.iter().copied().find(|t| t.name() == name).ok_or_else(|| ConfigError::value("tilting", name, names()))
}

/// `f32`, `bf16` or `f16`.
///
/// # Errors
/// [`ConfigError::Value`] naming the choices.
pub fn parse_precision(name: &str) -> Result<Precision, ConfigError> {
    Ok(match name {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        "f16" => Precision::F16,
        _ => return Err(ConfigError::value("precision", name, "f32, bf16, f16")),
    })
}

/// `gaussian:WIDTH` or `linear`.
///
/// # Errors
/// [`ConfigError::Value`] naming the choices.
pub fn parse_kernel(text: &str) -> Result<DataKernel, ConfigError> {
    let width = text.strip_prefix("gaussian:").and_then(|w| w.parse::<f64>().ok());
    match (text, width) {
        ("linear", _) => Ok(DataKernel::Linear),
        (_, Some(width)) if width.is_finite() && width > 0.0 => Ok(DataKernel::Gaussian { width }),
        _ => Err(ConfigError::value("kernel", text, "gaussian:WIDTH with WIDTH above 0, or linear")),
    }
}

/// An objective by its name and parameters.
///
/// # Errors
/// [`ConfigError::Value`] naming the choices.
pub fn parse_objective(
    name: &str,
    [lambda_u, lambda_v]: [f64; 2],
    bias: f64,
    pairings: u32,
    seed: u64,
) -> Result<Objective, ConfigError> {
    Ok(match name {
        "conditional" => Objective::Conditional { lambda_u, lambda_v },
        "joint" if pairings > 0 => Objective::JointShuffled { pairings, seed },
        "joint" => Objective::Joint,
        "sigmoid" => Objective::Sigmoid { bias },
        "mmd" => Objective::Mmd { lambda_u, lambda_v },
        "joint-mmd" => Objective::JointMmd,
        _ => return Err(ConfigError::value("objective", name, OBJECTIVES.join(", "))),
    })
}

impl Partial {
    /// Reads a TOML file of settings.
    ///
    /// # Errors
    /// [`ConfigError`] naming the file and the offending key.
    pub fn read(path: &Path) -> Result<Partial, ConfigError> {
        read_toml(path)
    }
}

/// Reads a TOML file.
///
/// # Errors
/// [`ConfigError`] naming the file, and the line and key that are not as they should be.
pub fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Io { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|e| {
        let line = 1 + e.span().map_or(0, |span| text[..span.start].matches('\n').count());
        let reason = format!("line {line}: {}", e.message().replace('\n', " "));
        ConfigError::Parse { path: path.to_owned(), reason }
    })
}

impl Config {
    /// The loss at its initial temperature and bias. `step` draws the pairings of a shuffled joint loss.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for an unknown name.
    pub fn loss(&self, step: u64) -> Result<Loss, ConfigError> {
        let lambdas = [self.lambda_u, self.lambda_v];
        Ok(Loss {
            tilting: parse_tilting(&self.tilting)?,
            objective: parse_objective(&self.objective, lambdas, self.bias, self.pairings, self.seed ^ step << 20)?,
            tau: self.tau,
            smoothing: self.smoothing,
        })
    }

    /// Checks every value that does not depend on data.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the first key out of its domain.
    pub fn validate(&self) -> Result<(), ConfigError> {
        // Devices compute in f32.
        let positive = |key, x: f64| {
            let held = x as f32 > 0.0 && fits_f32(x);
            if held { Ok(()) } else { Err(ConfigError::value(key, x, "a finite number of f32 above 0")) }
        };
        let not_negative = |key, x: f64| {
            let held = x >= 0.0 && fits_f32(x);
            if held { Ok(()) } else { Err(ConfigError::value(key, x, "a finite number of f32, 0 or more")) }
        };
        let count = |key, x: u64| if x > 0 { Ok(()) } else { Err(ConfigError::value(key, x, "1 or more")) };
        for (key, x) in [
            ("seed", self.seed),
            ("epochs", self.epochs),
            ("samples", self.samples as u64),
            ("batch", self.batch as u64),
            ("micro_batch", self.micro_batch as u64),
            ("dim", self.dim as u64),
            ("features", self.features as u64),
            ("warmup", self.warmup),
            ("log_every", self.log_every),
        ] {
            if x > i64::MAX as u64 {
                return Err(ConfigError::value(key, x, format!("at most {}, TOML's largest integer", i64::MAX)));
            }
        }
        for (key, path) in [("u", &self.u), ("v", &self.v), ("data", &self.data)] {
            if path.to_str().is_none() {
                return Err(ConfigError::value(key, path.display(), "a path in UTF-8, as config.toml is"));
            }
        }
        self.loss(0)?.validate().map_err(|e| match e {
            LossError::Parameter { what, found, expected } => {
                ConfigError::Value { key: what, found, expected: expected.into_owned() }
            }
            other => unreachable!("of parameters alone: {other}"),
        })?;
        parse_precision(&self.precision)?;
        if let DataKernel::Gaussian { width } = parse_kernel(&self.kernel)? {
            if self.features == 0 || self.features % 2 == 1 {
                return Err(ConfigError::value("features", self.features, "an even number, 2 or more"));
            }
            if !fits_f32(1.0 / width) {
                return Err(ConfigError::value("kernel", &self.kernel, "a WIDTH whose inverse f32 holds"));
            }
        }
        positive("lr", self.lr)?;
        not_negative("lambda_u", self.lambda_u)?;
        not_negative("lambda_v", self.lambda_v)?;
        not_negative("grad_clip", self.grad_clip)?;
        not_negative("adam.weight_decay", self.adam.weight_decay)?;
        positive("adam.eps", self.adam.eps)?;
        for (key, beta) in [("adam.beta1", self.adam.beta1), ("adam.beta2", self.adam.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(ConfigError::value(key, beta, "a number in [0, 1)"));
            }
        }
        if !(0.0..1.0).contains(&self.held_out) {
            return Err(ConfigError::value("held_out", self.held_out, "a share in [0, 1)"));
        }
        if !fits_f32(self.bias) {
            return Err(ConfigError::value("bias", self.bias, "a finite number of f32"));
        }
        if self.train_tau && !(0.01..=1.0).contains(&self.tau) {
            return Err(ConfigError::value("tau", self.tau, "a number in [0.01, 1] when it is trained"));
        }
        for (key, x) in [
            ("epochs", self.epochs),
            ("batch", self.batch as u64),
            ("dim", self.dim as u64),
            ("samples", self.samples as u64),
            ("log_every", self.log_every),
        ] {
            count(key, x)?;
        }
        if self.micro_batch > 0 && !self.batch.is_multiple_of(self.micro_batch) {
            let expected = format!("a divisor of batch {}", self.batch);
            return Err(ConfigError::value("micro_batch", self.micro_batch, expected));
        }
        Ok(())
    }

    /// Pairs embedded at a time: the batch, or a micro-batch of it.
    pub fn micro(&self) -> usize {
        if self.micro_batch > 0 { self.micro_batch } else { self.batch }
    }

    /// As a TOML file that reproduces the run.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every setting has a TOML form")
    }

    /// The first key in which two runs differ, apart from how often they log.
    pub fn difference(&self, other: &Config) -> Option<(String, String, String)> {
        let table = |c: &Config| toml::Table::try_from(c).expect("every setting has a TOML form");
        let other = table(other);
        table(self)
            .into_iter()
            .find(|(key, value)| key != "log_every" && other.get(key) != Some(value))
            .map(|(key, value)| (key.clone(), value.to_string(), other[&key].to_string()))
    }
}
