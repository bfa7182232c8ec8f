//! ⟨A_i, A_j⟩ + ⟨B_i, B_j⟩: factors as long rows of numbers.

use faer::{Mat, MatRef};

use super::{
    matrix::{Entry, Room},
    product32,
};
use crate::{
    error::Result,
    joint::{Joint, Reader},
    layout::Factor,
};

/// Numbers of each row that are multiplied in float32 before the products are summed in float64.
const PIECE: usize = 1024;

/// Rows that are multiplied at a time with those up to them: few, so that little is computed of
/// the half that symmetry gives, and enough for the registers.
const PANEL: usize = 32;

/// What a thread reads before it multiplies: of few members long parts, that are worth a read.
const NEAR: usize = 4 << 20;

/// The rows of all members, so many numbers at a time.
pub(super) struct Parameters {
    /// Pieces of each row that are read at a time.
    pieces: usize,
}

impl Parameters {
    pub(super) fn new(joints: &[Joint], memory: usize) -> Self {
        let members = joints.iter().map(|joint| joint.holders.len()).max().unwrap_or(0).max(1);
        // As much as there is also for several threads: the results do not depend on it.
        let room = NEAR.min(memory / 8);
        Self { pieces: (room / (members * PIECE * 4)).max(1) }
    }

    /// What `entries` takes, in bytes.
    pub(super) fn need(&self, joint: &Joint) -> usize {
        let (n, rank) = (joint.holders.len(), widest(joint));
        let read = self.pieces * PIECE.next_multiple_of(rank);
        n * read * 4 + 2 * read * 4 + n * n * 8 + PANEL * n * 4
    }

    /// The inner products of all pairs of a module's holders, of each pair once.
    pub(super) fn entries(
        &self,
        reader: &Reader<'_>,
        joint: &Joint,
        room: &mut Room,
    ) -> Result<Vec<Entry>> {
        let n = joint.holders.len();
        let mut sum = Mat::<f64>::zeros(n, n);
        let rank = widest(joint);
        for (factor, length, unit) in
            [(Factor::A, rank * joint.columns(), 1), (Factor::B, joint.outer * rank, rank)]
        {
            let piece = (PIECE / unit).max(1) * unit;
            for start in (0..length).step_by(self.pieces * piece) {
                let columns = start..length.min(start + self.pieces * piece);
                let width = columns.len();
                let rows = &mut room.rows[0];
                rows.clear();
                rows.resize(n * width, 0.0);
                for (share, row) in joint.holders.iter().zip(rows.chunks_exact_mut(width)) {
                    if share.rank == rank {
                        reader.read(*share, factor, columns.clone(), &mut room.bytes, row)?;
                        continue;
                    }
                    match factor {
                        // The rows of A that it has are the first.
                        Factor::A => {
                            let own = share.rank * joint.columns();
                            let own = columns.start.min(own)..columns.end.min(own);
                            let row = &mut row[..own.len()];
                            reader.read(*share, factor, own, &mut room.bytes, row)?;
                        }
                        // So are the columns of B.
                        Factor::B => {
                            let own =
                                columns.start / rank * share.rank..columns.end / rank * share.rank;
                            room.own.resize(own.len(), 0.0);
                            reader.read(*share, factor, own, &mut room.bytes, &mut room.own)?;
                            for (padded, own) in
                                row.chunks_exact_mut(rank).zip(room.own.chunks_exact(share.rank))
                            {
                                padded[..share.rank].copy_from_slice(own);
                            }
                        }
                    }
                }
                let rows = MatRef::from_row_major_slice(&rows[..], n, width);
                for from in (0..width).step_by(piece) {
                    reader.go_on()?;
                    add_products(rows.subcols(from, piece.min(width - from)), &mut sum);
                }
            }
        }
        let place = |i: usize| joint.holders[i].adapter;
        let entry = |i: usize, j: usize| (place(i), place(j), sum[(j, i)]);
        Ok((0..n).flat_map(|i| (0..=i).map(move |j| (i, j))).map(|(i, j)| entry(i, j)).collect())
    }
}

/// The largest rank of the holders of a module.
fn widest(joint: &Joint) -> usize {
    joint.holders.iter().map(|share| share.rank).max().unwrap_or(1)
}

/// Add ⟨row i, row j⟩ to `sum[(j, i)]` for j ≤ i.
fn add_products(rows: MatRef<'_, f32>, sum: &mut Mat<f64>) {
    for start in (0..rows.nrows()).step_by(PANEL) {
        let panel = rows.subrows(start, PANEL.min(rows.nrows() - start));
        let before = rows.subrows(0, start + panel.nrows());
        // A column for each row of the panel, as `sum` has it.
        let products = product32(before, panel.transpose());
        for (i, column) in products.col_iter().enumerate() {
            let sums = sum.col_mut(start + i).subrows_mut(0, start + i + 1);
            sums.iter_mut().zip(column.iter()).for_each(|(sum, x)| *sum += f64::from(*x));
        }
    }
}
