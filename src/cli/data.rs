//! `contrastive data`.

use super::{Common, Failure, bad_flag};
use crate::data::npy::{write_npy_f32, write_npy_i64};
use crate::data::ocean::{COEFFICIENTS, MODES, Ocean, Recording};
use crate::data::{DataError, Side, Source, digits, gaussian2d, gp};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Flags of `data`.
#[derive(clap::Args)]
pub struct Data {
    /// gp, gaussian2d, digits or ocean
    #[arg(value_name = "SET")]
    set: String,
    /// Folder for u.npy, v.npy and, for digits, labels.npy, for ocean, frequencies.npy
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
    let (seed, n, out) = (common.seed(), args.samples, &args.out);
    let (dims, mut lines) = match &args.set[..] {
        "gp" => write(out, &gp::gp().sample(seed, n))?,
        "gaussian2d" => write(out, &gaussian2d::gaussian2d().sample(seed, n))?,
        "digits" => write(out, &digits::digits(seed, n))?,
        "ocean" => {
            make_folder(out)?;
            Ocean::new(seed, Recording::PAPER).write(out, n)?;
            let frequencies = format!("{}: [{MODES}] f32", out.join("frequencies.npy").display());
            ([COEFFICIENTS, Recording::PAPER.dim()], vec![frequencies])
        }
        other => return Err(bad_flag("data", other, "gp, gaussian2d, digits or ocean")),
    };
    let pairs = ["u.npy", "v.npy"].iter().zip(dims);
    lines.splice(0..0, pairs.map(|(name, dim)| format!("{}: [{n}, {dim}] f32", out.join(name).display())));
    let json = json!({"set": args.set, "samples": n, "dim_u": dims[0], "dim_v": dims[1], "out": out});
    common.print(&json, &lines)
}

/// Writes a set that is in memory, and tells how wide its sides are and what it has beside them.
fn write(out: &Path, source: &dyn Source) -> Result<([usize; 2], Vec<String>), DataError> {
    make_folder(out)?;
    let n = source.len();
    let index: Vec<usize> = (0..n).collect();
    for (side, name) in [(Side::U, "u.npy"), (Side::V, "v.npy")] {
        let dim = source.dim(side);
        let mut x = vec![0f32; n * dim];
        source.gather(side, &index, &mut x);
        write_npy_f32(out.join(name), &[n, dim], &x)?;
    }
    let mut lines = Vec::new();
    if let Some(labels) = source.labels() {
        let labels: Vec<i64> = labels.iter().map(|&l| i64::from(l)).collect();
        let path = out.join("labels.npy");
        write_npy_i64(&path, &[n], &labels)?;
        lines.push(format!("{}: [{n}] i64", path.display()));
    }
    Ok(([source.dim(Side::U), source.dim(Side::V)], lines))
}

fn make_folder(out: &Path) -> Result<(), DataError> {
    std::fs::create_dir_all(out).map_err(|source| DataError::Io { path: out.into(), source })
}
