//! `contrastive reproduce`.

use super::data::make_folder;
use super::{Common, Failure, bad_flag, shown};
use crate::experiments::reproduce::{ALL, Part, Request, reproduce};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// Flags of `reproduce`.
#[derive(clap::Args)]
pub struct Reproduce {
    /// gaussian2d, gp, mnist, ocean, objectives, modalities or all
    #[arg(value_name = "PART")]
    part: String,
    /// Minutes instead of hours: shorter runs, fewer points [default: off]
    #[arg(long)]
    quick: bool,
    /// Folder of the figures, figures.json and report.html
    #[arg(long, default_value = "reproduced", value_name = "DIR")]
    out: PathBuf,
    /// Folder of MNIST's four IDX files, as `contrastive data mnist` downloads them [default: rendered digits stand for MNIST]
    #[arg(long, value_name = "DIR")]
    mnist: Option<PathBuf>,
}

pub fn run(args: &Reproduce, common: &Common) -> Result<(), Failure> {
    let parts: Vec<&Part> = ALL.iter().filter(|part| args.part == "all" || args.part == part.name).collect();
    if parts.is_empty() {
        let names: Vec<_> = ALL.iter().map(|part| part.name).collect();
        return Err(bad_flag("PART", &args.part, format!("{} or all", names.join(", "))));
    }
    if let Some(mnist) = args.mnist.as_ref().filter(|mnist| !mnist.is_dir()) {
        return Err(bad_flag("--mnist", mnist.display(), "a folder"));
    }
    let choice = common.choose(Some("the figures are made on the CPU".into()))?;
    make_folder(&args.out)?;
    choice.announce();
    let start = Instant::now();
    let tell = |text: &str| {
        if !common.json {
            super::log(format_args!("{:>7.1} s  {text}", start.elapsed().as_secs_f64()));
        }
    };
    let request =
        Request { quick: args.quick, seed: common.seed(), out: &args.out, mnist: args.mnist.as_deref(), tell: &tell };
    let figures = reproduce(&parts, &request)?;
    let criteria = || figures.iter().flat_map(|f| f.criteria.iter().map(move |c| (f, c)));
    let passed = criteria().filter(|(_, c)| c.passed).count();
    let failed: Vec<_> = criteria().filter(|(_, c)| !c.passed).collect();
    let seconds = start.elapsed().as_secs_f64();
    let mut lines: Vec<String> =
        failed.iter().map(|(f, c)| format!("FAILED {}: {}; found {}", f.name, c.claim, c.found)).collect();
    lines.push(format!(
        "{}: {} figures, {passed} of {} criteria hold, {seconds:.0} s",
        args.out.join("report.html").display(),
        figures.len(),
        passed + failed.len()
    ));
    let failed: Vec<_> =
        failed.iter().map(|(f, c)| json!({"figure": f.name, "claim": c.claim, "found": c.found})).collect();
    let names: Vec<_> = figures.iter().map(|f| &f.name).collect();
    common.print(
        &json!({"figures": names, "passed": passed, "failed": failed, "seconds": seconds, "out": shown(&args.out)}),
        &lines,
    )
}
