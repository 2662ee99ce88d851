//! A text-style transformer on sequences: normalisation before each part of a block, the last token as the result.
//!
//! With `X` `[time, channels]` a sample and a row for every token,
//!
//! ```text
//! H_0     = X W_in' + position                                             [time, width]
//! M_b     = H_b + attention(norm_1(H_b) W_qkv' + b_qkv) W_mix' + b_mix
//! H_{b+1} = M_b + gelu(norm_2(M_b) W_up' + b_up) W_down' + b_down
//! out     = norm(H_depth)[last]                                            [width]
//! ```
//!
//! Forward keeps `H_b`, `M_b`, the queries, keys and values, what attention made of them, the GELU's input, and a few
//! numbers a token. Normalised tokens and the GELU's output are one pass over memory away from these, so backward
//! makes them again, in buffers that all blocks share.

use super::layer::Linear;
use super::{Builder, Init};
use crate::device::{Activation, Attention, Device, Norm, View, ViewMut};
use crate::objective::Write;
use std::ops::Range;

/// How many numbers the GELU sees for each of a token's.
const UP: usize = 4;

/// The shapes, and where the tensors lie.
#[derive(Clone, Debug)]
pub(super) struct Transformer {
    attention: Attention,
    /// `W_in` `[width, channels]`.
    input: Linear,
    /// `[time, width]`: as it were the input's bias, one for every token.
    position: Range<usize>,
    blocks: Vec<Block>,
    /// Gain and bias of the last normalisation `[2, width]`.
    norm: Range<usize>,
}

/// Tensors of a block; normalisations as in [`Transformer`].
#[derive(Clone, Debug)]
struct Block {
    norm_1: Range<usize>,
    /// `W_qkv` `[3 width, width]`: the queries of all heads, then keys, then values.
    qkv: Linear,
    /// `W_mix` `[width, width]`.
    mix: Linear,
    norm_2: Range<usize>,
    /// `W_up` `[4 width, width]`.
    up: Linear,
    /// `W_down` `[width, 4 width]`.
    down: Linear,
}

/// What forward keeps for backward, and what all blocks share; `tokens` = `rows * time`.
#[derive(Debug)]
pub(super) struct Acts<D: Device> {
    blocks: Vec<BlockActs<D>>,
    /// `H_depth` `[tokens, width]`.
    last: D::Buf,
    /// Of the last normalisation `[rows, 2]`.
    stats: D::Buf,
    /// Normalised tokens `[tokens, width]`.
    normed: D::Buf,
    /// The GELU's output `[tokens, 4 width]`.
    active: D::Buf,
    /// dL/dH or dL/dM `[tokens, width]`.
    d_stream: D::Buf,
    /// dL/d normalised tokens, or of what attention made `[tokens, width]`.
    d_branch: D::Buf,
    /// dL/d GELU's input, or in its first three quarters dL/d queries, keys and values `[tokens, 4 width]`.
    d_wide: D::Buf,
    /// Scratch of the attention's backward `[rows, heads, time]`.
    delta: D::Buf,
}

/// What a block's forward keeps.
#[derive(Debug)]
struct BlockActs<D: Device> {
    /// `H_b` `[tokens, width]`.
    input: D::Buf,
    /// Queries, keys and values `[tokens, 3, width]`.
    qkv: D::Buf,
    /// What attention made of them `[tokens, width]`.
    mixed: D::Buf,
    /// Log-sum-exps of its logits `[rows, heads, time]`.
    lse: D::Buf,
    /// `M_b` `[tokens, width]`.
    middle: D::Buf,
    /// The GELU's input `[tokens, 4 width]`.
    pre: D::Buf,
    /// Of both normalisations `[tokens, 2]`.
    stats: [D::Buf; 2],
}

impl Transformer {
    /// Appends the tensors of `depth` blocks, for samples `[time, channels]`.
    pub(super) fn build(builder: &mut Builder<'_>, channels: usize, attention: Attention, depth: usize) -> Self {
        let (time, width) = (attention.time, attention.width());
        // Each of the 2 depth branches adds to the stream: at this share their sum is as large as one of them alone.
        let share = (2.0 * depth as f32).sqrt().recip();
        let weight = builder.tensor("input.weight", &[width, channels], Init::fan_in(channels));
        let input = Linear { inputs: channels, outputs: width, weight, bias: None, activation: Activation::None };
        let position = builder.tensor("position", &[time, width], Init::fan_in(channels));
        let affine = |builder: &mut Builder<'_>, name: String, inputs: usize, outputs: usize, share: f32| {
            let init = Init::Uniform(share * (inputs as f32).sqrt().recip());
            let weight = builder.tensor(&format!("{name}.weight"), &[outputs, inputs], init);
            let bias = Some(builder.tensor(&format!("{name}.bias"), &[outputs], init));
            Linear { inputs, outputs, weight, bias, activation: Activation::None }
        };
        let blocks = (0..depth)
            .map(|b| Block {
                norm_1: norm(builder, &format!("blocks.{b}.norm_1"), width),
                qkv: affine(builder, format!("blocks.{b}.qkv"), width, 3 * width, 1.0),
                mix: affine(builder, format!("blocks.{b}.mix"), width, width, share),
                norm_2: norm(builder, &format!("blocks.{b}.norm_2"), width),
                up: Linear {
                    activation: Activation::Gelu,
                    ..affine(builder, format!("blocks.{b}.up"), width, UP * width, 1.0)
                },
                down: affine(builder, format!("blocks.{b}.down"), UP * width, width, share),
            })
            .collect();
        let norm = norm(builder, "norm", width);
        Transformer { attention, input, position, blocks, norm }
    }

    /// Numbers a sample.
    pub(super) fn input_len(&self) -> usize {
        self.attention.time * self.input.inputs
    }

    /// Multiply-adds of a sample's forward.
    pub(super) fn multiply_adds(&self) -> f64 {
        let (time, width) = (self.attention.time as f64, self.attention.width() as f64);
        let seen = if self.attention.causal { (time + 1.0) / 2.0 } else { time };
        let block = |b: &Block| [&b.qkv, &b.mix, &b.up, &b.down].map(Linear::multiply_adds).iter().sum::<f64>();
        let blocks: f64 = self.blocks.iter().map(|b| block(b) + 2.0 * seen * width).sum();
        time * (self.input.multiply_adds() + blocks)
    }

    /// Numbers of the last token.
    pub(super) fn output_len(&self) -> usize {
        self.attention.width()
    }

    /// Buffers for up to `rows` samples.
    pub(super) fn acts<D: Device>(&self, device: &D, rows: usize) -> Acts<D> {
        let tokens = rows * self.attention.time;
        let (logits, stream) = (tokens * self.attention.heads, tokens * self.attention.width());
        let block = |_: &Block| BlockActs {
            input: device.alloc(stream),
            qkv: device.alloc(3 * stream),
            mixed: device.alloc(stream),
            lse: device.alloc(logits),
            middle: device.alloc(stream),
            pre: device.alloc(UP * stream),
            stats: [device.alloc(2 * tokens), device.alloc(2 * tokens)],
        };
        Acts {
            blocks: self.blocks.iter().map(block).collect(),
            last: device.alloc(stream),
            stats: device.alloc(2 * rows),
            normed: device.alloc(stream),
            active: device.alloc(UP * stream),
            d_stream: device.alloc(stream),
            d_branch: device.alloc(stream),
            d_wide: device.alloc(UP * stream),
            delta: device.alloc(logits),
        }
    }

    /// Every token's normalisation.
    fn all(&self) -> Norm {
        Norm { width: self.attention.width(), stride: self.attention.width() }
    }

    /// That of last tokens, and where they lie in a stream of `rows` samples.
    fn last(&self, rows: usize) -> (Norm, Range<usize>) {
        let (time, width) = (self.attention.time, self.attention.width());
        (Norm { width, stride: time * width }, (time - 1) * width..rows * time * width)
    }

    /// `out` `[rows, width]` from `x` `[rows, time, channels]`.
    pub(super) fn forward<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        rows: usize,
        x: View<'_, D::Buf>,
        out: &mut D::Buf,
        acts: &mut Acts<D>,
    ) {
        let (time, width) = (self.attention.time, self.attention.width());
        let tokens = rows * time;
        let stream = tokens * width;
        let view = |at: &Range<usize>| View { buf: params, at: at.clone() };
        let norm = |x: &D::Buf, affine: &Range<usize>, out: &mut D::Buf, stats: &mut D::Buf| {
            let (out, stats) = (ViewMut::first(out, stream), ViewMut::first(stats, 2 * tokens));
            device.layer_norm(&self.all(), tokens, View::first(x, stream), view(affine), out, stats);
        };

        let first = acts.blocks.first_mut().map_or(&mut acts.last, |block| &mut block.input);
        self.input.forward(device, params, tokens, x, None, first);
        let shape = [rows, time * width, 1];
        let position = Some(view(&self.position));
        device.bias_activation(shape, Activation::None, position, ViewMut::first(first, stream), None);
        for (b, block) in self.blocks.iter().enumerate() {
            let (before, after) = acts.blocks.split_at_mut(b + 1);
            let kept = &mut before[b];
            let next = after.first_mut().map_or(&mut acts.last, |block| &mut block.input);
            let [stats_1, stats_2] = &mut kept.stats;

            norm(&kept.input, &block.norm_1, &mut acts.normed, stats_1);
            block.qkv.forward(device, params, tokens, View::first(&acts.normed, stream), None, &mut kept.qkv);
            let (mixed, lse) =
                (ViewMut::first(&mut kept.mixed, stream), ViewMut::first(&mut kept.lse, tokens * self.attention.heads));
            device.attention(&self.attention, rows, View::first(&kept.qkv, 3 * stream), mixed, lse);
            device.copy(View::first(&kept.input, stream), ViewMut::first(&mut kept.middle, stream));
            block.mix.forward_add(device, params, tokens, View::first(&kept.mixed, stream), &mut kept.middle);

            norm(&kept.middle, &block.norm_2, &mut acts.normed, stats_2);
            let normed = View::first(&acts.normed, stream);
            block.up.forward(device, params, tokens, normed, Some(&mut kept.pre), &mut acts.active);
            device.copy(View::first(&kept.middle, stream), ViewMut::first(next, stream));
            block.down.forward_add(device, params, tokens, View::first(&acts.active, UP * stream), next);
        }
        let (last, at) = self.last(rows);
        let x = View { buf: &acts.last, at };
        let (out, stats) = (ViewMut::first(out, rows * width), ViewMut::first(&mut acts.stats, 2 * rows));
        device.layer_norm(&last, rows, x, view(&self.norm), out, stats);
    }

    /// Adds to `grads` from `d_out` `[rows, width]`; `x`, `rows` as in the forward before.
    #[expect(clippy::too_many_arguments, reason = "buffers of several owners, named")]
    pub(super) fn backward<D: Device>(
        &self,
        device: &D,
        params: &D::Buf,
        rows: usize,
        x: View<'_, D::Buf>,
        d_out: View<'_, D::Buf>,
        grads: &mut D::Buf,
        acts: &mut Acts<D>,
    ) {
        let (time, width) = (self.attention.time, self.attention.width());
        let tokens = rows * time;
        let (stream, logits) = (tokens * width, tokens * self.attention.heads);
        let view = |at: &Range<usize>| View { buf: params, at: at.clone() };
        let Acts { blocks, last, stats, normed, active, d_stream, d_branch, d_wide, delta } = acts;

        let (norm, at) = self.last(rows);
        device.fill(0.0, ViewMut::first(d_stream, stream));
        let d_last = Write::Set(ViewMut { buf: d_stream, at: at.clone() });
        let d_norm = Write::Add(ViewMut { buf: &mut *grads, at: self.norm.clone() });
        let (last_token, stats) = (View { buf: last, at }, View::first(stats, 2 * rows));
        device.layer_norm_backward(&norm, rows, last_token, view(&self.norm), stats, d_out, d_last, d_norm);

        let norm = self.all();
        let mut next: &D::Buf = last;
        for (block, kept) in self.blocks.iter().zip(blocks).rev() {
            let [stats_1, stats_2] = &mut kept.stats;
            let again = |x: &D::Buf, affine: &Range<usize>, out: &mut D::Buf, stats: &mut D::Buf| {
                let (out, stats) = (ViewMut::first(out, stream), ViewMut::first(stats, 2 * tokens));
                device.layer_norm(&norm, tokens, View::first(x, stream), view(affine), out, stats);
            };
            let norm_backward = |x: &D::Buf,
                                 affine: &Range<usize>,
                                 stats: &D::Buf,
                                 d: &D::Buf,
                                 d_stream: &mut D::Buf,
                                 grads: &mut D::Buf| {
                let (x, stats, d) = (View::first(x, stream), View::first(stats, 2 * tokens), View::first(d, stream));
                let d_stream = Write::Add(ViewMut::first(d_stream, stream));
                let d_affine = Write::Add(ViewMut { buf: grads, at: affine.clone() });
                device.layer_norm_backward(&norm, tokens, x, view(affine), stats, d, d_stream, d_affine);
            };

            let shape = [tokens, UP * width, 1];
            let pre = ViewMut::first(&mut kept.pre, UP * stream);
            device.bias_activation(shape, Activation::Gelu, None, pre, Some(ViewMut::first(active, UP * stream)));
            let x = View::first(active, UP * stream);
            block.down.backward(device, params, tokens, x, next, d_stream, Some(&mut *d_wide), grads);
            again(&kept.middle, &block.norm_2, normed, stats_2);
            let x = View::first(normed, stream);
            block.up.backward(device, params, tokens, x, &kept.pre, d_wide, Some(&mut *d_branch), grads);
            norm_backward(&kept.middle, &block.norm_2, stats_2, d_branch, d_stream, grads);

            let x = View::first(&kept.mixed, stream);
            block.mix.backward(device, params, tokens, x, &kept.middle, d_stream, Some(&mut *d_branch), grads);
            device.attention_backward(
                &self.attention,
                rows,
                View::first(&kept.qkv, 3 * stream),
                View::first(&kept.mixed, stream),
                View::first(&kept.lse, logits),
                View::first(d_branch, stream),
                ViewMut::first(d_wide, 3 * stream),
                ViewMut::first(delta, logits),
            );
            again(&kept.input, &block.norm_1, normed, stats_1);
            let x = View::first(normed, stream);
            block.qkv.backward(device, params, tokens, x, &kept.qkv, d_wide, Some(&mut *d_branch), grads);
            norm_backward(&kept.input, &block.norm_1, stats_1, d_branch, d_stream, grads);
            next = &kept.input;
        }
        let shape = [rows, time * width, 1];
        let d_position = Write::Add(ViewMut { buf: &mut *grads, at: self.position.clone() });
        let d = ViewMut::first(d_stream, stream);
        device.bias_activation_backward(shape, Activation::None, View::first(next, stream), d, Some(d_position));
        self.input.backward(device, params, tokens, x, next, d_stream, None, grads);
    }
}

/// Appends a normalisation's gain, at 1, and bias, at 0, side by side: `[2, width]`.
fn norm(builder: &mut Builder<'_>, name: &str, width: usize) -> Range<usize> {
    let gain = builder.tensor(&format!("{name}.gain"), &[width], Init::Constant(1.0));
    let bias = builder.tensor(&format!("{name}.bias"), &[width], Init::Constant(0.0));
    gain.start..bias.end
}
