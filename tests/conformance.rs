//! Every engine against the f64 reference: one set of properties, one line an engine.
#![allow(missing_docs)]

mod common;

use common::{Case, Data, Half, Moment, OBJECTIVES, Positive, options, relative, wide};
use contrastive::device::cpu::Isa;
use contrastive::objective::{Gradients, Objective, Positives, Tilting, Value, Write, reference};
use contrastive::{Batch, Cpu, Engine, Loss};

const SHAPES: &[(usize, usize, usize)] =
    &[(1, 1, 1), (1, 1, 7), (2, 3, 5), (17, 17, 3), (31, 57, 19), (101, 101, 33), (130, 67, 128), (257, 300, 64)];

struct Got {
    value: Value,
    u: Vec<f32>,
    v: Vec<f32>,
    offset: Vec<f32>,
}

/// Evaluates over poisoned outputs.
fn evaluate(engine: &mut impl Engine, loss: &Loss, batch: &Batch<'_>) -> Got {
    let (n, m, d) = (batch.u.rows, batch.v.rows, batch.u.dim);
    let mut got =
        Got { value: Value::default(), u: vec![f32::NAN; n * d], v: vec![f32::NAN; m * d], offset: vec![f32::NAN; m] };
    let gradients = Gradients {
        u: Some(Write::Set(&mut got.u)),
        v: Some(Write::Set(&mut got.v)),
        offset_v: (!matches!(loss.objective, Objective::JointShuffled { .. })).then_some(Write::Set(&mut got.offset)),
    };
    got.value = engine.loss(loss, batch, gradients).unwrap();
    got
}

/// The size gradients have when nothing cancels: G near 1/N an entry, times what the tilting multiplies it with.
fn natural_size(case: &Case, data: &Data) -> [f64; 2] {
    let rms =
        |x: &[f32]| (x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() * case.d as f64 / x.len() as f64).sqrt();
    let (u, v) = (rms(&data.u), rms(&data.v));
    let [row_u, row_v] = match case.tilting {
        Tilting::Cosine => [1.0 / u, 1.0 / v],
        Tilting::Dot => [v, u],
        Tilting::L2 => [u + v, u + v],
    };
    [row_u / case.tau / (case.n as f64).sqrt(), row_v / case.tau / (case.m as f64).sqrt()]
}

/// Largest error of any output. Sums that cancel (a gradient that happens to be near zero) are held to a
/// twentieth of what they have without cancellation, as any f32 arithmetic would be.
fn error(got: &Got, want: &reference::Reference, case: &Case, data: &Data) -> f64 {
    let tau = case.tau;
    let [size_u, size_v] = natural_size(case, data);
    let mut worst = relative(&wide(&got.u), &want.grad_u, 0.05 * size_u);
    worst = worst.max(relative(&wide(&got.v), &want.grad_v, 0.05 * size_v));
    worst = worst.max(relative(&[got.value.loss], &[want.loss], 0.1));
    worst = worst.max(relative(&[tau * got.value.grad_tau], &[tau * want.grad_tau], 0.1));
    worst = worst.max(relative(&[got.value.grad_bias], &[want.grad_bias], 0.1));
    if case.offset {
        worst = worst.max(relative(&wide(&got.offset), &want.grad_offset_v, 0.1));
    }
    worst
}

fn matches_the_reference<E: Engine>(make: impl Fn() -> E) {
    // One engine for all: its scratch then holds other shapes' leftovers, which must not show.
    let mut engine = make();
    let mut worst = (0.0, None);
    let mut count = 0;
    for &objective in OBJECTIVES {
        for &tilting in Tilting::ALL {
            for &(n, m, d) in SHAPES {
                for case in options(Case::new(tilting, objective, n, m, d)) {
                    // The exact Gram reference is O(N^3).
                    if case.moment != Moment::None && n > 150 && case.moment != Moment::Features {
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

// The engine sees 16-bit storage and so does the reference: what is left is f32 accumulation.
fn half_storage_loses_nothing_more<E: Engine>(make: impl Fn() -> E) {
    let mut engine = make();
    for &objective in OBJECTIVES {
        for &tilting in Tilting::ALL {
            for bf16 in [true, false] {
                let case = Case::new(tilting, objective, 61, 61, 40);
                let data = case.data();
                let (u, v) = (Half::new(&data.u), Half::new(&data.v));
                let batch = Batch { u: u.matrix(bf16, 40), v: v.matrix(bf16, 40), ..data.batch(&case) };
                let want = reference::loss(&case.loss(), &batch).unwrap();
                let off = error(&evaluate(&mut engine, &case.loss(), &batch), &want, &case, &data);
                assert!(off < 1e-5, "{off:e}: {case:?}");
            }
        }
    }
}

/// Everything finite; as near the reference as logits rounded to f32 allow.
fn survives_extremes<E: Engine>(make: impl Fn() -> E) {
    let mut engine = make();
    for &objective in OBJECTIVES {
        for &tilting in Tilting::ALL {
            for (scale, tau) in [(1.0, 1e-3), (60.0, 1.0), (1e-12, 1.0)] {
                for what in ["random", "identical rows", "zero rows", "zeros"] {
                    let mut case = Case::new(tilting, objective, 45, 45, 24);
                    case.tau = tau;
                    let mut data = case.data();
                    for x in [&mut data.u, &mut data.v] {
                        x.iter_mut().for_each(|x| *x *= scale);
                        match what {
                            "identical rows" => (1..45).for_each(|i| x.copy_within(0..24, i * 24)),
                            "zero rows" => x[5 * 24..9 * 24].fill(0.0),
                            "zeros" => x.fill(0.0),
                            _ => {}
                        }
                    }
                    let (loss, batch) = (case.loss(), data.batch(&case));
                    let want = reference::loss(&loss, &batch).unwrap();
                    let got = evaluate(&mut engine, &loss, &batch);
                    let finite = got.u.iter().chain(&got.v).all(|x| x.is_finite());
                    let value = got.value;
                    assert!(finite && value.loss.is_finite() && value.grad_tau.is_finite(), "{what} {scale} {case:?}");
                    // A logit s is known to about |s| 2^-24 a few times over; its exponential to that, relatively.
                    let largest = largest_logit(&case, &data);
                    let tolerance = 1e-5 + largest * 4.0 * 2f64.powi(-24) * 4.0;
                    let off = relative(&[value.loss], &[want.loss], 1.0 + largest);
                    assert!(off < 1e-5, "loss {off:e} {what} {scale} {case:?}");
                    if tolerance < 0.1 {
                        let [size_u, size_v] =
                            natural_size(&case, &data).map(|x| (0.05 * x).max(f64::from(f32::MIN_POSITIVE)));
                        let off = relative(&wide(&got.u), &want.grad_u, size_u);
                        assert!(off < tolerance, "grad_u {off:e} of {tolerance:e} {what} {scale} {case:?}");
                        let off = relative(&wide(&got.v), &want.grad_v, size_v);
                        assert!(off < tolerance, "grad_v {off:e} of {tolerance:e} {what} {scale} {case:?}");
                    }
                    if tilting == Tilting::Cosine && what == "zero rows" {
                        assert!(got.u[5 * 24..9 * 24].iter().all(|&g| g == 0.0), "a zero row has no gradient");
                    }
                }
            }
        }
    }
}

fn largest_logit(case: &Case, data: &Data) -> f64 {
    let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let largest = |x: &[f32]| x.chunks(case.d).map(norm).fold(0.0, f64::max);
    let (u, v) = (largest(&data.u), largest(&data.v));
    match case.tilting {
        Tilting::Cosine => 1.0 / case.tau,
        Tilting::Dot => u * v / case.tau,
        Tilting::L2 => (u + v).powi(2) / 2.0 / case.tau,
    }
}

/// The same bits on any pool, and whatever outputs are asked for.
fn is_deterministic<E: Engine + Send>(make: impl Fn() -> E + Sync) {
    for &objective in OBJECTIVES {
        let case = Case::new(Tilting::Cosine, objective, 700, 700, 20);
        let case = if case.moment == Moment::None { case } else { Case { n: 300, m: 300, ..case } };
        let data = case.data();
        let (loss, batch) = (case.loss(), data.batch(&case));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| evaluate(&mut make(), &loss, &batch))
        };
        let one = run(1);
        for threads in [2, 3, 4] {
            let got = run(threads);
            let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same(&one.u, &got.u) && same(&one.v, &got.v), "{objective:?} on {threads} threads");
            assert_eq!(one.value, got.value, "{objective:?} on {threads} threads");
        }
        let alone = make().loss(&loss, &batch, Gradients::default()).unwrap();
        assert_eq!(alone, one.value, "{objective:?} without gradients");
    }
}

fn adds_when_told_to<E: Engine>(make: impl Fn() -> E) {
    let mut engine = make();
    for &objective in OBJECTIVES {
        for &tilting in Tilting::ALL {
            let case = Case { offset: false, ..Case::new(tilting, objective, 37, 37, 18) };
            let data = case.data();
            let (loss, batch) = (case.loss(), data.batch(&case));
            let set = evaluate(&mut engine, &loss, &batch);
            let (mut u, mut v) = (vec![3.0f32; 37 * 18], vec![-2.0f32; 37 * 18]);
            let gradients = Gradients { u: Some(Write::Add(&mut u)), v: Some(Write::Add(&mut v)), offset_v: None };
            engine.loss(&loss, &batch, gradients).unwrap();
            assert!(u.iter().zip(&set.u).all(|(a, s)| *a == 3.0 + s), "{case:?}");
            assert!(v.iter().zip(&set.v).all(|(a, s)| *a == -2.0 + s), "{case:?}");
        }
    }
}

fn refuses_bad_input<E: Engine>(make: impl Fn() -> E) {
    let case = Case::new(Tilting::Dot, OBJECTIVES[0], 4, 4, 3);
    let data = case.data();
    let (loss, batch) = (case.loss(), data.batch(&case));
    let mut not_finite = data.u.clone();
    not_finite[7] = f32::NAN;
    let short = [1.0f32; 3];
    let losses = [
        ("tau", Loss { tau: 0.0, ..loss }),
        ("tau", Loss { tau: f64::NAN, ..loss }),
        ("tau", Loss { tau: f64::INFINITY, ..loss }),
        ("smoothing", Loss { smoothing: 1.0, ..loss }),
        ("lambda_u", Loss { objective: Objective::Conditional { lambda_u: -1.0, lambda_v: 1.0 }, ..loss }),
        ("lambda_u and lambda_v", Loss { objective: Objective::Conditional { lambda_u: 0.0, lambda_v: 0.0 }, ..loss }),
        ("bias", Loss { objective: Objective::Sigmoid { bias: f64::NAN }, ..loss }),
        ("moments", Loss { objective: Objective::JointMmd, ..loss }),
        ("pairings", Loss { objective: Objective::JointShuffled { pairings: 0, seed: 0 }, ..loss }),
    ];
    let with = |pairs| Batch { pairs, ..batch };
    let empty = contrastive::Matrix::f32(&[], 3);
    let batches = [
        ("u row 2", Batch { u: contrastive::Matrix::f32(&not_finite, 3), ..batch }),
        ("u", Batch { u: empty, ..batch }),
        ("v", Batch { v: contrastive::Matrix { rows: 5, ..batch.v }, ..batch }),
        ("columns of v", Batch { v: contrastive::Matrix::f32(&data.v, 4), ..batch }),
        (
            "positives",
            with(contrastive::objective::Pairs { positives: Positives::Index(&[0, 1, 2, 4]), ..batch.pairs }),
        ),
        ("positives", with(contrastive::objective::Pairs { positives: Positives::Index(&[0, 1]), ..batch.pairs })),
        (
            "groups",
            with(contrastive::objective::Pairs {
                positives: Positives::Groups { u: &[1; 4], v: &[2; 4] },
                ..batch.pairs
            }),
        ),
        ("weights of u", with(contrastive::objective::Pairs { weights_u: Some(&short), ..batch.pairs })),
        ("weights of u", with(contrastive::objective::Pairs { weights_u: Some(&[0.0; 4]), ..batch.pairs })),
        ("weights of v", with(contrastive::objective::Pairs { weights_v: Some(&[-1.0; 4]), ..batch.pairs })),
        ("offset_v", Batch { offset_v: Some(&short), ..batch }),
    ];
    let cases = losses.map(|(what, loss)| (what, loss, batch)).into_iter();
    for (what, loss, batch) in cases.chain(batches.map(|(what, batch)| (what, loss, batch))) {
        let mut u = vec![7.0f32; 12];
        let gradients = Gradients { u: Some(Write::Set(&mut u)), ..Gradients::default() };
        let error = make().loss(&loss, &batch, gradients).unwrap_err().to_string();
        assert!(error.starts_with(what), "{what}: {error}");
        assert!(u.iter().all(|&x| x == 7.0), "{what}: outputs were touched");
    }
    let mut long = vec![0.0f32; 13];
    let gradients = Gradients { v: Some(Write::Set(&mut long)), ..Gradients::default() };
    assert!(make().loss(&loss, &batch, gradients).is_err());
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
                super::half_storage_loses_nothing_more($make);
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
    fastest: || Cpu::<f32>::new(),
    portable: || Cpu::<f32>::with_isa(*Isa::available().last().unwrap()),
}

// Whatever lies between the fastest and the portable one.
#[test]
fn other_instruction_sets_match_the_reference() {
    let all = Isa::available();
    for &isa in &all[1..all.len() - 1] {
        println!("{}", isa.name());
        matches_the_reference(|| Cpu::<f32>::with_isa(isa));
    }
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 200, failure_persistence: None, ..Default::default() })]
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
        proptest::prop_assert!(off < 1e-5, "{:e}: {:?}", off, case);
    }
}
