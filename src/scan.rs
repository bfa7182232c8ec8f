//! A look at all of an adapter's numbers.

use crate::{
    adapter::Adapter,
    error::{At, Result},
    kernels::widest,
    source::{Io, Source},
    watch::Watch,
};

/// How many numbers are looked at in one go.
const STEP: usize = 1 << 16;

/// What is odd about the numbers of `adapter`'s tensors, by their names: `NaN` or `Inf` among
/// them, or `only zeros`.
///
/// # Errors
/// The file cannot be read, or has changed since it was opened; `watch` said to stop.
pub fn scan(adapter: &Adapter, watch: &Watch) -> Result<Vec<(String, &'static str)>> {
    let source = Source::new(adapter.file()?, Io::Read).at(&adapter.path)?;
    let mut buffer = vec![0; STEP * 8];
    let mut numbers = vec![0.0; STEP];
    let mut odd = Vec::new();
    for tensor in &adapter.layout.tensors {
        let (mut nan, mut infinite, mut zero) = (false, false, !tensor.is_empty());
        let step = tensor.dtype.size(STEP);
        for start in tensor.bytes.clone().step_by(step) {
            watch.go_on()?;
            let range = start..tensor.bytes.end.min(start + step as u64);
            let bytes = source.bytes(range, &mut buffer).at(&adapter.path)?;
            let numbers = &mut numbers[..tensor.dtype.count(bytes.len())];
            (widest().widen)(tensor.dtype, bytes, numbers);
            for number in numbers {
                nan |= number.is_nan();
                infinite |= number.is_infinite();
                zero &= *number == 0.0;
            }
            watch.advance(bytes.len());
        }
        let found = [(nan, "NaN"), (infinite, "Inf"), (zero, "only zeros")];
        odd.extend(
            found.iter().filter(|(is, _)| *is).map(|(_, what)| (tensor.name.clone(), *what)),
        );
    }
    Ok(odd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, folder};

    #[test]
    fn nan_and_infinity_are_found_wherever_they_stand() {
        let folder = folder();
        for (first, expected) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "Inf")] {
            let spec = Spec { inner: 70_000, first: Some(first), ..Spec::default() };
            let adapter = Adapter::open(&spec.write(&folder, expected)).unwrap();
            let odd = scan(&adapter, &Watch::default()).unwrap();
            assert_eq!(odd.len(), 4);
            assert!(odd.iter().all(|(_, what)| *what == expected), "{odd:?}");
        }
        let sound = Adapter::open(&Spec::default().write(&folder, "sound")).unwrap();
        assert_eq!(scan(&sound, &Watch::default()).unwrap(), []);
    }
}
