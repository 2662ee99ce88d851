//! What is minimised: tiltings, objectives and the pairs they act on, as plain data.
//!
//! Notation of every docstring here: `u` is `[N, D]` (rows), `v` is `[M, D]` (columns), `S[i, j]` the
//! logit of row i and column j under a [`Tilting`] at temperature `tau`, `r_i` and `c_j` the row and
//! column log-sum-exp (LSE) of `S`, `z` the LSE of all of it, `G = dL/dS`.
//!
//! An engine ([`crate::device`]) evaluates `(Loss, Batch)`; [`mod@reference`] is its slow f64 twin.

pub mod counts;
pub mod features;
pub mod reference;
mod validate;

#[cfg(feature = "cli")]
pub(crate) use validate::fits_f32;
pub(crate) use validate::{check_tau, shape};

pub use kernels::law::Tilting;

use crate::data::Order;
use half::{bf16, f16};

/// The loss to minimise. All values are means (over rows or pairs), in nats.
///
/// Targets: row i's target distribution `T^r_ij` is uniform over its positives `P_i`; with label
/// smoothing `e` it is `(1 - e)/|P_i| [j in P_i] + e/M_i` over the `M_i` columns not ignored in row i.
/// `T^c` is the same down the columns. `w_i` are row weights and `x_j` column weights, scaled to sum
/// to one over the rows (columns) that have a positive; the others contribute nothing, but to the sigmoid loss, whose `w_i` are
/// shares of all rows.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Objective {
    /// Weighted conditional loss (Problem 3.13). `lambda_u` weighs u|v (column softmax), `lambda_v`
    /// weighs v|u (row softmax); (1, 1) is CLIP/InfoNCE, (2, 0) and (0, 2) are one-sided:
    ///
    /// `L = lambda_v/2 sum_i w_i (r_i - log M - <T^r_i, S_i>) + lambda_u/2 sum_j x_j (c_j - log N - <T^c_j, S_j>)`
    Conditional {
        /// Weight of u|v.
        lambda_u: f64,
        /// Weight of v|u.
        lambda_v: f64,
    },
    /// Joint loss (Problem 3.7): `L = z - log(N M) - sum_i w_i <T^r_i, S_i>`.
    Joint,
    /// The joint loss with its normaliser estimated from `pairings` random pairings of the batch
    /// (Remark 3.9), O(N D pairings) work: needs N = M and diagonal positives.
    /// `L = log mean_{k,i} exp S[i, pi_k(i)] - sum_i w_i S_ii`, `pi_k` a permutation drawn from `(seed, k)`
    /// by [`pairing()`].
    JointShuffled {
        /// How many pairings, 1 or more.
        pairings: u32,
        /// What they are drawn from.
        seed: u64,
    },
    /// Sigmoid loss (SigLIP): `L = sum_i w_i sum_j softplus(x) - t x`, `x = S_ij + bias`, target `t` = 1
    /// on positives and 0 elsewhere, pulled to 1 - e/2 and e/2 by smoothing.
    Sigmoid {
        /// Added to every logit.
        bias: f64,
    },
    /// Maximum mean discrepancy of both conditionals (Appendix B). Needs [`Moments`].
    /// With `P` the column softmax, `K` the kernel on u-data and `T^c` the targets:
    /// `L = lambda_u sum_j x_j (1/2 P_j' K P_j - P_j' K T^c_j) + lambda_v (the same by rows)`. Smoothing is not defined here.
    Mmd {
        /// Weight of u|v.
        lambda_u: f64,
        /// Weight of v|u.
        lambda_v: f64,
    },
    /// Joint maximum mean discrepancy (Problem 3.11). Needs [`Moments`]. With `W = exp(S - z)` and
    /// `T_ij = w_i T^r_ij`: `L = <W, K_u W K_v> - 2 <T, K_u W K_v>`. Smoothing is not defined here.
    JointMmd,
}

/// One loss: a tilting, an objective, the temperature and label smoothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// How a logit is made from two embeddings.
    pub tilting: Tilting,
    /// What is minimised.
    pub objective: Objective,
    /// Temperature, > 0.
    pub tau: f64,
    /// Label smoothing, in [0, 1).
    pub smoothing: f64,
}

/// Storage type of embeddings; accumulation is always f32 or better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// IEEE single.
    F32,
    /// The upper half of a single.
    Bf16,
    /// IEEE half.
    F16,
}

impl Precision {
    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }

    /// The number of this type that is nearest to `x`.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Precision::F32 => x,
            Precision::Bf16 => bf16::from_f32(x).to_f32(),
            Precision::F16 => f16::from_f32(x).to_f32(),
        }
    }
}

/// Elements of a matrix in one of the storage types.
#[derive(Clone, Copy, Debug)]
pub enum Storage<'a> {
    /// IEEE single.
    F32(&'a [f32]),
    /// The upper half of a single.
    Bf16(&'a [bf16]),
    /// IEEE half.
    F16(&'a [f16]),
}

/// A row-major `[rows, dim]` matrix borrowed from the caller.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// `rows * dim` elements.
    pub data: Storage<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Columns of each.
    pub dim: usize,
}

/// Which pairs (i, j) are positives.
#[derive(Clone, Copy, Debug)]
pub enum Positives<'a> {
    /// (i, i), of any N and M; surplus rows or columns are extra negatives.
    Diagonal,
    /// Row i's only positive is column `index[i]`; `[N]`, each < M. Several rows may share a column.
    Index(&'a [u32]),
    /// (i, j) is a positive when `u[i] == v[j]`; `[N]` and `[M]`. Rows without one are only negatives.
    Groups {
        /// Of rows.
        u: &'a [i64],
        /// Of columns.
        v: &'a [i64],
    },
}

/// Positives, pairs to leave out, and weights.
#[derive(Clone, Copy, Debug)]
pub struct Pairs<'a> {
    /// Pulled together.
    pub positives: Positives<'a>,
    /// Ids `[N]` and `[M]`: a pair with equal ids that is not a positive leaves the loss altogether
    /// (a false negative). `None`: nothing is ignored.
    pub ignore: Option<(&'a [i64], &'a [i64])>,
    /// Row weights `[N]`, >= 0 (they weigh the v|u terms, and every term of joint and sigmoid).
    pub weights_u: Option<&'a [f32]>,
    /// Column weights `[M]`, >= 0 (they weigh the u|v terms).
    pub weights_v: Option<&'a [f32]>,
}

/// The kernel on data that MMD compares distributions with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DataKernel {
    /// `k(x, x') = exp(-|x - x'|^2 / (2 width^2))`.
    Gaussian {
        /// In units of the data, above 0.
        width: f64,
    },
    /// `k(x, x') = <x, x'>`.
    Linear,
}

/// What MMD and joint MMD know of the data behind the embeddings.
#[derive(Clone, Copy, Debug)]
pub enum Moments<'a> {
    /// Explicit feature maps, K = F F': `u` is `[N, f_u]`, `v` is `[M, f_v]`. O(N M (D + f)) work.
    Features {
        /// Of rows.
        u: Matrix<'a>,
        /// Of columns.
        v: Matrix<'a>,
    },
    /// A kernel evaluated on raw data, `u` `[N, x]`, `v` `[M, y]`: exact, O(N^2 M) work.
    Gram {
        /// On both sides.
        kernel: DataKernel,
        /// Data of rows.
        u: Matrix<'a>,
        /// Data of columns.
        v: Matrix<'a>,
    },
}

/// Everything a loss is evaluated on.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Row embeddings `[N, D]`.
    pub u: Matrix<'a>,
    /// Column embeddings `[M, D]`.
    pub v: Matrix<'a>,
    /// Which pairs are what.
    pub pairs: Pairs<'a>,
    /// A number added to every logit of column j, `[M]` (the class bias F of `fine_tune`).
    pub offset_v: Option<&'a [f32]>,
    /// Required by [`Objective::Mmd`] and [`Objective::JointMmd`] only.
    pub moments: Option<Moments<'a>>,
}

/// Where a result goes: over what is there, or added to it.
#[derive(Clone, Copy, Debug)]
pub enum Write<T> {
    /// Over what is there.
    Set(T),
    /// Added to what is there.
    Add(T),
}

impl<T> Write<T> {
    /// The same, of what `to` makes of the place.
    pub fn map<S>(self, to: impl FnOnce(T) -> S) -> Write<S> {
        match self {
            Write::Set(out) => Write::Set(to(out)),
            Write::Add(out) => Write::Add(to(out)),
        }
    }

    /// The place, and whether results are added to what is there.
    pub fn split(self) -> (T, bool) {
        match self {
            Write::Set(out) => (out, false),
            Write::Add(out) => (out, true),
        }
    }
}

/// The gradients wanted, all f32.
#[derive(Debug, Default)]
pub struct Gradients<'a> {
    /// dL/du, `[N, D]`.
    pub u: Option<Write<&'a mut [f32]>>,
    /// dL/dv, `[M, D]`.
    pub v: Option<Write<&'a mut [f32]>>,
    /// dL/d offset_v, `[M]`.
    pub offset_v: Option<Write<&'a mut [f32]>>,
}

/// A loss value with its scalar gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Value {
    /// The loss as defined by [`Objective`].
    pub loss: f64,
    /// dL/dtau. With the logit scale `l = log(1/tau)`: `dL/dl = -tau dL/dtau`.
    pub grad_tau: f64,
    /// dL/dbias; zero for objectives without one.
    pub grad_bias: f64,
}

/// Why a loss could not be evaluated. Every message names the argument, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LossError {
    /// Sizes that do not go together.
    #[error("{what}: found {found}, expected {expected}")]
    Shape {
        /// The argument.
        what: &'static str,
        /// Its size.
        found: String,
        /// The size it should have.
        expected: String,
    },
    /// A parameter out of its domain.
    #[error("{what}: found {found}, expected {expected}")]
    Parameter {
        /// The parameter.
        what: &'static str,
        /// Its value.
        found: String,
        /// Its domain.
        expected: std::borrow::Cow<'static, str>,
    },
    /// The machine that was to evaluate it could not: of a card it holds a `device::cuda::CudaError`, to be downcast to.
    #[error(transparent)]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// Infinite or not a number.
    #[error("{what}{}: found a value that is not finite, expected finite numbers", of_row(*row))]
    NotFinite {
        /// The argument.
        what: &'static str,
        /// Where, from 0; not known of embeddings that were on a card.
        row: Option<usize>,
    },
}

fn of_row(row: Option<usize>) -> String {
    row.map_or_else(String::new, |row| format!(" row {row}"))
}

impl Objective {
    /// The symmetric conditional loss, CLIP's and InfoNCE's.
    pub const CLIP: Objective = Objective::Conditional { lambda_u: 1.0, lambda_v: 1.0 };

    /// Whether it compares data behind the embeddings: [`Batch::moments`].
    pub fn takes_moments(&self) -> bool {
        matches!(self, Objective::Mmd { .. } | Objective::JointMmd)
    }

    /// Whether every row has a share of its weights, and a bias every logit: not only rows with a positive, and none.
    pub fn is_of_each_pair(&self) -> bool {
        matches!(self, Objective::Sigmoid { .. })
    }

    /// `L_clip - L` for `L` as defined above: (lambda_u log N + lambda_v log M)/2 for the conditional
    /// loss, `None` for the others.
    pub fn clip_offset(&self, n: usize, m: usize) -> Option<f64> {
        match *self {
            Objective::Conditional { lambda_u, lambda_v } => {
                Some(0.5 * (lambda_u * (n as f64).ln() + lambda_v * (m as f64).ln()))
            }
            _ => None,
        }
    }
}

impl Loss {
    /// Without label smoothing.
    pub fn new(tilting: Tilting, objective: Objective, tau: f64) -> Self {
        Loss { tilting, objective, tau, smoothing: 0.0 }
    }
}

impl<'a> Batch<'a> {
    /// Row i of `u` belongs to row i of `v`, and that is all there is.
    pub fn new(u: Matrix<'a>, v: Matrix<'a>) -> Self {
        Batch { u, v, pairs: Pairs::default(), offset_v: None, moments: None }
    }
}

impl Default for Pairs<'_> {
    fn default() -> Self {
        Pairs { positives: Positives::Diagonal, ignore: None, weights_u: None, weights_v: None }
    }
}

impl<'a> Matrix<'a> {
    /// Borrows row-major f32 data of `dim` columns; the number of rows follows.
    pub fn f32(data: &'a [f32], dim: usize) -> Self {
        Matrix { data: Storage::F32(data), rows: data.len() / dim.max(1), dim }
    }
    /// The same of bf16.
    pub fn bf16(data: &'a [bf16], dim: usize) -> Self {
        Matrix { data: Storage::Bf16(data), rows: data.len() / dim.max(1), dim }
    }
    /// The same of f16.
    pub fn f16(data: &'a [f16], dim: usize) -> Self {
        Matrix { data: Storage::F16(data), rows: data.len() / dim.max(1), dim }
    }
}

impl Gradients<'_> {
    /// Checks that every output has the size its input has.
    ///
    /// # Errors
    /// [`LossError::Shape`] naming the output.
    pub fn validate(&self, batch: &Batch<'_>) -> Result<(), LossError> {
        let fits = |what, out: &Option<Write<&mut [f32]>>, expected: usize| match out {
            Some(Write::Set(out) | Write::Add(out)) if out.len() != expected => Err(LossError::Shape {
                what,
                found: format!("{} elements", out.len()),
                expected: format!("{expected} elements"),
            }),
            _ => Ok(()),
        };
        fits("gradient of u", &self.u, batch.u.rows * batch.u.dim)?;
        fits("gradient of v", &self.v, batch.v.rows * batch.v.dim)?;
        fits("gradient of offset_v", &self.offset_v, batch.v.rows)
    }
}

impl<'a> Matrix<'a> {
    /// Rows `range` alone.
    ///
    /// # Panics
    /// When the matrix has not as many.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Matrix<'a> {
        let at = range.start * self.dim..range.end * self.dim;
        let data = match self.data {
            Storage::F32(x) => Storage::F32(&x[at]),
            Storage::Bf16(x) => Storage::Bf16(&x[at]),
            Storage::F16(x) => Storage::F16(&x[at]),
        };
        Matrix { data, rows: range.len(), dim: self.dim }
    }
}

/// The permutation `pi_k` of 0..n that [`Objective::JointShuffled`] draws from `(seed, k)`.
pub fn pairing(n: usize, seed: u64, k: u32) -> Vec<usize> {
    let mut order = Vec::with_capacity(n);
    // Counted from the other end than epochs, whose orders these must not be.
    Order::new(seed, !u64::from(k), n).extend(0..n, &mut order);
    order
}
