//! `contrastive train`.

use super::device::Device;
use super::{Common, Failure, from_file, from_flag, on_terminal};
use crate::checkpoint::Checkpoint;
use crate::config::{ConfigError, ObjectiveName, Partial, from_text};
use crate::device::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::device::cuda::Cuda;
use crate::experiments::{self, Outcome};
use crate::objective::{DataKernel, Precision, Tilting};
use crate::optim::Schedule;
use crate::train::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

/// After so long a second Ctrl-C is one of its own.
const AGAIN: Duration = Duration::from_secs(1);

/// Flags of `train`. What is not given comes from --config, then from the experiment's own defaults, and ends up in
/// the run's config.toml.
#[derive(clap::Args)]
pub struct Train {
    /// gp, gaussian2d, digits, mnist, ocean or pairs [default: gp]
    #[arg(value_name = "EXPERIMENT")]
    experiment: Option<String>,
    /// Settings, .toml: every flag but this and --json is also a key, a dash an underscore [default: none]
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Folder of the run's files [default: runs/EXPERIMENT]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on from the folder's checkpoint, to the same bits as if never stopped [default: start anew]
    #[arg(long)]
    resume: bool,
    /// A short run, for a first look and for tests: other sizes, epochs, rates and, of ocean, temperature, where none are
    /// given; the run's config.toml has them [default: off]
    #[arg(long)]
    quick: bool,
    /// pairs: the u side, .npy [default: none]
    #[arg(long, value_name = "U.npy")]
    u: Option<PathBuf>,
    /// pairs: the v side, .npy [default: none]
    #[arg(long, value_name = "V.npy")]
    v: Option<PathBuf>,
    /// mnist: folder of the four IDX files, plain or .gz; ocean: of u.npy and v.npy of `data ocean` [default: none]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Samples to generate: to train on, for ocean to hold out from too [default: gp, gaussian2d 10000; digits 20000; ocean 64536]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    samples: Option<usize>,
    /// Share of the pairs held out for the report [default: pairs 0.1, digits 0.25, ocean 0.5]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    held_out: Option<f64>,
    /// Passes over the training pairs [default: gp 500, gaussian2d 200, digits 8, mnist 300, ocean 20, pairs 10]
    #[arg(long, value_name = "E", allow_negative_numbers = true)]
    epochs: Option<u64>,
    /// Pairs a step [default: 512; ocean 128]
    #[arg(long, value_name = "B", allow_negative_numbers = true)]
    batch: Option<usize>,
    /// Gradient caching: pairs embedded at a time, a divisor of the batch; 0 is off [default: 0]
    #[arg(long, value_name = "B", allow_negative_numbers = true)]
    micro_batch: Option<usize>,
    /// Peak learning rate [default: gp, digits, pairs 0.001; gaussian2d 0.003; mnist, ocean 0.0001]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    lr: Option<f64>,
    /// Steps of linear warmup [default: 0]
    #[arg(long, value_name = "STEPS", allow_negative_numbers = true)]
    warmup: Option<u64>,
    /// Learning rate after the warmup: constant or cosine [default: gp, gaussian2d cosine; else constant]
    #[arg(long, value_name = "SCHEDULE", value_parser = from_text::<Schedule>)]
    schedule: Option<Schedule>,
    /// Largest gradient norm; 0 does not clip [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    grad_clip: Option<f64>,
    /// Embedding dimension [default: gp 5, gaussian2d 1, digits and mnist 10, ocean 98, pairs 128]
    #[arg(long, value_name = "D", allow_negative_numbers = true)]
    dim: Option<usize>,
    /// cosine, dot or l2 [default: pairs, ocean cosine; else dot]
    #[arg(long, value_name = "TILTING", value_parser = from_text::<Tilting>)]
    tilting: Option<Tilting>,
    /// conditional, joint, sigmoid, mmd or joint-mmd [default: conditional]
    #[arg(long, value_name = "OBJECTIVE", value_parser = from_text::<ObjectiveName>)]
    objective: Option<ObjectiveName>,
    /// Weight of u|v [default: 1; digits 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    lambda_u: Option<f64>,
    /// Weight of v|u [default: 1; digits 2]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    lambda_v: Option<f64>,
    /// Temperature, the initial one if trained [default: pairs, ocean 0.07; else 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    tau: Option<f64>,
    /// Train the temperature: log(1/tau), kept in [0, ln 100] [default: pairs, ocean on; else off]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    train_tau: Option<bool>,
    /// Initial bias of the sigmoid loss, which is trained [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    bias: Option<f64>,
    /// Label smoothing, in [0, 1) [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    smoothing: Option<f64>,
    /// joint: random pairings that stand for all pairs; 0 takes all [default: 0]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pairings: Option<u32>,
    /// mmd, joint-mmd: kernel on data, gaussian:WIDTH or linear [default: gaussian:1]
    #[arg(long, value_name = "KERNEL", value_parser = from_text::<DataKernel>)]
    kernel: Option<DataKernel>,
    /// mmd, joint-mmd: random Fourier features of a Gaussian kernel, even [default: 64]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    features: Option<usize>,
    /// Steps between lines of metrics.jsonl [default: 10]
    #[arg(long, value_name = "STEPS", allow_negative_numbers = true)]
    log_every: Option<u64>,
    /// What the file of settings says, once it has been read.
    #[arg(skip)]
    given: Partial,
}

impl Train {
    /// The file of settings: --config's or, of a run that goes on, its own.
    fn file(&self) -> Option<PathBuf> {
        let own = || {
            let experiment = self.experiment.as_deref().unwrap_or(experiments::ALL[0].name);
            Some(folder(&self.out, experiment).join(crate::checkpoint::CONFIG))
                .filter(|own| self.resume && own.exists())
        };
        self.config.clone().or_else(own)
    }

    /// The settings among the flags.
    fn flags(&self, common: &Common) -> Result<Partial, Failure> {
        Ok(Partial {
            experiment: self.experiment.clone(),
            u: self.u.clone(),
            v: self.v.clone(),
            data: self.data.clone(),
            samples: self.samples,
            held_out: self.held_out,
            quick: self.quick.then_some(true),
            epochs: self.epochs,
            batch: self.batch,
            micro_batch: self.micro_batch,
            dim: self.dim,
            tilting: self.tilting,
            objective: self.objective,
            lambda_u: self.lambda_u,
            lambda_v: self.lambda_v,
            tau: self.tau,
            train_tau: self.train_tau,
            bias: self.bias,
            smoothing: self.smoothing,
            pairings: self.pairings,
            kernel: self.kernel,
            features: self.features,
            precision: common.precision,
            seed: common.seed,
            lr: self.lr,
            warmup: self.warmup,
            schedule: self.schedule,
            grad_clip: self.grad_clip,
            log_every: self.log_every,
            ..Partial::default()
        })
    }

    /// Reads the file of settings, and takes from it what says where and how the run is made, unless flags do.
    pub fn settle(&mut self, common: &mut Common) -> Result<(), Failure> {
        let Some(file) = self.file() else { return Ok(()) };
        let mut given = Partial::read(&file)?;
        if self.quick && given.quick == Some(false) {
            // A run's own settings leave nothing to what a short run would have by default.
            let found = format!("{}, which says quick = false", file.display());
            return Err(super::bad_flag("--quick", found, "settings that do not, or the flag left out"));
        }
        self.out = self.out.take().or(given.out.take());
        self.resume |= given.resume.unwrap_or(false);
        if common.threads.is_none() {
            super::check_threads(given.threads).map_err(|e| from_file(&file, e))?;
            common.threads = given.threads;
        }
        if common.device.is_none()
            && let Some(device) = given.device.take()
        {
            super::check_device(&device).map_err(|e| from_file(&file, e))?;
            common.device = Some(device);
        }
        self.given = given;
        Ok(())
    }
}

/// Where a run's files go.
fn folder(out: &Option<PathBuf>, experiment: &str) -> PathBuf {
    out.clone().unwrap_or_else(|| PathBuf::from("runs").join(experiment))
}

pub fn run(args: Train, common: &Common) -> Result<(), Failure> {
    let (file, flags) = (args.file(), args.flags(common)?);
    let given = args.given;
    // What is refused has the name it was given by.
    let refused = |e: ConfigError| match (&file, e) {
        (Some(path), e @ ConfigError::Value { key, .. }) if given.has(key) && !flags.has(key) => from_file(path, e),
        (_, e) => from_flag(e),
    };
    let precision = flags.precision.or(given.precision);
    let mut config = experiments::resolve(flags.clone().over(given.clone())).map_err(refused)?;
    // A run's settings name its files wherever they are read.
    for path in [&mut config.u, &mut config.v, &mut config.data] {
        if !path.as_os_str().is_empty() {
            *path = std::path::absolute(&path).map_err(|source| ConfigError::Io { path: path.clone(), source })?;
        }
    }
    let dir = folder(&args.out, &config.experiment);
    let read = [("--u", &config.u), ("--v", &config.v)].into_iter().chain(file.iter().map(|file| ("--config", file)));
    for (flag, path) in read.filter(|(_, path)| path.exists()) {
        // A run may be told by what it leaves: its own settings.
        let taken = experiments::files().map(|name| dir.join(name)).find(|own| super::place(own) == super::place(path));
        if taken.is_some_and(|own| flag != "--config" || !own.ends_with(crate::checkpoint::CONFIG)) {
            return Err(super::bad_flag(flag, path.display(), format!("another file than those of {}", dir.display())));
        }
    }
    let full = common.precision.is_none() && precision == Some(Precision::F32);
    let choice = common.choose(full.then(|| "the settings say f32, and f32 products are the CPU's".to_owned()))?;
    if precision.is_none() {
        config.precision = choice.precision();
    }
    let (stop, stepping) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
    stop_at_a_step(stop.clone(), stepping.clone())?;
    let bar = on_terminal().then(bar);
    // With the first step, when everything has been checked; a run that was finished before has no step.
    let resume = args.resume;
    let anew = resume && !Checkpoint::is_there(&dir)?;
    let said = Once::new();
    let announce = || {
        said.call_once(|| {
            choice.announce();
            if anew {
                super::log(format_args!("no checkpoint in {}: the run starts anew", dir.display()));
            }
        });
    };
    let mut observe = |progress: Progress| {
        stepping.store(true, Ordering::Relaxed);
        announce();
        if let Some(bar) = &bar {
            let [step, steps] = progress.steps;
            if bar.length() != Some(steps) {
                // Steps of an earlier part of this run are not this part's speed.
                bar.set_length(steps);
                bar.set_position(step);
                bar.reset_eta();
            }
            bar.set_position(step);
            bar.set_message(format!("{:.4}", progress.loss));
        }
    };
    let Outcome { report, stopped } = match &choice.device {
        Device::Cpu => experiments::run(&mut Cpu::new(), &config, &dir, resume, &stop, &mut observe),
        #[cfg(feature = "cuda")]
        Device::Cuda(driver, _) => {
            let mut card = Cuda::new(driver, config.precision);
            experiments::run(&mut card, &config, &dir, resume, &stop, &mut observe)
        }
    }
    .map_err(|e| match e {
        experiments::Error::Config(e) => refused(e),
        e => e.into(),
    })?;
    announce();
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    if stopped {
        super::log(format_args!("stopped; checkpoint in {}, --resume goes on", dir.display()));
        return Err(Failure::Stopped);
    }
    let json = serde_json::Value::Object(report.values);
    let mut lines = report.table;
    lines.push(format!(
        "{} steps in {:.1} s, {:.0} pairs/s, loss {:.6}; files in {}",
        json["steps"],
        json["seconds"].as_f64().unwrap_or_default(),
        json["samples_per_s"].as_f64().unwrap_or_default(),
        json["loss"].as_f64().unwrap_or_default(),
        dir.display()
    ));
    common.print(&json, &lines)
}

/// Has Ctrl-C end the run with its next step, by `stop`. It ends the program before the first one, when there is nothing to
/// save, and the second time, when nobody waits for a checkpoint; but one signal may come twice, from a terminal and from who
/// watches over the program.
fn stop_at_a_step(stop: Arc<AtomicBool>, stepping: Arc<AtomicBool>) -> Result<(), Failure> {
    let mut first = None::<Instant>;
    super::on_stop(move || {
        stop.store(true, Ordering::Relaxed);
        let again = first.get_or_insert_with(Instant::now).elapsed() > AGAIN;
        if again || !stepping.load(Ordering::Relaxed) {
            super::leave();
        }
    })
}

fn bar() -> ProgressBar {
    let style = "{bar:40} step {pos}/{len}, {per_sec}, loss {msg}, {eta} left";
    let style = ProgressStyle::with_template(style).expect("a valid template");
    // Redrawn ten times a second, however many steps there are.
    let target = indicatif::ProgressDrawTarget::stderr_with_hz(10);
    ProgressBar::with_draw_target(None, target).with_style(style)
}
