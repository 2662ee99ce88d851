//! `contrastive embed`, `retrieve`, `classify` and `sample`: what trained models and embeddings are used for.

use super::device::{Choice, Device};
use super::{Common, Failure, bad_flag, check_outputs, check_room, shown};
use crate::config::from_text;
use crate::data::npy::{Npy, read_npy_i64, write_npy_f32, write_npy_i64};
use crate::data::{Rows, Side, SideOf, Table, share_of};
use crate::device::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::device::cuda::Cuda;
use crate::experiments::{self, Model};
use crate::objective::{Precision, Tilting};
use crate::tasks::classification::{self, Head};
use crate::tasks::{retrieval, sampling};
use rayon::prelude::*;
use serde_json::json;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// `embed`.
#[derive(clap::Args)]
pub struct Embed {
    /// Folder of a training run
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Which encoder: u or v
    #[arg(long, value_name = "SIDE")]
    side: String,
    /// Data, [rows, columns] .npy
    #[arg(long, value_name = "X.npy")]
    input: PathBuf,
    /// Embeddings, [rows, dim] f32 .npy
    #[arg(long, value_name = "E.npy")]
    output: PathBuf,
}

/// `retrieve`.
#[derive(clap::Args)]
pub struct Retrieve {
    /// Embedded items, [items, dim] .npy
    #[arg(long, value_name = "I.npy")]
    items: PathBuf,
    /// Embedded queries, [queries, dim] .npy
    #[arg(long, value_name = "Q.npy")]
    queries: PathBuf,
    /// Items for each query
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    k: usize,
    /// cosine, dot or l2
    #[arg(long, default_value = "cosine", value_name = "TILTING", value_parser = from_text::<Tilting>)]
    tilting: Tilting,
    /// Indices, int64 [queries, K], best first; ties: the lowest [default: none]
    #[arg(long, value_name = "IDX.npy")]
    output: Option<PathBuf>,
    /// Scores s(query, item) at tau = 1, f32 [queries, K] [default: none]
    #[arg(long, value_name = "S.npy")]
    scores: Option<PathBuf>,
}

/// `classify`.
#[derive(clap::Args)]
pub struct Classify {
    /// Folder of a training run
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// What to classify: data of the u side, [rows, columns] .npy; MNIST's pixels as they were trained on, (byte/255 -
    /// 0.1307)/0.3081
    #[arg(long, value_name = "X.npy")]
    input: PathBuf,
    /// True labels, integers [rows] .npy [default: none]
    #[arg(long, value_name = "L.npy")]
    labels: Option<PathBuf>,
    /// Data of the v side that stands for each class, [classes, columns] .npy [default: one-hot labels, where the model
    /// was trained on them]
    #[arg(long, value_name = "C.npy")]
    classes: Option<PathBuf>,
    /// Train a classifier on the frozen embeddings and --labels (the paper's fine-tuning) [default: off]
    #[arg(long)]
    fine_tune: bool,
    /// --fine-tune: share of the rows, the last ones, to judge the classifier by
    #[arg(long, default_value_t = 0.2, value_name = "X", allow_negative_numbers = true)]
    held_out: f64,
    /// Labels found, int64 [rows] [default: in the JSON only]
    #[arg(long, value_name = "P.npy")]
    output: Option<PathBuf>,
    /// Probabilities of all classes, f32 [rows, classes] [default: none]
    #[arg(long, value_name = "P.npy")]
    probabilities: Option<PathBuf>,
}

/// `sample`.
#[derive(clap::Args)]
pub struct Sample {
    /// Folder of a training run
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// What is given: data of the other side, [queries, columns] .npy
    #[arg(long, value_name = "V.npy")]
    given: PathBuf,
    /// Draws for each
    #[arg(long, value_name = "C", allow_negative_numbers = true)]
    count: usize,
    /// Which side to draw: u, given v; or v, given u
    #[arg(long, default_value = "u", value_name = "SIDE")]
    side: String,
    /// What to draw from: data of that side, .npy [default: the run's held-out pairs, or its training pairs]
    #[arg(long, value_name = "X.npy")]
    items: Option<PathBuf>,
    /// Indices drawn, int64 [queries, C], rows of what is drawn from: of held-out pairs, which are a data set's last, the
    /// first is 0 [default: in the JSON only]
    #[arg(long, value_name = "IDX.npy")]
    output: Option<PathBuf>,
}

fn side_of(name: &str) -> Result<Side, Failure> {
    match name {
        "u" => Ok(Side::U),
        "v" => Ok(Side::V),
        other => Err(bad_flag("--side", other, "u or v")),
    }
}

/// A file's rows, rounded on reading.
struct Stored<'a>(&'a Npy, Precision);

impl Rows for Stored<'_> {
    fn count(&self) -> usize {
        self.0.rows()
    }
    fn dim(&self) -> usize {
        self.0.dim()
    }
    fn read(&self, first: usize, out: &mut [f32]) {
        Rows::read(self.0, first, out);
        round(self.1, out);
    }
}

impl Stored<'_> {
    /// Fails on a number that is not finite, or not in this precision.
    fn check_finite(&self) -> Result<(), Failure> {
        self.0.check_finite()?;
        let finite = |row: &mut Vec<f32>, i: usize| {
            self.read(i, row);
            row.iter().all(|x| x.is_finite())
        };
        let rows = (0..self.count()).into_par_iter();
        let row = || vec![0.0; self.dim()];
        let bad = if self.1 == Precision::F32 { None } else { rows.map_init(row, finite).position_first(|ok| !ok) };
        bad.map_or(Ok(()), |i| {
            let found = format!("a number in row {i} that is beyond --precision");
            Err(bad_flag(&self.0.path().display().to_string(), found, "smaller ones"))
        })
    }
}

/// Rounds `x` to numbers of this precision.
fn round(precision: Precision, x: &mut [f32]) {
    if precision != Precision::F32 {
        x.iter_mut().for_each(|x| *x = precision.round(*x));
    }
}

/// A matrix of finite numbers.
fn open(path: &Path) -> Result<Npy, Failure> {
    let x = Npy::open(path)?;
    x.check_finite()?;
    Ok(x)
}

pub fn embed(args: &Embed, common: &Common) -> Result<(), Failure> {
    let side = side_of(&args.side)?;
    let model = Model::load(&args.model)?;
    let x = Npy::open(&args.input)?;
    check_outputs(&[("--output", Some(&args.output))], &[Some(&args.input)], Some(&args.model))?;
    let choice = common.choose(None)?;
    match &choice.device {
        Device::Cpu => model.embed(&Cpu::new(), side, &x, &args.output, choice.storage()),
        #[cfg(feature = "cuda")]
        Device::Cuda(driver, _) => {
            let card = Cuda::new(driver, choice.precision());
            model.embed(&card, side, &x, &args.output, choice.storage())
        }
    }?;
    choice.announce();
    let json = json!({"rows": x.rows(), "dim": model.config.dim, "output": shown(&args.output)});
    common.print(
        &json,
        &[format!("{}: {} embeddings of dimension {}", args.output.display(), x.rows(), model.config.dim)],
    )
}

/// Embeddings of `rows`, which came from `path`.
fn embedded(
    model: &Model,
    choice: &Choice,
    side: Side,
    rows: &dyn Rows,
    path: &Path,
) -> Result<Vec<f32>, experiments::Error> {
    model.check_width(side, rows, path)?;
    let mut out = match &choice.device {
        Device::Cpu => model.embed_in_memory(&Cpu::new(), side, rows),
        #[cfg(feature = "cuda")]
        Device::Cuda(driver, _) => model.embed_in_memory(&Cuda::new(driver, choice.precision()), side, rows),
    }?;
    round(choice.storage(), &mut out);
    if out.iter().all(|x| x.is_finite()) { Ok(out) } else { Err(experiments::Error::beyond(path)) }
}

pub fn retrieve(args: &Retrieve, common: &Common) -> Result<(), Failure> {
    let tilting = args.tilting;
    let choice = common.choose(None)?;
    let (items, queries) = (Npy::open(&args.items)?, Npy::open(&args.queries)?);
    if items.dim() != queries.dim() {
        let found = format!("{} columns", queries.dim());
        return Err(bad_flag(
            &args.queries.display().to_string(),
            found,
            format!("{}, as the items have", items.dim()),
        ));
    }
    if args.k == 0 || args.k > items.rows() {
        return Err(bad_flag("--k", args.k, format!("1 to the {} items", items.rows())));
    }
    let [items, queries] = [&items, &queries].map(|file| Stored(file, choice.storage()));
    items.check_finite()?;
    queries.check_finite()?;
    let outputs = [("--output", args.output.as_ref()), ("--scores", args.scores.as_ref())];
    check_outputs(&outputs, &[Some(&args.items), Some(&args.queries)], None)?;
    // Pairs: recall is of the best five, however few were asked for.
    let pairs = items.count() == queries.count();
    let wide = if pairs { args.k.max(5).min(items.count()) } else { args.k };
    // An index and a score for each, and what of them is written.
    check_room("--k", &[wide, queries.count(), 6])?;
    let start = Instant::now();
    let best = match choice.search() {
        Some(mut device) => retrieval::top_k_on(&mut *device, tilting, &queries, &items, wide),
        None => retrieval::top_k(tilting, &queries, &items, wide),
    }?;
    let seconds = start.elapsed().as_secs_f64();
    if args.scores.is_some() && best.scores.iter().any(|&score| !(score as f32).is_finite()) {
        return Err(bad_flag("--scores", "scores beyond f32", "smaller embeddings, or no --scores"));
    }
    choice.announce();
    let narrow = |i: usize| i * wide..i * wide + args.k;
    let n = queries.count();
    if let Some(path) = &args.output {
        let indices: Vec<i64> = (0..n).flat_map(|i| best.indices[narrow(i)].iter().map(|&j| j as i64)).collect();
        write_npy_i64(path, &[n, args.k], &indices)?;
    }
    if let Some(path) = &args.scores {
        let scores: Vec<f32> = (0..n).flat_map(|i| best.scores[narrow(i)].iter().map(|&s| s as f32)).collect();
        write_npy_f32(path, &[n, args.k], &scores)?;
    }
    let mut json = json!({
        "items": items.count(), "queries": n, "dim": items.dim(), "k": args.k, "tilting": args.tilting.name(), "seconds": seconds,
        "output": args.output.as_ref().map(shown), "scores": args.scores.as_ref().map(shown),
    });
    let mut lines = vec![format!("{} best of {} items for {n} queries in {seconds:.2} s", args.k, items.count())];
    if pairs {
        let within = |k: usize| {
            let found = |i: &usize| best.indices[i * wide..][..k.min(wide)].contains(i);
            (0..n).filter(found).count() as f64 / n as f64
        };
        (json["recall_at_1"], json["recall_at_5"]) = (json!(within(1)), json!(within(5)));
        lines.push(format!("recall@1 {:.2}%, recall@5 {:.2}%", 100.0 * within(1), 100.0 * within(5)));
    }
    if args.output.is_none() {
        json["indices"] = (0..n).map(|i| best.indices[narrow(i)].to_vec()).collect();
        lines.extend((0..n.min(10)).map(|i| format!("query {i}: {:?}", &best.indices[narrow(i)])));
    }
    common.print(&json, &lines)
}

pub fn classify(args: &Classify, common: &Common) -> Result<(), Failure> {
    let model = Model::load(&args.model)?;
    let x = open(&args.input)?;
    let labels = args.labels.as_deref().map(|path| read_labels(path, x.rows())).transpose()?;
    if !(0.0..1.0).contains(&args.held_out) {
        return Err(bad_flag("--held-out", args.held_out, "a share in [0, 1)"));
    }
    let outputs = [("--output", args.output.as_ref()), ("--probabilities", args.probabilities.as_ref())];
    let inputs = [Some(&args.input), args.labels.as_ref(), args.classes.as_ref()];
    check_outputs(&outputs, &inputs, Some(&args.model))?;
    let choice = common.choose(None)?;
    let dim = model.config.dim;
    let n = x.rows();
    let (tilting, tau) = (model.tilting(), model.tau());
    // Which rows the accuracy is of, and what is to be said of them.
    let (mut judged, mut remark) = (0..n, None);
    let (found, classes) = if args.fine_tune {
        let Some(labels) = &labels else {
            return Err(bad_flag("--labels", "nothing", "the true labels that --fine-tune learns from"));
        };
        if let Some(path) = &args.classes {
            let expected = "nothing with --fine-tune, whose classes are those of --labels";
            return Err(bad_flag("--classes", path.display(), expected));
        }
        let trained = (n - share_of(n, args.held_out)).max(1);
        let classes = labels.iter().max().map_or(1, |&most| most as usize + 1);
        check_room("--fine-tune", &[classes, n, 3])?;
        let inputs = embedded(&model, &choice, Side::U, &x, &args.input)?;
        let inputs = Table { data: &inputs, dim };
        let learned = Table { data: &inputs.data[..trained * dim], dim };
        let head = classification::fine_tune(tau, &learned, &labels[..trained], classes, common.seed())?;
        if trained < n {
            judged = trained..n;
            let known: HashSet<_> = labels[..trained].iter().collect();
            if let Some(unknown) = labels[judged.clone()].iter().find(|label| !known.contains(label)) {
                remark = Some(format!(
                    "label {unknown} is among the last {} rows, which are held out, and not among those learned from: \
                     rows in random order are judged fairly",
                    n - trained
                ));
            }
        } else {
            remark = Some("no row is held out: the accuracy is that of the rows learned from".into());
        }
        let Head { weight, bias } = &head;
        let weight = Table { data: weight, dim };
        (classification::classify(crate::Tilting::Dot, tau, &inputs, &weight, Some(bias))?, classes)
    } else {
        let given = args.classes.as_deref().map(open).transpose()?;
        let one_hot = model.labels();
        let (rows, path): (&dyn Rows, &Path) = match (&given, &one_hot) {
            (Some(given), _) => (given, given.path()),
            (None, Some(one_hot)) => (one_hot, &args.model),
            (None, None) => {
                let expected = "the v side of each class: this model was not trained on labels";
                return Err(bad_flag("--classes", "nothing", expected));
            }
        };
        if let (Some(path), Some(most)) = (&args.labels, labels.iter().flatten().max())
            && *most as usize >= rows.count()
        {
            let expected = format!("labels below {}, the number of classes", rows.count());
            return Err(bad_flag(&path.display().to_string(), most, expected));
        }
        let names = embedded(&model, &choice, Side::V, rows, path)?;
        let inputs = embedded(&model, &choice, Side::U, &x, &args.input)?;
        let [inputs, names] = [&inputs, &names].map(|data| Table { data, dim });
        (classification::classify(tilting, tau, &inputs, &names, None)?, names.count())
    };
    choice.announce();
    if let Some(remark) = remark {
        super::log(format_args!("{remark}"));
    }
    let accuracy =
        labels.map(|labels| classification::accuracy(&found.labels[judged.clone()], &labels[judged.clone()]));
    let indices: Vec<i64> = found.labels.iter().map(|&label| label as i64).collect();
    if let Some(path) = &args.output {
        write_npy_i64(path, &[n], &indices)?;
    }
    if let Some(path) = &args.probabilities {
        let p: Vec<f32> = found.probabilities.iter().map(|&p| p as f32).collect();
        write_npy_f32(path, &[n, classes], &p)?;
    }
    let mut json = json!({
        "rows": n, "classes": classes, "fine_tuned": args.fine_tune,
        "output": args.output.as_ref().map(shown), "probabilities": args.probabilities.as_ref().map(shown),
    });
    let mut lines = vec![format!("{n} rows, {classes} classes")];
    if args.output.is_none() {
        json["labels"] = json!(indices);
        lines.push(format!("the first: {:?}", &indices[..n.min(20)]));
    }
    if let Some(accuracy) = accuracy {
        json["accuracy"] = json!(accuracy);
        json["judged"] = json!(judged.len());
        lines.push(format!("accuracy {:.2}% of {} rows", 100.0 * accuracy, judged.len()));
    }
    common.print(&json, &lines)
}

fn read_labels(path: &Path, rows: usize) -> Result<Vec<u32>, Failure> {
    let (shape, labels) = read_npy_i64(path)?;
    let name = path.display().to_string();
    if labels.len() != rows || shape[0] != rows {
        return Err(bad_flag(&name, format!("shape {shape:?}"), format!("{rows} labels, one a row of --input")));
    }
    // A classifier has as many weights as classes; more than these is a file of something else.
    let label = |&label: &i64| u32::try_from(label).ok().filter(|&l| l < 1 << 20);
    let bad = labels.iter().find(|l| label(l).is_none());
    match bad {
        Some(bad) => Err(bad_flag(&name, bad, "labels from 0 to 1048575")),
        None => Ok(labels.iter().filter_map(label).collect()),
    }
}

pub fn sample(args: &Sample, common: &Common) -> Result<(), Failure> {
    let side = side_of(&args.side)?;
    let other = if side == Side::U { Side::V } else { Side::U };
    if args.count == 0 {
        return Err(bad_flag("--count", 0, "1 or more"));
    }
    let model = Model::load(&args.model)?;
    let given = open(&args.given)?;
    let file = args.items.as_deref().map(open).transpose()?;
    let outputs = [("--output", args.output.as_ref())];
    // Without --items those are the run's own pairs.
    let drawn_from = args.items.as_ref().map_or_else(|| model.data_files(), |items| vec![items.clone()]);
    let inputs: Vec<_> = drawn_from.iter().chain([&args.given]).map(Some).collect();
    check_outputs(&outputs, &inputs, Some(&args.model))?;
    check_room("--count", &[args.count, given.rows(), 8])?;
    let choice = common.choose(None)?;
    let queries = embedded(&model, &choice, other, &given, &args.given)?;
    let items = match &file {
        Some(file) => embedded(&model, &choice, side, file, file.path())?,
        None => {
            let split = model.data()?;
            let source = if split.test.is_empty() { &split.train } else { &split.test };
            embedded(&model, &choice, side, &SideOf(&**source, side), &args.model)?
        }
    };
    let dim = model.config.dim;
    let [queries, items] = [&queries, &items].map(|data| Table { data, dim });
    let draws = sampling::sample(model.tilting(), model.tau(), &queries, &items, args.count, common.seed())?;
    choice.announce();
    let indices: Vec<i64> = draws.indices.iter().map(|&i| i as i64).collect();
    if let Some(path) = &args.output {
        write_npy_i64(path, &[queries.count(), args.count], &indices)?;
    }
    let indices: Vec<_> = indices.chunks(args.count).collect();
    let weights: Vec<_> = draws.weights.chunks(args.count).collect();
    let lines: Vec<String> = (indices.iter().zip(&draws.ess).enumerate().take(20))
        .map(|(q, (indices, ess))| format!("given {q}: ess {ess:.1} of {}, drew {indices:?}", items.count()))
        .collect();
    let json = json!({
        "given": queries.count(), "items": items.count(), "count": args.count, "side": args.side,
        "indices": indices, "weights": weights, "ess": draws.ess, "output": args.output.as_ref().map(shown),
    });
    common.print(&json, &lines)
}
