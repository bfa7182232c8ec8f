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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{kernels::available, testing::numbers};

    #[test]
    fn every_half_is_widened_as_the_half_crate_does() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = all.iter().flat_map(|x| x.to_le_bytes()).collect();
        for kernel in available() {
            let mut got = vec![0.0; all.len()];
            let check = |got: &[f32], expected: fn(u16) -> f32| {
                for (&half, &got) in all.iter().zip(got) {
                    let expected = expected(half);
                    let same = got.to_bits() == expected.to_bits();
                    assert!(same || (got.is_nan() && expected.is_nan()), "{half:#06x}: {got}");
                }
            };
            (kernel.widen)(Dtype::F16, &bytes, &mut got);
            check(&got, |half| half::f16::from_bits(half).to_f32());
            (kernel.widen)(Dtype::BF16, &bytes, &mut got);
            check(&got, |half| half::bf16::from_bits(half).to_f32());
        }
    }

    #[test]
    fn packed_blocks_are_a_half_times_signed_bytes() {
        // Every scale that a file may hold, with every byte.
        for (first, kernel) in (0..=u16::MAX).step_by(97).zip(available().iter().cycle()) {
            let scale = half::f16::from_bits(first);
            for bytes in (0..=255u8).collect::<Vec<_>>().chunks(BLOCK) {
                let block = [&[0], &scale.to_le_bytes()[..], bytes].concat();
                let mut got = vec![0.0; BLOCK];
                (kernel.widen)(Dtype::Q8_0, &block[1..], &mut got);
                for (got, &byte) in got.iter().zip(bytes) {
                    let expected = f64::from(scale) * f64::from(byte as i8);
                    let same = f64::from(*got) == expected || (got.is_nan() && expected.is_nan());
                    assert!(same, "{}: {scale} {byte}: {got}", kernel.name);
                }
            }
        }
    }

    #[test]
    fn numbers_are_narrowed_as_the_half_crate_does() {
        // Every half with what lies beside it and half way to its neighbours, and numbers of all sizes.
        let beside = |half: u32, shift: u32| {
            let middle = 1u32 << (shift - 1);
            [0, 1, middle - 1, middle, middle + 1].map(|more| (half << shift) + more)
        };
        let halves = (0..=u16::MAX).flat_map(|half| {
            let f16 = half::f16::from_bits(half).to_f32().to_bits() >> 13;
            [beside(f16, 13), beside(u32::from(half), 16)].concat()
        });
        let all = halves.chain((0..=u32::MAX).step_by(4099));
        let numbers: Vec<f32> = all.map(f32::from_bits).collect();
        for kernel in available() {
            let check = |dtype: Dtype, expected: fn(f32) -> f32| {
                let (mut bytes, mut got) = (vec![0; 2 * numbers.len()], vec![0.0; numbers.len()]);
                assert!(!(kernel.narrow)(dtype, &numbers, &mut bytes));
                (kernel.widen)(dtype, &bytes, &mut got);
                for (x, got) in numbers.iter().zip(got) {
                    let expected = expected(*x);
                    let same = got.to_bits() == expected.to_bits();
                    let bits = x.to_bits();
                    assert!(same || (got.is_nan() && x.is_nan()), "{bits:#x}: {got} {expected}");
                }
            };
            check(Dtype::F16, |x| half::f16::from_f32(x).to_f32());
            check(Dtype::BF16, |x| half::bf16::from_f32(x).to_f32());
        }
    }

    #[test]
    fn the_largest_finite_number_is_told_from_the_next() {
        let cases = [
            (Dtype::F16, 65_519.996, 65_520.0),
            (Dtype::BF16, f32::from_bits(0x7f7f_7fff), f32::from_bits(0x7f7f_8000)),
            (Dtype::Q8_0, 65_519.996 * 127.0, 65_520.5 * 127.0),
            (Dtype::F32, f32::MAX, f32::INFINITY),
        ];
        for ((dtype, most, more), kernel) in
            cases.into_iter().flat_map(|case| available().into_iter().map(move |k| (case, k)))
        {
            for at in 0..2 * BLOCK {
                let mut numbers = [1.0; 2 * BLOCK];
                let mut bytes = vec![0; dtype.size(numbers.len())];
                for (number, finite) in
                    [(most, true), (-most, true), (more, false), (-more, false), (f32::NAN, false)]
                {
                    numbers[at] = number;
                    let told = (kernel.narrow)(dtype, &numbers, &mut bytes);
                    assert_eq!(told, finite, "{} {dtype}: {number} at {at}", kernel.name);
                }
            }
        }
    }

    #[test]
    fn blocks_are_packed_to_the_nearest_step() {
        for kernel in available() {
            for (seed, size) in [(1, 1.0), (2, 1e-4), (3, 3e4), (4, 1e-9), (5, 0.0)] {
                let numbers = numbers(4 * BLOCK, seed).iter().map(|x| x * size).collect::<Vec<_>>();
                let mut bytes = vec![0; Dtype::Q8_0.size(numbers.len())];
                assert!((kernel.narrow)(Dtype::Q8_0, &numbers, &mut bytes), "{}", kernel.name);
                for (block, numbers) in
                    bytes.as_chunks::<{ 2 + BLOCK }>().0.iter().zip(numbers.chunks(BLOCK))
                {
                    let largest = numbers.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                    let step = largest / 127.0;
                    let scale = half::f16::from_f32(step).to_le_bytes();
                    assert_eq!(block[..2], scale, "{}", kernel.name);
                    for (&byte, x) in block[2..].iter().zip(numbers) {
                        let exact = if step == 0.0 { 0.0 } else { f64::from(*x) / f64::from(step) };
                        let error = (f64::from(byte as i8) - exact).abs();
                        assert!(error <= 0.5 + 1e-4, "{}: {byte} {exact}", kernel.name);
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn doubles_are_rounded_and_floats_kept(doubles: Vec<f64>, skip in 0usize..8) {
            // Bytes at any alignment: a tensor may begin anywhere in a file.
            let mut bytes = vec![0; skip];
            bytes.extend(doubles.iter().flat_map(|x| x.to_le_bytes()));
            for kernel in available() {
                let mut got = vec![0.0; doubles.len()];
                (kernel.widen)(Dtype::F64, &bytes[skip..], &mut got);
                for (got, double) in got.iter().zip(&doubles) {
                    prop_assert!(*got == *double as f32 || double.is_nan());
                }
                let floats: Vec<u8> = got.iter().flat_map(|x| x.to_le_bytes()).collect();
                let mut again = vec![0.0; doubles.len()];
                (kernel.widen)(Dtype::F32, &floats, &mut again);
                prop_assert!(got.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
        }
    }
}
