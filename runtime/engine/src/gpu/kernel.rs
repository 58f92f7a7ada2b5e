//! Which kernels there are. A kernel is the text of one WGSL module, put together from the files of `shaders/` and a few
//! constants; its value identifies the pipeline.

use crate::quant::DType;
use crate::tape::Gate;

/// A kernel. See the files of the same names in `shaders/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Embed(DType),
    RmsNorm,
    Gather,
    Gated(Gate),
    /// Matrices of these types times up to `rows` rows, `lanes` invocations of `threads` to a row of the matrix.
    Matvec {
        types: Vec<DType>,
        rows: u32,
        normed: bool,
        gate: Option<Gate>,
        threads: u32,
        lanes: u32,
        /// Whether the lanes are a subgroup.
        subgroup: bool,
        /// Whether the rows are quantized, and normed if they are to be.
        int8: bool,
    },
    /// `X·Wᵀ` with a matrix of the model.
    Matmul(DType),
    /// `X·W` with a matrix of the model.
    MatmulTurned(DType),
    /// `X·Wᵀ` by products of eight bits, from quantized rows.
    MatmulInt8(DType),
    /// Rows for kernels of eight bits.
    Quantize {
        normed: bool,
    },
    /// Either with cooperative matrices, from packed rows.
    Cooperative {
        dtype: DType,
        turned: bool,
        tile: Tile,
    },
    /// Rows for [`Kernel::Cooperative`].
    Pack,
    /// A trained matrix with few rows; turned, with few columns. `fours`: everything can be read by four.
    LoraNarrow {
        turned: bool,
        fours: bool,
    },
    /// A trained matrix with few columns; turned, with few rows.
    LoraWide {
        turned: bool,
        fours: bool,
    },
    /// The length of the gradients.
    GradientNorm,
    /// A step of the optimizer.
    AdamW,
    /// Adds the slices of the gradients up.
    AddSlices,
    /// The gradient of a trained matrix with few columns; turned, with few rows.
    LoraOuter {
        turned: bool,
        fours: bool,
    },
    /// The gradient of a matrix of the model.
    Outer,
    /// Of a vector.
    ColumnSums,
    /// Of rows by token.
    EmbedBackward,
    /// Rows of a trained table by token.
    GatherParams,
    /// Factors of norms.
    InverseRms,
    /// Lengths of rows with an adapter.
    RowNorms(DType),
    /// Learned lengths, with what follows them.
    Rescale,
    Rope {
        kv_type: DType,
    },
    /// Of single rows, with rotation and cache write, in `splits` parts.
    Attention {
        head_dim: u32,
        kv_type: DType,
        splits: u32,
    },
    /// The parts of a head together.
    AttentionMerge {
        head_dim: u32,
        splits: u32,
    },
    /// Of many rows, whose keys and values lie in a cache of some type or are rows of the run.
    AttentionTile {
        rows: AttentionRows,
        cached: Option<DType>,
    },
    /// Moves positions of the cache down and turns their keys back.
    Shift {
        kv_type: DType,
    },
    Softmax {
        gradient: bool,
    },
    /// The largest logits of a chunk of a row; merged, of all its chunks.
    Largest {
        merge: bool,
    },
    Dropout,
    RmsNormBackward,
    GatedBackward(Gate),
    Scatter {
        clear: bool,
    },
    RopeBackward,
    AttentionBackward {
        rows: AttentionRows,
        queries: bool,
    },
}

/// Results of a workgroup with cooperative matrices, and of each of its subgroups of 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    pub rows: u32,
    pub columns: u32,
    pub subgroup_rows: u32,
    pub subgroup_columns: u32,
}

impl Tile {
    /// For little work: many workgroups.
    pub const SMALL: Tile = Tile { rows: 64, columns: 64, subgroup_rows: 32, subgroup_columns: 32 };
    /// For much: operands are read less often.
    pub const LARGE: Tile = Tile { rows: 128, columns: 128, subgroup_rows: 64, subgroup_columns: 32 };

    fn subgroups(self) -> u32 {
        self.rows / self.subgroup_rows * (self.columns / self.subgroup_columns)
    }
}

/// Rows of a workgroup of [`Kernel::AttentionTile`] and [`Kernel::AttentionBackward`]: its own, those it meets at a time, and the
/// elements of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct AttentionRows {
    pub own: u32,
    pub other: u32,
    pub head_dim: u32,
}

impl AttentionRows {
    /// What fits into so many bytes of workgroup memory, with so many tiles of each side.
    pub fn new(head_dim: u32, workgroup_bytes: u32, tiles: u32, (own_share, other_share): (u32, u32)) -> AttentionRows {
        // Scores and paddings take their part.
        let (numbers, most) = if workgroup_bytes >= 32 << 10 { (4_096, 32) } else { (2_048, 16) };
        let rows = |share: u32| (1 << (numbers / tiles * share / 2 / head_dim).max(1).ilog2()).min(most);
        AttentionRows { own: rows(own_share), other: rows(other_share), head_dim }
    }

    fn constants(self) -> String {
        let AttentionRows { own, other, head_dim } = self;
        let per_row = 128 / own;
        format!("const OWN = {own}u; const OTHER = {other}u; const D = {head_dim}u; const PER_ROW = {per_row}u;")
    }
}

impl Kernel {
    /// The module's text.
    pub fn source(&self) -> String {
        let mut text = String::new();
        let mut add = |part: &str| {
            text.push_str(part);
            text.push('\n');
        };
        // These have bindings of their own.
        match self {
            Kernel::GradientNorm => return include_str!("shaders/gradient_norm.wgsl").into(),
            Kernel::AdamW => return include_str!("shaders/adamw.wgsl").into(),
            Kernel::Cooperative { .. } => add("enable f16; enable wgpu_cooperative_matrix;"),
            Kernel::Pack => add("enable f16;"),
            _ => {}
        }
        let four = matches!(
            self,
            Kernel::Matvec { .. }
                | Kernel::Quantize { .. }
                | Kernel::Cooperative { .. }
                | Kernel::AttentionTile { .. }
                | Kernel::AttentionBackward { .. }
                | Kernel::LoraNarrow { fours: true, .. }
                | Kernel::LoraWide { fours: true, .. }
                | Kernel::LoraOuter { fours: true, .. }
        );
        let element = if four { "vec4<f32>" } else { "f32" };
        // Rows of Q8_0 are no multiple of two words.
        let words = match self {
            Kernel::Rope { kv_type: DType::Q8_0 }
            | Kernel::Shift { kv_type: DType::Q8_0 }
            | Kernel::Attention { kv_type: DType::Q8_0, .. }
            | Kernel::AttentionTile { cached: Some(DType::Q8_0), .. } => "u32",
            _ => "vec2<u32>",
        };
        let bindings = include_str!("shaders/bindings.wgsl");
        add(&bindings.replace("ELEMENT", element).replace("PARAM", element).replace("WORDS", words));
        // Rows made ready, as the kernel reads or writes them.
        let packed = match self {
            Kernel::Cooperative { .. } | Kernel::Pack => Some("vec4<f16>"),
            Kernel::MatmulInt8(_) | Kernel::Matvec { int8: true, .. } => Some("vec4<u32>"),
            Kernel::Quantize { .. } => Some("u32"),
            _ => None,
        };
        if let Some(element) = packed {
            add(&format!("@group(0) @binding(8) var<storage, read_write> packed: array<{element}>;"));
        }
        add(&format!("const GROUP = {}u;", if matches!(self, Kernel::Attention { .. }) { 128 } else { 64 }));
        match self {
            Kernel::Embed(dtype) => {
                unpack(&mut add, &[*dtype]);
                add(include_str!("shaders/embed.wgsl"));
            }
            Kernel::RmsNorm => {
                add(include_str!("shaders/reduce.wgsl"));
                add(include_str!("shaders/rms_norm.wgsl"));
            }
            Kernel::Gather => add(include_str!("shaders/gather.wgsl")),
            Kernel::Gated(gate) => {
                gates(&mut add, *gate);
                add(include_str!("shaders/gated.wgsl"));
            }
            Kernel::Matvec { types, rows, normed, gate, threads, lanes, subgroup, int8 } => {
                let products = match int8 {
                    true => {
                        codes(&mut add, types);
                        include_str!("shaders/matvec_int8.wgsl")
                    }
                    false => {
                        unpack(&mut add, types);
                        include_str!("shaders/matvec_single.wgsl")
                    }
                };
                gates(&mut add, gate.unwrap_or(Gate::Silu));
                add(&format!(
                    "const ROWS = {rows}u; const THREADS = {threads}u; const LANES = {lanes}u; const NORMED = {normed}; \
                     const GATED = {};",
                    gate.is_some()
                ));
                add(&include_str!("shaders/matvec.wgsl").replace("/* PRODUCTS */", products));
                add(match subgroup {
                    true => include_str!("shaders/matvec_subgroup.wgsl"),
                    false => include_str!("shaders/matvec_tree.wgsl"),
                });
            }
            Kernel::Matmul(dtype) | Kernel::MatmulTurned(dtype) => {
                unpack(&mut add, &[*dtype]);
                add(include_str!("shaders/matmul.wgsl"));
                add(include_str!("shaders/matmul_input.wgsl"));
                add(include_str!("shaders/matmul_quant.wgsl"));
                add(include_str!("shaders/matmul_store.wgsl"));
                add(match self {
                    Kernel::Matmul(_) => include_str!("shaders/matmul_rows.wgsl"),
                    _ => include_str!("shaders/matmul_turned.wgsl"),
                });
            }
            Kernel::MatmulInt8(dtype) => {
                codes(&mut add, &[*dtype]);
                add(&format!("const HALVES = {};", dtype.scale_group() == Some(16)));
                add(include_str!("shaders/matmul.wgsl"));
                add(include_str!("shaders/matmul_store.wgsl"));
                add(include_str!("shaders/matmul_int8.wgsl"));
            }
            Kernel::Quantize { normed } => {
                add(include_str!("shaders/reduce.wgsl"));
                add(&format!("const NORMED = {normed};"));
                add(include_str!("shaders/quantize.wgsl"));
            }
            Kernel::Cooperative { dtype, turned, tile } => {
                unpack(&mut add, &[*dtype]);
                add(include_str!("shaders/matmul.wgsl"));
                add(&cooperative(*turned, *tile));
            }
            Kernel::Pack => {
                add(include_str!("shaders/reduce.wgsl"));
                add(include_str!("shaders/pack.wgsl"));
            }
            Kernel::LoraNarrow { turned, fours }
            | Kernel::LoraWide { turned, fours }
            | Kernel::LoraOuter { turned, fours } => {
                add(include_str!("shaders/matmul.wgsl"));
                add(&format!("const TURNED = {turned};"));
                if !fours && !matches!(self, Kernel::LoraOuter { .. }) {
                    add(include_str!("shaders/matmul_store.wgsl"));
                }
                if matches!(self, Kernel::LoraNarrow { .. }) {
                    add(include_str!("shaders/lora_narrow_sum.wgsl"));
                }
                add(match (self, fours) {
                    (Kernel::LoraNarrow { .. }, false) => include_str!("shaders/lora_narrow.wgsl"),
                    (Kernel::LoraNarrow { .. }, true) => include_str!("shaders/lora_narrow_fours.wgsl"),
                    (Kernel::LoraWide { .. }, false) => include_str!("shaders/lora_wide.wgsl"),
                    (Kernel::LoraWide { .. }, true) => include_str!("shaders/lora_wide_fours.wgsl"),
                    (_, false) => include_str!("shaders/lora_outer.wgsl"),
                    (_, true) => include_str!("shaders/lora_outer_fours.wgsl"),
                });
            }
            Kernel::GradientNorm | Kernel::AdamW => {}
            Kernel::Outer => {
                add(include_str!("shaders/matmul.wgsl"));
                add(include_str!("shaders/outer.wgsl"));
            }
            Kernel::ColumnSums => add(include_str!("shaders/column_sums.wgsl")),
            Kernel::EmbedBackward => add(include_str!("shaders/embed_backward.wgsl")),
            Kernel::GatherParams => add(include_str!("shaders/gather_params.wgsl")),
            Kernel::InverseRms => {
                add(include_str!("shaders/reduce.wgsl"));
                add(include_str!("shaders/inverse_rms.wgsl"));
            }
            Kernel::RowNorms(dtype) => {
                unpack(&mut add, &[*dtype]);
                add(include_str!("shaders/reduce.wgsl"));
                add(include_str!("shaders/row_norms.wgsl"));
            }
            Kernel::Rescale => add(include_str!("shaders/rescale.wgsl")),
            Kernel::AddSlices => add(include_str!("shaders/add_slices.wgsl")),
            Kernel::Rope { kv_type } => {
                turning(&mut add, *kv_type);
                add(include_str!("shaders/rope.wgsl"));
            }
            Kernel::Shift { kv_type } => {
                turning(&mut add, *kv_type);
                add(include_str!("shaders/shift.wgsl"));
            }
            Kernel::Attention { head_dim, kv_type, splits } => {
                turning(&mut add, *kv_type);
                add(&format!("const D = {head_dim}u; const SPLITS = {splits}u;"));
                add(include_str!("shaders/attention.wgsl"));
            }
            Kernel::AttentionMerge { head_dim, splits } => {
                add(&format!("const D = {head_dim}u; const SPLITS = {splits}u;"));
                add(include_str!("shaders/attention_merge.wgsl"));
            }
            Kernel::AttentionTile { rows, cached } => {
                add(&format!("const CACHED = {}; {}", cached.is_some(), rows.constants()));
                kv(&mut add, cached.unwrap_or(DType::F32));
                add(include_str!("shaders/tile.wgsl"));
                add(include_str!("shaders/attention_tile.wgsl"));
            }
            Kernel::Softmax { gradient } => {
                add(include_str!("shaders/reduce.wgsl"));
                add(&format!("const GRADIENT = {gradient};"));
                add(include_str!("shaders/softmax.wgsl"));
            }
            Kernel::Largest { merge } => {
                add(&format!("const MERGE = {merge};"));
                add(include_str!("shaders/largest.wgsl"));
            }
            Kernel::Dropout => add(include_str!("shaders/dropout.wgsl")),
            Kernel::RmsNormBackward => {
                add(include_str!("shaders/reduce.wgsl"));
                add(include_str!("shaders/rms_norm_backward.wgsl"));
            }
            Kernel::GatedBackward(gate) => {
                gates(&mut add, *gate);
                add(include_str!("shaders/gated_backward.wgsl"));
            }
            Kernel::Scatter { clear } => {
                add(&format!("const CLEAR = {clear};"));
                add(include_str!("shaders/scatter.wgsl"));
            }
            Kernel::RopeBackward => {
                turning(&mut add, DType::F32);
                add(include_str!("shaders/rope_backward.wgsl"));
            }
            Kernel::AttentionBackward { rows, queries } => {
                add(&format!("const QUERIES = {queries}; {}", rows.constants()));
                add(include_str!("shaders/tile.wgsl"));
                add(include_str!("shaders/attention_backward.wgsl"));
            }
        }
        text
    }
}

/// How blocks of a type hold codes of eight bits with a scale, if they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codes {
    /// Without a sign, and small; with an offset.
    Unsigned,
    /// With a sign, and no offset.
    Signed,
}

fn codes_of(dtype: DType) -> Option<Codes> {
    use DType::*;
    match dtype {
        Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q2_K | Q3_K | Q4_K | Q5_K | Q6_K => Some(Codes::Unsigned),
        Q8_0 | Q8_K => Some(Codes::Signed),
        _ => None,
    }
}

/// Whether there are kernels of eight-bit products for a type.
pub(super) fn has_int8(dtype: DType) -> bool {
    codes_of(dtype).is_some()
}

/// The unpacking functions, and `unpack(kind, row, k)` that chooses among `types`.
fn unpack(add: &mut impl FnMut(&str), types: &[DType]) {
    choose(add, types, "unpack", "Unit", |dtype, name| match codes_of(dtype) {
        Some(Codes::Unsigned) => format!("unit(codes_{name}(row, k))"),
        Some(Codes::Signed) => format!("signed_unit(codes_{name}(row, k))"),
        None => format!("unpack_{name}(row, k)"),
    });
}

/// The unpacking functions, `codes(kind, row, k)` that chooses among `types`, and products of codes.
fn codes(add: &mut impl FnMut(&str), types: &[DType]) {
    choose(add, types, "codes", "Codes", |_, name| format!("codes_{name}(row, k)"));
    add(include_str!("shaders/products.wgsl"));
}

/// The function `function` of `kind`, `row` and `k`, which is what `of` says of a type and its name.
fn choose(
    add: &mut impl FnMut(&str),
    types: &[DType],
    function: &str,
    result: &str,
    of: impl Fn(DType, &str) -> String,
) {
    add(include_str!("shaders/unit.wgsl"));
    add(include_str!("shaders/unpack.wgsl"));
    let call = |dtype: &DType| format!("return {};", of(*dtype, &dtype.name().to_lowercase()));
    let body = match types {
        [one] => call(one),
        many => {
            let last = many.len() - 1;
            let cases: String = many
                .iter()
                .enumerate()
                .map(|(i, dtype)| match i {
                    i if i == last => format!("default: {{ {} }} ", call(dtype)),
                    i => format!("case {i}u: {{ {} }} ", call(dtype)),
                })
                .collect();
            format!("switch kind {{ {cases}}}")
        }
    };
    add(&format!("fn {function}(kind: u32, row: u32, k: u32) -> {result} {{ {body} }}"));
}

fn gates(add: &mut impl FnMut(&str), gate: Gate) {
    add(include_str!("shaders/gates.wgsl"));
    let name = match gate {
        Gate::Silu => "silu",
        Gate::GeluTanh => "gelu",
    };
    add(&format!(
        "fn gate(x: f32) -> f32 {{ return {name}(x); }} fn gate_slope(x: f32) -> f32 {{ return {name}_slope(x); }}"
    ));
}

/// The cache, and how rows of its type are read and written.
fn kv(add: &mut impl FnMut(&str), kv_type: DType) {
    add(include_str!("shaders/kv.wgsl"));
    add(match kv_type {
        DType::Q8_0 => include_str!("shaders/kv_q8_0.wgsl"),
        DType::F16 => include_str!("shaders/kv_f16.wgsl"),
        _ => include_str!("shaders/kv_f32.wgsl"),
    });
}

fn turning(add: &mut impl FnMut(&str), kv_type: DType) {
    add(include_str!("shaders/reduce.wgsl"));
    kv(add, kv_type);
    add(include_str!("shaders/turn.wgsl"));
}

/// The kernel of `shaders/cooperative.wgsl` with the products of a subgroup's tile written out: a cooperative matrix is no
/// element of an array.
fn cooperative(turned: bool, tile: Tile) -> String {
    let (down, across) = (tile.subgroup_rows / 16, tile.subgroup_columns / 16);
    let each = |f: &dyn Fn(u32, u32) -> String| -> String {
        (0..down).flat_map(|i| (0..across).map(move |j| (i, j))).map(|(i, j)| f(i, j)).collect()
    };
    let declare = each(&|i, j| format!("var c{i}{j} = coop_mat16x16<f32, C>();\n"));
    let store = each(&|i, j| {
        format!(
            "coopStoreT(c{i}{j}, &results[part * 256u], 16u);\n\
             workgroupBarrier();\n\
             store_tile(part, lane, m0 + {}u, n0 + {}u);\n\
             workgroupBarrier();\n",
            16 * i,
            16 * j
        )
    });
    let mut multiply = String::new();
    for step in 0..2 {
        for i in 0..down {
            multiply += &format!(
                "let a{step}{i} = coopLoadT<coop_mat16x16<f16, A>>(&left[(row + {}u) * LEFT + {}u], LEFT);\n",
                16 * i,
                4 * step
            );
        }
        for j in 0..across {
            multiply += &match turned {
                false => format!(
                    "let b{step}{j} = coopLoad<coop_mat16x16<f16, B>>(&right[(column + {}u) * RIGHT + {}u], RIGHT);\n",
                    16 * j,
                    4 * step
                ),
                true => format!(
                    "let b{step}{j} = coopLoadT<coop_mat16x16<f16, B>>(&right[{}u * RIGHT + column / 4u + {}u], RIGHT);\n",
                    16 * step,
                    4 * j
                ),
            };
        }
        multiply += &each(&|i, j| format!("c{i}{j} = coopMultiplyAdd(a{step}{i}, b{step}{j}, c{i}{j});\n"));
    }
    let Tile { rows, columns, subgroup_rows, subgroup_columns } = tile;
    let constants = format!(
        "const TURNED = {turned}; const ROWS = {rows}u; const COLUMNS = {columns}u; \
         const PART_ROWS = {subgroup_rows}u; const PART_COLUMNS = {subgroup_columns}u; const PARTS = {}u;\n",
        tile.subgroups()
    );
    constants
        + &include_str!("shaders/cooperative.wgsl")
            .replace("/* DECLARE */", &declare)
            .replace("/* MULTIPLY */", &multiply)
            .replace("/* STORE */", &store)
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu::naga;

    /// Kernels that the software drivers of other tests do not run.
    #[test]
    fn kernels_for_other_devices_are_valid() {
        let mut kernels = vec![Kernel::Pack];
        for dtype in DType::WEIGHTS {
            for turned in [false, true] {
                for tile in [Tile::SMALL, Tile::LARGE] {
                    kernels.push(Kernel::Cooperative { dtype, turned, tile });
                }
            }
        }
        let types = vec![DType::Q4_K, DType::Q6_K];
        for int8 in [false, true] {
            kernels.push(Kernel::Matvec {
                types: types.clone(),
                rows: 1,
                normed: !int8,
                gate: None,
                threads: 128,
                lanes: 32,
                subgroup: true,
                int8,
            });
        }
        for kernel in kernels {
            let source = kernel.source();
            let module = naga::front::wgsl::parse_str(&source)
                .unwrap_or_else(|e| panic!("{kernel:?}: {}", e.emit_to_string(&source)));
            let (flags, all) = (naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
            let mut validator = naga::valid::Validator::new(flags, all);
            validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE);
            validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
            if let Err(e) = validator.validate(&module) {
                panic!("{kernel:?}: {}", e.emit_to_string(&source));
            }
        }
    }
}
