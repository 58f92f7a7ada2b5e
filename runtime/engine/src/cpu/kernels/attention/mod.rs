//! Attention with online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; blocked as in FlashAttention,
//! arXiv:2205.14135), over a paged cache of keys and values, for one thread.
//!
//! For query row i at position p = `first_position + i` and query head h,
//!   out[i, h] = Σⱼ softmaxⱼ( cap(scale · q[i, h]·k\[j\]) − slope\[h\]·(p − j) ) · v\[j\],
//! over the positions j ≤ p that the window and the row's segment admit. `group` query heads share one head of keys and
//! values (grouped-query attention, arXiv:2305.13245).
//!
//! **Cache layout.** A page holds `page_len` positions. Inside a page, for one layer, keys are \[kv_heads\]\[page_len\]
//! \[head_dim\] and values the same, elements F32, F16 or Q8_0 (34-byte blocks of 32 along the head). The byte offset of
//! head 0 and the strides say where; pages need no order in memory.
//!
//! **Four paths, one result per path.** [`Path::Stream`] (decode) reads every key and value once, straight from the
//! cache. [`Path::Block`] (prefill) unpacks 64 positions at a time into L1-sized panels and runs register-tiled matrix
//! products on them. [`Path::Integer`] does so in 16-bit integers, [`Path::Split`] in a matrix unit. The caller picks by the rows of the whole operation, never by the rows of a task: within a path, a
//! row's arithmetic depends on absolute positions alone (blocks are aligned to multiples of [`BLOCK`]), so any split of
//! rows and heads over tasks and threads gives the same bits.

mod backward;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod block;
#[cfg(target_arch = "x86_64")]
mod integer;
mod kv;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod seen;
#[cfg(target_arch = "x86_64")]
mod split;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod stream;
#[cfg(test)]
mod tests;

pub use backward::{AttentionBackwardTask, attention_backward, attention_backward_scratch_len};
pub use kv::{kv_row_bytes, store_kv};

use super::linear::has_tiles;
use crate::cpu::isa::Isa;
use crate::quant::DType;
use std::ops::Range;

/// Positions that are handled between two updates of the running softmax; blocks start at multiples of it.
pub const BLOCK: usize = 64;

/// The keys and values of one layer: `pages[j / page_len]` holds position j.
#[derive(Clone, Copy, Debug)]
pub struct KvPages<'a> {
    /// Start of each page.
    pub pages: &'a [*const u8],
    /// Positions per page: a multiple of [`BLOCK`], unless there is one page only.
    pub page_len: usize,
    /// Bytes from a page's start to this layer's keys of head 0.
    pub k_offset: usize,
    /// Bytes from a page's start to this layer's values of head 0.
    pub v_offset: usize,
    /// Bytes between the heads of a page.
    pub head_stride: usize,
    /// Bytes between positions of a head.
    pub pos_stride: usize,
    /// Element type: F32, F16 or Q8_0.
    pub dtype: DType,
}

/// Which form runs. Choose by the rows of the whole operation, so that the split over threads cannot change a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// One row, or few: keys and values are read once per row, without unpacking.
    Stream,
    /// Many rows: keys and values are unpacked once per block and used by all rows.
    Block,
    /// As [`Path::Block`] with products of 16-bit integers, where AVX-512 has them and else the same: twice as fast, with errors
    /// of 10⁻⁴, no larger than those of keys and values in F16.
    Integer,
    /// As [`Path::Block`] with products of values split into two of bfloat16, in a matrix unit where there is one and else the same:
    /// several times as fast, with errors of 10⁻⁵.
    Split,
}

/// How near to f32 an operation has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accuracy {
    /// As near as another order of sums.
    Exact,
    /// To 10⁻⁵.
    Near,
    /// To 10⁻⁴.
    Rounded,
}

/// Rows from which on integers and the matrix unit pay: their form of a block costs more than unpacking it.
const MANY_ROWS: usize = 16;

impl Path {
    /// The fastest path for an operation of `rows` query rows that is accurate enough: from two on, unpacking pays (measured with the
    /// example `attention`, F16).
    pub fn for_rows(isa: Isa, rows: usize, accuracy: Accuracy) -> Path {
        match rows {
            ..=1 => Path::Stream,
            MANY_ROWS.. if has_tiles(isa) && accuracy != Accuracy::Exact => Path::Split,
            MANY_ROWS.. if accuracy == Accuracy::Rounded => Path::Integer,
            _ => Path::Block,
        }
    }
}

/// One thread's part of an attention: some rows × some query heads.
#[derive(Clone, Copy, Debug)]
pub struct AttentionTask<'a> {
    /// Which form to run.
    pub path: Path,
    /// Query row 0, head 0; a row is heads × `head_dim`, after rope.
    pub q: *const f32,
    /// Floats between query rows.
    pub q_stride: usize,
    /// Query heads of this task; head h reads head h / `group` of the cache.
    pub heads: (usize, usize),
    /// Query heads per head of the cache.
    pub group: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Query rows of this task.
    pub rows: (usize, usize),
    /// Position of row 0; row i attends to positions up to `first_position + i`.
    pub first_position: usize,
    /// Sliding window: position p sees p − window + 1 … p.
    pub window: Option<usize>,
    /// The first position each row may see (packed sequences), indexed by row; rows beyond its end see from 0.
    pub starts: Option<&'a [usize]>,
    /// Factor on q·k, usually 1 / √head_dim.
    pub scale: f32,
    /// c·tanh(s / c) on the scaled score.
    pub softcap: Option<f32>,
    /// ALiBi (arXiv:2108.12409): one slope per query head.
    pub alibi: Option<&'a [f32]>,
    /// Keys and values.
    pub kv: KvPages<'a>,
    /// Output row 0, head 0.
    pub out: *mut f32,
    /// Floats between output rows.
    pub out_stride: usize,
    /// If set, log Σ exp(score) of row i and query head h goes to `lse[i · lse_stride + h]`; the backward pass needs it.
    pub lse: Option<*mut f32>,
    /// Floats between rows of `lse`.
    pub lse_stride: usize,
}

// SAFETY: a task is a description; what it writes is named by its rows and heads, and whoever runs tasks side by side
// promises to `attention` that these are disjoint and that the memory outlives the run.
unsafe impl Send for AttentionTask<'_> {}
// SAFETY: as above; nothing is written through a shared task but what the running thread owns.
unsafe impl Sync for AttentionTask<'_> {}

impl AttentionTask<'_> {
    /// Query rows, as a range.
    fn rows(&self) -> Range<usize> {
        self.rows.0..self.rows.1
    }

    /// The positions that `row` sees; never empty, for a row always sees itself.
    #[inline(always)]
    fn visible(&self, row: usize) -> Range<usize> {
        let p = self.first_position + row;
        let window = self.window.map_or(0, |w| (p + 1).saturating_sub(w));
        let start = self.starts.and_then(|s| s.get(row)).copied().unwrap_or(0);
        window.max(start).min(p)..p + 1
    }

    /// Of the positions that `row` sees, those of the block that starts at `block`, counted from there.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline(always)]
    fn visible_in_block(&self, row: usize, block: usize) -> (usize, usize) {
        let v = self.visible(row);
        (v.start.clamp(block, block + BLOCK) - block, v.end.clamp(block, block + BLOCK) - block)
    }

    /// The slope of query head `h`, 0 without ALiBi.
    #[inline(always)]
    fn slope(&self, h: usize) -> f32 {
        self.alibi.and_then(|a| a.get(h)).copied().unwrap_or(0.0)
    }

    /// Calls `f(kv_head, first_query_head, one_past_last)` for each head of the cache that the task's heads read.
    fn for_kv_heads(&self, mut f: impl FnMut(usize, usize, usize)) {
        let mut h = self.heads.0;
        while h < self.heads.1 {
            let kv_head = h / self.group;
            let end = ((kv_head + 1) * self.group).min(self.heads.1);
            f(kv_head, h, end);
            h = end;
        }
    }

    /// Calls `f(kv_head, query_heads, rows)` for each tile of at most `most` query vectors.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn for_tiles(&self, most: usize, mut f: impl FnMut(usize, (usize, usize), (usize, usize))) {
        self.for_kv_heads(|kv_head, first, last| {
            for h in (first..last).step_by(most) {
                let heads = (h, last.min(h + most));
                let tile_rows = most / (heads.1 - heads.0);
                for r in self.rows().step_by(tile_rows) {
                    f(kv_head, heads, (r, self.rows.1.min(r + tile_rows)));
                }
            }
        });
    }
}

impl KvPages<'_> {
    /// The address of position `j`'s vector of `kv_head`, keys or values as `offset` says.
    ///
    /// # Safety
    /// `j` must lie in a page and the layout must be as the fields say.
    #[inline(always)]
    unsafe fn at(&self, offset: usize, kv_head: usize, j: usize) -> *const u8 {
        let (page, inner) = (j / self.page_len, j % self.page_len);
        // SAFETY: the caller's promise: the page exists and holds this vector.
        unsafe { self.pages.get_unchecked(page).add(offset + kv_head * self.head_stride + inner * self.pos_stride) }
    }
}

/// Floats of scratch that [`attention`] needs, for any task of this head width.
pub fn attention_scratch_len(head_dim: usize) -> usize {
    // The padding is for aligning the scratch to a cache line.
    let width = head_dim.next_multiple_of(16);
    let block = TILE * head_dim + TILE * width + 2 * BLOCK * width + TILE * (BLOCK + 10);
    let stream = 2 * MAX_GROUP * width + MAX_GROUP * (BLOCK + 10) + BLOCK * width;
    let scalar = 2 * BLOCK * head_dim + BLOCK + 2 * TILE;
    #[cfg(target_arch = "x86_64")]
    let block = block.max(integer::scratch_len(head_dim)).max(split::scratch_len(head_dim));
    block.max(stream).max(scalar) + 16
}

/// Query vectors (row × head) that share one unpacked block; a multiple of the register tile's six rows.
const TILE: usize = 96;

/// Query heads that the stream path takes along at a time.
const MAX_GROUP: usize = 16;

/// Runs `task`. `scratch` holds at least [`attention_scratch_len`] floats of any content; with less, nothing is done in
/// release builds.
///
/// # Safety
/// All pointers of the task must be valid for the rows, heads and positions it names; every position up to that of the
/// last row must be stored; no other thread may write what is read here, or touch the output rows × heads meanwhile.
/// The cache's type must be F32, F16, or Q8_0 with `head_dim` a multiple of 32.
pub unsafe fn attention(isa: Isa, task: &AttentionTask<'_>, scratch: &mut [f32]) {
    let kv = &task.kv;
    debug_assert!(kv.page_len.is_multiple_of(BLOCK) || kv.pages.len() <= 1);
    debug_assert!(kv_row_bytes(kv.dtype, task.head_dim).is_some_and(|n| n <= kv.pos_stride));
    debug_assert!(task.group > 0 && task.head_dim > 0);
    if scratch.len() < attention_scratch_len(task.head_dim) {
        debug_assert!(false, "attention scratch of {} floats is too small", scratch.len());
        return;
    }
    if task.rows().is_empty() {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let (Isa::Avx512(_), Path::Integer) = (isa, task.path) {
        // SAFETY: the token in `isa` proves the instructions; the rest is the caller's promise.
        return unsafe { integer::attention_avx512(task, scratch) };
    }
    #[cfg(target_arch = "x86_64")]
    if has_tiles(isa) && task.path == Path::Split {
        // SAFETY: as above.
        return unsafe { split::attention_split(task, scratch) };
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if super::lanes::runs(isa) {
        // SAFETY: the token in `isa` proves the instructions; the rest is the caller's promise.
        unsafe {
            match task.path {
                Path::Stream => stream::attention_lanes(task, scratch),
                Path::Block | Path::Integer | Path::Split => block::attention_lanes(task, scratch),
            }
        }
        return;
    }
    let _ = isa;
    // SAFETY: the caller's promise.
    unsafe { scalar::attention_scalar(task, scratch) }
}

/// What is left of a scratch whose pieces lie one behind the other.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
struct Pieces(*mut f32);

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl Pieces {
    /// The next `floats` floats, which the scratch has room for, as what they are used for.
    fn take<T>(&mut self, floats: usize) -> *mut T {
        let at = self.0;
        self.0 = at.wrapping_add(floats);
        at.cast()
    }
}

/// The part of `scratch` that starts at a cache line.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn aligned(scratch: &mut [f32]) -> *mut f32 {
    let skip = scratch.as_ptr().align_offset(64).min(15);
    scratch[skip..].as_mut_ptr()
}
