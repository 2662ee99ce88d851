//! Random numbers without a state: functions of a key and a counter, the same on every machine, in any order and by any
//! number of threads.

use crate::law::{Num, ln_1p};
use core::f32::consts::{LN_2, TAU};

/// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011): 128 random bits of a counter under a key.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < 10 {
        let (a, b) = (0xd251_1f53 * counter[0] as u64, 0xcd9e_8d57 * counter[2] as u64);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
        round += 1;
    }
    counter
}

/// Numbers 4 `index` to 4 `index` + 3 of the standard normals that `(seed, stream)` stands for. The square root is the
/// machine's.
#[inline(always)]
pub fn normals(seed: u64, stream: u32, index: u64, sqrt: impl Fn(f32) -> f32) -> [f32; 4] {
    let [a, b, c, d] = philox([index as u32, (index >> 32) as u32, stream, 0], [seed as u32, (seed >> 32) as u32]);
    let ([x, y], [z, w]) = (box_muller(a, b, &sqrt), box_muller(c, d, &sqrt));
    [x, y, z, w]
}

/// Two independent normals of 64 random bits (Box and Muller, 1958).
#[inline(always)]
fn box_muller(radius: u32, angle: u32, sqrt: impl Fn(f32) -> f32) -> [f32; 2] {
    // A number in (0, 1]: near 0, where the long radii are, rounding takes nothing from it.
    let uniform = ((radius as f32 + 0.5) * (1.0 / 4_294_967_296.0)).to_bits();
    let (octave, fraction) = ((uniform >> 23) as i32 - 127, f32::from_bits(uniform & 0x007f_ffff | 0x3f80_0000) - 1.0);
    let ln = octave as f32 * LN_2 + ln_1p(fraction);
    let r = sqrt(Num::max(-2.0 * ln, 0.0));
    let [sin, cos] = turn(angle);
    [r * cos, r * sin]
}

/// Sine and cosine of `angle / 2^32` turns, to 1e-7.
#[inline(always)]
fn turn(angle: u32) -> [f32; 2] {
    // At most an eighth of a turn from a multiple of a quarter: there few terms of the series do.
    let quarters = angle.wrapping_add(1 << 29) >> 30;
    let x = angle.wrapping_sub(quarters << 30) as i32 as f32 * (TAU / 4_294_967_296.0);
    let q = x * x;
    let sin = x * (1.0 + q * (-1.0 / 6.0 + q * (1.0 / 120.0 + q * (-1.0 / 5040.0 + q * (1.0 / 362_880.0)))));
    let cos = 1.0 + q * (-0.5 + q * (1.0 / 24.0 + q * (-1.0 / 720.0 + q * (1.0 / 40_320.0))));
    let [sin, cos] = if quarters & 1 == 0 { [sin, cos] } else { [cos, -sin] };
    if quarters & 2 == 0 { [sin, cos] } else { [-sin, -cos] }
}

/// Rounds of an [`Order`]'s network.
const ROUNDS: u64 = 24;

/// A random order of 0..n, that of `data::permute` of the host, whose tests say how random it is: a Feistel network on the
/// smallest power of two >= n, walked until it lands below n, less than two passes on average.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    n: u64,
    key: u64,
    low: u32,
    low_mask: u64,
    high_mask: u64,
}

impl Order {
    /// The order of 0..n, n >= 1, that `(seed, stream)` stands for.
    #[inline(always)]
    pub fn new(seed: u64, stream: u64, n: u64) -> Order {
        let bits = u64::BITS - (n - 1).leading_zeros();
        let low = bits / 2;
        Order { n, key: mix(mix(seed) ^ stream), low, low_mask: (1 << low) - 1, high_mask: (1 << (bits - low)) - 1 }
    }

    /// What stands at position `index` < n.
    #[inline(always)]
    pub fn at(&self, index: u64) -> u64 {
        let mut x = index;
        loop {
            let (mut high, mut low) = (x >> self.low, x & self.low_mask);
            let mut round = 0;
            while round < ROUNDS {
                // Rounds live in the top byte, the halves (32 bits at most) below: no two inputs of the hash coincide.
                let key = self.key.wrapping_add(round << 56);
                if round % 2 == 0 {
                    high ^= mix(key.wrapping_add(low)) & self.high_mask;
                } else {
                    low ^= mix(key.wrapping_add(high)) & self.low_mask;
                }
                round += 1;
            }
            x = high << self.low | low;
            if x < self.n {
                return x;
            }
        }
    }
}

/// The finaliser of SplitMix64 after its increment: a bijection of u64 that spreads every input bit over the word.
#[inline(always)]
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
