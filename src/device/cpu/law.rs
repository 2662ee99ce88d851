//! How G follows from S: the laws of the objectives, pair by pair and tile by tile.
//!
//! A [`Law`] is made once a pass, of [`Normalisers`] that pass 1's tallies give or of the sigmoid loss's numbers. For every tile
//! special pairs are judged first ([`Law::judge`], scalars), then [`Law::apply`] turns all others' logits into G in their
//! place and puts the special ones back. Row by row there are three ways to do so:
//!
//! | where | G of a row |
//! | --- | --- |
//! | one exponential serves both softmaxes and G is all that is wanted ([`Holds::Shared`], [`Holds::Exponentials`]) | `E (a_i + b_j)`, nothing summed ([`apply_bare`]) |
//! | one exponential serves both softmaxes, or is G | the same with its sums ([`shared_row`]) |
//! | else | each softmax with its own exponential, its smoothing and its factor, or the sigmoid ([`Law::row`]) |

use super::buffers::Buffer;
use super::simd::{Inner, Isa, LONG, Left, Op, Register, Simd, Vector, product};
use super::tile::{Aside, COLS, Place, TILE, add_row, fold, lanes, lanes_mut, total};
use crate::objective::counts::Special;
use kernels::law::{Num, Softmax, exp_uncapped, softplus_sigmoid};
use std::ops::Range;

/// A logit that stands for no pair: its exponential is 0 under every law, and it is finite, so that
/// a product with zero stays zero.
const HOLE: f32 = -1e30;

/// What a tile holds before [`Law::apply`] makes G of it.
#[derive(Clone, Copy)]
pub enum Holds<'a> {
    Logits,
    /// Logits, of which one exponential serves every softmax and G is all that is wanted.
    Shared,
    /// Nothing yet: these are the exponentials, and of special pairs the logits.
    Exponentials(&'a [f32]),
}

impl<'a> Holds<'a> {
    /// A tile with the logits of special pairs.
    pub fn logits(self, tile: &'a [f32]) -> &'a [f32] {
        if let Holds::Exponentials(kept) = self { kept } else { tile }
    }
}

/// How G follows from S.
#[allow(clippy::large_enum_variant, reason = "one a call, on the stack")]
pub enum Law<'a> {
    /// `G_ij = R_ij + C_ij - T_ij` of a weighted row softmax R, a weighted column softmax C and the targets T of [`Normalisers`].
    Softmax { rows: Option<Softmaxes<'a>>, cols: Option<Softmaxes<'a>> },
    /// `G_ij = w_i (sigmoid(S_ij + bias) - t)`: `t` is `smoothing`/2 for negatives, 1 - `smoothing`/2 for positives.
    Sigmoid { bias: f32, smoothing: f32, share: &'a [f32] },
    /// `G_ij = exp(S_ij - anchor)` of negatives. Positives are left out, and their logits are the value.
    Exponential { anchor: f32 },
}

/// The softmaxes of all rows (or of all columns), as a law has them: a view of [`Normalisers`], see there.
#[derive(Clone, Copy)]
pub struct Softmaxes<'a> {
    pub max: &'a [f32],
    pub weight: &'a [f32],
    pub smooth: &'a [f32],
    pub targets: &'a [Target],
    /// What `max` is everywhere, if it is one number.
    pub anchor: Option<f32>,
    /// Multiplies the probabilities: `P_ij (Q_ij - mean)`, as MMD wants.
    pub factor: Option<Factor<'a>>,
}

impl<'a> Softmaxes<'a> {
    /// The same with its probabilities multiplied by `factor`.
    pub fn times(self, factor: Factor<'a>) -> Self {
        Softmaxes { factor: Some(factor), ..self }
    }

    /// What row (column) `i`'s softmax adds to G at a positive of logit `s`.
    fn at_positive(&self, i: usize, s: f32) -> f32 {
        let plain = Softmax { max: self.max[i], weight: self.weight[i] };
        match self.targets[i] {
            Target::None => plain.of(s),
            Target::Shared { pull } => plain.of(s) - pull - self.smooth[i],
            Target::Among { share, max, mean, others, slack } => {
                let above = (s - max) - mean;
                share * ((above.exp_m1() - others * above.exp()) + slack) - self.smooth[i]
            }
            Target::Only { others, slack } => slack - others - self.smooth[i],
        }
    }
}

/// `Q = left right'`, less a mean for each row (or column).
#[derive(Clone, Copy)]
pub struct Factor<'a> {
    /// `[N, f]`.
    pub left: &'a [f32],
    /// `[M, f]` packed by [`pack_columns`](super::operand::pack_columns).
    pub right: &'a [f32],
    /// f.
    pub dim: usize,
    /// `[N]` of row softmaxes, `[M]` of column softmaxes.
    pub mean: &'a [f32],
}

/// The normalisers of one side's softmaxes.
#[derive(Debug, Default)]
pub struct Normalisers {
    pub max: Vec<f32>,
    /// Loss weight over the sum of `exp(s - max)`.
    pub weight: Vec<f32>,
    /// Target of every pair not ignored, times the loss weight.
    pub smooth: Vec<f32>,
    /// What positives are pulled to.
    pub targets: Vec<Target>,
    /// What `max` is everywhere, if it is one number.
    pub anchor: Option<f32>,
}

/// What a positive is pulled to by its row or by its column.
#[derive(Clone, Copy, Debug, Default)]
pub enum Target {
    /// Positives are not special: the law is a plain probability.
    #[default]
    None,
    /// Target `pull` (times the loss weight) for each positive, of a softmax over more than its row.
    Shared { pull: f32 },
    /// One of several positives, of which `share` is an equal part of the loss weight. Their logarithmic mean is `max + mean`: were
    /// all logits equal to it, the row's positives would have `1 - others` of the softmax in equal parts. As in [`Target::Only`]
    /// that 1 is taken off before it can hide the rest.
    Among { share: f32, max: f32, mean: f32, others: f32, slack: f32 },
    /// The only positive: its weighted `P - 1` is `-others`, plus `slack` that smoothing takes off the target.
    Only { others: f32, slack: f32 },
}

impl Normalisers {
    pub fn resize(&mut self, len: usize) {
        self.max.resize(len, 0.0);
        self.weight.resize(len, 0.0);
        self.smooth.resize(len, 0.0);
        self.targets.resize(len, Target::None);
        self.anchor = None;
    }

    /// A plain probability for row (column) i.
    pub fn set_plain(&mut self, i: usize, max: f32, weight: f32) {
        (self.max[i], self.weight[i], self.smooth[i], self.targets[i]) = (max, weight, 0.0, Target::None);
    }

    /// The softmaxes of rows (columns) `range`.
    pub fn softmaxes(&self, range: Range<usize>) -> Softmaxes<'_> {
        Softmaxes {
            max: &self.max[range.clone()],
            weight: &self.weight[range.clone()],
            smooth: &self.smooth[range.clone()],
            targets: &self.targets[range],
            anchor: self.anchor,
            factor: None,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * (self.max.capacity() + self.weight.capacity() + self.smooth.capacity())
            + size_of::<Target>() * self.targets.capacity()
    }
}

/// Sums along a row, in f64; zeros where exponentials are kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct RowSums {
    /// `sum_j G_ij S_ij`.
    pub gs: f64,
    /// `sum_j G_ij`.
    pub g: f64,
    /// The row's loss times its weight, for laws whose value is a sum over pairs.
    pub value: f64,
}

impl Law<'_> {
    /// A special pair with its G, unless it follows the same law as the others; adds a positive's part of the value.
    pub fn judge(&self, i: usize, j: usize, special: Special, logit: f32, sums: &mut RowSums) -> Option<Aside> {
        match special {
            Special::Ignored => Some(Aside { i, j, logit: self.logit_of_no_part(), g: 0.0 }),
            Special::Positive if self.positives_are_plain() => None,
            Special::Positive => Some(Aside { i, j, logit, g: self.at_positive(i, j, logit, sums) }),
        }
    }

    /// Whether positives follow the same law as negatives.
    fn positives_are_plain(&self) -> bool {
        match self {
            Law::Softmax { rows, cols } => {
                let plain = |softmaxes: &Softmaxes<'_>| matches!(softmaxes.targets.first(), None | Some(Target::None));
                [rows, cols].into_iter().flatten().all(plain)
            }
            Law::Sigmoid { .. } | Law::Exponential { .. } => false,
        }
    }

    /// G at a positive; adds its part of the value.
    fn at_positive(&self, i: usize, j: usize, s: f32, sums: &mut RowSums) -> f32 {
        match self {
            Law::Softmax { rows, cols } => {
                rows.map_or(0.0, |softmaxes| softmaxes.at_positive(i, s))
                    + cols.map_or(0.0, |softmaxes| softmaxes.at_positive(j, s))
            }
            Law::Sigmoid { bias, smoothing, share } => {
                // softplus(x) - (1 - e/2) x = softplus(-x) + e/2 x, and 1 - e/2 - sigmoid(x) = sigmoid(-x) - e/2.
                let x = s + bias;
                let (value, sigma) = softplus_sigmoid(-x);
                // `apply` takes off e/2 x for every pair of the row, this one included.
                let pulled = if *smoothing > 0.0 { f64::from(*smoothing) * f64::from(x) } else { 0.0 };
                sums.value += f64::from(share[i]) * (f64::from(value) + pulled);
                share[i] * (0.5 * smoothing - sigma)
            }
            Law::Exponential { .. } => {
                sums.value += f64::from(s);
                0.0
            }
        }
    }

    /// The logit that adds nothing to what [`Law::apply`] sums over whole rows.
    fn logit_of_no_part(&self) -> f32 {
        match self {
            Law::Softmax { .. } | Law::Exponential { .. } => 0.0,
            Law::Sigmoid { bias, .. } => -bias,
        }
    }

    /// The tiles of the factors of row and of column softmaxes.
    #[inline(always)]
    pub fn factors<'q, S: Simd>(&self, place: &Place, buffers: &'q mut [Buffer; 2]) -> [&'q [f32]; 2] {
        let mut tiles = [&[][..]; 2];
        if let Law::Softmax { rows, cols } = self {
            for ((softmaxes, buffer), tile) in [rows, cols].into_iter().zip(buffers).zip(&mut tiles) {
                if let Some(Softmaxes { factor: Some(factor), .. }) = softmaxes {
                    let buffer = buffer.sized(TILE);
                    factor.tile::<S>(place, buffer);
                    *tile = buffer;
                }
            }
        }
        tiles
    }

    /// Turns the tile into that of G, and adds its sums: the value's where the law has any, `sum_j G S` and `sum_j G` to its
    /// rows, `sum_i G` to its columns.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "operands and outputs of one tile")]
    pub fn apply<S: Simd>(
        &self,
        place: &Place,
        tile: &mut [f32],
        holds: Holds<'_>,
        [by_row, by_col]: [&[f32]; 2],
        mut asides: &[Aside],
        sums: &mut [RowSums],
        col_sums: Option<&mut [f32]>,
    ) {
        if let (Law::Softmax { rows, cols }, Holds::Shared | Holds::Exponentials(_)) = (self, holds) {
            return apply_bare::<S>([rows.as_ref(), cols.as_ref()], place, tile, holds, asides, col_sums);
        }
        let mut columns = Columns::default();
        match self {
            Law::Softmax { cols: Some(softmaxes), .. } => columns.fill(softmaxes, &place.cols),
            Law::Exponential { .. } => columns.weight = [1.0; COLS],
            _ => {}
        }
        let mut totals = [0.0; COLS];
        let mut logits = [0.0; COLS];
        for (r, (row, sums)) in tile.chunks_exact_mut(place.stride()).zip(sums).enumerate() {
            let (i, row) = (place.rows.start + r, &mut row[..place.wide::<S>()]);
            let (own, rest) = asides.split_at(asides.iter().take_while(|aside| aside.i == i).count());
            asides = rest;
            let at = Row { i, cols: &place.cols, asides: own };
            at.take_out(row);
            match self {
                Law::Exponential { anchor } => shared_row::<S>(*anchor, 0.0, &columns, at, row, sums),
                Law::Softmax { rows: Some(softmaxes), cols: Some(_) } if columns.shares_exponentials(softmaxes, i) => {
                    shared_row::<S>(softmaxes.max[i], softmaxes.weight[i], &columns, at, row, sums);
                }
                _ => {
                    let factors = [by_row, by_col].map(|factor| factor.get(r * COLS..).unwrap_or(&[]));
                    self.row::<S>(&columns, factors, at, row, &mut logits, sums);
                }
            }
            if col_sums.is_some() {
                add_row::<S>(&mut totals, row);
            }
        }
        if let Some(sums) = col_sums {
            sums.iter_mut().zip(&totals).for_each(|(c, x)| *c += x);
        }
    }

    /// Turns a row of logits, which stay in `logits`, into one of G, and adds its sums.
    #[inline(always)]
    fn row<S: Simd>(
        &self,
        columns: &Columns,
        [by_row, by_col]: [&[f32]; 2],
        at: Row<'_>,
        row: &mut [f32],
        logits: &mut [f32; COLS],
        sums: &mut RowSums,
    ) {
        for (logit, s) in lanes_mut::<S>(logits).zip(lanes::<S>(row)) {
            S::F32::load(s).store(logit);
        }
        match self {
            Law::Softmax { rows, cols } => {
                match rows {
                    Some(softmaxes) => row_softmax::<S>(softmaxes, at.i, by_row, row),
                    None => row.fill(0.0),
                }
                if let Some(softmaxes) = cols {
                    add_col_softmax::<S>(softmaxes.factor.is_some(), columns, by_col, logits, row);
                }
            }
            Law::Sigmoid { bias, smoothing, share } => {
                let value = sigmoid_row::<S>(*bias, *smoothing, share[at.i], row);
                sums.value += f64::from(share[at.i]) * f64::from(value);
            }
            Law::Exponential { .. } => unreachable!("one exponential serves all of its rows"),
        }
        let (w, wide) = (at.cols.len(), row.len());
        for aside in at.asides {
            (logits[aside.j - at.cols.start], row[aside.j - at.cols.start]) = (aside.logit, aside.g);
        }
        logits[w..wide].fill(0.0);
        row[w..].fill(0.0);
        self.subtract_linear(at.i, &logits[..w], sums);
        let (mut gs, mut sum) = (S::F32::splat(0.0), S::F32::splat(0.0));
        for (s, g) in lanes::<S>(logits).zip(lanes::<S>(row)) {
            let g = S::F32::load(g);
            gs = g.mul_add(S::F32::load(s), gs);
            sum = sum.add(g);
        }
        sums.gs += f64::from(total::<S>(gs));
        sums.g += f64::from(total::<S>(sum));
    }

    /// Takes `e/2 x` off the value for every pair of row `i` whose logit is given.
    #[inline(always)]
    fn subtract_linear(&self, i: usize, s: &[f32], sums: &mut RowSums) {
        if let Law::Sigmoid { bias, smoothing, share } = self
            && *smoothing > 0.0
        {
            let x: f64 = s.iter().map(|&s| f64::from(s + bias)).sum();
            sums.value -= 0.5 * f64::from(*smoothing) * f64::from(share[i]) * x;
        }
    }
}

/// Which row of a tile it is: of `cols`, with the special pairs that were set aside.
#[derive(Clone, Copy)]
struct Row<'a> {
    i: usize,
    cols: &'a Range<usize>,
    asides: &'a [Aside],
}

impl Row<'_> {
    /// Makes holes of its special pairs and of what fills up its last register.
    #[inline(always)]
    fn take_out(self, row: &mut [f32]) {
        row[self.cols.len()..].fill(HOLE);
        self.asides.iter().for_each(|aside| row[aside.j - self.cols.start] = HOLE);
    }
}

/// Column softmaxes' numbers for the columns of a tile.
struct Columns {
    max: [f32; COLS],
    weight: [f32; COLS],
    smooth: [f32; COLS],
    mean: [f32; COLS],
    /// What `max` is everywhere, if it is one number, and there is neither a factor nor smoothing.
    anchor: Option<f32>,
}

impl Default for Columns {
    fn default() -> Self {
        Columns { max: [0.0; COLS], weight: [0.0; COLS], smooth: [0.0; COLS], mean: [0.0; COLS], anchor: None }
    }
}

impl Columns {
    fn fill(&mut self, softmaxes: &Softmaxes<'_>, cols: &Range<usize>) {
        let w = cols.len();
        self.max[..w].copy_from_slice(&softmaxes.max[cols.clone()]);
        self.weight[..w].copy_from_slice(&softmaxes.weight[cols.clone()]);
        self.smooth[..w].copy_from_slice(&softmaxes.smooth[cols.clone()]);
        if let Some(factor) = &softmaxes.factor {
            self.mean[..w].copy_from_slice(&factor.mean[cols.clone()]);
        } else if self.smooth == [0.0; COLS] {
            self.anchor = softmaxes.anchor;
        }
    }

    /// Whether one exponential serves row `i`'s softmax and the columns.
    fn shares_exponentials(&self, softmaxes: &Softmaxes<'_>, i: usize) -> bool {
        self.anchor.is_some()
            && self.anchor == softmaxes.anchor
            && softmaxes.factor.is_none()
            && softmaxes.smooth[i] == 0.0
    }
}

/// A row of `R + C` where one exponential against `anchor` serves both, and its sums. `weight`: the row's.
#[inline(always)]
fn shared_row<S: Simd>(anchor: f32, weight: f32, columns: &Columns, at: Row<'_>, row: &mut [f32], sums: &mut RowSums) {
    let (anchor, weight) = (S::F32::splat(anchor), S::F32::splat(weight));
    let (mut gs, mut g_sum) = (S::F32::splat(0.0), S::F32::splat(0.0));
    let weights = &columns.weight[..row.len()];
    for (to, w) in lanes_mut::<S>(row).zip(lanes::<S>(weights)) {
        let s = S::F32::load(to);
        let g = exp_uncapped(s.sub(anchor)).mul(S::F32::load(w).add(weight));
        (gs, g_sum) = (g.mul_add(s, gs), g_sum.add(g));
        g.store(to);
    }
    let (mut gs, mut g_sum) = (f64::from(total::<S>(gs)), f64::from(total::<S>(g_sum)));
    for aside in at.asides {
        row[aside.j - at.cols.start] = aside.g;
        gs += f64::from(aside.g) * f64::from(aside.logit);
        g_sum += f64::from(aside.g);
    }
    (sums.gs, sums.g) = (sums.gs + gs, sums.g + g_sum);
}

/// [`Law::apply`] of softmaxes where one exponential serves all of them and of the sums only `col_sums` are wanted: a row of
/// `R + C` is a multiple of that exponential, which is there already, if it was kept.
#[inline(always)]
fn apply_bare<S: Simd>(
    [by_row, by_col]: [Option<&Softmaxes<'_>>; 2],
    place: &Place,
    tile: &mut [f32],
    holds: Holds<'_>,
    asides: &[Aside],
    col_sums: Option<&mut [f32]>,
) {
    let (w, wide, stride) = (place.cols.len(), place.wide::<S>(), place.stride());
    let mut weights = [0.0; COLS];
    if let Some(by_col) = by_col {
        weights[..w].copy_from_slice(&by_col.weight[place.cols.clone()]);
    }
    let anchor = by_row.or(by_col).and_then(|softmaxes| softmaxes.anchor).expect("one number near all logits");
    for (r, (i, row)) in place.rows.clone().zip(tile.chunks_exact_mut(stride)).enumerate() {
        let row = &mut row[..wide];
        let weight = S::F32::splat(by_row.map_or(0.0, |by_row| by_row.weight[i]));
        if let Holds::Exponentials(kept) = holds {
            let kept = lanes::<S>(&kept[r * stride..][..wide]);
            for ((to, e), w) in lanes_mut::<S>(row).zip(kept).zip(lanes::<S>(&weights)) {
                S::F32::load(e).mul(S::F32::load(w).add(weight)).store(to);
            }
        } else {
            row[w..].fill(HOLE);
            let anchor = S::F32::splat(anchor);
            for (to, w) in lanes_mut::<S>(row).zip(lanes::<S>(&weights)) {
                let e = exp_uncapped(S::F32::load(to).sub(anchor));
                e.mul(S::F32::load(w).add(weight)).store(to);
            }
        }
    }
    for aside in asides {
        tile[place.at(aside.i, aside.j)] = aside.g;
    }
    if let Some(sums) = col_sums {
        let mut totals = [0.0; COLS];
        for row in tile.chunks_exact(stride) {
            add_row::<S>(&mut totals, &row[..wide]);
        }
        sums.iter_mut().zip(&totals).for_each(|(c, x)| *c += x);
    }
}

/// Row `i` of a row softmax, times its factor `q` less its mean.
#[inline(always)]
fn row_softmax<S: Simd>(softmaxes: &Softmaxes<'_>, i: usize, q: &[f32], row: &mut [f32]) {
    let norm = Softmax { max: S::F32::splat(softmaxes.max[i]), weight: S::F32::splat(softmaxes.weight[i]) };
    if let Some(factor) = &softmaxes.factor {
        let mean = S::F32::splat(factor.mean[i]);
        for (g, q) in lanes_mut::<S>(row).zip(lanes::<S>(q)) {
            norm.of(S::F32::load(g)).mul(S::F32::load(q).sub(mean)).store(g);
        }
    } else {
        let smooth = S::F32::splat(softmaxes.smooth[i]);
        for g in lanes_mut::<S>(row) {
            norm.of(S::F32::load(g)).sub(smooth).store(g);
        }
    }
}

/// Adds a row of column softmaxes of the logits `s`, times their factor `q` less its mean.
#[inline(always)]
fn add_col_softmax<S: Simd>(factor: bool, columns: &Columns, q: &[f32], s: &[f32], row: &mut [f32]) {
    let lanes_count = <S::F32 as Register<f32>>::LANES;
    for (n, (g, s)) in lanes_mut::<S>(row).zip(lanes::<S>(s)).enumerate() {
        let at = n * lanes_count;
        let norm = Softmax { max: S::F32::load(&columns.max[at..]), weight: S::F32::load(&columns.weight[at..]) };
        let p = norm.of(S::F32::load(s));
        let before = S::F32::load(g);
        let sum = if factor {
            p.mul_add(S::F32::load(&q[at..]).sub(S::F32::load(&columns.mean[at..])), before)
        } else {
            before.add(p.sub(S::F32::load(&columns.smooth[at..])))
        };
        sum.store(g);
    }
}

/// A row of the sigmoid law; returns the sum of its softplus.
#[inline(always)]
fn sigmoid_row<S: Simd>(bias: f32, smoothing: f32, share: f32, row: &mut [f32]) -> f32 {
    let (w, b, t) = (S::F32::splat(share), S::F32::splat(bias), S::F32::splat(0.5 * smoothing));
    let mut value = S::F32::splat(0.0);
    for g in lanes_mut::<S>(row) {
        let (softplus, sigma) = softplus_sigmoid(S::F32::load(g).add(b));
        value = value.add(softplus);
        sigma.sub(t).mul(w).store(g);
    }
    total::<S>(value)
}

impl Factor<'_> {
    /// The entry of `Q` of two rows, as a tile has it.
    pub fn entry(isa: Isa, left: &[f32], right: &[f32]) -> f32 {
        isa.run(Entry { left, right })
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, place: &Place, q: &mut [f32]) {
        let Place { rows, cols } = place;
        let left = Left {
            data: &self.left[rows.start * self.dim..],
            row: self.dim,
            col: 1,
            rows: rows.len(),
            depth: self.dim,
        };
        product::<S, f32, Inner, LONG>(left, &self.right[cols.start * self.dim..], cols.len(), q, COLS, false);
    }
}

struct Entry<'a> {
    left: &'a [f32],
    right: &'a [f32],
}

impl Op for Entry<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self) -> f32 {
        let mut lanes = S::F32::splat(0.0);
        for (left, right) in self.left.chunks(LONG).zip(self.right.chunks(LONG)) {
            let mut sum = S::F32::splat(0.0);
            for (&x, &y) in left.iter().zip(right) {
                sum = S::F32::splat(x).mul_add(S::F32::splat(y), sum);
            }
            lanes = lanes.add(sum);
        }
        fold::<S>(lanes, |first, _| first)
    }
}
