//! Every encoder's backward, and that of the verbs of sequences, against central differences of forward, in f64.
//!
//! The loss is `<R, output>` with a random `R`, so dL/d output is `R`. Forward's own truth is tested beside the
//! verbs, in `device/cpu/`: differences alone would accept a wrong forward with its matching backward.

use contrastive::device::cpu::{Cpu, Isa};
use contrastive::device::{Activation, Attention, Device, Norm, Pool, Real, View, ViewMut};
use contrastive::nn::{Acts, ConvSpec, Encoder, EncoderSpec, Layout};
use contrastive::objective::Write;
use contrastive::optim::{Adam, AdamConfig};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random<T: Real>(n: usize, rng: &mut ChaCha8Rng) -> Vec<T> {
    (0..n).map(|_| T::from_f64(rng.random_range(-1.0..1.0))).collect()
}

/// An encoder behind two foreign numbers of the arena, so that a wrong offset shows.
fn build(spec: &EncoderSpec, input: usize, output: usize) -> (Encoder, Layout) {
    let mut layout = Layout::default();
    layout.push("other", &[2]);
    let encoder = Encoder::build(spec, "u", input, output, &mut layout).unwrap();
    (encoder, layout)
}

/// Initial parameters, in the device's numbers.
fn initial<T>(device: &impl Device<Buf = Vec<T>>, encoder: &Encoder, layout: &Layout) -> Vec<T> {
    let mut host = vec![0.0; layout.len()];
    encoder.init(5, &mut host);
    let mut params = device.alloc(layout.len());
    device.upload(&host, ViewMut { buf: &mut params, at: 0..host.len() });
    params
}

/// dL/dparams added to `grads`, after a forward, of `x` `[rows, input]` and `r` `[rows, output]`.
fn add_gradient<T: Copy, D: Device<Buf = Vec<T>>>(
    device: &D,
    encoder: &Encoder,
    params: &Vec<T>,
    x: &Vec<T>,
    r: &[T],
    acts: &mut Acts<D>,
    grads: &mut Vec<T>,
) {
    let rows = x.len() / encoder.input;
    encoder.forward(device, params, View { buf: x, at: 0..x.len() }, rows, acts);
    acts.d_output[..r.len()].copy_from_slice(r);
    encoder.backward(device, params, View { buf: x, at: 0..x.len() }, rows, acts, grads);
}

fn conv(channels: usize, kernel: usize, padding: usize, pool: Pool, pool_size: usize) -> ConvSpec {
    ConvSpec { channels, kernel, padding, pool, pool_size }
}

fn transformer(sequence: [usize; 2], [width, heads, depth]: [usize; 3], causal: bool) -> EncoderSpec {
    EncoderSpec::Transformer { sequence, width, heads, depth, causal }
}

/// Every kind x activation x pooling, at sizes that divide nothing.
fn cases() -> Vec<(EncoderSpec, usize, usize)> {
    let mut cases = vec![
        (EncoderSpec::Linear { bias: false }, 5, 3),
        (EncoderSpec::Linear { bias: true }, 7, 1),
        (EncoderSpec::Lenet {}, 784, 10),
    ];
    for activation in [Activation::None, Activation::Relu, Activation::Gelu] {
        cases.push((EncoderSpec::Mlp { hidden: vec![], activation }, 3, 2));
        cases.push((EncoderSpec::Mlp { hidden: vec![13, 1, 6], activation }, 11, 5));
        for pool in [Pool::Max, Pool::Average] {
            // Odd images: pooling drops rows and columns; padding wider than the kernel; a kernel as wide as its image.
            let spec = vec![conv(3, 3, 1, pool, 2), conv(5, 2, 3, pool, 3), conv(2, 2, 0, pool, 1)];
            cases.push((EncoderSpec::Cnn { image: [2, 9, 7], conv: spec, activation }, 126, 3));
            cases.push((EncoderSpec::Cnn { image: [1, 1, 1], conv: vec![conv(1, 1, 0, pool, 1)], activation }, 1, 1));
            cases.push((EncoderSpec::Cnn { image: [3, 5, 11], conv: vec![], activation }, 165, 2));
        }
    }
    for causal in [true, false] {
        // One token of one number in one head; no block at all; primes, several heads; more tokens than a block of
        // queries holds.
        cases.push((transformer([1, 1], [1, 1, 1], causal), 1, 1));
        cases.push((transformer([3, 2], [5, 1, 0], causal), 6, 2));
        cases.push((transformer([7, 3], [15, 3, 2], causal), 21, 5));
        cases.push((transformer([53, 2], [6, 2, 1], causal), 106, 3));
    }
    cases
}

/// All of a buffer.
fn all(buf: &Vec<f64>) -> View<'_, Vec<f64>> {
    View { buf, at: 0..buf.len() }
}

/// [`all`], to be written.
fn all_mut(buf: &mut Vec<f64>) -> ViewMut<'_, Vec<f64>> {
    let at = 0..buf.len();
    ViewMut { buf, at }
}

/// Central differences of `loss` at 40 places of `x`, against `got`.
fn differences(what: &str, rng: &mut ChaCha8Rng, x: &mut [f64], got: &[f64], loss: impl Fn(&[f64]) -> f64) {
    const STEP: f64 = 1e-6;
    for _ in 0..40 {
        let i = rng.random_range(0..x.len());
        let at = x[i];
        x[i] = at + STEP;
        let up = loss(x);
        x[i] = at - STEP;
        let down = loss(x);
        x[i] = at;
        let want = (up - down) / (2.0 * STEP);
        assert!((want - got[i]).abs() <= 1e-7 * (1.0 + want.abs()), "{what} [{i}]: {}, differences say {want}", got[i]);
    }
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

// Rows next to each other and rows apart, one number, primes. What lies between rows keeps its numbers, and both
// outputs obey their mode.
#[test]
fn layer_norm_backward_is_the_derivative() {
    let device = Cpu::wide(Isa::best());
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for (rows, width, stride) in [(1, 1, 1), (5, 7, 7), (3, 37, 37), (67, 13, 91), (2, 64, 100)] {
        let norm = Norm { width, stride };
        let mut x: Vec<f64> = random(norm.input_len(rows), &mut rng);
        let (affine, r): (Vec<f64>, Vec<f64>) = (random(2 * width, &mut rng), random(rows * width, &mut rng));
        let forward = |x: &Vec<f64>, affine: &Vec<f64>| {
            let (mut out, mut stats) = (vec![f64::NAN; rows * width], vec![f64::NAN; 2 * rows]);
            device.layer_norm(&norm, rows, all(x), all(affine), all_mut(&mut out), all_mut(&mut stats));
            (out, stats)
        };
        let (_, stats) = forward(&x, &affine);
        let backward = |dx: Write<ViewMut<'_, Vec<f64>>>, d_affine: Write<ViewMut<'_, Vec<f64>>>| {
            device.layer_norm_backward(&norm, rows, all(&x), all(&affine), all(&stats), all(&r), dx, d_affine);
        };
        let between = |i: usize| i % stride >= width;
        let (mut dx, mut d_affine) = (vec![5.0; x.len()], vec![f64::NAN; 2 * width]);
        backward(Write::Set(all_mut(&mut dx)), Write::Set(all_mut(&mut d_affine)));
        let (mut dx_twice, mut d_affine_twice) = (dx.clone(), d_affine.clone());
        backward(Write::Add(all_mut(&mut dx_twice)), Write::Add(all_mut(&mut d_affine_twice)));
        for (i, (&once, &twice)) in dx.iter().zip(&dx_twice).enumerate() {
            assert!(if between(i) { once == 5.0 && twice == 5.0 } else { twice == 2.0 * once }, "{norm:?} dx [{i}]");
        }
        assert!(d_affine.iter().zip(&d_affine_twice).all(|(once, twice)| *twice == 2.0 * once));
        dx.iter_mut().enumerate().filter(|(i, _)| between(*i)).for_each(|(_, d)| *d = 0.0);
        let fixed = x.clone();
        differences("affine", &mut rng, &mut affine.clone(), &d_affine, |affine| {
            inner(&forward(&fixed, &affine.to_vec()).0, &r)
        });
        differences("x", &mut rng, &mut x, &dx, |x| inner(&forward(&x.to_vec(), &affine).0, &r));
    }
}

// One token, primes, one head and several, several blocks of queries and keys, flat and sharp softmaxes. Extreme
// logits are compared with the formula instead, beside the verb: differences of a softmax that jumps say nothing.
#[test]
fn attention_backward_is_the_derivative() {
    let device = Cpu::wide(Isa::best());
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for (rows, time, heads, head, size) in
        [(1, 1, 1, 1, 1.0), (3, 1, 2, 5, 1.0), (2, 7, 3, 5, 4.0), (67, 5, 1, 3, 1.0), (1, 149, 2, 17, 1.0)]
    {
        for causal in [false, true] {
            let shape = Attention { time, heads, head, causal };
            let tokens = rows * time;
            let mut qkv: Vec<f64> =
                random::<f64>(3 * tokens * shape.width(), &mut rng).iter().map(|x| size * x).collect();
            let r: Vec<f64> = random(tokens * shape.width(), &mut rng);
            let forward = |qkv: &[f64]| {
                let (mut out, mut lse) = (vec![f64::NAN; r.len()], vec![f64::NAN; tokens * heads]);
                device.attention(&shape, rows, all(&qkv.to_vec()), all_mut(&mut out), all_mut(&mut lse));
                (out, lse)
            };
            let (out, lse) = forward(&qkv);
            let (mut d_qkv, mut delta) = (vec![f64::NAN; qkv.len()], vec![f64::NAN; lse.len()]);
            let (d, delta) = (all_mut(&mut d_qkv), all_mut(&mut delta));
            device.attention_backward(&shape, rows, all(&qkv), all(&out), all(&lse), all(&r), d, delta);
            differences(&format!("{shape:?}"), &mut rng, &mut qkv, &d_qkv, |qkv| inner(&forward(qkv).0, &r));
        }
    }
}

/// The encoder of docs/engine.md on one sample, a token at a time, from tensors by their names.
fn naive_transformer(spec: &EncoderSpec, layout: &Layout, params: &[f64], x: &[f64]) -> Vec<f64> {
    let &EncoderSpec::Transformer { sequence: [time, channels], width, heads, depth, causal } = spec else { panic!() };
    let tensor = |name: String| {
        let span = layout.spans.iter().find(|span| span.name == format!("u.{name}")).unwrap();
        &params[span.at.clone()]
    };
    let affine = |name: &str, x: &[f64]| -> Vec<f64> {
        let (w, b) = (tensor(format!("{name}.weight")), tensor(format!("{name}.bias")));
        w.chunks(x.len()).zip(b).map(|(w, b)| inner(w, x) + b).collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let deviation = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64 + 1e-5).sqrt();
        let (gain, bias) = (tensor(format!("{name}.gain")), tensor(format!("{name}.bias")));
        x.iter().zip(gain).zip(bias).map(|((x, g), b)| g * (x - mean) / deviation + b).collect()
    };
    let add = |x: &mut Vec<f64>, y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    // x Phi(x), with Phi as 2000 midpoints of the density's integral from 0: an error near 1e-9 where |x| < 3.
    let gelu = |x: f64| {
        let h = x / 2000.0;
        let area: f64 = (0..2000).map(|i| (-0.5 * ((f64::from(i) + 0.5) * h).powi(2)).exp() * h).sum();
        x * (0.5 + area / (2.0 * std::f64::consts::PI).sqrt())
    };

    let (input, position) = (tensor("0.input.weight".into()), tensor("0.position".into()));
    let mut stream: Vec<Vec<f64>> = (0..time)
        .map(|t| {
            let x = &x[t * channels..][..channels];
            input.chunks(channels).zip(&position[t * width..]).map(|(w, p)| inner(w, x) + p).collect()
        })
        .collect();
    for b in 0..depth {
        let name = |part: &str| format!("0.blocks.{b}.{part}");
        let qkv: Vec<_> = stream.iter().map(|h| affine(&name("qkv"), &norm(&name("norm_1"), h))).collect();
        for (i, h) in stream.iter_mut().enumerate() {
            let mut mixed = Vec::new();
            for head in (0..width).step_by(width / heads).map(|at| at..at + width / heads) {
                let part = |t: usize, which: usize| &qkv[t][which * width..][head.clone()];
                let keys = if causal { i + 1 } else { time };
                let p: Vec<f64> =
                    (0..keys).map(|j| (inner(part(i, 0), part(j, 1)) / (head.len() as f64).sqrt()).exp()).collect();
                mixed.extend(
                    (0..head.len())
                        .map(|k| (0..keys).map(|j| p[j] * part(j, 2)[k]).sum::<f64>() / p.iter().sum::<f64>()),
                );
            }
            add(h, affine(&name("mix"), &mixed));
            let up: Vec<f64> = affine(&name("up"), &norm(&name("norm_2"), h)).into_iter().map(gelu).collect();
            add(h, affine(&name("down"), &up));
        }
    }
    affine("1", &norm("0.norm", &stream[time - 1]))
}

// A forgotten position, a residual in the wrong place, the wrong token: differences would see none of it. Gains and
// biases are turned away from 1 and 0 first.
#[test]
fn a_transformer_is_its_formula() {
    let device = Cpu::wide(Isa::best());
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    for (spec, input, output) in cases() {
        if !matches!(spec, EncoderSpec::Transformer { .. }) {
            continue;
        }
        let (encoder, layout) = build(&spec, input, output);
        let noise: Vec<f64> = random(layout.len(), &mut rng);
        let params = initial(&device, &encoder, &layout).iter().zip(noise).map(|(p, n)| p + 0.3 * n).collect();
        let x: Vec<f64> = random(3 * input, &mut rng);
        let mut acts = encoder.acts(&device, 4);
        encoder.forward(&device, &params, all(&x), 3, &mut acts);
        for (x, got) in x.chunks(input).zip(acts.output.chunks(output)) {
            let want = naive_transformer(&spec, &layout, &params, x);
            for (g, w) in got.iter().zip(&want) {
                assert!((g - w).abs() < 1e-6, "{spec:?}: {g} and {w}");
            }
        }
    }
}

// A step of 1e-7 leaves a truncation error near 1e-14 and a rounding error near 1e-9 of numbers of size 1 here, so 1e-6
// is small beside any real mistake. The seed is fixed, and none of its ReLUs and maxima sits within a step of its
// kink.
#[test]
fn backward_is_the_derivative_of_forward_and_adds() {
    const STEP: f64 = 1e-7;
    let device = Cpu::wide(Isa::best());
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (spec, input, output) in cases() {
        let (encoder, layout) = build(&spec, input, output);
        let mut params = initial(&device, &encoder, &layout);
        for rows in [1, 3, 7] {
            let mut acts = encoder.acts(&device, rows);
            let (x, r) = (random(rows * input, &mut rng), random(rows * output, &mut rng));
            let before: Vec<f64> = random(layout.len(), &mut rng);
            let mut grads = before.clone();
            add_gradient(&device, &encoder, &params, &x, &r, &mut acts, &mut grads);
            assert_eq!(grads[..2], before[..2], "another's gradient was touched");

            let mut loss = |params: &Vec<f64>| -> f64 {
                encoder.forward(&device, params, View { buf: &x, at: 0..x.len() }, rows, &mut acts);
                acts.output.iter().zip(&r).map(|(o, r)| o * r).sum()
            };
            let mut largest = 0.0f64;
            for span in &layout.spans[1..] {
                for _ in 0..span.at.len().min(12) {
                    let i = rng.random_range(span.at.clone());
                    let at = params[i];
                    params[i] = at + STEP;
                    let up = loss(&params);
                    params[i] = at - STEP;
                    let down = loss(&params);
                    params[i] = at;
                    let (want, got) = ((up - down) / (2.0 * STEP), grads[i] - before[i]);
                    assert!(
                        (want - got).abs() <= 1e-6 * (1.0 + want.abs()),
                        "{spec:?} rows {rows} {} [{}]: {got}, differences say {want}",
                        span.name,
                        i - span.at.start
                    );
                    largest = largest.max(want.abs());
                }
            }
            assert!(largest > 1e-3, "{spec:?}: nothing was tested, every derivative vanished");
        }
    }
}

// Fails if a verb reads beyond the rows it was given, or leaves something of an earlier, larger batch in its sums.
#[test]
fn what_an_earlier_batch_left_does_not_matter() {
    let device = Cpu::wide(Isa::best());
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (spec, input, output) in cases() {
        let (encoder, layout) = build(&spec, input, output);
        let params = initial(&device, &encoder, &layout);
        let (x, r) = (random(3 * input, &mut rng), random(3 * output, &mut rng));
        let run = |acts: &mut Acts<_>| {
            let mut grads = device.alloc(layout.len());
            add_gradient(&device, &encoder, &params, &x, &r, acts, &mut grads);
            (acts.output[..r.len()].to_vec(), grads)
        };
        let fresh = run(&mut encoder.acts(&device, 3));

        let mut acts = encoder.acts(&device, 71);
        let loud: Vec<f64> = random::<f64>(71 * input, &mut rng).iter().map(|x| 1e6 * x).collect();
        let mut unused = device.alloc(layout.len());
        add_gradient(&device, &encoder, &params, &loud, &random(71 * output, &mut rng), &mut acts, &mut unused);
        assert!(run(&mut acts) == fresh, "{spec:?}");
    }
}

// Gradient caching rests on it. Sums are grouped otherwise, hence rounding and no more.
#[test]
fn microbatches_add_up_to_the_batch_on_every_instruction_set() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (spec, input, output) in cases() {
        let (encoder, layout) = build(&spec, input, output);
        // More rows than a sum over samples has shards.
        let rows = 67;
        let (x, r): (Vec<f64>, Vec<f64>) = (random(rows * input, &mut rng), random(rows * output, &mut rng));
        let mut first = None;
        for isa in Isa::available() {
            let device = Cpu::wide(isa);
            let params = initial(&device, &encoder, &layout);
            let mut acts = encoder.acts(&device, rows);
            for microbatch in [rows, 30] {
                let mut grads = device.alloc(layout.len());
                for (x, r) in x.chunks(microbatch * input).zip(r.chunks(microbatch * output)) {
                    add_gradient(&device, &encoder, &params, &x.to_vec(), r, &mut acts, &mut grads);
                }
                let want = first.get_or_insert_with(|| grads.clone());
                let norm = want.iter().map(|g| g * g).sum::<f64>().sqrt();
                let off = grads.iter().zip(&*want).map(|(g, w)| (g - w).powi(2)).sum::<f64>().sqrt();
                assert!(norm > 0.0 && off <= 1e-13 * norm, "{spec:?} {} by {microbatch}: {off:e}", isa.name());
            }
        }
    }
}

// f32 has registers of its own. Rounding of some 1e5 terms of mixed signs, relative to the norm: 5e-6 is
// ten times what was seen and more. The data are numbers that f32 holds exactly.
#[test]
fn single_precision_agrees_with_double_on_every_instruction_set() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for (spec, input, output) in cases() {
        let (encoder, layout) = build(&spec, input, output);
        let rows = 67;
        let (x, r): (Vec<f32>, Vec<f32>) = (random(rows * input, &mut rng), random(rows * output, &mut rng));
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let off = |got: &[f32], want: &[f64]| {
            let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
            got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).powi(2)).sum::<f64>().sqrt() / norm
        };
        let device = Cpu::wide(Isa::best());
        let params = initial(&device, &encoder, &layout);
        let (mut acts, mut grads) = (encoder.acts(&device, rows), device.alloc(layout.len()));
        add_gradient(&device, &encoder, &params, &wide(&x), &wide(&r), &mut acts, &mut grads);
        for isa in Isa::available() {
            let device = Cpu::with_isa(isa);
            let params = initial(&device, &encoder, &layout);
            let (mut single, mut got) = (encoder.acts(&device, rows), device.alloc(layout.len()));
            add_gradient(&device, &encoder, &params, &x, &r, &mut single, &mut got);
            let (output, gradient) = (off(&single.output, &acts.output), off(&got, &grads));
            assert!(output < 5e-6 && gradient < 5e-6, "{spec:?} {}: {output:e} {gradient:e}", isa.name());
        }
    }
}

#[test]
fn identity_returns_its_input_and_has_no_parameters() {
    let device = Cpu::new();
    let (encoder, layout) = build(&EncoderSpec::Identity {}, 5, 5);
    assert_eq!(layout.spans.len(), 1);
    let x: Vec<f32> = random(3 * 5, &mut ChaCha8Rng::seed_from_u64(4));
    let mut acts = encoder.acts(&device, 7);
    let params = device.alloc(2);
    encoder.forward(&device, &params, View { buf: &x, at: 0..15 }, 3, &mut acts);
    assert_eq!(acts.output[..15], x);
    let mut grads = vec![1.0; 2];
    encoder.backward(&device, &params, View { buf: &x, at: 0..15 }, 3, &mut acts, &mut grads);
    assert_eq!(grads, [1.0; 2]);
}

// Fails if any sum's grouping depends on how many threads there are.
#[test]
fn a_step_has_the_same_bits_for_any_number_of_threads() {
    let step = |spec: &EncoderSpec, threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let device = Cpu::new();
            let (encoder, layout) = build(spec, 784, 10);
            let mut params = initial(&device, &encoder, &layout);
            let mut rng = ChaCha8Rng::seed_from_u64(6);
            let rows = 131;
            let (x, r) = (random(rows * 784, &mut rng), random(rows * 10, &mut rng));
            let mut acts = encoder.acts(&device, rows);
            let mut adam = Adam::new(&device, AdamConfig::default(), &layout);
            for at in 0..2 {
                let mut grads = device.alloc(layout.len());
                add_gradient(&device, &encoder, &params, &x, &r, &mut acts, &mut grads);
                let (loss, mut judged) = (vec![0.0], vec![0.0; 2]);
                let (loss, all) = (View { buf: &loss, at: 0..1 }, View { buf: &grads, at: 0..grads.len() });
                device.judge(1e-3, loss, all, None, ViewMut { buf: &mut judged, at: 0..2 });
                adam.step(&device, at, 1e-3, f64::from(judged[1]), &mut params, &grads);
            }
            params.iter().map(|p| p.to_bits()).collect::<Vec<_>>()
        })
    };
    for spec in [EncoderSpec::Lenet {}, transformer([98, 8], [36, 3, 2], true)] {
        let one = step(&spec, 1);
        for threads in [2, 3, 4] {
            assert!(step(&spec, threads) == one, "{spec:?}, {threads} threads");
        }
    }
}
