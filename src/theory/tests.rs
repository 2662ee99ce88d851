use super::*;
use crate::data::{Side, gaussian2d::gaussian2d, gp::gp};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::f64::consts::PI;

/// Scalars, a row, a tall and a wide block of primes.
const SIZES: [(usize, usize); 4] = [(1, 1), (1, 4), (3, 2), (5, 7)];

/// `[rows, columns]` numbers, uniform in +-1.
fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f64> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A law of random covariance: a Gram matrix of random vectors, one more than dimensions so that it is well conditioned.
fn random_law(rng: &mut ChaCha8Rng, (nu, nv): (usize, usize)) -> Gaussian {
    let n = nu + nv;
    let x = matrix(&random(rng, n * (n + 1)), n, n + 1);
    let c = &x * x.transpose() + faer::Scale(0.1) * Mat::<f64>::identity(n, n);
    let block = |i, j, rows, columns| flat(c.submatrix(i, j, rows, columns));
    Gaussian::new(nu, nv, block(0, 0, nu, nu), block(0, nu, nu, nv), block(nu, nu, nv, nv)).unwrap()
}

fn laws(seed: u64) -> impl Iterator<Item = (ChaCha8Rng, Gaussian)> {
    (0..3).flat_map(move |draw| {
        SIZES.iter().map(move |&size| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed + draw);
            let law = random_law(&mut rng, size);
            (rng, law)
        })
    })
}

/// Largest entry of `a - b` as a fraction of the largest of `b`.
fn distance(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    (a - b).norm_max() / b.norm_max()
}

/// Rounding of a handful of products and solves at condition numbers up to about 1e4.
const ROUNDING: f64 = 1e-10;

fn assert_near(a: &Mat<f64>, b: &Mat<f64>) {
    assert!(distance(a, b) < ROUNDING, "{a:?} is not {b:?}");
}

fn assert_same(a: &Conditional, b: &Conditional) {
    for (a, b) in [(&a.mean, &b.mean), (&a.cov, &b.cov)] {
        assert_near(&matrix(a, a.len(), 1), &matrix(b, b.len(), 1));
    }
}

/// The blocks as matrices.
fn blocks(law: &Gaussian) -> [Mat<f64>; 3] {
    let (nu, nv) = (law.dim_u, law.dim_v);
    [matrix(&law.c_uu, nu, nu), matrix(&law.c_uv, nu, nv), matrix(&law.c_vv, nv, nv)]
}

/// The three pairs of tilting and loss that have a closed form.
#[derive(Clone, Copy, Debug)]
enum Problem {
    Conditional,
    L2,
    Joint,
}
const PROBLEMS: [Problem; 3] = [Problem::Conditional, Problem::L2, Problem::Joint];

impl Problem {
    fn optimum(self, theory: &Theory, rank: usize) -> Model<'_> {
        match self {
            Problem::Conditional => theory.conditional_optimum(rank),
            Problem::L2 => theory.l2_optimum(rank),
            Problem::Joint => theory.joint_optimum(rank),
        }
    }
    /// The loss; the weights are those of the conditional loss under `dot`, where they must not matter.
    fn loss(self, model: &Model<'_>, [lambda_u, lambda_v]: [f64; 2]) -> f64 {
        match self {
            Problem::Conditional => model.conditional_loss(lambda_u, lambda_v),
            Problem::L2 => model.conditional_loss(2.0, 0.0),
            Problem::Joint => model.joint_loss(),
        }
    }
    /// The model of encoders `[rank, dim_u]` and `[rank, dim_v]` at tau = 1, as training makes it.
    fn model<'a>(self, theory: &'a Theory, [g, h]: &[Mat<f64>; 2]) -> Model<'a> {
        match self {
            Problem::L2 => theory.l2(&flat(g.as_ref()), &flat(h.as_ref()), g.nrows(), 1.0),
            _ => theory.dot(&flat((g.transpose() * h).as_ref())),
        }
    }
    /// Encoders that keep the canonical directions `kept` at their stationary size.
    fn encoders(self, theory: &Theory, kept: &[usize]) -> [Mat<f64>; 2] {
        let sizes = |s: f64| match self {
            Problem::Conditional => [s.sqrt(); 2],
            // One G makes both A = G'H and B = G'G.
            Problem::L2 => [s / (1.0 - s * s).sqrt(), 1.0 / (1.0 - s * s).sqrt()],
            Problem::Joint => [(((1.0 + 4.0 * s * s).sqrt() - 1.0) / (2.0 * s)).sqrt(); 2],
        };
        let side = |directions: &Mat<f64>, root: &Mat<f64>, which: usize| {
            let n = root.nrows();
            let mut columns =
                Mat::from_fn(n, kept.len(), |i, j| directions[(i, kept[j])] * sizes(theory.sigma[kept[j]])[which]);
            root.transpose().solve_upper_triangular_in_place(&mut columns);
            columns.transpose().to_owned()
        };
        [side(&theory.p, &theory.root_u, 0), side(&theory.q, &theory.root_v, 1)]
    }
}

/// Encoders moved by `size` times a random step, relative to their own size.
fn moved(rng: &mut ChaCha8Rng, encoders: &[Mat<f64>; 2], size: f64) -> [Mat<f64>; 2] {
    encoders.each_ref().map(|e| {
        let scale = size * e.norm_max();
        Mat::from_fn(e.nrows(), e.ncols(), |i, j| e[(i, j)] + scale * rng.random_range(-1.0..1.0))
    })
}

/// Every closed form at every rank: encoders that realise it exist, the gradient vanishes there, and no step of any
/// size from there, no random encoders and no other choice of directions has a smaller loss.
#[test]
fn closed_forms_minimise_their_population_losses() {
    for (mut rng, law) in laws(100) {
        let theory = Theory::new(&law);
        for (problem, rank) in PROBLEMS.iter().flat_map(|&p| (1..=theory.sigma.len()).map(move |r| (p, r))) {
            let weights = [rng.random_range(0.1..2.0), rng.random_range(0.1..2.0)];
            let optimum = problem.optimum(&theory, rank);
            let least = problem.loss(&optimum, weights);
            let loss = |encoders: &[Mat<f64>; 2]| problem.loss(&problem.model(&theory, encoders), weights);

            let best = problem.encoders(&theory, &(0..rank).collect::<Vec<_>>());
            let realised = problem.model(&theory, &best);
            for (a, b) in [(&realised.m, &optimum.m), (&realised.w, &optimum.w), (&realised.z, &optimum.z)] {
                assert!((a - b).norm_max() <= ROUNDING * (1.0 + b.norm_max()), "{problem:?}, rank {rank}");
            }

            // Central differences along 8 random directions, and their size at a point 10% away, which is no optimum:
            // were the closed form off by a percent the first would be of the second's order.
            let slope = |rng: &mut ChaCha8Rng, at: &[Mat<f64>; 2]| -> f64 {
                (0..8).fold(0.0f64, |worst, _| {
                    let step = moved(rng, at, 1e-5);
                    let back = [0, 1].map(|i| faer::Scale(2.0) * &at[i] - &step[i]);
                    worst.max(((loss(&step) - loss(&back)) / 2e-5).abs())
                })
            };
            let away = best.each_ref().map(|e| e * faer::Scale(0.9));
            let (here, there) = (slope(&mut rng, &best), slope(&mut rng, &away));
            assert!(here < 1e-4 * there, "{problem:?}, rank {rank}: slope {here} at the optimum, {there} away");

            for size in [1e-3, 1e-2, 0.1, 1.0, 10.0] {
                for _ in 0..20 {
                    let at = loss(&moved(&mut rng, &best, size));
                    // The increase is of order size^2, far above the rounding of the loss.
                    assert!(at > least, "{problem:?}, rank {rank}: {at} a step {size} away is below {least}");
                }
            }
            if rank < theory.sigma.len() {
                // Stationary as well, but not the minimum: the last direction kept makes way for the first one left.
                let kept: Vec<usize> = (0..rank - 1).chain([rank]).collect();
                assert!(loss(&problem.encoders(&theory, &kept)) > least, "{problem:?}, rank {rank}");
                // And each further direction helps.
                assert!(problem.loss(&problem.optimum(&theory, rank + 1), weights) < least);
            }
        }
    }
}

/// Without the factors: at full rank the loss increases along any step of A (`dot`), whatever its rank.
#[test]
fn full_rank_forms_minimise_over_all_matrices() {
    for (mut rng, law) in laws(200) {
        let theory = Theory::new(&law);
        for problem in [Problem::Conditional, Problem::Joint] {
            let optimum = problem.optimum(&theory, usize::MAX);
            let (a, least) = (optimum.a(), problem.loss(&optimum, [0.3, 1.1]));
            let largest = a.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            for size in [1e-3, 0.1, 10.0] {
                let step: Vec<f64> = a.iter().map(|x| x + size * largest * rng.random_range(-1.0..1.0)).collect();
                assert!(problem.loss(&theory.dot(&step), [0.3, 1.1]) > least, "{problem:?}, step {size}");
            }
        }
    }
}

/// Published numbers for C = [[1.5, 1], [1, 1.5]].
#[test]
fn the_two_dimensional_example() {
    let theory = Theory::new(&gaussian2d());
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-14, "{found}, not {expected}");
    let normal = |law: Conditional, mean: f64, variance: f64| {
        near(law.mean[0], mean);
        near(law.cov[0], variance);
    };
    near(theory.correlations()[0], 2.0 / 3.0);
    normal(theory.u_given_v(), 2.0 / 3.0, 5.0 / 6.0);
    normal(theory.v_given_u(), 2.0 / 3.0, 5.0 / 6.0);

    let dot = theory.conditional_optimum(1);
    near(dot.a()[0], 4.0 / 9.0);
    normal(dot.u_given_v(), 2.0 / 3.0, 1.5);
    let law = dot.law().unwrap();
    near(law.c_uu[0], 2.7);
    near(law.c_vv[0], 2.7);

    let l2 = theory.l2_optimum(1);
    near(l2.a()[0], 4.0 / 5.0);
    near(l2.b()[0], 8.0 / 15.0);
    normal(l2.u_given_v(), 2.0 / 3.0, 5.0 / 6.0);
    normal(l2.v_given_u(), 3.0 / 7.0, 15.0 / 28.0);

    let joint = theory.joint_optimum(1);
    near(joint.a()[0], 1.0 / 3.0);
    normal(joint.u_given_v(), 0.5, 1.5);
    let law = joint.law().unwrap();
    near(law.c_uu[0], 2.0);
    near(law.c_vv[0], 2.0);
}

/// Errors of the Gaussian process experiment, from the sum of modes written out again.
#[test]
fn the_gaussian_process_numbers() {
    let psi = |j: f64, i: usize| 2.0f64.sqrt() * (j * PI * ((i as f64 + 0.5) / 12.0)).cos();
    let l = |j: f64| (j * j * PI * PI + 9.0).powi(-2);
    let c_uu = (0..144).map(|at| {
        let (i, k) = (at / 12, at % 12);
        let noise = if i == k { 0.05f64.powi(2) } else { 0.0 };
        (1..=1000).map(|j| l(f64::from(j)) * psi(f64::from(j), i) * psi(f64::from(j), k)).sum::<f64>() + noise
    });
    let c_uv = (0..60).map(|at| (at % 5 + 1) as f64).enumerate().map(|(at, j)| l(j).sqrt() * psi(j, at / 5));
    let c_vv = (0..25).map(|at| if at % 6 == 0 { 1.0 } else { 0.0 });
    let law = Gaussian::new(12, 5, c_uu.collect(), c_uv.collect(), c_vv.collect()).unwrap();

    // (d, err_u, err_v) as they were computed apart from this program: half a unit of the last one is allowed.
    let printed = [
        (0, 0.04068, 5e-6, 2.151, 5e-4),
        (1, 0.006974, 5e-7, 1.2204, 5e-5),
        (2, 0.001868, 5e-7, 0.5492, 5e-5),
        (3, 0.0006142, 5e-8, 0.2153, 5e-5),
        (4, 0.0001835, 5e-8, 0.06834, 5e-6),
        (5, 0.0, 1e-20, 0.0, 1e-20),
    ];
    for (rank, u, half_u, v, half_v) in printed {
        for law in [&law, &gp()] {
            let certificate = certify(law, &[0.0; 60], rank);
            let (found_u, found_v) = (certificate.optimum_u_given_v, certificate.optimum_v_given_u);
            assert!((found_u - u).abs() <= half_u, "d = {rank}: err_u {found_u}, not {u}");
            assert!((found_v - v).abs() <= half_v, "d = {rank}: err_v {found_v}, not {v}");
        }
    }
    // The generator's law is this one; its blocks agree to the rounding of a thousand terms.
    for (a, b) in blocks(&gp()).iter().zip(&blocks(&law)) {
        assert!(distance(a, b) < 1e-13);
    }
}

/// The true conditionals against their block formulas, as products: no inverse is taken on the way.
#[test]
fn exact_conditionals_satisfy_the_block_formulas() {
    for (_, law) in laws(300) {
        let theory = Theory::new(&law);
        let [c_uu, c_uv, c_vv] = blocks(&law);
        for (conditional, c_xx, c_xy, c_yy) in
            [(theory.u_given_v(), &c_uu, c_uv.as_ref(), &c_vv), (theory.v_given_u(), &c_vv, c_uv.transpose(), &c_uu)]
        {
            let mean = matrix(&conditional.mean, c_xx.nrows(), c_yy.nrows());
            let cov = matrix(&conditional.cov, c_xx.nrows(), c_xx.nrows());
            assert_near(&(&mean * c_yy), &c_xy.to_owned());
            assert_near(&(cov + mean * c_xy.transpose()), c_xx);
        }
        assert_eq!(theory.correlations().len(), law.dim_u.min(law.dim_v));
        assert!(
            theory.correlations().is_sorted_by(|a, b| a >= b)
                && theory.correlations().iter().all(|s| (0.0..1.0).contains(s))
        );
    }
}

/// The printed full-rank formulas and Corollaries 5.2 and 5.4.
#[test]
fn full_rank_forms_are_the_printed_ones() {
    for (_, law) in laws(400) {
        let theory = Theory::new(&law);
        let [c_uu, c_uv, c_vv] = blocks(&law);
        let (nu, nv) = (law.dim_u, law.dim_v);

        // Theorem 5.1: C_uu A C_vv = C_uv. Corollary 5.2: the means are exact, the covariances those of the marginals.
        let dot = theory.conditional_optimum(usize::MAX);
        assert_near(&(&c_uu * matrix(&dot.a(), nu, nv) * &c_vv), &c_uv);
        assert_same(&dot.u_given_v(), &Conditional { cov: law.c_uu.clone(), ..theory.u_given_v() });
        assert_same(&dot.v_given_u(), &Conditional { cov: law.c_vv.clone(), ..theory.v_given_u() });

        // Theorem 5.3: C_u|v A C_vv = C_uv and B = C_u|v^-1 - C_uu^-1. Corollary 5.4: u|v is exact, whole.
        let l2 = theory.l2_optimum(usize::MAX);
        let c_u_given_v = matrix(&theory.u_given_v().cov, nu, nu);
        assert_near(&(&c_u_given_v * matrix(&l2.a(), nu, nv) * &c_vv), &c_uv);
        assert_near(&(&c_u_given_v * matrix(&l2.b(), nu, nu) * &c_uu + &c_u_given_v), &c_uu);
        assert_same(&l2.u_given_v(), &theory.u_given_v());
        // Its least loss is minus the mutual information, -I = 1/2 sum log(1 - s^2): the model is the truth there.
        let information: f64 = theory.correlations().iter().map(|s| -0.5 * (1.0 - s * s).ln()).sum();
        assert!((l2.conditional_loss(2.0, 0.0) + information).abs() < ROUNDING);

        // And with the sides changed.
        let of_v = theory.l2_optimum_of_v(usize::MAX);
        assert_same(&of_v.v_given_u(), &theory.v_given_u());
        assert!((of_v.conditional_loss(0.0, 2.0) + information).abs() < ROUNDING);
        let swapped = Gaussian::new(nv, nu, law.c_vv.clone(), flat(c_uv.transpose()), law.c_uu.clone()).unwrap();
        let mirror = Theory::new(&swapped);
        for rank in 1..=nu.min(nv) {
            let (of_v, mirror) = (theory.l2_optimum_of_v(rank), mirror.l2_optimum(rank));
            assert_same(&of_v.v_given_u(), &mirror.u_given_v());
            assert_same(&of_v.u_given_v(), &mirror.v_given_u());
        }

        // Theorem 5.6, with X = C_uu A C_vv: stationarity, M (I - M'M)^-1 = R, is C_uv (C_vv^-1 - A' C_uu A) = X C_vv^-1.
        let a = matrix(&theory.joint_optimum(usize::MAX).a(), nu, nv);
        assert_near(&(&c_uv - &c_uv * a.transpose() * &c_uu * &a * &c_vv), &(&c_uu * &a * &c_vv));
    }
}

/// A model's law has the precision of its definition, and the conditionals of that law are the model's.
#[test]
fn laws_of_models_are_consistent() {
    for (mut rng, law) in laws(500) {
        let theory = Theory::new(&law);
        let (nu, nv) = (law.dim_u, law.dim_v);
        let random_l2 = theory.l2(&random(&mut rng, 2 * nu), &random(&mut rng, 2 * nv), 2, 0.7);
        for model in PROBLEMS.iter().flat_map(|p| [p.optimum(&theory, 1), p.optimum(&theory, 3)]).chain([random_l2]) {
            let tilted = model.law().expect("these are normalisable");
            let of_law = Theory::new(&tilted);
            assert_same(&of_law.u_given_v(), &model.u_given_v());
            assert_same(&of_law.v_given_u(), &model.v_given_u());

            // nu = exp(s) mu_u mu_v / Z has precision K = [[C_uu^-1 + B, -A], [-A', C_vv^-1 + D]]: for its u rows,
            // C_uu (K cov) = [C_uu, 0]; for its v rows the mirror image.
            let ([c_uu, _, c_vv], [t_uu, t_uv, t_vv]) = (blocks(&law), blocks(&tilted));
            let (a, b, d) = (matrix(&model.a(), nu, nv), matrix(&model.b(), nu, nu), matrix(&model.d(), nv, nv));
            assert_near(&(&t_uu + &c_uu * (&b * &t_uu - &a * t_uv.transpose())), &c_uu);
            assert_near(&(&t_vv + &c_vv * (&d * &t_vv - a.transpose() * &t_uv)), &c_vv);
            let zero = &t_uv + &c_uu * (&b * &t_uv - &a * &t_vv);
            assert!(zero.norm_max() < ROUNDING * c_uu.norm_max().max(t_uv.norm_max()));
        }
    }
}

/// Corollary 5.7 as printed, in the coordinates where C_uu^{1/2} is the identity's.
#[test]
fn marginals_are_the_printed_ones() {
    // C_uu = I, C_vv = I and C_uv = diag(s): P and Q are the identity.
    let s = [0.9, 0.5, 0.1];
    let eye = flat(Mat::<f64>::identity(3, 3).as_ref());
    let c_uv = flat(Mat::from_fn(3, 3, |i, j| if i == j { s[i] } else { 0.0 }).as_ref());
    let law = Gaussian::new(3, 3, eye.clone(), c_uv, eye).unwrap();
    let theory = Theory::new(&law);
    let h = |s: f64| ((1.0 + 4.0 * s * s).sqrt() - 1.0) / (2.0 * s);
    for rank in 0..=3 {
        for (model, f) in
            [(theory.conditional_optimum(rank), &(|s| s) as &dyn Fn(f64) -> f64), (theory.joint_optimum(rank), &h)]
        {
            let marginal = model.law().unwrap().c_uu;
            for (i, &s) in s.iter().enumerate() {
                let m = if i < rank { f(s) } else { 0.0 };
                assert!((marginal[4 * i] - 1.0 / (1.0 - m * m)).abs() < 1e-12, "rank {rank}, direction {i}");
            }
        }
        // The rank-r l2 form on the directions it keeps: M = s/(1 - s^2), W = s^2/(1 - s^2), so u|v there is exact.
        let conditional = theory.l2_optimum(rank).u_given_v();
        for (i, &s) in s.iter().enumerate() {
            let (mean, cov) = if i < rank { (s, 1.0 - s * s) } else { (0.0, 1.0) };
            assert!((conditional.mean[4 * i] - mean).abs() < 1e-12 && (conditional.cov[4 * i] - cov).abs() < 1e-12);
        }
    }
}

/// Outside the ball |M| < 1 exp(u'Av) has no mean: no law, an infinite joint loss, and a finite conditional one.
#[test]
fn dot_models_without_a_law() {
    let theory = Theory::new(&gaussian2d());
    for (a, has_law) in [(0.66, true), (0.67, false), (-0.67, false)] {
        let model = theory.dot(&[a]);
        assert_eq!(model.law().is_some(), has_law, "A = {a}, whitened {}", 1.5 * a);
        assert_eq!(model.joint_loss().is_finite(), has_law);
        assert!(model.conditional_loss(1.0, 1.0).is_finite());
    }
}

/// Theorem 3.10: with lambda_u + lambda_v = 2 the joint loss bounds the conditional loss of the same model.
#[test]
fn the_joint_loss_bounds_the_conditional_loss() {
    for (mut rng, law) in laws(600) {
        let theory = Theory::new(&law);
        for _ in 0..20 {
            let scale = rng.random_range(0.01..1.0) / (law.dim_u * law.dim_v) as f64;
            let a: Vec<f64> = random(&mut rng, law.dim_u * law.dim_v).iter().map(|x| x * scale).collect();
            let l2 =
                theory.l2(&random(&mut rng, law.dim_u), &random(&mut rng, law.dim_v), 1, rng.random_range(0.1..2.0));
            let lambda = rng.random_range(0.0..2.0);
            for model in [theory.dot(&a), l2] {
                assert!(model.conditional_loss(lambda, 2.0 - lambda) < model.joint_loss());
            }
        }
    }
}

/// The population losses are what sampling the definitions gives: s from the encoders and the tilting, means over
/// sampled pairs, normalisers over independent samples of the marginals.
#[test]
fn population_losses_by_monte_carlo() {
    let mut rng = ChaCha8Rng::seed_from_u64(700);
    let law = random_law(&mut rng, (3, 2));
    let theory = Theory::new(&law);
    let (g, h, tau) = (random(&mut rng, 2 * 3), random(&mut rng, 2 * 2), 1.7);
    let a = flat((matrix(&g, 2, 3).transpose() * matrix(&h, 2, 2) * faer::Scale(1.0 / tau)).as_ref());
    let (l2, dot) = (theory.l2(&g, &h, 2, tau), theory.dot(&a));

    // The joint loss takes all of them, the conditional ones, of count^2 work, the first 8000.
    let (all, count) = (64_000, 8000);
    let embed = |weight: &[f64], x: &[f32]| -> Vec<[f64; 2]> {
        let dim = weight.len() / 2;
        let row = |w: &[f64], x: &[f32]| w.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum::<f64>();
        x.chunks_exact(dim).map(|x| [row(&weight[..dim], x), row(&weight[dim..], x)]).collect()
    };
    let (pairs, others) = (law.sample(1, all), law.sample(2, all));
    let (u, v) = (embed(&g, pairs.side(Side::U)), embed(&h, pairs.side(Side::V)));
    let (other_u, other_v) = (embed(&g, others.side(Side::U)), embed(&h, others.side(Side::V)));
    let mean_and_error = |terms: &[f64]| {
        let n = terms.len() as f64;
        let mean = terms.iter().sum::<f64>() / n;
        let variance = terms.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / n;
        (mean, (variance / n).sqrt())
    };
    // At fixed seeds 4 standard errors do not flicker. The terms of the exact losses are of order 1, so that a wrong
    // factor in any of them is far outside.
    let check = |found: f64, error: f64, exact: f64| {
        assert!((found - exact).abs() < 4.0 * error, "{found} +- {error}, exactly {exact}");
        assert!(error < 0.02, "the check resolves the loss: {found} +- {error}");
    };
    type Logit<'a> = &'a dyn Fn(&[f64; 2], &[f64; 2]) -> f64;
    let s_dot: Logit<'_> = &|u, v| (u[0] * v[0] + u[1] * v[1]) / tau;
    let s_l2: Logit<'_> = &|u, v| -((u[0] - v[0]).powi(2) + (u[1] - v[1]).powi(2)) / (2.0 * tau);
    for (s, model) in [(s_dot, &dot), (s_l2, &l2)] {
        let mirrored: Logit<'_> = &|v, u| s(u, v);
        for (s, x, y, other_x, weights) in [(s, &u, &v, &other_u, [2.0, 0.0]), (mirrored, &v, &u, &other_v, [0.0, 2.0])]
        {
            // x given y: normalisers over one common sample of x, whose own error is that of the mean of its influence.
            let mut influence = vec![0.0; count];
            let terms: Vec<f64> = (x[..count].iter().zip(&y[..count]))
                .map(|(x, y)| {
                    let weights: Vec<f64> = other_x[..count].iter().map(|other| s(other, y).exp()).collect();
                    let mean = weights.iter().sum::<f64>() / count as f64;
                    influence.iter_mut().zip(weights).for_each(|(i, w)| *i += w / (mean * count as f64));
                    mean.ln() - s(x, y)
                })
                .collect();
            let ((found, error), (_, common)) = (mean_and_error(&terms), mean_and_error(&influence));
            check(found, error.hypot(common), model.conditional_loss(weights[0], weights[1]));
        }
    }
    // The joint loss, under l2: there exp(s) <= 1, so its mean has a small variance.
    let weights: Vec<f64> = (u.iter().zip(&other_v)).map(|(u, v)| s_l2(u, v).exp()).collect();
    let minus_s: Vec<f64> = (u.iter().zip(&v)).map(|(u, v)| -s_l2(u, v)).collect();
    let ((z, z_error), (minus_s, s_error)) = (mean_and_error(&weights), mean_and_error(&minus_s));
    check(minus_s + z.ln(), s_error + z_error / z, l2.joint_loss());
}

/// The certificate of the optimum, of nothing, and of a random A against errors written in the coordinates of the data.
#[test]
fn certificates() {
    for (mut rng, law) in laws(800) {
        let theory = Theory::new(&law);
        let (nu, nv) = (law.dim_u, law.dim_v);
        let [c_uu, _, c_vv] = blocks(&law);
        for rank in 1..=theory.sigma.len() {
            let best = certify(&law, &theory.conditional_optimum(rank).a(), rank);
            assert!((best.err_u_given_v - best.optimum_u_given_v).abs() < ROUNDING * best.signal_u_given_v);
            assert!((best.err_v_given_u - best.optimum_v_given_u).abs() < ROUNDING * best.signal_v_given_u);
            assert!(best.a_rel_error < ROUNDING);
            let nothing = certify(&law, &vec![0.0; nu * nv], rank);
            assert_eq!(nothing.err_u_given_v, nothing.signal_u_given_v);
            assert_eq!(nothing.err_v_given_u, nothing.signal_v_given_u);
            assert!((nothing.a_rel_error - 1.0).abs() < 1e-15);
            assert!(nothing.optimum_u_given_v < nothing.signal_u_given_v);

            let a = random(&mut rng, nu * nv);
            let found = certify(&law, &a, rank);
            let a = matrix(&a, nu, nv);
            let miss_u = &c_uu * &a - matrix(&theory.u_given_v().mean, nu, nv);
            let miss_v = &c_vv * a.transpose() - matrix(&theory.v_given_u().mean, nv, nu);
            let err_u = trace((&miss_u * &c_vv * miss_u.transpose()).as_ref());
            let err_v = trace((&miss_v * &c_uu * miss_v.transpose()).as_ref());
            assert!((found.err_u_given_v / err_u - 1.0).abs() < ROUNDING);
            assert!((found.err_v_given_u / err_v - 1.0).abs() < ROUNDING);
        }
    }
    // Against the optimum of another problem: the l2 model of full rank has u|v right, and nothing else need be.
    let theory = Theory::new(&gaussian2d());
    let l2 = theory.l2_optimum(1);
    let certificate = l2.certify(&l2);
    assert!(certificate.err_u_given_v < 1e-30 && certificate.err_v_given_u > 0.01 && certificate.a_rel_error == 0.0);
}

#[test]
#[should_panic(expected = "a 12 x 5 matrix")]
fn a_of_another_shape_is_refused() {
    certify(&gp(), &[0.0; 59], 5);
}

#[test]
fn draws_of_a_conditional_have_its_mean_and_covariance() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let law = random_law(&mut rng, (3, 2));
    let theory = Theory::new(&law);
    let y = [0.7, -1.3];
    let conditional = theory.u_given_v();
    let mean = conditional.mean_at(&y);
    for (i, mean) in mean.iter().enumerate() {
        let row = &conditional.mean[i * 2..][..2];
        assert!((mean - (row[0] * y[0] + row[1] * y[1])).abs() < 1e-12);
    }
    let count = 40_000;
    let draws = conditional.sample(&y, count, 11);
    assert_eq!(draws.len(), count * 3);
    for i in 0..3 {
        for j in 0..3 {
            let x: Vec<f64> = draws.chunks_exact(3).map(|x| (x[i] - mean[i]) * (x[j] - mean[j])).collect();
            let got = x.iter().sum::<f64>() / count as f64;
            let [ii, ij, jj] = [(i, i), (i, j), (j, j)].map(|(i, j)| conditional.cov[i * 3 + j]);
            let sigma = ((ii * jj + ij * ij) / count as f64).sqrt();
            assert!((got - ij).abs() < 4.5 * sigma, "cov[{i}, {j}]: {got}, {ij}");
        }
        let drawn = draws.iter().skip(i).step_by(3).sum::<f64>() / count as f64;
        assert!((drawn - mean[i]).abs() < 4.5 * (conditional.cov[i * 4] / count as f64).sqrt());
    }
}

#[test]
fn either_side_may_be_too_large_for_f64() {
    let theory = Theory::new(&gaussian2d());
    let has = |g: f64, h: f64| theory.l2(&[g], &[h], 1, 1.0).has_conditionals();
    assert!(has(1.0, 2.0) && !has(1e8, 1e-8) && !has(1e-8, 1e8));
}
