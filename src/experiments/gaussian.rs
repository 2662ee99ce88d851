//! Linear encoders on Gaussian pairs, certified against the closed forms: the Gaussian process of section 6.1
//! and the two-dimensional example of section 5.4.

use super::{Error, Experiment, Learned, Report, check_samples};
use crate::config::{Config, ObjectiveName};
use crate::data::gaussian2d::{self, Gaussian};
use crate::data::{Split, gp};
use crate::nn::EncoderSpec;
use crate::objective::Tilting;
use crate::optim::Schedule;
use crate::theory::{Model, Theory};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The Gaussian process.
pub const GP: Experiment = Experiment {
    name: "gp",
    about: "linear encoders of noisy point values and of Fourier coefficients of a Gaussian process, beside the closed-form optimum",
    labelled: false,
    // A cosine to zero takes the optimiser's noise off the last digits: twice the excess error without it.
    defaults: |base| Config { epochs: 500, schedule: Schedule::Cosine, ..base },
    quick: |config| Config { epochs: 60, lr: 4e-3, ..config },
    data_files: |_| Vec::new(),
    data: |config| draw(&gp::gp(), config),
    evaluate: None,
    report: |learned, report| {
        report_on(&gp::gp(), learned, report);
        Ok(())
    },
};

/// Two correlated numbers.
pub const GAUSSIAN2D: Experiment = Experiment {
    name: "gaussian2d",
    about: "one-dimensional linear encoders of two correlated Gaussian numbers, beside the closed forms",
    labelled: false,
    defaults: |base| Config { dim: 1, epochs: 200, lr: 3e-3, schedule: Schedule::Cosine, ..base },
    quick: |config| Config { epochs: 30, lr: 1e-2, ..config },
    data_files: |_| Vec::new(),
    data: |config| draw(&gaussian2d::gaussian2d(), config),
    evaluate: None,
    report: |learned, report| {
        report_on(&gaussian2d::gaussian2d(), learned, report);
        Ok(())
    },
};

fn draw(law: &Gaussian, config: &Config) -> Result<Split, Error> {
    check_samples(config, law.dim_u + law.dim_v)?;
    Ok(Split::at_end(Arc::new(law.sample(config.seed, config.samples)), 0))
}

/// The model of linear encoders `g` `[dim, dim_u]` and `h` `[dim, dim_v]`. `None` for cosine, as unit rows make the model
/// non-Gaussian, and for encoders so large that f64 does not tell its covariance.
pub(super) fn quadratic<'a>(
    theory: &'a Theory,
    tilting: Tilting,
    g: &[f64],
    h: &[f64],
    dim: usize,
    tau: f64,
) -> Option<Model<'a>> {
    let (nu, nv) = (g.len() / dim, h.len() / dim);
    let model = match tilting {
        Tilting::Dot => {
            let entry = |ij: usize| (0..dim).map(|k| g[k * nu + ij / nv] * h[k * nv + ij % nv]).sum::<f64>() / tau;
            theory.dot(&(0..nu * nv).map(entry).collect::<Vec<_>>())
        }
        Tilting::L2 => theory.l2(g, h, dim, tau),
        Tilting::Cosine => return None,
    };
    model.has_conditionals().then_some(model)
}

/// What a report says of the theory: null where the settings have no closed form.
const THEORY: [&str; 7] = [
    "err_u_given_v",
    "err_v_given_u",
    "optimum_u_given_v",
    "optimum_v_given_u",
    "signal_u_given_v",
    "signal_v_given_u",
    "a_rel_error",
];

fn report_on(law: &Gaussian, learned: &Learned<'_>, report: &mut Report) {
    let (config, dim) = (learned.config, learned.config.dim);
    let linear = |spec: &EncoderSpec| *spec == EncoderSpec::Linear { bias: false };
    report.insert("theory", THEORY.map(|key| (key, None::<f64>)).into_iter().collect::<BTreeMap<_, _>>());
    if !(linear(&config.encoder_u) && linear(&config.encoder_v)) {
        return report.table.push("no closed form: an encoder is not linear without bias".into());
    }
    let (g, h) = (learned.tensor("u.0.weight"), learned.tensor("v.0.weight"));
    let theory = Theory::new(law);
    let Some(model) = quadratic(&theory, learned.tilting, &g, &h, dim, learned.tau) else {
        return report
            .table
            .push("no closed form: a cosine tilting is not Gaussian, nor are encoders too large for f64".into());
    };
    // The closed forms know of no smoothing.
    let optimum = match (learned.tilting, config.objective) {
        _ if config.smoothing > 0.0 => None,
        (Tilting::Dot, ObjectiveName::Conditional) => Some(theory.conditional_optimum(dim)),
        (Tilting::Dot, ObjectiveName::Joint) => Some(theory.joint_optimum(dim)),
        (Tilting::L2, ObjectiveName::Conditional) if config.lambda_v == 0.0 => Some(theory.l2_optimum(dim)),
        (Tilting::L2, ObjectiveName::Conditional) if config.lambda_u == 0.0 => Some(theory.l2_optimum_of_v(dim)),
        _ => None,
    };
    let nothing = theory.conditional_optimum(0);
    let c = model.certify(optimum.as_ref().unwrap_or(&nothing));
    let known = |x: f64| optimum.is_some().then_some(x);
    let values = [
        Some(c.err_u_given_v),
        Some(c.err_v_given_u),
        known(c.optimum_u_given_v),
        known(c.optimum_v_given_u),
        Some(c.signal_u_given_v),
        Some(c.signal_v_given_u),
        known(c.a_rel_error),
    ];
    report.insert("theory", THEORY.into_iter().zip(values).collect::<BTreeMap<_, _>>());
    let columns = ["learned", "optimum", "signal", "excess"].map(|name| format!("{name:>12}")).concat();
    report.table.push(format!("{:<14}{columns}", "squared error"));
    for (name, error, best, signal) in [
        ("E[u|v]", c.err_u_given_v, c.optimum_u_given_v, c.signal_u_given_v),
        ("E[v|u]", c.err_v_given_u, c.optimum_v_given_u, c.signal_v_given_u),
    ] {
        let [best, excess] = match optimum {
            Some(_) => [format!("{best:.6}"), format!("{:.3}%", 100.0 * (error - best) / signal)],
            None => ["unknown", ""].map(String::from),
        };
        report.table.push(format!("{name:<14}{error:>12.6}{best:>12}{signal:>12.6}{excess:>12}"));
    }
    let Some(optimum) = optimum else { return };
    report.table.push(format!("relative error of A = G'H/tau: {:.2}%", 100.0 * c.a_rel_error));
    if law.dim_u == 1 && law.dim_v == 1 {
        let values = [("a", model.a()[0], optimum.a()[0]), ("b", model.b()[0], optimum.b()[0])];
        for (name, got, best) in values {
            report.insert(name, got);
            report.insert(&format!("{name}_optimum"), best);
            report.table.push(format!("{name}: learned {got:.4}, optimum {best:.4}"));
        }
    }
}
