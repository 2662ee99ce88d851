//! Rows on their way to the tile and out of it, against f64: lengths that lanes take by four and by one, held and not.
#![allow(missing_docs)]

mod common;

use common::{Array, Rng, Type, distance, halves, launch};
use kernels::abi::{Each, Finish, Prepare, Totals};
use kernels::entries as e;
use std::ptr::{null, null_mut};

const DIMS: [usize; 9] = [1, 4, 33, 130, 256, 512, 516, 1023, 1100];
const ROWS: usize = 11;

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Unit, centred and plain rows, of f32 and of halves, where addresses allow four numbers and where they do not; rows of
/// nothing, and of numbers whose squares overflow or vanish.
#[test]
fn prepared_rows_are_those_of_f64() {
    let kernels = [
        (Type::Bf16, [e::PREPARE_BF16_F32, e::PREPARE_BF16_BF16]),
        (Type::F16, [e::PREPARE_F16_F32, e::PREPARE_F16_F16]),
    ];
    for (t, kernels) in kernels {
        for dim in DIMS {
            for (way, off) in [("unit", 0), ("centred", 0), ("plain", 0), ("unit", 1), ("centred", 1)] {
                let mut rng = Rng(dim as u64);
                let mut x = rng.vec(ROWS * dim, 1.0);
                x[dim..2 * dim].fill(0.0);
                if way == "unit" && t == Type::Bf16 {
                    for (row, size) in [(2, 1e36), (3, 1e-37), (4, 1e-42), (5, 1e25), (6, 1e-25)] {
                        x[row * dim..(row + 1) * dim].iter_mut().for_each(|x| *x *= size);
                    }
                }
                let (bits, rounded) = halves(t, &x, dim, dim);
                // Four halves lie on 8 bytes: one number further on, nothing does.
                let shifted = |bits: &[u16]| Array::of(&[&vec![u16::MAX; off][..], bits].concat());
                let as_halves = shifted(&bits.get());
                let as_singles = Array::of(&[&vec![f32::NAN; off][..], &x].concat());
                let (shift, offset) = (rng.vec(dim, 1.0), rng.vec(ROWS, 1.0));
                let (shifts, offsets) = (Array::of(&shift), Array::of(&offset));
                // A 1 behind needs room.
                let pitch = (dim + 1).next_multiple_of(8);
                for (kernel, values, at) in [
                    (&kernels[0], wide(&x), as_singles.ptr().wrapping_add(off).cast::<()>()),
                    (&kernels[1], rounded, as_halves.ptr().wrapping_add(off).cast()),
                ] {
                    let out = Array::<u16>::poison(ROWS * pitch);
                    let (inverse, norm) = (Array::<f32>::poison(ROWS), Array::<f32>::poison(ROWS));
                    let (unit, centred) = (way == "unit", way == "centred");
                    let args = Prepare {
                        x: at,
                        shift: if centred { shifts.ptr() } else { null() },
                        offset: if centred { offsets.ptr() } else { null() },
                        out: out.ptr_mut(),
                        inverse: if unit { inverse.ptr_mut() } else { null_mut() },
                        half_norm: if centred { norm.ptr_mut() } else { null_mut() },
                        live: null(),
                        rows: ROWS as u32,
                        dim: dim as u32,
                        pitch: pitch as u32,
                        norm_scale: -0.5,
                        scale: 0.5,
                        behind: if centred { 1.0 } else { 0.0 },
                    };
                    launch(kernel, [ROWS.div_ceil(8) as u32, 1, 1], &args, 5);
                    let (out, inverse, norm) = (out.get(), inverse.get(), norm.get());
                    for i in 0..ROWS {
                        let name = format!("{t:?} {way} {off}, row {i} of {dim}");
                        let row = &values[i * dim..(i + 1) * dim];
                        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                        let counts = length >= f64::from(f32::MIN_POSITIVE);
                        let scale = if !unit {
                            0.5
                        } else if counts {
                            1.0 / length
                        } else {
                            0.0
                        };
                        if unit {
                            let off = (f64::from(inverse[i]) - scale).abs();
                            assert!(off <= 1e-6 * scale, "{name}: {} and {scale}", inverse[i]);
                        }
                        let got: Vec<f64> = out[i * pitch..(i + 1) * pitch].iter().map(|&x| t.value(x)).collect();
                        let want = row
                            .iter()
                            .zip(&shift)
                            .map(|(x, s)| scale * (x - if centred { f64::from(*s) } else { 0.0 }));
                        let want: Vec<f64> = want.collect();
                        if want.iter().all(|x| *x == 0.0) {
                            assert!(got[..dim].iter().all(|x| *x == 0.0), "{name}");
                        } else {
                            let off = distance(got[..dim].iter().copied(), &want);
                            assert!(off < if t == Type::Bf16 { 4e-3 } else { 6e-4 }, "{name}: {off:e}");
                        }
                        assert_eq!(got[dim], f64::from(args.behind), "{name}: behind");
                        assert!(got[dim + 1..].iter().all(|x| *x == 0.0), "{name}: padding");
                        if centred {
                            let square: f64 = got.iter().map(|x| x * x).sum();
                            let want = std::f64::consts::LOG2_E * f64::from(offset[i]) - 0.5 * square;
                            assert!((f64::from(norm[i]) - want).abs() < 1e-5 * square.max(1.0), "{name}: norm");
                        }
                    }
                }
            }
        }
    }
}

/// Gradients of each tilting, of one part and of three, set and added to, where addresses allow four numbers and where they
/// do not; in place where there is one part.
#[test]
fn finished_rows_are_those_of_f64() {
    for (t, kernel) in [(Type::Bf16, e::FINISH_BF16), (Type::F16, e::FINISH_F16)] {
        for dim in DIMS {
            for (way, parts, add, off) in [
                ("dot", 1, false, 0),
                ("unit", 1, true, 0),
                ("unit", 3, false, 0),
                ("squared", 3, true, 1),
                ("squared", 1, false, 0),
                ("none", 3, false, 0),
            ] {
                let mut rng = Rng(dim as u64);
                let pitch = dim.next_multiple_of(8);
                let (x, values) = halves(t, &rng.vec(ROWS * dim, 1.0), dim, pitch);
                let acc = rng.vec(parts * ROWS * dim, 2.0);
                let old = rng.vec(ROWS * dim, 1.0);
                let (inverse, g) = (rng.vec(ROWS, 1.0), rng.vec(4 * ROWS, 1.0));
                let (accs, inverses, gs) = (Array::of(&acc), Array::of(&inverse), Array::of(&g));
                let out = Array::of(&[&vec![f32::NAN; off][..], &old].concat());
                let along = Array::<f64>::poison(ROWS.div_ceil(8));
                // One part may be where the result goes.
                let in_place = way == "squared" && parts == 1;
                let to = if in_place { accs.ptr_mut() } else { out.ptr_mut().wrapping_add(off) };
                let args = Finish {
                    acc: accs.ptr(),
                    x: x.ptr(),
                    inverse: if way == "unit" { inverses.ptr() } else { null() },
                    g_sums: if way == "squared" { gs.ptr().wrapping_add(1) } else { null() },
                    out: if way == "none" { null_mut() } else { to },
                    along: along.ptr_mut(),
                    live: null(),
                    rows: ROWS as u32,
                    dim: dim as u32,
                    pitch: pitch as u32,
                    scale: 0.25,
                    gain: 2.0,
                    g_stride: 4,
                    add: u32::from(add),
                    parts: parts as u32,
                };
                launch(&kernel, [ROWS.div_ceil(8) as u32, 1, 1], &args, 5);
                let name = format!("{t:?} {way} of {dim}, {parts} parts");
                let sum = |k: usize| (0..parts).map(|p| f64::from(acc[p * ROWS * dim + k])).sum::<f64>();
                let mut want = vec![0f64; ROWS * dim];
                let mut all = 0f64;
                for i in 0..ROWS {
                    let row = i * dim..(i + 1) * dim;
                    let own: f64 = row.clone().map(|k| values[k] * sum(k)).sum();
                    all += own;
                    let (pull, scale) = match way {
                        "unit" => (own, 0.25 * f64::from(inverse[i])),
                        "squared" => (2.0 * f64::from(g[4 * i + 1]), 0.25),
                        _ => (0.0, 0.25),
                    };
                    for k in row {
                        want[k] = if add { f64::from(old[k]) } else { 0.0 } + scale * (sum(k) - pull * values[k]);
                    }
                }
                let got: f64 = along.get().iter().sum();
                assert!((got - all).abs() < 1e-5 * (ROWS * dim) as f64, "{name}: along {got} and {all}");
                if way != "none" {
                    let got = if in_place { accs.get() } else { out.get()[off..].to_vec() };
                    let off = distance(wide(&got), &want);
                    assert!(off < 1e-5, "{name}: {off:e}");
                }
            }
        }
    }
}

/// Sums of one launch, of other lengths, widths and numbers of blocks each.
#[test]
fn totals_are_those_of_f64() {
    let mut rng = Rng(3);
    let singles = rng.vec(4 * 700, 1.0);
    let doubles = wide(&rng.vec(1030, 1.0));
    let (of_four, of_one) = (Array::of(&singles), Array::of(&doubles));
    let out = [4, 3, 1].map(Array::<f64>::poison);
    let sum = |which: usize, n: usize, columns: u32, blocks: u32| Totals {
        singles: if columns == 4 { of_four.ptr() } else { null() },
        doubles: if columns == 4 { null() } else { of_one.ptr() },
        out: out[which].ptr_mut(),
        n: n as u32,
        columns,
        blocks,
        reserved: 0,
    };
    let all = [sum(0, 700, 4, 1), sum(1, 1030, 1, 3), sum(2, 2, 1, 1)];
    launch(&e::TOTALS, [3, 1, 3], &Each([all[0], all[1], all[2], all[2]]), 5);
    let out = out.map(|out| out.get());
    for c in 0..4 {
        let want: f64 = (0..700).map(|i| f64::from(singles[4 * i + c])).sum();
        assert!((out[0][c] - want).abs() < 1e-9, "column {c}: {} and {want}", out[0][c]);
    }
    for (which, n) in [(1, 1030), (2, 2)] {
        let (got, want) = (out[which].iter().sum::<f64>(), doubles[..n].iter().sum::<f64>());
        assert!((got - want).abs() < 1e-9, "{n} numbers: {got} and {want}");
    }
}
