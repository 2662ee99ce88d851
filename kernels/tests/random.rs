//! Random numbers: Philox against its authors' answers, normals against the normal law, and the kernels against the host.

mod common;

use common::{Array, Type, launch};
use kernels::abi::{DrawPairings, Normals};
use kernels::entries as e;
use kernels::random::{Order, normals, philox};

/// Answers from `kat_vectors` of Random123.
#[test]
fn philox_is_that_of_its_authors() {
    let ones = u32::MAX;
    for (counter, key, want) in [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ] {
        assert_eq!(philox(counter, key), want, "{counter:x?} under {key:x?}");
    }
}

fn stream(seed: u64, stream: u32, len: usize) -> Vec<f32> {
    let mut all: Vec<f32> =
        (0..len.div_ceil(4) as u64).flat_map(|index| normals(seed, stream, index, f32::sqrt)).collect();
    all.truncate(len);
    all
}

/// The distribution function of the standard normals, by Simpson's rule.
fn below(x: f64) -> f64 {
    const STEPS: usize = 200;
    let (h, density) = (x / STEPS as f64, |t: f64| (-0.5 * t * t).exp() / std::f64::consts::TAU.sqrt());
    let weight = |k: usize| if k.is_multiple_of(STEPS) { 1.0 } else { [2.0, 4.0][k % 2] };
    0.5 + h / 3.0 * (0..=STEPS).map(|k| weight(k) * density(k as f64 * h)).sum::<f64>()
}

#[test]
fn normals_are_normal_and_independent() {
    const N: usize = 1 << 18;
    let mut all = stream(7, 0, N);
    let mean_of = |f: &dyn Fn(usize) -> f64| (0..N).map(f).sum::<f64>() / N as f64;
    let x = |i: usize| f64::from(all[i % N]);
    // Moments and correlations of neighbours (also across the fours), in their own standard deviations.
    let sigmas = (N as f64).sqrt();
    for (name, off) in [
        ("mean", mean_of(&x)),
        ("variance", (mean_of(&|i| x(i).powi(2)) - 1.0) / 2f64.sqrt()),
        ("skewness", mean_of(&|i| x(i).powi(3)) / 15f64.sqrt()),
        ("kurtosis", (mean_of(&|i| x(i).powi(4)) - 3.0) / 96f64.sqrt()),
        ("neighbours", mean_of(&|i| x(i) * x(i + 1))),
        ("squares of neighbours", mean_of(&|i| (x(i).powi(2) - 1.0) * (x(i + 1).powi(2) - 1.0)) / 2.0),
        ("four apart", mean_of(&|i| x(i) * x(i + 4))),
    ] {
        assert!((off * sigmas).abs() < 4.5, "{name}: {} sigmas", off * sigmas);
    }
    // Kolmogorov and Smirnov: beyond 1.95 in one of a thousand.
    all.sort_by(f32::total_cmp);
    let off = all.iter().enumerate().map(|(i, &x)| (below(f64::from(x)) - (i as f64 + 0.5) / N as f64).abs());
    for off in off {
        assert!(off * sigmas < 1.95, "{off}");
    }
    // One of 2^18 is beyond 4.6 on either side, as often as not.
    assert!(all[0] < -4.0 && all[N - 1] > 4.0 && all[0] > -7.0 && all[N - 1] < 7.0, "{} {}", all[0], all[N - 1]);
}

#[test]
fn streams_share_nothing() {
    let streams = [(7, 0), (7, 1), (8, 0), (7 | 1 << 32, 0), (7, 1 << 31)].map(|(seed, s)| stream(seed, s, 4096));
    for (i, a) in streams.iter().enumerate() {
        for b in &streams[..i] {
            let dot: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            assert!(dot.abs() < 4.5 * 64.0, "{dot}");
        }
    }
    // The counter has 64 bits.
    assert_ne!(normals(7, 0, 5, f32::sqrt), normals(7, 0, 5 | 1 << 32, f32::sqrt));
}

/// Lengths that are no multiple of four, grids larger and smaller than they need.
#[test]
fn normals_of_the_card_are_the_hosts() {
    for (len, grid) in [(1, 1), (3, 2), (1024, 1), (1030, 1), (2051, 4)] {
        let want = stream(u64::MAX / 3, 5, len);
        let normals = |out: *mut ()| Normals { out, len: len as u64, seed: u64::MAX / 3, stream: 5, reserved: 0 };
        let out = Array::<f32>::poison(len);
        launch(&e::NORMALS_F32, [grid, 1, 1], &normals(out.ptr_mut().cast()), 1);
        for (got, want) in out.get().into_iter().zip(&want) {
            assert!((got - want).abs() <= 1e-6 * want.abs(), "{got} and {want} of {len}");
        }
        for (t, kernel) in [(Type::Bf16, e::NORMALS_BF16), (Type::F16, e::NORMALS_F16)] {
            let out = Array::<u16>::poison(len);
            launch(&kernel, [grid, 1, 1], &normals(out.ptr_mut().cast()), 2);
            let want: Vec<u16> = want.iter().map(|&x| t.bits(x)).collect();
            assert_eq!(out.get(), want, "{t:?} of {len}");
        }
    }
}

#[test]
fn pairings_of_the_card_are_orders_and_their_inverses() {
    for (n, pairings) in [(1, 1), (2, 3), (300, 2), (257, 1)] {
        let (forth, back) = (Array::<u32>::poison((pairings + 1) * n), Array::<u32>::poison((pairings + 1) * n));
        let args = DrawPairings {
            forth: forth.ptr_mut(),
            back: back.ptr_mut(),
            seed: 3,
            n: n as u32,
            pairings: pairings as u32,
        };
        launch(&e::DRAW_PAIRINGS, [(n.div_ceil(256) * (pairings + 1)) as u32, 1, 1], &args, 3);
        let (forth, back) = (forth.get(), back.get());
        for (k, (forth, back)) in forth.chunks(n).zip(back.chunks(n)).enumerate() {
            let order = (k > 0).then(|| Order::new(3, !(k as u64 - 1), n as u64));
            for (i, &j) in forth.iter().enumerate() {
                assert_eq!(u64::from(j), order.map_or(i as u64, |o| o.at(i as u64)), "pairing {k} of {n} at {i}");
                assert_eq!(back[j as usize] as usize, i, "pairing {k} of {n} back from {j}");
            }
        }
    }
}
