//! Matrix products through the host twin, against f64 products of the rounded operands.

mod common;
use common::*;
use kernels::abi::{Fold, Gemm, Kernel, TILE};
use kernels::entries as e;

/// (m, n, k), and how many parts k is cut into.
const SHAPES: [([usize; 3], usize); 6] = [
    ([1, 1, 1], 1),
    ([130, 5, 37], 1),
    ([3, 257, 64], 2),
    ([128, 128, 129], 1),
    ([65, 31, 300], 4),
    ([200, 144, 96], 3),
];

fn shape_of(op: char, rows: usize, cols: usize) -> [usize; 2] {
    if op == 't' { [cols, rows] } else { [rows, cols] }
}

/// `op(A) op(B)` of stored matrices.
fn product(ops: [char; 2], [m, n, k]: [usize; 3], a: &[f64], b: &[f64]) -> Vec<f64> {
    let at = |x: &[f64], op: char, i: usize, j: usize, cols: usize, rows: usize| {
        if op == 't' { x[j * rows + i] } else { x[i * cols + j] }
    };
    (0..m * n).map(|c| (0..k).map(|p| at(a, ops[0], c / n, p, k, m) * at(b, ops[1], p, c % n, n, k)).sum()).collect()
}

fn run(kernel: &Kernel<Gemm>, args: Gemm, parts: usize, seed: u64) {
    launch(kernel, [args.n.div_ceil(TILE), args.m.div_ceil(TILE), parts as u32], &args, seed);
}

#[test]
fn products_of_f32_are_those_of_rounded_operands() {
    let kernels = [
        (['n', 'n'], [e::GEMM_NN_BF16, e::GEMM_NN_F16]),
        (['n', 't'], [e::GEMM_NT_BF16, e::GEMM_NT_F16]),
        (['t', 'n'], [e::GEMM_TN_BF16, e::GEMM_TN_F16]),
        (['t', 't'], [e::GEMM_TT_BF16, e::GEMM_TT_F16]),
    ];
    for (ops, kernels) in kernels {
        for (t, kernel) in [Type::Bf16, Type::F16].into_iter().zip(&kernels) {
            for (which, (size, parts)) in SHAPES.into_iter().enumerate() {
                let [m, n, k] = size;
                let mut rng = Rng(100 + which as u64);
                let (sa, sb) = (shape_of(ops[0], m, k), shape_of(ops[1], k, n));
                let (a, b) = (rng.vec(m * k, 1.0), rng.vec(k * n, 1.0));
                let round = |x: &[f32]| x.iter().map(|&x| t.value(t.bits(x))).collect::<Vec<_>>();
                let want = product(ops, size, &round(&a), &round(&b));
                let depth = k.div_ceil(parts).next_multiple_of(8);
                let pitch = n + 3;
                let (a, b, c) = (Array::of(&a), Array::of(&b), Array::<f32>::poison(parts * m * pitch));
                let args = Gemm {
                    a: a.ptr().cast(),
                    b: b.ptr().cast(),
                    c: c.ptr_mut(),
                    m: m as u32,
                    n: n as u32,
                    k: k as u32,
                    depth: depth as u32,
                    pitch_a: sa[1] as u32,
                    pitch_b: sb[1] as u32,
                    pitch_c: pitch as u32,
                    add: 0,
                    part: (m * pitch) as u64,
                };
                run(kernel, args, parts, which as u64);
                let out = Array::<f32>::of(&vec![1.0; m * pitch]);
                let fold = Fold {
                    parts: c.ptr(),
                    out: out.ptr_mut(),
                    stride: args.part,
                    len: (m * pitch) as u32,
                    slots: parts as u32,
                    add: 1,
                    reserved: 0,
                };
                launch(&e::FOLD, [(m * pitch).div_ceil(256) as u32, 1, 1], &fold, 5);
                let out = out.get();
                let got = (0..m * n).map(|i| f64::from(out[i / n * pitch + i % n]) - 1.0);
                let off = distance(got, &want);
                assert!(off < 2e-6, "{} {size:?} in {parts}: {off:e}", kernel.name);
                assert!(c.get()[n].is_nan(), "{} {size:?}: wrote past its columns", kernel.name);
            }
        }
    }
}

#[test]
fn products_with_chunks_of_g_add_up() {
    for (t, gv, gu) in [(Type::Bf16, e::GEMM_GV_BF16, e::GEMM_GU_BF16), (Type::F16, e::GEMM_GV_F16, e::GEMM_GU_F16)] {
        for (rows, cols, dim) in [(1usize, 1usize, 1usize), (129, 70, 17), (64, 256, 130)] {
            let mut rng = Rng((rows * cols) as u64);
            let (pitch_g, pitch) = (cols.next_multiple_of(8), dim.next_multiple_of(8));
            let (g, g64) = halves(t, &rng.vec(rows * cols, 1.0), cols, pitch_g);
            let (u, u64s) = halves(t, &rng.vec(rows * dim, 1.0), dim, pitch);
            let (v, v64s) = halves(t, &rng.vec(cols * dim, 1.0), dim, pitch);
            let old = rng.vec(rows.max(cols) * dim, 1.0);
            for (kernel, ops, [m, k], other, other64) in
                [(&gv, ['n', 'n'], [rows, cols], &v, &v64s), (&gu, ['t', 'n'], [cols, rows], &u, &u64s)]
            {
                let mut want = product(ops, [m, dim, k], &g64, other64);
                want.iter_mut().zip(&old).for_each(|(w, &o)| *w += f64::from(o));
                let c = Array::of(&old[..m * dim]);
                let args = Gemm {
                    a: g.ptr().cast(),
                    b: other.ptr().cast(),
                    c: c.ptr_mut(),
                    m: m as u32,
                    n: dim as u32,
                    k: k as u32,
                    depth: k.next_multiple_of(8) as u32,
                    pitch_a: pitch_g as u32,
                    pitch_b: pitch as u32,
                    pitch_c: dim as u32,
                    add: 1,
                    part: 0,
                };
                run(kernel, args, 1, 9);
                let off = distance(c.get().into_iter().map(f64::from), &want);
                assert!(off < 2e-6, "{} {rows}x{cols}x{dim}: {off:e}", kernel.name);
            }
        }
    }
}
