//! What the kernels of every instruction set share: how a tile and a token lie in memory, and the loops around a tile kernel:
//! row tiles, within them chunks of `k`, unpacked once each, and within a chunk all tokens, a register tile of them at a time.

use super::{GROUP, LinearTask, Q8, Q8Layout, Scratch, TILE_CHUNK, TILE_ROWS_MAX, TILE_TOKENS};

/// The parts of a [`Scratch`], each on 64 bytes: a tile of `R` rows as `q[k/4][R][4]` (or in another order of the kernel's
/// own), `d` and `m` as `[group][R]` (a group being 32 values, or 16 for the types whose scales are), and the running sums
/// `[token][R]`.
#[derive(Clone, Copy)]
pub(super) struct TileMemory {
    pub q: *mut u8,
    pub d: *mut f32,
    pub m: *mut f32,
    pub sums: *mut f32,
}

/// One quantized token, as pointers, for the kernels.
#[derive(Clone, Copy)]
pub(super) struct XRow {
    pub q: *const i8,
    pub d: *const f32,
    pub s: *const f32,
    pub s16: *const f32,
}

impl XRow {
    /// Token `t` of `x` from group `group` on (a multiple of 8).
    ///
    /// # Safety
    /// `t` and the group are in range.
    #[inline(always)]
    pub unsafe fn new(x: &Q8<'_>, t: usize, group: usize) -> XRow {
        let Q8Layout { k, groups, .. } = x.layout;
        // SAFETY: in range by the contract; `Q8::new` checked the sections' sizes.
        unsafe {
            XRow {
                q: x.qs.as_ptr().add(t * k + GROUP * group),
                d: x.d.as_ptr().add(t * groups + group),
                s: x.s.as_ptr().add(t * groups + group),
                s16: x.s16.as_ptr().add(2 * (t * groups + group)),
            }
        }
    }
}

impl Scratch {
    fn tile(&mut self) -> TileMemory {
        let base = self.lines.as_mut_ptr().cast::<u8>();
        let q = TILE_ROWS_MAX * TILE_CHUNK;
        let scales = TILE_ROWS_MAX * TILE_CHUNK / 16 * 4;
        // SAFETY: the three offsets are within `scratch_bytes`.
        unsafe {
            TileMemory {
                q: base,
                d: base.add(q).cast(),
                m: base.add(q + scales).cast(),
                sums: base.add(q + 2 * scales).cast(),
            }
        }
    }
}

/// An instruction set's kernel for one type. All functions need its instructions, which the caller of [`run`] has.
pub(super) trait Tile {
    /// Rows of a tile.
    const ROWS: usize;
    /// Tokens of a register tile, 1 to 8.
    const TOKENS: usize;
    /// Bytes of a unit of 256 weights.
    const UNIT_BYTES: usize;

    /// Unpacks `groups` groups of 32 from the `ROWS` unit pointers.
    ///
    /// # Safety
    /// The pointers are good for that many groups, and the tile is a whole [`Scratch`].
    unsafe fn unpack(units: &[*const u8], groups: usize, tile: &TileMemory);

    /// Multiplies the tile by the 1 to `TOKENS` tokens `x` and adds to `sums[token][ROWS]`, which it overwrites if
    /// `first`.
    ///
    /// # Safety
    /// The tile has been unpacked with `groups`; the tokens have as many.
    unsafe fn multiply(tile: &TileMemory, groups: usize, x: &[XRow], sums: *mut f32, first: bool);
}

/// Runs a task.
///
/// # Safety
/// The caller is compiled for `K`'s instructions, and `linear` has checked the task.
#[inline(always)]
pub(super) unsafe fn run<K: Tile>(task: &LinearTask<'_>, scratch: &mut Scratch) {
    let (Some(x), Some(row_bytes)) = (task.x.q8, task.dtype.row_bytes(task.k)) else { return };
    let tile = scratch.tile();
    let units = task.k.div_ceil(256);
    // Chunks of equal size, as near as whole units allow.
    let chunk = units.div_ceil(units.div_ceil(TILE_CHUNK / 256));
    for t0 in (0..task.x.tokens).step_by(TILE_TOKENS) {
        let tokens = (task.x.tokens - t0).min(TILE_TOKENS);
        for r0 in task.rows.clone().step_by(K::ROWS) {
            let rows = (task.rows.end - r0).min(K::ROWS);
            for u0 in (0..units).step_by(chunk) {
                let groups = (task.k / 32 - 8 * u0).min(8 * chunk);
                let mut pointers = [std::ptr::null(); TILE_ROWS_MAX];
                for (i, p) in pointers[..K::ROWS].iter_mut().enumerate() {
                    // Rows past the end repeat the last one; their results are dropped.
                    let row = r0 + i.min(rows - 1);
                    *p = task.weight.as_ptr().wrapping_add(row * row_bytes + u0 * K::UNIT_BYTES);
                }
                // SAFETY: pointers at unit `u0` of rows within the matrix, `groups` ends with the row.
                unsafe { K::unpack(&pointers[..K::ROWS], groups, &tile) };
                let mut t = 0;
                while t < tokens {
                    let n = (tokens - t).min(K::TOKENS);
                    // SAFETY: tokens and groups in range; `sums` holds `TILE_TOKENS` times the widest tile.
                    unsafe {
                        let x: [XRow; 8] = std::array::from_fn(|i| XRow::new(&x, t0 + t + i.min(n - 1), 8 * u0));
                        K::multiply(&tile, groups, &x[..n], tile.sums.add(t * K::ROWS), u0 == 0);
                    }
                    t += n;
                }
            }
            for t in 0..tokens {
                // SAFETY: `sums` has the tokens; `linear` checked the output's size.
                unsafe {
                    let sums = std::slice::from_raw_parts(tile.sums.add(t * K::ROWS), rows);
                    let out = std::slice::from_raw_parts_mut(task.out.base.add((t0 + t) * task.out.stride + r0), rows);
                    if task.accumulate {
                        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                    } else {
                        out.copy_from_slice(sums);
                    }
                }
            }
        }
    }
}
