//! The card that is there, through the driver's library, which is looked for at run time.
//!
//! Types come from `cudarc`; the calls are looked up here, because there a function that the library lacks is a panic,
//! and an answer that cuda.h of 12.0 did not know is no value of the `enum` it is returned as. Here the one is an
//! error, the other a number. That each call is declared as `cudarc` has it is checked by the compiler.

use super::card::{Card, MapSpec};
use super::{CardInfo, Code, CudaError, argument_bytes, name, ptx, runs, supported};
use crate::objective::Precision;
use cudarc::driver::{CudaContext, CudaStream, sys};
use kernels::abi::{Args, Kernel, Module, TensorMap};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::mem::ManuallyDrop;
use std::ptr::{null, null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Answers with a meaning here, as cuda.h numbers them.
const SUCCESS: u32 = 0;
const OUT_OF_MEMORY: u32 = 2;
const NEWER_DRIVER: u32 = 36;
const NO_DEVICE: u32 = 100;

/// Dynamic shared memory that a kernel may have without asking for it.
const SHARED_UNASKED: u32 = 48 << 10;
/// Bytes of what the driver's compiler may say.
const LOG: usize = 16 << 10;

/// Declares [`Calls`]: a field for each function of the driver, with its arguments.
macro_rules! calls {
    ($($call:ident($($argument:ty),*);)*) => {
        /// The driver's functions, each answering a number.
        #[expect(non_snake_case, reason = "the driver's names")]
        struct Calls {
            $($call: unsafe extern "C" fn($($argument),*) -> u32,)*
            /// Not among the others, as its first argument is an answer.
            name: Option<unsafe extern "C" fn(u32, *mut *const c_char) -> u32>,
        }

        // The arguments are those that cudarc takes from cuda.h.
        $(const _: unsafe fn($($argument),*) -> sys::CUresult = sys::$call;)*

        impl Calls {
            /// Looks all of them up; one that the library lacks will answer [`NEWER_DRIVER`].
            fn load() -> Result<Self, CudaError> {
                $(
                    #[expect(non_snake_case, reason = "the driver's name")]
                    unsafe extern "C" fn $call($(_: $argument),*) -> u32 {
                        NEWER_DRIVER
                    }
                )*
                // SAFETY: this only tries to load the library by name. Loading it runs its constructors, which the
                // driver's library is made for.
                if !unsafe { sys::is_culib_present() } {
                    return Err(CudaError::NoDriver);
                }
                // SAFETY: the library is present, by the lines above; it stays loaded for ever.
                let library = unsafe { sys::culib() };
                Ok(Self {
                    $($call: {
                        // SAFETY: a function of this name takes these arguments, as checked against cudarc above, and
                        // returns a C enumeration, which is 32 bits wide; u32 has room for all its values.
                        let found = unsafe { library.get(concat!(stringify!($call), "\0").as_bytes()) };
                        found.map_or($call as unsafe extern "C" fn($($argument),*) -> u32, |found| *found)
                    },)*
                    // SAFETY: as above; the first argument is the enumeration.
                    name: unsafe { library.get(b"cuGetErrorName\0".as_slice()) }.ok().map(|found| *found),
                })
            }
        }
    };
}

calls! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut sys::CUdevice, c_int);
    cuDeviceGetName(*mut c_char, c_int, sys::CUdevice);
    cuDeviceTotalMem_v2(*mut usize, sys::CUdevice);
    cuDeviceGetAttribute(*mut c_int, sys::CUdevice_attribute, sys::CUdevice);
    cuDevicePrimaryCtxRetain(*mut sys::CUcontext, sys::CUdevice);
    cuDevicePrimaryCtxRelease_v2(sys::CUdevice);
    cuCtxGetCurrent(*mut sys::CUcontext);
    cuCtxPushCurrent_v2(sys::CUcontext);
    cuCtxPopCurrent_v2(*mut sys::CUcontext);
    cuCtxGetDevice(*mut sys::CUdevice);
    cuStreamCreate(*mut sys::CUstream, c_uint);
    cuStreamDestroy_v2(sys::CUstream);
    cuStreamSynchronize(sys::CUstream);
    cuStreamIsCapturing(sys::CUstream, *mut sys::CUstreamCaptureStatus);
    cuStreamBeginCapture_v2(sys::CUstream, sys::CUstreamCaptureMode);
    cuStreamEndCapture(sys::CUstream, *mut sys::CUgraph);
    cuGraphInstantiateWithFlags(*mut sys::CUgraphExec, sys::CUgraph, c_ulonglong);
    cuGraphLaunch(sys::CUgraphExec, sys::CUstream);
    cuGraphExecDestroy(sys::CUgraphExec);
    cuGraphDestroy(sys::CUgraph);
    cuModuleLoadDataEx(*mut sys::CUmodule, *const c_void, c_uint, *mut sys::CUjit_option, *mut *mut c_void);
    cuModuleGetFunction(*mut sys::CUfunction, sys::CUmodule, *const c_char);
    cuModuleUnload(sys::CUmodule);
    cuFuncSetAttribute(sys::CUfunction, sys::CUfunction_attribute, c_int);
    cuLaunchKernel(
        sys::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, sys::CUstream, *mut *mut c_void,
        *mut *mut c_void
    );
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemAlloc_v2(*mut sys::CUdeviceptr, usize);
    cuMemFree_v2(sys::CUdeviceptr);
    cuMemcpyHtoDAsync_v2(sys::CUdeviceptr, *const c_void, usize, sys::CUstream);
    cuMemcpyDtoHAsync_v2(*mut c_void, sys::CUdeviceptr, usize, sys::CUstream);
    cuMemcpyDtoDAsync_v2(sys::CUdeviceptr, sys::CUdeviceptr, usize, sys::CUstream);
    cuMemsetD8Async(sys::CUdeviceptr, c_uchar, usize, sys::CUstream);
    cuTensorMapEncodeTiled(
        *mut sys::CUtensorMap, sys::CUtensorMapDataType, u32, *mut c_void, *const u64, *const u64, *const u32,
        *const u32, sys::CUtensorMapInterleave, sys::CUtensorMapSwizzle, sys::CUtensorMapL2promotion,
        sys::CUtensorMapFloatOOBfill
    );
}

/// `call!(calls, cuX(arguments))` as a result.
macro_rules! call {
    ($calls:expr, $call:ident($($argument:expr),* $(,)?)) => {{
        let answer = ($calls.$call)($($argument),*);
        $calls.check(stringify!($call), answer)
    }};
}

impl Calls {
    /// The driver's functions, looked up at the first use.
    fn get() -> Result<&'static Self, CudaError> {
        static CALLS: OnceLock<Calls> = OnceLock::new();
        match CALLS.get() {
            Some(calls) => Ok(calls),
            None => Self::load().map(|calls| CALLS.get_or_init(|| calls)),
        }
    }

    fn check(&self, call: &'static str, answer: u32) -> Result<(), CudaError> {
        if answer == SUCCESS { Ok(()) } else { Err(CudaError::Driver { call, code: self.code(answer) }) }
    }

    fn code(&self, number: u32) -> Code {
        let mut text: *const c_char = null();
        if let Some(name) = self.name {
            // SAFETY: writes one pointer, null where it does not know the number.
            unsafe { name(number, &raw mut text) };
        }
        let name = if text.is_null() {
            "unnamed".into()
        } else {
            // SAFETY: the driver's names are constants that end with a zero.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        Code { number, name }
    }

    /// The driver's CUDA version, 1000 major + 10 minor. Needs no [`Self::start`].
    fn version(&self) -> Result<u32, CudaError> {
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { call!(self, cuDriverGetVersion(&raw mut version)) }?;
        Ok(version.unsigned_abs())
    }

    /// Starts the driver and counts its cards.
    fn start(&self) -> Result<usize, CudaError> {
        // SAFETY: may be called at any time, and again.
        match unsafe { (self.cuInit)(0) } {
            NO_DEVICE => return Ok(0),
            answer => self.check("cuInit", answer)?,
        }
        let mut count = 0;
        // SAFETY: writes one integer.
        unsafe { call!(self, cuDeviceGetCount(&raw mut count)) }?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The handle of card `ordinal`, with the driver started.
    fn device(&self, ordinal: usize) -> Result<sys::CUdevice, CudaError> {
        let mut device = 0;
        // SAFETY: writes one handle; an ordinal the driver does not know is an answer.
        unsafe { call!(self, cuDeviceGet(&raw mut device, c_int::try_from(ordinal).unwrap_or(c_int::MAX))) }?;
        Ok(device)
    }

    fn attribute(&self, device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<u32, CudaError> {
        let mut value = 0;
        // SAFETY: writes one integer; an attribute or a handle the driver does not know is an answer.
        unsafe { call!(self, cuDeviceGetAttribute(&raw mut value, which, device)) }?;
        Ok(value.unsigned_abs())
    }

    fn capability(&self, device: sys::CUdevice) -> Result<[u32; 2], CudaError> {
        use sys::CUdevice_attribute_enum as Attribute;
        Ok([
            self.attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            self.attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ])
    }
}

/// All cards of this machine, usable or not: see [`CardInfo::module`].
///
/// # Errors
/// [`CudaError`] when there is no driver, or it does not answer.
pub fn cards() -> Result<Vec<CardInfo>, CudaError> {
    let calls = Calls::get()?;
    let driver = calls.version()?;
    (0..calls.start()?)
        .map(|ordinal| {
            let device = calls.device(ordinal)?;
            let mut name = [0u8; 256];
            // SAFETY: writes at most as many bytes as it is told of, less than which the array has.
            unsafe { call!(calls, cuDeviceGetName(name.as_mut_ptr().cast(), 255, device)) }?;
            let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned();
            let mut memory = 0;
            // SAFETY: writes one number.
            unsafe { call!(calls, cuDeviceTotalMem_v2(&raw mut memory, device)) }?;
            Ok(CardInfo { name, memory, capability: calls.capability(device)?, driver })
        })
        .collect()
}

/// A card with a stream: the real [`Card`]. Handles of it are made and given back by its own calls; the context is made
/// current for each of them and put back after, so that other users of the driver in this process are not disturbed.
#[derive(Debug)]
pub struct Driver(Arc<Inner>);

/// A recorded sequence of launches on a [`Driver`], which it keeps alive.
#[derive(Debug)]
pub struct Graph {
    raw: sys::CUgraphExec,
    on: Arc<Inner>,
}

struct Inner {
    calls: &'static Calls,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// The device whose primary context is held and whose stream is ours, unless both are a caller's.
    owned: Option<sys::CUdevice>,
    /// Whose they are, where `cudarc` made them.
    cudarc: Option<Arc<CudaStream>>,
    capability: [u32; 2],
    multiprocessors: u32,
    kernels: Mutex<Loaded>,
    /// Allocations given back.
    given_back: AtomicU64,
    /// Held across each call that must not fall into a recording, and while one begins; memory given back during one.
    quiet: Mutex<Vec<sys::CUdeviceptr>>,
}

#[derive(Default)]
struct Loaded {
    modules: Vec<(Module, sys::CUmodule)>,
    functions: BTreeMap<&'static str, Function>,
}

#[derive(Clone, Copy)]
struct Function {
    raw: sys::CUfunction,
    module: Module,
    /// Of its argument.
    bytes: usize,
}

// SAFETY: the driver's handles are valid in every thread of the process, and its functions may be called from all of
// them at once; each call makes the context current in its own thread. What changes here is behind a mutex.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}
// SAFETY: a handle valid in every thread; nothing changes through a graph but by the driver, which orders it.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { context, stream, capability, .. } = self;
        f.debug_struct("Inner").field("context", context).field("stream", stream).field("sm", capability).finish()
    }
}

impl Driver {
    /// Card `ordinal`, counted from 0 as the driver counts, in its primary context with a stream of its own.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], [`CudaError::NoSuchCard`], [`CudaError::Unsupported`], or
    /// [`CudaError::Driver`] when it does not answer.
    pub fn new(ordinal: usize) -> Result<Self, CudaError> {
        let calls = Calls::get()?;
        let version = calls.version()?;
        let count = calls.start()?;
        if ordinal >= count {
            return Err(CudaError::NoSuchCard { ordinal, count });
        }
        let device = calls.device(ordinal)?;
        supported(version, calls.capability(device)?)?;
        let mut context = null_mut();
        // SAFETY: writes one handle, given back in `Inner::drop`.
        unsafe { call!(calls, cuDevicePrimaryCtxRetain(&raw mut context, device)) }?;
        // From here on whatever fails gives the context back.
        let mut inner = Inner::new(calls, context, null_mut(), Some(device));
        inner.describe(device)?;
        {
            let _current = inner.current()?;
            let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as c_uint;
            let mut stream = null_mut();
            // SAFETY: writes one handle, given back in `Inner::drop`.
            unsafe { call!(calls, cuStreamCreate(&raw mut stream, flags)) }?;
            inner.stream = stream;
        }
        Ok(Self(Arc::new(inner)))
    }

    /// `cudarc`'s stream, and its context. Graphs cannot be recorded on the default stream.
    ///
    /// # Errors
    /// [`CudaError::DriverTooOld`], [`CudaError::Unsupported`] or [`CudaError::Driver`].
    pub fn of_cudarc(stream: &Arc<CudaStream>) -> Result<Self, CudaError> {
        Self::of_handles(stream.context().cu_ctx(), stream.cu_stream(), Some(Arc::clone(stream)))
    }

    /// A caller's own context and stream, as the driver's `CUcontext` and `CUstream`. Graphs cannot be recorded on the
    /// null stream.
    ///
    /// # Safety
    /// Both are living handles, the stream one of the context, and stay so until this value and all buffers and
    /// graphs made with it are gone.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`], [`CudaError::Unsupported`] or [`CudaError::Driver`].
    pub unsafe fn of_stream(context: *mut c_void, stream: *mut c_void) -> Result<Self, CudaError> {
        Self::of_handles(context.cast(), stream.cast(), None)
    }

    /// Living handles, by the caller's promise or because `cudarc` is kept.
    fn of_handles(
        context: sys::CUcontext,
        stream: sys::CUstream,
        cudarc: Option<Arc<CudaStream>>,
    ) -> Result<Self, CudaError> {
        let calls = Calls::get()?;
        let version = calls.version()?;
        let mut inner = Inner::new(calls, context, stream, None);
        inner.cudarc = cudarc;
        let mut device = 0;
        {
            let _current = inner.current()?;
            // SAFETY: writes one handle, that of the current context's device.
            unsafe { call!(calls, cuCtxGetDevice(&raw mut device)) }?;
        }
        supported(version, calls.capability(device)?)?;
        inner.describe(device)?;
        Ok(Self(Arc::new(inner)))
    }

    /// `cudarc`'s stream, on which this card's work runs, where that is in `context`.
    pub(super) fn stream_in(&self, context: &CudaContext) -> Result<&CudaStream, CudaError> {
        match &self.0.cudarc {
            Some(stream) if stream.context().cu_ctx() == context.cu_ctx() => Ok(stream),
            _ => Err(CudaError::OtherCard),
        }
    }

    /// Fails for memory of another context.
    #[cfg(feature = "cust")]
    pub(super) fn holds(&self, at: sys::CUdeviceptr) -> Result<(), CudaError> {
        use cust::sys::{CUpointer_attribute_enum::CU_POINTER_ATTRIBUTE_CONTEXT, cuPointerGetAttribute};
        let mut context: sys::CUcontext = null_mut();
        // SAFETY: writes one handle; any address may be asked about.
        let answer = unsafe { cuPointerGetAttribute((&raw mut context).cast(), CU_POINTER_ATTRIBUTE_CONTEXT, at) };
        if answer as u32 == SUCCESS && context == self.0.context { Ok(()) } else { Err(CudaError::OtherCard) }
    }

    /// The stream, as the driver's `CUstream`, for others to add work to or to wait for.
    pub fn stream(&self) -> *mut c_void {
        self.0.stream.cast()
    }
}

/// A context made current in this thread; puts the one before it back.
struct Current {
    calls: &'static Calls,
    pushed: bool,
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = null_mut();
            // SAFETY: on top of this thread's stack of contexts is the one that `Inner::current` pushed: what was pushed
            // since has been popped by a value of this type that was dropped before.
            let _ = unsafe { (self.calls.cuCtxPopCurrent_v2)(&raw mut popped) };
        }
    }
}

impl Inner {
    fn new(
        calls: &'static Calls,
        context: sys::CUcontext,
        stream: sys::CUstream,
        owned: Option<sys::CUdevice>,
    ) -> Self {
        let (kernels, given_back, quiet) = Default::default();
        let (capability, multiprocessors, cudarc) = Default::default();
        Self { calls, context, stream, owned, cudarc, capability, multiprocessors, kernels, given_back, quiet }
    }

    fn describe(&mut self, device: sys::CUdevice) -> Result<(), CudaError> {
        self.capability = self.calls.capability(device)?;
        let which = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        self.multiprocessors = self.calls.attribute(device, which)?;
        Ok(())
    }

    /// Makes the context this thread's current one for as long as the value lives.
    fn current(&self) -> Result<Current, CudaError> {
        let mut found = null_mut();
        // SAFETY: writes one handle.
        unsafe { call!(self.calls, cuCtxGetCurrent(&raw mut found)) }?;
        let pushed = found != self.context;
        if pushed {
            // SAFETY: the context lives: it is held, or its owner promised so.
            unsafe { call!(self.calls, cuCtxPushCurrent_v2(self.context)) }?;
        }
        Ok(Current { calls: self.calls, pushed })
    }

    fn is_recording(&self) -> Result<bool, CudaError> {
        // Room for the enumeration, whatever its value: 0 says that nothing is recorded.
        let mut status = 0u32;
        // SAFETY: writes a C enumeration, 32 bits; the stream lives and its context is current.
        unsafe { call!(self.calls, cuStreamIsCapturing(self.stream, (&raw mut status).cast())) }?;
        Ok(status != 0)
    }

    /// Keeps recordings from beginning for as long as the value lives; fails while one is under way. Gives back what
    /// was freed during the last.
    fn quiet(&self, call: &'static str) -> Result<MutexGuard<'_, Vec<sys::CUdeviceptr>>, CudaError> {
        let mut freed = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_recording()? {
            return Err(CudaError::Recording { call });
        }
        if !freed.is_empty() {
            self.wait()?;
            freed.drain(..).for_each(|at| self.give_back(at));
        }
        Ok(freed)
    }

    fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives and its context is current.
        unsafe { call!(self.calls, cuStreamSynchronize(self.stream)) }
    }

    fn give_back(&self, at: sys::CUdeviceptr) {
        // SAFETY: made by `cuMemAlloc` in this context, given back once (the contract of `Card::free`), and the stream
        // is done with it. An answer other than success reports what failed earlier; those who wait get it too.
        let _ = unsafe { (self.calls.cuMemFree_v2)(at) };
    }

    /// The kernel's handle, loading its module at the first use.
    fn function<A: Args>(&self, kernel: &Kernel<A>) -> Result<sys::CUfunction, CudaError> {
        let mut loaded = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let misfit = |log: String| CudaError::Load { module: name(kernel.module), log };
        let function = match loaded.functions.get(kernel.name) {
            Some(function) => *function,
            None => {
                let module = match loaded.modules.iter().find(|(module, _)| *module == kernel.module) {
                    Some((_, raw)) => *raw,
                    None => {
                        let raw = self.load(kernel.module)?;
                        loaded.modules.push((kernel.module, raw));
                        raw
                    }
                };
                let Some(bytes) = argument_bytes(ptx(kernel.module)?, kernel.name) else {
                    return Err(misfit(format!("no {} with one struct for its argument", kernel.name)));
                };
                let entry = CString::new(kernel.name).map_err(|e| misfit(e.to_string()))?;
                let mut raw = null_mut();
                // SAFETY: the module is loaded in the current context; the name ends with a zero; writes one handle.
                unsafe { call!(self.calls, cuModuleGetFunction(&raw mut raw, module, entry.as_ptr())) }
                    .map_err(|e| misfit(format!("{}: {e}", kernel.name)))?;
                if kernel.shared > SHARED_UNASKED {
                    let which = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    let shared = c_int::try_from(kernel.shared).unwrap_or(c_int::MAX);
                    // SAFETY: the function is of a loaded module; too much shared memory is an answer.
                    unsafe { call!(self.calls, cuFuncSetAttribute(raw, which, shared)) }
                        .map_err(|e| misfit(format!("{} with {shared} bytes shared: {e}", kernel.name)))?;
                }
                let function = Function { raw, module: kernel.module, bytes };
                loaded.functions.insert(kernel.name, function);
                function
            }
        };
        if function.bytes != size_of::<A>() || function.module != kernel.module {
            let Function { bytes, module, .. } = function;
            let (found, in_module) = (size_of::<A>(), name(module));
            return Err(misfit(format!("{} of {in_module} takes {bytes} bytes, not {found}", kernel.name)));
        }
        Ok(function.raw)
    }

    /// Has the driver compile a module.
    fn load(&self, module: Module) -> Result<sys::CUmodule, CudaError> {
        if !runs(module, self.capability) {
            let needed = match module {
                Module::Portable => "8.0 or later",
                Module::Hopper => "9.0 and no other",
            };
            return Err(CudaError::Unsupported { found: self.capability, needed });
        }
        let misfit = |log: String| CudaError::Load { module: name(module), log };
        let text = CString::new(ptx(module)?).map_err(|e| misfit(e.to_string()))?;
        let mut log = vec![0u8; LOG];
        let mut options = [
            sys::CUjit_option_enum::CU_JIT_ERROR_LOG_BUFFER,
            sys::CUjit_option_enum::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        ];
        // A number is passed as the value of a pointer; one byte stays a zero whatever is written.
        let mut values = [log.as_mut_ptr().cast(), without_provenance_mut(LOG - 1)];
        let mut raw = null_mut();
        // SAFETY: the text ends with a zero and outlives the call, as do the options, their values, of which there are
        // two each, and the log, which has the room it is said to have; writes one handle.
        let loaded = unsafe {
            call!(
                self.calls,
                cuModuleLoadDataEx(
                    &raw mut raw,
                    text.as_ptr().cast(),
                    options.len() as c_uint,
                    options.as_mut_ptr(),
                    values.as_mut_ptr(),
                )
            )
        };
        loaded.map(|()| raw).map_err(|answer| {
            let said = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
            misfit(format!("{answer} {}", said.trim()).trim_end().to_owned())
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nothing can be told to anybody here; answers other than success report what failed earlier.
        if let Ok(_current) = self.current() {
            let _ = self.wait();
            for at in std::mem::take(self.quiet.get_mut().unwrap_or_else(PoisonError::into_inner)) {
                self.give_back(at);
            }
            for (_, module) in &self.kernels.get_mut().unwrap_or_else(PoisonError::into_inner).modules {
                // SAFETY: loaded in this context, unloaded once, and nothing runs any more; graphs, which hold
                // functions of it, hold this value too.
                let _ = unsafe { (self.calls.cuModuleUnload)(*module) };
            }
            if self.owned.is_some() && !self.stream.is_null() {
                // SAFETY: our own stream, destroyed once; graphs hold this value.
                let _ = unsafe { (self.calls.cuStreamDestroy_v2)(self.stream) };
            }
        }
        if let Some(device) = self.owned {
            // SAFETY: held since `Driver::new`, given back once, after all that was made in it.
            let _ = unsafe { (self.calls.cuDevicePrimaryCtxRelease_v2)(device) };
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(_current) = self.on.current() {
            // SAFETY: made in this context, destroyed once; the driver lets a replay under way finish.
            let _ = unsafe { (self.on.calls.cuGraphExecDestroy)(self.raw) };
        }
    }
}

/// A recording under way: however it ends, the stream is left able to run.
struct Recording<'a>(&'a Inner);

impl Recording<'_> {
    fn end(self) -> Result<sys::CUgraph, CudaError> {
        ManuallyDrop::new(self).take()
    }

    /// Once only.
    fn take(&self) -> Result<sys::CUgraph, CudaError> {
        let mut graph = null_mut();
        // SAFETY: the stream lives, its context is current, and a recording is under way since this value was made.
        unsafe { call!(self.0.calls, cuStreamEndCapture(self.0.stream, &raw mut graph)) }?;
        Ok(graph)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Ok(graph) = self.take() {
            // SAFETY: made by the recording that just ended, destroyed once.
            let _ = unsafe { (self.0.calls.cuGraphDestroy)(graph) };
        }
    }
}

fn address<T>(at: *const T) -> sys::CUdeviceptr {
    at.addr() as sys::CUdeviceptr
}

impl Card for Driver {
    type Graph = Graph;

    /// The driver's allocations are multiples of 256, as its manual says.
    fn alloc(&self, bytes: usize) -> Result<*mut u8, CudaError> {
        let Inner { calls, .. } = &*self.0;
        let _current = self.0.current()?;
        // Whatever waits to be given back is given back first; it is no error that a recording is under way.
        drop(self.0.quiet("cuMemAlloc"));
        let mut at = 0;
        // SAFETY: writes one address.
        match unsafe { (calls.cuMemAlloc_v2)(&raw mut at, bytes) } {
            SUCCESS => Ok(without_provenance_mut(at as usize)),
            OUT_OF_MEMORY => Err(CudaError::OutOfMemory { wanted: bytes, free: self.free_bytes() }),
            answer => Err(CudaError::Driver { call: "cuMemAlloc", code: calls.code(answer) }),
        }
    }

    unsafe fn free(&self, at: *mut u8) {
        self.0.given_back.fetch_add(1, Ordering::Relaxed);
        let Ok(_current) = self.0.current() else { return };
        let mut freed = self.0.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        if self.0.is_recording().unwrap_or(false) {
            freed.push(address(at));
        } else {
            let _ = self.0.wait();
            self.0.give_back(address(at));
        }
    }

    unsafe fn upload(&self, from: &[u8], to: *mut u8) -> Result<(), CudaError> {
        let Inner { calls, stream, .. } = &*self.0;
        let _current = self.0.current()?;
        let _quiet = self.0.quiet("cuMemcpyHtoDAsync")?;
        // SAFETY: `to` has room for `from`, by the contract; `from` is borrowed until the copy is done, below.
        unsafe { call!(calls, cuMemcpyHtoDAsync_v2(address(to), from.as_ptr().cast(), from.len(), *stream)) }?;
        self.0.wait()
    }

    unsafe fn download(&self, from: *const u8, to: &mut [u8]) -> Result<(), CudaError> {
        let Inner { calls, stream, .. } = &*self.0;
        let _current = self.0.current()?;
        let _quiet = self.0.quiet("cuMemcpyDtoHAsync")?;
        // SAFETY: `from` has as many bytes as `to`, by the contract; `to` is borrowed until the copy is done, below.
        unsafe { call!(calls, cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), address(from), to.len(), *stream)) }?;
        self.0.wait()
    }

    unsafe fn copy(&self, from: *const u8, to: *mut u8, bytes: usize) -> Result<(), CudaError> {
        let Inner { calls, stream, .. } = &*self.0;
        let _current = self.0.current()?;
        // SAFETY: both parts are living memory of this card and do not overlap, by the contract.
        unsafe { call!(calls, cuMemcpyDtoDAsync_v2(address(to), address(from), bytes, *stream)) }
    }

    unsafe fn fill(&self, byte: u8, to: *mut u8, bytes: usize) -> Result<(), CudaError> {
        let Inner { calls, stream, .. } = &*self.0;
        let _current = self.0.current()?;
        // SAFETY: the part is living memory of this card, by the contract.
        unsafe { call!(calls, cuMemsetD8Async(address(to), byte, bytes, *stream)) }
    }

    unsafe fn launch<A: Args>(&self, kernel: &Kernel<A>, grid: [u32; 3], args: &A) -> Result<(), CudaError> {
        let Inner { calls, stream, .. } = &*self.0;
        let _current = self.0.current()?;
        let function = self.0.function(kernel)?;
        let [x, y, z] = grid;
        let mut argument: *mut c_void = std::ptr::from_ref(args).cast_mut().cast();
        // SAFETY: the function takes one argument of as many bytes as `args` has (`Inner::function`), which the driver
        // copies before it returns and does not write; what the kernel does with it is the caller's contract.
        let answer = unsafe {
            let (arguments, no_more) = (&raw mut argument, null_mut());
            (calls.cuLaunchKernel)(function, x, y, z, kernel.threads, 1, 1, kernel.shared, *stream, arguments, no_more)
        };
        match answer {
            SUCCESS => Ok(()),
            answer => Err(CudaError::Launch { kernel: kernel.name, grid, code: calls.code(answer) }),
        }
    }

    fn synchronise(&self) -> Result<(), CudaError> {
        let _current = self.0.current()?;
        let _quiet = self.0.quiet("cuStreamSynchronize")?;
        self.0.wait()
    }

    fn tensor_map(&self, spec: &MapSpec) -> Result<TensorMap, CudaError> {
        spec.check()?;
        let calls = self.0.calls;
        let _current = self.0.current()?;
        let ([_, rows], steps) = (spec.dims, [1u32; 2]);
        let (sizes, tiles) = (spec.dims.map(|d| d.size), spec.dims.map(|d| d.tile));
        // One of the two, as checked.
        let element = match spec.precision {
            Precision::F16 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let mut map = sys::CUtensorMap_st { opaque: [0; 16] };
        // SAFETY: writes one map, aligned as its type is; reads as many sizes, tiles and steps as there are dimensions, two,
        // and one stride. The address is written into the map, not followed.
        unsafe {
            call!(
                calls,
                cuTensorMapEncodeTiled(
                    &raw mut map,
                    element,
                    spec.dims.len() as u32,
                    spec.base.cast_mut().cast(),
                    sizes.as_ptr(),
                    &raw const rows.stride,
                    tiles.as_ptr(),
                    steps.as_ptr(),
                    sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                    sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                    // Numbers outside read as 0.
                    sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            )
        }?;
        Ok(TensorMap(map.opaque))
    }

    fn free_bytes(&self) -> usize {
        let (mut free, mut total) = (0, 0);
        if let Ok(_current) = self.0.current() {
            // SAFETY: writes two numbers; without them `free` stays 0.
            let _ = unsafe { (self.0.calls.cuMemGetInfo_v2)(&raw mut free, &raw mut total) };
        }
        free
    }

    fn given_back(&self) -> u64 {
        self.0.given_back.load(Ordering::Relaxed)
    }

    fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors
    }

    fn capability(&self) -> [u32; 2] {
        self.0.capability
    }

    fn capture(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Self::Graph, CudaError> {
        let Inner { calls, stream, .. } = &*self.0;
        let _current = self.0.current()?;
        let quiet = self.0.quiet("cuStreamBeginCapture")?;
        // Relaxed: modules may be loaded and memory allocated meanwhile. What must not be recorded refuses by itself.
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives, its context is current, and nothing is being recorded on it.
        unsafe { call!(calls, cuStreamBeginCapture_v2(*stream, mode)) }?;
        drop(quiet);
        let recording = Recording(&self.0);
        work()?;
        let graph = recording.end()?;
        let mut raw = null_mut();
        // SAFETY: writes one handle; the graph is the one just recorded.
        let made = unsafe { call!(calls, cuGraphInstantiateWithFlags(&raw mut raw, graph, 0)) };
        // SAFETY: destroyed once; what was made of it is independent of it.
        let _ = unsafe { (calls.cuGraphDestroy)(graph) };
        made.map(|()| Graph { raw, on: Arc::clone(&self.0) })
    }

    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), CudaError> {
        let Inner { calls, stream, .. } = &*self.0;
        let _current = self.0.current()?;
        // SAFETY: the graph lives; what it does is the caller's contract.
        unsafe { call!(calls, cuGraphLaunch(graph.raw, *stream)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_card_says_so() {
        // Where there is one, the ordinal is beyond it.
        match cards() {
            Ok(found) => {
                let count = found.len();
                assert_eq!(Driver::new(count).unwrap_err(), CudaError::NoSuchCard { ordinal: count, count });
            }
            Err(why) => {
                assert_eq!(Driver::new(0).unwrap_err(), why);
                assert_eq!(Driver::new(usize::MAX).unwrap_err(), why);
                // SAFETY: refused before a handle is used.
                assert_eq!(unsafe { Driver::of_stream(null_mut(), null_mut()) }.unwrap_err(), why);
            }
        }
    }
}
