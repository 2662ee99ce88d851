//! `contrastive loss`.

use super::device::only_cpu;
use super::{Common, Failure, as_flag, bad_flag, check_outputs, check_room};
use crate::config::{ObjectiveName, from_text};
use crate::data::npy::{Npy, read_npy_i64, write_npy_f32};
use crate::objective::{
    self, Batch, DataKernel, Gradients, LossError, Matrix, Moments, Objective, Pairs, Positives, Precision, Storage,
    Tilting, Write, features::random_fourier,
};
use half::{bf16, f16};
use serde_json::json;
use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// Flags of `loss`.
#[derive(clap::Args)]
pub struct Loss {
    /// Row embeddings, [N, D] .npy
    #[arg(long, value_name = "U.npy")]
    u: PathBuf,
    /// Column embeddings, [M, D] .npy; pair i is row i of both unless --positives or --groups-* say otherwise
    #[arg(long, value_name = "V.npy")]
    v: PathBuf,
    /// cosine, dot or l2
    #[arg(long, default_value = "cosine", value_name = "TILTING", value_parser = from_text::<Tilting>)]
    tilting: Tilting,
    /// conditional, joint, sigmoid, mmd or joint-mmd
    #[arg(long, default_value = "conditional", value_name = "OBJECTIVE", value_parser = from_text::<ObjectiveName>)]
    objective: ObjectiveName,
    /// Weight of u|v (conditional, mmd)
    #[arg(long, default_value_t = 1.0, value_name = "X", allow_negative_numbers = true)]
    lambda_u: f64,
    /// Weight of v|u (conditional, mmd)
    #[arg(long, default_value_t = 1.0, value_name = "X", allow_negative_numbers = true)]
    lambda_v: f64,
    /// Temperature
    #[arg(long, default_value_t = 0.07, value_name = "X", allow_negative_numbers = true)]
    tau: f64,
    /// Bias of the sigmoid loss
    #[arg(long, default_value_t = 0.0, value_name = "X", allow_negative_numbers = true)]
    bias: f64,
    /// Label smoothing, in [0, 1)
    #[arg(long, default_value_t = 0.0, value_name = "X", allow_negative_numbers = true)]
    smoothing: f64,
    /// joint: random pairings that stand for all pairs; 0 takes all pairs
    #[arg(long, default_value_t = 0, value_name = "K", allow_negative_numbers = true)]
    pairings: u32,
    /// Write dL/du, [N, D] f32 .npy [default: not written]
    #[arg(long, value_name = "DU.npy")]
    grad_u: Option<PathBuf>,
    /// Write dL/dv, [M, D] f32 .npy [default: not written]
    #[arg(long, value_name = "DV.npy")]
    grad_v: Option<PathBuf>,
    /// mmd, joint-mmd: data behind the rows, [N, x] .npy [default: none]
    #[arg(long, value_name = "X.npy")]
    data_u: Option<PathBuf>,
    /// mmd, joint-mmd: data behind the columns, [M, y] .npy [default: none]
    #[arg(long, value_name = "Y.npy")]
    data_v: Option<PathBuf>,
    /// mmd, joint-mmd: kernel on data, gaussian:WIDTH or linear
    #[arg(long, default_value = "gaussian:1", value_name = "KERNEL", value_parser = from_text::<DataKernel>)]
    kernel: DataKernel,
    /// mmd, joint-mmd: random Fourier features of the Gaussian kernel, even [default: the exact Gram matrix]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    features: Option<usize>,
    /// Row i's positive column, [N] integer .npy [default: column i]
    #[arg(long, value_name = "P.npy", conflicts_with_all = ["groups_u", "groups_v"])]
    positives: Option<PathBuf>,
    /// Group of each row, [N] integer .npy: equal groups are positives [default: none]
    #[arg(long, value_name = "GU.npy", requires = "groups_v")]
    groups_u: Option<PathBuf>,
    /// Group of each column, [M] integer .npy [default: none]
    #[arg(long, value_name = "GV.npy", requires = "groups_u")]
    groups_v: Option<PathBuf>,
    /// Id of each row, [N] integer .npy: pairs of equal ids that are not positives are left out [default: none]
    #[arg(long, value_name = "IU.npy", requires = "ignore_v")]
    ignore_u: Option<PathBuf>,
    /// Id of each column, [M] integer .npy [default: none]
    #[arg(long, value_name = "IV.npy", requires = "ignore_u")]
    ignore_v: Option<PathBuf>,
    /// Weight of each row, [N] .npy [default: all equal]
    #[arg(long, value_name = "WU.npy")]
    weights_u: Option<PathBuf>,
    /// Weight of each column, [M] .npy [default: all equal]
    #[arg(long, value_name = "WV.npy")]
    weights_v: Option<PathBuf>,
    /// On the CPU: bytes in which logits may be kept between passes, a quarter less work where all fit
    #[arg(long, default_value_t = crate::device::cpu::WORKSPACE, value_name = "BYTES", allow_negative_numbers = true)]
    workspace: usize,
}

/// The file's numbers as f32: the mapped file itself where it is f32 already.
fn as_f32(file: &Npy) -> Cow<'_, [f32]> {
    file.as_f32().map_or_else(
        || {
            let mut out = vec![0.0; file.rows() * file.dim()];
            file.read_rows(0..file.rows(), &mut out);
            out.into()
        },
        Cow::Borrowed,
    )
}

/// Embeddings in the storage asked for.
enum Stored<'a> {
    F32(Cow<'a, [f32]>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl<'a> Stored<'a> {
    fn new(file: &'a Npy, precision: Precision) -> Self {
        let x = as_f32(file);
        match precision {
            Precision::F32 => Stored::F32(x),
            Precision::Bf16 => Stored::Bf16(x.iter().map(|&x| bf16::from_f32(x)).collect()),
            Precision::F16 => Stored::F16(x.iter().map(|&x| f16::from_f32(x)).collect()),
        }
    }

    fn matrix(&self, file: &Npy) -> Matrix<'_> {
        let data = match self {
            Stored::F32(x) => Storage::F32(x),
            Stored::Bf16(x) => Storage::Bf16(x),
            Stored::F16(x) => Storage::F16(x),
        };
        Matrix { data, rows: file.rows(), dim: file.dim() }
    }
}

/// One integer for each of `rows`.
fn ids(path: &Option<PathBuf>, rows: usize) -> Result<Option<Vec<i64>>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let (shape, ids) = read_npy_i64(path)?;
    if ids.len() != rows || shape[0] != rows {
        return Err(shape_of(path, format!("shape {shape:?}"), format!("{rows} integers")));
    }
    Ok(Some(ids))
}

fn shape_of(path: &Path, found: String, expected: String) -> Failure {
    Failure::Input(format!("{}: found {found}, expected {expected}", path.display()))
}

fn weights(path: &Option<PathBuf>, rows: usize) -> Result<Option<Vec<f32>>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let file = Npy::open(path)?;
    if [file.rows(), file.dim()] != [rows, 1] {
        let found = format!("an array of shape [{}, {}]", file.rows(), file.dim());
        return Err(shape_of(path, found, format!("{rows} numbers")));
    }
    Ok(Some(as_f32(&file).into_owned()))
}

/// What the files say, checked against one another.
struct Inputs {
    u: Npy,
    v: Npy,
    positives: Option<Vec<u32>>,
    groups: Option<(Vec<i64>, Vec<i64>)>,
    ignore: Option<(Vec<i64>, Vec<i64>)>,
    weights: [Option<Vec<f32>>; 2],
    data: Option<[Npy; 2]>,
}

impl Inputs {
    /// Opens and checks all files; those of data are there where `mmd`, and only there.
    fn open(args: &Loss, mmd: bool) -> Result<Self, Failure> {
        let (u, v) = (Npy::open(&args.u)?, Npy::open(&args.v)?);
        let (n, m, d) = (u.rows(), v.rows(), u.dim());
        if v.dim() != d {
            let expected = format!("{d}, as {} has", args.u.display());
            return Err(shape_of(&args.v, format!("{} columns", v.dim()), expected));
        }
        if args.positives.is_none() && args.groups_u.is_none() && n != m {
            let expected = format!("{n}, as {} has (or --positives, or --groups-u and --groups-v)", args.u.display());
            return Err(shape_of(&args.v, format!("{m} rows"), expected));
        }
        let both = |u, v| Ok::<_, Failure>(ids(u, n)?.zip(ids(v, m)?));
        Ok(Inputs {
            positives: columns(&args.positives, n, m)?,
            groups: both(&args.groups_u, &args.groups_v)?,
            ignore: both(&args.ignore_u, &args.ignore_v)?,
            weights: [weights(&args.weights_u, n)?, weights(&args.weights_v, m)?],
            data: data(args, [n, m], mmd)?,
            u,
            v,
        })
    }

    fn pairs(&self) -> Pairs<'_> {
        let positives = match (&self.positives, &self.groups) {
            (Some(index), _) => Positives::Index(index),
            (None, Some((u, v))) => Positives::Groups { u, v },
            (None, None) => Positives::Diagonal,
        };
        Pairs {
            positives,
            ignore: self.ignore.as_ref().map(|(u, v)| (&u[..], &v[..])),
            weights_u: self.weights[0].as_deref(),
            weights_v: self.weights[1].as_deref(),
        }
    }
}

/// Row i's column, `[rows]`, each below `cols`.
fn columns(path: &Option<PathBuf>, rows: usize, cols: usize) -> Result<Option<Vec<u32>>, Failure> {
    let (Some(file), Some(index)) = (path, ids(path, rows)?) else { return Ok(None) };
    if let Some(j) = index.iter().find(|&&j| j < 0 || j >= cols as i64) {
        return Err(shape_of(file, j.to_string(), format!("the index of a column, 0 to {}", cols - 1)));
    }
    Ok(Some(index.iter().map(|&j| j as u32).collect()))
}

/// Data behind rows and columns, as many as `counts`.
fn data(args: &Loss, counts: [usize; 2], mmd: bool) -> Result<Option<[Npy; 2]>, Failure> {
    let paths = match (&args.data_u, &args.data_v) {
        (Some(u), Some(v)) if mmd => [u, v],
        (None, None) if !mmd => return Ok(None),
        _ if mmd => {
            let expected = format!("both for {}", args.objective.name());
            return Err(bad_flag("--data-u and --data-v", "not both", expected));
        }
        _ => {
            let expected = format!("none: {} has no use for data", args.objective.name());
            return Err(bad_flag("--data-u, --data-v", "files", expected));
        }
    };
    let [u, v] = [0, 1].map(|side| {
        let (file, rows) = (Npy::open(paths[side])?, counts[side]);
        if file.rows() != rows {
            let expected = format!("{rows}, one for each embedding");
            return Err(shape_of(paths[side], format!("{} rows", file.rows()), expected));
        }
        file.check_finite()?;
        Ok(file)
    });
    Ok(Some([u?, v?]))
}

impl Loss {
    /// Fails unless gradients may be written where they are to go.
    fn check_outputs(&self) -> Result<(), Failure> {
        let beside = [
            &self.data_u,
            &self.data_v,
            &self.positives,
            &self.groups_u,
            &self.groups_v,
            &self.ignore_u,
            &self.ignore_v,
            &self.weights_u,
            &self.weights_v,
        ];
        let inputs: Vec<_> = [Some(&self.u), Some(&self.v)].into_iter().chain(beside.map(Option::as_ref)).collect();
        check_outputs(&[("--grad-u", self.grad_u.as_ref()), ("--grad-v", self.grad_v.as_ref())], &inputs, None)
    }
}

pub fn run(args: &Loss, common: &Common) -> Result<(), Failure> {
    let lambdas = [args.lambda_u, args.lambda_v];
    let loss = objective::Loss {
        tilting: args.tilting,
        objective: args.objective.with(lambdas, args.bias, args.pairings, common.seed()),
        tau: args.tau,
        smoothing: args.smoothing,
    };
    let mmd = loss.objective.takes_moments();
    let kernel = args.kernel;
    let gram = (mmd && args.features.is_none()).then_some(kernel);
    let choice = common.choose(only_cpu(gram))?;
    if args.features.is_some_and(|f| f == 0 || f % 2 == 1) {
        return Err(bad_flag("--features", args.features.unwrap_or(0), "an even number, 2 or more"));
    }
    let inputs = Inputs::open(args, mmd)?;
    let (n, m, d) = (inputs.u.rows(), inputs.v.rows(), inputs.u.dim());
    args.check_outputs()?;
    if let Some(features) = args.features {
        // Features of each row and column, residuals, targets, what the targets' sums lost, and a packed operand; moments.
        check_room("--features", &[features, n + m, 5])?;
        if matches!(loss.objective, Objective::JointMmd) {
            check_room("--features", &[features, features, 4])?;
        }
    }
    check_room("--workspace", &[(args.workspace / 4).min(n.saturating_mul(m))])?;
    if args.pairings > 0 {
        // A logit and two indices for each pair.
        check_room("--pairings", &[args.pairings as usize + 1, n, 3])?;
    }

    let raw = inputs.data.as_ref().map(|data| data.each_ref().map(|file| (as_f32(file), file.dim())));
    let features = match (&raw, args.features, kernel) {
        (Some(raw), Some(count), DataKernel::Gaussian { width }) => {
            let map = |(x, dim): &(Cow<'_, [f32]>, usize)| random_fourier(x, *dim, width, count, common.seed());
            Some((raw.each_ref().map(map), count))
        }
        _ => None,
    };
    let moments = match (&features, &raw) {
        (Some(([u, v], count)), _) => Some(Moments::Features { u: Matrix::f32(u, *count), v: Matrix::f32(v, *count) }),
        (None, Some(raw)) => {
            let [u, v] = raw.each_ref().map(|(x, dim)| Matrix::f32(x, *dim));
            Some(Moments::Gram { kernel, u, v })
        }
        (None, None) => None,
    };
    let [stored_u, stored_v] = [&inputs.u, &inputs.v].map(|file| Stored::new(file, choice.precision()));
    let (u, v) = (stored_u.matrix(&inputs.u), stored_v.matrix(&inputs.v));
    let batch = Batch { u, v, pairs: inputs.pairs(), offset_v: None, moments };
    let mut grad_u = args.grad_u.as_ref().map(|_| vec![0f32; n * d]);
    let mut grad_v = args.grad_v.as_ref().map(|_| vec![0f32; m * d]);
    let mut engine = choice.engine(args.workspace);
    let begun = std::time::Instant::now();
    let gradients = Gradients {
        u: grad_u.as_deref_mut().map(Write::Set),
        v: grad_v.as_deref_mut().map(Write::Set),
        offset_v: None,
    };
    let value = engine.loss(&loss, &batch, gradients).map_err(|e| refused(args, e))?;
    let seconds = begun.elapsed().as_secs_f64();
    let finite = |x: &Option<Vec<f32>>| x.iter().flatten().all(|x| x.is_finite());
    if !(value.loss.is_finite() && value.grad_tau.is_finite() && finite(&grad_u) && finite(&grad_v)) {
        let found = format!("{}, at which the loss or gradients of these files are beyond f32", args.tau);
        return Err(bad_flag("--tau", found, "a larger one, or smaller numbers in them"));
    }
    choice.announce();
    for (path, gradient, rows) in [(&args.grad_u, &grad_u, n), (&args.grad_v, &grad_v, m)] {
        if let (Some(path), Some(gradient)) = (path, gradient) {
            write_npy_f32(path, &[rows, d], gradient)?;
        }
    }
    let mut json = json!({
        "loss": value.loss,
        "grad_tau": value.grad_tau,
        "grad_bias": value.grad_bias,
        "n": n,
        "m": m,
        "d": d,
        "device": choice.kind(),
        "precision": choice.precision().name(),
        "seconds": seconds,
        "scratch_bytes": engine.scratch_bytes(),
    });
    if let Some(offset) = loss.objective.clip_offset(n, m) {
        json["loss_clip"] = (value.loss + offset).into();
    }
    let lines: Vec<String> = ["loss", "loss_clip", "grad_tau", "grad_bias", "n", "m", "d", "seconds", "scratch_bytes"]
        .iter()
        .filter(|key| !json[**key].is_null())
        .map(|key| format!("{key:<14}{}", json[*key]))
        .collect();
    common.print(&json, &lines)
}

/// What the loss refuses, under the name of the file or flag it came from.
fn refused(args: &Loss, e: LossError) -> Failure {
    let (what, found, expected) = match e {
        LossError::NotFinite { what, row } => {
            let row = row.map_or_else(String::new, |row| format!(" in row {row}"));
            let found = format!("a number that is not finite (in this storage){row}");
            (what, found, "finite numbers".into())
        }
        LossError::Parameter { what, found, expected } => (what, found, expected.into_owned()),
        e @ LossError::Device(_) => return e.into(),
        LossError::Shape { what, found, expected } => (what, found, expected),
    };
    let file = match what {
        "u" => Some(&args.u),
        "v" => Some(&args.v),
        "data of u" => args.data_u.as_ref(),
        "data of v" => args.data_v.as_ref(),
        "weights of u" => args.weights_u.as_ref(),
        "weights of v" => args.weights_v.as_ref(),
        "positives" => args.positives.as_ref(),
        _ => None,
    };
    match (file, what) {
        (Some(path), _) => shape_of(path, found, expected),
        (None, "groups") => bad_flag("--groups-u, --groups-v", found, expected),
        (None, "tau" | "bias" | "smoothing" | "pairings" | "lambda_u" | "lambda_v" | "lambda_u and lambda_v") => {
            bad_flag(&as_flag(what), found, expected)
        }
        (None, "kernel width") => bad_flag("--kernel", format!("gaussian:{found}"), expected),
        (None, "shuffled joint loss") => bad_flag("--pairings", found, expected),
        _ => bad_flag(what, found, expected),
    }
}
