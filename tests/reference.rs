//! The f64 reference against what does not depend on it: values worked out by hand, finite differences of its own
//! values, and the symmetries the losses have. Engines are then held to the reference, in `conformance.rs`.
#![allow(missing_docs)]

mod common;

use common::{Case, Data, OBJECTIVES, Positive, options, relative};
use contrastive::objective::reference::{self, Reference};
use contrastive::objective::{DataKernel, Moments, Objective, Pairs, Positives, Tilting};
use contrastive::{Batch, Loss, Matrix};

/// Exact to a few roundings of f64: what algebraically equal evaluations may differ by.
const SAME: f64 = 1e-11;

fn evaluate(case: &Case, data: &Data) -> Reference {
    reference::loss(&case.loss(), &data.batch(case)).unwrap()
}

/// Numbers of few bits: they can be moved, shifted and rotated below without any rounding in f32.
fn dyadic(case: &Case) -> Data {
    let mut data = case.data();
    for x in [&mut data.u, &mut data.v, &mut data.offset] {
        x.iter_mut().for_each(|x| *x = (*x * 1024.0).round() / 1024.0);
    }
    data
}

/// Every objective, tilting and option at one shape.
fn cases(n: usize, m: usize, d: usize) -> impl Iterator<Item = Case> {
    let pairs = OBJECTIVES.iter().flat_map(|&o| Tilting::ALL.iter().map(move |&t| (o, t)));
    pairs.flat_map(move |(objective, tilting)| options(Case::new(tilting, objective, n, m, d)))
}

/// `assert!` that two evaluations are one, gradients included.
fn assert_same(a: &Reference, b: &Reference, what: &str) {
    let close = |x: &[f64], y: &[f64], name| {
        let off = relative(x, y, 1e-2);
        assert!(off < SAME, "{name} is off by {off:e}: {what}");
    };
    close(&[a.loss], &[b.loss], "loss");
    close(&a.grad_u, &b.grad_u, "grad_u");
    close(&a.grad_v, &b.grad_v, "grad_v");
    close(&[a.grad_tau], &[b.grad_tau], "grad_tau");
    close(&[a.grad_bias], &[b.grad_bias], "grad_bias");
    close(&a.grad_offset_v, &b.grad_offset_v, "grad_offset_v");
}

/// The identity, behind which `u` holds the logits themselves (dot, tau = 1) and dL/du is G.
fn identity(m: usize) -> Vec<f32> {
    (0..m * m).map(|k| if k % (m + 1) == 0 { 1.0 } else { 0.0 }).collect()
}

fn of_logits(objective: Objective, smoothing: f64) -> Loss {
    Loss { tilting: Tilting::Dot, objective, tau: 1.0, smoothing }
}

/// A batch with these logits and nothing special.
fn plain<'a>(s: &'a [f32], eye: &'a [f32], m: usize) -> Batch<'a> {
    Batch { u: Matrix::f32(s, m), v: Matrix::f32(eye, m), pairs: Pairs::default(), offset_v: None, moments: None }
}

// Values, from the formulas of `Objective` by hand: differences alone would accept a wrong loss with its gradient.

#[test]
fn two_rows_by_hand() {
    let (s, eye) = ([1.0f32, 2.0, -1.0, 0.5, -0.5, 3.0], identity(3));
    // Row 0's positives are columns 0 and 1, row 1's is 2; (0, 2) and (1, 1) are out.
    let pairs = Pairs {
        positives: Positives::Groups { u: &[7, 8], v: &[7, 7, 8] },
        ignore: Some((&[1, 2], &[9, 2, 1])),
        weights_u: Some(&[1.0, 3.0]),
        weights_v: Some(&[2.0, 1.0, 1.0]),
    };
    let batch = Batch { pairs, offset_v: Some(&[0.25, -0.75, 0.5]), ..plain(&s, &eye, 3) };
    let value = |objective| reference::loss(&of_logits(objective, 0.2), &batch).unwrap().loss;
    let (a00, a01, a10, a12) = (1.25f64, 1.25f64, 0.75f64, 3.5f64);
    let lse = |x: &[f64]| x.iter().map(|x| x.exp()).sum::<f64>().ln();
    let pull_row = [(a00 + a01) / 2.0, 0.9 * a12 + 0.1 * a10];
    let by_row = 0.25 * (lse(&[a00, a01]) - pull_row[0]) + 0.75 * (lse(&[a10, a12]) - pull_row[1]) - 3f64.ln();
    // Columns 1 and 2 have one pair left each: their softmax is certain.
    let by_col = 0.5 * (lse(&[a00, a10]) - 0.9 * a00 - 0.1 * a10) - 2f64.ln();
    let want = 0.5 * (1.7 * by_row + 0.3 * by_col);
    let got = value(Objective::Conditional { lambda_u: 0.3, lambda_v: 1.7 });
    assert!((got - want).abs() < SAME, "conditional {got} {want}");

    let want = lse(&[a00, a01, a10, a12]) - 6f64.ln() - 0.25 * pull_row[0] - 0.75 * pull_row[1];
    let got = value(Objective::Joint);
    assert!((got - want).abs() < SAME, "joint {got} {want}");

    let term = |a: f64, t: f64| (1.0 + (a - 1.5).exp()).ln() - t * (a - 1.5);
    let want = 0.25 * (term(a00, 0.9) + term(a01, 0.9)) + 0.75 * (term(a10, 0.1) + term(a12, 0.9));
    let got = value(Objective::Sigmoid { bias: -1.5 });
    assert!((got - want).abs() < SAME, "sigmoid {got} {want}");
}

// A row without a positive is nothing to a softmax loss and all negatives to a sigmoid one, weighed like any other;
// a column without one is only a negative.
#[test]
fn lonely_rows_by_hand() {
    let (s, eye) = ([1.0f32, 2.0, -1.0, 0.5], identity(2));
    let pairs = Pairs {
        positives: Positives::Groups { u: &[5, 6], v: &[7, 5] },
        weights_u: Some(&[1.0, 3.0]),
        weights_v: Some(&[9.0, 1.0]),
        ..Pairs::default()
    };
    let batch = Batch { pairs, ..plain(&s, &eye, 2) };
    let value = |objective| reference::loss(&of_logits(objective, 0.0), &batch).unwrap().loss;
    let lse = |x: &[f64]| x.iter().map(|x| x.exp()).sum::<f64>().ln();
    let softplus = |x: f64| (1.0 + x.exp()).ln();
    let conditional = |lambda_u, lambda_v| value(Objective::Conditional { lambda_u, lambda_v });
    for (name, got, want) in [
        ("v|u", conditional(0.0, 2.0), lse(&[1.0, 2.0]) - 2.0 - 2f64.ln()),
        ("u|v", conditional(2.0, 0.0), lse(&[2.0, 0.5]) - 2.0 - 2f64.ln()),
        ("joint", value(Objective::Joint), lse(&[1.0, 2.0, -1.0, 0.5]) - 2.0 - 4f64.ln()),
        (
            "sigmoid",
            value(Objective::Sigmoid { bias: 0.0 }),
            0.25 * (softplus(1.0) + softplus(2.0) - 2.0) + 0.75 * (softplus(-1.0) + softplus(0.5)),
        ),
    ] {
        assert!((got - want).abs() < SAME, "{name} {got} {want}");
    }
}

#[test]
fn mmd_by_hand() {
    // One row, two columns: P = (p, 1 - p), p = sigmoid(s_0 - s_1), target column 0.
    let (s, eye) = ([0.7f32, -0.4], identity(2));
    let p = 1.0 / (1.0 + (-f64::from(s[0]) + f64::from(s[1])).exp());
    let (x, y) = ([3.0f32], [1.0f32, 0.0, -0.5, 2.0]);
    let data = (Matrix::f32(&x, 1), Matrix::f32(&y, 2));
    let value = |objective, moments| {
        let batch = Batch { moments: Some(moments), ..plain(&s, &eye, 2) };
        reference::loss(&of_logits(objective, 0.0), &batch).unwrap().loss
    };
    // L = 1/2 |p y_0 + (1 - p) y_1|^2 - <p y_0 + (1 - p) y_1, y_0>; the column softmaxes are all certain: K_u/2 - K_u.
    let mean = [p - 0.5 * (1.0 - p), 2.0 * (1.0 - p)];
    let by_row = 0.5 * (mean[0] * mean[0] + mean[1] * mean[1]) - mean[0];
    let want = 0.8 * (-9.0 / 2.0) + 1.3 * by_row;
    let mmd = Objective::Mmd { lambda_u: 0.8, lambda_v: 1.3 };
    let features = Moments::Features { u: data.0, v: data.1 };
    let linear = Moments::Gram { kernel: DataKernel::Linear, u: data.0, v: data.1 };
    for got in [value(mmd, features), value(mmd, linear)] {
        assert!((got - want).abs() < SAME, "mmd {got} {want}");
    }
    // W = (p, 1 - p): <W, K_u W K_v> = 9 |mean|^2, <T, K_u W K_v> = 9 <y_0, mean>.
    let want = 9.0 * (mean[0] * mean[0] + mean[1] * mean[1]) - 18.0 * mean[0];
    for got in [value(Objective::JointMmd, features), value(Objective::JointMmd, linear)] {
        assert!((got - want).abs() < SAME, "joint mmd {got} {want}");
    }
    // k(y_0, y_1) with width 1.3: |y_0 - y_1|^2 = 1.5^2 + 2^2.
    let k = (-6.25f64 / (2.0 * 1.3 * 1.3)).exp();
    let q = 1.0 - p;
    let want = 0.8 * -0.5 + 1.3 * (0.5 * (p * p + q * q + 2.0 * p * q * k) - p - q * k);
    let got = value(mmd, Moments::Gram { kernel: DataKernel::Gaussian { width: 1.3 }, u: data.0, v: data.1 });
    assert!((got - want).abs() < SAME, "gaussian mmd {got} {want}");
}

#[test]
fn shuffled_joint_by_hand() {
    let (s, eye) = ([0.3f32, -1.0, 2.0, 0.5, 0.25, -0.75, 1.5, -2.0, 1.0], identity(3));
    let objective = Objective::JointShuffled { pairings: 4, seed: 3 };
    let got = reference::loss(&of_logits(objective, 0.0), &plain(&s, &eye, 3)).unwrap().loss;
    let mut mean = 0.0;
    for k in 0..4 {
        let order = contrastive::objective::pairing(3, 3, k);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2], "a pairing is a permutation");
        mean += (0..3).map(|i| f64::from(s[i * 3 + order[i] as usize]).exp()).sum::<f64>() / 12.0;
    }
    let want = mean.ln() - (f64::from(s[0]) + f64::from(s[4]) + f64::from(s[8])) / 3.0;
    assert!((got - want).abs() < SAME, "{got} {want}");
}

#[test]
fn tiltings_by_hand() {
    // One row and two columns: (0, 2) gives ln(1 + e^(s_1 - s_0)) - ln 2.
    let (u, v) = ([3.0f32, 4.0], [6.0f32, 8.0, 0.0, -2.0]);
    let tau = 2.5f64;
    for (tilting, s) in [
        (Tilting::Cosine, [1.0 / tau, -0.8 / tau]),
        (Tilting::Dot, [50.0 / tau, -8.0 / tau]),
        (Tilting::L2, [-25.0 / (2.0 * tau), -45.0 / (2.0 * tau)]),
    ] {
        let loss = Loss { tilting, tau, ..of_logits(Objective::Conditional { lambda_u: 0.0, lambda_v: 2.0 }, 0.0) };
        let batch = Batch { u: Matrix::f32(&u, 2), v: Matrix::f32(&v, 2), ..plain(&u, &v, 2) };
        let got = reference::loss(&loss, &batch).unwrap().loss;
        let want = (s[1] - s[0]).exp().ln_1p() - 2f64.ln();
        assert!((got - want).abs() < SAME, "{tilting:?} {got} {want}");
    }
}

// Gradients.

/// The derivative by a stencil of fourth order: `f` at `-2h, -h, h, 2h`.
fn derivative(h: f64, mut f: impl FnMut(f64) -> f64) -> f64 {
    (8.0 * (f(h) - f(-h)) - (f(2.0 * h) - f(-2.0 * h))) / (12.0 * h)
}

/// Derivatives in each of the numbers that `part` picks from the data.
fn derivatives(case: &Case, part: fn(&mut Data) -> &mut Vec<f32>) -> Vec<f64> {
    // Exact in f32 beside dyadic numbers; the stencil's own error is then near 1e-8, f64's near 1e-11.
    const H: f64 = 1.0 / 8192.0;
    let mut data = dyadic(case);
    (0..part(&mut data).len())
        .map(|k| {
            derivative(H, |h| {
                part(&mut data)[k] += h as f32;
                let loss = evaluate(case, &data).loss;
                part(&mut data)[k] -= h as f32;
                loss
            })
        })
        .collect()
}

// Any slip in any gradient (a sign, a factor, a forgotten offset, weight or ignored pair) is off by far more than 1e-6.
#[test]
fn gradients_are_derivatives() {
    let mut count = 0;
    for (n, m, d) in [(1, 1, 2), (3, 2, 1), (5, 5, 3), (4, 7, 3), (6, 4, 2)] {
        for case in cases(n, m, d) {
            let got = evaluate(&case, &dyadic(&case));
            let close = |got: &[f64], want: &[f64], name| {
                let off = relative(got, want, 1e-2);
                assert!(off < 1e-6, "{name} is off by {off:e}: {case:?}");
            };
            close(&got.grad_u, &derivatives(&case, |data| &mut data.u), "grad_u");
            close(&got.grad_v, &derivatives(&case, |data| &mut data.v), "grad_v");
            if case.offset {
                close(&got.grad_offset_v, &derivatives(&case, |data| &mut data.offset), "grad_offset_v");
            }
            let in_tau =
                derivative(case.tau / 4096.0, |h| evaluate(&Case { tau: case.tau + h, ..case }, &dyadic(&case)).loss);
            close(&[got.grad_tau * case.tau], &[in_tau * case.tau], "grad_tau");
            let in_bias = match case.objective {
                Objective::Sigmoid { bias } => derivative(1.0 / 1024.0, |h| {
                    let objective = Objective::Sigmoid { bias: bias + h };
                    evaluate(&Case { objective, ..case }, &dyadic(&case)).loss
                }),
                _ => 0.0,
            };
            close(&[got.grad_bias], &[in_bias], "grad_bias");
            count += 1;
        }
    }
    assert!(count > 900, "{count} cases");
}

#[test]
fn a_zero_row_is_a_zero_embedding_without_gradient() {
    for case in cases(5, 5, 3).filter(|case| case.tilting == Tilting::Cosine) {
        let mut data = dyadic(&case);
        data.u[3..6].fill(0.0);
        data.v[12..15].fill(0.0);
        let zero = evaluate(&case, &data);
        assert!(zero.loss.is_finite() && zero.grad_u.iter().chain(&zero.grad_v).all(|g| g.is_finite()));
        assert_eq!((&zero.grad_u[3..6], &zero.grad_v[12..15]), (&[0.0; 3][..], &[0.0; 3][..]), "{case:?}");
        // Its logits are 0: the same losses as of dot on unit rows with that row zero.
        let mut unit = dyadic(&case);
        for (to, from) in [(&mut unit.u, &data.u), (&mut unit.v, &data.v)] {
            for (to, from) in to.chunks_mut(3).zip(from.chunks(3)) {
                let norm = from.iter().map(|x| x * x).sum::<f32>().sqrt();
                to.iter_mut().zip(from).for_each(|(t, f)| *t = if norm == 0.0 { 0.0 } else { f / norm });
            }
        }
        let dot = evaluate(&Case { tilting: Tilting::Dot, ..case }, &unit);
        // `unit` is rounded to f32.
        assert!((dot.loss - zero.loss).abs() < 1e-5 * (1.0 + zero.loss.abs()), "{case:?}");
    }
}

// Symmetries.

/// Where an objective's softmaxes live, G sums to zero; columns' sums are dL/d offset.
#[test]
fn g_sums_to_zero_over_every_softmax() {
    let eye = identity(7);
    for case in cases(5, 7, 7).filter(|case| case.tilting == Tilting::Dot) {
        let data = case.data();
        let batch = Batch { v: Matrix::f32(&eye, 7), ..data.batch(&case) };
        let got = reference::loss(&Loss { tau: 1.0, ..case.loss() }, &batch).unwrap();
        let size = got.grad_u.iter().map(|g| g.abs()).fold(0.0, f64::max);
        assert!(size > 1e-3, "{case:?}");
        let rows: Vec<f64> = got.grad_u.chunks(7).map(|g| g.iter().sum()).collect();
        let (in_rows, in_cols) = match case.objective {
            Objective::Conditional { lambda_u, lambda_v } => (lambda_u == 0.0, lambda_v == 0.0),
            _ => (false, false),
        };
        assert!(!in_rows || rows.iter().all(|g| g.abs() < SAME), "rows of {case:?}: {rows:?}");
        assert!(!in_cols || got.grad_offset_v.iter().all(|g| g.abs() < SAME), "columns of {case:?}");
        if !matches!(case.objective, Objective::Sigmoid { .. }) {
            assert!(rows.iter().sum::<f64>().abs() < SAME, "all of {case:?}");
        }
    }
}

#[test]
fn shifts_change_nothing() {
    for case in cases(5, 5, 3).chain(cases(4, 6, 3)) {
        let data = dyadic(&case);
        let still = evaluate(&case, &data);
        let shift = |x: &mut Vec<f32>| {
            x.chunks_mut(3).for_each(|x| x.iter_mut().zip([8.0, -3.0, 0.5]).for_each(|(x, s)| *x += s))
        };
        if case.tilting == Tilting::L2 {
            let mut moved = dyadic(&case);
            shift(&mut moved.u);
            shift(&mut moved.v);
            assert_same(&evaluate(&case, &moved), &still, &format!("l2, a common shift: {case:?}"));
        }
        // Under dot, v + a adds <u_i, a> to all of row i; u + a adds <a, v_j> to all of column j.
        if let (Tilting::Dot, Objective::Conditional { lambda_u, lambda_v }) = (case.tilting, case.objective) {
            let mut moved = dyadic(&case);
            match (lambda_u, lambda_v) {
                (0.0, _) => shift(&mut moved.v),
                (_, 0.0) => shift(&mut moved.u),
                _ => {}
            }
            let moved = evaluate(&case, &moved).loss;
            assert!((moved - still.loss).abs() < SAME, "dot, a shift of one side: {case:?}");
        }
        if case.offset {
            let mut moved = dyadic(&case);
            moved.offset.iter_mut().for_each(|o| *o += 2.0);
            let objective = match case.objective {
                Objective::Sigmoid { bias } => Objective::Sigmoid { bias: bias - 2.0 },
                other => other,
            };
            assert_same(&evaluate(&Case { objective, ..case }, &moved), &still, &format!("all offsets: {case:?}"));
        }
    }
}

/// Rows `order` of `x`.
fn reorder<T: Copy>(x: &[T], dim: usize, order: &[usize]) -> Vec<T> {
    order.iter().flat_map(|&i| x[i * dim..(i + 1) * dim].to_vec()).collect()
}

// The shuffled estimator is left out: its pairings are drawn by position.
#[test]
fn the_order_of_rows_and_columns_means_nothing() {
    let shapes = cases(5, 5, 3).chain(cases(4, 6, 3)).chain(cases(6, 4, 2));
    for case in shapes.filter(|case| !matches!(case.objective, Objective::JointShuffled { .. })) {
        let (n, m, d) = (case.n, case.m, case.d);
        let rows = contrastive::objective::pairing(n, 17, 0);
        let cols = contrastive::objective::pairing(m, 17, 1);
        let (data, mut moved) = (case.data(), case.data());
        // The diagonal's positives are those of groups numbered in order.
        let mut moved_case = case;
        if case.positive == Positive::Diagonal {
            moved_case.positive = Positive::Groups;
            moved.group_u = (0..n as i64).collect();
            moved.group_v = (0..m as i64).collect();
        }
        let place = |j: u32| cols.iter().position(|&c| c == j as usize).unwrap() as u32;
        moved.u = reorder(&data.u, d, &rows);
        moved.x = reorder(&data.x, 3, &rows);
        moved.feature_u = reorder(&data.feature_u, 12, &rows);
        moved.weights_u = reorder(&data.weights_u, 1, &rows);
        moved.group_u = reorder(&moved.group_u, 1, &rows);
        moved.ignore.0 = reorder(&data.ignore.0, 1, &rows);
        moved.index = reorder(&data.index, 1, &rows).into_iter().map(place).collect();
        moved.v = reorder(&data.v, d, &cols);
        moved.y = reorder(&data.y, 2, &cols);
        moved.feature_v = reorder(&data.feature_v, 8, &cols);
        moved.weights_v = reorder(&data.weights_v, 1, &cols);
        moved.group_v = reorder(&moved.group_v, 1, &cols);
        moved.ignore.1 = reorder(&data.ignore.1, 1, &cols);
        moved.offset = reorder(&data.offset, 1, &cols);
        let mut still = evaluate(&case, &data);
        still.grad_u = reorder(&still.grad_u, d, &rows);
        still.grad_v = reorder(&still.grad_v, d, &cols);
        still.grad_offset_v = reorder(&still.grad_offset_v, 1, &cols);
        assert_same(&evaluate(&moved_case, &moved), &still, &format!("{case:?}"));
    }
}

#[test]
fn rotations_change_nothing_but_the_gradients_direction() {
    // Half the Hadamard matrix of order 4: orthogonal, and exact on dyadic numbers.
    let rotate = |x: &[f64]| -> Vec<f64> {
        let row = |x: &[f64]| -> Vec<f64> {
            let sign = |a: usize, b: usize| if (a & b).count_ones() % 2 == 1 { -0.5 } else { 0.5 };
            (0..4).map(|a| (0..4).map(|b| sign(a, b) * x[b]).sum()).collect()
        };
        x.chunks(4).flat_map(row).collect()
    };
    for case in cases(5, 5, 4).chain(cases(4, 6, 4)) {
        let mut data = dyadic(&case);
        let mut still = evaluate(&case, &data);
        still.grad_u = rotate(&still.grad_u);
        still.grad_v = rotate(&still.grad_v);
        for x in [&mut data.u, &mut data.v] {
            *x = rotate(&common::wide(x)).iter().map(|&x| x as f32).collect();
        }
        assert_same(&evaluate(&case, &data), &still, &format!("{case:?}"));
    }
}

#[test]
fn exchanging_the_sides_exchanges_the_lambdas() {
    for case in cases(5, 5, 3).chain(cases(4, 6, 3)) {
        let swapped = match case.objective {
            Objective::Conditional { lambda_u, lambda_v } => {
                Objective::Conditional { lambda_u: lambda_v, lambda_v: lambda_u }
            }
            Objective::Mmd { lambda_u, lambda_v } => Objective::Mmd { lambda_u: lambda_v, lambda_v: lambda_u },
            _ => continue,
        };
        // An index and an offset have no mirror image.
        if case.offset || case.positive == Positive::Index {
            continue;
        }
        let data = case.data();
        let batch = data.batch(&case);
        let Pairs { positives, ignore, weights_u, weights_v } = batch.pairs;
        let mirrored = Batch {
            u: batch.v,
            v: batch.u,
            pairs: Pairs {
                positives: match positives {
                    Positives::Groups { u, v } => Positives::Groups { u: v, v: u },
                    other => other,
                },
                ignore: ignore.map(|(u, v)| (v, u)),
                weights_u: weights_v,
                weights_v: weights_u,
            },
            offset_v: None,
            moments: batch.moments.map(|moments| match moments {
                Moments::Features { u, v } => Moments::Features { u: v, v: u },
                Moments::Gram { kernel, u, v } => Moments::Gram { kernel, u: v, v: u },
            }),
        };
        let mut one = evaluate(&case, &data);
        let other = reference::loss(&Loss { objective: swapped, ..case.loss() }, &mirrored).unwrap();
        std::mem::swap(&mut one.grad_u, &mut one.grad_v);
        one.grad_offset_v = other.grad_offset_v.clone();
        assert_same(&other, &one, &format!("{case:?}"));
    }
}

#[test]
fn an_index_is_a_group_for_every_column() {
    for case in cases(5, 5, 3).chain(cases(4, 6, 3)).filter(|case| case.positive == Positive::Index) {
        let mut data = case.data();
        data.group_u = data.index.iter().map(|&j| i64::from(j)).collect();
        data.group_v = (0..case.m as i64).collect();
        let groups = evaluate(&Case { positive: Positive::Groups, ..case }, &data);
        assert_same(&groups, &evaluate(&case, &data), &format!("{case:?}"));
    }
}

// Columns that everyone ignores are as good as not there, but for the count of columns in the density: log M.
#[test]
fn ignored_columns_are_gone() {
    let (n, m, kept) = (4, 7, 5);
    for case in cases(n, m, 3).filter(|case| !case.ignore && case.positive != Positive::Groups) {
        let mut data = case.data();
        data.index.iter_mut().for_each(|j| *j %= kept as u32);
        data.ignore = (vec![9; n], (0..m).map(|j| if j < kept { j as i64 - 7 } else { 9 }).collect());
        let ignoring = evaluate(&Case { ignore: true, ..case }, &data);
        let (head, tail) = ignoring.grad_v.split_at(kept * 3);
        assert!(tail.iter().all(|&g| g == 0.0), "{case:?}");
        let batch = data.batch(&case);
        let cut = |moments| match moments {
            Moments::Features { u, v } => Moments::Features { u, v: v.slice(0..kept) },
            Moments::Gram { kernel, u, v } => Moments::Gram { kernel, u, v: v.slice(0..kept) },
        };
        let fewer = Batch {
            v: batch.v.slice(0..kept),
            pairs: Pairs { weights_v: batch.pairs.weights_v.map(|w| &w[..kept]), ..batch.pairs },
            offset_v: batch.offset_v.map(|o| &o[..kept]),
            moments: batch.moments.map(cut),
            ..batch
        };
        let alone = reference::loss(&case.loss(), &fewer).unwrap();
        let logs = (m as f64 / kept as f64).ln();
        let difference = match case.objective {
            Objective::Conditional { lambda_v, .. } => 0.5 * lambda_v * logs,
            Objective::Joint => logs,
            _ => 0.0,
        };
        let ignoring = Reference {
            loss: ignoring.loss + difference,
            grad_v: head.to_vec(),
            grad_offset_v: ignoring.grad_offset_v[..kept].to_vec(),
            ..ignoring
        };
        assert_same(&ignoring, &alone, &format!("{case:?}"));
    }
}

// Theorem 3.10: the joint loss bounds the conditional one from above when lambda_u + lambda_v = 2.
#[test]
fn the_joint_loss_bounds_the_conditional_loss() {
    for &tilting in Tilting::ALL {
        for seed in 0..200 {
            let n = 1 + seed as usize % 9;
            let case = Case { seed, tau: 0.3, ..Case::new(tilting, Objective::Joint, n, n, 3) };
            let data = case.data();
            let joint = evaluate(&case, &data).loss;
            for lambda_u in [0.0, 0.4, 1.0, 2.0] {
                let objective = Objective::Conditional { lambda_u, lambda_v: 2.0 - lambda_u };
                let conditional = evaluate(&Case { objective, ..case }, &data).loss;
                assert!(conditional <= joint + SAME, "{conditional} > {joint}: {case:?}");
            }
        }
    }
}

// Averaging over ever more pairings, the sampled normaliser is the joint loss's own.
#[test]
fn the_shuffled_estimator_approaches_the_joint_loss() {
    let case = Case::new(Tilting::L2, Objective::Joint, 12, 12, 3);
    let data = case.data();
    let joint = evaluate(&case, &data).loss;
    let off = |pairings| {
        let objective = Objective::JointShuffled { pairings, seed: 5 };
        (evaluate(&Case { objective, ..case }, &data).loss - joint).abs()
    };
    assert!(off(4000) < 0.02 && off(4000) < off(1), "{} {}", off(4000), off(1));
}

// `fine_tune` (34): frozen embeddings against a matrix of class embeddings and a bias a class is the one-sided (0, 2)
// loss with positives by index, and is the cross entropy less log K. Written out here with its gradients; (35) prints
// argmin and drops 1/tau: the class of largest logit is the one this loss raises.
#[test]
fn fine_tune_is_the_cross_entropy_less_log_k() {
    use contrastive::objective::{Batch, Gradients, Loss, Matrix, Objective, Pairs, Positives, Tilting, Write};
    use contrastive::{Cpu, Engine};
    let (n, classes, d, tau) = (53usize, 7usize, 4usize, 0.6f64);
    let wave = |k: usize, f: f64| ((k as f64 * f).sin() * 1.3) as f32;
    let g: Vec<f32> = (0..n * d).map(|k| wave(k, 1.7)).collect();
    let weights: Vec<f32> = (0..classes * d).map(|k| wave(k, 2.9)).collect();
    let bias: Vec<f32> = (0..classes).map(|k| wave(k, 5.3)).collect();
    let labels: Vec<u32> = (0..n).map(|i| ((i * i + 3 * i) % classes) as u32).collect();
    let (mut value, mut d_bias, mut d_weights) = (0.0, vec![0.0; classes], vec![0.0; classes * d]);
    for i in 0..n {
        let logit = |k: usize| {
            let dot: f64 = (0..d).map(|l| f64::from(g[i * d + l]) * f64::from(weights[k * d + l])).sum();
            dot / tau + f64::from(bias[k])
        };
        let total: f64 = (0..classes).map(|k| logit(k).exp()).sum();
        value += (total.ln() - logit(labels[i] as usize) - (classes as f64).ln()) / n as f64;
        for k in 0..classes {
            let slope = (logit(k).exp() / total - f64::from(u8::from(labels[i] as usize == k))) / n as f64;
            d_bias[k] += slope;
            (0..d).for_each(|l| d_weights[k * d + l] += slope * f64::from(g[i * d + l]) / tau);
        }
    }
    let loss = Loss {
        tilting: Tilting::Dot,
        objective: Objective::Conditional { lambda_u: 0.0, lambda_v: 2.0 },
        tau,
        smoothing: 0.0,
    };
    let batch = Batch {
        u: Matrix::f32(&g, d),
        v: Matrix::f32(&weights, d),
        pairs: Pairs { positives: Positives::Index(&labels), ..Pairs::default() },
        offset_v: Some(&bias),
        moments: None,
    };
    let (mut got_weights, mut got_bias) = (vec![f32::NAN; classes * d], vec![f32::NAN; classes]);
    let gradients =
        Gradients { u: None, v: Some(Write::Set(&mut got_weights)), offset_v: Some(Write::Set(&mut got_bias)) };
    let got = Cpu::new().loss(&loss, &batch, gradients).unwrap();
    let want = contrastive::objective::reference::loss(&loss, &batch).unwrap();
    assert!((got.loss - value).abs() < 1e-6 && (want.loss - value).abs() < 1e-12);
    let near = |got: &[f32], want: &[f64]| got.iter().zip(want).all(|(&g, w)| (f64::from(g) - w).abs() < 1e-6);
    assert!(near(&got_weights, &d_weights) && near(&got_bias, &d_bias));
}
