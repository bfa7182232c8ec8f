//! Small dense matrices in float64, each on one thread, so that the bits do not depend on how many
//! threads there are.

use std::cell::Cell;

use faer::{Accum, Mat, MatMut, MatRef, Par};

use crate::{
    error::{Error, Result},
    source::trim,
};

/// Give back what a decomposition of `matrix` will leave behind, together with those of others: each
/// time would cost a fifth of a small one, and large ones leave much.
fn tidy(matrix: MatRef<'_, f64>) {
    /// As many decompositions, or bytes of their matrices.
    const OFTEN: usize = 8;
    const MUCH: usize = 3 << 20;
    thread_local!(static LEFT: Cell<usize> = const { Cell::new(0) });
    let bytes = matrix.nrows() * matrix.ncols() * size_of::<f64>();
    LEFT.set(LEFT.get() + bytes.max(MUCH / OFTEN));
    if LEFT.get() >= MUCH {
        LEFT.set(0);
        trim();
    }
}

/// `a` times `b`.
pub(in crate::merge) fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut c = Mat::zeros(a.nrows(), b.ncols());
    add_product(c.as_mut(), a, b);
    c
}

/// `c += a b`.
pub(in crate::merge) fn add_product(c: MatMut<'_, f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>) {
    faer::linalg::matmul::matmul(c, Accum::Add, a, b, 1.0, Par::Seq);
}

/// A singular value decomposition U S Vᵀ.
pub(in crate::merge) struct Decomposed {
    pub(in crate::merge) u: Mat<f64>,
    pub(in crate::merge) values: Vec<f64>,
    pub(in crate::merge) v: Mat<f64>,
}

/// # Errors
/// It did not converge, as with NaN.
pub(in crate::merge) fn decompose(matrix: MatRef<'_, f64>) -> Result<Decomposed> {
    if matrix.nrows() == 0 || matrix.ncols() == 0 {
        let (u, v) = (Mat::zeros(matrix.nrows(), 0), Mat::zeros(matrix.ncols(), 0));
        return Ok(Decomposed { u, values: vec![], v });
    }
    tidy(matrix);
    faer::set_global_parallelism(Par::Seq);
    let svd = matrix.thin_svd().map_err(|_| {
        Error::Setting("a singular value decomposition did not converge (NaN?)".to_owned())
    })?;
    let values = svd.S().column_vector().iter().copied().collect();
    Ok(Decomposed { u: svd.U().to_owned(), values, v: svd.V().to_owned() })
}

/// An orthonormal basis of the columns of `matrix`.
pub(in crate::merge) fn orthonormal(matrix: MatRef<'_, f64>) -> Mat<f64> {
    tidy(matrix);
    faer::set_global_parallelism(Par::Seq);
    matrix.qr().compute_thin_Q()
}
