//! The host twin as a card: the engine's own launches, run by the kernels' shim.

use contrastive::device::cuda::card::{Card, MapSpec};
use contrastive::device::cuda::{CudaError, Driver};
use kernels::abi::{Args, Kernel, TensorMap};
use kernels::simt::shim::{self, Memory};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// A card of `capability` that runs on this machine. Everything random about it follows from `seed`.
pub struct Twin {
    capability: [u32; 2],
    multiprocessors: u32,
    seed: AtomicU64,
    memory: Mutex<BTreeMap<usize, Memory>>,
    given_back: AtomicU64,
    /// Calls that made the host wait.
    waits: AtomicUsize,
    allocations: AtomicUsize,
    replays: AtomicUsize,
    graphs: bool,
    recording: Mutex<Option<Graph>>,
}

/// Recorded work, in order.
pub type Graph = Vec<Arc<dyn Fn(&Twin) + Send + Sync>>;

impl Twin {
    pub fn new(capability: [u32; 2], seed: u64) -> Self {
        Twin {
            capability,
            multiprocessors: 3,
            seed: AtomicU64::new(seed),
            memory: Mutex::default(),
            given_back: AtomicU64::new(0),
            waits: AtomicUsize::new(0),
            allocations: AtomicUsize::new(0),
            replays: AtomicUsize::new(0),
            graphs: true,
            recording: Mutex::new(None),
        }
    }

    /// Does work, or writes it down.
    fn give(&self, work: impl Fn(&Twin) + Send + Sync + 'static) {
        let mut recording = self.recording.lock().unwrap();
        match &mut *recording {
            Some(graph) => graph.push(Arc::new(work)),
            None => {
                drop(recording);
                work(self);
            }
        }
    }

    /// A call between host and card, which a recording has no place for.
    fn wait(&self, call: &'static str) -> Result<(), CudaError> {
        if self.recording.lock().unwrap().is_some() {
            return Err(CudaError::Recording { call });
        }
        self.waits.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The allocation that holds an address, and how far into it the address is.
    fn with<R>(&self, at: *const u8, f: impl FnOnce(&Memory, usize) -> R) -> R {
        let memory = self.memory.lock().unwrap();
        let (start, found) = memory.range(..=at.addr()).next_back().expect("an address of this card");
        f(found, at.addr() - start)
    }
}

/// An address that may change threads: only the twin follows it.
#[derive(Clone, Copy)]
struct At(usize);

impl At {
    fn of<T>(at: *const T) -> Self {
        At(at.expose_provenance())
    }
    fn ptr(self) -> *const u8 {
        std::ptr::with_exposed_provenance(self.0)
    }
}

/// A kernel's argument, whose addresses only the twin follows.
struct Sent<A>(A);
// SAFETY: plain numbers and addresses that nothing but the twin's own memory is read or written by.
unsafe impl<A> Send for Sent<A> {}
// SAFETY: as above.
unsafe impl<A> Sync for Sent<A> {}

impl Card for Twin {
    type Graph = Graph;

    fn alloc(&self, bytes: usize) -> Result<*mut u8, CudaError> {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        let memory = Memory::new(bytes);
        let at = memory.address();
        self.memory.lock().unwrap().insert(at, memory);
        Ok(std::ptr::with_exposed_provenance_mut(at))
    }
    unsafe fn free(&self, at: *mut u8) {
        self.given_back.fetch_add(1, Ordering::Relaxed);
        self.memory.lock().unwrap().remove(&at.addr()).expect("an allocation of this card");
    }
    unsafe fn upload(&self, from: &[u8], to: *mut u8) -> Result<(), CudaError> {
        self.wait("upload")?;
        self.with(to, |memory, at| memory.upload(at, from));
        Ok(())
    }
    unsafe fn download(&self, from: *const u8, to: &mut [u8]) -> Result<(), CudaError> {
        self.wait("download")?;
        self.with(from, |memory, at| memory.download(at, to));
        Ok(())
    }
    unsafe fn copy(&self, from: *const u8, to: *mut u8, bytes: usize) -> Result<(), CudaError> {
        let (from, to) = (At::of(from), At::of(to));
        self.give(move |twin| {
            let mut through = vec![0; bytes];
            twin.with(from.ptr(), |memory, at| memory.download(at, &mut through));
            twin.with(to.ptr(), |memory, at| memory.upload(at, &through));
        });
        Ok(())
    }
    unsafe fn fill(&self, byte: u8, to: *mut u8, bytes: usize) -> Result<(), CudaError> {
        let to = At::of(to);
        self.give(move |twin| twin.with(to.ptr(), |memory, at| memory.upload(at, &vec![byte; bytes])));
        Ok(())
    }
    unsafe fn launch<A: Args>(&self, kernel: &Kernel<A>, grid: [u32; 3], args: &A) -> Result<(), CudaError> {
        let (kernel, args) = (Kernel { ..*kernel }, Sent(*args));
        self.give(move |twin| {
            let args = &args;
            let seed = twin.seed.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the caller's promise; the twin checks every address it follows.
            unsafe { shim::launch(&kernel, grid, &args.0, seed) };
        });
        Ok(())
    }
    fn synchronise(&self) -> Result<(), CudaError> {
        self.wait("synchronise")
    }
    fn free_bytes(&self) -> usize {
        1 << 30
    }
    fn given_back(&self) -> u64 {
        self.given_back.load(Ordering::Relaxed)
    }
    fn tensor_map(&self, spec: &MapSpec) -> Result<TensorMap, CudaError> {
        spec.check()?;
        let [x, y] = spec.dims;
        Ok(shim::MapSpec {
            address: spec.base.addr() as u64,
            size: [x.size as u32, y.size as u32],
            pitch: y.stride,
            tile: [x.tile, y.tile],
            element: 2,
            swizzle: true,
        }
        .encode())
    }
    /// Few, so that kernels which walk over tiles do walk.
    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }
    fn capability(&self) -> [u32; 2] {
        self.capability
    }
    fn capture(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Graph, CudaError> {
        if !self.graphs {
            return Err(CudaError::Recording { call: "capture" });
        }
        *self.recording.lock().unwrap() = Some(vec![]);
        let done = work();
        let graph = self.recording.lock().unwrap().take().expect("begun above");
        done.map(|()| graph)
    }
    unsafe fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        self.replays.fetch_add(1, Ordering::Relaxed);
        graph.iter().for_each(|work| work(self));
        Ok(())
    }
}

/// The twin, or with `CONTRASTIVE_CARD=K` in the environment card K of this machine: what the tests of a card run on.
pub enum Machine {
    Twin(Twin),
    Card(Driver),
}

impl Machine {
    /// The twin of a card of `capability`; a real card has its own.
    pub fn new(capability: [u32; 2], seed: u64) -> Self {
        match std::env::var("CONTRASTIVE_CARD") {
            Ok(ordinal) => Machine::Card(Driver::new(ordinal.parse().expect("a number")).expect("a card")),
            Err(_) => Machine::Twin(Twin::new(capability, seed)),
        }
    }

    /// A twin that records no graphs, or does; a real card does.
    pub fn with_graphs(mut self, graphs: bool) -> Self {
        if let Machine::Twin(twin) = &mut self {
            twin.graphs = graphs;
        }
        self
    }

    /// A twin of more multiprocessors than small batches have tiles; a real card has its own.
    pub fn with_room(mut self) -> Self {
        if let Machine::Twin(twin) = &mut self {
            twin.multiprocessors = 9;
        }
        self
    }

    /// Graphs run so far: the twin counts them.
    pub fn replays(&self) -> Option<usize> {
        match self {
            Machine::Twin(t) => Some(t.replays.load(Ordering::Relaxed)),
            Machine::Card(_) => None,
        }
    }

    /// Calls so far that made the host wait for the card, and allocations: the twin counts them.
    pub fn counts(&self) -> Option<[usize; 2]> {
        match self {
            Machine::Twin(t) => Some([&t.waits, &t.allocations].map(|n| n.load(Ordering::Relaxed))),
            Machine::Card(_) => None,
        }
    }

    /// Whether this is a card, which has time for more.
    pub fn is_card(&self) -> bool {
        matches!(self, Machine::Card(_))
    }
}

/// The same call on whichever it is.
macro_rules! each {
    ($machine:expr, $card:ident => $call:expr) => {
        match $machine {
            Machine::Twin($card) => $call,
            Machine::Card($card) => $call,
        }
    };
}

impl Card for Machine {
    type Graph = Result<<Driver as Card>::Graph, Graph>;

    fn alloc(&self, bytes: usize) -> Result<*mut u8, CudaError> {
        each!(self, c => c.alloc(bytes))
    }
    unsafe fn free(&self, at: *mut u8) {
        // SAFETY: the caller's promise, here and below.
        each!(self, c => unsafe { c.free(at) })
    }
    unsafe fn upload(&self, from: &[u8], to: *mut u8) -> Result<(), CudaError> {
        // SAFETY: as above.
        each!(self, c => unsafe { c.upload(from, to) })
    }
    unsafe fn download(&self, from: *const u8, to: &mut [u8]) -> Result<(), CudaError> {
        // SAFETY: as above.
        each!(self, c => unsafe { c.download(from, to) })
    }
    unsafe fn copy(&self, from: *const u8, to: *mut u8, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: as above.
        each!(self, c => unsafe { c.copy(from, to, bytes) })
    }
    unsafe fn fill(&self, byte: u8, to: *mut u8, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: as above.
        each!(self, c => unsafe { c.fill(byte, to, bytes) })
    }
    unsafe fn launch<A: Args>(&self, kernel: &Kernel<A>, grid: [u32; 3], args: &A) -> Result<(), CudaError> {
        // SAFETY: as above.
        each!(self, c => unsafe { c.launch(kernel, grid, args) })
    }
    fn synchronise(&self) -> Result<(), CudaError> {
        each!(self, c => c.synchronise())
    }
    fn tensor_map(&self, spec: &MapSpec) -> Result<TensorMap, CudaError> {
        each!(self, c => c.tensor_map(spec))
    }
    fn free_bytes(&self) -> usize {
        each!(self, c => c.free_bytes())
    }
    fn given_back(&self) -> u64 {
        each!(self, c => c.given_back())
    }
    fn multiprocessors(&self) -> u32 {
        each!(self, c => c.multiprocessors())
    }
    fn capability(&self) -> [u32; 2] {
        each!(self, c => c.capability())
    }
    fn capture(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Self::Graph, CudaError> {
        match self {
            Machine::Twin(c) => c.capture(work).map(Err),
            Machine::Card(c) => c.capture(work).map(Ok),
        }
    }
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), CudaError> {
        match (self, graph) {
            // SAFETY: the caller's promise.
            (Machine::Card(c), Ok(graph)) => unsafe { c.replay(graph) },
            // SAFETY: the caller's promise.
            (Machine::Twin(c), Err(graph)) => unsafe { c.replay(graph) },
            _ => panic!("a graph of another card"),
        }
    }
}
