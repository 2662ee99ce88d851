//! The binary, run from outside.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub fn contrastive(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_contrastive"));
    command.current_dir(dir).args(args).stdin(Stdio::null());
    command
}

pub fn run(dir: &Path, args: &[&str]) -> Output {
    contrastive(dir, args).output().unwrap()
}

pub fn json(dir: &Path, args: &[&str]) -> Value {
    let output = run(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.trim_end().lines().count(), 1, "{args:?} prints one object and nothing else: {text}");
    serde_json::from_str(&text).unwrap()
}

/// Everything below `dir`, with sizes.
pub fn listing(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(listing(&path));
        }
        all.push((path.clone(), path.metadata().unwrap().len()));
    }
    all.sort();
    all
}

/// Each command ends with status 2 and one line that names what is wrong, and leaves nothing behind.
pub fn refused(dir: &Path, cases: Vec<(&str, Vec<&str>)>) {
    let before = listing(dir);
    for (what, args) in cases {
        let output = run(dir, &args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let errors: Vec<&str> = stderr.lines().collect();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(errors.len() == 1 && errors[0].starts_with("error: "), "{args:?}: one line, not {stderr:?}");
        assert!(errors[0].contains(what), "{args:?} should name {what}: {stderr}");
        assert!(output.stdout.is_empty(), "{args:?} printed on stdout");
        assert_eq!(listing(dir), before, "{args:?} left something behind");
    }
}
