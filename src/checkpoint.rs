//! The files of a run, by name: its checkpoint, its metrics and its model. Each is whole or absent, whatever
//! happens while it is written.

use crate::config::Config;
use crate::data::{DataError, Side, Source, tensors, write_atomic};
use crate::device::{Device, SCALING_START};
use crate::nn::{EncoderSpec, Layout, Network, Span};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A run's settings.
pub const CONFIG: &str = "config.toml";
/// Its [`Record`]s, a line each.
pub const METRICS: &str = "metrics.jsonl";
/// Its [`Checkpoint`].
pub const CHECKPOINT: &str = "checkpoint.safetensors";
/// What it learned, once it has ended.
pub const MODEL: &str = "model.safetensors";
/// What is said of that.
pub const SUMMARY: &str = "summary.json";

/// All that a run needs to go on as if it had never stopped. Data positions and random numbers are
/// functions of the seed and the step.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The run's settings.
    pub config: Config,
    /// What it was made on, and of which data.
    pub origin: Origin,
    /// Steps done.
    pub step: u64,
    /// Sum of the losses of the current epoch so far.
    pub loss_sum: f64,
    /// Time spent training so far.
    pub seconds: f64,
    /// Of the gradients, where products are narrow: see [`Device::judge`].
    pub scaling: [f32; 2],
    /// Parameters and Adam's moments, each laid out as the arena.
    pub arenas: [Vec<f32>; 3],
}

/// What a run must still find to go on to the same bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    /// See [`Device::kind`].
    pub device: String,
    /// A hash of the data's shape and of some of its rows, all over it.
    pub data: String,
}

impl Origin {
    /// Of training on `device` with `source`.
    pub fn of<D: Device>(device: &D, source: &dyn Source) -> Origin {
        const ROWS: usize = 256;
        let (samples, mut hash) = (source.len(), 0xcbf2_9ce4_8422_2325u64);
        // FNV-1a, by words.
        let mut add = |word: u64| hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
        let rows = ROWS.min(samples);
        let index: Vec<usize> = (0..rows).map(|k| k * (samples - 1) / (rows - 1).max(1)).collect();
        for side in [Side::U, Side::V] {
            let mut x = vec![0.0; rows * source.dim(side)];
            source.gather(side, &index, &mut x);
            add(samples as u64);
            x.iter().for_each(|x| add(u64::from(x.to_bits())));
        }
        Origin { device: device.kind().into(), data: format!("{hash:016x}") }
    }
}

const ARENAS: [&str; 3] = ["param", "adam_m", "adam_v"];

impl Checkpoint {
    /// A run that has not begun.
    pub fn fresh(origin: Origin, config: &Config, network: &Network) -> Checkpoint {
        let params = network.init(config.seed, config.tau, config.bias);
        let zeros = vec![0.0; params.len()];
        Checkpoint {
            config: config.clone(),
            origin,
            step: 0,
            loss_sum: 0.0,
            seconds: 0.0,
            scaling: [SCALING_START, 0.0],
            arenas: [params, zeros.clone(), zeros],
        }
    }

    /// Where a run in `dir` keeps it.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join(CHECKPOINT)
    }

    /// Whether a run in `dir` has one.
    ///
    /// # Errors
    /// [`DataError::Io`] where that cannot be known.
    pub fn is_there(dir: &Path) -> Result<bool, DataError> {
        let path = Checkpoint::path(dir);
        match std::fs::symlink_metadata(&path) {
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(DataError::Io { path, source }),
            Ok(_) => Ok(true),
        }
    }

    /// Writes it, atomically.
    ///
    /// # Errors
    /// [`DataError::Write`] naming the file.
    pub fn write(&self, dir: &Path) -> Result<(), DataError> {
        let shape = [self.arenas[0].len()];
        let entries: Vec<_> = ARENAS.iter().zip(&self.arenas).map(|(&n, x)| (n, &shape[..], &x[..])).collect();
        let metadata = BTreeMap::from([
            ("config".into(), self.config.to_toml()),
            ("device".into(), self.origin.device.clone()),
            ("data".into(), self.origin.data.clone()),
            ("step".into(), self.step.to_string()),
            ("loss_sum".into(), format!("{:016x}", self.loss_sum.to_bits())),
            ("seconds".into(), self.seconds.to_string()),
            ("scaling".into(), format!("{} {}", self.scaling[0], self.scaling[1])),
        ]);
        tensors::write(&Checkpoint::path(dir), &entries, &metadata)
    }

    /// Reads a run's checkpoint; `None` when there is none yet.
    ///
    /// # Errors
    /// [`DataError`] when it cannot be read or is not one.
    pub fn read(dir: &Path) -> Result<Option<Checkpoint>, DataError> {
        if !Checkpoint::is_there(dir)? {
            return Ok(None);
        }
        let path = Checkpoint::path(dir);
        let (found, metadata) = tensors::read(&path)?;
        let broken = |what: &str| DataError::Format {
            path: path.clone(),
            found: format!("no usable {what}"),
            expected: "a checkpoint of this program".into(),
        };
        let text = |key: &str| metadata.get(key).ok_or_else(|| broken(key));
        let config = toml::from_str(text("config")?).map_err(|_| broken("config"))?;
        let step = text("step")?.parse().map_err(|_| broken("step"))?;
        let seconds = text("seconds")?.parse().map_err(|_| broken("seconds"))?;
        let scaling: Option<Vec<f32>> = text("scaling")?.split(' ').map(|x| x.parse().ok()).collect();
        let scaling = scaling.and_then(|x| x.try_into().ok()).ok_or_else(|| broken("scaling"))?;
        let bits = u64::from_str_radix(text("loss_sum")?, 16).map_err(|_| broken("loss_sum"))?;
        let arena = |name: &str| {
            let tensor = found.iter().find(|t| t.name == name).ok_or_else(|| broken(name))?;
            Ok(tensor.data.clone())
        };
        let arenas = [arena(ARENAS[0])?, arena(ARENAS[1])?, arena(ARENAS[2])?];
        if let Some(at) = arenas.iter().position(|x| x.len() != arenas[0].len()) {
            return Err(broken(ARENAS[at]));
        }
        if let Some(at) = arenas.iter().position(|x| !x.iter().all(|x| x.is_finite())) {
            return Err(broken(ARENAS[at]));
        }
        let origin = Origin { device: text("device")?.clone(), data: text("data")?.clone() };
        Ok(Some(Checkpoint { config, origin, step, loss_sum: f64::from_bits(bits), seconds, scaling, arenas }))
    }
}

/// Writes the model of a run: one tensor a span, the settings as metadata.
///
/// # Errors
/// [`DataError::Write`] naming the file.
pub fn write_model(dir: &Path, config: &Config, layout: &Layout, params: &[f32]) -> Result<(), DataError> {
    let spans: Vec<_> = layout.spans.iter().map(|s| (&s.name[..], &s.shape[..], &params[s.at.clone()])).collect();
    let metadata = BTreeMap::from([("config".into(), config.to_toml())]);
    tensors::write(&dir.join(MODEL), &spans, &metadata)
}

/// Reads a model back into its layout.
///
/// # Errors
/// [`DataError`] when the file is absent, broken, of another layout or made with other settings of what a model is.
pub fn read_model(dir: &Path, config: &Config, layout: &Layout) -> Result<Vec<f32>, DataError> {
    let path = dir.join(MODEL);
    let (found, metadata) = tensors::read(&path)?;
    let other = |found: String| DataError::Format {
        path: path.clone(),
        found,
        expected: "the model that the folder's config.toml describes".into(),
    };
    if let Some(made) = metadata.get("config").and_then(|made| toml::from_str::<Config>(made).ok())
        && (&made.tilting, &made.experiment, made.dim, &made.encoder_u, &made.encoder_v)
            != (&config.tilting, &config.experiment, config.dim, &config.encoder_u, &config.encoder_v)
    {
        return Err(other(format!(
            "a model of {}, {}, dim {} or other encoders",
            made.experiment,
            made.tilting.name(),
            made.dim
        )));
    }
    let tensor = |span: &Span| {
        let tensor = found.iter().find(|t| t.name == span.name && t.shape == span.shape);
        tensor.ok_or_else(|| other(format!("no tensor {} of shape {:?}", span.name, span.shape)))
    };
    // All of them are there before there is room for all.
    let tensors = layout.spans.iter().map(tensor).collect::<Result<Vec<_>, _>>()?;
    let mut params = vec![0.0; layout.len()];
    for (span, tensor) in layout.spans.iter().zip(tensors) {
        params[span.at.clone()].copy_from_slice(&tensor.data);
    }
    Ok(params)
}

/// Numbers a sample on each side that the model in `dir` reads: what its encoders say, or its first layers are as wide
/// as, or its embedding where the data is prescribed.
///
/// # Errors
/// [`DataError`] when the file is absent or broken.
pub fn inputs(dir: &Path, config: &Config) -> Result<[usize; 2], DataError> {
    let path = dir.join(MODEL);
    let (found, _) = tensors::read(&path)?;
    let first_layer = |name: &str| {
        found.iter().find(|t| t.name == name && t.shape.len() == 2).map(|t| t.shape[1]).ok_or_else(|| {
            DataError::Format {
                path: path.clone(),
                found: format!("no matrix {name}"),
                expected: "the model that the folder's config.toml describes".into(),
            }
        })
    };
    let read = |spec: &EncoderSpec, name: &str| match spec.input_len() {
        Some(len) => Ok(len),
        None if *spec == EncoderSpec::Identity {} => Ok(config.dim),
        None => first_layer(name),
    };
    Ok([read(&config.encoder_u, "u.0.weight")?, read(&config.encoder_v, "v.0.weight")?])
}

/// Numbers of a model beside its loss, by their names in `metrics.jsonl`.
pub type Evaluation = serde_json::Map<String, serde_json::Value>;

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// From 0.
    pub step: u64,
    /// From 0.
    pub epoch: u64,
    /// Of this step's batch, nats.
    pub loss: f64,
    /// Temperature used.
    pub tau: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Learning rate used.
    pub lr: f64,
    /// Pairs a second since the line before.
    pub samples_per_s: f64,
    /// At an epoch's end, where the experiment has any.
    #[serde(flatten)]
    pub evaluation: Evaluation,
}

/// `metrics.jsonl`, appended to.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: std::fs::File,
}

impl Metrics {
    /// Opens the file, keeping the lines of steps before `step` that are whole.
    ///
    /// # Errors
    /// [`DataError::Io`] naming the file.
    pub fn open(dir: &Path, step: u64) -> Result<Self, DataError> {
        let path = dir.join(METRICS);
        let io = |source| DataError::Io { path: path.clone(), source };
        let before = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            read => read.map_err(io)?,
        };
        let kept: Vec<&str> = before
            .split(|&byte| byte == b'\n')
            // A line cut short may end amid a character.
            .filter_map(|line| std::str::from_utf8(line).ok())
            .filter(|line| {
                let record: Option<serde_json::Value> = serde_json::from_str(line).ok();
                record.and_then(|r| r["step"].as_u64()).is_some_and(|s| s < step)
            })
            .collect();
        write_atomic(&path, |w| kept.iter().try_for_each(|line| writeln!(w, "{line}")))?;
        let file = std::fs::OpenOptions::new().append(true).open(&path).map_err(io)?;
        Ok(Metrics { file, path })
    }

    /// Appends a line, in one piece and at once.
    ///
    /// # Errors
    /// [`DataError::Io`] naming the file.
    pub fn push(&mut self, record: &Record) -> Result<(), DataError> {
        let line = serde_json::to_string(record).expect("numbers have a JSON form") + "\n";
        self.file.write_all(line.as_bytes()).map_err(|source| DataError::Io { path: self.path.clone(), source })
    }

    /// Waits until all lines are on disk: before the checkpoint that takes them as written.
    ///
    /// # Errors
    /// [`DataError::Io`] naming the file.
    pub fn sync(&mut self) -> Result<(), DataError> {
        self.file.sync_data().map_err(|source| DataError::Io { path: self.path.clone(), source })
    }
}

/// When the next checkpoint is due: never more than a fiftieth of the time goes into writing them.
#[derive(Debug)]
pub struct Due {
    last: Instant,
    begun: Instant,
    pause: Duration,
}

impl Due {
    /// From now on.
    pub fn new() -> Self {
        Due { last: Instant::now(), begun: Instant::now(), pause: Duration::from_secs(1) }
    }
    /// Whether it is due; if so, write it and call [`Due::written`].
    pub fn now(&mut self) -> bool {
        self.begun = Instant::now();
        self.begun - self.last >= self.pause
    }
    /// It was written.
    pub fn written(&mut self) {
        self.last = Instant::now();
        self.pause = Duration::from_secs(1).max(50 * (self.last - self.begun));
    }
}

impl Default for Due {
    fn default() -> Self {
        Due::new()
    }
}
