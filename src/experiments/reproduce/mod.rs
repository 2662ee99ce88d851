//! The paper's figures, each beside what the theory or the paper says, from one command.
//!
//! A new question is a file here and a line in [`ALL`]. Nothing that is written depends on the clock or on the number
//! of threads: every number is that of the seed.

mod gaussian2d;
mod gp;
mod mnist;
mod modalities;
mod objectives;
mod ocean;

use super::Error;
use crate::config::{Config, ObjectiveName};
use crate::data::{DataError, write_atomic};
use crate::objective::Tilting;
use crate::plot::{Axis, Criterion, Figure, Mark, Shape, Style, Table, report};
use crate::theory::{Model, Theory};
use serde_json::json;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A part of the paper.
pub struct Part {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    figures: fn(&Request<'_>) -> Result<Vec<Figure>, Error>,
}

/// Every part, in the order of its figures.
pub const ALL: &[Part] = &[gaussian2d::PART, gp::PART, mnist::PART, ocean::PART, objectives::PART, modalities::PART];

/// What is asked.
pub struct Request<'a> {
    /// Shorter runs and fewer points.
    pub quick: bool,
    /// Of everything random.
    pub seed: u64,
    /// Where figures and the runs behind them go.
    pub out: &'a Path,
    /// Folder of MNIST's files; rendered digits stand for them where it is `None`.
    pub mnist: Option<&'a Path>,
    /// Told what is being done.
    pub tell: &'a (dyn Fn(&str) + Sync),
}

/// Makes the figures of `parts` and writes `NAME.svg`, `NAME.png` and `NAME.csv` of each, `figures.json` and
/// `report.html` to `request.out`.
///
/// # Errors
/// [`Error`]; what was made before it is written.
pub fn reproduce(parts: &[&Part], request: &Request<'_>) -> Result<Vec<Figure>, Error> {
    let io = |source| DataError::Io { path: request.out.into(), source };
    std::fs::create_dir_all(request.out).map_err(io)?;
    let write = |name: &str, bytes: &[u8]| write_atomic(&request.out.join(name), |w| w.write_all(bytes));
    let (mut all, mut names, mut failed) = (Vec::new(), Vec::new(), None);
    for part in parts {
        (request.tell)(&format!("{}: {}", part.name, part.about));
        let figures = match (part.figures)(request) {
            Ok(figures) => figures,
            // What was made before it is reported all the same.
            Err(e) => {
                failed = Some(e);
                break;
            }
        };
        names.push(part.name);
        for figure in figures {
            write(&format!("{}.svg", figure.name), figure.svg().as_bytes())?;
            write(&format!("{}.png", figure.name), &figure.png())?;
            write(&format!("{}.csv", figure.name), figure.csv().as_bytes())?;
            all.push(figure);
        }
    }
    if let Some(e) = failed.take_if(|_| all.is_empty()) {
        return Err(e);
    }
    let figures: Vec<_> = all.iter().map(Figure::json).collect();
    let record = json!({
        "paper": "arXiv 2505.24134", "parts": names, "quick": request.quick, "seed": request.seed, "figures": figures,
    });
    write("figures.json", format!("{record}\n").as_bytes())?;
    let intro = [
        "Figures of Baptista, Stuart and Tran, “A mathematical perspective on contrastive learning” (arXiv 2505.24134), \
         made again from trained encoders, each beside what the theory or the paper says."
            .to_string(),
        format!(
            "Parts: {}. Seed {}. {}",
            names.join(", "),
            request.seed,
            if request.quick { "Quick settings: shorter runs and fewer points than the paper's." } else { "Full settings." }
        ),
    ];
    write("report.html", report("The paper, reproduced", &intro, &all).as_bytes())?;
    failed.map_or(Ok(all), Err)
}

/// `f` of each job, in order: as many at a time as there are threads, each on one thread, since a run of small
/// batches gains nothing from more.
fn parallel<J: Sync, R: Send>(jobs: &[J], f: impl Fn(&J) -> Result<R, Error> + Sync) -> Result<Vec<R>, Error> {
    let next = AtomicUsize::new(0);
    let done: Vec<_> = jobs.iter().map(|_| Mutex::new(None)).collect();
    let work = || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("the machine has one more thread");
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(at) else { return };
            *done[at].lock().expect("no job panics with the lock held") = Some(pool.install(|| f(job)));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..rayon::current_num_threads().min(jobs.len()) {
            scope.spawn(work);
        }
    });
    let result = |slot: Mutex<Option<_>>| slot.into_inner().expect("no job panicked").expect("each job was done");
    done.into_iter().map(result).collect()
}

/// Tilting, objective and weights of a model of Gaussian pairs, and its name.
struct Kind {
    name: &'static str,
    tilting: Tilting,
    objective: ObjectiveName,
    lambda: [f64; 2],
}

/// The models that have an optimum in closed form.
const KINDS: [Kind; 3] = [
    Kind { name: "dot, conditional", tilting: Tilting::Dot, objective: ObjectiveName::Conditional, lambda: [1.0, 1.0] },
    Kind { name: "l2, u given v", tilting: Tilting::L2, objective: ObjectiveName::Conditional, lambda: [2.0, 0.0] },
    Kind { name: "dot, joint", tilting: Tilting::Dot, objective: ObjectiveName::Joint, lambda: [1.0, 1.0] },
];

impl Kind {
    /// `config` for a model of this kind.
    fn set(&self, config: Config) -> Config {
        let [lambda_u, lambda_v] = self.lambda;
        Config { tilting: self.tilting, objective: self.objective, lambda_u, lambda_v, ..config }
    }
}

/// The optimum of each of [`KINDS`] in so many dimensions.
fn optima(theory: &Theory, dim: usize) -> [Model<'_>; 3] {
    [theory.conditional_optimum(dim), theory.l2_optimum(dim), theory.joint_optimum(dim)]
}

/// A criterion: `found` is within `share` of `expected`.
fn near(claim: impl Into<String>, found: f64, expected: f64, share: f64) -> Criterion {
    Criterion {
        claim: format!("{} is {} within {}%", claim.into(), short(expected), short(100.0 * share)),
        found: short(found),
        passed: (found - expected).abs() <= share * expected.abs(),
    }
}

/// A criterion: `found` is below `bound`.
fn below(claim: impl Into<String>, found: f64, bound: f64) -> Criterion {
    Criterion {
        claim: format!("{} is below {}", claim.into(), short(bound)),
        found: short(found),
        passed: found < bound,
    }
}

/// A criterion: `found` is above `bound`.
fn above(claim: impl Into<String>, found: f64, bound: f64) -> Criterion {
    Criterion {
        claim: format!("{} is above {}", claim.into(), short(bound)),
        found: short(found),
        passed: found > bound,
    }
}

/// The largest of what is 0 or more; NaN where one is, for which no criterion holds.
fn largest(x: impl IntoIterator<Item = f64>) -> f64 {
    x.into_iter().fold(0.0, |most: f64, x| if most >= x || most.is_nan() { most } else { x })
}

/// A criterion on a series: each number is below the one before.
fn falls(claim: impl Into<String>, series: &[f64]) -> Criterion {
    Criterion {
        claim: format!("{} falls from point to point", claim.into()),
        found: series.iter().map(|&x| short(x)).collect::<Vec<_>>().join(", "),
        passed: series.windows(2).all(|w| w[1] < w[0]),
    }
}

/// Four digits.
fn short(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if !a.is_finite() => x.to_string(),
        a if !(1e-3..1e5).contains(&a) => {
            let text = format!("{x:.3e}");
            let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
            format!("{}e{power}", digits.trim_end_matches('0').trim_end_matches('.'))
        }
        a => {
            let digits = (3 - a.log10().floor() as i32).max(0) as usize;
            let text = format!("{x:.digits$}");
            if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
        }
    }
}

fn axis(label: &str) -> Axis {
    Axis { label: label.into(), ..Axis::default() }
}

fn log_axis(label: &str) -> Axis {
    Axis { log: true, ..axis(label) }
}

fn mark(label: impl Into<String>, style: Style, shape: Shape) -> Mark {
    Mark { label: label.into(), style, shape }
}

/// A table of numbers.
fn table(title: &str, columns: &[&str], rows: Vec<Vec<String>>) -> Table {
    Table { title: title.into(), columns: columns.iter().map(|c| (*c).into()).collect(), rows }
}

/// `n` numbers from `ends[0]` to `ends[1]`.
fn linspace(ends: [f64; 2], n: usize) -> Vec<f64> {
    (0..n).map(|i| ends[0] + (ends[1] - ends[0]) * i as f64 / (n - 1) as f64).collect()
}

/// The Euclidean norm.
fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// How far `found` is from `truth`, as a share of the truth's norm.
fn distance(found: &[f64], truth: &[f64]) -> f64 {
    let gap: Vec<f64> = found.iter().zip(truth).map(|(a, b)| a - b).collect();
    norm(&gap) / norm(truth)
}

/// Mean and standard error of its mean (0 for one number).
fn mean_error(x: &[f64]) -> [f64; 2] {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let squares: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
    [mean, if x.len() > 1 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criteria_hold_where_they_should() {
        assert!(near("", 1.029, 1.0, 0.03).passed && !near("", 1.031, 1.0, 0.03).passed);
        assert!(near("", -1.029, -1.0, 0.03).passed && !near("", 1.0, -1.0, 0.03).passed);
        assert_eq!(near("a", 0.0, 0.44444, 0.03).claim, "a is 0.4444 within 3%");
        assert!(below("", 1.0, 2.0).passed && !below("", 2.0, 2.0).passed);
        assert!(above("", 3.0, 2.0).passed && !above("", 2.0, 2.0).passed);
        assert!(falls("", &[3.0, 2.0, 1.0]).passed && !falls("", &[3.0, 1.0, 1.0]).passed && falls("", &[1.0]).passed);
        // What is no number holds nowhere, wherever it stands.
        for series in [[1.0, f64::NAN, 0.5], [f64::NAN, 1.0, 0.5], [1.0, 0.5, f64::NAN]] {
            assert!(largest(series).is_nan() && !below("", largest(series), 2.0).passed && !falls("", &series).passed);
        }
        assert_eq!((largest([]), largest([0.5, 2.0, 1.0])), (0.0, 2.0));
        assert!(!near("", f64::NAN, 1.0, 0.5).passed && !above("", f64::NAN, 1.0).passed);
    }

    #[test]
    fn numbers_have_four_digits() {
        let known = [
            (0.0, "0"),
            (4.0 / 9.0, "0.4444"),
            (-2.0 / 3.0, "-0.6667"),
            (2.5, "2.5"),
            (31.41592, "31.42"),
            (31415.92, "31416"),
            (1e5, "1e5"),
            (2e-7, "2e-7"),
            (1.23456e-4, "1.235e-4"),
            (f64::INFINITY, "inf"),
        ];
        for (x, text) in known {
            assert_eq!(short(x), text);
        }
    }

    #[test]
    fn sums_are_their_definitions() {
        assert_eq!(mean_error(&[1.0, 3.0]), [2.0, 1.0]);
        assert_eq!(mean_error(&[5.0]), [5.0, 0.0]);
        assert_eq!(linspace([-1.0, 2.0], 4), [-1.0, 0.0, 1.0, 2.0]);
        assert_eq!((norm(&[3.0, -4.0]), distance(&[3.0, 0.0], &[0.0, 4.0])), (5.0, 1.25));
    }

    #[test]
    fn jobs_are_answered_in_order() {
        let jobs: Vec<usize> = (0..50).collect();
        assert_eq!(
            parallel(&jobs, |&job| Ok(job * job)).unwrap(),
            jobs.iter().map(|job| job * job).collect::<Vec<_>>()
        );
    }
}
