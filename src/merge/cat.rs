//! `cat`: Σ c_i s_i B_i A_i exactly, the factors stacked: the ranks add up.

use std::path::PathBuf;

use crate::{
    Dtype,
    blocks::{Options, Plan},
    error::{Error, Result},
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
        let factor = |joint: &Joint| {
            let rank = joint.holders.iter().map(|share| share.rank).max().unwrap_or(0);
            let stacked = joint.ranks() + joint.ranks().max(PART.min(joint.ranks() * joint.outer));
            (rank * joint.columns() * 3 + stacked) * 4
        };
        let need = joints.iter().map(factor).max().unwrap_or(0);
        let plan = Plan::of_modules(&terms.adapters, &joints, |_| 1, need, &options)?;
        Ok(Self { terms, joints, options, plan })
    }

    /// What the job will read and take.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Each target's rank: the largest that any module needs.
    pub fn ranks(&self) -> Vec<usize> {
        let rank = |target| self.joints.iter().map(|joint| self.rank(target, joint)).max();
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
            let joint = &self.joints[index];
            for (target, writer) in writers.iter().enumerate() {
                let shares: Vec<_> = self.shares(target, joint).collect();
                self.write_a(&reader, bytes, target, index, &shares, writer, dtype)?;
                self.write_b(&reader, bytes, ranks[target], index, &shares, writer, dtype)?;
            }
            Ok(())
        })?;
        reader.still_unchanged()?;
        writers.into_iter().try_for_each(Writer::finish)
    }

    /// What a target takes of a module, in the order of the bank.
    fn shares(&self, target: usize, joint: &'a Joint) -> impl Iterator<Item = &'a Share> {
        joint
            .holders
            .iter()
            .filter(move |share| self.terms.coefficient(target, share.adapter, share.module) != 0.0)
    }

    fn rank(&self, target: usize, joint: &'a Joint) -> usize {
        self.shares(target, joint).map(|share| share.rank).sum()
    }

    #[expect(clippy::too_many_arguments, reason = "one place, taken apart for reading")]
    fn write_a(
        &self,
        reader: &Reader<'_>,
        bytes: &mut Vec<u8>,
        target: usize,
        index: usize,
        shares: &[&Share],
        writer: &Writer,
        dtype: Dtype,
    ) -> Result<()> {
        let columns = self.joints[index].columns();
        let mut start = 0;
        for share in shares {
            let mut a = vec![0.0; share.rank * columns];
            reader.read(**share, Factor::A, 0..a.len(), bytes, &mut a)?;
            let factor = self.terms.product(target, share.adapter, share.module) as f32;
            a.iter_mut().for_each(|x| *x *= factor);
            self.put(writer, (index, Factor::A), start, &a, dtype)?;
            start += a.len();
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "one place, taken apart for reading")]
    fn write_b(
        &self,
        reader: &Reader<'_>,
        bytes: &mut Vec<u8>,
        rank: usize,
        index: usize,
        shares: &[&Share],
        writer: &Writer,
        dtype: Dtype,
    ) -> Result<()> {
        let outer = self.joints[index].outer;
        let together = (PART / rank.max(1)).max(1);
        for from in (0..outer).step_by(together) {
            let rows = outer.min(from + together) - from;
            let mut stacked = vec![0.0; rows * rank];
            let mut at = 0;
            for share in shares {
                let mut b = vec![0.0; rows * share.rank];
                let range = from * share.rank..(from + rows) * share.rank;
                reader.read(**share, Factor::B, range, bytes, &mut b)?;
                for (row, b) in stacked.chunks_mut(rank).zip(b.chunks(share.rank)) {
                    row[at..at + share.rank].copy_from_slice(b);
                }
                at += share.rank;
            }
            self.put(writer, (index, Factor::B), from * rank, &stacked, dtype)?;
        }
        Ok(())
    }

    fn put(
        &self,
        writer: &Writer,
        (index, factor): (usize, Factor),
        start: usize,
        numbers: &[f32],
        dtype: Dtype,
    ) -> Result<()> {
        put(&self.joints, writer, (index, factor), start, numbers, (dtype, self.options.allow_nan))
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
