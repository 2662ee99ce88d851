//! A built-in set of handwritten-looking digits: no download, any size, by seed.
//!
//! A digit is a few strokes through control points, in one of several styles a class. For each image the points are
//! jittered, joined by smooth curves, sheared, turned, scaled and shifted, bent by a smooth random displacement, and
//! drawn with a pen of varying width and soft edge; noise is added and the result quantised to a byte a pixel.

use super::{
    images::{CLASSES, EDGE, Images},
    permute,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use std::f32::consts::TAU;

/// Images drawn from one random stream: image i depends on (seed, i) alone, for any thread and image count.
const CHUNK: usize = 256;

/// Control points (x, y) in the unit square, y down. A point given twice is a corner.
type Stroke = &'static [(f32, f32)];

/// The styles of each class, each a list of strokes.
const STYLES: [&[&[Stroke]]; CLASSES] = [
    &[
        &[&[
            (0.55, 0.),
            (0.2, 0.14),
            (0.05, 0.5),
            (0.2, 0.88),
            (0.5, 1.),
            (0.82, 0.85),
            (0.95, 0.5),
            (0.82, 0.12),
            (0.5, 0.),
            (0.35, 0.06),
        ]],
        &[&[
            (0.5, 0.),
            (0.25, 0.2),
            (0.2, 0.6),
            (0.35, 0.94),
            (0.6, 0.96),
            (0.78, 0.7),
            (0.78, 0.3),
            (0.62, 0.04),
            (0.46, 0.),
        ]],
        &[&[
            (0.75, 0.14),
            (0.45, 0.),
            (0.12, 0.3),
            (0.08, 0.7),
            (0.4, 1.),
            (0.8, 0.82),
            (0.92, 0.4),
            (0.72, 0.06),
            (0.5, 0.12),
        ]],
    ],
    &[
        &[&[(0.5, 0.), (0.5, 0.5), (0.5, 1.)]],
        &[&[(0.27, 0.24), (0.42, 0.12), (0.54, 0.), (0.54, 0.), (0.53, 0.5), (0.53, 1.)]],
        &[
            &[(0.27, 0.22), (0.42, 0.12), (0.54, 0.), (0.54, 0.), (0.53, 0.5), (0.53, 1.)],
            &[(0.25, 1.), (0.5, 0.99), (0.8, 1.)],
        ],
    ],
    &[
        &[&[
            (0.1, 0.25),
            (0.25, 0.06),
            (0.55, 0.),
            (0.83, 0.2),
            (0.72, 0.5),
            (0.4, 0.8),
            (0.1, 1.),
            (0.1, 1.),
            (0.5, 0.98),
            (0.95, 0.97),
        ]],
        &[&[
            (0.1, 0.2),
            (0.4, 0.),
            (0.8, 0.13),
            (0.8, 0.42),
            (0.5, 0.75),
            (0.2, 0.96),
            (0.08, 0.85),
            (0.25, 0.77),
            (0.55, 0.93),
            (0.97, 0.9),
        ]],
        &[&[(0.15, 0.1), (0.55, 0.02), (0.85, 0.25), (0.6, 0.6), (0.05, 0.98), (0.05, 0.98), (0.45, 0.92), (0.9, 1.)]],
    ],
    &[
        &[&[
            (0.12, 0.15),
            (0.45, 0.),
            (0.82, 0.15),
            (0.75, 0.38),
            (0.4, 0.48),
            (0.4, 0.48),
            (0.8, 0.57),
            (0.9, 0.8),
            (0.5, 1.),
            (0.08, 0.88),
        ]],
        &[&[
            (0.1, 0.04),
            (0.5, 0.03),
            (0.85, 0.02),
            (0.85, 0.02),
            (0.45, 0.42),
            (0.45, 0.42),
            (0.82, 0.54),
            (0.88, 0.82),
            (0.5, 1.),
            (0.1, 0.9),
        ]],
        &[&[
            (0.2, 0.08),
            (0.6, 0.),
            (0.82, 0.2),
            (0.6, 0.42),
            (0.42, 0.5),
            (0.65, 0.52),
            (0.88, 0.75),
            (0.6, 0.98),
            (0.15, 0.97),
        ]],
    ],
    &[
        &[
            &[(0.25, 0.), (0.14, 0.3), (0.1, 0.56), (0.1, 0.56), (0.5, 0.57), (0.95, 0.52)],
            &[(0.74, 0.08), (0.7, 0.5), (0.66, 1.)],
        ],
        &[
            &[(0.68, 0.), (0.35, 0.35), (0.05, 0.68), (0.05, 0.68), (0.5, 0.68), (0.98, 0.66)],
            &[(0.68, 0.), (0.68, 0.5), (0.67, 1.)],
        ],
        &[&[(0.15, 0.05), (0.1, 0.35), (0.32, 0.54), (0.76, 0.45)], &[(0.86, 0.), (0.76, 0.45), (0.7, 1.)]],
    ],
    &[
        &[&[
            (0.9, 0.02),
            (0.5, 0.02),
            (0.2, 0.03),
            (0.2, 0.03),
            (0.15, 0.42),
            (0.15, 0.42),
            (0.5, 0.36),
            (0.86, 0.6),
            (0.78, 0.9),
            (0.4, 1.),
            (0.08, 0.88),
        ]],
        &[
            &[
                (0.27, 0.04),
                (0.18, 0.43),
                (0.18, 0.43),
                (0.55, 0.39),
                (0.86, 0.62),
                (0.7, 0.93),
                (0.3, 1.),
                (0.08, 0.9),
            ],
            &[(0.27, 0.03), (0.6, 0.04), (0.95, 0.)],
        ],
        &[&[(0.85, 0.), (0.42, 0.07), (0.24, 0.32), (0.55, 0.47), (0.8, 0.7), (0.6, 0.97), (0.1, 0.95)]],
    ],
    &[
        &[&[
            (0.75, 0.),
            (0.4, 0.2),
            (0.12, 0.6),
            (0.25, 0.94),
            (0.6, 1.),
            (0.86, 0.78),
            (0.65, 0.54),
            (0.3, 0.62),
            (0.17, 0.78),
        ]],
        &[&[(0.45, 0.), (0.22, 0.4), (0.16, 0.8), (0.5, 1.), (0.84, 0.82), (0.7, 0.6), (0.4, 0.61), (0.2, 0.8)]],
        &[&[(0.62, 0.), (0.32, 0.33), (0.12, 0.74), (0.4, 1.), (0.76, 0.9), (0.72, 0.65), (0.38, 0.66), (0.18, 0.84)]],
    ],
    &[
        &[&[(0.05, 0.05), (0.5, 0.04), (0.92, 0.02), (0.92, 0.02), (0.62, 0.5), (0.42, 1.)]],
        &[
            &[(0.08, 0.06), (0.5, 0.03), (0.9, 0.02), (0.9, 0.02), (0.62, 0.5), (0.4, 1.)],
            &[(0.32, 0.52), (0.58, 0.5), (0.84, 0.48)],
        ],
        &[&[(0.08, 0.22), (0.12, 0.05), (0.12, 0.05), (0.5, 0.07), (0.88, 0.04), (0.7, 0.4), (0.52, 1.)]],
    ],
    &[
        &[&[
            (0.8, 0.12),
            (0.5, 0.),
            (0.2, 0.16),
            (0.35, 0.4),
            (0.7, 0.6),
            (0.82, 0.83),
            (0.5, 1.),
            (0.17, 0.84),
            (0.3, 0.6),
            (0.66, 0.38),
            (0.8, 0.12),
        ]],
        &[
            &[(0.5, 0.), (0.24, 0.1), (0.24, 0.34), (0.5, 0.46), (0.76, 0.34), (0.76, 0.1), (0.5, 0.)],
            &[(0.5, 0.46), (0.15, 0.6), (0.15, 0.88), (0.5, 1.), (0.85, 0.88), (0.85, 0.6), (0.5, 0.46)],
        ],
        &[&[
            (0.84, 0.05),
            (0.42, 0.03),
            (0.22, 0.24),
            (0.55, 0.5),
            (0.78, 0.78),
            (0.47, 1.),
            (0.2, 0.8),
            (0.5, 0.5),
            (0.86, 0.08),
        ]],
    ],
    &[
        &[&[
            (0.84, 0.18),
            (0.5, 0.),
            (0.15, 0.2),
            (0.35, 0.5),
            (0.74, 0.4),
            (0.86, 0.12),
            (0.86, 0.12),
            (0.82, 0.5),
            (0.75, 1.),
        ]],
        &[&[
            (0.8, 0.13),
            (0.45, 0.02),
            (0.15, 0.28),
            (0.42, 0.5),
            (0.78, 0.32),
            (0.82, 0.1),
            (0.85, 0.55),
            (0.65, 0.92),
            (0.22, 0.97),
        ]],
        &[
            &[(0.75, 0.08), (0.35, 0.05), (0.15, 0.3), (0.4, 0.48), (0.78, 0.33)],
            &[(0.82, 0.04), (0.72, 0.5), (0.6, 1.)],
        ],
    ],
];

/// Draws `samples` digits by `seed`. Every ten in a row hold each class once, in random order.
pub fn digits(seed: u64, samples: usize) -> Images {
    let label = |i: usize| permute(seed, (i / CLASSES) as u64, CLASSES, i % CLASSES) as u8;
    let labels: Vec<u8> = (0..samples).map(label).collect();
    let mut pixels = vec![0; samples * EDGE * EDGE];
    pixels.par_chunks_mut(CHUNK * EDGE * EDGE).zip(labels.par_chunks(CHUNK)).enumerate().for_each(
        |(chunk, (images, labels))| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(chunk as u64);
            for (image, &label) in images.chunks_exact_mut(EDGE * EDGE).zip(labels) {
                draw(&mut rng, label, image);
            }
        },
    );
    Images::new(pixels, labels)
}

/// A point in pixels from the image's centre.
type Point = [f32; 2];

/// Where a hand puts the points of a glyph: all the smooth distortions of one image.
struct Hand {
    /// Unit square to pixels, linear part row by row.
    linear: [f32; 4],
    shift: Point,
    /// Displacement waves: wave vector, phase, amplitude.
    waves: [(Point, f32, Point); 3],
}

impl Hand {
    fn new(rng: &mut ChaCha8Rng) -> Self {
        let mut within = |limit: f32| rng.random_range(-limit..limit);
        let (sin, cos) = (within(15.0).to_radians()).sin_cos();
        let (height, shear) = (18.0 + within(2.5), within(0.3));
        let width = height * (0.66 + within(0.16));
        let waves = std::array::from_fn(|_| {
            let (direction, length) = (within(TAU / 2.0), 20.0 + within(8.0));
            let wave = [TAU / length * direction.cos(), TAU / length * direction.sin()];
            (wave, within(TAU / 2.0), [within(0.9), within(0.9)])
        });
        Hand {
            // Rotation after shear (upper parts go right) after scale.
            linear: [cos * width, (-cos * shear - sin) * height, sin * width, (cos - sin * shear) * height],
            shift: [within(2.0), within(2.0)],
            waves,
        }
    }
    fn place(&self, (x, y): (f32, f32)) -> Point {
        let [a, b, c, d] = self.linear;
        let (x, y) = (x - 0.5, y - 0.5);
        let at = [a * x + b * y + self.shift[0], c * x + d * y + self.shift[1]];
        self.waves.iter().fold(at, |p, (wave, phase, amplitude)| {
            let s = (wave[0] * at[0] + wave[1] * at[1] + phase).sin();
            [p[0] + s * amplitude[0], p[1] + s * amplitude[1]]
        })
    }
}

/// Draws one image of class `label` over a blank `image`.
fn draw(rng: &mut ChaCha8Rng, label: u8, image: &mut [u8]) {
    let styles = STYLES[usize::from(label)];
    let style = styles[rng.random_range(0..styles.len())];
    let hand = Hand::new(rng);
    let pen = rng.random_range(0.8..1.7f32);
    let softness = rng.random_range(0.9..1.5f32);
    let pressure = (rng.random_range(0.0..0.3f32), rng.random_range(2.0..6.0f32), rng.random_range(0.0..TAU));
    let ink = rng.random_range(0.8..1.0f32);
    let noise = rng.random_range(0.0..0.08f32);
    let mut canvas = [0.0f32; EDGE * EDGE];
    for stroke in style {
        let mut jitter = || -> f32 { StandardNormal.sample(&mut *rng) };
        let mut points: Vec<(f32, f32)> = Vec::with_capacity(stroke.len());
        for (k, &(x, y)) in stroke.iter().enumerate() {
            let corner = k > 0 && stroke[k - 1] == (x, y);
            points.push(if corner { points[k - 1] } else { (x + 0.025 * jitter(), y + 0.025 * jitter()) });
        }
        let mut last: Option<(Point, f32)> = None;
        curve(&points, |at, along| {
            let (depth, pace, phase) = pressure;
            let next = (hand.place(at), pen * (1.0 + depth * (pace * along + phase).sin()));
            segment(&mut canvas, last.unwrap_or(next), next, softness);
            last = Some(next);
        });
    }
    for (byte, &x) in image.iter_mut().zip(&canvas) {
        let grain: f32 = StandardNormal.sample(rng);
        *byte = ((ink * x + noise * grain).clamp(0.0, 1.0) * 255.0).round() as u8;
    }
}

/// Visits the Catmull-Rom curve through `points` at steps of a few pixels, with the control points passed so far.
fn curve(points: &[(f32, f32)], mut visit: impl FnMut((f32, f32), f32)) {
    const STEPS: usize = 5;
    let last = points.len() - 1;
    visit(points[0], 0.0);
    for k in 0..last {
        let (a, b, c, d) = (points[k.saturating_sub(1)], points[k], points[k + 1], points[(k + 2).min(last)]);
        if b == c {
            continue;
        }
        for step in 1..=STEPS {
            let t = step as f32 / STEPS as f32;
            let blend = |a: f32, b: f32, c: f32, d: f32| {
                b + 0.5 * t * (c - a + t * (2.0 * a - 5.0 * b + 4.0 * c - d + t * (3.0 * (b - c) + d - a)))
            };
            visit((blend(a.0, b.0, c.0, d.0), blend(a.1, b.1, c.1, d.1)), k as f32 + t);
        }
    }
}

/// Inks `canvas` where the disc of a radius going from `a` to `b` passes; `softness` is the width of its edge.
fn segment(canvas: &mut [f32; EDGE * EDGE], (a, ra): (Point, f32), (b, rb): (Point, f32), softness: f32) {
    let reach = ra.max(rb) + 0.5 * softness;
    let centre = 0.5 * (EDGE - 1) as f32;
    let span = |axis: usize| {
        let (low, high) = (a[axis].min(b[axis]) - reach + centre, a[axis].max(b[axis]) + reach + centre);
        (low.ceil().max(0.0) as usize)..((high.floor() + 1.0).clamp(0.0, EDGE as f32) as usize)
    };
    let (dx, dy) = (b[0] - a[0], b[1] - a[1]);
    let per_length2 = 1.0 / (dx * dx + dy * dy).max(1e-12);
    for row in span(1) {
        for column in span(0) {
            let (px, py) = (column as f32 - centre - a[0], row as f32 - centre - a[1]);
            let t = ((px * dx + py * dy) * per_length2).clamp(0.0, 1.0);
            let distance = ((px - t * dx).powi(2) + (py - t * dy).powi(2)).sqrt();
            let cover = ((ra + t * (rb - ra) - distance) / softness + 0.5).clamp(0.0, 1.0);
            let pixel = &mut canvas[row * EDGE + column];
            *pixel = pixel.max(cover);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Side, Source};

    #[test]
    fn images_depend_on_seed_and_index_alone() {
        let many = digits(5, 3 * CHUNK + 7);
        let few = digits(5, CHUNK + 13);
        assert_eq!(many.pixels()[..few.pixels().len()], *few.pixels());
        assert_eq!(many.labels().unwrap()[..few.len()], *few.labels().unwrap());
        let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(single.install(|| digits(5, 3 * CHUNK + 7)), many);
        assert_ne!(digits(6, CHUNK + 13), few);
        assert_eq!(digits(5, 0).len(), 0);
    }

    #[test]
    fn classes_are_balanced() {
        let set = digits(1, 1000);
        for ten in set.labels().unwrap().chunks_exact(10) {
            let mut sorted = ten.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        }
    }

    /// Statistics of the drawing: MNIST's mean pixel is 0.13 and standard deviation 0.31, and so its normalisation fits.
    #[test]
    fn images_are_inked_like_mnist() {
        let set = digits(2, 2000);
        let all: Vec<usize> = (0..set.len()).collect();
        let mut u = vec![0.0; set.len() * EDGE * EDGE];
        set.gather(Side::U, &all, &mut u);
        let mean = u.iter().sum::<f32>() / u.len() as f32;
        let std = (u.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / u.len() as f32).sqrt();
        assert!(mean.abs() < 0.15 && (std - 1.0).abs() < 0.15, "mean {mean}, standard deviation {std}");
        // No digit is blank or runs out of the frame: ink on the border is rare and faint.
        for image in set.pixels().chunks_exact(EDGE * EDGE) {
            assert!(image.iter().filter(|&&b| b > 128).count() > 20);
        }
        let on_edge = |at: usize| [0, EDGE - 1].contains(&(at % EDGE)) || [0, EDGE - 1].contains(&(at / EDGE));
        let strong = set.pixels().iter().enumerate().filter(|&(at, &b)| b > 128 && on_edge(at % (EDGE * EDGE))).count();
        assert!(strong < 2000, "{strong} strong border pixels in 2000 images");
    }
}
