//! Exactly: stacked factors are replaced by their Gram matrices, and what is decomposed is a core
//! of the size of the sum of ranks.
//!
//! With B = [B_1 … B_n], A = [A_1; …; A_n] and the diagonal C of what they are multiplied with,
//! ΔW = B C A. A Gram matrix A Aᵀ = D L Lᵀ D (D its rows' norms, L by Cholesky with pivots) says
//! A = D L Qᵀ with orthonormal Q, likewise B = P L'ᵀ D'. So ΔW = P K Qᵀ with the core
//! K = L'ᵀ D' C D L = X S Yᵀ, and neither P nor Q is needed: Sᵀ-weighted rows of the result are
//! A' = S^-½ Xᵀ L'ᵀ D' C · A and B' = B · C D L Y S^-½. All of it in float64, which more than makes
//! up for the squares in the Gram matrices.

use faer::{
    Accum, Mat, MatRef, Par,
    linalg::matmul::triangular::{BlockStructure, matmul},
    prelude::IntoConst,
};

use super::{
    Low,
    dense::{decompose, product},
};
use crate::{
    error::Result,
    joint::{Joint, Reader},
    layout::Factor,
    terms::Terms,
};

/// Columns that are widened to float64 at a time.
const PART: usize = 512;

/// Values smaller than the largest by this are rounding: the Gram matrices hold their squares.
const NOTHING: f64 = 1e-10;

/// One module's factors, all adapters' rows under one another.
pub(super) struct Stacked {
    /// R × in.
    a: Rows,
    /// R × out: the columns of B.
    b: Rows,
}

impl Stacked {
    /// What `lows` takes at most, in bytes.
    pub(super) fn need(joint: &Joint, rank: usize, targets: usize) -> usize {
        let (ranks, rank) = (joint.ranks(), rank.min(joint.ranks()));
        let sides = joint.columns() + joint.outer;
        let largest = joint.columns().max(joint.outer) * joint.module.rank;
        let dense = 8 * (12 * ranks * ranks + 3 * ranks * PART);
        4 * (ranks * sides + 3 * largest) + dense + (targets + 1) * rank * sides * 4
    }

    pub(super) fn read(reader: &Reader<'_>, joint: &Joint, bytes: &mut Vec<u8>) -> Result<Self> {
        let ranks = joint.ranks();
        let (columns, outer) = (joint.columns(), joint.outer);
        let mut a = Rows::zeros(ranks, columns);
        let mut b = Rows::zeros(ranks, outer);
        let mut own = Vec::new();
        let mut start = 0;
        for share in &joint.holders {
            let (from, to) = (start, start + share.rank);
            let rows = &mut a.numbers[from * columns..to * columns];
            reader.read(*share, Factor::A, 0..rows.len(), bytes, rows)?;
            own.resize(outer * share.rank, 0.0);
            reader.read(*share, Factor::B, 0..own.len(), bytes, &mut own)?;
            let rows = &mut b.numbers[from * outer..to * outer];
            for (column, values) in own.chunks_exact(share.rank).enumerate() {
                for (row, value) in values.iter().enumerate() {
                    rows[row * outer + column] = *value;
                }
            }
            start = to;
        }
        Ok(Self { a, b })
    }

    /// Each target's sum, to rank `rank` at most.
    pub(super) fn lows(&self, terms: &Terms<'_>, joint: &Joint, rank: usize) -> Result<Vec<Low>> {
        let a = self.a.root();
        let b = self.b.root();
        // What stays is asked for before what comes and goes: in between it would leave gaps that
        // nothing fits into.
        let most = rank.min(joint.ranks());
        let room = |rows: &Rows| vec![0.0; most * rows.columns];
        let rooms: Vec<_> = (0..terms.targets()).map(|_| (room(&self.a), room(&self.b))).collect();
        rooms
            .into_iter()
            .enumerate()
            .map(|(target, (room_a, room_b))| {
                // C, a number for each row.
                let factors: Vec<f64> = joint
                    .holders
                    .iter()
                    .flat_map(|share| {
                        let factor = terms.product(target, share.adapter, share.module);
                        std::iter::repeat_n(factor, share.rank)
                    })
                    .collect();
                let scaled = |root: &Mat<f64>| {
                    Mat::from_fn(root.nrows(), root.ncols(), |i, j| factors[i] * root[(i, j)])
                };
                let (ca, cb) = (scaled(&a), scaled(&b));
                let core = decompose(product(b.transpose(), ca.as_ref()).as_ref())?;
                let energy = core.values.iter().rev().map(|s| s * s).sum();
                let real = |s: &&f64| **s > core.values[0] * NOTHING;
                let rank = core.values.iter().take(rank).take_while(real).count();
                let weights = |root: &Mat<f64>, vectors: &Mat<f64>| {
                    let mut weights = product(root.as_ref(), vectors.subcols(0, rank));
                    for (j, s) in core.values.iter().enumerate().take(rank) {
                        weights.col_mut(j).iter_mut().for_each(|x| *x /= s.sqrt());
                    }
                    weights
                };
                Ok(Low {
                    a: self.a.combined(&weights(&cb, &core.u), room_a),
                    b: self.b.combined(&weights(&ca, &core.v), room_b),
                    values: core.values,
                    energy,
                })
            })
            .collect()
    }
}

/// A matrix of float32, row by row.
struct Rows {
    rows: usize,
    columns: usize,
    numbers: Vec<f32>,
}

impl Rows {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, numbers: vec![0.0; rows * columns] }
    }

    /// Columns `from` to `to` in float64.
    fn part(&self, from: usize, to: usize) -> Mat<f64> {
        // A column of `Mat` lies together: transposed, so that rows are copied as they lie.
        Mat::from_fn(to - from, self.rows, |j, i| {
            f64::from(self.numbers[i * self.columns + from + j])
        })
    }

    fn parts(&self) -> impl Iterator<Item = (usize, Mat<f64>)> {
        (0..self.columns)
            .step_by(PART)
            .map(|from| (from, self.part(from, self.columns.min(from + PART))))
    }

    /// A root of the Gram matrix: its rows' products with one another are those of these rows.
    fn root(&self) -> Mat<f64> {
        let mut gram = Mat::zeros(self.rows, self.rows);
        for (_, part) in self.parts() {
            matmul(
                gram.as_mut(),
                BlockStructure::TriangularLower,
                Accum::Add,
                part.transpose(),
                BlockStructure::Rectangular,
                part.as_ref(),
                BlockStructure::Rectangular,
                1.0,
                Par::Seq,
            );
        }
        cholesky(gram)
    }

    /// The rows' sums by the columns of `weights`, one row a column, in `made`.
    fn combined(&self, weights: &Mat<f64>, mut made: Vec<f32>) -> Vec<f32> {
        made.truncate(weights.ncols() * self.columns);
        for (from, part) in self.parts() {
            let sums = product(part.as_ref(), weights.as_ref());
            for j in 0..weights.ncols() {
                for i in 0..sums.nrows() {
                    made[j * self.columns + from + i] = sums[(i, j)] as f32;
                }
            }
        }
        made
    }
}

/// L with L Lᵀ = `gram`, of which the lower half is given: by Cholesky with pivots on the rows
/// scaled to norm one, as many columns as the rows have independent directions.
fn cholesky(mut gram: Mat<f64>) -> Mat<f64> {
    let n = gram.nrows();
    let norms: Vec<f64> = (0..n).map(|i| gram[(i, i)].max(0.0).sqrt()).collect();
    let inverse = |i: usize| if norms[i] > 0.0 { 1.0 / norms[i] } else { 0.0 };
    for j in 0..n {
        for i in j..n {
            gram[(i, j)] *= inverse(i) * inverse(j);
            gram[(j, i)] = gram[(i, j)];
        }
    }
    let mut root = Mat::<f64>::zeros(n, n);
    let mut rest: Vec<f64> = (0..n).map(|i| gram[(i, i)]).collect();
    let mut rank = 0;
    while rank < n {
        let pivot = (0..n).fold(0, |best, i| if rest[i] > rest[best] { i } else { best });
        // Rounding of squares: a direction of less than a ten-millionth of a row.
        if rest[pivot] <= 1e-14 * n as f64 {
            break;
        }
        // The pivot's row so far, then its column of what remains.
        let scale = 1.0 / rest[pivot].sqrt();
        let (done, new) = root.as_mut().split_at_col_mut(rank);
        let done = done.into_const();
        let mut column = new.get_mut(.., 0);
        column.copy_from(gram.col(pivot));
        let row: Vec<f64> = done.row(pivot).iter().map(|x| -x).collect();
        faer::linalg::matmul::matmul(
            column.as_mut(),
            Accum::Add,
            done,
            faer::ColRef::from_slice(&row),
            1.0,
            Par::Seq,
        );
        for i in 0..n {
            let value = column[i] * scale;
            column[i] = value;
            rest[i] -= value * value;
        }
        rest[pivot] = 0.0;
        rank += 1;
    }
    let taken: MatRef<'_, f64> = root.subcols(0, rank);
    Mat::from_fn(n, rank, |i, j| norms[i] * taken[(i, j)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_root_has_the_products_of_the_rows(
            numbers in prop::collection::vec(-2.0f32..2.0, 60),
            scales in prop::collection::vec(-30i32..30, 6),
            copies in prop::collection::vec(0usize..6, 3),
        ) {
            // Six rows of very different sizes, three of them the same again.
            let mut rows = Rows { rows: 9, columns: 10, numbers };
            for (row, scale) in rows.numbers.chunks_mut(10).zip(scales) {
                row.iter_mut().for_each(|x| *x *= 2f32.powi(scale / 3));
            }
            for copy in copies {
                rows.numbers.extend_from_within(copy * 10..copy * 10 + 10);
            }
            let root = rows.root();
            prop_assert!(root.ncols() <= 6);
            let row = |i: usize| rows.numbers[i * 10..][..10].iter().map(|&x| f64::from(x));
            let norm = |i: usize| row(i).map(|x| x * x).sum::<f64>().sqrt();
            for i in 0..9 {
                for j in 0..9 {
                    let wanted: f64 = row(i).zip(row(j)).map(|(x, y)| x * y).sum();
                    let got: f64 =
                        (0..root.ncols()).map(|k| root[(i, k)] * root[(j, k)]).sum();
                    prop_assert!((got - wanted).abs() <= 1e-12 * norm(i) * norm(j) + 1e-300);
                }
            }
        }
    }
}
