//! The same with ΔW in place of the factors, and the sum brought to a low rank: PEFT's `ties_svd`,
//! `dare_linear_svd`, `dare_ties_svd` and `magnitude_prune_svd`.

use std::path::PathBuf;

use faer::{Mat, MatMut, MatRef};

use super::{
    Cut, Masks, Rule, Scheme, Search, Sparsity, Sums,
    low::{self, best, multiply},
    size, widest_type,
};
use crate::{
    Dtype, Io,
    blocks::{Options, Plan},
    error::{Error, Result},
    experts::each_expert,
    joint::{Joint, Reader, Share, each_on_threads, joint_modules},
    layout::Factor,
    merge::cat::{create, put_columns},
    terms::Terms,
    watch::Watch,
    writer::Writer,
};

/// About how many numbers of a ΔW are formed at a time.
const BLOCK: usize = 1 << 18;

/// Sums of thinned out ΔW = s B A, weighted by the coefficients alone, to a low rank.
pub struct Dense<'a> {
    terms: &'a Terms<'a>,
    joints: Vec<Joint>,
    sparsity: Sparsity,
    pub(super) masks: Masks,
    rank: usize,
    options: Options,
    plan: Plan,
}

/// One thread's buffers, kept from module to module.
#[derive(Default)]
struct Worker {
    bytes: Vec<u8>,
    a: Vec<f32>,
    b: Vec<f32>,
    delta: Vec<f32>,
    search: Search,
    sums: Sums,
}

impl<'a> Dense<'a> {
    /// Prepare the sums of `terms`, to `rank` or what there is if that is less.
    ///
    /// # Errors
    /// The density is out of range, or the rank is zero; the adapters' modules fit different base
    /// models; not even one module, dense, fits into the memory budget.
    pub fn new(
        terms: &'a Terms<'a>,
        sparsity: Sparsity,
        rank: usize,
        options: Options,
    ) -> Result<Self> {
        sparsity.check()?;
        terms.plain(sparsity.rule.name())?;
        if rank == 0 {
            return Err(Error::Setting("rank is 0, expected 1 or more".into()));
        }
        let joints = joint_modules(&terms.adapters)?;
        let most = joints.iter().map(|joint| joint.columns().min(joint.outer)).max();
        let rank = rank.min(most.unwrap_or(rank)).max(1);
        let prunes = sparsity.rule.prunes();
        let targets = terms.targets();
        let need = |joint: &Joint| {
            let (rows, columns) = (joint.outer, joint.columns());
            let inner = joint.holders.iter().map(|share| share.rank).max().unwrap_or(0);
            let block = rows_at_a_time(joint) * columns;
            let bytes = if options.io == Io::Read { widest_type(terms, joint) } else { 0 };
            let factors = inner * (4 * (rows + columns) + bytes * rows.max(columns));
            let search = if prunes { Search::need(rows * columns) } else { 0 };
            let sums = block * (4 + Sums::need(targets));
            let kept = 4 * rank * joint.module.experts * (targets * (rows + columns) + rows);
            let low = low::need(rows, columns, rank) + 16 * rank * (rows + columns) + kept;
            // Buffers are kept from module to module, also while a sum is decomposed.
            4 * rows * columns * targets + factors + search + sums + low + joint.held()
        };
        let need = joints.iter().map(need).max().unwrap_or(0);
        let plan = Plan::of_modules(&terms.adapters, &joints, |_| [1, 1], need, &options)?;
        let masks = Masks::hashed(&terms.adapters, &sparsity);
        let mut job = Self { terms, joints, sparsity, masks, rank, options, plan };
        job.plan.bytes = job.joints.iter().map(|joint| job.reads(joint)).sum();
        Ok(job)
    }

    /// What the job will read, at least, and take.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Each target's rank.
    pub fn ranks(&self) -> Vec<usize> {
        vec![self.rank; self.terms.targets()]
    }

    /// Write one safetensors file of type `dtype` for each target, all of scaling 1, with U√S as B
    /// and √S Vᵀ as A. None appears before all are complete.
    ///
    /// # Errors
    /// A file cannot be read or written, or changed meanwhile; a number is not finite; `watch`
    /// said to stop.
    pub fn write(&self, outputs: &[PathBuf], dtype: Dtype, watch: &Watch) -> Result<()> {
        let options = &self.options;
        let reader = Reader::open(&self.terms.adapters, options.io, options.allow_nan, watch)?;
        let writers = create(&self.joints, outputs, &self.ranks(), dtype)?;
        let work = |worker: &mut Worker, index: usize| {
            let mut lows = vec![vec![]; writers.len()];
            each_expert(&reader, &self.joints[index], |reader, joint| {
                for (matrix, lows) in self.sums(worker, joint, reader)?.into_iter().zip(&mut lows) {
                    if matrix.is_empty() {
                        continue;
                    }
                    watch.go_on()?;
                    if !matrix.iter().all(|x| x.is_finite()) {
                        let tensor = joint.module.tensor_name(Factor::B);
                        return Err(Error::Overflow { tensor, dtype });
                    }
                    let low = best(&matrix, joint.outer, self.rank)?;
                    let columns = |side: &Mat<f64>| -> Vec<f32> {
                        let all = (0..side.ncols()).flat_map(|j| side.col(j).iter());
                        all.map(|&x| x as f32).collect()
                    };
                    lows.push((columns(&low.a), columns(&low.b)));
                }
                Ok(())
            })?;
            for (lows, writer) in lows.iter().zip(&writers).filter(|(lows, _)| !lows.is_empty()) {
                let factors = lows.iter().map(|(a, b)| (&a[..], &b[..]));
                let checks = (dtype, options.allow_nan);
                put_columns(&self.joints, writer, index, self.rank, factors, checks)?;
            }
            Ok(())
        };
        each_on_threads(self.joints.len(), self.plan.threads, watch, Worker::default, work)?;
        reader.still_unchanged()?;
        Writer::finish(writers, watch)
    }

    /// Each module's sum for the first target, before its rank is brought down.
    #[cfg(test)]
    pub(super) fn merged(&self, reader: &Reader<'_>) -> Vec<(String, Vec<f32>)> {
        let sum = |joint| self.sums(&mut Worker::default(), joint, reader).unwrap().swap_remove(0);
        self.joints.iter().map(|joint| (joint.module.name.clone(), sum(joint))).collect()
    }

    fn scheme(&self, joint: &Joint) -> Scheme {
        Scheme::new(&self.sparsity, self.terms, joint, |coefficient, _| coefficient)
    }

    /// The bytes that a module takes to read where no ties must be told apart.
    fn reads(&self, joint: &Joint) -> u64 {
        let scheme = self.scheme(joint);
        let blocks = joint.outer.div_ceil(rows_at_a_time(joint)) as u64;
        let size = |(holder, share): (usize, &Share)| {
            let (used, cut) = (u64::from(scheme.uses(holder)), u64::from(scheme.cuts(holder)));
            let a = size(self.terms, share, Factor::A) * (used * blocks + cut);
            let times = if joint.module.experts == 1 { used + cut } else { joint.readings() };
            a + size(self.terms, share, Factor::B) * times
        };
        joint.holders.iter().enumerate().map(size).sum()
    }

    /// For each target the sum of its ΔW in a module, row by row; nothing where it has none.
    fn sums(
        &self,
        worker: &mut Worker,
        joint: &Joint,
        reader: &Reader<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        let Worker { bytes, a, b, delta, search, sums } = worker;
        let scheme = self.scheme(joint);
        let (rows, columns, together) = (joint.outer, joint.columns(), rows_at_a_time(joint));
        let (count, kept) = (rows * columns, self.sparsity.kept(rows * columns));
        let inner = joint.holders.iter().map(|share| share.rank).max().unwrap_or(0);
        a.resize(inner * columns, 0.0);
        b.resize(inner * rows, 0.0);
        delta.resize(together * columns, 0.0);
        let blocks = || (0..rows).step_by(together).map(|from| from..rows.min(from + together));
        let product = |share: &Share, a: &[f32], b: &[f32], delta: &mut [f32]| {
            let rank = share.rank;
            let a = MatRef::from_row_major_slice(&a[..rank * columns], rank, columns);
            let b = MatRef::from_row_major_slice(b, b.len() / rank, rank);
            let c = MatMut::from_row_major_slice_mut(delta, b.nrows(), columns);
            multiply(c, b, a, self.terms.strength(share.adapter, share.module) as f32);
        };
        let mut cuts = Vec::with_capacity(joint.holders.len());
        for (holder, share) in joint.holders.iter().enumerate() {
            if !scheme.cuts(holder) {
                cuts.push(Cut::NONE);
                continue;
            }
            let rank = share.rank;
            reader.read(*share, Factor::A, 0..rank * columns, bytes, a)?;
            reader.read(*share, Factor::B, 0..rank * rows, bytes, b)?;
            cuts.push(search.cut(kept, count, |visit| {
                for block in blocks() {
                    reader.go_on()?;
                    let delta = &mut delta[..block.len() * columns];
                    product(share, a, &b[block.start * rank..block.end * rank], delta);
                    visit(delta);
                }
                Ok(())
            })?);
        }
        let targets = self.terms.targets();
        let has = |target| if scheme.has(target) { count } else { 0 };
        let mut merged: Vec<Vec<f32>> = (0..targets).map(|target| vec![0.0; has(target)]).collect();
        for block in blocks() {
            let start = block.start * columns;
            let delta = &mut delta[..block.len() * columns];
            sums.clear(&scheme, delta.len());
            for (holder, share) in joint.holders.iter().enumerate() {
                if !scheme.uses(holder) {
                    continue;
                }
                let rank = share.rank;
                let range = block.start * rank..block.end * rank;
                reader.read(*share, Factor::A, 0..rank * columns, bytes, a)?;
                reader.read(*share, Factor::B, range.clone(), bytes, b)?;
                product(share, a, &b[..range.len()], delta);
                let rule = self.sparsity.rule;
                sums.add(&scheme, &[holder], delta, |_, at, delta, kept| match rule {
                    Rule::Linear => kept.copy_from_slice(delta),
                    Rule::MagnitudePrune | Rule::Ties => {
                        cuts[holder].apply(start + at, delta, kept);
                    }
                    Rule::DareLinear | Rule::DareTies => {
                        let (name, who) = (&joint.module.name, share.adapter);
                        self.masks.apply(name, None, who, start + at, delta, kept);
                    }
                });
            }
            for (target, merged) in merged.iter_mut().enumerate() {
                if !merged.is_empty() {
                    let sum = sums.finish(&scheme, target);
                    merged[start..start + sum.len()].copy_from_slice(sum);
                }
            }
        }
        Ok(merged)
    }
}

/// The rows of a ΔW that are formed at a time.
fn rows_at_a_time(joint: &Joint) -> usize {
    (BLOCK / joint.columns().max(1)).clamp(1, joint.outer.max(1))
}
