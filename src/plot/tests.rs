use super::draw::contour;
use super::*;

fn axis(label: &str, log: bool) -> Axis {
    Axis { label: label.into(), log, ..Axis::default() }
}

/// A figure with every kind of mark and text that must be escaped.
fn figure() -> Figure {
    let mark = |label: &str, i, shape| Mark { label: label.into(), style: Style::Series(i), shape };
    let panel =
        |marks, log| Panel { title: "<a & \"b\">".into(), x: axis("x", log), y: axis("y", log), marks, equal: false };
    let grid: Vec<f64> = (0..9).map(f64::from).collect();
    let values = (0..81).map(|at| f64::from(at % 9) - 4.0).collect();
    Figure {
        name: "fig".into(),
        title: "all of it".into(),
        see: "everything".into(),
        panels: vec![
            panel(
                vec![
                    mark("line, dashed", 0, Shape::Line(vec![[0.125, 3.5], [f64::NAN, 1.0], [-2.25, 7.75]])),
                    mark("points", 1, Shape::Points(vec![[1.5, 2.5]])),
                    mark("arrows", 2, Shape::Arrows(vec![[0.0, 0.0, 1.0, 2.0]])),
                    mark("contours", 3, Shape::Contours { x: grid.clone(), y: grid, values, levels: vec![0.5] }),
                ],
                false,
            ),
            panel(
                vec![mark(
                    "errors",
                    4,
                    Shape::Errors(vec![[1.0, -3.0, 0.5], [10.0, 2.0, 3.0], [0.0, f64::INFINITY, 1.0]]),
                )],
                true,
            ),
            panel(
                vec![mark("bars", 5, Shape::Bars(vec![1.0, -2.0])), mark("more", 6, Shape::Bars(vec![0.5, 0.25]))],
                false,
            ),
            panel(vec![mark("image", 0, Shape::Image { width: 2, values: vec![0.0, 1.0, 0.5] })], false),
            panel(vec![], true),
        ],
        columns: 2,
        tables: vec![Table { title: "t".into(), columns: vec!["c".into()], rows: vec![vec!["7 < 8".into()]] }],
        criteria: vec![Criterion { claim: "1 < 2".into(), found: "<yes>".into(), passed: true }],
    }
}

#[test]
fn every_number_is_in_the_files() {
    let csv = figure().csv();
    let rows: Vec<_> = csv.lines().collect();
    assert_eq!(rows.len(), 1 + 3 + 1 + 1 + 81 + 1 + 3 + 2 + 2 + 3);
    assert!(rows.contains(&r#"0,"<a & ""b"">",0,"line, dashed",line,-2.25,7.75,,"#), "{csv}");
    assert!(csv.contains(",errors,10,2,3,\n") && csv.contains(",image,1,0,1,\n") && csv.contains(",arrows,0,0,1,2\n"));
    assert!(csv.contains(",level,0.5,,,\n"), "{csv}");
    // The third row's second number, which is not the second row's third.
    assert!(csv.contains(",contours,1,2,-3,\n") && !csv.contains(",contours,2,1,-3,"), "{csv}");
    let json = figure().json();
    assert_eq!(json["panels"][0]["marks"][0]["shape"]["Line"][2][1], 7.75);
    assert!(json["panels"][0]["marks"][0]["shape"]["Line"][1][0].is_null());
}

#[test]
fn the_drawing_is_whole_and_always_the_same() {
    use resvg::{tiny_skia::Pixmap, usvg};
    let svg = figure().svg();
    assert_eq!(svg, figure().svg());
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    let document = usvg::roxmltree::Document::parse(&svg).unwrap();
    let texts: Vec<_> = document.descendants().filter(|n| n.has_tag_name("text")).filter_map(|n| n.text()).collect();
    for text in ["<a & \"b\">", "all of it", "line, dashed", "bars", "errors"] {
        assert!(texts.contains(&text), "{text} in {texts:?}");
    }
    // No two entries of the legend are one.
    assert_eq!(texts.iter().filter(|t| **t == "points").count(), 1);
    let png = figure().png();
    let pixels = Pixmap::decode_png(&png).unwrap();
    let root = document.root_element();
    let size = |name: &str| root.attribute(name).unwrap().parse::<f32>().unwrap();
    assert_eq!([pixels.width() as f32, pixels.height() as f32], [2.0 * size("width"), 2.0 * size("height")]);
    // Drawn with the font at hand, the text is dark; its title takes up the first rows.
    let dark = pixels.pixels()[..pixels.width() as usize * 60].iter().filter(|p| p.red() < 100).count();
    assert!(dark > 200, "{dark} dark pixels where the title is");
}

#[test]
fn long_titles_stay_in_their_panels() {
    let sizes = |title: &str| -> Vec<f64> {
        let mut figure = figure();
        figure.panels.iter_mut().for_each(|panel| panel.title = title.into());
        let svg = figure.svg();
        let document = resvg::usvg::roxmltree::Document::parse(&svg).unwrap();
        let titles = document.descendants().filter(|n| n.has_tag_name("text") && n.text() == Some(title));
        titles.map(|n| n.attribute("font-size").unwrap().parse().unwrap()).collect()
    };
    assert_eq!(sizes("short"), [14.0; 5]);
    // A panel is 370 wide, and no letter of the title half of its size.
    let long = "i".repeat(80);
    let found = sizes(&long);
    assert!(found.len() == 5 && found.iter().all(|size| *size > 5.0 && 0.5 * size * 80.0 < 370.0), "{found:?}");
}

#[test]
fn a_contour_of_a_circle_lies_on_it() {
    let grid: Vec<f64> = (0..81).map(|i| -2.0 + 0.05 * f64::from(i)).collect();
    let values: Vec<f64> = grid.iter().flat_map(|y| grid.iter().map(move |x| x * x + y * y)).collect();
    let segments = contour(&grid, &grid, &values, 1.0);
    let length: f64 = segments.iter().map(|[a, b]| (a[0] - b[0]).hypot(a[1] - b[1])).sum();
    assert!((length - std::f64::consts::TAU).abs() < 0.01, "{length}");
    assert!(segments.iter().flatten().all(|p| (p[0].hypot(p[1]) - 1.0).abs() < 1e-3));
}

#[test]
fn ticks_are_round_numbers_inside_the_axis() {
    let labels = |axis: &Axis, values: &[f64]| -> Vec<String> {
        scale::Scale::new(axis, values.iter().copied(), [0.0, 100.0])
            .ticks()
            .into_iter()
            .map(|(_, label)| label)
            .collect()
    };
    assert_eq!(labels(&axis("", false), &[-1.0, 1.0]), ["−1.0", "−0.5", "0.0", "0.5", "1.0"]);
    assert_eq!(labels(&axis("", true), &[1e-4, 1.0]), ["10⁻⁴", "10⁻³", "10⁻²", "0.1", "1"]);
    assert_eq!(labels(&axis("", true), &[128.0, 1024.0]), ["200", "500", "1000"]);
    assert_eq!(labels(&axis("", true), &[2e3, 1e5]), ["2000", "5000", "10,000", "20,000", "50,000", "100,000"]);
    // Where labels would touch, powers of ten stay.
    let spaced = |width: f64| -> Vec<String> {
        let scale = scale::Scale::new(&axis("", true), [2e3, 1e5].into_iter(), [0.0, width]);
        scale.spaced(7.44).into_iter().map(|(_, label)| label).collect()
    };
    assert_eq!(spaced(290.0), ["2000", "5000", "10,000", "20,000", "", "100,000"]);
    assert_eq!(spaced(150.0), ["2000", "", "10,000", "", "", "100,000"]);
    assert_eq!(spaced(600.0), labels(&axis("", true), &[2e3, 1e5]));
    // Nothing to draw is an empty axis, not a panic.
    assert!(!labels(&axis("", true), &[-1.0, 0.0, f64::NAN]).is_empty());
    assert!(!labels(&axis("", false), &[3.0]).is_empty());
}

#[test]
fn the_page_needs_no_network_and_says_all() {
    let mut failing = figure();
    failing.criteria[0].passed = false;
    let page = report("A & B", &["first".into()], &[figure(), failing]);
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!outside.contains("http") && !outside.contains("src="), "{outside}");
    for text in [
        "A &amp; B",
        "first",
        "everything",
        "1 &lt; 2",
        "&lt;yes&gt;",
        "7 &lt; 8",
        "FAILS",
        "1 of 1 hold",
        "0 of 1 hold",
    ] {
        assert!(page.contains(text), "{text}");
    }
}

// Where ticks and their labels are is what says where anything is.
#[test]
fn marks_are_drawn_where_their_numbers_are() {
    let ends = |label: &str| Axis { range: Some([0.0, 10.0]), ..axis(label, false) };
    let mark = |i, shape| Mark { label: String::new(), style: Style::Series(i), shape };
    let errors = vec![mark(0, Shape::Errors(vec![[4.0, 7.0, 1.5]]))];
    let bars = vec![mark(1, Shape::Bars(vec![2.0, 5.0])), mark(2, Shape::Bars(vec![8.0, 1.0]))];
    let panel = |marks| Panel { x: ends("below"), y: ends("beside"), marks, ..Panel::default() };
    let svg = Figure { panels: vec![panel(errors)], tables: vec![], criteria: vec![], columns: 1, ..figure() }.svg();
    let document = resvg::usvg::roxmltree::Document::parse(&svg).unwrap();
    let number = |node: resvg::usvg::roxmltree::Node<'_, '_>, name: &str| -> f64 {
        node.attribute(name).unwrap().parse().unwrap()
    };
    let text = |content: &str, anchor: &str| {
        let found = |n: &resvg::usvg::roxmltree::Node<'_, '_>| {
            n.has_tag_name("text") && n.text() == Some(content) && n.attribute("text-anchor") == Some(anchor)
        };
        let node = document.descendants().find(found).unwrap();
        [number(node, "x"), number(node, "y")]
    };
    // Labels of x stand in the middle of their ticks, those of y end beside theirs, four units below.
    let x = |at: f64| text("2", "middle")[0] + (at - 2.0) / 6.0 * (text("8", "middle")[0] - text("2", "middle")[0]);
    let y = |at: f64| text("2", "end")[1] - 4.0 + (at - 2.0) / 6.0 * (text("8", "end")[1] - text("2", "end")[1]);
    assert!(x(8.0) > x(2.0) + 50.0 && y(8.0) < y(2.0) - 50.0, "right and up");
    let [below, beside] = ["below", "beside"].map(|label| text(label, "middle"));
    assert!(below[1] > y(0.0) && below[0] > x(0.0) && beside[0] < x(0.0) && beside[1] < y(0.0), "{below:?} {beside:?}");
    let near = |a: f64, b: f64| (a - b).abs() < 0.02;
    let point = document.descendants().find(|n| n.has_tag_name("circle")).unwrap();
    assert!(near(number(point, "cx"), x(4.0)) && near(number(point, "cy"), y(7.0)));
    let bar = document.descendants().find(|n| n.attribute("stroke-width") == Some("1.4")).unwrap();
    let path = bar.attribute("d").unwrap();
    let after =
        |sign: char| -> f64 { path.split_once(sign).unwrap().1.split(['M', ' ']).next().unwrap().parse().unwrap() };
    let high: f64 = path[1..].split(['H', ' ']).nth(1).unwrap().parse().unwrap();
    assert!(near(high, y(8.5)) && near(after('V'), y(5.5)), "{path}");

    let svg = Figure { panels: vec![panel(bars)], tables: vec![], criteria: vec![], columns: 1, ..figure() }.svg();
    let document = resvg::usvg::roxmltree::Document::parse(&svg).unwrap();
    let drawn: Vec<_> = document
        .descendants()
        .filter(|n| n.has_tag_name("rect") && n.ancestors().any(|a| a.has_tag_name("g")))
        .collect();
    let [first, second] = [0, 2].map(|at| [drawn[at], drawn[at + 1]]);
    for (bars, heights) in [(first, [2.0, 5.0]), (second, [8.0, 1.0])] {
        for (bar, height) in bars.into_iter().zip(heights) {
            assert!(near(number(bar, "height"), y(0.0) - y(height)) && near(number(bar, "y"), y(height)));
        }
    }
    for (left, right) in first.into_iter().zip(second) {
        assert!(number(left, "x") + number(left, "width") <= number(right, "x"), "bars stand beside each other");
    }
}
