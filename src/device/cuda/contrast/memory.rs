//! Embeddings and gradients in a card's memory, whoever owns it.

use crate::device::cuda::card::{Buffer, Card};
use crate::device::cuda::{CudaError, Driver};
use crate::objective::{Batch, LossError, Matrix, Moments, Pairs, Precision, Storage, Write};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, SyncOnDrop};
use std::ptr::{without_provenance, without_provenance_mut};
use std::sync::Arc;

/// Rows of embeddings on the card.
#[derive(Clone, Copy, Debug)]
pub struct CardRows {
    /// `[rows, dim]`, f32 or the 16-bit type of the loss.
    pub at: *const (),
    /// Whether they are f32.
    pub singles: bool,
    /// Number of rows.
    pub rows: usize,
    /// Numbers of each.
    pub dim: usize,
}

mod sealed {
    /// Kernels read a buffer as numbers of its `PRECISION`, so no type but those here may say what that is.
    pub trait Sealed: bytemuck::Pod {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// What embeddings on a card may be made of: f32, bf16 and f16.
pub trait Embedding: sealed::Sealed {
    /// The precision they are in; f32 is rounded to the engine's.
    const PRECISION: Precision;
}

impl Embedding for f32 {
    const PRECISION: Precision = Precision::F32;
}
impl Embedding for half::bf16 {
    const PRECISION: Precision = Precision::Bf16;
}
impl Embedding for half::f16 {
    const PRECISION: Precision = Precision::F16;
}

/// Numbers in the memory of a card, whoever owns them: a [`Buffer`] of this crate, `cudarc`'s `CudaSlice` or, with feature
/// `cust`, `cust`'s `DeviceBuffer` of f32.
///
/// # Safety
/// Both addresses are those of [`Self::count`] numbers in the card's memory, aligned as their type is, which live as long as
/// the borrow and which nobody else writes meanwhile (of [`Self::write`]: or reads), the work that the owner gave the card
/// before included, unless it comes before in the card's own queue.
pub unsafe trait OnCard<C: Card> {
    /// What they are.
    type Number: Embedding;
    /// f32 of the same owner: gradients, and what MMD compares.
    type Singles: OnCard<C, Number = f32>;
    /// Dropped once the card has been given all that reads or writes the numbers.
    type Held<'a>
    where
        Self: 'a;

    /// How many there are.
    fn count(&self) -> usize;

    /// Where `card` reads them; null where there are none.
    ///
    /// # Errors
    /// [`CudaError::OtherCard`] where it cannot.
    fn read<'a>(&'a self, card: &'a Arc<C>) -> Result<(*const Self::Number, Self::Held<'a>), CudaError>;

    /// Where `card` writes them; null where there are none.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn write<'a>(&'a mut self, card: &'a Arc<C>) -> Result<(*mut Self::Number, Self::Held<'a>), CudaError>;
}

// SAFETY: `count` numbers of an allocation that lives as long as the buffer, whose own work is in the card's queue.
unsafe impl<T: Embedding, C: Card> OnCard<C> for Buffer<T, C> {
    type Number = T;
    type Singles = Buffer<f32, C>;
    type Held<'a> = ();

    fn count(&self) -> usize {
        self.len()
    }

    fn read<'a>(&'a self, card: &'a Arc<C>) -> Result<(*const T, ()), CudaError> {
        if !Arc::ptr_eq(self.card(), card) {
            return Err(CudaError::OtherCard);
        }
        Ok((self.ptr(..)?, ()))
    }

    fn write<'a>(&'a mut self, card: &'a Arc<C>) -> Result<(*mut T, ()), CudaError> {
        if !Arc::ptr_eq(self.card(), card) {
            return Err(CudaError::OtherCard);
        }
        Ok((self.ptr_mut(..)?, ()))
    }
}

/// On a card of [`Driver::of_cudarc`], whose context they are in; of whichever stream: the card's waits for what wrote them, and
/// they are marked as used by it.
// SAFETY: an address and a length that `cudarc` checked, of memory that lives as long as the slice; the card's stream was told
// to wait for the slice's own events, and what is held records its use of the slice for other streams.
unsafe impl<T: Embedding> OnCard<Driver> for CudaSlice<T> {
    type Number = T;
    type Singles = CudaSlice<f32>;
    type Held<'a> = SyncOnDrop<'a>;

    fn count(&self) -> usize {
        self.len()
    }

    fn read<'a>(&'a self, card: &'a Arc<Driver>) -> Result<(*const T, SyncOnDrop<'a>), CudaError> {
        let (at, held) = self.device_ptr(card.stream_in(self.context())?);
        Ok((without_provenance(at as usize), held))
    }

    fn write<'a>(&'a mut self, card: &'a Arc<Driver>) -> Result<(*mut T, SyncOnDrop<'a>), CudaError> {
        let (at, held) = self.device_ptr_mut(card.stream_in(self.context())?);
        Ok((without_provenance_mut(at as usize), held))
    }
}

/// Of f32 alone: `cust` knows the 16-bit numbers of `half` 1, not of this crate's `half` 2. Halves go by their address,
/// [`super::Cuda::loss_at`].
// SAFETY: an address and a length of one allocation that lives as long as the buffer; `cust`'s safe calls wait until what they
// write is there, and by the promises of its unsafe ones nobody touches a buffer that such a call still uses.
#[cfg(feature = "cust")]
unsafe impl OnCard<Driver> for cust::memory::DeviceBuffer<f32> {
    type Number = f32;
    type Singles = Self;
    type Held<'a> = ();

    fn count(&self) -> usize {
        self.len()
    }

    fn read<'a>(&'a self, card: &'a Arc<Driver>) -> Result<(*const f32, ()), CudaError> {
        let at = self.as_device_ptr().as_raw();
        card.holds(at)?;
        Ok((without_provenance(at as usize), ()))
    }

    fn write<'a>(&'a mut self, card: &'a Arc<Driver>) -> Result<(*mut f32, ()), CudaError> {
        let at = self.as_device_ptr().as_raw();
        card.holds(at)?;
        Ok((without_provenance_mut(at as usize), ()))
    }
}

/// Where a gradient goes on the card, if it is wanted.
pub(super) type Out = Option<Write<*mut f32>>;

/// A batch whose embeddings and features are elsewhere.
pub(super) fn elsewhere<'a>(pairs: Pairs<'a>, rows: [CardRows; 2], features: Option<[CardRows; 2]>) -> Batch<'a> {
    let matrix = |r: CardRows| Matrix { data: Storage::F32(&[]), rows: r.rows, dim: r.dim };
    let [u, v] = rows.map(matrix);
    let moments = features.map(|f| f.map(matrix)).map(|[u, v]| Moments::Features { u, v });
    Batch { u, v, pairs, offset_v: None, moments }
}

/// Refuses addresses of which there could be no loss.
pub(super) fn fit(rows: &[CardRows; 2], features: Option<&[CardRows; 2]>, out: &[Out; 2]) -> Result<(), LossError> {
    let wrong = |what, found: String, expected: String| Err(LossError::Shape { what, found, expected });
    let named = |names: [&'static str; 2], rows: &[CardRows; 2]| names.into_iter().zip(*rows);
    let data = features.into_iter().flat_map(|f| named(["data of u", "data of v"], f));
    for (what, r) in named(["u", "v"], rows).chain(data) {
        if r.rows == 0 || r.dim == 0 || r.rows.max(r.dim) > u32::MAX as usize {
            return wrong(what, format!("[{}, {}]", r.rows, r.dim), "1 to 2^32 - 1 rows and columns".into());
        }
        if r.at.is_null() {
            return wrong(what, "a null address".into(), format!("that of [{}, {}] numbers", r.rows, r.dim));
        }
    }
    for (what, out) in ["gradient of u", "gradient of v"].into_iter().zip(out) {
        if matches!(out, Some(Write::Set(at) | Write::Add(at)) if at.is_null()) {
            return wrong(what, "a null address".into(), "that of as many numbers as the rows have".into());
        }
    }
    if rows[0].dim != rows[1].dim {
        return wrong("columns of v", rows[1].dim.to_string(), rows[0].dim.to_string());
    }
    let Some(features) = features else { return Ok(()) };
    for ((what, f), r) in named(["rows of data of u", "rows of data of v"], features).zip(rows) {
        if f.rows != r.rows {
            return wrong(what, f.rows.to_string(), r.rows.to_string());
        }
        if !f.singles {
            return wrong(what, "halves".into(), "numbers of f32".into());
        }
    }
    Ok(())
}

pub(super) fn wrong_len(what: &'static str, found: usize, expected: String) -> LossError {
    LossError::Shape { what, found: format!("{found} elements"), expected }
}

/// Addresses of a call's embeddings and of their gradients.
pub(super) struct Addresses<'a, B: OnCard<C> + 'a, C: Card> {
    pub(super) rows: [CardRows; 2],
    pub(super) out: [Out; 2],
    _read: [B::Held<'a>; 2],
    _written: [Option<<B::Singles as OnCard<C>>::Held<'a>>; 2],
}

/// Where embeddings on `card` and their gradients are, if they are there and their lengths go together.
pub(super) fn addresses<'a, B: OnCard<C>, C: Card>(
    card: &'a Arc<C>,
    [u, v]: [&'a B; 2],
    dim: usize,
    [grad_u, grad_v]: [Option<Write<&'a mut B::Singles>>; 2],
) -> Result<Addresses<'a, B, C>, LossError> {
    let read = |x: &'a B, what| {
        if dim == 0 || x.count() == 0 || !x.count().is_multiple_of(dim) {
            return Err(wrong_len(what, x.count(), format!("rows of {dim} elements, at least one")));
        }
        let (at, held) = x.read(card)?;
        let singles = B::Number::PRECISION == Precision::F32;
        Ok((CardRows { at: at.cast(), singles, rows: x.count() / dim, dim }, held))
    };
    let write = |to: Option<Write<&'a mut B::Singles>>, x: &B, what| -> Result<_, LossError> {
        let Some((to, add)) = to.map(Write::split) else { return Ok((None, None)) };
        if to.count() != x.count() {
            return Err(wrong_len(what, to.count(), format!("{} elements", x.count())));
        }
        let (at, held) = to.write(card)?;
        Ok((Some(if add { Write::Add(at) } else { Write::Set(at) }), Some(held)))
    };
    let ((u_at, u_held), (v_at, v_held)) = (read(u, "u")?, read(v, "v")?);
    let (to_u, to_u_held) = write(grad_u, u, "gradient of u")?;
    let (to_v, to_v_held) = write(grad_v, v, "gradient of v")?;
    Ok(Addresses { rows: [u_at, v_at], out: [to_u, to_v], _read: [u_held, v_held], _written: [to_u_held, to_v_held] })
}

/// Where what MMD compares is: as many numbers for each of the `rows`.
pub(super) fn features_at<'a, S: OnCard<C, Number = f32>, C: Card>(
    card: &'a Arc<C>,
    features: [&'a S; 2],
    rows: [CardRows; 2],
) -> Result<([CardRows; 2], [S::Held<'a>; 2]), LossError> {
    let read = |which: usize, what| -> Result<_, LossError> {
        let (x, rows) = (features[which], rows[which].rows);
        if x.count() == 0 || !x.count().is_multiple_of(rows) {
            return Err(wrong_len(what, x.count(), format!("as many numbers for each of {rows} rows")));
        }
        let (at, held) = x.read(card)?;
        Ok((CardRows { at: at.cast(), singles: true, rows, dim: x.count() / rows }, held))
    };
    let ((u, u_held), (v, v_held)) = (read(0, "data of u")?, read(1, "data of v")?);
    Ok(([u, v], [u_held, v_held]))
}
