//! Thinning numbers out, and sums that are kept apart by sign: plain loops, written so that a
//! compiler can widen them.

/// The numbers whose bits without the sign are below `bits` become zero.
#[inline(always)]
pub(super) fn keep_largest(numbers: &mut [f32], bits: u32) {
    for x in numbers {
        *x = if x.to_bits() & 0x7fff_ffff < bits { 0.0 } else { *x };
    }
}

/// How many numbers have bits without the sign of each of `bits` or above.
#[inline(always)]
pub(super) fn count(numbers: &[f32], bits: [u32; 2]) -> [usize; 2] {
    let mut all = [0; 2];
    for part in numbers.chunks(1 << 20) {
        let [mut first, mut second] = [0, 0];
        // A plain loop: the closure of an iterator may be compiled apart, for narrow registers.
        for x in part {
            let magnitude = x.to_bits() & 0x7fff_ffff;
            first += u32::from(magnitude >= bits[0]);
            second += u32::from(magnitude >= bits[1]);
        }
        all[0] += first as usize;
        all[1] += second as usize;
    }
    all
}

/// The bits without the sign of those numbers that have them in `low..high`, which are few.
#[inline(always)]
pub(super) fn collect(numbers: &[f32], low: u32, high: u32, found: &mut Vec<u32>) {
    for part in numbers.chunks(64) {
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

/// Number j becomes zero unless the hash of `key` and `start + j` is below `limit`.
///
/// The hash is Wellons' `lowbias32` of the place, the key entering before each of its two
/// multiplications: so a place's fate depends on nothing else, and on no order.
#[inline(always)]
pub(super) fn keep_random(numbers: &mut [f32], key: [u32; 2], start: u32, limit: u32) {
    for (j, x) in numbers.iter_mut().enumerate() {
        let mut hash = start.wrapping_add(j as u32) ^ key[0];
        hash = (hash ^ (hash >> 16)).wrapping_mul(0x7feb_352d);
        hash = (hash ^ (hash >> 15)).wrapping_add(key[1]).wrapping_mul(0x846c_a68b);
        hash ^= hash >> 16;
        *x = if hash < limit { *x } else { 0.0 };
    }
}

/// Each number is added to its total, and counted by its sign; a zero counts for neither. Counts are
/// narrow, because what limits this is how much goes to and fro; they stop at 65,535.
#[inline(always)]
pub(super) fn vote(numbers: &[f32], totals: &mut [f64], up: &mut [u16], down: &mut [u16]) {
    for (((&x, total), up), down) in numbers.iter().zip(totals).zip(up).zip(down) {
        *total += f64::from(x);
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
