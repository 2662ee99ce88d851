//! The verbs of a card, their kernels run by the host twin, against the CPU's in f64; and training with them.
#![cfg(feature = "cuda")]
#![allow(missing_docs)]

#[allow(dead_code, reason = "each test program takes what it needs of it")]
#[path = "common/twin.rs"]
mod twin;

use contrastive::Cpu;
use contrastive::device::cuda::contrast::Cuda;
use contrastive::device::{Activation, AdamStep, Attention, Conv, Device, Gemm, Norm, Pool, Pooling, View, ViewMut};
use contrastive::objective::{Precision, Write};
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
        let want = on(&Cpu::<f64>::new(), &inputs, $verbs);
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

fn all<B>(buf: &B, len: usize) -> View<'_, B> {
    View { buf, at: 0..len }
}
fn all_mut<B>(buf: &mut B, len: usize) -> ViewMut<'_, B> {
    ViewMut { buf, at: 0..len }
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
                    let to = all_mut(z, m * n);
                    let to = if add { Write::Add(to) } else { Write::Set(to) };
                    d.gemm(shape, all(x, m * k), all(y, k * n), to);
                });
            }
        }
    }
}

#[test]
fn activations() {
    for (rows, channels, pixels) in [(1, 1, 1), (1300, 7, 1), (5, 3, 37), (3, 300, 1)] {
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
                        let out = (separate || activation == Activation::Gelu).then(|| all_mut(out, len));
                        d.bias_activation(shape, activation, Some(all(bias, channels)), all_mut(pre, len), out);
                        let sums = Some(Write::Add(all_mut(d_bias, channels)));
                        d.bias_activation_backward(shape, activation, all(pre, len), all_mut(grad, len), sums);
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
                d.conv(&conv, rows, all(input, x), all(weight, w), all_mut(out, y), &mut scratch);
                d.conv_backward_data(&conv, rows, all(weight, w), all(grad, y), all_mut(dx, x), &mut scratch);
                let to = Write::Add(all_mut(dw, w));
                d.conv_backward_weight(&conv, rows, all(input, x), all(grad, y), to, &mut scratch);
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
                d.pool(&p, rows, all(input, x), all_mut(out, y));
                d.pool_backward(&p, rows, all(input, x), all(grad, y), all_mut(dx, x));
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
                    all(input, x),
                    all(affine, 2 * width),
                    all_mut(out, y),
                    all_mut(stats, 2 * rows),
                );
                let (dx, da) = (Write::Add(all_mut(dx, x)), Write::Add(all_mut(da, 2 * width)));
                d.layer_norm_backward(
                    &norm,
                    rows,
                    all(input, x),
                    all(affine, 2 * width),
                    all(stats, 2 * rows),
                    all(grad, y),
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
                d.attention(&a, rows, all(x, qkv), all_mut(y, out), all_mut(lse, stat));
                d.attention_backward(
                    &a,
                    rows,
                    all(x, qkv),
                    all(y, out),
                    all(lse, stat),
                    all(grad, out),
                    all_mut(dx, qkv),
                    all_mut(delta, stat),
                );
            }
        );
    }
}

#[test]
fn optimiser() {
    for len in [1, 257, 300_000] {
        let mut rng = Rng(len as u64);
        let squares: Vec<f32> = rng.vec(len).iter().map(|x| x * x).collect();
        let inputs = vec![rng.vec(len), rng.vec(len), rng.vec(len), squares, vec![0.0]];
        let step =
            AdamStep { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.1, bias: [0.1, 1e-3], grad_scale: 0.5 };
        same!(format!("Adam of {len}"), 1e-6, inputs, |d, b| {
            let [grads, params, m, v, sum] = b else { unreachable!() };
            let squares = d.sum_squares(all(grads, len));
            d.fill(squares, all_mut(sum, 1));
            d.adam(&step, all(grads, len), all_mut(params, len), all_mut(m, len), all_mut(v, len));
        });
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

/// Losses of the first steps of an experiment.
#[cfg(feature = "cli")]
fn losses<D: contrastive::device::Contrast>(device: &mut D, toml: &str) -> Vec<f64> {
    use std::sync::atomic::AtomicBool;
    let config = contrastive::experiments::resolve(None, toml::from_str(toml).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut losses = vec![];
    let stop = AtomicBool::new(false);
    let mut observe = |progress: contrastive::train::Progress| losses.push(progress.loss);
    contrastive::experiments::run(device, "twin", &config, dir.path(), false, &stop, &mut observe).unwrap();
    losses
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
    for (name, toml) in [("mlp", mlp), ("transformer", transformer), ("lenet", lenet)] {
        let cpu = losses(&mut Cpu::new(), toml);
        for capability in [[8, 0], [9, 0]] {
            let card = Arc::new(Machine::new(capability, 5));
            let got = losses(&mut Cuda::new(&card, Precision::Bf16), toml);
            assert_eq!(got.len(), cpu.len());
            for (step, (got, want)) in got.iter().zip(&cpu).enumerate() {
                assert!((got - want).abs() < 2e-2 * want.abs().max(1.0), "{name} step {step}: {got} and {want}");
            }
            println!("{name} on {capability:?}: {got:?}\n{cpu:?}");
        }
    }
}
