//! What a driver may answer, and what is made of it: the binary, with a library in the driver's place that this test
//! compiles. No machine needs a card, and none is looked at.
#![cfg(all(feature = "cuda", feature = "cli", target_os = "linux"))]
#![allow(missing_docs)]

#[allow(dead_code, reason = "each test program takes what it needs of it")]
#[path = "common/command.rs"]
mod command;

use std::path::Path;
use std::process::{Command, Output};

/// The driver of a card of capability 9.0 that takes everything and does nothing, but for what `FAKE` names.
const FAKE: &str = r#"
#![allow(non_snake_case)]
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

fn is(what: &str) -> bool {
    std::env::var("FAKE").is_ok_and(|fake| fake == what)
}
static NEXT: AtomicUsize = AtomicUsize::new(1 << 28);
static LAUNCHES: AtomicUsize = AtomicUsize::new(0);

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
    cuStreamCreate(at: *mut P, _f: c_uint) put(at, 32 as P);
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
    cuModuleGetFunction(at: *mut P, _m: P, _name: *const c_char) put(at, 80 as P);
    cuModuleUnload(_m: P) 0;
    cuFuncSetAttribute(_f: P, _which: c_int, _value: c_int) 0;
    cuLaunchKernel(_f: P, _x: c_uint, _y: c_uint, _z: c_uint, _a: c_uint, _b: c_uint, _c: c_uint, _s: c_uint, _q: P, _p: *mut P, _e: *mut P) {
        LAUNCHES.fetch_add(1, Ordering::Relaxed);
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
