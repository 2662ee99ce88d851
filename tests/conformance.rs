//! Every engine against the f64 reference: one set of properties, one line an engine.
#![allow(missing_docs)]

mod common;

use common::{Case, Data, Half, Moment, OBJECTIVES, Positive, options, relative, wide};
use contrastive::device::cpu::Isa;
use contrastive::objective::{
    DataKernel, Gradients, Moments, Objective, Pairs, Positives, Storage, Tilting, Value, Write, reference,
};
use contrastive::{Batch, Cpu, Engine, Loss, Matrix};
use rand::{SeedableRng, distr::Distribution};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

const SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (1, 1, 7),
    (2, 3, 5),
    (17, 17, 3),
    (31, 57, 19),
    (64, 64, 16),
    (101, 101, 33),
    (130, 67, 128),
    (257, 300, 64),
    (300, 300, 10),
    (40, 700, 20),
    (700, 40, 20),
];

struct Got {
    value: Value,
    u: Vec<f32>,
    v: Vec<f32>,
    offset: Vec<f32>,
}

/// Evaluates over poisoned outputs; none of the poison may be left, nor anything else that is not finite.
fn evaluate(engine: &mut impl Engine, loss: &Loss, batch: &Batch<'_>) -> Got {
    let (n, m, d) = (batch.u.rows, batch.v.rows, batch.u.dim);
    let mut got =
        Got { value: Value::default(), u: vec![f32::NAN; n * d], v: vec![f32::NAN; m * d], offset: vec![f32::NAN; m] };
    let gradients = Gradients {
        u: Some(Write::Set(&mut got.u)),
        v: Some(Write::Set(&mut got.v)),
        offset_v: Some(Write::Set(&mut got.offset)),
    };
    got.value = engine.loss(loss, batch, gradients).unwrap();
    let finite = |x: &[f32]| x.iter().all(|x| x.is_finite());
    let Value { loss: value, grad_tau, grad_bias } = got.value;
    for (name, finite) in [
        ("grad_u", finite(&got.u)),
        ("grad_v", finite(&got.v)),
        ("grad_offset_v", finite(&got.offset)),
        ("value", [value, grad_tau, grad_bias].iter().all(|x| x.is_finite())),
    ] {
        assert!(finite, "{name} is not finite or not written, [{n}, {d}] x [{m}, {d}], {:?}: {loss:?}", got.value);
    }
    got
}

/// The size gradients have when nothing cancels: G near 1/N an entry, times what the tilting multiplies it with.
fn natural_size(case: &Case, data: &Data) -> [f64; 2] {
    let norms = |x: &[f32]| -> Vec<f64> {
        x.chunks(case.d).map(|x| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()).collect()
    };
    let rms = |x: &[f64]| (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64).sqrt();
    // Short rows have the largest gradients under cosine; zero rows have none.
    let inverse = |x: &[f64]| rms(&x.iter().map(|&x| if x == 0.0 { 0.0 } else { 1.0 / x }).collect::<Vec<_>>());
    let (u, v) = (norms(&data.u), norms(&data.v));
    let [row_u, row_v] = match case.tilting {
        Tilting::Cosine => [inverse(&u), inverse(&v)],
        Tilting::Dot => [rms(&v), rms(&u)],
        Tilting::L2 => [rms(&u) + rms(&v); 2],
    };
    [row_u / case.tau / (case.n as f64).sqrt(), row_v / case.tau / (case.m as f64).sqrt()]
}

/// Largest error of any output. Sums that cancel (a gradient that happens to be near zero) are held to a
/// twentieth of what they have without cancellation, as any f32 arithmetic would be.
fn error(got: &Got, want: &reference::Reference, case: &Case, data: &Data) -> f64 {
    error_of_embeddings(got, want, case, data).max(error_of_sums(got, want, case))
}

fn error_of_embeddings(got: &Got, want: &reference::Reference, case: &Case, data: &Data) -> f64 {
    let [size_u, size_v] = natural_size(case, data);
    let by_u = relative(&wide(&got.u), &want.grad_u, 0.05 * size_u);
    by_u.max(relative(&wide(&got.v), &want.grad_v, 0.05 * size_v))
}

fn error_of_sums(got: &Got, want: &reference::Reference, case: &Case) -> f64 {
    let tau = case.tau;
    let mut worst = relative(&[got.value.loss], &[want.loss], 0.1);
    worst = worst.max(relative(&[tau * got.value.grad_tau], &[tau * want.grad_tau], 0.1));
    worst = worst.max(relative(&[got.value.grad_bias], &[want.grad_bias], 0.1));
    worst.max(relative(&wide(&got.offset), &want.grad_offset_v, 0.1))
}

fn matches_the_reference<E: Engine>(make: impl Fn() -> E) {
    // One engine for all: its scratch then holds other shapes' leftovers, which must not show.
    let mut engine = make();
    let mut worst = (0.0, None);
    let mut count = 0;
    for &objective in OBJECTIVES {
        for &tilting in Tilting::ALL {
            for &(n, m, d) in SHAPES {
                for (k, case) in options(Case::new(tilting, objective, n, m, d)).into_iter().enumerate() {
                    // At large shapes, where the reference is slow (O(N^3) for MMD), options come together or not at all.
                    let mmd = case.moment != Moment::None;
                    if n > 150
                        && !(case.weights && matches!(case.moment, Moment::None | Moment::Features) || k == 0 && !mmd)
                    {
                        continue;
                    }
                    let data = case.data();
                    let (loss, batch) = (case.loss(), data.batch(&case));
                    let want = reference::loss(&loss, &batch).unwrap();
                    let got = evaluate(&mut engine, &loss, &batch);
                    let off = error(&got, &want, &case, &data);
                    assert!(off < 1e-5, "{off:e}: {case:?}");
                    if off > worst.0 {
                        worst = (off, Some(case));
                    }
                    count += 1;
                }
            }
        }
    }
    println!("{count} cases, largest error {:.1e} at {:?}", worst.0, worst.1);
}

// The engine sees 16-bit storage and so does the reference: what is left is f32 accumulation, but for gradients where G
// is rounded to bf16, and for what sums logits that were kept in 16 bits.
fn half_storage_loses_nothing_more<E: Engine>(make: impl Fn() -> E, of_pairs: bool) {
    let mut engine = make();
    let mut worst = 0f64;
    for &objective in OBJECTIVES {
        for &tilting in Tilting::ALL {
            for (n, m, d) in [(61, 61, 40), (31, 57, 19), (1, 9, 5), (200, 261, 64), (196, 195, 300)] {
                for case in options(Case::new(tilting, objective, n, m, d)) {
                    // As in `matches_the_reference`.
                    if n > 150 && !(case.weights && case.moment == Moment::None) {
                        continue;
                    }
                    let data = case.data();
                    let (u, v) = (Half::new(&data.u), Half::new(&data.v));
                    for bf16 in [true, false] {
                        let batch = Batch { u: u.matrix(bf16, d), v: v.matrix(bf16, d), ..data.batch(&case) };
                        let want = reference::loss(&case.loss(), &batch).unwrap();
                        let got = evaluate(&mut engine, &case.loss(), &batch);
                        let [off, sums] =
                            [error_of_embeddings(&got, &want, &case, &data), error_of_sums(&got, &want, &case)];
                        let rounded = of_pairs && bf16 && multiplies_pairs(&case);
                        let bounds = if rounded { [1e-2, 1e-3] } else { [1e-5; 2] };
                        assert!(off < bounds[0] && sums < bounds[1], "{off:e} {sums:e}: {case:?}");
                        worst = worst.max(off);
                    }
                }
            }
        }
    }
    // Nothing else would tell that pairs were multiplied at all.
    assert_eq!(worst > 1e-4, of_pairs, "{worst:e}");
    println!("largest error of a gradient {worst:.1e}");
}

/// Whether units that multiply pairs of bf16 have a part in this case.
fn multiplies_pairs(case: &Case) -> bool {
    let of_pairs =
        matches!(case.objective, Objective::Conditional { .. } | Objective::Joint | Objective::Sigmoid { .. });
    of_pairs && case.tilting != Tilting::L2
}

fn of_pairs(isa: Isa) -> bool {
    isa.name().ends_with("+bf16")
}

fn named(name: &str) -> Isa {
    Isa::available().into_iter().find(|isa| isa.name() == name).unwrap()
}

/// What f32 gives without tiles or tricks: every product, logit and G rounded to f32 and held in memory, between
/// them the reference's own softmaxes. An implementation that rounds its exponentials and sums too can only be worse.
fn naive_f32(case: &Case, data: &Data) -> Got {
    let Case { n, m, d, .. } = *case;
    let tau = case.tau as f32;
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let inverse = |x: &[f32]| -> Vec<f32> {
        let inverse = |x: &[f32]| if dot(x, x) == 0.0 { 0.0 } else { 1.0 / dot(x, x).sqrt() };
        x.chunks(d).map(|x| if case.tilting == Tilting::Cosine { inverse(x) } else { 1.0 }).collect()
    };
    let scaled = |x: &[f32], by: &[f32]| -> Vec<f32> {
        x.chunks(d).zip(by).flat_map(|(x, by)| x.iter().map(move |x| x * by)).collect()
    };
    let (inverse_u, inverse_v) = (inverse(&data.u), inverse(&data.v));
    let (u, v) = (scaled(&data.u, &inverse_u), scaled(&data.v, &inverse_v));
    let logit = |a: &[f32], b: &[f32]| match case.tilting {
        Tilting::L2 => -a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() / (2.0 * tau),
        _ => dot(a, b) / tau,
    };
    let s: Vec<f32> = u.chunks(d).flat_map(|u| v.chunks(d).map(move |v| logit(u, v))).collect();
    let with_offset = |(k, s): (usize, &f32)| if case.offset { s + data.offset[k % m] } else { *s };
    let offset: Vec<f32> = s.iter().enumerate().map(with_offset).collect();
    // Behind the identity, `u` is the logits and dL/du is G.
    let eye: Vec<f32> = (0..m * m).map(|k| if k % (m + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let batch = Batch { u: Matrix::f32(&offset, m), v: Matrix::f32(&eye, m), offset_v: None, ..data.batch(case) };
    let exact = reference::loss(&Loss { tilting: Tilting::Dot, tau: 1.0, ..case.loss() }, &batch).unwrap();
    let g: Vec<f32> = exact.grad_u.iter().map(|&g| g as f32).collect();
    let pull = |x: &[f32], y: &[f32], inverse: &[f32], g: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
        let row = |i: usize| {
            let x = &x[i * d..(i + 1) * d];
            let mut out = vec![0f32; d];
            for (j, y) in y.chunks(d).enumerate() {
                let from = |k: usize| if case.tilting == Tilting::L2 { y[k] - x[k] } else { y[k] };
                out.iter_mut().enumerate().for_each(|(k, o)| *o += g(i, j) * from(k));
            }
            let along = if case.tilting == Tilting::Cosine { dot(&out, x) } else { 0.0 };
            out.iter().zip(x).map(|(o, x)| (o - along * x) * inverse[i] / tau).collect::<Vec<f32>>()
        };
        (0..inverse.len()).flat_map(row).collect()
    };
    let sum = |x: &mut dyn Iterator<Item = f32>| x.map(f64::from).sum::<f64>();
    let bias = matches!(case.objective, Objective::Sigmoid { .. });
    Got {
        value: Value {
            loss: exact.loss,
            grad_tau: -sum(&mut g.iter().zip(&s).map(|(g, s)| g * s)) / case.tau,
            grad_bias: if bias { sum(&mut g.iter().copied()) } else { 0.0 },
        },
        u: pull(&u, &v, &inverse_u, &|i, j| g[i * m + j]),
        v: pull(&v, &u, &inverse_v, &|j, i| g[i * m + j]),
        offset: (0..m).map(|j| (0..n).map(|i| g[i * m + j]).sum()).collect(),
    }
}

/// Everything finite, and no output further from the reference than four times the naive f32 one, beside what
/// moderate logits are allowed: where logits of 1e4 leave few digits to anyone, the engine must not lose more.
fn survives_extremes<E: Engine>(make: impl Fn() -> E) {
    let mut engine = make();
    for &objective in OBJECTIVES {
        for &tilting in Tilting::ALL {
            for (scale, tau) in [(1.0, 1e-3), (60.0, 1.0), (1e-12, 1.0)] {
                for what in ["random", "identical rows", "zero rows", "zeros", "far from the origin", "a row ignored"] {
                    for case in options(Case { tau, ..Case::new(tilting, objective, 45, 45, 24) }) {
                        let mut data = case.data();
                        // Under dot that would be another scale.
                        if what == "far from the origin" && tilting == Tilting::Dot {
                            continue;
                        }
                        for x in [&mut data.u, &mut data.v] {
                            x.iter_mut().for_each(|x| *x *= scale);
                            match what {
                                "identical rows" => (1..45).for_each(|i| x.copy_within(0..24, i * 24)),
                                "zero rows" => x[5 * 24..9 * 24].fill(0.0),
                                "zeros" => x.fill(0.0),
                                "far from the origin" => x.iter_mut().for_each(|x| *x += 8.0 * scale),
                                _ => {}
                            }
                        }
                        if what == "a row ignored" {
                            // Whole, as no pair of its is a positive.
                            if !(case.ignore && case.positive == Positive::Groups) {
                                continue;
                            }
                            data.group_u[3] = -5;
                            data.ignore.0[3] = 9;
                            data.ignore.1.fill(9);
                        }
                        let what = format!("{what}, scale {scale}: {case:?}");
                        bounded_by_naive(&mut engine, &case, &data, data.batch(&case), 0.0, &what);
                    }
                }
            }
        }
    }
}

/// One pair far from all others takes no digits from them.
#[test]
fn distances_do_not_pay_for_a_row_far_away() {
    let (u, v) = ([0f32, 1.0, 3e8], [0.25f32, 1.5, 3e8]);
    let batch =
        Batch { u: Matrix::f32(&u, 1), v: Matrix::f32(&v, 1), pairs: Pairs::default(), offset_v: None, moments: None };
    for objective in [OBJECTIVES[0], OBJECTIVES[3], Objective::Joint] {
        let loss = Loss { tilting: Tilting::L2, objective, tau: 1.0, smoothing: 0.0 };
        let want = reference::loss(&loss, &batch).unwrap();
        for isa in Isa::available() {
            let got = evaluate(&mut Cpu::with_isa(isa), &loss, &batch);
            assert!((got.value.loss - want.loss).abs() < 1e-5, "{}: {}", isa.name(), got.value.loss);
            for (got, want) in got.u.iter().chain(&got.v).zip(want.grad_u.iter().chain(&want.grad_v)) {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{}: {got} for {want}", isa.name());
            }
        }
    }
}

/// A row whose length no f32 inverts has no direction: it is taken for a row of zeros.
#[test]
fn a_row_too_short_for_its_inverse_is_a_row_of_zeros() {
    let rows = [[1f32, 0.5], [1e-41, 2e-41], [-0.5, 2.0]];
    let zeros = [[1f32, 0.5], [0.0, 0.0], [-0.5, 2.0]];
    for objective in [Objective::CLIP, Objective::Joint, Objective::Sigmoid { bias: -1.0 }] {
        let loss = Loss::new(Tilting::Cosine, objective, 0.5);
        let of = |x: &[[f32; 2]]| {
            let x = Matrix::f32(x.as_flattened(), 2);
            evaluate(&mut Cpu::new(), &loss, &Batch::new(x, x))
        };
        let [short, zero] = [of(&rows), of(&zeros)];
        assert_eq!(short.value, zero.value, "{objective:?}");
        assert_eq!((&short.u[..], &short.u[2..4]), (&zero.u[..], &[0.0; 2][..]), "{objective:?}");
    }
}

/// Where all of a row's positives have one logit, what their targets leave is as small as the rest of its softmax.
#[test]
fn several_positives_that_are_all_there_is() {
    let (classes, members, d) = (8usize, 3usize, 8usize);
    let n = classes * members;
    // Each class is an axis.
    let x: Vec<f32> = (0..n * d).map(|k| f32::from(k % d == k / d / members)).collect();
    let class: Vec<i64> = (0..n).map(|i| (i / members) as i64).collect();
    let pairs = Pairs { positives: Positives::Groups { u: &class, v: &class }, ..Pairs::default() };
    let batch = Batch { pairs, ..Batch::new(Matrix::f32(&x, d), Matrix::f32(&x, d)) };
    for smoothing in [0.0, 0.1] {
        // Lower ones the reference itself has no digits for.
        for tau in [0.05, 0.04] {
            let loss = Loss { smoothing, ..Loss::new(Tilting::Cosine, Objective::CLIP, tau) };
            let want = reference::loss(&loss, &batch).unwrap();
            for isa in Isa::available() {
                let got = evaluate(&mut Cpu::with_isa(isa), &loss, &batch);
                let off = relative(&[got.value.grad_tau], &[want.grad_tau], 0.0);
                assert!(off < 1e-4, "{} {tau} {smoothing}: {} for {}", isa.name(), got.value.grad_tau, want.grad_tau);
            }
        }
    }
}

/// Nor do clusters far from each other: gradients are of differences within them.
// Sums of as many positives as a class has members, one after another, lose nothing that grows with their number.
#[test]
fn very_many_positives_of_one_column() {
    let (n, m, d) = (60_000, 2, 3);
    let case = Case::new(Tilting::Cosine, Objective::Conditional { lambda_u: 1.0, lambda_v: 1.0 }, n, m, d);
    let case = Case { positive: Positive::Groups, ..case };
    let mut data = case.data();
    data.group_u = (0..n as i64).map(|i| i * i % 7 % 2).collect();
    data.group_v = vec![0, 1];
    for objective in [case.objective, Objective::Joint] {
        let case = Case { objective, ..case };
        let batch = data.batch(&case);
        let want = reference::loss(&case.loss(), &batch).unwrap();
        let got = evaluate(&mut Cpu::new(), &case.loss(), &batch);
        let off = error(&got, &want, &case, &data);
        assert!(off < 3e-6, "{objective:?}: {off:e}");
    }
}

// Where a softmax is one pair's, MMD has no gradient: its factor less its mean is nothing, and not their rounding over tau.
#[test]
fn mmd_of_a_softmax_of_one_pair_has_no_gradient() {
    let (n, d, f) = (5, 2, 300);
    // Column j's winner is row 0, whose positive is column 0.
    let u: Vec<f32> = (0..n).flat_map(|i| [if i == 0 { 30.0 } else { 0.1 * i as f32 }, 0.3]).collect();
    let v: Vec<f32> = (0..n).flat_map(|j| [20.0 + j as f32, 0.7]).collect();
    let features: Vec<f32> = (0..n * f).map(|k| ((k * 37 % 101) as f32 * 0.37).sin() * 3.0).collect();
    let features = Matrix::f32(&features, f);
    for isa in Isa::available() {
        for objective in [Objective::Mmd { lambda_u: 1.0, lambda_v: 0.0 }, Objective::JointMmd] {
            let loss = Loss { tilting: Tilting::Dot, objective, tau: 0.02, smoothing: 0.0 };
            let batch = Batch {
                moments: Some(Moments::Features { u: features, v: features }),
                ..Batch::new(Matrix::f32(&u, d), Matrix::f32(&v, d))
            };
            let (mut du, mut dv) = (vec![f32::NAN; n * d], vec![f32::NAN; n * d]);
            let gradients = Gradients { u: Some(Write::Set(&mut du)), v: Some(Write::Set(&mut dv)), offset_v: None };
            let value = Cpu::with_isa(isa).loss(&loss, &batch, gradients).unwrap();
            assert!(value.loss.is_finite() && value.grad_tau == 0.0, "{isa:?} {objective:?}: {}", value.grad_tau);
            assert!(du.iter().chain(&dv).all(|&x| x == 0.0), "{isa:?} {objective:?}: {du:?} {dv:?}");
        }
    }
}

// What is not learned yet has moments far below those of the targets: the value is theirs, and not what cancelling left.
#[test]
fn joint_mmd_of_a_model_that_knows_nothing() {
    for seed in 0..4 {
        let case = Case::new(Tilting::Cosine, Objective::JointMmd, 600, 600, 8);
        let case = Case { tau: 1.0, moment: Moment::Linear, seed, ..case };
        let data = case.data();
        let batch = data.batch(&case);
        let want = reference::loss(&case.loss(), &batch).unwrap();
        let got = Cpu::new().loss(&case.loss(), &batch, Gradients::default()).unwrap();
        let off = (got.loss - want.loss).abs() / want.loss.abs();
        assert!(off < 1e-5, "{off:e} of {}", want.loss);
    }
}

// A Gram matrix is cut into panels of 128 columns, or rows: what belongs to a pair must be that of its own panel. The large
// shapes of `matches_the_reference` leave the Gaussian kernel out.
#[test]
fn panels_of_a_kernel_have_their_own_pairs() {
    let mut engine = Cpu::new();
    for objective in [Objective::Mmd { lambda_u: 0.8, lambda_v: 1.3 }, Objective::JointMmd] {
        for (&tilting, (n, m)) in Tilting::ALL.iter().zip([(19, 150), (150, 19), (23, 257)]) {
            let case = Case { moment: Moment::Gaussian, ..Case::new(tilting, objective, n, m, 4) };
            for case in options(case).into_iter().filter(|case| case.moment == Moment::Gaussian) {
                let data = case.data();
                let (loss, batch) = (case.loss(), data.batch(&case));
                let want = reference::loss(&loss, &batch).unwrap();
                let off = error(&evaluate(&mut engine, &loss, &batch), &want, &case, &data);
                assert!(off < 1e-5, "{off:e}: {case:?}");
            }
        }
    }
}

// d tau takes the offsets out of the logits by column sums that are made for it alone where nobody asks for them.
#[test]
fn what_is_not_asked_for_changes_nothing() {
    for &objective in OBJECTIVES {
        if matches!(objective, Objective::JointShuffled { .. }) {
            continue;
        }
        for &tilting in Tilting::ALL {
            let case = Case { offset: true, ..Case::new(tilting, objective, 37, 41, 6) };
            let data = case.data();
            let (loss, batch) = (case.loss(), data.batch(&case));
            let mut engine = Cpu::new();
            let all = evaluate(&mut engine, &loss, &batch);
            for asked in 0..7 {
                let mut got = [vec![f32::NAN; 37 * 6], vec![f32::NAN; 41 * 6], vec![f32::NAN; 41]];
                let mut at = 0;
                let [u, v, offset_v] = got.each_mut().map(|out| {
                    at += 1;
                    (asked >> (at - 1) & 1 == 1).then_some(Write::Set(&mut out[..]))
                });
                let value = engine.loss(&loss, &batch, Gradients { u, v, offset_v }).unwrap();
                let [ours, theirs] =
                    [value, all.value].map(|value| [value.loss, tau_of(&case, value), value.grad_bias]);
                let off = relative(&ours, &theirs, 0.1);
                assert!(off < 2e-6, "{asked:03b}: {off:e}, {case:?}");
                for (k, (got, all)) in got.iter().zip([&all.u, &all.v, &all.offset]).enumerate() {
                    if asked >> k & 1 == 1 {
                        let off = relative(&wide(got), &wide(all), 1e-3);
                        assert!(off < 2e-6, "{asked:03b}: {off:e} of gradient {k}, {case:?}");
                    }
                }
            }
        }
    }
}

/// What a step in log tau changes.
fn tau_of(case: &Case, value: Value) -> f64 {
    case.tau * value.grad_tau
}

// Offsets belong to the logits that one number stands for in all exponentials, where they lie close enough.
#[test]
fn offsets_may_be_of_any_size() {
    for &objective in OBJECTIVES {
        // Sigmoids of far logits are certain, and a shuffled loss takes no offset.
        if matches!(objective, Objective::JointShuffled { .. } | Objective::Sigmoid { .. }) {
            continue;
        }
        for &tilting in Tilting::ALL {
            for shift in [[300.0, 300.0], [-300.0, -300.0], [0.0, 200.0]] {
                let case = Case { offset: true, ..Case::new(tilting, objective, 31, 34, 6) };
                let mut data = case.data();
                data.offset.iter_mut().enumerate().for_each(|(j, x)| *x += shift[j % 2]);
                let (loss, batch) = (case.loss(), data.batch(&case));
                let want = reference::loss(&loss, &batch).unwrap();
                let got = evaluate(&mut Cpu::new(), &loss, &batch);
                // A logit has a rounding of 300 in it.
                let off = error(&got, &want, &case, &data);
                assert!(off < 3e-4, "{off:e} at {shift:?}: {case:?}");
            }
        }
    }
}

#[test]
fn distances_do_not_pay_for_clusters_far_apart() {
    let n = 150;
    for d in [3, 8, 13, 40] {
        let mut rng = ChaCha8Rng::seed_from_u64(d as u64);
        let mut normal = |len: usize| -> Vec<f32> { (0..len).map(|_| StandardNormal.sample(&mut rng)).collect() };
        let (at, noise) = (normal(n * d), normal(n * d));
        for far in [30f32, 1e4] {
            let u: Vec<f32> = at.iter().enumerate().map(|(k, x)| x + if k / d % 2 == 0 { far } else { -far }).collect();
            let v: Vec<f32> = u.iter().zip(&noise).map(|(u, x)| u + 0.5 * x).collect();
            let features = Moments::Features { u: Matrix::f32(&at, d), v: Matrix::f32(&noise, d) };
            for &objective in OBJECTIVES {
                let mmd = objective.takes_moments();
                // Softmaxes of so many dimensions are certain, and what is left of MMD's gradients has few digits anywhere.
                if mmd && d == 40 {
                    continue;
                }
                let moments = mmd.then_some(features);
                let batch = Batch { moments, ..Batch::new(Matrix::f32(&u, d), Matrix::f32(&v, d)) };
                let loss = Loss::new(Tilting::L2, objective, 1.0);
                let want = reference::loss(&loss, &batch).unwrap();
                for isa in Isa::available() {
                    let got = evaluate(&mut Cpu::with_isa(isa), &loss, &batch);
                    let off = [(&got.u, &want.grad_u), (&got.v, &want.grad_v)].map(|(a, b)| relative(&wide(a), b, 0.0));
                    assert!(off[0].max(off[1]) < 1e-5, "{} {objective:?} d {d} {far}: {off:?}", isa.name());
                }
            }
        }
    }
}

/// Pairings of rows in places far from each other lose nothing to where those are.
#[test]
fn shuffled_pairings_of_far_places() {
    let far = [0.1f32, 1.1, 2e4 + 0.1, 2e4 + 1.1];
    let u: Vec<f32> = far.iter().flat_map(|&x| [x, 0.0]).collect();
    let v: Vec<f32> = far.iter().flat_map(|&x| [x + 0.3, 0.0]).collect();
    let batch = Batch::new(Matrix::f32(&u, 2), Matrix::f32(&v, 2));
    let loss = Loss::new(Tilting::L2, Objective::JointShuffled { pairings: 4, seed: 0 }, 0.05);
    let (want, got) = (reference::loss(&loss, &batch).unwrap(), evaluate(&mut Cpu::new(), &loss, &batch));
    for (name, got, want) in [
        ("loss", &[got.value.loss][..], &[want.loss][..]),
        ("d tau", &[got.value.grad_tau], &[want.grad_tau]),
        ("dU", &wide(&got.u), &want.grad_u),
        ("dV", &wide(&got.v), &want.grad_v),
    ] {
        assert!(relative(got, want, 1e-3) < 1e-5, "{name}: {got:?} for {want:?}");
    }
}

/// Where f32 holds no logit a loss is no number: a finite one would be taken for learning.
#[test]
fn logits_beyond_f32_are_seen() {
    for &objective in OBJECTIVES {
        let case = Case::new(Tilting::Dot, objective, 20, 20, 6);
        let mut data = case.data();
        data.u.iter_mut().chain(&mut data.v).for_each(|x| *x *= 1e25);
        let (mut u, mut v) = (vec![0f32; 120], vec![0f32; 120]);
        let gradients = Gradients { u: Some(Write::Set(&mut u)), v: Some(Write::Set(&mut v)), offset_v: None };
        let value = Cpu::new().loss(&case.loss(), &data.batch(&case), gradients).unwrap();
        let finite = u.iter().chain(&v).all(|x| x.is_finite());
        assert!(!(value.loss.is_finite() && finite), "{objective:?}: {value:?}");
    }
}

/// `rounding` of its entries is what a gradient may have lost by that of G.
fn bounded_by_naive(engine: &mut impl Engine, case: &Case, data: &Data, batch: Batch<'_>, rounding: f64, what: &str) {
    let loss = case.loss();
    let want = reference::loss(&loss, &batch).unwrap();
    let (got, naive) = (evaluate(engine, &loss, &batch), naive_f32(case, data));
    let check = |name: &str, got: &[f64], naive: &[f64], want: &[f64], floor: f64| {
        let distance = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt();
        let norm = distance(want, &vec![0.0; want.len()]);
        // Nothing can be asked below the smallest f32.
        let floor = (1e-5 * norm).max(floor).max(f64::from(f32::MIN_POSITIVE));
        let (ours, theirs) = (distance(got, want), distance(naive, want));
        assert!(ours <= 4.0 * theirs + floor, "{name} is off by {ours:e}, naive {theirs:e}, floor {floor:e}, {what}");
    };
    // The naive evaluation may be lucky: when all logits are one number, when a softmax is certain, and in the kernel
    // sums of MMD, which it does in f64. So half a unit in the last place of the logits is granted anyway, and in
    // sums that cancel a part of what they have without.
    let kernel = match (case.objective, case.moment) {
        (Objective::JointMmd, Moment::Linear) => 6.0,
        (_, Moment::Linear) => 3.0,
        _ => 1.0,
    };
    let half_unit = 2f64.powi(-24) * largest_logit(case, data);
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let floor = |want: &[f64], size: f64| half_unit * norm(want) + 2e-6 * kernel * size;
    let [size_u, size_v] = natural_size(case, data);
    let of_u = floor(&want.grad_u, size_u) + rounding * size_u.max(norm(&want.grad_u));
    let of_v = floor(&want.grad_v, size_v) + rounding * size_v.max(norm(&want.grad_v));
    check("grad_u", &wide(&got.u), &wide(&naive.u), &want.grad_u, of_u);
    check("grad_v", &wide(&got.v), &wide(&naive.v), &want.grad_v, of_v);
    let columns = &want.grad_offset_v;
    check("grad_offset_v", &wide(&got.offset), &wide(&naive.offset), columns, floor(columns, 1.0));
    // Scalars are differences of numbers as large as the logits.
    let floor = kernel * (1e-6 + 4.0 * half_unit);
    let scalars = |value: Value| [value.loss, value.grad_tau * case.tau, value.grad_bias];
    let wanted = [want.loss, want.grad_tau * case.tau, want.grad_bias];
    for (k, name) in ["loss", "grad_tau", "grad_bias"].into_iter().enumerate() {
        check(name, &scalars(got.value)[k..=k], &scalars(naive.value)[k..=k], &wanted[k..=k], floor);
    }
    if case.tilting == Tilting::Cosine {
        for (x, g) in data.u.chunks(case.d).zip(got.u.chunks(case.d)) {
            assert!(x.iter().any(|&x| x != 0.0) || g.iter().all(|&g| g == 0.0), "a zero row has no gradient, {what}");
        }
    }
}

/// An upper bound of |S|.
fn largest_logit(case: &Case, data: &Data) -> f64 {
    let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let largest = |x: &[f32]| x.chunks(case.d).map(norm).fold(0.0, f64::max);
    let (u, v) = (largest(&data.u), largest(&data.v));
    match case.tilting {
        Tilting::Cosine => 1.0 / case.tau,
        Tilting::Dot => u * v / case.tau,
        // Embeddings far from the origin must not pay for it.
        Tilting::L2 => {
            let distances = data.u.chunks(case.d).flat_map(|u| data.v.chunks(case.d).map(move |v| (u, v)));
            let squares = distances.map(|(u, v)| u.iter().zip(v).map(|(u, v)| f64::from(u - v).powi(2)).sum::<f64>());
            squares.fold(0.0, f64::max) / (2.0 * case.tau)
        }
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Logits kept between passes, all of them, some or none, are those that are multiplied out again.
#[test]
fn a_workspace_changes_no_bit() {
    // Scratch is a pool's as far as its threads have had something to do: all of them, of one.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for (k, &objective) in OBJECTIVES.iter().enumerate() {
        for tilting in Tilting::ALL.iter().copied() {
            // Above the size that one thread takes alone: several pieces a side, the last of them ragged.
            let mut case = Case::new(tilting, objective, 701, 701, 9 + k);
            if objective == Objective::Joint {
                // One pass is enough for pairs on the diagonal.
                case.positive = Positive::Groups;
            }
            let data = case.data();
            let run = |bytes: usize| {
                let mut engine = Cpu::new();
                engine.set_workspace(bytes);
                let got = pool.install(|| evaluate(&mut engine, &case.loss(), &data.batch(&case)));
                (got, engine.scratch_bytes())
            };
            let (none, least) = run(0);
            for bytes in [200_000, 700_000, 1 << 30] {
                let (got, scratch) = run(bytes);
                assert!(same_bits(&none.u, &got.u) && same_bits(&none.v, &got.v), "{bytes}: {case:?}");
                assert_eq!(none.value, got.value, "{bytes}: {case:?}");
                // The sigmoid loss has one pass, the shuffled joint loss none.
                if !matches!(objective, Objective::Sigmoid { .. } | Objective::JointShuffled { .. }) {
                    assert!(scratch > least, "{bytes}: nothing was kept: {case:?}");
                }
            }
        }
    }
}

/// The same bits on any pool, from a new engine or a used one, and whatever outputs are asked for.
fn is_deterministic<E: Engine + Send>(make: impl Fn() -> E + Sync) {
    let pools = [1, 2, 3, 4].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    let mut used = make();
    for (k, &objective) in OBJECTIVES.iter().enumerate() {
        let tilting = Tilting::ALL[k % Tilting::ALL.len()];
        let mmd = matches!(objective, Objective::Mmd { .. } | Objective::JointMmd);
        // Several tiles a side, the last of them ragged; the second time over all with every option.
        let n = if mmd { 301 } else { 701 };
        let all = options(Case::new(tilting, objective, n, n, 20));
        let full = all.iter().copied().rfind(|case| case.weights && case.positive != Positive::Diagonal);
        for case in [Some(all[0]), full].into_iter().flatten() {
            let data = case.data();
            let (loss, batch) = (case.loss(), data.batch(&case));
            let one = pools[0].install(|| evaluate(&mut make(), &loss, &batch));
            for pool in &pools {
                let got = pool.install(|| evaluate(&mut used, &loss, &batch));
                let same =
                    same_bits(&one.u, &got.u) && same_bits(&one.v, &got.v) && same_bits(&one.offset, &got.offset);
                assert!(same, "{} threads: {case:?}", pool.current_num_threads());
                assert_eq!(one.value, got.value, "{} threads: {case:?}", pool.current_num_threads());
            }
            for wanted in 0..7 {
                let [mut u, mut v] = [&one.u, &one.v].map(|x| vec![f32::NAN; x.len()]);
                let mut offset = vec![f32::NAN; n];
                let gradients = Gradients {
                    u: (wanted & 1 > 0).then_some(Write::Set(&mut u)),
                    v: (wanted & 2 > 0).then_some(Write::Set(&mut v)),
                    offset_v: (wanted & 4 > 0).then_some(Write::Set(&mut offset)),
                };
                let value = used.loss(&loss, &batch, gradients).unwrap();
                assert_eq!(value, one.value, "gradients {wanted:03b}: {case:?}");
                for (bit, got, all) in [(1, &u, &one.u), (2, &v, &one.v), (4, &offset, &one.offset)] {
                    let untouched = || got.iter().all(|x| x.is_nan());
                    let right = if wanted & bit > 0 { same_bits(got, all) } else { untouched() };
                    assert!(right, "gradients {wanted:03b}, {bit}: {case:?}");
                }
            }
        }
    }
}

fn adds_when_told_to<E: Engine>(make: impl Fn() -> E) {
    let mut engine = make();
    for &objective in OBJECTIVES {
        for &tilting in Tilting::ALL {
            for (n, m) in [(37, 37), (29, 41)] {
                for case in options(Case::new(tilting, objective, n, m, 18)) {
                    let data = case.data();
                    let (loss, batch) = (case.loss(), data.batch(&case));
                    let set = evaluate(&mut engine, &loss, &batch);
                    let (mut u, mut v, mut offset) = (vec![3.0f32; n * 18], vec![-2.0f32; m * 18], vec![0.5f32; m]);
                    let gradients = Gradients {
                        u: Some(Write::Add(&mut u)),
                        v: Some(Write::Add(&mut v)),
                        offset_v: Some(Write::Add(&mut offset)),
                    };
                    assert_eq!(engine.loss(&loss, &batch, gradients).unwrap(), set.value, "{case:?}");
                    for (sum, set, start) in [(&u, &set.u, 3.0), (&v, &set.v, -2.0), (&offset, &set.offset, 0.5)] {
                        assert!(sum.iter().zip(set).all(|(a, s)| *a == start + s), "{start}: {case:?}");
                    }
                }
            }
        }
    }
}

/// Every way to be wrong is an error that names what is wrong, and nothing is written.
fn refuses_bad_input<E: Engine>(make: impl Fn() -> E) {
    let (n, m, d) = (4, 4, 3);
    let case = Case::new(Tilting::Dot, OBJECTIVES[0], n, m, d);
    let data = case.data();
    let (good, batch) = (case.loss(), data.batch(&case));
    let nan_at = |x: &[f32], k: usize| -> Vec<f32> {
        x.iter().enumerate().map(|(i, &x)| if i == k { f32::NAN } else { x }).collect()
    };
    let (bad_u, bad_v, bad_x) = (nan_at(&data.u, 7), nan_at(&data.v, 0), nan_at(&data.x, 11));
    // More than one task looks at.
    let (bad_y, far) = (nan_at(&data.y, 6), nan_at(&vec![1.0; 70_000 * d], 66_666 * d + 2));
    let infinite = [half::f16::INFINITY; 12];
    let refused = |what: &str, loss: Loss, batch: Batch<'_>| {
        let (mut u, mut v, mut offset) = (vec![7.0f32; n * d], vec![7.0f32; m * d], vec![7.0f32; m]);
        let gradients = Gradients {
            u: Some(Write::Set(&mut u)),
            v: Some(Write::Add(&mut v)),
            offset_v: Some(Write::Set(&mut offset)),
        };
        let error = make().loss(&loss, &batch, gradients).expect_err(what).to_string();
        assert!(error.starts_with(what), "{what}: {error}");
        assert!(u.iter().chain(&v).chain(&offset).all(|&x| x == 7.0), "{what}: outputs were touched");
    };
    let with = |objective| Loss { objective, ..good };
    let conditional = |lambda_u, lambda_v| with(Objective::Conditional { lambda_u, lambda_v });
    for tau in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused("tau", Loss { tau, ..good }, batch);
    }
    for smoothing in [1.0, -0.1, f64::NAN] {
        refused("smoothing", Loss { smoothing, ..good }, batch);
    }
    refused("lambda_u", conditional(-1.0, 1.0), batch);
    refused("lambda_v", conditional(1.0, f64::INFINITY), batch);
    refused("lambda_u", with(Objective::Mmd { lambda_u: f64::NAN, lambda_v: 1.0 }), batch);
    refused("lambda_u and lambda_v", conditional(0.0, 0.0), batch);
    refused("bias", with(Objective::Sigmoid { bias: f64::NAN }), batch);

    refused("u row 2", good, Batch { u: Matrix::f32(&bad_u, d), ..batch });
    refused("v row 0", good, Batch { v: Matrix::f32(&bad_v, d), ..batch });
    refused("u row 66666", good, Batch { u: Matrix::f32(&far, d), ..batch });
    refused("u row 0", good, Batch { u: Matrix { data: Storage::F16(&infinite), rows: n, dim: d }, ..batch });
    refused("u", good, Batch { u: Matrix::f32(&[], d), ..batch });
    refused("u", good, Batch { u: Matrix { dim: 0, ..batch.u }, ..batch });
    refused("v", good, Batch { v: Matrix { rows: 5, ..batch.v }, ..batch });
    refused("v", good, Batch { v: Matrix { rows: usize::MAX, ..batch.v }, ..batch });
    refused("columns of v", good, Batch { v: Matrix::f32(&data.v, 4), ..batch });

    let pairs = |pairs| Batch { pairs, ..batch };
    let positives = |positives| pairs(Pairs { positives, ..Pairs::default() });
    refused("positives", good, positives(Positives::Index(&[0, 1, 2, 4])));
    refused("positives", good, positives(Positives::Index(&[0, 1])));
    refused("groups of u", good, positives(Positives::Groups { u: &[1; 3], v: &[1; 4] }));
    refused("groups of v", good, positives(Positives::Groups { u: &[1; 4], v: &[1; 5] }));
    refused("groups", good, positives(Positives::Groups { u: &[1; 4], v: &[2; 4] }));
    refused("ignore ids of u", good, pairs(Pairs { ignore: Some((&[1; 5], &[1; 4])), ..Pairs::default() }));
    refused("ignore ids of v", good, pairs(Pairs { ignore: Some((&[1; 4], &[1; 3])), ..Pairs::default() }));
    for weights in [&[1.0; 3][..], &[0.0; 4], &[1.0, -1.0, 1.0, 1.0], &[1.0, f32::INFINITY, 1.0, 1.0]] {
        refused("weights of u", good, pairs(Pairs { weights_u: Some(weights), ..Pairs::default() }));
        refused("weights of v", good, pairs(Pairs { weights_v: Some(weights), ..Pairs::default() }));
    }
    // All the weight on a row (column) that has no positive, and so no part in the loss.
    let lonely = Pairs { positives: Positives::Groups { u: &[1, 2, 3, 4], v: &[1, 2, 3, 5] }, ..Pairs::default() };
    let last = Some(&[0.0f32, 0.0, 0.0, 1.0][..]);
    refused("weights of u", good, pairs(Pairs { weights_u: last, ..lonely }));
    refused("weights of v", good, pairs(Pairs { weights_v: last, ..lonely }));
    refused("offset_v", good, Batch { offset_v: Some(&[1.0; 3]), ..batch });
    refused("offset_v", good, Batch { offset_v: Some(&[1.0, 1.0, f32::NEG_INFINITY, 1.0]), ..batch });

    let shuffled = with(Objective::JointShuffled { pairings: 2, seed: 0 });
    refused("pairings", with(Objective::JointShuffled { pairings: 0, seed: 0 }), batch);
    refused("rows of v", shuffled, Batch { v: Matrix::f32(&data.v[..9], d), ..batch });
    refused("smoothing", Loss { smoothing: 0.1, ..shuffled }, batch);
    refused("pairings", with(Objective::JointShuffled { pairings: u32::MAX, seed: 0 }), batch);
    refused("shuffled joint loss", shuffled, Batch { offset_v: Some(&[1.0; 4]), ..batch });
    refused("shuffled joint loss", shuffled, positives(Positives::Index(&[0, 1, 2, 3])));
    refused("shuffled joint loss", shuffled, pairs(Pairs { ignore: Some((&[1; 4], &[1; 4])), ..Pairs::default() }));

    let (x, y) = (Matrix::f32(&data.x, 3), Matrix::f32(&data.y, 2));
    let moments = |moments| Batch { moments: Some(moments), ..batch };
    let features = moments(Moments::Features { u: x, v: y });
    for objective in [Objective::JointMmd, Objective::Mmd { lambda_u: 1.0, lambda_v: 1.0 }] {
        let mmd = with(objective);
        refused("moments", mmd, batch);
        refused("smoothing", Loss { smoothing: 0.1, ..mmd }, features);
        refused("rows of data of u", mmd, moments(Moments::Features { u: Matrix::f32(&data.x, 4), v: y }));
        refused("rows of data of v", mmd, moments(Moments::Features { u: x, v: Matrix::f32(&data.y, 4) }));
        refused("data of v", mmd, moments(Moments::Features { u: x, v: Matrix::f32(&[], 2) }));
        refused("data of u row 3", mmd, moments(Moments::Features { u: Matrix::f32(&bad_x, 3), v: y }));
        refused("data of v row 3", mmd, moments(Moments::Features { u: x, v: Matrix::f32(&bad_y, 2) }));
        for width in [0.0, -1.0, f64::NAN, 1e-30] {
            let kernel = DataKernel::Gaussian { width };
            refused("kernel width", mmd, moments(Moments::Gram { kernel, u: x, v: y }));
        }
    }
    refused("moments", good, features);

    for (wrong, what) in ["gradient of u", "gradient of v", "gradient of offset_v"].into_iter().enumerate() {
        let mut outputs = [n * d, m * d, m].map(|len| vec![7.0f32; len]);
        outputs[wrong].push(7.0);
        let [u, v, offset_v] = outputs.each_mut().map(|out| Some(Write::Set(&mut out[..])));
        let error = make().loss(&good, &batch, Gradients { u, v, offset_v }).expect_err(what).to_string();
        assert!(error.starts_with(what), "{what}: {error}");
        assert!(outputs.iter().flatten().all(|&x| x == 7.0), "{what}: outputs were touched");
    }
}

macro_rules! conformance {
    ($($engine:ident: $make:expr,)*) => {$(
        mod $engine {
            use super::*;
            #[test]
            fn matches_the_reference() {
                super::matches_the_reference($make);
            }
            #[test]
            fn half_storage_loses_nothing_more() {
                let make = $make;
                super::half_storage_loses_nothing_more(make, of_pairs(make().isa()));
            }
            #[test]
            fn survives_extremes() {
                super::survives_extremes($make);
            }
            #[test]
            fn is_deterministic() {
                super::is_deterministic($make);
            }
            #[test]
            fn adds_when_told_to() {
                super::adds_when_told_to($make);
            }
            #[test]
            fn refuses_bad_input() {
                super::refuses_bad_input($make);
            }
        }
    )*};
}

conformance! {
    fastest: Cpu::new,
    portable: || Cpu::with_isa(named("portable")),
}

// Whatever lies between the fastest and the portable one.
#[test]
fn other_instruction_sets_match_the_reference() {
    // Of f32 an instruction set makes the same with units for bf16 as without.
    let other = |isa: &Isa| *isa != Isa::best() && !isa.name().starts_with("portable");
    let others: Vec<Isa> = Isa::available().into_iter().filter(other).collect();
    if others.is_empty() {
        println!("skipped: this machine has {} alone", Isa::best().name());
    }
    for isa in others {
        println!("{}", isa.name());
        matches_the_reference(|| Cpu::with_isa(isa));
    }
}

/// Pairs of bf16 on units for them, or on arithmetic that stands for such units.
mod pairs {
    use super::*;

    #[test]
    fn match_the_reference() {
        half_storage_loses_nothing_more(|| Cpu::with_isa(named("portable+bf16")), true);
    }

    #[test]
    fn survive_extremes() {
        for isa in Isa::available().into_iter().filter(|&isa| of_pairs(isa)) {
            let mut engine = Cpu::with_isa(isa);
            for &objective in OBJECTIVES {
                for tilting in [Tilting::Cosine, Tilting::Dot] {
                    for (scale, tau) in [(1.0, 1e-3), (60.0, 1.0), (1e-12, 1.0)] {
                        for what in ["random", "zero rows", "zeros", "opposites"] {
                            let case = Case { tau, ..Case::new(tilting, objective, 45, 45, 23) };
                            if !multiplies_pairs(&case) {
                                continue;
                            }
                            let mut data = case.data();
                            for (sign, x) in [(1.0, &mut data.u), (-1.0, &mut data.v)] {
                                match what {
                                    "zero rows" => x[5 * 23..9 * 23].fill(0.0),
                                    "zeros" => x.fill(0.0),
                                    "opposites" => x.iter_mut().for_each(|x| *x = sign * x.abs()),
                                    _ => {}
                                }
                                let rounded = |&x: &f32| half::bf16::from_f32(x * scale).to_f32();
                                *x = x.iter().map(rounded).collect();
                            }
                            let (u, v) = (Half::new(&data.u), Half::new(&data.v));
                            let batch = Batch { u: u.matrix(true, 23), v: v.matrix(true, 23), ..data.batch(&case) };
                            let what = format!("{}, {what}, scale {scale}: {case:?}", isa.name());
                            bounded_by_naive(&mut engine, &case, &data, batch, 2f64.powi(-8), &what);
                        }
                    }
                }
            }
        }
    }

    /// Steps of kept logits are no part of what is left of a positive's P when its target is taken off.
    #[test]
    fn several_positives_lose_nothing_to_a_workspace() {
        let (n, d) = (256, 64);
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let mut normal = |len: usize| -> Vec<f32> { (0..len).map(|_| StandardNormal.sample(&mut rng)).collect() };
        let (centres, noise) = (normal(n * d), normal(2 * n * d));
        // How many of a class u has, and v.
        for (objective, of_a_class) in [
            (Objective::CLIP, [8, 8]),
            (Objective::CLIP, [8, 1]),
            (Objective::CLIP, [1, 8]),
            (Objective::Joint, [8, 8]),
            (Objective::Joint, [1, 1]),
        ] {
            let len = of_a_class.map(|count| n * count / of_a_class[0].max(of_a_class[1]));
            let class = [0, 1].map(|side| (0..len[side]).map(|i| (i / of_a_class[side]) as i64).collect::<Vec<_>>());
            let rows = |side: usize| -> Vec<f32> {
                let near = noise[side * n * d..].chunks(d).zip(&class[side]);
                let near = near
                    .map(|(x, &class)| x.iter().zip(&centres[class as usize * d..][..d]).map(|(x, c)| c + 0.03 * x));
                near.flatten().collect()
            };
            let (u, v) = (Half::new(&rows(0)), Half::new(&rows(1)));
            let pairs = Pairs { positives: Positives::Groups { u: &class[0], v: &class[1] }, ..Pairs::default() };
            let batch = Batch { pairs, ..Batch::new(u.matrix(true, d), v.matrix(true, d)) };
            let loss = Loss::new(Tilting::Cosine, objective, 0.02);
            let want = reference::loss(&loss, &batch).unwrap();
            for isa in Isa::available().into_iter().filter(|&isa| of_pairs(isa)) {
                for bytes in [0, 1 << 30] {
                    let mut engine = Cpu::with_isa(isa);
                    engine.set_workspace(bytes);
                    let got = evaluate(&mut engine, &loss, &batch);
                    let off = [(&got.u, &want.grad_u), (&got.v, &want.grad_v)].map(|(a, b)| relative(&wide(a), b, 0.0));
                    let off_tau = relative(&[got.value.grad_tau], &[want.grad_tau], 0.0);
                    let what = format!("{} {objective:?} {of_a_class:?} {bytes}", isa.name());
                    assert!(off[0].max(off[1]) < 4e-3 && off_tau < 0.03, "{what}: {off:?} {off_tau}");
                }
            }
        }
    }

    /// Products of rows as they are stored would be nothing, or beyond f32.
    #[test]
    fn norms_of_any_size_have_the_same_products() {
        for (size, tau) in [(1e-19f32, 1e-38), (3e19, 3e38)] {
            let case = Case { tau, ..Case::new(Tilting::Dot, OBJECTIVES[0], 45, 45, 23) };
            let data = case.data();
            let [u, v] = [&data.u, &data.v].map(|x| Half::new(&x.iter().map(|x| size * x).collect::<Vec<_>>()));
            let batch = Batch { u: u.matrix(true, 23), v: v.matrix(true, 23), ..data.batch(&case) };
            let want = reference::loss(&case.loss(), &batch).unwrap();
            for isa in Isa::available().into_iter().filter(|&isa| of_pairs(isa)) {
                let got = evaluate(&mut Cpu::with_isa(isa), &case.loss(), &batch);
                let off = [(&got.u, &want.grad_u), (&got.v, &want.grad_v)].map(|(a, b)| relative(&wide(a), b, 0.0));
                assert!(off[0].max(off[1]) < 1e-2, "{} {size}: {off:?}", isa.name());
            }
        }
    }

    /// Products of rows as they are stored would be beyond f32.
    #[test]
    fn norms_of_any_size_have_the_same_cosines() {
        let case = Case::new(Tilting::Cosine, OBJECTIVES[0], 45, 45, 23);
        let data = case.data();
        for isa in Isa::available().into_iter().filter(|&isa| of_pairs(isa)) {
            let at = |scale: f32| {
                let half = |x: &[f32]| {
                    Half::new(&x.iter().map(|&x| half::bf16::from_f32(x).to_f32() * scale).collect::<Vec<_>>())
                };
                let (u, v) = (half(&data.u), half(&data.v));
                let batch = Batch { u: u.matrix(true, 23), v: v.matrix(true, 23), ..data.batch(&case) };
                evaluate(&mut Cpu::with_isa(isa), &case.loss(), &batch)
            };
            let want = at(1.0);
            for power in [-66, 66] {
                let scale = 2f32.powi(power);
                let got = at(scale);
                assert!((got.value.loss - want.value.loss).abs() < 1e-5, "{}: {:?}", isa.name(), got.value);
                let back: Vec<f64> = got.u.iter().map(|&x| f64::from(x) * f64::from(scale)).collect();
                let off = relative(&back, &wide(&want.u), 0.0);
                assert!(off < 1e-2, "{}: {off:e} at 2^{power}", isa.name());
            }
        }
    }

    #[test]
    fn have_the_same_bits_on_any_pool_and_hardly_others_with_a_workspace() {
        let pools = [1, 4].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
        for isa in Isa::available().into_iter().filter(|&isa| of_pairs(isa)) {
            // At the last tau logits lie too far apart to be kept in 16 bits.
            for tau in [0.5, 0.01, 0.001] {
                let case = Case { tau, ..Case::new(Tilting::Cosine, OBJECTIVES[0], 700, 411, 33) };
                let data = case.data();
                let (u, v) = (Half::new(&data.u), Half::new(&data.v));
                let batch = Batch { u: u.matrix(true, 33), v: v.matrix(true, 33), ..data.batch(&case) };
                let run = |bytes: usize, pool: &rayon::ThreadPool| {
                    let mut engine = Cpu::with_isa(isa);
                    engine.set_workspace(bytes);
                    pool.install(|| evaluate(&mut engine, &case.loss(), &batch))
                };
                let none = run(0, &pools[0]);
                for bytes in [0, 500_000, 1 << 30] {
                    let what = format!("{} {bytes} {tau}", isa.name());
                    let [one, four] = [0, 1].map(|p| run(bytes, &pools[p]));
                    assert!(same_bits(&one.u, &four.u) && same_bits(&one.v, &four.v), "{what}");
                    assert_eq!(one.value, four.value, "{what}");
                    assert_eq!(one.value.loss, none.value.loss, "{what}");
                    let taus = [&one, &none].map(|got| [tau * got.value.grad_tau]);
                    let off = [(&one.u, &none.u), (&one.v, &none.v)].map(|(a, b)| relative(&wide(a), &wide(b), 0.0));
                    let off = off[0].max(off[1]).max(relative(&taus[0], &taus[1], 0.1));
                    let rounded = bytes > 0 && tau > 0.005;
                    assert!(off < 2f64.powi(-8) && (off > 0.0) == rounded, "{what}: {off:e}");
                }
            }
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config {
        cases: 200,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(250_524_134),
        ..Default::default()
    })]
    #[test]
    fn random_batches_match_the_reference(
        objective in proptest::sample::select(OBJECTIVES),
        tilting in proptest::sample::select(Tilting::ALL),
        (n, m, d) in (1usize..150, 1usize..150, 1usize..40),
        positive in proptest::sample::select(&[Positive::Diagonal, Positive::Index, Positive::Groups][..]),
        flags in proptest::array::uniform4(proptest::bool::ANY),
        seed in 0u64..u64::MAX,
    ) {
        let case = Case::new(tilting, objective, n, m, d);
        let mmd = case.moment != Moment::None;
        let case = if matches!(objective, Objective::JointShuffled { .. }) {
            Case { m: n, weights: flags[0], seed, ..case }
        } else {
            let smoothing = if flags[0] && !mmd { 0.2 } else { 0.0 };
            Case { positive, ignore: flags[1], weights: flags[2], offset: flags[3], smoothing, seed, ..case }
        };
        let data = case.data();
        let (loss, batch) = (case.loss(), data.batch(&case));
        let want = reference::loss(&loss, &batch).unwrap();
        let off = error(&evaluate(&mut Cpu::new(), &loss, &batch), &want, &case, &data);
// Where nothing is left of a gradient (cosine in one dimension), naive f32 has the same error.
        let naive = || error(&naive_f32(&case, &data), &want, &case, &data);
        proptest::prop_assert!(off < 1e-5 || off <= 4.0 * naive(), "{:e}: {:?}", off, case);
    }
}
