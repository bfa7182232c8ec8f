//! Inner products of adapters, from small Gram matrices: ΔW is never formed.

use std::sync::Mutex;

use faer::{Mat, MatRef, Par};

use crate::{
    adapter::Adapter,
    blocks::Options,
    error::{Error, Result},
    joint::{Joint, Reader, Share, each_on_threads, joint_modules},
    layout::Factor,
    terms::Terms,
    watch::Watch,
};

/// ‖B A‖ of each adapter in each module of its layout, by ‖B A‖² = ⟨BᵀB, A Aᵀ⟩: the Frobenius norm
/// of ΔW before its scaling.
///
/// # Errors
/// A file cannot be read; a number is not finite; `watch` said to stop.
pub fn norms(adapters: &[Adapter], options: &Options, watch: &Watch) -> Result<Vec<Vec<f64>>> {
    let all: Vec<&Adapter> = adapters.iter().collect();
    let reader = Reader::open(&all, options.io, options.allow_nan, watch)?;
    let found = Mutex::new(vec![vec![]; all.len()]);
    each_on_threads(all.len(), options.cores(), watch, Vec::new, |bytes, adapter| {
        let layout = &all[adapter].layout;
        let own = layout.modules.iter().enumerate().map(|(module, paired)| {
            let share = Share { adapter, module, rank: paired.rank };
            let a = numbers(&reader, share, Factor::A, bytes)?;
            let b = numbers(&reader, share, Factor::B, bytes)?;
            let a = wide(MatRef::from_row_major_slice(&a, share.rank, a.len() / share.rank));
            let b = wide(MatRef::from_row_major_slice(&b, b.len() / share.rank, share.rank));
            let (a, b) = (product(a.as_ref(), a.transpose()), product(b.transpose(), b.as_ref()));
            let products = a
                .col_iter()
                .zip(b.col_iter())
                .flat_map(|(a, b)| a.iter().zip(b.iter()).map(|(x, y)| x * y));
            Ok(products.sum::<f64>().max(0.0).sqrt())
        });
        let own = own.collect::<Result<Vec<f64>>>()?;
        found.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[adapter] = own;
        Ok(())
    })?;
    reader.still_unchanged()?;
    Ok(found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// The cosine of the angle between the A of every two adapters in one module; NaN where an adapter
/// has no such module, or A of another shape than the first that has it, or one of zeros.
///
/// # Errors
/// As [`norms`].
pub fn cosines(
    adapters: &[Adapter],
    module: &str,
    options: &Options,
    watch: &Watch,
) -> Result<Vec<Vec<f64>>> {
    /// Columns that are compared at a time.
    const PART: usize = 4096;
    let all: Vec<&Adapter> = adapters.iter().collect();
    let reader = Reader::open(&all, options.io, options.allow_nan, watch)?;
    let of = |adapter: usize| {
        let modules = &all[adapter].layout.modules;
        let place = modules.iter().position(|found| found.name == module)?;
        let paired = &modules[place];
        let shape = &all[adapter].layout.tensors[paired.a].shape;
        Some((Share { adapter, module: place, rank: paired.rank }, shape))
    };
    let shape = (0..all.len()).find_map(of).map(|(_, shape)| shape);
    let shares: Vec<Share> = (0..all.len())
        .filter_map(of)
        .filter(|(_, found)| Some(*found) == shape)
        .map(|(share, _)| share)
        .collect();
    let length = shape.map_or(0, |shape| shape.iter().product());
    let mut gram = Mat::<f64>::zeros(shares.len(), shares.len());
    let mut bytes = Vec::new();
    for from in (0..length).step_by(PART) {
        let part = from..length.min(from + PART);
        let mut rows = vec![0.0; shares.len() * part.len()];
        for (share, row) in shares.iter().zip(rows.chunks_exact_mut(part.len())) {
            reader.read(*share, Factor::A, part.clone(), &mut bytes, row)?;
        }
        let rows = MatRef::from_row_major_slice(&rows, shares.len(), part.len());
        gram += wide(product32(rows, rows.transpose()).as_ref());
    }
    let mut cosines = vec![vec![f64::NAN; all.len()]; all.len()];
    for (i, one) in shares.iter().enumerate() {
        for (j, other) in shares.iter().enumerate() {
            let norms = (gram[(i, i)] * gram[(j, j)]).sqrt();
            cosines[one.adapter][other.adapter] = gram[(i, j)] / norms;
        }
    }
    Ok(cosines)
}

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

fn numbers(
    reader: &Reader<'_>,
    share: Share,
    factor: Factor,
    bytes: &mut Vec<u8>,
) -> Result<Vec<f32>> {
    let layout = &reader.adapters[share.adapter].layout;
    let tensor = &layout.tensors[layout.modules[share.module].tensor(factor)];
    let mut numbers = vec![0.0; tensor.len()];
    reader.read(share, factor, 0..tensor.len(), bytes, &mut numbers)?;
    Ok(numbers)
}

fn wide(matrix: MatRef<'_, f32>) -> Mat<f64> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| f64::from(matrix[(i, j)]))
}

fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut c = Mat::zeros(a.nrows(), b.ncols());
    faer::linalg::matmul::matmul(c.as_mut(), faer::Accum::Replace, a, b, 1.0, Par::Seq);
    c
}

fn product32(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Mat<f32> {
    let mut c = Mat::zeros(a.nrows(), b.ncols());
    faer::linalg::matmul::matmul(c.as_mut(), faer::Accum::Replace, a, b, 1.0, Par::Seq);
    c
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, folder};

    fn open(specs: &[Spec]) -> (tempfile::TempDir, Vec<Adapter>) {
        let folder = folder();
        let open = |(i, spec): (usize, &Spec)| {
            Adapter::open(&spec.write(&folder, &i.to_string())).unwrap()
        };
        let adapters = specs.iter().enumerate().map(open).collect();
        (folder, adapters)
    }

    fn matrix(spec: &Spec, tensor: usize) -> Mat<f64> {
        let [rows, columns] = spec.tensors()[tensor].1;
        let numbers = spec.numbers(tensor);
        Mat::from_fn(rows, columns, |i, j| f64::from(numbers[i * columns + j]))
    }

    fn specs() -> Vec<Spec> {
        (0..3).map(|i| Spec { seed: i + 1, ..Spec::default() }).collect()
    }

    #[test]
    fn norms_are_those_of_the_products() {
        let specs = specs();
        let (_folder, adapters) = open(&specs);
        let found = norms(&adapters, &Options::default(), &Watch::default()).unwrap();
        for (spec, found) in specs.iter().zip(found) {
            for (module, found) in found.iter().enumerate() {
                let norm = (matrix(spec, 2 * module + 1) * matrix(spec, 2 * module)).norm_l2();
                assert!((found - norm).abs() <= 1e-6 * norm, "{found} {norm}");
            }
        }
    }

    #[test]
    fn cosines_are_one_for_a_shared_a_and_nan_where_there_is_none_to_compare() {
        let mut specs = specs();
        specs.push(Spec { modules: vec!["v"], ..Spec::default() });
        specs.push(Spec { rank: 3, ..Spec::default() });
        let (_folder, adapters) = open(&specs);
        let found = cosines(&adapters, "q", &Options::default(), &Watch::default()).unwrap();
        let (one, other) = (matrix(&specs[0], 0), matrix(&specs[1], 0));
        let dot: f64 = (one.transpose() * &other).diagonal().column_vector().sum();
        let wanted = dot / one.norm_l2() / other.norm_l2();
        assert!((found[0][0] - 1.0).abs() < 1e-6 && (found[0][1] - wanted).abs() < 1e-6);
        assert!(found[0][3].is_nan() && found[4][4].is_nan());
    }

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
