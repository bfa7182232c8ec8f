//! Which numbers are the largest by magnitude, exactly.

use crate::{error::Result, kernels::Kernel};

/// What separates the numbers that are kept from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    /// The smallest magnitude that is kept, as the bits of a float32 without its sign.
    bits: u32,
    /// Numbers of just this magnitude are kept up to here, and not from here on.
    end: usize,
}

/// How many bits of a magnitude are looked at in one pass: a table of 2^12 fits into the L1 cache.
const LEVELS: [u32; 3] = [12, 10, 9];

/// So many candidates are collected and sorted out; more are counted by their next bits.
pub(super) const CANDIDATES: usize = 1 << 20;

/// What a search holds, kept from one to the next.
#[derive(Default)]
pub(super) struct Search {
    counts: Vec<[u32; 2]>,
    candidates: Vec<u32>,
}

impl Search {
    /// What a search among `count` numbers takes at most, in bytes.
    pub(super) fn need(count: usize) -> usize {
        (8 << LEVELS[0]) + 4 * count.min(CANDIDATES)
    }

    /// The cut that keeps the `kept` largest of `count` numbers, ties by the lowest place. `each`
    /// hands out all of them in order, each time it is called.
    pub(super) fn cut(
        &mut self,
        kept: usize,
        count: usize,
        mut each: impl FnMut(&mut dyn FnMut(&[f32])) -> Result<()>,
    ) -> Result<Cut> {
        if kept == 0 || kept >= count {
            return Ok(Cut { bits: if kept == 0 { u32::MAX } else { 0 }, end: usize::MAX });
        }
        // The magnitude that is looked for begins with `prefix`, as far as it is known; `left` is
        // its rank among those that do.
        let (mut known, mut prefix, mut left) = (0, 0, kept);
        let mut tied = None;
        for width in LEVELS {
            self.counts.clear();
            self.counts.resize(1 << width, [0; 2]);
            let (shift, mask) = (31 - known - width, (1 << width) - 1);
            let counts = &mut self.counts[..];
            each(&mut |numbers| {
                let place = |x: f32| ((magnitude(x) >> shift) & mask) as usize;
                if known == 0 {
                    // Two tables, so that equal neighbours do not wait for each other.
                    let (pairs, rest) = numbers.as_chunks::<2>();
                    for [x, y] in pairs {
                        counts[place(*x)][0] += 1;
                        counts[place(*y)][1] += 1;
                    }
                    rest.iter().for_each(|x| counts[place(*x)][0] += 1);
                } else {
                    let known =
                        numbers.iter().filter(|x| magnitude(**x) >> (shift + width) == prefix);
                    known.for_each(|x| counts[place(*x)][0] += 1);
                }
            })?;
            let mut bin = counts.len() - 1;
            let number = |bin: usize| counts[bin].iter().map(|&n| n as usize).sum::<usize>();
            while number(bin) < left {
                left -= number(bin);
                bin -= 1;
            }
            let candidates = number(bin);
            prefix = (prefix << width) | bin as u32;
            known += width;
            if known == 31 {
                tied = Some(candidates);
            } else if candidates <= CANDIDATES {
                let (bits, equal) =
                    self.nth(31 - known, prefix, candidates, &mut left, &mut each)?;
                (prefix, tied) = (bits, Some(equal));
                break;
            }
        }
        if tied == Some(left) {
            return Ok(Cut { bits: prefix, end: usize::MAX });
        }
        let (mut end, mut at) = (usize::MAX, 0);
        each(&mut |numbers| {
            if left > 0 {
                for (j, x) in numbers.iter().enumerate() {
                    if magnitude(*x) == prefix {
                        left -= 1;
                        if left == 0 {
                            end = at + j + 1;
                            break;
                        }
                    }
                }
            }
            at += numbers.len();
        })?;
        Ok(Cut { bits: prefix, end })
    }

    /// The magnitude that is number `left` from the top among the `count` that begin with `prefix`,
    /// and how many are equal to it; `left` becomes its rank among those.
    fn nth(
        &mut self,
        shift: u32,
        prefix: u32,
        count: usize,
        left: &mut usize,
        each: &mut impl FnMut(&mut dyn FnMut(&[f32])) -> Result<()>,
    ) -> Result<(u32, usize)> {
        self.candidates.clear();
        self.candidates.resize(count + 1, 0); // one place more to write what is then written over
        let (candidates, mut found) = (&mut self.candidates[..], 0);
        each(&mut |numbers| {
            for x in numbers {
                let bits = magnitude(*x);
                candidates[found.min(count)] = bits;
                found += usize::from(bits >> shift == prefix);
            }
        })?;
        let candidates = &mut candidates[..count];
        let (above, nth, _) = candidates.select_nth_unstable_by(*left - 1, |a, b| b.cmp(a));
        let nth = *nth;
        *left -= above.iter().filter(|bits| **bits > nth).count();
        Ok((nth, candidates.iter().filter(|bits| **bits == nth).count()))
    }
}

impl Cut {
    /// Everything.
    pub(super) const NONE: Self = Self { bits: 0, end: usize::MAX };

    /// Only what the cut keeps of the numbers from place `start` on.
    pub(super) fn apply(self, kernel: Kernel, start: usize, numbers: &mut [f32]) {
        let tied = self.end.saturating_sub(start).min(numbers.len());
        let (with, without) = numbers.split_at_mut(tied);
        (kernel.sparse.keep_largest)(with, self.bits);
        (kernel.sparse.keep_largest)(without, self.bits.saturating_add(1));
    }
}

/// The bits of a number's magnitude, which have its order.
fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::widest;
    use proptest::prelude::*;

    fn check(numbers: &[f32], kept: usize) {
        let mut order: Vec<usize> = (0..numbers.len()).collect();
        order.sort_by(|&i, &j| numbers[j].abs().total_cmp(&numbers[i].abs()).then(i.cmp(&j)));
        let mut expected = vec![0.0; numbers.len()];
        order.iter().take(kept).for_each(|&i| expected[i] = numbers[i]);
        let cut = Search::default()
            .cut(kept, numbers.len(), |visit| {
                numbers.chunks(7).for_each(&mut *visit);
                Ok(())
            })
            .unwrap();
        let mut got = numbers.to_vec();
        for (i, part) in got.chunks_mut(5).enumerate() {
            cut.apply(widest(), 5 * i, part);
        }
        assert_eq!(got, expected, "{kept}: {cut:?}");
    }

    proptest! {
        #[test]
        fn as_a_full_sort_would_have_it(
            few in proptest::collection::vec(-3i8..4, 1..90),
            many in proptest::collection::vec(-1e3f32..1e3, 1..90),
            share in 0.0f64..1.0,
        ) {
            let few: Vec<f32> = few.into_iter().map(f32::from).collect();
            check(&few, (share * few.len() as f64) as usize);
            check(&many, (share * many.len() as f64) as usize);
            check(&few, few.len());
        }
    }

    #[test]
    fn more_candidates_than_are_collected() {
        let mut numbers = vec![0.5; CANDIDATES + 3];
        numbers[7] = 0.500_000_1;
        numbers[9] = -2.0;
        let cut = |kept| {
            let each = |visit: &mut dyn FnMut(&[f32])| {
                visit(&numbers);
                Ok(())
            };
            Search::default().cut(kept, numbers.len(), each).unwrap()
        };
        assert_eq!(cut(2), Cut { bits: numbers[7].to_bits(), end: usize::MAX });
        assert_eq!(cut(5), Cut { bits: 0.5f32.to_bits(), end: 3 });
        assert_eq!(cut(CANDIDATES + 2).end, CANDIDATES + 2);
    }
}
