//! Sums of some columns that are kept apart by sign until all adapters have voted: so they need one
//! pass, and memory that does not depend on the number of adapters.

use super::{Majority, Rule, Sparsity};
use crate::{Dtype, joint::Joint, kernels::widest, terms::Terms};

/// So many columns are summed at a time: their sums should stay in the L1 cache while a few holders
/// go by.
const STRIP: usize = 512;

/// What the targets take of a module's holders.
pub(super) struct Scheme {
    rule: Rule,
    majority: Majority,
    density: f64,
    /// For each holder and target a weight; none where the target does not use the adapter.
    weights: Vec<Vec<Option<f32>>>,
    ways: Vec<Way>,
    elections: usize,
}

/// What becomes of a target's members.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// They are summed as they are.
    Whole,
    /// They are thinned out, and summed.
    Thinned,
    /// They are thinned out, and summed where their sign is the elected one.
    Elected(usize),
}

impl Scheme {
    /// `weight` turns a coefficient and a strength into what a member is multiplied with.
    pub(super) fn new(
        sparsity: &Sparsity,
        terms: &Terms<'_>,
        joint: &Joint,
        weight: impl Fn(f64, f64) -> f64,
    ) -> Self {
        let of = |share: &crate::joint::Share, target| {
            let coefficient = terms.coefficient(target, share.adapter, share.module);
            let strength = terms.strength(share.adapter, share.module);
            (coefficient != 0.0).then(|| weight(coefficient, strength) as f32)
        };
        let targets = 0..terms.targets();
        let weights: Vec<Vec<Option<f32>>> = joint
            .holders
            .iter()
            .map(|share| targets.clone().map(|target| of(share, target)).collect())
            .collect();
        // Signs are elected by all of a target's members alike, so that targets with the same
        // members share an election.
        let mut elections: Vec<Vec<bool>> = Vec::new();
        let way = |target: usize| {
            let used = |adapter: &usize| !terms.is_without(target, *adapter);
            if sparsity.rule == Rule::Linear || (0..terms.adapters.len()).filter(used).count() == 1
            {
                return Way::Whole;
            }
            if !matches!(sparsity.rule, Rule::Ties | Rule::DareTies) {
                return Way::Thinned;
            }
            let voters: Vec<bool> = weights.iter().map(|row| row[target].is_some()).collect();
            let known = elections.iter().position(|known| *known == voters);
            Way::Elected(known.unwrap_or_else(|| {
                elections.push(voters);
                elections.len() - 1
            }))
        };
        let ways = targets.clone().map(way).collect();
        let (rule, majority, density) = (sparsity.rule, sparsity.majority, sparsity.density);
        Self { rule, majority, density, weights, ways, elections: elections.len() }
    }

    /// Whether any target uses a holder.
    pub(super) fn uses(&self, holder: usize) -> bool {
        self.weights[holder].iter().any(Option::is_some)
    }

    /// Whether any target needs a holder's largest numbers.
    pub(super) fn cuts(&self, holder: usize) -> bool {
        self.rule.prunes() && self.density < 1.0 && self.thins(holder)
    }

    fn thins(&self, holder: usize) -> bool {
        self.used(holder).any(|(_, _, way)| way != Way::Whole)
    }

    /// The targets that use a holder, by which weight and in which way.
    fn used(&self, holder: usize) -> impl Iterator<Item = (usize, f32, Way)> {
        let targets = self.weights[holder].iter().zip(&self.ways).enumerate();
        targets.filter_map(|(target, (weight, way))| weight.map(|weight| (target, weight, *way)))
    }

    /// Whether a target has anything of the module.
    pub(super) fn has(&self, target: usize) -> bool {
        self.weights.iter().any(|row| row[target].is_some())
    }
}

/// The sums of some columns.
#[derive(Default)]
pub(super) struct Sums {
    columns: usize,
    /// A row for each target: its sum, or that over positive numbers; and that over negative ones.
    up: Vec<f32>,
    down: Vec<f32>,
    /// A row for each election: the sum over all members, and how many have which sign.
    totals: Vec<f64>,
    ups: Vec<u16>,
    downs: Vec<u16>,
}

impl Sums {
    /// What a column takes at most, in bytes.
    pub(super) fn need(targets: usize) -> usize {
        20 * targets
    }

    /// Begin `columns` of them.
    pub(super) fn clear(&mut self, scheme: &Scheme, columns: usize) {
        fn zeros<T: Default + Clone>(all: &mut Vec<T>, count: usize) {
            all.clear();
            all.resize(count, T::default());
        }
        self.columns = columns;
        let elected = if scheme.elections > 0 { scheme.ways.len() } else { 0 };
        zeros(&mut self.up, scheme.ways.len() * columns);
        zeros(&mut self.down, elected * columns);
        zeros(&mut self.totals, scheme.elections * columns);
        zeros(&mut self.ups, scheme.elections * columns);
        zeros(&mut self.downs, scheme.elections * columns);
    }

    /// Add a row of numbers for each of `holders`. `thin` writes what is left of a holder's numbers
    /// from some column on.
    pub(super) fn add(
        &mut self,
        scheme: &Scheme,
        holders: &[usize],
        numbers: &[f32],
        thin: impl Fn(usize, usize, &[f32], &mut [f32]),
    ) {
        let mut thinned = [0.0; STRIP];
        for start in (0..self.columns).step_by(STRIP) {
            let end = self.columns.min(start + STRIP);
            for (&holder, row) in holders.iter().zip(numbers.chunks(self.columns)) {
                let strip = &row[start..end];
                for (target, weight, way) in scheme.used(holder) {
                    if way == Way::Whole {
                        add(&mut self.up[target * self.columns..][start..end], strip, weight);
                    }
                }
                if scheme.thins(holder) {
                    let thinned = &mut thinned[..strip.len()];
                    thin(holder, start, strip, thinned);
                    self.add_thinned(scheme, holder, thinned, start);
                }
            }
        }
    }

    /// Add what is left of a holder's numbers from column `start` on.
    fn add_thinned(&mut self, scheme: &Scheme, holder: usize, numbers: &[f32], start: usize) {
        let sparse = widest().sparse;
        let strip = |index: usize| {
            let start = index * self.columns + start;
            start..start + numbers.len()
        };
        let mut voted = 0; // elections are numbered in the order of their first targets
        for (target, weight, way) in scheme.used(holder) {
            match way {
                Way::Whole => {}
                Way::Thinned => add(&mut self.up[strip(target)], numbers, weight),
                Way::Elected(election) => {
                    let (up, down) = (&mut self.up[strip(target)], &mut self.down[strip(target)]);
                    (sparse.add_by_sign)(numbers, weight, up, down);
                    if election >= voted {
                        let strip = strip(election);
                        let totals = &mut self.totals[strip.clone()];
                        let (ups, downs) = (&mut self.ups[strip.clone()], &mut self.downs[strip]);
                        (sparse.vote)(numbers, totals, ups, downs);
                        voted = election + 1;
                    }
                }
            }
        }
    }

    /// A target's result.
    pub(super) fn finish(&mut self, scheme: &Scheme, target: usize) -> &[f32] {
        let row = |index: usize| index * self.columns..(index + 1) * self.columns;
        let sums = &mut self.up[row(target)];
        let way = scheme.ways[target];
        if let Way::Elected(election) = way {
            let numbers = [&self.ups, &self.downs].map(|numbers| &numbers[row(election)]);
            let (down, totals) = (&self.down[row(target)], &self.totals[row(election)]);
            let by_number = scheme.majority == Majority::Frequency;
            (widest().sparse.elect)(sums, down, totals, numbers, by_number);
        }
        if way != Way::Whole && matches!(scheme.rule, Rule::DareLinear | Rule::DareTies) {
            // What random pruning left stands for all of it. (A sign is elected as well before.)
            let scale = (1.0 / scheme.density) as f32;
            sums.iter_mut().for_each(|sum| *sum *= scale);
        }
        sums
    }
}

/// Add `weight` times `numbers` to `sums`.
fn add(sums: &mut [f32], numbers: &[f32], weight: f32) {
    let rows = [bytemuck::cast_slice(numbers)];
    (widest().add_products)(sums, sums.len(), Dtype::F32, &rows, &[weight], false);
}
