//! DoRA: ΔW = m (W + s B A)/‖W + s B A‖ − W, with the norm and the magnitude m of each row.
//!
//! With d = m/‖W + s B A‖ that is diag(d) s B A + diag(d − 1) W: plain LoRA whose B has other rows,
//! and a share of W. So a sum of such is a sum of plain ones and diag(D) W with D = Σ c (d − 1).

use std::{ops::Range, sync::Mutex};

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};

use crate::{
    base::{Base, Weight},
    blocks::Options,
    error::{Error, Result},
    joint::{Joint, Reader, Share, each_on_threads, joint_modules},
    layout::Factor,
    terms::Terms,
    watch::Watch,
};

/// How many numbers of W are read at a time.
const PART: usize = 1 << 19;

/// ‖c ΔW‖ of each adapter in each module of its layout, where all are DoRA; c is the first target's.
///
/// # Errors
/// The base's weights are not given, or do not fit; otherwise as [`crate::gram::norms`].
pub fn dora_norms(terms: &Terms<'_>, options: &Options, watch: &Watch) -> Result<Vec<Vec<f64>>> {
    let joints = joint_modules(&terms.adapters)?;
    let reader = Reader::open(&terms.adapters, options.io, options.allow_nan, watch)?;
    let modules = |adapter: &&crate::Adapter| vec![0.0; adapter.layout.modules.len()];
    let found: Mutex<Vec<Vec<f64>>> = Mutex::new(terms.adapters.iter().map(modules).collect());
    each_on_threads(joints.len(), options.cores(), watch, Vec::new, |bytes, index| {
        let Some(weight) = super::weight(terms, &joints[index])? else {
            return Ok(());
        };
        for share in &joints[index].holders {
            let alone = Joint { holders: vec![*share], ..joints[index].clone() };
            let energy = Dora::measure(&reader, terms, &alone, weight, bytes)?.energies[0];
            let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            found[share.adapter][share.module] = energy.sqrt();
        }
        Ok(())
    })?;
    reader.still_unchanged()?;
    terms.base.map_or(Ok(()), Base::still_unchanged)?;
    Ok(found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// A module's weight, and what its adapters make of it.
pub(super) struct Dora<'a> {
    weight: Weight<'a>,
    part: usize,
    /// For each holder d, which its rows of B are multiplied with; none if it is plain.
    rows: Vec<Option<Vec<f64>>>,
    /// For each target D.
    shares: Vec<Vec<f32>>,
    /// For each target ‖Σ c ΔW‖².
    pub(super) energies: Vec<f64>,
}

/// The rows of W that are read at a time.
fn part(joint: &Joint, targets: usize) -> usize {
    (PART / joint.columns().max(1) / targets.max(1)).clamp(1, joint.outer.max(1))
}

/// What is held at most beside the factors of one adapter, in bytes.
pub(super) fn need(joint: &Joint, targets: usize) -> usize {
    // W as it lies and widened, s B A, and the targets' sums; d and D.
    let block = part(joint, targets) * joint.columns() * (8 + 4 + 4 + 4 * targets);
    block + 4 * joint.outer * (joint.holders.len() + 2 * targets)
}

/// What is read of the adapters and of W, in bytes, with `passes` over W after the first.
pub(super) fn reads(terms: &Terms<'_>, joint: &Joint, weight: Weight<'_>, passes: u64) -> u64 {
    let blocks = joint.outer.div_ceil(part(joint, terms.targets())) as u64;
    let of = |share: &Share| {
        let layout = &terms.adapters[share.adapter].layout;
        let module = &layout.modules[share.module];
        let size =
            |tensor: usize| layout.tensors[tensor].bytes.end - layout.tensors[tensor].bytes.start;
        blocks * size(module.a) + size(module.b) + module.magnitude.map_or(0, size)
    };
    joint.holders.iter().map(of).sum::<u64>() + (1 + passes) * weight.size()
}

impl<'a> Dora<'a> {
    /// The norms of all rows, and what follows from them, in one pass over W.
    pub(super) fn measure(
        reader: &Reader<'_>,
        terms: &Terms<'_>,
        joint: &Joint,
        weight: Weight<'a>,
        bytes: &mut Vec<u8>,
    ) -> Result<Self> {
        let (targets, columns, outer) = (terms.targets(), joint.columns(), joint.outer);
        let part = part(joint, targets);
        let magnitudes = joint.holders.iter().map(|share| reader.magnitude(*share, bytes));
        let mut found = Self {
            weight,
            part,
            rows: magnitudes.collect::<Result<_>>()?,
            shares: vec![vec![0.0; outer]; targets],
            energies: vec![0.0; targets],
        };
        let mut w = vec![0.0; part * columns];
        let mut delta = w.clone();
        let mut sums = vec![w.clone(); targets];
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for block in found.blocks() {
            let here = block.len() * columns;
            weight.read(block.clone(), bytes, &mut w, reader.watch)?;
            sums.iter_mut().for_each(|sum| sum.fill(0.0));
            for (share, rows) in joint.holders.iter().zip(&mut found.rows) {
                let rank = share.rank;
                a.resize(rank * columns, 0.0);
                b.resize(block.len() * rank, 0.0);
                reader.read(*share, Factor::A, 0..a.len(), bytes, &mut a)?;
                let range = block.start * rank..block.end * rank;
                reader.read(*share, Factor::B, range, bytes, &mut b)?;
                matmul(
                    MatMut::from_row_major_slice_mut(&mut delta[..here], block.len(), columns),
                    Accum::Replace,
                    MatRef::from_row_major_slice(&b, block.len(), rank),
                    MatRef::from_row_major_slice(&a, rank, columns),
                    terms.strength(share.adapter, share.module) as f32,
                    Par::Seq,
                );
                for (i, row) in block.clone().enumerate() {
                    let here = i * columns..(i + 1) * columns;
                    let (w, delta) = (&w[here.clone()], &delta[here.clone()]);
                    let d = match rows {
                        Some(rows) => {
                            rows[row] = scale(reader, *share, rows[row], w, delta)?;
                            rows[row]
                        }
                        None => 1.0,
                    };
                    for (target, sum) in sums.iter_mut().enumerate() {
                        let c = terms.coefficient(target, share.adapter, share.module);
                        let (of_w, of_delta) = ((c * (d - 1.0)) as f32, (c * d) as f32);
                        found.shares[target][row] += of_w;
                        for ((sum, w), delta) in sum[here.clone()].iter_mut().zip(w).zip(delta) {
                            *sum += of_w * w + of_delta * delta;
                        }
                    }
                }
            }
            for (energy, sum) in found.energies.iter_mut().zip(&sums) {
                *energy += sum[..here].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
            }
        }
        Ok(found)
    }

    /// Multiply rows of a holder's B with its d.
    pub(super) fn scale(&self, holder: usize, rank: usize, b: &mut [f32]) {
        for (row, d) in b.chunks_exact_mut(rank).zip(self.rows[holder].iter().flatten()) {
            row.iter_mut().for_each(|x| *x *= *d as f32);
        }
    }

    /// `use_of` for some rows of W after others: which, they, and each target's D there.
    pub(super) fn each_part(
        &self,
        reader: &Reader<'_>,
        bytes: &mut Vec<u8>,
        columns: usize,
        mut use_of: impl FnMut(Range<usize>, MatRef<'_, f32>, &[&[f32]]),
    ) -> Result<()> {
        let mut w = vec![0.0; self.part * columns];
        for block in self.blocks() {
            self.weight.read(block.clone(), bytes, &mut w, reader.watch)?;
            let w = MatRef::from_row_major_slice(&w[..block.len() * columns], block.len(), columns);
            let shares: Vec<_> = self.shares.iter().map(|share| &share[block.clone()]).collect();
            use_of(block, w, &shares);
        }
        Ok(())
    }

    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, part) = (self.shares.first().map_or(0, Vec::len), self.part);
        (0..rows).step_by(part).map(move |from| from..rows.min(from + part))
    }
}

/// d of one row, from its magnitude.
///
/// # Errors
/// The row is zero, and has no direction.
fn scale(
    reader: &Reader<'_>,
    share: Share,
    magnitude: f64,
    w: &[f32],
    delta: &[f32],
) -> Result<f64> {
    let square = |(w, delta): (&f32, &f32)| (f64::from(*w) + f64::from(*delta)).powi(2);
    let norm = w.iter().zip(delta).map(square).sum::<f64>().sqrt();
    let d = magnitude / norm;
    if d.is_finite() {
        return Ok(d);
    }
    let adapter = reader.adapters[share.adapter];
    let module = &adapter.layout.modules[share.module].name;
    Err(Error::File {
        path: adapter.path.clone(),
        reason: format!(
            "a row of the base's weight of `{module}` and its change is zero, and DoRA divides by \
             its norm"
        ),
    })
}
