//! Direct convolutions through the host twin, against f64.

mod common;
use common::*;
use kernels::abi::{Conv, Fold, Geometry};
use kernels::entries as e;

/// Rows, channels, height and width, outputs, kernel, padding, and rows of a block.
const SHAPES: [([usize; 7], usize); 9] = [
    ([1, 1, 3, 3, 1, 3, 0], 1),
    ([7, 2, 7, 9, 3, 3, 1], 3),
    ([3, 1, 28, 28, 6, 5, 2], 2),
    ([2, 6, 14, 14, 16, 5, 0], 1),
    ([5, 3, 11, 6, 4, 5, 2], 4),
    ([4, 5, 5, 8, 7, 5, 0], 4),
    ([2, 1, 6, 13, 5, 5, 4], 1),
    ([3, 1, 1, 1, 32, 3, 2], 2),
    ([2, 9, 4, 5, 1, 3, 0], 5),
];

fn geometry([channels, height, width, kernel, padding]: [usize; 5]) -> Geometry {
    let (height_out, width_out) = (height + 2 * padding + 1 - kernel, width + 2 * padding + 1 - kernel);
    let [channels, height, width, kernel, padding] = [channels, height, width, kernel, padding].map(|n| n as u32);
    let pixels = (height_out * width_out) as u32;
    Geometry { channels, height, width, kernel, padding, pixels, width_out: width_out as u32 }
}

/// Calls `f` with every product of a convolution: where its output is, its input, its weight.
fn each([rows, channels, height, width, outputs, kernel, padding]: [usize; 7], mut f: impl FnMut(usize, usize, usize)) {
    let (down, across) = (height + 2 * padding + 1 - kernel, width + 2 * padding + 1 - kernel);
    for (r, o, c) in
        (0..rows * outputs * channels).map(|i| (i / channels / outputs, i / channels % outputs, i % channels))
    {
        for (y, x) in (0..down * across).map(|i| (i / across, i % across)) {
            for (ky, kx) in (0..kernel * kernel).map(|i| (i / kernel, i % kernel)) {
                if let (Some(v), Some(u)) = ((y + ky).checked_sub(padding), (x + kx).checked_sub(padding))
                    && v < height
                    && u < width
                {
                    let out = ((r * outputs + o) * down + y) * across + x;
                    let from = ((r * channels + c) * height + v) * width + u;
                    f(out, from, ((o * channels + c) * kernel + ky) * kernel + kx);
                }
            }
        }
    }
}

#[test]
fn direct_convolutions_and_their_gradients() {
    for (which, (shape, part)) in SHAPES.into_iter().enumerate() {
        let [rows, channels, height, width, outputs, kernel, padding] = shape;
        let g = geometry([channels, height, width, kernel, padding]);
        let mut rng = Rng(which as u64);
        let x = rng.vec(rows * channels * height * width, 1.0);
        let w = rng.vec(outputs * channels * kernel * kernel, 1.0);
        let d = rng.vec(rows * outputs * g.pixels as usize, 1.0);
        let [mut out, mut dx, mut dw] = [&d, &x, &w].map(|like| vec![0f64; like.len()]);
        each(shape, |o, i, k| {
            let [grad, from, weight] = [d[o], x[i], w[k]].map(f64::from);
            out[o] += from * weight;
            dx[i] += grad * weight;
            dw[k] += grad * from;
        });
        let [x, w, d] = [&x, &w, &d].map(|a| Array::of(a));
        let blocks = rows.div_ceil(part);
        let args = Conv {
            x: x.ptr(),
            weight: w.ptr(),
            out: std::ptr::null_mut(),
            rows: rows as u32,
            outputs: outputs as u32,
            geometry: g,
            part: part as u32,
        };
        let check = |what: &str, got: &Array<f32>, want: &[f64]| {
            let off = distance(got.get().into_iter().map(f64::from), want);
            assert!(off < 1e-6, "{what} of {shape:?}: {off:e}");
        };

        assert!(g.fits_direct(args.outputs), "{shape:?}");
        // Pairs of numbers are stored where they are aligned; not so behind one.
        for shift in [0, 1] {
            let got = Array::<f32>::poison(out.len() + shift);
            let args = Conv { out: got.ptr_mut().wrapping_add(shift), ..args };
            launch(&e::CONV_DIRECT, [blocks as u32, 1, 1], &args, which as u64);
            check("convolution", &Array::of(&got.get()[shift..]), &out);
        }

        if padding < kernel {
            let [down, across] = [g.pixels / g.width_out, g.width_out].map(|n| n as usize);
            let back = geometry([outputs, down, across, kernel, kernel - 1 - padding]);
            assert!(back.fits_direct(g.channels), "{shape:?}");
            let got = Array::<f32>::poison(dx.len());
            let args = Conv { x: d.ptr(), out: got.ptr_mut(), outputs: g.channels, geometry: back, ..args };
            launch(&e::CONV_DATA_DIRECT, [blocks as u32, 1, 1], &args, which as u64);
            check("gradient of the input", &got, &dx);
        }

        assert!(g.fits_direct_weight(args.outputs), "{shape:?}");
        let slots = Array::<f32>::poison(blocks * dw.len());
        let args = Conv { weight: d.ptr(), out: slots.ptr_mut(), ..args };
        launch(&e::CONV_WEIGHT_DIRECT, [blocks as u32, 1, 1], &args, which as u64);
        let got = Array::<f32>::poison(dw.len());
        let fold = Fold {
            parts: slots.ptr(),
            out: got.ptr_mut(),
            stride: dw.len() as u64,
            len: dw.len() as u32,
            slots: blocks as u32,
            add: 0,
            reserved: 0,
        };
        launch(&e::FOLD, [dw.len().div_ceil(256) as u32, 1, 1], &fold, 5);
        check("gradient of the weight", &got, &dw);
    }
}

// What is asked for is what there is: neither shared memory nor threads are counted short.
#[test]
fn what_does_not_fit_is_not_direct() {
    let g = |channels, side, kernel| geometry([channels, side, side, kernel, kernel / 2]);
    for (geometry, outputs, direct, weight) in [
        (g(1, 28, 5), 6, true, true),
        (g(6, 14, 5), 16, true, true),
        (g(1, 28, 7), 6, false, false),
        (g(32, 14, 5), 32, false, false),
        (g(3, 200, 3), 3, false, false),
        (g(16, 8, 3), 32, true, false),
        (g(u32::MAX as usize, 8, 5), u32::MAX, false, false),
    ] {
        assert_eq!(
            (geometry.fits_direct(outputs), geometry.fits_direct_weight(outputs)),
            (direct, weight),
            "{geometry:?}"
        );
    }
}
