//! Closed forms of the Gaussian theory (section 5 of the paper), in f64.
