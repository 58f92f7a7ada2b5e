//! The specification of the product with quantized weights, in plain Rust: unpack a unit, then for every group and
//! token one integer sum, scaled in f32.

use super::blocks::{self, UNIT};
use super::{LinearTask, Scratch, TILE_TOKENS};

/// All tokens of a task, row by row.
pub(super) fn matvec(task: &LinearTask<'_>, scratch: &mut Scratch) {
    let (Some(form), Some(x)) = (blocks::form(task.dtype), task.x.q8) else { return };
    let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
    let (k, groups) = (x.layout.k, x.layout.groups);
    let sums = &mut bytemuck::cast_slice_mut::<_, f32>(&mut scratch.lines)[..TILE_TOKENS.min(task.x.tokens)];
    for from in (0..task.x.tokens).step_by(TILE_TOKENS) {
        let tokens = (task.x.tokens - from).min(TILE_TOKENS);
        for row in task.rows.clone() {
            let weights = &task.weight[row * row_bytes..(row + 1) * row_bytes];
            sums.fill(0.0);
            for (u, bytes) in weights.chunks(form.unit_bytes).enumerate() {
                let n = (k / 32 - UNIT * u).min(UNIT);
                let unit = blocks::unit(task.dtype, bytes, n);
                for (t, sum) in sums[..tokens].iter_mut().enumerate() {
                    let t = from + t;
                    let q = &x.qs[t * k + 256 * u..][..32 * n];
                    let d = &x.d[t * groups + UNIT * u..][..n];
                    let s16 = &x.s16[2 * (t * groups + UNIT * u)..][..2 * n];
                    for (h, q) in q.chunks_exact(16).enumerate() {
                        let w = &unit.q[16 * h..][..16];
                        let dot: i32 = if form.signed {
                            w.iter().zip(q).map(|(w, q)| i32::from(*w as i8) * i32::from(*q)).sum()
                        } else {
                            w.iter().zip(q).map(|(w, q)| i32::from(*w) * i32::from(*q)).sum()
                        };
                        *sum += unit.d[h] * d[h / 2] * dot as f32 + unit.m[h] * s16[h];
                    }
                }
            }
            for (t, sum) in sums[..tokens].iter().enumerate() {
                // SAFETY: `linear` checked the output's size.
                unsafe { task.out.write(from + t, row, *sum, task.accumulate) };
            }
        }
    }
}
