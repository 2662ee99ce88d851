//! Training runs from settings to a summary: what a question needs beside the one training loop.
//!
//! A new experiment is a file here and a line in [`ALL`].

mod gaussian;
mod images;
mod ocean;
mod pairs;
#[cfg(feature = "plots")]
pub mod reproduce;
mod retrieval;

use crate::checkpoint::{self, CHECKPOINT, CONFIG, Checkpoint, METRICS, MODEL, Origin, SUMMARY};
use crate::config::{Config, ConfigError, ObjectiveName, Partial, read_toml};
use crate::data::npy::{self, Npy, Push};
use crate::data::{
    DataError, PairsSource, Rows, Side, Source, Split, fits_memory, remove_files, remove_temporary, write_atomic,
};
#[cfg(feature = "plots")]
use crate::device::cpu::Cpu;
use crate::device::{Contrast, Device, Search, View, ViewMut};
use crate::nn::{EncoderSpec, Network, NnError};
use crate::objective::{DataKernel, LossError, Objective, Precision, Tilting};
use crate::optim::{AdamConfig, Schedule};
#[cfg(feature = "plots")]
use crate::theory::{self, Theory};
use crate::train::{Evaluate, Evaluation, Progress, TrainError, Training};
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// One experiment: how to fill in settings, where its pairs come from, what it reports.
pub struct Experiment {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// Whether v is a one-hot label.
    labelled: bool,
    defaults: fn(Config) -> Config,
    /// What `quick` changes.
    quick: fn(Config) -> Config,
    /// What of the disk `data` reads.
    data_files: fn(&Config) -> Vec<PathBuf>,
    data: fn(&Config) -> Result<Split, Error>,
    /// What else is measured of the model, after every epoch.
    evaluate: Option<fn(&Learned<'_>) -> Evaluation>,
    report: fn(&Learned<'_>, &mut Report) -> Result<(), Error>,
}

impl Experiment {
    /// What its runs are made with where nothing is given.
    fn settings(&self) -> Config {
        (self.defaults)(base(self.name))
    }
}

/// Every experiment; the first is the default.
pub const ALL: &[Experiment] =
    &[gaussian::GP, gaussian::GAUSSIAN2D, images::DIGITS, images::MNIST, ocean::OCEAN, pairs::PAIRS];

/// Why a run could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Files.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Encoders.
    #[error(transparent)]
    Nn(#[from] NnError),
    /// Training itself; not the input's fault.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// What was learned is of no use to a task: embeddings beyond f32.
    #[error(transparent)]
    Task(#[from] LossError),
    /// The folder of a run does not fit what is asked.
    #[error("{}: found {found}, expected {expected}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What should be.
        expected: String,
    },
}

impl Error {
    /// Of a file of numbers, finite themselves, whose embeddings are not in their precision.
    pub fn beyond(path: &Path) -> Self {
        let found = "numbers whose embeddings are beyond what they are stored in (f32, or --precision)".into();
        DataError::Format { path: path.into(), found, expected: "smaller ones".into() }.into()
    }

    /// Whether better input would have helped.
    pub fn is_input(&self) -> bool {
        !matches!(self, Error::Train(_) | Error::Task(_) | Error::Data(DataError::Write { .. }))
    }
}

/// What an experiment says of what was learned.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Keys for `summary.json`.
    pub values: serde_json::Map<String, serde_json::Value>,
    /// Lines for people.
    pub table: Vec<String>,
}

impl Report {
    fn insert(&mut self, key: &str, value: impl serde::Serialize) {
        self.values.insert(key.into(), serde_json::to_value(value).expect("numbers have a JSON form"));
    }
}

/// A finished (or stopped) run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// `summary.json`, and the lines for people.
    pub report: Report,
    /// Stopped before its last step.
    pub stopped: bool,
}

/// What a report may look at: a model, trained or in training.
pub struct Learned<'a> {
    config: &'a Config,
    network: &'a Network,
    params: &'a [f32],
    tau: f64,
    split: &'a Split,
    tilting: Tilting,
    device: &'a dyn Embed,
}

/// A device as far as reports need it.
trait Embed {
    /// Embeds all rows, `[rows, dim]`.
    fn embed(
        &self,
        network: &Network,
        params: &[f32],
        side: Side,
        micro: usize,
        rows: &dyn Rows,
    ) -> Result<Vec<f32>, TrainError>;
    fn search(&self) -> Option<Box<dyn Search>>;
}

impl<D: Device<Real = f32>> Embed for D {
    fn embed(
        &self,
        network: &Network,
        params: &[f32],
        side: Side,
        micro: usize,
        rows: &dyn Rows,
    ) -> Result<Vec<f32>, TrainError> {
        let mut out = Vec::with_capacity(rows.count() * network.encoders[side as usize].output);
        let push = &mut |part: &[f32]| {
            out.extend_from_slice(part);
            Ok(())
        };
        embed_to(self, network, params, side, micro, rows, push).map_err(|e| TrainError::Device(e.into()))?;
        Ok(out)
    }
    fn search(&self) -> Option<Box<dyn Search>> {
        Device::search(self)
    }
}

/// Embeds all rows in order, each part handed to `push`: at most `micro` at a time, for whose activations there is
/// memory where the model was trained.
fn embed_to<D: Device<Real = f32>>(
    device: &D,
    network: &Network,
    params: &[f32],
    side: Side,
    micro: usize,
    rows: &dyn Rows,
    push: &mut Push<'_, f32>,
) -> io::Result<()> {
    let encoder = &network.encoders[side as usize];
    let chunk = micro.min(rows.count());
    let mut arena = device.alloc(params.len());
    device.upload(params, ViewMut { buf: &mut arena, at: 0..params.len() });
    let mut acts = encoder.acts(device, chunk);
    let mut x = device.alloc(chunk * encoder.input);
    let (mut input, mut output) = (vec![0.0; chunk * encoder.input], vec![0.0; chunk * encoder.output]);
    for first in (0..rows.count()).step_by(micro) {
        let count = chunk.min(rows.count() - first);
        let (input, output) = (&mut input[..count * encoder.input], &mut output[..count * encoder.output]);
        rows.read(first, input);
        device.upload(input, ViewMut { buf: &mut x, at: 0..input.len() });
        encoder.forward(device, &arena, View { buf: &x, at: 0..input.len() }, count, &mut acts);
        device.download(View { buf: &acts.output, at: 0..output.len() }, output);
        device.finish().map_err(io::Error::other)?;
        push(output)?;
    }
    Ok(())
}

impl Learned<'_> {
    /// Embeddings of `rows`, as `side`.
    fn embed(&self, rows: &dyn Rows, side: Side) -> Vec<f32> {
        let embedded = self.device.embed(self.network, self.params, side, self.config.micro(), rows);
        embedded.expect("the device trained until now")
    }
    /// A tensor of the arena in f64, row-major.
    fn tensor(&self, name: &str) -> Vec<f64> {
        tensor(self.network, self.params, name)
    }
}

/// A tensor of the arena in f64, row-major.
fn tensor(network: &Network, params: &[f32], name: &str) -> Vec<f64> {
    let span = network.layout.spans.iter().find(|s| s.name == name).expect("the experiment's own encoder");
    params[span.at.clone()].iter().map(|&x| f64::from(x)).collect()
}

/// Settings of a run: the experiment's own, under those `given`.
///
/// # Errors
/// [`ConfigError::Value`] naming the key.
pub fn resolve(given: Partial) -> Result<Config, ConfigError> {
    let name = given.experiment.clone().unwrap_or_else(|| ALL[0].name.into());
    let experiment = find(&name)?;
    let config = experiment.settings();
    let config = if given.quick.unwrap_or(false) { (experiment.quick)(config) } else { config };
    let config = config.with(given);
    config.validate()?;
    Ok(config)
}

fn find(name: &str) -> Result<&'static Experiment, ConfigError> {
    let names = || ALL.iter().map(|e| e.name).collect::<Vec<_>>().join(", ");
    ALL.iter().find(|e| e.name == name).ok_or_else(|| ConfigError::value("experiment", name, names()))
}

/// What experiments start from.
fn base(name: &str) -> Config {
    Config {
        experiment: name.into(),
        u: PathBuf::new(),
        v: PathBuf::new(),
        data: PathBuf::new(),
        samples: 10_000,
        held_out: 0.0,
        quick: false,
        epochs: 10,
        batch: 512,
        micro_batch: 0,
        dim: 5,
        tilting: Tilting::Dot,
        objective: ObjectiveName::Conditional,
        lambda_u: 1.0,
        lambda_v: 1.0,
        tau: 1.0,
        train_tau: false,
        bias: 0.0,
        smoothing: 0.0,
        pairings: 0,
        kernel: DataKernel::Gaussian { width: 1.0 },
        features: 64,
        precision: Precision::F32,
        seed: 0,
        lr: 1e-3,
        warmup: 0,
        schedule: Schedule::Constant,
        grad_clip: 0.0,
        log_every: 10,
        adam: AdamConfig::default(),
        encoder_u: EncoderSpec::Linear { bias: false },
        encoder_v: EncoderSpec::Linear { bias: false },
    }
}

/// Runs `config` on `device`; files go to `dir`. Everything is checked before anything is written.
///
/// # Errors
/// [`Error`].
pub fn run<D: Contrast + Device<Real = f32>>(
    device: &mut D,
    config: &Config,
    dir: &Path,
    resume: bool,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(Progress),
) -> Result<Outcome, Error> {
    config.validate()?;
    let experiment = find(&config.experiment)?;
    // Before anything is said of what is there.
    let lock = if dir.exists() { Some(lock(dir)?) } else { None };
    let start = if resume { Checkpoint::read(dir)? } else { None };
    if let Some(start) = &start
        && let Some((key, now, then)) = config.difference(&start.config)
    {
        return Err(Error::Folder {
            path: dir.into(),
            found: format!("a checkpoint with {key} = {then}"),
            expected: format!("{key} = {now}, as in the settings to resume with"),
        });
    }
    if !resume && Checkpoint::is_there(dir)? && !dir.join(SUMMARY).exists() {
        return Err(Error::Folder {
            path: dir.into(),
            found: "an unfinished run".into(),
            expected: "--resume to go on with it, or another --out".into(),
        });
    }
    let split = (experiment.data)(config)?;
    if config.batch > split.train.len() {
        let expected = format!("at most the {} training pairs", split.train.len());
        return Err(ConfigError::value("batch", config.batch, expected).into());
    }
    if let Some(Origin { device: made_on, data }) = start.as_ref().map(|start| &start.origin) {
        let now = Origin::of(device, &*split.train);
        let refused = |found: String, expected: String| Err(Error::Folder { path: dir.into(), found, expected });
        if *made_on != now.device {
            let expected = format!("--device {made_on}: on {} other bits would come of it", now.device);
            return refused(format!("a checkpoint made on {made_on}"), expected);
        }
        if *data != now.data {
            return refused("a checkpoint of other data".into(), "the data that the run began with".into());
        }
    }
    let network = network(config, &*split.train)?;
    // Parameters, gradients and Adam's moments; embeddings and their gradients.
    if !(fits_memory(&[network.layout.len(), 4]) && fits_memory(&[config.dim, config.batch, 4])) {
        let expected = format!("fewer: {} parameters are more than there is memory for", network.layout.len());
        return Err(ConfigError::value("dim", config.dim, expected).into());
    }
    let objective = config.loss(0).objective;
    let joint = if matches!(objective, Objective::JointMmd) { config.features } else { 0 };
    let fits = fits_memory(&[config.features, config.batch, 10]) && fits_memory(&[config.features, joint, 4]);
    if objective.takes_moments() && !fits {
        return Err(ConfigError::value("features", config.features, "fewer: there is no memory for them").into());
    }
    if !fits_memory(&[config.pairings as usize, config.batch, 3]) {
        return Err(ConfigError::value("pairings", config.pairings, "fewer: there is no memory for them").into());
    }
    if let Some(start) = &start
        && start.arenas[0].len() != network.layout.len()
    {
        return Err(Error::Folder {
            path: Checkpoint::path(dir),
            found: format!("{} parameters", start.arenas[0].len()),
            expected: format!("{}, as these encoders have on this data", network.layout.len()),
        });
    }
    // All memory first: a run that there is none for leaves the folder as it is.
    let goes_on = start.is_some();
    let training = Training::new(device, config, &network, &*split.train, start);
    let _lock = open_folder(dir, config, lock, goes_on)?;

    let tilting = config.tilting;
    let mut evaluate = experiment.evaluate.map(|evaluate| {
        let (network, split) = (&network, &split);
        move |device: &D, params: &[f32], tau: f64| {
            evaluate(&Learned { config, network, params, tau, split, tilting, device })
        }
    });
    let evaluate = evaluate.as_mut().map(|f| f as &mut Evaluate<'_, D>);
    let trained = training.run(device, Some(dir), stop, observe, evaluate)?;
    let mut report = Report::default();
    report.insert("experiment", experiment.name);
    report.insert("device", device.kind());
    report.insert("seconds", trained.seconds);
    report.insert("steps", trained.steps);
    report.insert("samples_per_s", trained.steps as f64 * config.batch as f64 / trained.seconds);
    report.insert("loss", trained.loss);
    report.insert("step_flops", network.step_flops(config.batch));
    report.insert("tau", trained.tau);
    if !trained.stopped {
        let (params, tau) = (&trained.params[..], trained.tau);
        let learned = Learned { config, network: &network, params, tau, split: &split, tilting, device };
        checkpoint::write_model(dir, config, &network.layout, &trained.params)?;
        (experiment.report)(&learned, &mut report)?;
        write_text(&dir.join(SUMMARY), &format!("{}\n", serde_json::Value::Object(report.values.clone())))?;
    }
    Ok(Outcome { report, stopped: trained.stopped })
}

/// Opens the pairs of two files, as wide as the encoders read.
fn open_pairs(config: &Config, u: &Path, v: &Path) -> Result<PairsSource, DataError> {
    let source = PairsSource::open(u, v)?;
    for (side, spec, path) in [(Side::U, &config.encoder_u, u), (Side::V, &config.encoder_v, v)] {
        if let Some(reads) = spec.input_len().filter(|&reads| reads != source.dim(side)) {
            let name = if side == Side::U { "encoder_u" } else { "encoder_v" };
            return Err(DataError::Format {
                path: path.into(),
                found: format!("{} columns", source.dim(side)),
                expected: format!("{reads}, as {name} of these settings reads"),
            });
        }
    }
    Ok(source)
}

/// Fails where the machine has no memory for a run's samples of so many `numbers` each.
fn check_samples(config: &Config, numbers: usize) -> Result<(), ConfigError> {
    if fits_memory(&[config.samples, numbers]) {
        return Ok(());
    }
    let expected = format!("fewer: of {numbers} f32 each there is no memory for as many");
    Err(ConfigError::value("samples", config.samples, expected))
}

fn network(config: &Config, source: &dyn Source) -> Result<Network, NnError> {
    let inputs = [source.dim(Side::U), source.dim(Side::V)];
    Network::build([&config.encoder_u, &config.encoder_v], inputs, config.dim)
}

/// What a run makes of its settings.
const RESULTS: [&str; 4] = [SUMMARY, MODEL, METRICS, CHECKPOINT];

/// Files of a run's folder.
pub fn files() -> impl Iterator<Item = &'static str> {
    RESULTS.into_iter().chain([CONFIG])
}

/// Nobody else runs in the folder while the answer lives; `None` where a folder cannot be locked: there its owner has to know
/// what runs.
fn lock(dir: &Path) -> Result<Option<File>, Error> {
    let own = File::open(dir).ok();
    if let Some(Err(TryLockError::WouldBlock)) = own.as_ref().map(File::try_lock) {
        let (found, expected) = ("a run that goes on".into(), "another --out, or to wait for its end".into());
        return Err(Error::Folder { path: dir.into(), found, expected });
    }
    Ok(own)
}

/// Makes the folder and its `config.toml`; a run that does not go on from a checkpoint takes away what an old one left.
/// `locked`: the lock of a folder that was there before.
fn open_folder(
    dir: &Path,
    config: &Config,
    locked: Option<Option<File>>,
    goes_on: bool,
) -> Result<Option<File>, Error> {
    let locked = match locked {
        Some(locked) => locked,
        None => {
            std::fs::create_dir_all(dir).map_err(|source| DataError::Io { path: dir.into(), source })?;
            let locked = lock(dir)?;
            if files().any(|name| dir.join(name).exists()) {
                let (found, expected) = ("a run that began meanwhile".into(), "another --out, or to wait".into());
                return Err(Error::Folder { path: dir.into(), found, expected });
            }
            locked
        }
    };
    remove_temporary(dir, files());
    // Before the new settings: old results never stand beside them.
    if !goes_on {
        remove_files(dir, &RESULTS)?;
    }
    write_text(&dir.join(CONFIG), &config.to_toml())?;
    Ok(locked)
}

fn write_text(path: &Path, text: &str) -> Result<(), DataError> {
    write_atomic(path, |w| w.write_all(text.as_bytes()))
}

/// A trained model, read back from its folder.
pub struct Model {
    /// Its settings.
    pub config: Config,
    network: Network,
    params: Vec<f32>,
}

impl Model {
    /// Reads `config.toml` and `model.safetensors` of a run's folder.
    ///
    /// # Errors
    /// [`Error`] naming the file.
    pub fn load(dir: &Path) -> Result<Model, Error> {
        let path = dir.join(CONFIG);
        let config: Config = read_toml(&path)?;
        let wrong = |e: ConfigError| ConfigError::Parse { path: path.clone(), reason: e.to_string() };
        config.validate().map_err(wrong)?;
        // The tensors' shapes tell what the data was like.
        let inputs = checkpoint::inputs(dir, &config)?;
        let network = Network::build([&config.encoder_u, &config.encoder_v], inputs, config.dim)?;
        let params = checkpoint::read_model(dir, &config, &network.layout)?;
        Ok(Model { config, network, params })
    }

    /// Embeds the rows of `x` as `side` and writes `[rows, dim]` f32, rounded to `precision`, to `output`; neither is ever
    /// whole in memory.
    ///
    /// # Errors
    /// [`Error`] when `x` has another width than the encoder, or a row that is not finite or whose embedding is not.
    pub fn embed<D: Device<Real = f32>>(
        &self,
        device: &D,
        side: Side,
        x: &Npy,
        output: &Path,
        precision: Precision,
    ) -> Result<(), Error> {
        let encoder = &self.network.encoders[side as usize];
        self.check_width(side, x, x.path())?;
        x.check_finite()?;
        let mut beyond = false;
        let written = npy::write_npy_f32_parts(output, &[x.rows(), encoder.output], |push| {
            let mut rounded = Vec::new();
            let push = &mut |part: &[f32]| {
                rounded.clear();
                rounded.extend(part.iter().map(|&x| precision.round(x)));
                beyond = !rounded.iter().all(|x| x.is_finite());
                if beyond { Err(io::Error::other("not finite")) } else { push(&rounded) }
            };
            embed_to(device, &self.network, &self.params, side, self.config.micro(), x, push)
        });
        if beyond { Err(Error::beyond(x.path())) } else { Ok(written?) }
    }

    /// Trains on `source` in memory, on this CPU.
    ///
    /// # Errors
    /// [`Error::Train`].
    #[cfg(feature = "plots")]
    fn fit(config: Config, source: &dyn Source) -> Result<Model, Error> {
        config.validate()?;
        let network = network(&config, source)?;
        let (device, stop) = (&mut Cpu::new(), AtomicBool::new(false));
        let trained =
            Training::new(device, &config, &network, source, None).run(device, None, &stop, &mut |_| (), None)?;
        Ok(Model { config, network, params: trained.params })
    }

    /// The Gaussian model of its linear encoders; `None` for cosine, which has none.
    #[cfg(feature = "plots")]
    fn quadratic<'a>(&self, theory: &'a Theory) -> Option<theory::Model<'a>> {
        let [g, h] = ["u.0.weight", "v.0.weight"].map(|name| tensor(&self.network, &self.params, name));
        gaussian::quadratic(theory, self.tilting(), &g, &h, self.config.dim, self.tau())
    }

    /// Embeds all `rows` as `side`, `[rows, dim]`.
    ///
    /// # Errors
    /// [`Error::Train`] when the device fails.
    pub fn embed_in_memory<D: Device<Real = f32>>(
        &self,
        device: &D,
        side: Side,
        rows: &dyn Rows,
    ) -> Result<Vec<f32>, Error> {
        Ok(device.embed(&self.network, &self.params, side, self.config.micro(), rows)?)
    }

    /// Fails unless rows of `path` are as wide as the encoder of `side` reads.
    ///
    /// # Errors
    /// [`DataError::Format`].
    pub fn check_width(&self, side: Side, rows: &dyn Rows, path: &Path) -> Result<(), DataError> {
        let expected = self.network.encoders[side as usize].input;
        if rows.dim() == expected {
            return Ok(());
        }
        Err(DataError::Format {
            path: path.into(),
            found: format!("{} columns", rows.dim()),
            expected: format!("{expected}, as the encoder reads"),
        })
    }

    /// Its tilting.
    pub fn tilting(&self) -> Tilting {
        self.config.tilting
    }

    /// Its temperature, as trained.
    pub fn tau(&self) -> f64 {
        (-f64::from(self.params[self.network.logit_scale.start])).exp()
    }

    /// The pairs it was trained on, and those held out.
    ///
    /// # Errors
    /// [`Error`] when its files are no longer there.
    pub fn data(&self) -> Result<Split, Error> {
        (find(&self.config.experiment)?.data)(&self.config)
    }

    /// The files that those pairs are in, where they are not made.
    pub fn data_files(&self) -> Vec<PathBuf> {
        find(&self.config.experiment).map_or_else(|_| Vec::new(), |e| (e.data_files)(&self.config))
    }

    /// The one-hot labels that were its v side, if they were: `[classes, classes]`.
    pub fn labels(&self) -> Option<OneHot> {
        let labelled = find(&self.config.experiment).is_ok_and(|e| e.labelled);
        labelled.then(|| OneHot(self.network.encoders[Side::V as usize].input))
    }
}

/// One-hot labels of so many classes.
#[derive(Clone, Copy, Debug)]
pub struct OneHot(pub usize);

impl Rows for OneHot {
    fn count(&self) -> usize {
        self.0
    }
    fn dim(&self) -> usize {
        self.0
    }
    fn read(&self, first: usize, out: &mut [f32]) {
        out.chunks_exact_mut(self.0).enumerate().for_each(|(row, out)| {
            out.fill(0.0);
            out[first + row] = 1.0;
        });
    }
}
