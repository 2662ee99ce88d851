//! Contrastive learning at the speed of the hardware, in the generality of Baptista, Stuart and Tran
//! ("A Mathematical Perspective On Contrastive Learning", arXiv 2505.24134): learning encoders of pairs (u, v)
//! means tilting the product of their marginals toward their joint law,
//! `nu(du, dv) = exp(s(u, v))/Z mu_u(du) mu_v(dv)`.
//!
//! A [`Loss`] is a [`Tilting`] (how the logit s is made of two embeddings) and an [`Objective`]. An [`Engine`]
//! evaluates it on a [`Batch`] with its gradients, and never forms the N x M matrix of logits:
//!
//! ```
//! use contrastive::{Batch, Cpu, Engine, Gradients, Loss, Matrix, Objective, Tilting, Write};
//!
//! // 64 pairs in 8 dimensions: v is u with some noise.
//! let wave = |k: usize| (k as f32 * 1.7).sin();
//! let u: Vec<f32> = (0..64 * 8).map(wave).collect();
//! let v: Vec<f32> = (0..64 * 8).map(|k| wave(k) + 0.3 * wave(7 * k + 1)).collect();
//!
//! let loss = Loss::new(Tilting::Cosine, Objective::CLIP, 0.07);
//! let batch = Batch::new(Matrix::f32(&u, 8), Matrix::f32(&v, 8)); // row i belongs to row i
//! let (mut du, mut dv) = (vec![0.0; 64 * 8], vec![0.0; 64 * 8]);
//! let gradients = Gradients { u: Some(Write::Set(&mut du)), v: Some(Write::Set(&mut dv)), offset_v: None };
//! let value = Cpu::new().loss(&loss, &batch, gradients)?;
//!
//! // What CLIP reports is larger by log N.
//! println!("{} = {} - log 64", value.loss, value.loss + Objective::CLIP.clip_offset(64, 64).unwrap());
//! # assert!(value.loss.is_finite() && du.iter().any(|&g| g != 0.0));
//!
//! // A step down the gradient of u lowers the loss.
//! let lower: Vec<f32> = u.iter().zip(&du).map(|(u, g)| u - 0.1 * g).collect();
//! let batch = Batch { u: Matrix::f32(&lower, 8), ..batch };
//! assert!(Cpu::new().loss(&loss, &batch, Gradients::default())?.loss < value.loss);
//! # Ok::<(), contrastive::LossError>(())
//! ```
//!
//! [`recipes`] has what a training loop needs beside that: several positives, queues, a learned temperature, batches larger
//! than activations, several machines, half precision.
//!
//! Rooms, from the ground: [`objective`] (losses as data, and their f64 reference) and [`data`]; [`device`] (the
//! engines) and `theory` (closed forms); [`nn`] and [`optim`]; `train` and [`tasks`];
//! `experiments`; `cli`. Imports go down only.

#[cfg(feature = "cli")]
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "cli")]
pub mod config;
pub mod data;
pub mod device;
#[cfg(feature = "cli")]
pub mod experiments;
pub mod nn;
pub mod objective;
pub mod optim;
#[cfg(feature = "plots")]
pub mod plot;
pub mod tasks;
#[doc = include_str!("../docs/recipes.md")]
pub mod recipes {}
#[cfg(feature = "theory")]
pub mod theory;
#[cfg(feature = "cli")]
pub mod train;

pub use device::{Engine, cpu::Cpu};
pub use half;
pub use objective::{
    Batch, DataKernel, Gradients, Loss, LossError, Matrix, Moments, Objective, Pairs, Positives, Precision, Storage,
    Tilting, Value, Write,
};
