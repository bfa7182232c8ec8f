//! `cat`: Σ c_i s_i B_i A_i exactly, the factors stacked: the ranks add up.

use std::path::PathBuf;

use crate::{
    Dtype,
    blocks::{Options, Plan},
    error::{Error, Result},
    experts::interleaved,
    joint::{Joint, Reader, Share, each_on_threads, joint_modules},
    layout::Factor,
    terms::Terms,
    watch::Watch,
    writer::Writer,
};

/// What a thread holds of a stacked B at a time, in numbers.
const PART: usize = 1 << 20;

/// The stacked factors of adapters, A multiplied with coefficient and strength.
pub struct Cat<'a> {
    terms: &'a Terms<'a>,
    joints: Vec<Joint>,
    options: Options,
    plan: Plan,
}

impl<'a> Cat<'a> {
    /// # Errors
    /// The adapters' modules fit different base models; the memory budget is too small.
    pub fn new(terms: &'a Terms<'a>, options: Options) -> Result<Self> {
        terms.plain("cat")?;
        let joints = joint_modules(&terms.adapters)?;
        let most = joints.iter().map(Joint::ranks).max().unwrap_or(0);
        let factor = |joint: &Joint| {
            let experts = joint.module.experts;
            let rank = experts * joint.holders.iter().map(|share| share.rank).max().unwrap_or(0);
            // What is read of B, and what a target takes of it, at the rank of its largest module.
            let stacked = [experts * joint.ranks(), experts * most]
                .map(|ranks| ranks.max(PART.min(ranks * joint.outer)));
            (rank * joint.columns() * 3 + stacked[0] + stacked[1]) * 4
        };
        let need = joints.iter().map(factor).max().unwrap_or(0);
        let plan = Plan::of_modules(&terms.adapters, &joints, |_| [1, 1], need, &options)?;
        Ok(Self { terms, joints, options, plan })
    }

    /// What the job will read and take.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Each target's rank: the largest that any module needs.
    pub fn ranks(&self) -> Vec<usize> {
        let rank =
            |target| self.joints.iter().map(|joint| joint.ranks_of(self.terms, target)).max();
        (0..self.terms.targets()).map(|target| rank(target).unwrap_or(0)).collect()
    }

    /// Write one safetensors file of type `dtype` for each target; a module of less than the
    /// target's rank has rows and columns of zeros at the end. None appears before all are
    /// complete.
    ///
    /// # Errors
    /// A file cannot be read or written, or changed meanwhile; a number is not finite; `watch`
    /// said to stop.
    pub fn write(&self, outputs: &[PathBuf], dtype: Dtype, watch: &Watch) -> Result<()> {
        let options = &self.options;
        let reader = Reader::open(&self.terms.adapters, options.io, options.allow_nan, watch)?;
        let ranks = self.ranks();
        let writers = create(&self.joints, outputs, &ranks, dtype)?;
        each_on_threads(self.joints.len(), self.plan.threads, watch, Vec::new, |bytes, index| {
            let stack = Stack { cat: self, index, ranks: &ranks, writers: &writers, dtype };
            stack.write_a(&reader, bytes)?;
            stack.write_b(&reader, bytes)
        })?;
        reader.still_unchanged()?;
        Writer::finish(writers, watch)
    }
}

/// One module of all targets, for which each adapter is read once.
struct Stack<'a> {
    cat: &'a Cat<'a>,
    index: usize,
    /// Each target's rank, and file.
    ranks: &'a [usize],
    writers: &'a [Writer],
    dtype: Dtype,
}

impl Stack<'_> {
    fn joint(&self) -> &Joint {
        &self.cat.joints[self.index]
    }

    /// The adapters that any target takes, in the order of the bank.
    fn shares(&self) -> impl Iterator<Item = &Share> {
        let taken = |share: &&Share| (0..self.ranks.len()).any(|t| self.cat.terms.takes(t, share));
        self.joint().holders.iter().filter(taken)
    }

    fn write_a(&self, reader: &Reader<'_>, bytes: &mut Vec<u8>) -> Result<()> {
        let columns = self.joint().columns();
        let experts = self.joint().module.experts;
        let mut starts = vec![0; self.ranks.len()];
        for share in self.shares() {
            let own = share.rank * columns;
            let mut a = vec![0.0; experts * own];
            reader.read(*share, Factor::A, 0..a.len(), bytes, &mut a)?;
            let mut scaled = vec![0.0; a.len()];
            for (target, start) in starts.iter_mut().enumerate() {
                if !self.cat.terms.takes(target, share) {
                    continue;
                }
                let factor = self.cat.terms.product(target, share.adapter, share.module) as f32;
                scaled.iter_mut().zip(&a).for_each(|(y, x)| *y = x * factor);
                for (expert, a) in scaled.chunks_exact(own).enumerate() {
                    let place = expert * self.ranks[target] * columns + *start;
                    self.put(target, Factor::A, place, a)?;
                }
                *start += own;
            }
        }
        Ok(())
    }

    fn write_b(&self, reader: &Reader<'_>, bytes: &mut Vec<u8>) -> Result<()> {
        let outer = self.joint().outer;
        // A row of B has a group of all experts' numbers for each of its columns.
        let experts = self.joint().module.experts;
        let whole: usize = self.shares().map(|share| share.rank * experts).sum();
        let widest = self.ranks.iter().max().map_or(0, |rank| rank * experts).max(whole);
        let together = (PART / widest.max(1)).max(1);
        for from in (0..outer).step_by(together) {
            let rows = outer.min(from + together) - from;
            // Adapter behind adapter, the rows of each together.
            let mut read = vec![0.0; rows * whole];
            let mut place = 0;
            for share in self.shares() {
                let own = share.rank * experts;
                let b = &mut read[place..place + rows * own];
                reader.read(*share, Factor::B, from * own..(from + rows) * own, bytes, b)?;
                place += rows * own;
            }
            for (target, rank) in self.ranks.iter().enumerate() {
                let width = rank * experts;
                let mut stacked = vec![0.0; rows * width];
                let (mut place, mut at) = (0, 0);
                for share in self.shares() {
                    let own = share.rank * experts;
                    let b = &read[place..place + rows * own];
                    place += b.len();
                    if self.cat.terms.takes(target, share) {
                        for (row, b) in stacked.chunks_mut(width).zip(b.chunks(own)) {
                            row[at..at + own].copy_from_slice(b);
                        }
                        at += own;
                    }
                }
                self.put(target, Factor::B, from * width, &stacked)?;
            }
        }
        Ok(())
    }

    fn put(&self, target: usize, factor: Factor, start: usize, numbers: &[f32]) -> Result<()> {
        let checks = (self.dtype, self.cat.options.allow_nan);
        let writer = &self.writers[target];
        put(&self.cat.joints, writer, (self.index, factor), start, numbers, checks)
    }
}

/// A file for each target, with both factors of all modules at its rank.
pub(super) fn create(
    joints: &[Joint],
    outputs: &[PathBuf],
    ranks: &[usize],
    dtype: Dtype,
) -> Result<Vec<Writer>> {
    if outputs.len() != ranks.len() {
        return Err(Error::Setting("expected an output for each target".to_owned()));
    }
    let create = |(path, &rank): (&PathBuf, &usize)| {
        let tensors: Vec<(String, Vec<usize>)> = joints
            .iter()
            .flat_map(|joint| {
                [Factor::A, Factor::B]
                    .map(|factor| (joint.module.tensor_name(factor), joint.shape(factor, rank)))
            })
            .collect();
        Writer::create(path, dtype, tensors.iter().map(|(name, shape)| (&name[..], &shape[..])))
    };
    outputs.iter().zip(ranks).map(create).collect()
}

/// Write both factors of a module at `rank`, from the rows of A and the columns of B of each of its
/// experts, which may be less or more than that.
///
/// # Errors
/// As `put`.
pub(super) fn put_columns<'a>(
    joints: &[Joint],
    writer: &Writer,
    index: usize,
    rank: usize,
    experts: impl Iterator<Item = (&'a [f32], &'a [f32])> + Clone,
    checks: (Dtype, bool),
) -> Result<()> {
    let joint = &joints[index];
    let whole = rank * joint.columns();
    for (expert, (a, _)) in experts.clone().enumerate() {
        let a = &a[..a.len().min(whole)];
        put(joints, writer, (index, Factor::A), expert * whole, a, checks)?;
    }
    let columns = experts.map(|(_, b)| b);
    let b = interleaved(joint.module.experts, joint.outer, rank, columns);
    put(joints, writer, (index, Factor::B), 0, &b, checks)
}

/// Write a part of a factor into one of the files that `create` made.
///
/// # Errors
/// As the system has it; or a number is not finite in the file's type, and may not be.
pub(super) fn put(
    joints: &[Joint],
    writer: &Writer,
    (index, factor): (usize, Factor),
    start: usize,
    numbers: &[f32],
    (dtype, allow_nan): (Dtype, bool),
) -> Result<()> {
    let finite = writer.write(2 * index + factor as usize, start, numbers)?;
    if finite || allow_nan {
        return Ok(());
    }
    Err(Error::Overflow { tensor: joints[index].module.tensor_name(factor), dtype })
}
