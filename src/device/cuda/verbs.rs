//! The verbs of [`Device`] on a card: a launch or two each. Products are of halves with f32 sums; everything else is f32.
//!
//! Verbs have no result: the first that fails is remembered, those after it do nothing, and [`Device::finish`] or the next
//! loss says what happened.

use super::CudaError;
use super::card::{Arena, Buffer, Card};
use super::contrast::{CardRows, Cuda};
use super::search::Searcher;
use crate::device::{
    Activation, AdamStep, Attention, Contrast, Conv, Device, DeviceError, Embeddings, Gemm, Norm, Pool, Pooling,
    Scalars, Search, View, ViewMut, dense_by_parts,
};
use crate::objective::{Loss, LossError, Precision, Write};
use kernels::abi::{self, Kernel};
use kernels::entries as e;
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, PoisonError};

/// Blocks of a kernel whose threads take elements in turn.
const BLOCKS: usize = 1024;
/// Least summed dimension of a part of a product.
const LEAST_DEPTH: usize = 128;
/// The same for a dense layer, which in one part is one launch with its bias and activation.
const LEAST_DENSE: usize = 512;
/// Blocks of a direct convolution for each multiprocessor, at most.
const DIRECT_BLOCKS: u32 = 20;
/// Rows whose sum is one slot, at least and at most.
const PART: [usize; 2] = [8, 1024];

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
    /// With ReLU or nothing, and with GELU.
    dense: [Kernel<abi::Dense>; 2],
    conv: Kernel<abi::Conv>,
    conv_data: Kernel<abi::Conv>,
    conv_weight: Kernel<abi::Conv>,
}

static BF16: Products = Products {
    gemm: [[e::GEMM_NN_BF16, e::GEMM_NT_BF16], [e::GEMM_TN_BF16, e::GEMM_TT_BF16]],
    dense: [e::DENSE_BF16, e::DENSE_GELU_BF16],
    conv: e::CONV_BF16,
    conv_data: e::CONV_DATA_BF16,
    conv_weight: e::CONV_WEIGHT_BF16,
};
static F16: Products = Products {
    gemm: [[e::GEMM_NN_F16, e::GEMM_NT_F16], [e::GEMM_TN_F16, e::GEMM_TT_F16]],
    dense: [e::DENSE_F16, e::DENSE_GELU_F16],
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
/// Where a `Write` of `len` numbers goes, and whether it adds.
fn target<C: Card>(to: Write<ViewMut<'_, Buf<C>>>, len: usize) -> Result<(*mut f32, bool), CudaError> {
    let (view, add) = to.split();
    Ok((as_many_mut(view, len)?, add))
}
/// Kernels count in 32 bits, by as many at a time as a grid has threads.
fn count(n: usize) -> Result<u32, CudaError> {
    let most = u32::MAX - 256 * BLOCKS as u32;
    u32::try_from(n).ok().filter(|&n| n <= most).ok_or(CudaError::Range { start: 0, end: n, len: most as usize })
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
    pub(super) fn fold(
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

    /// A convolution by the first kernel where it fits, else by tiles.
    fn convolve(&self, [direct, tiled]: [&Kernel<abi::Conv>; 2], mut args: abi::Conv) -> Result<(), CudaError> {
        let pixels = count(args.rows as usize * args.geometry.pixels as usize)?;
        if !args.geometry.fits_direct(args.outputs) {
            return self.run(tiled, [args.outputs.div_ceil(abi::TILE), pixels.div_ceil(abi::TILE), 1], &args);
        }
        // A block brings the weights once: of large batches it takes several images.
        args.part = args.rows.div_ceil(DIRECT_BLOCKS * self.card.multiprocessors()).max(1);
        self.run(direct, [args.rows.div_ceil(args.part), 1, 1], &args)
    }

    /// How a sum over rows is cut so that `across` blocks of columns fill the card: rows of a part, and how many parts.
    fn row_parts(&self, across: usize, rows: usize) -> (usize, usize) {
        let part = rows.div_ceil(self.parts(across, rows, PART[0])).clamp(1, PART[1]);
        (part, rows.div_ceil(part))
    }
}

impl<C: Card> Device for Cuda<C> {
    type Real = f32;
    type Buf = Buf<C>;

    fn kind(&self) -> &'static str {
        "cuda"
    }
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
        self.failure().map_err(DeviceError::from)
    }
    fn search(&self) -> Option<Box<dyn Search>> {
        Some(Box::new(Searcher::new(&self.card)))
    }

    fn gemm(&self, shape: Gemm, a: View<'_, Buf<C>>, b: View<'_, Buf<C>>, c: Write<ViewMut<'_, Buf<C>>>) {
        self.attempt(|arena| {
            let Gemm { m, n, k, transpose_a, transpose_b } = shape;
            let (down, across) = (tiles(m), tiles(n));
            let parts = self.parts(down * across, k, LEAST_DEPTH);
            let depth = k.div_ceil(parts).next_multiple_of(32);
            let parts = k.div_ceil(depth).max(1);
            let (out, add) = target(c, m * n)?;
            let slots = if parts > 1 { arena.get("parts", parts * m * n)? } else { out };
            let args = abi::Gemm {
                a: as_many(&a, m * k)?.cast(),
                b: as_many(&b, k * n)?.cast(),
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
            if parts > 1 { self.fold(slots, parts, m * n, (out, add)) } else { Ok(()) }
        });
    }

    /// In one launch where the sum is not cut into parts.
    fn dense(
        &self,
        [rows, inputs, outputs]: [usize; 3],
        activation: Activation,
        x: View<'_, Buf<C>>,
        weight: View<'_, Buf<C>>,
        bias: Option<View<'_, Buf<C>>>,
        pre: Option<ViewMut<'_, Buf<C>>>,
        out: ViewMut<'_, Buf<C>>,
    ) {
        let whole = self.parts(tiles(rows) * tiles(outputs), inputs, LEAST_DENSE) == 1;
        if let Some(bias) = bias.as_ref().filter(|_| whole) {
            return self.attempt(|_| {
                let args = abi::Dense {
                    gemm: abi::Gemm {
                        a: as_many(&x, rows * inputs)?.cast(),
                        b: as_many(&weight, outputs * inputs)?.cast(),
                        c: as_many_mut(out, rows * outputs)?,
                        m: count(rows)?,
                        n: count(outputs)?,
                        k: count(inputs)?,
                        depth: inputs.next_multiple_of(8) as u32,
                        pitch_a: count(inputs)?,
                        pitch_b: count(inputs)?,
                        pitch_c: count(outputs)?,
                        add: 0,
                        part: 0,
                    },
                    bias: as_many(bias, outputs)?,
                    pre: pre.map_or(Ok(null_mut()), |pre| as_many_mut(pre, rows * outputs))?,
                    activation: code(activation),
                    reserved: 0,
                };
                let kernel = &self.products().dense[usize::from(activation == Activation::Gelu)];
                self.run(kernel, [tiles(outputs) as u32, tiles(rows) as u32, 1], &args)
            });
        }
        dense_by_parts(self, [rows, inputs, outputs], activation, x, weight, bias, pre, out);
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
                pre: as_many_mut(pre, len)?,
                bias: bias.map_or(Ok(null()), |b| as_many(&b, channels))?,
                out: out.map_or(Ok(null_mut()), |out| as_many_mut(out, len))?,
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
        mut d_bias: Option<Write<ViewMut<'_, Buf<C>>>>,
    ) {
        self.attempt(|arena| {
            let len = rows * channels * pixels;
            let d = as_many_mut(d, len)?;
            if let Some(d_bias) = d_bias.take_if(|_| activation != Activation::None && pixels == 1) {
                let (part, parts) = self.row_parts(channels.div_ceil(32), rows);
                let slots: *mut f32 = arena.get("parts", parts * channels)?;
                let args = abi::MaskColumns {
                    saved: as_many(&saved, len)?,
                    d,
                    out: slots,
                    rows: count(rows)?,
                    channels: count(channels)?,
                    part: count(part)?,
                    activation: code(activation),
                };
                self.run(&e::MASK_COLUMNS, [channels.div_ceil(32) as u32, parts as u32, 1], &args)?;
                return self.fold(slots, parts, channels, target(d_bias, channels)?);
            }
            if activation != Activation::None {
                let saved = as_many(&saved, len)?;
                let args = abi::ActivateBackward { saved, d, len: count(len)?, activation: code(activation) };
                self.over(&e::ACTIVATE_BACKWARD, len, &args)?;
            }
            let Some(d_bias) = d_bias else { return Ok(()) };
            let across = if pixels == 1 { channels.div_ceil(32) } else { channels };
            let (part, parts) = self.row_parts(across, rows);
            let slots: *mut f32 = arena.get("parts", parts * channels)?;
            if pixels == 1 {
                let args = abi::SumColumns {
                    x: d.cast_const().cast(),
                    out: slots,
                    rows: count(rows)?,
                    dim: count(channels)?,
                    part: count(part)?,
                    scale: 1.0,
                };
                self.run(&e::SUM_COLUMNS_F32, [across as u32, parts as u32, 1], &args)?;
            } else {
                let args = abi::SumChannels {
                    x: d,
                    out: slots,
                    rows: count(rows)?,
                    channels: count(channels)?,
                    pixels: count(pixels)?,
                    part: count(part)?,
                };
                self.run(&e::SUM_CHANNELS, [across as u32, parts as u32, 1], &args)?;
            }
            self.fold(slots, parts, channels, target(d_bias, channels)?)
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
            let args = abi::Conv {
                x: as_many(&x, rows * conv.input_len())?,
                weight: as_many(&weight, conv.outputs * conv.patch())?,
                out: as_many_mut(out, rows * conv.output_len())?,
                rows: count(rows)?,
                outputs: count(conv.outputs)?,
                geometry: geometry(conv)?,
                part: 0,
            };
            self.convolve([&e::CONV_DIRECT, &self.products().conv], args)
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
            let args = abi::Conv {
                x: as_many(&d_out, rows * conv.output_len())?,
                weight: as_many(&weight, conv.outputs * conv.patch())?,
                out: as_many_mut(dx, rows * conv.input_len())?,
                rows: count(rows)?,
                outputs: count(conv.inputs)?,
                geometry,
                part: 0,
            };
            self.convolve([&e::CONV_DATA_DIRECT, &self.products().conv_data], args)
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
            let (geometry, outputs) = (geometry(conv)?, count(conv.outputs)?);
            let direct = geometry.fits_direct_weight(outputs);
            let (down, across) = (tiles(conv.outputs), tiles(conv.patch()));
            // Two blocks of tiles a multiprocessor: each waits for what it gathers.
            let blocks = if direct { self.parts(1, rows, 1) } else { 2 * self.parts(down * across, rows, 1) };
            let part = rows.div_ceil(blocks);
            let parts = rows.div_ceil(part.max(1)).max(1);
            let len = conv.outputs * conv.patch();
            let slots: *mut f32 = arena.get("parts", parts * len)?;
            let args = abi::Conv {
                x: as_many(&x, rows * conv.input_len())?,
                weight: as_many(&d_out, rows * conv.output_len())?,
                out: slots,
                rows: count(rows)?,
                outputs,
                geometry,
                part: count(part)?,
            };
            if direct {
                self.run(&e::CONV_WEIGHT_DIRECT, [parts as u32, 1, 1], &args)?;
            } else {
                self.run(&self.products().conv_weight, [across as u32, down as u32, parts as u32], &args)?;
            }
            self.fold(slots, parts, len, target(d_weight, len)?)
        });
    }

    fn pool(&self, pooling: &Pooling, rows: usize, x: View<'_, Buf<C>>, out: ViewMut<'_, Buf<C>>) {
        self.attempt(|_| {
            let x = as_many(&x, rows * pooling.input_len())?;
            let args = windows(pooling, rows, x, as_many_mut(out, rows * pooling.output_len())?, null_mut())?;
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
            let len = rows * pooling.input_len();
            let dx = as_many_mut(dx, len)?;
            // What no window reads.
            if !pooling.height.is_multiple_of(pooling.size) || !pooling.width.is_multiple_of(pooling.size) {
                self.over(&e::FILL, len, &abi::Fill { out: dx, len: count(len)?, value: 0.0 })?;
            }
            let d_out = as_many(&d_out, rows * pooling.output_len())?;
            let args = windows(pooling, rows, as_many(&x, len)?, d_out.cast_mut(), dx)?;
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
                x: as_many(&x, norm.input_len(rows))?,
                affine: as_many(&affine, 2 * norm.width)?,
                out: as_many_mut(out, rows * norm.width)?,
                stats: as_many_mut(stats, 2 * rows)?,
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
            let (part, parts) = self.row_parts(norm.width.div_ceil(32), rows);
            let slots: *mut f32 = arena.get("parts", parts * 2 * norm.width)?;
            let (dx, add) = target(dx, norm.input_len(rows))?;
            let args = abi::LayerNormBackward {
                x: as_many(&x, norm.input_len(rows))?,
                affine: as_many(&affine, 2 * norm.width)?,
                stats: as_many(&stats, 2 * rows)?,
                d_out: as_many(&d_out, rows * norm.width)?,
                dx,
                d_affine: slots,
                rows: count(rows)?,
                width: count(norm.width)?,
                stride: count(norm.stride)?,
                part: count(part)?,
                add: u32::from(add),
                reserved: 0,
            };
            self.run(&e::LAYER_NORM_BACKWARD, [rows.div_ceil(8) as u32, 1, 1], &args)?;
            self.run(&e::LAYER_NORM_AFFINE, [norm.width.div_ceil(32) as u32, parts as u32, 1], &args)?;
            self.fold(slots, parts, 2 * norm.width, target(d_affine, 2 * norm.width)?)
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
            let [stream, logits] = lengths(attention, rows);
            let (out, lse) = (as_many_mut(out, stream)?, as_many_mut(lse, logits)?);
            let args = abi::Attend { out, lse, ..attend(attention, as_many(&qkv, 3 * stream)?)? };
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
            let [stream, logits] = lengths(attention, rows);
            let args = abi::Attend {
                // Backward only reads these two.
                out: as_many(&out, stream)?.cast_mut(),
                lse: as_many(&lse, logits)?.cast_mut(),
                d_out: as_many(&d_out, stream)?,
                d_qkv: as_many_mut(d_qkv, 3 * stream)?,
                delta: as_many_mut(delta, logits)?,
                ..attend(attention, as_many(&qkv, 3 * stream)?)?
            };
            self.run(&e::ATTENTION_QUERIES, heads(attention, rows), &args)?;
            self.run(&e::ATTENTION_KEYS, heads(attention, rows), &args)
        });
    }

    fn adam(
        &self,
        step: &AdamStep,
        now: View<'_, Buf<C>>,
        factor: View<'_, Buf<C>>,
        grads: View<'_, Buf<C>>,
        params: ViewMut<'_, Buf<C>>,
        m: ViewMut<'_, Buf<C>>,
        v: ViewMut<'_, Buf<C>>,
    ) {
        self.attempt(|_| {
            let len = params.at.len();
            let args = abi::Adam {
                grads: as_many(&grads, len)?,
                params: write(params)?,
                m: as_many_mut(m, len)?,
                v: as_many_mut(v, len)?,
                now: as_many(&now, 3)?,
                factor: as_many(&factor, 1)?,
                len: count(len)?,
                beta1: step.beta1 as f32,
                beta2: step.beta2 as f32,
                eps: step.eps as f32,
                decay: step.decay as f32,
                reserved: 0,
            };
            self.over(&e::ADAM, len, &args)
        });
    }
    fn judge(
        &self,
        limit: f64,
        loss: View<'_, Buf<C>>,
        grads: View<'_, Buf<C>>,
        scaling: Option<ViewMut<'_, Buf<C>>>,
        to: ViewMut<'_, Buf<C>>,
    ) {
        self.attempt(|arena| {
            let len = grads.at.len();
            let squares: *mut f64 = arena.get("squares", BLOCKS)?;
            let args = abi::Squares { x: read(&grads)?, out: squares, len: count(len)?, reserved: 0 };
            self.over(&e::SQUARES, len, &args)?;
            let args = abi::Judge {
                squares,
                loss: as_many(&loss, 1)?,
                scaling: scaling.map_or(Ok(null_mut()), |s| as_many_mut(s, 2))?,
                out: as_many_mut(to, 2)?,
                parts: len.div_ceil(256).min(BLOCKS) as u32,
                limit: limit as f32,
            };
            self.run(&e::JUDGE, [1, 1, 1], &args)
        });
    }
    fn gather(&self, width: usize, from: View<'_, Buf<C>>, index: View<'_, Buf<C>>, to: ViewMut<'_, Buf<C>>) {
        self.attempt(|_| {
            let (rows, chosen) = (from.at.len() / width.max(1), index.at.len());
            let args = abi::Choose {
                from: read(&from)?,
                to: as_many_mut(to, chosen * width)?,
                ..choose(&index, width, rows)?
            };
            self.over(&e::GATHER, chosen * width, &args)
        });
    }
    fn scatter(&self, width: usize, from: View<'_, Buf<C>>, index: View<'_, Buf<C>>, to: ViewMut<'_, Buf<C>>) {
        self.attempt(|_| {
            let (rows, chosen) = (to.at.len() / width.max(1), index.at.len());
            let args =
                abi::Choose { from: as_many(&from, chosen * width)?, to: write(to)?, ..choose(&index, width, rows)? };
            self.over(&e::SCATTER, chosen * width, &args)
        });
    }
    fn scale(&self, factor: View<'_, Buf<C>>, from: View<'_, Buf<C>>, to: ViewMut<'_, Buf<C>>) {
        self.attempt(|_| {
            let len = from.at.len();
            let args = abi::Scale {
                from: read(&from)?,
                to: as_many_mut(to, len)?,
                factor: as_many(&factor, 1)?,
                len: count(len)?,
                reserved: 0,
            };
            self.over(&e::SCALE, len, &args)
        });
    }
    fn clamp(&self, low: f64, high: f64, x: ViewMut<'_, Buf<C>>) {
        self.attempt(|_| {
            let len = x.at.len();
            let args = abi::Clamp { x: write(x)?, len: count(len)?, low: low as f32, high: high as f32, reserved: 0 };
            self.over(&e::CLAMP, len, &args)
        });
    }
}

/// The address of a view of at least `len` numbers.
fn as_many<C: Card>(view: &View<'_, Buf<C>>, len: usize) -> Result<*const f32, CudaError> {
    if view.at.len() < len {
        return Err(CudaError::Length { part: view.at.len(), other: len });
    }
    read(view)
}
fn as_many_mut<C: Card>(view: ViewMut<'_, Buf<C>>, len: usize) -> Result<*mut f32, CudaError> {
    if view.at.len() < len {
        return Err(CudaError::Length { part: view.at.len(), other: len });
    }
    write(view)
}

fn choose<C: Card>(index: &View<'_, Buf<C>>, width: usize, rows: usize) -> Result<abi::Choose, CudaError> {
    let chosen = index.at.len();
    count(chosen * width)?;
    Ok(abi::Choose {
        from: null(),
        to: null_mut(),
        index: read(index)?,
        count: count(chosen)?,
        width: count(width)?,
        rows: count(rows)?,
        reserved: 0,
    })
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

/// Numbers of what attention makes of `rows` sequences, and of its log-sum-exps.
fn lengths(attention: &Attention, rows: usize) -> [usize; 2] {
    let tokens = rows * attention.time;
    [tokens * attention.width(), tokens * attention.heads]
}

fn heads(attention: &Attention, rows: usize) -> [u32; 3] {
    [attention.time.div_ceil(8) as u32, attention.heads as u32, rows as u32]
}

/// A training step as a card remembers it.
#[derive(Debug, Default)]
pub enum Recorded<C: Card> {
    /// Nothing yet.
    #[default]
    No,
    /// The work was done by itself: kernels are loaded, scratch has grown, ids and shares are there; and its memory then.
    Seen([u64; 2]),
    /// A graph of it, and the memory it names.
    Graph(C::Graph, [u64; 2]),
    /// It cannot be recorded.
    Never,
}

impl<C: Card> Cuda<C> {
    /// Changes when memory that a recorded step names has been given back ([`Card::given_back`]), or has other ids and shares in it,
    /// which are uploaded: no graph has place for that.
    fn memory(&self) -> [u64; 2] {
        [self.card.given_back(), self.repaired]
    }

    /// What a verb before could not say.
    fn failure(&self) -> Result<(), CudaError> {
        self.verbs.lock().unwrap_or_else(PoisonError::into_inner).failed.take().map_or(Ok(()), Err)
    }

    /// Records `work` and runs it once; fails without having done anything where it cannot be recorded.
    fn record(&mut self, work: &mut dyn FnMut(&mut Self) -> Result<(), LossError>) -> Result<Recorded<C>, CudaError> {
        let card = Arc::clone(&self.card);
        let graph = card.capture(|| {
            // A loss that refuses and a verb that fails end the recording alike; done plainly, it says why.
            work(self).map_err(|_| CudaError::Recording { call: "a step" })?;
            self.failure()
        })?;
        Ok(Recorded::Graph(graph, self.memory()))
    }
}

impl<C: Card> Contrast for Cuda<C> {
    const AHEAD: u64 = 64;
    type Recorded = Recorded<C>;

    fn contrast(
        &mut self,
        loss: &Loss,
        embeddings: Embeddings<'_, Buf<C>>,
        gradients: [Write<ViewMut<'_, Buf<C>>>; 2],
        scalars: Scalars<'_, Buf<C>>,
    ) -> Result<(), LossError> {
        self.failure()?;
        let Embeddings { u, v, rows, dim, precision, moments } = embeddings;
        let on_card = |view: &View<'_, Buf<C>>, dim: usize| {
            Ok::<_, CudaError>(CardRows { at: as_many(view, rows * dim)?.cast(), singles: true, rows, dim })
        };
        let out = |to: Write<ViewMut<'_, Buf<C>>>| {
            let (at, add) = target(to, rows * dim)?;
            Ok::<_, CudaError>(Some(if add { Write::Add(at) } else { Write::Set(at) }))
        };
        let [grad_u, grad_v] = gradients;
        let (rows, out) = ([on_card(&u, dim)?, on_card(&v, dim)?], [out(grad_u)?, out(grad_v)?]);
        let features = match moments {
            Some(f) => Some([on_card(&f.u, f.dims[0])?, on_card(&f.v, f.dims[1])?]),
            None => None,
        };
        let one = |view: Option<View<'_, Buf<C>>>| view.map_or(Ok(null()), |v| as_many(&v, 1));
        let scalars = super::contrast::Scalars {
            logit_scale: one(scalars.logit_scale)?,
            bias: one(scalars.bias)?,
            out: as_many_mut(scalars.out, 4)?,
        };
        // SAFETY: parts of buffers of the lengths checked above; outputs are borrowed mutably.
        unsafe { self.learn(loss, precision, rows, features, out, scalars) }
    }

    fn is_narrow(&self) -> bool {
        self.precision == Precision::F16
    }

    fn keep(&self, lens: [usize; 2]) -> Option<[Buf<C>; 2]> {
        let bytes = lens.iter().try_fold(0usize, |sum, len| len.checked_mul(4)?.checked_add(sum))?;
        if bytes > self.card.free_bytes() / 2 {
            return None;
        }
        let [u, v] = lens.map(|len| Buffer::zeroed(&self.card, len).ok());
        Some([u?, v?])
    }

    fn repeat(
        &mut self,
        recorded: &mut Recorded<C>,
        work: &mut dyn FnMut(&mut Self) -> Result<(), LossError>,
    ) -> Result<(), LossError> {
        // With other memory than it was seen with, the work is done by itself once more.
        if let Recorded::Seen(memory) | Recorded::Graph(_, memory) = recorded
            && *memory != self.memory()
        {
            *recorded = Recorded::No;
        }
        if let Recorded::Seen(_) = recorded {
            self.failure()?;
            *recorded = self.record(work).unwrap_or_else(|_| {
                // What failed then would have been told twice.
                let _ = self.failure();
                Recorded::Never
            });
        }
        match recorded {
            // SAFETY: this card made it, and of the memory it names nothing has been given back since; in it are
            // launches, copies and fills that were right when it was made.
            Recorded::Graph(graph, _) => unsafe { self.card.replay(graph) }.map_err(LossError::from),
            Recorded::Never => work(self),
            Recorded::No | Recorded::Seen(_) => {
                work(self)?;
                *recorded = Recorded::Seen(self.memory());
                Ok(())
            }
        }
    }
}
