//! Random Fourier features: an explicit map whose inner products approximate the Gaussian kernel.
