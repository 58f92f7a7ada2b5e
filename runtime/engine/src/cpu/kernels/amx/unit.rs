//! The registers of tiles. Their instructions have no intrinsics in stable Rust, so they stand as assembly. The registers hold
//! nothing between two calls of a kernel, and are given back at the end of each, so that switches of threads need not keep them.

use super::TILE_ROWS;
use crate::cpu::isa::Avx512;
use std::arch::asm;
use std::arch::x86_64::*;

/// The tile registers in use, all 16 rows of 64 bytes, and how they were set up before: other code of the process may count on
/// that, although calls need not keep it.
pub struct Unit {
    before: Config,
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Nothing: all registers are free.
    const NONE: Config = Config { palette: 0, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
}

/// Eight registers of 16 rows of 64 bytes.
static ALL: Config = {
    let mut config = Config { palette: 1, ..Config::NONE };
    let mut i = 0;
    while i < 8 {
        (config.row_bytes[i], config.rows[i]) = (64, TILE_ROWS as u8);
        i += 1;
    }
    config
};

impl Unit {
    /// # Safety
    /// The CPU has AMX, and the system lets the process use it.
    pub unsafe fn open() -> Unit {
        let mut before = Config::NONE;
        // SAFETY: by the contract; a configuration is 64 bytes.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &raw mut before, options(nostack));
            asm!("ldtilecfg [{}]", in(reg) &raw const ALL, options(nostack, readonly));
        }
        Unit { before }
    }
}

impl Unit {
    /// Takes the 32 × 32 sums at `to`, in rows `stride` floats apart, into the first four registers, or zeros.
    ///
    /// # Safety
    /// `to` is good for 32 rows of 32 values.
    #[inline(always)]
    pub unsafe fn begin_sums(&self, to: *const f32, stride: usize, accumulate: bool) {
        let (low, high, stride) = (to, to.wrapping_add(TILE_ROWS * stride), 4 * stride);
        // SAFETY: by the contract; the registers are the unit's.
        unsafe {
            if accumulate {
                asm!(
                    "tileloadd tmm0, [{low} + {s}*1]",
                    "tileloadd tmm1, [{low} + {s}*1 + 64]",
                    "tileloadd tmm2, [{high} + {s}*1]",
                    "tileloadd tmm3, [{high} + {s}*1 + 64]",
                    low = in(reg) low, high = in(reg) high, s = in(reg) stride, options(nostack),
                );
            } else {
                asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack));
            }
        }
    }

    /// Puts them there.
    ///
    /// # Safety
    /// As for [`Unit::begin_sums`].
    #[inline(always)]
    pub unsafe fn store_sums(&self, to: *mut f32, stride: usize) {
        let (low, high, stride) = (to, to.wrapping_add(TILE_ROWS * stride), 4 * stride);
        // SAFETY: as there.
        unsafe {
            asm!(
                "tilestored [{low} + {s}*1], tmm0",
                "tilestored [{low} + {s}*1 + 64], tmm1",
                "tilestored [{high} + {s}*1], tmm2",
                "tilestored [{high} + {s}*1 + 64], tmm3",
                low = in(reg) low, high = in(reg) high, s = in(reg) stride, options(nostack),
            );
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: `open` has found the instructions, and stored what is loaded.
        unsafe {
            if self.before.palette == 0 {
                asm!("tilerelease", options(nostack, nomem));
            } else {
                asm!("ldtilecfg [{}]", in(reg) &raw const self.before, options(nostack, readonly));
            }
        }
    }
}

/// Both as bfloat16, the first in the low half of each lane; halves are rounded up.
#[inline(always)]
pub unsafe fn pairs(low: __m512, high: __m512) -> __m512i {
    // SAFETY: register arithmetic.
    unsafe {
        let half = _mm512_set1_epi32(0x8000);
        let low = _mm512_srli_epi32::<16>(_mm512_add_epi32(_mm512_castps_si512(low), half));
        let high = _mm512_add_epi32(_mm512_castps_si512(high), half);
        // Bits of `high` where the mask has ones, else of `low`.
        _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi32(0xffff_0000_u32 as i32), high, low)
    }
}

/// Operations (a multiplication and an addition are two) of a round of [`spin`].
pub const SPIN_OPS: usize = 4 * 2 * 16 * 16 * 32;

/// Four products without their loads, `rounds` times: what the unit can do at best.
pub fn spin(proof: Avx512, rounds: usize) {
    if !proof.amx || rounds == 0 {
        return;
    }
    // SAFETY: the token says that there is AMX; registers alone are touched.
    unsafe {
        let _unit = Unit::open();
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {n}",
            "jnz 2b",
            n = inout(reg) rounds => _,
            options(nostack, nomem),
        );
    }
}
