//! Kernels, one operation a file. Each has a scalar form, which is its specification, and forms by instruction set;
//! all work on plain slices for one thread, and know nothing of tapes or threads.

pub mod activation;
pub mod attention;
pub mod dropout;
pub mod embed;
pub mod gemm;
pub mod linear;
pub mod lora;
pub mod norm;
pub mod rope;
pub mod vector;
