//! `soup`: Σ c_i A_i and Σ c_i s_i B_i, the factors summed apart, for any number of targets in one
//! pass over the adapters.

use std::{ops::Range, path::PathBuf};

use crate::{
    Dtype, Io,
    adapter::Adapter,
    bank::{Bank, Holder, Slot},
    blocks::{LINE, Options, Piece, Plan, REUSED, Run, STRIP, joined},
    error::{At, Error, Result, not_finite},
    joint::each_on_threads,
    kernels::{Kernel, widest},
    layout::Factor,
    source::Source,
    tensor::Order,
    terms::Terms,
    watch::Watch,
    writer::Writer,
};

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
        writers.into_iter().try_for_each(Writer::finish)
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
        buffer: &'b mut [u64],
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

    /// The room that `row` needs, in words.
    fn room(&self, piece: &Piece, holder: Holder) -> usize {
        let tensor = self.bank.tensor(holder);
        match (tensor.order, self.plan.io) {
            (Order::Rows, Io::Mmap) => 0,
            _ => tensor.held_as().size(piece.len).div_ceil(8),
        }
    }

    /// Those of a slot's holders that are among `adapters`.
    fn holders(&self, slot: &'a Slot, adapters: &Range<usize>) -> &[Holder] {
        let from = slot.holders.partition_point(|holder| holder.adapter < adapters.start);
        let to = slot.holders.partition_point(|holder| holder.adapter < adapters.end);
        &slot.holders[from..to]
    }
}

/// One thread's share: its buffers, kept from block to block.
struct Worker<'a> {
    soup: &'a Soup<'a>,
    sources: &'a [Source],
    watch: &'a Watch,
    kernel: Kernel,
    /// The block's sums, one row a target.
    sums: Vec<f32>,
    /// A strip of each row of a group that must become float32 first.
    widened: Vec<f32>,
    /// What positional reads fill; in words, for the sake of alignment.
    read: Vec<u64>,
    /// Bytes of a file that has another order.
    bytes: Vec<u8>,
}

impl<'a> Worker<'a> {
    fn new(soup: &'a Soup<'a>, sources: &'a [Source], watch: &'a Watch) -> Self {
        let widened = vec![0.0; soup.plan.group * STRIP];
        let (sums, read, bytes) = (vec![], vec![], vec![]);
        Self { soup, sources, watch, kernel: widest(), sums, widened, read, bytes }
    }

    /// Sum a block for every target, and write it.
    fn write(&mut self, block: &[Run], writers: &[Writer], dtype: Dtype) -> Result<()> {
        let everyone = 0..self.soup.bank.adapters.len();
        let targets = writers.len();
        let allow_nan = self.soup.options.allow_nan;
        self.sum(block, 0..targets, std::slice::from_ref(&everyone))?;
        if allow_nan && targets > 1 && !self.sums.iter().all(|sum| sum.is_finite()) {
            // 0 · NaN is NaN: a target must not take NaN from an adapter that is not its own.
            for (target, writer) in writers.iter().enumerate() {
                let own = |i: &usize| !self.soup.terms.is_without(target, *i);
                let own: Vec<_> = everyone.clone().filter(own).map(|i| i..i + 1).collect();
                self.sum(block, target..target + 1, &own)?;
                write_block(block, &self.sums, writer)?;
            }
            return Ok(());
        }
        for (sums, writer) in self.sums.chunks(stride(block)).zip(writers) {
            match write_block(block, sums, writer)? {
                Some(piece) if !allow_nan => return Err(self.blame(&piece, dtype)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Sum a block over `adapters` for some targets, into `self.sums`.
    fn sum(
        &mut self,
        block: &[Run],
        targets: Range<usize>,
        adapters: &[Range<usize>],
    ) -> Result<()> {
        let stride = stride(block);
        self.sums.resize(targets.len() * stride, 0.0);
        let mut start = 0;
        for run in block {
            // Shortly before they are used, and so in a near cache.
            self.sums.chunks_mut(stride).for_each(|row| row[start..start + run.len].fill(0.0));
            for group in adapters.iter().flat_map(|range| groups(range, self.soup.plan.group)) {
                self.each_range(run, &group, Source::announce);
                let mut at = start;
                for piece in &run.pieces {
                    self.add(piece, at, stride, &targets, &group)?;
                    at += piece.len;
                }
                self.each_range(run, &group, Source::release);
            }
            start += run.len;
        }
        Ok(())
    }

    /// Add a piece of a group of adapters to the sums, of which a row is `stride` long and the
    /// piece begins at `at`.
    fn add(
        &mut self,
        piece: &Piece,
        at: usize,
        stride: usize,
        targets: &Range<usize>,
        group: &Range<usize>,
    ) -> Result<()> {
        let soup = self.soup;
        let slot = &soup.bank.slots[piece.slot];
        let holders = soup.holders(slot, group);
        if holders.is_empty() {
            return Ok(());
        }
        let weights: Vec<f32> = targets
            .clone()
            .flat_map(|target| holders.iter().map(move |h| soup.weight(target, slot, *h)))
            .collect();
        // A cache line apart: see `Plan::new`.
        let room = |holder: &Holder| soup.room(piece, *holder).next_multiple_of(8) + 8;
        let needed = holders.iter().map(room).sum();
        if self.read.len() < needed {
            self.read.resize(needed, 0);
        }
        let mut free = &mut self.read[..];
        let mut rows = Vec::with_capacity(holders.len());
        for holder in holders {
            self.watch.go_on()?;
            let (buffer, rest) = free.split_at_mut(room(holder));
            rows.push(soup.row(self.sources, *holder, piece, buffer, &mut self.bytes)?);
            free = rest;
        }
        let dtype = summed_as(rows.iter().map(|(dtype, _)| *dtype), targets.len());
        for start in (0..piece.len).step_by(STRIP) {
            self.watch.go_on()?;
            let strip = start..piece.len.min(start + STRIP);
            let strips: Vec<&[u8]> = rows
                .iter()
                .zip(self.widened.chunks_mut(STRIP))
                .map(|(row, free)| ready(row, dtype, &strip, free, self.kernel))
                .collect();
            let sums = &mut self.sums[at + start..];
            (self.kernel.add_products)(sums, stride, dtype, &strips, &weights);
        }
        let size = |holder: &Holder| soup.bank.tensor(*holder).dtype.size(piece.len);
        self.watch.advance(holders.iter().map(size).sum());
        Ok(())
    }

    /// What a group of adapters has of a run, as few ranges of each as it is, to `tell`.
    fn each_range(&self, run: &Run, group: &Range<usize>, tell: fn(&Source, &Range<u64>)) {
        for adapter in group.clone() {
            let mut range = 0..0;
            for piece in &run.pieces {
                let slot = &self.soup.bank.slots[piece.slot];
                let own = adapter..adapter + 1;
                let Some(holder) = self.soup.holders(slot, &own).first() else { continue };
                let next = self.soup.span(piece, *holder);
                if next.start == range.end {
                    range.end = next.end;
                } else {
                    tell(&self.sources[adapter], &range);
                    range = next;
                }
            }
            tell(&self.sources[adapter], &range);
        }
    }

    /// Whose fault it is that the sum of a piece is not finite.
    fn blame(&mut self, piece: &Piece, dtype: Dtype) -> Error {
        let soup = self.soup;
        let slot = &soup.bank.slots[piece.slot];
        for holder in &slot.holders {
            let adapter = soup.bank.adapters[holder.adapter];
            let tensor = soup.bank.tensor(*holder);
            self.read.resize(soup.room(piece, *holder), 0);
            let row = match soup.row(self.sources, *holder, piece, &mut self.read, &mut self.bytes)
            {
                Ok(row) => row,
                Err(error) => return error,
            };
            for start in (0..piece.len).step_by(STRIP) {
                let strip = start..piece.len.min(start + STRIP);
                let bytes = &row.1[row.0.size(strip.start)..row.0.size(strip.end)];
                let numbers = &mut self.widened[..strip.len()];
                (self.kernel.widen)(row.0, bytes, numbers);
                if let Some(number) = numbers.iter().find(|number| !number.is_finite()) {
                    return Error::NotFinite {
                        path: adapter.path.clone(),
                        tensor: tensor.name.clone(),
                        value: not_finite(*number),
                    };
                }
            }
        }
        Error::Overflow { tensor: slot.name.clone(), dtype }
    }
}

/// How far apart a block's rows of sums begin: a cache line more than a row is long, so that the
/// rows of many targets do not share the same places of a cache.
fn stride(block: &[Run]) -> usize {
    block.iter().map(|run| run.len).sum::<usize>().next_multiple_of(LINE) + LINE
}

/// `range` in parts of `length`; the last one may be shorter.
fn groups(range: &Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    range.clone().step_by(length).map(move |start| start..end.min(start + length))
}

/// Write a target's sums of a block; answers a piece that is not finite in the file's type.
fn write_block(block: &[Run], sums: &[f32], writer: &Writer) -> Result<Option<Piece>> {
    let mut at = 0;
    let mut faulty = None;
    for piece in joined(block) {
        let finite = writer.write(piece.slot, piece.start, &sums[at..at + piece.len])?;
        at += piece.len;
        faulty = faulty.or((!finite).then_some(piece));
    }
    Ok(faulty)
}

/// A file's type and a run of its bytes.
type Row<'b> = (Dtype, &'b [u8]);

/// The type in which rows of these types go into the sums: their own where they have one and it is
/// converted once or twice, else float32.
fn summed_as(mut dtypes: impl Iterator<Item = Dtype>, targets: usize) -> Dtype {
    let first = dtypes.next().unwrap_or(Dtype::F32);
    let narrow = matches!(first, Dtype::F16 | Dtype::BF16 | Dtype::Q8_0);
    if narrow && targets < REUSED && dtypes.all(|dtype| dtype == first) {
        first
    } else {
        Dtype::F32
    }
}

/// A strip of a row as `wanted`: in place where it lies ready, else widened into `free`.
fn ready<'b>(
    (dtype, bytes): &Row<'b>,
    wanted: Dtype,
    strip: &Range<usize>,
    free: &'b mut [f32],
    kernel: Kernel,
) -> &'b [u8] {
    let bytes = &bytes[dtype.size(strip.start)..dtype.size(strip.end)];
    if *dtype == wanted {
        return bytes;
    }
    let free = &mut free[..strip.len()];
    (kernel.widen)(*dtype, bytes, free);
    bytemuck::cast_slice(free)
}

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
