//! Numbers out of the types of files and into them: plain loops without a branch or a table, so that
//! a compiler can widen them.

use crate::{Dtype, dtype::BLOCK};

/// See [`super::Widen`].
#[inline(always)]
pub(super) fn widen(dtype: Dtype, bytes: &[u8], numbers: &mut [f32]) {
    match dtype {
        Dtype::F16 => widen_each(bytes, numbers, from_f16),
        Dtype::BF16 => widen_each(bytes, numbers, from_bf16),
        Dtype::F32 => widen_each(bytes, numbers, f32::from_le_bytes),
        Dtype::F64 => widen_each(bytes, numbers, |b| f64::from_le_bytes(b) as f32),
        Dtype::Q8_0 => {
            for (block, numbers) in bytes.as_chunks().0.iter().zip(numbers.chunks_mut(BLOCK)) {
                let (scale, packed) = unpacked(block);
                for (number, &byte) in numbers.iter_mut().zip(packed) {
                    *number = f32::from(byte as i8) * scale;
                }
            }
        }
        _ => unreachable!("`Layout` lets only floats in"),
    }
}

#[inline(always)]
fn widen_each<const N: usize>(bytes: &[u8], numbers: &mut [f32], one: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (number, element) in numbers.iter_mut().zip(elements) {
        *number = one(*element);
    }
}

#[inline(always)]
pub(super) fn from_bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// Without a branch or a table, so that the loop around it can be widened: the exponent moves by
/// a multiplication with a power of two, which is exact and makes subnormal halves normal.
#[inline(always)]
pub(super) fn from_f16(bytes: [u8; 2]) -> f32 {
    const POWER: f32 = f32::from_bits((127 + 112) << 23); // 2^(127 - 15)
    let half = u16::from_le_bytes(bytes);
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * POWER).to_bits();
    let special = magnitude | 0x7f80_0000;
    f32::from_bits(sign | if half & 0x7c00 == 0x7c00 { special } else { finite })
}

/// The scale of a block of `Q8_0`, and the signed bytes that it is multiplied with: products that
/// float32 holds exactly.
#[inline(always)]
pub(super) fn unpacked(block: &[u8; 2 + BLOCK]) -> (f32, &[u8]) {
    let (scale, numbers) = block.split_at(2);
    (from_f16([scale[0], scale[1]]), numbers)
}

/// See [`super::Narrow`].
#[inline(always)]
pub(super) fn narrow(dtype: Dtype, numbers: &[f32], bytes: &mut [u8]) -> bool {
    match dtype {
        Dtype::F16 => narrow_each(numbers, bytes, |x| {
            let half = to_f16(x);
            (half.to_le_bytes(), half & 0x7c00 != 0x7c00)
        }),
        Dtype::BF16 => narrow_each(numbers, bytes, |x| {
            let half = to_bf16(x);
            (half.to_le_bytes(), half & 0x7f80 != 0x7f80)
        }),
        Dtype::F32 => narrow_each(numbers, bytes, |x| (x.to_le_bytes(), x.is_finite())),
        Dtype::Q8_0 => pack(numbers, bytes),
        _ => unreachable!("nothing is written in another type"),
    }
}

#[inline(always)]
fn narrow_each<const N: usize>(
    numbers: &[f32],
    bytes: &mut [u8],
    one: impl Fn(f32) -> ([u8; N], bool),
) -> bool {
    let mut all = true;
    for (place, &number) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(numbers) {
        let (converted, finite) = one(number);
        *place = converted;
        all &= finite;
    }
    all
}

/// Rounded to nearest, ties to even; without a branch, as `from_f16`.
#[inline(always)]
fn to_f16(x: f32) -> u16 {
    const LEAST: u32 = (127 - 14) << 23; // 2^-14, the least normal half
    const INFINITE: u32 = 0x7f80_0000;
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // The exponent moves, and what is cut off carries.
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub(LEAST - (1 << 23)).wrapping_add(0xfff + odd) >> 13;
    // The last place of a half's subnormals is that of 0.5: adding it rounds.
    let small = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < LEAST { small } else { normal.min(0x7c00) };
    let half = if magnitude > INFINITE { 0x7e00 } else { finite };
    ((bits >> 16) & 0x8000 | half) as u16
}

/// Rounded to nearest, ties to even.
#[inline(always)]
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // NaN stays NaN, whatever its last bits.
    (if x.is_nan() { bits | 0x40_0000 } else { rounded } >> 16) as u16
}

/// Blocks of `Q8_0`, as llama.cpp's `quantize_row_q8_0_ref` makes them.
#[inline(always)]
fn pack(numbers: &[f32], bytes: &mut [u8]) -> bool {
    let mut all = true;
    let (blocks, _) = bytes.as_chunks_mut::<{ 2 + BLOCK }>();
    for (place, block) in blocks.iter_mut().zip(numbers.as_chunks::<BLOCK>().0) {
        let mut largest = 0f32;
        for x in block {
            largest = largest.max(x.abs());
            all &= x.is_finite();
        }
        let step = largest / 127.0;
        let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
        let scale = to_f16(step);
        all &= scale & 0x7c00 != 0x7c00;
        let (head, packed) = place.split_at_mut(2);
        head.copy_from_slice(&scale.to_le_bytes());
        for (packed, x) in packed.iter_mut().zip(block) {
            *packed = (x * inverse).round() as i8 as u8;
        }
    }
    all
}
