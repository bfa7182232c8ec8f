//! The definitions: plain loops, written so that a compiler can widen them.

use std::ops::Range;

use super::{
    LANES,
    convert::{from_bf16, from_f16, unpacked},
};
use crate::{Dtype, dtype::BLOCK};

/// See [`super::AddProducts`].
#[inline(always)]
pub(super) fn add_products(
    sums: &mut [f32],
    stride: usize,
    dtype: Dtype,
    rows: &[&[u8]],
    weights: &[f32],
    begin: bool,
) -> bool {
    if begin {
        let (targets, columns) = (weights.len() / rows.len(), dtype.count(rows[0].len()));
        sums.chunks_mut(stride).take(targets).for_each(|row| row[..columns].fill(0.0));
    }
    match dtype {
        Dtype::F16 => add_columns(sums, stride, rows, weights, from_f16),
        Dtype::BF16 => add_columns(sums, stride, rows, weights, from_bf16),
        Dtype::F32 => add_columns(sums, stride, rows, weights, f32::from_le_bytes),
        Dtype::Q8_0 => add_blocks(sums, stride, rows, weights),
        _ => unreachable!("other types are widened first"),
    }
}

/// Columns that are summed at a time, so that their sums stay in registers while the rows go by.
const TILE: usize = 32;

#[inline(always)]
fn add_columns<const N: usize>(
    sums: &mut [f32],
    stride: usize,
    rows: &[&[u8]],
    weights: &[f32],
    number: impl Fn([u8; N]) -> f32,
) -> bool {
    let mut all = true;
    let (targets, columns) = (weights.len() / rows.len(), rows[0].len() / N);
    for k in 0..targets {
        for (t, tile) in sums[k * stride..][..columns].chunks_mut(TILE).enumerate() {
            let mut kept = [0.0; TILE];
            kept[..tile.len()].copy_from_slice(tile);
            for (row, weights) in rows.iter().zip(weights.chunks_exact(targets)) {
                let (numbers, _) = row[t * TILE * N..].as_chunks::<N>();
                for (sum, &bytes) in kept.iter_mut().zip(numbers) {
                    *sum = number(bytes).mul_add(weights[k], *sum);
                }
            }
            all &= finite(&kept);
            tile.copy_from_slice(&kept[..tile.len()]);
        }
    }
    all
}

#[inline(always)]
fn add_blocks(sums: &mut [f32], stride: usize, rows: &[&[u8]], weights: &[f32]) -> bool {
    let mut all = true;
    let (targets, columns) = (weights.len() / rows.len(), Dtype::Q8_0.count(rows[0].len()));
    for k in 0..targets {
        let (tiles, _) = sums[k * stride..][..columns].as_chunks_mut::<BLOCK>();
        for (t, tile) in tiles.iter_mut().enumerate() {
            for (row, weights) in rows.iter().zip(weights.chunks_exact(targets)) {
                let (scale, numbers) = unpacked(&row.as_chunks().0[t]);
                for (sum, &number) in tile.iter_mut().zip(numbers) {
                    *sum = (f32::from(number as i8) * scale).mul_add(weights[k], *sum);
                }
            }
            all &= finite(tile);
        }
    }
    all
}

/// See [`super::AddGram`].
#[inline(always)]
pub(super) fn add_gram(sums: &mut [f64], rows: &[f32], stride: usize, columns: Range<usize>) {
    /// Rows by rows whose sums a processor of 128 bits keeps in its registers.
    const SIDE: usize = 2;
    let n = rows.len() / stride;
    let row = |i: usize| rows[i * stride..][columns.clone()].as_chunks::<LANES>().0;
    for (i, j) in tiles(n, SIDE) {
        let (left, right) = ([row(i), row(i + 1)], [row(j), row(j + 1)]);
        let mut tile = [[[0.0; LANES]; SIDE]; SIDE];
        for at in 0..columns.len() / LANES {
            for (tile, left) in tile.iter_mut().zip(left) {
                for (tile, right) in tile.iter_mut().zip(right) {
                    for lane in 0..LANES {
                        tile[lane] = left[at][lane].mul_add(right[at][lane], tile[lane]);
                    }
                }
            }
        }
        for (row, tile) in tile.iter().enumerate() {
            for (column, lanes) in tile.iter().enumerate() {
                sums[(i + row) * n + j + column] += f64::from(added(*lanes));
            }
        }
    }
}

/// Where the tiles of the lower triangle of n × n begin, the diagonal among them: so that the rows
/// of a tile stay in the L1 cache, and those of 64 columns in the L2 cache, while they are used.
pub(super) fn tiles(n: usize, side: usize) -> impl Iterator<Item = (usize, usize)> {
    const NEAR: usize = 64;
    (0..n).step_by(NEAR).flat_map(move |near| {
        (near..n).step_by(side).flat_map(move |i| {
            (near..n.min(near + NEAR).min(i + side)).step_by(side).map(move |j| (i, j))
        })
    })
}

/// The sum of all lanes, by halves.
#[inline(always)]
fn added(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// Whether all `numbers` are finite: without a branch, so that the loop is widened.
#[inline(always)]
pub(super) fn finite(numbers: &[f32]) -> bool {
    let mut all = true;
    for number in numbers {
        all &= number.is_finite();
    }
    all
}
