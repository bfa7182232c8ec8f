//! Streamed: a randomised range finder with power iterations (Halko, Martinsson and Tropp 2011,
//! algorithms 4.4 and 5.1), in memory that does not depend on the number of adapters.

use faer::{Accum, Mat, MatMut, MatRef, Par, linalg::matmul::matmul};

use super::{
    Low,
    dense::{decompose, orthonormal, product},
    dora::Dora,
};
use crate::{
    base::Weight,
    error::Result,
    joint::{Joint, Reader},
    layout::Factor,
    terms::Terms,
};

/// Columns of the sketch beside the rank.
const OVERSAMPLING: usize = 8;

/// Random columns beside those of the sketch, by which what it misses is measured.
const PROBES: usize = 8;

/// How sums are sketched.
pub(super) struct Sketch {
    pub(super) rank: usize,
    pub(super) seed: u64,
    /// How often the sketch is multiplied with ΔWᵀ and ΔW again.
    pub(super) iterations: u32,
}

impl Sketch {
    /// How often every factor is read.
    pub(super) fn passes(&self) -> u64 {
        2 + 2 * u64::from(self.iterations)
    }

    /// What `lows` takes at most, in bytes.
    pub(super) fn need(&self, joint: &Joint, targets: usize) -> usize {
        let width = self.width(joint) + PROBES;
        let sides = joint.columns() + joint.outer;
        let most = joint.holders.iter().map(|share| share.rank).max().unwrap_or(0);
        // Sums and random numbers in float32; what is made orthonormal, in float64, with its QR.
        let held = width * (4 * (targets + 1) * sides + 24 * joint.columns().max(joint.outer));
        held + most * sides * 8 + 4 * targets * self.rank * sides
    }

    fn width(&self, joint: &Joint) -> usize {
        (self.rank + OVERSAMPLING).min(joint.columns()).min(joint.outer)
    }

    /// Each target's sum, to rank `rank` at most; `weight` is what DoRA members of it change.
    pub(super) fn lows(
        &self,
        reader: &Reader<'_>,
        terms: &Terms<'_>,
        joint: &Joint,
        weight: Option<Weight<'_>>,
        rank: usize,
        bytes: &mut Vec<u8>,
    ) -> Result<Vec<Low>> {
        let measure = |weight| Dora::measure(reader, terms, joint, weight, bytes);
        let dora = weight.map(measure).transpose()?;
        let pass = Pass { reader, terms, joint, dora };
        let width = self.width(joint);
        let random = gaussian(self.seed, &joint.module.name, joint.columns(), width + PROBES);
        let both = pass.forward(&vec![random; terms.targets()], bytes)?;
        let part = |y: &Mat<f32>, from, count| y.subcols(from, count).to_owned();
        let (mut ranges, probes): (Vec<_>, Vec<_>) =
            both.into_iter().map(|y| (part(&y, 0, width), part(&y, width, PROBES))).unzip();
        // Each is let go as its basis is made: with many targets they are what takes memory.
        let bases = |ranges: Vec<Mat<f32>>| -> Vec<Mat<f32>> {
            let narrow = |q: Mat<f64>| Mat::from_fn(q.nrows(), q.ncols(), |i, j| q[(i, j)] as f32);
            ranges.into_iter().map(|range| narrow(orthonormal(wide(&range).as_ref()))).collect()
        };
        for _ in 0..self.iterations {
            let left = bases(ranges);
            let right = pass.backward(&left, bytes)?;
            drop(left);
            ranges = pass.forward(&bases(right), bytes)?;
        }
        let left = bases(ranges);
        let projected = pass.backward(&left, bytes)?;
        let lows = left.iter().zip(&projected).zip(&probes).enumerate();
        lows.map(|(target, ((q, z), probes))| {
            let mut low = low(q, z, rank)?;
            low.energy = match &pass.dora {
                Some(dora) => dora.energies[target],
                None => low.values.iter().map(|s| s * s).sum::<f64>() + missed(q, probes),
            };
            Ok(low)
        })
        .collect()
    }
}

/// An estimate of ‖(1 − Q Qᵀ) ΔW‖²: for a random column p that Q does not depend on, it is the
/// expectation of ‖(1 − Q Qᵀ) ΔW p‖². What Q has is known, so that only the rest is guessed.
fn missed(q: &Mat<f32>, probes: &Mat<f32>) -> f64 {
    let (q, probes) = (wide(q), wide(probes));
    let inside = product(q.as_ref(), product(q.transpose(), probes.as_ref()).as_ref());
    (probes - inside).squared_norm_l2() / PROBES as f64
}

fn wide(matrix: &Mat<f32>) -> Mat<f64> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| f64::from(matrix[(i, j)]))
}

/// ΔW ≈ Q Zᵀ, to rank `rank`; its energy is left to be said.
fn low(q: &Mat<f32>, z: &Mat<f32>, rank: usize) -> Result<Low> {
    let z = decompose(wide(z).as_ref())?;
    let rank = rank.min(z.values.iter().filter(|&&s| s > z.values[0] * 1e-7).count());
    let b = product(wide(q).as_ref(), z.v.subcols(0, rank));
    let rows = |matrix: MatRef<'_, f64>| {
        let mut rows = Vec::with_capacity(matrix.nrows() * rank);
        for (j, s) in z.values.iter().enumerate().take(rank) {
            rows.extend(matrix.col(j).iter().map(|x| (x * s.sqrt()) as f32));
        }
        rows
    };
    Ok(Low { a: rows(z.u.as_ref()), b: rows(b.as_ref()), values: z.values, energy: 0.0 })
}

/// Products with every target's ΔW, in one pass over a module's factors.
struct Pass<'a> {
    reader: &'a Reader<'a>,
    terms: &'a Terms<'a>,
    joint: &'a Joint,
    dora: Option<Dora<'a>>,
}

impl Pass<'_> {
    /// ΔW X for each target's X, in × width.
    fn forward(&self, x: &[Mat<f32>], bytes: &mut Vec<u8>) -> Result<Vec<Mat<f32>>> {
        let mut sums = self.each(x, self.joint.outer, bytes, |a, b, c, x, sum| {
            let inner = scaled_product(a, x, c);
            matmul(sum, Accum::Add, b, inner.as_ref(), 1.0, Par::Seq);
        })?;
        if let Some(dora) = &self.dora {
            dora.each_part(self.reader, bytes, self.joint.columns(), |rows, w, shares| {
                for ((x, sum), share) in x.iter().zip(&mut sums).zip(shares) {
                    let product = by_rows(share, scaled_product(w, x.as_ref(), 1.0).as_ref());
                    let mut here = sum.subrows_mut(rows.start, rows.len());
                    here += product;
                }
            })?;
        }
        Ok(sums)
    }

    /// ΔWᵀ X for each target's X, out × width.
    fn backward(&self, x: &[Mat<f32>], bytes: &mut Vec<u8>) -> Result<Vec<Mat<f32>>> {
        let mut sums = self.each(x, self.joint.columns(), bytes, |a, b, c, x, sum| {
            let inner = scaled_product(b.transpose(), x, c);
            matmul(sum, Accum::Add, a.transpose(), inner.as_ref(), 1.0, Par::Seq);
        })?;
        if let Some(dora) = &self.dora {
            dora.each_part(self.reader, bytes, self.joint.columns(), |rows, w, shares| {
                for ((x, sum), share) in x.iter().zip(&mut sums).zip(shares) {
                    let here = by_rows(share, x.subrows(rows.start, rows.len()));
                    matmul(sum.as_mut(), Accum::Add, w.transpose(), here.as_ref(), 1.0, Par::Seq);
                }
            })?;
        }
        Ok(sums)
    }

    fn each(
        &self,
        x: &[Mat<f32>],
        rows: usize,
        bytes: &mut Vec<u8>,
        add: impl Fn(MatRef<'_, f32>, MatRef<'_, f32>, f32, MatRef<'_, f32>, MatMut<'_, f32>),
    ) -> Result<Vec<Mat<f32>>> {
        let mut sums: Vec<Mat<f32>> = x.iter().map(|x| Mat::zeros(rows, x.ncols())).collect();
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for (holder, share) in self.joint.holders.iter().enumerate() {
            let (columns, outer) = (self.joint.columns(), self.joint.outer);
            a.resize(share.rank * columns, 0.0);
            b.resize(outer * share.rank, 0.0);
            self.reader.read(*share, Factor::A, 0..a.len(), bytes, &mut a)?;
            self.reader.read(*share, Factor::B, 0..b.len(), bytes, &mut b)?;
            if let Some(dora) = &self.dora {
                dora.scale(holder, share.rank, &mut b);
            }
            let a = MatRef::from_row_major_slice(&a, share.rank, columns);
            let b = MatRef::from_row_major_slice(&b, outer, share.rank);
            for (target, (x, sum)) in x.iter().zip(&mut sums).enumerate() {
                let c = self.terms.product(target, share.adapter, share.module);
                if c != 0.0 {
                    add(a, b, c as f32, x.as_ref(), sum.as_mut());
                }
            }
        }
        Ok(sums)
    }
}

fn scaled_product(a: MatRef<'_, f32>, x: MatRef<'_, f32>, c: f32) -> Mat<f32> {
    let mut product = Mat::zeros(a.nrows(), x.ncols());
    matmul(product.as_mut(), Accum::Replace, a, x, c, Par::Seq);
    product
}

/// Each row multiplied with its factor.
fn by_rows(factors: &[f32], matrix: MatRef<'_, f32>) -> Mat<f32> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| factors[i] * matrix[(i, j)])
}

/// Standard normal numbers that depend on the seed, the module's name and their place alone:
/// SplitMix64 (Steele, Lea and Flood 2014) and the transformation of Box and Muller.
pub(crate) fn gaussian(seed: u64, name: &str, rows: usize, columns: usize) -> Mat<f32> {
    // FNV-1a.
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, hash);
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    Mat::from_fn(rows, columns, |_, _| {
        let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * uniform()).cos()) as f32
    })
}
