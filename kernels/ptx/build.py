#!/usr/bin/env python3
"""Rebuilds the GPU kernels' PTX from kernels/src, assembles it, and gates what compiler and assembler made of it.

    python3 kernels/ptx/build.py            rebuild kernels/ptx/*.ptx and the table of figures
    python3 kernels/ptx/build.py --check    rebuild elsewhere; fail where it differs from what is committed

Compiler: Debian's rustc-web, cargo-web and rust-web-src (1.96), or the nightly of kernels/rust-toolchain.toml with rust-src.
Assembler: ptxas and nvdisasm on the PATH, or of the PyPI packages nvidia-cuda-nvcc and nvidia-cuda-nvdisasm.
"""
import argparse, hashlib, os, re, shutil, site, subprocess, sys, tempfile
from pathlib import Path

import convergence

HERE = Path(__file__).resolve().parent
CRATE = HERE.parent
ROOT = CRATE.parent

# Module, processor it is compiled for, processors it must assemble for, the tensor core's instruction there.
MODULES = [
    ("portable", "sm_80", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"], "HMMA"),
    ("hopper", "sm_90a", ["sm_90a"], "HGMMA"),
]
# Without these loops over registers stay loops, and registers become local memory.
UNROLL = ["-unroll-threshold=20000", "-unroll-full-max-count=1024", "-unroll-max-iteration-count-to-analyze=1024"]


def fail(message):
    sys.exit(f"error: {message}")


def run(command, **more):
    done = subprocess.run([str(c) for c in command], text=True, capture_output=True, **more)
    if done.returncode:
        fail(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def source_hash():
    """Of all that the PTX is made from."""
    digest = hashlib.sha256()
    for path in sorted([*CRATE.glob("src/**/*.rs"), CRATE / "Cargo.toml", Path(__file__).resolve()]):
        digest.update(path.relative_to(CRATE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compiler():
    """The command, its environment and its version: Debian's if it is there, else the pinned nightly."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RUSTUP_TOOLCHAIN", "RUSTC", "CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS")}
    if Path("/usr/bin/rustc").exists() and Path("/usr/lib/rustlib/src/rust/library/core").exists():
        environment.update(RUSTC_BOOTSTRAP="1", RUSTC="/usr/bin/rustc")
        return ["/usr/bin/cargo"], environment, run(["/usr/bin/rustc", "--version"]).strip()
    pin = re.search(r'channel = "(.*)"', (CRATE / "rust-toolchain.toml").read_text())[1]
    if not shutil.which("rustup") or not any(line.startswith(pin) for line in run(["rustup", "toolchain", "list"]).splitlines()):
        fail(f"no compiler for the GPU: apt install rustc-web cargo-web rust-web-src, or rustup toolchain install {pin} --component rust-src")
    return ["cargo", f"+{pin}"], environment, run(["rustc", f"+{pin}", "--version"]).strip()


def compile_module(name, processor):
    cargo, environment, version = compiler()
    target = ROOT / "target" / "ptx"
    environment.update(
        CARGO_TARGET_DIR=str(target), CARGO_PROFILE_RELEASE_LTO="fat", CARGO_PROFILE_RELEASE_PANIC="abort",
        CARGO_PROFILE_RELEASE_CODEGEN_UNITS="1", CARGO_PROFILE_RELEASE_DEBUG="false",
    )
    # rustc's own jump threading copies whatever lies between two branches on the same number, barriers among it.
    flags = ["--emit=asm", "-C", f"target-cpu={processor}", "-C", "linker=/bin/true", "-A", "warnings", "-Z", "mir-enable-passes=-JumpThreading"]
    flags += [f for u in UNROLL for f in ("-C", f"llvm-args={u}")]
    flags += ["--cfg", "hopper"] if name == "hopper" else []
    out = target / "nvptx64-nvidia-cuda" / "release" / "deps"
    for old in out.glob("kernels-*.s"):
        old.unlink()
    run([*cargo, "rustc", "--release", "--lib", "--crate-type", "cdylib", "-Zbuild-std=core", "--target", "nvptx64-nvidia-cuda",
         "--manifest-path", CRATE / "Cargo.toml", "--", *flags], env=environment)
    made = list(out.glob("kernels*.s"))
    if len(made) != 1:
        fail(f"expected one .s file in {out}, found {len(made)}")
    return finish(made[0].read_text(), version)


def finish(ptx, version):
    """Launch bounds and alignment, which Rust has no words for; and where the text is from."""
    bounds = dict(re.findall(r"// @launch (\w+) (\d+ \d+)", ptx))
    entries = re.findall(r"\.visible \.entry (\w+)\(", ptx)
    if set(entries) != set(bounds):
        fail(f"entries and launch bounds differ: {sorted(set(entries) ^ set(bounds))}")
    ptx = re.sub(r"[ \t]*// @launch .*\n", "", ptx)

    def with_bounds(match):
        threads, blocks = bounds[match[2]].split()
        return f"{match[1]}\n.maxntid {threads}, 1, 1\n.minnctapersm {blocks}\n{{"

    ptx, count = re.subn(r"(\.visible \.entry (\w+)\([^)]*\))\s*\{", with_bounds, ptx)
    if count != len(entries):
        fail(f"{len(entries)} entries, {count} of them given launch bounds")
    # A tensor map must lie on 64 bytes; the compiler's own alignment stops at 16.
    ptx = re.sub(r"(\.param) \.align 16 (\.b8 \w+_param_\d+\[\d+\])", r"\1 .align 64 \2", ptx)
    ptx = re.sub(r"\n\t// (begin|end) inline asm", "", ptx)
    # Three programs carry the text to a card, through a limit on their size.
    ptx = re.sub(r"[ \t]*(\n|\t)[ \t]*", lambda gap: "\n" if "\n" in gap[0] else " ", ptx)
    head = f"// Generated by kernels/ptx/build.py, do not edit.\n// sources sha256 {source_hash()}\n// compiler {version}\n"
    return head + ptx


def tool(name):
    found = shutil.which(name)
    places = [Path(p) for p in [*site.getsitepackages(), site.getusersitepackages(), *sys.path]]
    for place in places:
        candidates = sorted(place.glob(f"nvidia/*/bin/{name}")) if not found else []
        found = found or (candidates and str(candidates[-1]))
    if not found:
        fail(f"{name}: not found; pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")
    os.chmod(found, 0o755) if not os.access(found, os.X_OK) else None
    return found


def all_come(ptx):
    """Fails where lanes that meet may not all come."""
    found = [f"{kernel}: {instruction}  after {branch}" for kernel, instruction, branch in convergence.split(ptx)]
    if found:
        fail("threads that must meet may have gone different ways:\n  " + "\n  ".join(found))


def figures(name, ptx, processors, product):
    """One line a kernel and processor: registers, shared bytes, barriers, tensor core instructions. Fails on spills."""
    bad, rows = [], []
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / f"{name}.ptx"
        source.write_text(ptx)
        for processor in processors:
            cubin = Path(work) / f"{name}.cubin"
            log = run([tool("ptxas"), f"-arch={processor}", "-v", source, "-o", cubin])
            bad += [f"{processor}: {line.strip()}" for line in log.splitlines() if re.search(r"\bC75\d\d|setmaxnreg ignored|warning", line)]
            sass = run([tool("nvdisasm"), "-c", cubin])
            code = {m[1]: m[2] for m in re.finditer(r"\.text\.(\w+):\n(.*?)(?=\n\.text\.|\Z)", sass, re.S)}
            parts = re.split(r"ptxas info\s+: Compiling entry function '(\w+)'", log)[1:]
            for kernel, text in sorted(zip(parts[::2], parts[1::2])):
                stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text).groups())
                if stack or stores or loads:
                    bad.append(f"{processor} {kernel}: {stack} bytes of stack, {stores} of spill stores, {loads} of spill loads")
                registers = int(re.search(r"Used (\d+) registers", text)[1])
                static = int((re.search(r"(\d+) bytes smem", text) or [0, 0])[1])
                products = len(re.findall(rf"\b{product}\b", code[kernel]))
                exponentials = len(re.findall(r"\bMUFU\.EX2\b", code[kernel]))
                rows.append(f"{kernel:24} {processor:7} {registers:4} {static:6} {products:6} {exponentials:5}")
    if bad:
        fail("the assembler's findings:\n  " + "\n  ".join(bad))
    head = f"# {name}\n{'# kernel':24} {'for':7} {'regs':>4} {'static':>6} {product:>6} {'EX2':>5}\n"
    return head + "\n".join(rows) + "\n"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="change nothing; fail where the committed files differ")
    arguments.add_argument("--only", choices=[m[0] for m in MODULES], help="one module, without the table")
    check, only = (lambda a: (a.check, a.only))(arguments.parse_args())
    made, tables = {}, []
    for name, processor, processors, product in MODULES:
        if only in (None, name):
            made[f"{name}.ptx"] = compile_module(name, processor)
            all_come(made[f"{name}.ptx"])
            tables.append(figures(name, made[f"{name}.ptx"], processors, product))
    print("\n".join(tables))
    if only is None:
        made["figures.txt"] = "\n".join(tables)
    differ = []
    for file, text in made.items():
        path = HERE / file
        old = path.read_text() if path.exists() else ""
        if check:
            # Another compiler writes other PTX from the same sources; then the hash decides.
            same_compiler = re.findall("// compiler .*", old) == re.findall("// compiler .*", text)
            hashes = [re.findall("// sources .*", t) for t in (old, text)]
            if (old != text if same_compiler or not file.endswith(".ptx") else hashes[0] != hashes[1]):
                differ.append(file)
        elif old != text:
            path.write_text(text)
    if differ:
        fail(f"{', '.join(differ)}: not what the sources make; run python3 kernels/ptx/build.py and commit the result")


if __name__ == "__main__":
    main()
