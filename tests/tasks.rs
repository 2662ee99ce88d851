//! What trained models and embeddings are used for, from the command line: `retrieve`, `classify`, `sample`, `reproduce`.
#![cfg(feature = "cli")]
#![allow(missing_docs)]

use contrastive::data::npy::{Npy, read_npy_i64, write_npy_f32, write_npy_i64};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn run(dir: &Path, args: &str) -> Output {
    let args = args.split_whitespace();
    Command::new(env!("CARGO_BIN_EXE_contrastive")).current_dir(dir).args(args).output().unwrap()
}

fn json(dir: &Path, args: &str) -> Value {
    let output = run(dir, &format!("{args} --json"));
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Bad usage or input: status 2, one line that names `what`, no file `out.npy`.
fn refused(dir: &Path, args: &str, what: &str) {
    let output = run(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args}: {stderr}");
    let lines: Vec<_> = stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert!(lines.len() == 1 && lines[0].contains(what), "{args}: {stderr}");
    assert!(output.stdout.is_empty() && !dir.join("out.npy").exists(), "{args}");
}

/// All numbers of a file, and how many are in a row.
fn matrix(path: &Path) -> (Vec<f32>, usize) {
    let x = Npy::open(path).unwrap();
    let mut data = vec![0.0; x.rows() * x.dim()];
    x.read_rows(0..x.rows(), &mut data);
    (data, x.dim())
}

/// s(q, x) at tau = 1, from the definition.
fn score(tilting: &str, q: &[f32], x: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    match tilting {
        "dot" => dot(q, x),
        "cosine" => dot(q, x) / (dot(q, q).sqrt() * dot(x, x).sqrt()),
        _ => -0.5 * q.iter().zip(x).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>(),
    }
}

#[test]
fn retrieve_is_a_stable_sort_of_the_scores() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for (items, queries, dim, k) in [(1, 1, 1, 1), (211, 37, 13, 211), (97, 97, 5, 3), (1031, 1, 8, 7)] {
        let mut draw = |n: usize| -> Vec<f32> { (0..n * dim).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let (mut x, q) = (draw(items), draw(queries));
        // Each third item is its neighbour: ties.
        for i in (3..items).step_by(3) {
            x.copy_within((i - 1) * dim..i * dim, i * dim);
        }
        write_npy_f32(at("x.npy"), &[items, dim], &x).unwrap();
        write_npy_f32(at("q.npy"), &[queries, dim], &q).unwrap();
        for tilting in ["cosine", "dot", "l2"] {
            let command = "retrieve --items x.npy --queries q.npy --output i.npy --scores s.npy";
            let found = json(dir.path(), &format!("{command} --k {k} --tilting {tilting}"));
            let (shape, indices) = read_npy_i64(at("i.npy")).unwrap();
            assert_eq!(shape, [queries, k]);
            let (scores, _) = matrix(&at("s.npy"));
            let mut recall = [0.0; 2];
            for i in 0..queries {
                let s: Vec<f64> = x.chunks_exact(dim).map(|x| score(tilting, &q[i * dim..][..dim], x)).collect();
                let mut order: Vec<usize> = (0..items).collect();
                order.sort_by(|&a, &b| s[b].total_cmp(&s[a]));
                let own = order.iter().position(|&j| j == i).unwrap_or(items);
                for (recall, within) in recall.iter_mut().zip([1, 5]) {
                    *recall += f64::from(u8::from(own < within)) / queries as f64;
                }
                for (r, &best) in order.iter().take(k).enumerate() {
                    assert_eq!(
                        indices[i * k + r] as usize,
                        best,
                        "{tilting} {items} x {queries}: query {i}, place {r}"
                    );
                    assert!((f64::from(scores[i * k + r]) - s[best]).abs() < 1e-6 * (1.0 + s[best].abs()));
                }
            }
            for (key, recall) in ["recall_at_1", "recall_at_5"].iter().zip(recall) {
                match found.get(*key) {
                    Some(got) => assert!(items == queries && (got.as_f64().unwrap() - recall).abs() < 1e-12),
                    None => assert_ne!(items, queries),
                }
            }
        }
    }
}

#[test]
fn retrieve_refuses_what_it_cannot_answer() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_npy_f32(at("x.npy"), &[4, 3], &[0.5; 12]).unwrap();
    write_npy_f32(at("wide.npy"), &[2, 4], &[0.5; 8]).unwrap();
    write_npy_f32(at("nan.npy"), &[1, 3], &[0.5, f32::NAN, 0.5]).unwrap();
    let with = |q: &str, rest: &str| format!("retrieve --items x.npy --queries {q} --output out.npy {rest}");
    refused(dir.path(), &with("x.npy", "--k 0"), "--k");
    refused(dir.path(), &with("x.npy", "--k 5"), "4 items");
    refused(dir.path(), &with("wide.npy", "--k 1"), "wide.npy");
    refused(dir.path(), &with("nan.npy", "--k 1"), "nan.npy");
    refused(dir.path(), &with("none.npy", "--k 1"), "none.npy");
    refused(dir.path(), &with("x.npy", "--k 1 --tilting angle"), "angle");
}

#[test]
fn classify_labels_digits() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    json(dir.path(), "train digits --quick --samples 2000 --epochs 3 --out run");
    json(dir.path(), "data digits --out set --samples 500 --seed 5");
    let (_, truth) = read_npy_i64(at("set/labels.npy")).unwrap();
    let command = "classify --model run --input set/u.npy";
    let found = json(dir.path(), &format!("{command} --labels set/labels.npy --output l.npy --probabilities p.npy"));
    let (_, labels) = read_npy_i64(at("l.npy")).unwrap();
    let (p, classes) = matrix(&at("p.npy"));
    assert_eq!((labels.len(), classes), (500, 10));
    for (p, &label) in p.chunks_exact(10).zip(&labels) {
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        assert!(p.iter().all(|&other| other <= p[label as usize]));
    }
    let right = labels.iter().zip(&truth).filter(|(a, b)| a == b).count() as f64 / 500.0;
    assert_eq!(found["accuracy"], right);
    assert!(right > 0.4, "{right}: chance is 0.1");

    let tuned = json(dir.path(), &format!("{command} --labels set/labels.npy --fine-tune --held-out 0.3"));
    assert_eq!((&tuned["judged"], tuned["labels"].as_array().unwrap().len()), (&Value::from(150), 500));
    assert!(tuned["accuracy"].as_f64().unwrap() > 0.4, "{}", tuned["accuracy"]);
    let all = json(dir.path(), &format!("{command} --labels set/labels.npy --fine-tune --held-out 0"));
    assert_eq!(all["judged"], 500);

    write_npy_i64(at("few.npy"), &[3], &[1, 2, 3]).unwrap();
    let mut negative = truth.clone();
    negative[7] = -1;
    write_npy_i64(at("negative.npy"), &[500], &negative).unwrap();
    let bad = |rest: &str, what: &str| refused(dir.path(), &format!("{command} --output out.npy {rest}"), what);
    bad("--fine-tune", "--labels");
    bad("--labels few.npy", "500");
    bad("--labels negative.npy", "-1");
    bad("--labels set/labels.npy --fine-tune --held-out 1", "--held-out");
}

/// The two-dimensional example, trained shortly under a dot tilting: u given v = 1 is N(2/3, 1.5).
#[test]
fn sample_draws_from_the_conditional() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    json(dir.path(), "train gaussian2d --quick --out run");
    write_npy_f32(at("one.npy"), &[1, 1], &[1.0]).unwrap();
    json(dir.path(), "data gaussian2d --out set --samples 20000 --seed 9");
    let command = "sample --model run --given one.npy --items set/u.npy --count 20000";
    let found = json(dir.path(), &format!("{command} --output i.npy"));
    let (shape, indices) = read_npy_i64(at("i.npy")).unwrap();
    assert_eq!(shape, [1, 20_000]);
    let (u, _) = matrix(&at("set/u.npy"));
    let drawn = indices.iter().map(|&i| f64::from(u[i as usize]));
    let mean = drawn.clone().sum::<f64>() / 2e4;
    let var = drawn.map(|u| (u - mean).powi(2)).sum::<f64>() / 2e4;
    assert!((mean - 2.0 / 3.0).abs() < 0.06 && (var - 1.5).abs() < 0.1, "N({mean}, {var})");
    let ess = found["ess"][0].as_f64().unwrap();
    assert!((1.0..20_000.0).contains(&ess), "{ess}");
    let small = "sample --model run --given one.npy --items set/u.npy --count 50 --seed 3";
    let one = json(dir.path(), &format!("{small} --threads 1"));
    assert_eq!(one, json(dir.path(), &format!("{small} --threads 3")));
    assert_ne!(one["indices"], json(dir.path(), &format!("{small} --seed 4").replace("--seed 3 ", ""))["indices"]);
    // The run's own pairs, the other way round.
    let back = json(dir.path(), "sample --model run --given one.npy --side v --count 2");
    assert_eq!((back["items"].as_u64(), back["indices"][0].as_array().unwrap().len()), (Some(10_000), 2));

    write_npy_f32(at("wide.npy"), &[1, 2], &[1.0, 2.0]).unwrap();
    let bad = |rest: &str, what: &str| {
        refused(dir.path(), &format!("sample --model run --output out.npy {rest}"), what);
    };
    bad("--given one.npy --count 0", "--count");
    bad("--given one.npy --count 1 --side w", "--side");
    bad("--given wide.npy --count 1", "wide.npy");
    bad("--given one.npy --items wide.npy --count 1", "wide.npy");
    refused(dir.path(), "classify --model run --input one.npy --output out.npy", "--classes");
    // Classes by what stands for them on the v side: the nearer end of the line.
    write_npy_f32(at("ends.npy"), &[2, 1], &[-1.0, 1.0]).unwrap();
    let ends = json(dir.path(), "classify --model run --input one.npy --classes ends.npy");
    assert_eq!((&ends["labels"][0], &ends["classes"]), (&Value::from(1), &Value::from(2)));
}

#[cfg(feature = "plots")]
#[test]
fn reproduce_writes_the_figures_of_a_part() {
    let dir = tempfile::tempdir().unwrap();
    let made = json(dir.path(), "reproduce gaussian2d --quick --out a --threads 1");
    assert_eq!(made["figures"], serde_json::json!(["fig01", "fig02", "fig03", "fig04", "fig05", "fig06"]));
    assert_eq!(made["failed"], serde_json::json!([]));
    assert!(made["passed"].as_u64().unwrap() > 20);
    json(dir.path(), "reproduce gaussian2d --quick --out b --threads 3");
    let read = |folder: &str, name: &str| std::fs::read(dir.path().join(folder).join(name)).unwrap();
    for name in ["figures.json", "report.html", "fig02.csv", "fig02.svg", "fig06.png"] {
        assert!(read("a", name) == read("b", name), "{name}: the same bits for any number of threads");
    }
    let record: Value = serde_json::from_slice(&read("a", "figures.json")).unwrap();
    assert_eq!(record["figures"].as_array().unwrap().len(), 6);
    refused(dir.path(), "reproduce everything", "gaussian2d");
}
