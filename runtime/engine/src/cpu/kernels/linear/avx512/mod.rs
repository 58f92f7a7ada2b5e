//! Linear kernels for AVX-512 with VNNI, in the shapes of the AVX2 ones: `vpdpbusd` takes the place of the multiply,
//! add and widen, so all bytes are made unsigned (`+ 128` where they are signed, which the minima take off again), and
//! a vector holds two groups of 32 (matvec) or 16 rows (tile).

mod matvec;
mod tile;
mod turn;

pub(super) use matvec::run as run_matvec;
pub(super) use tile::run as run_tile;
pub(super) use turn::{Turn, unpack};
