//! The Gaussian process (section 6.1, Figures 7 to 10): the errors of trained conditional means over the embedding
//! dimension, the batch and the number of pairs, and what the paper states of the other models.

use super::super::{Error, Model, gaussian};
use super::{
    KINDS, Part, Request, above, axis, below, distance, falls, largest, linspace, log_axis, mark, mean_error, near,
    norm, optima, parallel, short, table,
};
use crate::config::Config;
use crate::data::gaussian2d::Gaussian;
use crate::data::gp::{self, COEFFICIENTS, MODES, NOISE};
use crate::objective::Tilting;
use crate::optim::Schedule;
use crate::plot::{Axis, Criterion, Figure, Panel, Shape, Style};
use crate::theory::{Certificate, Theory};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// The Gaussian process.
pub const PART: Part =
    Part { name: "gp", about: "errors of conditional means of a Gaussian process (Figures 7 to 10)", figures };

/// How a run is trained.
#[derive(Clone, Copy, PartialEq)]
enum Settings {
    /// As the paper prints them: Adam at 1e-4, 500 epochs, wherever that ends.
    Printed,
    /// Until nothing changes: a larger rate that falls to zero, over as many steps for every point of a sweep.
    Converged,
}

impl Settings {
    /// Seeds of each point. As printed, time grows with all that is swept; its trends need no error bars to be seen.
    fn seeds(self, quick: bool) -> u64 {
        match (quick, self) {
            (true, Settings::Printed) => 1,
            (true, Settings::Converged) => 2,
            (false, _) => 4,
        }
    }
}

/// One run of a sweep.
#[derive(Clone, Copy)]
struct Run {
    settings: Settings,
    dim: usize,
    batch: usize,
    samples: usize,
    seed: u64,
}

/// The paper's point where a sweep does not vary it.
const DIM: usize = 5;
const BATCH: usize = 512;
const SAMPLES: usize = 10_000;

struct Sweeps<'a> {
    quick: bool,
    law: &'a Gaussian,
    theory: &'a Theory,
}

impl Sweeps<'_> {
    fn config(&self, run: &Run) -> Config {
        let config =
            Config { dim: run.dim, batch: run.batch, samples: run.samples, seed: run.seed, ..gaussian::GP.settings() };
        let epoch = (run.samples / run.batch) as u64;
        match run.settings {
            Settings::Printed => Config { epochs: 500, lr: 1e-4, schedule: Schedule::Constant, ..config },
            Settings::Converged if self.quick => Config { epochs: 2000u64.div_ceil(epoch), lr: 4e-3, ..config },
            Settings::Converged => Config { epochs: 10_000u64.div_ceil(epoch), lr: 1e-3, ..config },
        }
    }
    fn fit(&self, config: Config) -> Result<Model, Error> {
        let data = self.law.sample(config.seed, config.samples);
        Model::fit(config, &data)
    }
    fn certify(&self, run: &Run) -> Result<Certificate, Error> {
        let model = self.fit(self.config(run))?;
        let learned = model.quadratic(self.theory).expect("dot is quadratic");
        Ok(learned.certify(&self.theory.conditional_optimum(run.dim)))
    }
}

/// What a sweep varies, and over what.
struct Sweep {
    name: &'static str,
    title: &'static str,
    see: &'static str,
    label: &'static str,
    points: Vec<usize>,
    /// Sets the point of a run.
    vary: fn(&mut Run, usize),
    /// The axis of the points.
    axis: fn(&str) -> Axis,
    /// What should hold of a side.
    criteria: fn(&Errors) -> Vec<Criterion>,
}

/// What one run of a sweep came to.
struct Found {
    settings: Settings,
    point: usize,
    certificate: Certificate,
}

/// Squared errors of one side's mean over the points of a sweep.
struct Errors {
    /// `E[u|v]` or `E[v|u]`.
    side: &'static str,
    /// Point, mean over seeds and its standard error.
    converged: Vec<[f64; 3]>,
    printed: Vec<[f64; 3]>,
    /// Point, and the least that its dimension allows.
    optimum: Vec<[f64; 2]>,
    /// Of knowing nothing.
    signal: f64,
}

/// Without their points and standard errors.
fn means(series: &[[f64; 3]]) -> Vec<f64> {
    series.iter().map(|point| point[1]).collect()
}

fn figures(request: &Request<'_>) -> Result<Vec<Figure>, Error> {
    let law = gp::gp();
    let theory = Theory::new(&law);
    let sweeps = Sweeps { quick: request.quick, law: &law, theory: &theory };
    let quick = request.quick;
    let list = [
        Sweep {
            name: "fig08",
            title: "Error over the embedding dimension d",
            see: "Converged errors lie on the rank-d optimum of Theorem 5.1, which is zero once d reaches the rank of C_uv, 5.",
            label: "d",
            points: (2..=7).collect(),
            vary: |run, dim| run.dim = dim,
            axis,
            criteria: |Errors { side, converged, optimum, signal, .. }| {
                let excess = converged.iter().zip(optimum).map(|(c, o)| (c[1] - o[1]) / signal);
                let claim = format!(
                    "{side}: the largest excess over the optimum, as a share of the signal {},",
                    short(*signal)
                );
                vec![
                    below(claim, largest(excess), 0.01),
                    falls(format!("{side}: the error up to d = 5"), &means(converged)[..4]),
                ]
            },
        },
        Sweep {
            name: "fig09",
            title: "Error over the batch",
            see: "Converged, the error falls with the batch as the bias of sums over it does; the printed settings stop early \
                  and turn the trend round, since larger batches leave fewer steps.",
            label: "pairs in a batch",
            points: vec![128, 256, 512, 1024],
            vary: |run, batch| run.batch = batch,
            axis: log_axis,
            criteria: |Errors { side, converged, printed, .. }| {
                let turn = printed[printed.len() - 1][1] / printed[0][1];
                vec![
                    falls(format!("{side}: the converged error"), &means(converged)),
                    above(
                        format!("{side}: as printed, the error at the largest batch over that at the smallest"),
                        turn,
                        1.0,
                    ),
                ]
            },
        },
        Sweep {
            name: "fig10",
            title: "Error over the number of pairs N",
            see: "The error falls with N until the batch's own bias is what is left.",
            label: "N",
            points: if quick {
                vec![2_000, 5_000, 10_000, 20_000]
            } else {
                vec![2_000, 5_000, 10_000, 20_000, 50_000, 100_000]
            },
            vary: |run, samples| run.samples = samples,
            axis: log_axis,
            criteria: |Errors { side, converged, printed, .. }| {
                let gain = converged[0][1] / converged[converged.len() - 1][1];
                vec![
                    above(format!("{side}: the converged error at the fewest pairs over that at the most"), gain, 1.5),
                    falls(format!("{side}: the error as printed"), &means(printed)),
                ]
            },
        },
    ];
    let mut all = vec![samples(request, &sweeps)?];
    for sweep in &list {
        (request.tell)(&format!("gp: {}", sweep.title));
        all.push(sweep.figure(request, &sweeps)?);
    }
    (request.tell)("gp: the other models");
    all.push(variants(request, &sweeps)?);
    Ok(all)
}

impl Sweep {
    /// Trains all its runs.
    fn train(&self, request: &Request<'_>, sweeps: &Sweeps<'_>) -> Result<Vec<Found>, Error> {
        let mut runs = Vec::new();
        for settings in [Settings::Converged, Settings::Printed] {
            for &point in &self.points {
                for seed in 0..settings.seeds(request.quick) {
                    let seed = request.seed.wrapping_add(seed);
                    let mut run = Run { settings, dim: DIM, batch: BATCH, samples: SAMPLES, seed };
                    (self.vary)(&mut run, point);
                    runs.push((point, run));
                }
            }
        }
        // The longest first, so that no thread is left with it at the end; a point's seeds stay in order.
        runs.sort_by_key(|(_, run)| std::cmp::Reverse((run.settings == Settings::Printed, run.samples * run.batch)));
        parallel(&runs, |&(point, run)| Ok(Found { settings: run.settings, point, certificate: sweeps.certify(&run)? }))
    }

    /// Of `side`, whose error, optimum and signal `of` reads off a certificate.
    fn errors(&self, found: &[Found], side: &'static str, of: fn(&Certificate) -> [f64; 3]) -> Errors {
        let at = |settings: Settings, point: usize| -> Vec<[f64; 3]> {
            let here = found.iter().filter(|f| f.settings == settings && f.point == point);
            here.map(|f| of(&f.certificate)).collect()
        };
        let series = |settings| -> Vec<[f64; 3]> {
            let point = |&point: &usize| {
                let errors: Vec<f64> = at(settings, point).iter().map(|[error, ..]| *error).collect();
                let [mean, error] = mean_error(&errors);
                [point as f64, mean, error]
            };
            self.points.iter().map(point).collect()
        };
        let optimum = |&point: &usize| [point as f64, at(Settings::Converged, point)[0][1]];
        Errors {
            side,
            converged: series(Settings::Converged),
            printed: series(Settings::Printed),
            optimum: self.points.iter().map(optimum).collect(),
            signal: at(Settings::Converged, self.points[0])[0][2],
        }
    }

    fn figure(&self, request: &Request<'_>, sweeps: &Sweeps<'_>) -> Result<Figure, Error> {
        let found = self.train(request, sweeps)?;
        let sides = [
            self.errors(&found, "E[u|v]", |c| [c.err_u_given_v, c.optimum_u_given_v, c.signal_u_given_v]),
            self.errors(&found, "E[v|u]", |c| [c.err_v_given_u, c.optimum_v_given_u, c.signal_v_given_u]),
        ];
        let criteria = sides.iter().flat_map(self.criteria).collect();
        let (mut rows, mut panels) = (Vec::new(), Vec::new());
        for Errors { side, converged, printed, optimum, signal } in sides {
            for ((c, p), o) in converged.iter().zip(&printed).zip(&optimum) {
                let share = |x: f64| format!("{:.2}%", 100.0 * (x - o[1]) / signal);
                rows.push(vec![
                    side.into(),
                    short(c[0]),
                    short(o[1]),
                    short(c[1]),
                    share(c[1]),
                    short(p[1]),
                    share(p[1]),
                ]);
            }
            let mut marks = vec![
                mark("converged", Style::Series(0), Shape::Errors(converged)),
                mark("as printed (lr 1e-4)", Style::Series(1), Shape::Errors(printed)),
            ];
            // Zero is not on a logarithmic axis.
            let shown: Vec<[f64; 2]> = optimum.into_iter().filter(|o| o[1] > 1e-9).collect();
            if !shown.is_empty() {
                marks.push(mark("rank-d optimum", Style::Theory, Shape::Line(shown)));
            }
            let y = log_axis(&format!("squared error of {side}"));
            panels.push(Panel { title: side.into(), x: (self.axis)(self.label), y, marks, equal: false });
        }
        let [converged, printed] = [Settings::Converged, Settings::Printed].map(|s| s.seeds(request.quick));
        let title = format!(
            "squared error (mean over seeds: {converged} converged, {printed} as printed) and its excess over the \
             optimum as a share of the signal"
        );
        let columns = ["mean of", self.label, "optimum", "converged", "excess", "as printed", "excess"];
        Ok(Figure {
            name: self.name.into(),
            title: self.title.into(),
            see: self.see.into(),
            panels,
            columns: 2,
            tables: vec![table(&title, &columns, rows)],
            criteria,
        })
    }
}

/// Figure 7: the process, and what learned encoders make of noisy points.
fn samples(request: &Request<'_>, sweeps: &Sweeps<'_>) -> Result<Figure, Error> {
    let grid = linspace([0.0, 1.0], 201);
    let curve = |xi: &[f64]| Shape::Line(grid.iter().map(|&x| [x, gp::field(xi, x)]).collect());
    let (mut paths, mut panels) = (Vec::new(), Vec::new());
    let run = Run { settings: Settings::Converged, dim: DIM, batch: BATCH, samples: SAMPLES, seed: request.seed };
    let model = sweeps.fit(sweeps.config(&run))?;
    let learned = model.quadratic(sweeps.theory).expect("dot is quadratic").v_given_u();
    let truth = sweeps.theory.v_given_u();
    let mut gaps = Vec::new();
    for i in 0..3 {
        let mut rng = ChaCha8Rng::seed_from_u64(request.seed);
        rng.set_stream(i as u64);
        let mut normal = || -> f64 { StandardNormal.sample(&mut rng) };
        let xi: Vec<f64> = (0..MODES).map(|_| normal()).collect();
        let u: Vec<f64> = gp::points().iter().map(|&x| gp::field(&xi, x) + NOISE * normal()).collect();
        let points = Shape::Points(gp::points().iter().zip(&u).map(|(&x, &u)| [x, u]).collect());
        let (got, best) = (learned.mean_at(&u), truth.mean_at(&u));
        gaps.push(distance(&got, &best));
        paths.push(mark(format!("path {}", i + 1), Style::Series(i), curve(&xi)));
        paths.push(mark(format!("u of path {}", i + 1), Style::Series(i), points.clone()));
        if i == 0 {
            panels.push(Panel {
                title: "path 1 and its means given u".into(),
                x: axis("x"),
                y: axis("w(x)"),
                marks: vec![
                    mark(format!("first {COEFFICIENTS} modes"), Style::Truth, curve(&xi[..COEFFICIENTS])),
                    mark("u", Style::Series(0), points),
                    mark("learned E[v|u]", Style::Series(1), curve(&got)),
                    mark("true E[v|u]", Style::Theory, curve(&best)),
                ],
                equal: false,
            });
        }
    }
    panels.insert(
        0,
        Panel {
            title: "three paths with noisy values at 12 points".into(),
            x: Axis { range: Some([0.0, 1.0]), ..axis("x") },
            y: axis("w(x)"),
            marks: paths,
            equal: false,
        },
    );
    Ok(Figure {
        name: "fig07".into(),
        title: "Samples of the Gaussian process".into(),
        see: "Encoders that only saw which u goes with which v recover the path's leading modes as the exact posterior does."
            .into(),
        panels,
        columns: 2,
        tables: vec![],
        criteria: vec![below(
            "the largest distance of the learned E[v|u] from the true one, relative, over the three paths",
            largest(gaps),
            0.1,
        )],
    })
}

/// What the paper states and does not plot: covariances and marginals (Corollaries 5.2, 5.4 and 5.7), in numbers.
fn variants(request: &Request<'_>, sweeps: &Sweeps<'_>) -> Result<Figure, Error> {
    let theory = sweeps.theory;
    let fitted = parallel(&KINDS, |kind| {
        // A dot model's exp s has no variance here (canonical correlations above 1/2), so sums over a batch approach
        // their means slowly and the batch must be large; the l2 model's density ratio is bounded in u, but its
        // encoders must grow to the noise's inverse, which takes many steps at a large rate.
        let (batch, steps) = match (kind.tilting, request.quick) {
            (Tilting::Dot, true) => (4096, 600),
            (Tilting::Dot, false) => (4096, 3000),
            (_, true) => (512, 8_000),
            (_, false) => (512, 20_000),
        };
        let samples = 100_000;
        let run = Run { settings: Settings::Converged, dim: DIM, batch, samples, seed: request.seed };
        let epochs = (steps * batch).div_ceil(samples) as u64;
        sweeps.fit(kind.set(Config { lr: 1e-2, epochs, ..sweeps.config(&run) }))
    })?;
    let truth = theory.u_given_v();
    let (mut rows, mut criteria) = (Vec::new(), Vec::new());
    let mut numbers = Vec::new();
    for ((kind, model), optimum) in KINDS.iter().zip(&fitted).zip(&optima(theory, DIM)) {
        let learned = model.quadratic(theory).expect("dot and l2 are quadratic");
        let conditional = learned.u_given_v();
        let marginal = |m: &crate::theory::Model<'_>| m.law().map_or(f64::NAN, |l| distance(&l.c_uu, &sweeps.law.c_uu));
        let shrink = norm(&conditional.mean) / norm(&truth.mean);
        let shrink_best = norm(&optimum.u_given_v().mean) / norm(&truth.mean);
        let found = [
            distance(&conditional.cov, &truth.cov),
            distance(&optimum.u_given_v().cov, &truth.cov),
            shrink,
            shrink_best,
            marginal(&learned),
            marginal(optimum),
        ];
        rows.push(std::iter::once(kind.name.into()).chain(found.map(short)).collect());
        numbers.push(found);
    }
    let [dot, l2, joint] = [&numbers[0], &numbers[1], &numbers[2]];
    criteria.push(below("l2, u given v: the relative error of the conditional covariance (Cor 5.4)", l2[0], 0.05));
    criteria.push(near(
        "dot, joint: the size of the mean operator over the true one (Cor 5.7)",
        joint[2],
        joint[3],
        0.03,
    ));
    criteria.push(Criterion {
        claim: "dot, joint: the marginal is closer to the truth than the conditional loss leaves it (Cor 5.7)".into(),
        found: match dot[4].is_nan() {
            true => format!("off by {}; the conditional model has no joint law at all", short(joint[4])),
            false => format!("off by {} against {}", short(joint[4]), short(dot[4])),
        },
        passed: !joint[4].is_nan() && (dot[4].is_nan() || joint[4] < dot[4]),
    });
    let panel = |title: &str, label: &str, range: [f64; 2], at: usize| {
        let bars = |at: usize| Shape::Bars(numbers.iter().map(|n| n[at]).collect());
        Panel {
            title: title.into(),
            x: Axis { names: KINDS.iter().map(|k| k.name.into()).collect(), ..Axis::default() },
            y: Axis { range: Some(range), ..log_axis(label) },
            marks: vec![mark("learned", Style::Series(0), bars(at)), mark("theory", Style::Theory, bars(at + 1))],
            equal: false,
        }
    };
    Ok(Figure {
        name: "gp-models".into(),
        title: "Covariances, means and marginals of the other models".into(),
        see: "Only the one-sided l2 model has the right spread of u given v; the joint loss shrinks the means and brings the \
              marginals closer. A dot model's covariance is the marginal's, whatever its encoders (Cor 5.2)."
            .into(),
        panels: vec![
            panel("error of Cov[u|v]", "relative error", [0.001, 100.0], 0),
            panel("size of the mean of u given v", "relative to the truth", [0.1, 10.0], 2),
            panel("error of the marginal of u", "relative error", [0.1, 100.0], 4),
        ],
        columns: 3,
        tables: vec![table(
            "relative error of the covariance of u given v, size of its mean operator, relative error of the marginal of u",
            &["model", "covariance, learned", "theory", "size of mean, learned", "theory", "marginal, learned", "theory"],
            rows,
        )],
        criteria,
    })
}
