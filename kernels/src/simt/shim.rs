//! The host twin: the words of [`super`] on a machine without a card, as hostile as the real one may be.
//!
//! Every lane is a stackful coroutine, a block runs on one OS thread, blocks run in parallel in a random order. Lanes run
//! in an order drawn anew at every turn. Copies land late and in any order, their destination full of NaN until then;
//! `wgmma` reads its operands only when it is waited for. What `compute-sanitizer` would report panics here:
//!
//! * shared memory: out of bounds, misaligned, uninitialised, in flight, or *raced for*. Every access is checked against
//!   the last ones by vector clocks that only barriers advance, so a missing barrier is found in any order of lanes;
//! * global memory: outside of every allocation, or touched by two blocks of a launch one of which writes;
//! * a lane that returns before its copies and products are over;
//! * barriers that some lanes never reach, phases that never complete, arrivals too many: the deadlock is reported with
//!   who waits for what;
//! * lanes of a warp (for `wgmma`, of a warpgroup) that meet from different lines of the source;
//! * shared memory written by stores and read by TMA or wgmma without `fence_async`.
//!
//! What it cannot see: whether its model of swizzle and descriptors is the silicon's, order of memory between blocks,
//! what ptxas reorders, and speed.

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::panic::Location;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// Bytes of a lane's stack.
const STACK: usize = 256 << 10;
/// Bytes that one shadow describes: the narrowest access.
const GRAIN: usize = 2;

/// mbarriers a block may have.
const MBARRIERS: usize = 16;

/// Words that a mutation may leave out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `sync`.
    Sync,
    /// `named_barrier`.
    NamedBarrier,
    /// `copy_wait`.
    CopyWait,
    /// `mbarrier_wait`.
    MbarrierWait,
    /// `mbarrier_arrive`.
    MbarrierArrive,
    /// `mbarrier_expect`.
    MbarrierExpect,
    /// `fence_async`.
    FenceAsync,
    /// `wgmma_fence`.
    WgmmaFence,
    /// `wgmma_wait`.
    WgmmaWait,
    /// `bulk_wait_read`.
    BulkWaitRead,
    /// Not a word: TMA boxes arrive without their swizzle.
    Swizzle,
}

impl Call {
    /// All of them.
    pub const ALL: [Call; 11] = [
        Call::Sync,
        Call::NamedBarrier,
        Call::CopyWait,
        Call::MbarrierWait,
        Call::MbarrierArrive,
        Call::MbarrierExpect,
        Call::FenceAsync,
        Call::WgmmaFence,
        Call::WgmmaWait,
        Call::BulkWaitRead,
        Call::Swizzle,
    ];
}

/// A mutation of a kernel: each lane's call `nth` of a word does nothing, or with `None` every one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Omission {
    /// What is left out.
    pub word: Call,
    /// Which call of a lane, from 0.
    pub nth: Option<u32>,
}

/// What is known of two bytes of shared memory.
#[derive(Clone, Copy, Default)]
struct Shadow {
    /// Who wrote last, and when by its own clock.
    writer: (u16, u32),
    /// One of those who have read since.
    reader: (u16, u32),
    read: bool,
    written: bool,
    /// A copy is on its way here.
    flying: bool,
    /// Which of its writer's stores, counted from 1; 0 for copies. TMA and wgmma see those before its last fence.
    store: u32,
}

/// What lanes may meet at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Meeting {
    Barrier(u32),
    Warp(u32),
    Warpgroup(u32),
}

/// Barriers and warps that a block may have.
const BARRIERS: usize = 16;
const WARPS: usize = 32;

impl Meeting {
    /// How many there are in a block.
    const ALL: usize = BARRIERS + WARPS + WARPS / 4;

    /// Which of a block's gatherings it is.
    fn index(self) -> usize {
        match self {
            Meeting::Barrier(id) => id as usize,
            Meeting::Warp(warp) => BARRIERS + warp as usize,
            Meeting::Warpgroup(group) => BARRIERS + WARPS + group as usize,
        }
    }
}

/// What a lane waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wait {
    Lanes { at: Meeting, expected: u32 },
    Copies { groups: u32 },
    Phase { at: u32, parity: u32 },
    Stores,
}

impl std::fmt::Display for Wait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Wait::Lanes { at, expected } => write!(f, "{at:?} of {expected}"),
            Wait::Copies { groups } => write!(f, "copy_wait of {groups}"),
            Wait::Phase { at, parity } => write!(f, "mbarrier_wait of {at}, parity {parity}"),
            Wait::Stores => f.write_str("bulk_wait_read"),
        }
    }
}

#[derive(Default)]
struct Gathering {
    generation: u64,
    arrived: Vec<u32>,
    /// The line from which each of them came.
    places: Vec<&'static Location<'static>>,
    expected: u32,
}

struct Mbarrier {
    /// Who initialised it, and when by its own clock.
    by: (u16, u32),
    count: u32,
    pending: u32,
    /// Bytes that copies still owe to this phase.
    bytes: i64,
    phase: u32,
    /// Where its phases are in clocks.
    place: usize,
    /// All that those who arrived have seen, and how many phases are complete.
    clock: Vec<u32>,
    /// The same, when the last phase was completed.
    complete: Vec<u32>,
}

struct Lane {
    /// What this lane knows to have happened: by lane, then what copies have read, then phases by mbarrier.
    seen: Rc<Vec<u32>>,
    /// Its own clock; what it does now is not known to others before they meet.
    clock: u32,
    waiting: Option<Wait>,
    /// Stores to shared memory so far, and how many of them a fence has followed.
    stored: u32,
    fenced: u32,
    /// `copy_async`, by group, the last still open: where to, and whether it has landed.
    copies: VecDeque<Vec<(u32, Rc<Cell<bool>>)>>,
    /// TMA stores not yet known to have read.
    stores: Vec<(u32, Rc<Cell<bool>>)>,
    /// `wgmma`, by group, the last still open.
    products: VecDeque<Vec<Product>>,
    /// `wgmma_fence`s so far.
    fences: u64,
    /// Calls of the word that a mutation is about.
    calls: u32,
    yielder: *const Yielder<(), ()>,
}

/// A lane's share of a `wgmma` that nobody has waited for.
struct Product {
    acc: Rc<Registers>,
    a: Operand,
    b: Operand,
    accumulate: bool,
    widen: fn([u16; 16]) -> [f32; 16],
}

/// An operand of a `wgmma` in shared memory: what its descriptor says, in bytes.
#[derive(Clone, Copy)]
struct Operand {
    start: u32,
    block: u32,
    group: u32,
    along_tile: bool,
}

/// What an accumulator is behind its lane's back.
struct Registers {
    values: Vec<Cell<f32>>,
    /// Products that have not been waited for.
    flying: Cell<u32>,
    /// Fences there had been when ordinary code last touched it.
    touched: Cell<u64>,
}

impl Product {
    /// Reads the operands, now, and writes the products.
    fn retire(self) {
        let (warp, lane) = (me() as u32 / 32 % 4, me() as u32 % 32);
        // Eight lanes of a warp read the same column, four the same row: one of them checks.
        let read = |b: &mut Block, operand: Operand, index: u32, check: bool| {
            (self.widen)(std::array::from_fn(|k| {
                let at = operand.address(index, k as u32);
                if check {
                    b.check_read(at, 2, "wgmma", true);
                }
                u16::from_le_bytes([b.shared[at as usize], b.shared[at as usize + 1]])
            }))
        };
        block(|b| {
            let check = lane.is_multiple_of(4);
            let rows = [0, 8].map(|half| read(b, self.a, warp * 16 + lane / 4 + half, check));
            for j in 0..self.acc.values.len() / 4 {
                for c in 0..2 {
                    let check = j as u32 % 8 == lane / 4;
                    let col = read(b, self.b, 8 * j as u32 + 2 * (lane % 4) + c, check);
                    for (half, row) in rows.iter().enumerate() {
                        let value = &self.acc.values[4 * j + 2 * half + c as usize];
                        let sum: f32 = row.iter().zip(&col).map(|(a, b)| a * b).sum();
                        value.set(if self.accumulate { value.get() + sum } else { sum });
                    }
                }
            }
        });
        self.acc.flying.set(self.acc.flying.get() - 1);
    }
}

impl Operand {
    fn new(descriptor: u64, along_tile: bool) -> Self {
        assert_eq!(descriptor >> 62, 1, "wgmma: only the 128-byte swizzle is modelled");
        let field = |shift: u32| ((descriptor >> shift & 0x3fff) << 4) as u32;
        Operand { start: field(0), block: field(16), group: field(32), along_tile }
    }

    /// Where element (`index`, k) lies: the address is swizzled last, as the card does.
    fn address(self, index: u32, k: u32) -> u32 {
        let Operand { start, block, group, along_tile } = self;
        swizzle(if along_tile {
            start + index / 64 * block + k / 8 * group + k % 8 * 128 + index % 64 * 2
        } else {
            start + index / 8 * group + index % 8 * 128 + k * 2
        })
    }
}

/// A copy on its way.
enum Late {
    Copy { to: u32, from: usize, bytes: u32, landed: Rc<Cell<bool>> },
    Load { by: usize, to: u32, map: MapSpec, x: u32, y: u32, barrier: u32 },
    Store { from: u32, map: MapSpec, x: u32, y: u32, landed: Rc<Cell<bool>> },
}

/// A block in execution.
struct Block {
    at: [u32; 3],
    grid: [u32; 3],
    launch: u64,
    shared: Vec<u8>,
    shadows: Vec<Shadow>,
    lanes: Vec<Lane>,
    /// By [`Meeting::index`].
    gatherings: Vec<Gathering>,
    /// What the lanes of a warp hand each other, by parity of the meeting.
    slots: Vec<[[[u32; 8]; 32]; 2]>,
    mbarriers: BTreeMap<u32, Mbarrier>,
    late: Vec<Late>,
    store_clock: u32,
    random: u64,
    moved: bool,
    omission: Option<Omission>,
}

thread_local! {
    static BLOCK: RefCell<Option<Block>> = const { RefCell::new(None) };
    static LANE: Cell<u32> = const { Cell::new(0) };
    static REGION: RefCell<Option<Arc<Region>>> = const { RefCell::new(None) };
}

/// What a block needs of memory, kept from one to the next: the system is slow at giving as much.
#[derive(Default)]
struct Room {
    stacks: Vec<DefaultStack>,
    shared: Vec<u8>,
    shadows: Vec<Shadow>,
}

static ROOMS: Mutex<Vec<Room>> = Mutex::new(Vec::new());

fn block<R>(f: impl FnOnce(&mut Block) -> R) -> R {
    BLOCK.with(|b| f(b.borrow_mut().as_mut().expect("a word was spoken outside of a launch")))
}

fn me() -> usize {
    LANE.get() as usize
}

/// Whether the mutation, if there is one, leaves this call out.
fn omitted(word: Call) -> bool {
    block(|b| {
        let Some(omission) = b.omission.filter(|o| o.word == word) else { return false };
        let call = b.lanes[me()].calls;
        b.lanes[me()].calls += 1;
        omission.nth.is_none_or(|nth| nth == call)
    })
}

/// Runs others until `ready`.
fn until(what: Wait, mut ready: impl FnMut(&mut Block) -> bool) {
    let mut waited = false;
    loop {
        let go = block(|b| {
            let go = ready(b);
            if go {
                b.moved |= waited;
                b.lanes[me()].waiting = None;
            } else if !waited {
                b.lanes[me()].waiting = Some(what);
                b.moved = true;
            }
            go
        });
        if go {
            return;
        }
        waited = true;
        let yielder = block(|b| b.lanes[me()].yielder);
        // SAFETY: set from the reference this coroutine was started with, which lives as long as it runs.
        unsafe { (*yielder).suspend(()) };
    }
}

fn join(into: &mut [u32], from: &[u32]) {
    into.iter_mut().zip(from).for_each(|(a, &b)| *a = (*a).max(b));
}

impl Block {
    fn draw(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % below as u64) as usize
    }

    /// Where copies from shared memory are in clocks.
    fn reader(&self) -> usize {
        self.lanes.len()
    }

    fn knows(&self, who: usize, other: (u16, u32)) -> bool {
        usize::from(other.0) == who || self.lanes[who].seen[usize::from(other.0)] >= other.1
    }

    fn grains(&self, at: u32, bytes: u32, what: &str) -> std::ops::Range<usize> {
        let (at, bytes) = (at as usize, bytes as usize);
        assert!(
            at + bytes <= self.shared.len(),
            "{what}: shared memory {at}..{} of {} bytes, by lane {}",
            at + bytes,
            self.shared.len(),
            me()
        );
        at / GRAIN..(at + bytes).div_ceil(GRAIN)
    }

    fn check_read(&mut self, at: u32, bytes: u32, what: &str, fenced: bool) {
        let lane = me();
        for g in self.grains(at, bytes, what) {
            let s = self.shadows[g];
            let place = g * GRAIN;
            assert!(!s.flying, "{what}: lane {lane} reads shared byte {place} while a copy is in flight to it");
            assert!(s.written, "{what}: lane {lane} reads shared byte {place}, which nobody has written");
            assert!(
                self.knows(lane, s.writer),
                "{what}: race: lane {lane} reads shared byte {place}, written by {} with no barrier between",
                self.name(s.writer.0)
            );
            let seen = !fenced || s.store == 0 || s.store <= self.lanes[usize::from(s.writer.0)].fenced;
            assert!(seen, "{what}: shared byte {place} was stored without fence_async since");
            // One reader is kept: a later one, if it knows of this one; else either. Over a tile of bytes none is missed.
            let now = (lane as u16, self.lanes[lane].clock);
            if !s.read || self.knows(lane, s.reader) || self.draw(2) == 0 {
                self.shadows[g].reader = now;
                self.shadows[g].read = true;
            }
        }
    }

    fn check_write(&mut self, at: u32, bytes: u32, what: &str) -> std::ops::Range<usize> {
        let lane = me();
        let grains = self.grains(at, bytes, what);
        for g in grains.clone() {
            let s = self.shadows[g];
            let place = g * GRAIN;
            assert!(!s.flying, "{what}: lane {lane} writes shared byte {place} while a copy is in flight to it");
            assert!(
                !s.written || self.knows(lane, s.writer),
                "{what}: race: lane {lane} writes shared byte {place}, written by {} with no barrier between",
                self.name(s.writer.0)
            );
            assert!(
                !s.read || self.knows(lane, s.reader),
                "{what}: race: lane {lane} writes shared byte {place}, read by {} with no barrier between",
                self.name(s.reader.0)
            );
        }
        grains
    }

    fn name(&self, who: u16) -> String {
        if usize::from(who) >= self.lanes.len() { "a copy".into() } else { format!("lane {who}") }
    }

    /// A store by this lane.
    fn write(&mut self, at: u32, data: &[u8], what: &str) {
        let lane = me();
        let grains = self.check_write(at, data.len() as u32, what);
        self.lanes[lane].stored += 1;
        let (now, store) = ((lane as u16, self.lanes[lane].clock), self.lanes[lane].stored);
        for g in grains {
            self.shadows[g] = Shadow { writer: now, written: true, store, ..Shadow::default() };
        }
        self.shared[at as usize..at as usize + data.len()].copy_from_slice(data);
    }

    /// A copy to shared memory sets off.
    fn take_off(&mut self, at: u32, bytes: u32, what: &str) {
        for g in self.check_write(at, bytes, what) {
            self.shadows[g] = Shadow { flying: true, ..Shadow::default() };
        }
        self.shared[at as usize..(at + bytes) as usize].fill(0xff);
    }

    /// Those who meet know what all of them knew.
    fn meet(&mut self, lanes: &[u32]) {
        let mut all = vec![0; self.lanes.len() + 1 + MBARRIERS];
        for &l in lanes {
            let lane = &mut self.lanes[l as usize];
            join(&mut all, &lane.seen);
            all[l as usize] = all[l as usize].max(lane.clock);
            lane.clock += 1;
        }
        let all = Rc::new(all);
        for &l in lanes {
            self.lanes[l as usize].seen = Rc::clone(&all);
        }
    }

    /// The mbarrier at `at`, which `lane` must know to be initialised.
    fn mbarrier(&mut self, at: u32, lane: usize, what: &str) -> &mut Mbarrier {
        let known = self.mbarriers.get(&at).is_none_or(|b| self.knows(lane, b.by));
        assert!(known, "{what}: race: lane {lane} uses the mbarrier at {at}, initialised with no barrier between");
        self.mbarriers.get_mut(&at).unwrap_or_else(|| panic!("{what}: no mbarrier was initialised at shared byte {at}"))
    }

    fn arrive(&mut self, at: u32, bytes: i64, what: &str) {
        let lane = me();
        let (seen, clock) = (Rc::clone(&self.lanes[lane].seen), self.lanes[lane].clock);
        let b = self.mbarrier(at, lane, what);
        assert!(b.pending > 0, "{what}: lane {lane} arrives at the mbarrier at {at}, which expects nobody more");
        join(&mut b.clock, &seen);
        b.clock[lane] = b.clock[lane].max(clock);
        b.bytes += bytes;
        b.pending -= 1;
        b.settle();
        self.lanes[lane].clock += 1;
    }

    /// A copy lands.
    fn land(&mut self) {
        let which = self.draw(self.late.len());
        self.moved = true;
        match self.late.swap_remove(which) {
            Late::Copy { to, from, bytes, landed } => {
                let (to, bytes) = (to as usize, bytes as usize);
                self.shared[to..to + 16].fill(0);
                let at = (self.block_number(), self.launch);
                read_global(from, &mut self.shared[to..to + bytes], at, "copy_async");
                landed.set(true);
            }
            Late::Load { by, to, map, x, y, barrier } => {
                let at = (self.block_number(), self.launch);
                let b = self.mbarrier(barrier, by, "tma_load");
                let now = (b.place as u16, b.clock[b.place] + 1);
                let mut bytes = 0;
                map.each(x, y, |offset, inside| {
                    let width = map.element as usize;
                    let place = (to + map.swizzled(to, offset)) as usize;
                    match inside {
                        Some(address) => read_global(address, &mut self.shared[place..place + width], at, "tma_load"),
                        None => self.shared[place..place + width].fill(0),
                    }
                    for g in place / GRAIN..(place + width).div_ceil(GRAIN) {
                        self.shadows[g] = Shadow { writer: now, written: true, ..Shadow::default() };
                    }
                    bytes += width as i64;
                });
                let b = self.mbarrier(barrier, by, "tma_load");
                b.bytes -= bytes;
                b.settle();
            }
            Late::Store { from, map, x, y, landed } => {
                let at = (self.block_number(), self.launch);
                map.each(x, y, |offset, inside| {
                    let place = (from + map.swizzled(from, offset)) as usize;
                    if let Some(address) = inside {
                        write_global(address, &self.shared[place..place + map.element as usize], at, "tma_store");
                    }
                });
                landed.set(true);
            }
        }
    }

    fn block_number(&self) -> u64 {
        let [x, y, z] = self.at.map(u64::from);
        x + u64::from(self.grid[0]) * (y + u64::from(self.grid[1]) * z)
    }
}

impl Mbarrier {
    fn settle(&mut self) {
        if self.pending == 0 && self.bytes == 0 {
            self.phase ^= 1;
            self.clock[self.place] += 1;
            self.pending = self.count;
            self.complete.clone_from(&self.clock);
        }
    }
}

/// All `expected` lanes meet, and know of each other's accesses if `order`. Those who must come together come from one
/// line: on a card a second one is another instruction.
#[track_caller]
fn gather(at: Meeting, expected: u32, order: bool) {
    let place = Location::caller();
    let generation = block(|b| {
        let g = &mut b.gatherings[at.index()];
        let generation = g.generation;
        let together = if matches!(at, Meeting::Warpgroup(_)) { 128 } else { 32 };
        // All who came before from the same warp came from one line.
        let others = |&(other, _): &(&u32, _)| other / together == LANE.get() / together;
        if let Some((other, &elsewhere)) = g.arrived.iter().zip(&g.places).find(others) {
            assert!(
                std::ptr::eq(elsewhere, place) || elsewhere == place,
                "{at:?}: lane {} comes from {place}, lane {other} from {elsewhere}",
                me()
            );
        }
        g.places.push(place);
        assert!(
            g.arrived.is_empty() || g.expected == expected,
            "{at:?}: lane {} expects {expected} lanes, others {}",
            me(),
            g.expected
        );
        g.expected = expected;
        g.arrived.push(LANE.get());
        if g.arrived.len() == expected as usize {
            let arrived = std::mem::take(&mut g.arrived);
            g.places.clear();
            g.generation += 1;
            if order {
                b.meet(&arrived);
            }
        }
        generation
    });
    until(Wait::Lanes { at, expected }, |b| b.gatherings[at.index()].generation != generation);
}

/// What `take` makes of what every lane of the warp puts in.
#[track_caller]
fn exchange<R>(mine: [u32; 8], take: impl FnOnce(&[[u32; 8]; 32]) -> R) -> R {
    let (warp, lane) = (me() / 32, me() % 32);
    let at = Meeting::Warp(warp as u32);
    let parity = block(|b| {
        let parity = (b.gatherings[at.index()].generation & 1) as usize;
        b.slots[warp][parity][lane] = mine;
        parity
    });
    gather(at, 32, false);
    block(|b| take(&b.slots[warp][parity]))
}

// ---------------------------------------------------------------------------------------------- global memory

/// An allocation, with what blocks of the running launch have done to it.
struct Region {
    start: usize,
    bytes: usize,
    /// A grain each: launch, writing block + 1, reading block + 1.
    shadows: Vec<AtomicU64>,
}

static REGIONS: RwLock<BTreeMap<usize, Arc<Region>>> = RwLock::new(BTreeMap::new());
static LAUNCHES: AtomicU64 = AtomicU64::new(0);

/// Memory of the host twin's card, full of NaN until something is written.
#[derive(Debug)]
pub struct Memory {
    words: Vec<AtomicU32>,
    bytes: usize,
}

impl Memory {
    /// `bytes` of poison.
    pub fn new(bytes: usize) -> Self {
        // Room to align to 256 bytes, as a driver does.
        let words: Vec<AtomicU32> = (0..bytes.div_ceil(4) + 64).map(|_| AtomicU32::new(u32::MAX)).collect();
        let memory = Memory { words, bytes };
        let start = memory.address();
        let shadows = (0..bytes.div_ceil(GRAIN)).map(|_| AtomicU64::new(0)).collect();
        let region = Region { start, bytes, shadows };
        REGIONS.write().expect("not poisoned").insert(start, Arc::new(region));
        memory
    }
    /// Its first byte, a multiple of 256.
    pub fn address(&self) -> usize {
        (self.words.as_ptr() as usize).next_multiple_of(256)
    }
    /// How many bytes were asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
    /// Copies host bytes in, from byte `at`.
    pub fn upload(&self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.bytes, "upload past the end");
        // SAFETY: inside this allocation, whose atomics allow writes through a shared reference; no launch runs meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), (self.address() + at) as *mut u8, data.len()) };
    }
    /// Copies bytes out, from byte `at`.
    pub fn download(&self, at: usize, data: &mut [u8]) {
        assert!(at + data.len() <= self.bytes, "download past the end");
        // SAFETY: inside this allocation; no launch runs meanwhile.
        unsafe { std::ptr::copy_nonoverlapping((self.address() + at) as *const u8, data.as_mut_ptr(), data.len()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let start = self.address();
        REGIONS.write().unwrap_or_else(|e| e.into_inner()).remove(&start);
    }
}

fn region(at: usize, bytes: usize, what: &str) -> Arc<Region> {
    let holds = |r: &Region| at >= r.start && at + bytes <= r.start + r.bytes;
    let cached = REGION.with(|r| r.borrow().as_ref().filter(|r| holds(r)).cloned());
    cached.unwrap_or_else(|| {
        let regions = REGIONS.read().unwrap_or_else(|e| e.into_inner());
        let found = regions.range(..=at).next_back().map(|(_, r)| Arc::clone(r)).filter(|r| holds(r));
        drop(regions);
        let Some(found) = found else {
            panic!("{what}: {bytes} bytes at {at:#x} of global memory are outside of every allocation")
        };
        REGION.with(|r| *r.borrow_mut() = Some(Arc::clone(&found)));
        found
    })
}

const BLOCK_BITS: u32 = 20;

fn touch(at: usize, bytes: usize, (block, launch): (u64, u64), write: bool, what: &str) {
    let whole = bytes.is_power_of_two() || bytes.is_multiple_of(16);
    assert!(!whole || at.is_multiple_of(bytes.min(16)), "{what}: {at:#x} is not aligned for {bytes} bytes");
    let region = region(at, bytes, what);
    let mask = (1u64 << BLOCK_BITS) - 1;
    let me = (block + 1) & mask;
    for g in (at - region.start) / GRAIN..(at + bytes - region.start).div_ceil(GRAIN) {
        let old = region.shadows[g].load(Ordering::Relaxed);
        let (writer, reader) =
            if old >> (2 * BLOCK_BITS) == launch { (old >> BLOCK_BITS & mask, old & mask) } else { (0, 0) };
        let byte = g * GRAIN;
        assert!(
            writer == 0 || writer == me,
            "{what}: byte {byte} of an allocation was written by block {} of this launch and is touched by block {block}",
            writer.wrapping_sub(1)
        );
        assert!(
            !write || reader == 0 || reader == me,
            "{what}: byte {byte} of an allocation was read by block {} of this launch and is written by block {block}",
            reader.wrapping_sub(1)
        );
        let now = if write { (me, reader) } else { (writer, me) };
        region.shadows[g].store(launch << (2 * BLOCK_BITS) | now.0 << BLOCK_BITS | now.1, Ordering::Relaxed);
    }
}

fn read_global(at: usize, to: &mut [u8], who: (u64, u64), what: &str) {
    if !to.is_empty() {
        touch(at, to.len(), who, false, what);
        // SAFETY: `touch` found the bytes inside a live allocation.
        unsafe { std::ptr::copy_nonoverlapping(at as *const u8, to.as_mut_ptr(), to.len()) };
    }
}

fn write_global(at: usize, from: &[u8], who: (u64, u64), what: &str) {
    touch(at, from.len(), who, true, what);
    // SAFETY: `touch` found the bytes inside a live allocation, and no other block touches them.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), at as *mut u8, from.len()) };
}

/// What a [`crate::abi::TensorMap`] of the twin says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// Address of the tensor.
    pub address: u64,
    /// Elements along x (contiguous) and y.
    pub size: [u32; 2],
    /// Bytes from one y to the next.
    pub pitch: u64,
    /// Elements of a box along x and y.
    pub tile: [u32; 2],
    /// Bytes of an element.
    pub element: u32,
    /// Whether boxes are stored with the 128-byte swizzle.
    pub swizzle: bool,
}

impl MapSpec {
    /// As the argument of a kernel.
    pub fn encode(&self) -> crate::abi::TensorMap {
        let mut x = [0; 16];
        x[0] = self.address;
        x[1] = u64::from(self.size[0]) | u64::from(self.size[1]) << 32;
        x[2] = self.pitch;
        x[3] = u64::from(self.tile[0]) | u64::from(self.tile[1]) << 32;
        x[4] = u64::from(self.element) | u64::from(self.swizzle) << 32;
        crate::abi::TensorMap(x)
    }

    fn decode(map: &crate::abi::TensorMap) -> Self {
        let x = map.0;
        MapSpec {
            address: x[0],
            size: [x[1] as u32, (x[1] >> 32) as u32],
            pitch: x[2],
            tile: [x[3] as u32, (x[3] >> 32) as u32],
            element: x[4] as u32,
            swizzle: x[4] >> 32 != 0,
        }
    }

    fn bytes(&self) -> u32 {
        self.tile[0] * self.tile[1] * self.element
    }

    /// Every element of the box at (x, y): its byte in the box, and its address if it is in the tensor.
    fn each(&self, x: u32, y: u32, mut f: impl FnMut(u32, Option<usize>)) {
        for j in 0..self.tile[1] {
            for i in 0..self.tile[0] {
                let (gx, gy) = (x + i, y + j);
                let inside = gx < self.size[0] && gy < self.size[1];
                let address = self.address + u64::from(gy) * self.pitch + u64::from(gx * self.element);
                f((j * self.tile[0] + i) * self.element, inside.then_some(address as usize));
            }
        }
    }

    fn swizzled(&self, base: u32, offset: u32) -> u32 {
        if self.swizzle { swizzle(base + offset) - base } else { offset }
    }
}

/// The 128-byte swizzle: bits 4 to 6 of an address are flipped by bits 7 to 9.
fn swizzle(address: u32) -> u32 {
    address ^ ((address >> 7 & 7) << 4)
}

// ---------------------------------------------------------------------------------------------- launching

/// Runs `kernel` over `grid` blocks; everything random about it follows from `seed`.
///
/// # Panics
/// With a description, for each misuse in the list above.
///
/// # Safety
/// Pointers of `args` are addresses of [`Memory`] of the extents the kernel expects, or null where it allows.
pub unsafe fn launch<A: crate::abi::Args>(kernel: &crate::abi::Kernel<A>, grid: [u32; 3], args: &A, seed: u64) {
    // SAFETY: the caller's promise.
    unsafe { launch_without(kernel, grid, args, seed, None) };
}

/// The same of a mutated kernel; tells how often the busiest lane called the word that the mutation is about.
///
/// # Panics
/// As [`launch`]: the mutation was found out.
///
/// # Safety
/// As [`launch`].
pub unsafe fn launch_without<A: crate::abi::Args>(
    kernel: &crate::abi::Kernel<A>,
    grid: [u32; 3],
    args: &A,
    seed: u64,
    omission: Option<Omission>,
) -> u32 {
    let calls = AtomicU32::new(0);
    let launch = (LAUNCHES.fetch_add(1, Ordering::Relaxed) + 1) & 0xff_ffff;
    let blocks = grid.iter().product::<u32>() as usize;
    assert!(blocks > 0, "{}: an empty grid {grid:?}", kernel.name);
    assert!(grid[1..].iter().all(|&n| n <= 65_535), "{}: no card takes a grid of {grid:?}", kernel.name);
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for i in (1..blocks).rev() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        order.swap(i, (random >> 33) as usize % (i + 1));
    }
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    // SAFETY: workers only read the argument, and end before this call does.
    let shared = Arg(std::ptr::from_ref(args).cast());
    let worker = || {
        let shared = &shared;
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= blocks || failure.lock().is_ok_and(|f| f.is_some()) {
                return;
            }
            let b = order[i];
            let at = [b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1])];
            let seed = seed ^ (u64::from(b) << 20);
            let (body, args) = (kernel.body, shared.0);
            let run = std::panic::AssertUnwindSafe(|| {
                // SAFETY: the pointer is to `args`, which outlives the workers.
                run_block([kernel.threads, kernel.shared], at, grid, launch, seed, omission, move || unsafe {
                    body(&*args.cast(), args as u64)
                })
            });
            match std::panic::catch_unwind(run) {
                Ok(most) => _ = calls.fetch_max(most, Ordering::Relaxed),
                Err(panic) => _ = failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(panic),
            }
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(blocks);
    if workers == 1 {
        worker();
    } else {
        std::thread::scope(|s| (0..workers).for_each(|_| drop(s.spawn(worker))));
    }
    if let Some(panic) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        std::panic::resume_unwind(panic);
    }
    calls.into_inner()
}

struct Arg(*const ());
// SAFETY: workers only read through it.
unsafe impl Sync for Arg {}

/// Runs one block; tells how often the busiest lane called the omitted word.
fn run_block(
    [threads, shared]: [u32; 2],
    at: [u32; 3],
    grid: [u32; 3],
    launch: u64,
    seed: u64,
    omission: Option<Omission>,
    body: impl Fn() + Copy + 'static,
) -> u32 {
    let count = threads as usize;
    let seen = Rc::new(vec![0; count + 1 + MBARRIERS]);
    let lane = || Lane {
        seen: Rc::clone(&seen),
        clock: 1,
        waiting: None,
        stored: 0,
        fenced: 0,
        copies: VecDeque::from([Vec::new()]),
        stores: Vec::new(),
        products: VecDeque::from([Vec::new()]),
        fences: 1,
        calls: 0,
        yielder: std::ptr::null(),
    };
    let rooms = || ROOMS.lock().unwrap_or_else(|e| e.into_inner());
    let Room { mut stacks, shared: mut bytes, mut shadows } = rooms().pop().unwrap_or_default();
    bytes.clear();
    bytes.resize(shared as usize, 0xff);
    shadows.clear();
    shadows.resize((shared as usize).div_ceil(GRAIN), Shadow::default());
    BLOCK.set(Some(Block {
        at,
        grid,
        launch,
        shared: bytes,
        shadows,
        lanes: (0..count).map(|_| lane()).collect(),
        gatherings: (0..Meeting::ALL).map(|_| Gathering::default()).collect(),
        slots: vec![[[[0; 8]; 32]; 2]; count.div_ceil(32)],
        mbarriers: BTreeMap::new(),
        late: Vec::new(),
        store_clock: 0,
        random: seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1,
        moved: true,
        omission,
    }));
    let mut stack = || stacks.pop().unwrap_or_else(|| DefaultStack::new(STACK).expect("memory for a stack"));
    let mut lanes: Vec<Option<Coroutine<(), (), (), DefaultStack>>> = (0..count)
        .map(|_| {
            Some(Coroutine::with_stack(stack(), move |yielder: &Yielder<(), ()>, ()| {
                block(|b| b.lanes[me()].yielder = yielder);
                body();
            }))
        })
        .collect();
    let mut alive: Vec<usize> = (0..count).collect();
    while !alive.is_empty() {
        block(|b| {
            assert!(b.moved || !b.late.is_empty(), "deadlock in block {at:?}: {}", report(b, &alive));
            b.moved = false;
            for i in (1..alive.len()).rev() {
                let j = b.draw(i + 1);
                alive.swap(i, j);
            }
        });
        alive.retain(|&i| {
            LANE.set(i as u32);
            let lane = lanes[i].as_mut().expect("a lane that lives");
            if let CoroutineResult::Yield(()) = lane.resume(()) {
                return true;
            }
            block(|b| {
                let b = &b.lanes[i];
                let copies = b.copies.iter().flatten().count() + b.stores.len() + b.products.iter().flatten().count();
                assert!(copies == 0, "lane {i} returns with {copies} copies or products that it has not waited for");
            });
            if let Some(lane) = lanes[i].take() {
                stacks.push(lane.into_stack());
            }
            block(|b| b.moved = true);
            false
        });
        block(|b| {
            let lands = b.late.len().div_ceil(2);
            (0..lands).for_each(|_| b.land());
        });
    }
    let Some(Block { shared, shadows, lanes, .. }) = BLOCK.take() else { return 0 };
    rooms().push(Room { stacks, shared, shadows });
    lanes.iter().map(|lane| lane.calls).max().unwrap_or(0)
}

fn report(b: &Block, alive: &[usize]) -> String {
    let mut waits: BTreeMap<Wait, Vec<usize>> = BTreeMap::new();
    for &i in alive {
        waits.entry(b.lanes[i].waiting.expect("nothing moves: all wait")).or_default().push(i);
    }
    let mut text = String::new();
    for (what, mut lanes) in waits {
        lanes.sort_unstable();
        text += &format!("{} lanes wait at {what} (first {:?}); ", lanes.len(), &lanes[..lanes.len().min(4)]);
    }
    text + &format!("{} lanes have returned", b.lanes.len() - alive.len())
}

/// The words themselves. Documented in the card's body, where they are the instruction.
#[allow(missing_docs, clippy::missing_safety_doc, reason = "documented in the card's body")]
pub mod words {
    use super::super::Word;
    use super::*;
    use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

    pub fn thread() -> u32 {
        LANE.get()
    }
    pub fn lane() -> u32 {
        LANE.get() % 32
    }
    #[track_caller]
    pub fn warp() -> u32 {
        uniform(LANE.get() / 32)
    }
    pub fn block_x() -> u32 {
        block(|b| b.at[0])
    }
    pub fn block_y() -> u32 {
        block(|b| b.at[1])
    }
    pub fn block_z() -> u32 {
        block(|b| b.at[2])
    }
    pub fn grid_x() -> u32 {
        block(|b| b.grid[0])
    }

    #[track_caller]
    pub fn sync() {
        if omitted(Call::Sync) {
            return;
        }
        let all = block(|b| b.lanes.len() as u32);
        gather(Meeting::Barrier(0), all, true);
    }
    #[track_caller]
    pub fn named_barrier<const ID: u32, const THREADS: u32>() {
        if omitted(Call::NamedBarrier) {
            return;
        }
        gather(Meeting::Barrier(ID), THREADS, true);
    }
    #[track_caller]
    pub fn sync_warp() {
        gather(Meeting::Warp(LANE.get() / 32), 32, true);
    }

    #[track_caller]
    pub fn shuffle_xor(x: f32, mask: u32) -> f32 {
        f32::from_bits(exchange([x.to_bits(); 8], |all| all[(lane() ^ mask) as usize][0]))
    }
    #[track_caller]
    pub fn uniform(x: u32) -> u32 {
        exchange([x; 8], |all| all[0][0])
    }
    #[track_caller]
    pub fn ballot(x: bool) -> u32 {
        exchange([u32::from(x); 8], |all| all.iter().rev().fold(0, |bits, x| bits << 1 | x[0]))
    }

    pub fn exp2(x: f32) -> f32 {
        let y = x.exp2();
        if y < f32::MIN_POSITIVE { 0.0 } else { y }
    }
    pub fn log2(x: f32) -> f32 {
        x.log2()
    }
    pub fn reciprocal(x: f32) -> f32 {
        let y = 1.0 / x;
        if y.abs() < f32::MIN_POSITIVE { 0.0 } else { y }
    }
    pub fn sqrt(x: f32) -> f32 {
        x.sqrt()
    }
    pub fn fma(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    pub fn pack_bf16(low: f32, high: f32) -> u32 {
        let [low, high] = [low, high].map(|x| u32::from(half::bf16::from_f32(x).to_bits()));
        low | high << 16
    }
    pub fn pack_f16(low: f32, high: f32) -> u32 {
        let [low, high] = [low, high].map(|x| u32::from(half::f16::from_f32(x).to_bits()));
        low | high << 16
    }
    pub fn unpack_f16(word: u32) -> [f32; 2] {
        [word as u16, (word >> 16) as u16].map(|x| half::f16::from_bits(x).to_f32())
    }
    pub fn opaque(x: u32) -> u32 {
        x
    }
    pub fn pin(x: f32) -> f32 {
        x
    }
    pub fn trap() -> ! {
        panic!("the kernel stopped itself (lane {})", me())
    }
    pub fn shared_base() -> u32 {
        0
    }

    macro_rules! word {
        ($($type:ty)*) => {$(
            impl Word for $type {
                unsafe fn load(at: *const Self) -> Self {
                    let mut x = [0; size_of::<$type>()];
                    let who = block(|b| (b.block_number(), b.launch));
                    read_global(at as usize, &mut x, who, "load");
                    bytes_to(&x)
                }
                unsafe fn store(at: *mut Self, value: Self) {
                    let who = block(|b| (b.block_number(), b.launch));
                    write_global(at as usize, &to_bytes(value)[..size_of::<$type>()], who, "store");
                }
                unsafe fn load_shared(at: u32) -> Self {
                    let width = size_of::<$type>() as u32;
                    assert!(at.is_multiple_of(width), "load_shared: {at} is not aligned for {width} bytes");
                    block(|b| {
                        b.check_read(at, width, "load_shared", false);
                        bytes_to(&b.shared[at as usize..(at + width) as usize])
                    })
                }
                unsafe fn store_shared(at: u32, value: Self) {
                    let width = size_of::<$type>();
                    assert!(at.is_multiple_of(width as u32), "store_shared: {at} is not aligned for {width} bytes");
                    block(|b| b.write(at, &to_bytes(value)[..width], "store_shared"));
                }
            }
        )*};
    }
    word! { u16 u32 i32 u64 f32 f64 [f32; 2] [f32; 4] [u32; 2] [u32; 4] }

    /// Plain words only: the private macro above is the only caller.
    fn bytes_to<T: Copy>(x: &[u8]) -> T {
        assert_eq!(x.len(), size_of::<T>());
        // SAFETY: integers and floats, for which all bytes are valid, and the length was checked.
        unsafe { std::ptr::read_unaligned(x.as_ptr().cast()) }
    }
    fn to_bytes<T: Copy>(x: T) -> [u8; 16] {
        let mut out = [0; 16];
        assert!(size_of::<T>() <= 16);
        // SAFETY: integers and floats, which have no padding, and fit.
        unsafe { std::ptr::copy_nonoverlapping((&raw const x).cast(), out.as_mut_ptr(), size_of::<T>()) };
        out
    }

    pub unsafe fn store_where(at: *mut u32, value: u32, when: bool) {
        if when {
            // SAFETY: the caller's promise.
            unsafe { u32::store(at, value) };
        }
    }
    pub unsafe fn copy_async(to: u32, from: *const u16, bytes: u32) {
        assert!(to.is_multiple_of(16) && (from as usize).is_multiple_of(16), "copy_async: addresses not aligned to 16");
        assert!(bytes <= 16, "copy_async: {bytes} bytes");
        block(|b| {
            b.take_off(to, 16, "copy_async");
            let landed = Rc::new(Cell::new(false));
            b.lanes[me()].copies.back_mut().expect("an open group").push((to, Rc::clone(&landed)));
            b.late.push(Late::Copy { to, from: from as usize, bytes, landed });
        });
    }
    pub fn copy_commit() {
        block(|b| b.lanes[me()].copies.push_back(Vec::new()));
    }
    pub fn copy_wait<const N: u32>() {
        if omitted(Call::CopyWait) {
            return;
        }
        let due = |b: &Block| (b.lanes[me()].copies.len() - 1).saturating_sub(N as usize);
        until(
            Wait::Copies { groups: N },
            |b| {
                let due = due(b);
                b.lanes[me()].copies.iter().take(due).flatten().all(|(_, landed)| landed.get())
            },
        );
        block(|b| {
            let lane = me();
            let now = (lane as u16, b.lanes[lane].clock);
            for _ in 0..due(b) {
                for (to, _) in b.lanes[lane].copies.pop_front().expect("as many as are due") {
                    for g in b.grains(to, 16, "copy_wait") {
                        b.shadows[g] = Shadow { writer: now, written: true, ..Shadow::default() };
                    }
                }
            }
        });
    }

    #[track_caller]
    pub unsafe fn ldmatrix(at: u32) -> [u32; 4] {
        let rows = exchange([at; 8], |all| all.map(|[row, ..]| row));
        std::array::from_fn(|i| {
            let from = rows[i * 8 + lane() as usize / 4] + lane() % 4 * 4;
            assert!(from.is_multiple_of(4), "ldmatrix: row addresses must be multiples of 16");
            block(|b| {
                b.check_read(from, 4, "ldmatrix", false);
                bytes_to(&b.shared[from as usize..from as usize + 4])
            })
        })
    }
    #[track_caller]
    pub unsafe fn ldmatrix_t(at: u32) -> [u32; 4] {
        let rows = exchange([at; 8], |all| all.map(|[row, ..]| row));
        std::array::from_fn(|i| {
            let half = |row: u32| {
                let from = rows[i * 8 + row as usize] + lane() / 4 * 2;
                block(|b| {
                    b.check_read(from, 2, "ldmatrix_t", false);
                    u32::from(bytes_to::<u16>(&b.shared[from as usize..from as usize + 2]))
                })
            };
            half(lane() % 4 * 2) | half(lane() % 4 * 2 + 1) << 16
        })
    }
    #[track_caller]
    pub unsafe fn stmatrix(at: u32, x: [u32; 4]) {
        let rows = exchange([at; 8], |all| all.map(|[row, ..]| row));
        for (i, x) in x.iter().enumerate() {
            let to = rows[i * 8 + lane() as usize / 4] + lane() % 4 * 4;
            block(|b| b.write(to, &x.to_le_bytes(), "stmatrix"));
        }
    }

    fn mma(acc: &mut [f32; 4], a: [u32; 4], b: [u32; 2], widen: fn([u16; 16]) -> [f32; 16]) {
        let lane = lane() as usize;
        // Rows lane/4 and + 8 of a, columns 2 (lane mod 4) and + 1 of b, 16 k each.
        let (rows, cols) = exchange([a[0], a[1], a[2], a[3], b[0], b[1], 0, 0], |all| {
            let halves = |first: usize, registers: [usize; 2]| {
                let word = |k: usize| all[first + k % 8 / 2][registers[k / 8]] >> (16 * (k % 2));
                widen(std::array::from_fn(|k| word(k) as u16))
            };
            let row = |half: usize| halves(lane / 4 * 4, [half, half + 2]);
            let col = |which: usize| halves((2 * (lane % 4) + which) * 4, [4, 5]);
            ([row(0), row(1)], [col(0), col(1)])
        });
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc += rows[i / 2].iter().zip(&cols[i % 2]).map(|(a, b)| a * b).sum::<f32>();
        }
    }
    pub fn mma_bf16(acc: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        mma(acc, a, b, widen_bf16);
    }
    pub fn mma_f16(acc: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        mma(acc, a, b, widen_f16);
    }
    fn widen_bf16(halves: [u16; 16]) -> [f32; 16] {
        halves.map(|x| f32::from_bits(u32::from(x) << 16))
    }
    fn widen_f16(halves: [u16; 16]) -> [f32; 16] {
        let mut wide = [0.0; 16];
        halves.reinterpret_cast::<half::f16>().convert_to_f32_slice(&mut wide);
        wide
    }

    pub unsafe fn mbarrier_init(at: u32, arrivals: u32) {
        block(|b| {
            b.write(at, &[0; 8], "mbarrier_init");
            let clock = vec![0; b.lanes.len() + 1 + MBARRIERS];
            let complete = clock.clone();
            let by = (me() as u16, b.lanes[me()].clock);
            let place = b.lanes.len() + 1 + b.mbarriers.len();
            assert!(place < clock.len(), "mbarrier_init: more than {MBARRIERS} of them");
            b.mbarriers.insert(at, Mbarrier { place, by, count: arrivals, pending: arrivals, bytes: 0, phase: 0, clock, complete });
        });
    }
    pub unsafe fn mbarrier_expect(at: u32, bytes: u32) {
        if omitted(Call::MbarrierExpect) {
            return;
        }
        block(|b| b.arrive(at, i64::from(bytes), "mbarrier_expect"));
    }
    pub unsafe fn mbarrier_arrive(at: u32) {
        if omitted(Call::MbarrierArrive) {
            return;
        }
        block(|b| b.arrive(at, 0, "mbarrier_arrive"));
    }
    pub unsafe fn mbarrier_wait(at: u32, parity: u32) {
        if omitted(Call::MbarrierWait) {
            return;
        }
        until(
            Wait::Phase { at, parity },
            |b| b.mbarrier(at, me(), "mbarrier_wait").phase != parity,
        );
        block(|b| {
            let mut seen = (*b.lanes[me()].seen).clone();
            join(&mut seen, &b.mbarrier(at, me(), "mbarrier_wait").complete);
            b.lanes[me()].seen = Rc::new(seen);
        });
    }
    pub fn fence_init() {}
    pub fn fence_async() {
        if omitted(Call::FenceAsync) {
            return;
        }
        block(|b| {
            let lane = &mut b.lanes[me()];
            lane.fenced = lane.stored;
        });
    }

    unsafe fn spec(map: u64) -> MapSpec {
        // SAFETY: the address of a kernel argument, by the caller's promise.
        let mut map = MapSpec::decode(unsafe { &*(map as *const crate::abi::TensorMap) });
        map.swizzle &= !omitted(Call::Swizzle);
        map
    }
    pub unsafe fn tma_load(to: u32, map: u64, x: u32, y: u32, barrier: u32) {
        // SAFETY: the caller's promise.
        let map = unsafe { spec(map) };
        let align = if map.swizzle { 1024 } else { 128 };
        assert!(to.is_multiple_of(align), "tma_load: destination {to} is not aligned to {align}");
        block(|b| {
            b.take_off(to, map.bytes(), "tma_load");
            b.late.push(Late::Load { by: me(), to, map, x, y, barrier });
        });
    }
    pub unsafe fn tma_store(from: u32, map: u64, x: u32, y: u32) {
        // SAFETY: the caller's promise.
        let map = unsafe { spec(map) };
        block(|b| {
            b.check_read(from, map.bytes(), "tma_store", true);
            b.store_clock += 1;
            let now = (b.reader() as u16, b.store_clock);
            for g in b.grains(from, map.bytes(), "tma_store") {
                b.shadows[g].reader = now;
                b.shadows[g].read = true;
            }
            let landed = Rc::new(Cell::new(false));
            let clock = b.store_clock;
            b.lanes[me()].stores.push((clock, Rc::clone(&landed)));
            b.late.push(Late::Store { from, map, x, y, landed });
        });
    }
    pub fn bulk_commit() {}
    pub fn bulk_wait_read() {
        if omitted(Call::BulkWaitRead) {
            return;
        }
        until(Wait::Stores, |b| b.lanes[me()].stores.iter().all(|(_, landed)| landed.get()));
        block(|b| {
            let reader = b.reader();
            let mut seen = (*b.lanes[me()].seen).clone();
            for (clock, _) in std::mem::take(&mut b.lanes[me()].stores) {
                seen[reader] = seen[reader].max(clock);
            }
            b.lanes[me()].seen = Rc::new(seen);
        });
    }
    /// Products of `wgmma`: reading them in flight panics.
    pub struct Accumulator<const N: usize>(Rc<Registers>);

    pub fn accumulator<const N: usize>() -> Accumulator<N> {
        let touched = Cell::new(block(|b| b.lanes[me()].fences));
        Accumulator(Rc::new(Registers { values: vec![Cell::new(0.0); N], flying: Cell::new(0), touched }))
    }
    impl<const N: usize> Accumulator<N> {
        fn touch(&self) {
            assert_eq!(self.0.flying.get(), 0, "lane {} touches an accumulator whose products are in flight", me());
            self.0.touched.set(block(|b| b.lanes[me()].fences));
        }
    }
    impl<const N: usize> std::ops::Index<usize> for Accumulator<N> {
        type Output = f32;
        fn index(&self, i: usize) -> &f32 {
            self.touch();
            // SAFETY: the cell is written by `IndexMut`, which excludes this borrow, and by `wgmma_wait`, which this lane
            // calls only when the borrow of a copyable number is over.
            unsafe { &*self.0.values[i].as_ptr() }
        }
    }
    impl<const N: usize> std::ops::IndexMut<usize> for Accumulator<N> {
        fn index_mut(&mut self, i: usize) -> &mut f32 {
            self.touch();
            // SAFETY: as above.
            unsafe { &mut *self.0.values[i].as_ptr() }
        }
    }

    fn issue<const N: usize>(
        acc: &mut Accumulator<N>,
        [a, b]: [Operand; 2],
        accumulate: u32,
        widen: fn([u16; 16]) -> [f32; 16],
    ) {
        let fences = block(|b| b.lanes[me()].fences);
        assert!(acc.0.touched.get() < fences, "wgmma: lane {} has not fenced this accumulator since it touched it", me());
        acc.0.flying.set(acc.0.flying.get() + 1);
        let product = Product { acc: Rc::clone(&acc.0), a, b, accumulate: accumulate != 0, widen };
        block(|b| b.lanes[me()].products.back_mut().expect("an open group").push(product));
    }
    macro_rules! wgmma {
        ($($name:ident $n:literal $widen:ident;)*) => {$(
            pub unsafe fn $name<const TA: u32, const TB: u32>(acc: &mut Accumulator<$n>, a: u64, b: u64, accumulate: u32) {
                issue(acc, [Operand::new(a, TA == 1), Operand::new(b, TB == 1)], accumulate, $widen);
            }
        )*};
    }
    wgmma! {
        wgmma_n128_bf16 64 widen_bf16;
        wgmma_n256_bf16 128 widen_bf16;
        wgmma_n128_f16 64 widen_f16;
        wgmma_n256_f16 128 widen_f16;
    }
    #[track_caller]
    fn meet_group() {
        gather(Meeting::Warpgroup(LANE.get() / 128), 128, false);
    }
    #[track_caller]
    pub fn wgmma_fence() {
        if omitted(Call::WgmmaFence) {
            return;
        }
        meet_group();
        block(|b| b.lanes[me()].fences += 1);
    }
    #[track_caller]
    pub fn wgmma_commit() {
        meet_group();
        block(|b| b.lanes[me()].products.push_back(Vec::new()));
    }
    #[track_caller]
    pub fn wgmma_wait<const N: u32>() {
        if omitted(Call::WgmmaWait) {
            return;
        }
        let due = block(|b| (b.lanes[me()].products.len() - 1).saturating_sub(N as usize));
        for _ in 0..due {
            let group = block(|b| b.lanes[me()].products.pop_front()).expect("as many as are due");
            group.into_iter().for_each(Product::retire);
        }
        // The warp's reads are over for all its lanes: any of them may release the operands.
        sync_warp();
    }
    #[track_caller]
    pub fn registers_up<const N: u32>() {
        meet_group();
    }
    #[track_caller]
    pub fn registers_down<const N: u32>() {
        meet_group();
    }
}
