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
        #[serde(default, deny_unknown_fields)]
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
    #[serde(with = "as_text")]
    tilting: Tilting,
    /// `conditional`, `joint`, `sigmoid`, `mmd` or `joint-mmd`.
    #[serde(with = "as_text")]
    objective: ObjectiveName,
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
    #[serde(with = "as_text")]
    kernel: DataKernel,
    /// mmd, joint-mmd: random Fourier features of a Gaussian kernel, even.
    features: usize,
    /// Storage of embeddings in the loss: `f32`, `bf16` or `f16`.
    #[serde(with = "as_text")]
    precision: Precision,
    /// Makes the run reproducible.
    seed: u64,
    /// Peak learning rate.
    lr: f64,
    /// Steps of linear warmup.
    warmup: u64,
    /// `constant` or `cosine`.
    #[serde(with = "as_text")]
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

/// A setting that is written as text, in a file or as a flag.
pub trait Text: Sized {
    /// Its key.
    const KEY: &'static str;
    /// What may be written.
    fn expected() -> String;
    /// What is meant, if it is anything.
    fn read(text: &str) -> Option<Self>;
    /// As it is written.
    fn text(&self) -> String;
}

/// A [`Text`] by its flag: the error says what was expected.
///
/// # Errors
/// What may be written.
pub fn from_text<T: Text>(text: &str) -> Result<T, String> {
    T::read(text).ok_or_else(T::expected)
}

/// [`Text`] of what has a name each.
macro_rules! named {
    ($($type:ty: $key:literal, $all:expr, $name:expr;)*) => {$(
        impl Text for $type {
            const KEY: &'static str = $key;
            fn expected() -> String {
                $all.iter().map(|&x| $name(x)).collect::<Vec<_>>().join(", ")
            }
            fn read(text: &str) -> Option<Self> {
                $all.iter().copied().find(|&x| $name(x) == text)
            }
            fn text(&self) -> String {
                $name(*self).into()
            }
        }
    )*};
}

named! {
    Tilting: "tilting", Tilting::ALL, Tilting::name;
    ObjectiveName: "objective", ObjectiveName::ALL, ObjectiveName::name;
    Precision: "precision", [Precision::F32, Precision::Bf16, Precision::F16], Precision::name;
    Schedule: "schedule", [Schedule::Constant, Schedule::Cosine], Schedule::name;
}

impl Text for DataKernel {
    const KEY: &'static str = "kernel";
    fn expected() -> String {
        "gaussian:WIDTH with WIDTH above 0, or linear".into()
    }
    fn read(text: &str) -> Option<Self> {
        if text == "linear" {
            return Some(DataKernel::Linear);
        }
        let width = text.strip_prefix("gaussian:")?.parse::<f64>().ok()?;
        (width.is_finite() && width > 0.0).then_some(DataKernel::Gaussian { width })
    }
    fn text(&self) -> String {
        match self {
            DataKernel::Linear => "linear".into(),
            DataKernel::Gaussian { width } => format!("gaussian:{width}"),
        }
    }
}

/// [`Text`] in files; settings that may be left out, likewise.
mod as_text {
    use super::{Text, from_text};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub trait Stored: Sized {
        fn of<E: Error>(text: &str) -> Result<Self, E>;
    }
    impl<T: Text> Stored for T {
        fn of<E: Error>(text: &str) -> Result<T, E> {
            from_text(text).map_err(|expected| E::custom(format!("{}: found {text}, expected {expected}", T::KEY)))
        }
    }
    impl<T: Text> Stored for Option<T> {
        fn of<E: Error>(text: &str) -> Result<Self, E> {
            T::of(text).map(Some)
        }
    }

    pub fn serialize<T: Text, S: Serializer>(x: &T, to: S) -> Result<S::Ok, S::Error> {
        x.text().serialize(to)
    }
    pub fn deserialize<'de, T: Stored, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        T::of(&String::deserialize(from)?)
    }
}

/// An objective as settings name it; weights, bias and pairings are settings of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectiveName {
    /// [`Objective::Conditional`].
    Conditional,
    /// [`Objective::Joint`] or, with pairings, [`Objective::JointShuffled`].
    Joint,
    /// [`Objective::Sigmoid`].
    Sigmoid,
    /// [`Objective::Mmd`].
    Mmd,
    /// [`Objective::JointMmd`].
    JointMmd,
}

impl ObjectiveName {
    /// Every objective there is.
    pub const ALL: &'static [ObjectiveName] = &[
        ObjectiveName::Conditional,
        ObjectiveName::Joint,
        ObjectiveName::Sigmoid,
        ObjectiveName::Mmd,
        ObjectiveName::JointMmd,
    ];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            ObjectiveName::Conditional => "conditional",
            ObjectiveName::Joint => "joint",
            ObjectiveName::Sigmoid => "sigmoid",
            ObjectiveName::Mmd => "mmd",
            ObjectiveName::JointMmd => "joint-mmd",
        }
    }

    /// The objective with those of these parameters that it has; 0 `pairings` take all pairs.
    pub fn with(self, [lambda_u, lambda_v]: [f64; 2], bias: f64, pairings: u32, seed: u64) -> Objective {
        match self {
            ObjectiveName::Conditional => Objective::Conditional { lambda_u, lambda_v },
            ObjectiveName::Joint if pairings > 0 => Objective::JointShuffled { pairings, seed },
            ObjectiveName::Joint => Objective::Joint,
            ObjectiveName::Sigmoid => Objective::Sigmoid { bias },
            ObjectiveName::Mmd => Objective::Mmd { lambda_u, lambda_v },
            ObjectiveName::JointMmd => Objective::JointMmd,
        }
    }
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
    pub fn loss(&self, step: u64) -> Loss {
        let seed = self.seed ^ step << 20;
        Loss {
            tilting: self.tilting,
            objective: self.objective.with([self.lambda_u, self.lambda_v], self.bias, self.pairings, seed),
            tau: self.tau,
            smoothing: self.smoothing,
        }
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
        self.loss(0).validate().map_err(|e| match e {
            LossError::Parameter { what, found, expected } => {
                ConfigError::Value { key: what, found, expected: expected.into_owned() }
            }
            other => unreachable!("of parameters alone: {other}"),
        })?;
        if let DataKernel::Gaussian { width } = self.kernel {
            if self.features == 0 || self.features % 2 == 1 {
                return Err(ConfigError::value("features", self.features, "an even number, 2 or more"));
            }
            if !fits_f32(1.0 / width) {
                return Err(ConfigError::value("kernel", self.kernel.text(), "a WIDTH whose inverse f32 holds"));
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
