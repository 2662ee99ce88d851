use contrastive::device::{cpu::*, *};
use contrastive::nn::*;
use contrastive::optim::*;
use std::time::Instant;
#[test]
fn lenet() {
    for isa in Isa::available() {
        let device = Cpu::<f32>::with_isa(isa);
        let mut layout = Layout::default();
        let e = Encoder::build(&EncoderSpec::Lenet, "u", 784, 10, &mut layout).unwrap();
        let mut params = vec![0.0; layout.len()];
        e.init(1, &mut params);
        let rows = 512;
        let x: Vec<f32> = (0..rows * 784).map(|i| ((i * 7919) % 1000) as f32 / 1000.0).collect();
        let mut acts = e.acts(&device, rows);
        let mut grads = device.alloc(layout.len());
        let mut adam = Adam::new(&device, AdamConfig::default(), &layout);
        let mut t = [f64::MAX; 3];
        for s in 0..30 {
            let a = Instant::now();
            e.forward(&device, &params, View { buf: &x, at: 0..x.len() }, rows, &mut acts);
            let b = Instant::now();
            acts.d_output.copy_from_slice(&acts.output);
            device.fill(0.0, ViewMut { buf: &mut grads, at: 0..layout.len() });
            e.backward(&device, &params, View { buf: &x, at: 0..x.len() }, rows, &mut acts, &mut grads);
            let c = Instant::now();
            adam.step(&device, s, 1e-3, 1.0, &mut params, &grads);
            let d = Instant::now();
            for (t, (x, y)) in t.iter_mut().zip([(a, b), (b, c), (c, d)]) {
                *t = t.min((y - x).as_secs_f64());
            }
        }
        println!(
            "{} fwd {:.2}ms bwd {:.2}ms adam {:.3}ms  {:.0} images/s",
            isa.name(),
            t[0] * 1e3,
            t[1] * 1e3,
            t[2] * 1e3,
            rows as f64 / t.iter().sum::<f64>()
        );
        // verbs
        let mut time = |name: &str, f: &mut dyn FnMut()| {
            let mut m = f64::MAX;
            for _ in 0..10 {
                let a = Instant::now();
                f();
                m = m.min(a.elapsed().as_secs_f64());
            }
            println!("   {name}: {:.3} ms", m * 1e3);
        };
        let c1 = Conv { inputs: 1, height: 28, width: 28, outputs: 6, kernel: 5, padding: 2 };
        let c2 = Conv { inputs: 6, height: 14, width: 14, outputs: 16, kernel: 5, padding: 0 };
        for c in [c1, c2] {
            let x = vec![0.5f32; rows * c.input_len()];
            let mut o = vec![0.5f32; rows * c.output_len()];
            let w = vec![0.1f32; c.outputs * c.patch()];
            let mut s = vec![0.0; device.conv_scratch(&c, rows)];
            let mut dx = x.clone();
            let mut dw = w.clone();
            time("conv", &mut || {
                device.conv(
                    &c,
                    rows,
                    View { buf: &x, at: 0..x.len() },
                    View { buf: &w, at: 0..w.len() },
                    ViewMut { at: 0..o.len(), buf: &mut o },
                    &mut s,
                )
            });
            time("data", &mut || {
                device.conv_backward_data(
                    &c,
                    rows,
                    View { buf: &w, at: 0..w.len() },
                    View { buf: &o, at: 0..o.len() },
                    ViewMut { at: 0..dx.len(), buf: &mut dx },
                    &mut s,
                )
            });
            time("weight", &mut || {
                device.conv_backward_weight(
                    &c,
                    rows,
                    View { buf: &x, at: 0..x.len() },
                    View { buf: &o, at: 0..o.len() },
                    contrastive::objective::Write::Set(ViewMut { at: 0..dw.len(), buf: &mut dw }),
                    &mut s,
                )
            });
            let sh = [rows, c.outputs, c.out_height() * c.out_width()];
            let mut b = vec![0.1f32; c.outputs];
            time("relu", &mut || {
                device.bias_activation(
                    sh,
                    Activation::Relu,
                    Some(View { buf: &b, at: 0..b.len() }),
                    ViewMut { at: 0..o.len(), buf: &mut o },
                    None,
                )
            });
            let sv = o.clone();
            time("relu back", &mut || {
                device.bias_activation_backward(
                    sh,
                    Activation::Relu,
                    View { buf: &sv, at: 0..sv.len() },
                    ViewMut { at: 0..o.len(), buf: &mut o },
                    Some(contrastive::objective::Write::Set(ViewMut { at: 0..b.len(), buf: &mut b })),
                )
            });
            let p =
                Pooling { kind: Pool::Max, channels: c.outputs, height: c.out_height(), width: c.out_width(), size: 2 };
            let mut po = vec![0.0f32; rows * p.output_len()];
            time("pool", &mut || {
                device.pool(&p, rows, View { buf: &sv, at: 0..sv.len() }, ViewMut { at: 0..po.len(), buf: &mut po })
            });
            time("pool back", &mut || {
                device.pool_backward(
                    &p,
                    rows,
                    View { buf: &sv, at: 0..sv.len() },
                    View { buf: &po, at: 0..po.len() },
                    ViewMut { at: 0..o.len(), buf: &mut o },
                )
            });
        }
        let n = 512 * 512;
        let mut z: Vec<f32> = (0..n).map(|i| (i % 997) as f32 / 200.0 - 2.5).collect();
        let mut o = z.clone();
        time("gelu 512x512", &mut || {
            device.bias_activation(
                [512, 512, 1],
                Activation::Gelu,
                None,
                ViewMut { at: 0..n, buf: &mut z },
                Some(ViewMut { at: 0..n, buf: &mut o }),
            )
        });
        time("gelu back", &mut || {
            device.bias_activation_backward(
                [512, 512, 1],
                Activation::Gelu,
                View { at: 0..n, buf: &z },
                ViewMut { at: 0..n, buf: &mut o },
                None,
            )
        });
        let mut p = vec![0.1f32; 4 << 20];
        let g = p.clone();
        let mut ad = Adam::<Cpu<f32>>::new(&device, AdamConfig::default(), &{
            let mut l = Layout::default();
            l.push("a", &[4 << 20]);
            l
        });
        time("adam 4M", &mut || ad.step(&device, 0, 1e-3, 1.0, &mut p, &g));
        time("norm 4M", &mut || {
            std::hint::black_box(grad_norm(&device, &g));
        });
    }
}
