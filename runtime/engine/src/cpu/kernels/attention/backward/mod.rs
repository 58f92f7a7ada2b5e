//! Attention backward, blocked as in FlashAttention (arXiv:2205.14135, algorithm 4), for one thread: nothing of the size
//! rows × rows is kept, and no sum is shared between threads, so there are no atomics and a rerun gives the same bits.
//!
//! A task is one sequence (a range of rows that see each other and nobody else) and one head of keys and values with
//! the query heads that read it, or some of them. With S the scores after cap and slope, P = exp(S − lse), and dO the incoming gradient,
//!   Δᵢ = dOᵢ·Oᵢ,  dV = Pᵀ·dO,  dS = P ⊙ (dO·Vᵀ − Δ) · scale · cap′,  dQ = dS·K,  dK = dSᵀ·Q,
//! where cap′ = 1 − tanh² of the soft cap. dK and dV are summed over the task's query heads.
//!
//! **Keys and values** are plain f32 rows here, not a cache. The forward pass over the same rows is
//! [`attention`](super::attention) with a [`KvPages`](super::KvPages) of a single page: the page starts where the buffer
//! with keys and values starts, `k_offset` and `v_offset` are the bytes to row 0 of each, `pos_stride` is the row's width
//! in bytes, `head_stride` is 4 · head_dim, `page_len` the number of rows, and `starts` has each row's first of its
//! sequence; with [`Path::Block`](super::Path::Block) and `lse`.
//!
//! **The vector form** takes 64 keys at a time, and for each block 64 queries at a time: five register-tiled products
//! (`gemm`) on row-major copies [64][width] of q, dO, k and on transposed panels [64/16][dim][16] of k and v. `width` is
//! the head's, rounded up to an odd multiple of 16 so that rows do not share cache sets. dQ goes to memory block after
//! block, dK and dV once. In a matrix unit the same is done in another order (`split`).

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod lanes;
#[cfg(target_arch = "x86_64")]
mod split;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
use super::super::linear::has_tiles;
use super::super::vector::{dot_body, exp, tanh};
use crate::cpu::isa::Isa;
use std::ops::Range;

/// One thread's part: one sequence, one head of keys and values. Row i of every tensor is position i; a head's vector
/// starts at `row · stride + head · head_dim`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackwardTask<'a> {
    /// The sequence's rows; row i sees rows `rows.0 ..= i`, less what window and `starts` take away.
    pub rows: (usize, usize),
    /// The head of keys and values.
    pub kv_head: usize,
    /// The query heads, first to last: all that read it, or some of them.
    pub heads: (usize, usize),
    /// The head of `dk` and `dv` to which the gradients of these query heads go.
    pub d_head: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Queries after rope, row 0.
    pub q: *const f32,
    /// Floats between rows of `q`.
    pub q_stride: usize,
    /// Keys after rope, row 0.
    pub k: *const f32,
    /// Floats between rows of `k`.
    pub k_stride: usize,
    /// Values, row 0.
    pub v: *const f32,
    /// Floats between rows of `v`.
    pub v_stride: usize,
    /// The forward pass's output, row 0.
    pub out: *const f32,
    /// The incoming gradient, row 0.
    pub d_out: *const f32,
    /// Floats between rows of `out` and of `d_out`.
    pub out_stride: usize,
    /// The forward pass's log-sum-exp: of row i and query head h at `lse[i · lse_stride + h]`.
    pub lse: *const f32,
    /// Floats between rows of `lse`.
    pub lse_stride: usize,
    /// Sliding window: row p sees p − window + 1 … p.
    pub window: Option<usize>,
    /// The first row each row may see (packed documents), indexed by row.
    pub starts: Option<&'a [usize]>,
    /// Factor on q·k.
    pub scale: f32,
    /// c·tanh(s / c) on the scaled score.
    pub softcap: Option<f32>,
    /// ALiBi: one slope per query head.
    pub alibi: Option<&'a [f32]>,
    /// Keep to f32, where a matrix unit would have an error of 10⁻⁵.
    pub exact: bool,
    /// Gradient of the queries, row 0; overwritten for the task's rows and query heads.
    pub dq: *mut f32,
    /// Floats between rows of `dq`.
    pub dq_stride: usize,
    /// Gradient of the keys, row 0; overwritten for the task's rows and head.
    pub dk: *mut f32,
    /// Floats between rows of `dk`.
    pub dk_stride: usize,
    /// Gradient of the values, row 0; overwritten for the task's rows and head.
    pub dv: *mut f32,
    /// Floats between rows of `dv`.
    pub dv_stride: usize,
}

// SAFETY: a task is a description; what it writes is named by its rows and heads, and whoever runs tasks side by side
// promises to `attention_backward` that these are disjoint and that the memory outlives the run.
unsafe impl Send for AttentionBackwardTask<'_> {}
// SAFETY: as above; nothing is written through a shared task but what the running thread owns.
unsafe impl Sync for AttentionBackwardTask<'_> {}

impl AttentionBackwardTask<'_> {
    /// The rows that `row` sees; never empty.
    #[inline(always)]
    fn visible(&self, row: usize) -> Range<usize> {
        let window = self.window.map_or(0, |w| (row + 1).saturating_sub(w));
        let start = self.starts.and_then(|s| s.get(row)).copied().unwrap_or(0);
        window.max(start).max(self.rows.0).min(row)..row + 1
    }

    /// The slope of query head `h`, 0 without ALiBi.
    #[inline(always)]
    fn slope(&self, h: usize) -> f32 {
        self.alibi.and_then(|a| a.get(h)).copied().unwrap_or(0.0)
    }

    /// The query heads of the task.
    fn heads(&self) -> Range<usize> {
        self.heads.0..self.heads.1
    }
}

/// Keys, and queries, of a block.
const TILE: usize = 64;

/// Floats between the rows of a copied block: an odd multiple of 16.
const fn padded(head_dim: usize) -> usize {
    (head_dim.div_ceil(16) | 1) * 16
}

/// Floats of scratch that [`attention_backward`] needs, for any task of this head width.
pub fn attention_backward_scratch_len(isa: Isa, head_dim: usize) -> usize {
    // Row-major q, dO, k (or v before it is transposed), dq, dk, dv; transposed k and v; P and dS; lse and Δ.
    let lanes = 6 * TILE * padded(head_dim) + 2 * TILE * head_dim.next_multiple_of(16) + 2 * TILE * TILE + 2 * TILE;
    #[cfg(target_arch = "x86_64")]
    let lanes = if has_tiles(isa) { lanes.max(split::scratch_len(head_dim)) } else { lanes };
    let _ = isa;
    // The padding is for aligning the scratch to a cache line.
    lanes + 16
}

/// Runs `task`. `scratch` holds at least [`attention_backward_scratch_len`] floats of any content; with less, nothing is
/// done in release builds.
///
/// # Safety
/// All pointers of the task must be valid for the rows and heads it names, `out` and `lse` must come from the forward
/// pass over the same inputs, no other thread may write what is read here, and the places in `dq`, `dk` and `dv` must be
/// this call's alone.
pub unsafe fn attention_backward(isa: Isa, task: &AttentionBackwardTask<'_>, scratch: &mut [f32]) {
    debug_assert!(task.heads.0 < task.heads.1 && task.head_dim > 0);
    if scratch.len() < attention_backward_scratch_len(isa, task.head_dim) {
        debug_assert!(false, "attention scratch of {} floats is too small", scratch.len());
        return;
    }
    if task.rows.0 >= task.rows.1 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if has_tiles(isa) && !task.exact {
        // SAFETY: there is the unit; the rest is the caller's promise.
        return unsafe { split::backward(task, scratch) };
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if super::super::lanes::runs(isa) {
        // SAFETY: the token in `isa` proves the instructions; the rest is the caller's promise.
        unsafe { lanes::backward(task, scratch, super::super::gemm::slab_of(isa)) };
        return;
    }
    let _ = isa;
    // SAFETY: the caller's promise.
    unsafe { scalar(task) }
}

/// The specification: one query vector after the other, one key after the other.
///
/// # Safety
/// As for [`attention_backward`].
unsafe fn scalar(task: &AttentionBackwardTask<'_>) {
    let dim = task.head_dim;
    // SAFETY: rows and heads are the task's; the slices that are written are of three different tensors, and there is
    // one of each at a time.
    unsafe {
        let read = |at: *const f32, stride: usize, row: usize, head: usize| {
            std::slice::from_raw_parts(at.add(row * stride + head * dim), dim)
        };
        let write = |at: *mut f32, stride: usize, row: usize, head: usize| {
            std::slice::from_raw_parts_mut(at.add(row * stride + head * dim), dim)
        };
        for row in task.rows.0..task.rows.1 {
            write(task.dk, task.dk_stride, row, task.d_head).fill(0.0);
            write(task.dv, task.dv_stride, row, task.d_head).fill(0.0);
        }
        for head in task.heads() {
            for row in task.rows.0..task.rows.1 {
                let q = read(task.q, task.q_stride, row, head);
                let d_out = read(task.d_out, task.out_stride, row, head);
                let delta = dot_body(read(task.out, task.out_stride, row, head), d_out);
                let lse = *task.lse.add(row * task.lse_stride + head);
                let dq = write(task.dq, task.dq_stride, row, head);
                dq.fill(0.0);
                for j in task.visible(row) {
                    let k = read(task.k, task.k_stride, j, task.kv_head);
                    let v = read(task.v, task.v_stride, j, task.kv_head);
                    let (mut s, mut slope) = (dot_body(q, k) * task.scale, task.scale);
                    if let Some(c) = task.softcap {
                        let t = tanh(s / c);
                        s = c * t;
                        slope *= 1.0 - t * t;
                    }
                    let p = exp(s - task.slope(head) * (row - j) as f32 - lse);
                    let ds = p * (dot_body(d_out, v) - delta) * slope;
                    let dk = write(task.dk, task.dk_stride, j, task.d_head);
                    let dv = write(task.dv, task.dv_stride, j, task.d_head);
                    dv.iter_mut().zip(d_out).for_each(|(dv, d)| *dv += p * d);
                    dk.iter_mut().zip(q).for_each(|(dk, q)| *dk += ds * q);
                    dq.iter_mut().zip(k).for_each(|(dq, k)| *dq += ds * k);
                }
            }
        }
    }
}
