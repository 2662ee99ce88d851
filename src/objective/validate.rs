//! What every engine checks before it touches anything.

use super::{Batch, DataKernel, Loss, LossError, Matrix, Moments, Objective, Positives, Storage};
use rayon::prelude::*;

impl Batch<'_> {
    /// Checks shapes, parameters and values; whether there is a positive that counts, engines find when they count them.
    ///
    /// # Errors
    /// [`LossError`] naming the first argument out of its domain, what was found and what was expected.
    pub fn validate(&self, loss: &Loss) -> Result<(), LossError> {
        let m = self.v.rows;
        self.parameters(loss)?;
        embedding("u", &self.u)?;
        embedding("v", &self.v)?;
        shape("columns of v", self.v.dim, self.u.dim)?;
        self.pairs_fit()?;
        if let Some(offset) = self.offset_v {
            shape("offset_v", offset.len(), m)?;
            finite("offset_v", &Matrix { data: Storage::F32(offset), rows: m, dim: 1 })?;
        }
        self.moments_fit()?;
        finite("u", &self.u)?;
        finite("v", &self.v)
    }

    /// The part of [`Batch::validate`] that looks at the pairs.
    pub(crate) fn pairs_fit(&self) -> Result<(), LossError> {
        let (n, m) = (self.u.rows, self.v.rows);
        match self.pairs.positives {
            Positives::Diagonal => {}
            Positives::Index(index) => {
                shape("positives", index.len(), n)?;
                if let Some(j) = index.iter().find(|&&j| j as usize >= m) {
                    return Err(bad("positives", j, format!("an index of a column, below {m}")));
                }
            }
            Positives::Groups { u, v } => {
                shape("groups of u", u.len(), n)?;
                shape("groups of v", v.len(), m)?;
            }
        }
        if let Some((u, v)) = self.pairs.ignore {
            shape("ignore ids of u", u.len(), n)?;
            shape("ignore ids of v", v.len(), m)?;
        }
        weights("weights of u", self.pairs.weights_u, n)?;
        weights("weights of v", self.pairs.weights_v, m)
    }

    /// The part of [`Batch::validate`] that looks at no number of the batch.
    pub(crate) fn parameters(&self, loss: &Loss) -> Result<(), LossError> {
        loss.validate()?;
        if let Objective::JointShuffled { pairings, .. } = loss.objective {
            let (n, m) = (self.u.rows, self.v.rows);
            shape("rows of v for the shuffled joint loss", m, n)?;
            let plain = matches!(self.pairs.positives, Positives::Diagonal)
                && self.pairs.ignore.is_none()
                && self.offset_v.is_none();
            if !plain {
                let found = "positives, ignored pairs or an offset";
                return Err(bad("shuffled joint loss", found, "diagonal pairs and nothing else"));
            }
            // They have places of 32 bits.
            let drawn = (u64::from(pairings) + 1).checked_mul(n as u64);
            if drawn.is_none_or(|drawn| drawn > u64::from(u32::MAX)) {
                return Err(bad("pairings", pairings, format!("fewer than 2^32 pairs of {n} rows in all")));
            }
        }
        match (loss.objective.takes_moments(), &self.moments) {
            (true, None) => Err(bad("moments", "none", "features or data of u and v for mmd and joint-mmd")),
            (false, Some(_)) => Err(bad("moments", "some", "none: only mmd and joint-mmd use them")),
            _ => Ok(()),
        }
    }

    fn moments_fit(&self) -> Result<(), LossError> {
        let Some(moments) = &self.moments else { return Ok(()) };
        let (u, v) = match moments {
            Moments::Features { u, v } => (u, v),
            Moments::Gram { kernel, u, v } => {
                if let DataKernel::Gaussian { width } = *kernel
                    && !(width.is_finite() && width > 0.0 && fits_f32(0.5 / (width * width)))
                {
                    return Err(bad("kernel width", width, "a finite number above 0 whose square's inverse f32 holds"));
                }
                (u, v)
            }
        };
        embedding("data of u", u)?;
        embedding("data of v", v)?;
        shape("rows of data of u", u.rows, self.u.rows)?;
        shape("rows of data of v", v.rows, self.v.rows)?;
        finite("data of u", u)?;
        finite("data of v", v)
    }
}

impl Loss {
    /// Checks what does not depend on a batch.
    ///
    /// # Errors
    /// [`LossError::Parameter`] naming the first one out of its domain.
    pub fn validate(&self) -> Result<(), LossError> {
        check_tau(self.tau)?;
        if !(0.0..1.0).contains(&self.smoothing) {
            return Err(bad("smoothing", self.smoothing, "a number in [0, 1)"));
        }
        let mut defined = true;
        match self.objective {
            Objective::Conditional { lambda_u, lambda_v } | Objective::Mmd { lambda_u, lambda_v } => {
                for (what, lambda) in [("lambda_u", lambda_u), ("lambda_v", lambda_v)] {
                    if !(fits_f32(lambda) && lambda >= 0.0) {
                        return Err(bad(what, lambda, "a finite number of f32, 0 or more"));
                    }
                }
                if lambda_u + lambda_v == 0.0 {
                    return Err(bad("lambda_u and lambda_v", "both 0", "at least one above 0"));
                }
                defined = !self.objective.takes_moments();
            }
            Objective::Sigmoid { bias } if !fits_f32(bias) => {
                return Err(bad("bias", bias, "a finite number of f32"));
            }
            Objective::JointShuffled { pairings: 0, .. } => return Err(bad("pairings", 0, "1 or more")),
            Objective::JointMmd | Objective::JointShuffled { .. } => defined = false,
            Objective::Sigmoid { .. } | Objective::Joint => {}
        }
        if self.smoothing > 0.0 && !defined {
            return Err(bad("smoothing", self.smoothing, "0 for mmd, joint-mmd and joint by pairings"));
        }
        Ok(())
    }
}

/// Fails unless logits can be divided by `tau`.
pub(crate) fn check_tau(tau: f64) -> Result<(), LossError> {
    if tau > 0.0 && fits_f32(1.0 / tau) && (1.0 / tau) as f32 > 0.0 {
        return Ok(());
    }
    Err(bad("tau", tau, "a finite number above 0 whose inverse f32 holds"))
}

/// Engines compute in f32.
pub(crate) fn fits_f32(x: f64) -> bool {
    (x as f32).is_finite()
}

pub(super) fn bad(
    what: &'static str,
    found: impl ToString,
    expected: impl Into<std::borrow::Cow<'static, str>>,
) -> LossError {
    LossError::Parameter { what, found: found.to_string(), expected: expected.into() }
}

/// Fails unless a size is as it should be.
pub(crate) fn shape(what: &'static str, found: usize, expected: usize) -> Result<(), LossError> {
    if found == expected {
        return Ok(());
    }
    Err(LossError::Shape { what, found: found.to_string(), expected: expected.to_string() })
}

fn embedding(what: &'static str, matrix: &Matrix<'_>) -> Result<(), LossError> {
    let len = match matrix.data {
        Storage::F32(x) => x.len(),
        Storage::Bf16(x) => x.len(),
        Storage::F16(x) => x.len(),
    };
    if matrix.rows == 0 || matrix.dim == 0 || matrix.rows.checked_mul(matrix.dim) != Some(len) {
        return Err(LossError::Shape {
            what,
            found: format!("{len} elements as [{}, {}]", matrix.rows, matrix.dim),
            expected: "rows x columns elements, at least one of each".into(),
        });
    }
    // Indices of rows and columns are u32 inside.
    if matrix.rows > u32::MAX as usize {
        return Err(LossError::Shape {
            what,
            found: format!("{} rows", matrix.rows),
            expected: "fewer than 2^32".into(),
        });
    }
    Ok(())
}

fn weights(what: &'static str, weights: Option<&[f32]>, len: usize) -> Result<(), LossError> {
    let Some(weights) = weights else { return Ok(()) };
    shape(what, weights.len(), len)?;
    match weights.iter().find(|w| !(w.is_finite() && **w >= 0.0)) {
        Some(w) => Err(bad(what, w, "finite numbers, 0 or more")),
        None => Ok(()),
    }
}

fn finite(what: &'static str, matrix: &Matrix<'_>) -> Result<(), LossError> {
    /// Elements of one task.
    const CHUNK: usize = 1 << 16;
    fn first<T: Sync>(x: &[T], ok: impl Fn(&T) -> bool + Sync) -> Option<usize> {
        // No early exit inside a chunk: this way it vectorises.
        let suspect = |chunk: &[T]| !chunk.iter().fold(true, |all, x| all & ok(x));
        let find = |(c, chunk): (usize, &[T])| {
            if !suspect(chunk) {
                return None;
            }
            chunk.iter().position(|x| !ok(x)).map(|i| c * CHUNK + i)
        };
        if x.len() <= CHUNK {
            return find((0, x));
        }
        x.par_chunks(CHUNK).enumerate().find_map_first(find)
    }
    let at = match matrix.data {
        Storage::F32(x) => first(x, |x| x.is_finite()),
        Storage::Bf16(x) => first(x, |x| x.is_finite()),
        Storage::F16(x) => first(x, |x| x.is_finite()),
    };
    match at {
        Some(at) => Err(LossError::NotFinite { what, row: Some(at / matrix.dim) }),
        None => Ok(()),
    }
}
