//! Tallies and gradients of the logit matrix, through the host twin, against f64.

mod common;
use common::*;
use kernels::abi::{
    ANCHOR, Each, HopperPull, HopperTally, HopperTallyBoth, Kernel, Logits, Merge, NO_SPAN, Normalise, Pull, Residual,
    Soften, Tally, TensorMap,
};
use kernels::entries as e;
use kernels::simt::shim::MapSpec;
use std::ptr::{null, null_mut};

/// A batch with everything that may be special about a pair, and its logits in f64.
struct Batch {
    n: usize,
    m: usize,
    u: Array<u16>,
    v: Array<u16>,
    shift_u: Array<f32>,
    shift_v: Array<f32>,
    /// Then there are no shifts.
    unit: bool,
    id: [Array<u32>; 2],
    ignore: [Array<u32>; 2],
    /// Octaves; NaN where the pair is ignored.
    x: Vec<f64>,
    positive: Vec<bool>,
    depth: usize,
    pitch: usize,
    scale: f32,
}

#[derive(Clone, Copy)]
struct Shape {
    n: usize,
    m: usize,
    depth: usize,
    scale: f32,
    /// Ids are drawn below this; 0 for the diagonal.
    groups: usize,
    ignore: bool,
}

impl Batch {
    fn new(t: Type, s: Shape, rng: &mut Rng) -> Self {
        let Shape { n, m, depth, scale, .. } = s;
        let pitch = depth.next_multiple_of(8);
        let (u, u64s) = halves(t, &rng.vec(n * depth, 1.0), depth, pitch);
        let (v, v64s) = halves(t, &rng.vec(m * depth, 1.0), depth, pitch);
        let (shift_u, shift_v) = (rng.vec(n, 1.0), rng.vec(m, 1.0));
        let mut ids = |len: usize, of: usize| -> Vec<u32> {
            (0..len).map(|i| if of == 0 { i as u32 } else { rng.below(of) as u32 }).collect()
        };
        let id = [ids(n, s.groups), ids(m, s.groups)];
        let ignore = [ids(n, if s.ignore { 5 } else { usize::MAX }), ids(m, 5)];
        let (mut x, mut positive) = (vec![0.0; n * m], vec![false; n * m]);
        for i in 0..n {
            for j in 0..m {
                let dot: f64 = (0..depth).map(|k| u64s[i * depth + k] * v64s[j * depth + k]).sum();
                positive[i * m + j] = id[0][i] == id[1][j];
                let ignored = s.ignore && ignore[0][i] == ignore[1][j] && !positive[i * m + j];
                x[i * m + j] = if ignored {
                    f64::NAN
                } else {
                    dot * f64::from(scale) + f64::from(shift_u[i]) + f64::from(shift_v[j])
                };
            }
        }
        Batch {
            n,
            m,
            u,
            v,
            shift_u: Array::of(&shift_u),
            shift_v: Array::of(&shift_v),
            unit: false,
            id: id.map(|x| Array::of(&x)),
            ignore: ignore.map(|x| Array::of(&x)),
            x,
            positive,
            depth,
            pitch,
            scale,
        }
    }

    /// Unit rows, the diagonal, no shifts; the positives are close.
    fn unit(t: Type, [n, m]: [usize; 2], depth: usize, scale: f32, rng: &mut Rng) -> Self {
        let mut b = Batch::new(t, Shape { n, m, depth, scale, groups: 0, ignore: false }, rng);
        let mut rows = [rng.vec(n * depth, 1.0), rng.vec(m * depth, 1.0)];
        let [us, vs] = &mut rows;
        vs.iter_mut().zip(us).for_each(|(v, u)| *v = *u + 0.5 * *v);
        let values = rows.each_mut().map(|x| {
            for row in x.chunks_mut(depth) {
                let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                row.iter_mut().for_each(|x| *x /= length);
            }
            halves(t, x, depth, b.pitch)
        });
        let [(u, us), (v, vs)] = values;
        for (k, x) in b.x.iter_mut().enumerate() {
            let (u, v) = (&us[k / m * depth..][..depth], &vs[k % m * depth..][..depth]);
            *x = u.iter().zip(v).map(|(a, b)| a * b).sum::<f64>() * f64::from(scale);
        }
        Batch { u, v, unit: true, ..b }
    }

    fn logits(&self, ignore: bool) -> Logits {
        let [a, b] = &self.ignore;
        Logits {
            u: self.u.ptr(),
            v: self.v.ptr(),
            shift_u: if self.unit { null() } else { self.shift_u.ptr() },
            shift_v: if self.unit { null() } else { self.shift_v.ptr() },
            id_u: self.id[0].ptr(),
            id_v: self.id[1].ptr(),
            ignore_u: if ignore { a.ptr() } else { null() },
            ignore_v: if ignore { b.ptr() } else { null() },
            live: null(),
            span_u: null(),
            span_v: null(),
            flags: null(),
            n: self.n as u32,
            m: self.m as u32,
            depth: self.depth as u32,
            pitch: self.pitch as u32,
            scale: self.scale,
            blocks: 0,
        }
    }
}

/// A map of halves in boxes of 64 x `rows`, as TMA brings them.
fn map(at: *const u16, [rows, cols]: [usize; 2], pitch: usize, tile_rows: u32) -> TensorMap {
    let size = [cols as u32, rows as u32];
    MapSpec { address: at as u64, size, pitch: 2 * pitch as u64, tile: [64, tile_rows], element: 2, swizzle: true }
        .encode()
}

/// The two mainloops: their tiles, and their slots a tile.
enum TallyPath {
    Portable(Kernel<Each<Tally, 2>>),
    Hopper(Kernel<HopperTally>),
}

impl TallyPath {
    /// Columns of a tile, slots of a split.
    fn shape(&self) -> (usize, usize) {
        match self {
            TallyPath::Portable(_) => (128, 2),
            TallyPath::Hopper(_) => (256, 1),
        }
    }
    fn run(&self, b: &Batch, splits: usize, args: Tally, seed: u64) -> &'static str {
        let grid = [splits as u32, b.n.div_ceil(128) as u32, 1];
        match self {
            TallyPath::Portable(kernel) => {
                launch(kernel, grid, &Each([args; 2]), seed);
                kernel.name
            }
            TallyPath::Hopper(kernel) => {
                let maps = [map(b.u.ptr(), [b.n, b.depth], b.pitch, 128), map(b.v.ptr(), [b.m, b.depth], b.pitch, 256)];
                launch(kernel, grid, &HopperTally { maps: [maps; 2], tallies: [args; 2] }, seed);
                kernel.name
            }
        }
    }
}

enum PullPath {
    Portable(Kernel<Pull>),
    Hopper(Kernel<HopperPull>),
}

impl PullPath {
    /// Columns of a tile, row slots a column tile, column slots a row tile.
    fn shape(&self) -> (usize, usize, usize) {
        match self {
            PullPath::Portable(_) => (128, 2, 4),
            PullPath::Hopper(_) => (256, 1, 8),
        }
    }
    fn run(&self, b: &Batch, args: Pull, seed: u64) -> &'static str {
        let tiles = [args.cols.div_ceil(self.shape().0 as u32), args.rows.div_ceil(128)];
        match self {
            PullPath::Portable(kernel) => {
                launch(kernel, [tiles[0], tiles[1], 1], &args, seed);
                kernel.name
            }
            PullPath::Hopper(kernel) => {
                let maps = [
                    map(b.u.ptr(), [b.n, b.depth], b.pitch, 128),
                    map(b.v.ptr(), [b.m, b.depth], b.pitch, 256),
                    map(args.g, [args.rows as usize, args.cols as usize], args.pitch as usize, 64),
                ];
                // Fewer blocks than tiles, so that some take two.
                let blocks = (tiles[0] * tiles[1]).div_ceil(2);
                launch(kernel, [blocks, 1, 1], &HopperPull { maps, pull: args }, seed);
                kernel.name
            }
        }
    }
}

const SHAPES: [Shape; 6] = [
    Shape { n: 1, m: 1, depth: 1, scale: 1.0, groups: 0, ignore: false },
    Shape { n: 130, m: 257, depth: 5, scale: 3.0, groups: 0, ignore: false },
    Shape { n: 64, m: 300, depth: 33, scale: 0.5, groups: 7, ignore: true },
    Shape { n: 257, m: 129, depth: 64, scale: 2.0, groups: 0, ignore: true },
    Shape { n: 131, m: 127, depth: 98, scale: 400.0, groups: 50, ignore: false },
    Shape { n: 128, m: 256, depth: 160, scale: 1.0, groups: 0, ignore: false },
];

#[test]
fn tallies_are_those_of_f64() {
    for (which, &s) in SHAPES.iter().enumerate() {
        for (t, path) in [
            (Type::Bf16, TallyPath::Portable(e::TALLY_ALL_BF16)),
            (Type::F16, TallyPath::Portable(e::TALLY_ALL_F16)),
            (Type::Bf16, TallyPath::Hopper(e::HOPPER_TALLY_ALL_BF16)),
            (Type::F16, TallyPath::Hopper(e::HOPPER_TALLY_ALL_F16)),
        ] {
            let (tile, per_split) = path.shape();
            let seed = 11 + which as u64;
            let b = Batch::new(t, s, &mut Rng(seed));
            let column_tiles = s.m.div_ceil(tile);
            for splits in [1, column_tiles] {
                let slots = Array::<[f32; 4]>::poison(per_split * splits * s.n);
                let all = Array::<[f32; 2]>::poison(per_split * splits * s.n);
                let tiles = column_tiles.div_ceil(splits) as u32;
                let args = Tally {
                    logits: b.logits(s.ignore),
                    slots: slots.ptr_mut(),
                    all: all.ptr_mut(),
                    tiles,
                    reserved: 0,
                };
                let kernel = path.run(&b, splits, args, seed);
                let (slots, all) = (slots.get(), all.get());
                let (mut got, mut want) = (vec![], vec![]);
                for i in 0..s.n {
                    let parts = (0..per_split * splits).map(|p| (slots[p * s.n + i], all[p * s.n + i]));
                    let max = parts.clone().map(|(p, _)| p[0]).fold(f32::NEG_INFINITY, f32::max);
                    let mut sums = [0f64; 5];
                    for (p, a) in parts {
                        let shrink = f64::from(p[0] - max).exp2();
                        sums[0] += f64::from(p[1]) * shrink;
                        sums[1] += f64::from(p[2]) * shrink;
                        sums[2] += f64::from(p[3]);
                        sums[3] += f64::from(a[0]);
                        sums[4] += f64::from(a[1]);
                    }
                    let row =
                        || b.x[i * s.m..(i + 1) * s.m].iter().zip(&b.positive[i * s.m..]).filter(|(x, _)| !x.is_nan());
                    let top = row().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
                    if top.is_finite() {
                        assert!((f64::from(max) - top).abs() < 1e-5 * top.abs().max(1.0), "row {i}: {max} and {top}");
                    }
                    let sum =
                        |p: bool| row().filter(|x| *x.1 == p).map(|(x, _)| (x - f64::from(max)).exp2()).sum::<f64>();
                    got.extend([sums[0], sums[1], sums[2] / 8.0, sums[3] / 64.0, sums[4]]);
                    let ignored = s.m - row().count();
                    want.extend([
                        sum(false),
                        sum(true),
                        row().filter(|x| *x.1).map(|(x, _)| x).sum::<f64>() / 8.0,
                        row().map(|(x, _)| x).sum::<f64>() / 64.0,
                        ignored as f64,
                    ]);
                }
                let off = distance(got, &want);
                // Logits of thousands of octaves carry half a unit of their own last place into the exponential.
                let bound = if s.scale > 100.0 { 1e-3 } else { 1e-5 };
                assert!(off < bound, "{kernel} {}x{}x{} in {splits}: {off:e}", s.n, s.m, s.depth);
            }
        }
    }
}

/// What a side's softmaxes become, each row with one positive.
struct Softened {
    norm: Array<[f32; 4]>,
    target: Array<f32>,
    far: Array<u32>,
    loss: Array<f64>,
    positives: Array<u32>,
    share: Array<f32>,
}

impl Softened {
    fn of(rows: usize) -> Self {
        let blocks = rows.div_ceil(256);
        Softened {
            norm: Array::poison(rows),
            target: Array::poison(rows),
            far: Array::poison(blocks),
            loss: Array::poison(blocks),
            positives: Array::of(&vec![1; rows]),
            share: Array::of(&vec![1.0 / rows as f32; rows]),
        }
    }
    fn normalise(&self, rows: usize, scale: f32) -> Normalise {
        Normalise {
            row: null(),
            row_all: null(),
            positives: self.positives.ptr(),
            share: self.share.ptr(),
            joint: null(),
            norm: self.norm.ptr_mut(),
            target: self.target.ptr_mut(),
            far: self.far.ptr_mut(),
            live: null(),
            loss: self.loss.ptr_mut(),
            n: rows as u32,
            opposite: 1.0,
            lambda: 0.5,
            smoothing: 0.0,
            scale,
            reserved: 0,
        }
    }
    fn bits(&self) -> (Vec<[u32; 4]>, Vec<u32>, Vec<u32>, Vec<u64>) {
        let norm = self.norm.get().iter().map(|n| n.map(f32::to_bits)).collect();
        let target = self.target.get().iter().map(|t| t.to_bits()).collect();
        (norm, target, self.far.get(), self.loss.get().iter().map(|l| l.to_bits()).collect())
    }
}

/// Plain pairs by one exponential for both sides and the rest by rows, merged: the softmaxes of rows and of columns, and G of
/// a chunk, against f64; the same where sums from the anchor do not hold, and all is tallied by rows.
#[test]
fn plain_pairs_are_tallied_once() {
    let types = [
        (Type::Bf16, e::HOPPER_TALLY_BOTH_BF16, e::HOPPER_TALLY_BF16, e::HOPPER_PULL_SOFTMAX_BF16),
        (Type::F16, e::HOPPER_TALLY_BOTH_F16, e::HOPPER_TALLY_F16, e::HOPPER_PULL_SOFTMAX_F16),
    ];
    // The third has a block with nothing plain; of the last the logits reach beyond what f32 can hold from one anchor.
    let shapes = [(512, 770, 24, 20.0, 1), (600, 512, 72, 144.0, 3), (257, 515, 5, 3.0, 2), (512, 512, 8, 3000.0, 2)];
    for ((t, both, tally, pull), (n, m, depth, scale, down)) in
        types.iter().flat_map(|t| shapes.iter().map(move |&s| (t, s)))
    {
        let seed = n as u64 + depth as u64;
        let b = Batch::unit(*t, [n, m], depth, scale, &mut Rng(seed));
        let spans = [n, m].map(|len: usize| -> Array<[u32; 2]> {
            let span = |k: usize| if 256 * (k + 1) <= len { [256 * k as u32, 256 * k as u32 + 255] } else { NO_SPAN };
            Array::of(&(0..len.div_ceil(256)).map(span).collect::<Vec<_>>())
        });
        let (tiles, across) = ([n.div_ceil(128), m.div_ceil(256)], 2);
        let [groups, splits] = [tiles[0].div_ceil(down), tiles[1].div_ceil(across)];
        let sums = [Array::<f32>::poison(2 * splits * n), Array::<f32>::poison(groups * m)];
        let flags = Array::<u32>::poison(groups * splits);
        let plain = Logits {
            span_u: spans[0].ptr(),
            span_v: spans[1].ptr(),
            blocks: (groups * splits) as u32,
            ..b.logits(false)
        };
        let maps = [map(b.u.ptr(), [n, depth], b.pitch, 128), map(b.v.ptr(), [m, depth], b.pitch, 128)];
        let args = HopperTallyBoth {
            maps,
            logits: plain,
            row_sums: sums[0].ptr_mut(),
            col_sums: sums[1].ptr_mut(),
            flags: flags.ptr_mut(),
            down: down as u32,
            across: across as u32,
        };
        launch(both, [splits as u32, groups as u32, 1], &args, seed);
        let name = format!("{} {n}x{m}x{depth} by {scale}", both.name);
        let raised = flags.get().iter().any(|&f| f != 0);
        assert_eq!(raised, f64::from(scale) > f64::from(ANCHOR) * 10.0, "{name}: flags");
        let known = Logits { flags: flags.ptr(), ..plain };
        let swapped = Logits {
            u: known.v,
            v: known.u,
            id_u: known.id_v,
            id_v: known.id_u,
            span_u: known.span_v,
            span_v: known.span_u,
            n: known.m,
            m: known.n,
            ..known
        };
        // Both sides in one launch, of grids that are not the same.
        let slots = [n, m].map(Array::<[f32; 4]>::poison);
        let sides = [known, swapped];
        let tallies = [0, 1].map(|k| Tally {
            logits: sides[k],
            slots: slots[k].ptr_mut(),
            all: null_mut(),
            tiles: 64,
            reserved: 0,
        });
        let both_maps = sides.map(|l| {
            let side = |at: *const u16, rows: u32, tile: u32| map(at, [rows as usize, depth], b.pitch, tile);
            [side(l.u, l.n, 128), side(l.v, l.m, 256)]
        });
        let grid = [2, n.max(m).div_ceil(128) as u32, 2];
        launch(tally, grid, &HopperTally { maps: both_maps, tallies }, seed);
        let (mut norms, mut softens, mut normalised) = (vec![], vec![], vec![]);
        for (which, slots) in slots.iter().enumerate() {
            let rows = [n, m][which];
            let merged = Array::<[f32; 4]>::poison(rows);
            let block = Array::<[f32; 2]>::poison(rows.div_ceil(256));
            let args = Merge {
                tallies: slots.ptr(),
                all: null(),
                row: merged.ptr_mut(),
                row_all: null_mut(),
                block: block.ptr_mut(),
                sums: sums[which].ptr(),
                flags: flags.ptr(),
                live: null(),
                scale,
                sum_slots: [2 * splits, groups][which] as u32,
                blocks: known.blocks,
                n: rows as u32,
                slots: 1,
                reserved: 0,
            };
            launch(&e::MERGE, [rows.div_ceil(256) as u32, 1, 1], &args, seed);
            let found = Softened::of(rows);
            let normalise = Normalise { row: merged.ptr(), ..found.normalise(rows, scale) };
            launch(&e::NORMALISE, [rows.div_ceil(256) as u32, 1, 1], &normalise, seed);
            normalised.push(found);
            softens.push(Merge { row: null_mut(), block: null_mut(), ..args });
            let line = |i: usize| -> Vec<(f64, bool)> {
                let at = |k: usize| if which == 0 { i * m + k } else { k * m + i };
                (0..n + m - rows).map(|k| (b.x[at(k)], b.positive[at(k)])).collect()
            };
            let (mut got, mut want) = (vec![], vec![]);
            let merged = merged.get();
            for (i, &[max, negatives, positives, pulled]) in merged.iter().enumerate() {
                let of = |positive: bool| {
                    let pairs = line(i).into_iter().filter(move |x| x.1 == positive);
                    pairs.map(|x| (x.0 - f64::from(max)).exp2()).sum::<f64>()
                };
                assert!(
                    (1.0..1e6).contains(&(negatives + positives)) || negatives + positives > 0.9,
                    "{name}: row {i}"
                );
                got.extend([f64::from(negatives), f64::from(positives), f64::from(pulled)]);
                want.extend([of(false), of(true), line(i).iter().filter(|x| x.1).map(|x| x.0).sum::<f64>()]);
            }
            let off = distance(got, &want);
            let bound = if scale > 1000.0 { 1e-3 } else { 2e-5 };
            assert!(off < bound, "{name}: tallies of side {which} {off:e}");
            norms
                .push(merged.iter().map(|t| [t[0], 1.0 / (t[1] + t[2]), 0.0, 1.0 / (t[1] + t[2])]).collect::<Vec<_>>());
        }

        // The same numbers without a stop on the way.
        let found = [n, m].map(Softened::of);
        let soften = [0, 1].map(|k| Soften { merge: softens[k], normalise: found[k].normalise([n, m][k], scale) });
        launch(&e::SOFTEN, [n.max(m).div_ceil(256) as u32, 1, 2], &Each(soften), seed);
        for (which, (found, want)) in found.iter().zip(&normalised).enumerate() {
            assert!(found.bits() == want.bits(), "{name}: softmaxes of side {which}");
        }

        let (targets, g) =
            ([n, m].map(|len| Array::of(&vec![-1f32; len])), Array::<u16>::poison(n * m.next_multiple_of(8)));
        let [norm_u, norm_v] = [&norms[0], &norms[1]].map(|x| Array::of(x));
        let pitch = m.next_multiple_of(8);
        let args = Pull {
            logits: known,
            norm_u: norm_u.ptr(),
            target_u: targets[0].ptr(),
            norm_v: norm_v.ptr(),
            target_v: targets[1].ptr(),
            far_u: null(),
            far_v: null(),
            factor: null(),
            g: g.ptr_mut(),
            row_sums: null_mut(),
            col_sums: null_mut(),
            row: 0,
            col: 0,
            rows: n as u32,
            cols: m as u32,
            pitch: pitch as u32,
            gain: 4.0,
            bias: 0.0,
            smoothing: 0.0,
        };
        let maps = [maps[0], maps[1], map(g.ptr(), [n, m], pitch, 64)];
        launch(pull, [3, 1, 1], &HopperPull { maps, pull: args }, seed);
        let g = g.get();
        // A chunk asks the far flags of its own rows and columns: there are no others. One that is raised takes away the anchor.
        if [n, m] == [512, 770] {
            let [same, other] = [[0, 0], [0, 1]].map(|raised: [u32; 2]| {
                let [own_u, own_v] = raised.map(|raised| Array::of(&[raised]));
                let part = Array::<u16>::poison(256 * 104);
                let (far_u, far_v) = (own_u.ptr().wrapping_sub(1), own_v.ptr().wrapping_sub(1));
                let chunk = Pull { row: 256, col: 256, rows: 256, cols: 100, pitch: 104, g: part.ptr_mut(), ..args };
                let maps = [maps[0], maps[1], map(part.ptr(), [256, 100], 104, 64)];
                launch(pull, [2, 1, 1], &HopperPull { maps, pull: Pull { far_u, far_v, ..chunk } }, seed);
                let part = part.get();
                (0..256 * 100).all(|k| part[k / 100 * 104 + k % 100] == g[(256 + k / 100) * pitch + 256 + k % 100])
            });
            assert!(same && !other, "{name}: far flags {same} {other}");
        }
        let got = (0..n * m).map(|k| t.value(g[k / m * pitch + k % m]) / 4.0);
        let want: Vec<f64> = (0..n * m)
            .map(|k| {
                let side = |norm: &[f32; 4]| (b.x[k] - f64::from(norm[0])).exp2() * f64::from(norm[1]);
                side(&norms[0][k / m]) + side(&norms[1][k % m]) - if b.positive[k] { 2.0 } else { 0.0 }
            })
            .collect();
        let off = distance(got, &want);
        assert!(off < if *t == Type::Bf16 { 4e-3 } else { 6e-4 }, "{}: {name}: G {off:e}", pull.name);
    }
}

const SOFTMAX: usize = 0;
const SIGMOID: usize = 1;
const PLAIN: usize = 2;
const FACTORED: usize = 3;

#[test]
fn chunks_of_g_are_those_of_f64() {
    use PullPath::{Hopper, Portable};
    let kernels = [
        (
            Type::Bf16,
            [
                Portable(e::PULL_SOFTMAX_SUMS_BF16),
                Portable(e::PULL_SIGMOID_BF16),
                Portable(e::PULL_PLAIN_BF16),
                Portable(e::PULL_FACTORED_BF16),
            ],
        ),
        (
            Type::F16,
            [
                Portable(e::PULL_SOFTMAX_SUMS_F16),
                Portable(e::PULL_SIGMOID_F16),
                Portable(e::PULL_PLAIN_F16),
                Portable(e::PULL_FACTORED_F16),
            ],
        ),
        (
            Type::Bf16,
            [
                Hopper(e::HOPPER_PULL_SOFTMAX_SUMS_BF16),
                Hopper(e::HOPPER_PULL_SIGMOID_BF16),
                Hopper(e::HOPPER_PULL_PLAIN_BF16),
                Hopper(e::HOPPER_PULL_FACTORED_BF16),
            ],
        ),
        (
            Type::F16,
            [
                Hopper(e::HOPPER_PULL_SOFTMAX_SUMS_F16),
                Hopper(e::HOPPER_PULL_SIGMOID_F16),
                Hopper(e::HOPPER_PULL_PLAIN_F16),
                Hopper(e::HOPPER_PULL_FACTORED_F16),
            ],
        ),
    ];
    for (which, &s) in SHAPES.iter().enumerate() {
        for (t, kernels) in &kernels {
            for (law, path) in [SOFTMAX, SIGMOID, PLAIN, FACTORED].into_iter().zip(kernels) {
                let (tile, row_slots, col_slots) = path.shape();
                let seed = 31 + which as u64;
                let mut rng = Rng(seed);
                let b = Batch::new(*t, s, &mut rng);
                // Norms as a softmax has them: above the largest logit, so that exponentials are at most one.
                let norm = |rng: &mut Rng, len: usize, top: &dyn Fn(usize) -> f64| -> Vec<[f32; 4]> {
                    (0..len)
                        .map(|i| [top(i) as f32 + 0.5, 1.0 + rng.unit(), 0.1 * rng.unit(), 1.0 + rng.unit()])
                        .collect()
                };
                let largest = |xs: &mut dyn Iterator<Item = f64>| xs.filter(|x| !x.is_nan()).fold(-1e3, f64::max);
                let by_row = |i: usize| largest(&mut b.x[i * s.m..(i + 1) * s.m].iter().copied());
                let by_col = |j: usize| largest(&mut b.x.iter().copied().skip(j).step_by(s.m));
                let (norm_u, norm_v) = (norm(&mut rng, s.n, &by_row), norm(&mut rng, s.m, &by_col));
                let (target_u, target_v) = (rng.vec(s.n, 1.0), rng.vec(s.m, 1.0));
                let (bias, smoothing) = if law == SIGMOID { (0.7f32, 0.1f32) } else { (0.0, 0.0) };
                // A factored law has the softmax of one side, the rows' and the columns' in turns.
                let of_rows = which % 2 == 0;
                let one = |i: usize, j: usize| if of_rows { &norm_u[i] } else { &norm_v[j] };
                let g_of = |i: usize, j: usize| -> (f64, f64) {
                    let x = b.x[i * s.m + j];
                    let positive = b.positive[i * s.m + j];
                    if x.is_nan() {
                        return (0.0, 0.0);
                    }
                    if law == SIGMOID {
                        let y = (x + f64::from(bias)) * std::f64::consts::LN_2;
                        let e = f64::from(smoothing);
                        let target = if positive { 1.0 - 0.5 * e } else { 0.5 * e };
                        let softplus = y.max(0.0) + (-y.abs()).exp().ln_1p();
                        let share = f64::from(target_u[i]);
                        // 1/(1+e^-y) - target without losing what is left of one.
                        let off =
                            if positive { 0.5 * e - 1.0 / (1.0 + y.exp()) } else { 1.0 / (1.0 + (-y).exp()) - target };
                        return (share * off, share * (softplus - target * y));
                    }
                    if law == PLAIN {
                        return (x, 0.0);
                    }
                    if law == FACTORED {
                        let [max, negative, _, own] = one(i, j).map(f64::from);
                        let p = (x - max).exp2() * if positive { own } else { negative };
                        return (p, p * (x - max));
                    }
                    let side = |n: &[f32; 4], t: f32| {
                        let p = (x - f64::from(n[0])).exp2();
                        if positive {
                            f64::from(n[3]) * p + f64::from(t)
                        } else {
                            f64::from(n[1]) * p - f64::from(n[2])
                        }
                    };
                    (side(&norm_u[i], target_u[i]) + side(&norm_v[j], target_v[j]), 0.0)
                };
                let (a_u, a_v) = (Array::of(&norm_u), Array::of(&norm_v));
                let (t_u, t_v) = (Array::of(&target_u), Array::of(&target_v));
                // A chunk in the middle, of two tiles each way, and the corner.
                for (row, col) in [(0, 0), (128 * (s.n / 129), 128 * (s.m / 129))] {
                    let (rows, cols) = ((s.n - row).min(256), (s.m - col).min(256));
                    let pitch = cols.next_multiple_of(8);
                    let tiles = [cols.div_ceil(tile), rows.div_ceil(128)];
                    let g = Array::<u16>::poison(rows * pitch);
                    let row_sums = Array::<[f32; 4]>::poison(row_slots * tiles[0] * rows);
                    let col_sums = Array::<f32>::poison(col_slots * tiles[1] * cols);
                    let gain = if law == PLAIN { 1.0 } else { 4.0 };
                    let (factor, factors) = halves(*t, &rng.vec(rows * cols, 1.0), cols, pitch);
                    let by = |i: usize, j: usize| if law == FACTORED { factors[i * cols + j] } else { 1.0 };
                    let sums = law != PLAIN;
                    let args = Pull {
                        logits: b.logits(s.ignore),
                        norm_u: if law == SIGMOID || law == FACTORED && !of_rows { null() } else { a_u.ptr() },
                        target_u: t_u.ptr(),
                        norm_v: if law == SIGMOID || law == FACTORED && of_rows { null() } else { a_v.ptr() },
                        target_v: t_v.ptr(),
                        far_u: null(),
                        far_v: null(),
                        factor: factor.ptr(),
                        g: g.ptr_mut(),
                        row_sums: row_sums.ptr_mut(),
                        col_sums: col_sums.ptr_mut(),
                        row: row as u32,
                        col: col as u32,
                        rows: rows as u32,
                        cols: cols as u32,
                        pitch: pitch as u32,
                        gain,
                        bias,
                        smoothing,
                    };
                    let kernel = path.run(&b, args, seed);
                    let name = format!("{kernel} {}x{}x{} at {row}, {col}", s.n, s.m, s.depth);
                    let (g, row_sums, col_sums) = (g.get(), row_sums.get(), col_sums.get());
                    let mut want = vec![0.0; rows * cols];
                    let mut by_row = vec![[0.0; 4]; rows];
                    let mut by_col = vec![0.0; cols];
                    for i in 0..rows {
                        for j in 0..cols {
                            let (p, value) = g_of(row + i, col + j);
                            let g = p * by(i, j);
                            let weight = if law == FACTORED { p } else { 0.0 };
                            want[i * cols + j] = g;
                            let x = b.x[(row + i) * s.m + col + j];
                            let from = if law == FACTORED { f64::from(one(row + i, col + j)[0]) } else { 0.0 };
                            let lever = if x.is_nan() { 0.0 } else { x - from };
                            by_row[i].iter_mut().zip([value, g, g * lever, weight]).for_each(|(sum, x)| *sum += x);
                            by_col[j] += g;
                        }
                    }
                    let got = (0..rows * cols).map(|k| t.value(g[k / cols * pitch + k % cols]) / f64::from(gain));
                    let off = distance(got, &want);
                    assert!(off < if *t == Type::Bf16 { 4e-3 } else { 6e-4 }, "{name}: G {off:e}");
                    for which in (0..4).filter(|_| sums) {
                        let got = (0..rows).map(|i| {
                            (0..row_slots * tiles[0]).map(|p| f64::from(row_sums[p * rows + i][which])).sum::<f64>()
                        });
                        let want: Vec<f64> = by_row.iter().map(|x| x[which]).collect();
                        if want.iter().any(|x| *x != 0.0) {
                            let off = distance(got, &want);
                            let bound = if s.scale > 100.0 { 2e-3 } else { 2e-5 };
                            assert!(off < bound, "{name}: row sum {which} {off:e}");
                        }
                    }
                    if sums && by_col.iter().any(|x| *x != 0.0) {
                        let got = (0..cols)
                            .map(|j| (0..col_slots * tiles[1]).map(|p| f64::from(col_sums[p * cols + j])).sum::<f64>());
                        let off = distance(got, &by_col);
                        assert!(off < if s.scale > 100.0 { 2e-3 } else { 2e-5 }, "{name}: column sums {off:e}");
                    }
                }
            }
        }
    }
}

/// Residuals of MMD, some of them nothing, against f64: unit rows, offsets, weights and the loss.
#[test]
fn residuals_are_those_of_f64() {
    for (t, kernel) in [(Type::Bf16, e::RESIDUAL_BF16), (Type::F16, e::RESIDUAL_F16)] {
        for (rows, dim) in [(1, 1), (9, 33), (40, 70)] {
            let mut rng = Rng(rows as u64);
            let (acc, target, shift) = (rng.vec(rows * (dim + 1), 3.0), rng.vec(rows * dim, 2.0), rng.vec(dim, 1.0));
            let mut share: Vec<f32> = rng.vec(rows, 0.1).iter().map(|x| x.abs() + 0.01).collect();
            let norm: Vec<[f32; 4]> = (0..rows).map(|_| [rng.unit(), 1.0 + rng.unit(), 0.5, 0.0]).collect();
            let mut acc = acc;
            if rows > 1 {
                // A row that is out of the loss, and one whose mean is its target.
                share[1] = 0.0;
                acc[2 * (dim + 1)..3 * (dim + 1)].fill(0.0);
            }
            let pitch = dim.next_multiple_of(8);
            let (scale, unit, lambda) = (0.125f32, 0.5f32, 1.5f32);
            let (a, tg, sh, w) = (Array::of(&acc), Array::of(&target), Array::of(&shift), Array::of(&share));
            let norms = Array::of(&norm);
            let (out, offset) = (Array::<u16>::poison(rows * pitch), Array::<f32>::poison(rows));
            let loss = Array::<f64>::poison(rows.div_ceil(8));
            // Means of several rounded features, or what one is rounded to.
            let several = rows == 9;
            let rounded: Vec<f64> = if several {
                rng.vec(rows * dim, 2.0).into_iter().map(f64::from).collect()
            } else {
                let from_shift: Vec<f32> = (0..rows * dim).map(|k| (target[k] - shift[k % dim]) * unit).collect();
                halves(t, &from_shift, dim, dim).1
            };
            let means = Array::of(&rounded.iter().map(|&x| x as f32).collect::<Vec<_>>());
            let args = Residual {
                acc: a.ptr(),
                target: tg.ptr(),
                rounded: if several { means.ptr() } else { null() },
                shift: sh.ptr(),
                share: w.ptr(),
                norm: norms.ptr_mut(),
                out: out.ptr_mut(),
                offset: offset.ptr_mut(),
                loss: loss.ptr_mut(),
                rows: rows as u32,
                dim: dim as u32,
                pitch: pitch as u32,
                scale,
                unit,
                lambda,
            };
            launch(&kernel, [rows.div_ceil(8) as u32, 1, 1], &args, 3);
            let (out, offset, norms, mut total) = (out.get(), offset.get(), norms.get(), 0f64);
            for i in 0..rows {
                let weight = f64::from(lambda) * f64::from(share[i]);
                let f = |x: f32| f64::from(x);
                let row = i * dim..(i + 1) * dim;
                let (sums, added) = acc[i * (dim + 1)..][..dim + 1].split_at(dim);
                let from_target = sums.iter().zip(&rounded[row.clone()]).map(|(&x, t)| f(x) - f(added[0]) * t);
                let r: Vec<f64> = from_target.map(|x| if weight > 0.0 { x * f(scale) / weight } else { 0.0 }).collect();
                let length = r.iter().map(|r| r * r).sum::<f64>().sqrt();
                let got: Vec<f64> = out[i * pitch..(i + 1) * pitch].iter().map(|&x| t.value(x)).collect();
                assert!(got[dim..].iter().all(|x| *x == 0.0), "{rows} x {dim}: padding");
                let bound = if t == Type::Bf16 { 4e-3 } else { 6e-4 };
                for (got, r) in got.iter().zip(&r) {
                    assert!((got - if length > 0.0 { r / length } else { 0.0 }).abs() < bound, "row {i}");
                }
                // The offset is of the unit row as it was rounded.
                let mean = (0..dim).map(|k| got[k] * (r[k] + rounded[i * dim + k]));
                assert!((f(offset[i]) + mean.sum::<f64>()).abs() < 1e-4 * length.max(1.0), "offset {i}");
                let plain = f(norm[i][1]) * length / f(unit).powi(2);
                assert!((f(norms[i][1]) - plain).abs() <= 1e-5 * plain, "weight {i}");
                assert_eq!((norms[i][0], norms[i][2], norms[i][3]), (norm[i][0], 0.0, norms[i][1]));
                let square: f64 = target[row].iter().map(|&t| f(t).powi(2)).sum();
                total += 0.5 * weight * (length * length / f(unit).powi(2) - square);
            }
            let got: f64 = loss.get().iter().sum();
            assert!((got - total).abs() < 1e-5 * total.abs().max(1.0), "loss {got} and {total}");
        }
    }
}
