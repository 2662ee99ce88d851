//! `contrastive data`.

use super::{Common, Failure, bad_flag};
use crate::data::npy::{write_npy_f32, write_npy_i64};
use crate::data::{DataError, Side, Source, digits, gaussian2d, gp};
use serde_json::json;
use std::path::PathBuf;

/// Flags of `data`.
#[derive(clap::Args)]
pub struct Data {
    /// gp, gaussian2d or digits
    #[arg(value_name = "SET")]
    set: String,
    /// Folder for u.npy, v.npy and, for digits, labels.npy
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Samples to generate
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    samples: usize,
}

pub fn run(args: &Data, common: &Common) -> Result<(), Failure> {
    if args.samples == 0 {
        return Err(bad_flag("--samples", 0, "1 or more"));
    }
    let (seed, n) = (common.seed(), args.samples);
    let source: Box<dyn Source> = match &args.set[..] {
        "gp" => Box::new(gp::gp().sample(seed, n)),
        "gaussian2d" => Box::new(gaussian2d::gaussian2d().sample(seed, n)),
        "digits" => Box::new(digits::digits(seed, n)),
        other => return Err(bad_flag("data", other, "gp, gaussian2d or digits")),
    };
    std::fs::create_dir_all(&args.out).map_err(|source| DataError::Io { path: args.out.clone(), source })?;
    let index: Vec<usize> = (0..n).collect();
    let mut lines = Vec::new();
    for (side, name) in [(Side::U, "u.npy"), (Side::V, "v.npy")] {
        let dim = source.dim(side);
        let mut x = vec![0f32; n * dim];
        source.gather(side, &index, &mut x);
        let path = args.out.join(name);
        write_npy_f32(&path, &[n, dim], &x)?;
        lines.push(format!("{}: [{n}, {dim}] f32", path.display()));
    }
    if let Some(labels) = source.labels() {
        let labels: Vec<i64> = labels.iter().map(|&l| i64::from(l)).collect();
        let path = args.out.join("labels.npy");
        write_npy_i64(&path, &[n], &labels)?;
        lines.push(format!("{}: [{n}] i64", path.display()));
    }
    let json = json!({"set": args.set, "samples": n, "dim_u": source.dim(Side::U), "dim_v": source.dim(Side::V), "out": args.out});
    common.print(&json, &lines)
}
