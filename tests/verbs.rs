//! The verbs of a card, their kernels run by the host twin, against the CPU's in f64; and training with them.
#![cfg(feature = "cuda")]
#![allow(missing_docs)]

#[allow(dead_code, reason = "each test program takes what it needs of it")]
#[path = "common/twin.rs"]
mod twin;

use contrastive::Cpu;
use contrastive::device::cpu::Isa;
use contrastive::device::cuda::{Buffer, Cuda};
use contrastive::device::{
    Activation, AdamStep, Attention, Contrast, Conv, Device, Embeddings, Features, Gemm, Norm, Pool, Pooling, Scalars,
    View, ViewMut,
};
use contrastive::objective::{Loss, Objective, Pairs, Precision, Tilting, Write};
use half::bf16;
use std::sync::Arc;
use twin::Machine;

struct Rng(u64);

impl Rng {
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // What products see: nothing is lost when they round.
        bf16::from_f32((self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0).to_f32()
    }
    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// Runs `verbs` on a device over buffers of `inputs`, and reads all of them back.
fn on<D: Device>(device: &D, inputs: &[Vec<f32>], verbs: impl Fn(&D, &mut [D::Buf])) -> Vec<Vec<f32>> {
    let mut buffers: Vec<D::Buf> = inputs
        .iter()
        .map(|x| {
            let mut buf = device.alloc(x.len());
            device.upload(x, ViewMut { buf: &mut buf, at: 0..x.len() });
            buf
        })
        .collect();
    verbs(device, &mut buffers);
    device.finish().unwrap();
    let read = |buf: &D::Buf| {
        let mut out = vec![f32::NAN; device.len(buf)];
        device.download(View { buf, at: 0..out.len() }, &mut out);
        out
    };
    buffers.iter().map(read).collect()
}

/// The same on the twin and in f64; results may differ by `bound`, relative to their norm.
macro_rules! same {
    ($name:expr, $bound:expr, $inputs:expr, $verbs:expr) => {{
        let inputs: Vec<Vec<f32>> = $inputs;
        let card = Cuda::new(&Arc::new(Machine::new([8, 0], 3)), Precision::Bf16);
        let got = on(&card, &inputs, $verbs);
        let want = on(&Cpu::wide(Isa::best()), &inputs, $verbs);
        for (k, (got, want)) in got.iter().zip(&want).enumerate() {
            let (mut off, mut size) = (0f64, 0f64);
            for (&g, &w) in got.iter().zip(want) {
                off += f64::from(g - w).powi(2);
                size += f64::from(w).powi(2);
            }
            let off = off.sqrt() / size.sqrt().max(1e-3);
            assert!(off < $bound, "{}: buffer {k} is off by {off:e}", $name);
        }
    }};
}

#[test]
fn products() {
    for (m, n, k) in [(1, 1, 1), (130, 7, 33), (5, 140, 2000), (37, 41, 600)] {
        for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
            for add in [false, true] {
                let mut rng = Rng((m * n + k) as u64);
                let shape = Gemm { m, n, k, transpose_a, transpose_b };
                same!(format!("{shape:?}"), 3e-6, vec![rng.vec(m * k), rng.vec(k * n), rng.vec(m * n)], |d, b| {
                    let [x, y, z] = b else { unreachable!() };
                    let to = ViewMut::first(z, m * n);
                    let to = if add { Write::Add(to) } else { Write::Set(to) };
                    d.gemm(shape, View::first(x, m * k), View::first(y, k * n), to);
                });
            }
        }
    }
}

#[test]
fn activations() {
    for (rows, channels, pixels) in [(1, 1, 1), (1300, 7, 1), (5, 3, 37), (3, 300, 1), (19, 2, 300)] {
        for activation in [Activation::None, Activation::Relu, Activation::Gelu] {
            for separate in [false, true] {
                let len = rows * channels * pixels;
                let mut rng = Rng(len as u64);
                let pre: Vec<f32> = rng.vec(len).iter().map(|x| 4.0 * x).collect();
                same!(
                    format!("{activation:?} of [{rows}, {channels}, {pixels}]"),
                    2e-6,
                    vec![pre, rng.vec(channels), rng.vec(len), rng.vec(len), rng.vec(channels)],
                    |d, b| {
                        let [pre, bias, out, grad, d_bias] = b else { unreachable!() };
                        let shape = [rows, channels, pixels];
                        let out = (separate || activation == Activation::Gelu).then(|| ViewMut::first(out, len));
                        d.bias_activation(
                            shape,
                            activation,
                            Some(View::first(bias, channels)),
                            ViewMut::first(pre, len),
                            out,
                        );
                        let sums = Some(Write::Add(ViewMut::first(d_bias, channels)));
                        d.bias_activation_backward(
                            shape,
                            activation,
                            View::first(pre, len),
                            ViewMut::first(grad, len),
                            sums,
                        );
                    }
                );
            }
        }
    }
}

#[test]
fn dense_layers() {
    // The last is cut into parts.
    for [rows, inputs, outputs] in [[1, 1, 1], [130, 33, 7], [5, 70, 140], [37, 1200, 41]] {
        for activation in [Activation::None, Activation::Relu, Activation::Gelu] {
            for (with_bias, with_pre) in [(true, false), (true, true), (false, true), (false, false)] {
                let len = rows * outputs;
                let mut rng = Rng((inputs + outputs) as u64);
                let (x, weight, bias) = (rng.vec(rows * inputs), rng.vec(outputs * inputs), rng.vec(outputs));
                let inputs_of = vec![x, weight, bias, vec![0.5; len], vec![0.5; len]];
                same!(
                    format!("{activation:?} of [{rows}, {inputs}, {outputs}], bias {with_bias}, pre {with_pre}"),
                    3e-6,
                    inputs_of,
                    |d, b| {
                        let [x, weight, bias, pre, out] = b else { unreachable!() };
                        d.dense(
                            [rows, inputs, outputs],
                            activation,
                            View::first(x, rows * inputs),
                            View::first(weight, outputs * inputs),
                            with_bias.then(|| View::first(bias, outputs)),
                            with_pre.then(|| ViewMut::first(pre, len)),
                            ViewMut::first(out, len),
                        );
                    }
                );
            }
        }
    }
}

#[test]
fn convolutions() {
    for (rows, conv) in [
        (1, Conv { inputs: 1, height: 3, width: 3, outputs: 1, kernel: 3, padding: 0 }),
        (5, Conv { inputs: 2, height: 7, width: 9, outputs: 3, kernel: 3, padding: 1 }),
        (3, Conv { inputs: 3, height: 12, width: 10, outputs: 6, kernel: 5, padding: 2 }),
        (2, Conv { inputs: 6, height: 14, width: 14, outputs: 16, kernel: 5, padding: 0 }),
        (70, Conv { inputs: 1, height: 6, width: 5, outputs: 2, kernel: 3, padding: 1 }),
        // On tiles: kernels of other sides, and more channels than fit.
        (1, Conv { inputs: 1, height: 3, width: 3, outputs: 1, kernel: 2, padding: 0 }),
        (5, Conv { inputs: 2, height: 7, width: 9, outputs: 3, kernel: 4, padding: 1 }),
        (3, Conv { inputs: 3, height: 12, width: 10, outputs: 6, kernel: 7, padding: 2 }),
        (2, Conv { inputs: 40, height: 4, width: 5, outputs: 33, kernel: 3, padding: 1 }),
    ] {
        let (x, w, y) = (rows * conv.input_len(), conv.outputs * conv.patch(), rows * conv.output_len());
        let mut rng = Rng(x as u64);
        same!(
            format!("{conv:?}"),
            3e-6,
            vec![rng.vec(x), rng.vec(w), rng.vec(y), rng.vec(y), rng.vec(x), rng.vec(w)],
            |d, b| {
                let [input, weight, out, grad, dx, dw] = b else { unreachable!() };
                let mut scratch = d.alloc(d.conv_scratch(&conv, rows));
                d.conv(
                    &conv,
                    rows,
                    View::first(input, x),
                    View::first(weight, w),
                    ViewMut::first(out, y),
                    &mut scratch,
                );
                d.conv_backward_data(
                    &conv,
                    rows,
                    View::first(weight, w),
                    View::first(grad, y),
                    ViewMut::first(dx, x),
                    &mut scratch,
                );
                let to = Write::Add(ViewMut::first(dw, w));
                d.conv_backward_weight(&conv, rows, View::first(input, x), View::first(grad, y), to, &mut scratch);
            }
        );
    }
}

#[test]
fn pooling() {
    for kind in [Pool::Max, Pool::Average] {
        for (rows, channels, height, width, size) in [(1, 1, 2, 2, 2), (3, 2, 7, 9, 2), (2, 5, 6, 6, 3)] {
            let p = Pooling { kind, channels, height, width, size };
            let (x, y) = (rows * p.input_len(), rows * p.output_len());
            let mut rng = Rng(x as u64);
            // Few values, so that maxima are reached more than once.
            let input: Vec<f32> = rng.vec(x).iter().map(|x| (2.0 * x).round()).collect();
            same!(format!("{p:?}"), 1e-6, vec![input, rng.vec(y), rng.vec(y), rng.vec(x)], |d, b| {
                let [input, out, grad, dx] = b else { unreachable!() };
                d.pool(&p, rows, View::first(input, x), ViewMut::first(out, y));
                d.pool_backward(&p, rows, View::first(input, x), View::first(grad, y), ViewMut::first(dx, x));
            });
        }
    }
}

#[test]
fn layer_norms() {
    for (rows, width, stride) in [(1, 1, 1), (9, 33, 33), (1030, 7, 7), (5, 40, 120)] {
        let norm = Norm { width, stride };
        let (x, y) = (norm.input_len(rows), rows * width);
        let mut rng = Rng(y as u64);
        same!(
            format!("{norm:?}"),
            // The deviation of one number is none: what is left is the rounding of its mean.
            if width == 1 { 1.0 } else { 2e-5 },
            vec![
                rng.vec(x),
                rng.vec(2 * width),
                rng.vec(y),
                rng.vec(2 * rows),
                rng.vec(y),
                rng.vec(x),
                rng.vec(2 * width)
            ],
            |d, b| {
                let [input, affine, out, stats, grad, dx, da] = b else { unreachable!() };
                d.layer_norm(
                    &norm,
                    rows,
                    View::first(input, x),
                    View::first(affine, 2 * width),
                    ViewMut::first(out, y),
                    ViewMut::first(stats, 2 * rows),
                );
                let (dx, da) = (Write::Add(ViewMut::first(dx, x)), Write::Add(ViewMut::first(da, 2 * width)));
                d.layer_norm_backward(
                    &norm,
                    rows,
                    View::first(input, x),
                    View::first(affine, 2 * width),
                    View::first(stats, 2 * rows),
                    View::first(grad, y),
                    dx,
                    da,
                );
            }
        );
    }
}

#[test]
fn attention() {
    for (rows, time, heads, head, causal) in
        [(1, 1, 1, 1, false), (2, 13, 3, 5, true), (1, 9, 2, 40, false), (2, 17, 1, 128, true)]
    {
        let a = Attention { time, heads, head, causal };
        let (qkv, out, stat) = (rows * time * 3 * heads * head, rows * time * heads * head, rows * heads * time);
        let mut rng = Rng(qkv as u64);
        let sharp: Vec<f32> = rng.vec(qkv).iter().map(|x| 3.0 * x).collect();
        same!(
            format!("{a:?}"),
            2e-5,
            vec![sharp, rng.vec(out), rng.vec(stat), rng.vec(out), rng.vec(qkv), rng.vec(stat)],
            |d, b| {
                let [x, y, lse, grad, dx, delta] = b else { unreachable!() };
                d.attention(&a, rows, View::first(x, qkv), ViewMut::first(y, out), ViewMut::first(lse, stat));
                d.attention_backward(
                    &a,
                    rows,
                    View::first(x, qkv),
                    View::first(y, out),
                    View::first(lse, stat),
                    View::first(grad, out),
                    ViewMut::first(dx, qkv),
                    ViewMut::first(delta, stat),
                );
                // Scratch: each device leaves there what it likes.
                d.copy(View::first(lse, stat), ViewMut::first(delta, stat));
            }
        );
    }
}

#[test]
fn optimiser() {
    for len in [1, 257, 300_000] {
        let mut rng = Rng(len as u64);
        let squares: Vec<f32> = rng.vec(len).iter().map(|x| x * x).collect();
        let now = vec![1e-2, 0.1, 1e-3];
        let step = AdamStep { beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.1 };
        // Plain, clipped, scaled up, and a loss that is no number: then nothing moves.
        for (limit, loss, scaling) in
            [(0.0, 1.0, None), (0.1, 1.0, None), (0.1, -2.0, Some([64.0, 7.0])), (0.1, f32::INFINITY, None)]
        {
            let loss_given = loss;
            let held = scaling.map_or(vec![3.0, 4.0], |s| s.to_vec());
            let (x, m) = ([rng.vec(len), rng.vec(len)], rng.vec(len));
            let [grads, params] = x;
            let inputs = vec![grads, params, m, squares.clone(), now.clone(), vec![loss], held, vec![5.0; 3]];
            // Of f32's 1 - beta2; a clipped gradient makes small denominators of it.
            same!(format!("Adam of {len}, limit {limit}, loss {loss}"), 1e-5, inputs, |d, b| {
                let [grads, params, m, v, now, loss, held, judged] = b else { unreachable!() };
                let scaling = scaling.is_some().then(|| ViewMut::first(held, 2));
                d.judge(
                    limit,
                    View::first(loss, 1),
                    View::first(grads, len),
                    scaling,
                    ViewMut { buf: &mut *judged, at: 1..3 },
                );
                let factor = View { buf: judged, at: 2..3 };
                let (p, m, v) = (ViewMut::first(params, len), ViewMut::first(m, len), ViewMut::first(v, len));
                d.adam(&step, View::first(now, 3), factor, View::first(grads, len), p, m, v);
                if !loss_given.is_finite() {
                    // NaN is no number to compare.
                    d.fill(0.0, ViewMut::first(loss, 1));
                    d.fill(0.0, ViewMut { buf: judged, at: 2..3 });
                }
            });
        }
    }
}

#[test]
fn scaling_backs_off_and_grows() {
    let device = Cuda::new(&Arc::new(Machine::new([8, 0], 3)), Precision::F16);
    assert!(device.is_narrow());
    let [mut grads, mut scaling, mut judged, mut loss] = [3, 2, 2, 1].map(|len| device.alloc(len));
    device.upload(&[1.5], ViewMut::first(&mut loss, 1));
    let mut judge = |x: [f32; 3], held: [f32; 2]| {
        device.upload(&x, ViewMut::first(&mut grads, 3));
        device.upload(&held, ViewMut::first(&mut scaling, 2));
        device.judge(
            0.5,
            View::first(&loss, 1),
            View::first(&grads, 3),
            Some(ViewMut::first(&mut scaling, 2)),
            ViewMut::first(&mut judged, 2),
        );
        let (mut held, mut out) = ([9f32; 2], [9f32; 2]);
        device.download(View::first(&scaling, 2), &mut held);
        device.download(View::first(&judged, 2), &mut out);
        device.finish().unwrap();
        (held, out)
    };
    // A norm of 5, scaled by 4.
    assert_eq!(judge([12.0, 0.0, -16.0], [4.0, 10.0]), ([4.0, 11.0], [5.0, 0.1 / 4.0]));
    assert_eq!(judge([12.0, 0.0, -16.0], [4.0, 1999.0]), ([8.0, 0.0], [5.0, 0.1 / 4.0]));
    for bad in [f32::INFINITY, f32::NAN] {
        let (held, [norm, factor]) = judge([1.0, bad, 1.0], [4.0, 1999.0]);
        assert!(held == [2.0, 0.0] && !norm.is_finite() && factor.is_nan(), "{held:?} {norm} {factor}");
    }
    // Within bounds that f32 has room for.
    assert_eq!(judge([0.0; 3], [16_777_216.0, 1999.0]).0, [16_777_216.0, 0.0]);
    assert_eq!(judge([f32::NAN; 3], [1.0 / 16_777_216.0, 5.0]).0, [1.0 / 16_777_216.0, 0.0]);
}

#[test]
fn rows_are_chosen_by_number() {
    for (rows, width, chosen) in [(1, 1, 1), (40, 7, 23), (9, 300, 9)] {
        let mut rng = Rng(rows as u64);
        // Each at most once, out of order.
        let index: Vec<f32> = (0..chosen).map(|i| ((i * 17 + 5) % rows) as f32).collect();
        let inputs = vec![rng.vec(rows * width), index, rng.vec(chosen * width), rng.vec(rows * width), vec![0.375]];
        same!(format!("{chosen} of {rows} rows of {width}"), 1e-9, inputs, |d, b| {
            let [from, index, some, to, factor] = b else { unreachable!() };
            d.gather(
                width,
                View::first(from, rows * width),
                View::first(index, chosen),
                ViewMut::first(some, chosen * width),
            );
            d.scatter(
                width,
                View::first(some, chosen * width),
                View::first(index, chosen),
                ViewMut::first(to, rows * width),
            );
            d.scale(View::first(factor, 1), View::first(to, rows * width), ViewMut::first(from, rows * width));
            d.clamp(-0.25, 0.125, ViewMut::first(to, rows * width));
        });
    }
    // A number that is no row's reads nothing and writes nothing.
    let device = Cuda::new(&Arc::new(Machine::new([8, 0], 3)), Precision::Bf16);
    let [mut from, mut index, mut to] = [6, 2, 4].map(|len| device.alloc(len));
    device.upload(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], ViewMut::first(&mut from, 6));
    device.upload(&[3.0, 2.0], ViewMut::first(&mut index, 2));
    device.gather(2, View::first(&from, 6), View::first(&index, 2), ViewMut::first(&mut to, 4));
    let mut got = [0.0; 4];
    device.download(View::first(&to, 4), &mut got);
    assert!(got[0].is_nan() && got[1].is_nan() && got[2..] == [5.0, 6.0], "{got:?}");
    let before = [9.0, 8.0, 7.0, 6.0];
    device.upload(&[0.0, 3.0], ViewMut::first(&mut index, 2));
    device.upload(&before, ViewMut::first(&mut to, 4));
    device.scatter(2, View::first(&from, 4), View::first(&index, 2), ViewMut::first(&mut to, 4));
    device.download(View::first(&to, 4), &mut got);
    device.finish().unwrap();
    assert_eq!(got, [1.0, 2.0, 7.0, 6.0]);
}

// By the loss that takes its scalars from the host, itself held against f64 in `tests/cuda.rs`.
#[test]
fn a_loss_at_learned_scalars_is_the_loss_at_these_scalars() {
    let (n, dim, tau, bias) = (70, 20, 0.37f64, -1.25f64);
    let objectives = [
        Objective::Conditional { lambda_u: 0.5, lambda_v: 1.5 },
        Objective::Conditional { lambda_u: 0.0, lambda_v: 2.0 },
        Objective::Joint,
        Objective::Sigmoid { bias },
        Objective::Mmd { lambda_u: 0.5, lambda_v: 1.5 },
        Objective::JointMmd,
    ];
    for (capability, objective, tilting, smoothing) in [[8, 0], [9, 0]].into_iter().flat_map(|capability| {
        objectives.into_iter().flat_map(move |objective| {
            [(Tilting::Cosine, 0.1), (Tilting::Dot, 0.0), (Tilting::L2, 0.0)]
                .map(|(tilting, smoothing)| (capability, objective, tilting, smoothing))
        })
    }) {
        let mut device = Cuda::new(&Arc::new(Machine::new(capability, 9)), Precision::Bf16);
        let mut rng = Rng(4);
        let put = |x: &[f32]| {
            let mut buf = device.alloc(x.len());
            device.upload(x, ViewMut::first(&mut buf, x.len()));
            buf
        };
        let [u, v] = [0, 1].map(|_| put(&rng.vec(n * dim)));
        let dims = [7, 12];
        let data = dims.map(|dim| put(&rng.vec(n * dim)));
        let mmd = matches!(objective, Objective::Mmd { .. } | Objective::JointMmd);
        let params = put(&[-(tau.ln()) as f32, bias as f32]);
        let [mut du, mut dv, mut want_du, mut want_dv] = [0; 4].map(|_| put(&vec![f32::NAN; n * dim]));
        let mut out = put(&[f32::NAN; 4]);
        let smoothing = if mmd { 0.0 } else { smoothing };
        let loss = Loss { tilting, objective, tau, smoothing };
        let name = format!("{loss:?} on {capability:?}");
        let gradients = [&mut want_du, &mut want_dv].map(|d| Some(Write::Set(d)));
        let want = device
            .loss_on_card(&loss, &Pairs::default(), [&u, &v], dim, mmd.then_some(data.each_ref()), gradients)
            .unwrap();

        // What the loss itself says is not looked at.
        let wrong = match objective {
            Objective::Sigmoid { .. } => Objective::Sigmoid { bias: 7.0 },
            other => other,
        };
        let wrong = Loss { objective: wrong, tau: 0.9, ..loss };
        let len = n * dim;
        let moments = mmd.then(|| Features {
            u: View::first(&data[0], n * dims[0]),
            v: View::first(&data[1], n * dims[1]),
            dims,
        });
        let embeddings = Embeddings {
            u: View::first(&u, len),
            v: View::first(&v, len),
            rows: n,
            dim,
            precision: Precision::Bf16,
            moments,
        };
        let scalars = Scalars {
            logit_scale: Some(View { buf: &params, at: 0..1 }),
            bias: Some(View { buf: &params, at: 1..2 }),
            out: ViewMut::first(&mut out, 4),
        };
        let gradients = [&mut du, &mut dv].map(|d| Write::Set(ViewMut::first(d, len)));
        device.contrast(&wrong, embeddings, gradients, scalars).unwrap();
        device.finish().unwrap();
        let read = |buf, len: usize| {
            let mut host = vec![f32::NAN; len];
            device.download(View::first(buf, len), &mut host);
            host
        };
        for (got, want) in [(&du, &want_du), (&dv, &want_dv)] {
            let (got, want) = (read(got, len), read(want, len));
            let off: f64 = got.iter().zip(&want).map(|(g, w)| f64::from(g - w).powi(2)).sum();
            let size: f64 = want.iter().map(|&w| f64::from(w).powi(2)).sum();
            // G is rounded to bf16: a last bit of a logit may turn one.
            assert!((off / size).sqrt() < 1e-3, "{name}: gradients are off by {off:e} of {size:e}");
        }
        let found = read(&out, 4);
        let wanted = [want.loss, -tau * want.grad_tau, want.grad_bias, tau];
        for (found, wanted) in found.into_iter().zip(wanted) {
            let off = (f64::from(found) - wanted).abs();
            assert!(off < 2e-5 * wanted.abs().max(1.0), "{name}: {found} and {wanted}");
        }
    }
}

// A loss of another size takes the ids' place between a step and the next: it is recorded all the same, later.
#[test]
fn a_step_is_recorded_though_other_work_comes_between() {
    let card = Arc::new(Machine::new([8, 0], 9).with_graphs(true));
    let mut device = Cuda::new(&card, Precision::Bf16);
    let (rows, dim) = (20, 4);
    let x = Buffer::of(&card, &Rng(4).vec(rows * dim)).unwrap();
    let [mut du, mut dv] = [0, 1].map(|_| device.alloc(rows * dim));
    let [params, mut out] = [1, 4].map(|len| device.alloc(len));
    let objective = Objective::Conditional { lambda_u: 1.0, lambda_v: 1.0 };
    let loss = Loss { tilting: Tilting::Dot, objective, tau: 1.0, smoothing: 0.0 };
    let few = Buffer::of(&card, &Rng(4).vec(3 * dim)).unwrap();
    let mut recorded = Default::default();
    let mut found = vec![];
    for step in 0..5 {
        let mut work = |device: &mut Cuda<Machine>| {
            let all_of_x = || View::first(&x, rows * dim);
            let embeddings =
                Embeddings { u: all_of_x(), v: all_of_x(), rows, dim, precision: Precision::Bf16, moments: None };
            let scalars =
                Scalars { logit_scale: Some(View::first(&params, 1)), bias: None, out: ViewMut::first(&mut out, 4) };
            let gradients = [&mut du, &mut dv].map(|d| Write::Set(ViewMut::first(d, rows * dim)));
            device.contrast(&loss, embeddings, gradients, scalars)
        };
        device.repeat(&mut recorded, &mut work).unwrap();
        let mut value = [f32::NAN; 4];
        device.download(View::first(&out, 4), &mut value);
        found.push(value.map(f32::to_bits));
        if step == 0 {
            device.loss_on_card(&loss, &Pairs::default(), [&few, &few], dim, None, [None, None]).unwrap();
        }
    }
    assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{found:?}");
    match card.replays() {
        Some(replays) => assert_eq!(replays, 3),
        None => println!("skipped: a card does not count its replays"),
    }
}

#[test]
fn a_failure_is_told_once_and_nothing_is_done_after_it() {
    let device = Cuda::new(&Arc::new(Machine::new([8, 0], 3)), Precision::Bf16);
    let mut x = device.alloc(4);
    device.upload(&[1.0; 5], ViewMut { buf: &mut x, at: 0..4 });
    device.fill(7.0, ViewMut { buf: &mut x, at: 0..4 });
    let failed = device.finish().unwrap_err().to_string();
    assert!(failed.contains('5') && failed.contains('4'), "{failed}");
    let mut out = [f32::NAN; 4];
    device.download(View { buf: &x, at: 0..4 }, &mut out);
    device.finish().unwrap();
    assert_eq!(out, [0.0; 4]);
}

/// Losses of an experiment's steps; its folder is left with its files. Stops after `most` steps.
#[cfg(feature = "cli")]
fn train<D: Contrast>(device: &mut D, toml: &str, dir: &std::path::Path, resume: bool, most: usize) -> Vec<f64> {
    use std::sync::atomic::{AtomicBool, Ordering};
    let config = contrastive::experiments::resolve(toml::from_str(toml).unwrap()).unwrap();
    let mut losses = vec![];
    let stop = AtomicBool::new(false);
    let mut observe = |progress: contrastive::train::Progress| {
        losses.push(progress.loss);
        stop.fetch_or(losses.len() >= most, Ordering::Relaxed);
    };
    contrastive::experiments::run(device, &config, dir, resume, &stop, &mut observe).unwrap();
    losses
}

#[cfg(feature = "cli")]
fn losses<D: Contrast>(device: &mut D, toml: &str) -> Vec<f64> {
    train(device, toml, tempfile::tempdir().unwrap().path(), false, usize::MAX)
}

/// All that changes from step to step: samples, learning rate, temperature, bias, clipping.
#[cfg(feature = "cli")]
const BUSY: &str = "
    experiment = 'gp'\nsamples = 60\nbatch = 20\nepochs = 3\nlr = 1e-2\nlog_every = 2\nschedule = 'cosine'\nwarmup = 2\n\
    tilting = 'cosine'\nobjective = 'sigmoid'\nbias = -1.0\ntau = 0.3\ntrain_tau = true\ngrad_clip = 0.05\nmicro_batch = 10\n\
    [adam]\nweight_decay = 0.1\n[encoder_u]\nkind = 'mlp'\nhidden = [9]\nactivation = 'relu'\n";

// A recorded step that held on to a number of the host (a learning rate, a count, a batch) would repeat it.
#[cfg(feature = "cli")]
#[test]
fn a_replayed_step_has_the_bits_of_launches() {
    use contrastive::checkpoint::Checkpoint;
    for (precision, name) in [(Precision::Bf16, "bf16"), (Precision::F16, "f16")] {
        let toml = format!("precision = '{name}'\n{}", BUSY.trim_start());
        let run = |graphs: bool, parts: &[usize]| {
            let dir = tempfile::tempdir().unwrap();
            let (mut losses, mut replays) = (vec![], 0);
            for (k, most) in parts.iter().enumerate() {
                let machine = Machine::new([8, 0], 5 + k as u64).with_graphs(graphs);
                let card = Arc::new(machine);
                losses.extend(train(&mut Cuda::new(&card, precision), &toml, dir.path(), k > 0, *most));
                replays += card.replays().unwrap_or(usize::from(graphs));
            }
            (losses, Checkpoint::read(dir.path()).unwrap().unwrap(), replays)
        };
        let (losses, plain, replays) = run(false, &[usize::MAX]);
        assert_eq!((losses.len(), replays), (9, 0));
        let (replayed, recorded, replays) = run(true, &[usize::MAX]);
        assert!(replays > 0, "nothing was replayed");
        assert_eq!(losses, replayed, "{name}");
        assert_eq!(plain.arenas, recorded.arenas, "{name}");
        // Stopped and gone on with, the count of scaled steps included.
        let (resumed, last, _) = run(true, &[4, usize::MAX]);
        assert_eq!(losses, resumed, "{name}");
        assert_eq!(plain.arenas, last.arenas, "{name}");
        assert_eq!(plain.scaling, last.scaling);
        // In f16 the first steps overflow: each of them halves the scale, and all others are counted.
        let [scale, counted] = plain.scaling;
        let steps = if precision == Precision::F16 { 9.0 } else { 0.0 };
        assert_eq!((65536.0 / scale).log2() + counted, steps, "{:?}", plain.scaling);
    }
}

// Twice the steps between two lines of the metrics, no more calls that wait and no more memory asked for.
#[cfg(feature = "cli")]
#[test]
fn a_step_waits_for_nobody_and_allocates_nothing() {
    let counts = |samples: usize| {
        let toml = BUSY.replace("samples = 60", &format!("samples = {samples}")).replace("epochs = 3", "epochs = 1");
        let toml = format!("precision = 'bf16'\n{}", toml.replace("log_every = 2", "log_every = 1000").trim_start());
        let card = Arc::new(Machine::new([8, 0], 5));
        let steps = losses(&mut Cuda::new(&card, Precision::Bf16), &toml).len();
        (steps, card.counts())
    };
    let (few, many) = (counts(120), counts(240));
    assert_eq!((few.0, many.0), (6, 12));
    if let (Some([few_waits, few]), Some([waits, allocations])) = (few.1, many.1) {
        assert_eq!(few, allocations, "allocations");
        // A checkpoint is due by the clock; its waits are fewer than one for each step more.
        assert!(waits.abs_diff(few_waits) < 6, "{waits} waits, not {few_waits}");
    } else {
        println!("skipped: a card counts neither waits nor allocations");
    }
}

#[cfg(feature = "cli")]
#[test]
fn training_follows_the_cpu() {
    let mlp = "
        experiment = 'gp'\nsamples = 150\nbatch = 50\nepochs = 2\nlr = 1e-2\nlog_every = 1\nprecision = 'bf16'\n\
        [encoder_u]\nkind = 'mlp'\nhidden = [24]\nactivation = 'gelu'\n";
    let transformer = "
        experiment = 'gp'\nsamples = 60\nbatch = 30\nepochs = 1\nlr = 1e-2\nlog_every = 1\nprecision = 'bf16'\n\
        tilting = 'cosine'\ntau = 0.3\n\
        [encoder_u]\nkind = 'transformer'\nsequence = [4, 3]\nwidth = 12\nheads = 2\ndepth = 1\n";
    let lenet = "
        experiment = 'digits'\nsamples = 40\nbatch = 16\nepochs = 1\nlog_every = 1\nprecision = 'bf16'\n\
        objective = 'sigmoid'\n";
    let f16 = &mlp.replace("precision = 'bf16'", "precision = 'f16'");
    let shuffled = &mlp.replace("[encoder_u]", "objective = 'joint'\npairings = 3\n[encoder_u]");
    let all =
        [("mlp", mlp), ("mlp in f16", f16), ("transformer", transformer), ("lenet", lenet), ("shuffled", shuffled)];
    for (name, toml) in all {
        let precision = if name == "mlp in f16" { Precision::F16 } else { Precision::Bf16 };
        let cpu = losses(&mut Cpu::new(), toml);
        for capability in [[8, 0], [9, 0]] {
            let card = Arc::new(Machine::new(capability, 5));
            let got = losses(&mut Cuda::new(&card, precision), toml);
            assert_eq!(got.len(), cpu.len());
            // What was learned is far more than what may be off.
            let moved = (cpu[0] - cpu[cpu.len() - 1]).abs();
            for (step, (got, want)) in got.iter().zip(&cpu).enumerate() {
                let most = 2e-2 * want.abs().min(1.0) + 0.1 * moved;
                assert!((got - want).abs() < most, "{name} step {step}: {got} and {want}");
            }
            println!("{name} on {capability:?}: {got:?}\n{cpu:?}");
        }
    }
}
