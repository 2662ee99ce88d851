//! stub
use super::simd::Isa;
use crate::objective::{Batch, Gradients, Loss, Value};
#[derive(Debug, Default)]
pub struct Scratch {}
impl Scratch {
    pub fn bytes(&self) -> usize {
        0
    }
}
pub fn evaluate(_: Isa, _: &mut super::contrast::Scratch, _: &Loss, _: &Batch<'_>, _: Gradients<'_>) -> Value {
    todo!()
}
