//! What a driver may answer, and what is made of it; what it is asked where another program's memory is used: with a library in
//! the driver's place that this test compiles. No machine needs a card, and none is looked at.
#![cfg(all(feature = "cuda", feature = "cli", target_os = "linux"))]
#![allow(missing_docs)]

#[allow(dead_code, reason = "each test program takes what it needs of it")]
#[path = "common/command.rs"]
mod command;

use contrastive::device::cuda::{Buffer, Cuda, CudaError, Driver};
use contrastive::{Loss, LossError, Objective, Pairs, Precision, Tilting, Write};
use cudarc::driver::{CudaContext, DevicePtr};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

/// The driver of a card of capability 9.0 that takes everything and does nothing, but for what `FAKE` names: `tell` says what
/// it is asked.
const FAKE: &str = r#"
#![allow(non_snake_case)]
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

fn is(what: &str) -> bool {
    std::env::var("FAKE").is_ok_and(|fake| fake == what)
}
static NEXT: AtomicUsize = AtomicUsize::new(1 << 28);
static LAUNCHES: AtomicUsize = AtomicUsize::new(0);

/// Of calls whose order counts.
fn tell(what: std::fmt::Arguments) -> u32 {
    if is("tell") {
        eprintln!("{what}");
    }
    0
}

unsafe fn put<T>(at: *mut T, x: T) -> u32 {
    unsafe { at.write(x) };
    0
}
macro_rules! calls {
    ($($name:ident($($arg:ident: $t:ty),*) $body:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $t),*) -> u32 { $(let _ = &$arg;)* unsafe { $body } }
    )*};
}
type P = *mut c_void;
calls! {
    cuInit(_flags: c_uint) if is("none") { 100 } else if is("stub") { 34 } else if is("mismatch") { 803 } else { 0 };
    cuDriverGetVersion(at: *mut c_int) put(at, if is("old") { 11040 } else { 12040 });
    cuDeviceGetCount(at: *mut c_int) put(at, if is("zero") { 0 } else { 1 });
    cuDeviceGet(at: *mut c_int, _k: c_int) put(at, 0);
    cuDeviceGetName(at: *mut c_char, _len: c_int, _d: c_int) {
        for (k, byte) in b"a fake card\0".iter().enumerate() { at.add(k).write(*byte as c_char); }
        0
    };
    cuDeviceTotalMem_v2(at: *mut usize, _d: c_int) put(at, 1 << 33);
    cuDevicePrimaryCtxRetain(at: *mut P, _d: c_int) if is("taken") { 46 } else { put(at, 16 as P) };
    cuDevicePrimaryCtxRelease_v2(_d: c_int) 0;
    cuCtxGetCurrent(at: *mut P) put(at, std::ptr::null_mut());
    cuCtxPushCurrent_v2(_c: P) 0;
    cuCtxPopCurrent_v2(at: *mut P) put(at, 16 as P);
    cuStreamCreate(at: *mut P, _f: c_uint) put(at, NEXT.fetch_add(32, Ordering::Relaxed) as P);
    cuStreamWaitEvent(s: P, event: P, _f: c_uint) tell(format_args!("wait on {} for {}", s as usize, event as usize));
    cuEventCreate(at: *mut P, _f: c_uint) put(at, NEXT.fetch_add(32, Ordering::Relaxed) as P);
    cuEventRecord(event: P, s: P) tell(format_args!("record on {} as {}", s as usize, event as usize));
    cuEventDestroy_v2(_e: P) 0;
    cuCtxSetCurrent(_c: P) 0;
    cuCtxSynchronize() 0;
    cuCtxGetDevice(at: *mut c_int) put(at, 0);
    cuStreamDestroy_v2(_s: P) 0;
    cuStreamSynchronize(_s: P) if is("lost") && LAUNCHES.load(Ordering::Relaxed) > 0 { 700 } else { 0 };
    cuStreamIsCapturing(_s: P, at: *mut c_uint) put(at, 0);
    cuModuleLoadDataEx(at: *mut P, _text: *const c_void, _n: c_uint, _o: *mut c_uint, values: *mut P) {
        if is("refused") {
            let log = *values as *mut c_char;
            for (k, byte) in b"line 7: what is this\0".iter().enumerate() { log.add(k).write(*byte as c_char); }
            218
        } else { put(at, 64 as P) }
    };
    cuModuleGetFunction(at: *mut P, _m: P, name: *const c_char) put(at, std::ffi::CStr::from_ptr(name).to_owned().into_raw().cast());
    cuModuleUnload(_m: P) 0;
    cuFuncSetAttribute(_f: P, _which: c_int, _value: c_int) 0;
    cuLaunchKernel(f: P, _x: c_uint, _y: c_uint, _z: c_uint, _a: c_uint, _b: c_uint, _c: c_uint, _s: c_uint, queue: P, args: *mut P, _e: *mut P) {
        LAUNCHES.fetch_add(1, Ordering::Relaxed);
        let name = std::ffi::CStr::from_ptr(f as *const c_char).to_str().unwrap();
        // Their arguments begin with as many addresses.
        let words = if name.starts_with("prepare") { 1 } else if name.starts_with("finish") { 5 } else { 0 };
        let last = (0..words).map(|k| *(*args as *const usize).add(k)).last();
        tell(format_args!("launch {name} on {} of {}", queue as usize, last.unwrap_or(0)));
        if is("launch") { 701 } else { 0 }
    };
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize) { put(total, 1 << 33); put(free, 512) };
    cuMemAlloc_v2(at: *mut u64, bytes: usize) if is("full") { 2 } else {
        put(at, NEXT.fetch_add(bytes.next_multiple_of(256), Ordering::Relaxed) as u64)
    };
    cuMemFree_v2(_at: u64) 0;
    cuMemcpyHtoDAsync_v2(_to: u64, _from: *const c_void, _n: usize, _s: P) 0;
    cuMemcpyDtoHAsync_v2(to: *mut u8, _from: u64, n: usize, _s: P) { to.write_bytes(0, n); 0 };
    cuMemcpyDtoDAsync_v2(_to: u64, _from: u64, _n: usize, _s: P) 0;
    cuMemsetD8Async(_to: u64, _x: u8, _n: usize, _s: P) 0;
    cuTensorMapEncodeTiled(_m: P, _t: c_uint, _n: u32, _a: P, _b: P, _c: P, _d: P, _e: P, _i: c_uint, _s: c_uint, _l: c_uint, _f: c_uint) 0;
    cuGetErrorName(code: c_uint, at: *mut *const c_char) {
        let name: &std::ffi::CStr = match code {
            34 => c"CUDA_ERROR_STUB_LIBRARY",
            46 => c"CUDA_ERROR_DEVICE_UNAVAILABLE",
            218 => c"CUDA_ERROR_INVALID_PTX",
            700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
            701 => c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
            803 => c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            _ => return 1,
        };
        put(at, name.as_ptr())
    };
}
#[cfg(not(bare))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(at: *mut c_int, which: c_int, _d: c_int) -> u32 {
    unsafe {
        put(at, match which {
            75 => if is("small") { 7 } else if is("new") { 12 } else { 9 },
            76 => if is("small") { 5 } else { 0 },
            // No memory of streams.
            115 => 0,
            _ => 4,
        })
    }
}
"#;

/// Compiles the library; `bare`: without one of the functions.
fn library(dir: &Path, bare: bool) {
    let source = dir.join("fake.rs");
    std::fs::write(&source, FAKE).unwrap();
    let mut rustc = Command::new(std::env::var("RUSTC").unwrap_or("rustc".into()));
    rustc.args(["--edition", "2024", "--crate-type", "cdylib", "-A", "warnings"]);
    if bare {
        rustc.args(["--cfg", "bare"]);
    }
    let made = rustc.arg("-o").arg(dir.join("libcuda.so")).arg(&source).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// Runs the binary with the library in `libraries` for its driver, which answers as `fake`.
fn run(libraries: &Path, fake: &str, args: &[&str]) -> Output {
    let mut command = command::contrastive(libraries, args);
    command.env("LD_LIBRARY_PATH", libraries).env("FAKE", fake).output().unwrap()
}

const LOSS: [&str; 6] = ["bench", "loss", "--n", "9", "--d", "4"];

#[test]
fn what_a_driver_answers_is_said_and_nothing_panics() {
    let dir = tempfile::tempdir().unwrap();
    library(dir.path(), false);
    let bare = tempfile::tempdir().unwrap();
    library(bare.path(), true);
    // Answer; what is said of it; whether --device auto takes the CPU then.
    for (fake, said, falls_back) in [
        ("old", &["CUDA 11.4", "12.0", "driver 525 or later"][..], true),
        ("small", &["compute capability 7.5", "8.0 or later"], true),
        ("none", &["sees no card"], true),
        ("zero", &["sees no card"], true),
        ("stub", &["CUDA_ERROR_STUB_LIBRARY (34)", "off the library path"], true),
        ("mismatch", &["(803)", "restart the machine"], true),
        ("taken", &["CUDA_ERROR_DEVICE_UNAVAILABLE (46)", "choose another card"], true),
        ("bare", &["cuDeviceGetAttribute", "(36)", "driver 525 or later"], true),
        ("full", &["out of memory", "512 free", "smaller"], false),
        ("refused", &["does not load", "CUDA_ERROR_INVALID_PTX (218)", "line 7: what is this"], false),
        ("launch", &["kernel ", "does not start on a grid of [", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701)"], false),
        ("lost", &["CUDA_ERROR_ILLEGAL_ADDRESS (700)", "start again"], false),
    ] {
        let libraries = if fake == "bare" { bare.path() } else { dir.path() };
        let asked = run(libraries, fake, &[&LOSS[..], &["--device", "cuda"]].concat());
        let stderr = String::from_utf8_lossy(&asked.stderr);
        assert!(!asked.status.success() && !stderr.contains("panicked"), "{fake}: {stderr}");
        assert!(said.iter().all(|part| stderr.contains(part)), "{fake}: {stderr}");
        let auto = run(libraries, fake, &[&LOSS[..], &["--device", "auto", "--json"]].concat());
        let stderr = String::from_utf8_lossy(&auto.stderr);
        assert_eq!(auto.status.success(), falls_back, "{fake}: {stderr}");
        assert!(said.iter().all(|part| stderr.contains(part)), "{fake} with auto: {stderr}");
        let devices = run(libraries, fake, &["devices"]);
        assert!(devices.status.success(), "{fake}: {}", String::from_utf8_lossy(&devices.stderr));
    }
    // A card that is there is named.
    let devices = run(dir.path(), "", &["devices"]);
    let stdout = String::from_utf8_lossy(&devices.stdout);
    assert!(devices.status.success() && stdout.contains("a fake card"), "{stdout}");
    // One that does nothing has wrong losses: the bench finds that, and does not print times of it.
    let idle = run(dir.path(), "", &[&LOSS[..], &["--device", "cuda"]].concat());
    let stderr = String::from_utf8_lossy(&idle.stderr);
    assert!(!idle.status.success() && !stderr.contains("panicked"), "{stderr}");
}

/// Slices of `cudarc` that one of its streams made, given to a card of another of its streams.
fn use_slices() {
    // Not by `eprintln`, which a test keeps to itself.
    let tell = |what: String| std::io::Write::write_all(&mut std::io::stderr(), (what + "\n").as_bytes()).unwrap();
    let (n, d) = (6, 8);
    let context = CudaContext::new(0).unwrap();
    let [theirs, ours] = [0, 1].map(|_| context.new_stream().unwrap());
    let [u, v, mut du, mut dv] = [0; 4].map(|_| theirs.alloc_zeros::<f32>(n * d).unwrap());
    for (name, slice) in [("u", &u), ("v", &v), ("du", &du), ("dv", &dv)] {
        tell(format!("{name} {}", slice.device_ptr(&theirs).0));
    }
    let card = Arc::new(Driver::of_cudarc(&ours).unwrap());
    drop(ours);
    tell(format!("queue {}", card.stream() as usize));
    let mut engine = Cuda::new(&card, Precision::Bf16);
    let loss = Loss::new(Tilting::Cosine, Objective::CLIP, 0.1);
    let pairs = Pairs::default();
    tell("begin".into());
    let out = [Some(Write::Set(&mut du)), Some(Write::Add(&mut dv))];
    let value = engine.loss_on_card(&loss, &pairs, [&u, &v], d, None, out).unwrap();
    tell("end".into());
    assert!(value.loss.is_finite());

    // What goes wrong is said, and nothing is launched.
    let short = theirs.alloc_zeros::<f32>(5).unwrap();
    let why = engine.loss_on_card(&loss, &pairs, [&u, &short], d, None, [None, None]).unwrap_err();
    assert!(matches!(why, LossError::Shape { what: "v", .. }), "{why}");
    let mut short = theirs.alloc_zeros::<f32>(5).unwrap();
    let out = [Some(Write::Set(&mut short)), None];
    let why = engine.loss_on_card(&loss, &pairs, [&u, &v], d, None, out).unwrap_err();
    assert!(matches!(why, LossError::Shape { what: "gradient of u", .. }), "{why}");
    let own = Arc::new(Driver::new(0).unwrap());
    let why =
        Cuda::new(&own, Precision::Bf16).loss_on_card(&loss, &pairs, [&u, &v], d, None, [None, None]).unwrap_err();
    assert!(why.to_string().contains("Driver::of_cudarc"), "{why}");
    let buffer = Buffer::<f32, _>::zeroed(&own, n * d).unwrap();
    let why = engine.loss_on_card(&loss, &pairs, [&buffer, &buffer], d, None, [None, None]).unwrap_err();
    assert_eq!(why.to_string(), LossError::from(CudaError::OtherCard).to_string());
}

#[test]
fn slices_of_cudarc_are_used_where_they_are_and_in_turn() {
    if std::env::var("FAKE").is_ok_and(|fake| fake == "tell") {
        return use_slices();
    }
    let dir = tempfile::tempdir().unwrap();
    library(dir.path(), false);
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "slices_of_cudarc_are_used_where_they_are_and_in_turn"]);
    let child = child.env("LD_LIBRARY_PATH", dir.path()).env("FAKE", "tell").output().unwrap();
    let told = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{told}{}", String::from_utf8_lossy(&child.stdout));
    let told: Vec<&str> = told.lines().collect();
    let of = |name: &str| {
        let line = told.iter().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {told:#?}"));
        line.trim().to_owned()
    };
    let at = |line: &str| told.iter().position(|l| *l == line).unwrap_or_else(|| panic!("{line}: {told:#?}"));
    let queue = of("queue ");
    // Each slice once is read or written, in its own place.
    let uses = [("prepare_bf16_f32", "u "), ("prepare_bf16_f32", "v "), ("finish_bf16", "du "), ("finish_bf16", "dv ")];
    for (kernel, slice) in uses {
        let launch = format!("launch {kernel} on {queue} of {}", of(slice));
        assert_eq!(told.iter().filter(|line| **line == launch).count(), 1, "{launch}: {told:#?}");
    }
    // Before the first launch the queue waits for what their stream did with them; after the last it says what it did.
    let (begin, end) = (at("begin"), at("end"));
    let called = &told[begin..end];
    let launches: Vec<usize> = (0..called.len()).filter(|&k| called[k].starts_with("launch ")).collect();
    let (first, last) = (launches[0], launches[launches.len() - 1]);
    let waits = called[..first].iter().filter(|line| line.starts_with(&format!("wait on {queue} for "))).count();
    let records = called[last..].iter().filter(|line| line.starts_with(&format!("record on {queue} as "))).count();
    assert!(waits == 6 && records == 4, "{waits} waits, {records} records: {called:#?}");
    assert!(told[end..].iter().all(|line| !line.starts_with("launch ")), "{told:#?}");
}
