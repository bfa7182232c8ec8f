//! Experts: one module's factors that hold a matrix for each expert of a mixture, as PEFT lays them
//! out (`target_parameters`). A is experts × r × in, B is out × r × experts.

use std::ops::Range;

use crate::{
    error::Result,
    joint::{Joint, Reader, Share},
    layout::{Factor, Module},
};

/// About how many numbers of B are held at a time, and read.
const HELD: usize = 1 << 21;
const PART: usize = 1 << 16;

/// B of some experts of a module's holders, each a matrix of its own, as it is in no file.
pub(crate) struct Held {
    first: usize,
    /// For each adapter one expert's matrix after another.
    b: Vec<Vec<f32>>,
}

impl Joint {
    /// One expert of it, as a module of its own.
    fn expert(&self, expert: usize) -> Self {
        let holders = self.holders.iter().map(|share| Share { expert: Some(expert), ..*share });
        Self {
            module: Module { experts: 1, ..self.module.clone() },
            holders: holders.collect(),
            ..self.clone()
        }
    }

    /// The same without the first `start` of its holders.
    pub(crate) fn from(&self, start: usize) -> Self {
        Self { holders: self.holders[start..].to_vec(), ..self.clone() }
    }

    /// The same as one matrix, its factors as they lie: enough where numbers are taken one by one.
    pub(crate) fn flat(&self) -> Self {
        let flat = |share: &Share| Share { rank: share.rank * self.module.experts, ..*share };
        Self {
            module: Module {
                rank: self.module.rank * self.module.experts,
                experts: 1,
                ..self.module.clone()
            },
            holders: self.holders.iter().map(flat).collect(),
            ..self.clone()
        }
    }

    /// How many experts are worked on after one reading of B.
    fn together(&self) -> usize {
        (HELD / (self.outer * self.ranks()).max(1)).clamp(1, self.module.experts)
    }

    /// How often `each_expert` reads B.
    pub(crate) fn readings(&self) -> u64 {
        self.module.experts.div_ceil(self.together()) as u64
    }

    /// What `each_expert` takes, in bytes.
    pub(crate) fn held(&self) -> usize {
        match self.module.experts {
            1 => 0,
            experts => {
                let rank = self.holders.iter().map(|share| share.rank).max().unwrap_or(0);
                4 * (self.together() * self.outer * self.ranks() + PART.max(rank * experts))
            }
        }
    }
}

/// `work` for each expert of a module, as a module of its own; or for the module, if it has none.
///
/// # Errors
/// A file cannot be read; or as `work`.
pub(crate) fn each_expert(
    reader: &Reader<'_>,
    joint: &Joint,
    mut work: impl FnMut(&Reader<'_>, &Joint) -> Result<()>,
) -> Result<()> {
    let experts = joint.module.experts;
    if experts == 1 {
        return work(reader, joint);
    }
    for first in (0..experts).step_by(joint.together()) {
        let some = first..experts.min(first + joint.together());
        let reader = reader.holding(hold(reader, joint, &some)?);
        some.into_iter().try_for_each(|expert| work(&reader, &joint.expert(expert)))?;
    }
    Ok(())
}

fn hold(reader: &Reader<'_>, joint: &Joint, some: &Range<usize>) -> Result<Held> {
    let (outer, experts) = (joint.outer, joint.module.experts);
    let mut held = Held { first: some.start, b: vec![vec![]; reader.adapters.len()] };
    let (mut bytes, mut part) = (Vec::new(), Vec::new());
    for share in &joint.holders {
        let row = share.rank * experts;
        let rows = (PART / row).max(1);
        let mut own = vec![0.0; some.len() * outer * share.rank];
        for from in (0..outer).step_by(rows) {
            let to = outer.min(from + rows);
            part.resize((to - from) * row, 0.0);
            reader.read(*share, Factor::B, from * row..to * row, &mut bytes, &mut part)?;
            // A row of B has a group of all experts' numbers for each of its r columns.
            for (at, group) in part.chunks_exact(experts).enumerate() {
                let place = from * share.rank + at;
                for (i, expert) in some.clone().enumerate() {
                    own[i * outer * share.rank + place] = group[expert];
                }
            }
        }
        held.b[share.adapter] = own;
    }
    Ok(held)
}

impl Held {
    /// The elements in `range` of one expert's B, of `length` in all.
    pub(crate) fn read(
        &self,
        adapter: usize,
        expert: usize,
        length: usize,
        range: Range<usize>,
    ) -> &[f32] {
        let start = (expert - self.first) * length;
        &self.b[adapter][start + range.start..start + range.end]
    }
}

/// B as PEFT has it, from the columns of each expert's: out × rank × experts, where an expert may
/// have less than the rank.
pub(crate) fn interleaved<'a>(
    experts: usize,
    outer: usize,
    rank: usize,
    columns: impl Iterator<Item = &'a [f32]>,
) -> Vec<f32> {
    let mut b = vec![0.0; outer * rank * experts];
    for (expert, columns) in columns.enumerate() {
        for (j, column) in columns.chunks_exact(outer).take(rank).enumerate() {
            for (row, value) in b.chunks_exact_mut(rank * experts).zip(column) {
                row[j * experts + expert] = *value;
            }
        }
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Adapter, Io, Watch,
        joint::joint_modules,
        testing::{Spec, folder},
    };

    #[test]
    fn each_experts_matrices_are_found_whatever_is_held_at_a_time() {
        let folder = folder();
        let spec = Spec { rank: 6, modules: vec!["q"], ..Spec::default() };
        let plain = Adapter::open(&spec.write(&folder, "a")).unwrap();
        assert!(plain.with_experts(&[4]).is_err());
        let adapter = plain.with_experts(&[3]).unwrap();
        let watch = Watch::default();
        let reader = Reader::open(&[&adapter], Io::Read, false, &watch).unwrap();
        let joint = joint_modules(&[&adapter]).unwrap().remove(0);
        let (rank, experts) = (joint.module.rank, joint.module.experts);
        assert_eq!((rank, experts, joint.readings()), (2, 3, 1));
        let (a, b) = (spec.numbers(0), spec.numbers(1));
        let mut columns = vec![vec![]; experts];
        for some in [0..3, 0..1, 1..3] {
            let held = reader.holding(hold(&reader, &joint, &some).unwrap());
            for expert in some {
                let one = joint.expert(expert);
                let read = |factor, length: usize, start: usize| {
                    let mut numbers = vec![0.0; length - start];
                    let range = start..length;
                    held.read(one.holders[0], factor, range, &mut vec![], &mut numbers).unwrap();
                    numbers
                };
                let length = rank * joint.columns();
                assert_eq!(read(Factor::A, length, 1), a[expert * length + 1..][..length - 1]);
                let found = read(Factor::B, joint.outer * rank, 3);
                for (at, x) in found.iter().enumerate() {
                    assert_eq!(*x, b[(at + 3) * experts + expert]);
                }
                let whole = read(Factor::B, joint.outer * rank, 0);
                let by_columns =
                    (0..whole.len()).map(|at| whole[at % joint.outer * rank + at / joint.outer]);
                columns[expert] = by_columns.collect();
            }
        }
        let columns = columns.iter().map(|b: &Vec<f32>| &b[..]);
        assert_eq!(interleaved(experts, joint.outer, rank, columns), b);
    }
}
