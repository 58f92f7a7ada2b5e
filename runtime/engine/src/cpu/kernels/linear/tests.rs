//! Every kernel against its specification, and the specification against f64.
