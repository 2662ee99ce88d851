//! Contrastive learning at the speed of the hardware.

pub mod data;
pub mod device;
pub mod nn;
pub mod objective;
pub mod optim;
#[cfg(feature = "theory")]
pub mod theory;

pub use device::{Engine, cpu::Cpu};
pub use objective::{Batch, Gradients, Loss, Matrix, Objective, Precision, Tilting, Value};
