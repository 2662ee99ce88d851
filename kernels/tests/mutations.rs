//! Each barrier, fence and wait of the mainloops is needed, and the twin shows it: left out, it panics or the result
//! changes.

mod common;
use common::*;
use kernels::abi::{
    Args, Each, Gemm, HopperGemm, HopperPull, HopperTally, HopperTallyBoth, Kernel, Logits, Merge, Normalise, Pull,
    Residual, Search, Soften, Tally, TensorMap,
};
use kernels::entries as e;
use kernels::simt::shim::{self, Call, MapSpec, Omission};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null;

const ROWS: usize = 140;
const COLS: usize = 400;
const DEPTH: usize = 200;

fn map(at: *const u16, [rows, cols]: [usize; 2], tile_rows: u32) -> TensorMap {
    let size = [cols as u32, rows as u32];
    MapSpec { address: at as u64, size, pitch: 2 * cols as u64, tile: [64, tile_rows], element: 2, swizzle: true }
        .encode()
}

/// Runs `kernel` with each word left out at its first, middle and last call of a lane, and at all of them; `bits` reads
/// what it wrote, over poison. Mutations that nobody noticed are returned by name.
fn unnoticed<A: Args>(
    kernel: &Kernel<A>,
    grid: [u32; 3],
    args: &A,
    poison: &dyn Fn(),
    bits: &dyn Fn() -> Vec<u32>,
) -> Vec<String> {
    let run = |omission| {
        poison();
        // SAFETY: arrays of the extents the kernel states; what a mutation gets wrong the twin reports.
        catch_unwind(AssertUnwindSafe(|| unsafe { shim::launch_without(kernel, grid, args, 17, omission) }))
            .map(|calls| (calls, bits()))
    };
    let (_, whole) = run(None).expect("the kernel as it is");
    let mut missed = vec![];
    for word in Call::ALL {
        let (calls, _) = run(Some(Omission { word, nth: Some(u32::MAX) })).expect("the kernel as it is");
        let mut which = vec![Some(0), Some(calls / 2), Some(calls.saturating_sub(1)), None];
        which.dedup();
        for nth in which {
            if calls > 0 && run(Some(Omission { word, nth })).is_ok_and(|(_, bits)| bits == whole) {
                missed.push(format!("{}: {word:?} {nth:?} of {calls}", kernel.name));
            }
        }
    }
    missed
}

fn words<T: Copy>(array: &Array<T>) -> Vec<u32> {
    array.bytes().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn every_barrier_is_needed_and_missed() {
    // Hundreds of lanes fail on purpose; their messages are no news.
    std::panic::set_hook(Box::new(|_| {}));
    let mut rng = Rng(5);
    let (u, _) = halves(Type::Bf16, &rng.vec(ROWS * DEPTH, 1.0), DEPTH, DEPTH);
    let (v, _) = halves(Type::Bf16, &rng.vec(COLS * DEPTH, 1.0), DEPTH, DEPTH);
    let ids = Array::of(&(0..COLS as u32).collect::<Vec<_>>());
    let logits = Logits {
        u: u.ptr(),
        v: v.ptr(),
        shift_u: null(),
        shift_v: null(),
        id_u: ids.ptr(),
        id_v: ids.ptr(),
        ignore_u: null(),
        ignore_v: null(),
        live: null(),
        span_u: null(),
        span_v: null(),
        flags: null(),
        n: ROWS as u32,
        m: COLS as u32,
        depth: DEPTH as u32,
        pitch: DEPTH as u32,
        scale: 1.0,
        blocks: 0,
    };
    let mut missed = vec![];

    let slots = Array::<[f32; 4]>::poison(2 * ROWS);
    let tally = Tally { logits, slots: slots.ptr_mut(), all: std::ptr::null_mut(), tiles: 4, reserved: 0 };
    missed.extend(unnoticed(&e::TALLY_BF16, [1, 2, 1], &Each([tally; 2]), &|| slots.refill(), &|| words(&slots)));
    let maps = [map(u.ptr(), [ROWS, DEPTH], 128), map(v.ptr(), [COLS, DEPTH], 256)];
    // One slot a row: the second half of the array stays poison, run for run.
    let hopper = HopperTally { maps: [maps; 2], tallies: [tally; 2] };
    missed.extend(unnoticed(&e::HOPPER_TALLY_BF16, [1, 2, 1], &hopper, &|| slots.refill(), &|| words(&slots)));

    // Two row tiles and two column tiles, in one block, all of it plain.
    let spans = [Array::of(&[[0u32, 255]]), Array::of(&[[256u32, 511], [512, 767]])];
    let (many, _) = halves(Type::Bf16, &rng.vec(512 * 72, 0.1), 72, 72);
    let plain = Logits {
        u: many.ptr(),
        v: many.ptr(),
        span_u: spans[0].ptr(),
        span_v: spans[1].ptr(),
        n: 256,
        m: 512,
        depth: 72,
        pitch: 72,
        ..logits
    };
    let (rows, cols, flags) = (Array::<f32>::poison(2 * 256), Array::<f32>::poison(512), Array::<u32>::poison(1));
    let of = |rows: usize, tile: u32| {
        let size = [72, rows as u32];
        MapSpec { address: many.ptr() as u64, size, pitch: 144, tile: [64, tile], element: 2, swizzle: true }.encode()
    };
    let both = HopperTallyBoth {
        maps: [of(256, 128), of(512, 128)],
        logits: plain,
        row_sums: rows.ptr_mut(),
        col_sums: cols.ptr_mut(),
        flags: flags.ptr_mut(),
        down: 2,
        across: 2,
    };
    let again = || {
        rows.refill();
        cols.refill();
        flags.refill();
    };
    let found = || [words(&rows), words(&cols), words(&flags)].concat();
    missed.extend(unnoticed(&e::HOPPER_TALLY_BOTH_BF16, [1, 1, 1], &both, &again, &found));

    let norms = Array::of(&vec![[40f32, 1.0, 0.0, 1.0]; COLS]);
    let targets = Array::of(&rng.vec(COLS, 1.0));
    let g = Array::<u16>::poison(ROWS * COLS);
    let (factor, _) = halves(Type::Bf16, &rng.vec(ROWS * COLS, 1.0), COLS, COLS);
    let row_sums = Array::<[f32; 4]>::poison(8 * ROWS);
    let col_sums = Array::<f32>::poison(16 * COLS);
    let pull = Pull {
        logits,
        norm_u: norms.ptr(),
        target_u: targets.ptr(),
        norm_v: norms.ptr(),
        target_v: targets.ptr(),
        far_u: null(),
        far_v: null(),
        factor: factor.ptr(),
        g: g.ptr_mut(),
        row_sums: row_sums.ptr_mut(),
        col_sums: col_sums.ptr_mut(),
        row: 0,
        col: 0,
        rows: ROWS as u32,
        cols: COLS as u32,
        pitch: COLS as u32,
        gain: 1.0,
        bias: 0.0,
        smoothing: 0.0,
    };
    let refill = || {
        g.refill();
        row_sums.refill();
        col_sums.refill();
    };
    let bits = || [words(&g), words(&row_sums), words(&col_sums)].concat();
    missed.extend(unnoticed(&e::PULL_SOFTMAX_SUMS_BF16, [4, 2, 1], &pull, &refill, &bits));
    // Two slices a tile are fewer than the ring's stages: the ring alone does not keep the warpgroups in step.
    let mut hopper = HopperPull { maps: [maps[0], maps[1], map(g.ptr(), [ROWS, COLS], 64)], pull };
    hopper.pull.logits.depth = 72;
    missed.extend(unnoticed(&e::HOPPER_PULL_SOFTMAX_SUMS_BF16, [1, 1, 1], &hopper, &refill, &bits));
    let turns = HopperPull { maps: [maps[0], map(v.ptr(), [COLS, DEPTH], 128), hopper.maps[2]], ..hopper };
    missed.extend(unnoticed(&e::HOPPER_PULL_SOFTMAX_BF16, [1, 1, 1], &turns, &refill, &bits));
    missed.extend(unnoticed(&e::PULL_FACTORED_BF16, [4, 2, 1], &pull, &refill, &bits));
    missed.extend(unnoticed(&e::HOPPER_PULL_FACTORED_BF16, [1, 1, 1], &hopper, &refill, &bits));

    let (acc, target, share) =
        (Array::of(&rng.vec(9 * 21, 1.0)), Array::of(&rng.vec(9 * 20, 1.0)), Array::of(&[0.25f32; 9]));
    let (out, offset, loss) = (Array::<u16>::poison(9 * 24), Array::<f32>::poison(9), Array::<f64>::poison(2));
    let scratch = Array::of(&[[1f32; 4]; 9]);
    let residual = Residual {
        acc: acc.ptr(),
        target: target.ptr(),
        rounded: null(),
        shift: target.ptr(),
        share: share.ptr(),
        norm: scratch.ptr_mut(),
        out: out.ptr_mut(),
        offset: offset.ptr_mut(),
        loss: loss.ptr_mut(),
        rows: 9,
        dim: 20,
        pitch: 24,
        scale: 1.0,
        unit: 1.0,
        lambda: 1.0,
    };
    let again = || {
        out.refill();
        offset.refill();
        loss.refill();
    };
    let found = || [words(&out), words(&offset), words(&loss)].concat();
    missed.extend(unnoticed(&e::RESIDUAL_BF16, [2, 1, 1], &residual, &again, &found));

    let (queries, _) = halves(Type::F16, &rng.vec(ROWS * DEPTH, 1.0), DEPTH, DEPTH);
    let (items, _) = halves(Type::F16, &rng.vec(COLS * DEPTH, 1.0), DEPTH, DEPTH);
    let (ones, zeros) = (Array::of(&[1f32; COLS]), Array::of(&[0f32; COLS]));
    let (own, ranks) = (Array::of(&rng.vec(ROWS, 10.0)), Array::<u32>::poison(2 * ROWS));
    let search = Search {
        queries: queries.ptr(),
        items: items.ptr(),
        query_unit: ones.ptr(),
        item_unit: ones.ptr(),
        offset: zeros.ptr(),
        own: own.ptr_mut(),
        ranks: ranks.ptr_mut(),
        heaps: std::ptr::null_mut(),
        n: ROWS as u32,
        m: COLS as u32,
        depth: DEPTH as u32,
        tiles: 4,
        keep: 0,
        first: 0,
    };
    missed.extend(unnoticed(&e::SEARCH_RANK, [1, 2, 1], &search, &|| ranks.refill(), &|| words(&ranks)));

    let (chunk, _) = halves(Type::Bf16, &rng.vec(ROWS * COLS, 1.0), COLS, COLS);
    let c = Array::<f32>::poison(COLS * DEPTH);
    let product = |m: usize, k: usize, a: *const (), b: *const (), pitch_a: usize| Gemm {
        a,
        b,
        c: c.ptr_mut(),
        m: m as u32,
        n: DEPTH as u32,
        k: k as u32,
        depth: k.next_multiple_of(32) as u32,
        pitch_a: pitch_a as u32,
        pitch_b: DEPTH as u32,
        pitch_c: DEPTH as u32,
        add: 0,
        part: 0,
    };
    let gv = product(ROWS, COLS, chunk.ptr().cast(), v.ptr().cast(), COLS);
    let gu = product(COLS, ROWS, chunk.ptr().cast(), u.ptr().cast(), COLS);
    let (refill, bits) = (|| c.refill(), || words(&c));
    missed.extend(unnoticed(&e::GEMM_GV_BF16, [2, 2, 1], &gv, &refill, &bits));
    missed.extend(unnoticed(&e::GEMM_GU_BF16, [2, 4, 1], &gu, &refill, &bits));
    let [a, b] = [map(chunk.ptr(), [ROWS, COLS], 128), map(v.ptr(), [COLS, DEPTH], 64)];
    let [c, d] = [map(chunk.ptr(), [ROWS, COLS], 64), map(u.ptr(), [ROWS, DEPTH], 64)];
    // One of them at a time, as both have one result.
    for gemms in [[gv, Gemm { m: 0, ..gu }], [Gemm { m: 0, ..gv }, gu]] {
        let args = HopperGemm { maps: [a, b, c, d], gemms };
        missed.extend(unnoticed(&e::HOPPER_GEMM_BF16, [1, 1, 1], &args, &refill, &bits));
    }
    let singles = (Array::of(&rng.vec(ROWS * COLS, 1.0)), Array::of(&rng.vec(COLS * DEPTH, 1.0)));
    let nn = product(ROWS, COLS, singles.0.ptr().cast(), singles.1.ptr().cast(), COLS);
    missed.extend(unnoticed(&e::GEMM_NN_BF16, [2, 2, 1], &nn, &refill, &bits));

    let tallies = Array::of(&(0..2 * 300).map(|_| [rng.unit(), 1.0 + rng.unit(), 1.0, 0.0]).collect::<Vec<_>>());
    let (row, block) = (Array::<[f32; 4]>::poison(300), Array::<[f32; 2]>::poison(2));
    let merge = Merge {
        tallies: tallies.ptr(),
        all: null(),
        row: row.ptr_mut(),
        row_all: std::ptr::null_mut(),
        block: block.ptr_mut(),
        sums: null(),
        flags: null(),
        live: null(),
        scale: 0.0,
        sum_slots: 0,
        blocks: 0,
        n: 300,
        slots: 2,
        reserved: 0,
    };
    let refill = || {
        row.refill();
        block.refill();
    };
    missed.extend(unnoticed(&e::MERGE, [2, 1, 1], &merge, &refill, &|| [words(&row), words(&block)].concat()));

    let (norm, target) = (Array::<[f32; 4]>::poison(300), Array::<f32>::poison(300));
    let (far, loss) = (Array::<u32>::poison(2), Array::<f64>::poison(2));
    let (positives, share) = (Array::of(&[1u32; 300]), Array::of(&[0.5f32; 300]));
    let normalise = Normalise {
        row: null(),
        row_all: null(),
        positives: positives.ptr(),
        share: share.ptr(),
        joint: null(),
        norm: norm.ptr_mut(),
        target: target.ptr_mut(),
        far: far.ptr_mut(),
        live: null(),
        loss: loss.ptr_mut(),
        n: 300,
        opposite: 300.0,
        lambda: 0.5,
        smoothing: 0.0,
        scale: 0.0,
        reserved: 0,
    };
    let merge = Merge { row: std::ptr::null_mut(), block: std::ptr::null_mut(), ..merge };
    let refill = || {
        norm.refill();
        target.refill();
        far.refill();
        loss.refill();
    };
    let found = || [words(&norm), words(&target), words(&far), words(&loss)].concat();
    let soften = Each([Soften { merge, normalise }; 2]);
    missed.extend(unnoticed(&e::SOFTEN, [2, 1, 1], &soften, &refill, &found));

    let _ = std::panic::take_hook();
    let known = HARMLESS.iter().flat_map(|(_, known)| *known);
    let stale: Vec<_> = known.filter(|known| !missed.iter().any(|m| m == *known)).collect();
    assert!(stale.is_empty(), "no longer harmless, or gone: {stale:?}");
    missed.retain(|m| !HARMLESS.iter().any(|(_, known)| known.contains(&m.as_str())));
    assert!(missed.is_empty(), "nobody noticed:\n{}", missed.join("\n"));
}

/// Mutations that change nothing: why, and which.
const HARMLESS: [(&str, &[&str]); 6] = [
    (
        "before the first tile nobody reads the stages, and no copy reads the staging",
        &[
            "tally_bf16: Sync Some(0) of 32",
            "search_rank: Sync Some(0) of 40",
            "pull_softmax_sums_bf16: Sync Some(0) of 8",
            "pull_factored_bf16: Sync Some(0) of 8",
            "gemm_gv_bf16: Sync Some(0) of 14",
            "gemm_gu_bf16: Sync Some(0) of 6",
            "gemm_nn_bf16: Sync Some(0) of 14",
            "hopper_pull_softmax_sums_bf16: BulkWaitRead Some(0) of 5",
            "hopper_pull_factored_bf16: BulkWaitRead Some(0) of 5",
            "hopper_pull_softmax_bf16: BulkWaitRead Some(0) of 5",
        ],
    ),
    (
        "a ring's last slices are released to nobody",
        &[
            "hopper_tally_bf16: MbarrierArrive Some(4) of 8",
            "hopper_tally_bf16: WgmmaWait Some(4) of 8",
            "hopper_tally_bf16: MbarrierArrive Some(7) of 8",
            "hopper_pull_softmax_sums_bf16: MbarrierArrive Some(7) of 8",
            "hopper_pull_factored_bf16: MbarrierArrive Some(7) of 8",
            "hopper_tally_both_bf16: MbarrierArrive Some(11) of 12",
            "hopper_pull_softmax_bf16: MbarrierArrive Some(11) of 12",
            "hopper_gemm_bf16: MbarrierArrive Some(13) of 14",
            "hopper_gemm_bf16: MbarrierArrive Some(11) of 12",
        ],
    ),
    (
        "the accumulator is fenced at a tile's first slice; later ones touch no register between",
        &[
            "hopper_tally_bf16: WgmmaFence Some(7) of 8",
            "hopper_tally_both_bf16: WgmmaFence Some(7) of 8",
            "hopper_pull_softmax_sums_bf16: WgmmaFence Some(7) of 8",
            "hopper_pull_factored_bf16: WgmmaFence Some(7) of 8",
            "hopper_pull_softmax_bf16: WgmmaFence Some(7) of 8",
            "hopper_gemm_bf16: WgmmaFence Some(13) of 14",
            "hopper_gemm_bf16: WgmmaFence Some(11) of 12",
        ],
    ),
    (
        "operands in f32 pass through registers: no copy is waited for",
        &[
            "gemm_nn_bf16: CopyWait Some(0) of 13",
            "gemm_nn_bf16: CopyWait Some(6) of 13",
            "gemm_nn_bf16: CopyWait Some(12) of 13",
            "gemm_nn_bf16: CopyWait None of 13",
        ],
    ),
    ("the slice was stored stages ago, and nothing is stored behind it", &["gemm_nn_bf16: Sync Some(13) of 14"]),
    ("the kernel ends before its scratch is written again", &["merge: Sync Some(19) of 20"]),
];
