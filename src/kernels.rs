//! The loops over numbers, in the widest form that this machine runs.
//!
//! `scalar` is the definition. The others are the same loops compiled for wider registers, and
//! give the same bits: `mul_add` rounds once on every instruction set, and a column's sum takes
//! its rows in order.
#![expect(unsafe_code, reason = "calling code compiled for a feature that was just detected")]

mod convert;
mod scalar;
mod sparse;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::{ops::Range, sync::OnceLock};

use crate::Dtype;

/// `sums[k · stride + j] += Σ_i weights[i · K + k] · rows[i][j]` for every column j of the rows,
/// K targets by n rows; each column is summed in the order of the rows. Where the sums `begin` with
/// these rows, what was there before counts as zero. The rows are the little-endian bytes of float32,
/// float16, bfloat16 or whole blocks of `Q8_0`, at any alignment. Answers whether all these sums are
/// finite.
pub type AddProducts = fn(
    sums: &mut [f32],
    stride: usize,
    dtype: Dtype,
    rows: &[&[u8]],
    weights: &[f32],
    begin: bool,
) -> bool;

/// The numbers of little-endian `bytes` as float32; float64 is rounded to nearest.
pub type Widen = fn(dtype: Dtype, bytes: &[u8], numbers: &mut [f32]);

/// `numbers` as little-endian bytes of a type that files are written in, rounded to nearest; whole
/// blocks of `Q8_0`. Answers whether all of them are finite in it.
pub(crate) type Narrow = fn(dtype: Dtype, numbers: &[f32], bytes: &mut [u8]) -> bool;

/// `sums[i · n + j] += ⟨rows[i], rows[j]⟩` over `columns` for j ≤ i, of n rows of `stride` numbers;
/// what stands above the diagonal is not to be used. n is a multiple of [`SIDE`], the number of
/// columns one of [`LANES`]. Products are summed in float32, each lane of columns in their order,
/// the lanes by halves; and that sum is added in float64.
pub(crate) type AddGram = fn(sums: &mut [f64], rows: &[f32], stride: usize, columns: Range<usize>);

/// The lanes of [`AddGram`]: a column is in the lane that its place divided by 16 leaves.
pub(crate) const LANES: usize = 16;

/// The rows of a tile of [`AddGram`].
pub(crate) const SIDE: usize = 4;

/// One implementation of the loops.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// The instruction set, as a name for benchmarks and tests.
    pub name: &'static str,
    /// Weighted sums.
    pub add_products: AddProducts,
    /// Inner products of rows.
    pub(crate) add_gram: AddGram,
    /// Conversion on reading.
    pub widen: Widen,
    /// Conversion on writing.
    pub(crate) narrow: Narrow,
    /// Whether all numbers are finite.
    pub(crate) finite: fn(numbers: &[f32]) -> bool,
    /// Loops of the sparse methods.
    pub(crate) sparse: Sparse,
}

type KeepRandom = fn(numbers: &[f32], key: [u32; 2], start: u32, limit: u32, kept: &mut [f32]);
type Elect =
    fn(up: &mut [f32], down: &[f32], totals: &[f64], numbers: [&[u16]; 2], by_number: bool);
type Vote = fn(numbers: &[f32], totals: &mut [f64], up: &mut [u16], down: &mut [u16]);

/// See the loops of the same names in `sparse`.
#[derive(Clone, Copy)]
pub(crate) struct Sparse {
    pub(crate) keep_largest: fn(numbers: &[f32], bits: u32, kept: &mut [f32]),
    pub(crate) count: fn(numbers: &[f32], bits: [u32; 2]) -> [usize; 2],
    pub(crate) collect: fn(numbers: &[f32], low: u32, high: u32, found: &mut Vec<u32>),
    pub(crate) keep_random: KeepRandom,
    pub(crate) vote: Vote,
    pub(crate) add_by_sign: fn(numbers: &[f32], weight: f32, up: &mut [f32], down: &mut [f32]),
    pub(crate) elect: Elect,
}

/// A kernel of the plain loops, compiled for the features that its attribute names: a closure has
/// those of the function around it. `$add_products` and `$add_gram` are written out for each.
macro_rules! kernel {
    ($(#[$features:meta])? $name:ident: $add_products:path, $add_gram:path) => {
        $(#[$features])?
        fn $name() -> Kernel {
            Kernel {
                name: stringify!($name),
                add_products: |sums, stride, dtype, rows, weights, begin| {
                    $add_products(sums, stride, dtype, rows, weights, begin)
                },
                add_gram: |sums, rows, stride, columns| $add_gram(sums, rows, stride, columns),
                widen: |dtype, bytes, numbers| convert::widen(dtype, bytes, numbers),
                narrow: |dtype, numbers, bytes| convert::narrow(dtype, numbers, bytes),
                finite: |numbers| scalar::finite(numbers),
                sparse: Sparse {
                    keep_largest: |numbers, bits, kept| sparse::keep_largest(numbers, bits, kept),
                    count: |numbers, bits| sparse::count(numbers, bits),
                    collect: |numbers, low, high, found| {
                        sparse::collect(numbers, low, high, found);
                    },
                    keep_random: |numbers, key, start, limit, kept| {
                        sparse::keep_random(numbers, key, start, limit, kept);
                    },
                    vote: |numbers, totals, up, down| sparse::vote(numbers, totals, up, down),
                    add_by_sign: |numbers, weight, up, down| {
                        sparse::add_by_sign(numbers, weight, up, down);
                    },
                    elect: |up, down, totals, numbers, by_number| {
                        sparse::elect(up, down, totals, numbers, by_number);
                    },
                },
            }
        }
    };
}

kernel!(scalar: scalar::add_products, scalar::add_gram);
#[cfg(target_arch = "x86_64")]
kernel!(
    #[target_feature(enable = "avx2,fma,f16c")]
    avx2: x86_64::add_products_avx2, x86_64::add_gram_avx2
);
#[cfg(target_arch = "x86_64")]
kernel!(
    #[target_feature(enable = "avx512f,avx512bw")]
    avx512: x86_64::add_products_avx512, x86_64::add_gram_avx512
);

/// Every kernel that this machine runs, narrowest first.
pub fn available() -> Vec<Kernel> {
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
    let mut kernels = vec![scalar()];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            // SAFETY: AVX2, FMA and F16C were just detected.
            kernels.push(unsafe { avx2() });
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: AVX-512 F and BW were just detected; F implies FMA and F16C.
            kernels.push(unsafe { avx512() });
        }
    }
    kernels
}

/// The widest kernel that this machine runs.
pub fn widest() -> Kernel {
    static WIDEST: OnceLock<Kernel> = OnceLock::new();
    *WIDEST.get_or_init(|| available().pop().unwrap_or_else(|| unreachable!("scalar is listed")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::BLOCK,
        testing::{narrowed, numbers},
    };

    const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::Q8_0];

    /// The sums by one plain loop, the columns one after another.
    fn plain(sums: &mut [f32], stride: usize, rows: &[Vec<f32>], weights: &[f32]) {
        let targets = weights.len() / rows.len();
        for k in 0..targets {
            for j in 0..rows[0].len() {
                for (row, weights) in rows.iter().zip(weights.chunks(targets)) {
                    let sum = &mut sums[k * stride + j];
                    *sum = row[j].mul_add(weights[k], *sum);
                }
            }
        }
    }

    /// Numbers as bytes of `dtype` that begin at an odd place, and what they then are.
    fn rounded(dtype: Dtype, numbers: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let bytes = narrowed(dtype, numbers);
        let mut kept = vec![0.0; numbers.len()];
        convert::widen(dtype, &bytes, &mut kept);
        ([&[0], &bytes[..]].concat(), kept)
    }

    #[test]
    fn all_kernels_give_the_bits_of_the_plain_loop() {
        for (kernel, dtype) in
            available().iter().flat_map(|kernel| DTYPES.map(|dtype| (kernel, dtype)))
        {
            for len in (0..70).chain([96, 127, 128, 129, 160, 2048]) {
                if dtype == Dtype::Q8_0 && len % BLOCK != 0 {
                    continue;
                }
                for (targets, members) in
                    [(1, 1), (1, 3), (2, 8), (3, 2), (4, 5), (5, 2), (6, 4), (9, 3), (20, 2)]
                {
                    let (bytes, rows): (Vec<_>, Vec<_>) =
                        (0..members).map(|i| rounded(dtype, &numbers(len, i as u32))).unzip();
                    let bytes: Vec<&[u8]> = bytes.iter().map(|bytes| &bytes[1..]).collect();
                    let weights = numbers(targets * members, 99);
                    let stride = len + 3;
                    let mut got = numbers(targets * stride, 7);
                    let mut expected = got.clone();
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    for begin in [false, true] {
                        if begin {
                            expected.chunks_mut(stride).for_each(|row| row[..len].fill(0.0));
                        }
                        let finite =
                            (kernel.add_products)(&mut got, stride, dtype, &bytes, &weights, begin);
                        assert!(finite, "{}", kernel.name);
                        plain(&mut expected, stride, &rows, &weights);
                        assert_eq!(
                            bits(&got),
                            bits(&expected),
                            "{}, {dtype}: {targets} targets, {members} rows of {len}, {begin}",
                            kernel.name
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn inner_products_have_the_same_bits_on_all_kernels_and_are_right() {
        for (n, width, stride) in
            [(SIDE, 0, 16), (SIDE, LANES, 17), (12, 1024, 1040), (2 * SIDE, 48, 64), (68, 32, 40)]
        {
            let rows = numbers(n * stride, 8);
            let columns = stride - width..stride;
            let of = |kernel: &Kernel| {
                let mut sums = vec![0.25; n * n];
                (kernel.add_gram)(&mut sums, &rows, stride, columns.clone());
                let below = |(at, _): &(usize, &f64)| at % n <= at / n;
                sums.iter().enumerate().filter(below).map(|(_, x)| *x).collect::<Vec<_>>()
            };
            let row = |i: usize| rows[i * stride..][columns.clone()].iter().map(|x| f64::from(*x));
            let wanted = (0..n).flat_map(|i| (0..=i).map(move |j| (i, j)));
            let wanted =
                wanted.map(|(i, j)| 0.25 + row(i).zip(row(j)).map(|(x, y)| x * y).sum::<f64>());
            for (found, wanted) in of(&available()[0]).into_iter().zip(wanted) {
                assert!((found - wanted).abs() <= 1e-5 * width as f64, "{found} {wanted}");
            }
            for kernel in available() {
                assert_eq!(of(&kernel), of(&available()[0]), "{}: {n} by {width}", kernel.name);
            }
        }
    }

    #[test]
    fn sparse_loops_give_the_bits_of_the_plain_loops() {
        for kernel in available() {
            for len in (0..70).chain([127, 2048]) {
                let all = |loops: Sparse| {
                    let mut drawn = numbers(len, 3);
                    drawn.iter_mut().step_by(5).for_each(|x| *x = 0.0);
                    let (mut totals, mut up, mut down) =
                        (vec![0.1; len], vec![1; len], vec![2; len]);
                    (loops.vote)(&drawn, &mut totals, &mut up, &mut down);
                    let (mut plus, mut minus) = (numbers(len, 4), numbers(len, 5));
                    (loops.add_by_sign)(&drawn, 0.3, &mut plus, &mut minus);
                    let (mut random, mut kept) = (vec![9.0; len], vec![9.0; len]);
                    (loops.keep_random)(&drawn, [5, 6], u32::MAX - 9, 3 << 30, &mut random);
                    let counts = (loops.count)(&random, [2f32, 5.0].map(f32::to_bits));
                    (loops.keep_largest)(&random, 2f32.to_bits(), &mut kept);
                    let above = |least: f32| random.iter().filter(|x| x.abs() >= least).count();
                    assert_eq!(counts, [2.0, 5.0].map(above));
                    let mut found = vec![];
                    (loops.collect)(&random, 1, 4f32.to_bits(), &mut found);
                    let inside = |x: &&f32| **x != 0.0 && x.abs() < 4.0;
                    assert_eq!(found.len(), random.iter().filter(inside).count());
                    let elected = [false, true].map(|by_number| {
                        let mut sums = plus.clone();
                        (loops.elect)(&mut sums, &minus, &totals, [&up, &down], by_number);
                        sums
                    });
                    (kept, random, plus, minus, totals, up, down, elected)
                };
                assert_eq!(all(kernel.sparse), all(available()[0].sparse), "{}", kernel.name);
            }
        }
    }

    #[test]
    fn one_number_that_is_not_finite_is_seen_wherever_it_is() {
        for kernel in available() {
            for len in (0..70).chain([127, 2048]) {
                let mut all = numbers(len, 6);
                assert!((kernel.finite)(&all), "{}", kernel.name);
                for at in (0..len).step_by(1 + len / 64) {
                    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][at % 3];
                    let kept = std::mem::replace(&mut all[at], odd);
                    assert!(!(kernel.finite)(&all), "{}: {odd} at {at} of {len}", kernel.name);
                    all[at] = kept;
                }
            }
        }
    }

    #[test]
    fn one_sum_that_is_not_finite_is_told_wherever_it_is() {
        for kernel in available() {
            for (dtype, step) in DTYPES.map(|dtype| (dtype, dtype.size(BLOCK))) {
                let finite = numbers(4 * BLOCK, 3);
                let (rows, targets) = (vec![rounded(dtype, &finite).0; 3], 7);
                for at in 0..4 * targets {
                    // A weight makes one target's sums infinite, in one block of columns.
                    let (target, block) = (at / 4, at % 4);
                    let columns = 1 + block * step..1 + (block + 1) * step;
                    let rows: Vec<&[u8]> = rows.iter().map(|row| &row[columns.clone()]).collect();
                    let mut weights = vec![1.0; rows.len() * targets];
                    let mut sums = vec![0.0; targets * BLOCK];
                    let sum = |sums: &mut [f32], weights: &[f32]| {
                        (kernel.add_products)(sums, BLOCK, dtype, &rows, weights, true)
                    };
                    assert!(sum(&mut sums, &weights));
                    weights[targets + target] = f32::INFINITY;
                    assert!(!sum(&mut sums, &weights), "{} {dtype} {at}", kernel.name);
                }
            }
        }
    }
}
