//! Figures 13 to 15 (section 6.3): drifters and the flows that carry them, recall over training, flows retrieved.

use super::{Part, Request, axis, largest, log_axis, mark, table};
use crate::Cpu;
use crate::checkpoint::{METRICS, SUMMARY};
use crate::config::{Config, Partial};
use crate::data::ocean::{COEFFICIENTS, Flow, HORIZON, Ocean, Recording, START};
use crate::data::{DataError, Side, SideOf, Source, Split, Table};
use crate::experiments::{Error, Model, Outcome, resolve, retrieval, run};
use crate::plot::{Axis, Criterion, Figure, Panel, Shape, Style};
use crate::tasks::retrieval::top_k;
use crate::train::Progress;
use rayon::prelude::*;
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// The drifter whose flow is sought, or which a flow carries.
const DRIFTER: Style = Style::Series(0);
/// What was found in place of the true flow, and where it carries its drifter.
const FOUND: [Style; 2] = [Style::Series(2), Style::Series(1)];
/// Recall worth the name, as a multiple of chance.
const ABOVE_CHANCE: f64 = 20.0;
/// Flows whose field and integration are checked.
const CHECKED: usize = 50;

/// Flows and drifters.
pub const PART: Part = Part { name: "ocean", about: "flows and drifters (Figures 13 to 15)", figures };

/// Trains in the folder `ocean`, going on with a run that was broken off there, and draws what was learned.
fn figures(request: &Request<'_>) -> Result<Vec<Figure>, Error> {
    let flags = Partial {
        experiment: Some("ocean".into()),
        quick: Some(request.quick),
        seed: Some(request.seed),
        ..Partial::default()
    };
    let mut tenth = 0;
    let mut observe = |Progress { steps: [done, all], .. }: Progress| {
        if 10 * done / all > tenth {
            tenth = 10 * done / all;
            (request.tell)(&format!("ocean: {}% trained", 10 * tenth));
        }
    };
    draw(&resolve(flags)?, &request.out.join("ocean"), &mut observe)
}

/// The figures of a run of these settings.
fn draw(config: &Config, dir: &Path, observe: &mut dyn FnMut(Progress)) -> Result<Vec<Figure>, Error> {
    let resume = !dir.join(SUMMARY).exists();
    let outcome = run(&mut Cpu::new(), config, dir, resume, &AtomicBool::new(false), observe)?;
    let model = Model::load(dir)?;
    let split = model.data()?;
    let ocean = Ocean::new(config.seed, Recording::PAPER);
    Ok(vec![drifters(&ocean), over_training(dir, &outcome, &split)?, retrieved(&model, &*split.test, &ocean)?])
}

/// Figure 13: flows and drifters, and that they are what they should be.
fn drifters(ocean: &Ocean) -> Figure {
    let flows: Vec<Flow> = (0..CHECKED).map(|i| Flow::new(&ocean.coefficients(i), &ocean.frequencies)).collect();
    let mut panels: Vec<Panel> = (flows.iter().take(3).enumerate())
        .map(|(i, flow)| {
            let path = from_start(flow.trajectory(Recording::PAPER));
            torus(format!("flow {}", i + 1), flow, Style::Truth, &[("drifter", DRIFTER, path)])
        })
        .collect();

    // The coarsest steps are small enough for the order to show, the finest large enough that rounding does not.
    let steps = [250, 500, 1000];
    let dt = steps.map(|steps| HORIZON / steps as f64);
    let errors = steps.map(|steps| {
        let logs: Vec<f64> = flows.par_iter().map(|flow| flow.error(steps).ln()).collect();
        (logs.iter().sum::<f64>() / CHECKED as f64).exp()
    });
    let order = (errors[0] / errors[2]).ln() / (dt[0] / dt[2]).ln();
    let points = [0, 1, 2].map(|i| [dt[i], errors[i]]).to_vec();
    let theory = dt.map(|x| [x, errors[1] * (x / dt[1]).powi(4)]).to_vec();
    panels.push(Panel {
        title: "error of the drifter's last position".into(),
        x: log_axis("time step"),
        y: log_axis(&format!("geometric mean of {CHECKED} flows")),
        marks: vec![
            mark("order 4", Style::Theory, Shape::Line(theory)),
            mark("Runge-Kutta", DRIFTER, Shape::Points(points)),
        ],
        equal: false,
    });

    // Points of space and time all over: multiples of irrational numbers.
    let divergence = largest(flows.iter().enumerate().map(|(i, flow)| {
        let [x, y, t] = [2f64, 3.0, 5.0].map(|root| ((i + 1) as f64 * root.sqrt()).fract());
        flow.divergence([x, y], HORIZON * t).abs()
    }));
    let residuals: Vec<f64> = flows.par_iter().map(|flow| flow.residual(Recording::PAPER)).collect();
    let residual = largest(residuals);
    Figure {
        name: "fig13".into(),
        title: "Flows on the torus and the drifters they carry".into(),
        see: "Lines of equal stream function at half time, 0.4 apart: the closer they are, the faster the flow. It \
              changes in time, so the drifter does not follow them; on leaving at one side it comes in at the other."
            .into(),
        panels,
        columns: 2,
        tables: Vec::new(),
        criteria: vec![
            Criterion {
                claim: format!(
                    "the velocity has no divergence: below 1e-9 at {CHECKED} points, where its derivatives are about 100"
                ),
                found: format!("{divergence:.1e}"),
                passed: divergence < 1e-9,
            },
            Criterion {
                claim: "halving the time step divides the error by 2^p, 3.9 <= p <= 4.1".into(),
                found: format!("p = {order:.3}"),
                passed: (3.9..=4.1).contains(&order),
            },
            Criterion {
                claim: format!(
                    "dx/dt is the velocity on the recorded positions of {CHECKED} drifters to 1e-8, of about 10"
                ),
                found: format!("{residual:.1e}"),
                passed: residual < 1e-8,
            },
        ],
    }
}

/// Figure 14: recall after every epoch.
fn over_training(dir: &Path, outcome: &Outcome, split: &Split) -> Result<Figure, Error> {
    let lines = epochs(&dir.join(METRICS))?;
    let last = lines.last().expect("a finished run has an epoch");
    let pairs = retrieval::pairs(split);
    let number = |value: &Value| value.as_f64().expect("training wrote a number");
    let percent = |x: f64| format!("{:.2}%", 100.0 * x);
    let ways = [("u_to_v", "flow to drifter"), ("v_to_u", "drifter to flow")];

    let panel = |(way, title): (&str, &str), k: usize| {
        let series = |set: &str, label: &str, color: usize| {
            let at = |line: &Value| {
                [number(&line["epoch"]) + 1.0, 100.0 * number(&line[format!("recall_{set}_{way}_at_{k}")])]
            };
            mark(label, Style::Series(color), Shape::Line(lines.iter().map(at).collect()))
        };
        let chance = 100.0 * k as f64 / pairs as f64;
        let chance = Shape::Line([0, lines.len()].map(|epoch| [epoch as f64, chance]).to_vec());
        Panel {
            title: format!("{title}, R@{k}"),
            x: Axis { range: Some([0.0, lines.len() as f64]), ..axis("epoch") },
            // From below 0, or chance would lie on the axis.
            y: Axis { range: Some([-2.0, 100.0]), ..axis(&format!("% of {pairs} pairs")) },
            marks: vec![
                series("train", "training pairs", 0),
                series("test", "held-out pairs", 1),
                mark("chance", Style::Theory, chance),
            ],
            equal: false,
        }
    };
    let chance = 5.0 / pairs as f64;
    let found = ways.map(|(way, _)| number(&last[format!("recall_test_{way}_at_5")]));
    let recall = &outcome.report.values["recall"];
    let row = |(way, title): (&str, &str)| {
        let at = |k: usize| percent(number(&recall[format!("{way}_at_{k}")]));
        vec![title.into(), at(1), at(5)]
    };
    let test = split.test.len();
    let chances = vec!["chance".into(), percent(1.0 / test as f64), percent(5.0 / test as f64)];
    Ok(Figure {
        name: "fig14".into(),
        title: "Recall over training".into(),
        see: "Both ways, the right one comes first, or among the first five, far more often than by chance, for pairs \
              never trained on too."
            .into(),
        panels: [1, 5].into_iter().flat_map(|k| ways.map(|way| panel(way, k))).collect(),
        columns: 2,
        tables: vec![table(
            &format!("all {test} held-out pairs after training"),
            &["", "R@1", "R@5"],
            ways.into_iter().map(row).chain([chances]).collect(),
        )],
        criteria: vec![Criterion {
            claim: format!(
                "after training, R@5 among {pairs} held-out pairs is at least {ABOVE_CHANCE} times chance, both ways"
            ),
            found: format!("{} and {}; chance {}", percent(found[0]), percent(found[1]), percent(chance)),
            passed: found.iter().all(|&found| found >= ABOVE_CHANCE * chance),
        }],
    })
}

/// The lines of `metrics.jsonl` that end an epoch.
fn epochs(path: &Path) -> Result<Vec<Value>, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| DataError::Io { path: path.into(), source })?;
    let lines: Result<Vec<Value>, _> = text.lines().map(serde_json::from_str).collect();
    let mut lines = lines.map_err(|e| DataError::Format {
        path: path.into(),
        found: e.to_string(),
        expected: "an object a line".into(),
    })?;
    lines.retain(|line| line.get("recall_test_u_to_v_at_1").is_some());
    Ok(lines)
}

/// Figure 15: drifters never trained on, their flows, and the flows found for them.
fn retrieved(model: &Model, test: &dyn Source, ocean: &Ocean) -> Result<Figure, Error> {
    let n = test.len();
    let k = 5.min(n);
    let embed = |side| model.embed_in_memory(&Cpu::new(), side, &SideOf(test, side));
    let [u, v] = [embed(Side::U)?, embed(Side::V)?];
    let [u, v] = [&u, &v].map(|data| Table { data, dim: model.config.dim });
    let best = top_k(model.tilting(), &v, &u, k)?.indices;
    let best = |i: usize| &best[i * k..][..k];
    let place = |i: usize| best(i).iter().position(|&j| j == i);

    let path = |i: usize| {
        let mut v = vec![0f32; test.dim(Side::V)];
        test.gather(Side::V, &[i], &mut v);
        let positions = v.chunks_exact(2).map(|x| [f64::from(x[0]), f64::from(x[1])]);
        from_start(positions.collect())
    };
    let flow = |i: usize| {
        let mut u = [0f32; COEFFICIENTS];
        test.gather(Side::U, &[i], &mut u);
        Flow::new(&u, &ocean.frequencies)
    };
    // A hit, a near miss and a miss, the first of each.
    let kinds: [(&str, &dyn Fn(usize) -> bool); 3] = [
        ("found first", &|i| place(i) == Some(0)),
        ("found second or third", &|i| matches!(place(i), Some(1 | 2))),
        ("not among the best five", &|i| place(i).is_none()),
    ];
    let mut panels = Vec::new();
    for (kind, is) in kinds {
        let Some(i) = (0..n).find(|&i| is(i)) else { continue };
        let drifter = ("the drifter asked about", DRIFTER, path(i));
        panels.push(torus(
            format!("drifter {i} in its flow, {kind}"),
            &flow(i),
            Style::Truth,
            std::slice::from_ref(&drifter),
        ));
        for (place, &j) in best(i).iter().take(3).enumerate() {
            let own = if j == i { ", its own" } else { "" };
            let paths = [drifter.clone(), ("the drifter of the flow found", FOUND[1], path(j))];
            panels.push(torus(format!("flow found, number {}{own}", place + 1), &flow(j), FOUND[0], &paths));
        }
    }

    // On the path of drifter i, the correlation of its flow's velocity with that of flow j.
    let likeness = |i: usize, j: usize| {
        let (path, flows) = (path(i), [flow(i), flow(j)]);
        let mut sums = [0.0; 3];
        for (p, x) in path.iter().enumerate() {
            let t = HORIZON * p as f64 / (path.len() - 1) as f64;
            let [a, b] = [0, 1].map(|k| flows[k].velocity(*x, t));
            for (sum, [a, b]) in sums.iter_mut().zip([[a, b], [a, a], [b, b]]) {
                *sum += a[0] * b[0] + a[1] * b[1];
            }
        }
        sums[0] / (sums[1] * sums[2]).sqrt()
    };
    let wrong: Vec<usize> = (0..n).filter(|&i| best(i)[0] != i).collect();
    let found = median(wrong.par_iter().map(|&i| likeness(i, best(i)[0])).collect());
    let any = median((0..n).into_par_iter().map(|i| likeness(i, (i + 1) % n)).collect());
    let share = (0..n).filter(|&i| place(i).is_some()).count() as f64 / n as f64;
    let chance = k as f64 / n as f64;
    Ok(Figure {
        name: "fig15".into(),
        title: "Flows found for drifters".into(),
        see: "Left, drifters never trained on in the flows that carried them; beside each, the three flows found for \
              it. A wrong flow is much like the true one where the drifter has been."
            .into(),
        panels,
        columns: 1 + k.min(3),
        tables: Vec::new(),
        criteria: vec![
            Criterion {
                claim: format!(
                    "the true flow is among the best five of {n} for at least {ABOVE_CHANCE} times as many drifters as \
                     by chance"
                ),
                found: format!("{:.2}% of {n}; chance {:.2}%", 100.0 * share, 100.0 * chance),
                passed: share >= ABOVE_CHANCE * chance,
            },
            Criterion {
                claim: "where the flow found first is a wrong one, its velocity on the drifter's path has a \
                        correlation of at least 0.5 with the true one (median)"
                    .into(),
                found: format!("{found:.3} for {} drifters; {any:.3} for any other flow", wrong.len()),
                passed: wrong.is_empty() || found >= 0.5,
            },
        ],
    })
}

/// The middle one; 0 of none.
fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x.get(x.len() / 2).copied().unwrap_or(0.0)
}

/// A trajectory with its start, which is not recorded.
fn from_start(path: Vec<[f64; 2]>) -> Vec<[f64; 2]> {
    [vec![START], path].concat()
}

/// A flow on the unit torus at half time, and trajectories on it.
fn torus(title: String, flow: &Flow, field: Style, paths: &[(&str, Style, Vec<[f64; 2]>)]) -> Panel {
    const CELLS: usize = 48;
    const APART: f64 = 0.4;
    let grid: Vec<f64> = (0..=CELLS).map(|i| i as f64 / CELLS as f64).collect();
    let values: Vec<f64> =
        grid.iter().flat_map(|&y| grid.iter().map(move |&x| flow.stream([x, y], HORIZON / 2.0))).collect();
    let [low, high] = [f64::min, f64::max].map(|of| values.iter().copied().reduce(of).expect("points") / APART);
    let levels = (low.ceil() as i64..=high.floor() as i64).map(|level| level as f64 * APART).collect();
    let shape = Shape::Contours { x: grid.clone(), y: grid, values, levels };
    let label = if field == Style::Truth { "stream function" } else { "stream function of the flow found" };
    let mut marks = vec![mark(label, field, shape)];
    for (label, style, path) in paths {
        let pieces = wrapped(path).into_iter();
        marks.extend(pieces.map(|piece| mark(*label, *style, Shape::Line(piece))));
    }
    marks.push(mark("start", DRIFTER, Shape::Points(vec![START])));
    let unit = |label| Axis { range: Some([0.0, 1.0]), ..axis(label) };
    Panel { title, x: unit("x1"), y: unit("x2"), marks, equal: true }
}

/// A line through the plane as lines through the unit square: cut where it crosses the border, each part moved in.
fn wrapped(path: &[[f64; 2]]) -> Vec<Vec<[f64; 2]>> {
    let mut pieces: Vec<Vec<[f64; 2]>> = Vec::new();
    let mut here = [f64::NAN; 2];
    for ends in path.windows(2) {
        let at = |t: f64| [0, 1].map(|i| ends[0][i] + t * (ends[1][i] - ends[0][i]));
        let mut cuts = vec![0.0, 1.0];
        for (a, b) in ends[0].into_iter().zip(ends[1]) {
            let borders = a.min(b).ceil() as i64..=a.max(b).floor() as i64;
            cuts.extend(borders.map(|border| (border as f64 - a) / (b - a)).filter(|t| *t > 0.0 && *t < 1.0));
        }
        cuts.sort_by(f64::total_cmp);
        cuts.dedup();
        for t in cuts.windows(2) {
            let cell = at((t[0] + t[1]) / 2.0).map(f64::floor);
            // Clamped: a cut lies on the border only to rounding.
            let inside = |t: f64| [0, 1].map(|i| (at(t)[i] - cell[i]).clamp(0.0, 1.0));
            if cell != here {
                pieces.push(vec![inside(t[0])]);
                here = cell;
            }
            pieces.last_mut().expect("the first cell is new").push(inside(t[1]));
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::EncoderSpec;

    #[test]
    fn lines_are_cut_at_the_border() {
        let pieces = wrapped(&[[0.75, 0.5], [0.75, 0.25], [1.25, -0.25], [1.5, -0.25], [1.5, -0.25]]);
        let expected =
            [vec![[0.75, 0.5], [0.75, 0.25], [1.0, 0.0]], vec![[0.0, 1.0], [0.25, 0.75], [0.5, 0.75], [0.5, 0.75]]];
        assert_eq!(pieces, expected);
        // Twice across in one step, and back.
        let pieces = wrapped(&[[0.5, 0.5], [2.5, 0.5], [1.5, 0.5]]);
        assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 3, 2]);
        assert_eq!(pieces[3], [[1.0, 0.5], [0.5, 0.5]]);
    }

    /// Every number of a mark.
    fn numbers(shape: &Shape) -> Vec<f64> {
        match shape {
            Shape::Line(points) | Shape::Points(points) => points.as_flattened().to_vec(),
            Shape::Contours { x, y, values, levels } => [&x[..], y, values, levels].concat(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_tiny_run_gives_the_figures_for_any_number_of_threads() {
        let flags = Partial {
            experiment: Some("ocean".into()),
            quick: Some(true),
            samples: Some(60),
            held_out: Some(0.5),
            epochs: Some(2),
            batch: Some(10),
            encoder_v: Some(EncoderSpec::Transformer {
                sequence: [10, 20],
                width: 8,
                heads: 2,
                depth: 1,
                causal: true,
            }),
            ..Partial::default()
        };
        let config = resolve(flags).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let draw = |name: &str| draw(&config, &dir.path().join(name), &mut |_| {}).unwrap();
        let figures = draw("run");
        assert_eq!(figures.iter().map(|f| &f.name[..]).collect::<Vec<_>>(), ["fig13", "fig14", "fig15"]);
        for figure in &figures {
            assert!(!figure.panels.is_empty() && figure.panels.len().is_multiple_of(figure.columns), "{}", figure.name);
            for mark in figure.panels.iter().flat_map(|panel| &panel.marks) {
                let numbers = numbers(&mark.shape);
                assert!(!numbers.is_empty() && numbers.iter().all(|x| x.is_finite()), "{}: {mark:?}", figure.name);
            }
        }
        for criterion in &figures[0].criteria {
            assert!(criterion.passed, "{criterion:?}");
        }
        // 4 panels of 3 lines; an epoch has a point.
        let Shape::Line(curve) = &figures[1].panels[3].marks[1].shape else { panic!("a line") };
        assert_eq!(curve.iter().map(|point| point[0]).collect::<Vec<_>>(), [1.0, 2.0]);
        assert_eq!(figures[1].tables[0].rows.len(), 3);

        let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(format!("{figures:?}"), format!("{:?}", single.install(|| draw("single"))));
        // A folder with a finished run is no hindrance.
        assert_eq!(format!("{figures:?}"), format!("{:?}", draw("run")));
    }
}
