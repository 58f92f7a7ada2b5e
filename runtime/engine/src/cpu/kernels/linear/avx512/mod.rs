//! Linear kernels for AVX-512 with VNNI, in the shapes of the AVX2 ones: `vpdpbusd` takes the place of the multiply,
//! add and widen, so all bytes are made unsigned (`+ 128` where weights lie around zero, which the minima take off again or sums begin
//! without), and a vector holds two groups of 32 (matvec), the nibbles of four blocks (nibbles), or 16 rows (few, tile).

mod few;
mod matvec;
mod nibbles;
mod quantize;
mod tile;
mod turn;

pub(super) use quantize::quantize_row;
pub(super) use tile::run as run_tile;
pub(super) use turn::{Turn, unpack};

use super::avx2::unpack as formats;
use super::{LinearTask, Scratch};
use crate::cpu::isa::Avx512;

/// A format's kernel for a few tokens.
pub(super) trait Matvec {
    fn run(proof: Avx512, task: &LinearTask<'_>, scratch: &mut Scratch);
}

macro_rules! matvec {
    (nibbles: $($nibbled:ident),*; pairs: $($other:ident),*) => {
        $(impl Matvec for formats::$nibbled {
            fn run(proof: Avx512, task: &LinearTask<'_>, scratch: &mut Scratch) {
                nibbles::run::<Self>(proof, task, scratch);
            }
        })*
        $(impl Matvec for formats::$other {
            fn run(proof: Avx512, task: &LinearTask<'_>, _: &mut Scratch) {
                matvec::run::<Self>(proof, task);
            }
        })*
    };
}

matvec!(
    nibbles: Q4_0, Q4_1, Q5_0, Q5_1;
    pairs: Q8_0, Iq4Nl, Mxfp4, Q2K, Q3K, Q4K, Q5K, Q6K, Q8K, Iq4Xs
);

/// A few tokens.
pub(super) fn run_matvec<B: Matvec>(proof: Avx512, task: &LinearTask<'_>, scratch: &mut Scratch) {
    B::run(proof, task, scratch);
}
