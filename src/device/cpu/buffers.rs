//! Memory that grows to what the largest call needs and stays: buffers whose registers cross no cache line, and one workspace
//! a thread.

use super::strips::Strip;
use super::tile::Aside;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A cache line of numbers.
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Numbers that begin with a cache line, so that no register of theirs crosses one.
#[derive(Debug, Default)]
pub struct Buffer(Vec<Line>);

impl Buffer {
    /// The first `len` of at least as many.
    pub fn sized(&mut self, len: usize) -> &mut [f32] {
        grow(&mut self.0, len.div_ceil(16));
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    /// As [`Buffer::sized`], of either kind of operand: a pair is as large as an f32.
    pub fn elements<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        bytemuck::cast_slice_mut(self.sized(len))
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        64 * self.0.capacity()
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Grows `buffer` to at least `len`.
fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

/// The first `len` of at least as many, whatever they hold.
pub fn sized<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    grow(buffer, len);
    &mut buffer[..len]
}

/// Makes `buffer` `len` times `value`.
pub fn reset<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) {
    buffer.clear();
    buffer.resize(len, value);
}

/// Buffers of one task at a time. Those of operands hold either kind: a pair is as large as an f32.
#[derive(Debug, Default)]
pub struct Workspace {
    /// A row block of u, `[ROWS, D]`.
    pub(super) u: Buffer,
    /// Rows on their way into a packed operand.
    pub(super) natural: Buffer,
    /// Results whose width is not a whole number of registers.
    pub(super) spill: Buffer,
    /// The tile of S, which becomes that of G.
    pub(super) tile: Buffer,
    /// The tile of G as pairs along its rows and along its columns.
    pub(super) halves: [Buffer; 2],
    /// Rows and columns that differences are taken from.
    pub(super) own: [Buffer; 2],
    /// The tiles of a law's factors, of its row softmaxes and of its column softmaxes.
    pub(super) factors: [Buffer; 2],
    /// Special pairs of the tile.
    pub(super) asides: Vec<Aside>,
}

impl Workspace {
    /// Room for rows on their way through.
    pub fn rows(&mut self, len: usize) -> &mut [f32] {
        self.natural.sized(len)
    }

    /// Bytes held.
    fn bytes(&self) -> usize {
        let Workspace { u, natural, spill, tile, halves, own, factors, asides } = self;
        let buffers = [u, natural, spill, tile].into_iter().chain(halves).chain(own).chain(factors);
        buffers.map(Buffer::bytes).sum::<usize>() + size_of::<Aside>() * asides.capacity()
    }
}

/// One workspace a thread, and what they share.
#[derive(Debug, Default)]
pub struct Threads {
    each: Vec<Mutex<Workspace>>,
    strips: Vec<Mutex<Strip>>,
    /// The right operands of the gradient products: rows of u and of v, packed piece by piece.
    carried: Mutex<[Buffer; 2]>,
    /// Parts of a sum over rows.
    along: Mutex<Vec<f64>>,
}

impl Threads {
    /// Makes room for every thread of the current pool.
    pub fn fit(&mut self) {
        let threads = rayon::current_num_threads();
        if self.each.len() < threads {
            self.each.resize_with(threads, Mutex::default);
            self.strips.resize_with(threads, Mutex::default);
        }
    }

    /// The right operands of gradients, of a call that is alone in carrying.
    pub fn carried(&self) -> MutexGuard<'_, [Buffer; 2]> {
        alone(&self.carried)
    }

    /// The parts of a sum over rows, of a call that is alone in summing.
    pub fn along(&self) -> MutexGuard<'_, Vec<f64>> {
        alone(&self.along)
    }

    /// Runs `f` on this thread's workspace.
    pub fn with<R>(&self, f: impl FnOnce(&mut Workspace) -> R) -> R {
        f(&mut alone(Self::own(&self.each)))
    }

    /// Runs `f` on this thread's strip.
    pub fn with_strip<R>(&self, f: impl FnOnce(&mut Strip) -> R) -> R {
        f(&mut alone(Self::own(&self.strips)))
    }

    /// This thread's of `each`.
    fn own<T>(each: &[T]) -> &T {
        &each[rayon::current_thread_index().unwrap_or(0) % each.len()]
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let each = self.each.iter().map(|workspace| alone(workspace).bytes());
        let strips = self.strips.iter().map(|strip| alone(strip).bytes());
        let carried = self.carried().iter().map(Buffer::bytes).sum::<usize>();
        each.chain(strips).sum::<usize>() + carried + 8 * self.along().capacity()
    }
}

/// What a lock guards: it has no state that a panic could leave half done.
fn alone<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}
