//! `retrieve`, `classify`, `sample` and `reproduce` from outside, against what the files they read and write imply.
#![cfg(feature = "cli")]
#![allow(missing_docs)]

mod common;

use common::command::{json, refused};
use contrastive::data::npy::{Npy, read_npy_i64, write_npy_f32, write_npy_i64};
use contrastive::objective::{Precision, Tilting};
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Random rows, each one three times in the first 7/8 of them.
fn rows(seed: u64, count: usize, dim: usize) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut x: Vec<f32> = (0..count * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
    for i in 0..count * 7 / 8 {
        let from = i % (count * 7 / 24).max(1);
        x.copy_within(from * dim..(from + 1) * dim, i * dim);
    }
    x
}

fn score(tilting: Tilting, q: &[f32], x: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    match tilting {
        Tilting::Dot => dot(q, x),
        Tilting::Cosine => dot(q, x) / (dot(q, q) * dot(x, x)).sqrt(),
        Tilting::L2 => -0.5 * q.iter().zip(x).map(|(&q, &x)| (f64::from(q) - f64::from(x)).powi(2)).sum::<f64>(),
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn retrieve_is_a_stable_sort_by_scores() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let dim = 6;
    // Above 2048 items there is more than one block.
    for (n, m, ks) in [(1, 1, &[1][..]), (7, 1, &[1]), (31, 31, &[1, 3, 31]), (13, 97, &[5, 97]), (3, 2053, &[7, 2053])]
    {
        let (mut q, x) = (rows(m as u64, n, dim), rows(1 + m as u64, m, dim));
        if n == m {
            // A query is near its own item, more or less.
            q.iter_mut().zip(&x).enumerate().for_each(|(i, (q, x))| *q = x + *q * (i / dim) as f32 / n as f32);
        }
        write_npy_f32(at("q.npy"), &[n, dim], &q).unwrap();
        write_npy_f32(at("x.npy"), &[m, dim], &x).unwrap();
        for &tilting in Tilting::ALL {
            let sorted: Vec<Vec<(usize, f64)>> = q
                .chunks(dim)
                .map(|q| {
                    let mut all: Vec<_> = x.chunks(dim).map(|x| score(tilting, q, x)).enumerate().collect();
                    all.sort_by(|a, b| b.1.total_cmp(&a.1));
                    all
                })
                .collect();
            for &k in ks {
                let what = format!("{tilting:?}, {n} queries, {m} items, k {k}");
                let k_text = k.to_string();
                let args = ["retrieve", "--items", "x.npy", "--queries", "q.npy", "--k", &k_text];
                let flags = ["--tilting", tilting.name(), "--output", "i.npy", "--scores", "s.npy", "--json"];
                let answer = json(dir.path(), &[&args[..], &flags].concat());
                let (shape, got) = read_npy_i64(at("i.npy")).unwrap();
                assert_eq!(shape, [n, k], "{what}");
                // The magic, the version, the length of the header; then the type.
                let bytes = fs::read(at("i.npy")).unwrap();
                assert!(String::from_utf8_lossy(&bytes[10..]).starts_with("{'descr': '<i8'"), "{what}");
                let want: Vec<i64> = sorted.iter().flat_map(|s| s[..k].iter().map(|s| s.0 as i64)).collect();
                assert_eq!(got, want, "{what}");
                let scores = Npy::open(at("s.npy")).unwrap();
                assert_eq!([scores.rows(), scores.dim()], [n, k], "{what}");
                let scores = scores.to_f64();
                assert!(scores.chunks(k).all(|s| s.is_sorted_by(|a, b| a >= b)), "{what}: best first");
                for (got, want) in scores.iter().zip(sorted.iter().flat_map(|s| &s[..k])) {
                    assert!((got - want.1).abs() <= 1e-6 * (1.0 + want.1.abs()), "{what}: {got} {}", want.1);
                }
                assert_eq!(answer["items"], m, "{what}");
                assert_eq!(answer["queries"], n, "{what}");
                for (key, among) in [("recall_at_1", 1), ("recall_at_5", 5)] {
                    let own = |&i: &usize| sorted[i].iter().take(among).any(|s| s.0 == i);
                    let recall = (0..n).filter(own).count() as f64 / n as f64;
                    let want = if n == m { Some(recall) } else { None };
                    assert_eq!(answer.get(key).map(|x| x.as_f64().unwrap()), want, "{what}: {key}");
                }
            }
        }
    }
    // Some and not all of the pairs find each other, or the last check says little.
    let answer = json(dir.path(), &["retrieve", "--items", "x.npy", "--queries", "x.npy", "--k", "1", "--json"]);
    let recall = answer["recall_at_1"].as_f64().unwrap();
    assert!(0.2 < recall && recall < 0.9, "{recall}");
}

// As many pairs as the paper's ocean has; their scores would fill 4 GB, twice what the program may address.
#[cfg(target_os = "linux")]
#[test]
fn retrieve_forms_no_matrix_of_scores() {
    let dir = tempfile::tempdir().unwrap();
    let (n, dim, k) = (32_268, 8, 10);
    let (q, x) = (rows(3, n, dim), rows(4, n, dim));
    write_npy_f32(dir.path().join("q.npy"), &[n, dim], &q).unwrap();
    write_npy_f32(dir.path().join("x.npy"), &[n, dim], &x).unwrap();
    let program = env!("CARGO_BIN_EXE_contrastive");
    let files = "--items x.npy --queries q.npy --k 10 --output i.npy";
    let script = format!("ulimit -v 2000000 && exec '{program}' retrieve {files} --tilting dot --threads 2");
    let output = std::process::Command::new("sh").args(["-c", &script]).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (shape, got) = read_npy_i64(dir.path().join("i.npy")).unwrap();
    assert_eq!(shape, [n, k]);
    for i in (0..n).step_by(997) {
        let query = &q[i * dim..][..dim];
        let mut all: Vec<_> = x.chunks(dim).map(|x| score(Tilting::Dot, query, x)).enumerate().collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        let want: Vec<i64> = all[..k].iter().map(|s| s.0 as i64).collect();
        assert_eq!(got[i * k..][..k], want, "query {i}");
    }
}

#[test]
fn retrieve_refuses_bad_input() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let x = rows(1, 20, 6);
    write_npy_f32(at("x.npy"), &[20, 6], &x).unwrap();
    write_npy_f32(at("narrow.npy"), &[24, 5], &x).unwrap();
    let mut nan = x.clone();
    nan[13 * 6 + 2] = f32::NAN;
    write_npy_f32(at("nan.npy"), &[20, 6], &nan).unwrap();
    let with = |items, queries, k, extra: &[&'static str]| {
        let files = ["--items", items, "--queries", queries, "--k", k];
        [&["retrieve", "--output", "i.npy", "--scores", "s.npy"][..], &files, extra].concat()
    };
    refused(
        dir.path(),
        vec![
            ("--k", with("x.npy", "x.npy", "0", &[])),
            ("--k", with("x.npy", "x.npy", "21", &[])),
            ("-1", with("x.npy", "x.npy", "-1", &[])),
            ("narrow.npy", with("x.npy", "narrow.npy", "1", &[])),
            ("row 13", with("nan.npy", "x.npy", "1", &[])),
            ("nan.npy", with("x.npy", "nan.npy", "1", &[])),
            ("missing.npy", with("missing.npy", "x.npy", "1", &[])),
            ("missing.npy", with("x.npy", "missing.npy", "1", &[])),
            ("--tilting", with("x.npy", "x.npy", "1", &["--tilting", "sine"])),
            (
                "nowhere",
                vec!["retrieve", "--items", "x.npy", "--queries", "x.npy", "--k", "1", "--output", "nowhere/i.npy"],
            ),
            (
                "--scores",
                vec![
                    "retrieve",
                    "--items",
                    "x.npy",
                    "--queries",
                    "x.npy",
                    "--k",
                    "1",
                    "--output",
                    "i.npy",
                    "--scores",
                    "i.npy",
                ],
            ),
            ("--queries", vec!["retrieve", "--items", "x.npy", "--k", "1"]),
        ],
    );
}

// What is stored in halves is a file of halves.
#[test]
fn precision_rounds_what_is_read_and_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (n, dim) = (90, 5);
    for (name, precision) in [("bf16", Precision::Bf16), ("f16", Precision::F16)] {
        let halves = |x: &[f32]| x.iter().map(|&x| precision.round(x)).collect::<Vec<_>>();
        let [q, x] = [1, 2].map(|seed| rows(seed, n, dim).iter().map(|x| 1.0 + 1e-3 * x).collect::<Vec<f32>>());
        for (file, x) in [("q.npy", &q), ("x.npy", &x), ("hq.npy", &halves(&q)), ("hx.npy", &halves(&x))] {
            write_npy_f32(at(file), &[n, dim], x).unwrap();
        }
        let best = |items, queries, extra: &[&str]| {
            let files = ["retrieve", "--items", items, "--queries", queries, "--k", "4", "--tilting", "l2", "--json"];
            json(dir.path(), &[&files, extra].concat())["indices"].clone()
        };
        let found = best("x.npy", "q.npy", &["--precision", name]);
        assert_eq!(found, best("hx.npy", "hq.npy", &[]), "{name}");
        assert!(found != best("x.npy", "q.npy", &[]), "{name} rounds nothing away");

        train(dir.path(), "model", &["gp", "--samples", "600", "--epochs", "1"]);
        json(dir.path(), &["data", "gp", "--out", "data", "--samples", "70", "--json"]);
        let embed = |output: &str, extra: &[&str]| {
            let files = ["embed", "--model", "model", "--side", "u", "--input", "data/u.npy", "--output", output];
            json(dir.path(), &[&files[..], &["--json"], extra].concat());
            Npy::open(at(output)).unwrap().as_f32().unwrap().to_vec()
        };
        let whole = embed("e.npy", &[]);
        assert!(halves(&whole) != whole && embed("h.npy", &["--precision", name]) == halves(&whole), "{name}");
    }
    write_npy_f32(at("large.npy"), &[2, 1], &[1.0, 7e4]).unwrap();
    let files = ["retrieve", "--items", "large.npy", "--queries", "large.npy", "--k", "1", "--precision"];
    json(dir.path(), &[&files[..], &["bf16", "--json"]].concat());
    refused(dir.path(), vec![("row 1", [&files[..], &["f16"]].concat())]);
}

/// Trains a small model in `dir/name`.
fn train(dir: &Path, name: &str, extra: &[&str]) {
    json(dir, &[&["train", "--quick", "--json", "--out", name], extra].concat());
}

#[test]
fn classify_finds_the_likeliest_label() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    train(dir.path(), "model", &["digits", "--samples", "2000", "--epochs", "2"]);
    let rows = 600;
    json(dir.path(), &["data", "digits", "--out", "data", "--samples", "600", "--seed", "5", "--json"]);
    let truth = read_npy_i64(at("data/labels.npy")).unwrap().1;
    let classify = |extra: &[&str]| {
        let files = ["classify", "--model", "model", "--input", "data/u.npy", "--probabilities", "p.npy", "--json"];
        let answer = json(dir.path(), &[&files, extra].concat());
        let p = Npy::open(at("p.npy")).unwrap();
        assert_eq!([p.rows(), p.dim()], [rows, 10]);
        let p = p.to_f64();
        assert_eq!(answer["rows"], rows);
        assert_eq!(answer["classes"], 10);
        assert_eq!(answer["fine_tuned"], extra.contains(&"--fine-tune"));
        (answer, p)
    };
    let likeliest = |p: &[f64], labels: &[i64]| {
        for (p, &label) in p.chunks(10).zip(labels) {
            assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-5 && p.iter().all(|p| (0.0..=1.0).contains(p)), "{p:?}");
            assert!(p.iter().all(|&other| other <= p[label as usize]), "{label}: {p:?}");
        }
    };
    let share = |labels: &[i64], truth: &[i64]| {
        labels.iter().zip(truth).filter(|(a, b)| a == b).count() as f64 / truth.len() as f64
    };

    let (answer, p) = classify(&["--labels", "data/labels.npy", "--output", "l.npy"]);
    let (shape, labels) = read_npy_i64(at("l.npy")).unwrap();
    assert_eq!(shape, [rows]);
    likeliest(&p, &labels);
    assert_eq!(answer["accuracy"], share(&labels, &truth));
    assert_eq!(answer["judged"], rows);
    assert!(share(&labels, &truth) > 0.2, "better than the guess of one in ten: {answer}");

    // Without labels no accuracy; without a file the labels are in the answer.
    let (answer, same) = classify(&[]);
    assert_eq!(answer["labels"], serde_json::json!(labels));
    assert!(answer.get("accuracy").is_none() && same == p);

    // One-hot labels are what stands for the classes by default; in another order they get other names.
    let one_hot = |name: &str, class: &dyn Fn(usize) -> usize| {
        let x: Vec<f32> = (0..100).map(|i| f32::from(u8::from(class(i / 10) == i % 10))).collect();
        write_npy_f32(at(name), &[10, 10], &x).unwrap();
    };
    one_hot("classes.npy", &|k| k);
    one_hot("reversed.npy", &|k| 9 - k);
    assert_eq!(classify(&["--classes", "classes.npy"]).1, p);
    let (answer, reversed) = classify(&["--classes", "reversed.npy"]);
    let back: Vec<i64> = labels.iter().map(|l| 9 - l).collect();
    assert_eq!(answer["labels"], serde_json::json!(back));
    likeliest(&reversed, &back);

    // The last fifth judges what the others taught.
    for (held_out, judged) in [(&[][..], 120), (&["--held-out", "0.5"][..], 300), (&["--held-out", "0"][..], 600)] {
        let flags = ["--fine-tune", "--labels", "data/labels.npy", "--output", "f.npy"];
        let (answer, p) = classify(&[&flags[..], held_out].concat());
        let tuned = read_npy_i64(at("f.npy")).unwrap().1;
        likeliest(&p, &tuned);
        let found = share(&tuned[rows - judged..], &truth[rows - judged..]);
        assert_eq!(answer["accuracy"], found);
        assert_eq!(answer["judged"], judged);
        assert!(found > 1.1 * share(&labels, &truth), "{found} after fine-tuning, {} before", share(&labels, &truth));
    }

    train(dir.path(), "unlabelled", &["gaussian2d", "--epochs", "1"]);
    write_npy_i64(at("few.npy"), &[599], &truth[..599]).unwrap();
    let mut negative = truth.clone();
    negative[17] = -3;
    write_npy_i64(at("negative.npy"), &[rows], &negative).unwrap();
    let mut eleventh = truth.clone();
    eleventh[17] = 10;
    write_npy_i64(at("eleventh.npy"), &[rows], &eleventh).unwrap();
    // A file of something else, of which there would be a weight for each.
    let mut vast = truth.clone();
    vast[17] = 1 << 20;
    write_npy_i64(at("vast.npy"), &[rows], &vast).unwrap();
    write_npy_f32(at("ones.npy"), &[4], &[1.0; 4]).unwrap();
    let with = |extra: &[&'static str]| {
        let files = ["classify", "--model", "model", "--input", "data/u.npy"];
        [&files, extra].concat()
    };
    let written = |extra: &[&'static str]| with(&[&["--output", "o.npy", "--probabilities", "q.npy"], extra].concat());
    refused(
        dir.path(),
        vec![
            ("--labels", written(&["--fine-tune"])),
            ("few.npy", written(&["--labels", "few.npy"])),
            ("few.npy", written(&["--labels", "few.npy", "--fine-tune"])),
            ("negative.npy", written(&["--labels", "negative.npy"])),
            ("-3", written(&["--labels", "negative.npy", "--fine-tune"])),
            ("eleventh.npy", written(&["--labels", "eleventh.npy"])),
            ("vast.npy", written(&["--labels", "vast.npy", "--fine-tune"])),
            ("--classes", written(&["--labels", "data/labels.npy", "--fine-tune", "--classes", "data/v.npy"])),
            ("missing.npy", written(&["--labels", "missing.npy"])),
            ("ones.npy", written(&["--classes", "ones.npy"])),
            ("--held-out", written(&["--labels", "data/labels.npy", "--fine-tune", "--held-out", "1"])),
            ("--held-out", written(&["--labels", "data/labels.npy", "--fine-tune", "--held-out", "-0.1"])),
            ("nowhere", with(&["--output", "nowhere/l.npy"])),
            ("--probabilities", with(&["--output", "o.npy", "--probabilities", "o.npy"])),
            ("--classes", vec!["classify", "--model", "unlabelled", "--input", "ones.npy", "--output", "o.npy"]),
            ("ones.npy", vec!["classify", "--model", "model", "--input", "ones.npy", "--output", "o.npy"]),
            ("nowhere", vec!["classify", "--model", "nowhere", "--input", "data/u.npy"]),
        ],
    );
}

#[test]
fn sample_draws_from_the_conditional() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    train(dir.path(), "model", &["gaussian2d"]);
    // What the model was trained on.
    json(dir.path(), &["data", "gaussian2d", "--out", "data", "--json"]);
    write_npy_f32(at("given.npy"), &[2, 1], &[1.0, -0.5]).unwrap();
    let count = 20_000;
    let draw = |extra: &[&str]| {
        let files = ["sample", "--model", "model", "--given", "given.npy", "--count", "20000", "--output", "i.npy"];
        let answer = json(dir.path(), &[&files[..], &["--json"], extra].concat());
        let (shape, indices) = read_npy_i64(at("i.npy")).unwrap();
        assert_eq!(shape, [2, count]);
        let listed = answer["indices"].as_array().unwrap().iter().flat_map(numbers);
        assert!(listed.eq(indices.iter().map(|&i| i as f64)));
        let ess = numbers(&answer["ess"]);
        let items = answer["items"].as_f64().unwrap();
        assert!(ess.len() == 2 && ess.iter().all(|ess| (1.0..=items).contains(ess)), "{ess:?} of {items}");
        for (weights, ess) in answer["weights"].as_array().unwrap().iter().map(numbers).zip(ess) {
            // The mean weight of what is drawn is the sum of squares, whose inverse is the effective number.
            let mean = weights.iter().sum::<f64>() / count as f64;
            assert!((mean * ess - 1.0).abs() < 0.05, "mean weight {mean}, ess {ess}");
        }
        (answer, indices)
    };
    // E[u|v] = 2/3 v, and the same the other way.
    for (side, file) in [("u", "data/u.npy"), ("v", "data/v.npy")] {
        let (answer, indices) = draw(&["--side", side]);
        assert_eq!(answer["side"], side);
        assert_eq!(answer["items"], 10_000);
        let x = Npy::open(at(file)).unwrap().to_f64();
        for (indices, given) in indices.chunks(count).zip([1.0, -0.5]) {
            let mean = indices.iter().map(|&i| x[i as usize]).sum::<f64>() / count as f64;
            assert!((mean - given * 2.0 / 3.0).abs() < 0.1, "{side}, given {given}: {mean}");
        }
        let (_, same) = draw(&["--side", side, "--items", file]);
        assert!(same == indices, "the run's own data are the items by default");
    }
    let by = |seed, threads| draw(&["--seed", seed, "--threads", threads]).1;
    let one = by("7", "1");
    assert!(one == by("7", "3") && one == by("7", "1"), "the same seed, the same draws");
    assert!(one != by("8", "1"), "another seed, other draws");
    // One item is all there is to draw.
    write_npy_f32(at("one.npy"), &[1, 1], &[0.3]).unwrap();
    let answer = json(
        dir.path(),
        &["sample", "--model", "model", "--given", "given.npy", "--items", "one.npy", "--count", "3", "--json"],
    );
    assert_eq!(answer["indices"], serde_json::json!([[0, 0, 0], [0, 0, 0]]));
    assert_eq!(answer["ess"], serde_json::json!([1.0, 1.0]));

    write_npy_f32(at("wide.npy"), &[2, 2], &[1.0; 4]).unwrap();
    write_npy_f32(at("nan.npy"), &[2, 1], &[1.0, f32::NAN]).unwrap();
    let with = |given, count, extra: &[&'static str]| {
        let files = ["--given", given, "--count", count];
        [&["sample", "--model", "model", "--output", "o.npy"][..], &files, extra].concat()
    };
    refused(
        dir.path(),
        vec![
            ("--side", with("given.npy", "5", &["--side", "w"])),
            ("--count", with("given.npy", "0", &[])),
            ("--count", with("given.npy", "18446744073709551615", &[])),
            ("missing.npy", with("missing.npy", "5", &[])),
            ("wide.npy", with("wide.npy", "5", &[])),
            ("row 1", with("nan.npy", "5", &[])),
            ("nan.npy", with("given.npy", "5", &["--items", "nan.npy"])),
            ("wide.npy", with("given.npy", "5", &["--items", "wide.npy"])),
            ("nowhere", vec!["sample", "--model", "nowhere", "--given", "given.npy", "--count", "5"]),
        ],
    );
}

// Where a run held pairs out, those are drawn from and not what was learned from; the first of them is item 0.
#[test]
fn sample_draws_from_the_pairs_held_out() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let [u, v] = [3, 4].map(|seed| rows(seed, 160, 3));
    for (name, x) in [("u.npy", &u[..]), ("v.npy", &v[..]), ("last.npy", &u[144 * 3..]), ("given.npy", &v[..6])] {
        write_npy_f32(at(name), &[x.len() / 3, 3], x).unwrap();
    }
    let files = ["pairs", "--u", "u.npy", "--v", "v.npy", "--held-out", "0.1", "--batch", "48", "--dim", "4"];
    train(dir.path(), "model", &files);
    let draw = |extra: &[&str]| {
        let files = ["sample", "--model", "model", "--given", "given.npy", "--count", "40", "--json"];
        json(dir.path(), &[&files[..], extra].concat())
    };
    let (own, last) = (draw(&[]), draw(&["--items", "last.npy"]));
    assert_eq!(own["items"], 16);
    assert_eq!(own["indices"], last["indices"]);
    assert_eq!(own["weights"], last["weights"]);
}

// Without --items the run's own pairs are drawn from, whatever files they are in.
#[test]
fn sample_writes_over_none_of_the_runs_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("mnist")).unwrap();
    let idx = |name: &str, shape: &[u32], data: Vec<u8>| {
        let head = [0, 0, 8, shape.len() as u8].into_iter().chain(shape.iter().flat_map(|n| n.to_be_bytes()));
        fs::write(at("mnist").join(name), head.chain(data).collect::<Vec<u8>>()).unwrap();
    };
    for part in ["train", "t10k"] {
        idx(&format!("{part}-images-idx3-ubyte"), &[10, 28, 28], (0..7840).map(|at| (at % 251) as u8).collect());
        idx(&format!("{part}-labels.idx1-ubyte"), &[10], (0..10).collect());
    }
    train(dir.path(), "digits", &["mnist", "--data", "mnist", "--batch", "5"]);
    let label: Vec<f32> = (0..10).map(|class| f32::from(u8::from(class == 3))).collect();
    write_npy_f32(at("label.npy"), &[1, 10], &label).unwrap();
    json(dir.path(), &["data", "gaussian2d", "--out", "data", "--samples", "200", "--json"]);
    train(dir.path(), "pairs", &["pairs", "--u", "data/u.npy", "--v", "data/v.npy", "--batch", "50"]);
    write_npy_f32(at("given.npy"), &[1, 1], &[1.0]).unwrap();
    let sample =
        |model, given, output| vec!["sample", "--model", model, "--given", given, "--count", "3", "--output", output];
    refused(
        dir.path(),
        vec![
            ("--output", sample("digits", "label.npy", "mnist/train-images-idx3-ubyte")),
            ("--output", sample("digits", "label.npy", "mnist/../mnist/t10k-labels.idx1-ubyte")),
            ("--output", sample("pairs", "given.npy", "data/u.npy")),
            ("--output", sample("pairs", "given.npy", "data/v.npy")),
        ],
    );
    json(dir.path(), &[&sample("digits", "label.npy", "mnist/drawn.npy")[..], &["--json"]].concat());
}

const FIGURES: [&str; 6] = ["fig01", "fig02", "fig03", "fig04", "fig05", "fig06"];

#[test]
fn reproduce_writes_every_figure() {
    let dir = tempfile::tempdir().unwrap();
    let answer = json(dir.path(), &["reproduce", "gaussian2d", "--quick", "--out", "new/r", "--json"]);
    let out = dir.path().join("new/r");
    assert_eq!(answer["figures"], serde_json::json!(FIGURES));
    assert_eq!(answer["failed"], serde_json::json!([]));
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    let record: Value = serde_json::from_slice(&fs::read(out.join("figures.json")).unwrap()).unwrap();
    assert_eq!(record["parts"], serde_json::json!(["gaussian2d"]));
    assert_eq!(record["figures"].as_array().unwrap().len(), FIGURES.len());
    for (name, figure) in FIGURES.iter().zip(record["figures"].as_array().unwrap()) {
        assert_eq!(figure["name"], *name);
        let read = |kind: &str| fs::read(out.join(format!("{name}.{kind}"))).unwrap();
        assert!(read("png").starts_with(b"\x89PNG\r\n"), "{name}");
        let svg = String::from_utf8(read("svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{name}");
        assert!(String::from_utf8(read("csv")).unwrap().lines().count() > 1, "{name}");
        assert!(page.contains(name), "{name} is in the report");
    }
    // Headings stand over what they say: the closed forms of the three models, and what was learned near them.
    let tilting = &record["figures"][4]["tables"][0];
    for (name, want) in [("A", [4.0 / 9.0, 4.0 / 5.0, 1.0 / 3.0]), ("B", [0.0, 8.0 / 15.0, 0.0])] {
        let column = |what: &str| {
            let columns = tilting["columns"].as_array().unwrap();
            let at = columns.iter().position(|c| *c == format!("{name}, {what}")).unwrap();
            let cell = |row: &Value| row[at].as_str().unwrap().parse::<f64>().unwrap();
            tilting["rows"].as_array().unwrap().iter().map(cell).collect::<Vec<_>>()
        };
        let (theory, learned) = (column("theory"), column("learned"));
        for ((theory, learned), want) in theory.iter().zip(&learned).zip(want) {
            assert!((theory - want).abs() < 1e-4 && (learned - want).abs() < 0.03, "{name}: {theory} {learned} {want}");
        }
        assert!(name == "B" || theory.iter().zip(&learned).any(|(a, b)| a != b));
    }
    let mut names: Vec<_> = fs::read_dir(&out).unwrap().map(|f| f.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names.len(), 3 * FIGURES.len() + 2, "{names:?}");
}

#[test]
fn reproduce_is_the_same_for_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let figures = |threads: &str| {
        json(dir.path(), &["reproduce", "gaussian2d", "--quick", "--threads", threads, "--out", threads, "--json"]);
        fs::read(dir.path().join(threads).join("figures.json")).unwrap()
    };
    assert!(figures("1") == figures("3"));
}

#[test]
fn reproduce_refuses_bad_input() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "in the way").unwrap();
    refused(
        dir.path(),
        vec![
            ("PART", vec!["reproduce", "gauss", "--out", "r"]),
            ("gauss", vec!["reproduce", "gauss", "--quick"]),
            ("file/r", vec!["reproduce", "gaussian2d", "--quick", "--out", "file/r"]),
            ("--mnist", vec!["reproduce", "mnist", "--quick", "--mnist", "nowhere", "--out", "r"]),
            ("--part", vec!["reproduce", "--part", "gaussian2d"]),
        ],
    );
}
