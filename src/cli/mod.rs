//! The command line: parses, prints and exits; nothing else does.
//!
//! Status 0: done. 2: bad usage or bad input, one line `error: ...` on stderr. 130: stopped by Ctrl-C, after a
//! checkpoint. 1: anything else.

mod bench;
mod data;
mod device;
mod loss;
mod reproduce;
mod tasks;
mod train;

use self::device::why_not_cuda;
use crate::config::{ConfigError, from_text};
use crate::data::{DataError, abandon_writes, download::DownloadError, fits_memory};
use crate::device::DeviceError;
use crate::device::cpu::Isa;
#[cfg(feature = "cuda")]
use crate::device::cuda::CudaError;
use crate::experiments;
use crate::objective::{LossError, Precision};
use crate::train::TrainError;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand};
use std::error::Error;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Contrastive learning at the speed of the hardware.
///
/// Tilted distributions learned by contrast: fused losses that never form the N x N matrix, a trainer without
/// autograd, and closed forms that certify what was learned.
#[derive(Parser)]
#[command(name = "contrastive", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

/// Flags of every command.
#[derive(Args, Clone)]
struct Common {
    /// Where to compute: auto, cpu, cuda or cuda:K [default: auto]
    #[arg(long, global = true, value_name = "DEVICE")]
    device: Option<String>,
    /// Storage of embeddings, accumulated in f32: f32, bf16 or f16 [default: f32 on cpu, bf16 on cuda, where `retrieve` rounds nothing]
    #[arg(long, global = true, value_name = "PRECISION", value_parser = from_text::<Precision>)]
    precision: Option<Precision>,
    /// Makes the run reproducible bit for bit, whatever the number of threads [default: 0]
    #[arg(long, global = true, value_name = "S", allow_negative_numbers = true)]
    seed: Option<u64>,
    /// Threads [default: all cores]
    #[arg(long, global = true, value_name = "T", allow_negative_numbers = true)]
    threads: Option<usize>,
    /// Print one JSON object on stdout and nothing else
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Evaluate one objective and its gradients on embeddings of your own
    Loss(Box<loss::Loss>),
    /// Train encoders: without arguments, the built-in Gaussian process, certified against its theory
    Train(Box<train::Train>),
    /// Embed data with a trained model
    Embed(tasks::Embed),
    /// Find the best items for each query, exactly
    Retrieve(tasks::Retrieve),
    /// Label data with a trained model
    Classify(tasks::Classify),
    /// Draw from the learned conditional law of one side given the other
    Sample(tasks::Sample),
    /// Make the paper's figures again, each beside what the theory or the paper says
    Reproduce(reproduce::Reproduce),
    /// Time the fused loss, exact search or training steps
    Bench(bench::Bench),
    /// Show what this machine computes with
    Devices,
    /// Write a built-in data set as .npy files, or download MNIST
    Data(data::Data),
}

/// Why a command ends early.
enum Failure {
    /// Bad usage or input: status 2.
    Input(String),
    /// Anything else: status 1.
    Other(String),
    /// Stopped by the user: status 130.
    Stopped,
}

impl From<DataError> for Failure {
    fn from(e: DataError) -> Self {
        match e {
            DataError::Write { .. } => Failure::Other(e.to_string()),
            _ => Failure::Input(e.to_string()),
        }
    }
}

impl From<DownloadError> for Failure {
    fn from(e: DownloadError) -> Self {
        match e {
            DownloadError::Disk(e) => e.into(),
            refused => Failure::Other(refused.to_string()),
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(e: ConfigError) -> Self {
        Failure::Input(e.to_string())
    }
}

impl From<LossError> for Failure {
    fn from(e: LossError) -> Self {
        match e {
            LossError::Device(e) => Failure::Other(format!("{e}{}", flag_for(&e))),
            _ => Failure::Input(e.to_string()),
        }
    }
}

impl From<experiments::Error> for Failure {
    fn from(e: experiments::Error) -> Self {
        let flag = match &e {
            experiments::Error::Train(
                TrainError::Device(cause) | TrainError::Loss { source: LossError::Device(cause), .. },
            ) => flag_for(cause),
            _ => "",
        };
        let said = format!("{e}{flag}");
        if e.is_input() { Failure::Input(said) } else { Failure::Other(said) }
    }
}

/// The flag that helps where a device could not do something, if one does: the library knows no flags.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only cards fail so"))]
fn flag_for(cause: &DeviceError) -> &'static str {
    #[cfg(feature = "cuda")]
    match cause.downcast_ref() {
        Some(CudaError::Grid { .. }) => return " (train has --micro-batch)",
        Some(CudaError::Shape(_)) => return " (--device cpu)",
        _ => {}
    }
    ""
}

/// A flag's value out of its domain.
fn bad_flag(flag: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Failure {
    Failure::Input(format!("{flag}: found {found}, expected {expected}"))
}

/// `e`, of a value that can only have come from a flag, under the flag's name.
fn from_flag(e: ConfigError) -> Failure {
    match e {
        ConfigError::Value { key, found, expected } => bad_flag(&as_flag(key), found, expected),
        other => other.into(),
    }
}

/// `e`, of a value that came from the settings in `file`.
fn from_file(file: &Path, e: ConfigError) -> Failure {
    match e {
        e @ ConfigError::Value { .. } => Failure::Input(format!("{}: {e}", file.display())),
        other => other.into(),
    }
}

/// `lambda_u` as `--lambda-u`; experiments have no flag.
fn as_flag(key: &str) -> String {
    if key == "experiment" {
        return key.into();
    }
    key.split(" and ").map(|key| format!("--{}", key.replace('_', "-"))).collect::<Vec<_>>().join(", ")
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let mut cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if !e.use_stderr() => {
            // Help or version, asked for.
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
        Err(e) => return fail(Failure::Input(usage(&e))),
    };
    let settled = match &mut cli.command {
        Command::Train(train) => train.settle(&mut cli.common),
        _ => Ok(()),
    };
    match settled.and_then(|()| threads(&cli.common)).and_then(|()| rayon::scope(|_| run(cli))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(failure),
    }
}

fn fail(failure: Failure) -> ExitCode {
    let (status, message) = match failure {
        Failure::Input(message) => (2, message),
        Failure::Other(message) => (1, message),
        Failure::Stopped => return ExitCode::from(130),
    };
    log(format_args!("error: {}", message.replace('\n', " ")));
    ExitCode::from(status)
}

/// One line on stderr; nobody there to read it is no reason to fail.
fn log(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// clap's message on one line, without its own `error:` and its tips.
fn usage(e: &clap::Error) -> String {
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "no command given; see contrastive --help".into();
    }
    if let (ErrorKind::ValueValidation, Some(ContextValue::String(flag)), Some(ContextValue::String(found))) =
        (e.kind(), e.get(ContextKind::InvalidArg), e.get(ContextKind::InvalidValue))
    {
        // The words of std for what its numbers are parsed of.
        let reason = e.source().map(ToString::to_string).unwrap_or_default();
        let expected = match &reason[..] {
            "invalid float literal" => "a number".into(),
            "invalid digit found in string" | "cannot parse integer from empty string" => {
                "a whole number, 0 or more".into()
            }
            "cannot parse float from empty string" => "a number".into(),
            "number too large to fit in target type" => "a smaller one".into(),
            other => other.to_owned(),
        };
        return format!("{}: found {found}, expected {expected}", flag.split_whitespace().next().unwrap_or(flag));
    }
    let text = e.render().to_string();
    let first = text.split("\n\n").next().unwrap_or_default();
    let first = first.trim().strip_prefix("error: ").unwrap_or(first);
    format!("{}; see --help", first.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Threads that no machine has more of; many more take longer to start than to work.
const MOST_THREADS: usize = 1024;

fn check_threads(threads: Option<usize>) -> Result<(), ConfigError> {
    match threads {
        Some(threads) if !(1..=MOST_THREADS).contains(&threads) => {
            Err(ConfigError::value("threads", threads, format!("1 to {MOST_THREADS}")))
        }
        _ => Ok(()),
    }
}

fn check_device(name: &str) -> Result<(), ConfigError> {
    match name {
        "auto" | "cpu" | "cuda" => Ok(()),
        other if other.strip_prefix("cuda:").is_some_and(|k| k.parse::<u32>().is_ok()) => Ok(()),
        other => Err(ConfigError::value("device", other, "auto, cpu, cuda or cuda:K")),
    }
}

/// Makes the pool of as many threads as asked for. Commands then run inside it: entering it from outside costs two
/// context switches a parallel loop, which is half the time of a small training step.
fn threads(common: &Common) -> Result<(), Failure> {
    check_threads(common.threads).map_err(from_flag)?;
    let threads = common.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build_global().map_err(|e| Failure::Other(format!("--threads {threads}: {e}")))
}

/// What Ctrl-C, or a polite kill, does.
fn on_stop(stopping: impl FnMut() + Send + 'static) -> Result<(), Failure> {
    ctrlc::set_handler(stopping).map_err(|e| Failure::Other(format!("signals: {e}")))
}

/// Ends the program in the middle of whatever it does; no temporary file stays.
fn leave() {
    abandon_writes();
    std::process::exit(130);
}

fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { command, common } = cli;
    common.check()?;
    if !matches!(command, Command::Train(_)) {
        on_stop(leave)?;
    }
    match command {
        Command::Loss(args) => loss::run(&args, &common),
        Command::Train(args) => train::run(*args, &common),
        Command::Embed(args) => tasks::embed(&args, &common),
        Command::Retrieve(args) => tasks::retrieve(&args, &common),
        Command::Classify(args) => tasks::classify(&args, &common),
        Command::Sample(args) => tasks::sample(&args, &common),
        Command::Reproduce(args) => reproduce::run(&args, &common),
        Command::Bench(args) => bench::run(&args, &common),
        Command::Devices => devices(&common),
        Command::Data(args) => data::run(&args, &common),
    }
}

impl Common {
    /// Fails on a device that does not exist.
    fn check(&self) -> Result<(), Failure> {
        check_device(self.device()).map_err(from_flag)
    }

    fn device(&self) -> &str {
        self.device.as_deref().unwrap_or("auto")
    }

    fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }

    /// Prints `json` on one line, or `lines`.
    fn print(&self, json: &serde_json::Value, lines: &[String]) -> Result<(), Failure> {
        let text = if self.json { format!("{json}\n") } else { lines.iter().map(|l| format!("{l}\n")).collect() };
        match std::io::stdout().write_all(text.as_bytes()) {
            // Whoever read the other end has read enough.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(|e| Failure::Other(format!("stdout: {e}"))),
        }
    }
}

/// Fails where the machine has no memory for the product of `sizes` f32, the first of which `flag` gives.
fn check_room(flag: &str, sizes: &[usize]) -> Result<(), Failure> {
    if fits_memory(sizes) {
        return Ok(());
    }
    let product = sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
    Err(bad_flag(flag, sizes[0], format!("fewer: {product} f32 are more than there is memory for")))
}

/// Where a path leads, whatever it is called; what is not there yet has its folder's name.
fn place(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let own = || Some(folder.canonicalize().ok()?.join(path.file_name()?));
    path.canonicalize().ok().or_else(own).unwrap_or_else(|| path.to_owned())
}

/// A path in JSON, which has no bytes that are not text.
fn shown(path: impl AsRef<Path>) -> String {
    path.as_ref().display().to_string()
}

/// Fails unless `outputs`, each under its flag, can be written and are files of their own, none of them one of `inputs` or
/// of the run in the folder `model`.
fn check_outputs(
    outputs: &[(&str, Option<&PathBuf>)],
    inputs: &[Option<&PathBuf>],
    model: Option<&PathBuf>,
) -> Result<(), Failure> {
    let given = || outputs.iter().filter_map(|&(flag, path)| Some((flag, path?)));
    for (k, (flag, path)) in given().enumerate() {
        check_output(path)?;
        if let Some((other, _)) = given().take(k).find(|(_, other)| place(other) == place(path)) {
            return Err(bad_flag(flag, path.display(), format!("another file than {other}")));
        }
        let run = model.into_iter().flat_map(|dir| experiments::files().map(|name| dir.join(name)));
        if inputs.iter().flatten().copied().cloned().chain(run).any(|input| place(&input) == place(path)) {
            return Err(bad_flag(flag, path.display(), "another file than what is read"));
        }
    }
    Ok(())
}

/// Fails unless `path` can be written: a temporary file beside it, gone at once, shows that its folder takes one.
fn check_output(path: &Path) -> Result<(), Failure> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let named = path.file_name().is_some() && !path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let found = if path.is_dir() || !named {
        "a folder".into()
    } else if path.exists() && !path.is_file() {
        "a device".into()
    } else {
        match tempfile::tempfile_in(folder) {
            Ok(_) => return Ok(()),
            Err(e) => format!("a folder that takes no file ({})", e.kind()),
        }
    };
    Err(bad_flag(&path.display().to_string(), found, "a file in a folder that can be written"))
}

fn devices(common: &Common) -> Result<(), Failure> {
    let isas: Vec<_> = Isa::available().iter().map(|isa| isa.name()).collect();
    let threads = rayon::current_num_threads();
    let mut lines = vec![
        format!("cpu: {threads} threads; instruction sets {}; kernels run on {}", isas.join(", "), isas[0]),
        format!("build: {} {}", env!("CARGO_PKG_VERSION"), env!("CONTRASTIVE_COMMIT")),
    ];
    let (cards, kernels) = cards();
    let why_not = why_not_cuda();
    lines.extend(cards.iter().map(|(line, _)| line.clone()));
    if cards.is_empty() {
        lines.push(format!("cuda: none, {}", why_not.as_deref().unwrap_or("the driver sees no card")));
    }
    let cards: Vec<_> = cards.into_iter().map(|(_, json)| json).collect();
    let json = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": env!("CONTRASTIVE_COMMIT"),
        "cpu": {"threads": threads, "isa": isas[0], "available": isas},
        "cuda": {"cards": cards, "kernels": kernels, "why_not": why_not},
    });
    common.print(&json, &lines)
}

/// Each card, to read and as JSON, and the GPU kernels of this build.
#[cfg(feature = "cuda")]
fn cards() -> (Vec<(String, serde_json::Value)>, Vec<&'static str>) {
    use crate::device::cuda;
    let carried = cuda::carried();
    let found = cuda::cards().unwrap_or_default();
    let cards = found.iter().enumerate().map(|(k, info)| card(k, info, info.module(&carried))).collect();
    (cards, carried.into_iter().map(cuda::name).collect())
}

#[cfg(not(feature = "cuda"))]
fn cards() -> (Vec<(String, serde_json::Value)>, Vec<&'static str>) {
    (Vec::new(), Vec::new())
}

/// Card `k` and the kernels it would run, or why it runs none.
#[cfg(feature = "cuda")]
fn card(
    k: usize,
    info: &crate::device::cuda::CardInfo,
    module: Result<crate::device::cuda::Module, crate::device::cuda::CudaError>,
) -> (String, serde_json::Value) {
    use crate::device::cuda;
    let module = module.map(cuda::name).map_err(|why| why.to_string());
    let [major, minor] = info.capability;
    let (gib, driver) = (info.memory >> 30, cuda::version(info.driver));
    let runs = module.as_ref().map_or_else(|why| format!("no kernels: {why}"), |name| format!("kernels: {name}"));
    let line = format!("cuda:{k}: {}, {gib} GiB, sm_{major}{minor}, driver of CUDA {driver}; {runs}", info.name);
    let mut json = serde_json::json!(info);
    json["module"] = serde_json::json!(module.as_ref().ok());
    json["why_not"] = serde_json::json!(module.as_ref().err());
    (line, json)
}

/// Whether a progress bar has somebody to look at it.
fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::card;
    use crate::device::cuda::{CardInfo, Module};

    fn shown(driver: u32, capability: [u32; 2], carried: &[Module]) -> (String, serde_json::Value) {
        let info = CardInfo { name: "NVIDIA X".into(), memory: 80 << 30, capability, driver };
        card(1, &info, info.module(carried))
    }

    #[test]
    fn each_card_is_shown_with_its_kernels_or_why_it_has_none() {
        let both = [Module::Portable, Module::Hopper];
        let (line, json) = shown(12_040, [9, 0], &both);
        assert_eq!(line, "cuda:1: NVIDIA X, 80 GiB, sm_90, driver of CUDA 12.4; kernels: hopper");
        assert_eq!(json["module"], "hopper");
        assert!(json["why_not"].is_null());
        // What was shown before is shown still.
        assert_eq!(json["name"], "NVIDIA X");
        assert_eq!(json["memory"], 80u64 << 30);
        assert_eq!(json["capability"], serde_json::json!([9, 0]));

        assert!(shown(12_040, [8, 6], &both).0.ends_with("sm_86, driver of CUDA 12.4; kernels: portable"));
        for (driver, capability, carried, why) in [
            (11_080, [9, 0], &both[..], "of CUDA 11.8, and 12.0 is needed"),
            (12_040, [7, 5], &both, "capability 7.5, and 8.0 or later is needed"),
            (12_040, [9, 0], &[], "this build carries no GPU kernels"),
        ] {
            let (line, json) = shown(driver, capability, carried);
            assert!(line.contains("; no kernels: ") && line.contains(why), "{line}");
            assert!(json["module"].is_null() && json["why_not"].as_str().unwrap().contains(why), "{json}");
        }
    }
}
