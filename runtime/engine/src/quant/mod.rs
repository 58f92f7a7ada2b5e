//! Block formats: how weights lie in the file. Layouts, and the scalar code that reads and writes them, which is the
//! specification that every SIMD and GPU kernel is tested against. Nothing here knows an instruction set.

mod dtype;

pub use dtype::DType;
