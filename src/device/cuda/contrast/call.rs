//! What the launches of one call share, and what of its numbers makes the loss.

use super::kernels::Kernels;
use super::pull::Part;
use super::tally::Anchored;
use crate::objective::counts::Counts;
use crate::objective::{Loss, Objective};
use kernels::abi::{self, Logits};
use std::f64::consts::LOG2_E;
use std::ptr::null;

/// Which terms of the loss, beside the sums over its own pairs, a call counts.
#[derive(Clone, Copy)]
pub(super) struct Share {
    /// Those of its rows; those of its columns; with both, the constants.
    pub(super) rows: bool,
    pub(super) cols: bool,
    /// Rows and columns of the whole, if that is more than the call's own.
    pub(super) whole: Option<[usize; 2]>,
}

impl Share {
    pub(super) const WHOLE: Share = Share { rows: true, cols: true, whole: None };
}

/// A loss whose launches the card has.
pub(super) struct Given {
    pub(super) call: Call,
    /// What G was multiplied by.
    pub(super) gain: f64,
    /// The loss, where the host knows it.
    pub(super) known: Option<f64>,
}

/// What the launches of one call share.
pub(super) struct Call {
    pub(super) kernels: &'static Kernels,
    /// dS/d product.
    pub(super) tilt: f64,
    pub(super) squared: bool,
    pub(super) unit: bool,
    /// See [`abi::Temper`]; then `tilt` and the bias are those of tau = 1 and 0.
    pub(super) live: *const f32,
    pub(super) smoothing: f64,
    pub(super) dim: usize,
    pub(super) pitch: usize,
    pub(super) form: Form,
    pub(super) drawn: Option<Drawn>,
    pub(super) u: Side,
    pub(super) v: Side,
    pub(super) anchored: Option<Anchored>,
}

/// Which softmaxes and which law an objective takes.
#[derive(Clone, Copy)]
pub(super) enum Form {
    Conditional { lambda_u: f64, lambda_v: f64 },
    Joint,
    Sigmoid { bias: f64 },
    Mmd { lambda_u: f64, lambda_v: f64 },
    JointMmd,
}

impl Form {
    /// Weights of the row and the column softmaxes, and whether one softmax is over all pairs.
    pub(super) fn softmaxes(self) -> ([f64; 2], bool) {
        match self {
            Form::Conditional { lambda_u, lambda_v } => ([0.5 * lambda_v, 0.5 * lambda_u], false),
            Form::Mmd { lambda_u, lambda_v } => ([lambda_v, lambda_u], false),
            Form::Joint | Form::JointMmd => ([1.0, 0.0], true),
            Form::Sigmoid { .. } => ([0.0; 2], false),
        }
    }

    pub(super) fn of(loss: &Loss) -> Self {
        match loss.objective {
            Objective::Conditional { lambda_u, lambda_v } => Form::Conditional { lambda_u, lambda_v },
            Objective::Joint | Objective::JointShuffled { .. } => Form::Joint,
            Objective::Sigmoid { bias } => Form::Sigmoid { bias },
            Objective::Mmd { lambda_u, lambda_v } => Form::Mmd { lambda_u, lambda_v },
            Objective::JointMmd => Form::JointMmd,
        }
    }
}

/// The pairings that stand for all pairs, in the joint loss.
#[derive(Clone, Copy)]
pub(super) struct Drawn {
    pub(super) pairings: u32,
    pub(super) seed: u64,
}

/// One side, prepared.
#[derive(Clone, Copy)]
pub(super) struct Side {
    pub(super) halves: *const u16,
    pub(super) inverse: *const f32,
    pub(super) shift: *const f32,
    pub(super) id: *const u32,
    pub(super) ignore: *const u32,
    /// See [`Logits::span_u`].
    pub(super) span: *const [u32; 2],
    pub(super) positives: *const u32,
    pub(super) share: *const f32,
    pub(super) norm: *const abi::Norm,
    pub(super) target: *const f32,
    /// See [`abi::Normalise::far`]; null where nobody asks.
    pub(super) far: *const u32,
    /// Its part of the loss in parts, and how many; null where it has none.
    pub(super) losses: (*const f64, usize),
    pub(super) rows: usize,
}

/// Names of a side's slots in the arena.
pub(super) struct Slots {
    pub(super) halves: &'static str,
    pub(super) inverse: &'static str,
    pub(super) shift: &'static str,
    pub(super) id: &'static str,
    pub(super) ignore: &'static str,
    pub(super) span: &'static str,
    pub(super) positives: &'static str,
    pub(super) share: &'static str,
    pub(super) norm: &'static str,
    pub(super) far: &'static str,
    pub(super) target: &'static str,
    pub(super) acc: &'static str,
    pub(super) tallies: &'static str,
    pub(super) tallies_of_all: &'static str,
    pub(super) losses: &'static str,
}

pub(super) const U: Slots = Slots {
    halves: "u",
    inverse: "1/|u|",
    shift: "shift of u",
    id: "id of u",
    ignore: "ignore of u",
    span: "span of u",
    positives: "positives of u",
    share: "share of u",
    norm: "norm of u",
    far: "far norm of u",
    target: "target of u",
    acc: "acc of u",
    tallies: "tallies of u",
    tallies_of_all: "tallies of all of u",
    losses: "losses of u",
};

pub(super) const V: Slots = Slots {
    halves: "v",
    inverse: "1/|v|",
    shift: "shift of v",
    id: "id of v",
    ignore: "ignore of v",
    span: "span of v",
    positives: "positives of v",
    share: "share of v",
    norm: "norm of v",
    far: "far norm of v",
    target: "target of v",
    acc: "acc of v",
    tallies: "tallies of v",
    tallies_of_all: "tallies of all of v",
    losses: "losses of v",
};

/// What a loss is made of.
pub(super) struct Terms {
    /// What the losses by rows, by columns and of the sums count; 0: not at all.
    pub(super) weights: [f64; 3],
    /// Whether the log of the sum over all pairs, in the slot "joint", is added.
    pub(super) normaliser: bool,
    /// Added.
    pub(super) constant: f64,
}

/// Scalars of a call, in the slot "scalars".
pub(super) mod scalar {
    pub const ROW_LOSS: usize = 0;
    pub const COL_LOSS: usize = 1;
    pub const ALONG: usize = 2;
    /// Of [`kernels::abi::Pull::row_sums`], over everything.
    pub const SUMS: usize = 3;
    pub const COUNT: usize = 7;
}

impl Call {
    /// u (`which` 0) or v.
    pub(super) fn side(&self, which: usize) -> &Side {
        if which == 0 { &self.u } else { &self.v }
    }

    /// Whether d tau is made of sums of G times its lever: where that is G V's `<u, dU>` instead, it has what rounding G to
    /// halves left of its sum, which for MMD should be nothing, times what all logits have in common.
    pub(super) fn levered(&self) -> bool {
        self.squared || matches!(self.form, Form::Mmd { .. } | Form::JointMmd)
    }

    pub(super) fn logits(&self, rows: &Side, cols: &Side) -> Logits {
        // |u - v|^2 = |u|^2 + |v|^2 - 2 <u, v>; the norms are the shifts.
        let scale = if self.squared { -2.0 * self.tilt } else { self.tilt };
        Logits {
            u: rows.halves,
            v: cols.halves,
            shift_u: rows.shift,
            shift_v: cols.shift,
            id_u: rows.id,
            id_v: cols.id,
            ignore_u: rows.ignore,
            ignore_v: cols.ignore,
            live: self.live,
            span_u: rows.span,
            span_v: cols.span,
            flags: self.anchored.map_or(null(), |a| a.flags),
            n: rows.rows as u32,
            m: cols.rows as u32,
            depth: self.dim as u32,
            pitch: self.pitch as u32,
            scale: (scale * LOG2_E) as f32,
            blocks: self.anchored.map_or(0, |a| a.blocks as u32),
        }
    }

    /// What the loss is made of, of a `share` of it; `known` where the host knows it.
    pub(super) fn terms(&self, share: Share, known: Option<f64>) -> Terms {
        let [n, m] = share.whole.unwrap_or([self.u.rows, self.v.rows]).map(|count| count as f64);
        let own = |own: bool, weight: f64| if own { weight } else { 0.0 };
        let all = share.rows && share.cols;
        let terms = |by_row: f64, by_col: f64, summed: f64, constant: f64| Terms {
            weights: [own(share.rows, by_row), own(share.cols, by_col), summed],
            normaliser: false,
            constant: own(all, constant),
        };
        match self.form {
            Form::Conditional { lambda_u, lambda_v } => {
                let (by_row, by_col) = (0.5 * lambda_v, 0.5 * lambda_u);
                terms(by_row, by_col, 0.0, -by_row * m.ln() - by_col * n.ln())
            }
            Form::Joint => Terms { normaliser: all, ..terms(-1.0, 0.0, 0.0, -n.ln() - self.columns(m).ln()) },
            // A residual's loss has its lambda.
            Form::Mmd { lambda_u, lambda_v } => {
                let [by_row, by_col] = [lambda_v, lambda_u].map(|lambda| f64::from(u8::from(lambda > 0.0)));
                terms(by_row, by_col, 0.0, 0.0)
            }
            Form::JointMmd => terms(0.0, 0.0, 0.0, known.expect("the host has its residual")),
            Form::Sigmoid { .. } => terms(0.0, 0.0, 1.0, 0.0),
        }
    }

    /// Pairs of a row that the joint loss is normalised by, of `m` there are.
    pub(super) fn columns(&self, m: f64) -> f64 {
        self.drawn.map_or(m, |drawn| f64::from(drawn.pairings))
    }

    /// The one part of G that all but MMD have.
    pub(super) fn part(&self) -> Part {
        Part {
            norm_u: self.u.norm,
            target_u: self.u.target,
            norm_v: self.v.norm,
            target_v: self.v.target,
            far: [self.u.far, self.v.far],
            factor: None,
        }
    }

    /// No element of G of this part is larger.
    pub(super) fn bound(&self, counts: &Counts) -> f64 {
        let largest = |share: &[f32]| f64::from(share.iter().copied().fold(0.0, f32::max));
        let (by_row, by_col) = (largest(&counts.row_share), largest(&counts.col_share));
        match self.form {
            Form::Conditional { lambda_u, lambda_v } => 0.5 * (lambda_v * by_row + lambda_u * by_col),
            Form::Joint => 1.0 + by_row,
            Form::Sigmoid { .. } => by_row,
            Form::Mmd { .. } | Form::JointMmd => unreachable!("its residuals bound it"),
        }
    }
}
