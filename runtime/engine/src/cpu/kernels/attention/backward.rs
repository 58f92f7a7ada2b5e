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
//! block, dK and dV once.

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
pub const fn attention_backward_scratch_len(head_dim: usize) -> usize {
    // Row-major q, dO, k (or v before it is transposed), dq, dk, dv; transposed k and v; P and dS; lse and Δ; alignment.
    6 * TILE * padded(head_dim) + 2 * TILE * head_dim.next_multiple_of(16) + 2 * TILE * TILE + 2 * TILE + 16
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
    if scratch.len() < attention_backward_scratch_len(task.head_dim) {
        debug_assert!(false, "attention scratch of {} floats is too small", scratch.len());
        return;
    }
    if task.rows.0 >= task.rows.1 {
        return;
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

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod lanes {
    //! In lanes.
    use super::super::block::Bend;
    use super::{AttentionBackwardTask, TILE, padded};
    use crate::cpu::kernels::gemm::lanes::{Left, Slab, SlabKernel, Target};
    use crate::cpu::kernels::lanes::{
        add, clear, exp2, fma, fnma, load, mul, outside, ramp, splat, store, sub, sum, tanh_of_exp2, transpose, zero,
    };
    use std::f32::consts::LOG2_E;

    /// Query vectors, or keys, of a register tile.
    const ROWS: usize = 6;

    /// Where the pieces of the scratch lie. Row-major blocks are [64][width].
    struct Scratch {
        /// The products' kernel.
        slab: SlabKernel,
        dim: usize,
        width: usize,
        q: *mut f32,
        d_out: *mut f32,
        k: *mut f32,
        dq: *mut f32,
        dk: *mut f32,
        dv: *mut f32,
        /// Keys [64/16][dim rounded up to 16][16].
        kt: *mut f32,
        /// Values, likewise.
        vt: *mut f32,
        /// Scores, then probabilities [64][64].
        p: *mut f32,
        /// Gradients of the probabilities, then of the scores [64][64].
        ds: *mut f32,
        /// In base 2.
        lse: *mut f32,
        delta: *mut f32,
    }

    impl Scratch {
        /// # Safety
        /// `next` must have room for `attention_backward_scratch_len` floats less the alignment.
        unsafe fn cut(mut next: *mut f32, dim: usize, slab: SlabKernel) -> Scratch {
            let (width, panel) = (padded(dim), TILE * dim.next_multiple_of(16));
            let mut take = |n: usize| {
                let at = next;
                // SAFETY: the lengths add up to what `attention_backward_scratch_len` counts.
                next = unsafe { next.add(n) };
                at
            };
            Scratch {
                slab,
                dim,
                width,
                q: take(TILE * width),
                d_out: take(TILE * width),
                k: take(TILE * width),
                dq: take(TILE * width),
                dk: take(TILE * width),
                dv: take(TILE * width),
                kt: take(panel),
                vt: take(panel),
                p: take(TILE * TILE),
                ds: take(TILE * TILE),
                lse: take(TILE),
                delta: take(TILE),
            }
        }
    }

    /// See [`attention_backward`](super::attention_backward), whose promises are those of the caller here.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    pub(super) unsafe fn backward(task: &AttentionBackwardTask<'_>, scratch: &mut [f32], slab: SlabKernel) {
        let bend = Bend::of(task.scale, task.softcap, task.alibi.is_some());
        let (first, last) = task.rows;
        // SAFETY: the scratch's length was checked; rows and heads are the task's; blocks are at most TILE long.
        unsafe {
            let at = Scratch::cut(super::super::aligned(scratch), task.head_dim, slab);
            // What lies between a head's width and the next multiple of 16 is multiplied, though never read back.
            for block in [at.q, at.d_out, at.k] {
                block.write_bytes(0, TILE * at.width);
            }
            for row in first..last {
                let dq = task.dq.add(row * task.dq_stride + task.heads.0 * at.dim);
                dq.write_bytes(0, task.heads().len() * at.dim);
            }
            let inner = task.kv_head * at.dim;
            for block in (first..last).step_by(TILE) {
                let keys = TILE.min(last - block);
                copy(&at, at.k, task.v.add(block * task.v_stride + inner), task.v_stride, keys);
                turn(&at, at.k, at.vt, keys);
                copy(&at, at.k, task.k.add(block * task.k_stride + inner), task.k_stride, keys);
                turn(&at, at.k, at.kt, keys);
                at.dk.write_bytes(0, TILE * at.width);
                at.dv.write_bytes(0, TILE * at.width);
                for head in task.heads() {
                    for row in (block..last).step_by(TILE) {
                        pair(task, &at, &bend, block, keys, head, row, TILE.min(last - row));
                    }
                }
                for j in 0..keys {
                    let dk = task.dk.add((block + j) * task.dk_stride + task.d_head * at.dim);
                    let dv = task.dv.add((block + j) * task.dv_stride + task.d_head * at.dim);
                    dk.copy_from_nonoverlapping(at.dk.add(j * at.width), at.dim);
                    dv.copy_from_nonoverlapping(at.dv.add(j * at.width), at.dim);
                }
            }
        }
    }

    /// A block of keys with a block of one head's queries.
    ///
    /// # Safety
    /// The scratch holds the keys and values of the block; rows and head are the task's.
    #[allow(clippy::too_many_arguments)]
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    unsafe fn pair(
        task: &AttentionBackwardTask<'_>,
        at: &Scratch,
        bend: &Bend,
        block: usize,
        keys: usize,
        head: usize,
        row: usize,
        count: usize,
    ) {
        // The keys within the block that each query sees; (0, 0) for none.
        let mut seen = [(0, 0); TILE];
        let mut some = false;
        for (m, seen) in seen[..count].iter_mut().enumerate() {
            let v = task.visible(row + m);
            let (from, to) = (v.start.max(block), v.end.min(block + keys));
            if from < to {
                *seen = (from - block, to - block);
                some = true;
            }
        }
        if !some {
            return;
        }
        let (dim, width, slab) = (at.dim, at.width, at.slab);
        // SAFETY: indices stay below the block's and the head's sizes, by which the scratch was cut.
        unsafe {
            let offset = head * dim;
            copy(at, at.q, task.q.add(row * task.q_stride + offset), task.q_stride, count);
            copy(at, at.d_out, task.d_out.add(row * task.out_stride + offset), task.out_stride, count);
            for m in 0..count {
                let out = task.out.add((row + m) * task.out_stride + offset);
                *at.delta.add(m) = dot(out, at.d_out.add(m * width), dim);
                *at.lse.add(m) = *task.lse.add((row + m) * task.lse_stride + head) * LOG2_E;
            }
            let slope = task.slope(head) * LOG2_E;
            for m in (0..count).step_by(ROWS) {
                let n = ROWS.min(count - m);
                let any = union(&seen[m..m + n]);
                for panel in any.0 / 16..any.1.div_ceil(16) {
                    let to = |at: *mut f32| Target {
                        at: at.add(m * TILE + 16 * panel),
                        row: TILE,
                        columns: 16,
                        alpha: 1.0,
                        add: false,
                    };
                    let panel = panel * 16 * dim.next_multiple_of(16);
                    let left = |at: *mut f32| Left { at: at.add(m * width), row: width, step: 1 };
                    slab(n, dim, left(at.q), Slab { at: at.kt.add(panel), row: 16 }, to(at.p));
                    slab(n, dim, left(at.d_out), Slab { at: at.vt.add(panel), row: 16 }, to(at.ds));
                }
                #[allow(clippy::needless_range_loop, reason = "i counts rows of five arrays")]
                for i in m..m + n {
                    let ahead = (row + i) as f32 - block as f32;
                    let (p, ds) = (at.p.add(i * TILE), at.ds.add(i * TILE));
                    let (lse, delta) = (*at.lse.add(i), *at.delta.add(i));
                    score_gradient(p, ds, seen[i], bend, task.scale, lse, delta, slope, ahead);
                }
                for c in (0..dim).step_by(16) {
                    let ds = Left { at: at.ds.add(m * TILE + any.0), row: TILE, step: 1 };
                    let k = Slab { at: at.k.add(any.0 * width + c), row: width };
                    let dq = Target { at: at.dq.add(m * width + c), row: width, columns: 16, alpha: 1.0, add: false };
                    slab(n, any.1 - any.0, ds, k, dq);
                }
                #[allow(clippy::needless_range_loop, reason = "i counts rows of five arrays")]
                for i in m..m + n {
                    add_to(at.dq.add(i * width), task.dq.add((row + i) * task.dq_stride + offset), dim);
                }
            }
            for j in (0..keys).step_by(ROWS) {
                let n = ROWS.min(keys - j);
                // The queries that see any of these keys.
                let sees = |&(from, to): &(usize, usize)| from < j + n && to > j;
                let Some(from) = seen[..count].iter().position(sees) else { continue };
                let to = seen[..count].iter().rposition(sees).map_or(from, |m| m + 1);
                for c in (0..dim).step_by(16) {
                    let left = |at: *mut f32| Left { at: at.add(from * TILE + j), row: 1, step: TILE };
                    let right = |at: *mut f32| Slab { at: at.add(from * width + c), row: width };
                    let sum = |at: *mut f32| Target {
                        at: at.add(j * width + c),
                        row: width,
                        columns: 16,
                        alpha: 1.0,
                        add: true,
                    };
                    slab(n, to - from, left(at.p), right(at.d_out), sum(at.dv));
                    slab(n, to - from, left(at.ds), right(at.q), sum(at.dk));
                }
            }
        }
    }

    /// The smallest range that holds all of the ranges that are not empty.
    fn union(seen: &[(usize, usize)]) -> (usize, usize) {
        let mut any = (TILE, 0);
        for &(from, to) in seen {
            if from < to {
                any = (any.0.min(from), any.1.max(to));
            }
        }
        if any.0 < any.1 { any } else { (0, 0) }
    }

    /// One query's row of 64: raw scores at `p` become probabilities, their raw gradients at `ds` those of q·k. Both are
    /// 0 outside `seen`, whatever was there.
    ///
    /// # Safety
    /// 64 floats at `p` and at `ds`.
    #[allow(clippy::too_many_arguments)]
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    #[inline]
    unsafe fn score_gradient(
        p: *mut f32,
        ds: *mut f32,
        seen: (usize, usize),
        bend: &Bend,
        scale: f32,
        lse: f32,
        delta: f32,
        slope: f32,
        ahead: f32,
    ) {
        for j in (0..TILE).step_by(8) {
            // SAFETY: within the rows.
            unsafe {
                let mut x = mul(load(p.add(j)), splat(bend.q_scale));
                let mut factor = splat(scale);
                if let Some(cap) = bend.cap {
                    let t = tanh_of_exp2(x);
                    x = mul(splat(cap), t);
                    factor = mul(factor, fnma(t, t, splat(1.0)));
                }
                if bend.alibi {
                    let back = sub(ramp(j as i32), splat(ahead));
                    x = fma(splat(slope), back, x);
                }
                let hidden = outside(j as i32, seen.0 as i32, seen.1 as i32);
                let e = clear(hidden, exp2(sub(x, splat(lse))));
                let d = sub(load(ds.add(j)), splat(delta));
                let d = clear(hidden, mul(mul(e, d), factor));
                store(p.add(j), e);
                store(ds.add(j), d);
            }
        }
    }

    /// Copies `rows` head vectors, `stride` apart, to rows of the scratch.
    ///
    /// # Safety
    /// They must be readable, and `rows` at most TILE.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    unsafe fn copy(at: &Scratch, to: *mut f32, from: *const f32, stride: usize, rows: usize) {
        for i in 0..rows {
            // SAFETY: the caller's promise; `width` ≥ `dim`.
            unsafe { to.add(i * at.width).copy_from_nonoverlapping(from.add(i * stride), at.dim) };
        }
    }

    /// Transposes the first `rows` rows of a block into panels of 16 of them.
    ///
    /// # Safety
    /// Both lie in the scratch.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    unsafe fn turn(at: &Scratch, from: *const f32, to: *mut f32, rows: usize) {
        let tall = at.dim.next_multiple_of(16);
        for j in (0..rows).step_by(8) {
            for d in (0..at.dim).step_by(8) {
                // SAFETY: an 8 × 8 tile within both: there are TILE rows and `tall` ≤ `width` columns.
                unsafe {
                    let mut r = [zero(); 8];
                    for (i, r) in r.iter_mut().enumerate() {
                        *r = load(from.add((j + i) * at.width + d));
                    }
                    let to = to.add(j / 16 * (16 * tall) + 16 * d + j % 16);
                    for (i, r) in transpose(r).into_iter().enumerate() {
                        store(to.add(16 * i), r);
                    }
                }
            }
        }
    }

    /// Σ a·b over `n` elements, in eight lanes.
    ///
    /// # Safety
    /// `n` floats at each.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    #[inline]
    unsafe fn dot(a: *const f32, b: *const f32, n: usize) -> f32 {
        let mut lanes = zero();
        let whole = n & !7;
        // SAFETY: the caller's promise.
        unsafe {
            for d in (0..whole).step_by(8) {
                lanes = fma(load(a.add(d)), load(b.add(d)), lanes);
            }
            (whole..n).fold(sum(lanes), |s, d| s + *a.add(d) * *b.add(d))
        }
    }

    /// y ← y + x over `n` elements.
    ///
    /// # Safety
    /// `n` floats at each.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    #[inline]
    unsafe fn add_to(x: *const f32, y: *mut f32, n: usize) {
        let whole = n & !7;
        // SAFETY: the caller's promise.
        unsafe {
            for d in (0..whole).step_by(8) {
                store(y.add(d), add(load(y.add(d)), load(x.add(d))));
            }
            for d in whole..n {
                *y.add(d) += *x.add(d);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AttentionTask, KvPages, Path, attention, attention_scratch_len};
    use super::*;
    use crate::quant::DType;

    #[derive(Clone, Debug)]
    struct Case {
        dim: usize,
        heads: usize,
        kv_heads: usize,
        /// Lengths of the sequences, one after the other.
        lengths: Vec<usize>,
        window: Option<usize>,
        softcap: Option<f32>,
        alibi: bool,
        /// Documents of 9 rows within each sequence.
        packed: bool,
    }

    fn plain(dim: usize, heads: usize, kv_heads: usize, lengths: &[usize]) -> Case {
        let lengths = lengths.to_vec();
        Case { dim, heads, kv_heads, lengths, window: None, softcap: None, alibi: false, packed: false }
    }

    /// Rows of q, k and v side by side in one buffer, as a fused projection leaves them, and the incoming gradient.
    struct Problem {
        case: Case,
        rows: usize,
        qkv: Vec<f32>,
        d_out: Vec<f32>,
        starts: Vec<usize>,
        slopes: Vec<f32>,
    }

    impl Problem {
        fn new(case: &Case) -> Problem {
            let c = case.clone();
            let rows: usize = c.lengths.iter().sum();
            let mut state = 88172645463325252u64;
            let mut noise = |n: usize, size: f32| -> Vec<f32> {
                (0..n)
                    .map(|_| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size
                    })
                    .collect()
            };
            let (qkv, d_out) = (noise(rows * c.width(), 2.0), noise(rows * c.heads * c.dim, 1.0));
            let mut starts = vec![];
            for &length in &c.lengths {
                let first = starts.len();
                starts.extend((0..length).map(|i| first + if c.packed { i / 9 * 9 } else { 0 }));
            }
            let slopes = (0..c.heads).map(|h| 2f32.powf(-(h as f32 + 1.0))).collect();
            Problem { case: c, rows, qkv, d_out, starts, slopes }
        }

        /// Σ out·d_out in f64 as a function of the buffer, and its gradient by the formulas.
        fn reference(&self, qkv: &[f64]) -> (f64, Vec<f64>) {
            let c = &self.case;
            let (mut loss, mut gradient) = (0.0, vec![0.0; qkv.len()]);
            for i in 0..self.rows {
                for h in 0..c.heads {
                    let d_out = &self.d_out[(i * c.heads + h) * c.dim..][..c.dim];
                    let at = |which: usize, row: usize| row * c.width() + c.offset(which, h);
                    let first = c.window.map_or(0, |w| (i + 1).saturating_sub(w)).max(self.starts[i]);
                    let dot = |a: usize, b: usize| (0..c.dim).map(|d| qkv[a + d] * qkv[b + d]).sum::<f64>();
                    let scale = 1.0 / (c.dim as f64).sqrt();
                    let mut s = vec![];
                    for j in first..=i {
                        let (mut x, mut slope) = (dot(at(0, i), at(1, j)) * scale, scale);
                        if let Some(cap) = c.softcap {
                            let t = (x / f64::from(cap)).tanh();
                            (x, slope) = (f64::from(cap) * t, slope * (1.0 - t * t));
                        }
                        if c.alibi {
                            x -= f64::from(self.slopes[h]) * (i - j) as f64;
                        }
                        s.push((x, slope));
                    }
                    let most = s.iter().fold(f64::NEG_INFINITY, |m, s| m.max(s.0));
                    let total: f64 = s.iter().map(|s| (s.0 - most).exp()).sum();
                    let p: Vec<f64> = s.iter().map(|s| (s.0 - most).exp() / total).collect();
                    let dp: Vec<f64> = (first..=i)
                        .map(|j| (0..c.dim).map(|d| f64::from(d_out[d]) * qkv[at(2, j) + d]).sum())
                        .collect();
                    let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                    loss += delta;
                    for (n, j) in (first..=i).enumerate() {
                        let ds = p[n] * (dp[n] - delta) * s[n].1;
                        for d in 0..c.dim {
                            gradient[at(2, j) + d] += p[n] * f64::from(d_out[d]);
                            gradient[at(0, i) + d] += ds * qkv[at(1, j) + d];
                            gradient[at(1, j) + d] += ds * qkv[at(0, i) + d];
                        }
                    }
                }
            }
            (loss, gradient)
        }

        /// Forward by `attention` over the plain rows, then backward; the gradient of the buffer.
        fn run(&self, isa: Isa) -> Vec<f32> {
            let c = &self.case;
            let (width, heads) = (c.width(), c.heads * c.dim);
            let mut out = vec![f32::NAN; self.rows * heads];
            let mut lse = vec![f32::NAN; self.rows * c.heads];
            let mut gradient = vec![f32::NAN; self.qkv.len()];
            let need = attention_scratch_len(c.dim).max(attention_backward_scratch_len(c.dim));
            let mut scratch = vec![f32::NAN; need];
            let (group, alibi) = (c.heads / c.kv_heads, c.alibi.then_some(&self.slopes[..]));
            let mut first = 0;
            for &length in &c.lengths {
                let rows = (first, first + length);
                first += length;
                let forward = AttentionTask {
                    path: Path::Block,
                    q: self.qkv.as_ptr(),
                    q_stride: width,
                    heads: (0, c.heads),
                    group,
                    head_dim: c.dim,
                    rows,
                    first_position: 0,
                    window: c.window,
                    starts: Some(&self.starts),
                    scale: 1.0 / (c.dim as f32).sqrt(),
                    softcap: c.softcap,
                    alibi,
                    kv: KvPages {
                        pages: &[self.qkv.as_ptr().cast()],
                        page_len: self.rows,
                        k_offset: 4 * heads,
                        v_offset: 4 * (heads + c.kv_heads * c.dim),
                        head_stride: 4 * c.dim,
                        pos_stride: 4 * width,
                        dtype: DType::F32,
                    },
                    out: out.as_mut_ptr(),
                    out_stride: heads,
                    lse: Some(lse.as_mut_ptr()),
                    lse_stride: c.heads,
                };
                // SAFETY: all rows are there; one thread.
                unsafe { attention(isa, &forward, &mut scratch) };
                scratch.fill(f32::NAN);
                for kv_head in 0..c.kv_heads {
                    // SAFETY: offsets within a row; buffers outlive the call; one thread.
                    unsafe {
                        let (qkv, d) = (self.qkv.as_ptr(), gradient.as_mut_ptr());
                        let (k, v) = (heads, heads + c.kv_heads * c.dim);
                        let task = AttentionBackwardTask {
                            rows,
                            kv_head,
                            heads: (kv_head * group, (kv_head + 1) * group),
                            d_head: kv_head,
                            head_dim: c.dim,
                            q: qkv,
                            q_stride: width,
                            k: qkv.add(k),
                            k_stride: width,
                            v: qkv.add(v),
                            v_stride: width,
                            out: out.as_ptr(),
                            d_out: self.d_out.as_ptr(),
                            out_stride: heads,
                            lse: lse.as_ptr(),
                            lse_stride: c.heads,
                            window: c.window,
                            starts: Some(&self.starts),
                            scale: forward.scale,
                            softcap: c.softcap,
                            alibi,
                            dq: d,
                            dq_stride: width,
                            dk: d.add(k),
                            dk_stride: width,
                            dv: d.add(v),
                            dv_stride: width,
                        };
                        attention_backward(isa, &task, &mut scratch);
                    }
                }
            }
            gradient
        }
    }

    impl Case {
        fn width(&self) -> usize {
            (self.heads + 2 * self.kv_heads) * self.dim
        }

        /// Where query head `h`'s query (0), key (1) or value (2) starts in a row.
        fn offset(&self, which: usize, h: usize) -> usize {
            let kv = h / (self.heads / self.kv_heads);
            self.dim
                * match which {
                    0 => h,
                    1 => self.heads + kv,
                    _ => self.heads + self.kv_heads + kv,
                }
        }
    }

    fn check(case: &Case) {
        let problem = Problem::new(case);
        let qkv: Vec<f64> = problem.qkv.iter().map(|&x| f64::from(x)).collect();
        let (_, want) = problem.reference(&qkv);
        for isa in Isa::available() {
            let got = problem.run(isa);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((f64::from(*g) - w).abs() <= 1e-5 * (1.0 + w.abs()), "{} {case:?} [{i}]: {g} {w}", isa.name());
            }
            assert!(problem.run(isa) == got, "a rerun gives other bits");
        }
    }

    #[test]
    fn the_reference_passes_central_differences() {
        let base = plain(6, 4, 2, &[7, 5]);
        for case in [
            base.clone(),
            Case { window: Some(3), softcap: Some(1.5), ..base.clone() },
            Case { alibi: true, packed: true, lengths: vec![12], ..base },
        ] {
            let problem = Problem::new(&case);
            let mut qkv: Vec<f64> = problem.qkv.iter().map(|&x| f64::from(x)).collect();
            let (_, gradient) = problem.reference(&qkv);
            for i in (0..qkv.len()).step_by(5) {
                let x = qkv[i];
                qkv[i] = x + 1e-5;
                let up = problem.reference(&qkv).0;
                qkv[i] = x - 1e-5;
                let slope = (up - problem.reference(&qkv).0) / 2e-5;
                qkv[i] = x;
                assert!((slope - gradient[i]).abs() < 1e-8 * (1.0 + slope.abs()), "{case:?} [{i}]: {slope}");
            }
        }
    }

    #[test]
    fn agrees_with_f64_over_head_widths_and_groups() {
        for dim in [1, 12, 16, 20, 64, 80, 128, 256] {
            check(&plain(dim, 6, 2, &[70]));
        }
        for (heads, kv_heads) in [(1, 1), (7, 1), (9, 3), (4, 4)] {
            check(&plain(32, heads, kv_heads, &[33]));
        }
    }

    #[test]
    fn agrees_with_f64_over_lengths() {
        for length in [1, 2, 5, 63, 64, 65, 128, 200] {
            check(&plain(24, 2, 1, &[length]));
        }
        check(&plain(32, 2, 1, &[1, 70, 64, 13]));
    }

    #[test]
    fn agrees_with_f64_with_windows_caps_slopes_and_documents() {
        for window in [None, Some(1), Some(17), Some(64), Some(100)] {
            for (softcap, alibi, packed) in
                [(None, false, false), (Some(2.0), false, false), (Some(50.0), false, true), (Some(5.0), true, true)]
            {
                check(&Case { window, softcap, alibi, packed, ..plain(32, 4, 2, &[150, 20]) });
            }
        }
    }
}
