//! Figures as data: what is drawn, what it should show, and its numbers. [`Figure::svg`] and [`Figure::png`] draw
//! it, [`Figure::csv`] and [`Figure::json`] write its numbers, [`report`] sets figures into one page that needs no
//! network.
//!
//! One style for all: a colour means the same law in every figure, and no two colours differ by hue alone.

mod draw;
mod page;
mod scale;
#[cfg(test)]
mod tests;

pub use page::report;

/// The one font of all figures: DejaVu Sans, cut down to Latin, Greek and signs (its licence stands beside it), so that a
/// figure is the same on every machine.
const FONT: &[u8] = include_bytes!("DejaVuSans.ttf");

/// Pixels of a PNG for each unit of its SVG.
const ZOOM: f32 = 2.0;

/// One figure: panels side by side, what to see in them, and whether it is so.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Figure {
    /// Its file name without extension, as `fig02`.
    pub name: String,
    /// Its heading.
    pub title: String,
    /// One sentence: what to see.
    pub see: String,
    /// Panels, in rows of `columns`.
    pub panels: Vec<Panel>,
    /// Panels in a row.
    pub columns: usize,
    /// Numbers in rows, beside or instead of panels.
    pub tables: Vec<Table>,
    /// What must hold.
    pub criteria: Vec<Criterion>,
}

/// A statement that was checked.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Criterion {
    /// What is claimed, with its bound.
    pub claim: String,
    /// What was measured.
    pub found: String,
    /// Whether it holds.
    pub passed: bool,
}

/// Numbers with headings.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Table {
    /// What it holds.
    pub title: String,
    /// Headings, one a column.
    pub columns: Vec<String>,
    /// Cells, a row for each entry, one a column.
    pub rows: Vec<Vec<String>>,
}

/// Axes with marks.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Panel {
    /// Heading.
    pub title: String,
    /// Below.
    pub x: Axis,
    /// To the left.
    pub y: Axis,
    /// Drawn in order.
    pub marks: Vec<Mark>,
    /// Whether a unit of x is as long as a unit of y.
    pub equal: bool,
}

/// An axis.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Axis {
    /// Quantity and unit.
    pub label: String,
    /// Logarithmic.
    pub log: bool,
    /// Ends; from the marks where absent.
    pub range: Option<[f64; 2]>,
    /// Names at 0, 1, 2, .. in place of numbers.
    pub names: Vec<String>,
}

/// Something drawn.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Mark {
    /// Its entry in the legend and in the CSV.
    pub label: String,
    /// How it looks.
    pub style: Style,
    /// What it is.
    pub shape: Shape,
}

/// How a mark looks.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub enum Style {
    /// What the theory or the paper says: dashed black.
    Theory,
    /// The true law: solid dark grey.
    Truth,
    /// A measured series: the colour (and the point's form) of this number, 0 to 6.
    Series(usize),
}

/// What a mark is, in the axes' units.
#[derive(Clone, Debug, serde::Serialize)]
pub enum Shape {
    /// A line through `[x, y]`.
    Line(Vec<[f64; 2]>),
    /// Points at `[x, y]`.
    Points(Vec<[f64; 2]>),
    /// A line through `[x, mean, half]` with bars from `mean - half` to `mean + half`.
    Errors(Vec<[f64; 3]>),
    /// Bars of these heights at 0, 1, 2, ..; bars of one panel stand beside each other.
    Bars(Vec<f64>),
    /// Arrows `[x, y, dx, dy]`.
    Arrows(Vec<[f64; 4]>),
    /// Lines where a function is equal to each of `levels`; `values[i * x.len() + j]` at `(x[j], y[i])`.
    Contours {
        /// Increasing.
        x: Vec<f64>,
        /// Increasing.
        y: Vec<f64>,
        /// `[y.len(), x.len()]`.
        values: Vec<f64>,
        /// Increasing.
        levels: Vec<f64>,
    },
    /// Grey squares of side 1, first row on top, 0 white and 1 black; its panel has no axes.
    Image {
        /// Squares in a row.
        width: usize,
        /// Row-major.
        values: Vec<f64>,
    },
}

impl Figure {
    /// An SVG document.
    pub fn svg(&self) -> String {
        draw::svg(self)
    }
    /// A PNG, two pixels to a unit of the SVG.
    pub fn png(&self) -> Vec<u8> {
        use resvg::{tiny_skia, usvg};
        let mut options = usvg::Options::default();
        options.fontdb_mut().load_font_data(FONT.to_vec());
        options.font_family = "DejaVu Sans".into();
        let tree = usvg::Tree::from_str(&self.svg(), &options).expect("our own SVG is well formed");
        let size = tree.size().to_int_size().scale_by(ZOOM).expect("a figure has a size");
        let mut pixels = tiny_skia::Pixmap::new(size.width(), size.height()).expect("a figure has a size");
        resvg::render(&tree, tiny_skia::Transform::from_scale(ZOOM, ZOOM), &mut pixels.as_mut());
        pixels.encode_png().expect("memory takes everything")
    }
    /// Every number drawn, a line for each: `panel,title,mark,label,kind,x,y,z,w`, panels and the marks of each counted from 0.
    /// z is the half length of an error bar, the value
    /// of a function at (x, y), the darkness of the square in column x and row y; `z, w` are the length of an arrow. A line of
    /// kind `level` has one of a contour's levels as x.
    pub fn csv(&self) -> String {
        let mut out = String::from("panel,title,mark,label,kind,x,y,z,w\n");
        for (panel_index, panel) in self.panels.iter().enumerate() {
            for (mark_index, mark) in panel.marks.iter().enumerate() {
                let mut push = |kind: &str, numbers: &[f64]| {
                    let [title, label] = [&panel.title, &mark.label].map(|text| quoted(text));
                    let cells = (0..4).map(|i| numbers.get(i).map_or(String::new(), f64::to_string));
                    out += &format!(
                        "{panel_index},{title},{mark_index},{label},{kind},{}\n",
                        cells.collect::<Vec<_>>().join(",")
                    );
                };
                match &mark.shape {
                    Shape::Line(xy) => xy.iter().for_each(|p| push("line", p)),
                    Shape::Points(xy) => xy.iter().for_each(|p| push("points", p)),
                    Shape::Errors(xyz) => xyz.iter().for_each(|p| push("errors", p)),
                    Shape::Bars(y) => y.iter().enumerate().for_each(|(x, &y)| push("bars", &[x as f64, y])),
                    Shape::Arrows(xyzw) => xyzw.iter().for_each(|p| push("arrows", p)),
                    Shape::Contours { x, y, values, levels } => {
                        let point = |at: usize| [x[at % x.len()], y[at / x.len()], values[at]];
                        (0..values.len()).for_each(|at| push("contours", &point(at)));
                        levels.iter().for_each(|&level| push("level", &[level]));
                    }
                    Shape::Image { width, values } => values
                        .iter()
                        .enumerate()
                        .for_each(|(at, &z)| push("image", &[(at % width) as f64, (at / width) as f64, z])),
                }
            }
        }
        out
    }
    /// All of it; numbers that are not finite are null.
    pub fn json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("numbers and text have a JSON form")
    }
}

/// A cell of a CSV file.
fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.into() }
}

/// Text inside XML and HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
