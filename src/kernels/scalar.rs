//! The definitions: plain loops, written so that a compiler can widen them.

use crate::Dtype;

/// See [`super::AddProducts`]; `T` targets and `J` columns are summed at a time, so that
/// their sums stay in registers while the rows go by.
#[inline(always)]
pub(super) fn add_products<const T: usize, const J: usize>(
    sums: &mut [f32],
    stride: usize,
    rows: &[&[f32]],
    weights: &[f32],
) {
    let targets = weights.len() / rows.len();
    let mut done = 0;
    while done < targets {
        let sums = &mut sums[done * stride..];
        let weights = &weights[done * rows.len()..];
        done += if targets - done >= T {
            add_columns::<T, J>(sums, stride, rows, weights);
            T
        } else {
            add_columns::<1, J>(sums, stride, rows, weights);
            1
        };
    }
}

/// The first `T` targets.
#[inline(always)]
fn add_columns<const T: usize, const J: usize>(
    sums: &mut [f32],
    stride: usize,
    rows: &[&[f32]],
    weights: &[f32],
) {
    let columns = rows[0].len();
    let wide = columns - columns % J;
    for at in (0..wide).step_by(J) {
        add_tile::<T, J>(sums, stride, rows, weights, at);
    }
    for at in wide..columns {
        add_tile::<T, 1>(sums, stride, rows, weights, at);
    }
}

/// The first `T` targets, `J` columns from column `at` on.
#[inline(always)]
fn add_tile<const T: usize, const J: usize>(
    sums: &mut [f32],
    stride: usize,
    rows: &[&[f32]],
    weights: &[f32],
    at: usize,
) {
    let mut tile = [[0.0; J]; T];
    for (k, tile) in tile.iter_mut().enumerate() {
        tile.copy_from_slice(&sums[k * stride + at..][..J]);
    }
    for (i, row) in rows.iter().enumerate() {
        let row = &row[at..at + J];
        for (k, tile) in tile.iter_mut().enumerate() {
            let weight = weights[k * rows.len() + i];
            for (sum, x) in tile.iter_mut().zip(row) {
                *sum = x.mul_add(weight, *sum);
            }
        }
    }
    for (k, tile) in tile.iter().enumerate() {
        sums[k * stride + at..][..J].copy_from_slice(tile);
    }
}

/// See [`super::Widen`].
#[inline(always)]
pub(super) fn widen(dtype: Dtype, bytes: &[u8], numbers: &mut [f32]) {
    match dtype {
        Dtype::F16 => convert(bytes, numbers, |b| widen_f16(u16::from_le_bytes(b))),
        Dtype::BF16 => {
            convert(bytes, numbers, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
        }
        Dtype::F32 => convert(bytes, numbers, f32::from_le_bytes),
        Dtype::F64 => convert(bytes, numbers, |b| f64::from_le_bytes(b) as f32),
        _ => unreachable!("`Layout` lets only floats in"),
    }
}

#[inline(always)]
fn convert<const N: usize>(bytes: &[u8], numbers: &mut [f32], one: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (number, element) in numbers.iter_mut().zip(elements) {
        *number = one(*element);
    }
}

/// Without a branch or a table, so that the loop around it can be widened: the exponent moves by
/// a multiplication with a power of two, which is exact and makes subnormal halves normal.
#[inline(always)]
fn widen_f16(half: u16) -> f32 {
    const POWER: f32 = f32::from_bits((127 + 112) << 23); // 2^(127 - 15)
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * POWER).to_bits();
    let special = magnitude | 0x7f80_0000;
    f32::from_bits(sign | if half & 0x7c00 == 0x7c00 { special } else { finite })
}
