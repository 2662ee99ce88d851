//! Exact search on the card's tiles against its definition: shapes off the tile, ties, infinities, heaps of all sizes.

mod common;
use common::*;
use half::f16;
use kernels::abi::{Search, Split};
use kernels::entries as e;
use std::ptr::null_mut;

/// Rows as the card splits them, with their units and how many halves a row has.
fn split(x: &[f32], dim: usize, items: bool) -> (Array<u16>, Array<f32>, usize) {
    let (rows, pitch) = (x.len() / dim, dim.next_multiple_of(8));
    let (from, out, unit) = (Array::of(x), Array::<u16>::poison(rows * 3 * pitch), Array::<f32>::poison(rows));
    let kernel = if items { e::SPLIT_ITEMS } else { e::SPLIT_QUERIES };
    let args = Split {
        x: from.ptr(),
        out: out.ptr_mut(),
        unit: unit.ptr_mut(),
        rows: rows as u32,
        dim: dim as u32,
        pitch: pitch as u32,
        reserved: 0,
    };
    launch(&kernel, [rows.div_ceil(8) as u32, 1, 1], &args, 4);
    for ((row, unit), x) in out.get().chunks(3 * pitch).zip(unit.get()).zip(x.chunks(dim)) {
        let part = |p: usize, k: usize| f64::from(f16::from_bits(row[p * pitch + k]).to_f32());
        let longest = x.iter().fold(0f64, |a, &x| a.max(f64::from(x).abs()));
        for k in 0..pitch {
            let want = f64::from(x.get(k).copied().unwrap_or(0.0));
            let (high, low) = (part(0, k), part(if items { 1 } else { 2 }, k));
            assert_eq!(part(if items { 2 } else { 1 }, k), high);
            let off = (f64::from(unit) * (high + low) - want).abs();
            assert!(off <= want.abs() / f64::from(1 << 22) + longest * 2f64.powi(-31), "{want}: {high} and {low}");
        }
    }
    (out, unit, 3 * pitch)
}

/// Rows of all sizes, and of zeros, keep 22 bits.
#[test]
fn rows_are_split_whatever_their_size() {
    for (size, dim) in [(1e-30f32, 3), (1e-3, 70), (1.0, 8), (3e4, 40), (1e30, 5), (0.0, 9)] {
        let x: Vec<f32> = Rng(dim as u64).vec(11 * dim, 1.0).into_iter().map(|x| size * x).collect();
        split(&x, dim, false);
        split(&x, dim, true);
    }
}

/// Small integers, whose scores are exact and often equal; zero has one sign.
fn integers(rng: &mut Rng, len: usize) -> Vec<f32> {
    rng.vec(len, 2.0).into_iter().map(|x| x.round() + 0.0).collect()
}

#[test]
fn ranks_and_best_items_follow_the_definition() {
    for (n, m, dim, first, keep, tiles) in
        [(1, 1, 1, 0, 1, 1), (37, 301, 5, 0, 4, 1), (130, 150, 33, 20, 150, 1), (70, 300, 16, 230, 17, 2)]
    {
        let mut rng = Rng((n + m) as u64);
        let (x, y) = (integers(&mut rng, n * dim), integers(&mut rng, m * dim));
        let mut offset: Vec<f32> = integers(&mut rng, m);
        if m > 1 {
            // No number, which ranks last, as minus infinity does.
            (offset[m / 2], offset[m / 3]) = (f32::NAN, f32::NEG_INFINITY);
        }
        let ((queries, query_unit, depth), (items, item_unit, _)) = (split(&x, dim, false), split(&y, dim, true));
        let score = |i: usize, j: usize| {
            let sum: f32 = (0..dim).map(|k| x[i * dim + k] * y[j * dim + k]).sum::<f32>() + offset[j];
            if sum.is_nan() { f32::NEG_INFINITY } else { sum }
        };
        let splits = m.div_ceil(128 * tiles);
        let offsets = Array::of(&offset);
        let (own, ranks) = (Array::<f32>::poison(n), Array::<u32>::poison(2 * splits * n));
        let heaps = Array::<u64>::poison((2 * splits + 1) * keep * n);
        let mut args = Search {
            queries: queries.ptr(),
            items: items.ptr(),
            query_unit: query_unit.ptr(),
            item_unit: item_unit.ptr(),
            offset: offsets.ptr(),
            own: own.ptr_mut(),
            ranks: ranks.ptr_mut(),
            heaps: null_mut(),
            n: n as u32,
            m: m as u32,
            depth: depth as u32,
            tiles: tiles as u32,
            keep: keep as u32,
            first: first as u32,
        };
        let rows = n.div_ceil(128) as u32;
        launch(&e::SEARCH_OWN, [1, rows, 1], &args, 5);
        launch(&e::SEARCH_RANK, [splits as u32, rows, 1], &args, 6);
        args.heaps = heaps.ptr_mut();
        launch(&e::SEARCH_NEAREST, [splits as u32, rows, 1], &args, 7);
        args.tiles = 2 * splits as u32;
        launch(&e::SEARCH_MERGE, [n.div_ceil(256) as u32, 1, 1], &args, 8);
        let (own, ranks, heaps) = (own.get(), ranks.get(), heaps.get());
        for i in 0..n {
            let mine = score(i, first + i);
            assert_eq!(own[i], mine, "own {i} of {n} x {m}");
            let before = |&j: &usize| score(i, j) > mine || (score(i, j) == mine && j < first + i);
            let rank: u32 = (0..2 * splits).map(|s| ranks[s * n + i]).sum();
            assert_eq!(rank as usize, (0..m).filter(before).count(), "rank {i} of {n} x {m}");
            let mut order: Vec<usize> = (0..m).collect();
            order.sort_by(|&a, &b| score(i, b).total_cmp(&score(i, a)));
            let mut keys: Vec<u64> = (0..keep).map(|k| heaps[(2 * splits * keep + k) * n + i]).collect();
            keys.sort_unstable_by(|a, b| b.cmp(a));
            for (place, (&key, &j)) in keys.iter().zip(&order).enumerate() {
                let bits = (key >> 32) as u32;
                let found = f32::from_bits(if bits >> 31 == 1 { bits ^ 1 << 31 } else { !bits });
                assert_eq!((!(key as u32) as usize, found), (j, score(i, j)), "place {place} of query {i}, {n} x {m}");
            }
            assert!(keys[m.min(keep)..].iter().all(|&key| key == 0), "more items than there are");
        }
    }
}

/// The same item in other tiles and rows ties to the bit, and a score has f32's digits.
#[test]
fn equal_items_tie_and_scores_have_the_digits_of_f32() {
    let (n, m, dim) = (130, 260, 70);
    let mut rng = Rng(9);
    let x = rng.vec(n * dim, 1.0);
    let mut y = rng.vec(130 * dim, 1.0);
    y.extend_from_within(..);
    let ((queries, query_unit, depth), (items, item_unit, _)) = (split(&x, dim, false), split(&y, dim, true));
    let (offset, own) = (Array::of(&vec![0f32; m]), Array::<f32>::poison(n));
    let mut found = [vec![], vec![]];
    for (first, found) in [0, 130].into_iter().zip(&mut found) {
        let args = Search {
            queries: queries.ptr(),
            items: items.ptr(),
            query_unit: query_unit.ptr(),
            item_unit: item_unit.ptr(),
            offset: offset.ptr(),
            own: own.ptr_mut(),
            ranks: null_mut(),
            heaps: null_mut(),
            n: n as u32,
            m: m as u32,
            depth: depth as u32,
            tiles: 1,
            keep: 1,
            first,
        };
        launch(&e::SEARCH_OWN, [1, 2, 1], &args, 3);
        *found = own.get();
    }
    assert_eq!(found[0], found[1]);
    for (i, got) in found[0].iter().enumerate() {
        let want: f64 = (0..dim).map(|k| f64::from(x[i * dim + k]) * f64::from(y[i * dim + k])).sum();
        assert!((f64::from(*got) - want).abs() < 1e-6 * dim as f64, "{got} and {want}");
    }
}
