//! How far a soup is from the exact sum.
//!
//! With A* = Σ c_i A_i it is D = Σ c_i s_i B_i (A* − A_i). Stacked, D = B C X with the rows
//! X_i = A* − A_i, so ‖D‖² = Σ C_p C_q (X Xᵀ)_pq (BᵀB)_pq: small Gram matrices say it exactly, and
//! no large numbers are subtracted from one another. Where ranks add up to more than these are
//! worth, E ‖D ω‖² = ‖D‖² with Gaussian ω estimates it in one pass.

use std::sync::Mutex;

use faer::{Accum, Mat, MatRef, Par, linalg::matmul::matmul};

use super::{
    deltas::{stack_a, stack_b, sum_of_ranks, view},
    numbers, product32,
};
use crate::{
    blocks::Options,
    error::{Error, Result},
    experts::each_expert,
    joint::{Joint, Reader, each_on_threads, joint_modules},
    layout::Factor,
    merge::gaussian,
    terms::Terms,
    watch::Watch,
};

/// The multiplications that the answer is worth, about a tenth of a second; beyond them modules are
/// sampled, but never fewer than `FEWEST`.
const WORTH: usize = 1 << 31;
const FEWEST: usize = 8;

/// The most multiplications for the Gram matrices of one module.
const EXACT: usize = 1 << 29;

/// At most.
const THREADS: usize = 4;

/// Gaussian vectors of an estimate: of a sum of many members it is then right to a few percent.
const PROBES: usize = 16;

/// What `soup` would make of sums of ΔW.
#[derive(Debug, Clone, PartialEq)]
pub struct SoupErrors {
    /// For each target ‖(Σ c B s)(Σ c A) − Σ c s B A‖ relative to ‖Σ c s B A‖, over all modules.
    pub errors: Vec<f64>,
    /// Whether they are exact, and not estimates or of a sample of modules.
    pub exact: bool,
}

/// ‖soup − exact‖² and ‖exact‖².
type Squares = (f64, f64);

/// How far `soup` is from the exact sum, for each target.
///
/// # Errors
/// The adapters differ in rank, so that there is no soup; otherwise as [`norms`](super::norms).
pub fn soup_errors(terms: &Terms<'_>, options: &Options, watch: &Watch) -> Result<SoupErrors> {
    let joints = joint_modules(&terms.adapters)?;
    let differ = |joint: &Joint| joint.holders.iter().any(|s| s.rank != joint.module.rank);
    if joints.iter().any(differ) {
        return Err(Error::Setting("the adapters differ in rank".to_owned()));
    }
    let reader = Reader::open(&terms.adapters, options.io, options.allow_nan, watch)?;
    // Not a matter of the threads, so that the answer is not: four have room.
    let room = options.memory / THREADS;
    let of_grams =
        |joint: &Joint| gram_work(joint, terms.targets()) <= EXACT && need(joint) <= room;
    let work = |joint: &Joint| {
        let one = match of_grams(joint) {
            true => gram_work(joint, terms.targets()),
            false => 2 * PROBES * joint.ranks() * (joint.columns() + joint.outer),
        };
        joint.module.experts * one
    };
    let mean = joints.iter().map(work).sum::<usize>() / joints.len().max(1);
    let taken = (WORTH / mean.max(1)).max(FEWEST).min(joints.len());
    let sample: Vec<&Joint> = spread(taken, joints.len()).map(|i| &joints[i]).collect();
    let exact = taken == joints.len() && joints.iter().all(of_grams);
    // Of each module and expert, so that the sum does not depend on the threads.
    let squares = Mutex::new(vec![vec![]; taken]);
    each_on_threads(taken, options.cores().min(THREADS), watch, Vec::new, |bytes, index| {
        let joint = sample[index];
        each_expert(&reader, joint, |reader, one| {
            let found = match of_grams(joint) {
                true => by_grams(reader, terms, one, bytes)?,
                false => by_probes(reader, terms, one, bytes)?,
            };
            squares.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[index].push(found);
            Ok(())
        })
    })?;
    let squares = squares.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let error = |target: usize| {
        let all = || squares.iter().flatten().map(|of: &Vec<Squares>| of[target]);
        match all().map(|(difference, _)| difference).sum() {
            0.0 => 0.0,
            difference => (difference / all().map(|(_, whole)| whole).sum::<f64>()).sqrt(),
        }
    };
    Ok(SoupErrors { errors: (0..terms.targets()).map(error).collect(), exact })
}

/// So many different numbers below `of`, far from one another and from any period, such as that of
/// the modules of a layer: multiples of a number near the golden section that is prime to `of`.
fn spread(count: usize, of: usize) -> impl Iterator<Item = usize> {
    fn divisor(a: usize, b: usize) -> usize {
        if b == 0 { a } else { divisor(b, a % b) }
    }
    let golden = (of as f64 * 0.618) as usize;
    let step = (golden..).find(|step| divisor(*step, of) == 1).unwrap_or(1);
    (0..count).map(move |i| i * step % of)
}

fn gram_work(joint: &Joint, targets: usize) -> usize {
    joint.ranks() * joint.ranks() * (joint.columns() * (1 + targets) + joint.outer)
}

/// What `by_grams` takes, in bytes.
fn need(joint: &Joint) -> usize {
    4 * joint.ranks() * (2 * joint.columns() + joint.outer + 3 * joint.ranks())
}

fn by_grams(
    reader: &Reader<'_>,
    terms: &Terms<'_>,
    joint: &Joint,
    bytes: &mut Vec<u8>,
) -> Result<Vec<Squares>> {
    let (columns, rank) = (joint.columns(), joint.module.rank);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    stack_a(reader, joint, &joint.holders, bytes, &mut a)?;
    stack_b(reader, joint, &joint.holders, (bytes, &mut Vec::new()), &mut b)?;
    let b = view(&b, sum_of_ranks(&joint.holders));
    let of_b = product32(b.transpose(), b);
    let gram = |rows: &[f32]| product32(view(rows, columns), view(rows, columns).transpose());
    let of_a = gram(&a);
    let squares = (0..terms.targets()).map(|target| {
        let c = |p: usize| {
            let share = &joint.holders[p / rank];
            terms.product(target, share.adapter, share.module)
        };
        let square = |of_rows: &Mat<f32>| {
            let one = |q: usize| {
                let products = of_rows.col(q).iter().zip(of_b.col(q).iter()).enumerate();
                products.map(|(p, (x, b))| c(p) * f64::from(*x) * f64::from(*b)).sum::<f64>() * c(q)
            };
            let sum: f64 = (0..of_rows.ncols()).map(one).sum();
            // Rounding may leave less than nothing of a zero; NaN stays.
            if sum < 0.0 { 0.0 } else { sum }
        };
        let mut sum = vec![0.0; rank * columns];
        for (share, own) in joint.holders.iter().zip(a.chunks_exact(sum.len())) {
            let c = terms.coefficient(target, share.adapter, share.module) as f32;
            sum.iter_mut().zip(own).for_each(|(sum, x)| *sum = c.mul_add(*x, *sum));
        }
        let differences: Vec<f32> =
            a.iter().zip(sum.iter().cycle()).map(|(x, sum)| sum - x).collect();
        (square(&gram(&differences)), square(&of_a))
    });
    Ok(squares.collect())
}

fn by_probes(
    reader: &Reader<'_>,
    terms: &Terms<'_>,
    joint: &Joint,
    bytes: &mut Vec<u8>,
) -> Result<Vec<Squares>> {
    let random = gaussian(0, &joint.module.name, joint.columns(), PROBES);
    let coefficient = |target: usize, holder: usize| {
        let share = &joint.holders[holder];
        terms.coefficient(target, share.adapter, share.module) as f32
    };
    let mut probed = Vec::with_capacity(joint.holders.len());
    let mut sums = vec![Mat::<f32>::zeros(joint.module.rank, PROBES); terms.targets()];
    for (holder, share) in joint.holders.iter().enumerate() {
        let a = numbers(reader, *share, Factor::A, bytes)?;
        let own = product32(view(&a, joint.columns()), random.as_ref());
        for (target, sum) in sums.iter_mut().enumerate() {
            *sum += faer::Scale(coefficient(target, holder)) * &own;
        }
        probed.push(own);
    }
    let zeros = || Mat::<f32>::zeros(joint.outer, PROBES);
    let mut images: Vec<_> = sums.iter().map(|_| (zeros(), zeros())).collect();
    for (holder, share) in joint.holders.iter().enumerate() {
        let b = numbers(reader, *share, Factor::B, bytes)?;
        let (b, own) = (view(&b, share.rank), &probed[holder]);
        let s = terms.strength(share.adapter, share.module) as f32;
        for (target, ((difference, whole), sum)) in images.iter_mut().zip(&sums).enumerate() {
            let add = |to: &mut Mat<f32>, rows: MatRef<'_, f32>| {
                matmul(to.as_mut(), Accum::Add, b, rows, coefficient(target, holder) * s, Par::Seq);
            };
            add(difference, (sum - own).as_ref());
            add(whole, own.as_ref());
        }
    }
    let square = |of: Mat<f32>| super::wide(of.as_ref()).squared_norm_l2() / PROBES as f64;
    Ok(images.into_iter().map(|(difference, whole)| (square(difference), square(whole))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gram::tests::{matrix, open, specs},
        testing::Spec,
    };

    #[test]
    fn the_error_of_a_soup_is_that_of_its_product() {
        let specs = specs();
        let (_folder, adapters) = open(&specs);
        let c = [0.5, 0.7, -0.1];
        let row: Vec<Vec<f64>> = c.iter().map(|&c| vec![c]).collect();
        let strengths = vec![vec![2.0, 1.0], vec![1.0, 0.5], vec![3.0, 1.0]];
        let alone = vec![vec![1.0], vec![0.0], vec![0.0]];
        let terms = Terms::new(&adapters, &[row, alone], Some(&strengths)).unwrap();
        let SoupErrors { errors: found, exact } =
            soup_errors(&terms, &Options::default(), &Watch::default()).unwrap();
        assert!(exact);
        let (mut difference, mut whole) = (0.0, 0.0);
        for module in 0..2 {
            let mut sums = [Mat::zeros(2, 37), Mat::zeros(41, 2), Mat::zeros(41, 37)];
            for ((spec, c), s) in specs.iter().zip(c).zip(&strengths) {
                let (a, b) = (matrix(spec, 2 * module), matrix(spec, 2 * module + 1));
                sums[2] += c * s[module] * &b * &a;
                sums[0] += c * a;
                sums[1] += c * s[module] * b;
            }
            difference += (&sums[1] * &sums[0] - &sums[2]).squared_norm_l2();
            whole += sums[2].squared_norm_l2();
        }
        let wanted = (difference / whole).sqrt();
        assert!((found[0] / wanted - 1.0).abs() < 1e-5, "{found:?} {wanted}");
        assert!(found[1] < 1e-6, "one adapter alone is its own soup: {found:?}");
    }

    #[test]
    fn a_sample_has_every_module_once_and_all_kinds_of_a_layer() {
        for of in 1..200 {
            let mut all: Vec<usize> = spread(of, of).collect();
            all.sort_unstable();
            assert_eq!(all, (0..of).collect::<Vec<_>>());
        }
        for kinds in [2, 3, 4, 7] {
            let mut found: Vec<usize> = spread(8, 32 * kinds).map(|i| i % kinds).collect();
            found.sort_unstable();
            found.dedup();
            assert_eq!(found.len(), kinds);
        }
    }

    #[test]
    fn what_gram_matrices_have_no_room_for_is_estimated() {
        let specs: Vec<Spec> = (0..60).map(|i| Spec { seed: i + 1, ..Spec::default() }).collect();
        let (_folder, adapters) = open(&specs);
        let even = vec![vec![vec![1.0 / 60.0]; 60], vec![vec![1.0]; 60]];
        let terms = Terms::new(&adapters, &even, None).unwrap();
        let of = |memory| {
            let options = Options { memory, ..Options::default() };
            soup_errors(&terms, &options, &Watch::default()).unwrap()
        };
        let (exact, estimated) = (of(64 << 20), of(1 << 10));
        assert!((exact.exact, estimated.exact) == (true, false));
        for (exact, estimated) in exact.errors.iter().zip(&estimated.errors) {
            assert!((estimated / exact - 1.0).abs() < 0.1, "{estimated} {exact}");
        }
    }
}
