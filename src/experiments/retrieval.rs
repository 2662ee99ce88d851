//! What experiments judged by retrieval report: recall both ways, at the end and over training.

use super::{Error, Learned, Report};
use crate::data::{Side, SideOf, Source, Split, Subset, Table};
use crate::tasks::retrieval::{self, Recall, recall_on};
use crate::train::Evaluation;

/// The most pairs that recall over training is measured on: enough for a percent of its value, and less work than
/// an epoch on as many pairs as leave so many held out.
const CURVE: usize = 4096;

fn recall(learned: &Learned<'_>, source: &dyn Source) -> Recall {
    let [u, v] = [Side::U, Side::V].map(|side| learned.embed(&SideOf(source, side), side));
    let [u, v] = [&u, &v].map(|data| Table { data, dim: learned.config.dim });
    // A card without room for it leaves it to the host.
    let on_device = learned.device.search().and_then(|mut s| recall_on(&mut *s, learned.tilting, &u, &v).ok());
    // Embeddings beyond f32 find nobody.
    on_device.or_else(|| retrieval::recall(learned.tilting, &u, &v).ok()).unwrap_or_default()
}

/// Recall on the held-out pairs.
pub fn report(learned: &Learned<'_>, report: &mut Report) -> Result<(), Error> {
    let test = &*learned.split.test;
    if test.is_empty() {
        return Ok(());
    }
    let recall = recall(learned, test);
    report.insert("recall", recall);
    report.table.push(format!("{:<10}{:>8}{:>8}   on {} held-out pairs", "recall", "@1", "@5", test.len()));
    for (name, at_1, at_5) in
        [("u to v", recall.u_to_v_at_1, recall.u_to_v_at_5), ("v to u", recall.v_to_u_at_1, recall.v_to_u_at_5)]
    {
        report.table.push(format!("{name:<10}{:>7.1}%{:>7.1}%", 100.0 * at_1, 100.0 * at_5));
    }
    Ok(())
}

/// How many pairs recall over training is measured on.
pub fn pairs(split: &Split) -> usize {
    CURVE.min(split.train.len()).min(split.test.len())
}

/// Recall on the first held-out pairs and on as many of the training pairs, as `recall_test_u_to_v_at_1` and so on.
pub fn evaluate(learned: &Learned<'_>) -> Evaluation {
    let [train, test] = [&learned.split.train, &learned.split.test];
    let pairs = pairs(learned.split);
    let mut out = Evaluation::new();
    if pairs > 0 {
        for (name, source) in [("train", train), ("test", test)] {
            let recall = recall(learned, &Subset::new(source.clone(), 0..pairs));
            let recall = serde_json::to_value(recall).expect("numbers have a JSON form");
            let keys = recall.as_object().expect("a struct").iter();
            out.extend(keys.map(|(key, value)| (format!("recall_{name}_{key}"), value.clone())));
        }
    }
    out
}
