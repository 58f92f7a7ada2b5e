//! The decode path in lanes: each key and value is read once per query row, straight from the cache, and serves all
//! query heads of its group.
//!
//! Scores are dot products along the head, eight lanes wide, for four positions and up to three heads at a time; values
//! are added position by position into registers that hold a strip of the output. F32 and F16 are read in place; Q8_0,
//! and heads that are no multiple of 16 wide, are unpacked first, a block of 64 positions at a time. Lanes and order
//! depend on the head's width alone, so heads may be grouped and split over tasks at will.

use super::super::lanes::{F32x8, add, exp2, fma, load, load_f16, mul, splat, store, store_sums, sub, zero};
use super::super::{asks_ahead, prefetch};
use super::block::{Bend, base_of, exponentiate, finish, mask_and_max};
use super::kv::unpack_eights;
use super::{AttentionTask, BLOCK, MAX_GROUP, aligned};
use crate::quant::DType;
use std::f32::consts::LOG2_E;

/// How eight elements are read from the cache.
trait Element {
    const BYTES: usize;
    /// # Safety
    /// Eight elements readable at `p`; the caller has the instructions.
    unsafe fn load(p: *const u8) -> F32x8;
}

struct F32;
impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> F32x8 {
        // SAFETY: the caller's promise.
        unsafe { load(p.cast()) }
    }
}

struct F16;
impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> F32x8 {
        // SAFETY: the caller's promise.
        unsafe { load_f16(p) }
    }
}

/// See [`attention`](super::attention), whose promises are those of the caller here.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
pub(super) unsafe fn attention_lanes(task: &AttentionTask<'_>, scratch: &mut [f32]) {
    let scratch = aligned(scratch);
    task.for_kv_heads(|kv_head, first, last| {
        for h in (first..last).step_by(MAX_GROUP) {
            for row in task.rows() {
                let heads = (h, last.min(h + MAX_GROUP));
                // SAFETY: rows and heads are the task's; the CPU has the instructions, for this function runs.
                unsafe {
                    match task.kv.dtype {
                        DType::F16 if task.head_dim.is_multiple_of(16) => {
                            group::<F16, true>(task, scratch, kv_head, heads, row);
                        }
                        DType::F32 if task.head_dim.is_multiple_of(16) => {
                            group::<F32, true>(task, scratch, kv_head, heads, row);
                        }
                        _ => group::<F32, false>(task, scratch, kv_head, heads, row),
                    }
                }
            }
        }
    });
}

/// One row's query heads `heads` of one cache head. Unless `IN_PLACE`, blocks are unpacked to f32 first.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
unsafe fn group<E: Element, const IN_PLACE: bool>(
    task: &AttentionTask<'_>,
    scratch: *mut f32,
    kv_head: usize,
    heads: (usize, usize),
    row: usize,
) {
    let (dim, width, count) = (task.head_dim, task.head_dim.next_multiple_of(16), heads.1 - heads.0);
    let bend = Bend::new(task);
    let visible = task.visible(row);
    let asks = asks_ahead();
    // SAFETY: the scratch is cut into q and o [MAX_GROUP][width], s [MAX_GROUP][64], maxima [MAX_GROUP], sums
    // [MAX_GROUP][8] and an unpacked block [64][width], as `attention_scratch_len` counts; pointers into the task are
    // those of its own row and heads and of visible positions.
    unsafe {
        let q = scratch;
        let o = q.add(MAX_GROUP * width);
        let s = o.add(MAX_GROUP * width);
        let most = s.add(MAX_GROUP * BLOCK);
        let sums = most.add(MAX_GROUP);
        let unpacked = sums.add(MAX_GROUP * 8);
        q.write_bytes(0, count * width);
        o.write_bytes(0, count * width);
        sums.write_bytes(0, count * 8);
        for i in 0..count {
            *most.add(i) = f32::NEG_INFINITY;
            let from = task.q.add(row * task.q_stride + (heads.0 + i) * dim);
            for d in 0..dim {
                *q.add(i * width + d) = *from.add(d) * bend.q_scale;
            }
        }
        for block in (visible.start / BLOCK * BLOCK..visible.end).step_by(BLOCK) {
            let from = visible.start.max(block) - block;
            let to = visible.end.min(block + BLOCK) - block;
            // The block's vectors: their first and the bytes between them.
            let vectors = |offset: usize| {
                if IN_PLACE {
                    return (task.kv.at(offset, kv_head, block), task.kv.pos_stride);
                }
                for j in from..to {
                    let vector = task.kv.at(offset, kv_head, block + j);
                    // The padding is multiplied by the zeros in q, so it has to be finite.
                    store(unpacked.add((j + 1) * width - 8), zero());
                    unpack_eights(task.kv.dtype, vector, dim, |d, x| store(unpacked.add(j * width + d), x));
                }
                (unpacked.cast::<u8>().cast_const(), 4 * width)
            };
            if asks {
                // Values while keys are multiplied, and keys sooner than stretches of their length are foreseen.
                for offset in [task.kv.k_offset, task.kv.v_offset] {
                    let first = task.kv.at(offset, kv_head, block + from);
                    for line in (0..(to - from) * task.kv.pos_stride).step_by(64) {
                        prefetch(first.wrapping_add(line));
                    }
                }
            }
            let (k, stride) = vectors(task.kv.k_offset);
            for i in (0..count).step_by(3) {
                let (q, s) = (q.add(i * width), s.add(i * BLOCK));
                match count - i {
                    1 => scores::<E, 1>(k, stride, from, to, q, width, s),
                    2 => scores::<E, 2>(k, stride, from, to, q, width, s),
                    _ => scores::<E, 3>(k, stride, from, to, q, width, s),
                }
            }
            // Maxima of all heads, then all factors, then all probabilities: each is a chain of dependent steps, and
            // those of several heads overlap.
            let ahead = (task.first_position + row) as f32 - block as f32;
            let (mut shrink, mut base) = ([0.0f32; MAX_GROUP], [0.0f32; MAX_GROUP]);
            for i in 0..count {
                let row_max = mask_and_max(s.add(i * BLOCK), from, to, &bend, task.slope(heads.0 + i) * LOG2_E, ahead);
                let most = most.add(i);
                shrink[i] = *most;
                *most = if row_max > *most { row_max } else { *most };
                base[i] = base_of(*most);
            }
            for (shrink, base) in shrink.as_chunks_mut::<8>().0.iter_mut().zip(base.as_chunks::<8>().0) {
                let change = sub(load(shrink.as_ptr()), load(base.as_ptr()));
                store(shrink.as_mut_ptr(), exp2(change));
            }
            for i in 0..count {
                let lanes = sums.add(8 * i);
                let kept = mul(load(lanes), splat(shrink[i]));
                store(lanes, add(kept, exponentiate(s.add(i * BLOCK), base[i])));
            }
            let (v, stride) = vectors(task.kv.v_offset);
            for i in (0..count).step_by(3) {
                let (o, s, shrink) = (o.add(i * width), s.add(i * BLOCK), &shrink[i..]);
                match count - i {
                    1 => weigh::<E, 1>(v, stride, from, to, s, o, width, shrink),
                    2 => weigh::<E, 2>(v, stride, from, to, s, o, width, shrink),
                    _ => weigh::<E, 3>(v, stride, from, to, s, o, width, shrink),
                }
            }
        }
        for i in 0..count {
            finish(task, row, heads.0 + i, o.add(i * width), *most.add(i), load(sums.add(8 * i)));
        }
    }
}

/// s[h][j] = q[h] · k[j] for H heads and the positions `from..to` of a block, whose vectors are `stride` bytes apart.
///
/// # Safety
/// The vectors of these positions are readable, `width` elements each; q is [H][width], s [H][64].
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
unsafe fn scores<E: Element, const H: usize>(
    k: *const u8,
    stride: usize,
    from: usize,
    to: usize,
    q: *const f32,
    width: usize,
    s: *mut f32,
) {
    for j in (from / 4 * 4..to).step_by(4) {
        // SAFETY: positions outside the range are replaced by the nearest inside; what they score is masked later.
        unsafe {
            let at = |i: usize| k.add((j + i).clamp(from, to - 1) * stride);
            let (k0, k1, k2, k3) = (at(0), at(1), at(2), at(3));
            let mut acc = [[zero(); 4]; H];
            for d in (0..width).step_by(8) {
                // Key by key: twelve accumulators, three queries and one key are the sixteen registers there are.
                for (i, k) in [k0, k1, k2, k3].into_iter().enumerate() {
                    let k = E::load(k.add(d * E::BYTES));
                    for (h, acc) in acc.iter_mut().enumerate() {
                        acc[i] = fma(load(q.add(h * width + d)), k, acc[i]);
                    }
                }
            }
            for (h, a) in acc.iter().enumerate() {
                store_sums(s.add(h * BLOCK + j), *a);
            }
        }
    }
}

/// o[h] ← o[h]·shrink[h] + Σⱼ p[h][j]·v[j] for H heads, in strips of 32 and then 16 dimensions.
///
/// # Safety
/// As for [`scores`], with o [H][width].
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[allow(clippy::too_many_arguments)]
unsafe fn weigh<E: Element, const H: usize>(
    v: *const u8,
    stride: usize,
    from: usize,
    to: usize,
    p: *const f32,
    o: *mut f32,
    width: usize,
    shrink: &[f32],
) {
    let mut d = 0;
    // SAFETY: strips end at `width`.
    unsafe {
        while d + 32 <= width {
            strip::<E, H, 4>(v.add(d * E::BYTES), stride, from, to, p, o.add(d), width, shrink);
            d += 32;
        }
        if d < width {
            strip::<E, H, 2>(v.add(d * E::BYTES), stride, from, to, p, o.add(d), width, shrink);
        }
    }
}

/// [`weigh`] for a strip of 8·C dimensions.
///
/// # Safety
/// As for [`weigh`].
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline]
#[allow(clippy::too_many_arguments)]
unsafe fn strip<E: Element, const H: usize, const C: usize>(
    v: *const u8,
    stride: usize,
    from: usize,
    to: usize,
    p: *const f32,
    o: *mut f32,
    width: usize,
    shrink: &[f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[zero(); C]; H];
        for (h, acc) in acc.iter_mut().enumerate() {
            for (c, acc) in acc.iter_mut().enumerate() {
                *acc = mul(splat(shrink[h]), load(o.add(h * width + 8 * c)));
            }
        }
        let mut at = v.add(from * stride);
        for j in from..to {
            for c in 0..C {
                let x = E::load(at.add(8 * c * E::BYTES));
                for (h, acc) in acc.iter_mut().enumerate() {
                    acc[c] = fma(splat(*p.add(h * BLOCK + j)), x, acc[c]);
                }
            }
            at = at.add(stride);
        }
        for (h, acc) in acc.iter().enumerate() {
            for (c, acc) in acc.iter().enumerate() {
                store(o.add(h * width + 8 * c), *acc);
            }
        }
    }
}
