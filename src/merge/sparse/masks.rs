//! Random pruning, as DARE has it: which numbers stay depends on the seed, the module, the factor,
//! the adapter and the place of the number, and on nothing else.

use std::path::Path;

use super::Sparsity;
use crate::{adapter::Adapter, kernels::widest, layout::Factor};

/// Who decides which numbers stay.
pub(super) enum Masks {
    /// A hash: each number stays with the probability `density`.
    Hashed {
        seed: u64,
        /// For each adapter a hash of its name.
        names: Vec<u64>,
        density: f64,
    },
    /// What another program drew: 1 for each number that stays.
    #[cfg(test)]
    Given(Box<Given>),
}

/// The mask for a module, a factor (none: the product of both) and an adapter.
#[cfg(test)]
pub(super) type Given = dyn Fn(&str, Option<Factor>, usize) -> Vec<u8> + Send + Sync;

impl Masks {
    pub(super) fn hashed(adapters: &[&Adapter], sparsity: &Sparsity) -> Self {
        let mut names: Vec<u64> = Vec::with_capacity(adapters.len());
        for adapter in adapters {
            let mut name = name(&adapter.path);
            while names.contains(&name) {
                name = mixed(name); // the same adapter again, or another of the same name
            }
            names.push(name);
        }
        Self::Hashed { seed: sparsity.seed, names, density: sparsity.density }
    }

    /// Of the numbers from place `start` on those that stay, into `kept`, not rescaled; zeros for the
    /// others.
    pub(super) fn apply(
        &self,
        module: &str,
        factor: Option<Factor>,
        adapter: usize,
        start: usize,
        numbers: &[f32],
        kept: &mut [f32],
    ) {
        match self {
            Self::Hashed { density: 1.0, .. } => kept.copy_from_slice(numbers),
            Self::Hashed { seed, names, density } => {
                let factor = factor.map_or(2, |factor| factor as u64);
                let mut key = mixed(seed ^ mixed(names[adapter]));
                key = mixed(hashed(key, module.as_bytes()) ^ factor);
                let limit = (density * 2f64.powi(32)) as u32;
                let (mut start, mut numbers, mut kept) = (start as u64, numbers, kept);
                while !numbers.is_empty() {
                    // Places are hashed in 32 bits, with another key for each 2³² of them.
                    let length = ((1 << 32) - (start & 0xffff_ffff)).min(numbers.len() as u64);
                    let (part, rest) = numbers.split_at(length as usize);
                    let (part_kept, rest_kept) = kept.split_at_mut(length as usize);
                    let own = mixed(key ^ (start >> 32));
                    let own = [own as u32, (own >> 32) as u32];
                    (widest().sparse.keep_random)(part, own, start as u32, limit, part_kept);
                    (start, numbers, kept) = (start + length, rest, rest_kept);
                }
            }
            #[cfg(test)]
            Self::Given(given) => {
                let mask = given(module, factor, adapter);
                for ((x, kept), stays) in numbers.iter().zip(kept).zip(&mask[start..]) {
                    *kept = x * f32::from(*stays);
                }
            }
        }
    }
}

/// An adapter by the last two parts of its path: its folder and file, wherever the bank is.
fn name(path: &Path) -> u64 {
    let parts: Vec<_> = path.components().rev().take(2).collect();
    let one = |hash, part: &std::path::Component<'_>| {
        mixed(hashed(hash, part.as_os_str().as_encoded_bytes()))
    };
    parts.iter().fold(0, one)
}

/// FNV-1a.
fn hashed(start: u64, bytes: &[u8]) -> u64 {
    let start = start ^ 0xcbf2_9ce4_8422_2325;
    bytes.iter().fold(start, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The finish of splitmix64: every bit depends on every bit.
pub(super) fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(masks: &Masks, module: &str, adapter: usize, start: usize, len: usize) -> Vec<f32> {
        let mut kept = vec![9.0; len];
        masks.apply(module, Some(Factor::A), adapter, start, &vec![1.0; len], &mut kept);
        kept
    }

    #[test]
    fn masks_are_of_the_density_and_independent_of_each_other_and_of_the_cut() {
        const N: usize = 1 << 18;
        for density in [0.1, 0.5, 0.9] {
            let masks = Masks::Hashed { seed: 3, names: vec![1, 2], density };
            let all = kept(&masks, "m", 0, 0, N);
            let parts = [kept(&masks, "m", 0, 0, 1001), kept(&masks, "m", 0, 1001, N - 1001)];
            assert_eq!(all, parts.concat());
            let share = |both: &[f32]| f64::from(both.iter().sum::<f32>()) / N as f64;
            // Five standard deviations of a mean of N.
            let near = |x: f64, p: f64| (x - p).abs() < 5.0 * (p * (1.0 - p) / N as f64).sqrt();
            assert!(near(share(&all), density));
            for other in [
                kept(&masks, "m", 1, 0, N),
                kept(&masks, "n", 0, 0, N),
                kept(&masks, "m", 0, 1 << 32, N),
                kept(&masks, "m", 0, 1, N),
                kept(&masks, "m", 0, 64, N),
            ] {
                let both: Vec<f32> = all.iter().zip(&other).map(|(x, y)| x * y).collect();
                assert!(near(share(&both), density * density), "{} {density}", share(&both));
            }
        }
    }
}
