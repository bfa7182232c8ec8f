//! `soup`: Σ c_i A_i and Σ c_i s_i B_i, the factors summed apart, for any number of targets in one
//! pass over the adapters.

mod worker;

use std::{ops::Range, path::PathBuf};

use crate::{
    Dtype, Io,
    adapter::Adapter,
    bank::{Bank, Holder, Slot},
    blocks::{Line, Options, Piece, Plan},
    error::{At, Error, Result},
    joint::each_on_threads,
    layout::Factor,
    source::Source,
    tensor::Order,
    terms::Terms,
    watch::Watch,
    writer::Writer,
};
use worker::Worker;

/// Weighted sums of the factors of adapters.
pub struct Soup<'a> {
    terms: &'a Terms<'a>,
    bank: Bank<'a>,
    options: Options,
    plan: Plan,
}

impl<'a> Soup<'a> {
    /// Prepare the sums of A by the coefficients of `terms`, and of B by coefficients and
    /// strengths.
    ///
    /// # Errors
    /// The adapters differ in shape; the memory budget is too small.
    pub fn new(terms: &'a Terms<'a>, options: Options) -> Result<Self> {
        terms.plain("soup")?;
        let bank = Bank::new(terms.adapters.clone())?;
        let plan = Plan::new(&bank, terms.targets(), &options)?;
        Ok(Self { terms, bank, options, plan })
    }

    /// What the job will read and take.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Write one safetensors file of type `dtype` for each target. None appears before all are
    /// complete.
    ///
    /// # Errors
    /// A file cannot be read or written, or changed meanwhile; a tensor or a sum is not finite;
    /// `watch` said to stop.
    pub fn write(&self, outputs: &[PathBuf], dtype: Dtype, watch: &Watch) -> Result<()> {
        if outputs.len() != self.terms.targets() {
            return Err(Error::Setting("expected an output for each target".to_owned()));
        }
        let open =
            |adapter: &&Adapter| Source::new(adapter.file()?, self.plan.io).at(&adapter.path);
        #[cfg(unix)]
        if self.plan.io == Io::Read {
            // One descriptor for each adapter and output, and what a process has anyway. Where the
            // system refuses, opening the files will say so.
            let needed = self.bank.adapters.len() + outputs.len() + 64;
            let _ = rlimit::increase_nofile_limit(needed as u64);
        }
        let sources = self.bank.adapters.iter().map(open).collect::<Result<Vec<_>>>()?;
        let tensors = self.bank.slots.iter().map(|slot| (&slot.name[..], &slot.shape[..]));
        let writers = outputs
            .iter()
            .map(|path| Writer::create(path, dtype, tensors.clone()))
            .collect::<Result<Vec<_>>>()?;
        each_on_threads(
            self.plan.blocks(),
            self.plan.threads,
            watch,
            || Worker::new(self, &sources, watch),
            |worker, index| worker.write(self.plan.block(index), &writers, dtype),
        )?;
        self.bank.adapters.iter().try_for_each(|adapter| adapter.still_unchanged())?;
        Writer::finish(writers, watch)
    }

    /// The factor by which a target's sum takes a holder's tensor.
    fn weight(&self, target: usize, slot: &Slot, holder: Holder) -> f32 {
        let strength = match slot.factor {
            Factor::A => 1.0,
            Factor::B => self.terms.strength(holder.adapter, holder.module),
        };
        (self.terms.coefficient(target, holder.adapter, holder.module) * strength) as f32
    }

    /// Where a piece lies within the file of one of its holders.
    fn span(&self, piece: &Piece, holder: Holder) -> Range<u64> {
        self.bank.tensor(holder).span(&(piece.start..piece.start + piece.len))
    }

    /// The numbers of a piece, in place or read into `buffer`; `bytes` is made as large as it needs
    /// to be.
    fn row<'b>(
        &self,
        sources: &'b [Source],
        holder: Holder,
        piece: &Piece,
        buffer: &'b mut [Line],
        bytes: &mut Vec<u8>,
    ) -> Result<Row<'b>> {
        let (tensor, source) = (self.bank.tensor(holder), &sources[holder.adapter]);
        let path = &self.bank.adapters[holder.adapter].path;
        let dtype = tensor.held_as();
        if tensor.order == Order::Rows {
            let read = source.bytes(self.span(piece, holder), bytemuck::cast_slice_mut(buffer));
            return Ok((dtype, read.at(path)?));
        }
        let range = piece.start..piece.start + piece.len;
        let held = &mut bytemuck::cast_slice_mut(buffer)[..dtype.size(piece.len)];
        match tensor.order {
            Order::Heads(_) => tensor.read_heads(source, range, bytes, held).at(path)?,
            _ => tensor.read(source, range, bytes, bytemuck::cast_slice_mut(held)).at(path)?,
        }
        Ok((dtype, held))
    }

    /// The room that `row` needs, in cache lines.
    fn room(&self, piece: &Piece, holder: Holder) -> usize {
        let tensor = self.bank.tensor(holder);
        match (tensor.order, self.plan.io) {
            (Order::Rows, Io::Mmap) => 0,
            _ => tensor.held_as().size(piece.len).div_ceil(size_of::<Line>()),
        }
    }

    /// Those of a slot's holders that are among `adapters`.
    fn holders(&self, slot: &'a Slot, adapters: &Range<usize>) -> &[Holder] {
        let from = slot.holders.partition_point(|holder| holder.adapter < adapters.start);
        let to = slot.holders.partition_point(|holder| holder.adapter < adapters.end);
        &slot.holders[from..to]
    }
}

/// A file's type and a run of its bytes.
type Row<'b> = (Dtype, &'b [u8]);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, Tensors, folder, read};

    /// What the sums must be, in float64.
    fn expected(
        specs: &[Spec],
        coefficients: &[f64],
        strengths: Option<&[Vec<f64>]>,
    ) -> Vec<Vec<f64>> {
        (0..4)
            .map(|tensor| {
                let mut sums = vec![0.0; specs[0].numbers(tensor).len()];
                for (i, spec) in specs.iter().enumerate() {
                    let (module, is_b) = (tensor / 2, tensor % 2 == 1);
                    let strength = strengths.filter(|_| is_b).map_or(1.0, |s| s[i][module]);
                    for (sum, x) in sums.iter_mut().zip(spec.numbers(tensor)) {
                        *sum += coefficients[i] * strength * f64::from(rounded(x, spec.dtype));
                    }
                }
                sums
            })
            .collect()
    }

    fn rounded(x: f32, dtype: Dtype) -> f32 {
        match dtype {
            Dtype::F16 => half::f16::from_f32(x).to_f32(),
            Dtype::BF16 => half::bf16::from_f32(x).to_f32(),
            _ => x,
        }
    }

    struct Case {
        folder: tempfile::TempDir,
        adapters: Vec<Adapter>,
    }

    impl Case {
        fn new(specs: &[Spec]) -> Self {
            let folder = folder();
            let open = |(i, spec): (usize, &Spec)| {
                Adapter::open(&spec.write(&folder, &format!("in{i}"))).unwrap()
            };
            let adapters = specs.iter().enumerate().map(open).collect();
            Self { folder, adapters }
        }

        fn run(
            &self,
            coefficients: &[Vec<f64>],
            strengths: Option<&[Vec<f64>]>,
            options: Options,
        ) -> Result<Vec<Tensors>> {
            let outputs: Vec<PathBuf> = (0..coefficients.len())
                .map(|k| self.folder.path().join(format!("out{k}")))
                .collect();
            let terms = terms(&self.adapters, coefficients, strengths)?;
            Soup::new(&terms, options)?.write(&outputs, Dtype::F32, &Watch::default())?;
            Ok(outputs.iter().map(read).collect())
        }
    }

    fn terms<'a>(
        adapters: &'a [Adapter],
        coefficients: &[Vec<f64>],
        strengths: Option<&[Vec<f64>]>,
    ) -> Result<Terms<'a>> {
        let one_each = |row: &Vec<f64>| row.iter().map(|&c| vec![c]).collect();
        let coefficients: Vec<_> = coefficients.iter().map(one_each).collect();
        Terms::new(adapters, &coefficients, strengths)
    }

    fn specs() -> Vec<Spec> {
        [Dtype::F32, Dtype::F16, Dtype::BF16]
            .into_iter()
            .cycle()
            .take(11)
            .enumerate()
            .map(|(i, dtype)| Spec {
                dtype,
                seed: i as u32,
                inner: 1501,
                outer: 997,
                ..Spec::default()
            })
            .collect()
    }

    #[test]
    fn sums_equal_float64_for_mixed_types_many_targets_and_every_way_of_running() {
        let specs = specs();
        let case = Case::new(&specs);
        let coefficients: Vec<Vec<f64>> = (0..7)
            .map(|k| (0..11).map(|i| if i == k { 0.0 } else { 0.1 * (i as f64 - 4.0) }).collect())
            .collect();
        let strengths: Vec<Vec<f64>> = (0..11).map(|i| vec![1.0 + 0.1 * i as f64, 2.0]).collect();
        let mut first = None;
        for threads in [1, 2, 5] {
            for io in [Io::Mmap, Io::Read] {
                for memory in [3 << 20, 64 << 20] {
                    let options = Options { threads, memory, io, allow_nan: false };
                    let got = case.run(&coefficients, Some(&strengths), options).unwrap();
                    assert_eq!(*first.get_or_insert(got.clone()), got, "{threads} {io:?} {memory}");
                }
            }
        }
        for (target, got) in first.unwrap().iter().enumerate() {
            let expected = expected(&specs, &coefficients[target], Some(&strengths));
            for ((name, got), expected) in got.iter().zip(&expected) {
                for (got, expected) in got.iter().zip(expected) {
                    assert!((f64::from(*got) - expected).abs() < 2e-6, "{name}: {got} {expected}");
                }
            }
            let alone = std::slice::from_ref(&coefficients[target]);
            let alone = case.run(alone, Some(&strengths), Options::default()).unwrap();
            assert_eq!(alone[0], *got, "one target alone and among others");
        }
    }

    #[test]
    fn adapters_without_a_coefficient_are_not_read() {
        let specs = specs();
        let case = Case::new(&specs);
        std::fs::remove_file(&case.adapters[3].path).unwrap();
        let mut coefficients = vec![0.0; 11];
        coefficients[5] = 1.0;
        let terms = terms(&case.adapters, std::slice::from_ref(&coefficients), None).unwrap();
        let soup = Soup::new(&terms, Options::default()).unwrap();
        assert_eq!(soup.plan().bytes, 2 * (2 * 1501 + 997 * 2) * 2);
        let got = case.run(&[coefficients], None, Options::default()).unwrap();
        let same = rounded(specs[5].numbers(0)[7], specs[5].dtype);
        assert_eq!(got[0][0].1[7], same);
    }

    #[test]
    fn what_is_not_finite_is_named_or_let_through() {
        let bad = Spec { first: Some(f32::NEG_INFINITY), ..Spec::default() };
        let case = Case::new(&[Spec::default(), bad, Spec { seed: 5, ..Spec::default() }]);
        let all = vec![0.5, 0.25, 0.25];
        let without = vec![0.5, 0.0, 0.5];
        let error = case.run(std::slice::from_ref(&all), None, Options::default()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("in1") && text.contains("`base_model.model.q.lora_A.weight`"));
        assert!(text.contains("-Inf"), "{text}");
        assert!(!case.folder.path().join("out0").exists());
        let allow = Options { allow_nan: true, ..Options::default() };
        let got = case.run(&[all, without.clone()], None, allow).unwrap();
        assert_eq!(got[0][0].1[0], f32::NEG_INFINITY);
        let alone = case.run(&[without], None, Options::default()).unwrap();
        assert_eq!(got[1], alone[0], "0 times infinity stays out of the other target");
    }

    #[test]
    fn an_overflow_is_not_blamed_on_a_member() {
        let case = Case::new(&[Spec { first: Some(3e38), ..Spec::default() }]);
        let error = case.run(&[vec![2.0]], None, Options::default()).unwrap_err();
        assert!(matches!(error, Error::Overflow { dtype: Dtype::F32, .. }), "{error}");
    }

    #[test]
    fn a_stopped_job_leaves_nothing() {
        let case = Case::new(&specs());
        let terms = terms(&case.adapters, &[vec![0.1; 11]], None).unwrap();
        let soup = Soup::new(&terms, Options::default()).unwrap();
        let watch = Watch::default();
        watch.stop();
        let out = case.folder.path().join("out");
        let error = soup.write(std::slice::from_ref(&out), Dtype::F32, &watch).unwrap_err();
        assert!(matches!(error, Error::Stopped));
        assert_eq!(std::fs::read_dir(case.folder.path()).unwrap().count(), 11);
    }
}
