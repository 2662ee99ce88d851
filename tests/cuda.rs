//! The engine of a card, its kernels run by their host twin, against the f64 reference.
#![cfg(feature = "cuda")]
#![allow(missing_docs)]

mod common;
#[path = "common/twin.rs"]
mod twin;

use common::{Case, Data, OBJECTIVES, Positive, options, relative, wide};
use contrastive::device::cuda::Buffer;
use contrastive::device::cuda::contrast::Cuda;
use contrastive::objective::{Gradients, Objective, Precision, Storage, Tilting, Value, Write, reference};
use contrastive::{Batch, Engine, Loss, Matrix};
use half::{bf16, f16};
use std::sync::Arc;
use twin::Machine;

const PORTABLE: [u32; 2] = [8, 0];
const HOPPER: [u32; 2] = [9, 0];

#[derive(Clone, PartialEq, Debug)]
struct Got {
    value: Value,
    u: Vec<f32>,
    v: Vec<f32>,
    offset: Vec<f32>,
}

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
    got
}

/// Embeddings rounded to what the engine multiplies, so that the reference sees the same numbers.
fn round(x: &mut [f32], precision: Precision) {
    for x in x {
        *x = match precision {
            Precision::Bf16 => bf16::from_f32(*x).to_f32(),
            _ => f16::from_f32(*x).to_f32(),
        };
    }
}

/// What a careful program of this precision computes for cosine: unit rows rounded to halves, all the rest in f64.
fn rounded_rows(case: &Case, data: &Data, precision: Precision) -> reference::Reference {
    let unit = |x: &[f32]| -> (Vec<f32>, Vec<f64>) {
        let norms: Vec<f64> =
            x.chunks(case.d).map(|x| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()).collect();
        let mut unit: Vec<f32> = x
            .iter()
            .enumerate()
            .map(|(k, &x)| if norms[k / case.d] == 0.0 { 0.0 } else { (f64::from(x) / norms[k / case.d]) as f32 })
            .collect();
        round(&mut unit, precision);
        (unit, norms)
    };
    let ((u, norm_u), (v, norm_v)) = (unit(&data.u), unit(&data.v));
    let batch = Batch { u: Matrix::f32(&u, case.d), v: Matrix::f32(&v, case.d), ..data.batch(case) };
    let mut out = reference::loss(&Loss { tilting: Tilting::Dot, ..case.loss() }, &batch).unwrap();
    for (grad, x, norms) in [(&mut out.grad_u, &u, norm_u), (&mut out.grad_v, &v, norm_v)] {
        for ((g, x), norm) in grad.chunks_mut(case.d).zip(x.chunks(case.d)).zip(norms) {
            let along: f64 = g.iter().zip(x).map(|(g, &x)| g * f64::from(x)).sum();
            g.iter_mut().zip(x).for_each(|(g, &x)| {
                *g = if norm == 0.0 { 0.0 } else { (*g - along * f64::from(x)) / norm };
            });
        }
    }
    out
}

/// Errors of the gradients, the loss and its scalar gradients. Sums that cancel are held to a tenth of what they have
/// without.
fn errors(got: &reference::Reference, want: &reference::Reference, case: &Case) -> [f64; 6] {
    let (tau, size) = (case.tau, 1.0 / (case.tau * (case.n as f64).sqrt()));
    [
        relative(&got.grad_u, &want.grad_u, 0.1 * size),
        relative(&got.grad_v, &want.grad_v, 0.1 * size),
        relative(&got.grad_offset_v, &want.grad_offset_v, 0.1),
        relative(&[got.loss], &[want.loss], 0.1),
        relative(&[tau * got.grad_tau], &[tau * want.grad_tau], 0.1),
        relative(&[got.grad_bias], &[want.grad_bias], 0.1),
    ]
}

fn worst(errors: [f64; 6]) -> f64 {
    errors.into_iter().fold(0.0, |a: f64, b| if b.is_nan() { b } else { a.max(b) })
}

fn on_the_card(objective: Objective) -> bool {
    matches!(objective, Objective::Conditional { .. } | Objective::Joint | Objective::Sigmoid { .. })
}

/// Whether a case is worth the twin's time: all options at the first shapes, then the plain case and all of them
/// together, and at the largest, which has several tiles and chunks each way, two of the objectives.
fn worthwhile(k: usize, option: usize, case: &Case) -> bool {
    let together = case.weights && case.offset;
    match k {
        0 | 1 => true,
        2 => option == 0 || together && case.positive == Positive::Groups,
        _ => {
            let objectives = [OBJECTIVES[1], Objective::Joint, OBJECTIVES[6]];
            option == 0 && objectives[case.tilting as usize] == case.objective
                || together
                    && case.positive == Positive::Groups
                    && case.tilting == Tilting::L2
                    && case.objective == OBJECTIVES[0]
        }
    }
}

fn conforms(capability: [u32; 2]) {
    let card = Arc::new(Machine::new(capability, 7));
    let shapes = if card.is_card() { [SHAPES, LARGE].concat() } else { SHAPES.to_vec() };
    for precision in [Precision::Bf16, Precision::F16] {
        // Chunks smaller than the larger shapes, so that accumulation over chunks is seen.
        let mut engine = Cuda::new(&card, precision).with_chunk(256);
        if capability == PORTABLE {
            engine = engine.portable();
        }
        let mut largest = (0.0, None);
        for &objective in OBJECTIVES.iter().filter(|o| on_the_card(**o)) {
            for &tilting in Tilting::ALL {
                for (k, &(n, m, d)) in shapes.iter().enumerate() {
                    for (o, case) in options(Case::new(tilting, objective, n, m, d)).into_iter().enumerate() {
                        if !card.is_card() && !worthwhile(k, o, &case) {
                            continue;
                        }
                        let mut data = case.data();
                        round(&mut data.u, precision);
                        round(&mut data.v, precision);
                        let (loss, batch) = (case.loss(), data.batch(&case));
                        let want = reference::loss(&loss, &batch).unwrap();
                        let got = evaluate(&mut engine, &loss, &batch);
                        let got = reference::Reference {
                            loss: got.value.loss,
                            grad_u: wide(&got.u),
                            grad_v: wide(&got.v),
                            grad_tau: got.value.grad_tau,
                            grad_bias: got.value.grad_bias,
                            grad_offset_v: wide(&got.offset),
                        };
                        let found = errors(&got, &want, &case);
                        // What is left when unit rows are rounded first is the engine's own: the rounding of G.
                        let off = if tilting == Tilting::Cosine {
                            let naive = rounded_rows(&case, &data, precision);
                            let bound = 1e-2 + 2.0 * worst(errors(&naive, &want, &case));
                            assert!(worst(found) < bound, "{precision:?} {found:?}, bound {bound:e}: {case:?}");
                            worst(errors(&got, &naive, &case))
                        } else {
                            worst(found)
                        };
                        assert!(off < 1e-2, "{precision:?} {off:e}, {found:?}: {case:?}");
                        if off > largest.0 {
                            largest = (off, Some(case));
                        }
                    }
                }
            }
        }
        println!("{capability:?} {precision:?}: largest error {:.1e} at {:?}", largest.0, largest.1);
    }
}

const SHAPES: &[(usize, usize, usize)] = &[(1, 1, 1), (17, 31, 5), (131, 67, 33), (300, 300, 64)];

/// Besides, on a card.
const LARGE: &[(usize, usize, usize)] = &[(1000, 1300, 128), (777, 1029, 256), (1500, 1200, 515), (640, 2000, 1024)];

#[test]
fn portable_kernels_conform() {
    conforms(PORTABLE);
}

#[test]
fn hopper_kernels_conform() {
    conforms(HOPPER);
}

/// What is on the card already gives the bits that host memory gives, added to or over what was there; and the twin's
/// order of lanes and blocks changes none.
#[test]
fn embeddings_on_the_card_are_the_same_loss() {
    let case = Case::new(Tilting::Cosine, OBJECTIVES[0], 150, 290, 20);
    let data = case.data();
    let [u, v] = [&data.u, &data.v].map(|x| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
    let mut found = vec![];
    for (capability, seed) in [(HOPPER, 1), (HOPPER, 2), (PORTABLE, 3), (PORTABLE, 4)] {
        let card = Arc::new(Machine::new(capability, seed));
        let mut engine = Cuda::new(&card, Precision::Bf16).with_chunk(256);
        if capability == PORTABLE {
            engine = engine.portable();
        }
        let matrix = |x| Matrix { data: Storage::Bf16(x), rows: x.len() / case.d, dim: case.d };
        let batch = Batch { u: matrix(&u), v: matrix(&v), ..data.batch(&case) };
        let host = evaluate(&mut engine, &case.loss(), &batch);
        let (on_u, on_v) = (Buffer::of(&card, &u).unwrap(), Buffer::of(&card, &v).unwrap());
        let mut du = Buffer::of(&card, &vec![f32::NAN; u.len()]).unwrap();
        let mut dv = Buffer::of(&card, &vec![1f32; v.len()]).unwrap();
        let gradients = [Some(Write::Set(&mut du)), Some(Write::Add(&mut dv))];
        let value = engine.loss_on_card(&case.loss(), [&on_u, &on_v], case.d, gradients).unwrap();
        let (mut got_u, mut got_v) = (vec![0f32; u.len()], vec![0f32; v.len()]);
        du.download(.., &mut got_u).unwrap();
        dv.download(.., &mut got_v).unwrap();
        assert_eq!((value, &got_u), (host.value, &host.u));
        assert!(got_v.iter().zip(&host.v).all(|(g, h)| *g == 1.0 + h));
        let wrong = engine.loss_on_card(&case.loss(), [&on_u, &on_v], 7, [None, None]).unwrap_err();
        assert!(wrong.to_string().contains("rows of 7"), "{wrong}");
        found.push(host);
    }
    assert!(found[0] == found[1] && found[2] == found[3], "not the same bits again");
}
