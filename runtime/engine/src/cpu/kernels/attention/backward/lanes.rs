//! In lanes: the vector form that the module describes.

use super::super::block::Bend;
use super::super::{Pieces, aligned};
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
    /// From `base` on, where there must be room for what `attention_backward_scratch_len` counts for this form.
    fn cut(base: *mut f32, dim: usize, slab: SlabKernel) -> Scratch {
        let (width, panel) = (padded(dim), TILE * dim.next_multiple_of(16));
        let mut pieces = Pieces(base);
        Scratch {
            slab,
            dim,
            width,
            q: pieces.take(TILE * width),
            d_out: pieces.take(TILE * width),
            k: pieces.take(TILE * width),
            dq: pieces.take(TILE * width),
            dk: pieces.take(TILE * width),
            dv: pieces.take(TILE * width),
            kt: pieces.take(panel),
            vt: pieces.take(panel),
            p: pieces.take(TILE * TILE),
            ds: pieces.take(TILE * TILE),
            lse: pieces.take(TILE),
            delta: pieces.take(TILE),
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
        let at = Scratch::cut(aligned(scratch), task.head_dim, slab);
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
                let sum =
                    |at: *mut f32| Target { at: at.add(j * width + c), row: width, columns: 16, alpha: 1.0, add: true };
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
