//! `svd`: the best approximation of Σ c_i s_i B_i A_i of a given rank, without ever forming it.

pub(super) mod dense;
mod dora;
mod sketch;
mod stacked;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, sync::Mutex};

use crate::{
    Dtype,
    base::{Base, Weight},
    blocks::{Options, Plan},
    error::{Error, Result},
    experts::each_expert,
    joint::{Joint, Reader, each_on_threads, joint_modules},
    merge::cat::{create, put_columns},
    terms::Terms,
    watch::Watch,
    writer::Writer,
};
pub use dora::dora_norms;
use sketch::Sketch;
pub(crate) use sketch::gaussian;
use stacked::Stacked;

/// Up to this sum of ranks a module is decomposed exactly. Measured with `benches/svd.py` on 96
/// modules of a 7B model: 384 ranks take 2.1 s exactly and 1.1 s by a sketch, 512 take 7.8 s and
/// 1.2 s, because two threads no longer have room for their cores in the usual budget.
const EXACT: usize = 384;

/// Power iterations that bring the error of a sketch to within 2 % of the least possible: see
/// `benches/svd.py`.
pub const ITERATIONS: u32 = 2;

/// The largest rank that is looked for to keep a share of the energy of a sketched module.
const WIDEST: usize = 128;

/// The rank of the result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rank {
    /// This one, or what there is if that is less.
    Fixed(usize),
    /// The smallest that keeps this share of the energy in every module.
    Energy(f64),
}

/// What a rank keeps of a module's ΔW.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// The module's name.
    pub module: String,
    /// The squared Frobenius norm of Σ c_i s_i B_i A_i.
    pub energy: f64,
    /// That of its approximation.
    pub kept: f64,
    /// Whether `energy` is exact, and not an estimate from a sketch.
    pub exact: bool,
}

/// A module's sum at a low rank.
struct Low {
    /// r × in, row by row.
    a: Vec<f32>,
    /// r × out: B transposed.
    b: Vec<f32>,
    /// All singular values that are known, largest first.
    values: Vec<f64>,
    /// The squared Frobenius norm of the whole sum.
    energy: f64,
}

/// The approximation of sums of ΔW.
pub struct Svd<'a> {
    terms: &'a Terms<'a>,
    joints: Vec<Joint>,
    /// For each module what DoRA adapters change there.
    weights: Vec<Option<Weight<'a>>>,
    rank: Rank,
    sketch: Sketch,
    options: Options,
    plan: Plan,
    /// Up to which sum of ranks modules are decomposed exactly, in this budget.
    exact: usize,
}

impl<'a> Svd<'a> {
    /// Prepare the sums of `terms`. Modules whose ranks add up to more than can be decomposed
    /// exactly are sketched, as are those of DoRA, whose ΔW has full rank: with random numbers from
    /// `seed`, and as many power iterations as `iterations`.
    ///
    /// # Errors
    /// The adapters' modules fit different base models; the rank cannot be; the memory budget is
    /// too small; the base's weights of a DoRA module are not given, or do not fit.
    pub fn new(
        terms: &'a Terms<'a>,
        rank: Rank,
        seed: u64,
        iterations: u32,
        options: Options,
    ) -> Result<Self> {
        let widest = match rank {
            Rank::Fixed(0) => return Err(Error::Setting("rank is 0, expected 1 or more".into())),
            Rank::Fixed(rank) => rank,
            Rank::Energy(share) if share > 0.0 && share <= 1.0 => WIDEST,
            Rank::Energy(share) => {
                let text = format!("energy is {share}, expected a share in (0, 1]");
                return Err(Error::Setting(text));
            }
        };
        let joints = joint_modules(&terms.adapters)?;
        let weights =
            joints.iter().map(|joint| weight(terms, joint)).collect::<Result<Vec<_>>>()?;
        let targets = terms.targets();
        let sketch = Sketch { rank: widest, seed, iterations };
        let exact_need = |joint: &Joint| Stacked::need(joint, widest, targets);
        let sketch_need = |joint: &Joint| {
            sketch.need(joint, targets) + if joint.dora { dora::need(joint, targets) } else { 0 }
        };
        let mut exact = EXACT;
        let need = |exact: usize| {
            let one = |joint: &Joint| {
                let own =
                    if is_exact(joint, exact) { exact_need(joint) } else { sketch_need(joint) };
                own + joint.held() + lows_need(joint, widest, targets)
            };
            joints.iter().map(one).max().unwrap_or(0)
        };
        // A sketch takes less; without room for the largest core, all that are as large are sketched.
        if need(exact) > options.memory {
            let fits = joints
                .iter()
                .filter(|joint| is_exact(joint, exact) && exact_need(joint) > options.memory);
            exact = fits.map(Joint::ranks).min().map_or(exact, |ranks| ranks - 1).min(exact);
        }
        let passes = if matches!(rank, Rank::Energy(_)) { 2 } else { 1 };
        let times = |joint: &Joint| {
            let a = passes * if is_exact(joint, exact) { 1 } else { sketch.passes() };
            let b = if joint.module.experts == 1 { a } else { passes * joint.readings() };
            [a, b]
        };
        let mut plan = Plan::of_modules(&terms.adapters, &joints, times, need(exact), &options)?;
        let of_base = |(joint, weight): (&Joint, &Option<Weight<'_>>)| {
            passes * weight.map_or(0, |weight| dora::reads(terms, joint, weight, sketch.passes()))
        };
        plan.bytes += joints.iter().zip(&weights).map(of_base).sum::<u64>();
        Ok(Self { terms, joints, weights, rank, sketch, options, plan, exact })
    }

    /// What the job will read and take.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Whether every module is decomposed exactly.
    pub fn is_exact(&self) -> bool {
        self.joints.iter().all(|joint| is_exact(joint, self.exact))
    }

    /// Write one safetensors file of type `dtype` for each target, and answer what each keeps of
    /// each module. None appears before all are complete.
    ///
    /// # Errors
    /// A file cannot be read or written, or changed meanwhile; a number is not finite; no rank
    /// keeps the energy that was asked for; `watch` said to stop.
    pub fn write(
        &self,
        outputs: &[PathBuf],
        dtype: Dtype,
        watch: &Watch,
    ) -> Result<Vec<(usize, Vec<Kept>)>> {
        let options = &self.options;
        let reader = Reader::open(&self.terms.adapters, options.io, options.allow_nan, watch)?;
        let ranks = self.ranks(&reader, watch)?;
        let writers = create(&self.joints, outputs, &ranks, dtype)?;
        let widest = ranks.iter().copied().max().unwrap_or(0);
        let found = self.each(&reader, watch, widest, |index, lows| {
            let joint = &self.joints[index];
            // A sketch of DoRA has measured its energy.
            let exact = is_exact(joint, self.exact) || joint.dora;
            let one = |((lows, writer), &rank): ((&Vec<Low>, &Writer), &usize)| {
                let factors = lows.iter().map(|low| (&low.a[..], &low.b[..]));
                let checks = (dtype, options.allow_nan);
                put_columns(&self.joints, writer, index, rank, factors, checks)?;
                let (mut energy, mut kept) = (0.0, 0.0);
                for low in lows {
                    let rows = rank.min(low.a.len() / joint.columns().max(1));
                    let own: f64 = low.values.iter().take(rows).map(|s| s * s).sum();
                    energy += if exact { low.energy } else { low.energy.max(own) };
                    kept += own;
                }
                Ok(Kept { module: joint.module.name.clone(), energy, kept, exact })
            };
            lows.iter().zip(&writers).zip(&ranks).map(one).collect::<Result<Vec<_>>>()
        })?;
        reader.still_unchanged()?;
        self.terms.base.map_or(Ok(()), Base::still_unchanged)?;
        Writer::finish(writers, watch)?;
        let of = |target: usize| found.iter().map(|module| module[target].clone()).collect();
        Ok(ranks.iter().enumerate().map(|(target, &rank)| (rank, of(target))).collect())
    }

    /// Each target's rank.
    fn ranks(&self, reader: &Reader<'_>, watch: &Watch) -> Result<Vec<usize>> {
        let share = match self.rank {
            Rank::Fixed(rank) => {
                // As if each target were alone: of the adapters that it takes.
                let most = |target| self.joints.iter().map(|joint| self.most(target, joint)).max();
                let targets = 0..self.terms.targets();
                return Ok(targets.map(|target| rank.min(most(target).unwrap_or(0))).collect());
            }
            Rank::Energy(share) => share,
        };
        let needed = self.each(reader, watch, 0, |index, lows| {
            let joint = &self.joints[index];
            let one = |low: &Low| {
                let mut kept = 0.0;
                let energy = match is_exact(joint, self.exact) {
                    // Of the values themselves, so that rounding cannot keep the whole out of reach.
                    true => low.values.iter().rev().map(|s| s * s).sum::<f64>(),
                    false => low.energy,
                };
                let enough = |s: &f64| {
                    kept += s * s;
                    kept >= share * energy * (1.0 - 1e-12)
                };
                if energy == 0.0 {
                    return Ok(1);
                }
                low.values.iter().position(enough).map(|last| last + 1).ok_or_else(|| {
                    Error::Setting(format!(
                        "rank {} keeps about {:.3} of the energy of `{}`, less than {share}; give \
                         a rank, or ask for less",
                        low.values.len(),
                        kept / energy,
                        joint.module.name
                    ))
                })
            };
            let most = |lows: &Vec<Low>| {
                let ranks = lows.iter().map(one).collect::<Result<Vec<usize>>>()?;
                Ok(ranks.into_iter().max().unwrap_or(1))
            };
            lows.iter().map(most).collect::<Result<Vec<usize>>>()
        })?;
        let largest = |target: usize| needed.iter().map(|module| module[target]).max();
        Ok((0..self.terms.targets()).map(|target| largest(target).unwrap_or(1)).collect())
    }

    /// The largest rank that a target's sum can have in a module; at most, where one is DoRA.
    fn most(&self, target: usize, joint: &Joint) -> usize {
        if joint.dora {
            return joint.columns().min(joint.outer);
        }
        joint.ranks_of(self.terms, target)
    }

    /// What `use_of` makes of each module's sums, for each target and expert, to rank `rank` at most.
    fn each<T: Send>(
        &self,
        reader: &Reader<'_>,
        watch: &Watch,
        rank: usize,
        use_of: impl Fn(usize, &[Vec<Low>]) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let found: Mutex<Vec<(usize, T)>> = Mutex::default();
        each_on_threads(self.joints.len(), self.plan.threads, watch, Vec::new, |bytes, index| {
            let joint = &self.joints[index];
            let mut lows: Vec<Vec<Low>> = (0..self.terms.targets()).map(|_| vec![]).collect();
            each_expert(reader, joint, |reader, joint| {
                let found = if is_exact(joint, self.exact) {
                    Stacked::read(reader, joint, bytes)?.lows(self.terms, joint, rank)?
                } else {
                    let weight = self.weights[index];
                    self.sketch.lows(reader, self.terms, joint, weight, rank, bytes)?
                };
                lows.iter_mut().zip(found).for_each(|(all, low)| all.push(low));
                Ok(())
            })?;
            let made = use_of(index, &lows)?;
            found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((index, made));
            Ok(())
        })?;
        let mut found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        found.sort_by_key(|(index, _)| *index);
        Ok(found.into_iter().map(|(_, made)| made).collect())
    }
}

/// What the sums of experts take until all are made, beside the first and once more as they are
/// written, in bytes.
fn lows_need(joint: &Joint, rank: usize, targets: usize) -> usize {
    let (a, b) = (joint.columns(), joint.outer);
    4 * (joint.module.experts - 1) * (targets * rank.min(joint.ranks()) * (a + b) + rank * b)
}

fn is_exact(joint: &Joint, most: usize) -> bool {
    joint.ranks() <= most && !joint.dora
}

/// The base's weight of a module that any adapter changes by DoRA.
///
/// # Errors
/// It is not given, or does not fit.
fn weight<'a>(terms: &'a Terms<'a>, joint: &Joint) -> Result<Option<Weight<'a>>> {
    if !joint.dora {
        return Ok(None);
    }
    let Some(base) = terms.base else {
        return Err(Error::Setting(format!(
            "`{}` has DoRA members, which need --base-weights",
            joint.module.name
        )));
    };
    let adapter = &terms.adapters[joint.holders[0].adapter].path;
    base.weight(&joint.module.name, [joint.outer, joint.columns()], adapter).map(Some)
}
