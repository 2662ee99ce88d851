//! Labelled 28 x 28 grey images in memory, a byte a pixel.

use super::{Side, Source};

/// Width and height of an image.
pub const EDGE: usize = 28;
/// Classes, 0 to 9.
pub const CLASSES: usize = 10;
/// Pixels of an image.
pub const PIXELS: usize = EDGE * EDGE;

/// MNIST's mean and standard deviation of a pixel in [0, 1]: what its images are customarily normalised by.
const MEAN: f32 = 0.1307;
const STD: f32 = 0.3081;

/// Images as pairs: u is the image, `[28 * 28]` row by row, `(byte / 255 - 0.1307) / 0.3081`; v is its class,
/// one-hot `[10]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Images {
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

impl Images {
    /// `pixels` is `[n, 28, 28]`, 0 for paper and 255 for ink; `labels` is `[n]`, each below 10.
    ///
    /// # Panics
    /// When sizes or labels are others.
    pub fn new(pixels: Vec<u8>, labels: Vec<u8>) -> Self {
        assert_eq!(pixels.len(), labels.len() * PIXELS, "pixels of {} images", labels.len());
        assert!(labels.iter().all(|&l| usize::from(l) < CLASSES), "labels are 0 to 9");
        Images { pixels, labels }
    }
    /// All bytes, `[len, 28, 28]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }
}

impl Source for Images {
    fn len(&self) -> usize {
        self.labels.len()
    }
    fn dim(&self, side: Side) -> usize {
        match side {
            Side::U => PIXELS,
            Side::V => CLASSES,
        }
    }
    fn gather(&self, side: Side, index: &[usize], out: &mut [f32]) {
        let dim = self.dim(side);
        assert_eq!(out.len(), index.len() * dim, "output of {} samples of {dim}", index.len());
        for (row, &i) in out.chunks_exact_mut(dim).zip(index) {
            match side {
                Side::U => {
                    let image = &self.pixels[i * PIXELS..(i + 1) * PIXELS];
                    row.iter_mut().zip(image).for_each(|(x, &b)| *x = (f32::from(b) / 255.0 - MEAN) / STD);
                }
                Side::V => {
                    row.fill(0.0);
                    row[usize::from(self.labels[i])] = 1.0;
                }
            }
        }
    }
    fn labels(&self) -> Option<&[u8]> {
        Some(&self.labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_normalised_images_and_one_hot_labels() {
        let mut pixels = vec![0; 2 * PIXELS];
        pixels[PIXELS + 5] = 255;
        pixels[2 * PIXELS - 1] = 51;
        let images = Images::new(pixels, vec![3, 9]);
        let mut u = vec![0.0; PIXELS];
        images.gather(Side::U, &[1], &mut u);
        // (0, 1, 0.2 - mean) / std, to rounding in f32.
        for (at, want) in [(0, -0.42421293), (5, 2.8214867), (PIXELS - 1, 0.22492698)] {
            assert!((u[at] - want).abs() < 1e-6, "pixel {at}: {}", u[at]);
        }
        let mut v = vec![7.0; 20];
        images.gather(Side::V, &[1, 0], &mut v);
        let hot: Vec<usize> = (0..20).filter(|&i| v[i] == 1.0).collect();
        assert_eq!((hot, v.iter().sum::<f32>()), (vec![9, 13], 2.0));
        assert_eq!(images.labels(), Some(&[3, 9][..]));
    }
}
