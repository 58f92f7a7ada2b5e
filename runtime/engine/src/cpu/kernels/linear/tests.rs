//! Every kernel of the table against the decoded weights times the activations as it reads them in f64, over types × widths ×
//! row counts × token counts; that results do not depend on the split; that bad sizes are refused.

#![allow(clippy::single_range_in_vec_init)]

use super::*;
use crate::cpu::measure::sane_scales;
use crate::quant::dequantize;

pub(super) struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Random blocks, every code included; scales are positive or negative, of a size between 2⁻⁷ and 2⁻⁶.
pub(super) fn random_weights(dtype: DType, bytes: usize, random: &mut Random) -> Vec<u8> {
    let mut data: Vec<u8> = (0..bytes).map(|_| (random.next() >> 32) as u8).collect();
    sane_scales(dtype, &mut data);
    data
}

/// Values between rows, which nobody may read or write.
pub(super) const PAD: usize = 3;

/// A map of `rows` × `k` with its weights as f64, and rows of values for either side.
pub(super) struct Case {
    pub dtype: DType,
    pub k: usize,
    pub rows: usize,
    pub tokens: usize,
    pub weight: Vec<u8>,
    pub decoded: Vec<f64>,
    pub x: Vec<f32>,
    pub dy: Vec<f32>,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Case { dtype, k, rows, tokens, .. } = self;
        write!(f, "{dtype} k={k} rows={rows} tokens={tokens}")
    }
}

impl Case {
    pub fn new(dtype: DType, k: usize, rows: usize, tokens: usize) -> Case {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let weight = random_weights(dtype, rows * dtype.row_bytes(k).unwrap(), &mut random);
        let mut decoded = vec![0.0; rows * k];
        dequantize(dtype, &weight, &mut decoded).unwrap();
        let decoded = decoded.into_iter().map(f64::from).collect();
        let mut noise = |n: usize| (0..n).map(|_| random.unit()).collect::<Vec<f32>>();
        let (x, dy) = (noise(tokens * (k + PAD)), noise(tokens * (rows + PAD)));
        Case { dtype, k, rows, tokens, weight, decoded, x, dy }
    }
}

struct Input {
    f32s: Vec<f32>,
    q8: Vec<Line>,
    tiles: Vec<Line>,
    tokens: usize,
    k: usize,
    stride: usize,
}

impl Input {
    fn new(isa: Isa, f32s: Vec<f32>, tokens: usize, k: usize, stride: usize) -> Input {
        let mut q8 = vec![Line([f32::NAN; 16]); activation_bytes(tokens, k).div_ceil(64)];
        // SAFETY: the buffer is large enough and this test's own.
        let dst = unsafe { Q8Mut::new(q8.as_mut_ptr().cast(), tokens, k) };
        if k.is_multiple_of(GROUP) {
            quantize_rows(isa, &f32s, stride, 0..tokens, &dst).unwrap();
        }
        let mut tiles = vec![Line([f32::NAN; 16]); tiled_bytes(tokens, k) / 64];
        // SAFETY: as above.
        let dst = unsafe { TiledMut::new(tiles.as_mut_ptr().cast(), tokens, k) };
        tile_rows(isa, &f32s, stride, 0..tokens, &dst).unwrap();
        Input { f32s, q8, tiles, tokens, k, stride }
    }

    fn random(isa: Isa, tokens: usize, k: usize, random: &mut Random) -> Input {
        let stride = k + 5;
        let mut scale = 1.0;
        let f32s = (0..tokens * stride).map(|i| {
            if i % 32 == 0 {
                scale = 0.1 + random.unit().abs();
            }
            random.unit() * scale
        });
        Input::new(isa, f32s.collect(), tokens, k, stride)
    }

    fn q8(&self) -> Q8<'_> {
        Q8::new(bytemuck::cast_slice(&self.q8), self.tokens, self.k).unwrap()
    }

    fn activations(&self) -> Activations<'_> {
        let q8 = self.k.is_multiple_of(GROUP).then(|| self.q8());
        let tiled = Tiled::new(bytemuck::cast_slice(&self.tiles), self.tokens, self.k).ok();
        Activations {
            f32s: &self.f32s,
            q8,
            tiled,
            wide: None,
            low: None,
            tokens: self.tokens,
            k: self.k,
            stride: self.stride,
        }
    }

    /// What a kernel that reads `form` multiplies with: row `t` as f64.
    fn seen(&self, form: Form, t: usize) -> Vec<f64> {
        let row = &self.f32s[t * self.stride..][..self.k];
        match form {
            Form::Q8 => {}
            Form::Tiled => return row.iter().map(|v| half::bf16::from_f32(*v).to_f64()).collect(),
            Form::F32 | Form::Wide => return row.iter().map(|v| f64::from(*v)).collect(),
        }
        let q8 = self.q8();
        let row = &q8.values()[t * self.k..][..self.k];
        let scales = &q8.scales()[t * q8.layout().groups..];
        row.iter().enumerate().map(|(i, q)| f64::from(*q) * f64::from(scales[i / GROUP])).collect()
    }
}

/// Runs `kernel` for the row ranges given, on an output with a guard value around.
fn run(
    kernel: &KernelInfo,
    isa: Isa,
    weight: &[u8],
    ranges: &[Range<usize>],
    input: &Input,
    stride: usize,
    accumulate: bool,
) -> Vec<f32> {
    let mut y = vec![7.0; input.tokens * stride];
    let x = input.activations();
    let mut scratch = Scratch::new();
    // SAFETY: `y` outlives the calls, which run one after the other.
    let out = unsafe { OutMut::new(y.as_mut_ptr(), stride, y.len()) };
    for rows in ranges {
        let task = LinearTask { dtype: kernel.dtype, weight, k: input.k, rows: rows.clone(), x: &x, out, accumulate };
        kernel.run(isa, &task, &mut scratch).unwrap();
    }
    y
}

fn kernels() -> impl Iterator<Item = (Isa, &'static KernelInfo)> {
    let all = Isa::available();
    all.into_iter()
        .flat_map(|isa| KERNELS.iter().copied().flatten().filter(move |k| k.isa == isa.name()).map(move |k| (isa, k)))
}

/// Compares a kernel's output with f64, within a few roundings of the sum of the terms' sizes, and of the zero points
/// that come and go (the largest weight without one is about 1, a zero point adds a few times a scale of 2⁻⁶).
fn check_exact(isa: Isa, kernel: &KernelInfo, weight: &[u8], rows: usize, input: &Input) {
    let (k, dtype) = (input.k, kernel.dtype);
    let mut decoded = vec![0.0; rows * k];
    dequantize(dtype, weight, &mut decoded).unwrap();
    // AVX-512 gives signed bytes a zero point of 128, of which the roundings remain.
    let shifted = matches!(kernel.isa, "avx512" | "amx") && blocks::form(dtype).is_some_and(|form| form.signed);
    let zero = if shifted { 1e-7 } else { 2e-9 };
    let from = rows / 3;
    let stride = rows + 3;
    let y = run(kernel, isa, weight, &[from..rows], input, stride, false);
    for t in 0..input.tokens {
        let x = input.seen(kernel.reads, t);
        let inputs: f64 = x.iter().map(|x| x.abs()).sum();
        for r in 0..stride {
            let got = y[t * stride + r];
            if r < from || r >= rows {
                assert_eq!(got, 7.0, "{}: wrote row {r}, outside {from}..{rows}", kernel.name);
                continue;
            }
            let w = &decoded[r * k..(r + 1) * k];
            let terms = || w.iter().zip(&x).map(|(w, x)| f64::from(*w) * x);
            let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            // A matrix unit rounds weights, too, by up to 2⁻⁸ of themselves.
            let rounded = if kernel.reads == Form::Tiled { 1.01 * 2f64.powi(-8) * size } else { 0.0 };
            let most = 4e-6 * size + zero * inputs + rounded;
            assert!(
                (f64::from(got) - want).abs() <= most,
                "{} k={k} rows={rows} tokens={} t={t} r={r}: {got}, not {want} ± {most}",
                kernel.name,
                input.tokens
            );
        }
    }
}

#[test]
fn every_kernel_is_exact_on_quantized_activations() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for (isa, kernel) in kernels() {
        let dtype = kernel.dtype;
        let widths: &[usize] = match dtype.block_len() {
            1 => &[1, 7, 8, 31, 64, 257, 1536],
            32 => &[32, 64, 224, 256, 288, 576, 896, 1056, 4864],
            _ => &[256, 512, 768, 1024, 1536, 4864],
        };
        for &k in widths {
            for (rows, tokens) in
                [(1, 1), (3, 2), (8, 3), (17, 4), (37, 5), (16, 6), (33, 7), (9, 8), (50, 9), (35, 33)]
            {
                if k > 2000 && rows * tokens > 200 {
                    continue;
                }
                let weight = random_weights(dtype, rows * dtype.row_bytes(k).unwrap(), &mut random);
                let input = Input::random(isa, tokens, k, &mut random);
                check_exact(isa, kernel, &weight, rows, &input);
            }
        }
    }
}

#[test]
fn more_tokens_than_a_tile_keeps() {
    let mut random = Random(99);
    for (isa, kernel) in kernels() {
        let k = kernel.dtype.block_len().max(32);
        let weight = random_weights(kernel.dtype, 5 * kernel.dtype.row_bytes(k).unwrap(), &mut random);
        check_exact(isa, kernel, &weight, 5, &Input::random(isa, TILE_TOKENS + 3, k, &mut random));
    }
}

/// Sums in several chunks, for all columns in turn or each column's at once, of many tokens and of few, and more tokens than are taken
/// together or stay in a cache.
#[test]
fn chunks_and_blocks_of_tokens_do_not_show() {
    let mut random = Random(31);
    let dtypes = [DType::Q4_1, DType::Q8_0, DType::Q6_K];
    for (isa, kernel) in kernels().filter(|(_, k)| k.shape == Shape::Tile && dtypes.contains(&k.dtype)) {
        for (k, rows, tokens) in
            [(2304, 70, 40), (1536, 35, 700), (512, 33, 1100), (4864, 33, 170), (6400, 35, 7), (12288, 19, 3)]
        {
            let weight = random_weights(kernel.dtype, rows * kernel.dtype.row_bytes(k).unwrap(), &mut random);
            check_exact(isa, kernel, &weight, rows, &Input::random(isa, tokens, k, &mut random));
        }
    }
}

#[test]
fn extreme_codes_do_not_saturate() {
    for (isa, kernel) in kernels().filter(|(_, k)| needs_q8(k.dtype)) {
        let (k, rows) = (1024, 19);
        for code in [0x00, 0xff, 0x80, 0x7f, 0x0f, 0xf0] {
            let mut weight = vec![code; rows * kernel.dtype.row_bytes(k).unwrap()];
            sane_scales(kernel.dtype, &mut weight);
            for tokens in [1, 3, 6] {
                for pattern in [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]] {
                    let x = (0..tokens * k).map(|i| pattern[i % 2]).collect();
                    check_exact(isa, kernel, &weight, rows, &Input::new(isa, x, tokens, k, k));
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_split() {
    let mut random = Random(5);
    for (isa, kernel) in kernels() {
        let (k, rows) = (1024, 53);
        let weight = random_weights(kernel.dtype, rows * kernel.dtype.row_bytes(k).unwrap(), &mut random);
        for tokens in [1, 2, 5, 12] {
            let input = Input::random(isa, tokens, k, &mut random);
            let whole = run(kernel, isa, &weight, &[0..rows], &input, rows, false);
            let parts = run(kernel, isa, &weight, &[0..26, 26..27, 27..53], &input, rows, false);
            assert!(
                whole.iter().zip(&parts).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{} tokens={tokens}",
                kernel.name
            );
        }
    }
}

#[test]
fn processors_of_one_instruction_set_give_the_same_bits() {
    let mut random = Random(17);
    for kernel in KERNELS.iter().copied().flatten() {
        // Rows of whole units, and such with little and much behind them.
        let widths = [768, 576, 896, 1504].into_iter().filter_map(|k| Some((k, kernel.dtype.row_bytes(k)?)));
        for ((k, bytes), tokens) in widths.flat_map(|width| [1, 3, 4, 7].map(|tokens| (width, tokens))) {
            let weight = random_weights(kernel.dtype, 19 * bytes, &mut random);
            let input = Input::random(Isa::Scalar, tokens, k, &mut random);
            let mut first = None;
            // NEON and AVX-512 are there with and without what they may have; the others are there once.
            for isa in Isa::available().into_iter().filter(|isa| isa.name() == kernel.isa) {
                let y = run(kernel, isa, &weight, &[0..19], &input, 19, false);
                let bits: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
                assert_eq!(first.get_or_insert(bits.clone()), &bits, "{} k={k} tokens={tokens} {isa:?}", kernel.name);
            }
        }
    }
}

#[test]
fn accumulate_adds() {
    let mut random = Random(11);
    for (isa, kernel) in kernels() {
        let weight = random_weights(kernel.dtype, 20 * kernel.dtype.row_bytes(256).unwrap(), &mut random);
        for tokens in [1, 6] {
            let input = Input::random(isa, tokens, 256, &mut random);
            let plain = run(kernel, isa, &weight, &[0..20], &input, 20, false);
            let added = run(kernel, isa, &weight, &[0..20], &input, 20, true);
            for (plain, added) in plain.iter().zip(&added) {
                // A matrix unit goes on from what is there.
                let most = if kernel.reads == Form::Tiled { 1e-6 * (7.0 + plain.abs()) } else { 0.0 };
                assert!((7.0 + plain - added).abs() <= most, "{}: 7 + {plain} gave {added}", kernel.name);
            }
        }
    }
}

#[test]
fn unpacking_gives_the_decoded_values() {
    let mut random = Random(21);
    for dtype in DType::WEIGHTS {
        let Some(form) = blocks::form(dtype) else { continue };
        let weight = random_weights(dtype, form.unit_bytes, &mut random);
        let mut decoded = vec![0.0; 256];
        dequantize(dtype, &weight, &mut decoded).unwrap();
        let unit = blocks::unit(dtype, &weight, 8);
        for (i, want) in decoded.iter().enumerate() {
            let q = if form.signed { f32::from(unit.q[i] as i8) } else { f32::from(unit.q[i]) };
            let (d, m) = (unit.d[i / 16], unit.m[i / 16]);
            assert!((d * q + m - want).abs() <= 1e-6 * (d * q).abs(), "{dtype} value {i}: {d}·{q} + {m} is not {want}");
        }
    }
}

#[test]
fn quantization_rounds_to_nearest_and_is_the_same_everywhere() {
    let mut random = Random(77);
    // One call's groups, and more than are taken together.
    let cases = Isa::available().into_iter().flat_map(|isa| [11, 16, 27, 37].map(|groups| (isa, groups)));
    for (isa, groups) in cases {
        let (tokens, k) = (3, 32 * groups);
        let mut input = Input::random(isa, tokens, k, &mut random);
        // Ties, a zero group, a tiny group, the largest finite values.
        input.f32s[..32]
            .copy_from_slice(&std::array::from_fn::<f32, 32, _>(|i| if i == 0 { 127.0 } else { i as f32 - 8.5 }));
        input.f32s[32..64].fill(0.0);
        input.f32s[64..96].fill(1e-38);
        input.f32s[96..128].fill(f32::MAX);
        let f32s = input.f32s.clone();
        let ours = Input::new(isa, f32s.clone(), tokens, k, k + 5);
        let spec = Input::new(Isa::Scalar, f32s, tokens, k, k + 5);
        let (a, b) = (ours.q8(), spec.q8());
        assert_eq!(a.values(), b.values(), "{}", isa.name());
        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same(a.scales(), b.scales()) && same(a.sums(), b.sums()) && same(a.half_sums(), b.half_sums()));
        assert_eq!(a.offsets(), b.offsets());
        assert_eq!(a.values()[..6], [127, -8, -6, -6, -4, -4], "ties go to even");
        assert_eq!((a.scales()[1], a.scales()[2]), (0.0, 0.0));
        assert!(a.scales()[3].is_finite() && a.values()[96] == 127);
        for t in 0..tokens {
            for g in 4..groups {
                let x = &ours.f32s[t * (k + 5) + 32 * g..][..32];
                let (q, d) = (&a.values()[t * k + 32 * g..][..32], a.scales()[t * a.layout().groups + g]);
                assert!(x.iter().zip(q).all(|(x, q)| (x - d * f32::from(*q)).abs() <= d * 0.501));
                let sum: i32 = q.iter().map(|q| i32::from(*q)).sum();
                assert_eq!(a.sums()[t * a.layout().groups + g], d * sum as f32);
            }
            assert!(
                a.scales()[t * a.layout().groups + groups..][..groups.next_multiple_of(8) - groups]
                    .iter()
                    .all(|d| *d == 0.0),
                "padding"
            );
        }
    }
}

#[test]
fn tiles_hold_the_rounded_values_and_zeros_behind_them() {
    let mut random = Random(78);
    for isa in Isa::available() {
        for (tokens, k) in [(1, 32), (16, 64), (19, 70), (33, 1), (5, 31)] {
            let mut input = Input::random(isa, tokens, k, &mut random);
            // Ties, which go to even; beyond the largest; a NaN.
            let odd = [1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8), f32::MAX, f32::NAN, f32::NEG_INFINITY];
            input.f32s.iter_mut().zip(odd.iter().cycle()).step_by(7).for_each(|(x, odd)| *x = *odd);
            let input = Input::new(isa, input.f32s, tokens, k, k + 5);
            let across = k.div_ceil(32);
            let values: &[u16] = bytemuck::cast_slice(&input.tiles);
            for t in 0..tokens {
                for c in 0..32 * across {
                    let got = values[(t / 16 * across + c / 32) * 512 + t % 16 * 32 + c % 32];
                    let x = if c < k { input.f32s[t * (k + 5) + c] } else { 0.0 };
                    let (got, want) = (half::bf16::from_bits(got), half::bf16::from_f32(x));
                    let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                    assert!(same, "{} row {t} value {c}: {x} became {got}", isa.name());
                }
            }
        }
    }
    // SAFETY: never written.
    let nowhere = unsafe { TiledMut::new(std::ptr::null_mut(), 2, 64) };
    for (rows, columns, x) in [(0..3, 0..64, 200), (0..2, 0..64, 100), (0..2, 16..64, 200), (0..2, 0..96, 200)] {
        assert!(tile_columns(Isa::detect(), &vec![0.0; x], 64, rows, columns, &nowhere).is_err());
        assert!(Tiled::new(&[0; 64], 2, 64).is_err());
    }
}

/// What rounding to bfloat16 leaves is multiplied, too: with weights that are whole in bfloat16 little is missing then.
#[test]
fn tiles_and_their_rests_agree_with_f64() {
    let mut random = Random(41);
    for isa in Isa::available().into_iter().filter(|isa| has_tiles(*isa)) {
        for (k, rows, tokens) in [(64, 7, 16), (576, 70, 40), (1536, 33, 19), (2304, 40, 33)] {
            let row_bytes = DType::Q8_0.row_bytes(k).unwrap();
            let mut weight = random_weights(DType::Q8_0, rows * row_bytes, &mut random);
            for block in weight.chunks_exact_mut(34) {
                block[..2].copy_from_slice(&half::f16::from_f32(1.0 / 64.0).to_le_bytes());
            }
            let mut decoded = vec![0.0; rows * k];
            dequantize(DType::Q8_0, &weight, &mut decoded).unwrap();
            let input = Input::random(isa, tokens, k, &mut random);
            let mut rests = vec![Line([f32::NAN; 16]); tiled_bytes(tokens, k) / 64];
            // SAFETY: the buffer is large enough and this test's own.
            let dst = unsafe { TiledMut::new(rests.as_mut_ptr().cast(), tokens, k) };
            tile_rests(isa, &input.f32s, input.stride, 0..tokens, &dst).unwrap();
            let low = Tiled::new(bytemuck::cast_slice(&rests), tokens, k).ok();
            let x = Activations { low, ..input.activations() };
            let mut y = vec![f32::NAN; tokens * rows];
            // SAFETY: `y` outlives the call.
            let out = unsafe { OutMut::new(y.as_mut_ptr(), rows, y.len()) };
            let task =
                LinearTask { dtype: DType::Q8_0, weight: &weight, k, rows: 0..rows, x: &x, out, accumulate: false };
            linear(isa, &task, &mut Scratch::new()).unwrap();
            for (at, got) in y.iter().enumerate() {
                let (t, r) = (at / rows, at % rows);
                let terms = input.f32s[t * input.stride..][..k].iter().zip(&decoded[r * k..]);
                let terms = terms.map(|(x, w)| f64::from(*x) * f64::from(*w));
                let (want, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                assert!(
                    (f64::from(*got) - want).abs() < 1e-5 * size,
                    "{k} × {rows} × {tokens} [{t}, {r}]: {got} {want}"
                );
            }
        }
    }
}

/// The gradient in tiles against f64, over types, shapes, tails and splits.
#[test]
fn the_gradient_in_tiles_agrees_with_f64() {
    for isa in Isa::available().into_iter().filter(|isa| has_tiles(*isa)) {
        for dtype in DType::WEIGHTS {
            let shapes: &[(usize, usize, usize)] = match dtype.block_len() {
                1 => &[(1, 1, 1), (31, 5, 7), (257, 97, 13), (300, 800, 40)],
                32 => &[(32, 3, 1), (96, 97, 6), (288, 401, 19), (1056, 33, 70)],
                _ => &[(256, 3, 1), (512, 401, 19), (1280, 200, 35)],
            };
            for &(k, rows, tokens) in shapes {
                let case = Case::new(dtype, k, rows, tokens);
                let mut tiles = vec![Line([f32::NAN; 16]); tiled_bytes(tokens, rows) / 64];
                // SAFETY: the buffer is large enough and this test's own.
                let dst = unsafe { TiledMut::new(tiles.as_mut_ptr().cast(), tokens, rows) };
                tile_rows(isa, &case.dy, rows + PAD, 0..tokens, &dst).unwrap();
                let dy = Tiled::new(bytemuck::cast_slice(&tiles), tokens, rows).unwrap();
                let backward = |ranges: &[Range<usize>], accumulate| {
                    let mut dx = vec![0.5; tokens * (k + PAD)];
                    // SAFETY: `dx` outlives the calls.
                    let out = unsafe { OutMut::new(dx.as_mut_ptr(), k + PAD, dx.len()) };
                    for columns in ranges {
                        let (weight, columns) = (&case.weight[..], columns.clone());
                        let task = RoundedBackwardTask { dtype, weight, k, columns, dy: &dy, dx: out, accumulate };
                        linear_backward_tiled(isa, &task, &mut Scratch::new()).unwrap();
                    }
                    dx
                };
                let from = if k > 64 { 32 } else { 0 };
                for accumulate in [false, true] {
                    let dx = backward(&[from..k], accumulate);
                    for (at, got) in dx.iter().enumerate() {
                        let (t, c) = (at / (k + PAD), at % (k + PAD));
                        if c < from || c >= k {
                            assert_eq!(*got, 0.5, "{case}: wrote column {c} of {t}");
                            continue;
                        }
                        let start = if accumulate { 0.5 } else { 0.0 };
                        let term = |r: usize| {
                            let dy = half::bf16::from_f32(case.dy[t * (rows + PAD) + r]).to_f64();
                            dy * case.decoded[r * k + c]
                        };
                        let (sum, size) = (0..rows).map(term).fold((start, start), |(s, n), x| (s + x, n + x.abs()));
                        let most = (1.01 * 2f64.powi(-8) + 4e-6) * size + 1e-7;
                        assert!((f64::from(*got) - sum).abs() <= most, "{case} [{t}][{c}]: {got}, not {sum} ± {most}");
                    }
                }
                if k > 64 {
                    let split = backward(&[32..64, 64..k], true);
                    assert!(split == backward(&[32..k], true), "{case}: the split shows");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_visible() {
    let mut random = Random(3);
    for (isa, kernel) in kernels().filter(|(_, k)| needs_q8(k.dtype)) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0xffc0_0001)] {
            let mut x: Vec<f32> = (0..5 * 256).map(|_| random.unit()).collect();
            x[256 + 100] = bad;
            let weight = random_weights(kernel.dtype, 4 * kernel.dtype.row_bytes(256).unwrap(), &mut random);
            let y = run(kernel, isa, &weight, &[0..4], &Input::new(isa, x, 5, 256, 256), 4, false);
            for (i, y) in y.iter().enumerate() {
                // In 8 bits the scale is a NaN; bfloat16 has infinities.
                let visible = if kernel.reads == Form::Tiled { !y.is_finite() } else { y.is_nan() };
                assert_eq!(visible, i / 4 == 1, "{} output {i}: {y}", kernel.name);
            }
        }
    }
}

#[test]
fn arbitrary_weight_bytes_are_safe() {
    let mut random = Random(8);
    for (isa, kernel) in kernels() {
        let bytes = 5 * kernel.dtype.row_bytes(512).unwrap();
        let weight: Vec<u8> = (0..bytes).map(|_| (random.next() >> 32) as u8).collect();
        for tokens in [1, 5] {
            run(kernel, isa, &weight, &[0..5], &Input::random(isa, tokens, 512, &mut random), 5, false);
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let isa = Isa::detect();
    let input = Input::random(isa, 2, 64, &mut Random(1));
    let x = input.activations();
    let weight = vec![0; 4 * DType::Q4_0.row_bytes(64).unwrap()];
    let mut y = vec![0.0; 8];
    // SAFETY: `y` outlives the calls.
    let out = unsafe { OutMut::new(y.as_mut_ptr(), 4, y.len()) };
    let good = LinearTask { dtype: DType::Q4_0, weight: &weight, k: 64, rows: 0..4, x: &x, out, accumulate: false };
    let mut scratch = Scratch::new();
    let mut refused = |task: LinearTask<'_>, word: &str| {
        let message = linear(isa, &task, &mut scratch).expect_err(word).to_string();
        assert!(message.contains(word), "{message}");
    };
    refused(LinearTask { rows: 0..5, ..good.clone() }, "matrix");
    refused(LinearTask { rows: 0..usize::MAX, ..good.clone() }, "matrix");
    refused(LinearTask { k: 48, ..good.clone() }, "multiple of 32");
    refused(LinearTask { k: 32, ..good.clone() }, "activations");
    refused(LinearTask { dtype: DType::I32, ..good.clone() }, "type");
    refused(LinearTask { x: &Activations { q8: None, ..x }, ..good.clone() }, "quantized");
    refused(LinearTask { x: &Activations { tokens: 3, ..x }, ..good.clone() }, "output");
    // SAFETY: as above.
    let short = unsafe { OutMut::new(out.base, 4, 7) };
    refused(LinearTask { out: short, ..good.clone() }, "output");
    linear(isa, &good, &mut scratch).unwrap();
    assert!(Q8::new(&[0; 64], 2, 64).is_err());
    // SAFETY: never written.
    let nowhere = unsafe { Q8Mut::new(std::ptr::null_mut(), 2, 64) };
    assert!(quantize_rows(isa, &[0.0; 100], 64, 0..2, &nowhere).is_err());
}

#[test]
fn the_table_is_complete_and_the_pick_is_in_it() {
    for isa in Isa::available() {
        for dtype in DType::WEIGHTS {
            for tokens in [1, 2, 64] {
                assert_eq!(pick(isa, dtype, tokens).dtype, dtype);
            }
        }
    }
    let names: std::collections::BTreeSet<_> = KERNELS.iter().copied().flatten().map(|k| k.name).collect();
    assert_eq!(names.len(), KERNELS.iter().map(|k| k.len()).sum::<usize>(), "names are unique");
}
