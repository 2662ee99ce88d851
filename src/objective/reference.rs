//! The definition of every loss, written naively in f64. Slow, and shares no arithmetic with the engines.
