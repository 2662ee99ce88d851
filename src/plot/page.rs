//! Figures in one HTML page.

use super::{Criterion, Figure, escape};
use std::fmt::Write;

const STYLE: &str = "body{font:16px/1.5 Georgia,serif;color:#222;max-width:1180px;margin:2em auto;padding:0 1em}\
h1,h2{font-weight:normal;line-height:1.25}h2{margin-top:2.5em;border-top:1px solid #ccc;padding-top:1em}\
svg{max-width:100%;height:auto;display:block;margin:1em auto}\
table{border-collapse:collapse;margin:1em 0;font:14px/1.4 Verdana,sans-serif;display:block;overflow-x:auto}\
caption{text-align:left;font-style:italic;padding:.3em 0}\
th,td{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}\
th:first-child,td:first-child{text-align:left}.claim{text-align:left}\
.holds{color:#00634a;font-weight:bold}.fails{color:#b3001b;font-weight:bold}\
@media print{h2{break-before:page}}";

/// A page of `figures` under `title` and paragraphs `intro`, which opens without a network: how many criteria hold, then
/// each figure with what to see in it, its tables and its criteria.
pub fn report(title: &str, intro: &[String], figures: &[Figure]) -> String {
    let title = escape(title);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    intro.iter().for_each(|text| out += &format!("<p>{}</p>\n", escape(text)));
    out += "<table><tr><th>figure</th><th class=\"claim\">shows</th><th>criteria</th></tr>\n";
    for figure in figures {
        let held = figure.criteria.iter().filter(|c| c.passed).count();
        let all = figure.criteria.len();
        let class = if held == all { "holds" } else { "fails" };
        let _ = writeln!(
            out,
            "<tr><td><a href=\"#{name}\">{name}</a></td><td class=\"claim\">{}</td><td class=\"{class}\">{held} of {all} hold</td></tr>",
            escape(&figure.title),
            name = escape(&figure.name)
        );
    }
    out += "</table>\n";
    for figure in figures {
        let (name, heading) = (escape(&figure.name), escape(&figure.title));
        let _ = writeln!(out, "<h2 id=\"{name}\">{name}. {heading}</h2>\n<p>{}</p>", escape(&figure.see));
        if !figure.panels.is_empty() {
            out += &figure.svg();
        }
        for table in &figure.tables {
            let _ = write!(out, "<table><caption>{}</caption>", escape(&table.title));
            row(&mut out, "th", &table.columns);
            table.rows.iter().for_each(|cells| row(&mut out, "td", cells));
            out += "</table>\n";
        }
        out += "<table><caption>criteria</caption>\n";
        for Criterion { claim, found, passed } in &figure.criteria {
            let (class, word) = if *passed { ("holds", "holds") } else { ("fails", "FAILS") };
            let _ = writeln!(
                out,
                "<tr><td class=\"claim\">{}</td><td>{}</td><td class=\"{class}\">{word}</td></tr>",
                escape(claim),
                escape(found)
            );
        }
        out += "</table>\n";
    }
    out + "</body></html>\n"
}

fn row(out: &mut String, tag: &str, cells: &[String]) {
    *out += "<tr>";
    cells.iter().for_each(|cell| *out += &format!("<{tag}>{}</{tag}>", escape(cell)));
    *out += "</tr>\n";
}
