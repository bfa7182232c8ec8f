//! The element types of the safetensors format, the packed one of GGUF, and those that a LoRA
//! factor may have.

use std::fmt;

use serde::Deserialize;

/// An element type, by its name in a safetensors header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[allow(missing_docs, non_camel_case_types, clippy::upper_case_acronyms)]
pub enum Dtype {
    BOOL,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
    /// Blocks of 32 numbers: a float16 scale, then 32 bytes that it is multiplied with. GGUF only.
    #[serde(skip_deserializing)]
    Q8_0,
}

/// The numbers of a block of `Q8_0`: a run of them begins and ends with a block.
pub(crate) const BLOCK: usize = 32;

impl Dtype {
    /// The size of one element.
    #[inline]
    pub(crate) fn bits(self) -> u64 {
        use Dtype::*;
        match self {
            Q8_0 => unreachable!("not a type of safetensors, whose sizes are counted in bits"),
            F4 => 4,
            F6_E2M3 | F6_E3M2 => 6,
            BOOL | U8 | I8 | F8_E5M2 | F8_E4M3 | F8_E8M0 | F8_E4M3FNUZ | F8_E5M2FNUZ => 8,
            I16 | U16 | F16 | BF16 => 16,
            I32 | U32 | F32 => 32,
            C64 | F64 | I64 | U64 => 64,
        }
    }

    /// The size of `count` elements of a type that can be summed, in bytes; of whole blocks.
    #[inline]
    pub(crate) fn size(self, count: usize) -> usize {
        match self {
            Dtype::Q8_0 => count.div_ceil(BLOCK) * (2 + BLOCK),
            _ => count * (self.bits() as usize / 8),
        }
    }

    /// How many elements `bytes` bytes of a type that can be summed are.
    pub(crate) fn count(self, bytes: usize) -> usize {
        match self {
            Dtype::Q8_0 => bytes / (2 + BLOCK) * BLOCK,
            _ => bytes / (self.bits() as usize / 8),
        }
    }

    /// Whether a LoRA factor of this type can be summed.
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64 | Dtype::Q8_0)
    }

    /// The type a user calls `float32`, `float16`, `bfloat16` or `q8_0`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "float32" => Some(Dtype::F32),
            "float16" => Some(Dtype::F16),
            "bfloat16" => Some(Dtype::BF16),
            "q8_0" => Some(Dtype::Q8_0),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
