//! The specification: attention in plain Rust, one query vector after the other, running softmax by blocks.
//!
//! A block of keys and values is unpacked once for a tile of query vectors, and dot products run in lanes, so this is
//! also the form that compilers vectorize where no kernel of our own exists. It knows one path only.

use super::super::vector::{dot_body, exp, tanh};
use super::{AttentionTask, BLOCK, TILE, kv::unpack};

/// See [`attention`](super::attention), whose promises are those of the caller here.
pub(super) unsafe fn attention_scalar(task: &AttentionTask<'_>, scratch: &mut [f32]) {
    let dim = task.head_dim;
    let (keys, rest) = scratch.split_at_mut(BLOCK * dim);
    let (values, rest) = rest.split_at_mut(BLOCK * dim);
    let (scores, rest) = rest.split_at_mut(BLOCK);
    let (most, rest) = rest.split_at_mut(TILE);
    let sums = &mut rest[..TILE];
    task.for_kv_heads(|kv_head, first, last| {
        for heads in (first..last).step_by(TILE).map(|h| h..last.min(h + TILE)) {
            let tile_rows = TILE / heads.len();
            for rows in task.rows().step_by(tile_rows).map(|r| r..task.rows.1.min(r + tile_rows)) {
                most.fill(f32::NEG_INFINITY);
                sums.fill(0.0);
                for r in rows.clone() {
                    for h in heads.clone() {
                        // SAFETY: the row and head are this task's own.
                        unsafe { output(task, r, h) }.fill(0.0);
                    }
                }
                let start = rows.clone().map(|r| task.visible(r).start).min().unwrap_or(0);
                let end = task.visible(rows.end - 1).end;
                for block in (start / BLOCK * BLOCK..end).step_by(BLOCK) {
                    let stored = BLOCK.min(end - block);
                    for (j, (k, v)) in keys.chunks_exact_mut(dim).zip(values.chunks_exact_mut(dim)).enumerate() {
                        if j < stored {
                            // SAFETY: positions below `end` are stored.
                            unsafe {
                                unpack(task.kv.dtype, task.kv.at(task.kv.k_offset, kv_head, block + j), k);
                                unpack(task.kv.dtype, task.kv.at(task.kv.v_offset, kv_head, block + j), v);
                            }
                        }
                    }
                    let pairs = rows.clone().flat_map(|r| heads.clone().map(move |h| (r, h)));
                    for (((r, h), most), sum) in pairs.zip(most.iter_mut()).zip(sums.iter_mut()) {
                        let visible = task.visible(r);
                        let (from, to) = (visible.start.max(block), visible.end.min(block + BLOCK));
                        if from >= to {
                            continue;
                        }
                        // SAFETY: the row and head are this task's own.
                        let (q, out) = unsafe {
                            let q = task.q.add(r * task.q_stride + h * dim);
                            (std::slice::from_raw_parts(q, dim), output(task, r, h))
                        };
                        let (from, to) = (from - block, to - block);
                        let scores = &mut scores[from..to];
                        for (j, (s, k)) in scores.iter_mut().zip(keys[from * dim..].chunks_exact(dim)).enumerate() {
                            *s = dot_body(q, k) * task.scale;
                            if let Some(c) = task.softcap {
                                *s = c * tanh(*s / c);
                            }
                            *s -= task.slope(h) * (visible.end - 1 - (block + from + j)) as f32;
                        }
                        let new = scores.iter().fold(*most, |m, &s| m.max(s));
                        let shrink = exp(*most - new);
                        *most = new;
                        *sum *= shrink;
                        out.iter_mut().for_each(|o| *o *= shrink);
                        for (s, v) in scores.iter().zip(values[from * dim..].chunks_exact(dim)) {
                            let p = exp(s - new);
                            *sum += p;
                            out.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
                        }
                    }
                }
                let pairs = rows.flat_map(|r| heads.clone().map(move |h| (r, h)));
                for (((r, h), most), sum) in pairs.zip(most.iter()).zip(sums.iter()) {
                    // SAFETY: the row and head are this task's own, in `out` and in `lse`.
                    unsafe {
                        output(task, r, h).iter_mut().for_each(|o| *o /= sum);
                        if let Some(lse) = task.lse {
                            lse.add(r * task.lse_stride + h).write(most + sum.ln());
                        }
                    }
                }
            }
        }
    });
}

/// The output vector of a row and head.
///
/// # Safety
/// Both must be the task's own, and the returned slice the only one of it at a time.
unsafe fn output<'a>(task: &AttentionTask<'a>, row: usize, head: usize) -> &'a mut [f32] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(task.out.add(row * task.out_stride + head * task.head_dim), task.head_dim) }
}
