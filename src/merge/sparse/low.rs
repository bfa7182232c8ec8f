//! The best approximation of a dense matrix of a given rank.

use faer::{Accum, Mat, MatMut, MatRef, Par, linalg::matmul::matmul};

use super::masks::mixed;
use crate::{
    error::{Error, Result},
    merge::svd::dense::{decompose, orthonormal, product},
};

/// Up to this number of rows or columns a matrix is decomposed as it is.
const EXACT: usize = 512;

/// Columns of a block beside the rank, and how many blocks a Krylov space has at most.
const OVERSAMPLING: usize = 8;
const BLOCKS: usize = 40;

/// How far the approximation may be from the best one, in shares of its norm.
const TOLERANCE: f64 = 1e-6;

/// U√S and √S Vᵀ of the largest singular values.
pub(super) struct Low {
    /// out × r.
    pub(super) b: Mat<f64>,
    /// in × r: A transposed.
    pub(super) a: Mat<f64>,
}

/// What `best` takes beside the matrix, in bytes.
pub(super) fn need(rows: usize, columns: usize, rank: usize) -> usize {
    let (least, sides) = (rows.min(columns), rows + columns);
    if least <= EXACT {
        // The matrix in float64, its QR, and the decomposition of the square rest.
        return 8 * (3 * rows * columns + 6 * least * least);
    }
    let width = (rank + OVERSAMPLING).min(least);
    let most = (width * BLOCKS).min(least);
    8 * (sides * (most + 4 * width) + 5 * most * most)
}

/// The best approximation of rank `rank` of `matrix`, given row by row.
///
/// # Errors
/// A decomposition does not converge, as with NaN.
pub(super) fn best(matrix: &[f32], rows: usize, rank: usize) -> Result<Low> {
    let matrix = MatRef::from_row_major_slice(matrix, rows, matrix.len() / rows.max(1));
    if matrix.nrows().min(matrix.ncols()) <= EXACT {
        exact(matrix, rank)
    } else {
        krylov(matrix, rank)
    }
}

fn exact(matrix: MatRef<'_, f32>, rank: usize) -> Result<Low> {
    let matrix = Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| f64::from(matrix[(i, j)]));
    let found = decompose(matrix.as_ref())?;
    let rank = rank.min(found.values.len());
    let scaled = |side: &Mat<f64>| {
        Mat::from_fn(side.nrows(), rank, |i, j| side[(i, j)] * found.values[j].sqrt())
    };
    Ok(Low { b: scaled(&found.u), a: scaled(&found.v) })
}

/// By a block Krylov space of MᵀM, orthonormal throughout, until what its last block still adds to
/// the singular vectors can no longer be seen in the result.
fn krylov(matrix: MatRef<'_, f32>, rank: usize) -> Result<Low> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let least = rows.min(columns);
    let width = (rank + OVERSAMPLING).min(least);
    let start = Mat::from_fn(rows, width, |i, j| {
        let bits = mixed((j * rows + i) as u64);
        (bits >> 11) as f64 * 2f64.powi(-52) - 1.0
    });
    let mut block = orthonormal(times(matrix.transpose(), &start).as_ref());
    let most = (width * BLOCKS).min(least / width * width);
    let mut v = Mat::<f64>::zeros(columns, most); // the space
    let mut w = Mat::<f64>::zeros(rows, most); // M times it
    let mut gram = Mat::<f64>::zeros(most, most);
    let mut at = 0;
    loop {
        let image = times(matrix, &block);
        v.subcols_mut(at, width).copy_from(&block);
        w.subcols_mut(at, width).copy_from(&image);
        let wide = at + width;
        let inner = product(w.subcols(0, wide).transpose(), image.as_ref());
        for (j, i) in (0..width).flat_map(|j| (0..wide).map(move |i| (j, i))) {
            gram[(i, at + j)] = inner[(i, j)];
            gram[(at + j, i)] = inner[(i, j)];
        }
        at = wide;
        let space = v.subcols(0, at);
        let mut next = times(matrix.transpose(), &image);
        for _ in 0..2 {
            let inside = product(space.transpose(), next.as_ref());
            matmul(next.as_mut(), Accum::Add, space, inside.as_ref(), -1.0, Par::Seq);
        }
        let basis = orthonormal(next.as_ref());
        let left = product(basis.transpose(), next.as_ref());
        faer::set_global_parallelism(Par::Seq);
        let found = gram.submatrix(0, 0, at, at).self_adjoint_eigen(faer::Side::Lower);
        let found = found.map_err(|_| {
            Error::Setting("an eigenvalue decomposition did not converge (NaN?)".to_owned())
        })?;
        // Eigenvalues come smallest first.
        let square = |i: usize| found.S()[at - 1 - i].max(0.0);
        let kept = rank.min(at);
        let vectors = Mat::from_fn(at, kept, |i, j| found.U()[(i, at - 1 - j)]);
        let last = vectors.subrows(at - width, width);
        let residuals = product(left.as_ref(), last);
        let beyond = if kept < at { square(kept) } else { 0.0 };
        let error = |i: usize| {
            let residual = residuals.col(i).iter().map(|x| x * x).sum::<f64>();
            // An angle is at most the residual by the gap.
            square(i) * residual / (square(i) - beyond).powi(2).max(f64::MIN_POSITIVE)
        };
        let whole: f64 = (0..kept).map(square).sum();
        let enough = (0..kept).map(error).sum::<f64>() <= TOLERANCE * TOLERANCE * whole;
        if enough || at + width > most {
            let roots: Vec<f64> = (0..kept).map(|i| square(i).sqrt().sqrt()).collect();
            let mut b = product(w.subcols(0, at), vectors.as_ref());
            let mut a = product(space, vectors.as_ref());
            for (j, root) in roots.iter().enumerate() {
                let inverse = if *root > 0.0 { root.recip() } else { 0.0 };
                b.col_mut(j).iter_mut().for_each(|x| *x *= inverse);
                a.col_mut(j).iter_mut().for_each(|x| *x *= root);
            }
            return Ok(Low { b, a });
        }
        block = basis;
    }
}

/// `matrix` times `block`, in float32.
fn times(matrix: MatRef<'_, f32>, block: &Mat<f64>) -> Mat<f64> {
    let narrow = Mat::from_fn(block.nrows(), block.ncols(), |i, j| block[(i, j)] as f32);
    let mut done = Mat::<f32>::zeros(matrix.nrows(), block.ncols());
    multiply(done.as_mut(), matrix, narrow.as_ref(), 1.0);
    Mat::from_fn(done.nrows(), done.ncols(), |i, j| f64::from(done[(i, j)]))
}

/// `factor · a · b`, on one thread.
pub(super) fn multiply(c: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, factor: f32) {
    matmul(c, Accum::Replace, a, b, factor, Par::Seq);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_krylov_space_finds_what_the_whole_decomposition_finds() {
        for (rows, columns, rank, decay) in
            [(150, 220, 5, 0.93), (220, 150, 8, 0.98), (40, 30, 40, 0.5)]
        {
            let random = |n: usize, m: usize, seed: u64| {
                orthonormal(
                    Mat::from_fn(n, m, |i, j| {
                        mixed(seed + (i * m + j) as u64) as f64 / 2f64.powi(63) - 1.0
                    })
                    .as_ref(),
                )
            };
            let least = rows.min(columns);
            let (u, v) = (random(rows, least, 1), random(columns, least, 1 << 40));
            let scaled = Mat::from_fn(rows, least, |i, j| u[(i, j)] * f64::powi(decay, j as i32));
            let full = product(scaled.as_ref(), v.transpose());
            let numbers: Vec<f32> =
                (0..rows * columns).map(|at| full[(at / columns, at % columns)] as f32).collect();
            let matrix = MatRef::from_row_major_slice(&numbers, rows, columns);
            let whole = |low: Low| product(low.b.as_ref(), low.a.transpose());
            let expected = whole(exact(matrix, rank).unwrap());
            let got = whole(krylov(matrix, rank).unwrap());
            let error = (&got - &expected).norm_l2() / expected.norm_l2();
            assert!(error < 1e-5, "{rows} × {columns}: {error}");
        }
        let nothing = best(&[0.0; 600 * 600], 600, 3).unwrap();
        assert_eq!(nothing.b.norm_l2() + nothing.a.norm_l2(), 0.0);
    }
}
