//! Inner products of adapters, from small Gram matrices: ΔW is never formed.

mod deltas;
mod matrix;
mod parameters;
mod soup_error;

use std::sync::Mutex;

use faer::{Mat, MatMut, MatRef, Par};

pub use matrix::{Gram, Space};
pub use soup_error::{SoupErrors, soup_errors};

use crate::{
    adapter::Adapter,
    blocks::Options,
    error::Result,
    experts::each_expert,
    joint::{Reader, Share, each_on_threads, joint_modules},
    layout::Factor,
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
    each_on_threads(all.len(), options.cores(), watch, Buffers::default, |buffers, adapter| {
        let mut own = vec![0.0; all[adapter].layout.modules.len()];
        for mut joint in joint_modules(&[all[adapter]])? {
            joint.holders.iter_mut().for_each(|share| share.adapter = adapter);
            let mut square = 0.0;
            each_expert(&reader, &joint, |reader, joint| {
                let share = joint.holders[0];
                let mut a = std::mem::take(&mut buffers.a);
                factor_gram(reader, share, Factor::A, buffers, &mut a)?;
                let mut b = std::mem::take(&mut buffers.b);
                factor_gram(reader, share, Factor::B, buffers, &mut b)?;
                square += a.iter().zip(&b).map(|(x, y)| x * y).sum::<f64>().max(0.0);
                (buffers.a, buffers.b) = (a, b);
                Ok(())
            })?;
            own[joint.holders[0].module] = square.sqrt();
        }
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
        Some((Share { adapter, module: place, rank: paired.rank, expert: None }, shape))
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

fn numbers(
    reader: &Reader<'_>,
    share: Share,
    factor: Factor,
    bytes: &mut Vec<u8>,
) -> Result<Vec<f32>> {
    let layout = &reader.adapters[share.adapter].layout;
    let module = &layout.modules[share.module];
    let experts = share.expert.map_or(1, |_| module.experts);
    let mut numbers = vec![0.0; layout.tensors[module.tensor(factor)].len() / experts];
    reader.read(share, factor, 0..numbers.len(), bytes, &mut numbers)?;
    Ok(numbers)
}

/// What a thread needs for the norms, kept from module to module: a system's allocator does not give
/// back what is asked for and let go a hundred times.
#[derive(Default)]
struct Buffers {
    bytes: Vec<u8>,
    numbers: Vec<f32>,
    wide: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
}

/// Put A Aᵀ or BᵀB into `gram`, in float64, summed over parts of the factor that stay small whatever
/// its rank.
fn factor_gram(
    reader: &Reader<'_>,
    share: Share,
    factor: Factor,
    Buffers { bytes, numbers, wide, .. }: &mut Buffers,
    gram: &mut Vec<f64>,
) -> Result<()> {
    /// Numbers that are taken at a time, unless the rank asks for more.
    const PART: usize = 1 << 16;
    /// Columns of A, or rows of B, that a product needs at least to be worth its call.
    const LEAST: usize = 256;
    let layout = &reader.adapters[share.adapter].layout;
    let rank = share.rank;
    let module = &layout.modules[share.module];
    let length = layout.tensors[module.tensor(factor)].len() / (rank * module.experts);
    gram.clear();
    gram.resize(rank * rank, 0.0);
    let step = LEAST.max(PART / rank);
    for from in (0..length).step_by(step) {
        let part = from..length.min(from + step);
        numbers.clear();
        numbers.resize(rank * part.len(), 0.0);
        match factor {
            // All columns at once lie one behind the other, and are one read.
            Factor::A if part.len() == length => {
                reader.read(share, factor, 0..numbers.len(), bytes, numbers)?;
            }
            Factor::A => {
                for (row, into) in numbers.chunks_exact_mut(part.len()).enumerate() {
                    let place = row * length;
                    reader.read(
                        share,
                        factor,
                        place + part.start..place + part.end,
                        bytes,
                        into,
                    )?;
                }
            }
            Factor::B => {
                let place = part.start * rank..part.end * rank;
                reader.read(share, factor, place, bytes, numbers)?;
            }
        }
        wide.clear();
        wide.extend(numbers.iter().map(|&number| f64::from(number)));
        let rows = match factor {
            Factor::A => MatRef::from_row_major_slice(wide, rank, part.len()),
            Factor::B => MatRef::from_row_major_slice(wide, part.len(), rank).transpose(),
        };
        let into = MatMut::from_row_major_slice_mut(gram, rank, rank);
        faer::linalg::matmul::matmul(into, faer::Accum::Add, rows, rows.transpose(), 1.0, Par::Seq);
    }
    Ok(())
}

fn wide(matrix: MatRef<'_, f32>) -> Mat<f64> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| f64::from(matrix[(i, j)]))
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

    pub(super) fn open(specs: &[Spec]) -> (tempfile::TempDir, Vec<Adapter>) {
        let folder = folder();
        let open = |(i, spec): (usize, &Spec)| {
            Adapter::open(&spec.write(&folder, &i.to_string())).unwrap()
        };
        let adapters = specs.iter().enumerate().map(open).collect();
        (folder, adapters)
    }

    pub(super) fn matrix(spec: &Spec, tensor: usize) -> Mat<f64> {
        let [rows, columns] = spec.tensors()[tensor].1;
        let numbers = spec.numbers(tensor);
        Mat::from_fn(rows, columns, |i, j| f64::from(numbers[i * columns + j]))
    }

    pub(super) fn specs() -> Vec<Spec> {
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
}
