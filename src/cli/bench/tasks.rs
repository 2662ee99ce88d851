//! `contrastive bench retrieve` and `bench train`.

use super::super::device::Device;
use super::super::{Common, Failure, bad_flag, check_room, from_flag};
use super::{Bench, CEILING, SETS, drawn, median, product, time};
use crate::config::{ConfigError, Partial};
use crate::data::{Rows, Table};
use crate::device::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::device::cuda::Cuda;
use crate::experiments;
#[cfg(feature = "cuda")]
use crate::objective::Precision;
use crate::objective::Tilting;
use crate::tasks::retrieval::{Best, top_k, top_k_on};
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Exact search of the best `k` of M items for each of N queries; queries take turns, as in the loss's bench.
pub fn retrieve(args: &Bench, common: &Common) -> Result<(), Failure> {
    let (n, m, d, k) = (args.n, args.m.unwrap_or(args.n), args.d, args.k);
    if k == 0 || k > m {
        return Err(bad_flag("--k", k, format!("1 to the number of items, {m}")));
    }
    let tilting = args.tilting;
    check_room("--k", &[k, n, 6])?;
    let choice = common.choose(None)?;
    choice.announce();
    let mut device = choice.search();
    let mut search = |queries: &dyn Rows, items: &dyn Rows, k: usize| match &mut device {
        Some(device) => top_k_on(&mut **device, tilting, queries, items, k).map_err(Failure::from),
        None => top_k(tilting, queries, items, k).map_err(Failure::from),
    };
    check_search(&mut search, tilting, d, common.seed())?;
    let items = drawn(m * d, common.seed(), 0);
    let queries: Vec<Vec<f32>> = (1..=SETS as u64).map(|s| drawn(n * d, common.seed().wrapping_add(s), 0)).collect();
    let items = Table { data: &items, dim: d };
    let mut best = 0.0;
    let times = time(|run| {
        let found = search(&Table { data: &queries[run % SETS], dim: d }, &items, k)?;
        best = found.scores[0];
        Ok(())
    })?;
    let scratch = growth(|| {
        search(&Table { data: &queries[0], dim: d }, &items, k)?;
        Ok(())
    })?;
    let (ceiling, kernels, precision) = match &choice.device {
        Device::Cpu => {
            let cpu = Cpu::new();
            (product(&cpu, [n, m], d)?, cpu.isa().name().to_owned(), "f32")
        }
        // A number is two halves, and a product three: the ceiling is a third of what this says.
        #[cfg(feature = "cuda")]
        Device::Cuda(driver, name) => {
            (product(&Cuda::new(driver, Precision::F16), [n, m], d)?, name.clone(), "2 x f16")
        }
    };
    let flops = 2.0 * n as f64 * m as f64 * d as f64;
    let (rate, peak) = (flops / median(&times), ceiling.1 / median(&ceiling.0));
    let json = json!({
        "what": "retrieve", "n": n, "m": m, "d": d, "k": k, "tilting": args.tilting.name(), "precision": precision,
        "device": choice.kind(), "kernels": kernels, "threads": rayon::current_num_threads(), "runs": times.len(),
        "best_score": best, "median_ms": 1e3 * median(&times), "min_ms": 1e3 * times[0], "flops": flops,
        "gflops_per_s": rate / 1e9, "peak_gflops_per_s": peak / 1e9, "fraction_of_peak": rate / peak,
        "scratch_bytes": scratch, "device_scratch_bytes": device.map(|device| device.scratch_bytes()),
    });
    let lines = [
        format!("the best {k} of {m} items for {n} queries, d = {d}, {}", args.tilting.name()),
        format!("median {:.3} ms, minimum {:.3} ms of {} runs", 1e3 * median(&times), 1e3 * times[0], times.len()),
        format!(
            "{:.1} GFLOP/s (2 N M D), {:.0}% of the matrix product's {:.1}",
            rate / 1e9,
            100.0 * rate / peak,
            peak / 1e9
        ),
    ];
    common.print(&json, &lines)
}

/// Bytes that `run` holds at its peak beyond what there was before, resident ones; `None` where the system does not tell.
fn growth(run: impl FnOnce() -> Result<(), Failure>) -> Result<Option<u64>, Failure> {
    let resident = |key: &str| -> Option<u64> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find(|line| line.starts_with(key))?;
        Some(1024 * line.split_whitespace().nth(1)?.parse::<u64>().ok()?)
    };
    // Makes the peak what is resident now.
    let reset = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    let before = resident("VmRSS:");
    run()?;
    Ok(before.zip(resident("VmHWM:")).filter(|_| reset).map(|(before, peak)| peak.saturating_sub(before)))
}

/// A fast wrong answer is not worth timing: small integers, whose scores are exact and often equal.
fn check_search(
    search: &mut impl FnMut(&dyn Rows, &dyn Rows, usize) -> Result<Best, Failure>,
    tilting: Tilting,
    d: usize,
    seed: u64,
) -> Result<(), Failure> {
    let (n, m, k) = (37, 301, 11);
    let [queries, items] = [(n, 1), (m, 2)].map(|(rows, s)| {
        drawn(rows * d, seed.wrapping_add(s), 0).into_iter().map(|x| (2.0 * x).round()).collect::<Vec<f32>>()
    });
    let found = search(&Table { data: &queries, dim: d }, &Table { data: &items, dim: d }, k)?;
    for (i, query) in queries.chunks_exact(d).enumerate() {
        let score = |j: usize| -> f64 {
            let pairs = || query.iter().zip(&items[j * d..][..d]).map(|(&q, &x)| (f64::from(q), f64::from(x)));
            match tilting {
                Tilting::Dot => pairs().map(|(q, x)| q * x).sum(),
                Tilting::L2 => -pairs().map(|(q, x)| (q - x).powi(2)).sum::<f64>(),
                Tilting::Cosine => {
                    let length = pairs().map(|(_, x)| x * x).sum::<f64>().sqrt();
                    if length > 0.0 { pairs().map(|(q, x)| q * x).sum::<f64>() / length } else { 0.0 }
                }
            }
        };
        let mut order: Vec<(f64, usize)> = (0..m).map(|j| (score(j), j)).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        // Under cosine equal scores need not be equal to the bit.
        let wrong = |(&j, want): (&usize, &(f64, usize))| (score(j) - want.0).abs() > 1e-9 * want.0.abs().max(1.0);
        if found.indices[i * k..][..k].iter().zip(&order).any(wrong) {
            return Err(Failure::Other(format!("the search is wrong: query {i} of the check")));
        }
    }
    Ok(())
}

/// Steps of an experiment as `train` takes them, data and optimiser included.
pub fn train(args: &Bench, common: &Common) -> Result<(), Failure> {
    const STEPS: usize = 300;
    /// Steps that do not count: caches, buffers and the prefetched batches fill.
    const WARM: usize = 20;
    /// Terms of the ceiling's product.
    const DEPTH: usize = 512;
    let flags = Partial {
        experiment: Some(args.experiment.clone()),
        epochs: Some(1 << 40),
        seed: common.seed,
        precision: common.precision,
        log_every: Some(1 << 40),
        ..Partial::default()
    };
    let config = experiments::resolve(flags).map_err(from_flag)?;
    let choice =
        common.choose(Some("a card's steps are not timed one by one: train --device cuda tells their rate".into()))?;
    let dir = tempfile::tempdir().map_err(|e| Failure::Other(format!("a folder for the run: {e}")))?;
    let (stop, mut last, mut times) = (AtomicBool::new(false), None::<Instant>, Vec::new());
    let mut observe = |_: crate::train::Progress| {
        let now = Instant::now();
        if last.is_none() {
            choice.announce();
        }
        if let Some(last) = last {
            times.push((now - last).as_secs_f64());
        }
        last = Some(now);
        if times.len() >= WARM + STEPS {
            stop.store(true, Ordering::Relaxed);
        }
    };
    let mut cpu = Cpu::new();
    let mut flops = 0.0;
    let scratch = growth(|| {
        let outcome = experiments::run(&mut cpu, &config, dir.path(), false, &stop, &mut observe);
        let outcome = outcome.map_err(|e| match e {
            experiments::Error::Config(ConfigError::Value { key: "data" | "u" | "v", .. }) => {
                bad_flag("--experiment", &args.experiment, "one that makes its own data")
            }
            e => e.into(),
        })?;
        flops = outcome.report.values["step_flops"].as_f64().unwrap_or_default();
        Ok(())
    })?;
    if times.len() <= WARM {
        return Err(Failure::Other(format!("{}: fewer than {WARM} steps", args.experiment)));
    }
    let mut times = times.split_off(WARM);
    times.sort_by(f64::total_cmp);
    let step = median(&times);
    let ceiling = product(&cpu, [CEILING; 2], DEPTH)?;
    let (rate, peak) = (flops / step, ceiling.1 / median(&ceiling.0));
    let json = json!({
        "what": "train", "experiment": args.experiment, "batch": config.batch, "device": "cpu",
        "kernels": cpu.isa().name(), "threads": rayon::current_num_threads(), "runs": times.len(),
        "median_ms": 1e3 * step, "min_ms": 1e3 * times[0], "steps_per_s": 1.0 / step,
        "samples_per_s": config.batch as f64 / step, "flops": flops, "gflops_per_s": rate / 1e9,
        "peak_gflops_per_s": peak / 1e9, "fraction_of_peak": rate / peak, "scratch_bytes": scratch,
    });
    let lines = [
        format!("a training step of {}, batch {}", args.experiment, config.batch),
        format!("median {:.3} ms, minimum {:.3} ms of {} steps", 1e3 * step, 1e3 * times[0], times.len()),
        format!("{:.0} steps/s, {:.0} samples/s", 1.0 / step, config.batch as f64 / step),
        format!(
            "{:.1} GFLOP/s (forward, twice that backward, the loss), {:.0}% of the matrix product's {:.1}",
            rate / 1e9,
            100.0 * rate / peak,
            peak / 1e9
        ),
    ];
    common.print(&json, &lines)
}
