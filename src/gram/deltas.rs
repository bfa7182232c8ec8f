//! s_i s_j ⟨B_iᵀ B_j, A_i A_jᵀ⟩: inner products of ΔW, which is never formed.

use std::ops::Range;

use faer::MatRef;

use super::{
    matrix::{Entry, Room, Task},
    product32,
};
use crate::{
    adapter::Adapter,
    error::Result,
    experts::each_expert,
    joint::{Joint, Reader, Share},
    layout::Factor,
};

/// The sum of the ranks of the members whose factors are multiplied with one another in one go.
/// More repeats less of the reading; of less, more fits into a cache.
const RANKS: usize = 256;

/// Products of the stacked factors of groups of members.
pub(super) struct Deltas<'a> {
    strengths: &'a [Vec<f64>],
    /// The sum of ranks that a group has at most, or one member with more.
    ranks: usize,
    /// The bytes of A and B of each adapter's module, for the sake of progress.
    sizes: Vec<Vec<[u64; 2]>>,
}

impl<'a> Deltas<'a> {
    pub(super) fn new(
        adapters: &[&Adapter],
        joints: &[Joint],
        strengths: &'a [Vec<f64>],
        memory: usize,
    ) -> Self {
        let sides = joints.iter().map(|joint| joint.columns() + joint.outer).max().unwrap_or(1);
        let size = |adapter: &&Adapter| {
            let tensors = &adapter.layout.tensors;
            let bytes = |tensor: usize| tensors[tensor].bytes.end - tensors[tensor].bytes.start;
            adapter.layout.modules.iter().map(|m| [bytes(m.a), bytes(m.b)]).collect()
        };
        Self {
            strengths,
            // Two groups' factors in a quarter of the budget, so that four threads have room. Not
            // a matter of how many there are: where groups begin may change how products round.
            ranks: RANKS.min(memory / 4 / (2 * 4 * sides.max(1))).max(1),
            sizes: adapters.iter().map(size).collect(),
        }
    }

    /// The groups of a module's holders: each with itself, and with those after it.
    pub(super) fn tasks(&self, joint: usize, of: &Joint) -> Vec<Task> {
        let groups = self.groups(of, 0);
        groups.into_iter().map(|rows| Task { joint, rows }).collect()
    }

    /// What a task reads, in bytes.
    pub(super) fn bytes(&self, joint: &Joint, task: &Task) -> u64 {
        let rest = joint.from(task.rows.start);
        let times = rest.readings();
        let size = |share: &Share| {
            let [a, b] = self.sizes[share.adapter][share.module];
            a + times * b
        };
        rest.holders.iter().map(size).sum()
    }

    /// What `entries` takes, in bytes.
    pub(super) fn need(&self, joint: &Joint) -> usize {
        let one = joint.holders.iter().map(|share| share.rank).max().unwrap_or(0);
        let ranks = self.ranks.max(one).min(joint.ranks());
        let own = one * joint.columns().max(joint.outer);
        let n = joint.holders.len();
        4 * (2 * ranks * (joint.columns() + joint.outer) + 2 * ranks * ranks + 2 * own)
            + n * ranks.min(n) * size_of::<Entry>()
            + joint.held()
    }

    /// Holders from `first` on, in groups.
    fn groups(&self, joint: &Joint, first: usize) -> Vec<Range<usize>> {
        let mut groups: Vec<Range<usize>> = Vec::new();
        let mut ranks = 0;
        for (i, share) in joint.holders.iter().enumerate().skip(first) {
            match groups.last_mut() {
                Some(group) if ranks + share.rank <= self.ranks => {
                    group.end = i + 1;
                    ranks += share.rank;
                }
                _ => {
                    groups.push(i..i + 1);
                    ranks = share.rank;
                }
            }
        }
        groups
    }

    /// The inner products of a module's holders `rows` with themselves and all after them.
    pub(super) fn entries(
        &self,
        reader: &Reader<'_>,
        joint: &Joint,
        rows: &Range<usize>,
        room: &mut Room,
    ) -> Result<Vec<Entry>> {
        let mut sums: Vec<Entry> = Vec::new();
        each_expert(reader, &joint.from(rows.start), |reader, rest| {
            let found = self.entries_of_one(reader, rest, &(0..rows.len()), room)?;
            if sums.is_empty() {
                sums = found;
            } else {
                sums.iter_mut().zip(found).for_each(|(sum, one)| sum.2 += one.2);
            }
            Ok(())
        })?;
        Ok(sums)
    }

    fn entries_of_one(
        &self,
        reader: &Reader<'_>,
        joint: &Joint,
        rows: &Range<usize>,
        room: &mut Room,
    ) -> Result<Vec<Entry>> {
        let Room { bytes, own, rows: [a, b, other_a, other_b] } = room;
        let mine = &joint.holders[rows.clone()];
        stack_a(reader, joint, mine, bytes, a)?;
        stack_b(reader, joint, mine, (bytes, own), b)?;
        let mut entries = Vec::new();
        for group in self.groups(joint, rows.start) {
            let theirs = &joint.holders[group.clone()];
            if group == *rows {
                let (a, b) = (view(a, joint.columns()), view(b, sum_of_ranks(mine)));
                let products = (product32(a, a.transpose()), product32(b.transpose(), b));
                self.add(mine, theirs, &products, &mut entries);
                continue;
            }
            stack_a(reader, joint, theirs, bytes, other_a)?;
            stack_b(reader, joint, theirs, (bytes, own), other_b)?;
            reader.go_on()?;
            let of_a =
                product32(view(a, joint.columns()), view(other_a, joint.columns()).transpose());
            let of_b = product32(
                view(b, sum_of_ranks(mine)).transpose(),
                view(other_b, sum_of_ranks(theirs)),
            );
            self.add(mine, theirs, &(of_a, of_b), &mut entries);
        }
        Ok(entries)
    }

    /// The entries of `mine` and `theirs`, each pair once, from A_i A_jᵀ and B_iᵀ B_j.
    fn add(
        &self,
        mine: &[Share],
        theirs: &[Share],
        (a, b): &(faer::Mat<f32>, faer::Mat<f32>),
        entries: &mut Vec<Entry>,
    ) {
        let strength = |share: &Share| self.strengths[share.adapter][share.module];
        let mut column = 0;
        for other in theirs {
            let mut row = 0;
            for share in mine {
                if share.adapter <= other.adapter {
                    let mut sum = 0.0;
                    for j in column..column + other.rank {
                        let a = &a.col_as_slice(j)[row..row + share.rank];
                        let b = &b.col_as_slice(j)[row..row + share.rank];
                        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
                        sum += products.sum::<f64>();
                    }
                    let product = strength(share) * strength(other) * sum;
                    entries.push((share.adapter, other.adapter, product));
                }
                row += share.rank;
            }
            column += other.rank;
        }
    }
}

pub(super) fn sum_of_ranks(shares: &[Share]) -> usize {
    shares.iter().map(|share| share.rank).sum()
}

/// Numbers as rows of `columns`.
pub(super) fn view(numbers: &[f32], columns: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(numbers, numbers.len() / columns, columns)
}

/// The A of some members under one another.
pub(super) fn stack_a(
    reader: &Reader<'_>,
    joint: &Joint,
    shares: &[Share],
    bytes: &mut Vec<u8>,
    stacked: &mut Vec<f32>,
) -> Result<()> {
    stacked.resize(sum_of_ranks(shares) * joint.columns(), 0.0);
    let mut free = &mut stacked[..];
    for share in shares {
        let length = share.rank * joint.columns();
        let (rows, rest) = free.split_at_mut(length);
        reader.read(*share, Factor::A, 0..length, bytes, rows)?;
        free = rest;
    }
    Ok(())
}

/// Their B side by side.
pub(super) fn stack_b(
    reader: &Reader<'_>,
    joint: &Joint,
    shares: &[Share],
    (bytes, own): (&mut Vec<u8>, &mut Vec<f32>),
    stacked: &mut Vec<f32>,
) -> Result<()> {
    let ranks = sum_of_ranks(shares);
    stacked.resize(joint.outer * ranks, 0.0);
    let mut start = 0;
    for share in shares {
        own.resize(joint.outer * share.rank, 0.0);
        reader.read(*share, Factor::B, 0..own.len(), bytes, own)?;
        for (row, own) in stacked.chunks_exact_mut(ranks).zip(own.chunks_exact(share.rank)) {
            row[start..start + share.rank].copy_from_slice(own);
        }
        start += share.rank;
    }
    Ok(())
}
