//! What the kernels of every instruction set share: how a tile and a token lie in memory, and the loops around a tile kernel:
//! row tiles, within them chunks of `k`, unpacked once each, and within a chunk all tokens, a register tile of them at a time.

use super::super::prefetch;
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
    #[cfg(target_arch = "x86_64")]
    pub c: *const i32,
    #[cfg(target_arch = "x86_64")]
    pub c16: *const i32,
}

impl XRow {
    /// Tokens `t0 .. t0 + T`; where `x` has fewer, the last one again: three are computed as four, for code of their own is worth
    /// less than its size. Whoever writes the results leaves those out.
    ///
    /// # Safety
    /// `t0` is in range.
    #[inline(always)]
    pub unsafe fn some<const T: usize>(x: &Q8<'_>, t0: usize) -> [XRow; T] {
        let last = x.layout.tokens - 1;
        // SAFETY: in range by the contract.
        unsafe { std::array::from_fn(|i| XRow::new(x, (t0 + i).min(last), 0)) }
    }

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
                #[cfg(target_arch = "x86_64")]
                c: x.c.as_ptr().add(t * groups + group),
                #[cfg(target_arch = "x86_64")]
                c16: x.c16.as_ptr().add(2 * (t * groups + group)),
            }
        }
    }
}

impl Scratch {
    /// Its parts.
    pub(super) fn tile(&mut self) -> TileMemory {
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

    /// Unpacks `groups` groups of 32 from the `ROWS` unit pointers, and takes a step of `ahead` for every eight rows of a group.
    ///
    /// # Safety
    /// The pointers are good for that many groups, and the tile is a whole [`Scratch`].
    unsafe fn unpack(units: &[*const u8], groups: usize, tile: &TileMemory, ahead: &mut Ahead<'_>);

    /// Multiplies the tile by the 1 to `TOKENS` tokens `x`, whose sums begin and end as `sums` says. Takes a step of `ahead`
    /// for every group.
    ///
    /// # Safety
    /// The tile has been unpacked with `groups`; the tokens have as many; `sums` has a place for each.
    unsafe fn multiply(tile: &TileMemory, groups: usize, x: &[XRow], sums: Place, ahead: &mut Ahead<'_>);
}

/// Where the sums of a register tile, `ROWS` a token, come from and go to.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// `[token][ROWS]` on 64 bytes, what was summed before; null for nothing.
    pub before: *const f32,
    /// The first token's place.
    pub to: *mut f32,
    /// Values from a token's place to the next one's.
    pub stride: usize,
    /// Whether to add to what is there.
    pub add: bool,
}

/// Asks for what is unpacked next while this is. Rows are read in steps that no hardware foresees, and with few tokens there is
/// little else to do; all at once the requests would stand in the way of each other.
pub(super) struct Ahead<'a> {
    /// Where the stretches behind this one begin.
    stretches: std::slice::Iter<'a, *const u8>,
    /// Of each.
    bytes: usize,
    /// What to ask for next, and where this stretch ends.
    at: *const u8,
    end: *const u8,
    /// Lines a step.
    lines: usize,
}

impl<'a> Ahead<'a> {
    /// For `bytes` bytes at each of `stretches`, in about `steps` steps.
    pub fn new(stretches: &'a [*const u8], bytes: usize, steps: usize) -> Ahead<'a> {
        // A stretch may begin within a line.
        let lines = stretches.len() * (bytes / 64 + 1);
        Ahead {
            stretches: stretches.iter(),
            bytes,
            at: std::ptr::null(),
            end: std::ptr::null(),
            lines: lines.div_ceil(steps),
        }
    }

    /// Asks for some lines.
    #[inline(always)]
    pub fn step(&mut self) {
        for _ in 0..self.lines {
            if self.at >= self.end && !self.next() {
                return;
            }
            prefetch(self.at);
            self.at = self.at.wrapping_add(64);
        }
    }

    /// Goes on with the next stretch, if there is one. Inlined, for around a call no vector stays in its register.
    #[inline(always)]
    fn next(&mut self) -> bool {
        let Some(&at) = self.stretches.next() else {
            self.lines = 0;
            return false;
        };
        (self.at, self.end) = (at.wrapping_sub(at as usize % 64), at.wrapping_add(self.bytes));
        true
    }
}

/// What lies `offset` bytes from the beginning of rows `r0` and on; rows past the task's end repeat the last one, and their results are
/// dropped.
#[inline(always)]
pub(super) fn pointers(
    task: &LinearTask<'_>,
    row_bytes: usize,
    r0: usize,
    offset: usize,
) -> [*const u8; TILE_ROWS_MAX] {
    let row = |i: usize| (r0 + i).min(task.rows.end - 1);
    std::array::from_fn(|i| task.weight.as_ptr().wrapping_add(row(i) * row_bytes + offset))
}

/// Bytes of activations that stay in the second cache.
const CACHED_BYTES: usize = 768 << 10;

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
    let pointers = |r0: usize, u0: usize| pointers(task, row_bytes, r0, u0 * K::UNIT_BYTES);
    // Parts of equal size, as near as can be, whose activations stay in the second cache while the rows go by.
    let most = (CACHED_BYTES / task.k.max(1)).clamp(64, TILE_TOKENS);
    let parts = task.x.tokens.div_ceil(most);
    let mut t0 = 0;
    for part in 0..parts {
        let tokens = (task.x.tokens - t0).div_ceil(parts - part);
        for r0 in task.rows.clone().step_by(K::ROWS) {
            let rows = (task.rows.end - r0).min(K::ROWS);
            for u0 in (0..units).step_by(chunk) {
                let groups = (task.k / 32 - 8 * u0).min(8 * chunk);
                let next = if u0 + chunk < units { (r0, u0 + chunk) } else { (r0 + K::ROWS, 0) };
                let upcoming = pointers(next.0, next.1);
                let next_rows = task.rows.end.saturating_sub(next.0).min(K::ROWS);
                // Whole rows lie one behind the other.
                let (stretches, bytes) = match chunk >= units {
                    true => (next_rows.min(1), next_rows * row_bytes),
                    false => (next_rows, groups * K::UNIT_BYTES / 8),
                };
                let passes = tokens.div_ceil(K::TOKENS);
                let steps = groups * (K::ROWS / 8 + passes);
                let mut ahead = Ahead::new(&upcoming[..stretches], bytes, steps);
                // SAFETY: pointers at unit `u0` of rows within the matrix, `groups` ends with the row.
                unsafe { K::unpack(&pointers(r0, u0)[..K::ROWS], groups, &tile, &mut ahead) };
                // The last sums go straight to the output, while others are computed: written together they would wait for
                // lines far apart.
                let done = u0 + chunk >= units && rows == K::ROWS;
                let mut t = 0;
                for pass in 0..passes {
                    // Of equal size, as near as can be.
                    let n = (tokens - t).div_ceil(passes - pass);
                    // SAFETY: tokens and groups in range; `sums` holds `TILE_TOKENS` times the widest tile, and `linear` checked
                    // the output's size.
                    unsafe {
                        let x: [XRow; 8] = std::array::from_fn(|i| XRow::new(&x, t0 + t + i.min(n - 1), 8 * u0));
                        let kept = tile.sums.add(t * K::ROWS);
                        let before = if u0 == 0 { std::ptr::null() } else { kept.cast_const() };
                        let sums = match done {
                            false => Place { before, to: kept, stride: K::ROWS, add: false },
                            true => {
                                let to = task.out.base.add((t0 + t) * task.out.stride + r0);
                                Place { before, to, stride: task.out.stride, add: task.accumulate }
                            }
                        };
                        K::multiply(&tile, groups, &x[..n], sums, &mut ahead);
                    }
                    t += n;
                }
            }
            if rows == K::ROWS {
                continue;
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
        t0 += tokens;
    }
}
