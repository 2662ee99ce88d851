//! The verbs of [`Device`] on the CPU.
//!
//! What is generic is compiled, for every instruction set, by each crate and each test that uses it; so f32 has its own
//! implementation, compiled once. That of f64, for tests of gradients, is compiled where it is used.

use super::{Cpu, Lane, attention, conv, gemm, layers, norm, read, write};
use crate::device::{
    Activation, AdamStep, Attention, Conv, ConvPool, Device, DeviceError, Gemm, Norm, Pooling, Real, View, ViewMut,
};
use crate::objective::Write;
use kernels::abi::{SCALING_MOST, SCALING_PATIENCE};

macro_rules! device {
    ($real:ty $(, $generic:ident: $bound:ident)?) => {
        impl$(<$generic: $bound>)? Device for Cpu<$real> {
            type Real = $real;
            type Buf = Vec<$real>;

            fn kind(&self) -> &'static str {
                "cpu"
            }
            fn alloc(&self, len: usize) -> Vec<$real> {
                vec![<$real>::ZERO; len]
            }
            fn len(&self, buf: &Vec<$real>) -> usize {
                buf.len()
            }
            fn upload(&self, from: &[f32], to: ViewMut<'_, Vec<$real>>) {
                for (t, &f) in to.buf[to.at].iter_mut().zip(from) {
                    *t = <$real>::from_f64(f64::from(f));
                }
            }
            fn download(&self, from: View<'_, Vec<$real>>, to: &mut [f32]) {
                for (t, &f) in to.iter_mut().zip(&from.buf[from.at]) {
                    *t = f.to_f64() as f32;
                }
            }
            fn gemm(
                &self,
                shape: Gemm,
                a: View<'_, Vec<$real>>,
                b: View<'_, Vec<$real>>,
                c: Write<ViewMut<'_, Vec<$real>>>,
            ) {
                let mut packed = self.take_packed();
                gemm::gemm(self.isa, shape, read(&a), read(&b), c.map(write), &mut packed);
                self.give_packed(packed);
            }

            fn finish(&self) -> Result<(), DeviceError> {
                Ok(())
            }
            fn copy(&self, from: View<'_, Vec<$real>>, to: ViewMut<'_, Vec<$real>>) {
                write(to).copy_from_slice(read(&from));
            }
            fn fill(&self, value: f64, to: ViewMut<'_, Vec<$real>>) {
                write(to).fill(<$real>::from_f64(value));
            }
            fn bias_activation(
                &self,
                shape: [usize; 3],
                activation: Activation,
                bias: Option<View<'_, Vec<$real>>>,
                pre: ViewMut<'_, Vec<$real>>,
                out: Option<ViewMut<'_, Vec<$real>>>,
            ) {
                let bias = bias.as_ref().map(read);
                layers::bias_activation(self.isa, shape, activation, bias, write(pre), out.map(write));
            }
            fn bias_activation_backward(
                &self,
                shape: [usize; 3],
                activation: Activation,
                saved: View<'_, Vec<$real>>,
                d: ViewMut<'_, Vec<$real>>,
                d_bias: Option<Write<ViewMut<'_, Vec<$real>>>>,
            ) {
                let (saved, d_bias) = (read(&saved), d_bias.map(|d| d.map(write)));
                layers::bias_activation_backward(self.isa, shape, activation, saved, write(d), d_bias);
            }
            fn conv_scratch(&self, conv: &Conv, rows: usize) -> usize {
                conv::scratch(conv, rows)
            }
            fn conv(
                &self,
                conv: &Conv,
                rows: usize,
                x: View<'_, Vec<$real>>,
                weight: View<'_, Vec<$real>>,
                out: ViewMut<'_, Vec<$real>>,
                scratch: &mut Vec<$real>,
            ) {
                conv::conv(self.isa, conv, rows, read(&x), read(&weight), write(out), scratch);
            }
            fn conv_backward_data(
                &self,
                conv: &Conv,
                rows: usize,
                weight: View<'_, Vec<$real>>,
                d_out: View<'_, Vec<$real>>,
                dx: ViewMut<'_, Vec<$real>>,
                scratch: &mut Vec<$real>,
            ) {
                conv::backward_data(self.isa, conv, rows, read(&weight), read(&d_out), write(dx), scratch);
            }
            fn conv_backward_weight(
                &self,
                conv: &Conv,
                rows: usize,
                x: View<'_, Vec<$real>>,
                d_out: View<'_, Vec<$real>>,
                d_weight: Write<ViewMut<'_, Vec<$real>>>,
                scratch: &mut Vec<$real>,
            ) {
                conv::backward_weight(self.isa, conv, rows, read(&x), read(&d_out), d_weight.map(write), scratch);
            }
            fn pool(&self, pooling: &Pooling, rows: usize, x: View<'_, Vec<$real>>, out: ViewMut<'_, Vec<$real>>) {
                layers::pool(pooling, rows, read(&x), write(out));
            }
            fn pool_backward(
                &self,
                pooling: &Pooling,
                rows: usize,
                x: View<'_, Vec<$real>>,
                d_out: View<'_, Vec<$real>>,
                dx: ViewMut<'_, Vec<$real>>,
            ) {
                layers::pool_backward(pooling, rows, read(&x), read(&d_out), write(dx));
            }
            fn conv_pool_work(&self, c: &ConvPool, rows: usize) -> [usize; 4] {
                [conv::kept(c, rows), 0, 0, conv::scratch(&c.conv, rows)]
            }
            fn conv_pool(
                &self,
                c: &ConvPool,
                rows: usize,
                x: View<'_, Vec<$real>>,
                params: View<'_, Vec<$real>>,
                out: ViewMut<'_, Vec<$real>>,
                [kept, _, _, scratch]: &mut [Vec<$real>; 4],
            ) {
                conv::forward(self.isa, c, rows, read(&x), read(&params), kept, write(out), scratch);
            }
            fn conv_pool_backward(
                &self,
                c: &ConvPool,
                rows: usize,
                x: View<'_, Vec<$real>>,
                params: View<'_, Vec<$real>>,
                d_out: View<'_, Vec<$real>>,
                dx: Option<ViewMut<'_, Vec<$real>>>,
                d_params: ViewMut<'_, Vec<$real>>,
                [kept, _, _, scratch]: &mut [Vec<$real>; 4],
            ) {
                let saved = conv::Saved { x: read(&x), params: read(&params), kept, d_out: read(&d_out) };
                conv::backward(self.isa, c, rows, saved, dx.map(write), write(d_params), scratch);
            }
            fn layer_norm(
                &self,
                norm: &Norm,
                rows: usize,
                x: View<'_, Vec<$real>>,
                affine: View<'_, Vec<$real>>,
                out: ViewMut<'_, Vec<$real>>,
                stats: ViewMut<'_, Vec<$real>>,
            ) {
                norm::layer_norm(self.isa, norm, rows, read(&x), read(&affine), write(out), write(stats));
            }
            fn layer_norm_backward(
                &self,
                norm: &Norm,
                rows: usize,
                x: View<'_, Vec<$real>>,
                affine: View<'_, Vec<$real>>,
                stats: View<'_, Vec<$real>>,
                d_out: View<'_, Vec<$real>>,
                dx: Write<ViewMut<'_, Vec<$real>>>,
                d_affine: Write<ViewMut<'_, Vec<$real>>>,
            ) {
                let saved = norm::Saved { x: read(&x), affine: read(&affine), stats: read(&stats) };
                let (d_out, d_affine) = (read(&d_out), d_affine.map(write));
                norm::layer_norm_backward(self.isa, norm, rows, saved, d_out, dx.map(write), d_affine);
            }
            fn attention(
                &self,
                attention: &Attention,
                rows: usize,
                qkv: View<'_, Vec<$real>>,
                out: ViewMut<'_, Vec<$real>>,
                lse: ViewMut<'_, Vec<$real>>,
            ) {
                let mut packed = self.take_packed();
                attention::attention(self.isa, attention, rows, read(&qkv), write(out), write(lse), &mut packed);
                self.give_packed(packed);
            }
            fn attention_backward(
                &self,
                attention: &Attention,
                rows: usize,
                qkv: View<'_, Vec<$real>>,
                _: View<'_, Vec<$real>>,
                lse: View<'_, Vec<$real>>,
                d_out: View<'_, Vec<$real>>,
                d_qkv: ViewMut<'_, Vec<$real>>,
                _: ViewMut<'_, Vec<$real>>,
            ) {
                let mut packed = self.take_packed();
                let saved = attention::Saved { qkv: read(&qkv), lse: read(&lse), d_out: read(&d_out) };
                attention::attention_backward(self.isa, attention, rows, saved, write(d_qkv), &mut packed);
                self.give_packed(packed);
            }
            fn adam(
                &self,
                step: &AdamStep,
                now: View<'_, Vec<$real>>,
                factor: View<'_, Vec<$real>>,
                grads: View<'_, Vec<$real>>,
                params: ViewMut<'_, Vec<$real>>,
                m: ViewMut<'_, Vec<$real>>,
                v: ViewMut<'_, Vec<$real>>,
            ) {
                let (now, factor) = (read(&now), read(&factor)[0].to_f64());
                if factor.is_finite() {
                    let now = [now[0].to_f64(), now[1].to_f64(), now[2].to_f64(), factor];
                    layers::adam(self.isa, step, now, read(&grads), write(params), write(m), write(v));
                }
            }
            fn judge(
                &self,
                limit: f64,
                loss: View<'_, Vec<$real>>,
                grads: View<'_, Vec<$real>>,
                scaling: Option<ViewMut<'_, Vec<$real>>>,
                to: ViewMut<'_, Vec<$real>>,
            ) {
                let mut none = [<$real>::ONE, <$real>::ZERO];
                let scaling = scaling.map_or(&mut none[..], write);
                let (scale, good) = (scaling[0].to_f64(), scaling[1].to_f64());
                let squares = layers::sum_squares(read(&grads));
                // Beyond f32 its square has no moment: nothing would be learned after it.
                let norm = if (squares as f32).is_finite() { squares.sqrt() / scale } else { f64::INFINITY };
                let clip = if limit > 0.0 && norm > limit { limit / norm } else { 1.0 };
                let counts = norm.is_finite() && read(&loss)[0].to_f64().is_finite();
                let to = write(to);
                to[0] = <$real>::from_f64(norm);
                to[1] = <$real>::from_f64(if counts { clip / scale } else { f64::NAN });
                let most = f64::from(SCALING_MOST);
                let (scale, good) = match norm.is_finite() {
                    false => ((0.5 * scale).max(most.recip()), 0.0),
                    true if good + 1.0 >= f64::from(SCALING_PATIENCE) => ((2.0 * scale).min(most), 0.0),
                    true => (scale, good + 1.0),
                };
                (scaling[0], scaling[1]) = (<$real>::from_f64(scale), <$real>::from_f64(good));
            }
            fn gather(
                &self,
                width: usize,
                from: View<'_, Vec<$real>>,
                index: View<'_, Vec<$real>>,
                to: ViewMut<'_, Vec<$real>>,
            ) {
                let from = read(&from);
                for (to, row) in write(to).chunks_mut(width).zip(read(&index)) {
                    to.copy_from_slice(&from[row.to_f64() as usize * width..][..width]);
                }
            }
            fn scatter(
                &self,
                width: usize,
                from: View<'_, Vec<$real>>,
                index: View<'_, Vec<$real>>,
                to: ViewMut<'_, Vec<$real>>,
            ) {
                let to = write(to);
                for (from, row) in read(&from).chunks(width).zip(read(&index)) {
                    to[row.to_f64() as usize * width..][..width].copy_from_slice(from);
                }
            }
            fn scale(&self, factor: View<'_, Vec<$real>>, from: View<'_, Vec<$real>>, to: ViewMut<'_, Vec<$real>>) {
                let factor = read(&factor)[0];
                write(to).iter_mut().zip(read(&from)).for_each(|(to, &from)| *to = factor * from);
            }
            fn clamp(&self, low: f64, high: f64, x: ViewMut<'_, Vec<$real>>) {
                write(x).iter_mut().for_each(|x| *x = <$real>::from_f64(x.to_f64().clamp(low, high)));
            }
        }
    };
}

/// Numbers whose verbs stay generic: f64.
pub trait Wide: Lane {}
impl Wide for f64 {}

device! { f32 }
device! { T, T: Wide }
