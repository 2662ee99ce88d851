//! What an engine asks of a card, and typed memory over whatever answers.
//!
//! [`Card`] is about one card and one queue of work on it: what it is given runs in the order given, after the call
//! that gave it has returned. The same engine runs over [`super::Driver`] and, in tests, over an emulation on the host.
//! Addresses are raw pointers that only the card follows; [`Buffer`] and [`Arena`] own the memory behind them.

use super::CudaError;
use crate::objective::Precision;
use bytemuck::Pod;
use kernels::abi::{Args, Kernel, TensorMap};
use std::collections::BTreeMap;
use std::ops::{Bound, Range, RangeBounds};
use std::ptr::null_mut;
use std::sync::Arc;

/// Addresses that [`Card::alloc`] returns are multiples of this.
pub const ALIGNMENT: usize = 256;

/// A card with one queue of work. All calls may come from any thread; their order is the queue's.
pub trait Card: Send + Sync + 'static {
    /// Work recorded by [`Self::capture`].
    type Graph: Send;

    /// `bytes` > 0 of memory of arbitrary content, at a multiple of [`ALIGNMENT`].
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] or [`CudaError::Driver`].
    fn alloc(&self, bytes: usize) -> Result<*mut u8, CudaError>;

    /// Gives memory back once all work given so far is done. While a graph is recorded, once that is over.
    ///
    /// # Safety
    /// `at` came from [`Self::alloc`] of this card, and neither it nor any address in it is used again.
    unsafe fn free(&self, at: *mut u8);

    /// Copies host bytes to `to`; when it returns, `from` may be changed.
    ///
    /// # Safety
    /// `to` is the address of as many bytes within one living allocation of this card.
    ///
    /// # Errors
    /// [`CudaError::Recording`], as the host's bytes would be read at each replay; [`CudaError::Driver`].
    unsafe fn upload(&self, from: &[u8], to: *mut u8) -> Result<(), CudaError>;

    /// Waits for all work given so far, then copies from `from` to host bytes.
    ///
    /// # Safety
    /// `from` is the address of as many bytes within one living allocation of this card.
    ///
    /// # Errors
    /// [`CudaError::Recording`]; [`CudaError::Driver`], also for what failed earlier in the queue.
    unsafe fn download(&self, from: *const u8, to: &mut [u8]) -> Result<(), CudaError>;

    /// Copies `bytes` within the card.
    ///
    /// # Safety
    /// Both are addresses of as many bytes within living allocations of this card, and the two parts do not overlap.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    unsafe fn copy(&self, from: *const u8, to: *mut u8, bytes: usize) -> Result<(), CudaError>;

    /// Sets `bytes` from `to` on to `byte`.
    ///
    /// # Safety
    /// `to` is the address of as many bytes within one living allocation of this card.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    unsafe fn fill(&self, byte: u8, to: *mut u8, bytes: usize) -> Result<(), CudaError>;

    /// Starts `kernel` on a grid of blocks, after all work given so far.
    ///
    /// # Safety
    /// The kernel's own contract holds for `args` and `grid` until the kernel is done: each address in `args` is that
    /// of enough living memory of this card, and nobody else uses what it writes but work given before or after.
    ///
    /// # Errors
    /// [`CudaError::NoKernels`], [`CudaError::Unsupported`] and [`CudaError::Load`] at a module's first kernel;
    /// [`CudaError::Launch`]. What goes wrong on the card itself shows in a later call that waits.
    unsafe fn launch<A: Args>(&self, kernel: &Kernel<A>, grid: [u32; 3], args: &A) -> Result<(), CudaError>;

    /// Waits for all work given so far.
    ///
    /// # Errors
    /// [`CudaError::Recording`]; [`CudaError::Driver`], also for what failed earlier in the queue.
    fn synchronise(&self) -> Result<(), CudaError>;

    /// A matrix for the TMA unit.
    ///
    /// # Errors
    /// [`CudaError::Map`] when [`MapSpec::check`] finds a fault, [`CudaError::Driver`] when the driver does.
    fn tensor_map(&self, spec: &MapSpec) -> Result<TensorMap, CudaError>;

    /// Bytes that nobody has, of this program or another; 0 where the driver does not say.
    fn free_bytes(&self) -> usize;

    /// How many allocations have been given back: while this stands still, so do all addresses that a graph names.
    fn given_back(&self) -> u64;

    /// Multiprocessors of the card.
    fn multiprocessors(&self) -> u32;

    /// Compute capability, major and minor.
    fn capability(&self) -> [u32; 2];

    /// Records what `work` gives this card instead of running it. What other threads give it meanwhile is recorded
    /// too. Run the same work once before, so that kernels are loaded and scratch has grown.
    ///
    /// # Errors
    /// Those of `work`; [`CudaError::Recording`] when a recording is under way already; [`CudaError::Driver`].
    fn capture(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Self::Graph, CudaError>;

    /// Runs what was recorded, after all work given so far.
    ///
    /// # Safety
    /// This card recorded it, and the contracts of all its launches, copies and fills hold now as they held then: the
    /// memory they name has not been given back.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), CudaError>;
}

/// One dimension of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dim {
    /// Indices: those outside read as 0 and are not written.
    pub size: u64,
    /// Bytes from an index to the next.
    pub stride: u64,
    /// Indices of a box.
    pub tile: u32,
}

/// A matrix of halves in a card's memory, and the boxes it is moved in. In shared memory a box has rows of 128 bytes, whose 16-byte
/// pieces are permuted by the row's number modulo 8.
#[derive(Clone, Copy, Debug)]
pub struct MapSpec {
    /// Its first number.
    pub base: *const u8,
    /// Its numbers, bf16 or f16.
    pub precision: Precision,
    /// Columns, whose numbers are adjacent, and rows.
    pub dims: [Dim; 2],
}

impl MapSpec {
    /// Finds what the TMA unit would not take.
    ///
    /// # Errors
    /// [`CudaError::Map`] says what it needs.
    pub fn check(&self) -> Result<(), CudaError> {
        let [cols, rows] = self.dims;
        let faults = [
            (self.precision == Precision::F32, "numbers of 16 bits"),
            (self.base.is_null() || !self.base.addr().is_multiple_of(16), "an address that is a multiple of 16"),
            (cols.stride != 2, "adjacent numbers in the first dimension"),
            (
                rows.stride == 0 || !rows.stride.is_multiple_of(16) || rows.stride >= 1 << 40,
                "strides that are multiples of 16 bytes, below 2^40",
            ),
            (self.dims.iter().any(|d| !(1..=1 << 32).contains(&d.size)), "1 to 2^32 indices a dimension"),
            (self.dims.iter().any(|d| !(1..=256).contains(&d.tile)), "boxes of 1 to 256 indices a dimension"),
            (!(2 * cols.tile).is_multiple_of(16), "boxes whose rows are multiples of 16 bytes"),
            (2 * cols.tile > 128, "boxes with rows of at most 128 bytes, to be swizzled"),
        ];
        faults.into_iter().find(|(fault, _)| *fault).map_or(Ok(()), |(_, needs)| Err(CudaError::Map(needs)))
    }
}

/// `len` numbers in a card's memory, given back on drop.
///
/// To read and write from the host is safe; a kernel gets the address and goes by the contract of [`Card::launch`].
pub struct Buffer<T, C: Card> {
    card: Arc<C>,
    /// Null when there is nothing in it.
    at: *mut T,
    len: usize,
}

// SAFETY: the pointer is an address on the card, which the host never follows; all that is done with it goes through
// the card, which is Send and Sync, and the numbers are plain bytes that belong to no thread.
unsafe impl<T: Pod, C: Card> Send for Buffer<T, C> {}
// SAFETY: as above; through a shared reference a buffer is only read.
unsafe impl<T: Pod, C: Card> Sync for Buffer<T, C> {}

impl<T: Pod, C: Card> Buffer<T, C> {
    /// `len` numbers of arbitrary value.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] or [`CudaError::Driver`].
    pub fn new(card: &Arc<C>, len: usize) -> Result<Self, CudaError> {
        const { assert!(size_of::<T>() > 0 && align_of::<T>() <= ALIGNMENT) };
        // More bytes than can be counted are more than any card has: it says so.
        let at = if len == 0 { null_mut() } else { card.alloc(len.saturating_mul(size_of::<T>()))?.cast() };
        Ok(Self { card: Arc::clone(card), at, len })
    }

    /// No numbers: where there was no memory for them.
    pub fn none(card: &Arc<C>) -> Self {
        Self { card: Arc::clone(card), at: null_mut(), len: 0 }
    }

    /// `len` numbers of zero bytes.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub fn zeroed(card: &Arc<C>, len: usize) -> Result<Self, CudaError> {
        let mut buffer = Self::new(card, len)?;
        buffer.fill(.., 0)?;
        Ok(buffer)
    }

    /// The numbers of `from`.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub fn of(card: &Arc<C>, from: &[T]) -> Result<Self, CudaError> {
        let mut buffer = Self::new(card, from.len())?;
        buffer.upload(.., from)?;
        Ok(buffer)
    }

    /// How many numbers it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The card it lives on.
    pub fn card(&self) -> &Arc<C> {
        &self.card
    }

    /// The address of a part, for a kernel to read; null when nothing is in the buffer.
    ///
    /// # Errors
    /// [`CudaError::Range`].
    pub fn ptr(&self, part: impl RangeBounds<usize>) -> Result<*const T, CudaError> {
        Ok(self.at.wrapping_add(self.range(part)?.start))
    }

    /// The address of a part, for a kernel to write; null when nothing is in the buffer.
    ///
    /// # Errors
    /// [`CudaError::Range`].
    pub fn ptr_mut(&mut self, part: impl RangeBounds<usize>) -> Result<*mut T, CudaError> {
        Ok(self.at.wrapping_add(self.range(part)?.start))
    }

    /// Copies host numbers into a part as long as they are.
    ///
    /// # Errors
    /// [`CudaError::Range`], [`CudaError::Length`], [`CudaError::Recording`] or [`CudaError::Driver`].
    pub fn upload(&mut self, part: impl RangeBounds<usize>, from: &[T]) -> Result<(), CudaError> {
        let part = self.range_as_long_as(part, from.len())?;
        if part.is_empty() {
            return Ok(());
        }
        // SAFETY: `part` is in this allocation, which lives, and holds as many numbers as `from`.
        unsafe { self.card.upload(bytemuck::cast_slice(from), self.at.wrapping_add(part.start).cast()) }
    }

    /// Waits for all work given so far, then copies a part out to as many host numbers.
    ///
    /// # Errors
    /// [`CudaError::Range`], [`CudaError::Length`], [`CudaError::Recording`] or [`CudaError::Driver`].
    pub fn download(&self, part: impl RangeBounds<usize>, to: &mut [T]) -> Result<(), CudaError> {
        let part = self.range_as_long_as(part, to.len())?;
        if part.is_empty() {
            return Ok(());
        }
        // SAFETY: `part` is in this allocation, which lives, and holds as many numbers as `to`, for which any bytes do.
        unsafe { self.card.download(self.at.wrapping_add(part.start).cast(), bytemuck::cast_slice_mut(to)) }
    }

    /// Copies `from_part` of another buffer of the same card into a part as long.
    ///
    /// # Errors
    /// [`CudaError::Range`], [`CudaError::Length`], [`CudaError::OtherCard`] or [`CudaError::Driver`].
    pub fn copy(
        &mut self,
        part: impl RangeBounds<usize>,
        from: &Self,
        from_part: impl RangeBounds<usize>,
    ) -> Result<(), CudaError> {
        if !Arc::ptr_eq(&self.card, &from.card) {
            return Err(CudaError::OtherCard);
        }
        let from_part = from.range(from_part)?;
        let part = self.range_as_long_as(part, from_part.len())?;
        if part.is_empty() {
            return Ok(());
        }
        let (source, bytes) = (from.at.wrapping_add(from_part.start), part.len() * size_of::<T>());
        // SAFETY: both parts are in their allocations, which live on this card, and are as long; the allocations are
        // two, as one is borrowed to be written and the other to be read.
        unsafe { self.card.copy(source.cast(), self.at.wrapping_add(part.start).cast(), bytes) }
    }

    /// Sets every byte of a part.
    ///
    /// # Errors
    /// [`CudaError::Range`] or [`CudaError::Driver`].
    pub fn fill(&mut self, part: impl RangeBounds<usize>, byte: u8) -> Result<(), CudaError> {
        let part = self.range(part)?;
        if part.is_empty() {
            return Ok(());
        }
        // SAFETY: `part` is in this allocation, which lives.
        unsafe { self.card.fill(byte, self.at.wrapping_add(part.start).cast(), part.len() * size_of::<T>()) }
    }

    fn range(&self, part: impl RangeBounds<usize>) -> Result<Range<usize>, CudaError> {
        let start = match part.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match part.end_bound() {
            Bound::Included(&last) => last.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len,
        };
        if start > end || end > self.len {
            return Err(CudaError::Range { start, end, len: self.len });
        }
        Ok(start..end)
    }

    fn range_as_long_as(&self, part: impl RangeBounds<usize>, other: usize) -> Result<Range<usize>, CudaError> {
        let part = self.range(part)?;
        if part.len() == other { Ok(part) } else { Err(CudaError::Length { part: part.len(), other }) }
    }
}

impl<T, C: Card> Drop for Buffer<T, C> {
    fn drop(&mut self) {
        if !self.at.is_null() {
            // SAFETY: this allocation is the buffer's own, made by this card and given back once, here; addresses
            // handed out are used in launches only, whose contract is that the memory lives.
            unsafe { self.card.free(self.at.cast()) }
        }
    }
}

impl<T, C: Card> std::fmt::Debug for Buffer<T, C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("at", &self.at).field("len", &self.len).finish_non_exhaustive()
    }
}

/// Scratch memory by name: what a slot has once held it holds again without a new allocation.
///
/// A slot grows to the most that was asked of it and never shrinks. Growing moves it: an address is good until its slot
/// is asked for more than it holds. Content stays from one request to the next, until
/// the slot moves.
#[derive(Debug)]
pub struct Arena<C: Card> {
    card: Arc<C>,
    slots: BTreeMap<&'static str, Buffer<u8, C>>,
}

impl<C: Card> Arena<C> {
    /// No scratch yet.
    pub fn new(card: &Arc<C>) -> Self {
        Self { card: Arc::clone(card), slots: BTreeMap::new() }
    }

    /// The address of at least `len` numbers, for kernels to read and write; null when `len` is 0 and the slot new.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] or [`CudaError::Driver`]; the slot is empty then.
    pub fn get<T: Pod>(&mut self, slot: &'static str, len: usize) -> Result<*mut T, CudaError> {
        const { assert!(align_of::<T>() <= ALIGNMENT) };
        let bytes = len.saturating_mul(size_of::<T>());
        let held = self.slots.get(slot).map_or(0, Buffer::len);
        if bytes > held {
            // The old memory goes first, so that the two never count together.
            self.slots.remove(slot);
            let rounded = bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(bytes);
            self.slots.insert(slot, Buffer::new(&self.card, rounded)?);
        }
        Ok(self.slots.get(slot).map_or(null_mut(), |buffer| buffer.at.cast()))
    }

    /// Waits for all work given so far, then copies the first numbers of a slot out.
    ///
    /// # Errors
    /// [`CudaError::Range`] when the slot holds fewer, [`CudaError::Recording`] or [`CudaError::Driver`].
    pub fn download<T: Pod>(&self, slot: &'static str, to: &mut [T]) -> Result<(), CudaError> {
        let to: &mut [u8] = bytemuck::cast_slice_mut(to);
        match self.slots.get(slot) {
            Some(buffer) => buffer.download(..to.len(), to),
            None if to.is_empty() => Ok(()),
            None => Err(CudaError::Range { start: 0, end: to.len(), len: 0 }),
        }
    }

    /// Bytes held now, which is the most there ever were.
    pub fn bytes(&self) -> usize {
        self.slots.values().map(Buffer::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::abi::{Each, Tally};
    use kernels::entries::TALLY_BF16;
    use std::alloc::{Layout, alloc, dealloc};
    use std::ptr::null;
    use std::sync::Mutex;

    /// A card of host memory, which writes down what it is given and starts no kernel.
    #[derive(Default)]
    struct Host {
        memory: Mutex<Memory>,
        work: Mutex<Work>,
    }

    #[derive(Default)]
    struct Memory {
        /// Address and bytes of what lives.
        live: BTreeMap<usize, usize>,
        allocations: usize,
        given_back: u64,
    }

    #[derive(Default)]
    struct Work {
        launches: Vec<Launch>,
        recording: Option<Vec<Launch>>,
    }

    #[derive(Clone, Debug, PartialEq)]
    struct Launch {
        kernel: &'static str,
        grid: [u32; 3],
        bytes: usize,
    }

    /// Bytes of this card's memory.
    const MEMORY: usize = 1 << 20;

    impl Host {
        fn new() -> Arc<Self> {
            Arc::default()
        }

        fn layout(bytes: usize) -> Layout {
            Layout::from_size_align(bytes, ALIGNMENT).unwrap()
        }

        /// Whether the bytes lie in one living allocation.
        fn holds(&self, at: *const u8, bytes: usize) -> bool {
            let memory = self.memory.lock().unwrap();
            let below = memory.live.range(..=at.addr()).next_back();
            below.is_some_and(|(start, len)| at.addr() + bytes <= start + len)
        }

        fn outside_a_recording(&self, call: &'static str) -> Result<(), CudaError> {
            if self.work.lock().unwrap().recording.is_some() { Err(CudaError::Recording { call }) } else { Ok(()) }
        }

        fn live(&self) -> usize {
            self.memory.lock().unwrap().live.len()
        }

        fn allocations(&self) -> usize {
            self.memory.lock().unwrap().allocations
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            assert_eq!(self.live(), 0, "memory was never given back");
        }
    }

    impl Card for Host {
        type Graph = Vec<Launch>;

        fn alloc(&self, bytes: usize) -> Result<*mut u8, CudaError> {
            assert_ne!(bytes, 0);
            let mut memory = self.memory.lock().unwrap();
            let free = MEMORY - memory.live.values().sum::<usize>();
            if bytes > free {
                return Err(CudaError::OutOfMemory { wanted: bytes, free });
            }
            // SAFETY: `bytes` is not 0.
            let at = unsafe { alloc(Self::layout(bytes)) };
            assert!(!at.is_null());
            // SAFETY: the allocation holds as many bytes; arbitrary they may be, but not uninitialised.
            unsafe { at.write_bytes(0xff, bytes) };
            memory.live.insert(at.addr(), bytes);
            memory.allocations += 1;
            Ok(at)
        }

        unsafe fn free(&self, at: *mut u8) {
            let mut memory = self.memory.lock().unwrap();
            let bytes = memory.live.remove(&at.addr()).expect("given back twice, or never made");
            memory.given_back += 1;
            // SAFETY: made in `alloc` with this layout; the map had it, so it is given back for the first time.
            unsafe { dealloc(at, Self::layout(bytes)) }
        }

        unsafe fn upload(&self, from: &[u8], to: *mut u8) -> Result<(), CudaError> {
            self.outside_a_recording("upload")?;
            assert!(self.holds(to, from.len()));
            // SAFETY: one living allocation holds the target, by the line above; `from` is memory of somebody else.
            unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
            Ok(())
        }

        unsafe fn download(&self, from: *const u8, to: &mut [u8]) -> Result<(), CudaError> {
            self.outside_a_recording("download")?;
            assert!(self.holds(from, to.len()));
            // SAFETY: one living allocation holds the source, by the line above; `to` is memory of somebody else.
            unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
            Ok(())
        }

        unsafe fn copy(&self, from: *const u8, to: *mut u8, bytes: usize) -> Result<(), CudaError> {
            assert!(self.holds(from, bytes) && self.holds(to, bytes));
            assert!(from.addr().abs_diff(to.addr()) >= bytes, "the parts overlap");
            // SAFETY: living allocations hold both parts, and they do not overlap, by the lines above.
            unsafe { from.copy_to_nonoverlapping(to, bytes) };
            Ok(())
        }

        unsafe fn fill(&self, byte: u8, to: *mut u8, bytes: usize) -> Result<(), CudaError> {
            assert!(self.holds(to, bytes));
            // SAFETY: one living allocation holds the part, by the line above.
            unsafe { to.write_bytes(byte, bytes) };
            Ok(())
        }

        unsafe fn launch<A: Args>(&self, kernel: &Kernel<A>, grid: [u32; 3], _args: &A) -> Result<(), CudaError> {
            let launch = Launch { kernel: kernel.name, grid, bytes: size_of::<A>() };
            let mut work = self.work.lock().unwrap();
            match &mut work.recording {
                Some(recorded) => recorded.push(launch),
                None => work.launches.push(launch),
            }
            Ok(())
        }

        fn synchronise(&self) -> Result<(), CudaError> {
            self.outside_a_recording("synchronise")
        }

        fn tensor_map(&self, spec: &MapSpec) -> Result<TensorMap, CudaError> {
            spec.check()?;
            Ok(TensorMap([spec.base.addr() as u64; 16]))
        }

        fn free_bytes(&self) -> usize {
            MEMORY - self.memory.lock().unwrap().live.values().sum::<usize>()
        }

        fn given_back(&self) -> u64 {
            self.memory.lock().unwrap().given_back
        }

        fn multiprocessors(&self) -> u32 {
            4
        }

        fn capability(&self) -> [u32; 2] {
            [9, 0]
        }

        fn capture(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Self::Graph, CudaError> {
            self.outside_a_recording("capture")?;
            self.work.lock().unwrap().recording = Some(Vec::new());
            let done = work();
            let recorded = self.work.lock().unwrap().recording.take().unwrap_or_default();
            done.map(|()| recorded)
        }

        unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), CudaError> {
            self.work.lock().unwrap().launches.extend_from_slice(graph);
            Ok(())
        }
    }

    fn numbers<T: Pod>(buffer: &Buffer<T, Host>) -> Vec<T> {
        let mut out = vec![T::zeroed(); buffer.len()];
        buffer.download(.., &mut out).unwrap();
        out
    }

    #[test]
    fn a_buffer_keeps_what_it_is_given() {
        let card = Host::new();
        let mut x = Buffer::of(&card, &[1.0f32, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert_eq!((x.len(), x.bytes(), x.is_empty()), (5, 20, false));
        assert!(x.ptr(..).unwrap().addr().is_multiple_of(ALIGNMENT));
        assert_eq!(x.ptr(3..).unwrap().addr() - x.ptr(..).unwrap().addr(), 12);
        x.upload(1..3, &[-2.0, -3.0]).unwrap();
        assert_eq!(numbers(&x), [1.0, -2.0, -3.0, 4.0, 5.0]);
        let mut last = [0.0; 2];
        x.download(3..=4, &mut last).unwrap();
        assert_eq!(last, [4.0, 5.0]);

        let mut y = Buffer::zeroed(&card, 4).unwrap();
        y.copy(1..3, &x, ..2).unwrap();
        assert_eq!(numbers(&y), [0.0, 1.0, -2.0, 0.0]);
        y.fill(2.., 0).unwrap();
        assert_eq!(numbers(&y), [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(card.live(), 2);
        drop((x, y));
        assert_eq!(card.live(), 0);
    }

    #[test]
    fn an_empty_buffer_needs_no_memory() {
        let card = Host::new();
        let mut x = Buffer::<f32, _>::zeroed(&card, 0).unwrap();
        x.upload(.., &[]).unwrap();
        assert!(numbers(&x).is_empty() && x.ptr(..).unwrap().is_null() && x.is_empty());
        assert_eq!(card.allocations(), 0);
    }

    #[test]
    fn wrong_lengths_and_parts_are_errors_that_change_nothing() {
        let card = Host::new();
        let mut x = Buffer::of(&card, &[1u32, 2, 3]).unwrap();
        let y = Buffer::of(&card, &[7u32; 4]).unwrap();
        assert_eq!(x.upload(.., &[9, 9]), Err(CudaError::Length { part: 3, other: 2 }));
        assert_eq!(x.download(1.., &mut [0; 3]), Err(CudaError::Length { part: 2, other: 3 }));
        assert_eq!(x.copy(.., &y, ..), Err(CudaError::Length { part: 3, other: 4 }));
        let elsewhere = Buffer::of(&Host::new(), &[7u32; 3]).unwrap();
        assert_eq!(x.copy(.., &elsewhere, ..), Err(CudaError::OtherCard));
        assert_eq!(x.copy(..2, &y, 3..5), Err(CudaError::Range { start: 3, end: 5, len: 4 }));
        assert_eq!(x.upload(2..4, &[9, 9]), Err(CudaError::Range { start: 2, end: 4, len: 3 }));
        assert_eq!(x.fill(..=usize::MAX, 0), Err(CudaError::Range { start: 0, end: usize::MAX, len: 3 }));
        let reversed = (Bound::Included(2), Bound::Excluded(1));
        assert_eq!(x.ptr(reversed), Err(CudaError::Range { start: 2, end: 1, len: 3 }));
        assert_eq!(x.ptr_mut(4..), Err(CudaError::Range { start: 4, end: 3, len: 3 }));
        assert_eq!(numbers(&x), [1, 2, 3]);
    }

    #[test]
    fn too_much_memory_is_an_error() {
        let card = Host::new();
        let x = Buffer::<f32, _>::new(&card, 1024).unwrap();
        let found = Buffer::<f32, _>::new(&card, MEMORY).unwrap_err();
        assert_eq!(found, CudaError::OutOfMemory { wanted: 4 * MEMORY, free: MEMORY - x.bytes() });
        assert!(Buffer::<f32, _>::new(&card, usize::MAX).is_err());
        assert!(Arena::new(&card).get::<f32>("all", usize::MAX).is_err());
    }

    #[test]
    fn an_arena_repeats_without_allocating() {
        let card = Host::new();
        let mut arena = Arena::new(&card);
        let mut step = |rows: usize| {
            let norms = arena.get::<[f32; 4]>("norms", rows).unwrap();
            let slots = arena.get::<u16>("slots", 3 * rows).unwrap();
            assert!(norms.addr().is_multiple_of(ALIGNMENT) && norms.addr() != slots.addr());
            (norms.addr(), slots.addr(), arena.bytes(), card.given_back())
        };
        let first = step(100);
        assert_eq!((first.2, first.3), (1792 + 768, 0));
        assert_eq!(card.allocations(), 2);
        // The same again, and less.
        assert_eq!(step(100), first);
        assert_eq!(step(7), first);
        assert_eq!(card.allocations(), 2);
        // More grows what must, and gives the old memory back.
        let grown = step(120);
        assert_eq!((grown.2, grown.3), (2048 + 768, 1));
        assert_eq!((card.allocations(), card.live()), (3, 2));
        assert_eq!(step(100), grown);
        assert_eq!(arena.get::<f32>("nothing", 0), Ok(null_mut()));
        drop(arena);
        assert_eq!(card.live(), 0);
    }

    #[test]
    fn scratch_can_be_read() {
        let card = Host::new();
        let mut arena = Arena::new(&card);
        arena.get::<f32>("value", 2).unwrap();
        let mut value = [0u32; 2];
        arena.download("value", &mut value).unwrap();
        assert_eq!(value, [u32::MAX; 2], "what this card's memory holds at first");
        assert!(matches!(arena.download("value", &mut [0u8; 257]), Err(CudaError::Range { end: 257, len: 256, .. })));
        assert!(matches!(arena.download("other", &mut [0u8]), Err(CudaError::Range { len: 0, .. })));
    }

    #[test]
    fn what_is_recorded_runs_when_replayed() {
        let card = Host::new();
        // SAFETY: every field of it may be zero bytes: numbers, and pointers that may be null.
        let tally: Each<Tally, 2> = unsafe { std::mem::zeroed() };
        let mut buffer = Buffer::<f32, _>::zeroed(&card, 8).unwrap();
        // SAFETY: this card starts no kernel.
        let launch = |rows| unsafe { card.launch(&TALLY_BF16, [1, rows, 1], &tally) };
        launch(1).unwrap();
        let graph = card
            .capture(|| {
                launch(2)?;
                launch(3)
            })
            .unwrap();
        assert_eq!(graph.len(), 2);
        assert_eq!(card.work.lock().unwrap().launches.len(), 1);
        for _ in 0..2 {
            // SAFETY: as above.
            unsafe { card.replay(&graph) }.unwrap();
        }
        let rows: Vec<u32> = card.work.lock().unwrap().launches.iter().map(|l| l.grid[1]).collect();
        assert_eq!(rows, [1, 2, 3, 2, 3]);
        let first = card.work.lock().unwrap().launches[0].clone();
        assert_eq!(first, Launch { kernel: "tally_bf16", grid: [1, 1, 1], bytes: size_of::<Each<Tally, 2>>() });
        // The host's memory has no place in a recording, which ends with its first error.
        let refused = card.capture(|| buffer.upload(.., &[0.0; 8]));
        assert_eq!(refused, Err(CudaError::Recording { call: "upload" }));
        card.synchronise().unwrap();
    }

    #[test]
    fn tensor_maps_are_checked() {
        let card = Host::new();
        let x = Buffer::<u16, _>::new(&card, 64 * 96).unwrap();
        let dims = [Dim { size: 60, stride: 2, tile: 64 }, Dim { size: 96, stride: 128, tile: 128 }];
        let spec = MapSpec { base: x.ptr(..).unwrap().cast(), precision: Precision::Bf16, dims };
        assert!(card.tensor_map(&spec).is_ok());
        let with = |at: usize, dim: Dim| {
            let mut dims = dims;
            dims[at] = dim;
            card.tensor_map(&MapSpec { dims, ..spec })
        };
        for (at, dim) in [
            (0, Dim { stride: 4, ..dims[0] }),
            (0, Dim { tile: 128, ..dims[0] }),
            (0, Dim { tile: 9, ..dims[0] }),
            (1, Dim { stride: 120, ..dims[1] }),
            (1, Dim { stride: 0, ..dims[1] }),
            (1, Dim { size: 0, ..dims[1] }),
            (1, Dim { tile: 257, ..dims[1] }),
        ] {
            assert!(matches!(with(at, dim), Err(CudaError::Map(_))), "{dim:?}");
        }
        for bad in [
            MapSpec { precision: Precision::F32, ..spec },
            MapSpec { base: x.ptr(1..).unwrap().cast(), ..spec },
            MapSpec { base: null(), ..spec },
        ] {
            assert!(matches!(card.tensor_map(&bad), Err(CudaError::Map(_))));
        }
    }
}
