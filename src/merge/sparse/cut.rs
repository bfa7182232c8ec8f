//! Which numbers are the largest by magnitude, exactly.

use crate::{error::Result, kernels::widest};

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

/// How many numbers give the first guesses.
const SAMPLE: usize = 256;

/// One in so many numbers is few enough to collect: they are looked for in groups of 64.
const FEW: usize = 512;

/// What a search holds, kept from one to the next.
#[derive(Default)]
pub(super) struct Search {
    counts: Vec<[u32; 2]>,
    candidates: Vec<u32>,
}

impl Search {
    /// What `cut` takes among `count` numbers at most, in bytes.
    pub(super) fn need(count: usize) -> usize {
        (8 << LEVELS[0]) + 4 * count.min(CANDIDATES)
    }

    /// And `cut_here`; where all numbers are equal, all are candidates.
    pub(super) fn need_here(count: usize) -> usize {
        (8 << LEVELS[0]) + 8 * count // as a vector grows
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

    /// The same for numbers that are all at hand: their magnitudes are counted above a guess, which
    /// takes much less than to sort them into a table. A sample gives the first guesses.
    pub(super) fn cut_here(&mut self, kept: usize, numbers: &[f32]) -> Result<Cut> {
        let count = numbers.len();
        if count < 16 * SAMPLE || kept == 0 || kept >= count {
            return self.cut(kept, count, |visit| {
                visit(numbers);
                Ok(())
            });
        }
        let sparse = widest().sparse;
        let sample = &mut self.candidates;
        sample.clear();
        sample.extend(numbers.iter().step_by(count / SAMPLE).map(|x| magnitude(*x)));
        let share = kept as f64 / count as f64;
        let middle = share * sample.len() as f64;
        let spread = 2.5 * (middle * (1.0 - share)).sqrt() + 1.0;
        let mut guesses = [spread, -spread].map(|off| {
            let place = ((middle + off).max(0.0) as usize).min(sample.len() - 1);
            *sample.select_nth_unstable_by(place, |a, b| b.cmp(a)).1
        });
        // `most` are of `low` or above, which is enough; `least` of `high`, which is too few.
        let (mut low, mut high) = (0, 1 << 31);
        let (mut most, mut least) = (count, 0);
        for _ in 0..4 {
            if most - least <= count / FEW {
                break;
            }
            let counts = (sparse.count)(numbers, guesses);
            for (bits, found) in guesses.into_iter().zip(counts) {
                if bits > low && bits < high {
                    if found >= kept {
                        (low, most) = (bits, found);
                    } else {
                        (high, least) = (bits, found);
                    }
                }
            }
            // Between near magnitudes others lie about evenly.
            let between = (most - least) as f64;
            let spread = 1.3 * between.sqrt() + 1.0;
            guesses = [spread, -spread].map(|off| {
                let part = (most as f64 - kept as f64 - off) / between;
                low + (f64::from(high - low - 1) * part.clamp(0.0, 1.0)) as u32
            });
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        (sparse.collect)(numbers, low, high, candidates);
        let mut left = kept - least;
        let (above, nth, _) = candidates.select_nth_unstable_by(left - 1, |a, b| b.cmp(a));
        let bits = *nth;
        left -= above.iter().filter(|above| **above > bits).count();
        if candidates.iter().filter(|other| **other == bits).count() == left {
            return Ok(Cut { bits, end: usize::MAX });
        }
        let tied = numbers.iter().enumerate().filter(|(_, x)| magnitude(**x) == bits);
        let end = tied.map(|(j, _)| j + 1).nth(left - 1).unwrap_or(usize::MAX);
        Ok(Cut { bits, end })
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

    /// What the cut keeps of the numbers from place `start` on, into `kept`; zeros for the others.
    pub(super) fn apply(self, start: usize, numbers: &[f32], kept: &mut [f32]) {
        let sparse = widest().sparse;
        let tied = self.end.saturating_sub(start).min(numbers.len());
        let (with, without) = numbers.split_at(tied);
        let (kept_with, kept_without) = kept.split_at_mut(tied);
        (sparse.keep_largest)(with, self.bits, kept_with);
        (sparse.keep_largest)(without, self.bits.saturating_add(1), kept_without);
    }
}

/// The bits of a number's magnitude, which have its order.
fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let mut got = vec![9.0; numbers.len()];
        for (i, (part, got)) in numbers.chunks(5).zip(got.chunks_mut(5)).enumerate() {
            cut.apply(5 * i, part, got);
        }
        assert_eq!(got, expected, "{kept}: {cut:?}");
        assert_eq!(Search::default().cut_here(kept, numbers).unwrap(), cut);
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
    fn guesses_come_to_the_same() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let even: Vec<f32> = (0..5001).map(|_| next()).collect();
        let shapes: [fn(f32) -> f32; 5] = [
            |x| x,
            |x| x.powi(9),
            |x| (x * 20.0).round(),
            |x| if x > 0.9 { x * 1e30 } else { 0.0 },
            |_| 0.25,
        ];
        for shape in shapes {
            let mut numbers: Vec<f32> = even.iter().map(|x| shape(*x)).collect();
            for kept in [1, 2, 40, 500, 1000, 2500, 4000, 4999, 5000] {
                check(&numbers, kept);
            }
            numbers.sort_by(f32::total_cmp);
            check(&numbers, 1000);
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
