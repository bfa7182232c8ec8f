//! `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune`, as PEFT computes them: each
//! factor on its own, thinned out before it is summed. [`Dense`] does the same with ΔW.
//!
//! With w the coefficient and s the strength, B is summed with √|w s| and A with sign(w s) √|w s|.
//! A target that uses a single adapter takes it whole, whatever the rule; an adapter whose
//! coefficient is zero has no vote.

mod cut;
mod dense;
mod low;
mod masks;
mod sums;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use crate::{
    Dtype, Io,
    blocks::{Options, Plan},
    error::{Error, Result},
    joint::{Joint, Reader, Share, each_on_threads, joint_modules},
    layout::Factor,
    merge::cat::{create, put},
    terms::Terms,
    watch::Watch,
    writer::Writer,
};
use cut::{Cut, Search};
pub use dense::Dense;
use masks::Masks;
use sums::{Scheme, Sums};

/// What becomes of the members before they are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Nothing.
    Linear,
    /// Only the largest numbers of each tensor stay.
    MagnitudePrune,
    /// As before; then only those of the sign that most have, and their mean in place of the sum.
    Ties,
    /// Random numbers stay, rescaled to stand for all.
    DareLinear,
    /// As before; then signs and mean as with `Ties`.
    DareTies,
}

impl Rule {
    /// Whether the largest numbers stay.
    fn prunes(self) -> bool {
        matches!(self, Self::MagnitudePrune | Self::Ties)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::MagnitudePrune => "magnitude_prune",
            Self::Ties => "ties",
            Self::DareLinear => "dare_linear",
            Self::DareTies => "dare_ties",
        }
    }
}

/// Which sign most have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Majority {
    /// That of the sum of the members.
    Total,
    /// That of the greater number of members.
    Frequency,
}

/// How members are thinned out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sparsity {
    /// What is done.
    pub rule: Rule,
    /// The share of the numbers that stays, in (0, 1].
    pub density: f64,
    /// Which sign is elected.
    pub majority: Majority,
    /// Of the random numbers.
    pub seed: u64,
}

impl Sparsity {
    fn check(&self) -> Result<()> {
        if self.rule == Rule::Linear || (self.density > 0.0 && self.density <= 1.0) {
            return Ok(());
        }
        let text = format!(
            "density is {}, expected a share of the numbers in (0, 1]; 1 keeps all",
            self.density
        );
        Err(Error::Setting(text))
    }

    /// How many of `count` numbers stay where the largest do.
    fn kept(&self, count: usize) -> usize {
        (self.density * count as f64) as usize
    }
}

/// The longest run of columns that is summed at a time, and about what its sums take, in bytes:
/// they should stay in the L2 cache while the members go by.
const LONGEST: usize = 8192;
const SUMMED: usize = 256 << 10;

/// What the sums of a whole factor may take, in bytes, for it to be read but once where its largest
/// numbers are looked for first: so they stay in the L3 cache.
const AT_ONCE: usize = 2 << 20;

/// The holders that are read before they are summed.
const TOGETHER: usize = 8;

/// Sums of thinned out factors.
pub struct Sparse<'a> {
    terms: &'a Terms<'a>,
    joints: Vec<Joint>,
    ranks: Vec<usize>,
    sparsity: Sparsity,
    masks: Masks,
    options: Options,
    plan: Plan,
}

/// One thread's buffers, kept from tensor to tensor.
#[derive(Default)]
struct Worker {
    bytes: Vec<u8>,
    numbers: Vec<f32>,
    search: Search,
    sums: Sums,
    padded: Vec<f32>,
}

impl<'a> Sparse<'a> {
    /// Prepare the sums of `terms`.
    ///
    /// # Errors
    /// The density is out of range; a module has another rank in one adapter than in another; the
    /// memory budget is too small.
    pub fn new(terms: &'a Terms<'a>, sparsity: Sparsity, options: Options) -> Result<Self> {
        sparsity.check()?;
        terms.plain(sparsity.rule.name())?;
        let joints = joint_modules(&terms.adapters)?;
        joints.iter().try_for_each(|joint| equal_ranks(terms, joint))?;
        let masks = Masks::hashed(&terms.adapters, &sparsity);
        let (targets, rule) = (terms.targets(), sparsity.rule);
        let need = |joint: &Joint| {
            let of = |factor| {
                let (count, step) = (count(joint, factor), step(joint, factor, targets, rule));
                let rows = step * TOGETHER.min(joint.holders.len());
                let read = if rule.prunes() { count } else { step };
                let bytes =
                    if options.io == Io::Read { read * widest_type(terms, joint) } else { 0 };
                let search = if rule.prunes() { Search::need_here(count) } else { 0 };
                bytes + 4 * read.max(rows) + search + step * (Sums::need(targets) + 4)
            };
            of(Factor::A).max(of(Factor::B))
        };
        let need = joints.iter().map(need).max().unwrap_or(0);
        let plan = Plan::of_modules(&terms.adapters, &joints, |_| [1, 1], need, &options)?;
        let ranks = ranks(terms, &joints);
        let mut job = Self { terms, joints, ranks, sparsity, masks, options, plan };
        job.plan.bytes = (0..2 * job.joints.len()).map(|unit| job.reads(unit)).sum();
        Ok(job)
    }

    /// What the job will read and take.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Each target's rank: the largest of its modules.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Write one safetensors file of type `dtype` for each target, all of scaling 1; a module of
    /// less than the target's rank has rows and columns of zeros at the end. None appears before
    /// all are complete.
    ///
    /// # Errors
    /// A file cannot be read or written, or changed meanwhile; a number is not finite; `watch`
    /// said to stop.
    pub fn write(&self, outputs: &[PathBuf], dtype: Dtype, watch: &Watch) -> Result<()> {
        let options = &self.options;
        let reader = Reader::open(&self.terms.adapters, options.io, options.allow_nan, watch)?;
        let ranks = &self.ranks;
        let writers = create(&self.joints, outputs, ranks, dtype)?;
        let work = |worker: &mut Worker, unit: usize| {
            self.merge(worker, unit, &reader, |(target, rank), start, numbers| {
                let (index, factor) = (unit / 2, factor(unit));
                let expert = rank * self.joints[index].columns();
                let at = match factor {
                    Factor::A => start + start / expert * (expert / rank) * (ranks[target] - rank),
                    Factor::B => start / rank * ranks[target],
                };
                let checks = (dtype, options.allow_nan);
                put(&self.joints, &writers[target], (index, factor), at, numbers, checks)
            })
        };
        let units = 2 * self.joints.len();
        each_on_threads(units, self.plan.threads, watch, Worker::default, work)?;
        reader.still_unchanged()?;
        Writer::finish(writers, watch)
    }

    /// How the members of a factor are weighted.
    fn scheme(&self, unit: usize) -> Scheme {
        Scheme::new(&self.sparsity, self.terms, &self.joints[unit / 2], |w, s| {
            let root = (w * s).abs().sqrt();
            if factor(unit) == Factor::A && w * s < 0.0 { -root } else { root }
        })
    }

    /// The bytes that one factor of one module takes to read.
    fn reads(&self, unit: usize) -> u64 {
        let (joint, factor, scheme) = (&self.joints[unit / 2], factor(unit), self.scheme(unit));
        let again = self.step(joint, factor) < count(joint, factor);
        let size = |(holder, share): (usize, &Share)| {
            let passes = u64::from(scheme.uses(holder)) + u64::from(again && scheme.cuts(holder));
            passes * size(self.terms, share, factor)
        };
        joint.holders.iter().enumerate().map(size).sum()
    }

    /// The numbers of a factor that are summed at a time; all, where it is to be read once.
    fn step(&self, joint: &Joint, factor: Factor) -> usize {
        step(joint, factor, self.terms.targets(), self.sparsity.rule)
    }

    /// One factor of one module: `done` takes for each target and its rank here what begins at
    /// some place, padded to the target's rank.
    fn merge(
        &self,
        worker: &mut Worker,
        unit: usize,
        reader: &Reader<'_>,
        done: impl Fn((usize, usize), usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let (joint, factor) = (&self.joints[unit / 2], factor(unit));
        let Worker { bytes, numbers, search, sums, padded } = worker;
        let scheme = self.scheme(unit);
        let (rank, experts) = (joint.module.rank, joint.module.experts);
        let (count, step) = (count(joint, factor), self.step(joint, factor));
        let kept = self.sparsity.kept(count);
        let used: Vec<usize> =
            (0..joint.holders.len()).filter(|&holder| scheme.uses(holder)).collect();
        let mut cuts = vec![Cut::NONE; joint.holders.len()];
        if step < count {
            for &holder in used.iter().filter(|&&holder| scheme.cuts(holder)) {
                numbers.resize(count.max(numbers.len()), 0.0);
                let numbers = &mut numbers[..count];
                reader.read(joint.holders[holder], factor, 0..count, bytes, numbers)?;
                cuts[holder] = search.cut_here(kept, numbers)?;
            }
        }
        let (targets, ranks, rule) = (self.terms.targets(), &self.ranks, self.sparsity.rule);
        for start in (0..count).step_by(step.max(1)) {
            let range = start..count.min(start + step);
            sums.clear(&scheme, range.len());
            for holders in used.chunks(TOGETHER) {
                numbers.resize((holders.len() * range.len()).max(numbers.len()), 0.0);
                let numbers = &mut numbers[..holders.len() * range.len()];
                for (&holder, row) in holders.iter().zip(numbers.chunks_mut(range.len())) {
                    reader.read(joint.holders[holder], factor, range.clone(), bytes, row)?;
                    if step == count && scheme.cuts(holder) {
                        cuts[holder] = search.cut_here(kept, row)?;
                    }
                }
                sums.add(&scheme, holders, numbers, |holder, at, row, kept| match rule {
                    Rule::Linear => kept.copy_from_slice(row),
                    Rule::MagnitudePrune | Rule::Ties => {
                        cuts[holder].apply(start + at, row, kept);
                    }
                    Rule::DareLinear | Rule::DareTies => {
                        let (name, who) = (&joint.module.name, joint.holders[holder].adapter);
                        let start = start + at;
                        self.masks.apply(name, Some(factor), who, start, row, kept);
                    }
                });
            }
            for target in (0..targets).filter(|target| scheme.has(*target)) {
                let sum = sums.finish(&scheme, target);
                if factor == Factor::A || ranks[target] == rank {
                    done((target, rank), start, sum)?;
                    continue;
                }
                padded.clear();
                padded.resize(sum.len() / rank * ranks[target], 0.0);
                let rows = padded.chunks_mut(ranks[target] * experts);
                for (to, from) in rows.zip(sum.chunks(rank * experts)) {
                    to[..from.len()].copy_from_slice(from);
                }
                done((target, rank), start, padded)?;
            }
        }
        Ok(())
    }
}

/// The largest rank of the modules that each target uses.
fn ranks(terms: &Terms<'_>, joints: &[Joint]) -> Vec<usize> {
    let uses = |target: usize, joint: &&Joint| {
        joint.holders.iter().any(|share| terms.takes(target, share))
    };
    let rank = |target: usize| {
        let used = joints.iter().filter(|joint| uses(target, joint));
        used.map(|joint| joint.module.rank).max().unwrap_or(1)
    };
    (0..terms.targets()).map(rank).collect()
}

/// The two factors of a module are worked on apart.
fn factor(unit: usize) -> Factor {
    if unit.is_multiple_of(2) { Factor::A } else { Factor::B }
}

/// The numbers of a factor.
fn count(joint: &Joint, factor: Factor) -> usize {
    joint.shape(factor, joint.module.rank).iter().product()
}

/// So many of them are summed at a time: of B whole rows, and of A none of two experts, because those
/// may be apart in what is written.
fn step(joint: &Joint, factor: Factor, targets: usize, rule: Rule) -> usize {
    let (count, experts) = (count(joint, factor), joint.module.experts);
    let row = match factor {
        Factor::A if experts > 1 => return joint.columns().min(count),
        Factor::A => 1,
        Factor::B => joint.module.rank * experts,
    };
    let need = Sums::need(targets);
    if rule.prunes() && count * need <= AT_ONCE {
        return count;
    }
    let fits = (SUMMED / need).clamp(256, LONGEST);
    ((fits / row).max(1) * row).min(count)
}

/// # Errors
/// A module has another rank in one adapter than in another, so that its factors cannot be summed.
fn equal_ranks(terms: &Terms<'_>, joint: &Joint) -> Result<()> {
    let Some(odd) = joint.holders.iter().find(|share| share.rank != joint.module.rank) else {
        return Ok(());
    };
    Err(Error::Shape {
        path: terms.adapters[odd.adapter].path.clone(),
        tensor: joint.module.tensor_name(Factor::A),
        found: joint.shape(Factor::A, odd.rank),
        other: terms.adapters[joint.holders[0].adapter].path.clone(),
        expected: joint.shape(Factor::A, joint.module.rank),
    })
}

/// The size of a factor in the file of one of a module's holders.
fn size(terms: &Terms<'_>, share: &Share, factor: Factor) -> u64 {
    let layout = &terms.adapters[share.adapter].layout;
    let bytes = &layout.tensors[layout.modules[share.module].tensor(factor)].bytes;
    bytes.end - bytes.start
}

/// The widest type that any holder has a module in, in bytes.
fn widest_type(terms: &Terms<'_>, joint: &Joint) -> usize {
    let types = joint.holders.iter().flat_map(|share| {
        let layout = &terms.adapters[share.adapter].layout;
        let module = &layout.modules[share.module];
        [module.a, module.b].map(|tensor| layout.tensors[tensor].width())
    });
    types.max().unwrap_or(4)
}
