//! Small dense f32 matrix products, C ← α·op(A)·op(B) (+ C), for one thread: what low-rank adapters are made of
//! (Hu et al. 2021, arXiv:2106.09685), forward and backward.
//!
//! | form | C \[m\]\[n\] | adapters use it for |
//! | --- | --- | --- |
//! | [`gemm_nt`] | Σₚ A\[i\]\[p\]·B\[j\]\[p\] | h = x·Aᵀ and h·Bᵀ |
//! | [`gemm_nn`] | Σₚ A\[i\]\[p\]·B\[p\]\[j\] | e = dy·B and e·A |
//! | [`gemm_tn`] | Σₚ A\[p\]\[i\]·B\[p\]\[j\] | dB = dyᵀ·h and dA = eᵀ·x |
//!
//! Matrices are rows of a slice, `stride` values apart. The vector form cuts C into register tiles: 6 rows × 16
//! columns, or 12 × 8 where a rank of 8 leaves no more columns. B is read where it lies when its rows run along C's
//! columns, and else packed, 16 columns × `DEPTH` at a time, on the stack. The same register tile ([`lanes::slab`])
//! multiplies the unpacked weights of `linear` and the blocks of the attention's backward pass.
//!
//! A result is summed over p in blocks of fixed size, in order; which tile it falls in does not show, so C may be
//! divided by rows or columns over threads at will.

use super::linear::OutMut;
use super::vector::dot_body;
use crate::cpu::isa::Isa;
use crate::{Error, Result};

/// Operands of one product.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// Factor on the product.
    pub alpha: f32,
    /// A: \[m\]\[k\], or \[k\]\[m\] for [`gemm_tn`].
    pub a: &'a [f32],
    /// Values between rows of A.
    pub a_stride: usize,
    /// B: \[k\]\[n\], or \[n\]\[k\] for [`gemm_nt`].
    pub b: &'a [f32],
    /// Values between rows of B.
    pub b_stride: usize,
    /// C \[m\]\[n\].
    pub c: OutMut,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
}

/// C ← α·A·Bᵀ (+ C).
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a matrix does not fit its slice.
pub fn gemm_nt(isa: Isa, g: &Gemm<'_>) -> Result<()> {
    check("nt", g, (g.m, g.k), (g.n, g.k))?;
    run(isa, g, Form::Nt);
    Ok(())
}

/// C ← α·A·B (+ C).
///
/// # Errors
/// As [`gemm_nt`].
pub fn gemm_nn(isa: Isa, g: &Gemm<'_>) -> Result<()> {
    check("nn", g, (g.m, g.k), (g.k, g.n))?;
    run(isa, g, Form::Nn);
    Ok(())
}

/// C ← α·Aᵀ·B (+ C).
///
/// # Errors
/// As [`gemm_nt`].
pub fn gemm_tn(isa: Isa, g: &Gemm<'_>) -> Result<()> {
    check("tn", g, (g.k, g.m), (g.k, g.n))?;
    run(isa, g, Form::Tn);
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Nt,
    Nn,
    Tn,
}

/// Whether `rows` rows of `width` values, `stride` apart, lie within `len` values.
pub(super) fn fits(rows: usize, width: usize, stride: usize, len: usize) -> bool {
    rows == 0 || (rows - 1).checked_mul(stride).and_then(|n| n.checked_add(width)).is_some_and(|n| n <= len)
}

fn check(form: &str, g: &Gemm<'_>, a: (usize, usize), b: (usize, usize)) -> Result<()> {
    let parts = [
        ("A", a, g.a_stride, g.a.len(), 0),
        ("B", b, g.b_stride, g.b.len(), 0),
        ("C", (g.m, g.n), g.c.stride, g.c.len, g.n),
    ];
    for (name, (rows, width), stride, len, least) in parts {
        if !fits(rows, width, stride, len) || (rows > 1 && stride < least) {
            return Err(Error::argument(format!(
                "gemm_{form} {} × {} × {}: {name}, {rows} rows of {width} at stride {stride}, has {len} values",
                g.m, g.n, g.k
            )));
        }
    }
    Ok(())
}

fn run(isa: Isa, g: &Gemm<'_>, form: Form) {
    if g.m == 0 || g.n == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx512(_)) && form == Form::Tn && g.n <= 8 && g.m >= 16 && g.k > 0 {
        return by_columns(g);
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if super::lanes::runs(isa) && g.k > 0 {
        // SAFETY: the token in `isa` proves the instructions; `check` has found everything in bounds.
        unsafe { lanes::gemm(g, form, slab_of(isa)) };
        return;
    }
    let _ = isa;
    scalar(g, form);
}

/// [`gemm_tn`] for a few columns of C, as [`gemm_tn`] of the same with A and B exchanged, which has long rows then: the same sums, in
/// vectors of 16 instead of 8.
#[cfg(target_arch = "x86_64")]
fn by_columns(g: &Gemm<'_>) {
    const ROWS: usize = 128;
    let mut turned = [0.0; 8 * ROWS];
    for i in (0..g.m).step_by(ROWS) {
        let rows = ROWS.min(g.m - i);
        // SAFETY: `check` has found the rows in bounds; the caller of `OutMut::new` vouched for them being ours alone.
        let c = |r: usize, j: usize| unsafe { g.c.base.add((i + r) * g.c.stride + j) };
        for (j, column) in turned.chunks_exact_mut(ROWS).enumerate().take(g.n).filter(|_| g.accumulate) {
            // SAFETY: as above.
            column.iter_mut().enumerate().take(rows).for_each(|(r, value)| *value = unsafe { *c(r, j) });
        }
        // SAFETY: `turned` outlives the product, which alone uses it.
        let out = unsafe { OutMut::new(turned.as_mut_ptr(), ROWS, turned.len()) };
        let (a, b) = (g.b, &g.a[i..]);
        let exchanged = Gemm { m: g.n, n: rows, a, a_stride: g.b_stride, b, b_stride: g.a_stride, c: out, ..*g };
        // SAFETY: the caller has AVX-512; the sizes are those that were checked.
        unsafe { lanes::gemm(&exchanged, Form::Tn, avx512::slab) };
        for (j, column) in turned.chunks_exact(ROWS).enumerate().take(g.n) {
            // SAFETY: as above.
            column.iter().enumerate().take(rows).for_each(|(r, value)| unsafe { *c(r, j) = *value });
        }
    }
}

/// The best kernel for slabs of 16 columns, to be called with the instructions of `isa`, which has lanes.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) fn slab_of(isa: Isa) -> lanes::SlabKernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => avx512::slab,
        _ => lanes::slab::<2>,
    }
}

/// The specification: rows of C, by dot products or by adding up rows of B.
fn scalar(g: &Gemm<'_>, form: Form) {
    for i in 0..g.m {
        // SAFETY: `check` has found the row in bounds; the caller of `OutMut::new` vouched for it being ours alone.
        let c = unsafe { std::slice::from_raw_parts_mut(g.c.base.add(i * g.c.stride), g.n) };
        if !g.accumulate {
            c.fill(0.0);
        }
        match form {
            Form::Nt => {
                let a = &g.a[i * g.a_stride..][..g.k];
                for (j, c) in c.iter_mut().enumerate() {
                    if g.k > 0 {
                        *c += g.alpha * dot_body(a, &g.b[j * g.b_stride..][..g.k]);
                    }
                }
            }
            Form::Nn | Form::Tn => {
                for p in 0..g.k {
                    let a = g.alpha * if form == Form::Nn { g.a[i * g.a_stride + p] } else { g.a[p * g.a_stride + i] };
                    c.iter_mut().zip(&g.b[p * g.b_stride..][..g.n]).for_each(|(c, b)| *c += a * b);
                }
            }
        }
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) mod lanes {
    //! The register tile, and the loops of a whole product around it.
    use super::super::lanes::{fma, load, load_some, splat, store, store_some, transpose, zero};
    use super::{Form, Gemm};
    use std::mem::MaybeUninit;

    /// Terms of a sum that are added before the result goes to C.
    const DEPTH: usize = 256;

    /// The same for [`gemm_tn`](super::gemm_tn), whose A is read across its rows: few enough that they all stay in the first
    /// cache.
    const DEPTH_TN: usize = 64;

    /// Element (i, p) of A at `at[i · row + p · step]`.
    #[derive(Clone, Copy)]
    pub struct Left {
        pub at: *const f32,
        pub row: usize,
        pub step: usize,
    }

    /// Row p of a slab of B: 16 or 8 values at `at[p · row]`.
    #[derive(Clone, Copy)]
    pub struct Slab {
        pub at: *const f32,
        pub row: usize,
    }

    /// Row i of a slab of C: `columns` values at `at[i · row]`, at most 16 or 8. They become α times the sums, added to
    /// what was there if `add`.
    #[derive(Clone, Copy)]
    pub struct Target {
        pub at: *mut f32,
        pub row: usize,
        pub columns: usize,
        pub alpha: f32,
        pub add: bool,
    }

    /// [`slab`], of 16 columns, for some instruction set.
    pub type SlabKernel = unsafe fn(usize, usize, Left, Slab, Target);

    /// C ← α·A·B (+ C) for `rows` rows, `k` terms and one slab of 8·V columns, V being 1 or 2.
    ///
    /// # Safety
    /// All the elements named must be valid: `rows` × `k` of A, `k` full rows of the slab, `rows` × `columns` of C.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    pub unsafe fn slab<const V: usize>(rows: usize, k: usize, a: Left, b: Slab, c: Target) {
        let most = if V == 2 { 6 } else { 12 };
        let tiles = rows.div_ceil(most);
        let mut i = 0;
        for tile in 0..tiles {
            // As equal as can be: eight rows are four and four, so that two adders have enough independent sums.
            let n = (rows - i).div_ceil(tiles - tile);
            // SAFETY: rows i .. i + n of those promised.
            unsafe {
                let a = Left { at: a.at.add(i * a.row), ..a };
                let c = Target { at: c.at.add(i * c.row), ..c };
                match n {
                    1 => one::<1, V>(k, a, b, c),
                    2 => one::<2, V>(k, a, b, c),
                    3 => one::<3, V>(k, a, b, c),
                    4 => one::<4, V>(k, a, b, c),
                    5 => one::<5, V>(k, a, b, c),
                    6 => one::<6, V>(k, a, b, c),
                    _ if V == 2 => {}
                    7 => one::<7, 1>(k, a, b, c),
                    8 => one::<8, 1>(k, a, b, c),
                    9 => one::<9, 1>(k, a, b, c),
                    10 => one::<10, 1>(k, a, b, c),
                    11 => one::<11, 1>(k, a, b, c),
                    _ => one::<12, 1>(k, a, b, c),
                }
            }
            i += n;
        }
    }

    /// One register tile of N rows × 8·V columns.
    ///
    /// # Safety
    /// As for [`slab`], with N rows.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    unsafe fn one<const N: usize, const V: usize>(k: usize, a: Left, b: Slab, c: Target) {
        // SAFETY: the caller's promise; `a` and `b` advance once per term.
        unsafe {
            let mut sums = [[zero(); V]; N];
            // One pointer for three rows: the addresses then need no more registers than there are.
            let mut p: [*const f32; 4] = std::array::from_fn(|i| a.at.wrapping_add(3 * i * a.row));
            let mut q = b.at;
            for _ in 0..k {
                let mut y = [zero(); V];
                for (v, y) in y.iter_mut().enumerate() {
                    *y = load(q.add(8 * v));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = splat(*p[i / 3].add(i % 3 * a.row));
                    for (sum, y) in sums.iter_mut().zip(y) {
                        *sum = fma(x, y, *sum);
                    }
                }
                for p in p.iter_mut().take(N.div_ceil(3)) {
                    *p = p.wrapping_add(a.step);
                }
                q = q.wrapping_add(b.row);
            }
            let alpha = splat(c.alpha);
            for (i, sums) in sums.iter().enumerate() {
                let at = c.at.add(i * c.row);
                for (v, sum) in sums.iter().enumerate() {
                    let columns = c.columns.saturating_sub(8 * v);
                    if columns >= 8 {
                        let at = at.add(8 * v);
                        let old = if c.add { load(at) } else { zero() };
                        store(at, fma(alpha, *sum, old));
                    } else if columns > 0 {
                        let at = at.add(8 * v);
                        let old = if c.add { load_some(at, columns) } else { zero() };
                        store_some(at, columns, fma(alpha, *sum, old));
                    }
                }
            }
        }
    }

    /// Rows of C that are done with one packing of B.
    const BLOCK_ROWS: usize = 192;

    /// Sixteen columns of B, [DEPTH][16]; of what is not written, as columns that C does not have, nothing comes.
    #[repr(align(64))]
    struct Packed(#[expect(dead_code, reason = "written and read by pointer")] [f32; 16 * DEPTH]);

    /// A whole product.
    ///
    /// # Safety
    /// The operands must have been checked.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    pub(super) unsafe fn gemm(g: &Gemm<'_>, form: Form, slab_of_16: SlabKernel) {
        let mut packed = MaybeUninit::uninit();
        let depth = if form == Form::Tn { DEPTH_TN } else { DEPTH };
        let (row, step) = if form == Form::Tn { (1, g.a_stride) } else { (g.a_stride, 1) };
        for p in (0..g.k).step_by(depth) {
            let k = depth.min(g.k - p);
            for i in (0..g.m).step_by(BLOCK_ROWS) {
                let rows = BLOCK_ROWS.min(g.m - i);
                for j in (0..g.n).step_by(16) {
                    let columns = 16.min(g.n - j);
                    // SAFETY: `check` has found rows, columns and terms in bounds of all three matrices.
                    unsafe {
                        let a = Left { at: g.a.as_ptr().add(i * row + p * step), row, step };
                        let b = columns_of(g, form, p..p + k, j..j + columns, &mut packed);
                        let at = g.c.base.add(i * g.c.stride + j);
                        let c = Target { at, row: g.c.stride, columns, alpha: g.alpha, add: g.accumulate || p > 0 };
                        if columns > 8 { slab_of_16(rows, k, a, b, c) } else { slab::<1>(rows, k, a, b, c) }
                    }
                }
            }
        }
    }

    /// Up to 16 columns of B for some terms: where they lie, or packed.
    ///
    /// # Safety
    /// As for [`gemm`]; both ranges within B.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    unsafe fn columns_of(
        g: &Gemm<'_>,
        form: Form,
        terms: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        packed: &mut MaybeUninit<Packed>,
    ) -> Slab {
        let (k, n) = (terms.len(), columns.len());
        let to: *mut f32 = packed.as_mut_ptr().cast();
        // SAFETY: in bounds of B by the contract, and of the pack, which holds DEPTH terms of 16.
        unsafe {
            if form != Form::Nt {
                let from = g.b.as_ptr().add(terms.start * g.b_stride + columns.start);
                if n == 16 || n == 8 {
                    return Slab { at: from, row: g.b_stride };
                }
                for p in 0..k {
                    for j in 0..n {
                        *to.add(16 * p + j) = *from.add(p * g.b_stride + j);
                    }
                }
                return Slab { at: to, row: 16 };
            }
            let from = g.b.as_ptr().add(columns.start * g.b_stride + terms.start);
            let whole = k & !7;
            for j in (0..n).step_by(8) {
                let some = (n - j).min(8);
                for p in (0..whole).step_by(8) {
                    let mut r = [zero(); 8];
                    for (i, r) in r.iter_mut().enumerate() {
                        // Columns past the end repeat the last one; nothing comes of them.
                        *r = load(from.add((j + i.min(some - 1)) * g.b_stride + p));
                    }
                    for (i, r) in transpose(r).into_iter().enumerate() {
                        store(to.add(16 * (p + i) + j), r);
                    }
                }
                for p in whole..k {
                    for i in 0..some {
                        *to.add(16 * p + j + i) = *from.add((j + i) * g.b_stride + p);
                    }
                }
            }
            Slab { at: to, row: 16 }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    //! The register tile for slabs of 16 columns in AVX-512: 12 rows of one vector, summed in the order of the form in lanes.
    use super::lanes::{Left, Slab, Target};
    use std::arch::x86_64::*;

    /// Rows of a register tile: independent sums enough for two units of latency 4 or 5.
    const ROWS: usize = 12;

    /// As [`lanes::slab`](super::lanes::slab) with 16 columns.
    ///
    /// # Safety
    /// As there; the caller has AVX-512 F and BW.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn slab(rows: usize, k: usize, a: Left, b: Slab, c: Target) {
        let tiles = rows.div_ceil(ROWS);
        let mut i = 0;
        for tile in 0..tiles {
            let n = (rows - i).div_ceil(tiles - tile);
            // SAFETY: rows i .. i + n of those promised.
            unsafe {
                let a = Left { at: a.at.add(i * a.row), ..a };
                let c = Target { at: c.at.add(i * c.row), ..c };
                match n {
                    1 => one::<1>(k, a, b, c),
                    2 => one::<2>(k, a, b, c),
                    3 => one::<3>(k, a, b, c),
                    4 => one::<4>(k, a, b, c),
                    5 => one::<5>(k, a, b, c),
                    6 => one::<6>(k, a, b, c),
                    7 => one::<7>(k, a, b, c),
                    8 => one::<8>(k, a, b, c),
                    9 => one::<9>(k, a, b, c),
                    10 => one::<10>(k, a, b, c),
                    11 => one::<11>(k, a, b, c),
                    _ => one::<12>(k, a, b, c),
                }
            }
            i += n;
        }
    }

    /// One register tile of N rows × 16 columns.
    ///
    /// # Safety
    /// As for [`slab`], with N rows.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn one<const N: usize>(k: usize, a: Left, b: Slab, c: Target) {
        // SAFETY: the caller's promise; `a` and `b` advance once per term.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); N];
            // One pointer for three rows, as in lanes.
            let mut p: [*const f32; 4] = std::array::from_fn(|i| a.at.wrapping_add(3 * i * a.row));
            let mut q = b.at;
            for _ in 0..k {
                let y = _mm512_loadu_ps(q);
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_fmadd_ps(_mm512_set1_ps(*p[i / 3].add(i % 3 * a.row)), y, *sum);
                }
                for p in p.iter_mut().take(N.div_ceil(3)) {
                    *p = p.wrapping_add(a.step);
                }
                q = q.wrapping_add(b.row);
            }
            let mask = ((1u32 << c.columns.min(16)) - 1) as __mmask16;
            for (i, sum) in sums.into_iter().enumerate() {
                let at = c.at.wrapping_add(i * c.row);
                let old = if c.add { _mm512_maskz_loadu_ps(mask, at) } else { _mm512_setzero_ps() };
                _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(_mm512_set1_ps(c.alpha), sum, old));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 7919 + (i + 3) * i % 613) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// Everything a test needs: operands with padding between rows, and the product in f64 by its definition.
    struct Case {
        form: Form,
        size: (usize, usize, usize),
        a: Vec<f32>,
        b: Vec<f32>,
        c: Vec<f32>,
        strides: (usize, usize, usize),
    }

    impl Case {
        fn new(form: Form, m: usize, n: usize, k: usize) -> Case {
            let (a, b) = match form {
                Form::Nt => ((m, k), (n, k)),
                Form::Nn => ((m, k), (k, n)),
                Form::Tn => ((k, m), (k, n)),
            };
            let strides = (a.1 + 3, b.1 + 1, n + 2);
            let (a, b, c) = (noise(a.0 * strides.0, 1), noise(b.0 * strides.1, 2), noise(m * strides.2, 3));
            Case { form, size: (m, n, k), a, b, c, strides }
        }

        fn want(&self, i: usize, j: usize) -> (f64, f64) {
            let terms = (0..self.size.2).map(|p| {
                let a = match self.form {
                    Form::Tn => self.a[p * self.strides.0 + i],
                    _ => self.a[i * self.strides.0 + p],
                };
                let b = match self.form {
                    Form::Nt => self.b[j * self.strides.1 + p],
                    _ => self.b[p * self.strides.1 + j],
                };
                f64::from(a) * f64::from(b)
            });
            terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
        }

        /// C, computed in blocks of `split` rows × columns.
        fn run(&self, isa: Isa, alpha: f32, accumulate: bool, split: (usize, usize)) -> Vec<f32> {
            let (m, n, k) = self.size;
            let mut c = self.c.clone();
            for i in (0..m).step_by(split.0) {
                for j in (0..n).step_by(split.1) {
                    let (a_at, b_at) = match self.form {
                        Form::Nt => (i * self.strides.0, j * self.strides.1),
                        Form::Nn => (i * self.strides.0, j),
                        Form::Tn => (i, j),
                    };
                    let at = i * self.strides.2 + j;
                    let len = c.len() - at;
                    let g = Gemm {
                        m: split.0.min(m - i),
                        n: split.1.min(n - j),
                        k,
                        alpha,
                        a: &self.a[a_at.min(self.a.len())..],
                        a_stride: self.strides.0,
                        b: &self.b[b_at.min(self.b.len())..],
                        b_stride: self.strides.1,
                        // SAFETY: the rest of `c`, which outlives the call.
                        c: unsafe { OutMut::new(c.as_mut_ptr().add(at), self.strides.2, len) },
                        accumulate,
                    };
                    match self.form {
                        Form::Nt => gemm_nt(isa, &g),
                        Form::Nn => gemm_nn(isa, &g),
                        Form::Tn => gemm_tn(isa, &g),
                    }
                    .unwrap();
                }
            }
            c
        }
    }

    #[test]
    fn agrees_with_f64_over_forms_and_sizes() {
        let sizes = [
            (1, 1, 1),
            (5, 3, 7),
            (6, 16, 8),
            (7, 17, 9),
            (12, 8, 33),
            (13, 8, 300),
            (8, 33, 65),
            (33, 5, 129),
            (200, 8, 70),
            (50, 16, 600),
            (3, 70, 0),
            (0, 4, 4),
            (4, 0, 4),
            (16, 80, 257),
            (195, 31, 16),
            (40, 256, 40),
        ];
        for isa in Isa::available() {
            for form in [Form::Nt, Form::Nn, Form::Tn] {
                for (m, n, k) in sizes {
                    let case = Case::new(form, m, n, k);
                    for (alpha, accumulate) in [(1.0, false), (-0.75, true), (2.0, false)] {
                        let c = case.run(isa, alpha, accumulate, (m.max(1), n.max(1)));
                        for (at, (got, old)) in c.iter().zip(&case.c).enumerate() {
                            let (i, j) = (at / (n + 2), at % (n + 2));
                            if j >= n {
                                assert_eq!(got, old, "wrote between the rows of C");
                                continue;
                            }
                            let (sum, size) = case.want(i, j);
                            let old = if accumulate { f64::from(*old) } else { 0.0 };
                            let want = f64::from(alpha) * sum + old;
                            let most = 1e-6 * (size + old.abs()) + 1e-7;
                            assert!(
                                (f64::from(*got) - want).abs() <= most,
                                "{form:?} {m} × {n} × {k} {} [{i}][{j}]: {got}, not {want}",
                                isa.name()
                            );
                        }
                    }
                }
            }
        }
    }

    /// Wider vectors sum in the same order.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn avx512_gives_the_bits_of_avx2() {
        use crate::cpu::isa::{Avx2, Avx512};
        let (Some(narrow), Some(broad)) = (Avx2::detect(), Avx512::detect()) else { return };
        for form in [Form::Nt, Form::Nn, Form::Tn] {
            for (m, n, k) in [(1, 16, 5), (50, 33, 300), (7, 90, 8), (195, 31, 70)] {
                let case = Case::new(form, m, n, k);
                let run = |isa| case.run(isa, 0.75, true, (m, n));
                assert!(run(Isa::Avx2(narrow)) == run(Isa::Avx512(broad)), "{form:?} {m} × {n} × {k}");
            }
        }
    }

    /// A division over threads does not show: by rows anywhere, by columns in multiples of 8.
    #[test]
    fn the_split_does_not_show() {
        for isa in Isa::available() {
            for form in [Form::Nt, Form::Nn, Form::Tn] {
                let case = Case::new(form, 61, 72, 300);
                let whole = case.run(isa, 0.5, true, (61, 72));
                for split in [(1, 72), (7, 72), (61, 8), (30, 40)] {
                    assert!(case.run(isa, 0.5, true, split) == whole, "{form:?} {split:?} {}", isa.name());
                }
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let mut c = [0.0; 6];
        // SAFETY: `c` outlives the calls.
        let out = unsafe { OutMut::new(c.as_mut_ptr(), 3, c.len()) };
        let (m, n, k) = (2, 3, 4);
        let good = Gemm {
            m,
            n,
            k,
            alpha: 1.0,
            a: &[1.0; 8],
            a_stride: 4,
            b: &[1.0; 12],
            b_stride: 4,
            c: out,
            accumulate: false,
        };
        gemm_nt(Isa::detect(), &good).unwrap();
        let refused = |g: Gemm<'_>, name: &str| {
            let message = gemm_nt(Isa::detect(), &g).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        };
        refused(Gemm { a: &[1.0; 7], ..good }, "A,");
        refused(Gemm { b_stride: usize::MAX, ..good }, "B,");
        refused(Gemm { m: 3, a: &[1.0; 12], ..good }, "C,");
        // SAFETY: as above.
        refused(Gemm { c: unsafe { OutMut::new(out.base, 2, 6) }, ..good }, "C,");
        assert_eq!(c, [4.0; 6]);
    }
}
