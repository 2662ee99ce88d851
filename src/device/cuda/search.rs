//! Exact search on a card: which launches make it. Scores have f32's digits: a number is two f16, and a product three of
//! tensor cores.

use super::CudaError;
use super::card::{Arena, Card};
use crate::device::{DeviceError, ReadItems, Search};
use kernels::abi::{self, Kernel};
use kernels::entries as e;
use std::ptr::null_mut;
use std::sync::Arc;

/// Bytes of rows on their way to the card.
const STAGE: usize = 64 << 20;
/// Edge of a tile of scores.
const TILE: usize = abi::TILE as usize;

/// The items that a card holds, and scratch.
#[derive(Debug)]
pub struct Searcher<C: Card> {
    card: Arc<C>,
    arena: Arena<C>,
    items: usize,
    dim: usize,
}

/// Where a side's halves are, and its units.
struct Slots {
    halves: &'static str,
    units: &'static str,
    split: Kernel<abi::Split>,
}

const QUERIES: Slots = Slots { halves: "queries", units: "units of queries", split: e::SPLIT_QUERIES };
const ITEMS: Slots = Slots { halves: "items", units: "units of items", split: e::SPLIT_ITEMS };

impl<C: Card> Searcher<C> {
    /// Of no items yet.
    pub fn new(card: &Arc<C>) -> Self {
        Searcher { card: Arc::clone(card), arena: Arena::new(card), items: 0, dim: 0 }
    }

    fn pitch(&self) -> usize {
        self.dim.next_multiple_of(8)
    }

    /// Room for `count` rows of a side.
    fn room(&mut self, side: &Slots, count: usize) -> Result<(*mut u16, *mut f32), CudaError> {
        Ok((self.arena.get(side.halves, count * 3 * self.pitch())?, self.arena.get(side.units, count)?))
    }

    /// Rows `first..` of a side, for which there is room.
    fn split(&mut self, side: &Slots, first: usize, rows: &[f32], count: usize) -> Result<(), CudaError> {
        let (halves, units) = self.room(side, count)?;
        let x: *mut f32 = self.arena.get("rows", rows.len())?;
        // SAFETY: the slot holds as many numbers.
        unsafe { self.card.upload(bytemuck::cast_slice(rows), x.cast()) }?;
        let args = abi::Split {
            x,
            out: halves.wrapping_add(first * 3 * self.pitch()),
            unit: units.wrapping_add(first),
            rows: (rows.len() / self.dim) as u32,
            dim: self.dim as u32,
            pitch: self.pitch() as u32,
            reserved: 0,
        };
        self.run(&side.split, [args.rows.div_ceil(8), 1, 1], &args)
    }

    /// `queries` against the items: the argument of the kernels, and grid and splits of those that pass over all items.
    fn queries(&mut self, queries: &[f32], first: usize) -> Result<(abi::Search, [u32; 3], usize), CudaError> {
        let count = queries.len() / self.dim;
        self.split(&QUERIES, 0, queries, count)?;
        let (queries, query_unit) = self.room(&QUERIES, count)?;
        let (items, item_unit) = self.room(&ITEMS, self.items)?;
        let (down, across) = (count.div_ceil(TILE), self.items.div_ceil(TILE));
        // Two waves, so that none waits long for the last.
        let tiles = across.div_ceil((2 * self.card.multiprocessors() as usize).div_ceil(down).min(across));
        let splits = across.div_ceil(tiles);
        let args = abi::Search {
            queries,
            items,
            query_unit,
            item_unit,
            offset: self.arena.get("offsets", self.items)?,
            own: null_mut(),
            ranks: null_mut(),
            heaps: null_mut(),
            n: count as u32,
            m: self.items as u32,
            depth: 3 * self.pitch() as u32,
            tiles: tiles as u32,
            keep: 0,
            first: first as u32,
        };
        Ok((args, [splits as u32, down as u32, 1], splits))
    }

    fn run<A: abi::Args>(&self, kernel: &Kernel<A>, grid: [u32; 3], args: &A) -> Result<(), CudaError> {
        // SAFETY: every address in `args` is of a slot of the arena that was asked for at the extent the kernel's argument
        // states, by the caller, which asks for no more of it before the launch; work is given in the order of its use.
        unsafe { self.card.launch(kernel, grid, args) }
    }

    fn hold(&mut self, count: usize, dim: usize, read: &mut ReadItems<'_>) -> Result<(), CudaError> {
        // Numbers of kernels are 32 bits wide, and a tile may reach past the last item.
        if count > u32::MAX as usize - TILE || dim > u32::MAX as usize / 4 {
            return Err(CudaError::Shape("fewer than 2^32 items"));
        }
        (self.items, self.dim) = (count, dim);
        self.room(&ITEMS, count)?;
        let most = (STAGE / (4 * dim)).clamp(1, count);
        let (mut rows, mut offsets) = (vec![0f32; most * dim], vec![0f32; count]);
        for first in (0..count).step_by(most) {
            let rows = &mut rows[..most.min(count - first) * dim];
            read(first, rows, &mut offsets[first..][..rows.len() / dim]);
            self.split(&ITEMS, first, rows, count)?;
        }
        let to: *mut f32 = self.arena.get("offsets", count)?;
        // SAFETY: the slot holds as many numbers.
        unsafe { self.card.upload(bytemuck::cast_slice(&offsets), to.cast()) }
    }

    fn ranks(&mut self, queries: &[f32], first: usize) -> Result<Vec<u32>, CudaError> {
        let (mut args, grid, splits) = self.queries(queries, first)?;
        let count = args.n as usize;
        args.own = self.arena.get("own scores", count)?;
        args.ranks = self.arena.get("ranks", 2 * splits * count)?;
        self.run(&e::SEARCH_OWN, [1, grid[1], 1], &args)?;
        self.run(&e::SEARCH_RANK, grid, &args)?;
        let mut parts = vec![0u32; 2 * splits * count];
        self.arena.download("ranks", &mut parts)?;
        let mut ranks = vec![0; count];
        for part in parts.chunks_exact(count) {
            ranks.iter_mut().zip(part).for_each(|(rank, part)| *rank += part);
        }
        Ok(ranks)
    }

    fn nearest(&mut self, queries: &[f32], keep: usize) -> Result<Vec<(f32, u32)>, CudaError> {
        let (mut args, grid, splits) = self.queries(queries, 0)?;
        let count = args.n as usize;
        let heap = keep * count;
        args.heaps = self.arena.get("heaps", (2 * splits + 1) * heap)?;
        args.keep = keep as u32;
        self.run(&e::SEARCH_NEAREST, grid, &args)?;
        args.tiles = 2 * splits as u32;
        self.run(&e::SEARCH_MERGE, [args.n.div_ceil(256), 1, 1], &args)?;
        let mut keys = vec![0u64; heap];
        let best = args.heaps.wrapping_add(2 * splits * heap);
        // SAFETY: the last heap of the slot, as it was asked for above.
        unsafe { self.card.download(best.cast_const().cast(), bytemuck::cast_slice_mut(&mut keys)) }?;
        let of = |key: u64| {
            let bits = (key >> 32) as u32;
            (f32::from_bits(if bits >> 31 == 1 { bits ^ 1 << 31 } else { !bits }), !(key as u32))
        };
        Ok((0..count).flat_map(|i| (0..keep).map(move |k| k * count + i)).map(|at| of(keys[at])).collect())
    }
}

impl<C: Card> Search for Searcher<C> {
    fn terms(&self, dim: usize) -> usize {
        // Three products, of whose sum tensor cores cut off what f32 would round; and what two f16 lack of an f32.
        6 * dim + 64
    }
    fn hold(&mut self, count: usize, dim: usize, read: &mut ReadItems<'_>) -> Result<(), DeviceError> {
        Ok(self.hold(count, dim, read)?)
    }
    fn nearest(&mut self, queries: &[f32], keep: usize) -> Result<Vec<(f32, u32)>, DeviceError> {
        Ok(self.nearest(queries, keep)?)
    }
    fn ranks(&mut self, queries: &[f32], first: usize) -> Result<Vec<u32>, DeviceError> {
        Ok(self.ranks(queries, first)?)
    }
    fn scratch_bytes(&self) -> usize {
        self.arena.bytes()
    }
}
