//! The command line from outside: the contract on flags, files, JSON, exit statuses and error lines.
#![cfg(feature = "cli")]
#![allow(missing_docs)]

mod common;

use common::command::{contrastive, json, refused, run};
use common::{Case, Moment, OBJECTIVES, Positive, options, relative, wide};
use contrastive::config::Partial;
use contrastive::data::npy::{Npy, write_npy_f32, write_npy_i64};
use contrastive::experiments;
use contrastive::objective::{Matrix, Moments, Objective, Tilting, features::random_fourier, reference};
use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A .npy file of any header and payload.
fn raw_npy(path: &Path, descr: &str, fortran: bool, shape: &str, payload: &[u8]) {
    let order = if fortran { "True" } else { "False" };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}");
    while (header.len() + 11) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(payload);
    std::fs::write(path, bytes).unwrap();
}

/// Good files `u.npy`, `v.npy` `[20, 6]` and bad ones of every kind.
fn files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let data = Case::new(Tilting::Cosine, Objective::Joint, 20, 20, 6).data();
    write_npy_f32(at("u.npy"), &[20, 6], &data.u).unwrap();
    write_npy_f32(at("v.npy"), &[20, 6], &data.v).unwrap();
    write_npy_f32(at("short.npy"), &[19, 6], &data.v[..19 * 6]).unwrap();
    write_npy_f32(at("narrow.npy"), &[20, 5], &data.v[..100]).unwrap();
    write_npy_f32(at("empty.npy"), &[0, 6], &[]).unwrap();
    let mut nan = data.u.clone();
    nan[13 * 6 + 2] = f32::NAN;
    write_npy_f32(at("nan.npy"), &[20, 6], &nan).unwrap();
    let mut huge = data.u.clone();
    huge[5 * 6] = 1e6; // beyond f16
    write_npy_f32(at("huge.npy"), &[20, 6], &huge).unwrap();
    write_npy_f32(at("negative.npy"), &[20], &[-1.0; 20]).unwrap();
    write_npy_i64(at("index.npy"), &[20], &[20; 20]).unwrap();
    write_npy_i64(at("zeros.npy"), &[20], &[0; 20]).unwrap();
    write_npy_i64(at("other.npy"), &[19], &[0; 19]).unwrap();
    let whole = std::fs::read(at("u.npy")).unwrap();
    std::fs::write(at("truncated.npy"), &whole[..whole.len() - 7]).unwrap();
    std::fs::write(at("cut_header.npy"), &whole[..40]).unwrap();
    std::fs::write(at("text.npy"), "1, 2, 3\n").unwrap();
    raw_npy(&at("fortran.npy"), "<f4", true, "(20, 6)", &[0; 480]);
    raw_npy(&at("integers.npy"), "<i4", false, "(20, 6)", &[0; 480]);
    raw_npy(&at("big_endian.npy"), ">f4", false, "(20, 6)", &[0; 480]);
    raw_npy(&at("cube.npy"), "<f4", false, "(20, 3, 2)", &[0; 480]);
    std::fs::write(at("unknown.toml"), "epochs = 3\nepoch = 4\n").unwrap();
    write_npy_f32(at("vast.npy"), &[20, 6], &[1e30; 120]).unwrap();
    std::fs::write(at("cold.toml"), "tau = 0.0\n").unwrap();
    std::fs::write(at("lenet.toml"), "[encoder_u]\nkind = \"lenet\"\ntypo = 1\n").unwrap();
    std::fs::write(at("wrong.toml"), "epochs = \"many\"\n").unwrap();
    std::fs::write(at("file"), "in the way").unwrap();
    dir
}

// Each of these once wrote a file, panicked or said nothing useful in some program like this one.
#[test]
fn bad_input_is_one_clear_line_and_leaves_nothing_behind() {
    let dir = files();
    let loss = |extra: &[&'static str]| [&["loss", "--grad-u", "du.npy", "--grad-v", "dv.npy"], extra].concat();
    let train = |extra: &[&'static str]| [&["train", "--out", "run"], extra].concat();
    let mmd = |extra: &[&'static str]| {
        let files = ["--u", "u.npy", "--v", "v.npy", "--data-u", "u.npy", "--data-v", "v.npy"];
        loss(&[&["--objective", "mmd"], &files[..], extra].concat())
    };
    let cases: Vec<(&str, Vec<&str>)> = vec![
        ("missing.npy", loss(&["--u", "missing.npy", "--v", "v.npy"])),
        ("truncated.npy", loss(&["--u", "truncated.npy", "--v", "v.npy"])),
        ("cut_header.npy", loss(&["--u", "cut_header.npy", "--v", "v.npy"])),
        ("text.npy", loss(&["--u", "text.npy", "--v", "v.npy"])),
        ("fortran.npy", loss(&["--u", "fortran.npy", "--v", "v.npy"])),
        ("integers.npy", loss(&["--u", "u.npy", "--v", "integers.npy"])),
        ("big_endian.npy", loss(&["--u", "u.npy", "--v", "big_endian.npy"])),
        ("cube.npy", loss(&["--u", "cube.npy", "--v", "v.npy"])),
        ("nan.npy", loss(&["--u", "nan.npy", "--v", "v.npy"])),
        ("row 13", loss(&["--u", "u.npy", "--v", "nan.npy"])),
        ("short.npy", loss(&["--u", "u.npy", "--v", "short.npy"])),
        ("narrow.npy", loss(&["--u", "u.npy", "--v", "narrow.npy"])),
        ("empty.npy", loss(&["--u", "empty.npy", "--v", "empty.npy"])),
        ("index.npy", loss(&["--u", "u.npy", "--v", "v.npy", "--positives", "index.npy"])),
        ("--tau", loss(&["--u", "u.npy", "--v", "v.npy", "--tau", "0"])),
        ("--tau", loss(&["--u", "u.npy", "--v", "v.npy", "--tau", "-0.1"])),
        ("--tau", loss(&["--u", "u.npy", "--v", "v.npy", "--tau", "nan"])),
        ("--tau", loss(&["--u", "u.npy", "--v", "v.npy", "--tau", "warm"])),
        ("--lambda-u", loss(&["--u", "u.npy", "--v", "v.npy", "--lambda-u", "-1"])),
        ("--tilting", loss(&["--u", "u.npy", "--v", "v.npy", "--tilting", "sine"])),
        ("--objective", loss(&["--u", "u.npy", "--v", "v.npy", "--objective", "best"])),
        ("--precision", loss(&["--u", "u.npy", "--v", "v.npy", "--precision", "f8"])),
        ("--device", loss(&["--u", "u.npy", "--v", "v.npy", "--device", "tpu"])),
        ("--threads", loss(&["--u", "u.npy", "--v", "v.npy", "--threads", "0"])),
        ("--threads", loss(&["--u", "u.npy", "--v", "v.npy", "--threads", "30000"])),
        ("--kernel", mmd(&["--kernel", "gaussian:1e-40"])),
        ("--data-u", loss(&["--u", "u.npy", "--v", "v.npy", "--objective", "mmd"])),
        (
            "short.npy",
            loss(&["--u", "u.npy", "--v", "v.npy", "--objective", "mmd", "--data-u", "u.npy", "--data-v", "short.npy"]),
        ),
        ("--kernel", loss(&["--u", "u.npy", "--v", "v.npy", "--kernel", "gaussian:0"])),
        ("--v", loss(&["--u", "u.npy"])),
        ("--smoothing", loss(&["--u", "u.npy", "--v", "v.npy", "--smoothing", "1"])),
        ("--bias", loss(&["--u", "u.npy", "--v", "v.npy", "--objective", "sigmoid", "--bias", "inf"])),
        ("--features", loss(&["--u", "u.npy", "--v", "v.npy", "--features", "7"])),
        ("--groups-v", loss(&["--u", "u.npy", "--v", "v.npy", "--groups-u", "index.npy"])),
        ("other.npy", loss(&["--u", "u.npy", "--v", "v.npy", "--groups-u", "index.npy", "--groups-v", "other.npy"])),
        ("--groups-u", loss(&["--u", "u.npy", "--v", "v.npy", "--groups-u", "index.npy", "--groups-v", "zeros.npy"])),
        ("negative.npy", loss(&["--u", "u.npy", "--v", "v.npy", "--weights-u", "negative.npy"])),
        ("huge.npy", loss(&["--u", "huge.npy", "--v", "v.npy", "--precision", "f16"])),
        ("nowhere", vec!["loss", "--u", "u.npy", "--v", "v.npy", "--grad-u", "nowhere/du.npy"]),
        // The first could be written: it is not.
        ("file/dv.npy", vec!["loss", "--u", "u.npy", "--v", "v.npy", "--grad-u", "du.npy", "--grad-v", "file/dv.npy"]),
        ("--grad-v", vec!["loss", "--u", "u.npy", "--v", "v.npy", "--grad-u", "d.npy", "--grad-v", "d.npy"]),
        ("--grad-v", vec!["loss", "--u", "u.npy", "--v", "v.npy", "--grad-u", "d.npy", "--grad-v", "./d.npy"]),
        ("--grad-u", vec!["loss", "--u", "u.npy", "--v", "v.npy", "--grad-u", "./v.npy"]),
        ("du.npy/", vec!["loss", "--u", "u.npy", "--v", "v.npy", "--grad-u", "du.npy/"]),
        ("--output", vec!["retrieve", "--items", "u.npy", "--queries", "v.npy", "--k", "1", "--output", "u.npy"]),
        // Logits beyond f32 have no loss to tell.
        ("--tau", loss(&["--u", "u.npy", "--v", "v.npy", "--tau", "1e-40"])),
        ("--tau", loss(&["--u", "vast.npy", "--v", "vast.npy", "--tilting", "dot"])),
        // More than there are addresses.
        ("--features", mmd(&["--features", "9223372036854775806"])),
        ("--samples", vec!["data", "digits", "--out", "made", "--samples", "18446744073709551615"]),
        ("--samples", vec!["data", "gp", "--out", "made", "--samples", "9223372036854775807"]),
        ("--n", vec!["bench", "loss", "--n", "10000000000", "--d", "10000000000"]),
        ("--samples", train(&["--samples", "9223372036854775807"])),
        ("--dim", train(&["--dim", "9223372036854775807"])),
        ("unknown.toml", train(&["--config", "unknown.toml"])),
        ("typo", train(&["digits", "--quick", "--config", "lenet.toml"])),
        // What is refused has the name it was given by.
        ("cold.toml: tau", train(&["--config", "cold.toml"])),
        ("--tau", train(&["--config", "cold.toml", "--tau", "-1"])),
        ("--micro-batch", train(&["--micro-batch", "7"])),
        ("wrong.toml", train(&["--config", "wrong.toml"])),
        ("batch", train(&["--samples", "100", "--batch", "101"])),
        ("batch", train(&["pairs", "--u", "u.npy", "--v", "v.npy", "--batch", "19"])),
        ("short.npy", train(&["pairs", "--u", "u.npy", "--v", "short.npy", "--batch", "4"])),
        ("nan.npy", train(&["pairs", "--u", "nan.npy", "--v", "v.npy", "--batch", "4"])),
        ("empty.npy", train(&["pairs", "--u", "empty.npy", "--v", "empty.npy", "--batch", "1"])),
        ("v:", train(&["pairs", "--u", "u.npy"])),
        ("data", train(&["mnist"])),
        ("nowhere", train(&["mnist", "--data", "nowhere"])),
        ("experiment", train(&["gpp"])),
        ("epochs", train(&["--epochs", "0"])),
        ("lr", train(&["--lr", "0"])),
        ("tau", train(&["--tau", "-1"])),
        ("--schedule", train(&["--schedule", "cosin"])),
        ("file/run", vec!["train", "--quick", "--out", "file/run"]),
        ("encoder", train(&["digits", "--samples", "600", "--dim", "7"])),
        ("--model", vec!["embed", "--side", "u", "--input", "u.npy", "--output", "e.npy"]),
        ("nowhere", vec!["embed", "--model", "nowhere", "--side", "u", "--input", "u.npy", "--output", "e.npy"]),
        ("--side", vec!["embed", "--model", "nowhere", "--side", "w", "--input", "u.npy", "--output", "e.npy"]),
        ("file/out", vec!["data", "gp", "--out", "file/out", "--samples", "10"]),
        ("--samples", vec!["data", "gp", "--out", "out", "--samples", "0"]),
        ("sea", vec!["data", "sea", "--out", "out"]),
        ("nowhere", train(&["ocean", "--data", "nowhere"])),
        ("encoder", train(&["ocean", "--quick", "--samples", "64", "--held-out", "0", "--batch", "8", "--dim", "7"])),
        ("--samples", vec!["data", "mnist", "--out", "out", "--samples", "10"]),
        ("--from", vec!["data", "mnist", "--out", "out", "--from", "https://127.0.0.1/mnist/"]),
        ("--from", vec!["data", "gp", "--out", "out", "--from", "http://127.0.0.1/gp/"]),
        ("file/out", vec!["data", "mnist", "--out", "file/out"]),
        ("--device", vec!["data", "gp", "--out", "out", "--device", "tpu"]),
        ("sort", vec!["bench", "sort"]),
        ("--k", vec!["bench", "retrieve", "--n", "9", "--k", "10"]),
        ("nowhere", vec!["bench", "train", "--experiment", "nowhere"]),
        ("--n", vec!["bench", "loss", "--n", "0"]),
        ("nonsense", vec!["nonsense"]),
    ];
    refused(dir.path(), cases);
}

#[test]
fn loss_agrees_with_the_reference_and_writes_gradients() {
    let dir = files();
    let case = Case { tau: 0.2, ..Case::new(Tilting::Cosine, Objective::Joint, 20, 20, 6) };
    let data = case.data();
    for (name, flags, objective) in [
        ("conditional", vec!["--lambda-u", "0.5"], Objective::Conditional { lambda_u: 0.5, lambda_v: 1.0 }),
        ("joint", vec![], Objective::Joint),
        ("sigmoid", vec!["--bias", "-2"], Objective::Sigmoid { bias: -2.0 }),
    ] {
        for tilting in Tilting::ALL {
            let case = Case { objective, tilting: *tilting, ..case };
            let want = reference::loss(&case.loss(), &data.batch(&case)).unwrap();
            let args = ["loss", "--u", "u.npy", "--v", "v.npy", "--tau", "0.2", "--json", "--objective", name];
            let args = [&args[..], &["--tilting", tilting.name(), "--grad-u", "du.npy", "--grad-v", "dv.npy"], &flags]
                .concat();
            let got = json(dir.path(), &args);
            let near = |key: &str, want: f64| {
                let got = got[key].as_f64().unwrap();
                assert!((got - want).abs() < 1e-5 * want.abs().max(0.1), "{args:?} {key}: {got} for {want}");
            };
            near("loss", want.loss);
            near("grad_tau", want.grad_tau);
            near("grad_bias", want.grad_bias);
            if name == "conditional" {
                near("loss_clip", want.loss + 0.75 * 20f64.ln());
            } else {
                assert!(got["loss_clip"].is_null());
            }
            assert_eq!((&got["n"], &got["m"], &got["d"]), (&20.into(), &20.into(), &6.into()));
            assert_eq!((got["device"].as_str(), got["precision"].as_str()), (Some("cpu"), Some("f32")));
            assert!(got["seconds"].as_f64().unwrap() > 0.0 && got["scratch_bytes"].as_u64().unwrap() > 0);
            for (file, want) in [("du.npy", &want.grad_u), ("dv.npy", &want.grad_v)] {
                let file = Npy::open(dir.path().join(file)).unwrap();
                assert_eq!((file.rows(), file.dim()), (20, 6));
                assert!(relative(&wide(file.as_f32().unwrap()), want, 1e-3) < 1e-5, "{args:?}");
            }
            for precision in ["bf16", "f16"] {
                let half = json(dir.path(), &[&args[..], &["--precision", precision]].concat());
                let off = (half["loss"].as_f64().unwrap() - want.loss).abs();
                assert!(off > 0.0 && off < 1e-2 * want.loss.abs().max(1.0), "{precision} {args:?}: {half}");
            }
        }
    }
}

#[test]
fn mmd_takes_data_and_random_features_approach_the_exact_kernel() {
    let dir = files();
    let base = ["loss", "--u", "u.npy", "--v", "v.npy", "--json", "--data-u", "u.npy", "--data-v", "v.npy"];
    for objective in ["mmd", "joint-mmd"] {
        let base = [&base[..], &["--objective", objective]].concat();
        let exact = json(dir.path(), &[&base[..], &["--kernel", "gaussian:1.5"]].concat())["loss"].as_f64().unwrap();
        let many = [&base[..], &["--kernel", "gaussian:1.5", "--features", "16384"]].concat();
        let approximate = json(dir.path(), &many)["loss"].as_f64().unwrap();
        // 1/sqrt(16384) = 0.008.
        assert!((exact - approximate).abs() < 0.03 * exact.abs(), "{exact} {approximate}");
        let linear = json(dir.path(), &[&base[..], &["--kernel", "linear"]].concat())["loss"].as_f64().unwrap();
        assert!(linear != exact);
    }
}

// Would break if a flag went to the wrong argument, or nowhere: each is compared with the reference given the same.
#[test]
fn every_option_of_loss_reaches_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut seen = 0;
    for (k, objective) in OBJECTIVES.iter().enumerate() {
        let tilting = Tilting::ALL[k % Tilting::ALL.len()];
        for case in [29, 37].into_iter().flat_map(|m| options(Case::new(tilting, *objective, 37, m, 5))) {
            // The command line has no offset, and wants positives named when N != M.
            let case = Case { offset: false, ..case };
            if case.positive == Positive::Diagonal && case.n != case.m {
                continue;
            }
            seen += 1;
            let data = case.data();
            write_npy_f32(at("u.npy"), &[case.n, 5], &data.u).unwrap();
            write_npy_f32(at("v.npy"), &[case.m, 5], &data.v).unwrap();
            let (tau, smoothing) = (case.tau.to_string(), case.smoothing.to_string());
            let mut args: Vec<String> = ["loss", "--json", "--u", "u.npy", "--v", "v.npy", "--grad-u", "du.npy"]
                .into_iter()
                .chain(["--grad-v", "dv.npy", "--tilting", tilting.name(), "--tau", &tau, "--smoothing", &smoothing])
                .map(String::from)
                .collect();
            let mut flag = |name: &str, value: &str| args.extend([format!("--{name}"), value.into()]);
            match *objective {
                Objective::Conditional { lambda_u, lambda_v } | Objective::Mmd { lambda_u, lambda_v } => {
                    flag("lambda-u", &lambda_u.to_string());
                    flag("lambda-v", &lambda_v.to_string());
                }
                Objective::Sigmoid { bias } => flag("bias", &bias.to_string()),
                Objective::JointShuffled { pairings, seed } => {
                    flag("pairings", &pairings.to_string());
                    flag("seed", &seed.to_string());
                }
                _ => {}
            }
            flag(
                "objective",
                match objective {
                    Objective::Conditional { .. } => "conditional",
                    Objective::Joint | Objective::JointShuffled { .. } => "joint",
                    Objective::Sigmoid { .. } => "sigmoid",
                    Objective::Mmd { .. } => "mmd",
                    _ => "joint-mmd",
                },
            );
            if case.moment != Moment::None {
                write_npy_f32(at("x.npy"), &[case.n, 3], &data.x).unwrap();
                write_npy_f32(at("y.npy"), &[case.m, 2], &data.y).unwrap();
                flag("data-u", "x.npy");
                flag("data-v", "y.npy");
                flag("kernel", if case.moment == Moment::Linear { "linear" } else { "gaussian:1.5" });
            }
            if case.moment == Moment::Features {
                flag("features", "10");
                flag("seed", "9");
            }
            let mut integers = |name: &str, ids: &[i64]| {
                let file = format!("{name}.npy");
                write_npy_i64(at(&file), &[ids.len()], ids).unwrap();
                flag(name, &file);
            };
            match case.positive {
                Positive::Diagonal => {}
                Positive::Index => {
                    integers("positives", &data.index.iter().map(|&j| i64::from(j)).collect::<Vec<_>>());
                }
                Positive::Groups => {
                    integers("groups-u", &data.group_u);
                    integers("groups-v", &data.group_v);
                }
            }
            if case.ignore {
                integers("ignore-u", &data.ignore.0);
                integers("ignore-v", &data.ignore.1);
            }
            if case.weights {
                for (name, weights) in [("weights-u", &data.weights_u), ("weights-v", &data.weights_v)] {
                    let file = format!("{name}.npy");
                    write_npy_f32(at(&file), &[weights.len()], weights).unwrap();
                    flag(name, &file);
                }
            }
            let mut batch = data.batch(&case);
            let features = [(&data.x, 3), (&data.y, 2)].map(|(x, dim)| random_fourier(x, dim, 1.5, 10, 9));
            if case.moment == Moment::Features {
                let [u, v] = features.each_ref().map(|x| Matrix::f32(x, 10));
                batch.moments = Some(Moments::Features { u, v });
            }
            let want = reference::loss(&case.loss(), &batch).unwrap();
            let got = json(dir.path(), &args.iter().map(String::as_str).collect::<Vec<_>>());
            let loss = got["loss"].as_f64().unwrap();
            // The tolerance in f32.
            assert!((loss - want.loss).abs() < 1e-5 * want.loss.abs().max(0.1), "{case:?}: {loss} for {}", want.loss);
            for (file, want) in [("du.npy", &want.grad_u), ("dv.npy", &want.grad_v)] {
                let file = Npy::open(at(file)).unwrap();
                let off = relative(&wide(file.as_f32().unwrap()), want, 1e-3);
                assert!(off < 1e-5, "{case:?} {}: {off:e}", file.path().display());
            }
        }
    }
    assert!(seen > 80, "{seen} cases are too few to mean anything");
}

// The same numbers, whatever the file holds them in: the files differ, the answer must not by a bit.
#[test]
fn inputs_may_be_f16_f32_or_f64() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let data = Case::new(Tilting::L2, Objective::Joint, 31, 31, 7).data();
    for (side, x) in [("u", &data.u), ("v", &data.v)] {
        let half: Vec<half::f16> = x.iter().map(|&x| half::f16::from_f32(x)).collect();
        let bytes: Vec<u8> = half.iter().flat_map(|x| x.to_le_bytes()).collect();
        raw_npy(&at(&format!("{side}16.npy")), "<f2", false, "(31, 7)", &bytes);
        let single: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
        write_npy_f32(at(&format!("{side}32.npy")), &[31, 7], &single).unwrap();
        let bytes: Vec<u8> = single.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
        raw_npy(&at(&format!("{side}64.npy")), "<f8", false, "(31, 7)", &bytes);
    }
    for precision in ["f32", "f16", "bf16"] {
        let answers: Vec<(Value, Vec<u8>)> = ["16", "32", "64"]
            .iter()
            .map(|bits| {
                let (u, v) = (format!("u{bits}.npy"), format!("v{bits}.npy"));
                let args = ["loss", "--json", "--tilting", "l2", "--tau", "1", "--precision", precision];
                let got = json(dir.path(), &[&args[..], &["--u", &u, "--v", &v, "--grad-u", "du.npy"]].concat());
                assert_eq!(got["precision"], precision);
                (got["loss"].clone(), std::fs::read(at("du.npy")).unwrap())
            })
            .collect();
        assert!(answers[0] == answers[1] && answers[1] == answers[2], "{precision}");
    }
}

#[test]
fn data_writes_what_it_says_and_the_seed_decides_it() {
    let dir = tempfile::tempdir().unwrap();
    for (set, dims) in [("gp", [12, 5]), ("gaussian2d", [1, 1]), ("digits", [784, 10]), ("ocean", [98, 2000])] {
        let make = |out: &str, seed: &str| {
            let args = ["data", set, "--out", out, "--samples", "23", "--seed", seed, "--json"];
            let got = json(dir.path(), &args);
            let read = |name: &str| std::fs::read(dir.path().join(out).join(name)).unwrap();
            for (name, dim) in [("u.npy", dims[0]), ("v.npy", dims[1])] {
                let file = Npy::open(dir.path().join(out).join(name)).unwrap();
                assert_eq!((file.rows(), file.dim()), (23, dim), "{set} {name}: {got}");
                assert!(file.as_f32().is_some());
            }
            (read("u.npy"), read("v.npy"))
        };
        let first = make(&format!("{set}/a"), "3");
        assert!(first == make(&format!("{set}/b"), "3"));
        assert!(first != make(&format!("{set}/c"), "4"));
        let labels = dir.path().join(set).join("a/labels.npy");
        assert_eq!(labels.exists(), set == "digits");
        if set == "digits" {
            let (shape, labels) = contrastive::data::npy::read_npy_i64(&labels).unwrap();
            assert_eq!(shape, [23]);
            assert!(labels.iter().all(|l| (0..10).contains(l)));
        }
    }
}

// A rename would put a file in its place: of /dev/null, for everybody.
#[cfg(unix)]
#[test]
fn what_is_no_file_is_not_written_over() {
    use std::os::unix::{fs::FileTypeExt, net::UnixListener};
    let dir = files();
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let cases = vec![
        ("socket", vec!["loss", "--u", "u.npy", "--v", "v.npy", "--grad-u", "socket"]),
        ("socket", vec!["retrieve", "--items", "u.npy", "--queries", "v.npy", "--k", "1", "--output", "socket"]),
    ];
    refused(dir.path(), cases);
    assert!(socket.metadata().unwrap().file_type().is_socket());
    assert!(write_npy_f32(&socket, &[1], &[1.0]).is_err());
    assert!(socket.metadata().unwrap().file_type().is_socket());
}

#[test]
fn a_settings_file_may_hold_every_flag_and_flags_win() {
    let dir = tempfile::tempdir().unwrap();
    let text = "out = 'there'\ndevice = 'cpu'\nthreads = 1\nexperiment = 'gaussian2d'\nepochs = 1\nresume = false\n";
    std::fs::write(dir.path().join("all.toml"), text).unwrap();
    json(dir.path(), &["train", "--config", "all.toml", "--json"]);
    assert!(dir.path().join("there/model.safetensors").exists());
    json(dir.path(), &["train", "--config", "all.toml", "--out", "here", "--json"]);
    assert!(dir.path().join("here/model.safetensors").exists());
    // What says where and how a run is made is not among the settings that made it.
    let written = std::fs::read_to_string(dir.path().join("here/config.toml")).unwrap();
    assert!(
        !["out", "device", "threads", "resume"].iter().any(|key| written.contains(&format!("\n{key} = "))),
        "{written}"
    );
    std::fs::write(dir.path().join("all.toml"), format!("{text}device = 'tpu'\n").replace("device = 'cpu'\n", ""))
        .unwrap();
    assert_eq!(run(dir.path(), &["train", "--config", "all.toml"]).status.code(), Some(2));
}

// Whoever holds nothing out is told no accuracy.
#[test]
fn nothing_held_out_has_no_accuracy() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["train", "digits", "--samples", "64", "--batch", "32", "--epochs", "1", "--held-out", "0", "--json"];
    let summary = json(dir.path(), &args);
    assert!(summary.get("test_accuracy").is_none(), "{summary}");
    assert!(summary["step_flops"].as_f64().unwrap() > 1e7, "{summary}");
}

#[cfg(unix)]
#[test]
fn nobody_reading_is_no_panic() {
    let dir = files();
    for args in [&["devices"][..], &["loss", "--u", "u.npy", "--v", "v.npy", "--json"], &["loss", "--help"]] {
        let mut child = contrastive(dir.path(), args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Closed before anything is written, on both.
        drop(child.stdout.take());
        drop(child.stderr.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{args:?}");
    }
    let mut child = contrastive(dir.path(), &["nonsense"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(2));
}

#[cfg(unix)]
#[test]
fn a_link_stays_a_link() {
    let dir = files();
    std::os::unix::fs::symlink("real.npy", dir.path().join("link.npy")).unwrap();
    std::fs::write(dir.path().join("real.npy"), "old").unwrap();
    json(dir.path(), &["loss", "--u", "u.npy", "--v", "v.npy", "--grad-u", "link.npy", "--json"]);
    assert!(dir.path().join("link.npy").is_symlink());
    assert_eq!(Npy::open(dir.path().join("real.npy")).unwrap().rows(), 20);
}

// What is read beside the embeddings is no place for a gradient either.
#[test]
fn nothing_that_is_read_is_written_over() {
    let dir = files();
    write_npy_f32(dir.path().join("weights.npy"), &[20], &[1.0; 20]).unwrap();
    let loss = ["loss", "--u", "u.npy", "--v", "v.npy"];
    for (flag, name) in [("--weights-u", "weights.npy"), ("--ignore-u", "zeros.npy")] {
        let before = std::fs::read(dir.path().join(name)).unwrap();
        let other = if flag == "--ignore-u" { vec!["--ignore-v", "zeros.npy"] } else { vec![] };
        let args = [&loss[..], &[flag, name, "--grad-u", name], &other].concat();
        refused(dir.path(), vec![("--grad-u", args)]);
        assert_eq!(std::fs::read(dir.path().join(name)).unwrap(), before);
    }
}

// A pipe would wait for who writes to it.
#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_at_once() {
    let dir = files();
    assert!(Command::new("mkfifo").arg(dir.path().join("pipe.npy")).status().unwrap().success());
    std::fs::create_dir(dir.path().join("folder.npy")).unwrap();
    for name in ["pipe.npy", "folder.npy"] {
        refused(dir.path(), vec![(name, vec!["loss", "--u", name, "--v", "v.npy"])]);
    }
}

// A set of fewer files than the one before it leaves none of the old ones.
#[test]
fn a_data_set_takes_the_place_of_another() {
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["data", "digits", "--out", "set", "--samples", "20", "--json"]);
    assert!(dir.path().join("set/labels.npy").exists());
    json(dir.path(), &["data", "gp", "--out", "set", "--samples", "30", "--json"]);
    assert!(!dir.path().join("set/labels.npy").exists() && dir.path().join("set/v.npy").exists());
}

#[test]
fn integers_may_be_of_any_width() {
    let dir = files();
    let answer = |name: &str| {
        json(dir.path(), &["loss", "--u", "u.npy", "--v", "v.npy", "--positives", name, "--json"])["loss"].clone()
    };
    let index: Vec<u8> = (0..20).map(|i| (7 * i) % 20).collect();
    write_npy_i64(dir.path().join("i8.npy"), &[20], &index.iter().map(|&i| i64::from(i)).collect::<Vec<_>>()).unwrap();
    let want = answer("i8.npy");
    for (descr, bytes) in [("|i1", 1), ("<i2", 2), ("<i4", 4), ("|u1", 1), ("<u2", 2), ("<u4", 4), ("<u8", 8)] {
        let payload: Vec<u8> = index.iter().flat_map(|&i| u64::from(i).to_le_bytes()[..bytes].to_vec()).collect();
        raw_npy(&dir.path().join("other.npy"), descr, false, "(20,)", &payload);
        assert_eq!(answer("other.npy"), want, "{descr}");
    }
    raw_npy(&dir.path().join("other.npy"), "<u8", false, "(20,)", &[0xff; 160]);
    refused(dir.path(), vec![("other.npy", vec!["loss", "--u", "u.npy", "--v", "v.npy", "--positives", "other.npy"])]);
}

// Large enough that every thread has rows, and no multiple of any tile.
#[test]
fn threads_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data = Case::new(Tilting::Cosine, Objective::Joint, 1031, 1031, 33).data();
    write_npy_f32(dir.path().join("u.npy"), &[1031, 33], &data.u).unwrap();
    write_npy_f32(dir.path().join("v.npy"), &[1031, 33], &data.v).unwrap();
    let once = |threads: &str| {
        let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
        let mut all = Vec::new();
        for objective in ["conditional", "joint", "sigmoid"] {
            let args = ["loss", "--u", "u.npy", "--v", "v.npy", "--grad-u", "du.npy", "--grad-v", "dv.npy", "--json"];
            let got = json(dir.path(), &[&args[..], &["--objective", objective, "--threads", threads]].concat());
            all.push((got["loss"].to_string(), got["grad_tau"].to_string(), read("du.npy"), read("dv.npy")));
        }
        let args = ["train", "--epochs", "2", "--threads", threads, "--out", threads];
        assert!(run(dir.path(), &args).status.success());
        (all, model(&dir.path().join(threads)))
    };
    assert!(once("1") == once("4"));
}

fn model(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}

#[test]
fn train_writes_its_files_and_certifies_itself() {
    let dir = tempfile::tempdir().unwrap();
    let got = json(dir.path(), &["train", "--quick", "--out", "run", "--json"]);
    let out = dir.path().join("run");
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(out.join("summary.json")).unwrap()).unwrap();
    assert_eq!(got, summary);
    for key in ["seconds", "steps", "samples_per_s", "device", "loss"] {
        assert!(!summary[key].is_null(), "{key}");
    }
    let theory = &summary["theory"];
    for (error, optimum, signal) in [
        ("err_u_given_v", "optimum_u_given_v", "signal_u_given_v"),
        ("err_v_given_u", "optimum_v_given_u", "signal_v_given_u"),
    ] {
        let number = |key: &str| theory[key].as_f64().unwrap();
        // The quick run; the full one is held to 0.01.
        assert!((number(error) - number(optimum)) / number(signal) < 0.05, "{theory}");
    }
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() > 10);
    for key in ["step", "epoch", "loss", "tau", "grad_norm", "samples_per_s"] {
        assert!(lines.iter().all(|line| line[key].is_number()), "{key}");
    }
    // What people are told is what the files say.
    let said = run(dir.path(), &["train", "--quick", "--out", "run", "--resume"]);
    let said = String::from_utf8(said.stdout).unwrap();
    for (name, side) in [("E[u|v]", "u_given_v"), ("E[v|u]", "v_given_u")] {
        let line: Vec<&str> = said.lines().find(|line| line.starts_with(name)).unwrap().split_whitespace().collect();
        let [error, best, signal] =
            ["err", "optimum", "signal"].map(|what| theory[format!("{what}_{side}")].as_f64().unwrap());
        let excess = 100.0 * (error - best) / signal;
        for (said, number, digit) in [(1, error, 1e-6), (2, best, 1e-6), (3, signal, 1e-6), (4, excess, 1e-3)] {
            let said: f64 = line[said].trim_end_matches('%').parse().unwrap();
            assert!((said - number).abs() <= 0.51 * digit, "{line:?}: {said} for {number}");
        }
    }
    // The resolved settings reproduce the run.
    let again = json(dir.path(), &["train", "--config", "run/config.toml", "--out", "again", "--json"]);
    assert_eq!(again["loss"], summary["loss"]);
    assert!(model(&out) == model(&dir.path().join("again")));
    // A finished run, resumed, reports again and stays what it is.
    let before = model(&out);
    let resumed = json(dir.path(), &["train", "--quick", "--out", "run", "--json", "--resume"]);
    assert_eq!(resumed["loss"], summary["loss"]);
    assert!(model(&out) == before);
}

#[test]
fn embed_and_pairs_work_together() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(dir.path(), &["data", "gp", "--out", ".", "--samples", "2000"]).status.success());
    let args = [
        "train", "pairs", "--u", "u.npy", "--v", "v.npy", "--dim", "5", "--epochs", "40", "--lr", "0.01", "--batch",
        "100",
    ];
    let summary = json(dir.path(), &[&args[..], &["--out", "run", "--json"]].concat());
    for key in ["u_to_v_at_1", "u_to_v_at_5", "v_to_u_at_1", "v_to_u_at_5"] {
        let recall = summary["recall"][key].as_f64().unwrap();
        // 200 held out: chance is half a percent.
        assert!(recall > 0.01 && recall <= 1.0, "{summary}");
    }
    // The settings name the files wherever they are read from.
    let config = std::fs::read_to_string(dir.path().join("run/config.toml")).unwrap();
    for side in ["u", "v"] {
        let line = config.lines().find(|line| line.starts_with(&format!("{side} = "))).unwrap();
        let named = Path::new(line.split_once(" = ").unwrap().1.trim_matches(['"', '\'']));
        assert!(named.is_absolute() && named.exists(), "{line}");
    }
    // What does not fit the model: one line, and no file.
    let mut nan = vec![0f32; 7 * 12];
    nan[4 * 12] = f32::INFINITY;
    write_npy_f32(dir.path().join("nan.npy"), &[7, 12], &nan).unwrap();
    // The largest numbers there are, each with the sign of its weight for the embedding's largest number.
    let (tensors, _) = contrastive::data::tensors::read(&dir.path().join("run/model.safetensors")).unwrap();
    let weight = &tensors.iter().find(|t| t.name == "u.0.weight").unwrap().data;
    let size = |row: &&[f32]| row.iter().map(|w| w.abs()).sum::<f32>();
    let row = weight.chunks(12).max_by(|a, b| size(a).total_cmp(&size(b))).unwrap();
    assert!(size(&row) > 1.1, "{row:?} makes no number that is beyond f32");
    let vast: Vec<f32> = row.iter().map(|w| f32::MAX.copysign(*w)).collect();
    write_npy_f32(dir.path().join("vast.npy"), &[1, 12], &vast).unwrap();
    let model = std::fs::read(dir.path().join("run/model.safetensors")).unwrap();
    for (input, output, what) in [
        ("v.npy", "e.npy", "v.npy"),
        ("nan.npy", "e.npy", "row 4"),
        ("missing.npy", "e.npy", "missing.npy"),
        ("vast.npy", "e.npy", "vast.npy"),
        ("u.npy", "run/../run/model.safetensors", "--output"),
    ] {
        let args = ["embed", "--model", "run", "--side", "u", "--input", input, "--output", output];
        let output = run(dir.path(), &args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1 && stderr.contains(what), "{stderr}");
        assert!(!dir.path().join("e.npy").exists());
        assert!(model == std::fs::read(dir.path().join("run/model.safetensors")).unwrap());
    }
    for (side, dim) in [("u", 12), ("v", 5)] {
        let input = format!("{side}.npy");
        let got = json(
            dir.path(),
            &["embed", "--model", "run", "--side", side, "--input", &input, "--output", "e.npy", "--json"],
        );
        assert_eq!(got["rows"], 2000);
        let embedded = Npy::open(dir.path().join("e.npy")).unwrap();
        assert_eq!((embedded.rows(), embedded.dim()), (2000, 5));
        let x = Npy::open(dir.path().join(&input)).unwrap();
        assert_eq!(x.dim(), dim);
        // g(x) = W x + b, by hand for one row.
        let (tensors, _) = contrastive::data::tensors::read(&dir.path().join("run/model.safetensors")).unwrap();
        let tensor = |name: String| &tensors.iter().find(|t| t.name == name).unwrap().data;
        let (w, b) = (tensor(format!("{side}.0.weight")), tensor(format!("{side}.0.bias")));
        let row = &x.as_f32().unwrap()[1999 * dim..];
        for k in 0..5 {
            let want: f32 = b[k] + (0..dim).map(|i| w[k * dim + i] * row[i]).sum::<f32>();
            assert!((embedded.as_f32().unwrap()[1999 * 5 + k] - want).abs() < 1e-5);
        }
    }
}

// Recall over training is in the line of each epoch's last step, whatever is logged besides; at the end it is that
// of the report. Pairs made and the same pairs from files are one experiment.
#[test]
fn ocean_reports_recall_as_it_learns() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["train", "ocean", "--quick", "--batch", "16", "--epochs", "2", "--log-every", "1000", "--json"];
    let made = json(dir.path(), &[&args[..], &["--samples", "80", "--held-out", "0.4", "--out", "made"]].concat());
    let metrics = std::fs::read_to_string(dir.path().join("made/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 2, 5]);
    for key in ["u_to_v_at_1", "u_to_v_at_5", "v_to_u_at_1", "v_to_u_at_5"] {
        let over_training = |set: &str, line: usize| &lines[line][format!("recall_{set}_{key}")];
        assert!(over_training("test", 0).is_null() && over_training("train", 1).is_number());
        assert_eq!(*over_training("test", 2), made["recall"][key], "{key}");
    }
    json(dir.path(), &["data", "ocean", "--quick", "--samples", "80", "--out", "data", "--json"]);
    let read = json(dir.path(), &[&args[..], &["--data", "data", "--held-out", "0.4", "--out", "read"]].concat());
    assert_eq!((&made["loss"], &made["recall"]), (&read["loss"], &read["recall"]));
}

const LONG: &[&str] = &["train", "--epochs", "150", "--out"];

fn start(dir: &Path, args: &[&str]) -> Child {
    contrastive(dir, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Kills a run `times` times at random moments, then lets it finish; every file stays readable and the model has the
/// bits of an undisturbed run.
fn survives_kills(times: usize) {
    use rand::{RngExt, SeedableRng};
    let dir = tempfile::tempdir().unwrap();
    let undisturbed = [LONG, &["whole"]].concat();
    let begun = std::time::Instant::now();
    assert!(run(dir.path(), &undisturbed).status.success());
    let whole = begun.elapsed().as_secs_f64();
    // From the clock: other moments each time.
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let args = [LONG, &["killed", "--resume"]].concat();
    for _ in 0..times {
        let mut child = start(dir.path(), &args);
        std::thread::sleep(Duration::from_secs_f64(rng.random_range(0.0..0.7 * whole)));
        child.kill().unwrap();
        child.wait().unwrap();
        for name in ["checkpoint.safetensors", "model.safetensors"] {
            let path = dir.path().join("killed").join(name);
            if path.exists() {
                contrastive::data::tensors::read(&path).unwrap();
            }
        }
    }
    assert!(run(dir.path(), &args).status.success());
    assert!(model(&dir.path().join("whole")) == model(&dir.path().join("killed")));
    let metrics = std::fs::read_to_string(dir.path().join("killed/metrics.jsonl")).unwrap();
    let steps: Vec<u64> =
        metrics.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect();
    assert!(steps.windows(2).all(|w| w[0] < w[1]), "each step once, in order");
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    survives_kills(3);
}

#[test]
#[ignore = "half a minute: ten kills; cargo test --release --test cli -- --ignored"]
fn ten_kills() {
    survives_kills(10);
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_a_checkpoint_and_130() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(dir.path(), &[LONG, &["whole"]].concat()).status.success());
    for signal in ["-INT", "-TERM"] {
        let mut child = start(dir.path(), &[LONG, &["run"]].concat());
        // Past its first metrics: the handler is in place.
        while !dir.path().join("run/metrics.jsonl").exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(100));
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130));
        // Without --resume it would be lost: refused.
        let again = run(dir.path(), &[LONG, &["run"]].concat());
        assert_eq!(again.status.code(), Some(2), "{}", String::from_utf8_lossy(&again.stderr));
        let other = run(dir.path(), &[LONG, &["run", "--resume", "--lr", "0.5"]].concat());
        assert!(String::from_utf8_lossy(&other.stderr).contains("lr"), "another lr is another run");
        assert!(run(dir.path(), &[LONG, &["run", "--resume"]].concat()).status.success());
        assert!(model(&dir.path().join("whole")) == model(&dir.path().join("run")));
        std::fs::remove_dir_all(dir.path().join("run")).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_no_half_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let names = || std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut child = start(dir.path(), &["data", "ocean", "--out", ".", "--samples", "1000000"]);
    // v.npy is hours of work, and a temporary file until it is done, in a folder of its own with what is done.
    let started = || {
        names().filter(|name| name.starts_with(".contrastive-")).any(|new| dir.path().join(new).join("u.npy").exists())
    };
    while !started() {
        std::thread::sleep(Duration::from_millis(5));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(names().collect::<Vec<_>>(), Vec::<String>::new());
}

// Wherever in its writing it is: it has written all of its files, or it was interrupted, and no write has failed.
#[cfg(unix)]
#[test]
fn ctrl_c_is_never_a_failed_write() {
    for delay in 0..60 {
        let dir = tempfile::tempdir().unwrap();
        let names = || std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let args = ["data", "gp", "--out", ".", "--samples", "2000"];
        let mut child = contrastive(dir.path(), &args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        while names().count() == 0 && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_micros(500 * delay));
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(0 | 130)), "{:?}: {stderr}", output.status);
        let left: Vec<_> = names().filter(|name| name.starts_with('.')).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

// A set takes another's place whole, or not at all.
#[test]
fn a_data_set_that_cannot_be_written_leaves_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let names = || {
        let all = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        all.collect::<std::collections::BTreeSet<_>>()
    };
    assert!(run(dir.path(), &["data", "digits", "--out", ".", "--samples", "20"]).status.success());
    let before = std::fs::read(dir.path().join("labels.npy")).unwrap();
    assert_eq!(names(), ["labels.npy", "u.npy", "v.npy"].map(String::from).into());
    std::fs::remove_file(dir.path().join("v.npy")).unwrap();
    std::fs::create_dir(dir.path().join("v.npy")).unwrap();
    let output = run(dir.path(), &["data", "gp", "--out", ".", "--samples", "10"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("v.npy"));
    assert_eq!(names(), ["labels.npy", "u.npy", "v.npy"].map(String::from).into());
    assert!(std::fs::read(dir.path().join("labels.npy")).unwrap() == before);
    std::fs::remove_dir(dir.path().join("v.npy")).unwrap();
    assert!(run(dir.path(), &["data", "gp", "--out", ".", "--samples", "10"]).status.success());
    assert_eq!(names(), ["u.npy", "v.npy"].map(String::from).into());
}

// What a run would write over is not what it reads, and a checkpoint out of reach is not none.
#[test]
fn a_run_leaves_what_it_reads_and_what_it_cannot_resume() {
    let dir = tempfile::tempdir().unwrap();
    let ends = |args: &[&str], with: &str| {
        let output = run(dir.path(), args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(2) && said.lines().count() == 1 && said.contains(with),
            "{args:?}: {said}"
        );
    };
    assert!(run(dir.path(), &["data", "gp", "--out", ".", "--samples", "64"]).status.success());
    std::fs::create_dir(dir.path().join("run")).unwrap();
    std::fs::copy(dir.path().join("u.npy"), dir.path().join("run/model.safetensors")).unwrap();
    let pairs = ["train", "pairs", "--v", "v.npy", "--batch", "16", "--epochs", "1", "--out", "run"];
    ends(&[&pairs[..], &["--u", "run/model.safetensors"]].concat(), "another file than those of run");
    assert!(dir.path().join("run/model.safetensors").exists());
    let pairs = [&pairs[..], &["--u", "u.npy"]].concat();
    assert!(run(dir.path(), &pairs).status.success());
    #[cfg(unix)]
    {
        // On a disk that is not there now, say.
        let (checkpoint, away) = (dir.path().join("run/checkpoint.safetensors"), dir.path().join("away"));
        let model = std::fs::read(dir.path().join("run/model.safetensors")).unwrap();
        std::fs::rename(&checkpoint, &away).unwrap();
        std::os::unix::fs::symlink("nowhere", &checkpoint).unwrap();
        ends(&[&pairs[..], &["--resume"]].concat(), "checkpoint.safetensors");
        assert!(std::fs::read(dir.path().join("run/model.safetensors")).unwrap() == model);
        std::fs::rename(&away, &checkpoint).unwrap();
    }
    // A model of other settings is not this folder's.
    let config = std::fs::read_to_string(dir.path().join("run/config.toml")).unwrap();
    std::fs::write(dir.path().join("run/config.toml"), config.replace("tilting = \"cosine\"", "tilting = \"dot\""))
        .unwrap();
    ends(&["embed", "--model", "run", "--side", "u", "--input", "u.npy", "--output", "e.npy"], "model.safetensors");
    // Its own settings are what a run may be told by.
    std::fs::write(dir.path().join("run/config.toml"), config).unwrap();
    assert!(run(dir.path(), &["train", "--config", "run/config.toml", "--out", "run"]).status.success());
}

// Paths that are no text are told as well as can be.
#[cfg(target_os = "linux")]
#[test]
fn a_path_that_is_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let name = std::ffi::OsStr::from_bytes(b"out\xff");
    let mut command = Command::new(env!("CARGO_BIN_EXE_contrastive"));
    let output = command
        .current_dir(dir.path())
        .args(["data", "gp", "--samples", "3", "--json", "--out"])
        .arg(name)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(json["out"].as_str().unwrap().starts_with("out") && dir.path().join(name).join("u.npy").exists());
}

#[test]
fn help_documents_every_flag_with_its_default() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["loss", "train", "embed", "retrieve", "classify", "sample", "reproduce", "bench", "devices", "data"]
    {
        let output = run(dir.path(), &[command, "--help"]);
        assert!(output.status.success());
        let help = String::from_utf8(output.stdout).unwrap();
        let mut blocks: Vec<String> = Vec::new();
        for line in help.lines() {
            if line.trim_start().starts_with('-') {
                blocks.push(String::new());
            }
            if let Some(block) = blocks.last_mut() {
                block.push_str(line);
                block.push('\n');
            }
        }
        assert!(blocks.len() > 5, "{command}");
        for block in blocks {
            let required = help.lines().find(|l| l.starts_with("Usage:")).unwrap();
            let name = block.split_whitespace().find(|w| w.starts_with("--")).unwrap().trim_end_matches(',');
            let switch = !block.lines().next().unwrap().contains('<') && !block.contains('[');
            let documented = block.contains("default") || required.contains(&format!("{name} ")) || switch;
            assert!(documented, "{command} {name} says no default:\n{block}");
        }
    }
}

/// What a `[default: ...]` of `train --help` says of an experiment: names before a value are those it is of, one without
/// names is everybody else's.
fn default_of<'a>(text: &'a str, experiment: &str) -> Option<&'a str> {
    let (mut names, mut other) = (Vec::new(), None);
    for word in text.split([' ', ',', ';', '\n']).filter(|word| !word.is_empty()) {
        match word {
            "and" | "else" => {}
            name if experiments::ALL.iter().any(|e| e.name == name) => names.push(name),
            value if names.is_empty() => other = Some(value),
            value if std::mem::take(&mut names).contains(&experiment) => return Some(value),
            _ => {}
        }
    }
    other
}

#[test]
fn help_tells_the_defaults_that_are() {
    let dir = tempfile::tempdir().unwrap();
    let help = String::from_utf8(run(dir.path(), &["train", "--help"]).stdout).unwrap();
    let mut compared = 0;
    for block in help.split("\n      --").skip(1) {
        let name = block.split_whitespace().next().unwrap().split(['=', '[']).next().unwrap();
        let Some((_, text)) = block.split_once("[default:") else { continue };
        let text = text.split(']').next().unwrap();
        for experiment in experiments::ALL {
            let given = Partial { experiment: Some(experiment.name.into()), ..Partial::default() };
            let settings: toml::Table = toml::from_str(&experiments::resolve(given).unwrap().to_toml()).unwrap();
            let (Some(is), Some(said)) = (settings.get(&name.replace('-', "_")), default_of(text, experiment.name))
            else {
                continue;
            };
            let same = match is {
                toml::Value::Float(x) => said.parse() == Ok(*x),
                toml::Value::Integer(x) => said.parse() == Ok(*x),
                toml::Value::Boolean(x) => said == if *x { "on" } else { "off" },
                toml::Value::String(x) => said == if x.is_empty() { "none" } else { x },
                _ => true,
            };
            // Precision's is the device's own.
            assert!(same || name == "precision", "{}: --{name} is {is}, and the help says {said}", experiment.name);
            compared += 1;
        }
    }
    assert!(compared > 100, "{compared}");
}

#[test]
fn devices_and_bench_answer() {
    let dir = tempfile::tempdir().unwrap();
    let devices = json(dir.path(), &["devices", "--json"]);
    assert!(devices["cpu"]["isa"].is_string() && devices["cuda"]["cards"].is_array());
    for (objective, operations) in [("conditional", 8.0 * 40.0), ("mmd", 12.0 * 40.0 + 8.0 * 64.0)] {
        let args =
            ["bench", "loss", "--n", "300", "--d", "40", "--objective", objective, "--precision", "bf16", "--json"];
        let bench = json(dir.path(), &args);
        for key in ["median_ms", "min_ms", "flops", "fraction_of_peak", "scratch_bytes"] {
            assert!(bench[key].as_f64().unwrap() > 0.0, "{key}");
        }
        assert_eq!(bench["flops"], operations * 300.0 * 300.0);
    }
    let args = ["bench", "retrieve", "--n", "70", "--m", "3000", "--d", "40", "--tilting", "dot", "--json"];
    let bench = json(dir.path(), &args);
    for key in ["median_ms", "min_ms", "fraction_of_peak"] {
        assert!(bench[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert_eq!(bench["flops"], 2.0 * 70.0 * 3000.0 * 40.0);
    let bench = json(dir.path(), &["bench", "train", "--experiment", "gaussian2d", "--json"]);
    for key in ["median_ms", "min_ms", "steps_per_s", "samples_per_s", "fraction_of_peak"] {
        assert!(bench[key].as_f64().unwrap() > 0.0, "{key}");
    }
    // One number in, one out, on both sides: forward, twice that backward; and the loss.
    let batch = bench["batch"].as_f64().unwrap();
    assert_eq!(bench["flops"], 6.0 * 2.0 * batch + 8.0 * batch * batch);
    // Gradients of unit numbers are nothing, and being off by rounding is no fault.
    json(dir.path(), &["bench", "loss", "--n", "90", "--d", "1", "--json"]);
    // Other inputs have the seeds after the last one.
    let last = u64::MAX.to_string();
    for args in [["bench", "loss", "--n", "90", "--seed", &last], ["bench", "retrieve", "--n", "90", "--seed", &last]] {
        let output = run(dir.path(), &args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    // A card that is not there is a clear refusal, not a panic.
    if devices["cuda"]["cards"].as_array().unwrap().is_empty() {
        let refused = run(dir.path(), &["bench", "loss", "--device", "cuda"]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&refused.stderr).starts_with("error: --device"));
    }
}
