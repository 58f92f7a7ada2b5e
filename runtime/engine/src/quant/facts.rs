//! Facts about the types that tables, planners and kernels ask for.

use super::DType;

impl DType {
    /// Bits of storage per value, scales included: 4.5 for `Q4_K`.
    pub const fn bits_per_weight(self) -> f32 {
        (self.block_bytes() * 8) as f32 / self.block_len() as f32
    }

    /// Values that share one scale, or `None` for types without scales: 16 or 32, and 256 for `Q8_K`.
    pub const fn scale_group(self) -> Option<usize> {
        use DType::*;
        match self {
            F32 | F16 | BF16 | F64 | I8 | I16 | I32 | I64 => None,
            Q2_K | Q3_K | Q6_K => Some(16),
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4_K | Q5_K | IQ4_NL | IQ4_XS | MXFP4 => Some(32),
            Q8_K => Some(256),
        }
    }

    /// Whether a group has a minimum besides its scale, so that a product with it needs the sum of the activations.
    pub const fn has_minimum(self) -> bool {
        matches!(self, DType::Q4_1 | DType::Q5_1 | DType::Q2_K | DType::Q4_K | DType::Q5_K)
    }

    /// Whether an importance matrix changes how values are quantized to this type.
    pub const fn uses_importance(self) -> bool {
        use DType::*;
        matches!(self, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | IQ4_NL | IQ4_XS)
    }

    /// The number of `general.file_type` for a file whose matrices are mostly of this type (llama.cpp's `llama_ftype`;
    /// K-quants without a mixture are its "small" variants), or `None` when there is no such kind of file.
    pub const fn gguf_file_type(self) -> Option<u32> {
        use DType::*;
        match self {
            F32 => Some(0),
            F16 => Some(1),
            Q4_0 => Some(2),
            Q4_1 => Some(3),
            Q8_0 => Some(7),
            Q5_0 => Some(8),
            Q5_1 => Some(9),
            Q2_K => Some(10),
            Q3_K => Some(11),
            Q4_K => Some(14),
            Q5_K => Some(16),
            Q6_K => Some(18),
            IQ4_NL => Some(25),
            IQ4_XS => Some(30),
            BF16 => Some(32),
            MXFP4 => Some(38),
            Q8_K | I8 | I16 | I32 | I64 | F64 => None,
        }
    }
}
