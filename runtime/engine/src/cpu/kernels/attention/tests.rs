//! Attention against an f64 reference that reads the same stored cache, over shapes, types and instruction sets.

use super::*;

/// A small deterministic generator; values in [−1, 1).
struct Noise(u64);
impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }
    fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

#[derive(Clone, Debug)]
struct Case {
    dim: usize,
    heads: usize,
    kv_heads: usize,
    rows: usize,
    first: usize,
    window: Option<usize>,
    softcap: Option<f32>,
    alibi: bool,
    segments: bool,
    dtype: DType,
    page_len: usize,
}

/// A cache with stored keys and values, queries, and the attention of it in f64.
struct Problem {
    case: Case,
    q: Vec<f32>,
    /// Pages out of order in one buffer, with a guard of NaN between them where positions are not stored.
    bytes: Vec<u8>,
    starts: Vec<usize>,
    slopes: Vec<f32>,
    stored: [Vec<f32>; 2],
}

impl Problem {
    fn new(case: &Case, isa: Isa) -> Problem {
        let c = case.clone();
        let length = c.first + c.rows;
        let row = kv_row_bytes(c.dtype, c.dim).unwrap();
        let page = 2 * c.kv_heads * c.page_len * row;
        let pages = length.div_ceil(c.page_len);
        let mut noise = Noise(c.dim as u64 * 31 + length as u64);
        let mut bytes = vec![0xFF; pages * page];
        let mut stored = [vec![], vec![]];
        for (which, stored) in stored.iter_mut().enumerate() {
            for j in 0..length {
                for h in 0..c.kv_heads {
                    let x: Vec<f32> = noise.vec(c.dim).iter().map(|x| x * 2.0).collect();
                    let at = (pages - 1 - j / c.page_len) * page
                        + which * page / 2
                        + (h * c.page_len + j % c.page_len) * row;
                    let mut back = vec![0.0; c.dim];
                    // SAFETY: the vector lies within the buffer.
                    unsafe {
                        store_kv(isa, c.dtype, &x, bytes[at..at + row].as_mut_ptr());
                        kv::unpack(c.dtype, bytes[at..at + row].as_ptr(), &mut back);
                    }
                    let tolerance = match c.dtype {
                        DType::F32 => 0.0,
                        DType::F16 => 1e-3,
                        _ => 9.5e-3,
                    };
                    assert!(x.iter().zip(&back).all(|(x, y)| (x - y).abs() <= tolerance));
                    stored.extend(back);
                }
            }
        }
        let q = noise.vec(c.rows * c.heads * c.dim).iter().map(|x| x * 3.0).collect();
        // Segments of 5, 6, 7 … rows; the first begins in the middle of what was stored before.
        let mut starts = vec![c.first / 2; 3.min(c.rows)];
        let mut size = 5;
        while starts.len() < c.rows {
            let start = c.first + starts.len();
            starts.extend(vec![start; size.min(c.rows - starts.len())]);
            size += 1;
        }
        let slopes = (0..c.heads).map(|h| 2f32.powf(-(h as f32 + 1.0))).collect();
        Problem { case: c, q, bytes, starts, slopes, stored }
    }

    fn reference(&self) -> (Vec<f64>, Vec<f64>) {
        let c = &self.case;
        let (mut out, mut lse) = (vec![], vec![]);
        for r in 0..c.rows {
            let p = c.first + r;
            for h in 0..c.heads {
                let q = &self.q[(r * c.heads + h) * c.dim..][..c.dim];
                let vector = |which: usize, j: usize| {
                    &self.stored[which][(j * c.kv_heads + h / (c.heads / c.kv_heads)) * c.dim..][..c.dim]
                };
                let mut s = vec![f64::NEG_INFINITY; p + 1];
                for (j, s) in s.iter_mut().enumerate() {
                    if c.window.is_some_and(|w| j + w <= p) || (c.segments && j < self.starts[r]) {
                        continue;
                    }
                    let dot: f64 = q.iter().zip(vector(0, j)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    *s = dot / (c.dim as f64).sqrt();
                    if let Some(cap) = c.softcap {
                        *s = f64::from(cap) * (*s / f64::from(cap)).tanh();
                    }
                    if c.alibi {
                        *s -= f64::from(self.slopes[h]) * (p - j) as f64;
                    }
                }
                let most = s.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
                let total: f64 = s.iter().map(|s| (s - most).exp()).sum();
                lse.push(most + total.ln());
                for d in 0..c.dim {
                    let sum: f64 =
                        s.iter().enumerate().map(|(j, s)| (s - most).exp() * f64::from(vector(1, j)[d])).sum();
                    out.push(sum / total);
                }
            }
        }
        (out, lse)
    }

    /// Runs the kernel, split into tasks by `split` = (rows, heads) per task.
    fn run(&self, isa: Isa, path: Path, split: (usize, usize)) -> (Vec<f32>, Vec<f32>) {
        let c = &self.case;
        let row = kv_row_bytes(c.dtype, c.dim).unwrap();
        let page = 2 * c.kv_heads * c.page_len * row;
        let pages: Vec<*const u8> = self.bytes.chunks_exact(page).rev().map(<[u8]>::as_ptr).collect();
        let mut out = vec![f32::NAN; self.q.len()];
        let mut lse = vec![f32::NAN; c.rows * c.heads];
        let mut scratch = vec![f32::NAN; attention_scratch_len(c.dim)];
        for r in (0..c.rows).step_by(split.0) {
            for h in (0..c.heads).step_by(split.1) {
                let task = AttentionTask {
                    path,
                    q: self.q.as_ptr(),
                    q_stride: c.heads * c.dim,
                    heads: (h, c.heads.min(h + split.1)),
                    group: c.heads / c.kv_heads,
                    head_dim: c.dim,
                    rows: (r, c.rows.min(r + split.0)),
                    first_position: c.first,
                    window: c.window,
                    starts: c.segments.then_some(&self.starts),
                    scale: 1.0 / (c.dim as f32).sqrt(),
                    softcap: c.softcap,
                    alibi: c.alibi.then_some(&self.slopes),
                    kv: KvPages {
                        pages: &pages,
                        page_len: c.page_len,
                        k_offset: 0,
                        v_offset: page / 2,
                        head_stride: c.page_len * row,
                        pos_stride: row,
                        dtype: c.dtype,
                    },
                    out: out.as_mut_ptr(),
                    out_stride: c.heads * c.dim,
                    lse: Some(lse.as_mut_ptr()),
                    lse_stride: c.heads,
                };
                // SAFETY: every position up to the last row's is stored; one thread.
                unsafe { attention(isa, &task, &mut scratch) };
            }
        }
        (out, lse)
    }
}

fn plain(dim: usize, heads: usize, kv_heads: usize, rows: usize, first: usize, dtype: DType) -> Case {
    let (window, softcap, alibi, segments, page_len) = (None, None, false, false, 128);
    Case { dim, heads, kv_heads, rows, first, window, softcap, alibi, segments, dtype, page_len }
}

fn check(case: &Case) {
    let problem = Problem::new(case, Isa::detect());
    let (want, want_lse) = problem.reference();
    for isa in Isa::available() {
        for path in PATHS {
            let (out, lse) = problem.run(isa, path, (case.rows, case.heads));
            // Rounded to 16 bits, a score is off by 1.2e-5 of the two vectors' norms, as a standard deviation; here their product
            // over √dim is 2·√dim. Probabilities and values are off by a 4,095th of the largest at most.
            let integers = path == Path::Integer && matches!(isa, Isa::Avx512(_));
            let score = 1e-4 * (case.dim as f64).sqrt();
            // In two parts, a product is off by 2⁻¹⁶ of itself at most, and a score by a part of the norms' product that shrinks with √dim.
            let split = path == Path::Split && isa.name() == "amx";
            let (most, most_lse) = match () {
                () if integers => (5e-4 + score, score),
                () if split => (3e-5, 3e-5),
                () => (3e-6, 4e-6),
            };
            for (i, (g, w)) in out.iter().zip(&want).enumerate() {
                let close = (f64::from(*g) - w).abs() <= most * (1.0 + w.abs());
                assert!(close, "{} {path:?} {case:?} out[{i}]: {g} {w}", isa.name());
            }
            for (i, (g, w)) in lse.iter().zip(&want_lse).enumerate() {
                assert!((f64::from(*g) - w).abs() <= most_lse * (1.0 + w.abs()), "{path:?} {case:?} lse[{i}]: {g} {w}");
            }
        }
    }
}

const PATHS: [Path; 4] = [Path::Stream, Path::Block, Path::Integer, Path::Split];
const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Q8_0];

#[test]
fn agrees_with_f64_over_head_widths_and_types() {
    for dtype in TYPES {
        for dim in [1, 12, 20, 32, 40, 64, 80, 96, 128, 256] {
            if kv_row_bytes(dtype, dim).is_some() {
                check(&plain(dim, 6, 2, 7, 130, dtype));
            }
        }
    }
}

#[test]
fn agrees_with_f64_over_rows_and_lengths() {
    for rows in [1, 2, 3, 5, 8, 33, 70] {
        for first in [0, 1, 63, 64, 127, 200] {
            check(&plain(32, 3, 1, rows, first, DType::F16));
        }
    }
    check(&plain(16, 2, 2, 140, 0, DType::F32));
    for (heads, kv_heads) in [(1, 1), (7, 1), (14, 2), (20, 1), (9, 3)] {
        check(&plain(32, heads, kv_heads, 15, 77, DType::Q8_0));
    }
}

#[test]
fn agrees_with_f64_with_windows_caps_slopes_and_segments() {
    for dtype in TYPES {
        for window in [None, Some(1), Some(17), Some(64), Some(100), Some(1000)] {
            for (softcap, alibi, segments) in [
                (None, false, false),
                (Some(2.0), false, false),
                (Some(50.0), false, true),
                (None, true, false),
                (Some(5.0), true, true),
            ] {
                let base = plain(32, 4, 2, 70, 150, dtype);
                check(&Case { window, softcap, alibi, segments, ..base });
            }
        }
    }
}

#[test]
fn one_page_of_any_length_will_do() {
    check(&Case { page_len: 75, ..plain(64, 3, 3, 75, 0, DType::F32) });
}

/// Split by rows or heads, on either path, a result keeps its bits.
#[test]
fn the_split_into_tasks_does_not_show() {
    for case in [
        plain(64, 9, 3, 50, 100, DType::F16),
        Case { window: Some(40), ..plain(32, 7, 1, 41, 90, DType::Q8_0) },
        Case { softcap: Some(10.0), alibi: true, segments: true, ..plain(40, 4, 4, 64, 3, DType::F32) },
        plain(16, 40, 2, 9, 60, DType::F16),
    ] {
        let problem = Problem::new(&case, Isa::detect());
        for isa in Isa::available() {
            for path in PATHS {
                let whole = problem.run(isa, path, (case.rows, case.heads));
                for split in [(1, 1), (1, case.heads), (7, 2), (16, 5), (case.rows, 1)] {
                    assert!(problem.run(isa, path, split) == whole, "{} {path:?} {split:?} {case:?}", isa.name());
                }
            }
        }
    }
}

#[test]
fn long_scores_do_not_overflow() {
    let mut problem = Problem::new(&plain(32, 1, 1, 4, 300, DType::F32), Isa::Scalar);
    problem.q.iter_mut().for_each(|q| *q *= 300.0);
    let (want, _) = problem.reference();
    for isa in Isa::available() {
        for path in PATHS {
            let (out, lse) = problem.run(isa, path, (4, 1));
            assert!(lse.iter().all(|x| x.is_finite()));
            // Scores of about 1,000 carry an error of 1e-4 each.
            let most = if path == Path::Integer { 5e-2 } else { 5e-3 };
            assert!(out.iter().zip(&want).all(|(g, w)| (f64::from(*g) - w).abs() < most), "{} {path:?}", isa.name());
        }
    }
}

#[test]
fn the_cache_rejects_types_it_cannot_hold() {
    assert_eq!(kv_row_bytes(DType::Q8_0, 64), Some(68));
    assert_eq!(kv_row_bytes(DType::Q8_0, 80), None);
    assert_eq!(kv_row_bytes(DType::F16, 80), Some(160));
    assert_eq!(kv_row_bytes(DType::Q4_0, 64), None);
}
