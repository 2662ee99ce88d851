//! Tells the program which commit it was built from, and embeds the GPU kernels' PTX.
//! Nothing else happens at build time.

use flate2::{Compression, write::GzEncoder};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn main() {
    let commit = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output().ok();
    let commit = commit.filter(|out| out.status.success()).and_then(|out| String::from_utf8(out.stdout).ok());
    println!("cargo::rustc-env=CONTRASTIVE_COMMIT={}", commit.as_deref().map_or("unknown", str::trim));
    println!("cargo::rerun-if-changed=.git/HEAD");
    println!("cargo::rerun-if-changed=.git/refs/heads");

    // An empty text stands for a module that is not there; src/device/cuda/mod.rs says so when it is asked for.
    let out = env::var_os("OUT_DIR").expect("cargo sets it");
    for module in ["portable.ptx", "hopper.ptx"] {
        let text = fs::read(Path::new("kernels/ptx").join(module)).unwrap_or_default();
        let file =
            fs::File::create(Path::new(&out).join(format!("{module}.gz"))).expect("cargo's own folder can be written");
        let mut packed = GzEncoder::new(file, Compression::best());
        packed.write_all(&text).and_then(|()| packed.finish()).expect("cargo's own folder can be written");
    }
    println!("cargo::rerun-if-changed=kernels/ptx");
}
