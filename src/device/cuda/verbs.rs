//! The verbs of [`Device`] on a card: a launch or two each. Products are of halves with f32 sums; everything else is f32.
//!
//! Verbs have no result: the first that fails is remembered, those after it do nothing, and [`Device::finish`] or the next
//! loss says what happened.

use super::CudaError;
use super::card::{Arena, Buffer, Card};
use super::contrast::{Cuda, Out, Rows};
use crate::device::{
    Activation, AdamStep, Attention, Contrast, Conv, Device, DeviceError, Embeddings, Gemm, Norm, Pool, Pooling, View,
    ViewMut,
};
use crate::objective::{Loss, LossError, Precision, Value, Write};
use kernels::abi::{self, Kernel};
use kernels::entries as e;
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, PoisonError};

/// Blocks of a kernel whose threads take elements in turn.
const BLOCKS: usize = 1024;
/// Rows whose sum is one slot.
const PART: usize = 1024;

/// Scratch of the verbs, and the first failure.
#[derive(Debug)]
pub(super) struct Verbs<C: Card> {
    arena: Arena<C>,
    failed: Option<CudaError>,
}

impl<C: Card> Verbs<C> {
    pub(super) fn new(card: &Arc<C>) -> Mutex<Self> {
        Mutex::new(Verbs { arena: Arena::new(card), failed: None })
    }
    pub(super) fn bytes(&self) -> usize {
        self.arena.bytes()
    }
}

/// The products of one 16-bit type.
struct Products {
    /// By whether A and B are stored transposed.
    gemm: [[Kernel<abi::Gemm>; 2]; 2],
    conv: Kernel<abi::Conv>,
    conv_data: Kernel<abi::Conv>,
    conv_weight: Kernel<abi::Conv>,
}

static BF16: Products = Products {
    gemm: [[e::GEMM_NN_BF16, e::GEMM_NT_BF16], [e::GEMM_TN_BF16, e::GEMM_TT_BF16]],
    conv: e::CONV_BF16,
    conv_data: e::CONV_DATA_BF16,
    conv_weight: e::CONV_WEIGHT_BF16,
};
static F16: Products = Products {
    gemm: [[e::GEMM_NN_F16, e::GEMM_NT_F16], [e::GEMM_TN_F16, e::GEMM_TT_F16]],
    conv: e::CONV_F16,
    conv_data: e::CONV_DATA_F16,
    conv_weight: e::CONV_WEIGHT_F16,
};

type Buf<C> = Buffer<f32, C>;

fn read<C: Card>(view: &View<'_, Buf<C>>) -> Result<*const f32, CudaError> {
    view.buf.ptr(view.at.clone())
}
fn write<C: Card>(view: ViewMut<'_, Buf<C>>) -> Result<*mut f32, CudaError> {
    view.buf.ptr_mut(view.at)
}
/// Where a `Write` goes, and whether it adds.
fn target<C: Card>(to: Write<ViewMut<'_, Buf<C>>>) -> Result<(*mut f32, bool), CudaError> {
    match to {
        Write::Set(view) => Ok((write(view)?, false)),
        Write::Add(view) => Ok((write(view)?, true)),
    }
}
/// Kernels count in 32 bits.
fn count(n: usize) -> Result<u32, CudaError> {
    u32::try_from(n).map_err(|_| CudaError::Range { start: 0, end: n, len: u32::MAX as usize })
}
fn code(activation: Activation) -> u32 {
    match activation {
        Activation::None => 0,
        Activation::Relu => 1,
        Activation::Gelu => 2,
    }
}
fn tiles(n: usize) -> usize {
    n.div_ceil(abi::TILE as usize)
}

impl<C: Card> Cuda<C> {
    fn attempt(&self, verb: impl FnOnce(&mut Arena<C>) -> Result<(), CudaError>) {
        let mut verbs = self.verbs.lock().unwrap_or_else(PoisonError::into_inner);
        if verbs.failed.is_none() {
            verbs.failed = verb(&mut verbs.arena).err();
        }
    }

    fn products(&self) -> &'static Products {
        if self.precision == Precision::F16 { &F16 } else { &BF16 }
    }

    /// A launch over elements in turn.
    fn over<A: abi::Args>(&self, kernel: &Kernel<A>, len: usize, args: &A) -> Result<(), CudaError> {
        if len == 0 {
            return Ok(());
        }
        self.run(kernel, [len.div_ceil(256).min(BLOCKS) as u32, 1, 1], args)
    }

    /// Adds slots up where they go.
    fn sum_slots(
        &self,
        parts: *const f32,
        slots: usize,
        len: usize,
        (out, add): (*mut f32, bool),
    ) -> Result<(), CudaError> {
        let args = abi::Fold {
            parts,
            out,
            stride: len as u64,
            len: count(len)?,
            slots: slots as u32,
            add: u32::from(add),
            reserved: 0,
        };
        self.run(&e::FOLD, [len.div_ceil(256) as u32, 1, 1], &args)
    }

    /// How a sum over `depth` is cut so that `tiles` tiles fill the card: how many parts, at least `least` long each.
    fn parts(&self, tiles: usize, depth: usize, least: usize) -> usize {
        let wanted = (self.card.multiprocessors() as usize).div_ceil(tiles.max(1));
        wanted.min(depth / least).max(1)
    }
}

impl<C: Card> Device for Cuda<C> {
    type Real = f32;
    type Buf = Buf<C>;

    fn alloc(&self, len: usize) -> Buf<C> {
        let mut made = None;
        self.attempt(|_| {
            made = Some(Buffer::zeroed(&self.card, len)?);
            Ok(())
        });
        made.unwrap_or_else(|| Buffer::none(&self.card))
    }
    fn len(&self, buf: &Buf<C>) -> usize {
        buf.len()
    }
    fn upload(&self, from: &[f32], to: ViewMut<'_, Buf<C>>) {
        self.attempt(|_| to.buf.upload(to.at, from));
    }
    fn download(&self, from: View<'_, Buf<C>>, to: &mut [f32]) {
        self.attempt(|_| from.buf.download(from.at, to));
    }
    fn copy(&self, from: View<'_, Buf<C>>, to: ViewMut<'_, Buf<C>>) {
        self.attempt(|_| to.buf.copy(to.at, from.buf, from.at));
    }
    fn fill(&self, value: f64, to: ViewMut<'_, Buf<C>>) {
        self.attempt(|_| {
            let len = to.at.len();
            self.over(&e::FILL, len, &abi::Fill { out: write(to)?, len: count(len)?, value: value as f32 })
        });
    }
    fn finish(&self) -> Result<(), DeviceError> {
        self.attempt(|_| self.card.synchronise());
        let failed = self.verbs.lock().unwrap_or_else(PoisonError::into_inner).failed.take();
        failed.map_or(Ok(()), |e| Err(e.into()))
    }

    fn gemm(&self, shape: Gemm, a: View<'_, Buf<C>>, b: View<'_, Buf<C>>, c: Write<ViewMut<'_, Buf<C>>>) {
        self.attempt(|arena| {
            let Gemm { m, n, k, transpose_a, transpose_b } = shape;
            let (down, across) = (tiles(m), tiles(n));
            let parts = self.parts(down * across, k, 512);
            let depth = k.div_ceil(parts).next_multiple_of(32);
            let parts = k.div_ceil(depth).max(1);
            let (out, add) = target(c)?;
            let slots = if parts > 1 { arena.get("parts", parts * m * n)? } else { out };
            let args = abi::Gemm {
                a: read(&a)?.cast(),
                b: read(&b)?.cast(),
                c: slots,
                m: count(m)?,
                n: count(n)?,
                k: count(k)?,
                depth: depth as u32,
                pitch_a: count(if transpose_a { m } else { k })?,
                pitch_b: count(if transpose_b { k } else { n })?,
                pitch_c: count(n)?,
                add: u32::from(add && parts == 1),
                part: (m * n) as u64,
            };
            let kernel = &self.products().gemm[usize::from(transpose_a)][usize::from(transpose_b)];
            self.run(kernel, [across as u32, down as u32, parts as u32], &args)?;
            if parts > 1 { self.sum_slots(slots, parts, m * n, (out, add)) } else { Ok(()) }
        });
    }

    fn bias_activation(
        &self,
        [rows, channels, pixels]: [usize; 3],
        activation: Activation,
        bias: Option<View<'_, Buf<C>>>,
        pre: ViewMut<'_, Buf<C>>,
        out: Option<ViewMut<'_, Buf<C>>>,
    ) {
        self.attempt(|_| {
            let len = rows * channels * pixels;
            let args = abi::Activate {
                pre: write(pre)?,
                bias: bias.map_or(Ok(null()), |b| read(&b))?,
                out: out.map_or(Ok(null_mut()), write)?,
                len: count(len)?,
                channels: count(channels)?,
                pixels: count(pixels)?,
                activation: code(activation),
            };
            self.over(&e::ACTIVATE, len, &args)
        });
    }
    fn bias_activation_backward(
        &self,
        [rows, channels, pixels]: [usize; 3],
        activation: Activation,
        saved: View<'_, Buf<C>>,
        d: ViewMut<'_, Buf<C>>,
        d_bias: Option<Write<ViewMut<'_, Buf<C>>>>,
    ) {
        self.attempt(|arena| {
            let len = rows * channels * pixels;
            let d = write(d)?;
            if activation != Activation::None {
                let args =
                    abi::ActivateBackward { saved: read(&saved)?, d, len: count(len)?, activation: code(activation) };
                self.over(&e::ACTIVATE_BACKWARD, len, &args)?;
            }
            let Some(d_bias) = d_bias else { return Ok(()) };
            let parts = rows.div_ceil(PART);
            let slots: *mut f32 = arena.get("parts", parts * channels)?;
            if pixels == 1 {
                let args = abi::SumColumns {
                    x: d.cast_const().cast(),
                    out: slots,
                    rows: count(rows)?,
                    dim: count(channels)?,
                    part: PART as u32,
                    scale: 1.0,
                };
                self.run(&e::SUM_COLUMNS_F32, [channels.div_ceil(32) as u32, parts as u32, 1], &args)?;
            } else {
                let args = abi::SumChannels {
                    x: d,
                    out: slots,
                    rows: count(rows)?,
                    channels: count(channels)?,
                    pixels: count(pixels)?,
                    part: PART as u32,
                };
                self.run(&e::SUM_CHANNELS, [channels as u32, parts as u32, 1], &args)?;
            }
            self.sum_slots(slots, parts, channels, target(d_bias)?)
        });
    }

    /// None: operands are gathered on their way to the product.
    fn conv_scratch(&self, _: &Conv, _: usize) -> usize {
        0
    }
    fn conv(
        &self,
        conv: &Conv,
        rows: usize,
        x: View<'_, Buf<C>>,
        weight: View<'_, Buf<C>>,
        out: ViewMut<'_, Buf<C>>,
        _: &mut Buf<C>,
    ) {
        self.attempt(|_| {
            let geometry = geometry(conv)?;
            let grid = [tiles(conv.outputs) as u32, tiles(rows * geometry.pixels as usize) as u32, 1];
            let args = abi::Conv {
                x: read(&x)?,
                weight: read(&weight)?,
                out: write(out)?,
                rows: count(rows)?,
                outputs: count(conv.outputs)?,
                geometry,
                part: 0,
            };
            count(rows * geometry.pixels as usize)?;
            self.run(&self.products().conv, grid, &args)
        });
    }
    fn conv_backward_data(
        &self,
        conv: &Conv,
        rows: usize,
        weight: View<'_, Buf<C>>,
        d_out: View<'_, Buf<C>>,
        dx: ViewMut<'_, Buf<C>>,
        _: &mut Buf<C>,
    ) {
        self.attempt(|_| {
            // The output read back through the kernel turned round.
            let Some(padding) = (conv.kernel - 1).checked_sub(conv.padding) else {
                return Err(CudaError::Shape("a convolution padded by less than its kernel"));
            };
            let geometry = abi::Geometry {
                channels: count(conv.outputs)?,
                height: count(conv.out_height())?,
                width: count(conv.out_width())?,
                kernel: count(conv.kernel)?,
                padding: count(padding)?,
                pixels: count(conv.height * conv.width)?,
                width_out: count(conv.width)?,
            };
            count(rows * geometry.pixels as usize)?;
            let grid = [tiles(conv.inputs) as u32, tiles(rows * geometry.pixels as usize) as u32, 1];
            let args = abi::Conv {
                x: read(&d_out)?,
                weight: read(&weight)?,
                out: write(dx)?,
                rows: count(rows)?,
                outputs: count(conv.inputs)?,
                geometry,
                part: 0,
            };
            self.run(&self.products().conv_data, grid, &args)
        });
    }
    fn conv_backward_weight(
        &self,
        conv: &Conv,
        rows: usize,
        x: View<'_, Buf<C>>,
        d_out: View<'_, Buf<C>>,
        d_weight: Write<ViewMut<'_, Buf<C>>>,
        _: &mut Buf<C>,
    ) {
        self.attempt(|arena| {
            let (down, across) = (tiles(conv.outputs), tiles(conv.patch()));
            let part = rows.div_ceil(self.parts(down * across, rows, 1));
            let parts = rows.div_ceil(part.max(1)).max(1);
            let len = conv.outputs * conv.patch();
            let slots: *mut f32 = arena.get("parts", parts * len)?;
            let args = abi::Conv {
                x: read(&x)?,
                weight: read(&d_out)?,
                out: slots,
                rows: count(rows)?,
                outputs: count(conv.outputs)?,
                geometry: geometry(conv)?,
                part: count(part)?,
            };
            self.run(&self.products().conv_weight, [across as u32, down as u32, parts as u32], &args)?;
            self.sum_slots(slots, parts, len, target(d_weight)?)
        });
    }

    fn pool(&self, pooling: &Pooling, rows: usize, x: View<'_, Buf<C>>, out: ViewMut<'_, Buf<C>>) {
        self.attempt(|_| {
            let args = windows(pooling, rows, read(&x)?, write(out)?, null_mut())?;
            self.over(&e::POOL, rows * pooling.output_len(), &args)
        });
    }
    fn pool_backward(
        &self,
        pooling: &Pooling,
        rows: usize,
        x: View<'_, Buf<C>>,
        d_out: View<'_, Buf<C>>,
        dx: ViewMut<'_, Buf<C>>,
    ) {
        self.attempt(|_| {
            let (dx, len) = (write(dx)?, rows * pooling.input_len());
            // What no window reads.
            if !pooling.height.is_multiple_of(pooling.size) || !pooling.width.is_multiple_of(pooling.size) {
                self.over(&e::FILL, len, &abi::Fill { out: dx, len: count(len)?, value: 0.0 })?;
            }
            let args = windows(pooling, rows, read(&x)?, read(&d_out)?.cast_mut(), dx)?;
            self.over(&e::POOL_BACKWARD, rows * pooling.output_len(), &args)
        });
    }

    fn layer_norm(
        &self,
        norm: &Norm,
        rows: usize,
        x: View<'_, Buf<C>>,
        affine: View<'_, Buf<C>>,
        out: ViewMut<'_, Buf<C>>,
        stats: ViewMut<'_, Buf<C>>,
    ) {
        self.attempt(|_| {
            let args = abi::LayerNorm {
                x: read(&x)?,
                affine: read(&affine)?,
                out: write(out)?,
                stats: write(stats)?,
                rows: count(rows)?,
                width: count(norm.width)?,
                stride: count(norm.stride)?,
                eps: Norm::EPS as f32,
            };
            self.run(&e::LAYER_NORM, [rows.div_ceil(8) as u32, 1, 1], &args)
        });
    }
    fn layer_norm_backward(
        &self,
        norm: &Norm,
        rows: usize,
        x: View<'_, Buf<C>>,
        affine: View<'_, Buf<C>>,
        stats: View<'_, Buf<C>>,
        d_out: View<'_, Buf<C>>,
        dx: Write<ViewMut<'_, Buf<C>>>,
        d_affine: Write<ViewMut<'_, Buf<C>>>,
    ) {
        self.attempt(|arena| {
            let parts = rows.div_ceil(PART);
            let slots: *mut f32 = arena.get("parts", parts * 2 * norm.width)?;
            let (dx, add) = target(dx)?;
            let args = abi::LayerNormBackward {
                x: read(&x)?,
                affine: read(&affine)?,
                stats: read(&stats)?,
                d_out: read(&d_out)?,
                dx,
                d_affine: slots,
                rows: count(rows)?,
                width: count(norm.width)?,
                stride: count(norm.stride)?,
                part: PART as u32,
                add: u32::from(add),
                reserved: 0,
            };
            self.run(&e::LAYER_NORM_BACKWARD, [rows.div_ceil(8) as u32, 1, 1], &args)?;
            self.run(&e::LAYER_NORM_AFFINE, [norm.width.div_ceil(32) as u32, parts as u32, 1], &args)?;
            self.sum_slots(slots, parts, 2 * norm.width, target(d_affine)?)
        });
    }

    fn attention(
        &self,
        attention: &Attention,
        rows: usize,
        qkv: View<'_, Buf<C>>,
        out: ViewMut<'_, Buf<C>>,
        lse: ViewMut<'_, Buf<C>>,
    ) {
        self.attempt(|_| {
            let args = abi::Attend { out: write(out)?, lse: write(lse)?, ..attend(attention, read(&qkv)?)? };
            self.run(&e::ATTENTION, heads(attention, rows), &args)
        });
    }
    fn attention_backward(
        &self,
        attention: &Attention,
        rows: usize,
        qkv: View<'_, Buf<C>>,
        out: View<'_, Buf<C>>,
        lse: View<'_, Buf<C>>,
        d_out: View<'_, Buf<C>>,
        d_qkv: ViewMut<'_, Buf<C>>,
        delta: ViewMut<'_, Buf<C>>,
    ) {
        self.attempt(|_| {
            let args = abi::Attend {
                // Backward only reads these two.
                out: read(&out)?.cast_mut(),
                lse: read(&lse)?.cast_mut(),
                d_out: read(&d_out)?,
                d_qkv: write(d_qkv)?,
                delta: write(delta)?,
                ..attend(attention, read(&qkv)?)?
            };
            self.run(&e::ATTENTION_QUERIES, heads(attention, rows), &args)?;
            self.run(&e::ATTENTION_KEYS, heads(attention, rows), &args)
        });
    }

    fn adam(
        &self,
        step: &AdamStep,
        grads: View<'_, Buf<C>>,
        params: ViewMut<'_, Buf<C>>,
        m: ViewMut<'_, Buf<C>>,
        v: ViewMut<'_, Buf<C>>,
    ) {
        self.attempt(|_| {
            let len = params.at.len();
            let args = abi::Adam {
                grads: read(&grads)?,
                params: write(params)?,
                m: write(m)?,
                v: write(v)?,
                len: count(len)?,
                lr: step.lr as f32,
                beta1: step.beta1 as f32,
                beta2: step.beta2 as f32,
                eps: step.eps as f32,
                decay: step.decay as f32,
                bias1: step.bias[0] as f32,
                bias2: step.bias[1] as f32,
                grad_scale: step.grad_scale as f32,
                reserved: 0,
            };
            self.over(&e::ADAM, len, &args)
        });
    }
    /// NaN after a failure.
    fn sum_squares(&self, x: View<'_, Buf<C>>) -> f64 {
        let mut sum = [f64::NAN];
        self.attempt(|arena| {
            let len = x.at.len();
            if len == 0 {
                sum = [0.0];
                return Ok(());
            }
            let parts = len.div_ceil(256).min(BLOCKS);
            let slots: *mut f64 = arena.get("squares", BLOCKS + 1)?;
            let out = slots.wrapping_add(BLOCKS);
            self.over(&e::SQUARES, len, &abi::Squares { x: read(&x)?, out: slots, len: count(len)?, reserved: 0 })?;
            let args = abi::Totals { singles: null(), doubles: slots, out, n: parts as u32, columns: 1 };
            self.run(&e::TOTALS, [1, 1, 1], &args)?;
            let mut all = vec![0f64; BLOCKS + 1];
            arena.download("squares", &mut all)?;
            sum = [all[BLOCKS]];
            Ok(())
        });
        sum[0]
    }
}

fn geometry(conv: &Conv) -> Result<abi::Geometry, CudaError> {
    Ok(abi::Geometry {
        channels: count(conv.inputs)?,
        height: count(conv.height)?,
        width: count(conv.width)?,
        kernel: count(conv.kernel)?,
        padding: count(conv.padding)?,
        pixels: count(conv.out_height() * conv.out_width())?,
        width_out: count(conv.out_width())?,
    })
}

fn windows(pooling: &Pooling, rows: usize, x: *const f32, y: *mut f32, dx: *mut f32) -> Result<abi::Pool, CudaError> {
    count(rows * pooling.input_len())?;
    Ok(abi::Pool {
        x,
        y,
        dx,
        images: count(rows * pooling.channels)?,
        height: count(pooling.height)?,
        width: count(pooling.width)?,
        size: count(pooling.size)?,
        max: u32::from(pooling.kind == Pool::Max),
        reserved: 0,
    })
}

fn attend(attention: &Attention, qkv: *const f32) -> Result<abi::Attend, CudaError> {
    if attention.head > abi::HEAD_MOST as usize {
        return Err(CudaError::Shape("attention in heads of at most 128 numbers"));
    }
    Ok(abi::Attend {
        qkv,
        out: null_mut(),
        lse: null_mut(),
        d_out: null(),
        d_qkv: null_mut(),
        delta: null_mut(),
        time: count(attention.time)?,
        heads: count(attention.heads)?,
        head: count(attention.head)?,
        causal: u32::from(attention.causal),
        scale: (1.0 / (attention.head as f64).sqrt()) as f32,
        reserved: 0,
    })
}

fn heads(attention: &Attention, rows: usize) -> [u32; 3] {
    [attention.time.div_ceil(8) as u32, attention.heads as u32, rows as u32]
}

impl<C: Card> Contrast for Cuda<C> {
    fn contrast(
        &mut self,
        loss: &Loss,
        embeddings: Embeddings<'_, Buf<C>>,
        gradients: [Write<ViewMut<'_, Buf<C>>>; 2],
    ) -> Result<Value, LossError> {
        // What a verb before could not say. Its work may still be under way: the loss waits for it in any case.
        let failed = self.verbs.lock().unwrap_or_else(PoisonError::into_inner).failed.take();
        if let Some(failed) = failed {
            return Err(failed.into());
        }
        let Embeddings { u, v, rows, dim, precision, moments: _ } = embeddings;
        let on_card =
            |view: &View<'_, Buf<C>>| Ok::<_, CudaError>(Rows { at: read(view)?.cast(), singles: true, rows, dim });
        let out = |to| {
            let (at, add) = target(to)?;
            Ok::<_, CudaError>(if add { Out::Add(at) } else { Out::Set(at) })
        };
        let [grad_u, grad_v] = gradients;
        let (rows, out) = ([on_card(&u)?, on_card(&v)?], [out(grad_u)?, out(grad_v)?]);
        // SAFETY: parts of buffers that their views checked; outputs are borrowed mutably.
        unsafe { self.loss_at(loss, precision, rows, out) }
    }
}
