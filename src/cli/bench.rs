//! `contrastive bench`.

mod tasks;

use super::device::Device;
use super::{Common, Failure, bad_flag, check_room};
use crate::config::{ObjectiveName, from_text};
use crate::device::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::device::cuda::{Buffer, Cuda, CudaError, Driver, contrast::Embedding, random::normals};
use crate::device::{Device as Verbs, Engine, Gemm, View, ViewMut};
use crate::objective::{
    Batch, Gradients, Loss, Matrix, Moments, Objective, Pairs, Precision, Storage, Tilting, Write,
    features::random_fourier, reference,
};
use half::{bf16, f16};
use kernels::random;
use rayon::prelude::*;
use serde_json::json;
#[cfg(feature = "cuda")]
use std::sync::Arc;
use std::time::Instant;

/// Flags of `bench`.
#[derive(clap::Args)]
pub struct Bench {
    /// What to time: loss (value and both gradients; its operations are counted as if no logits were kept, 8 N M D of a conditional one),
    /// retrieve (exact search) or train (steps of an experiment). The peak is this program's own f32 product, on cards the
    /// portable 16-bit one, so that a fraction of it may exceed 1
    #[arg(value_name = "WHAT")]
    what: String,
    /// Rows; queries to search for
    #[arg(long, default_value_t = 4096, value_name = "N", allow_negative_numbers = true)]
    n: usize,
    /// Columns; items to search [default: as many as rows]
    #[arg(long, value_name = "M", allow_negative_numbers = true)]
    m: Option<usize>,
    /// Embedding dimension
    #[arg(long, default_value_t = 128, value_name = "D", allow_negative_numbers = true)]
    d: usize,
    /// cosine, dot or l2
    #[arg(long, default_value = "cosine", value_name = "TILTING", value_parser = from_text::<Tilting>)]
    tilting: Tilting,
    /// conditional, joint, sigmoid, mmd or joint-mmd (with 64 random features)
    #[arg(long, default_value = "conditional", value_name = "OBJECTIVE", value_parser = from_text::<ObjectiveName>)]
    objective: ObjectiveName,
    /// Weight of u|v (conditional, mmd)
    #[arg(long, default_value_t = 1.0, value_name = "X", allow_negative_numbers = true)]
    lambda_u: f64,
    /// Weight of v|u (conditional, mmd)
    #[arg(long, default_value_t = 1.0, value_name = "X", allow_negative_numbers = true)]
    lambda_v: f64,
    /// On the CPU: bytes in which logits may be kept between passes, a quarter less work where all fit
    #[arg(long, default_value_t = crate::device::cpu::WORKSPACE, value_name = "BYTES", allow_negative_numbers = true)]
    workspace: usize,
    /// retrieve: items for each query
    #[arg(long, default_value_t = 5, value_name = "K", allow_negative_numbers = true)]
    k: usize,
    /// train: gp, gaussian2d, digits or ocean, with its own settings
    #[arg(long, default_value = "gp", value_name = "EXPERIMENT")]
    experiment: String,
}

/// Input sets that take turns, so that no run finds its inputs in cache because the last one left them there.
const SETS: usize = 3;
/// Numbers of one side from which on no cache remembers any of them: one set will do.
const BEYOND_CACHES: usize = 1 << 28;
/// Timed at least this often and this long.
const RUNS: usize = 7;
const SECONDS: f64 = 1.0;
/// Random features of the MMD objectives.
const FEATURES: usize = 64;
/// Rows and columns of the ceiling's product, at most.
const CEILING: usize = 4096;

/// Input sets for sides of so many numbers.
fn sets_of(numbers: usize) -> u64 {
    if numbers >= BEYOND_CACHES { 1 } else { SETS as u64 }
}

struct Set {
    f32: [Vec<f32>; 2],
    bf16: [Vec<bf16>; 2],
    f16: [Vec<f16>; 2],
    features: [Vec<f32>; 2],
}

impl Set {
    fn new(n: usize, m: usize, d: usize, precision: Precision, mmd: bool, seed: u64) -> Set {
        let f32 = [drawn(n * d, seed, 0), drawn(m * d, seed, 1)];
        let features = if mmd {
            [0, 1].map(|s: usize| random_fourier(&f32[s], d, (d as f64).sqrt(), FEATURES, seed))
        } else {
            Default::default()
        };
        let mut set = Set { bf16: Default::default(), f16: Default::default(), f32, features };
        match precision {
            Precision::F32 => {}
            Precision::Bf16 => {
                set.bf16 = std::mem::take(&mut set.f32).map(|x| x.into_iter().map(bf16::from_f32).collect())
            }
            Precision::F16 => {
                set.f16 = std::mem::take(&mut set.f32).map(|x| x.into_iter().map(f16::from_f32).collect())
            }
        }
        set
    }

    fn batch(&self, rows: [usize; 2], dim: usize, precision: Precision, mmd: bool) -> Batch<'_> {
        let [u, v] = [0, 1].map(|s: usize| Matrix {
            data: match precision {
                Precision::F32 => Storage::F32(&self.f32[s]),
                Precision::Bf16 => Storage::Bf16(&self.bf16[s]),
                Precision::F16 => Storage::F16(&self.f16[s]),
            },
            rows: rows[s],
            dim,
        });
        let [x, y] = self.features.each_ref().map(|x| Matrix::f32(x, FEATURES));
        let moments = mmd.then_some(Moments::Features { u: x, v: y });
        Batch { u, v, pairs: Pairs::default(), offset_v: None, moments }
    }
}

/// The first `len` of the standard normals of `(seed, stream)`.
fn drawn(len: usize, seed: u64, stream: u32) -> Vec<f32> {
    const FOURS: usize = 1 << 12;
    let mut out = vec![0f32; len];
    out.par_chunks_mut(4 * FOURS).enumerate().for_each(|(chunk, out)| {
        for (four, out) in out.chunks_mut(4).enumerate() {
            let index = (chunk * FOURS + four) as u64;
            out.copy_from_slice(&random::normals(seed, stream, index, f32::sqrt)[..out.len()]);
        }
    });
    out
}

pub fn run(args: &Bench, common: &Common) -> Result<(), Failure> {
    let (n, m, d) = (args.n, args.m.unwrap_or(args.n), args.d);
    if n == 0 || m == 0 || d == 0 {
        return Err(bad_flag("--n, --m, --d", format!("{n}, {m}, {d}"), "1 or more each"));
    }
    check_room("--n", &[n, d])?;
    check_room("--m", &[m, d])?;
    match &args.what[..] {
        "loss" => loss(args, common, [n, m, d]),
        "retrieve" => tasks::retrieve(args, common),
        "train" => tasks::train(args, common),
        other => Err(bad_flag("bench", other, "loss, retrieve or train")),
    }
}

fn loss(args: &Bench, common: &Common, [n, m, d]: [usize; 3]) -> Result<(), Failure> {
    let loss = Loss {
        tilting: args.tilting,
        objective: args.objective.with([args.lambda_u, args.lambda_v], -10.0, 0, common.seed()),
        tau: if args.tilting == Tilting::Cosine { 0.07 } else { (d as f64).sqrt() },
        smoothing: 0.0,
    };
    let mmd = loss.objective.takes_moments();
    let choice = common.choose(None)?;
    let precision = choice.precision();
    choice.announce();
    let sets = 0..sets_of(n.max(m) * d);
    let mut value = 0.0;
    let (times, scratch, ceiling, kernels);
    match &choice.device {
        Device::Cpu => {
            let mut engine = Cpu::new();
            engine.set_workspace(args.workspace);
            let bound = if precision == Precision::Bf16 { 1e-2 } else { 1e-4 };
            check_answer(&mut engine, &loss, d, precision, mmd, common.seed(), bound)?;
            let sets: Vec<Set> =
                sets.map(|s| Set::new(n, m, d, precision, mmd, common.seed().wrapping_add(s))).collect();
            let (mut du, mut dv) = (vec![0f32; n * d], vec![0f32; m * d]);
            times = time(|run| {
                let batch = sets[run % sets.len()].batch([n, m], d, precision, mmd);
                let gradients =
                    Gradients { u: Some(Write::Set(&mut du)), v: Some(Write::Set(&mut dv)), offset_v: None };
                value = engine.loss(&loss, &batch, gradients)?.loss;
                Ok(())
            })?;
            (scratch, ceiling, kernels) = (engine.scratch_bytes(), product(&engine, [n, m], d)?, engine.isa().name());
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(driver, name) => {
            let mut engine = Cuda::new(driver, precision);
            check_answer(&mut engine, &loss, d, precision, mmd, common.seed(), 3e-2)?;
            let seeds = sets.map(|s| common.seed().wrapping_add(s));
            times = match precision {
                Precision::F16 => on_card::<f16>(&mut engine, driver, seeds, &loss, [n, m, d], mmd, &mut value)?,
                _ => on_card::<bf16>(&mut engine, driver, seeds, &loss, [n, m, d], mmd, &mut value)?,
            };
            (scratch, ceiling, kernels) = (engine.scratch_bytes(), product(&engine, [n, m], d)?, &name[..]);
        }
    }
    let flops = n as f64 * m as f64 * operations(&loss.objective, d as f64);
    let rate = flops / median(&times);
    let peak = ceiling.1 / median(&ceiling.0);
    let json = json!({
        "what": "loss", "n": n, "m": m, "d": d, "tilting": args.tilting.name(), "objective": args.objective.name(),
        "precision": choice.precision().name(), "device": choice.kind(), "kernels": kernels,
        "threads": rayon::current_num_threads(), "runs": times.len(), "loss": value,
        "median_ms": 1e3 * median(&times), "min_ms": 1e3 * times[0],
        "flops": flops, "gflops_per_s": rate / 1e9,
        "peak_gflops_per_s": peak / 1e9, "fraction_of_peak": rate / peak, "scratch_bytes": scratch,
    });
    let lines = [
        format!(
            "loss and both gradients, {n} x {m}, d = {d}, {} {} {}",
            args.tilting.name(),
            args.objective.name(),
            choice.precision().name()
        ),
        format!("median {:.3} ms, minimum {:.3} ms of {} runs", 1e3 * median(&times), 1e3 * times[0], times.len()),
        format!(
            "{:.1} GFLOP/s ({:.1} N M D), {:.0}% of the matrix product's {:.1}",
            rate / 1e9,
            operations(&loss.objective, d as f64) / d as f64,
            100.0 * rate / peak,
            peak / 1e9
        ),
        format!("scratch {:.1} MiB", scratch as f64 / f64::from(1 << 20)),
    ];
    common.print(&json, &lines)
}

/// Operations for a pair of rows of `d` numbers where no logits are kept, on the CPU: those of docs/engine.md.
fn operations(objective: &Objective, d: f64) -> f64 {
    let features = FEATURES as f64;
    match objective {
        Objective::Conditional { .. } | Objective::JointShuffled { .. } => 8.0 * d,
        Objective::Joint | Objective::Sigmoid { .. } => 6.0 * d,
        Objective::Mmd { .. } => 12.0 * d + 8.0 * features,
        Objective::JointMmd => 10.0 * d + 4.0 * features,
    }
}

/// The ceiling: seconds and operations of the device's own matrix product of the logits' shape, in the same process.
fn product<D: Verbs<Real = f32>>(device: &D, [n, m]: [usize; 2], d: usize) -> Result<(Vec<f64>, f64), Failure> {
    let (rows, cols) = (n.min(CEILING), m.min(CEILING));
    let [mut a, mut b, mut c] = [rows * d, cols * d, rows * cols].map(|len| device.alloc(len));
    device.fill(0.5, ViewMut { buf: &mut a, at: 0..rows * d });
    device.fill(0.25, ViewMut { buf: &mut b, at: 0..cols * d });
    let times = time(|_| {
        let shape = Gemm { m: rows, n: cols, k: d, transpose_a: false, transpose_b: true };
        let (a, b) = (View { buf: &a, at: 0..rows * d }, View { buf: &b, at: 0..cols * d });
        device.gemm(shape, a, b, Write::Set(ViewMut { buf: &mut c, at: 0..rows * cols }));
        device.finish().map_err(|e| Failure::Other(e.to_string()))
    })?;
    Ok((times, 2.0 * rows as f64 * cols as f64 * d as f64))
}

/// Seconds of the loss on embeddings that are drawn on the card, its gradients left there.
#[cfg(feature = "cuda")]
fn on_card<T: Embedding>(
    engine: &mut Cuda<Driver>,
    driver: &Arc<Driver>,
    seeds: impl Iterator<Item = u64>,
    loss: &Loss,
    [n, m, d]: [usize; 3],
    mmd: bool,
    value: &mut f64,
) -> Result<Vec<f64>, Failure> {
    let fails = |e: CudaError| Failure::Other(e.to_string());
    let mut inputs = Vec::new();
    for seed in seeds {
        let [u, v]: [Buffer<T, _>; 2] =
            [normals(driver, n * d, seed, 0).map_err(fails)?, normals(driver, m * d, seed, 1).map_err(fails)?];
        // Features are the host's to make, of the same numbers.
        let host = if mmd { Set::new(n, m, d, Precision::F32, mmd, seed).features } else { Default::default() };
        let [x, y] = &host;
        inputs.push(([u, v], [Buffer::of(driver, x).map_err(fails)?, Buffer::of(driver, y).map_err(fails)?]));
    }
    let [n, m] = [n * d, m * d].map(|len| Buffer::zeroed(driver, len).map_err(fails));
    let (mut du, mut dv) = (n?, m?);
    time(|run| {
        let ([u, v], [x, y]) = &inputs[run % inputs.len()];
        let gradients = [&mut du, &mut dv].map(|g| Some(Write::Set(g)));
        *value = engine.loss_on_card(loss, &Pairs::default(), [u, v], d, mmd.then_some([x, y]), gradients)?.loss;
        Ok(())
    })
}

/// A fast wrong answer is not worth timing.
fn check_answer(
    engine: &mut impl Engine,
    loss: &Loss,
    d: usize,
    precision: Precision,
    mmd: bool,
    seed: u64,
    bound: f64,
) -> Result<(), Failure> {
    const SMALL: usize = 65;
    let set = Set::new(SMALL, SMALL, d, precision, mmd, seed.wrapping_add(99));
    let batch = set.batch([SMALL, SMALL], d, precision, mmd);
    let want = reference::loss(loss, &batch)?;
    let (mut du, mut dv) = (vec![0f32; SMALL * d], vec![0f32; SMALL * d]);
    let gradients = Gradients { u: Some(Write::Set(&mut du)), v: Some(Write::Set(&mut dv)), offset_v: None };
    let got = engine.loss(loss, &batch, gradients)?;
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = |got: &[f32], want: &[f64]| {
        // Of one dimension cosine's gradients are nothing: then an error is held to what others have.
        let size = norm(&mut want.iter().copied()).max(1e-3 / loss.tau);
        norm(&mut got.iter().zip(want).map(|(&g, w)| f64::from(g) - w)) / size
    };
    let offs =
        [off(&du, &want.grad_u), off(&dv, &want.grad_v), (got.loss - want.loss).abs() / want.loss.abs().max(1.0)];
    // G is rounded to halves on a card, where unit rows are too, and on units of a CPU that multiply bf16.
    // A NaN is within no bound.
    if !offs.iter().all(|off| *off <= bound) {
        return Err(Failure::Other(format!(
            "the engine is wrong: loss {} for {}, gradients off by {:e} and {:e}",
            got.loss, want.loss, offs[0], offs[1]
        )));
    }
    Ok(())
}

/// Seconds of each run, ascending, after one that does not count. Runs of seconds need not be many.
fn time(mut run: impl FnMut(usize) -> Result<(), Failure>) -> Result<Vec<f64>, Failure> {
    let first = Instant::now();
    run(0)?;
    let least = if first.elapsed().as_secs_f64() > 2.0 * SECONDS { 3 } else { RUNS };
    let begun = Instant::now();
    let mut times = Vec::new();
    while times.len() < least || (begun.elapsed().as_secs_f64() < SECONDS && times.len() < 1000) {
        let one = Instant::now();
        run(times.len() + 1)?;
        times.push(one.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}
