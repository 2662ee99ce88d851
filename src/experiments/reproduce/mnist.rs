//! Handwritten digits and their labels (section 6.2, Figures 11 and 12): one encoder under three losses.

use super::super::{Error, Model, OneHot, find};
use super::{Part, Request, above, axis, mark, mean_error, parallel, short, table};
use crate::Tilting;
use crate::config::Config;
use crate::data::{Side, SideOf, Split, Table};
use crate::device::cpu::Cpu;
use crate::plot::{Axis, Figure, Mark, Panel, Shape, Style};
use crate::tasks::classification::{self, Labels};
use crate::tasks::sampling::{self, Draws};
use crate::train::TrainError;

/// Images and labels.
pub const PART: Part =
    Part { name: "mnist", about: "images and labels under three losses (Figures 11 and 12)", figures };

/// Name and weights `[lambda_u, lambda_v]` of the losses.
const LOSSES: [(&str, [f64; 2]); 3] =
    [("two-sided", [1.0, 1.0]), ("label given image", [0.0, 2.0]), ("image given label", [2.0, 0.0])];

/// The label that images are drawn for, and how many are.
const LABEL: usize = 7;
const DRAWN: usize = 16;
const WIDTH: usize = 28;

/// What is kept of one trained model.
struct Found {
    labels: Labels,
    accuracy: f64,
    fine_tuned: f64,
    draws: Draws,
    /// Share of the conditional's mass on images of the label.
    right: f64,
}

fn config(request: &Request<'_>, lambda: [f64; 2], seed: u64) -> Result<Config, Error> {
    let experiment = find(if request.mnist.is_some() { "mnist" } else { "digits" })?;
    let config = (experiment.defaults)(super::super::base(experiment.name));
    let config = match (request.mnist, request.quick) {
        (Some(data), true) => Config { data: data.into(), epochs: 3, lr: 1e-3, ..config },
        (Some(data), false) => Config { data: data.into(), ..config },
        (None, true) => Config { samples: 10_000, epochs: 10, ..config },
        (None, false) => Config { epochs: 20, ..config },
    };
    Ok(Config { lambda_u: lambda[0], lambda_v: lambda[1], seed, ..config })
}

fn study(model: &Model, split: &Split) -> Result<Found, Error> {
    let dim = model.config.dim;
    let device = Cpu::new();
    let truth = split.test.labels().expect("digits have labels");
    let classes = split.test.dim(Side::V);
    let images = model.embed_in_memory(&device, Side::U, &SideOf(&*split.test, Side::U))?;
    let names = model.embed_in_memory(&device, Side::V, &OneHot(classes))?;
    let [images, names] = [&images, &names].map(|data| Table { data, dim });
    let (tilting, tau) = (model.tilting(), model.tau());
    let accuracy = |found: &[usize]| {
        found.iter().zip(truth).filter(|&(&found, &label)| found == usize::from(label)).count() as f64
            / truth.len() as f64
    };
    let labels = classification::classify(tilting, tau, &images, &names, None);

    let trained: Vec<u32> = split.train.labels().expect("digits have labels").iter().map(|&l| l.into()).collect();
    let learned = model.embed_in_memory(&device, Side::U, &SideOf(&*split.train, Side::U))?;
    let head = classification::fine_tune(tau, &Table { data: &learned, dim }, &trained, classes, model.config.seed)
        .map_err(|source| TrainError::Loss { step: 0, source })?;
    let weight = Table { data: &head.weight, dim };
    let tuned = classification::classify(Tilting::Dot, tau, &images, &weight, Some(&head.bias));

    let query = Table { data: &names.data[LABEL * dim..][..dim], dim };
    let draws = sampling::sample(tilting, tau, &query, &images, DRAWN, model.config.seed);
    let many = sampling::sample(tilting, tau, &query, &images, 2_000, model.config.seed);
    let right = many.indices.iter().filter(|&&i| usize::from(truth[i]) == LABEL).count() as f64 / 2_000.0;
    Ok(Found { accuracy: accuracy(&labels.labels), fine_tuned: accuracy(&tuned.labels), labels, draws, right })
}

/// Images of the test pairs beside each other, `across` in a row.
fn picture(split: &Split, index: &[usize], across: usize) -> Panel {
    let size = WIDTH * WIDTH;
    let mut pixels = vec![0f32; index.len() * size];
    split.test.gather(Side::U, index, &mut pixels);
    let [low, high] = pixels.iter().fold([f32::MAX, f32::MIN], |[low, high], &x| [low.min(x), high.max(x)]);
    let width = across * WIDTH;
    let values = (0..index.len() * size)
        .map(|at| {
            let (y, x) = (at / width, at % width);
            let image = y / WIDTH * across + x / WIDTH;
            let pixel = pixels[image * size + y % WIDTH * WIDTH + x % WIDTH];
            f64::from((pixel - low) / (high - low).max(f32::MIN_POSITIVE))
        })
        .collect();
    let image = Mark { label: "pixels".into(), style: Style::Truth, shape: Shape::Image { width, values } };
    Panel { marks: vec![image], ..Panel::default() }
}

fn figures(request: &Request<'_>) -> Result<Vec<Figure>, Error> {
    let seeds = if request.quick || request.mnist.is_some() { 1 } else { 3 };
    let jobs: Vec<_> = (0..seeds).flat_map(|seed| LOSSES.map(|(_, lambda)| (lambda, request.seed + seed))).collect();
    let split =
        (find(&config(request, [1.0; 2], request.seed)?.experiment)?.data)(&config(request, [1.0; 2], request.seed)?)?;
    // Every seed has its own initial parameters and batches; the images are the first seed's.
    let found = parallel(&jobs, |&(lambda, seed)| {
        let model = Model::fit(config(request, lambda, seed)?, &*split.train)?;
        study(&model, &split)
    })?;
    let set = if request.mnist.is_some() { "MNIST" } else { "rendered digits (MNIST was not given)" };
    Ok(vec![probabilities(set, &split, &found[..LOSSES.len()]), samples(set, &split, &found)])
}

fn probabilities(set: &str, split: &Split, found: &[Found]) -> Figure {
    let truth = split.test.labels().expect("digits have labels");
    let classes = split.test.dim(Side::V);
    let row = |loss: usize, i: usize| &found[loss].labels.probabilities[i * classes..][..classes];
    let sure = |i: usize| row(0, i).iter().fold(0.0, |most: f64, &p| most.max(p));
    let apart = |i: usize| row(1, i).iter().zip(row(2, i)).map(|(a, b)| (a - b).abs()).sum::<f64>();
    let images = 0..truth.len();
    let doubtful = images.clone().min_by(|&a, &b| sure(a).total_cmp(&sure(b))).expect("there are test images");
    let disputed = images
        .filter(|&i| i != doubtful)
        .max_by(|&a, &b| apart(a).total_cmp(&apart(b)))
        .expect("there are test images");
    let mut panels = Vec::new();
    for (what, i) in [("the first", 0), ("the most doubtful", doubtful), ("the most disputed", disputed)] {
        panels.push(Panel { title: format!("{what}: a {}", truth[i]), ..picture(split, &[i], 1) });
        panels.push(Panel {
            title: String::new(),
            x: Axis { names: (0..classes).map(|c| c.to_string()).collect(), ..axis("label") },
            y: Axis { range: Some([0.0, 1.0]), ..axis("probability") },
            marks: (LOSSES.iter().enumerate())
                .map(|(k, (name, _))| mark(*name, Style::Series(k), Shape::Bars(row(k, i).to_vec())))
                .collect(),
            equal: false,
        });
    }
    let total: f64 = (0..LOSSES.len()).map(|k| row(k, doubtful).iter().sum::<f64>()).sum();
    Figure {
        name: "fig11".into(),
        title: format!("Label probabilities of three test images: {set}"),
        see: "The losses agree where the image is clear; they differ in what they make of an unclear one.".into(),
        panels,
        columns: 2,
        tables: vec![],
        criteria: vec![super::near("the mean sum of a label distribution", total / LOSSES.len() as f64, 1.0, 1e-6)],
    }
}

fn samples(set: &str, split: &Split, found: &[Found]) -> Figure {
    let truth = split.test.labels().expect("digits have labels");
    let sevens = truth.iter().filter(|&&l| usize::from(l) == LABEL).count();
    let panels = (LOSSES.iter().zip(found))
        .map(|((name, _), found)| Panel {
            title: format!("{name}, ESS {}", short(found.draws.ess[0])),
            ..picture(split, &found.draws.indices, 4)
        })
        .collect();
    let of = |loss: usize, number: fn(&Found) -> f64| -> [f64; 2] {
        mean_error(&found.iter().skip(loss).step_by(LOSSES.len()).map(number).collect::<Vec<_>>())
    };
    let percent = |[mean, error]: [f64; 2]| format!("{:.2}% ± {:.2}", 100.0 * mean, 100.0 * error);
    let ess = [0, 1, 2].map(|loss| of(loss, |f| f.draws.ess[0])[0]);
    let accuracy = [0, 1, 2].map(|loss| of(loss, |f| f.accuracy)[0]);
    let rows = (0..LOSSES.len())
        .map(|loss| {
            vec![
                LOSSES[loss].0.into(),
                percent(of(loss, |f| f.accuracy)),
                percent(of(loss, |f| f.fine_tuned)),
                short(ess[loss]),
                percent(of(loss, |f| f.right)),
            ]
        })
        .collect();
    let criteria = vec![
        above("two-sided: its effective sample size over that of label given image", ess[0] / ess[1], 5.0),
        above("image given label: its effective sample size over that of label given image", ess[2] / ess[1], 5.0),
        above(
            "label given image, the paper's best on MNIST: its accuracy less that of two-sided",
            accuracy[1] - accuracy[0],
            0.0,
        ),
        above(
            "label given image, the paper's best on MNIST: its accuracy less that of image given label",
            accuracy[1] - accuracy[2],
            0.0,
        ),
    ];
    Figure {
        name: "fig12".into(),
        title: format!("16 test images drawn given the label {LABEL}: {set}"),
        see:
            "Label given image leaves the law of images free: its draws fall on few images, those of the other two are \
              diverse."
                .into(),
        panels,
        columns: 3,
        tables: vec![table(
            &format!("{} test images, {sevens} of them the label's", truth.len()),
            &["loss", "accuracy", "accuracy, fine-tuned", "effective sample size", "draws of the label"],
            rows,
        )],
        criteria,
    }
}
