//! The random order of an epoch, as a function.
//!
//! A Feistel network on the smallest power of two >= n, walked until it lands below n (cycle walking): a bijection
//! of the power of two restricted to a bijection of 0..n, less than two evaluations on average.

use std::ops::Range;

/// Rounds of the network. A handful make a good permutation of a large set; tiny sets, where a round knows only a bit
/// or two, need this many before all orders are equally frequent (tested).
const ROUNDS: u64 = 24;

/// Position `index` of epoch `epoch`'s random order of 0..n: a keyed bijection, O(1) at any index, so that a
/// resumed run needs no state.
///
/// # Panics
/// When `index >= n`.
pub fn permute(seed: u64, epoch: u64, n: usize, index: usize) -> usize {
    assert!(index < n, "position {index} of an order of {n}");
    let network = Network::new(seed, epoch, n);
    let mut x = index as u64;
    loop {
        [x] = network.pass([x], |round, x| network.round(round, x));
        if (x as usize) < n {
            return x as usize;
        }
    }
}

/// The order of one epoch, for many of its positions: [`permute`], with what its rounds can be in tables.
#[derive(Debug)]
pub struct Order {
    n: usize,
    network: Network,
    /// What each round makes of each half that it can be given, [`Order::stride`] apart; nothing of sets so large that the
    /// tables would not stay in cache.
    rounds: Vec<u16>,
}

impl Order {
    /// Most bits of a half that has tables: 192 KiB of them.
    const TABULATED: u32 = 12;

    /// That of 0..n in epoch `epoch`.
    pub fn new(seed: u64, epoch: u64, n: usize) -> Order {
        let network = Network::new(seed, epoch, n);
        let mut order = Order { n, network, rounds: Vec::new() };
        if order.network.high_mask < 1 << Order::TABULATED {
            let halves = 0..order.stride() as u64;
            let network = &order.network;
            order.rounds = (0..ROUNDS).flat_map(|r| halves.clone().map(move |x| network.round(r, x) as u16)).collect();
        }
        order
    }

    /// Halves there are: the upper ones, of as many bits as the lower ones or one more.
    fn stride(&self) -> usize {
        self.network.high_mask as usize + 1
    }

    /// Appends [`permute`] of each of `range` to `out`; several at a time, as each alone is a chain of waits.
    ///
    /// # Panics
    /// When `range` ends beyond `n`.
    pub fn extend(&self, range: Range<usize>, out: &mut Vec<usize>) {
        let n = self.n;
        assert!(range.end <= n, "positions {range:?} of an order of {n}");
        let mut walking: Vec<usize> = (out.len()..out.len() + range.len()).collect();
        out.extend(range);
        while !walking.is_empty() {
            let (together, alone) = walking.as_chunks::<8>();
            for places in together {
                let after = self.pass(places.map(|place| out[place] as u64));
                places.iter().zip(after).for_each(|(&place, x)| out[place] = x as usize);
            }
            for &place in alone {
                out[place] = self.pass([out[place] as u64])[0] as usize;
            }
            walking.retain(|&place| out[place] >= n);
        }
    }

    fn pass<const L: usize>(&self, x: [u64; L]) -> [u64; L] {
        if self.rounds.is_empty() {
            return self.network.pass(x, |round, x| self.network.round(round, x));
        }
        let stride = self.stride();
        self.network.pass(x, |round, x| u64::from(self.rounds[round as usize * stride + x as usize]))
    }
}

/// A bijection of the numbers below a power of two.
#[derive(Debug)]
struct Network {
    key: u64,
    low: u32,
    low_mask: u64,
    high_mask: u64,
}

impl Network {
    /// Of the smallest power of two >= n.
    fn new(seed: u64, epoch: u64, n: usize) -> Network {
        let bits = usize::BITS - (n - 1).leading_zeros();
        let low = bits / 2;
        Network { key: mix(mix(seed) ^ epoch), low, low_mask: (1 << low) - 1, high_mask: (1 << (bits - low)) - 1 }
    }

    /// What is added to one half in round `round` where the other half is `from`.
    fn round(&self, round: u64, from: u64) -> u64 {
        // Rounds live in the top byte, the halves (32 bits at most) below: no two inputs of the hash coincide.
        let key = self.key.wrapping_add(round << 56);
        mix(key.wrapping_add(from)) & if round.is_multiple_of(2) { self.high_mask } else { self.low_mask }
    }

    /// All rounds, as `round` says them.
    fn pass<const L: usize>(&self, x: [u64; L], round: impl Fn(u64, u64) -> u64) -> [u64; L] {
        let (mut high, mut low) = (x.map(|x| x >> self.low), x.map(|x| x & self.low_mask));
        for r in 0..ROUNDS {
            let (to, from) = if r % 2 == 0 { (&mut high, &low) } else { (&mut low, &high) };
            to.iter_mut().zip(from).for_each(|(to, &from)| *to ^= round(r, from));
        }
        std::array::from_fn(|i| high[i] << self.low | low[i])
    }
}

/// The finaliser of SplitMix64 after its increment: a bijection of u64 that spreads every input bit over the word.
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn order(seed: u64, epoch: u64, n: usize) -> Vec<usize> {
        (0..n).map(|i| permute(seed, epoch, n, i)).collect()
    }

    #[test]
    fn every_epoch_visits_everything_once() {
        for n in [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 1000, 65_535, 65_536, 65_537] {
            for (seed, epoch) in [(0, 0), (0, 1), (u64::MAX, 3), (17, u64::MAX)] {
                let mut seen = order(seed, epoch, n);
                let mut whole = vec![7];
                Order::new(seed, epoch, n).extend(n / 3..n, &mut whole);
                assert_eq!(whole[1..], seen[n / 3..]);
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..n), "n = {n}, seed = {seed}, epoch = {epoch}");
            }
        }
    }

    #[test]
    fn an_order_is_the_same_with_tables_and_without() {
        for (n, tables) in [((1 << 24) - 5, true), ((1 << 24) + 1, false), (1 << 26, false)] {
            let order = Order::new(3, 5, n);
            assert_eq!(order.rounds.is_empty(), !tables);
            for range in [0..17, n / 2..n / 2 + 3, n - 9..n] {
                let mut some = Vec::new();
                order.extend(range.clone(), &mut some);
                assert!(some.into_iter().eq(range.map(|i| permute(3, 5, n, i))), "n = {n}");
            }
        }
    }

    #[test]
    fn seeds_and_epochs_give_unrelated_orders() {
        // Two independent orders of 1000 agree in Poisson(1) positions: 10 or more has probability 1e-7.
        let orders = [order(1, 0, 1000), order(1, 1, 1000), order(1, 2, 1000), order(2, 0, 1000), order(0, 1, 1000)];
        for (i, a) in orders.iter().enumerate() {
            assert!(a.iter().enumerate().filter(|&(at, &x)| at == x).count() < 10, "order {i} is near the identity");
            for b in &orders[..i] {
                assert!(a.iter().zip(b).filter(|(x, y)| x == y).count() < 10);
            }
        }
    }

    /// Pearson's statistic of counts against equal frequencies, minus its mean, in standard deviations.
    fn chi_square_sigmas(counts: impl Iterator<Item = u32>, cells: usize, draws: usize) -> f64 {
        let mean = draws as f64 / cells as f64;
        let chi2: f64 = counts.map(|c| (f64::from(c) - mean).powi(2) / mean).sum();
        let freedom = (cells - 1) as f64;
        (chi2 - freedom) / (2.0 * freedom).sqrt()
    }

    #[test]
    fn all_orders_of_small_sets_are_equally_likely() {
        // Fails with fewer than 20 rounds (n = 6). 5 sigmas: the draws are fixed, so this does not flicker.
        for (n, factorial) in [(2, 2), (3, 6), (4, 24), (5, 120), (6, 720)] {
            let draws = 200 * factorial;
            let mut counts = HashMap::<Vec<usize>, u32>::new();
            for epoch in 0..draws as u64 {
                *counts.entry(order(5, epoch, n)).or_default() += 1;
            }
            assert_eq!(counts.len(), factorial, "orders of {n} reached");
            let sigmas = chi_square_sigmas(counts.into_values(), factorial, draws);
            assert!(sigmas.abs() < 5.0, "n = {n}: {sigmas} sigmas");
        }
    }

    #[test]
    fn places_and_neighbours_are_uniform() {
        let n = 100;
        let draws = 40_000;
        let mut place = vec![0u32; n];
        let mut step = vec![0u32; n];
        for epoch in 0..draws as u64 {
            let (a, b) = (permute(9, epoch, n, 41), permute(9, epoch, n, 42));
            place[a] += 1;
            step[(n + b - a) % n] += 1;
        }
        assert_eq!(step[0], 0);
        let sigmas =
            [chi_square_sigmas(place.into_iter(), n, draws), chi_square_sigmas(step.into_iter().skip(1), n - 1, draws)];
        assert!(sigmas.iter().all(|s| s.abs() < 5.0), "{sigmas:?} sigmas");
        // Within one epoch: the first tenth of a large order is spread evenly over the set.
        let n = 1_000_003;
        let mut cells = vec![0u32; 1000];
        for i in 0..n / 10 {
            cells[permute(3, 0, n, i) * 1000 / n] += 1;
        }
        // Drawn without replacement: the variance is 9/10 of the multinomial's, which 5 sigmas do not notice.
        let sigmas = chi_square_sigmas(cells.into_iter(), 1000, n / 10);
        assert!(sigmas < 5.0 && sigmas > -10.0, "{sigmas} sigmas");
    }

    #[test]
    #[should_panic(expected = "position 3 of an order of 3")]
    fn positions_are_checked() {
        permute(0, 0, 3, 3);
    }
}
