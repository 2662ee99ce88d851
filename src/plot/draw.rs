//! A figure as SVG.

use super::scale::Scale;
use super::{Figure, Mark, Panel, Shape, Style, escape};
use std::fmt::Write;

/// Okabe and Ito's colours, the yellow one left out: told apart by all kinds of colour vision.
const COLOURS: [&str; 7] = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6000"];
const DASHES: [&str; 7] = ["", "8 3", "3 2", "9 3 2 3", "12 4", "5 2", "2 4"];
const TEXT: &str = "#222222";

/// Units of a panel with its labels, and what of it is not plot: above, right, below, left.
const PANEL: [f64; 2] = [370.0, 300.0];
const MARGIN: [f64; 4] = [32.0, 14.0, 50.0, 66.0];
/// Of the figure's title, and of a line of its legend.
const TITLE: f64 = 40.0;
const LEGEND: f64 = 24.0;
/// Width of a letter, of the size of its font: more than most of them.
const LETTER: f64 = 0.62;

/// Coordinates with two digits: no figure shows more.
struct N(f64);

impl std::fmt::Display for N {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = format!("{:.2}", self.0 + 0.0);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

impl Style {
    fn colour(self) -> &'static str {
        match self {
            Style::Theory => "#000000",
            Style::Truth => "#777777",
            Style::Series(i) => COLOURS[i % COLOURS.len()],
        }
    }
    fn stroke(self) -> String {
        let dash = match self {
            Style::Theory => "6 4",
            Style::Truth => "",
            Style::Series(i) => DASHES[i % DASHES.len()],
        };
        let width = if self == Style::Truth { 2.4 } else { 1.8 };
        let dash = if dash.is_empty() { String::new() } else { format!(" stroke-dasharray=\"{dash}\"") };
        format!("fill=\"none\" stroke=\"{}\" stroke-width=\"{width}\"{dash}", self.colour())
    }
    /// A point of radius `r`.
    fn point(self, x: f64, y: f64, r: f64) -> String {
        let polygon = |corners: &[[f64; 2]]| {
            let corners: Vec<_> = corners.iter().map(|c| format!("{},{}", N(x + r * c[0]), N(y + r * c[1]))).collect();
            format!("<polygon points=\"{}\" fill=\"{}\"/>", corners.join(" "), self.colour())
        };
        match self {
            Style::Series(1) => polygon(&[[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]),
            Style::Series(2) => polygon(&[[0.0, -1.2], [1.1, 0.8], [-1.1, 0.8]]),
            Style::Series(3) => polygon(&[[0.0, -1.3], [1.3, 0.0], [0.0, 1.3], [-1.3, 0.0]]),
            Style::Series(4) => polygon(&[[0.0, 1.2], [1.1, -0.8], [-1.1, -0.8]]),
            Style::Series(5) => polygon(&[[-1.2, -0.5], [0.0, -1.2], [1.2, -0.5], [0.8, 1.0], [-0.8, 1.0]]),
            _ => format!("<circle cx=\"{}\" cy=\"{}\" r=\"{}\" fill=\"{}\"/>", N(x), N(y), N(r), self.colour()),
        }
    }
}

fn text(out: &mut String, [x, y]: [f64; 2], size: f64, anchor: &str, more: &str, content: &str) {
    let content = escape(content);
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" font-size=\"{size}\" text-anchor=\"{anchor}\"{more}>{content}</text>",
        N(x),
        N(y)
    );
}

/// The document.
pub fn svg(figure: &Figure) -> String {
    let columns = figure.columns.max(1).min(figure.panels.len().max(1));
    let rows = figure.panels.len().div_ceil(columns);
    let width = (columns as f64 * PANEL[0]).max(figure.title.chars().count() as f64 * 17.0 * LETTER + 20.0);
    let legend = legend(figure, width);
    let lines = legend.iter().map(|(_, at)| at[1]).fold(0.0, f64::max);
    let lines = if legend.is_empty() { 0.0 } else { lines + LEGEND };
    let height = TITLE + rows as f64 * PANEL[1] + lines + 8.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" viewBox=\"0 0 {w} {h}\" \
         font-family=\"DejaVu Sans, Verdana, sans-serif\" fill=\"{TEXT}\">\n<rect width=\"{w}\" height=\"{h}\" fill=\"#ffffff\"/>\n",
        w = N(width),
        h = N(height)
    );
    text(&mut out, [width / 2.0, 26.0], 17.0, "middle", "", &figure.title);
    let left = (width - columns as f64 * PANEL[0]) / 2.0;
    for (i, panel) in figure.panels.iter().enumerate() {
        let at = [left + (i % columns) as f64 * PANEL[0], TITLE + (i / columns) as f64 * PANEL[1]];
        draw_panel(&mut out, panel, at, &format!("{}-{i}", figure.name));
    }
    for (mark, [x, y]) in legend {
        key(&mut out, mark, [x, TITLE + rows as f64 * PANEL[1] + y + 12.0]);
    }
    out + "</svg>\n"
}

/// Marks with a label of their own, and where their entries go below the panels.
fn legend(figure: &Figure, width: f64) -> Vec<(&Mark, [f64; 2])> {
    let mut entries: Vec<(&Mark, f64)> = Vec::new();
    for mark in figure.panels.iter().flat_map(|p| &p.marks) {
        let same = |(other, _): &(&Mark, f64)| other.label == mark.label && other.style == mark.style;
        if !mark.label.is_empty() && !matches!(mark.shape, Shape::Image { .. }) && !entries.iter().any(same) {
            entries.push((mark, 46.0 + mark.label.chars().count() as f64 * 13.0 * LETTER));
        }
    }
    let mut lines: Vec<Vec<(&Mark, f64)>> = vec![];
    for entry in entries {
        let used = lines.last().map(|line| line.iter().map(|e| e.1).sum::<f64>());
        match lines.last_mut() {
            Some(line) if used.unwrap_or(0.0) + entry.1 < width - 20.0 => line.push(entry),
            _ => lines.push(vec![entry]),
        }
    }
    let mut placed = Vec::new();
    for (i, line) in lines.into_iter().enumerate() {
        let mut x = (width - line.iter().map(|e| e.1).sum::<f64>()) / 2.0;
        for (mark, wide) in line {
            placed.push((mark, [x, i as f64 * LEGEND]));
            x += wide;
        }
    }
    placed
}

/// An entry of the legend, the middle of its left end at `[x, y]`.
fn key(out: &mut String, mark: &Mark, [x, y]: [f64; 2]) {
    let line = |out: &mut String| {
        let _ = writeln!(out, "<path d=\"M{} {}H{}\" {}/>", N(x), N(y), N(x + 28.0), mark.style.stroke());
    };
    match mark.shape {
        Shape::Points(_) => *out += &mark.style.point(x + 14.0, y, 4.0),
        Shape::Errors(_) => {
            line(out);
            *out += &mark.style.point(x + 14.0, y, 4.0);
        }
        Shape::Bars(_) => {
            let _ = writeln!(
                out,
                "<rect x=\"{}\" y=\"{}\" width=\"20\" height=\"11\" fill=\"{}\"/>",
                N(x + 4.0),
                N(y - 6.0),
                mark.style.colour()
            );
        }
        // As drawn: segments are shorter than a dash.
        Shape::Contours { .. } => {
            let colour = mark.style.colour();
            let _ = writeln!(
                out,
                "<path d=\"M{} {}H{}\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                N(x),
                N(y),
                N(x + 28.0)
            );
        }
        _ => line(out),
    }
    text(out, [x + 34.0, y + 4.5], 13.0, "start", "", &mark.label);
}

/// A panel's title, centred, and smaller where it would reach farther than `room` to a side.
fn heading(out: &mut String, at: [f64; 2], room: f64, title: &str) {
    let size = (2.0 * room / (title.chars().count() as f64 * LETTER)).min(14.0);
    text(out, at, (10.0 * size).floor() / 10.0, "middle", "", title);
}

fn draw_panel(out: &mut String, panel: &Panel, [x, y]: [f64; 2], id: &str) {
    let [mut left, mut right] = [x + MARGIN[3], x + PANEL[0] - MARGIN[1]];
    let [mut top, mut bottom] = [y + MARGIN[0], y + PANEL[1] - MARGIN[2]];
    let image = panel.marks.iter().find_map(|mark| match &mark.shape {
        Shape::Image { width, values } => Some((*width, values)),
        _ => None,
    });
    if let Some((width, values)) = image {
        heading(out, [x + PANEL[0] / 2.0, y + 20.0], PANEL[0] / 2.0, &panel.title);
        return draw_image(
            out,
            width.max(1),
            values,
            [x + 20.0, y + MARGIN[0], PANEL[0] - 40.0, PANEL[1] - MARGIN[0] - 10.0],
        );
    }
    let extent: Vec<[f64; 2]> = panel.marks.iter().flat_map(|m| m.shape.extent()).collect();
    let scales = |x: [f64; 2], y: [f64; 2]| {
        let along = |i: usize| extent.iter().map(move |p| p[i]);
        [Scale::new(&panel.x, along(0), x), Scale::new(&panel.y, along(1), y)]
    };
    let [mut sx, mut sy] = scales([left, right], [bottom, top]);
    if panel.equal {
        // The axis with room to spare gives it up on both sides.
        let [ux, uy] = [sx.unit(), sy.unit()];
        let [spare_x, spare_y] = [(1.0 - ux / uy).max(0.0), (1.0 - uy / ux).max(0.0)];
        let [half_x, half_y] = [(right - left) * spare_x / 2.0, (bottom - top) * spare_y / 2.0];
        [left, right, top, bottom] = [left + half_x, right - half_x, top + half_y, bottom - half_y];
        [sx, sy] = scales([left, right], [bottom, top]);
    }
    let middle = (left + right) / 2.0;
    heading(out, [middle, top - 12.0], (middle - x).min(x + PANEL[0] - middle), &panel.title);
    let names = |axis: &super::Axis, ticks: Vec<(f64, String)>| -> Vec<(f64, String)> {
        if axis.names.is_empty() {
            return ticks;
        }
        axis.names.iter().enumerate().map(|(i, name)| (i as f64, name.clone())).collect()
    };
    for (value, label) in names(&panel.x, sx.spaced(12.0 * LETTER)) {
        let Some(at) = sx.at(value) else { continue };
        let _ = writeln!(out, "<path d=\"M{} {}V{}\" stroke=\"#e4e4e4\"/>", N(at), N(top), N(bottom));
        // Names that would touch their neighbours lean.
        let room = (right - left) / panel.x.names.len().max(1) as f64;
        let long =
            !panel.x.names.is_empty() && panel.x.names.iter().any(|n| n.chars().count() as f64 * 12.0 * LETTER > room);
        if long {
            let turn = format!(" transform=\"rotate(-20 {} {})\"", N(at), N(bottom + 16.0));
            text(out, [at + 12.0, bottom + 16.0], 11.0, "end", &turn, &label);
        } else {
            text(out, [at, bottom + 17.0], 12.0, "middle", "", &label);
        }
    }
    for (value, label) in names(&panel.y, sy.ticks()) {
        let Some(at) = sy.at(value) else { continue };
        let _ = writeln!(out, "<path d=\"M{} {}H{}\" stroke=\"#e4e4e4\"/>", N(left), N(at), N(right));
        text(out, [left - 6.0, at + 4.0], 12.0, "end", "", &label);
    }
    text(out, [(left + right) / 2.0, bottom + 38.0], 13.0, "middle", "", &panel.x.label);
    let [lx, ly] = [left - MARGIN[3] + 14.0, (top + bottom) / 2.0];
    text(out, [lx, ly], 13.0, "middle", &format!(" transform=\"rotate(-90 {} {})\"", N(lx), N(ly)), &panel.y.label);
    let frame =
        format!("x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"", N(left), N(top), N(right - left), N(bottom - top));
    let _ = writeln!(out, "<clipPath id=\"{id}\"><rect {frame}/></clipPath>\n<g clip-path=\"url(#{id})\">");
    let groups = panel.marks.iter().filter(|m| matches!(m.shape, Shape::Bars(_))).count();
    let mut group = 0;
    for mark in &panel.marks {
        draw_mark(out, mark, &sx, &sy, [group, groups]);
        group += usize::from(matches!(mark.shape, Shape::Bars(_)));
    }
    let _ = writeln!(out, "</g>\n<rect {frame} fill=\"none\" stroke=\"#444444\"/>");
}

impl Shape {
    /// Points that an axis must hold.
    fn extent(&self) -> Vec<[f64; 2]> {
        match self {
            Shape::Line(xy) | Shape::Points(xy) => xy.clone(),
            Shape::Errors(xyz) => xyz.iter().flat_map(|&[x, y, half]| [[x, y], [x, y - half], [x, y + half]]).collect(),
            Shape::Bars(y) => y.iter().enumerate().flat_map(|(x, &y)| [[x as f64, 0.0], [x as f64, y]]).collect(),
            Shape::Arrows(xyzw) => xyzw.iter().flat_map(|&[x, y, dx, dy]| [[x, y], [x + dx, y + dy]]).collect(),
            Shape::Contours { x, y, .. } => {
                let ends = |v: &[f64]| [v.first().copied().unwrap_or(0.0), v.last().copied().unwrap_or(0.0)];
                let ([x0, x1], [y0, y1]) = (ends(x), ends(y));
                vec![[x0, y0], [x1, y1]]
            }
            Shape::Image { .. } => vec![],
        }
    }
}

fn draw_mark(out: &mut String, mark: &Mark, sx: &Scale, sy: &Scale, [group, groups]: [usize; 2]) {
    let place = |x: f64, y: f64| Some([sx.at(x)?, sy.at(y)?]);
    let stroke = mark.style.stroke();
    let line = |points: &mut dyn Iterator<Item = [f64; 2]>| {
        let mut path = String::new();
        let mut pen = 'M';
        for [x, y] in points {
            let Some([x, y]) = place(x, y) else {
                pen = 'M';
                continue;
            };
            let _ = write!(path, "{pen}{} {}", N(x), N(y));
            pen = 'L';
        }
        if path.is_empty() { path } else { format!("<path d=\"{path}\" {stroke} stroke-linejoin=\"round\"/>\n") }
    };
    match &mark.shape {
        Shape::Line(xy) => *out += &line(&mut xy.iter().copied()),
        Shape::Points(xy) => {
            let crowd = xy.len() > 150;
            let _ = writeln!(out, "<g opacity=\"{}\">", if crowd { 0.45 } else { 1.0 });
            for [x, y] in xy.iter().filter_map(|&[x, y]| place(x, y)) {
                *out += &mark.style.point(x, y, if crowd { 2.0 } else { 4.0 });
            }
            *out += "</g>\n";
        }
        Shape::Errors(xyz) => {
            *out += &line(&mut xyz.iter().map(|&[x, y, _]| [x, y]));
            for &[x, y, half] in xyz {
                let Some([px, py]) = place(x, y) else { continue };
                *out += &mark.style.point(px, py, 4.0);
                // Where the lower end is not on the axis, the bar goes down to the edge.
                let Some(high) = sy.at(y + half) else { continue };
                let low = sy.at(y - half).unwrap_or(1e4);
                if half > 0.0 {
                    let _ = writeln!(
                        out,
                        "<path d=\"M{l} {h}H{r}M{x} {h}V{b}M{l} {b}H{r}\" stroke=\"{c}\" stroke-width=\"1.4\"/>",
                        l = N(px - 4.0),
                        r = N(px + 4.0),
                        x = N(px),
                        h = N(high),
                        b = N(low),
                        c = mark.style.colour()
                    );
                }
            }
        }
        Shape::Bars(heights) => {
            let wide = 0.8 / groups as f64;
            for (x, &height) in heights.iter().enumerate() {
                let from = x as f64 - 0.4 + group as f64 * wide;
                let (Some(l), Some(r), Some(h)) = (sx.at(from), sx.at(from + wide), sy.at(height)) else { continue };
                // A logarithmic axis has no zero; its bars stand on the edge.
                let zero = sy.at(0.0).unwrap_or(1e4);
                let _ = writeln!(
                    out,
                    "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>",
                    N(l),
                    N(h.min(zero)),
                    N((r - l) * 0.94),
                    N((zero - h).abs()),
                    mark.style.colour()
                );
            }
        }
        Shape::Arrows(arrows) => {
            for &[x, y, dx, dy] in arrows {
                let (Some([ax, ay]), Some([bx, by])) = (place(x, y), place(x + dx, y + dy)) else { continue };
                let length = (bx - ax).hypot(by - ay);
                if length < 0.5 {
                    continue;
                }
                let head = (0.4 * length).min(5.0) / length;
                let [hx, hy] = [(bx - ax) * head, (by - ay) * head];
                let _ = writeln!(
                    out,
                    "<path d=\"M{} {}L{bx} {by}M{} {}L{bx} {by}L{} {}\" fill=\"none\" stroke=\"{}\"/>",
                    N(ax),
                    N(ay),
                    N(bx - hx - 0.5 * hy),
                    N(by - hy + 0.5 * hx),
                    N(bx - hx + 0.5 * hy),
                    N(by - hy - 0.5 * hx),
                    mark.style.colour(),
                    bx = N(bx),
                    by = N(by)
                );
            }
        }
        Shape::Contours { x, y, values, levels } => {
            for &level in levels {
                let mut path = String::new();
                for [a, b] in contour(x, y, values, level) {
                    let (Some(a), Some(b)) = (place(a[0], a[1]), place(b[0], b[1])) else { continue };
                    let _ = write!(path, "M{} {}L{} {}", N(a[0]), N(a[1]), N(b[0]), N(b[1]));
                }
                if !path.is_empty() {
                    // Segments are shorter than a dash, so the colour alone tells the law.
                    let (colour, width) = (mark.style.colour(), if mark.style == Style::Truth { 1.8 } else { 1.4 });
                    let _ = writeln!(
                        out,
                        "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" stroke-linecap=\"round\"/>"
                    );
                }
            }
        }
        Shape::Image { .. } => {}
    }
}

/// Segments on which the bilinear interpolant of `values` is about `level` (marching squares; saddles take the side of
/// the cell's mean).
pub(super) fn contour(x: &[f64], y: &[f64], values: &[f64], level: f64) -> Vec<[[f64; 2]; 2]> {
    let mut segments = Vec::new();
    for i in 1..y.len() {
        for j in 1..x.len() {
            // Counter-clockwise from the lower left.
            let corners = [[j - 1, i - 1], [j, i - 1], [j, i], [j - 1, i]];
            let f = corners.map(|[j, i]| values[i * x.len() + j] - level);
            if f.iter().any(|f| !f.is_finite()) {
                continue;
            }
            let mut cuts = Vec::new();
            for k in 0..4 {
                let (a, b) = (f[k], f[(k + 1) % 4]);
                if (a < 0.0) != (b < 0.0) {
                    let t = a / (a - b);
                    let [[aj, ai], [bj, bi]] = [corners[k], corners[(k + 1) % 4]];
                    cuts.push([x[aj] + t * (x[bj] - x[aj]), y[ai] + t * (y[bi] - y[ai])]);
                }
            }
            match cuts[..] {
                [a, b] => segments.push([a, b]),
                [a, b, c, d] => {
                    let joined = (f.iter().sum::<f64>() < 0.0) == (f[0] < 0.0);
                    segments.extend(if joined { [[a, b], [c, d]] } else { [[d, a], [b, c]] });
                }
                _ => {}
            }
        }
    }
    segments
}

/// Grey squares, as large as fit into `[x, y, width, height]`; neighbours of one shade are one rectangle.
fn draw_image(out: &mut String, width: usize, values: &[f64], [x, y, w, h]: [f64; 4]) {
    const SHADES: f64 = 31.0;
    let rows = values.len().div_ceil(width);
    let unit = (w / width as f64).min(h / rows.max(1) as f64);
    let left = x + (w - unit * width as f64) / 2.0;
    let shade = |v: f64| if v.is_finite() { (v.clamp(0.0, 1.0) * SHADES).round() as u32 } else { 0 };
    let _ = writeln!(
        out,
        "<g shape-rendering=\"crispEdges\"><rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"#ffffff\" stroke=\"#999999\"/>",
        N(left),
        N(y),
        N(unit * width as f64),
        N(unit * rows as f64)
    );
    for (i, row) in values.chunks(width).enumerate() {
        let mut from = 0;
        while from < row.len() {
            let level = shade(row[from]);
            let run = row[from..].iter().take_while(|&&v| shade(v) == level).count();
            if level > 0 {
                let grey = 255 - (f64::from(level) / SHADES * 255.0) as u32;
                let _ = write!(
                    out,
                    "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"#{grey:02x}{grey:02x}{grey:02x}\"/>",
                    N(left + from as f64 * unit),
                    N(y + i as f64 * unit),
                    N(run as f64 * unit),
                    N(unit)
                );
            }
            from += run;
        }
    }
    *out += "</g>\n";
}
