//! `contrastive data`.

use super::{Common, Failure, bad_flag, check_room, on_terminal, shown};
use crate::data::download::{Content, fetch, is_http};
use crate::data::images::PIXELS;
use crate::data::npy::{write_npy_f32, write_npy_i64};
use crate::data::ocean::{COEFFICIENTS, MODES, Ocean, Recording};
use crate::data::{DataError, Side, Source, digits, gaussian2d, gp, write_set};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Where MNIST's files are, the first that answers.
const MIRRORS: [&str; 2] =
    ["http://ossci-datasets.s3.amazonaws.com/mnist/", "http://storage.googleapis.com/cvdf-datasets/mnist/"];

/// MNIST's files.
const MNIST: [(&str, Content<'_>); 4] = [
    (
        "train-images-idx3-ubyte.gz",
        Content { bytes: 9_912_422, sha256: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609" },
    ),
    (
        "train-labels-idx1-ubyte.gz",
        Content { bytes: 28_881, sha256: "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c" },
    ),
    (
        "t10k-images-idx3-ubyte.gz",
        Content { bytes: 1_648_877, sha256: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6" },
    ),
    (
        "t10k-labels-idx1-ubyte.gz",
        Content { bytes: 4_542, sha256: "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6" },
    ),
];

/// Flags of `data`.
#[derive(clap::Args)]
pub struct Data {
    /// gp, gaussian2d, digits or ocean, which are generated, or mnist, which is downloaded (11.6 MB)
    #[arg(value_name = "SET")]
    set: String,
    /// Folder for u.npy, v.npy and, for digits, labels.npy, for ocean, frequencies.npy; for mnist, its four IDX files, .gz
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Samples to generate [default: 10000]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    samples: Option<usize>,
    /// ocean: the shorter trajectories that `train ocean --quick` reads [default: off]
    #[arg(long)]
    quick: bool,
    /// mnist: folder of the files on another server, http://HOST/PATH [default: two public mirrors]
    #[arg(long, value_name = "URL")]
    from: Option<String>,
}

pub fn run(args: &Data, common: &Common) -> Result<(), Failure> {
    if args.quick && args.set != "ocean" {
        return Err(bad_flag("--quick", &args.set, "ocean, which alone has shorter samples"));
    }
    let (json, lines) = if args.set == "mnist" { mnist(args) } else { generate(args, common.seed()) }?;
    common.print(&json, &lines)
}

/// What a command answers: as JSON, and to read.
type Answer = (Value, Vec<String>);

/// Makes a folder and those above it.
pub(super) fn make_folder(out: &Path) -> Result<(), DataError> {
    std::fs::create_dir_all(out).map_err(|source| DataError::Io { path: out.to_owned(), source })
}

fn generate(args: &Data, seed: u64) -> Result<Answer, Failure> {
    if let Some(url) = &args.from {
        return Err(bad_flag("--from", url, format!("none: {} is not downloaded", args.set)));
    }
    let n = args.samples.unwrap_or(10_000);
    if n == 0 {
        return Err(bad_flag("--samples", 0, "1 or more"));
    }
    let held = match &args.set[..] {
        "gp" => gp::POINTS + gp::COEFFICIENTS,
        "gaussian2d" => 2,
        "digits" => PIXELS,
        _ => 0,
    };
    check_room("--samples", &[n, held])?;
    let out = &args.out;
    let (dims, mut lines) = match &args.set[..] {
        "gp" => write(out, &gp::gp().sample(seed, n))?,
        "gaussian2d" => write(out, &gaussian2d::gaussian2d().sample(seed, n))?,
        "digits" => write(out, &digits::digits(seed, n))?,
        "ocean" => {
            make_folder(out)?;
            let recording = if args.quick { Recording::QUICK } else { Recording::PAPER };
            Ocean::new(seed, recording).write(out, n)?;
            let frequencies = format!("{}: [{MODES}] f32", out.join("frequencies.npy").display());
            ([COEFFICIENTS, recording.dim()], vec![frequencies])
        }
        other => return Err(bad_flag("data", other, "gp, gaussian2d, digits, ocean or mnist")),
    };
    let pairs = ["u.npy", "v.npy"].iter().zip(dims);
    lines.splice(0..0, pairs.map(|(name, dim)| format!("{}: [{n}, {dim}] f32", out.join(name).display())));
    let json = json!({"set": args.set, "samples": n, "dim_u": dims[0], "dim_v": dims[1], "out": shown(out)});
    Ok((json, lines))
}

/// Writes a set that is in memory, and tells how wide its sides are and what it has beside them.
fn write(out: &Path, source: &dyn Source) -> Result<([usize; 2], Vec<String>), DataError> {
    make_folder(out)?;
    let n = source.len();
    let index: Vec<usize> = (0..n).collect();
    let labels = source.labels().map(|labels| labels.iter().map(|&l| i64::from(l)).collect::<Vec<_>>());
    write_set(out, |folder| {
        for (side, name) in [(Side::U, "u.npy"), (Side::V, "v.npy")] {
            let dim = source.dim(side);
            let mut x = vec![0f32; n * dim];
            source.gather(side, &index, &mut x);
            write_npy_f32(folder.join(name), &[n, dim], &x)?;
        }
        labels.as_ref().map_or(Ok(()), |labels| write_npy_i64(folder.join("labels.npy"), &[n], labels))
    })?;
    let lines = labels.map(|_| format!("{}: [{n}] i64", out.join("labels.npy").display()));
    Ok(([source.dim(Side::U), source.dim(Side::V)], lines.into_iter().collect()))
}

fn mnist(args: &Data) -> Result<Answer, Failure> {
    if let Some(n) = args.samples {
        return Err(bad_flag("--samples", n, "none: mnist is downloaded whole"));
    }
    match &args.from {
        Some(url) if !is_http(url) => Err(bad_flag("--from", url, "http://HOST/PATH (checksums prove what comes)")),
        Some(url) => download(&MNIST, &[url], &args.out),
        None => download(&MNIST, &MIRRORS, &args.out),
    }
}

/// Downloads `files` into `out`, each from the first of `mirrors` that gives it.
fn download(files: &[(&str, Content<'_>)], mirrors: &[&str], out: &Path) -> Result<Answer, Failure> {
    make_folder(out)?;
    let start = Instant::now();
    let all = files.iter().map(|(_, content)| content.bytes).sum();
    let bar = on_terminal().then(|| bar(all));
    let (mut done, mut taken, mut lines) = (0, 0, Vec::new());
    for (name, content) in files {
        let path = out.join(name);
        let urls: Vec<_> = mirrors.iter().map(|url| format!("{}/{name}", url.trim_end_matches('/'))).collect();
        taken += fetch(&urls, &path, *content, &mut |bytes| {
            if let Some(bar) = &bar {
                bar.set_message((*name).to_owned());
                bar.set_position(done + bytes);
            }
        })?;
        done += content.bytes;
        lines.push(format!("{}: {} bytes, as they should be", path.display(), content.bytes));
    }
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    let seconds = start.elapsed().as_secs_f64();
    lines.push(format!("{taken} bytes downloaded in {seconds:.1} s"));
    let names: Vec<_> = files.iter().map(|(name, _)| name).collect();
    Ok((json!({"files": names, "bytes": taken, "seconds": seconds, "out": shown(out)}), lines))
}

fn bar(bytes: u64) -> ProgressBar {
    let style = "{bar:40} {bytes}/{total_bytes}, {bytes_per_sec}, {msg}";
    let style = ProgressStyle::with_template(style).expect("a valid template");
    ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr_with_hz(10)).with_style(style)
}

#[cfg(test)]
mod tests {
    use super::{Content, download};

    // The checksum is that of FIPS 180-2, appendix B.1. No mirror is asked, for there is none.
    #[test]
    fn files_that_are_there_are_reported_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let files = ["a.gz", "b.gz"].map(|name| (name, Content { bytes: 3, sha256 }));
        for (name, _) in files {
            std::fs::write(dir.path().join(name), "abc").unwrap();
        }
        let (json, lines) = download(&files, &[], dir.path()).ok().unwrap();
        assert_eq!(json["files"], serde_json::json!(["a.gz", "b.gz"]));
        assert_eq!((&json["bytes"], json["out"].as_str()), (&0.into(), dir.path().to_str()));
        assert!(json["seconds"].is_f64() && lines.len() == 3 && lines[1].contains("b.gz: 3 bytes"), "{lines:?}");
        std::fs::write(dir.path().join("b.gz"), "abd").unwrap();
        assert!(download(&files, &[], dir.path()).is_err());
        assert_eq!(std::fs::read(dir.path().join("b.gz")).unwrap(), b"abd");
    }
}
