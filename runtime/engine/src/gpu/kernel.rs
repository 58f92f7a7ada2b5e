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
    },
    /// `X·Wᵀ` with a matrix of the model.
    Matmul(DType),
    /// `X·W` with a matrix of the model.
    MatmulTurned(DType),
    /// `X·Wᵀ` with a trained matrix.
    Params,
    /// `X·W` with a trained matrix.
    ParamsTurned,
    /// `PᵀQ`, added to a gradient.
    Outer,
    Rope {
        half: bool,
    },
    Attention {
        cached: bool,
        fused: bool,
        half: bool,
    },
    Softmax {
        gradient: bool,
    },
    Dropout,
    RmsNormBackward,
    GatedBackward(Gate),
    Scatter {
        clear: bool,
    },
    RopeBackward,
    AttentionBackward {
        delta: bool,
        queries: bool,
    },
}

impl Kernel {
    /// The module's text.
    pub fn source(&self) -> String {
        let mut text = String::new();
        let mut add = |part: &str| {
            text.push_str(part);
            text.push('\n');
        };
        let four = matches!(self, Kernel::Matvec { .. });
        add(&include_str!("shaders/bindings.wgsl").replace("ELEMENT", if four { "vec4<f32>" } else { "f32" }));
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
            Kernel::Matvec { types, rows, normed, gate, threads, lanes } => {
                unpack(&mut add, types);
                gates(&mut add, gate.unwrap_or(Gate::Silu));
                add(&format!(
                    "const ROWS = {rows}u; const THREADS = {threads}u; const LANES = {lanes}u; const NORMED = {normed}; \
                     const GATED = {};",
                    gate.is_some()
                ));
                add(include_str!("shaders/matvec.wgsl"));
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
            Kernel::Params | Kernel::ParamsTurned => {
                add(include_str!("shaders/unit.wgsl"));
                add(include_str!("shaders/matmul.wgsl"));
                add(include_str!("shaders/matmul_input.wgsl"));
                add(include_str!("shaders/matmul_params.wgsl"));
                add(include_str!("shaders/matmul_store.wgsl"));
                add(match self {
                    Kernel::Params => include_str!("shaders/matmul_rows.wgsl"),
                    _ => include_str!("shaders/matmul_turned.wgsl"),
                });
            }
            Kernel::Outer => {
                add(include_str!("shaders/matmul.wgsl"));
                add(include_str!("shaders/matmul_outer.wgsl"));
            }
            Kernel::Rope { half } => {
                turning(&mut add, *half);
                add(include_str!("shaders/rope.wgsl"));
            }
            Kernel::Attention { cached, fused, half } => {
                turning(&mut add, *half);
                add(&format!("const CACHED = {cached}; const FUSED = {fused};"));
                add(include_str!("shaders/attention.wgsl"));
            }
            Kernel::Softmax { gradient } => {
                add(include_str!("shaders/reduce.wgsl"));
                add(&format!("const GRADIENT = {gradient};"));
                add(include_str!("shaders/softmax.wgsl"));
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
                turning(&mut add, false);
                add(include_str!("shaders/rope_backward.wgsl"));
            }
            Kernel::AttentionBackward { delta, queries } => {
                turning(&mut add, false);
                add(&format!("const DELTA = {delta}; const QUERIES = {queries};"));
                add(include_str!("shaders/attention_backward.wgsl"));
            }
        }
        text
    }
}

/// The unpacking functions, and `unpack(kind, row, k)` that chooses among `types`.
fn unpack(add: &mut impl FnMut(&str), types: &[DType]) {
    add(include_str!("shaders/unit.wgsl"));
    add(include_str!("shaders/unpack.wgsl"));
    let call = |dtype: &DType| format!("return unpack_{}(row, k);", dtype.name().to_lowercase());
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
    add(&format!("fn unpack(kind: u32, row: u32, k: u32) -> Unit {{ {body} }}"));
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

fn turning(add: &mut impl FnMut(&str), half: bool) {
    add(&format!("const KV_HALF = {half};"));
    add(include_str!("shaders/reduce.wgsl"));
    add(include_str!("shaders/kv.wgsl"));
    add(include_str!("shaders/turn.wgsl"));
}
