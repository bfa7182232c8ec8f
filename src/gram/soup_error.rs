//! How far a soup is from the exact sum.

use std::sync::Mutex;

use faer::Mat;

use super::{numbers, product32, wide};
use crate::{
    blocks::Options,
    error::{Error, Result},
    joint::{Joint, Reader, each_on_threads, joint_modules},
    layout::Factor,
    terms::Terms,
    watch::Watch,
};

/// How far `soup` is from the exact sum, for each target: ‖(Σ c B s)(Σ c A) − Σ c s B A‖ relative
/// to ‖Σ c s B A‖, over a sample of eight modules, and of each at most 256 rows and columns.
///
/// # Errors
/// The adapters differ in rank, so that there is no soup; otherwise as [`norms`].
pub fn soup_errors(terms: &Terms<'_>, options: &Options, watch: &Watch) -> Result<Vec<f64>> {
    const MODULES: usize = 8;
    let joints = joint_modules(&terms.adapters)?;
    let reader = Reader::open(&terms.adapters, options.io, options.allow_nan, watch)?;
    let taken = joints.len().min(MODULES);
    let sample: Vec<&Joint> = (0..taken).map(|i| &joints[i * joints.len() / taken]).collect();
    let squares = Mutex::new(vec![(0.0, 0.0); terms.targets()]);
    let differ = |joint: &Joint| joint.holders.iter().any(|s| s.rank != joint.module.rank);
    if joints.iter().any(differ) {
        return Err(Error::Setting("the adapters differ in rank".to_owned()));
    }
    each_on_threads(sample.len(), options.cores(), watch, Vec::new, |bytes, index| {
        let found = squares_of(&reader, terms, sample[index], bytes)?;
        let mut squares = squares.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (sum, found) in squares.iter_mut().zip(found) {
            *sum = (sum.0 + found.0, sum.1 + found.1);
        }
        Ok(())
    })?;
    let squares = squares.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let error = |(difference, exact): (f64, f64)| match (difference, exact) {
        (0.0, _) => 0.0,
        _ => (difference / exact).sqrt(),
    };
    Ok(squares.into_iter().map(error).collect())
}

/// The squared norms of soup − exact, and of the exact sum, over a sample of rows and columns.
fn squares_of(
    reader: &Reader<'_>,
    terms: &Terms<'_>,
    joint: &Joint,
    bytes: &mut Vec<u8>,
) -> Result<Vec<(f64, f64)>> {
    const MOST: usize = 256;
    let (rows, columns) = (joint.outer.min(MOST), joint.columns().min(MOST));
    let row = |i: usize| i * joint.outer / rows;
    let column = |j: usize| j * joint.columns() / columns;
    let rank = joint.module.rank;
    let zeros = |_| (Mat::zeros(rank, columns), Mat::zeros(rows, rank), Mat::zeros(rows, columns));
    let mut sums: Vec<(Mat<f32>, Mat<f32>, Mat<f32>)> = (0..terms.targets()).map(zeros).collect();
    for share in &joint.holders {
        let a = numbers(reader, *share, Factor::A, bytes)?;
        let b = numbers(reader, *share, Factor::B, bytes)?;
        let a = Mat::from_fn(rank, columns, |i, j| a[i * joint.columns() + column(j)]);
        let b = Mat::from_fn(rows, rank, |i, j| b[row(i) * rank + j]);
        let exact = product32(b.as_ref(), a.as_ref());
        for (target, (sum_a, sum_b, sum)) in sums.iter_mut().enumerate() {
            let c = terms.coefficient(target, share.adapter, share.module) as f32;
            let s = terms.strength(share.adapter, share.module) as f32;
            *sum_a += faer::Scale(c) * &a;
            *sum_b += faer::Scale(c * s) * &b;
            *sum += faer::Scale(c * s) * &exact;
        }
    }
    let square = |m: Mat<f32>| wide(m.as_ref()).squared_norm_l2();
    Ok(sums
        .into_iter()
        .map(|(a, b, exact)| (square(product32(b.as_ref(), a.as_ref()) - &exact), square(exact)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gram::tests::{matrix, open, specs};

    #[test]
    fn the_error_of_a_soup_is_that_of_its_product() {
        let specs = specs();
        let (_folder, adapters) = open(&specs);
        let c = [0.5, 0.7, -0.1];
        let row: Vec<Vec<f64>> = c.iter().map(|&c| vec![c]).collect();
        let strengths = vec![vec![2.0, 1.0], vec![1.0, 0.5], vec![3.0, 1.0]];
        let alone = vec![vec![1.0], vec![0.0], vec![0.0]];
        let terms = Terms::new(&adapters, &[row, alone], Some(&strengths)).unwrap();
        let found = soup_errors(&terms, &Options::default(), &Watch::default()).unwrap();
        let (mut difference, mut whole) = (0.0, 0.0);
        for module in 0..2 {
            let mut sums = [Mat::zeros(2, 37), Mat::zeros(41, 2), Mat::zeros(41, 37)];
            for ((spec, c), s) in specs.iter().zip(c).zip(&strengths) {
                let (a, b) = (matrix(spec, 2 * module), matrix(spec, 2 * module + 1));
                sums[2] += c * s[module] * &b * &a;
                sums[0] += c * a;
                sums[1] += c * s[module] * b;
            }
            difference += (&sums[1] * &sums[0] - &sums[2]).squared_norm_l2();
            whole += sums[2].squared_norm_l2();
        }
        let wanted = (difference / whole).sqrt();
        assert!((found[0] / wanted - 1.0).abs() < 1e-5, "{found:?} {wanted}");
        assert!(found[1] < 1e-6, "one adapter alone is its own soup: {found:?}");
    }
}
