//! Contrastive learning at the speed of the hardware.

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
pub mod tasks;
#[cfg(feature = "theory")]
pub mod theory;
#[cfg(feature = "cli")]
pub mod train;

pub use device::{Engine, cpu::Cpu};
pub use objective::{Batch, Gradients, Loss, Matrix, Objective, Precision, Tilting, Value};
