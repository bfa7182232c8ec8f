//! ⟨A_i, A_j⟩ + ⟨B_i, B_j⟩: factors as long rows of numbers.

use std::ops::Range;

use super::matrix::{Entry, Room};
use crate::{
    error::Result,
    joint::{Joint, Reader, Share},
    kernels::{LANES, SIDE, widest as kernel},
    layout::Factor,
};

/// Numbers of each row that are multiplied in float32 before the products are summed in float64.
const PIECE: usize = 1024;

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
        let (n, read) = (n.next_multiple_of(SIDE), self.pieces * PIECE.next_multiple_of(rank));
        (n * stride(read) + 2 * read) * size_of::<f32>()
            + n * n * (size_of::<f64>() + size_of::<Entry>())
    }

    /// The inner products of all pairs of a module's holders, of each pair once.
    pub(super) fn entries(
        &self,
        reader: &Reader<'_>,
        joint: &Joint,
        room: &mut Room,
    ) -> Result<Vec<Entry>> {
        let n = joint.holders.len();
        let count = n.next_multiple_of(SIDE);
        let mut sums = vec![0.0; count * count];
        let rank = widest(joint);
        let padded = Padded { reader, rank, columns: joint.columns() };
        for (factor, length, unit) in
            [(Factor::A, rank * joint.columns(), 1), (Factor::B, joint.outer * rank, rank)]
        {
            let piece = (PIECE / unit).max(1) * unit;
            for start in (0..length).step_by(self.pieces * piece) {
                let columns = start..length.min(start + self.pieces * piece);
                let stride = stride(columns.len());
                let rows = &mut room.rows[0];
                // A load that lies in two lines of a cache takes twice as long.
                rows.resize(rows.len().max(LANES + count * stride), 0.0);
                let first = rows.as_ptr().align_offset(LANES * size_of::<f32>()).min(LANES);
                let rows = &mut rows[first..first + count * stride];
                let (held, none) = rows.split_at_mut(n * stride);
                none.fill(0.0);
                for (share, row) in joint.holders.iter().zip(held.chunks_exact_mut(stride)) {
                    let (row, behind) = row.split_at_mut(columns.len());
                    behind.fill(0.0);
                    let buffers = (&mut room.bytes, &mut room.own);
                    padded.read(*share, factor, columns.clone(), buffers, row)?;
                }
                let width = columns.len().next_multiple_of(LANES);
                for from in (0..width).step_by(PIECE) {
                    reader.go_on()?;
                    (kernel().add_gram)(&mut sums, rows, stride, from..width.min(from + PIECE));
                }
            }
        }
        let place = |i: usize| joint.holders[i].adapter;
        let entry = |i: usize, j: usize| (place(i), place(j), sums[i * count + j]);
        Ok((0..n).flat_map(|i| (0..=i).map(move |j| (i, j))).map(|(i, j)| entry(i, j)).collect())
    }
}

/// Factors as they would be at the largest rank of a module's holders.
struct Padded<'a> {
    reader: &'a Reader<'a>,
    rank: usize,
    /// Of A.
    columns: usize,
}

impl Padded<'_> {
    fn read(
        &self,
        share: Share,
        factor: Factor,
        range: Range<usize>,
        (bytes, own): (&mut Vec<u8>, &mut Vec<f32>),
        row: &mut [f32],
    ) -> Result<()> {
        if share.rank == self.rank {
            return self.reader.read(share, factor, range, bytes, row);
        }
        row.fill(0.0);
        match factor {
            // The rows of A that it has are the first.
            Factor::A => {
                let end = share.rank * self.columns;
                let range = range.start.min(end)..range.end.min(end);
                let row = &mut row[..range.len()];
                self.reader.read(share, factor, range, bytes, row)
            }
            // So are the columns of B.
            Factor::B => {
                let range =
                    range.start / self.rank * share.rank..range.end / self.rank * share.rank;
                own.resize(range.len(), 0.0);
                self.reader.read(share, factor, range, bytes, own)?;
                for (row, own) in row.chunks_exact_mut(self.rank).zip(own.chunks_exact(share.rank))
                {
                    row[..share.rank].copy_from_slice(own);
                }
                Ok(())
            }
        }
    }
}

/// The largest rank of the holders of a module.
fn widest(joint: &Joint) -> usize {
    joint.holders.iter().map(|share| share.rank).max().unwrap_or(1)
}

/// How far apart rows begin: zeros behind each make whole lanes of it, and keep rows from the same
/// few places of a cache.
fn stride(width: usize) -> usize {
    width.next_multiple_of(LANES) + LANES
}
