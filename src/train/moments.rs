//! What MMD training knows of a batch's data.

use crate::config::Config;
use crate::data::{Side, Source};
use crate::device::{Device, Features, View, ViewMut};
use crate::objective::{DataKernel, features::random_fourier};

/// Feature maps of the batch's data, for MMD.
pub(super) struct Moments<B> {
    bufs: Option<[B; 2]>,
    dims: [usize; 2],
    rows: usize,
}

impl<B> Moments<B> {
    pub(super) fn new<D: Device<Buf = B>>(device: &D, config: &Config, source: &dyn Source) -> Self {
        let dims = [Side::U, Side::V].map(|side| match config.kernel {
            DataKernel::Linear => source.dim(side),
            DataKernel::Gaussian { .. } => config.features,
        });
        let used = config.loss(0).objective.takes_moments();
        Moments { bufs: used.then(|| dims.map(|dim| device.alloc(config.batch * dim))), dims, rows: config.batch }
    }

    pub(super) fn update<D: Device<Buf = B>>(&mut self, device: &D, config: &Config, u: &[f32], v: &[f32]) {
        let Some(bufs) = &mut self.bufs else { return };
        for ((buf, x), dim) in bufs.iter_mut().zip([u, v]).zip(self.dims) {
            let to = ViewMut { buf, at: 0..config.batch * dim };
            match config.kernel {
                DataKernel::Linear => device.upload(x, to),
                DataKernel::Gaussian { width } => {
                    let features = random_fourier(x, x.len() / config.batch, width, dim, config.seed);
                    device.upload(&features, to);
                }
            }
        }
    }

    pub(super) fn views(&self) -> Option<Features<'_, B>> {
        self.bufs.as_ref().map(|[u, v]| {
            let [u, v] = [(u, 0), (v, 1)].map(|(buf, side)| View { buf, at: 0..self.rows * self.dims[side] });
            Features { u, v, dims: self.dims }
        })
    }
}
