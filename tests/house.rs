//! The rules of the house that a compiler does not know: imports go down only, `unsafe` lives in few files, the
//! reference shares nothing with what it judges, the path stays readable, nothing is left to be done later.
//!
//! Rules are functions from sources to complaints, so that the last tests can plant each violation and see it found.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every room of the library with its floor. A room may use its own floor and those below.
const FLOORS: [(&str, usize); 15] = [
    ("kernels", 0),
    ("objective", 1),
    ("data", 1),
    ("device", 2),
    ("theory", 2),
    ("nn", 3),
    ("optim", 3),
    ("config", 4),
    ("checkpoint", 4),
    ("train", 4),
    ("tasks", 4),
    ("plot", 1),
    ("experiments", 5),
    ("cli", 6),
    ("main", 6),
];

/// Where `unsafe` may stand: machine code, the card's driver, the memory map. A name ending in / means all below it.
const UNSAFE: [&str; 3] = ["device/cpu/simd.rs", "device/cuda/", "data/npy.rs"];

/// All that objective may take from kernels: a name. With its formulas the reference could borrow what it judges.
const LAW: [&str; 1] = ["Tilting"];

/// Lines of src/train.rs: fewer than these, tests included.
const PATH_LINES: usize = 200;

/// What may stand at the top, and whether it must.
const TOP: [(&str, bool); 17] = [
    (".ci", true),
    (".gitignore", true),
    ("CHANGELOG.md", true),
    ("Cargo.lock", true),
    ("Cargo.toml", true),
    ("LICENSE-APACHE", true),
    ("LICENSE-MIT", true),
    ("README.md", true),
    ("benches", true),
    ("build.rs", true),
    ("capi", false),
    ("docs", true),
    ("kernels", true),
    ("python", false),
    ("rustfmt.toml", true),
    ("src", true),
    ("tests", true),
];

/// A piece of code and the line it stands on.
type Token<'a> = (usize, &'a str);

/// The source with comments (docs among them), strings and character literals blanked; lines stay where they are.
fn code(source: &str) -> String {
    let s = source.as_bytes();
    let mut out = s.to_vec();
    let mut blank = |range: std::ops::Range<usize>| {
        out[range].iter_mut().filter(|b| **b != b'\n').for_each(|b| *b = b' ');
    };
    let in_word = |i: usize| i > 0 && (s[i - 1].is_ascii_alphanumeric() || s[i - 1] == b'_');
    let find = |from: usize, what: &[u8]| {
        (from..s.len()).find(|&i| s[i..].starts_with(what)).map_or(s.len(), |i| i + what.len())
    };
    let mut i = 0;
    while i < s.len() {
        let rest = &s[i..];
        let hashes = rest.iter().skip(1).take_while(|b| **b == b'#').count();
        let end = if rest.starts_with(b"//") {
            i + rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            let (mut depth, mut j) = (1, i + 2);
            while depth > 0 && j < s.len() {
                let step = [(&b"/*"[..], 1), (b"*/", -1)].into_iter().find(|(mark, _)| s[j..].starts_with(mark));
                depth += step.map_or(0, |(_, d)| d);
                j += if step.is_some() { 2 } else { 1 };
            }
            j
        } else if rest[0] == b'r'
            && rest.get(1 + hashes) == Some(&b'"')
            && (!in_word(i) || (s[i - 1] == b'b' && !in_word(i - 1)))
        {
            find(i + 2 + hashes, &[&b"\""[..], &b"#".repeat(hashes)].concat())
        } else if rest[0] == b'"' {
            let mut j = i + 1;
            while j < s.len() && s[j] != b'"' {
                j += if s[j] == b'\\' { 2 } else { 1 };
            }
            j + 1
        } else if rest.starts_with(b"'\\") {
            find(i + 3, b"'")
        } else if rest[0] == b'\'' {
            // A character, or else a lifetime or a label: those have no closing quote after one character.
            let width = std::str::from_utf8(&rest[1..]).ok().and_then(|t| t.chars().next()).map_or(1, char::len_utf8);
            if rest.get(1 + width) == Some(&b'\'') { i + width + 2 } else { i }
        } else {
            i
        };
        let end = end.min(s.len());
        blank(i..end);
        i = end.max(i + 1);
    }
    String::from_utf8(out).expect("whole characters were blanked")
}

/// Words, `::` and single signs.
fn tokens(code: &str) -> Vec<Token<'_>> {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let length = if word(first) {
                rest.find(|c| !word(c)).unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            out.push((number + 1, &rest[..length]));
            rest = rest[length..].trim_start();
        }
    }
    out
}

/// Reads the path or use tree that starts at `*at`, e.g. `a::{b, c::d as e}`, into its leaves `prefix::..` with the
/// names they bring into scope.
fn leaves<'a>(tokens: &[Token<'a>], at: &mut usize, prefix: &[&'a str], out: &mut Vec<(Vec<&'a str>, &'a str)>) {
    let text = |at: usize| tokens.get(at).map_or("", |t| t.1);
    let mut path = prefix.to_vec();
    loop {
        if text(*at) == "{" {
            *at += 1;
            while !matches!(text(*at), "}" | "") {
                leaves(tokens, at, &path, out);
                *at += usize::from(text(*at) == ",");
            }
            *at += 1;
            return;
        }
        path.push(text(*at));
        *at += 1;
        if text(*at) != "::" {
            break;
        }
        *at += 1;
    }
    let mut name = path[path.len() - 1];
    if text(*at) == "as" {
        name = text(*at + 1);
        *at += 2;
    }
    out.push((path, name));
}

/// What src/lib.rs re-exports at the root: name to room.
fn reexports(lib: &str) -> BTreeMap<String, String> {
    let code = code(lib);
    let tokens = tokens(&code);
    let mut found = Vec::new();
    for start in (0..tokens.len()).filter(|&i| tokens[i].1 == "use") {
        leaves(&tokens, &mut (start + 1), &[], &mut found);
    }
    let room = |path: &[&str]| path.iter().find(|s| !matches!(**s, "crate" | "self")).map(|s| (*s).to_owned());
    found.iter().filter_map(|(path, name)| Some(((*name).to_owned(), room(path)?))).collect()
}

/// Every path from the crate's root, or into `kernels`, that `source` of module `module` names, with its line.
fn reaches(module: &[&str], source: &str) -> Vec<(usize, Vec<String>)> {
    let code = code(source);
    let tokens = tokens(&code);
    let text = |i: usize| tokens.get(i).map_or("", |t| t.1);
    // Inline modules that are open, each with the depth of braces it was opened at.
    let (mut inline, mut depth) = (Vec::new(), 0);
    let (mut out, mut i) = (Vec::new(), 0);
    while i < tokens.len() {
        let mut next = i + 1;
        match text(i) {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                inline.pop_if(|(_, opened)| *opened == depth);
            }
            "mod" if text(i + 2) == "{" => inline.push((text(i + 1), depth)),
            first @ ("crate" | "super" | "kernels")
                if text(next) == "::" && (first == "super" || i == 0 || text(i - 1) != "::") =>
            {
                let (mut found, mut end) = (Vec::new(), i);
                leaves(&tokens, &mut end, &[], &mut found);
                next = end;
                for (path, _) in found {
                    let mut here: Vec<&str> =
                        module.iter().copied().chain(inline.iter().map(|(name, _)| *name)).collect();
                    for (at, segment) in path.iter().enumerate() {
                        match *segment {
                            "crate" => here.clear(),
                            "super" => drop(here.pop()),
                            "self" => {}
                            "kernels" if at == 0 => here = vec!["kernels"],
                            name => here.push(name),
                        }
                    }
                    if !here.is_empty() {
                        out.push((tokens[i].0, here.iter().map(|s| (*s).to_owned()).collect()));
                    }
                }
            }
            _ => {}
        }
        i = next;
    }
    out
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().find(|(name, _)| *name == room).map(|(_, floor)| *floor)
}

/// Whether code of `room` may use `target`.
fn may_use(room: &str, target: &str) -> bool {
    room == target
        || match room {
            "data" => false,
            "theory" => matches!(target, "kernels" | "objective" | "data"),
            _ => floor(target) <= floor(room),
        }
}

/// Imports that climb, in the file `path` (relative to src/) of the library.
fn climbs(path: &str, source: &str, reexports: &BTreeMap<String, String>) -> Vec<String> {
    let module: Vec<&str> = path.trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect();
    let room = module[0];
    let mut out = Vec::new();
    for (line, reached) in reaches(&module, source) {
        let name = &reached[0];
        let target = reexports.get(name).unwrap_or(name);
        if let Some(stranger) = [room, target].into_iter().find(|r| floor(r).is_none()) {
            out.push(format!("src/{path}:{line}: {stranger} is no room of tests/house.rs"));
        } else if !may_use(room, target) {
            out.push(format!("src/{path}:{line}: {room} may not use {target}"));
        }
    }
    out.dedup();
    out
}

/// Words of `banned` in the code of `source`.
fn mentions(path: &str, source: &str, banned: &[&str], follows: &str) -> Vec<String> {
    let code = code(source);
    let tokens = tokens(&code);
    let hit = |i: usize| {
        banned.contains(&tokens[i].1) && (follows.is_empty() || tokens.get(i + 1).is_some_and(|t| t.1 == follows))
    };
    (0..tokens.len()).filter(|&i| hit(i)).map(|i| format!("{path}:{}: {}{follows}", tokens[i].0, tokens[i].1)).collect()
}

/// Formulas that the room objective takes from kernels, in the file `path`, and whatever else than its own room the
/// reference takes. Local names do not matter: what is borrowed comes by a path.
fn borrowings(path: &str, source: &str) -> Vec<String> {
    let module: Vec<&str> = path.trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect();
    let reference = module.get(1) == Some(&"reference");
    let borrowed = |reached: &[String]| {
        (reached[0] == "kernels" && !LAW.contains(&&reached[reached.len() - 1][..]))
            || (reference && reached[0] != "objective")
    };
    let found = reaches(&module, source).into_iter().filter(|(_, reached)| borrowed(reached));
    found.map(|(line, reached)| format!("src/{path}:{line}: borrows {}", reached.join("::"))).collect()
}

fn unsafe_outside_its_files(path: &str, source: &str) -> Vec<String> {
    let allowed = UNSAFE.iter().any(|a| path == *a || (a.ends_with('/') && path.starts_with(a)));
    if allowed { Vec::new() } else { mentions(path, source, &["unsafe"], "") }
}

fn left_to_do(path: &str, source: &str) -> Vec<String> {
    mentions(path, source, &["todo", "unimplemented", "dbg"], "!")
}

fn too_long_a_path(source: &str) -> Vec<String> {
    let lines = source.lines().count();
    let complaint =
        format!("src/train.rs has {lines} lines, and the path is read in one sitting: fewer than {PATH_LINES}");
    if lines < PATH_LINES { Vec::new() } else { vec![complaint] }
}

fn layout(entries: &[&str]) -> Vec<String> {
    let strange =
        entries.iter().filter(|e| TOP.iter().all(|(name, _)| name != *e)).map(|e| format!("{e} has no place"));
    let missing = TOP
        .iter()
        .filter(|(name, must)| *must && !entries.contains(name))
        .map(|(name, _)| format!("{name} is missing"));
    strange.chain(missing).collect()
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below `folder`, with its path relative to it.
fn sources(folder: &Path) -> Vec<(String, String)> {
    fn walk(top: &Path, folder: &Path, out: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            if entry.is_dir() {
                walk(top, &entry, out);
            } else if entry.extension().is_some_and(|e| e == "rs") {
                let name = entry.strip_prefix(top).unwrap().to_str().unwrap().replace('\\', "/");
                out.push((name, fs::read_to_string(&entry).unwrap()));
            }
        }
    }
    let mut out = Vec::new();
    walk(folder, folder, &mut out);
    out.sort();
    assert!(!out.is_empty(), "{} holds no source", folder.display());
    out
}

fn assert_none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

fn src() -> Vec<(String, String)> {
    sources(&root().join("src"))
}

#[test]
fn imports_go_down_only() {
    let files = src();
    let lib = &files.iter().find(|(path, _)| path == "lib.rs").unwrap().1;
    let names = reexports(lib);
    // lib.rs shows every room, main.rs stands on top of all; neither can climb.
    let rooms = files.iter().filter(|(path, _)| path != "lib.rs" && path != "main.rs");
    assert_none(rooms.flat_map(|(path, source)| climbs(path, source, &names)).collect());
}

#[test]
fn every_file_is_in_a_room() {
    let room = |path: &str| path.split('/').next().unwrap().trim_end_matches(".rs").to_owned();
    let strange = src().into_iter().map(|(path, _)| path).filter(|p| p != "lib.rs" && floor(&room(p)).is_none());
    assert_none(strange.map(|path| format!("src/{path} is in no room of tests/house.rs")).collect());
}

#[test]
fn unsafe_stays_where_it_is_argued() {
    // kernels/ is the one crate besides that may hold it.
    assert_none(src().iter().flat_map(|(path, source)| unsafe_outside_its_files(path, source)).collect());
}

#[test]
fn the_reference_borrows_nothing() {
    let files = src();
    let objective: Vec<_> = files.iter().filter(|(path, _)| path.starts_with("objective/")).collect();
    assert!(objective.iter().any(|(path, _)| path.starts_with("objective/reference")), "the reference is gone");
    assert_none(objective.iter().flat_map(|(path, source)| borrowings(path, source)).collect());
}

#[test]
fn the_path_is_short() {
    let files = src();
    let lib = code(&files.iter().find(|(path, _)| path == "lib.rs").unwrap().1);
    // Where there is a train room, it is this one file.
    if tokens(&lib).windows(2).any(|w| w[0].1 == "mod" && w[1].1 == "train") {
        let train = files.iter().find(|(path, _)| path == "train.rs").expect("src/train.rs, the path, is one file");
        assert_none(too_long_a_path(&train.1));
    }
}

#[test]
fn nothing_is_left_to_do() {
    let kernels = sources(&root().join("kernels/src"));
    assert_none(src().iter().chain(&kernels).flat_map(|(path, source)| left_to_do(path, source)).collect());
}

#[test]
fn the_top_level_is_the_card() {
    // What git tracks, so that a user's own files are no business of ours; all there is, in an unpacked archive.
    let tracked = Command::new("git").args(["ls-files"]).current_dir(root()).output();
    let mut entries: Vec<String> = match tracked {
        Ok(git) if git.status.success() && !git.stdout.is_empty() => {
            String::from_utf8(git.stdout).unwrap().lines().map(|f| f.split('/').next().unwrap().to_owned()).collect()
        }
        _ => {
            let names = fs::read_dir(root()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            names.filter(|name| !matches!(&name[..], "target" | "runs" | ".git")).collect()
        }
    };
    entries.sort();
    entries.dedup();
    assert_none(layout(&entries.iter().map(|e| &e[..]).collect::<Vec<_>>()));
    assert!(root().join(".ci/run").is_file(), ".ci/run is missing");
}

#[test]
fn the_parser_sees_code_only() {
    let source = r####"
//! use crate::cli;
/// [`crate::cli`] and unsafe
/* use crate::cli; /* nested */ use crate::cli; */
fn f<'a>(x: &'a str) -> char {
    let text = "use crate::cli; \" unsafe";
    let raw = br##"use crate::cli; "# unsafe"##;
    let (quote, escape, wide) = ('"', '\'', 'ψ'); // unsafe
    'label: loop { break 'label }
    pub(crate) fn g() {}
    crate::nn::h() // a path is an import too
}
"####;
    assert_eq!(reaches(&["optim"], source), [(11, vec!["nn".to_owned(), "h".to_owned()])]);
    assert!(unsafe_outside_its_files("optim.rs", source).is_empty());
    assert_eq!(code(source).lines().count(), source.lines().count());
}

#[test]
fn planted_climbs_are_found() {
    let names =
        reexports("pub mod device;\npub use device::{Engine, cpu::Cpu as Host};\npub use crate::objective::Loss;");
    assert_eq!(names["Host"], "device");
    assert_eq!(names["Loss"], "objective");
    let found = |path: &str, source: &str| climbs(path, source, &names);
    for (path, source) in [
        ("objective/mod.rs", "use crate::device::Engine;"),
        ("objective/mod.rs", "use super::device;"),
        ("objective/features.rs", "use super::super::{data, nn::Layout};"),
        ("objective/features.rs", "mod tests { use super::super::super::device::cpu::Cpu; }"),
        ("objective/mod.rs", "mod a { mod b {} fn f() { if x { } } use super::super::optim; }"),
        ("objective/mod.rs", "fn f() { let cpu = crate::device::cpu::Cpu::new(); }"),
        ("objective/mod.rs", "use crate::Host;"),
        ("objective/mod.rs", "use {std::fs, crate::{\n    data::Npy,\n    Engine as E,\n}};"),
        ("device/mod.rs", "use crate::{objective::Loss, nn};"),
        ("device/cpu/mod.rs", "macro_rules! m { () => { $crate::optim::Adam } }"),
        ("optim.rs", "pub(super) use super::train::Run;"),
        ("train.rs", "use crate::experiments;"),
        ("experiments/gp.rs", "use crate::cli::Args;"),
        ("data/npy.rs", "use crate::objective::Matrix;"),
        ("data/npy.rs", "use kernels::law::Tilting;"),
        ("theory/mod.rs", "use crate::device::Engine;"),
        ("theory/mod.rs", "use crate::*;"),
        ("train.rs", "use crate::helpers;"),
        ("helpers.rs", "use crate::data;"),
    ] {
        assert_eq!(found(path, source).len(), 1, "{path}: {source}");
    }
    let lines = found("objective/mod.rs", "\nuse crate::nn;\n\nuse crate::optim;");
    assert!(lines[0].starts_with("src/objective/mod.rs:2:") && lines[1].starts_with("src/objective/mod.rs:4:"));
    for (path, source) in [
        ("objective/mod.rs", "pub use kernels::law::Tilting; use crate::data::Source;"),
        ("theory/mod.rs", "use crate::data::gaussian2d::Gaussian; use crate::objective;"),
        ("theory/tests.rs", "use super::*; use crate::data::gp;"),
        ("device/cpu/fused.rs", "use super::{simd::{Isa, Simd}, super::Gemm}; use crate::Loss;"),
        ("optim.rs", "use crate::nn::Layout; mod tests { use super::*; use crate::device::cpu::Cpu; }"),
        ("nn/layer.rs", "use super::part; use self::super::part_mut; pub(in crate::nn) fn f() {}"),
        ("cli.rs", "use crate::{experiments, train, data, kernels_seen};"),
    ] {
        let expected = usize::from(source.contains("kernels_seen"));
        assert_eq!(found(path, source).len(), expected, "{path}: {source}");
    }
}

#[test]
fn other_planted_violations_are_found() {
    assert_eq!(unsafe_outside_its_files("nn/mod.rs", "fn f() {\n    unsafe { g() }\n}"), ["nn/mod.rs:2: unsafe"]);
    assert_eq!(unsafe_outside_its_files("device/cpu/mod.rs", "unsafe fn f() {}").len(), 1);
    assert!(unsafe_outside_its_files("device/cpu/simd.rs", "unsafe fn f() {}").is_empty());
    assert!(unsafe_outside_its_files("device/cuda/launch.rs", "unsafe fn f() {}").is_empty());
    let reference = |source: &str| borrowings("objective/reference.rs", source).len();
    assert_eq!(reference("use kernels::law::Lse;"), 1);
    assert_eq!(
        reference("use kernels::law::{Tilting, Lse as Sum};"),
        2,
        "the reference has even the name from its room"
    );
    assert_eq!(
        reference(
            "use crate::Cpu;
use crate::device::Engine;
fn f() { super::super::device::g() }"
        ),
        3
    );
    assert_eq!(reference("use super::{Batch, Tilting}; fn kernels(law: u8) {} // kernels::law::Lse"), 0);
    assert_eq!(borrowings("objective/mod.rs", "pub use kernels::law::Tilting;").len(), 0);
    assert_eq!(borrowings("objective/mod.rs", "pub use kernels::law::{Tilting, Lse};").len(), 1);
    assert_eq!(borrowings("objective/mod.rs", "pub use kernels::law::*;").len(), 1);
    assert_eq!(left_to_do("x.rs", "fn f() { todo!() }\nfn g() { unimplemented ! () }\nfn h() { dbg!(1); }").len(), 3);
    assert!(left_to_do("x.rs", "fn f(todo: bool) -> bool { !todo } // todo!() dbg!()").is_empty());
    assert!(too_long_a_path(&"\n".repeat(PATH_LINES - 1)).is_empty());
    assert_eq!(too_long_a_path(&"\n".repeat(PATH_LINES)).len(), 1);
    let card: Vec<&str> = TOP.iter().map(|(name, _)| *name).collect();
    assert!(layout(&card).is_empty());
    assert_eq!(layout(&[&card[..], &["examples"]].concat()), ["examples has no place"]);
    assert_eq!(layout(&card[1..]), [".ci is missing"]);
}
