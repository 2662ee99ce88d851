//! The engine of a card, its kernels run by their host twin, against the f64 reference.
#![cfg(feature = "cuda")]
#![allow(missing_docs)]

mod common;
#[allow(dead_code, reason = "each test program takes what it needs of it")]
#[path = "common/twin.rs"]
mod twin;

use common::{Case, Data, Moment, OBJECTIVES, Positive, options, relative, wide};
use contrastive::data::Table;
use contrastive::device::cuda::card::Card;
use contrastive::device::cuda::contrast::{Block, CardRows};
use contrastive::device::cuda::random::normals;
use contrastive::device::cuda::search::Searcher;
use contrastive::device::cuda::{Buffer, Cuda};
use contrastive::objective::{
    Gradients, LossError, Objective, Pairs, Precision, Storage, Tilting, Value, Write, pairing, reference,
};
use contrastive::tasks::retrieval::{recall, recall_on, top_k, top_k_on};
use contrastive::{Batch, Engine, Loss, Matrix};
use half::{bf16, f16};
use rayon::prelude::*;
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

impl Got {
    fn wide(&self) -> reference::Reference {
        reference::Reference {
            loss: self.value.loss,
            grad_u: wide(&self.u),
            grad_v: wide(&self.v),
            grad_tau: self.value.grad_tau,
            grad_bias: self.value.grad_bias,
            grad_offset_v: wide(&self.offset),
        }
    }
}

/// The gradient of the offset where there is one: it takes sums over G, which the fastest kernels do not make.
fn evaluate(engine: &mut impl Engine, loss: &Loss, batch: &Batch<'_>) -> Got {
    let (n, m, d) = (batch.u.rows, batch.v.rows, batch.u.dim);
    let mut got = Got {
        value: Value::default(),
        u: vec![f32::NAN; n * d],
        v: vec![f32::NAN; m * d],
        offset: vec![f32::NAN; if batch.offset_v.is_some() { m } else { 0 }],
    };
    let gradients = Gradients {
        u: Some(Write::Set(&mut got.u)),
        v: Some(Write::Set(&mut got.v)),
        offset_v: batch.offset_v.map(|_| Write::Set(&mut got.offset[..])),
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

/// What a careful program of this precision computes: what it multiplies is rounded to halves, features from their mean
/// and for cosine unit rows; all the rest is f64.
fn careful(case: &Case, data: &Data, precision: Precision) -> reference::Reference {
    // The joint loss is another one for features that are moved.
    let centred = case.objective != Objective::JointMmd;
    let features = |x: &[f32], dim: usize| -> Vec<f32> {
        let rows = x.len() / dim;
        let mean = |k: usize| (0..rows).map(|i| f64::from(x[i * dim + k])).sum::<f64>() / rows as f64;
        let mean: Vec<f32> = (0..dim).map(|k| if centred { mean(k) as f32 } else { 0.0 }).collect();
        let mut out: Vec<f32> = x.iter().enumerate().map(|(at, x)| x - mean[at % dim]).collect();
        round(&mut out, precision);
        out.iter_mut().enumerate().for_each(|(at, x)| *x += mean[at % dim]);
        out
    };
    let data = &Data {
        x: features(&data.x, 3),
        y: features(&data.y, 2),
        feature_u: features(&data.feature_u, 12),
        feature_v: features(&data.feature_v, 8),
        ..data.clone()
    };
    if case.tilting != Tilting::Cosine {
        return reference::loss(&case.loss(), &data.batch(case)).unwrap();
    }
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
    // G of MMD is a product of two rounded factors, and cosine's logits are of the size of 1/tau: what d tau has without
    // cancelling is that much larger.
    let moment = if case.moment != Moment::None && case.tilting == Tilting::Cosine { 0.1 / tau } else { 0.1 };
    // MMD's value is a difference of squared lengths: about 3 and 2 of the raw data, and 1 of features.
    let value = if case.moment == Moment::Linear { 0.5 } else { 0.1 };
    [
        relative(&got.grad_u, &want.grad_u, 0.1 * size),
        relative(&got.grad_v, &want.grad_v, 0.1 * size),
        if got.grad_offset_v.is_empty() { 0.0 } else { relative(&got.grad_offset_v, &want.grad_offset_v, 0.1) },
        relative(&[got.loss], &[want.loss], value),
        relative(&[tau * got.grad_tau], &[tau * want.grad_tau], moment),
        relative(&[got.grad_bias], &[want.grad_bias], 0.1),
    ]
}

fn worst(errors: [f64; 6]) -> f64 {
    errors.into_iter().fold(0.0, f64::max)
}

fn on_the_card(case: &Case) -> bool {
    case.moment != Moment::Gaussian
}

/// Whether a case is worth the twin's time: all options at the first shapes in bf16, else the plain case and all of them
/// together, and at the largest, which has several tiles and chunks each way, two of the objectives.
fn worthwhile(k: usize, option: usize, case: &Case, precision: Precision) -> bool {
    let together = case.weights && case.offset;
    let few = option == 0 || together;
    if k < 2 && case.moment != Moment::None {
        // Raw data against all that rounding leaves of sums that should be nothing.
        let whole = matches!(case.objective, Objective::Mmd { .. }) && case.tilting == Tilting::Cosine;
        return few || case.moment == Moment::Linear && (k == 0 && !case.ignore || k == 1 && case.ignore && whole);
    }
    match k {
        0 | 1 => few || precision == Precision::Bf16,
        2 => option == 0 || together && case.positive == Positive::Groups,
        _ if matches!(case.objective, Objective::JointShuffled { .. }) => true,
        _ => {
            let objectives = [[OBJECTIVES[1], OBJECTIVES[7]], [OBJECTIVES[4], OBJECTIVES[8]], [OBJECTIVES[6]; 2]];
            option == 0 && objectives[case.tilting as usize].contains(&case.objective)
                || together
                    && case.positive == Positive::Groups
                    && case.tilting == Tilting::L2
                    && case.objective == OBJECTIVES[0]
        }
    }
}

fn conforms(capability: [u32; 2], precision: Precision) {
    let card = Machine::new(capability, 7);
    let card = Arc::new(if precision == Precision::F16 { card.with_room() } else { card });
    let shapes = if card.is_card() { [SHAPES, LARGE].concat() } else { SHAPES.to_vec() };
    // Chunks smaller than the larger shapes, so that accumulation over chunks is seen.
    let mut engine = Cuda::new(&card, precision).with_chunk(256);
    if capability == PORTABLE {
        engine = engine.portable();
    }
    let mut cases = vec![];
    for &objective in OBJECTIVES {
        for &tilting in Tilting::ALL {
            for (k, &(n, m, d)) in shapes.iter().enumerate() {
                for (o, case) in options(Case::new(tilting, objective, n, m, d)).into_iter().enumerate() {
                    // On a card the reference is what takes time, at the large shapes.
                    let thorough = card.is_card() && k < SHAPES.len();
                    if on_the_card(&case) && (thorough || worthwhile(k, o, &case, precision)) {
                        cases.push(case);
                    }
                }
            }
        }
    }
    let (largest, at) = hold(&mut engine, precision, &cases);
    println!("{capability:?} {precision:?}: largest error {largest:.1e} at {at:?}");
}

/// Holds all `cases` to their bounds, and tells of all that are beyond; the largest error, and whose it is.
fn hold<C: Card>(engine: &mut Cuda<C>, precision: Precision, cases: &[Case]) -> (f64, Option<Case>) {
    let (mut largest, mut beyond) = ((0.0, None), vec![]);
    // References of a few cases at once, for processors that wait for a card.
    for cases in cases.chunks(32) {
        let known: Vec<_> = cases
            .par_iter()
            .map(|case| {
                let mut data = case.data();
                round(&mut data.u, precision);
                round(&mut data.v, precision);
                let want = reference::loss(&case.loss(), &data.batch(case)).unwrap();
                let rounded = case.tilting == Tilting::Cosine || case.moment != Moment::None;
                let naive = rounded.then(|| careful(case, &data, precision));
                (data, want, naive)
            })
            .collect();
        for (case, (data, want, naive)) in cases.iter().zip(known) {
            let got = evaluate(engine, &case.loss(), &data.batch(case)).wide();
            let found = errors(&got, &want, case);
            let most = 1e-2;
            // What is left when unit rows and features are rounded first is the engine's own: the rounding of G.
            let (off, bound) = match naive {
                Some(naive) => (worst(errors(&got, &naive, case)), most + 2.0 * worst(errors(&naive, &want, case))),
                None => (worst(found), most),
            };
            let within = worst(found) < bound && off < most;
            if !within {
                beyond.push(format!("{off:e}, {found:?}, bound {bound:e}: {case:?}"));
            }
            if off > largest.0 {
                largest = (off, Some(*case));
            }
        }
    }
    assert!(beyond.is_empty(), "{precision:?}, {} of {} cases:\n{}", beyond.len(), cases.len(), beyond.join("\n"));
    largest
}

#[test]
fn joint_mmd_of_raw_data_is_within_its_bound() {
    let card = Arc::new(Machine::new(PORTABLE, 7));
    let case = Case::new(Tilting::Dot, Objective::JointMmd, 17, 31, 5);
    let case = Case { moment: Moment::Linear, positive: Positive::Index, ignore: true, offset: true, ..case };
    hold(&mut Cuda::new(&card, Precision::Bf16).portable(), Precision::Bf16, &[case]);
}

const SHAPES: &[(usize, usize, usize)] = &[(1, 1, 1), (17, 31, 5), (131, 67, 33), (300, 300, 64)];

/// Besides, on a card.
const LARGE: &[(usize, usize, usize)] = &[(520, 700, 128), (391, 517, 256), (640, 530, 515), (260, 650, 1024)];

/// Batches large enough for plain pairs, which Hopper tallies by one exponential for both sides: at ordinary temperatures, at
/// one at which the sums from the anchor do not hold, with pairs of which none is plain, and one-sided.
#[test]
fn plain_pairs_conform() {
    for precision in [Precision::Bf16, Precision::F16] {
        let card = Arc::new(Machine::new(HOPPER, 7));
        let mut engine = Cuda::new(&card, precision).with_chunk(512);
        let case = |objective| Case::new(Tilting::Cosine, objective, 520, 790, 20);
        let one_sided = Objective::Conditional { lambda_u: 1.5, lambda_v: 0.0 };
        let cases = [
            Case { tau: 0.01, ..case(OBJECTIVES[0]) },
            Case { tau: 1e-4, ..case(OBJECTIVES[0]) },
            Case { positive: Positive::Groups, ..case(OBJECTIVES[0]) },
            case(one_sided),
            case(Objective::Joint),
            // No row has a plain pair, so no flag tells how far below the anchor a row's maximum is.
            Case { positive: Positive::Groups, tau: 0.001, ..Case::new(Tilting::Cosine, OBJECTIVES[0], 300, 600, 64) },
        ];
        let (largest, at) = hold(&mut engine, precision, &cases);
        println!("{precision:?}: largest error {largest:.1e} at {at:?}");
    }
}

/// The joint loss of drawn pairings: rows longer than a warp holds, more pairings than lanes, and the same as the host's.
#[test]
fn drawn_pairings_conform() {
    for precision in [Precision::Bf16, Precision::F16] {
        let card = Arc::new(Machine::new(PORTABLE, 7));
        let mut engine = Cuda::new(&card, precision);
        let mut cases = vec![];
        for (n, d, pairings) in [(1, 1, 1), (17, 5, 3), (130, 33, 40), (1100, 3, 2), (33, 1030, 2), (9, 513, 5)] {
            for &tilting in Tilting::ALL {
                let objective = Objective::JointShuffled { pairings, seed: 11 };
                let case = Case::new(tilting, objective, n, n, d);
                // Long rows without a temperature to match have logits of one pair and nothing else.
                let case = Case { tau: case.tau * (d as f64 / 5.0).max(1.0).sqrt(), ..case };
                cases.extend([case, Case { weights: true, ..case }]);
            }
        }
        let (largest, at) = hold(&mut engine, precision, &cases);
        println!("{precision:?}: largest error {largest:.1e} at {at:?}");
    }
}

/// The card's own orders are those that the host's pairings, and the reference, are drawn by.
#[test]
fn orders_of_the_card_are_the_hosts() {
    for n in [1, 2, 3, 5, 31, 32, 33, 1000, 65_537] {
        for (seed, k) in [(0, 0), (11, 2), (u64::MAX, 77)] {
            let order = kernels::random::Order::new(seed, !u64::from(k), n as u64);
            let card: Vec<usize> = (0..n as u64).map(|i| order.at(i) as usize).collect();
            assert!(card == pairing(n, seed, k), "{n}, {seed}, {k}");
        }
    }
}

/// Numbers drawn on the card are those that the host draws.
#[test]
fn normals_on_the_card_are_the_hosts() {
    let card = Arc::new(Machine::new(PORTABLE, 3));
    let len = 10_007usize;
    let host: Vec<f32> =
        (0..len.div_ceil(4) as u64).flat_map(|index| kernels::random::normals(5, 1, index, f32::sqrt)).collect();
    let mut got = vec![0f32; len];
    normals::<f32, _>(&card, len, 5, 1).unwrap().download(.., &mut got).unwrap();
    // A NaN is within no bound.
    let near = |got: f32, want: f32, bound: f32| (got - want).abs() <= bound;
    let far = got.iter().zip(&host).position(|(got, want)| !near(*got, *want, 1e-5 * want.abs().max(1.0)));
    assert!(far.is_none(), "{far:?}");
    let mut halves = vec![bf16::ZERO; len];
    normals::<bf16, _>(&card, len, 5, 1).unwrap().download(.., &mut halves).unwrap();
    let far = halves.iter().zip(&host).position(|(got, want)| !near(got.to_f32(), *want, want.abs() / 255.0));
    assert!(far.is_none(), "{far:?}");
}

#[test]
fn portable_kernels_conform_in_bf16() {
    conforms(PORTABLE, Precision::Bf16);
}

#[test]
fn portable_kernels_conform_in_f16() {
    conforms(PORTABLE, Precision::F16);
}

#[test]
fn hopper_kernels_conform_in_bf16() {
    conforms(HOPPER, Precision::Bf16);
}

#[test]
fn hopper_kernels_conform_in_f16() {
    conforms(HOPPER, Precision::F16);
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
        let value =
            engine.loss_on_card(&case.loss(), &Pairs::default(), [&on_u, &on_v], case.d, None, gradients).unwrap();
        let (mut got_u, mut got_v) = (vec![0f32; u.len()], vec![0f32; v.len()]);
        du.download(.., &mut got_u).unwrap();
        dv.download(.., &mut got_v).unwrap();
        assert_eq!((value, &got_u), (host.value, &host.u));
        assert!(got_v.iter().zip(&host.v).all(|(g, h)| *g == 1.0 + h));
        let wrong =
            engine.loss_on_card(&case.loss(), &Pairs::default(), [&on_u, &on_v], 7, None, [None, None]).unwrap_err();
        assert!(wrong.to_string().contains("rows of 7"), "{wrong}");
        found.push(host);
    }
    assert!(found[0] == found[1] && found[2] == found[3], "not the same bits again");
}

/// Ranks with blocks of uneven size, on a grid of two by two and beyond the pairs: what they find adds up to the whole.
#[test]
fn blocks_add_up_to_the_whole() {
    for (capability, precision, n, m) in [(PORTABLE, Precision::Bf16, 150, 290), (HOPPER, Precision::F16, 290, 150)] {
        for (objective, tilting) in [
            (OBJECTIVES[1], Tilting::Cosine),
            (OBJECTIVES[2], Tilting::Dot),
            (Objective::Joint, Tilting::L2),
            (OBJECTIVES[6], Tilting::L2),
        ] {
            let case = Case::new(tilting, objective, n, m, 12);
            let mut data = case.data();
            round(&mut data.u, precision);
            round(&mut data.v, precision);
            let (loss, d) = (case.loss(), case.d);
            let want = reference::loss(&loss, &data.batch(&case)).unwrap();
            let card = Arc::new(Machine::new(capability, 5));
            let mut engine = Cuda::new(&card, precision).with_chunk(256);
            if capability == PORTABLE {
                engine = engine.portable();
            }
            let cut = |len: usize| [(0, 70), (70, len - 70)];
            let part =
                |x: &[f32], (first, len): (usize, usize)| Buffer::of(&card, &x[first * d..(first + len) * d]).unwrap();
            let ranks: Vec<_> = cut(n)
                .into_iter()
                .flat_map(|rows| cut(m).map(|cols| (rows, cols)))
                .map(|(rows, cols)| {
                    let block = Block { at: [rows.0, cols.0], whole: [n, m] };
                    (block, part(&data.u, rows), part(&data.v, cols))
                })
                .collect();
            let own: Vec<_> =
                ranks.iter().map(|(at, u, v)| engine.tally_block(&loss, [u, v], d, *at).unwrap()).collect();
            let mut got = Got { value: Value::default(), u: vec![0.0; n * d], v: vec![0.0; m * d], offset: vec![] };
            for (k, (block, u, v)) in ranks.iter().enumerate() {
                let mut all = own[k].clone();
                for (other, _) in own.iter().enumerate().filter(|(other, _)| *other != k) {
                    if other / 2 == k / 2 {
                        all.merge_rows(&own[other]);
                    }
                    if other % 2 == k % 2 {
                        all.merge_cols(&own[other]);
                    }
                    all.merge_all(&own[other]);
                }
                let mut grads = [u.len(), v.len()].map(|len| Buffer::of(&card, &vec![f32::NAN; len]).unwrap());
                let gradients = grads.each_mut().map(|g| Some(Write::Set(g)));
                let value = engine.pull_block(&loss, [u, v], d, *block, &all, gradients).unwrap();
                got.value.loss += value.loss;
                got.value.grad_tau += value.grad_tau;
                got.value.grad_bias += value.grad_bias;
                for ((grad, sum), first) in grads.iter().zip([&mut got.u, &mut got.v]).zip(block.at) {
                    let mut part = vec![0f32; grad.len()];
                    grad.download(.., &mut part).unwrap();
                    sum[first * d..].iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
            }
            let got = reference::Reference { grad_offset_v: want.grad_offset_v.clone(), ..got.wide() };
            let judge = if tilting == Tilting::Cosine { careful(&case, &data, precision) } else { want };
            let off = worst(errors(&got, &judge, &case));
            assert!(off < 1e-2, "{precision:?} {off:e}: {case:?}");
        }
    }
}

/// A rank that is not in the whole, or brings tallies of other rows, is told so.
#[test]
fn blocks_that_do_not_fit_are_refused() {
    let card = Arc::new(Machine::new(PORTABLE, 5));
    let mut engine = Cuda::new(&card, Precision::Bf16);
    let case = Case::new(Tilting::Dot, OBJECTIVES[0], 20, 20, 4);
    let x = Buffer::of(&card, &case.data().u).unwrap();
    let mut refused = |loss: &Loss, at: [usize; 2], whole: [usize; 2]| {
        engine.tally_block(loss, [&x, &x], 4, Block { at, whole }).unwrap_err().to_string()
    };
    let outside = refused(&case.loss(), [0, 30], [40, 40]);
    assert!(outside.contains("30 to 50") && outside.contains("0 to 40"), "{outside}");
    let smooth = refused(&Loss { smoothing: 0.1, ..case.loss() }, [0, 0], [20, 20]);
    assert!(smooth.contains("smoothing"), "{smooth}");
    let mmd = refused(&Loss { objective: Objective::JointMmd, ..case.loss() }, [0, 0], [20, 20]);
    assert!(mmd.contains("mmd or joint-mmd"), "{mmd}");
    let block = Block { at: [0, 0], whole: [20, 20] };
    let mut tallies = engine.tally_block(&case.loss(), [&x, &x], 4, block).unwrap();
    tallies.rows.pop();
    let short = engine.pull_block(&case.loss(), [&x, &x], 4, block, &tallies, [None, None]).unwrap_err();
    assert!(short.to_string().contains("tallies of rows"), "{short}");
}

/// By the scores of a card the same items are found, in the same order, and the same ranks, copies of items among them.
#[test]
fn search_is_that_of_the_cpu() {
    for (n, m, dim, k) in [(1, 1, 1, 1), (5, 300, 20, 7), (150, 150, 33, 40)] {
        let case = Case::new(Tilting::Dot, OBJECTIVES[0], n, m, dim);
        let Data { u, mut v, .. } = case.data();
        v.copy_within(..m / 3 * dim, m / 2 * dim);
        let [u, v] = [&u, &v].map(|data| Table { data, dim });
        for &tilting in Tilting::ALL {
            let card = Arc::new(Machine::new(PORTABLE, 3));
            let mut device = Searcher::new(&card);
            assert_eq!(
                top_k_on(&mut device, tilting, &u, &v, k).unwrap(),
                top_k(tilting, &u, &v, k).unwrap(),
                "{tilting:?} {n} {m}"
            );
            if n == m {
                assert_eq!(
                    recall_on(&mut device, tilting, &u, &v).unwrap(),
                    recall(tilting, &u, &v).unwrap(),
                    "{tilting:?} {n}"
                );
            }
        }
    }
}

/// Features that are on the card give the bits that host memory gives; without them, or with half a row, MMD is refused.
#[test]
fn features_on_the_card_are_the_same_loss() {
    for (objective, capability) in [(OBJECTIVES[7], PORTABLE), (Objective::JointMmd, HOPPER)] {
        let case = Case::new(Tilting::Dot, objective, 40, 70, 6);
        let data = case.data();
        let card = Arc::new(Machine::new(capability, 3));
        let mut engine = Cuda::new(&card, Precision::Bf16);
        let host = evaluate(&mut engine, &case.loss(), &data.batch(&case));
        let [u, v, x, y] = [&data.u, &data.v, &data.feature_u, &data.feature_v].map(|x| Buffer::of(&card, x).unwrap());
        let mut du = Buffer::of(&card, &vec![f32::NAN; u.len()]).unwrap();
        let gradients = [Some(Write::Set(&mut du)), None];
        let value =
            engine.loss_on_card(&case.loss(), &Pairs::default(), [&u, &v], 6, Some([&x, &y]), gradients).unwrap();
        let mut got = vec![0f32; u.len()];
        du.download(.., &mut got).unwrap();
        assert!(host.value.loss != 0.0 && got.iter().any(|g| *g != 0.0));
        assert_eq!((value.loss, value.grad_tau, &got), (host.value.loss, host.value.grad_tau, &host.u));
        let none = engine.loss_on_card(&case.loss(), &Pairs::default(), [&u, &v], 6, None, [None, None]).unwrap_err();
        assert!(none.to_string().contains("moments"), "{none}");
        let short = Buffer::of(&card, &data.feature_u[1..]).unwrap();
        let torn = engine
            .loss_on_card(&case.loss(), &Pairs::default(), [&u, &v], 6, Some([&short, &y]), [None, None])
            .unwrap_err();
        assert!(torn.to_string().contains("data of u"), "{torn}");
    }
}

/// Rows of f32 or of halves at raw addresses give the reference's loss, set or added, with pairs of every kind and with MMD's
/// features; addresses of which there could be no loss are refused.
#[test]
fn raw_addresses_are_the_same_loss() {
    let precision = Precision::Bf16;
    let with = |case| Case { positive: Positive::Groups, ignore: true, weights: true, ..case };
    let cases = [
        with(Case::new(Tilting::Cosine, OBJECTIVES[1], 70, 40, 6)),
        with(Case::new(Tilting::L2, OBJECTIVES[6], 40, 70, 5)),
        with(Case::new(Tilting::Dot, OBJECTIVES[7], 40, 70, 6)),
        Case::new(Tilting::Dot, Objective::JointMmd, 40, 70, 6),
    ];
    for (case, capability) in cases.into_iter().zip([PORTABLE, HOPPER, PORTABLE, HOPPER]) {
        let mut data = case.data();
        round(&mut data.u, precision);
        round(&mut data.v, precision);
        let rounded = case.tilting == Tilting::Cosine || case.moment != Moment::None;
        let (loss, pairs) = (case.loss(), data.batch(&case).pairs);
        let want = if rounded {
            careful(&case, &data, precision)
        } else {
            reference::loss(&loss, &data.batch(&case)).unwrap()
        };
        let card = Arc::new(Machine::new(capability, 3));
        let mut engine = Cuda::new(&card, precision);
        let counts = [case.n, case.m];
        let singles = [&data.u, &data.v].map(|x| Buffer::of(&card, x).unwrap());
        let halves = [&data.u, &data.v].map(|x| {
            let x: Vec<_> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            Buffer::of(&card, &x).unwrap()
        });
        let features = (case.moment != Moment::None).then(|| {
            [(&data.feature_u, case.n), (&data.feature_v, case.m)]
                .map(|(x, rows)| (Buffer::of(&card, x).unwrap(), rows))
        });
        let features = features.as_ref().map(|f| {
            f.each_ref().map(|(x, rows)| CardRows {
                at: x.ptr(..).unwrap().cast(),
                singles: true,
                rows: *rows,
                dim: x.len() / rows,
            })
        });
        let rows_at = |at: [*const (); 2], singles| {
            [0, 1].map(|which| CardRows { at: at[which], singles, rows: counts[which], dim: case.d })
        };
        let from = [
            rows_at(singles.each_ref().map(|x| x.ptr(..).unwrap().cast()), true),
            rows_at(halves.each_ref().map(|x| x.ptr(..).unwrap().cast()), false),
        ];
        for rows in from {
            // One is there already, and is added to or is not.
            let mut grads = counts.map(|count| Buffer::of(&card, &vec![1f32; count * case.d]).unwrap());
            let [du, dv] = grads.each_mut().map(|g| g.ptr_mut(..).unwrap());
            let out = [Some(Write::Set(du)), Some(Write::Add(dv))];
            // SAFETY: addresses of buffers of these rows, which live and are nobody else's.
            let value = unsafe { engine.loss_at(&loss, precision, &pairs, rows, features, out) }.unwrap();
            let [u, v] = grads.map(|g| {
                let mut got = vec![0f32; g.len()];
                g.download(.., &mut got).unwrap();
                got
            });
            let v = v.iter().map(|g| g - 1.0).collect();
            let off = worst(errors(&Got { value, u, v, offset: vec![] }.wide(), &want, &case));
            assert!(off < 1e-2, "{off:e}, singles {}: {case:?}", rows[0].singles);
        }
        let [u, v] = from[0];
        let mut refused = |pairs: &Pairs<'_>, rows, features, out| {
            // SAFETY: addresses of buffers that live, or what is refused before it is read.
            let refused = unsafe { engine.loss_at(&loss, precision, pairs, rows, features, out) }.unwrap_err();
            assert!(matches!(refused, LossError::Shape { .. } | LossError::Parameter { .. }), "{refused}");
            refused.to_string()
        };
        let mut expect = |what: &str, pairs: &Pairs<'_>, rows, features, out| {
            let why = refused(pairs, rows, features, out);
            assert!(why.starts_with(what), "{what}: {why}");
        };
        expect("columns of v", &pairs, [u, CardRows { dim: case.d - 1, ..v }], features, [None; 2]);
        expect("u: ", &pairs, [CardRows { at: std::ptr::null(), ..u }, v], features, [None; 2]);
        expect("v: ", &pairs, [u, CardRows { rows: 0, ..v }], features, [None; 2]);
        expect("u: ", &pairs, [u, v].map(|r| CardRows { dim: 0, ..r }), features, [None; 2]);
        expect("gradient of v", &pairs, [u, v], features, [None, Some(Write::Add(std::ptr::null_mut()))]);
        let (few, many) = (vec![0; 3], vec![0; case.m]);
        expect("ignore ids of u", &Pairs { ignore: Some((&few, &many)), ..pairs }, [u, v], features, [None; 2]);
        if let Some([x, y]) = features {
            expect("moments", &pairs, [u, v], None, [None; 2]);
            expect("rows of data of v", &pairs, [u, v], Some([x, CardRows { rows: 3, ..y }]), [None; 2]);
            expect("data of u", &pairs, [u, v], Some([CardRows { at: std::ptr::null(), ..x }, y]), [None; 2]);
        }
    }
}
