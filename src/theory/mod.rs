//! Closed forms of the Gaussian theory (section 5 of the paper), in f64: what training is certified against.
//!
//! For `(u, v) ~ N(0, C)` and linear encoders `g_u = G u`, `g_v = H v` the `dot` and `l2` tiltings are quadratic,
//!
//! ```text
//! s(u, v) = u' A v - u' B u / 2 - v' D v / 2,   A = G'H/tau,   dot: B = D = 0,   l2: B = G'G/tau, D = H'H/tau
//! ```
//!
//! so every model is Gaussian and every population loss has a closed form. All of it is written in the whitened
//! coordinates `x = L_u^-1 u`, `y = L_v^-1 v` with `C_uu = L_u L_u'`, `C_vv = L_v L_v'`: there the marginals are
//! standard, the truth is the one matrix `R = L_u^-1 C_uv L_v^-T = P Sigma Q'`, and a model is
//! `M = L_u' A L_v`, `W = L_u' B L_u`, `Z = L_v' D L_v`. Sigma holds the canonical correlations. Any other root of
//! C_uu turns R by an orthogonal matrix and leaves A, B, D and all that is returned here as they are, so the
//! Cholesky factor stands for the paper's symmetric root. docs/theory.md derives what the paper does not print.
//!
//! A, B and D are what training identifies; G and H only up to a rotation, and under `dot` up to scale.

use crate::data::gaussian2d::Gaussian;
use faer::{Mat, MatRef, Side};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// A Gaussian law of pairs in its canonical form.
#[derive(Clone, Debug)]
pub struct Theory {
    /// `L_u`, lower triangular.
    root_u: Mat<f64>,
    /// `L_v`, lower triangular.
    root_v: Mat<f64>,
    /// R, `[dim_u, dim_v]`.
    r: Mat<f64>,
    /// P, `[dim_u, k]`, with `k = min(dim_u, dim_v)`.
    p: Mat<f64>,
    /// The diagonal of Sigma, `[k]`, decreasing.
    sigma: Vec<f64>,
    /// Q, `[dim_v, k]`.
    q: Mat<f64>,
}

/// A quadratic tilting of the product of a Gaussian's marginals.
#[derive(Clone, Debug)]
pub struct Model<'a> {
    theory: &'a Theory,
    /// M, `[dim_u, dim_v]`.
    m: Mat<f64>,
    /// W, `[dim_u, dim_u]`, positive semi-definite.
    w: Mat<f64>,
    /// Z, `[dim_v, dim_v]`, positive semi-definite.
    z: Mat<f64>,
}

/// A Gaussian conditional law `x | y ~ N(mean y, cov)`, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Conditional {
    /// The mean operator, `[dim_x, dim_y]`.
    pub mean: Vec<f64>,
    /// The covariance, `[dim_x, dim_x]`.
    pub cov: Vec<f64>,
}

impl Conditional {
    /// The mean given `y`, which is also the mode: the best u for a v in the sense of retrieval. `[dim_x]`.
    ///
    /// # Panics
    /// When `y` has another length than the law's.
    pub fn mean_at(&self, y: &[f64]) -> Vec<f64> {
        let n = self.dim();
        assert_eq!(self.mean.len(), n * y.len(), "the mean of {n} numbers given {}", y.len());
        let row = |row: &[f64]| row.iter().zip(y).map(|(a, y)| a * y).sum();
        self.mean.chunks_exact(y.len()).map(row).collect()
    }
    /// `count` independent draws given `y` by `seed`, `[count, dim_x]`.
    ///
    /// # Panics
    /// As [`mean_at`](Conditional::mean_at).
    pub fn sample(&self, y: &[f64], count: usize, seed: u64) -> Vec<f64> {
        let (n, mean) = (self.dim(), self.mean_at(y));
        let root = matrix(&self.cov, n, n).llt(Side::Lower).expect("a conditional covariance is positive definite");
        let root = root.L();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut out = Vec::with_capacity(count * n);
        let mut z = vec![0f64; n];
        for _ in 0..count {
            z.fill_with(|| StandardNormal.sample(&mut rng));
            out.extend((0..n).map(|i| mean[i] + (0..=i).map(|j| root[(i, j)] * z[j]).sum::<f64>()));
        }
        out
    }
    /// Numbers in x.
    fn dim(&self) -> usize {
        self.cov.len().isqrt()
    }
}

/// How far a learned model's conditional means are from the truth, beside the best that its rank allows.
/// Errors are `E |E_model[x|y] - E_truth[x|y]|^2` over the true law of y, summed over components and exact.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Certificate {
    /// Error of E[u|v].
    pub err_u_given_v: f64,
    /// Error of E[v|u].
    pub err_v_given_u: f64,
    /// Error of E[u|v] of the optimum.
    pub optimum_u_given_v: f64,
    /// Error of E[v|u] of the optimum.
    pub optimum_v_given_u: f64,
    /// Error of E[u|v] of the model that learned nothing: `E |E[u|v]|^2`.
    pub signal_u_given_v: f64,
    /// Error of E[v|u] of the model that learned nothing: `E |E[v|u]|^2`.
    pub signal_v_given_u: f64,
    /// `|A - A*|_F / |A*|_F` against the optimum's A; not a number when the optimum's A is zero.
    pub a_rel_error: f64,
}

/// Certifies linear encoders trained with `dot` and a conditional loss against the rank-`rank` optimum of Theorem 5.1.
/// `a` is `G'H/tau`, row-major `[dim_u, dim_v]`.
///
/// # Panics
/// When `a` has another length.
pub fn certify(gaussian: &Gaussian, a: &[f64], rank: usize) -> Certificate {
    let theory = Theory::new(gaussian);
    theory.dot(a).certify(&theory.conditional_optimum(rank))
}

impl Theory {
    /// Factors the covariance of `gaussian`.
    ///
    /// # Panics
    /// When the covariance is not finite and positive definite, which [`Gaussian::new`] has checked.
    pub fn new(gaussian: &Gaussian) -> Self {
        let (nu, nv) = (gaussian.dim_u, gaussian.dim_v);
        let root = |c: &[f64], n| {
            matrix(c, n, n).llt(Side::Lower).expect("a Gaussian's covariance is positive definite").L().to_owned()
        };
        let (root_u, root_v) = (root(&gaussian.c_uu, nu), root(&gaussian.c_vv, nv));
        let mut r = matrix(&gaussian.c_uv, nu, nv);
        root_u.solve_lower_triangular_in_place(&mut r);
        root_v.solve_lower_triangular_in_place(r.transpose_mut());
        let svd = r.thin_svd().expect("a finite matrix has singular values");
        let sigma = svd.S().column_vector().iter().copied().collect();
        Theory { p: svd.U().to_owned(), sigma, q: svd.V().to_owned(), root_u, root_v, r }
    }
    /// The canonical correlations, `min(dim_u, dim_v)` numbers in [0, 1), decreasing.
    pub fn correlations(&self) -> &[f64] {
        &self.sigma
    }
    /// The true law of u given v.
    pub fn u_given_v(&self) -> Conditional {
        truth(self.root_u.as_ref(), self.root_v.as_ref(), self.r.as_ref())
    }
    /// The true law of v given u.
    pub fn v_given_u(&self) -> Conditional {
        truth(self.root_v.as_ref(), self.root_u.as_ref(), self.r.transpose())
    }
    /// The `dot` model of `a = G'H/tau`, row-major `[dim_u, dim_v]`.
    ///
    /// # Panics
    /// When `a` has another length.
    pub fn dot(&self, a: &[f64]) -> Model<'_> {
        let (nu, nv) = (self.root_u.nrows(), self.root_v.nrows());
        let m = self.root_u.transpose() * matrix(a, nu, nv) * &self.root_v;
        Model { theory: self, m, w: Mat::zeros(nu, nu), z: Mat::zeros(nv, nv) }
    }
    /// The `l2` model of the encoders `g` `[dim, dim_u]` and `h` `[dim, dim_v]`, row-major, at temperature `tau`.
    ///
    /// # Panics
    /// When `g` and `h` have other lengths.
    pub fn l2(&self, g: &[f64], h: &[f64], dim: usize, tau: f64) -> Model<'_> {
        let g = matrix(g, dim, self.root_u.nrows()) * &self.root_u;
        let h = matrix(h, dim, self.root_v.nrows()) * &self.root_v;
        let over_tau = faer::Scale(1.0 / tau);
        Model {
            theory: self,
            m: g.transpose() * &h * over_tau,
            w: g.transpose() * &g * over_tau,
            z: h.transpose() * &h * over_tau,
        }
    }
    /// The minimiser of the conditional loss under `dot`, for any weights, among A of rank at most `rank` (Theorem 5.1).
    pub fn conditional_optimum(&self, rank: usize) -> Model<'_> {
        self.optimum(rank, |s| [s, 0.0, 0.0])
    }
    /// The minimiser of the one-sided (2, 0) loss under `l2` among encoders of dimension `rank` (Theorem 5.3; its
    /// rank-r form is derived in docs/theory.md). Where a correlation is zero that loss leaves D free: it is the limit here.
    pub fn l2_optimum(&self, rank: usize) -> Model<'_> {
        self.optimum(rank, |s| {
            let rest = (1.0 - s) * (1.0 + s);
            [s / rest, s * s / rest, 1.0 / rest]
        })
    }
    /// That of the one-sided (0, 2) loss: the mirror image.
    pub fn l2_optimum_of_v(&self, rank: usize) -> Model<'_> {
        self.optimum(rank, |s| {
            let rest = (1.0 - s) * (1.0 + s);
            [s / rest, 1.0 / rest, s * s / rest]
        })
    }
    /// The minimiser of the joint loss under `dot` among A of rank at most `rank` (Theorem 5.6).
    pub fn joint_optimum(&self, rank: usize) -> Model<'_> {
        // h(s) = (sqrt(1 + 4 s^2) - 1)/(2 s), without its cancellation at small s.
        self.optimum(rank, |s| [2.0 * s / (1.0 + (1.0 + 4.0 * s * s).sqrt()), 0.0, 0.0])
    }
    /// `M = P_r m Q_r'`, `W = P_r w P_r'`, `Z = Q_r z Q_r'` for the diagonals `[m, w, z]` of each leading correlation.
    fn optimum(&self, rank: usize, diagonals: impl Fn(f64) -> [f64; 3]) -> Model<'_> {
        let rank = rank.min(self.sigma.len());
        let (p, q) = (self.p.subcols(0, rank), self.q.subcols(0, rank));
        let product = |left: MatRef<'_, f64>, which: usize, right: MatRef<'_, f64>| {
            Mat::from_fn(left.nrows(), rank, |i, j| left[(i, j)] * diagonals(self.sigma[j])[which]) * right.transpose()
        };
        Model { theory: self, m: product(p, 0, q), w: product(p, 1, p), z: product(q, 2, q) }
    }
}

impl Model<'_> {
    /// A, row-major `[dim_u, dim_v]`.
    pub fn a(&self) -> Vec<f64> {
        unwhiten(self.theory.root_u.as_ref(), self.m.as_ref(), self.theory.root_v.as_ref())
    }
    /// B, row-major `[dim_u, dim_u]`.
    pub fn b(&self) -> Vec<f64> {
        unwhiten(self.theory.root_u.as_ref(), self.w.as_ref(), self.theory.root_u.as_ref())
    }
    /// D, row-major `[dim_v, dim_v]`.
    pub fn d(&self) -> Vec<f64> {
        unwhiten(self.theory.root_v.as_ref(), self.z.as_ref(), self.theory.root_v.as_ref())
    }
    /// The model's law of u given v: `N((B + C_uu^-1)^-1 A v, (B + C_uu^-1)^-1)` (Corollaries 5.2 and 5.4).
    pub fn u_given_v(&self) -> Conditional {
        self.given_v().conditional()
    }
    /// The model's law of v given u: `N((D + C_vv^-1)^-1 A' u, (D + C_vv^-1)^-1)`.
    pub fn v_given_u(&self) -> Conditional {
        self.given_u().conditional()
    }
    /// The model's joint law, whose `c_uu` and `c_vv` are its marginals (Corollary 5.7). `None` when the tilting cannot be
    /// normalised over the product of the marginals: under `dot`, when a singular value of M is 1 or more.
    pub fn law(&self) -> Option<Gaussian> {
        let cov = inverse(self.precision().as_ref())?;
        let (nu, nv) = (self.m.nrows(), self.m.ncols());
        let (l_u, l_v) = (&self.theory.root_u, &self.theory.root_v);
        let c_uu = l_u * cov.submatrix(0, 0, nu, nu) * l_u.transpose();
        let c_uv = l_u * cov.submatrix(0, nu, nu, nv) * l_v.transpose();
        let c_vv = l_v * cov.submatrix(nu, nu, nv, nv) * l_v.transpose();
        Gaussian::new(nu, nv, flat(c_uu.as_ref()), flat(c_uv.as_ref()), flat(c_vv.as_ref())).ok()
    }
    /// The population value of the conditional loss (Problem 3.13):
    /// `lambda_u/2 E[-s + log E_u' exp s(u', v)] + lambda_v/2 E[-s + log E_v' exp s(u, v')]`.
    pub fn conditional_loss(&self, lambda_u: f64, lambda_v: f64) -> f64 {
        0.5 * (lambda_u * self.given_v().loss() + lambda_v * self.given_u().loss())
    }
    /// The population value of the joint loss (Problem 3.7), `-E s + log E_u' E_v' exp s(u', v')`; infinite where
    /// [`law`](Model::law) is `None`.
    pub fn joint_loss(&self) -> f64 {
        let minus_s =
            0.5 * (trace(self.w.as_ref()) + trace(self.z.as_ref())) - inner(self.m.as_ref(), self.theory.r.as_ref());
        log_det(self.precision().as_ref()).map_or(f64::INFINITY, |log_det| minus_s - 0.5 * log_det)
    }
    /// Whether f64 tells both conditional laws: of a precision I + W four digits of I are left.
    pub fn has_conditionals(&self) -> bool {
        const MOST: f64 = 1e12;
        [&self.w, &self.z].iter().all(|w| trace(w.as_ref()) < MOST) && self.m.norm_l2().is_finite()
    }
    /// This model's errors beside those of `optimum`, a model of the same law.
    pub fn certify(&self, optimum: &Model<'_>) -> Certificate {
        let nothing = self.theory.conditional_optimum(0);
        let (a, best) = (self.a(), optimum.a());
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        Certificate {
            err_u_given_v: self.given_v().error(),
            err_v_given_u: self.given_u().error(),
            optimum_u_given_v: optimum.given_v().error(),
            optimum_v_given_u: optimum.given_u().error(),
            signal_u_given_v: nothing.given_v().error(),
            signal_v_given_u: nothing.given_u().error(),
            a_rel_error: norm(&mut a.iter().zip(&best).map(|(a, b)| a - b)) / norm(&mut best.iter().copied()),
        }
    }
    /// The precision of the whitened joint law, `[[I + W, -M], [-M', I + Z]]`.
    fn precision(&self) -> Mat<f64> {
        let (nu, nv) = (self.m.nrows(), self.m.ncols());
        Mat::from_fn(nu + nv, nu + nv, |i, j| {
            f64::from(i == j)
                + match (i < nu, j < nu) {
                    (true, true) => self.w[(i, j)],
                    (true, false) => -self.m[(i, j - nu)],
                    (false, true) => -self.m[(j, i - nu)],
                    (false, false) => self.z[(i - nu, j - nu)],
                }
        })
    }
    fn given_v(&self) -> Given<'_> {
        let Theory { root_u, root_v, r, .. } = self.theory;
        Given { root: root_u.as_ref(), other: root_v.as_ref(), r: r.as_ref(), m: self.m.as_ref(), w: self.w.as_ref() }
    }
    fn given_u(&self) -> Given<'_> {
        let Theory { root_u, root_v, r, .. } = self.theory;
        Given {
            root: root_v.as_ref(),
            other: root_u.as_ref(),
            r: r.transpose(),
            m: self.m.transpose(),
            w: self.z.as_ref(),
        }
    }
}

/// One conditional of a model: of u given v as named, of v given u with the sides exchanged.
struct Given<'a> {
    root: MatRef<'a, f64>,
    other: MatRef<'a, f64>,
    r: MatRef<'a, f64>,
    m: MatRef<'a, f64>,
    w: MatRef<'a, f64>,
}

impl Given<'_> {
    fn precision(&self) -> Mat<f64> {
        self.w + Mat::<f64>::identity(self.w.nrows(), self.w.nrows())
    }
    /// The whitened covariance `(I + W)^-1`; W is a square, so it exists.
    fn cov(&self) -> Mat<f64> {
        inverse(self.precision().as_ref()).expect("I + W is positive definite")
    }
    fn conditional(&self) -> Conditional {
        let cov = self.cov();
        let mean = mean_operator(self.root, (&cov * self.m).as_ref(), self.other);
        Conditional { mean, cov: flat((self.root * cov * self.root.transpose()).as_ref()) }
    }
    /// `E[-s + log E_u' exp s(u', v)]`; the terms in D cancel.
    fn loss(&self) -> f64 {
        let log_det = log_det(self.precision().as_ref()).expect("I + W is positive definite");
        let mean = self.cov() * self.m;
        0.5 * (trace(self.w) - log_det + inner(self.m, mean.as_ref())) - inner(self.m, self.r)
    }
    /// `E |E_model[u|v] - E[u|v]|^2 = |L_u ((I + W)^-1 M - R)|_F^2`.
    fn error(&self) -> f64 {
        (self.root * (self.cov() * self.m - self.r)).squared_norm_l2()
    }
}

/// `N(L_u R L_v^-1 v, L_u (I - R R') L_u')`.
fn truth(root: MatRef<'_, f64>, other: MatRef<'_, f64>, r: MatRef<'_, f64>) -> Conditional {
    let half = root * r;
    let cov = root * root.transpose() - &half * half.transpose();
    Conditional { mean: mean_operator(root, r, other), cov: flat(cov.as_ref()) }
}

/// `root m other^-1`: a whitened mean operator in the coordinates of the data.
fn mean_operator(root: MatRef<'_, f64>, m: MatRef<'_, f64>, other: MatRef<'_, f64>) -> Vec<f64> {
    let mut mean = root * m;
    other.transpose().solve_upper_triangular_in_place(mean.transpose_mut());
    flat(mean.as_ref())
}

/// `left^-T m right^-1`: a whitened quadratic form in the coordinates of the data.
fn unwhiten(left: MatRef<'_, f64>, m: MatRef<'_, f64>, right: MatRef<'_, f64>) -> Vec<f64> {
    let mut form = m.to_owned();
    left.transpose().solve_upper_triangular_in_place(&mut form);
    right.transpose().solve_upper_triangular_in_place(form.transpose_mut());
    flat(form.as_ref())
}

fn matrix(data: &[f64], rows: usize, columns: usize) -> Mat<f64> {
    assert_eq!(data.len(), rows * columns, "a {rows} x {columns} matrix");
    MatRef::from_row_major_slice(data, rows, columns).to_owned()
}

fn flat(m: MatRef<'_, f64>) -> Vec<f64> {
    m.row_iter().flat_map(|row| row.iter().copied().collect::<Vec<_>>()).collect()
}

fn trace(m: MatRef<'_, f64>) -> f64 {
    m.diagonal().column_vector().sum()
}

/// `<a, b>` over all entries.
fn inner(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> f64 {
    (0..a.ncols()).map(|j| a.col(j).iter().zip(b.col(j).iter()).map(|(a, b)| a * b).sum::<f64>()).sum()
}

/// Of a symmetric matrix; `None` when it is not positive definite.
fn inverse(m: MatRef<'_, f64>) -> Option<Mat<f64>> {
    use faer::linalg::solvers::DenseSolveCore;
    m.llt(Side::Lower).ok().map(|llt| llt.inverse())
}

/// Of a symmetric matrix; `None` when it is not positive definite.
fn log_det(m: MatRef<'_, f64>) -> Option<f64> {
    m.llt(Side::Lower).ok().map(|llt| 2.0 * llt.L().diagonal().column_vector().iter().map(|x| x.ln()).sum::<f64>())
}

#[cfg(test)]
mod tests;
