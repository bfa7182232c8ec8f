//! Sums and inner products for wider registers, by hand: the compiler keeps a tile of them in registers
//! only by luck (a benchmark saw a factor of five).
#![expect(
    unsafe_code,
    reason = "loads and stores of vectors, within bounds that are checked first"
)]

use std::{arch::x86_64::*, ops::Range};

use super::{LANES, scalar};
use crate::{Dtype, blocks::LINE, dtype::BLOCK};

/// The targets of a tile: with two vectors of columns their sums take 12 of the 16 registers of AVX2,
/// with four 24 of the 32 of AVX-512. That is what hides the latency of a multiplication.
const MOST: usize = 6;

/// `super::AddProducts` for the types in `$dtype`, each loaded by `$load` from a row's column `$at`,
/// a place of any alignment, with tiles of `MOST` targets or fewer by `$vectors` vectors of `$lanes`
/// columns, or twice as many. There is no closure in it: one that is not inlined costs a factor of two.
macro_rules! add_products {
    (
        $name:ident, $features:literal, $vectors:literal x $lanes:literal,
        $zero:ident, $sums:ident, $broadcast:ident, $fma:ident, $store:ident, $is_zero:ident,
        $($dtype:ident($row:ident, $at:ident): $load:expr;)*
    ) => {
        #[target_feature(enable = $features)]
        pub(super) fn $name(
            sums: &mut [f32],
            stride: usize,
            dtype: Dtype,
            rows: &[&[u8]],
            weights: &[f32],
            begin: bool,
        ) -> bool {
            match dtype {
                $(Dtype::$dtype => {
                    const V: usize = $vectors;
                    const WIDTH: usize = V * $lanes;
                    const BROAD: usize = 2 * V;

                    /// Targets from `k` to `k + T`, `W` vectors of columns from `at` on; whether
                    /// their sums are finite.
                    ///
                    /// # Safety
                    /// `sums` has a row of `stride` for each target, every row and every row of
                    /// sums has these columns, and `weights` has a number for each target
                    /// and row.
                    #[inline]
                    #[target_feature(enable = $features)]
                    unsafe fn add_tile<const T: usize, const W: usize>(
                        sums: &mut [f32],
                        stride: usize,
                        rows: &[&[u8]],
                        weights: &[f32],
                        begin: bool,
                        (k, at): (usize, usize),
                    ) -> bool {
                        // SAFETY: all places are within what the caller vouches for.
                        unsafe {
                            let sums = sums.as_mut_ptr().add(k * stride + at);
                            let targets = weights.len() / rows.len();
                            let weights = weights.as_ptr().add(k);
                            // The sums of the next columns: those of many targets are more rows
                            // than a processor foresees, and each store would wait for its line.
                            if T > 2 {
                                for t in 0..T {
                                    for line in (0..W * $lanes).step_by(LINE) {
                                        let next = t * stride + W * $lanes + line;
                                        let next = sums.wrapping_add(next).cast();
                                        _mm_prefetch::<_MM_HINT_ET0>(next);
                                    }
                                }
                            }
                            let mut tile = [[$zero(); W]; T];
                            if !begin {
                                for t in 0..T {
                                    for v in 0..W {
                                        tile[t][v] = $sums(sums.add(t * stride + v * $lanes));
                                    }
                                }
                            }
                            for (i, row) in rows.iter().enumerate() {
                                let mut x = [$zero(); W];
                                for v in 0..W {
                                    let ($row, $at) = (row.as_ptr(), at + v * $lanes);
                                    x[v] = $load;
                                }
                                for t in 0..T {
                                    let weight = $broadcast(*weights.add(i * targets + t));
                                    for v in 0..W {
                                        tile[t][v] = $fma(x[v], weight, tile[t][v]);
                                    }
                                }
                            }
                            // Times zero, what is not finite gives NaN, which stays.
                            let mut odd = $zero();
                            for t in 0..T {
                                for v in 0..W {
                                    $store(sums.add(t * stride + v * $lanes), tile[t][v]);
                                    odd = $fma(tile[t][v], $zero(), odd);
                                }
                            }
                            $is_zero(odd)
                        }
                    }

                    let targets = weights.len() / rows.len();
                    let columns = dtype.count(rows[0].len());
                    assert!(rows.iter().all(|row| row.len() == rows[0].len()));
                    assert!(targets > 0 && stride >= columns);
                    let needed = (targets - 1).checked_mul(stride).and_then(|n| n.checked_add(columns));
                    assert!(needed.is_some_and(|needed| sums.len() >= needed));
                    let mut finite = true;
                    // One or two targets keep few registers busy: they take columns for them.
                    let broad = if targets > 2 { 0 } else { columns / (2 * WIDTH) };
                    for tile in 0..broad {
                        let place = (0, tile * 2 * WIDTH);
                        // SAFETY: `columns` has `broad` tiles of twice the width; the lengths
                        // were asserted above.
                        finite &= unsafe {
                            match targets {
                                1 => add_tile::<1, BROAD>(sums, stride, rows, weights, begin, place),
                                _ => add_tile::<2, BROAD>(sums, stride, rows, weights, begin, place),
                            }
                        };
                    }
                    // A tile of the rows stays in the L1 cache while all targets use it.
                    for tile in 2 * broad..columns / WIDTH {
                        let at = tile * WIDTH; // said so that blocks are found without a division
                        let mut k = 0;
                        for left in (1..=targets.div_ceil(MOST)).rev() {
                            // As many in each tile as in the others, by one: a small tile waits
                            // for its own sums.
                            let some = (targets - k).div_ceil(left);
                            let place = (k, at);
                            // SAFETY: `k + some <= targets` and `at + WIDTH <= columns`; the
                            // lengths were asserted above.
                            finite &= unsafe {
                                match some {
                                    1 => add_tile::<1, V>(sums, stride, rows, weights, begin, place),
                                    2 => add_tile::<2, V>(sums, stride, rows, weights, begin, place),
                                    3 => add_tile::<3, V>(sums, stride, rows, weights, begin, place),
                                    4 => add_tile::<4, V>(sums, stride, rows, weights, begin, place),
                                    5 => add_tile::<5, V>(sums, stride, rows, weights, begin, place),
                                    _ => add_tile::<MOST, V>(sums, stride, rows, weights, begin, place),
                                }
                            };
                            k += some;
                        }
                    }
                    let wide = columns - columns % WIDTH;
                    if wide < columns {
                        let rest: Vec<&[u8]> =
                            rows.iter().map(|row| &row[dtype.size(wide)..]).collect();
                        let sums = &mut sums[wide..];
                        finite &=
                            scalar::add_products(sums, stride, dtype, &rest, weights, begin);
                    }
                    finite
                })*
                _ => unreachable!("other types are widened first"),
            }
        }
    };
}

// A block of `Q8_0` has as many columns as two tiles of AVX2, or half as many as one of AVX-512: what
// is left of whole blocks behind the last tile is whole blocks.

add_products!(
    add_products_avx2, "avx2,fma,f16c", 2 x 8,
    _mm256_setzero_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_storeu_ps,
    is_zero_avx2,
    F32(row, at): _mm256_loadu_ps(row.add(4 * at).cast());
    F16(row, at): _mm256_cvtph_ps(_mm_loadu_si128(row.add(2 * at).cast()));
    BF16(row, at): {
        let numbers = _mm256_cvtepu16_epi32(_mm_loadu_si128(row.add(2 * at).cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(numbers))
    };
    Q8_0(row, at): {
        let block = row.add(Dtype::Q8_0.size(at - at % BLOCK));
        let scale = _mm_set1_epi16(block.cast::<i16>().read_unaligned());
        let numbers = _mm_loadl_epi64(block.add(2 + at % BLOCK).cast());
        let numbers = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(numbers));
        _mm256_mul_ps(numbers, _mm256_cvtph_ps(scale))
    };
);

add_products!(
    add_products_avx512, "avx512f,avx512bw", 4 x 16,
    _mm512_setzero_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_storeu_ps,
    is_zero_avx512,
    F32(row, at): _mm512_loadu_ps(row.add(4 * at).cast());
    F16(row, at): _mm512_cvtph_ps(_mm256_loadu_si256(row.add(2 * at).cast()));
    BF16(row, at): {
        let numbers = _mm512_cvtepu16_epi32(_mm256_loadu_si256(row.add(2 * at).cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(numbers))
    };
    Q8_0(row, at): {
        let block = row.add(Dtype::Q8_0.size(at - at % BLOCK));
        let scale = _mm256_set1_epi16(block.cast::<i16>().read_unaligned());
        let numbers = _mm_loadu_si128(block.add(2 + at % BLOCK).cast());
        let numbers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(numbers));
        _mm512_mul_ps(numbers, _mm512_cvtph_ps(scale))
    };
);

#[inline]
#[target_feature(enable = "avx2")]
fn is_zero_avx2(lanes: __m256) -> bool {
    _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(lanes, _mm256_setzero_ps())) == 0xff
}

#[inline]
#[target_feature(enable = "avx512f")]
fn is_zero_avx512(lanes: __m512) -> bool {
    _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(lanes, _mm512_setzero_ps()) == 0xffff
}

/// `super::AddGram`, with tiles of `$side` rows by as many, of `$vectors` vectors of `$lanes` lanes each.
macro_rules! add_gram {
    (
        $name:ident, $features:literal, $side:literal, $vectors:literal x $lanes:literal,
        $zero:ident, $load:ident, $fma:ident, $added:ident
    ) => {
        #[target_feature(enable = $features)]
        pub(super) fn $name(sums: &mut [f64], rows: &[f32], stride: usize, columns: Range<usize>) {
            const _: () = assert!($vectors * $lanes == LANES);
            let n = rows.len() / stride;
            assert!(n % $side == 0 && columns.end <= stride && columns.len() % LANES == 0);
            for (i, j) in scalar::tiles(n, $side) {
                let mut kept = [[[$zero(); $vectors]; $side]; $side];
                // SAFETY: there are rows up to `i + $side` and `j + $side`, of `stride` numbers, and
                // `columns`, in whole vectors, lie within them, as was asserted.
                unsafe {
                    let at = |row: usize| rows.as_ptr().add(row * stride);
                    let (left, right) = (at(i), at(j));
                    for column in columns.clone().step_by(LANES) {
                        for v in 0..$vectors {
                            let column = column + v * $lanes;
                            let mut x = [$zero(); $side];
                            for s in 0..$side {
                                x[s] = $load(right.add(s * stride + column));
                            }
                            for r in 0..$side {
                                let y = $load(left.add(r * stride + column));
                                for s in 0..$side {
                                    kept[r][s][v] = $fma(y, x[s], kept[r][s][v]);
                                }
                            }
                        }
                    }
                }
                for r in 0..$side {
                    for s in 0..$side {
                        sums[(i + r) * n + j + s] += f64::from($added(kept[r][s]));
                    }
                }
            }
        }
    };
}

/// `scalar::added` of the lower and the upper half of the lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn added_avx2([low, high]: [__m256; 2]) -> f32 {
    let eight = _mm256_add_ps(low, high);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// The same of all lanes.
#[inline]
#[target_feature(enable = "avx512f,avx2")]
fn added_avx512([lanes]: [__m512; 1]) -> f32 {
    let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(lanes));
    added_avx2([_mm512_castps512_ps256(lanes), _mm256_castpd_ps(high)])
}

add_gram!(
    add_gram_avx2, "avx2,fma", 2, 2 x 8,
    _mm256_setzero_ps, _mm256_loadu_ps, _mm256_fmadd_ps, added_avx2
);

add_gram!(
    add_gram_avx512, "avx512f", 4, 1 x 16,
    _mm512_setzero_ps, _mm512_loadu_ps, _mm512_fmadd_ps, added_avx512
);
