//! Figures as data: what is drawn, what it should show, and its numbers. [`Figure::svg`] and [`Figure::png`] draw
//! it, [`report`] sets figures into one page that needs no network.
//!
//! One style for all: a colour means the same law in every figure, and no two colours differ by hue alone.

/// One figure: panels side by side, what to see in them, and whether it is so.
#[derive(Clone, Debug)]
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
#[derive(Clone, Debug, Default)]
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
#[derive(Clone, Debug, Default)]
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
#[derive(Clone, Debug)]
pub struct Mark {
    /// Its entry in the legend and in the CSV.
    pub label: String,
    /// How it looks.
    pub style: Style,
    /// What it is.
    pub shape: Shape,
}

/// How a mark looks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Style {
    /// What the theory or the paper says: dashed black.
    Theory,
    /// The true law: solid dark grey.
    Truth,
    /// A measured series: the colour (and the point's form) of this number, 0 to 6.
    Series(usize),
}

/// What a mark is, in the axes' units.
#[derive(Clone, Debug)]
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
