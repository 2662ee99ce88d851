//! The scalar law: tiltings, the log-sum-exp monoid and the functions every dL/dS is made of.
//!
//! Everything is generic over [`Num`], so that one definition serves a GPU lane (f32) and a CPU vector
//! register of any width. Nothing here branches on data: selects only.

/// A lane, or a register of lanes, of f32.
///
/// A register counts logits in a unit of its own, of which [`Num::exp`] is the exponential: nats where `e^x` is computed,
/// octaves where the machine offers `2^x`. Every function here is right in both.
pub trait Num: Copy {
    /// Nats in the unit logits are counted in.
    const NATS: f32 = 1.0;

    /// Every lane holds `x`.
    fn splat(x: f32) -> Self;
    /// `self + b`.
    fn add(self, b: Self) -> Self;
    /// `self - b`.
    fn sub(self, b: Self) -> Self;
    /// `self * b`.
    fn mul(self, b: Self) -> Self;
    /// `self / b`.
    fn div(self, b: Self) -> Self;
    /// `self * b + c`, fused where the machine fuses.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger.
    fn max(self, b: Self) -> Self;
    /// `self * 2^n`, a normal number, of a normal number and an integer n given as [`MAGIC`]` + n`.
    fn scale2(self, n: Self) -> Self;
    /// `if self < b { x } else { y }`, lane by lane.
    fn select_lt(self, b: Self, x: Self, y: Self) -> Self;
    /// 0 where `x < low`, `self` elsewhere.
    #[inline(always)]
    fn zero_lt(self, x: Self, low: Self) -> Self {
        x.select_lt(low, Self::splat(0.0), self)
    }

    /// The exponential of a logit: `e^(NATS self)`.
    #[inline(always)]
    fn exp(self) -> Self {
        exp(self)
    }

    /// `ln(1 + self)` for self in [0, 1].
    #[inline(always)]
    fn ln_1p(self) -> Self {
        ln_1p(self)
    }

    /// `|self|`.
    #[inline(always)]
    fn abs(self) -> Self {
        self.max(Self::splat(0.0).sub(self))
    }
}

impl Num for f32 {
    #[inline(always)]
    fn splat(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn add(self, b: f32) -> f32 {
        self + b
    }
    #[inline(always)]
    fn sub(self, b: f32) -> f32 {
        self - b
    }
    #[inline(always)]
    fn mul(self, b: f32) -> f32 {
        self * b
    }
    #[inline(always)]
    fn div(self, b: f32) -> f32 {
        self / b
    }
    #[inline(always)]
    fn mul_add(self, b: f32, c: f32) -> f32 {
        self * b + c
    }
    #[inline(always)]
    fn max(self, b: f32) -> f32 {
        if self > b { self } else { b }
    }
    #[inline(always)]
    fn scale2(self, n: f32) -> f32 {
        // The low bits of `n` are those of the integer: added to the exponent.
        f32::from_bits(self.to_bits().wrapping_add(n.to_bits() << 23))
    }
    #[inline(always)]
    fn select_lt(self, b: f32, x: f32, y: f32) -> f32 {
        if self < b { x } else { y }
    }
}

/// Below this, `exp` is 0: the smallest argument whose result is a normal number.
pub const EXP_MIN: f32 = -87.336_54;
/// Above this, `exp` stays at its value here, 2.4e38: finite, so that no NaN is made from it.
pub const EXP_MAX: f32 = 88.376_26;

/// 1.5 * 2^23: added to a number, it leaves no bits for a fraction, and the nearest integer in the low bits.
pub const MAGIC: f32 = 12_582_912.0;

/// `e^x`, relative error below 2e-7 on [`EXP_MIN`, `EXP_MAX`]; 0 below (-inf included), capped above.
#[inline(always)]
pub fn exp<F: Num>(x: F) -> F {
    exp_uncapped(x.select_lt(F::splat(EXP_MAX), x, F::splat(EXP_MAX)))
}

/// [`exp`] of what is known not to exceed [`EXP_MAX`].
#[inline(always)]
pub fn exp_uncapped<F: Num>(x: F) -> F {
    let t = x.mul_add(F::splat(core::f32::consts::LOG2_E), F::splat(MAGIC));
    let n = t.sub(F::splat(MAGIC));
    // ln 2 in two parts: n times the first is exact.
    let r = n.mul_add(F::splat(-0.693_359_4), x);
    let r = n.mul_add(F::splat(2.121_944_4e-4), r);
    let p = F::splat(1.987_569_1e-4);
    let p = p.mul_add(r, F::splat(1.398_199_9e-3));
    let p = p.mul_add(r, F::splat(8.333_452e-3));
    let p = p.mul_add(r, F::splat(4.166_579_6e-2));
    let p = p.mul_add(r, F::splat(1.666_666_5e-1));
    let p = p.mul_add(r, F::splat(5e-1));
    // Below EXP_MIN this is anything, a NaN too.
    let e = p.mul_add(r.mul(r), r).add(F::splat(1.0)).scale2(t);
    e.zero_lt(x, F::splat(EXP_MIN))
}

/// `ln(1 + t)` for t in [0, 1], relative error below 3e-7, by the atanh series.
#[inline(always)]
pub fn ln_1p<F: Num>(t: F) -> F {
    let z = t.div(t.add(F::splat(2.0)));
    let q = z.mul(z);
    let mut p = F::splat(1.0 / 15.0);
    for odd in [13.0f32, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        p = p.mul_add(q, F::splat(1.0 / odd));
    }
    z.add(z).mul(p)
}

/// `(softplus(x), sigmoid(x))` = `(ln(1 + e^x), 1/(1 + e^-x))`, the first in nats, both relatively accurate at any x.
#[inline(always)]
pub fn softplus_sigmoid<F: Num>(x: F) -> (F, F) {
    let zero = F::splat(0.0);
    let t = zero.sub(x.abs()).exp();
    let value = x.max(zero).mul(F::splat(F::NATS)).add(t.ln_1p());
    let sigma = x.select_lt(zero, t, F::splat(1.0)).div(t.add(F::splat(1.0)));
    (value, sigma)
}

/// Chebyshev coefficients of `exp(z^2) erfc(z) / t` in `2t - 1`, `t = 4/(4 + z)`, from its values in 40 digits.
/// The first 12 are enough for f32.
pub const ERFC: [f64; 24] = [
    0.408_024_469_549_131_46,
    0.376_358_235_676_367_45,
    0.147_580_354_572_223_63,
    0.049_571_317_930_027_586,
    0.014_227_107_557_117_175,
    0.003_443_493_262_717_524,
    0.000_682_254_183_283_808,
    0.000_103_404_519_757_561_87,
    9.728_545_951_990_15e-6,
    -1.198_871_375_841_204_5e-7,
    -2.174_776_703_454_956_4e-7,
    -3.029_176_773_599_14e-8,
    9.479_917_565_204_63e-10,
    8.633_411_694_990_891e-10,
    6.872_156_425_956_353e-11,
    -1.703_489_843_829_336_6e-11,
    -3.392_130_686_835_654_4e-12,
    2.615_808_766_936_875_3e-13,
    1.212_767_580_235_116_4e-13,
    -2.114_689_538_592_846_6e-15,
    -4.117_340_933_785_413e-15,
    -6.328_713_119_821_907e-17,
    1.439_311_164_915_569_5e-16,
    4.561_486_577_450_828e-18,
];

/// `exp(from - to)` for running maxima: 0 when there was nothing yet (`from` = -inf), never NaN.
#[inline(always)]
pub fn decay<F: Num>(from: F, to: F) -> F {
    let none = F::splat(f32::MIN);
    from.select_lt(none, F::splat(0.0), from.sub(to).exp())
}

/// One row's or column's softmax, ready for the backward pass: `weight * exp(s - max)` is the
/// probability of logit `s` times the weight of that softmax in the loss.
#[derive(Clone, Copy, Debug)]
pub struct Softmax<F> {
    /// Largest logit (any anchor near it).
    pub max: F,
    /// Loss weight over the sum of `exp(s - max)`.
    pub weight: F,
}

impl<F: Num> Softmax<F> {
    /// The weighted probability of logit `s`.
    #[inline(always)]
    pub fn of(self, s: F) -> F {
        s.sub(self.max).exp().mul(self.weight)
    }
}

/// A partial log-sum-exp, `max + ln(sum)`; partial results over disjoint blocks merge in any grouping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lse {
    /// Largest logit so far; -inf when there is none.
    pub max: f32,
    /// Sum of `exp(s - max)`: of very many, one after another.
    pub sum: f64,
}

impl Lse {
    /// The sum of nothing.
    pub const EMPTY: Lse = Lse { max: f32::NEG_INFINITY, sum: 0.0 };

    /// The LSE of one logit.
    #[inline(always)]
    pub fn of(s: f32) -> Lse {
        Lse { max: s, sum: 1.0 }
    }

    /// The LSE of both parts.
    #[inline(always)]
    pub fn merge(self, other: Lse) -> Lse {
        let max = Num::max(self.max, other.max);
        let part = |lse: Lse| lse.sum * f64::from(decay(lse.max, max));
        Lse { max, sum: part(self) + part(other) }
    }
}

/// What a tilting multiplies out between two embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// `sum_k u_k v_k`.
    Inner,
    /// `sum_k (u_k - v_k)^2`.
    SquaredDistance,
}

macro_rules! tilts {
    ($($(#[$doc:meta])* $name:ident = $text:literal { unit_rows: $unit:literal, product: $product:ident, scale: $scale:literal })*) => {
        /// How a logit is made from two embeddings: `S = scale / tau * product(u, v)`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Tilting { $($(#[$doc])* $name,)* }

        impl Tilting {
            /// Every tilting there is.
            pub const ALL: &'static [Tilting] = &[$(Tilting::$name,)*];

            /// The name on the command line.
            pub const fn name(self) -> &'static str {
                match self { $(Tilting::$name => $text,)* }
            }
            /// Embeddings are divided by their norms first; a zero row stays zero and gets no gradient.
            pub const fn unit_rows(self) -> bool {
                match self { $(Tilting::$name => $unit,)* }
            }
            /// What is multiplied out.
            pub const fn product(self) -> Product {
                match self { $(Tilting::$name => Product::$product,)* }
            }
            /// `scale` in `S = scale / tau * product`.
            pub const fn scale(self) -> f64 {
                match self { $(Tilting::$name => $scale,)* }
            }
        }
    };
}

tilts! {
    /// `<u/|u|, v/|v|> / tau`, classical CLIP \[14\].
    Cosine = "cosine" { unit_rows: true, product: Inner, scale: 1.0 }
    /// `<u, v> / tau`, unnormalised encoders \[25\].
    Dot = "dot" { unit_rows: false, product: Inner, scale: 1.0 }
    /// `-|u - v|^2 / (2 tau)`, the positive quadratic form \[26\].
    L2 = "l2" { unit_rows: false, product: SquaredDistance, scale: -0.5 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 97th float in the whole range: a wrong coefficient or a lost bit of ln 2 shows at once.
    #[test]
    fn exp_is_within_its_bound() {
        let mut worst = 0f64;
        for bits in (0..EXP_MIN.abs().to_bits()).step_by(97) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let want = libm_exp(f64::from(x));
                worst = worst.max((f64::from(exp(x)) / want - 1.0).abs());
            }
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30f32), 0.0);
        assert!(exp(f32::INFINITY).is_finite());
    }

    #[test]
    fn softplus_and_sigmoid_are_relatively_accurate_in_the_tails() {
        for i in -8000..8000 {
            let x = i as f32 * 0.01;
            let e = libm_exp(f64::from(x));
            let (value, sigma) = softplus_sigmoid(x);
            let want = if e < 1e-5 { e * (1.0 - e / 2.0) } else { std_ln(1.0 + e) };
            assert!((f64::from(value) / want - 1.0).abs() < 5e-7, "softplus({x})");
            assert!((f64::from(sigma) / (e / (1.0 + e)) - 1.0).abs() < 5e-7, "sigmoid({x})");
        }
    }

    #[test]
    fn partial_lse_merge_in_any_grouping() {
        let logits = [3.0f32, -1e4, 9.5e3, 9.49e3, f32::NEG_INFINITY, 0.0, 9.5e3];
        let whole = logits.iter().fold(Lse::EMPTY, |a, &s| a.merge(Lse::of(s)));
        for cut in 0..logits.len() {
            let part = |x: &[f32]| x.iter().fold(Lse::EMPTY, |a, &s| a.merge(Lse::of(s)));
            let merged = part(&logits[..cut]).merge(part(&logits[cut..]));
            assert_eq!(merged.max, whole.max);
            assert!((merged.sum / whole.sum - 1.0).abs() < 1e-6);
        }
        assert_eq!(Lse::EMPTY.merge(Lse::EMPTY).sum, 0.0);
    }

    extern crate std;
    fn libm_exp(x: f64) -> f64 {
        x.exp()
    }
    fn std_ln(x: f64) -> f64 {
        x.ln()
    }
}
