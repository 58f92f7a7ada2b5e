//! The gradient of attention against f64, whose formulas pass central differences, over shapes and instruction sets.

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
                let dp: Vec<f64> =
                    (first..=i).map(|j| (0..c.dim).map(|d| f64::from(d_out[d]) * qkv[at(2, j) + d]).sum()).collect();
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
    fn run(&self, isa: Isa, exact: bool) -> Vec<f32> {
        let c = &self.case;
        let (width, heads) = (c.width(), c.heads * c.dim);
        let mut out = vec![f32::NAN; self.rows * heads];
        let mut lse = vec![f32::NAN; self.rows * c.heads];
        let mut gradient = vec![f32::NAN; self.qkv.len()];
        let need = attention_scratch_len(c.dim).max(attention_backward_scratch_len(isa, c.dim));
        let mut scratch = vec![f32::NAN; need];
        let (group, alibi) = (c.heads / c.kv_heads, c.alibi.then_some(&self.slopes[..]));
        let mut first = 0;
        for &length in &c.lengths {
            let rows = (first, first + length);
            first += length;
            let forward = AttentionTask {
                path: if exact { Path::Block } else { Path::Split },
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
                        exact,
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
    for (isa, exact) in Isa::available().into_iter().flat_map(|isa| [(isa, true), (isa, false)]) {
        let got = problem.run(isa, exact);
        let most = if exact || isa.name() != "amx" { 1e-5 } else { 6e-5 };
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            let close = (f64::from(*g) - w).abs() <= most * (1.0 + w.abs());
            assert!(close, "{} exact: {exact} {case:?} [{i}]: {g} {w}", isa.name());
        }
        assert!(problem.run(isa, exact) == got, "a rerun gives other bits");
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
