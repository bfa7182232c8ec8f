//! Thinning numbers out, and sums that are kept apart by sign: plain loops, written so that a
//! compiler can widen them.
//!
//! What is left of numbers is written elsewhere: in place, it would become stores under a mask, for
//! which some processors take ten times as long as for plain ones.

/// The numbers whose bits without the sign are below `bits` are zero in `kept`.
#[inline(always)]
pub(super) fn keep_largest(numbers: &[f32], bits: u32, kept: &mut [f32]) {
    for (x, kept) in numbers.iter().zip(kept) {
        *kept = if x.to_bits() & 0x7fff_ffff < bits { 0.0 } else { *x };
    }
}

/// How many numbers have bits without the sign of each of `bits`, which have no sign, or above.
#[inline(always)]
pub(super) fn count(numbers: &[f32], bits: [u32; 2]) -> [usize; 2] {
    // Signed, which takes one instruction to compare.
    let below = bits.map(|bits| bits.cast_signed() - 1);
    let mut all = [0; 2];
    for part in numbers.chunks(1 << 20) {
        let [mut first, mut second] = [0, 0];
        // A plain loop: the closure of an iterator may be compiled apart, for narrow registers.
        for x in part {
            let magnitude = (x.to_bits() & 0x7fff_ffff).cast_signed();
            first += u32::from(magnitude > below[0]);
            second += u32::from(magnitude > below[1]);
        }
        all[0] += first as usize;
        all[1] += second as usize;
    }
    all
}

/// The bits without the sign of those numbers that have them in `low..high`, which are few.
#[inline(always)]
pub(super) fn collect(numbers: &[f32], low: u32, high: u32, found: &mut Vec<u32>) {
    for part in numbers.chunks(32) {
        // Looked for without a branch first, in a loop that is widened as that above.
        let mut any = false;
        for x in part {
            any |= (x.to_bits() & 0x7fff_ffff).wrapping_sub(low) < high - low;
        }
        if any {
            let bits = part.iter().map(|x| x.to_bits() & 0x7fff_ffff);
            found.extend(bits.filter(|bits| bits.wrapping_sub(low) < high - low));
        }
    }
}

/// Number j is zero in `kept` unless the hash of `key` and `start + j` is below `limit`.
///
/// The hash is Wellons' `lowbias32` of the place, the key entering before each of its two
/// multiplications: so a place's fate depends on nothing else, and on no order.
#[inline(always)]
pub(super) fn keep_random(
    numbers: &[f32],
    key: [u32; 2],
    start: u32,
    limit: u32,
    kept: &mut [f32],
) {
    for (j, (x, kept)) in numbers.iter().zip(kept).enumerate() {
        let mut hash = start.wrapping_add(j as u32) ^ key[0];
        hash = (hash ^ (hash >> 16)).wrapping_mul(0x7feb_352d);
        hash = (hash ^ (hash >> 15)).wrapping_add(key[1]).wrapping_mul(0x846c_a68b);
        hash ^= hash >> 16;
        *kept = if hash < limit { *x } else { 0.0 };
    }
}

/// Each number is added to its total, and counted by its sign; a zero counts for neither. Counts are
/// narrow, because what limits this is how much goes to and fro; they stop at 65,535.
#[inline(always)]
pub(super) fn vote(numbers: &[f32], totals: &mut [f64], up: &mut [u16], down: &mut [u16]) {
    // In loops of their own, because so few numbers of eight bytes go into a register.
    for (&x, total) in numbers.iter().zip(totals) {
        *total += f64::from(x);
    }
    for ((&x, up), down) in numbers.iter().zip(up).zip(down) {
        *up = up.saturating_add(u16::from(x > 0.0));
        *down = down.saturating_add(u16::from(x < 0.0));
    }
}

/// `weight` times each number is added to its sum in `up` or in `down`, by the number's sign.
#[inline(always)]
pub(super) fn add_by_sign(numbers: &[f32], weight: f32, up: &mut [f32], down: &mut [f32]) {
    for ((&x, up), down) in numbers.iter().zip(up).zip(down) {
        *up = (if x > 0.0 { x } else { 0.0 }).mul_add(weight, *up);
        *down = (if x < 0.0 { x } else { 0.0 }).mul_add(weight, *down);
    }
}

/// The mean of the numbers of the elected sign in place of the sum over positive ones: `up` and
/// `down` are what `add_by_sign` made, the others what `vote` did. Most by their total or, if
/// `by_number`, by how many there are, elect; also where both signs have as many.
#[inline(always)]
pub(super) fn elect(
    up: &mut [f32],
    down: &[f32],
    totals: &[f64],
    [ups, downs]: [&[u16]; 2],
    by_number: bool,
) {
    let numbers = ups.iter().zip(downs);
    for (((sum, &down), &total), (&ups, &downs)) in up.iter_mut().zip(down).zip(totals).zip(numbers)
    {
        let up = *sum;
        let positive = if by_number { ups >= downs } else { total >= 0.0 };
        let agreed = if positive { up } else { down };
        let number = if positive { ups } else { downs };
        *sum = agreed / f32::from(number.max(1));
    }
}
